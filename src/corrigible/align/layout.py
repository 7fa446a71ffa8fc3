"""What comparisons look at and what they give: rows by group, utilities, and one loss a comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from corrigible.errors import BadInputError


@dataclass(frozen=True)
class Layout:
    """Rows by group.

    Attributes:
        index: ``(groups, most)`` int64, the rows of each group in order; 0 where there are fewer.
        valid: ``(groups, most)`` bool, which of these are rows.
        number: ``(groups,)`` int64, which of the batch's groups each is, in ascending order of their ids.
        total: how many groups the batch has, those of which no row is left included.
    """

    index: Tensor
    valid: Tensor
    number: Tensor
    total: int

    @classmethod
    def of(cls, group: Tensor, kept: Tensor, counted: Tensor) -> Layout:
        """Of rows with these group ids ``(n,)``: ``counted`` ones make a group, ``kept`` ones are in it."""
        ids, place = torch.unique(group[counted], return_inverse=True)
        slot = torch.zeros_like(group)
        slot[counted] = place
        rows = kept.nonzero()[:, 0]
        rows = rows[torch.argsort(slot[rows], stable=True)]
        number, sizes = torch.unique_consecutive(slot[rows], return_counts=True)
        most = int(sizes.max()) if len(sizes) else 0
        valid = torch.arange(most, device=group.device) < sizes[:, None]
        index = torch.zeros(valid.shape, dtype=torch.int64, device=group.device)
        index[valid] = rows
        return cls(index, valid, number, len(ids))


@dataclass(frozen=True)
class Utilities:
    """What comparisons may look at; ``(n,)`` where nothing else is said.

    Attributes:
        v: ``beta * (u - z0)``, with gradient.
        s: reduced log-prob under the policy, nats, with gradient.
        total: plain sum of the tokens' log-probs under the policy; a constant.
        reference: reduced log-prob under the reference; zeros without one.
        mean: mean log-prob per token under the policy; a constant.
        length: scored tokens.
        weight: of the row.
        score, label, logq: as in :class:`~corrigible.align.contrast.ContrastRows`.
        p_chosen, flip_rate: per group of the batch.
    """

    v: Tensor
    s: Tensor
    total: Tensor
    reference: Tensor
    mean: Tensor
    length: Tensor
    weight: Tensor
    score: Tensor | None = None
    label: Tensor | None = None
    logq: Tensor | None = None
    p_chosen: Tensor | None = None
    flip_rate: Tensor | None = None


@dataclass(frozen=True)
class Terms:
    """Comparisons and what they cost.

    Attributes:
        loss: ``(c,)``, with gradient.
        place: ``(c,)`` int64, which group of the layout each belongs to.
        weight: ``(c,)``, mean weight of its rows; a constant.
        columns: further numbers of every comparison, to be logged.
    """

    loss: Tensor
    place: Tensor
    weight: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)


def order_of(rows: Utilities, comparison: str) -> Tensor | None:
    """What says which row is better: of a pair its labels, of more rows their scores, or what there is."""
    label = None if rows.label is None else rows.label.to(rows.v)
    first, second = (label, rows.score) if comparison == "pair" else (rows.score, label)
    return second if first is None else first


def slope_of(cost: Callable[..., Tensor], *sides: Tensor) -> Tensor:
    """``|d cost / d first side|``, ``(c,)``."""
    with torch.enable_grad():
        probe = [side.detach().requires_grad_() for side in sides]
        return torch.autograd.grad(cost(*probe).sum(), probe[0])[0].abs()


def needed(order: Tensor | None) -> Tensor:
    """The order, which must be there.

    Raises:
        BadInputError: ``nothing_to_order_by``.
    """
    if order is None:
        raise BadInputError(
            "nothing_to_order_by: the rows have neither scores nor labels.", advice="Give every row a score."
        )
    return order


def known(column: Tensor | None) -> Tensor:
    """A column that is there: ``contrast_loss`` has refused what needs one and has none."""
    assert column is not None
    return column
