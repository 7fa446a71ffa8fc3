"""The plain, slow and obviously right log-probabilities and generation.

No batch, no padding, no cache, no shortcut, float64 where it matters. Every faster path must equal
these for ever; do not make them faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from corrigible.models.generate import Generation
from corrigible.models.policy import LanguagePolicy
from corrigible.models.sampling import uniforms
from corrigible.records import FinishReason, Sampling


def logprobs_reference(model: LanguagePolicy | nn.Module, ids: Sequence[int]) -> torch.Tensor:
    """Log-probability of each token but the first given all before it: ``(tokens - 1,)`` float32, nats."""
    network = model.model if isinstance(model, LanguagePolicy) else model
    device = next(network.parameters()).device
    with torch.no_grad():
        logits = network(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0]
    table = torch.log_softmax(logits.float(), dim=-1)
    return torch.tensor([float(table[i, ids[i + 1]]) for i in range(len(ids) - 1)])


def distribution_reference(logits: Sequence[float], sampling: Sampling) -> list[float]:
    """The sampling distribution ``(vocabulary,)``, as :mod:`corrigible.models.sampling` defines it."""
    if sampling.temperature == 0:
        best = max(range(len(logits)), key=lambda i: (logits[i], -i))
        return [1.0 if i == best else 0.0 for i in range(len(logits))]
    scaled = [value / sampling.temperature for value in logits]
    highest = max(scaled)
    kept = set(range(len(scaled)))
    if sampling.top_k is not None and sampling.top_k < len(scaled):
        least = sorted(scaled, reverse=True)[sampling.top_k - 1]
        kept = {i for i in kept if scaled[i] >= least}
    if sampling.top_p < 1:
        total = sum(math.exp(scaled[i] - highest) for i in kept)
        reached, least = 0.0, highest
        for value in sorted((scaled[i] for i in kept), reverse=True):
            if reached >= sampling.top_p:
                break
            least = value
            reached += math.exp(value - highest) / total
        kept = {i for i in kept if scaled[i] >= least}
    if sampling.min_p > 0:
        kept = {i for i in kept if math.exp(scaled[i] - highest) >= sampling.min_p}
    total = sum(math.exp(scaled[i] - highest) for i in kept)
    return [math.exp(scaled[i] - highest) / total if i in kept else 0.0 for i in range(len(scaled))]


def generate_reference(
    policy: LanguagePolicy, prompt_ids: Sequence[int], sampling: Sampling, seed: int
) -> Generation:
    """One answer to one prompt, the whole text read again for every token.

    Args:
        policy: the model.
        prompt_ids: the prompt, generation header included.
        sampling: the settings; its ``n`` and ``seed`` are not looked at.
        seed: the sequence's own seed, as recorded in :class:`Generation`.
    """
    ids: list[int] = []
    logprobs: list[float] = []
    chosen_logprobs: list[float] = []
    room = policy.context_length - len(prompt_ids)
    draws = uniforms(seed, sampling.max_tokens)
    finish, text = FinishReason.length, ""
    for position in range(sampling.max_tokens):
        if position >= room:
            finish = FinishReason.context
            break
        with torch.no_grad():
            everything = torch.tensor([[*prompt_ids, *ids]], device=policy.device)
            logits = policy.model(input_ids=everything, use_cache=False).logits[0, -1].float()
        probabilities = distribution_reference(logits.tolist(), sampling)
        token, reached = 0, 0.0
        for candidate, probability in enumerate(probabilities):
            if probability > 0:
                token = candidate
                reached += probability
                if reached > draws[position]:
                    break
        ids.append(token)
        logprobs.append(float(torch.log_softmax(logits, dim=-1)[token]))
        chosen_logprobs.append(math.log(probabilities[token]))
        if token in policy.end_ids:
            finish = FinishReason.stop
            break
        text = policy.renderer.decode(ids)
        if any(stop in text for stop in sampling.stop):
            finish = FinishReason.stop_string
            break
    text = policy.renderer.decode(ids[:-1] if finish is FinishReason.stop else ids)
    if finish is FinishReason.stop_string:
        text = text[: min(text.index(stop) for stop in sampling.stop if stop in text)]
    return Generation(
        prompt_ids=tuple(prompt_ids),
        ids=tuple(ids),
        text=text,
        logprobs=tuple(logprobs),
        sampling_logprobs=tuple(chosen_logprobs),
        finish_reason=finish,
        seed=seed,
    )
