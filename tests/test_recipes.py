"""The recipes of CONTRIBUTING.md work as written: each is applied to a copy of the package and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCK = re.compile(r'^```(python|diff) title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
NAMES = ("algorithm", "signal", "record kind", "claim")


@dataclass(frozen=True)
class Block:
    language: str
    path: str
    text: str


def recipe(name: str) -> list[Block]:
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    [text] = [part for part in section if part.startswith((f"Add a {name}\n", f"Add an {name}\n"))]
    return [Block(*match) for match in BLOCK.findall(text)]


def patched(text: str, diff: str) -> str:
    """``text`` after a diff whose hunks (between ``@@`` lines) are found by their own lines alone."""
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = [line or " " for line in hunk.splitlines()]
        old = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
        new = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
        assert text.count(old) == 1, f"the recipe's context occurs {text.count(old)} times:\n{old}"
        text = text.replace(old, new)
    return text


def test_every_recipe_works_as_written(tmp_path: Path, repository: Path) -> None:
    """All four in one copy: they must not be in each other's way either, and torch is imported once."""
    copy = tmp_path / "copy"
    shutil.copytree(
        repository / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    shutil.copy(repository / "pyproject.toml", copy)
    tests, written = [], []
    for name in NAMES:
        blocks = recipe(name)
        assert blocks and blocks[-1].path.startswith("tests/"), f"the recipe for a {name} ends with its test"
        for block in blocks:
            path = copy / block.path
            if block.language == "diff":
                path.write_text(patched(path.read_text(encoding="utf-8"), block.text), encoding="utf-8")
                continue
            assert not (repository / block.path).exists(), f"{block.path} exists by now: another example"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
            written.append(block.path)
            if block.path.startswith("tests/"):
                tests.append(block.path)
    environment = os.environ | {"PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"}
    for arguments in (["pytest", "-q", "-p", "no:cacheprovider", *tests], ["ruff", "check", *written]):
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_patcher_can_fail() -> None:
    assert patched("a\nb\nc\n", " a\n-b\n+B\n") == "a\nB\nc\n"
    with pytest.raises(AssertionError, match="occurs 0 times"):
        patched("a\nb\n", " x\n+y\n")


def test_each_recipe_is_about_a_page() -> None:
    for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        assert len(part.splitlines()) <= 130, part.splitlines()[0]


@pytest.mark.weights
def test_readme_example_runs(repository: Path, tmp_path: Path) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    section = text.partition("## In ten lines")[2].partition("\n## ")[0]
    [code] = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) <= 12, "it is called ten lines"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
