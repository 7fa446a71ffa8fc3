"""Results of claims: looks are counted, nothing is forgotten, what was interrupted goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from corrigible.claims import CLAIMS, Claim, Effect, claim, find_claim, load_claims, versions
from corrigible.claims.results import Results
from corrigible.errors import BadInputError


@pytest.fixture
def registry() -> Iterator[dict[str, Claim]]:
    load_claims()
    before = dict(CLAIMS)
    yield CLAIMS
    CLAIMS.clear()
    CLAIMS.update(before)


@pytest.fixture
def make(registry: dict[str, Claim]) -> Callable[..., Claim]:
    def made(experiment: Callable[[int], Any], **settings: Any) -> Claim:
        settings = {"effect": Effect("x", of=lambda v: v["x"]), "seeds": range(5), **settings}
        claim("toy", title="t", paper="p", hypothesis="h", **settings)(experiment)
        return registry["toy"]

    return made


def test_what_is_kept_comes_back(make: Any, tmp_path: Path) -> None:
    toy = make(lambda seed: {"x": 1.0 + seed})
    results = Results(tmp_path / "deep" / "er")
    assert results.read("toy") is None and list(results) == []
    ran = results.run(toy)
    [record] = list(results)
    assert record.id == "toy" and record.result["verdict"] == ran.verdict == "supported"
    assert record.runs == {run.seed: replace(run, seconds=round(run.seconds, 3)) for run in ran.runs}
    [entry] = record.history
    assert entry["look"] == 1 and entry["seeds"] == [0, 1, 2, 3, 4] and entry["kind"] == "first"
    assert entry["effect"] == 3.0 and entry["version"]["claim"] and entry["version"]["code"]
    assert [path.name for path in results.folder.iterdir()] == ["toy.json"], "no draft is left"


def test_more_seeds_are_a_further_look_at_a_stricter_level(make: Any, tmp_path: Path) -> None:
    ran: list[int] = []

    def experiment(seed: int) -> dict[str, float]:
        ran.append(seed)
        return {"x": float(seed)}

    toy, results = make(experiment), Results(tmp_path)
    with pytest.raises(BadInputError, match="no result"):
        results.run(toy, more=2)
    results.run(toy)
    second = results.run(toy, more=2)
    assert second.look == 2 and second.alpha == 0.0125 and second.seeds == (0, 1, 2, 3, 4, 5, 6)
    assert ran == [0, 1, 2, 3, 4, 5, 6], "what was run by the same code is not run again"
    again = results.run(toy)
    assert again.look == 2 and again.seeds == second.seeds, "to repeat what is known is no look"
    record = results.read("toy")
    assert record is not None
    assert [(entry["look"], entry["kind"]) for entry in record.history] == [
        (1, "first"),
        (2, "more seeds"),
        (2, "again"),
    ]
    assert results.run(toy, more=1).alpha == 0.00625


def test_a_claim_that_was_changed_is_a_further_look(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy, results = make(lambda seed: {"x": float(seed)}), Results(tmp_path)
    results.run(toy)
    assert results.up_to_date(toy)
    monkeypatch.setattr("corrigible.claims.results.claim_digest", lambda claim: "another")
    assert not results.up_to_date(toy)
    changed = results.run(toy)
    assert changed.look == 2
    record = results.read("toy")
    assert record is not None and record.history[1]["kind"] == "changed"


def test_a_change_elsewhere_is_no_look_but_runs_every_seed_again(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    def experiment(seed: int) -> dict[str, float]:
        ran.append(seed)
        return {"x": 1.0}

    toy, results = make(experiment), Results(tmp_path)
    results.run(toy)
    monkeypatch.setattr("corrigible.claims.results.code_digest", lambda claim: "another")
    assert not results.up_to_date(toy)
    assert results.run(toy, more=1).look == 2
    assert ran == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]


def test_to_mend_what_failed_is_the_same_look(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {"now": True}

    def experiment(seed: int) -> dict[str, float]:
        if broken["now"] and seed == 4:
            raise RuntimeError("no")
        return {"x": 1.0 + seed}

    toy, results = make(experiment), Results(tmp_path)
    assert results.run(toy).failures
    assert not results.up_to_date(toy)
    broken["now"] = False
    monkeypatch.setattr("corrigible.claims.results.claim_digest", lambda claim: "mended")
    mended = results.run(toy)
    assert mended.look == 1 and mended.verdict == "supported"


def test_what_was_interrupted_goes_on(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def experiment(seed: int) -> dict[str, float]:
        ran.append(seed)
        if len(ran) == 4:
            raise KeyboardInterrupt
        return {"x": 1.0}

    toy, results = make(experiment), Results(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        results.run(toy)
    assert results.read("toy") is None and list(results) == [], "a part of the seeds is no result"
    results.run(toy)
    assert ran == [0, 1, 2, 3, 3, 4]
    ran[:] = [0]
    with pytest.raises(KeyboardInterrupt):
        results.run(toy)
    monkeypatch.setattr("corrigible.claims.results.code_digest", lambda claim: "another")
    ran[:] = [0] * 10
    results.run(toy)
    assert ran[10:] == [0, 1, 2, 3, 4], "seeds of other code are not taken over"


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 1}', '{"schema": 9, "about": {}}'])
def test_a_file_that_is_no_result_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "S1.json").write_text(text)
    with pytest.raises(BadInputError, match=r"S1\.json"):
        Results(tmp_path).read("S1")


def test_results_are_plain_json(make: Any, tmp_path: Path) -> None:
    """An interval without ends (a sign test of few seeds) is no Infinity, which JSON does not know."""
    effect = Effect("x", of=lambda v: v["x"], test="sign")
    toy = make(lambda seed: {"x": 1.0}, effect=effect, seeds=range(7))
    Results(tmp_path).run(toy)

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    json.loads((tmp_path / "toy.json").read_text(), parse_constant=refuse)


def test_the_digest_sees_what_can_change_a_number() -> None:
    source = '''
"""Doc."""
from corrigible.claims.framework import Effect, claim

@claim("S1", title="a", paper="b", effect=Effect("e", of=lambda v: v["x"], above=1.0))
def s1(seed):
    """Doc."""
    return {"x": 1.0}  # a comment
'''
    same = source.replace("Doc.", "Other.").replace("# a comment", "").replace('title="a"', 'title="z"')
    assert versions._meaning(same) == versions._meaning(source)
    for old, new in (("above=1.0", "above=0.9"), ('{"x": 1.0}', '{"x": 2.0}'), ('"S1"', '"S2"')):
        assert versions._meaning(source.replace(old, new)) != versions._meaning(source)


def test_the_code_digest_follows_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "corrigible"
    for name, text in {
        "claims/s1.py": "from corrigible.align.loss import f",
        "align/loss.py": "import math\nfrom corrigible.align import other",
        "align/__init__.py": "import corrigible.never",
        "align/other.py": "x = 1",
        "store.py": "y = 1",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    monkeypatch.setattr(versions, "_PACKAGE", package)
    each = replace(find_claim("S188"), id="S1", module="corrigible.claims.s1")

    def digest() -> str:
        versions._read.cache_clear()
        return versions.code_digest(each)

    before = digest()
    (package / "store.py").write_text("y = 2")
    (package / "align" / "other.py").write_text("x = 1  # one")
    assert digest() == before
    (package / "align" / "other.py").write_text("x = 2")
    assert digest() != before
    versions._read.cache_clear()
