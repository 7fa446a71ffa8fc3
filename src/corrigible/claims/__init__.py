"""One small, honest experiment per paper: does the method do what its paper says, here, in our code?

A claim is a function from a seed to an *effect*: one number that the hypothesis says is larger than
``threshold``. It comes with a *negative control*, the same experiment with the cause taken out (labels
shuffled, a constant reward), whose effect must stay away. :func:`run_claim` runs both over the declared
seeds and says ``supported``, ``not supported`` or ``inconclusive``; it could come out against us.

    from corrigible.claims import load_claims, run_claim
    print(run_claim(load_claims()["dpo-optimum"]))

Each module of this package holds one claim. CONTRIBUTING.md shows how to add one.
"""

from corrigible.claims.framework import CLAIMS, Claim, ClaimResult, claim, load_claims, run_claim

__all__ = ["CLAIMS", "Claim", "ClaimResult", "claim", "load_claims", "run_claim"]
