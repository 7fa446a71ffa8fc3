"""Named numbers read off a prompt and a response, each declared where it is used.

They are cheap and legible, and most of them are confounds: a reward model that has them knows what it is
allowed to like, and a policy trained on it will find out too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"\w+")
_SENTENCE = re.compile(r"[.!?]+")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _overlap(prompt: str, response: str) -> float:
    said = _words(response)
    asked = set(_words(prompt))
    return sum(word in asked for word in said) / len(said) if said else 0.0


def _variety(_: str, response: str) -> float:
    said = _words(response)
    return len(set(said)) / len(said) if said else 0.0


def _word_length(_: str, response: str) -> float:
    said = _words(response)
    return sum(map(len, said)) / len(said) if said else 0.0


def _upper(_: str, response: str) -> float:
    letters = [letter for letter in response if letter.isalpha()]
    return sum(letter.isupper() for letter in letters) / len(letters) if letters else 0.0


FEATURES: dict[str, Callable[[str, str], float]] = {
    "log_chars": lambda _, response: math.log1p(len(response)),
    "log_words": lambda _, response: math.log1p(len(response.split())),
    "sentences": lambda _, response: math.log1p(len(_SENTENCE.findall(response))),
    "questions": lambda _, response: math.log1p(response.count("?")),
    "lines": lambda _, response: math.log1p(response.count("\n")),
    "digits": lambda _, response: math.log1p(sum(letter.isdigit() for letter in response)),
    "upper_share": _upper,
    "word_length": _word_length,
    "variety": _variety,
    "prompt_overlap": _overlap,
}
"""name -> function of (prompt text, response text). Logs are of one plus the count."""


def feature_rows(names: Sequence[str], texts: Sequence[tuple[str, str]]) -> NDArray[np.float64]:
    """(n, len(names)) for n (prompt, response) texts."""
    rows = [[FEATURES[name](prompt, response) for name in names] for prompt, response in texts]
    return np.array(rows, dtype=np.float64).reshape(len(texts), len(names))
