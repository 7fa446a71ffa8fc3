"""The promotion gate: a policy goes forward only when the evidence says so.

The gate reads intervals, never point estimates: "better" means that the *lower* end of the
win rate's interval clears the bar. A limit on the KL divergence to the starting policy and on
the change of length guard against a win bought by drifting off or by talking longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from corrigible.errors import BadInputError

Decision = Literal["promote", "refuse"]


@dataclass(frozen=True)
class Check:
    """One condition of the gate and how it came out."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Verdict:
    """What the gate decided, with every check it made."""

    decision: Decision
    checks: tuple[Check, ...]

    @property
    def promoted(self) -> bool:
        return self.decision == "promote"

    @property
    def reasons(self) -> list[str]:
        """Why: the checks that failed, or all of them when none did."""
        failed = [check.detail for check in self.checks if not check.passed]
        return failed or [check.detail for check in self.checks]


@dataclass(frozen=True)
class Gate:
    """Thresholds a candidate must clear.

    Args:
        min_win_rate: bar for the lower end of the win-rate interval, in (0, 1).
        max_kl: largest KL divergence to the starting policy, nats per answer; ``None`` for no limit.
        max_length_ratio: largest ratio of mean answer lengths, candidate to start; ``None`` for no limit.
        min_prompts: fewest held-out prompts on which a win rate counts as evidence at all.
    """

    min_win_rate: float = 0.5
    max_kl: float | None = 50.0
    max_length_ratio: float | None = 2.0
    min_prompts: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.min_win_rate < 1:
            raise BadInputError(
                f"The gate's min_win_rate is {self.min_win_rate}.", advice="Give a number between 0 and 1."
            )

    def decide(
        self,
        *,
        win_rate: float,
        interval: tuple[float, float],
        prompts: int,
        kl: float | None = None,
        length_ratio: float | None = None,
    ) -> Verdict:
        """Decide on one candidate.

        Args:
            win_rate: share of held-out prompts won against the starting policy, ties half, in [0, 1].
            interval: its 95 % interval.
            prompts: number of held-out prompts behind it.
            kl: KL divergence to the starting policy, nats per answer.
            length_ratio: mean answer length of the candidate over that of the start.

        Raises:
            BadInputError: when the interval does not contain the win rate or leaves [0, 1].
        """
        low, high = interval
        if not 0 <= low <= win_rate <= high <= 1:
            raise BadInputError(
                f"Win rate {win_rate} with interval ({low}, {high}) is not a rate with an interval.",
                advice="Pass what `win_rate()` returned.",
            )
        checks = [
            Check(
                "evidence",
                prompts >= self.min_prompts,
                f"{prompts} held-out prompts (at least {self.min_prompts})",
            ),
            Check(
                "win rate",
                low > self.min_win_rate,
                f"win rate {win_rate:.3f}, interval {low:.3f} to {high:.3f}: lower end "
                f"{'above' if low > self.min_win_rate else 'not above'} {self.min_win_rate:.2f}",
            ),
        ]
        if kl is not None and self.max_kl is not None:
            checks.append(
                Check(
                    "drift",
                    kl <= self.max_kl,
                    f"KL to the start {kl:.2f} nats an answer (limit {self.max_kl:g})",
                )
            )
        if length_ratio is not None and self.max_length_ratio is not None:
            checks.append(
                Check(
                    "length",
                    length_ratio <= self.max_length_ratio,
                    f"answers {length_ratio:.2f} times as long as before (limit {self.max_length_ratio:g})",
                )
            )
        passed = all(check.passed for check in checks)
        return Verdict("promote" if passed else "refuse", tuple(checks))
