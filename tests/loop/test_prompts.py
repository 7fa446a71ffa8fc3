from __future__ import annotations

import json
from collections import Counter

import pytest

from corrigible.errors import BadInputError
from corrigible.loop.prompts import household, read_prompts, split
from corrigible.records import as_messages


def test_the_household_set_is_varied():
    prompts = household()
    assert len(prompts) == 200
    assert len({p.text for p in prompts}) == len({p.id for p in prompts}) == 200
    assert len({p.topic for p in prompts}) >= 12
    assert max(Counter(p.topic for p in prompts).values()) <= 20


def test_a_split_shares_nothing_and_covers_topics():
    train, held_out = split(household(), held_out=60, train=100, seed=3)
    assert (len(train), len(held_out)) == (100, 60)
    assert not {p.id for p in train} & {p.id for p in held_out}
    assert {p.topic for p in train} == {p.topic for p in held_out} == {p.topic for p in household()}
    assert split(household(), held_out=60, train=100, seed=3) == (train, held_out)
    assert split(household(), held_out=60, train=100, seed=4)[1] != held_out


def test_asking_for_too_many_says_so():
    with pytest.raises(BadInputError, match="there are 200"):
        split(household(), held_out=150, train=100, seed=0)


def test_files_of_one_s_own(tmp_path):
    plain = tmp_path / "p.txt"
    plain.write_text("\ufeffFirst?\r\n\nSecond?\n", encoding="utf-8")
    assert [p.text for p in read_prompts(plain)[0]] == ["First?", "Second?"]
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "Wörter\u2028?", "topic": "t", "id": 7}\n"bare"\n', encoding="utf-8")
    (first, second), bad = read_prompts(lines)
    assert (first.id, first.topic, first.text) == ("7", "t", "Wörter\u2028?")
    assert (second.id, second.text, bad) == ("line-2", "bare", [])


def test_a_conversation_is_a_prompt_and_keeps_its_own_system_message(tmp_path):
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    said.append({"role": "user", "content": "Why?"})
    ruled = [{"role": "system", "content": "Own."}, said[0]]
    lines = tmp_path / "p.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in ({"messages": said}, {"prompt": ruled}, said)))
    (plain, own, bare), _ = read_prompts(lines)
    assert plain.text == "Why?" and bare.messages() == plain.messages() == as_messages(said)
    assert [m.role for m in plain.messages("Given.")] == ["system", "user", "assistant", "user"]
    assert own.messages("Given.") == as_messages(ruled)


def test_a_bad_line_is_named_and_costs_no_other(tmp_path):
    lines = tmp_path / "p.jsonl"
    bad = ["{oops", '{"text": "a"}', '{"prompt": "  "}', '{"id": "x", "prompt": "b"}', "7"]
    bad.append('{"messages": [{"role": "user"}]}')
    lines.write_text("\n".join(['{"id": "x", "prompt": "a"}', *bad, '{"prompt": "z"}']))
    prompts, named = read_prompts(lines)
    assert [p.text for p in prompts] == ["a", "z"]
    says = ["not JSON", "no text", "no text", "the id x came before", "no text", "messages"]
    for number, (line, why) in enumerate(zip(named, says, strict=True), start=2):
        assert line.startswith(f"p.jsonl line {number} is skipped") and why in line


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.txt", b"\n\n", "holds no prompt"),
        ("c.jsonl", b'{"text": "a"}\n', 'holds no prompt: c.jsonl line 1 is skipped: .* under "prompt"'),
        ("f.txt", b"caf\xe9\n", "not a UTF-8 text file"),
    ],
)
def test_a_file_without_a_prompt_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=message):
        read_prompts(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadInputError, match="no file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(BadInputError, match="cannot be read: Is a directory"):
        read_prompts(tmp_path)
