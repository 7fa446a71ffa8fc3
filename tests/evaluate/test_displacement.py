"""Whether preferred answers, too, became less likely: by hand, and on a policy that was moved."""

from __future__ import annotations

import math

import pytest
import torch

from corrigible.align import PairSource
from corrigible.errors import BadInputError, NumericsError
from corrigible.evaluate.displacement import displacement, measure_displacement
from corrigible.models import load_policy
from corrigible.records import Message
from corrigible.store import Pair


def pairs(count: int) -> list[Pair]:
    def said(role: str, text: str) -> tuple[Message, ...]:
        return (Message.model_validate({"role": role, "content": text}),)

    return [
        Pair(
            prompt=said("user", f"Question {n}"),
            chosen=said("assistant", f"yes {n}"),
            rejected=said("assistant", f"no, not {n}"),
            p_chosen=1.0,
            weight=1.0,
            group=f"g{n}",
            annotators=("ada",),
            derived_from=(f"f{n}",),
            criterion="overall",
            chosen_ref=f"{n}a",
            rejected_ref=f"{n}b",
        )
        for n in range(count)
    ]


def test_displacement_by_hand() -> None:
    found = displacement([-1.0, -3.0, 2.0, 0.0], [-4.0, -1.0, -1.0, -2.0], entropy_change=0.25)
    assert found.chosen.value == -0.5 and found.rejected.value == -2.0 and found.margin.value == 1.5
    assert (found.both_fell, found.displaced, found.entropy) == (0.5, 0.5, 0.25)
    assert found.chosen.low < -0.5 < found.chosen.high
    assert found.to_json()["margin"]["value"] == 1.5


def test_a_prompt_with_many_pairs_counts_as_one_unit() -> None:
    changes = [-1.0] * 50 + [1.0]
    alone = displacement(changes, changes, clusters=list(range(51)))
    together = displacement(changes, changes, clusters=["a"] * 50 + ["b"])
    width = [one.chosen.high - one.chosen.low for one in (alone, together)]
    assert width[0] < width[1]


@pytest.mark.parametrize(
    ("chosen", "rejected", "error"),
    [([], [], BadInputError), ([1.0], [1.0, 2.0], BadInputError), ([math.nan], [0.0], NumericsError)],
)
def test_what_it_refuses(chosen: list[float], rejected: list[float], error: type[Exception]) -> None:
    with pytest.raises(error):
        displacement(chosen, rejected)


def test_a_policy_that_was_moved() -> None:
    policy = load_policy("tiny-random", device="cpu")
    policy.add_lora(rank=2)
    source = PairSource(pairs(5), policy.renderer)
    still = measure_displacement(policy, source)
    assert still.chosen.value == 0.0 and still.entropy == 0.0 and still.both_fell == 0.0
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)
    found = measure_displacement(policy, source)
    changes, entropies = [], []
    for example in source.examples:
        for row in example.rows:
            ids = torch.tensor([row.ids])
            with torch.no_grad():
                now = policy.model(input_ids=ids).logits[0].double().log_softmax(-1)
                with policy.adapter_disabled():
                    then = policy.model(input_ids=ids).logits[0].double().log_softmax(-1)
            total = 0.0
            for position in row.scored:
                total += float(now[position - 1, row.ids[position]] - then[position - 1, row.ids[position]])
                new, old = now[position - 1], then[position - 1]
                entropies.append(float(-(new.exp() * new).sum() + (old.exp() * old).sum()))
            changes.append(total)
    assert found.chosen.value == pytest.approx(sum(changes[::2]) / 5, abs=1e-4)
    assert found.rejected.value == pytest.approx(sum(changes[1::2]) / 5, abs=1e-4)
    assert found.entropy == pytest.approx(sum(entropies) / len(entropies), abs=1e-4)
    assert found.displaced == sum(change < 0 for change in changes[::2]) / 5
    policy = load_policy("tiny-random", device="cpu")
    with pytest.raises(BadInputError, match="no adapter"):
        measure_displacement(policy, source)
