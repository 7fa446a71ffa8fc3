"""The output layer and what is read off it, for scored positions only and a block of them at a time.

A vocabulary is fifty to two hundred thousand entries wide, so logits are the largest thing a step
could make. Here they exist for one block of positions at a time, in the type of the weights; sums
over the vocabulary run in float32 on a few rows at a time; and the backward pass either uses the
probabilities that the forward pass left (when they are few) or computes the block again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BLOCK_BYTES = 128 << 20
"""Most memory that the logits of one block may take."""

KEEP_BYTES = 256 << 20
"""Probabilities of up to this size stay from the forward to the backward pass."""

STRIPE = 16
"""Rows whose logits are widened to float32 at a time: they fit into the processor's cache."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What the output layer says at ``n`` positions; float32, nats.

    Attributes:
        logprobs: ``(n,)`` of the targets, at the temperature asked for.
        entropy: ``(n,)`` of the whole distribution at that temperature; None unless asked for.
    """

    logprobs: Tensor
    entropy: Tensor | None = None


def score(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    block_bytes: int | None = None,
    keep_bytes: int | None = None,
) -> Scores:
    """Log-probabilities of ``targets`` (and entropies) from hidden states; differentiable.

    Args:
        hidden: ``(n, width)``.
        weight: ``(vocabulary, width)``; the output layer.
        targets: ``(n,)`` int64.
        bias: ``(vocabulary,)`` of the output layer, if it has one.
        temperature: what the logits are divided by.
        entropy: also the entropy of each distribution.
        block_bytes: how much memory the logits may take at a time; default :data:`BLOCK_BYTES`.
        keep_bytes: how much may be kept for the backward pass instead of being computed again; default
            :data:`KEEP_BYTES`.
    """
    block_bytes = BLOCK_BYTES if block_bytes is None else block_bytes
    keep_bytes = KEEP_BYTES if keep_bytes is None else keep_bytes
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    logprobs, entropies = _Score.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, bias, temperature, entropy, block_bytes, keep_bytes
    )
    return Scores(logprobs, entropies if entropy else None)


def _blocks(rows: int, vocabulary: int, width: int, most: int) -> Iterator[slice]:
    size = max(1, most // (vocabulary * width))
    count = max(1, -(-rows // size))
    size = max(1, -(-rows // count))  # blocks of equal size
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        temperature: float,
        entropy: bool,
        block_bytes: int,
        keep_bytes: int,
    ) -> tuple[Tensor, Tensor]:
        rows, vocabulary = len(hidden), len(weight)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs = torch.empty(rows, dtype=wide, device=hidden.device)
        entropies = torch.empty(rows if entropy else 0, dtype=wide, device=hidden.device)
        normaliser = torch.empty(rows, dtype=wide, device=hidden.device)
        backward = any(ctx.needs_input_grad)
        keep = backward and not entropy and rows * vocabulary * hidden.element_size() <= keep_bytes
        kept: list[Tensor] = []
        for block in _blocks(rows, vocabulary, hidden.element_size(), block_bytes):
            logits = nn.functional.linear(hidden[block], weight, bias)
            for start in range(0, len(logits), STRIPE):
                at = slice(start, start + STRIPE)
                to = slice(block.start + start, min(block.start + start + STRIPE, block.stop))
                # Equal to a maximum, a difference, an exponential and a sum, on rows that stay in cache.
                stripe = logits[at].to(wide, copy=True)
                if temperature != 1.0:
                    stripe /= temperature
                most = stripe.amax(dim=-1, keepdim=True)
                chosen = stripe.gather(-1, targets[to, None])[:, 0]
                stripe -= most
                weighted = stripe.clone() if entropy else None
                stripe.exp_()
                total = stripe.sum(dim=-1, keepdim=True)
                log_total = (most + total.log())[:, 0]
                normaliser[to] = log_total
                logprobs[to] = chosen - log_total
                if weighted is not None:
                    # H = log Z - sum p x with x and Z both taken relative to the largest logit.
                    mean = (weighted.mul_(stripe).sum(dim=-1, keepdim=True) / total)[:, 0]
                    entropies[to] = total.log()[:, 0] - mean
                if keep:
                    torch.mul(stripe, total.reciprocal_(), out=stripe)
                    logits[at] = stripe
            if keep:
                kept.append(logits)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        ctx.save_for_backward(hidden, weight, targets, normaliser, entropies, *kept)
        ctx.bias, ctx.temperature, ctx.entropy, ctx.block_bytes = bias, temperature, entropy, block_bytes
        ctx.spent = False
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("The kept probabilities are used up by one backward pass; score again.")
        hidden, weight, targets, normaliser, entropies, *kept = ctx.saved_tensors
        ctx.spent = bool(kept)
        need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(ctx.bias, dtype=normaliser.dtype) if need_bias else None
        blocks = list(_blocks(len(hidden), len(weight), hidden.element_size(), ctx.block_bytes))
        for number, block in enumerate(blocks):
            rows = torch.arange(block.stop - block.start, device=hidden.device)
            if kept:
                slope = kept[number]
                slope *= -grad[block, None]
            else:
                slope = nn.functional.linear(hidden[block], weight, ctx.bias)
                for start in range(0, len(slope), STRIPE):
                    at = slice(start, start + STRIPE)
                    to = slice(block.start + start, min(block.start + start + STRIPE, block.stop))
                    stripe = slope[at].to(normaliser.dtype, copy=True)
                    if ctx.temperature != 1.0:
                        stripe /= ctx.temperature
                    stripe -= normaliser[to, None]
                    if ctx.entropy:
                        # dH/dx_j = -p_j (log p_j + H)
                        outer = grad[to, None] + grad_entropy[to, None] * (stripe + entropies[to, None])
                        slope[at] = -outer * stripe.exp_()
                    else:
                        slope[at] = stripe.exp_().mul_(-grad[to, None])
            slope[rows, targets[block]] += grad[block].to(slope.dtype)
            if ctx.temperature != 1.0:
                slope /= ctx.temperature
            if grad_hidden is not None:
                torch.mm(slope, weight, out=grad_hidden[block])
            if grad_bias is not None:
                grad_bias += slope.sum(dim=0, dtype=grad_bias.dtype)
            if need_weight:
                part = slope.T @ hidden[block]
                if len(blocks) == 1:
                    grad_weight = part
                elif grad_weight is None:
                    grad_weight = part.to(normaliser.dtype)
                else:
                    grad_weight += part
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(ctx.bias.dtype)
        return grad_hidden, grad_weight, None, grad_bias, None, None, None, None
