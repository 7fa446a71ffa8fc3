"""Several processes train one policy: each takes a share of every batch, and sums make it whole again.

Data parallelism over a process group of ``torch.distributed``, as ``torchrun`` starts it. Each process
holds the whole policy. What is added up are *sums* (of gradients, of metrics that were already divided
by the denominator of the whole batch), never means of means, so two processes have the gradient of one.

Nobody waits for a process that has failed. Every exchange of data begins with a *roll call*
(:meth:`World.roll_call`): one number from each process, which says that it goes on, has been asked to
stop, or has failed. A process that raises leaves its work, and answers the next roll call, whatever the
others call it for, with what happened (:meth:`World.together`); all raise the same error then, at the
same step. A process that is gone altogether closes its connections, and the others raise
``process_lost``.

Alone (no process group, nothing of torchrun in the environment) every method is what a plain program
would do, and no process group is made.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from corrigible import errors
from corrigible.align.interrupts import Stopped
from corrigible.errors import BadInputError, CorrigibleError
from corrigible.events import Alert, AnyEvent, EventBus, emit

T = TypeVar("T")
K = TypeVar("K")

PATIENCE = timedelta(hours=1)
"""How long a process waits for one that is alive but does not come. A dead one is noticed at once."""

SUMMED_TOGETHER = 8 << 20
"""Weights whose gradients are widened to float32 and added up at the same time."""

LOST = "process_lost"
"""The name of the error when others cannot be reached any more."""

WELL, NEWS, STOPPED, FAILED = range(4)
"""What a process answers to a roll call; the largest answer decides."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a process says when there is something to say."""

    kind: int
    alerts: tuple[Alert, ...] = ()
    error: tuple[str, str, str] = ("", "", "")  # class, message, advice


class World:
    """The processes that train together, seen from one of them.

    Args:
        rank: number of this process, from 0; process 0 leads: it alone writes files and reports.
        size: how many there are.
        control: group over which objects and small numbers in main memory travel; ``None`` when alone.
    """

    def __init__(self, rank: int = 0, size: int = 1, control: dist.ProcessGroup | None = None) -> None:
        self.rank = rank
        self.size = size
        self._control = control
        self._alerts: list[Alert] = []
        self._told: BaseException | None = None
        self._lost = ""

    @property
    def leads(self) -> bool:
        """Whether this is process 0, or the only one."""
        return self.rank == 0

    def __repr__(self) -> str:
        return f"World(rank={self.rank}, size={self.size})"

    # -- who is still there -------------------------------------------------------------------

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is raised inside by one process is raised by all, and all leave at the same time.

        Raises:
            Stopped: a process was asked to stop.
            CorrigibleError: what a process raised (``process_failed`` when that is none of ours), or
                ``process_lost``.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except BaseException as error:
            if error is not self._told:  # what a roll call has told is known to all already
                self._tell(error)
            raise
        self.roll_call()

    def _tell(self, error: BaseException) -> None:
        if self._lost:
            return
        try:
            self.roll_call(error)
        except CorrigibleError as theirs:
            # Others' failure outweighs a wish to stop; that nobody listens outweighs no failure.
            if isinstance(error, Stopped) or not theirs.message.startswith(LOST):
                raise

    def roll_call(self, error: BaseException | None = None) -> None:
        """Wait for all processes; raise when one of them has failed or must stop.

        Args:
            error: what this process failed with.

        Raises:
            Stopped, CorrigibleError: as :meth:`together`. Where this process itself has failed nothing is
                raised: the caller raises what it has.
        """
        if self.size == 1:
            return
        kind = NEWS if self._alerts and not self.leads else WELL
        if error is not None:
            kind = STOPPED if isinstance(error, Stopped) else FAILED
        worst = torch.tensor([kind])
        self._exchange(dist.all_reduce, worst, dist.ReduceOp.MAX, group=self._control)
        if int(worst) == WELL:
            self._alerts.clear()
            return
        answers = self._gather(_Answer(kind, tuple(self._alerts), _described(error)))
        self._pass_on(answers)
        if int(worst) == NEWS:
            return
        # What this process raises itself, it raises with its own traceback; a failure outweighs a wish.
        if kind == int(worst):
            self._told = error
            return
        self._told = self._error_of(answers) if int(worst) == FAILED else Stopped()
        raise self._told

    def _error_of(self, answers: Sequence[_Answer]) -> CorrigibleError:
        rank, answer = next((i, a) for i, a in enumerate(answers) if a.kind == FAILED)
        name, message, advice = answer.error
        kind = getattr(errors, name, None)
        if not (isinstance(kind, type) and issubclass(kind, CorrigibleError)):
            return CorrigibleError(
                f"process_failed: process {rank} of {self.size} raised {name}: {message}", advice=advice
            )
        found = kind(message, advice=advice)
        found.add_note(f"In process {rank} of {self.size}.")
        return found

    def _pass_on(self, answers: Sequence[_Answer]) -> None:
        """Process 0 reports the alerts that only others have raised."""
        known = {alert.name for alert in self._alerts}
        self._alerts.clear()
        if not self.leads:
            return
        for answer in answers[1:]:
            for alert in answer.alerts:
                if alert.name not in known:
                    known.add(alert.name)
                    emit(alert)
        self._alerts.clear()

    def has_told(self, error: BaseException) -> bool:
        """Whether all processes raise this error: then it is enough that process 0 reports it."""
        return error is self._told and not self._lost

    @contextmanager
    def reporting(self, bus: EventBus) -> Iterator[EventBus]:
        """The bus to emit on: ``bus`` for process 0, elsewhere one that only hands alerts on to process 0."""
        if self.size == 1:
            yield bus
            return

        def keep(event: AnyEvent) -> None:
            if isinstance(event, Alert):
                self._alerts.append(event)

        chosen = bus if self.leads else EventBus(run=bus.run)
        unsubscribe = chosen.subscribe(keep)
        try:
            yield chosen
        finally:
            unsubscribe()

    # -- sharing out and putting together -----------------------------------------------------

    def share(self, items: Sequence[T], size: Callable[[T], int]) -> list[T]:
        """This process's part of ``items``: disjoint from the others', all together everything.

        The largest item goes first, each to whoever has least so far (Graham 1969, "Bounds on
        multiprocessing timing anomalies": at most 4/3 of the best possible), so shares are about
        equal and depend on nothing but the sizes. There may be nothing for this process.

        Args:
            items: in an order that is the same in every process.
            size: what an item costs.
        """
        if self.size == 1:
            return list(items)
        owners = _balanced([size(item) for item in items], self.size)
        return [item for item, owner in zip(items, owners, strict=True) if owner == self.rank]

    def in_step(self, share: Sequence[T]) -> Iterator[T]:
        """This process's share of long work, with a roll call after each item: failures are known at once.

        Raises:
            Stopped, CorrigibleError: as :meth:`together`, inside of which this must be.
        """
        for number in range(max(self.gather(len(share)))):
            if number < len(share):
                yield share[number]
            self.roll_call()

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank. Small ones: they travel pickled through main memory.

        Raises:
            Stopped, CorrigibleError: as :meth:`together`.
        """
        if self.size == 1:
            return [value]
        self.roll_call()
        return self._gather(value)

    def merge(self, found: Mapping[K, Tensor]) -> dict[K, Tensor]:
        """What the processes have computed for different keys, in one; in main memory if they are several.

        Raises:
            Stopped, CorrigibleError: as :meth:`together`.
        """
        if self.size == 1:
            return dict(found)
        shares = self.gather({key: value.cpu() for key, value in found.items()})
        return {key: value for share in shares for key, value in share.items()}

    def by_lead(self, work: Callable[[], T]) -> T:
        """Have process 0 do something that must be done once; all get its result, or its error.

        Raises:
            Stopped, CorrigibleError: as :meth:`together`, inside of which this must be.
        """
        if self.size == 1:
            return work()
        return self.gather(work() if self.leads else None)[0]  # type: ignore[return-value]

    def sum_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Each metric added up over the processes that have it; in every process the same bits."""
        if self.size == 1:
            return dict(metrics)
        total: dict[str, float] = {}
        for found in self.gather(dict(metrics)):
            for name, value in found.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make every ``grad`` the sum over all processes, added in float32 or wider.

        A parameter without gradient counts as zeros, unless no process has one: it stays without. So a
        process whose share was empty takes part like the others.

        Raises:
            Stopped, CorrigibleError: as :meth:`together`.
        """
        if self.size == 1:
            return
        self.roll_call()
        present = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
        self._exchange(dist.all_reduce, present, dist.ReduceOp.MAX, group=self._control)
        found = [parameter for parameter, there in zip(parameters, present.tolist(), strict=True) if there]
        for some in _chunks(found, SUMMED_TOGETHER):
            flat = torch.cat([_wide_gradient(parameter) for parameter in some])
            self._exchange(dist.all_reduce, flat)
            for parameter, total in zip(some, flat.split_with_sizes([p.numel() for p in some]), strict=True):
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                parameter.grad.copy_(total.view_as(parameter))

    def owners(self, parameters: Sequence[nn.Parameter]) -> list[int]:
        """Who updates each parameter when the optimiser's state is sharded; about equal in weights."""
        return _balanced([parameter.numel() for parameter in parameters], self.size)

    @torch.no_grad()
    def spread(self, parameters: Sequence[nn.Parameter], owners: Sequence[int]) -> None:
        """Give every process the values that each parameter has in its owner's.

        Args:
            parameters: the same in every process.
            owners: rank of the owner of each.

        Raises:
            Stopped, CorrigibleError: as :meth:`together`.
        """
        if self.size == 1:
            return
        self.roll_call()
        for rank in range(self.size):
            owned = [p for p, owner in zip(parameters, owners, strict=True) if owner == rank]
            for dtype in sorted({parameter.dtype for parameter in owned}, key=str):
                for some in _chunks([p for p in owned if p.dtype == dtype], SUMMED_TOGETHER):
                    flat = torch.cat([parameter.detach().reshape(-1) for parameter in some])
                    self._exchange(dist.broadcast, flat, rank)
                    for parameter, value in zip(
                        some, flat.split_with_sizes([p.numel() for p in some]), strict=True
                    ):
                        if rank != self.rank:
                            parameter.copy_(value.view_as(parameter))

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All processes' tensors in process 0's main memory; nothing elsewhere.

        Args:
            tensors: named differently in every process.

        Raises:
            Stopped, CorrigibleError: as :meth:`together`.
        """
        if self.size == 1:
            return dict(tensors)
        shapes = self.gather({name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
        found = dict(tensors) if self.leads else {}
        for rank, theirs in enumerate(shapes[1:], start=1):
            for name, (shape, dtype) in theirs.items():
                if self.rank == rank:
                    value = tensors[name].detach().cpu().contiguous()
                    self._exchange(dist.send, _bytes(value), 0, group=self._control)
                elif self.leads:
                    found[name] = torch.empty(shape, dtype=dtype)
                    self._exchange(dist.recv, _bytes(found[name]), rank, group=self._control)
        return found

    def check_same(self, what: Mapping[str, Any]) -> None:
        """Refuse to train together on different things.

        Args:
            what: by name, values that must be equal in all processes.

        Raises:
            BadInputError: ``processes_differ``, with the names.
            Stopped, CorrigibleError: as :meth:`together`.
        """
        for rank, theirs in enumerate(self.gather(dict(what))):
            different = [name for name in what if theirs.get(name) != what[name]]
            if different:
                raise BadInputError(
                    f"processes_differ: process {rank} has another {' and another '.join(different)} than "
                    f"process {self.rank}.",
                    advice="Every process must load the same model and data with the same settings, and see "
                    "the same folder.",
                )

    # -- the wire -----------------------------------------------------------------------------

    def _gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        self._exchange(dist.all_gather_object, found, value, group=self._control)
        return found

    def _exchange(self, operation: Callable[..., object], *args: Any, **options: Any) -> None:
        try:
            if self._lost:
                raise RuntimeError(self._lost)
            operation(*args, **options)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            if not self._lost:
                self._lost = _said(error)
            self._told = CorrigibleError(
                f"{LOST}: process {self.rank} of {self.size} has lost touch with the others ({self._lost}).",
                advice="One of them was killed, ran out of memory or hangs; its own output may say more. The "
                "last checkpoint is intact.",
            )
            raise self._told from error


def join(patience: timedelta = PATIENCE) -> World:
    """The processes that this one trains with: those of the process group, those of torchrun, or none.

    Under torchrun the first call makes the process group (gloo between processors, NCCL between GPUs) and
    chooses this process's GPU, so call it before a policy is loaded onto one. ``Trainer`` and ``train_dpo``
    call it themselves.

    Args:
        patience: how long to wait for a process that is alive but does not come.

    Raises:
        CorrigibleError: ``process_lost``: the others cannot be reached.
    """
    global _joined
    if not dist.is_available():
        return World()
    if not dist.is_initialized():
        wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if any(name not in os.environ for name in wanted) or int(os.environ["WORLD_SIZE"]) < 2:
            return World()
        try:
            dist.init_process_group(_backend(), timeout=patience)
        except (RuntimeError, ValueError) as error:
            raise CorrigibleError(
                f"{LOST}: the other processes cannot be reached ({_said(error)}).",
                advice="Start them together with torchrun, which sets the address for each.",
            ) from error
        atexit.register(_leave)
    if _joined is None or _joined[0] is not dist.group.WORLD:
        control = dist.new_group(backend="gloo", timeout=patience)
        _joined = (dist.group.WORLD, World(dist.get_rank(), dist.get_world_size(), control))
    return _joined[1]


_joined: tuple[Any, World] | None = None


def leads() -> bool:
    """Whether this process is the one that reports, as far as the environment tells; joins nothing."""
    return int(os.environ.get("WORLD_SIZE", "1")) < 2 or os.environ.get("RANK", "0") == "0"


def _backend() -> Literal["gloo", "cpu:gloo,cuda:nccl"]:
    local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    if not torch.cuda.is_available():
        return "gloo"
    torch.cuda.set_device(local % torch.cuda.device_count())
    # NCCL wants a GPU for each process; where some share one, gloo carries its tensors as well.
    shared = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])) > torch.cuda.device_count()
    return "gloo" if shared else "cpu:gloo,cuda:nccl"


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _said(error: Exception) -> str:
    """The first sentence of a message of torch's, without the line of the source it comes from."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+\] ", "", first).split(". ")[0]


def _described(error: BaseException | None) -> tuple[str, str, str]:
    """The name of the first class that all processes know, the message, and the advice."""
    if error is None:
        return ("", "", "")
    if isinstance(error, CorrigibleError):
        name = next(each.__name__ for each in type(error).__mro__ if each.__module__ == errors.__name__)
        return (name, error.message, error.advice)
    return (type(error).__name__, str(error), "")


def _balanced(sizes: Sequence[int], parts: int) -> list[int]:
    """The part in ``[0, parts)`` of each item."""
    loads = [0] * parts
    chosen = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        chosen[index] = min(range(parts), key=lambda part: (loads[part], part))
        loads[chosen[index]] += sizes[index]
    return chosen


def _chunks(parameters: Sequence[nn.Parameter], most: int) -> Iterator[list[nn.Parameter]]:
    """Neighbours that hold ``most`` weights together, or one that alone holds more."""
    some: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if some and size + parameter.numel() > most:
            yield some
            some, size = [], 0
        some.append(parameter)
        size += parameter.numel()
    if some:
        yield some


def _wide_gradient(parameter: nn.Parameter) -> Tensor:
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    if parameter.grad is None:
        return torch.zeros(parameter.numel(), dtype=wide, device=parameter.device)
    return parameter.grad.detach().reshape(-1).to(wide)


def _bytes(value: Tensor) -> Tensor:
    """The same memory as bytes: gloo does not know every type."""
    return value.reshape(-1).view(torch.uint8) if value.numel() else torch.empty(0, dtype=torch.uint8)
