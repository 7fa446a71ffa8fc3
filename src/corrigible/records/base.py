"""What every record shares: frozen models, ids, time, canonical JSON, and errors that name the key."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, StringConstraints, ValidationError

from corrigible.errors import BadInputError
from corrigible.records.migrations import migrate

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 of content, 64 lower-case hexadecimal digits."""

Id = Annotated[
    str, StringConstraints(pattern=r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$")
]
"""A UUID in its canonical lower-case form; new ones are version 7 (time-ordered)."""

Micros = Annotated[int, Field(ge=0)]
"""UTC time, integer microseconds since the epoch."""

Millis = Annotated[int, Field(ge=0)]
"""A duration, integer milliseconds."""

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
"""A probability in [0, 1]."""

StringSet = Annotated[frozenset[str], PlainSerializer(sorted, return_type=list[str], when_used="json")]
"""A set of strings; sorted in JSON, so that equal records have equal bytes."""


class Record(BaseModel):
    """A frozen model that refuses unknown keys and numbers that are not finite."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        serialize_by_alias=True,
        validate_by_alias=True,
        validate_by_name=True,
    )

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dict, without the fields that are None."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_json_text(self) -> str:
        """Compact JSON text of :meth:`to_json`; the fast way to write many records."""
        return self.model_dump_json(exclude_none=True)

    @classmethod
    def from_json(cls, data: str | bytes | Mapping[str, Any]) -> Self:
        """Read a record from JSON text (fastest) or from an already parsed object.

        A record of an older schema version is migrated.

        Raises:
            BadInputError: naming every key that is unknown, missing or wrong.
        """
        try:
            if isinstance(data, str | bytes):
                return cls.model_validate_json(data)
            return cls.model_validate(data)
        except ValidationError as error:
            return cls._read_again(data, error)

    @classmethod
    def _read_again(cls, data: str | bytes | Mapping[str, Any], error: ValidationError) -> Self:
        """The slow path after a first refusal: an older version, or bad input to be explained."""
        try:
            value = json.loads(data) if isinstance(data, str | bytes) else data
        except (ValueError, RecursionError):
            raise bad_input(cls, error) from None
        if not isinstance(value, Mapping):
            raise bad_input(cls, error)
        revised = cls._revised(value)
        what = f"{_noun(cls)} {value.get('id', '')}".rstrip()
        if revised == value:
            raise bad_input(cls, error, what=what)
        try:
            return cls.model_validate(revised)
        except ValidationError as fault:
            raise bad_input(cls, fault, what=what) from None

    @classmethod
    def _revised(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        """The object as this version writes it."""
        return migrate(value) if "schema_version" in cls.model_fields else value


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, characters unescaped.

    Raises:
        BadInputError: when the value is not JSON (NaN included).
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadInputError(
            f"this value has no canonical JSON: {error}.",
            advice="Use only objects with string keys, lists, strings, finite numbers, booleans and null.",
        ) from None


# --- time and ids ---------------------------------------------------------------------------------


def now_us() -> int:
    """UTC now, integer microseconds since the epoch."""
    return time.time_ns() // 1000


class _Uuid7:
    """RFC 9562 version 7 with method 2: the 74 random bits count on within a millisecond."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ms = 0
        self._low = 0

    def __call__(self) -> str:
        with self._lock:
            ms = time.time_ns() // 1_000_000
            if ms > self._ms:
                self._ms = ms
                # The top bit starts at 0, so that counting on cannot overflow within a millisecond.
                self._low = int.from_bytes(os.urandom(10)) >> 7
            else:  # same millisecond, or a clock that went back
                self._low += 1 + (int.from_bytes(os.urandom(4)))
                if self._low >> 74:
                    self._ms += 1
                    self._low = int.from_bytes(os.urandom(10)) >> 7
            ms, low = self._ms, self._low
        value = (ms & (1 << 48) - 1) << 80 | 0x7 << 76 | (low >> 62) << 64 | 0b10 << 62 | low & (1 << 62) - 1
        text = f"{value:032x}"
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"

    def reset(self) -> None:
        """After a fork parent and child must not count on from the same number."""
        self._lock = threading.Lock()
        self._ms = 0


_uuid7 = _Uuid7()
os.register_at_fork(after_in_child=_uuid7.reset)


def new_id() -> str:
    """A new UUIDv7 as canonical text: sorts by creation time, strictly increasing within a process."""
    return _uuid7()


# --- errors ---------------------------------------------------------------------------------------


def bad_input(model: type[BaseModel], error: ValidationError, *, what: str = "") -> BadInputError:
    """Turn pydantic's report into one sentence per fault, with the allowed keys where one is unknown."""
    faults = [_fault(model, detail) for detail in error.errors(include_url=False, include_context=False)]
    shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
    return BadInputError(f"{what or _noun(model)}: {shown}.", advice="Nothing of this record was kept.")


def _noun(model: type[BaseModel]) -> str:
    return f"{model.__name__.lower()} record"


def _fault(model: type[BaseModel], detail: Any) -> str:
    loc: tuple[int | str, ...] = detail["loc"]
    if detail["type"] == "json_invalid":
        return f"not JSON ({detail['msg'].removeprefix('Invalid JSON: ')})"
    where, holder = _resolve(model, loc)
    if detail["type"] == "extra_forbidden":
        kind = holder.model_fields["kind"].default if "kind" in holder.model_fields else None
        owner = f"kind {kind!r}" if isinstance(kind, str) and kind else holder.__name__
        allowed = ", ".join(field.alias or name for name, field in holder.model_fields.items())
        return f"unknown key {str(loc[-1])!r} ({where}); {owner} may hold: {allowed}"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else str(message)


def _resolve(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[str, type[BaseModel]]:
    """Readable path of an error, and the model that its last key was looked up in.

    A location also names the branches that unions took; they are no keys of the input and are left out.
    """
    holder, candidates, path = model, [model], ""
    for place, part in enumerate(loc):
        if isinstance(part, int):
            path += f"[{part}]"
            continue
        branch = [c for c in candidates if part in (_tag_of(c), c.__name__.lower(), f"{c.__name__.lower()}s")]
        field = next((f for c in candidates for n, f in c.model_fields.items() if part in (n, f.alias)), None)
        if (field is None and place < len(loc) - 1) or (branch and len(candidates) > 1):
            candidates = branch or candidates
            continue
        holder = next(
            (c for c in candidates if part in c.model_fields), candidates[0] if candidates else holder
        )
        candidates = list(_models_in(field.annotation)) if field else []
        path += f".{part}" if path else part
    return path, holder


def _tag_of(model: type[BaseModel]) -> str:
    kind = model.model_fields.get("kind")
    return kind.default if kind is not None and isinstance(kind.default, str) else model.__name__


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
