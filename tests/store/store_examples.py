"""Records for the tests of the store, and what the processes they start do."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

from corrigible.records import (
    Annotator,
    Episode,
    Feedback,
    Item,
    Message,
    PolicyRef,
    PolicyVersion,
    Rating,
    Reaction,
    Scale,
    Step,
    TargetRef,
    comparison,
)
from corrigible.store import Store

T0 = 1_700_000_000_000_000
FIVE = Scale(id="five", min=1, max=5, step=1, level="ordinal")


def vote(number: int = 0, **envelope: object) -> tuple[Feedback, list[Item]]:
    """A comparison of its own: prompt, responses and annotator all depend on ``number``."""
    who = Annotator(pseudonym=str(envelope.pop("who", f"person-{number % 3}")), type="human")
    envelope.setdefault("created_at", T0 + number)
    return comparison(f"Question {number}?", f"Yes, {number}.", f"No, {number}!", annotator=who, **envelope)  # type: ignore[arg-type]


def votes(n: int, start: int = 0) -> Iterator[Feedback]:
    for number in range(start, start + n):
        yield vote(number)[0]


def mixed(n: int, seed: int) -> list[Feedback]:
    """Feedback of several kinds with few distinct values of everything that can be filtered on, and times
    that often collide."""
    draw = random.Random(seed)
    found = []
    for number in range(n):
        target = TargetRef.of(
            Item.of_text(f"answer {draw.randrange(6)}", "response"), episode=f"e{number % 5}"
        )
        fields: dict[str, object] = {
            "annotator": Annotator(pseudonym=f"p{draw.randrange(4)}", type="human"),
            "task_id": draw.choice([None, "t1", "t2"]),
            "campaign_id": draw.choice([None, "c1"]),
            "policy": draw.choice([None, (PolicyRef(snapshot=f"v{draw.randrange(3)}"),)]),
            "created_at": T0 + draw.randrange(max(2, n // 4)),
        }
        payload = draw.choice(
            [
                Reaction(value=1),
                Rating(value=draw.randint(1, 5), scale=FIVE, criterion=draw.choice(["help", "tone"])),
            ]
        )
        found.append(Feedback.on([target], payload, **fields))  # type: ignore[arg-type]
    return found


def episode(number: int, **fields: object) -> Episode:
    step = Step(
        observation=(Message(role="user", content=f"Say {number}"),),
        action=Message(role="assistant", content=f"{number}."),
        logprobs=(-0.25, -1.5),
        token_ids=(number, 2),
        prompt_token_ids=(5, 6),
        done=True,
    )
    given: dict[str, object] = {"task": f"task-{number % 2}", "created_at": T0 + number, **fields}
    return Episode(steps=(step,), **given)  # type: ignore[arg-type]


def policy(name: str, **fields: object) -> PolicyVersion:
    return PolicyVersion(name=name, base_model="tiny-random", weights="0" * 64, **fields)  # type: ignore[arg-type]


def write_batches(url: str, folder: Path, writer: int, batches: int, size: int) -> None:
    """Add ``batches`` times ``size`` votes that no other writer adds."""
    draw = random.Random(writer)
    with Store.open(url, blobs=folder / "blobs", timeout=60) as store:
        for batch in range(batches):
            # Rows exist a while before they are committed: the moment in which a sequence would lie.
            with store.transaction() as transaction:
                transaction.add_feedback(votes(size, start=(writer * batches + batch) * size))
                time.sleep(draw.random() * 0.01)
            time.sleep(draw.random() * 0.005)
