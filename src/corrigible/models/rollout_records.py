"""What a rollout leaves behind: the finished answer, the unfinished one, and their pieces as they come."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from corrigible.errors import BadInputError
from corrigible.files import write_atomically
from corrigible.models.renderer import Rendered
from corrigible.records import FinishReason, Sampling


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens that one version of the weights sampled.

    Attributes:
        weights: SHA-256 of those weights (:func:`corrigible.models.rollout_weights.identity`).
        tokens: how many.
    """

    weights: str
    tokens: int


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
        segments: which weights sampled which tokens, in order; empty where nobody kept count.
    """

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    sampling_logprobs: tuple[float, ...]
    finish_reason: FinishReason
    seed: int
    error: str | None = None
    segments: tuple[Segment, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether the policy ended its turn itself."""
        return self.finish_reason is FinishReason.stop

    @property
    def weights(self) -> str | None:
        """SHA-256 of the weights that sampled all of it; None when there were several, or nobody knows."""
        return self.segments[0].weights if len(self.segments) == 1 else None

    def rendered(self) -> Rendered:
        """Prompt and answer as recorded, for :func:`corrigible.models.sequence_logprobs`."""
        return Rendered.from_tokens(self.prompt_ids, self.ids)


@dataclass(frozen=True, slots=True)
class Partial:
    """An answer so far, enough to go on with it after a kill or after an update of the weights.

    The fields are those of :class:`Generation`, and ``sampling`` the settings. ``finish_reason`` is
    None while it is unfinished; a finished one lets a resumed run skip it.
    """

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    sampling_logprobs: tuple[float, ...]
    segments: tuple[Segment, ...]
    seed: int
    sampling: Sampling
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        counts = {len(self.ids), len(self.logprobs), len(self.sampling_logprobs)}
        if len(counts) != 1 or sum(s.tokens for s in self.segments) not in counts:
            raise BadInputError(
                f"A partial answer with {len(self.ids)} ids, {len(self.logprobs)} and "
                f"{len(self.sampling_logprobs)} log-probabilities and segments of "
                f"{sum(s.tokens for s in self.segments)} tokens: one of each per token.",
            )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types; :meth:`from_json` reads it back exactly."""
        return {**asdict(replace(self, sampling=Sampling())), "sampling": self.sampling.to_json()}

    @classmethod
    def from_json(cls, value: Any) -> Partial:
        """Read back what :meth:`to_json` gave.

        Raises:
            BadInputError: something else.
        """
        try:
            reason = value["finish_reason"]
            return cls(
                prompt_ids=tuple(int(i) for i in value["prompt_ids"]),
                ids=tuple(int(i) for i in value["ids"]),
                logprobs=tuple(float(p) for p in value["logprobs"]),
                sampling_logprobs=tuple(float(p) for p in value["sampling_logprobs"]),
                segments=tuple(Segment(str(s["weights"]), int(s["tokens"])) for s in value["segments"]),
                seed=int(value["seed"]),
                sampling=Sampling.from_json(value["sampling"]),
                finish_reason=None if reason is None else FinishReason(reason),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BadInputError(f"Not a partial answer: {type(error).__name__}: {error}") from error


def write_partials(path: str | Path, partials: Iterable[Partial]) -> None:
    """Write them as JSON lines, all or nothing: a kill leaves the old file or the new one.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    lines = (json.dumps(partial.to_json()) + "\n" for partial in partials)
    write_atomically(Path(path), "".join(lines))


def read_partials(path: str | Path) -> list[Partial]:
    """Read what :func:`write_partials` wrote; none where there is no file.

    Raises:
        BadInputError: a line that is no partial answer, named by its number.
    """
    path = Path(path)
    if not path.exists():
        return []
    partials = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            partials.append(Partial.from_json(json.loads(line)))
        except (json.JSONDecodeError, BadInputError) as error:
            raise BadInputError(
                f"{path} line {number}: {error}", advice="Delete the file to sample from the start."
            ) from error
    return partials


@dataclass(frozen=True, slots=True)
class Delta:
    """More of an answer that is being streamed.

    Attributes:
        prompt, sample: which answer: the prompt's index and the answer's number.
        text: the text that is certain by now; the deltas of an answer together are its ``text``.
            It may lag behind the tokens (half a character, the possible beginning of a stop string).
        ids, logprobs, sampling_logprobs: the tokens drawn since the last delta.
    """

    prompt: int
    sample: int
    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    sampling_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """An answer that is whole."""

    prompt: int
    sample: int
    generation: Generation


RolloutEvent = Delta | Finished
