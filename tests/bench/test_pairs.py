"""Both sides of a comparison get the same tokens, chosen by the seed alone."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from bench.pairs import FILES, Group, as_json, data_folder, from_json, real_batches, synthetic_batches

from bench import ours, rival
from corrigible.errors import MissingError
from corrigible.models import Renderer
from corrigible.models.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tiny_tokenizer())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten good pairs in two files, and four that no trainer could be given."""
    folder = tmp_path / "hh-rlhf"
    folder.mkdir()

    def row(question: str, chosen: str, rejected: str) -> dict[str, str]:
        start = f"\n\nHuman: {question}\n\nAssistant: "
        return {"chosen": start + chosen, "rejected": start + rejected}

    good = [row(f"Question {i}?", f"Good answer {i}" + "." * i, f"Bad {i}") for i in range(10)]
    bad = [
        row("Same?", "Equal", "Equal"),
        row("Nothing?", "Something", " "),
        {"chosen": "\n\nHuman: One\n\nAssistant: A", "rejected": "\n\nHuman: Two\n\nAssistant: A"},
        row("Asks back?", "Yes\n\nHuman: And?\n\nAssistant: No", "Yes"),
    ]
    for name, rows in zip(FILES, (good[:5] + bad, good[5:]), strict=True):
        with gzip.open(folder / name, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(each) + "\n" for each in rows)
    return tmp_path


def test_the_choice_depends_on_the_seed_alone(data: Path, renderer: Renderer) -> None:
    first, again, other = (
        real_batches(renderer, data=data, batches=2, batch_size=4, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert [len(batch) for batch in first] == [4, 4]
    every = [group for batch in first for group in batch]
    assert len(set(every)) == 8
    assert all(group.rewards == (1.0, 0.0) for group in every)


def test_a_pair_is_the_template_s_tokens(data: Path, renderer: Renderer) -> None:
    every = [g for batch in real_batches(renderer, data=data, batches=1, batch_size=10) for g in batch]
    texts = {
        (renderer.tokenizer.decode(group.prompt), *map(renderer.tokenizer.decode, group.completions))
        for group in every
    }
    assert (
        "<|im_start|>user\nQuestion 3?<|im_end|>\n<|im_start|>assistant\n",
        "Good answer 3...<|im_end|>",
        "Bad 3<|im_end|>",
    ) in texts
    assert len(texts) == 10  # and none of the four that are no pairs


def test_a_long_pair_loses_the_same_prompt_tokens_on_both_sides(data: Path, renderer: Renderer) -> None:
    whole = [g for b in real_batches(renderer, data=data, batches=1, batch_size=10) for g in b]
    cut = [g for b in real_batches(renderer, data=data, batches=1, batch_size=10, max_length=45) for g in b]
    assert max(group.tokens for group in whole) > max(group.tokens for group in cut)
    for before, after in zip(whole, cut, strict=True):
        assert after.completions == before.completions
        assert after.prompt[-10:] == before.prompt[-10:] and len(after.prompt) <= len(before.prompt)
        assert all(len(after.prompt) + len(each) <= 45 for each in after.completions)


def test_too_few_pairs_and_no_data_are_told(data: Path, renderer: Renderer, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="10 usable pairs"):
        real_batches(renderer, data=data, batches=2, batch_size=8)
    with pytest.raises(MissingError, match="--data") as error:
        data_folder(tmp_path / "elsewhere")
    assert "CORRIGIBLE_DATA" in error.value.advice


@pytest.mark.data
def test_the_real_pairs_are_enough_for_fifty_steps(data_dir: Path, renderer: Renderer) -> None:
    batches = real_batches(renderer, data=data_dir, batches=51)
    assert [len(batch) for batch in batches] == [8] * 51


@pytest.mark.parametrize("group_size", [2, 4, 8, 16])
@pytest.mark.parametrize("prompt_share", [0.0, 0.25, 0.9])
def test_made_up_batches_all_have_the_same_tokens(prompt_share: float, group_size: int) -> None:
    (batch,) = synthetic_batches(100, batches=1, prompt_share=prompt_share, group_size=group_size)
    assert sum(group.tokens for group in batch) == 16 * 256
    assert {len(group.completions) for group in batch} == {group_size}
    assert {len(group.prompt) for group in batch} == {max(1, round(prompt_share * 256))}
    assert all(0 < sum(group.rewards) < group_size for group in batch)


def test_batches_survive_being_written() -> None:
    batches = synthetic_batches(100, batches=2, prompt_share=0.5, group_size=2)
    assert from_json(as_json(batches)) == batches


BATCH = [
    Group((5, 6), ((7, 8, 2), (9, 2)), (1.0, 0.0)),
    Group((5,), ((10, 2), (11, 12, 13, 2)), (1.0, 0.0)),
    Group((5, 14, 15), ((16, 2), (17, 2)), (1.0, 0.0)),
]


def test_dpo_rows_are_the_same_on_both_sides() -> None:
    mine = [ours._pair(group).rows for group in BATCH]
    for row, (chosen, rejected) in zip(rival._rows("dpo", [BATCH]), mine, strict=True):
        assert row["prompt_ids"] + row["chosen_ids"] == list(chosen.ids)
        assert row["prompt_ids"] + row["rejected_ids"] == list(rejected.ids)
        assert len(row["prompt_ids"]) == chosen.scored[0] == rejected.scored[0]


def test_reward_rows_are_the_same_on_both_sides() -> None:
    mine = [[list(row.ids) for row in ours._pair(group).rows] for group in BATCH]
    theirs = [[row["chosen_ids"], row["rejected_ids"]] for row in rival._rows("reward", [BATCH])]
    assert theirs == mine


def test_kto_rows_and_mismatched_rows_are_the_same_on_both_sides() -> None:
    mine = ours._unpaired(BATCH)
    theirs = rival._rows("kto", [BATCH])
    assert [row["label"] for row in theirs] == [each.desirable for each in mine] == [True] * 3 + [False] * 3
    for row, each in zip(theirs, mine, strict=True):
        assert row["prompt_ids"] + row["completion_ids"] == list(each.rows[0].ids)
        assert each.mismatched is not None
        assert row["prompt_ids"] + row["KL_completion_ids"] == list(each.mismatched.ids)
        assert each.mismatched.ids != each.rows[0].ids
