"""How a policy moves: losses, the registry of algorithms, sources of examples, and the one trainer.

    from corrigible.align import TrainConfig, train
    version = train("dpo", pairs, "smollm2-135m", out="runs/dpo", config=TrainConfig(lr=1e-4))

- ``losses``: pure functions from log-probs to a loss; they know no model and no file. Those of one
  algorithm alone stand with it (``kto``, ``grpo``); ``advantages`` turns rewards into what answers are worth.
- ``registry``: an algorithm is source x weight x objective, one decorated function each.
- ``contrast``: the one contrast function of direct alignment; ``direct``, ``reference_free`` and ``listwise``
  are the algorithms that are settings of it.
- ``sources``: what a batch is made of; the order depends on the seed alone. ``unpaired`` and ``groups``
  are the sources of answers judged one by one, and of sampled answers with rewards.
- ``rendering``: feedback written out as text, and what serving must put before a prompt afterwards;
  ``rendered`` and ``attempted`` are the algorithms that learn from it, ``retrieval`` finds neighbours.
- ``reference``: log-probs under the frozen reference, once, before the first step.
- ``trainer`` (settings in ``config``, files in ``checkpoint``, Ctrl-C in ``interrupts``): the loop.
- ``watch``: what is checked at every step that no loss would show (docs/guides/faults.md).
- ``attribution``: who wrote every trained token, and why the policy and its sampler disagree.
- ``implicit_reward``: what a trained policy prefers, tested on comparisons it has not seen.
- ``schedules``: how the learning rate falls. ``curriculum``: easy examples first. ``candidates``: which
  sampled answers to keep and to compare. ``credit``: which tokens a preference was about.
- ``training``: feedback to policy version in one call, by any of them (``dpo``: by DPO); ``learnable``: what
  an algorithm can learn from what is there.

To add an algorithm, write its objective and decorate it; the trainer stays as it is.
"""

from corrigible.align.advantages import group_advantages
from corrigible.align.attempted import JourneyConfig, LemmaConfig, MistakeConfig, RiseConfig
from corrigible.align.config import TrainConfig, learning_rate
from corrigible.align.contrast import ContrastRows, ContrastSpec, contrast_loss, preset
from corrigible.align.direct import (
    CDPOConfig,
    FDPOConfig,
    FSFTConfig,
    HingeNormConfig,
    IPOConfig,
    RDPOConfig,
    SPINConfig,
    WPOConfig,
)
from corrigible.align.dpo import train_dpo
from corrigible.align.groups import Asked, GroupExample, GroupSource, group_examples
from corrigible.align.grpo import GRPOConfig, grpo_loss
from corrigible.align.imitation import MFTConfig, OTRConfig, SFTConfig
from corrigible.align.implicit_reward import ImplicitReward, implicit_reward_accuracy
from corrigible.align.kto import KTOConfig, kto_loss
from corrigible.align.listwise import (
    AWRConfig,
    BRAInConfig,
    CoPGConfig,
    PlackettLuceConfig,
    PROConfig,
    RRHFConfig,
    RWRConfig,
)
from corrigible.align.losses import LossOutput, dpo_loss
from corrigible.align.ranked import RankedExample, RankedSource
from corrigible.align.reference import reference_logprobs
from corrigible.align.reference_free import (
    ORPOConfig,
    PrefFTConfig,
    SimPOConfig,
    SLiCConfig,
    UnlikelihoodConfig,
)
from corrigible.align.registry import (
    ALGORITHMS,
    Algorithm,
    AlgorithmConfig,
    DPOConfig,
    ScoredExamples,
    algorithm,
    get_algorithm,
)
from corrigible.align.rendered import (
    ClassConfig,
    GoalConfig,
    HindsightConfig,
    RefinementConfig,
    RetrievalConfig,
)
from corrigible.align.rendering import Serving
from corrigible.align.sources import Behaviour, PairExample, PairSource, Source, Unusable
from corrigible.align.token_loss import TokenTotals, token_loss
from corrigible.align.tokens import TokenExample, TokenSource, demonstration_source
from corrigible.align.trainer import Trainer, TrainResult
from corrigible.align.training import make_source, train, trained_on
from corrigible.align.unpaired import UnpairedExample, UnpairedSource

__all__ = [
    "ALGORITHMS",
    "AWRConfig",
    "Algorithm",
    "AlgorithmConfig",
    "Asked",
    "BRAInConfig",
    "Behaviour",
    "CDPOConfig",
    "ClassConfig",
    "CoPGConfig",
    "ContrastRows",
    "ContrastSpec",
    "DPOConfig",
    "FDPOConfig",
    "FSFTConfig",
    "GRPOConfig",
    "GoalConfig",
    "GroupExample",
    "GroupSource",
    "HindsightConfig",
    "HingeNormConfig",
    "IPOConfig",
    "ImplicitReward",
    "JourneyConfig",
    "KTOConfig",
    "LemmaConfig",
    "LossOutput",
    "MFTConfig",
    "MistakeConfig",
    "ORPOConfig",
    "OTRConfig",
    "PROConfig",
    "PairExample",
    "PairSource",
    "PlackettLuceConfig",
    "PrefFTConfig",
    "RDPOConfig",
    "RRHFConfig",
    "RWRConfig",
    "RankedExample",
    "RankedSource",
    "RefinementConfig",
    "RetrievalConfig",
    "RiseConfig",
    "SFTConfig",
    "SLiCConfig",
    "SPINConfig",
    "ScoredExamples",
    "Serving",
    "SimPOConfig",
    "Source",
    "TokenExample",
    "TokenSource",
    "TokenTotals",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "UnlikelihoodConfig",
    "UnpairedExample",
    "UnpairedSource",
    "Unusable",
    "WPOConfig",
    "algorithm",
    "contrast_loss",
    "demonstration_source",
    "dpo_loss",
    "get_algorithm",
    "group_advantages",
    "group_examples",
    "grpo_loss",
    "implicit_reward_accuracy",
    "kto_loss",
    "learning_rate",
    "make_source",
    "preset",
    "reference_logprobs",
    "token_loss",
    "train",
    "train_dpo",
    "trained_on",
]
