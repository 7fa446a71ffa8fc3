"""MkDocs hook: the pages that are made from the code, so that they cannot disagree with it.

The tables of commands, record kinds, formats, algorithms and claims, one page per room of the
package, and the repository's CONTRIBUTING and CHANGELOG. tests/test_docs.py checks their text.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "src" / "corrigible"
PUBLISHED = REPOSITORY / "docs" / "claims" / "results"
ROOMS = (
    "records", "store", "models", "rewards", "align", "collect", "evaluate", "loop", "claims", "cli",
)  # fmt: skip


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for uri, text in pages().items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_config(config: Any) -> Any:
    """Put generated pages where the navigation names their folder: rooms, algorithms, claims."""
    _fill(config["nav"])
    return config


def _fill(nav: Any) -> None:
    for entry in nav:
        if isinstance(entry, dict):
            for title, value in entry.items():
                if value == "reference/python/":
                    entry[title] = [f"reference/python/{name}.md" for name in room_pages()]
                elif value == "algorithms/":
                    entry[title] = _algorithm_nav()
                elif value == "claims/":
                    entry[title] = ["claims/index.md", *sorted(f"claims/{id}.md" for id in _claim_ids())]
                elif isinstance(value, list):
                    _fill(value)


def pages() -> dict[str, str]:
    """Every generated page: path in the site -> Markdown."""
    python = {f"reference/python/{name}.md": text for name, text in room_pages().items()}
    return {
        "reference/cli.md": cli_page(),
        "reference/kinds.md": kinds_page(),
        "reference/formats.md": formats_page(),
        "reference/algorithms.md": algorithms_page(),
        **algorithm_pages(),
        "reference/claims.md": claims_page(),
        **claim_pages(),
        "contributing.md": _from_root("CONTRIBUTING.md"),
        "changelog.md": _from_root("CHANGELOG.md"),
        **python,
    }


def _from_root(name: str) -> str:
    """A page of the repository's root; its links into docs/ are relative to the site here."""
    return (REPOSITORY / name).read_text(encoding="utf-8").replace("](docs/", "](")


# --- Python -------------------------------------------------------------------------------------


def room_pages() -> dict[str, str]:
    """One page per room: its own docstring, then each of its public modules."""
    top = ["corrigible", "corrigible.errors", "corrigible.events", "corrigible.files", "corrigible.intervals"]
    made = {"corrigible": _page("corrigible", top)}
    made["corrigible"] += _module("corrigible.subscribers")
    for room in ROOMS:
        if (PACKAGE / room).is_dir():
            made[room] = _page(f"corrigible.{room}", list(_modules(PACKAGE / room)))
    return made


def _modules(folder: Path) -> Iterator[str]:
    def name(path: Path) -> str:
        return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")

    yield name(folder / "__init__.py")
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith("_") and part != "__init__.py" for part in parts)
        if not hidden and "migrations" not in parts[:-1] and path != folder / "__init__.py":
            yield name(path)


def _page(title: str, modules: list[str]) -> str:
    return f"# {title}\n\n" + "".join(_module(module) for module in modules)


def _module(module: str) -> str:
    return f"::: {module}\n\n"


# --- tables -------------------------------------------------------------------------------------


def cell(text: str) -> str:
    """``text`` as one table cell."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def prose(text: str | None) -> str:
    """A docstring as Markdown: dedented, roles and double backticks made plain."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", inspect.cleandoc(text or ""))
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def first_paragraph(text: str | None) -> str:
    """The first paragraph of a docstring, on one line."""
    return cell(prose(text).split("\n\n")[0])


def type_name(annotation: Any) -> str:
    """A type as a reader would say it: ``Annotated`` and module names left out."""
    if annotation is None or annotation is type(None):
        return "null"
    if annotation is ...:
        return "…"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f'"{value}"' for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if origin is not None:
        inside = ", ".join(type_name(argument) for argument in arguments)
        return f"{getattr(origin, '__name__', origin)}[{inside}]"
    return getattr(annotation, "__name__", str(annotation).removeprefix("typing."))


# --- commands -----------------------------------------------------------------------------------


def commands(group: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and command group below ``group``, with the words that call it."""
    for name, command in group.commands.items():
        if getattr(command, "hidden", False):
            continue
        yield (*prefix, name), command
        if hasattr(command, "commands"):
            yield from commands(command, (*prefix, name))


def cli_page() -> str:
    """Every command with its help, options and examples, and the exit codes."""
    import typer

    from corrigible.cli import EXIT_CODES, app

    root = typer.main.get_command(app)
    lines = ["# Command line", "", "`corrigible COMMAND --help` says the same in the terminal.", ""]
    lines += ["## Exit codes", "", "| code | meaning |", "|---|---|"]
    lines += [f"| {code} | {cell(meaning)} |" for code, meaning in EXIT_CODES.items()]
    lines += [
        "",
        "With `--json`, standard output holds exactly one JSON object: the result, or "
        '`{"error": {"type", "message", "advice", "exit_code"}}`. Progress goes to standard error.',
        "",
        "## Options of `corrigible` itself",
        "",
        *_options(root),
        "",
    ]
    for words, command in commands(root):
        lines += [f"## corrigible {' '.join(words)}", "", prose(command.help), ""]
        if not hasattr(command, "commands"):
            lines += [*_options(command), "", *_examples(command.epilog)]
    return "\n".join(lines) + "\n"


def _options(command: Any) -> list[str]:
    rows = []
    for parameter in command.params:
        if getattr(parameter, "hidden", False) or parameter.name in ("install_completion", "show_completion"):
            continue
        if parameter.param_type_name == "argument":
            shown = f"`{(parameter.metavar or parameter.name).upper()}`"
        else:
            shown = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
            if (parameter.metavar or "").startswith("["):  # one of a few words
                shown += f" `{parameter.metavar}`"
        default = getattr(parameter, "show_default", True) and parameter.default
        empty = default is None or default is False or default in ("", [], ()) or callable(default)
        said = "" if empty else f"`{_default(default)}`"
        variable = f" (`{parameter.envvar}`)" if parameter.envvar else ""
        rows.append(f"| {cell(shown)} | {cell(parameter.help or '')}{variable} | {cell(said)} |")
    return ["| | | default |", "|---|---|---|", *rows] if rows else []


def _default(value: Any) -> str:
    return str(getattr(value, "value", value))


def _examples(epilog: str | None) -> list[str]:
    if not epilog:
        return []
    from rich.text import Text

    shown = [line.strip() for line in Text.from_markup(epilog).plain.splitlines() if line.strip()]
    return ["```console", *(line for line in shown if line != "Examples"), "```", ""]


# --- records ------------------------------------------------------------------------------------


def kinds_page() -> str:
    """The payload kinds with their fields, the reasons for not judging, and the envelope."""
    from corrigible.records import Feedback, NotJudged
    from corrigible.records.payloads import KINDS

    lines = [
        "# Record kinds",
        "",
        f"A feedback record is an envelope and one of {len(KINDS)} payload kinds, or the reason why there "
        "is none. This page is made from the classes; [Records](../guides/records.md) explains them.",
        "",
        "| kind | targets | what it is |",
        "|---|---|---|",
    ]
    for kind, model in KINDS.items():
        low, high = model.min_targets, model.max_targets
        targets = str(low) if low == high else f"{low} or more" if high is None else f"{low} to {high}"
        lines.append(f"| [`{kind}`](#{kind}) | {targets} | {first_paragraph(model.__doc__)} |")
    for kind, model in KINDS.items():
        lines += [
            "",
            f"## {kind} {{ #{kind} }}",
            "",
            prose(model.__doc__),
            "",
            *_fields(model, skip={"kind"}),
        ]
    lines += ["", "## Not judged { #not_judged }", "", prose(NotJudged.__doc__), "", *_fields(NotJudged)]
    lines += ["", "## Envelope { #envelope }", "", prose(Feedback.__doc__), "", *_fields(Feedback)]
    return "\n".join(lines) + "\n"


def _fields(model: Any, skip: set[str] | None = None) -> list[str]:
    rows = ["| field | type | default |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        if name in (skip or set()):
            continue
        if field.is_required():
            default = "required"
        elif field.default_factory is not None:
            default = "made"
        else:
            default = f"`{_default(field.default)}`" if field.default not in (None, "", ()) else ""
        rows.append(f"| `{field.alias or name}` | {cell(type_name(field.annotation))} | {cell(default)} |")
    return rows


# --- formats, algorithms, claims ----------------------------------------------------------------


def formats_page() -> str:
    """What can be imported and exported."""
    from corrigible.store.formats import EXPORTERS, IMPORTERS

    lines = [
        "# Formats",
        "",
        "Made from the registries; [Formats](../guides/formats.md) explains how to import and export.",
        "",
        "| format | import | export |",
        "|---|---|---|",
    ]
    for name in sorted({*IMPORTERS, *EXPORTERS}):
        read = IMPORTERS[name].summary if name in IMPORTERS else "no"
        write = EXPORTERS[name].summary if name in EXPORTERS else "no"
        lines.append(f"| `{name}` | {cell(prose(read))} | {cell(prose(write))} |")
    for name in sorted(EXPORTERS):
        if EXPORTERS[name].options:
            lines += ["", f"## Export options of {name}", "", "| option | |", "|---|---|"]
            lines += [f"| `{key}` | {cell(text)} |" for key, text in EXPORTERS[name].options.items()]
    return "\n".join(lines) + "\n"


def algorithms_page() -> str:
    """The algorithm registry as one table a family."""
    from corrigible.align import ALGORITHMS
    from corrigible.cli.train import FAMILIES, first_sentence

    lines = [
        "# Algorithms",
        "",
        "An algorithm is a named triple: where examples come from, what they are worth, how the policy "
        "moves. Made from the registry; [Algorithms](../guides/algorithms.md) helps to choose.",
    ]
    for family, heading in FAMILIES.items():
        entries = [entry for entry in ALGORITHMS.values() if entry.family == family]
        if not entries:
            continue
        lines += [
            "",
            f"## {heading}",
            "",
            "| name | what it does | learns from | claim |",
            "|---|---|---|---|",
        ]
        for entry in entries:
            lines.append(
                f"| [`{entry.name}`](../algorithms/{entry.name}.md) "
                f"| {cell(prose(first_sentence(entry.doc)))} | {_learns_from(entry)} | {_verdict(entry)} |"
            )
    return "\n".join(lines) + "\n"


def algorithm_pages() -> dict[str, str]:
    """One page per algorithm."""
    from corrigible.align import ALGORITHMS

    return {f"algorithms/{name}.md": algorithm_page(entry) for name, entry in ALGORITHMS.items()}


def algorithm_page(entry: Any) -> str:
    """What an algorithm does, when to choose it, its settings, its metrics, and its claim."""
    from corrigible.align.metrics import logged_by

    reference = (
        "It is held near a frozen reference, which is scored once, before the first step."
        if entry.needs_reference
        else "It needs no reference."
    )
    lines = [
        f"# {entry.name}",
        "",
        prose(entry.doc),
        "",
        f"**Learns from** {_learns_from(entry)}. {reference}",
        "",
    ]
    lines += [f"**Paper:** {prose(entry.paper)}", ""]
    if entry.signal == "groups":
        lines += ["It has no command yet: [from Python](../guides/algorithms.md#from-python)."]
    else:
        run = f"corrigible train {entry.name} --store my.db --out runs/{entry.name}"
        lines += ["```console", run, "```", "", *_from_python(entry)]
    lines += ["", "## Settings", ""]
    rows = []
    for setting, field in entry.config.model_fields.items():
        default = (
            "required"
            if field.is_required()
            else f"`{_default(field.get_default(call_default_factory=True))}`"
        )
        kind, said = cell(type_name(field.annotation)), cell(field.description or "")
        rows.append(f"| `{setting}` | {kind} | {cell(default)} | {said} |")
    lines += (
        ["| setting | type | default | |", "|---|---|---|---|", *rows]
        if rows
        else ["It has none of its own."]
    )
    lines += ["", "Those of the trainer are the same for all: [the command](../reference/cli.md) lists them."]
    lines += ["", "## Metrics", "", "| metric | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {cell(meaning)} |" for name, meaning in logged_by(entry).items()]
    lines += ["", "## Its claim", "", _claimed(entry)]
    return "\n".join(lines) + "\n"


def _from_python(entry: Any) -> list[str]:
    return [
        "```py",
        "import corrigible",
        "",
        'with corrigible.Store.open("my.db") as store:',
        f'    corrigible.train("{entry.name}", store, out="runs/{entry.name}")',
        "```",
    ]


def _learns_from(entry: Any) -> str:
    kinds = ", ".join(f"[`{kind}`](../reference/kinds.md#{kind})" for kind in sorted(entry.learns_from))
    return f"{kinds} (as {entry.signal})"


def _verdict(entry: Any) -> str:
    if not entry.claim:
        return ""
    from corrigible.cli.algorithms import in_words, result_of

    return f"{entry.claim}: {in_words(result_of(entry, PUBLISHED))}"


def _claimed(entry: Any) -> str:
    if not entry.claim:
        return "No claim of its own: its loss is held against an oracle by the tests."
    if entry.claim not in _claim_ids():
        return f"{entry.claim} is not written yet."
    return f"[{entry.claim}](../claims/{entry.claim}.md): {_verdict(entry).partition(': ')[2]}."


def _algorithm_nav() -> list[Any]:
    from corrigible.align import ALGORITHMS
    from corrigible.cli.train import FAMILIES

    nav: list[Any] = []
    for family, heading in FAMILIES.items():
        names = [name for name, entry in ALGORITHMS.items() if entry.family == family]
        if names:
            nav.append({heading.partition(":")[0]: [f"algorithms/{name}.md" for name in names]})
    return nav


def claims_page() -> str:
    """The registered claims."""
    from corrigible.claims import load_claims

    lines = [
        "# Claims",
        "",
        "`corrigible claims run ID` runs one; [Claims](../guides/claims.md) says how a verdict is reached.",
        "",
    ]
    lines += ["| claim | hypothesis | paper | seeds | |", "|---|---|---|---|---|"]
    lines += [
        f"| `{entry.id}` | {cell(entry.hypothesis)} | {cell(entry.paper)} | {len(entry.seeds)} "
        f"| [what came out](../claims/{entry.id}.md) |"
        for entry in load_claims().values()
    ]
    return "\n".join(lines) + "\n"


def claim_pages() -> dict[str, str]:
    """What came out of the claims, from the results that are published with the project."""
    from corrigible.claims import load_claims
    from corrigible.claims.report import pages
    from corrigible.claims.results import Results

    made = pages(load_claims(), Results(PUBLISHED))
    return {f"claims/{name}": text for name, text in made.items()}


def _claim_ids() -> set[str]:
    """Claims that are registered, and such as have a published result and are not there any more."""
    from corrigible.claims import load_claims
    from corrigible.claims.results import Results

    return {*load_claims(), *(record.id for record in Results(PUBLISHED))}
