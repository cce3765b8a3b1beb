"""Fuzz every op with hypothesis and every reader with atheris for a limited time (``make fuzz SECONDS=240``).

For each failure of an op, hypothesis prints the smallest example, and its seed is written to ``tests/fuzz/seeds.json``.
``FASTCOMPRESS_FUZZ_SEED`` repeats a seed. Bytes for which a reader fails are written to ``tests/fuzz/corpus``. ``make
test`` replays both.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time

from tests.fuzz.readers import ROOT, TARGETS, run
from tests.support.calls import CALLS

#: Share of the time for the ops; the rest is for the readers.
OPS_SHARE = 0.6
#: Seconds that a test may take beyond its search time, for the last round and for shrinking an example.
SHRINKING = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=float, nargs="?", default=240)
    seconds = parser.parse_args().seconds
    begin = time.monotonic()
    each = OPS_SHARE * seconds / (2 * len(CALLS))  # two tests per op
    command = [sys.executable, "-m", "pytest", "-q", "tests/fuzz/test_ops.py", f"--fuzz-seconds={each}"]
    command.append(f"--timeout={each + SHRINKING:.0f}")
    failed = subprocess.run(command, cwd=ROOT).returncode != 0
    targets = TARGETS
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed (`make fuzz` tries to install it): the readers are not fuzzed")
        targets = {}
    for number, target in enumerate(targets):
        left = seconds - (time.monotonic() - begin)
        print(f"fuzzing the reader {target!r}", flush=True)
        failed |= run(target, max(5, round(left / (len(targets) - number)))) != 0
    sys.exit("fuzzing found a failure: see the output above and git status" if failed else 0)


if __name__ == "__main__":
    main()
