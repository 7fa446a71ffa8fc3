"""Options from a typed config: every type, every bound, and messages that name what was typed."""

from __future__ import annotations

import enum
import json
from typing import Any, Literal

import pytest
import typer
from pydantic import BaseModel, ConfigDict, Field, model_validator
from typer.testing import CliRunner, Result

from corrigible.cli.train_options import config_from, settings_of
from corrigible.errors import BadInputError


class Colour(enum.Enum):
    red = "r"
    green = "g"


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    rate: float = Field(0.5, gt=0, lt=1, description="A rate [bold].")
    count: int = Field(3, ge=1, le=9, description="A count.")
    longest: int | None = Field(None, ge=1, description="The longest.")
    on: bool = Field(True, description="On.")
    off: bool = Field(False, description="Off.")
    mode: Literal["a", "b"] = Field("a", description="A mode.")
    colour: Colour = Field(Colour.red, description="A colour.")
    words: tuple[str, ...] = Field(("x", "y"), description="Words.")
    range: tuple[float, float] = Field((0.0, 1.0), description="Both ends.")
    weights: dict[str, float] = Field({"good": 1.0}, description="By class.")
    flips: float | Literal["pair"] = Field(0.1, description="A number, or pair.")
    seed: int = Field(0, description="Another seed.")

    @model_validator(mode="after")
    def _check(self) -> Settings:
        if self.range[0] > self.range[1]:
            raise ValueError("range must rise")
        return self


def invoke(*arguments: str) -> Result:
    app = typer.Typer()
    settings = settings_of(Settings, panel="Settings", prefix="my", taken={"seed"})

    def command(**given: Any) -> None:
        try:
            typer.echo(config_from(Settings, settings, given, "corrigible x").model_dump_json())
        except BadInputError as error:
            typer.echo(f"{error}")
            raise typer.Exit(3) from error

    import inspect

    parameters = [setting.parameter for setting in settings]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    app.command()(command)
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def test_nothing_typed_is_the_config_s_own_defaults() -> None:
    result = invoke()
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads(Settings().model_dump_json())


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--rate", "0.25"], "rate", 0.25),
        (["--count", "9"], "count", 9),
        (["--longest", "7"], "longest", 7),
        (["--no-on"], "on", False),
        (["--off"], "off", True),
        (["--mode", "b"], "mode", "b"),
        (["--colour", "g"], "colour", "g"),
        (["--words", "p", "--words", "q q"], "words", ["p", "q q"]),
        (["--range", "2", "3.5"], "range", [2.0, 3.5]),
        (["--weights", '{"good": 2}'], "weights", {"good": 2.0}),
        (["--flips", "0.3"], "flips", 0.3),
        (["--flips", "pair"], "flips", "pair"),
        (["--my-seed", "4"], "seed", 4),
    ],
)
def test_every_type_can_be_typed(arguments: list[str], field: str, value: object) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)[field] == value


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--rate", "0"], 3, "--rate: Input should be greater than 0"),
        (["--rate", "1"], 3, "--rate: Input should be less than 1"),
        (["--count", "10"], 2, "--count"),
        (["--count", "many"], 2, "--count"),
        (["--mode", "c"], 3, "--mode: Input should be 'a' or 'b'"),
        (["--colour", "b"], 3, "--colour"),
        (["--weights", "{good"], 3, "--weights: '{good' is no JSON"),
        (["--weights", '{"good": "much"}'], 3, "--weights: Input should be a valid number"),
        (["--flips", "often"], 3, "--flips"),
        (["--longest", "0"], 2, "--longest"),
        (["--range", "3", "2"], 3, "--range must rise. See corrigible x --help."),
    ],
)
def test_what_is_refused_is_named(arguments: list[str], code: int, says: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert says in " ".join(result.output.split())


def test_help_says_what_the_config_says() -> None:
    shown = " ".join(invoke("--help").stdout.split())
    for text in ("A rate [bold].", "Above 0. Below 1.", "[default: 0.5]", "1<=x<=9", "[a|b]", "[r|g]"):
        assert text in shown, text
    assert "--no-on" in shown and "As JSON." in shown and '{"good": 1.0}' in shown and "--my-seed" in shown
