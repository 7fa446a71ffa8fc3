"""The edit kind: what was changed, operation by operation, in coordinates of the object before."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from corrigible.records.base import Record, Sha256
from corrigible.records.payloads.base import PayloadBase

Intent = Literal[
    "fluency", "clarity", "coherence", "style", "meaning_changed", "factual", "safety", "format", "other"
]
TextRange = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]

TEXT_MEDIA = frozenset({"text", "code"})
JSON_MEDIA = frozenset({"tree", "json"})


class EditOp(Record):
    """One operation. ``at`` is a half-open range of code points, or an RFC 6901 path into canonical JSON.

    ``before`` is what stood there and ``after`` what replaces it; an insert has start = end. ``move`` names
    its destination in ``to``. ``link`` adds the value ``after`` to the list at ``at``, ``unlink`` removes
    the value ``before`` from it.
    """

    op: Literal["insert", "delete", "replace", "move", "link", "unlink"]
    at: TextRange | str
    before: JsonValue = None
    after: JsonValue = None
    to: Annotated[int, Field(ge=0)] | str | None = None
    intent: Intent = "other"
    by: Literal["model", "human"] = "human"
    decision: Literal["accept", "reject", "modify", "none"] = "none"

    @property
    def applies(self) -> bool:
        """Whether the operation is part of the result (everything but a rejected one is)."""
        return self.decision != "reject"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.op == "move") != (self.to is not None):
            raise ValueError("move names its destination in 'to', and only move does")
        if isinstance(self.at, str):
            self._check_path(self.at)
        else:
            self._check_text(*self.at)
        return self

    def _check_text(self, start: int, end: int) -> None:
        if self.op in ("link", "unlink"):
            raise ValueError(f"{self.op} is an operation on trees, not on text")
        if start > end or (start == end) != (self.op == "insert"):
            raise ValueError(
                f"{self.op} at [{start}, {end}): an insert has start = end, the others start < end"
            )
        wants_before, wants_after = self.op != "insert", self.op in ("insert", "replace")
        if wants_before and not (isinstance(self.before, str) and len(self.before) == end - start):
            raise ValueError(f"{self.op} at [{start}, {end}) needs the {end - start} characters 'before'")
        if wants_after and not (isinstance(self.after, str) and (self.after or self.op == "replace")):
            raise ValueError(f"{self.op} needs the text 'after'")
        if (not wants_before and self.before) or (not wants_after and self.after):
            raise ValueError(f"{self.op} has a text that it does not use")
        if self.to is not None and (isinstance(self.to, str) or start < self.to < end):
            raise ValueError("a move in text goes to an offset outside of what moves")

    def _check_path(self, path: str) -> None:
        if (path and not path.startswith("/")) or (path == "" and self.op != "replace"):
            raise ValueError(f"{path!r} is no RFC 6901 path of something to {self.op}")
        if self.to is not None and not (isinstance(self.to, str) and self.to.startswith("/")):
            raise ValueError("a move in a tree goes to an RFC 6901 path")
        if self.op == "move" and f"{self.to}/".startswith(f"{path}/"):
            raise ValueError("a part of a tree cannot move into itself")


class Edit(PayloadBase):
    """A new version of one target: its hash, and the operations that lead to it.

    Applying exactly the operations that were not rejected gives ``after`` byte for byte. ``depth`` counts
    revision rounds from 1; ``final`` says that nothing is left to correct. Trees, tables and plans are
    edited as canonical JSON when their operations have paths.
    """

    kind: Literal["edit"] = "edit"
    after: Sha256
    medium: Literal["text", "code", "tree", "table", "json", "plan"] = "text"
    ops: tuple[EditOp, ...] = ()
    depth: int = Field(default=1, ge=1)
    final: bool = False

    @property
    def is_text(self) -> bool:
        """Whether the operations count characters (and not paths into JSON)."""
        return self.medium in TEXT_MEDIA or (
            self.medium not in JSON_MEDIA and all(not isinstance(op.at, str) for op in self.ops)
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        paths = [isinstance(op.at, str) for op in self.ops]
        if self.medium in TEXT_MEDIA and any(paths):
            raise ValueError(f"medium {self.medium!r} is edited by character ranges, not by paths")
        if self.medium in JSON_MEDIA and not all(paths):
            raise ValueError(f"medium {self.medium!r} is edited by RFC 6901 paths, not by character ranges")
        if any(paths) and not all(paths):
            raise ValueError("operations mix character ranges and paths")
        if self.is_text:
            self._check_text_order()
        else:
            self._check_path_order()
        return self

    def _check_text_order(self) -> None:
        ranges = [op.at for op in self.ops if isinstance(op.at, tuple)]
        for before, after in itertools.pairwise(ranges):
            if after < before:
                raise ValueError(f"operations are not sorted: {list(after)} follows {list(before)}")
            if after[0] < before[1]:
                raise ValueError(f"operations overlap: {list(before)} and {list(after)}")
        for op in self.ops:
            if isinstance(op.to, int) and any(start < op.to < end for start, end in ranges):
                raise ValueError(f"a move goes to offset {op.to}, which lies inside another operation")

    def _check_path_order(self) -> None:
        for before, after in zip(self.ops, self.ops[1:], strict=False):
            if path_key(str(after.at)) < path_key(str(before.at)):
                raise ValueError(f"operations are not sorted: {after.at!r} follows {before.at!r}")
        # In document order everything inside an element follows it directly. An insert at the place of a
        # deleted or replaced element goes before that element, and does not overlap it.
        places = [(path_key(str(op.at)), op.op in ("delete", "replace", "move")) for op in self.ops]
        places += [(path_key(str(op.to)), False) for op in self.ops if op.to is not None]
        outer: PathKey | None = None
        for place, whole in sorted(places):
            if outer is not None and place[: len(outer)] == outer:
                raise ValueError(f"operations overlap at {'/'.join(['', *map(_token, outer)])!r}")
            if whole:
                outer = place


PathKey = tuple[tuple[int, int, str], ...]


def path_tokens(path: str) -> list[str]:
    """The reference tokens of an RFC 6901 path."""
    return [t.replace("~1", "/").replace("~0", "~") for t in path.split("/")[1:]]


def path_key(path: str) -> PathKey:
    """Document order of a path: list indices as numbers, ``-`` (the end of a list) last."""
    return tuple(
        (0, int(t), "") if t.isdigit() else (2, 0, "") if t == "-" else (1, 0, t) for t in path_tokens(path)
    )


def _token(key: tuple[int, int, str]) -> str:
    return {0: str(key[1]), 1: key[2], 2: "-"}[key[0]]
