"""Our losses against TRL's on the same log-probs: values and gradients, and every difference by name.

TRL computes its losses inside its trainers. Their methods run here unbound, on a namespace that has the
settings they read and a "model" that returns given log-probs, so that nothing but the loss is compared.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from corrigible.align.contrast import ContrastRows, ContrastSpec, contrast_loss, preset
from corrigible.align.kto import kto_loss, reference_point

Metrics = defaultdict[str, defaultdict[str, list[float]]]


class Answers:
    """``n`` pairs of ragged answers: chosen ones first, then the rejected ones, as TRL has them."""

    def __init__(self, seed: int, n: int = 6, tokens: int = 7, dtype: torch.dtype = torch.float64) -> None:
        g = torch.Generator().manual_seed(seed)
        self.n = n
        self.lengths = torch.randint(1, tokens + 1, (2 * n,), generator=g)
        self.mask = torch.arange(tokens) < self.lengths[:, None]
        logp, ref = (
            -2 * torch.rand(2 * n, tokens, generator=g, dtype=torch.float64).to(dtype) for _ in range(2)
        )
        self.ref = ref.masked_fill(~self.mask, 0.0)
        self.logp = logp.masked_fill(~self.mask, 0.0).requires_grad_()

    def rows(self, **changes: Any) -> ContrastRows:
        pair = torch.arange(self.n)
        label = torch.tensor([1] * self.n + [-1] * self.n, dtype=torch.int8)
        # NaN where there is nothing to score, as no loss of TRL would survive it.
        rows = ContrastRows(
            self.logp.masked_fill(~self.mask, math.nan),
            self.mask,
            torch.cat([pair, pair]),
            ref_logp=self.ref,
            label=label,
        )
        return replace(rows, **changes)

    def ours(self, spec: ContrastSpec, **changes: Any) -> tuple[float, torch.Tensor]:
        return self.gradient(contrast_loss(self.rows(**changes), spec).loss)

    def gradient(self, loss: torch.Tensor) -> tuple[float, torch.Tensor]:
        (found,) = torch.autograd.grad(loss, self.logp)
        # What a model gives outside the answers is no log-prob of theirs: a constant.
        return float(loss.detach()), found.masked_fill(~self.mask, 0.0)


def namespace(**settings: Any) -> SimpleNamespace:
    """What TRL's losses read of their trainer."""
    metrics: Metrics = defaultdict(lambda: defaultdict(list))
    known = {
        "model": SimpleNamespace(training=True),
        "accelerator": SimpleNamespace(
            device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x
        ),
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_metrics": metrics,
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**(known | settings))


def outputs(logp: torch.Tensor) -> Callable[..., SimpleNamespace]:
    zeros = torch.zeros_like(logp.detach())
    made = SimpleNamespace(
        log_probs=logp, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=zeros
    )
    return lambda **_: made


def trl_dpo(answers: Answers, loss_type: str, **settings: Any) -> tuple[float, torch.Tensor]:
    """``DPOTrainer._compute_loss`` of TRL 1.16."""
    from trl import DPOTrainer

    defaults: dict[str, Any] = {
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "beta": 0.1,
        "label_smoothing": 0.0,
        "use_weighting": False,
        "loss_types": [loss_type],
        "loss_weights": [1.0],
    }
    credit = settings.pop("credit", torch.ones_like(answers.ref))
    ref = (credit * answers.ref).sum(dim=1)
    mask = torch.nn.functional.pad(answers.mask.long(), (1, 0))
    inputs = {
        "input_ids": mask,
        "attention_mask": mask,
        "completion_mask": mask,
        "ref_chosen_logps": ref[: answers.n],
        "ref_rejected_logps": ref[answers.n :],
    }
    trainer = namespace(**(defaults | settings))
    return answers.gradient(DPOTrainer._compute_loss(trainer, outputs(answers.logp), inputs, False))


def same(
    ours: tuple[float, torch.Tensor], theirs: tuple[float, torch.Tensor], tolerance: float = 1e-10
) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance, abs=tolerance)
    size = float(theirs[1].abs().max())
    assert size > 0 and float((ours[1] - theirs[1]).abs().max()) <= tolerance * size


def differ(ours: tuple[float, torch.Tensor], theirs: tuple[float, torch.Tensor]) -> None:
    assert float((ours[1] - theirs[1]).abs().max()) > 1e-3 * float(theirs[1].abs().max())


SEEDS = pytest.mark.parametrize("seed", [1, 2, 3])


@SEEDS
def test_sigmoid_is_dpo_and_ignores_label_smoothing(seed: int) -> None:
    """The same, but for one thing: TRL's ``sigmoid`` never reads ``label_smoothing``, so its cDPO is DPO."""
    answers = Answers(seed)
    same(answers.ours(preset("dpo")), trl_dpo(answers, "sigmoid"))
    ignored = trl_dpo(answers, "sigmoid", label_smoothing=0.3)
    same(answers.ours(preset("dpo")), ignored)
    differ(answers.ours(preset("cdpo", label_smoothing=0.3)), ignored)


@SEEDS
def test_robust_is_rdpo(seed: int) -> None:
    """No difference."""
    answers = Answers(seed)
    same(answers.ours(preset("rdpo", flip_rate=0.3)), trl_dpo(answers, "robust", label_smoothing=0.3))


@SEEDS
def test_hinge_is_hinge_norm(seed: int) -> None:
    """TRL's ``beta`` is ``gamma`` of the paper, and its hinge always has the reference: it is not SLiC's."""
    answers = Answers(seed)
    same(answers.ours(preset("hinge_norm", gamma=0.4)), trl_dpo(answers, "hinge", beta=0.4))
    differ(answers.ours(preset("slic", gamma=0.4)), trl_dpo(answers, "hinge", beta=0.4))


@SEEDS
def test_ipo_is_length_normalised_there(seed: int) -> None:
    """TRL divides log-ratios by their number of tokens; the paper (and our default) does not."""
    answers = Answers(seed)
    theirs = trl_dpo(answers, "ipo", beta=0.2)
    same(answers.ours(preset("ipo", tau=0.2, length_normalised=True)), theirs)
    differ(answers.ours(preset("ipo", tau=0.2)), theirs)


@SEEDS
def test_sigmoid_norm_is_dpo_of_means(seed: int) -> None:
    """No difference: DPO with ``length_power`` 1."""
    answers = Answers(seed)
    spec = replace(preset("dpo", beta=2.0), length_power=1.0)
    same(answers.ours(spec), trl_dpo(answers, "sigmoid_norm", beta=2.0))


@SEEDS
@pytest.mark.parametrize(
    ("theirs", "link", "dtype"),
    [
        ("forward_kl", "forward_kl", torch.float64),
        ("js_divergence", "jensen_shannon", torch.float64),
        ("alpha_divergence", "alpha", torch.float32),
    ],
)
def test_f_divergences(seed: int, theirs: str, link: str, dtype: torch.dtype) -> None:
    """The same links. TRL's alpha has no float64 (a table of clamps by type), and forward KL has no clamp."""
    answers = Answers(seed, dtype=dtype)
    spec = preset("f_dpo", link=link, alpha=0.3, beta=0.2)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    found = trl_dpo(answers, "sigmoid", beta=0.2, f_divergence_type=theirs, f_alpha_divergence_coef=0.3)
    same(answers.ours(spec), found, tolerance)


@SEEDS
def test_weighting_is_wpo_without_its_alignment(seed: int) -> None:
    """TRL subtracts ``log sum p^2`` of every position first; that needs the distribution, which a loss on
    log-probs has not. With that quantity 0 the two are the same."""
    answers = Answers(seed)
    spec = replace(preset("dpo"), pair_weight="wpo")
    same(answers.ours(spec), trl_dpo(answers, "sigmoid", use_weighting=True))


@SEEDS
def test_length_desensitised_dpo_is_a_credit_of_tokens(seed: int) -> None:
    """``ld_alpha`` weighs the tokens beyond the shorter answer's length; here that is ``token_weight``."""
    answers = Answers(seed)
    shorter = torch.minimum(answers.lengths[: answers.n], answers.lengths[answers.n :]).repeat(2)
    tail = torch.arange(answers.ref.shape[1]) >= shorter[:, None]
    credit = torch.ones_like(answers.ref).masked_fill(tail, 0.3)
    theirs = trl_dpo(answers, "sigmoid", ld_alpha=0.3, credit=credit)
    same(answers.ours(preset("dpo"), token_weight=credit), theirs)


@SEEDS
def test_sft_is_a_mean_over_tokens_there(seed: int) -> None:
    """TRL divides by the tokens of the batch, so long answers count more; ours by its prompts."""
    answers = Answers(seed)
    chosen = answers.rows()
    total = float(answers.lengths[: answers.n].sum())
    ours = answers.gradient(contrast_loss(chosen, preset("sft"), denominator=total).loss)
    same(ours, trl_dpo(answers, "sft"))


@SEEDS
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_and_cpo(seed: int, smoothing: float) -> None:
    """CPO's trainer: SimPO takes mean log-probs and divides its margin by ``beta``, to multiply it again;
    ``sigmoid`` is DPO without a reference, ``hinge`` is SLiC times ``gamma``. With label smoothing SimPO
    differs: there a flipped label has the margin against it, here the other side must lead by it."""
    from trl.experimental.cpo import CPOTrainer

    answers = Answers(seed)
    settings = {"alpha": 0.0, "label_smoothing": smoothing, "simpo_gamma": 0.9}

    def theirs(loss_type: str, beta: float, mean: bool) -> tuple[float, torch.Tensor]:
        trainer = namespace(loss_type=loss_type, beta=beta, **settings)
        s = answers.logp.sum(dim=1) / (answers.lengths if mean else 1)
        return answers.gradient(CPOTrainer.cpo_loss(trainer, s[: answers.n], s[answers.n :])[0].mean())

    simpo = replace(preset("simpo", beta=2.0, gamma=0.9), label_smoothing=smoothing)
    (differ if smoothing else same)(answers.ours(simpo), theirs("simpo", 2.0, True))
    plain = replace(preset("dpo", beta=0.3, label_smoothing=smoothing), reference=False)
    same(answers.ours(plain), theirs("sigmoid", 0.3, False))
    slic = replace(preset("slic", gamma=0.4), scale=1.0)
    same(answers.ours(slic), theirs("hinge", 0.4, False))


@SEEDS
def test_the_odds_ratio_of_orpo(seed: int) -> None:
    """The odds-ratio part is the same, in float32 there and with the other sign. The likelihood beside it is
    another one in TRL: the mean over all tokens of the batch, those of the prompt included."""
    from trl.experimental.orpo import ORPOTrainer

    answers = Answers(seed, dtype=torch.float32)
    means = answers.logp.sum(dim=1) / answers.lengths
    losses = ORPOTrainer.odds_ratio_loss(namespace(beta=0.3), means[: answers.n], means[answers.n :])[0]
    part = replace(preset("orpo", odds_weight=0.3), anchor=0.0)
    same(answers.ours(part), answers.gradient(-losses.mean()), 2e-5)


@SEEDS
def test_kto(seed: int) -> None:
    """The same loss of given log-probs, both in sequence form and through the contrast function. The answers
    that TRL estimates its reference point on are rotated by one within each device's batch; ours skip those
    that fit the prompt, and are of the whole optimiser batch."""
    from trl import KTOTrainer

    answers, mismatched = Answers(seed), Answers(seed + 10)
    desirable = torch.tensor([True] * answers.n + [False] * answers.n)
    other = mismatched.logp.detach().sum(dim=1) + 3.0 * (seed - 2), mismatched.ref.sum(dim=1)
    z0 = reference_point(other[0].clamp(max=0.0), other[1])
    mask = torch.nn.functional.pad(answers.mask.long(), (1, 0))
    batch = {
        "input_ids": mask,
        "attention_mask": mask,
        "completion_mask": mask,
        "label": desirable,
        "ref_logps": answers.ref.sum(dim=1),
        "ref_KL_logps": other[1],
    }
    trainer = namespace(
        beta=0.2,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=0.8,
        undesirable_weight=1.2,
        _compute_kl_logps=lambda model, inputs: other[0].clamp(max=0.0),
    )
    theirs = answers.gradient(KTOTrainer._compute_loss(trainer, outputs(answers.logp), batch, False))
    sides = {"desirable_weight": 0.8, "undesirable_weight": 1.2}
    plain = kto_loss(answers.logp.sum(dim=1), answers.ref.sum(dim=1), desirable, z0=z0, beta=0.2, **sides)
    same(answers.gradient(plain.loss), theirs)
    spec = preset("kto", beta=0.2, **sides)
    single = answers.rows(group=torch.arange(2 * answers.n))
    same(answers.gradient(contrast_loss(single, spec, z0=z0).loss), theirs)
