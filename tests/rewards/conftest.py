"""Small preference sets whose truth is known, and readers small enough to train in a second."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
import torch

from corrigible.records import Message
from corrigible.rewards.backbones import Backbone, causal_backbone
from corrigible.store.pairs import Pair

WORDS = ("tea", "map", "oak", "sun", "rim", "fog", "hut", "elm", "bay", "den")


def make_pair(
    chosen: str,
    rejected: str,
    *,
    prompt: str = "",
    group: str | None = None,
    p: float = 1.0,
    weight: float = 1.0,
) -> Pair:
    def ref(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    return Pair(
        prompt=(Message(role="user", content=prompt),) if prompt else (),
        chosen=(Message(role="assistant", content=chosen),),
        rejected=(Message(role="assistant", content=rejected),),
        p_chosen=p,
        weight=weight,
        group=group if group is not None else ref(prompt),
        annotators=("a",),
        derived_from=(),
        criterion="overall",
        chosen_ref=ref(chosen),
        rejected_ref=ref(rejected),
        prompt_ref=ref(prompt) if prompt else None,
    )


def known_pairs(n: int, seed: int = 0, *, shuffled: bool = False, prompts: int = 40) -> list[Pair]:
    """Pairs in which the response with more z's is preferred; lengths tell nothing.

    With ``shuffled`` the preferred side is drawn by a coin: nothing can be learned.
    """
    rng = np.random.default_rng(seed)
    pairs = []
    for number in range(n):
        low, high = sorted(rng.choice(8, size=2, replace=False))
        sides = []
        for zs in (high, low):
            letters = ["z"] * int(zs) + list("".join(rng.choice(list("abcdefg"), size=24 - int(zs))))
            rng.shuffle(letters)
            sides.append("".join(letters))
        if shuffled and rng.random() < 0.5:
            sides.reverse()
        prompt = " ".join(WORDS[int(d)] for d in f"{number % prompts:02d}")
        pairs.append(make_pair(sides[0], sides[1], prompt=prompt))
    return pairs


@pytest.fixture
def pair() -> Callable[..., Pair]:
    return make_pair


@pytest.fixture
def known() -> Callable[..., list[Pair]]:
    return known_pairs


@pytest.fixture
def encoder() -> Callable[[], Backbone]:
    """Makes a random two-layer encoder over bytes; equal every time."""
    from transformers import BertConfig, BertModel

    from corrigible.models.tiny import tiny_tokenizer

    def make(seed: int = 0) -> Backbone:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = BertModel(
                BertConfig(
                    vocab_size=259,
                    hidden_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    intermediate_size=64,
                    max_position_embeddings=256,
                    initializer_range=0.2,
                    hidden_dropout_prob=0.1,
                )
            )
        return Backbone("minilm", module.eval(), tiny_tokenizer(), kind="encoder")

    return make


@pytest.fixture
def causal() -> Callable[..., Backbone]:
    """Makes a backbone of the tiny random language model, with an adapter when asked."""
    from corrigible.models import load_policy

    def make(lora: bool = False) -> Backbone:
        policy = load_policy("tiny-random", dtype="float32", device="cpu")
        if lora:
            policy.add_lora(rank=4, alpha=8, seed=0)
        return causal_backbone("tiny-random", policy)

    return make
