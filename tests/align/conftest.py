"""Small real parts: the tiny policy, and pairs with a rule to be learnt."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from corrigible.align import PairSource
from corrigible.models import LanguagePolicy, load_policy
from corrigible.records import Message
from corrigible.store import Pair

# The tests are imported one by one, not as a package; this lets them share their oracles.
sys.path.insert(0, str(Path(__file__).parent))

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet", "jetty"]


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def build_pair(prompt: str, chosen: str, rejected: str, /, *, number: int = 0, **changes: object) -> Pair:
    fields: dict[str, object] = {
        "prompt": (Message(role="user", content=prompt),),
        "chosen": (Message(role="assistant", content=chosen),),
        "rejected": (Message(role="assistant", content=rejected),),
        "p_chosen": 1.0,
        "weight": 1.0,
        "group": _sha(prompt),
        "annotators": ("ada",),
        "derived_from": (f"f{number:06d}",),
        "criterion": "overall",
        "chosen_ref": _sha(chosen),
        "rejected_ref": _sha(rejected),
        "prompt_ref": _sha(prompt),
    }
    return Pair(**(fields | changes))  # type: ignore[arg-type]


def build_pairs(count: int, seed: int = 0, *, uneven: bool = True) -> list[Pair]:
    """Whoever answers "yes ..." is preferred to who answers "no ...": learnable, and of uneven length."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        prompt = f"{number} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 8 if uneven else 1)))
        tail = [" ".join(rng.choices(WORDS, k=rng.randint(0, 4 if uneven else 1))) for _ in range(2)]
        made.append(build_pair(prompt, f"yes {tail[0]}", f"no {tail[1]}", number=number))
    return made


def build_policy(lora: bool = True, dtype: str = "float32") -> LanguagePolicy:
    policy = load_policy("tiny-random", dtype=dtype, device="cpu")
    if lora:
        policy.add_lora(rank=4, alpha=8)
    return policy


@pytest.fixture
def make_pair() -> Callable[..., Pair]:
    return build_pair


@pytest.fixture
def make_pairs() -> Callable[..., list[Pair]]:
    return build_pairs


@pytest.fixture
def make_policy() -> Callable[..., LanguagePolicy]:
    return build_policy


@pytest.fixture
def policy() -> LanguagePolicy:
    return build_policy()


@pytest.fixture
def source(policy: LanguagePolicy) -> PairSource:
    return PairSource(build_pairs(24), policy.renderer, max_length=256)
