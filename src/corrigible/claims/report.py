"""The table of all claims and a page for each, from the results that were kept: Markdown and one HTML file.

A pure function of the claims and of their files. What was refuted is printed as refuted, what was never run
as not run, and a result whose claim is no longer there is still shown.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corrigible.claims.fixtures.statistics import holm, student_t
from corrigible.claims.framework import Claim
from corrigible.claims.results import Record, Results, about
from corrigible.claims.versions import claim_digest
from corrigible.files import write_atomically

NOT_RUN = "not run"


def table(claims: Mapping[str, Claim], records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row a claim, in the order of ids, as plain JSON values.

    ``id``, ``title``, ``verdict`` (with ``"not run"``), ``reason``, ``effect`` (its number), ``interval``,
    ``unit``, ``test``, ``seeds`` (how many), ``seconds``, ``budget``, ``over_budget``, ``control`` (the
    negative control that comes nearest to showing the effect: ``name``, ``effect``, ``interval``, ``shown``;
    null when there is none), ``controls`` and ``also`` (all of them), ``p`` (corrected for looks), ``p_holm``
    (corrected for the number of claims as well), ``looks``, ``date``, ``changed`` (whether the claim was
    changed since).
    """
    found = {record.id: record for record in records}
    corrected: dict[str, float] = {}
    judged = {id: record.result["p"] for id, record in found.items() if record.result["p"] is not None}
    if judged:
        corrected = dict(zip(judged, holm(list(judged.values())), strict=True))
    rows = []
    for id in sorted({*claims, *found}):
        record, claim = found.get(id), claims.get(id)
        if record is None:
            assert claim is not None
            rows.append(_row_of_nothing(claim))
            continue
        result, newest = record.result, record.history[-1]
        effect = result["effect"] or {}
        controls = [_brief(each) for each in result["controls"]]
        # Nearest to being shown: the smallest p.
        nearest = min(zip(result["controls"], controls, strict=True), key=lambda c: c[0]["p"], default=None)
        rows.append(
            {
                "id": id,
                "title": record.about["title"],
                "hypothesis": record.about["hypothesis"],
                "paper": record.about["paper"],
                "verdict": result["verdict"],
                "reason": result["reason"],
                "effect": effect.get("effect"),
                "interval": effect.get("interval"),
                "asks": effect.get("asks"),
                "unit": effect.get("unit"),
                "test": effect.get("test"),
                "seeds": len(newest["seeds"]),
                "seconds": result["seconds"],
                "budget": result["budget"],
                "over_budget": result["over_budget"],
                "control": nearest[1] if nearest else None,
                "controls": controls,
                "also": [_brief(each) for each in result["also"]],
                "p": result["p"],
                "p_holm": corrected.get(id),
                "looks": newest["look"],
                "date": newest["date"],
                "changed": claim is None or newest["version"]["claim"] != claim_digest(claim),
            }
        )
    return rows


def _row_of_nothing(claim: Claim) -> dict[str, Any]:
    nothing: dict[str, Any] = dict.fromkeys(
        (
            "effect",
            "interval",
            "asks",
            "unit",
            "test",
            "seconds",
            "over_budget",
            "control",
            "p",
            "p_holm",
            "date",
        )
    )
    words = {name: about(claim)[name] for name in ("id", "title", "hypothesis", "paper")}
    return {
        **words,
        **nothing,
        "verdict": NOT_RUN,
        "reason": f"corrigible claims run {claim.id}",
        "seeds": len(claim.seeds),
        "budget": claim.budget,
        "controls": [],
        "also": [],
        "looks": 0,
        "changed": False,
    }


def _brief(effect: Mapping[str, Any]) -> dict[str, Any]:
    return {name: effect[name] for name in ("name", "effect", "interval", "shown")}


def pages(
    claims: Mapping[str, Claim], results: Results, *, plots: bool = True, link: str = ""
) -> dict[str, str]:
    """The report as Markdown: ``index.md`` and ``ID.md`` for every claim.

    ``plots``: with inline SVG (a second or so each). ``link``: where the pages lie, from the index.
    """
    records = list(results)
    found = {record.id: record for record in records}
    rows = table(claims, records)
    made = {"index.md": _render("index.md.j2", rows=rows, counts=_counts(rows), link=link)}
    for row in rows:
        words = found[row["id"]].about if row["id"] in found else about(claims[row["id"]])
        made[f"{row['id']}.md"] = _render("page.md.j2", **_page(row, words, found.get(row["id"]), plots))
    return made


def html(claims: Mapping[str, Claim], results: Results) -> str:
    """The whole report as one HTML file that needs nothing else."""
    records = list(results)
    found = {record.id: record for record in records}
    rows = table(claims, records)
    shown = [
        _page(
            row,
            found[row["id"]].about if row["id"] in found else about(claims[row["id"]]),
            found.get(row["id"]),
        )
        for row in rows
    ]
    return _render("report.html.j2", rows=rows, counts=_counts(rows), pages=shown)


def write_report(claims: Mapping[str, Claim], results: Results, folder: Path) -> list[Path]:
    """Write ``index.md``, a page a claim and ``report.html`` into ``folder``; returns the paths.

    Raises:
        StorageError: the folder cannot be written.
    """
    texts = {**pages(claims, results), "report.html": html(claims, results)}
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return [folder / name for name in texts]


def _counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    order = ("supported", "not supported", "inconclusive", NOT_RUN)
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in order}
    return {verdict: count for verdict, count in counts.items() if count}


def _page(
    row: Mapping[str, Any], words: Mapping[str, Any], record: Record | None, plots: bool = True
) -> dict[str, Any]:
    """What the template of one claim is given."""
    page: dict[str, Any] = {"row": row, "words": words, "doc": _paragraphs(words["doc"]), "record": record}
    if record is None:
        return {**page, "effects": [], "values": [], "figures": []}
    result = record.result
    effects = [("effect", result["effect"])] if result["effect"] else []
    effects += [("also", each) for each in result["also"]] + [
        ("control", each) for each in result["controls"]
    ]
    outcomes = [run.outcome for run in record.runs.values() if run.outcome is not None]
    names = list(dict.fromkeys(name for outcome in outcomes for name in outcome.values))
    numbers = {name: [o.values[name] for o in outcomes if name in o.values] for name in names}
    values = []
    for name, column in numbers.items():
        mean = student_t(column) if len(column) > 1 else None
        interval = [mean.low, mean.high] if mean else None
        values.append({"name": name, "mean": mean.value if mean else column[0], "interval": interval})
    return {**page, "effects": effects, "values": values, "figures": _figures(row, record) if plots else []}


def _figures(row: Mapping[str, Any], record: Record) -> list[str]:
    from corrigible.claims import plots

    id, result = row["id"], record.result
    outcomes = [run.outcome for run in record.runs.values() if run.outcome is not None]
    made = []
    if result["effect"]:
        drawn = [result["effect"], *result["controls"]]
        made.append(plots.effect_plot(id, drawn, ["effect"] + ["control"] * len(result["controls"])))
    values = list(dict.fromkeys(name for outcome in outcomes for name in outcome.values))
    for panel, arms in plots.panels(values).items():
        columns = {arm: [o.values[arm] for o in outcomes if arm in o.values] for arm in arms}
        made.append(plots.arms_plot(id, panel, columns))
    curves = list(dict.fromkeys(name for outcome in outcomes for name in outcome.curves))
    for panel, lines in plots.panels(curves).items():
        made.append(plots.curves_plot(id, panel, outcomes, lines))
    return made


def _paragraphs(doc: str) -> str:
    """A docstring as Markdown: dedented, roles and double backticks made plain."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", inspect.cleandoc(doc))
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def number(value: float | None) -> str:
    """Three significant digits; a dash for what is not there.

    >>> number(0.012345), number(None), number(-1234.0)
    ('0.0123', '–', '-1234')
    """
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def interval(ends: Sequence[float | None] | None) -> str:
    """Two ends for people; an end that is nowhere is a dash.

    >>> interval([0.1, 0.25]), interval(None)
    ('0.1 to 0.25', '–')
    """
    return "–" if ends is None else f"{number(ends[0])} to {number(ends[1])}"


def _render(template: str, **context: Any) -> str:
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("corrigible.claims", "templates"),
        autoescape=template.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        number=number,
        interval=interval,
        cell=lambda text: re.sub(r"\s+", " ", str(text)).replace("|", "\\|").strip(),
        p=lambda p: "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}",
        # A page of the site is HTML too, so what is drawn must not end its block with an empty line.
        inline=lambda svg: re.sub(r"\n\s*\n", "\n", svg).strip(),
    )
    return environment.get_template(template).render(**context)
