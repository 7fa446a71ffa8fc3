"""A Llama-family network as one function of packed tokens.

It reads the very parameters of the policy's transformers model (adapters included) and does the
same arithmetic, without padding, without a mask and with the kernels of
:mod:`corrigible.models.kernels`. Which models it is right for is not taken on trust: a network is
compared with transformers' own on a few tokens before it is used, and a model on which they
disagree, or whose architecture is not known here, keeps to the plain path, which is said once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from corrigible.errors import BadInputError
from corrigible.events import Message, emit
from corrigible.models.attention import tree_attention
from corrigible.models.kernels import rms_norm, rotate, swiglu
from corrigible.models.packing import Node, Packed, pack
from corrigible.models.renderer import Rendered

if TYPE_CHECKING:
    from corrigible.models.policy import LanguagePolicy

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
)
"""What :class:`Network` computes; anything else takes the plain path."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""How far its hidden states may be from transformers', relative to their size."""


class Unsupported(Exception):
    """Why a model takes the plain path."""


class Network:
    """The forward pass of a policy over packed tokens.

    Args:
        policy: whose parameters to use; they are looked up at every call, so an optimiser's step, a
            new adapter or ``policy.adapter_disabled()`` takes effect at once.
        checkpoint_layers: keep only each layer's input for the backward pass and compute the rest
            again there: about a twentieth of the memory for a third more time.

    Raises:
        Unsupported: the model is not one of :data:`ARCHITECTURES`, or uses something of it that is
            not done here.
    """

    def __init__(self, policy: LanguagePolicy, *, checkpoint_layers: bool = False) -> None:
        self.policy = policy
        self.checkpoint_layers = checkpoint_layers
        network = policy.network
        config = network.config
        name = type(network).__name__
        if name not in ARCHITECTURES:
            raise Unsupported(f"its architecture is {name}")
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"} or (
            getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        ):
            raise Unsupported("it has attention windows")
        if not policy.head_is_plain:
            raise Unsupported("its logits are not its output layer's")
        # Gemma's own (Gemma Team 2024, section 2): scaled embeddings, GELU gates, norms of 1 + weight.
        self.gemma = name == "GemmaForCausalLM"
        if config.hidden_act not in (("gelu_pytorch_tanh",) if self.gemma else ("silu", "swish")):
            raise Unsupported(f"its activation is {config.hidden_act}")
        if getattr(config, "attention_dropout", 0.0):
            raise Unsupported("it drops attention weights in training")
        if positions_depend_on_length(policy):
            raise Unsupported("its positions depend on how long a row is")
        if policy.has_adapter:
            _check_adapter(network)
        self.layers = list(network.model.layers)
        self.heads = int(config.num_attention_heads)
        self.key_heads = int(config.num_key_value_heads)
        self.size = int(getattr(config, "head_dim", None) or config.hidden_size // self.heads)
        self.eps = float(config.rms_norm_eps)
        self.scale = self.size**-0.5

    @classmethod
    def of(cls, policy: LanguagePolicy, *, checkpoint_layers: bool = False) -> Network | None:
        """The network of a policy if it is right for it; otherwise None, and an event says why."""
        if policy.plain_path:
            return None
        try:
            # Even of a model that was accepted: it may have got an adapter since.
            network = cls(policy, checkpoint_layers=checkpoint_layers)
            if policy.plain_path is None:
                network.verify()
        except Unsupported as reason:
            policy.plain_path = str(reason)
            emit(Message(text=f"The plain path is used for {policy.name}: {reason}."))
            return None
        policy.plain_path = ""
        return network

    def verify(self) -> None:
        """Compare with transformers' own network on a few tokens; raises :class:`Unsupported`."""
        vocabulary = int(self.policy.network.config.vocab_size)
        length = min(24, self.policy.context_length)
        ids = [(37 * i + 11) % vocabulary for i in range(length)]
        row = Rendered.from_tokens(ids[:2], ids[2:])
        with torch.inference_mode(), self.policy.without_dropout():
            try:
                mine = self.hidden(pack([row], whole=True))
                theirs = self.policy.hidden_states(torch.tensor([ids], device=self.policy.device))[0]
            except (AttributeError, TypeError, RuntimeError) as error:
                raise Unsupported(f"its layers are not laid out as expected ({error})") from error
        # NaN weights are not an unsupported model; they are met, and named, where they matter.
        if not bool(theirs.isfinite().all()):
            return
        difference = float((mine.double() - theirs.double()).norm() / theirs.double().norm())
        if not difference <= TOLERANCE[self.policy.dtype]:
            raise Unsupported(f"its hidden states differ by {difference:.2g} from those of transformers")

    def hidden(self, packed: Packed, keep: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Last hidden states ``(tokens, width)``, the final norm applied; differentiable.

        ``keep`` receives every layer's keys and values, ``(tokens, key heads, size)``.
        """
        device = self.policy.device
        inner = self.policy.network.model
        x = self.embed(packed.ids.to(device))
        cos, sin = self.angles(packed.positions.to(device), x)
        for layer in self.layers:
            if self.checkpoint_layers and torch.is_grad_enabled():
                x = checkpoint(self._layer, layer, x, cos, sin, packed.nodes, use_reentrant=False)
            else:
                x = self._layer(layer, x, cos, sin, packed.nodes, keep)
        return rms_norm(x, self.norm_weight(inner.norm), self.eps, self.policy.dtype)

    def states(self, packed: Packed, layers: Sequence[int]) -> list[Tensor]:
        """Hidden states ``(tokens, width)`` float32 after some layers, no deeper than the deepest asked for.

        Args:
            packed: the tokens.
            layers: how many layers to have gone through; 0 is the embedding, and the number of all layers,
                or -1, the last one with the final norm applied (as transformers counts its hidden states).
        """
        depth = len(self.layers)
        wanted = [layer if layer >= 0 else depth + 1 + layer for layer in layers]
        if not all(0 <= layer <= depth for layer in wanted):
            raise BadInputError(
                f"layers are {list(layers)}; {self.policy.name} has {depth}.",
                advice=f"Use 0 to {depth}, or -1.",
            )
        if max(wanted) == depth:
            last = self.hidden(packed).float()
            if set(wanted) == {depth}:
                return [last] * len(wanted)
        x = self.embed(packed.ids.to(self.policy.device))
        cos, sin = self.angles(packed.positions.to(self.policy.device), x)
        found = {0: x}
        for number, layer in enumerate(self.layers[: max(w for w in wanted if w < depth)], start=1):
            x = found[number] = self._layer(layer, x, cos, sin, packed.nodes)
        return [last if layer == depth else found[layer].float() for layer in wanted]

    def embed(self, ids: Tensor) -> Tensor:
        """What the first layer reads for ``ids`` ``(tokens,)``: ``(tokens, width)``."""
        table = self.policy.network.model.embed_tokens
        x = nn.functional.embedding(ids, table.weight)
        x = x * table.embed_scale.to(x.dtype) if self.gemma else x
        # What the layers add to is float32 whatever the weights are: thirty roundings of it would be
        # most of the difference between two ways to compute the same log-prob.
        return x if x.dtype == torch.float64 else x.float()

    def norm_weight(self, norm: Any) -> Tensor:
        """What a norm multiplies by, ``(width,)``."""
        weight: Tensor = norm.weight
        return 1.0 + weight.float() if self.gemma else weight

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """The gated unit's product, both ``(tokens, inner width)``."""
        return nn.functional.gelu(gate, approximate="tanh") * up if self.gemma else swiglu(gate, up)

    def angles(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``(tokens, 1, size)`` at ``positions`` ``(tokens,)``, in the weights' type."""
        like = like[None, :0].to(self.policy.dtype)
        cos, sin = self.policy.network.model.rotary_emb(like, position_ids=positions[None])
        return cos[0].unsqueeze(1), sin[0].unsqueeze(1)

    def _layer(
        self,
        layer: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        nodes: tuple[Node, ...],
        keep: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        q, k, v = self.queries_keys_values(layer, x, cos, sin)
        if keep is not None:
            keep.append((k, v))
        attended = tree_attention(q, k, v, nodes, self.scale)
        return self.after_attention(layer, x, attended)

    def queries_keys_values(
        self, layer: Any, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(tokens, heads, size)`` and twice ``(tokens, key heads, size)``, positions applied."""
        attention = layer.self_attn
        normed = rms_norm(x, self.norm_weight(layer.input_layernorm), self.eps, self.policy.dtype)
        q = linear(attention.q_proj, normed).view(-1, self.heads, self.size)
        k = linear(attention.k_proj, normed).view(-1, self.key_heads, self.size)
        v = linear(attention.v_proj, normed).view(-1, self.key_heads, self.size)
        if hasattr(attention, "q_norm"):
            q = rms_norm(q, attention.q_norm.weight, self.eps)
            k = rms_norm(k, attention.k_norm.weight, self.eps)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def after_attention(self, layer: Any, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of a layer: output projection, residual, and the gated feed-forward part."""
        x = x + linear(layer.self_attn.o_proj, attended.reshape(len(x), -1))
        weight = self.norm_weight(layer.post_attention_layernorm)
        normed = rms_norm(x, weight, self.eps, self.policy.dtype)
        inner = self.gated(linear(layer.mlp.gate_proj, normed), linear(layer.mlp.up_proj, normed))
        return x + linear(layer.mlp.down_proj, inner)


def linear(module: Any, x: Tensor) -> Tensor:
    """A linear layer, with its LoRA adapter where it has one; ``(tokens, in)`` to ``(tokens, out)``.

    The adapter's product runs in the type of ``x`` (PEFT keeps adapters in float32 and would run it
    there); its gradient is float32 again.
    """
    if isinstance(module, nn.Linear):
        return nn.functional.linear(x, module.weight, module.bias)
    if not hasattr(module, "lora_A") or module.lora_variant:
        result: Tensor = module(x)
        return result
    base = module.base_layer
    out = nn.functional.linear(x, base.weight, base.bias)
    if module.disable_adapters or module.merged:
        if module.merged and module.disable_adapters:
            module.unmerge()
            out = nn.functional.linear(x, base.weight, base.bias)
        return out
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        down, up = module.lora_A[name].weight, module.lora_B[name].weight
        inner = nn.functional.linear(module.lora_dropout[name](x), down.to(x.dtype))
        out = torch.addmm(out, inner, (up * module.scaling[name]).to(x.dtype).T)
    return out


def positions_depend_on_length(policy: LanguagePolicy) -> bool:
    """Whether the frequencies of the rotary positions are chosen by the longest row of a forward pass."""
    given = getattr(policy.network.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    each = [given, *(one for one in given.values() if isinstance(one, dict))]
    return any(str(one.get("rope_type")) in ("dynamic", "longrope") for one in each)


def _check_adapter(network: Any) -> None:
    """:class:`Unsupported` for an adapter that is more than two factors beside some linear layers.

    What such an adapter adds (a bias, a decomposed magnitude, a table beside the embedding) may well be
    zero at first, so that comparing numbers would not find it.
    """
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if type(network.get_output_embeddings()) is not nn.Linear:
        raise Unsupported("its output layer has an adapter")
    for name, module in network.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            raise Unsupported(f"its adapter replaces {name}")
        if isinstance(module, BaseTunerLayer) and (
            type(module) is not LoraLinear
            or type(module.base_layer) is not nn.Linear
            or getattr(module, "lora_variant", True)  # what an older PEFT cannot say is not assumed
            or any(getattr(module, "lora_bias", {}).values())
        ):
            raise Unsupported(f"its adapter of {name} is not plain LoRA")
