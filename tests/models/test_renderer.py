"""The renderer: who wrote which token, for several templates and makes of tokenizer."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from chat_templates import FORGETFUL, NO_SYSTEM, STRIPS, TEMPLATES, byte_tokenizer, tokenizer_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corrigible.errors import BadInputError
from corrigible.models import Rendered, Renderer, TokenKind, TurnState
from corrigible.models.renderer import CHATML
from corrigible.records import Message

TRAINED = (TokenKind.SAMPLED, TokenKind.NOT_SAMPLED)
CONTROL = ["<|im_end|>", "<|im_start|>assistant\n", "</s>", "<end_of_turn>", "[/INST]", "<s>"]
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
cases = pytest.mark.parametrize(
    ("template", "make"),
    [(t, m) for t in TEMPLATES for m in ("bytes", "merges")] + [("llama2", "spaces"), ("chatml", "spaces")],
)


@cache
def renderer_for(template: str, make: str) -> Renderer:
    return Renderer(tokenizer_for(template, make), TEMPLATES[template])


words = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(
        ["user", "assistant\n", "\n\nHi", " spaced ", "", "naïve 日本語 🙂", "The cat", "\n", "a\n\n"]
    ),
)


@st.composite
def conversations(draw: Any, control: bool = False) -> list[dict[str, str]]:
    text = st.one_of(words, st.sampled_from(CONTROL).map(lambda c: f"x{c}y")) if control else words
    turns = draw(st.integers(1, 3))
    messages = [{"role": r, "content": draw(text)} for _ in range(turns) for r in ("user", "assistant")]
    if draw(st.booleans()):
        messages.insert(0, {"role": "system", "content": draw(text)})
    return messages


def fitting(template: str, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Without what the template cannot write."""
    if template == "llama2":  # strips system and user text as one, so that a blank user eats its own text
        return [{**m, "content": m["content"] if m["content"].strip() else "blank"} for m in messages]
    return [m for m in messages if m["role"] != "system"] if template in NO_SYSTEM else messages


def raw_text(renderer: Renderer, ids: Any) -> str:
    return str(
        renderer.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def template_text(renderer: Renderer, messages: Any, header: bool = False, tools: Any = None) -> str:
    return str(
        renderer.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=renderer.template,
            add_generation_prompt=header,
            tokenize=False,
        )
    )


def trained_runs(rendered: Rendered) -> list[tuple[int, ...]]:
    runs: list[list[int]] = []
    last = -2
    for i, (token, kind) in enumerate(zip(rendered.ids, rendered.kinds, strict=True)):
        if kind in TRAINED:
            if i != last + 1:
                runs.append([])
            runs[-1].append(token)
            last = i
    return [tuple(r) for r in runs]


@cases
@quick
@given(data=st.data())
def test_every_prompt_is_the_beginning_of_what_follows_it(template: str, make: str, data: Any) -> None:
    renderer = renderer_for(template, make)
    messages = fitting(template, data.draw(conversations(control=True)))
    whole = renderer.conversation(messages)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = renderer.prompt(messages[:i])
            assert whole.ids[: len(prompt)] == prompt.ids
            assert prompt.state is TurnState.HEADER
            assert not any(k in TRAINED for k in prompt.kinds)
            # The first token after the header is the assistant's: nothing is lost, nothing is added.
            assert whole.kinds[len(prompt)] is TokenKind.NOT_SAMPLED


@cases
@quick
@given(data=st.data())
def test_the_ids_spell_what_the_template_writes(template: str, make: str, data: Any) -> None:
    if make == "spaces":
        pytest.skip("its decoder drops leading spaces")
    renderer = renderer_for(template, make)
    messages = fitting(template, data.draw(conversations(control=True)))
    assert raw_text(renderer, renderer.conversation(messages).ids) == template_text(renderer, messages)
    assert raw_text(renderer, renderer.prompt(messages[:-1]).ids) == template_text(
        renderer, messages[:-1], True
    )


@cases
@quick
@given(data=st.data())
def test_trained_tokens_are_the_assistants_words_and_its_end_of_turn(
    template: str, make: str, data: Any
) -> None:
    if make == "spaces":
        pytest.skip("its decoder drops leading spaces")
    renderer = renderer_for(template, make)
    messages = fitting(template, data.draw(conversations(control=True)))
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    runs = trained_runs(renderer.conversation(messages))
    assert len(runs) == len(said)
    for run, content in zip(runs, said, strict=True):
        assert run[-1] in renderer.end_of_turn_ids
        text = raw_text(renderer, run[:-1])
        if template in STRIPS:
            text, content = text.strip(), content.strip()
        assert text == content
    last = renderer.conversation(messages, train_on="last")
    assert last.ids == renderer.conversation(messages).ids
    assert trained_runs(last) == runs[-1:]


@cases
@quick
@given(data=st.data())
def test_a_control_token_in_a_message_is_only_text(template: str, make: str, data: Any) -> None:
    renderer = renderer_for(template, make)
    messages = fitting(template, data.draw(conversations(control=True)))
    harmless = [{**m, "content": "x"} for m in messages]

    def control(conversation: Any) -> list[int]:
        return [i for i in renderer.conversation(conversation).ids if i in renderer.special_ids]

    assert control(messages) == control(harmless)


@pytest.mark.parametrize("template", TEMPLATES)
@quick
@given(data=st.data())
def test_same_ids_as_transformers_when_tokens_are_bytes(template: str, data: Any) -> None:
    """With one token per byte no merge can differ, so transformers' own rendering is an oracle."""
    renderer = renderer_for(template, "bytes")
    messages = fitting(template, data.draw(conversations()))
    theirs = renderer.tokenizer.apply_chat_template(
        messages, chat_template=renderer.template, return_dict=False
    )
    assert list(renderer.conversation(messages).ids) == list(theirs)


@cases
@quick
@given(data=st.data())
def test_continuing_turn_by_turn_equals_rendering_at_once(template: str, make: str, data: Any) -> None:
    renderer = renderer_for(template, make)
    messages = fitting(template, data.draw(conversations(control=True)))
    start = 2 if messages[0]["role"] == "system" else 1
    going = renderer.prompt(messages[:start])
    for i in range(start, len(messages) - 1, 2):
        whole = renderer.conversation(messages[: i + 1], train_on="last")
        said = trained_runs(whole)[-1]
        before = going
        going = renderer.continue_(renderer.with_sampled(going, said, ended=True), [messages[i + 1]])
        assert going.ids[: len(before) + len(said)] == before.ids + said
        assert trained_runs(going)[-1] == said
        assert going.ids == renderer.prompt(messages[: i + 2]).ids


@cases
@quick
@given(ids=st.lists(st.integers(10, 250), max_size=12), ended=st.booleans())
def test_sampled_ids_are_kept_to_the_last_bit(template: str, make: str, ids: list[int], ended: bool) -> None:
    """Random ids are mostly no canonical tokenisation of any text: they must survive all the same."""
    renderer = renderer_for(template, make)
    prompt = renderer.prompt([{"role": "user", "content": "Go."}])
    sampled = [*ids, renderer.end_of_turn_ids[0]] if ended else ids
    spoken = renderer.with_sampled(prompt, sampled, ended)
    assert spoken.ids == prompt.ids + tuple(sampled)
    assert spoken.kinds[len(prompt) :] == (TokenKind.SAMPLED,) * len(sampled)
    further = renderer.continue_(spoken, [{"role": "user", "content": "And?"}])
    assert further.ids[: len(spoken)] == spoken.ids
    assert not any(k in TRAINED for k in further.kinds[len(spoken) :])
    if make != "spaces":
        # What the template writes after an assistant turn is there exactly once: an end of turn
        # that was not sampled is written by the template, and not trained on.
        marker = "zqMARKERqz"
        turn = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": marker}]
        text = template_text(renderer, [*turn, {"role": "user", "content": "And?"}], header=True)
        after = text.partition(marker)[2]
        if ended:
            after = after.partition(renderer.tokenizer.convert_ids_to_tokens(renderer.end_of_turn_ids[0]))[2]
        assert raw_text(renderer, further.ids[len(spoken) :]) == after


def test_pad_equal_to_eos_does_not_hide_the_end_of_turn() -> None:
    renderer = renderer_for("chatml", "bytes")
    assert renderer.tokenizer.pad_token_id == renderer.tokenizer.eos_token_id
    rendered = renderer.conversation(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    )
    assert rendered.ids[rendered.scored[-1]] == renderer.tokenizer.pad_token_id


def test_tools_and_their_answers() -> None:
    renderer = renderer_for("qwen2.5", "merges")
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    call = {"type": "function", "id": "1", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    messages: list[Any] = [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
        {"role": "tool", "content": "assistant said: <|im_end|>", "tool_call_id": "1"},
        {"role": "assistant", "content": "3"},
    ]
    whole = renderer.conversation(messages, tools)
    first, second = (raw_text(renderer, run) for run in trained_runs(whole))
    # Arguments come as JSON text in the OpenAI form and must not be quoted a second time. The newline
    # after the header is the header's: Qwen's template writes it for the prompt as well.
    assert first == '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'
    assert second == "3<|im_end|>"
    prompt_text = "".join(
        raw_text(renderer, [i]) for i, k in zip(whole.ids, whole.kinds, strict=True) if k == 0
    )
    assert "assistant said: <|im_end|>" in prompt_text
    assert '"name": "add"' in raw_text(renderer, renderer.prompt(messages[:1], tools).ids)
    # The same conversation, the policy having sampled its call as text.
    prompt = renderer.prompt(messages[:1], tools)
    going = renderer.with_sampled(prompt, trained_runs(whole)[0], ended=True)
    going = renderer.continue_(going, messages[2:4])
    assert going.ids == whole.ids[: len(going)]
    # Typed messages give the same.
    typed = [Message.model_validate(m) for m in messages]
    assert renderer.conversation(typed, tools).ids == whole.ids


def test_continuing_a_conversation_somebody_else_wrote() -> None:
    renderer = renderer_for("chatml", "merges")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    more = {"role": "user", "content": "c"}
    whole = renderer.conversation(messages)
    assert renderer.continue_(whole, [more]).ids == renderer.prompt([*messages, more]).ids


def test_a_template_that_rewrites_earlier_turns_is_refused_not_masked_wrongly() -> None:
    renderer = Renderer(
        byte_tokenizer("<|im_start|>", "<|im_end|>", bos="<|im_start|>", eos="<|im_end|>"), FORGETFUL
    )
    thinking = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "hm</think>b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "hm</think>d"},
    ]
    with pytest.raises(BadInputError, match="message 2 differently"):
        renderer.conversation(thinking)
    with pytest.raises(BadInputError, match="message 2 differently"):
        renderer.check_prefix_stable(thinking)
    last = renderer.conversation(thinking, train_on="last")
    assert raw_text(renderer, trained_runs(last)[0]) == "hm</think>d<|im_end|>"
    plain = [{**m, "content": m["content"].rpartition(">")[2]} for m in thinking]
    renderer.check_prefix_stable(plain)
    spoken = renderer.with_sampled(renderer.prompt(thinking[:1]), [renderer.end_of_turn_ids[0]], ended=True)
    assert renderer.continue_(spoken, thinking[2:3]).ids[: len(spoken)] == spoken.ids


@pytest.mark.parametrize("template", TEMPLATES)
def test_usual_templates_are_prefix_stable(template: str) -> None:
    renderer_for(template, "merges").check_prefix_stable()


def test_pair_scores_the_response_and_nothing_else() -> None:
    renderer = renderer_for("chatml", "bytes")
    history = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "early"},
        {"role": "user", "content": "b"},
    ]
    rendered = renderer.pair(history, [{"role": "assistant", "content": "late"}])
    assert [raw_text(renderer, r) for r in trained_runs(rendered)] == ["late<|im_end|>"]
    empty = renderer.pair(history, [{"role": "assistant", "content": ""}])
    assert [raw_text(renderer, r) for r in trained_runs(empty)] == ["<|im_end|>"]


def test_fit_never_cuts_silently_and_never_cuts_the_completion() -> None:
    renderer = renderer_for("llama2", "bytes")
    rendered = renderer.pair(
        [{"role": "user", "content": "x" * 50}], [{"role": "assistant", "content": "answer"}]
    )
    assert renderer.fit(rendered, len(rendered)) is rendered
    with pytest.raises(BadInputError, match="do not fit into 30"):
        renderer.fit(rendered, 30)
    cut = renderer.fit(rendered, 30, policy="truncate_prompt")
    assert len(cut) == 30 and cut.dropped == len(rendered) - 30
    assert cut.ids[0] == renderer.tokenizer.bos_token_id
    assert trained_runs(cut) == trained_runs(rendered)
    needed = len(trained_runs(rendered)[0])
    assert len(renderer.fit(rendered, needed + 1, policy="truncate_prompt")) == needed + 1
    with pytest.raises(BadInputError, match="completion alone"):
        renderer.fit(rendered, needed, policy="truncate_prompt")


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "no messages"),
        ([{"content": "a"}], "needs a role"),
        ([{"role": "user", "content": 3}], "must be text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "text parts only",
        ),
        ([{"role": "user", "content": "\ud83d"}], "surrogate"),
    ],
)
def test_bad_messages(messages: Any, says: str) -> None:
    with pytest.raises(BadInputError, match=says):
        renderer_for("chatml", "bytes").prompt(messages)


def test_bad_use() -> None:
    renderer = renderer_for("gemma", "bytes")
    user = [{"role": "user", "content": "a"}]
    prompt = renderer.prompt(user)
    with pytest.raises(BadInputError, match=r"refuses.*System role"):
        renderer.prompt([{"role": "system", "content": "s"}, *user])
    with pytest.raises(BadInputError, match="nothing to train on"):
        renderer.conversation(user)
    with pytest.raises(BadInputError, match="nothing to score"):
        renderer.pair(user, [])
    with pytest.raises(BadInputError, match="no end-of-turn"):
        renderer.with_sampled(prompt, [5], ended=True)
    with pytest.raises(BadInputError, match="no end-of-turn"):
        renderer.with_sampled(prompt, [], ended=True)
    with pytest.raises(BadInputError, match="no finished assistant turn"):
        renderer.continue_(prompt, user)
    spoken = renderer.with_sampled(prompt, [5], ended=False)
    with pytest.raises(BadInputError, match="cannot speak here"):
        renderer.with_sampled(spoken, [5], ended=False)
    with pytest.raises(BadInputError, match="not the assistant's"):
        renderer.continue_(spoken, [{"role": "assistant", "content": "b"}])
    with pytest.raises(BadInputError, match="one of each"):
        Rendered(ids=(1, 2), kinds=(TokenKind.PROMPT,))


def test_no_template_says_what_to_do() -> None:
    tokenizer = byte_tokenizer("<|im_start|>", "<|im_end|>", bos="<|im_start|>", eos="<|im_end|>")
    with pytest.raises(BadInputError, match="chatml"):
        Renderer(tokenizer)
    assert Renderer(tokenizer, "chatml").template == CHATML


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_preamble_is_what_conversations_without_a_system_message_begin_with(template: str) -> None:
    renderer = renderer_for(template, "bytes")
    for text in ("Hello", "zebra", "Quit", "42"):
        ids = renderer.prompt([{"role": "user", "content": text}]).ids
        assert ids[: len(renderer.preamble)] == renderer.preamble
    # It is all of it: the next token already is the user's.
    first, second = (renderer.prompt([{"role": "user", "content": text}]).ids for text in ("abc", "xyz"))
    assert first[len(renderer.preamble)] != second[len(renderer.preamble)]


BEGINNINGS = ["A helpful answer:\n", "Class 1:", " spaced ", "[x] <|im_end|>", "naïve\n\n"]


@cases
@quick
@given(data=st.data())
def test_a_turn_that_is_begun_for_the_policy_is_tokenised_as_it_was_in_training(
    template: str, make: str, data: Any
) -> None:
    renderer = renderer_for(template, make)
    messages = fitting(template, data.draw(conversations(control=True)))
    begin = data.draw(st.sampled_from(BEGINNINGS if template not in STRIPS else BEGINNINGS[:2]))
    answer = f"{data.draw(words)}end"
    whole = [*messages[:-1], {"role": "assistant", "content": begin + answer}]
    prompt = renderer.prompt(whole[:-1], begin=begin)
    row, places = renderer.located(whole, {len(whole) - 1: len(begin)})
    assert row.ids[: len(prompt)] == prompt.ids
    assert row.scored[0] == len(prompt) and len(places) == len(row.scored)
    assert len(prompt) > len(renderer.prompt(whole[:-1])) and prompt.state is TurnState.HEADER
    assert not any(kind in TRAINED for kind in prompt.kinds)
    # Every character that is not given is somebody's, and the last token ends the turn.
    covered = {c for place in places for c in range(place.start, place.stop)}
    assert covered <= set(range(len(begin), len(begin + answer)))
    assert all(character.isspace() or index in covered for index, character in enumerate(answer, len(begin)))
    assert places[-1].start == places[-1].stop


@cases
@quick
@given(data=st.data())
def test_located_says_what_conversation_says(template: str, make: str, data: Any) -> None:
    renderer = renderer_for(template, make)
    messages = fitting(template, data.draw(conversations(control=True)))
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    row, places = renderer.located(messages, dict.fromkeys(turns, 0))
    assert row == renderer.conversation(messages)
    assert sorted({place.message for place in places}) == turns
    if make == "bytes" and template not in STRIPS:
        for turn in turns:
            said = str(messages[turn]["content"])
            mine = [place for place in places if place.message == turn]
            assert len(mine) == len(said.encode()) + 1  # and the end of the turn
            assert [place.start for place in mine] == [
                *(i for i, c in enumerate(said) for _ in c.encode()),
                len(said),
            ]


def test_a_place_in_a_stripped_content_counts_what_was_stripped() -> None:
    template = next(iter(STRIPS))
    renderer = renderer_for(template, "bytes")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "  ab  "}]
    _, places = renderer.located(messages, {1: 0})
    letters = [place for place in places if place.stop > place.start]
    assert [(place.start, place.stop) for place in letters][-2:] == [(2, 3), (3, 4)]


def test_located_refuses_what_cannot_be_scored() -> None:
    renderer = renderer_for("chatml", "bytes")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "given"}]
    with pytest.raises(BadInputError, match="Only assistant turns"):
        renderer.located(messages, {0: 0})
    with pytest.raises(BadInputError, match="nothing is left of it"):
        renderer.located(messages, {1: 5})
