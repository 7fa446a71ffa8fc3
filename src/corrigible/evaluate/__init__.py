"""Is the policy any better: win rates, divergence from the start, rewards side by side.

- :mod:`~corrigible.evaluate.win_rate`: candidate against baseline, paired by prompt and shown in
  both orders; what could not be judged is counted, never scored.
- :mod:`~corrigible.evaluate.kl`: how far a policy went from its reference, by Monte Carlo, with
  an interval.
- :mod:`~corrigible.evaluate.displacement`: whether training made even the preferred answers less likely.
- :mod:`~corrigible.evaluate.information`: what preferences teach, the differential information between two
  policies, exact where answers can be enumerated.
- :mod:`~corrigible.evaluate.sampling`: the answers it all rests on, kept as they come.
- :mod:`~corrigible.evaluate.evaluation`: the whole picture for one candidate, which the gate of
  the loop reads and the report shows.

Every number here is an :class:`~corrigible.intervals.Estimate`: a value, its interval over prompts,
and how many independent units it rests on.
"""
