"""Imports run in one direction, without circles, and loading a model does not load a trainer.

test_import.py tests that ``import fastcompress`` needs only torch."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import ROOT, processes

PACKAGE = "fastcompress"

#: The layers of the package, from the command line down to the vocabulary. A module can import modules of its own
#: package, of layers below, and leaves, but not of other packages in the same layer. ``fastcompress`` is the file
#: ``__init__.py``, which the layers below cannot import.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("training", "inspection"),
    ("integrations", "lalm"),
    ("fastcompress",),
    ("decoder", "nn", "streaming"),
    ("ops",),
    ("dispatch",),
    ("triton",),
    ("reference",),
    ("segments",),
    ("rules",),
    ("rule_fields",),
    ("checks",),
)
#: The modules of this package that each leaf imports. Every layer can import leaves.
LEAVES: dict[str, frozenset[str]] = {
    "version": frozenset(),
    "files": frozenset(),
    "audio_source": frozenset(),
    "audio_file": frozenset({"audio_source"}),
    "audio": frozenset({"audio_file", "audio_source"}),
    "synthesis": frozenset({"version", "files", "audio"}),
}
#: Folders of the checkout that are not installed with the package.
NOT_INSTALLED = frozenset({"benchmarks", "examples", "experiments", "scripts", "tests"})


@dataclass(frozen=True)
class Import:
    """An import of one module by another, when it is loaded or (``late``) when a function is called."""

    importer: str
    imported: str
    late: bool

    def __str__(self) -> str:
        return f"{self.importer} imports {self.imported}{' in a function' if self.late else ''}"


def modules_of(root: Path, package: str) -> dict[str, Path]:
    files = sorted((root / package).rglob("*.py"))
    names = [".".join(file.relative_to(root).with_suffix("").parts) for file in files]
    return {name.removesuffix(".__init__"): file for name, file in zip(names, files, strict=True)}


def name_of(expression: ast.expr) -> str:
    """Return the last part of a dotted name."""
    return str(getattr(expression, "attr", getattr(expression, "id", "")))


def imported_names(node: ast.AST, package: str, late: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield the dotted names of possible modules that a file imports, and whether a function imports them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and name_of(child.test) == "TYPE_CHECKING":
            yield from imported_names(ast.Module(child.orelse, []), package, late)
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, late) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
            base = ".".join([*parents, *([child.module] if child.module else [])])
            yield from ((f"{base}.{alias.name}", late) for alias in child.names)
        elif isinstance(child, ast.Call) and name_of(child.func) == "import_module":
            yield from ((arg.value, late) for arg in child.args[:1] if isinstance(arg, ast.Constant))
        is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from imported_names(child, package, late or is_function)


def imports_of(root: Path, *packages: str) -> list[Import]:
    """Return every import of a module of this package.

    ``from package import name`` imports ``package/__init__.py`` if ``name`` is not a module. Importing ``a.b`` also
    runs ``a/__init__.py``; these imports are not included, since every file in the folder has them."""
    modules = {name: file for package in packages for name, file in modules_of(root, package).items()}
    roots = {*packages, *NOT_INSTALLED}
    found = set()
    for importer, file in modules.items():
        package = importer if file.name == "__init__.py" else importer.rpartition(".")[0]
        for name, late in imported_names(ast.parse(file.read_text(encoding="utf-8")), package):
            if name.split(".")[0] not in roots:
                continue
            imported = name if name in modules else name.rpartition(".")[0] or name
            found.add(Import(importer, imported, late))
    return sorted(found, key=str)


def circle_of(imports: Iterable[Import]) -> list[str]:
    """Return the modules of a circle, with the first one repeated at the end, or an empty list."""
    graph: dict[str, list[str]] = {}
    for edge in imports:
        graph.setdefault(edge.importer, []).append(edge.imported)
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for imported in graph.get(module, []):
            if circle := visit(imported, [*path, module]):
                return circle
        done.add(module)
        return []

    return next((circle for module in graph if (circle := visit(module, []))), [])


def part_of(module: str) -> str:
    """Return the name of a module in ``LAYERS`` and ``LEAVES``: the file or folder of the package that contains it."""
    names = module.split(".")
    return names[1] if len(names) > 1 else names[0]


def wrong_way(edge: Import) -> str:
    """Return the fault of an import of a module of the package, or an empty string."""
    importer, imported = part_of(edge.importer), part_of(edge.imported)
    if edge.imported.split(".")[0] in NOT_INSTALLED:
        return f"{edge}, which is not installed with the package"
    depths = {name: depth for depth, row in enumerate(LAYERS) for name in row}
    for name in (importer, imported):
        if name not in depths and name not in LEAVES:
            return f"{edge}: {name} is in no layer; add it to LAYERS or LEAVES"
    if importer == imported:
        return ""
    if importer in LEAVES:
        return "" if imported in LEAVES[importer] else f"{edge}, but {importer} is a leaf"
    if imported in LEAVES or depths[imported] > depths[importer]:
        return ""
    return f"{edge}, but {imported} is not below {importer}"


def problems(root: Path) -> list[str]:
    """Return the faults of a checkout: imports in the wrong direction, and circles, including imports in functions."""
    imports = imports_of(root, PACKAGE)
    circle = circle_of(imports)
    return [found for edge in imports if (found := wrong_way(edge))] + ([" -> ".join(circle)] if circle else [])


def test_imports_run_in_one_direction_without_circles():
    assert len(imports_of(ROOT, PACKAGE)) > 200
    assert problems(ROOT) == []


def test_the_plugin_of_vllm_needs_no_patches_of_transformers():
    """vLLM pins an older transformers than the patches support."""
    plugin = [edge for edge in imports_of(ROOT, PACKAGE) if edge.importer.startswith("fastcompress.integrations.vllm")]
    assert len(plugin) > 10
    assert not [edge for edge in plugin if edge.imported.startswith("fastcompress.integrations.transformers")]


def test_loading_a_module_has_no_circle():
    imports = imports_of(ROOT, PACKAGE, "benchmarks")
    assert sum(edge.importer.startswith("benchmarks") for edge in imports) > 50
    assert circle_of(edge for edge in imports if not edge.late) == []


# The checks above find faults


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / PACKAGE / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        for folder in (file.parent, root / PACKAGE):
            (folder / "__init__.py").touch()
    return root


SOUND = {
    "checks.py": "import os\n",
    "rules.py": "from fastcompress.checks import check\n",
    "reference/pool.py": "from fastcompress import rules\n",
    "ops/pool.py": "from fastcompress.reference.pool import pool\nfrom . import other\n",
    "ops/other.py": "",
    "lalm/model.py": "import fastcompress as fc\n",
    "cli/main.py": "def main():\n    from fastcompress.lalm import model\n",
    "audio.py": "",
    "synthesis/data.py": "from fastcompress.audio import read\n",
}


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        (
            "checks.py",
            "import fastcompress.rules\n",
            "fastcompress.checks imports fastcompress.rules, but rules is not",
        ),
        ("checks.py", "def f():\n    from . import rules\n", "imports fastcompress.rules in a function, but rules"),
        (
            "reference/pool.py",
            "try:\n    from ..ops import pool\nexcept ImportError: ...\n",
            "ops is not below reference",
        ),
        (
            "ops/other.py",
            "def f():\n    from fastcompress.ops.pool import g\n",
            "fastcompress.ops.pool -> fastcompress.ops.other",
        ),
        ("integrations/patch.py", "import fastcompress.lalm.model\n", "lalm is not below integrations"),
        ("lalm/loading.py", "class A:\n    from fastcompress import training\n", "training is not below lalm"),
        ("ops/other.py", "import fastcompress as fc\n", "fastcompress is not below ops"),
        ("audio.py", "import fastcompress.checks\n", "audio is a leaf"),
        ("synthesis/data.py", "from fastcompress.training.manifest import read\n", "synthesis is a leaf"),
        ("dispatch/call.py", "x = importlib.import_module('fastcompress.nn')\n", "nn is not below dispatch"),
        ("rules.py", "from tests.support import ROOT\n", "imports tests.support, which is not installed"),
        ("new.py", "import fastcompress.checks\n", "new is in no layer"),
        ("rules.py", "if TYPE_CHECKING:\n    import fastcompress.cli.main\n", None),
        ("rules.py", "if TYPE_CHECKING:\n    ...\nelse:\n    import fastcompress.cli.main\n", "cli is not below rules"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, text: str, problem: str | None):
    training = {"training/__init__.py": "", "training/manifest.py": "", "nn.py": ""}
    assert problems(write(tmp_path, SOUND | training)) == []
    found = problems(write(tmp_path, {file: text}))
    assert (found == []) if problem is None else any(problem in line for line in found), found


def test_a_circle_is_found():
    edges = [("a", "b"), ("b", "c"), ("d", "b"), ("c", "e")]
    assert circle_of(Import(a, b, False) for a, b in edges) == []
    assert circle_of(Import(a, b, False) for a, b in [*edges, ("e", "b")]) == ["b", "c", "e", "b"]


# Loaded modules


IMPORT = """
import json, os, sys, torch, transformers
transformers.PreTrainedModel, transformers.GenerationMixin  # takes seconds, so that it is done once
for module in sys.argv[1:]:
    if os.fork() == 0:
        __import__(module)
        print(json.dumps([name for name in sys.modules if name.startswith("fastcompress")]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def loaded_by(*modules: str) -> list[set[str]]:
    """Return the modules of the package that the import of each module loads, each in a process of its own."""
    done = processes.run(["-c", IMPORT, *modules], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [set(json.loads(line)) for line in done.stdout.splitlines()]


def below(modules: set[str], *packages: str) -> set[str]:
    return {name for name in modules if any(name == p or name.startswith(f"{p}.") for p in packages)}


def test_loading_and_patching_models_loads_no_trainer():
    pytest.importorskip("transformers")
    patching, loading = "fastcompress.integrations.transformers", "fastcompress.lalm.loading"
    serving = "fastcompress.integrations.vllm"
    by_patching, by_loading, by_serving = loaded_by(patching, loading, serving)
    assert serving in by_serving and not below(by_serving, patching, "fastcompress.decoder", "fastcompress.lalm")
    assert patching in by_patching and loading in by_loading
    assert not below(by_patching, "fastcompress.training", "fastcompress.lalm")
    assert not below(by_loading, "fastcompress.training", "fastcompress.integrations", "fastcompress.synthesis")
