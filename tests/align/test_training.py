"""Feedback to policy version by any algorithm: lineage, what is held out, and what cannot be learnt from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corrigible.align import (
    ALGORITHMS,
    AlgorithmConfig,
    DPOConfig,
    GroupSource,
    LossOutput,
    PairExample,
    ScoredExamples,
    TrainConfig,
    Trainer,
    algorithm,
    implicit_reward_accuracy,
    make_source,
    train,
    train_dpo,
)
from corrigible.align.learnable import able_to_use, apart_from, is_online, load_for, nothing_to_learn_from
from corrigible.align.metrics import LOGGED, OBJECTIVE, SOMETIMES, TRAINER, logged_by
from corrigible.align.training import lineage
from corrigible.errors import BadInputError
from corrigible.models import LanguagePolicy, generate
from corrigible.records import Annotator, Feedback, Item, Message, Sampling, TargetRef, comparison
from corrigible.rewards.signals import Scores
from corrigible.rewards.splits import split
from corrigible.store import Labelled, Pair, Store, load_pairs
from corrigible.store.conversions import kinds_for
from corrigible.store.signals import Attempt, Attempts, Critiqued, Demonstrated, Ranked

OFFLINE = [name for name, entry in ALGORITHMS.items() if not is_online(entry)]
ADA = Annotator(pseudonym="ada", type="human")


TOPICS = ("Rivers of Asia", "Boiling an egg", "Prime numbers", "A red kite", "Old maps", "Counting sheep")
SETTINGS: dict[str, dict[str, Any]] = {
    # No model and short rows: its neighbours stand before every question.
    "demonstration-retrieval": {"encoder": "words", "demonstrations": 1},
}


def said(text: str, role: str = "assistant") -> tuple[Message, ...]:
    return (Message.model_validate({"role": role, "content": text}),)


def signals_of(shape: str, count: int = 6) -> list[Any]:
    """``count`` signals of a shape, each about another question."""
    found: list[Any] = []
    for number in range(count):
        prompt = said(f"{TOPICS[number % len(TOPICS)]}: twice {number}?", "user")
        good, bad = said(f"It is {2 * number}."), said(f"No idea, maybe {number}.")
        common: dict[str, Any] = {
            "prompt": prompt,
            "weight": 1.0 + number % 2,
            "group": f"g{number}",
            "annotators": ("ada",),
            "derived_from": (f"f{number:06d}",),
            "criterion": "overall",
        }
        match shape:
            case "pairs":
                references = {"chosen_ref": f"c{number}", "rejected_ref": f"r{number}"}
                found.append(Pair(chosen=good, rejected=bad, p_chosen=0.9, **references, **common))
            case "labelled":
                found.append(
                    Labelled(response=good if number % 2 else bad, desirable=bool(number % 2), **common)
                )
            case "ranked":
                third = said(f"{2 * number} it is, I would say.")
                found.append(Ranked(responses=(good, bad, third), scores=(1.0, 0.0, 0.5), **common))
            case "demonstrations":
                quality = "expert" if number % 2 else "mixed"
                found.append(Demonstrated(response=good, quality=quality, **common))
            case "critiqued":
                found.append(Critiqued(draft=bad, critique="Say the number.", refined=good, **common))
            case "attempts":
                wrong = Attempt(
                    response=bad,
                    right=False,
                    feedback="That is not a sum.",
                    steps=("No idea,", " maybe", f" {number}."),
                    first_wrong=1,
                    error="calculation",
                )
                right = Attempt(response=good, right=True, steps=("It is", f" {2 * number}."))
                found.append(Attempts(attempts=(wrong, right), **common))
    return found


@pytest.fixture
def registry_as_it_was() -> Iterator[None]:
    before = dict(ALGORITHMS)
    yield
    ALGORITHMS.clear()
    ALGORITHMS.update(before)


def thumb(prompt: str, answer: str, value: int) -> tuple[Feedback, list[Item]]:
    question, response = Item.of_messages(said(prompt, "user"), "prompt"), Item.of_text(answer, "response")
    record = Feedback.model_validate(
        {
            "targets": [TargetRef(sha256=response.sha256, type="response")],
            "context": question.sha256,
            "annotator": ADA,
            "payload": {"kind": "reaction", "value": value},
        }
    )
    return record, [question, response]


def fill(store: Store, *, thumbs: int = 0, comparisons: int = 0) -> None:
    for number in range(thumbs):
        record, items = thumb(f"Question {number}?", f"Answer {number}.", 1 if number % 2 else -1)
        store.add_feedback([record], items)
    for number in range(comparisons):
        record, items = comparison(f"Question {number}?", f"yes {number}", f"no {number}", annotator=ADA)
        store.add_feedback([record], items)


# -- every algorithm ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OFFLINE)
def test_every_algorithm_trains_and_logs_what_is_documented(
    name: str, tmp_path: Path, policy: LanguagePolicy
) -> None:
    entry = ALGORITHMS[name]
    settings = entry.config.model_validate(SETTINGS.get(name, {}))
    version = train(
        name,
        signals_of(entry.signal),
        policy,
        out=tmp_path / "run",
        config=TrainConfig(steps=2, batch_size=3, lr=1e-3),
        algorithm_config=settings,
    )
    [first, _] = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    documented = set(logged_by(entry))
    assert set(first) - {"step"} <= documented
    assert documented - set(first) <= SOMETIMES
    assert all(np.isfinite(value) for value in first.values())
    assert version.algorithm == name and version.name == f"tiny-random-{name}"
    assert version.config[name] == settings.model_dump(mode="json")
    assert (
        version.trained_on is not None and version.trained_on.feedback == len(lineage(tmp_path / "run")) > 0
    )
    assert set(lineage(tmp_path / "run")) <= {f"f{number:06d}" for number in range(6)}
    assert ("serving" in version.config) == (
        entry.serving is not None and entry.serving(entry.config()) is not None
    )


def test_the_online_one_logs_what_is_documented(tmp_path: Path, policy: LanguagePolicy) -> None:
    sampling = Sampling(n=3, max_tokens=4)
    groups = generate(policy, [[{"role": "user", "content": text}] for text in "abcd"], sampling=sampling)
    scores = [Scores(np.arange(3.0)) for _ in groups]
    source = GroupSource(groups, scores, sampling=sampling)
    entry = ALGORITHMS["grpo"]
    config = TrainConfig(steps=1, batch_size=4)
    settings = entry.config.model_validate({"beta": 0.1})
    Trainer(policy, entry, source, config, algorithm_config=settings, out=tmp_path).train()
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert set(json.loads(line)) - {"step"} == set(logged_by(entry))


def test_the_table_of_metrics_speaks_of_what_there_is() -> None:
    assert set(LOGGED) <= set(ALGORITHMS)
    logged = {name for entry in ALGORITHMS.values() for name in logged_by(entry)}
    assert logged == set(OBJECTIVE) | set(TRAINER), "documented and never logged, or the reverse"
    assert logged >= SOMETIMES and not set(TRAINER) & set(OBJECTIVE)


def test_every_algorithm_names_the_kinds_that_its_signal_is_made_of() -> None:
    for name in OFFLINE:
        entry = ALGORITHMS[name]
        assert entry.learns_from == kinds_for(entry.signal), name


# -- from a store ---------------------------------------------------------------------------------------


def test_a_store_of_thumbs_becomes_a_version_with_lineage(tmp_path: Path, policy: LanguagePolicy) -> None:
    with Store.open(tmp_path / "s.db") as store:
        fill(store, thumbs=6)
        version = train(
            "kto",
            store,
            policy,
            out=tmp_path / "run",
            config=TrainConfig(steps=2, batch_size=4),
            name="thumbed",
            parent="before",
        )
        ids = sorted(record.id for record in store.feedback())
    assert (version.name, version.parent, version.algorithm) == ("thumbed", "before", "kto")
    assert version.trained_on is not None
    assert version.trained_on.feedback == 6 and version.trained_on.filter["unpaired"] == 6
    assert lineage(tmp_path / "run") == ids
    assert version.weights == policy.weights_sha256()


def test_resuming_a_finished_run_gives_the_same_version(tmp_path: Path, make_policy: Callable) -> None:
    def run(resume: bool) -> Any:
        return train(
            "kto",
            signals_of("labelled"),
            make_policy(),
            out=tmp_path,
            config=TrainConfig(steps=2, batch_size=4),
            resume=resume,
        )

    assert run(False) == run(True)


def test_train_dpo_is_train_with_dpo(tmp_path: Path, make_policy: Callable, make_pairs: Callable) -> None:
    pairs, config = make_pairs(8), TrainConfig(steps=2, batch_size=4)
    settings = DPOConfig(beta=0.3)
    shared: dict[str, Any] = {"config": config, "held_out": make_pairs(12, seed=1)[8:]}
    first = train_dpo(pairs, make_policy(), out=tmp_path / "a", dpo=settings, **shared)
    second = train("dpo", pairs, make_policy(), out=tmp_path / "b", algorithm_config=settings, **shared)
    assert first.weights == second.weights and first.config == second.config
    assert first.scores["implicit_reward_accuracy"] == second.scores["implicit_reward_accuracy"]


def test_an_entry_says_how_its_signals_are_loaded(tmp_path: Path) -> None:
    """What is marked as wrong is left out by most, and pushed down by the one that can."""
    answer = Item.of_text("Good words, bad words.", "response")
    marked = Feedback.model_validate(
        {
            "targets": [TargetRef(sha256=answer.sha256, type="response")],
            "annotator": ADA,
            "payload": {
                "kind": "spans",
                "spans": [{"start": 12, "end": 21, "label": "wrong", "severity": 3, "polarity": -1}],
                "exhaustive": True,
            },
        }
    )
    with Store.open(tmp_path / "s.db") as store:
        store.add_feedback([marked], [answer])
        [kept] = load_for(store, ALGORITHMS["sft"])
        [pushed] = load_for(store, ALGORITHMS["unlikelihood-tokens"])
    assert [span[:2] for span in kept.spans] == [span[:2] for span in pushed.spans] == [(12, 21)]
    assert kept.spans[0][2] == 0.0 and pushed.spans[0][2] == -1.0


# -- what is held out -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("registry_as_it_was")
def test_an_algorithm_without_reference_is_measured_against_its_start(
    tmp_path: Path, policy: LanguagePolicy, make_pairs: Callable
) -> None:
    class Settings(AlgorithmConfig):
        beta: float = 2.0

    @algorithm(
        "raise-chosen",
        source="pairs",
        weight="judgement",
        config=Settings,
        learns_from={"comparison"},
        paper="none",
        needs_reference=False,
    )
    def raise_chosen(batch: ScoredExamples[PairExample], config: Settings) -> LossOutput:
        """Raise what was chosen; needs no reference."""
        assert batch.reference is None
        logps = batch.policy_logps()
        loss = -(logps[0::2] - logps[1::2]).sum() / batch.denominator
        return LossOutput(loss, {"loss": float(loss.detach())})

    pairs, held_out = make_pairs(8), make_pairs(20, seed=1)[8:]
    version = train(
        "raise-chosen",
        pairs,
        policy,
        out=tmp_path,
        held_out=held_out,
        split="prompt",
        config=TrainConfig(steps=6, batch_size=8, lr=5e-3),
    )
    # The adapter was fresh, so that the start is the model without it: scored in another way here.
    measured = implicit_reward_accuracy(policy, held_out, beta=1.0, reference="base", by="prompt")
    scores = version.scores
    assert scores["implicit_reward_accuracy"] == measured.to_json()["accuracy"]
    assert scores["implicit_reward_margin"] == pytest.approx(float(measured.margins.mean()), rel=1e-4)
    assert scores["implicit_reward_margin"] > 0.0


def test_any_algorithm_can_be_measured_on_held_out_pairs(
    tmp_path: Path, policy: LanguagePolicy, make_pairs: Callable
) -> None:
    version = train(
        "kto",
        signals_of("labelled"),
        policy,
        out=tmp_path,
        held_out=make_pairs(20)[10:],
        config=TrainConfig(steps=1, batch_size=4),
    )
    assert version.scores["implicit_reward_accuracy"]["n"] == 10
    with pytest.raises(BadInputError, match="2 held-out pairs are also trained on"):
        train("kto", signals_of("labelled"), policy, out=tmp_path / "b", held_out=make_pairs(8)[4:])


@pytest.mark.parametrize("by", ["prompt", "topic", "item"])
def test_signals_are_kept_apart_from_held_out_pairs(by: str, tmp_path: Path) -> None:
    with Store.open(tmp_path / "s.db") as store:
        fill(store, comparisons=12, thumbs=12)
        pairs = load_pairs(store, aggregate=True)
        signals = load_for(store, ALGORITHMS["kto"])
    parts = split(pairs, by=by, held_out=0.4, seed=1)
    kept = apart_from(signals, parts, pairs)
    assert 0 < len(kept) < len(signals)
    records = {record for pair in parts.held_out for record in pair.derived_from}
    prompts = {pair.prompt_text for pair in parts.held_out}
    texts = {text for pair in parts.held_out for text in (pair.chosen_text, pair.rejected_text)}
    for signal in kept:
        assert records.isdisjoint(signal.derived_from)
        if by == "item":
            assert signal.response[0].text not in texts
        else:
            assert signal.prompt[0].text not in prompts
    # Nothing is lost that could have stayed: a thumb on a question that nobody holds out.
    if by != "item":
        assert {signal.prompt[0].text for signal in kept} == {f"Question {n}?" for n in range(12)} - prompts


# -- what cannot be learnt from -------------------------------------------------------------------------


def test_a_store_without_anything_to_learn_from(tmp_path: Path, policy: LanguagePolicy) -> None:
    with Store.open(tmp_path / "s.db") as store:
        with pytest.raises(
            BadInputError, match="holds no comparisons to learn from: it holds no judgement"
        ) as e:
            train("dpo", store, policy, out=tmp_path / "run")
        assert "corrigible judge" in e.value.advice
        fill(store, thumbs=3)
        with pytest.raises(BadInputError, match="it holds 3 reaction, which give no pairs") as e:
            train("dpo", store, policy, out=tmp_path / "run")
        users = {entry.name for entry in able_to_use(store)}
        assert "kto" in users and "dpo" not in users
        assert f"can be used by: {', '.join(sorted(users))}." in e.value.advice
        assert nothing_to_learn_from(
            store, replace(ALGORITHMS["dpo"], learns_from=frozenset({"edit"}))
        ).message == (
            f"{store.url} holds no comparisons to learn from: it holds 3 reaction, and dpo learns from edit."
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "given", "message", "advice"),
    [
        (
            "kto",
            "pairs",
            r"kto learns from labelled \(Labelled\); signal 0 of 6 is one of pairs \(Pair\)",
            "dpo",
        ),
        ("dpo", "labelled", r"dpo learns from pairs \(Pair\); signal 0 of 6 is one of labelled", "kto"),
        ("grpo", "pairs", "grpo learns from groups of answers that the policy samples", "GroupSource"),
        ("nothing", "pairs", "There is no algorithm 'nothing'", "dpo"),
    ],
)
def test_signals_of_another_shape_are_refused_with_what_could_use_them(
    name: str, given: str, message: str, advice: str, tmp_path: Path, policy: LanguagePolicy
) -> None:
    with pytest.raises(BadInputError, match=message) as caught:
        train(name, signals_of(given), policy, out=tmp_path / "run")
    assert advice in caught.value.advice


def test_something_that_is_no_signal(tmp_path: Path, policy: LanguagePolicy) -> None:
    mixed: Sequence[Any] = [*signals_of("pairs", 2), ("a", "b")]
    with pytest.raises(BadInputError, match="signal 2 of 3 is a tuple, which is no signal"):
        train("dpo", mixed, policy, out=tmp_path / "run")


@pytest.mark.usefixtures("registry_as_it_was")
def test_a_kind_of_examples_without_a_source(policy: LanguagePolicy) -> None:
    entry = replace(ALGORITHMS["dpo"], name="odd", source="pictures", make_source=None)
    with pytest.raises(BadInputError, match="no usual source of pictures for 'odd'"):
        make_source(entry, signals_of("pairs"), policy.renderer, DPOConfig())
