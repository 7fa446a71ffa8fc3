"""``corrigible train dpo`` as a user meets it."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from corrigible.cli import app
from corrigible.cli.train import dpo
from corrigible.records import Annotator, comparison
from corrigible.store import Store

SMALL = ["--model", "tiny-random", "--lora-rank", "4", "--batch-size", "4"]


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["train", "dpo", *map(str, arguments)], prog_name="corrigible")


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


def test_defaults_of_the_command_are_those_of_the_library() -> None:
    import inspect

    from corrigible.align import DPOConfig, TrainConfig

    options = {
        name: p.default.default
        for name, p in inspect.signature(dpo).parameters.items()
        if name != "ctx" and name != "json"
    }
    for config in (TrainConfig(), DPOConfig()):
        for name, value in config.model_dump().items():
            if name in options and name != "steps":
                assert options[name] == value, name
