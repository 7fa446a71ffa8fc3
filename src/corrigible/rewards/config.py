"""Every choice that makes a reward model, in one frozen record that is saved beside its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch

from corrigible.errors import BadInputError
from corrigible.rewards.features import FEATURES

TUNES = ("frozen", "full", "lora")
TEXTS = ("response", "prompt+response", "prompt*response")
BEST_BACKBONE = "smollm2-135m"
"""What `corrigible train reward` takes: the best measured on human comparisons (guides/real-data)."""

DTYPES = ("float32", "bfloat16")
POOLINGS = ("mean", "response_mean", "last", "first")


@dataclass(frozen=True)
class RewardConfig:
    """How a reward model reads, scores and learns.

    Attributes:
        backbone: "minilm" or the folder of another sentence encoder, or a causal language model that
            `corrigible.models.load_policy` knows ("smollm2-135m", a folder, a hub id).
        tune: "frozen" (a linear head on fixed features: a convex fit, the same every time), "full" (every
            backbone weight) or "lora" (adapters; causal backbones).
        text: what the backbone reads. "response" alone; "prompt+response" together, so that attention
            sees both; "prompt*response": each alone, features are the response's embedding and its
            elementwise product with the prompt's, so a linear head can use how they relate.
        pooling: "mean" over all tokens, "response_mean" over the response's tokens, "last" token of the
            response (its end of turn), "first" token ([CLS] of an encoder).
        layers: hidden states to read, concatenated: -1 is the last, 0 the embeddings.
        features: names from `FEATURES` appended to the embedding (declared here because they are
            confounds too: a model with "log_chars" is allowed to like length).
        max_length: tokens per text. The prompt's beginning is cut first, then the response's end; how many
            texts were cut is reported.
        dtype: of a frozen causal backbone's weights, which the fitted head belongs to; everything else is
            float32.
        labels: "votes" trains on the share of judges for each side, "majority" on its rounding.
        weights: "votes" lets a pair count as often as it was judged, "equal" once.
        epochs, learning_rate, head_learning_rate, batch_pairs, weight_decay, warmup: AdamW for "full" and
            "lora", linear warm-up over that share of the steps, then linear decay to zero.
        batch_tokens: padded tokens per micro-batch; only memory and speed depend on it (tuning MiniLM
            takes about 0.4 GB per thousand).
        lora_rank: rank of the adapters with "lora"; their scale is twice the rank over the rank.
        train_layers: with "full", tune only that many top layers; 0 tunes all.
        warm_start: with "full" and "lora", fit the head on the frozen features first (Kumar et al. 2022),
            which keeps a random head from spoiling the features.
        center: coefficient of the squared sum of both scores (see `bradley_terry_loss`).
        penalties: L2 strengths of the linear head to choose from by validation.
        validation: share of the pairs held out inside training for early stopping and temperature, when
            tuned; frozen heads use `folds`-fold cross-validation instead. 0: no early stopping.
        folds: number of cross-validation folds of a frozen head.
        patience: epochs without a better validation log-loss before stopping.
        members: bootstrap heads whose spread is the uncertainty; 0 for none.
        seed: orders, bootstrap and dropout.
    """

    backbone: str = "minilm"
    tune: Literal["frozen", "full", "lora"] = "frozen"
    text: Literal["response", "prompt+response", "prompt*response"] = "response"
    pooling: Literal["mean", "response_mean", "last", "first"] = "mean"
    layers: tuple[int, ...] = (-1,)
    features: tuple[str, ...] = ("log_chars", "log_words")
    max_length: int = 256
    dtype: Literal["float32", "bfloat16"] = "float32"
    labels: Literal["votes", "majority"] = "votes"
    weights: Literal["votes", "equal"] = "votes"
    epochs: int = 3
    learning_rate: float = 3e-5
    head_learning_rate: float = 1e-3
    batch_pairs: int = 32
    batch_tokens: int = 4096
    weight_decay: float = 0.01
    warmup: float = 0.1
    train_layers: int = 0
    lora_rank: int = 16
    warm_start: bool = True
    center: float = 0.0
    penalties: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    validation: float = 0.15
    folds: int = 4
    patience: int = 2
    members: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("tune", TUNES), ("text", TEXTS), ("pooling", POOLINGS), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise BadInputError(
                    f"{name} is {getattr(self, name)!r}.", advice=f"Choose one of {', '.join(allowed)}."
                )
        if self.labels not in ("votes", "majority") or self.weights not in ("votes", "equal"):
            raise BadInputError(
                f"labels is {self.labels!r} and weights {self.weights!r}.",
                advice="labels is votes or majority; weights is votes or equal.",
            )
        unknown = [name for name in self.features if name not in FEATURES]
        if unknown:
            raise BadInputError(
                f"unknown feature(s) {', '.join(unknown)}.", advice=f"Choose from {', '.join(FEATURES)}."
            )
        if self.text == "response" and self.pooling == "response_mean":
            object.__setattr__(self, "pooling", "mean")
        if self.tune != "frozen" or self.backbone == "minilm":
            object.__setattr__(self, "dtype", "float32")
        if self.tune == "lora" and self.backbone == "minilm":
            raise BadInputError("LoRA is for causal backbones.", advice='Use tune="full" with minilm.')
        if not self.layers:
            raise BadInputError("layers is empty.", advice="Use (-1,) for the last layer.")
        positive = (
            "max_length",
            "epochs",
            "learning_rate",
            "head_learning_rate",
            "batch_pairs",
            "batch_tokens",
        )
        for name in (*positive, "lora_rank"):
            if not getattr(self, name) > 0:
                raise BadInputError(f"{name} is {getattr(self, name)}.", advice="It must be above zero.")
        if not self.penalties or min(self.penalties) <= 0:
            raise BadInputError("penalties must be positive numbers.", advice="Try 0.01, 0.1, 1.")
        if not 0 <= self.validation < 1 or self.folds < 2:
            raise BadInputError("validation must lie in [0, 1) and folds be at least 2.")

    @staticmethod
    def preset(backbone: str) -> dict[str, Any]:
        """Settings that suit a backbone where they differ from the defaults ("" is the best one measured)."""
        backbone = backbone or BEST_BACKBONE
        if backbone == "minilm":
            return {}
        from corrigible.models import preferred_dtype

        dtype = "bfloat16" if preferred_dtype() == torch.bfloat16 else "float32"
        shared = {"backbone": backbone, "text": "prompt+response", "dtype": dtype}
        if backbone == "smollm2-135m":
            # Behind the middle of its thirty layers more is said about an answer than at the end, which is
            # about the next token; and in the mean over the answer more than in its last token.
            return {**shared, "pooling": "response_mean", "layers": (18,)}
        # A causal model's last token has seen everything before it.
        return {**shared, "pooling": "last"}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RewardConfig:
        """From `to_json`; BadInputError names a setting that does not exist."""
        known = {entry.name for entry in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise BadInputError(
                f"unknown setting(s) {', '.join(unknown)} of a reward model.",
                advice=f"The settings are {', '.join(sorted(known))}.",
            )
        lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**lists)
