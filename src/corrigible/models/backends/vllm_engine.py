"""Answers from vLLM in this process (``pip install corrigible[vllm]``)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from corrigible.errors import BadInputError, MissingError
from corrigible.models.backends.answers import (
    Failure,
    Gathering,
    Prompt,
    ServedAnswer,
    failed,
    seeds,
    settled,
)
from corrigible.models.renderer import Rendered, Renderer
from corrigible.records import FinishReason, Sampling


class VllmEngine:
    """A model in vLLM.

    Args:
        model: what ``vllm.LLM`` loads: a folder or a hub id.
        renderer: turns messages into ids, by the model's template (default: from vLLM's tokenizer).
        options: passed to ``vllm.LLM``. ``logprobs_mode`` is set to ``raw_logprobs`` unless given.

    Token ids are always known. vLLM gives log-probabilities of one distribution: of the plain model
    (``raw_logprobs``) or of the one sampled from (``processed_logprobs``); the other is None, except
    where both are the same.

    Raises:
        MissingError: vLLM is not installed.
    """

    def __init__(self, model: str, *, renderer: Renderer | None = None, **options: Any) -> None:
        try:
            self._vllm: Any = importlib.import_module("vllm")
        except ImportError as error:
            raise MissingError(
                "vLLM is not installed.", advice="pip install 'corrigible[vllm]' (it needs a GPU)."
            ) from error
        self.mode: str = options.setdefault("logprobs_mode", "raw_logprobs")
        if self.mode not in ("raw_logprobs", "processed_logprobs"):
            raise BadInputError(f"logprobs_mode {self.mode!r} gives no log-probabilities.")
        self.model = model
        self._engine: Any = self._vllm.LLM(model=model, **options)
        self.renderer = renderer or Renderer(self._engine.get_tokenizer())

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
            BadInputError: no prompts, or a number below 1.
        """
        n, sampling, seed = settled(prompts, n, sampling, seed)
        gathered = Gathering(len(prompts), n, on_done)
        asked: list[tuple[int, int, int, tuple[int, ...]]] = []
        room = int(self._engine.llm_engine.model_config.max_model_len)
        for index, own_seeds in enumerate(seeds(prompts, n, seed, occurrences)):
            ids, failure = self._ids(prompts[index], room)
            for sample, own_seed in enumerate(own_seeds):
                if failure is not None:
                    gathered.put(index, sample, failed(*failure, own_seed, ids))
                else:
                    asked.append((index, sample, own_seed, ids))
        if asked:
            outputs = self._engine.generate(
                [{"prompt_token_ids": list(ids)} for *_, ids in asked],
                [self._settings(sampling, own_seed) for _, _, own_seed, _ in asked],
                use_tqdm=False,
            )
            for (index, sample, own_seed, ids), output in zip(asked, outputs, strict=True):
                answer = self._read(output.outputs[0], sampling, own_seed, ids, room)
                gathered.put(index, sample, answer)
        return gathered.all()

    def _ids(self, prompt: Prompt, room: int) -> tuple[tuple[int, ...], tuple[Failure, str] | None]:
        try:
            ids = prompt.ids if isinstance(prompt, Rendered) else self.renderer.prompt(prompt).ids
        except BadInputError as error:
            return (), (Failure.prompt, str(error))
        if not ids:
            return (), (Failure.prompt, "The prompt is empty.")
        if len(ids) >= room:
            text = f"The prompt has {len(ids)} tokens; {self.model} reads {room}, answer included."
            return ids, (Failure.context, text)
        return ids, None

    def _settings(self, sampling: Sampling, seed: int) -> Any:
        return self._vllm.SamplingParams(
            n=1,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=-1 if sampling.top_k is None else sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop) or None,
            seed=seed,
            logprobs=0,
        )

    def _read(
        self, output: Any, sampling: Sampling, seed: int, prompt_ids: tuple[int, ...], room: int
    ) -> ServedAnswer:
        if output.finish_reason not in ("stop", "length"):
            return failed(Failure.server, f"vLLM ended with {output.finish_reason!r}.", seed, prompt_ids)
        ids = tuple(int(token) for token in output.token_ids)
        found: tuple[float, ...] | None = None
        if output.logprobs is not None and len(output.logprobs) == len(ids):
            found = tuple(
                float(table[token].logprob) for token, table in zip(ids, output.logprobs, strict=True)
            )
        same = sampling.model_copy(update={"max_tokens": 128, "stop": (), "seed": None, "n": 1}) == Sampling()
        if output.finish_reason == "stop":
            by_text = isinstance(output.stop_reason, str)
            reason = FinishReason.stop_string if by_text else FinishReason.stop
        else:
            full = len(prompt_ids) + len(ids) >= room and len(ids) < sampling.max_tokens
            reason = FinishReason.context if full else FinishReason.length
        return ServedAnswer(
            text=output.text,
            finish_reason=reason,
            seed=seed,
            prompt_ids=prompt_ids,
            ids=ids,
            logprobs=found if same or self.mode == "raw_logprobs" else None,
            sampling_logprobs=found if same or self.mode == "processed_logprobs" else None,
            model=self.model,
        )
