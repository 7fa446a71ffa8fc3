"""Log-probs of rows of tokens, and what else their distributions tell, by the fastest path that is right.

The fast path packs rows without padding, computes what they share once, and runs the output layer on
scored positions only (:mod:`corrigible.models.network`, :mod:`corrigible.models.head`). A model that
it does not know takes the plain path of transformers, padded on the right. Both are held to
:func:`corrigible.models.logprobs_reference` by the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from corrigible.errors import BadInputError, NumericsError
from corrigible.models.head import Scores, TopK, divergence, joined, largest, score, top_k
from corrigible.models.network import Network, positions_depend_on_length
from corrigible.models.packing import pack, packed_size
from corrigible.models.policy import LanguagePolicy
from corrigible.models.renderer import Rendered

Rows = Sequence[Rendered]

PLAIN_POSITIONS = 64
"""Positions whose logits are taken at a time where the output layer is not a plain matrix."""

OVERFLOW = "Something overflowed: lower the learning rate, or use float32 or bfloat16."


@dataclass(frozen=True, slots=True)
class RowScores:
    """Per row, of its scored tokens in order, float32, nats; all but the log-probs only if asked for.

    Attributes:
        logprobs: of the tokens.
        entropies: of the distribution before each.
        expected: what the log-prob of a token drawn there at another temperature is on average.
        sampling_logprobs: of the tokens themselves at that other temperature, without gradient.
    """

    logprobs: list[Tensor]
    entropies: list[Tensor] | None
    expected: list[Tensor] | None = None
    sampling_logprobs: list[Tensor] | None = None


@dataclass(frozen=True, slots=True)
class RowDivergences:
    """Per row, at its scored tokens in order, float32, nats.

    Attributes:
        divergences: KL divergence of the two next-token distributions, over the whole vocabulary.
        logprobs: of the scored tokens themselves under this policy; None unless asked for.
        other_logprobs: the same under the other.
    """

    divergences: list[Tensor]
    logprobs: list[Tensor] | None = None
    other_logprobs: list[Tensor] | None = None


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
        # What the template begins every conversation with is computed once for all rows of a pass.
        self.preamble = policy.renderer.preamble if self.share else ()
        # A short row must not be read with the frequencies of a long one beside it.
        self.one_by_one = self.network is None and positions_depend_on_length(policy)

    def size(self, rows: Rows) -> int:
        """Tokens that these rows add to a forward pass, padding included."""
        if self.network is None:
            return len(rows) * max(row.scored[-1] if row.scored else len(row) for row in rows)
        return packed_size(rows, share=self.share, preamble=self.preamble)

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
        expected_at: float | None = None,
    ) -> RowScores:
        """As a call, with what else is asked for at each scored position.

        Args:
            examples, grad, temperature: as for a call.
            entropy: also the entropy of the distribution.
            expected_at: also ``sum_a q(a) log p(a)`` over the vocabulary, ``q`` the distribution at this
                temperature, held constant: infinity gives all tokens the same probability.

        Raises:
            BadInputError, NumericsError: as a call does; or an ``expected_at`` that is not above 0.
        """
        rows, groups = _checked(examples, self.policy, temperature)
        if expected_at is not None and not expected_at > 0.0:
            raise BadInputError(f"expected_at is {expected_at}.", advice="Tokens are drawn at one above 0.")
        with torch.set_grad_enabled(grad):
            found = self._outputs(rows, groups).score(temperature, entropy, expected_at)

        def split(values: Tensor | None, name: str) -> list[Tensor] | None:
            return None if values is None else _split(values, rows, name)

        return RowScores(
            _split(found.logprobs, rows, "log-probabilities"),
            split(found.entropy, "entropies"),
            split(found.expected, "expected log-probabilities"),
            split(found.sampling_logprobs, "sampling log-probabilities"),
        )

    def divergence(
        self,
        examples: Iterable[Rows],
        other: Scorer | None = None,
        *,
        reverse: bool = False,
        grad: bool = False,
        temperature: float = 1.0,
        logprobs: bool = False,
    ) -> RowDivergences:
        """KL(this policy || other) of the next-token distributions before each scored token; exact.

        Args:
            examples: as for a call.
            other: scores under another policy of the same vocabulary; by default this one with its
                adapter disabled. It gets no gradient.
            reverse: KL(other || this policy) instead.
            grad: build the graph for a backward pass.
            temperature: of both distributions.
            logprobs: also the log-probs of the scored tokens under both, from the same forward passes.

        Raises:
            BadInputError: as a call does; or two vocabularies, or neither ``other`` nor an adapter.
            NumericsError: either model gives NaN or an infinite value.
        """
        rows, groups = _checked(examples, self.policy, temperature)
        adapter: Callable[[], AbstractContextManager[None]] = nullcontext
        if other is None:
            other, adapter = self, self.policy.adapter_disabled
        else:
            check_rows(other.policy, rows)
            if not same_vocabulary(self.policy, other.policy):
                raise BadInputError(
                    f"vocabulary_mismatch: {self.policy.name} and {other.policy.name} do not have the same "
                    "tokens.",
                    advice="A divergence needs one vocabulary: compare models of one family.",
                )
        with torch.no_grad(), adapter():
            theirs = other._outputs(rows, groups)
            their_logprobs = theirs.score(temperature).logprobs if logprobs else None
        with torch.set_grad_enabled(grad):
            mine = self._outputs(rows, groups)
            my_logprobs = mine.score(temperature).logprobs if logprobs else None
            a, b = mine.matrix, theirs.matrix
            if a is not None and b is not None:
                found = divergence(
                    mine.states,
                    a.weight,
                    theirs.states,
                    b.weight,
                    bias_a=a.bias,
                    bias_b=b.bias,
                    temperature=temperature,
                    reverse=reverse,
                )
            else:

                def block(at: slice) -> Tensor:
                    with torch.no_grad(), adapter():  # this may run again in the backward pass
                        q = theirs.every(at, temperature)
                    p = mine.every(at, temperature)
                    return (q.exp() * (q - p) if reverse else p.exp() * (p - q)).sum(dim=-1).clamp(min=0.0)

                found = _in_blocks(block, len(mine.states))
        return RowDivergences(
            _split(found, rows, "divergences"),
            None if my_logprobs is None else _split(my_logprobs, rows, "log-probabilities"),
            None if their_logprobs is None else _split(their_logprobs, rows, "other log-probabilities"),
        )

    def top_k(self, examples: Iterable[Rows], k: int, *, temperature: float = 1.0) -> list[TopK]:
        """The ``k`` likeliest tokens before each scored token of every row; no gradient.

        Raises:
            BadInputError: as a call does, or a ``k`` that is not 1 to the size of the vocabulary.
            NumericsError: the model gives NaN or an infinite value.
        """
        rows, groups = _checked(examples, self.policy, temperature)
        with torch.no_grad():
            outputs = self._outputs(rows, groups)
            if outputs.matrix is not None:
                head = outputs.matrix
                found = top_k(outputs.states, head.weight, k, bias=head.bias, temperature=temperature)
            else:
                parts = _blocks(len(outputs.states))
                found = joined([largest(outputs.logits(at).float(), k, temperature) for at in parts])
        return [
            TopK(*parts)
            for parts in zip(
                _split(found.logprobs, rows, "log-probabilities"),
                _split(found.ids, rows, "ids"),
                _split(found.rest, rows, "probabilities"),
                strict=True,
            )
        ]

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

    def _outputs(self, rows: Rows, groups: list[int]) -> _Outputs:
        device = self.policy.device
        if self.network is None:
            return self._plain(rows)
        packed = pack(rows, share=self.share, groups=groups, preamble=self.preamble)
        states = self.network.hidden(packed).index_select(0, packed.read.to(device))
        return _Outputs(states, packed.targets.to(device), self.policy.network.get_output_embeddings())

    def _last_states(self, rows: Rows, groups: list[int]) -> Tensor:
        device = self.policy.device
        if self.network is not None:
            packed = pack(rows, share=self.share, whole=True, groups=groups, preamble=self.preamble)
            return self.network.hidden(packed).index_select(0, packed.last.to(device)).float()
        if self.one_by_one and len(rows) > 1:
            return torch.cat([self._last_states([row], [1]) for row in rows])
        ids, _ = _padded([row.fed for row in rows])
        states = self.policy.hidden_states(ids.to(device))
        last = torch.tensor([len(row) - 1 for row in rows], device=device)
        return states[torch.arange(len(rows), device=device), last].float()

    def _plain(self, rows: Rows) -> _Outputs:
        if self.one_by_one and len(rows) > 1:
            alone = [self._plain([row]) for row in rows]
            states = torch.cat([one.states for one in alone])
            return _Outputs(states, torch.cat([one.targets for one in alone]), alone[0].head)
        # The last scored token is predicted, never read. Padding stands on the right, so with causal
        # attention no scored position sees it: no mask is needed, and positions count from 0 in each row.
        ids, width = _padded([row.fed[: row.scored[-1]] for row in rows])
        read = [number * width + place - 1 for number, row in enumerate(rows) for place in row.scored]
        device = self.policy.device
        ids, where = ids.to(device), torch.tensor(read, device=device)
        targets = torch.tensor([row.ids[place] for row in rows for place in row.scored], device=device)
        if self.policy.head_is_plain:
            states, head = self.policy.hidden_states(ids), self.policy.network.get_output_embeddings()
        else:
            states, head = self.policy.network(input_ids=ids, use_cache=False).logits, nn.Identity()
        return _Outputs(states.reshape(-1, states.shape[-1]).index_select(0, where), targets, head)


@dataclass(frozen=True, slots=True)
class _Outputs:
    """What an output layer reads at ``n`` scored positions, and what stands there.

    Attributes:
        states: ``(n, width)``; the logits themselves where ``head`` is the identity.
        targets: ``(n,)`` ids of the scored tokens.
        head: gives the logits of ``states``.
    """

    states: Tensor
    targets: Tensor
    head: nn.Module

    @property
    def matrix(self) -> nn.Linear | None:
        """The head if it is a matrix and no more; of one with an adapter only its own forward is right."""
        return self.head if type(self.head) is nn.Linear else None

    def logits(self, at: slice) -> Tensor:
        """``(positions, vocabulary)``, in the model's type."""
        found: Tensor = self.head(self.states[at])
        return found

    def every(self, at: slice, temperature: float) -> Tensor:
        """Log-probs of all tokens, ``(positions, vocabulary)`` float32."""
        return (self.logits(at).float() / temperature).log_softmax(dim=-1)

    def score(self, temperature: float, entropy: bool = False, expected_at: float | None = None) -> Scores:
        """Of the targets."""
        if (head := self.matrix) is not None:
            return score(
                self.states,
                head.weight,
                self.targets,
                bias=head.bias,
                temperature=temperature,
                entropy=entropy,
                expected_at=expected_at,
            )

        def block(at: slice) -> Tensor:
            logits, targets = self.logits(at).float(), self.targets[at, None]
            every = (logits / temperature).log_softmax(dim=-1)
            columns = [every.gather(-1, targets)[:, 0]]
            if entropy:
                columns.append(-(every * every.exp()).sum(dim=-1))
            if expected_at is not None:
                drawn = (logits.detach() / expected_at).log_softmax(dim=-1)
                columns += [(drawn.exp() * every).sum(dim=-1), drawn.gather(-1, targets)[:, 0]]
            return torch.stack(columns)

        found = iter(_in_blocks(block, len(self.states)).unbind())
        return Scores(
            next(found),
            next(found) if entropy else None,
            next(found) if expected_at is not None else None,
            next(found).detach() if expected_at is not None else None,
        )


def _blocks(count: int) -> list[slice]:
    return [slice(start, start + PLAIN_POSITIONS) for start in range(0, count, PLAIN_POSITIONS)]


def _in_blocks(function: Callable[[slice], Tensor], count: int) -> Tensor:
    """``function`` of a few positions at a time ``(..., positions)``, joined to ``(..., count)``.

    What it makes is made again in the backward pass, so that nothing as wide as the vocabulary is kept.
    """
    parts = [checkpoint(function, at, use_reentrant=False) for at in _blocks(count)]
    return torch.cat(parts, dim=-1)


def same_vocabulary(one: LanguagePolicy, other: LanguagePolicy) -> bool:
    """Whether a token id means the same to both policies, and both have logits for the same ids."""
    sizes = [len(policy.network.get_input_embeddings().weight) for policy in (one, other)]
    if sizes[0] != sizes[1]:
        return False
    return one.tokenizer is other.tokenizer or bool(one.tokenizer.get_vocab() == other.tokenizer.get_vocab())


def _listed(examples: Iterable[Rows]) -> tuple[list[Rendered], list[int]]:
    """All rows, one after the other, and how many each example has."""
    groups = [list(rows) for rows in examples]
    return [row for rows in groups for row in rows], [len(rows) for rows in groups]


def _checked(
    examples: Iterable[Rows], policy: LanguagePolicy, temperature: float
) -> tuple[list[Rendered], list[int]]:
    """:func:`_listed`, of rows and at a temperature that can be scored."""
    rows, groups = _listed(examples)
    check_rows(policy, rows)
    if not 0.0 < temperature < float("inf"):
        raise BadInputError(
            f"temperature is {temperature}.", advice="Log-probs need one above 0; 1 is the plain model."
        )
    return rows, groups


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
        every = row.ids if row.inputs is None else row.ids + row.inputs
        if max(every) >= size or min(every) < 0:
            unknown = next(token for token in every if not 0 <= token < size)
            raise BadInputError(
                f"Row {number} holds the token id {unknown}; {policy.name} knows {size} tokens.",
                advice="Render it with this policy's own renderer.",
            )


def _split(values: Tensor, rows: Rows, name: str) -> list[Tensor]:
    """Values at the scored tokens of all rows, row by row; NumericsError for one that is not finite."""
    parts = list(values.split_with_sizes([len(row.scored) for row in rows]))
    if not bool(values.detach().isfinite().all()):
        row = next(i for i, part in enumerate(parts) if not bool(part.detach().isfinite().all()))
        raise NumericsError(f"The {name} of row {row} are not finite.", advice=OVERFLOW)
    return parts


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
    width = max(map(len, rows))
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    return ids, width
