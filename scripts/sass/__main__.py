"""Print what the machine code of the CUDA kernels costs, and the speed that this predicts. No GPU is needed.

python -m scripts.sass --kernel 'segment_pool.*BFloat16, true, true'
python -m scripts.sass --write      # rewrite tests/csrc/sass.json after an intended change
"""

from __future__ import annotations

import argparse
import json
import re
import sys

from scripts.sass.compile import ROOT, compile_kernels, missing_tool, nvcc_release
from scripts.sass.measure import measure
from scripts.sass.report import as_json, as_text, committed, header

TABLE = ROOT / "tests" / "csrc" / "sass.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.sass", description="Read the machine code of the kernels.")
    parser.add_argument("--arch", default="90", help="architecture to compile for (default: 90)")
    parser.add_argument("--kernel", default="", metavar="REGEX", help="only kernels whose name contains this")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--write", action="store_true", help=f"rewrite {TABLE.relative_to(ROOT)}")
    options = parser.parse_args()
    if missing := missing_tool():
        print(missing, file=sys.stderr)
        return 1
    if options.write and (options.kernel or options.arch != "90"):
        parser.error("--write needs all kernels for the default architecture")
    kernels = [measure(k) for k in compile_kernels(options.arch) if re.search(options.kernel, k.name)]
    if not kernels:
        parser.error(f"no kernel's name contains {options.kernel!r}")
    if options.write:
        rows = {kernel.name: committed(kernel) for kernel in kernels}
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
        TABLE.write_text(f'{{\n "nvcc": "{nvcc_release()}",\n "kernels": {{\n{lines}\n }}\n}}\n')
        print(f"{TABLE}: {len(rows)} kernels")
    elif options.json:
        print(json.dumps({kernel.name: as_json(kernel) for kernel in kernels}, indent=1))
    else:
        print(header(options.arch, nvcc_release()))
        print("\n\n".join(map(as_text, kernels)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
