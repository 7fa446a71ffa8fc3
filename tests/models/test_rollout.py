"""The rollout engine: whatever the slots, the order, the kill or the update, every token is accounted for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from corrigible.errors import BadInputError, NumericsError
from corrigible.models import LanguagePolicy, generate, generate_reference, load_policy, token_logprobs
from corrigible.models import decode as decode_module
from corrigible.models.decode import NetworkDecode
from corrigible.models.network import Network
from corrigible.models.rollout import RolloutEngine
from corrigible.models.rollout_decode import (
    Cohorts,
    Recompute,
    SlotTable,
    TransformersDecode,
    choose_way,
)
from corrigible.models.rollout_records import (
    Delta,
    Finished,
    Generation,
    Partial,
    RolloutEvent,
    Segment,
    read_partials,
    write_partials,
)
from corrigible.records import FinishReason, Sampling


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


PROMPTS = [user(text) for text in ("Hi", "A rather longer prompt, to need padding.", "?", "Hi", "日本語")]
SAMPLING = Sampling(max_tokens=30)
UNEVEN = Sampling(max_tokens=50, stop=tuple("aeiou0123456789ABCDEFG"))  # answers of very different lengths


def flat(answers: list[list[Generation]]) -> list[Generation]:
    return [generation for group in answers for generation in group]


def ids(answers: list[list[Generation]]) -> list[tuple[int, ...]]:
    return [generation.ids for generation in flat(answers)]


class Counting:
    """A decode model that notes what it is asked to do, and checks that slots are used as promised."""

    def __init__(self, policy: LanguagePolicy, slots: int, way: Any = SlotTable) -> None:
        network = Network.of(policy) if way is NetworkDecode else None
        self.inner: Any = (
            NetworkDecode(policy, network, slots) if network else TransformersDecode(policy, slots, way)
        )
        self.admit_together = getattr(self.inner, "admit_together", 1)
        self.live: set[int] = set()
        self.beside: list[int] = []  # sequences going on at each reading
        self.reads: list[tuple[int, ...]] = []
        self.forks = 0
        self.widths: list[int] = []
        if way is not Cohorts:
            self.fork = self._fork
        if way is NetworkDecode:
            self.refresh = self.inner.refresh

    def prefill(self, prompts: list[Sequence[int]], slots: list[list[int]]) -> Tensor:
        new = [slot for targets in slots for slot in targets]
        assert len(new) == len(set(new)) and not self.live & {*new}, "only into empty slots"
        self.beside.append(len(self.live))
        self.live.update(new)
        self.reads.extend(tuple(prompt) for prompt in prompts)
        return self.inner.prefill(prompts, slots)

    def decode(self, slots: list[int], tokens: list[int]) -> Tensor:
        assert {*slots} == self.live and len(slots) == len(tokens), "all that are there, and no others"
        self.widths.append(len(slots))
        return self.inner.decode(slots, tokens)

    def _fork(self, source: int, target: int, length: int) -> None:
        assert source in self.live and (target == source or target not in self.live)
        self.live.add(target)
        self.forks += 1
        self.inner.fork(source, target, length)

    def free(self, slot: int) -> None:
        self.live.remove(slot)
        self.inner.free(slot)


@pytest.mark.parametrize("way", [SlotTable, Cohorts, Recompute, NetworkDecode])
def test_slots_and_way_change_nothing(shared_policy: LanguagePolicy, way: Any) -> None:
    expected = RolloutEngine(shared_policy, slots=1, decode=TransformersDecode(shared_policy, 1, Recompute))
    whole = expected.generate(PROMPTS, n=4, sampling=UNEVEN, seed=3)
    assert len({len(g.ids) for g in flat(whole)}) > 5
    for slots in (1, 3, 64):
        model = Counting(shared_policy, slots, way)
        engine = RolloutEngine(shared_policy, slots=slots, decode=model)
        assert ids(engine.generate(PROMPTS, n=4, sampling=UNEVEN, seed=3)) == ids(whole)
        assert max(model.widths) <= slots and not model.live, "and every slot is given back"


@pytest.mark.parametrize("share_from", [0, 4096])
def test_equals_the_reference_when_places_are_taken_over(
    shared_policy: LanguagePolicy, share_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With prompts that are held apart for all their answers, and with prompts that are copied."""
    monkeypatch.setattr(decode_module, "SHARE_FROM", share_from)
    for generation in flat(generate(shared_policy, PROMPTS, n=3, sampling=UNEVEN, seed=5, batch_size=4)):
        expected = generate_reference(shared_policy, generation.prompt_ids, UNEVEN, generation.seed)
        assert generation.ids == expected.ids
        assert (generation.text, generation.finish_reason) == (expected.text, expected.finish_reason)
        np.testing.assert_allclose(generation.logprobs, expected.logprobs, atol=1e-4)


@pytest.mark.parametrize("way", [SlotTable, NetworkDecode])
def test_a_finished_sequence_makes_room_at_once(shared_policy: LanguagePolicy, way: Any) -> None:
    model = Counting(shared_policy, 4, way)
    answers = RolloutEngine(shared_policy, slots=4, decode=model).generate(PROMPTS, n=6, sampling=UNEVEN)
    still_to_read = sum(len(g.ids) - 1 for g in flat(answers))
    assert sum(model.widths) == still_to_read, "no step for a sequence that has ended"
    assert model.widths == sorted(model.widths, reverse=True), "while others wait, no slot stands empty"
    assert model.widths.count(4) > 20
    # Waiting for whole batches would take the longest of each four.
    lengths = sorted((len(g.ids) for g in flat(answers)), reverse=True)
    assert len(model.widths) < sum(lengths[::4])


def test_answers_to_one_prompt_are_read_together_where_nothing_can_be_copied(
    shared_policy: LanguagePolicy,
) -> None:
    """A cohort is a forward pass a step, so one is not begun for every slot that falls free."""
    model = Counting(shared_policy, 8, Cohorts)
    assert model.admit_together == 4
    RolloutEngine(shared_policy, slots=8, decode=model).generate(PROMPTS[:1], n=24, sampling=UNEVEN)
    assert len(model.reads) <= 1 + 16 // 4


def test_with_many_slots_prompts_are_read_a_few_together(shared_policy: LanguagePolicy) -> None:
    prompts = [[{"role": "user", "content": f"Question {n}"}] for n in range(48)]
    model = Counting(shared_policy, 16, NetworkDecode)
    assert model.admit_together == 2
    engine = RolloutEngine(shared_policy, slots=16, decode=model)
    answers = engine.generate(prompts, n=1, sampling=UNEVEN)
    assert all(group[0].ids for group in answers) and len(model.reads) == 48
    assert len(model.beside) <= 1 + 32 // 2
    assert min(model.beside[1:]) > 8, "and not only when all others have ended"


@pytest.mark.parametrize("way", [SlotTable, NetworkDecode])
@pytest.mark.parametrize("slots", [1, 3, 16])
def test_a_prompt_is_read_once_for_all_its_answers(
    shared_policy: LanguagePolicy, slots: int, way: Any
) -> None:
    model = Counting(shared_policy, slots, way)
    engine = RolloutEngine(shared_policy, slots=slots, decode=model)
    engine.generate(PROMPTS, n=5, sampling=UNEVEN)
    assert len(model.reads) == len(set(model.reads)) == 4, "five prompts, two of them the same"
    # A model that cannot fork reads again, and gives the same.
    plain = Counting(shared_policy, slots, way)
    del plain.fork
    again = RolloutEngine(shared_policy, slots=slots, decode=plain)
    assert ids(again.generate(PROMPTS, n=5, sampling=UNEVEN)) == ids(
        engine.generate(PROMPTS, n=5, sampling=UNEVEN)
    )
    assert len(plain.reads) > 4 or slots == 16


OPTIONS = [
    Sampling(max_tokens=20, temperature=0.0),
    Sampling(max_tokens=20),
    Sampling(max_tokens=20, temperature=0.6),
    Sampling(max_tokens=20, temperature=1.6),
    Sampling(max_tokens=20, top_p=0.7),
    Sampling(max_tokens=20, top_k=5),
    Sampling(max_tokens=20, min_p=0.2),
    Sampling(max_tokens=20, temperature=0.8, top_k=40, top_p=0.9, min_p=0.05),
]


def cut(table: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Log-probabilities after temperature, top-k, top-p and min-p, in float64, token by token."""
    scaled = table / sampling.temperature
    kept = set(range(len(scaled)))
    order = sorted(kept, key=lambda i: -scaled[i])
    if sampling.top_k is not None:
        kept &= {i for i in kept if scaled[i] >= scaled[order[sampling.top_k - 1]]}
    if sampling.top_p < 1:
        mass = sum(np.exp(scaled[i]) for i in kept)
        reached, nucleus = 0.0, set()
        for i in order:
            if i in kept and reached < sampling.top_p * mass:
                nucleus.add(i)
                reached += np.exp(scaled[i])
        kept = nucleus
    if sampling.min_p > 0:
        kept = {i for i in kept if np.exp(scaled[i] - scaled[order[0]]) >= sampling.min_p}
    mass = sum(np.exp(scaled[i]) for i in kept)
    return np.array([scaled[i] - np.log(mass) if i in kept else -np.inf for i in range(len(scaled))])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampling", OPTIONS, ids=lambda s: f"t{s.temperature}p{s.top_p}k{s.top_k}m{s.min_p}")
def test_behaviour_logprobs_equal_recomputed_ones(dtype: str, sampling: Sampling) -> None:
    """Exact to 1e-4 nats in float32. In bfloat16 the model's own numbers depend on the shape of the batch
    (8 bits of mantissa, logits of a few units): 0.3 nats a token at worst, 0.06 on average."""
    policy = load_policy("tiny-random", dtype=dtype, device="cpu")
    answers = flat(generate(policy, PROMPTS[:3], n=2, sampling=sampling, seed=2, batch_size=4))
    plain_gaps, cut_gaps = [], []
    for answer, scored in zip(answers, token_logprobs(policy, [a.rendered() for a in answers]), strict=True):
        plain_gaps.extend(np.abs(np.array(answer.logprobs) - scored.numpy()))
        with torch.no_grad():
            text = torch.tensor([[*answer.prompt_ids, *answer.ids]])
            logits = policy.model(input_ids=text).logits[0, len(answer.prompt_ids) - 1 : -1]
        for position, table in enumerate(logits.double().numpy()):
            token, recorded = answer.ids[position], answer.sampling_logprobs[position]
            if sampling.temperature == 0:
                assert recorded == 0.0
            elif np.isfinite(expected := cut(table, sampling)[token]):
                cut_gaps.append(abs(recorded - expected))
            else:  # in bfloat16 another batch may round the last token kept to the other side
                assert dtype == "bfloat16"
    highest, mean = (1e-4, 2e-5) if dtype == "float32" else (0.3, 0.06)
    assert max(plain_gaps) < highest and np.mean(plain_gaps) < mean
    if sampling.temperature > 0:
        assert max(cut_gaps) < highest and np.mean(cut_gaps) < mean


@pytest.mark.parametrize(
    "sampling", OPTIONS[1:], ids=lambda s: f"t{s.temperature}p{s.top_p}k{s.top_k}m{s.min_p}"
)
def test_first_tokens_follow_the_exact_distribution(
    shared_policy: LanguagePolicy, sampling: Sampling
) -> None:
    """Chi-square of the whole path, prompt to token, against the distribution written down."""
    count = 1500
    one = sampling.model_copy(update={"max_tokens": 1})
    answers = flat(generate(shared_policy, [user("Hi")], n=count, sampling=one, seed=11, batch_size=128))
    with torch.no_grad():
        text = torch.tensor([answers[0].prompt_ids])
        table = shared_policy.model(input_ids=text).logits[0, -1].double().numpy()
    expected = np.exp(cut(table, sampling)) * count
    found = np.bincount([a.ids[0] for a in answers], minlength=len(expected)).astype(float)
    assert found[expected == 0].sum() == 0, "nothing that was cut"
    rare = expected < 5
    kept_found = np.append(found[~rare], found[rare].sum())
    kept_expected = np.append(expected[~rare], expected[rare].sum())
    kept_found, kept_expected = kept_found[kept_expected > 0], kept_expected[kept_expected > 0]
    from scipy.stats import chi2

    statistic = float(((kept_found - kept_expected) ** 2 / kept_expected).sum())
    assert statistic < chi2.ppf(0.999, max(len(kept_found) - 1, 1))


# -- streaming ------------------------------------------------------------------------------------


def told(events: list[RolloutEvent]) -> tuple[dict[tuple[int, int], list[Delta]], list[Finished]]:
    deltas: dict[tuple[int, int], list[Delta]] = {}
    finished = []
    for event in events:
        if isinstance(event, Delta):
            deltas.setdefault((event.prompt, event.sample), []).append(event)
        else:
            finished.append(event)
    return deltas, finished


@pytest.mark.parametrize("stop", [(), ("e", "ab"), ("\N{REPLACEMENT CHARACTER}x",)])
def test_deltas_together_are_the_answer(shared_policy: LanguagePolicy, stop: tuple[str, ...]) -> None:
    sampling = Sampling(max_tokens=60, stop=stop)
    engine = RolloutEngine(shared_policy, slots=4)
    deltas, finished = told(list(engine.stream(PROMPTS, n=3, sampling=sampling, seed=4)))
    assert len(finished) == 15
    for event in finished:
        parts, answer = deltas[event.prompt, event.sample], event.generation
        assert "".join(p.text for p in parts) == answer.text
        assert tuple(i for p in parts for i in p.ids) == answer.ids
        assert tuple(x for p in parts for x in p.logprobs) == answer.logprobs
        assert tuple(x for p in parts for x in p.sampling_logprobs) == answer.sampling_logprobs
        assert len(parts) == len(answer.ids), "token by token, not at the end"
    assert any(sum(bool(p.text) for p in parts) > 5 for parts in deltas.values())


def test_a_stream_can_be_left_and_the_engine_used_again(policy: LanguagePolicy) -> None:
    policy.model.train()
    model = Counting(policy, 4)
    engine = RolloutEngine(policy, slots=4, decode=model)
    stream = engine.stream(PROMPTS, n=2, sampling=SAMPLING)
    for _ in range(20):
        next(stream)
    assert not torch.is_inference_mode_enabled(), "the caller's code runs as it would without us"
    assert not policy.model.training
    with pytest.raises(BadInputError, match="already"):
        engine.stream(PROMPTS)
    stream.close()
    assert policy.model.training and not model.live
    assert ids(engine.generate(PROMPTS, n=2, sampling=SAMPLING)) == ids(
        generate(policy, PROMPTS, n=2, sampling=SAMPLING)
    )


# -- stopping and going on ------------------------------------------------------------------------


def part_way(policy: LanguagePolicy, events: int, **settings: Any) -> list[Partial]:
    engine = RolloutEngine(policy, slots=3)
    stream = engine.stream(PROMPTS, n=3, sampling=UNEVEN, seed=9, **settings)
    for _ in range(events):
        next(stream)
    stream.close()
    return engine.partials()


@pytest.mark.parametrize("events", [1, 50, 150])
def test_a_resumed_rollout_is_the_uninterrupted_one(
    shared_policy: LanguagePolicy, tmp_path: Path, events: int
) -> None:
    whole = generate(shared_policy, PROMPTS, n=3, sampling=UNEVEN, seed=9)
    partials = part_way(shared_policy, events)
    assert partials and any(p.finish_reason is None for p in partials)
    write_partials(tmp_path / "p.jsonl", partials)
    held = read_partials(tmp_path / "p.jsonl")
    assert held == partials
    model = Counting(shared_policy, 3)
    engine = RolloutEngine(shared_policy, slots=3, decode=model)
    resumed = engine.generate(PROMPTS, n=3, sampling=UNEVEN, seed=9, partials=held)
    assert ids(resumed) == ids(whole)
    assert [(g.text, g.finish_reason, g.segments) for g in flat(resumed)] == [
        (g.text, g.finish_reason, g.segments) for g in flat(whole)
    ]
    for before, after in zip(flat(whole), flat(resumed), strict=True):
        np.testing.assert_allclose(before.logprobs, after.logprobs, atol=1e-5)
    saved = sum(max(len(p.ids) - 1, 0) for p in partials)
    all_tokens = sum(len(g.ids) for g in flat(whole))
    assert sum(model.widths) <= all_tokens - saved, "what was sampled is not sampled again"


def test_kept_answers_survive_sigkill(shared_policy: LanguagePolicy, tmp_path: Path) -> None:
    keep = tmp_path / "kept.jsonl"
    code = f"""
import os, signal
from corrigible.models import load_policy, rollout, generate
from corrigible.records import Sampling
rollout.KEEP_EVERY = 8
steps = rollout.RolloutEngine._step
def step(self, run):
    if run.steps == 21:
        os.kill(os.getpid(), signal.SIGKILL)
    return steps(self, run)
rollout.RolloutEngine._step = step
policy = load_policy("tiny-random", dtype="float32", device="cpu")
generate(policy, {PROMPTS!r}, n=2, sampling=Sampling(max_tokens=40), seed=1, batch_size=4, keep={str(keep)!r})
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    kept = read_partials(keep)
    assert sum(p.finish_reason is None and len(p.ids) == 16 for p in kept) >= 2
    sampling = Sampling(max_tokens=40)
    resumed = generate(shared_policy, PROMPTS, n=2, sampling=sampling, seed=1, batch_size=4, keep=keep)
    assert ids(resumed) == ids(generate(shared_policy, PROMPTS, n=2, sampling=sampling, seed=1))
    # Called once more it has nothing to do.
    model = Counting(shared_policy, 4)
    again = RolloutEngine(shared_policy, slots=4, decode=model)
    assert again.generate(PROMPTS, n=2, sampling=sampling, seed=1, keep=keep) == resumed
    assert not model.reads


def test_partials_of_something_else_are_refused(shared_policy: LanguagePolicy, tmp_path: Path) -> None:
    partials = part_way(shared_policy, 60)
    engine = RolloutEngine(shared_policy)
    for changed in ({"seed": 8}, {"sampling": UNEVEN.model_copy(update={"temperature": 0.5})}):
        with pytest.raises(BadInputError, match="another prompt, seed or sampling"):
            engine.stream(PROMPTS, **{"n": 3, "seed": 9, "sampling": UNEVEN, "partials": partials, **changed})
    with pytest.raises(BadInputError, match="one of each per token"):
        Partial((1,), (2, 3), (0.0,), (0.0,), (Segment("w", 2),), 1, SAMPLING)
    (tmp_path / "p.jsonl").write_text('{"prompt_ids": [1]}\n')
    with pytest.raises(BadInputError, match="line 1"):
        read_partials(tmp_path / "p.jsonl")
    assert read_partials(tmp_path / "absent.jsonl") == []


# -- weights --------------------------------------------------------------------------------------


def nudge(policy: LanguagePolicy, through_data: bool = False) -> None:
    weight = policy.network.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        (weight.data if through_data else weight).mul_(1.5)


def test_every_answer_names_its_weights(policy: LanguagePolicy) -> None:
    before = policy.weights_sha256()
    engine = RolloutEngine(policy, slots=4)
    first = flat(engine.generate(PROMPTS, n=1, sampling=SAMPLING, weights=before))
    assert {g.weights for g in first} == {before}
    for through_data in (
        False,
        True,
    ):  # PyTorch does not count a write through .data; we notice it all the same
        nudge(policy, through_data)
        assert {g.weights for g in flat(engine.generate(PROMPTS, n=1, sampling=SAMPLING))} == {
            policy.weights_sha256()
        }
        with pytest.raises(NumericsError, match="stale_weights"):
            engine.generate(PROMPTS, n=1, sampling=SAMPLING, weights=before)
        with pytest.raises(NumericsError, match="stale_weights"):
            generate(policy, PROMPTS, n=1, sampling=SAMPLING, weights=before)


def test_the_adapter_is_part_of_the_weights_when_it_acts(policy: LanguagePolicy) -> None:
    base = policy.weights_sha256()
    policy.add_lora(rank=2)
    assert generate(policy, PROMPTS[:1], sampling=SAMPLING)[0][0].weights == policy.weights_sha256() != base
    with policy.adapter_disabled():
        assert generate(policy, PROMPTS[:1], sampling=SAMPLING)[0][0].weights == base


@pytest.mark.parametrize("through_data", [False, True])
def test_weights_that_change_under_a_rollout_raise(policy: LanguagePolicy, through_data: bool) -> None:
    engine = RolloutEngine(policy, slots=4)
    with pytest.raises(NumericsError, match=r"stale_weights.*changed while"):
        for count, _ in enumerate(engine.stream(PROMPTS, n=1, sampling=SAMPLING)):
            if count == 10:
                nudge(policy, through_data)


@pytest.mark.parametrize("way", [SlotTable, Cohorts, NetworkDecode])
def test_a_hot_update_is_recorded_token_by_token(policy: LanguagePolicy, way: Any) -> None:
    """After it, tokens come from the new weights given everything before, and the record says which do."""
    old = policy.weights_sha256()
    engine = RolloutEngine(policy, slots=4, decode=Counting(policy, 4, way))
    stream = engine.stream(PROMPTS, n=2, sampling=SAMPLING, seed=6)
    for _ in range(45):
        next(stream)
    state = {name: t.clone() for name, t in policy.network.state_dict().items()}
    state["model.layers.1.mlp.up_proj.weight"] *= 1.7
    partials = {(p.prompt_ids, p.seed): len(p.ids) for p in engine.partials() if p.finish_reason is None}
    new = engine.update_weights(state)
    assert new == policy.weights_sha256() != old
    _, finished = told(list(stream))
    mixed = [e.generation for e in finished if len(e.generation.segments) == 2]
    assert mixed
    for answer in mixed:
        first = partials[answer.prompt_ids, answer.seed]
        assert answer.segments == (Segment(old, first), Segment(new, len(answer.ids) - first))
        assert answer.weights is None
        scored = token_logprobs(policy, [answer.rendered()])[0].numpy()
        np.testing.assert_allclose(answer.logprobs[first:], scored[first:], atol=1e-4)
        assert np.abs(np.array(answer.logprobs[:first]) - scored[:first]).max() > 1e-2


def test_an_update_that_is_not_whole_is_refused(policy: LanguagePolicy) -> None:
    policy.add_lora(rank=2)
    engine = RolloutEngine(policy)
    before = policy.weights_sha256()
    state = {name: t + 1 for name, t in policy.network.state_dict().items()}
    for bad in (
        {name: t for name, t in state.items() if ".lora_" not in name},  # the adapter that was never sent
        {**state, "model.nowhere": torch.ones(1)},
        {**state, "model.norm.weight": torch.ones(3)},
    ):
        with pytest.raises(BadInputError, match="of the tensors"):
            engine.update_weights(bad)
    assert policy.weights_sha256() == before
    with pytest.raises(NumericsError, match="stale_weights"):
        engine.update_weights(state, expected=before)


class Copy(Counting):
    """A decode model with a copy of the weights, which may or may not be refreshed."""

    def __init__(self, policy: LanguagePolicy, honest: bool) -> None:
        import copy

        self.original = policy
        self.honest = honest
        self.copied = LanguagePolicy(copy.deepcopy(policy.model), policy.tokenizer, name="copy")
        super().__init__(self.copied, 4)

    def refresh(self) -> None:
        if self.honest:
            self.copied.network.load_state_dict(self.original.network.state_dict())


def test_a_copy_that_was_not_refreshed_is_found_out(policy: LanguagePolicy) -> None:
    for honest in (True, False):
        engine = RolloutEngine(policy, slots=4, decode=Copy(policy, honest))
        nudge(policy)
        if honest:
            assert engine.sync() == policy.weights_sha256()
            assert ids(engine.generate(PROMPTS, n=2, sampling=SAMPLING)) == ids(
                generate(policy, PROMPTS, n=2, sampling=SAMPLING)
            )
        else:
            with pytest.raises(NumericsError, match="stale_weights: after loading"):
                engine.generate(PROMPTS, n=2, sampling=SAMPLING)


# -- what goes wrong ------------------------------------------------------------------------------


def test_nan_weights_are_named(policy: LanguagePolicy) -> None:
    model = Counting(policy, 4)
    engine = RolloutEngine(policy, slots=4, decode=model)
    with torch.no_grad():
        policy.network.model.layers[1].mlp.down_proj.weight[3] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(NumericsError, match=r"nonfinite_logits: .*prompt 1, token 0"):
            engine.generate(PROMPTS, sampling=Sampling(temperature=temperature))
    assert not model.live


def test_context_and_empty_prompts(shared_policy: LanguagePolicy) -> None:
    from corrigible.models import Rendered

    prompts: list[Any] = [user("x" * 985), Rendered((), ()), user("y" * 3000), user("Hi")]
    sampling = Sampling(max_tokens=100, temperature=0)
    answers = generate(shared_policy, prompts, n=2, sampling=sampling, batch_size=3)
    assert answers[0][0].finish_reason in (FinishReason.context, FinishReason.stop)
    assert len(answers[0][0].prompt_ids) + len(answers[0][0].ids) <= shared_policy.context_length
    assert "empty" in str(answers[1][0].error) and "reads 1024" in str(answers[2][1].error)
    assert answers[3][0].ids and answers[3][0].error is None


def test_no_room_gives_advice(shared_policy: LanguagePolicy) -> None:
    class Full(Counting):
        def decode(self, slots: list[int], tokens: list[int]) -> Tensor:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    with pytest.raises(NumericsError, match=r"out_of_memory: .*64 sequences") as caught:
        RolloutEngine(shared_policy, decode=Full(shared_policy, 64)).generate(PROMPTS, sampling=SAMPLING)
    assert "batch_size" in caught.value.advice
    with pytest.raises(BadInputError, match="at least 1"):
        RolloutEngine(shared_policy, slots=0)


def test_a_model_that_the_fast_ways_get_wrong_takes_the_plain_one(
    policy: LanguagePolicy, recorded_events: list[Any]
) -> None:
    """An architecture that looks at the mask's width, as nobody expects: told, and still right."""
    assert choose_way(policy) is SlotTable
    assert not [e for e in recorded_events if e.kind == "message"]
    other = load_policy("tiny-random", dtype="float32", device="cpu")
    forward = other.network.forward

    def strange(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            raise TypeError("this model keeps no keys")
        return forward(*args, past_key_values=past_key_values, **kwargs)

    other.network.forward = strange
    assert choose_way(other) is Recompute
    said = [e.text for e in recorded_events if e.kind == "message"]
    assert len(said) == 1 and "keeps no keys" in said[0]
    assert ids(generate(other, PROMPTS[:2], n=2, sampling=SAMPLING)) == ids(
        generate(policy, PROMPTS[:2], n=2, sampling=SAMPLING)
    )
