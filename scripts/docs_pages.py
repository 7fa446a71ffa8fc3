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
    """Put the room pages where the navigation says ``reference/python/``."""
    _fill(config["nav"])
    return config


def _fill(nav: Any) -> None:
    for entry in nav:
        if isinstance(entry, dict):
            for title, value in entry.items():
                if value == "reference/python/":
                    entry[title] = [f"reference/python/{name}.md" for name in room_pages()]
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
        "reference/claims.md": claims_page(),
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
    """The algorithm registry with every setting."""
    from corrigible.align import ALGORITHMS

    lines = [
        "# Algorithms",
        "",
        "An algorithm is a named triple: where examples come from, what they are worth, how the policy "
        "moves. Made from the registry; [Algorithms](../guides/algorithms.md) helps to choose.",
        "",
        "| name | source × weight | learns from | paper |",
        "|---|---|---|---|",
    ]
    for name, entry in ALGORITHMS.items():
        kinds = ", ".join(f"[`{kind}`](kinds.md#{kind})" for kind in sorted(entry.learns_from))
        lines.append(
            f"| [`{name}`](#{name}) | {entry.source} × {entry.weight} | {kinds} | {cell(entry.paper)} |"
        )
    for name, entry in ALGORITHMS.items():
        lines += ["", f"## {name} {{ #{name} }}", "", prose(entry.doc), "", "| setting | type | default | |"]
        lines.append("|---|---|---|---|")
        for setting, field in entry.config.model_fields.items():
            default = "required" if field.is_required() else f"`{field.default}`"
            kind, said = cell(type_name(field.annotation)), cell(field.description or "")
            lines.append(f"| `{setting}` | {kind} | {default} | {said} |")
    return "\n".join(lines) + "\n"


def claims_page() -> str:
    """The registered claims."""
    from corrigible.claims import load_claims

    lines = [
        "# Claims",
        "",
        "`corrigible claims run NAME` runs one; [Claims](../guides/claims.md) says how.",
        "",
    ]
    lines += ["| claim | hypothesis | paper | seeds |", "|---|---|---|---|"]
    lines += [
        f"| `{entry.id}` | {cell(entry.hypothesis)} | {cell(entry.paper)} | {len(entry.seeds)} |"
        for entry in load_claims().values()
    ]
    return "\n".join(lines) + "\n"
