"""Signals by hand, and rendered examples as text that a person can check."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from corrigible.align.rendering import Lesson, token_example
from corrigible.align.tokens import TokenExample
from corrigible.models import Renderer
from corrigible.records import Message
from corrigible.store import Labelled, Pair
from corrigible.store.signals import Attempt, Attempts, Critiqued, Demonstrated, Ranked

COMMON: dict[str, Any] = {"weight": 1.0, "group": "g", "annotators": ("ada",), "derived_from": ("f1",)}


def user(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def says(text: str) -> tuple[Message, ...]:
    return (Message(role="assistant", content=text),)


def pair(chosen: str = "yes", rejected: str = "no", prompt: str = "Q?", **changes: Any) -> Pair:
    fields: dict[str, Any] = {
        **COMMON,
        "prompt": user(prompt),
        "chosen": says(chosen),
        "rejected": says(rejected),
        "p_chosen": 1.0,
        "criterion": "overall",
        "chosen_ref": "c",
        "rejected_ref": "r",
    }
    return Pair(**(fields | changes))


def labelled(response: str = "yes", desirable: bool = True, **changes: Any) -> Labelled:
    fields: dict[str, Any] = {
        **COMMON,
        "prompt": user("Q?"),
        "response": says(response),
        "desirable": desirable,
        "criterion": "overall",
    }
    return Labelled(**(fields | changes))


def demonstrated(prompt: str = "Q?", response: str = "yes", **changes: Any) -> Demonstrated:
    fields: dict[str, Any] = {**COMMON, "prompt": user(prompt), "response": says(response)}
    return Demonstrated(**(fields | changes))


def ranked(responses: Sequence[str], scores: Sequence[float], **changes: Any) -> Ranked:
    fields: dict[str, Any] = {
        **COMMON,
        "prompt": user("Q?"),
        "responses": tuple(says(text) for text in responses),
        "scores": tuple(scores),
    }
    return Ranked(**(fields | changes))


def critiqued(draft: str = "no", critique: str = "Say yes.", refined: str = "", **changes: Any) -> Critiqued:
    fields: dict[str, Any] = {
        **COMMON,
        "prompt": user("Q?"),
        "draft": says(draft),
        "critique": critique,
        "refined": says(refined) if refined else (),
    }
    return Critiqued(**(fields | changes))


def attempt(text: str, right: bool | None, **changes: Any) -> Attempt:
    steps = tuple(text.split("\n")) if "\n" in text else ()
    return Attempt(response=says(text), right=right, **({"steps": steps} | changes))


def attempts(*made: Attempt, **changes: Any) -> Attempts:
    fields: dict[str, Any] = {**COMMON, "prompt": user("Q?"), "attempts": made}
    return Attempts(**(fields | changes))


def marked(example: TokenExample, renderer: Renderer) -> str:
    """The row as text; what is learnt stands in «», with its weight behind it when that is not 1."""
    [row] = example.rows
    weights: list[float | None] = [None] * len(row)
    for place, weight in zip(row.scored, example.token_weights, strict=True):
        weights[place] = weight
    parts = []
    for weight, run in itertools.groupby(range(len(row)), key=lambda i: weights[i]):
        text = renderer.tokenizer.decode([row.ids[i] for i in run], skip_special_tokens=False)
        parts.append(text if weight is None else f"«{text}»" + ("" if weight == 1.0 else f"{weight:g}"))
    return "".join(parts)


def written(lessons: Sequence[Lesson], renderer: Renderer) -> list[str]:
    return [marked(token_example(lesson, renderer), renderer) for lesson in lessons]


def merging_renderer() -> Renderer:
    """ChatML, one token per byte but for "ab", "cd" and "abcd"."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    control = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    pieces = [*control, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "cd", "abcd"]
    merges = [("a", "b"), ("c", "d"), ("ab", "cd")]
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in control])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    return Renderer(tokenizer, "chatml")
