"""The real feedback: every file comes in with one call, and nothing in it is guessed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from corrigible.records import AGGREGATE
from corrigible.store import Store
from corrigible.store.formats import export_file, import_file

pytestmark = pytest.mark.data


def test_hh_rlhf_comes_back_byte_for_byte(store: Store, tmp_path: Path, data_dir: Path) -> None:
    source = data_dir / "hh-rlhf" / "helpful-base_test.jsonl.gz"
    report = import_file(store, source, rejects=tmp_path / "rejects.jsonl")
    assert (report.format, report.read, report.added) == ("hh-rlhf", 1690, 1688)
    assert report.rejected == 2 and "equal" in report.first_rejects[0]
    export_file(store, tmp_path / "back.jsonl", format="hh-rlhf")
    with gzip.open(source, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    decided = {(row["chosen"], row["rejected"]) for row in rows if row["chosen"] != row["rejected"]}
    text = (tmp_path / "back.jsonl").read_text("utf-8")
    assert {(r["chosen"], r["rejected"]) for r in map(json.loads, text.splitlines())} == decided
    for record in store.feedback(limit=200):
        assert record.task_id is not None and record.task_id.startswith("hh:")
        assert store.item(record.context or "").messages()[-1].role == "user"


def test_ukp_votes_keep_worker_reason_and_tie(store: Store, tmp_path: Path, data_dir: Path) -> None:
    report = import_file(store, data_dir / "ukp-convarg1", limit=1500, rejects=tmp_path / "rejects.jsonl")
    assert (report.format, report.read, report.rejected) == ("ukp-convarg1", 1500, 0)
    records = list(store.feedback())
    assert {r.annotator.pseudonym[0] for r in records} == {"W"} and len(
        {r.annotator.pseudonym for r in records}
    ) > 20
    assert all(r.rationale and r.task_id and r.payload.criterion == "convincing" for r in records)  # type: ignore[union-attr]
    assert {"tie", "first", "second"} == {r.payload.outcome for r in records}  # type: ignore[union-attr]
    with gzip.open(data_dir / "ukp-convarg1" / "votes.jsonl.gz", "rt") as file:
        votes = [json.loads(line) for _, line in zip(range(1500), file, strict=False)]
    ties = sum(vote["value"] == "equal" for vote in votes)
    assert sum(r.payload.outcome == "tie" for r in records) == ties  # type: ignore[union-attr]
    with gzip.open(data_dir / "ukp-convarg1" / "arguments.jsonl.gz", "rt") as file:
        texts = {row["arg_id"]: row["text"] for row in map(json.loads, file)}
    by_reason = {r.rationale: r for r in records}
    for vote in votes[:100]:
        if vote["value"] == "equal":
            continue
        record = by_reason[vote["reason"]]
        winner = record.targets[0 if record.payload.outcome == "first" else 1]  # type: ignore[union-attr]
        assert (
            store.item(winner.sha256).text
            == texts[vote["pair_id"].split("_")[0 if vote["value"] == "a1" else 1]]
        )
    assert report.not_held["vote.turkCompetence"] == 1500


def test_humour_pairs_keep_the_share_of_votes(store: Store, tmp_path: Path, data_dir: Path) -> None:
    report = import_file(store, data_dir / "humour-pairs", limit=500, rejects=tmp_path / "rejects.jsonl")
    assert (report.format, report.added, report.rejected) == ("humour-pairs", 500, 0)
    with gzip.open(data_dir / "humour-pairs" / "items.jsonl.gz", "rt") as file:
        texts = {row["item_id"]: row["text"] for row in map(json.loads, file)}
    with gzip.open(data_dir / "humour-pairs" / "pairs.jsonl.gz", "rt") as file:
        pairs = [json.loads(line) for _, line in zip(range(500), file, strict=False)]
    wanted = {
        frozenset({texts[p["item_a"]], texts[p["item_b"]]}): (
            texts[p["item_a"]],
            p["votes_a"] / (p["votes_a"] + p["votes_b"]),
            p["votes_a"] + p["votes_b"],
        )
        for p in pairs
    }
    for record in store.feedback():
        first, second = (store.item(target.sha256).text for target in record.targets)
        a, share, votes = wanted[frozenset({first, second})]  # type: ignore[arg-type]
        share = share if first == a else 1 - share
        assert record.payload.p_first == pytest.approx(share)  # type: ignore[union-attr]
        assert record.annotator.groups == {AGGREGATE, f"votes:{votes}"}
