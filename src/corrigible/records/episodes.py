"""Episodes: what a policy did, step by step, for a chat and for a robot alike."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, JsonValue, Tag, model_validator

from corrigible.errors import BadInputError
from corrigible.records.base import Micros, Record, new_id, now_us
from corrigible.records.items import Item, Message
from corrigible.records.migrations import EPISODE_SCHEMA
from corrigible.records.payloads.acts import ArrayRef


class Sampling(Record):
    """How a text policy was sampled. Temperature 0 is greedy; ``seed`` is the seed of the whole request."""

    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    max_tokens: int = Field(default=128, ge=1)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    seed: int | None = None
    n: int = Field(default=1, ge=1)


class FinishReason(StrEnum):
    """Why a text step ended."""

    stop = "stop"
    """The policy ended its turn."""
    length = "length"
    """``max_tokens`` was reached."""
    stop_string = "stop_string"
    """One of the ``stop`` strings came."""
    context = "context"
    """The context was full."""
    interrupted = "interrupted"
    """A person, or Ctrl-C, stopped it."""
    error = "error"
    """It failed; ``info`` says how."""


Vector = tuple[float, ...]


def _form_of(value: Any) -> str:
    """Which form an observation or action has; names the branch, so that errors speak of one only."""
    if isinstance(value, list | tuple):
        first = value[0] if value else None
        return "messages" if first is None or isinstance(first, dict | Message) else "vector"
    if isinstance(value, dict):
        return "array" if "sha256" in value else "message"
    return "array" if isinstance(value, ArrayRef) else "message"


_ArrayForm = Annotated[ArrayRef, Tag("array")]
_VectorForm = Annotated[Vector, Tag("vector")]
Observation = Annotated[
    Annotated[tuple[Message, ...], Tag("messages")] | _VectorForm | _ArrayForm, Discriminator(_form_of)
]
"""Text: the messages since the last step. Control: float32 values in native units, or an array in a blob."""
Action = Annotated[Annotated[Message, Tag("message")] | _VectorForm | _ArrayForm, Discriminator(_form_of)]
"""Text: one assistant message. Control: float32 values in native units, or an array in a blob."""

_ROUNDING_NATS = 1e-3  # float32 softmax may put a certain token this far above 0


class Step(Record):
    """One observation and the action taken on it.

    ``logprobs`` are nats under the policy that acted: one per sampled token of a text step, one value for a
    control step. ``token_ids`` are exactly the sampled ids (end of turn included when it was sampled),
    ``prompt_token_ids`` those the policy saw; training never re-tokenises either.
    """

    observation: Observation
    action: Action
    logprobs: tuple[float, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    finish_reason: FinishReason | None = None
    reward: float | None = None
    done: bool = False
    info: dict[str, JsonValue] = Field(default_factory=dict)

    @property
    def is_text(self) -> bool:
        """Whether the action is a message."""
        return isinstance(self.action, Message)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.action, Message):
            if self.action.role != "assistant":
                raise ValueError(
                    f"the action of a text step is an assistant message, not {self.action.role!r}"
                )
        elif (
            self.token_ids is not None or self.prompt_token_ids is not None or self.finish_reason is not None
        ):
            raise ValueError("token ids and finish_reason belong to text steps")
        if self.logprobs is not None:
            if self.token_ids is not None:
                if len(self.logprobs) != len(self.token_ids):
                    raise ValueError(
                        f"{len(self.logprobs)} logprobs for {len(self.token_ids)} sampled tokens"
                    )
                if any(value > _ROUNDING_NATS for value in self.logprobs):
                    raise ValueError("the log-probability of a token is at most 0")
            elif not self.is_text and len(self.logprobs) != 1:
                raise ValueError("a control step has one log-probability, of the whole action")
        return self


class Episode(Record):
    """A run of one policy on one task. ``policy`` is a policy version's id, None for people and scripts.

    A branch (made by a rewind) names its ``parent`` and the parent step it starts from. ``env`` describes
    the environment (with its spec hash) where there is one.
    """

    schema_version: Literal["corrigible/episode@1"] = EPISODE_SCHEMA
    id: str = Field(default_factory=new_id, min_length=1)
    task: str
    policy: str | None = None
    sampling: Sampling | None = None
    steps: tuple[Step, ...]
    parent: str | None = None
    branch_step: int | None = Field(default=None, ge=0)
    env: dict[str, JsonValue] | None = None
    created_at: Micros = Field(default_factory=now_us)
    info: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.parent is None) != (self.branch_step is None):
            raise ValueError("a branch names its parent and its branch_step, both")
        if self.parent == self.id:
            raise ValueError("an episode cannot be its own parent")
        early = next((i for i, step in enumerate(self.steps[:-1]) if step.done), None)
        if early is not None:
            raise ValueError(f"step {early} is done, and {len(self.steps) - early - 1} more follow")
        return self

    def prompt_messages(self) -> tuple[Message, ...]:
        """All messages before the last action.

        Raises:
            BadInputError: when this is not a text episode.
        """
        messages: list[Message] = []
        for step in self._text_steps():
            messages.extend(m for m in step.observation if isinstance(m, Message))
            messages.append(step.action)  # type: ignore[arg-type]
        return tuple(messages[:-1])

    def response_message(self) -> Message:
        """The last action of a text episode.

        Raises:
            BadInputError: when this is not a text episode.
        """
        action = self._text_steps()[-1].action
        assert isinstance(action, Message)
        return action

    def response_text(self) -> str:
        """The text of the last action.

        Raises:
            BadInputError: when this is not a text episode.
        """
        return self.response_message().text

    def prompt_item(self) -> Item:
        """What judgements on this episode have as context: its prompt messages as an item."""
        return Item.of_messages(self.prompt_messages(), "prompt")

    def response_item(self) -> Item:
        """What judgements on this episode are about: the text of its last action as an item."""
        return Item.of_text(self.response_text(), "response")

    def _text_steps(self) -> tuple[Step, ...]:
        if not self.steps or not all(
            step.is_text and isinstance(step.observation, tuple) and not _is_vector(step.observation)
            for step in self.steps
        ):
            raise BadInputError(
                f"episode {self.id} holds no messages.",
                advice="Prompt and response exist for text episodes with at least one step.",
            )
        return self.steps


def _is_vector(values: tuple[Any, ...]) -> bool:
    return bool(values) and not isinstance(values[0], Message)
