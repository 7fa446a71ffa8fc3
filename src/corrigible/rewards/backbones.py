"""Pretrained models as readers: a prompt and a response in, one vector out.

Two kinds: a sentence encoder (MiniLM), which reads plain text, and a causal language model, which reads
the conversation through its chat template. Sequences are sorted by length and batched by a token budget.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from corrigible.errors import BadInputError
from corrigible.rewards.config import RewardConfig
from corrigible.rewards.texts import response_text, transcript

if TYPE_CHECKING:
    from corrigible.models import LanguagePolicy, Rendered
    from corrigible.models.network import Network
    from corrigible.records import Message

ENCODERS = ("minilm",)
SCORED_KINDS = (1, 2)  # TokenKind.SAMPLED and NOT_SAMPLED of corrigible.models.renderer


@dataclass(frozen=True)
class Example:
    """One side of a comparison: what was asked and what was answered."""

    prompt: tuple[Message, ...]
    response: tuple[Message, ...]

    @property
    def texts(self) -> tuple[str, str]:
        return transcript(self.prompt), response_text(self.response)

    @property
    def key(self) -> str:
        """Equal for equal content: roles and texts of both parts."""
        digest = hashlib.sha256()
        for part in (self.prompt, self.response):
            digest.update(b"\x00part")
            for message in part:
                digest.update(f"\x00{message.role}\x00{message.content!r}".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


@dataclass(frozen=True)
class Encoded:
    """Token ids; the response is ``ids[start:end]``; ``cut`` tokens did not fit."""

    ids: tuple[int, ...]
    start: int
    end: int
    cut: int = 0


class Backbone:
    """A pretrained transformer with its tokenizer.

    Args:
        name: what it was loaded as; saved with the reward model and loaded again by it.
        module: returns ``last_hidden_state`` and ``hidden_states`` of shape (n, tokens, width).
        tokenizer: a Hugging Face tokenizer.
        kind: "encoder" or "causal".
        renderer: for "causal", turns (prompt, response) messages into ids and kinds
            (`corrigible.models.Renderer.pair`).
        policy: for "causal", the `LanguagePolicy` that adapters are added to.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        tokenizer: Any,
        *,
        kind: Literal["encoder", "causal"],
        renderer: Any = None,
        policy: Any = None,
    ) -> None:
        self.name = name
        self.module = module
        self.tokenizer = tokenizer
        self.kind = kind
        self.renderer = renderer
        self.policy = policy
        self.network = _network_of(policy) if kind == "causal" and policy is not None else None
        self.width = int(module.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self.pad_id = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)
        limit = getattr(module.config, "max_position_embeddings", None)
        self.limit = int(limit) if isinstance(limit, int) else 1 << 30

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def sha256(self) -> str:
        """Digest of every weight in name order: two backbones with one digest give equal vectors."""
        digest = hashlib.sha256()
        for name, value in sorted(self.module.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def output_width(self, config: RewardConfig) -> int:
        """Length of the vector that `represent` gives under these settings."""
        return self.width * len(config.layers) * (2 if config.text == "prompt*response" else 1)

    # -- tokens -------------------------------------------------------------------------------------

    def _pieces(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        rows = self.tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)[
            "input_ids"
        ]
        return [list(row) for row in rows]

    def _encode_plain(
        self, prompts: Sequence[str] | None, responses: Sequence[str], limit: int
    ) -> list[Encoded]:
        """[CLS] prompt [SEP] response [SEP]; without prompts [CLS] response [SEP]."""
        first = [i for i in (self.tokenizer.cls_token_id, self.tokenizer.bos_token_id) if i is not None][:1]
        last = [i for i in (self.tokenizer.sep_token_id, self.tokenizer.eos_token_id) if i is not None][:1]
        said = self._pieces(responses)
        asked = self._pieces(prompts) if prompts is not None else [[] for _ in said]
        rows = []
        for question, answer in zip(asked, said, strict=True):
            room = limit - len(first) - len(last)
            kept = answer[:room]
            room -= len(kept) + len(last)
            tail = question[-room:] if room > 0 else []
            head = [*first, *tail, *last] if tail else list(first)
            ids = (*head, *kept, *last)
            cut = len(answer) - len(kept) + len(question) - len(tail)
            rows.append(Encoded(ids, len(head), len(head) + max(len(kept), 1), cut))
        return rows

    def _encode_chat(self, examples: Sequence[Example], limit: int) -> list[Encoded]:
        rows = []
        for example in examples:
            rendered = self.renderer.pair(example.prompt, example.response)
            scored = [place for place, kind in enumerate(rendered.kinds) if int(kind) in SCORED_KINDS]
            start, end = scored[0], scored[-1] + 1
            ids = list(rendered.ids[:end])
            over = len(ids) - limit
            if over > 0:
                gone = min(over, start)
                ids, start, end = ids[gone:], start - gone, end - gone
                if end > limit:  # the response alone is too long: keep its beginning and its last token
                    ids, end = [*ids[: limit - 1], ids[-1]], limit
            rows.append(Encoded(tuple(ids), start, end, max(over, 0)))
        return rows

    def encode(self, examples: Sequence[Example], config: RewardConfig) -> list[list[Encoded]]:
        """The sequences to read, one list per part of the vector, each with one entry per example.

        "prompt*response" gives two parts (responses, prompts), the other layouts one.
        """
        limit = min(config.max_length, self.limit)
        if limit < 8:
            raise BadInputError(f"max_length is {limit} tokens.", advice="Use at least 8.")
        prompts = [example.texts[0] for example in examples]
        responses = [example.texts[1] for example in examples]
        if config.text == "prompt+response":
            if self.kind == "causal" and all(example.prompt for example in examples):
                return [self._encode_chat(examples, limit)]
            return [self._encode_plain(prompts, responses, limit)]
        if config.text == "response":
            return [self._encode_plain(None, responses, limit)]
        return [self._encode_plain(None, part, limit) for part in (responses, prompts)]

    # -- vectors ------------------------------------------------------------------------------------

    def pooled(self, rows: Sequence[Encoded], config: RewardConfig, *, share: bool = False) -> Tensor:
        """(n, width·layers) float32 for sequences read in one batch; packed where the model allows it.

        With ``share`` what packed rows begin with alike is read once. A vector that is kept must not depend
        on what it was read with, not even in its rounding: it is read without.
        """
        if self.network is None:
            return self._pooled_padded(rows, config)
        from corrigible.models.packing import pack

        packed = pack(_rendered(rows), share=share, whole=True)
        spans = []
        for row, places in zip(rows, packed.places, strict=True):
            start, end = {
                "mean": (0, len(row.ids)),
                "response_mean": (row.start, row.end),
                "last": (len(row.ids) - 1, len(row.ids)),
                "first": (0, 1),
            }[config.pooling]
            spans.append(places[start:end])
        lengths, read = [len(span) for span in spans], torch.cat(spans).to(self.device)
        vectors = [
            torch.stack([part.mean(dim=0) for part in state.index_select(0, read).split_with_sizes(lengths)])
            for state in self.network.states(packed, config.layers)
        ]
        return torch.cat(vectors, dim=1)

    def size(self, rows: Sequence[Encoded]) -> int:
        """Tokens that rows take in a pass of their own, where they may share what they begin with alike."""
        if self.network is None:
            return sum(len(row.ids) for row in rows)
        from corrigible.models.packing import packed_size

        return packed_size(_rendered(rows), whole=True)

    def _pooled_padded(self, rows: Sequence[Encoded], config: RewardConfig) -> Tensor:
        device = self.device
        longest = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), longest), self.pad_id, dtype=torch.long)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        chosen = torch.zeros((len(rows), longest), dtype=torch.float32)
        for number, row in enumerate(rows):
            ids[number, : len(row.ids)] = torch.tensor(row.ids)
            mask[number, : len(row.ids)] = 1
            if config.pooling == "mean":
                chosen[number, : len(row.ids)] = 1
            elif config.pooling == "response_mean":
                chosen[number, row.start : row.end] = 1
            elif config.pooling == "last":
                chosen[number, len(row.ids) - 1] = 1
            else:
                chosen[number, 0] = 1
        chosen = (chosen / chosen.sum(dim=1, keepdim=True)).to(device)
        deep = config.layers != (-1,)
        out = self.module(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            output_hidden_states=deep,
            return_dict=True,
        )
        states = [out.hidden_states[layer] for layer in config.layers] if deep else [out.last_hidden_state]
        return torch.cat([torch.einsum("nt,ntw->nw", chosen, state.float()) for state in states], dim=1)

    def represent(
        self, parts: Sequence[Sequence[Encoded]], config: RewardConfig, *, together: bool = False
    ) -> Tensor:
        """(n, output_width) float32, differentiable where gradients are on.

        With ``together`` the rows of a part are one batch, where they are read without padding, and share
        what they begin with alike.
        """
        vectors = [self._batched(rows, config, together) for rows in parts]
        if len(vectors) == 1:
            return vectors[0]
        response, prompt = (nn.functional.normalize(vector, dim=1) for vector in vectors)
        scale = float(self.width) ** 0.5  # unit vectors have tiny coordinates; products have tinier ones
        return torch.cat([response * scale, response * prompt * scale**2], dim=1)

    def _batched(self, rows: Sequence[Encoded], config: RewardConfig, together: bool) -> Tensor:
        unique: dict[Encoded, int] = {}
        places = [unique.setdefault(row, len(unique)) for row in rows]
        distinct = list(unique)
        if together and self.network is not None:
            vectors = self.pooled(distinct, config, share=True)
            return vectors[torch.tensor(places, device=vectors.device)]
        order = sorted(range(len(distinct)), key=lambda i: len(distinct[i].ids))
        pieces = [
            self.pooled([distinct[i] for i in batch], config)
            for batch in token_batches([len(distinct[i].ids) for i in order], order, config.batch_tokens)
        ]
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        joined = torch.cat(pieces)
        return joined[back.to(joined.device)[torch.tensor(places, device=joined.device)]]


def _rendered(rows: Sequence[Encoded]) -> list[Rendered]:
    from corrigible.models import Rendered

    return [Rendered.from_tokens(row.ids[: row.start], row.ids[row.start :]) for row in rows]


def _network_of(policy: LanguagePolicy) -> Network | None:
    from corrigible.models.network import Network

    return Network.of(policy)


def token_batches(lengths: Sequence[int], order: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Cut ``order`` (ascending ``lengths``) into batches of at most ``budget`` padded tokens."""
    batch: list[int] = []
    for length, index in zip(lengths, order, strict=True):
        if batch and length * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def load_backbone(config: RewardConfig, *, device: str = "auto") -> Backbone:
    """The pretrained model that ``config.backbone`` names, with adapters added for ``tune="lora"``.

    Raises:
        MissingError: the model is not on this machine (from `corrigible.models`).
        BadInputError: LoRA on an encoder.
    """
    from corrigible.models import load_encoder, load_policy

    if is_encoder(config.backbone):
        if config.tune == "lora":
            raise BadInputError("LoRA is for causal backbones.", advice='Use tune="full" with an encoder.')
        encoder = load_encoder(config.backbone, device=device)
        return Backbone(config.backbone, encoder.model, encoder.tokenizer, kind="encoder")
    policy = load_policy(config.backbone, device=device, dtype=config.dtype)
    if config.tune == "lora":
        policy.add_lora(rank=config.lora_rank, alpha=2 * config.lora_rank, seed=config.seed)
    return causal_backbone(config.backbone, policy)


def is_encoder(name: str) -> bool:
    """Whether a backbone's name is an encoder: a known one, or a folder whose model is no causal one."""
    description = Path(name) / "config.json"
    if name in ENCODERS or not description.is_file():
        return name in ENCODERS
    try:
        architectures = json.loads(description.read_text(encoding="utf-8")).get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise BadInputError(f"{description} is not a model description: {error}.") from error
    return not any(str(entry).endswith("ForCausalLM") for entry in architectures)


def causal_backbone(name: str, policy: LanguagePolicy) -> Backbone:
    """A `LanguagePolicy` read at its hidden states (its output matrix is not used)."""
    network = policy.network
    inner = getattr(network, network.base_model_prefix)
    return Backbone(name, inner, policy.tokenizer, kind="causal", renderer=policy.renderer, policy=policy)
