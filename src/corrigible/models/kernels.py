"""The parts of a Llama-family network that are worth their own backward pass.

Each is a function of tensors with the gradient written by hand, so that little is kept for it and
little is written to memory: on a CPU the matrix products wait for memory, not the other way round.
Sums run in float32 whatever the type of the inputs, and the results round where the plain network
of transformers rounds, or later. ``tests/models/test_kernels.py`` holds every one to a float64 oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from corrigible.models.packing import Node

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        scale = (
            torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x[:0]).dtype).square_()
            / x.shape[-1]
        )
        scale = scale.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed: Tensor = x * scale
        if dtype == weight.dtype:
            return normed.to(dtype).mul_(weight)
        return normed.mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).view(-1, len(weight)).sum(dim=0).to(weight.dtype)
        inner = _wide(grad) * weight
        along = (inner * normed).mean(dim=-1, keepdim=True)
        return inner.sub_(normed.mul_(along)).mul_(scale).to(x.dtype), grad_weight, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Root-mean-square norm (Zhang and Sennrich 2019): ``x / sqrt(mean(x²) + eps) · weight``.

    Args:
        x: ``(..., width)``.
        weight: ``(width,)``; of a wider type than the result, the product with it is not rounded twice.
        eps: added to the mean square.
        dtype: of the result; that of ``x`` unless told otherwise.
    """
    result: Tensor = _RmsNorm.apply(x, weight, eps, dtype or x.dtype)  # type: ignore[no-untyped-call]
    return result


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = nn.functional.silu(gate).mul_(grad)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, grad_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up`` (Shazeer 2020), both ``(tokens, width)``."""
    result: Tensor = _SwiGlu.apply(gate, up)  # type: ignore[no-untyped-call]
    return result


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = x * cos
    out[..., :half].addcmul_(second, sin[..., :half], value=-1)
    out[..., half:].addcmul_(first, sin[..., half:])
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # A rotation's transpose is the rotation back; both halves of an angle are equal.
        return _turned(grad, cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) in transformers' layout: first half against second half.

    Args:
        x: ``(tokens, heads, size)``.
        cos, sin: ``(tokens, 1, size)``, both halves of the last axis equal.
    """
    result: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return result


DENSE = 384
"""Up to this many keys a block's scores are one dense table; beyond, a fused kernel cuts them up."""


@dataclass(frozen=True, slots=True)
class Block:
    """Tokens ``start`` to ``end``, each of which sees those before it here and all the stretches ``above``."""

    start: int
    end: int
    above: tuple[tuple[int, int], ...]


@lru_cache(maxsize=16)
def blocks(nodes: tuple[Node, ...]) -> tuple[Block, ...]:
    """The nodes of a tree, each with the stretches that stand above it, neighbours joined."""
    found: list[Block] = []
    path: list[Node] = []
    for node in nodes:
        while path and path[-1].below <= node.start:
            path.pop()
        above: list[tuple[int, int]] = []
        for one in path:
            begin = above.pop()[0] if above and above[-1][1] == one.start else one.start
            above.append((begin, one.end))
        found.append(Block(node.start, node.end, tuple(above)))
        path.append(node)
    return tuple(found)


class _TreeAttention(torch.autograd.Function):
    """Attention over a tree, block by block; it all runs in float32.

    A short block is a few dense calls, which keep nothing but their inputs for the backward pass. A long
    one is a causal call of torch's fused kernel over itself and a full one over each stretch above,
    joined exactly by their log-sum-exp: a token's output is the mean of its parts weighted by ``exp(lse
    of the part - lse of all)``, and since the gradient of softmax attention needs only the output and
    the log-sum-exp of all, each part's backward call is given those. On a CPU float32 is no slower, and
    a branch is computed alike whatever it was packed with.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, nodes: tuple[Node, ...], scale: float
    ) -> Tensor:
        kept = q, k, v
        q, k, v = (_heads(_wide(x)) for x in kept)
        out, total = torch.empty_like(q), q.new_empty(q.shape[:2])
        masks = _causal(q, nodes)
        for block in blocks(nodes):
            own = slice(block.start, block.end)
            if _is_dense(block):
                weights = _weights(q[:, own], _seen(k, block, len(q)), masks, scale)
                out[:, own] = torch.bmm(weights, _seen(v, block, len(q)))
                continue
            mixed, lse = _flash(q, k, v, own, own, True, scale)
            for start, end in block.above:
                part, other = _flash(q, k, v, own, slice(start, end), False, scale)
                both = torch.logaddexp(lse, other)
                mixed = mixed * (lse - both).exp_().unsqueeze(-1)
                mixed.addcmul_(part, (other - both).exp_().unsqueeze(-1))
                lse = both
            out[:, own], total[:, own] = mixed, lse
        result = _heads(out).to(kept[0].dtype)
        ctx.save_for_backward(*kept, result, total)
        ctx.nodes, ctx.scale = nodes, scale
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        *kept, total = ctx.saved_tensors
        dtype, scale = kept[0].dtype, ctx.scale
        q, k, v, out, grad = (_heads(_wide(x)) for x in (*kept, grad))
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
        masks = _causal(q, ctx.nodes)
        for block in blocks(ctx.nodes):
            own = slice(block.start, block.end)
            if _is_dense(block):
                keys = _seen(k, block, len(q))
                weights = _weights(q[:, own], keys, masks, scale)
                _add_seen(grad_v, block, torch.bmm(weights.transpose(1, 2), grad[:, own]))
                slope = torch.bmm(grad[:, own], _seen(v, block, len(q)).transpose(1, 2))
                slope = torch.ops.aten._softmax_backward_data(slope, weights, -1, weights.dtype).mul_(scale)
                grad_q[:, own] = torch.bmm(slope, keys)
                _add_seen(grad_k, block, torch.bmm(slope.transpose(1, 2), q[:, own]))
                continue
            for span in ((block.start, block.end), *block.above):
                into = slice(*span)
                asked = (grad[None, :, own], q[None, :, own], k[None, :, into], v[None, :, into])
                known = (out[None, :, own], total[None, :, own], 0.0, span[0] == block.start)
                parts = flash_backward(*asked, *known, scale=scale)
                grad_q[:, own] += parts[0][0]
                grad_k[:, into] += parts[1][0]
                grad_v[:, into] += parts[2][0]
        return *(_heads(x).to(dtype) for x in (grad_q, grad_k, grad_v)), None, None


def _heads(x: Tensor) -> Tensor:
    """``(tokens, heads, size)`` as ``(heads, tokens, size)``, and back."""
    return x.transpose(0, 1)


def _is_dense(block: Block) -> bool:
    return block.end - block.start + sum(end - start for start, end in block.above) <= DENSE


def _causal(q: Tensor, nodes: tuple[Node, ...]) -> Tensor:
    """``(n, n)``: minus infinity where a later token would be seen; for the longest dense block."""
    longest = max((b.end - b.start for b in blocks(nodes) if _is_dense(b)), default=0)
    return q.new_full((longest, longest), float("-inf")).triu_(1)


def _seen(x: Tensor, block: Block, heads: int) -> Tensor:
    """What a block sees of ``x`` ``(key heads, tokens, size)``, for every query head: ``(heads, keys, size)``."""
    parts = [x[:, start:end] for start, end in (*block.above, (block.start, block.end))]
    # A copy in any case: a product must not depend on how its factors lie in memory.
    return torch.cat(parts, dim=1).repeat_interleave(heads // len(x), dim=0)


def _add_seen(x: Tensor, block: Block, part: Tensor) -> None:
    """Add the gradient ``part`` of :func:`_seen` to ``x``."""
    part = part.view(len(x), -1, *part.shape[1:]).sum(dim=1) if len(part) != len(x) else part
    place = 0
    for start, end in (*block.above, (block.start, block.end)):
        x[:, start:end] += part[:, place : place + end - start]
        place += end - start


def _weights(q: Tensor, keys: Tensor, masks: Tensor, scale: float) -> Tensor:
    """Softmax weights ``(heads, tokens, keys)`` of a block."""
    count, above = q.shape[1], keys.shape[1] - q.shape[1]
    scores = torch.bmm(q, keys.transpose(1, 2)).mul_(scale)
    scores[:, :, above:] += masks[:count, :count]
    return scores.softmax(dim=-1)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, asked: slice, into: slice, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output ``(heads, tokens, size)`` and log-sum-exp ``(heads, tokens)`` of one stretch over another."""
    out, lse = flash(q[None, :, asked], k[None, :, into], v[None, :, into], 0.0, causal, scale=scale)
    return out[0], lse[0]


def tree_attention(q: Tensor, k: Tensor, v: Tensor, nodes: Sequence[Node], scale: float) -> Tensor:
    """Softmax attention in which a token sees its own node up to itself and all nodes above it.

    Args:
        q: ``(tokens, heads, size)``.
        k, v: ``(tokens, key heads, size)``; ``heads`` is a multiple of ``key heads``.
        nodes: the tree.
        scale: what the products are multiplied by before the softmax.

    Returns:
        ``(tokens, heads, size)``.
    """
    if q.device.type == "cpu":
        result: Tensor = _TreeAttention.apply(q, k, v, tuple(nodes), scale)  # type: ignore[no-untyped-call]
        return result
    return masked_attention(q, k, v, nodes, scale)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, nodes: Sequence[Node], scale: float) -> Tensor:
    """As :func:`tree_attention`, by one dense call under a mask: any device, quadratic in all tokens."""
    visible = torch.zeros(len(q), len(q), dtype=torch.bool, device=q.device)
    for node in nodes:
        visible[node.start : node.end, node.start : node.end].fill_(True).tril_()
        visible[node.end : node.below, node.start : node.end] = True
    out = nn.functional.scaled_dot_product_attention(
        _heads(q)[None],
        _heads(k)[None],
        _heads(v)[None],
        attn_mask=visible[None, None],
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)
