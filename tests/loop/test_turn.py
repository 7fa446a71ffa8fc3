from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from corrigible.cli import app
from corrigible.cli.demo import _show, next_commands
from corrigible.errors import BadInputError
from corrigible.events import AnyEvent, EventBus, use_bus
from corrigible.loop.registry import Registry
from corrigible.loop.turn import Turn, TurnConfig, clearest
from corrigible.store import Store, load_pairs

pytestmark = pytest.mark.weights  # the reward model reads with MiniLM

TINY = TurnConfig(
    model="tiny-random",
    train_prompts=12,
    held_out=8,
    answers=3,
    pairs_per_prompt=2,
    max_tokens=16,
    kl_prompts=4,
    lr=1e-3,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("turn")
    return out, Turn(out, TINY).run()


def test_a_turn_leaves_a_whole_record(finished):
    out, summary = finished
    assert summary == json.loads((out / "summary.json").read_text())
    low, high = summary["win_rate_interval"]
    assert 0 <= low <= summary["win_rate"] <= high <= 1
    assert summary["verdict"] == "refuse", "eight prompts are no evidence"
    assert summary["seconds"] > 0 and summary["peak_rss_mb"] > 0
    assert {"torch", "corrigible"} <= summary["versions"].keys()
    assert "<svg" in (out / "report.html").read_text()
    assert (out / "policy" / "adapter" / "adapter_model.safetensors").exists()
    assert (out / "reward" / "reward_model.json").exists()


def test_the_first_step_of_training_is_at_ln_2(finished):
    out, _ = finished
    turn = json.loads((out / "turn.json").read_text())
    assert turn["training"]["loss"][0] == pytest.approx(0.693147, abs=1e-4)
    assert [stage["name"] for stage in turn["stages"]] == [
        "load",
        "act",
        "collect",
        "model",
        "align",
        "evaluate",
        "promote",
    ]


def test_lineage_leads_from_the_policy_to_the_judgements_it_learned_from(finished):
    out, summary = finished
    with Store.open(out / "store.db", create=False) as store:
        registry = Registry(store)
        found = registry.lineage("demo-v2")
        judged = {record.id for record in store.feedback(campaign="demo")}
        used = set(store.lineage(summary["policies"]["candidate"]))
        assert used and used <= judged
        assert found.judgements == len(used) == found.version.trained_on.feedback
        assert found.parent.version.name == "demo-v1"
        assert found.episodes.keys() == {found.parent.version.id}, "it learned from what its parent said"
        assert registry.current() is None
        one = next(iter(used))
        assert store.shaped(one) == [found.version.id]
        lessons = clearest(load_pairs(store, aggregate=True, kind="comparison"), 1)
        assert used == {record for pair in lessons for record in pair.derived_from}


@pytest.mark.parametrize("after", ["act", "collect", "align"])
def test_an_interrupted_turn_goes_on_and_ends_the_same(finished, tmp_path, after):
    """Same answers, same weights; judgements are drawn once, though their ids differ between runs."""
    whole, summary = finished

    def stop(event: AnyEvent) -> None:
        if event.kind == "message" and event.text.startswith(f"{after}:"):
            raise KeyboardInterrupt

    bus = EventBus()
    bus.subscribe(stop)
    with use_bus(bus), pytest.raises(KeyboardInterrupt):
        Turn(tmp_path, TINY).run()
    assert not (tmp_path / "summary.json").exists()
    again = Turn(tmp_path, TINY).run()
    for key in ("win_rate", "gold_win_rate", "reward_accuracy", "kl"):
        assert again[key] == pytest.approx(summary[key], abs=1e-6), key
    with Store.open(tmp_path / "store.db") as mine, Store.open(whole / "store.db") as theirs:
        assert mine.count_feedback() == theirs.count_feedback()
        assert [p.weights for p in mine.policies()] == [p.weights for p in theirs.policies()]


def test_a_finished_turn_is_set_aside_and_never_deleted(tmp_path):
    out = tmp_path / "demo"
    first = Turn(out, TINY)
    first._open()
    with Store.open(out / "store.db"):
        pass
    (out / "summary.json").write_text("{}")
    Turn(out, TINY)._open()
    assert (tmp_path / "demo-1" / "store.db").exists(), "what people judged since is still there"
    assert not (out / "summary.json").exists() and (out / "work" / "state.json").exists()


def test_what_the_demo_advises_can_be_typed(tmp_path):
    for command, _ in next_commands(tmp_path / "a folder", "demo-v2"):
        name, *arguments = shlex.split(command)
        assert name == "corrigible"
        ended = CliRunner().invoke(app, arguments)
        assert ended.exit_code != 2, f"{command}: {ended.output}"


def test_a_refusal_gives_only_the_checks_that_failed(finished):
    _, summary = finished
    assert summary["reasons"] and not any("limit" in reason for reason in summary["reasons"])


def test_the_demo_command_says_what_came_out(finished, capsys):
    out, summary = finished
    _show(summary, out)
    said = capsys.readouterr().out
    assert "Not promoted" in said and "report.html" in said and "nats" in said


def test_other_settings_do_not_mix_with_an_unfinished_turn(tmp_path):
    Turn(tmp_path, TINY)._open()
    with pytest.raises(BadInputError, match="--fresh"):
        Turn(tmp_path, replace(TINY, seed=1)).run()


def test_the_commands_read_what_the_turn_left(finished):
    out, summary = finished
    store = str(out / "store.db")
    run = CliRunner()
    listed = json.loads(run.invoke(app, ["policies", "--store", store, "--json"]).stdout)
    assert [(p["name"], p["status"]) for p in listed["policies"]] == [
        ("demo-v1", "created"),
        ("demo-v2", "refused"),
    ]
    tree = run.invoke(app, ["lineage", "demo-v2", "--store", store])
    assert tree.exit_code == 0 and "judgements" in tree.stdout and "demo-v1" in tree.stdout
    assert "evaluated against demo-v1: win rate" in tree.stdout
    found = json.loads(
        run.invoke(app, ["lineage", "demo-v2", "--store", store, "--records", "--json"]).stdout
    )
    assert len(found["records"]) == found["judgements"]
    refused = run.invoke(app, ["promote", "demo-v2", "--store", store, "--reason", "x"])
    assert refused.exit_code == 6
    unknown = run.invoke(app, ["lineage", "nobody", "--store", store])
    assert unknown.exit_code == 3
    missing = run.invoke(app, ["policies", "--store", str(out / "none.db")])
    assert missing.exit_code in (3, 5)
    forced = run.invoke(
        app, ["promote", "demo-v2", "--store", store, "--reason", "x", "--override", "--by", "me", "--json"]
    )
    assert forced.exit_code == 0, forced.output
    assert json.loads(forced.stdout)["promoted"] == summary["policies"]["candidate"]
    table = run.invoke(app, ["policies", "--store", store])
    assert table.exit_code == 0 and "promoted" in table.stdout
