"""Text that grows: the same as decoding everything, for any tokens; stop strings wherever they are cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corrigible.models import LanguagePolicy
from corrigible.models.rollout_text import UNDECODED, TextStream
from corrigible.models.tiny import tiny_tokenizer

BYTES = tiny_tokenizer()


def decode_bytes(ids: Sequence[int]) -> str:
    text: str = BYTES.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def encode(text: str) -> list[int]:
    ids: list[int] = BYTES(text, add_special_tokens=False)["input_ids"]
    return ids


class Words:
    """A tokenizer of whole pieces that, like SentencePiece, drops the space before the first one."""

    PIECES = ("▁Hello", "▁wor", "ld", "▁", "!", "▁END", "E", "ND", "\n", "é")

    def decode(self, ids: Sequence[int]) -> str:
        text = "".join(self.PIECES[i] for i in ids).replace("▁", " ")
        return text.removeprefix(" ")


def grown(decode: Any, ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[TextStream, list[str], int]:
    """The stream after all of ``ids``, the pieces taken, and how many tokens it took to stop."""
    stream = TextStream(decode, stop)
    pieces = []
    for count, token in enumerate(ids, start=1):
        stopped = stream.feed([token])
        pieces.append(stream.take())
        if stopped:
            return stream, pieces, count
    return stream, pieces, len(ids)


TEXTS = st.text(st.sampled_from("ab é日🙂\n\N{REPLACEMENT CHARACTER}\N{ZERO WIDTH JOINER}"), max_size=40)
JUNK = st.lists(st.integers(0, 258), max_size=60)  # control tokens and bytes that are no characters


@settings(max_examples=200, deadline=None)
@given(ids=st.one_of(TEXTS.map(encode), JUNK))
def test_pieces_together_are_the_whole_text(ids: list[int]) -> None:
    stream, pieces, _ = grown(decode_bytes, ids)
    so_far = "".join(pieces)
    whole = decode_bytes(ids)
    assert whole.startswith(so_far), "what was told is never taken back"
    assert set(whole[len(so_far) :]) <= {UNDECODED}, "only what may still change is held back"
    assert so_far + stream.take(whole) == whole


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 9), max_size=40))
def test_a_tokenizer_that_writes_the_first_piece_differently(ids: list[int]) -> None:
    words = Words()
    _, pieces, _ = grown(words.decode, ids)
    assert "".join(pieces) == words.decode(ids)


@settings(max_examples=300, deadline=None)
@given(
    ids=st.one_of(TEXTS.map(encode), JUNK),
    stop=st.lists(
        st.text(st.sampled_from("ab é日\N{REPLACEMENT CHARACTER}"), min_size=1, max_size=3), max_size=3
    ),
)
def test_it_stops_where_decoding_everything_would(ids: list[int], stop: list[str]) -> None:
    stream, pieces, count = grown(decode_bytes, ids, stop)
    expected = next(
        (n for n in range(1, len(ids) + 1) if any(s in decode_bytes(ids[:n]) for s in stop)), None
    )
    if expected is None:
        assert stream.stopped_at is None and count == len(ids)
        whole = decode_bytes(ids)
    else:
        text = decode_bytes(ids[:expected])
        assert count == expected
        assert stream.stopped_at == min(text.index(s) for s in stop if s in text)
        whole = text[: stream.stopped_at]
    so_far = "".join(pieces)
    assert whole.startswith(so_far), "nothing of a stop string is ever told"
    assert so_far + stream.take(whole) == whole


def test_a_stop_string_across_tokens_and_within_one() -> None:
    words = Words()
    for ids, text in (([0, 3, 6, 7], "Hello "), ([0, 5], "Hello "), ([0, 5, 4], "Hello "), ([6, 7, 0], "")):
        stream, pieces, _ = grown(words.decode, ids, ["END"])
        assert "".join(pieces) == text and stream.stopped_at == len(text)
    stream, pieces, _ = grown(words.decode, [0, 6, 4], ["END"])
    assert "".join(pieces) == "HelloE!" and stream.stopped_at is None, "held back, then let go"
    assert pieces == ["Hello", "", "E!"]


def test_a_character_cut_between_tokens_is_told_once_it_is_whole() -> None:
    _, pieces, _ = grown(decode_bytes, encode("a🙂b"))
    assert pieces == ["a", "", "", "", "🙂", "b"]
    stream, _, count = grown(decode_bytes, encode("a🙂b🙂"), ["🙂"])
    assert (stream.stopped_at, count) == (1, 5)


def test_a_long_text_is_not_decoded_again_and_again() -> None:
    decoded = 0

    def counting(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode_bytes(ids)

    ids = encode("the quick brown fox " * 50)
    grown(counting, ids, ["never"])
    assert decoded < 20 * len(ids), "work per token does not grow with the text"


@pytest.mark.weights
def test_on_a_real_vocabulary() -> None:
    from corrigible.models import load_policy

    policy: LanguagePolicy = load_policy(device="cpu")
    text = "Zwölf Boxkämpfer 🙂🙃 jagen\n\n日本語 <|im_end|> x = [1,\t2]  Ünïcödé"
    ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    _, pieces, _ = grown(policy.renderer.decode, ids)
    assert "".join(pieces) == policy.renderer.decode(ids)
    _, pieces, count = grown(policy.renderer.decode, ids, ["🙃", "本語"])
    assert "".join(pieces) == "Zwölf Boxkämpfer 🙂" and count < len(ids)
