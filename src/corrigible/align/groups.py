"""Groups of sampled answers with rewards, as training examples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from corrigible.align.advantages import Estimator, group_advantages, spread
from corrigible.align.sources import ListSource, say_skipped
from corrigible.errors import BadInputError, NumericsError
from corrigible.events import Alert, emit
from corrigible.models import Generation, Rendered
from corrigible.records import FinishReason, Sampling
from corrigible.rewards.signals import Scores

Logprobs = tuple[float, ...] | None
"""Recorded log-probs of an answer's tokens, nats; ``None`` when nobody recorded them."""


@dataclass(frozen=True)
class GroupExample:
    """Answers that a policy sampled to one prompt, and what each is worth beside the others.

    Attributes:
        rows: the answers after their prompt, exactly as sampled; only those with a reward.
        advantages: of each answer; :func:`~corrigible.align.advantages.group_advantages`.
        rewards: of each answer, for the record.
        behaviour: per answer, the log-probs of its tokens under the policy that sampled them, at
            ``temperature``; ``None`` when they are not known.
        temperature: of the log-probs in ``behaviour``.
        weight: 1; a group counts through its answers.
        derived_from: ids of the feedback records behind the rewards, where there are any.
    """

    rows: tuple[Rendered, ...]
    advantages: tuple[float, ...]
    rewards: tuple[float, ...]
    behaviour: tuple[Logprobs, ...]
    temperature: float = 1.0
    weight: float = 1.0
    derived_from: tuple[str, ...] = ()

    def part(self, start: int, stop: int) -> GroupExample:
        """The answers ``start`` to ``stop`` (exclusive), with the advantages they have in the whole group."""
        return replace(
            self,
            rows=self.rows[start:stop],
            advantages=self.advantages[start:stop],
            rewards=self.rewards[start:stop],
            behaviour=self.behaviour[start:stop],
        )


@dataclass(frozen=True)
class Asked:
    """What was asked for when groups were sampled, to hold what came back against it.

    Attributes:
        prompts: ids of each prompt, generation header included.
        n: answers per prompt.
        end_ids: ids that end the policy's turn (``policy.end_ids``).
    """

    prompts: Sequence[Sequence[int]]
    n: int
    end_ids: Collection[int] = ()


def check_answers(groups: Sequence[Sequence[Generation]], asked: Asked) -> None:
    """Hold sampled answers against what was asked for, before they are learnt from.

    Raises:
        BadInputError: ``prompt_skipped`` (a prompt without all its answers), ``prompt_mismatch`` (answers to
            other tokens) or ``finish_reason`` (an answer that was cut counts as ended, or the reverse).
    """
    if len(groups) != len(asked.prompts):
        raise BadInputError(
            f"prompt_skipped: {len(asked.prompts)} prompts, answers to {len(groups)}.",
            advice="Sample again; a prompt that cannot be answered has answers with an error instead.",
        )
    for number, (prompt, group) in enumerate(zip(asked.prompts, groups, strict=True)):
        if len(group) != asked.n:
            raise BadInputError(f"prompt_skipped: prompt {number} has {len(group)} of {asked.n} answers.")
        for answer in group:
            if answer.error is not None:
                continue
            if tuple(answer.prompt_ids) != tuple(prompt):
                raise BadInputError(
                    f"prompt_mismatch: an answer to prompt {number} was sampled after other tokens.",
                    advice="Template or tokenizer differ between whoever samples and whoever trains.",
                )
            ended = bool(answer.ids) and answer.ids[-1] in asked.end_ids
            if asked.end_ids and ended != (answer.finish_reason is FinishReason.stop):
                raise BadInputError(
                    f"finish_reason: an answer to prompt {number} finished with '{answer.finish_reason}', "
                    f"but its last token {'ends' if ended else 'does not end'} a turn.",
                    advice="An answer that was cut must not be learnt from as if the policy had ended it.",
                )


def group_examples(
    groups: Sequence[Sequence[Generation]],
    scores: Sequence[Scores],
    *,
    estimator: Estimator = "mean_std",
    sampling: Sampling | None = None,
    asked: Asked | None = None,
) -> tuple[list[GroupExample], Counter[str]]:
    """Groups of answers and their rewards as examples, without what teaches nothing.

    An answer that failed (``no_answer``) or whose reward is a reason instead of a value
    (``no_reward``) is left out, of the group's mean as well. A group with fewer than two answers left
    (``one_answer``), or whose rewards are all the same (``no_spread``), has no gradient and is left out.

    Args:
        groups: per prompt, its answers.
        scores: per prompt, one value or reason per answer.
        estimator: how rewards become advantages.
        sampling: how the answers were sampled; temperature 1 when absent. At temperature 1 the
            policy's plain log-probs are what it was (whatever filter cut the tail); at another one
            the log-probs under the sampling distribution are, which a filter spoils.
        asked: what was asked for; with it every answer is held against it first.

    Returns:
        The examples, and how many answers and groups were left out, by reason.

    Raises:
        BadInputError: the two lists do not fit together, answers of a group have different prompts,
            ``sampling_filtered`` (a temperature other than 1 together with top-p, top-k or min-p),
            greedy sampling, or whatever :func:`check_answers` finds.
        NumericsError: ``behaviour_not_finite``.
    """
    if asked is not None:
        check_answers(groups, asked)
    sampling = sampling or Sampling()
    if sampling.temperature == 0.0:
        raise BadInputError(
            "Greedy answers have no probability to learn from.", advice="Sample at temperature 1."
        )
    filtered = sampling.top_p < 1.0 or sampling.top_k is not None or sampling.min_p > 0.0
    if filtered and sampling.temperature != 1.0:
        raise BadInputError(
            f"sampling_filtered: log-probs at temperature {sampling.temperature} are those after a filter.",
            advice="Sample with temperature alone (top_p=1, no top_k, min_p=0), or at temperature 1.",
        )
    if filtered:
        emit(
            Alert(
                name="sampling_filtered",
                message="The answers were sampled with a filter (top-p, top-k or min-p), which the ratio to "
                "the policy leaves out of account: the gradient is biased towards what the filter kept.",
            )
        )
    if len(groups) != len(scores) or any(len(g) != len(s) for g, s in zip(groups, scores, strict=False)):
        raise BadInputError("There must be one reward (or reason) for every answer of every group.")
    found: list[GroupExample] = []
    skipped: Counter[str] = Counter()
    for number, (group, score) in enumerate(zip(groups, scores, strict=True)):
        usable: list[int] = []
        for index, (generation, valid) in enumerate(zip(group, score.valid, strict=True)):
            if generation.error is not None or not generation.ids:
                skipped["no_answer"] += 1
            elif not valid:
                skipped["no_reward"] += 1
            else:
                usable.append(index)
        if len(usable) < 2:
            skipped["one_answer"] += 1
            continue
        rewards = torch.tensor([float(score.values[i]) for i in usable], dtype=torch.float64)
        together = torch.zeros(len(usable), dtype=torch.long)
        if not bool(spread(rewards, together)[0]):
            skipped["no_spread"] += 1
            continue
        answers = [group[i] for i in usable]
        if len({answer.prompt_ids for answer in answers}) > 1:
            raise BadInputError(f"prompts_differ: the answers of group {number} have different prompts.")
        found.append(
            GroupExample(
                rows=tuple(answer.rendered() for answer in answers),
                advantages=tuple(group_advantages(rewards, together, estimator=estimator).tolist()),
                rewards=tuple(rewards.tolist()),
                behaviour=tuple(_behaviour(answer, sampling.temperature, number) for answer in answers),
                temperature=sampling.temperature,
            )
        )
    return found, skipped


class GroupSource(ListSource[GroupExample]):
    """Groups that were sampled before training, in an order that only depends on the seed.

    Args:
        groups, scores, estimator, sampling, asked: as for :func:`group_examples`.
        seed: of the order of groups.

    Attributes:
        skipped: how many answers (``no_answer``, ``no_reward``) and groups (``one_answer``,
            ``no_spread``) were left out; an alert says so, too.

    Raises:
        BadInputError, NumericsError: as :func:`group_examples`, and when no group is left.
    """

    kind = "groups"

    def __init__(
        self,
        groups: Sequence[Sequence[Generation]],
        scores: Sequence[Scores],
        *,
        estimator: Estimator = "mean_std",
        sampling: Sampling | None = None,
        asked: Asked | None = None,
        seed: int = 0,
    ) -> None:
        examples, skipped = group_examples(
            groups, scores, estimator=estimator, sampling=sampling, asked=asked
        )
        if not examples:
            why = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "the input was empty"
            raise BadInputError(
                f"There is no group to train on ({why}).",
                advice="Prompts whose answers are all equally good teach nothing: take others.",
            )
        say_skipped(skipped, "group")
        super().__init__(examples, skipped, seed)

    def worth(self, example: GroupExample) -> tuple[object, ...]:
        """Its answers' advantages, and what was recorded of them."""
        return example.advantages, example.behaviour, example.temperature


def _behaviour(answer: Generation, temperature: float, number: int) -> Logprobs:
    recorded: Logprobs = answer.logprobs if temperature == 1.0 else answer.sampling_logprobs
    if recorded is None:
        return None
    if len(recorded) != len(answer.ids):
        raise BadInputError(
            f"behaviour_shape: group {number} has {len(recorded)} log-probs for {len(answer.ids)} tokens."
        )
    if not all(math.isfinite(value) for value in recorded):
        raise NumericsError(
            f"behaviour_not_finite: group {number} was recorded with NaN or infinite log-probs.",
            advice="The policy that sampled it was damaged; sample again.",
        )
    return recorded
