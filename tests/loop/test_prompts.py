from __future__ import annotations

from collections import Counter

import pytest

from corrigible.errors import BadInputError
from corrigible.loop.prompts import household, read_prompts, split


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
    plain.write_text("First?\n\nSecond?\n", encoding="utf-8")
    assert [p.text for p in read_prompts(plain)] == ["First?", "Second?"]
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "Wörter?", "topic": "t"}\n', encoding="utf-8")
    assert read_prompts(lines)[0].topic == "t"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.txt", b"\n\n", "holds no prompt"),
        ("b.jsonl", b'{"prompt": "a"}\n{oops\n', "line 2 is not JSON"),
        ("c.jsonl", b'{"text": "a"}\n', 'line 1 has no text under "prompt"'),
        (
            "d.jsonl",
            b'{"id": "x", "prompt": "a"}\n{"id": "x", "prompt": "b"}\n',
            "line 2: the id x came before",
        ),
        ("f.txt", b"caf\xe9\n", "not a UTF-8 text file"),
    ],
)
def test_bad_files_name_the_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=message):
        read_prompts(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadInputError, match="no file"):
        read_prompts(tmp_path / "none.txt")
