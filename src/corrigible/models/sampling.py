"""From logits to the next token: temperature, top-k, top-p, min-p, and one uniform number per token.

The sampling distribution is defined so that it can be written down and recomputed:

1. divide the logits by the temperature (temperature 0 means: the most likely token, for certain);
2. top-k keeps the k largest; 3. top-p keeps the smallest set of the largest ones (after top-k,
   renormalised) whose probability reaches p; 4. min-p keeps those at least min_p times as likely as
   the most likely one; tokens that tie with the last one kept are kept;
5. renormalise over what is kept.

A token is drawn by inverting the cumulative distribution, in vocabulary order, at a uniform number
that belongs to (sequence seed, position). So a draw depends on nothing but the distribution, the
seed and the position: not on the batch it was in, its order, or the device.

Inverting does not need the whole cumulative distribution: the sums of blocks of tokens say in which
block the number falls, and only that block is summed token by token. All sums are in float64, of
float32 weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from corrigible.records import Sampling

BLOCK = 128
"""Tokens whose weights are summed together before the search; it divides the usual vocabularies."""
HEAD = 64
"""The likeliest tokens that are looked at first for top-p."""


def sequence_seed(seed: int, prompt_ids: Sequence[int], occurrence: int, sample: int) -> int:
    """The seed of one sequence: from the run's seed, the prompt itself and which sample of it this is.

    ``occurrence`` counts earlier prompts with the same ids in the same call.
    """
    text = f"{seed}|{','.join(map(str, prompt_ids))}|{occurrence}|{sample}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def uniforms(seed: int, count: int) -> np.ndarray:
    """The first ``count`` uniform numbers in [0, 1) of a sequence, float64."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


class Scratch:
    """Room that is used again for every step: fresh memory costs more than the arithmetic done in it."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def like(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Uninitialised float32 of ``tensor``'s shape, on its device; valid until ``name`` is asked for."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < tensor.numel() or buffer.device != tensor.device:
            buffer = torch.empty(tensor.numel(), dtype=torch.float32, device=tensor.device)
            self._buffers[name] = buffer
        return buffer[: tensor.numel()].view(tensor.shape)


def threshold(
    scaled: torch.Tensor,
    sampling: Sampling,
    weights: torch.Tensor | None = None,
    scratch: Scratch | None = None,
) -> torch.Tensor | None:
    """The smallest scaled logit that is kept, ``(n, 1)``; None when nothing is cut.

    Args:
        scaled: ``(n, vocabulary)`` float32 logits divided by the temperature.
        sampling: the settings.
        weights: ``exp(scaled - maximum)``, same shape, where the caller has it already.
        scratch: memory to work in.
    """
    floor: torch.Tensor | None = None
    size = scaled.shape[-1]
    if sampling.top_k is not None and sampling.top_k < size:
        floor = _largest(scaled, sampling.top_k)[:, -1:]
    if sampling.top_p < 1:
        floor = _top_p_floor(scaled, sampling.top_p, floor, weights, scratch or Scratch())
    if sampling.min_p > 0:
        least = scaled.amax(dim=-1, keepdim=True) + float(np.log(sampling.min_p))
        floor = least if floor is None else torch.maximum(floor, least)
    return floor


def _top_p_floor(
    scaled: torch.Tensor,
    top_p: float,
    floor: torch.Tensor | None,
    weights: torch.Tensor | None,
    scratch: Scratch,
) -> torch.Tensor:
    highest = scaled.amax(dim=-1, keepdim=True)
    if weights is None:
        weights = (scaled - highest).exp_()
    kept = weights
    if floor is not None:
        kept = torch.ge(scaled, floor, out=scratch.like("kept", scaled)).mul_(weights)
    total = kept.sum(dim=-1, keepdim=True, dtype=torch.float64)
    # The head of the vocabulary, sorted, usually holds enough; the rows where it does not are searched.
    values = _largest(scaled, min(HEAD, scaled.shape[-1]))
    probabilities = (values.double() - highest.double()).exp() / total
    if floor is not None:
        probabilities = probabilities * (values >= floor)
    before = probabilities.cumsum(dim=-1) - probabilities
    within = (before < top_p) & (probabilities > 0)
    last = within.sum(dim=-1, keepdim=True).clamp(min=1) - 1
    found = values.gather(-1, last)
    deeper = within[:, -1].nonzero()[:, 0] if values.shape[-1] < scaled.shape[-1] else ()
    if len(deeper):
        found[deeper] = _largest_floor(scaled[deeper], kept[deeper], total[deeper] * top_p)
    return found


def _largest_floor(scaled: torch.Tensor, weights: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The largest value ``(n, 1)`` of ``scaled`` at or above which lies a weight of at least ``wanted``.

    Bisection over the 2^32 floats, which in order are the integers of their bits: much sooner done
    than sorting a vocabulary.
    """
    low = _in_order(scaled.amin(dim=-1, keepdim=True).view(torch.int32))
    high = _in_order(scaled.amax(dim=-1, keepdim=True).view(torch.int32)) + 1
    above = torch.empty_like(scaled)
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        torch.ge(scaled, _in_order(middle).to(torch.int32).view(torch.float32), out=above)
        enough = above.mul_(weights).sum(dim=-1, keepdim=True, dtype=torch.float64) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return _in_order(low).to(torch.int32).view(torch.float32)


def _in_order(bits: torch.Tensor) -> torch.Tensor:
    """Bits of float32 numbers to integers (int64) in the same order, and back again."""
    bits = bits.long()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` largest of each row, ``(n, count)``, largest first.

    They all lie in the ``count`` blocks with the largest maxima, which are found much sooner.
    """
    size = values.shape[-1]
    blocks = size // BLOCK
    if size % BLOCK or 2 * count > blocks:
        return values.topk(count, dim=-1).values
    table = values.view(-1, blocks, BLOCK)
    best = table.amax(dim=-1).topk(count, dim=-1).indices
    inside = table.gather(1, best[:, :, None].expand(-1, -1, BLOCK))
    return inside.flatten(1).topk(count, dim=-1).values


def draw(
    logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor, scratch: Scratch | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw one token per row.

    Args:
        logits: ``(n, vocabulary)``, any float type; computed in float32.
        sampling: the settings.
        uniform: ``(n,)`` float64 in [0, 1).
        scratch: memory to work in, kept from step to step by whoever draws many times.

    Returns:
        ids ``(n,)``; log-probabilities ``(n,)`` under the plain model (temperature 1, nothing cut);
        log-probabilities ``(n,)`` under the sampling distribution. Nats, float32. Where a row's
        logits are not finite numbers, so are its log-probabilities.
    """
    scratch = scratch or Scratch()
    if logits.dtype != torch.float32:
        logits = scratch.like("logits", logits).copy_(logits)
    highest = logits.amax(dim=-1, keepdim=True)
    weights = torch.sub(logits, highest, out=scratch.like("weights", logits)).exp_()
    normaliser = weights.sum(dim=-1, dtype=torch.float64).log()
    if sampling.temperature == 0:
        ids = logits.argmax(dim=-1)
        return ids, -normaliser.float(), torch.zeros_like(highest[:, 0])
    scaled = logits
    if sampling.temperature != 1:
        scaled = torch.div(logits, sampling.temperature, out=scratch.like("scaled", logits))
        weights = torch.sub(scaled, highest / sampling.temperature, out=weights).exp_()
    floor = threshold(scaled, sampling, weights, scratch)
    if floor is not None:
        # A comparison written into a float tensor: ten times faster than masked_fill.
        weights.mul_(torch.ge(scaled, floor, out=scratch.like("kept", scaled)))
    ids, total = _invert(weights, uniform)
    at = ids[:, None]
    plain = (logits.gather(-1, at) - highest)[:, 0].double() - normaliser
    chosen = (scaled.gather(-1, at) - highest / sampling.temperature)[:, 0].double() - total.log()
    return ids, plain.float(), chosen.float()


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids ``(n,)`` where the cumulative weights pass ``uniform`` of their total; the totals ``(n,)``."""
    size = weights.shape[-1]
    if size % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, BLOCK - size % BLOCK))
    table = weights.view(len(weights), -1, BLOCK)
    sums = table.sum(dim=-1, dtype=torch.float64)
    reached = sums.cumsum(dim=-1)
    total = reached[:, -1]
    wanted = (uniform * total)[:, None]
    block = _passing(reached, wanted, sums)
    inside = table.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].double()
    before = reached.gather(-1, block) - sums.gather(-1, block)
    token = _passing(inside.cumsum(dim=-1), wanted - before, inside)
    # A row of NaN passes nowhere; its log-probability says so, and its id must only be a legal one.
    return (block * BLOCK + token)[:, 0].clamp(max=size - 1), total


def _passing(cumulative: torch.Tensor, wanted: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """The first place ``(n, 1)`` where ``cumulative`` ``(n, k)`` exceeds ``wanted`` ``(n, 1)``.

    Rounding can only push the search past the end; the last place with any weight is meant then.
    """
    place = torch.searchsorted(cumulative, wanted, right=True)
    if bool((place >= parts.shape[-1]).any()):
        last = (parts > 0).long().cumsum(dim=-1).argmax(dim=-1, keepdim=True)
        place = torch.minimum(place, last)
    return place
