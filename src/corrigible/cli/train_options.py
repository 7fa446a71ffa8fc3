"""Command-line options made from a typed config, and the config made from what was typed.

Every field of a config is an option: its description is the help, its default the default. What the config
refuses is told as that option's fault, with exit code 3, wherever the rule stands.
"""

from __future__ import annotations

import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

import typer
from rich.markup import escape

from corrigible.errors import BadInputError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

M = TypeVar("M", bound="BaseModel")
SIMPLE = (bool, int, float, str)


@dataclass(frozen=True)
class Setting:
    """One field of a config as an option.

    Attributes:
        field: its name in the config.
        flag: what users type.
        parameter: of the command's function.
        is_json: whether it is typed as JSON, having no plainer form.
    """

    field: str
    flag: str
    parameter: inspect.Parameter
    is_json: bool


def settings_of(
    config: type[BaseModel], *, panel: str, prefix: str = "", taken: Collection[str] = ()
) -> list[Setting]:
    """An option for every field of a config, in its order.

    Numbers, text and flags are typed as they are; one of a few words is shown as a choice; several values
    of a kind are given by repeating the option; anything else is JSON.

    Args:
        config: the pydantic model.
        panel: heading in ``--help``.
        prefix: put before the names of fields that are ``taken``.
        taken: parameters that the command has already.
    """
    found = []
    for name, field in config.model_fields.items():
        parameter = f"{prefix}_{name}" if name in taken else name
        flag = f"--{parameter.replace('_', '-')}"
        annotation, shown, is_json = _typed(field.annotation)
        found.append(
            Setting(
                name,
                flag,
                inspect.Parameter(
                    parameter.replace("-", "_"),
                    inspect.Parameter.KEYWORD_ONLY,
                    default=_option(field, flag, annotation, shown, is_json, panel),
                    annotation=annotation if field.default is not None else annotation | None,
                ),
                is_json,
            )
        )
    return found


def config_from(config: type[M], settings: Sequence[Setting], given: Mapping[str, Any], command: str) -> M:
    """The config of what was typed.

    Args:
        config: the pydantic model.
        settings: its options (:func:`settings_of`).
        given: values by the command's parameters.
        command: which command, for the advice.

    Raises:
        BadInputError: a value is refused; the message names the option.
    """
    from pydantic import ValidationError

    flags = {setting.field: setting.flag for setting in settings}
    values: dict[str, Any] = {}
    for setting in settings:
        value = given[setting.parameter.name]
        if value is None:
            continue
        if setting.is_json and isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise BadInputError(f"{setting.flag}: {value!r} is no JSON ({error}).") from error
        values[setting.field] = value
    try:
        return config.model_validate(values)
    except ValidationError as error:
        wrong = error.errors()[0]
        said = wrong["msg"].removeprefix("Value error, ").rstrip(".")
        if wrong["loc"] and wrong["loc"][0] in flags:
            said = f"{flags[str(wrong['loc'][0])]}: {said}"
        else:  # a rule about several fields, which it calls by their names
            said = re.sub(r"\b(\w+)\b", lambda match: flags.get(match[0], match[0]), said)
        raise BadInputError(f"{said}.", advice=f"See {command} --help.") from error


def _typed(annotation: Any) -> tuple[Any, str | None, bool]:
    """How a field of this type is typed in: its type for typer, its choices, and whether it is JSON."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        return _typed(arguments[0])
    if origin in (typing.Union, types.UnionType):
        others = [each for each in arguments if each is not type(None)]
        if len(others) == 1:
            return _typed(others[0])
        # The config tells them apart: "0.2" is a number to it where a number is allowed.
        return str, None, not all(each in SIMPLE or get_origin(each) is typing.Literal for each in others)
    if origin is typing.Literal:
        return str, "|".join(str(value) for value in arguments), False
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return str, "|".join(str(value.value) for value in annotation), False
    if annotation in SIMPLE:
        return annotation, None, False
    if origin in (list, tuple) and all(each in SIMPLE or each is ... for each in arguments):
        if origin is list or arguments[-1] is ...:
            return list[arguments[0]], None, False  # type: ignore[valid-type]
        return annotation, None, False
    return str, None, True


def _option(
    field: FieldInfo, flag: str, annotation: Any, choices: str | None, is_json: bool, panel: str
) -> Any:
    default = ... if field.is_required() else field.get_default(call_default_factory=True)
    if default is not ...:
        default = _as_typed(default, is_json)
    names = (flag,)
    if annotation is bool and default is True:
        names = (f"{flag}/--no-{flag.removeprefix('--')}",)
    bounds = (
        {key: _bound(field, key) for key in ("gt", "ge", "lt", "le")} if annotation in (int, float) else {}
    )
    said = [escape(" ".join((field.description or "").split()))]
    said += ["As JSON."] if is_json else []
    # typer's own ranges include their ends; the config refuses these.
    said += [f"Above {bounds['gt']:g}."] if bounds.get("gt") is not None else []
    said += [f"Below {bounds['lt']:g}."] if bounds.get("lt") is not None else []
    return typer.Option(
        default,
        *names,
        help=" ".join(text for text in said if text),
        min=bounds.get("ge"),
        max=bounds.get("le"),
        metavar=f"[{choices}]" if choices else None,
        autocompletion=_completion(choices) if choices else None,
        show_default=default not in (None, ..., False, []),
        rich_help_panel=panel,
    )


def _as_typed(default: Any, is_json: bool) -> Any:
    from pydantic_core import to_jsonable_python

    if default is None:
        return None
    plain = to_jsonable_python(default)
    if is_json:
        return json.dumps(plain)
    return tuple(plain) if isinstance(default, tuple) else plain


def _bound(field: FieldInfo, key: str) -> Any:
    return next((value for rule in field.metadata if (value := getattr(rule, key, None)) is not None), None)


def _completion(choices: str) -> Callable[[], list[str]]:
    return lambda: choices.split("|")
