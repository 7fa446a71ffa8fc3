"""JSON Schema of the records; ``python -m corrigible.records.schema`` prints it."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from corrigible.records.base import Record
from corrigible.records.episodes import Episode
from corrigible.records.feedback import Feedback
from corrigible.records.items import Item
from corrigible.records.policies import PolicyVersion

ROOTS: tuple[type[Record], ...] = (Feedback, Episode, Item, PolicyVersion)


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of everything that is stored, under ``$defs`` by class name.

    Structure, types and bounds are in the schema; invariants between fields are in the models.
    """
    _, schema = models_json_schema([(model, "validation") for model in ROOTS])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "corrigible/records@1",
        "title": "Corrigible records",
        "anyOf": [{"$ref": f"#/$defs/{model.__name__}"} for model in ROOTS],
        "$defs": schema["$defs"],
    }
