"""Scores of rows equal those of each row alone, on both paths; what cannot be scored is refused by name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_every_conversation_begins_with_is_shared_and_changes_nothing(dtype: str) -> None:
    """In bfloat16 not one bit: the reference pass and training put different examples side by side."""
    from corrigible.models.renderer import CHATML

    template = "{{ '<|im_start|>system\nYou are the helper of this test.<|im_end|>\n' }}" + CHATML
    policy = load_policy("tiny-random", dtype=dtype, device="cpu", template=template)
    scorer = Scorer(policy)
    prompts = [
        policy.renderer.prompt([{"role": "user", "content": text}]).ids for text in ("One?", "And two?")
    ]
    assert len(scorer.preamble) >= 16
    assert all(prompt[: len(scorer.preamble)] == scorer.preamble for prompt in prompts)
    pairs = [[Rendered.from_tokens(prompt, tail) for tail in ([5, 6, 2], [7, 2])] for prompt in prompts]
    other = [Rendered.from_tokens([1, 20, 30, 40], [5, 2])]
    together = scorer([pairs[0], other, pairs[1]])
    alone = [row for example in (pairs[0], other, pairs[1]) for row in scorer([example])]
    apart = [row for example in (pairs[0], other, pairs[1]) for row in Scorer(policy, share=False)([example])]
    assert scorer.size(pairs[0]) < Scorer(policy, share=False).size(pairs[0]) - len(scorer.preamble)
    for a, b, c in zip(together, alone, apart, strict=True):
        assert torch.equal(a, b) if dtype == "bfloat16" else torch.allclose(a, b, atol=1e-5)
        torch.testing.assert_close(a, c, atol=0.1 if dtype == "bfloat16" else 1e-5, rtol=0)


# -- whole distributions ----------------------------------------------------------------------------


def adapted(kind: str = "plain") -> LanguagePolicy:
    """tiny-random with an adapter that does something; ``kind`` says to which layers."""
    import peft

    policy = load_policy("tiny-random", dtype="float32", device="cpu")
    if kind == "plain":
        policy.add_lora(rank=4)
    else:
        network = policy.network
        network.config.tie_word_embeddings = False
        network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.detach().clone())
        options = (
            {"target_modules": ["q_proj", "lm_head"]}
            if kind == "output layer"
            else {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
        )
        config = peft.LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **options)
        policy.model = peft.get_peft_model(network, config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def apart(p: Tensor, q: Tensor, reverse: bool) -> Tensor:
    """KL divergence of rows of log-probs; ``q`` is a constant."""
    q = q.detach()
    return (q.exp() * (q - p) if reverse else p.exp() * (p - q)).sum(dim=-1)


def gradients(policy: LanguagePolicy, values: list[Tensor]) -> Tensor:
    policy.model.zero_grad(set_to_none=True)
    sum((i + 1) * v.sum() for i, v in enumerate(values)).backward()
    found = [p.grad for p in policy.trainable_parameters() if p.grad is not None]
    return torch.cat([g.flatten().double() for g in found])


def assert_same_gradient(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert float(torch.dot(a, b) / (a.norm() * b.norm())) >= 0.999999
    assert abs(float(a.norm() / b.norm()) - 1) <= 1e-5


@pytest.mark.parametrize("reverse, temperature", [(False, 1.0), (True, 0.7), (False, 1.6)])
@pytest.mark.parametrize("kind", ["plain", "output layer", "whole output layer"])
@pytest.mark.parametrize("name", PATHS)
def test_divergence_from_the_model_below_its_adapter(
    name: str, kind: str, reverse: bool, temperature: float
) -> None:
    policy = adapted(kind)
    expected = []
    for row in ROWS:
        with torch.no_grad(), policy.adapter_disabled():
            q = table(policy, row, temperature)
        expected.append(apart(table(policy, row, temperature), q, reverse))
    wanted = gradients(policy, expected)
    with path(policy, name):
        scorer = Scorer(policy)
        assert (scorer.network is not None) is (name == "packed" and kind == "plain")
        found = scorer.divergence(examples(), reverse=reverse, grad=True, temperature=temperature)
        for values, right in zip(found.divergences, expected, strict=True):
            assert values.dtype == torch.float32
            torch.testing.assert_close(values, right, atol=1e-5, rtol=1e-4)
        assert float(torch.cat(found.divergences).mean()) > 0.01
        assert_same_gradient(gradients(policy, found.divergences), wanted)
        alone = scorer.divergence(([row] for row in ROWS), reverse=reverse, temperature=temperature)
        for a, b in zip(alone.divergences, found.divergences, strict=True):
            assert not a.requires_grad
            torch.testing.assert_close(a, b.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mine", PATHS)
@pytest.mark.parametrize("theirs", PATHS)
def test_divergence_from_another_policy(mine: str, theirs: str) -> None:
    """On whatever paths the two are; the other gets no gradient."""
    policy, reference = adapted(), adapted()
    with torch.no_grad():
        for parameter in reference.trainable_parameters():
            parameter.mul_(-0.7)
    tables = [(table(policy, row), table(reference, row)) for row in ROWS]
    with path(policy, mine), path(reference, theirs):
        found = Scorer(policy).divergence(examples(), Scorer(reference), grad=True, logprobs=True)
        for values, (p, q) in zip(found.divergences, tables, strict=True):
            torch.testing.assert_close(values, apart(p, q, False), atol=1e-5, rtol=1e-4)
        a = gradients(policy, found.divergences)
        assert_same_gradient(a, gradients(policy, [apart(p, q, False) for p, q in tables]))
        assert all(p.grad is None for p in reference.trainable_parameters())
        assert found.logprobs is not None and found.other_logprobs is not None
        for one, logprobs in ((policy, found.logprobs), (reference, found.other_logprobs)):
            for values, row in zip(logprobs, ROWS, strict=True):
                torch.testing.assert_close(values, chosen(one, row), atol=2e-5, rtol=0)


def test_a_policy_is_at_distance_0_from_itself(scorer: Scorer) -> None:
    found = scorer.divergence(examples(), scorer)
    assert found.logprobs is None and found.other_logprobs is None
    assert torch.cat(found.divergences).tolist() == [0.0] * sum(len(row.scored) for row in ROWS)


def test_policies_that_cannot_be_compared(scorer: Scorer) -> None:
    with pytest.raises(BadInputError, match="no adapter to switch off"):
        scorer.divergence(examples())
    wider = load_policy("tiny-random")
    wider.model.resize_token_embeddings(300, mean_resizing=False)
    with pytest.raises(BadInputError, match="vocabulary_mismatch"):
        scorer.divergence(examples(), Scorer(wider))
    renamed = load_policy("tiny-random")
    renamed.tokenizer.add_tokens(["a token that the other does not have"])
    with pytest.raises(BadInputError, match="vocabulary_mismatch"):
        scorer.divergence(examples(), Scorer(renamed))
    with pytest.raises(BadInputError, match="temperature is 0"):
        scorer.divergence(examples(), scorer, temperature=0.0)


@pytest.mark.parametrize("side", ["this", "other"])
def test_a_divergence_that_is_not_finite_is_named(scorer: Scorer, side: str) -> None:
    broken = load_policy("tiny-random")
    with torch.no_grad():
        broken.network.model.norm.weight[0] = torch.nan
    pair = (Scorer(broken), scorer) if side == "this" else (scorer, Scorer(broken))
    with pytest.raises(NumericsError, match="divergences of row 0"):
        pair[0].divergence([[GOOD]], pair[1])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_likeliest_tokens_before_each_scored_one(scorer: Scorer, temperature: float) -> None:
    found = scorer.top_k(examples(), 7, temperature=temperature)
    with torch.no_grad():
        for top, row in zip(found, ROWS, strict=True):
            every = table(scorer.policy, row, temperature)
            assert top.logprobs.dtype == torch.float32 and not top.logprobs.requires_grad
            torch.testing.assert_close(top.logprobs, every.topk(7).values, atol=2e-5, rtol=0)
            torch.testing.assert_close(top.logprobs, every.gather(-1, top.ids), atol=2e-5, rtol=0)
            rest = 1.0 - every.topk(7).values.exp().sum(dim=-1)
            torch.testing.assert_close(top.rest, rest, atol=1e-5, rtol=0)
    with pytest.raises(BadInputError, match="k is 260"):
        scorer.top_k(examples(), 260)


@pytest.mark.parametrize("kind", ["output layer", "whole output layer"])
def test_an_adapter_on_the_output_layer_counts(kind: str) -> None:
    policy = adapted(kind)
    found = Scorer(policy).scores(examples(), grad=True, temperature=0.8, entropy=True)
    tops = Scorer(policy).top_k(examples(), 3, temperature=0.8)
    tables = [table(policy, row, 0.8) for row in ROWS]
    assert found.entropies is not None
    for values, entropies, top, row, every in zip(
        found.logprobs, found.entropies, tops, ROWS, tables, strict=True
    ):
        torch.testing.assert_close(values, chosen(policy, row, 0.8), atol=2e-5, rtol=0)
        torch.testing.assert_close(entropies, -(every * every.exp()).sum(dim=-1), atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(top.logprobs, every.topk(3).values, atol=2e-5, rtol=0)
    a = gradients(policy, [*found.logprobs, *found.entropies])
    b = [*(chosen(policy, row, 0.8) for row in ROWS), *(-(t * t.exp()).sum(dim=-1) for t in tables)]
    assert_same_gradient(a, gradients(policy, b))


# -- expected log-probs, and inputs that are not what is predicted -----------------------------------


@pytest.mark.parametrize("drawn", [1.0, 1.3, math.inf])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_expected_log_probs_are_those_of_the_whole_table(
    scorer: Scorer, drawn: float, temperature: float
) -> None:
    found = scorer.scores(examples(), temperature=temperature, expected_at=drawn, entropy=True)
    assert found.expected is not None and found.sampling_logprobs is not None
    plain = scorer(examples(), temperature=temperature)
    with torch.no_grad():
        for number, row in enumerate(ROWS):
            every = table(scorer.policy, row, temperature)
            q = table(scorer.policy, row, drawn).exp()  # logits / infinity are all alike
            torch.testing.assert_close(found.expected[number], (q * every).sum(dim=-1), atol=3e-5, rtol=1e-5)
            wanted = q.log().gather(-1, torch.tensor([row.ids[i] for i in row.scored])[:, None])[:, 0]
            torch.testing.assert_close(found.sampling_logprobs[number], wanted, atol=3e-5, rtol=1e-5)
            torch.testing.assert_close(found.logprobs[number], plain[number], atol=1e-6, rtol=0)
    assert scorer.scores(examples()).expected is None
    assert scorer.scores(examples()).sampling_logprobs is None
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(BadInputError, match="expected_at is"):
            scorer.scores(examples(), expected_at=wrong)


@pytest.mark.parametrize("drawn, entropy", [(1.4, False), (math.inf, True)])
@pytest.mark.parametrize("way", [*PATHS, "layers computed again"])
def test_gradients_of_expected_log_probs(way: str, drawn: float, entropy: bool) -> None:
    policy = load_policy("tiny-random", dtype="float32", device="cpu")
    with path(policy, way if way in PATHS else "packed"):
        scorer = Scorer(policy, checkpoint_layers=way == "layers computed again")
        found = scorer.scores(examples(), grad=True, temperature=0.8, expected_at=drawn, entropy=entropy)
        assert found.expected is not None and found.sampling_logprobs is not None
        assert not any(values.requires_grad for values in found.sampling_logprobs)
        a = gradients(policy, [*found.expected, *found.logprobs, *(found.entropies or [])])
    tables = [table(policy, row, 0.8) for row in ROWS]
    draws = [table(policy, row, drawn).detach().exp() for row in ROWS]
    wanted = [(q * t).sum(dim=-1) for q, t in zip(draws, tables, strict=True)]
    wanted += [chosen(policy, row, 0.8) for row in ROWS]
    wanted += [-(t * t.exp()).sum(dim=-1) for t in tables] if entropy else []
    assert_same_gradient(a, gradients(policy, wanted))


def corrupted(row: Rendered, every: int) -> Rendered:
    inputs = tuple(9 if i % every == 1 else token for i, token in enumerate(row.ids))
    return replace(row, inputs=inputs)


@pytest.mark.parametrize("share", [True, False])
def test_what_is_read_may_differ_from_what_is_predicted(scorer: Scorer, share: bool) -> None:
    """Rows that are read alike share that, whatever they are to predict."""
    prompt = list(range(60, 90))
    first, second = Rendered.from_tokens(prompt, [5, 6, 7]), Rendered.from_tokens(prompt, [8, 9, 7])
    pair = [replace(first, inputs=(*prompt, 5, 3, 7)), replace(second, inputs=(*prompt, 5, 3, 7))]
    groups = [[corrupted(row, 3) for row in group] for group in examples()] + [pair]
    rows = [row for group in groups for row in group]
    scorer.share = scorer.share and share
    found = scorer(groups)
    with torch.no_grad():
        for values, row in zip(found, rows, strict=True):
            assert row.inputs is not None and row.inputs != row.ids
            logits = scorer.policy.network(input_ids=torch.tensor([row.inputs]), use_cache=False).logits[0]
            every = logits.log_softmax(dim=-1)
            wanted = torch.stack([every[i - 1, row.ids[i]] for i in row.scored])
            torch.testing.assert_close(values, wanted, atol=2e-5, rtol=0)
    if scorer.share:
        assert scorer.size(pair) == len(prompt) + 2  # the two are read alike to the end
    unknown = replace(first, inputs=(*prompt, 5, 259, 7))
    with pytest.raises(BadInputError, match="token id 259"):
        scorer([[unknown]])


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
