"""A Bradley-Terry reward model: pretrained reader, linear head, calibrated scale.

Scores are in nats: σ(score(a) − score(b)) is the model's probability that a judge prefers a, with the
temperature fitted on pairs it was not trained on already divided out, and 0 is the mean score of the
training responses (comparisons leave an additive constant undetermined; Stiennon et al. 2020).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corrigible.errors import BadInputError, MissingError, NumericsError
from corrigible.files import replacing, write_json
from corrigible.rewards.backbones import Backbone, Example, load_backbone
from corrigible.rewards.config import RewardConfig
from corrigible.rewards.features import feature_rows
from corrigible.rewards.head import Standardiser
from corrigible.rewards.signals import Scores, sigmoid

if TYPE_CHECKING:
    from corrigible.records import Episode, Message
    from corrigible.store.pairs import Pair

Floats = NDArray[np.float64]
FORMAT = "corrigible/reward-model@1"
CHUNK = 256


def raw_rows(backbone: Backbone, examples: Sequence[Example], config: RewardConfig) -> Tensor:
    """(n, width) float32: the backbone's vector, then the named features. Differentiable."""
    vectors = backbone.represent(backbone.encode(examples, config), config)
    named = feature_rows(config.features, [example.texts for example in examples])
    return torch.cat([vectors, torch.from_numpy(named).to(vectors)], dim=1)


@dataclass(eq=False)
class RewardModel:
    """Scores a prompt and a response. It is a `Signal` (``score``) and compares texts (``margins``).

    Attributes:
        config: how it was made.
        backbone: the reader, with tuned weights when ``config.tune`` is not "frozen".
        standardiser: per-coordinate mean and scale of the training rows.
        weight: (width,) float64 linear head.
        members: (m, width) bootstrap heads, m may be 0; their spread gives ``uncertainty``.
        offset: raw mean score of the training responses.
        temperature: raw nats per calibrated nat.
        history: what was measured while fitting: chosen penalty, losses per epoch, texts cut, pairs.
    """

    config: RewardConfig
    backbone: Backbone
    standardiser: Standardiser
    weight: Tensor
    members: Tensor
    offset: float = 0.0
    temperature: float = 1.0
    name: str = "reward_model"
    axis: str = "overall"
    history: dict[str, Any] = field(default_factory=dict)

    # -- scoring ------------------------------------------------------------------------------------

    def heads(self, rows: Tensor) -> tuple[Floats, Floats | None]:
        """Calibrated scores (n,) and their standard deviation over the bootstrap heads, from raw rows."""
        z = self.standardiser(rows.detach().cpu()).double()
        values = ((z @ self.weight - self.offset) / self.temperature).numpy()
        if not np.isfinite(values).all():
            raise NumericsError(
                "the reward model gave a NaN.", advice="Its weights may be damaged: train it again."
            )
        if len(self.members) < 2:
            return values, None
        # A constant shared by all scores is not uncertainty: each head is centred where the model is.
        spread = ((z @ self.members.T) / self.temperature).numpy()
        return values, spread.std(axis=1, ddof=1)

    def score_examples(self, examples: Sequence[Example]) -> tuple[Floats, Floats | None]:
        """Scores (n,) in nats and uncertainty (n,) or None."""
        if not examples:
            return np.zeros(0), None
        was_training = self.backbone.module.training
        self.backbone.module.eval()
        rows = []
        with torch.inference_mode():
            for begin in range(0, len(examples), CHUNK):
                rows.append(
                    raw_rows(self.backbone, examples[begin : begin + CHUNK], self.config).float().cpu()
                )
        self.backbone.module.train(was_training)
        return self.heads(torch.cat(rows))

    def score_texts(self, prompts: Sequence[Sequence[Message] | str], responses: Sequence[str]) -> Floats:
        """(n,) scores in nats for prompts (a string is one user message) with their response texts."""
        if len(prompts) != len(responses):
            raise BadInputError(
                f"{len(prompts)} prompts for {len(responses)} responses.", advice="Pass aligned lists."
            )
        from corrigible.records import Message

        examples = [
            Example(
                (Message(role="user", content=prompt),) if isinstance(prompt, str) else tuple(prompt),
                (Message(role="assistant", content=response),),
            )
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return self.score_examples(examples)[0]

    def score(self, episodes: Sequence[Episode]) -> Scores:
        """One value per episode, or the reason "not_applicable" for one without text (see `Signal`)."""
        examples: list[Example] = []
        places: list[int] = []
        reasons: list[str | None] = [None] * len(episodes)
        for place, episode in enumerate(episodes):
            example = _episode_example(episode)
            if example is None:
                reasons[place] = "not_applicable"
            else:
                examples.append(example)
                places.append(place)
        values = np.zeros(len(episodes))
        found, spread = self.score_examples(examples)
        values[places] = found
        uncertainty = None
        if spread is not None:
            uncertainty = np.zeros(len(episodes))
            uncertainty[places] = spread
        return Scores(values, tuple(reasons), axis=self.axis, uncertainty=uncertainty)

    def margins(self, pairs: Sequence[Pair]) -> Floats:
        """(n,) score(chosen) − score(rejected) in nats; each distinct text is read once."""
        unique: dict[str, int] = {}
        examples: list[Example] = []
        places = []
        for pair in pairs:
            for response in (pair.chosen, pair.rejected):
                example = Example(tuple(pair.prompt), tuple(response))
                if example.key not in unique:
                    unique[example.key] = len(examples)
                    examples.append(example)
                places.append(unique[example.key])
        values = self.score_examples(examples)[0]
        index = np.array(places, dtype=np.int64).reshape(-1, 2)
        return np.asarray(values[index[:, 0]] - values[index[:, 1]], dtype=np.float64)

    def prefer(self, a: Sequence[Episode], b: Sequence[Episode]) -> Floats:
        """(n,) probability that ``a[i]`` is preferred to ``b[i]``; 0.5 where either has no text."""
        if len(a) != len(b):
            raise BadInputError(f"{len(a)} episodes against {len(b)}.", advice="Pass aligned lists.")
        left, right = self.score(a), self.score(b)
        p = sigmoid(left.values - right.values)
        p[~(left.valid & right.valid)] = 0.5
        return p

    # -- files --------------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> Path:
        """Write ``reward_model.json`` and ``reward_model.safetensors``; returns the directory.

        A frozen backbone is not copied: its name and digest are. Tuned weights are written.
        """
        from safetensors.torch import save_file

        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        tensors = {
            "head.mean": self.standardiser.mean,
            "head.scale": self.standardiser.scale,
            "head.weight": self.weight,
            "head.members": self.members,
        }
        frozen = self.config.tune == "frozen"
        if not frozen:
            for key, value in trained_state(self.backbone, self.config).items():
                tensors[f"backbone.{key}"] = value
        description = {
            "format": FORMAT,
            "name": self.name,
            "axis": self.axis,
            "config": self.config.to_json(),
            "offset": self.offset,
            "temperature": self.temperature,
            "backbone_sha256": self.backbone.sha256() if frozen else None,
            "history": self.history,
        }
        with replacing(target / "reward_model.safetensors") as writing:
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, writing)
        write_json(target / "reward_model.json", description)
        return target

    @classmethod
    def load(
        cls, directory: str | Path, *, backbone: Backbone | None = None, device: str = "auto"
    ) -> RewardModel:
        """Read what `save` wrote.

        Raises:
            MissingError: the directory holds no reward model, or its backbone is not on this machine.
            BadInputError: the files are damaged, of another format, or the frozen backbone's weights are
                not those that the head was trained on.
        """
        from safetensors.torch import load_file

        source = Path(directory)
        paths = (source / "reward_model.json", source / "reward_model.safetensors")
        for path in paths:
            if not path.is_file():
                raise MissingError(
                    f"{source} holds no reward model: {path.name} is missing.",
                    advice="Train one with `corrigible train reward --out DIR`.",
                )
        try:
            description = json.loads(paths[0].read_text(encoding="utf-8"))
            tensors = load_file(paths[1])
        except Exception as error:
            raise BadInputError(
                f"the reward model in {source} cannot be read: {error}.", advice="Train it again."
            ) from error
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            raise BadInputError(
                f"{paths[0]} is not of the format {FORMAT}.", advice="It was written by another version."
            )
        config = RewardConfig.from_json(description["config"])
        try:
            head = {key: tensors.pop(f"head.{key}") for key in ("mean", "scale", "weight", "members")}
        except KeyError as error:
            raise BadInputError(f"{paths[1]} lacks the tensor {error}.", advice="Train it again.") from error
        reader = backbone or load_backbone(config, device=device)
        if config.tune == "frozen":
            if reader.sha256() != description["backbone_sha256"]:
                raise BadInputError(
                    f"the weights of {config.backbone!r} on this machine are not those the reward model "
                    "was trained on.",
                    advice="Install the same weights, or train the reward model again.",
                )
        else:
            restore_state(reader, {key.removeprefix("backbone."): value for key, value in tensors.items()})
        reader.module.eval()
        return cls(
            config=config,
            backbone=reader,
            standardiser=Standardiser(head["mean"], head["scale"]),
            weight=head["weight"],
            members=head["members"],
            offset=float(description["offset"]),
            temperature=float(description["temperature"]),
            name=str(description["name"]),
            axis=str(description["axis"]),
            history=dict(description["history"]),
        )

    def renamed(self, name: str, axis: str | None = None) -> RewardModel:
        """The same model under another name or axis."""
        return replace(self, name=name, axis=axis or self.axis)


def trained_state(backbone: Backbone, config: RewardConfig) -> dict[str, Tensor]:
    """The backbone weights that training changes under ``config``, by name."""
    return {
        name: value for name, value in backbone.module.named_parameters() if trains(name, backbone, config)
    }


def trains(name: str, backbone: Backbone, config: RewardConfig) -> bool:
    """Whether the backbone's weight ``name`` is tuned under ``config``."""
    if config.tune == "frozen":
        return False
    if config.tune == "lora":
        return "lora_" in name
    if config.train_layers <= 0 or "pooler" in name:
        return "pooler" not in name
    depth = int(backbone.module.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    tuned = {str(number) for number in range(max(0, depth - config.train_layers), depth)}
    parts = name.split(".")
    inside = [parts[i + 1] for i, part in enumerate(parts[:-1]) if part in ("layer", "layers")]
    # The final norm of a causal model comes after its layers and is tuned with them.
    return inside[0] in tuned if inside else name.startswith("norm.")


def restore_state(backbone: Backbone, state: dict[str, Tensor]) -> None:
    """Copy saved weights into the backbone; BadInputError when one has no place or another shape."""
    held = dict(backbone.module.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            if name not in held or held[name].shape != value.shape:
                raise BadInputError(
                    f"the saved weight {name} does not fit {backbone.name!r}.",
                    advice="It was trained on another backbone, or with other adapter settings.",
                )
            held[name].copy_(value)


def _episode_example(episode: Episode) -> Example | None:
    """The conversation before the last assistant message, and that message; None without text."""
    from corrigible.records import Message

    messages: list[Message] = []
    for step in episode.steps:
        said = (*step.observation, step.action) if isinstance(step.observation, tuple) else (step.action,)
        for message in said:
            if not isinstance(message, Message):
                return None
            messages.append(message)
    if not messages or messages[-1].role != "assistant":
        return None
    example = Example(tuple(messages[:-1]), (messages[-1],))
    return example if example.texts[1].strip() else None
