"""Scores of rows equal those of each row alone, on both paths; what cannot be scored is refused by name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from corrigible.errors import BadInputError, NumericsError
from corrigible.models import LanguagePolicy, Rendered, TokenKind, load_policy
from corrigible.models.scoring import Scorer

TOKENS = st.lists(st.integers(3, 258), min_size=1, max_size=20)
GROUPS = st.lists(
    st.tuples(st.integers(1, 40), st.lists(TOKENS, min_size=1, max_size=4)), min_size=1, max_size=4
)
Groups = list[tuple[int, list[list[int]]]]


def rows_of(groups: Groups) -> list[list[Rendered]]:
    """Prompts of a given length; those of different groups begin alike."""
    return [[Rendered.from_tokens(range(3, 3 + n), tail) for tail in tails] for n, tails in groups]


@contextmanager
def path(policy: LanguagePolicy, name: str) -> Iterator[LanguagePolicy]:
    """The policy on the packed path, on the plain one, or with a head of which the short cut is not right."""
    before = policy.plain_path, policy._head_is_plain
    policy.plain_path, policy._head_is_plain = {
        "packed": (None, None),
        "plain": ("the test wants it", True),
        "plain, whole logits": ("the test wants it", False),
    }[name]
    try:
        yield policy
    finally:
        policy.plain_path, policy._head_is_plain = before


PATHS = ["packed", "plain", "plain, whole logits"]


@pytest.fixture(params=PATHS)
def scorer(request: pytest.FixtureRequest, shared_policy: LanguagePolicy) -> Iterator[Scorer]:
    with path(shared_policy, request.param):
        made = Scorer(shared_policy)
        assert (made.network is not None) is (request.param == "packed")
        yield made


def table(policy: LanguagePolicy, row: Rendered, temperature: float = 1.0) -> Tensor:
    """Log-probs of all tokens before each scored one, ``(scored, vocabulary)``: one row, full logits."""
    logits = policy.network(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
    return (logits / temperature).log_softmax(dim=-1)[[i - 1 for i in row.scored]]


def chosen(policy: LanguagePolicy, row: Rendered, temperature: float = 1.0) -> Tensor:
    wanted = torch.tensor([row.ids[i] for i in row.scored])
    return table(policy, row, temperature).gather(-1, wanted[:, None])[:, 0]


@settings(max_examples=40, deadline=None)
@given(GROUPS, st.booleans())
def test_values_equal_those_of_each_row_alone(
    shared_policy: LanguagePolicy, groups: Groups, share: bool
) -> None:
    examples = rows_of(groups)
    found = Scorer(shared_policy, share=share)(examples)
    rows = [row for group in examples for row in group]
    with torch.no_grad():
        for values, row in zip(found, rows, strict=True):
            assert values.dtype == torch.float32 and not values.requires_grad
            assert torch.allclose(values, chosen(shared_policy, row), atol=2e-5)


def examples() -> list[list[Rendered]]:
    """A pair, three answers to a prompt that begins alike, a row alone; scored tokens with gaps."""
    generator = torch.Generator().manual_seed(2)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 259, (count,), generator=generator).tolist()

    prompt = tokens(24)
    kinds = [0] * 18 + [2, 2, 3, 3, 1, 0, 1, 3]
    return [
        [Rendered.from_tokens(prompt, tokens(5)), Rendered.from_tokens(prompt, tokens(12))],
        [Rendered.from_tokens([*prompt[:17], *tokens(9)], tokens(n)) for n in (3, 1, 7)],
        [Rendered((*prompt[:17], *tokens(9)), tuple(map(TokenKind, kinds)))],
    ]


ROWS = [row for group in examples() for row in group]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_log_probs_and_entropies_at_a_temperature(scorer: Scorer, temperature: float) -> None:
    found = scorer.scores(examples(), temperature=temperature, entropy=True)
    assert found.entropies is not None
    plain = scorer(examples(), temperature=temperature)
    with torch.no_grad():
        for values, alone, entropies, row in zip(found.logprobs, plain, found.entropies, ROWS, strict=True):
            every = table(scorer.policy, row, temperature).tolist()
            assert torch.allclose(values, chosen(scorer.policy, row, temperature), atol=2e-5)
            assert torch.allclose(alone, values, atol=1e-6)
            assert entropies.tolist() == pytest.approx(
                [-sum(math.exp(x) * x for x in line) for line in every], abs=2e-5
            )
    assert scorer.scores(examples()).entropies is None


@pytest.mark.parametrize("temperature, entropy", [(1.0, False), (0.7, False), (1.3, True)])
@pytest.mark.parametrize("way", [*PATHS, "nothing shared", "layers computed again"])
def test_gradients_equal_those_of_each_row_alone(way: str, temperature: float, entropy: bool) -> None:
    policy = load_policy("tiny-random", dtype="float32", device="cpu")

    def gradient(logprobs: list[Tensor], entropies: list[Tensor] | None) -> Tensor:
        policy.model.zero_grad(set_to_none=True)
        total = sum((i + 1) * values.sum() for i, values in enumerate(logprobs))
        for i, values in enumerate(entropies or ()):
            total = total + (2 - i) * values.sum()
        total.backward()
        return torch.cat([p.grad.flatten().double() for p in policy.trainable_parameters()])

    with path(policy, way if way in PATHS else "packed"):
        scorer = Scorer(
            policy, share=way != "nothing shared", checkpoint_layers=way == "layers computed again"
        )
        found = scorer.scores(examples(), grad=True, temperature=temperature, entropy=entropy)
        a = gradient(found.logprobs, found.entropies)
    tables = [table(policy, row, temperature) for row in ROWS]
    b = gradient(
        [chosen(policy, row, temperature) for row in ROWS],
        [-(t * t.exp()).sum(dim=-1) for t in tables] if entropy else None,
    )
    assert float(torch.dot(a, b) / (a.norm() * b.norm())) >= 0.999999
    assert abs(float(a.norm() / b.norm()) - 1) <= 1e-5


def test_the_grouping_does_not_matter(scorer: Scorer) -> None:
    together, apart = scorer([ROWS]), scorer([row] for row in ROWS)  # a generator is read once
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_in_bfloat16_the_scores_are_near_those_in_float32(shared_policy: LanguagePolicy) -> None:
    """The same weights, rounded: a few hundredths of a nat on logits of about this size."""
    half = load_policy("tiny-random", dtype="bfloat16", device="cpu")
    found, exact = Scorer(half)(examples()), Scorer(shared_policy)(examples())
    difference = (torch.cat(found) - torch.cat(exact)).abs()
    assert all(values.dtype == torch.float32 for values in found)
    assert 0 < float(difference.mean()) < 0.06 and float(difference.max()) < 0.4


# -- last states ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATHS)
def test_states_are_those_after_the_last_token(name: str, policy: LanguagePolicy) -> None:
    """Also of rows with nothing to score, of a row that another begins with, and of equal rows."""
    prompt = list(range(60, 90))
    rows = [*ROWS, Rendered.from_tokens(prompt, []), Rendered.from_tokens(prompt, [5, 6]), ROWS[0]]
    with path(policy, name):
        found = Scorer(policy).states([rows[:2], rows[2:]], grad=True)
        assert found.shape == (len(rows), 64) and found.dtype == torch.float32
        weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
        (found * weight).sum().backward()
        mine = [p.grad for p in policy.trainable_parameters()]
        policy.model.zero_grad(set_to_none=True)
        plain = torch.stack([policy.hidden_states(torch.tensor([row.ids]))[0, -1] for row in rows])
        (plain * weight).sum().backward()
        assert torch.allclose(found, plain, atol=2e-5)
        for a, parameter in zip(mine, policy.trainable_parameters(), strict=True):
            assert torch.allclose(a, parameter.grad, atol=1e-3, rtol=1e-4)
        assert not Scorer(policy).states([rows]).requires_grad


# -- sizes ----------------------------------------------------------------------------------------


def test_only_a_shared_beginning_is_saved_and_it_is_saved(shared_policy: LanguagePolicy) -> None:
    group = [Rendered.from_tokens(range(3, 43), range(50, 50 + n)) for n in (5, 8, 1)]
    # The last token of a response is predicted and never read.
    assert Scorer(shared_policy).size(group) == 40 + 4 + 7 + 0
    assert Scorer(shared_policy, share=False).size(group) == 3 * 40 + 4 + 7 + 0
    with path(shared_policy, "plain"):
        plain = Scorer(shared_policy)
        assert plain.size(group) == 3 * 47 and not plain.share
        assert plain.size([Rendered.from_tokens(range(3, 43), [])]) == 40


# -- what cannot be scored --------------------------------------------------------------------------

GOOD = Rendered.from_tokens([1, 70], [80])

BAD: dict[str, tuple[list[Rendered], str]] = {
    "empty batch": ([], "batch is empty"),
    "answer of length zero": ([GOOD, Rendered.from_tokens([1, 71], [])], r"Row 1 .* no scored token"),
    "no tokens": ([GOOD, GOOD, Rendered((), ())], "Row 2 .* no tokens"),
    "nothing before the first": ([Rendered.from_tokens([], [80])], "Row 0 .* nothing stands before"),
    "too long": ([GOOD, Rendered.from_tokens([1] * 1024, [80])], r"Row 1 has 1025 tokens.*reads 1024"),
    "unknown id": ([GOOD, Rendered.from_tokens([1, 70], [80, 259])], r"Row 1 .* 259; .* 259 tokens"),
    "negative id": ([Rendered.from_tokens([1, -1], [80, 81])], r"Row 0 .* -1; "),
}


@pytest.mark.parametrize("name", BAD)
def test_rows_that_cannot_be_scored(scorer: Scorer, name: str) -> None:
    rows, message = BAD[name]
    with pytest.raises(BadInputError, match=message):
        scorer([rows])
    if name not in ("answer of length zero", "nothing before the first"):  # those have a last state
        with pytest.raises(BadInputError, match=message):
            scorer.states([rows])


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_temperatures_at_which_there_is_no_log_prob(scorer: Scorer, temperature: float) -> None:
    with pytest.raises(BadInputError, match=f"temperature is {temperature}"):
        scorer([[GOOD]], temperature=temperature)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("grad", [False, True])
def test_a_row_that_is_not_finite_is_named(name: str, grad: bool, policy: LanguagePolicy) -> None:
    rows = [GOOD, Rendered.from_tokens([1, 90], [80]), GOOD]
    with path(policy, name):
        scorer = Scorer(policy)
        with torch.no_grad():
            # Untied, or the row's own logit of every other row were NaN, too.
            policy.network.config.tie_word_embeddings = False
            policy.network.lm_head.weight = torch.nn.Parameter(policy.network.lm_head.weight.clone())
            policy.network.get_input_embeddings().weight[90] = torch.nan
        with pytest.raises(NumericsError, match="row 1 are not finite"):
            scorer([rows], grad=grad)
        with pytest.raises(NumericsError, match="row 1 is not finite"):
            scorer.states([rows], grad=grad)
        assert len(scorer([[GOOD]], grad=grad)) == 1  # the rows without it are as they were


def test_weights_that_are_nan_are_named_at_the_first_row(policy: LanguagePolicy) -> None:
    """A model that is broken before anything was scored is met there, not taken for another architecture."""
    with torch.no_grad():
        policy.network.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="row 0 are not finite"):
        Scorer(policy)([[GOOD]])
    assert not policy.plain_path
