"""One batch has one gradient, however it is cut, packed, padded or shared.

64 pairs of random, ragged rows, some of them on the same prompt, are learnt from by DPO through the
trainer in every way it has, and through transformers padded on the left; each gradient is compared with
that of the plain computation: one row at a time in float64, full logits, the loss as it is written in
the paper.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from corrigible.align import ALGORITHMS, DPOConfig, PairExample, TrainConfig, Trainer, losses
from corrigible.align import trainer as trainer_module
from corrigible.align.registry import ScoredExamples
from corrigible.align.sources import row_key
from corrigible.models import LanguagePolicy, Rendered, TokenKind
from corrigible.models.scoring import Scorer

COSINE, NORM = 0.999999, 1e-5
BETA = 0.3


# -- the batch ------------------------------------------------------------------------------------


def random_row(prompt: list[int], rng: random.Random) -> Rendered:
    """An answer with unscored tokens between and after the scored ones, the pad id among all of them."""
    length = rng.randint(1, 40)
    ids = [rng.choice([2, rng.randrange(259)]) for _ in range(length)]
    kinds = [TokenKind(rng.choice([1, 1, 1, 2, 3])) for _ in ids]
    kinds[rng.randrange(length)] = TokenKind.SAMPLED
    return Rendered((*prompt, *ids), (TokenKind.PROMPT,) * len(prompt) + tuple(kinds))


def random_pairs(count: int = 64) -> list[PairExample]:
    """Of uneven weight, length and certainty; every third pair is about the prompt of the one before."""
    rng = random.Random(64)
    pairs: list[PairExample] = []
    prompt: list[int] = []
    for number in range(count):
        if number % 3 != 2:
            prompt = [rng.randrange(259) for _ in range(rng.randint(1, 60))]
        pairs.append(
            PairExample(
                rows=(random_row(prompt, rng), random_row(prompt, rng)),
                p_chosen=rng.choice([1.0, 1.0, 0.7, 0.0]),
                weight=rng.choice([0.5, 1.0, 3.0]),
                group=str(number),
                derived_from=(f"f{number}",),
            )
        )
    return pairs


@dataclasses.dataclass
class Fixed:
    """A source with one batch."""

    examples: list[PairExample]
    kind: str = "pairs"

    def steps_per_epoch(self, batch_size: int) -> int:
        return 1

    def batch(self, step: int, batch_size: int) -> list[PairExample]:
        return self.examples

    def digest(self) -> str:
        return "fixed"


def plain_row(network: Any, row: Rendered) -> Tensor:
    """Log-probs of a row's scored tokens: transformers, one row, full logits, with gradient."""
    logits = network(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
    every = logits[:-1].log_softmax(dim=-1).gather(-1, torch.tensor(row.ids[1:])[:, None])[:, 0]
    return every[[i - 1 for i in row.scored]]


@dataclasses.dataclass
class Case:
    """A policy that is not its reference, a batch, and the gradient that is right."""

    policy: LanguagePolicy
    pairs: list[PairExample]
    reference: dict[bytes, Tensor]
    gradient: Tensor


@pytest.fixture(scope="module", params=["all weights", "adapter"])
def case(request: pytest.FixtureRequest) -> Case:
    from corrigible.models import load_policy

    policy = load_policy("tiny-random", dtype="float32", device="cpu")
    generator = torch.Generator().manual_seed(1)
    if request.param == "adapter":
        policy.add_lora(rank=4, alpha=8)
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if ".lora_B." in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    pairs = random_pairs()
    plain = copy.deepcopy(policy.model).double()
    parameters = [p for p in plain.parameters() if p.requires_grad]
    total = sum(pair.weight for pair in pairs)
    reference: dict[bytes, Tensor] = {}
    gradient = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for pair in pairs:
        scores = [plain_row(plain, row) for row in pair.rows]
        for row, values in zip(pair.rows, scores, strict=True):
            # The reference is another model: near, but not the policy, and not the same way for all.
            noise = torch.randn(len(values), generator=generator)
            reference[row_key(row)] = values.detach().float() - noise.abs()
        anchors = [reference[row_key(row)].double().sum() for row in pair.rows]
        h = [values.sum() - anchor for values, anchor in zip(scores, anchors, strict=True)]
        d = BETA * (h[0] - h[1])
        # Rafailov et al. 2023, eq. 7, for a label that may be unsure: -p log s(d) - (1 - p) log s(-d)
        loss = pair.p_chosen * (-d).exp().log1p() + (1 - pair.p_chosen) * d.exp().log1p()
        parts = torch.autograd.grad(pair.weight / total * loss, parameters)
        gradient += torch.cat([part.flatten() for part in parts])
    return Case(policy, pairs, reference, gradient)


# -- the ways -------------------------------------------------------------------------------------


def flat(policy: LanguagePolicy) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in policy.trainable_parameters()])


def trained(
    case: Case, out: Path, *, tokens: int, share: bool = True, again: bool = False, plain: bool = False
) -> Tensor:
    """The trainer's gradient in micro-batches of so many tokens."""
    policy = case.policy
    policy.model.zero_grad(set_to_none=True)
    policy.plain_path = "the test wants it" if plain else None
    try:
        trainer = Trainer(
            policy,
            ALGORITHMS["dpo"],
            Fixed(case.pairs),
            TrainConfig(micro_batch_tokens=tokens, share_prompts=share, gradient_checkpointing=again),
            algorithm_config=DPOConfig(beta=BETA),
            out=out,
        )
        trainer.reference = case.reference
        trainer.accumulate(case.pairs)
        assert trainer.score is not None and (trainer.score.network is None) is plain
        return flat(policy)
    finally:
        policy.plain_path = None


def padded_left(case: Case, *, rows_at_once: int) -> Tensor:
    """transformers, padded on the left with the end-of-turn token, under a mask, positions counted."""
    policy = case.policy
    policy.model.zero_grad(set_to_none=True)
    total = sum(pair.weight for pair in case.pairs)
    for start in range(0, len(case.pairs), rows_at_once // 2):
        pairs = case.pairs[start : start + rows_at_once // 2]
        rows = [row for pair in pairs for row in pair.rows]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), 2)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, width - len(row) :] = torch.tensor(row.ids)
            mask[number, width - len(row) :] = 1
        positions = (mask.cumsum(dim=-1) - 1).clamp_min(0)
        logits = policy.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        every = logits[:, :-1].log_softmax(dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
        scores = [every[n][[width - len(row) + i - 1 for i in row.scored]] for n, row in enumerate(rows)]
        reference = [case.reference[row_key(row)] for row in rows]
        objective = ALGORITHMS["dpo"].objective
        objective(ScoredExamples(pairs, scores, reference, total), DPOConfig(beta=BETA)).loss.backward()
    return flat(policy)


RAGGED = 200
"""Tokens: a few pairs in a micro-batch, and not in each as many."""

WAYS: dict[str, Callable[[Case, Path], Tensor]] = {
    "1 x 64": lambda case, out: trained(case, out, tokens=1 << 30),
    "64 x 1": lambda case, out: trained(case, out, tokens=1),
    "ragged micro-batches": lambda case, out: trained(case, out, tokens=RAGGED),
    "packed, nothing shared": lambda case, out: trained(case, out, tokens=1 << 30, share=False),
    "packed, ragged, nothing shared": lambda case, out: trained(case, out, tokens=RAGGED, share=False),
    "layers computed again": lambda case, out: trained(case, out, tokens=RAGGED, again=True),
    "padded right": lambda case, out: trained(case, out, tokens=1 << 30, plain=True),
    "padded right, ragged": lambda case, out: trained(case, out, tokens=RAGGED, plain=True),
    "padded left": lambda case, out: padded_left(case, rows_at_once=128),
    "padded left, in parts": lambda case, out: padded_left(case, rows_at_once=14),
}


def one_gradient(found: Tensor, right: Tensor) -> bool:
    cosine = float(torch.dot(found, right) / (found.norm() * right.norm()))
    return cosine >= COSINE and abs(float(found.norm() / right.norm()) - 1) <= NORM


@pytest.mark.parametrize("way", WAYS)
def test_one_batch_has_one_gradient(case: Case, way: str, tmp_path: Path) -> None:
    assert one_gradient(WAYS[way](case, tmp_path), case.gradient)


def test_the_ways_are_different_ways(case: Case, tmp_path: Path) -> None:
    """64 rows that make 64 equal micro-batches, or prompts of which none is shared, would prove little."""
    counts, sizes = micro_batches_of(case, tmp_path, RAGGED)
    assert len(counts) > 5 and min(counts) > 1 and len(set(counts)) > 2, counts
    assert micro_batches_of(case, tmp_path, 1)[0] == [1] * 64
    [whole], [shared] = micro_batches_of(case, tmp_path, 1 << 30)
    assert whole == 64
    alone = sum(sizes)
    rows = sum(row.scored[-1] for pair in case.pairs for row in pair.rows)
    # Both sides of a pair share their prompt, and in one pass so do pairs about one prompt.
    assert shared < 0.9 * alone < 0.9 * 0.9 * rows
    certain = torch.tensor([math.isclose(pair.p_chosen, 1.0) for pair in case.pairs])
    assert bool(certain.any()) and not bool(certain.all())


def micro_batches_of(case: Case, out: Path, tokens: int) -> tuple[list[int], list[int]]:
    """Pairs and tokens of each forward pass."""
    counts, sizes = [], []
    plain = Scorer.__call__

    def counted(self: Scorer, examples: Any, **options: Any) -> Any:
        examples = list(examples)
        counts.append(len(examples))
        sizes.append(self.size([row for rows in examples for row in rows]))
        return plain(self, examples, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "__call__", counted)
        trained(case, out, tokens=tokens)
    return counts, sizes


# -- the check can fail -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def accumulations(case: Case, tmp_path_factory: pytest.TempPathFactory) -> int:
    return len(micro_batches_of(case, tmp_path_factory.mktemp("run"), RAGGED)[0])


def denominators(by: float) -> Iterator[tuple[str, Any, str, Any]]:
    """Every place where DPO's update is divided by something, multiplied by ``by``."""
    mean, whole, scored = losses.weighted_mean, losses.whole_weight, trainer_module.ScoredExamples
    yield "the mean", losses, "weighted_mean", lambda v, w, d: mean(v, w, d * by)
    yield "the weight of the whole", losses, "whole_weight", lambda d, w: whole(d, w) * by
    yield (
        "what the trainer hands out",
        trainer_module,
        "ScoredExamples",
        lambda examples, policy, reference, denominator, *rest: scored(
            examples, policy, reference, denominator * by, *rest
        ),
    )
    yield (
        "a mean of means",
        trainer_module,
        "ScoredExamples",
        lambda examples, policy, reference, denominator, *rest: scored(
            examples, policy, reference, by * sum(e.weight for e in examples), *rest
        ),
    )


@pytest.mark.parametrize("place", range(4))
def test_a_denominator_times_the_accumulation_count_turns_it_red(
    case: Case, accumulations: int, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert accumulations > 1
    what, module, name, broken = list(denominators(accumulations))[place]
    monkeypatch.setattr(module, name, broken)
    found = trained(case, tmp_path, tokens=RAGGED)
    assert not one_gradient(found, case.gradient), what
    if place < 3:  # it is the factor that turned it red, and nothing but the factor
        assert one_gradient(accumulations * found, case.gradient), what


@pytest.mark.parametrize("fault", ["positions", "mask", "prompt of another row", "one token off"])
def test_other_faults_turn_it_red(
    case: Case, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions that count through the pack, a mask of ones, a wrong prefix, reading the wrong state."""
    from corrigible.models import network, scoring
    from corrigible.models.packing import Node, Packed, pack

    def broken(rows: list[Rendered], **options: Any) -> Packed:
        packed = pack(rows, **options)
        changes: dict[str, Any] = {
            "positions": {"positions": torch.arange(len(packed))},
            "mask": {"nodes": (Node(0, len(packed), len(packed)),)},
            "prompt of another row": {"nodes": tuple(one_up(packed.nodes))},
            "one token off": {"read": (packed.read - 1).clamp_min(0)},
        }[fault]
        return dataclasses.replace(packed, **changes)

    monkeypatch.setattr(scoring, "pack", broken)
    assert network.pack is pack  # the network itself is checked as ever, and accepted
    assert not one_gradient(trained(case, tmp_path, tokens=RAGGED), case.gradient)


def one_up(nodes: tuple[Any, ...]) -> Iterator[Any]:
    """The first node with something under it reaches one row too far."""
    done = False
    for node in nodes:
        if not done and node.below > node.end and (after := [n for n in nodes if n.start == node.below]):
            done = True
            yield dataclasses.replace(node, below=after[0].below)
        else:
            yield node
