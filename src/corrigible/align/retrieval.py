"""Nearest texts: a bank of sentence vectors, and the few in it that are nearest to a question.

retriever = Retriever(load_encoder("minilm").encode, [text_of(each) for each in bank])
hits = retriever.topk(["How do I boil an egg?"], 4)[0]
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from corrigible.errors import BadInputError, NumericsError

Encode = Callable[[Sequence[str]], torch.Tensor]
"""From ``n`` texts to unit vectors ``(n, dimension)`` float32: :meth:`SentenceEncoder.encode`, say."""

NEAR_DUPLICATE = 0.95
"""Cosine above which two texts are taken for one."""


@dataclass(frozen=True)
class Hit:
    """One of the bank's texts, and how near it is (cosine)."""

    index: int
    similarity: float


class Retriever:
    """The texts of a bank that are nearest to a question.

    Args:
        encode: texts to unit vectors.
        texts: the bank, encoded once.

    Attributes:
        vectors: of the bank, ``(n, dimension)`` float32.

    Raises:
        BadInputError: an empty bank.
        NumericsError: ``vectors_not_unit``.
    """

    def __init__(self, encode: Encode, texts: Sequence[str]) -> None:
        if not texts:
            raise BadInputError("The bank is empty.", advice="Give it at least one text.")
        self.encode = encode
        self.vectors = unit_vectors(encode, texts)

    def __len__(self) -> int:
        return len(self.vectors)

    def topk(
        self,
        queries: Sequence[str] | NDArray[np.float32],
        k: int,
        exclude: Sequence[Collection[int]] | None = None,
        *,
        duplicates_above: float = NEAR_DUPLICATE,
    ) -> list[list[Hit]]:
        """The nearest texts to each question, nearest first; of equally near ones the earlier first.

        Args:
            queries: texts, or unit vectors ``(m, dimension)``.
            k: how many at most; fewer when the bank has no more to offer.
            exclude: per question, indices that may not be found: the question's own place, above all.
            duplicates_above: texts nearer than this cosine are left out, as the question itself in other
                words; 1 leaves out none.

        Raises:
            BadInputError: ``k`` below 1, or ``exclude`` of another length.
            NumericsError: ``vectors_not_unit``.
        """
        if k < 1:
            raise BadInputError(f"k must be at least 1, got {k}.")
        vectors = queries if isinstance(queries, np.ndarray) else unit_vectors(self.encode, queries)
        if exclude is not None and len(exclude) != len(vectors):
            raise BadInputError(f"{len(exclude)} sets to exclude for {len(vectors)} questions.")
        found: list[list[Hit]] = []
        for number, vector in enumerate(vectors):
            similarity = self.vectors @ vector
            barred = set(exclude[number]) if exclude is not None else set()
            hits: list[Hit] = []
            # Stable: equal similarities keep the bank's order, whatever the machine.
            for index in np.argsort(-similarity, kind="stable").tolist():
                near = float(similarity[index])
                if index in barred or (near > duplicates_above and duplicates_above < 1.0):
                    continue
                hits.append(Hit(index, near))
                if len(hits) == k:
                    break
            found.append(hits)
        return found


def unit_vectors(encode: Encode, texts: Sequence[str]) -> NDArray[np.float32]:
    """What ``encode`` gives, as an array.

    Raises:
        NumericsError: ``vectors_not_unit``: not ``(n, dimension)``, NaN, or not of length 1.
    """
    vectors = encode(list(texts)).detach().cpu().numpy().astype(np.float32)
    lengths = np.linalg.norm(vectors, axis=-1) if vectors.ndim == 2 else np.zeros(0)
    if len(lengths) != len(texts) or not np.all(np.abs(lengths - 1.0) < 1e-3):
        raise NumericsError(
            f"vectors_not_unit: {len(texts)} texts gave {vectors.shape}, or vectors not of length 1.",
            advice="Normalise the vectors: similarity is their inner product.",
        )
    return vectors


def encode_words(texts: Sequence[str], *, dimension: int = 512) -> torch.Tensor:
    """An encoder without a model: hashed counts of words, of unit length, ``(n, dimension)`` float32.

    It finds texts that share rare-looking words, in microseconds; for meaning take a sentence encoder.
    """
    vectors = torch.zeros((len(texts), dimension))
    for row, text in enumerate(texts):
        for word in re.findall(r"\w+", text.lower()) or [""]:
            digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
            vectors[row, int.from_bytes(digest, "little") % dimension] += 1.0
    return torch.nn.functional.normalize(vectors, dim=-1)
