"""Log-probs (and entropies, and last states) of rows of tokens, by the fastest path that is right.

The fast path packs rows without padding, computes what they share once, and runs the output layer on
scored positions only (:mod:`corrigible.models.network`, :mod:`corrigible.models.head`). A model that
it does not know takes the plain path of transformers, padded on the right. Both are held to
:func:`corrigible.models.logprobs_reference` by the tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corrigible.errors import BadInputError, NumericsError
from corrigible.models.head import Scores, score
from corrigible.models.network import Network, positions_depend_on_length
from corrigible.models.packing import pack, packed_size
from corrigible.models.policy import LanguagePolicy
from corrigible.models.renderer import Rendered

Rows = Sequence[Rendered]

OVERFLOW = "Something overflowed: lower the learning rate, or use float32 or bfloat16."


@dataclass(frozen=True, slots=True)
class RowScores:
    """Per row, of its scored tokens in order, float32: log-probs and, if asked for, entropies in nats."""

    logprobs: list[Tensor]
    entropies: list[Tensor] | None


class Scorer:
    """Scores rows of tokens under a policy, as its parameters stand at each call.

    Args:
        policy: the model.
        share: whether rows that begin alike share that computation.
        checkpoint_layers: compute each layer again in the backward pass instead of keeping it: about
            a twentieth of the memory for a third more time.
    """

    def __init__(
        self, policy: LanguagePolicy, *, share: bool = True, checkpoint_layers: bool = False
    ) -> None:
        self.policy = policy
        self.network = Network.of(policy, checkpoint_layers=checkpoint_layers)
        self.share = share and self.network is not None
        # A short row must not be read with the frequencies of a long one beside it.
        self.one_by_one = self.network is None and positions_depend_on_length(policy)

    def size(self, rows: Rows) -> int:
        """Tokens that these rows take in a forward pass of their own, padding included."""
        if self.network is None:
            return len(rows) * max(row.scored[-1] if row.scored else len(row) for row in rows)
        return packed_size(rows, share=self.share)

    def __call__(
        self, examples: Iterable[Rows], *, grad: bool = False, temperature: float = 1.0
    ) -> list[Tensor]:
        """Log-probs of the scored tokens of every row of every example, in order, in one forward pass.

        Args:
            examples: groups of rows that may share what they begin with. A group's numbers do not depend
                on the groups beside it, beyond the rounding of the matrix library.
            grad: build the graph for a backward pass.
            temperature: of the distribution that the log-probs belong to.

        Returns:
            One float32 tensor ``(scored tokens,)`` a row, nats.

        Raises:
            BadInputError: no rows, a row with nothing to score (it would count as certain) or with a
                scored first token, a row longer than the context, a token outside the vocabulary.
            NumericsError: the model gives NaN or an infinite value.
        """
        return self.scores(examples, grad=grad, temperature=temperature).logprobs

    def scores(
        self,
        examples: Iterable[Rows],
        *,
        grad: bool = False,
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> RowScores:
        """As a call, with the entropy at each scored position if asked for."""
        rows, groups = _listed(examples)
        check_rows(self.policy, rows)
        if not 0.0 < temperature < float("inf"):
            raise BadInputError(
                f"temperature is {temperature}.", advice="Log-probs need one above 0; 1 is the plain model."
            )
        with torch.set_grad_enabled(grad):
            if self.network is None:
                found = self._plain(rows, temperature, entropy)
            else:
                found = self._packed(rows, groups, temperature, entropy)
        lengths = [len(row.scored) for row in rows]
        _check_finite(found.logprobs, lengths)
        entropies = None if found.entropy is None else list(found.entropy.split_with_sizes(lengths))
        return RowScores(list(found.logprobs.split_with_sizes(lengths)), entropies)

    def states(self, examples: Iterable[Rows], *, grad: bool = False) -> Tensor:
        """``(rows, width)`` float32: the last hidden state of each row, at its very last token.

        Raises:
            BadInputError: no rows, or a row without tokens, too long, or outside the vocabulary.
            NumericsError: the model gives NaN or an infinite value.
        """
        rows, groups = _listed(examples)
        check_rows(self.policy, rows, scored=False)
        with torch.set_grad_enabled(grad):
            found = self._last_states(rows, groups)
        finite = found.detach().isfinite().all(dim=-1)
        if not bool(finite.all()):
            raise NumericsError(
                f"The hidden state of row {finite.tolist().index(False)} is not finite.", advice=OVERFLOW
            )
        return found

    # -- the two paths ------------------------------------------------------------------------

    def _packed(self, rows: Rows, groups: list[int], temperature: float, entropy: bool) -> Scores:
        assert self.network is not None
        packed = pack(rows, share=self.share, groups=groups)
        device = self.policy.device
        states = self.network.hidden(packed).index_select(0, packed.read.to(device))
        return self._score(states, packed.targets.to(device), temperature, entropy)

    def _last_states(self, rows: Rows, groups: list[int]) -> Tensor:
        device = self.policy.device
        if self.network is not None:
            packed = pack(rows, share=self.share, whole=True, groups=groups)
            return self.network.hidden(packed).index_select(0, packed.last.to(device)).float()
        if self.one_by_one and len(rows) > 1:
            return torch.cat([self._last_states([row], [1]) for row in rows])
        ids, _ = _padded([row.ids for row in rows])
        states = self.policy.hidden_states(ids.to(device))
        last = torch.tensor([len(row) - 1 for row in rows], device=device)
        return states[torch.arange(len(rows), device=device), last].float()

    def _plain(self, rows: Rows, temperature: float, entropy: bool) -> Scores:
        if self.one_by_one and len(rows) > 1:
            found = [self._plain([row], temperature, entropy) for row in rows]
            entropies = [one.entropy for one in found if one.entropy is not None]
            return Scores(
                torch.cat([one.logprobs for one in found]), torch.cat(entropies) if entropy else None
            )
        # The last scored token is predicted, never read. Padding stands on the right, so with causal
        # attention no scored position sees it: no mask is needed, and positions count from 0 in each row.
        ids, width = _padded([row.ids[: row.scored[-1]] for row in rows])
        read = [number * width + place - 1 for number, row in enumerate(rows) for place in row.scored]
        targets = [row.ids[place] for row in rows for place in row.scored]
        device = self.policy.device
        where, wanted = torch.tensor(read, device=device), torch.tensor(targets, device=device)
        if self.policy.head_is_plain:
            states = self.policy.hidden_states(ids.to(device))
            states = states.reshape(-1, states.shape[-1]).index_select(0, where)
            return self._score(states, wanted, temperature, entropy)
        logits = self.policy.network(input_ids=ids.to(device), use_cache=False).logits
        logits = logits.reshape(-1, logits.shape[-1]).index_select(0, where).float() / temperature
        every = logits.log_softmax(dim=-1)
        return Scores(
            every.gather(-1, wanted[:, None])[:, 0], -(every * every.exp()).sum(dim=-1) if entropy else None
        )

    def _score(self, states: Tensor, targets: Tensor, temperature: float, entropy: bool) -> Scores:
        head = self.policy.network.get_output_embeddings()
        if type(head) is torch.nn.Linear:
            return score(
                states, head.weight, targets, bias=head.bias, temperature=temperature, entropy=entropy
            )
        # An adapter on the output layer: its own forward is the only right one.
        every = (self.policy.head(states).float() / temperature).log_softmax(dim=-1)
        return Scores(
            every.gather(-1, targets[:, None])[:, 0], -(every * every.exp()).sum(dim=-1) if entropy else None
        )


def _listed(examples: Iterable[Rows]) -> tuple[list[Rendered], list[int]]:
    """All rows, one after the other, and how many each example has."""
    groups = [list(rows) for rows in examples]
    return [row for rows in groups for row in rows], [len(rows) for rows in groups]


def check_rows(policy: LanguagePolicy, rows: Rows, *, scored: bool = True) -> None:
    """BadInputError for rows that cannot be scored; ``scored=False`` asks for tokens only."""
    if not rows:
        raise BadInputError("The batch is empty: there is nothing to score.")
    size = len(policy.network.get_input_embeddings().weight)
    for number, row in enumerate(rows):
        if not row.ids:
            raise BadInputError(f"Row {number} of the batch has no tokens.", advice="Leave it out.")
        if scored and not row.scored:
            raise BadInputError(
                f"Row {number} of the batch has no scored token (an answer of length zero?).",
                advice="Leave it out, or render it with its end-of-turn token.",
            )
        if scored and row.scored[0] == 0:
            raise BadInputError(
                f"Row {number} of the batch scores its first token, but nothing stands before it."
            )
        if len(row) > policy.context_length:
            raise BadInputError(
                f"Row {number} has {len(row)} tokens; {policy.name} reads {policy.context_length}.",
                advice="Leave it out, or use renderer.fit(rendered, max_length, policy='truncate_prompt').",
            )
        if max(row.ids) >= size or min(row.ids) < 0:
            unknown = next(token for token in row.ids if not 0 <= token < size)
            raise BadInputError(
                f"Row {number} holds the token id {unknown}; {policy.name} knows {size} tokens.",
                advice="Render it with this policy's own renderer.",
            )


def _check_finite(logprobs: Tensor, lengths: Sequence[int]) -> None:
    if bool(logprobs.detach().isfinite().all()):
        return
    parts = logprobs.detach().split_with_sizes(list(lengths))
    row = next(i for i, part in enumerate(parts) if not bool(part.isfinite().all()))
    raise NumericsError(
        f"The log-probabilities of row {row} are not finite.",
        advice=OVERFLOW,
    )


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
    width = max(map(len, rows))
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    return ids, width
