"""A language model as a policy: weights, tokenizer, renderer, adapter, and who they are by hash."""

from __future__ import annotations

import copy
import hashlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from corrigible.errors import BadInputError, StorageError
from corrigible.models.renderer import Renderer


@dataclass(frozen=True, slots=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), as :meth:`LanguagePolicy.add_lora` makes them.

    ``targets`` is ``"all-linear"`` (every linear layer except the output head) or module names.
    The update is scaled by ``alpha / rank``. ``seed`` draws the initial weights.
    """

    rank: int = 16
    alpha: float = 32
    targets: str | Sequence[str] = "all-linear"
    dropout: float = 0.0
    seed: int = 0


@contextmanager
def quiet_peft() -> Iterator[None]:
    """PEFT asks transformers for an attribute under its old name; that is theirs to mend, not the user's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


class LanguagePolicy:
    """A causal language model that acts.

    Attributes:
        name: what it was loaded by.
        model: the network; after :meth:`add_lora` a ``peft.PeftModel`` around it.
        tokenizer, renderer: messages to ids, and ids to text.
        base_name: the name to write down as an adapter's base.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        name: str,
        template: str | None = None,
        base_name: str | None = None,
    ) -> None:
        self.model: Any = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.base_name = base_name or name
        generation = getattr(model, "generation_config", None)
        ends = getattr(generation, "eos_token_id", None)
        self.renderer = Renderer(
            tokenizer,
            template,
            end_of_turn_ids=ends if isinstance(ends, list) else [ends] if ends is not None else [],
        )
        self._head_is_plain: bool | None = None
        # Why the model takes the plain path: unknown yet, "" when it does not (see models.network).
        self.plain_path: str | None = None
        # With pad == eos, padding_idx would silently freeze the embedding of the end-of-turn token.
        # Padding is told apart by position here, never by id, so nothing needs it.
        embedding = self.network.get_input_embeddings()
        if getattr(embedding, "padding_idx", None) is not None:
            embedding.padding_idx = None

    def __repr__(self) -> str:
        kind = " with LoRA" if self.has_adapter else ""
        return (
            f"LanguagePolicy({self.name!r}{kind}, {str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the base weights."""
        dtype: torch.dtype = self.network.get_input_embeddings().weight.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.network.get_input_embeddings().weight.device
        return device

    @property
    def context_length(self) -> int:
        """The most tokens (prompt and answer together) that the model was made for."""
        return int(getattr(self.network.config, "max_position_embeddings", None) or 1 << 20)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Token ids that end a turn."""
        return self.renderer.end_of_turn_ids

    @property
    def network(self) -> Any:
        """The transformers model itself, without the PEFT wrapper (its layers still hold the adapter)."""
        return self.model.get_base_model() if self.has_adapter else self.model

    @property
    def has_adapter(self) -> bool:
        """Whether a LoRA adapter is attached."""
        return hasattr(self.model, "peft_config")

    # -- adapters -----------------------------------------------------------------------------

    def add_lora(
        self,
        rank: int = 16,
        alpha: float = 32,
        targets: str | Sequence[str] = "all-linear",
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Attach a fresh adapter; from now on only it is trainable. At first it changes nothing.

        Raises:
            BadInputError: there is one already, or the settings name no layer of this model.
        """
        import peft

        if self.has_adapter:
            raise BadInputError(
                f"{self.name} already has an adapter.", advice="Train that one, or load the base model again."
            )
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=targets if isinstance(targets, str) else list(targets),
            lora_dropout=dropout,
            bias="none",
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.base_name,
        )
        self.model.name_or_path = self.base_name  # what PEFT writes down as the adapter's base
        # The draw must not depend on, nor disturb, the caller's random state.
        with torch.random.fork_rng(), quiet_peft():
            torch.manual_seed(seed)
            try:
                self.model = peft.get_peft_model(self.model, config).eval()
            except ValueError as error:
                raise BadInputError(f"LoRA cannot be attached to {self.name}: {error}") from error

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """The starting policy, without a second copy of the weights: exactly the base model.

        Raises:
            BadInputError: there is no adapter, so the starting policy is not held here.
        """
        if not self.has_adapter:
            raise BadInputError(
                f"{self.name} has no adapter to switch off: its starting weights are not held.",
                advice="Call add_lora() before training, or load the reference policy a second time.",
            )
        with self.model.disable_adapter():
            yield

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """For comparing two passes of a model that may be in training mode; that mode comes back."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that an optimiser should see: the adapter's, else all."""
        return [p for p in self.model.parameters() if p.requires_grad]

    # -- identity -----------------------------------------------------------------------------

    def weights_sha256(self, part: str = "all") -> str:
        """SHA-256 over the weights: names, types, shapes and bytes.

        Args:
            part: ``"all"`` (what the policy does depends on it), ``"base"`` (without the adapter: the
                same before and after :meth:`add_lora`), or ``"adapter"``.

        Raises:
            BadInputError: an unknown part, or ``"adapter"`` when there is none.
        """
        if part not in ("all", "base", "adapter"):
            raise BadInputError(f"part is 'all', 'base' or 'adapter', not {part!r}.")
        if part == "adapter" and not self.has_adapter:
            raise BadInputError(f"{self.name} has no adapter.")
        base: dict[str, torch.Tensor] = {}
        adapter: dict[str, torch.Tensor] = {}
        for name, tensor in self.network.state_dict().items():
            if self.has_adapter and ".lora_" in name:
                adapter[name] = tensor
            else:
                base[name.replace(".base_layer.", ".")] = tensor
        if part == "base" or not self.has_adapter:
            return _sha256(base)
        if part == "adapter":
            return _sha256(adapter)
        return hashlib.sha256(f"{_sha256(base)}\n{_sha256(adapter)}".encode()).hexdigest()

    # -- saving -------------------------------------------------------------------------------

    def save_adapter(self, directory: str | Path) -> Path:
        """Write the adapter in PEFT's format (``PeftModel.from_pretrained`` reads it). Atomic.

        Raises:
            BadInputError: there is no adapter.
            StorageError: the disk is full or the folder cannot be written.
        """
        if not self.has_adapter:
            raise BadInputError(f"{self.name} has no adapter to save.", advice="Use save_full().")

        def write(folder: Path) -> None:
            # save_embedding_layers="auto" would ask a model hub whether the vocabulary was resized.
            self.model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)

        return _write_folder(Path(directory), write)

    def save_full(self, directory: str | Path) -> Path:
        """Write the whole model (an adapter merged in) and its tokenizer, for :func:`load_policy`. Atomic.

        Merging happens in a copy, so this needs the model's memory a second time.

        Raises:
            StorageError: the disk is full or the folder cannot be written.
        """
        network = copy.deepcopy(self.model).merge_and_unload() if self.has_adapter else self.model

        def write(folder: Path) -> None:
            network.save_pretrained(folder, safe_serialization=True)
            self.tokenizer.chat_template = self.renderer.template
            self.tokenizer.save_pretrained(folder)

        return _write_folder(Path(directory), write)

    # -- for the log-probabilities ------------------------------------------------------------

    def hidden_states(self, ids: torch.Tensor) -> torch.Tensor:
        """Last hidden states ``(n, tokens, hidden)`` of right-padded ``ids`` ``(n, tokens)``."""
        hidden: torch.Tensor = self.network.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``(..., vocabulary)`` of hidden states; right only where :attr:`head_is_plain`."""
        logits: torch.Tensor = self.network.get_output_embeddings()(hidden)
        return logits

    @property
    def head_is_plain(self) -> bool:
        """Whether the logits are the output layer of the last hidden state and nothing else.

        Some models scale or cap their logits after it. Rather than knowing which, this tries once.
        """
        if self._head_is_plain is None:
            with torch.inference_mode(), self.without_dropout():
                ids = torch.arange(8, device=self.device).unsqueeze(0) % self.network.config.vocab_size
                try:
                    mine = self.head(self.hidden_states(ids))
                    theirs = self.network(input_ids=ids, use_cache=False).logits
                    # NaN weights are not another kind of head; they are met where they matter.
                    self._head_is_plain = mine.shape == theirs.shape and bool(
                        torch.allclose(mine, theirs, equal_nan=True)
                    )
                except (AttributeError, TypeError):
                    self._head_is_plain = False
        return self._head_is_plain


def _sha256(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def _write_folder(directory: Path, write: Any) -> Path:
    """Fill a folder beside ``directory``, then put it in its place."""
    temporary: Path | None = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        temporary.chmod(0o755)
        write(temporary)
        if directory.exists():
            old = temporary.with_name(temporary.name + ".old")
            directory.rename(old)
            temporary.rename(directory)
            shutil.rmtree(old)
        else:
            temporary.rename(directory)
    except OSError as error:
        raise StorageError(
            f"The model could not be written to {directory}: {error}",
            advice="Check the free space and the permissions; what was there before is untouched.",
        ) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
    return directory
