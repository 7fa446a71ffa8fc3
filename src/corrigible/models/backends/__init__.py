"""Answers from somewhere else: vLLM in this process, or a server that speaks OpenAI's protocol.

    server = OpenAIServer("http://localhost:8000/v1", model="Qwen/Qwen3-8B")
    answers = server.generate([[{"role": "user", "content": "Hello"}]], n=4, sampling=Sampling(), seed=1)

The call is that of :func:`corrigible.models.generate`. The result is a :class:`ServedAnswer`, in which
everything that nobody told us is None: token ids, log-probabilities, why it ended. Training, which
needs them, asks for :meth:`ServedAnswer.known` and gets a ``Generation`` or an error, never a guess.
"""

from corrigible.models.backends.answers import Backend, Failure, ServedAnswer
from corrigible.models.backends.openai_server import OpenAIServer
from corrigible.models.backends.vllm_engine import VllmEngine

__all__ = ["Backend", "Failure", "OpenAIServer", "ServedAnswer", "VllmEngine"]
