"""Reference log-probs in files: those of a run, and those that later runs may take over.

A run keeps its own beside its checkpoints. In the *shared* folder lie whole reference passes under the
digest of everything that decides their bits: weights, rows in order, how they were cut into forward passes,
and what the machine's arithmetic depends on. So a pass that is taken over is bit for bit the one that
would have been computed, and what a run gives never depends on what other runs left behind. That serves
sweeps (another learning rate, beta or seed, on the same data), which is where the same pass is repeated.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from corrigible.errors import StorageError
from corrigible.events import Alert, Message, emit
from corrigible.files import replacing, storage_errors, write_atomically
from corrigible.models.load import cache_directory
from corrigible.models.scoring import Scorer

ReferenceLogprobs = dict[bytes, Tensor]
"""By :func:`~corrigible.align.sources.row_key`, log-probs of a row's scored tokens, ``(tokens,)`` float32."""

SHARED_BYTES = 1 << 30
"""Most that the shared folder holds; what was not used for longest is removed."""


def shared_folder() -> Path:
    """Where reference passes lie that later runs may take over: beside the converted weights."""
    return cache_directory() / "reference"


def pass_digest(score: Scorer, weights: str, rows: Iterable[bytes], micro_batch_tokens: int) -> str:
    """Sha256 over everything that decides the bits of a reference pass.

    Args:
        score: what scores the rows.
        weights: sha256 of its weights, and the temperature if it is not 1.
        rows: their keys, in order.
        micro_batch_tokens: most tokens of a forward pass.
    """
    device = score.policy.device
    cpu = torch.backends.cpu.get_cpu_capability()
    settings = {
        "weights": weights,
        "dtype": str(score.policy.dtype),
        "plain": score.network is None,
        "share": score.share,
        "micro_batch_tokens": micro_batch_tokens,
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for key in rows:
        digest.update(key)
    return digest.hexdigest()


def read(path: Path, weights: str) -> ReferenceLogprobs:
    """The log-probs in a file when they are of these weights, else none.

    Alerts: ``cache_damaged``.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("weights") != weights:
                return {}
            keys, lengths, flat = (file.get_tensor(name) for name in ("keys", "lengths", "logprobs"))
            if (file.metadata() or {}).get("sha256") != _digest(keys, lengths, flat):
                raise ValueError("checksum")
    except (OSError, ValueError, SafetensorError):
        emit(Alert(name="cache_damaged", message=f"{path} is damaged; its log-probs are computed again."))
        return {}
    parts = flat.split(lengths.tolist())
    return {bytes(key.numpy()): part for key, part in zip(keys, parts, strict=True)}


def write(path: Path, weights: str, known: Mapping[bytes, Tensor], digest: str) -> None:
    """Write log-probs under these weights, of the pass of that digest, atomically; nothing if there are none.

    Raises:
        StorageError: the disk is full or not writable.
    """
    from safetensors.torch import save

    if not known:
        return
    keys = torch.stack([torch.frombuffer(bytearray(key), dtype=torch.uint8) for key in known])
    lengths = torch.tensor([len(scores) for scores in known.values()])
    flat = torch.cat(list(known.values()))
    metadata = {"weights": weights, "pass": digest, "sha256": _digest(keys, lengths, flat)}
    write_atomically(path, save({"keys": keys, "lengths": lengths, "logprobs": flat}, metadata))


def take_over(digest: str, weights: str) -> ReferenceLogprobs:
    """The pass of that digest when an earlier run left it, else nothing.

    Alerts: ``cache_damaged``; the file is removed.
    """
    path = _shared(digest)
    if not path.exists():
        return {}
    found = read(path, weights)
    if not found:
        path.unlink(missing_ok=True)
        return {}
    os.utime(path)
    emit(Message(text=f"The reference log-probs of {len(found)} rows are those of an earlier run."))
    return found


def hand_on(file: Path) -> None:
    """Leave a run's log-probs for later runs; that there is no room for them is said and no more.

    Only a whole pass that has proved right is to be handed on: a mistake in it would come back.
    """
    from safetensors import safe_open

    if not file.exists():  # all of it was recorded at sampling
        return
    with safe_open(file, framework="pt") as opened:
        path = _shared(opened.metadata()["pass"])
    try:
        if path.exists():
            return
        with replacing(path) as writing:
            shutil.copyfile(file, writing)
        _trim(path.parent)
    except StorageError as error:
        emit(Message(text=f"Reference log-probs are not kept for later runs: {error.message}"))


def _shared(digest: str) -> Path:
    return shared_folder() / f"{digest}.safetensors"


def _trim(folder: Path) -> None:
    with storage_errors(folder):
        files = [(path.stat(), path) for path in folder.glob("*.safetensors")]
        room = SHARED_BYTES
        for found, path in sorted(files, key=lambda each: -each[0].st_mtime_ns):
            room -= found.st_size
            if room < 0:
                path.unlink(missing_ok=True)


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
