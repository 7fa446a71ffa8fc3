"""TRL dataset rows: preference (explicit or implicit prompt), unpaired preference, stepwise
supervision, prompt-completion, language modelling; each plain or conversational.

https://huggingface.co/docs/trl/dataset_formats. A plain prompt becomes one user message and a plain
completion one response text, so a plain file comes back as it was.

| row | record |
|---|---|
| prompt, chosen, rejected | comparison |
| chosen, rejected | comparison; the prompt is what both share |
| prompt, completion, label | reaction, +1 or −1 |
| prompt, completions, labels | step_labels on a trajectory with one message a step |
| prompt, completion | demonstration |
| messages, or text | demonstration |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from corrigible.errors import BadInputError
from corrigible.records import Demonstration, Feedback, Item, Message, Reaction, StepLabels, TargetRef
from corrigible.store.formats.exporting import ExportRun, pair_of, prompt_of
from corrigible.store.formats.readers import read_json
from corrigible.store.formats.registry import Entry, Origin, Parsed, exporter, importer
from corrigible.store.formats.shapes import (
    Messages,
    comparison_row,
    conversation,
    given,
    has,
    messages_of,
    parse_any,
    recognise,
    response,
    response_item,
    shape,
    simplest,
    split_last_turn,
    split_shared,
    unknown_keys,
)

_TRUE = frozenset({"true", "1", "1.0", "yes"})
_FALSE = frozenset({"false", "0", "0.0", "no", "-1"})


@shape("trl-preference", format="trl", matches=has("prompt", "chosen", "rejected"))
def preference(row: Mapping[str, Any], origin: Origin) -> Parsed:
    """A comparison with its prompt given."""
    return comparison_row(
        row,
        origin,
        prompt=conversation(row["prompt"], "prompt"),
        chosen=response(row["chosen"], "chosen"),
        rejected=response(row["rejected"], "rejected"),
        not_held=unknown_keys(row, "prompt", "chosen", "rejected"),
    )


@shape("trl-implicit", format="trl", matches=has("chosen", "rejected"))
def implicit(row: Mapping[str, Any], origin: Origin) -> Parsed:
    """A comparison whose prompt is what both sides begin with."""
    chosen, rejected = row["chosen"], row["rejected"]
    not_held = unknown_keys(row, "chosen", "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt, first, second = _split_text(chosen, rejected)
        messages = conversation(prompt, "prompt") if prompt else ()
        return comparison_row(row, origin, prompt=messages, chosen=first, rejected=second, not_held=not_held)
    shared, one, two = split_shared(conversation(chosen, "chosen"), conversation(rejected, "rejected"))
    return comparison_row(
        row, origin, prompt=shared, chosen=simplest(one), rejected=simplest(two), not_held=not_held
    )


def _split_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Longest common prefix, moved back to the last white space so that no word is cut."""
    if chosen == rejected:
        raise BadInputError("chosen and rejected are equal: nothing was preferred")
    cut = 0
    while cut < min(len(chosen), len(rejected)) and chosen[cut] == rejected[cut]:
        cut += 1
    while cut and not chosen[cut : cut + 1].isspace():
        cut -= 1
    return chosen[:cut], chosen[cut:], rejected[cut:]


@shape("trl-stepwise", format="trl", matches=has("prompt", "completions", "labels"))
def stepwise(row: Mapping[str, Any], origin: Origin) -> Parsed:
    """Labels on the steps of one completion."""
    steps, labels = row["completions"], row["labels"]
    if not isinstance(steps, list) or not isinstance(labels, list) or len(steps) != len(labels) or not steps:
        raise BadInputError("completions and labels must be lists of the same length, at least 1")
    messages: list[Message] = []
    for index, step in enumerate(steps):
        messages += (
            (Message(role="assistant", content=step),)
            if isinstance(step, str)
            else conversation(step, f"completions[{index}]")
        )
    if len(messages) != len(steps):
        raise BadInputError("each of completions must be text or a list of exactly one message")
    values = [_truth(label, f"labels[{index}]") for index, label in enumerate(labels)]
    context = Item.of_messages(conversation(row["prompt"], "prompt"))
    target = Item.of_messages(messages, "trajectory")
    said = given(row, origin)
    payload = StepLabels.model_validate(
        {
            "labels": [{"i": i, "value": value} for i, value in enumerate(values)],
            "first_error": values.index(-1) if -1 in values else None,
            "judged_until": len(values) - 1,
        }
    )
    record = Feedback.on(
        [TargetRef.of(target)],
        payload,
        annotator=said.annotator,
        context=context.sha256,
        **said.envelope,
    )
    return Parsed([record], [context, target], not_held=unknown_keys(row, "prompt", "completions", "labels"))


@shape("trl-unpaired", format="trl", matches=has("prompt", "completion", "label"))
def unpaired(row: Mapping[str, Any], origin: Origin) -> Parsed:
    """A thumb up or down on one completion."""
    context = Item.of_messages(conversation(row["prompt"], "prompt"))
    target = response_item(response(row["completion"], "completion"))
    said = given(row, origin)
    record = Feedback.on(
        [TargetRef.of(target)],
        Reaction(value=_truth(row["label"], "label")),
        annotator=said.annotator,
        context=context.sha256,
        **said.envelope,
    )
    return Parsed([record], [context, target], not_held=unknown_keys(row, "prompt", "completion", "label"))


def _truth(value: Any, name: str) -> Any:
    text = str(value).strip().lower()
    if text in _TRUE:
        return 1
    if text in _FALSE:
        return -1
    raise BadInputError(f"{name} is {value!r}, where true or false was expected")


@shape("trl-prompt-completion", format="trl", matches=has("prompt", "completion"))
def prompt_completion(row: Mapping[str, Any], origin: Origin) -> Parsed:
    """A completion to imitate."""
    prompt = conversation(row["prompt"], "prompt")
    completion = response(row["completion"], "completion")
    return demonstration_row(row, origin, prompt, completion, unknown_keys(row, "prompt", "completion"))


@shape("messages", format="openai-chat", matches=has("messages"))
def language_modelling(row: Mapping[str, Any], origin: Origin) -> Parsed:
    """A conversation to imitate: its last turn is the demonstration."""
    prompt, turn = split_last_turn(conversation(row["messages"], "messages"))
    return demonstration_row(row, origin, prompt, simplest(turn), unknown_keys(row, "messages"))


@shape("text", format="trl", matches=lambda row: isinstance(row.get("text"), str) and len(row) <= 2)
def plain_text(row: Mapping[str, Any], origin: Origin) -> Parsed:
    """A text to imitate, without a prompt."""
    return demonstration_row(row, origin, (), row["text"], unknown_keys(row, "text"))


def demonstration_row(
    row: Mapping[str, Any],
    origin: Origin,
    prompt: Messages,
    completion: str | Messages,
    not_held: list[str],
) -> Parsed:
    """One demonstration. Who wrote it is not in these formats: ``source`` is expert, as for SFT data."""
    if not completion:
        raise BadInputError("the completion is empty: nothing is demonstrated")
    context = Item.of_messages(prompt) if prompt else None
    target = response_item(completion)
    said = given(row, origin)
    record = Feedback.on(
        [TargetRef.of(target)],
        Demonstration(source="expert"),
        annotator=said.annotator,
        context=context.sha256 if context else None,
        **said.envelope,
    )
    return Parsed([record], [context, target] if context else [target], not_held=not_held)


def _is_trl(row: Mapping[str, Any]) -> bool:
    found = recognise(row)
    return found is not None and found.format == "trl"


@importer("trl", read=read_json, sniff=lambda path, rows: any(_is_trl(row) for row in rows))
def parse(row: Mapping[str, Any], origin: Origin) -> Parsed:
    """TRL rows as JSON lines: preference, unpaired, stepwise, prompt-completion, language modelling."""
    if set(row) == {"prompt"}:
        raise BadInputError("a prompt alone carries no feedback")
    return parse_any(row, origin)


# --- out ------------------------------------------------------------------------------------------

_TYPES = {
    "comparison": "preference",
    "reaction": "unpaired",
    "step_labels": "stepwise",
    "demonstration": "prompt-completion",
}


@exporter(
    "trl",
    options={
        "type": "preference, unpaired, stepwise, prompt-completion or language-modeling; "
        "without it, the type that most records have",
        "style": "conversational (default) or plain",
        "prompt": "explicit (default) or implicit, for preference rows",
    },
)
def export(run: ExportRun) -> None:
    """TRL rows as JSON lines, one type per file (--option type=…, style=…, prompt=…)."""
    run.write_jsonl(to_row(run))


def to_row(run: ExportRun) -> Callable[[Entry], dict[str, Any]]:
    """The row function for the options of ``run``; tables use it too."""
    style = _choice(run, "style", "conversational", "plain")
    prompt_style = _choice(run, "prompt", "explicit", "implicit")
    wanted = run.options.get("type") or _most_frequent(run)
    if wanted not in {*_TYPES.values(), "language-modeling"}:
        raise BadInputError(f"TRL has no type {wanted!r}.", advice=f"Known: {', '.join(_TYPES.values())}.")

    def prompt(entry: Entry) -> Any:
        messages = prompt_of(entry)
        if style == "conversational":
            return _dicts(messages)
        if not messages:
            return ""
        if len(messages) == 1 and messages[0].role == "user" and isinstance(messages[0].content, str):
            return messages[0].content
        raise BadInputError("a prompt of several messages, which has no plain form")

    def completion(item: Item) -> Any:
        if style == "conversational":
            return _dicts(messages_of(item))
        simple = simplest(messages_of(item))
        if isinstance(simple, str):
            return simple
        raise BadInputError("a response of several messages, which has no plain form")

    def row(entry: Entry) -> dict[str, Any]:
        record, payload = entry.feedback, entry.feedback.payload
        if payload is None:
            raise BadInputError("not judged")
        kind = _TYPES.get(record.kind)
        if kind != wanted and not (kind == "prompt-completion" and wanted == "language-modeling"):
            raise BadInputError(f"not held in a TRL {wanted} file")
        if isinstance(payload, StepLabels):
            return _stepwise(entry, payload, prompt(entry), style)
        if wanted == "preference":
            _, chosen, rejected = pair_of(entry)
            if prompt_style == "explicit":
                sides = {"chosen": completion(chosen), "rejected": completion(rejected)}
                return {"prompt": prompt(entry), **sides}
            start = prompt(entry)
            return {"chosen": start + completion(chosen), "rejected": start + completion(rejected)}
        target = entry.item(record.targets[0].sha256)
        if isinstance(payload, Reaction):
            if payload.value == 0:
                raise BadInputError("a retracted reaction")
            return {"prompt": prompt(entry), "completion": completion(target), "label": payload.value > 0}
        if wanted == "language-modeling":
            key = "messages" if style == "conversational" else "text"
            return {key: prompt(entry) + completion(target)}
        return {"prompt": prompt(entry), "completion": completion(target)}

    return row


def _stepwise(entry: Entry, payload: StepLabels, prompt: Any, style: str) -> dict[str, Any]:
    steps = messages_of(entry.item(entry.feedback.targets[0].sha256))
    values = {label.i: label.value for label in payload.labels}
    if set(values) != set(range(len(steps))) or any(value not in (1, -1) for value in values.values()):
        raise BadInputError("steps without a label, or labels other than right and wrong")
    texts = [simplest((step,)) for step in steps]
    if not all(isinstance(text, str) for text in texts):
        raise BadInputError("steps that are not plain text")
    if style == "conversational":
        texts = [_dicts((step,)) for step in steps]  # type: ignore[misc]
    return {
        "prompt": prompt,
        "completions": texts,
        "labels": [values[i] > 0 for i in range(len(steps))],
    }


def _dicts(messages: Messages) -> list[dict[str, Any]]:
    return [message.to_json() for message in messages]


def _choice(run: ExportRun, name: str, *choices: str) -> str:
    value = str(run.options.get(name) or choices[0])
    if value not in choices:
        raise BadInputError(f"The option {name} is {value!r}.", advice=f"Choose {' or '.join(choices)}.")
    return value


def _most_frequent(run: ExportRun) -> str:
    filters = {k: v for k, v in run.filters.items() if k not in ("kind", "limit", "after_cursor")}
    if kind := run.filters.get("kind"):
        return _TYPES.get(kind, "preference")
    counts = {kind: run.store.count_feedback(kind=kind, **filters) for kind in _TYPES}
    return _TYPES[max(counts, key=lambda kind: counts[kind])]
