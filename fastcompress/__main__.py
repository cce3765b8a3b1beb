"""Entry point of ``python -m fastcompress``."""

import sys

from fastcompress.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
