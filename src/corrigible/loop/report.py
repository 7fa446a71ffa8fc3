"""One self-contained HTML page about a turn of the loop.

The page is a pure function of the turn's record (``turn.json``): it can be made again at any
time, needs no network, and holds its own plots.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from corrigible.files import write_atomically
from corrigible.loop import plots


def _rate_row(label: str, rate: dict[str, Any]) -> tuple[str, float, float, float]:
    return (label, rate["value"], rate["low"], rate["high"])


def render_report(turn: dict[str, Any]) -> str:
    """HTML of one turn.

    Args:
        turn: the record written by :func:`corrigible.loop.turn.run_turn` (see ``turn.json``).
    """
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(
        loader=PackageLoader("corrigible.loop", "templates"),
        autoescape=select_autoescape(["html", "j2"], default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prettyjson"] = lambda value: json.dumps(
        value, indent=2, ensure_ascii=False, sort_keys=True
    )
    evaluation, reward, training = turn["evaluation"], turn["reward"], turn["training"]
    prompts = evaluation["prompts"]
    figures = {
        "win_rate": plots.win_rate_plot(
            [
                _rate_row("panel", evaluation["win_rate"]),
                _rate_row("gold rule", evaluation["gold_win_rate"]),
                _rate_row("reward model", evaluation["proxy_win_rate"]),
            ],
            turn["gate"]["min_win_rate"],
        ),
        "calibration": plots.calibration_plot(
            [(b["stated"], b["observed"], b["n"]) for b in reward["calibration"]]
        ),
        "accuracy": plots.bars_plot(
            [
                (row["name"], row["value"], row.get("low"), row.get("high"))
                for row in [{"name": "reward\nmodel", **reward["accuracy"]}, *reward["baselines"]]
            ],
            "held-out accuracy",
            0.5,
        ),
        "loss": plots.training_plot(training["steps"], training["loss"], "DPO loss", 0.6931),
        "margin": plots.training_plot(training["steps"], training["margin"], "implicit reward margin", 0.0),
        "gold": plots.paired_plot(
            [p["gold_start"] for p in prompts], [p["gold_candidate"] for p in prompts], "gold score"
        ),
        "proxy": plots.paired_plot(
            [p["proxy_start"] for p in prompts], [p["proxy_candidate"] for p in prompts], "proxy reward"
        ),
    }
    return environment.get_template("report.html.j2").render(
        turn=turn, figures=figures, examples=_examples(prompts)
    )


def write_report(turn: dict[str, Any], path: Path) -> Path:
    """Write the page of ``turn`` to ``path``."""
    write_atomically(path, render_report(turn))
    return path


def _examples(prompts: list[dict[str, Any]], count: int = 9) -> list[dict[str, Any]]:
    """Prompts spread evenly from the clearest win to the clearest loss: no picking of cherries."""
    ranked = sorted(prompts, key=lambda p: p["gold_start"] - p["gold_candidate"])
    if len(ranked) <= count:
        return ranked
    return [ranked[round(i * (len(ranked) - 1) / (count - 1))] for i in range(count)]
