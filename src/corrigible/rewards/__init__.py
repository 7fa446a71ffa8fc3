"""Signals: what an episode is worth, how sure that is, and how it was learned.

- `signals`: `Scores`, the `Signal` and `Preference` protocols, and adapters between them.
- `losses`: `bradley_terry_loss`, the likelihood of comparisons with soft labels.
- `splits`: by prompt, topic or item, asserted disjoint; folds and nested subsets.
- `fit_reward` makes a `RewardModel` under a `RewardConfig`; `save` and `load` keep it.
- `report`: held-out accuracy with cluster intervals, paired differences to the `baselines`, calibration,
  learning curve.

```python
from corrigible.rewards import RewardConfig, fit_reward, reward_report, split

parts = split(pairs, by="prompt")
model = fit_reward(parts.train, config=RewardConfig(backbone="minilm"))
print(reward_report(model, parts.held_out, train_pairs=parts.train).accuracy)
```

Names are imported when first used: the signal types need numpy only, the models torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corrigible.rewards.baselines import length_baseline, tfidf_baseline
    from corrigible.rewards.calibration import Calibration, fit_temperature
    from corrigible.rewards.config import RewardConfig
    from corrigible.rewards.losses import LossOutput, bradley_terry_loss
    from corrigible.rewards.report import RewardReport, cross_validated, learning_curve, reward_report
    from corrigible.rewards.reward_model import RewardModel
    from corrigible.rewards.signals import (
        Preference,
        Scores,
        Signal,
        preference_from_signal,
        signal_from_preference,
    )
    from corrigible.rewards.splits import (
        Split,
        folds,
        split,
        split_by_group,
        split_by_item,
        split_by_prompt,
        subset,
    )
    from corrigible.rewards.table import FeatureTable
    from corrigible.rewards.training import fit_reward

_HOME = {
    "Calibration": "calibration",
    "FeatureTable": "table",
    "LossOutput": "losses",
    "Preference": "signals",
    "RewardConfig": "config",
    "RewardModel": "reward_model",
    "RewardReport": "report",
    "Scores": "signals",
    "Signal": "signals",
    "Split": "splits",
    "bradley_terry_loss": "losses",
    "cross_validated": "report",
    "fit_reward": "training",
    "fit_temperature": "calibration",
    "folds": "splits",
    "learning_curve": "report",
    "length_baseline": "baselines",
    "preference_from_signal": "signals",
    "reward_report": "report",
    "signal_from_preference": "signals",
    "split": "splits",
    "split_by_group": "splits",
    "split_by_item": "splits",
    "split_by_prompt": "splits",
    "subset": "splits",
    "tfidf_baseline": "baselines",
}

__all__ = [
    "Calibration",
    "FeatureTable",
    "LossOutput",
    "Preference",
    "RewardConfig",
    "RewardModel",
    "RewardReport",
    "Scores",
    "Signal",
    "Split",
    "bradley_terry_loss",
    "cross_validated",
    "fit_reward",
    "fit_temperature",
    "folds",
    "learning_curve",
    "length_baseline",
    "preference_from_signal",
    "reward_report",
    "signal_from_preference",
    "split",
    "split_by_group",
    "split_by_item",
    "split_by_prompt",
    "subset",
    "tfidf_baseline",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
