"""The form of the contrast function: exact identities, invariances, how parts add up, and what it refuses."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from corrigible.align.contrast import PRESETS, ContrastRows, ContrastSpec, contrast_loss, preset
from corrigible.align.kto import kto_loss
from corrigible.align.losses import LossOutput, dpo_loss
from corrigible.errors import BadInputError, NumericsError

D = torch.float64


def pair(gap: float = 0.0, *, reference: bool = True) -> ContrastRows:
    """One pair of one-token answers, whose log-ratios differ by ``gap``."""
    logp = torch.tensor([[-2000.0 + gap / 2], [-2000.0 - gap / 2]], dtype=D, requires_grad=True)
    return ContrastRows(
        logp,
        torch.ones(2, 1, dtype=torch.bool),
        torch.tensor([0, 0]),
        ref_logp=torch.full((2, 1), -2000.0, dtype=D) if reference else None,
        label=torch.tensor([1, -1], dtype=torch.int8),
        score=torch.tensor([1.0, 0.0], dtype=D),
    )


def slopes(rows: ContrastRows, spec: ContrastSpec, **options: Any) -> tuple[float, torch.Tensor]:
    """The loss and its gradient after every row's log-prob."""
    leaf = rows.logp.detach().clone().requires_grad_()
    loss = contrast_loss(replace(rows, logp=leaf), spec, **options).loss
    loss.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return float(loss.detach()), leaf.grad


def random_rows(seed: int, sizes: tuple[int, ...] = (2, 2, 2), tokens: int = 4) -> ContrastRows:
    """Ragged rows of several groups with everything that any loss asks for."""
    g = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    lengths = torch.randint(1, tokens + 1, (n,), generator=g)
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    first = torch.cat([torch.tensor([1] + [-1] * (size - 1)) for size in sizes])

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=g, dtype=D)

    return ContrastRows(
        -rand(n, tokens) - 0.05,
        torch.arange(tokens) < lengths[:, None],
        group,
        ref_logp=-rand(n, tokens) - 0.05,
        score=rand(n),
        label=first.to(torch.int8),
        logq=-2 * rand(n),
        weight=(0.5 + rand(len(sizes)))[group],
        kl_rows=torch.zeros(n, dtype=torch.bool),
    )


PAIRWISE = [name for name in PRESETS if preset(name).comparison == "pair"]
HELD = ("dpo", "cdpo", "rdpo", "ipo", "hinge_norm", "plackett_luce", "brain", "copg", "spin")


# -- slopes and values at the start -------------------------------------------------------------------


def test_dpo_starts_at_ln_2_with_slope_minus_half_beta() -> None:
    value, grad = slopes(pair(), preset("dpo", beta=0.1))
    assert value == math.log(2)
    assert grad.flatten().tolist() == pytest.approx([-0.05, 0.05], rel=1e-14)


@pytest.mark.parametrize("e", [0.1, 0.2, 0.4])
def test_cdpos_slope_is_damped_and_rdpos_is_steepened(e: float) -> None:
    _, damped = slopes(pair(), preset("cdpo", beta=0.1, label_smoothing=e))
    _, steep = slopes(pair(), preset("rdpo", beta=0.1, flip_rate=e))
    assert float(damped[0]) == pytest.approx(-(1 - 2 * e) * 0.05, rel=1e-12)
    assert float(steep[0]) == pytest.approx(-0.1 / (2 * (1 - 2 * e)), rel=1e-12)


def test_ipos_and_the_hinges_slopes() -> None:
    assert float(slopes(pair(), preset("ipo", tau=0.1))[1][0]) == pytest.approx(-10.0, rel=1e-12)
    assert float(slopes(pair(), preset("hinge_norm", gamma=0.05))[1][0]) == pytest.approx(-0.05, rel=1e-14)
    value, grad = slopes(pair(reference=False), preset("slic", gamma=0.05, sft_weight=0.0))
    assert value == pytest.approx(20.0) and float(grad[0]) == pytest.approx(-1.0)


@pytest.mark.parametrize("e", [0.1, 0.3])
def test_cdpo_is_flat_at_its_optimum_and_rdpo_never_is(e: float) -> None:
    optimum = math.log((1 - e) / e)
    rows = pair(optimum / 0.1)
    assert float(slopes(rows, preset("cdpo", label_smoothing=e))[1].abs().max()) < 1e-15
    zeta = [float(-slopes(pair(d / 0.1), preset("rdpo", flip_rate=e))[1][0]) for d in (-5, 0, optimum, 5, 50)]
    assert all(z > 0 for z in zeta) and zeta == sorted(zeta, reverse=True)
    # beta e / (1 - 2 e) is what is left of the slope however far the pair is learnt
    assert zeta[-1] == pytest.approx(0.1 * e / (1 - 2 * e), rel=1e-9)


def test_rdpo_averages_to_the_clean_loss_over_flips() -> None:
    """``(1 - e) l_e(w, l) + e l_e(l, w)`` is DPO's loss, pair by pair (Chowdhury et al. 2024, lemma)."""
    rows, e = random_rows(3), 0.3
    rates = torch.tensor([0.3, 0.1, 0.45], dtype=D)
    for flip_rate in (None, rates):
        rows = replace(rows, flip_rate=flip_rate)
        flipped = replace(rows, label=-rows.label)  # type: ignore[operator]
        share = torch.full((3,), e, dtype=D) if flip_rate is None else rates
        one, weight = preset("rdpo", flip_rate=e), rows.weight
        assert weight is not None
        mean = 0.0
        for g in range(3):
            part = [_one(each, rows.group == g, g) for each in (rows, flipped)]
            right, wrong = (float(contrast_loss(each, one).loss) for each in part)
            clean = float(contrast_loss(replace(part[0], flip_rate=None), preset("dpo")).loss)
            mean = float((1 - share[g]) * right + share[g] * wrong)
            assert mean == pytest.approx(clean, rel=1e-12)


def test_rdpo_falls_for_ever_unless_its_margin_is_bounded() -> None:
    e = 0.4
    value, _ = slopes(pair(20 / 0.1), preset("rdpo", flip_rate=e))
    assert value == pytest.approx(-40.0, rel=1e-6)  # -e d / (1 - 2 e) at d = 20
    capped = preset("rdpo", flip_rate=e, largest_margin=5.0)
    at_5, _ = slopes(pair(5 / 0.1 - 1e-9), capped)
    value, grad = slopes(pair(20 / 0.1), capped)
    assert value == pytest.approx(at_5, rel=1e-8) and float(grad.abs().max()) == 0.0
    assert float(slopes(pair(-20 / 0.1), capped)[1].abs().max()) > 0.1  # what is wrong is still pulled back


# -- one loss as a case of another --------------------------------------------------------------------


def same(a: tuple[float, torch.Tensor], b: tuple[float, torch.Tensor], factor: float = 1.0) -> None:
    assert a[0] == pytest.approx(factor * b[0], rel=1e-10, abs=1e-14)
    assert float((a[1] - factor * b[1]).abs().max()) <= 1e-10 * float(b[1].abs().max()) + 1e-15


def test_of_two_answers_plackett_luce_is_dpo() -> None:
    rows = random_rows(5)
    rows = replace(rows, score=rows.label.to(D))  # type: ignore[union-attr]
    same(slopes(rows, preset("plackett_luce", beta=0.3)), slopes(rows, preset("dpo", beta=0.3)))


def test_of_two_answers_hard_brain_from_the_reference_is_dpo_at_beta_1() -> None:
    rows = replace(random_rows(7), logq=None)
    rows = replace(rows, score=rows.label.to(D))  # type: ignore[union-attr]
    same(slopes(rows, preset("brain", hard=True)), slopes(rows, preset("dpo", beta=1.0)))


def test_of_two_answers_half_a_reward_apart_copg_is_ipo() -> None:
    """The unscaled square is ``tau^2`` times IPO, with ``beta = tau``."""
    rows, tau = random_rows(9), 0.3
    rows = replace(rows, score=rows.label.to(D) / 4)  # type: ignore[union-attr]
    unscaled = replace(preset("copg", beta=tau), scale=1.0)
    same(slopes(rows, unscaled), slopes(rows, preset("ipo", tau=tau)), tau**2)
    same(slopes(rows, preset("copg", beta=tau)), slopes(rows, unscaled), 1 / (4 * tau))


def test_of_two_answers_pro_is_a_logistic_loss_of_the_tempered_gap() -> None:
    """``-log sigma(T (p_1 - p_2))`` with ``T`` the score gap, and lambda times the likelihood of the best."""
    rows = replace(random_rows(11, (2,)), weight=None)
    rows = replace(rows, score=torch.tensor([1.7, 0.2], dtype=D))
    simpo = preset("simpo", beta=1.5, gamma=0.0)
    anchored = replace(simpo, anchor=0.05, anchor_reduce="sum")
    same(slopes(rows, preset("pro", sft_weight=0.05)), slopes(rows, anchored))


def test_f_dpo_at_alpha_1_is_dpo_and_at_0_forward_kl() -> None:
    rows = random_rows(13)
    same(slopes(rows, preset("f_dpo", link="alpha", alpha=1.0)), slopes(rows, preset("dpo")))
    same(
        slopes(rows, preset("f_dpo", link="alpha", alpha=0.0)),
        slopes(rows, preset("f_dpo", link="forward_kl")),
    )
    near = slopes(rows, preset("f_dpo", link="alpha", alpha=1.0 - 1e-7))
    assert near[0] == pytest.approx(slopes(rows, preset("dpo"))[0], rel=1e-6)


def test_f_sft_of_total_variation_has_sfts_gradient_times_beta() -> None:
    rows = replace(random_rows(15), label=None)
    _, tether = slopes(rows, preset("f_sft", beta=0.3, divergence="total_variation"))
    _, plain = slopes(rows, preset("sft"))
    assert float((tether - 0.3 * plain).abs().max()) < 1e-15


def test_on_policy_copgs_gradient_is_the_policy_gradient_of_the_regularised_reward() -> None:
    """Over all pairs of a bandit's arms, weighted by the policy: exactly ``-grad (E[R] - beta KL)``."""
    beta, logits = 0.5, torch.tensor([0.3, -0.2, 0.1], dtype=D, requires_grad=True)
    reward, reference = torch.tensor([2.5, 2.0, 1.0], dtype=D), torch.full((3,), -math.log(3), dtype=D)
    logp = torch.log_softmax(logits, dim=0)
    p = logp.detach().exp()
    i, j = torch.triu_indices(3, 3, 1)
    rows = ContrastRows(
        logp[torch.stack([i, j], dim=1).flatten()][:, None],
        torch.ones(6, 1, dtype=torch.bool),
        torch.arange(3).repeat_interleave(2),
        ref_logp=reference[torch.stack([i, j], dim=1).flatten()][:, None],
        score=reward[torch.stack([i, j], dim=1).flatten()],
        # Either order of two independent draws; a pair of the same arm costs nothing.
        weight=(2 * p[i] * p[j]).repeat_interleave(2),
    )
    loss = contrast_loss(rows, preset("copg", beta=beta), denominator=1.0).loss
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    objective = (logp.exp() * (reward - beta * (logp - reference))).sum()
    (wanted,) = torch.autograd.grad(-objective, logits)
    assert float((found - wanted).abs().max()) < 1e-12


def test_sequence_forms_are_the_same_losses() -> None:
    rows = random_rows(17)
    s = torch.where(rows.mask, rows.logp, 0.0).sum(dim=1)
    assert rows.ref_logp is not None and rows.weight is not None and rows.label is not None
    ref = torch.where(rows.mask, rows.ref_logp, 0.0).sum(dim=1)
    p = torch.tensor([1.0, 0.5, 0.8], dtype=D)
    plain = dpo_loss(s[0::2], s[1::2], ref[0::2], ref[1::2], p_chosen=p, weight=rows.weight[::2])
    made = contrast_loss(replace(rows, p_chosen=p), preset("dpo"))
    assert float(made.loss) == float(plain.loss)  # bit for bit
    for name, value in plain.metrics.items():
        assert made.metrics[name] == pytest.approx(value, rel=1e-12), name
    # Every row its own group, as KTO counts.
    single = replace(rows, group=torch.arange(6))
    kto = kto_loss(s, ref, rows.label > 0, z0=0.3, undesirable_weight=1.3, weight=rows.weight)
    other = contrast_loss(single, preset("kto", undesirable_weight=1.3), z0=0.3)
    assert float(other.loss) == pytest.approx(float(kto.loss), rel=1e-12)
    for name in ("z0", "desirable", "grad_weight", "saturated"):
        assert other.metrics[name] == pytest.approx(kto.metrics[name], rel=1e-12), name


def test_ktos_reference_point_is_that_of_the_mismatched_rows() -> None:
    rows = random_rows(19, (1,) * 6)
    mismatched = torch.tensor([False, False, False, True, True, True])
    rows = replace(rows, kl_rows=mismatched, label=torch.tensor([1, -1, 1, 1, 1, 1], dtype=torch.int8))
    h = torch.where(rows.mask, rows.logp - rows.ref_logp, 0.0).sum(dim=1)  # type: ignore[operator]
    z0 = max(0.0, float(h[mismatched].mean()))
    for shift in (0.0, 3.0):  # once as it is, once well above 0
        moved = replace(rows, ref_logp=rows.ref_logp - shift * mismatched[:, None])  # type: ignore[operator]
        lengths = rows.mask.sum(dim=1)[mismatched].double()
        z0 = max(0.0, float((h[mismatched] + shift * lengths).mean()))
        out = contrast_loss(moved, preset("kto"))
        assert out.metrics["z0"] == pytest.approx(z0, rel=1e-12)
        given = contrast_loss(_one(moved, ~mismatched), preset("kto"), z0=z0)
        assert float(out.loss) == pytest.approx(float(given.loss), rel=1e-12)
    assert z0 > 1.0


# -- invariances --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HELD)
def test_a_constant_of_the_prompt_changes_no_gradient(name: str) -> None:
    rows = random_rows(21, (2, 2, 2) if name in PAIRWISE else (3, 2, 4), tokens=1)
    constant = torch.tensor([-0.7, -3.0, -0.01], dtype=D)[rows.group][:, None]
    assert rows.ref_logp is not None and rows.logq is not None and rows.score is not None
    shifted = replace(rows, ref_logp=rows.ref_logp + constant)
    _, plain = slopes(rows, preset(name))
    assert float(plain.abs().max()) > 0
    assert float((slopes(shifted, preset(name))[1] - plain).abs().max()) < 1e-12 * float(plain.abs().max())
    shifted = replace(rows, score=rows.score + constant[:, 0])
    assert float((slopes(shifted, preset(name))[1] - plain).abs().max()) < 1e-12 * float(plain.abs().max())


@pytest.mark.parametrize("name", HELD)
def test_gradients_cancel_within_a_prompt(name: str) -> None:
    rows = random_rows(23, (2, 2, 2) if name in PAIRWISE else (3, 2, 4), tokens=1)
    _, grad = slopes(rows, preset(name))
    sums = torch.zeros(3, dtype=D).index_add(0, rows.group, grad[:, 0])
    assert float(sums.abs().max()) < 1e-14 * max(1.0, float(grad.abs().max()))


def test_gradients_do_not_cancel_where_an_answer_is_imitated_or_stands_alone() -> None:
    rows = random_rows(23, (2, 2, 2), tokens=1)
    for spec in (preset("kto", undesirable_weight=3.0), preset("orpo"), preset("pro"), preset("sft")):
        _, grad = slopes(rows, spec, z0=0.0)
        assert abs(float(grad.sum())) > 1e-3, spec.name


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_order_of_rows_and_the_names_of_groups_mean_nothing(name: str) -> None:
    pairs = preset(name).comparison == "pair"
    rows = random_rows(25, (2, 2, 2) if pairs else (3, 2, 4))
    p = torch.tensor([1.0, 0.25, 0.5], dtype=D) if pairs else None
    order = torch.randperm(len(rows.logp), generator=torch.Generator().manual_seed(1))
    mixed = _one(rows, order)
    names = torch.tensor([70, -3, 12])  # ascending: groups 1, 2, 0
    renamed = replace(mixed, group=names[mixed.group], p_chosen=None if p is None else p[[1, 2, 0]])
    plain, grad = slopes(replace(rows, p_chosen=p), preset(name), z0=0.1)
    value, moved = slopes(renamed, preset(name), z0=0.1)
    assert value == pytest.approx(plain, rel=1e-12)
    assert float((moved - grad[order]).abs().max()) < 1e-13 * max(1.0, float(grad.abs().max()))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_what_stands_in_masked_slots_reaches_neither_value_nor_gradient(name: str) -> None:
    rows = random_rows(27, (2, 2, 2) if preset(name).comparison == "pair" else (3, 2, 4))
    assert rows.ref_logp is not None and not bool(rows.mask.all())
    credit = torch.full_like(rows.logp, 0.5)
    rows = replace(rows, token_weight=credit)
    plain, grad = slopes(rows, preset(name), z0=0.1)
    for junk in (math.nan, math.inf, 7.0):
        spoilt = replace(
            rows,
            logp=rows.logp.masked_fill(~rows.mask, junk),
            ref_logp=rows.ref_logp.masked_fill(~rows.mask, junk),
            token_weight=credit.masked_fill(~rows.mask, junk),
        )
        value, moved = slopes(spoilt, preset(name), z0=0.1)
        assert value == plain and torch.equal(moved, grad)


# -- how parts add up ---------------------------------------------------------------------------------


def _one(rows: ContrastRows, which: torch.Tensor, group: int | None = None) -> ContrastRows:
    """Some of the rows; per-group columns are those of ``group``, or as they were."""
    by_group = ("p_chosen", "flip_rate")
    columns = {
        name: value if value is None or name in by_group else value[which]
        for name, value in vars(rows).items()
    }
    for name in by_group:
        if group is not None and columns[name] is not None:
            columns[name] = columns[name][group : group + 1]
    return ContrastRows(**columns)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_parts_with_the_whole_weight_add_up_to_the_whole(name: str) -> None:
    pairs = preset(name).comparison == "pair"
    rows = random_rows(29, (2,) * 5 if pairs else (3, 2, 4, 2, 5))
    rows = replace(rows, p_chosen=torch.tensor([1.0, 0.25, 0.5, 0.0, 1.0], dtype=D) if pairs else None)
    assert rows.weight is not None
    total = float(torch.stack([rows.weight[rows.group == g].mean() for g in range(5)]).sum())
    whole = contrast_loss(rows, preset(name), denominator=total, z0=0.2)
    _, grad = slopes(rows, preset(name), denominator=total, z0=0.2)
    for cut in ([[0], [1], [2], [3], [4]], [[0, 1], [2, 3, 4]]):
        loss, metrics, found = 0.0, dict.fromkeys(whole.metrics, 0.0), torch.zeros_like(grad)
        for groups in cut:
            which = torch.isin(rows.group, torch.tensor(groups)).nonzero()[:, 0]
            part = _one(rows, which)
            if rows.p_chosen is not None:
                part = replace(part, p_chosen=rows.p_chosen[groups])
            out = contrast_loss(part, preset(name), denominator=total, z0=0.2)
            loss += float(out.loss)
            for key, value in out.metrics.items():
                metrics[key] += value
            found[which] = slopes(part, preset(name), denominator=total, z0=0.2)[1]
        assert loss == pytest.approx(float(whole.loss), rel=1e-12)
        assert metrics == pytest.approx(whole.metrics, rel=1e-10, abs=1e-13)
        assert float((found - grad).abs().max()) < 1e-14 * max(1.0, float(grad.abs().max()))


def test_without_a_denominator_it_is_the_weight_of_the_prompts_that_compare_anything() -> None:
    rows = random_rows(29, (3, 1, 4))
    assert rows.weight is not None
    total = float(rows.weight[0] + rows.weight[4])
    for name in ("plackett_luce", "copg", "brain"):
        alone, given = (contrast_loss(rows, preset(name), denominator=d) for d in (None, total))
        assert float(alone.loss) == pytest.approx(float(given.loss), rel=1e-12)


def test_every_prompt_counts_once_unless_comparisons_are_to_count() -> None:
    rows = replace(random_rows(31, (2, 5)), weight=None)
    spec = replace(preset("dpo"), comparison="all_pairs")
    by_group = [float(contrast_loss(_one(rows, rows.group == g), spec).loss) for g in (0, 1)]
    assert float(contrast_loss(rows, spec).loss) == pytest.approx(sum(by_group) / 2, rel=1e-12)
    by_pair = contrast_loss(rows, replace(spec, per_comparison=True))
    assert float(by_pair.loss) == pytest.approx((by_group[0] + 10 * by_group[1]) / 11, rel=1e-12)


def test_a_comparison_weighs_what_its_rows_weigh_on_average() -> None:
    rows = replace(random_rows(33), weight=torch.tensor([1.0, 3.0, 0.0, 0.0, 0.5, 0.5], dtype=D))
    each = [replace(_one(rows, rows.group == g), weight=None) for g in (0, 2)]
    parts = [float(contrast_loss(part, preset("dpo")).loss) for part in each]
    wanted = (2.0 * parts[0] + 0.5 * parts[1]) / 2.5
    assert float(contrast_loss(rows, preset("dpo")).loss) == pytest.approx(wanted, rel=1e-12)


# -- ties, cut answers, weights of pairs --------------------------------------------------------------


def test_ties_of_a_pair_pull_together_or_are_dropped() -> None:
    rows = replace(pair(8.0), label=None, score=torch.tensor([1.0, 1.0], dtype=D))
    _, grad = slopes(rows, preset("dpo"))
    _, half = slopes(replace(pair(8.0), p_chosen=torch.tensor([0.5])), preset("dpo"))
    assert torch.equal(grad, half) and float(grad[0]) > 0
    for tied in (rows, replace(pair(), label=torch.zeros(2, dtype=torch.int8), score=None)):
        with pytest.raises(NumericsError, match="nothing_to_compare"):
            contrast_loss(tied, replace(preset("dpo"), ties="drop"))


def test_tied_answers_of_a_ranking_are_on_one_level() -> None:
    """Two equal winners over one loser: each wins against the loser, and neither against the other."""
    rows = replace(random_rows(35, (3,)), weight=None, score=torch.tensor([1.0, 1.0, 0.0], dtype=D))
    pairs = [_one(rows, torch.tensor(which)) for which in ([0, 2], [1, 2])]
    wanted = sum(float(contrast_loss(each, preset("plackett_luce")).loss) for each in pairs)
    assert float(contrast_loss(rows, preset("plackett_luce")).loss) == pytest.approx(wanted, rel=1e-12)


def test_cut_and_empty_answers_take_no_part_and_are_counted() -> None:
    rows = random_rows(37)
    cut = replace(rows, truncated=torch.tensor([False, True, False, False, False, False]))
    empty = replace(rows, mask=rows.mask & ~cut.truncated[:, None])  # type: ignore[index]
    rest = _one(rows, rows.group > 0)
    for less in (cut, empty):
        out = contrast_loss(less, preset("dpo"))
        assert float(out.loss) == pytest.approx(float(contrast_loss(rest, preset("dpo")).loss), rel=1e-12)
        assert out.metrics["rows/left_out"] == 1.0
    kept = contrast_loss(cut, replace(preset("dpo"), drop_truncated=False))
    assert float(kept.loss) == float(contrast_loss(rows, preset("dpo")).loss)


def test_weights_of_pairs_are_constants() -> None:
    rows = replace(random_rows(39), weight=None)
    means = (torch.where(rows.mask, rows.logp, 0.0).sum(dim=1) / rows.mask.sum(dim=1)).exp()
    each = [slopes(_one(rows, rows.group == g), preset("dpo")) for g in range(3)]
    value, grad = slopes(rows, replace(preset("dpo"), pair_weight="wpo"))
    confidence = (means[0::2] * means[1::2]).tolist()
    values, grads = zip(*each, strict=True)
    assert value == pytest.approx(sum(map(operator.mul, confidence, values)) / 3, rel=1e-12)
    wanted = torch.cat([w * g / 3 for w, g in zip(confidence, grads, strict=True)])
    assert float((grad - wanted).abs().max()) < 1e-15
    assert rows.score is not None
    gaps = (rows.score[0::2] - rows.score[1::2]).abs().tolist()
    value, _ = slopes(rows, replace(preset("dpo"), pair_weight="score_gap"))
    assert value == pytest.approx(sum(map(operator.mul, gaps, values)) / 3, rel=1e-12)


def test_standardised_scores_have_no_unit() -> None:
    rows = random_rows(41, (3, 4))
    assert rows.score is not None
    spec = preset("pro", standardise_scores=True)
    plain = slopes(rows, spec)
    same(slopes(replace(rows, score=17.0 * rows.score - 3.0), spec), plain)
    value, _ = slopes(replace(rows, score=17.0 * rows.score), preset("pro"))
    assert value != pytest.approx(slopes(rows, preset("pro"))[0], rel=1e-3)


def test_brains_gradient_is_exactly_zero_at_the_posterior() -> None:
    reward = torch.tensor([0.3, -1.0, 0.8], dtype=D)
    prior = torch.log_softmax(torch.tensor([0.1, 0.5, -0.2], dtype=D), dim=0)
    posterior = torch.log_softmax(prior + reward / 0.7, dim=0)
    rows = ContrastRows(
        posterior[:, None],
        torch.ones(3, 1, dtype=torch.bool),
        torch.zeros(3, dtype=torch.int64),
        ref_logp=prior[:, None],
        score=reward,
        logq=torch.tensor([-1.0, -2.0, -0.5], dtype=D),
    )
    value, grad = slopes(rows, preset("brain", beta=0.7))
    assert abs(value) < 1e-15 and float(grad.abs().max()) < 1e-15
    even = contrast_loss(replace(rows, logq=None), preset("brain", beta=1e9))
    assert even.metrics["ess"] == pytest.approx(3.0, rel=1e-6)


@pytest.mark.parametrize(
    ("divergence", "turn"), [("pearson", 2.0), ("hellinger", None), ("kl", None), ("jensen_shannon", None)]
)
def test_f_sft_lets_go_of_what_is_learnt_and_stays_finite_beyond_the_poles(
    divergence: str, turn: float | None
) -> None:
    spec = preset("f_sft", beta=1.0, divergence=divergence)

    def pull(v: float) -> float:
        at = torch.full((2, 1), -2000.0, dtype=D)
        rows = replace(pair(), label=None, logp=at, ref_logp=at - v)
        value, grad = slopes(rows, spec)
        assert math.isfinite(value)
        return -float(grad.sum())

    found = [pull(v) for v in (-1500.0, -0.9, -0.5, 0.0, 1.0, 1.9)]
    assert all(math.isfinite(x) and x >= 0 for x in found)
    # The steeper the less it is learnt; the poles at -1 and -log 2 are never met.
    assert found[1:] == sorted(found[1:], reverse=True)
    if turn is not None:
        assert pull(turn) == pytest.approx(0.0, abs=1e-12) and pull(turn + 1) < 0


def test_extreme_log_ratios_stay_finite() -> None:
    for name in PRESETS:
        rows = random_rows(43, (2, 2))
        far = replace(rows, logp=rows.logp * torch.tensor([1.0, 4e5, 4e5, 1.0])[:, None], logq=None)
        for dtype in (torch.float32, torch.float64):
            ref = far.ref_logp.to(dtype)  # type: ignore[union-attr]
            value, grad = slopes(replace(far, logp=far.logp.to(dtype), ref_logp=ref), preset(name), z0=0.0)
            assert math.isfinite(value) and bool(torch.isfinite(grad).all()), name


def test_low_precision_is_widened() -> None:
    rows = random_rows(45)
    half = replace(rows, logp=rows.logp.bfloat16(), ref_logp=rows.ref_logp.bfloat16())  # type: ignore[union-attr]
    assert contrast_loss(half, preset("dpo")).loss.dtype == torch.float32


# -- metrics ------------------------------------------------------------------------------------------


def test_metrics_are_means_over_comparisons() -> None:
    p = torch.tensor([1.0, 0.5, 0.0, 1.0, 1.0, 1.0], dtype=D)
    rows = replace(random_rows(47, (2,) * 6), weight=None, p_chosen=p)
    out = contrast_loss(rows, preset("dpo", beta=0.1)).metrics
    assert rows.ref_logp is not None
    s, ref = (torch.where(rows.mask, x, 0.0).sum(dim=1) for x in (rows.logp, rows.ref_logp))
    h, length = s - ref, rows.mask.sum(dim=1).double()
    margin, gap = 0.1 * (h[0::2] - h[1::2]), length[0::2] - length[1::2]
    assert out["rewards/chosen"] == pytest.approx(float(0.1 * h[0::2].mean()))
    assert out["rewards/margin"] == pytest.approx(float(margin.mean()))
    assert out["logps/rejected"] == pytest.approx(float(s[1::2].mean()))
    assert out["length/gap"] == pytest.approx(float(gap.mean()))
    assert out["reference_gap"] == pytest.approx(float(h.mean()))
    right = [float(margin[0] > 0), 0.5, float(margin[2] < 0), *(float(x > 0) for x in margin[3:])]
    assert out["rewards/accuracy"] == pytest.approx(sum(right) / 6)
    correlation = float(torch.corrcoef(torch.stack([margin, gap]))[0, 1])
    assert out["margin_length_correlation"] == pytest.approx(correlation)
    far = contrast_loss(pair(101 / 0.1), preset("dpo", beta=0.1)).metrics
    assert far["saturated"] == 1.0 and far["grad_weight"] < 1e-20


# -- what is refused ----------------------------------------------------------------------------------


def broken(**changes: Any) -> Callable[[], LossOutput]:
    name = changes.pop("name", "dpo")
    options = {key: changes.pop(key) for key in ("denominator", "z0") if key in changes}
    spec = replace(preset(name), **changes.pop("spec", {}))
    return lambda: contrast_loss(replace(pair(), **changes), spec, **options)


NAN = torch.tensor([[math.nan], [-1.0]], dtype=D)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (broken(logp=torch.zeros(2)), BadInputError, r"\(n, T\)"),
        (broken(logp=torch.zeros(0, 1)), BadInputError, "n = 0"),
        (broken(logp=torch.zeros(2, 1, dtype=torch.int64)), BadInputError, "floating"),
        (broken(mask=torch.ones(2, 2, dtype=torch.bool)), BadInputError, "shape of logp"),
        (broken(mask=torch.ones(2, 1)), BadInputError, "mask must be booleans"),
        (broken(group=torch.zeros(3, dtype=torch.int64)), BadInputError, r"group must have shape \(2,\)"),
        (broken(ref_logp=None), BadInputError, "dpo needs reference log-probs"),
        (broken(logp=NAN), NumericsError, r"logps_not_finite: logp .* rows \[0\]"),
        (broken(ref_logp=NAN), NumericsError, r"logps_not_finite: ref_logp .* rows \[0\]"),
        (broken(logp=torch.ones(2, 1)), NumericsError, "logps_positive: logp"),
        (broken(token_weight=NAN), NumericsError, "token_weight_not_finite"),
        (broken(weight=torch.tensor([-1.0, 1.0])), BadInputError, "weight must lie in"),
        (broken(weight=torch.zeros(2)), NumericsError, "nothing_to_average"),
        (
            broken(label=torch.ones(2, dtype=torch.int8)),
            BadInputError,
            r"labels_equal: both rows of pairs \[0\]",
        ),
        (broken(label=torch.tensor([2, -1], dtype=torch.int8)), BadInputError, "label must be"),
        (broken(label=None, score=None), BadInputError, "nothing_to_order_by"),
        (broken(p_chosen=torch.tensor([1.5])), BadInputError, "p_chosen must lie in"),
        (broken(p_chosen=torch.tensor([1.0, 1.0])), BadInputError, r"p_chosen must have shape \(1,\)"),
        (broken(flip_rate=torch.tensor([0.6])), BadInputError, "flip_rate must lie in"),
        (broken(group=torch.tensor([0, 1])), NumericsError, "nothing_to_compare"),
        (broken(name="copg", score=None), BadInputError, "copg needs the rows' scores"),
        (broken(name="copg", score=torch.tensor([math.nan, 1.0])), NumericsError, r"score_nan: rows \[0\]"),
        (broken(name="brain", logq=torch.tensor([0.0, math.nan])), NumericsError, r"logq_nan: rows \[1\]"),
        (broken(name="plackett_luce", score=None, label=None), BadInputError, "nothing_to_order_by"),
        (broken(name="kto"), BadInputError, "needs a reference point"),
        (broken(name="kto", z0=-1.0), NumericsError, "z0_not_usable"),
        (broken(denominator=0.0), NumericsError, "nothing_to_average"),
    ],
)
def test_bad_input_is_named(call: Callable[[], LossOutput], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        call()
    assert "assert" not in str(caught.value)


def test_a_pair_of_three_names_the_groups_and_the_way_out() -> None:
    rows = random_rows(49, (2, 3))
    with pytest.raises(BadInputError, match=r"pair_of_many: groups \[1\]") as caught:
        contrast_loss(rows, preset("dpo"))
    assert "all_pairs" in caught.value.advice


@pytest.mark.parametrize("name", ["plackett_luce", "rrhf", "pro", "brain", "copg", "dpo"])
def test_what_cannot_be_compared_teaches_nothing_and_the_rest_goes_on(name: str) -> None:
    """A group of one and one whose answers are all equal, beside a good one; then alone, in a micro-batch."""
    rows = random_rows(51, (2, 1, 2))
    assert rows.score is not None
    tied = replace(rows, score=torch.tensor([1.0, 0.0, 0.5, 0.3, 0.3], dtype=D), label=None)
    spec = replace(preset(name), ties="drop")
    alone = _one(tied, tied.group < 2)
    _, grad = slopes(tied, spec, denominator=2.0)
    _, less = slopes(alone, spec, denominator=2.0)
    assert torch.equal(grad[:2], less[:2]) and float(grad[:2].abs().max()) > 0
    assert float(grad[2].abs().max()) == 0.0
    if name not in ("brain", "copg"):  # to which equal rewards say: stay as likely as the reference has them
        assert float(grad[3:].abs().max()) == 0.0
    value, grad = slopes(_one(tied, tied.group == 1), spec, denominator=2.0)
    assert value == 0.0 and float(grad.abs().max()) == 0.0


def test_nan_scores_of_rows_that_take_no_part_do_no_harm() -> None:
    rows = random_rows(53, (3, 3))
    assert rows.score is not None
    gone = torch.tensor([False, True, False, False, False, False])
    rows = replace(rows, score=rows.score.masked_fill(gone, math.nan), truncated=gone)
    assert math.isfinite(float(contrast_loss(rows, preset("copg")).loss))


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("dop", {}, "no contrast loss 'dop'"),
        ("dpo", {"betta": 1.0}, "no setting betta"),
        ("dpo", {"beta": 0.0}, "beta must be a positive number"),
        ("ipo", {"tau": -1.0}, "tau must be a positive number"),
        ("ipo", {"tau": math.nan}, "tau must be a positive number"),
        ("cdpo", {"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\)"),
        ("rdpo", {"flip_rate": 0.5}, r"flip_rate must be in \[0, 0.5\)"),
        ("orpo", {"odds_weight": math.inf}, "odds_weight must be a positive number"),
        ("kto", {"desirable_weight": 0.0, "undesirable_weight": 0.0}, "both 0"),
        ("simpo", {"sft_weight": -1.0}, "anchor must be >= 0"),
        ("simpo", {"gamma": math.nan}, "margin must be a finite number"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInputError, match=says):
        preset(name, **settings)


def test_a_loss_that_does_not_fit_its_comparison_is_refused() -> None:
    with pytest.raises(BadInputError, match="'hinge' is no loss of 'group'"):
        ContrastSpec(psi="hinge", comparison="group")


def test_ragged_rows_that_do_not_fit_are_refused() -> None:
    logp = [torch.zeros(2), torch.zeros(3)]
    with pytest.raises(BadInputError, match="n = 0"):
        ContrastRows.from_ragged([], [])
    with pytest.raises(BadInputError, match="ref_logp must have one value"):
        ContrastRows.from_ragged(logp, [0, 0], ref_logp=logp[::-1])
    made = ContrastRows.from_ragged(logp, [0, 0], score=[1.0, 2.0], label=[1, -1], truncated=[False, True])
    assert made.mask.tolist() == [[True, True, False], [True, True, True]]
    assert made.label is not None and made.label.dtype == torch.int8
    assert made.truncated is not None and made.truncated.dtype == torch.bool
