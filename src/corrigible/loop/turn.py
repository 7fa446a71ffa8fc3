"""One turn of the loop: act, collect, model, align, evaluate, promote.

:class:`Turn` is the loop in one readable piece. Each stage is a call into the room that owns it; what
is added here is order, lineage and the written record (``turn.json``, ``summary.json``,
``report.html``). A turn that was interrupted goes on where it stopped when it is run again on the same
folder: answers, judgements and training steps that are on disk are not made twice.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corrigible.collect.gold import GoldPreference, GoldSignal, HouseStyle
from corrigible.collect.simulated import Panel
from corrigible.errors import BadInputError
from corrigible.events import Artefact, Message, Metric, emit
from corrigible.files import write_json
from corrigible.loop.gate import Gate
from corrigible.loop.memory import peak_rss_mb
from corrigible.loop.prompts import Prompt, household, split
from corrigible.loop.record import Outcome, rate, turn_record, write
from corrigible.loop.registry import Registry
from corrigible.records import Episode, Feedback, PolicyVersion, Sampling, messages_text, new_id
from corrigible.store import Pair, Store, load_pairs

if TYPE_CHECKING:
    from corrigible.evaluate.evaluation import Evaluation
    from corrigible.models import LanguagePolicy
    from corrigible.rewards.reward_model import RewardModel


@dataclass(frozen=True)
class TurnConfig:
    """Settings of one turn.

    Args:
        model: what to start from (see :func:`corrigible.models.load_policy`).
        name: line of policy versions: the start is ``<name>-v1``, the candidate ``<name>-v2``.
        system: system message before every prompt; empty for none.
        train_prompts: prompts the policy acts on and learns from.
        held_out: other prompts, on which only the evaluation runs.
        answers: answers sampled per training prompt.
        pairs_per_prompt: pairs of answers per prompt that the panel judges.
        votes: annotators per pair.
        lessons_per_prompt: of these pairs, how many DPO learns from: the clearest ones.
        max_tokens: longest answer, tokens.
        temperature, top_p: how answers are sampled.
        epochs, lr, beta, lora_rank, batch_size: of DPO.
        kl_prompts: held-out prompts on which the divergence from the start is measured by plain sampling.
        seed: of everything that is drawn.
    """

    model: str = "smollm2-135m"
    name: str = "demo"
    system: str = "Answer in one or two short sentences."
    train_prompts: int = 90
    held_out: int = 80
    answers: int = 4
    pairs_per_prompt: int = 3
    votes: int = 3
    lessons_per_prompt: int = 1
    max_tokens: int = 56
    temperature: float = 0.8
    top_p: float = 0.95
    epochs: float = 1.0
    lr: float = 4e-4
    beta: float = 0.1
    lora_rank: int = 16
    batch_size: int = 8
    kl_prompts: int = 24
    seed: int = 0

    def sampling(self) -> Sampling:
        """How answers are sampled, in the records' terms."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens)


class Turn:
    """One turn of the loop in the folder ``out``.

    Args:
        out: holds everything the turn leaves: ``store.db``, ``reward/``, ``policy/``, ``turn.json``,
            ``summary.json``, ``report.html``.
        config: settings; a turn that is resumed must have the same.
        prompts: what to ask; the household set by default.
        gold: what the simulated panel means to judge by.
        gate: what a candidate must clear.

    Raises:
        BadInputError: ``out`` holds an unfinished turn with other settings.
    """

    def __init__(
        self,
        out: str | Path,
        config: TurnConfig | None = None,
        *,
        prompts: Sequence[Prompt] | None = None,
        gold: GoldPreference | None = None,
        gate: Gate | None = None,
    ) -> None:
        self.out = Path(out)
        self.config = config or TurnConfig()
        self.gold = gold or HouseStyle()
        self.gate = gate or Gate()
        self.train, self.held_out = split(
            list(prompts) if prompts is not None else household(),
            held_out=self.config.held_out,
            train=self.config.train_prompts,
            seed=self.config.seed,
        )
        self.panel = Panel.demo(self.gold, seed=self.config.seed)
        # Another panel judges the result than the one that taught: other people, same house style.
        self.jury = Panel.demo(self.gold, seed=self.config.seed + 1)
        self.stages: list[dict[str, Any]] = []
        self.state: dict[str, Any] = {}

    # -- the whole ------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Turn once; returns the summary that is also written to ``summary.json``."""
        started = time.monotonic()
        self._open()
        earlier = float(self.state.get("seconds_before", 0.0))  # of the calls that were interrupted
        with Store.open(self.out / "store.db") as store:
            registry = Registry(store)
            with self._stage("load") as note:
                policy = self._load()
                start = registry.register(self._start_version(policy))
                note(f"{policy.name}, {policy.dtype}".replace("torch.", ""))
            with self._stage("act") as note:
                note(f"{self._act(store, policy, start)} answers to {len(self.train)} prompts")
            with self._stage("collect") as note:
                records = self._collect(store)
                note(f"{len(records)} judgements by {len(self.panel.annotators)} simulated people")
            pairs = load_pairs(store, aggregate=True, kind="comparison")
            with self._stage("model") as note:
                reward, reward_record = self._model(pairs)
                accuracy = reward_record["accuracy"]
                note(
                    f"reward model, held-out accuracy {accuracy['value']:.2f} "
                    f"({accuracy['low']:.2f} to {accuracy['high']:.2f}, n={accuracy['n']})"
                )
            with self._stage("align") as note:
                lessons = clearest(pairs, self.config.lessons_per_prompt)
                candidate = self._align(store, registry, policy, start, lessons)
                training = self._history()
                note(f"DPO on {len(lessons)} pairs, {len(training['steps'])} steps")
            with self._stage("evaluate") as note:
                evaluation, sides = self._evaluate(policy, start, candidate, reward)
                rate = evaluation.win_rate
                low, high = rate.interval
                note(f"win rate {rate.value:.2f} ({low:.2f} to {high:.2f}, n={rate.prompts})")
            with self._stage("promote") as note:
                verdict = self.gate.decide(
                    win_rate=rate.value,
                    interval=rate.interval,
                    prompts=rate.prompts,
                    kl=evaluation.kl.value if evaluation.kl else None,
                    length_ratio=evaluation.length_ratio,
                )
                for episodes in sides:
                    store.add_episodes(episodes)
                if registry.status(candidate) == "created":  # else it was decided before an interruption
                    registry.decide(candidate, verdict, {"evaluation": evaluation.to_json()})
                note("promoted" if verdict.promoted else "refused")
            outcome = Outcome(
                policy=policy,
                start=start,
                candidate=candidate,
                judgements=records,
                reward=reward,
                reward_record=reward_record,
                training=training,
                evaluation=evaluation,
                before=sides[0],
                after=sides[1],
                verdict=verdict,
            )
            turn = turn_record(self, store, outcome)
        turn["seconds"] = time.monotonic() - started + earlier
        turn["peak_rss_mb"] = peak_rss_mb()
        return write(self.out, turn)

    # -- stages ---------------------------------------------------------------------------------

    def _load(self) -> LanguagePolicy:
        from corrigible.models import load_policy

        return load_policy(self.config.model)

    def _start_version(self, policy: LanguagePolicy) -> PolicyVersion:
        return PolicyVersion(
            id=self.state["start_id"],
            name=f"{self.config.name}-v1",
            base_model=self.config.model,
            weights=policy.weights_sha256(),
            created_at=self.state["created_at"],
            created_by="corrigible demo",
        )

    def _act(self, store: Store, policy: LanguagePolicy, start: PolicyVersion) -> int:
        from corrigible.evaluate.sampling import sample_episodes

        episodes = sample_episodes(
            policy,
            [prompt.messages(self.config.system) for prompt in self.train],
            n=self.config.answers,
            sampling=self.config.sampling(),
            seed=self.config.seed,
            policy_version=start.id,
            task="act",
            keep=self.out / "work" / "act.jsonl",
            label="answering",
        )
        store.add_episodes(episodes)
        return len(episodes)

    def _collect(self, store: Store) -> list[Feedback]:
        # The judgements are added in one transaction: all of them are there, or none.
        if not store.count_feedback(campaign=self.config.name):
            result = self.panel.judge_episodes(
                list(store.episodes(task="act")),
                pairs_per_prompt=self.config.pairs_per_prompt,
                votes=self.config.votes,
                campaign_id=self.config.name,
            )
            store.add_feedback(result.records, result.items)
        return list(store.feedback(campaign=self.config.name))

    def _model(self, pairs: list[Pair]) -> tuple[RewardModel, dict[str, Any]]:
        from corrigible.rewards import RewardConfig, fit_reward, reward_report
        from corrigible.rewards import split as split_pairs

        config = RewardConfig(seed=self.config.seed)
        parts = split_pairs(pairs, by="prompt", held_out=0.25, seed=self.config.seed)
        judged = reward_report(
            fit_reward(parts.train, config=config, by="prompt"),
            parts.held_out,
            train_pairs=parts.train,
            by="prompt",
        )
        # The accuracy is that of a model which never saw the held-out prompts; the one that is kept
        # and used has learned from all of them.
        reward = fit_reward(pairs, config=config, by="prompt")
        reward.save(self.out / "reward")
        emit(Artefact(name="reward model", path=str(self.out / "reward")))
        accuracy = judged.accuracy
        emit(Metric(name="reward/accuracy", value=accuracy.value, interval=accuracy.interval))
        return reward, {
            "accuracy": rate(accuracy.value, accuracy.low, accuracy.high, accuracy.n),
            "baselines": [
                {
                    "name": name,
                    **rate(found.accuracy.value, found.accuracy.low, found.accuracy.high, found.accuracy.n),
                }
                for name, found in judged.baselines.items()
            ],
            "calibration": [
                {"stated": entry.confidence, "observed": entry.agreement, "n": entry.n}
                for entry in judged.calibration.bins
            ],
            "ece": judged.calibration.ece,
            "ties": judged.ties,
            "pairs": {"train": len(parts.train), "held_out": len(parts.held_out)},
        }

    def _align(
        self,
        store: Store,
        registry: Registry,
        policy: LanguagePolicy,
        start: PolicyVersion,
        pairs: list[Pair],
    ) -> PolicyVersion:
        from corrigible.align import DPOConfig, TrainConfig, train_dpo
        from corrigible.align.training import lineage

        config = TrainConfig(
            epochs=self.config.epochs,
            lr=self.config.lr,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            checkpoint_every=5,
        )
        version = train_dpo(
            pairs,
            policy,
            out=self.out / "policy",
            config=config,
            dpo=DPOConfig(beta=self.config.beta),
            lora_rank=self.config.lora_rank,
            name=f"{self.config.name}-v2",
            parent=start.id,
            store=store,
            resume=(self.out / "policy" / "checkpoints").exists(),
            resume_hint="Run the same command again: it goes on from here.",
        )
        return registry.register(version, trained_on=lineage(self.out / "policy"))

    def _history(self) -> dict[str, list[float]]:
        lines = (self.out / "policy" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return {
            "steps": [row["step"] for row in rows],
            "loss": [row["loss"] for row in rows],
            "margin": [row["rewards/margin"] for row in rows],
        }

    def _evaluate(
        self, policy: LanguagePolicy, start: PolicyVersion, candidate: PolicyVersion, reward: RewardModel
    ) -> tuple[Evaluation, tuple[list[Episode], list[Episode]]]:
        from corrigible.evaluate.evaluation import compare
        from corrigible.evaluate.kl import kl_to_reference
        from corrigible.evaluate.sampling import sample_episodes
        from corrigible.evaluate.win_rate import PanelJudge, SignalJudge

        prompts = [prompt.messages(self.config.system) for prompt in self.held_out]

        def answer(
            version: PolicyVersion, task: str, asked: Sequence[Any], sampling: Sampling, variant: str = ""
        ) -> list[Episode]:
            return sample_episodes(
                policy,
                asked,
                sampling=sampling,
                seed=self.config.seed + 1,
                policy_version=version.id,
                variant=variant,
                task=task,
                keep=self.out / "work" / f"{task}-{version.name}.jsonl",
                label=f"answering as {version.name}",
            )

        with policy.adapter_disabled():
            before = answer(start, "evaluate", prompts, self.config.sampling(), "adapter disabled")
        after = answer(candidate, "evaluate", prompts, self.config.sampling())
        # The divergence is an expectation under plain sampling, so it gets plain samples of its own.
        plain = Sampling(max_tokens=self.config.max_tokens)
        drift = kl_to_reference(
            answer(candidate, "divergence", prompts[: self.config.kl_prompts], plain), policy
        )
        gold = GoldSignal(self.gold)
        evaluation = compare(
            after,
            before,
            [PanelJudge(self.jury), SignalJudge(gold), SignalJudge(reward)],
            signals={"gold": gold, "proxy": reward},
            kl=drift,
            names=(candidate.name, start.name),
            seed=self.config.seed,
        )
        return evaluation, (before, after)

    # -- the folder -----------------------------------------------------------------------------

    def _open(self) -> None:
        """Begin, or find where an interrupted turn stopped."""
        path = self.out / "work" / "state.json"
        asked = "\n".join(
            f"{prompt.id}\t{messages_text(prompt.conversation)}" for prompt in (*self.train, *self.held_out)
        )
        settings = {
            "config": asdict(self.config),
            "gold": self.gold.declaration(),
            "prompts": hashlib.sha256(asked.encode()).hexdigest(),
        }
        if (self.out / "summary.json").exists():
            set_aside(self.out)  # a finished turn: this is a new one
        if path.exists():
            self.state = json.loads(path.read_text(encoding="utf-8"))
            if self.state["settings"] != json.loads(json.dumps(settings)):
                raise BadInputError(
                    f"{self.out} holds an unfinished turn with other settings or prompts.",
                    advice="Give another --out, or begin anew with --fresh.",
                )
            emit(Message(text=f"Going on with the unfinished turn in {self.out}."))
            return
        from corrigible.records import now_us

        path.parent.mkdir(parents=True, exist_ok=True)
        self.state = {"settings": settings, "start_id": new_id(), "created_at": now_us()}
        self._remember()

    def _remember(self, **facts: Any) -> None:
        self.state.update(facts)
        write_json(self.out / "work" / "state.json", self.state)

    @contextmanager
    def _stage(self, name: str) -> Iterator[Any]:
        started = time.monotonic()
        entry: dict[str, Any] = {"name": name, "summary": "", "seconds": 0.0}
        self.stages.append(entry)

        def note(text: str) -> None:
            entry["summary"] = text

        try:
            yield note
        finally:
            entry["seconds"] = time.monotonic() - started
            self._remember(seconds_before=self.state.get("seconds_before", 0.0) + entry["seconds"])
        emit(Message(text=f"{name}: {entry['summary']} ({entry['seconds']:.0f} s)"))


def set_aside(out: Path) -> Path | None:
    """Make room for a new turn: the folder ``out``, if it is there, becomes ``out-1`` (or ``-2``, …).

    Nothing is deleted: the store of a turn also holds what people judged and promoted in it since.
    """
    if not out.exists():
        return None
    number = 1
    while (aside := out.with_name(f"{out.name}-{number}")).exists():
        number += 1
    out.rename(aside)
    emit(Message(text=f"The earlier turn in {out} is now in {aside}."))
    return aside


def clearest(pairs: Sequence[Pair], per_prompt: int) -> list[Pair]:
    """The ``per_prompt`` pairs of each prompt on which the judges were most of one mind; ties never.

    Where votes say the same, the pair judged by more people goes first.
    """
    by_prompt: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair.p_chosen != 0.5:
            by_prompt.setdefault(pair.prompt_ref or "", []).append(pair)
    chosen = []
    for found in by_prompt.values():
        found.sort(key=lambda pair: (-abs(pair.p_chosen - 0.5), -pair.weight))
        chosen.extend(found[:per_prompt])
    return chosen
