"""The parts of a Llama-family network that are worth their own backward pass.

Each is a function of tensors with the gradient written by hand, so that little is kept for it and
little is written to memory: on a CPU the matrix products wait for memory, not the other way round.
Sums run in float32 whatever the type of the inputs, and the results round where the plain network
of transformers rounds, or later. ``tests/models/test_kernels.py`` holds every one to a float64 oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class _TreeAttention(torch.autograd.Function):
    """Attention over a tree of nodes as a few dense calls, joined exactly by their log-sum-exp.

    Every node attends to itself causally; all that stands under a node attends to it fully. A
    token's output is the mean of its parts weighted by ``exp(lse of the part - lse of all)``, and
    since the gradient of softmax attention needs only the output and the log-sum-exp of all, each
    part's backward call is given those. It all runs in float32: on a CPU that is no slower here, and
    joining parts that were rounded would make a row's numbers depend on what it was packed with.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, nodes: Sequence[Node], scale: float) -> Tensor:
        kept, dtype = (q, k, v), q.dtype
        q, k, v = _wide(q), _wide(k), _wide(v)
        out = torch.empty_like(q)
        total = torch.empty(q.shape[1], q.shape[0], dtype=q.dtype, device=q.device)
        for node in nodes:
            part, lse = _flash(q, k, v, node.start, node.end, node.start, node.end, True, scale)
            out[node.start : node.end] = part
            total[:, node.start : node.end] = lse
        # From the leaves up or from the root down makes no difference; all selves are there by now.
        for node in nodes:
            if node.below == node.end:
                continue
            part, lse = _flash(q, k, v, node.end, node.below, node.start, node.end, False, scale)
            here = total[:, node.end : node.below]
            both = torch.logaddexp(here, lse)
            keep = (here - both).exp_().transpose(0, 1).unsqueeze(-1)
            share = (lse - both).exp_().transpose(0, 1).unsqueeze(-1)
            place = out[node.end : node.below]
            place.copy_(place * keep + part * share)
            total[:, node.end : node.below] = both
        out = out.to(dtype)
        ctx.save_for_backward(*kept, out, total)
        ctx.nodes, ctx.scale = nodes, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        *kept, total = ctx.saved_tensors
        dtype = kept[0].dtype
        q, k, v, out = map(_wide, kept)
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
        grad = _wide(grad).contiguous()
        for node in ctx.nodes:
            spans = [(node.start, node.end, True)]
            if node.below > node.end:
                spans.append((node.end, node.below, False))
            for start, end, causal in spans:
                into = (slice(None), slice(node.start, node.end))
                asked = (slice(None), slice(start, end))
                parts = flash_backward(
                    _heads(grad)[asked][None],
                    _heads(q)[asked][None],
                    _heads(k)[into][None],
                    _heads(v)[into][None],
                    _heads(out)[asked][None],
                    total[:, start:end][None],
                    0.0,
                    causal,
                    scale=ctx.scale,
                )
                grad_q[start:end] += parts[0][0].transpose(0, 1)
                grad_k[node.start : node.end] += parts[1][0].transpose(0, 1)
                grad_v[node.start : node.end] += parts[2][0].transpose(0, 1)
        return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype), None, None


def _heads(x: Tensor) -> Tensor:
    """``(tokens, heads, size)`` as ``(heads, tokens, size)``."""
    return x.transpose(0, 1)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, start: int, end: int, key: int, key_end: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output ``(tokens, heads, size)`` and log-sum-exp ``(heads, tokens)`` of one stretch over another."""
    out, lse = flash(
        _heads(q[start:end])[None],
        _heads(k[key:key_end])[None],
        _heads(v[key:key_end])[None],
        0.0,
        causal,
        scale=scale,
    )
    return out[0].transpose(0, 1), lse[0]


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
        result: Tensor = _TreeAttention.apply(q, k, v, nodes, scale)  # type: ignore[no-untyped-call]
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
