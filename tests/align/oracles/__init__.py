"""An independent second opinion on every registered loss: scalar loops in float64 from the equations.

``ORACLES`` has one for each algorithm of the families ``contrast`` and ``tokens``; those of ``online``
stand in their own tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from oracles.contrast import CONTRAST_ORACLES
from oracles.tokens import TOKEN_ORACLES

ORACLES: dict[str, Callable[..., Any]] = {**CONTRAST_ORACLES, **TOKEN_ORACLES}
"""By the name of the algorithm."""
