"""What is read may be corrupted; what is learnt, control tokens and the prompt may not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from corrigible.align.corruptors import MaskedThought, PastTokens, VocabularyLimit, replacements
from corrigible.errors import BadInputError
from corrigible.models import LanguagePolicy, Rendered, TokenKind

END = 2
ROW = Rendered.from_tokens(range(10, 30), [*range(40, 140), END])
PLACES = ROW.scored
MASK = 7


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed or 0)


def changed(row: Rendered) -> list[int]:
    return [i for i, (a, b) in enumerate(zip(ROW.ids, row.fed, strict=True)) if a != b]


def test_labels_prompt_and_end_of_turn_stay() -> None:
    corrupt = MaskedThought(1.0, (MASK,), frozenset({END}), ramp=0.0)
    found = corrupt(ROW, PLACES, 0.0, rng())
    assert found.ids == ROW.ids and found.kinds == ROW.kinds and found.scored == ROW.scored
    assert found.inputs == (*range(10, 30), *(MASK,) * 100, END)
    # A place that the example names is touched although it is the prompt's; nothing else is.
    assert changed(corrupt(ROW, [3, 5], 0.0, rng())) == [3, 5]


def test_nothing_hidden_is_the_row_itself() -> None:
    assert MaskedThought(0.0, (MASK,))(ROW, PLACES, 1.0, rng()) is ROW
    assert MaskedThought(0.5, (MASK,))(ROW, PLACES, 0.0, rng()) is ROW  # the ramp begins at 0
    assert PastTokens(0.0, (MASK,))(ROW, PLACES, 1.0, rng()) is ROW
    assert MaskedThought(1.0, (MASK,), ramp=0)(ROW, [], 1.0, rng()) is ROW


@pytest.mark.parametrize(
    ("step", "total", "share"), [(0, 90, 0.0), (15, 90, 0.1), (30, 90, 0.2), (60, 90, 0.4), (89, 90, 0.4)]
)
def test_the_share_ramps_over_two_thirds_of_the_run(step: int, total: int, share: float) -> None:
    """``p = p_max min(1, step / (2/3 total))`` with p_max 0.4, as in the paper's code."""
    corrupt = MaskedThought(0.4, (MASK,), frozenset({END}))
    counts = [len(changed(corrupt(ROW, PLACES, step / total, rng(step, k)))) for k in range(60)]
    n = 60 * 100
    assert sum(counts) == pytest.approx(n * share, abs=4 * (n * max(share * (1 - share), 1e-9)) ** 0.5)


def test_each_seed_hides_others_and_the_same_seed_the_same() -> None:
    corrupt = MaskedThought(0.4, tuple(range(200, 250)), ramp=0.0)
    first, again, other = (corrupt(ROW, PLACES, 1.0, rng(s)) for s in (1, 1, 2))
    assert first == again and changed(first) != changed(other)
    instead = {first.fed[i] for i in changed(first)}
    assert len(instead) > 10 and instead <= set(range(200, 250))


def test_a_larger_share_hides_more_of_the_same() -> None:
    few, many = (MaskedThought(s, (MASK,), ramp=0.0)(ROW, PLACES, 1.0, rng(3)) for s in (0.1, 0.5))
    assert set(changed(few)) < set(changed(many))


def test_past_tokens_hide_a_share_that_is_drawn_for_each_row() -> None:
    corrupt = PastTokens(0.2, (MASK,), frozenset({END}))
    draws = rng(5)
    shares = [len(changed(corrupt(ROW, PLACES, 0.0, draws))) / 100 for _ in range(600)]
    assert min(shares) == 0.0 and 0.15 < max(shares) < 0.35
    assert np.mean(shares) == pytest.approx(0.1, abs=0.01)  # four standard errors
    assert np.std(shares) > 0.05  # not one share for all


def test_a_corrupted_row_may_be_corrupted_further() -> None:
    first = PastTokens(1.0, (MASK,))(ROW, [0, 1], 0.0, rng(1))
    both = MaskedThought(1.0, (8,), ramp=0.0)(first, [30], 0.0, rng())
    assert set(changed(both)) == {*changed(first), 30}


def test_a_vocabulary_that_grows_changes_what_is_learnt_too() -> None:
    corrupt = VocabularyLimit(
        lambda progress: 0.25 + 0.75 * progress, unknown=0, size=200, spared=frozenset({END})
    )
    early = corrupt(ROW, PLACES, 0.0, rng())
    assert early.inputs is None and early.kinds == ROW.kinds
    assert early.ids == tuple(i if i <= 50 else 0 for i in ROW.ids)
    assert corrupt(ROW, PLACES, 1.0, rng()) is ROW
    middle = corrupt(ROW, PLACES, 0.5, rng())
    assert sum(i == 0 for i in middle.ids) == sum(i > 125 for i in ROW.ids) > 0


def test_settings_tell_corruptors_apart() -> None:
    made = MaskedThought(0.4, (MASK,))
    others = [
        MaskedThought(0.3, (MASK,)),
        MaskedThought(0.4, (8,)),
        MaskedThought(0.4, (MASK,), frozenset({END})),
        MaskedThought(0.4, (MASK,), ramp=0.5),
        PastTokens(0.4, (MASK,)),
        PastTokens(0.4, (MASK, 8)),
        VocabularyLimit(lambda p: p, 0, 200),
        VocabularyLimit(lambda p: p * p, 0, 200),
    ]
    assert len({made.settings(), *(each.settings() for each in others)}) == 1 + len(others)
    assert dataclasses.replace(made).settings() == made.settings()


def test_what_stands_for_a_hidden_token(policy: LanguagePolicy) -> None:
    renderer = policy.renderer
    assert replacements(renderer) == tuple(range(3, 259))  # every byte, no control token
    with pytest.raises(BadInputError, match="no_mask_token: the tokenizer has no mask token"):
        replacements(renderer, "mask")
    with pytest.raises(BadInputError, match="no_mask_token: there is no token '<mask>'"):
        replacements(renderer, "mask", "<mask>")
    assert replacements(renderer, "mask", "<|endoftext|>") == (0,)


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(BadInputError, match="share must be in"):
        MaskedThought(1.1, (MASK,))
    with pytest.raises(BadInputError, match="ramp must be in"):
        MaskedThought(0.1, (MASK,), ramp=-1.0)
    with pytest.raises(BadInputError, match="most must be in"):
        PastTokens(-0.1, (MASK,))
    with pytest.raises(BadInputError, match="nothing to replace"):
        MaskedThought(0.1, ())


def test_a_row_has_one_input_a_token() -> None:
    with pytest.raises(BadInputError, match="2 ids but 1 inputs"):
        Rendered((1, 2), (TokenKind.PROMPT, TokenKind.SAMPLED), inputs=(1,))


def test_a_row_that_is_cut_to_fit_keeps_inputs_and_labels_together(policy: LanguagePolicy) -> None:
    found = MaskedThought(1.0, (MASK,), ramp=0.0)(ROW, PLACES, 0.0, rng())
    cut = policy.renderer.fit(found, 110, "truncate_prompt")
    assert cut.inputs is not None and len(cut.inputs) == len(cut.ids) == 110
    assert cut.ids == ROW.ids[11:] and cut.inputs == found.fed[11:]
