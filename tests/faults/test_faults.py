"""Every fault of the catalogue is said within three steps, and a clean run says nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from catalogue import FAULTS, Fault, answers_of, grpo, judged, pair, pairs_for, policy_of, table, trainer_of

from corrigible.align import ALGORITHMS, UnpairedSource
from corrigible.errors import CorrigibleError
from corrigible.events import Alert, AnyEvent, EventBus, Metric, use_bus
from corrigible.store import labelled_from_pairs


def listen() -> tuple[EventBus, list[AnyEvent]]:
    bus, seen = EventBus(), []
    bus.subscribe(seen.append)
    return bus, seen


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_said(fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bus, seen = listen()
    error = ""
    with use_bus(bus):
        try:
            fault.inject(tmp_path, monkeypatch)
        except CorrigibleError as raised:
            error = raised.message
    alerts = [event.name for event in seen if isinstance(event, Alert)]
    assert fault.says in alerts or fault.says in error, (alerts, error)
    assert not [event for event in seen if isinstance(event, Metric) and (event.step or 0) > 3]


def test_there_are_enough_and_none_twice() -> None:
    assert len(FAULTS) >= 30
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("lora", [True, False], ids=["adapter", "all weights"])
def test_a_clean_run_says_nothing(lora: bool, seed: int, tmp_path: Path) -> None:
    bus, seen = listen()
    policy = policy_of(lora=lora, acts=0.02 * (seed % 3))
    settings = {"seed": seed, "micro_batch_tokens": (1, 150, 4096)[seed % 3]}
    with use_bus(bus):
        match seed % 4:
            case 0 | 1:
                if lora and seed % 3:
                    settings["reference"] = "base"
                trainer = trainer_of(policy, tmp_path, pairs_for(policy, seed=seed), **settings)
            case 2:
                labelled = labelled_from_pairs([pair(i) for i in range(6)])
                source = UnpairedSource(labelled, policy.renderer, seed=seed)
                trainer = trainer_of(policy, tmp_path, source, ALGORITHMS["kto"], **settings)
            case _:
                trainer = grpo(policy, tmp_path, judged(answers_of(policy, seed=seed)), **settings)
        trainer.train()
    assert [event for event in seen if isinstance(event, Alert)] == []
    assert {event.step for event in seen if isinstance(event, Metric)} == {1, 2, 3}


def test_the_guide_lists_the_catalogue(repository: Path) -> None:
    """After a change: python tests/faults/catalogue.py, and its table into the guide."""
    guide = (repository / "docs" / "guides" / "faults.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- catalogue -->\n(.*?)<!-- end -->", guide, re.DOTALL)
    assert found is not None and found[1].strip() == table().strip()
