"""Getting feedback: who is asked what, how it is shown, and what comes back as a record.

- :mod:`~corrigible.collect.questions`: one question ("which of these two answers?") from episodes
  or from comparisons that are already stored, and the record that an answer to it becomes. Every
  channel below goes through it, so order, context and lineage are recorded the same way.
- :mod:`~corrigible.collect.gold`: a known preference to measure against (:class:`HouseStyle`).
- :mod:`~corrigible.collect.simulated`: annotators with declared reliability and biases around it.
- :mod:`~corrigible.collect.terminal`: a person at a keyboard.
"""
