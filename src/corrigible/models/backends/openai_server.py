"""Answers from any server with OpenAI's ``/v1/chat/completions`` or ``/v1/completions``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Literal

from corrigible.errors import BadInputError
from corrigible.events import Alert, Progress, emit
from corrigible.models.backends.answers import (
    Failure,
    Gathering,
    Prompt,
    ServedAnswer,
    failed,
    seeds,
    settled,
)
from corrigible.models.backends.http import JsonClient, RequestFailed
from corrigible.models.renderer import Rendered, Renderer
from corrigible.records import FinishReason, Sampling, as_messages

_AT_MOST = 1e-3  # rounding may put a log-probability this far above 0


class OpenAIServer:
    """A model behind OpenAI's protocol. One request per answer, each with its own seed.

    Args:
        base_url: up to and including ``/v1``.
        model: the model's name there.
        key: the API key, where one is needed.
        endpoint: ``"chat"`` sends messages; ``"completions"`` sends token ids, so that our own
            template decides what the model reads.
        renderer: for ``"completions"``: turns messages into ids; must be the served model's.
        extensions: whether the server takes ``top_k`` and ``min_p`` (vLLM, SGLang, llama.cpp do;
            OpenAI's does not). Without it, settings that need them are refused rather than ignored.
        token_ids: ask for token ids (``return_token_ids``, vLLM).
        logprobs_of: of which distribution the server's log-probabilities are: ``"plain"`` (temperature
            1, nothing cut; vLLM's default), ``"sampling"``, or None: not known, and then they are
            kept only where both are the same.
        concurrency: requests at a time.
        timeout, retries, backoff: see :class:`JsonClient`.

    What fails becomes an answer with ``failure`` set; the others come all the same.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key: str | None = None,
        endpoint: Literal["chat", "completions"] = "chat",
        renderer: Renderer | None = None,
        extensions: bool = False,
        token_ids: bool = False,
        logprobs_of: Literal["plain", "sampling"] | None = None,
        concurrency: int = 16,
        timeout: float = 120.0,
        retries: int = 4,
        backoff: float = 0.5,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise BadInputError(f"{base_url!r} is no http address.", advice="Give it up to /v1.")
        if concurrency < 1 or retries < 0 or timeout <= 0:
            raise BadInputError("concurrency and timeout must be positive, retries not negative.")
        if endpoint not in ("chat", "completions"):
            raise BadInputError(f"endpoint is 'chat' or 'completions', not {endpoint!r}.")
        self.model = model
        self.endpoint = endpoint
        self.renderer = renderer
        self.extensions = extensions
        self.token_ids = token_ids
        self.logprobs_of = logprobs_of
        self.concurrency = concurrency
        # One client per call: it can be told to stop.
        self._client = partial(JsonClient, base_url, key, timeout, retries, backoff)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        on_done: Callable[[int, list[ServedAnswer]], None] | None = None,
        occurrences: Sequence[int] | None = None,
    ) -> list[list[ServedAnswer]]:
        """Sample ``n`` answers to each prompt; the arguments are those of :func:`corrigible.models.generate`.

        Raises:
            BadInputError: no prompts, or settings that this server does not take.
        """
        n, sampling, seed = settled(prompts, n, sampling, seed)
        common = self._settings(sampling)
        gathered = Gathering(len(prompts), n, on_done)
        total, done, unfit = len(prompts) * n, 0, 0
        emit(Progress(task="generating", done=0, total=total, unit="answer"))
        client = self._client()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="answers")
        pending: dict[Future[tuple[ServedAnswer, bool]], tuple[int, int]] = {}
        try:
            for index, own_seeds in enumerate(seeds(prompts, n, seed, occurrences)):
                for sample, own_seed in enumerate(own_seeds):
                    job = pool.submit(self._answer, client, prompts[index], common, sampling, own_seed)
                    pending[job] = (index, sample)
            while pending:
                for job in wait(pending, return_when=FIRST_COMPLETED).done:
                    index, sample = pending.pop(job)
                    answer, fits = job.result()
                    gathered.put(index, sample, answer)
                    done, unfit = done + 1, unfit + (not fits)
                    emit(Progress(task="generating", done=done, total=total, unit="answer"))
        finally:
            client.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if unfit:
            emit(
                Alert(
                    name="logprobs_unusable",
                    message=f"{unfit} of {total} answers came with log-probabilities that cannot be right "
                    "(not one per token, or above 0); they are taken as unknown.",
                )
            )
        return gathered.all()

    # -- one request --------------------------------------------------------------------------

    def _settings(self, sampling: Sampling) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "n": 1,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.top_k is not None or sampling.min_p > 0:
            if not self.extensions:
                raise BadInputError(
                    "top_k and min_p are not part of OpenAI's protocol; a server may ignore them unseen.",
                    advice="Pass extensions=True if this server takes them, or leave them out.",
                )
            body.update({"top_k": sampling.top_k or -1, "min_p": sampling.min_p})
        if self.endpoint == "chat":
            body.update({"logprobs": True, "top_logprobs": 0})
        else:
            body["logprobs"] = 1
        if self.token_ids:
            body["return_token_ids"] = True
        return body

    def _answer(
        self, client: JsonClient, prompt: Prompt, common: dict[str, Any], sampling: Sampling, seed: int
    ) -> tuple[ServedAnswer, bool]:
        """The answer or its failure; False where its log-probabilities could not be used."""
        sent: tuple[int, ...] | None = None
        try:
            body = {**common, "seed": seed}
            if self.endpoint == "chat":
                body["messages"] = self._messages(prompt)
                reply = client.post("/chat/completions", body)
            else:
                sent = self._ids(prompt)
                body["prompt"] = list(sent)
                reply = client.post("/completions", body)
            return self._read(reply, sampling, seed, sent)
        except BadInputError as error:
            return failed(Failure.prompt, str(error), seed, sent), True
        except RequestFailed as error:
            return failed(error.failure, str(error), seed, sent), True

    def _messages(self, prompt: Prompt) -> list[Any]:
        if isinstance(prompt, Rendered):
            if not prompt.messages:
                raise BadInputError(
                    "The chat endpoint takes messages; this prompt has only token ids.",
                    advice='Use endpoint="completions".',
                )
            return [dict(message) for message in prompt.messages]
        messages = as_messages(prompt)
        if not messages:
            raise BadInputError("The prompt is empty.")
        return [message.to_json() for message in messages]

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, Rendered):
            ids = prompt.ids
        elif self.renderer is not None:
            ids = self.renderer.prompt(prompt).ids
        else:
            raise BadInputError(
                "The completions endpoint takes token ids; these are messages.",
                advice="Pass renderer= (of the served model), or rendered prompts.",
            )
        if not ids:
            raise BadInputError("The prompt is empty.")
        return ids

    # -- one reply ----------------------------------------------------------------------------

    def _read(
        self, reply: Any, sampling: Sampling, seed: int, sent: tuple[int, ...] | None
    ) -> tuple[ServedAnswer, bool]:
        try:
            choice = reply["choices"][0]
            text = choice["message"]["content"] if self.endpoint == "chat" else choice["text"]
            said = choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise RequestFailed(Failure.reply, f"not a completion: {str(reply)[:200]}") from None
        if said == "content_filter":
            raise RequestFailed(Failure.filtered, "the server's content filter took the answer away")
        if not isinstance(text, str):
            raise RequestFailed(Failure.reply, f"an answer without text: {str(choice)[:200]}")
        ids = _integers(choice.get("token_ids"))
        found = _logprobs(choice.get("logprobs"))
        usable = found is None or (
            (ids is None or len(ids) == len(found))
            and all(math.isfinite(value) and value <= _AT_MOST for value in found)
        )
        found = found if usable else None
        plain_sampling = (
            sampling.temperature == 1
            and sampling.top_p == 1
            and sampling.top_k is None
            and sampling.min_p == 0
        )
        prompt_ids = reply.get("prompt_token_ids", choice.get("prompt_token_ids"))
        answer = ServedAnswer(
            text=text,
            finish_reason=_finish_reason(said, choice, sampling),
            seed=seed,
            prompt_ids=sent if sent is not None else _integers(prompt_ids),
            ids=ids,
            logprobs=found if plain_sampling or self.logprobs_of == "plain" else None,
            sampling_logprobs=found if plain_sampling or self.logprobs_of == "sampling" else None,
            model=str(reply["model"]) if reply.get("model") else None,
        )
        return answer, usable


def _finish_reason(said: Any, choice: Any, sampling: Sampling) -> FinishReason | None:
    """Most servers say "stop" for an end of turn and a stop string alike; vLLM's ``stop_reason`` tells."""
    if said == "length":
        return FinishReason.length
    if said != "stop":
        return None
    if isinstance(choice.get("stop_reason"), str):
        return FinishReason.stop_string
    if sampling.stop and "stop_reason" not in choice:
        return None
    return FinishReason.stop


def _integers(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        return None
    return tuple(value)


def _logprobs(value: Any) -> tuple[float, ...] | None:
    """The sampled tokens' log-probabilities, in either endpoint's form; None where one is not there."""
    if not isinstance(value, dict):
        return None
    numbers = value.get("token_logprobs")
    if numbers is None and isinstance(value.get("content"), list):
        numbers = [entry.get("logprob") if isinstance(entry, dict) else None for entry in value["content"]]
    if not isinstance(numbers, list) or not all(type(item) in (int, float) for item in numbers):
        return None
    return tuple(float(item) for item in numbers)
