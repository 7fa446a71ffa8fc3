"""The fast claims, run as they are: each comes out as the result that the project publishes."""

from __future__ import annotations

from pathlib import Path

import pytest

from corrigible.claims import load_claims, run_claim
from corrigible.claims.results import Results

PUBLISHED = Results(Path(__file__).parents[2] / "docs" / "claims" / "results")
FAST = [each for each in load_claims().values() if each.fast]


@pytest.mark.parametrize("each", FAST, ids=lambda each: each.id)
def test_a_fast_claim_comes_out_as_published(each) -> None:  # type: ignore[no-untyped-def]
    record = PUBLISHED.read(each.id)
    assert record is not None, f"make claims publishes {each.id}"
    newest = record.history[-1]
    result = run_claim(each, newest["seeds"], look=newest["look"])
    assert result.verdict == record.result["verdict"], str(result)
    assert result.effect is not None
    # Other processors and libraries round otherwise; they do not move a mean by a tenth of its interval.
    low, high = record.result["effect"]["interval"]
    room = 0.1 * (high - low) + 1e-6
    assert abs(result.effect.effect - record.result["effect"]["effect"]) <= room


def test_the_budgets_of_fast_claims_are_those_of_a_test_run() -> None:
    assert sum(each.budget for each in FAST) <= 360
