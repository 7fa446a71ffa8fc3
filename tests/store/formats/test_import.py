"""What can be wrong with a file: the good rows come in, the bad ones are kept with a reason."""

from __future__ import annotations

import base64
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from corrigible.errors import BadInputError, Interrupted, StorageError
from corrigible.records import Annotator, comparison
from corrigible.store import Store
from corrigible.store.formats import IMPORTERS, import_file, sniff
from corrigible.store.formats import importing as importing_module
from corrigible.store.formats.registry import Importer, Row

Write = Callable[..., Path]


def pair(number: int) -> dict[str, str]:
    return {"prompt": f"Question {number}?", "chosen": f"good {number}", "rejected": f"bad {number}"}


def rejects(path: Path) -> list[dict[str, Any]]:
    file = path.with_name(path.name + ".rejects.jsonl")
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def test_bad_lines_are_kept_and_the_rest_is_imported(store: Store, write: Write) -> None:
    path = write(
        pair(1),
        '{"prompt": "cut off',
        {"prompt": "equal", "chosen": "same", "rejected": "same"},
        '["not", "an", "object"]',
        '{"prompt": "latin", "chosen": "caf\xe9", "rejected": "tea"}'.encode("latin-1"),
        {"prompt": "only"},
        {"prompt": 3, "chosen": "a", "rejected": "b"},
        '{"prompt": "x", "chosen": "\\ud800", "rejected": "b"}',
        '{"prompt": "x", "chosen": NaN, "rejected": "b"}',
        '{"prompt": "x", "prompt": "y", "chosen": "a", "rejected": "b"}',
        "[" * 100_000,
        {"prompt": [{"role": "user", "content": "hi", "mood": "good"}], "chosen": "a", "rejected": "b"},
        {**pair(1), "strength": 9},
        pair(2),
    )
    report = import_file(store, path)
    assert (report.format, report.read, report.added, report.rejected) == ("trl", 14, 2, 12)
    kept = rejects(path)
    assert [one["line"] for one in kept] == list(range(2, 14))
    reasons = {one["line"]: one["reason"] for one in kept}
    for line, words in {
        2: "not valid JSON",
        3: "are equal",
        4: "a JSON array where an object was expected",
        5: "not valid UTF-8: byte 0xe9 at position 34",
        6: "a prompt alone",
        7: "prompt is 3",
        8: "lone surrogate",
        9: "NaN",
        10: "'prompt' appears twice",
        11: "nested too deeply",
        12: "unknown key 'mood'",
        13: "strength",
    }.items():
        assert words in reasons[line], (line, reasons[line])
    source = path.read_bytes().split(b"\n")
    for one in kept:
        raw = base64.b64decode(one["raw_base64"]) if "raw_base64" in one else one["raw"].encode()
        assert raw == source[one["line"] - 1]
    assert {r.payload.kind for r in store.feedback()} == {"comparison"}  # type: ignore[union-attr]


def test_rejects_survive_another_run_and_are_not_doubled(store: Store, write: Write) -> None:
    path = write(pair(1), "broken")
    first = import_file(store, path)
    before = rejects(path)
    again = import_file(store, path)
    assert rejects(path) == before and len(before) == 1
    assert (first.added, again.added, again.existing, again.rejected) == (1, 0, 1, 1)
    write(pair(1), "broken differently")
    import_file(store, path)
    assert [one["raw"] for one in rejects(path)] == ["broken", "broken differently"]
    assert store.count_feedback() == 1


def test_repaired_file_adds_only_what_was_missing(store: Store, write: Write) -> None:
    import_file(store, write(pair(1), "broken", pair(3)))
    report = import_file(store, write(pair(1), pair(2), pair(3)))
    assert (report.added, report.existing) == (1, 2)


def test_repeated_rows_are_kept_once_and_said(store: Store, write: Write) -> None:
    report = import_file(store, write(pair(1), pair(1), pair(2)))
    assert (report.added, report.existing) == (2, 1)
    assert any("repeat exactly" in warning for warning in report.warnings)


def test_unknown_columns_are_named(store: Store, write: Write) -> None:
    report = import_file(
        store, write({**pair(1), "source": "web"}, {**pair(2), "source": "web", "split": "x"})
    )
    assert report.not_held == {"column 'source'": 2, "column 'split'": 1}


def test_envelope_columns_are_read(store: Store, write: Write) -> None:
    row = {**pair(1), "annotator": "ada", "criterion": "wit", "strength": 3, "rationale": "because"}
    import_file(store, write({**row, "task_id": "t", "created_at": "2024-05-01T12:00:00Z"}), campaign="pilot")
    (record,) = store.feedback()
    assert record.annotator.pseudonym == "ada" and record.campaign_id == "pilot" and record.task_id == "t"
    assert record.payload.strength == 3 and record.payload.criterion == "wit"  # type: ignore[union-attr]
    assert record.rationale == "because" and record.created_at == 1_714_564_800_000_000


def test_same_id_with_another_content_is_rejected_alone(store: Store, write: Write) -> None:
    who = Annotator(pseudonym="ada", type="human")
    one, items = comparison("q", "a", "b", annotator=who, created_at=1)
    other, more = comparison("q", "a", "c", annotator=who, created_at=1, id=one.id)
    fine, _ = comparison("q", "b", "c", annotator=who, created_at=1)
    lines = [{"corrigible": "item", "record": item.to_json()} for item in [*items, *more]]
    lines += [{"corrigible": "feedback", "record": r.to_json()} for r in (one, other, fine)]
    path = write(*lines)
    report = import_file(store, path)
    assert (report.added, report.rejected) == (2, 1)
    (kept,) = rejects(path)
    assert (
        "already holds a different" in kept["reason"] and json.loads(kept["raw"])["record"] == other.to_json()
    )
    assert {r.id for r in store.feedback()} == {one.id, fine.id}


def test_unknown_kind_is_kept_and_said(store: Store, write: Write) -> None:
    record, _ = comparison("q", "a", "b", annotator=Annotator(pseudonym="ada", type="human"))
    strange = {**record.to_json(), "kind": "telepathy", "payload": {"kind": "telepathy", "waves": [1, 2]}}
    report = import_file(store, write({"corrigible": "feedback", "record": strange}))
    assert report.added == 1 and "'telepathy'" in report.warnings[0]
    assert store.feedback_record(record.id).to_json()["payload"] == {"kind": "telepathy", "waves": [1, 2]}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"Dear diary,\ntoday\n", "not one of its first"),
        (b'{"a": 1}\n{"b": 2}\n', "keys a, b"),
        (b"\x00\x01\x02" * 100, "binary"),
        (b"\x89PNG", "PNG"),
        ('{"prompt": 1}'.encode("utf-16"), "UTF-16"),
        (b"PAR1 and nothing else", "not a readable Parquet"),
    ],
)
def test_wrong_files_are_refused_with_advice(store: Store, tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(BadInputError, match=words) as caught:
        import_file(store, path)
    assert caught.value.advice and store.count_feedback() == 0


def test_missing_path_and_unknown_format(store: Store, write: Write, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="does not exist"):
        import_file(store, tmp_path / "nowhere")
    with pytest.raises(BadInputError, match="no import format 'xml'"):
        import_file(store, write(pair(1)), format="xml")
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadInputError, match="folder"):
        import_file(store, tmp_path / "folder")


def test_truncated_gzip_imports_what_is_whole(store: Store, tmp_path: Path) -> None:
    noise = [{**pair(i), "rationale": os.urandom(50).hex()} for i in range(2000)]
    whole = gzip.compress("\n".join(map(json.dumps, noise)).encode())
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    report = import_file(store, path)
    assert report.rejected == 1 and "ends in the middle" in report.first_rejects[0]
    assert store.count_feedback() == report.read - 1 > 1000


@pytest.mark.parametrize(
    "size", [256 * 1024**2, pytest.param(2 * 1024**3, marks=pytest.mark.slow, id="2 GB")]
)
def test_huge_line_is_rejected_without_being_held(tmp_path: Path, size: int) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:  # a sparse file: the line is a hole of zeros
        file.write(json.dumps(pair(1)).encode() + b"\n")
        start = file.tell()
        file.seek(size, os.SEEK_CUR)
        file.write(b"\n" + json.dumps(pair(2)).encode() + b"\n")
    code = f"""
import json, resource
from corrigible.store import Store
from corrigible.store.formats import import_file
from corrigible.store.formats import tables
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with Store.open({str(tmp_path / "store.db")!r}) as store:
    report = import_file(store, {str(path)!r})
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([report.added, report.rejected, report.first_rejects, after - before]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added, rejected, reasons, grown = json.loads(done.stdout)
    assert (added, rejected) == (2, 1) and f"line 2: the line is {size:,} bytes" in reasons[0]
    assert grown < 200 * 1024  # KiB; the limit of a line is 64 MiB
    (kept,) = rejects(path)
    assert (kept["bytes"], kept["offset"]) == (size, start) and len(kept["raw_start"]) <= 2000


def test_limit_then_all_of_it(store: Store, write: Write) -> None:
    path = write(*(pair(i) for i in range(10)))
    assert import_file(store, path, limit=4).read == 4
    report = import_file(store, path)
    assert (report.read, report.added, report.resumed_at) == (10, 10, 4)
    assert store.count_feedback() == 10


def test_import_in_the_name_of_two_campaigns_gives_two_records(store: Store, write: Write) -> None:
    path = write(pair(1))
    import_file(store, path, campaign="a")
    import_file(store, path, campaign="b")
    assert store.count_feedback(campaign="a") == store.count_feedback(campaign="b") == 1


# --- cut short ------------------------------------------------------------------------------------


def slow(path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int, error: type[BaseException]) -> None:
    """Let reading fail at row ``stop_at``, and batches be small."""
    real = IMPORTERS["trl"]

    def read(source: Path, options: Mapping[str, Any]) -> Iterator[Row]:
        for row in real.read(source, options):
            if row.number == stop_at:
                raise error
            yield row

    monkeypatch.setitem(IMPORTERS, "trl", Importer("trl", "", read, real.parse, real.sniff))
    monkeypatch.setattr(importing_module, "_BATCH_ROWS", 10)


def test_ctrl_c_keeps_whole_batches_and_resumes(
    store: Store, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(*(pair(i) for i in range(20)), "broken", *(pair(i) for i in range(20, 50)))
    with monkeypatch.context() as patch:
        slow(path, patch, 36, KeyboardInterrupt)
        with pytest.raises(Interrupted, match="first 30 rows") as caught:
            import_file(store, path)
    assert caught.value.exit_code == 130 and "same command" in caught.value.advice
    assert store.count_feedback() == 29
    report = import_file(store, path)
    assert (report.resumed_at, report.read, report.added, report.rejected) == (30, 51, 50, 1)
    assert store.count_feedback() == 50 and len(rejects(path)) == 1


def test_from_start_reads_all_again(store: Store, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(*(pair(i) for i in range(30)))
    with monkeypatch.context() as patch:
        slow(path, patch, 25, KeyboardInterrupt)
        with pytest.raises(Interrupted):
            import_file(store, path)
    report = import_file(store, path, resume=False)
    assert (report.resumed_at, report.added, report.existing) == (0, 10, 20)


def test_kill_in_the_middle_loses_and_doubles_nothing(tmp_path: Path) -> None:
    rows = 4000
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps(pair(i)) + ("\nbroken\n" if i % 100 == 7 else "\n") for i in range(rows))
    )
    database = tmp_path / "store.db"
    code = f"""
from corrigible.store import Store
from corrigible.store.formats import importing, import_file
importing._BATCH_ROWS = 50
with Store.open({str(database)!r}) as store:
    print("go", flush=True)
    import_file(store, {str(path)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with Store.open(database) as store:
        deadline = time.monotonic() + 60
        while store.count_feedback() < 300 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        held = store.count_feedback()
        assert 0 < held < rows, "the kill came too early or too late to show anything"
        report = import_file(store, path)
        assert report.resumed_at > 0 and report.rejected == rows // 100
        prompts = [store.item(r.context or "").messages()[0].text for r in store.feedback()]
    assert sorted(prompts) == sorted(pair(i)["prompt"] for i in range(rows))
    lines = [one["line"] for one in rejects(path)]
    assert len(lines) == len(set(lines)) == rows // 100


def test_half_written_reject_line_is_written_again(store: Store, write: Write) -> None:
    path = write(pair(1), "broken")
    path.with_name("rows.jsonl.rejects.jsonl").write_text('{"source": "rows.jsonl", "line": 2, "rea')
    import_file(store, path)
    text = path.with_name("rows.jsonl.rejects.jsonl").read_text()
    assert json.loads(text.splitlines()[-1])["raw"] == "broken"


def test_store_out_of_space_keeps_what_was_committed(
    store: Store, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing_module, "_BATCH_ROWS", 10)
    path = write(*(pair(i) for i in range(40)))
    real, calls = store.transaction, 0

    def full() -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise StorageError("The store is full.", advice="Free some space.")
        return real()

    with monkeypatch.context() as patch:
        patch.setattr(store, "transaction", full)
        with pytest.raises(StorageError, match="full"):
            import_file(store, path)
    assert store.count_feedback() == 20
    report = import_file(store, path)
    assert (report.resumed_at, report.added) == (20, 40) and store.count_feedback() == 40


def test_full_disk_for_rejects_stops_before_the_batch_is_stored(store: Store, write: Write) -> None:
    path = write(pair(1), "broken")
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(StorageError, match=r"cannot be written: No space left"):
        import_file(store, path, rejects="/dev/full")
    assert store.count_feedback() == 0
    assert import_file(store, path).added == 1


def test_read_only_folders_send_rejects_to_the_working_folder(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(json.dumps(pair(1)) + "\nbroken\n")
    folder.chmod(0o555)
    monkeypatch.chdir(tmp_path)
    try:
        report = import_file(store, folder / "rows.jsonl")
    finally:
        folder.chmod(0o755)
    assert report.rejects_path == str(tmp_path / "rows.jsonl.rejects.jsonl")
    assert Path(report.rejects_path).exists()


# --- tables ---------------------------------------------------------------------------------------


def test_csv_with_everything_that_goes_wrong(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "votes.csv"
    path.write_bytes(
        "\ufeffprompt;response_a;response_b;winner;annotator\n"
        'Two lines?;"first\n\nsecond";"with ""quotes""";a;ada\n'
        "Short;one\n"
        "Who?;me;you;nobody;ada\n"
        'Open;"never closed;b;a;ada\n'
        "Tie?;x;y;tie;bob\n".encode()
        + "Latin;caf\xe9;tea;b;ada\n".encode("latin-1")
        + b"Same;x;x;a;ada\n"
        + b"Last;x;z;b;ada\n"
    )
    report = import_file(store, path)
    assert report.format == "csv" and (report.added, report.rejected) == (3, 5)
    reasons = {one["line"]: one["reason"] for one in rejects(path)}
    assert sorted(reasons) == [5, 6, 7, 9, 10]
    assert "2 cells" in reasons[5] and "nobody" in reasons[6] and "never closed" in reasons[7]
    assert "UTF-8" in reasons[9] and "equal" in reasons[10]
    texts = {store.item(t.sha256).text for r in store.feedback() for t in r.targets}
    assert "first\n\nsecond" in texts and 'with "quotes"' in texts


def test_ratings_from_a_table(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "ratings.tsv"
    path.write_text("prompt\tresponse\trating\nq\ta\t4\nq\tb\t9\n")
    report = import_file(store, path)
    assert (report.added, report.rejected) == (1, 1)
    (record,) = store.feedback()
    assert record.payload.value == 4 and record.payload.scale.max == 5  # type: ignore[union-attr]


def test_json_array_imports_up_to_what_is_broken(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([pair(1), pair(2), "text", pair(3)])[:-40])
    report = import_file(store, path)
    assert (report.added, report.rejected) == (2, 2)


def test_every_format_has_a_summary_and_sniffs_without_failing(write: Write) -> None:
    path = write({"nothing": "known"})
    for importer in IMPORTERS.values():
        assert importer.summary and importer.sniff(path, [{"nothing": "known"}]) is False
    with pytest.raises(BadInputError):
        sniff(path)
