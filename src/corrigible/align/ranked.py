"""Several scored answers to one prompt, as one training example."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from corrigible.align.sources import (
    Behaviour,
    ListSource,
    Unusable,
    check_max_length,
    fitted,
    render_all,
    response_row,
    say_skipped,
)
from corrigible.events import Alert, emit
from corrigible.models import Rendered, Renderer
from corrigible.records import Episode
from corrigible.store.signals import Ranked


@dataclass(frozen=True)
class RankedExample:
    """Rendered answers to one prompt, with what each scored.

    Attributes:
        rows: the answers; all begin with the same prompt tokens, and no two are the same.
        scores: of each, higher is better, in the judge's unit; equal scores are a tie.
        logq: of each, its log-prob under the policy that sampled it (the plain model, temperature 1), nats;
            NaN when nobody recorded it.
        weight: what the judgements behind it are worth, > 0.
        group: the cluster it belongs to (task or prompt), for splits and intervals.
        derived_from: ids of the feedback records behind it.
        prompt_tokens_cut: how many of the oldest prompt tokens were left out to fit, of all answers alike.
        behaviour: per answer, what was recorded when it was sampled.
    """

    rows: tuple[Rendered, ...]
    scores: tuple[float, ...]
    logq: tuple[float, ...]
    weight: float
    group: str
    derived_from: tuple[str, ...]
    prompt_tokens_cut: int = 0
    behaviour: tuple[Behaviour | None, ...] = ()


class RankedSource(ListSource[RankedExample]):
    """Rankings as training examples, in an order that only depends on the seed.

    An answer that nobody scored (NaN) is left out of its ranking (``no_score``), and of answers with the same
    tokens one is kept, with their mean score (``duplicate_answer``).

    Args:
        ranked: what to learn from.
        renderer: turns messages into token ids (the policy's own).
        max_length: longest row in tokens. A longer ranking loses its oldest prompt tokens, the same
            ones of every answer.
        seed: of the order of examples.
        invalid: ``"raise"`` stops at the first unusable answer or ranking; ``"skip"`` leaves it out,
            counts it in :attr:`skipped` and says so in an alert.
        episodes: episodes by id. An answer that names one is trained on the token ids that were really
            sampled.
        least: answers that a ranking must have.
        equal_scores: whether a ranking whose scores are all equal teaches anything.

    Attributes:
        ranked: the signal behind each example, in the same order.

    Raises:
        Unusable: with ``invalid="raise"``: ``one_answer``, ``no_order``, ``empty_completion``, ``too_long``,
            ``bad_weight``, ``bad_score``, ``prompts_differ`` or ``not_renderable``.
        BadInputError: no usable ranking is left, or ``max_length`` is too small to hold anything.
    """

    kind = "ranked"

    def __init__(
        self,
        ranked: Iterable[Ranked],
        renderer: Renderer,
        *,
        max_length: int = 512,
        seed: int = 0,
        invalid: Literal["raise", "skip"] = "raise",
        episodes: Mapping[str, Episode] | None = None,
        least: int = 2,
        equal_scores: bool = False,
    ) -> None:
        check_max_length(max_length)
        answers: Counter[str] = Counter()
        make = _Make(renderer, max_length, episodes or {}, invalid, least, equal_scores, answers)
        found = render_all(list(ranked), make.example, noun="ranking", invalid=invalid)
        say_skipped(answers, "answer")
        super().__init__(found.examples, found.skipped + answers, seed)
        self.max_length = max_length
        self.ranked: list[Ranked] = found.kept
        unknown = sum(math.isnan(value) for one in self.examples for value in one.logq)
        self.proposal_unknown = unknown

    def worth(self, example: RankedExample) -> tuple[object, ...]:
        """Its scores, its weight, and what its answers were sampled with."""
        return example.scores, example.weight, tuple(map(repr, example.logq))

    def say_proposal(self) -> None:
        """An alert ``proposal_unknown`` when answers' log-probs at sampling were not recorded."""
        if self.proposal_unknown:
            total = sum(len(example.rows) for example in self.examples)
            emit(
                Alert(
                    name="proposal_unknown",
                    message=f"{self.proposal_unknown} of {total} answers have no recorded log-probs: they "
                    f"are "
                    "taken to be samples of the reference. Sample with corrigible generate, which records "
                    "them.",
                )
            )


class _Answer(NamedTuple):
    row: Rendered
    log: Behaviour | None
    scores: list[float]


@dataclass(frozen=True)
class _Make:
    """How rankings become examples; ``left_out`` counts single answers."""

    renderer: Renderer
    max_length: int
    episodes: Mapping[str, Episode]
    invalid: Literal["raise", "skip"]
    least: int
    equal_scores: bool
    left_out: Counter[str]

    def example(self, one: Ranked) -> RankedExample:
        if not 0.0 < one.weight < math.inf:
            raise Unusable("bad_weight", f"weight is {one.weight}, not a positive number")
        if len(one.scores) != len(one.responses):
            raise Unusable("bad_score", f"{len(one.scores)} scores for {len(one.responses)} answers")
        if any(math.isinf(score) for score in one.scores):
            raise Unusable("bad_score", f"scores are {one.scores}, one of them infinite")
        answers = self._answers(one)
        if len(answers) < self.least:
            raise Unusable(
                "one_answer",
                f"{len(answers)} of {len(one.responses)} answers are left to compare",
                advice="Single answers can be learnt from with kto (labels) or sft (demonstrations).",
            )
        scores = tuple(sum(answer.scores) / len(answer.scores) for answer in answers)
        if not self.equal_scores and len(set(scores)) == 1 and len(scores) > 1:
            raise Unusable(
                "no_order",
                f"all {len(scores)} answers have the score {scores[0]:g}",
                advice="Ties alone say nothing about order; leave them out with invalid='skip'.",
            )
        rows, cut = self._fit([answer.row for answer in answers])
        logs = tuple(None if cut else answer.log for answer in answers)
        return RankedExample(
            rows=rows,
            scores=scores,
            logq=tuple(math.nan if log is None else math.fsum(log.logprobs) for log in logs),
            weight=one.weight,
            group=one.group,
            derived_from=one.derived_from,
            prompt_tokens_cut=cut,
            behaviour=logs,
        )

    def _answers(self, one: Ranked) -> list[_Answer]:
        """The answers that can be compared: scored, not empty, short enough, each once."""
        names = one.episodes or (None,) * len(one.responses)
        found: dict[tuple[int, ...], _Answer] = {}
        prompt: tuple[int, ...] | None = None
        for number, (response, score, name) in enumerate(zip(one.responses, one.scores, names, strict=True)):
            if math.isnan(score):
                self.left_out["no_score"] += 1
                continue
            try:
                row, log = response_row(
                    one.prompt, response, self.renderer, self.episodes.get(name or ""), f"answer {number}"
                )
                fitted(row, self.renderer, self.max_length)
            except Unusable as error:
                if self.invalid == "raise":
                    raise
                self.left_out[error.reason] += 1
                continue
            start = row.ids[: row.scored[0]]
            if prompt is not None and start != prompt:
                raise Unusable("prompts_differ", "the answers do not begin with the same prompt tokens")
            prompt = start
            if row.ids in found:
                self.left_out["duplicate_answer"] += 1
                found[row.ids].scores.append(score)
            else:
                found[row.ids] = _Answer(row, log, [score])
        return list(found.values())

    def _fit(self, rows: Sequence[Rendered]) -> tuple[tuple[Rendered, ...], int]:
        """The rows without the oldest prompt tokens, the same ones of every row."""
        cut = max(0, max(map(len, rows)) - self.max_length)
        return tuple(fitted(row, self.renderer, len(row) - cut) for row in rows), cut
