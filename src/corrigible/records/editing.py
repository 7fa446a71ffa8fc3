"""Applying an edit: from the object before and the operations that were not rejected, the object after.

All coordinates are those of the object *before*, so operations are applied from the back to the front.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from corrigible.errors import BadInputError
from corrigible.records.base import canonical_json
from corrigible.records.payloads.edit import Edit, EditOp, path_key, path_tokens


def apply_edit(before: str, edit: Edit) -> str:
    """The text after an edit: exactly its operations that were not rejected.

    Trees, tables and plans with paths are parsed as JSON and come back as canonical JSON.

    Raises:
        BadInputError: when an operation does not fit the object before.
    """
    ops = [op for op in edit.ops if op.applies]
    return _apply_to_text(before, ops) if edit.is_text else _apply_to_json(before, ops)


def changed_ranges(edit: Edit) -> tuple[tuple[int, int], ...]:
    """Ranges of the text after that applied operations put there, half-open, in code points.

    Raises:
        BadInputError: when the edit is not of text.
    """
    if not edit.is_text:
        raise BadInputError(f"an edit of a {edit.medium} by paths has no character ranges.")
    ranges, shift = [], 0
    for start, end, text in _pieces([op for op in edit.ops if op.applies]):
        if text:
            ranges.append((start + shift, start + shift + len(text)))
        shift += len(text) - (end - start)
    return tuple(ranges)


def _pieces(ops: Sequence[EditOp]) -> list[tuple[int, int, str]]:
    """Operations on text as (start, end, replacement), sorted; a move is a deletion and an insertion."""
    pieces: list[tuple[int, int, str]] = []
    for op in ops:
        assert not isinstance(op.at, str)
        start, end = op.at
        pieces.append((start, end, str(op.after) if op.op in ("insert", "replace") else ""))
        if isinstance(op.to, int):
            pieces.append((op.to, op.to, str(op.before)))
    return sorted(pieces, key=lambda piece: piece[:2])


def _apply_to_text(before: str, ops: Sequence[EditOp]) -> str:
    for op in ops:
        assert not isinstance(op.at, str)
        start, end = op.at
        if max(end, op.to if isinstance(op.to, int) else 0) > len(before):
            raise _misfit(op, f"the text has only {len(before)} characters")
        if before[start:end] != (op.before or ""):
            raise _misfit(op, f"the text there is {before[start:end]!r}, not {op.before!r}")
    parts, place = [], 0
    for start, end, text in _pieces(ops):
        parts += [before[place:start], text]
        place = max(place, end)
    return "".join([*parts, before[place:]])


def _apply_to_json(before: str, ops: Sequence[EditOp]) -> str:
    try:
        root = json.loads(before)
    except ValueError as error:
        raise BadInputError(f"the object before is not JSON: {error}.") from None
    # (path, whether it takes the place's element away, what to do): at one place an element is taken away
    # before another is inserted there, and of several insertions the last one goes in first.
    acts: list[tuple[str, bool, EditOp, Any]] = []
    for op in ops:
        at = _with_list_end(root, op, str(op.at))
        if op.op == "move":
            acts.append((at, True, op, None))
            acts.append((_with_list_end(root, op, str(op.to)), False, op, _lookup(root, op, at)))
        else:
            acts.append((at, op.op != "insert", op, op.after))
    for path, takes, op, value in sorted(acts, key=lambda act: (path_key(act[0]), act[1]))[::-1]:
        root = _act(root, path, takes, op, value)
    return canonical_json(root)


def _act(root: Any, path: str, takes: bool, op: EditOp, value: Any) -> Any:
    found = _lookup(root, op, path) if takes else None
    checked = op.op in ("delete", "replace", "move") and "before" in op.model_fields_set
    if takes and checked and found != op.before:
        raise _misfit(op, f"the value there is {canonical_json(found)}")
    if op.op == "link":
        if not isinstance(found, list) or value in found:
            raise _misfit(op, "there is no list there that lacks the value")
        found.append(value)
        return root
    if op.op == "unlink":
        if not isinstance(found, list) or op.before not in found:
            raise _misfit(op, "there is no list there that holds the value")
        found.remove(op.before)
        return root
    if path == "":
        return value
    holder, key = _lookup(root, op, path.rpartition("/")[0]), path_tokens(path)[-1]
    if isinstance(holder, list):
        index = int(key)
        if not takes:
            holder.insert(index, value)
        elif op.op == "replace":
            holder[index] = value
        else:
            del holder[index]
    elif isinstance(holder, dict):
        if takes and op.op != "replace":
            del holder[key]
        elif not takes and key in holder:
            raise _misfit(op, f"there already is a {key!r}")
        else:
            holder[key] = value
    else:
        raise _misfit(op, "there is neither list nor object there")
    return root


def _lookup(root: Any, op: EditOp, path: str) -> Any:
    value = root
    for token in path_tokens(path):
        if isinstance(value, list) and token.isdigit() and int(token) < len(value):
            value = value[int(token)]
        elif isinstance(value, dict) and token in value:
            value = value[token]
        else:
            raise _misfit(op, f"there is nothing at {path!r}")
    return value


def _with_list_end(root: Any, op: EditOp, path: str) -> str:
    """The path with ``-`` (the end of a list) as a number, and checked where it may insert."""
    parent, _, last = path.rpartition("/")
    if not path:
        return path
    holder = _lookup(root, op, parent)
    if isinstance(holder, list):
        if last == "-":
            return f"{parent}/{len(holder)}"
        if not last.isdigit() or int(last) > len(holder):
            raise _misfit(op, f"the list at {parent!r} has {len(holder)} elements")
    return path


def _misfit(op: EditOp, why: str) -> BadInputError:
    at = op.at if isinstance(op.at, str) else f"[{op.at[0]}, {op.at[1]})"
    return BadInputError(
        f"{op.op} at {at} does not fit the object before: {why}.",
        advice="Operations are in coordinates of the object before the edit, in code points.",
    )
