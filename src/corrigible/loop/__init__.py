"""The loop: one turn after another, with a gate, a registry and a record of what happened.

- `turn`: :class:`Turn` acts, collects, models, aligns, evaluates and promotes, in one folder.
- `gate`: a candidate goes forward only when the interval says so.
- `registry`: policy versions, their events and their lineage, over the store.
- `report`: one self-contained page about a turn.
- `prompts`: 200 everyday prompts, and files of one's own.
"""
