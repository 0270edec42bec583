"""The plan of the house: which module may import which, and what the package shows outside."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "pyksm"

FLOORS = {
    0: ["errors", "result", "_linux"],
    1: ["_sys", "_pages", "_buffer", "_numpy", "_inject"],
    2: ["undo", "smaps", "frames", "knobs", "lease", "marks", "region", "process", "host", "arrays"]
    + ["allocating", "settling", "copying", "loading", "source", "unpickling", "headroom"],
    3: ["estimate", "verbs", "diagnosis", "rules"],
    4: ["daemon"],
    5: ["cli", "contrib", "__main__"],
}
"""A module may import what lives on a lower floor. A new module is added here first."""

SAME_FLOOR = {
    ("_pages", "_sys"),
    ("_buffer", "_sys"),
    ("_numpy", "_sys"),
    ("_numpy", "_buffer"),
    ("_inject", "_sys"),
    ("frames", "smaps"),
    ("lease", "undo"),
    ("lease", "knobs"),
    ("marks", "undo"),
    ("marks", "smaps"),
    ("marks", "headroom"),
    ("host", "headroom"),
    ("host", "frames"),
    ("process", "undo"),
    ("process", "smaps"),
    ("process", "frames"),
    ("process", "marks"),
    ("region", "undo"),
    ("region", "smaps"),
    ("region", "frames"),
    ("region", "marks"),
    ("region", "process"),
    ("region", "host"),
    ("region", "settling"),
    ("process", "host"),
    ("process", "settling"),
    ("host", "settling"),
    ("settling", "undo"),
    ("host", "undo"),
    ("host", "lease"),
    ("host", "knobs"),
    ("arrays", "undo"),
    ("arrays", "marks"),
    ("arrays", "region"),
    ("copying", "arrays"),
    ("source", "arrays"),
    ("loading", "arrays"),
    ("loading", "source"),
    ("loading", "unpickling"),
    ("unpickling", "arrays"),
    ("unpickling", "source"),
    ("allocating", "undo"),
    ("allocating", "marks"),
    ("allocating", "smaps"),
    ("diagnosis", "estimate"),
    ("verbs", "estimate"),
    ("__main__", "cli"),
}
"""Who leans on whom within a floor; the pairs must form no circle."""

DEFERRED_UP = {
    ("region", "estimate"),
    ("process", "estimate"),
    ("host", "estimate"),
}
"""The nouns offer the verbs of floor 3: inside a method, or for the type checker alone."""


class Import(NamedTuple):
    importer: str
    imported: str
    deferred: bool
    place: str


def floor_of(module: str) -> int:
    for floor, modules in FLOORS.items():
        if module in modules:
            return floor
    raise AssertionError(f"pyksm.{module} is on no floor: add it to FLOORS in {__file__}")


def room(path: Path) -> str:
    """Return the name in the table: the module, or the folder it is in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(path.suffix)


def sources(suffix: str) -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob(f"*{suffix}")) if path != PACKAGE / "__init__.py"]


def python_imports(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text())
    yield from _imports(tree, path, deferred=False)


def _imports(node: ast.AST, path: Path, *, deferred: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        for name in _imported(child):
            yield Import(room(path), name, deferred, f"{path.name}:{getattr(child, 'lineno', 0)}")
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield from _imports(child, path, deferred=deferred or function or typing)


def _imported(node: ast.AST) -> Iterator[str]:
    """Yield the rooms that one statement imports; a public name (``pyksm.Region``) as ``*``."""
    if isinstance(node, ast.ImportFrom):
        assert not node.level, f"line {node.lineno}: import pyksm by its full name"
        if node.module == "pyksm":
            for alias in node.names:
                yield alias.name if _is_room(alias.name) else "*"
        elif node.module and node.module.startswith("pyksm."):
            yield node.module.split(".")[1]
    elif isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name == "pyksm":
                yield "*"
            elif alias.name.startswith("pyksm."):
                yield alias.name.split(".")[1]


def _is_room(name: str) -> bool:
    return any((PACKAGE / f"{name}{end}").exists() for end in (".py", ".pyx", ".pxd", ""))


CYTHON_IMPORT = re.compile(r"^\s*(?:from\s+pyksm\.(\w+)\s+c?import|c?import\s+pyksm\.(\w+))", re.M)


def cython_imports(path: Path) -> Iterator[Import]:
    for match in CYTHON_IMPORT.finditer(path.read_text()):
        yield Import(room(path), match[1] or match[2], False, path.name)


def all_imports() -> list[Import]:
    found = [each for path in sources(".py") for each in python_imports(path)]
    found += [
        each for end in (".pyx", ".pxd") for path in sources(end) for each in cython_imports(path)
    ]
    return [each for each in found if each.importer != each.imported]


def wrong(each: Import) -> str:
    """Return what is wrong with one import, or nothing."""
    mine = floor_of(each.importer)
    if each.importer == "contrib":
        return "" if each.imported == "*" else "contrib uses public names only"
    if each.imported == "contrib":
        return "nothing imports contrib"
    if each.imported == "*":
        return "" if mine >= 4 else "import the module that owns the name, not the package"
    theirs = floor_of(each.imported)
    pair = (each.importer, each.imported)
    if theirs < mine or (theirs == mine and pair in SAME_FLOOR):
        return ""
    if each.deferred and pair in DEFERRED_UP:
        return ""
    return f"floor {mine} may not import floor {theirs}"


def test_imports_go_down_only() -> None:
    mistakes = [
        f"{each.place}: {each.importer} imports {each.imported}: {mistake}"
        for each in all_imports()
        if (mistake := wrong(each))
    ]
    assert not mistakes, "\n".join(mistakes)


def test_every_module_has_a_floor() -> None:
    for suffix in (".py", ".pyx"):
        for path in sources(suffix):
            floor_of(room(path))


@pytest.mark.parametrize(
    ("importer", "imported", "deferred", "mistake"),
    [
        ("undo", "verbs", False, "floor 2 may not import floor 3"),
        ("undo", "verbs", True, "floor 2 may not import floor 3"),
        ("region", "estimate", False, "floor 2 may not import floor 3"),
        ("region", "estimate", True, ""),
        ("smaps", "region", False, "floor 2 may not import floor 2"),
        ("region", "smaps", False, ""),
        ("daemon", "contrib", True, "nothing imports contrib"),
        ("contrib", "region", False, "contrib uses public names only"),
        ("region", "*", True, "import the module that owns the name, not the package"),
        ("cli", "*", False, ""),
    ],
)
def test_the_rule_itself(importer: str, imported: str, deferred: bool, mistake: str) -> None:
    assert wrong(Import(importer, imported, deferred, "here")) == mistake


def test_an_unknown_module_is_told_where_to_go() -> None:
    with pytest.raises(AssertionError, match="add it to FLOORS"):
        floor_of("novelty")


def test_no_circle_within_a_floor() -> None:
    order: list[str] = []
    pairs = dict.fromkeys(SAME_FLOOR)
    modules = {module for pair in SAME_FLOOR for module in pair}
    while modules:
        free = {m for m in modules if not any(a == m and b in modules for a, b in pairs)}
        assert free, f"a circle among {sorted(modules)}"
        order += sorted(free)
        modules -= free
    assert floor_of(order[0]) <= 2


# --- what is seen outside ------------------------------------------------------------------------


def run(code: str) -> str:
    path = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); "
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", path + code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_no_numpy_and_nothing_heavy() -> None:
    heavy = {"numpy", "click", "rich", "psutil", "asyncio", "importlib.metadata", "argparse"}
    loaded = run("import pyksm, sys; print(*sys.modules)").split()
    assert not heavy & set(loaded)


def test_import_starts_nothing_and_opens_nothing() -> None:
    code = (
        "import os, threading; before = len(os.listdir('/proc/self/fd')); import pyksm; "
        "print(threading.active_count(), len(os.listdir('/proc/self/fd')) - before)"
    )
    assert run(code) == "1 0"


def test_every_public_name_is_there_and_says_pyksm() -> None:
    import pyksm

    assert len(set(pyksm.__all__)) == len(pyksm.__all__)
    assert list(pyksm.__all__) == sorted(pyksm.__all__, key=str), "keep __all__ sorted"
    for name in pyksm.__all__:
        value = getattr(pyksm, name)
        if isinstance(value, type):
            assert value.__module__ == "pyksm", f"{name} shows as {value.__module__}.{name}"


def test_public_names_are_exactly_the_documented_ones() -> None:
    import pyksm

    pages = "\n".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    documented = re.findall(r"^\.\. auto\w+:: pyksm\.(\w+)$", pages, re.MULTILINE)
    assert len(set(documented)) == len(documented), "a name is documented twice"
    public = {name for name in pyksm.__all__ if not name.startswith("__")}
    missing, unknown = sorted(public - set(documented)), sorted(set(documented) - public)
    assert not missing, (
        f"add `.. autoclass:: pyksm.X` (or autofunction) to docs/reference: {missing}"
    )
    assert not unknown, f"docs/reference documents what is not in pyksm.__all__: {unknown}"


def test_every_extension_has_its_stub() -> None:
    for path in PACKAGE.glob("*.pyx"):
        assert path.with_suffix(".pyi").exists(), f"write {path.stem}.pyi beside {path.name}"
    for path in PACKAGE.glob("*.pyi"):
        assert path.with_suffix(".pyx").exists(), f"{path.name} has no .pyx"
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.kernel
def test_compiled_docstrings_run() -> None:
    """Pytest finds doctests in .py files only."""
    import doctest
    import importlib

    finder = doctest.DocTestFinder()
    for path in PACKAGE.glob("*.pyx"):
        try:
            module = importlib.import_module(f"pyksm.{path.stem}")
        except ModuleNotFoundError:
            continue
        names = {"pyksm": importlib.import_module("pyksm"), "np": importlib.import_module("numpy")}
        for example in finder.find(module, extraglobs=names):
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
            assert not runner.run(example).failed, f"{path.name}: {example.name}"


def test_no_room_is_called_like_a_public_name() -> None:
    """Importing the submodule would put the module where users expect the function."""
    import pyksm

    assert not {room for rooms in FLOORS.values() for room in rooms} & set(pyksm.__all__)


def test_every_public_name_has_a_room() -> None:
    import pyksm

    assert all(getattr(pyksm, name).__module__.split(".")[0] == "pyksm" for name in pyksm.__all__)
