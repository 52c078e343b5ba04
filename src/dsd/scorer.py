"""Scores many pairs: each image and caption encoded once, the same noise for all, in batches that fit the memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from inspect import signature
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from dsd import prompts
from dsd.backbone import Backbone, Latents, TextStates
from dsd.contracts import DsdError, ImageInput, ModelError, OptionError, Pair, TextError, batched
from dsd.encodings import Encodings
from dsd.images import content_hash, load_image, resize_crop
from dsd.probe import unheard
from dsd.race import Price
from dsd.scores import Measured, Pass, Score, ScoreConfig, noised_pass

V = TypeVar("V")

_KEPT = 4096
"""Latents, and token states, that are kept."""
_BYTES = 2**30
"""Of token states that are kept: those of large text encoders take megabytes each."""


class Cache(Generic[V]):
    """The last values by key.

    Args:
        size: How many.
        room: Bytes that they take at most; None: any.
        weigh: Bytes of a value.
    """

    def __init__(self, size: int, room: int | None = None, weigh: Callable[[V], int] = lambda _: 0) -> None:
        self._size, self._room, self._weigh = size, room, weigh
        self._taken = 0
        self._values: OrderedDict[Hashable, V] = OrderedDict()

    def get(self, key: Hashable) -> V | None:
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        return None

    def put(self, key: Hashable, value: V) -> None:
        if key in self._values:
            self._taken -= self._weigh(self._values.pop(key))
        self._values[key] = value
        self._taken += self._weigh(value)
        while len(self._values) > self._size or (
            self._room is not None and self._taken > self._room and len(self._values) > 1
        ):
            self._taken -= self._weigh(self._values.popitem(last=False)[1])

    def reserve(self, count: int) -> None:
        """Makes room for ``count`` values at least."""
        self._size = max(self._size, count)


def common_noise(shape: tuple[int, int, int], count: int, seed: int) -> Float[Tensor, "t c h w"]:
    """``count`` draws of standard normal noise, decided by the seed alone, whatever the device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, *shape), generator=generator)


class Scorer:
    """A backbone with a score, caches and a batch size.

    Args:
        backbone: The model.
        config: The score.
        size: Pixels a side; pictures are resized (shorter side) and centre-cropped to it. Default: the model's own.
        batch_size: Rows a pass; halved whenever memory runs out. Default: by the latent's size.
        noise: (timesteps, c, h, w) in the order of ``config.timesteps``, instead of noise from ``config.seed``.
        weights: (timesteps, features) for a ``weighted`` score.
        encodings: Keeps latents and token states on disk.

    Raises:
        OptionError: If size, batch size or noise do not fit.
    """

    ROWS = 2**14
    """Latent positions a batch by default."""
    CHUNK = 256
    """Pairs whose encodings are held at once."""

    def __init__(
        self,
        backbone: Backbone,
        config: ScoreConfig,
        *,
        size: int | None = None,
        batch_size: int | None = None,
        noise: np.ndarray | None = None,
        weights: Tensor | None = None,
        encodings: Encodings | None = None,
    ) -> None:
        self.backbone = backbone
        self.encodings = encodings
        self.size = backbone.image_size if size is None else size
        if not 8 <= self.size <= 8192:
            raise OptionError(f"got size {self.size}, expected 8 to 8192 pixels a side")
        if batch_size is not None and batch_size < 1:
            raise OptionError(f"got batch size {batch_size}, expected 1 or more")
        shape = backbone.latent_shape(self.size)
        self.batch_size = batch_size or min(256, max(1, self.ROWS // (shape[1] * shape[2])))
        self._latents: Cache[Latents] = Cache(_KEPT)
        self._texts: Cache[TextStates] = Cache(_KEPT, _BYTES, _bytes_of)
        self._given = noise
        self.use(config, weights)

    def use(self, config: ScoreConfig, weights: Tensor | None = None) -> None:
        """Changes the score; encoded images and captions are kept."""
        if self._given is not None and config.bare is not None and len(config.bare.timesteps) != len(config.timesteps):
            raise OptionError(
                f"got noise for a score of {len(config.timesteps)} timesteps and one of {len(config.bare.timesteps)} "
                "that is added to it, which takes noise of its own; leave the noise out"
            )
        score, noise = Score(self.backbone, config, weights), self._noise_of(config)
        bare = None if config.bare is None else Score(self.backbone, config.bare)
        bare_noise = None if config.bare is None else self._noise_of(config.bare)
        # together, for any of them may be refused
        self.score, self.noise, self._bare, self._bare_noise = score, noise, bare, bare_noise

    @property
    def noise_was_given(self) -> bool:
        """Whether the noise was given, rather than drawn from the score's seed."""
        return self._given is not None

    def _noise_of(self, config: ScoreConfig) -> Float[Tensor, "t c h w"]:
        """The noise of a score's passes."""
        shape = (len(config.timesteps), *self.backbone.latent_shape(self.size))
        if self._given is None:
            return common_noise(shape[1:], shape[0], config.seed).to(self.backbone.device)
        given = np.asarray(self._given)
        if given.shape != shape or not np.issubdtype(given.dtype, np.floating) or not np.isfinite(given).all():
            raise OptionError(
                f"got noise of shape {given.shape} and type {given.dtype}, expected finite floats of shape {shape} "
                "(timesteps, channels, height, width)"
            )
        return torch.from_numpy(given.astype(np.float32)).to(self.backbone.device)

    def compile(self, **options: Any) -> None:
        """Compiles the denoiser but for the layers that are listened to; see :meth:`dsd.matcher.Matcher.compile`."""
        if self.backbone.offload == "sequential":
            raise OptionError("got offload 'sequential', expected networks that stay whole on a device to compile them")
        usual: dict[str, Any] = {"dynamic": False}
        if "isolate_recompiles" in signature(torch.compile).parameters:
            usual["isolate_recompiles"] = True  # else parts of one class share what few shapes torch allows a function
        for module in unheard(self.backbone.denoiser):
            module.compile(**{**usual, **options})
        self.backbone.compiled = True

    # Encoding, once

    def latents(self, images: Sequence[ImageInput], tick: Callable[[], object] | None = None) -> Latents:
        """Images => latents (n, c, h, w), each distinct picture encoded once; ``tick`` is called for each image."""
        keys: list[str] = []
        found: dict[str, Latents] = {}
        fresh: dict[str, Any] = {}

        def encode(rows: int) -> None:
            part = list(fresh)[:rows]
            for key, latent in zip(part, self.backbone.encode_images([fresh[k] for k in part]), strict=True):
                self._latents.put(key, latent)
                found[key] = latent
                if self.encodings is not None:
                    self.encodings.keep_latent(key, latent)
            for key in part:
                del fresh[key]

        for image in images:
            picture = resize_crop(load_image(image), self.size)
            key = content_hash(picture)
            keys.append(key)
            if key not in found and key not in fresh:
                kept = self._latents.get(key)
                if kept is None and self.encodings is not None:
                    kept = self.encodings.latent(key)
                if kept is None:
                    fresh[key] = picture
                else:
                    found[key] = kept
                    self._latents.put(key, kept)
            while len(fresh) >= self.batch_size:  # no more pictures are in memory at once
                self._fit_memory(encode)
            if tick is not None:
                tick()
        while fresh:
            self._fit_memory(encode)
        return torch.stack([found[key] for key in keys])

    def hold(self, images: Sequence[ImageInput], tick: Callable[[], object] | None = None) -> None:
        """Encodes images, and makes room for the latents of all, however many; ``tick`` is called for each."""
        self._latents.reserve(_KEPT + len(images))
        self.latents(images, tick)

    def texts(self, texts: Sequence[str]) -> list[TextStates]:
        """Captions => token states, one value each."""
        found = []
        for text in texts:
            states = self._texts.get(text)
            if states is None:
                states = self._encode(text)
                self._texts.put(text, states)
            found.append(states)
        return found

    def _encode(self, text: str) -> TextStates:
        if self.encodings is not None and (kept := self.encodings.text(text)) is not None:
            return kept
        (states,) = self.backbone.encode_texts([text])
        if self.encodings is not None:
            self.encodings.keep_text(text, states)
        return states

    # Scoring

    def predict(self, pairs: Sequence[Pair], *, progress: bool = False) -> np.ndarray:
        """Scores of (image, caption) pairs, each independent of the others: (n,) float32, higher is better."""
        return self.predict_parts(pairs, progress=progress)[0]

    def predict_parts(
        self, pairs: Sequence[Pair], *, progress: bool = False
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """As :meth:`predict`, with the unweighted terms of the score beside it, (n,) float32 a name.

        Raises:
            ImageError, TextError: If an image or caption cannot be scored.
            ModelError: If the model gives numbers that are not finite.
        """
        _check_texts(pairs)
        config = self.score.config
        weights = dict(self.score.terms)
        if self._bare is not None:
            weights |= {f"bare {kind}": config.bare_weight * weight for kind, weight in self._bare.terms.items()}
        parts: dict[str, list[np.ndarray]] = {kind: [] for kind in weights}
        with tqdm(total=len(pairs) * config.passes, desc="scoring", unit="pass", disable=not progress) as bar:
            for chunk in batched(pairs, self.CHUNK):
                for kind, values in self._chunk(chunk, bar).items():
                    parts[kind].append(values)
        table = {k: np.concatenate(v) if v else np.zeros(0, np.float32) for k, v in parts.items()}
        total = np.zeros(len(pairs), np.float32)
        for kind, values in table.items():
            total += np.float32(weights[kind]) * values
        self._check_finite(pairs, np.isfinite(total))
        return total, table

    def contributions(
        self,
        pairs: Sequence[Pair],
        rows: Sequence[tuple[int, int]],
        *,
        relative: Sequence[bool] | None = None,
        progress: Any = None,
    ) -> Float[np.ndarray, " rows"]:
        """What single passes add to scores: the mean of a pair's contributions over all its passes is its score.

        Args:
            pairs: Images and captions.
            rows: Numbers of pairs and of passes: those at the score's timesteps first, then those of the bare score.
            relative: Of each pair, whether to leave out what is the same for all captions of an image, and to save the
                passes under the empty caption that it takes. Every score is a sum of that and of the caption's part.
            progress: A progress bar that counts passes.

        Raises:
            ImageError, TextError: If an image or caption cannot be scored.
            ModelError: If the model gives numbers that are not finite.
        """
        _check_texts(pairs)
        config = self.score.config
        own = len(config.timesteps)
        found = np.zeros(len(rows), np.float32)
        bar = tqdm(disable=True) if progress is None else progress

        def measure(score: Score, noise: Tensor, places: list[int], before: int, weight: float, empty: bool) -> None:
            at = {i: n for n, i in enumerate(dict.fromkeys(rows[k][0] for k in places))}
            number = {(at[rows[k][0]], rows[k][1] - before): k for k in places}
            scale = weight * config.passes / len(score.config.timesteps)

            def take(index: list[int], step: Tensor, made: Pass, other: Pass | None) -> None:
                values = scale * score(made, made.nothing() if other is None else other, step)
                for i, s, value in zip(index, step.tolist(), values.tolist(), strict=True):
                    found[number[i, s]] = value

            some = [pairs[i] for i in at]
            self._passes(some, score, score.config.timesteps, noise, take, bar, list(number), empty=empty)

        of: dict[int, list[int]] = {}
        for k, (i, _) in enumerate(rows):
            of.setdefault(i, []).append(k)
        for empty in (True, False):
            asked = [i for i in of if (relative is None or not relative[i]) == empty]
            for chunk in batched(asked, self.CHUNK):
                here = [k for i in chunk for k in of[i]]
                mine, rest = [k for k in here if rows[k][1] < own], [k for k in here if rows[k][1] >= own]
                if mine:
                    measure(self.score, self.noise, mine, 0, 1.0, empty)
                if rest and self._bare is not None and self._bare_noise is not None:
                    with prompts.disabled(self.backbone.denoiser):
                        measure(self._bare, self._bare_noise, rest, own, config.bare_weight, empty)
        finite = np.ones(len(pairs), bool)
        for (i, _), good in zip(rows, np.isfinite(found), strict=True):
            finite[i] &= good
        self._check_finite(pairs, finite)
        return found

    def price(self, images: int, texts: int) -> Price:
        """What passes over the pairs of a choice cost: captions for one image, or images for one caption.

        Raises:
            OptionError: If there are several of both.
        """
        if min(images, texts) != 1:
            raise OptionError(f"got a choice of {images} images and {texts} texts, expected one of either")
        if images == 1:  # relative contributions will do
            return Price((1,) * self.score.config.passes)
        own = [self.score.needs_empty] * len(self.score.config.timesteps)
        bare = [] if self._bare is None else [self._bare.needs_empty] * len(self._bare.config.timesteps)
        return Price(tuple(1 + int(needed) for needed in own + bare))

    def features(
        self, pairs: Sequence[Pair], features: Measured, draws: int = 1, *, progress: bool = False
    ) -> Float[np.ndarray, "draws n timesteps features"]:
        """The features of each pair, under the scorer's own noise and then under ``draws - 1`` further draws of it.

        Raises:
            ImageError, TextError: If an image or caption cannot be scored.
            ModelError: If the model gives numbers that are not finite.
        """
        _check_texts(pairs)
        config = self.score.config
        steps = len(config.timesteps)
        found = np.zeros((draws, len(pairs), steps, len(features.names)), np.float32)
        with tqdm(total=draws * len(pairs) * steps, desc="features", unit="pass", disable=not progress) as bar:
            for draw in range(draws):
                fresh = common_noise(self.backbone.latent_shape(self.size), steps, (config.seed + draw) % 2**63)
                noise = fresh.to(self.backbone.device) if draw else self.noise
                for start in range(0, len(pairs), self.CHUNK):
                    rows = found[draw, start : start + self.CHUNK]

                    def take(index: list[int], step: Tensor, made: Pass, empty: Pass | None, rows: Any = rows) -> None:
                        rows[index, step.cpu().numpy()] = features(made, empty).cpu().numpy()

                    self._passes(pairs[start : start + self.CHUNK], features, config.timesteps, noise, take, bar)
        self._check_finite(pairs, np.asarray(np.isfinite(found).all((0, 2, 3))))
        return found

    def by_layer(self, pairs: Sequence[Pair], *, progress: bool = False) -> Float[np.ndarray, "n layers"]:
        """What each of :attr:`dsd.scores.Score.layers` says of a pair: an attention score is the mean over them.

        Raises:
            OptionError: If the score is more than attention.
            ImageError, TextError: If an image or caption cannot be scored.
            ModelError: If the model gives numbers that are not finite.
        """
        score = self.score
        if score.config.kind not in ("attention", "attention-mass"):
            raise OptionError(
                f"got score {score.config.kind!r}, expected attention or attention-mass, which is by layer"
            )
        _check_texts(pairs)
        found = np.zeros((len(pairs), len(score.layers)), np.float64)
        times = score.config.timesteps
        with tqdm(total=len(pairs) * len(times), desc="layers", unit="pass", disable=not progress) as bar:
            for start in range(0, len(pairs), self.CHUNK):
                rows = found[start : start + self.CHUNK]

                def take(index: list[int], step: Tensor, made: Pass, empty: Pass | None, rows: Any = rows) -> None:
                    parts = score.by_layer(made, empty, step)
                    each = torch.stack([parts[name] for name in score.layers], 1) * len(score.layers)
                    np.add.at(rows, index, each.double().cpu().numpy() / len(times))

                self._passes(pairs[start : start + self.CHUNK], score, times, self.noise, take, bar)
        self._check_finite(pairs, np.asarray(np.isfinite(found).all(1)))
        return found

    # Understanding

    def shares(self, image: ImageInput, text: str) -> dict[str, dict[int, float]]:
        """A pair's score split by layer (and ``denoising``, and that of the bare model) and timestep; parts sum to it.

        Raises:
            ImageError, TextError: If the image or the caption cannot be scored.
        """
        check_text(text)
        found: dict[str, dict[int, float]] = {}

        def split(score: Score, noise: Tensor, prefix: str, weight: float) -> None:
            times = score.config.timesteps

            def take(_index: list[int], step: Tensor, made: Pass, empty: Pass | None) -> None:
                for name, values in score.by_layer(made, empty, step).items():
                    part = found.setdefault(prefix + name, dict.fromkeys(times, 0.0))
                    for k, value in zip(step.tolist(), values.double().tolist(), strict=True):
                        part[times[k]] += weight * value / len(times)

            with tqdm(disable=True) as bar:
                self._passes([(image, text)], score, times, noise, take, bar)

        split(self.score, self.noise, "", 1.0)
        if self._bare is not None and self._bare_noise is not None:
            with prompts.disabled(self.backbone.denoiser):
                split(self._bare, self._bare_noise, "bare ", self.score.config.bare_weight)
        return found

    @torch.no_grad()
    def errors(
        self, latent: Float[Tensor, "c h w"], text: str, timesteps: Int[Tensor, " n"], noise: Latents
    ) -> Latents:
        """What the denoiser gets wrong of the noise under one picture given a caption: ``e - eps(z_t, t, c)``.

        Args:
            latent: Of the picture.
            text: The caption; "" is the empty one.
            timesteps: One a row.
            noise: (n, c, h, w), one a row.

        Returns:
            (n, c, h, w) float32.
        """
        (states,) = self.texts([text])
        steps = timesteps.to(self.backbone.device)
        made: list[Tensor] = []

        def run(at: slice) -> None:
            e, t = noise[at], steps[at]
            found = noised_pass(self.backbone, latent[None].expand_as(e), e, t, states, captions=[0] * len(t))
            assert found.predicted is not None
            made.append(found.noise - found.predicted)

        self.in_parts(len(steps), run)
        return torch.cat(made)

    def in_parts(self, rows: int, run: Callable[[slice], None]) -> None:
        """Calls ``run`` with consecutive slices of so many rows that fit the memory."""
        done = 0

        def part(count: int) -> None:
            nonlocal done
            run(slice(done, min(done + count, rows)))
            done += count

        while done < rows:
            self._fit_memory(part)

    def _check_finite(self, pairs: Sequence[Pair], finite: np.ndarray) -> None:
        if not finite.all():
            first = pairs[int(np.flatnonzero(~finite)[0])]
            raise ModelError(
                f"got a score that is not finite for the caption {first[1]!r}; "
                f"{self.backbone.name} overflows in {self.backbone.dtype}, try dtype float32"
            )

    def _chunk(self, pairs: Sequence[Pair], bar: Any) -> dict[str, np.ndarray]:
        found = self._terms(pairs, self.score, self.noise, bar)
        if self._bare is not None and self._bare_noise is not None:
            with prompts.disabled(self.backbone.denoiser):
                bare = self._terms(pairs, self._bare, self._bare_noise, bar)
            found |= {f"bare {kind}": values for kind, values in bare.items()}
        return found

    def _terms(self, pairs: Sequence[Pair], score: Score, noise: Tensor, bar: Any) -> dict[str, np.ndarray]:
        """The terms of a score, means over its timesteps: (n,) float32 a name."""
        timesteps = score.config.timesteps
        sums = {kind: torch.zeros(len(pairs), dtype=torch.float64) for kind in score.terms}

        def take(index: list[int], step: Tensor, made: Pass, empty: Pass | None) -> None:
            for kind, values in score.parts(made, empty, step).items():
                sums[kind].index_add_(0, torch.tensor(index), values.double().cpu())

        self._passes(pairs, score, timesteps, noise, take, bar)
        return {kind: (total / len(timesteps)).float().numpy() for kind, total in sums.items()}

    @torch.no_grad()
    def _passes(
        self,
        pairs: Sequence[Pair],
        what: Score | Measured,
        times: Sequence[int],
        noise: Tensor,
        take: Callable[[list[int], Tensor, Pass, Pass | None], None],
        bar: Any,
        rows: Sequence[tuple[int, int]] | None = None,
        *,
        empty: bool = True,
    ) -> None:
        """Hands pairs at timesteps to ``take``: pairs, timesteps, passes under captions and the empty one.

        ``rows`` are numbers of pairs and of timesteps; by default every pair at every timestep. Without ``empty``, no
        passes are made under the empty caption.
        """
        if rows is None:
            rows = [(i, s) for i in range(len(pairs)) for s in range(len(times))]
        # the same object or path is read once, whatever it holds
        places: dict[Hashable, int] = {}
        images: list[ImageInput] = []
        for image, _ in pairs:
            if image_key(image) not in places:
                places[image_key(image)] = len(images)
                images.append(image)
        image_of = [places[image_key(image)] for image, _ in pairs]
        latents = self.latents(images)
        texts = self.texts([text for _, text in pairs])
        timesteps = torch.tensor(times, device=self.backbone.device)
        empty = empty and what.needs_empty
        shared = {key: k for k, key in enumerate(dict.fromkeys((image_of[i], s) for i, s in rows))}

        # a pass takes captions of one length only, so that nothing is padded for another's sake; those under the empty
        # caption come first, because all others are compared with them
        lengths: dict[int, list[tuple[int, int, int | None]]] = {}
        if empty:
            (nothing,) = self.backbone.encode_texts([""])
            lengths[nothing.states.shape[1]] = [(image, s, None) for image, s in shared]
        for i, s in rows:
            lengths.setdefault(texts[i].states.shape[1], []).append((image_of[i], s, i))
        layers = tuple(dict.fromkeys((*what.layers, *what.empty_layers))) if empty else what.layers
        blanks: list[Pass] = []
        for items in lengths.values():
            done = 0

            def run(count: int, items: list[tuple[int, int, int | None]] = items) -> None:
                nonlocal done
                part = items[done : done + count]
                filled = part if not self.backbone.compiled else [*part, *[part[-1]] * self._lacking(len(part))]
                step = torch.tensor([s for _, s, _ in filled], device=latents.device)
                said = ["" if i is None else pairs[i][1] for _, _, i in filled]
                first = {text: i for text, (_, _, i) in zip(reversed(said), reversed(filled), strict=True)}
                number = {text: k for k, text in enumerate(first)}
                made = noised_pass(
                    self.backbone,
                    latents[[image for image, _, _ in filled]],
                    noise[step],
                    timesteps[step],
                    TextStates.join([nothing if i is None else texts[i] for i in first.values()]),
                    layers,
                    what.direction,
                    captions=[number[text] for text in said],
                    over=what.over,
                    predict=what.sees_noise,
                )
                under = sum(i is None for _, _, i in part)  # the empty caption, at the head
                known = [*blanks, made.rows(range(under)).only(what.empty_layers)] if under else list(blanks)
                rest = [(shared[image, s], i) for image, s, i in part[under:] if i is not None]
                if rest:
                    known = [Pass.join(known)] if len(known) > 1 else known
                    if under or len(filled) > len(part):
                        made = made.rows(range(under, len(part)))
                    take(
                        [i for _, i in rest],
                        step[under : len(part)],
                        made.only(what.layers),
                        known[0].rows([place for place, _ in rest]) if known else None,
                    )
                # last, for if memory runs out before, the same rows are passed again
                blanks[:] = known
                done += len(part)
                bar.update(len(rest))

            while done < len(items):
                self._fit_memory(run)

    def _lacking(self, rows: int) -> int:
        """Rows to add to a batch for a compiled denoiser, which is to see few shapes: up to a power of two."""
        return int(min(max(self.batch_size, rows), 1 << (rows - 1).bit_length())) - rows

    def _fit_memory(self, run: Callable[[int], None]) -> None:
        """Runs one batch, with half the rows for as long as memory runs out."""
        while True:
            try:
                return run(self.batch_size)
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if isinstance(error, DsdError) or not out_of_memory(error):
                    raise
                if self.batch_size == 1:
                    raise ModelError(
                        f"{self.backbone.device} has too little memory for one row of {self.backbone.name} at "
                        f"{self.size} pixels; try a smaller size or dtype float16"
                    ) from error
            self.batch_size //= 2
            with suppress(Exception):  # nothing to free on some devices
                torch.cuda.empty_cache()


def _bytes_of(text: TextStates) -> int:
    tensors = (value for value in vars(text).values() if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _check_texts(pairs: Sequence[Pair]) -> None:
    for _, text in pairs:
        check_text(text)


def check_text(text: str) -> None:
    """Refuses what is no caption."""
    if not isinstance(text, str) or not text.strip():
        raise TextError(f"got the caption {text!r}, expected text with at least one word")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise TextError(f"got the caption {text!r}, expected Unicode text; it was read in another encoding")


def image_key(image: ImageInput) -> Hashable:
    """The same for the same object or path, whatever it holds."""
    return str(image) if isinstance(image, str) or hasattr(image, "__fspath__") else id(image)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says so, in whatever words a device has for it."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        s in text for s in ("out of memory", "can't allocate memory", "not enough memory")
    )
