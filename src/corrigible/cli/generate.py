"""``corrigible generate``: answers from a model, kept as episodes."""

from __future__ import annotations

import hashlib
import json as jsonlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from corrigible.cli.console import console, examples, json_option, print_json, print_warning, progress_bus
from corrigible.errors import BadInputError, Interrupted, StorageError
from corrigible.events import Message as Said
from corrigible.events import emit

if TYPE_CHECKING:
    from corrigible.align import Serving
    from corrigible.models import Generation, LanguagePolicy, Rendered
    from corrigible.records import Episode, Message, Sampling
    from corrigible.store import Store


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "generate",
        epilog=examples(
            """
            # one prompt, four answers, on the screen
            corrigible generate --prompt "How do I keep rice from sticking?" -n 4
            # many prompts (one a line, or JSONL with "prompt" or "messages") into the store
            corrigible generate --prompts prompts.txt -n 4 --store corrigible.db --task household
            # into a file; run again with --resume after an interruption
            corrigible generate --prompts prompts.jsonl --out answers.jsonl --temperature 0.7 --resume
            # your trained adapter
            corrigible generate --model runs/dpo/adapter --prompt "Hello" --max-tokens 40
            """
        ),
    )(generate)


def generate(
    model: str = typer.Option(
        "smollm2-135m", "--model", "-m", help="smollm2-135m, tiny-random, a folder, a .gguf file, a hub id."
    ),
    adapter: str | None = typer.Option(None, help="A LoRA adapter's folder, to put on top of the model."),
    prompt: list[str] = typer.Option([], "--prompt", "-p", help="A prompt; may be given several times."),
    prompts: Path | None = typer.Option(
        None, help='A file of prompts: text, one a line; or JSONL with "prompt" or "messages".'
    ),
    n: int = typer.Option(1, "-n", "--answers", min=1, help="Answers per prompt."),
    temperature: float = typer.Option(1.0, min=0.0, help="0 is greedy."),
    top_p: float = typer.Option(1.0, help="Keep the likeliest tokens that reach this probability."),
    top_k: int | None = typer.Option(None, min=1, help="Keep this many of the likeliest tokens."),
    min_p: float = typer.Option(0.0, help="Keep tokens this likely, relative to the likeliest."),
    max_tokens: int = typer.Option(128, min=1, help="Tokens per answer, at most."),
    stop: list[str] = typer.Option([], help="Stop when this text appears; may be given several times."),
    seed: int = typer.Option(0, help="The same seed gives the same answers."),
    batch_size: int = typer.Option(64, min=1, help="Answers sampled at a time; changes speed, not text."),
    task: str = typer.Option("generate", help="The task name written into the episodes."),
    store: str | None = typer.Option(None, "--store", "-s", help="Keep the episodes in this store."),
    out: Path | None = typer.Option(None, "--out", "-o", help="Write the episodes to this JSONL file."),
    resume: bool = typer.Option(False, help="Skip prompts that were already answered with these settings."),
    plain: bool = typer.Option(
        False, help="Leave prompts as they are, also when the policy was trained to be asked otherwise."
    ),
    json: bool = json_option,
) -> None:
    """Sample answers with their token ids, log-probabilities and settings recorded, as episodes in a
    store or a file (or just to read).

    A prompt that cannot be read or does not fit the model is named and left out; the others are
    answered, and the exit code is 3.
    """
    from corrigible.models import generate as sample
    from corrigible.models import load_policy
    from corrigible.records import Sampling

    if store is not None and out is not None:
        raise BadInputError("Give --store or --out, not both.")
    questions, bad_lines = _read(prompt, prompts)
    for line in bad_lines:
        print_warning(line)
    if not questions:
        raise BadInputError(
            "There is no prompt to answer.", advice='Give --prompt "..." or --prompts FILE (one a line).'
        )
    settings = Sampling.from_json(
        {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "max_tokens": max_tokens,
            "stop": stop,
            "seed": seed,
            "n": n,
        }
    )
    kept: dict[int, list[Generation]] = {}
    with progress_bus(json), _sink(store, out, task, resume) as sink:
        policy = load_policy(model, adapter=adapter)
        serving = None if plain else _serving(adapter or model)
        requests = _requests(policy, questions, settings, serving)
        open_ = [i for i, request in enumerate(requests) if sink.found[request] < n]
        version = sink.version(policy)

        def keep(position: int, answers: list[Generation]) -> None:
            index = open_[position]
            kept[index] = answers
            info = {"request": requests[index], "model": policy.name}
            # A killed run may have kept the first few answers of a prompt; they are not kept twice.
            missing = answers[sink.found[requests[index]] :]
            sink.add(list(_episodes(questions[index], missing, settings, task, version, info)))

        try:
            if open_:
                # The seed of a repeated prompt depends on how often it came before, so that a
                # resumed run draws what the whole run would have drawn.
                chosen = [_dressed(policy, questions[i], serving) for i in open_]
                sample(
                    policy,
                    chosen,
                    sampling=settings,
                    batch_size=batch_size,
                    on_done=keep,
                    occurrences=[_occurrence(questions, i) for i in open_],
                )
        except KeyboardInterrupt:
            where = store or out
            raise Interrupted(
                f"Interrupted: {len(kept)} of {len(open_)} prompts were answered"
                + (f" and are kept in {where}." if where else "."),
                advice="Run the same command with --resume to answer the rest." if where else "",
            ) from None
    errors = [f"prompt {i + 1}: {kept[i][0].error}" for i in sorted(kept) if kept[i][0].error is not None]
    _report(questions, kept, errors, bad_lines, len(questions) - len(open_), store or out, json)
    if errors or bad_lines:
        raise typer.Exit(BadInputError.exit_code)


def _report(
    questions: list[tuple[Message, ...]],
    kept: dict[int, list[Generation]],
    errors: list[str],
    bad_lines: list[str],
    skipped: int,
    where: str | Path | None,
    json: bool,
) -> None:
    answers = [g for index in sorted(kept) for g in kept[index]]
    if json:
        finish = Counter(str(g.finish_reason) for g in answers)
        report: dict[str, Any] = {
            "prompts": len(questions),
            "skipped": skipped,
            "answers": len(answers) - sum(g.error is not None for g in answers),
            "tokens": sum(len(g.ids) for g in answers),
            "finish_reasons": dict(finish),
            "errors": errors,
            "bad_lines": bad_lines,
            "kept_in": str(where) if where else None,
        }
        if where is None:
            report["texts"] = [[g.text for g in kept[i]] for i in sorted(kept)]
        print_json(report)
        return
    for error in errors:
        print_warning(error)
    if where is not None:
        known = f", {skipped} prompts had theirs already" if skipped else ""
        made = sum(answer.error is None for answer in answers)
        answered = f"{made} answers to {len(kept) - len(errors)} prompts"
        console.print(f"{answered} in {where}{known}", markup=False)
        return
    for index in sorted(kept):
        console.rule(questions[index][-1].text[:80].replace("\n", " "), align="left")
        for answer in kept[index]:
            if answer.error is None:
                console.print(f"{answer.text}\n  ({answer.finish_reason})\n", markup=False)


def _read(texts: list[str], path: Path | None) -> tuple[list[tuple[Message, ...]], list[str]]:
    """The prompts of the command line and of the file, and what is wrong with those that are none."""
    from corrigible.loop.prompts import read_prompts
    from corrigible.records import as_messages

    questions = [as_messages(text) for text in texts if text.strip()]
    bad = [f"--prompt {i + 1} is empty" for i, text in enumerate(texts) if not text.strip()]
    if path is not None:
        found, bad_lines = read_prompts(path)
        questions += [prompt.messages() for prompt in found]
        bad += bad_lines
    return questions, bad


def _occurrence(questions: Sequence[tuple[Message, ...]], index: int) -> int:
    return sum(questions[i] == questions[index] for i in range(index))


def _serving(folder: str) -> Serving | None:
    """What the policy in a folder was trained to be asked with, if anything."""
    if not Path(folder).is_dir():
        return None
    from corrigible.align.rendering import PLAIN, serving_of

    serving = serving_of(folder)
    if serving == PLAIN:
        return None
    if serving.demonstrations:
        raise BadInputError(
            f"This policy was trained with {serving.demonstrations} retrieved demonstrations before each "
            "question, and there is no bank of them here.",
            advice="From Python: Bank.near and Serving.prompt; or ask it without any: --plain.",
        )
    emit(Said(text=f"Prompts are put as they were in training (--plain does not): {serving.to_json()}"))
    return serving


def _dressed(
    policy: LanguagePolicy, question: tuple[Message, ...], serving: Serving | None
) -> tuple[Message, ...] | Rendered:
    if serving is None:
        return question
    try:
        policy.renderer.prompt(question)
    except BadInputError:
        return question  # it is named, and the others are answered
    return serving.prompt(policy.renderer, question)


def _requests(
    policy: LanguagePolicy,
    questions: Sequence[tuple[Message, ...]],
    settings: Sampling,
    serving: Serving | None,
) -> list[str]:
    """One key per prompt: equal exactly when the answers would be the same ones."""
    weights = policy.weights_sha256()
    keys = []
    for index, question in enumerate(questions):
        text = jsonlib.dumps(
            [
                weights,
                settings.to_json(),
                [m.to_json() for m in question],
                _occurrence(questions, index),
                *([] if serving is None else [serving.to_json()]),
            ],
            sort_keys=True,
        )
        keys.append(hashlib.sha256(text.encode()).hexdigest())
    return keys


def _episodes(
    question: tuple[Message, ...],
    answers: Sequence[Generation],
    settings: Sampling,
    task: str,
    version: str | None,
    info: dict[str, Any],
) -> Iterator[Episode]:
    from corrigible.models import to_episode

    for answer in answers:
        if answer.error is None:
            episode = to_episode(question, answer, version, task, settings)
            yield episode.model_copy(update={"info": info})


@dataclass
class _Sink:
    """Where episodes go, and which requests it already holds answers to."""

    found: Counter[str]
    add: Callable[[list[Episode]], Any]
    version: Callable[[LanguagePolicy], str | None]


@contextmanager
def _sink(store: str | None, out: Path | None, task: str, resume: bool) -> Iterator[_Sink]:
    if store is not None:
        from corrigible.store import Store

        with Store.open(store) as opened:
            held = (e for e in opened.episodes(task=task)) if resume else iter(())
            found = Counter(str(e.info["request"]) for e in held if "request" in e.info)
            yield _Sink(found, opened.add_episodes, lambda policy: _policy_version(opened, policy))
    elif out is not None:
        try:
            found = _found_in(out, resume)
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a", encoding="utf-8") as file:

                def add(episodes: list[Episode]) -> None:
                    file.write("".join(episode.to_json_text() + "\n" for episode in episodes))
                    file.flush()

                yield _Sink(found, add, lambda policy: None)
        except OSError as error:
            raise StorageError(
                f"{out} cannot be written: {error}", advice="Check the free space and the permissions."
            ) from error
    else:
        yield _Sink(Counter(), lambda episodes: None, lambda policy: None)


def _found_in(out: Path, resume: bool) -> Counter[str]:
    from corrigible.records import Episode

    if not out.exists():
        return Counter()
    if not resume:
        raise BadInputError(
            f"{out} exists already.", advice="Add --resume to go on with it, or name another."
        )
    found: Counter[str] = Counter()
    whole = 0
    with out.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break  # a killed run may leave half a line
            try:
                found[str(Episode.from_json(line).info.get("request"))] += 1
            except BadInputError as error:
                raise BadInputError(f"{out} line {number} is no episode: {error}") from error
            whole += len(line)
    with out.open("rb+") as file:
        file.truncate(whole)
    return found


def _policy_version(store: Store, policy: LanguagePolicy) -> str:
    """The id of the version with exactly these weights; written down if the store does not know it."""
    from corrigible.records import PolicyVersion

    weights = policy.weights_sha256("adapter" if policy.has_adapter else "all")
    for version in store.policies():
        if version.weights == weights:
            return version.id
    version = PolicyVersion(
        name=Path(policy.name).name,
        base_model=policy.base_name,
        weights=weights,
        adapter=policy.name if policy.has_adapter else None,
        created_by="corrigible generate",
    )
    store.add_policies([version])
    return version.id
