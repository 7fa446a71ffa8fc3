"""Attention over rows that share what they begin with: a token sees its own branch of the tree, nothing else.

On a CPU it runs in float32 whatever the type of the inputs: no slower there, and a branch is then
computed alike whatever it was packed with. ``tests/models/test_kernels.py`` holds it to a float64 oracle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from corrigible.models.kernels import wide
from corrigible.models.packing import Node

DENSE = 384
"""Up to this many keys a node's scores are one dense table; beyond, torch's fused kernel cuts them up."""

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class Branch:
    """The tokens ``start`` to ``end`` of a node, and the stretches that stand above it, neighbours joined."""

    start: int
    end: int
    above: tuple[tuple[int, int], ...]

    @property
    def keys(self) -> int:
        """Tokens that the last token sees."""
        return self.end - self.start + sum(end - start for start, end in self.above)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Where the keys stand."""
        return (*self.above, (self.start, self.end))


def branches(nodes: Sequence[Node]) -> Iterator[Branch]:
    """Each node with what stands above it."""
    path: list[Node] = []
    for node in nodes:
        while path and path[-1].below <= node.start:
            path.pop()
        above: list[tuple[int, int]] = []
        for one in path:
            begin = above.pop()[0] if above and above[-1][1] == one.start else one.start
            above.append((begin, one.end))
        yield Branch(node.start, node.end, tuple(above))
        path.append(node)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a tree is computed.

    Short branches are gathered, one after the other: of queries ``(tokens x heads)`` the rows ``asked``,
    branch by branch, key head by key head, token by token; of keys ``(tokens x key heads)`` the rows
    ``seen``, branch by branch and key head by key head.
    """

    short: tuple[Branch, ...]
    long: tuple[Branch, ...]
    asked: Tensor
    seen: Tensor
    largest: int
    mask: Tensor


@lru_cache(maxsize=8)
def _plan(nodes: tuple[Node, ...], heads: int, key_heads: int, most: int) -> _Plan:
    every = list(branches(nodes))
    short = tuple(branch for branch in every if branch.keys <= most)
    group = heads // key_heads
    asked, seen = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, dtype=torch.long)]
    for branch in short:
        tokens = torch.arange(branch.start, branch.end)
        within = torch.arange(heads).view(key_heads, 1, group)
        asked.append((tokens[None, :, None] * heads + within).flatten())
        keys = torch.cat([torch.arange(start, end) for start, end in branch.spans])
        seen.append((keys[None, :] * key_heads + torch.arange(key_heads)[:, None]).flatten())
    longest = max((branch.end - branch.start for branch in short), default=0)
    mask = torch.full((longest, longest), float("-inf")).triu_(1).repeat_interleave(group, dim=0)
    largest = max(((b.end - b.start) * heads * b.keys for b in short), default=0)
    long = tuple(branch for branch in every if branch.keys > most)
    return _Plan(short, long, torch.cat(asked), torch.cat(seen), largest, mask)


class _TreeAttention(torch.autograd.Function):
    """Short branches: a few dense calls each, which keep nothing but their inputs for the backward pass.

    Long ones: a causal call of the fused kernel over itself and a full one over each stretch above,
    joined exactly by their log-sum-exp. A token's output is the mean of its parts weighted by ``exp(lse
    of the part - lse of all)``; and since the gradient of softmax attention needs only the output and
    the log-sum-exp of all, each part's backward call is given those.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, nodes: tuple[Node, ...], scale: float) -> Tensor:
        plan = _plan(nodes, q.shape[1], k.shape[1], DENSE)
        out = torch.empty_like(q)
        lse = torch.empty(0)
        if plan.short:
            work = _Short(plan, q, k, v, scale)
            found = torch.empty_like(work.q)
            for branch in work:
                torch.bmm(branch.weights(), branch.values, out=branch.of(found))
            _rows(out)[plan.asked] = found.to(q.dtype)
        if plan.long:
            wide_q, wide_k, wide_v = (_heads(wide(x)) for x in (q, k, v))
            lse = wide_q.new_empty(wide_q.shape[:2])
            for one in plan.long:
                own = slice(one.start, one.end)
                mixed, total = _flash(wide_q, wide_k, wide_v, own, own, True, scale)
                for start, end in one.above:
                    part, other = _flash(wide_q, wide_k, wide_v, own, slice(start, end), False, scale)
                    both = torch.logaddexp(total, other)
                    mixed = mixed * (total - both).exp_().unsqueeze(-1)
                    mixed.addcmul_(part, (other - both).exp_().unsqueeze(-1))
                    total = both
                _heads(out)[:, own], lse[:, own] = mixed, total
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        plan, scale = ctx.plan, ctx.scale
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros_like(wide(x)) for x in (k, v))
        into_k, into_v = _heads(grad_k), _heads(grad_v)
        if plan.short:
            work = _Short(plan, q, k, v, scale)
            found, grads = torch.empty_like(work.q), work.gathered(grad)
            for branch in work:
                weights, asked = branch.weights(), branch.of(grads)
                branch.add(into_v, torch.bmm(weights.transpose(1, 2), asked))
                slope = torch.bmm(asked, branch.values.transpose(1, 2), out=branch.scores)
                slope = torch.ops.aten._softmax_backward_data(slope, weights, -1, weights.dtype)
                torch.bmm(slope, branch.keys, out=branch.of(found))
                branch.add(into_k, torch.bmm(slope.transpose(1, 2), branch.queries))
            _rows(grad_q)[plan.asked] = found.mul_(scale).to(q.dtype)
        if plan.long:
            every = [_heads(wide(x)) for x in (q, k, v, out, grad.contiguous())]
            for one in plan.long:
                own = slice(one.start, one.end)
                mine = torch.zeros_like(every[0][:, own])
                for start, end in one.spans:
                    there = slice(start, end)
                    parts = flash_backward(
                        every[4][None, :, own],
                        every[0][None, :, own],
                        every[1][None, :, there],
                        every[2][None, :, there],
                        every[3][None, :, own],
                        lse[None, :, own],
                        0.0,
                        start == one.start,
                        scale=scale,
                    )
                    mine += parts[0][0]
                    into_k[:, there] += parts[1][0]
                    into_v[:, there] += parts[2][0]
                _heads(grad_q)[:, own] = mine
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


class _Short:
    """The short branches of a pass, one at a time, in memory that is used again and stays in cache."""

    def __init__(self, plan: _Plan, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        self.plan = plan
        self.key_heads, self.group = k.shape[1], q.shape[1] // k.shape[1]
        self.q = self.gathered(q).mul(scale)
        self.k, self.v = (wide(_rows(x).index_select(0, plan.seen)) for x in (k, v))
        self.mask = plan.mask.to(self.q)
        self.room = self.q.new_empty(2, plan.largest)

    def gathered(self, x: Tensor) -> Tensor:
        """``(tokens, heads, size)`` in the order of the queries, ``(all their rows, size)``."""
        return wide(_rows(x).index_select(0, self.plan.asked))

    def __iter__(self) -> Iterator[_ShortBranch]:
        asked = seen = 0
        for branch in self.plan.short:
            rows, keys = (branch.end - branch.start) * self.group, branch.keys
            yield _ShortBranch(self, branch, asked, rows, seen)
            asked += rows * self.key_heads
            seen += keys * self.key_heads


class _ShortBranch:
    """One of them: queries ``(key heads, tokens x group, size)``, keys ``(key heads, keys, size)``."""

    def __init__(self, work: _Short, branch: Branch, asked: int, rows: int, seen: int) -> None:
        self.branch, self.key_heads, self.rows, self.asked = branch, work.key_heads, rows, asked
        self.queries = self.of(work.q)
        to = seen + branch.keys * work.key_heads
        self.keys, self.values = (x[seen:to].view(work.key_heads, branch.keys, -1) for x in (work.k, work.v))
        shape = (work.key_heads, rows, branch.keys)
        self.scores, self.softmax = (room[: shape[0] * shape[1] * shape[2]].view(shape) for room in work.room)
        self.mask = work.mask[:rows, : branch.end - branch.start]

    def of(self, x: Tensor) -> Tensor:
        """This branch's part of something laid out like the queries."""
        return x[self.asked : self.asked + self.rows * self.key_heads].view(self.key_heads, self.rows, -1)

    def weights(self) -> Tensor:
        """Softmax weights ``(key heads, tokens x group, keys)``."""
        torch.bmm(self.queries, self.keys.transpose(1, 2), out=self.scores)
        self.scores[:, :, self.branch.keys - self.mask.shape[1] :] += self.mask
        return torch.softmax(self.scores, dim=-1, out=self.softmax)

    def add(self, into: Tensor, part: Tensor) -> None:
        """Add a gradient of the keys to where they came from, ``(key heads, all tokens, size)``."""
        place = 0
        for start, end in self.branch.spans:
            into[:, start:end] += part[:, place : place + end - start]
            place += end - start


def _rows(x: Tensor) -> Tensor:
    """``(tokens, heads, size)`` as ``(tokens x heads, size)``."""
    return x.reshape(-1, x.shape[-1])


def _heads(x: Tensor) -> Tensor:
    """``(tokens, heads, size)`` as ``(heads, tokens, size)``."""
    return x.transpose(0, 1)


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
