"""`corrigible train reward`, on a small slice of real comparisons and on input it cannot use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from corrigible.cli import app
from corrigible.rewards import RewardModel

runner = CliRunner()


def comparisons(path: Path, n: int) -> Path:
    """The answer with more z's is preferred."""
    rows = [
        {
            "prompt": f"question {i % 12}",
            "chosen": "z" * (2 + i % 5) + "abc" * (i % 3),
            "rejected": "abcd" * (1 + i % 4),
        }
        for i in range(n)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def train(*arguments: str) -> tuple[int, str, str]:
    result = runner.invoke(app, ["train", "reward", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_trains_tests_and_saves_a_tiny_model(tmp_path: Path) -> None:
    out = tmp_path / "rm"
    code, stdout, stderr = train(
        *("--data", str(comparisons(tmp_path / "c.jsonl", 72)), "--out", str(out)),
        *("--backbone", "tiny-random", "--text", "response", "--pooling", "mean", "--feature", "none"),
        *("--split", "prompt", "--held-out", "0.3", "--learning-curve", "--json"),
    )
    assert code == 0, stderr
    told = json.loads(stdout)
    assert told["config"]["features"] == [] and told["config"]["backbone"] == "tiny-random"
    assert told["accuracy"]["value"] > 0.8 and len(told["accuracy"]["interval"]) == 2
    assert set(told["baselines"]) == {"length", "tfidf"}
    assert {"difference", "accuracy"} == set(told["baselines"]["tfidf"])
    assert told["calibration"]["bins"] and [p["share"] for p in told["learning_curve"]][-1] == 1.0
    assert json.loads((out / "report.json").read_text()) == told
    model = RewardModel.load(out, device="cpu")
    scores = model.score_texts(["question 1"] * 2, ["zzzzzz", "abcdabcd"])
    assert scores[0] > scores[1]


def test_folds_and_the_table_for_people(tmp_path: Path) -> None:
    code, stdout, stderr = train(
        *("--data", str(comparisons(tmp_path / "c.jsonl", 48)), "--out", str(tmp_path / "rm")),
        *("--backbone", "tiny-random", "--text", "response", "--pooling", "mean", "--folds", "3"),
    )
    assert code == 0, stderr
    for words in ("reward model", "length alone", "bag of words", "95 % interval", "log-loss"):
        assert words in stdout
    assert "3-fold" in stderr


def test_full_tuning_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "rm"
    code, _, stderr = train(
        *("--data", str(comparisons(tmp_path / "c.jsonl", 40)), "--out", str(out)),
        *("--backbone", "tiny-random", "--tune", "lora", "--epochs", "1", "--lr", "0.001", "--json"),
    )
    assert code == 0, stderr
    assert not list((out / "work").glob("epochs-*"))  # only kept for a run that is cut short
    assert RewardModel.load(out, device="cpu").config.tune == "lora"


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--split", "row"], 3, "unknown split"),
        (["--backbone", "no-such-model"], 4, "no-such-model"),
        (["--tune", "half"], 3, "tune"),
        (["--feature", "vibes"], 3, "vibes"),
        (["--folds", "40"], 3, "40 are needed"),
        (["--criterion", "elegance"], 3, "no comparisons"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path: Path, options: list[str], code: int, says: str) -> None:
    got, _, stderr = train(
        *("--data", str(comparisons(tmp_path / "c.jsonl", 12)), "--out", str(tmp_path / "rm")), *options
    )
    assert got == code and says in stderr.replace("\n", " ")
    assert not (tmp_path / "rm" / "reward_model.json").exists()


def test_a_missing_store_is_said(tmp_path: Path) -> None:
    code, _, stderr = train("--store", str(tmp_path / "none.db"), "--out", str(tmp_path / "rm"))
    assert code in (3, 4, 5) and "none.db" in stderr.replace("\n", "")


@pytest.mark.parametrize("interrupted", ["read", "fit"])
def test_interrupted_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    from corrigible.rewards import table, training

    arguments = [
        *("--data", str(comparisons(tmp_path / "c.jsonl", 40)), "--out", str(tmp_path / "rm")),
        *("--backbone", "tiny-random", "--text", "response", "--pooling", "mean", "--json"),
    ]

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if interrupted == "read":
            patched.setattr(table.FeatureTable, "_add", stop)
        else:
            patched.setattr(training, "fit_linear", stop)
        code, _, stderr = train(*arguments)
        assert code == 130 and "Run the same command again" in stderr.replace("\n", " ")
    code, stdout, stderr = train(*arguments)
    assert code == 0 and json.loads(stdout)["accuracy"]["n"] > 0


@pytest.mark.data
@pytest.mark.weights
@pytest.mark.parametrize(
    ("source", "rule"),
    [("hh-rlhf/helpful-base_test.jsonl.gz", "prompt"), ("humour-pairs", "item")],
)
def test_real_comparisons(data_dir: Path, tmp_path: Path, source: str, rule: str) -> None:
    code, stdout, stderr = train(
        *("--data", str(data_dir / source), "--out", str(tmp_path / "rm")),
        *("--split", rule, "--limit", "60", "--held-out", "0.4", "--max-length", "64", "--json"),
    )
    assert code == 0, stderr
    told = json.loads(stdout)
    # So few pairs show that the path works, not how good the model is.
    assert told["split"] == rule and told["n_train"] > 10
    low, high = told["accuracy"]["interval"]
    assert 0 <= low <= told["accuracy"]["value"] <= high <= 1
    assert told["imported"][0]["added"] > 1000
