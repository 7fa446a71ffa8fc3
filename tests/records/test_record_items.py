"""Content, ids, messages, episodes and policy versions."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from record_examples import sha

from corrigible.errors import BadInputError
from corrigible.records import (
    ArrayRef,
    Episode,
    FinishReason,
    Item,
    Message,
    PolicyVersion,
    Sampling,
    Step,
    TrainedOn,
    as_messages,
    canonical_json,
    messages_text,
    new_id,
    now_us,
)

# --- ids ------------------------------------------------------------------------------------------


def test_ids_are_version_7_and_increase_across_threads() -> None:
    made: list[str] = []

    def work() -> None:
        for _ in range(2000):
            made.append(new_id())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = [new_id() for _ in range(2000)]
    assert alone == sorted(alone) and len(set(made + alone)) == 10_000
    assert all(
        re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", i) for i in made
    )
    assert abs(int(alone[-1].replace("-", "")[:12], 16) - time.time() * 1000) < 1000
    assert abs(now_us() - time.time() * 1e6) < 1e6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_does_not_repeat_its_parents_ids() -> None:
    new_id()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, new_id().encode())
        os._exit(0)
    mine = new_id()
    os.waitpid(child, 0)
    theirs = os.read(read, 36).decode()
    os.close(read), os.close(write)
    assert theirs[15:] != mine[15:] and len(theirs) == 36


# --- items and messages ---------------------------------------------------------------------------


@given(st.text(st.characters(codec="utf-8")))
def test_an_item_is_named_by_its_bytes(text: str) -> None:
    item = Item.of_text(text, "response")
    assert item.sha256 == hashlib.sha256(text.encode()).hexdigest() == Item.of_text(text, "document").sha256
    assert Item.from_json(item.to_json_text()) == item == Item.from_json(item.to_json())


def test_text_is_not_normalised() -> None:
    assert Item.of_text("é").sha256 != Item.of_text("e\u0301").sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "other"}, "not the hash of the text"),
        ({"text": None}, "not both"),
        ({"uri": "blob:x"}, "not both"),
        ({"sha256": "AB"}, "sha256"),
        ({"type": "smell"}, "type"),
        ({"bytes": 1}, "'bytes'"),
    ],
)
def test_broken_items_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        Item.from_json({**Item.of_text("x").to_json(), **change})


def test_text_that_cannot_be_stored() -> None:
    with pytest.raises(BadInputError, match="lone surrogate at character 1"):
        Item.of_text("a\ud83d")
    with pytest.raises(BadInputError, match="no canonical JSON"):
        canonical_json({"x": float("nan")})


def test_blobs_and_json_items() -> None:
    blob = Item.of_blob(sha("png"), "image", "image/png")
    assert blob.uri == f"blob:{sha('png')}" and Item.from_json(blob.to_json()) == blob
    tree = Item.of_json({"b": [1, {"ä": None}], "a": 1.5})
    assert tree.text == '{"a":1.5,"b":[1,{"ä":null}]}' and tree.json_value() == {
        "a": 1.5,
        "b": [1, {"ä": None}],
    }
    with pytest.raises(BadInputError, match="does not hold JSON"):
        Item.of_text("nope").json_value()


def test_messages_have_one_canonical_form() -> None:
    chat = [
        {"content": "hi", "role": "user", "name": "ada"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "user", "content": [{"type": "text", "text": "é"}, {"type": "image_url", "image_url": {}}]},
    ]  # fmt: skip
    item = Item.of_messages(chat)
    assert (
        item.text == messages_text(item.messages())
        and '"content":"hi","name":"ada","role":"user"' in item.text
    )
    assert "null" not in item.text
    assert Item.of_messages(item.messages()) == item
    assert item.messages()[3].text == "é" and item.messages()[1].text == ""
    assert as_messages("q") == (Message(role="user", content="q"),)
    with pytest.raises(BadInputError, match="not messages"):
        Item.of_text("x").messages()


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"role": "user", "content": "x", "function_call": {}}, "'function_call'.*Message may hold: role"),
        ({"role": "narrator", "content": "x"}, "role"),
        ({"role": "user"}, "needs content"),
        ({"role": "user", "content": "x", "tool_calls": []}, "only assistant"),
        ({"role": "user", "content": "x", "tool_call_id": "1"}, "only tool messages"),
        ({"role": "user", "content": [{"text": "x"}]}, "needs a 'type'"),
        ({"role": "assistant", "tool_calls": [{"id": "1", "function": {"args": "{}"}}]}, "'args'"),
        ("x", r"\[0\]"),
    ],
)  # fmt: skip
def test_broken_messages_are_refused(message: Any, why: str) -> None:
    with pytest.raises(BadInputError, match=why):
        as_messages([message])


# --- episodes -------------------------------------------------------------------------------------

USER, REPLY = Message(role="user", content="2+2?"), Message(role="assistant", content="4")
SAID = Step(
    observation=(USER,),
    action=REPLY,
    token_ids=(19, 2),
    prompt_token_ids=(1, 7, 8),
    logprobs=(-0.5, 0.0),
    finish_reason=FinishReason.stop,
)


def test_text_episode_round_trip() -> None:
    again = Step(observation=(Message(role="user", content="sure?"),), action=REPLY, done=True, reward=1.0)
    episode = Episode(
        task="sums",
        policy="p1",
        sampling=Sampling(seed=3, stop=("\n",)),
        steps=(SAID, again),
        info={"a": None},
    )
    for form in (episode.to_json(), episode.to_json_text()):
        assert Episode.from_json(form) == episode
    assert [m.text for m in episode.prompt_messages()] == ["2+2?", "4", "sure?"]
    assert episode.response_text() == "4" and episode.prompt_item().messages() == episode.prompt_messages()
    assert episode.response_item() == Item.of_text("4", "response")


def test_control_episode_round_trip() -> None:
    pixels = ArrayRef(sha256=sha("frame"), dtype="uint8", shape=(84, 84, 3))
    steps = (
        Step(observation=(0.5, -1.0), action=(1.0,), logprobs=(0.3,), reward=-1.0),
        Step(observation=pixels, action=ArrayRef(sha256=sha("a"), dtype="float32", shape=(6,)), done=True),
    )
    episode = Episode(task="cartpole", steps=steps, env={"spec": sha("env")}, parent="p", branch_step=4)
    for form in (episode.to_json(), episode.to_json_text()):
        assert Episode.from_json(form) == episode
    with pytest.raises(BadInputError, match="no messages"):
        episode.response_text()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1), st.integers(0, 3))
def test_control_values_survive_exactly(values: list[float], action: int) -> None:
    step = Step(observation=tuple(values), action=(float(action),))
    assert Step.from_json(step.to_json_text()) == step


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": [-0.5]}, "1 logprobs for 2 sampled tokens"),
        ({"logprobs": [-0.5, 0.5]}, "at most 0"),
        ({"action": {"role": "user", "content": "4"}}, "assistant message"),
        ({"action": [1.0]}, "belong to text steps"),
        ({"action": {"role": "assistant", "content": "4", "mood": "x"}}, r"'mood' \(action.mood\)"),
        ({"observation": [{"role": "user", "content": "4", "mood": "x"}]}, r"observation\[0\].mood"),
        ({"observation": [1.0, float("inf")], "action": [1.0]}, "finite"),
        ({"finish_reason": "bored"}, "finish_reason"),
    ],
)
def test_broken_steps_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        Step.from_json({**SAID.to_json(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parent": "p"}, "both"),
        ({"id": "e", "parent": "e", "branch_step": 0}, "its own parent"),
        ({"steps": [{**SAID.to_json(), "done": True}, SAID.to_json()]}, "step 0 is done, and 1 more"),
        ({"schema_version": "corrigible/episode@9"}, "later release"),
        ({"schema_version": "corrigible/feedback@1"}, "schema_version"),
        ({"sampling": {"temperature": -1}}, "sampling.temperature"),
        ({"sampling": {"temp": 1}}, "'temp'.*Sampling may hold"),
    ],
)
def test_broken_episodes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        Episode.from_json({**Episode(task="t", steps=(SAID,)).to_json(), **change})


def test_policy_version_round_trip() -> None:
    trained = TrainedOn(feedback=10, feedback_digest=sha("ids"), filter={"kind": "comparison"})
    version = PolicyVersion(
        name="demo-v2", parent="v1", base_model="smollm2-135m", weights=sha("w"), algorithm="dpo",
        config={"beta": 0.1, "lora": None}, trained_on=trained,
        scores={"kl": 0.5, "win_rate": {"value": 0.6, "interval": [0.5, 0.7]}},
    )  # fmt: skip
    for form in (version.to_json(), version.to_json_text()):
        assert PolicyVersion.from_json(form) == version
    with pytest.raises(BadInputError, match="its own parent"):
        PolicyVersion.from_json({**version.to_json(), "parent": version.id})
    with pytest.raises(ValidationError):
        PolicyVersion(name="", base_model="m", weights="w")
