"""What rows must have in common to be scored together; the scoring itself is the model room's."""

from __future__ import annotations

from collections.abc import Hashable

from corrigible.models import Rendered
from corrigible.models.scoring import Scorer as RowScorer

__all__ = ["RowScorer", "prompt_of"]


def prompt_of(row: Rendered) -> tuple[Hashable, ...]:
    """Every token before the first scored one."""
    return row.ids[: row.scored[0]]
