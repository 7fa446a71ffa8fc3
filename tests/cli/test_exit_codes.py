"""One rule for what is not there: data 3, a model 4, a store 5, a name nobody knows 3; in every command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from corrigible.cli import app
from corrigible.store import Store

TINY = ("--model", "tiny-random")
ASKED = ("--prompts", "prompts.txt")

# What each option or argument names that a command reads: the command, with what is not there in its
# place (of a name that holds "nowhere"), and the exit code.
ABSENT: dict[tuple[str, str], tuple[tuple[str, ...], int]] = {
    ("import", "paths"): (("nowhere.jsonl",), 3),
    ("demo", "--prompts"): ((*TINY, "--prompts", "nowhere.txt"), 3),
    ("demo", "--model"): (("--model", "./nowhere"), 4),
    ("generate", "--prompts"): ((*TINY, "--prompts", "nowhere.txt"), 3),
    ("generate", "--model"): (("--model", "./nowhere", "--prompt", "x"), 4),
    ("generate", "--adapter"): ((*TINY, "--adapter", "nowhere", "--prompt", "x"), 4),
    ("evaluate", "--prompts"): (("--candidate", "tiny-random", "--prompts", "nowhere.txt"), 3),
    ("evaluate", "--candidate"): (("--candidate", "./nowhere", *ASKED), 4),
    ("evaluate", "--baseline"): (("--candidate", "tiny-random", "--baseline", "./nowhere", *ASKED), 4),
    ("evaluate", "--judge"): (("--candidate", "tiny-random", "--judge", "reward:nowhere", *ASKED), 4),
    ("evaluate", "--store"): (("--candidate", "tiny-random", "--store", "nowhere.db", *ASKED), 5),
    ("train dpo", "--data"): (("--data", "nowhere.jsonl", "--out", "o", *TINY), 3),
    ("train dpo", "--model"): (("--store", "some.db", "--model", "./nowhere", "--out", "o"), 4),
    ("train dpo", "--store"): (("--store", "nowhere.db", "--out", "o", *TINY), 5),
    ("train kto", "--data"): (("--data", "nowhere.jsonl", "--out", "o", *TINY), 3),
    ("train kto", "--model"): (("--store", "some.db", "--model", "./nowhere", "--out", "o"), 4),
    ("train kto", "--store"): (("--store", "nowhere.db", "--out", "o", *TINY), 5),
    ("train reward", "--data"): (("--data", "nowhere.jsonl", "--out", "o"), 3),
    ("train reward", "--backbone"): (("--store", "some.db", "--backbone", "./nowhere", "--out", "o"), 4),
    ("train reward", "--store"): (("--store", "nowhere.db", "--out", "o"), 5),
    ("export", "--store"): (("out.csv", "--format", "csv", "--store", "nowhere.db"), 5),
    ("show", "--store"): (("--store", "nowhere.db"), 5),
    ("judge", "--store"): (("--annotator", "me", "--store", "nowhere.db"), 5),
    ("policies", "--store"): (("--store", "nowhere.db"), 5),
    ("lineage", "--store"): (("v1", "--store", "nowhere.db"), 5),
    ("lineage", "policy"): (("nowhere", "--store", "some.db"), 3),
    ("promote", "--store"): (("v1", "--reason", "r", "--store", "nowhere.db"), 5),
    ("promote", "policy"): (("nowhere", "--reason", "r", "--store", "some.db"), 3),
    ("claims run", "names"): (("nowhere",), 3),
}
# These make the store when it is not there, or (doctor) say so.
MAKES_IT = {("import", "--store"), ("generate", "--store"), ("doctor", "--store")}
READS = {"paths", "names", "--prompts", "--data", "--model", "--adapter", "--candidate", "--baseline"} | {
    *("--judge", "--backbone", "--store")
}


def read_by_commands(group: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from read_by_commands(command, (*prefix, name))
            continue
        for parameter in command.params:
            if parameter.opts[0] in READS:
                yield " ".join((*prefix, name)), parameter.opts[0]


# All algorithms have one command's code and options (cli/train.py), which is tested for one of each family.
SHOWN = ("dpo", "kto")


def test_the_table_leaves_nothing_out() -> None:
    from corrigible.align import ALGORITHMS

    read = set(read_by_commands(typer.main.get_command(app))) - MAKES_IT
    for name in ALGORITHMS.keys() - set(SHOWN):
        options = {option for command, option in read if command == f"train {name}"}
        own = {f"--{field}" for field in ALGORITHMS[name].config.model_fields}  # a word, not a file
        assert options - own <= {option for command, option in ABSENT if command == "train dpo"}
        read -= {(f"train {name}", option) for option in options}
    assert read <= set(ABSENT)


@pytest.mark.parametrize("json_wanted", [False, True], ids=["people", "json"])
@pytest.mark.parametrize(("command", "option"), ABSENT, ids=" ".join)
def test_what_is_not_there_is_named_with_one_code(
    command: str, option: str, json_wanted: bool, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    from corrigible.records import Annotator, comparison

    kim = Annotator(pseudonym="kim", type="human")
    (tmp_path / "prompts.txt").write_text("Say ant.\n")
    with Store.open(tmp_path / "some.db") as store:
        for i in range(8):
            record, items = comparison(f"q{i}", "a", f"b{i}", annotator=kim)
            store.add_feedback([record], items)
    arguments, code = ABSENT[command, option]
    result = run_cli(*command.split(), *arguments, *(["--json"] if json_wanted else []))
    assert result.exit_code == code, result.output
    assert "nowhere" in result.stderr
    assert not (tmp_path / "nowhere.db").exists()
    if json_wanted:
        told = json.loads(result.stdout)["error"]
        assert told["exit_code"] == code and "nowhere" in told["message"]
