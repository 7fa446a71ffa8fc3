"""One valid record of every kind."""

from __future__ import annotations

from typing import Any

from corrigible.records import (
    KINDS,
    Annotator,
    Feedback,
    Item,
    ItemType,
    TargetRef,
)

PERSON = Annotator(
    pseudonym="ada",
    type="human",
    version="guide-2",
    groups=frozenset({"b", "a"}),
    expertise=frozenset({"maths"}),
)


def target(content: str, type: ItemType = "response", **place: Any) -> TargetRef:
    return TargetRef.of(Item.of_text(content, type), **place)


def sha(content: str) -> str:
    return Item.of_text(content).sha256


_SPAN = {"start": 0, "end": 3, "unit": "char", "label": "wrong", "polarity": -1, "severity": 2, "note": ""}
_SEGMENTS = [target(f"segment {i}", "segment", episode=f"e{i}", steps=(5, 30)) for i in range(2)]
_RESPONSES = [target(f"response {i}") for i in range(4)]

PAYLOADS: dict[str, tuple[list[TargetRef], dict[str, Any]]] = {
    "comparison": (_RESPONSES[:2], {"outcome": "first", "strength": 2, "criterion": "helpfulness"}),
    "ranking": (_RESPONSES, {"levels": [[2], [0, 1]], "unranked": [3], "tail": "worse", "ok_until": 0}),
    "rating": (
        _RESPONSES[:1],
        {
            "value": 3.5,
            "scale": {
                "id": "s",
                "min": 1,
                "max": 5,
                "step": 0.5,
                "level": "ordinal",
                "anchors": {"1": "bad"},
            },
            "criterion": "clarity",
        },
    ),
    "reaction": (_RESPONSES[:1], {"value": -1, "tags": ["too long"]}),
    "critique": (
        _RESPONSES[:2],
        {
            "text": "Wrong date.",
            "aspects": [{"aspect": "facts", "severity": 3, "span": {"start": 0, "end": 4}, "target": 1}],
            "polarity": -1,
            "suggestion": sha("better"),
            "lang": "en",
        },
    ),
    "spans": (
        _RESPONSES[:1],
        {"spans": [_SPAN], "exhaustive": True, "label_set": ["wrong"], "exclusive": True},
    ),
    "step_labels": (
        _RESPONSES[:1],
        {
            "labels": [{"i": 0, "value": 1}, {"i": 1, "value": 0.4}, {"i": 3, "value": -1}],
            "first_error": 3,
            "judged_until": 4,
        },
    ),
    "edit": (
        [target("the cat sat")],
        {
            "after": sha("a cat sat"),
            "medium": "text",
            "ops": [{"op": "replace", "at": [0, 3], "before": "the", "after": "a", "intent": "style"}],
            "depth": 2,
        },
    ),
    "demonstration": (_RESPONSES[:1], {"text": "response 0", "source": "expert", "success": True}),
    "intervention": (
        [target("run", "trajectory", episode="parent")],
        {
            "mode": "takeover",
            "t_detect": 10,
            "t_rewind": 6,
            "t_take": 7,
            "t_recovered": 8,
            "t_release": 9,
            "branch": "child",
            "actions": [[0.5, 1.0], [0.25, -1.0]],
            "reason": "collision",
            "outcome": "saved",
        },
    ),
    "segment_preference": (
        _SEGMENTS,
        {
            "outcome": "b",
            "strength": 1,
            "len_a": 25,
            "len_b": 25,
            "dt_s": 0.05,
            "view": "video",
            "env": sha("env"),
        },
    ),
    "implicit_event": (
        [target("completion", "suggestion")],
        {
            "event": "kept",
            "value": 0.75,
            "session": "s1",
            "seq": 4,
            "delay_s": 30,
            "shown_set": [sha("completion")],
        },
    ),
    "verdict": (
        _RESPONSES[:2],
        {
            "principle": {"id": "P1", "text_sha": sha("be kind"), "constitution": "c"},
            "outcome": "first",
            "p": 0.7,
            "orders": ["first", "tie"],
            "evidence": [_SPAN],
        },
    ),
    "outcome": (
        _RESPONSES[:1],
        {
            "verifier": {"name": "pytest", "version": "8", "config": {"k": [1, None]}, "deterministic": True},
            "passed": False,
            "score": 0.5,
            "range": [0, 1],
            "parts": {"speed": 0.25},
            "tests": [{"name": "t1", "passed": True, "weight": 2, "ms": 1.5}, {"name": "t2", "passed": None}],
            "runtime_ms": 12,
        },
    ),
    "concept_correction": (
        [target("weights", "model")],
        {
            "concept": {
                "id": "c1",
                "name": "water",
                "pos": [sha(f"pos {i}") for i in range(5)],
                "neg": [sha(f"neg {i}") for i in range(5)],
            },
            "class": "duck",
            "action": "forbid",
            "rule": "forall x: duck(x) -> not water(x)",
            "lambda": 0.1,
            "layer": "12",
            "bank": ["duck"],
        },
    ),
    "click": (
        [target("pixels", "image")],
        {
            "tool": "keypoint",
            "object_id": "person 1",
            "xy": [[0.25, 0.5]],
            "keypoint": 3,
            "visible": 2,
            "round": 0,
            "before": sha("k0"),
            "after": sha("k1"),
            "size": [640, 480],
        },
    ),
    "label": (
        _RESPONSES[:1],
        {"values": ["sports"], "label_set": ["sports", "news"], "action": "replace", "previous": ["news"]},
    ),
    "answer": (
        [target("Which size?", "turn")],
        {
            "slots": {"size": {"values": ["m", "l"]}, "price": {"interval": [0, 30.5], "excluded": [13]}},
            "text": "m or l",
        },
    ),
    "approval": (
        [target("rm -r build", "action")],
        {
            "decision": "alternative",
            "alternative": sha("mv build old"),
            "scope": "session",
            "reversible": "never",
            "risk": 0.75,
            "source": "user",
        },
    ),
    "adjudication": (
        _RESPONSES[:2],
        {
            "resolves": ["01a1fc34-2cb2-76fb-8c86-e429d680d6d0"],
            "gold": {"kind": "comparison", "outcome": "tie", "strength": 0},
            "reason": "both right",
        },
    ),
}


def make(kind: str, change: dict[str, Any] | None = None, **envelope: Any) -> Feedback:
    """A valid record of a kind, with some payload keys changed (None removes a key)."""
    targets, fields = PAYLOADS[kind]
    fields = {k: v for k, v in {**fields, **(change or {})}.items() if v is not None}
    payload = KINDS[kind].from_json({"kind": kind, **fields})
    envelope.setdefault("annotator", PERSON)
    if kind == "implicit_event":
        envelope.setdefault("propensity", None)
    given = envelope.pop("targets", targets)
    return Feedback.on(given, payload, **envelope)
