from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from corrigible.records import Episode, FinishReason, Message, Sampling, Step

MakeEpisode = Callable[..., Episode]


@pytest.fixture
def episode() -> MakeEpisode:
    def make(prompt: str, answer: str, **more: Any) -> Episode:
        finish = more.pop("finish", FinishReason.stop)
        step = Step(
            observation=(Message(role="user", content=prompt),),
            action=Message(role="assistant", content=answer),
            token_ids=tuple(range(len(answer.split()))),
            finish_reason=finish,
            done=True,
        )
        return Episode(task="t", policy=more.pop("policy", "p"), sampling=Sampling(), steps=(step,), **more)

    return make
