"""Claims: the verdict follows the numbers, a failure is no effect, a seed gives its numbers again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from corrigible.claims import CLAIMS, Claim, Effect, Outcome, claim, find_claim, load_claims, run_claim
from corrigible.claims.framework import ALPHA, alpha_of_look
from corrigible.errors import BadInputError
from corrigible.events import Alert

WORDS: dict[str, Any] = {"title": "toy", "paper": "none", "hypothesis": "The effect is above 1."}


@pytest.fixture
def registry() -> Iterator[dict[str, Claim]]:
    load_claims()
    before = dict(CLAIMS)
    yield CLAIMS
    CLAIMS.clear()
    CLAIMS.update(before)


@pytest.fixture
def make(registry: dict[str, Claim]) -> Callable[..., Claim]:
    """A claim, on five seeds, that one function of the seed is above 1 and its control is not."""

    def made(
        number: Callable[[int], float], control: Callable[[int], float] = lambda seed: 0.0, **settings: Any
    ) -> Claim:
        settings = {
            "effect": Effect("effect", of=lambda v: v["effect"], above=1.0),
            "controls": [Effect("control", of=lambda v: v["control"], above=1.0)],
            "seeds": range(5),
            **WORDS,
            **settings,
        }
        name = f"toy{len(registry)}"
        claim(name, **settings)(lambda seed: {"effect": number(seed), "control": control(seed)})
        return registry[name]

    return made


@pytest.mark.parametrize(
    ("effect", "control", "verdict"),
    [
        (lambda seed: 2 + 0.1 * seed, lambda seed: 0.1 * seed, "supported"),
        (lambda seed: 0.5 + 0.01 * seed, lambda seed: 0.0, "not supported"),
        (lambda seed: float(seed), lambda seed: 0.0, "inconclusive"),
        (lambda seed: 2 + 0.1 * seed, lambda seed: 2 + 0.1 * seed, "inconclusive"),
        (lambda seed: 1.0, lambda seed: 0.0, "not supported"),
        (lambda seed: 0.5, lambda seed: 2.0, "not supported"),
    ],
)
def test_the_verdict_follows_the_intervals(make: Any, effect: Any, control: Any, verdict: str) -> None:
    assert run_claim(make(effect, control)).verdict == verdict


def test_all_further_effects_must_hold_and_only_the_first_refutes(make: Any) -> None:
    def also(at: float) -> Effect:
        return Effect("also", of=lambda v: v["effect"], above=at)

    assert run_claim(make(lambda seed: 2.0, also=[also(1.5)])).verdict == "supported"
    result = run_claim(make(lambda seed: 2.0, also=[also(2.5)]))
    assert result.verdict == "inconclusive" and "'also' is refuted" in result.reason


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.1, -0.1, 0.05, -0.05, 0.0], "supported"),
        ([2.0, 2.1, 1.9, 2.0, 2.2], "not supported"),
        ([-2.0, 2.0, -1.0, 1.5, 0.0], "inconclusive"),
    ],
)
def test_an_effect_can_be_claimed_to_be_absent(make: Any, values: list[float], verdict: str) -> None:
    null = Effect("null", of=lambda v: v["effect"], within=(-1.0, 1.0))
    assert run_claim(make(lambda seed: values[seed], effect=null)).verdict == verdict


def test_the_interval_is_students_t_at_the_level_of_the_look(make: Any) -> None:
    # 0, 1, 2, 3, 4: mean 2, s = sqrt(2.5); t(0.9875, 4) = 3.495406, half width = t * s / sqrt(5)
    toy = make(lambda seed: float(seed))
    first = run_claim(toy)
    assert first.effect is not None and first.effect.effect == 2.0 and first.alpha == 0.025
    assert first.effect.interval == pytest.approx((2 - 2.471625, 2 + 2.471625), abs=1e-5)
    # The control is never judged more leniently for being looked at again: t(0.975, 4) = 2.776445.
    assert first.controls[0].level == run_claim(toy, look=3).controls[0].level == 0.95
    second = run_claim(toy, look=2)
    assert second.effect is not None and second.effect.interval[0] < first.effect.interval[0]
    # The corrected p is comparable with alpha at every look.
    assert first.p == pytest.approx(2 * first.effect.p)
    assert second.p == pytest.approx(4 * second.effect.p)


def test_a_wrong_verdict_is_no_likelier_for_looking_again_and_again(make: Any) -> None:
    """Under the null, who adds five seeds until the claim is decided is wrong at most 5 % of the time."""
    effect = Effect("effect", of=lambda v: v["x"], above=0.0)
    rng = np.random.default_rng(0)
    wrong, naive, runs = 0, 0, 2000
    for _ in range(runs):
        values = [{"x": float(x)} for x in rng.normal(size=30)]
        decided = [effect.judge(values[: 5 * k], alpha_of_look(k)) for k in range(1, 7)]
        wrong += any(each.shown or each.refuted for each in decided)
        naive += any(each.p < ALPHA for each in decided)
    # Binomial error of 2,000 runs at 0.05 is 0.005.
    assert wrong / runs <= ALPHA + 0.01
    assert naive / runs > ALPHA + 0.02, "uncorrected, the same looks are wrong too often: the test has power"
    assert sum(alpha_of_look(k) for k in range(1, 40)) <= ALPHA


def test_a_failed_seed_is_a_named_failure_and_no_effect(make: Any, recorded_events: list[object]) -> None:
    def breaks(seed: int) -> float:
        if seed == 3:
            raise RuntimeError("it fell over")
        return float("nan") if seed == 2 else 3.0

    result = run_claim(make(breaks))
    assert result.verdict == "inconclusive" and "2 of 5 seeds failed" in result.reason
    assert result.failures.keys() == {2, 3}
    assert "nan for seed 2" in result.failures[2] and result.failures[3] == "RuntimeError: it fell over"
    assert result.p is None
    assert sum(isinstance(event, Alert) and event.name == "seed_failed" for event in recorded_events) == 2


def test_what_is_written_wrongly_stops_at_once(make: Any) -> None:
    seen: list[int] = []

    def experiment(seed: int) -> float:
        seen.append(seed)
        return 1.0

    with pytest.raises(BadInputError, match="asks for 'nothing'"):
        run_claim(make(experiment, effect=Effect("e", of=lambda v: v["nothing"])))
    assert seen == [0], "the first seed shows it; the others would have taken hours"


def test_over_budget_is_said_and_nothing_is_cut(make: Any, recorded_events: list[object]) -> None:
    result = run_claim(make(lambda seed: 2.0, budget=1e-9))
    assert result.over_budget and len(result.seeds) == 5 and "over its budget" in str(result)
    assert sum(isinstance(event, Alert) and event.name == "over_budget" for event in recorded_events) == 1
    assert not run_claim(make(lambda seed: 2.0, budget=60)).over_budget


def test_the_same_seed_gives_the_same_numbers_and_leaves_no_trace(make: Any) -> None:
    threads = torch.get_num_threads()

    def draws(seed: int) -> float:
        assert torch.get_num_threads() == 1
        torch.set_default_dtype(torch.float64)
        return random.random() + float(np.random.rand()) + float(torch.rand(()))

    toy = make(draws)
    first = run_claim(toy)
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    second = run_claim(toy)
    assert torch.equal(torch.rand(3), expected), "the global generator is where it was"
    assert torch.get_num_threads() == threads and torch.get_default_dtype() == torch.float32
    assert [r.outcome for r in first.runs] == [r.outcome for r in second.runs]
    assert len({r.outcome.values["effect"] for r in first.runs if r.outcome}) == 5


def test_what_a_claim_may_not_be(registry: dict[str, Claim]) -> None:
    effect = Effect("e", of=lambda v: v["x"])
    claim("toy", effect=effect, aliases=["other"], **WORDS)
    register = claim("toy", effect=effect, aliases=["other"], **WORDS)
    register(lambda seed: {"x": 1.0})
    for name in ("toy", "other"):
        with pytest.raises(BadInputError, match="already"):
            claim(name, effect=effect, **WORDS)
    for seeds in ([1, 2, 3, 4], [1, 1, 1, 1, 1]):
        with pytest.raises(BadInputError, match="5 different"):
            claim("new", effect=effect, seeds=seeds, **WORDS)
    with pytest.raises(BadInputError, match="sign test can never show"):
        claim("new", effect=Effect("e", of=lambda v: 0.0, test="sign"), seeds=range(6), **WORDS)
    with pytest.raises(BadInputError, match="one name"):
        claim("new", effect=effect, also=[effect], **WORDS)
    with pytest.raises(BadInputError, match="cannot ask for equivalence"):
        claim("new", effect=effect, controls=[Effect("c", of=lambda v: 0.0, within=(-1, 1))], **WORDS)
    with pytest.raises(BadInputError, match="TOST"):
        Effect("e", of=lambda v: 0.0, within=(-1, 1), test="sign")


def test_what_an_experiment_must_return(registry: dict[str, Claim]) -> None:
    def number(seed: int) -> Any:
        return 3.0

    claim("toy", effect=Effect("e", of=lambda v: v["x"]), **WORDS)(number)
    with pytest.raises(BadInputError, match="must return an Outcome"):
        run_claim(registry["toy"])


def test_a_broken_curve_is_a_failure(registry: dict[str, Claim]) -> None:
    def experiment(seed: int) -> Outcome:
        return Outcome({"x": 1.0}, {"curve": ([0.0, 1.0], [1.0])})

    claim("toy", effect=Effect("e", of=lambda v: v["x"]), **WORDS)(experiment)
    assert "curve" in run_claim(registry["toy"]).failures[0]


def test_claims_are_found_by_id_and_alias() -> None:
    assert find_claim("dpo-optimum") is find_claim("S188") is find_claim("s188")
    with pytest.raises(BadInputError, match="nope"):
        find_claim("nope")


def test_every_claim_says_what_it_is() -> None:
    for each in load_claims().values():
        assert len(each.hypothesis) > 20 and len(each.paper) > 10 and len(each.title) > 5, each.id
        assert each.figure and each.setting, f"{each.id}: what the paper reports and what is known here"
        assert each.controls or each.effect.within, f"{each.id} has no negative control"
        assert each.budget <= 900, f"{each.id} may take more than 15 minutes"
        assert max(each.seeds) < 1000, f"{each.id}: seeds from 1000 on are for trying things out"
