"""Report phrases that the style sheet (CONTRIBUTING.md) rules out, in the given files or in the whole checkout."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {".py", ".md", ".h", ".cpp", ".cu", ".cuh", ".sh", ".yml", ".yaml", ".toml", ".ipynb"}
COUNTED = (
    "frames|tokens|rows|bytes|elements|seconds|milliseconds|characters|words|instructions|threads|warps|lanes|tests"
    "|numbers|placeholders"
)
UNIT = (
    "audio|backend|batch|block|call|case|chunk|clip|frame|head|hour|kernel|lane|layer|line|million|minute|op"
    "|repetition|row|sample|second|segment|sequence|step|thread|tile|token|utterance|warp|window"
)
#: Patterns of phrases, and what to write instead. No pattern may match plain English.
PHRASES = {
    rf"\b(?!rows a row)({COUNTED}) an? ({UNIT})\b": "per: frames per token",
    rf"\ban? (thread|warp|block|lane|word|number|placeholder|token) an? ({UNIT})\b": "per: one thread per row",
    r"\b(is|are|was|were) none of\b": "is not one of",
    r"\b(that|which) (is|are|was|were) (?-i:none)\b": "is not, has no",
    r"\bfrom nothing\b": "from scratch",
    r"\bwhile (audio|speech) comes\b": "streaming",
    r"\bgoes on\b": "continues",
    r"\bhears\b": "receives, transcribes",
    r"\bgoes? with\b": "is for, needs",
    r"\b(says|tells) (what|which|whether|how|why|so|all|that|nothing)\b": "reports, states, describes",
    r"\bbehind (the|a|it|its|each|element)\b": "after, following",
    r"\b(is|are) (asked|told)\b": "gets, is called",
    r"\banew\b": "again",
    r"\bnobody\b": "no function, no process",
    r"\b(normal|synchron|penal|optim|initial)is(e[ds]?|ing|ation)\b": "-ize",
    r"\bsynthesis(e[ds]?|ers?|ing)\b": "synthesize",
    r"\bstands? beside\b": "is compared with",
    r"\bmends?\b|\bmended[.:]": "fix, fixed",
    r"\bhas not run yet\b": "untested",
}
PATTERNS = [(re.compile(pattern, re.IGNORECASE), advice) for pattern, advice in PHRASES.items()]


def problems(path: Path) -> list[str]:
    """Return a message for each phrase in a file that the style sheet rules out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [
        f"{path}:{number}: instead of {found[0]!r} write {advice}"
        for number, line in enumerate(lines, 1)
        for pattern, advice in PATTERNS
        if (found := pattern.search(line))
    ]


def main() -> int:
    names = sys.argv[1:] or subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    paths = [ROOT / name for name in names if Path(name).suffix in SUFFIXES or Path(name).name == "Makefile"]
    found = [line for path in paths if path.exists() and path != Path(__file__).resolve() for line in problems(path)]
    print("\n".join(found).replace(f"{ROOT}/", ""))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
