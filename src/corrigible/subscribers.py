"""Who can listen to the events: the terminal, a JSONL file, TensorBoard, W&B, MLflow.

A subscriber is any callable that takes an event; these also have ``close()``. The last three need
the extra ``trackers`` and say so when it is not installed.
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corrigible.errors import MissingError
from corrigible.events import Alert, AnyEvent, Artefact, Message, Metric, Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID


def _need(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingError(
            f"{what} is not installed.", advice="Install it with: pip install 'corrigible[trackers]'"
        ) from error


class JsonlSubscriber:
    """Appends one JSON object per event to ``path``; each line is flushed, so a killed run keeps its own."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")

    def __call__(self, event: AnyEvent) -> None:
        self._file.write(event.model_dump_json(exclude_none=True) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class RichSubscriber:
    """Bars, latest metrics and lines on a rich console (stderr unless another is given).

    On a terminal the running tasks are live bars and each finished one leaves a line. Elsewhere
    (a log file, CI) there are only lines: one per finished task, and one every ``log_seconds``
    while it runs.
    """

    def __init__(self, console: Console | None = None, *, log_seconds: float = 30.0) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.console = console if console is not None else Console(stderr=True)
        self.log_seconds = log_seconds
        self._live = self.console.is_terminal
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("[dim]{task.fields[metrics]}"),
            console=self.console,
            transient=True,
        )
        self._started = False
        self._tasks: dict[str, TaskID] = {}
        self._since: dict[str, float] = {}
        self._logged: dict[str, float] = {}
        self._metrics: dict[str, float] = {}

    def __call__(self, event: AnyEvent) -> None:
        from rich.markup import escape

        match event:
            case Progress():
                self._progress(event)
            case Metric():
                self._metrics.pop(event.name, None)
                self._metrics[event.name] = event.value
                if self._tasks and self._live:
                    self._bars.update(list(self._tasks.values())[-1], metrics=self._latest_metrics())
            case Artefact():
                self.console.print(f"[dim]{escape(event.name)}:[/] {escape(event.path)}", highlight=False)
            case Alert():
                self.console.print(f"[yellow]! {escape(event.message)}[/]", highlight=False)
            case Message():
                self.console.print(escape(event.text), highlight=False)

    def close(self) -> None:
        if self._started:
            self._bars.stop()
            self._started = False

    def _progress(self, event: Progress) -> None:
        now = time.monotonic()
        since = self._since.setdefault(event.task, now)
        amount = f"{event.done:,.0f}" + (f"/{event.total:,.0f}" if event.total is not None else "")
        amount += f" {event.unit}s"
        finished = event.total is not None and event.done >= event.total
        if finished:
            if event.task in self._tasks:
                self._bars.remove_task(self._tasks.pop(event.task))
            self._since.pop(event.task)
            self._logged.pop(event.task, None)
            self.console.print(self._line(event.task, f"{event.done:,.0f} {event.unit}s", now - since, "✓"))
            if not self._tasks:
                self.close()  # no live display between tasks: a prompt may want the terminal
        elif self._live:
            if not self._started:
                self._bars.start()
                self._started = True
            if event.task not in self._tasks:
                self._metrics.clear()
                self._tasks[event.task] = self._bars.add_task(
                    event.task, total=event.total, amount=amount, metrics=""
                )
            self._bars.update(self._tasks[event.task], completed=event.done, total=event.total, amount=amount)
        elif now - self._logged.setdefault(event.task, now) >= self.log_seconds:
            self._logged[event.task] = now
            self.console.print(self._line(event.task, amount, now - since, "…"))

    def _line(self, task: str, amount: str, seconds: float, mark: str) -> str:
        from rich.markup import escape

        return f"[green]{mark}[/] {escape(task)} [dim]{escape(amount)}, {seconds:.1f} s[/]"

    def _latest_metrics(self) -> str:
        return " ".join(f"{name}={value:.4g}" for name, value in list(self._metrics.items())[-3:])


class TensorBoardSubscriber:
    """Metrics as scalars (with ``/low`` and ``/high`` for an interval), the rest as text."""

    def __init__(self, directory: str | Path) -> None:
        _need("tensorboard", "TensorBoard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(directory))
        self._steps: dict[str, int] = {}

    def __call__(self, event: AnyEvent) -> None:
        seconds = event.at / 1e6
        if isinstance(event, Metric):
            # A metric without a step gets the next one of its name, so that points do not overwrite.
            step = event.step if event.step is not None else self._steps.get(event.name, -1) + 1
            self._steps[event.name] = step
            self._writer.add_scalar(event.name, event.value, step, seconds)
            if event.interval is not None:
                for end, value in zip(("low", "high"), event.interval, strict=True):
                    self._writer.add_scalar(f"{event.name}/{end}", value, step, seconds)
        elif isinstance(event, Alert | Message):
            text = event.message if isinstance(event, Alert) else event.text
            self._writer.add_text(event.kind, text, walltime=seconds)

    def close(self) -> None:
        self._writer.close()


class WandbSubscriber:
    """Metrics to a Weights & Biases run; ``settings`` go to ``wandb.init`` (project, name, mode, dir)."""

    def __init__(self, **settings: Any) -> None:
        self._wandb = _need("wandb", "Weights & Biases (wandb)")
        self._run = self._wandb.init(**settings)

    def __call__(self, event: AnyEvent) -> None:
        if isinstance(event, Metric):
            values = {event.name: event.value}
            if event.interval is not None:
                values |= {f"{event.name}/low": event.interval[0], f"{event.name}/high": event.interval[1]}
            if event.step is not None:
                # W&B's own step must never go back; ours may (two stages of one run), so it is a value.
                values["step"] = event.step
            self._run.log(values)
        elif isinstance(event, Alert):
            self._run.alert(title=event.name, text=event.message)

    def close(self) -> None:
        self._run.finish()


class MlflowSubscriber:
    """Metrics to an MLflow run; ``settings`` go to ``mlflow.start_run`` (run_name, experiment_id, tags)."""

    def __init__(self, **settings: Any) -> None:
        self._mlflow = _need("mlflow", "MLflow")
        self._mlflow.start_run(**settings)

    def __call__(self, event: AnyEvent) -> None:
        if isinstance(event, Metric):
            self._mlflow.log_metric(event.name, event.value, step=event.step)
            if event.interval is not None:
                for end, value in zip(("low", "high"), event.interval, strict=True):
                    self._mlflow.log_metric(f"{event.name}_{end}", value, step=event.step)
        elif isinstance(event, Alert):
            self._mlflow.set_tag(f"alert.{event.name}", event.message)

    def close(self) -> None:
        self._mlflow.end_run()
