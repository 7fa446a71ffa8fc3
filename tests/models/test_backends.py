"""Back ends: what a server tells is kept, what it does not tell stays unknown, what fails has a reason.

The server is a small one on the loopback that answers as it is told to. vLLM is not installed here: its
tests run against a STAND-IN with vLLM's names, so they show what we ask and read, not that vLLM works.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from corrigible.errors import BadInputError, MissingError
from corrigible.models import LanguagePolicy, generate, to_episode
from corrigible.models.backends import Backend, Failure, OpenAIServer, ServedAnswer, VllmEngine
from corrigible.records import FinishReason, Sampling

Reply = tuple[int, Any, dict[str, str]]


class Loopback:
    """A server whose answer to each request is what ``answer(path, body, number)`` returns."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.answer: Callable[[str, dict[str, Any], int], Reply] = lambda path, body, number: (
            200,
            chat(str(body["seed"])),
            {},
        )
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    number = len(outer.requests)
                    outer.requests.append((self.path, body, dict(self.headers)))
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                try:
                    status, value, headers = outer.answer(self.path, body, number)
                    data = value if isinstance(value, bytes) else json.dumps(value).encode()
                    if status == 0:  # hang up
                        self.close_connection = True
                        return
                    self.send_response(status)
                    for name, text in {"Content-Length": str(len(data)), **headers}.items():
                        self.send_header(name, text)
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the client has gone
                finally:
                    with outer._lock:
                        outer.at_once -= 1

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def loopback() -> Iterator[Loopback]:
    server = Loopback()
    yield server
    server.close()


def chat(text: str | None, finish: str = "stop", **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish, **more}
    return {"model": "loop-1", "choices": [choice]}


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def server(loopback: Loopback, **settings: Any) -> OpenAIServer:
    return OpenAIServer(loopback.url, "m", **{"backoff": 0.01, "timeout": 5.0, **settings})


def one(backend: Backend, sampling: Sampling | None = None) -> ServedAnswer:
    return backend.generate([user("Hi")], n=1, sampling=sampling)[0][0]


def test_what_is_sent_and_where_it_lands(loopback: Loopback) -> None:
    done: dict[int, list[ServedAnswer]] = {}
    sampling = Sampling(max_tokens=7, temperature=0.5, top_p=0.9, stop=("END",))
    prompts = [user("one"), user("two"), user("one")]
    answers = server(loopback, key="secret").generate(
        prompts, n=3, sampling=sampling, seed=4, on_done=done.__setitem__
    )
    assert dict(enumerate(answers)) == done and [len(a) for a in answers] == [3, 3, 3]
    assert all(a.text == str(a.seed) and a.model == "loop-1" for group in answers for a in group)
    assert len({a.seed for group in answers for a in group}) == 9
    path, body, headers = loopback.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert {k: body[k] for k in ("model", "temperature", "top_p", "max_tokens", "stop", "n")} == {
        "model": "m",
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 7,
        "stop": ["END"],
        "n": 1,
    }
    assert {json.dumps(b["messages"]) for _, b, _ in loopback.requests} == {
        json.dumps(user("one")),
        json.dumps(user("two")),
    }
    again = server(loopback).generate(prompts[::-1], n=2, sampling=sampling, seed=4)
    assert [a.seed for a in again[1]] == [a.seed for a in answers[1][:2]], "a seed belongs to its prompt"
    other = server(loopback).generate(prompts, n=1, sampling=sampling, seed=5)
    assert other[0][0].seed != answers[0][0].seed


def test_what_a_server_does_not_tell_stays_unknown(loopback: Loopback) -> None:
    answer = one(server(loopback))
    assert (answer.ids, answer.logprobs, answer.sampling_logprobs, answer.prompt_ids) == (None,) * 4
    with pytest.raises(BadInputError, match="prompt_ids, ids, logprobs, sampling_logprobs"):
        answer.known()
    step = to_episode(user("Hi"), answer, None, "t", Sampling()).steps[0]
    assert (step.token_ids, step.logprobs) == (None, None) and step.finish_reason is FinishReason.stop
    loopback.answer = lambda *_: (200, chat("x"), {})
    assert one(server(loopback), Sampling(stop=("E",))).finish_reason is None, "either, and it did not say"
    assert one(server(loopback), Sampling(stop=("E",))).ended is None
    for more, reason in (
        ({"stop_reason": "E"}, FinishReason.stop_string),
        ({"stop_reason": None}, FinishReason.stop),
    ):
        loopback.answer = lambda *_, more=more: (200, chat("x", **more), {})
        assert one(server(loopback), Sampling(stop=("E",))).finish_reason is reason
    loopback.answer = lambda *_: (200, chat("x", "length"), {})
    assert one(server(loopback)).finish_reason is FinishReason.length


def logprobs(*values: float | None) -> dict[str, Any]:
    return {"content": [{"token": "t", "logprob": value} for value in values]}


def test_logprobs_are_kept_only_where_it_is_known_whose_they_are(loopback: Loopback) -> None:
    loopback.answer = lambda *_: (200, chat("ab", logprobs=logprobs(-0.5, -1.25), token_ids=[5, 6]), {})
    plain, cold = Sampling(), Sampling(temperature=0.5)
    answer = one(server(loopback), plain)
    assert answer.logprobs == answer.sampling_logprobs == (-0.5, -1.25) and answer.ids == (5, 6)
    answer = one(server(loopback), cold)
    assert answer.logprobs is None and answer.sampling_logprobs is None
    answer = one(server(loopback, logprobs_of="plain"), cold)
    assert (answer.logprobs, answer.sampling_logprobs) == ((-0.5, -1.25), None)
    assert to_episode(user("Hi"), answer, None, "t", cold).steps[0].info["sampling_logprobs"] is None
    answer = one(server(loopback, logprobs_of="sampling"), cold)
    assert (answer.logprobs, answer.sampling_logprobs) == (None, (-0.5, -1.25))


@pytest.mark.parametrize("values", [(-0.5,), (-0.5, 0.7), (-0.5, float("nan")), (-0.5, -0.1, -0.2)])
def test_impossible_logprobs_are_unknown_and_said_so(
    loopback: Loopback, values: tuple[float, ...], recorded_events: list[Any]
) -> None:
    loopback.answer = lambda *_: (200, chat("ab", logprobs=logprobs(*values), token_ids=[5, 6]), {})
    answer = one(server(loopback))
    assert answer.text == "ab" and answer.logprobs is None and answer.failure is None
    assert [e.name for e in recorded_events if e.kind == "alert"] == ["logprobs_unusable"]


def test_one_missing_logprob_makes_all_unknown(loopback: Loopback) -> None:
    loopback.answer = lambda *_: (200, chat("ab", logprobs=logprobs(-0.5, None)), {})
    assert one(server(loopback)).logprobs is None


def test_completions_send_and_return_tokens(loopback: Loopback, shared_policy: LanguagePolicy) -> None:
    """A server that holds our very model gives what our engine gives, and it can be trained on."""
    mine = generate(shared_policy, [user("Hi")], n=1, sampling=Sampling(max_tokens=6))[0][0]

    def answer(path: str, body: dict[str, Any], number: int) -> Reply:
        assert path == "/v1/completions" and body["prompt"] == list(mine.prompt_ids)
        assert body["return_token_ids"] is True
        choice = {
            "text": mine.text,
            "finish_reason": "length",
            "token_ids": list(mine.ids),
            "logprobs": {"tokens": ["?"] * 6, "token_logprobs": list(mine.logprobs)},
        }
        return 200, {"model": "m", "choices": [choice]}, {}

    loopback.answer = answer
    backend = server(loopback, endpoint="completions", renderer=shared_policy.renderer, token_ids=True)
    known = one(backend, Sampling(max_tokens=6)).known()
    assert (known.prompt_ids, known.ids, known.logprobs) == (mine.prompt_ids, mine.ids, mine.logprobs)
    rendered = shared_policy.renderer.prompt(user("Hi"))
    assert backend.generate([rendered], sampling=Sampling(max_tokens=6))[0][0].ids == mine.ids


@pytest.mark.parametrize(
    ("reply", "failure", "tries"),
    [
        ((503, {"error": "x"}, {}), Failure.server, 3),
        ((429, {"error": "x"}, {"Retry-After": "0"}), Failure.busy, 3),
        ((0, {}, {}), Failure.connection, 3),
        ((401, {"error": "bad key"}, {}), Failure.refused, 1),
        ((302, {}, {"Location": "http://elsewhere.invalid/"}), Failure.refused, 1),
        ((400, {"error": {"code": "context_length_exceeded"}}, {}), Failure.context, 1),
        ((200, b"<html>", {}), Failure.reply, 1),
        ((200, {"choices": []}, {}), Failure.reply, 1),
        ((200, [1], {}), Failure.reply, 1),
        ((200, chat(None), {}), Failure.reply, 1),
        ((200, chat("half", "content_filter"), {}), Failure.filtered, 1),
    ],
)
def test_failures_have_a_reason_and_are_retried_where_it_helps(
    loopback: Loopback, reply: Reply, failure: Failure, tries: int
) -> None:
    loopback.answer = lambda *_: reply
    answer = one(server(loopback, retries=2, key="secret"))
    assert (answer.failure, answer.text, answer.logprobs) == (failure, "", None)
    assert len(loopback.requests) == tries
    assert answer.error and "secret" not in answer.error
    with pytest.raises(BadInputError, match=f"no answer .{failure}"):
        answer.known()
    with pytest.raises(BadInputError, match="no answer to record"):
        to_episode(user("Hi"), answer, None, "t", Sampling())


def test_a_try_that_helps_gives_the_answer(loopback: Loopback) -> None:
    loopback.answer = lambda path, body, number: (500, {}, {}) if number < 2 else (200, chat("there"), {})
    assert one(server(loopback, retries=2)).text == "there"
    assert len({json.dumps(b) for _, b, _ in loopback.requests}) == 1, "the same request, the same seed"


def test_a_server_that_hangs_times_out(loopback: Loopback) -> None:
    release = threading.Event()

    def hang(*_: Any) -> Reply:
        release.wait(20)
        return 200, chat("late"), {}

    loopback.answer = hang
    answer = one(server(loopback, timeout=0.2, retries=0))
    release.set()
    assert answer.failure is Failure.timeout


def test_a_server_that_is_not_there(loopback: Loopback) -> None:
    loopback.close()
    answer = one(OpenAIServer(loopback.url, "m", retries=1, backoff=0.01))
    assert answer.failure is Failure.connection
    loopback.close = lambda: None  # type: ignore[method-assign]


def test_one_failure_does_not_lose_the_others(loopback: Loopback) -> None:
    loopback.answer = lambda path, body, number: (
        (400, {}, {}) if body["messages"][0]["content"] == "bad" else (200, chat("fine"), {})
    )
    answers = server(loopback).generate([user("a"), user("bad"), [], user("b")], n=2)
    assert [[a.failure for a in group] for group in answers] == [
        [None, None],
        [Failure.refused] * 2,
        [Failure.prompt] * 2,
        [None, None],
    ]
    assert answers[3][1].text == "fine"


def test_concurrency_is_used_and_bounded(loopback: Loopback) -> None:
    four = threading.Barrier(4, timeout=20)  # nobody gets an answer before four have asked

    def together(path: str, body: dict[str, Any], number: int) -> Reply:
        four.wait()
        return 200, chat("x"), {}

    loopback.answer = together
    answers = server(loopback, concurrency=4).generate([user(str(i)) for i in range(16)])
    assert all(group[0].failure is None for group in answers)
    assert loopback.most_at_once == 4


def test_an_interruption_stops_asking(loopback: Loopback) -> None:
    def interrupt(index: int, answers: list[ServedAnswer]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        server(loopback, concurrency=1).generate([user(str(i)) for i in range(200)], on_done=interrupt)
    assert len(loopback.requests) < 200


def test_bad_use(loopback: Loopback) -> None:
    backend = server(loopback)
    with pytest.raises(BadInputError, match="no prompts"):
        backend.generate([])
    with pytest.raises(BadInputError, match="at least 1"):
        backend.generate([user("a")], n=0)
    for sampling in (Sampling(top_k=3), Sampling(min_p=0.1)):
        with pytest.raises(BadInputError, match="extensions"):
            backend.generate([user("a")], sampling=sampling)
    assert not loopback.requests
    server(loopback, extensions=True).generate([user("a")], sampling=Sampling(top_k=3, min_p=0.1))
    assert (loopback.requests[0][1]["top_k"], loopback.requests[0][1]["min_p"]) == (3, 0.1)
    with pytest.raises(BadInputError, match="http"):
        OpenAIServer("localhost:8000", "m")
    with pytest.raises(BadInputError, match="positive"):
        OpenAIServer(loopback.url, "m", concurrency=0)
    with pytest.raises(BadInputError, match="completions"):
        OpenAIServer(loopback.url, "m", endpoint="responses")  # type: ignore[arg-type]
    failed = server(loopback, endpoint="completions").generate([user("a")])[0][0]
    assert failed.failure is Failure.prompt and "renderer" in str(failed.error)


# -- vLLM, as a STAND-IN --------------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, shared_policy: LanguagePolicy) -> SimpleNamespace:
    """A module called vllm with the names that we use, over our own engine."""
    seen = SimpleNamespace(options=None, params=[])

    class SamplingParams:
        def __init__(self, **settings: Any) -> None:
            self.__dict__.update(settings)
            seen.params.append(self)

    class LLM:
        def __init__(self, model: str, **options: Any) -> None:
            seen.options = options
            config = SimpleNamespace(max_model_len=shared_policy.context_length)
            self.llm_engine = SimpleNamespace(model_config=config)

        def get_tokenizer(self) -> Any:
            return shared_policy.tokenizer

        def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
            from corrigible.models import Rendered

            outputs = []
            for prompt, settings in zip(prompts, params, strict=True):
                sampling = Sampling(
                    max_tokens=settings.max_tokens,
                    temperature=settings.temperature,
                    stop=tuple(settings.stop or ()),
                )
                rendered = Rendered.from_tokens(prompt["prompt_token_ids"], ())
                mine = generate(shared_policy, [rendered], sampling=sampling, seed=settings.seed)[0][0]
                ended = mine.finish_reason is FinishReason.stop
                by_text = mine.finish_reason is FinishReason.stop_string
                tables = [
                    {token: SimpleNamespace(logprob=value)}
                    for token, value in zip(mine.ids, mine.logprobs, strict=True)
                ]
                output = SimpleNamespace(
                    token_ids=list(mine.ids),
                    text=mine.text,
                    logprobs=tables,
                    finish_reason="stop" if ended or by_text else "length",
                    stop_reason=sampling.stop[0] if by_text else None,
                )
                outputs.append(SimpleNamespace(outputs=[output]))
            return outputs

    module = SimpleNamespace(LLM=LLM, SamplingParams=SamplingParams, __spec__=None)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return seen


def test_vllm_stand_in_gives_generations(stand_in: SimpleNamespace, shared_policy: LanguagePolicy) -> None:
    backend = VllmEngine("folder", gpu_memory_utilization=0.5)
    assert stand_in.options == {"gpu_memory_utilization": 0.5, "logprobs_mode": "raw_logprobs"}
    done: dict[int, Any] = {}
    prompts: list[Any] = [user("Hi"), [], user("x" * 3000), user("there")]
    answers = backend.generate(
        prompts, n=2, sampling=Sampling(max_tokens=9), seed=3, on_done=done.__setitem__
    )
    assert dict(enumerate(answers)) == done
    assert [a[0].failure for a in answers] == [None, Failure.prompt, Failure.context, None]
    for group in (answers[0], answers[3]):
        known = [answer.known() for answer in group]
        assert known[0].ids != known[1].ids and known[0].prompt_ids == known[1].prompt_ids
        assert all(g.logprobs == g.sampling_logprobs and len(g.logprobs) == len(g.ids) for g in known)
    assert [(p.seed, p.n, p.logprobs, p.top_k) for p in stand_in.params] == [
        (a.seed, 1, 0, -1) for i in (0, 3) for a in answers[i]
    ]


def test_vllm_stand_in_knows_one_distribution(stand_in: SimpleNamespace) -> None:
    cold = Sampling(max_tokens=5, temperature=0.5)
    raw = VllmEngine("folder").generate([user("Hi")], sampling=cold)[0][0]
    assert raw.logprobs is not None and raw.sampling_logprobs is None and raw.ids is not None
    processed = VllmEngine("folder", logprobs_mode="processed_logprobs").generate([user("Hi")], sampling=cold)
    assert processed[0][0].logprobs is None and processed[0][0].sampling_logprobs is not None
    stop = Sampling(max_tokens=200, stop=("a",))
    assert VllmEngine("f").generate([user("Hi")], sampling=stop)[0][0].finish_reason in (
        FinishReason.stop_string,
        FinishReason.stop,
    )
    with pytest.raises(BadInputError, match="logprobs_mode"):
        VllmEngine("folder", logprobs_mode="raw_logits")


def test_without_vllm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingError, match=r"corrigible\[vllm\]"):
        VllmEngine("folder")
