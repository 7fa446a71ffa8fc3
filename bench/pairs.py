"""The tokens that both sides of a comparison train on: real HH-RLHF pairs, or made-up groups of one shape.

A *group* is a prompt and its completions as token ids, with what each completion is worth. A pair is
the group ``(chosen, rejected)`` with rewards ``(1, 0)``. Ids are made once, here; neither side of a
comparison sees any text, so neither can tokenise or truncate it differently.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from corrigible.align.sources import PairSource
from corrigible.errors import MissingError
from corrigible.models import Renderer
from corrigible.records import Message
from corrigible.store import Pair
from corrigible.store.formats.hh_rlhf import parse_transcript

FILES = ("helpful-base_test.jsonl.gz", "harmless-base_test.jsonl.gz")
BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
"""Where the real feedback is looked for when neither an option nor ``CORRIGIBLE_DATA`` names a folder."""


@dataclass(frozen=True)
class Group:
    """Completions of one prompt, as token ids.

    Attributes:
        prompt: ids that every completion follows, at least one.
        completions: ids that are trained on, of each completion; the end of turn is among them.
        rewards: what each completion is worth; of a pair, 1 for the chosen side and 0 for the other.
    """

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    rewards: tuple[float, ...]

    @property
    def tokens(self) -> int:
        """Real tokens: every completion with its prompt before it, no padding."""
        return sum(len(self.prompt) + len(completion) for completion in self.completions)


def data_folder(named: str | Path | None = None) -> Path:
    """The folder of real feedback: ``named``, else ``CORRIGIBLE_DATA``, else ``../shared/data``.

    Raises:
        MissingError: it holds no HH-RLHF.
    """
    folder = Path(named or os.environ.get("CORRIGIBLE_DATA") or BESIDE)
    missing = [name for name in FILES if not (folder / "hh-rlhf" / name).is_file()]
    if missing:
        raise MissingError(
            f"The real pairs are not here: {folder / 'hh-rlhf' / missing[0]} is missing.",
            advice="Give the folder that holds hh-rlhf/ with --data or CORRIGIBLE_DATA; the files are the "
            "test splits of https://huggingface.co/datasets/Anthropic/hh-rlhf.",
        )
    return folder


def real_batches(
    renderer: Renderer,
    *,
    data: str | Path | None = None,
    batches: int,
    batch_size: int = 8,
    max_length: int = 512,
    seed: int = 0,
) -> list[list[Group]]:
    """Batches of real HH-RLHF pairs, no pair twice.

    Args:
        renderer: of the policy that will be trained.
        data: folder that holds ``hh-rlhf/``; see :func:`data_folder`.
        batches: how many.
        batch_size: pairs in each.
        max_length: longest row (prompt and completion) in tokens. A longer pair loses its oldest
            prompt tokens, the same on both sides.
        seed: of the choice and the order; nothing else is random.

    Raises:
        MissingError: the data is not here, or holds fewer pairs than asked for.
    """
    pairs = list(_pairs(data_folder(data)))
    order = np.random.default_rng(seed).permutation(len(pairs))
    wanted = batches * batch_size
    groups: list[Group] = []
    start = 0
    while len(groups) < wanted and start < len(order):
        chosen = [pairs[i] for i in order[start : start + wanted - len(groups)]]
        start += len(chosen)
        source = PairSource(chosen, renderer, max_length=max_length, invalid="skip")
        groups += [_as_group(example.rows) for example in source.examples]
    if len(groups) < wanted:
        raise MissingError(
            f"{len(groups)} usable pairs are here, {wanted} were asked for.", advice="Ask less."
        )
    return [groups[i : i + batch_size] for i in range(0, wanted, batch_size)]


def synthetic_batches(
    vocabulary: int,
    *,
    batches: int,
    rows: int = 16,
    row_tokens: int = 256,
    prompt_share: float,
    group_size: int,
    seed: int = 0,
) -> list[list[Group]]:
    """Batches of random tokens in rows of one length: what only the prompt's share and the groups change.

    Every batch has ``rows * row_tokens`` real tokens, whatever the other two, and no row needs padding.

    Args:
        vocabulary: ids are drawn from ``[3, vocabulary)``: SmolLM2's control tokens come first.
        rows: completions in a batch; a multiple of ``group_size``.
        row_tokens: tokens of prompt and completion together.
        prompt_share: share of a row that is its prompt, in [0, 1); at 0 the prompt is one token, because
            the first token of a row cannot be predicted.
        group_size: completions of one prompt. Their rewards are 1, 0, 1, 0, ...
    """
    if rows % group_size or not 0.0 <= prompt_share < 1.0:
        raise ValueError(f"{rows} rows in groups of {group_size} at a prompt share of {prompt_share}")
    random = np.random.default_rng(seed)
    length = max(1, round(prompt_share * row_tokens))

    def ids(count: int) -> tuple[int, ...]:
        return tuple(random.integers(3, vocabulary, count).tolist())

    rewards = tuple(float(number % 2 == 0) for number in range(group_size))
    return [
        [
            Group(ids(length), tuple(ids(row_tokens - length) for _ in range(group_size)), rewards)
            for _ in range(rows // group_size)
        ]
        for _ in range(batches)
    ]


def as_json(batches: Sequence[Sequence[Group]]) -> str:
    """Batches as text, for :func:`from_json`."""
    return json.dumps(
        [
            [
                {"prompt": group.prompt, "completions": group.completions, "rewards": group.rewards}
                for group in batch
            ]
            for batch in batches
        ]
    )


def from_json(text: str) -> list[list[Group]]:
    """The batches that :func:`as_json` wrote."""
    return [
        [
            Group(
                tuple(group["prompt"]),
                tuple(tuple(completion) for completion in group["completions"]),
                tuple(group["rewards"]),
            )
            for group in batch
        ]
        for batch in json.loads(text)
    ]


def _pairs(folder: Path) -> Iterator[Pair]:
    """Pairs that differ in one last answer of the assistant only: what every trainer can be given."""
    for name in FILES:
        with gzip.open(folder / "hh-rlhf" / name, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                row = json.loads(line)
                chosen, rejected = (parse_transcript(row[side]) for side in ("chosen", "rejected"))
                prompt = chosen[:-1]
                if not prompt or prompt != rejected[:-1] or chosen[-1] == rejected[-1]:
                    continue
                if not all(_said(side[-1]) for side in (chosen, rejected)):
                    continue
                yield Pair(
                    prompt=prompt,
                    chosen=chosen[-1:],
                    rejected=rejected[-1:],
                    p_chosen=1.0,
                    weight=1.0,
                    group=f"{name}:{number}",
                    annotators=(),
                    derived_from=(),
                    criterion="overall",
                    chosen_ref="",
                    rejected_ref="",
                )


def _said(message: Message) -> bool:
    return message.role == "assistant" and isinstance(message.content, str) and bool(message.content.strip())


def _as_group(rows: Sequence) -> Group:
    prompt = rows[0].ids[: rows[0].scored[0]]
    completions = tuple(tuple(row.ids[len(prompt) :]) for row in rows)
    return Group(tuple(prompt), completions, (1.0, 0.0))
