"""TRL's update step, driven through TRL's own trainers on prepared tokens.

    python -m bench.rival --algorithm dpo --setting default --steps 5
    python -m bench.rival --algorithm dpo --setting fastest --set micro_batch=2 --json

What is TRL's own: the trainer class, its loss, its model loading, collation and padding, the loop of
transformers' Trainer, AdamW and gradient clipping. What is replaced: tokenising (the ids are given) and,
for GRPO, sampling (completions and rewards are given; advantages are computed as TRL does). Logging and
checkpoints are off. A step's seconds run from the end of the step before, so collation counts.

Differences from a run by hand, all of them small or in TRL's favour:

* The padding token is one that occurs in no row. SmolLM2 pads with its end of turn, and then TRL's
  reward model reads the score one token too early (transformers looks for the last id that is not padding).
* The embedding of the padding token learns. As loaded by transformers it does not (``padding_idx``), and
  with SmolLM2 that token is the end of turn, which stands in every prompt: the two sides would train
  different parameters (measured on a tiny model: losses 1e-4 apart after two steps instead of 1e-6).
* KTO's rows come as *all desirable, then all undesirable* of a batch, as TRL's own unpairing orders
  them, so that the mismatched answers of its KL estimate belong to other prompts. Each prompt takes the
  next row's answer; TRL's preparation takes the one before.
* GRPO's old log-probs are those of the policy before the first step, computed before the clock starts.
  TRL by default takes the current policy for the old one; then its loss would not depend on the weights,
  and equal losses would show nothing. Its cost in the step is nil.

Settings. ``default`` is what a user gets: TRL's defaults, with ``use_cpu`` (TRL turns bf16 on by itself:
float32 weights under bf16 autocast, gradient checkpointing, a second model as the reference, the whole
batch in one forward pass). ``fastest`` is the quickest that :mod:`bench.rival_search` found to work; that
module names what was tried.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bench.options import add_common_options, as_training, prepared_for
from bench.pairs import Group
from bench.prepared import Prepared
from bench.process import Measurement, Training, forget_peak, peak_rss_mb, recent_peak_rss_mb, report
from bench.rival_settings import SETTINGS, Setting, change

from corrigible.errors import BadInputError, MissingError

VERSION = "1.16.0"
"""The release of TRL that results name; another one is refused."""


def measure(prepared: Prepared, training: Training, setting: Setting, *, name: str = "custom") -> Measurement:
    """Train for ``training.total`` steps with TRL and say how long each took.

    Raises:
        MissingError: TRL is not installed.
        BadInputError: another release of TRL, or fewer batches than steps.
    """
    _check_version()
    batches = prepared.batches()[: training.total]
    if len(batches) < training.total:
        raise BadInputError(f"{len(batches)} batches are prepared, {training.total} steps were asked for.")
    if setting.micro_batch:
        batches = [sorted(batch, key=lambda group: -_longest(group)) for batch in batches]
    with tempfile.TemporaryDirectory(prefix="corrigible-trl-") as folder, _quiet():
        began = time.perf_counter()
        trainer, reference_seconds = _trainer(prepared, batches, training, setting, Path(folder))
        setup = time.perf_counter() - began
        can_tell = forget_peak()
        trainer.train()
        recent = recent_peak_rss_mb() if can_tell else 0.0
    return Measurement(
        side="trl",
        algorithm=training.algorithm,
        setting=name,
        warmup=training.warmup,
        seconds=trainer.clock.seconds,
        tokens=[sum(group.tokens for group in batch) for batch in batches],
        losses=[float(loss) for loss in trainer.clock.losses],
        setup_seconds=setup,
        reference_seconds=reference_seconds,
        peak_rss_mb=peak_rss_mb(),
        peak_rss_steps_mb=recent,
        options={
            **asdict(setting),
            "precision": training.precision,
            "lora": training.lora,
            "threads": torch.get_num_threads(),
        },
    )


class _Clock:
    """The seconds and losses of steps, noted by the trainer and by a callback."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[torch.Tensor] = []
        self._loss: torch.Tensor | None = None
        self._last = 0.0

    def begin(self) -> None:
        self._last = time.perf_counter()

    def add(self, loss: torch.Tensor) -> None:
        """One micro-batch's share of the batch's loss."""
        self._loss = loss if self._loss is None else self._loss + loss

    def end(self) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        assert self._loss is not None
        self.losses.append(self._loss)
        self._loss = None


def _trainer(
    prepared: Prepared, batches: list[list[Group]], training: Training, setting: Setting, folder: Path
) -> tuple[Any, float]:
    """TRL's trainer, ready to train, and the seconds its reference pass took."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

    kinds = {
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "reward": (trl.RewardTrainer, trl.RewardConfig),
        "kto": (trl.KTOTrainer, trl.KTOConfig),
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
    }
    trainer_class, config_class = kinds[training.algorithm]
    algorithm = training.algorithm
    tokenizer = AutoTokenizer.from_pretrained(prepared.model)
    tokenizer.pad_token = _padding_token(tokenizer, batches)
    clock = _Clock()
    reference = 0.0

    class Given(trainer_class):  # type: ignore[misc, valid-type]
        """The trainer, with the dataset taken as it is and each step's loss noted."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
            loss = super().training_step(*arguments, **options)
            clock.add(loss.detach())
            return loss

        def _precompute_ref_logps(self, *arguments: Any, **options: Any) -> Any:
            nonlocal reference
            began = time.perf_counter()
            dataset = super()._precompute_ref_logps(*arguments, **options)
            reference += time.perf_counter() - began
            return dataset

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            return self.given[inputs[0]["batch"]]

    class Timing(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    rows = _rows(algorithm, batches)
    size = _batch_rows(algorithm, batches)
    micro = setting.micro_batch or size
    if size % micro:
        raise BadInputError(f"micro_batch={micro} does not divide the batch of {size}.")
    if algorithm == "kto" and micro != size:
        raise BadInputError(
            "KTO's KL estimate is of the whole forward pass: micro_batch would change its loss."
        )
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": training.precision == "bf16" and setting.autocast,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": size // micro,
        "max_steps": len(batches),
        "learning_rate": training.lr,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": setting.gradient_checkpointing,
        "torch_compile": setting.compile,
        "model_init_kwargs": {"dtype": setting.weights},
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    if setting.attention:
        options["model_init_kwargs"]["attn_implementation"] = setting.attention
    if setting.optimiser:
        options["optim"] = setting.optimiser
    if algorithm in ("dpo", "kto"):
        options["precompute_ref_log_probs"] = setting.precompute_reference
    if algorithm == "dpo":
        options["padding_free"] = setting.padding_free
    if algorithm == "grpo":
        options |= {"num_generations": len(batches[0][0].completions), "shuffle_dataset": False}
        options["steps_per_generation"] = size // micro
    else:
        # The rows are cut already, and alike on both sides.
        options |= {
            "max_length": None,
            "activation_offloading": setting.offload,
            "train_sampling_strategy": "sequential",
        }
    more: dict[str, Any] = {"reward_funcs": [_never_called]} if algorithm == "grpo" else {}
    if training.lora:
        import peft

        more["peft_config"] = peft.LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules="all-linear",
            task_type="SEQ_CLS" if algorithm == "reward" else "CAUSAL_LM",
        )
    trainer = Given(
        model=str(prepared.model),
        args=config_class(**options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Timing()],
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.clock = clock
    _same_start(trainer.model, prepared, training)
    if algorithm == "grpo":
        trainer.given = [_generated(trainer, batch, tokenizer.pad_token_id) for batch in batches]
    return trainer, reference


def _rows(algorithm: str, batches: Sequence[Sequence[Group]]) -> list[dict[str, Any]]:
    """The rows of the dataset that each trainer makes of text, made of ids."""
    rows: list[dict[str, Any]] = []
    for number, batch in enumerate(batches):
        if algorithm == "grpo":  # its sampler repeats each prompt; what it is about is looked up by batch
            rows += [{"prompt": f"{number}.{place}", "batch": number} for place in range(len(batch))]
        elif algorithm == "kto":
            order = [(group, side) for side in (0, 1) for group in batch]
            answers = [group.completions[side] for group, side in order]
            rows += [
                {
                    "prompt_ids": list(group.prompt),
                    "completion_ids": list(answers[place]),
                    "KL_completion_ids": list(answers[(place + 1) % len(answers)]),
                    "label": group.rewards[side] > 0.5,
                }
                for place, (group, side) in enumerate(order)
            ]
        else:
            for group in batch:
                chosen, rejected = (list(completion) for completion in group.completions)
                prompt = list(group.prompt)
                if algorithm == "dpo":
                    rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
                else:
                    rows.append({"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected})
    return rows


def _batch_rows(algorithm: str, batches: Sequence[Sequence[Group]]) -> int:
    """What TRL counts a batch in: pairs, or rows."""
    if algorithm in ("dpo", "reward"):
        return len(batches[0])
    return sum(len(group.completions) for group in batches[0])


def _generated(trainer: Any, batch: Sequence[Group], padding: int) -> dict[str, torch.Tensor]:
    """What GRPOTrainer makes of a batch's samples: prompts padded on the left, completions on the right."""
    from trl.trainer.utils import pad

    rows = [
        (group, completion, reward)
        for group in batch
        for completion, reward in zip(group.completions, group.rewards, strict=True)
    ]
    prompts = [torch.tensor(group.prompt) for group, _, _ in rows]
    answers = [torch.tensor(completion) for _, completion, _ in rows]
    rewards = torch.tensor([reward for _, _, reward in rows]).view(len(batch), -1)
    # scale_rewards="group", TRL's default: the sample standard deviation, and 1e-4 added to it.
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    given = {
        "prompt_ids": pad(prompts, padding_value=padding, padding_side="left"),
        "prompt_mask": pad([torch.ones_like(ids) for ids in prompts], padding_value=0, padding_side="left"),
        "completion_ids": pad(answers, padding_value=padding, padding_side="right"),
        "completion_mask": pad([torch.ones_like(ids) for ids in answers], padding_value=0),
        "advantages": advantages.flatten(),
    }
    given["num_items_in_batch"] = given["completion_mask"].sum()
    with torch.no_grad():
        given["old_per_token_logps"], _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([given["prompt_ids"], given["completion_ids"]], dim=1),
            torch.cat([given["prompt_mask"], given["completion_mask"]], dim=1),
            given["completion_ids"].shape[1],
            batch_size=2,
        )
    return given


def _same_start(model: Any, prepared: Prepared, training: Training) -> None:
    """Give the parts that TRL draws at random (reward head, adapter) the weights that both sides begin with,
    and let every embedding learn."""
    from safetensors.torch import load_file

    model.get_input_embeddings().padding_idx = None

    if training.lora:
        import peft

        adapter = load_file(prepared.adapter / "adapter_model.safetensors")
        if training.algorithm == "reward":
            adapter["base_model.model.score.weight"] = prepared.score()[None]
        peft.set_peft_model_state_dict(model, adapter)
    if training.algorithm == "reward":
        score = prepared.score()
        for name, parameter in model.named_parameters():
            if "score" in name:
                with torch.no_grad():
                    parameter.copy_(score[None])


def _padding_token(tokenizer: Any, batches: Sequence[Sequence[Group]]) -> str:
    """A control token that occurs in no row."""
    used = {
        token
        for batch in batches
        for group in batch
        for ids in (group.prompt, *group.completions)
        for token in ids
    }
    for number in sorted(tokenizer.added_tokens_decoder):
        if number not in used:
            return str(tokenizer.added_tokens_decoder[number])
    raise BadInputError("Every control token of the tokenizer occurs in the data; none is left for padding.")


def _longest(group: Group) -> int:
    return len(group.prompt) + max(len(completion) for completion in group.completions)


def _never_called(*_: Any, **__: Any) -> list[float]:
    raise AssertionError("rewards are given; TRL should not have asked for any")


@contextmanager
def _quiet() -> Iterator[None]:
    """No hub, no usage reports, no notes on stdout."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    yield


def _check_version() -> None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("trl")
    except PackageNotFoundError as error:
        raise MissingError(
            "TRL is not installed, so there is nothing to compare with.",
            advice="pip install -e '.[bench]' -c constraints.txt",
        ) from error
    if found != VERSION:
        raise BadInputError(
            f"TRL {found} is installed; the comparison is with {VERSION}.",
            advice=f"pip install trl=={VERSION}",
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of ``python -m bench.rival``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser)
    parser.add_argument("--setting", choices=tuple(SETTINGS), default="default")
    options = parser.parse_args(arguments)
    setting = change(SETTINGS[options.setting][options.algorithm], options.set)
    name = options.setting if not options.set else f"{options.setting} {' '.join(options.set)}"
    with prepared_for(options) as prepared:
        found = measure(prepared, as_training(options), setting, name=name)
    report(found, as_json=options.json)


if __name__ == "__main__":
    main()
