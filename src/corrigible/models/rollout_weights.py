"""Which weights a policy has right now: noticed cheaply, named exactly.

Rollouts from weights that were never updated (an adapter that was not sent, a copy that was not
refreshed) raise nothing and look like slow learning. So every rollout names the weights it came
from. Hashing a model for every call would cost more than a short answer; :class:`WeightWatch`
hashes only when the content may have changed, and looks at the content, not only at PyTorch's
counters: a write through ``tensor.data`` does not move those.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch

from corrigible.errors import NumericsError
from corrigible.models.policy import LanguagePolicy

_WIDTHS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
_KNOWN: WeakKeyDictionary[LanguagePolicy, tuple[object, str]] = WeakKeyDictionary()


def identity(policy: LanguagePolicy) -> str:
    """SHA-256 of the weights that act: ``policy.weights_sha256()``, of the base where the adapter is off.

    Kept until the content changes, so asking again costs one reading of the weights, not a hash.
    """
    content = _content(policy)
    known = _KNOWN.get(policy)
    if known is None or known[0] != content:
        part = "all" if _adapter_acts(policy) else "base"
        known = _KNOWN[policy] = (content, policy.weights_sha256(part))
    return known[1]


def expect(policy: LanguagePolicy, expected: str | None, loaded: str) -> None:
    """Refuse to go on with weights that are not those that the caller means.

    Raises:
        NumericsError: ``stale_weights``.
    """
    if expected is not None and expected != loaded:
        raise NumericsError(
            f"stale_weights: weights {expected[:12]} were asked for, {policy.name} has {loaded[:12]}.",
            advice="Load or send the weights again, then call sync() and compare what it returns.",
        )


class WeightWatch:
    """Remembers which weights were loaded, and tells when others are there."""

    def __init__(self, policy: LanguagePolicy) -> None:
        self._policy = policy
        self.load()

    def moved(self) -> bool:
        """Whether PyTorch counted a write to the weights since they were loaded. Microseconds."""
        return self._count() != self._counters

    def changed(self) -> bool:
        """Whether the weights' content is another than the one loaded. Reads all of them."""
        if identity(self._policy) != self.loaded:
            return True
        self._counters = self._count()  # written, but with what was there already
        return False

    def load(self) -> str:
        """Take the weights that are there now as those loaded; returns their SHA-256."""
        self.loaded = identity(self._policy)
        self._counted = [t for t in _tensors(self._policy) if not t.is_inference()]
        self._counters = self._count()
        return self.loaded

    def _count(self) -> list[int]:
        return [_adapter_acts(self._policy), *(t._version for t in self._counted)]


def _tensors(policy: LanguagePolicy) -> Iterator[torch.Tensor]:
    yield from policy.network.parameters()
    yield from policy.network.buffers()


def _adapter_acts(policy: LanguagePolicy) -> bool:
    if not policy.has_adapter:
        return True  # all there is acts
    layers = (m for m in policy.network.modules() if hasattr(m, "disable_adapters") and hasattr(m, "merged"))
    layer: Any = next(layers, None)
    return layer is None or not layer.disable_adapters


def _content(policy: LanguagePolicy) -> tuple[object, ...]:
    """Shape, type and a 64-bit sum of every tensor's bits: other weights have another one."""
    sums, shapes = [], []
    with torch.no_grad():
        for tensor in _tensors(policy):
            flat = tensor.detach().contiguous().view(-1)
            size = flat.numel() * flat.element_size()
            offset = flat.storage_offset() * flat.element_size()
            width = next(w for w in _WIDTHS if size % w == 0 and offset % w == 0)
            sums.append(flat.view(torch.uint8).view(_WIDTHS[width]).sum(dtype=torch.int64))
            shapes.append((tensor.dtype, tuple(tensor.shape)))
        numbers = torch.stack(sums).tolist() if sums else []
    return (_adapter_acts(policy), *shapes, *numbers)
