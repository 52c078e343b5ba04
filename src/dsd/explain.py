"""Where in an image each word of a caption is seen, what the score is made of, and where two pairs differ.

A map comes of one of these (``ExplainConfig.method``). Of the noise ``e``, what the denoiser predicts of it under the
caption, ``eps(c)``, and under the caption without the word, ``eps(c')``, at every position of the latent:

- ``evidence``: how much the word helps, ``|e - eps(c')|^2 - |e - eps(c)|^2``: the denoising score (Li et al. 2023,
  Diffusion Classifier) before it is summed.
- ``effect``: how much the word changes, ``|eps(c) - eps(c')|^2`` (Couairon et al. 2022, DiffEdit, find masks so).
- ``agreement``: how far the noise lies where the word moves the prediction, ``(e - eps(c')) . (eps(c) - eps(c'))``.
  That is half the sum of the two above. Were the prediction perfect, all three would be equal on average; evidence is
  what was measured, and noisy, effect what the model believes, so that their mean is the better guess.
- ``attention``: the share of a position's attention to the caption's own words that falls on the word (Tang et al.
  2023, DAAM, here on the user's own image), less that share's mean over the picture: words that everything attends to
  alike stay dark.
- ``raw-attention``: the same as a share of all tokens, start, end and padding included, and nothing taken off.
- ``joint``: the geometric mean of attention and agreement, which err in different places. A word within a noun phrase
  takes the agreement of the phrase: with "circle" alone left out of "a red circle", what is left is no caption. Of
  attention it takes half from the phrase, for that is what tells its circle from others.

Errors of the noise are averaged over its draws, each timestep in units of its own mean effect; attention is averaged
over layers, each brought to the picture's size, heads, timesteps and draws. Where prompts were learned for a score of
attention alone, errors are those of the model without them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL.Image import Image
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
from dsd.prompts import disabled, prompted
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
    drawn = word_maps(scorer, picture, text, [*singles, *spans], config=config)
    peaks = drawn.max((1, 2), initial=0.0)
    scaled = np.divide(drawn, peaks[:, None, None], out=np.zeros_like(drawn), where=peaks[:, None, None] > 0)

    shares = scorer.shares(picture, text)
    by_timestep: dict[int, float] = {}
    for share in shares.values():
        for timestep, value in share.items():
            by_timestep[timestep] = by_timestep.get(timestep, 0.0) + value
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
        by_timestep=dict(sorted(by_timestep.items())),
        by_layer={name: sum(share.values()) for name, share in shares.items()},
        by_word=_left_out(scorer, picture, text, words, score) if config.words else np.full(len(words), np.nan, "f"),
        crop=(left, top, left + side, top + side),
        config={"model": scorer.backbone.name, "score": scorer.score.config.to_dict(), **config.to_dict()},
    )


def word_maps(
    scorer: Scorer, image: ImageInput, text: str, spans: Sequence[Span], *, config: ExplainConfig | None = None
) -> Float[np.ndarray, "spans size size"]:
    """Maps of runs of a caption's words (``words[start:stop]``) and nothing else: float32, 0 or more, unscaled.

    Raises:
        ImageError, TextError, OptionError: As :func:`explain` raises them.
    """
    check_text(text)
    (states,) = scorer.texts([text])
    words = states.words[0].spelling
    outside = [span for span in spans if not 0 <= span[0] < span[1] <= len(words)]
    if outside:
        raise OptionError(f"got runs of words {outside}, expected (start, stop) within the {len(words)} words")
    picture = resize_crop(load_image(image), scorer.size)
    return _Drawer(scorer, picture, config or ExplainConfig()).maps(text, words, spans)


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
    signed = _Drawer(scorer, a.image, config).signed(text_a, text_b)
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

    def __init__(self, scorer: Scorer, picture: Image, config: ExplainConfig) -> None:
        self._scorer, self._config = scorer, config
        (self._latent,) = scorer.latents([picture])
        trained = scorer.backbone.num_train_timesteps
        outside = [t for t in config.timesteps or () if not 0 <= t < trained]
        if outside:
            raise OptionError(f"got timesteps {outside}, expected integers from 0 to {trained - 1}")
        steps = config.timesteps or even_timesteps(min(6, trained), trained // 5, trained - trained // 5)
        self._rows = torch.tensor([t for t in steps for _ in range(config.draws)])
        channels, height, width = self._latent.shape
        seed = scorer.score.config.seed
        self._noise = common_noise((channels, height, width), len(self._rows), seed).to(self._latent.device)

    def maps(self, text: str, words: Sequence[str], spans: Sequence[Span]) -> Float[np.ndarray, "spans size size"]:
        """A map of each run of words, at least 0, in the method's unit."""
        method = self._config.method
        if method in ("attention", "raw-attention"):
            found = self._attention(text, spans, raw=method == "raw-attention")
        elif method == "joint":
            around = [next((p for p in noun_phrases(words) if p[0] <= a and b <= p[1]), (a, b)) for a, b in spans]
            phrases = list(dict.fromkeys(around))
            agreement = dict(zip(phrases, self._errors(text, words, phrases, "agreement").clamp(min=0), strict=True))
            every = list(dict.fromkeys([*spans, *phrases]))
            attention = dict(zip(every, self._attention(text, every, raw=False).clamp(min=0), strict=True))
            found = torch.stack(
                [
                    (agreement[p] * _within(attention[s], attention[p])).sqrt()
                    for s, p in zip(spans, around, strict=True)
                ]
            )
        else:
            found = self._errors(text, words, spans, method)
        drawn: np.ndarray = found.clamp(min=0).numpy()
        return drawn

    def signed(self, text_a: str, text_b: str) -> Float[np.ndarray, "size size"]:
        """The squared error of the noise under the second caption less that under the first."""
        a, b = (self._run(text).square().mean((0, 1)) for text in (text_a, text_b))
        drawn: np.ndarray = enlarged(b - a, self._scorer.size).numpy()
        return drawn

    def _run(self, text: str) -> Float[Tensor, "rows c h w"]:
        """What is wrong of the noise: rows are timesteps, and the draws of each.

        Prompts that were learned for a score that looks at attention alone were never asked to predict noise, and do it
        worse; the model does it without them.
        """
        score = self._scorer.score
        aside = nullcontext() if score.sees_noise else disabled(self._scorer.backbone.denoiser)
        with aside:
            return self._scorer.errors(self._latent, text, self._rows, self._noise).cpu()

    def _errors(
        self, text: str, words: Sequence[str], spans: Sequence[Span], method: str
    ) -> Float[Tensor, "spans size size"]:
        if not spans:  # a class-conditional model is told no words
            return torch.zeros(0, self._scorer.size, self._scorer.size)
        whole = self._run(text)
        found = []
        for span in spans:
            without = self._run(leave_out(text, words, span))
            moved = without - whole
            values = {
                "effect": moved.square(),
                "evidence": without.square() - whole.square(),
                "agreement": without * moved,
            }[method].mean(1)
            # rows => timesteps; the last of them, where noise is predicted best, would count for little
            per_step, unit = (
                v.unflatten(0, (-1, self._config.draws)).mean(1) for v in (values, moved.square().mean(1))
            )
            unit = unit.mean((1, 2), keepdim=True)
            grid = torch.where(unit > 0, per_step / unit.clamp(min=1e-20), 0.0).mean(0)
            found.append(enlarged(grid, self._scorer.size))
        return torch.stack(found)

    @torch.no_grad()
    def _attention(self, text: str, spans: Sequence[Span], raw: bool) -> Float[Tensor, "spans size size"]:
        scorer, backbone = self._scorer, self._scorer.backbone
        (states,) = scorer.texts([text])
        states = prompted(backbone.denoiser, states)
        (own,) = states.own.cpu()
        layers = select_layers(backbone.denoiser, self._config.layers)
        height, width = self._latent.shape[-2:]
        tokens = [[t for word in states.words[0].tokens[a:b] for t in word] for a, b in spans]
        total = torch.zeros(len(spans), scorer.size, scorer.size)
        steps = self._rows.to(backbone.device)

        def look(at: slice) -> None:
            e, t = self._noise[at], steps[at]
            noised = backbone.add_noise(self._latent[None].expand_as(e), e, t)
            text = states.select([0] * len(t))
            direction, heads = scorer.score.config.direction, self._config.heads
            probe = Probe(backbone.denoiser, layers, text.own, text.mask, direction=direction, maps=True, heads=heads)
            with probe:
                backbone.predict_noise(noised, t, text)
            part = torch.zeros_like(total)
            for record in probe.records.values():
                assert record.maps is not None
                maps = record.maps.float().cpu()  # (rows, positions, tokens)
                share = torch.stack([maps[..., of].sum(-1) for of in tokens])
                if not raw:
                    share = share / maps[..., own].sum(-1).clamp(min=1e-12)
                    share = share - share.mean(-1, keepdim=True)
                # positions of a layer => its height and width, in the latent's proportions
                share = share.sum(1)
                ratio = math.sqrt(height * width / share.shape[1])
                part += enlarged(share.unflatten(1, (round(height / ratio), -1)), scorer.size)
            total.add_(part)  # at once, for a part that runs out of memory is tried again

        scorer.in_parts(len(steps), look)
        return total / (len(steps) * len(layers))


def _within(word: Float[Tensor, "h w"], phrase: Float[Tensor, "h w"]) -> Float[Tensor, "h w"]:
    """The mean of a word's map and its phrase's, each in shares of its peak, in the word's unit."""
    if not word.max() > 0 or not phrase.max() > 0:
        return word
    return (word + phrase * (word.max() / phrase.max())) / 2


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
    return replaced(text, words, dict.fromkeys(spans, ""))


def replaced(text: str, words: Sequence[str], by: Mapping[Span, str]) -> str:
    """A caption with some runs of its words replaced by others, what is elsewhere as it was but for runs of spaces.

    A run of no words, ``(i, i)``, is a place before word ``i`` to put something in.
    """
    places = _places(text, words)
    if places is None:  # as the tokenizer writes it
        text = " ".join(words)
        places = [(len(" ".join(words[:i])) + bool(i), len(" ".join(words[: i + 1]))) for i in range(len(words))]
    found = ""
    at = 0
    for (start, stop), new in sorted(by.items()):
        first = places[start][0] if start < len(places) else len(text)
        last = places[stop - 1][1] if stop > start else first
        found += f"{text[at:first]} {new} " if new else text[at:first]
        at = last
    return " ".join((found + text[at:]).split())


def _written(text: str, words: Sequence[str], span: Span) -> str:
    """A run of words as the caption writes it."""
    places = _places(text, words)
    if places is None:
        return " ".join(words[slice(*span)])
    start, stop = span
    return text[places[start][0] : places[stop - 1][1]] if stop > start else ""


def _places(text: str, words: Sequence[str]) -> list[Span] | None:
    """Where in the caption each word begins and ends; None if one cannot be found there."""
    lower = text.lower()
    found: list[Span] = []
    at = 0
    for word in words:
        place = lower.find(word.lower().strip(), at) if len(lower) == len(text) else -1
        if place < 0 or not word.strip():
            return None
        found.append((place, place + len(word.strip())))
        at = place + len(word.strip())
    return found


def _left_out(scorer: Scorer, picture: Image, text: str, words: Sequence[str], score: float) -> np.ndarray:
    """What the score loses without each word."""
    rest = [leave_out(text, words, (i, i + 1)) for i in range(len(words))]
    values = _scores(scorer, picture, rest)
    return np.array([score - values[r] for r in rest], np.float32)


def _scores(scorer: Scorer, picture: Image, texts: Sequence[str]) -> dict[str, float]:
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
    texts = {}
    for chosen in subsets:
        by = {places[i][1]: _written(a.text, a.words, places[i][0]) for i in chosen}
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
