"""Out and in again: exactly the same where the format can hold it, and an honest account where not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corrigible.errors import BadInputError, StorageError
from corrigible.records import (
    AGGREGATE,
    Annotator,
    Comparison,
    Critique,
    Demonstration,
    Effort,
    Episode,
    Feedback,
    Item,
    Label,
    Message,
    NotJudged,
    NotJudgedReason,
    Presentation,
    Ranking,
    Rating,
    Reaction,
    Scale,
    Span,
    Spans,
    Step,
    TargetRef,
    comparison,
)
from corrigible.store import Store
from corrigible.store.formats import EXPORTERS, export_file, import_file
from corrigible.store.formats.hh_rlhf import parse_transcript, write_transcript

Write = Callable[..., Path]
LOSSLESS = ("corrigible", "csv", "parquet", "hf-dataset")
ADA = Annotator(pseudonym="ada", type="human", groups=frozenset({"expert"}))


def fill(store: Store) -> dict[str, Feedback]:
    """Judgements of many kinds, with awkward text and full envelopes."""
    prompt = Item.of_messages(
        [Message(role="system", content="Be brief."), Message(role="user", content='"é"\n, 🤖')]
    )
    texts = [
        Item.of_text(text, "response")
        for text in ('a "quoted", line\r\n  \r\n\nand\ttab', "=1+1", "\u2028 line", "ünï")
    ]
    refs = [TargetRef.of(item, role="candidate") for item in texts]
    common: dict[str, Any] = {"annotator": ADA, "context": prompt.sha256}
    one = [
        Feedback.on(
            refs[:2],
            Comparison(outcome="first", strength=2, criterion="wit"),
            presentation=Presentation(order=(1, 0), shown_at=5, seed=3),
            effort=Effort(active_ms=1200, keys=3),
            confidence=0.7,
            rationale="shorter, and [sharper]",
            task_id="task [1]",
            campaign_id="pilot",
            created_at=1_700_000_000_000_000,
            **common,
        ),
        Feedback.on(refs[1:3], Comparison(outcome="tie"), **common),
        Feedback.on(refs, Ranking(levels=((2,), (0, 1), (3,))), **common),
        Feedback.on(refs[:1], Rating(value=4, scale=Scale(id="likert", min=1, max=7, step=1)), **common),
        Feedback.on(refs[1:2], Reaction(value=-1, tags=("rude",)), **common),
        Feedback.on(refs[2:3], Critique(text='too long,\n"really"'), **common),
        Feedback.on(refs[3:], Spans(spans=(Span(start=0, end=2, label="typo"),)), **common),
        Feedback.on(refs[:1], Label(values=("safe",), action="confirm"), **common),
        Feedback.on(refs[:1], NotJudged(intended="rating", reason=NotJudgedReason.skipped), **common),
        Feedback.on(refs[:1], Demonstration(source="expert"), **common),
    ]
    aggregate = Annotator(pseudonym="aggregate:x", type="human", groups=frozenset({AGGREGATE}))
    votes, items = comparison("q", "a", "b", annotator=aggregate, p_chosen=0.8)
    store.add_feedback([*one, votes], [prompt, *texts, *items])
    return {record.id: record for record in store.feedback(status=None)}


@pytest.mark.parametrize("format", LOSSLESS)
def test_everything_comes_back(store: Store, tmp_path: Path, format: str) -> None:
    records = fill(store)
    report = export_file(store, tmp_path / "out", format=format)
    assert (report.written, report.skipped, report.not_held) == (len(records), 0, {})
    with Store.open(tmp_path / "other.db") as other:
        back = import_file(other, tmp_path / "out")
        assert (back.format, back.rejected) == (format, 0)
        assert {record.id: record for record in other.feedback(status=None)} == records
        for record in records.values():
            for target in record.targets:
                assert other.item(target.sha256).text == store.item(target.sha256).text
        again = import_file(other, tmp_path / "out")
        assert again.added == 0


@pytest.mark.parametrize("format", ["argilla", "label-studio"])
def test_labelling_tools_hold_whole_records_of_the_kinds_they_know(
    store: Store, tmp_path: Path, format: str
) -> None:
    records = fill(store)
    report = export_file(store, tmp_path / "out.json", format=format)
    assert report.written + report.skipped == len(records) and report.written >= 6
    assert sum(report.not_held.values()) == report.skipped
    with Store.open(tmp_path / "other.db") as other:
        back = import_file(other, tmp_path / "out.json")
        assert back.format == format and back.rejected == 0
        got = {record.id: record for record in other.feedback()}
        assert len(got) == report.written and all(records[name] == record for name, record in got.items())


def test_an_answer_changed_in_the_tool_is_a_new_judgement(store: Store, tmp_path: Path) -> None:
    record, items = comparison("q", "good", "bad", annotator=ADA)
    store.add_feedback([record], items)
    for format, change in (
        ("argilla", lambda rows: rows[0]["responses"]["overall"][0].update(value="tie")),
        (
            "label-studio",
            lambda rows: rows[0]["annotations"][0]["result"][0].update(
                type="choices", value={"choices": ["tie"]}
            ),
        ),
    ):
        path = tmp_path / f"{format}.json"
        export_file(store, path, format=format)
        rows = json.loads(path.read_text())
        change(rows)
        path.write_text(json.dumps(rows))
        with Store.open(tmp_path / f"{format}.db") as other:
            import_file(other, path)
            (got,) = other.feedback()
            assert got.id != record.id and got.payload.outcome == "tie"  # type: ignore[union-attr]
            assert got.targets[0].sha256 in {t.sha256 for t in record.targets}


def test_corrigible_holds_episodes_policies_and_status(store: Store, tmp_path: Path) -> None:
    message = Message(role="assistant", content="four")
    step = Step(observation=(Message(role="user", content="2+2?"),), action=message, done=True)
    lone = Episode(task="sums", steps=(step,))
    store.add_episodes([lone])
    records = list(fill(store).values())
    store.withdraw(records[0].id, by="ada")
    store.add_items([Item.of_text("nobody points here")])
    report = export_file(store, tmp_path / "all.jsonl.gz", format="corrigible")
    assert report.written == len(records)
    with Store.open(tmp_path / "other.db") as other:
        import_file(other, tmp_path / "all.jsonl.gz")
        assert other.episode(lone.id) == lone
        assert other.feedback_record(records[0].id).status == "withdrawn"
        assert other.count_feedback() == len(records) - 1
        assert other.item(Item.of_text("nobody points here").sha256)


TRL_ROWS: dict[str, tuple[dict[str, str], list[dict[str, Any]]]] = {
    "plain preference": (
        {"style": "plain"},
        [{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}],
    ),
    "plain implicit preference": (
        {"style": "plain", "prompt": "implicit"},
        [{"chosen": "The sky is blue.", "rejected": "The sky is green."}],
    ),
    "conversational preference": (
        {},
        [
            {
                "prompt": [{"role": "user", "content": "Colour?"}],
                "chosen": [{"role": "assistant", "content": "Blue."}],
                "rejected": [{"role": "assistant", "content": "Green."}],
            }
        ],
    ),
    "conversational implicit preference": (
        {"prompt": "implicit"},
        [
            {
                "chosen": [
                    {"role": "user", "content": "Colour?"},
                    {"role": "assistant", "content": "Blue."},
                ],
                "rejected": [
                    {"role": "user", "content": "Colour?"},
                    {"role": "assistant", "content": "Green."},
                ],
            }
        ],
    ),
    "unpaired": (
        {"style": "plain"},
        [
            {"prompt": "The sky is", "completion": " blue.", "label": True},
            {"prompt": "The sky is", "completion": " green.", "label": False},
        ],
    ),
    "conversational unpaired": (
        {},
        [
            {
                "prompt": [{"role": "user", "content": "Colour?"}],
                "completion": [{"role": "assistant", "content": "Blue."}],
                "label": True,
            }
        ],
    ),
    "stepwise": (
        {"style": "plain"},
        [
            {
                "prompt": "Which is larger, 9.8 or 9.11?",
                "completions": ["Compare tenths.", "8 < 1.", "So 9.11."],
                "labels": [True, False, False],
            }
        ],
    ),
    "prompt-completion": ({"style": "plain"}, [{"prompt": "The sky is", "completion": " blue."}]),
    "language modelling": (
        {"type": "language-modeling"},
        [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}],
    ),
    "plain language modelling": (
        {"type": "language-modeling", "style": "plain"},
        [{"text": "The sky is blue."}],
    ),
}


@pytest.mark.parametrize("name", TRL_ROWS)
def test_trl_rows_come_back(store: Store, write: Write, tmp_path: Path, name: str) -> None:
    options, rows = TRL_ROWS[name]
    assert import_file(store, write(*rows), format="trl").rejected == 0
    report = export_file(store, tmp_path / "back.jsonl", format="trl", options=options)
    assert report.skipped == 0
    back = [json.loads(line) for line in (tmp_path / "back.jsonl").read_text().splitlines()]
    assert sorted(back, key=json.dumps) == sorted(rows, key=json.dumps)


@pytest.mark.parametrize("container", ["csv", "parquet", "hf-dataset", "hf-dict", "json"])
def test_same_rows_in_any_container_are_the_same_records(
    store: Store, write: Write, tmp_path: Path, container: str
) -> None:
    rows = TRL_ROWS["plain preference"][1] + [{"prompt": "1+1", "chosen": "2", "rejected": "3"}]
    import_file(store, write(*rows))
    wanted = {record.id for record in store.feedback()}
    path = tmp_path / "table"
    if container == "json":
        path.write_text(json.dumps(rows, indent=2))
    elif container == "csv":
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif container == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        import datasets

        first, second = (datasets.Dataset.from_list([row]) for row in rows)
        if container == "hf-dict":
            datasets.DatasetDict({"train": first, "test": second}).save_to_disk(str(path))
        else:
            datasets.Dataset.from_list(rows).save_to_disk(str(path))
    report = import_file(store, path)
    assert (report.added, report.existing, report.rejected) == (0, 2, 0)
    assert {record.id for record in store.feedback()} == wanted


def test_openai_rows_come_back(store: Store, write: Write, tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    rows: list[Mapping[str, Any]] = [
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "weather?"},
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "content": "sun", "tool_call_id": "1"},
                {"role": "assistant", "content": "Sunny."},
            ]
        },
        {
            "input": {"messages": [{"role": "user", "content": "Hi"}]},
            "preferred_output": [{"role": "assistant", "content": "Hello!"}],
            "non_preferred_output": [{"role": "assistant", "content": "What?"}],
        },
    ]
    bad = {"messages": [{"role": "user", "content": "no answer"}]}
    tools = {**rows[1], "input": {**rows[1]["input"], "tools": [{"type": "function"}]}}  # type: ignore[dict-item]
    report = import_file(store, write(*rows, bad, tools))
    assert report.format == "openai-chat" and (report.added, report.rejected) == (3, 1)
    assert report.not_held == {"input.tools": 1} and "does not end with" in report.first_rejects[0]
    export_file(store, tmp_path / "back.jsonl", format="openai-chat")
    back = [json.loads(line) for line in (tmp_path / "back.jsonl").read_text().splitlines()]
    assert all(row in back for row in rows)


def test_account_of_what_a_format_cannot_hold(store: Store, tmp_path: Path) -> None:
    fill(store)
    report = export_file(store, tmp_path / "pairs.jsonl", format="trl", kind="comparison")
    assert (report.written, report.skipped) == (2, 1)
    lost = report.not_held
    assert lost["comparison: outcome tie, no winner"] == 1
    for what in ("rationale", "confidence", "presentation", "effort", "task_id", "campaign_id"):
        assert lost[what] == 1, what
    assert lost["comparison.strength"] == lost["comparison.criterion"] == lost["comparison.p_first"] == 1
    assert lost["annotator"] == lost["id"] == 2


@pytest.mark.parametrize("format", sorted(EXPORTERS))
def test_the_account_says_what_importing_it_again_will_do(store: Store, tmp_path: Path, format: str) -> None:
    fill(store)
    report = export_file(store, tmp_path / f"out.{format}", format=format, kind="comparison")
    again = import_file(store, tmp_path / f"out.{format}", format=format)
    assert again.added == (0 if "adds nothing" in report.reimport else report.written)
    assert ("adds nothing" in report.reimport) == ("id" not in report.not_held), report.reimport
    nothing = export_file(store, tmp_path / "none", format=format, annotator="nobody")
    assert (nothing.written, nothing.reimport) == (0, "")


def test_rows_as_they_once_came_in_are_known_again(store: Store, write: Write, tmp_path: Path) -> None:
    import_file(store, write({"prompt": "q", "chosen": "a", "rejected": "b"}))
    report = export_file(store, tmp_path / "out.jsonl", format="trl", options={"style": "plain"})
    assert "but for rows that are word for word" in report.reimport
    assert import_file(store, tmp_path / "out.jsonl").added == 0


def test_wrong_exports_are_refused_and_leave_nothing(store: Store, tmp_path: Path) -> None:
    fill(store)
    for format, options, words in (
        ("xml", {}, "no export format"),
        ("trl", {"styl": "plain"}, "no option 'styl'"),
        ("trl", {"style": "fancy"}, "option style"),
        ("trl", {"type": "poem"}, "no type 'poem'"),
    ):
        with pytest.raises(BadInputError, match=words):
            export_file(store, tmp_path / "out", format=format, options=options)
    (tmp_path / "there").write_text("mine")
    with pytest.raises(BadInputError, match="exists already"):
        export_file(store, tmp_path / "there", format="csv")
    assert (tmp_path / "there").read_text() == "mine"
    export_file(store, tmp_path / "there", format="csv", overwrite=True)
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".partial") or p.name == "out"]


def test_a_store_is_not_overwritten_by_its_own_export(tmp_path: Path) -> None:
    with Store.open(tmp_path / "s.db") as store:
        fill(store)
        before = store.count_feedback(status=None)
        (tmp_path / "link.db").symlink_to(tmp_path / "s.db")
        for name in ("s.db", "s.db-wal", "s.db.blobs", "link.db"):
            with pytest.raises(BadInputError, match="part of the store"):
                export_file(store, tmp_path / name, format="corrigible", overwrite=True)
    with Store.open(tmp_path / "s.db", create=False) as store:
        assert store.count_feedback(status=None) == before > 0


def test_full_disk_leaves_no_half_file(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    (tmp_path / "there").write_text("mine")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("corrigible.store.formats.exporting.os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        export_file(store, tmp_path / "there", format="corrigible", overwrite=True)
    assert (tmp_path / "there").read_text() == "mine"
    assert not list(tmp_path.glob(".*.partial"))


def test_every_exporter_writes_an_empty_store(store: Store, tmp_path: Path) -> None:
    for name in EXPORTERS:
        report = export_file(store, tmp_path / name, format=name)
        assert report.written == 0 and (tmp_path / name).exists()


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(lambda text: "\n\n" not in text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), _TEXT), min_size=1, max_size=6))
def test_transcripts_are_inverse(turns: list[tuple[Any, str]]) -> None:
    messages = tuple(Message(role=role, content=text) for role, text in turns)
    try:
        text = write_transcript(messages)
    except BadInputError:
        return
    assert parse_transcript(text) == messages


def test_transcript_refuses_what_would_read_as_another_turn() -> None:
    for content in ("ok\n\nHuman: me", "\n\nAssistant: me"):
        with pytest.raises(BadInputError, match="start of a turn"):
            write_transcript((Message(role="user", content=content),))
    with pytest.raises(BadInputError, match="system"):
        write_transcript((Message(role="system", content="x"),))
    with pytest.raises(BadInputError, match="does not begin"):
        parse_transcript("hello")
