from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from corrigible.cli import app
from corrigible.models import load_policy
from corrigible.records import PolicyVersion
from corrigible.store import Store

FAST = ["--max-tokens", "8", "--seed", "3"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny-random with an adapter that does something, saved."""
    policy = load_policy("tiny-random")
    policy.add_lora(rank=4)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("policy") / "adapter"
    policy.save_adapter(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"Say {word}.\n" for word in ("ant", "bee", "cat", "dog")))
    return file


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def test_an_adapter_against_its_base(adapter: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("--candidate", adapter, "--prompts", prompts, "-n", 2, "--out", out, "--json", *FAST)
    code, text, errors = run(*command)
    assert code == 0, errors
    found = json.loads(text)
    low, high = found["win_rate_interval"]
    assert 0 <= low <= found["win_rate"] <= high <= 1
    assert found["kl"]["on_policy"] and found["kl"]["sequences"] == 8
    assert found["scores"]["gold"]["difference"]["clusters"] == 4
    assert found["length"]["unit"] == "tokens"
    kept = json.loads((out / "evaluation.json").read_text())
    assert len(kept["win_rates"]["gold"]["items"]) == 8
    written = (out / "candidate.jsonl").read_text()
    code, again, _ = run(*command)
    assert code == 0 and json.loads(again) == found
    assert (out / "candidate.jsonl").read_text() == written, "kept answers are not sampled again"


def test_for_people_it_says_what_the_interval_says(adapter: Path, prompts: Path) -> None:
    code, text, _ = run("--candidate", adapter, "--baseline", adapter, "--prompts", prompts, *FAST)
    assert code == 0
    assert "not shown to be different" in text and "KL to the baseline: 0.000" in text


def test_one_prompt_has_no_interval_and_says_so(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Say ant.\n")
    command = ("--candidate", adapter, "--prompts", tmp_path / "p.txt", *FAST)
    code, text, errors = run(*command)
    assert code == 0, errors
    assert "(one prompt: no interval) nats" in text and "inf" not in text
    found = json.loads(run(*command, "--json")[1])
    assert found["kl"]["per_sequence"]["interval"] == [None, None]


def test_versions_of_a_store_and_answers_into_it(adapter: Path, prompts: Path, tmp_path: Path) -> None:
    url = tmp_path / "s.db"
    with Store.open(url) as store:
        blob = store.blobs.put_directory(adapter)
        versions = {"v1": None, "v2": blob}
        store.add_policies(
            PolicyVersion(name=name, base_model="tiny-random", weights="0" * 64, adapter=where)
            for name, where in versions.items()
        )
    code, text, errors = run(
        "--store", url, "--candidate", "v2", "--baseline", "v1", "--prompts", prompts, "--json", *FAST
    )
    assert code == 0, errors
    assert json.loads(text)["kl"]["per_sequence"]["value"] != 0
    with Store.open(url) as store:
        assert len(list(store.episodes(task="evaluate"))) == 8
        assert len(list(store.episodes(policy=store.policy("v2").id))) == 4


def test_a_learned_reward_decides_and_gold_stands_beside_it(
    adapter: Path, prompts: Path, tmp_path: Path
) -> None:
    from corrigible.records import Annotator, comparison
    from corrigible.rewards import RewardConfig, fit_reward
    from corrigible.store import load_pairs

    kim = Annotator(pseudonym="kim", type="human")
    with Store.open(tmp_path / "pairs.db") as store:
        for i in range(24):
            record, items = comparison(f"q{i}", f"zzz {i}", f"aa {i}", annotator=kim)
            store.add_feedback([record], items)
        pairs = load_pairs(store)
    reward = tmp_path / "reward"
    fit_reward(pairs, config=RewardConfig(backbone="tiny-random", text="response")).save(reward)
    judges = ("--judge", f"reward:{reward}", "--judge", "gold")
    code, text, errors = run("--candidate", adapter, "--prompts", prompts, *judges, "--json", *FAST)
    assert code == 0, errors
    found = json.loads(text)
    assert list(found["win_rates"]) == list(found["scores"]) == [f"reward:{reward}", "gold"]
    assert found["win_rate"] == found["win_rates"][f"reward:{reward}"]["value"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--judge", "taste"), 3, "no judge 'taste'"),
        (("--candidate", "tiny-random"), 3, "no adapter"),
        (("--prompts", "nowhere.txt"), 3, "nowhere.txt"),
        (("--store", "nowhere.db"), 5, "nowhere.db"),
        (("--candidate", "./nowhere"), 4, "nowhere"),
    ],
)
def test_bad_input_is_named(
    adapter: Path, prompts: Path, arguments: tuple[str, str], code: int, says: str
) -> None:
    given = {"--candidate": str(adapter), "--prompts": str(prompts), arguments[0]: arguments[1]}
    got, _, errors = run(*(part for pair in given.items() for part in pair), *FAST)
    assert (got, says in errors) == (code, True), errors


def test_a_prompt_longer_than_the_context_is_left_out_and_told(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("short\nalso short\n" + "long " * 2000 + "\n")
    code, text, errors = run("--candidate", adapter, "--prompts", tmp_path / "p.txt", "--json", *FAST)
    assert code == 3, errors
    assert json.loads(text)["win_rates"]["gold"]["not_judged"] == {"context_overflow": 1}


def test_a_line_that_is_no_prompt_is_named_and_the_rest_is_compared(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{broken\n{"prompt": "two"}\n')
    code, text, errors = run("--candidate", adapter, "--prompts", tmp_path / "p.jsonl", "--json", *FAST)
    assert code == 3 and "line 2 is skipped" in errors
    found = json.loads(text)
    assert found["prompts"] == 2 and [line[:14] for line in found["bad_lines"]] == ["p.jsonl line 2"]


def test_ctrl_c_keeps_answers_and_says_how_to_go_on(
    adapter: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from corrigible import models

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "generate", stopped)
    code, _, errors = run("--candidate", adapter, "--prompts", prompts, "--out", tmp_path / "o", *FAST)
    assert code == 130 and "goes on" in errors
