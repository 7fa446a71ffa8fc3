"""From feedback to a policy version, in one call: any algorithm that learns from what is there.

    from corrigible.align import train
    version = train("kto", store, "smollm2-135m", out="runs/kto")

The algorithm's entry in the registry says which signals it learns from and how they become examples; what
is here is the same for all of them: lineage, a measurement on comparisons that were held out, resuming,
several processes, and the description of what came out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from corrigible.align.config import TrainConfig
from corrigible.align.distributed import join
from corrigible.align.implicit_reward import implicit_reward_accuracy
from corrigible.align.learnable import check_signals, load_for, nothing_to_learn_from
from corrigible.align.registry import Algorithm, AlgorithmConfig, Conditions, get_algorithm
from corrigible.align.sources import ListSource, PairSource
from corrigible.align.trainer import Trainer, TrainResult
from corrigible.align.unpaired import UnpairedSource
from corrigible.errors import BadInputError
from corrigible.events import Message, emit
from corrigible.files import write_atomically
from corrigible.models import LanguagePolicy, Renderer, load_policy
from corrigible.records import Episode, PolicyVersion, TrainedOn
from corrigible.store import Pair, Store

LINEAGE = "trained_on.txt"
"""File in the run's folder: ids of the judgements behind the training examples, one a line."""

USUAL: dict[str, Callable[..., ListSource[Any]]] = {"pairs": PairSource, "unpaired": UnpairedSource}
"""The source of each kind of examples, where an algorithm has none of its own."""


def train(
    algorithm: str,
    signals: Iterable[Any] | Store,
    model: str | Path | LanguagePolicy = "smollm2-135m",
    *,
    out: str | Path,
    config: TrainConfig | None = None,
    algorithm_config: AlgorithmConfig | None = None,
    lora_rank: int | None = 16,
    max_length: int = 512,
    held_out: Sequence[Pair] = (),
    split: str = "auto",
    name: str | None = None,
    parent: str | None = None,
    store: Store | None = None,
    invalid: Literal["raise", "skip"] = "skip",
    resume: bool = False,
    resume_hint: str = "Run it again with resume=True to go on from there.",
) -> PolicyVersion:
    """Train a policy by an algorithm of the registry and describe what came out.

    Under torchrun every process calls this with the same arguments, and gets the same version.

    Args:
        algorithm: its name (``corrigible algorithms`` lists them).
        signals: what to learn from, in the shape that the algorithm's entry names
            (:mod:`corrigible.store.signals`), or a store whose live feedback to learn from.
        model: a name or folder to load, or a policy in memory (trained in place).
        out: folder of the run; ``adapter/``, ``policy.json``, ``trained_on.txt`` (ids of the
            judgements) and ``metrics.jsonl`` are in it at the end.
        config: the trainer's settings.
        algorithm_config: the algorithm's own.
        lora_rank: rank of the fresh adapter (scaled by ``alpha = 2 rank``); ``None`` trains all
            weights. A policy that already has an adapter is trained on in that one.
        max_length: longest prompt and response in tokens; older prompt tokens are cut.
        held_out: comparisons to measure the implicit reward on, whatever the algorithm learns from.
            None of the judgements behind them may be behind the signals as well.
        split: which pairs hang together (:mod:`corrigible.rewards.splits`), for the interval.
        name: of the new version.
        parent: id of the version it came from.
        store: where the episodes behind the signals are, so that sampled responses are trained on as
            they were sampled; ``signals`` itself when that is a store. Nothing is written to it.
        invalid: whether unusable signals (equal sides, nothing said, too long) stop the run or are
            left out and counted.
        resume: go on with the run in ``out``.
        resume_hint: what to tell a user who interrupts.

    Returns:
        The version, with lineage in ``trained_on`` and ``scores`` (``implicit_reward_accuracy`` when
        pairs were held out). It is also in ``out/policy.json``. Where training put something before the
        prompt that must be there when the policy is used, that is in ``config["serving"]``.

    Raises:
        BadInputError: there is no such algorithm, it needs groups that are sampled while it trains, it
            cannot learn from these signals or from anything in the store, or held-out judgements are
            also trained on.
        BadInputError, NumericsError, StorageError, Interrupted: as :class:`Trainer` and the source.
    """
    entry = get_algorithm(algorithm)
    out, config = Path(out), config or TrainConfig()
    settings = algorithm_config or entry.config()
    serving = entry.serving(settings) if entry.serving is not None else None
    if isinstance(signals, Store):
        store = store or signals
        found = load_for(signals, entry)
        if not found:
            raise nothing_to_learn_from(signals, entry)
    else:
        found = list(signals)
        check_signals(entry, found)
    world = join()  # before a policy is loaded: it chooses this process's GPU
    policy = model if isinstance(model, LanguagePolicy) else load_policy(model)
    if lora_rank is not None and not policy.has_adapter:
        policy.add_lora(rank=lora_rank, alpha=2 * lora_rank, seed=config.seed)
    episodes = _episodes(store, [*found, *held_out])
    source = make_source(
        entry,
        found,
        policy.renderer,
        settings,
        max_length=max_length,
        seed=config.seed,
        invalid=invalid,
        episodes=episodes,
    )
    test = None
    if held_out:
        _check_disjoint(found, held_out)
        test = PairSource(
            _as_served(held_out, serving),
            policy.renderer,
            max_length=max_length,
            invalid="skip",
            episodes=episodes,
        )
    weights = {} if store is None else {version.id: version.weights for version in store.policies()}
    trainer = Trainer(
        policy,
        entry,
        source,
        config,
        algorithm_config=settings,
        out=out,
        held_out=test,
        behaviour_weights=weights,
        resume_hint=resume_hint,
    )
    result = trainer.train(resume=resume)

    def describe() -> PolicyVersion:
        # The version states a digest; the ids themselves go beside it, for whoever registers the version.
        write_atomically(out / LINEAGE, "".join(f"{one}\n" for one in source.derived_from()).encode())
        scores: dict[str, Any] = {f"train/{key}": value for key, value in result.metrics.items()}
        if test is not None and trainer.held_out_reference is not None:
            measured = implicit_reward_accuracy(
                policy,
                test,
                beta=_beta(entry, settings),
                reference=trainer.held_out_reference,
                micro_batch_tokens=config.micro_batch_tokens,
                by=split,
            )
            scores["implicit_reward_accuracy"] = measured.to_json()["accuracy"]
            scores["implicit_reward_margin"] = float(measured.margins.mean())
        described: dict[str, Any] = {
            entry.name: settings.model_dump(mode="json"),
            "train": config.model_dump(mode="json"),
            "lora_rank": lora_rank,
            "max_length": max_length,
            "steps": result.steps,
        }
        if serving is not None:
            described["serving"] = serving.to_json()
        version = PolicyVersion(
            name=name or f"{Path(policy.base_name).name}-{entry.name}",
            parent=parent,
            base_model=policy.base_name,
            weights=result.weights_sha256,
            adapter=str(result.weights) if policy.has_adapter else None,
            algorithm=entry.name,
            config=described,
            trained_on=trained_on(source),
            scores=scores,
        )
        return _keep(out / "policy.json", version, result)

    with world.together():
        return world.by_lead(describe)


def make_source(
    algorithm: Algorithm,
    signals: Sequence[Any],
    renderer: Renderer,
    config: AlgorithmConfig,
    *,
    max_length: int = 512,
    seed: int = 0,
    invalid: Literal["raise", "skip"] = "raise",
    episodes: Mapping[str, Episode] | None = None,
) -> ListSource[Any]:
    """The examples that an algorithm makes of signals: its own source, or the usual one of its kind.

    Args:
        algorithm: a registry entry.
        signals: in the shape that the entry names.
        renderer: turns messages into token ids (the policy's own).
        config: the algorithm's settings.
        max_length: longest row in tokens.
        seed: of the order of examples.
        invalid: ``"raise"`` stops at the first unusable signal, ``"skip"`` leaves such ones out and counts.
        episodes: episodes by id.

    Raises:
        BadInputError: there is no source of this kind, or what the source itself raises.
    """
    settings: dict[str, Any] = {
        "max_length": max_length,
        "seed": seed,
        "invalid": invalid,
        "episodes": episodes or {},
    }
    if algorithm.make_source is not None:
        return cast(ListSource[Any], algorithm.make_source(signals, renderer, config, **settings))
    if algorithm.source not in USUAL:
        raise BadInputError(
            f"There is no usual source of {algorithm.source} for '{algorithm.name}'.",
            advice="Give its @algorithm entry a make_source.",
        )
    return USUAL[algorithm.source](signals, renderer, **settings)


def lineage(out: str | Path) -> list[str]:
    """Ids of the judgements that the run in ``out`` was trained on, sorted."""
    return (Path(out) / LINEAGE).read_text(encoding="utf-8").split()


def trained_on(source: ListSource[Any]) -> TrainedOn:
    """The lineage of everything that ``source`` can hand out."""
    counted: dict[str, Any] = {
        source.kind: len(source),
        "skipped": dict(source.skipped),
        "data": source.digest(),
    }
    return TrainedOn.of(source.derived_from(), **counted)


def _as_served(pairs: Sequence[Pair], serving: Conditions | None) -> Sequence[Pair]:
    """Pairs whose prompts are dressed as the policy is to be asked, as far as the prompts alone allow it."""
    if serving is None:
        return pairs
    try:
        # The recorded tokens of a response follow its bare prompt.
        return [
            replace(
                pair, prompt=tuple(serving.apply(pair.prompt)), chosen_episode=None, rejected_episode=None
            )
            for pair in pairs
        ]
    except BadInputError as error:
        emit(Message(text=f"Held-out prompts are used without the serving prefix: {error.message}"))
        return pairs


def _beta(algorithm: Algorithm, config: AlgorithmConfig) -> float:
    """The scale of implicit rewards: the algorithm's where it is a coefficient of the log-ratio, else 1."""
    beta = getattr(config, "beta", None)
    held_near = algorithm.needs_reference and config.uses_reference
    return float(beta) if held_near and isinstance(beta, float) and beta > 0.0 else 1.0


def _keep(path: Path, version: PolicyVersion, result: TrainResult) -> PolicyVersion:
    # Resuming a run that had finished describes the same version: it keeps its id and its date.
    try:
        kept = PolicyVersion.model_validate(json.loads(path.read_text()))
    except (OSError, ValueError):
        kept = None
    if kept is not None and kept.weights == result.weights_sha256:
        return kept
    write_atomically(path, (version.model_dump_json(indent=1) + "\n").encode())
    return version


def _named_episodes(signal: Any) -> Collection[str]:
    """The episodes that a signal's responses were sampled in, as far as they are known."""
    one = (getattr(signal, name, None) for name in ("episode", "chosen_episode", "rejected_episode"))
    return [name for name in (*one, *getattr(signal, "episodes", ())) if name is not None]


def _episodes(store: Store | None, signals: Sequence[Any]) -> Mapping[str, Episode]:
    if store is None:
        return {}
    wanted = {name for signal in signals for name in _named_episodes(signal)}
    found = {}
    for name in sorted(wanted):
        try:
            found[name] = store.episode(name)
        except BadInputError:
            continue  # judged from a file that came without its episodes: the text is used
    if len(found) < len(wanted):
        emit(
            Message(
                text=f"{len(wanted) - len(found)} judged episodes are not in the store; their text is used."
            )
        )
    return found


def _check_disjoint(signals: Sequence[Any], held_out: Sequence[Pair]) -> None:
    seen = {record for signal in signals for record in signal.derived_from}
    shared = sum(1 for pair in held_out if not seen.isdisjoint(pair.derived_from))
    if shared:
        raise BadInputError(
            f"{shared} held-out pairs are also trained on.",
            advice="Split with corrigible.rewards.splits.split, and keep other signals apart from the "
            "held-out pairs with corrigible.align.learnable.apart_from.",
        )
