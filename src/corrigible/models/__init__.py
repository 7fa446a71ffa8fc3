"""Language models: load, render, score, sample, adapt.

    policy = load_policy("smollm2-135m", lora=Lora(rank=16))
    prompt = [{"role": "user", "content": "Name a colour."}]
    answers = generate(policy, [prompt], n=4, sampling=Sampling(max_tokens=40), seed=1)
    sequence_logprobs(policy, [answer.rendered() for answer in answers[0]])

One module per job: ``load`` finds weights (safetensors only), ``renderer`` alone turns messages
into token ids and says who wrote each token, ``logprobs`` scores, ``generate`` samples (``rollout``
streams, resumes and takes new weights on the way; ``backends`` ask vLLM or a server), ``policy`` holds
weights and adapters, ``encoder`` turns sentences into vectors. ``reference`` does scoring and
sampling again, slowly and plainly; the tests hold the fast ones to it.
"""

from corrigible.models.encoder import SentenceEncoder, load_encoder
from corrigible.models.generate import Generation, generate, to_episode
from corrigible.models.load import DEFAULT_POLICY, load_policy, preferred_dtype
from corrigible.models.logprobs import sequence_logprobs, token_divergences, token_logprobs
from corrigible.models.policy import LanguagePolicy, Lora
from corrigible.models.reference import generate_reference, logprobs_reference
from corrigible.models.renderer import SCORED, Place, Rendered, Renderer, TokenKind, TurnState
from corrigible.models.rollout import RolloutEngine
from corrigible.models.rollout_records import Partial, Segment
from corrigible.models.scoring import same_vocabulary

__all__ = [
    "DEFAULT_POLICY",
    "SCORED",
    "Generation",
    "LanguagePolicy",
    "Lora",
    "Partial",
    "Place",
    "Rendered",
    "Renderer",
    "RolloutEngine",
    "Segment",
    "SentenceEncoder",
    "TokenKind",
    "TurnState",
    "generate",
    "generate_reference",
    "load_encoder",
    "load_policy",
    "logprobs_reference",
    "preferred_dtype",
    "same_vocabulary",
    "sequence_logprobs",
    "to_episode",
    "token_divergences",
    "token_logprobs",
]
