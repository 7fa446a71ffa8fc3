"""The optimiser against AdamW written out number by number, and every precision against what it promises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from corrigible.errors import BadInputError
from corrigible.models import optimiser as module
from corrigible.models.optimiser import TIE, Group, Optimiser, adamw, noise, round_stochastically

BETAS = (0.9, 0.99)
EPS = 1e-6


def oracle(
    weight: float, gradients: list[float | None], rates: list[float], decay: float
) -> tuple[float, float, float]:
    """One weight through AdamW (Loshchilov and Hutter 2019, algorithm 2), in float64."""
    first = second = 0.0
    step = 0
    for gradient, rate in zip(gradients, rates, strict=True):
        if gradient is None:
            continue
        step += 1
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient * gradient
        corrected = first / (1 - BETAS[0] ** step)
        spread = math.sqrt(second / (1 - BETAS[1] ** step))
        weight = weight - rate * decay * weight - rate * corrected / (spread + EPS)
    return weight, first, second


def parameters(dtype: torch.dtype, seed: int = 0, *, scale: float = 1.0) -> dict[str, nn.Parameter]:
    """Four shapes, one of them larger than what is updated at a time in these tests."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"table": (30, 7), "norm": (5,), "factor": (3, 4), "head": (6,)}
    return {
        name: nn.Parameter((scale * torch.randn(shape, generator=random)).to(dtype))
        for name, shape in shapes.items()
    }


def give_gradients(
    to: Mapping[str, nn.Parameter], step: int, *, scale: float = 1.0, leave_out: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1000 + step)
    given = {}
    for name, parameter in to.items():
        gradient = (scale * torch.randn(parameter.shape, generator=random)).to(parameter.dtype)
        if name not in leave_out:
            parameter.grad = gradient.clone()
            given[name] = gradient
    return given


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UPDATED_TOGETHER", 64)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("fused", [True, False])
def test_it_is_adamw(
    dtype: torch.dtype, tolerance: float, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups, changing rates, clipping, and a parameter without gradient in some of the steps."""
    if not fused:
        monkeypatch.setattr(module, "FUSED", ())
    ours = parameters(dtype)
    start = {name: p.detach().clone() for name, p in ours.items()}
    optimiser = Optimiser(
        Group({name: ours[name] for name in ("table", "norm", "factor")}, weight_decay=0.1),
        Group({"head": ours["head"]}, rate=7.0),
        betas=BETAS,
        eps=EPS,
    )
    rates = [0.03, 0.02, 0.05, 0.01, 0.04, 0.02]
    scales = [1.0, 0.25, 1.0, 0.5, 1.0, 0.125]
    given: dict[str, list[Tensor | None]] = {name: [] for name in ours}
    for step, (rate, scale) in enumerate(zip(rates, scales, strict=True)):
        found = give_gradients(ours, step, leave_out=("norm",) if step in (0, 3) else ())
        for name in ours:
            given[name].append(found[name] * scale if name in found else None)
        optimiser.step(rate, scale)
        assert all(p.grad is None for p in ours.values())
    state = optimiser.state()
    for name, parameter in ours.items():
        decay, times = (0.0, 7.0) if name == "head" else (0.1, 1.0)
        for place in itertools.product(*map(range, parameter.shape)):
            gradients = [None if g is None else float(g[place]) for g in given[name]]
            expected = oracle(float(start[name][place]), gradients, [times * rate for rate in rates], decay)
            found_now = (
                parameter.detach()[place],
                state[f"first_moment.{name}"][place],
                state[f"second_moment.{name}"][place],
            )
            assert [float(each) for each in found_now] == pytest.approx(
                expected, rel=tolerance, abs=tolerance
            )
    assert int(state["step.norm"]) == 4 and int(state["step.table"]) == 6


def test_what_is_updated_together_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for together in (16, 1 << 20):
        monkeypatch.setattr(module, "UPDATED_TOGETHER", together)
        ours = parameters(torch.bfloat16)
        optimiser = Optimiser(Group(ours, weight_decay=0.1), moments="float32")
        for step in range(5):
            give_gradients(ours, step)
            optimiser.step(1e-2)
        found.append(dict(optimiser.masters()))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-6, atol=1e-7)


# -- masters --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_pieces")
def test_two_halves_are_the_float32_master_bit_for_bit() -> None:
    """Over 200 steps on random gradients; small rates, so that most steps are lost in bfloat16."""
    ours, plain = parameters(torch.bfloat16), parameters(torch.bfloat16)
    split = Optimiser(Group(ours, weight_decay=0.01), master_weights="split")
    whole = Optimiser(Group(plain, weight_decay=0.01), master_weights="float32")
    for step in range(200):
        give_gradients(ours, step)
        give_gradients(plain, step)
        split.step(1e-4)
        whole.step(1e-4)
    for (name, half), (_, exact) in zip(split.masters(), whole.masters(), strict=True):
        assert half.dtype == exact.dtype == torch.float32
        assert torch.equal(half, exact)
        assert torch.equal(ours[name], exact.bfloat16())
        assert not torch.equal(exact, ours[name].float())  # there is something that the halves must hold


def test_the_one_tie_that_does_not_fit_becomes_the_number_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masters of every lower half, above an even and an odd last bit, of both signs."""
    lower = torch.arange(1 << 16, dtype=torch.int32)
    upper = torch.tensor([0x3F80, 0x3F81, -0x4080, -0x407F], dtype=torch.int32) << 16
    wanted = (upper[:, None] | lower).view(torch.float32).reshape(-1)
    weights = nn.Parameter(torch.zeros(len(wanted), dtype=torch.bfloat16))
    optimiser = Optimiser(Group({"weight": weights}))
    monkeypatch.setattr(module, "adamw", lambda master, *others, **settings: master.copy_(wanted))
    weights.grad = torch.zeros_like(weights)
    optimiser.step(0.0)
    found = optimiser.master("weight")
    other = (found != wanted).nonzero().flatten().tolist()
    assert other == [TIE, 2 * (1 << 16) + TIE]  # half-way above the two even ones
    assert torch.equal(found[other].view(torch.int32), wanted[other].view(torch.int32) - 1)
    assert torch.equal(weights.detach(), wanted.bfloat16())


def test_steps_below_the_resolution_add_up() -> None:
    """At 1.0 bfloat16 moves in steps of 4e-3 downwards; a thousand steps of 1e-5 are 1e-2."""
    settings: list[module.MasterWeights] = ["split", "float32", "stochastic"]
    for setting in settings:
        weights = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimiser = Optimiser(Group({"weight": weights}), master_weights=setting)
        for _ in range(1000):
            weights.grad = torch.ones_like(weights)
            optimiser.step(1e-5)
        # Rounded at random, each weight is off by less than a step, their mean by a hundredth of it.
        assert float(weights.detach().float().mean()) == pytest.approx(
            0.99, abs=2.1e-3 if setting != "stochastic" else 3e-4
        )
        assert float(optimiser.master("weight").mean()) == pytest.approx(0.99, abs=3e-4)


# -- stochastic rounding --------------------------------------------------------------------------


def test_stochastic_rounding_is_right_on_average() -> None:
    """Each value's mean over 4096 roundings is within 4.5 standard errors: for 64 values at once, in
    more than 999 of 1000 worlds."""
    random = torch.Generator().manual_seed(3)
    values = torch.randn(64, generator=random) * 10.0 ** torch.randint(-6, 7, (64,), generator=random)
    times = 4096
    many = values.repeat_interleave(times)
    found = round_stochastically(many.clone(), noise("test", len(many), torch.device("cpu")))
    assert torch.equal(found, found.bfloat16().float())
    bits = values.view(torch.int32)
    low = (bits & -65536).view(torch.float32).double()
    high = ((bits & -65536) + 65536).view(torch.float32).double()
    drawn = found.view(64, times).double()
    assert bool(((drawn == low[:, None]) | (drawn == high[:, None])).all())
    share = (values.double() - low) / (high - low)
    error = (share * (1 - share) / times).sqrt()
    assert bool((((drawn == high[:, None]).double().mean(dim=1) - share).abs() <= 4.5 * error).all())


def test_what_bfloat16_holds_is_not_rounded_away() -> None:
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    exact[:3] = torch.tensor([0.0, -0.0, math.inf])
    for number in range(20):
        drawn = noise(f"{number}", 1000, torch.device("cpu"))
        assert torch.equal(
            round_stochastically(exact.clone(), drawn).view(torch.int32), exact.view(torch.int32)
        )


def test_noise_is_even_in_every_bit_and_the_same_for_its_key() -> None:
    size = 40_001
    drawn = noise("a", size, torch.device("cpu"))
    assert drawn.dtype == torch.int16 and drawn.shape == (size,)
    assert torch.equal(drawn, noise("a", size, torch.device("cpu")))
    assert not torch.equal(drawn, noise("b", size, torch.device("cpu")))
    for place in range(4):  # of the four numbers that share a draw
        for bit in range(16):
            share = float(((drawn[place::4].int() >> bit) & 1).float().mean())
            assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(size / 4)


def test_the_draw_depends_on_seed_step_and_name_and_on_nothing_else() -> None:
    def after(seed: int, name: str, steps: int = 1, torch_seed: int = 0) -> Tensor:
        torch.manual_seed(torch_seed)
        weights = nn.Parameter(torch.ones(512, dtype=torch.bfloat16))
        optimiser = Optimiser(Group({name: weights}), master_weights="stochastic", seed=seed)
        for _ in range(steps):
            weights.data.fill_(1.0)
            weights.grad = torch.ones_like(weights)
            optimiser.step(1e-3)
        return weights.detach()

    once = after(0, "a")
    assert len(once.unique()) == 2
    assert torch.equal(once, after(0, "a", torch_seed=1))
    for other in (after(1, "a"), after(0, "b"), after(0, "a", steps=2)):
        assert not torch.equal(once, other)


# -- moments --------------------------------------------------------------------------------------


def test_a_second_moment_in_bfloat16_falls_as_it_should() -> None:
    """After large gradients come small ones: 0.1 % down a step, which rounding to the nearest would undo.

    The first moment, rounded to the nearest, comes within 4 % of a gradient that stays.
    """
    weights = nn.Parameter(torch.zeros(4096))
    optimiser = Optimiser(Group({"weight": weights}), moments="bfloat16")
    for gradient, steps in ((1.0, 10), (1e-3, 1000)):
        for _ in range(steps):
            weights.grad = torch.full_like(weights, gradient)
            optimiser.step(0.0)
    second = optimiser.state()["second_moment.weight"]
    expected = 0.0
    for gradient, steps in ((1.0, 10), (1e-3, 1000)):
        for _ in range(steps):
            expected = 0.999 * expected + 0.001 * gradient**2
    assert second.dtype == torch.bfloat16
    assert float(second.float().mean()) == pytest.approx(expected, rel=0.02)
    first = optimiser.state()["first_moment.weight"]
    assert first.unique().tolist() == pytest.approx([1e-3], rel=0.04)


def test_bfloat16_moments_step_nearly_like_float32_ones() -> None:
    runs = []
    settings: list[module.Moments] = ["float32", "bfloat16"]
    for setting in settings:
        ours = parameters(torch.float32)
        optimiser = Optimiser(Group(ours), moments=setting)
        for step in range(30):
            give_gradients(ours, step)
            optimiser.step(1e-2)
        runs.append(torch.cat([p.detach().flatten() for p in ours.values()]))
    start = torch.cat([p.detach().flatten() for p in parameters(torch.float32).values()])
    gap = (runs[1] - runs[0]).norm() / (runs[0] - start).norm()
    assert 0.0 < float(gap) < 0.02


# -- the gradients' length, memory, checkpoints ---------------------------------------------------


@pytest.mark.usefixtures("small_pieces")
def test_the_norm_is_of_all_gradients_and_does_not_overflow() -> None:
    ours = parameters(torch.bfloat16)
    optimiser = Optimiser(Group(ours))
    assert optimiser.norm() == 0.0
    given = give_gradients(ours, 0, scale=1e10, leave_out=("norm",))
    expected = math.sqrt(sum(float(x) ** 2 for gradient in given.values() for x in gradient.flatten()))
    assert optimiser.norm() == pytest.approx(expected, rel=1e-6)
    with torch.no_grad():
        ours["table"].grad[29, 6] = math.nan  # type: ignore[index]
    assert math.isnan(optimiser.norm())
    optimiser.clear()
    assert optimiser.norm() == 0.0 and all(p.grad is None for p in ours.values())


@pytest.mark.parametrize(
    ("dtype", "master_weights", "moments", "bytes_each"),
    [
        (torch.bfloat16, "float32", "float32", 12),
        (torch.bfloat16, "float32", "bfloat16", 8),
        (torch.bfloat16, "split", "float32", 10),
        (torch.bfloat16, "split", "bfloat16", 6),
        (torch.bfloat16, "stochastic", "float32", 8),
        (torch.bfloat16, "stochastic", "bfloat16", 4),
        (torch.float32, "split", "float32", 8),
        (torch.float32, "split", "bfloat16", 4),
        (torch.float64, "split", "bfloat16", 16),
        (torch.float16, "split", "float32", 12),
    ],
)
def test_bytes_for_each_weight(
    dtype: torch.dtype, master_weights: module.MasterWeights, moments: module.Moments, bytes_each: int
) -> None:
    ours = parameters(dtype)
    optimiser = Optimiser(Group(ours), master_weights=master_weights, moments=moments)
    give_gradients(ours, 0)
    optimiser.step(1e-3)
    kept = {
        key: value for key, value in optimiser.state().items() if not key.startswith(("weight.", "step."))
    }
    weights = sum(p.numel() for p in ours.values())
    assert sum(value.numel() * value.element_size() for value in kept.values()) == bytes_each * weights


SETTINGS: list[tuple[torch.dtype, module.MasterWeights, module.Moments]] = [
    (torch.bfloat16, "split", "float32"),
    (torch.bfloat16, "float32", "bfloat16"),
    (torch.bfloat16, "stochastic", "bfloat16"),
    (torch.float32, "split", "float32"),
]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("dtype", "master_weights", "moments"), SETTINGS)
def test_it_goes_on_from_its_state_bit_for_bit(
    dtype: torch.dtype, master_weights: module.MasterWeights, moments: module.Moments
) -> None:
    def fresh(seed: int) -> tuple[dict[str, nn.Parameter], Optimiser]:
        ours = parameters(dtype, seed)
        group = Group(ours, weight_decay=0.1)
        return ours, Optimiser(group, master_weights=master_weights, moments=moments)

    def run(ours: dict[str, nn.Parameter], optimiser: Optimiser, steps: range) -> None:
        for step in steps:
            give_gradients(ours, step, leave_out=("norm",) if step == 1 else ())
            optimiser.step(1e-3)

    ours, whole = fresh(0)
    run(ours, whole, range(8))
    ours, first = fresh(0)
    run(ours, first, range(3))
    kept = {key: value.clone() for key, value in first.state().items()}
    ours, second = fresh(1)
    second.load(kept)
    run(ours, second, range(3, 8))
    expected = whole.state()
    assert second.state().keys() == expected.keys()
    for key, value in second.state().items():
        assert value.dtype == expected[key].dtype and torch.equal(value, expected[key]), key


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda state: state.pop("second_moment.norm"), "lacks the tensor second_moment.norm"),
        (lambda state: state.update({"weight.table": torch.zeros(7, 30)}), r"weight.table as \(7, 30\)"),
        (lambda state: state.update({"master.table": torch.zeros(30, 7)}), "master.table as .* float32"),
        (
            lambda state: state.update({"weight.other": torch.zeros(2)}),
            "no place for the tensor weight.other",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_named_and_changes_nothing(
    damage: Callable[[dict[str, Tensor]], object], says: str
) -> None:
    ours = parameters(torch.bfloat16)
    optimiser = Optimiser(Group(ours))
    before = {key: value.clone() for key, value in optimiser.state().items()}
    other = Optimiser(Group(parameters(torch.bfloat16, seed=1))).state()
    damage(other)
    with pytest.raises(BadInputError, match=says):
        optimiser.load(other)
    assert all(torch.equal(value, before[key]) for key, value in optimiser.state().items())


@pytest.mark.usefixtures("small_pieces")
def test_masters_are_seen_whole_or_in_part() -> None:
    for dtype, master_weights, moments in SETTINGS:
        ours = parameters(dtype)
        optimiser = Optimiser(Group(ours), master_weights=master_weights, moments=moments)
        give_gradients(ours, 0)
        optimiser.step(1e-3)
        for name, value in optimiser.masters():
            assert value.dtype == torch.float32 and value.shape == ours[name].shape
            assert torch.equal(value.to(dtype), ours[name])
            assert torch.equal(optimiser.master(name, every=4), value.flatten()[::4])


def test_what_cannot_be_trained() -> None:
    ours = parameters(torch.float32)
    with pytest.raises(BadInputError, match="no parameter"):
        Optimiser(Group({}))
    with pytest.raises(BadInputError, match="norm stands in two groups"):
        Optimiser(Group(ours), Group({"norm": ours["norm"]}))
    with pytest.raises(BadInputError, match="stretch of memory"):
        Optimiser(Group({"turned": nn.Parameter(torch.zeros(3, 4).T)}))
    with pytest.raises(BadInputError, match="halves"):
        Optimiser(Group(ours), master_weights="halves")  # type: ignore[arg-type]


def test_the_plain_steps_are_the_fused_ones() -> None:
    random = torch.Generator().manual_seed(0)
    start = [torch.randn(500, generator=random, dtype=torch.float64) for _ in range(3)]
    start.append(start[2].abs())
    found = []
    for fused in (True, False):
        tensors = [value.clone() for value in start]
        adamw(*tensors, step=3, lr=0.01, betas=BETAS, eps=EPS, weight_decay=0.1, fused=fused)
        found.append((tensors[0], tensors[2], tensors[3]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
