"""What the trainer checks that no loss would show: the costliest mistakes raise nothing by themselves.

Each check has a name, which is that of its :class:`~corrigible.events.Alert`, and stands in the
catalogue of ``docs/guides/faults.md`` with the fault that it finds. What makes a step worthless stops
the run (:func:`alarm`); what may be meant (old answers, the same pair twice) only says so. The checks
read log-probs and single weights that are there anyway, so they cost a step next to nothing; those
that could only ever fail from the start run in the first :data:`CLOSELY` steps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from corrigible.align.groups import GroupExample
from corrigible.align.registry import Algorithm, AlgorithmConfig, ScoredExamples
from corrigible.align.sources import Example, row_key
from corrigible.align.unpaired import UnpairedExample
from corrigible.errors import BadInputError, NumericsError
from corrigible.events import Alert, emit
from corrigible.models import LanguagePolicy, Rendered, TokenKind
from corrigible.models.optimiser import Optimiser
from corrigible.models.scoring import RowScores

CLOSELY = 3
"""Steps from the start of a run in which every check runs."""

SAME = {torch.float32: 1e-5, torch.float64: 1e-9}
"""Mean absolute difference per token, nats, below which log-probs can only be of the same weights."""

CUT_TOLERANCE = 1e-4
"""How far the gradient on the log-probs may depend on how a batch is cut, relative to its length."""

REFERENCE_GAP = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Mean absolute difference per token, nats, above which a row's reference is not the policy itself."""

BEHAVIOUR_GAP = {torch.float32: 2e-3, torch.float64: 1e-6}
"""The same for a batch of answers and the log-probs that were recorded when they were sampled."""

LOW_PRECISION_GAP = 0.1
"""Of bfloat16 and float16, where other kernels and batches explain a few hundredths of a nat."""

SAMPLED_WEIGHTS = 1024
"""Elements of each parameter that are looked at, evenly spread."""

Held = Literal["start", "base", "other", "nothing"]
"""What the frozen reference is: the policy's start, its base without adapter, another policy, or none."""


def alarm(name: str, message: str, advice: str) -> NoReturn:
    """An alert of that name, and the error that stops the run.

    Raises:
        NumericsError: always.
    """
    emit(Alert(name=name, message=message))
    raise NumericsError(f"{name}: {message}", advice=f"{advice} The last checkpoint is intact.")


# -- before the first step ------------------------------------------------------------------------


def check_examples(examples: Sequence[Example], end_ids: Collection[int]) -> None:
    """Look over a source's rows.

    Args:
        examples: of the whole run.
        end_ids: ids that end the policy's turn.

    Raises:
        BadInputError: ``nothing_scored``, ``mask_of_ones``.

    Alerts: ``end_of_turn_unscored``, ``duplicate_examples``.
    """
    rows = [row for example in examples for row in example.rows]
    silent = sum(not row.scored for row in rows)
    if silent:
        emit(Alert(name="nothing_scored", message=f"{silent} rows have nothing to learn from."))
        raise BadInputError(
            f"nothing_scored: in {silent} of {len(rows)} rows no token is learnt from.",
            advice="Such an answer would count as certain: leave it out, or look at how it was masked.",
        )
    without_prompt = sum(len(row.scored) > 1 and row.scored[0] <= 1 and _scores_all(row) for row in rows)
    if without_prompt:
        emit(Alert(name="mask_of_ones", message=f"{without_prompt} rows have no prompt."))
        raise BadInputError(
            f"mask_of_ones: {without_prompt} of {len(rows)} rows have no prompt, every token is learnt from.",
            advice="Render them with the policy's renderer, which knows whose turn each token is.",
        )
    endless = sum(_never_ends(row, end_ids) for row in rows)
    if endless:
        emit(
            Alert(
                name="end_of_turn_unscored",
                message=f"In {endless} of {len(rows)} rows the end of the turn is not learnt from: the "
                "policy would never learn to stop (was padding told by its id, which is the end of turn's?).",
            )
        )
    extra = len(examples) - len(Counter(map(_identity, examples)))
    if extra:
        emit(
            Alert(
                name="duplicate_examples",
                message=f"{extra} of {len(examples)} examples are there already: they count twice.",
            )
        )


def _scores_all(row: Rendered) -> bool:
    return len(row.scored) == len(row) - row.scored[0]


def _never_ends(row: Rendered, end_ids: Collection[int]) -> bool:
    """Whether a written answer lacks its end of turn, or an end of turn follows it that is not scored."""
    last = row.scored[-1]
    if last + 1 < len(row) and row.ids[last + 1] in end_ids:
        return True
    return row.kinds[last] is TokenKind.NOT_SAMPLED and row.ids[last] not in end_ids


def _identity(example: Example) -> Hashable:
    """What makes two examples the same one: an answer may be judged good by several records."""
    keys = tuple(row_key(row) for row in example.rows)
    return (keys, example.derived_from) if isinstance(example, UnpairedExample) else keys


# -- while training -------------------------------------------------------------------------------


class Watch:
    """Looks at every step of a run from the side.

    Args:
        policy: what is trained.
        parameters: its trainable parameters by name, as the trainer knows them.
        optimiser: what moves them.
        stochastic: whether it rounds bfloat16 weights at random.
    """

    def __init__(
        self,
        policy: LanguagePolicy,
        parameters: Mapping[str, nn.Parameter],
        optimiser: Optimiser,
        *,
        stochastic: bool = False,
    ) -> None:
        self.policy = policy
        self.parameters = parameters
        self.optimiser = optimiser
        self.stochastic = stochastic
        self._step = CLOSELY
        self._batch: list[tuple[Example, Sequence[Tensor], Sequence[Tensor] | None]] = []
        self._asked: list[RowScores] = []
        self._gradients: dict[int, Tensor] = {}
        self._before: list[tuple[str, Tensor, Tensor, Tensor]] = []

    def begin(self, step: int) -> None:
        """A batch begins, of step ``step`` (from 0)."""
        self._step = step
        self._forget()

    def _forget(self) -> None:
        self._batch.clear()
        self._asked.clear()
        self._gradients.clear()

    def micro_batch(
        self,
        parts: Sequence[Example],
        scores: Sequence[Tensor],
        reference: Sequence[Tensor] | None,
        asked: RowScores | None = None,
    ) -> None:
        """The log-probs of a micro-batch (and what else was asked for) are there; its loss comes next.

        Raises:
            NumericsError: ``gradient_zero``: no trainable parameter took part.
        """
        if not any(score.requires_grad for score in scores):
            alarm(
                "gradient_zero",
                "no trainable parameter takes part in the forward pass.",
                "Check that the adapter is there and not disabled.",
            )
        if self._step >= CLOSELY:
            return
        if asked is not None:
            self._asked.append(asked)
        start = 0
        for part in parts:
            rows = slice(start, start + len(part.rows))
            start += len(part.rows)
            known = None if reference is None else reference[rows]
            for score in scores[rows]:
                number = len(self._gradients)
                self._gradients[number] = torch.zeros_like(score)
                score.register_hook(self._keep(number))  # type: ignore[no-untyped-call]
            self._batch.append((part, [score.detach() for score in scores[rows]], known))

    def _keep(self, number: int) -> Any:
        def keep(gradient: Tensor) -> None:
            if number in self._gradients:
                self._gradients[number] = gradient.detach()

        return keep

    def end_batch(
        self,
        algorithm: Algorithm,
        config: AlgorithmConfig,
        examples: Sequence[Example],
        whole: Any,
        held: Held,
    ) -> None:
        """All micro-batches of a batch have had their backward pass.

        Args:
            algorithm, config: what the loss was.
            examples: the whole batch.
            whole: what the algorithm measured in it.
            held: what the reference is.

        Raises:
            NumericsError: ``gradient_depends_on_cut``, and in the first step ``reference_mismatch`` or
                ``reference_with_adapter``.

        Alerts: ``behaviour_mismatch`` in the first step.
        """
        if not self._batch:
            return
        try:
            self._check_cut(algorithm, config, examples, whole)
            if self._step == 0:
                self._check_reference(held)
                self._check_behaviour()
        finally:
            self._forget()

    def _check_cut(
        self, algorithm: Algorithm, config: AlgorithmConfig, examples: Sequence[Example], whole: Any
    ) -> None:
        """The gradient that reached the log-probs must be that of the batch in one piece."""
        found = torch.cat([self._gradients[number].flatten() for number in range(len(self._gradients))])
        leaves = [score.clone().requires_grad_() for _, scores, _ in self._batch for score in scores]
        reference = None
        if self._batch[0][2] is not None:
            reference = [each for _, _, known in self._batch for each in known or ()]
        parts = [part for part, _, _ in self._batch]
        denominator = sum(example.weight for example in examples)
        batch = ScoredExamples(parts, leaves, reference, denominator, whole, _together(self._asked, leaves))
        with torch.enable_grad():
            loss = algorithm.objective(batch, config).loss
        if not loss.requires_grad:
            return
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        wanted = torch.cat(
            [
                (torch.zeros_like(leaf) if each is None else each).flatten()
                for leaf, each in zip(leaves, gradients, strict=True)
            ]
        )
        length, gap = float(wanted.norm()), float((found - wanted).norm())
        # What is not finite has its own alarm, at the gradient's norm.
        if math.isfinite(gap) and math.isfinite(length) and gap > CUT_TOLERANCE * length:
            ratio = float(found.norm()) / length if length else math.inf
            alarm(
                "gradient_depends_on_cut",
                "cut into micro-batches the batch has another gradient (its length is "
                f"{ratio:.3g} times that of the whole batch).",
                "A denominator counts a micro-batch where it must count the batch, or counts them twice.",
            )

    def _check_reference(self, held: Held) -> None:
        if held not in ("start", "base") or self._batch[0][2] is None:
            return
        gaps = [
            float((score - known.to(score)).abs().mean())
            for _, scores, references in self._batch
            for score, known in zip(scores, references or (), strict=True)
        ]
        tolerance = REFERENCE_GAP.get(self.policy.dtype, 3 * LOW_PRECISION_GAP)
        if held == "start" and max(gaps) > tolerance:
            alarm(
                "reference_mismatch",
                "the policy is not its own reference before the first step: in "
                f"{sum(gap > tolerance for gap in gaps)} of {len(gaps)} rows they differ, by up to "
                f"{max(gaps):.3g} nats a token.",
                "The reference is of other weights or other tokens; remove reference.safetensors.",
            )
        if held == "base" and self._adapter_acts() and max(gaps) <= SAME.get(self.policy.dtype, 0.0):
            alarm(
                "reference_with_adapter",
                "the reference should be the base model, but is the policy with its adapter.",
                "The adapter was left on while the reference was scored; remove reference.safetensors.",
            )

    def _adapter_acts(self) -> bool:
        second = [p for name, p in self.policy.model.named_parameters() if ".lora_B." in name]
        return any(bool(p.detach().any()) for p in second)

    def _check_behaviour(self) -> None:
        gaps = [
            score - torch.tensor(known, dtype=score.dtype, device=score.device)
            for part, scores, _ in self._batch
            if isinstance(part, GroupExample)
            for score, known in zip(scores, part.behaviour, strict=True)
            if known is not None
        ]
        if not gaps:
            return
        gap = torch.cat(gaps).double()
        size, mean = float(gap.abs().mean()), float(gap.mean())
        noise = float(gap.std()) / math.sqrt(len(gap)) if len(gap) > 1 else 0.0
        tolerance = BEHAVIOUR_GAP.get(self.policy.dtype, LOW_PRECISION_GAP)
        # Rounding has no preferred sign; other weights and a filter on one side have.
        if size > tolerance or abs(mean) > tolerance / 10 + 4 * noise:
            emit(
                Alert(
                    name="behaviour_mismatch",
                    message="Before the first step the policy and the recorded log-probs differ by "
                    f"{size:.3g} nats a token ({mean:+.3g} on average): the answers come from other weights "
                    "(an adapter that was stale, missing or in another place) or another sampler "
                    "(temperature or a filter on one side), or are other tokens (tokenised again). "
                    "corrigible.align.attribution tells which.",
                )
            )

    def before_update(self) -> None:
        """The optimiser is about to step; its gradients are there.

        Raises:
            NumericsError: ``stale_masters``: it would move other weights than the policy's.
        """
        current = {name: p for name, p in self.policy.model.named_parameters() if p.requires_grad}
        same = current.keys() == self.parameters.keys() and all(
            current[name] is parameter for name, parameter in self.parameters.items()
        )
        agree = [
            (some_of(parameter) == self._master(name).to(parameter.dtype)).all()
            for name, parameter in self.parameters.items()
        ]
        if not same or not bool(torch.stack(agree).all()):
            alarm(
                "stale_masters",
                "the policy's weights are not those that the optimiser holds: somebody changed them.",
                "Load weights and attach adapters before the trainer is made.",
            )
        self._before.clear()
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            gradient = some_of(parameter.grad)
            place = gradient.abs().argmax().view(1)
            if self.stochastic and parameter.dtype == torch.bfloat16:
                # A single weight may well stay where it is: all of them are looked at.
                place = torch.arange(len(gradient), device=gradient.device)
            self._before.append((name, place, gradient[place], self._master(name)[place].clone()))

    def _master(self, name: str) -> Tensor:
        """As :func:`some_of`, of a parameter as the optimiser knows it."""
        return self.optimiser.master(name, _every(self.parameters[name]))

    def after_update(self, rate: float) -> None:
        """The optimiser has stepped, with the learning rate ``rate``.

        Raises:
            NumericsError: ``weights_unchanged``: there was a gradient, and nothing moved.
        """
        if not self._before:
            return
        gradient = torch.cat([each.double() for _, _, each, _ in self._before])
        before = torch.cat([each.double() for _, _, _, each in self._before])
        now = torch.cat([self._master(name)[place].double() for name, place, _, _ in self._before])
        # From 0 (a fresh adapter's second factor) even the smallest step leads away: it proves nothing
        # where other weights could have moved.
        large = (gradient != 0.0) & (before != 0.0)
        asked = large if bool(large.any()) else gradient != 0.0
        if bool(asked.any()) and not bool((asked & (now != before)).any()):
            alarm(
                "weights_unchanged",
                f"a step with learning rate {rate:.3g} moved none of the weights.",
                "The learning rate may be below the weights' precision.",
            )


def _together(asked: Sequence[RowScores], logprobs: list[Tensor]) -> RowScores | None:
    """What was asked for of all micro-batches, without its gradient: only that of log-probs is compared."""
    if not asked:
        return None

    def column(name: str) -> list[Tensor] | None:
        columns = [getattr(each, name) for each in asked]
        return None if columns[0] is None else [row.detach() for rows in columns for row in rows]

    return RowScores(logprobs, column("entropies"), column("expected"), column("sampling_logprobs"))


def some_of(tensor: Tensor) -> Tensor:
    """At most about :data:`SAMPLED_WEIGHTS` elements, evenly spread, ``(k,)``."""
    return tensor.detach().reshape(-1)[:: _every(tensor)]


def _every(tensor: Tensor) -> int:
    return max(1, tensor.numel() // SAMPLED_WEIGHTS)
