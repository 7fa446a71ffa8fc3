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
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from corrigible.records import Sampling


def sequence_seed(seed: int, prompt_ids: Sequence[int], occurrence: int, sample: int) -> int:
    """The seed of one sequence: from the run's seed, the prompt itself and which sample of it this is.

    ``occurrence`` counts earlier prompts with the same ids in the same call.
    """
    text = f"{seed}|{','.join(map(str, prompt_ids))}|{occurrence}|{sample}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def uniforms(seed: int, count: int) -> np.ndarray:
    """The first ``count`` uniform numbers in [0, 1) of a sequence, float64."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def threshold(scaled: torch.Tensor, sampling: Sampling) -> torch.Tensor | None:
    """The smallest scaled logit that is kept, ``(n, 1)``; None when nothing is cut.

    ``scaled``: ``(n, vocabulary)`` float32 logits divided by the temperature.
    """
    floor: torch.Tensor | None = None
    size = scaled.shape[-1]
    if sampling.top_k is not None and sampling.top_k < size:
        floor = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
    if sampling.top_p < 1:
        floor = _top_p_floor(scaled, sampling.top_p, floor)
    if sampling.min_p > 0:
        least = scaled.amax(dim=-1, keepdim=True) + float(np.log(sampling.min_p))
        floor = least if floor is None else torch.maximum(floor, least)
    return floor


def _top_p_floor(scaled: torch.Tensor, top_p: float, floor: torch.Tensor | None) -> torch.Tensor:
    kept = scaled if floor is None else scaled.masked_fill(scaled < floor, -torch.inf)
    total = kept.double().logsumexp(dim=-1, keepdim=True)
    size = scaled.shape[-1]
    # Sorting a whole vocabulary is dear and the head of it usually holds enough.
    for count in (min(512, size), size):
        values = kept.topk(count, dim=-1).values
        probabilities = (values.double() - total).exp()
        before = probabilities.cumsum(dim=-1) - probabilities
        within = before < top_p
        if count == size or not bool(within[:, -1].any()):
            break
    last = within.sum(dim=-1, keepdim=True).clamp(min=1) - 1
    return values.gather(-1, last)


def draw(
    logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw one token per row.

    Args:
        logits: ``(n, vocabulary)``, any float type; computed in float32.
        sampling: the settings.
        uniform: ``(n,)`` float64 in [0, 1).

    Returns:
        ids ``(n,)``; log-probabilities ``(n,)`` under the plain model (temperature 1, nothing cut);
        log-probabilities ``(n,)`` under the sampling distribution. Nats, float32.
    """
    logits = logits.float()
    normaliser = logits.logsumexp(dim=-1)
    if sampling.temperature == 0:
        ids = logits.argmax(dim=-1)
        plain = logits.gather(-1, ids[:, None])[:, 0] - normaliser
        return ids, plain, torch.zeros_like(plain)
    scaled = logits if sampling.temperature == 1 else logits / sampling.temperature
    floor = threshold(scaled, sampling)
    if floor is not None:
        scaled = scaled.masked_fill(scaled < floor, -torch.inf)
    weights = (scaled - scaled.amax(dim=-1, keepdim=True)).exp_().double()
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1]
    ids = torch.searchsorted(cumulative, (uniform * total)[:, None], right=True)[:, 0]
    # Rounding can only push the draw past the end; the last token with any weight is meant then.
    last = (
        (weights > 0).long().cumsum(dim=-1).argmax(dim=-1) if bool((ids >= logits.shape[-1]).any()) else ids
    )
    ids = torch.minimum(ids, last)
    plain = logits.gather(-1, ids[:, None])[:, 0] - normaliser
    chosen = scaled.gather(-1, ids[:, None])[:, 0] - scaled.logsumexp(dim=-1)
    return ids, plain, chosen
