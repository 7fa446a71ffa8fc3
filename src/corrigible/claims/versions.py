"""Which code a result was made by: digests of a claim's source and of all that it builds on.

Comments, layout and docstrings do not count, and neither do the words of a claim's page: only what can change
a number does. A result whose digest is that of today's code need not be made again; a claim that was changed
after its result was known is a new look at it.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from corrigible.claims.framework import Claim

_PACKAGE = Path(__file__).parents[1]
_PROSE = {"title", "paper", "figure", "setting", "baselines", "budget", "fast", "aliases"}


def claim_digest(claim: Claim) -> str:
    """Of the claim's own module: its experiment, effects, thresholds and seeds."""
    path = _path(claim.module)
    source = path.read_text(encoding="utf-8") if path else f"{claim.id} {claim.seeds}"
    return _short(_meaning(source))


def code_digest(claim: Claim) -> str:
    """Of the claim's module and of every module of this package that it imports, directly or not, and of
    torch.

    An import of a name from a package counts as one of the package's ``__init__`` and so of all that it
    imports; one from a module counts as that module alone.
    """
    import torch

    seen: dict[str, str] = {}
    waiting = [claim.module]
    while waiting:
        name = waiting.pop()
        path = _path(name)
        if name in seen or path is None:
            continue
        seen[name], imports = _read(path)
        waiting.extend(imports)
    parts = [f"{name} {seen[name]}" for name in sorted(seen)]
    return _short("\n".join([*parts, torch.__version__, claim.id]))


def _path(module: str) -> Path | None:
    """The file of a module of this package; None for any other."""
    root, *parts = module.split(".")
    if root != "corrigible" or not parts:
        return None
    path = _PACKAGE.joinpath(*parts)
    found = [p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()]
    return found[0] if found else None


@cache
def _read(path: Path) -> tuple[str, tuple[str, ...]]:
    source = path.read_text(encoding="utf-8")
    return _short(_meaning(source)), tuple(sorted(set(_imports(source))))


def _imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _meaning(source: str) -> str:
    """The syntax tree without docstrings and without the prose of a ``@claim``."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "claim":
            node.keywords = [keyword for keyword in node.keywords if keyword.arg not in _PROSE]
    return ast.dump(tree)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
