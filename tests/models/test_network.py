"""The packed network is that of transformers, whatever model, adapter and precision; or it is not used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from corrigible.models import LanguagePolicy, Rendered, logprobs_reference
from corrigible.models.decode import NetworkDecode
from corrigible.models.network import Network
from corrigible.models.packing import pack
from corrigible.models.scoring import Scorer
from corrigible.models.tiny import tiny_tokenizer

SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

SUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, a key head per head": ("Llama", {"num_key_value_heads": 4}),
    "llama, one key head": ("Llama", {"num_key_value_heads": 1}),
    "llama, untied": ("Llama", {"tie_word_embeddings": False}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3 positions": ("Llama", {"rope_parameters": LLAMA3}),
    "llama, yarn positions": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2, a window that is off": ("Qwen2", {"sliding_window": 8, "use_sliding_window": False}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma": ("Gemma", {"head_dim": 16}),
}

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.05}
"""Of hidden states and of each parameter's gradient, relative to their norm. In bfloat16 both networks
are a few per cent off the truth, each in its own way; see the test against float32."""


def build(architecture: str, changes: dict[str, Any], dtype: torch.dtype = torch.float32) -> LanguagePolicy:
    import transformers

    config = getattr(transformers, f"{architecture}Config")(**(SIZES | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = getattr(transformers, f"{architecture}ForCausalLM")(config)
        with torch.no_grad():  # biases that are zero and norms that are one would hide that they are left out
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return LanguagePolicy(model.to(dtype), tiny_tokenizer(), name=f"tiny {architecture}")


def rows(seed: int = 0) -> list[Rendered]:
    """Two answers to one prompt, one of which is itself gone on from twice, and a row alone; ragged."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(259, (count,), generator=generator).tolist()

    prompt, answer = tokens(23), tokens(17)
    return [
        Rendered.from_tokens(prompt, tokens(5)),
        Rendered.from_tokens([*prompt, *answer], tokens(7)),
        Rendered.from_tokens(tokens(4), tokens(30)),
        Rendered.from_tokens([*prompt, *answer], tokens(1)),
    ]


def weights_like(states: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(x.shape, generator=generator).to(x.dtype) for x in states]


def gradients(policy: LanguagePolicy, states: list[Tensor]) -> dict[str, Tensor]:
    """Of every trainable parameter, under a random weight on every hidden state; then cleared."""
    total = sum((x * w).sum() for x, w in zip(states, weights_like(states), strict=True))
    policy.model.zero_grad(set_to_none=True)
    total.backward()
    found = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad(set_to_none=True)
    return found


def packed_states(policy: LanguagePolicy, network: Network, *, share: bool = True) -> list[Tensor]:
    packed = pack(rows(), share=share, whole=True)
    states = network.hidden(packed)
    assert states.shape == (len(packed), 32)
    return [states[places] for places in packed.places]


def plain_states(policy: LanguagePolicy) -> list[Tensor]:
    """transformers, one row at a time."""
    return [
        policy.network.base_model(input_ids=torch.tensor([row.ids]), use_cache=False).last_hidden_state[0]
        for row in rows()
    ]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        a, b = found[name].double(), expected[name].double()
        # Query biases under full attention and the like have gradients of rounding only.
        assert float((a - b).norm()) <= tolerance * float(b.norm()) + 1e-6 * b.numel() ** 0.5, name


def assert_same_network(policy: LanguagePolicy, tolerance: float, **options: bool) -> None:
    network = Network.of(policy, **options)
    assert network is not None, policy.plain_path
    for share in (True, False):
        mine, theirs = packed_states(policy, network, share=share), plain_states(policy)
        for a, b in zip(mine, theirs, strict=True):
            assert a.dtype == b.dtype
            assert float((a - b).double().norm()) <= tolerance * float(b.double().norm())
        assert_same(gradients(policy, mine), gradients(policy, theirs), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SUPPORTED)
def test_it_is_the_network_of_transformers(name: str, dtype: torch.dtype, recorded_events: list) -> None:
    policy = build(*SUPPORTED[name], dtype=dtype)
    assert_same_network(policy, TOLERANCE[dtype])
    assert not recorded_events


@pytest.mark.parametrize("name", ["qwen3", "gemma"])
def test_in_bfloat16_it_is_no_further_from_the_truth(name: str) -> None:
    """Both are compared with float32 on the same (bfloat16) weights."""
    policy = build(*SUPPORTED[name], dtype=torch.bfloat16)
    network = Network.of(policy)
    assert network is not None
    found = {}
    for which in ("mine", "theirs"):
        states = packed_states(policy, network) if which == "mine" else plain_states(policy)
        found[which] = (torch.cat(states).detach().double(), gradients(policy, states))
    policy.model.float()
    states = plain_states(policy)
    truth, slopes = torch.cat(states).detach().double(), gradients(policy, states)
    # The weights of the sum are the same numbers, rounded to bfloat16 for the two.
    error = {which: float((found[which][0] - truth).norm()) for which in found}
    assert error["mine"] <= 1.2 * error["theirs"]
    error = {
        which: sum(float((found[which][1][n].double() - slopes[n].double()).norm()) ** 2 for n in slopes)
        for which in found
    }
    assert error["mine"] <= 1.5 * error["theirs"]


@pytest.mark.parametrize("adapted", [False, True], ids=["all weights", "adapter"])
def test_layers_computed_twice_give_the_same(adapted: bool) -> None:
    policy = build("Qwen3", {"head_dim": 16})
    if adapted:
        train(policy)
    found = {}
    for again in (False, True):
        network = Network.of(policy, checkpoint_layers=again)
        assert network is not None and network.checkpoint_layers is again
        states = packed_states(policy, network)
        found[again] = torch.cat(states).detach(), gradients(policy, states)
    assert torch.equal(found[True][0], found[False][0])
    assert_same(found[True][1], found[False][1], 1e-6)
    with torch.no_grad():
        assert torch.equal(torch.cat(packed_states(policy, network)), found[True][0])


# -- adapters -------------------------------------------------------------------------------------


def train(policy: LanguagePolicy, adapter: str = "default", **options: Any) -> None:
    """An adapter (added if there is none) that has learnt something: no factor is zero."""
    if not policy.has_adapter:
        policy.add_lora(rank=4, alpha=8, **options)
    generator = torch.Generator().manual_seed(len(adapter))
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name and adapter in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("state", ["fresh", "trained", "disabled", "merged", "merged, disabled", "two"])
def test_with_an_adapter(state: str, dtype: torch.dtype) -> None:
    import peft

    policy = build("Qwen2", {}, dtype)
    base = torch.cat(packed_states(policy, Network(policy))).detach()
    train(policy) if state != "fresh" else policy.add_lora(rank=4, alpha=8)
    if state == "two":
        second = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_rslora=True)
        policy.model.add_adapter("second", second)
        train(policy, "second")
        policy.model.base_model.set_adapter(["default", "second"])
    if state.startswith("merged"):
        policy.model.merge_adapter()
    with policy.adapter_disabled() if "disabled" in state else nullcontext():
        if state in ("fresh", "trained", "two"):
            assert_same_network(policy, TOLERANCE[dtype])
        else:  # nothing is trainable
            network = Network.of(policy)
            assert network is not None
            for a, b in zip(packed_states(policy, network), plain_states(policy), strict=True):
                assert float((a - b).double().norm()) <= TOLERANCE[dtype] * float(b.double().norm())
        mine = torch.cat(packed_states(policy, Network(policy))).detach()
    unchanged = state in ("fresh", "disabled", "merged, disabled")
    # Unmerging leaves rounding behind.
    assert torch.allclose(mine, base, atol=0 if state != "merged, disabled" else 0.1) is unchanged


def test_an_optimiser_step_takes_effect_at_once() -> None:
    policy = build("Llama", {})
    network = Network.of(policy)
    assert network is not None
    before = torch.cat(packed_states(policy, network)).detach()
    train(policy)  # the network was made before there was an adapter
    after = packed_states(policy, network)
    assert not torch.allclose(torch.cat(after), before, atol=0.01)
    for a, b in zip(after, plain_states(policy), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_dropout_in_training_drops_what_transformers_drops() -> None:
    policy = build("Llama", {})
    train(policy, dropout=0.4)
    policy.model.train()
    network = Network.of(policy)
    assert network is not None, policy.plain_path  # dropout is no reason to think that they differ
    assert policy.model.training and policy.network.model.layers[0].self_attn.q_proj.lora_dropout.training
    packed = pack(rows()[1:2], whole=True)
    states = {}
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            mine = network.hidden(packed)
            torch.manual_seed(seed)
            theirs = policy.hidden_states(packed.ids[None])[0]
        assert torch.allclose(mine, theirs, atol=1e-4)
        states[seed] = mine
    assert not torch.allclose(states[1], states[2], atol=1e-2)


# -- token by token -------------------------------------------------------------------------------


@pytest.mark.parametrize("adapted", [False, True], ids=["all weights", "adapter"])
@pytest.mark.parametrize("name", SUPPORTED)
def test_decoding_gives_the_logits_of_whole_rows(name: str, adapted: bool) -> None:
    """Two answers to each of two prompts, one of which ends early; logits after every token."""
    policy = build(*SUPPORTED[name])
    if adapted:
        train(policy)
    network = Network.of(policy)
    assert network is not None
    decode = NetworkDecode(policy, network)
    prompts = [list(row.ids) for row in rows()[:2]]
    ends = [[9, 8, 7], [4], [5, 5, 6], [2, 1, 0]]
    texts = {slot: [*prompts[slot // 2], *end] for slot, end in enumerate(ends)}
    with torch.no_grad():
        right = {slot: policy.network(input_ids=torch.tensor([ids])).logits[0] for slot, ids in texts.items()}
    found = decode.prefill(prompts, [[0, 1], [2, 3]])
    for line, slot in zip(found, (0, 2), strict=True):
        assert torch.allclose(line, right[slot][len(prompts[slot // 2]) - 1], atol=2e-4)
    for step in range(3):
        slots = [slot for slot, ids in texts.items() if len(ids) > len(prompts[slot // 2]) + step]
        for slot in set(decode.slots) - set(slots):
            decode.free(slot)
        places = [len(prompts[slot // 2]) + step for slot in slots]
        found = decode.decode(slots, [texts[slot][place] for slot, place in zip(slots, places, strict=True)])
        for line, slot, place in zip(found, slots, places, strict=True):
            assert torch.allclose(line, right[slot][place], atol=2e-4)


# -- what is not done here takes the plain path -----------------------------------------------------


@contextmanager
def capped_logits(policy: LanguagePolicy) -> Iterator[None]:
    forward = policy.model.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = torch.tanh(output.logits / 2) * 2
        return output

    policy.model.forward = capped
    yield


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 36,
}
"""The second row of :func:`rows` is longer than 36 tokens, the first is not."""

PLAIN: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}, "GPT2LMHeadModel"),
    "granite (scaled logits)": ("Granite", {"logits_scaling": 3.0}, "GraniteForCausalLM"),
    "gemma 2 (capped logits)": ("Gemma2", {"head_dim": 8}, "Gemma2ForCausalLM"),
    "mistral with a window": ("Mistral", {"sliding_window": 8}, "windows"),
    "qwen2 with a window": (
        "Qwen2",
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
        "windows",
    ),
    "another activation": ("Llama", {"hidden_act": "gelu"}, "activation is gelu"),
    "attention dropout": ("Llama", {"attention_dropout": 0.1}, "in training"),
    "longrope": ("Llama", {"rope_parameters": LONGROPE}, "positions depend on how long a row is"),
}


def assert_plain(policy: LanguagePolicy, reason: str, events: list, *, atol: float = 2e-5) -> None:
    """The plain path is taken, this is said once, and its numbers are right."""
    scorer = Scorer(policy)
    assert scorer.network is None and not scorer.share
    found = scorer([rows()])
    for values, row in zip(found, rows(), strict=True):
        assert torch.allclose(values, logprobs_reference(policy, row.ids)[row.scored[0] - 1 :], atol=atol)
    assert Scorer(policy).network is None
    said = [event.text for event in events if "plain path" in getattr(event, "text", "")]
    assert len(said) == 1 and reason in said[0] and policy.name in said[0]


@pytest.mark.parametrize("name", PLAIN)
def test_what_it_does_not_know_takes_the_plain_path(name: str, recorded_events: list) -> None:
    architecture, changes, reason = PLAIN[name]
    if architecture == "GPT2":
        import transformers

        config = transformers.GPT2Config(**(changes | {k: SIZES[k] for k in ("vocab_size", "eos_token_id")}))
        policy = LanguagePolicy(transformers.GPT2LMHeadModel(config), tiny_tokenizer(), name="tiny GPT2")
    else:
        policy = build(architecture, changes)
    assert_plain(policy, reason, recorded_events)


def test_logits_that_are_changed_after_the_output_layer(recorded_events: list) -> None:
    policy = build("Llama", {})
    with capped_logits(policy):
        assert_plain(policy, "logits are not its output layer's", recorded_events)


def test_a_network_that_computes_something_else_is_found_out(recorded_events: list) -> None:
    """Right names, other arithmetic: a subclass that nobody here has heard of."""
    policy = build("Llama", {})
    layer = policy.network.model.layers[1]
    forward = layer.mlp.forward
    layer.mlp.forward = lambda x: 1.01 * forward(x)
    assert_plain(policy, "hidden states differ", recorded_events)


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("output layer", "output layer has an adapter"),
        ("embedding", "embed_tokens"),
        ("bias", "not plain LoRA"),
        ("magnitude", "not plain LoRA"),
        ("whole norm", "replaces"),
    ],
)
def test_adapters_that_would_be_left_out_are_noticed_while_they_are_zero(
    kind: str, reason: str, recorded_events: list
) -> None:
    """A fresh adapter changes no number, so comparing numbers cannot find what is not computed."""
    import peft

    policy = build("Qwen2", {"tie_word_embeddings": False})
    assert Network.of(policy) is not None  # seen and accepted without it
    options: dict[str, Any] = {
        "output layer": {"target_modules": ["q_proj", "lm_head"]},
        "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
        "bias": {"target_modules": ["q_proj"], "lora_bias": True},
        "magnitude": {"target_modules": ["q_proj"], "use_dora": True},
        "whole norm": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    }[kind]
    config = peft.LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **options)
    with torch.random.fork_rng(devices=[]):
        policy.model = peft.get_peft_model(policy.model, config).eval()
    assert Network.of(policy) is None
    with torch.no_grad():  # and when it is trained, the numbers are right
        generator = torch.Generator().manual_seed(4)
        for parameter in policy.trainable_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    assert_plain(policy, reason, recorded_events)
