"""The one contrast function: every direct alignment loss on the log-probs of sequences, in five steps.

    1 reduce    per-token log-probs to one number a row, ``s = sum / length ** kappa``; ``h = s - s_ref``
    2 link      ``u = g(h)``, ``v = beta * (u - z0)``
    3 compare   which rows are held against which
    4 psi       what that costs                         (3 and 4: :mod:`corrigible.align.comparisons`)
    5 anchor    plus the negative log-likelihood of the best row; then the mean over groups, never over tokens

Which of them a loss takes is its :class:`~corrigible.align.contrast_spec.ContrastSpec`.

    loss = contrast_loss(rows, preset("dpo", beta=0.1)).loss

Every group (prompt) counts once: ``sum_g sum_{c in g} weight_c loss_c / n_g`` over ``sum_g mean weight_g``.
Given the ``denominator`` of the whole batch, outputs of its parts add up to the output of the batch, as long
as no group is cut. Slots outside ``mask`` are never looked at, NaN or not.

Source: the field guide's section 1.2, with each loss's paper in :mod:`corrigible.align.contrast_spec`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from corrigible.align.comparisons import EXPONENT, compare
from corrigible.align.contrast_spec import PRESETS, ContrastSpec, preset
from corrigible.align.layout import Layout, Terms, Utilities
from corrigible.align.losses import LossOutput, check_logps, per_item, whole_weight, widen
from corrigible.errors import BadInputError, NumericsError

__all__ = ["PRESETS", "ContrastRows", "ContrastSpec", "contrast_loss", "preset"]


@dataclass(frozen=True)
class ContrastRows:
    """Every candidate of every prompt of a batch, one a row.

    Attributes:
        logp: log-probs of tokens under the policy, ``(n, T)``, nats, with gradient; T = 1 for a tabular one.
        mask: ``(n, T)`` bool, True on the response's tokens, its end of turn included. Nothing else is read.
            A row without any takes no part: it would count as certain.
        group: ``(n,)`` int64, which prompt a row answers; a pair is two rows of one group.
        ref_logp: log-probs under the frozen reference, ``(n, T)``; no gradient.
        token_weight: credit of each token, ``(n, T)``; 1 when absent.
        score: ``(n,)`` in the judge's unit, higher is better; NaN when there is none.
        label: ``(n,)`` in {+1, -1, 0}; of a pair the chosen row has +1.
        logq: log-prob of each row under the distribution that it was sampled from, ``(n,)``, nats.
        weight: of each row, ``(n,)`` >= 0; 1 when absent.
        p_chosen: per group in ascending order of ids, ``(groups,)`` in [0, 1]: how sure it is that the row
            labelled +1 (without labels the first row) is the better one.
        kl_rows: ``(n,)`` bool, mismatched rows that only KTO's reference point is estimated on.
        flip_rate: per group, ``(groups,)`` in [0, 0.5): the share of flipped labels of whoever judged it.
        truncated: ``(n,)`` bool, responses that were cut off and have no end.
    """

    logp: Tensor
    mask: Tensor
    group: Tensor
    ref_logp: Tensor | None = None
    token_weight: Tensor | None = None
    score: Tensor | None = None
    label: Tensor | None = None
    logq: Tensor | None = None
    weight: Tensor | None = None
    p_chosen: Tensor | None = None
    kl_rows: Tensor | None = None
    flip_rate: Tensor | None = None
    truncated: Tensor | None = None

    @classmethod
    def from_ragged(
        cls,
        logp: Sequence[Tensor],
        group: Sequence[int] | Tensor,
        *,
        ref_logp: Sequence[Tensor] | None = None,
        token_weight: Sequence[Tensor] | None = None,
        **columns: Tensor | Sequence[float] | None,
    ) -> ContrastRows:
        """From the log-probs ``(tokens,)`` of every row's scored tokens.

        Args:
            logp: per row, under the policy.
            group: per row.
            ref_logp, token_weight: per row, alike.
            columns: the other attributes, as tensors or lists.

        Raises:
            BadInputError: there is no row, or rows of different lengths belong together.
        """
        if not logp:
            raise BadInputError("There is nothing to learn from: n = 0.", advice="Skip empty batches.")
        device = logp[0].device
        for name, other in (("ref_logp", ref_logp), ("token_weight", token_weight)):
            if other is not None and [len(one) for one in other] != [len(one) for one in logp]:
                raise BadInputError(f"{name} must have one value for every token of every row.")
        lengths = torch.tensor([len(one) for one in logp], device=device)
        width = max(1, int(lengths.max()))

        def stacked(rows: Sequence[Tensor] | None) -> Tensor | None:
            if rows is None:
                return None
            padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
            return padded if padded.shape[1] == width else padded.new_zeros(len(rows), width)

        dtypes = {"label": torch.int8, "kl_rows": torch.bool, "truncated": torch.bool}
        made = {
            name: None
            if value is None
            else torch.as_tensor(value, dtype=_dtype(value, dtypes.get(name)), device=device)
            for name, value in columns.items()
        }
        policy = stacked(logp)
        assert policy is not None
        return cls(
            logp=policy,
            mask=torch.arange(width, device=device) < lengths[:, None],
            group=torch.as_tensor(group, dtype=torch.int64, device=device),
            ref_logp=stacked(ref_logp),
            token_weight=stacked(token_weight),
            **made,
        )


def _dtype(value: Tensor | Sequence[float], wanted: torch.dtype | None) -> torch.dtype | None:
    if wanted is not None:
        return wanted
    return None if isinstance(value, Tensor) else torch.float64


def contrast_loss(
    rows: ContrastRows,
    spec: ContrastSpec,
    *,
    denominator: float | Tensor | None = None,
    z0: float | None = None,
) -> LossOutput:
    """The loss that ``spec`` describes, on these rows.

    Args:
        rows: candidates by prompt; at least float32 is computed in, float64 when given.
        spec: which loss (:func:`~corrigible.align.contrast_spec.preset`).
        denominator: what the weighted sum over groups is divided by, > 0; the weight of these groups when
            absent. Give that of the whole batch when this is one of its micro-batches.
        z0: KTO's reference point, nats, >= 0, of the whole batch; that of ``rows.kl_rows`` when absent.

    Returns:
        The loss, and the means over comparisons (as they are averaged in the loss) of what the comparison
        has of: ``rewards/chosen``, ``rewards/rejected``, ``rewards/margin``, ``rewards/accuracy`` (ties count
        a half), ``logps/chosen``, ``logps/rejected``, ``length/gap`` (tokens, chosen minus rejected),
        ``grad_weight`` (mean slope of the loss), ``saturated`` (share with ``|d| > 10``), ``pair_weight``,
        ``example_weight``, ``score_temperature``, ``ess`` and ``capped`` (BRAIn), ``desirable`` and ``z0``
        (KTO), ``anchor`` (its part of the loss), ``reference_gap`` (mean ``log pi - log pi_ref`` of the rows:
        on samples of the reference, minus its KL divergence to the policy). ``rows/left_out`` counts rows
        without tokens or cut off, when there are any. Without ``denominator`` also
        ``margin_length_correlation``.

    Raises:
        BadInputError: shapes do not fit, something that the loss needs is not there, or labels make no sense.
        NumericsError: ``logps_not_finite``, ``logps_positive``, ``score_nan``, ``logq_nan``, with the rows;
            ``token_weight_not_finite``, ``z0_not_usable``, ``nothing_to_compare``, ``nothing_to_average``.
    """
    n = _check_shapes(rows, spec)
    kl_rows = (
        torch.zeros(n, dtype=torch.bool, device=rows.logp.device) if rows.kl_rows is None else rows.kl_rows
    )
    reduced = _reduce(rows, spec)
    empty = reduced.length == 0
    kept = ~kl_rows & ~empty
    if rows.truncated is not None and spec.drop_truncated:
        kept = kept & ~rows.truncated
    layout = Layout.of(rows.group, kept, ~kl_rows)
    point = _reference_point(reduced.h, kl_rows & ~empty, rows, spec, z0)
    utilities = Utilities(
        v=spec.beta * (_link(reduced.h, spec) - point),
        s=reduced.s,
        total=reduced.total.detach(),
        reference=reduced.reference,
        mean=reduced.mean,
        length=reduced.length,
        weight=per_item("weight", rows.weight, n, rows.logp),
        score=_scores(rows, kept, layout, spec),
        label=rows.label,
        logq=_known("logq", rows.logq, kept, reduced.s) if spec.psi == "divergence" else None,
        p_chosen=_per_group("p_chosen", rows.p_chosen, layout, rows, 1.0),
        flip_rate=_per_group("flip_rate", rows.flip_rate, layout, rows, 0.5),
    )
    terms = compare(utilities, layout, spec)
    return _average(
        terms, utilities, reduced, layout, spec, denominator, point, int((~kl_rows & ~kept).sum())
    )


# -- 1 reduce, 2 link -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reduced:
    """Per row ``(n,)``: ``s`` and ``h`` with gradient, the rest constants."""

    s: Tensor
    reference: Tensor
    h: Tensor
    mean: Tensor
    length: Tensor
    total: Tensor


def _reduce(rows: ContrastRows, spec: ContrastSpec) -> _Reduced:
    mask = rows.mask
    # Chosen before anything is computed with it: a NaN times zero is a NaN, in the gradient as well.
    policy = widen(torch.where(mask, rows.logp, torch.zeros_like(rows.logp)))
    length = mask.sum(dim=1)
    total = policy.sum(dim=1)
    checked = {"logp": total}
    reference = None
    if spec.reference or spec.psi == "divergence":
        if rows.ref_logp is None:
            raise BadInputError(
                f"{spec.name} needs reference log-probs.",
                advice="Give ref_logp, or a loss without a reference.",
            )
        reference = torch.where(mask, rows.ref_logp.detach(), torch.zeros_like(rows.ref_logp)).to(policy)
        checked["ref_logp"] = reference.sum(dim=1)
    check_logps(**checked)
    divisor = length.clamp(min=1).to(policy) ** spec.length_power

    def summed(tokens: Tensor) -> Tensor:
        if rows.token_weight is not None:
            credit = torch.where(mask, rows.token_weight.detach(), torch.zeros_like(rows.token_weight)).to(
                policy
            )
            if not bool(torch.isfinite(credit).all()):
                raise NumericsError("token_weight_not_finite: token_weight holds NaN or infinity.")
            tokens = tokens * credit
        return tokens.sum(dim=1) / divisor

    s = summed(policy)
    s_ref = torch.zeros_like(s) if reference is None else summed(reference)
    mean = total.detach() / length.clamp(min=1)
    return _Reduced(s, s_ref, s - s_ref if spec.reference else s, mean, length, total)


def _link(h: Tensor, spec: ContrastSpec) -> Tensor:
    if spec.link == "forward_kl":
        return 1.0 - torch.exp((-h).clamp(max=EXPONENT))
    if spec.link == "jensen_shannon":
        return math.log(2.0) + logsigmoid(h)
    if spec.link == "alpha" and spec.alpha != 1.0:
        power = spec.alpha - 1.0
        return (torch.exp((power * h).clamp(max=EXPONENT)) - 1.0) / power
    if spec.link == "log_odds":
        # An answer that is certain has infinite odds: they end where float32 still knows 1 - p.
        h = h.clamp(max=-1e-7)
        return h - torch.log(-torch.expm1(h))
    return h


def _reference_point(
    h: Tensor, mismatched: Tensor, rows: ContrastRows, spec: ContrastSpec, z0: float | None
) -> float:
    if spec.psi != "prospect":
        return 0.0
    if z0 is None:
        if rows.kl_rows is None:
            raise BadInputError(
                f"{spec.name} needs a reference point.", advice="Give z0, or mismatched rows with kl_rows."
            )
        ratios = h.detach()[mismatched].double()
        return max(0.0, float(ratios.mean())) if len(ratios) else 0.0
    if not 0.0 <= z0 < math.inf:
        raise NumericsError(f"z0_not_usable: z0 is {z0}.", advice="It is a mean of log-ratios, clamped at 0.")
    return z0


# -- 5 anchor and average -------------------------------------------------------------------------


def _average(
    terms: Terms,
    rows: Utilities,
    reduced: _Reduced,
    layout: Layout,
    spec: ContrastSpec,
    denominator: float | Tensor | None,
    z0: float,
    left_out: int,
) -> LossOutput:
    groups = len(layout.number)
    count = torch.zeros(groups, dtype=terms.weight.dtype, device=terms.weight.device)
    count = count.index_add(0, terms.place, torch.ones_like(terms.weight)).clamp(min=1.0)
    share = terms.weight if spec.per_comparison else terms.weight / count[terms.place]
    total = _total(denominator, share)
    worth = terms.weight if spec.within == "sum" else share
    loss = (worth * terms.loss).sum() / total
    metrics = {name: float((share * value.detach()).sum()) / total for name, value in terms.columns.items()}
    if spec.reference or spec.psi == "divergence":
        valid = layout.valid
        weight = rows.weight[layout.index].masked_fill(~valid, 0.0) / valid.sum(dim=1, keepdim=True)
        ratios = (reduced.s.detach() - reduced.reference)[layout.index]
        metrics["reference_gap"] = float((weight * ratios).sum()) / total
    if spec.anchor > 0.0 and len(terms.loss):
        anchor = _anchor(rows, reduced, layout, spec, share, terms.place) / total
        loss = loss + anchor
        metrics["anchor"] = float(anchor.detach())
    if spec.psi == "prospect":
        metrics["z0"] = z0 * float(share.sum()) / total
    if left_out:
        metrics["rows/left_out"] = float(left_out)
    if denominator is None and "length/gap" in terms.columns and len(terms.loss) > 2:
        pair = torch.stack([terms.columns["rewards/margin"], terms.columns["length/gap"]]).double()
        if bool((pair.std(dim=1) > 0).all()):
            metrics["margin_length_correlation"] = float(torch.corrcoef(pair)[0, 1])
    metrics["loss"] = float(loss.detach())
    return LossOutput(loss, metrics)


def _total(denominator: float | Tensor | None, share: Tensor) -> float:
    if denominator is None and len(share) == 0:
        raise NumericsError(
            "nothing_to_compare: no group has two rows that can be told apart.",
            advice="Drop groups of one, of ties and of empty or cut answers before training.",
        )
    return whole_weight(denominator, share)


def _anchor(
    rows: Utilities, reduced: _Reduced, layout: Layout, spec: ContrastSpec, share: Tensor, place: Tensor
) -> Tensor:
    """``anchor * NLL`` of the best row of every group that has a comparison, each as its group counts."""
    held = torch.zeros(len(layout.number), dtype=share.dtype, device=share.device).index_add(0, place, share)
    label = None if rows.label is None else rows.label.to(rows.s)
    order = label if rows.score is None else rows.score
    if order is None:
        best = layout.index[:, 0]
    else:
        ranked = order.to(rows.s)[layout.index].masked_fill(~layout.valid, -math.inf)
        best = layout.index.gather(1, ranked.argmax(dim=1, keepdim=True))[:, 0]
    nll = -reduced.total[best]
    if spec.anchor_reduce == "mean":
        nll = nll / reduced.length[best]
    if spec.anchor_by_size:
        nll = nll * (layout.valid.sum(dim=1) - 1).to(nll).square()
    return spec.anchor * (held * nll).sum()


# -- what must be there ---------------------------------------------------------------------------


def _check_shapes(rows: ContrastRows, spec: ContrastSpec) -> int:
    if rows.logp.dim() != 2 or not rows.logp.is_floating_point():
        raise BadInputError(
            f"logp must be floating-point log-probs (n, T), got {rows.logp.dtype} {tuple(rows.logp.shape)}.",
            advice="A policy over whole answers has T = 1: logp[:, None].",
        )
    n = len(rows.logp)
    if n == 0:
        raise BadInputError(
            "There is nothing to learn from: n = 0.", advice="Skip empty batches before the loss."
        )
    for name in ("mask", "ref_logp", "token_weight"):
        value = getattr(rows, name)
        if value is not None and value.shape != rows.logp.shape:
            raise BadInputError(
                f"{name} must have the shape of logp {tuple(rows.logp.shape)}, got {tuple(value.shape)}."
            )
    for name in ("group", "score", "label", "logq", "weight", "kl_rows", "truncated"):
        value = getattr(rows, name)
        if value is not None and tuple(value.shape) != (n,):
            raise BadInputError(f"{name} must have shape ({n},), got {tuple(value.shape)}.")
    for name in ("mask", "kl_rows", "truncated"):
        value = getattr(rows, name)
        if value is not None and value.dtype != torch.bool:
            raise BadInputError(f"{name} must be booleans, got {value.dtype}.")
    if rows.label is not None and bool((rows.label.abs() > 1).any()):
        raise BadInputError("label must be +1, -1 or 0 (none).")
    if spec.needs_scores and rows.score is None:
        raise BadInputError(
            f"{spec.name} needs the rows' scores.", advice="Give score, or a loss of labelled pairs."
        )
    return n


def _scores(rows: ContrastRows, kept: Tensor, layout: Layout, spec: ContrastSpec) -> Tensor | None:
    wanted = spec.needs_scores or spec.comparison in ("all_pairs", "k_vs_worse")
    wanted = wanted or (spec.comparison == "pair" and rows.label is None)
    if rows.score is None or not wanted:
        return None
    score = _known("score", rows.score, kept, widen(rows.logp))
    if score is None or not spec.standardise_scores:
        return score
    known = score[layout.index].masked_fill(~layout.valid, 0.0)
    size = layout.valid.sum(dim=1, keepdim=True)
    centred = (known - known.sum(dim=1, keepdim=True) / size).masked_fill(~layout.valid, 0.0)
    spread = (centred.square().sum(dim=1, keepdim=True) / size).sqrt()
    scaled = torch.where(spread > 0.0, centred / spread.clamp(min=1e-30), torch.zeros_like(centred))
    return score.index_put((layout.index[layout.valid],), scaled[layout.valid])


def _known(name: str, value: Tensor | None, kept: Tensor, like: Tensor) -> Tensor | None:
    """The column with zeros for rows that take no part.

    Raises:
        NumericsError: ``<name>_nan``: a row that takes part has none.
    """
    if value is None:
        return None
    unknown = kept & ~torch.isfinite(value)
    if bool(unknown.any()):
        raise NumericsError(
            f"{name}_nan: rows {unknown.nonzero()[:, 0].tolist()[:8]} have no {name}.",
            advice="Leave answers that nobody judged out of their group before the loss.",
        )
    return torch.where(kept, value.detach(), torch.zeros_like(value)).to(like)


def _per_group(
    name: str, value: Tensor | None, layout: Layout, rows: ContrastRows, high: float
) -> Tensor | None:
    return None if value is None else per_item(name, value, layout.total, rows.logp, high)
