"""Answers to evaluate, sampled in chunks that are kept as they come, so that Ctrl-C costs one chunk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from corrigible.errors import BadInputError
from corrigible.events import track
from corrigible.records import Episode, Message, Sampling, Step
from corrigible.records.base import canonical_json

if TYPE_CHECKING:
    from corrigible.models import Generation, LanguagePolicy

_CHUNK_PROMPTS = 16  # prompts sampled between two writes: what a kill can cost


def sample_episodes(
    policy: LanguagePolicy,
    prompts: Sequence[Sequence[Message]],
    *,
    n: int = 1,
    sampling: Sampling,
    seed: int = 0,
    policy_version: str,
    variant: str = "",
    task: str = "evaluate",
    keep: Path | None = None,
    label: str = "sampling",
) -> list[Episode]:
    """``n`` episodes per prompt, prompt by prompt; with ``keep`` written as they come.

    A file that an interrupted call left is continued. The result is the same as without the
    interruption, because chance depends on ``seed`` and the prompt only. A prompt that cannot be
    answered (too long for the context) gives an episode that says so, and is counted later.

    Raises:
        BadInputError: ``keep`` belongs to another policy, other prompts or other settings.
    """
    from corrigible.models import generate, to_episode

    if not prompts:
        raise BadInputError("there are no prompts to sample from", advice="give at least one prompt")
    log = None
    done: list[Episode] = []
    if keep is not None:
        log = _EpisodeLog(
            keep,
            {
                "weights": policy.weights_sha256(),
                "variant": variant,
                "sampling": sampling.to_json(),
                "n": n,
                "seed": seed,
                "prompts": hashlib.sha256(
                    canonical_json([[m.to_json() for m in p] for p in prompts]).encode()
                ).hexdigest(),
            },
            chunk=_CHUNK_PROMPTS * n,
            total=len(prompts) * n,
        )
        done = log.read()
    starts = range(0, len(prompts), _CHUNK_PROMPTS)
    for start in track([s for s in starts if s * n >= len(done)], label, unit="chunk"):
        chunk = prompts[start : start + _CHUNK_PROMPTS]
        answers = generate(policy, list(chunk), n=n, sampling=sampling, seed=seed)
        fresh = [
            to_episode(prompt, generation, policy_version, task, sampling)
            if generation.error is None
            else _no_answer(prompt, generation, policy_version, task, sampling)
            for prompt, generations in zip(chunk, answers, strict=True)
            for generation in generations
        ]
        if log is not None:
            log.append(fresh)
        done.extend(fresh)
    return done


class _EpisodeLog:
    """JSON lines: what the episodes belong to, then whole chunks of them."""

    def __init__(self, path: Path, belongs_to: Mapping[str, object], *, chunk: int, total: int) -> None:
        self.path = path
        self.belongs_to = canonical_json(dict(belongs_to))
        self.chunk, self.total = chunk, total

    def read(self) -> list[Episode]:
        """The whole chunks that are there; a torn tail is cut off."""
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        first, *rest = text.split("\n")
        if not rest:  # new, or killed before its first line was whole
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(self.belongs_to + "\n", encoding="utf-8")
            return []
        if first != self.belongs_to:
            raise BadInputError(
                f"{self.path} holds answers of another policy, other prompts or other settings",
                advice="give another directory, or delete this one to start again",
            )
        lines = rest[:-1]  # what follows the last line break is torn
        whole = len(lines) if len(lines) == self.total else len(lines) - len(lines) % self.chunk
        try:
            episodes = [Episode.from_json(line) for line in lines[:whole]]
        except (BadInputError, json.JSONDecodeError) as error:
            raise BadInputError(
                f"{self.path} is damaged: {error}", advice="delete it to sample again"
            ) from error
        kept = "".join(line + "\n" for line in [first, *lines[:whole]])
        os.truncate(self.path, len(kept.encode("utf-8")))
        return episodes

    def append(self, episodes: Sequence[Episode]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(episode.to_json_text() + "\n" for episode in episodes)
            file.flush()
            os.fsync(file.fileno())


def _no_answer(
    prompt: Sequence[Message], generation: Generation, policy_version: str, task: str, sampling: Sampling
) -> Episode:
    step = Step(
        observation=tuple(prompt),
        action=Message(role="assistant", content=""),
        logprobs=(),
        token_ids=(),
        prompt_token_ids=generation.prompt_ids,
        finish_reason=generation.finish_reason,
        done=True,
        info={"error": generation.error},
    )
    return Episode(task=task, policy=policy_version, sampling=sampling, steps=(step,))
