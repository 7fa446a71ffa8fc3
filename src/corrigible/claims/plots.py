"""Plots of a claim's page as inline SVG: the effect over seeds, every arm with its interval, curves."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from corrigible.claims.fixtures.statistics import student_t
from corrigible.claims.framework import Outcome
from corrigible.loop.plots import BAD, CANDIDATE, GOOD, INK, START, as_svg, new_figure

COLOURS = (CANDIDATE, "#d98a1f", GOOD, "#8a5fc7", BAD, "#3aa6a6", START, "#b0417e")


def panels(names: Sequence[str]) -> dict[str, list[str]]:
    """Names by panel, the part before the last slash; in the order in which they come."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.rpartition("/")[0], []).append(name)
    return found


def effect_plot(id: str, effects: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> str:
    """The primary effect and the controls: one dot a seed, the interval, and what it had to be.

    Args:
        effects: as in a result's JSON; those of another unit than the first one's are left out.
        kinds: "effect" or "control" for each.
    """
    shown = [(e, k) for e, k in zip(effects, kinds, strict=True) if e["unit"] == effects[0]["unit"]]
    figure, axes = new_figure(7.2, 0.9 + 0.65 * len(shown))
    for i, (each, kind) in enumerate(shown):
        good, bad = (
            (each["shown"], each["refuted"]) if kind == "effect" else (not each["shown"], each["shown"])
        )
        colour = GOOD if good else BAD if bad else START
        _interval(axes, i, each["per_seed"], (each["effect"], *each["interval"]), colour)
    for bound in _bounds(effects[0]["asks"]):
        axes.axvline(bound, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(shown)), [_lines(e["name"], 40) for e, _ in shown])
    axes.invert_yaxis()
    axes.margins(y=0.3)
    axes.set_xlabel(effects[0]["unit"] or "effect")
    return as_svg(figure, f"{id}: effect and controls over seeds")


def arms_plot(id: str, panel: str, arms: Mapping[str, Sequence[float]]) -> str:
    """Every arm of one panel: a dot a seed, and the mean with its 95 % interval.

    ``arms``: numbers over seeds by the arm's full name.
    """
    figure, axes = new_figure(3.9, 0.8 + 0.34 * len(arms))
    for i, numbers in enumerate(arms.values()):
        if len(numbers) > 1:
            mean = student_t(numbers)
            _interval(axes, i, numbers, (mean.value, mean.low, mean.high), COLOURS[i % len(COLOURS)])
        else:
            axes.plot(numbers, [i] * len(numbers), "o", color=COLOURS[i % len(COLOURS)])
    axes.set_yticks(range(len(arms)), [_lines(name.rpartition("/")[2], 26) for name in arms])
    axes.invert_yaxis()
    axes.margins(y=0.3 if len(arms) > 1 else 1.0)
    axes.set_xlabel(panel or "value")
    return as_svg(figure, f"{id}: {panel or 'what was measured'}")


def curves_plot(id: str, panel: str, runs: Sequence[Outcome], names: Sequence[str]) -> str:
    """Curves of one panel: the mean over seeds with its 95 % band, or every seed where their xs differ."""
    figure, axes = new_figure(3.9, 2.9)
    for i, name in enumerate(names):
        colour = COLOURS[i % len(COLOURS)]
        curves = [run.curves[name] for run in runs if name in run.curves]
        label = name.rpartition("/")[2]
        if len(curves) > 1 and all(list(xs) == list(curves[0][0]) for xs, _ in curves):
            points = [student_t([ys[j] for _, ys in curves]) for j in range(len(curves[0][0]))]
            axes.plot(curves[0][0], [p.value for p in points], color=colour, linewidth=1.5, label=label)
            axes.fill_between(
                curves[0][0], [p.low for p in points], [p.high for p in points], color=colour, alpha=0.18
            )
        else:
            for j, (xs, ys) in enumerate(curves):
                axes.plot(xs, ys, color=colour, linewidth=0.8, alpha=0.6, label=None if j else label)
    axes.set_xlabel(panel or "x")
    if len(names) > 1 or names[0].rpartition("/")[2]:
        axes.legend(frameon=False, fontsize=8)
    return as_svg(figure, f"{id}: curves, {panel or 'all'}")


def _interval(
    axes: Any, y: int, numbers: Sequence[float], mean: tuple[float, float | None, float | None], colour: str
) -> None:
    value, low, high = mean
    axes.plot(
        numbers, [y + 0.16] * len(numbers), "o", color=colour, markersize=3, alpha=0.35, markeredgewidth=0
    )
    if low is not None and high is not None:  # a sign test of few seeds has no ends
        axes.plot([low, high], [y, y], color=colour, linewidth=5, alpha=0.5, solid_capstyle="butt")
    axes.plot([value], [y], "o", color=colour, markersize=6)


def _bounds(asks: str) -> list[float]:
    """The numbers in "above 0.1" or "within -1 to 1"."""
    return [float(word) for word in asks.split() if word not in ("above", "within", "to")]


def _lines(text: str, width: int) -> str:
    """``text`` on as many lines as it needs: what tells two names apart often stands at their ends."""
    return "\n".join(textwrap.wrap(text, width, break_long_words=False))
