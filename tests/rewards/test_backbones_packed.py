"""A causal backbone read packed gives the vectors of the padded reading, from any layers."""

from __future__ import annotations

import pytest
import torch

from corrigible.errors import BadInputError
from corrigible.models import Rendered, load_policy
from corrigible.models.network import Network
from corrigible.models.packing import pack
from corrigible.rewards.backbones import Encoded, causal_backbone
from corrigible.rewards.config import RewardConfig

ROWS = [
    Encoded(tuple((7 * i + 3 * n) % 250 + 3 for i in range(length)), start, length)
    for n, (length, start) in enumerate(((9, 4), (23, 11), (5, 1), (9, 4)))
]


@pytest.mark.parametrize("pooling", ["mean", "response_mean", "last", "first"])
@pytest.mark.parametrize("layers", [(-1,), (1,), (0, 1, -1)])
def test_packed_equals_padded(pooling: str, layers: tuple[int, ...]) -> None:
    backbone = causal_backbone("tiny-random", load_policy("tiny-random", dtype="float32", device="cpu"))
    assert backbone.network is not None
    config = RewardConfig(backbone="tiny-random", text="prompt+response", pooling=pooling, layers=layers)  # type: ignore[arg-type]
    with torch.inference_mode():
        packed, padded = backbone.pooled(ROWS, config), backbone._pooled_padded(ROWS, config)
        alone = torch.cat([backbone.pooled([row], config) for row in ROWS])
    assert packed.shape == (4, backbone.width * len(layers))
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-4)
    # A cached vector must not depend on what it was read with, beyond rounding.
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)


def test_states_are_those_of_transformers() -> None:
    policy = load_policy("tiny-random", dtype="float32", device="cpu")
    network = Network(policy)
    depth = len(network.layers)
    row = Rendered.from_tokens(range(3, 20), ())
    with torch.inference_mode():
        theirs = policy.network(
            input_ids=torch.tensor([row.ids]), output_hidden_states=True, use_cache=False
        ).hidden_states
        mine = network.states(pack([row], whole=True), [*range(depth + 1), -1])
    for ours, expected in zip(mine, [*theirs, theirs[-1]], strict=True):
        torch.testing.assert_close(ours, expected[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(BadInputError, match=f"has {depth}"):
        network.states(pack([row], whole=True), [depth + 1])


def test_a_preset_names_its_backbone_and_only_a_frozen_one_is_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CORRIGIBLE_DTYPE", "bfloat16")
    best = RewardConfig.from_json(RewardConfig.preset(""))
    assert best.backbone == "smollm2-135m" and best.dtype == "bfloat16" and best.layers == (18,)
    assert RewardConfig.from_json({**RewardConfig.preset(""), "tune": "lora"}).dtype == "float32"
    assert RewardConfig.preset("minilm") == {}
