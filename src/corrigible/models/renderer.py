"""The one place that turns chat messages into token ids and per-token kinds.

Three rules, each against a bug that has bitten most trainers:

* What a policy sampled is kept as the ids it sampled. A later turn is appended to those ids; the
  earlier text is never tokenised again (text that is decoded and encoded again need not give the
  same ids, and then the recorded log-probabilities belong to other tokens).
* Which token is trained is decided where the token is made, turn by turn, never afterwards by
  looking for ids: the padding id may well be the end-of-turn id (it is in SmolLM2).
* A prompt is exactly the beginning of the conversation that continues it, because text is cut at
  the turn boundaries before it is tokenised. A template that rewrites earlier turns (one that drops
  old "thinking", say) is noticed and refused rather than masked wrongly.

And one against mischief: control tokens spelled out inside a message's content stay plain text, so
nobody can end their own turn by typing ``<|im_end|>``.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum
from functools import cached_property
from typing import Any, Literal, NamedTuple

from corrigible.errors import BadInputError
from corrigible.records import Message, MessageLike

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The ChatML template, for models that come without one (``template="chatml"``)."""


class TokenKind(IntEnum):
    """Who wrote a token."""

    PROMPT = 0
    """Content of a message that is given: system, user, tool, or an assistant turn of the history."""
    SAMPLED = 1
    """Drawn from the policy (its end-of-turn token included, when it drew one)."""
    NOT_SAMPLED = 2
    """Assistant text by somebody else (and its end of turn): may be trained on as a demonstration."""
    SPECIAL = 3
    """Written by the chat template."""


SCORED = (TokenKind.SAMPLED, TokenKind.NOT_SAMPLED)
"""The kinds that carry a training signal: the completion."""


class TurnState(Enum):
    """How far the last turn of a :class:`Rendered` has got."""

    HEADER = "header"
    """The assistant is about to speak."""
    ENDED = "ended"
    """The policy ended its turn itself; what the template writes after that is still to come."""
    CUT = "cut"
    """The policy was stopped within its turn: no end-of-turn token yet."""
    CLOSED = "closed"
    """Everything the template writes for the last turn is there."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids with the kind of each, ``(tokens,)`` both.

    ``messages`` and ``tools`` are what was rendered, ``state`` how far the last turn got: they let
    :meth:`Renderer.continue_` go on. ``dropped`` counts prompt tokens that :meth:`Renderer.fit` cut.

    ``inputs`` are the ids that a model reads where they are not those it is to predict (inputs that were
    corrupted on purpose): one per token, the last thing to be set, and ``None`` when they are ``ids``.
    """

    ids: tuple[int, ...]
    kinds: tuple[TokenKind, ...]
    messages: tuple[Mapping[str, Any], ...] = field(default=(), compare=False, repr=False)
    tools: tuple[Mapping[str, Any], ...] | None = field(default=None, compare=False, repr=False)
    state: TurnState = field(default=TurnState.CLOSED, compare=False)
    dropped: int = 0
    inputs: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.kinds):
            raise BadInputError(f"{len(self.ids)} ids but {len(self.kinds)} kinds: one of each per token.")
        if self.inputs is not None and len(self.inputs) != len(self.ids):
            raise BadInputError(f"{len(self.ids)} ids but {len(self.inputs)} inputs: one of each per token.")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def fed(self) -> tuple[int, ...]:
        """The ids that a model reads."""
        return self.ids if self.inputs is None else self.inputs

    @property
    def scored(self) -> tuple[int, ...]:
        """Positions of the completion: kinds SAMPLED and NOT_SAMPLED, in order."""
        return tuple(i for i, kind in enumerate(self.kinds) if kind in SCORED)

    @classmethod
    def from_tokens(cls, prompt_ids: Sequence[int], sampled_ids: Sequence[int]) -> Rendered:
        """From recorded ids (an episode's ``prompt_token_ids`` and ``token_ids``), without any text."""
        kinds = (TokenKind.PROMPT,) * len(prompt_ids) + (TokenKind.SAMPLED,) * len(sampled_ids)
        return cls(ids=(*prompt_ids, *sampled_ids), kinds=kinds, state=TurnState.CUT)


class Place(NamedTuple):
    """Where a scored token stands: in ``content[start:stop]`` of message ``message`` (characters).

    ``start == stop`` is the content's length for what the template writes after it: the end of the turn.
    """

    message: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Span:
    """Message ``message``'s content from character ``skipped`` on, at ``text[start:end]``."""

    start: int
    end: int
    message: int
    skipped: int = 0


class Renderer:
    """Chat messages to tokens, for one tokenizer and its chat template.

    Args:
        tokenizer: a transformers tokenizer.
        template: a Jinja chat template instead of the tokenizer's own, or ``"chatml"``.
        end_of_turn_ids: ids that end a turn besides the tokenizer's end-of-sequence token and the
            one that the template itself writes after an assistant turn.

    Raises:
        BadInputError: the tokenizer has no chat template and none is given.
    """

    def __init__(
        self, tokenizer: Any, template: str | None = None, *, end_of_turn_ids: Iterable[int] = ()
    ) -> None:
        self.tokenizer = tokenizer
        chosen = CHATML if template == "chatml" else template or tokenizer.chat_template
        if isinstance(chosen, Mapping):
            chosen = chosen.get("default")
        if not chosen:
            raise BadInputError(
                "The tokenizer has no chat template, so chat messages cannot become tokens.",
                advice='Give one: load_policy(..., template="chatml") or template=<Jinja text>.',
            )
        self.template: str = chosen
        added = tokenizer.added_tokens_decoder
        self.special_ids = frozenset(tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}
        control = sorted({str(t) for t in added.values()} | set(tokenizer.all_special_tokens), key=len)
        self._control = re.compile("|".join(re.escape(t) for t in reversed(control))) if control else None
        self._anchors = self._find_anchors()
        ends = [*self._template_end_of_turn(), tokenizer.eos_token_id, *end_of_turn_ids]
        self.end_of_turn_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in ends if i is not None))
        self._end_texts = tuple(tokenizer.convert_ids_to_tokens(list(self.end_of_turn_ids)))

    # -- what callers use ---------------------------------------------------------------------

    @cached_property
    def preamble(self) -> tuple[int, ...]:
        """The ids that a conversation without a system message of its own begins with; may be empty."""
        try:
            pair = [self.prompt([{"role": "user", "content": text}]).ids for text in ("Question", "zq")]
        except BadInputError:  # a template that wants something else first
            return ()
        return tuple(
            a for a, _ in itertools.takewhile(lambda ids: ids[0] == ids[1], zip(*pair, strict=False))
        )

    def prompt(
        self,
        messages: Sequence[MessageLike],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        begin: str = "",
    ) -> Rendered:
        """The conversation so far and the header after which the assistant speaks.

        Args:
            messages: what was said.
            tools: the template's tools.
            begin: words that are put into the assistant's mouth: its turn begins with them, and it goes
                on after them. Tokenised apart from what follows, as ``given`` of :meth:`located` is.

        Raises:
            BadInputError: no messages, a conversation that the template refuses, or a template that
                changes contents so much that the place of ``begin`` cannot be told.
        """
        prompt = self._render(messages, tools, header=True, trained=frozenset())
        return self._begun(prompt, begin) if begin else prompt

    def conversation(
        self,
        messages: Sequence[MessageLike],
        tools: Sequence[Mapping[str, Any]] | None = None,
        train_on: Literal["all", "last"] = "all",
    ) -> Rendered:
        """A whole conversation. Assistant turns (all, or the last one) are NOT_SAMPLED, end of turn included.

        Raises:
            BadInputError: nothing to train on, a conversation that the template refuses, or a
                template that rewrites a turn that is to be trained on.
        """
        turns = [i for i, m in enumerate(messages) if _role(m) == "assistant"]
        if not turns:
            raise BadInputError("The conversation has no assistant turn, so there is nothing to train on.")
        return self._render(
            messages, tools, header=False, trained=frozenset(turns if train_on == "all" else turns[-1:])
        )

    def pair(
        self,
        prompt_messages: Sequence[MessageLike],
        response_messages: Sequence[MessageLike],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Rendered:
        """One side of a preference pair: the prompt, and a response whose assistant turns are scored.

        Raises:
            BadInputError: as for :meth:`conversation`, for the response's turns.
        """
        messages = [*prompt_messages, *response_messages]
        turns = [i for i in range(len(prompt_messages), len(messages)) if _role(messages[i]) == "assistant"]
        if not turns:
            raise BadInputError("The response has no assistant turn, so there is nothing to score.")
        return self._render(messages, tools, header=False, trained=frozenset(turns))

    def located(
        self,
        messages: Sequence[MessageLike],
        given: Mapping[int, int],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[Rendered, tuple[Place, ...]]:
        """A conversation, and where in its messages each scored token stands.

        Args:
            messages: the whole conversation.
            given: by index, the assistant turns that are scored, and how many characters at the
                beginning of each are given rather than said: those are tokenised apart, exactly as
                ``prompt(..., begin=...)`` tokenises them, and not scored.
            tools: the template's tools.

        Returns:
            The row, and a place for every scored token, in order.

        Raises:
            BadInputError: as for :meth:`conversation`; a tokenizer that cannot say where its tokens
                stand; a template that changes contents.
        """
        if not given or any(_role(messages[turn]) != "assistant" for turn in given):
            raise BadInputError("Only assistant turns can be scored, and at least one must be.")
        places: list[Place | None] = []
        row = self._render(
            messages, tools, header=False, trained=frozenset(given), given=given, places=places
        )
        found = tuple(place for place in places if place is not None)
        if len(found) != len(row.scored):
            raise BadInputError(
                "It cannot be told where the tokens stand in the messages: the chat template changes "
                "contents, or the tokenizer keeps no offsets.",
                advice="Use a fast tokenizer and a template that copies contents, or equal weights.",
            )
        return row, found

    def with_sampled(self, prompt: Rendered, sampled_ids: Sequence[int], ended: bool) -> Rendered:
        """Append what the policy sampled, exactly as it sampled it.

        Args:
            prompt: what it was sampled after.
            sampled_ids: the ids drawn, end-of-turn token included if it was drawn.
            ended: whether the policy ended its turn itself. A turn that was cut (length, stop
                string, interruption) gets no end-of-turn token: the policy did not say it.

        Raises:
            BadInputError: ``ended`` but the last id ends no turn, or ``prompt`` ends mid-turn.
        """
        if prompt.state is not TurnState.HEADER:
            raise BadInputError(
                f"The policy cannot speak here: the last turn is {prompt.state.value}, not a header.",
                advice="Start from prompt(...) or continue_(...).",
            )
        ids = tuple(int(i) for i in sampled_ids)
        if ended and (not ids or ids[-1] not in self.end_of_turn_ids):
            raise BadInputError(
                "The turn is said to have ended, but its last id is no end-of-turn token "
                f"(those are {list(self.end_of_turn_ids)}).",
                advice="Pass ended=False for a turn that was cut.",
            )
        said = {"role": "assistant", "content": self.decode(ids[:-1] if ended else ids)}
        return replace(
            prompt,
            ids=prompt.ids + ids,
            kinds=prompt.kinds + (TokenKind.SAMPLED,) * len(ids),
            messages=(*prompt.messages, said),
            state=TurnState.ENDED if ended else TurnState.CUT,
        )

    def continue_(self, rendered: Rendered, new_messages: Sequence[MessageLike]) -> Rendered:
        """Append the next messages and the assistant's header; what is there already stays as it is.

        Raises:
            BadInputError: nothing new, a new assistant message (use :meth:`conversation`), or a
                template that would rewrite the turns that are already there.
        """
        new: list[Mapping[str, Any]] = [_plain(m) for m in new_messages]
        if not new or any(m["role"] == "assistant" for m in new):
            raise BadInputError("continue_ takes one or more messages that are not the assistant's.")
        old: list[Mapping[str, Any]] = list(rendered.messages)
        if not old or rendered.state is TurnState.HEADER:
            raise BadInputError(
                "There is no finished assistant turn to continue from.",
                advice="Call with_sampled(...) first.",
            )
        if rendered.state is TurnState.CLOSED:
            text, mark = (
                self._text([*old, *new], rendered.tools, header=True),
                self._text(old, rendered.tools),
            )
            if not text.startswith(mark):
                raise self._rewrites(len(old) - 1)
            messages, start = [*old, *new], len(mark)
        else:
            # The sampled turn's text is replaced by a marker: what follows the marker is what the
            # template writes after the turn, whatever the policy said in it.
            marker = _marker(len(old) - 1, old + new)
            messages = [*old[:-1], {"role": "assistant", "content": marker}, *new]
            text = self._text(messages, rendered.tools, header=True)
            before = self._text(old[:-1], rendered.tools, header=True)
            if not text.startswith(before) or text.count(marker) != 1:
                raise self._rewrites(len(old) - 1)
            start = text.index(marker) + len(marker)
            if rendered.state is TurnState.ENDED:
                ends = [(text.find(e, start), e) for e in self._end_texts if text.find(e, start) >= 0]
                if ends:
                    position, end = min(ends)
                    start = position + len(end)
        spans = self._content_spans(messages, rendered.tools, True, text)
        ids, kinds, _ = self._encode(text, start, len(text), spans, messages, trained=False)
        return replace(
            rendered,
            ids=rendered.ids + tuple(ids),
            kinds=rendered.kinds + tuple(kinds),
            messages=(*old, *new),
            state=TurnState.HEADER,
        )

    def fit(
        self, rendered: Rendered, max_length: int, policy: Literal["error", "truncate_prompt"] = "error"
    ) -> Rendered:
        """Make sure that a conversation is at most ``max_length`` tokens long.

        With ``policy="truncate_prompt"`` the oldest prompt tokens go (a leading begin-of-sequence
        token stays) and ``dropped`` says how many; a scored token is never cut.

        Raises:
            BadInputError: too long and ``policy="error"``, or the completion alone is too long.
        """
        excess = len(rendered) - max_length
        if excess <= 0:
            return rendered
        if policy == "error":
            raise BadInputError(
                f"{len(rendered)} tokens do not fit into {max_length}.",
                advice="Shorten it, raise the maximum length, or pass policy='truncate_prompt'.",
            )
        scored = rendered.scored
        keep = int(bool(rendered.ids) and rendered.ids[0] == self.tokenizer.bos_token_id)
        first_scored = scored[0] if scored else len(rendered)
        # One token must stay before the first scored one: it is what predicts it.
        if keep + excess > max(first_scored - (keep == 0), 0):
            raise BadInputError(
                f"The completion alone has {len(rendered) - first_scored} tokens; {max_length} are allowed.",
                advice="Raise the maximum length or leave this example out.",
            )
        return replace(
            rendered,
            ids=rendered.ids[:keep] + rendered.ids[keep + excess :],
            kinds=rendered.kinds[:keep] + rendered.kinds[keep + excess :],
            dropped=rendered.dropped + excess,
            inputs=rendered.inputs and rendered.inputs[:keep] + rendered.inputs[keep + excess :],
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without control tokens. Bytes that are not UTF-8 become U+FFFD."""
        text: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def check_prefix_stable(
        self,
        messages: Sequence[MessageLike] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Check that every assistant turn of ``messages`` (default: a two-turn chat) continues its prompt.

        Raises:
            BadInputError: naming the turn that the template writes differently later on.
        """
        if messages is None:
            messages = [
                {"role": "user", "content": "First question"},
                {"role": "assistant", "content": "First answer"},
                {"role": "user", "content": "Second question"},
                {"role": "assistant", "content": "Second answer"},
            ]
        whole = self.conversation(messages, tools)
        for i, message in enumerate(messages):
            if _role(message) == "assistant":
                prompt = self.prompt(messages[:i], tools)
                if whole.ids[: len(prompt)] != prompt.ids:
                    raise self._rewrites(i)

    # -- how it is done -----------------------------------------------------------------------

    def _render(
        self,
        messages: Sequence[MessageLike],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        header: bool,
        trained: frozenset[int],
        given: Mapping[int, int] | None = None,
        places: list[Place | None] | None = None,
    ) -> Rendered:
        plain = [_plain(m) for m in messages]
        if not plain:
            raise BadInputError("There are no messages to render.", advice="Give at least one user message.")
        tools = tuple(tools) if tools else None
        text = self._text(plain, tools, header=header)
        spans = self._content_spans(plain, tools, header, text)
        # Where each assistant turn is cut: its begin, the end of what is given of it, its end.
        turns: list[tuple[int, int, int, int | None]] = []
        for i, message in enumerate(plain):
            if message["role"] != "assistant":
                continue
            bounds = self._turn_bounds(plain, i, tools, text)
            if bounds is None:
                if i in trained:
                    raise self._rewrites(i)
                continue
            said = bounds[0]
            if given is not None and given.get(i):
                spans, said = self._cut_span(spans, i, given[i])
            turns.append((bounds[0], said, bounds[1], i if i in trained else None))
        ids: list[int] = []
        kinds: list[TokenKind] = []
        position = 0
        for start, said, end, turn in [*turns, (len(text), len(text), len(text), None)]:
            for chunk_start, chunk_end, of in (
                (position, start, None),
                (start, said, None),
                (said, end, turn),
            ):
                more, more_kinds, where = self._encode(
                    text, chunk_start, chunk_end, spans, plain, trained=of is not None
                )
                ids += more
                kinds += more_kinds
                if places is not None and of is not None and spans is not None:
                    scored = [at for at, kind in zip(where, more_kinds, strict=True) if kind in SCORED]
                    places += _places(scored, of, spans)
            position = end
        return Rendered(
            ids=tuple(ids),
            kinds=tuple(kinds),
            messages=tuple(plain),
            tools=tools,
            state=TurnState.HEADER if header else TurnState.CLOSED,
        )

    def _text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        header: bool = False,
    ) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                tools=[dict(t) for t in tools] if tools else None,
                chat_template=self.template,
                add_generation_prompt=header,
                tokenize=False,
            )
        except Exception as error:  # Jinja raises whatever the template's author raised
            roles = ", ".join(str(m["role"]) for m in messages)
            raise BadInputError(
                f"The chat template refuses this conversation ({roles}): {error}",
                advice="Check the order of the roles; some templates know no system or tool messages.",
            ) from error
        return text

    def _turn_bounds(
        self,
        messages: Sequence[Mapping[str, Any]],
        turn: int,
        tools: Sequence[Mapping[str, Any]] | None,
        text: str,
    ) -> tuple[int, int] | None:
        """Where in ``text`` assistant turn ``turn`` begins (after its header) and ends; None if rewritten."""
        try:
            before = self._text(messages[:turn], tools, header=True)
            through = self._text(messages[: turn + 1], tools)
        except BadInputError:
            return None
        if text.startswith(through) and through.startswith(before):
            return len(before), len(through)
        return None

    def _content_spans(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        header: bool,
        text: str,
    ) -> list[_Span] | None:
        """Where each message's content stands in ``text``; None when the template transforms contents.

        Found by rendering the conversation once more with a marker in place of each content, which
        gives the template's own text, and checked by putting the contents (or, as many templates
        do, the stripped contents) back.
        """
        markers = {_marker(i, messages): i for i, m in enumerate(messages) if m["content"]}
        if not markers:
            return []
        by_message = {i: marker for marker, i in markers.items()}
        marked = [{**m, "content": by_message.get(i, m["content"])} for i, m in enumerate(messages)]
        try:
            parts = re.split("|".join(markers), found := self._text(marked, tools, header))
        except BadInputError:
            return None
        order = [markers[m] for m in re.findall("|".join(markers), found)]
        if not text.startswith(parts[0]):
            return None
        spans: list[_Span] = []
        position = len(parts[0])
        for index, literal in zip(order, parts[1:], strict=True):
            content = str(messages[index]["content"])
            for variant in dict.fromkeys((content, content.strip(), content.lstrip(), content.rstrip())):
                end = position + len(variant)
                if text.startswith(variant, position) and text.startswith(literal, end):
                    spans.append(_Span(position, end, index, content.find(variant)))
                    position = end + len(literal)
                    break
            else:
                return None
        return spans if position == len(text) else None

    def _encode(
        self,
        text: str,
        start: int,
        end: int,
        spans: list[_Span] | None,
        messages: Sequence[Mapping[str, Any]],
        *,
        trained: bool,
    ) -> tuple[list[int], list[TokenKind], list[tuple[int, int] | None]]:
        """Tokenise ``text[start:end]`` on its own; say what each token is and where in ``text`` it stands."""
        if start == end:
            return [], [], []
        if spans is None:
            self._refuse_hidden_control_tokens(messages)
            inside = []
        else:
            inside = [s for s in spans if start <= s.start and s.end <= end and s.start < s.end]
        # Contents that spell a control token are tokenised apart, as plain text.
        pieces: list[tuple[int, int, bool]] = []
        position = start
        for span in inside:
            if self._control is not None and self._control.search(text, span.start, span.end):
                pieces += [(position, span.start, False), (span.start, span.end, True)]
                position = span.end
        pieces.append((position, end, False))
        ids: list[int] = []
        where: list[tuple[int, int] | None] = []
        for piece_start, piece_end, literal in pieces:
            if piece_start < piece_end:
                more, offsets = self._tokenize(
                    text[piece_start:piece_end], first=piece_start == 0, literal=literal
                )
                ids += more
                where += [None if o is None else (piece_start + o[0], piece_start + o[1]) for o in offsets]
        # Without offsets to go by, whatever is no control token counts as content.
        in_content = [
            i not in self.special_ids
            if o is None or spans is None
            else any(s.start <= o[0] < s.end for s in inside)
            for i, o in zip(ids, where, strict=True)
        ]
        if not trained:
            return ids, [TokenKind.PROMPT if c else TokenKind.SPECIAL for c in in_content], where
        last = len(ids) - 1
        for i in range(len(ids) - 1, -1, -1):
            if ids[i] in self.end_of_turn_ids and not in_content[i]:
                last = i
                break
        kinds = [TokenKind.NOT_SAMPLED if i <= last else TokenKind.SPECIAL for i in range(len(ids))]
        return ids, kinds, where

    def _cut_span(self, spans: list[_Span] | None, message: int, characters: int) -> tuple[list[_Span], int]:
        """``spans`` with one content cut after ``characters``, and where in the text that is."""
        place = next((n for n, span in enumerate(spans or ()) if span.message == message), None)
        if spans is None or place is None:
            raise self._hides(message)
        span = spans[place]
        cut = span.start + characters - span.skipped
        if not span.start < cut < span.end:
            raise BadInputError(
                f"Message {message + 1} begins with {characters} given characters, and nothing is left of it "
                "to score, or the chat template takes the given ones away.",
                advice="Give an answer that says something after them.",
            )
        parts = [replace(span, end=cut), _Span(cut, span.end, message, characters)]
        return [*spans[:place], *parts, *spans[place + 1 :]], cut

    def _begun(self, prompt: Rendered, begin: str) -> Rendered:
        """``prompt`` with ``begin`` as the first words of the assistant's turn."""
        turn = len(prompt.messages)
        # What the template would write if the turn went on: a marker keeps it from stripping the end.
        marker = _marker(turn, [*prompt.messages, {"role": "assistant", "content": begin}])
        messages = [*prompt.messages, {"role": "assistant", "content": begin + marker}]
        text = self._text(messages, prompt.tools)
        bounds = self._turn_bounds(messages, turn, prompt.tools, text)
        if bounds is None:
            raise self._rewrites(turn)
        spans, end = self._cut_span(
            self._content_spans(messages, prompt.tools, False, text), turn, len(begin)
        )
        ids, kinds, _ = self._encode(text, bounds[0], end, spans, messages, trained=False)
        return replace(prompt, ids=prompt.ids + tuple(ids), kinds=prompt.kinds + tuple(kinds))

    def _tokenize(
        self, text: str, *, first: bool, literal: bool
    ) -> tuple[list[int], list[tuple[int, int] | None]]:
        for anchor in () if first else self._anchors:
            before = self._call_tokenizer(anchor, literal)["input_ids"]
            ids, offsets = self._with_offsets(anchor + text, literal)
            if ids[: len(before)] == before:  # else the anchor has merged with the text: try another
                cut = len(anchor)
                offsets = [None if o is None else (max(o[0] - cut, 0), max(o[1] - cut, 0)) for o in offsets]
                return ids[len(before) :], offsets[len(before) :]
        return self._with_offsets(text, literal)

    def _with_offsets(self, text: str, literal: bool) -> tuple[list[int], list[tuple[int, int] | None]]:
        encoded = self._call_tokenizer(text, literal)
        ids: list[int] = list(encoded["input_ids"])
        if not self.tokenizer.is_fast:
            return ids, [None] * len(ids)
        return ids, [(int(start), int(stop)) for start, stop in encoded["offset_mapping"]]

    def _call_tokenizer(self, text: str, literal: bool) -> Any:
        return self.tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=bool(self.tokenizer.is_fast),
            split_special_tokens=literal,
            verbose=False,
        )

    def _find_anchors(self) -> tuple[str, ...]:
        """Texts to put before a chunk so that it is tokenised as in the middle of a text.

        SentencePiece tokenizers write a space before the first word of a text; a chunk of a
        conversation is no beginning. A character in front, taken off again, keeps that space away.
        Other tokenizers need none.
        """
        together = self._call_tokenizer("\nword", False)["input_ids"]
        apart = (
            self._call_tokenizer("\n", False)["input_ids"] + self._call_tokenizer("word", False)["input_ids"]
        )
        return () if together == apart else ("\n", "]", ">", "a")

    def _template_end_of_turn(self) -> list[int]:
        probe = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "zqAnswerqz"}]
        try:
            after = self._text(probe, None).partition("zqAnswerqz")[2]
        except BadInputError:
            return []
        ids = self._call_tokenizer(after, False)["input_ids"] if after else []
        return [i for i in ids if i in self.special_ids][:1]

    def _refuse_hidden_control_tokens(self, messages: Sequence[Mapping[str, Any]]) -> None:
        for message in messages:
            found = self._control.search(str(message["content"])) if self._control else None
            if found:
                raise BadInputError(
                    f"A {message['role']} message contains the control token {found[0]!r}, and this chat "
                    "template changes contents so much that it cannot be told from the template's own.",
                    advice="Take it out of the message.",
                )

    def _hides(self, message: int) -> BadInputError:
        return BadInputError(
            f"The chat template changes message {message + 1} so much that its beginning cannot be told.",
            advice="Use a template that copies contents, such as template='chatml'.",
        )

    def _rewrites(self, turn: int) -> BadInputError:
        return BadInputError(
            f"The chat template writes message {turn + 1} differently once more messages follow (or "
            "cannot write the turns before it alone), so its tokens cannot be told for certain.",
            advice="Train on the last turn only (train_on='last'), or use another template.",
        )


def _places(
    where: Sequence[tuple[int, int] | None], message: int, spans: Sequence[_Span]
) -> list[Place | None]:
    """The places of a turn's scored tokens, of which ``where`` says where they stand in the text."""
    span = next((each for each in reversed(spans) if each.message == message), None)
    if span is None:  # an empty content: there is only the end of the turn
        return [None if at is None else Place(message, 0, 0) for at in where]

    def in_content(position: int) -> int:
        return min(max(position, span.start), span.end) - span.start + span.skipped

    return [None if at is None else Place(message, in_content(at[0]), in_content(at[1])) for at in where]


def _role(message: MessageLike) -> str:
    return str(message.role if isinstance(message, Message) else message.get("role"))


def _plain(message: MessageLike) -> dict[str, Any]:
    """A message as chat templates expect it: text content, tool-call arguments as objects, no nulls."""
    data = message.model_dump(mode="json") if isinstance(message, Message) else dict(message)
    plain = {key: value for key, value in data.items() if value is not None}
    if not isinstance(plain.get("role"), str):
        raise BadInputError(f"A message needs a role; this one has the keys {sorted(data)}.")
    content = plain.get("content", "")
    if isinstance(content, Sequence) and not isinstance(content, str):
        if not all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
            raise BadInputError("A text model reads text parts only; this message has other parts as well.")
        content = "".join(str(p["text"]) for p in content)
    if not isinstance(content, str):
        raise BadInputError(f"A message's content must be text, not {type(content).__name__}.")
    if any("\ud800" <= c <= "\udfff" for c in content):
        raise BadInputError(
            "A message contains half a surrogate pair, which is no text.", advice="Decode it as UTF-8."
        )
    plain["content"] = content
    if "tool_calls" in plain:
        plain["tool_calls"] = [_plain_call(call) for call in plain["tool_calls"]]
    return plain


def _plain_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except json.JSONDecodeError:
        return call  # the model wrote something that is no JSON: show it as it is
    return {**call, "function": {**function, "arguments": arguments}}


def _marker(index: int, messages: Sequence[Mapping[str, Any]]) -> str:
    """A word that occurs in none of the messages and that no template has a reason to touch."""
    salt = 0
    everything = repr(messages)
    while f"zqcontent{salt}n" in everything:
        salt += 1
    return f"zqcontent{salt}n{index}zq"
