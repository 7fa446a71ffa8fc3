"""The algorithms, each a named triple: where examples come from, what they are worth, how the policy moves.

An algorithm is one objective (a function of scored examples) and one registry entry::

    @algorithm("dpo", source="pairs", weight="judgement", config=DPOConfig, learns_from=..., paper=...)
    def dpo(batch: ScoredExamples[PairExample], config: DPOConfig) -> LossOutput: ...

The trainer never asks which algorithm it runs. It hands an objective the log-prob of every scored token;
whoever wants sums asks for :meth:`ScoredExamples.policy_logps`.

An optimiser batch is cut into micro-batches by memory alone, so an objective never averages over what
it sees: it divides by ``denominator`` (the weight of the whole batch). When that is not all it must know
of the whole batch, its entry has a ``measure``, which is asked once before the first micro-batch, with
the log-probs of further rows (``probes``) where it wants them. KTO's reference point and GRPO's token
counts are such measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from corrigible.align.losses import LossOutput, dpo_loss
from corrigible.align.sources import Example, PairExample, Source
from corrigible.errors import BadInputError
from corrigible.models import Rendered, Renderer
from corrigible.models.scoring import RowScores
from corrigible.records import Episode, Message
from corrigible.store.conversions import kinds_for

E = TypeVar("E", bound=Example)
C = TypeVar("C", bound="AlgorithmConfig")


class AlgorithmConfig(BaseModel):
    """Base of every algorithm's settings: frozen, and unknown keys are refused by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def uses_reference(self) -> bool:
        """Whether these settings need the reference that the algorithm may declare."""
        return True

    @property
    def scored_at(self) -> float:
        """The temperature at which the objective's log-probs are computed."""
        return 1.0

    @property
    def expected_at(self) -> float | None:
        """The temperature of tokens whose expected log-prob the objective asks for; infinity draws evenly."""
        return None

    @property
    def asks_entropy(self) -> bool:
        """Whether the objective asks for the entropy before every scored token."""
        return False


@dataclass(frozen=True)
class ScoredExamples(Generic[E]):
    """Examples with the log-probs of their rows: everything an objective may look at.

    Attributes:
        examples: the examples, in order.
        policy: per row (all rows of example 0, then of example 1, ...) the log-probs of its scored
            tokens under the policy, ``(tokens,)`` float32, with gradient.
        reference: the same under the frozen reference, without gradient; ``None`` for an
            algorithm that needs none.
        denominator: total weight of the whole batch, of which these may be a micro-batch.
        whole: what the algorithm's ``measure`` found in the whole batch; ``None`` when it has none.
        asked: per row what else the settings ask for (``expected_at``, ``asks_entropy``), at its scored
            tokens; ``None`` when they ask for nothing. Entropies and expected log-probs have a gradient.
    """

    examples: Sequence[E]
    policy: Sequence[Tensor]
    reference: Sequence[Tensor] | None
    denominator: float
    whole: Any = None
    asked: RowScores | None = None

    def policy_logps(self) -> Tensor:
        """Summed log-probs of every row under the policy, ``(rows,)``, nats, with gradient."""
        return torch.stack([tokens.sum() for tokens in self.policy])

    def reference_logps(self) -> Tensor:
        """Summed log-probs of every row under the reference, ``(rows,)``, nats."""
        if self.reference is None:
            raise BadInputError(
                "This objective needs reference log-probs and its algorithm declares needs_reference=False.",
                advice="Declare needs_reference=True in its @algorithm entry.",
            )
        return torch.stack([tokens.sum() for tokens in self.reference])

    def column(self, name: str) -> Tensor:
        """One number of every example (``weight``, ``p_chosen``, ...) as ``(examples,)`` float32."""
        device = self.policy[0].device
        return torch.tensor([float(getattr(e, name)) for e in self.examples], device=device)


class Objective(Protocol):
    """A function from scored examples and the algorithm's config to a loss."""

    def __call__(self, batch: ScoredExamples[Any], config: Any) -> LossOutput: ...


class Probes(Protocol):
    """Rows besides the examples' own that are scored, without gradient, before a batch is learnt from."""

    def __call__(self, examples: Sequence[Any], /) -> Sequence[Rendered]: ...


class MakeSource(Protocol):
    """From signals (:mod:`corrigible.store.signals`) to the source of one algorithm's examples."""

    def __call__(
        self,
        signals: Sequence[Any],
        renderer: Renderer,
        config: Any,
        /,
        *,
        max_length: int,
        seed: int,
        invalid: Literal["raise", "skip"],
        episodes: Mapping[str, Episode],
    ) -> Source: ...


class Conditions(Protocol):
    """What a policy was conditioned on in training, as a prefix that whoever uses it must give it."""

    def to_json(self) -> Any: ...

    def apply(self, messages: Sequence[Message], /) -> Sequence[Message]: ...


class MakeServing(Protocol):
    """From an algorithm's settings to what its policy must be given when it is used."""

    def __call__(self, config: Any, /) -> Conditions | None: ...


class Measure(Protocol):
    """What micro-batches must know of the whole batch.

    It sees all examples; ``policy`` and ``reference`` are the log-probs of the *probes*, in order, both
    without gradient.
    """

    def __call__(self, batch: ScoredExamples[Any], config: Any, /) -> Any: ...


@dataclass(frozen=True)
class Algorithm:
    """A registry entry.

    Attributes:
        name: what users type.
        source: the kind of examples it trains on (``"pairs"``, ``"unpaired"``, ``"tokens"``, ``"groups"``).
        weight: what an example is worth (``"judgement"``: the weight of the judgements behind it;
            ``"group advantage"``: how much better it is than the other answers to its prompt).
        objective: the loss on scored examples.
        config: its typed settings, with documented defaults.
        learns_from: the feedback kinds it can learn from.
        needs_reference: whether log-probs under the frozen reference are computed for it (unless its
            settings do not use them).
        paper: where it comes from.
        doc: what it does and when to choose it.
        probes: further rows to score without gradient before every batch, if any.
        measure: what its micro-batches must know of the whole batch, if anything.
        signal: the shape of feedback that its source is made of (a key of
            :data:`corrigible.store.conversions.SIGNALS`).
        make_source: its source from such signals; ``None`` when it is the usual one of that kind.
        family: which table and which page it stands on (``"contrast"``, ``"tokens"``, ``"online"``).
        claim: id of the claim that tests its paper's headline (``"S188"``); empty when there is none.
        serving: what stands before a prompt in training and must be there in use, by its settings; ``None``
            when that is nothing.
        loads: options of :func:`corrigible.store.conversions.load_signals` that its signals are loaded with.
    """

    name: str
    source: str
    weight: str
    objective: Objective
    config: type[AlgorithmConfig]
    learns_from: frozenset[str]
    needs_reference: bool
    paper: str
    doc: str
    probes: Probes | None = None
    measure: Measure | None = None
    signal: str = "pairs"
    make_source: MakeSource | None = None
    family: str = "contrast"
    claim: str = ""
    serving: MakeServing | None = None
    loads: Mapping[str, Any] = field(default_factory=dict)


ALGORITHMS: dict[str, Algorithm] = {}
"""Every algorithm by name."""


def algorithm(
    name: str,
    *,
    source: str,
    weight: str,
    config: type[AlgorithmConfig],
    paper: str,
    learns_from: Iterable[str] | None = None,
    needs_reference: bool = True,
    probes: Probes | None = None,
    measure: Measure | None = None,
    signal: str = "pairs",
    make_source: MakeSource | None = None,
    family: str = "contrast",
    claim: str = "",
    serving: MakeServing | None = None,
    loads: Mapping[str, Any] | None = None,
) -> Callable[[Objective], Objective]:
    """Register the decorated objective under ``name``; its docstring becomes the entry's ``doc``.

    The arguments are the attributes of :class:`Algorithm`. ``learns_from`` need not be given: an algorithm
    learns from all kinds that its signal is made of.

    Raises:
        BadInputError: the name is taken, or the objective has no docstring.
    """

    def register(objective: Objective) -> Objective:
        if name in ALGORITHMS:
            raise BadInputError(f"The algorithm '{name}' is already registered.", advice="Pick another name.")
        doc = (objective.__doc__ or "").strip()
        if not doc:
            raise BadInputError(
                f"The algorithm '{name}' has no docstring.", advice="Say what it does and when."
            )
        ALGORITHMS[name] = Algorithm(
            name=name,
            source=source,
            weight=weight,
            objective=objective,
            config=config,
            learns_from=kinds_for(signal) if learns_from is None else frozenset(learns_from),
            needs_reference=needs_reference,
            paper=paper,
            doc=doc,
            probes=probes,
            measure=measure,
            signal=signal,
            make_source=make_source,
            family=family,
            claim=claim,
            serving=serving,
            loads=dict(loads or {}),
        )
        return objective

    return register


def get_algorithm(name: str) -> Algorithm:
    """The entry of that name.

    Raises:
        BadInputError: there is none.
    """
    if name not in ALGORITHMS:
        raise BadInputError(
            f"There is no algorithm '{name}'.", advice=f"Known: {', '.join(sorted(ALGORITHMS))}."
        )
    return ALGORITHMS[name]


PAIR_KINDS = kinds_for("pairs")
"""Feedback kinds of which pairs are made."""


class DPOConfig(AlgorithmConfig):
    """Settings of DPO."""

    beta: float = Field(
        0.1, gt=0, description="KL coefficient: small lets the policy move far, large keeps it near."
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Assumed share of flipped labels (cDPO); 0 trusts every label."
    )


@algorithm(
    "dpo",
    source="pairs",
    weight="judgement",
    config=DPOConfig,
    paper="Rafailov et al. 2023, Direct Preference Optimization (arXiv:2305.18290); cDPO: Mitchell 2023",
    claim="S188",
)
def dpo(batch: ScoredExamples[PairExample], config: DPOConfig) -> LossOutput:
    """Direct preference optimisation: fit the policy's implicit reward to comparisons.

    Choose it first: it needs pairs, one model in memory, and no sampling while it trains. With
    noisy labels set ``label_smoothing``; votes are used as soft labels as they are.
    """
    policy, reference = batch.policy_logps(), batch.reference_logps()
    return dpo_loss(
        policy[0::2],
        policy[1::2],
        reference[0::2],
        reference[1::2],
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        p_chosen=batch.column("p_chosen"),
        weight=batch.column("weight"),
        denominator=batch.denominator,
    )
