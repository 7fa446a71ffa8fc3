"""What a turn leaves in writing: ``turn.json`` with everything, ``summary.json`` with the numbers, a page."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from corrigible.events import Artefact, emit
from corrigible.files import plain, write_json
from corrigible.loop.gate import Verdict
from corrigible.records import Comparison, Episode, Feedback, PolicyVersion
from corrigible.store import Store

if TYPE_CHECKING:
    from corrigible.evaluate.evaluation import Evaluation
    from corrigible.loop.turn import Turn
    from corrigible.models import LanguagePolicy
    from corrigible.rewards.reward_model import RewardModel


@dataclass(frozen=True)
class Outcome:
    """What the stages of a turn came to.

    ``before`` and ``after`` are the answers of ``start`` and of ``candidate`` to the held-out prompts, in
    the same order; ``reward_record`` is what the reward model's held-out test said, ``training`` the
    curves of the candidate's training.
    """

    policy: LanguagePolicy
    start: PolicyVersion
    candidate: PolicyVersion
    judgements: list[Feedback]
    reward: RewardModel
    reward_record: dict[str, Any]
    training: dict[str, list[float]]
    evaluation: Evaluation
    before: list[Episode]
    after: list[Episode]
    verdict: Verdict


def turn_record(turn: Turn, store: Store, outcome: Outcome) -> dict[str, Any]:
    """The content of ``turn.json`` and of the page: settings, numbers, and every held-out answer."""
    before, after = outcome.before, outcome.after
    evaluation, verdict = outcome.evaluation, outcome.verdict
    proxy = [outcome.reward.score(side).values for side in (before, after)]
    rates = list(evaluation.win_rates.values())
    return {
        "title": f"One turn of the loop: {turn.config.name}",
        "created_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "store": str(turn.out / "store.db"),
        "settings": asdict(turn.config),
        "gate": asdict(turn.gate),
        "verdict": {
            "decision": verdict.decision,
            "reasons": verdict.reasons,
            "checks": [asdict(check) for check in verdict.checks],
        },
        "policies": {"start": outcome.start.to_json(), "candidate": outcome.candidate.to_json()},
        "panel": panel_table(turn, store, outcome.judgements),
        "reward": outcome.reward_record,
        "training": outcome.training,
        "evaluation": {
            "win_rate": rate(rates[0].value, *rates[0].interval, rates[0].prompts),
            "gold_win_rate": rate(rates[1].value, *rates[1].interval, rates[1].prompts),
            "proxy_win_rate": rate(rates[2].value, *rates[2].interval, rates[2].prompts),
            "position_effect": rates[0].position_effect.to_json(),
            "kl": {
                "value": evaluation.kl.value,
                "low": evaluation.kl.interval[0],
                "high": evaluation.kl.interval[1],
                "per_token": evaluation.kl.per_token.value,
            }
            if evaluation.kl
            else None,
            "length": {
                "start": evaluation.length.baseline.value,
                "candidate": evaluation.length.candidate.value,
            },
            "table": [
                {
                    "name": f"{label}",
                    "start": side.baseline.value,
                    "candidate": side.candidate.value,
                    "difference": side.difference.value,
                    "low": side.difference.low,
                    "high": side.difference.high,
                }
                for label, side in (
                    ("gold score", evaluation.scores["gold"]),
                    ("proxy reward (nats)", evaluation.scores["proxy"]),
                    ("length (tokens)", evaluation.length),
                )
            ],
            "finish": {side: dict(counts) for side, counts in evaluation.finish.items()},
            "prompts": [
                {
                    "prompt": prompt.text,
                    "topic": prompt.topic,
                    "start": old.response_text(),
                    "candidate": new.response_text(),
                    "gold_start": turn.gold.score(old.prompt_messages(), old.response_text()),
                    "gold_candidate": turn.gold.score(new.prompt_messages(), new.response_text()),
                    "proxy_start": float(proxy[0][i]),
                    "proxy_candidate": float(proxy[1][i]),
                }
                for i, (prompt, old, new) in enumerate(zip(turn.held_out, before, after, strict=True))
            ],
        },
        "versions": versions(),
        "machine": {"cpus": _cpus(), "processor": platform.machine(), "dtype": str(outcome.policy.dtype)},
        "stages": turn.stages,
    }


def panel_table(turn: Turn, store: Store, records: list[Feedback]) -> list[dict[str, Any]]:
    """Declared against observed, one row per annotator."""
    texts = {i.sha256: i for i in store.items({t.sha256 for r in records for t in r.targets}).values()}
    contexts = store.items({r.context for r in records if r.context})
    rows = []
    for who in turn.panel.annotators:
        mine = [r for r in records if r.annotator.pseudonym == who.name and isinstance(r.payload, Comparison)]
        agreed, first_shown = [], []
        for record in mine:
            assert isinstance(record.payload, Comparison)
            if record.payload.outcome not in ("first", "second") or record.context is None:
                continue
            won = 0 if record.payload.outcome == "first" else 1
            prompt = contexts[record.context].messages()
            scores = [turn.gold.score(prompt, texts[t.sha256].text or "") for t in record.targets]
            if scores[0] != scores[1]:
                agreed.append(scores[won] > scores[1 - won])
            if record.presentation is not None:
                first_shown.append((record.presentation.order or (0, 1))[0] == won)
        rows.append(
            {
                "name": who.name,
                "judgements": len(mine),
                "reliability": who.reliability,
                "position_bias": who.position_bias,
                "length_bias": who.length_bias,
                "agreement": float(np.mean(agreed)) if agreed else 0.5,
                "first_shown": float(np.mean(first_shown)) if first_shown else 0.5,
            }
        )
    return rows


def write(out: Path, turn: dict[str, Any]) -> dict[str, Any]:
    """Write ``turn.json``, the page and, last, ``summary.json``; returns the summary."""
    from corrigible.loop.report import write_report

    turn = plain(turn)  # the page shows what turn.json says: an end that is infinite is null in both
    evaluation = turn["evaluation"]
    summary = {
        "win_rate": evaluation["win_rate"]["value"],
        "win_rate_interval": [evaluation["win_rate"]["low"], evaluation["win_rate"]["high"]],
        "verdict": turn["verdict"]["decision"],
        "reasons": turn["verdict"]["reasons"],
        "gold_win_rate": evaluation["gold_win_rate"]["value"],
        "gold_win_rate_interval": [
            evaluation["gold_win_rate"]["low"],
            evaluation["gold_win_rate"]["high"],
        ],
        "reward_accuracy": turn["reward"]["accuracy"]["value"],
        "reward_accuracy_interval": [
            turn["reward"]["accuracy"]["low"],
            turn["reward"]["accuracy"]["high"],
        ],
        "kl": evaluation["kl"]["value"],
        "kl_interval": [evaluation["kl"]["low"], evaluation["kl"]["high"]],
        "mean_length": evaluation["length"],
        "seconds": round(turn["seconds"], 1),
        "peak_rss_mb": round(turn["peak_rss_mb"]),
        "policies": {key: version["id"] for key, version in turn["policies"].items()},
        "versions": turn["versions"],
        "settings": turn["settings"],
    }
    write_json(out / "turn.json", turn)
    write_report(turn, out / "report.html")
    emit(Artefact(name="report", path=str(out / "report.html")))
    # Last: its presence says that the turn is complete.
    write_json(out / "summary.json", summary)
    emit(Artefact(name="summary", path=str(out / "summary.json")))
    return summary


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("corrigible", "torch", "transformers", "peft", "numpy", "scikit-learn"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cpus() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rate(value: float, low: float, high: float, n: int) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": n}
