"""What came out of claims, kept: one file a claim, with every look at it that was ever taken.

``ID.json`` holds the newest result, what every seed of it measured, and a history that only grows. The
history is what makes a verdict honest. Whoever adds seeds, or changes the experiment after its result was
known, looks again, and every look is judged at a stricter level
(:func:`corrigible.claims.framework.alpha_of_look`). Running the same seeds of the same experiment again is no
new look: it can only give the same numbers, or show what a change elsewhere in the package did to them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from corrigible.claims.framework import Claim, Outcome
from corrigible.claims.running import ClaimResult, SeedRun, run_claim
from corrigible.claims.versions import claim_digest, code_digest
from corrigible.errors import BadInputError
from corrigible.files import write_json

DEFAULT_FOLDER = Path("runs/claims")
SCHEMA = 1


@dataclass(frozen=True)
class Record:
    """A claim's file.

    Attributes:
        about: the claim in words (``id``, ``title``, ``hypothesis``, ``paper``, ...), as it was when it ran.
        result: :meth:`corrigible.claims.ClaimResult.to_json` of the newest run.
        runs: every seed of it: ``values``, ``curves``, ``failure``, ``seconds``.
        history: one entry a run, oldest first: ``look``, ``kind``, ``date``, ``seeds``, ``verdict``,
            ``effect``, ``interval``, ``p``, ``alpha``, ``seconds`` and ``version``.
    """

    about: dict[str, Any]
    result: dict[str, Any]
    runs: dict[int, SeedRun]
    history: tuple[dict[str, Any], ...]

    @property
    def id(self) -> str:
        return str(self.about["id"])


@dataclass(frozen=True)
class Plan:
    """What a run of a claim would be: which look, of which kind, on which seeds, and which are done."""

    look: int
    kind: str
    seeds: tuple[int, ...]
    done: Mapping[int, SeedRun]
    version: Mapping[str, str]


class Results:
    """The results of claims in a folder, which is made when the first one is written."""

    def __init__(self, folder: str | Path = DEFAULT_FOLDER) -> None:
        self.folder = Path(folder)

    def __iter__(self) -> Iterator[Record]:
        """Every record, in the order of ids."""
        for path in sorted(self.folder.glob("*.json")):
            if not path.name.startswith("."):
                yield self._load(path)

    def read(self, id: str) -> Record | None:
        """The record of a claim; None when it was never run here.

        Raises:
            BadInputError: the file is not what this class wrote.
        """
        path = self._path(id)
        return self._load(path) if path.is_file() else None

    def plan(self, claim: Claim, *, more: int = 0) -> Plan:
        """What running the claim now would be; ``more`` seeds beyond those of its newest look.

        Raises:
            BadInputError: more seeds are wanted of a claim that was never run.
        """
        if more < 0:
            raise BadInputError(f"more must be a number of seeds, not {more}.")
        record = self.read(claim.id)
        drafted = self._draft(claim)
        if record is None:
            if more:
                raise BadInputError(
                    f"Claim {claim.id} has no result in {self.folder} that more seeds could be added to.",
                    advice=f"corrigible claims run {claim.id} first.",
                )
            return Plan(1, "first", claim.seeds, drafted, version_of(claim))
        newest = record.history[-1]
        changed = newest["version"]["claim"] != claim_digest(claim)
        seeds = claim.seeds
        if not changed:  # seeds that were added stay
            seeds = tuple(dict.fromkeys([*claim.seeds, *newest["seeds"]]))
        first = max(seeds) + 1
        seeds += tuple(range(first, first + more))
        # Whose seeds failed was not judged: to mend and run it again is still the same look.
        again = (changed or more > 0) and not record.result["failures"]
        kind = "more seeds" if more else "changed" if changed else "again"
        same_code = newest["version"]["code"] == code_digest(claim)
        done = {**record.runs, **drafted} if more and same_code else drafted
        done = {seed: run for seed, run in done.items() if seed in seeds}
        return Plan(newest["look"] + again, kind, seeds, done, version_of(claim))

    def up_to_date(self, claim: Claim) -> bool:
        """Whether there is a result without failures that this very code made."""
        record = self.read(claim.id)
        if record is None or record.result["failures"]:
            return False
        version = record.history[-1]["version"]
        return bool(version["claim"] == claim_digest(claim) and version["code"] == code_digest(claim))

    def run(self, claim: Claim, *, more: int = 0) -> ClaimResult:
        """Run a claim as :meth:`plan` says and keep the result.

        Every seed is kept as soon as it is done, so a run that was interrupted goes on where it was, as long
        as the code is the same.

        Raises:
            BadInputError: as :meth:`plan`, or the experiment itself is written wrongly.
            StorageError: the folder cannot be written.
        """
        plan = self.plan(claim, more=more)
        runs = dict(plan.done)

        def keep(run: SeedRun) -> None:
            if run.outcome is not None:  # what failed is tried again
                runs[run.seed] = run
                draft = {"code": plan.version["code"], "runs": _runs_to_json(runs)}
                write_json(self._draft_path(claim), draft)

        result = run_claim(claim, plan.seeds, look=plan.look, done=plan.done, after_seed=keep)
        self.write(claim, result, plan)
        self._draft_path(claim).unlink(missing_ok=True)
        return result

    def write(self, claim: Claim, result: ClaimResult, plan: Plan) -> Record:
        """Keep a result: it becomes the newest, and its look is added to the history.

        Raises:
            StorageError: the folder cannot be written; what was there is intact.
        """
        before = self.read(claim.id)
        found = result.to_json()
        entry = {
            "look": result.look,
            "kind": plan.kind,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "seeds": list(result.seeds),
            "verdict": result.verdict,
            "effect": result.effect.effect if result.effect else None,
            "interval": list(result.effect.interval) if result.effect else None,
            "p": result.p,
            "alpha": result.alpha,
            "seconds": result.seconds,
            # Of the code as it was when the run began: a long one may outlive an edit.
            "version": dict(plan.version),
        }
        record = Record(
            about=about(claim),
            result=found,
            runs={run.seed: run for run in result.runs},
            history=(*(before.history if before else ()), entry),
        )
        write_json(
            self._path(claim.id),
            {
                "schema": SCHEMA,
                "about": record.about,
                "result": {name: value for name, value in found.items() if name not in ("values", "seeds")},
                "history": record.history,
                "runs": _runs_to_json(record.runs),
            },
        )
        return record

    def _load(self, path: Path) -> Record:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA:
                raise BadInputError(
                    f"{path} has schema {data['schema']}, this version reads {SCHEMA}.",
                    advice="Use the version of Corrigible that wrote it, or run the claim again elsewhere.",
                )
            return Record(
                data["about"], data["result"], _runs_from_json(data["runs"]), tuple(data["history"])
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, BadInputError):
                raise
            raise BadInputError(
                f"{path} is not a result of a claim: {type(error).__name__}: {error}",
                advice="Move it away; the claim can be run again.",
            ) from error

    def _path(self, id: str) -> Path:
        return self.folder / f"{id}.json"

    def _draft_path(self, claim: Claim) -> Path:
        return self.folder / f".{claim.id}.draft.json"

    def _draft(self, claim: Claim) -> dict[int, SeedRun]:
        """Seeds of a run that was interrupted, when they are of this very code."""
        try:
            data = json.loads(self._draft_path(claim).read_text(encoding="utf-8"))
            return _runs_from_json(data["runs"]) if data["code"] == code_digest(claim) else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}


def about(claim: Claim) -> dict[str, Any]:
    """A claim in words, for its file and its page."""
    return {
        "id": claim.id,
        "title": claim.title,
        "hypothesis": claim.hypothesis,
        "paper": claim.paper,
        "figure": claim.figure,
        "setting": claim.setting,
        "baselines": list(claim.baselines),
        "doc": claim.doc,
        "fast": claim.fast,
    }


def version_of(claim: Claim) -> dict[str, str]:
    """``corrigible`` (the package's version), ``claim`` and ``code`` (digests) of a claim as it is now."""
    try:
        package = metadata.version("corrigible")
    except metadata.PackageNotFoundError:
        package = "unknown"
    return {"corrigible": package, "claim": claim_digest(claim), "code": code_digest(claim)}


def _runs_to_json(runs: Mapping[int, SeedRun]) -> dict[str, Any]:
    return {
        str(seed): {
            "values": dict(run.outcome.values) if run.outcome else None,
            "curves": dict(run.outcome.curves) if run.outcome else {},
            "failure": run.failure,
            "seconds": round(run.seconds, 3),
        }
        for seed, run in runs.items()
    }


def _runs_from_json(data: Mapping[str, Any]) -> dict[int, SeedRun]:
    return {
        int(seed): SeedRun(
            int(seed),
            Outcome(run["values"], {name: (xs, ys) for name, (xs, ys) in run["curves"].items()})
            if run["values"]
            else None,
            run["failure"],
            float(run["seconds"]),
        )
        for seed, run in data.items()
    }
