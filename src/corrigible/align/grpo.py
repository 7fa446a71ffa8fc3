"""GRPO and its kin: learning from groups of sampled answers with rewards, without a critic.

Per token, PPO's clipped surrogate with the answer's advantage within its group; the variants differ
in what the sum over tokens is divided by (:data:`Aggregation`). Every denominator is that of the
whole optimiser batch: a mean over whatever a micro-batch happens to hold is another loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from corrigible.align.groups import GroupExample
from corrigible.align.losses import LossOutput, widen
from corrigible.align.registry import AlgorithmConfig, ScoredExamples, algorithm
from corrigible.errors import BadInputError, NumericsError

Aggregation = Literal["grpo", "dr_grpo", "dapo", "bnpo"]
"""What the token losses of ``N`` answers with ``T`` tokens in all are divided by.

* ``"grpo"``: the mean over tokens within each answer, then over answers: short answers' tokens weigh
  more (Shao et al. 2024, eq. 3);
* ``"dapo"``: ``T``, every token weighs the same (Yu et al. 2025, eq. 8);
* ``"bnpo"``: the tokens of the local batch. Locally means the whole optimiser batch here, so this is
  ``"dapo"``; the name is kept because TRL has it, where its value depends on the micro-batch;
* ``"dr_grpo"``: ``N`` times the most tokens an answer can have, a constant: neither length nor
  difficulty changes a token's weight (Liu et al. 2025).
"""

LIMIT = 20.0
"""Log-ratios are clamped to this many nats either way before they are exponentiated."""


@dataclass(frozen=True)
class BatchTotals:
    """Over the whole optimiser batch: how many answers and how many of their tokens are learnt from."""

    answers: float
    tokens: float


def grpo_loss(
    policy_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    answer: Tensor,
    *,
    reference_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
    aggregation: Aggregation = "dapo",
    longest: int | None = None,
    totals: BatchTotals | None = None,
) -> LossOutput:
    """The clipped policy-gradient surrogate on packed tokens, with an optional KL penalty.

    Per token ``-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + beta k3`` with
    ``rho = exp(log pi - log pi_behaviour)`` and ``k3 = exp(d) - d - 1``, ``d = log pi_ref - log pi``
    (Schulman 2020, "Approximating KL divergence"); then :data:`Aggregation`.

    Source: Shao et al. 2024, "DeepSeekMath" (arXiv:2402.03300), eq. 3 and 4; clip-higher and token
    mean: Yu et al. 2025, "DAPO" (arXiv:2503.14476), eq. 8; the constant: Liu et al. 2025,
    "Understanding R1-Zero-like training" (arXiv:2503.20783).

    Args:
        policy_logprobs: of all answers' tokens, one answer after the other, ``(tokens,)``, nats.
        behaviour_logprobs: of the same tokens under the policy that sampled them, ``(tokens,)``; a
            constant.
        advantages: ``(answers,)``; constants.
        answer: which answer each token belongs to, ``(tokens,)`` integers in ``[0, answers)``.
        reference_logprobs: under the frozen reference, ``(tokens,)``; needed when ``beta > 0``.
        mask: ``(tokens,)`` bool, False for tokens to leave out; whatever stands there is never read.
        clip_low, clip_high: how far the ratio may go, below and above 1, and still earn something.
        beta: coefficient of the KL penalty, >= 0.
        aggregation: what the sum is divided by.
        longest: the most tokens an answer can have, for ``"dr_grpo"``.
        totals: of the whole batch when this is one of its micro-batches; of these tokens when absent.

    Returns:
        The loss, and the metrics, means over tokens: ``loss``, ``ratio`` (rho), ``log_ratio`` (policy
        minus behaviour, nats), ``clipped/low`` and ``clipped/high`` (shares of tokens that earn
        nothing any more), ``grad_weight`` (mean ``|rho A|`` of the others) and, with a reference,
        ``kl`` (k3).

    Raises:
        BadInputError: shapes differ, a setting out of range, or an answer longer than ``longest``.
        NumericsError: ``logprobs_not_finite``, ``logprobs_positive``, ``advantages_not_finite``, or
            ``nothing_to_average`` (every token is masked).
    """
    live = _check(
        policy_logprobs, behaviour_logprobs, advantages, answer, reference_logprobs, mask, beta, longest
    )
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
        if not 0.0 < value < float("inf"):
            raise BadInputError(f"{name} must be a positive number, got {value}.", advice="0.2 is usual.")
    lengths = torch.zeros(len(advantages), device=answer.device).index_add_(0, answer, live.float())
    if totals is None:
        totals = BatchTotals(float((lengths > 0).sum()), float(lengths.sum()))
    if not (totals.tokens > 0.0 and totals.answers > 0.0):
        raise NumericsError(
            "nothing_to_average: no token of the batch is learnt from.",
            advice="Every answer is empty or masked; leave such batches out.",
        )

    # Masked slots may hold NaN, which must not reach the gradient either: replaced before any use.
    policy = torch.where(live, widen(policy_logprobs), 0.0)
    behaviour = torch.where(live, behaviour_logprobs.detach().to(policy), 0.0)
    advantage = advantages.detach().to(policy)[answer]
    log_ratio = policy - behaviour
    ratio = log_ratio.clamp(-LIMIT, LIMIT).exp()
    high = (advantage > 0.0) & (ratio > 1.0 + clip_high)
    low = (advantage < 0.0) & (ratio < 1.0 - clip_low)
    bound = torch.full_like(policy, 1.0 - clip_low).masked_fill(high, 1.0 + clip_high)
    losses = -torch.where(high | low, bound, ratio) * advantage
    kl = None
    if reference_logprobs is not None:
        gap = torch.where(live, reference_logprobs.detach().to(policy), 0.0) - policy
        kl = gap.clamp(-LIMIT, LIMIT).exp() - gap.clamp(-LIMIT, LIMIT) - 1.0
        if beta > 0.0:
            losses = losses + beta * kl
    shares = live.to(policy) * _share(aggregation, lengths.to(policy), totals, longest)[answer]
    loss = (shares * losses).sum()

    with torch.no_grad():
        means = {
            "ratio": ratio,
            "log_ratio": log_ratio,
            "clipped/low": low.to(policy),
            "clipped/high": high.to(policy),
            "grad_weight": torch.where(high | low, 0.0, ratio * advantage.abs()),
        } | ({} if kl is None else {"kl": kl})
        metrics = {name: float((live * value).sum()) / totals.tokens for name, value in means.items()}
    return LossOutput(loss, {"loss": float(loss.detach()), **metrics})


def _share(aggregation: Aggregation, lengths: Tensor, totals: BatchTotals, longest: int | None) -> Tensor:
    """What one token of each answer weighs, ``(answers,)``."""
    if aggregation == "grpo":
        return 1.0 / (lengths.clamp(min=1.0) * totals.answers)
    if aggregation == "dr_grpo":
        if longest is None:
            raise BadInputError(
                "The dr_grpo aggregation divides by a constant: the most tokens an answer can have.",
                advice="Set longest to the max_tokens that the answers were sampled with.",
            )
        return torch.full_like(lengths, 1.0 / (totals.answers * longest))
    if aggregation in ("dapo", "bnpo"):
        return torch.full_like(lengths, 1.0 / totals.tokens)
    raise BadInputError(
        f"There is no aggregation {aggregation!r}.", advice="One of grpo, dr_grpo, dapo, bnpo."
    )


def _check(
    policy: Tensor,
    behaviour: Tensor,
    advantages: Tensor,
    answer: Tensor,
    reference: Tensor | None,
    mask: Tensor | None,
    beta: float,
    longest: int | None,
) -> Tensor:
    """Raise on anything that is not what :func:`grpo_loss` says; return which tokens are learnt from."""
    columns = {"policy_logprobs": policy, "behaviour_logprobs": behaviour}
    if reference is not None:
        columns["reference_logprobs"] = reference
    live = torch.ones_like(answer, dtype=torch.bool) if mask is None else mask
    shapes = {name: tuple(c.shape) for name, c in (columns | {"answer": answer, "mask": live}).items()}
    if len(set(shapes.values())) != 1 or answer.ndim != 1 or advantages.ndim != 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise BadInputError(f"All token columns must have one shape (tokens,), got {listed}.")
    if live.dtype != torch.bool or answer.is_floating_point():
        raise BadInputError(f"mask must be booleans and answer integers, got {live.dtype}, {answer.dtype}.")
    if not 0.0 <= beta < float("inf") or (beta > 0.0 and reference is None):
        raise BadInputError(f"beta is {beta}.", advice="0, or a positive number with reference log-probs.")
    if bool(((answer < 0) | (answer >= len(advantages))).any()):
        raise BadInputError(f"answer names answers that are not among the {len(advantages)} advantages.")
    if not bool(torch.isfinite(advantages).all()):
        raise NumericsError("advantages_not_finite: an advantage is NaN or infinite.")
    if longest is not None and len(answer) and int(answer[live].bincount(minlength=1).max()) > longest:
        raise BadInputError(f"An answer is longer than longest={longest} tokens.", advice="Raise longest.")
    for name, column in columns.items():
        known = column.detach()[live]
        if not bool(torch.isfinite(known).all()):
            places = (live & ~torch.isfinite(column.detach())).nonzero().flatten().tolist()[:8]
            raise NumericsError(f"logprobs_not_finite: {name} is NaN or infinite at tokens {places}.")
        if bool((known > 1e-3).any()):
            raise NumericsError(
                f"logprobs_positive: {name} is above 0.", advice="Log-probabilities are never positive."
            )
    return live


class GRPOConfig(AlgorithmConfig):
    """Settings of GRPO."""

    aggregation: Aggregation = Field(
        "dapo",
        description="What the token losses are divided by: tokens of the batch (dapo, bnpo), tokens of each "
        "answer and then answers (grpo), or a constant (dr_grpo).",
    )
    clip_low: float = Field(0.2, gt=0, description="How far the ratio may fall below 1.")
    clip_high: float = Field(
        0.2, gt=0, description="How far the ratio may rise above 1; DAPO's clip-higher is 0.28."
    )
    beta: float = Field(
        0.0, ge=0, description="Coefficient of the KL penalty to the reference; 0 needs none."
    )
    longest: int | None = Field(
        None, ge=1, description="Most tokens an answer can have (max_tokens of sampling); for dr_grpo."
    )
    temperature: float = Field(
        1.0, gt=0, description="The one the answers were sampled at; log-probs are computed at it."
    )

    @property
    def uses_reference(self) -> bool:
        """Only the KL penalty does."""
        return self.beta > 0.0

    @property
    def scored_at(self) -> float:
        """The answers' temperature, or the ratio would compare two different distributions."""
        return self.temperature


def measure(batch: ScoredExamples[GroupExample], config: GRPOConfig) -> BatchTotals:
    """Answers and tokens of a whole batch.

    Raises:
        BadInputError: ``temperature_mismatch``.
    """
    for example in batch.examples:
        if example.temperature != config.temperature:
            raise BadInputError(
                f"temperature_mismatch: answers were sampled at temperature {example.temperature}, the "
                f"policy is scored at {config.temperature}.",
                advice=f"Set temperature={example.temperature}.",
            )
    lengths = [len(row.scored) for example in batch.examples for row in example.rows]
    return BatchTotals(float(len(lengths)), float(sum(lengths)))


@algorithm(
    "grpo",
    source="groups",
    signal="groups",
    family="online",
    weight="group advantage",
    config=GRPOConfig,
    learns_from={"outcome"},
    paper="Shao et al. 2024, DeepSeekMath (arXiv:2402.03300); DAPO: Yu et al. 2025 (arXiv:2503.14476); "
    "Dr. GRPO: Liu et al. 2025 (arXiv:2503.20783)",
    measure=measure,
)
def grpo(batch: ScoredExamples[GroupExample], config: GRPOConfig) -> LossOutput:
    """Group-relative policy optimisation: raise the answers that beat the others to their prompt.

    Choose it when answers can be scored (a verifier, a reward model) and sampled again and again: it
    learns from the policy's own mistakes, and needs no critic and no pairs. Sample 8 or more answers a
    prompt, at prompts the policy sometimes gets right.
    """
    rows = [row for example in batch.examples for row in example.rows]
    recorded = [known for example in batch.examples for known in example.behaviour]
    device = batch.policy[0].device
    policy = torch.cat(list(batch.policy))
    # Of an answer that nobody recorded the ratio is 1: it counts as sampled by the policy as it is now.
    behaviour = torch.cat(
        [
            now.detach() if known is None else torch.tensor(known, dtype=now.dtype, device=device)
            for known, now in zip(recorded, batch.policy, strict=True)
        ]
    )
    lengths = torch.tensor([len(row.scored) for row in rows], device=device)
    advantages = [a for example in batch.examples for a in example.advantages]
    rewards = [r for example in batch.examples for r in example.rewards]
    totals: BatchTotals = batch.whole
    output = grpo_loss(
        policy,
        behaviour,
        torch.tensor(advantages, device=device),
        torch.arange(len(rows), device=device).repeat_interleave(lengths),
        reference_logprobs=None if batch.reference is None else torch.cat(list(batch.reference)),
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        beta=config.beta,
        aggregation=config.aggregation,
        longest=config.longest,
        totals=totals,
    )
    per_answer = {
        "reward": rewards,
        "advantage": [abs(a) for a in advantages],
        "answer_tokens": lengths.tolist(),
        "behaviour_unknown": [float(known is None) for known in recorded],
    }
    return LossOutput(
        output.loss, output.metrics | {name: sum(v) / totals.answers for name, v in per_answer.items()}
    )
