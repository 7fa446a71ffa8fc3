"""What every number means that a training step logs.

One table by name; which of them an algorithm logs is in :data:`LOGGED`, or what its kind of examples usually
logs. ``metrics.jsonl`` of a run, the events and the documentation's pages speak of these. A test trains every
algorithm for some steps and holds what it logs against this table.
"""

from __future__ import annotations

from corrigible.align.registry import Algorithm

TRAINER: dict[str, str] = {
    "grad_norm": "length of the gradient before it is clipped to `max_grad_norm`",
    "lr": "learning rate of the step",
    "examples": "examples in the batch",
    "tokens_per_second": "tokens of the batch, prompts included, by the step's wall time",
}
"""What the trainer logs for every algorithm."""

OBJECTIVE: dict[str, str] = {
    "loss": "the loss that is minimised, over the whole batch",
    "grad_weight": "mean size of the loss's slope; near 0, nothing is learnt any more",
    "saturated": "share that carries almost no gradient any more",
    # pairs and other comparisons
    "rewards/accuracy": "how often the implicit reward agrees with the label; ties count half",
    "rewards/chosen": "mean implicit reward of what was preferred; both sides falling is common, and a "
    "reason to look at `logps/chosen`",
    "rewards/rejected": "mean implicit reward of what was not",
    "rewards/margin": "difference of the mean implicit rewards of the better and the worse side",
    "logps/chosen": "mean log-prob of the preferred responses under the policy, nats, summed over tokens",
    "logps/rejected": "the same of the others",
    "length/gap": "mean length of what was preferred minus that of what was not, tokens",
    "reference_gap": "mean of log pi minus log pi_ref of the answers, nats; on answers that the reference "
    "sampled, minus its KL divergence to the policy",
    "anchor": "the part of the loss that is the likelihood of the preferred response",
    "pair_weight": "mean weight that the policy's own probabilities give to a pair",
    "score_temperature": "mean gap of scores that tempers a comparison",
    "ess": "mean effective number of answers of a prompt that the posterior rests on; near 1, one decides",
    "capped": "share of answers whose weight in the posterior was capped",
    "example_weight": "mean weight of an answer, by its score",
    # single answers
    "rewards/desirable": "mean implicit reward of the answers found good; absent when a batch has none",
    "rewards/undesirable": "the same of those found bad",
    "desirable": "share of the batch's weight that is good answers",
    "z0": "the reference point, nats: how far the policy has moved on answers to other prompts; >= 0",
    # texts to imitate
    "nll": "mean negative log-prob of a token that is learnt, nats; its exponential is the perplexity",
    "probability": "mean probability of a token that is learnt",
    "nll/sequence": "negative log-prob of a whole text, nats: the sum over its tokens that are learnt",
    "weight": "mean weight of a token, of those that weigh anything",
    "unwanted/probability": "mean probability of a token that is to be pushed down",
    "entropy": "mean entropy of the policy before a token, nats; with `log_entropy` only",
    # groups of samples
    "ratio": "mean of pi / pi_behaviour per token; 1 on fresh samples",
    "log_ratio": "mean of log pi minus log pi_behaviour, nats: how stale the samples are",
    "clipped/low": "share of tokens that the lower clip leaves without gradient",
    "clipped/high": "share of tokens that the upper clip leaves without gradient",
    "kl": "mean k3 estimate of the divergence from the reference, nats a token; with `beta` above 0 only",
    "reward": "mean reward of the answers",
    "advantage": "mean size of the advantages",
    "answer_tokens": "mean length of the answers",
    "behaviour_unknown": "share of answers without recorded log-probs; their ratio is taken to be 1",
}
"""What objectives log."""

PAIRS = (
    *("loss", "rewards/accuracy", "rewards/chosen", "rewards/rejected", "rewards/margin"),
    *("logps/chosen", "logps/rejected", "grad_weight", "saturated"),
)

MARGINS = (*PAIRS[:-1], "length/gap")
TO_REFERENCE = (*PAIRS, "length/gap", "reference_gap")

RANKED = (*PAIRS[:6], "grad_weight")

TOKENS = ("loss", "nll", "probability", "nll/sequence", "weight", "grad_weight")

USUAL = {"pairs": PAIRS, "tokens": TOKENS}
"""What objectives on each kind of examples log, if nothing else is said."""

LOGGED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("cdpo", "rdpo", "f-dpo", "spin"), TO_REFERENCE),
    "wpo": (*TO_REFERENCE, "pair_weight"),
    **dict.fromkeys(("ipo", "hinge-norm", "copg"), (*MARGINS, "reference_gap")),
    **dict.fromkeys(("slic", "rrhf"), (*MARGINS, "anchor")),
    "simpo": (*PAIRS, "length/gap", "anchor"),
    "orpo": (*PAIRS, "length/gap", "anchor"),
    **dict.fromkeys(("pref-ft", "unlikelihood"), MARGINS),
    "plackett-luce": (*RANKED, "reference_gap"),
    "pro": (*RANKED, "score_temperature", "anchor"),
    "brain": (
        *("loss", "rewards/chosen", "rewards/rejected", "rewards/margin", "grad_weight"),
        *("reference_gap", "ess", "capped"),
    ),
    **dict.fromkeys(("rwr", "awr"), ("loss", "logps/chosen", "example_weight", "grad_weight")),
    "f-sft": ("loss", "rewards/chosen", "logps/chosen", "reference_gap", "grad_weight"),
    "kto": (
        *("loss", "rewards/desirable", "rewards/undesirable", "rewards/margin", "desirable", "z0"),
        *("grad_weight", "saturated"),
    ),
    "sft": (*TOKENS, "entropy"),
    "unlikelihood-tokens": (*TOKENS, "unwanted/probability"),
    "grpo": (
        *("loss", "ratio", "log_ratio", "clipped/low", "clipped/high", "kl", "grad_weight"),
        *("reward", "advantage", "answer_tokens", "behaviour_unknown"),
    ),
}
"""What an algorithm's objective logs instead, by name, in the order of its page."""

SOMETIMES = frozenset(
    {
        "kl",
        "entropy",
        "anchor",
        "capped",
        "reference_gap",
        "rewards/desirable",
        "rewards/undesirable",
        "rewards/margin",
    }
)
"""Those that a batch or a setting may leave out."""


def logged_by(algorithm: Algorithm) -> dict[str, str]:
    """Every metric of an algorithm's steps and what it means, the objective's before the trainer's."""
    names = LOGGED.get(algorithm.name, USUAL.get(algorithm.source, ("loss",)))
    return {name: OBJECTIVE[name] for name in names} | TRAINER
