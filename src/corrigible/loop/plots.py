"""Plots of a turn of the loop as inline SVG that follows the page's light or dark colours.

matplotlib writes fixed colours into its SVG; text and axes are drawn in a marker colour that is
replaced by ``currentColor`` afterwards, so that one picture serves both themes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

INK = "#010203"
START = "#8a94a6"
CANDIDATE = "#2f7dd1"
GOOD = "#2a9d63"
BAD = "#d1483f"


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of this size in inches and its axes, without a background; give it to :func:`as_svg`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "corrigible",  # same input, same bytes
            "font.family": "sans-serif",
            "font.size": 10,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.7,
        }
    )
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    return figure, axes


def as_svg(figure: Any, title: str) -> str:
    """The figure as SVG to be put into a page; ``title`` is read out, and unique on the page. Closes it."""
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": title})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # A page holds several figures: their internal ids must not collide.
    prefix = re.sub(r"\W+", "-", title.lower())
    text = re.sub(r'id="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    text = re.sub(
        r'<svg [^>]*viewBox="([^"]+)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{title}">', text
    )
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", text)


def win_rate_plot(rows: Sequence[tuple[str, float, float, float]], bar: float) -> str:
    """Win rates with their intervals against the gate's bar.

    Args:
        rows: (label, value, low, high), rates in [0, 1], top row first.
        bar: the gate's threshold in [0, 1].
    """
    figure, axes = new_figure(7.2, 0.9 + 0.45 * len(rows))
    for i, (_, value, low, high) in enumerate(rows):
        colour = GOOD if low > bar else (BAD if high < bar else START)
        axes.plot([low, high], [i, i], color=colour, linewidth=6, alpha=0.45, solid_capstyle="round")
        axes.plot([value], [i], "o", color=colour, markersize=9)
        axes.annotate(f"{value:.2f}", (value, i), (0, 9), textcoords="offset points", ha="center", fontsize=9)
    axes.axvline(bar, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.invert_yaxis()
    axes.margins(y=0.45)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of held-out prompts won against the starting policy")
    return as_svg(figure, "Win rate with interval")


def calibration_plot(bins: Sequence[tuple[float, float, int]]) -> str:
    """Reliability diagram: (mean stated probability, observed share, count) per bin."""
    figure, axes = new_figure(3.5, 3.1)
    axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=0.7, linestyle=(0, (4, 3)))
    if bins:
        largest = max(count for *_, count in bins)
        axes.scatter(
            [p for p, *_ in bins],
            [observed for _, observed, _ in bins],
            s=[30 + 170 * count / largest for *_, count in bins],
            color=CANDIDATE,
            alpha=0.75,
        )
    axes.set_xlim(0.48, 1.02)
    axes.set_ylim(-0.02, 1.04)
    axes.set_xlabel("stated probability")
    axes.set_ylabel("share that was right")
    return as_svg(figure, "Reward model calibration")


def bars_plot(
    rows: Sequence[tuple[str, float, float | None, float | None]], label: str, chance: float
) -> str:
    """Accuracies side by side: (name, value, low, high), with a line at chance."""
    figure, axes = new_figure(3.9, 3.1)
    for i, (_, value, low, high) in enumerate(rows):
        axes.bar([i], [value], color=CANDIDATE if i == 0 else START, width=0.6)
        if low is not None and high is not None:
            axes.plot([i, i], [low, high], color=INK, linewidth=1.3)
        axes.annotate(f"{value:.2f}", (i, 0.04), ha="center", fontsize=9, color="white", fontweight="bold")
    axes.axhline(chance, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xticks(range(len(rows)), [row[0] for row in rows])
    axes.set_ylim(0, 1)
    axes.set_ylabel(label)
    return as_svg(figure, label)


def training_plot(steps: Sequence[float], values: Sequence[float], label: str, line: float | None) -> str:
    """One training curve; ``line`` marks the value it starts from in theory."""
    figure, axes = new_figure(3.6, 2.6)
    axes.plot(steps, values, color=CANDIDATE, linewidth=1.6)
    if line is not None:
        axes.axhline(line, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    return as_svg(figure, label)


def paired_plot(before: Sequence[float], after: Sequence[float], label: str) -> str:
    """One point a prompt: score before against score after; above the diagonal is better."""
    figure, axes = new_figure(3.6, 3.3)
    low = min([*before, *after], default=0.0)
    high = max([*before, *after], default=1.0)
    pad = 0.05 * (high - low or 1.0)
    axes.plot(
        [low - pad, high + pad], [low - pad, high + pad], color=INK, linewidth=0.7, linestyle=(0, (4, 3))
    )
    colours = [GOOD if b > a else (BAD if b < a else START) for a, b in zip(before, after, strict=True)]
    axes.scatter(before, after, c=colours, s=22, alpha=0.75, linewidths=0)
    axes.set_xlabel(f"{label}, start")
    axes.set_ylabel(f"{label}, candidate")
    return as_svg(figure, f"{label} before and after")
