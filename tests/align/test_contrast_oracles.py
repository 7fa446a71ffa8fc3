"""Every registered loss against an oracle that shares no code with it: value and gradient."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracles import ORACLES
from oracles.contrast import CONTRAST_ORACLES, Case, Group, Row, Slopes, sft

from corrigible.align import ALGORITHMS, ScoredExamples
from corrigible.align.contrast import ContrastRows, contrast_loss, preset
from corrigible.align.kto import ReferencePoint
from corrigible.align.losses import LossOutput

STEP = 64
"""All numbers are multiples of 1/64, so that float32 holds them exactly."""

Draw = Callable[[random.Random], dict[str, Any]]

SETTINGS: dict[str, Draw] = {
    "dpo": lambda r: {"beta": r.choice([0.02, 0.1, 1.0]), "label_smoothing": r.choice([0.0, 0.2])},
    "cdpo": lambda r: {"beta": r.choice([0.02, 0.1, 1.0]), "label_smoothing": r.choice([0.0, 0.1, 0.4])},
    "rdpo": lambda r: {
        "beta": r.choice([0.02, 0.1, 1.0]),
        "flip_rate": r.choice([0.0, 0.1, 0.4]),
        "largest_margin": r.choice([None, 0.03, 1.0]),
    },
    "ipo": lambda r: {"tau": r.choice([0.05, 0.1, 1.0]), "length_normalised": r.random() < 0.5},
    "slic": lambda r: {"gamma": r.choice([0.05, 0.5, 2.0]), "sft_weight": r.choice([0.0, 0.3])},
    "hinge-norm": lambda r: {"gamma": r.choice([0.05, 0.5, 2.0])},
    "simpo": lambda r: {
        "beta": r.choice([2.0, 10.0]),
        "gamma": r.choice([0.0, 1.0]),
        "sft_weight": r.choice([0.0, 0.5]),
    },
    "orpo": lambda r: {"odds_weight": r.choice([0.1, 1.0])},
    "f-dpo": lambda r: {
        "beta": r.choice([0.02, 0.1]),
        "divergence": r.choice(["forward_kl", "jensen_shannon", "alpha"]),
        "alpha": r.choice([0.0, 0.3, 0.5, 1.0]),
    },
    "wpo": lambda r: {"beta": r.choice([0.02, 0.1, 1.0])},
    "spin": lambda r: {"beta": r.choice([0.1, 1.0])},
    "pref-ft": lambda r: {"length_normalised": r.random() < 0.5},
    "unlikelihood": lambda r: {
        "rejected_weight": r.choice([0.0, 0.1, 1.0]),
        "length_normalised": r.random() < 0.5,
    },
    "f-sft": lambda r: {
        "beta": r.choice([0.05, 0.3, 2.0]),
        "divergence": r.choice(["total_variation", "pearson", "hellinger", "kl", "jensen_shannon"]),
        "length_normalised": r.random() < 0.5,
    },
    "kto": lambda r: {
        "beta": r.choice([0.05, 0.5]),
        "desirable_weight": r.choice([1.0, 0.7]),
        "undesirable_weight": r.choice([1.0, 1.3]),
    },
    "plackett-luce": lambda r: {"beta": r.choice([0.05, 0.3, 1.0])},
    "rrhf": lambda r: {"sft_weight": r.choice([0.0, 1.0]), "sft_reduce": r.choice(["sum", "mean"])},
    "pro": lambda r: {"sft_weight": r.choice([0.0, 0.05]), "standardise_scores": r.random() < 0.5},
    "brain": lambda r: {"beta": r.choice([0.3, 1.0, 5.0]), "log_weight_cap": r.choice([None, 0.5, 4.0])},
    "copg": lambda r: {"beta": r.choice([0.05, 0.5])},
    "rwr": lambda r: {"beta": r.choice([0.5, 2.0]), "length_normalised": r.random() < 0.5},
    "awr": lambda r: {
        "beta": r.choice([0.5, 2.0]),
        "baseline": r.choice(["zero", "group_mean", "group_best"]),
        "weight_cap": r.choice([1.5, 20.0]),
        "length_normalised": r.random() < 0.5,
    },
}
KINDS = {"kto": "unpaired", "f-sft": "tokens"}
RANKED = ("plackett-luce", "rrhf", "pro", "brain", "copg", "rwr", "awr")


def kind_of(name: str) -> str:
    return "ranked" if name in RANKED else KINDS.get(name, "pairs")


def steps(r: random.Random, low: float, high: float) -> float:
    return r.randint(math.ceil(low * STEP), math.floor(high * STEP)) / STEP


def draw_row(r: random.Random, scale: float, kind: str) -> Row:
    # One answer in twelve is empty, except where sources let none through one by one.
    length = 0 if r.random() < 1 / 12 else r.randint(1, 6)
    policy = [steps(r, -scale - 0.1, -0.05) for _ in range(length)]
    # Some references are the policy itself: ties of everything, at the place where training starts.
    same = r.random() < 0.2
    reference = policy[:] if same else [steps(r, -scale - 0.1, -0.05) for _ in range(length)]
    credit = [r.choice([1.0, 0.5, 0.25]) if kind == "tokens" else 1.0 for _ in range(length)]
    logq = math.nan if r.random() < 0.3 else steps(r, -scale * length - 1, -0.1)
    return Row(policy, reference, credit, score=steps(r, -1, 1) * 2, logq=logq, wanted=r.random() < 0.5)


def draw_case(r: random.Random, kind: str) -> Case:
    groups = []
    scale = r.choice([0.5, 1.0, 4.0])
    for _ in range(r.randint(1, 5)):
        count = {"pairs": 2, "ranked": r.randint(1, 5)}.get(kind, 1)
        rows = [draw_row(r, scale, kind) for _ in range(count)]
        for row in rows[1:]:
            if r.random() < 0.3:
                row.score = rows[0].score  # a tie
        p = r.choice([1.0, 1.0, 0.5, steps(r, 0, 1)])
        rate = steps(r, 0, 0.4) if r.random() < 0.5 else None
        groups.append(Group(rows, weight=steps(r, 0.1, 2.0), p=p, rate=rate))
    return Case(groups, denominator=sum(group.weight for group in groups), z0=steps(r, 0, 1.0))


def examples_of(case: Case) -> list[Any]:
    return [
        SimpleNamespace(
            rows=tuple(group.rows),
            weight=group.weight,
            p_chosen=group.p,
            flip_rate=group.rate,
            scores=tuple(row.score for row in group.rows),
            logq=tuple(row.logq for row in group.rows),
            token_weights=tuple(group.rows[0].credit),
            desirable=group.rows[0].wanted,
        )
        for group in case.groups
    ]


def tensors(rows: Sequence[list[float]], dtype: torch.dtype, grad: bool) -> list[torch.Tensor]:
    return [torch.tensor(row, dtype=dtype, requires_grad=grad) for row in rows]


def learn(name: str, case: Case, settings: dict[str, Any], dtype: torch.dtype) -> tuple[LossOutput, Slopes]:
    """The registered objective's loss on the case, and the gradient that reaches every token."""
    entry = ALGORITHMS[name]
    rows = [row for group in case.groups for row in group.rows]
    policy = tensors([row.policy for row in rows], dtype, True)
    config = entry.config.model_validate(settings)
    known = entry.needs_reference and config.uses_reference
    reference = tensors([row.reference for row in rows], dtype, False) if known else None
    whole = ReferencePoint(case.z0, 1.0, 1.0) if name == "kto" else None
    assert case.denominator is not None
    batch = ScoredExamples(examples_of(case), policy, reference, case.denominator, whole)
    output = entry.objective(batch, config)
    if output.loss.requires_grad:
        output.loss.backward()  # type: ignore[no-untyped-call]
    slopes = iter([0.0] * len(p) if p.grad is None else p.grad.tolist() for p in policy)
    return output, [[next(slopes) for _ in group.rows] for group in case.groups]


def flat(slopes: Slopes) -> torch.Tensor:
    return torch.tensor([x for group in slopes for row in group for x in row], dtype=torch.float64)


PLAIN = ContrastRows.from_ragged


@pytest.fixture
def spoilt_slots(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rows as a careless caller pads them: NaN and log-probs of an end of turn where nothing is."""

    def spoil(*args: Any, **options: Any) -> ContrastRows:
        rows = PLAIN(*args, **options)
        n, width = rows.mask.shape
        mask = torch.cat([torch.zeros(n, 1, dtype=torch.bool), rows.mask, torch.zeros(n, 2).bool()], dim=1)
        junk = torch.full((n, width + 3), math.nan)
        junk[::2, ::2] = -0.25  # pad = eos: a number like any other

        def wide(value: torch.Tensor | None) -> torch.Tensor | None:
            if value is None:
                return None
            padded = torch.nn.functional.pad(value, (1, 2))
            return torch.where(mask, padded, junk.to(padded))

        return replace(
            rows,
            logp=wide(rows.logp),
            ref_logp=wide(rows.ref_logp),
            token_weight=wide(rows.token_weight),
            mask=mask,
        )

    monkeypatch.setattr(ContrastRows, "from_ragged", spoil)
    yield


@pytest.mark.usefixtures("spoilt_slots")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", sorted(CONTRAST_ORACLES))
def test_200_ragged_cases_equal_the_oracle(name: str, dtype: torch.dtype) -> None:
    relative, absolute = (1e-9, 1e-13) if dtype == torch.float64 else (1e-4, 2e-6)
    r = random.Random(f"contrast {name}")
    moved = 0
    for number in range(200):
        case, settings = draw_case(r, kind_of(name)), SETTINGS[name](r)
        value, slopes = CONTRAST_ORACLES[name](case, **settings)
        output, found = learn(name, case, settings, dtype)
        expected, got = flat(slopes), flat(found)
        size = float(expected.abs().max()) if len(expected) else 0.0
        moved += size > 0
        where = f"case {number} of {name} with {settings}"
        floor = absolute * max(1.0, size)
        assert float(output.loss.detach()) == pytest.approx(value, rel=relative, abs=floor), where
        assert output.metrics["loss"] == pytest.approx(value, rel=relative, abs=floor), where
        assert not len(got) or float((got - expected).abs().max()) <= relative * size + absolute, where
        assert all(math.isfinite(x) for x in output.metrics.values()), where
    assert moved > 150


def test_presets_that_are_no_algorithm_of_their_own_equal_theirs() -> None:
    r = random.Random(5)
    for _ in range(50):
        case = draw_case(r, "pairs")
        rows = [row for group in case.groups for row in group.rows]
        group = [g for g, each in enumerate(case.groups) for _ in each.rows]
        made = ContrastRows.from_ragged(
            tensors([row.policy for row in rows], torch.float64, True),
            group,
            ref_logp=tensors([row.reference for row in rows], torch.float64, False),
            label=[1, -1] * len(case.groups),
            weight=[case.groups[g].weight for g in group],
            p_chosen=[each.p for each in case.groups],
        )
        whole = case.denominator
        augmented = contrast_loss(made, preset("reward_augmented"), denominator=whole)
        plain, _ = CONTRAST_ORACLES["cdpo"](case, beta=0.01, label_smoothing=0.0)
        assert float(augmented.loss.detach()) == pytest.approx(plain, rel=1e-9, abs=1e-13)
        chosen = Case([Group(each.rows[:1], each.weight) for each in case.groups], whole)
        imitated = contrast_loss(made, preset("sft"), denominator=whole)
        assert float(imitated.loss.detach()) == pytest.approx(sft(chosen)[0], rel=1e-9, abs=1e-13)


def test_every_registered_loss_has_an_oracle() -> None:
    for name, entry in ALGORITHMS.items():
        if entry.family in ("contrast", "tokens"):
            assert name in ORACLES, f"{name} has no oracle: write one in tests/align/oracles"
    missing = set(CONTRAST_ORACLES) - set(ALGORITHMS)
    assert not missing, f"oracles of algorithms that are not registered: {missing}"
    assert set(SETTINGS) == set(CONTRAST_ORACLES)


def test_rendered_algorithms_use_a_loss_that_has_an_oracle() -> None:
    """What they change is the text; each must hand on to one of these."""
    checked = {"imitate", "dpo", "token_loss", "contrast_loss", "dpo_loss", "pair_loss"}
    for name, entry in ALGORITHMS.items():
        if entry.family == "rendered":
            assert checked & set(entry.objective.__code__.co_names), name  # type: ignore[attr-defined]


def test_the_test_notices_a_missing_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGORITHMS, "new", replace(ALGORITHMS["dpo"], name="new"))
    with pytest.raises(AssertionError, match="new has no oracle"):
        test_every_registered_loss_has_an_oracle()


def test_the_oracles_notice_a_wrong_constant() -> None:
    """The mutation: another beta, another margin, the other side's anchor."""
    case = draw_case(random.Random(3), "pairs")
    value, _ = CONTRAST_ORACLES["simpo"](case, beta=2.0, gamma=1.0)
    for settings in ({"beta": 2.0, "gamma": 1.001}, {"beta": 2.002, "gamma": 1.0}):
        output, _ = learn("simpo", case, settings, torch.float64)
        assert float(output.loss.detach()) != pytest.approx(value, rel=1e-6)
