"""Sampling answers from a policy: batched, cached, and independent of how it was batched.

Each prompt is read once, whatever the number of its answers; rows that have finished leave the
batch; only the last position reaches the output head; and every sequence has its own random
numbers (see :mod:`corrigible.models.sampling`), so its text depends on the run's seed, its prompt
and its number alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from corrigible.errors import BadInputError, NumericsError
from corrigible.events import Progress, emit
from corrigible.models.cache import new_cache
from corrigible.models.policy import LanguagePolicy
from corrigible.models.renderer import Rendered
from corrigible.models.sampling import draw, sequence_seed, uniforms
from corrigible.records import (
    Episode,
    FinishReason,
    Message,
    MessageLike,
    Sampling,
    Step,
    as_messages,
    new_id,
    now_us,
)

BATCH_SIZE = 64


@dataclass(frozen=True, slots=True)
class Generation:
    """One sampled answer, with everything that training on it later needs.

    Attributes:
        prompt_ids: what the policy read, generation header included.
        ids: what it sampled, exactly; the end-of-turn token is there if it was drawn.
        text: ``ids`` decoded, without the end of turn and without a stop string and what follows it.
        logprobs: one per id, under the plain model at temperature 1, nats.
        sampling_logprobs: one per id, under the distribution that was really sampled from.
        finish_reason: ``stop`` (ended its turn), ``length``, ``stop_string``, ``context`` (the context
            was full; with ``error`` set, the prompt alone did not fit), ``error`` (see ``error``).
        seed: the sequence's own seed; with it ``generate_reference`` draws the same.
        error: why there is no answer, for the person who looks.
    """

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    sampling_logprobs: tuple[float, ...]
    finish_reason: FinishReason
    seed: int
    error: str | None = None

    @property
    def ended(self) -> bool:
        """Whether the policy ended its turn itself."""
        return self.finish_reason is FinishReason.stop

    def rendered(self) -> Rendered:
        """Prompt and answer as recorded, for :func:`corrigible.models.sequence_logprobs`."""
        return Rendered.from_tokens(self.prompt_ids, self.ids)


@dataclass(slots=True)
class _Row:
    """A sequence while it is being sampled."""

    prompt: int
    sample: int
    seed: int
    budget: int
    draws: np.ndarray
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)


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

    Returns:
        For each prompt, in order, its ``n`` generations. A prompt that cannot be answered (too long
        for the context, refused by the chat template) gets generations with ``error`` set; the
        others are answered all the same.

    Raises:
        BadInputError: no prompts, or a number below 1.
        NumericsError: the model's logits are not finite.
    """
    sampling = sampling or Sampling(max_tokens=128, n=n or 1)
    n = sampling.n if n is None else n
    seed = (sampling.seed or 0) if seed is None else seed
    if not prompts:
        raise BadInputError("There are no prompts to answer.")
    if n < 1 or batch_size < 1:
        raise BadInputError(f"n and batch_size must be at least 1; they are {n} and {batch_size}.")

    results: list[list[Generation | None]] = [[None] * n for _ in prompts]
    rendered: dict[int, tuple[int, ...]] = {}
    rows: list[_Row] = []
    seen: Counter[tuple[int, ...]] = Counter()

    def finish(row_prompt: int, sample: int, generation: Generation) -> None:
        results[row_prompt][sample] = generation
        answers = [g for g in results[row_prompt] if g is not None]
        if len(answers) == n and on_done is not None:
            on_done(row_prompt, answers)

    refused: list[tuple[int, Generation]] = []
    for index, prompt in enumerate(prompts):
        ids: tuple[int, ...] = ()
        try:
            ids = prompt.ids if isinstance(prompt, Rendered) else policy.renderer.prompt(prompt).ids
            if not ids:
                raise BadInputError("The prompt is empty.")
        except BadInputError as error:
            refused.append((index, _refusal(ids, FinishReason.error, str(error))))
            continue
        room = policy.context_length - len(ids)
        if room < 1:
            most = policy.context_length
            text = f"The prompt has {len(ids)} tokens; {policy.name} reads {most}, answer included."
            refused.append((index, _refusal(ids, FinishReason.context, text)))
            continue
        rendered[index] = ids
        earlier = seen[ids] if occurrences is None else occurrences[index]
        for sample in range(n):
            own_seed = sequence_seed(seed, ids, earlier, sample)
            budget = min(sampling.max_tokens, room)
            rows.append(_Row(index, sample, own_seed, budget, uniforms(own_seed, budget)))
        seen[ids] += 1
    for index, generation in refused:
        for sample in range(n):
            finish(index, sample, generation)

    # Longest prompts first: memory trouble shows at once, and neighbours need little padding.
    rows.sort(key=lambda row: (-len(rendered[row.prompt]), row.prompt, row.sample))
    total, done = len(prompts) * n, len(refused) * n
    emit(Progress(task="generating", done=done, total=total, unit="answer"))
    with torch.inference_mode(), _evaluating(policy):
        for start in range(0, len(rows), batch_size):
            for row, reason in _sample_batch(policy, rows[start : start + batch_size], rendered, sampling):
                finish(
                    row.prompt, row.sample, _generation(policy, row, rendered[row.prompt], sampling, reason)
                )
                done += 1
                emit(Progress(task="generating", done=done, total=total, unit="answer"))
    return [[g for g in answers if g is not None] for answers in results]


def _sample_batch(
    policy: LanguagePolicy, rows: Sequence[_Row], rendered: dict[int, tuple[int, ...]], sampling: Sampling
) -> Iterator[tuple[_Row, FinishReason]]:
    device = policy.device
    unique = list(dict.fromkeys(row.prompt for row in rows))
    lengths = [len(rendered[prompt]) for prompt in unique]
    width = max(lengths)
    ids = torch.zeros((len(unique), width), dtype=torch.long)
    mask = torch.zeros((len(unique), width), dtype=torch.long)
    for i, prompt in enumerate(unique):  # padding on the left, so that all rows end together
        ids[i, width - lengths[i] :] = torch.tensor(rendered[prompt])
        mask[i, width - lengths[i] :] = 1
    ids, mask = ids.to(device), mask.to(device)
    padded = min(lengths) < width
    cache = new_cache(policy.network.config, room=max(row.budget for row in rows))
    logits = _forward(policy, ids, mask if padded else None, (mask.cumsum(-1) - 1).clamp(min=0), cache)

    active = list(rows)
    spread = torch.tensor([unique.index(row.prompt) for row in rows], device=device)
    logits, mask = logits.index_select(0, spread), mask.index_select(0, spread)
    positions = torch.tensor([len(rendered[row.prompt]) for row in rows], device=device)
    cache.batch_select_indices(spread)
    running = [True] * len(active)
    for step in range(max(row.budget for row in rows)):
        uniform = torch.tensor(
            [row.draws[step] if step < row.budget else 0.0 for row in active], device=device
        )
        drawn, plain, chosen = draw(logits, sampling, uniform)
        for i, (token, logprob, sampling_logprob) in enumerate(
            zip(drawn.tolist(), plain.tolist(), chosen.tolist(), strict=True)
        ):
            if not running[i]:
                continue
            row = active[i]
            if not np.isfinite(logprob):
                raise NumericsError(
                    f"{policy.name} gives logits that are not finite (prompt {row.prompt}, token {step}).",
                    advice="The weights are damaged or overflow in this dtype; try dtype='float32'.",
                )
            row.ids.append(token)
            row.logprobs.append(logprob)
            row.sampling_logprobs.append(sampling_logprob)
            reason = _finished(policy, row, sampling)
            if reason is not None:
                running[i] = False
                yield row, reason
        left = sum(running)
        if left == 0:
            return
        # Leaving costs a copy of the cache, so a few finished rows may ride along for a while.
        if left <= len(active) * 7 // 8:
            keep = torch.tensor([i for i, alive in enumerate(running) if alive], device=device)
            active = [row for row, alive in zip(active, running, strict=True) if alive]
            running = [True] * left
            drawn, mask, positions = drawn[keep], mask[keep], positions[keep]
            cache.batch_select_indices(keep)
        mask = torch.cat([mask, mask.new_ones((len(active), 1))], dim=-1)
        logits = _forward(policy, drawn[:, None], mask if padded else None, positions[:, None], cache)
        positions = positions + 1


def _forward(
    policy: LanguagePolicy, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, cache: Any
) -> torch.Tensor:
    """Logits ``(n, vocabulary)`` after the last of ``ids`` ``(n, tokens)``."""
    logits: torch.Tensor = policy.network(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits
    return logits[:, -1]


def _finished(policy: LanguagePolicy, row: _Row, sampling: Sampling) -> FinishReason | None:
    if row.ids[-1] in policy.end_ids:
        return FinishReason.stop
    if sampling.stop and any(stop in policy.renderer.decode(row.ids) for stop in sampling.stop):
        return FinishReason.stop_string
    if len(row.ids) >= row.budget:
        return FinishReason.length if row.budget == sampling.max_tokens else FinishReason.context
    return None


def _generation(
    policy: LanguagePolicy, row: _Row, prompt_ids: tuple[int, ...], sampling: Sampling, reason: FinishReason
) -> Generation:
    text = policy.renderer.decode(row.ids[:-1] if reason is FinishReason.stop else row.ids)
    if reason is FinishReason.stop_string:
        text = text[: min(text.index(stop) for stop in sampling.stop if stop in text)]
    return Generation(
        prompt_ids=prompt_ids,
        ids=tuple(row.ids),
        text=text,
        logprobs=tuple(row.logprobs),
        sampling_logprobs=tuple(row.sampling_logprobs),
        finish_reason=reason,
        seed=row.seed,
    )


def _refusal(ids: tuple[int, ...], reason: FinishReason, error: str) -> Generation:
    return Generation(ids, (), "", (), (), reason, 0, error)


@contextmanager
def _evaluating(policy: LanguagePolicy) -> Iterator[None]:
    """No dropout while sampling, whatever the trainer has set."""
    training = policy.model.training
    policy.model.eval()
    try:
        yield
    finally:
        policy.model.train(training)


def to_episode(
    prompt_messages: Sequence[MessageLike],
    generation: Generation,
    policy_version_id: str | None,
    task: str,
    sampling: Sampling,
) -> Episode:
    """A one-step episode: the prompt observed, the answer given, with ids, log-probs and settings.

    The step's ``logprobs`` are those of the plain model. Where sampling was not plain, those of the
    distribution really sampled from, which an importance ratio needs, are in ``info["sampling_logprobs"]``.

    Raises:
        BadInputError: the generation is an error, not an answer.
    """
    if generation.error is not None:
        raise BadInputError(f"There is no answer to record: {generation.error}")
    messages = as_messages(prompt_messages)
    info: dict[str, Any] = {"seed": generation.seed}
    if generation.sampling_logprobs != generation.logprobs:
        info["sampling_logprobs"] = list(generation.sampling_logprobs)
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
