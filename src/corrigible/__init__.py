"""Corrigible: learning from feedback, the whole loop.

The names most programs need, each from the room that owns it; they are imported when first used, so
that ``import corrigible`` is instant::

    import corrigible

    store = corrigible.Store.open("feedback.db")
    corrigible.import_file(store, "comparisons.jsonl")
    pairs = corrigible.load_pairs(store, aggregate=True)

Rooms, in the order of the loop (each imports only from those before it): ``records`` (the vocabulary),
``store`` (append-only, with import and export), ``models`` (load, render, score, generate), ``rewards``
(signals and reward models), ``align`` (losses, the trainer), ``collect`` (people, simulated and real),
``evaluate`` (win rates, divergence), ``loop`` (a whole turn, gate, registry, report), ``claims``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corrigible.align import DPOConfig, TrainConfig, train, train_dpo
    from corrigible.evaluate.evaluation import compare, evaluate_policy
    from corrigible.evaluate.win_rate import win_rate
    from corrigible.loop.gate import Gate
    from corrigible.loop.registry import Registry
    from corrigible.loop.turn import Turn, TurnConfig
    from corrigible.models import generate, load_policy
    from corrigible.records import (
        Annotator,
        Episode,
        Feedback,
        Item,
        Message,
        PolicyVersion,
        Sampling,
        Step,
        comparison,
    )
    from corrigible.rewards import RewardConfig, RewardModel, fit_reward, reward_report, split
    from corrigible.store import Store, load_pairs
    from corrigible.store.formats import export_file, import_file

_HOME = {
    **dict.fromkeys(
        (
            "Annotator",
            "Episode",
            "Feedback",
            "Item",
            "Message",
            "PolicyVersion",
            "Sampling",
            "Step",
            "comparison",
        ),
        "records",
    ),
    **dict.fromkeys(("Store", "load_pairs"), "store"),
    **dict.fromkeys(("export_file", "import_file"), "store.formats"),
    **dict.fromkeys(("generate", "load_policy"), "models"),
    **dict.fromkeys(("RewardConfig", "RewardModel", "fit_reward", "reward_report", "split"), "rewards"),
    **dict.fromkeys(("DPOConfig", "TrainConfig", "train", "train_dpo"), "align"),
    **dict.fromkeys(("compare", "evaluate_policy"), "evaluate.evaluation"),
    "win_rate": "evaluate.win_rate",
    "Gate": "loop.gate",
    "Registry": "loop.registry",
    "Turn": "loop.turn",
    "TurnConfig": "loop.turn",
}

__all__ = [
    "Annotator",
    "DPOConfig",
    "Episode",
    "Feedback",
    "Gate",
    "Item",
    "Message",
    "PolicyVersion",
    "Registry",
    "RewardConfig",
    "RewardModel",
    "Sampling",
    "Step",
    "Store",
    "TrainConfig",
    "Turn",
    "TurnConfig",
    "compare",
    "comparison",
    "evaluate_policy",
    "export_file",
    "fit_reward",
    "generate",
    "import_file",
    "load_pairs",
    "load_policy",
    "reward_report",
    "split",
    "train",
    "train_dpo",
    "win_rate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
