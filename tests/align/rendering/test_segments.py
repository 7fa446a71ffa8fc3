"""From pieces of text to tokens and weights."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from feedback_texts import marked, merging_renderer, says, user

from corrigible.align import Unusable
from corrigible.align.rendering import Lesson, Segment, Spoken, spoken_turns, token_example
from corrigible.align.rendering.segments import answer_text
from corrigible.errors import BadInputError
from corrigible.models import Renderer, TokenKind
from corrigible.records import Message


def lesson(*segments: Segment, **changes: Any) -> Lesson:
    made = Lesson((*user("Q?"), Spoken(segments)), 1.0, "g", ("f1",))
    return replace(made, **changes)


def test_each_piece_has_its_weight_and_the_end_that_of_the_last(renderer: Renderer) -> None:
    example = token_example(
        lesson(Segment("M:\n", kind="given"), Segment("bad", 0.25), Segment(" so", 0.0), Segment(" good")),
        renderer,
    )
    assert marked(example, renderer) == (
        "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\nM:\n«bad»0.25 so« good<|im_end|>»"
    )
    assert (example.weight, example.group, example.derived_from) == (1.0, "g", ("f1",))
    assert example.rows[0].ids[-1] in renderer.end_of_turn_ids
    endless = token_example(lesson(Segment("good"), Segment(" end", 0.0)), renderer)
    assert marked(endless, renderer).endswith("assistant\n«good»")


def test_a_token_across_a_border_takes_the_mean_by_characters() -> None:
    renderer = merging_renderer()
    ids = renderer.tokenizer("abcd", add_special_tokens=False)["input_ids"]
    assert len(ids) == 1  # it is one token, or this test tests nothing
    example = token_example(lesson(Segment("abc", 1.0), Segment("d", 0.2)), renderer)
    assert example.token_weights == (pytest.approx((3 * 1.0 + 0.2) / 4), 0.2)


def test_several_bytes_of_one_character_weigh_what_it_weighs(renderer: Renderer) -> None:
    example = token_example(lesson(Segment("日", 0.5), Segment("本", 2.0)), renderer)
    assert example.token_weights == (0.5,) * 3 + (2.0,) * 3 + (2.0,)


def test_several_turns_are_learnt_each_with_its_end(renderer: Renderer) -> None:
    made = Lesson(
        (*user("Q?"), *spoken_turns(says("one")), *user("More."), *spoken_turns(says("two"))), 2.0, "g", ()
    )
    assert marked(token_example(made, renderer), renderer) == (
        "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n«one<|im_end|>»\n"
        "<|im_start|>user\nMore.<|im_end|>\n<|im_start|>assistant\n«two<|im_end|>»"
    )


def test_shares_of_a_lesson_that_counts_as_a_whole_add_up_to_one(renderer: Renderer) -> None:
    example = token_example(lesson(Segment("ab", 3.0), Segment("c", 1.0), per_token=False), renderer)
    assert example.token_weights == (3 / 8, 3 / 8, 1 / 8, 1 / 8)


def test_the_question_is_learnt_as_well_when_asked_for(renderer: Renderer) -> None:
    example = token_example(lesson(Segment("A"), prompt_weight=0.5), renderer)
    assert marked(example, renderer) == (
        "<|im_start|>user\n«Q?»0.5<|im_end|>\n<|im_start|>assistant\n«A<|im_end|>»"
    )
    given = token_example(lesson(Segment("M\n", kind="given"), Segment("A"), prompt_weight=1.0), renderer)
    assert "«M\nA<|im_end|>»" in marked(given, renderer)


def test_only_what_a_segment_allows_may_be_corrupted(renderer: Renderer) -> None:
    example = token_example(
        lesson(Segment("M\n", kind="given"), Segment("ab"), Segment("cd", corruptible=False)), renderer
    )
    [row] = example.rows
    assert renderer.decode([row.ids[place] for place in example.places]) == "ab"


def test_old_context_goes_first_and_nothing_that_is_learnt(renderer: Renderer) -> None:
    long = Lesson((*user("x" * 300), Spoken((Segment("answer"),))), 1.0, "g", ("f1",))
    example = token_example(long, renderer, max_length=60)
    assert len(example.rows[0]) == 60 and example.prompt_tokens_cut > 200
    assert len(example.token_weights) == len("answer") + 1
    with pytest.raises(Unusable, match="too_long"):
        token_example(
            replace(long, turns=(*user("Q?"), Spoken((Segment("x" * 99),)))), renderer, max_length=60
        )
    with pytest.raises(Unusable, match="too_long"):
        token_example(replace(long, prompt_weight=1.0), renderer, max_length=60)


def test_a_message_keeps_what_it_has_besides_text(renderer: Renderer) -> None:
    [turn] = spoken_turns((Message(role="assistant", content="hi", name="ada"),), "G\n")
    assert isinstance(turn, Spoken)
    made = Lesson((*user("Q?"), turn), 1.0, "g", ())
    assert made.messages[-1].name == "ada" and made.messages[-1].text == "G\nhi"
    assert (turn.given, turn.said, turn.text) == ("G\n", "hi", "G\nhi")


def test_a_tool_result_between_two_turns_is_context(renderer: Renderer) -> None:
    response = (*says("look"), Message(role="tool", content="42", tool_call_id="t"), *says("it is 42"))
    example = token_example(Lesson((*user("Q?"), *spoken_turns(response, "A:\n")), 1.0, "g", ()), renderer)
    assert marked(example, renderer).count("A:\n«") == 2
    assert "tool\n42<|im_end|>" in marked(example, renderer)


@pytest.mark.parametrize(
    ("segments", "changes", "reason"),
    [
        ((Segment("  \n"),), {}, "empty_completion"),
        ((Segment("M\n", kind="given"), Segment(" ")), {}, "empty_completion"),
        ((Segment("a", math.nan),), {}, "bad_weight"),
        ((Segment("a", -1.0),), {}, "bad_weight"),
        ((Segment("a"),), {"weight": 0.0}, "bad_weight"),
        ((Segment("a"),), {"weight": math.inf}, "bad_weight"),
        ((Segment("a"),), {"prompt_weight": math.nan}, "bad_weight"),
        ((Segment("a", 0.0),), {}, "nothing_to_learn"),
        ((Segment("a"),), {"turns": user("Q?")}, "nothing_to_learn"),
    ],
)
def test_what_cannot_be_learnt_has_a_name(
    renderer: Renderer, segments: tuple[Segment, ...], changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Unusable) as raised:
        token_example(lesson(*segments, **changes), renderer)
    assert raised.value.reason == reason


def test_given_words_after_others_are_a_mistake_of_the_renderer(renderer: Renderer) -> None:
    with pytest.raises(BadInputError, match="at its beginning"):
        token_example(lesson(Segment("a"), Segment("M", kind="given")), renderer)


def test_a_template_that_refuses_the_turns_is_named(renderer: Renderer) -> None:
    strict = Renderer(renderer.tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(Unusable, match=r"not_renderable: .*roles must alternate"):
        token_example(lesson(Segment("a")), strict)


def test_an_answer_is_one_plain_turn() -> None:
    assert answer_text(says("yes")) == "yes"
    with pytest.raises(Unusable, match="several_messages"):
        answer_text((*says("a"), *says("b")))
    with pytest.raises(Unusable, match="several_messages"):
        answer_text(user("a"))
    with pytest.raises(Unusable, match="empty_completion"):
        answer_text(says(" "))
    with pytest.raises(Unusable, match="empty_completion"):
        spoken_turns(says(""))


def test_context_is_never_scored(renderer: Renderer) -> None:
    [row] = token_example(lesson(Segment("M\n", kind="given"), Segment("a")), renderer).rows
    kinds = [row.kinds[i] for i in range(len(row)) if i not in row.scored]
    assert set(kinds) <= {TokenKind.PROMPT, TokenKind.SPECIAL}
