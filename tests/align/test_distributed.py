"""Two processes train like one: same gradient, same weights, one voice, and they end together.

The processes are forks of one that has imported everything; they meet over gloo on this machine. What
each of them does is a *job*, a function of this module, named in the test that asks for it.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.align.conftest import build_pairs, build_policy
from torch import Tensor

from corrigible.align import (
    ALGORITHMS,
    AlgorithmConfig,
    DPOConfig,
    GroupExample,
    GRPOConfig,
    KTOConfig,
    PairSource,
    ScoredExamples,
    TrainConfig,
    Trainer,
    TrainResult,
    UnpairedSource,
    train_dpo,
)
from corrigible.align import trainer as trainer_module
from corrigible.align.attribution import Ledger, Origin, Stretch, TracedRow
from corrigible.align.checkpoint import load_latest
from corrigible.align.distributed import World, join
from corrigible.align.sharded import ShardedOptimiser
from corrigible.align.sources import Example
from corrigible.errors import BadInputError, CorrigibleError, NumericsError, StorageError
from corrigible.events import Alert, AnyEvent, EventBus, Metric, Progress, emit
from corrigible.models import LanguagePolicy, Rendered, TokenKind
from corrigible.models.optimiser import Group
from corrigible.models.scoring import Scorer
from corrigible.store import labelled_from_pairs

COSINE, NORM = 0.999999, 1e-5

# -- what the processes do --------------------------------------------------------------------------


def disturbed(policy: LanguagePolicy, seed: int) -> LanguagePolicy:
    """Give a fresh adapter an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


@dataclasses.dataclass
class Fixed:
    """A source whose batches are all its examples."""

    examples: Sequence[Example]
    kind: str

    def steps_per_epoch(self, batch_size: int) -> int:
        return 1

    def batch(self, step: int, batch_size: int) -> Sequence[Example]:
        return self.examples

    def digest(self) -> str:
        return "fixed"


def groups(count: int) -> Fixed:
    """Groups of 2 to 5 random answers, some of them never recorded."""
    rng = random.Random(5)
    found = []
    for _ in range(count):
        prompt = tuple(rng.randrange(3, 259) for _ in range(rng.randint(2, 30)))
        rows, behaviour = [], []
        for number in range(rng.randint(2, 5)):
            answer = tuple(rng.randrange(3, 259) for _ in range(rng.randint(1, 12)))
            rows.append(
                Rendered(
                    prompt + answer, (TokenKind.PROMPT,) * len(prompt) + (TokenKind.SAMPLED,) * len(answer)
                )
            )
            behaviour.append(None if number == 1 else tuple(-5.5 + rng.random() for _ in answer))
        advantages = tuple(rng.uniform(-1, 1) for _ in rows)
        found.append(GroupExample(tuple(rows), advantages, advantages, tuple(behaviour)))
    return Fixed(found, "groups")


def trainer_of(
    out: Path, algorithm: str = "dpo", *, count: int = 7, dtype: str = "float32", **settings: Any
) -> Trainer:
    """A policy away from its reference, and ``count`` examples of uneven size and weight in a batch."""
    # KTO's reference point is only felt where the policy says more than its reference does.
    mine, other = (2, 1) if algorithm == "kto" else (1, 2)
    policy = disturbed(build_policy(dtype=dtype), mine)
    pairs = [dataclasses.replace(pair, weight=0.5 + i % 3) for i, pair in enumerate(build_pairs(count))]
    config: AlgorithmConfig
    source: Any
    if algorithm == "dpo":
        source, config = PairSource(pairs, policy.renderer, max_length=256), DPOConfig(beta=0.5)
    elif algorithm == "kto":
        labelled = labelled_from_pairs(pairs)[:count]
        source, config = UnpairedSource(labelled, policy.renderer, max_length=256), KTOConfig(beta=0.5)
    else:
        source, config = groups(count), GRPOConfig(aggregation="dapo", beta=0.2)
    return Trainer(
        policy,
        ALGORITHMS[algorithm],
        source,
        TrainConfig.model_validate({"batch_size": count, "micro_batch_tokens": 300} | settings),
        algorithm_config=config,
        out=out,
        reference_policy=disturbed(build_policy(dtype=dtype), other),
    )


@dataclasses.dataclass
class Learnt:
    """One batch, as one process sees it."""

    gradient: Tensor
    metrics: dict[str, float]
    reference: dict[bytes, Tensor]
    forward: int  # rows that this process read with gradient


def learn(out: Path, algorithm: str = "dpo", count: int = 7, fault: str = "") -> Learnt:
    """One batch's gradient."""
    trainer = trainer_of(out, algorithm, count=count)
    rows = 0
    plain = Trainer._logprobs

    def counted(self: Trainer, groups: Sequence[Sequence[Rendered]], *, grad: bool) -> list[Tensor]:
        nonlocal rows
        rows += grad * sum(map(len, groups))
        return plain(self, groups, grad=grad)

    Trainer._logprobs = counted  # type: ignore[method-assign]
    if fault == "mean of means":
        whole = World.sum_gradients

        def halved(self: World, parameters: Sequence[torch.nn.Parameter]) -> None:
            whole(self, parameters)
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad /= self.size

        World.sum_gradients = halved  # type: ignore[method-assign]
    if fault == "z0 of a share":
        whole_measure, rank = trainer.algorithm.measure, trainer.world.rank

        def of_a_share(batch: ScoredExamples[Any], config: Any) -> Any:
            assert whole_measure is not None and batch.reference is not None
            part = dataclasses.replace(
                batch, policy=batch.policy[rank::2], reference=batch.reference[rank::2]
            )
            return whole_measure(part, config)

        trainer.algorithm = dataclasses.replace(trainer.algorithm, measure=of_a_share)
    with trainer.world.together():
        trainer._prepare_reference()
        metrics = trainer.accumulate(trainer.source.batch(0, count))
    gradient = torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten().double()
            for p in trainer.parameters.values()
        ]
    )
    return Learnt(gradient, metrics, trainer.reference or {}, rows)


@dataclasses.dataclass
class Trained:
    """A whole run, as one process sees it."""

    result: TrainResult
    weights: dict[str, Tensor]
    events: list[AnyEvent]
    state: int  # bytes that the optimiser holds


def train(out: Path, resume: bool = False, fault: str = "", ledger: bool = False, **settings: Any) -> Trained:
    """A run of a few steps, in which one process may have a fault."""
    rank = join().rank
    trainer = trainer_of(out, **({"steps": 3, "lr": 1e-3, "eps": 1e-4} | settings))
    events: list[AnyEvent] = []
    trainer.bus = EventBus()
    trainer.bus.subscribe(events.append)
    if ledger:
        rows = [row for example in trainer.source.examples for row in example.rows]
        whole = [(Stretch(Origin.demonstrated, len(row.scored)),) for row in rows]
        trainer.ledger = Ledger(
            [TracedRow(row, stretches, cluster=0) for row, stretches in zip(rows, whole, strict=True)], {}
        )
    FAULTS.get(fault, lambda trainer, rank: None)(trainer, rank)
    result = trainer.train(resume=resume)
    weights = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    held = sum(
        value.nbytes for name, value in trainer.optimiser.state().items() if not name.startswith("weight.")
    )
    return Trained(result, weights, events, held)


def in_step_2(rank: int, act: Callable[[Trainer], None]) -> Callable[[Trainer, int], None]:
    """A fault of process ``rank`` when its second step begins."""

    def install(trainer: Trainer, mine: int) -> None:
        plain = trainer._step

        def step(number: int) -> dict[str, float]:
            if number == 1 and mine == rank:
                act(trainer)
            return plain(number)

        trainer._step = step  # type: ignore[method-assign]

    return install


def spoil(trainer: Trainer) -> None:
    with torch.no_grad():
        next(iter(trainer.parameters.values())).fill_(torch.nan)


def bug(trainer: Trainer) -> None:
    raise ZeroDivisionError("a bug")


def full_disk(trainer: Trainer, rank: int) -> None:
    def refuse(*_: Any) -> None:
        raise StorageError("The disk is full.", advice="Free some space.")

    trainer_module.save_checkpoint = refuse  # type: ignore[assignment]


def other_data(trainer: Trainer, rank: int) -> None:
    if rank == 1:
        trainer.source.digest = lambda: "other"  # type: ignore[method-assign]


def bad_reference(trainer: Trainer, rank: int) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise NumericsError("reference_not_finite: the reference gives NaN.")

    if rank == 1:
        Scorer.__call__ = refuse  # type: ignore[method-assign, assignment]


def other_reference(trainer: Trainer, rank: int) -> None:
    if rank == 1:
        trainer.reference_policy = disturbed(build_policy(), 3)


def drift(trainer: Trainer) -> None:
    with torch.no_grad():
        next(iter(trainer.parameters.values())).add_(1e-3)


FAULTS: dict[str, Callable[[Trainer, int], None]] = {
    "NaN in process 0": in_step_2(0, spoil),
    "NaN in process 1": in_step_2(1, spoil),
    "a bug": in_step_2(1, bug),
    "a full disk": full_disk,
    "other data": other_data,
    "a bad reference": bad_reference,
    "another reference": other_reference,
    "other weights": in_step_2(1, drift),
    "killed": in_step_2(1, lambda trainer: os.kill(os.getpid(), signal.SIGKILL)),
    "asked to stop": in_step_2(1, lambda trainer: os.kill(os.getpid(), signal.SIGTERM)),
    "an alert": in_step_2(1, lambda trainer: emit(Alert(name="only_here", message="In process 1."))),
}


def describe(out: Path) -> Any:
    pairs = build_pairs(12)
    return train_dpo(
        pairs[:8], build_policy(), out=out, config=TrainConfig(steps=1, batch_size=4), held_out=pairs[8:]
    )


def put_together(out: Path) -> list[Any]:
    """What is put together, and in which order."""
    world = join()
    with world.together():
        ours = world.share([5, 1, 9, 3, 3], lambda size: size)
        summed = world.sum_metrics({"both": 1.5, f"only {world.rank}": 2.0})
        tensors = {f"tensor {world.rank}": torch.arange(3, dtype=torch.bfloat16) + world.rank}
        collected = world.collect(tensors | {f"scalar {world.rank}": torch.tensor(world.rank)})
    return [ours, summed, collected]


def child(job: str, out: Path, options: dict[str, Any]) -> int:
    """Do a job in this process and leave what it gave in ``out``."""
    answer: Any
    try:
        join(timedelta(seconds=60))
        answer, code = globals()[job](out, **options), 0
    except CorrigibleError as error:
        answer, code = f"{type(error).__name__}: {error}", error.exit_code
    except BaseException:
        answer, code = traceback.format_exc(), 1
    torch.save(answer, out / f"answer-{os.environ['RANK']}.pt")
    return code


# -- starting them ----------------------------------------------------------------------------------

NURSERY = textwrap.dedent(
    """
    import json, os, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import torch
    torch.set_num_threads(1)
    from tests.align import conftest, test_distributed
    conftest.build_policy()  # whatever is imported late is imported before the first fork
    for line in sys.stdin:
        job, out, port, size, options = json.loads(line)
        children = []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os._exit(test_distributed.child(job, Path(out), options))
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(each, 0)[1]) for each in children]
        print(json.dumps(codes), flush=True)
    """
)

Start = Callable[..., list[Any]]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Runs a job in two processes; gives their answers, after a check of their exit codes."""
    nursery = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", NURSERY, str(Path(__file__).parents[2])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )

    def run(
        job: Callable[..., Any], out: Path, *, size: int = 2, ends: Sequence[int] = (0, 0), **options: Any
    ) -> list[Any]:
        assert nursery.stdin and nursery.stdout
        out.mkdir(parents=True, exist_ok=True)
        line = [job.__name__, str(out), free_port(), size, options]
        nursery.stdin.write(json.dumps(line) + "\n")
        nursery.stdin.flush()
        codes = json.loads(nursery.stdout.readline())
        paths = [out / f"answer-{rank}.pt" for rank in range(size)]
        answers = [torch.load(path, weights_only=False) if path.exists() else None for path in paths]
        assert codes == list(ends), answers
        return answers

    yield run
    nursery.communicate()


# -- one gradient -----------------------------------------------------------------------------------


def same(a: Tensor, b: Tensor) -> bool:
    cosine = float(torch.dot(a, b) / (a.norm() * b.norm()))
    return cosine >= COSINE and abs(float(a.norm() / b.norm()) - 1) <= NORM


@pytest.mark.parametrize("algorithm", ["dpo", "kto", "grpo"])
def test_two_processes_have_the_gradient_of_one(algorithm: str, start: Start, tmp_path: Path) -> None:
    first, second = start(learn, tmp_path / "two", algorithm=algorithm)
    alone = learn(tmp_path / "one", algorithm)
    assert torch.equal(first.gradient, second.gradient)
    assert same(first.gradient, alone.gradient)
    assert first.metrics == second.metrics
    assert first.metrics == pytest.approx(alone.metrics, rel=1e-4, abs=1e-5)
    # Each has read its share and no more, yet knows every row's reference.
    assert min(first.forward, second.forward) > 0
    assert first.forward + second.forward == alone.forward
    assert first.reference.keys() == second.reference.keys() == alone.reference.keys()
    for key, values in alone.reference.items():
        assert torch.equal(first.reference[key], second.reference[key])
        torch.testing.assert_close(first.reference[key], values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_a_process_without_a_share_adds_zeros(size: int, start: Start, tmp_path: Path) -> None:
    several = start(learn, tmp_path / "several", size=size, ends=[0] * size, count=size - 1)
    alone = learn(tmp_path / "one", count=size - 1)
    assert [each.forward for each in several] == [2] * (size - 1) + [0]
    for each in several:
        assert torch.equal(each.gradient, several[0].gradient) and same(each.gradient, alone.gradient)
        assert each.metrics == pytest.approx(alone.metrics, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("algorithm", "fault"), [("dpo", "mean of means"), ("kto", "z0 of a share")])
def test_a_denominator_of_a_process_turns_it_red(
    algorithm: str, fault: str, start: Start, tmp_path: Path
) -> None:
    first, _ = start(learn, tmp_path / "two", algorithm=algorithm, fault=fault)
    alone = learn(tmp_path / "one", algorithm)
    assert algorithm == "dpo" or alone.metrics["z0"] > 0.01
    assert not same(first.gradient, alone.gradient)
    if fault == "mean of means":  # it is the factor that turned it red, and nothing but the factor
        assert same(2 * first.gradient, alone.gradient)


def test_what_is_put_together(start: Start, tmp_path: Path) -> None:
    (ours, summed, collected), (theirs, same_sum, nothing) = start(put_together, tmp_path)
    assert (ours, theirs) == ([1, 9], [5, 3, 3])
    assert summed == same_sum == {"both": 3.0, "only 0": 2.0, "only 1": 2.0}
    assert nothing == {}
    assert {name: value.tolist() for name, value in collected.items()} == {
        "tensor 0": [0, 1, 2],
        "tensor 1": [1, 2, 3],
        "scalar 0": 0,
        "scalar 1": 1,
    }
    assert collected["tensor 1"].dtype == torch.bfloat16


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_lose_nothing_and_are_about_equal(size: int) -> None:
    rng = random.Random(size)
    sizes = [rng.randint(1, 500) for _ in range(40)]
    shares = [World(rank, size).share(range(40), sizes.__getitem__) for rank in range(size)]
    assert sorted(index for share in shares for index in share) == list(range(40))
    assert shares == [World(rank, size).share(range(40), sizes.__getitem__) for rank in range(size)]
    loads = [sum(sizes[index] for index in share) for share in shares]
    # Graham 1969, theorem 2: at most 4/3 - 1/(3 m) of the best, which is no less than the mean.
    assert max(loads) <= (4 / 3) * max(sum(sizes) / size, max(sizes))


# -- one run ----------------------------------------------------------------------------------------


def near(found: dict[str, Tensor], wanted: dict[str, Tensor], start: dict[str, Tensor]) -> bool:
    """The same way from the start, to the rounding that Adam's quotient makes larger."""
    a, b = (torch.cat([(w[n] - start[n]).flatten().double() for n in start]) for w in (found, wanted))
    return float((a - b).norm() / b.norm()) < 1e-4


def starting_weights() -> dict[str, Tensor]:
    policy = disturbed(build_policy(), 1)
    return {name: p.detach().clone() for name, p in policy.model.named_parameters() if p.requires_grad}


def test_two_processes_train_like_one_and_speak_with_one_voice(start: Start, tmp_path: Path) -> None:
    first, second = start(train, tmp_path / "two", ledger=True)
    alone = train(tmp_path / "one", ledger=True)
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)
    assert near(first.weights, alone.weights, starting_weights())
    times = {"tokens_per_second"}
    for trained in (first, second):
        kept = {name: value for name, value in trained.result.metrics.items() if name not in times}
        assert kept == pytest.approx({name: alone.result.metrics[name] for name in kept}, rel=1e-3, abs=1e-4)
    assert first.result.weights_sha256 == second.result.weights_sha256

    assert second.events == []
    heard = [event for event in first.events if isinstance(event, Progress | Metric)]
    wanted = [event for event in alone.events if isinstance(event, Progress | Metric)]
    mine = [e for e in heard if not (isinstance(e, Progress) and e.task.startswith("reference"))]
    assert [type(e) for e in mine] == [
        type(e) for e in wanted if not (isinstance(e, Progress) and e.task.startswith("reference"))
    ]
    files = {str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").rglob("*")}
    answers = {"answer-0.pt", "answer-1.pt"}
    assert {
        str(path.relative_to(tmp_path / "two")) for path in (tmp_path / "two").rglob("*")
    } == files | answers
    history = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in history] == [1, 2, 3]


def test_asked_to_stop_all_stop_after_the_same_step_and_go_on(start: Start, tmp_path: Path) -> None:
    whole, _ = start(train, tmp_path / "whole")
    said = start(train, tmp_path / "two", fault="asked to stop", ends=(130, 130))
    assert all("Interrupted after step 1 of 3; a checkpoint is saved" in each for each in said)
    checkpoint = load_latest(tmp_path / "two" / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 1

    shutil.copytree(tmp_path / "two", tmp_path / "one")
    resumed, _ = start(train, tmp_path / "two", resume=True)
    assert all(torch.equal(value, whole.weights[name]) for name, value in resumed.weights.items())
    alone = train(tmp_path / "one", resume=True)
    assert "processes_changed" in [event.name for event in alone.events if isinstance(event, Alert)]
    assert near(alone.weights, whole.weights, starting_weights())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shared_out_optimiser_makes_the_same_steps(dtype: str, start: Start, tmp_path: Path) -> None:
    whole, _ = start(train, tmp_path / "whole", dtype=dtype)
    first, second = start(train, tmp_path / "shared", dtype=dtype, shard="optimiser")
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in whole.weights)
    # The norm, and with it a clipped step, is added up in another order.
    for name, value in whole.weights.items():
        rounding = 1e-5 if dtype == "float32" else 1e-2
        torch.testing.assert_close(first.weights[name], value, rtol=rounding, atol=1e-7)
    assert first.state + second.state == whole.state
    assert abs(first.state - second.state) < 0.1 * whole.state

    # The checkpoint is the one of a whole optimiser: anyone goes on from it.
    kept, wanted = (load_latest(tmp_path / run / "checkpoints") for run in ("shared", "whole"))
    assert kept is not None and wanted is not None
    assert {name: value.shape for name, value in kept.tensors.items()} == {
        name: value.shape for name, value in wanted.tensors.items()
    }


@pytest.mark.parametrize("shard", ["optimiser", "nothing"])
def test_a_shared_out_run_goes_on_shared_out_or_not(shard: str, start: Start, tmp_path: Path) -> None:
    whole, _ = start(train, tmp_path / "whole", dtype="bfloat16", shard="optimiser")
    start(
        train, tmp_path / "two", dtype="bfloat16", shard="optimiser", fault="asked to stop", ends=(130, 130)
    )
    first, second = start(train, tmp_path / "two", dtype="bfloat16", shard=shard, resume=True)
    for name, value in whole.weights.items():
        assert torch.equal(first.weights[name], second.weights[name])
        torch.testing.assert_close(first.weights[name], value, rtol=1e-2 if shard == "nothing" else 0, atol=0)


def test_fewer_parameters_than_processes_cannot_be_shared_out() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(BadInputError, match="1 parameters cannot be shared out over 2 processes"):
        ShardedOptimiser(World(0, 2), Group({"only": parameter}))


FAILURES = {
    "NaN in process 0": ((7, 7), "are not finite"),
    "NaN in process 1": ((7, 7), "are not finite"),
    "a full disk": ((5, 5), "StorageError: The disk is full. Free some space."),
    "other data": ((3, 3), "processes_differ: process [01] has another data than process [01]"),
    "a bad reference": ((7, 7), "NumericsError: reference_not_finite"),
    "another reference": ((3, 3), "processes_differ: process [01] has another reference than"),
    "other weights": ((7, 7), "processes_diverged: the processes hold different weights after step 3"),
}


@pytest.mark.parametrize("fault", FAILURES)
def test_what_one_process_finds_ends_all_with_the_same_error(
    fault: str, start: Start, tmp_path: Path
) -> None:
    ends, message = FAILURES[fault]
    first, second = start(train, tmp_path, fault=fault, ends=ends)
    assert re.search(message, first)
    if "processes_differ" not in message:  # there each names the other
        assert first == second


def test_a_bug_in_one_process_ends_the_others(start: Start, tmp_path: Path) -> None:
    first, second = start(train, tmp_path, fault="a bug", ends=(1, 1))
    assert "process_failed: process 1 of 2 raised ZeroDivisionError: a bug" in first
    assert "in bug" in second  # its own traceback


def test_a_killed_process_ends_the_others(start: Start, tmp_path: Path) -> None:
    first, second, third = start(train, tmp_path, size=3, fault="killed", ends=(1, -signal.SIGKILL, 1))
    assert "process_lost: process 0 of 3 has lost touch" in first and second is None
    assert "process_lost: process 2 of 3 has lost touch" in third


def test_an_alert_of_one_process_is_heard_once(start: Start, tmp_path: Path) -> None:
    first, second = start(train, tmp_path, fault="an alert")
    assert [event.name for event in first.events if isinstance(event, Alert)] == ["only_here"]
    assert second.events == []


def test_train_dpo_describes_one_version(start: Start, tmp_path: Path) -> None:
    first, second = start(describe, tmp_path)
    assert first == second and first.scores["implicit_reward_accuracy"]["n"] == 4


def test_the_command_under_torchrun(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "pairs.jsonl.gz", "wt") as file:
        for number in range(8):
            row = {"prompt": f"Question {number}?", "chosen": f"yes {number}", "rejected": f"no {number}"}
            file.write(json.dumps(row) + "\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [
        *(*torchrun, "--master-port", free_port(), "-m", "corrigible", "train", "dpo"),
        *("--data", str(tmp_path / "pairs.jsonl.gz"), "--out", str(tmp_path / "run"), "--json"),
        *("--model", "tiny-random", "--lora-rank", "4", "--steps", "2", "--batch-size", "4"),
        *("--shard", "optimiser"),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CORRIGIBLE_")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)  # one process speaks
    assert [len(each) > 0 for each in said["imported"]] == [True]
    config = said["policy"]["config"]
    assert config["steps"] == 2 and config["train"]["shard"] == "optimiser"
    kept = json.loads((tmp_path / "run" / "policy.json").read_text())
    assert kept["id"] == said["policy"]["id"]
    identity = json.loads(next((tmp_path / "run" / "checkpoints").glob("*/state.json")).read_text())
    assert identity["state"]["identity"]["rounding"]["processes"] == 2
