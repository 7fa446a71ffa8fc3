"""DPO from pairs to a policy version, in one call."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from corrigible.align.config import TrainConfig
from corrigible.align.distributed import join
from corrigible.align.implicit_reward import implicit_reward_accuracy
from corrigible.align.registry import DPOConfig, get_algorithm
from corrigible.align.sources import PairSource
from corrigible.align.trainer import Trainer, TrainResult
from corrigible.errors import BadInputError
from corrigible.events import Message, emit
from corrigible.files import write_atomically
from corrigible.models import LanguagePolicy, load_policy
from corrigible.records import Episode, PolicyVersion, TrainedOn
from corrigible.store import Pair, Store, load_pairs

LINEAGE = "trained_on.txt"
"""File in the run's folder: ids of the judgements behind the training pairs, one a line."""


def train_dpo(
    pairs: Iterable[Pair] | Store,
    model: str | Path | LanguagePolicy = "smollm2-135m",
    *,
    out: str | Path,
    config: TrainConfig | None = None,
    dpo: DPOConfig | None = None,
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
    """Train a policy on comparisons with DPO and describe what came out.

    Under torchrun every process calls this with the same arguments, and gets the same version.

    Args:
        pairs: what to learn from, or a store whose live comparisons to learn from.
        model: a name or folder to load, or a policy in memory (trained in place).
        out: folder of the run; ``adapter/``, ``policy.json``, ``trained_on.txt`` (ids of the
            judgements) and ``metrics.jsonl`` are in it at the end.
        config: the trainer's settings.
        dpo: the loss's settings.
        lora_rank: rank of the fresh adapter (scaled by ``alpha = 2 rank``); ``None`` trains all
            weights. A policy that already has an adapter is trained on in that one.
        max_length: longest prompt and response in tokens; older prompt tokens are cut.
        held_out: comparisons to measure the implicit reward on, before any of them is seen.
        split: which pairs hang together (:mod:`corrigible.rewards.splits`), for the interval.
        name: of the new version.
        parent: id of the version it came from.
        store: where the episodes behind the pairs are, so that sampled responses are trained on as
            they were sampled; ``pairs`` itself when that is a store. Nothing is written to it.
        invalid: whether unusable pairs (equal sides, nothing said, too long) stop the run or are
            left out and counted.
        resume: go on with the run in ``out``.
        resume_hint: what to tell a user who interrupts.

    Returns:
        The version, with lineage in ``trained_on`` and ``scores`` (``implicit_reward_accuracy`` when
        pairs were held out). It is also in ``out/policy.json``.

    Raises:
        BadInputError, NumericsError, StorageError, Interrupted: as :class:`Trainer` and
            :class:`PairSource`.
    """
    out, config, dpo = Path(out), config or TrainConfig(), dpo or DPOConfig()
    if isinstance(pairs, Store):
        store = store or pairs
        pairs = load_pairs(pairs, aggregate=True)
    pairs = list(pairs)
    world = join()  # before a policy is loaded: it chooses this process's GPU
    policy = model if isinstance(model, LanguagePolicy) else load_policy(model)
    if lora_rank is not None and not policy.has_adapter:
        policy.add_lora(rank=lora_rank, alpha=2 * lora_rank, seed=config.seed)
    episodes = _episodes(store, [*pairs, *held_out])
    source = PairSource(
        pairs,
        policy.renderer,
        max_length=max_length,
        seed=config.seed,
        invalid=invalid,
        episodes=episodes,
    )
    test = None
    if held_out:
        _check_disjoint(pairs, held_out)
        test = PairSource(held_out, policy.renderer, max_length=max_length, invalid="skip", episodes=episodes)
    weights = {} if store is None else {version.id: version.weights for version in store.policies()}
    trainer = Trainer(
        policy,
        get_algorithm("dpo"),
        source,
        config,
        algorithm_config=dpo,
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
        if test is not None and trainer.reference is not None:
            measured = implicit_reward_accuracy(
                policy,
                test,
                beta=dpo.beta,
                reference=trainer.reference,
                micro_batch_tokens=config.micro_batch_tokens,
                by=split,
            )
            scores["implicit_reward_accuracy"] = measured.to_json()["accuracy"]
            scores["implicit_reward_margin"] = float(measured.margins.mean())
        version = PolicyVersion(
            name=name or f"{Path(policy.base_name).name}-dpo",
            parent=parent,
            base_model=policy.base_name,
            weights=result.weights_sha256,
            adapter=str(result.weights) if policy.has_adapter else None,
            algorithm="dpo",
            config={
                "dpo": dpo.model_dump(mode="json"),
                "train": config.model_dump(mode="json"),
                "lora_rank": lora_rank,
                "max_length": max_length,
                "steps": result.steps,
            },
            trained_on=trained_on(source),
            scores=scores,
        )
        return _keep(out / "policy.json", version, result)

    with world.together():
        return world.by_lead(describe)


def lineage(out: str | Path) -> list[str]:
    """Ids of the judgements that the run in ``out`` was trained on, sorted."""
    return (Path(out) / LINEAGE).read_text(encoding="utf-8").split()


def trained_on(source: PairSource) -> TrainedOn:
    """The lineage of everything that ``source`` can hand out."""
    return TrainedOn.of(
        source.derived_from(), pairs=len(source), skipped=dict(source.skipped), data=source.digest()
    )


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


def _episodes(store: Store | None, pairs: Sequence[Pair]) -> Mapping[str, Episode]:
    if store is None:
        return {}
    wanted = {e for pair in pairs for e in (pair.chosen_episode, pair.rejected_episode) if e is not None}
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


def _check_disjoint(pairs: Sequence[Pair], held_out: Sequence[Pair]) -> None:
    seen = {record for pair in pairs for record in pair.derived_from}
    shared = sum(1 for pair in held_out if not seen.isdisjoint(pair.derived_from))
    if shared:
        raise BadInputError(
            f"{shared} held-out pairs are also trained on.",
            advice="Split with corrigible.rewards.splits.split.",
        )
