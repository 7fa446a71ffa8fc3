"""Sampling answers from a policy, in one call; and an answer as an episode to keep.

:mod:`corrigible.models.rollout` does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corrigible.errors import BadInputError
from corrigible.models.policy import LanguagePolicy
from corrigible.models.renderer import Rendered
from corrigible.models.rollout import SLOTS, RolloutEngine
from corrigible.models.rollout_records import Generation
from corrigible.records import (
    Episode,
    Message,
    MessageLike,
    Sampling,
    Step,
    as_messages,
    new_id,
    now_us,
)

if TYPE_CHECKING:
    from corrigible.models.backends import ServedAnswer

__all__ = ["BATCH_SIZE", "Generation", "generate", "to_episode"]

BATCH_SIZE = SLOTS


def generate(
    policy: LanguagePolicy,
    prompts: Sequence[Sequence[MessageLike] | Rendered],
    *,
    n: int | None = None,
    sampling: Sampling | None = None,
    seed: int | None = None,
    batch_size: int = BATCH_SIZE,
    on_done: Callable[[int, list[Generation]], None] | None = None,
    occurrences: Sequence[int] | None = None,
    weights: str | None = None,
    keep: str | Path | None = None,
) -> list[list[Generation]]:
    """Sample ``n`` answers to each prompt.

    Args:
        policy: the model.
        prompts: conversations (messages in the OpenAI form), or already rendered ones that end in
            the assistant's header.
        n: answers per prompt (default: ``sampling.n``).
        sampling: temperature, filters, lengths, stop strings (default: temperature 1, at most 128 tokens).
        seed: the run's seed (default: ``sampling.seed``, else 0).
        batch_size: sequences sampled at a time. It changes the speed and the memory, not the text.
        on_done: called with a prompt's index and its answers as soon as all of them are there, in
            whatever order prompts finish: keep them, and an interruption loses nothing that was done.
        occurrences: for each prompt, how many equal ones came before it (default: in ``prompts``).
            Equal prompts are told apart by it; a resumed run passes what the whole run had.
        weights: SHA-256 of the weights that are meant (:meth:`LanguagePolicy.weights_sha256`).
        keep: a file for the unfinished answers, written now and then. The same call with the same
            file goes on where a killed one stopped, token by token.

    Returns:
        For each prompt, in order, its ``n`` generations. A prompt that cannot be answered (too long
        for the context, refused by the chat template) gets generations with ``error`` set; the
        others are answered all the same.

    Raises:
        BadInputError: no prompts, or a number below 1.
        NumericsError: ``nonfinite_logits``; ``stale_weights`` (not the weights that were meant, or
            they changed while sampling); ``out_of_memory``.
    """
    if batch_size < 1:
        raise BadInputError(f"batch_size must be at least 1; it is {batch_size}.")
    engine = RolloutEngine(policy, slots=batch_size)
    return engine.generate(
        prompts,
        n=n,
        sampling=sampling,
        seed=seed,
        on_done=on_done,
        occurrences=occurrences,
        weights=weights,
        keep=keep,
    )


def to_episode(
    prompt_messages: Sequence[MessageLike],
    generation: Generation | ServedAnswer,
    policy_version_id: str | None,
    task: str,
    sampling: Sampling,
) -> Episode:
    """A one-step episode: the prompt observed, the answer given, with ids, log-probs and settings.

    The step's ``logprobs`` are those of the plain model. Where sampling was not plain, those of the
    distribution really sampled from, which an importance ratio needs, are in ``info["sampling_logprobs"]``
    (null where nobody knows them). ``info["segments"]`` says which weights sampled how many tokens.

    Raises:
        BadInputError: the generation is an error, not an answer.
    """
    if generation.error is not None:
        raise BadInputError(f"There is no answer to record: {generation.error}")
    messages = as_messages(prompt_messages)
    info: dict[str, Any] = {"seed": generation.seed}
    if generation.sampling_logprobs != generation.logprobs:
        known = generation.sampling_logprobs
        info["sampling_logprobs"] = None if known is None else list(known)
    if isinstance(generation, Generation) and generation.segments:
        info["segments"] = [{"weights": s.weights, "tokens": s.tokens} for s in generation.segments]
    step = Step(
        observation=messages,
        action=Message(role="assistant", content=generation.text),
        logprobs=generation.logprobs,
        token_ids=generation.ids,
        prompt_token_ids=generation.prompt_ids,
        finish_reason=generation.finish_reason,
        done=True,
        info=info,
    )
    return Episode(
        id=new_id(),
        task=task,
        policy=policy_version_id,
        sampling=sampling,
        steps=(step,),
        created_at=now_us(),
    )
