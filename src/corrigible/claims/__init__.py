"""One small, honest experiment per paper: does the method do what its paper says, here, in our code?

A claim is a function from a seed to what it measured (:class:`Outcome`). One :class:`Effect` computed from
these numbers decides, further ones may have to hold as well, and *negative controls*, the same effect with
its cause taken out (labels shuffled, a constant reward), must stay away. :func:`run_claim` runs the declared
seeds and says ``supported``, ``not supported`` or ``inconclusive``; it could come out against us.

    from corrigible.claims import find_claim, run_claim
    print(run_claim(find_claim("S188")))

Each module of this package whose name begins with a system's number holds that system's claim; ``framework``
says what a claim is, ``running`` runs it, ``results`` keeps what came out and counts the looks, ``report``
makes the table and the pages, ``fixtures`` is what claims share. CONTRIBUTING.md shows how to add one.
"""

from corrigible.claims.framework import (
    CLAIMS,
    Claim,
    Effect,
    EffectResult,
    Outcome,
    claim,
    find_claim,
    load_claims,
)
from corrigible.claims.running import ClaimResult, SeedRun, run_claim, run_seed

__all__ = [
    "CLAIMS",
    "Claim",
    "ClaimResult",
    "Effect",
    "EffectResult",
    "Outcome",
    "SeedRun",
    "claim",
    "find_claim",
    "load_claims",
    "run_claim",
    "run_seed",
]
