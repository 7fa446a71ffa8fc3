"""The parts of a Llama-family network that are worth their own backward pass.

Each is a function of tensors with the gradient written by hand, so that little is kept for it and
little is written to memory: on a CPU the matrix products wait for memory, not the other way round.
Sums run in float32 whatever the type of the inputs, and the results round where the plain network
of transformers rounds, or later. ``tests/models/test_kernels.py`` holds every one to a float64 oracle.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def wide(x: Tensor) -> Tensor:
    """In the type that sums run in: float32, or float64 where ``x`` is that."""
    return x if x.dtype == torch.float64 else x.float()


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        scale = (
            torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x[:0]).dtype).square_() / x.shape[-1]
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
        inner = wide(grad) * weight
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
    if not torch.is_grad_enabled():  # a function of one's own costs more than a short product
        return nn.functional.silu(gate).mul_(up)
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
    if not torch.is_grad_enabled():
        return _turned(x, cos, sin)
    result: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return result
