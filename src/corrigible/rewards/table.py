"""Vectors of texts from a frozen backbone, each computed once and, if wanted, kept on disk.

Reading the texts is all the work of a frozen reward model, so folds, learning curves and an interrupted
run share one table. On disk it is a folder of safetensors pieces named by a digest of everything that
the vectors depend on; a piece is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from corrigible.errors import BadInputError
from corrigible.files import replacing
from corrigible.rewards.backbones import Backbone, Example
from corrigible.rewards.config import RewardConfig

PIECE = 64
READ_BY = ("text", "pooling", "layers", "features", "max_length", "dtype")


class FeatureTable:
    """Raw rows (embedding and named features) of examples under a frozen backbone.

    Args:
        backbone: the reader; its weights must not change while the table is used.
        config: its reading settings (:data:`READ_BY`) must stay as they are.
        directory: where pieces are kept; None keeps them in memory only.
    """

    def __init__(self, backbone: Backbone, config: RewardConfig, directory: str | Path | None = None) -> None:
        self.backbone = backbone
        self.config = config
        self.directory = Path(directory) if directory is not None else None
        self._places: dict[str, int] = {}
        self._rows: list[Tensor] = []
        if self.directory is not None:
            settings = json.dumps({name: getattr(config, name) for name in READ_BY}, sort_keys=True)
            digest = hashlib.sha256(f"{backbone.sha256()}\n{settings}".encode()).hexdigest()[:16]
            self.directory = self.directory / digest
            self._load()

    def __len__(self) -> int:
        return len(self._rows)

    def check(self, config: RewardConfig) -> None:
        """BadInputError when ``config`` would read texts in another way."""
        changed = [name for name in READ_BY if getattr(config, name) != getattr(self.config, name)]
        if changed:
            raise BadInputError(
                f"the feature table was made with other settings: {', '.join(changed)}.",
                advice="Make a FeatureTable with this config.",
            )

    def rows(self, examples: Sequence[Example]) -> Tensor:
        """(n, width) float32 on the CPU; examples not seen before are read, with progress events."""
        from corrigible.events import track
        from corrigible.rewards.reward_model import raw_rows

        keys = [example.key for example in examples]
        missing: dict[str, Example] = {}
        for key, example in zip(keys, examples, strict=True):
            if key not in self._places:
                missing.setdefault(key, example)
        # Neighbours in length share a batch whatever piece they are in.
        todo = sorted(missing.items(), key=lambda entry: sum(map(len, entry[1].texts)))
        pieces = [todo[i : i + PIECE] for i in range(0, len(todo), PIECE)]
        was_training = self.backbone.module.training
        self.backbone.module.eval()
        for piece in track(pieces, "read texts", total=len(pieces), unit="piece") if pieces else ():
            with torch.inference_mode():
                values = raw_rows(self.backbone, [example for _, example in piece], self.config)
            self._add([key for key, _ in piece], values.float().cpu().clone())
        self.backbone.module.train(was_training)
        return torch.stack([self._rows[self._places[key]] for key in keys])

    def _add(self, keys: Sequence[str], values: Tensor) -> None:
        if self.directory is not None:
            self._save(keys, values)
        for key, value in zip(keys, values, strict=True):
            self._places[key] = len(self._rows)
            self._rows.append(value)

    def _save(self, keys: Sequence[str], values: Tensor) -> None:
        from safetensors.torch import save_file

        assert self.directory is not None
        name = hashlib.sha256("".join(keys).encode()).hexdigest()[:16]
        identity = torch.tensor([list(bytes.fromhex(key)) for key in keys], dtype=torch.uint8)
        with replacing(self.directory / f"{name}.safetensors") as writing:
            save_file({"keys": identity, "values": values}, writing)

    def _load(self) -> None:
        from safetensors.torch import load_file

        assert self.directory is not None
        for path in sorted(self.directory.glob("*.safetensors")):
            try:
                held = load_file(path)
                keys = [bytes(row.tolist()).hex() for row in held["keys"]]
                values = held["values"]
            except Exception:  # a damaged piece is only lost time: it is read again
                path.unlink(missing_ok=True)
                continue
            for key, value in zip(keys, values, strict=True):
                self._places[key] = len(self._rows)
                self._rows.append(value)
