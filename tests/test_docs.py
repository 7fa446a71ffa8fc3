"""The documentation says everything there is: commands, options, kinds, formats, algorithms, settings."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from corrigible.cli import EXIT_CODES, app

ROOT = Path(__file__).parents[1]
GUIDES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").rglob("*.md"))}
README = (ROOT / "README.md").read_text(encoding="utf-8")
EVERYTHING_WRITTEN = "\n".join(
    [*GUIDES.values(), README, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")]
)


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    """The generated pages by path."""
    pages: dict[str, str] = runpy.run_path(str(ROOT / "scripts" / "docs_pages.py"))["pages"]()
    return pages


def commands(group: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        yield (*prefix, name), command
        if hasattr(command, "commands"):
            yield from commands(command, (*prefix, name))


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_and_option_is_in_the_reference(words: tuple[str, ...], made: dict[str, str]) -> None:
    section = re.split(r"^## ", made["reference/cli.md"], flags=re.MULTILINE)
    [text] = [part for part in section if part.startswith(f"corrigible {' '.join(words)}\n")]
    assert COMMANDS[words].help, "a command needs a docstring"
    if hasattr(COMMANDS[words], "commands"):
        return
    for parameter in COMMANDS[words].params:
        names = parameter.opts if parameter.param_type_name == "option" else [parameter.name.upper()]
        for name in names:
            assert f"`{name}`" in text or f"`{parameter.metavar}`" in text, name
        assert parameter.help or parameter.name == "help", f"{parameter.name} has no help text"
    assert "```console" in text


@pytest.mark.parametrize("words", [words for words in COMMANDS if len(words) == 1], ids=" ".join)
def test_every_command_is_in_a_guide_or_the_readme(words: tuple[str, ...]) -> None:
    assert f"corrigible {words[0]}" in EVERYTHING_WRITTEN


def test_commands_that_are_written_about_exist() -> None:
    """A command line in a code block must parse as far as its command and its options."""
    lines = [
        line.split("#")[0].strip()
        for block in re.findall(r"```console\n(.*?)```", EVERYTHING_WRITTEN, re.DOTALL)
        for line in block.splitlines()
    ]
    used = [line.split()[1:] for line in lines if line.startswith("corrigible ")]
    assert len(used) > 15
    for line in used:
        words: tuple[str, ...] = ()
        rest = list(line)
        while rest and rest[0] in ("--events", "--track"):
            rest = rest[2:]
        while rest and (*words, rest[0]) in COMMANDS:
            words = (*words, rest.pop(0))
        assert words, f"no command in: corrigible {' '.join(line)}"
        known = {option for p in COMMANDS[words].params for option in (*p.opts, *p.secondary_opts)} | {
            "--help"
        }
        for word in rest:
            if word.startswith("-"):
                assert word in known, f"{' '.join(words)} has no {word}"
        if "--help" not in rest and not line[-1].endswith("\\"):
            for parameter in COMMANDS[words].params:
                if parameter.required and parameter.param_type_name == "option":
                    assert {*parameter.opts} & {*rest}, f"{' '.join(words)} needs {parameter.opts[0]}"


def test_every_record_kind_is_documented(made: dict[str, str]) -> None:
    from corrigible.records import KINDS

    page = made["reference/kinds.md"]
    for kind, model in KINDS.items():
        assert f"{{ #{kind} }}" in page
        assert (model.__doc__ or "").strip(), f"{kind} has no docstring"
        for name, field in model.model_fields.items():
            if name != "kind":
                assert f"| `{field.alias or name}` |" in page.partition(f"{{ #{kind} }}")[2]


def test_every_algorithm_is_documented(made: dict[str, str]) -> None:
    from corrigible.align import ALGORITHMS
    from corrigible.align.metrics import logged_by

    for name, entry in ALGORITHMS.items():
        page = made[f"algorithms/{name}.md"]
        settings = page.partition("## Settings")[2].partition("## Metrics")[0]
        for setting, field in entry.config.model_fields.items():
            assert f"| `{setting}` |" in settings
            assert field.description, f"{name}.{setting} has no description"
        for metric in logged_by(entry):
            assert f"| `{metric}` |" in page.partition("## Metrics")[2]
        assert entry.claim in page and f"(../algorithms/{name}.md)" in made["reference/algorithms.md"]
        assert f"](../algorithms/{name}.md)" in GUIDES["algorithms.md"], f"the guide does not place {name}"


def test_every_format_is_documented(made: dict[str, str]) -> None:
    from corrigible.store.formats import EXPORTERS, IMPORTERS

    for name in {*IMPORTERS, *EXPORTERS}:
        assert f"| `{name}` |" in made["reference/formats.md"]
    for entry in (*IMPORTERS.values(), *EXPORTERS.values()):
        assert entry.summary, f"{entry.name} has no summary"


def test_every_environment_variable_is_documented_and_real() -> None:
    source = "\n".join(
        path.read_text(encoding="utf-8")
        for path in [*(ROOT / "src").rglob("*.py"), ROOT / "tests" / "conftest.py"]
    )
    used = set(re.findall(r"\bCORRIGIBLE_[A-Z_]*[A-Z]\b", source))
    written = set(re.findall(r"^\| `(CORRIGIBLE_[A-Z_]+)`", GUIDES["settings.md"], re.MULTILINE))
    assert used == written


def test_settings_of_trainer_and_reward_models_are_explained() -> None:
    from corrigible.align import TrainConfig
    from corrigible.rewards import RewardConfig

    assert all(field.description for field in TrainConfig.model_fields.values())
    for name in RewardConfig.__dataclass_fields__:
        assert re.search(rf"\b{name}\b", RewardConfig.__doc__ or ""), name


def test_every_claim_is_documented(made: dict[str, str]) -> None:
    from corrigible.claims import load_claims

    for name in load_claims():
        assert f"| `{name}` |" in made["reference/claims.md"]


def test_exit_codes_are_the_same_everywhere(made: dict[str, str]) -> None:
    for text in (README, made["reference/cli.md"]):
        assert {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)} == set(EXIT_CODES)


def test_every_module_is_in_the_python_reference(made: dict[str, str]) -> None:
    pages = "\n".join(text for path, text in made.items() if path.startswith("reference/python/"))
    package = ROOT / "src" / "corrigible"
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        if (path.stem.startswith("_") and path.stem != "__init__") or "migrations" in parts[:-1]:
            continue
        name = ".".join(parts).removesuffix(".__init__")
        assert f"::: {name}\n" in pages, name


def test_nothing_is_fetched_from_elsewhere() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in config
    for forbidden in ("extra_javascript", "inventories", "cdn", "googleapis"):
        assert not re.search(rf"^\s*-?\s*{forbidden}\b", config, re.MULTILINE)


def test_python_blocks_of_the_guides_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one guide share a namespace, in order, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    for name, text in GUIDES.items():
        namespace: dict[str, Any] = {"__name__": f"guide_{name}"}
        for code in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            exec(compile(code, name, "exec"), namespace)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--quiet",
            "--site-dir",
            str(tmp_path / "site"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        fetched = re.findall(r'(?:src|<link[^>]*href)="(https?://[^"]+)"', page.read_text(encoding="utf-8"))
        assert not [url for url in fetched if "canonical" not in url], page
