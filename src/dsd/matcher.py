"""The facade: a text-to-image model as an image-text matcher.

import dsd

matcher = dsd.Matcher.from_pretrained("tiny")
table = matcher.score(["scene.png"], ["a red circle above a blue square", "a blue square above a red circle"])
table.scores  # (1, 2), higher is better
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from tqdm import tqdm

from dsd import prompts
from dsd.adapt import fit
from dsd.adapters import Adapter
from dsd.backbone import Backbone, cards, load_backbone
from dsd.contracts import (
    AdapterError,
    Example,
    ImageInput,
    MatcherProtocol,
    OptionError,
    Pair,
    Ranked,
    ScoreTable,
    choice_of,
    image_name,
)
from dsd.encodings import Encodings, Folder
from dsd.explain import compare_images, compare_texts, explain
from dsd.explanation import ExplainConfig, Explanation, ImageDifference, TextDifference
from dsd.learn import FitConfig
from dsd.probe import Direction, attends_to_text
from dsd.prompts import PromptConfig
from dsd.race import Budget, Standing, fewest_layers, run, telling_first
from dsd.scorer import Scorer, image_key
from dsd.scores import WEIGHTED, ScoreConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


class Matcher:
    """Scores how well captions explain images, zero-shot or as taught from examples.

    A score depends on its image, its caption and the configuration alone, never on what else is in the batch.

    Args:
        backbone: The model.
        score: What to compute for a pair.
        adapter: What was learned; its prompts must not be attached yet. It brings its own score, so give ``score``
            only to override that.
        size: Pixels a side. Default: the adapter's, else the model's own.
        batch_size: Rows a denoiser pass; halved whenever memory runs out.
        noise: (timesteps, channels, height, width) of the latent, instead of noise drawn from the score's seed.
        encodings: A folder that latents and token states are kept in and taken from (:mod:`dsd.encodings`), or one with
            a limit of its own: ``dsd.encodings.Folder("encodings", limit=2**30)``.
    """

    def __init__(
        self,
        backbone: Backbone,
        score: ScoreConfig | None = None,
        *,
        adapter: Adapter | None = None,
        size: int | None = None,
        batch_size: int | None = None,
        noise: np.ndarray | None = None,
        encodings: str | os.PathLike[str] | Folder | None = None,
    ) -> None:
        self.backbone = backbone
        self.adapter = adapter
        kept = None
        if encodings is not None:
            folder = encodings if isinstance(encodings, Folder) else Folder(encodings)
            kept = Encodings(folder, backbone)
        if adapter is not None:
            adapter.attach(backbone)
            score = score or adapter.score
            size = adapter.size if size is None else size
        score = score or default_score(backbone)
        # weights belong to a lesson, and are learned from the denoising score on
        self._first_score = replace(score, kind="denoising", layers=None) if score.kind == WEIGHTED else score
        if score.bare is not None:
            self._first_score = score.bare
        self._noise = None if noise is None else hashlib.blake2b(np.asarray(noise).tobytes(), digest_size=16)
        try:
            weights = None
            if adapter is not None and score.kind == WEIGHTED:
                weights = adapter.weights
                learned = adapter.score
                if (score.timesteps, score.layers, score.direction) != (
                    learned.timesteps,
                    learned.layers,
                    learned.direction,
                ):
                    raise OptionError(
                        f"got timesteps {score.timesteps}, layers {score.layers} and direction {score.direction} with "
                        "weights that were learned at others, expected those of the adapter; leave them out"
                    )
            self._scorer = Scorer(
                backbone, score, size=size, batch_size=batch_size, noise=noise, weights=weights, encodings=kept
            )
        except BaseException:
            if adapter is not None:  # the backbone was bare, and is the caller's
                prompts.detach(backbone.denoiser)
            raise

    @classmethod
    def from_pretrained(
        cls,
        model: str | None = None,
        *,
        adapter: str | os.PathLike[str] | None = None,
        score: str | ScoreConfig | None = None,
        timesteps: Sequence[int] | None = None,
        layers: Sequence[str] | None = None,
        direction: Direction | None = None,
        seed: int | None = None,
        size: int | None = None,
        batch_size: int | None = None,
        noise: np.ndarray | None = None,
        encodings: str | os.PathLike[str] | Folder | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        **loading: Any,
    ) -> Self:
        """Loads a model, and an adapter if one is named.

        Args:
            model: An alias such as ``tiny`` or ``sd21-base``, a hub name, a folder, or a single-file checkpoint.
                Default: the adapter's base, else ``tiny``.
            adapter: A folder saved by :meth:`save_pretrained`, one in the authors' format, a LoRA (folder or
                safetensors file), or ``tiny-captions``, which comes with the package.
            score: A name of :data:`dsd.scores.SCORES` or a whole configuration. Default: the adapter's, else
                ``denoising``, the best zero-shot. A name means that score by itself, under the adapter's prompts if
                there are any: the denoising score that most adapters add is of the model without them.
            timesteps, layers, direction, seed: Override the score's own.
            size, batch_size, noise, encodings: See the class.
            device: Default: the first GPU if there is one, else the CPU.
            dtype: Of the weights; scores are reduced in float32 whatever it is.
            **loading: Further fields of :class:`dsd.backbone.LoadConfig`, named as in diffusers: ``device_map``,
                ``offload``, ``quantize_text_encoder``, ``channels_last``, ``variant``, ``revision``, ``token``,
                ``cache_dir``, ``config``, ``allow_pickle``.

        Raises:
            ModelError, AdapterError, OptionError: If something cannot be loaded, or does not fit together.
        """
        loaded = None if adapter is None else Adapter.load(adapter)
        if model is None:
            model = "tiny" if loaded is None or loaded.base is None else str(loaded.base["name"])
        backbone = load_backbone(model, device=device, dtype=dtype, **loading)
        if isinstance(score, ScoreConfig):
            config = score
        elif loaded is not None and score is None:
            config = loaded.score
        elif loaded is not None:
            config = replace(loaded.score, bare=None, bare_weight=1.0)
            if score != loaded.score.kind:
                config = replace(config, kind=str(score), weights=None, layers=None)
        else:
            config = default_score(backbone, score or "denoising")
        if timesteps is not None:
            config = replace(config, timesteps=tuple(timesteps))
        if layers is not None:
            config = replace(config, layers=tuple(layers))
        if direction is not None:
            config = replace(config, direction=direction)
        if seed is not None:
            bare = None if config.bare is None else replace(config.bare, seed=seed)
            config = replace(config, seed=seed, bare=bare)
        return cls(backbone, config, adapter=loaded, size=size, batch_size=batch_size, noise=noise, encodings=encodings)

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved configuration, plain values."""
        score = self._scorer.score
        return {
            "model": self.backbone.name,
            "score": score.config.to_dict(),
            "layers": list(score.layers),
            "size": self._scorer.size,
            "dtype": str(self.backbone.dtype).removeprefix("torch."),
            "noise": None if self._noise is None else self._noise.hexdigest(),
            "adapter": None
            if self.adapter is None
            else {"digest": self.adapter.digest(), "training": dict(self.adapter.training)},
        }

    @property
    def explains(self) -> bool:
        """Whether :meth:`explain` has words to show; class-conditional models are told none."""
        return attends_to_text(self.backbone.denoiser)

    @property
    def score_config(self) -> ScoreConfig:
        """What is computed for a pair."""
        return self._scorer.score.config

    def compile(self, **options: Any) -> Self:
        """Compiles the denoiser: the same scores, in less time from the second batch of a shape on.

        The layers that scores listen to stay as they are; what lies between them is compiled, part by part, for static
        shapes. Batches are filled up to a power of two of rows, so that there are few. Encoders are left alone.

        Args:
            **options: Of :func:`torch.compile`, such as ``mode="max-autotune-no-cudagraphs"``.

        Raises:
            OptionError: If layers are offloaded one by one.
        """
        self._scorer.compile(**options)
        return self

    # Matching

    def predict(self, pairs: Sequence[Pair], *, progress: bool = False) -> np.ndarray:
        """Scores (image, caption) pairs: (n,) float32, higher is a better match.

        Raises:
            ImageError, TextError: If an image or caption cannot be scored.
        """
        return self._scorer.predict(pairs, progress=progress)

    def score(
        self, images: ImageInput | Sequence[ImageInput], texts: str | Sequence[str], *, progress: bool = False
    ) -> ScoreTable:
        """Scores every image against every caption; one image or one caption may be given by itself.

        Args:
            images: Paths, PIL images or uint8 arrays (h, w, 3).
            texts: Captions of any length.

        Raises:
            ImageError, TextError: If an image or caption cannot be scored.
        """
        pictures: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
        captions = [texts] if isinstance(texts, str) else list(texts)
        if not pictures or not captions:
            raise OptionError(f"got {len(pictures)} images and {len(captions)} texts, expected at least one of each")
        flat = self.predict([(image, text) for image in pictures for text in captions], progress=progress)
        names = tuple(image_name(image, i) for i, image in enumerate(pictures))
        return ScoreTable(flat.reshape(len(pictures), len(captions)), names, tuple(captions), self.config)

    def rank(
        self,
        query: ImageInput,
        candidates: Sequence[Any],
        *,
        budget: Budget | int | str | None = None,
        first_stage: MatcherProtocol | None = None,
        keep: int = 100,
        progress: bool = False,
    ) -> list[Ranked]:
        """Candidates for an image (captions) or for a caption (images), best first; equal scores keep their order.

        A string is an image if a file of that name exists.

        Args:
            query: An image, or a caption.
            candidates: Captions for an image, images for a caption.
            budget: What it may cost; None makes all passes for all candidates. A number is of passes of the denoiser,
                text such as ``10s`` of seconds. Passes then go to candidates that can still come first
                (:mod:`dsd.race`). Scores of captions are then up to a number that all of them share.
            first_stage: A cheaper matcher that sees all candidates first, such as ``dsd.baselines.baseline("clip")``.
            keep: How many of the best by the first stage go on. The others are left out of the ranking.
            progress: Whether to show a progress bar.

        Raises:
            ImageError, TextError: If an image or caption cannot be scored; also if query and candidates are all texts.
            OptionError: If there are no candidates, or the budget has not a pass for each of them.
        """
        pairs, names = choice_of(query, candidates)
        kept = list(range(len(pairs)))
        if first_stage is not None:
            if keep < 1:
                raise OptionError(f"got keep {keep}, expected 1 or more candidates to go on after the first stage")
            first = first_stage.predict(pairs, progress=progress)
            kept = sorted(int(i) for i in np.argsort(-first, kind="stable")[:keep])
        if budget is None:
            scores = self.predict([pairs[i] for i in kept], progress=progress)
            order = np.argsort(-scores, kind="stable")
            return [Ranked(kept[i], names[kept[i]], float(scores[i])) for i in order]
        *_, last = self.race([[pairs[i] for i in kept]], budget, progress=progress)
        (found,) = last
        return [
            Ranked(
                kept[i],
                names[kept[i]],
                float(found.scores[i]),
                (float(found.low[i]), float(found.high[i])),
                int(found.passes[i]),
            )
            for i in found.order
        ]

    def race(
        self, choices: Sequence[Sequence[Pair]], budget: Budget | int | str, *, progress: bool = False
    ) -> Iterator[list[Standing]]:
        """Finds the best pair of each choice with as few passes as it takes; the standings can be used at any time.

            for (standing,) in matcher.race([[(image, text) for text in texts]], "10s"):
                best = texts[standing.order[0]]

        Args:
            choices: Of each its candidates: pairs of one image with captions, or of one caption with images.
            budget: ``passes`` for each choice, ``seconds`` for all; see :class:`dsd.race.Budget`.
            progress: Whether to show a progress bar.

        Yields:
            After each round of passes, where each choice stands; the last are the results.

        Raises:
            ImageError, TextError: If an image or caption cannot be scored.
            OptionError: If a choice is none, or the budget has not a pass for each candidate.
        """
        images = [len({image_key(image) for image, _ in choice}) for choice in choices]
        texts = [len({text for _, text in choice}) for choice in choices]
        prices = [self._scorer.price(a, b) for a, b in zip(images, texts, strict=True)]
        relative = [count == 1 for count in images]
        with tqdm(desc="racing", unit="pass", disable=not progress) as bar:
            yield from run(self._scorer, choices, prices, relative, Budget.of(budget), progress=bar)

    def telling_first(
        self,
        choices: Sequence[Sequence[Pair]],
        right: Sequence[int] | None = None,
        *,
        progress: bool = False,
    ) -> tuple[int, ...]:
        """The score's passes, the most telling first; for :attr:`dsd.race.Budget.order`, or for a shorter score.

            order = matcher.telling_first(choices)
            few = replace(score, timesteps=tuple(score.timesteps[p] for p in order[:5]))

        All passes are made for these choices; a few dozen will do.

        Args:
            choices: As for :meth:`race`, each of two or more candidates.
            right: Of each choice the right candidate. None: the one that all passes together put first, so that no
                labels are needed.
            progress: Whether to show a progress bar.

        Raises:
            ImageError, TextError: If an image or caption cannot be scored.
            OptionError: If a choice has no two candidates.
        """
        every = range(self.score_config.passes)
        pairs = [pair for choice in choices for pair in choice]
        rows = [(i, p) for i in range(len(pairs)) for p in every]
        with tqdm(total=len(rows), desc="calibrating", unit="pass", disable=not progress) as bar:
            found = self._scorer.contributions(pairs, rows, progress=bar).reshape(len(pairs), len(every))
        ends = np.cumsum([len(choice) for choice in choices])[:-1]
        return telling_first(np.split(found, ends), right)

    def telling_layers(
        self,
        choices: Sequence[Sequence[Pair]],
        right: Sequence[int] | None = None,
        *,
        lost: float = 0.02,
        progress: bool = False,
    ) -> tuple[str, ...]:
        """The fewest layers, from the first on, by which an attention score chooses nearly as well as by all.

        A pass ends after the last layer that its score looks at, so that a score over these takes less time:

            quick = dsd.Matcher.from_pretrained(adapter="lesson", layers=matcher.telling_layers(choices))

        Args:
            choices: As for :meth:`race`, each of two or more candidates; a few dozen.
            right: Of each choice the right candidate. None: the one that all layers together put first, so that no
                labels are needed.
            lost: Share of the choices, at most, that fewer layers may win less than all.
            progress: Whether to show a progress bar.

        Raises:
            ImageError, TextError: If an image or caption cannot be scored.
            OptionError: If a choice has no two candidates, or the score is more than attention.
        """
        pairs = [pair for choice in choices for pair in choice]
        ends = np.cumsum([len(choice) for choice in choices])[:-1]
        found = self._scorer.by_layer(pairs, progress=progress)
        rest = None
        if self.score_config.bare is not None:
            total, parts = self._scorer.predict_parts(pairs, progress=progress)
            rest = np.split(total - parts[self.score_config.kind], ends)
        # layers come in the order in which a pass runs them
        return self._scorer.score.layers[: fewest_layers(np.split(found, ends), right, lost=lost, rest=rest)]

    @property
    def scale(self) -> float | None:
        """What turns scores into log-odds; None without calibration, and for a score other than was calibrated.

        Another seed, which is other noise, makes no other score.
        """
        if self.adapter is None:
            return None
        same = _unseeded(self.score_config) == _unseeded(self.adapter.score)
        return self.adapter.scale if same else None

    def probability(self, images: ImageInput | Sequence[ImageInput], texts: str | Sequence[str]) -> np.ndarray:
        """How probable each caption is among those given, for each image: (n_images, n_texts), rows sum to one.

        Raises:
            AdapterError: If no adapter is loaded, for only learning calibrates scores, or the score is another than was
                calibrated.
        """
        scale = self.scale
        if scale is None:
            told = self.adapter is not None and self.adapter.scale is not None
            raise AdapterError(
                "got another score, timesteps or layers than were calibrated, expected the adapter's; leave them out"
                if told
                else "got a matcher without calibration, expected an adapter that was fitted; use fit first"
            )
        logits = scale * self.score(images, texts).scores.astype(np.float64)
        odds = np.exp(logits - logits.max(1, keepdims=True))
        shares: np.ndarray = odds / odds.sum(1, keepdims=True)
        return shares

    # Learning

    def fit(
        self,
        examples: Sequence[Example],
        validation: Sequence[Example] | None = None,
        *,
        config: FitConfig | None = None,
        prompt: PromptConfig | None = None,
        start: Adapter | str | os.PathLike[str] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
        log: str | os.PathLike[str] | None = None,
        accelerator: Accelerator | None = None,
        progress: bool = False,
    ) -> Self:
        """Teaches the matcher from labelled examples; see :func:`dsd.adapt.fit`. An earlier lesson is forgotten.

        Args:
            start: An adapter, or where one is (:meth:`load_adapter`), whose prompts are learned on from; an earlier
                lesson of this matcher is ``start=matcher.adapter``.

        Raises:
            OptionError: If the model is offloaded layer by layer.
        """
        started = start if start is None or isinstance(start, Adapter) else Adapter.load(start)
        if self.backbone.offload == "sequential":
            raise OptionError(
                "got a model that is offloaded layer by layer to learn with, expected offload 'model' or none; a "
                "layer's weights are gone when gradients need them"
            )
        self.forget()
        self.adapter = fit(
            self._scorer,
            examples,
            validation,
            config=config,
            prompt=prompt,
            start=started,
            checkpoint=checkpoint,
            resume=resume,
            log=log,
            accelerator=accelerator,
            progress=progress,
        )
        return self

    def load_adapter(self, adapter: Adapter | str | os.PathLike[str]) -> Self:
        """Takes on what was learned before, in place of an earlier lesson; it brings its own score.

        Raises:
            AdapterError: If it cannot be read, or belongs to another base model.
            OptionError: If it was learned at another size of pictures than the matcher's.
        """
        loaded = adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)
        if loaded.size not in (None, self._scorer.size):
            raise OptionError(
                f"got an adapter that was learned at {loaded.size} pixels for a matcher at {self._scorer.size}, "
                "expected the same; load the model anew, with the adapter"
            )
        self.forget()
        loaded.attach(self.backbone)
        try:
            self._scorer.use(loaded.score, loaded.weights if loaded.score.kind == WEIGHTED else None)
        except BaseException:
            prompts.detach(self.backbone.denoiser)
            raise
        self.adapter = loaded
        return self

    def forget(self) -> Self:
        """Takes away what was learned: the model is bare, and the score is the one that the matcher was made with.

        Where that was learned too, it is the zero-shot score beside it, or of weights ``denoising``.
        """
        prompts.detach(self.backbone.denoiser)
        self.adapter = None
        self._scorer.use(self._first_score)
        return self

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Saves what was learned; the base model is named, not copied.

        Raises:
            AdapterError: If nothing was learned yet.
        """
        if self.adapter is None:
            raise AdapterError("got a matcher without an adapter, expected one that was fitted; use fit first")
        return self.adapter.save(folder)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Uploads what was learned to the Hugging Face hub; returns its address there."""
        from tempfile import TemporaryDirectory

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with TemporaryDirectory() as folder:
            saved = self.save_pretrained(Path(folder) / repo_id.split("/")[-1])
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=saved))

    # Understanding

    def explain(
        self,
        image: ImageInput,
        text: str,
        *,
        config: ExplainConfig | None = None,
        phrases: Sequence[str] | None = None,
    ) -> Explanation:
        """Where in the image each word and phrase of a caption is seen, and what the score is made of.

        See :func:`dsd.explain.explain`.
        """
        return explain(self._scorer, image, text, config=config, phrases=phrases)

    def compare_texts(
        self, image: ImageInput, text_a: str, text_b: str, *, config: ExplainConfig | None = None
    ) -> TextDifference:
        """Where two captions of one image disagree, and which words decide; see :func:`dsd.explain.compare_texts`."""
        return compare_texts(self._scorer, image, text_a, text_b, config=config)

    def compare_images(
        self, text: str, image_a: ImageInput, image_b: ImageInput, *, config: ExplainConfig | None = None
    ) -> ImageDifference:
        """Why a caption fits one image better than another; see :func:`dsd.explain.compare_images`."""
        return compare_images(self._scorer, text, image_a, image_b, config=config)


def _unseeded(config: ScoreConfig) -> ScoreConfig:
    """The score whatever the noise."""
    return replace(config, seed=0, bare=None if config.bare is None else replace(config.bare, seed=0))


def default_score(backbone: Backbone, kind: str = "denoising") -> ScoreConfig:
    """A score at the model's own timesteps and, if its card says so, layers."""
    card = cards().get(backbone.name)
    layers = card.layers if card is not None and kind in ("attention", "attention-mass") else None
    return ScoreConfig(kind, backbone.timesteps, layers=layers)
