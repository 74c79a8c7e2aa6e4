"""The rooms: imports go down only, nothing goes in circles, a name is imported from where it is defined, nothing is too long."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import NOT_QUICK, file_marks

ROOT = Path(__file__).parents[1]
ROOMS = ["launch", "c4c", "pipelines", "shards"]  # each may import those after it
SHARDS = ["tools", "packing", "video"]  # parts of shards, likewise
LONGEST_FILE, LONGEST_FUNCTION = 400, 60  # lines
FOREIGN = {"shards": {"torch", "torchvision", "nvidia", "open_clip", "deepspeed"}, "pipelines": {"deepspeed"}}


def sources() -> dict[str, Path]:
    """{dotted name: file} of every module of the rooms."""
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


MODULES = sources()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(tree: ast.AST, at_start: bool = False) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that is imported, '' for a whole module; at_start: only what importing it imports."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif not (at_start and (isinstance(node, ast.FunctionDef) or _is_for_types(node))):
            yield from imports(node, at_start)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@cache
def targets(module: str, at_start: bool = False) -> set[str]:
    """Modules of the rooms that a module imports."""
    found = set()
    for source, name in imports(tree_of(MODULES[module]), at_start):
        found.add(f"{source}.{name}" if f"{source}.{name}" in MODULES else source)
    return {name for name in found if name in MODULES and name != module}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    room, part = ROOMS.index(module.split(".")[0]), module.split(".")[1:2]
    for target in targets(module):
        assert ROOMS.index(target.split(".")[0]) >= room, f"{module} imports {target}"
        to = target.split(".")[1:2]
        if module.startswith("shards.") and target.startswith("shards.") and to[0] in SHARDS:
            assert part[0] not in SHARDS[SHARDS.index(to[0]) + 1 :], f"{module} imports {target}"
            assert part[0] in (*SHARDS, "demo"), f"{module} imports {target}"
    for source, _ in imports(tree_of(MODULES[module])):
        assert source.split(".")[0] not in FOREIGN.get(module.split(".")[0], ()), f"{module} imports {source}"
        assert source.split(".")[0] != "deepspeed" or module.startswith("c4c.zero"), f"{module} imports {source}"


def test_modules_that_are_imported_exist():
    """mypy is told to pass over packages without types, and takes a module of ours that has moved away for one."""
    ours = (*ROOMS, "bench", "tests")
    wrong = [
        f"{path}: {source}"
        for path in FILES
        for source, _ in imports(tree_of(ROOT / path))
        if source.split(".")[0] in ours and not _file_of(source) and not (ROOT / source.replace(".", "/")).is_dir()
    ]
    assert not wrong


def test_nothing_goes_in_circles():
    needs = {module: targets(module, at_start=True) for module in MODULES}
    while ready := [module for module, others in needs.items() if not others & needs.keys()]:
        for module in ready:
            del needs[module]
    assert not needs


def test_a_name_is_imported_from_where_it_is_defined():
    wrong = []
    for module, path in MODULES.items():
        for source, name in imports(tree_of(path)):
            if (
                source in MODULES
                and name
                and f"{source}.{name}" not in MODULES
                and name not in _defined(MODULES[source])
            ):
                wrong.append(f"{module}: {name} from {source}")
    assert not wrong


def test_a_class_name_means_one_thing():
    places: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


@cache
def _defined(path: Path) -> set[str]:
    """Names that a module makes itself, or loads on demand."""
    nodes = [
        node
        for node in ast.walk(tree_of(path))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Name, ast.Constant))
    ]
    return {str(getattr(node, "name", getattr(node, "id", getattr(node, "value", "")))) for node in nodes}


# ---- lengths, and what the quick tests import ----

FILES = [
    path.relative_to(ROOT)
    for folder in (*ROOMS, "bench", "examples", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def functions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(name, lines from `def` to its end) of every function, with its docstring and what is defined inside it."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_and_no_function_is_too_long(path):
    assert len((ROOT / path).read_text().splitlines()) <= LONGEST_FILE
    assert [found for found in functions(tree_of(ROOT / path)) if found[1] > LONGEST_FUNCTION] == []


def imported_at_start(path: Path) -> set[str]:
    """Packages that are imported when this file is, by whichever module of the rooms or tests."""
    seen, packages, waiting = set(), set(), [path]
    while waiting:
        if (file := waiting.pop()) in seen:
            continue
        seen.add(file)
        for source, name in imports(tree_of(file), at_start=True):
            names = [f"{source}.{name}", *(source.rsplit(".", i)[0] for i in range(source.count(".") + 1))]
            waiting += [found for module in names if (found := _file_of(module))]
            packages.add(source.split(".")[0])
    return packages


@cache
def _file_of(module: str) -> Path | None:
    bare = ROOT / module.replace(".", "/")
    return next((file for file in (bare.with_suffix(".py"), bare / "__init__.py") if file.is_file()), None)


QUICK = [path for path in FILES if path.name.startswith("test_") and not file_marks(ROOT / path) & NOT_QUICK]


@pytest.mark.parametrize("path", QUICK, ids=str)
def test_a_quick_test_imports_nothing_slow(path):
    """What takes a second or more to import, and a data room has no use for, is imported by files that are marked slow."""
    slow = {"nvidia", "deepspeed", "webdataset", "torchvision", "moto"}
    assert not imported_at_start(ROOT / path) & (slow | ({"torch"} if path.parts[1] == "shards" else set()))


@pytest.mark.parametrize("module", MODULES)
def test_tables_are_read_without_threads_of_arrow(module):
    """One that still holds a Python object when the process exits aborts it (apache/arrow#33975)."""
    text = MODULES[module].read_text()
    reads = sum(map(text.count, ("pq.read_table(", "pq.ParquetFile(", ".iter_batches(")))
    assert text.count("use_threads=False") == reads
