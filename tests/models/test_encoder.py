"""Sentence vectors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from corrigible.errors import BadInputError, MissingError
from corrigible.models import SentenceEncoder, load_encoder

TEXTS = [
    "A cat sits on the mat.",
    "A kitten rests on a rug.",
    "Interest rates rose again in May.",
    "",
    "naïve 日本",
]


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return load_encoder("minilm", device="cpu")


@pytest.mark.weights
def test_vectors_are_unit_and_mean_what_they_should(encoder: SentenceEncoder) -> None:
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (5, 384) and vectors.dtype is torch.float32
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(5))
    assert float(vectors[0] @ vectors[1]) > 0.4 > 0.2 > float(vectors[0] @ vectors[2])


@pytest.mark.weights
def test_padding_and_order_change_nothing(encoder: SentenceEncoder) -> None:
    together = encoder.encode(TEXTS)
    apart = torch.cat([encoder.encode([t]) for t in TEXTS])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.encode(TEXTS[::-1], batch_size=2).flip(0), together, atol=1e-5, rtol=0)
    # By hand: mean over the tokens of one text, then unit length.
    tokens = encoder.tokenizer(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        hidden = encoder.model(**tokens).last_hidden_state[0]
    mean = hidden.mean(dim=0)
    torch.testing.assert_close(together[0], mean / mean.norm(), atol=1e-5, rtol=0)


@pytest.mark.weights
def test_lengths(encoder: SentenceEncoder) -> None:
    assert encoder.encode([]).shape == (0, 384)
    long = "word " * 600
    assert torch.allclose(encoder.encode([long]), encoder.encode([long + " and more"]), atol=1e-6)
    with pytest.raises(BadInputError, match="1 to 512"):
        encoder.encode(["a"], max_length=513)
    with pytest.raises(BadInputError, match="list of texts"):
        encoder.encode("a text")


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no encoder"):
        load_encoder("no-such-encoder")
    with pytest.raises(BadInputError, match=r"no config.json"):
        load_encoder(tmp_path)
