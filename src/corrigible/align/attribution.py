"""Where every trained token comes from, and why the policy disagrees with whoever sampled it.

A token that is learnt from was sampled by this run's policy, sampled by an earlier one (replayed),
written by a person into a sampled answer (edited), or written by somebody else altogether
(demonstrated). Only the first two have a behaviour policy, and only some of those have recorded
log-probs: what is not known is ``None`` and is counted apart, never replaced by a number.

Where it is known, the log-ratio ``log pi(now) - log q(behaviour)`` of a token telescopes into departures
that have different cures. With ``b`` the plain log-prob recomputed under the very weights that
sampled, ``p`` the plain one recorded then and ``q`` the recorded one of the distribution really drawn from::

    log pi - log q  =  (log pi - b)  +  (b - p)   +  (p - q)
                       staleness        numerics     truncation

*Staleness* is other weights: sample again, or more often. *Numerics* is the same weights computed
otherwise (another precision, another kernel, or recorded weights that are not the ones claimed).
*Truncation* is the sampler: temperature, top-k, top-p, min-p. The mismatch algebra follows verl's
``rollout_corr_math``, with truncation taken out of the mismatch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from corrigible.align.passes import passes
from corrigible.align.sources import row_key
from corrigible.errors import BadInputError
from corrigible.events import Metric
from corrigible.intervals import Estimate, cluster_bootstrap
from corrigible.models import Generation, LanguagePolicy, Rendered, Renderer, TokenKind
from corrigible.models.scoring import Scorer
from corrigible.records import Episode, FinishReason, MessageLike, Sampling

_ROUNDING_NATS = 1e-3  # float32 softmax may put a certain token this far above 0


class Origin(StrEnum):
    """Who wrote a token that is learnt from."""

    sampled = "sampled"
    """Drawn by a policy for this run."""
    replayed = "replayed"
    """Drawn by a policy of an earlier run, and read back from its record."""
    edited = "edited"
    """In an answer that a person corrected, from the first token on that the policy did not say."""
    demonstrated = "demonstrated"
    """Written by a person, or by a policy that nobody recorded."""


DRAWN = (Origin.sampled, Origin.replayed)
"""The origins that have a behaviour policy."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """Log-probs of consecutive tokens as noted when they were drawn, one per token, nats.

    Attributes:
        plain: under the model itself, temperature 1, nothing cut.
        drawn: under the distribution that they were really drawn from.
    """

    plain: tuple[float, ...]
    drawn: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive scored tokens of one origin.

    Attributes:
        origin: who wrote them.
        tokens: how many.
        version: the policy version that drew them (its id, or the checksum of its weights); ``None``
            for people, and where it is not known.
        recorded: their behaviour log-probs; ``None`` where they are not known.

    Raises:
        BadInputError: log-probs for tokens that no policy drew, or not one finite log-prob per token.
    """

    origin: Origin
    tokens: int
    version: str | None = None
    recorded: Recorded | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise BadInputError(f"A stretch has at least one token, not {self.tokens}.")
        if self.origin not in DRAWN and (self.version, self.recorded) != (None, None):
            raise BadInputError(
                f"not_sampled: {self.origin} tokens have no behaviour policy and no behaviour log-prob.",
                advice="Leave version and recorded out; what no policy drew is counted as unknown.",
            )
        if self.recorded is None:
            return
        for name, values in (("plain", self.recorded.plain), ("drawn", self.recorded.drawn)):
            if len(values) != self.tokens:
                raise BadInputError(
                    f"behaviour_shape: {len(values)} {name} log-probs for {self.tokens} tokens.",
                    advice="They belong to other tokens: was the text tokenised a second time?",
                )
            if not all(math.isfinite(value) and value <= _ROUNDING_NATS for value in values):
                raise BadInputError(
                    f"behaviour_not_finite: a {name} log-prob is NaN, infinite or positive.",
                    advice="A log-prob that is not known is None for the whole stretch, never a number.",
                )


@dataclass(frozen=True, slots=True)
class TracedRow:
    """A row to learn from together with the origin of each of its scored tokens.

    Attributes:
        row: the tokens.
        stretches: of its scored tokens, in order.
        cluster: the independent unit that it belongs to (its prompt or task), for intervals.

    Raises:
        BadInputError: the stretches do not cover the scored tokens, or call sampled what the row
            says nobody sampled (or the other way round).
    """

    row: Rendered
    stretches: tuple[Stretch, ...]
    cluster: Hashable

    def __post_init__(self) -> None:
        places = self.row.scored
        if sum(stretch.tokens for stretch in self.stretches) != len(places):
            raise BadInputError(
                f"origin_shape: origins of {sum(s.tokens for s in self.stretches)} tokens for "
                f"{len(places)} scored ones."
            )
        start = 0
        for stretch in self.stretches:
            wanted = TokenKind.SAMPLED if stretch.origin in DRAWN else TokenKind.NOT_SAMPLED
            for place in places[start : start + stretch.tokens]:
                if self.row.kinds[place] is not wanted:
                    raise BadInputError(
                        f"origin_mismatch: token {place} is {self.row.kinds[place].name}, its origin "
                        f"{stretch.origin}.",
                        advice="An answer of the prompt, or written by a person, is not sampled.",
                    )
            start += stretch.tokens

    @property
    def versions(self) -> frozenset[str]:
        """The policy versions that drew tokens with recorded log-probs."""
        return frozenset(s.version for s in self.stretches if s.version is not None and s.recorded)


# -- from records ---------------------------------------------------------------------------------


def trace_generation(
    generation: Generation, *, cluster: Hashable | None = None, version: str | None = None
) -> TracedRow:
    """An answer that was sampled for this run.

    Args:
        generation: what was sampled. Its own note of which weights drew which tokens is kept.
        cluster: its unit for intervals; its prompt when absent.
        version: of the policy, where the generation does not say.

    Raises:
        BadInputError: it failed or is empty, or its log-probs are not one per token.
    """
    if generation.error is not None or not generation.ids:
        raise BadInputError(
            f"empty_answer: there is nothing to learn from ({generation.error or 'no token'})."
        )
    segments: list[tuple[str | None, int]] = [(each.weights, each.tokens) for each in generation.segments]
    stretches = []
    start = 0
    for name, tokens in segments or [(version, len(generation.ids))]:
        part = slice(start, start + tokens)
        recorded = Recorded(generation.logprobs[part], generation.sampling_logprobs[part])
        stretches.append(Stretch(Origin.sampled, tokens, name, recorded))
        start += tokens
    unit = generation.prompt_ids if cluster is None else cluster
    return TracedRow(generation.rendered(), tuple(stretches), unit)


def trace_episode(
    episode: Episode,
    *,
    fresh: Collection[str] = (),
    end_ids: Collection[int] = (),
    cluster: Hashable | None = None,
) -> TracedRow:
    """All turns of a recorded conversation, exactly the tokens that were sampled.

    Args:
        episode: a text episode whose steps have their token ids.
        fresh: ids of the policy versions whose episodes are this run's own; tokens of any other
            version are replayed.
        end_ids: the policy's end-of-turn ids, to hold the recorded finish reasons against.
        cluster: its unit for intervals; its task when absent.

    Raises:
        BadInputError: ``no_tokens`` (a step without token ids), ``retokenised`` (a later prompt does not
            begin with the very tokens that came before it), or ``finish_reason`` (a turn that was
            cut is recorded as ended, or the other way round).
    """
    origin = Origin.sampled if episode.policy in fresh else Origin.replayed
    ids: tuple[int, ...] = ()
    kinds: tuple[TokenKind, ...] = ()
    stretches = []
    for number, step in enumerate(episode.steps):
        if not step.token_ids or not step.prompt_token_ids:
            raise BadInputError(
                f"no_tokens: step {number} of episode {episode.id} has no sampled tokens.",
                advice="What no policy sampled is a demonstration: use trace_demonstration.",
            )
        prompt, said = step.prompt_token_ids, step.token_ids
        if prompt[: len(ids)] != ids:
            raise BadInputError(
                f"retokenised: the prompt of step {number} of episode {episode.id} does not begin with the "
                "tokens that were read and sampled before.",
                advice="The conversation was rendered again from its text, or the template rewrites earlier "
                "turns: train on each turn alone.",
            )
        _check_finish(step.finish_reason, said, end_ids, f"step {number} of episode {episode.id}")
        kinds += (TokenKind.PROMPT,) * (len(prompt) - len(ids)) + (TokenKind.SAMPLED,) * len(said)
        ids = prompt + said
        drawn = step.info.get("sampling_logprobs")
        recorded = None
        if step.logprobs is not None:
            if isinstance(drawn, list):
                recorded = Recorded(step.logprobs, tuple(float(str(value)) for value in drawn))
            elif _is_plain(episode.sampling):
                recorded = Recorded(step.logprobs, step.logprobs)
        stretches.append(Stretch(origin, len(said), episode.policy, recorded))
    unit = episode.task if cluster is None else cluster
    return TracedRow(Rendered(ids, kinds), tuple(stretches), unit)


def trace_correction(
    prompt: Sequence[MessageLike],
    corrected: MessageLike,
    renderer: Renderer,
    original: TracedRow | None = None,
    *,
    cluster: Hashable,
) -> TracedRow:
    """A corrected answer: what the policy itself said up to the first change, edited text from there on.

    A kept token counts as sampled only while it and everything before it are the very ids that were
    sampled: behind a change the policy would have stood before another text, so its recorded
    log-probs say nothing there, even about words that stayed.

    Args:
        prompt: the conversation before the answer.
        corrected: the answer as the person left it.
        renderer: the policy's own.
        original: the answer as it was sampled, when it is known.
        cluster: its unit for intervals.

    Raises:
        BadInputError: the renderer refuses the conversation.
    """
    row = _to_last_scored(renderer.pair(prompt, [corrected]))
    scored = row.scored
    kept: list[Stretch] = []
    if original is not None and original.row.ids[: original.row.scored[0]] == row.ids[: scored[0]]:
        before = [original.row.ids[place] for place in original.row.scored]
        after = [row.ids[place] for place in scored]
        same = next(
            (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b),
            min(len(before), len(after)),
        )
        kept = _first(original.stretches, same)
    count = sum(stretch.tokens for stretch in kept)
    kinds = list(row.kinds)
    for place in scored[:count]:
        kinds[place] = TokenKind.SAMPLED
    rest = [Stretch(Origin.edited, len(scored) - count)] if count < len(scored) else []
    return TracedRow(replace(row, kinds=tuple(kinds)), (*kept, *rest), cluster)


def trace_demonstration(
    prompt: Sequence[MessageLike], response: Sequence[MessageLike], renderer: Renderer, *, cluster: Hashable
) -> TracedRow:
    """An answer that no recorded policy sampled.

    Raises:
        BadInputError: the renderer refuses the conversation.
    """
    row = _to_last_scored(renderer.pair(prompt, response))
    return TracedRow(row, (Stretch(Origin.demonstrated, len(row.scored)),), cluster)


def _to_last_scored(row: Rendered) -> Rendered:
    """Without what the template writes behind the answer, as sources leave it out."""
    end = row.scored[-1] + 1
    return replace(row, ids=row.ids[:end], kinds=row.kinds[:end])


def _check_finish(
    reason: FinishReason | None, said: Sequence[int], end_ids: Collection[int], where: str
) -> None:
    if reason is None or not end_ids:
        return
    if (reason is FinishReason.stop) != (said[-1] in end_ids):
        raise BadInputError(
            f"finish_reason: {where} finished with '{reason}', but its last token "
            f"{'ends' if said[-1] in end_ids else 'does not end'} a turn.",
            advice="An answer that was cut must not be trained on as if the policy had ended it.",
        )


def _is_plain(sampling: Sampling | None) -> bool:
    return sampling is not None and (
        sampling.temperature == 1.0
        and sampling.top_p == 1.0
        and sampling.top_k is None
        and sampling.min_p == 0.0
    )


def _first(stretches: Iterable[Stretch], tokens: int) -> list[Stretch]:
    """The first ``tokens`` tokens of some stretches."""
    found = []
    for stretch in stretches:
        take = min(stretch.tokens, tokens)
        if take == 0:
            break
        known = stretch.recorded
        found.append(
            replace(
                stretch,
                tokens=take,
                recorded=None if known is None else Recorded(known.plain[:take], known.drawn[:take]),
            )
        )
        tokens -= take
    return found


# -- the split ------------------------------------------------------------------------------------

CAUSES = ("staleness", "numerics", "truncation", "unresolved")
"""What a log-ratio is split into. ``unresolved`` is staleness and numerics together, of tokens whose
behaviour weights are not at hand to score them again."""


@dataclass(frozen=True, slots=True)
class Split:
    """Log-ratios by cause, ``(tokens,)`` float64 each, nats; the causes sum to the log-ratio."""

    staleness: Tensor
    numerics: Tensor
    truncation: Tensor
    unresolved: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """``log pi(now) - log q(behaviour)``, ``(tokens,)``."""
        return self.staleness + self.numerics + self.truncation + self.unresolved


def split_log_ratio(
    now: Tensor,
    plain: Tensor,
    drawn: Tensor,
    recomputed: Tensor | None,
    recomputed_plain: Tensor | None = None,
) -> Split:
    """Split ``now - drawn`` by cause; all columns ``(tokens,)``, nats.

    Args:
        now: under the current weights, at the temperature at which the objective scores.
        plain: recorded when the tokens were drawn, temperature 1, nothing cut.
        drawn: recorded, under the distribution really drawn from.
        recomputed: under the weights that drew the tokens, at the temperature of ``now``; ``None``
            when these weights are not at hand.
        recomputed_plain: the same at temperature 1, where ``now`` is at another one; what the
            temperature makes of the same weights is part of the truncation.

    Raises:
        BadInputError: shapes differ.
    """
    columns = [c for c in (now, plain, drawn, recomputed, recomputed_plain) if c is not None]
    if len({tuple(column.shape) for column in columns}) != 1 or now.ndim != 1:
        raise BadInputError(
            f"All columns must have one shape (tokens,), got {[tuple(c.shape) for c in columns]}."
        )
    now, plain, drawn = (column.detach().double().cpu() for column in (now, plain, drawn))
    nothing = torch.zeros_like(now)
    if recomputed is None:
        return Split(nothing, nothing, plain - drawn, now - plain)
    again = recomputed.detach().double().cpu()
    again_plain = again if recomputed_plain is None else recomputed_plain.detach().double().cpu()
    return Split(now - again, again_plain - plain, (again - again_plain) + (plain - drawn), nothing)


@dataclass(frozen=True)
class Attribution:
    """What a step's tokens are, and why the policy disagrees with their behaviour policies.

    Attributes:
        means: of ``log_ratio`` and of each of :data:`CAUSES`, nats per token of known behaviour, with
            95 % intervals over clusters; empty when no behaviour is known.
        shares: of each cause in the sum of absolute values over tokens and causes; they sum to 1, or are
            all 0 where nothing differs.
        tokens: how many of each origin.
        known: tokens with a behaviour log-prob.
        unknown: tokens without one.
    """

    means: Mapping[str, Estimate]
    shares: Mapping[str, float]
    tokens: Mapping[Origin, int]
    known: int
    unknown: int

    def metrics(self) -> dict[str, float]:
        """As plain numbers by name, for a step's metrics."""
        found = {f"off_policy/{name}": estimate.value for name, estimate in self.means.items()}
        found |= {f"off_policy/{cause}_share": share for cause, share in self.shares.items()}
        found |= {f"tokens/{origin}": float(self.tokens.get(origin, 0)) for origin in Origin}
        return found | {"tokens/behaviour_unknown": float(self.unknown)}

    def events(self, step: int) -> list[Metric]:
        """The means with their intervals, as events of a step."""
        return [
            Metric(
                name=f"train/off_policy/{name}", value=estimate.value, step=step, interval=estimate.interval
            )
            for name, estimate in self.means.items()
            if all(map(math.isfinite, estimate.interval))
        ]


Score = Callable[[Sequence[Rendered], float], Sequence[Tensor]]
"""Rows and a temperature to the log-probs of each row's scored tokens, ``(tokens,)`` each."""


def score_with(policy: LanguagePolicy, *, micro_batch_tokens: int = 4096) -> Score:
    """A :data:`Score` with the policy's weights as they stand at each call, without gradient."""

    def score(rows: Sequence[Rendered], temperature: float) -> Sequence[Tensor]:
        scorer = Scorer(policy)
        found: dict[int, Tensor] = {}
        for batch in passes(scorer, [[row] for row in rows], micro_batch_tokens):
            found |= zip(batch, scorer([[rows[i] for i in batch]], temperature=temperature), strict=True)
        return [found[i].detach().cpu() for i in range(len(rows))]

    return score


class Ledger:
    """The origins of a run's rows, and what each behaviour version's own weights make of them.

    The versions score their rows here, once, before the first step: afterwards the policy that the
    run began with is no longer there to be asked.

    Args:
        rows: what the run learns from.
        versions: how to score with the weights of a policy version, by its id or checksum. Tokens of
            versions that are not here count as ``unresolved``.
        temperature: at which the objective scores.
    """

    def __init__(
        self, rows: Sequence[TracedRow], versions: Mapping[str, Score], *, temperature: float = 1.0
    ) -> None:
        self._rows = {row_key(traced.row): traced for traced in rows}
        self._recomputed: dict[tuple[str, bytes], tuple[Tensor, Tensor]] = {}
        for version, score in versions.items():
            keys = [key for key, traced in self._rows.items() if version in traced.versions]
            if not keys:
                continue
            wanted = [self._rows[key].row for key in keys]
            at = score(wanted, temperature)
            plain = at if temperature == 1.0 else score(wanted, 1.0)
            self._recomputed |= {
                (version, key): pair for key, pair in zip(keys, zip(at, plain, strict=True), strict=True)
            }

    def attribute(self, rows: Sequence[Rendered], now: Sequence[Tensor]) -> Attribution:
        """Attribute the log-ratios of some of the run's rows.

        Args:
            rows: rows that this ledger was made of.
            now: the log-probs of their scored tokens under the current weights, ``(tokens,)`` each.

        Raises:
            BadInputError: a row that is not in the ledger, or log-probs that do not fit its tokens.
        """
        tokens: Counter[Origin] = Counter()
        parts: list[tuple[Hashable, Split]] = []
        for row, values in zip(rows, now, strict=True):
            key = row_key(row)
            traced = self._rows.get(key)
            if traced is None:
                raise BadInputError("origin_unknown: a trained row is not in the ledger of origins.")
            if tuple(values.shape) != (len(row.scored),):
                raise BadInputError(f"{tuple(values.shape)} log-probs for {len(row.scored)} scored tokens.")
            start = 0
            for stretch in traced.stretches:
                tokens[stretch.origin] += stretch.tokens
                part = slice(start, start + stretch.tokens)
                start += stretch.tokens
                if stretch.recorded is not None:
                    again = self._recomputed.get((stretch.version or "", key))
                    split = split_log_ratio(
                        values[part],
                        torch.tensor(stretch.recorded.plain, dtype=torch.float64),
                        torch.tensor(stretch.recorded.drawn, dtype=torch.float64),
                        *((None, None) if again is None else (again[0][part], again[1][part])),
                    )
                    parts.append((traced.cluster, split))
        known = sum(len(split.staleness) for _, split in parts)
        return Attribution(
            *_summary(parts), tokens=dict(tokens), known=known, unknown=sum(tokens.values()) - known
        )


def _summary(parts: Sequence[tuple[Hashable, Split]]) -> tuple[dict[str, Estimate], dict[str, float]]:
    """Means with intervals, and shares of the absolute attribution."""
    if not parts:
        return {}, dict.fromkeys(CAUSES, 0.0)
    units: dict[Hashable, int] = {}
    clusters = [units.setdefault(cluster, len(units)) for cluster, _ in parts]
    counts = [float(len(split.staleness)) for _, split in parts]
    means = {
        name: cluster_bootstrap(
            [float(getattr(split, name).sum()) for _, split in parts], clusters, per=counts
        )
        for name in ("log_ratio", *CAUSES)
    }
    sizes = {cause: sum(float(getattr(split, cause).abs().sum()) for _, split in parts) for cause in CAUSES}
    total = sum(sizes.values())
    return means, {cause: size / total if total else 0.0 for cause, size in sizes.items()}


def attribute(
    rows: Sequence[TracedRow],
    policy: LanguagePolicy,
    versions: Mapping[str, LanguagePolicy],
    *,
    temperature: float = 1.0,
) -> Attribution:
    """Attribute the log-ratios of rows under a policy as it stands, in one call.

    Args:
        rows: what is learnt from.
        policy: the current weights.
        versions: policies with the weights of the behaviour versions.
        temperature: at which the objective scores.
    """
    ledger = Ledger(
        rows, {name: score_with(each) for name, each in versions.items()}, temperature=temperature
    )
    rendered = [traced.row for traced in rows]
    return ledger.attribute(rendered, score_with(policy)(rendered, temperature))
