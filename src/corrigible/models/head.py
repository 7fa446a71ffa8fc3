"""The output layer and what is read off it, for scored positions only and a block of them at a time.

A vocabulary is fifty to two hundred thousand entries wide, so logits are the largest thing a step
could make. Here they exist for one block of positions at a time, in the type of the weights; sums
over the vocabulary run in float32 on a few rows at a time; and the backward pass either uses the
probabilities that the forward pass left (when they are few) or computes the block again.

:func:`score` reads off the log-probs of given tokens, entropies and expected log-probs, :func:`divergence`
how far two layers' distributions are apart, :func:`top_k` the likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from corrigible.errors import BadInputError

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
        expected: ``(n,)``, ``sum_a q(a) log p(a)`` over the vocabulary, ``p`` at that temperature and ``q``
            the sampling policy at another; its gradient goes through ``p`` alone. None unless asked for.
        sampling_logprobs: ``(n,)`` ``log q`` of the targets, without gradient; together with ``expected``.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    expected: Tensor | None = None
    sampling_logprobs: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TopK:
    """The likeliest tokens at ``n`` positions.

    Attributes:
        logprobs: ``(n, k)`` float32, nats, the largest first.
        ids: ``(n, k)`` int64; equally likely tokens stand in any order.
        rest: ``(n,)`` float32, the probability of all other tokens together.
    """

    logprobs: Tensor
    ids: Tensor
    rest: Tensor


def score(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    expected_at: float | None = None,
    block_bytes: int | None = None,
    keep_bytes: int | None = None,
) -> Scores:
    """Log-probabilities of ``targets`` (and what else is asked for) from hidden states; differentiable.

    Args:
        hidden: ``(n, width)``.
        weight: ``(vocabulary, width)``; the output layer.
        targets: ``(n,)`` int64.
        bias: ``(vocabulary,)`` of the output layer, if it has one.
        temperature: what the logits are divided by.
        entropy: also the entropy of each distribution.
        expected_at: also the expected log-prob of a token drawn at this temperature; at infinity every
            token of the vocabulary is as likely as any other.
        block_bytes: how much memory the logits may take at a time; default :data:`BLOCK_BYTES`.
        keep_bytes: how much may be kept for the backward pass instead of being computed again; default
            :data:`KEEP_BYTES`.
    """
    block_bytes = BLOCK_BYTES if block_bytes is None else block_bytes
    keep_bytes = KEEP_BYTES if keep_bytes is None else keep_bytes
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    logprobs, entropies, expected, sampling = _Score.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, bias, temperature, entropy, expected_at, block_bytes, keep_bytes
    )
    drawn = expected_at is not None
    return Scores(
        logprobs, entropies if entropy else None, expected if drawn else None, sampling if drawn else None
    )


def divergence(
    hidden_a: Tensor,
    weight_a: Tensor,
    hidden_b: Tensor,
    weight_b: Tensor,
    *,
    bias_a: Tensor | None = None,
    bias_b: Tensor | None = None,
    temperature: float = 1.0,
    reverse: bool = False,
    block_bytes: int | None = None,
) -> Tensor:
    """KL divergence over the whole vocabulary at each position, ``(n,)`` float32, nats, >= 0.

    ``KL(a || b) = sum_j p_a(j) (log p_a(j) - log p_b(j))``. Differentiable with respect to ``a``; ``b`` is a
    constant.

    Args:
        hidden_a, hidden_b: ``(n, width)``; the widths of the two may differ.
        weight_a, weight_b: ``(vocabulary, width)``, the output layers.
        bias_a, bias_b: ``(vocabulary,)``, where they have one.
        temperature: what the logits of both are divided by.
        reverse: ``KL(b || a)`` instead.
        block_bytes: as for :func:`score`; the logits of both count.

    Raises:
        BadInputError: vocabularies of different sizes, or different numbers of positions.
    """
    if len(weight_a) != len(weight_b):
        raise BadInputError(
            f"vocabulary_mismatch: one output layer has {len(weight_a)} entries, the other {len(weight_b)}.",
            advice="A divergence needs one vocabulary: compare models of one family.",
        )
    if len(hidden_a) != len(hidden_b):
        raise BadInputError(
            f"The states of {len(hidden_a)} and {len(hidden_b)} positions cannot be compared."
        )
    if not torch.is_grad_enabled():
        hidden_a, weight_a = hidden_a.detach(), weight_a.detach()
        bias_a = None if bias_a is None else bias_a.detach()
    found: Tensor = _Divergence.apply(  # type: ignore[no-untyped-call]
        hidden_a,
        weight_a,
        bias_a,
        hidden_b.detach(),
        weight_b.detach(),
        None if bias_b is None else bias_b.detach(),
        temperature,
        reverse,
        BLOCK_BYTES if block_bytes is None else block_bytes,
    )
    return found


def top_k(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    block_bytes: int | None = None,
) -> TopK:
    """The ``k`` likeliest tokens at each position; no gradient.

    Args:
        hidden, weight, bias, temperature, block_bytes: as for :func:`score`.
        k: how many, 1 to the size of the vocabulary.

    Raises:
        BadInputError: another ``k``.
    """
    with torch.no_grad():
        size = BLOCK_BYTES if block_bytes is None else block_bytes
        # Without positions one empty block still gives tensors of the right shape.
        blocks = [*_blocks(len(hidden), len(weight), hidden.element_size(), size)] or [slice(0, 0)]
        return joined(
            [largest(nn.functional.linear(hidden[at], weight, bias), k, temperature) for at in blocks]
        )


def largest(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """:func:`top_k` of logits ``(n, vocabulary)``, widened to float32 a few rows at a time."""
    rows, vocabulary = logits.shape
    if not 1 <= k <= vocabulary:
        raise BadInputError(
            f"k is {k}.", advice=f"Ask for 1 to {vocabulary} tokens: the vocabulary has no more."
        )
    wide = _wide(logits)
    logprobs = torch.empty(rows, k, dtype=wide, device=logits.device)
    ids = torch.empty(rows, k, dtype=torch.long, device=logits.device)
    rest = torch.empty(rows, dtype=wide, device=logits.device)
    for start in range(0, rows, STRIPE):
        at = slice(start, start + STRIPE)
        stripe, weights, total = _relative(logits[at], temperature, wide)
        highest, ids[at] = stripe.topk(k, dim=-1)
        logprobs[at] = highest - total.log()
        # Not one minus the others: of a certain token nothing but rounding would be left.
        rest[at] = weights.scatter_(-1, ids[at], 0.0).sum(dim=-1) / total[:, 0]
    return TopK(logprobs, ids, rest)


def joined(parts: list[TopK]) -> TopK:
    """One after the other."""
    return TopK(
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.ids for part in parts]),
        torch.cat([part.rest for part in parts]),
    )


def _wide(like: Tensor) -> torch.dtype:
    """In which sums over the vocabulary run."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _relative(logits: Tensor, temperature: float, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A few rows' logits less their largest, ``exp`` of that, and its sum ``(rows, 1)``; all new."""
    stripe = logits.to(wide, copy=True)
    if temperature != 1.0:
        stripe /= temperature
    stripe -= stripe.amax(dim=-1, keepdim=True)
    weights = stripe.exp()
    return stripe, weights, weights.sum(dim=-1, keepdim=True)


def _apart(a: Tensor, b: Tensor, temperature: float, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """``p_a``, ``p_b`` and ``log p_a - log p_b`` from a few rows of logits, ``(rows, vocabulary)`` each."""
    gap, p_a, total_a = _relative(a, temperature, wide)
    other, p_b, total_b = _relative(b, temperature, wide)
    # The logarithm of the ratio, for those of the two sums would each be rounded at their own size.
    gap.sub_(other).sub_((total_a / total_b).log())
    return p_a.div_(total_a), p_b.div_(total_b), gap


def _blocks(rows: int, vocabulary: int, width: int, most: int) -> Iterator[slice]:
    size = max(1, most // (vocabulary * width))
    count = max(1, -(-rows // size))
    size = max(1, -(-rows // count))  # blocks of equal size
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _stripes(block: slice) -> Iterator[tuple[slice, slice]]:
    """Rows to widen together: where they stand in the block, and where among all positions."""
    for start in range(block.start, block.stop, STRIPE):
        stop = min(start + STRIPE, block.stop)
        yield slice(start - block.start, stop - block.start), slice(start, stop)


class _Gradients:
    """Gradients of an output layer and the states it read, from the slopes of its logits, block by block.

    ``needed`` says which of ``hidden``, ``weight`` and ``bias`` want one.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, bool, bool]
    ) -> None:
        self._layer = hidden, weight, bias
        self._wide = _wide(hidden)
        self._need_weight = needed[1]
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight: Tensor | None = None
        self.bias = torch.zeros_like(bias, dtype=self._wide) if bias is not None and needed[2] else None

    def add(self, block: slice, slope: Tensor) -> None:
        """``slope`` is ``(rows of the block, vocabulary)``, in the weights' type."""
        hidden, weight, _ = self._layer
        if self.hidden is not None:
            torch.mm(slope, weight, out=self.hidden[block])
        if self.bias is not None:
            self.bias += slope.sum(dim=0, dtype=self._wide)
        if self._need_weight:
            part = slope.T @ hidden[block]
            if len(slope) == len(hidden):
                self.weight = part
            elif self.weight is None:
                self.weight = part.to(self._wide)
            else:
                self.weight += part

    def found(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden states, weight and bias, each in the type of what it belongs to."""
        _, weight, bias = self._layer
        return (
            self.hidden,
            None if self.weight is None else self.weight.to(weight.dtype),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )


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
        expected_at: float | None,
        block_bytes: int,
        keep_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, vocabulary = len(hidden), len(weight)
        wide = _wide(hidden)
        drawn = expected_at is not None
        # What the sampling policy's logits are, as a multiple of these: 0 is the uniform distribution.
        flatter = temperature / expected_at if expected_at is not None else 0.0

        def column(wanted: bool) -> Tensor:
            return torch.empty(rows if wanted else 0, dtype=wide, device=hidden.device)

        logprobs, normaliser = column(True), column(True)
        entropies = column(entropy)
        expected, sampling, sampling_normaliser = column(drawn), column(drawn), column(drawn)
        backward = any(ctx.needs_input_grad)
        keep = backward and not entropy and not drawn
        keep = keep and rows * vocabulary * hidden.element_size() <= keep_bytes
        kept: list[Tensor] = []
        for block in _blocks(rows, vocabulary, hidden.element_size(), block_bytes):
            logits = nn.functional.linear(hidden[block], weight, bias)
            for at, to in _stripes(block):
                # Equal to a maximum, a difference, an exponential and a sum, on rows that stay in cache.
                stripe = logits[at].to(wide, copy=True)
                if temperature != 1.0:
                    stripe /= temperature
                most = stripe.amax(dim=-1, keepdim=True)
                chosen = stripe.gather(-1, targets[to, None])[:, 0]
                stripe -= most
                weighted = stripe.clone() if entropy else None
                if drawn:
                    likely = (flatter * stripe).exp_()
                    mass = likely.sum(dim=-1)
                    # Relative to the largest logit, as the logarithm of the sum is.
                    average = likely.mul_(stripe).sum(dim=-1) / mass
                stripe.exp_()
                total = stripe.sum(dim=-1, keepdim=True)
                log_total = (most + total.log())[:, 0]
                normaliser[to] = log_total
                logprobs[to] = chosen - log_total
                if weighted is not None:
                    # H = log Z - sum p x with x and Z both taken relative to the largest logit.
                    mean = (weighted.mul_(stripe).sum(dim=-1, keepdim=True) / total)[:, 0]
                    entropies[to] = total.log()[:, 0] - mean
                if drawn:
                    expected[to] = average - total.log()[:, 0]
                    sampling_normaliser[to] = mass.log() - flatter * total.log()[:, 0]
                    sampling[to] = flatter * logprobs[to] - sampling_normaliser[to]
                if keep:
                    torch.mul(stripe, total.reciprocal_(), out=stripe)
                    logits[at] = stripe
            if keep:
                kept.append(logits)
        unused = [each for each, wanted in ((entropies, entropy), (expected, drawn)) if not wanted]
        ctx.mark_non_differentiable(sampling, *unused)
        ctx.save_for_backward(hidden, weight, targets, normaliser, entropies, sampling_normaliser, *kept)
        ctx.bias, ctx.temperature, ctx.entropy, ctx.block_bytes = bias, temperature, entropy, block_bytes
        ctx.drawn, ctx.flatter = drawn, flatter
        ctx.spent = False
        return logprobs, entropies, expected, sampling

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor, grad_entropy: Tensor, grad_expected: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("The kept probabilities are used up by one backward pass; score again.")
        hidden, weight, targets, normaliser, entropies, sampling_normaliser, *kept = ctx.saved_tensors
        ctx.spent = bool(kept)
        needed = ctx.needs_input_grad
        gradients = _Gradients(hidden, weight, ctx.bias, (needed[0], needed[1], needed[3]))
        # d log p_y/dx_j = [j = y] - p_j and, with q a constant, d sum_a q_a log p_a/dx_j = q_j - p_j.
        falls = grad + grad_expected if ctx.drawn else grad
        blocks = _blocks(len(hidden), len(weight), hidden.element_size(), ctx.block_bytes)
        for number, block in enumerate(blocks):
            rows = torch.arange(block.stop - block.start, device=hidden.device)
            if kept:
                slope = kept[number]
                slope *= -grad[block, None]
            else:
                slope = nn.functional.linear(hidden[block], weight, ctx.bias)
                for at, to in _stripes(block):
                    stripe = slope[at].to(normaliser.dtype, copy=True)
                    if ctx.temperature != 1.0:
                        stripe /= ctx.temperature
                    stripe -= normaliser[to, None]
                    rises = None
                    if ctx.drawn:
                        rises = (ctx.flatter * stripe).sub_(sampling_normaliser[to, None]).exp_()
                        rises *= grad_expected[to, None]
                    if ctx.entropy:
                        # dH/dx_j = -p_j (log p_j + H)
                        outer = falls[to, None] + grad_entropy[to, None] * (stripe + entropies[to, None])
                        stripe = -outer * stripe.exp_()
                    else:
                        stripe.exp_().mul_(-falls[to, None])
                    slope[at] = stripe if rises is None else stripe.add_(rises)
            slope[rows, targets[block]] += grad[block].to(slope.dtype)
            if ctx.temperature != 1.0:
                slope /= ctx.temperature
            gradients.add(block, slope)
        grad_hidden, grad_weight, grad_bias = gradients.found()
        return grad_hidden, grad_weight, None, grad_bias, None, None, None, None, None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_a: Tensor,
        weight_a: Tensor,
        bias_a: Tensor | None,
        hidden_b: Tensor,
        weight_b: Tensor,
        bias_b: Tensor | None,
        temperature: float,
        reverse: bool,
        block_bytes: int,
    ) -> Tensor:
        ctx.biases, ctx.temperature, ctx.reverse = (bias_a, bias_b), temperature, reverse
        width = hidden_a.element_size() + hidden_b.element_size()
        ctx.blocks = list(_blocks(len(hidden_a), len(weight_a), width, block_bytes))
        wide = _wide(hidden_a)
        found = torch.empty(len(hidden_a), dtype=wide, device=hidden_a.device)
        for block in ctx.blocks:
            a = nn.functional.linear(hidden_a[block], weight_a, bias_a)
            b = nn.functional.linear(hidden_b[block], weight_b, bias_b)
            for at, to in _stripes(block):
                p_a, p_b, gap = _apart(a[at], b[at], temperature, wide)
                found[to] = -p_b.mul_(gap).sum(dim=-1) if reverse else p_a.mul_(gap).sum(dim=-1)
        found.clamp_(min=0.0)  # below it can only be by rounding
        ctx.save_for_backward(hidden_a, weight_a, hidden_b, weight_b, found)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_a, weight_a, hidden_b, weight_b, found = ctx.saved_tensors
        bias_a, bias_b = ctx.biases
        gradients = _Gradients(hidden_a, weight_a, bias_a, ctx.needs_input_grad[:3])
        for block in ctx.blocks:
            slope = nn.functional.linear(hidden_a[block], weight_a, bias_a)
            b = nn.functional.linear(hidden_b[block], weight_b, bias_b)
            for at, to in _stripes(block):
                p_a, p_b, gap = _apart(slope[at], b[at], ctx.temperature, found.dtype)
                # dKL(a || b)/dx_j = p_a (log p_a - log p_b - KL) and dKL(b || a)/dx_j = p_a - p_b
                outer = p_a.sub_(p_b) if ctx.reverse else p_a.mul_(gap.sub_(found[to, None]))
                slope[at] = outer.mul_(grad[to, None] / ctx.temperature)
            gradients.add(block, slope)
        return *gradients.found(), None, None, None, None, None, None
