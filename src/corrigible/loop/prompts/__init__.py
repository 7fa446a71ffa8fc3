"""Prompts to act on: the household set that ships with Corrigible, or a file of one's own."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from corrigible.errors import BadInputError
from corrigible.records import Message


@dataclass(frozen=True)
class Prompt:
    """One prompt: its id, the topic it belongs to, and what the user says."""

    id: str
    topic: str
    text: str

    def messages(self, system: str = "") -> tuple[Message, ...]:
        """The conversation that asks it, with a system message unless that is empty."""
        user = Message(role="user", content=self.text)
        return (Message(role="system", content=system), user) if system else (user,)


def household() -> list[Prompt]:
    """The 200 everyday prompts of the demo, over 15 topics, written for this project."""
    text = resources.files("corrigible.loop.prompts").joinpath("household.jsonl").read_text(encoding="utf-8")
    return _parse(text, "household.jsonl")


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a file: JSONL with ``prompt`` (and ``id``, ``topic``), or plain text, one a line.

    Raises:
        BadInputError: the file is missing, empty or malformed; the message names the line.
    """
    source = Path(path)
    try:
        text = source.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BadInputError(f"There is no file {source}.", advice="Check the path.") from error
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise BadInputError(
            f"{source} is not a UTF-8 text file: {error}.", advice="Save it as UTF-8."
        ) from error
    return _parse(text, source.name)


def split(prompts: list[Prompt], held_out: int, train: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Two disjoint samples: ``train`` prompts to act on and ``held_out`` to evaluate, every topic in both.

    Raises:
        BadInputError: when there are fewer prompts than asked for.
    """
    if train + held_out > len(prompts):
        raise BadInputError(
            f"{train} training and {held_out} held-out prompts were asked for, and there are {len(prompts)}.",
            advice="Ask for fewer, or give more prompts.",
        )
    shuffled = sorted(prompts, key=lambda p: p.id)
    random.Random(seed).shuffle(shuffled)
    # Dealt topic by topic, so that both parts see the same topics in the same shares.
    shuffled.sort(key=lambda p: p.topic)
    total = len(shuffled)
    evaluate = (
        {shuffled[int((i + 0.5) * total / held_out)].id for i in range(held_out)} if held_out else set()
    )
    rest = [p for p in shuffled if p.id not in evaluate]
    random.Random(seed + 1).shuffle(rest)
    return rest[:train], [p for p in shuffled if p.id in evaluate]


def _parse(text: str, name: str) -> list[Prompt]:
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        row = (
            {"prompt": line.strip()}
            if not name.endswith((".jsonl", ".json"))
            else _json_row(line, name, number)
        )
        prompt = Prompt(str(row.get("id", f"line-{number}")), str(row.get("topic", "")), row["prompt"])
        if prompt.id in seen:
            raise BadInputError(
                f"{name} line {number}: the id {prompt.id} came before.", advice="Ids must differ."
            )
        seen.add(prompt.id)
        prompts.append(prompt)
    if not prompts:
        raise BadInputError(f"{name} holds no prompt.", advice="Put one prompt on each line.")
    return prompts


def _json_row(line: str, name: str, number: int) -> dict[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInputError(
            f"{name} line {number} is not JSON: {error}.", advice="One JSON object a line."
        ) from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise BadInputError(
            f'{name} line {number} has no text under "prompt".', advice='Write {"prompt": "…"} on each line.'
        )
    return row
