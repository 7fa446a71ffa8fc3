"""Log-probabilities under the frozen reference: computed once, before the first step, and kept.

No second copy of the model is ever in memory. The reference is the policy as it stands before
training (``"start"``), or the model below its adapter (``"base"``), or another policy that is only
needed here. Because the pass is over before the first step, a reference with the trained adapter
left on is not a mistake that can be made later.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from corrigible.align.config import ReferenceMode
from corrigible.align.distributed import World
from corrigible.align.passes import passes
from corrigible.align.reference_cache import ReferenceLogprobs, pass_digest, read, take_over, write
from corrigible.align.sources import Example, PairExample, row_key
from corrigible.errors import BadInputError, NumericsError
from corrigible.events import Alert, Message, Progress, emit
from corrigible.models import LanguagePolicy, Rendered
from corrigible.models.scoring import Scorer


def reference_weights(policy: LanguagePolicy, mode: ReferenceMode) -> str:
    """Sha256 of the weights that the reference pass of ``mode`` uses."""
    return policy.weights_sha256("base" if _without_adapter(policy, mode) else "all")


def _without_adapter(policy: LanguagePolicy, mode: ReferenceMode) -> bool:
    if not policy.has_adapter or mode == "base":
        return True
    # A fresh adapter's second factor is zero: the policy with it is the base model, bit for bit.
    second = [p for name, p in policy.model.named_parameters() if ".lora_B." in name]
    return bool(second) and not any(bool(p.detach().any()) for p in second)


def reference_logprobs(
    policy: LanguagePolicy,
    examples: Iterable[Example],
    *,
    mode: ReferenceMode = "start",
    micro_batch_tokens: int = 4096,
    cache: Path | None = None,
    reuse: bool = False,
    behaviour_weights: Mapping[str, str] | None = None,
    share_prompts: bool = True,
    temperature: float = 1.0,
    check_stop: Callable[[], None] = lambda: None,
    world: World | None = None,
) -> ReferenceLogprobs:
    """Log-probs of every row of ``examples`` under the reference, each distinct row once.

    Args:
        policy: the policy before training.
        examples: whose rows to score.
        mode: ``"start"`` scores with the policy as it is, a starting adapter included; ``"base"``
            with its adapter disabled.
        micro_batch_tokens: most tokens in one forward pass, padding included.
        cache: file to keep the result in; only used again for the same weights and rows.
        reuse: take over the same pass of an earlier run (:mod:`corrigible.align.reference_cache`).
        behaviour_weights: sha256 of the weights of policy versions, by id. A row sampled in float32 by
            a version whose weights are exactly the reference's takes its recorded log-probs.
        share_prompts: compute a prompt once for all its responses, where the model allows it.
        temperature: of the distribution that the log-probs belong to.
        check_stop: called between forward passes; may raise. What is done by then is kept in ``cache``.
        world: the processes that share the work; each gets all of it. Alone when absent.

    Raises:
        NumericsError: the reference gives NaN or infinite log-probs.
        StorageError: the cache cannot be written.
    """
    world = world or World()
    examples = list(examples)
    rows = {row_key(row): row for example in examples for row in example.rows}
    weights = reference_weights(policy, mode)
    # Log-probs are recorded at temperature 1, and token by token: in float32 that is the same, but in
    # bfloat16 a row may be tenths of a nat away from what training will compute for it.
    exact = temperature == 1.0 and policy.dtype in (torch.float32, torch.float64)
    known = _recorded(examples, weights, behaviour_weights or {}) if exact else {}
    recorded = len(known)
    if temperature != 1.0:
        weights = f"{weights} at temperature {temperature!r}"
    todo = {key: row for key, row in rows.items() if key not in known}
    if cache is not None:
        known |= read(cache, weights)

    world.check_same({"reference": weights})

    without = policy.has_adapter and _without_adapter(policy, mode)
    disabled = policy.adapter_disabled() if without else nullcontext()
    policy.model.eval()
    mine: ReferenceLogprobs = {}
    digest = ""
    try:
        with torch.inference_mode(), disabled, world.together():
            score = Scorer(policy, share=share_prompts)
            digest = pass_digest(score, weights, todo, micro_batch_tokens)
            if reuse and not todo.keys() <= known.keys():
                known |= take_over(digest, weights)
            groups = _by_prompt(todo, score, micro_batch_tokens)
            rows_of = [[todo[key] for key in group] for group in groups]
            size = {number: score.size(rows) for number, rows in enumerate(rows_of)}
            batches = passes(score, rows_of, micro_batch_tokens)
            batches = world.share(batches, lambda batch: sum(size[i] for i in batch))
            total = sum(len(groups[i]) for batch in batches for i in batch)
            for batch in world.in_step(batches):
                keys = [key for i in batch for key in groups[i]]
                # Whole batches are skipped or computed: a resumed pass has the same bits as an
                # uninterrupted one only if its batches are the same.
                if not all(key in known for key in keys):
                    check_stop()
                    scores = score([rows_of[i] for i in batch], temperature=temperature)
                    for key, values in zip(keys, scores, strict=True):
                        known[key] = values.detach().to("cpu", torch.float32)
                mine |= {key: known[key] for key in keys}
                emit(Progress(task="reference log-probs", done=len(mine), total=total, unit="row"))
    finally:
        known |= world.merge(mine)
        if cache is not None and todo and world.leads:
            write(cache, weights, {key: known[key] for key in todo if key in known}, digest)
    if recorded:
        emit(Message(text=f"{recorded} of {len(rows)} reference log-probs were recorded at sampling."))
    _check(rows, known)
    return {key: known[key] for key in rows}


def prompt_of(row: Rendered) -> tuple[Hashable, ...]:
    """Every token before the first scored one: rows that have it in common are scored together."""
    return row.ids[: row.scored[0]]


def _by_prompt(rows: Mapping[bytes, Rendered], score: Scorer, token_budget: int) -> list[list[bytes]]:
    """Rows to score together: all responses to one prompt, as many as a forward pass holds."""
    if not score.share:
        return [[key] for key in rows]
    open_groups: dict[tuple[Hashable, ...], list[bytes]] = {}
    groups: list[list[bytes]] = []
    for key, row in rows.items():
        group = open_groups.get(prompt_of(row))
        if group is None or score.size([*(rows[k] for k in group), row]) > token_budget:
            group = open_groups[prompt_of(row)] = []
            groups.append(group)
        group.append(key)
    return groups


def _recorded(
    examples: Sequence[Example], weights: str, behaviour_weights: Mapping[str, str]
) -> ReferenceLogprobs:
    found: ReferenceLogprobs = {}
    for example in examples:
        if not isinstance(example, PairExample):
            continue
        for row, behaviour in zip(example.rows, example.behaviour, strict=True):
            if behaviour is not None and behaviour_weights.get(behaviour.policy) == weights:
                found[row_key(row)] = torch.tensor(behaviour.logprobs, dtype=torch.float32)
    return found


def _check(rows: Mapping[bytes, Rendered], known: ReferenceLogprobs) -> None:
    for key, row in rows.items():
        scores = known[key]
        if len(scores) != len(row.scored):
            raise BadInputError(
                f"reference_shape: {len(scores)} log-probs for {len(row.scored)} scored tokens.",
                advice="The recorded log-probs or the cache belong to other tokens; remove the cache file.",
            )
        if not bool(torch.isfinite(scores).all()):
            emit(Alert(name="reference_not_finite", message="The reference gives NaN or infinite log-probs."))
            raise NumericsError(
                "reference_not_finite: the reference gives NaN or infinite log-probs.",
                advice="Its weights are damaged, or a token of the data is impossible under it.",
            )
