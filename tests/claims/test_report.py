"""The report: every claim is in it, refuted ones as refuted, with p values corrected for their number."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from corrigible.claims import CLAIMS, Claim, Effect, Outcome, claim, load_claims
from corrigible.claims.report import html, pages, table, write_report
from corrigible.claims.results import Results

KEYS = {"id", "verdict", "effect", "interval", "seeds", "seconds", "control"}


@pytest.fixture
def four(tmp_path: Path) -> Iterator[tuple[dict[str, Claim], Results]]:
    """One that holds, one that does not, one that fails and one that was not run."""
    load_claims()
    before = dict(CLAIMS)
    CLAIMS.clear()
    control = Effect("no <cause>", of=lambda v: v["all/control"], unit="points")
    effect = Effect("effect | of it", of=lambda v: v["all/method"] - v["all/base"], unit="points")
    words = {"title": "A <b>title</b>", "paper": "A & B", "hypothesis": "It is larger."}

    def experiment(sign: float) -> object:
        def of_seed(seed: int) -> Outcome:
            if sign == 0.0 and seed == 3:
                raise RuntimeError("fell over")
            small = 0.01 * (seed % 3)
            values = {
                "all/method": sign + small,
                "all/base": small,
                "all/control": small - 0.01,
                "alone": 1.0,
            }
            return Outcome(
                values, {"run/method": ([0.0, 1.0], [0.0, sign]), "run/base": ([0.0, 1.0], [0.0, small])}
            )

        return of_seed

    for id, sign in (("S1", 1.0), ("S2", -1.0), ("S3", 0.0), ("S4", 1.0)):
        claim(id, effect=effect, controls=[control], seeds=range(6), figure="f", setting="s", **words)(
            experiment(sign)  # type: ignore[arg-type]
        )
    results = Results(tmp_path / "results")
    for id in ("S1", "S2", "S3"):
        results.run(CLAIMS[id])
    yield dict(CLAIMS), results
    CLAIMS.clear()
    CLAIMS.update(before)


def test_the_table_says_what_came_out(four: tuple[dict[str, Claim], Results]) -> None:
    claims, results = four
    rows = table(claims, list(results))
    assert [row["verdict"] for row in rows] == ["supported", "not supported", "inconclusive", "not run"]
    assert all(row.keys() >= KEYS for row in rows)
    first = rows[0]
    assert first["effect"] == pytest.approx(1.0) and first["interval"] == pytest.approx([1.0, 1.0])
    assert first["seeds"] == 6 and first["control"]["name"] == "no <cause>" and not first["control"]["shown"]
    # Two p values were there: the smaller is doubled once for the look (p = 0 here stays 0) and once by Holm.
    assert rows[1]["p_holm"] == 1.0 and rows[2]["p"] is None and rows[2]["p_holm"] is None
    assert rows[3]["effect"] is None and rows[3]["looks"] == 0


def test_what_was_refuted_stays_when_its_claim_is_gone(four: tuple[dict[str, Claim], Results]) -> None:
    claims, results = four
    del claims["S2"]
    rows = {row["id"]: row for row in table(claims, list(results))}
    assert rows["S2"]["verdict"] == "not supported" and rows["S2"]["changed"]


def test_markdown_pages(four: tuple[dict[str, Claim], Results]) -> None:
    claims, results = four
    made = pages(claims, results, link="claims/")
    assert set(made) == {"index.md", "S1.md", "S2.md", "S3.md", "S4.md"}
    index = made["index.md"]
    for line in index.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 10, line
    assert "[`S2`](claims/S2.md)" in index and "**not supported**" in index and "**not run**" in index
    page = made["S1.md"]
    assert "effect \\| of it" in page and "## Every look" in page and "<svg" in page
    assert "| all/method |" in page and "Student" not in page
    # An effect plot, the two panels of values, the panel of curves.
    assert page.count("<svg") == 4
    for block in re.findall(r'<div class="claim-figure".*?</div>', page, re.DOTALL):
        assert "\n\n" not in block, "an empty line would end the HTML block"
    assert "fell over" in made["S3.md"] and "<svg" not in made["S4.md"]
    assert "<svg" not in pages(claims, results, plots=False)["S1.md"]


def test_one_html_file_that_needs_nothing_else(four: tuple[dict[str, Claim], Results]) -> None:
    claims, results = four
    text = html(claims, results)
    assert "A &lt;b&gt;title&lt;/b&gt;" in text and "<b>title</b>" not in text
    assert not re.search(r'(?:src|href)="(?!#)', text), "nothing is fetched"
    for id in claims:
        assert f'id="{id}"' in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "two figures share an id"


def test_write_report(four: tuple[dict[str, Claim], Results], tmp_path: Path) -> None:
    paths = write_report(*four, tmp_path / "out")
    assert {path.name for path in paths} == {"index.md", "S1.md", "S2.md", "S3.md", "S4.md", "report.html"}
    assert all(path.read_text(encoding="utf-8").strip() for path in paths)
