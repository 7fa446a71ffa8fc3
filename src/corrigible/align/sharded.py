"""An optimiser whose state is shared out over the processes that train together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from corrigible.align.distributed import World
from corrigible.errors import BadInputError
from corrigible.models.optimiser import Group, Optimiser


class ShardedOptimiser(Optimiser):
    """Each process holds masters and moments of its own parameters only, updates those, and hands them out.

    Stage 1 of ZeRO (Rajbhandari et al. 2020, section 5.1): of ``n`` processes each keeps about ``1 / n`` of
    the optimiser's state; weights and gradients stay whole everywhere. The update is the one of
    :class:`~corrigible.models.optimiser.Optimiser`, whose state it reads and writes. A parameter is never
    cut, so one that is larger than all others together is still held by one process.

    Every process calls every method, but :meth:`~corrigible.models.optimiser.Optimiser.state` (what this
    process holds), together.

    Args:
        world: the processes.
        groups, settings: as of ``Optimiser``; the same in every process, gradients of the whole batch.

    Raises:
        BadInputError: as ``Optimiser``, and when there are more processes than parameters.
    """

    def __init__(self, world: World, *groups: Group, **settings: Any) -> None:
        self.world = world
        self.everything = {name: p for group in groups for name, p in group.parameters.items()}
        if len(self.everything) < world.size:
            raise BadInputError(
                f"{len(self.everything)} parameters cannot be shared out over {world.size} processes.",
                advice="Use fewer processes, or shard='nothing'.",
            )
        self.owners = world.owners(list(self.everything.values()))
        mine = {name for name, owner in zip(self.everything, self.owners, strict=True) if owner == world.rank}
        super().__init__(
            *(
                replace(group, parameters={n: p for n, p in group.parameters.items() if n in mine})
                for group in groups
            ),
            **settings,
        )

    def norm(self) -> float:
        """Length of all gradients together, each process's share measured by its owner."""
        return math.hypot(*self.world.gather(super().norm()))

    def step(self, lr: float, scale: float = 1.0) -> None:
        """Update this process's parameters, free all gradients, and give everyone everyone's."""
        super().step(lr, scale)
        self.clear()
        self._hand_out()

    def clear(self) -> None:
        """Forget the gradients, the others' as well."""
        for parameter in self.everything.values():
            parameter.grad = None

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """As ``Optimiser`` gives them; of the others' parameters the weights themselves."""
        for name, parameter in self.everything.items():
            yield name, self.master(name).view(parameter.shape)

    def master(self, name: str, every: int = 1) -> Tensor:
        """Every ``every``-th weight of a parameter as :meth:`masters` gives them, ``(k,)``."""
        if name in self._where:
            return super().master(name, every)
        weights = self.everything[name].detach().view(-1)[::every]
        return weights if weights.itemsize >= 4 else weights.float()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the state of all processes together.

        Raises:
            BadInputError: as ``Optimiser``.
        """
        others = self.everything.keys() - self._where.keys()
        super().load({key: value for key, value in state.items() if key.partition(".")[2] not in others})
        self._hand_out()

    def _hand_out(self) -> None:
        self.world.spread(list(self.everything.values()), self.owners)
