"""The store: append-only records in SQLite or PostgreSQL, blobs beside them, and a feed of what changed.

- :class:`Store` opens a database by path or URL (``store.py``); everything is added through a
  :class:`Transaction` (``transaction.py``) and asked for through a :class:`FeedbackFilter` (``queries.py``).
- A record is stored as the JSON text it was added with, beside a few columns copied out for indices
  (``schema.py``). No record is ever changed or removed: triggers refuse it. Revisions of the schema are
  Alembic's (``migrations/``) and are run when a store is opened (``database.py``).
- :class:`Blobs` keeps files by content hash (``blobs.py``).
- :func:`load_pairs` turns judgements into preference pairs with their texts (``pairs.py``),
  :func:`load_labelled` into single responses that were found good or bad (``labelled.py``). The other shapes
  that algorithms learn from are in ``signals.py``; :func:`load_signals` makes any of them of every kind of
  record that can give it (``conversions/``).
- ``formats/`` brings other people's files in and takes ours out.

    >>> from corrigible.records import Annotator, comparison
    >>> from corrigible.store import Store, load_pairs
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Store.open(f"{folder}/corrigible.db") as store:
    ...     record, items = comparison("2+2?", "4", "5", annotator=Annotator(pseudonym="ada", type="human"))
    ...     store.add_feedback([record], items)
    ...     store.add_feedback([record], items)
    ...     [pair.chosen_text for pair in load_pairs(store)]
    Added(new=1, existing=0)
    Added(new=0, existing=1)
    ['4']
"""

from corrigible.store.blobs import Blobs
from corrigible.store.conversions import SIGNALS, learnable, load_signals
from corrigible.store.labelled import Labelled, labelled_from_pairs, load_labelled
from corrigible.store.pairs import Pair, load_pairs
from corrigible.store.queries import Change, FeedbackFilter
from corrigible.store.signals import Attempt, Attempts, Critiqued, Demonstrated, Ranked
from corrigible.store.store import PolicyEvent, Store
from corrigible.store.transaction import Added, Transaction

__all__ = [
    "SIGNALS",
    "Added",
    "Attempt",
    "Attempts",
    "Blobs",
    "Change",
    "Critiqued",
    "Demonstrated",
    "FeedbackFilter",
    "Labelled",
    "Pair",
    "PolicyEvent",
    "Ranked",
    "Store",
    "Transaction",
    "labelled_from_pairs",
    "learnable",
    "load_labelled",
    "load_pairs",
    "load_signals",
]
