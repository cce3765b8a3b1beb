"""The documentation: its Python runs, its links are valid, and every exported name has an entry.

A block of Python runs unless its first line is ``# needs a GPU`` or ``# needs a download: ...``; such a block is only
compiled.
"""

from __future__ import annotations

import ast
import doctest
import importlib.util
import json
import os
import pydoc
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastcompress as fc
from fastcompress.cli import main as cli
from tests.support import ROOT

DOCS = ROOT / "docs"
FOLDERS = ("docs", "assets", "benchmarks", "examples", "experiments", "scripts", "tests")
PAGES = [*ROOT.glob("*.md"), *sorted(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]
#: The package that the blocks of a page need.
REQUIREMENTS = {
    "wheels.md": "triton",
    "packing.md": "transformers",
    "speech.md": "transformers",
    "integration.md": "transformers",
    "serving.md": "transformers",
    "adding-a-rule.md": "numpy",
}
NEEDS = re.compile(r"# needs (a GPU|a download: \S.*)\n")
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
MODULES = (
    "fastcompress",
    "fastcompress.nn",
    "fastcompress.decoder",
    "fastcompress.lalm",
    "fastcompress.integrations.transformers",
    "fastcompress.integrations.vllm",
)


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str) -> Iterator[tuple[int, str]]:
    """Yield blocks of Python, with the number of lines before each."""
    for fence in FENCE.finditer(text):
        if fence[1] == "python":
            yield text.count("\n", 0, fence.start(2)), fence[2]


def prose(text: str) -> str:
    """Return the text with empty lines in place of fenced blocks."""
    return FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)


def indented(text: str) -> Iterator[str]:
    """Yield indented blocks of code."""
    for found in re.finditer(r"(?:^|(?<=\n\n))((?: {4}.*\n|\n(?= {4}))+)", prose(text)):
        yield "\n".join(line[4:] for line in found[1].splitlines())


def is_python(text: str) -> bool:
    """Return whether the text is Python code that does something. A shell command is not valid syntax."""
    if ">>> " in text:
        return True
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return False
    doing = (ast.Import, ast.ImportFrom, ast.Assign, ast.Call, ast.FunctionDef, ast.With, ast.For)
    return any(isinstance(node, doing) for node in ast.walk(tree))


# Code


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=identify)
def test_snippets(page: Path):
    """Run all blocks of a page in order."""
    if page.name in REQUIREMENTS:
        pytest.importorskip(REQUIREMENTS[page.name])
    names: dict[str, object] = {}
    ran = 0
    for line, block in blocks(page.read_text()):
        code = compile("\n" * line + block, str(page), "exec")  # the line numbers of errors are those of the page
        needs = NEEDS.match(block)
        if needs is None or (needs[1] == "a GPU" and torch.cuda.is_available()):
            exec(code, names)
            ran += 1
    assert ran


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_python_is_in_fenced_blocks(page: Path):
    """All Python is in fenced blocks, which ``test_snippets`` runs."""
    text = page.read_text()
    assert set(re.findall(r"^.*```.*$", prose(text), re.MULTILINE)) == set(), "a fence is indented or not closed"
    for fence in FENCE.finditer(text):
        assert fence[1] == "python", f"fenced block of {fence[1] or 'no language'}: fence Python only, indent the rest"
        assert NEEDS.match(fence[2]) or not fence[2].lower().startswith("# needs"), fence[2]
    for block in indented(text):
        assert not is_python(block), f"indented Python does not run in the tests: fence it\n{block}"


def test_the_search_for_python():
    text = "Words:\n\n    make demo    # sets up\n\nand\n\n    import torch\n\n    x = 1\n\n```python\ny = 1\n```\n"
    found = list(indented(text))
    assert found == ["make demo    # sets up", "import torch\n\nx = 1"]
    assert [is_python(block) for block in found] == [False, True]
    assert is_python("print(1)") and is_python(">>> 1") and not is_python('{"text": "two hundred"}')
    assert [block for _, block in blocks(text)] == ["y = 1\n"]


def test_examples_in_docstrings():
    found = 0
    for path in sorted((ROOT / "fastcompress").rglob("*.py")):
        if ">>> " in path.read_text():
            module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
            result = doctest.testmod(module)
            assert result.failed == 0
            found += result.attempted
    assert found


# Links


def slug(heading: str) -> str:
    """Return the anchor of a heading, on the site and on GitHub."""
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)|`", lambda m: m[1] or "", heading)
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def anchors(page: Path) -> set[str]:
    text = page.read_text()
    return {slug(h) for h in re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)} | set(
        re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    )


def markdown(page: Path) -> str:
    if page.suffix == ".md":
        return prose(page.read_text())
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "examples" / "tour.ipynb"], ids=identify)
def test_links(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", markdown(page)):
        if re.match(r"\w+:", target):
            assert target.startswith("https://"), target
            continue
        path, _, anchor = target.partition("#")
        # normpath, since resolve would follow the symbolic links in docs/
        file = page if not path else Path(os.path.normpath(page.parent / path))
        assert file.is_file(), f"{target} does not exist"
        assert not anchor or anchor in anchors(file), f"{target}: no such heading"
        if page.is_relative_to(DOCS):
            assert file.is_relative_to(DOCS), f"{target} is not on the site"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=identify)
def test_named_files_exist(page: Path):
    """Paths in backticks exist in the repository."""
    for path in re.findall(rf"`((?:fastcompress|csrc|{'|'.join(FOLDERS)})/[\w./*-]*)`", page.read_text()):
        assert list(ROOT.glob(path.rstrip("/"))), f"{path} does not exist"


def test_images_are_used():
    text = "".join(page.read_text() for page in PAGES)
    for image in (DOCS / "images").iterdir():
        assert image.suffix not in (".png", ".svg") or f"images/{image.name})" in text, image.name


def picture_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / "images" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_picture_of_inspect(tmp_path: Path):
    """The script runs on the shipped model, whose encoder gives 50 frames per second."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    script = picture_script("draw_inspect")
    script.main(str(tmp_path))
    assert (tmp_path / "inspect.png").read_bytes().startswith(b"\x89PNG")
    frames, rate = script.ShippedEncoder().frames(torch.randn(32000).numpy())
    assert frames.shape[0] == 2 * rate == 100


def test_drawn_pictures(tmp_path: Path):
    """The script draws the committed pictures, with the constants of the kernels."""
    pytest.importorskip("matplotlib")
    script = picture_script("draw_kernels")
    script.main(str(tmp_path))
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (DOCS / "images").glob("*.svg")}
    extra = re.search(r"kExtraRows = (\d+);", (ROOT / "csrc" / "cuda" / "params.h").read_text())
    assert extra is not None and script.EXTRA == int(extra[1])


def test_commands_exist():
    """Targets of make, and commands of fastcompress with their options, exist."""
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    parser = cli.make_parser()
    commands = next(a for a in parser._actions if isinstance(a.choices, dict)).choices
    assert commands is not None
    seen = set()
    for page in PAGES:
        text = prose(page.read_text())
        for target in re.findall(r"(?:^ {4}|`)make ([a-z][\w-]*)", text, re.MULTILINE):
            assert target in targets, f"{page.name}: make {target}"
        lines = re.findall(r"(?:^ {4}.*?|`)fastcompress ([a-z][\w-]*)((?:[^`\n\\]|\\\n)*)", text, re.MULTILINE)
        for command, rest in lines:
            assert command in commands, f"{page.name}: fastcompress {command}"
            seen.add(command)
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", rest.split(" | ")[0]):
                known = commands[command].full()._option_string_actions
                assert option in known, f"{page.name}: fastcompress {command} has no {option}"
    assert seen == set(commands)


# Completeness


@pytest.mark.parametrize("name", MODULES)
def test_every_exported_symbol_is_on_its_page(name: str):
    module = pytest.importorskip(name)
    shown = re.findall(r"^::: (\S+)$", (DOCS / "api" / f"{name.rpartition('.')[2]}.md").read_text(), re.MULTILINE)
    assert len(shown) == len(set(shown))
    apart = {"fastcompress.nn", "fastcompress.__version__"}  # documented in other places
    missing = {f"{name}.{symbol}" for symbol in module.__all__} - set(shown) - apart
    assert not missing
    for path in shown:
        assert pydoc.locate(path) is not None, path


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    nav = text[text.index("\nnav:") : text.index("\nvalidation:")]
    assert sorted(re.findall(r": (\S+\.md)$", nav, re.MULTILINE)) == sorted(
        str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS)
    )


def test_length_of_readme_and_changelog():
    """README and changelog are short; longer text belongs in docs/."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110
    assert len((ROOT / "CHANGELOG.md").read_text().splitlines()) <= 30


def test_public_names_of_nn():
    defined = {n for n, v in vars(fc.nn).items() if getattr(v, "__module__", None) == fc.nn.__name__ and n[0] != "_"}
    assert defined == set(fc.nn.__all__)


def test_every_rule_is_in_the_guide():
    text = (DOCS / "guide.md").read_text()
    for rule in fc.rules.RULES.values():
        assert f"| [`{rule.__name__}`](api/fastcompress.md#fastcompress.{rule.__name__}) |" in text


@pytest.mark.parametrize(
    ("rule", "rows"),
    [
        ("uniform:3", 40 // 3 + 2),
        ("local-max", 40 // 2 + 2),
        ("local-max:min_len=3", 40 // 3 + 2),
        ("local-max:max_len=2", 42),
        ("local-max:min_len=2,max_len=2", 40 // 2 + 2),
        ("threshold:0.5,min_len=3", 40 // 3 + 2),
        ("peak-height:min_len=4", 40 // 4 + 2),
        ("top-k:rate=2", 42),
        ("lookback:2,threshold=0.3,min_len=4", 42),
    ],
)
def test_upper_bounds_of_the_guide(rule: str, rows: int):
    x, cu_seqlens = torch.randn(40, 8), torch.tensor([0, 10, 40])
    assert len(fc.segment_pool(x, cu_seqlens=cu_seqlens, rule=rule, compact=False).values) == rows
    group = torch.ones(40, dtype=torch.int32)
    assert len(fc.segment_pool(x, cu_seqlens=cu_seqlens, rule=rule, row_group=group, compact=False).values) == 40


def test_steps_of_adding_a_rule():
    """The files contain each line that the tables quote."""
    rows = 0
    for line in (DOCS / "adding-a-rule.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("| ") or len(cells) != 4 or "`" not in cells[1] or "`" not in cells[2]:
            continue
        files, quote = re.findall(r"`([^`]+)`", cells[1]), re.findall(r"`([^`]+)`", cells[2])[0]
        for file in files:
            assert quote in (ROOT / file).read_text(), f"{file} does not contain {quote}"
        rows += 1
    assert rows >= 20


def test_every_method_runs():
    """Each line of the table of methods runs and uses only exported names."""
    text = (ROOT / "docs" / "methods.md").read_text()
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "`fc." in line]
    assert len(lines) >= 19
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 8, generator=g).cumsum(0)  # frames similar to their neighbours
    names = {
        "fc": fc,
        "torch": torch,
        "x": x,
        "keys": torch.randn(60, 4, generator=g),
        "labels": torch.randint(0, 4, (60,), generator=g),
        "attention": torch.rand(60, generator=g),
        "blank": torch.rand(60, generator=g),
        "alpha": torch.rand(60, generator=g),
    }
    rules = set()
    for _, code, _ in lines:
        for snippet in re.findall(r"`(fc\.[^`]+)`", code):
            found = eval(snippet, dict(names))
            tokens = found if isinstance(found, int | torch.Tensor) else found.values
            assert isinstance(tokens, int) or 1 <= len(tokens) < 60, snippet
            rules |= set(re.findall(r'rule="([a-z-]+)', snippet))
    assert rules == set(fc.rules.RULES)  # every rule occurs
    exported = {"segment_pool", "greedy_segments", "bipartite_merge", "iterative_fusion", "integrate_and_fire"}
    assert all(f"fc.{name}" in text for name in exported) and "fc.nn.LearnedBoundary" in text
