"""Steps 3 and 4 of a contrast loss: what is held against what, and what it costs.

Every function takes one number a row (``v``, the utility times ``beta``) and who belongs together
(:class:`~corrigible.align.layout.Layout`), and gives :class:`~corrigible.align.layout.Terms`: one loss a
comparison. Whatever is averaged over groups and divided happens in :mod:`corrigible.align.contrast`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from corrigible.align.contrast_spec import MOST_FLIPPED, ContrastSpec, Divergence
from corrigible.align.layout import Layout, Terms, Utilities, known, needed, order_of, slope_of
from corrigible.align.losses import (
    SATURATED,
    agreement,
    label_mean,
    minus_log_sigmoid,
    prospect,
    smoothed,
    unflipped,
)
from corrigible.errors import BadInputError

EXPONENT = 80.0
"""Exponents are clamped to this before ``exp``: float32 overflows at 88."""

FLOOR = -0.5
"""Below this the squared-Hellinger and Jensen-Shannon functions of f-SFT go on as straight lines: their poles
are at -1 and at -log 2."""


def compare(rows: Utilities, layout: Layout, spec: ContrastSpec) -> Terms:
    """All comparisons of a batch and what each costs.

    Raises:
        BadInputError: ``pair_of_many``, ``labels_equal`` or ``nothing_to_order_by``.
    """
    if len(layout.number) == 0:
        none = rows.v[:0]
        return Terms(none, layout.number, none.detach())
    if spec.comparison in ("pair", "all_pairs", "gaps"):
        return _pairs(rows, layout, spec)
    if spec.comparison == "k_vs_worse":
        return _better_than_all_worse(rows, layout, spec)
    if spec.comparison == "group":
        return _posterior(rows, layout, spec)
    return _single(rows, layout, spec)


# -- two rows -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Two:
    """Rows ``better`` and ``worse`` of every comparison, its group, and how sure the order is."""

    better: Tensor
    worse: Tensor
    place: Tensor
    p: Tensor


def _pairs(rows: Utilities, layout: Layout, spec: ContrastSpec) -> Terms:
    two = _labelled_two(rows, layout, spec) if spec.comparison == "pair" else _every_two(rows, layout, spec)
    target = smoothed(two.p, spec.label_smoothing) if spec.label_smoothing else two.p
    rate = spec.flip_rate if rows.flip_rate is None else rows.flip_rate[layout.number[two.place]]
    if isinstance(rate, Tensor) or rate > 0.0:
        target = unflipped(target, torch.as_tensor(rate, dtype=target.dtype).clamp(max=MOST_FLIPPED))
    margin: float | Tensor = spec.margin
    if spec.comparison == "gaps":
        margin = known(rows.score)[two.better] - known(rows.score)[two.worse]

    def cost(better: Tensor, worse: Tensor) -> Tensor:
        gap = better - worse
        if spec.psi == "unlikelihood":
            k = spec.rejected_weight
            return target * (k * worse - better) + (1.0 - target) * (k * better - worse)
        if spec.largest_margin is not None:
            most = torch.full_like(gap, spec.largest_margin)
            gap = gap.minimum(most.masked_fill(target <= 1.0, math.inf))
            gap = gap.maximum(-most.masked_fill(target >= 0.0, math.inf))
        return label_mean(_PSI[spec.psi], gap, target, margin)

    better, worse = rows.v[two.better], rows.v[two.worse]
    loss = spec.scale * cost(better, worse)
    with torch.no_grad():
        gap = better - worse
        columns = {
            "rewards/chosen": better,
            "rewards/rejected": worse,
            "rewards/margin": gap,
            "rewards/accuracy": agreement(gap, two.p),
            "logps/chosen": rows.total[two.better],
            "logps/rejected": rows.total[two.worse],
            "length/gap": (rows.length[two.better] - rows.length[two.worse]).to(gap),
            "grad_weight": spec.scale * slope_of(cost, better, worse),
        }
        if spec.psi == "logistic":
            columns["saturated"] = (gap.abs() > SATURATED).to(gap)
        if spec.pair_weight != "one":
            columns["pair_weight"] = _pair_weight(rows, two, spec.pair_weight)
    loss = loss * columns.get("pair_weight", 1.0)
    return Terms(loss, two.place, 0.5 * (rows.weight[two.better] + rows.weight[two.worse]), columns)


def _hinge(x: Tensor) -> Tensor:
    return torch.relu(1.0 - x)


_PSI: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": minus_log_sigmoid,
    "hinge": _hinge,
    "square": torch.square,
}


def _pair_weight(rows: Utilities, two: _Two, kind: str) -> Tensor:
    """WPO's confidence ``exp(mean_w + mean_l)`` (Zhou et al. 2024, arXiv:2406.11827), or the score gap."""
    if kind == "wpo":
        return torch.exp(rows.mean[two.better] + rows.mean[two.worse])
    return (known(rows.score)[two.better] - known(rows.score)[two.worse]).abs()


def _labelled_two(rows: Utilities, layout: Layout, spec: ContrastSpec) -> _Two:
    sizes = layout.valid.sum(dim=1)
    if bool((sizes > 2).any()):
        found = layout.number[sizes > 2].tolist()[:8]
        raise BadInputError(
            f"pair_of_many: groups {found} have more than two rows.",
            advice="Give every pair its own group, or compare 'all_pairs' or 'k_vs_worse'.",
        )
    place = (sizes == 2).nonzero()[:, 0]
    if layout.index.shape[1] < 2:
        first = second = layout.index.new_zeros(0)
    else:
        first, second = layout.index[place, 0], layout.index[place, 1]
    order = order_of(rows, "pair")
    p = torch.ones(len(place), dtype=rows.v.dtype, device=rows.v.device)
    tie = torch.zeros_like(place, dtype=torch.bool)
    if order is not None:
        turned = order[first] < order[second]
        first, second = torch.where(turned, second, first), torch.where(turned, first, second)
        tie = order[first] == order[second]
    if rows.label is not None and bool((tie & (rows.label[first] != 0)).any()):
        found = layout.number[place[tie & (rows.label[first] != 0)]].tolist()[:8]
        raise BadInputError(
            f"labels_equal: both rows of pairs {found} have the same label.",
            advice="Label the chosen row +1 and the rejected one -1, or learn from single answers (kto).",
        )
    if rows.p_chosen is not None:
        p = rows.p_chosen[layout.number[place]]
        tie = p == 0.5
    elif order is None and len(place):
        raise BadInputError(
            "nothing_to_order_by: the rows have no label, no score and no p_chosen.",
            advice="Label the chosen row of every pair +1 and the rejected one -1.",
        )
    else:
        p = p.masked_fill(tie, 0.5)
    if spec.ties == "drop":
        first, second, place, p = first[~tie], second[~tie], place[~tie], p[~tie]
    return _Two(first, second, place, p)


def _every_two(rows: Utilities, layout: Layout, spec: ContrastSpec) -> _Two:
    """Every two rows of a group, the better one first; tied ones only for losses that know by how much."""
    order = needed(order_of(rows, spec.comparison))[layout.index]
    both = layout.valid[:, :, None] & layout.valid[:, None, :]
    wanted = both & (order[:, :, None] > order[:, None, :])
    if spec.comparison == "gaps":
        earlier = torch.ones_like(wanted[0]).triu(1)
        wanted = wanted | (both & (order[:, :, None] == order[:, None, :]) & earlier)
    place, i, j = wanted.nonzero().unbind(dim=1)
    p = torch.ones(len(place), dtype=rows.v.dtype, device=rows.v.device)
    p = p.masked_fill(order[place, i] == order[place, j], 0.5) if spec.comparison != "gaps" else p
    return _Two(layout.index[place, i], layout.index[place, j], place, p)


# -- one row against a set, and a whole group -----------------------------------------------------


def _better_than_all_worse(rows: Utilities, layout: Layout, spec: ContrastSpec) -> Terms:
    """``-log(e^{v_k} / (e^{v_k} + sum_j e^{v_j}))`` over all j strictly worse than k (Plackett-Luce).

    PRO's temperatures multiply ``v_j`` by how much better k is, and ``v_k`` by the largest of these gaps.
    """
    order = needed(order_of(rows, spec.comparison))[layout.index]
    worse = layout.valid[:, :, None] & layout.valid[:, None, :] & (order[:, :, None] > order[:, None, :])
    place, k = worse.any(dim=2).nonzero().unbind(dim=1)
    among = worse[place, k]
    own, others = rows.v[layout.index[place, k]], rows.v[layout.index[place]]
    if spec.score_temperature:
        score = known(rows.score)[layout.index]
        gaps = (score[place, k, None] - score[place]).masked_fill(~among, 0.0)
        largest = gaps.max(dim=1).values if len(place) else gaps.new_zeros(0)
    else:
        gaps, largest = torch.ones_like(others), torch.ones_like(own)

    def cost(own: Tensor, others: Tensor) -> Tensor:
        held = torch.cat([(own * largest)[:, None], (others * gaps).masked_fill(~among, -math.inf)], dim=1)
        return torch.logsumexp(held, dim=1) - own * largest

    loss = spec.scale * cost(own, others)
    with torch.no_grad():
        count = among.sum(dim=1).to(own)
        mean = (others.masked_fill(~among, 0.0)).sum(dim=1) / count
        win = agreement(own[:, None] - others, torch.ones_like(others)).masked_fill(~among, 0.0)
        weights = rows.weight[layout.index[place]].masked_fill(~among, 0.0).sum(dim=1)
        columns = {
            "rewards/chosen": own,
            "rewards/rejected": mean,
            "rewards/margin": own - mean,
            "rewards/accuracy": win.sum(dim=1) / count,
            "logps/chosen": rows.total[layout.index[place, k]],
            "grad_weight": spec.scale * slope_of(cost, own, others),
        }
        if spec.score_temperature:
            columns["score_temperature"] = largest
        weight = (rows.weight[layout.index[place, k]] + weights) / (count + 1.0)
    return Terms(loss, place, weight, columns)


def _posterior(rows: Utilities, layout: Layout, spec: ContrastSpec) -> Terms:
    """``KL(alpha || beta)`` within a group: ``alpha = softmax(log p + r / beta - log q)``, a constant, and
    ``softmax(log pi - log q)`` (BRAIn, Pandey et al. 2024, arXiv:2402.02479)."""
    place = (layout.valid.sum(dim=1) >= 2).nonzero()[:, 0]
    index, valid = layout.index[place], layout.valid[place]
    logq = (rows.reference if rows.logq is None else rows.logq)[index]
    with torch.no_grad():
        ratio = rows.reference[index] - logq
        cap = math.inf if spec.log_weight_cap is None else spec.log_weight_cap
        logit = ratio.clamp(-cap, cap) + known(rows.score)[index] / spec.beta
        logit = logit.masked_fill(~valid, -math.inf)
        best = logit == logit.amax(dim=1, keepdim=True) if len(place) else valid
        alpha = best / best.sum(dim=1, keepdim=True) if spec.hard else torch.softmax(logit, dim=1)
        alpha = alpha.to(rows.s)
    logits = (rows.s[index] - logq).masked_fill(~valid, -math.inf)
    log_beta = torch.log_softmax(logits, dim=1).masked_fill(~valid, 0.0)
    loss = spec.scale * (torch.xlogy(alpha, alpha) - alpha * log_beta).sum(dim=1)
    with torch.no_grad():
        count = valid.sum(dim=1).to(alpha)
        v = rows.v[index]
        top = v.gather(1, alpha.argmax(dim=1, keepdim=True))[:, 0] if len(place) else v.new_zeros(0)
        rest = (v.masked_fill(~valid, 0.0).sum(dim=1) - top) / (count - 1.0)
        columns = {
            "rewards/chosen": top,
            "rewards/rejected": rest,
            "rewards/margin": top - rest,
            "ess": 1.0 / alpha.square().sum(dim=1),
            "grad_weight": 0.5 * (alpha - log_beta.exp().masked_fill(~valid, 0.0)).abs().sum(dim=1),
        }
        if spec.log_weight_cap is not None:
            columns["capped"] = ((ratio.abs() > cap) & valid).sum(dim=1) / count
        weight = rows.weight[index].masked_fill(~valid, 0.0).sum(dim=1) / count
    return Terms(loss, place, weight, columns)


# -- rows by themselves ---------------------------------------------------------------------------


def _single(rows: Utilities, layout: Layout, spec: ContrastSpec) -> Terms:
    place, slot = layout.valid.nonzero().unbind(dim=1)
    index = layout.index[place, slot]
    if spec.psi == "prospect":
        label = needed(None if rows.label is None else rows.label.to(rows.v))[index]
        told = label != 0
    else:
        label = torch.ones_like(rows.v[index]) if rows.label is None else rows.label.to(rows.v)[index]
        told = label >= 0 if spec.comparison == "wanted" else torch.ones_like(label, dtype=torch.bool)
    place, index, label = place[told], index[told], label[told]
    v = rows.v[index]
    columns = {"logps/chosen": rows.total[index]}
    if spec.psi == "prospect":
        sign = torch.sign(label)
        side = torch.full_like(v, spec.undesirable_weight).masked_fill(label > 0, spec.desirable_weight)
        columns = {"desirable": (label > 0).to(v), "saturated": (v.abs() > SATURATED).to(v)}

        def cost(v: Tensor) -> Tensor:
            return prospect(sign * v, side)

    elif spec.psi == "f_sft":
        columns["rewards/chosen"] = v

        def cost(v: Tensor) -> Tensor:
            return -implicit_gain(v, spec.divergence)

    else:
        with torch.no_grad():
            worth = _row_weights(rows, layout, spec)[layout.valid][told]
        columns["example_weight"] = worth

        def cost(v: Tensor) -> Tensor:
            return -worth * v

    loss = spec.scale * cost(v)
    columns["grad_weight"] = spec.scale * slope_of(cost, v)
    return Terms(loss, place, rows.weight[index], {name: value.detach() for name, value in columns.items()})


def _row_weights(rows: Utilities, layout: Layout, spec: ContrastSpec) -> Tensor:
    """What each row of ``layout.index`` is worth, ``exp((score - baseline) / temperature)``."""
    if spec.weight_temperature is None:
        return torch.ones_like(rows.v[layout.index])
    score = known(rows.score)[layout.index]
    if spec.self_normalised:
        logit = (score / spec.weight_temperature).masked_fill(~layout.valid, -math.inf)
        weight = torch.softmax(logit, dim=1)
    else:
        scores = score.masked_fill(~layout.valid, 0.0)
        base = torch.zeros_like(scores[:, :1])
        if spec.baseline == "group_mean":
            base = scores.sum(dim=1, keepdim=True) / layout.valid.sum(dim=1, keepdim=True)
        elif spec.baseline == "group_best":
            base = score.masked_fill(~layout.valid, -math.inf).amax(dim=1, keepdim=True)
        weight = torch.exp(((score - base) / spec.weight_temperature).clamp(max=EXPONENT))
    return weight if spec.weight_cap is None else weight.clamp(max=spec.weight_cap)


def implicit_gain(v: Tensor, divergence: Divergence) -> Tensor:
    """f-SFT's ``G(v) = -f*(-v)`` of the implicit reward ``v`` of a demonstration, elementwise.

    ``v`` (total variation: plain SFT), ``v - v^2 / 4`` (Pearson), ``v / (1 + v)`` (squared Hellinger),
    ``-exp(-v - 1)`` (KL), ``log(2 - exp(-v))`` (Jensen-Shannon). Hellinger's and Jensen-Shannon's go on as
    their tangents below :data:`FLOOR`, before their poles; the exponent of KL is at most :data:`EXPONENT`.

    Source: Wang et al. 2025, "Implicit Reward as the Bridge" (arXiv:2507.00018); the field guide, S164.
    """
    if divergence == "total_variation":
        return v
    if divergence == "pearson":
        return v - 0.25 * v.square()
    if divergence == "kl":
        return -torch.exp((-v - 1.0).clamp(max=EXPONENT))
    inside = v.clamp(min=FLOOR)
    if divergence == "hellinger":
        curve, at, slope = inside / (1.0 + inside), FLOOR / (1.0 + FLOOR), 1.0 / (1.0 + FLOOR) ** 2
    else:
        grown = math.exp(-FLOOR)
        curve, at, slope = torch.log(2.0 - torch.exp(-inside)), math.log(2.0 - grown), grown / (2.0 - grown)
    return torch.where(v < FLOOR, at + slope * (v - FLOOR), curve)
