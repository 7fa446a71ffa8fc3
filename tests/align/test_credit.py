"""Token-level credit against scalar loops, an exact soft dynamic programme, and a real policy."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch

from corrigible.align import PairSource, reference_logprobs
from corrigible.align.credit import row_credit, soft_values, token_credit
from corrigible.errors import BadInputError, NumericsError
from corrigible.models import LanguagePolicy


def test_soft_values_are_those_of_a_loop() -> None:
    torch.manual_seed(0)
    for _ in range(50):
        beta = random.Random(0).uniform(0.05, 3.0)
        logits = torch.randn(3, 5, dtype=torch.float64) * 4
        found = soft_values(logits, beta=beta)
        for row in range(3):
            values = [math.exp(float(x)) for x in logits[row]]
            assert float(found.v[row]) == pytest.approx(beta * math.log(sum(values)), rel=1e-12)
            for action in range(5):
                assert float(found.q[row, action]) == pytest.approx(
                    beta * float(logits[row, action]), rel=1e-12
                )
                log_pi = math.log(values[action] / sum(values))
                assert float(found.advantage[row, action]) == pytest.approx(beta * log_pi, rel=1e-10)


def test_a_constant_per_state_is_not_identified() -> None:
    logits = torch.tensor([[1.0, 0.0, -2.0]], dtype=torch.float64)
    one, other = soft_values(logits, beta=0.5), soft_values(logits + 7.0, beta=0.5)
    assert torch.allclose(one.advantage, other.advantage) and not torch.allclose(one.v, other.v)
    assert torch.isinf(soft_values(torch.tensor([0.0, -torch.inf]), beta=1.0).advantage[1])


def tree(actions: int, depth: int, seed: int) -> tuple[dict, dict]:
    """Rewards and a reference policy on every node of an ``actions``-ary tree."""
    draw = random.Random(seed)
    nodes = [node for t in range(depth) for node in itertools.product(range(actions), repeat=t)]
    rewards = {(node, a): draw.gauss(0, 1) for node in nodes for a in range(actions)}
    reference = {}
    for node in nodes:
        odds = [math.exp(draw.gauss(0, 1)) for _ in range(actions)]
        reference |= {(node, a): math.log(odds[a] / sum(odds)) for a in range(actions)}
    return rewards, reference


def test_credit_of_the_optimal_policy_is_reward_shaped_by_its_values() -> None:
    """r(s, a) + V(s') - V(s) at every node, by a soft dynamic programme in loops; sums telescope."""
    beta, depth, actions = 0.5, 3, 3
    rewards, reference = tree(actions, depth, seed=1)
    values: dict[tuple[int, ...], float] = {}

    def value(node: tuple[int, ...]) -> float:
        if len(node) == depth:
            return 0.0
        if node not in values:
            q = [rewards[node, a] + beta * reference[node, a] + value((*node, a)) for a in range(actions)]
            values[node] = beta * math.log(sum(math.exp(x / beta) for x in q))
        return values[node]

    for leaf in itertools.product(range(actions), repeat=depth):
        taken = [(leaf[:t], leaf[t]) for t in range(depth)]
        q = [rewards[s, a] + beta * reference[s, a] + value((*s, a)) for s, a in taken]
        log_pi = [(x - value(s)) / beta for x, (s, _) in zip(q, taken, strict=True)]
        policy = torch.tensor(log_pi, dtype=torch.float64)
        prior = torch.tensor([reference[step] for step in taken], dtype=torch.float64)
        (credit,) = token_credit([policy], [prior], beta=beta)
        for t, (s, a) in enumerate(taken):
            shaped = rewards[s, a] + value((*s, a)) - value(s)
            assert float(credit[t]) == pytest.approx(shaped, rel=1e-9, abs=1e-9)
        total = sum(rewards[step] for step in taken)
        assert float(credit.sum()) == pytest.approx(total - value(()), rel=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_credit_of_ragged_rows_is_that_of_a_loop(dtype: torch.dtype, tolerance: float) -> None:
    draw = random.Random(5)
    for _ in range(200):
        beta, at_least = draw.uniform(0.01, 2.0), draw.randint(1, 3)
        lengths = [draw.randint(0, 6) for _ in range(draw.randint(1, 4))]
        mine = [[-draw.expovariate(0.3) for _ in range(n)] for n in lengths]
        theirs = [[-draw.expovariate(0.3) for _ in range(n)] for n in lengths]
        seen = [[draw.randint(0, 4) for _ in range(n)] for n in lengths]
        found = token_credit(
            [torch.tensor(row, dtype=dtype) for row in mine],
            [torch.tensor(row, dtype=dtype) for row in theirs],
            beta=beta,
            visits=[torch.tensor(row, dtype=torch.long) for row in seen],
            at_least=at_least,
        )
        for credit, a, b, counts in zip(found, mine, theirs, seen, strict=True):
            assert len(credit) == len(a)
            for t in range(len(a)):
                if counts[t] < at_least:
                    assert math.isnan(float(credit[t]))
                else:
                    expected = beta * (a[t] - b[t])
                    assert float(credit[t]) == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_tokens_that_were_never_seen_have_no_credit() -> None:
    policy, reference = [torch.tensor([-1.0, -2.0, -3.0])], [torch.tensor([-2.0, -2.0, -1.0])]
    visits = [torch.tensor([5, 1, 0])]
    (credit,) = token_credit(policy, reference, beta=0.5, visits=visits, at_least=2)
    assert credit[0] == 0.5 and bool(torch.isnan(credit[1:]).all())
    (all_of_them,) = token_credit(policy, reference, beta=0.5)
    assert all_of_them.tolist() == [0.5, 0.0, -1.0]


def test_what_credit_refuses() -> None:
    a, b = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0])
    with pytest.raises(BadInputError, match="scored tokens"):
        token_credit([a], [b], beta=0.1)
    with pytest.raises(BadInputError, match="as many rows"):
        token_credit([a, a], [a], beta=0.1)
    with pytest.raises(BadInputError, match="beta"):
        token_credit([a], [a], beta=0.0)
    with pytest.raises(NumericsError, match="logps_not_finite"):
        token_credit([torch.tensor([-1.0, math.nan])], [a], beta=0.1)
    with pytest.raises(NumericsError, match="logits_not_finite"):
        soft_values(torch.tensor([0.0, math.nan]), beta=0.1)


def test_a_policy_that_has_not_moved_gives_no_credit_and_a_moved_one_its_implicit_reward(
    policy: LanguagePolicy, source: PairSource
) -> None:
    rows = [row for example in source.examples[:4] for row in example.rows]
    before = reference_logprobs(policy, source.examples[:4])
    assert all(float(credit.abs().max()) == 0.0 for credit in row_credit(policy, rows, beta=0.1))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
    credits = row_credit(policy, rows, beta=0.2)
    for row, credit in zip(rows, credits, strict=True):
        assert credit.shape == (len(row.scored),)
        with torch.no_grad():
            ids = torch.tensor([row.ids])
            now = policy.model(input_ids=ids).logits[0].log_softmax(-1)
            with policy.adapter_disabled():
                then = policy.model(input_ids=ids).logits[0].log_softmax(-1)
        for t, position in enumerate(row.scored):
            gap = float(now[position - 1, row.ids[position]] - then[position - 1, row.ids[position]])
            assert float(credit[t]) == pytest.approx(0.2 * gap, abs=2e-5)
    given = row_credit(policy, rows, beta=0.2, reference=before)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(given, credits, strict=True))


def test_credit_needs_a_reference(make_policy: Callable[..., LanguagePolicy], source: PairSource) -> None:
    rows = list(source.examples[0].rows)
    with pytest.raises(BadInputError, match="own reference"):
        row_credit(make_policy(lora=False), rows, beta=0.1)
    with pytest.raises(BadInputError, match="lack rows"):
        row_credit(make_policy(), rows, beta=0.1, reference={})
    with pytest.raises(BadInputError, match="no rows"):
        row_credit(make_policy(), [], beta=0.1)
