"""What a back end gives: an answer with its gaps left open, or the reason why there is none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from corrigible.errors import BadInputError
from corrigible.models.renderer import Rendered
from corrigible.models.rollout_records import Generation
from corrigible.models.sampling import sequence_seed
from corrigible.records import FinishReason, MessageLike, Sampling, as_messages
from corrigible.records.base import canonical_json

Prompt = Sequence[MessageLike] | Rendered


class Failure(StrEnum):
    """Why an item has no answer."""

    prompt = "prompt"
    """The prompt is empty or cannot be sent this way."""
    context = "context"
    """The prompt does not fit the model."""
    refused = "refused"
    """The server will not do it (an HTTP status of 3xx or 4xx): a wrong key, model or setting."""
    busy = "busy"
    """The server was still overloaded (429) after the last try."""
    server = "server"
    """The server still failed (5xx) after the last try."""
    connection = "connection"
    """The server could not be reached, or hung up."""
    timeout = "timeout"
    """No whole reply in time."""
    reply = "reply"
    """A reply that is not what the protocol says."""
    filtered = "filtered"
    """The server's own filter took the answer away."""


@dataclass(frozen=True, slots=True)
class ServedAnswer:
    """One answer from a back end. None means that nobody told us.

    Attributes:
        text: the answer, without end of turn and stop string; empty where there is a ``failure``.
        finish_reason: as in :class:`Generation`; None where the server does not tell a stop string
            from an end of turn.
        seed: the seed that was sent for it.
        failure, error: why there is no answer, as a word and for the person who looks.
        prompt_ids, ids: what was read and sampled, exactly.
        logprobs: one per sampled token, under the plain model at temperature 1, nats.
        sampling_logprobs: one per sampled token, under the distribution really sampled from.
        model: what the server says that it is.
    """

    text: str
    finish_reason: FinishReason | None
    seed: int
    failure: Failure | None = None
    error: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    sampling_logprobs: tuple[float, ...] | None = None
    model: str | None = None

    @property
    def ended(self) -> bool | None:
        """Whether the policy ended its turn itself; None where nobody knows."""
        return None if self.finish_reason is None else self.finish_reason is FinishReason.stop

    def known(self) -> Generation:
        """As a :class:`Generation`, for training.

        Raises:
            BadInputError: it is a failure, or something that a generation has is not known.
        """
        if self.failure is not None:
            raise BadInputError(f"There is no answer ({self.failure}): {self.error}")
        if (
            self.prompt_ids is None
            or self.ids is None
            or self.logprobs is None
            or self.sampling_logprobs is None
            or self.finish_reason is None
        ):
            names = ("prompt_ids", "ids", "logprobs", "sampling_logprobs", "finish_reason")
            missing = [name for name in names if getattr(self, name) is None]
            raise BadInputError(
                f"Not known of this answer: {', '.join(missing)}.",
                advice="Sample with the own engine or vLLM, or score the text as a demonstration.",
            )
        return Generation(
            prompt_ids=self.prompt_ids,
            ids=self.ids,
            text=self.text,
            logprobs=self.logprobs,
            sampling_logprobs=self.sampling_logprobs,
            finish_reason=self.finish_reason,
            seed=self.seed,
        )


def failed(
    failure: Failure, error: str, seed: int = 0, prompt_ids: tuple[int, ...] | None = None
) -> ServedAnswer:
    """No answer, and why."""
    reason = FinishReason.context if failure is Failure.context else FinishReason.error
    return ServedAnswer("", reason, seed, failure, error, prompt_ids)


class Backend(Protocol):
    """Whatever answers prompts; the call is that of :func:`corrigible.models.generate`."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        on_done: Callable[[int, list[ServedAnswer]], None] | None = None,
        occurrences: Sequence[int] | None = None,
    ) -> list[list[ServedAnswer]]:
        """Sample ``n`` answers to each prompt."""
        ...


def settled(
    prompts: Sequence[Prompt], n: int | None, sampling: Sampling | None, seed: int | None
) -> tuple[int, Sampling, int]:
    """``n``, settings and seed with their defaults.

    Raises:
        BadInputError: no prompts, or ``n`` below 1.
    """
    sampling = sampling or Sampling(max_tokens=128, n=n or 1)
    n = sampling.n if n is None else n
    if not prompts:
        raise BadInputError("There are no prompts to answer.")
    if n < 1:
        raise BadInputError(f"n must be at least 1; it is {n}.")
    return n, sampling, (sampling.seed or 0) if seed is None else seed


def seeds(
    prompts: Sequence[Prompt], n: int, seed: int, occurrences: Sequence[int] | None
) -> Iterator[list[int]]:
    """For each prompt the seeds of its answers, 31 bits (every server takes those).

    Like the own engine's they depend on the run's seed, the prompt and the answer's number alone.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    for index, prompt in enumerate(prompts):
        key = prompt.ids if isinstance(prompt, Rendered) else tuple(_text(prompt).encode())
        earlier = seen[key] if occurrences is None else occurrences[index]
        seen[key] += 1
        yield [sequence_seed(seed, key, earlier, sample) & 0x7FFFFFFF for sample in range(n)]


def _text(prompt: Sequence[MessageLike]) -> str:
    try:
        return canonical_json([m.to_json() for m in as_messages(prompt)])
    except (BadInputError, ValueError, TypeError):
        return repr(prompt)  # it is refused in its turn


class Gathering:
    """Answers in their places, and ``on_done`` as soon as a prompt has all of its own."""

    def __init__(
        self, prompts: int, n: int, on_done: Callable[[int, list[ServedAnswer]], None] | None
    ) -> None:
        self._found: list[dict[int, ServedAnswer]] = [{} for _ in range(prompts)]
        self._n, self._on_done = n, on_done

    def put(self, prompt: int, sample: int, answer: ServedAnswer) -> None:
        """Answer number ``sample`` to ``prompt`` is there."""
        self._found[prompt][sample] = answer
        if len(self._found[prompt]) == self._n and self._on_done is not None:
            self._on_done(prompt, self._of(prompt))

    def all(self) -> list[list[ServedAnswer]]:
        """Everything, in order."""
        return [self._of(prompt) for prompt in range(len(self._found))]

    def _of(self, prompt: int) -> list[ServedAnswer]:
        return [self._found[prompt][sample] for sample in range(self._n)]
