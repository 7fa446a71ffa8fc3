"""What all payload kinds share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

from pydantic import ConfigDict

from corrigible.records.base import Record
from corrigible.records.items import ItemType


def _kind_is_required(schema: dict[str, Any]) -> None:
    schema["required"] = ["kind", *schema.get("required", ())]


class PayloadBase(Record):
    """Base of the kinds. Class attributes say how many targets a kind takes, and of which type."""

    model_config = ConfigDict(json_schema_extra=_kind_is_required)

    kind: str
    min_targets: ClassVar[int] = 1
    max_targets: ClassVar[int | None] = 1
    target_types: ClassVar[frozenset[ItemType]] = frozenset()
    """Allowed target types; empty allows all."""

    def permuted(self, new_index: Sequence[int]) -> Self:
        """The same judgement when target i is renamed to target ``new_index[i]``."""
        return self

    def fault_with_targets(self, count: int) -> str | None:
        """What is wrong with this payload on ``count`` targets, beyond the kind's own bounds."""
        return None
