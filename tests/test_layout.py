"""The house has an order, that of the loop: a room imports from those above it, never from one below."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

# What everybody may use stands first; after it, the rooms in the order of the loop.
ORDER = (
    ("errors", "events", "files", "subscribers", "intervals"),
    *((room,) for room in ("records", "store", "models", "rewards", "align", "collect", "evaluate")),
    *((room,) for room in ("loop", "claims", "cli")),
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
# The package's own doors, which open on every room.
DOORS = ("__init__", "__main__")


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of every module that ``source``, a module of ``package``, imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            if module == "corrigible":  # from corrigible import events
                yield from ((node.lineno, f"corrigible.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def wrong_ways(folder: Path) -> list[str]:
    """Imports that go from a room to one below it, or to one that is not in ``ORDER``."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        room = parts[0]
        if room in DOORS:
            continue
        if room not in RANK:
            found.append(f"{path}: the room {room!r} has no place in the order of tests/test_layout.py")
            continue
        for line, name in imported(path.read_text(encoding="utf-8"), ".".join(("corrigible", *parts[:-1]))):
            root, _, rest = name.partition(".")
            if root == "corrigible" and rest and RANK.get(rest.split(".")[0], len(ORDER)) > RANK[room]:
                found.append(f"{path}:{line}: {room} imports {name}, which is further down")
    return found


def test_no_room_imports_from_one_below_it(repository: Path) -> None:
    assert wrong_ways(repository / "src" / "corrigible") == []


def test_no_file_is_a_drawer_for_everything(repository: Path) -> None:
    """A function lives where its noun lives (STYLE)."""
    names = {path.stem for path in (repository / "src" / "corrigible").rglob("*")}
    assert not names & {"utils", "helpers", "common", "misc"}


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("from corrigible.loop import gate", True),
        ("import corrigible.cli.console", True),
        ("from corrigible import evaluate", True),
        ("from ..align import dpo", True),
        ("def f():\n    from corrigible.claims.framework import claim", True),
        ("import corrigible.utils", True),
        ("from corrigible.errors import BadInputError", False),
        ("from . import head", False),
        ("from ..store import Store", False),
        ("import numpy", False),
    ],
)
def test_the_check_can_fail(tmp_path: Path, line: str, wrong: bool) -> None:
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "example.py").write_text(line + "\n", encoding="utf-8")
    assert bool(wrong_ways(tmp_path)) == wrong
