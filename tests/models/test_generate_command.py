"""``corrigible generate``: into the store, into a file, resumed, interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corrigible.models import generate as generate_function
from corrigible.records import Episode
from corrigible.store import Store

Run = Callable[..., Any]
TINY = ("generate", "--model", "tiny-random", "--max-tokens", 6)


def episodes_in(path: Path) -> list[Episode]:
    return [Episode.from_json(line) for line in path.read_bytes().splitlines()]


def test_one_prompt_on_the_screen(run_cli: Run) -> None:
    result = run_cli(*TINY, "--prompt", "Hi", "-n", 2)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("(length)") + result.stdout.count("(stop)") == 2
    report = json.loads(run_cli(*TINY, "--prompt", "Hi", "-n", 2, "--json").stdout)
    assert report["answers"] == 2 and len(report["texts"][0]) == 2


def test_into_a_store_with_its_policy_version(run_cli: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Hi\n\nthere\n")
    for seed in (0, 1):
        result = run_cli(*TINY, "--prompts", "prompts.txt", "-n", 2, "--store", "s.db", "--seed", seed)
        assert result.exit_code == 0, result.output
    with Store.open(tmp_path / "s.db") as store:
        (version,) = store.policies()
        held = list(store.episodes(task="generate", policy=version.id))
        assert version.base_model == "tiny-random" and len(version.weights) == 64
    assert len(held) == 8
    assert {e.sampling.seed for e in held if e.sampling} == {0, 1}
    assert {e.prompt_messages()[0].text for e in held} == {"Hi", "there"}


def test_a_resumed_file_is_the_uninterrupted_one(
    run_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": t}) + "\n" for t in ("one", "two", "one", "three", "one"))
    )
    command = (*TINY, "--prompts", "p.jsonl", "-n", 2, "--seed", 4)
    assert run_cli(*command, "--out", "whole.jsonl").exit_code == 0
    whole = {(e.steps[0].token_ids, e.info["request"]) for e in episodes_in(tmp_path / "whole.jsonl")}
    assert len(whole) == 10

    def interrupted(*args: Any, on_done: Any, **kwargs: Any) -> Any:
        count = 0

        def twice(index: int, answers: Any) -> None:
            nonlocal count
            on_done(index, answers)
            count += 1
            if count == 2:
                raise KeyboardInterrupt

        return generate_function(*args, on_done=twice, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("corrigible.models.generate", interrupted)
        result = run_cli(*command, "--out", "part.jsonl")
    assert result.exit_code == 130
    assert "2 of 5" in result.stderr and "--resume" in result.stderr
    part = tmp_path / "part.jsonl"
    assert len(episodes_in(part)) == 4
    # A kill in the middle of a prompt leaves one of its answers and half a line.
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:3]) + lines[3][:50])

    assert run_cli(*command, "--out", "part.jsonl").exit_code == 3, "without --resume nothing is touched"
    result = run_cli(*command, "--out", "part.jsonl", "--resume")
    assert result.exit_code == 0, result.output
    again = episodes_in(part)
    assert len(again) == 10
    assert {(e.steps[0].token_ids, e.info["request"]) for e in again} == whole
    report = json.loads(run_cli(*command, "--out", "part.jsonl", "--resume", "--json").stdout)
    assert report["skipped"] == 5 and report["answers"] == 0


def test_bad_lines_are_named_and_the_rest_is_answered(run_cli: Run, tmp_path: Path) -> None:
    lines = ['{"prompt": "fine"}', "{broken", '{"text": "no prompt"}', '{"messages": [{"role": "user"}]}']
    lines += ['{"messages": [{"role": "user", "content": "also fine"}]}', json.dumps({"prompt": "x" * 2000})]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    result = run_cli(*TINY, "--prompts", "p.jsonl", "--out", "o.jsonl", "--json")
    assert result.exit_code == 3
    report = json.loads(result.stdout)
    assert report["answers"] == 2
    assert [line.split(" is skipped")[0] for line in report["bad_lines"]] == [
        f"p.jsonl line {i}" for i in (2, 3, 4)
    ]
    assert len(report["errors"]) == 1 and "reads 1024" in report["errors"][0]
    assert len(episodes_in(tmp_path / "o.jsonl")) == 2
    for_people = run_cli(*TINY, "--prompts", "p.jsonl", "--out", "people.jsonl")
    assert for_people.exit_code == 3 and "2 answers to 2 prompts" in for_people.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((), 3, "no prompt"),
        (("--prompt", "  "), 3, "no prompt"),
        (("--prompts", "absent.txt"), 3, "no file"),
        (("--prompt", "a", "--top-p", "0"), 3, "top_p"),
        (("--prompt", "a", "--out", "x", "--store", "y"), 3, "not both"),
        (("--prompt", "a", "--model", "no-such-model"), 4, "no model"),
        (("--prompt", "a", "--out", "/proc/nowhere/x.jsonl"), 5, "cannot be written"),
    ],
)
def test_bad_use(run_cli: Run, arguments: tuple[str, ...], code: int, says: str) -> None:
    result = run_cli(*TINY, *arguments)
    assert result.exit_code == code, result.output
    assert says in result.stderr


def test_a_prompt_file_that_is_no_text(run_cli: Run, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00bad")
    result = run_cli(*TINY, "--prompts", "p.txt")
    assert result.exit_code == 3 and "UTF-8" in result.stderr


def test_a_policy_is_asked_as_it_was_trained_to_be(run_cli: Run, tmp_path: Path) -> None:
    from corrigible.align.rendering import Serving
    from corrigible.models import load_policy

    policy = load_policy("tiny-random")
    policy.add_lora(rank=2, alpha=4)
    policy.save_adapter(tmp_path / "run" / "adapter")
    serving = Serving(system="Be kind.", assistant_prefix="A helpful answer:\n")
    described = tmp_path / "run" / "policy.json"
    described.write_text(json.dumps({"config": {"serving": serving.to_json()}}))
    command = ("generate", "--model", "run/adapter", "--max-tokens", 4, "--prompt", "Hi", "--out", "e.jsonl")

    result = run_cli(*command, "--seed", 3)
    assert result.exit_code == 0, result.output
    [dressed] = episodes_in(tmp_path / "e.jsonl")
    question = [{"role": "user", "content": "Hi"}]
    assert dressed.steps[0].prompt_token_ids == serving.prompt(policy.renderer, question).ids
    assert [m.text for m in dressed.prompt_messages()] == ["Hi"]  # what was asked; the ids say how

    # Asked plainly it is another request, so that resuming does not take one for the other.
    assert run_cli(*command, "--seed", 3, "--plain", "--resume").exit_code == 0
    [_, plain] = episodes_in(tmp_path / "e.jsonl")
    assert plain.steps[0].prompt_token_ids == policy.renderer.prompt(question).ids
    assert run_cli(*command, "--seed", 3, "--resume").exit_code == 0
    assert len(episodes_in(tmp_path / "e.jsonl")) == 2

    described.write_text(json.dumps({"config": {"serving": {"demonstrations": 4}}}))
    result = run_cli(*command, "--seed", 4, "--resume")
    assert result.exit_code == 3 and "--plain" in result.output
    described.write_text(json.dumps({"config": {"serving": {"voice": "low"}}}))
    result = run_cli(*command, "--seed", 4, "--resume")
    assert result.exit_code == 3 and "does not know" in result.output
