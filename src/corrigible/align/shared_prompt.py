"""Log-probs of several responses to one prompt with the prompt computed once.

A group (the two sides of a pair, k answers) is laid out as one row, *prompt, response 1, response
2, ...*: positions restart after the prompt for every response, and a mask lets a response see the
prompt and itself only. The numbers are those of separate rows up to rounding, which a test holds
it to; a model on which they are not (sliding windows, an attention without masks) is noticed by
:func:`can_share` and takes the plain path.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from corrigible.events import Message, emit
from corrigible.models import LanguagePolicy, Rendered, token_logprobs

LOGITS_BYTES = 128 << 20
"""How much memory logits may take at a time."""

UNSPLIT = 1 << 40
"""The token budget of batches that were cut already."""

Group = Sequence[Rendered]


class RowScorer:
    """Log-probs of the rows of examples, by the fastest path that is right for a policy.

    Args:
        policy: the model; asked once whether it :func:`can_share`.
        share: whether to compute a prompt once for all consecutive rows that begin with it.
    """

    def __init__(self, policy: LanguagePolicy, *, share: bool = True) -> None:
        self.policy = policy
        self.share = share and can_share(policy)

    def size(self, rows: Group) -> int:
        """Tokens that one example's rows take in a forward pass, padding among them included."""
        if not self.share:
            return len(rows) * max(row.scored[-1] for row in rows)
        groups = _groups(rows)
        return len(groups) * max(group_size(group) for group in groups)

    def __call__(self, examples: Sequence[Group], *, grad: bool = False) -> list[Tensor]:
        """One float32 tensor ``(scored tokens,)`` for each row of each example, in one forward pass."""
        if self.share:
            groups = [group for rows in examples for group in _groups(rows)]
            return group_logprobs(self.policy, groups, grad=grad)
        every = [row for rows in examples for row in rows]
        return token_logprobs(self.policy, every, grad=grad, token_budget=UNSPLIT)


def _groups(rows: Group) -> list[Group]:
    return [list(group) for _, group in groupby(rows, key=prompt_of)]


def prompt_of(row: Rendered) -> tuple[Hashable, ...]:
    """What rows must have in common to be a group: every token before the first scored one."""
    return row.ids[: row.scored[0]]


def group_size(group: Group) -> int:
    """Tokens of a group's one row: the prompt once, and of each response all but its last token."""
    prompt = group[0].scored[0]
    return prompt + sum(row.scored[-1] - prompt for row in group)


def group_logprobs(policy: LanguagePolicy, groups: Sequence[Group], *, grad: bool = False) -> list[Tensor]:
    """Log-probs of every row of every group, in order, each prompt computed once.

    Args:
        policy: the model.
        groups: rows that share their :func:`prompt_of` within each group.
        grad: build the graph for a backward pass.

    Returns:
        One float32 tensor ``(scored tokens,)`` a row; all rows of the first group, then of the second.
    """
    width = max(group_size(group) for group in groups)
    ids = torch.zeros((len(groups), width), dtype=torch.long)
    positions = torch.zeros((len(groups), width), dtype=torch.long)
    # Which response a token belongs to: 0 for the prompt, -1 for padding.
    branch = torch.full((len(groups), width), -1, dtype=torch.long)
    read: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    for index, group in enumerate(groups):
        prompt = group[0].scored[0]
        ids[index, :prompt] = torch.tensor(group[0].ids[:prompt])
        positions[index, :prompt] = torch.arange(prompt)
        branch[index, :prompt] = 0
        start = prompt
        for number, row in enumerate(group, start=1):
            end = start + row.scored[-1] - prompt
            ids[index, start:end] = torch.tensor(row.ids[prompt : row.scored[-1]])
            positions[index, start:end] = torch.arange(prompt, row.scored[-1])
            branch[index, start:end] = number
            for place in row.scored:
                # The token that predicts a response's first one is the prompt's last, whatever the response.
                before = prompt - 1 if place == prompt else start + place - 1 - prompt
                read.append(index * width + before)
                targets.append(row.ids[place])
            lengths.append(len(row.scored))
            start = end
    order = torch.arange(width)
    causal = order[:, None] >= order[None, :]
    visible = causal & ((branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None]))
    device = policy.device
    mask = torch.zeros((len(groups), 1, width, width), dtype=policy.dtype, device=device)
    mask.masked_fill_(~visible[:, None].to(device), torch.finfo(policy.dtype).min)
    with torch.set_grad_enabled(grad):
        hidden = policy.network.base_model(
            input_ids=ids.to(device), attention_mask=mask, position_ids=positions.to(device), use_cache=False
        ).last_hidden_state
        states = hidden.reshape(-1, hidden.shape[-1]).index_select(0, torch.tensor(read, device=device))
        flat = _score(policy, states, torch.tensor(targets, device=device))
    return list(flat.split_with_sizes(lengths))


def can_share(policy: LanguagePolicy) -> bool:
    """Whether this model gives the same numbers with a shared prompt; says so when it does not."""
    config = policy.network.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    why = ""
    if not policy.head_is_plain:
        why = "its logits are not its output layer's"
    elif kinds != {"full_attention"}:
        why = f"it has layers of {', '.join(sorted(kinds))}"
    else:
        size = int(config.vocab_size)
        prompt = [(7 * i + 1) % size for i in range(9)]
        tails = ([(5 * i + 2) % size for i in range(6)], [(3 * i + 4) % size for i in range(4)])
        group = [Rendered.from_tokens(prompt, tail) for tail in tails]
        tolerance = 1e-3 if policy.dtype == torch.float32 else 0.25
        try:
            with torch.inference_mode():
                shared, plain = group_logprobs(policy, [group, group[1:]]), token_logprobs(policy, group)
            if not all(
                torch.allclose(a, b, atol=tolerance) for a, b in zip(shared, [*plain, plain[1]], strict=True)
            ):
                why = "its attention does not follow a mask"
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            why = f"its attention takes no mask ({error})"
    if why:
        emit(Message(text=f"Prompts are not shared between responses on {policy.name}: {why}."))
    return not why


def _score(policy: LanguagePolicy, states: Tensor, targets: Tensor) -> Tensor:
    def score(hidden: Tensor, wanted: Tensor) -> Tensor:
        logits = policy.head(hidden).float()
        return logits.gather(-1, wanted[:, None])[:, 0] - logits.logsumexp(dim=-1)

    chunk = max(1, LOGITS_BYTES // (4 * int(policy.network.config.vocab_size)))
    if len(targets) <= chunk:
        return score(states, targets)
    count = -(-len(targets) // chunk)
    parts = zip(states.chunk(count), targets.chunk(count), strict=True)
    if torch.is_grad_enabled():
        # Each chunk's logits are computed again in the backward pass instead of being kept.
        return torch.cat([checkpoint(score, h, t, use_reentrant=False) for h, t in parts])
    return torch.cat([score(h, t) for h, t in parts])
