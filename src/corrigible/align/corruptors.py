"""What a policy reads instead of a demonstration, while it is asked for the demonstration itself.

A corruptor replaces *inputs* at some positions of a row (:attr:`~corrigible.models.Rendered.inputs`); what is
learnt stays as it is, because labels are those of the row. Which positions it may touch the example
says (its answer, unless told otherwise), and control tokens it never touches. What it draws depends on
the seed, the step and the place in the batch alone: every epoch reads an example differently, and a
resumed run reads what an uninterrupted one would have read.

:class:`PastTokens` deviates from its paper. Chain of hindsight (Liu et al. 2023) hides random earlier tokens
from *attention*; rows here are packed as a tree without a mask, where a hidden key would take one away,
so the token is replaced where it is read. A replaced token still takes part in attention, with nothing to
say, and the position after it is predicted from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np

from corrigible.errors import BadInputError
from corrigible.models.renderer import Rendered, Renderer

Replacement = Literal["random", "mask"]
"""A token that stands for nothing: any one of the vocabulary, or one that is always the same."""


class Corruptor(Protocol):
    """Changes what is read of a row."""

    def __call__(
        self, row: Rendered, places: Sequence[int], progress: float, rng: np.random.Generator, /
    ) -> Rendered:
        """The row as it is read.

        Args:
            row: what is learnt.
            places: positions in it that may be touched.
            progress: share of the run's steps that are done, in [0, 1].
            rng: for whatever is drawn.
        """
        ...

    def settings(self) -> tuple[object, ...]:
        """What decides its effect: a resumed run must find the same."""
        ...


@dataclass(frozen=True)
class MaskedThought:
    """Masked thought: random tokens of the answer are read as something else.

    Each place is replaced with probability ``share * min(1, progress / ramp)``.

    Source: Chen et al. 2024, "Masked Thought" (arXiv:2403.02178), with the ramp of its public code.

    Attributes:
        share: largest probability of being replaced, in [0, 1].
        pool: what stands there instead, drawn evenly; :func:`replacements`.
        spared: ids that are never replaced.
        ramp: share of the run over which the probability grows from 0; 0 begins with the largest.
    """

    share: float
    pool: tuple[int, ...] = field(repr=False)
    spared: frozenset[int] = frozenset()
    ramp: float = 2.0 / 3.0

    def __post_init__(self) -> None:
        _check_share("share", self.share)
        _check_share("ramp", self.ramp)
        _check_pool(self.pool)

    def __call__(
        self, row: Rendered, places: Sequence[int], progress: float, rng: np.random.Generator, /
    ) -> Rendered:
        """The row with some inputs replaced."""
        chance = self.share * (min(1.0, progress / self.ramp) if self.ramp else 1.0)
        return _replaced(row, places, chance, self.pool, self.spared, rng)

    def settings(self) -> tuple[object, ...]:
        """Its numbers, and what it draws from."""
        return "masked thought", self.share, self.ramp, _mark(self.pool), _mark(sorted(self.spared))


@dataclass(frozen=True)
class PastTokens:
    """A random share of what was said before is read as something else, so that it is not just repeated.

    The share of each row is drawn evenly from 0 to ``most`` at every step; see the module's notes for how
    this differs from hiding tokens from attention.

    Source: Liu et al. 2023, "Chain of Hindsight Aligns Language Models with Feedback" (arXiv:2302.02676).

    Attributes:
        most: largest share that is replaced, in [0, 1].
        pool: what stands there instead, drawn evenly; :func:`replacements`.
        spared: ids that are never replaced.
    """

    most: float
    pool: tuple[int, ...] = field(repr=False)
    spared: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        _check_share("most", self.most)
        _check_pool(self.pool)

    def __call__(
        self, row: Rendered, places: Sequence[int], progress: float, rng: np.random.Generator, /
    ) -> Rendered:
        """The row with some inputs replaced."""
        return _replaced(row, places, self.most * rng.random(), self.pool, self.spared, rng)

    def settings(self) -> tuple[object, ...]:
        """Its numbers, and what it draws from."""
        return "past tokens", self.most, _mark(self.pool), _mark(sorted(self.spared))


@dataclass(frozen=True)
class VocabularyLimit:
    """A vocabulary that grows: tokens beyond a limit are read, and learnt, as the unknown token.

    At ``progress`` the ids up to ``pace(progress) * size`` are known. It is the one corruptor that
    changes what is learnt, and it looks at all tokens of a row, prompt included.

    Source: Diehl Martinez et al. 2023, "CLIMB" (vocabulary curriculum).

    Attributes:
        pace: share of the vocabulary that is known at ``progress``, in [0, 1].
        unknown: id of the unknown token.
        size: of the vocabulary.
        spared: ids that are always known.
    """

    pace: Callable[[float], float]
    unknown: int
    size: int
    spared: frozenset[int] = frozenset()

    def __call__(
        self, row: Rendered, places: Sequence[int], progress: float, rng: np.random.Generator, /
    ) -> Rendered:
        """The row in today's vocabulary."""
        limit = self.pace(progress) * self.size
        known = tuple(i if i <= limit or i in self.spared else self.unknown for i in row.ids)
        return row if known == row.ids else replace(row, ids=known)

    def settings(self) -> tuple[object, ...]:
        """Its numbers; of the pace, what it gives at 65 moments of a run."""
        pace = tuple(self.pace(moment / 64) for moment in range(65))
        return "vocabulary limit", pace, self.unknown, self.size, _mark(sorted(self.spared))


def replacements(renderer: Renderer, by: Replacement = "random", token: str | None = None) -> tuple[int, ...]:
    """Ids that may stand for a token that is hidden.

    Args:
        renderer: the policy's own.
        by: ``"random"`` takes any token of the vocabulary that is no control token, ``"mask"`` one and the
            same.
        token: for ``"mask"``, which one: something that text never has, best a token that the model
            keeps in reserve. The tokenizer's own mask token when absent.

    Raises:
        BadInputError: the vocabulary has no such token.
    """
    tokenizer = renderer.tokenizer
    if by == "random":
        return tuple(i for i in range(len(tokenizer)) if i not in renderer.special_ids)
    name = token or tokenizer.mask_token
    known = tokenizer.get_vocab()
    if name is None or name not in known:
        raise BadInputError(
            f"no_mask_token: {f'there is no token {name!r}' if name else 'the tokenizer has no mask token'}.",
            advice="Name a token of the vocabulary that text never has, or replace by random tokens.",
        )
    return (int(known[name]),)


def _replaced(
    row: Rendered,
    places: Sequence[int],
    chance: float,
    pool: tuple[int, ...],
    spared: frozenset[int],
    rng: np.random.Generator,
) -> Rendered:
    # Drawn for every place, so that what one draws does not depend on the share.
    hidden, instead = rng.random(len(places)), rng.integers(len(pool), size=len(places))
    inputs = list(row.fed)
    for place, draw, index in zip(places, hidden.tolist(), instead.tolist(), strict=True):
        if draw < chance and row.ids[place] not in spared:
            inputs[place] = pool[index]
    return row if tuple(inputs) == row.fed else replace(row, inputs=tuple(inputs))


def _check_share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise BadInputError(f"{name} must be in [0, 1], got {value}.")


def _check_pool(pool: tuple[int, ...]) -> None:
    if not pool:
        raise BadInputError(
            "There is nothing to replace tokens by.", advice="replacements(...) gives a pool."
        )


def _mark(ids: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(ids, dtype=np.int64).tobytes()).hexdigest()[:16]
