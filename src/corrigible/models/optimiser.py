"""AdamW for weights that are held in bfloat16, and for those that are not.

A step of a small learning rate is below the resolution of a bfloat16 weight (8 bits: steps of 0.4 to
0.8 % of it) and would vanish. So bfloat16 weights have float32 *masters*, which are what the optimiser
moves, and of which the weight is the rounded copy. Bytes for each bfloat16 weight, beside the 2 of the
weight and the 2 of its gradient:

===================  =============================  ==============================
master_weights       moments="float32"              moments="bfloat16"
===================  =============================  ==============================
"float32"            4 + 8 = 12                     4 + 4 = 8
"split" (default)    2 + 8 = 10                     2 + 4 = 6
"stochastic"         0 + 8 = 8                      0 + 4 = 4
===================  =============================  ==============================

Weights of float32 need no masters (8 or 4 bytes for the moments), nor do those of float64, whose
moments always are float64 (16 bytes). Weights of float16 have float32 masters in every setting.

*"split"* keeps the master in two halves: the weight is the upper one, rounded to the nearest, and an
int16 tensor holds what is missing: the difference of the bits of the two as float32. Together they are
the float32 master, bit for bit, but for one number in 131072: of a master that lies exactly half-way
above a weight whose last bit is even, the difference is 32768, one more than fits; such a master
becomes the float32 number below it.

*"stochastic"* keeps no master. The weight after a step is rounded up or down at random, the more likely
the nearer, so that it is right on average however small the step is (Gupta et al. 2015, section 3). What
is drawn depends on the seed, the number of the step and the name of the parameter alone.

*Moments in bfloat16*: the first moment takes up a tenth of each gradient's distance from it (beta1 =
0.9). Half of bfloat16's step is 0.2 to 0.4 % of a number, so what is lost is a distance of 2 to 4 %, and
it is rounded to the nearest. The second moment takes up a thousandth (beta2 = 0.999): rounded to the
nearest it could never fall, which goes by at most 0.1 % of it, and would rise only where the squared
gradient is three to five times as large. It is rounded stochastically, with numbers of its own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from corrigible.errors import BadInputError

MasterWeights = Literal["split", "float32", "stochastic"]
Moments = Literal["float32", "bfloat16"]

UPDATED_TOGETHER = 1 << 18
"""Weights that are widened to float32 at the same time: few enough to stay in the processor's cache."""

FUSED = ("cpu", "cuda", "mps")
"""Devices for which torch has AdamW as one kernel."""

TIE = 1 << 15
"""Half of bfloat16's step, in steps of float32."""


@dataclass(frozen=True)
class Group:
    """Parameters that are updated alike.

    Attributes:
        parameters: by name; a name stands in one group only.
        weight_decay: decoupled decay, times the learning rate, of the weight itself in each step.
        rate: times the learning rate of the step.
    """

    parameters: Mapping[str, nn.Parameter]
    weight_decay: float = 0.0
    rate: float = 1.0


class Optimiser:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2; Kingma and Ba 2015).

    With gradient ``g`` of step ``t``, learning rate ``r`` and weight ``w``::

        w = w - r weight_decay w
        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g²
        w = w - r (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    A parameter without gradient is left alone, and its ``t`` counts the steps in which it had one.

    Args:
        groups: what to train. The parameters stay the owner's: their values are changed in place.
        betas: decay rates of the two moments.
        eps: what keeps the division from being one by zero.
        master_weights: how the float32 masters of bfloat16 weights are kept; see the module.
        moments: what the moments are kept in.
        seed: of the stochastic roundings.

    Raises:
        BadInputError: there is nothing to train, a name stands in two groups, a setting is unknown, or a
            parameter is not one stretch of memory.
    """

    def __init__(
        self,
        *groups: Group,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        master_weights: MasterWeights = "split",
        moments: Moments = "float32",
        seed: int = 0,
    ) -> None:
        if master_weights not in ("split", "float32", "stochastic") or moments not in ("float32", "bfloat16"):
            raise BadInputError(
                f"master_weights is {master_weights!r} and moments {moments!r}.",
                advice="master_weights is split, float32 or stochastic; moments is float32 or bfloat16.",
            )
        self.betas = betas
        self.eps = eps
        self.seed = seed
        self._families: list[_Family] = []
        self._where: dict[str, tuple[_Family, int]] = {}
        for group in groups:
            alike: dict[tuple[torch.dtype, torch.device], dict[str, nn.Parameter]] = {}
            for name, parameter in group.parameters.items():
                if name in self._where or any(name in known for known in alike.values()):
                    raise BadInputError(f"the parameter {name} stands in two groups.")
                if not parameter.is_contiguous():
                    raise BadInputError(
                        f"the parameter {name} is not one stretch of memory.",
                        advice="Make it contiguous before it is trained.",
                    )
                alike.setdefault((parameter.dtype, parameter.device), {})[name] = parameter
            for parameters in alike.values():
                family = _Family(group, parameters, master_weights, moments)
                self._families.append(family)
                self._where |= {name: (family, number) for number, name in enumerate(parameters)}
        if not self._where:
            raise BadInputError("there is no parameter to train.")

    @torch.no_grad()
    def norm(self) -> float:
        """Length of all gradients together, summed in float32 or wider; 0.0 when there is none."""
        return math.hypot(*(family.norm() for family in self._families))

    @torch.no_grad()
    def step(self, lr: float, scale: float = 1.0) -> None:
        """Update every parameter that has a gradient, and free the gradients.

        Args:
            lr: the learning rate, which each group multiplies by its ``rate``.
            scale: what the gradients are multiplied by first (clipping).
        """
        for family in self._families:
            for pieces in family.chunks():
                family.update(pieces, lr, scale, self.betas, self.eps, self.seed)
            family.count()

    def clear(self) -> None:
        """Forget the gradients."""
        for family in self._families:
            for parameter in family.parameters:
                parameter.grad = None

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each parameter as the optimiser knows it, in float32 (float64 where it is that).

        One at a time: a value of bfloat16 weights is made for the asking, others may be the parameter's own.
        """
        for name, (family, number) in self._where.items():
            yield name, family.master(number).view(family.parameters[number].shape)

    def master(self, name: str, every: int = 1) -> Tensor:
        """Every ``every``-th weight of the parameter ``name`` as :meth:`masters` gives them, ``(k,)``."""
        family, number = self._where[name]
        return family.master(number, every)

    def state(self) -> dict[str, Tensor]:
        """All that :meth:`load` needs to go on bit for bit, the weights themselves included.

        Keys are ``weight.NAME``, ``first_moment.NAME``, ``second_moment.NAME``, ``step.NAME`` (int64, ``()``)
        and, where there is one, ``master.NAME``: float32, or with "split" the int16 difference. The tensors
        share memory with the optimiser: write them, or copy them, before the next step.
        """
        found: dict[str, Tensor] = {}
        for name, (family, number) in self._where.items():
            found |= {f"{kind}.{name}": value for kind, value in family.state(number).items()}
            found[f"step.{name}"] = torch.tensor(family.steps[number])
        return found

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave.

        Raises:
            BadInputError: a tensor is missing, of another shape or precision, or has no place here; nothing
                is changed then.
        """
        places = self.state()
        advice = "It was written for another model, or with other settings of the optimiser's precision."
        for key, place in places.items():
            value = state.get(key)
            if value is None:
                raise BadInputError(f"the optimiser's state lacks the tensor {key}.", advice=advice)
            if value.shape != place.shape or value.dtype != place.dtype:
                raise BadInputError(
                    f"the optimiser's state has {key} as {_described(value)}, not {_described(place)}.",
                    advice=advice,
                )
        for key in state:
            if key not in places:
                raise BadInputError(f"the optimiser has no place for the tensor {key}.", advice=advice)
        for name, (family, number) in self._where.items():
            for kind, place in family.state(number).items():
                place.copy_(state[f"{kind}.{name}"])
            family.steps[number] = int(state[f"step.{name}"])


@dataclass(frozen=True, slots=True)
class _Piece:
    """At most :data:`UPDATED_TOGETHER` weights of one parameter, from its weight ``start`` on."""

    number: int
    start: int
    weights: Tensor
    gradient: Tensor


class _Family:
    """Parameters of one group, precision and device; their state lies one after the other in flat tensors."""

    def __init__(
        self,
        group: Group,
        parameters: Mapping[str, nn.Parameter],
        master_weights: MasterWeights,
        moments: Moments,
    ) -> None:
        self.group = group
        self.names = list(parameters)
        self.parameters = list(parameters.values())
        self.steps = [0] * len(self.names)
        self.places: list[slice] = []
        size = 0
        for parameter in self.parameters:
            self.places.append(slice(size, size + parameter.numel()))
            size += parameter.numel()
        dtype, device = self.parameters[0].dtype, self.parameters[0].device
        self.wide = _wide(dtype)
        kept = torch.bfloat16 if moments == "bfloat16" and dtype != torch.float64 else self.wide
        self.first = torch.zeros(size, dtype=kept, device=device)
        self.second = torch.zeros(size, dtype=kept, device=device)
        self.stochastic = dtype == torch.bfloat16 and master_weights == "stochastic"
        self.halves: Tensor | None = None
        self.whole: Tensor | None = None
        if dtype == torch.bfloat16 and master_weights == "split":
            self.halves = torch.zeros(size, dtype=torch.int16, device=device)
        elif dtype == torch.float16 or (dtype == torch.bfloat16 and master_weights == "float32"):
            self.whole = torch.cat([p.detach().view(-1) for p in self.parameters]).float()

    def state(self, number: int) -> dict[str, Tensor]:
        """Where the tensors of a parameter lie, in its shape."""
        parameter, place = self.parameters[number].detach(), self.places[number]
        kept = {"first_moment": self.first, "second_moment": self.second}
        master = self.halves if self.halves is not None else self.whole
        if master is not None:
            kept["master"] = master
        return {"weight": parameter} | {
            kind: flat[place].view(parameter.shape) for kind, flat in kept.items()
        }

    def master(self, number: int, every: int = 1) -> Tensor:
        """Every ``every``-th weight as the optimiser knows it, flat."""
        place = self.places[number]
        if self.whole is not None:
            return self.whole[place][::every]
        weights = self.parameters[number].detach().view(-1)[::every].to(self.wide)
        if self.halves is not None:
            weights.view(torch.int32).add_(self.halves[place][::every])
        return weights

    def chunks(self) -> Iterator[list[_Piece]]:
        """The pieces that have a gradient, in runs that lie side by side and are at the same step.

        A parameter's gradient is taken from it; its memory is free after the run that holds its last piece.
        """
        run: list[_Piece] = []
        size = 0
        for piece in self._pieces():
            number = piece.number
            if run and (
                size + len(piece.weights) > UPDATED_TOGETHER
                or number > run[-1].number + 1
                or self.steps[number] != self.steps[run[-1].number]
            ):
                yield run
                run, size = [], 0
            run.append(piece)
            size += len(piece.weights)
        if run:
            yield run

    def _pieces(self) -> Iterator[_Piece]:
        self.moved: list[int] = []
        for number, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            self.moved.append(number)
            weights, gradient = parameter.detach().view(-1), parameter.grad.reshape(-1)
            parameter.grad = None
            for start in range(0, len(weights), UPDATED_TOGETHER):
                stop = start + UPDATED_TOGETHER
                yield _Piece(number, start, weights[start:stop], gradient[start:stop])

    def norm(self) -> float:
        """Length of the gradients together."""
        lengths = [
            torch.linalg.vector_norm(flat[start : start + UPDATED_TOGETHER], dtype=self.wide)
            for parameter in self.parameters
            if parameter.grad is not None
            for flat in (parameter.grad.reshape(-1),)
            for start in range(0, len(flat), UPDATED_TOGETHER)
        ]
        return float(torch.linalg.vector_norm(torch.stack(lengths))) if lengths else 0.0

    def count(self) -> None:
        """The step is done."""
        for number in self.moved:
            self.steps[number] += 1

    def update(
        self,
        pieces: Sequence[_Piece],
        lr: float,
        scale: float,
        betas: tuple[float, float],
        eps: float,
        seed: int,
    ) -> None:
        """One step of the weights of a run of pieces."""
        size = sum(len(piece.weights) for piece in pieces)
        start = self.places[pieces[0].number].start + pieces[0].start
        here = slice(start, start + size)
        step = self.steps[pieces[0].number] + 1
        gradient = _joined([piece.gradient for piece in pieces], self.wide).mul_(scale)
        first, second = self.first[here], self.second[here]
        rounded = first.dtype != self.wide
        if rounded:
            first, second = first.float(), second.float()
        weights = self._widened(pieces, here)
        adamw(
            weights,
            gradient,
            first,
            second,
            step=step,
            lr=lr * self.group.rate,
            betas=betas,
            eps=eps,
            weight_decay=self.group.weight_decay,
        )
        if rounded:
            self.first[here] = first
            self.second[here] = round_stochastically(second, self._noise("second moment", pieces, step, seed))
        if self.stochastic:
            weights = round_stochastically(weights, self._noise("weight", pieces, step, seed))
        lengths = [len(piece.weights) for piece in pieces]
        narrow = weights.to(pieces[0].weights.dtype)
        torch._foreach_copy_([piece.weights for piece in pieces], list(narrow.split_with_sizes(lengths)))
        if self.halves is not None:
            missing = weights.view(torch.int32).sub_(narrow.float().view(torch.int32))
            self.halves[here] = missing.clamp_(max=TIE - 1)

    def _widened(self, pieces: Sequence[_Piece], here: slice) -> Tensor:
        """The masters of the pieces, for the kernel to change."""
        if self.whole is not None:
            return self.whole[here]
        weights = _joined([piece.weights for piece in pieces], self.wide)
        if self.halves is not None:
            weights.view(torch.int32).add_(self.halves[here])
        return weights

    def _noise(self, what: str, pieces: Sequence[_Piece], step: int, seed: int) -> Tensor:
        return torch.cat(
            [
                noise(
                    f"{what} {seed} {step} {self.names[piece.number]} {piece.start}",
                    len(piece.weights),
                    piece.weights.device,
                )
                for piece in pieces
            ]
        )


def adamw(
    weights: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    fused: bool | None = None,
) -> None:
    """Step number ``step`` (from 1) of flat tensors of one type, float32 or float64, in place.

    ``gradient`` may be overwritten. ``fused`` says whether to take torch's one kernel, which is the default
    where there is one.
    """
    device = weights.device
    if device.type in FUSED if fused is None else fused:
        torch._fused_adamw_(
            [weights],
            [gradient],
            [first],
            [second],
            [],
            [torch.tensor(float(step), device=device)],
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
        return
    weights.mul_(1.0 - lr * weight_decay)
    first.lerp_(gradient, 1.0 - betas[0])
    second.mul_(betas[1]).addcmul_(gradient, gradient, value=1.0 - betas[1])
    spread = second.sqrt().div_((1.0 - betas[1] ** step) ** 0.5).add_(eps)
    weights.addcdiv_(first, spread, value=-lr / (1.0 - betas[0] ** step))


def round_stochastically(values: Tensor, noise: Tensor) -> Tensor:
    """Float32 numbers rounded to one of their two neighbours in bfloat16, the nearer the more likely.

    Args:
        values: ``(n,)`` float32; overwritten.
        noise: ``(n,)`` int16, each of its 65536 values as likely as any other.

    Returns:
        ``values``, now numbers of bfloat16 still held in float32. What is a number of bfloat16 stays it.
    """
    # The lower 16 bits are how far a value is from its neighbour towards zero: with a number from 0 to
    # 65535 added, that share of the values passes over into the next one.
    values.view(torch.int32).add_(noise).add_(TIE).bitwise_and_(-2 * TIE)
    return values


def noise(key: str, size: int, device: torch.device) -> Tensor:
    """``(size,)`` evenly distributed int16 numbers, the same for the same key (on one kind of device)."""
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True))
    words = torch.empty(-(-size // 4), dtype=torch.int64, device=device)
    # Without bounds torch draws no negative number: one bit in four int16 would always be zero.
    words.random_(-(1 << 63), None, generator=generator)
    return words.view(torch.int16)[:size]


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The parts one after the other, as a new tensor of type ``dtype``."""
    flat = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return flat.to(dtype, copy=len(parts) == 1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
