"""``corrigible train`` as a user meets it: DPO, and what every other algorithm has in common with it."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from corrigible.align import ALGORITHMS
from corrigible.cli import app
from corrigible.cli.train import FAMILIES, algorithm_commands
from corrigible.records import Annotator, comparison
from corrigible.store import Store

SMALL = ["--model", "tiny-random", "--lora-rank", "4", "--batch-size", "4"]


def invoke(*arguments: str | Path, algorithm: str = "dpo") -> Result:
    return CliRunner().invoke(app, ["train", algorithm, *map(str, arguments)], prog_name="corrigible")


def fill(path: Path, prompts: int = 12) -> Path:
    """A store with three votes on each of ``prompts`` pairs."""
    with Store.open(path) as store:
        for number in range(prompts):
            for annotator in ("ada", "bo", "cy"):
                sides = (f"yes {number}", f"no {number}")
                record, items = comparison(
                    f"Question {number}?",
                    *(sides if annotator != "cy" or number % 3 else sides[::-1]),
                    annotator=Annotator(pseudonym=annotator, type="human"),
                )
                store.add_feedback([record], items)
    return path


def test_it_trains_on_a_store_and_prints_accuracy_beside_the_baseline(tmp_path: Path) -> None:
    store = fill(tmp_path / "s.db")
    result = invoke("--store", store, "--out", tmp_path / "run", "--epochs", "2", *SMALL, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["train_pairs"] + said["held_out_pairs"] == 12 and said["split"] == "prompt"
    for name in ("implicit_reward_accuracy", "length_only_accuracy"):
        low, high = said[name]["interval"]
        assert 0 <= low <= said[name]["value"] <= high <= 1
    assert said["policy"]["trained_on"]["feedback"] == 3 * said["train_pairs"]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    with Store.open(store) as opened:
        assert [version.id for version in opened.policies()] == [said["policy"]["id"]]

    again = invoke("--store", store, "--out", tmp_path / "run", "--epochs", "2", *SMALL)
    assert again.exit_code == 3 and "already holds a run" in again.output and "--resume" in again.output
    resumed = invoke(
        "--store", store, "--out", tmp_path / "run", "--epochs", "2", *SMALL, "--resume", "--json"
    )
    assert resumed.exit_code == 0, resumed.output
    assert json.loads(resumed.stdout)["policy"] == said["policy"]


def test_for_people_it_prints_the_interval_and_what_to_do_next(tmp_path: Path) -> None:
    result = invoke("--store", fill(tmp_path / "s.db"), "--out", tmp_path / "run", "--steps", "2", *SMALL)
    assert result.exit_code == 0, result.output
    for text in ("implicit reward accuracy", "95 % interval", "length only", "corrigible lineage"):
        assert text in result.stdout


def test_nothing_held_out_prints_no_accuracy(tmp_path: Path) -> None:
    store = fill(tmp_path / "s.db")
    result = invoke(
        "--store",
        store,
        "--out",
        tmp_path / "run",
        "--steps",
        "1",
        "--held-out",
        "0",
        "--limit",
        "5",
        *SMALL,
        "--json",
    )
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["implicit_reward_accuracy"] is None and said["train_pairs"] == 5


def slice_of(data: Path, name: str, to: Path) -> Path:
    """The first lines of each file of a data set (whole topics where there are topics)."""
    source = data / name
    target = to / Path(name).name
    if source.is_file():
        with gzip.open(source, "rt") as lines, gzip.open(target, "wt") as out:
            out.writelines(line for _, line in zip(range(60), lines, strict=False))
        return target
    target.mkdir()
    for file in source.iterdir():
        if not file.name.startswith(("pairs", "votes")):
            shutil.copy(file, target / file.name)
            continue
        with gzip.open(file, "rt") as lines, gzip.open(target / file.name, "wt") as out:
            # Every 40th item: all topics stay, with all votes of the pairs that stay.
            for line in lines:
                row = json.loads(line)
                if hash_of(row) % 40 == 0:
                    out.write(line)
    return target


def hash_of(row: dict[str, Any]) -> int:
    from zlib import crc32

    return crc32(str(row.get("pair_id", row)).encode())


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("hh-rlhf/harmless-base_test.jsonl.gz", "prompt"),
        ("hh-rlhf/helpful-base_test.jsonl.gz", "prompt"),
        ("ukp-convarg1", "topic"),
        ("humour-pairs", "item"),
    ],
)
def test_real_comparisons(tmp_path: Path, data_dir: Path, name: str, split: str) -> None:
    data = slice_of(data_dir, name, tmp_path)
    result = invoke(
        "--data", data, "--out", tmp_path / "run", "--steps", "2", "--max-length", "1024", "--limit", "24",
        "--eval-limit", "12", "--held-out", "0.5", *SMALL, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["split"] == split
    assert 1 <= said["held_out_pairs"] <= 12 and 10 <= said["train_pairs"] <= 24
    assert 0 <= said["implicit_reward_accuracy"]["value"] <= 1
    assert said["imported"][0]["rejected"] == 0
    assert (tmp_path / "run" / "feedback.db").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--lr", "0"], 3, "--lr"),
        (["--beta", "0"], 3, "--beta"),
        (["--label-smoothing", "0.5"], 3, "--label-smoothing"),
        (["--split", "row"], 3, "row"),
        (["--moments", "float64"], 3, "--moments"),
        (["--model", "no/such/folder"], 4, ""),
        (["--epochs", "many"], 2, ""),
    ],
)
def test_bad_options_have_a_message_and_a_code(
    tmp_path: Path, arguments: list[str], code: int, says: str
) -> None:
    store = fill(tmp_path / "s.db")
    result = invoke("--store", store, "--out", tmp_path / "run", *SMALL, *arguments)
    assert result.exit_code == code, result.output
    assert says in result.output and "Traceback" not in result.output


def test_settings_that_save_memory_reach_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORRIGIBLE_CACHE", str(tmp_path / "cache"))
    less = ["--micro-batch-tokens", "300", "--gradient-checkpointing", "--moments", "bfloat16"]
    store = fill(tmp_path / "s.db")
    result = invoke("--store", store, "--out", tmp_path / "run", *SMALL, *less, "--reuse-reference", "--json")
    assert result.exit_code == 0, result.output
    train = json.loads(result.stdout)["policy"]["config"]["train"]
    assert (train["micro_batch_tokens"], train["gradient_checkpointing"]) == (300, True)
    assert (train["moments"], train["reuse_reference"]) == ("bfloat16", True)
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 1


def test_missing_and_empty_input(tmp_path: Path) -> None:
    assert invoke("--store", tmp_path / "none.db", "--out", tmp_path / "a", *SMALL).exit_code == 5
    with Store.open(tmp_path / "empty.db"):
        pass
    empty = invoke("--store", tmp_path / "empty.db", "--out", tmp_path / "b", *SMALL)
    assert empty.exit_code == 3 and "no comparisons" in empty.output and "corrigible judge" in empty.output
    assert invoke("--data", tmp_path / "none.jsonl", "--out", tmp_path / "c", *SMALL).exit_code == 3


def test_ctrl_c_exits_130_with_the_command_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    from corrigible.align import Trainer

    plain: Callable[..., dict[str, float]] = Trainer._step

    def step(self: Trainer, number: int) -> dict[str, float]:
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, number)

    monkeypatch.setattr(Trainer, "_step", step)
    store, out = fill(tmp_path / "s.db"), tmp_path / "my run"
    result = invoke("--store", store, "--out", out, "--steps", "6", *SMALL)
    assert result.exit_code == 130
    assert "Interrupted after step 3 of 6" in result.output
    flat = result.output.replace("\n", "")
    assert f"corrigible train dpo --out '{out}' --store {store}" in flat and flat.rstrip().endswith(
        "--resume"
    )
    monkeypatch.undo()
    resumed = invoke("--store", store, "--out", out, "--steps", "6", *SMALL, "--resume")
    assert resumed.exit_code == 0, resumed.output


@pytest.mark.parametrize("name", [name for name, entry in ALGORITHMS.items() if entry.signal != "groups"])
def test_defaults_of_the_command_are_those_of_the_library(name: str) -> None:
    import inspect

    from corrigible.align import TrainConfig, train

    options = {parameter.name: parameter for parameter in algorithm_commands(name)[name].params}
    for config in (TrainConfig, ALGORITHMS[name].config):
        for field, info in config.model_fields.items():
            option = options.get(field) or options[f"{name.replace('-', '_')}_{field}"]
            default = info.get_default(call_default_factory=True)
            if isinstance(default, bool | int | float | str):
                assert option.default == default, field
            assert option.help, field
    library = inspect.signature(train).parameters
    for field in ("lora_rank", "max_length", "model", "split"):
        assert options[field].default == library[field].default, field


# -- every algorithm ------------------------------------------------------------------------------------


def test_help_lists_every_algorithm_by_family() -> None:
    result = CliRunner().invoke(app, ["train", "--help"], prog_name="corrigible", env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    shown = result.stdout
    assert "│ reward " in shown
    for family, heading in FAMILIES.items():
        names = [name for name, entry in ALGORITHMS.items() if entry.family == family]
        panel = shown.partition(heading)[2].partition("╰")[0] if names else ""
        for name in names:
            assert f"│ {name} " in panel, f"{name} is not under {heading!r}"
    assert {entry.family for entry in ALGORITHMS.values()} <= set(FAMILIES)


def test_reward_needs_no_registry() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from corrigible.cli import app; "
        "app(['train', 'reward', '--help'], standalone_mode=False); "
        "print([name for name in ('torch', 'corrigible.align') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_an_unknown_algorithm_is_wrong_usage_and_the_nearest_is_named() -> None:
    result = CliRunner().invoke(app, ["train", "kdo", "--out", "x"], prog_name="corrigible")
    assert result.exit_code == 2 and "kto" in result.output


def thumbs(path: Path, count: int = 8) -> Path:
    """A store of thumbs up and down, each on another answer."""
    from corrigible.records import Feedback, Item, TargetRef

    with Store.open(path) as store:
        for number in range(count):
            question = Item.of_text(f"Question {number}?", "prompt")
            answer = Item.of_text(f"Answer {number}.", "response")
            record = Feedback.model_validate(
                {
                    "targets": [TargetRef(sha256=answer.sha256, type="response")],
                    "context": question.sha256,
                    "annotator": Annotator(pseudonym="ada", type="human"),
                    "payload": {"kind": "reaction", "value": 1 if number % 2 else -1},
                }
            )
            store.add_feedback([record], [question, answer])
    return path


def test_kto_learns_from_thumbs_and_says_so(tmp_path: Path) -> None:
    store = thumbs(tmp_path / "s.db")
    arguments = ["--store", store, "--out", tmp_path / "run", "--steps", "2", *SMALL]
    result = invoke(*arguments, "--undesirable-weight", "1.5", "--json", algorithm="kto")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["learns_from"] == "labelled" and said["train_signals"] == 8
    assert said["held_out_pairs"] == 0 and said["implicit_reward_accuracy"] is None
    assert said["policy"]["algorithm"] == "kto"
    assert said["policy"]["config"]["kto"]["undesirable_weight"] == 1.5
    assert said["policy"]["trained_on"]["feedback"] == 8
    shown = invoke(*arguments, "--undesirable-weight", "1.5", "--resume", algorithm="kto")
    assert shown.exit_code == 0 and "trained on   8 answers from 8 judgements" in shown.stdout


def test_kto_on_comparisons_is_measured_on_those_held_out(tmp_path: Path) -> None:
    store = fill(tmp_path / "s.db")
    arguments = ["--store", store, "--out", tmp_path / "run", "--steps", "2", *SMALL]
    result = invoke(*arguments, "--json", algorithm="kto")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    held_out = said["held_out_pairs"]
    assert held_out > 0 and said["implicit_reward_accuracy"]["n"] <= held_out
    # Three votes a pair, on two answers: what is learnt from is on the other pairs alone.
    assert said["policy"]["trained_on"]["feedback"] == 3 * (12 - held_out)


def test_what_a_store_holds_and_who_can_use_it(tmp_path: Path) -> None:
    result = invoke("--store", thumbs(tmp_path / "s.db"), "--out", tmp_path / "run", *SMALL, "--json")
    assert result.exit_code == 3
    told = json.loads(result.stdout)["error"]
    assert "it holds 8 reaction" in told["message"] and "no comparisons" in told["message"]
    assert "kto" in told["advice"]


def test_a_criterion_that_nobody_judged_by_is_named(tmp_path: Path) -> None:
    arguments = ["--store", thumbs(tmp_path / "s.db"), "--out", tmp_path / "run", *SMALL]
    result = invoke(*arguments, "--criterion", "humour", algorithm="kto")
    assert result.exit_code == 3 and "'humour'" in result.output
    overall = invoke(*arguments, "--criterion", "overall", "--steps", "1", algorithm="kto")
    assert overall.exit_code == 0, overall.output


def test_the_online_one_says_what_it_needs() -> None:
    result = invoke(algorithm="grpo")
    assert result.exit_code == 3 and "GroupSource" in result.output
    shown = CliRunner().invoke(app, ["train", "grpo", "--help"], prog_name="corrigible")
    assert shown.exit_code == 0 and "no command for it yet" in " ".join(shown.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--desirable-weight", "-1"], 2, "--desirable-weight"),
        (["--beta", "0"], 3, "--beta: Input should be greater than 0"),
        (["--label-smoothing", "0.1"], 2, "--label-smoothing"),
        (["--schedule", "zigzag"], 3, "--schedule"),
    ],
)
def test_options_of_one_algorithm_are_its_own(
    tmp_path: Path, arguments: list[str], code: int, says: str
) -> None:
    result = invoke("--out", tmp_path / "run", *SMALL, *arguments, algorithm="kto")
    assert result.exit_code == code, result.output
    assert says in " ".join(result.output.split())


def test_the_command_to_go_on_repeats_what_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from corrigible.align import Trainer
    from corrigible.align.interrupts import Stopped

    def stop(self: Trainer, number: int) -> dict[str, float]:
        raise Stopped

    monkeypatch.setattr(Trainer, "_step", stop)
    store = thumbs(tmp_path / "s.db")
    typed = [
        "--store",
        str(store),
        "--out",
        str(tmp_path / "run"),
        "--betas",
        "0.8",
        "0.95",
        "--no-share-prompts",
    ]
    result = invoke(*typed, "--model", "tiny-random", algorithm="kto")
    assert result.exit_code == 130, result.output
    flat = result.output.replace("\n", "").replace(" ", "")
    for words in ("corrigible train kto", "--betas 0.8 0.95", "--no-share-prompts", "--resume"):
        assert words.replace(" ", "") in flat, words
