"""Key/value caches: with room to grow in, and with a row for each sequence of a rollout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class RoomyLayer(DynamicLayer):  # type: ignore[misc,unused-ignore]
    """A cache layer that writes new entries in place.

    transformers' own layer copies all its keys and values for every token; this one, once it grows, keeps
    half as many unused positions behind them, and copies only when rows are taken, or when those are used up.
    """

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self._keys: Any = None
        self._values: Any = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the entries ``(n, heads, tokens, size)`` and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        if self._keys is None or end > self._keys.shape[-2]:
            room = 0 if self._keys is None else end // 2
            self._keys = self._grown(self._keys, key_states, end + room)
            self._values = self._grown(self._values, value_states, end + room)
        self._keys[:, :, self.length : end] = key_states
        self._values[:, :, self.length : end] = value_states
        self.length = end
        self._show()
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, in that order; a row may be taken several times."""
        self._keys = self._taken(self._keys, indices)
        self._values = self._taken(self._values, indices)
        self._show()

    def _grown(self, old: Any, like: Tensor, capacity: int) -> Tensor:
        batch, heads, _, size = like.shape
        new = like.new_empty((batch, heads, capacity, size))
        if old is not None:
            new[:, :, : self.length] = old[:, :, : self.length]
        return new

    def _taken(self, old: Any, indices: Tensor) -> Tensor:
        new: Tensor = old.new_empty((len(indices), *old.shape[1:]))
        new[:, :, : self.length] = old[:, :, : self.length].index_select(0, indices)
        return new

    def _show(self) -> None:
        self.keys = self._keys[:, :, : self.length]
        self.values = self._values[:, :, : self.length]


def new_cache(config: Any) -> Any:
    """An empty cache for a model with this config.

    Plain full attention gets :class:`RoomyLayer`; anything else (sliding windows, state spaces) the
    cache that transformers chooses for it.
    """
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds == {"full_attention"} and not getattr(text, "sliding_window", None):
        return Cache(layers=[RoomyLayer() for _ in range(text.num_hidden_layers)])
    return DynamicCache(config=config)


class SlotLayer(DynamicLayer):  # type: ignore[misc,unused-ignore]
    """One layer of :class:`SlotCache`: every row has its own length and grows on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True
        self.width = 0
        self.rows: Any = None
        self.ends: Any = None
        self._keys: Any = None
        self._values: Any = None

    def get_seq_length(self) -> int:
        """Entries before the next token, as transformers asks; shorter rows are masked by the caller."""
        return max(self.width - 1, 0)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one entry ``(rows, heads, 1, size)`` at the end of each row; all of them, ``width`` long."""
        count = len(self.rows)
        self.reserve(count, self.width, key_states)
        self._keys[self.rows, :, self.ends] = key_states[:, :, 0]
        self._values[self.rows, :, self.ends] = value_states[:, :, 0]
        return self._keys[:count, :, : self.width], self._values[:count, :, : self.width]

    def write(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Set the beginning of ``row`` to ``(heads, tokens, size)``."""
        self.reserve(row + 1, keys.shape[-2], keys)
        self._keys[row, :, : keys.shape[-2]] = keys
        self._values[row, :, : values.shape[-2]] = values

    def copy(self, source: int, target: int, length: int) -> None:
        """The first ``length`` entries of one row to another."""
        self.reserve(target + 1, length, self._keys)
        self._keys[target, :, :length] = self._keys[source, :, :length]
        self._values[target, :, :length] = self._values[source, :, :length]

    def reserve(self, rows: int, width: int, like: Tensor) -> None:
        """Make room; a table that is too small grows by half, so that growing is rare."""
        had_rows, had_width = (0, 0) if self._keys is None else (self._keys.shape[0], self._keys.shape[2])
        if rows <= had_rows and width <= had_width:
            return
        new_rows = had_rows if rows <= had_rows else max(rows, had_rows * 3 // 2)
        new_width = had_width if width <= had_width else max(width + 32, had_width * 3 // 2)
        self._keys, self._values = (
            self._grown(old, like, new_rows, new_width) for old in (self._keys, self._values)
        )

    @staticmethod
    def _grown(old: Any, like: Tensor, rows: int, width: int) -> Tensor:
        # Zeros, not whatever was there: a masked entry still meets a weight of 0, and 0 x NaN is NaN.
        new = like.new_zeros((rows, like.shape[-3], width, like.shape[-1]))
        if old is not None:
            new[: old.shape[0], :, : old.shape[2]] = old
        return new


class SlotCache:
    """Keys and values of sequences of different lengths, one row each, beginning at position 0.

    Attributes:
        cache: what the model is called with (after :meth:`begin`).
        lengths: entries in each row.
    """

    def __init__(self, config: Any) -> None:
        text = config.get_text_config(decoder=True)
        self.lengths: list[int] = []
        self._layers = [SlotLayer() for _ in range(text.num_hidden_layers)]
        self.cache = Cache(layers=self._layers)

    def fill(self, read: Any, row: int, length: int, targets: list[int]) -> None:
        """The last ``length`` entries of ``row`` of another cache become those of the rows ``targets``."""
        for layer, other in zip(self._layers, read.layers, strict=True):
            for target in targets:
                layer.write(target, other.keys[row, :, -length:], other.values[row, :, -length:])
        for target in targets:
            self._set_length(target, length)

    def copy(self, source: int, target: int, length: int) -> None:
        """The first ``length`` entries of ``source`` become those of ``target``."""
        if source != target:
            for layer in self._layers:
                layer.copy(source, target, length)
        self._set_length(target, length)

    def begin(self, ends: Tensor) -> None:
        """Say where the next token goes: to ``ends`` ``(rows,)`` in the first rows."""
        rows, width = torch.arange(len(ends), device=ends.device), int(ends.max()) + 1
        for layer in self._layers:
            layer.rows, layer.ends, layer.width = rows, ends, width

    def _set_length(self, row: int, length: int) -> None:
        self.lengths.extend([0] * (row + 1 - len(self.lengths)))
        self.lengths[row] = length
