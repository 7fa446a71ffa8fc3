"""What training conditions on is what serving puts back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from feedback_texts import attempt, attempts, demonstrated, merging_renderer, pair, ranked, says, user

from corrigible.align.rendering import (
    PLAIN,
    GoalScale,
    Lesson,
    Serving,
    class_conditioned,
    class_serving,
    demonstration_turns,
    goal_pairs,
    goal_serving,
    hindsight,
    hindsight_serving,
    mistake_serving,
    mistakes,
    rise,
    rise_serving,
    serving_of,
    token_example,
    with_demonstrations,
)
from corrigible.errors import BadInputError
from corrigible.models import Rendered, Renderer
from corrigible.models.load import _resolve
from corrigible.records import Message


def first_said(row: Rendered) -> tuple[int, ...]:
    return row.ids[: row.scored[0]]


def conditioned(prompt: str, answer: str) -> list[tuple[str, Lesson, Rendered, Any]]:
    """Name, training text, and a function from a renderer to the prompt as it is served."""
    question = user(prompt)
    tries = attempts(attempt("no", False), attempt(answer, True), prompt=question)
    near = [demonstrated("1+1", "2"), demonstrated("2+2", "4")]
    [learnt] = rise(tries, keep="success")
    retry = rise_serving()
    return [
        (
            "coh",
            hindsight(pair(answer, "bad", prompt), forms=["p"])[0],
            lambda renderer: hindsight_serving().prompt(renderer, question),
        ),
        (
            "coh, chain",
            hindsight(pair(answer, "bad", prompt), forms=["pn"])[0],
            lambda renderer: hindsight_serving().prompt(renderer, question),
        ),
        (
            "coh, markers said by the user",
            hindsight(pair(answer, "bad", prompt), forms=["p"], placement="user")[0],
            lambda renderer: hindsight_serving("user").prompt(renderer, question),
        ),
        (
            "c-rlft",
            class_conditioned(demonstrated(prompt, answer, quality="expert")),
            lambda renderer: class_serving("expert").prompt(renderer, question),
        ),
        (
            "mistake tuning",
            mistakes(tries)[1],
            lambda renderer: mistake_serving().prompt(renderer, question),
        ),
        (
            "rise",
            learnt,
            lambda renderer: retry.prompt(renderer, retry.again(question, ["no"])),
        ),
        (
            "demonstrations",
            with_demonstrations(demonstrated(prompt, answer), near),
            lambda renderer: Serving(demonstrations=2).prompt(
                renderer, question, demonstration_turns(near[::-1])
            ),
        ),
    ]


def check_served_as_trained(renderer: Renderer) -> None:
    for prompt in ("Q?", "What is ab?", "x"):
        for answer in ("yes", " and so", "abcd", "\n\nIndeed", ":)", "日本"):
            for name, lesson, serve in conditioned(prompt, answer):
                [row] = token_example(lesson, renderer).rows
                assert serve(renderer).ids == first_said(row), (name, prompt, answer)


def test_prompts_are_served_as_they_were_trained(renderer: Renderer) -> None:
    check_served_as_trained(renderer)


def test_also_where_tokens_could_merge_across_the_prefix() -> None:
    check_served_as_trained(merging_renderer())


@pytest.mark.weights
def test_also_with_the_tokenizer_of_smollm2() -> None:
    from transformers import AutoTokenizer

    check_served_as_trained(Renderer(AutoTokenizer.from_pretrained(_resolve("smollm2-135m"))))


def test_a_goal_is_served_as_it_was_trained(renderer: Renderer) -> None:
    signal = ranked(["best", "worst"], [4.0, 1.0])
    first, _ = goal_pairs(signal, GoalScale.of([signal]))
    served = goal_serving(10.0).prompt(renderer, user("Q?"))
    assert renderer.pair(first.prompt, first.chosen).ids[: len(served)] == served.ids


def test_apply_by_hand() -> None:
    serving = Serving(
        system="Be kind.", user_prefix="U: ", user_suffix=" !", assistant_prefix="A: ", every_turn=True
    )
    dressed = serving.apply([*user("one"), *says("two"), *user("three")])
    assert [(m.role, m.text) for m in dressed] == [
        ("system", "Be kind."),
        ("user", "U: one"),
        ("assistant", "A: two"),
        ("user", "U: three !"),
    ]
    system = Message(role="system", content="Be brief.")
    assert serving.apply([system, *user("one")])[0].text == "Be brief.\nBe kind."
    assert PLAIN.apply("hello") == user("hello")
    parts = Message(role="user", content=({"type": "text", "text": "hi"},))
    assert serving.apply([parts])[1].text == "U: hi !"


def test_answers_are_asked_for_again_whatever_they_were() -> None:
    serving = rise_serving(retry="No. {question}", turns=3, context_turns=2)
    asked = serving.again(user("2+{x}?"), ["3", "{question}", "5"])
    assert [m.text for m in asked] == ["2+{x}?", "{question}", "No. 2+{x}?", "5", "No. 2+{x}?"]
    assert serving.again(user("Q?"), []) == user("Q?")
    everything = rise_serving(context_turns=0)
    assert len(everything.again(user("Q?"), ["1", "2", "3"])) == 7
    with pytest.raises(BadInputError, match="not trained to improve"):
        PLAIN.again(user("Q?"), ["3"])


def test_demonstrations_may_not_be_forgotten() -> None:
    serving = Serving(demonstrations=2)
    with pytest.raises(BadInputError, match="trained with 2 demonstrations"):
        serving.apply(user("Q?"))
    system = Message(role="system", content="s")
    near = demonstration_turns([demonstrated("1+1", "2")])
    assert [m.text for m in serving.apply([system, *user("Q?")], near)] == ["s", "1+1", "2", "Q?"]
    with pytest.raises(BadInputError, match="no messages"):
        PLAIN.apply([])


def test_it_is_stored_as_plain_data_and_read_back() -> None:
    for serving in (
        PLAIN,
        class_serving("expert"),
        rise_serving(),
        goal_serving(9.5),
        hindsight_serving("user"),
    ):
        assert Serving.from_json(json.loads(json.dumps(serving.to_json()))) == serving
    assert PLAIN.to_json() == {}
    with pytest.raises(BadInputError, match="'voice', which this version does not know"):
        Serving.from_json({"voice": "low"})
    with pytest.raises(BadInputError, match=r"serving\.turns must be int"):
        Serving.from_json({"turns": "3"})
    with pytest.raises(BadInputError, match="is an object"):
        Serving.from_json(["system"])


def test_it_is_found_beside_what_training_left(tmp_path: Path) -> None:
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    assert serving_of(adapter) == PLAIN
    described = tmp_path / "run" / "policy.json"
    described.write_text(json.dumps({"config": {"serving": class_serving("expert").to_json()}}))
    assert serving_of(adapter) == serving_of(tmp_path / "run") == class_serving("expert")
    elsewhere = tmp_path / "run" / "somebody"  # somebody else's model, which happens to lie there
    elsewhere.mkdir()
    assert serving_of(elsewhere) == PLAIN
    described.write_text(json.dumps({"config": {}}))
    assert serving_of(adapter) == PLAIN
    for broken in ("{", "[]", "{}"):
        described.write_text(broken)
        with pytest.raises(BadInputError, match="does not describe a policy"):
            serving_of(adapter)
