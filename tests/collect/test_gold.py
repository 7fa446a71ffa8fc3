from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from corrigible.collect.gold import PARTS, GoldPreference, GoldSignal, HouseStyle
from corrigible.errors import BadInputError
from corrigible.records import Message

STYLE = HouseStyle()
PROMPT = (Message(role="user", content="How can I keep rice from sticking to the pot?"),)


@pytest.mark.parametrize(
    ("text", "part", "value"),
    [
        ("Rinse your rice first.", "direct", 1.0),
        ("Sure! Rinse your rice first.", "direct", 0.0),
        ("I'm glad you asked. Rinse it.", "direct", 0.0),
        ("That's a great question. Rinse it.", "direct", 0.0),
        ("As an AI language model, I rinse.", "direct", 0.0),
        ("Here is what helps: rinse.", "direct", 0.0),
        ("Surely rinsing helps.", "direct", 1.0),
        ("Ice water helps.", "direct", 1.0),
        ("Rinse it well.", "complete", 1.0),
        ('They say "rinse it."', "complete", 1.0),
        ("Rinse it (well!)  \n", "complete", 1.0),
        ("Rinse it and then", "complete", 0.0),
        ("Rinse it:\n1. Soak\n2.", "complete", 0.0),
        ("", "complete", 0.0),
        (" ".join(["word"] * 20), "brief", 1.0),
        (" ".join(["word"] * 40), "brief", 0.5),
        (" ".join(["word"] * 200), "brief", 0.0),
        (" ".join(["word"] * 24 + ["you"]), "friendly", 1.0),
        (" ".join(["word"] * 49 + ["you"]), "friendly", 0.5),
        ("Youth is young.", "friendly", 0.0),
        ("Do this.\n- rinse\n- soak", "plain", 0.0),
        ("1. Rinse", "plain", 0.0),
        ("## Rice", "plain", 0.0),
        ("**Rinse** it.", "plain", 0.0),
        ("Use 2 - 3 cups.", "plain", 1.0),
        ("Rice in a pot.", "on_topic", 1.0),
        ("Rinse the rice.", "on_topic", 0.5),
        ("Cats are nice.", "on_topic", 0.0),
        ("rice rice rice rice", "substance", 0.125),
    ],
)
def test_parts_by_hand(text: str, part: str, value: float) -> None:
    assert STYLE.parts(PROMPT, text)[part] == pytest.approx(value)


def test_the_score_is_the_documented_formula() -> None:
    text = "Sure, rinse the rice in cold water until it runs clear, then simmer it"
    parts = STYLE.parts(PROMPT, text)
    assert parts["direct"] == parts["complete"] == parts["friendly"] == 0.0
    assert STYLE.score(PROMPT, text) == pytest.approx(0.25 * 1 + 0.10 * 1 + 0.10 * 0.5)


@given(st.text(max_size=400), st.text(max_size=60))
def test_any_text_scores_between_0_and_1(text: str, prompt: str) -> None:
    asked = (Message(role="user", content=prompt),)
    assert 0.0 <= STYLE.score(asked, text) <= 1.0
    assert all(0.0 <= value <= 1.0 for value in STYLE.parts(asked, text).values())


def test_neither_silence_nor_repetition_pays() -> None:
    good = "You can rinse your rice and use a lid on the pot."
    assert STYLE.score(PROMPT, "") == 0.0
    assert STYLE.score(PROMPT, "You.") < 0.2
    assert STYLE.score(PROMPT, "You you you you rice pot.") < STYLE.score(PROMPT, good) / 2


def test_length_alone_does_not_decide() -> None:
    """Among answers that differ in every part, length explains well under half of the ranking."""
    rng = np.random.default_rng(0)
    words, scores = [], []
    for _ in range(400):
        n = int(rng.integers(10, 90))
        body = [f"w{rng.integers(1000)}" for _ in range(n)]
        for place in rng.integers(0, n, size=int(rng.integers(0, 4))):
            body[place] = "you"
        opening = rng.choice(["", "Sure! ", "- "])
        ending = rng.choice([".", ""])
        text = f"{opening}{' '.join(body)}{ending}"
        words.append(n)
        scores.append(STYLE.score(PROMPT, text))
    assert abs(stats.spearmanr(words, scores).statistic) < 0.7
    assert STYLE.weights()["brief"] < 1 / 3


def test_weights_are_checked() -> None:
    with pytest.raises(BadInputError, match="below a third"):
        HouseStyle(brief=0.5, complete=0.1, friendly=0.1)
    with pytest.raises(BadInputError, match="sum to 1"):
        HouseStyle(direct=0.9)
    with pytest.raises(BadInputError, match="brief_words"):
        HouseStyle(brief_words=90)


def test_declaration_changes_with_the_rule_and_parts_are_explained() -> None:
    assert isinstance(STYLE, GoldPreference)
    assert STYLE.declaration() != HouseStyle(brief_words=31).declaration()
    assert set(PARTS) == set(STYLE.weights()) == set(STYLE.explain())


def test_as_a_signal(episode) -> None:  # type: ignore[no-untyped-def]
    episodes = [episode("How to boil rice?", "You boil your rice in a pot with salt."), episode("How?", "")]
    scores = GoldSignal(STYLE).score(episodes)
    assert scores.values.tolist() == [
        STYLE.score(episodes[0].prompt_messages(), episodes[0].response_text()),
        0.0,
    ]
