"""What a policy was trained to be asked with: the conditioning that serving must put back.

A policy that learnt "a helpful answer: ..." gives one when it is asked for one. The same object writes the
condition into training texts and into prompts, so that the two cannot differ; it is stored with the policy
version as plain data.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from corrigible.errors import BadInputError
from corrigible.models import Rendered, Renderer
from corrigible.records import Message, MessageLike
from corrigible.records.items import as_messages


@dataclass(frozen=True)
class Serving:
    """How prompts are dressed for a policy that was trained on dressed ones.

    Attributes:
        system: added to the system message, which is made when there is none.
        user_prefix: what every user message begins with.
        user_suffix: what the last user message ends with.
        assistant_prefix: what the assistant's turn begins with; the policy goes on after it.
        every_turn: the assistant's earlier turns begin with ``assistant_prefix``, too.
        demonstrations: how many retrieved demonstrations stand before the conversation.
        retry: what the user says after an answer to ask for a better one; ``{question}`` becomes the
            first user message. Empty when there are no further turns.
        turns: how many answers are asked for in all.
        context_turns: how many of the latest answers stay in sight when asking again; 0 is all.
    """

    system: str = ""
    user_prefix: str = ""
    user_suffix: str = ""
    assistant_prefix: str = ""
    every_turn: bool = False
    demonstrations: int = 0
    retry: str = ""
    turns: int = 1
    context_turns: int = 0

    def apply(
        self, messages: str | Sequence[MessageLike], demonstrations: Sequence[MessageLike] = ()
    ) -> tuple[Message, ...]:
        """A conversation as the policy knows it; :attr:`assistant_prefix` is left to :meth:`prompt`.

        Args:
            messages: what was said; the last message is the one to be answered.
            demonstrations: the turns of retrieved demonstrations, most of whose worth is in being near.

        Raises:
            BadInputError: nothing was said, or the policy was trained with demonstrations and none are given.
        """
        said = list(as_messages(messages))
        if not said:
            raise BadInputError("There are no messages to answer.", advice="Give at least one user message.")
        if self.demonstrations and not demonstrations:
            raise BadInputError(
                f"This policy was trained with {self.demonstrations} demonstrations before each question, "
                "and none are given.",
                advice="Retrieve them: Retriever.topk over its bank, then demonstration_turns(...).",
            )
        last = max((i for i, m in enumerate(said) if m.role == "user"), default=-1)
        for i, message in enumerate(said):
            if message.role == "user":
                text = self.user_suffix if i == last else ""
                said[i] = around(message, self.user_prefix, text)
            elif message.role == "assistant" and self.every_turn:
                said[i] = around(message, self.assistant_prefix, "")
        opening = 1 if said[0].role == "system" else 0
        said[opening:opening] = as_messages(list(demonstrations))
        if self.system:
            if said[0].role == "system":
                said[0] = around(said[0], "", f"\n{self.system}")
            else:
                said.insert(0, Message(role="system", content=self.system))
        return tuple(said)

    def prompt(
        self,
        renderer: Renderer,
        messages: str | Sequence[MessageLike],
        demonstrations: Sequence[MessageLike] = (),
    ) -> Rendered:
        """The tokens after which the policy speaks: a conversation as it knows it, its turn begun.

        Raises:
            BadInputError: as :meth:`apply` and :meth:`~corrigible.models.Renderer.prompt` do.
        """
        return renderer.prompt(self.apply(messages, demonstrations), begin=self.assistant_prefix)

    def again(self, messages: Sequence[MessageLike], answers: Sequence[str]) -> tuple[Message, ...]:
        """The conversation in which a further answer is asked for, whatever the earlier ones were worth.

        Args:
            messages: the first question; its first user message is what ``{question}`` stands for.
            answers: given so far, in order; of these the latest :attr:`context_turns` stay in sight.

        Raises:
            BadInputError: the policy was not trained to answer again.
        """
        said = list(as_messages(messages))
        if not self.retry:
            raise BadInputError(
                "This policy was not trained to improve on its answers.",
                advice="Ask it once, or train it with rise.",
            )
        question = next((m.text for m in said if m.role == "user"), "")
        for answer in answers[-self.context_turns :] if self.context_turns else answers:
            said.append(Message(role="assistant", content=answer))
            # No format(): a question may hold braces of its own.
            said.append(Message(role="user", content=self.retry.replace("{question}", question)))
        return tuple(said)

    def to_json(self) -> dict[str, Any]:
        """What differs from no conditioning at all, as plain data."""
        return {name: value for name, value in asdict(self).items() if value != getattr(PLAIN, name)}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """What :meth:`to_json` gave.

        Raises:
            BadInputError: an unknown key (served without it, the policy would be another one), or a value
                of another type.
        """
        if not isinstance(data, dict):
            raise BadInputError(f"A serving prefix is an object, not {type(data).__name__}.")
        known = {field.name: type(getattr(PLAIN, field.name)) for field in fields(cls)}
        for name, value in data.items():
            if name not in known:
                raise BadInputError(
                    f"The policy is to be served with {name!r}, which this version does not know.",
                    advice=f"Known: {', '.join(known)}. Use the version that trained it.",
                )
            if type(value) is not known[name]:
                raise BadInputError(f"serving.{name} must be {known[name].__name__}, got {value!r}.")
        return cls(**data)


PLAIN = Serving()
"""No conditioning: prompts stay as they are."""


def serving_of(folder: str | Path) -> Serving:
    """What the policy in a folder was trained to be asked with; :data:`PLAIN` when nothing says so.

    It is in ``policy.json``, in the folder, or beside an ``adapter`` or a ``model`` as training leaves it.

    Raises:
        BadInputError: the file is no policy version, or says something that this version does not know.
    """
    folder = Path(folder).resolve()
    for place in (folder, folder.parent) if folder.name in ("adapter", "model") else (folder,):
        path = place / "policy.json"
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))["config"]
            said = config.get("serving", {})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInputError(
                f"{path} does not describe a policy: {error}", advice="Restore it from the run."
            ) from error
        return Serving.from_json(said)
    return PLAIN


def around(message: Message, before: str, after: str) -> Message:
    """A message with words before and after its content.

    Raises:
        BadInputError: it has no text that words could be added to.
    """
    if not before and not after:
        return message
    content = message.content
    if content is None or isinstance(content, str):
        return message.model_copy(update={"content": f"{before}{content or ''}{after}"})
    parts = [{"type": "text", "text": text} if text else None for text in (before, after)]
    whole = (parts[0], *content, parts[1])
    return message.model_copy(update={"content": tuple(part for part in whole if part is not None)})
