"""Mistakes that training code makes in silence, each made on purpose, and what must say so.

``python tests/faults/catalogue.py`` prints the table of docs/guides/faults.md.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from corrigible.align import (
    ALGORITHMS,
    Algorithm,
    Asked,
    GroupSource,
    PairSource,
    ScoredExamples,
    TrainConfig,
    Trainer,
    UnpairedSource,
    reference_cache,
    reference_logprobs,
)
from corrigible.align import trainer as trainer_module
from corrigible.align.attribution import trace_episode, trace_generation
from corrigible.align.checkpoint import load_latest, save_checkpoint
from corrigible.align.reference import reference_weights
from corrigible.models import Generation, LanguagePolicy, Renderer, TokenKind, generate, load_policy
from corrigible.models.rollout import RolloutEngine
from corrigible.models.scoring import Scorer
from corrigible.records import Episode, FinishReason, Message, Sampling, Step
from corrigible.rewards.signals import Scores
from corrigible.store import Pair, labelled_from_pairs

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord"]
PROMPTS = [[{"role": "user", "content": f"Say {word}."}] for word in WORDS[:4]]
SHORT = Sampling(max_tokens=8)
DPO = ALGORITHMS["dpo"]

Inject = Callable[[Path, pytest.MonkeyPatch], object]


@dataclass(frozen=True)
class Fault:
    """A mistake.

    Attributes:
        name: what it is.
        harm: what it would do if nobody said anything.
        says: the named alert, or what the error says.
        inject: makes the mistake, in an empty folder, and goes on for at most three steps.
    """

    name: str
    harm: str
    says: str
    inject: Inject


FAULTS: list[Fault] = []


def fault(name: str, harm: str, says: str) -> Callable[[Inject], Inject]:
    """Add the decorated function to the catalogue."""

    def add(inject: Inject) -> Inject:
        FAULTS.append(Fault(name, harm, says, inject))
        return inject

    return add


def table() -> str:
    """The catalogue as Markdown."""
    rows = [f"| {each.name} | {each.harm} | `{each.says}` |" for each in FAULTS]
    return "\n".join(["| the mistake | what it would do | what says so |", "|---|---|---|", *rows]) + "\n"


# -- parts ----------------------------------------------------------------------------------------


def policy_of(*, lora: bool = True, dtype: str = "float32", acts: float = 0.0) -> LanguagePolicy:
    """tiny-random; ``acts`` gives its adapter an effect."""
    policy = load_policy("tiny-random", dtype=dtype, device="cpu")
    if lora:
        policy.add_lora(rank=4, alpha=8)
    disturb(policy, acts)
    return policy


def disturb(policy: LanguagePolicy, scale: float) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def pair(number: int, **changes: Any) -> Pair:
    word = WORDS[number % len(WORDS)]
    fields: dict[str, Any] = {
        "prompt": (Message(role="user", content=f"{number} {word}"),),
        "chosen": (Message(role="assistant", content=f"yes {word}"),),
        "rejected": (Message(role="assistant", content=f"no {word[:3]}"),),
        "p_chosen": 1.0,
        "weight": 1.0,
        "group": f"g{number}",
        "annotators": ("ada",),
        "derived_from": (f"f{number}",),
        "criterion": "overall",
        "chosen_ref": f"c{number}",
        "rejected_ref": f"r{number}",
        "prompt_ref": f"p{number}",
    }
    return Pair(**(fields | changes))


def pairs_for(policy: LanguagePolicy, count: int = 6, seed: int = 0) -> PairSource:
    return PairSource([pair(i) for i in range(count)], policy.renderer, max_length=128, seed=seed)


def answers_of(policy: LanguagePolicy, sampling: Sampling = SHORT, seed: int = 0) -> list[list[Generation]]:
    return generate(policy, PROMPTS, n=3, sampling=sampling, seed=seed)


def judged(
    answers: Sequence[Sequence[Generation]], sampling: Sampling | None = None, asked: Asked | None = None
) -> GroupSource:
    scores = [Scores(np.arange(len(group), dtype=float)) for group in answers]
    return GroupSource(answers, scores, sampling=sampling, asked=asked)


def trainer_of(
    policy: LanguagePolicy, folder: Path, source: Any = None, algorithm: Algorithm = DPO, **settings: Any
) -> Trainer:
    more = {name: settings.pop(name) for name in ("reference_policy",) if name in settings}
    config = TrainConfig.model_validate({"steps": 3, "batch_size": 4, "lr": 1e-3} | settings)
    return Trainer(policy, algorithm, source or pairs_for(policy), config, out=folder, **more)


def grpo(policy: LanguagePolicy, folder: Path, source: GroupSource, **settings: Any) -> Trainer:
    return trainer_of(policy, folder, source, ALGORITHMS["grpo"], **settings)


def every_answer(
    answers: Sequence[Sequence[Generation]], change: Callable[[Generation], Generation]
) -> list[list[Generation]]:
    return [[change(answer) for answer in group] for group in answers]


def with_kinds(source: PairSource, change: Callable[[int, TokenKind, int], TokenKind]) -> PairSource:
    """The source with other kinds of tokens: ``change(place, kind, id)``."""
    source.examples = [
        dataclasses.replace(
            example,
            rows=tuple(
                dataclasses.replace(
                    row,
                    kinds=tuple(
                        change(i, *both) for i, both in enumerate(zip(row.kinds, row.ids, strict=True))
                    ),
                )
                for row in example.rows
            ),
        )
        for example in source.examples
    ]
    return source


# -- rollouts from other weights ------------------------------------------------------------------


@fault("stale adapter", "answers come from the weights of an earlier step", "behaviour_mismatch")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    answers = answers_of(policy)
    disturb(policy, 0.1)
    grpo(policy, folder, judged(answers)).train()


@fault("missing adapter", "answers come from the base model", "behaviour_mismatch")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of(acts=0.1)
    with policy.adapter_disabled():
        answers = answers_of(policy)
    grpo(policy, folder, judged(answers)).train()


@fault(
    "gate adapter in the slot of up", "answers come from weights that nobody trained", "behaviour_mismatch"
)
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of(acts=0.1)
    wrong = copy.deepcopy(policy)
    parameters = dict(wrong.model.named_parameters())
    with torch.no_grad():
        for name, gate in parameters.items():
            if "gate_proj.lora_" in name:
                up = parameters[name.replace("gate_proj", "up_proj")]
                kept = gate.clone()
                gate.copy_(up)
                up.copy_(kept)
    grpo(policy, folder, judged(answers_of(wrong))).train()


@fault("engine that goes on with old weights", "every answer is from another policy", "stale_weights")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    engine = RolloutEngine(policy)
    meant = policy_of(acts=0.1).weights_sha256()
    engine.sync(meant)


@fault("temperature on one side", "the ratio compares two distributions", "temperature_mismatch")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy, sampling = policy_of(), Sampling(max_tokens=8, temperature=0.7)
    grpo(policy, folder, judged(answers_of(policy, sampling), sampling)).train()


@fault(
    "temperature in the recorded log-probs alone",
    "the ratio is biased towards likely tokens",
    "behaviour_mismatch",
)
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    answers = answers_of(policy, Sampling(max_tokens=8, temperature=0.7))
    grpo(policy, folder, judged(every_answer(answers, drawn_for_plain))).train()


def drawn_for_plain(answer: Generation) -> Generation:
    return dataclasses.replace(answer, logprobs=answer.sampling_logprobs)


@fault("top-p on one side", "what the filter cut is never learnt about", "sampling_filtered")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy, sampling = policy_of(), Sampling(max_tokens=8, top_p=0.8)
    grpo(policy, folder, judged(answers_of(policy, sampling), sampling)).train()


@fault("top-p in the recorded log-probs alone", "every ratio is too small", "behaviour_mismatch")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    answers = answers_of(policy, Sampling(max_tokens=8, top_p=0.8))
    grpo(policy, folder, judged(every_answer(answers, drawn_for_plain))).train()


@fault(
    "answers tokenised again", "log-probs belong to other tokens than those trained on", "behaviour_mismatch"
)
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of()

    def again(answer: Generation) -> Generation:
        return dataclasses.replace(answer, ids=tuple(3 + (i + 7) % 250 for i in answer.ids))

    grpo(policy, folder, judged(every_answer(answers_of(policy), again))).train()


@fault("log-probs of another number of tokens", "ratios are shifted along the answer", "behaviour_shape")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of()

    def shorter(answer: Generation) -> Generation:
        return dataclasses.replace(answer, logprobs=answer.logprobs[1:])

    grpo(policy, folder, judged(every_answer(answers_of(policy), shorter))).train()


@fault("conversation rendered again between turns", "a later turn continues other tokens", "retokenised")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    steps = [
        Step(
            observation=(Message(role="user", content="On"),),
            action=Message(role="assistant", content="x"),
            token_ids=(50, 60),
            prompt_token_ids=prompt,
            logprobs=(-1.0, -1.0),
        )
        for prompt in ((10, 11), (10, 11, 50, 61, 12))
    ]
    trace_episode(Episode(task="t", policy="v1", sampling=Sampling(), steps=tuple(steps)))


@fault("prompt that generation skipped", "whoever sits there is never learnt from", "prompt_skipped")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    answers = answers_of(policy)
    judged(answers[:-1], asked=Asked([group[0].prompt_ids for group in answers], n=3))


@fault(
    "answers to another rendering of the prompt",
    "training sees another prompt than sampling",
    "prompt_mismatch",
)
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    answers = answers_of(policy)
    judged(answers, asked=Asked([(1, *group[0].prompt_ids) for group in answers], n=3))


@fault("cut answer trained on as finished", "the policy learns to stop where it was cut", "finish_reason")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    answers = answers_of(policy, Sampling(max_tokens=2))
    lying = every_answer(answers, lambda a: dataclasses.replace(a, finish_reason=FinishReason.stop))
    judged(lying, asked=Asked([g[0].prompt_ids for g in answers], n=3, end_ids=policy.end_ids))


@fault("behaviour log-prob made up", "an unknown counts as known", "behaviour_not_finite")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    [[answer, *_], *_] = answers_of(policy_of())
    trace_generation(dataclasses.replace(answer, logprobs=(float("nan"),) * len(answer.ids)))


# -- weights, adapters, checkpoints ---------------------------------------------------------------


def rewrite_adapter(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> Path:
    from safetensors.torch import load_file, save_file

    saved = policy_of(acts=0.1).save_adapter(folder / "adapter")
    file = saved / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return saved


@fault("query adapter in the slot of key", "an adapter of other layers acts", "does not fit tiny-random")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    swap = {"q_proj": "k_proj", "k_proj": "q_proj"}

    def renamed(name: str) -> str:
        return next((name.replace(old, new) for old, new in swap.items() if old in name), name)

    load_policy(rewrite_adapter(folder, lambda t: {renamed(name): value for name, value in t.items()}))


@fault("adapter of which half is there", "half of the training is lost", "adapter_incomplete")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    load_policy(rewrite_adapter(folder, lambda t: dict(itertools.islice(sorted(t.items()), len(t) // 2))))


@fault("model of which half is there", "layers are random numbers", "weights_incomplete")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    saved = policy_of(lora=False).save_full(folder / "model")
    file = saved / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if ".layers.1." not in name}
    save_file(kept, file, metadata={"format": "pt"})
    load_policy(saved)


@fault("adapter that is disabled while training", "nothing is trained, the loss looks alive", "gradient_zero")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    trainer = trainer_of(policy, folder)
    with policy.adapter_disabled():
        trainer.train()


@fault("nothing to train", "the run ends where it began", "nothing_trainable")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    policy.model.requires_grad_(False)
    trainer_of(policy, folder)


@fault(
    "optimiser with an older copy of the weights",
    "loaded weights are undone by the first step",
    "stale_masters",
)
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of(lora=False, dtype="bfloat16")
    trainer = trainer_of(policy, folder, master_weights="float32")
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.5)
    trainer.train()


@fault(
    "adapter attached behind the optimiser", "the optimiser moves weights that nobody uses", "stale_masters"
)
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of(lora=False)
    trainer = trainer_of(policy, folder)
    policy.add_lora(rank=4)
    policy.model.requires_grad_(True)
    trainer.train()


@fault("NaN in the weights", "every number is NaN, later", "The log-probabilities of row 0 are not finite")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    with torch.no_grad():
        next(policy.model.parameters()).fill_(float("nan"))
    trainer_of(policy, folder).train()


def killed(policy: LanguagePolicy, folder: Path, **settings: Any) -> None:
    """A run of three steps that came to its second one."""
    trainer_of(policy, folder, checkpoint_every=1, **settings).train()
    shutil.rmtree(sorted((folder / "checkpoints").iterdir())[-1])


def no_room(patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    def full(*given: Any, **options: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    patch.setattr(owner, name, full)


@fault("no memory for a pass", "a traceback of an allocator, and no word of what to change", "out_of_memory")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    no_room(patch, Scorer, "__call__")
    trainer_of(policy_of(), folder).train()


@fault("no memory for the weights", "the file counts as damaged", "out_of_memory")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    saved = policy_of(lora=False).save_full(folder / "model")
    no_room(patch, AutoModelForCausalLM, "from_pretrained")
    load_policy(saved)


@fault("adapter that is not LoRA", "what it learnt is left out in silence", "adapters are LoRA here")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    import peft

    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(policy_of(lora=False).model, settings).save_pretrained(folder)
    load_policy("tiny-random", adapter=folder)


@fault("checkpoint of another model", "training goes on from weights that do not fit", "resume_mismatch")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    killed(policy_of(), folder)
    other = load_policy("tiny-random", device="cpu", dtype="float32")
    other.add_lora(rank=2)
    trainer_of(other, folder).train(resume=True)


@fault("checkpoint that was written by half", "training goes on from half of the weights", "Every checkpoint")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    killed(policy_of(), folder)
    for file in folder.rglob("tensors.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    trainer_of(policy_of(), folder).train(resume=True)


@fault("checkpoint without one of the weights", "one layer starts again", "checkpoint_incomplete")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    killed(policy_of(), folder)
    whole = load_latest(folder / "checkpoints")
    assert whole is not None
    name = next(name for name in whole.tensors if name.startswith("weight."))
    shutil.rmtree(folder / "checkpoints")
    save_checkpoint(
        folder / "checkpoints", whole.step, {n: t for n, t in whole.tensors.items() if n != name}, whole.state
    )
    trainer_of(policy_of(), folder).train(resume=True)


@fault("resumed with other data", "the run is neither the one nor the other", "resume_mismatch")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    killed(policy_of(), folder)
    policy = policy_of()
    trainer_of(policy, folder, pairs_for(policy, 5)).train(resume=True)


@fault("resumed with another seed", "examples are repeated and left out", "resume_mismatch")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    killed(policy_of(), folder)
    policy = policy_of()
    trainer_of(policy, folder, pairs_for(policy, seed=1)).train(resume=True)


@fault("resumed with other threads", "the result is no longer bit for bit the same", "threads_changed")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    killed(policy_of(), folder)
    before = torch.get_num_threads()
    patch.setattr(torch, "get_num_threads", lambda: before + 1)
    trainer_of(policy_of(), folder).train(resume=True)


# -- masks, tokens, templates ---------------------------------------------------------------------


@fault("mask of ones", "the policy learns to write the user's turns", "mask_of_ones")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    ones = with_kinds(pairs_for(policy), lambda i, kind, _: TokenKind.NOT_SAMPLED if i else TokenKind.PROMPT)
    trainer_of(policy, folder, ones).train()


@fault("everything masked", "the loss is 0 and nothing is learnt", "nothing_scored")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    trainer_of(policy, folder, with_kinds(pairs_for(policy), lambda *_: TokenKind.PROMPT)).train()


@fault("pad = eos, and padding told by its id", "the policy never learns to stop", "end_of_turn_unscored")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    pad = policy.tokenizer.pad_token_id
    masked = with_kinds(pairs_for(policy), lambda _, kind, id: TokenKind.SPECIAL if id == pad else kind)
    trainer_of(policy, folder, masked).train()


FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + "
    "(m.content if loop.last or m.role != 'assistant' else m.content.split('</think>')[-1]) "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DROPPING = (
    "{% for m in messages[-2:] %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THOUGHT = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "<think>hm</think>Yes."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "No."},
]


@fault(
    "template that is not prefix-stable",
    "earlier turns are trained on with other tokens",
    "The chat template writes",
)
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    Renderer(policy_of(lora=False).tokenizer, FORGETFUL).conversation(THOUGHT)


@fault(
    "template that drops turns", "answers are trained on without what they answer", "The chat template writes"
)
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    Renderer(policy_of(lora=False).tokenizer, DROPPING).conversation(THOUGHT)


@fault(
    "reference with another vocabulary", "log-probs of different tokens are compared", "vocabulary_mismatch"
)
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy, other = policy_of(), policy_of()
    other.tokenizer.add_tokens(["<|another|>"])
    trainer_of(policy, folder, reference_policy=other)


@fault("token id outside the vocabulary", "a crash on a GPU, any embedding elsewhere", "vocabulary_mismatch")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    source = pairs_for(policy)
    first = source.examples[0]
    row = dataclasses.replace(first.rows[0], ids=(*first.rows[0].ids[:-1], 5000))
    source.examples[0] = dataclasses.replace(first, rows=(row, first.rows[1]))
    trainer_of(policy, folder, source)


@fault("row longer than the context", "positions that the model never saw", "context_overflow")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    policy.network.config.max_position_embeddings = 20
    trainer_of(policy, folder)


# -- data -----------------------------------------------------------------------------------------


def one_pair(**changes: Any) -> PairSource:
    return PairSource([pair(0, **changes)], policy_of(lora=False).renderer)


@fault("empty answer", "its log-prob is 0: certain, and therefore good", "empty_completion")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    one_pair(chosen=(Message(role="assistant", content=""),))


@fault("two equal sides", "a pair that says nothing dilutes the batch", "equal_sides")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    one_pair(
        chosen=(Message(role="assistant", content="x"),), rejected=(Message(role="assistant", content="x"),)
    )


@fault("sides with different prompts", "answers to different questions are compared", "prompts_differ")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of(lora=False)
    episode = Episode(
        id="e",
        task="t",
        policy="v1",
        sampling=Sampling(),
        steps=(
            Step(
                observation=(Message(role="user", content="another"),),
                action=Message(role="assistant", content="yes"),
                token_ids=(50, 60),
                prompt_token_ids=policy.renderer.prompt(PROMPTS[0]).ids,
                logprobs=(-1.0, -1.0),
            ),
        ),
    )
    PairSource([pair(0, chosen_episode="e")], policy.renderer, episodes={"e": episode})


@fault("label outside [0, 1]", "the gradient has no bound", "bad_label")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    one_pair(p_chosen=1.5)


@fault("weight 0", "an example is there and counts for nothing", "bad_weight")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    one_pair(weight=0.0)


@fault("all weights 0", "0 divided by 0", "nothing_to_average")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    source = pairs_for(policy)
    source.examples = [dataclasses.replace(example, weight=0.0) for example in source.examples]
    trainer_of(policy, folder, source).train()


@fault("the same example twice", "it counts twice, and leaks into held-out data", "duplicate_examples")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    source = PairSource([pair(0), pair(1), pair(0)], policy.renderer)
    trainer_of(policy, folder, source).train()


@fault("KTO batch of one prompt", "its reference point is an item paired with itself", "mismatch_impossible")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    source = UnpairedSource(labelled_from_pairs([pair(i) for i in range(3)]), policy.renderer)
    trainer_of(policy, folder, source, ALGORITHMS["kto"], batch_size=1).train()


# -- rewards --------------------------------------------------------------------------------------


@fault("reward that is NaN", "the whole group's advantages are NaN", "value 1 is NaN")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    Scores(np.array([0.0, float("nan")]))


@fault("failed judge counted as 0", "whom the judge cannot read is punished", "groups_skipped")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    answers = answers_of(policy)
    scores = [Scores(np.array([0.0, 1.0, 2.0]), ("timed out", None, None)) for _ in answers]
    source = GroupSource(answers, scores)
    for example in source.examples:
        assert len(example.rows) == 2 and example.rewards == (1.0, 2.0)
    grpo(policy, folder, source).train()


@fault("rewards that are all the same", "a step without a gradient", "There is no group to train on")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    answers = answers_of(policy_of())
    GroupSource(answers, [Scores(np.ones(3)) for _ in answers])


# -- the reference --------------------------------------------------------------------------------


@fault(
    "reference with the adapter on", "the policy is held near itself, or not at all", "reference_with_adapter"
)
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of(acts=0.1)
    patch.setattr(LanguagePolicy, "adapter_disabled", lambda self: nullcontext())
    trainer_of(policy, folder, reference="base").train()


@fault("reference of other weights", "the policy is held near somebody else", "reference_mismatch")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    other = policy_of(acts=0.1)
    patch.setattr(
        trainer_module,
        "reference_logprobs",
        lambda _, *given, **more: reference_logprobs(other, *given, **more),
    )
    trainer_of(policy_of(), folder).train()


@fault("reference cache of other tokens", "every log-ratio is noise", "reference_mismatch")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    source = pairs_for(policy)
    cache = folder / "reference.safetensors"
    right = reference_logprobs(policy, source.examples, cache=cache)
    weights = reference_weights(policy, "start")
    # Even the sums are right: only token by token it is another row's.
    reference_cache.write(cache, weights, {key: values.flip(0) for key, values in right.items()}, "")
    trainer_of(policy, folder, source).train()


# -- the arithmetic of a step ---------------------------------------------------------------------


def objective_of(change: Callable[[Any, Any], Any]) -> Algorithm:
    """DPO with something done to its output: ``change(output, batch)``."""

    def changed(batch: Any, config: Any) -> Any:
        return change(DPO.objective(batch, config), batch)

    return dataclasses.replace(DPO, objective=changed)


@fault("log-probs with the wrong sign", "the worst answers count as the best", "logps_positive")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    plain = Scorer.__call__
    patch.setattr(Scorer, "__call__", lambda self, *g, **m: [-values for values in plain(self, *g, **m)])
    trainer_of(policy_of(), folder).train()


@fault("loss that is NaN", "all weights are NaN after the step", "loss_not_finite")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    broken = objective_of(lambda out, _: dataclasses.replace(out, loss=out.loss * float("nan")))
    trainer_of(policy_of(), folder, algorithm=broken).train()


@fault(
    "gradient that is NaN under a finite loss", "all weights are NaN after the step", "gradient_not_finite"
)
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    broken = objective_of(
        lambda out, _: dataclasses.replace(out, loss=out.loss + (out.loss - out.loss.detach()).abs().sqrt())
    )
    trainer_of(policy_of(), folder, algorithm=broken).train()


@fault("loss that is cut off from the weights", "hours of steps that do nothing", "gradient_zero")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    nothing = objective_of(lambda out, _: dataclasses.replace(out, loss=out.loss * 0.0))
    trainer_of(policy_of(), folder, algorithm=nothing).train()


@fault("denominator times the number of parts", "the gradient shrinks with memory", "gradient_depends_on_cut")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    def scaled(parts: Any, policy: Any, reference: Any, denominator: float, whole: Any = None) -> Any:
        return ScoredExamples(parts, policy, reference, 2 * denominator, whole)

    patch.setattr(trainer_module, "ScoredExamples", scaled)
    trainer_of(policy_of(), folder, micro_batch_tokens=100).train()


@fault("each part divided by its own weight", "examples of small parts weigh more", "gradient_depends_on_cut")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    def own(batch: Any, config: Any) -> Any:
        weight = sum(example.weight for example in batch.examples)
        return DPO.objective(dataclasses.replace(batch, denominator=weight), config)

    algorithm = dataclasses.replace(DPO, objective=own)
    trainer_of(policy_of(), folder, algorithm=algorithm, micro_batch_tokens=100).train()


@fault(
    "only the last part has a backward pass",
    "most of the batch is not learnt from",
    "gradient_depends_on_cut",
)
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def first_alone(batch: Any, config: Any) -> Any:
        seen.append(1)
        output = DPO.objective(batch, config)
        return output if len(seen) != 1 else dataclasses.replace(output, loss=output.loss * 0.0)

    algorithm = dataclasses.replace(DPO, objective=first_alone)
    trainer_of(policy_of(), folder, algorithm=algorithm, micro_batch_tokens=100).train()


@fault("optimiser that does not step", "hours of steps that do nothing", "weights_unchanged")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(policy_of(), folder)
    patch.setattr(trainer.optimiser, "step", lambda *rate, **scale: None)
    trainer.train()


@fault(
    "learning rate below the weights' precision", "hours of steps that round to nothing", "weights_unchanged"
)
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    trainer_of(policy_of(lora=False), folder, lr=1e-14).train()


@fault("settings of another algorithm", "defaults are used instead", "dpo takes DPOConfig")
def _(folder: Path, patch: pytest.MonkeyPatch) -> None:
    policy = policy_of()
    wrong = ALGORITHMS["kto"].config()
    Trainer(policy, DPO, pairs_for(policy), TrainConfig(), algorithm_config=wrong, out=folder)


if __name__ == "__main__":
    print(table(), end="")
