"""One token for many sequences at a time: the network of :mod:`corrigible.models.network` for sampling.

What makes it quick on a CPU: the projections that read the same input are one matrix (adapters
included), laid out once the way the matrix library wants it; the keys and values of a prompt are held
once for all its answers; and what changes from token to token is written in place. Lengths are rounded
up so that the library meets few different shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from corrigible.models.kernels import rms_norm, rotate
from corrigible.models.network import Network
from corrigible.models.packing import pack
from corrigible.models.renderer import Rendered

if TYPE_CHECKING:
    from corrigible.models.policy import LanguagePolicy

ROUND = 32
"""Lengths of caches are multiples of this."""

SHARE_FROM = 4096
"""Prompts are held apart, once for all their answers, if that saves every step the reading of as many
tokens' keys and values; fewer are read sooner from a copy in each answer's row."""


class FusedLinear:
    """Several linear layers of one input as one product, with their adapters.

    The rows of the matrix are the layers' own, then the adapters' first factors; the second factors
    are a block-diagonal matrix, applied to what the first give.
    """

    def __init__(self, modules: Sequence[Any], dtype: torch.dtype) -> None:
        weights, biases, downs, ups = [], [], [], []
        self.width = 0
        for module in modules:
            base = getattr(module, "base_layer", module)
            weight = base.weight.detach()
            if getattr(module, "merged", False) and module.disable_adapters:
                module.unmerge()
                weight = base.weight.detach()
            weights.append(weight)
            bias = base.bias
            biases.append(torch.zeros(len(weight), dtype=dtype) if bias is None else bias.detach())
            if not isinstance(module, nn.Linear) and not (module.disable_adapters or module.merged):
                for name in module.active_adapters:
                    if name in module.lora_A:
                        downs.append(module.lora_A[name].weight.detach().to(dtype))
                        up = module.lora_B[name].weight.detach() * module.scaling[name]
                        ups.append((self.width, up.to(dtype)))
            self.width += len(weight)
        bias = torch.cat([value.to(dtype) for value in biases])
        rank = sum(map(len, downs))
        self.up: Tensor | None = None
        if rank:
            self.up = weights[0].new_zeros(rank, self.width)
            row = 0
            for start, up in ups:
                self.up[row : row + up.shape[1], start : start + len(up)] = up.T
                row += up.shape[1]
            bias = torch.cat([bias, bias.new_zeros(rank)])
        self.bias = bias if bool(bias.any()) else None
        weight = torch.cat([*weights, *downs]) if len(weights) + len(downs) > 1 else weights[0]
        self.inputs = weight.shape[1]
        self.packed = weight.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROUND) if self.packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """``(n, in)`` to ``(n, all outs)``."""
        if self.packed:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        else:
            out = nn.functional.linear(x, self.weight, self.bias)
        if self.up is None:
            return out
        return torch.addmm(out[:, : self.width], out[:, self.width :], self.up)


@dataclass(slots=True)
class _Layer:
    """A layer's weights, fused, and its norms."""

    qkv: FusedLinear
    out: FusedLinear
    gate_up: FusedLinear
    down: FusedLinear
    before: Tensor
    after: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None


@dataclass(slots=True)
class _Slot:
    """A running sequence: its row in the caches, and the tokens it has there.

    A prompt that many sequences continue may be held apart (``prompt`` is its number, ``before`` its
    tokens); else it stands at the beginning of the row.
    """

    row: int
    length: int = 0
    prompt: int | None = None
    before: int = 0


@dataclass(slots=True)
class _Prompt:
    """A prompt's keys and values, ``(layers, 2, key heads, tokens, size)``, and who still needs them."""

    cache: Tensor
    slots: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return int(self.cache.shape[3])


class NetworkDecode:
    """Prefill and decode steps of a policy, with its weights as they were at the last :meth:`refresh`.

    Args:
        policy: the model; :func:`Network.of` must accept it.
        network: its network.
        slots: the most sequences at a time; with many of them prompts are better read a few together.
    """

    def __init__(self, policy: LanguagePolicy, network: Network, slots: int = 1) -> None:
        self.policy, self.network = policy, network
        # Every reading passes over all weights (96 real prompts: 15.5 s in 52 readings, 10.6 s in 15), but
        # of a few slots an empty one is a large share.
        self.admit_together = max(1, min(4, slots // 8))
        self.slots: dict[int, _Slot] = {}
        self.order: list[int] = []
        self.prompts: dict[int, _Prompt] = {}
        self.next_prompt = 0
        self.capacity = 0
        self.own: Tensor | None = None
        self.shared: _Shared | None = None
        self.refresh()

    # -- weights ------------------------------------------------------------------------------

    @torch.inference_mode()
    def refresh(self) -> None:
        """Take the policy's weights as they are now. Running sequences keep their caches."""
        network, dtype = self.policy.network, self.policy.dtype
        self.layers = []
        for layer in self.network.layers:
            attention, mlp = layer.self_attn, layer.mlp
            normed = hasattr(attention, "q_norm")
            self.layers.append(
                _Layer(
                    qkv=FusedLinear([attention.q_proj, attention.k_proj, attention.v_proj], dtype),
                    out=FusedLinear([attention.o_proj], dtype),
                    gate_up=FusedLinear([mlp.gate_proj, mlp.up_proj], dtype),
                    down=FusedLinear([mlp.down_proj], dtype),
                    before=self.network.norm_weight(layer.input_layernorm).detach().clone(),
                    after=self.network.norm_weight(layer.post_attention_layernorm).detach().clone(),
                    q_norm=attention.q_norm.weight.detach().clone() if normed else None,
                    k_norm=attention.k_norm.weight.detach().clone() if normed else None,
                )
            )
        self.norm = self.network.norm_weight(network.model.norm).detach().clone()
        self.head = FusedLinear([network.get_output_embeddings()], dtype)
        self.shared = None

    # -- sequences ----------------------------------------------------------------------------

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts, each for the slots that will continue it.

        Returns:
            Logits ``(n prompts, vocabulary)`` after each prompt.
        """
        rows = [Rendered.from_tokens(prompt, ()) for prompt in prompts]
        packed = pack(rows, whole=True)
        kept: list[tuple[Tensor, Tensor]] = []
        states = self.network.hidden(packed, keep=kept)
        again = sum(len(prompt) * (len(members) - 1) for prompt, members in zip(prompts, slots, strict=True))
        single: list[tuple[int, Tensor]] = []
        for places, members in zip(packed.places, slots, strict=True):
            if len(members) == 1 or again < SHARE_FROM:
                for slot in members:
                    self._seat(slot, None, len(places))
                    single.append((slot, places))
                continue
            cache = torch.stack([torch.stack([x[places].transpose(0, 1) for x in pair]) for pair in kept])
            number = self._hold(cache)
            for slot in members:
                self._seat(slot, number, 0)
        self._fit()
        assert self.own is not None
        for slot, places in single:
            row = self.slots[slot].row
            for own, pair in zip(self.own, kept, strict=True):
                for cache, x in zip(own, pair, strict=True):
                    cache[row, :, : len(places)] = x[places].transpose(0, 1)
        return self.head(states.index_select(0, packed.last))

    def _hold(self, cache: Tensor) -> int:
        number, self.next_prompt = self.next_prompt, self.next_prompt + 1
        self.prompts[number] = _Prompt(cache)
        return number

    def _seat(self, slot: int, prompt: int | None, length: int) -> None:
        """Give a sequence the next row; ``length`` tokens will stand there."""
        before = 0
        if prompt is not None:
            self.prompts[prompt].slots.add(slot)
            before = len(self.prompts[prompt])
        self.slots[slot] = _Slot(len(self.order), length, prompt, before)
        self.order.append(slot)
        self.shared = None

    @torch.inference_mode()
    def fork(self, source: int, target: int, length: int) -> None:
        """Start ``target`` from the prompt of ``source`` (``length`` tokens); the same slot begins anew."""
        begun = self.slots[source]
        assert begun.before in (0, length), "only a whole prompt is shared"
        if target == source:
            begun.length = 0 if begun.prompt is not None else length
            return
        self._seat(target, begun.prompt, 0 if begun.prompt is not None else length)
        self._fit()
        if begun.prompt is None:
            assert self.own is not None
            self.own[:, :, self.slots[target].row, :, :length] = self.own[:, :, begun.row, :, :length]

    @torch.inference_mode()
    def free(self, slot: int) -> None:
        """Forget a sequence; the last row of the caches takes its place."""
        gone = self.slots.pop(slot)
        if gone.prompt is not None:
            prompt = self.prompts[gone.prompt]
            prompt.slots.discard(slot)
            if not prompt.slots:
                del self.prompts[gone.prompt]
        last = self.order.pop()
        if last != slot:
            moved = self.slots[last]
            assert self.own is not None
            if moved.length:
                used = slice(0, moved.length)
                self.own[:, :, gone.row, :, used] = self.own[:, :, moved.row, :, used]
            moved.row = gone.row
            self.order[gone.row] = last
        self.shared = None

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Append one token to each of these slots, which must be all that are there.

        Returns:
            Logits ``(n, vocabulary)``, in the order of ``slots``.
        """
        rows = [self.slots[slot] for slot in slots]
        assert len(rows) == len(self.order), "every running sequence takes part in a step"
        place = torch.tensor([row.row for row in rows])
        ids = torch.empty(len(rows), dtype=torch.long)
        ids[place] = torch.as_tensor(tokens)
        self._fit()
        if self.shared is None:
            self.shared = _Shared(self)
        logits = self._step(ids)
        for row in rows:
            row.length += 1
        return logits if place.tolist() == list(range(len(rows))) else logits[place]

    # -- the step -----------------------------------------------------------------------------

    def _step(self, ids: Tensor) -> Tensor:
        shared, network, own = self.shared, self.network, self.own
        assert shared is not None and own is not None
        count, heads, keys, size = len(ids), network.heads, network.key_heads, network.size
        device, dtype = self.policy.device, self.policy.dtype
        lengths = torch.tensor([self.slots[slot].length for slot in self.order])
        x = network.embed(ids.to(device))
        cos, sin = network.angles((shared.before + lengths).to(device), x)
        mask = shared.mask_of(lengths, self.capacity, keys).to(device)
        # Where the new keys and values go, of all (row, key head, place) in one line.
        lines = torch.arange(count * keys).view(count, keys)
        places = (lines * self.capacity + lengths[:, None]).flatten().to(device)
        norm = _Norm(count, network.eps, x)
        for number, layer in enumerate(self.layers):
            qkv = layer.qkv(norm(x, layer.before, dtype)).view(count, heads + 2 * keys, size)
            q, k = qkv[:, :heads], qkv[:, heads : heads + keys]
            if layer.q_norm is None or layer.k_norm is None:
                q, k = rotate(qkv[:, : heads + keys], cos, sin).split([heads, keys], dim=1)  # type: ignore[no-untyped-call]
            else:
                q = rotate(rms_norm(q, layer.q_norm, network.eps), cos, sin)
                k = rotate(rms_norm(k, layer.k_norm, network.eps), cos, sin)
            cached = own[number].flatten(1, 2)
            for cache, new in zip(cached, (k, qkv[:, heads + keys :]), strict=True):
                cache.view(-1, size)[places] = new.reshape(-1, size)
            q = q.reshape(count * keys, heads // keys, size)
            old_keys, old_values = cached[:, : count * keys]
            attended = shared.attend(number, q, old_keys, old_values, mask)
            x.add_(layer.out(attended.view(count, -1)))
            gate, up = layer.gate_up(norm(x, layer.after, dtype)).chunk(2, dim=-1)
            x.add_(layer.down(network.gated(gate, up)))
        return self.head(norm(x, self.norm, dtype))

    def _fit(self) -> None:
        """Lay the caches out for every running sequence and one more token in each, and little more.

        The library would copy the keys of a stretch of a longer table before it multiplies by them.
        """
        network = self.network
        longest = max((slot.length for slot in self.slots.values()), default=0)
        rows, wanted = len(self.order), _rounded(longest + 1)
        old = self.own
        if old is not None and old.shape[2] >= rows and wanted <= self.capacity < wanted + 2 * ROUND:
            return
        most = max(rows, 0 if old is None else old.shape[2])
        self.own = torch.zeros(
            len(self.layers),
            2,
            most,
            network.key_heads,
            wanted,
            network.size,
            dtype=self.policy.dtype,
            device=self.policy.device,
        )
        if old is not None:
            kept = min(self.capacity, wanted)
            self.own[:, :, : old.shape[2], :, :kept] = old[..., :kept, :]
        self.capacity = wanted


class _Shared:
    """The prompts that several running sequences continue, side by side, as long as nobody comes or goes.

    Sequences of one prompt form a line of a grid ``(prompts, most answers)``, so that a prompt's keys
    are read once for all its answers. Sequences with a prompt of their own have nothing here.
    """

    def __init__(self, decode: NetworkDecode) -> None:
        network, dtype, device = decode.network, decode.policy.dtype, decode.policy.device
        slots = [decode.slots[slot] for slot in decode.order]
        members: dict[int, list[int]] = {}
        for row, slot in enumerate(slots):
            if slot.prompt is not None:
                members.setdefault(slot.prompt, []).append(row)
        self.before = torch.tensor([slot.before for slot in slots])
        self.scale, self.heads = network.scale, network.key_heads
        self.lines, self.most = len(members), max(map(len, members.values()), default=0)
        self.width = _rounded(int(self.before.max())) if members else 0
        self.hidden = torch.arange(self.width)[None] >= self.before[:, None]
        if not members:
            return
        shape = (len(decode.layers), 2, self.lines, network.key_heads, self.width, network.size)
        grouped = torch.zeros(shape, dtype=dtype, device=device)
        # Where each row stands in the grid, and which row stands at each place of it (0 where none does).
        grid = torch.zeros(self.lines, self.most, dtype=torch.long)
        where = torch.zeros(len(slots), dtype=torch.long)
        for index, (number, rows) in enumerate(members.items()):
            prompt = decode.prompts[number]
            grouped[:, :, index, :, : len(prompt)] = prompt.cache
            for column, row in enumerate(rows):
                grid[index, column] = row
                where[row] = index * self.most + column
        self.cache = grouped.flatten(2, 3)
        self.grid, self.where = grid.view(-1).to(device), where.to(device)
        alone = self.before == 0
        alone = alone.repeat_interleave(self.heads).to(device)[:, None, None]
        self.none = alone if bool(alone.any()) else None

    def mask_of(self, lengths: Tensor, span: int, key_heads: int) -> Tensor:
        """``(rows x key heads, 1, width + span)`` float32: what is added to a row's scores."""
        hidden = torch.cat([self.hidden, torch.arange(span)[None] > lengths[:, None]], dim=1)
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        return mask.repeat_interleave(key_heads, dim=0)[:, None]

    def attend(self, layer: int, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attention of one new token a row over its shared prompt, if it has one, and its own tokens.

        Args:
            q: ``(rows x key heads, groups, size)``.
            keys, values: ``(rows x key heads, span, size)``, the rows' own.
            mask: of :meth:`mask_of`.

        Returns:
            ``(rows x key heads, groups, size)``.
        """
        q = q * self.scale
        scores = torch.empty(*q.shape[:2], mask.shape[-1], dtype=torch.float32, device=q.device)
        torch.add(torch.bmm(q, keys.transpose(1, 2)), mask[..., self.width :], out=scores[..., self.width :])
        if self.lines:
            scores[..., : self.width] = self._prompt_scores(layer, q)
            scores[..., : self.width].add_(mask[..., : self.width])
        weights = torch.softmax(scores, dim=-1).to(q.dtype)
        out = torch.bmm(weights[..., self.width :], values)
        return out.add_(self._prompt_values(layer, weights[..., : self.width])) if self.lines else out

    def _prompt_scores(self, layer: int, q: Tensor) -> Tensor:
        return self._gathered(torch.bmm(self._spread(q), self.cache[layer, 0].transpose(1, 2)), q)

    def _prompt_values(self, layer: int, weights: Tensor) -> Tensor:
        out = self._gathered(torch.bmm(self._spread(weights), self.cache[layer, 1]), weights)
        return out if self.none is None else out.masked_fill_(self.none, 0.0)

    def _spread(self, x: Tensor) -> Tensor:
        """``(rows x heads, groups, k)`` by row to ``(lines x heads, most x groups, k)`` by prompt."""
        _, groups, width = x.shape
        grid = x.reshape(-1, self.heads, groups, width).index_select(0, self.grid)
        grid = grid.view(self.lines, self.most, self.heads, groups, width).transpose(1, 2)
        return grid.reshape(self.lines * self.heads, self.most * groups, width)

    def _gathered(self, grid: Tensor, like: Tensor) -> Tensor:
        """The way back: ``(lines x heads, most x groups, k)`` to ``(rows x heads, groups, k)``."""
        groups, width = like.shape[1], grid.shape[-1]
        rows = grid.reshape(self.lines, self.heads, self.most, groups, width).transpose(1, 2)
        rows = rows.reshape(self.lines * self.most, self.heads, groups, width).index_select(0, self.where)
        return rows.view(-1, groups, width)


def _rounded(length: int) -> int:
    return -(-length // ROUND) * ROUND


class _Norm:
    """Root-mean-square norms of ``(rows, width)`` float32, in few operations and memory that is kept."""

    def __init__(self, rows: int, eps: float, like: Tensor) -> None:
        self.eps = like.new_full((rows, 1), eps)
        self.width = like.shape[-1]

    def __call__(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        normed = x * torch.addcmul(self.eps, length, length, value=1.0 / self.width).rsqrt_()
        if weight.dtype != dtype:
            return normed.mul_(weight).to(dtype)
        return normed.to(dtype).mul_(weight)
