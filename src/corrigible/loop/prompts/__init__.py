"""Prompts to act on: the household set that ships with Corrigible, or a file of one's own."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from corrigible.errors import BadInputError
from corrigible.records import Message, as_messages


@dataclass(frozen=True)
class Prompt:
    """One prompt: its id, the topic it belongs to, and the conversation that asks it."""

    id: str
    topic: str
    conversation: tuple[Message, ...]

    @property
    def text(self) -> str:
        """What is said last, for people to read."""
        return self.conversation[-1].text

    def messages(self, system: str = "") -> tuple[Message, ...]:
        """The conversation, with ``system`` before it unless that is empty or it brings its own."""
        if not system or self.conversation[0].role == "system":
            return self.conversation
        return (Message(role="system", content=system), *self.conversation)


def household() -> list[Prompt]:
    """The 200 everyday prompts of the demo, over 15 topics, written for this project."""
    text = resources.files("corrigible.loop.prompts").joinpath("household.jsonl").read_text(encoding="utf-8")
    return _parse(text, "household.jsonl")[0]


def read_prompts(path: str | Path) -> tuple[list[Prompt], list[str]]:
    """The prompts of a file, and what is wrong with the lines that hold none.

    A ``.jsonl`` (or ``.json``) file has on each line a text, a list of messages, or an object with
    ``prompt`` or ``messages``, and if wanted ``id`` and ``topic``; any other file is plain text, one
    prompt a line. Blank lines are passed over. A line that cannot be used never costs the others: it is
    named in the second list, for the caller to show and to answer for with exit code 3.

    Raises:
        BadInputError: the file is missing, is no UTF-8 text, or holds no prompt at all.
    """
    source = Path(path)
    try:
        text = source.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise BadInputError(f"There is no file {source}.", advice="Check the path.") from error
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"{source} is not a UTF-8 text file: {error}.", advice="Save it as UTF-8."
        ) from error
    except OSError as error:
        raise BadInputError(
            f"{source} cannot be read: {error.strerror}.", advice="Check the path."
        ) from error
    prompts, bad_lines = _parse(text, source.name)
    if not prompts:
        raise BadInputError(
            f"{source.name} holds no prompt{f': {bad_lines[0]}' if bad_lines else '.'}",
            advice='Put one prompt on each line; in JSONL, write {"prompt": "…"} or {"messages": […]}.',
        )
    return prompts, bad_lines


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


def _parse(text: str, name: str) -> tuple[list[Prompt], list[str]]:
    prompts: list[Prompt] = []
    bad_lines: list[str] = []
    seen: set[str] = set()
    is_json = name.endswith((".jsonl", ".json"))
    # Not splitlines(): JSON may hold U+2028 and its like unescaped, within a line.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line) if is_json else line.strip()
            row = value if isinstance(value, dict) else {"prompt": value}
            prompt = Prompt(str(row.get("id", f"line-{number}")), str(row.get("topic", "")), _asked(row))
            if prompt.id in seen:
                raise BadInputError(f"the id {prompt.id} came before.")
        except json.JSONDecodeError as error:
            bad_lines.append(f"{name} line {number} is skipped: it is not JSON: {error}")
        except BadInputError as error:
            bad_lines.append(f"{name} line {number} is skipped: {error}")
        else:
            seen.add(prompt.id)
            prompts.append(prompt)
    return prompts, bad_lines


def _asked(row: dict[str, Any]) -> tuple[Message, ...]:
    """The conversation under ``messages``, else under ``prompt``."""
    value = row.get("messages", row.get("prompt"))
    if not isinstance(value, str | list) or not value or (isinstance(value, str) and not value.strip()):
        raise BadInputError('it has no text or messages under "prompt" or "messages".')
    return as_messages(value)
