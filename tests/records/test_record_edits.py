"""Applying the accepted operations to the object before gives the object after, byte for byte."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_examples import make, sha, target

from corrigible.errors import BadInputError
from corrigible.records import Edit, EditOp, Item, apply_edit, canonical_json, validate
from corrigible.records.editing import changed_ranges

# Characters that break careless offsets: surrogate pairs in UTF-16, combining marks, joiners, CRLF.
texts = st.text(st.sampled_from("ab 😀👩‍🚀é\u0301ä\r\n\u202e中"), max_size=30)


@st.composite
def edits(draw: st.DrawFn) -> tuple[str, str, list[dict[str, Any]]]:
    """A text, what it becomes, and operations of which some are rejected (built without our code)."""
    before = draw(texts)
    cuts = sorted(draw(st.lists(st.integers(0, len(before)), min_size=2, max_size=8)))
    ops: list[dict[str, Any]] = []
    after, place = "", 0
    for start, end in zip(cuts[::2], cuts[1::2], strict=False):
        old, new = before[start:end], draw(texts)
        op: dict[str, Any] = {"op": "replace", "at": [start, end], "before": old, "after": new}
        if not old:
            if not new:
                continue
            op = {"op": "insert", "at": [start, start], "after": new}
        elif not new:
            op = {"op": "delete", "at": [start, end], "before": old}
        op["decision"] = draw(st.sampled_from(["accept", "reject", "modify", "none"]))
        after += before[place:start] + (old if op["decision"] == "reject" else new)
        place = end
        ops.append(op)
    return before, after + before[place:], ops


@given(edits())
def test_accepted_operations_give_the_text_after(case: tuple[str, str, list[dict[str, Any]]]) -> None:
    before, after, ops = case
    edit = Edit.from_json({"after": sha(after), "ops": ops})
    assert apply_edit(before, edit) == after
    assert apply_edit(before, Edit.from_json(edit.to_json_text())) == after
    fixed = changed_ranges(edit)
    new = [op["after"] for op in ops if op["decision"] != "reject" and op.get("after")]
    assert [after[a:b] for a, b in fixed] == new
    record = make("edit", {"after": sha(after), "ops": ops}, targets=[target(before)])
    assert validate(record, {sha(before): Item.of_text(before)}) == []
    if ops:
        wrong = make("edit", {"after": sha(after + "!"), "ops": ops}, targets=[target(before)])
        assert [v.rule for v in validate(wrong, {sha(before): Item.of_text(before)})] == ["edit.after"]


def test_operations_must_fit_the_text() -> None:
    edit = Edit.from_json({"after": sha("x"), "ops": [{"op": "delete", "at": [0, 3], "before": "the"}]})
    with pytest.raises(BadInputError, match="the text there is 'a c'"):
        apply_edit("a cat", edit)
    with pytest.raises(BadInputError, match="only 2 characters"):
        apply_edit("th", edit)
    record = make("edit", {"after": sha("x"), "ops": edit.to_json()["ops"]}, targets=[target("a cat")])
    assert [v.rule for v in validate(record, {sha("a cat"): Item.of_text("a cat")})] == ["edit.fits"]
    assert [v.rule for v in validate(record, {})] == ["unresolved"]


@pytest.mark.parametrize(
    ("at", "to", "after"), [((0, 2), 5, "cdeabfg"), ((5, 7), 0, "fgabcde"), ((2, 4), 4, "abcdefg")]
)
def test_move_in_text(at: tuple[int, int], to: int, after: str) -> None:
    before = "abcdefg"
    move = EditOp(op="move", at=at, before=before[at[0] : at[1]], to=to)
    edit = Edit(after=sha(after), ops=(move,))
    assert apply_edit(before, edit) == after


TREE = {"a": [1, 2, 3], "b": {"c": "x"}, "d/e": None, "links": ["p", "q"]}
JSON_CASES: list[tuple[list[dict[str, Any]], Any]] = [
    ([{"op": "replace", "at": "/b/c", "before": "x", "after": "y"}], {**TREE, "b": {"c": "y"}}),
    ([{"op": "delete", "at": "/a/1", "before": 2}], {**TREE, "a": [1, 3]}),
    ([{"op": "delete", "at": "/a/0"}, {"op": "delete", "at": "/a/2"}], {**TREE, "a": [2]}),
    (
        [{"op": "insert", "at": "/a/1", "after": 7}, {"op": "delete", "at": "/a/1"}],
        {**TREE, "a": [1, 7, 3]},
    ),
    (
        [{"op": "insert", "at": "/a/1", "after": 7}, {"op": "insert", "at": "/a/1", "after": 8}],
        {**TREE, "a": [1, 7, 8, 2, 3]},
    ),
    (
        [{"op": "insert", "at": "/a/-", "after": 7}, {"op": "insert", "at": "/a/-", "after": 8}],
        {**TREE, "a": [1, 2, 3, 7, 8]},
    ),
    ([{"op": "insert", "at": "/b/new", "after": [1]}], {**TREE, "b": {"c": "x", "new": [1]}}),
    ([{"op": "replace", "at": "/d~1e", "before": None, "after": {"k": 1}}], {**TREE, "d/e": {"k": 1}}),
    ([{"op": "move", "at": "/a/0", "to": "/a/3"}], {**TREE, "a": [2, 3, 1]}),
    ([{"op": "move", "at": "/b/c", "to": "/a/-"}], {**TREE, "a": [1, 2, 3, "x"], "b": {}}),
    ([{"op": "link", "at": "/links", "after": "r"}], {**TREE, "links": ["p", "q", "r"]}),
    ([{"op": "unlink", "at": "/links", "before": "p"}], {**TREE, "links": ["q"]}),
    ([{"op": "delete", "at": "/a/0", "decision": "reject"}], TREE),
    ([{"op": "replace", "at": "", "after": [1]}], [1]),
]


@pytest.mark.parametrize(("ops", "after"), JSON_CASES)
def test_operations_on_json(ops: list[dict[str, Any]], after: Any) -> None:
    before = Item.of_json(TREE)
    edit = Edit.from_json({"after": sha(canonical_json(after)), "medium": "json", "ops": ops})
    assert json.loads(apply_edit(str(before.text), edit)) == after
    item = Item.of_json(after)
    assert apply_edit(str(before.text), edit) == item.text and edit.after == item.sha256


@pytest.mark.parametrize(
    ("op", "message"),
    [
        ({"op": "delete", "at": "/nowhere"}, "nothing at '/nowhere'"),
        ({"op": "delete", "at": "/a/3"}, "nothing at '/a/3'"),
        ({"op": "replace", "at": "/b/c", "before": "z", "after": 1}, 'the value there is "x"'),
        ({"op": "insert", "at": "/b/c", "after": 1}, "already is"),
        ({"op": "insert", "at": "/a/4", "after": 1}, "has 3 elements"),
        ({"op": "insert", "at": "/b/c/d", "after": 1}, "neither list nor object"),
        ({"op": "link", "at": "/links", "after": "p"}, "lacks the value"),
        ({"op": "unlink", "at": "/links", "before": "z"}, "holds the value"),
    ],
)
def test_operations_must_fit_the_json(op: dict[str, Any], message: str) -> None:
    edit = Edit.from_json({"after": sha(""), "medium": "tree", "ops": [op]})
    with pytest.raises(BadInputError, match=message):
        apply_edit(canonical_json(TREE), edit)
    with pytest.raises(BadInputError, match="not JSON"):
        apply_edit("{", edit)


@given(st.lists(st.integers(), max_size=8), st.data())
def test_list_edits_equal_a_plain_rebuild(values: list[int], data: st.DataObject) -> None:
    """All coordinates are those of the list before; the oracle rebuilds the list from left to right."""
    ops: list[dict[str, Any]] = []
    after: list[Any] = []
    for i, value in enumerate([*values, None]):
        for new in data.draw(st.lists(st.text(max_size=2), max_size=2)):
            ops.append({"op": "insert", "at": f"/{i}" if i < len(values) else "/-", "after": new})
            after.append(new)
        if i == len(values):
            break
        fate = data.draw(st.sampled_from(["keep", "delete", "replace"]))
        if fate == "keep":
            after.append(value)
        elif fate == "delete":
            ops.append({"op": "delete", "at": f"/{i}", "before": value})
        else:
            ops.append({"op": "replace", "at": f"/{i}", "before": value, "after": "new"})
            after.append("new")
    given_values = copy.deepcopy(values)
    edit = Edit.from_json({"after": sha(canonical_json(after)), "medium": "json", "ops": ops})
    assert json.loads(apply_edit(canonical_json(values), edit)) == after
    assert values == given_values
