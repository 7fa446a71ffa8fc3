from __future__ import annotations

from collections.abc import Callable

import pytest

from corrigible.records import Episode, FinishReason, Message, Sampling, Step

MakeEpisode = Callable[..., Episode]


@pytest.fixture
def episode() -> MakeEpisode:
    def make(prompt: str, answer: str, *, policy: str = "p1", task: str = "t") -> Episode:
        step = Step(
            observation=(Message(role="user", content=prompt),),
            action=Message(role="assistant", content=answer),
            logprobs=(-0.5, -0.25),
            token_ids=(5, 6),
            prompt_token_ids=(1, 2),
            finish_reason=FinishReason.stop,
            done=True,
        )
        return Episode(task=task, policy=policy, sampling=Sampling(max_tokens=8), steps=(step,))

    return make
