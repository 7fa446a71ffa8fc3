"""The model under the rollout: read prompts into numbered slots, then one token for each slot.

:class:`DecodeModel` is all that the scheduler (:mod:`corrigible.models.rollout`) knows of a model.
:class:`TransformersDecode` is the one over transformers' own modules, for whatever transformers
loads. It has three ways to do it and takes the first that gives the model's own numbers:

* a table of slots, each with its keys and values: sequences come and go singly;
* cohorts, padded on the left, with the cache that transformers chooses (sliding windows);
* no cache: the whole text is read again for every token. Slow, and right for anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from corrigible.errors import BadInputError
from corrigible.events import Message, emit
from corrigible.models.cache import SlotCache, new_cache
from corrigible.models.policy import LanguagePolicy

PREFILL_TOKENS = 8192
"""Tokens read in one forward pass, padding included, at most (a single longer prompt apart)."""


class DecodeModel(Protocol):
    """A language model that keeps several sequences going, each in a slot (0, 1, 2, ...).

    Calls come inside ``torch.inference_mode()``, with the policy in evaluation mode. Optional on top:
    ``fork`` (:class:`ForkingModel`), ``refresh`` (:class:`CopyingModel`) and an attribute
    ``admit_together``, the least number of free slots worth reading new prompts for (default 1).
    """

    def prefill(self, prompts: list[Sequence[int]], slots: list[list[int]]) -> Tensor:
        """Read each prompt once; its cache goes to each of its slots, which are empty.

        Returns:
            The logits after each prompt, ``(prompts, vocabulary)``, any float type.
        """
        ...

    def decode(self, slots: list[int], tokens: list[int]) -> Tensor:
        """Add one token to each of ``slots`` (all the live ones); logits after it, ``(n, vocabulary)``."""
        ...

    def free(self, slot: int) -> None:
        """The sequence in ``slot`` has ended; the slot is empty."""
        ...


@runtime_checkable
class ForkingModel(Protocol):
    """A decode model that can start a slot from the beginning of another one."""

    def fork(self, source: int, target: int, length: int) -> None:
        """The first ``length`` tokens of ``source`` go to ``target``, which is empty, or the same slot.

        ``length`` is that of the prompt that ``source`` was filled with.
        """
        ...


@runtime_checkable
class CopyingModel(Protocol):
    """A decode model that holds weights of its own (fused, merged, quantised)."""

    def refresh(self) -> None:
        """Take the policy's weights as they are now. What is in the slots is thrown away afterwards."""
        ...


class SlotTable:
    """A cache with a row for each slot: for models whose every layer attends to everything before."""

    admit_together = 1

    def __init__(self, policy: LanguagePolicy, slots: int) -> None:
        self._policy = policy
        self._cache = SlotCache(policy.network.config)
        self._row: dict[int, int] = {}  # slot to row; the rows in use are always the first ones
        self._slots: list[int] = []  # row to slot

    def prefill(self, prompts: list[Sequence[int]], slots: list[list[int]]) -> Tensor:
        """See :class:`DecodeModel`."""
        return _in_batches(prompts, slots, self._prefill)

    def _prefill(self, prompts: list[Sequence[int]], slots: list[list[int]]) -> Tensor:
        ids, mask, positions = _padded(prompts, self._policy.device)
        cache = new_cache(self._policy.network.config)
        logits = _forward(self._policy, ids, mask, positions, cache)
        for i, (prompt, targets) in enumerate(zip(prompts, slots, strict=True)):
            rows = [self._row_of(slot) for slot in targets]
            self._cache.fill(cache, i, len(prompt), rows)
        return logits

    def decode(self, slots: list[int], tokens: list[int]) -> Tensor:
        """See :class:`DecodeModel`; here any of the live slots will do."""
        device = self._policy.device
        rows = [self._row[slot] for slot in slots]
        lengths = self._cache.lengths[: len(self._slots)]
        fed = [0] * len(self._slots)
        for row, token in zip(rows, tokens, strict=True):
            fed[row] = token
        # A row that is not to go on writes behind its own end, where its next token overwrites it.
        ends = torch.tensor(lengths, device=device)
        mask = None
        if min(lengths) < max(lengths):
            mask = (torch.arange(max(lengths) + 1, device=device)[None] <= ends[:, None]).long()
        self._cache.begin(ends)
        ids = torch.tensor(fed, device=device)[:, None]
        logits = _forward(self._policy, ids, mask, ends[:, None], self._cache.cache)
        for row in rows:
            self._cache.lengths[row] += 1
        if rows == list(range(len(self._slots))):
            return logits
        return logits.index_select(0, torch.tensor(rows, device=device))

    def fork(self, source: int, target: int, length: int) -> None:
        """See :class:`ForkingModel`."""
        row = self._row[source]
        self._cache.copy(row, self._row_of(target), length)

    def free(self, slot: int) -> None:
        """See :class:`DecodeModel`; the last row moves into the gap."""
        row = self._row.pop(slot, None)
        if row is None:
            return
        last = len(self._slots) - 1
        moved = self._slots.pop()
        if row != last:
            self._cache.copy(last, row, self._cache.lengths[last])
            self._slots[row], self._row[moved] = moved, row

    def _row_of(self, slot: int) -> int:
        if slot not in self._row:
            self._row[slot] = len(self._slots)
            self._slots.append(slot)
        return self._row[slot]


class _Cohort:
    """Sequences that were read together; all have the same width, padding included."""

    def __init__(self, cache: Any, slots: list[int], mask: Tensor, positions: Tensor) -> None:
        self.cache, self.mask, self.positions = cache, mask, positions
        self.slots: list[int | None] = list(slots)  # None where one has ended and rides along


class Cohorts:
    """A cache for each group read together: for whatever cache transformers itself chooses."""

    def __init__(self, policy: LanguagePolicy, slots: int) -> None:
        self._policy = policy
        self._cohorts: list[_Cohort] = []
        self.admit_together = max(1, slots // 2)  # every cohort is a forward pass a step

    def prefill(self, prompts: list[Sequence[int]], slots: list[list[int]]) -> Tensor:
        """See :class:`DecodeModel`."""
        for slot in (slot for targets in slots for slot in targets):
            self.free(slot)
        return _in_batches(prompts, slots, self._prefill)

    def _prefill(self, prompts: list[Sequence[int]], slots: list[list[int]]) -> Tensor:
        device = self._policy.device
        ids, mask, positions = _padded(prompts, device)
        cache = new_cache(self._policy.network.config)
        logits = _forward(self._policy, ids, mask, positions, cache)
        spread = torch.tensor([i for i, t in enumerate(slots) for _ in t], device=device)
        cache.batch_select_indices(spread)
        if mask is None:
            mask = torch.ones_like(ids)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        flat = [slot for targets in slots for slot in targets]
        self._cohorts.append(_Cohort(cache, flat, mask[spread], lengths[spread]))
        return logits

    def decode(self, slots: list[int], tokens: list[int]) -> Tensor:
        """See :class:`DecodeModel`."""
        device = self._policy.device
        fed = dict(zip(slots, tokens, strict=True))
        found: dict[int, Tensor] = {}
        for cohort in self._cohorts:
            live = [slot for slot in cohort.slots if slot is not None]
            if any(slot not in fed for slot in live):
                raise BadInputError("Sequences that were read together can only go on together.")
            ids = torch.tensor([fed[s] if s is not None else 0 for s in cohort.slots], device=device)
            cohort.mask = torch.cat([cohort.mask, cohort.mask.new_ones((len(ids), 1))], dim=-1)
            padded = bool((cohort.mask[:, 0] == 0).any())
            logits = _forward(
                self._policy,
                ids[:, None],
                cohort.mask if padded else None,
                cohort.positions[:, None],
                cohort.cache,
            )
            cohort.positions = cohort.positions + 1
            found.update({slot: logits[i] for i, slot in enumerate(cohort.slots) if slot is not None})
        return torch.stack([found[slot] for slot in slots])

    def free(self, slot: int) -> None:
        """See :class:`DecodeModel`."""
        for cohort in self._cohorts:
            if slot in cohort.slots:
                cohort.slots[cohort.slots.index(slot)] = None
                keep = [i for i, s in enumerate(cohort.slots) if s is not None]
                if not keep:
                    self._cohorts.remove(cohort)
                elif len(keep) <= len(cohort.slots) * 7 // 8:  # leaving costs a copy of the cache
                    rows = torch.tensor(keep, device=self._policy.device)
                    cohort.cache.batch_select_indices(rows)
                    cohort.mask, cohort.positions = cohort.mask[rows], cohort.positions[rows]
                    cohort.slots = [cohort.slots[i] for i in keep]
                return


class Recompute:
    """No cache at all: sequences of one length are read again together for every token."""

    admit_together = 1

    def __init__(self, policy: LanguagePolicy, slots: int) -> None:
        self._policy = policy
        self._ids: dict[int, list[int]] = {}

    def prefill(self, prompts: list[Sequence[int]], slots: list[list[int]]) -> Tensor:
        """See :class:`DecodeModel`."""
        for prompt, targets in zip(prompts, slots, strict=True):
            for slot in targets:
                self._ids[slot] = list(prompt)
        return self._read(prompts)

    def decode(self, slots: list[int], tokens: list[int]) -> Tensor:
        """See :class:`DecodeModel`."""
        for slot, token in zip(slots, tokens, strict=True):
            self._ids[slot].append(token)
        return self._read([self._ids[slot] for slot in slots])

    def fork(self, source: int, target: int, length: int) -> None:
        """See :class:`ForkingModel`."""
        self._ids[target] = self._ids[source][:length]

    def free(self, slot: int) -> None:
        """See :class:`DecodeModel`."""
        self._ids.pop(slot, None)

    def _read(self, texts: Sequence[Sequence[int]]) -> Tensor:
        found: dict[int, Tensor] = {}
        for length in dict.fromkeys(len(ids) for ids in texts):
            same = [i for i, ids in enumerate(texts) if len(ids) == length]
            ids = torch.tensor([list(texts[i]) for i in same], device=self._policy.device)
            logits = self._policy.network(input_ids=ids, use_cache=False).logits[:, -1]
            found.update(zip(same, logits, strict=True))
        return torch.stack([found[i] for i in range(len(texts))])


_Way = SlotTable | Cohorts | Recompute
_CHOSEN: WeakKeyDictionary[Any, type[_Way]] = WeakKeyDictionary()


class TransformersDecode:
    """A :class:`DecodeModel` over transformers' modules, for any causal language model.

    Args:
        policy: the model; its weights are read where they are, never copied.
        slots: the most sequences at a time.
        way: how to keep what was read; by default the first of the three that is right for the model.
    """

    def __init__(self, policy: LanguagePolicy, slots: int, way: type[_Way] | None = None) -> None:
        self._way = (way or choose_way(policy))(policy, slots)
        self.admit_together: int = self._way.admit_together
        self.prefill: Callable[[list[Sequence[int]], list[list[int]]], Tensor] = self._way.prefill
        self.decode: Callable[[list[int], list[int]], Tensor] = self._way.decode
        self.free: Callable[[int], None] = self._way.free
        if isinstance(self._way, ForkingModel):
            self.fork: Callable[[int, int, int], None] = self._way.fork

    def __repr__(self) -> str:
        return f"TransformersDecode({type(self._way).__name__})"


def choose_way(policy: LanguagePolicy) -> type[_Way]:
    """The first way that gives the numbers of the plain model; says so when it is not the fastest."""
    network = policy.network
    if network not in _CHOSEN:
        ways: list[type[_Way]] = [SlotTable, Cohorts] if attends_to_all(network.config) else [Cohorts]
        why = "" if len(ways) == 2 else "it does not attend to everything before"
        for way in ways:
            wrong = _wrong(policy, way)
            if not wrong:
                _CHOSEN[network] = way
                break
            why = why or wrong
        else:
            _CHOSEN[network] = Recompute
        if why:
            emit(Message(text=f"{policy.name} is sampled by {_CHOSEN[network].__name__.lower()}: {why}."))
    return _CHOSEN[network]


def attends_to_all(config: Any) -> bool:
    """Whether every layer is plain full attention, by the model's config."""
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and not getattr(text, "sliding_window", None)


def _wrong(policy: LanguagePolicy, way: type[_Way]) -> str:
    """What is wrong with ``way`` for this model, tried on two short texts; empty when nothing is."""
    size = int(policy.network.config.get_text_config(decoder=True).vocab_size)
    texts: list[Sequence[int]] = [
        [(7 * i + 1) % size for i in range(9)],
        [(5 * i + 2) % size for i in range(6)],
    ]
    added = [[(3 * i + 4) % size, (11 * i + 3) % size] for i in range(3)]
    tolerance = 1e-3 if policy.dtype == torch.float32 else 0.25
    training = policy.model.training
    try:
        with torch.inference_mode():
            policy.model.eval()
            model = way(policy, 3)
            found = [*model.prefill(texts, [[0, 2], [1]])]
            for token in range(2):
                found.extend(model.decode([0, 1, 2], [tokens[token] for tokens in added]))
            plain = Recompute(policy, 3)
            expected = [*plain.prefill(texts, [[0, 2], [1]])]
            for token in range(2):
                expected.extend(plain.decode([0, 1, 2], [tokens[token] for tokens in added]))
        right = all(
            torch.allclose(a.float().log_softmax(-1), b.float().log_softmax(-1), atol=tolerance)
            for a, b in zip(found, expected, strict=True)
            if bool(b.isfinite().all())
        )
        return "" if right else f"{way.__name__.lower()} give other numbers than the plain model"
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        return f"{way.__name__.lower()} fail ({type(error).__name__}: {error})"
    finally:
        policy.model.train(training)


def _in_batches(
    prompts: list[Sequence[int]],
    slots: list[list[int]],
    read: Callable[[list[Sequence[int]], list[list[int]]], Tensor],
) -> Tensor:
    """``read`` for prompts of similar length together; the logits in the order of the prompts."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches: list[list[int]] = []
    for i in order:
        widest = len(prompts[batches[-1][0]]) if batches else 0
        fits = bool(batches) and widest * (len(batches[-1]) + 1) <= PREFILL_TOKENS
        if fits and 4 * len(prompts[i]) >= 3 * widest:
            batches[-1].append(i)
        else:
            batches.append([i])
    found = [read([prompts[i] for i in batch], [slots[i] for i in batch]) for batch in batches]
    if order == list(range(len(prompts))):
        return found[0] if len(found) == 1 else torch.cat(found)
    back = torch.tensor(order, device=found[0].device).argsort()
    return torch.cat(found).index_select(0, back)


def _padded(prompts: list[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None, Tensor]:
    """Ids padded on the left, mask (None where nothing is padded), positions: ``(prompts, width)`` each."""
    width = max(len(p) for p in prompts)
    ids = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[i, width - len(prompt) :] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = min(len(p) for p in prompts) < width
    return ids.to(device), mask.to(device) if padded else None, positions.to(device)


def _forward(
    policy: LanguagePolicy, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any
) -> Tensor:
    """Logits ``(n, vocabulary)`` after the last of ``ids`` ``(n, tokens)``."""
    logits: Tensor = policy.network(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits
    return logits[:, -1]
