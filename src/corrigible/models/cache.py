"""Key/value caches with room to grow in."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class RoomyLayer(DynamicLayer):  # type: ignore[misc,unused-ignore]
    """A cache layer that writes new entries in place.

    transformers' own layer copies all its keys and values for every token; this one keeps ``room``
    unused positions behind them and copies only when rows are taken, or when the room is used up.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.length = 0
        self._keys: Any = None
        self._values: Any = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the entries ``(n, heads, tokens, size)`` and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        if self._keys is None or end > self._keys.shape[-2]:
            self._keys = self._grown(self._keys, key_states, end + self.room)
            self._values = self._grown(self._values, value_states, end + self.room)
        self._keys[:, :, self.length : end] = key_states
        self._values[:, :, self.length : end] = value_states
        self.length = end
        self._show()
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``, in that order; a row may be taken several times."""
        self._keys = self._taken(self._keys, indices)
        self._values = self._taken(self._values, indices)
        self._show()

    def _grown(self, old: Any, like: torch.Tensor, capacity: int) -> torch.Tensor:
        batch, heads, _, size = like.shape
        new = like.new_empty((batch, heads, capacity, size))
        if old is not None:
            new[:, :, : self.length] = old[:, :, : self.length]
        return new

    def _taken(self, old: Any, indices: torch.Tensor) -> torch.Tensor:
        new: torch.Tensor = old.new_empty((len(indices), *old.shape[1:]))
        new[:, :, : self.length] = old[:, :, : self.length].index_select(0, indices)
        return new

    def _show(self) -> None:
        self.keys = self._keys[:, :, : self.length]
        self.values = self._values[:, :, : self.length]


def new_cache(config: Any, room: int) -> Any:
    """An empty cache for a model with this config.

    Plain full attention gets :class:`RoomyLayer`; anything else (sliding windows, state spaces) the
    cache that transformers chooses for it.
    """
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds == {"full_attention"} and not getattr(text, "sliding_window", None):
        return Cache(layers=[RoomyLayer(room) for _ in range(text.num_hidden_layers)])
    return DynamicCache(config=config)
