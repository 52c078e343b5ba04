"""Where in an image each word of a caption is seen, what the score is made of, and where two pairs differ.

A word's map comes of one of these (``ExplainConfig.method``):

- ``evidence``: where the word helps to predict the noise. Of every position of the latent, the squared error of the
  noise without the word in the caption, less that with it: the denoising score (Li et al. 2023) before it is summed.
- ``effect``: where the word changes the prediction at all, ``|eps(c) - eps(c without it)|^2`` (Couairon et al. 2022,
  DiffEdit, find masks so).
- ``attention``: the share of a position's attention to the caption's own words that falls on the word (Tang et al.
  2023, DAAM, on the user's own image), less that share's mean over the picture: words that everything attends to
  alike stay dark.
- ``raw-attention``: the same as a share of all tokens, start, end and padding included, and nothing taken off.
- ``joint``: the geometric mean of evidence and attention, which err in different places.

Maps of timesteps and of layers are each brought to the picture's size, and averaged: attention over layers and heads,
errors over the draws of noise, each timestep in units of its own mean magnitude.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dsd.contracts import ImageInput, OptionError, TextError
from dsd.explanation import (
    Change,
    ExplainConfig,
    Explanation,
    ImageDifference,
    Phrase,
    TextDifference,
    find_phrase,
    noun_phrases,
)
from dsd.images import load_image, resize_crop
from dsd.probe import Probe, select_layers
from dsd.prompts import join_tokens
from dsd.scorer import Scorer, check_text, common_noise
from dsd.scores import even_timesteps

_CHANGES = 6
"""Places where captions differ that are told apart; every subset of them is scored."""

Span = tuple[int, int]


def explain(
    scorer: Scorer,
    image: ImageInput,
    text: str,
    *,
    config: ExplainConfig | None = None,
    phrases: Sequence[str] | None = None,
) -> Explanation:
    """Maps of a caption's words and phrases over a picture, and the shares of the score.

    Args:
        scorer: A model with a score.
        image: The picture; it is resized and cropped as for scoring.
        text: The caption.
        config: How maps are made.
        phrases: Runs of the caption's words to map as one; None finds noun phrases.

    Raises:
        ImageError, TextError: If the image or the caption cannot be scored, or a phrase is not in the caption.
        OptionError: If a timestep, layer or head does not fit the model.
    """
    config = config or ExplainConfig()
    check_text(text)
    given = load_image(image)
    picture = resize_crop(given, scorer.size)
    (states,) = scorer.texts([text])
    words = states.words[0].spelling
    spans = noun_phrases(words) if phrases is None else [find_phrase(words, phrase) for phrase in phrases]
    singles = [(i, i + 1) for i in range(len(words))]
    drawn = _Drawer(scorer, picture, text, words, config).maps([*singles, *spans])
    peaks = drawn.max((1, 2), initial=0.0)
    scaled = np.divide(drawn, peaks[:, None, None], out=np.zeros_like(drawn), where=peaks[:, None, None] > 0)

    shares = scorer.shares(picture, text)
    by_timestep = np.sum([*shares.values()], axis=0)
    score = float(scorer.predict([(picture, text)])[0])
    side = min(given.size)
    left, top = (given.width - side) / 2, (given.height - side) / 2
    return Explanation(
        image=picture,
        text=text,
        words=words,
        maps=scaled[: len(words)],
        strength=peaks[: len(words)],
        phrases=tuple(Phrase(" ".join(words[a:b]), a, b, scaled[len(words) + i]) for i, (a, b) in enumerate(spans)),
        score=score,
        by_timestep={t: float(v) for t, v in zip(scorer.score.config.timesteps, by_timestep, strict=True)},
        by_layer={name: float(v.sum()) for name, v in shares.items()},
        by_word=_left_out(scorer, picture, text, words, score) if config.words else np.full(len(words), np.nan, "f"),
        crop=(left, top, left + side, top + side),
        config={"model": scorer.backbone.name, "score": scorer.score.config.to_dict(), **config.to_dict()},
    )


def compare_texts(
    scorer: Scorer, image: ImageInput, text_a: str, text_b: str, *, config: ExplainConfig | None = None
) -> TextDifference:
    """Where two captions of one picture disagree, and which words decide.

    The map is the squared error of the noise under the second caption less that under the first: what the denoising
    score compares, before it is summed. The places where the captions differ share the difference of the scores by
    Shapley's rule over captions in which some of them are exchanged, so that the shares sum to it exactly and do not
    depend on an order. Above six places, neighbours are joined.

    Raises:
        ImageError, TextError, OptionError: As :func:`explain` raises them.
    """
    config = config or ExplainConfig()
    a, b = (explain(scorer, image, text, config=config) for text in (text_a, text_b))
    drawer = _Drawer(scorer, a.image, text_a, a.words, config)
    signed = drawer.signed(text_a, text_b)
    strength = float(np.abs(signed).max())
    return TextDifference(
        a=a,
        b=b,
        difference=a.score - b.score,
        map=signed / strength if strength > 0 else signed,
        strength=strength,
        changes=_changes(scorer, a, b),
        by_timestep=_less(a.by_timestep, b.by_timestep),
        by_layer=_less(a.by_layer, b.by_layer),
    )


def compare_images(
    scorer: Scorer, text: str, image_a: ImageInput, image_b: ImageInput, *, config: ExplainConfig | None = None
) -> ImageDifference:
    """Why a caption fits one picture better than another.

    Raises:
        ImageError, TextError, OptionError: As :func:`explain` raises them.
    """
    a, b = (explain(scorer, image, text, config=config) for image in (image_a, image_b))
    return ImageDifference(
        a=a,
        b=b,
        difference=a.score - b.score,
        by_word=a.by_word - b.by_word,
        by_timestep=_less(a.by_timestep, b.by_timestep),
        by_layer=_less(a.by_layer, b.by_layer),
    )


def _less(a: Mapping[Any, float], b: Mapping[Any, float]) -> dict[Any, float]:
    return {key: a[key] - b[key] for key in a}


# Maps


class _Drawer:
    """Draws maps over one picture: noise and timesteps are the same for all captions."""

    def __init__(self, scorer: Scorer, picture: Any, text: str, words: Sequence[str], config: ExplainConfig) -> None:
        self.scorer, self.text, self.words, self.config = scorer, text, words, config
        (self.latent,) = scorer.latents([picture])
        trained = scorer.backbone.num_train_timesteps
        outside = [t for t in config.timesteps or () if not 0 <= t < trained]
        if outside:
            raise OptionError(f"got timesteps {outside}, expected integers from 0 to {trained - 1}")
        self._trained = trained

    def _steps(self, high: float, count: int) -> tuple[int, ...]:
        return self.config.timesteps or even_timesteps(count, 0, max(count, int(high * self._trained)))

    def maps(self, spans: Sequence[Span]) -> Float[np.ndarray, "spans size size"]:
        """A map of each run of words, at least 0, in the method's unit."""
        method = self.config.method
        if method in ("attention", "raw-attention"):
            found = self._attention(spans, raw=method == "raw-attention")
        elif method in ("evidence", "effect"):
            found = self._errors(spans, method)
        else:
            both = self._errors(spans, "evidence"), self._attention(spans, raw=False)
            found = np.sqrt(both[0].clip(0) * both[1].clip(0))
        return found.clip(0).astype(np.float32)

    def signed(self, text_a: str, text_b: str) -> Float[np.ndarray, "size size"]:
        """The squared error of the noise under the second caption less that under the first."""
        a, b = (self._squared(text) for text in (text_a, text_b))
        return enlarged((b - a).mean(0), self.scorer.size).numpy()

    def _squared(self, text: str) -> Float[Tensor, "timesteps h w"]:
        steps, errors = self._run(text)
        return errors.square().mean(1).unflatten(0, (len(steps), -1)).mean(1)

    def _run(self, text: str) -> tuple[tuple[int, ...], Float[Tensor, "rows c h w"]]:
        """What is wrong of the noise: rows are timesteps, and the draws of each."""
        steps, draws = self._steps(1, 10), self.config.draws
        shape = tuple(self.latent.shape)
        noise = common_noise((shape[0], shape[1], shape[2]), len(steps) * draws, self.scorer.score.config.seed)
        rows = [t for t in steps for _ in range(draws)]
        return steps, self.scorer.errors(self.latent, text, rows, noise.to(self.latent.device)).cpu()

    def _errors(self, spans: Sequence[Span], method: str) -> Float[np.ndarray, "spans size size"]:
        steps, whole = self._run(self.text)
        found = []
        for span in spans:
            _, without = self._run(leave_out(self.text, self.words, span))
            what = (without - whole).square() if method == "effect" else without.square() - whole.square()
            grids = what.mean(1).unflatten(0, (len(steps), -1)).mean(1)
            # the last steps, where noise is predicted best, would count for little
            unit = grids.abs().mean((1, 2), keepdim=True)
            grid = torch.where(unit > 0, grids / unit.clamp(min=1e-20), 0.0).mean(0)
            found.append(enlarged(grid, self.scorer.size).numpy())
        return np.stack(found)

    @torch.no_grad()
    def _attention(self, spans: Sequence[Span], raw: bool) -> Float[np.ndarray, "spans size size"]:
        scorer, backbone, config = self.scorer, self.scorer.backbone, self.config
        (states,) = scorer.texts([self.text])
        states = join_tokens(backbone.denoiser, states)
        layers = select_layers(backbone.denoiser, config.layers)
        steps, draws = self._steps(0.5, 5), config.draws
        height, width = self.latent.shape[-2:]
        tokens = [[t for word in states.words[0].tokens[a:b] for t in word] for a, b in spans]
        total = torch.zeros(len(spans), scorer.size, scorer.size)
        noise = common_noise((len(self.latent), height, width), len(steps) * draws, scorer.score.config.seed)
        # one row a pass: maps are large
        for row, e in enumerate(noise.to(backbone.device)):
            t = torch.tensor([steps[row // draws]], device=backbone.device)
            noised = backbone.add_noise(self.latent[None], e[None], t)
            with Probe(backbone.denoiser, layers, states.own, maps=True, heads=config.heads) as probe:
                backbone.predict_noise(noised, t, states)
            for record in probe.records.values():
                assert record.maps is not None
                (maps,) = record.maps  # (positions, tokens)
                share = torch.stack([maps[:, list(of)].sum(1) for of in tokens])
                if not raw:
                    share = share / maps[:, states.own[0]].sum(1).clamp(min=1e-12)
                    share = share - share.mean(1, keepdim=True)
                # positions of a layer => its height and width, in the latent's proportions
                ratio = math.sqrt(height * width / share.shape[1])
                grid = share.unflatten(1, (round(height / ratio), -1)).float().cpu()
                total += enlarged(grid, scorer.size)
        found: np.ndarray = (total / (len(noise) * len(layers))).numpy()
        return found


def enlarged(grid: Float[Tensor, "*n h w"], size: int) -> Float[Tensor, "*n size size"]:
    """A map on a coarse grid => on a picture's pixels, by cubic interpolation between the cells' centres.

    Beyond the border the grid is mirrored, so that where ``size`` is a multiple of the grid's side, the mean stays.
    """
    rows, columns = (_cubic(n, size).to(grid) for n in grid.shape[-2:])
    return rows @ grid @ columns.T


def _cubic(cells: int, size: int) -> Float[Tensor, "size cells"]:
    """Weights of cells in each pixel (Keys 1981, a = -1/2), which sum to one."""
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) * cells / size - 0.5
    base = centre.floor().long()
    weights = torch.zeros(size, cells, dtype=torch.float64)
    for k in range(-1, 3):
        d = (centre - (base + k)).abs()
        near = 1.5 * d**3 - 2.5 * d**2 + 1
        far = -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
        place = (base + k) % (2 * cells)  # mirrored about the outer edge of the last cell
        place = torch.where(place >= cells, 2 * cells - 1 - place, place)
        weights.index_put_((torch.arange(size), place), torch.where(d <= 1, near, far), accumulate=True)
    return weights.float()


# Words


def leave_out(text: str, words: Sequence[str], *spans: Span) -> str:
    """A caption without some runs of its words; "" if nothing is left."""
    return replaced(text, words, {span: "" for span in spans})


def replaced(text: str, words: Sequence[str], by: Mapping[Span, str]) -> str:
    """A caption with some runs of its words replaced by others, letters and spaces elsewhere as they were.

    A run of no words, ``(i, i)``, is a place before word ``i`` to put something in.
    """
    pieces = _pieces(text, words)
    found: list[str] = []
    at = 0
    for (start, stop), new in sorted(by.items()):
        found += [*pieces[at:start], new]
        at = stop
    found += pieces[at:]
    return " ".join(" ".join(found).split())


def _pieces(text: str, words: Sequence[str]) -> list[str]:
    """Each word as the caption writes it; as the tokenizer does, where it cannot be found there."""
    lower = text.lower()
    found: list[str] = []
    at = 0
    for word in words:
        place = lower.find(word.lower().strip(), at) if len(lower) == len(text) else -1
        if place < 0 or not word.strip():
            return list(words)
        found.append(text[place : place + len(word.strip())])
        at = place + len(word.strip())
    return found


def _left_out(scorer: Scorer, picture: Any, text: str, words: Sequence[str], score: float) -> np.ndarray:
    """What the score loses without each word."""
    rest = [leave_out(text, words, (i, i + 1)) for i in range(len(words))]
    values = _scores(scorer, picture, rest)
    return np.array([score - values[r] for r in rest], np.float32)


def _scores(scorer: Scorer, picture: Any, texts: Sequence[str]) -> dict[str, float]:
    """Scores of captions, also of such as have no words: 0 by the denoising score, NaN by others."""
    found: dict[str, float] = {}
    fit: list[str] = []
    for text in dict.fromkeys(texts):
        try:
            check_text(text)
            scorer.texts([text])
            fit.append(text)
        except TextError:
            found[text] = 0.0 if set(scorer.score.terms) == {"denoising"} else math.nan
    scores = scorer.predict([(picture, text) for text in fit])
    return found | {text: float(s) for text, s in zip(fit, scores, strict=True)}


def _changes(scorer: Scorer, a: Explanation, b: Explanation) -> tuple[Change, ...]:
    """Where captions differ, with Shapley's shares of the difference of their scores."""
    places = _differences(a.words, b.words)
    if not places:
        return ()
    # all captions with some of the places as in the first, the others as in the second
    subsets = [frozenset(s) for k in range(len(places) + 1) for s in itertools.combinations(range(len(places)), k)]
    pieces = _pieces(b.text, b.words), _pieces(a.text, a.words)
    texts = {}
    for chosen in subsets:
        by = {places[i][1]: " ".join(pieces[1][slice(*places[i][0])]) for i in chosen}
        texts[chosen] = replaced(b.text, b.words, by)
    # the ends are the captions themselves, as they are written
    texts[frozenset()], texts[frozenset(range(len(places)))] = b.text, a.text
    values = _scores(scorer, a.image, list(texts.values()))
    worth = {chosen: values[text] for chosen, text in texts.items()}
    count = len(places)
    changes = []
    for i, (span_a, span_b) in enumerate(places):
        share = 0.0
        for chosen in subsets:
            if i not in chosen:
                weight = math.factorial(len(chosen)) * math.factorial(count - len(chosen) - 1) / math.factorial(count)
                share += weight * (worth[chosen | {i}] - worth[chosen])
        changes.append(
            Change(" ".join(a.words[slice(*span_a)]), " ".join(b.words[slice(*span_b)]), span_a, span_b, share)
        )
    return tuple(changes)


def _differences(a: Sequence[str], b: Sequence[str]) -> list[tuple[Span, Span]]:
    """Runs of words that differ, at most six; the same with the captions exchanged.

    Captions of the same length are compared place by place, unless fewer words differ if some are shifted.
    """
    # the matching of one order is not always that of the other, so one order is fixed
    if tuple(b) < tuple(a):
        return [(x, y) for y, x in _differences(b, a)]
    blocks = SequenceMatcher(None, list(a), list(b), autojunk=False).get_opcodes()
    found = [((i, j), (k, m)) for kind, i, j, k, m in blocks if kind != "equal"]
    if len(a) == len(b):
        runs = [list(run) for differ, run in itertools.groupby(range(len(a)), lambda i: a[i] != b[i]) if differ]
        if sum(map(len, runs)) <= sum(max(j - i, m - k) for (i, j), (k, m) in found):
            found = [((run[0], run[-1] + 1),) * 2 for run in runs]
    while len(found) > _CHANGES:
        gaps = [found[i + 1][0][0] - found[i][0][1] for i in range(len(found) - 1)]
        i = gaps.index(min(gaps))
        (first, second) = found[i], found[i + 1]
        found[i : i + 2] = [((first[0][0], second[0][1]), (first[1][0], second[1][1]))]
    return found
