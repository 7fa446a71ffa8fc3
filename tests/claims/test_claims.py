"""Claims: the verdict follows the numbers, and the one we ship can come out against us."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from corrigible.claims import CLAIMS, Claim, claim, load_claims, run_claim
from corrigible.errors import BadInputError, NumericsError


def made(experiment: Callable[[int], float], control: Callable[[int], float]) -> Claim:
    return Claim("toy", "The effect is above 1.", "none", experiment, control, 1.0, tuple(range(5)))


@pytest.fixture
def registry() -> Iterator[dict[str, Claim]]:
    load_claims()
    before = dict(CLAIMS)
    yield CLAIMS
    CLAIMS.clear()
    CLAIMS.update(before)


@pytest.mark.parametrize(
    ("effect", "control", "verdict"),
    [
        (lambda seed: 2 + 0.1 * seed, lambda seed: 0.1 * seed, "supported"),
        (lambda seed: 0.5 + 0.01 * seed, lambda seed: 0.0, "not supported"),
        (lambda seed: float(seed), lambda seed: 0.0, "inconclusive"),
        (lambda seed: 2 + 0.1 * seed, lambda seed: 2 + 0.1 * seed, "inconclusive"),
        (lambda seed: 1.0, lambda seed: 0.0, "not supported"),
    ],
)
def test_the_verdict_follows_the_intervals(effect: Any, control: Any, verdict: str) -> None:
    assert run_claim(made(effect, control)).verdict == verdict


def test_the_interval_is_students_t() -> None:
    # 0, 1, 2, 3, 4: mean 2, s = sqrt(2.5), t(0.975, 4) = 2.776445, half width = t * s / sqrt(5)
    result = run_claim(made(lambda seed: float(seed), lambda seed: 0.0))
    assert result.effect == 2.0
    assert result.interval == pytest.approx((2 - 1.963243, 2 + 1.963243), abs=1e-5)


def test_a_failed_experiment_is_not_a_small_effect() -> None:
    with pytest.raises(NumericsError, match="seed 2"):
        run_claim(made(lambda seed: float("nan") if seed == 2 else 3.0, lambda seed: 0.0))


def test_names_are_unique_and_seeds_are_enough(registry: dict[str, Claim]) -> None:
    settings: dict[str, Any] = {"hypothesis": "", "paper": "", "control": lambda seed: 0.0, "threshold": 0.0}
    claim("toy", **settings)(lambda seed: 1.0)
    with pytest.raises(BadInputError, match="already"):
        claim("toy", **settings)
    for seeds in ([1, 2], [1, 1, 1]):
        with pytest.raises(BadInputError, match="three different seeds"):
            claim("other", **settings, seeds=seeds)


def test_dpo_reaches_the_optimum_and_coin_flips_do_not() -> None:
    result = run_claim(load_claims()["dpo-optimum"])
    assert result.verdict == "supported", str(result)
    assert result.control_interval[1] < 0.5


def test_a_wrong_sign_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The experiment has the power to fail: swap the sides and the claim does not hold."""
    from corrigible.claims import dpo_optimum

    right = dpo_optimum.dpo_loss

    def swapped(a: Any, b: Any, c: Any, d: Any, **rest: Any) -> Any:
        return right(b, a, d, c, **rest)

    monkeypatch.setattr(dpo_optimum, "dpo_loss", swapped)
    assert run_claim(load_claims()["dpo-optimum"]).verdict == "not supported"


def test_every_claim_says_its_hypothesis_and_paper() -> None:
    for each in load_claims().values():
        assert len(each.hypothesis) > 20 and len(each.paper) > 10 and len(each.seeds) >= 3


def test_command_line(run_cli: Callable[..., Any], registry: dict[str, Claim]) -> None:
    settings: dict[str, Any] = {
        "hypothesis": "h",
        "paper": "p",
        "control": lambda seed: 0.0,
        "threshold": 0.5,
    }
    claim("good", **settings)(lambda seed: 1.0)
    claim("bad", **settings)(lambda seed: 0.0)
    assert {"good", "bad", "dpo-optimum"} <= {
        each["name"] for each in json.loads(run_cli("claims", "list", "--json").stdout)["claims"]
    }
    good = run_cli("claims", "run", "good", "--json")
    assert good.exit_code == 0 and json.loads(good.stdout)["results"][0]["verdict"] == "supported"
    bad = run_cli("claims", "run", "good", "bad")
    assert bad.exit_code == 6 and "not supported" in bad.stdout and "bad" in bad.stderr
    assert run_cli("claims", "run", "nope").exit_code == 3
