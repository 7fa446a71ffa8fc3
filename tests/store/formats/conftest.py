"""A store in a temporary folder, and a way to write rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from corrigible.store import Store

Write = Callable[..., Path]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store.db") as opened:
        yield opened


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows (mappings, or text taken verbatim) as JSON lines; returns the path."""

    def go(*rows: Mapping[str, Any] | str | bytes, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [
            row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
            for row in rows
        ]
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return go
