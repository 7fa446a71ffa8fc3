"""The rollout engine: many answers at once, each going its own way.

A finished answer's place is taken at once by the next one (continuous batching); a prompt is read
once for all its answers; every sequence stops by itself and has its own random numbers (see
:mod:`corrigible.models.sampling`), so its text depends on the run's seed, its prompt and its number,
not on what it was batched with. (Rounding apart: a model in bfloat16 may give a row other last bits
in another batch, and a draw that falls within those bits of a border may go the other way.)

Every answer says which weights sampled which of its tokens. Weights that change under a running
rollout without :meth:`RolloutEngine.sync` raise ``stale_weights``.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from corrigible.errors import BadInputError, NumericsError, memory_advice
from corrigible.events import Progress, emit
from corrigible.models.decode import NetworkDecode
from corrigible.models.network import Network
from corrigible.models.policy import LanguagePolicy
from corrigible.models.renderer import Rendered
from corrigible.models.rollout_decode import CopyingModel, DecodeModel, ForkingModel, TransformersDecode
from corrigible.models.rollout_records import (
    Delta,
    Finished,
    Generation,
    Partial,
    RolloutEvent,
    Segment,
    read_partials,
    write_partials,
)
from corrigible.models.rollout_text import TextStream
from corrigible.models.rollout_weights import WeightWatch, expect
from corrigible.models.sampling import Scratch, draw, sequence_seed, uniforms
from corrigible.records import FinishReason, MessageLike, Sampling

SLOTS = 64
KEEP_EVERY = 64
"""Tokens (of each sequence) between two writes of the unfinished answers to ``keep``."""

SMALLER = "Take fewer slots (batch_size, --batch-size), shorter prompts, or fewer max_tokens."
"""What to do where there is no room for all slots."""


@dataclass(slots=True)
class _Sequence:
    """An answer while it is being sampled. Its last token has not been read by the model yet."""

    prompt: int
    sample: int
    prompt_ids: tuple[int, ...]
    seed: int
    budget: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[int, str]] = field(default_factory=list)  # (first token, weights)
    draws: np.ndarray = field(default_factory=lambda: np.empty(0))
    text: TextStream | None = None
    told: int = 0
    slot: int = -1
    reason: FinishReason | None = None

    @property
    def prefix(self) -> tuple[int, ...]:
        return (*self.prompt_ids, *self.ids)

    @property
    def segments(self) -> tuple[Segment, ...]:
        ends = [start for start, _ in self.versions[1:]] + [len(self.ids)]
        spans = ((w, end - start) for (start, w), end in zip(self.versions, ends, strict=True))
        return tuple(Segment(weights, tokens) for weights, tokens in spans if tokens)

    def sampled_by(self, weights: str) -> None:
        """From the next token on, these weights are the ones."""
        if self.versions and self.versions[-1][0] == len(self.ids):
            self.versions.pop()
        if not self.versions or self.versions[-1][1] != weights:
            self.versions.append((len(self.ids), weights))


@dataclass(slots=True)
class _Run:
    """One call: what waits, what is going on, and what the slots hold."""

    sampling: Sampling
    deltas: bool
    keep: Path | None
    refused: list[Finished]
    sequences: list[_Sequence]
    waiting: deque[_Sequence]
    free: list[int]
    running: list[_Sequence] = field(default_factory=list)
    holds: dict[int, tuple[int, ...]] = field(default_factory=dict)  # slot to the prefix it began with
    after: dict[tuple[int, ...], Tensor] = field(default_factory=dict)  # logits after a prefix still wanted
    steps: int = 0


class RolloutEngine:
    """Samples answers from a policy.

    Args:
        policy: the model. Its weights may be trained between calls; each call takes them as they are.
        slots: sequences going on at a time. It changes the speed and the memory, not the text.
        decode: the model under it (default: :func:`decode_model`).

    One run at a time. Not for several threads.
    """

    def __init__(
        self, policy: LanguagePolicy, *, slots: int = SLOTS, decode: DecodeModel | None = None
    ) -> None:
        if slots < 1:
            raise BadInputError(f"slots must be at least 1; they are {slots}.")
        self.policy = policy
        self.slots = slots
        self._model = decode if decode is not None else decode_model(policy, slots)
        self._watch = WeightWatch(policy)
        self._scratch = Scratch()
        self._run: _Run | None = None  # the latest; partials() reads it even after an interruption
        self._busy = False

    # -- weights ------------------------------------------------------------------------------

    @property
    def weights(self) -> str:
        """SHA-256 of the weights that it samples from."""
        return self._watch.loaded

    def sync(self, expected: str | None = None) -> str:
        """Take the policy's weights as they are now, also in the middle of a rollout.

        What unfinished answers have read is read again with the new weights; their next tokens come
        from them, and their record says so.

        Args:
            expected: the SHA-256 that the weights should have.

        Returns:
            The SHA-256 that they have.

        Raises:
            NumericsError: ``stale_weights``: not the expected ones, or the model under the engine
                still gives other numbers than the policy.
        """
        loaded = self._watch.load()
        expect(self.policy, expected, loaded)
        if self._run is not None:
            self._forget(self._run)
        if isinstance(self._model, CopyingModel):
            self._model.refresh()
            self._verify_copy()
        return loaded

    def update_weights(self, state: Mapping[str, Tensor], expected: str | None = None) -> str:
        """Copy tensors into the policy, by their names in ``policy.network.state_dict()``, and :meth:`sync`.

        Raises:
            BadInputError: a name or shape that the model does not have, or a trainable tensor that is
                not there (an adapter that was not sent); nothing is written then.
            NumericsError: ``stale_weights``, as for :meth:`sync`.
        """
        own = self.policy.network.state_dict()
        unknown = [name for name in state if name not in own]
        misshapen = [name for name in state if name in own and state[name].shape != own[name].shape]
        trained = [name for name, p in self.policy.network.named_parameters() if p.requires_grad]
        missing = [name for name in trained if name not in state]
        for what, names in (
            ("does not know", unknown),
            ("has in another shape", misshapen),
            ("trains but did not get", missing),
        ):
            if names:
                raise BadInputError(
                    f"{self.policy.name} {what} {len(names)} of the tensors, {names[0]} for one.",
                    advice="Send every trainable tensor of policy.network.state_dict(), adapter included.",
                )
        with torch.no_grad():
            for name, tensor in state.items():
                own[name].copy_(tensor)
        return self.sync(expected)

    def _verify_copy(self) -> None:
        """A decode model with weights of its own must give the policy's numbers on a short text."""
        size = int(self.policy.network.config.get_text_config(decoder=True).vocab_size)
        text = [(7 * i + 3) % size for i in range(16)]
        with torch.inference_mode(), _evaluating(self.policy):
            copied = self._model.prefill([text], [[0]])[0].float().log_softmax(-1)
            self._model.free(0)
            ids = torch.tensor([text], device=self.policy.device)
            own = self.policy.network(input_ids=ids, use_cache=False).logits[0, -1].float().log_softmax(-1)
        tolerance = 1e-3 if self.policy.dtype == torch.float32 else 0.25
        if bool(own.isfinite().all()) and not torch.allclose(copied, own, atol=tolerance):
            raise NumericsError(
                f"stale_weights: after loading, the engine's log-probabilities differ from those of "
                f"{self.policy.name} by up to {float((copied - own).abs().max()):.3g} nats.",
                advice="Some tensor (an adapter?) did not reach the engine; make a new one.",
            )

    # -- sampling -----------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[MessageLike] | Rendered],
        *,
        n: int | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        on_done: Callable[[int, list[Generation]], None] | None = None,
        occurrences: Sequence[int] | None = None,
        weights: str | None = None,
        partials: Sequence[Partial] = (),
        keep: str | Path | None = None,
    ) -> list[list[Generation]]:
        """Sample ``n`` answers to each prompt; see :func:`corrigible.models.generate`."""
        events = self.stream(
            prompts,
            n=n,
            sampling=sampling,
            seed=seed,
            occurrences=occurrences,
            weights=weights,
            partials=partials,
            keep=keep,
            deltas=False,
        )
        count = n or (sampling.n if sampling else 1)
        results: list[dict[int, Generation]] = [{} for _ in prompts]
        total, done = len(prompts) * count, 0
        emit(Progress(task="generating", done=0, total=total, unit="answer"))
        with closing(events):
            for event in events:
                if isinstance(event, Delta):
                    continue
                results[event.prompt][event.sample] = event.generation
                done += 1
                emit(Progress(task="generating", done=done, total=total, unit="answer"))
                if len(results[event.prompt]) == count and on_done is not None:
                    on_done(event.prompt, [results[event.prompt][i] for i in range(count)])
        return [[answers[i] for i in range(count)] for answers in results]

    def stream(
        self,
        prompts: Sequence[Sequence[MessageLike] | Rendered],
        *,
        n: int | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        occurrences: Sequence[int] | None = None,
        weights: str | None = None,
        partials: Sequence[Partial] = (),
        keep: str | Path | None = None,
        deltas: bool = True,
    ) -> Generator[RolloutEvent, None, None]:
        """The same as events: with ``deltas`` a :class:`Delta` as text comes, and a :class:`Finished`
        for each answer. Answers finish in any order. Closing the iterator ends the run.

        Raises:
            BadInputError: no prompts, a number below 1, partial answers of something else, or
                another run that is still going on.
            NumericsError: ``nonfinite_logits``, ``stale_weights`` or ``out_of_memory``.
        """
        sampling = sampling or Sampling(max_tokens=128, n=n or 1)
        n = sampling.n if n is None else n
        seed = (sampling.seed or 0) if seed is None else seed
        if not prompts:
            raise BadInputError("There are no prompts to answer.")
        if n < 1:
            raise BadInputError(f"n must be at least 1; it is {n}.")
        self._refuse_if_busy()
        if self._watch.moved() or self._watch.changed():
            self.sync()
        expect(self.policy, weights, self.weights)
        keep = Path(keep) if keep is not None else None
        known = [*partials, *(read_partials(keep) if keep is not None else ())]
        self._run = self._plan(prompts, n, sampling, seed, occurrences, known)
        self._run.deltas, self._run.keep = deltas, keep
        return self._going(self._run)

    def partials(self) -> list[Partial]:
        """The answers of the latest run as far as they are, finished ones too: what a resumed run takes."""
        if self._run is None:
            return []
        return [
            Partial(
                prompt_ids=s.prompt_ids,
                ids=tuple(s.ids),
                logprobs=tuple(s.logprobs),
                sampling_logprobs=tuple(s.sampling_logprobs),
                segments=s.segments,
                seed=s.seed,
                sampling=self._run.sampling,
                finish_reason=s.reason,
            )
            for s in self._run.sequences
            if s.ids
        ]

    # -- one run ------------------------------------------------------------------------------

    def _plan(
        self,
        prompts: Sequence[Sequence[MessageLike] | Rendered],
        n: int,
        sampling: Sampling,
        seed: int,
        occurrences: Sequence[int] | None,
        partials: Sequence[Partial],
    ) -> _Run:
        policy = self.policy
        seen: Counter[tuple[int, ...]] = Counter()
        sequences: list[_Sequence] = []
        refused: list[Finished] = []
        for index, prompt in enumerate(prompts):
            ids: tuple[int, ...] = ()
            error, reason = "", FinishReason.error
            try:
                ids = prompt.ids if isinstance(prompt, Rendered) else policy.renderer.prompt(prompt).ids
                error = "" if ids else "The prompt is empty."
            except BadInputError as problem:
                error = str(problem)
            room = policy.context_length - len(ids)
            if not error and room < 1:
                most, reason = policy.context_length, FinishReason.context
                error = f"The prompt has {len(ids)} tokens; {policy.name} reads {most}, answer included."
            if error:
                nothing = Generation(ids, (), "", (), (), reason, 0, error)
                refused.extend(Finished(index, sample, nothing) for sample in range(n))
                continue
            earlier = seen[ids] if occurrences is None else occurrences[index]
            seen[ids] += 1
            budget = min(sampling.max_tokens, room)
            for sample in range(n):
                own_seed = sequence_seed(seed, ids, earlier, sample)
                sequences.append(_Sequence(index, sample, ids, own_seed, budget))
        _resume(sequences, partials, sampling)
        # Longest first: memory trouble shows at once, and neighbours need little padding.
        order = sorted(sequences, key=lambda s: (-len(s.prompt_ids), s.prompt, s.sample))
        waiting = deque(s for s in order if s.reason is None)
        free = list(range(min(self.slots, len(waiting))))
        return _Run(sampling, False, None, refused, sequences, waiting, free)

    def _going(self, run: _Run) -> Generator[RolloutEvent, None, None]:
        self._refuse_if_busy()
        self._busy = True
        try:
            with _evaluating(self.policy):
                yield from run.refused
                for sequence in run.sequences:
                    if sequence.reason is not None:
                        yield self._finished(run, sequence)
                while run.waiting or run.running:
                    with torch.inference_mode(), memory_advice(f"{self.slots} sequences", SMALLER):
                        events = self._step(run)
                    if run.keep is not None and run.steps % KEEP_EVERY == 0:
                        write_partials(run.keep, self.partials())
                    yield from events
            if self._watch.changed():
                raise self._changed_meanwhile()
        finally:
            self._busy = False
            self._release_all(run)
            if run.keep is not None:
                write_partials(run.keep, self.partials())

    def _step(self, run: _Run) -> list[RolloutEvent]:
        """One more token for every sequence that is going on, and the first for those that then find room."""
        if self.policy.model.training:  # somebody trained between two events
            self.policy.model.eval()
        if self._watch.moved() and self._watch.changed():
            raise self._changed_meanwhile()
        run.steps += 1
        events: list[RolloutEvent] = []
        going, run.running = run.running, []
        if going and not run.holds:
            logits = self._model.prefill([s.prefix for s in going], [[s.slot] for s in going])
            run.holds = {s.slot: s.prefix for s in going}
            events += self._draw(run, going, logits)
        elif going:
            logits = self._model.decode([s.slot for s in going], [s.ids[-1] for s in going])
            events += self._draw(run, going, logits)
        while run.waiting and run.free:
            together = min(getattr(self._model, "admit_together", 1), len(run.waiting))
            # What can be copied need not be read, so there is nothing to wait for.
            copied = isinstance(self._model, ForkingModel) and run.waiting[0].prefix in run.holds.values()
            if run.running and len(run.free) < together and not copied:
                break
            new = [run.waiting.popleft() for _ in range(min(len(run.free), len(run.waiting)))]
            events += self._draw(run, new, self._admit(run, new))
        for slot in run.free:
            self._release(run, slot)
        return events

    def _forget(self, run: _Run) -> None:
        """Everything that was read was read with other weights: it is to be read again."""
        run.after.clear()
        self._release_all(run)
        for sequence in run.running:
            sequence.sampled_by(self.weights)

    def _release(self, run: _Run, slot: int) -> None:
        if run.holds.pop(slot, None) is not None:
            self._model.free(slot)

    def _release_all(self, run: _Run) -> None:
        with torch.inference_mode():
            for slot in list(run.holds):
                self._release(run, slot)

    def _draw(self, run: _Run, sequences: list[_Sequence], logits: Tensor) -> list[RolloutEvent]:
        """Draw the next token of ``sequences`` from ``logits`` ``(n, vocabulary)``."""
        numbers = [s.draws[len(s.ids)] for s in sequences]
        uniform = torch.tensor(numbers, dtype=torch.float64, device=logits.device)
        drawn, plain, chosen = draw(logits, run.sampling, uniform, self._scratch)
        if not bool(plain.isfinite().all()):
            bad = sequences[int((~plain.isfinite()).nonzero()[0, 0])]
            raise NumericsError(
                f"nonfinite_logits: {self.policy.name} gives logits that are not finite "
                f"(prompt {bad.prompt}, token {len(bad.ids)}).",
                advice="The weights are damaged or overflow in this dtype; try dtype='float32'.",
            )
        events: list[RolloutEvent] = []
        for sequence, token, logprob, sampling_logprob in zip(
            sequences, drawn.tolist(), plain.tolist(), chosen.tolist(), strict=True
        ):
            sequence.ids.append(token)
            sequence.logprobs.append(logprob)
            sequence.sampling_logprobs.append(sampling_logprob)
            sequence.reason = self._reason(sequence, run.sampling)
            if sequence.reason is None:
                run.running.append(sequence)
                if run.deltas:
                    events.extend(_delta(sequence, None))
                continue
            run.free.append(sequence.slot)
            finished = self._finished(run, sequence)
            if run.deltas:
                events.extend(_delta(sequence, finished.generation.text))
            events.append(finished)
        return events

    def _admit(self, run: _Run, new: list[_Sequence]) -> Tensor:
        """Give slots to ``new``. A prefix that is held somewhere is copied, others are read, once each."""
        fork = self._model.fork if isinstance(self._model, ForkingModel) else None
        reads: dict[tuple[int, ...], list[int]] = {}

        def least_wanted(slot: int) -> tuple[bool, int]:
            return run.holds.get(slot) in run.after, slot

        for sequence in new:
            prefix = sequence.prefix
            known = prefix in run.after
            holding = [slot for slot, held in run.holds.items() if held == prefix] if known else []
            source = next((slot for slot in holding if slot in run.free), holding[0] if holding else None)
            if fork is None or source is None or prefix in reads:
                slot = min(run.free, key=least_wanted)
                self._release(run, slot)
                reads.setdefault(prefix, []).append(slot)
            else:
                slot = source if source in run.free else min(run.free, key=least_wanted)
                if slot != source:
                    self._release(run, slot)
                fork(source, slot, len(prefix))
            run.free.remove(slot)
            run.holds[slot] = prefix
            sequence.slot = slot
            sequence.draws = uniforms(sequence.seed, sequence.budget)
            sequence.sampled_by(self.weights)
            if run.deltas or run.sampling.stop:
                sequence.text = TextStream(self.policy.renderer.decode, run.sampling.stop)
                if sequence.ids:
                    sequence.text.feed(sequence.ids)
        if reads:
            logits = self._model.prefill([*reads], [*reads.values()])
            run.after.update(zip(reads, logits, strict=True))
        found = torch.stack([run.after[sequence.prefix] for sequence in new])
        wanted = {s.prefix for s in run.waiting}
        run.after = {prefix: after.clone() for prefix, after in run.after.items() if prefix in wanted}
        return found

    def _reason(self, sequence: _Sequence, sampling: Sampling) -> FinishReason | None:
        token = sequence.ids[-1]
        if token in self.policy.end_ids:
            return FinishReason.stop
        if sequence.text is not None and sequence.text.feed([token]):
            return FinishReason.stop_string
        if len(sequence.ids) >= sequence.budget:
            return FinishReason.length if sequence.budget == sampling.max_tokens else FinishReason.context
        return None

    def _finished(self, run: _Run, sequence: _Sequence) -> Finished:
        ids = sequence.ids
        reason = sequence.reason
        assert reason is not None
        text = self.policy.renderer.decode(ids[:-1] if reason is FinishReason.stop else ids)
        if reason is FinishReason.stop_string:
            text = text[: min((text.index(s) for s in run.sampling.stop if s in text), default=None)]
        return Finished(
            sequence.prompt,
            sequence.sample,
            Generation(
                prompt_ids=sequence.prompt_ids,
                ids=tuple(ids),
                text=text,
                logprobs=tuple(sequence.logprobs),
                sampling_logprobs=tuple(sequence.sampling_logprobs),
                finish_reason=reason,
                seed=sequence.seed,
                segments=sequence.segments,
            ),
        )

    def _refuse_if_busy(self) -> None:
        if self._busy:
            raise BadInputError(
                "This engine is sampling already.", advice="Finish or close that iterator, or make another."
            )

    def _changed_meanwhile(self) -> NumericsError:
        return NumericsError(
            f"stale_weights: the weights of {self.policy.name} changed while answers were being sampled.",
            advice="Call sync() on the engine after an update, so that answers know what sampled them.",
        )


def decode_model(policy: LanguagePolicy, slots: int) -> DecodeModel:
    """The fastest model that is right for the policy: the own network, else transformers' modules."""
    network = Network.of(policy)
    return TransformersDecode(policy, slots) if network is None else NetworkDecode(policy, network, slots)


def _resume(sequences: list[_Sequence], partials: Sequence[Partial], sampling: Sampling) -> None:
    """Give the sequences what was sampled of them before.

    Raises:
        BadInputError: a partial answer of another prompt, seed or setting.
    """
    by_seed = {s.seed: s for s in sequences}
    settings = sampling.model_copy(update={"n": 1, "seed": None})
    for partial in partials:
        found = by_seed.get(partial.seed)
        theirs = partial.sampling.model_copy(update={"n": 1, "seed": None})
        if partial.finish_reason is None and found is not None and len(partial.ids) >= found.budget:
            found = None
        if found is None or found.prompt_ids != partial.prompt_ids or theirs != settings:
            raise BadInputError(
                "A partial answer belongs to another prompt, seed or sampling setting.",
                advice="Resume with exactly the call that was interrupted.",
            )
        if len(partial.ids) < len(found.ids):
            continue  # the same answer, from earlier
        found.ids = list(partial.ids)
        found.logprobs = list(partial.logprobs)
        found.sampling_logprobs = list(partial.sampling_logprobs)
        found.reason = partial.finish_reason
        starts = np.cumsum([0, *(s.tokens for s in partial.segments)]).tolist()
        found.versions = [(start, s.weights) for start, s in zip(starts, partial.segments, strict=False)]


def _delta(sequence: _Sequence, whole: str | None) -> list[RolloutEvent]:
    """What is new since the last delta; ``whole`` is the final text at the end."""
    assert sequence.text is not None
    text = sequence.text.take(whole)
    start, sequence.told = sequence.told, len(sequence.ids)
    if not text and whole is None and start == sequence.told:
        return []
    return [
        Delta(
            prompt=sequence.prompt,
            sample=sequence.sample,
            text=text,
            ids=tuple(sequence.ids[start:]),
            logprobs=tuple(sequence.logprobs[start:]),
            sampling_logprobs=tuple(sequence.sampling_logprobs[start:]),
        )
    ]


@contextmanager
def _evaluating(policy: LanguagePolicy) -> Iterator[None]:
    """No dropout while sampling, whatever the trainer has set."""
    training = policy.model.training
    policy.model.eval()
    try:
        yield
    finally:
        policy.model.train(training)
