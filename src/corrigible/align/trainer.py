"""The one trainer: any algorithm of the registry, any source, one visible loop.

What it guarantees:

* *Denominators.* A batch's loss is a weighted mean over its examples. However the batch is cut into
  micro-batches, every part is divided by the weight of the whole, so the gradient does not depend
  on the cut. Whatever else an objective must know of the whole batch (KTO's reference point, GRPO's
  number of tokens) is measured over all of it before the first part.
* *Resume.* Weights as the optimiser knows them (float32), its moments, random state and position are in
  one atomic checkpoint; a killed run that is resumed ends with bitwise the weights of an uninterrupted
  one (on the same machine, with the same number of threads and processes).
* *Several processes* (torchrun) each learn from a share of every batch, and sum their gradients: the
  batch, its denominators and what is measured in it stay those of one process.
* *Ctrl-C and SIGTERM* finish nothing half: the state after the last whole step is saved and
  :class:`~corrigible.errors.Interrupted` is raised.
* *No silent failure.* NaN, a gradient that is zero, weights that do not move, a reference that is
  not the policy's start, ids outside the vocabulary, no memory left: each is a named error.

Dropout is off throughout, as DPO's reference needs it.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corrigible.align.attribution import Ledger
from corrigible.align.checkpoint import Checkpoint, load_latest, save_checkpoint
from corrigible.align.config import TrainConfig, learning_rate
from corrigible.align.distributed import join
from corrigible.align.interrupts import Stopped, stop_signals
from corrigible.align.passes import passes
from corrigible.align.reference import reference_logprobs
from corrigible.align.reference_cache import ReferenceLogprobs, hand_on
from corrigible.align.registry import Algorithm, AlgorithmConfig, ScoredExamples
from corrigible.align.sharded import ShardedOptimiser
from corrigible.align.sources import Example, Paced, Separable, Source, row_key
from corrigible.align.watch import Held, Watch, alarm, check_examples, some_of
from corrigible.errors import BadInputError, Interrupted, memory_advice
from corrigible.events import Alert, Artefact, EventBus, Message, Metric, Progress, current_bus, emit, use_bus
from corrigible.files import storage_errors, write_atomically
from corrigible.models import LanguagePolicy, Rendered
from corrigible.models.optimiser import Group, Optimiser
from corrigible.models.scoring import RowScores, Scorer

HARMLESS = ("checkpoint_every", "reuse_reference")
"""Settings that do not change what is computed."""

CUT = ("micro_batch_tokens", "gradient_checkpointing", "shard")
"""Settings that decide memory, and of the result the last bits only: a resumed run may change them."""

RNG = "random state"
"""The name of torch's random state in a checkpoint."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves.

    Attributes:
        steps: optimiser steps done.
        metrics: those of the last step.
        weights: folder with the adapter (PEFT's format) or the full weights.
        weights_sha256: of the policy's weights after training.
        start_sha256: of the policy's weights before training.
        history: JSONL file, one line of metrics a step.
        seconds: wall time of this call.
    """

    steps: int
    metrics: dict[str, float]
    weights: Path
    weights_sha256: str
    start_sha256: str
    history: Path
    seconds: float


@dataclass(frozen=True)
class _Rows:
    """Rows to score that no example holds."""

    rows: tuple[Rendered, ...]
    weight: float = 0.0


class Trainer:
    """Moves a policy by an algorithm on the examples of a source.

    Args:
        policy: what to train; its trainable parameters are those with ``requires_grad`` (the
            adapter's after ``add_lora``, all otherwise). It is trained in place.
        algorithm: a registry entry.
        source: its examples.
        config: the trainer's settings.
        algorithm_config: the algorithm's settings; its defaults when absent.
        out: folder of the run: ``checkpoints/``, ``reference.safetensors``, ``metrics.jsonl`` and
            at the end ``adapter/`` (or ``model/``).
        held_out: examples that are never trained on; the reference pass scores them as well (for an algorithm
            without reference, them alone), because afterwards the policy no longer is what it was (see
            ``held_out_reference``).
        reference_policy: hold the policy near this one instead of near its own start.
        behaviour_weights: sha256 of the weights of policy versions by id, to take log-probs that
            were recorded at sampling for reference log-probs when the weights are the same.
        ledger: where every row's tokens come from; with it each step reports why the policy and
            whoever sampled them disagree (:mod:`corrigible.align.attribution`).
        resume_hint: what to tell the user who interrupted the run.
        bus: where events go; the current bus when absent.

    Raises:
        BadInputError: nothing is trainable, the source's examples are not of the algorithm's kind, ids
            are outside the policy's vocabulary, or the reference policy has another vocabulary.
    """

    def __init__(
        self,
        policy: LanguagePolicy,
        algorithm: Algorithm,
        source: Source,
        config: TrainConfig | None = None,
        *,
        algorithm_config: AlgorithmConfig | None = None,
        out: str | Path,
        held_out: Source | None = None,
        reference_policy: LanguagePolicy | None = None,
        behaviour_weights: Mapping[str, str] | None = None,
        ledger: Ledger | None = None,
        resume_hint: str = "Run it again with resume=True to go on from there.",
        bus: EventBus | None = None,
    ) -> None:
        self.policy = policy
        self.algorithm = algorithm
        self.source = source
        self.config = config or TrainConfig()
        self.algorithm_config = algorithm_config or algorithm.config()
        self.out = Path(out)
        self.held_out = held_out
        self.reference_policy = reference_policy
        self.behaviour_weights = behaviour_weights
        self.ledger = ledger
        self.resume_hint = resume_hint
        self.bus = bus or current_bus()
        self.world = join()
        self.reference: ReferenceLogprobs | None = None
        self.held_out_reference: ReferenceLogprobs | None = None
        self.score: Scorer | None = None
        self.parameters = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise BadInputError(
                "nothing_trainable: no parameter of the policy requires a gradient.",
                advice="Call policy.add_lora(...) first, or load it for full fine-tuning.",
            )
        if not isinstance(self.algorithm_config, algorithm.config):
            raise BadInputError(
                f"{algorithm.name} takes {algorithm.config.__name__}, "
                f"got {type(self.algorithm_config).__name__}."
            )
        if source.kind != algorithm.source:
            raise BadInputError(
                f"{algorithm.name} learns from {algorithm.source}, these examples are {source.kind}.",
                advice="PairSource gives pairs, UnpairedSource unpaired answers (labelled_from_pairs makes "
                "them from pairs), TokenSource texts with token weights, GroupSource groups.",
            )
        if isinstance(source, Paced):
            self.source = source.over(self.total_steps)
        _check_vocabulary(policy, source, reference_policy)
        if held_out is not None:
            _check_vocabulary(policy, held_out, reference_policy)
        with self._room("the optimiser's state"):
            self.optimiser = self._optimiser()
        self.watch = Watch(
            policy, self.parameters, self.optimiser, stochastic=self.config.master_weights == "stochastic"
        )
        self._scored: list[tuple[Rendered, Tensor]] = []
        self._stop: Callable[[], None] = lambda: None

    def _optimiser(self) -> Optimiser:
        config = self.config
        group = Group(self.parameters, weight_decay=config.weight_decay)
        settings: dict[str, Any] = {
            name: getattr(config, name) for name in ("betas", "eps", "master_weights", "moments", "seed")
        }
        if config.shard == "nothing" or self.world.size == 1:
            return Optimiser(group, **settings)
        return ShardedOptimiser(self.world, group, **settings)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        if self.config.steps is not None:
            return self.config.steps
        per_epoch = self.source.steps_per_epoch(self.config.batch_size)
        return max(1, round(self.config.epochs * per_epoch))

    # -- the run ------------------------------------------------------------------------------

    def train(self, *, resume: bool = False) -> TrainResult:
        """Train to the last step and save the weights.

        Args:
            resume: go on from the last checkpoint in ``out`` (from the beginning when there is
                none). Without it a folder that holds a run is refused.

        Raises:
            BadInputError: ``out`` holds a run and ``resume`` is False, or another run's settings,
                data or weights.
            Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last whole step is saved.
            OutOfMemory: the advice names the settings that need less; the last checkpoint stays, and a run
                may go on from it with other ``micro_batch_tokens`` and ``gradient_checkpointing``.
            NumericsError: a named numerical failure; the last checkpoint stays.
            StorageError: the disk is full or gone; the last checkpoint stays.
            CorrigibleError: ``process_lost``: another process of this run is gone.
        """
        began = time.monotonic()
        folder = self.out / "checkpoints"
        with (
            self.world.reporting(self.bus) as bus,
            use_bus(bus),
            stop_signals() as self._stop,
            torch.random.fork_rng(),
            self.world.together(),
        ):
            torch.manual_seed(self.config.seed)
            checkpoint = self._open(folder, resume)
            start_sha = self.policy.weights_sha256()
            identity = self._identity(start_sha)
            self.world.check_same(
                {name: value for name, value in identity.items() if name != "rounding"}
                | {"step": checkpoint.step if checkpoint else 0}
            )
            if checkpoint is not None:
                _check_identity(checkpoint.state["identity"], identity)
            check_examples(self.source.examples, self.policy.end_ids)
            # The policy still is the one that the run began with, also on resume: the checkpoint is
            # loaded only after the reference pass.
            with self._room("the reference pass"):
                self._prepare_reference()
            step = 0
            if checkpoint is not None:
                self._restore(checkpoint)
                step = checkpoint.step
                emit(Message(text=f"Resumed after step {step} of {self.total_steps}."))
            metrics = self.world.by_lead(lambda: self._open_history(step))
            emit(
                Progress(task=f"train {self.algorithm.name}", done=step, total=self.total_steps, unit="step")
            )
            try:
                with self.world.together():
                    while step < self.total_steps:
                        with self._room("a forward and backward pass and the update"):
                            metrics = self._step(step)
                        step += 1
                        self._log(step, metrics)
                        if step == 1 and self.reference and self.config.reuse_reference and self.world.leads:
                            hand_on(self._reference_file)  # the first step has held it against the policy
                        if step % self.config.checkpoint_every == 0 and step < self.total_steps:
                            self._save(step, identity)
            except Stopped as stopped:
                self._save(step, identity)
                raise self._interrupted(step) from stopped
            self._save(step, identity)
            end_sha = self.policy.weights_sha256()
            if end_sha == start_sha:
                alarm(
                    "weights_unchanged",
                    "training ended with exactly the weights it began with.",
                    "The learning rate may be below the weights' precision.",
                )
            weights = self.world.by_lead(self._save_weights)
        return TrainResult(
            steps=step,
            metrics=metrics,
            weights=weights,
            weights_sha256=end_sha,
            start_sha256=start_sha,
            history=self.out / "metrics.jsonl",
            seconds=time.monotonic() - began,
        )

    def accumulate(self, examples: Sequence[Example]) -> dict[str, float]:
        """Add the gradient of the batch's loss to every parameter's ``grad``; return the batch's metrics.

        The result does not depend on ``micro_batch_tokens``: each micro-batch is divided by the
        weight of the whole batch, and what it must know of the whole batch is measured first. Of several
        processes each gives the same batch, learns from its share, and gets the whole.

        Raises:
            NumericsError: ``loss_not_finite``, or whatever the objective finds.
        """
        denominator = sum(example.weight for example in examples)
        whole = self._measure(examples, denominator)
        score = self._scorer()
        parts = [part for example in examples for part in self._parts(example)]
        parts = self.world.share(parts, lambda part: score.size(part.rows))
        metrics: dict[str, float] = {}
        for batch in passes(score, [part.rows for part in parts], self.config.micro_batch_tokens):
            self._stop()
            chosen = [parts[i] for i in batch]
            rows = [row for part in chosen for row in part.rows]
            found = self._scores([part.rows for part in chosen])
            scores, asked = found.logprobs, found if self._asks else None
            reference = self._reference_of(rows)
            self.watch.micro_batch(chosen, scores, reference, asked)
            if self.ledger is not None:
                self._scored += ((row, score.detach()) for row, score in zip(rows, scores, strict=True))
            batch_of = ScoredExamples(chosen, scores, reference, denominator, whole)
            if asked is not None:
                batch_of = replace(batch_of, asked=asked)
            output = self.algorithm.objective(batch_of, self.algorithm_config)
            if not bool(torch.isfinite(output.loss.detach()).all()):
                alarm(
                    "loss_not_finite",
                    f"the loss is {float(output.loss.detach())}.",
                    "Lower the learning rate.",
                )
            output.loss.backward()  # type: ignore[no-untyped-call]
            for name, value in output.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + value
        self.watch.end_batch(self.algorithm, self.algorithm_config, examples, whole, self._held())
        self.world.sum_gradients(list(self.parameters.values()))
        return self.world.sum_metrics(metrics)

    def _held(self) -> Held:
        if self.reference is None:
            return "nothing"
        return "other" if self.reference_policy is not None else self.config.reference

    def _attribute(self, step: int) -> dict[str, float]:
        """Metrics of :attr:`ledger` on what was just scored; their intervals go out as events."""
        if self.ledger is None:
            return {}
        shares = self.world.gather([(row, scores.cpu()) for row, scores in self._scored])
        found = self.ledger.attribute(*zip(*(scored for share in shares for scored in share), strict=True))
        for event in found.events(step + 1):
            emit(event)
        return found.metrics()

    def _measure(self, examples: Sequence[Example], denominator: float) -> Any:
        """What the algorithm wants to know of the whole batch before its first micro-batch."""
        if self.algorithm.measure is None:
            return None
        rows = self.algorithm.probes(examples) if self.algorithm.probes is not None else ()
        score = self._scorer()
        found: dict[int, Tensor] = {}
        mine = self.world.share(range(len(rows)), lambda i: score.size([rows[i]]))
        for batch in passes(score, [[rows[i]] for i in mine], self.config.micro_batch_tokens):
            self._stop()
            chosen = [mine[i] for i in batch]
            scores = self._logprobs([[rows[i]] for i in chosen], grad=False)
            found |= zip(chosen, scores, strict=True)
        found = self.world.merge(found)
        policy = [found[i].to(self.policy.device) for i in range(len(rows))]
        return self.algorithm.measure(
            ScoredExamples(examples, policy, self._reference_of(rows), denominator), self.algorithm_config
        )

    def _scorer(self) -> Scorer:
        if self.score is None:
            self.score = Scorer(
                self.policy,
                share=self.config.share_prompts,
                checkpoint_layers=self.config.gradient_checkpointing,
            )
        return self.score

    def _logprobs(self, groups: Sequence[Sequence[Rendered]], *, grad: bool) -> list[Tensor]:
        """Log-probs of every row's scored tokens at the temperature that the algorithm wants."""
        return self._scorer()(groups, grad=grad, temperature=self.algorithm_config.scored_at)

    @property
    def _asks(self) -> bool:
        """Whether the algorithm wants more than log-probs."""
        return self.algorithm_config.asks_entropy or self.algorithm_config.expected_at is not None

    def _scores(self, groups: Sequence[Sequence[Rendered]]) -> RowScores:
        """With gradient, at every row's scored tokens: log-probs, and what else the algorithm wants."""
        if not self._asks:
            return RowScores(self._logprobs(groups, grad=True), None)
        config = self.algorithm_config
        return self._scorer().scores(
            groups,
            grad=True,
            temperature=config.scored_at,
            entropy=config.asks_entropy,
            expected_at=config.expected_at,
        )

    def _reference_of(self, rows: Sequence[Rendered]) -> list[Tensor] | None:
        if self.reference is None:
            return None
        return [self.reference[row_key(row)].to(self.policy.device) for row in rows]

    def _parts(self, example: Example) -> list[Example]:
        """The example, cut where it may be and where it alone is more than a micro-batch holds."""
        rows, most = example.rows, self.config.micro_batch_tokens
        score = self._scorer()
        if not isinstance(example, Separable) or len(rows) == 1 or score.size(rows) <= most:
            return [example]
        parts: list[Example] = []
        start = 0
        for stop in range(1, len(rows) + 1):
            if stop == len(rows) or score.size(rows[start : stop + 1]) > most:
                parts.append(example.part(start, stop))
                start = stop
        return parts

    def _step(self, step: int) -> dict[str, float]:
        began = time.monotonic()
        examples = self.source.batch(step, self.config.batch_size)
        self.policy.model.eval()
        self.optimiser.clear()
        self._scored.clear()
        self.watch.begin(step)
        metrics = self.accumulate(examples)
        metrics |= self._attribute(step)
        norm = self.optimiser.norm()
        if not math.isfinite(norm):
            alarm(
                "gradient_not_finite",
                f"the gradient's norm is {norm} at step {step + 1}.",
                "Lower the learning rate.",
            )
        if norm == 0.0 and metrics.get("grad_weight", 1.0) > 0.0:
            alarm(
                "gradient_zero",
                f"no gradient reached the trainable parameters at step {step + 1}.",
                "Check that they take part in the forward pass (an adapter that is disabled?).",
            )
        rate = learning_rate(step, self.total_steps, self.config)
        self.watch.before_update()
        self.optimiser.step(rate, scale=min(1.0, self.config.max_grad_norm / (norm + 1e-6)))
        self.watch.after_update(rate)
        seconds = time.monotonic() - began
        tokens = sum(len(row) for example in examples for row in example.rows)
        return metrics | {
            "grad_norm": norm,
            "lr": rate,
            "examples": float(len(examples)),
            "tokens_per_second": tokens / max(seconds, 1e-9),
        }

    def _room(self, what: str) -> AbstractContextManager[None]:
        """Running out of memory says which settings need less."""
        config = self.config
        ways = [f"Lower micro_batch_tokens (--micro-batch-tokens, now {config.micro_batch_tokens})"]
        if not config.gradient_checkpointing:
            ways.append("set gradient_checkpointing (--gradient-checkpointing)")
        if config.moments == "float32":
            ways.append("keep the optimiser's moments in bfloat16 (--moments bfloat16)")
        if config.shard == "nothing" and self.world.size > 1:
            ways.append("share out the optimiser's state (--shard optimiser)")
        if not self.policy.has_adapter:
            ways.append("train an adapter (--lora-rank) instead of all weights")
        return memory_advice(what, f"{'; or '.join(ways)}. The last checkpoint is intact.")

    # -- beginning and end --------------------------------------------------------------------

    def _open(self, folder: Path, resume: bool) -> Checkpoint | None:
        checkpoint = load_latest(folder)
        if checkpoint is not None and not resume:
            raise BadInputError(
                f"{self.out} already holds a run ({checkpoint.step} steps).",
                advice="Go on with it (resume=True, --resume) or choose another folder.",
            )
        with storage_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        return checkpoint

    def _identity(self, start_sha: str) -> dict[str, Any]:
        return {
            "algorithm": self.algorithm.name,
            "algorithm_config": self.algorithm_config.model_dump(mode="json"),
            # How a batch is cut changes the rounding.
            "config": self.config.model_dump(mode="json", exclude={*HARMLESS, *CUT}),
            "total_steps": self.total_steps,
            "data": self.source.digest(),
            "held_out": self.held_out.digest() if self.held_out else None,
            "start_weights": start_sha,
            "parameters": hashlib.sha256(
                json.dumps([[n, list(p.shape), str(p.dtype)] for n, p in self.parameters.items()]).encode()
            ).hexdigest(),
            "rounding": {"threads": torch.get_num_threads(), "processes": self.world.size}
            | {name: getattr(self.config, name) for name in CUT},
        }

    def _prepare_reference(self) -> None:
        needed = self.algorithm.needs_reference and self.algorithm_config.uses_reference
        if not needed and self.held_out is None:
            return
        policy = self.reference_policy or self.policy
        probes = _Rows(tuple(self._all_probes()) if needed else ())
        _check_rows(probes.rows, self.policy, self.reference_policy)
        held_out = self.held_out.examples if self.held_out is not None else []
        try:
            found = reference_logprobs(
                policy,
                [*self.source.examples, *held_out, probes] if needed else held_out,
                mode="start" if self.reference_policy else self.config.reference,
                micro_batch_tokens=self.config.micro_batch_tokens,
                cache=self._reference_file,
                reuse=self.config.reuse_reference,
                behaviour_weights=self.behaviour_weights,
                share_prompts=self.config.share_prompts,
                temperature=self.algorithm_config.scored_at,
                check_stop=self._stop,
                world=self.world,
            )
        except Stopped as stopped:
            raise Interrupted(
                "Interrupted while scoring with the reference; what was scored is kept.",
                advice=self.resume_hint,
            ) from stopped
        self.reference = found if needed else None
        self.held_out_reference = found if self.held_out is not None else None

    @property
    def _reference_file(self) -> Path:
        return self.out / "reference.safetensors"

    def _all_probes(self) -> Iterator[Rendered]:
        """The rows besides the examples' own that the run's batches will ask the reference for."""
        if self.algorithm.probes is not None:
            for step in range(self.total_steps):
                yield from self.algorithm.probes(self.source.batch(step, self.config.batch_size))

    def _save(self, step: int, identity: Mapping[str, Any]) -> None:
        """Write a checkpoint, once the processes have agreed that they hold the same weights."""
        marks = self.world.gather(self._mark() if self.world.size > 1 else [])
        if any(mark != marks[0] for mark in marks):
            alarm(
                "processes_diverged",
                f"the processes hold different weights after step {step}.",
                "Somebody changed them in one process, or the processes run on different hardware.",
            )
        tensors, state = self._state(identity)
        self.world.by_lead(lambda: save_checkpoint(self.out / "checkpoints", step, tensors, state))

    def _mark(self) -> list[float]:
        """What tells two states of the weights apart."""
        return [float(some_of(p).sum(dtype=torch.float64)) for p in self.parameters.values()]

    def _state(self, identity: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state = self.optimiser.state()
        if isinstance(self.optimiser, ShardedOptimiser):
            state = self.world.collect(state)
        return {RNG: torch.get_rng_state(), **state}, {"identity": dict(identity)}

    def _restore(self, checkpoint: Checkpoint) -> None:
        tensors = dict(checkpoint.tensors)
        torch.set_rng_state(tensors.pop(RNG))
        try:
            self.optimiser.load(tensors)
        except BadInputError as error:
            raise BadInputError(
                f"checkpoint_incomplete: in {self.out} {error.message}",
                advice="The checkpoint is of another model; choose another folder.",
            ) from error

    def _open_history(self, step: int) -> dict[str, float]:
        """Keep the lines up to ``step`` (a killed run may have written more) and return the last one's."""
        path = self.out / "metrics.jsonl"
        kept: list[dict[str, Any]] = []
        if step and path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # the line that a kill cut short
                    break
                if row["step"] <= step:
                    kept.append(row)
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        return {key: value for key, value in kept[-1].items() if key != "step"} if kept else {}

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.world.leads:
            with storage_errors(self.out), (self.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            emit(Metric(name=f"train/{name}", value=value, step=step))
        emit(Progress(task=f"train {self.algorithm.name}", done=step, total=self.total_steps, unit="step"))

    def _save_weights(self) -> Path:
        adapter = self.policy.has_adapter
        path = self.out / ("adapter" if adapter else "model")
        with storage_errors(self.out):
            (self.policy.save_adapter if adapter else self.policy.save_full)(path)
        emit(Artefact(name=path.name, path=str(path)))
        return path

    def _interrupted(self, step: int) -> Interrupted:
        return Interrupted(
            f"Interrupted after step {step} of {self.total_steps}; a checkpoint is saved in {self.out}.",
            advice=self.resume_hint,
        )


def _check_vocabulary(
    policy: LanguagePolicy, source: Source, reference_policy: LanguagePolicy | None
) -> None:
    _check_rows([row for example in source.examples for row in example.rows], policy, reference_policy)
    if reference_policy is None:
        return
    if reference_policy.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise BadInputError(
            "vocabulary_mismatch: the log-probs of policy and reference would be of different tokens.",
            advice="Use a reference of the same model family.",
        )


def _check_rows(
    rows: Sequence[Rendered], policy: LanguagePolicy, reference_policy: LanguagePolicy | None
) -> None:
    size = len(policy.network.get_input_embeddings().weight)
    highest = max((max(row.ids) for row in rows), default=0)
    if highest >= size:
        raise BadInputError(
            f"vocabulary_mismatch: the data holds token id {highest}, the policy knows {size} tokens.",
            advice="Render the data with this policy's own renderer.",
        )
    longest = max((len(row) for row in rows), default=0)
    context = min(each.context_length for each in (policy, reference_policy) if each is not None)
    if longest > context:
        raise BadInputError(
            f"context_overflow: a row of the data is {longest} tokens long, the model reads {context}.",
            advice=f"Render the data with max_length={context} or less.",
        )


def _check_identity(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    saved, now = dict(saved), dict(now)
    before, after = saved.pop("rounding", {}), now.pop("rounding")
    different = [key for key in now if saved.get(key) != now[key]]
    if different:
        details = []
        for key in different:
            old, new = saved.get(key), now[key]
            if isinstance(old, dict) and isinstance(new, dict):
                details += [f"{k} was {old.get(k)}, is {new[k]}" for k in new if old.get(k) != new[k]]
            else:
                details.append(key.replace("_", " "))
        raise BadInputError(
            f"resume_mismatch: this is not the run that was interrupted ({'; '.join(details)}).",
            advice="Resume with the same data, model and settings, or choose another folder.",
        )
    for key, value in after.items():
        if before.get(key) != value:
            emit(
                Alert(
                    name=f"{key}_changed",
                    message=f"The run began with {key.replace('_', ' ')} {before.get(key)} and goes on with "
                    f"{value}: the result is as good, but not bit for bit the same.",
                )
            )
