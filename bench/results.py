"""RESULTS.json, one entry a benchmark, merged key by key; and RESULTS.md, written from the whole of it.

An entry::

    {"what": "...",                    one sentence
     "ratio_name": "faster_than_trl",  what the ratio is of
     "ratio": 6.1, "low": 5.8, "high": 6.4,
     "memory_ratio": 0.4,              where memory is compared: ours over theirs
     "measures": {name: {"median": ..., "low": ..., "high": ...}},
     "labels": {name: text},           what is no number
     "table": [{column: cell}],        where one number is not enough
     "runs": 5, "command": "...", "machine": {...}, "date": "2026-01-31"}
"""

from __future__ import annotations

import json
import platform
import shlex
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def machine() -> dict[str, Any]:
    """What the numbers were measured on; no names, no paths."""
    import psutil

    from corrigible.cli.doctor import cpu

    facts = cpu().facts
    return {
        "cpu": facts["model"],
        "cores": facts["cores"],
        "instruction_sets": facts["instruction_sets"],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def signed(entry: Mapping[str, Any], *, what: str, ratio_name: str, command: Sequence[str]) -> dict[str, Any]:
    """``entry`` with what it is, how it was made, where and when."""
    return {
        "what": what,
        "ratio_name": ratio_name,
        **entry,
        "command": shlex.join(("python", *command)),
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def write(results: Mapping[str, Any], folder: Path = HERE) -> None:
    """Merge ``results`` into RESULTS.json by benchmark name and write RESULTS.md from the whole."""
    path = folder / "RESULTS.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    merged = dict(sorted((known | dict(results)).items()))
    for name, text in (
        ("RESULTS.json", json.dumps(merged, indent=2, ensure_ascii=False) + "\n"),
        ("RESULTS.md", as_markdown(merged)),
    ):
        # An evening of measuring is not lost to a kill between two bytes.
        partial = folder / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)


def as_markdown(results: Mapping[str, Any]) -> str:
    """The results as a page: all ratios first, then a section for each benchmark."""
    lines = [
        "# Benchmark results",
        "",
        "Written by `python -m bench` (`make bench`) from RESULTS.json.",
        "",
        "| benchmark | ratio | low | high | memory ratio |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| [{name}](#{_anchor(name)}) | {entry['ratio']:.3g} | {entry['low']:.3g} "
            f"| {entry['high']:.3g} | {_cell(entry.get('memory_ratio', ''))} |"
            for name, entry in results.items()
        ),
    ]
    for name, entry in results.items():
        lines += ["", f"## {name}", "", entry["what"], "", _headline(entry)]
        if entry.get("measures"):
            lines += [
                "",
                "| measure | median | low | high |",
                "|---|---:|---:|---:|",
                *(
                    f"| {key} | {value['median']:,g} | {value['low']:,g} | {value['high']:,g} |"
                    for key, value in entry["measures"].items()
                ),
            ]
        if entry.get("table"):
            columns = list(entry["table"][0])
            lines += [
                "",
                f"| {' | '.join(columns)} |",
                f"|{'---:|' * len(columns)}",
                *(f"| {' | '.join(_cell(row.get(c, '')) for c in columns)} |" for row in entry["table"]),
            ]
        if entry.get("labels"):
            lines += ["", *(f"- {key}: {value}" for key, value in entry["labels"].items())]
        where = entry["machine"]
        lines += [
            "",
            f"`{entry['command']}`, {entry['date']}, {where['cpu']}, {where['cores']} cores, "
            f"{where['memory_gib']} GiB, {where['system']}, Python {where['python']}, torch {where['torch']}",
        ]
    return "\n".join(lines) + "\n"


def _headline(entry: Mapping[str, Any]) -> str:
    text = (
        f"**{entry['ratio_name']}: {entry['ratio']:.3g}** ({entry['low']:.3g} to {entry['high']:.3g}, "
        f"{entry['runs']} runs)"
    )
    return f"{text}; memory ratio {entry['memory_ratio']:.2g}" if "memory_ratio" in entry else text


def _cell(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _anchor(name: str) -> str:
    return name.replace("/", "").replace(" ", "-").lower()
