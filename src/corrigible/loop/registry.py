"""The registry of policy versions: which exist, where each came from, which one serves.

A thin reading of the store's append-only policy records and events. Nothing is ever rewritten:
a promotion is an event, and so is a refusal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from corrigible.errors import BadInputError, RefusedError
from corrigible.loop.gate import Verdict
from corrigible.records import Feedback, PolicyVersion
from corrigible.store import Store


@dataclass(frozen=True)
class PolicyState:
    """A policy version with what has happened to it.

    ``status`` is the last of ``created``, ``promoted``, ``refused`` and ``retired``; ``current`` says
    whether it is the version that was promoted last in its line.
    """

    version: PolicyVersion
    status: str
    current: bool
    detail: dict[str, Any]


@dataclass(frozen=True)
class Lineage:
    """Where a policy version came from: parents up to the base model, and what each was trained on."""

    version: PolicyVersion
    status: str
    judgements: int
    kinds: dict[str, int] = field(default_factory=dict)
    annotators: dict[str, int] = field(default_factory=dict)
    episodes: dict[str, int] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    parent: Lineage | None = None

    def to_json(self) -> dict[str, Any]:
        """The whole chain as plain data."""
        return {
            "policy": self.version.to_json(),
            "status": self.status,
            "judgements": self.judgements,
            "kinds": self.kinds,
            "annotators": self.annotators,
            "episodes_judged_by_policy": self.episodes,
            "evaluation": self.evaluation,
            "parent": self.parent.to_json() if self.parent else None,
        }


class Registry:
    """Policy versions of one store.

    Example:
        >>> from corrigible.store import Store
        >>> import tempfile, pathlib
        >>> with Store.open(pathlib.Path(tempfile.mkdtemp()) / "s.db") as store:
        ...     Registry(store).states()
        []
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    def register(self, version: PolicyVersion, *, trained_on: Iterable[str] = ()) -> PolicyVersion:
        """Add a version and the ids of the judgements it was trained on; again changes nothing.

        Raises:
            BadInputError: its parent is not in the store, or ``trained_on`` is not what it states.
        """
        if version.parent is not None and self.find(version.parent) is None:
            raise BadInputError(
                f"Policy {version.name} names the parent {version.parent}, which this store does not hold.",
                advice="Register the parent first, or open the store that holds it.",
            )
        ids = list(trained_on)
        with self.store.transaction() as tx:
            if tx.add_policies([version]).new:
                tx.add_policy_event(version.id, "created")
            if ids:
                tx.add_lineage(version.id, ids)
        return version

    def find(self, id_or_name: str) -> PolicyVersion | None:
        """The version with this id, else the newest of this name, else the only one whose id begins so."""
        try:
            return self.store.policy(id_or_name)
        except BadInputError:
            begins = [
                p for p in self.store.policies() if len(id_or_name) >= 6 and p.id.startswith(id_or_name)
            ]
            return begins[0] if len(begins) == 1 else None

    def policy(self, id_or_name: str) -> PolicyVersion:
        """As :meth:`find`, but it must exist.

        Raises:
            BadInputError: no version answers to it, or only ids that begin so, and several.
        """
        found = self.find(id_or_name)
        if found is None:
            known = ", ".join(sorted({p.name for p in self.store.policies()})) or "none"
            raise BadInputError(
                f"No policy version {id_or_name!r} in this store.",
                advice=f"Known names: {known}. See `corrigible policies`.",
            )
        return found

    def namesakes(self, version: PolicyVersion) -> list[str]:
        """Ids of the other versions of the same name, oldest first: names need not be unique."""
        return [p.id for p in self.store.policies() if p.name == version.name and p.id != version.id]

    def states(self) -> list[PolicyState]:
        """Every version in order of creation, with its status."""
        events: dict[str, list[Any]] = {}
        promoted_last: str | None = None
        for event in self.store.policy_events():
            events.setdefault(event.policy_id, []).append(event)
            if event.event == "promoted":
                promoted_last = event.policy_id
            elif event.event == "retired" and promoted_last == event.policy_id:
                promoted_last = None
        return [
            PolicyState(
                version,
                status=events[version.id][-1].event if version.id in events else "created",
                current=version.id == promoted_last,
                detail=events[version.id][-1].detail if version.id in events else {},
            )
            for version in sorted(self.store.policies(), key=lambda p: (p.created_at, p.id))
        ]

    def status(self, version: PolicyVersion) -> str:
        """The last of ``created``, ``promoted``, ``refused`` and ``retired`` that happened to ``version``."""
        events = self.store.policy_events(version.id)
        return events[-1].event if events else "created"

    def current(self) -> PolicyVersion | None:
        """The version promoted last and not retired since, or ``None``."""
        return next((state.version for state in self.states() if state.current), None)

    def decide(self, version: PolicyVersion, verdict: Verdict, detail: dict[str, Any] | None = None) -> None:
        """Write down what the gate said about ``version``: an event ``promoted`` or ``refused``."""
        self.store.add_policy_event(
            self.policy(version.id).id,
            "promoted" if verdict.promoted else "refused",
            {"reasons": verdict.reasons, **(detail or {})},
        )

    def promote(self, id_or_name: str, *, by: str, reason: str, override: bool = False) -> PolicyVersion:
        """Promote by hand.

        Args:
            id_or_name: which version.
            by: who promotes it.
            reason: why.
            override: promote although the gate refused it; the event says so.

        Raises:
            RefusedError: when the gate refused this version and ``override`` is not set.
        """
        version = self.policy(id_or_name)
        state = next(s for s in self.states() if s.version.id == version.id)
        if state.status == "refused" and not override:
            raise RefusedError(
                f"The gate refused {version.name}: {'; '.join(state.detail.get('reasons', []))}.",
                advice="Gather more evidence (`corrigible evaluate`), or promote it anyway with --override.",
            )
        self.store.add_policy_event(
            version.id,
            "promoted",
            {"by": by, "reason": reason, "override": override and state.status == "refused"},
        )
        return version

    def training_feedback(self, version: PolicyVersion) -> Iterator[Feedback]:
        """The judgements that ``version`` was trained on and that this store holds, one by one."""
        for record_id in self.store.lineage(version.id):
            with suppress(BadInputError):  # a record of another store
                yield self.store.feedback_record(record_id)

    def lineage(self, id_or_name: str) -> Lineage:
        """From a policy version back to every parent and every judgement.

        Raises:
            BadInputError: when the version is unknown, or its ancestry goes round in a circle.
        """
        return self._lineage(self.policy(id_or_name), {s.version.id: s.status for s in self.states()}, ())

    def _lineage(self, version: PolicyVersion, status: dict[str, str], below: tuple[str, ...]) -> Lineage:
        if version.id in below:
            raise BadInputError(
                f"The ancestry of {version.name} goes round in a circle.", advice="The store is damaged."
            )
        kinds: Counter[str] = Counter()
        annotators: Counter[str] = Counter()
        episodes: Counter[str] = Counter()
        count = 0
        for record in self.training_feedback(version):
            count += 1
            kinds[record.kind] += 1
            annotators[record.annotator.pseudonym] += 1
            for policy in record.policy or ():
                if policy is not None and policy.snapshot:
                    episodes[policy.snapshot] += 1
        measured = [
            e.detail["evaluation"] for e in self.store.policy_events(version.id) if "evaluation" in e.detail
        ]
        parent = self.find(version.parent) if version.parent else None
        return Lineage(
            version=version,
            status=status.get(version.id, "created"),
            judgements=count if count else (version.trained_on.feedback if version.trained_on else 0),
            kinds=dict(kinds.most_common()),
            annotators=dict(annotators.most_common()),
            episodes=dict(episodes.most_common()),
            evaluation=measured[-1] if measured else {},
            parent=self._lineage(parent, status, (*below, version.id)) if parent else None,
        )
