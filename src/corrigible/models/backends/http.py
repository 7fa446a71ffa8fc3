"""One JSON request, tried again where that can help; a failure is a word, not an exception text to parse."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from corrigible.models.backends.answers import Failure

_RETRIED = (Failure.busy, Failure.server, Failure.connection, Failure.timeout)
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class RequestFailed(Exception):
    """No usable reply: ``failure`` says what kind, the text what the server said."""

    def __init__(self, failure: Failure, text: str, wait: float | None = None) -> None:
        super().__init__(text)
        self.failure = failure
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass
class JsonClient:
    """POSTs JSON to one server. Safe for several threads.

    Attributes:
        key: sent as a bearer token, and nowhere else.
        timeout: seconds for one try, from connecting to the last byte.
        retries: further tries after the first, for what may pass (429, 5xx, no connection, time-out).
        backoff: seconds before the first further try; doubled for each, with jitter; at most ``patience``.
            A ``Retry-After`` of the server counts instead.
    """

    base_url: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    retries: int = 4
    backoff: float = 0.5
    patience: float = 30.0
    stop: threading.Event = field(default_factory=threading.Event, repr=False)

    def __post_init__(self) -> None:
        host = urllib.parse.urlsplit(self.base_url).hostname
        handlers: list[Any] = [_NoRedirect()]
        if host in _LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)
        self._random = random.Random()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The reply's JSON.

        Raises:
            RequestFailed: after the last try, or at once where another try cannot help.
        """
        for attempt in range(self.retries + 1):
            try:
                return self._once(path, body)
            except RequestFailed as failed:
                last = attempt == self.retries or self.stop.is_set()
                if last or failed.failure not in _RETRIED:
                    raise
                pause = min(self.patience, self.backoff * 2**attempt) * self._random.uniform(0.5, 1.0)
                self.stop.wait(pause if failed.wait is None else min(failed.wait, self.patience))
        raise AssertionError("the last try returns or raises")

    def _once(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        url = self.base_url.rstrip("/") + path
        request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
        deadline = time.monotonic() + self.timeout
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return _parsed(_read(response, deadline))
        except urllib.error.HTTPError as error:
            with error:
                raise _of_status(error) from None
        except TimeoutError:
            raise RequestFailed(Failure.timeout, f"no whole reply within {self.timeout:g} s") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise RequestFailed(Failure.timeout, f"no reply within {self.timeout:g} s") from None
            raise RequestFailed(Failure.connection, f"{url}: {error.reason}") from None
        except (OSError, http.client.HTTPException) as error:
            raise RequestFailed(Failure.connection, f"{url}: {type(error).__name__}: {error}") from None


def _read(response: Any, deadline: float) -> bytes:
    """The whole body; a server that sends a byte now and then does not hold us for ever."""
    parts = []
    while chunk := response.read1(1 << 16):
        parts.append(chunk)
        if time.monotonic() > deadline:
            raise TimeoutError
    body = b"".join(parts)
    promised = response.headers.get("Content-Length", "")
    if promised.isdigit() and len(body) < int(promised):
        raise RequestFailed(Failure.connection, f"{len(body)} of {promised} bytes came")
    return body


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        raise RequestFailed(Failure.reply, f"the reply is no JSON: {body[:200]!r}") from None


def _of_status(error: urllib.error.HTTPError) -> RequestFailed:
    try:
        said = error.read(4000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        said = ""
    text = f"HTTP {error.code}: {said[:500]}"
    after = error.headers.get("Retry-After", "") if error.headers else ""
    wait = float(after) if after.replace(".", "", 1).isdigit() else None
    if error.code == 429:
        return RequestFailed(Failure.busy, text, wait)
    if error.code in (408, 425) or error.code >= 500:
        return RequestFailed(Failure.server, text, wait)
    lower = said.lower()
    if error.code in (400, 413, 422) and ("context_length" in lower or "maximum context" in lower):
        return RequestFailed(Failure.context, text)
    return RequestFailed(Failure.refused, text)
