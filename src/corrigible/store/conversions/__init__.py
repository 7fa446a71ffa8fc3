"""Any feedback to any learner: from the 20 kinds of records to the shapes that algorithms learn from.

- ``matrix``: :data:`SIGNALS`, :data:`CONVERSIONS` by (kind, signal), :data:`IMPOSSIBLE`: why a cell is empty.
- ``content``: what conversions see of the texts, and why a record may give nothing (:data:`REASONS`).
- ``choices``, ``verdicts``, ``scores``, ``tries``, ``corrections``, ``acts``,
  ``permissions``: one pure function per cell.
- ``loading``: :func:`load_signals` from a store, and :func:`learnable`, what could be learnt from it.

Every signal names the records it derives from, and every record that gives none is counted by name.
"""

# Importing them fills the matrix.
from corrigible.store.conversions import acts, choices, corrections, permissions, scores, tries, verdicts
from corrigible.store.conversions.content import REASONS, Content, LeftOut, NotConvertibleError, Options
from corrigible.store.conversions.loading import (
    Converted,
    convert,
    convert_store,
    learnable,
    load_signals,
    merged_demonstrations,
    merged_labels,
)
from corrigible.store.conversions.matrix import (
    CONVERSIONS,
    FROM_RECORDS,
    IMPOSSIBLE,
    SIGNALS,
    Conversion,
    SignalKind,
    kinds_for,
    matrix_table,
)

__all__ = [
    "CONVERSIONS",
    "FROM_RECORDS",
    "IMPOSSIBLE",
    "REASONS",
    "SIGNALS",
    "Content",
    "Conversion",
    "Converted",
    "LeftOut",
    "NotConvertibleError",
    "Options",
    "SignalKind",
    "acts",
    "choices",
    "convert",
    "convert_store",
    "corrections",
    "kinds_for",
    "learnable",
    "load_signals",
    "matrix_table",
    "merged_demonstrations",
    "merged_labels",
    "permissions",
    "scores",
    "tries",
    "verdicts",
]
