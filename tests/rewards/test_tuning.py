"""One update of a tuned reward model: whatever the cut, the gradient is that of the whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from corrigible.errors import NumericsError, StorageError
from corrigible.models.optimiser import Optimiser
from corrigible.models.packing import Packed
from corrigible.rewards import RewardConfig, fit_reward
from corrigible.rewards.backbones import Backbone, Encoded
from corrigible.rewards.head import Comparisons, Standardiser
from corrigible.rewards.tuning import TunedReward
from corrigible.store.pairs import Pair

MakeBackbone = Callable[..., Backbone]
CONFIG = RewardConfig(
    backbone="tiny-random", tune="full", text="prompt+response", pooling="last", features=(), members=2
)
PROMPT = 20
WIDTHS = (9, 6, 12, 9)
"""Tokens of the answers: two to a prompt of its own, pair by pair."""


def texts() -> list[list[Encoded]]:
    rows = []
    for number, width in enumerate(WIDTHS):
        prompt = [(11 * place + 50 * (number // 2)) % 250 + 3 for place in range(PROMPT)]
        answer = [(7 * place + 31 * number) % 250 + 3 for place in range(width)]
        rows.append(Encoded((*prompt, *answer), PROMPT, PROMPT + width))
    return [rows]


PAIRS = Comparisons(
    torch.tensor([0, 3, 0]),
    torch.tensor([1, 2, 2]),
    torch.tensor([1.0, 0.7, 0.5]),
    torch.tensor([2.0, 1.0, 0.5]),
)
TIMES = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]])


def make(causal: MakeBackbone, config: RewardConfig = CONFIG) -> TunedReward:
    reader = causal()
    width = reader.output_width(config)
    start = torch.randn(width, generator=torch.Generator().manual_seed(0))
    return TunedReward(reader, config, Standardiser(torch.zeros(width), torch.full((width,), 2.0)), start)


def gradients(model: TunedReward) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pooling", ["last", "response_mean"])
@pytest.mark.parametrize("batch_tokens", [1, 70, 4096])
def test_the_gradient_is_the_whole_batchs_read_row_by_row(
    pooling: str, batch_tokens: int, causal: MakeBackbone
) -> None:
    """Held to a loss written out pair by pair, of rows that are padded and share nothing."""
    model = make(causal, replace(CONFIG, pooling=pooling, batch_tokens=batch_tokens))  # type: ignore[arg-type]
    found = model.accumulate(texts(), torch.zeros(4, 0), PAIRS, TIMES)
    ours = gradients(model)
    model.zero_grad()
    scores, spread = [], []
    for row in texts()[0]:
        vector = model.backbone._pooled_padded([row], model.config)[0] / 2.0
        scores.append(vector @ model.weight)
        spread.append(model.members @ vector.detach())
    loss, heads = torch.zeros(()), torch.zeros(())
    for pair in range(3):
        a, b = int(PAIRS.chosen[pair]), int(PAIRS.rejected[pair])
        p, weight = float(PAIRS.p[pair]), float(PAIRS.weight[pair]) / 3.5

        def cost(delta: Tensor, p: float = p) -> Tensor:
            return -p * torch.log(torch.sigmoid(delta)) - (1 - p) * torch.log(torch.sigmoid(-delta))

        loss = loss + weight * cost(scores[a] - scores[b])
        for head in range(2):
            heads = heads + weight * TIMES[pair, head] * cost(spread[a][head] - spread[b][head])
    (loss + heads).backward()
    assert found == pytest.approx(float(loss.detach()), rel=1e-5)
    expected = gradients(model)
    assert ours.keys() == expected.keys() and len(ours) > 10
    for name, gradient in expected.items():
        gap = float((ours[name] - gradient).norm() / gradient.norm())
        assert gap < 1e-4, f"{name}: {gap}"


def test_the_prompt_of_a_pair_is_read_once_and_passes_keep_to_the_budget(
    causal: MakeBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = Comparisons(*(value[:2] for value in (PAIRS.chosen, PAIRS.rejected, PAIRS.p, PAIRS.weight)))
    for budget, expected in ((60, [35, 41]), (76, [76])):
        model = make(causal, replace(CONFIG, batch_tokens=budget))
        network = model.backbone.network
        assert network is not None
        read: list[int] = []
        real = network.hidden

        def counted(packed: Packed, read: list[int] = read, real: Callable[..., Tensor] = real) -> Tensor:
            read.append(len(packed))
            return real(packed)

        monkeypatch.setattr(network, "hidden", counted)
        model.accumulate(texts(), torch.zeros(4, 0), pairs)
        assert read == expected  # two answers and one prompt of 20 a pair


def test_an_update_clips_steps_and_frees_the_gradients(causal: MakeBackbone) -> None:
    model = make(causal, replace(CONFIG, head_learning_rate=0.5, learning_rate=0.25))
    model.accumulate(texts(), torch.zeros(4, 0), PAIRS, TIMES)
    given = gradients(model)
    model.zero_grad()
    length = math.sqrt(sum(float(each.double().square().sum()) for each in given.values()))
    optimiser = Optimiser(*model.groups())
    model.update(optimiser, texts(), torch.zeros(4, 0), PAIRS, TIMES, lr=0.1, max_gradient=length / 4)
    assert not gradients(model)
    first = optimiser.state()
    for name, gradient in given.items():
        torch.testing.assert_close(first[f"first_moment.{name}"], 0.1 * gradient / 4, rtol=1e-3, atol=1e-7)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved: dict[str, float] = {}
    model.update(optimiser, texts(), torch.zeros(4, 0), PAIRS, TIMES, lr=0.1)
    for name, p in model.named_parameters():
        moved[name] = float((p.detach() - before[name]).abs().max())
    # Two like gradients in a row: a step is about the learning rate, 0.1 times the group's.
    assert 0.025 < moved["weight"] <= 0.055
    assert 0.0 < max(change for name, change in moved.items() if name.startswith("inner.")) <= 0.03


def test_what_is_not_finite_changes_nothing(causal: MakeBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(causal)
    optimiser = Optimiser(*model.groups())
    before = {key: value.clone() for key, value in optimiser.state().items()}

    def overflowing(*args: object) -> float:
        model.weight.grad = torch.full_like(model.weight, math.inf)
        return 0.0

    monkeypatch.setattr(model, "accumulate", overflowing)
    with pytest.raises(NumericsError, match="gradient"):
        model.update(optimiser, texts(), torch.zeros(4, 0), PAIRS)
    assert all(torch.equal(value, before[key]) for key, value in optimiser.state().items())


def test_a_checkpoint_of_an_earlier_version_is_refused(
    encoder: MakeBackbone, known: Callable[..., list[Pair]], tmp_path: Path
) -> None:
    pairs = known(16)
    config = RewardConfig(tune="full", features=(), members=0, epochs=1, batch_pairs=8)
    fit_reward(pairs, config=config, backbone=encoder(), by="prompt", work_dir=tmp_path)
    [path] = tmp_path.glob("epochs-*.pt")
    state = torch.load(path, weights_only=True)
    state["optimizer"] = state.pop("optimiser")
    torch.save(state, path)
    with pytest.raises(StorageError, match="earlier version"):
        fit_reward(pairs, config=config, backbone=encoder(), by="prompt", work_dir=tmp_path)
