"""Every test of the store runs on SQLite and on a PostgreSQL server that is really started here."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from corrigible.store import Store

# The tests are imported one by one, not as a package; the processes they spawn import store_examples as well.
sys.path.insert(0, str(Path(__file__).parent))


def find_binaries() -> Path | None:
    """The folder that holds initdb and postgres (they must be of one version), or None."""
    on_path = shutil.which("postgres")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((f for f in folders if (f / "initdb").exists() and (f / "postgres").exists()), None)


@dataclass
class Server:
    """A PostgreSQL server of our own, on a random loopback port, with a random password."""

    binaries: Path
    home: Path
    port: int = 0
    password: str = field(default_factory=lambda: secrets.token_hex(16))
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        # The server refuses to run as root: then it runs as a user without rights.
        self.as_user: dict[str, Any] = {}
        if os.geteuid() == 0:
            owner = next(u for u in pwd.getpwall() if u.pw_name in ("postgres", "nobody"))
            self.as_user = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
            os.chown(self.home, owner.pw_uid, owner.pw_gid)
        secret = self.home / "password"
        secret.write_text(self.password)
        if self.as_user:
            os.chown(secret, self.as_user["user"], self.as_user["group"])
        secret.chmod(0o600)
        self._run(
            [
                *(self.binaries / "initdb", "-D", self.home / "data", "-U", "corrigible", "--no-sync"),
                *("--encoding=UTF8", "--locale=C", "--auth=scram-sha-256", f"--pwfile={secret}"),
            ]
        )
        self.start()

    def _run(self, command: list[Any]) -> None:
        done = subprocess.run(command, cwd=self.home, capture_output=True, text=True, **self.as_user)
        assert done.returncode == 0, f"{command[0]} failed: {done.stdout}{done.stderr}"

    def start(self) -> None:
        for _attempt in range(5):
            if self.port == 0:
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", 0))
                    self.port = probe.getsockname()[1]
            settings = {
                "listen_addresses": "127.0.0.1",
                "unix_socket_directories": str(self.home),
                "port": str(self.port),
                "fsync": "off",
                "shared_buffers": "64MB",
                "max_connections": "40",
            }
            options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
            with (self.home / "log").open("ab") as log:
                self.process = subprocess.Popen(
                    [self.binaries / "postgres", "-D", self.home / "data", *options],
                    cwd=self.home,
                    stdout=log,
                    stderr=log,
                    **self.as_user,
                )
            if self._answers():
                return
            self.stop()
            self.port = 0
        raise AssertionError(f"PostgreSQL did not start: {(self.home / 'log').read_text()[-2000:]}")

    def _answers(self) -> bool:
        import psycopg

        assert self.process is not None
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=2).close()
            except psycopg.OperationalError:
                time.sleep(0.1)
            else:
                return True
        return False

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT is the server's "fast" shutdown: it throws everybody out and ends cleanly."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(30)
            self.process = None

    def url(self, database: str) -> str:
        return f"postgresql://corrigible:{self.password}@127.0.0.1:{self.port}/{database}"

    def empty_database(self) -> str:
        """The URL of the one database that the tests use in turn, made empty (far cheaper than a new one)."""
        import psycopg

        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        return self.url("postgres")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    pytest.importorskip("psycopg", reason="the psycopg driver is missing: pip install 'corrigible[postgres]'")
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL server binaries are missing (Debian: apt-get install postgresql)")
    # Not pytest's own temporary folder, which a server that is not root cannot enter.
    with tempfile.TemporaryDirectory(prefix="corrigible-postgres-", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        home.chmod(0o755)
        server = Server(binaries, home)
        try:
            yield server
        finally:
            server.stop(signal.SIGQUIT)  # at once: nobody needs this data again


BACKENDS = ("sqlite", pytest.param("postgres", marks=pytest.mark.postgres))


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store may be made: a file path, or the URL of a new, empty database."""
    if request.param == "sqlite":
        return str(tmp_path / "corrigible.db")
    server: Server = request.getfixturevalue("postgres_server")
    return server.empty_database()


@pytest.fixture
def store(url: str, tmp_path: Path) -> Iterator[Store]:
    with Store.open(url, blobs=tmp_path / "blobs", timeout=20.0) as opened:
        yield opened
