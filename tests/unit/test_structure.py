"""Arrows between the rooms point one way, as docs/architecture.md draws them."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import unionimage

import unionfuse

FILE_SYSTEM = Path(unionfuse.__file__).parent
IMAGES = Path(unionimage.__file__).parent
SETUP = tomllib.loads((FILE_SYSTEM.parent / "pyproject.toml").read_text())["tool"]["setuptools"]

# From the caller down. What stands in one line knows nothing of what stands above it.
ROOMS = [
    ["__main__"],
    ["daemon"],
    ["survival"],
    ["express"],
    ["pyfuse"],
    ["union"],
    ["changes"],
    ["index"],
    ["tree"],
    ["layers"],
    ["wire"],
    ["mounting", "capabilities"],
    ["options", "syscalls"],
]
LEVELS = {name: level for level, names in enumerate(ROOMS) for name in names}


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports when it runs: also late, but not for types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imported(node)


def room(name: str) -> str | None:
    """The room of unionfuse that a dotted name lies in, if it does."""
    parts = name.split(".")
    return parts[1] if parts[0] == "unionfuse" and parts[1:] and parts[1] in LEVELS else None


FILES = sorted(path for path in FILE_SYSTEM.rglob("*.py") if path.name != "building.py")


def test_every_room_has_its_level() -> None:
    found = {path.relative_to(FILE_SYSTEM).with_suffix("").parts[0] for path in FILES}
    assert found - {"__init__"} == set(LEVELS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FILE_SYSTEM)))
def test_arrows_point_down(path: Path) -> None:
    here = path.relative_to(FILE_SYSTEM).with_suffix("").parts[0]
    names = set(imported(ast.parse(path.read_bytes())))
    assert not {name for name in names if name.split(".")[0] == "unionimage"}
    if here != "__init__":
        rooms = {found for name in names if (found := room(name)) and found != here}
        assert not {found for found in rooms if LEVELS[found] <= LEVELS[here]}


def test_only_one_room_imports_pyfuse3() -> None:
    users = {
        path.relative_to(FILE_SYSTEM).parts[0]
        for path in FILES
        if {"pyfuse3"} & {name.split(".")[0] for name in imported(ast.parse(path.read_bytes()))}
    }
    assert users == {"pyfuse"}


def test_all_that_is_here_is_installed() -> None:
    folders = {
        ".".join((root.name, *init.parent.relative_to(root).parts))
        for root in (FILE_SYSTEM, IMAGES)
        for init in root.rglob("__init__.py")
    }
    assert folders == set(SETUP["packages"])
    compiled = {str(path.relative_to(FILE_SYSTEM.parent)) for path in FILE_SYSTEM.rglob("*.pyx")}
    assert compiled == {one for module in SETUP["ext-modules"] for one in module["sources"]}


def test_a_module_is_built_anew_when_what_it_includes_has_changed() -> None:
    included = {
        str(path.relative_to(FILE_SYSTEM.parent))
        for pattern in ("*.pxd", "*.h")
        for path in FILE_SYSTEM.rglob(pattern)
    }
    assert included == {one for module in SETUP["ext-modules"] for one in module.get("depends", ())}
