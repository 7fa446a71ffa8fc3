"""A reward model whose reader learns as well: backbone and head, one update at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from corrigible.errors import NumericsError
from corrigible.models.optimiser import Group, Optimiser
from corrigible.rewards.backbones import Backbone, Encoded
from corrigible.rewards.config import RewardConfig
from corrigible.rewards.head import Comparisons, Standardiser
from corrigible.rewards.losses import bradley_terry_loss

MAX_GRADIENT = 1.0
"""Gradients longer than this are scaled down to it."""


class TunedReward(nn.Module):
    """Backbone and linear head as one module.

    Args:
        backbone: the reader; those of its weights are trained that have ``requires_grad``.
        config: how it reads; and the learning rates, the decay and the tokens of a pass.
        standardiser: applied to the vectors before the head.
        weight: ``(width,)`` the head's start, which the ``config.members`` bootstrap heads begin with too.
    """

    def __init__(
        self, backbone: Backbone, config: RewardConfig, standardiser: Standardiser, weight: Tensor
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        self.standardiser = standardiser
        self.inner = backbone.module
        self.weight = nn.Parameter(weight.float().to(backbone.device))
        self.members = nn.Parameter(weight.float().to(backbone.device).repeat(config.members, 1))

    def groups(self) -> tuple[Group, Group]:
        """What to train, the backbone and the heads, with the learning rates of the config as ``rate``."""
        config = self.config
        inner = {f"inner.{name}": p for name, p in self.inner.named_parameters() if p.requires_grad}
        heads = {"weight": self.weight, "members": self.members}
        return (
            Group(inner, weight_decay=config.weight_decay, rate=config.learning_rate),
            Group(heads, rate=config.head_learning_rate),
        )

    def forward(self, parts: Sequence[Sequence[Encoded]], named: Tensor) -> tuple[Tensor, Tensor]:
        """Scores ``(n,)`` and, on detached vectors, those of the bootstrap heads ``(n, members)``."""
        vectors = self.backbone.represent(parts, self.config, together=True)
        z = self.standardiser(torch.cat([vectors, named.to(vectors)], dim=1))
        return z @ self.weight, z.detach() @ self.members.T

    def update(
        self,
        optimiser: Optimiser,
        parts: Sequence[Sequence[Encoded]],
        named: Tensor,
        data: Comparisons,
        times: Tensor | None = None,
        *,
        lr: float = 1.0,
        max_gradient: float = MAX_GRADIENT,
    ) -> float:
        """One optimiser step on a batch of pairs.

        Args:
            optimiser: of what is trained.
            parts, named, data, times: the batch, as :meth:`accumulate` takes it.
            lr: learning rate, which each of the optimiser's groups multiplies by its own.
            max_gradient: a longer gradient is scaled down to this length.

        Returns:
            The batch's log-loss before the step, nats.

        Raises:
            NumericsError: the scores or the gradient are not finite; the weights are as before.
        """
        loss = self.accumulate(parts, named, data, times)
        norm = optimiser.norm()
        if not norm < float("inf"):
            raise NumericsError("the gradient became NaN.", advice="Lower the learning rate.")
        optimiser.step(lr, min(1.0, max_gradient / (norm + 1e-6)))
        return loss

    def accumulate(
        self,
        parts: Sequence[Sequence[Encoded]],
        named: Tensor,
        data: Comparisons,
        times: Tensor | None = None,
    ) -> float:
        """Add the gradient of a batch of pairs; returns its log-loss in nats.

        The batch is cut into passes of at most ``config.batch_tokens`` tokens, each divided by the weight of
        the whole batch, so that the gradient does not depend on the cut. A causal backbone reads a pass
        without padding, and what texts begin with alike (the prompt of both sides) once.

        Args:
            parts: the texts, as :meth:`Backbone.encode` gives them.
            named: ``(texts, features)``.
            data: pairs of texts.
            times: ``(pairs, members)`` how often each bootstrap head counts each pair.
        """
        device = self.backbone.device
        total = float(data.weight.sum())
        loss_sum = 0.0
        for piece in self._passes(parts, data):
            pairs = data.take(piece)
            if float(pairs.weight.sum()) <= 0:
                continue
            used, where = torch.unique(torch.cat([pairs.chosen, pairs.rejected]), return_inverse=True)
            texts = [[part[i] for i in used.tolist()] for part in parts]
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                scores, spread = self(texts, named[used])
            chosen, rejected = (index.to(device) for index in where.view(2, -1))
            out = bradley_terry_loss(
                scores[chosen],
                scores[rejected],
                p_chosen=pairs.p,
                weight=pairs.weight,
                center=self.config.center,
                denominator=total,
            )
            loss = out.loss
            if times is not None and times.shape[1]:
                delta = spread[chosen].float() - spread[rejected].float()
                p, weight = (value.float().to(device).unsqueeze(1) for value in (pairs.p, pairs.weight))
                cost = p * nn.functional.softplus(-delta) + (1 - p) * nn.functional.softplus(delta)
                loss = loss + (times[piece].to(device) * weight * cost).sum() / total
            loss.backward()  # type: ignore[no-untyped-call]
            loss_sum += out.metrics["log_loss"]
        return loss_sum

    def _passes(self, parts: Sequence[Sequence[Encoded]], data: Comparisons) -> list[list[int]]:
        """Cut the pairs, in their order, into passes whose distinct texts fit into the budget of tokens."""
        pieces: list[list[int]] = []
        seen: set[int] = set()
        tokens = 0
        for pair, sides in enumerate(zip(data.chosen.tolist(), data.rejected.tolist(), strict=True)):
            extra = self._tokens(parts, set(sides) - seen)
            if not pieces or tokens + extra > self.config.batch_tokens:
                pieces.append([])
                seen, tokens = set(), 0
                extra = self._tokens(parts, set(sides))
            pieces[-1].append(pair)
            seen |= set(sides)
            tokens += extra
        return pieces

    def _tokens(self, parts: Sequence[Sequence[Encoded]], texts: set[int]) -> int:
        return sum(self.backbone.size([part[text] for text in texts]) for part in parts) if texts else 0
