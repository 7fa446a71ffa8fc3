"""KTO against an oracle of scalar loops in float64, its reference point, and its source."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from corrigible.align import ALGORITHMS, TrainConfig, Trainer, UnpairedSource
from corrigible.align.kto import ReferencePoint, kto_loss, reference_point
from corrigible.errors import BadInputError, NumericsError
from corrigible.events import Alert, EventBus, use_bus
from corrigible.models import LanguagePolicy
from corrigible.records import Annotator, Feedback, Item, Message, Rating, Reaction, Scale, TargetRef
from corrigible.store import Labelled, Store, labelled_from_pairs, load_labelled


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def oracle(policy, reference, desirable, weights, beta, sides, z0, denominator):
    """Value and gradient of KTO (eq. 7 and 8), one answer at a time."""
    total = sum(weights) if denominator is None else denominator
    loss, slopes = 0.0, []
    for p, r, good, w in zip(policy, reference, desirable, weights, strict=True):
        h = p - r
        if good:
            loss += w * sides[0] * (1 - sigma(beta * (h - z0))) / total
            s = sigma(beta * (h - z0))
            slopes.append(-w * sides[0] * beta * s * (1 - s) / total)
        else:
            loss += w * sides[1] * (1 - sigma(beta * (z0 - h))) / total
            s = sigma(beta * (z0 - h))
            slopes.append(w * sides[1] * beta * s * (1 - s) / total)
    return loss, slopes


def column(values: list, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def test_value_and_gradient_equal_the_oracle_on_200_cases() -> None:
    rng = random.Random(3)
    for _ in range(200):
        n = rng.randint(1, 9)
        scale = rng.choice([1.0, 20.0, 300.0])
        policy, reference = ([-rng.random() * scale for _ in range(n)] for _ in range(2))
        if rng.random() < 0.2:  # ties: the policy is the reference
            reference = list(policy)
        # All good and all bad batches come up, too.
        share = rng.choice([0.0, 0.5, 0.5, 1.0])
        desirable = [rng.random() < share for _ in range(n)]
        weights = rng.choice([None, [rng.random() + 0.01 for _ in range(n)]])
        beta, z0 = rng.choice([0.01, 0.1, 2.0]), rng.choice([0.0, 0.7, 30.0])
        sides = rng.choice([(1.0, 1.0), (1.0, 3.0), (0.1, 0.0)])
        denominator = rng.choice([None, 0.5 + 20 * rng.random()])
        logps, held = column(policy, grad=True), column(reference, grad=True)
        out = kto_loss(
            logps,
            held,
            torch.tensor(desirable),
            z0=z0,
            beta=beta,
            desirable_weight=sides[0],
            undesirable_weight=sides[1],
            weight=None if weights is None else column(weights),
            denominator=denominator,
        )
        out.loss.backward()
        value, slopes = oracle(
            policy, reference, desirable, weights or [1.0] * n, beta, sides, z0, denominator
        )
        assert float(out.loss.detach()) == pytest.approx(value, rel=1e-9, abs=1e-12)
        assert out.metrics["loss"] == pytest.approx(value, rel=1e-9, abs=1e-12)
        assert logps.grad is not None and held.grad is None
        assert logps.grad.tolist() == pytest.approx(slopes, rel=1e-8, abs=1e-13)


def test_the_reference_point_equals_the_oracle_on_200_cases() -> None:
    rng = random.Random(5)
    clamped = 0
    for _ in range(200):
        n = rng.randint(0, 7)
        policy, reference = ([-50 * rng.random() for _ in range(n)] for _ in range(2))
        mean = math.fsum(a - b for a, b in zip(policy, reference, strict=True)) / n if n else 0.0
        clamped += mean < 0
        found = reference_point(column(policy, grad=True), column(reference))
        assert found == pytest.approx(max(0.0, mean), rel=1e-12)
    assert 50 < clamped < 150


def test_at_the_start_rewards_are_0_and_the_slope_is_beta_over_4() -> None:
    """policy = reference and z0 = 0: every value is 1/2, whatever the side."""
    logps = column([-3.0, -40.0, -7.0], grad=True)
    out = kto_loss(logps, logps.detach(), torch.tensor([True, False, True]), z0=0.0, beta=0.2)
    out.loss.backward()
    assert float(out.loss.detach()) == 0.5
    assert out.metrics["rewards/desirable"] == out.metrics["rewards/undesirable"] == 0.0
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([-0.2 / 4 / 3, 0.2 / 4 / 3, -0.2 / 4 / 3])


def test_micro_batches_add_up_to_the_batch_with_all_their_metrics() -> None:
    rng = random.Random(8)
    policy, reference = (column([-30 * rng.random() for _ in range(7)]) for _ in range(2))
    desirable = torch.tensor([True, True, False, True, False, True, True])
    weight = column([rng.random() for _ in range(7)])
    whole = kto_loss(policy, reference, desirable, z0=0.4, weight=weight)
    point = ReferencePoint(0.4, float(weight[desirable].sum()), float(weight[~desirable].sum()))
    parts = [
        kto_loss(
            policy[s],
            reference[s],
            desirable[s],
            z0=0.4,
            weight=weight[s],
            denominator=weight.sum(),
            whole=point,
        )
        for s in (slice(0, 2), slice(2, 3), slice(3, 7))  # one part is all good, one all bad
    ]
    for name, value in whole.metrics.items():
        assert sum(part.metrics[name] for part in parts) == pytest.approx(value, rel=1e-10), name


def test_extreme_ratios_stay_finite_and_small_losses_are_not_rounded_away() -> None:
    logps = torch.tensor([-1.0, -4e6, -1.0, -4e6], requires_grad=True)
    held = torch.tensor([-4e6, -1.0, -4e6, -1.0])
    out = kto_loss(logps, held, torch.tensor([True, True, False, False]), z0=0.0)
    out.loss.backward()
    assert float(out.loss.detach()) == 0.5 and out.metrics["saturated"] == 1.0
    assert logps.grad is not None and bool(torch.isfinite(logps.grad).all())
    # float32: 1 - sigma(20) is 0, sigma(-20) is not.
    small = kto_loss(torch.tensor([-1.0]), torch.tensor([-201.0]), torch.tensor([True]), z0=0.0)
    assert float(small.loss) == pytest.approx(math.exp(-20), rel=1e-3)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"policy_logps": column([-1.0])}, BadInputError, "one shape"),
        ({"policy_logps": column([-1.0, math.nan])}, NumericsError, r"logps_not_finite.*\[1\]"),
        ({"reference_logps": column([-1.0, 4.0])}, NumericsError, "logps_positive"),
        ({"desirable": torch.tensor([True])}, BadInputError, "desirable"),
        ({"desirable": column([1.0, 0.0])}, BadInputError, "desirable"),
        ({"beta": 0.0}, BadInputError, "beta"),
        ({"z0": -0.1}, NumericsError, "z0_not_usable"),
        ({"z0": math.nan}, NumericsError, "z0_not_usable"),
        ({"desirable_weight": -1.0}, BadInputError, "desirable_weight"),
        ({"desirable_weight": 0.0, "undesirable_weight": 0.0}, BadInputError, "not both 0"),
        ({"weight": column([0.0, 0.0])}, NumericsError, "nothing_to_average"),
        ({"denominator": 0.0}, NumericsError, "nothing_to_average"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict, error: type[Exception], says: str) -> None:
    arguments = {
        "policy_logps": column([-1.0, -2.0]),
        "reference_logps": column([-1.0, -2.0]),
        "desirable": torch.tensor([True, False]),
        "z0": 0.0,
    } | change
    with pytest.raises(error, match=says):
        kto_loss(**arguments)


# -- the source -----------------------------------------------------------------------------------


def said(prompt: str, response: str, desirable: bool = True) -> Labelled:
    return Labelled(
        prompt=(Message(role="user", content=prompt),),
        response=(Message(role="assistant", content=response),),
        desirable=desirable,
        weight=1.0,
        group=prompt,
        annotators=("ada",),
        derived_from=(f"{prompt}/{response}",),
        criterion="overall",
    )


def parts(row: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return row.ids[: row.scored[0]], row.ids[row.scored[0] :]  # type: ignore[attr-defined]


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_every_prompt_meets_the_answer_of_the_next_example(policy: LanguagePolicy, count: int) -> None:
    """Odd batches, too; the last example meets the first one's."""
    source = UnpairedSource([said(f"Question {i}?", f"answer {i}") for i in range(count)], policy.renderer)
    batch = source.batch(0, count)
    assert len(batch) == count
    for here, there in zip(batch, [*batch[1:], batch[0]], strict=True):
        assert here.mismatched is not None
        assert parts(here.mismatched) == (parts(here.rows[0])[0], parts(there.rows[0])[1])
        assert here.mismatched.ids != here.rows[0].ids


def test_no_example_meets_its_own_prompt_or_answer_again(policy: LanguagePolicy) -> None:
    """Both sides of a pair have one prompt: an answer of the other side would be a matched one."""
    labelled = [said("A?", "x"), said("A?", "y", False), said("B?", "x"), said("C?", "z")]
    for step in range(6):
        for example in (batch := UnpairedSource(labelled, policy.renderer, seed=step).batch(0, 4)):
            own_prompt, own_answer = parts(example.rows[0])
            assert example.mismatched is not None
            prompt, answer = parts(example.mismatched)
            assert prompt == own_prompt and answer != own_answer
            assert (prompt, answer) not in [parts(e.rows[0]) for e in batch]


def test_a_batch_without_two_prompts_says_that_it_has_no_reference_point(policy: LanguagePolicy) -> None:
    bus, seen = EventBus(), []
    bus.subscribe(seen.append)
    with use_bus(bus):
        source = UnpairedSource([said("A?", "x"), said("A?", "y", False)], policy.renderer)
        batches = [source.batch(step, 2) for step in range(3)]
    assert all(example.mismatched is None for batch in batches for example in batch)
    assert [e.name for e in seen if isinstance(e, Alert)] == ["mismatch_impossible"]


def test_a_mismatched_row_is_as_long_as_a_row_may_be(policy: LanguagePolicy) -> None:
    labelled = [said("long " * 12, "x"), said("B?", "y" * 60, False)]
    longest = max(len(e.rows[0]) for e in UnpairedSource(labelled, policy.renderer).examples)
    joined = max(len(e.mismatched or ()) for e in UnpairedSource(labelled, policy.renderer).batch(0, 2))
    assert joined > longest
    source = UnpairedSource(labelled, policy.renderer, max_length=longest)
    cut = [e.mismatched for e in source.batch(0, 2) if e.mismatched is not None]
    assert max(len(row) for row in cut) == longest and any(row.dropped for row in cut)


def test_pairs_become_two_answers_and_soft_labels_weights(make_pair: Callable) -> None:
    found = labelled_from_pairs(
        [
            make_pair("A?", "good", "bad", weight=2.0),
            make_pair("B?", "good", "bad", p_chosen=0.75),
            make_pair("C?", "good", "bad", p_chosen=0.5),
            make_pair("D?", "bad", "good", p_chosen=0.0),
        ]
    )
    listed = [(one.prompt[0].content, one.response[0].content, one.desirable, one.weight) for one in found]
    assert listed == [
        ("A?", "good", True, 2.0),
        ("A?", "bad", False, 2.0),
        ("B?", "good", True, 0.5),
        ("B?", "bad", False, 0.5),
        ("D?", "bad", False, 1.0),
        ("D?", "good", True, 1.0),
    ]


def test_a_soft_label_has_the_gradient_of_the_mean_over_the_label() -> None:
    logps = column([-3.0], grad=True)
    held = column([-5.0])
    good, bad = torch.tensor([True]), torch.tensor([False])
    p = 0.8
    mixture = p * kto_loss(logps, held, good, z0=0.1).loss + (1 - p) * kto_loss(logps, held, bad, z0=0.1).loss
    weighted = kto_loss(logps, held, good, z0=0.1, weight=column([2 * p - 1]), denominator=1.0).loss
    [expected], [found] = (torch.autograd.grad(loss, logps) for loss in (mixture, weighted))
    assert float(found) == pytest.approx(float(expected), rel=1e-12)


def test_reactions_and_ratings_of_a_store_become_labels(tmp_path: Path) -> None:
    scale = Scale(id="five", min=1, max=5, step=1)
    prompt = Item.of_text("Why?", "prompt")
    with Store.open(tmp_path / "s.db") as store:
        for text, payload in (
            ("liked", Reaction(value=1)),
            ("disliked", Reaction(value=-1)),
            ("taken back", Reaction(value=0)),
            ("five stars", Rating(value=5, scale=scale)),
            ("three stars", Rating(value=3, scale=scale)),
            ("one star", Rating(value=1, scale=scale)),
        ):
            item = Item.of_text(text, "response")
            record = Feedback(
                targets=(TargetRef.of(item, episode="e1" if text == "liked" else None),),
                context=prompt.sha256,
                annotator=Annotator(pseudonym="ada", type="human"),
                payload=payload,
            )
            store.add_feedback([record], [item, prompt])
        found = {one.response[0].content: one for one in load_labelled(store)}
    assert {text: one.desirable for text, one in found.items()} == {
        "liked": True,
        "disliked": False,
        "five stars": True,
        "one star": False,
    }
    assert found["liked"].prompt[0].content == "Why?" and found["liked"].episode == "e1"
    assert found["disliked"].response[0].role == "assistant" and len(found["liked"].derived_from) == 1


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("empty_completion", {"response": (Message(role="assistant", content=" "),)}),
        ("too_long", {"response": (Message(role="assistant", content="y" * 400),)}),
        ("bad_weight", {"weight": 0.0}),
        ("not_renderable", {"response": (Message(role="user", content="no"),)}),
    ],
)
def test_an_unusable_answer_has_a_named_reason(policy: LanguagePolicy, reason: str, change: dict) -> None:
    labelled = [said("A?", "yes"), dataclasses.replace(said("B?", "no"), **change)]
    with pytest.raises(BadInputError, match=f"^{reason}: answer 1 of 2"):
        UnpairedSource(labelled, policy.renderer, max_length=128)
    source = UnpairedSource(labelled, policy.renderer, max_length=128, invalid="skip")
    assert source.skipped == {reason: 1} and source.labelled == labelled[:1]


def test_the_digest_knows_everything_that_decides_the_batches(policy: LanguagePolicy) -> None:
    labelled = [said("A?", "x"), said("B?", "y", False)]

    def digest(changed: list[Labelled], **options: int) -> str:
        return UnpairedSource(changed, policy.renderer, **options).digest()

    changes = [
        digest(labelled),
        digest(labelled, seed=1),
        digest(labelled, max_length=100),
        digest(labelled[::-1]),
        digest([dataclasses.replace(labelled[0], desirable=False), labelled[1]]),
        digest([dataclasses.replace(labelled[0], weight=2.0), labelled[1]]),
    ]
    assert len(set(changes)) == len(changes)


def test_it_learns(tmp_path: Path, policy: LanguagePolicy) -> None:
    """Good answers are raised over bad ones, and the first step finds the policy where it started."""
    labelled = [said(f"{i}?", "yes" if i % 2 else "no", bool(i % 2)) for i in range(16)]
    source = UnpairedSource(labelled, policy.renderer)
    trainer = Trainer(
        policy, ALGORITHMS["kto"], source, TrainConfig(steps=10, batch_size=8, lr=5e-3), out=tmp_path
    )
    result = trainer.train()
    first = next(iter(result.history.read_text().splitlines()))
    assert '"loss": 0.5' in first and '"z0": 0.0' in first
    assert result.metrics["rewards/margin"] > 0.5 and result.metrics["loss"] < 0.45
