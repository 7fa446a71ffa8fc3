"""Nearest texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from corrigible.align.retrieval import Hit, Retriever, encode_words
from corrigible.errors import BadInputError, NumericsError


def on_a_circle(texts: Sequence[str]) -> torch.Tensor:
    """A text that is a number of degrees, as the point of the unit circle there."""
    angles = torch.tensor([float(text) for text in texts]) * torch.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def test_nearest_first_against_a_plain_sort() -> None:
    rng = np.random.default_rng(0)
    bank = [str(angle) for angle in rng.uniform(0, 360, 50)]
    queries = [str(angle) for angle in rng.uniform(0, 360, 20)]
    retriever = Retriever(on_a_circle, bank)
    assert len(retriever) == 50
    for query, hits in zip(queries, retriever.topk(queries, 5, duplicates_above=1.0), strict=True):
        apart = [abs((float(query) - float(text) + 180) % 360 - 180) for text in bank]
        assert [hit.index for hit in hits] == sorted(range(50), key=lambda i: apart[i])[:5]
        assert [hit.similarity for hit in hits] == pytest.approx(
            [np.cos(np.deg2rad(apart[hit.index])) for hit in hits], abs=1e-5
        )


def test_the_question_itself_and_its_near_duplicates_are_left_out() -> None:
    retriever = Retriever(on_a_circle, ["0", "10", "20", "40", "0"])
    [hits] = retriever.topk(["0"], 9)
    assert [hit.index for hit in hits] == [2, 3]  # cos 10 degrees is 0.985, cos 20 degrees 0.94
    [hits] = retriever.topk(["0"], 9, duplicates_above=np.cos(np.deg2rad(25)))
    assert [hit.index for hit in hits] == [3]
    [hits] = retriever.topk(["0"], 9, [{0, 3}], duplicates_above=1.0)
    assert [hit.index for hit in hits] == [4, 1, 2]


def test_equally_near_texts_keep_the_order_of_the_bank_and_fewer_may_be_found() -> None:
    retriever = Retriever(on_a_circle, ["90", "90", "90"])
    assert [[hit.index for hit in hits] for hits in retriever.topk(["0", "90"], 2)] == [[0, 1], []]
    assert retriever.topk(["0"], 2)[0][0] == Hit(0, pytest.approx(0.0, abs=1e-6))


def test_bad_input() -> None:
    with pytest.raises(BadInputError, match="bank is empty"):
        Retriever(on_a_circle, [])
    retriever = Retriever(on_a_circle, ["0"])
    with pytest.raises(BadInputError, match="k must be at least 1"):
        retriever.topk(["0"], 0)
    with pytest.raises(BadInputError, match="1 sets to exclude for 2"):
        retriever.topk(["0", "1"], 1, [set()])
    for wrong in (
        lambda t: torch.ones(len(t), 2),
        lambda t: torch.full((len(t), 2), torch.nan),
        lambda t: torch.ones(2),
    ):
        with pytest.raises(NumericsError, match="vectors_not_unit"):
            Retriever(wrong, ["0", "1"])


def test_words_are_found_by_words() -> None:
    texts = ["the red car", "a blue boat", "", "red red red"]
    vectors = encode_words(texts)
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(4)) and torch.equal(vectors, encode_words(texts))
    retriever = Retriever(encode_words, texts)
    assert [hits[0].index for hits in retriever.topk(["Car, red!", "boat"], 1)] == [0, 1]


@pytest.mark.weights
def test_minilm_finds_what_is_meant() -> None:
    from corrigible.models import load_encoder

    bank = ["How do I cook an egg?", "What is the capital of France?", "My computer does not start."]
    retriever = Retriever(load_encoder("minilm").encode, bank)
    found = retriever.topk(["Which city does the French government sit in?", "The laptop stays dark."], 1)
    assert [hits[0].index for hits in found] == [1, 2]
