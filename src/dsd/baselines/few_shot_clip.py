"""CLIP taught from a few examples: a linear probe, learned context words (CoOp), and low-rank weights (LoRA).

All learn as :mod:`dsd.adapt` does, so that methods differ in what is learned alone: the softmax loss over the
candidates of each choice, wrong captions and pictures of other examples among them, examples held out to say when to
stop, and what was learned is kept only where it is better than zero-shot beyond doubt.
"""

from __future__ import annotations

import json
import math
import os
import random
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from dsd.baselines.towers import Clip, Tokens
from dsd.contracts import AdapterError, Example, ModelError, OptionError, Pair
from dsd.evaluate import dataset_checksum, write_bytes, write_text
from dsd.images import load_image
from dsd.jury import Judged, Jury, verdict
from dsd.learn import FitConfig, choice_loss
from dsd.lesson import Drawn, Negatives, check_validation, choices_of, folds
from dsd.metrics import bootstrap_interval
from dsd.weights import Choice, fit_weights

_FORMAT = 1


class FewShotClip(Clip):
    """CLIP that can be taught; zero-shot until it is.

    Args:
        model: ``clip-tiny``, a folder, or a name on the hub.
        fit_config: How to learn; default :attr:`defaults`. ``method``, ``mix``, ``draws``, ``jitter`` and what is
            about memory say nothing here.
        options: As for :class:`dsd.baselines.towers.Clip`.
    """

    # whole batches go through the towers at once: further candidates cost next to nothing
    defaults: ClassVar[FitConfig] = FitConfig(
        steps=400, check_every=50, negatives=1, image_negatives=1, candidates=None
    )

    heeds: ClassVar[tuple[str, ...]] = ()
    """Fields of the configuration that matter, besides the seed."""

    def __init__(self, model: str = "clip-tiny", *, fit_config: FitConfig | None = None, **options: Any) -> None:
        super().__init__(model, **options)
        self.fit_config = fit_config or self.defaults
        self.learned: dict[str, Tensor] = {}
        """What was learned, by name; empty before, and where zero-shot was kept."""
        self.training: Mapping[str, Any] = {}
        """What it was learned from, and how that went: plain values."""

    @property
    def config(self) -> Mapping[str, Any]:
        return {**super().config, **self._settings(), "training": dict(self.training)}

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """Options of the method, plain values; with the model's name they make it again."""

    @abstractmethod
    def _learn(
        self, examples: list[Example], validation: list[Example] | None, config: FitConfig, progress: bool
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What was learned, and the record of it; the towers are left bare."""

    @abstractmethod
    def _use(self, learned: Mapping[str, Tensor]) -> None:
        """Scores with what was learned from now on; with nothing learned, zero-shot."""

    def fit(
        self,
        examples: Sequence[Example],
        validation: Sequence[Example] | None = None,
        *,
        seed: int | None = None,
        progress: bool = False,
    ) -> Self:
        """Teaches it from labelled examples; an earlier lesson is forgotten.

        Args:
            examples: In which right and wrong candidates compete.
            validation: Examples to stop by; None holds out some of ``examples``, as the configuration says.
            seed: Instead of the configuration's; decides order, initial values and what is held out.
            progress: Whether to show a bar on stderr.

        Raises:
            OptionError: If there is nothing to learn from.
            ImageError, TextError: If an image or caption cannot be scored.
        """
        config = self.fit_config if seed is None else replace(self.fit_config, seed=seed)
        config = config.resolved(len(examples))
        idle = [e.id for e in (*examples, *(validation or ())) if not choices_of(e)]
        if idle or not examples:
            raise OptionError(
                f"got {len(examples)} examples, {len(idle)} of them without a choice ({', '.join(idle)[:200]}), "
                "expected right and wrong candidates in each; add wrong ones, or let dsd negatives make them"
            )
        self.tokens.check([text for e in (*examples, *(validation or ())) for text in e.texts])
        check_validation(examples, validation or ())
        self.learned, self.training = {}, {}
        self._use({})
        held = None if validation is None else list(validation)
        self.learned, record = self._learn(list(examples), held, config, progress)
        self.training = {
            "config": asdict(config),
            "examples": len(examples),
            "validation_examples": len(examples if held is None else held),
            "data": dataset_checksum(examples),
            "kept": bool(self.learned),
            **record,
        }
        self._use(self.learned)
        return self

    # Keeping

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes what was learned: ``baseline.json`` and ``learned.safetensors``; the model is named, not copied."""
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        write_bytes(out / "learned.safetensors", save({k: v.contiguous() for k, v in self.learned.items()}))
        record = {
            "format": _FORMAT,
            "baseline": self.name,
            "model": self.model_name,
            "settings": self._settings(),
            "training": dict(self.training),
        }
        write_text(out / "baseline.json", json.dumps(record, indent=1) + "\n")
        return out

    @classmethod
    def load(cls, folder: str | os.PathLike[str], **options: Any) -> Self:
        """Loads what :meth:`save` wrote.

        Raises:
            AdapterError: If the folder cannot be read, or holds another method.
            ModelError: If the model that it was learned for cannot be loaded.
        """
        where = Path(folder)
        record = read_record(where)
        try:
            learned = load_file(where / "learned.safetensors")
        except Exception as error:  # OSError, or whatever safetensors has for a broken file
            raise AdapterError(
                f"{where}: got no readable learned.safetensors ({error}), expected a folder that save wrote; fit and "
                "save again"
            ) from error
        if record["baseline"] != cls.name:
            raise AdapterError(f"{where}: got baseline {record['baseline']!r}, expected {cls.name!r}; load it as that")
        try:
            made = cls(**{"model": record["model"], **record["settings"], **options})
        except TypeError as error:
            raise AdapterError(f"{where}: got settings of another method ({error}); fit and save again") from error
        made.training = record["training"]
        made.learned = learned
        try:
            made._use(learned)
        except (KeyError, RuntimeError, ValueError) as error:
            raise AdapterError(
                f"{where}: what was learned does not fit {made.model_name} ({error}); fit again"
            ) from error
        return made


def read_record(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What is kept of a taught baseline beside its weights.

    Raises:
        AdapterError: If the folder holds none, or of another format.
    """
    path = Path(folder) / "baseline.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        whole = record["format"] == _FORMAT and all(
            isinstance(record[k], kind)
            for k, kind in {"baseline": str, "model": str, "settings": dict, "training": dict}.items()
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{path}: got no readable file ({error}), expected one that save wrote; save again"
        ) from error
    if not whole:
        raise AdapterError(f"{path}: got format {record['format']}, expected {_FORMAT}; fit and save again")
    return record


def accuracies(before: np.ndarray, after: np.ndarray, seed: int) -> dict[str, float]:
    """Held-out accuracies before and after learning, with an interval of the latter."""
    value, low, high = bootstrap_interval(after, seed)
    return {"before": float(before.mean()), "after": value, "low": low, "high": high}


# Linear probe


class LinearProbe(FewShotClip):
    """Regularised weights on joint features of picture and caption, the towers frozen.

    Radford et al. 2021 classify pictures with a logistic regression on their embeddings. Captions have no classes, so
    the regression is over candidates: a pair's features are the products and the absolute differences of the two
    embeddings, coordinate by coordinate, besides the zero-shot score, from which weights start
    (:func:`dsd.weights.fit_weights`). The strength of the penalty is chosen on examples held out by turns.
    """

    name = "clip-linear-probe"
    heeds = ("negatives", "image_negatives", "swaps", "folds")

    def _settings(self) -> dict[str, Any]:
        return {}

    def features(self, pairs: Sequence[Pair]) -> np.ndarray:
        """(n, 2 d + 1) float64: products, absolute differences, and the zero-shot score."""
        image, text = (x.double() for x in self.embeddings(pairs))
        product = image * text
        score = self.scale * product.sum(1, keepdim=True)
        found: np.ndarray = torch.cat([product, (image - text).abs(), score], 1).numpy()
        return found

    def _learn(
        self, examples: list[Example], validation: list[Example] | None, config: FitConfig, progress: bool
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        negatives = Negatives(examples, config.negatives, config.image_negatives, config.swaps)
        rng = random.Random(config.seed)
        learn_from: list[list[Choice]] = []
        judge_by: list[list[Choice]] = []
        own: list[int] = []
        pairs: list[Pair] = []
        for i, example in enumerate(examples):
            drawn = negatives.join(i, rng)
            at = len(pairs)
            pairs += [(examples[j].images[k], text) for (j, k), text in zip(drawn.images, drawn.texts, strict=True)]
            learn_from.append([replace(c, rows=tuple(at + r for r in c.rows)) for c in drawn.choices])
            judge_by.append(learn_from[-1][: len(choices_of(example))])
            own += range(at, at + len(example.pairs))
        features = self.features(pairs)
        prior = np.zeros((1, features.shape[1]))
        prior[0, -1] = 1
        groups = folds(examples, config.folds, config.seed)
        fitted = fit_weights(features, features, learn_from, judge_by, prior, groups)
        kept = math.isfinite(fitted.strength)
        jury = Jury(examples)
        before, after = jury.accuracy(features[own][:, -1]), jury.accuracy(fitted.scores[own])
        if validation is not None:
            others = Jury(validation)
            seen = self.features(others.pairs)
            first, second = others.judge(seen[:, -1]), others.judge(seen @ fitted.weights)
            kept = kept and bool(second.loss.mean() < first.loss.mean())
            before, after = first.accuracy, second.accuracy
        record = {
            "strength": fitted.strength if math.isfinite(fitted.strength) else None,
            "validation": accuracies(before, after if kept else before, config.seed),
        }
        return {"weights": torch.from_numpy(fitted.weights).float()} if kept else {}, record

    def _use(self, learned: Mapping[str, Tensor]) -> None:
        weights = learned.get("weights")
        width = 2 * int(self.model.config.projection_dim) + 1
        if weights is not None and weights.shape != (width,):
            raise ValueError(f"got weights of shape {tuple(weights.shape)}, expected ({width},)")

    def _scores(self, pairs: Sequence[Pair], progress: bool) -> np.ndarray:
        if not self.learned:
            return super()._scores(pairs, progress)
        found: np.ndarray = self.features(pairs) @ self.learned["weights"].double().numpy()
        return found


# By gradient


@dataclass
class _Trail:
    """What a run saw when it looked at the examples held out: steps taken, scores of all pairs, what was learned."""

    steps: list[int] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)
    learned: list[dict[str, Tensor]] = field(default_factory=list)


class _Gradient(FewShotClip):
    """Learns by gradient what subclasses attach to the towers."""

    heeds = (
        *("objective", "margin", "temperature", "steps", "batch", "learning_rate", "weight_decay", "folds"),
        *("validation", "check_every", "patience", "negatives", "image_negatives", "swaps", "candidates"),
    )

    @abstractmethod
    def _attach(self, seed: int) -> list[nn.Parameter]:
        """Attaches fresh parameters to the bare towers, and returns them."""

    @abstractmethod
    def _state(self) -> dict[str, Tensor]:
        """A copy of what is attached."""

    @abstractmethod
    def _embed(self, seen: list[Tensor], texts: list[str]) -> tuple[Tensor, Tensor]:
        """Unit vectors of pictures, as :meth:`_see` has them, and captions, with gradient to what is attached."""

    def _see(self, pictures: Sequence[Any]) -> Tensor:
        """RGB pictures as the steps need them: (n, ...); their pixels, unless the picture's tower does not learn."""
        return self.pixels(pictures)

    def _learn(
        self, examples: list[Example], validation: list[Example] | None, config: FitConfig, progress: bool
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        turns = config.turns(examples, validation)
        runs = len(turns) + (len(turns) > 1)
        held_out = [e for turn in turns for e in turn.held_out]
        jury = Jury(held_out)
        learned: dict[str, Tensor] = {}
        steps, _ = config.schedule
        with tqdm(desc="learning", unit="step", total=runs * steps, disable=not progress) as bar:
            trails = [self._run(turn.examples, turn.held_out, steps, config, bar.update) for turn in turns]
            looks = min(len(trail.steps) for trail in trails)
            scores = [np.concatenate([trail.scores[i] for trail in trails]) for i in range(looks)]
            found = verdict(jury, scores)
            best = found.best
            if best and len(turns) == 1:
                learned = trails[0].learned[best]
            elif best:  # all examples teach, for as long as was best for those held out
                learned = self._run(examples, [], trails[0].steps[best], config, bar.update).learned[-1]
        record = {
            "turns": len(turns),
            "steps": trails[0].steps[best],
            "validation": accuracies(found.before.accuracy, found.after.accuracy, config.seed),
            "curve": [_point(trails[0].steps[i], judged) for i, judged in enumerate(found.curve)],
        }
        return learned, record

    def _run(
        self,
        examples: list[Example],
        held_out: list[Example],
        steps: int,
        config: FitConfig,
        tick: Callable[[int], Any],
    ) -> _Trail:
        """Learns from bare towers on, and leaves them bare."""
        trail = _Trail()
        jury = Jury(held_out)
        ranks: list[tuple[float, float]] = []

        def look(step: int, learned: dict[str, Tensor]) -> None:
            trail.steps.append(step)
            trail.learned.append(learned)
            if held_out:
                trail.scores.append(self.predict(jury.pairs))
                ranks.append(jury.judge(trail.scores[-1]).rank)

        look(0, {})
        planned, every = config.schedule
        with torch.no_grad():
            seen = [list(self._see([load_image(i) for i in e.images])) for e in examples]
        parameters = self._attach(config.seed)
        try:
            negatives = Negatives(examples, config.negatives, config.image_negatives, config.swaps, config.candidates)
            optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
            order: list[int] = []
            for step in range(1, steps + 1):
                rng = random.Random(f"{config.seed}/{step}")
                while len(order) < config.batch:
                    fresh = list(range(len(examples)))
                    rng.shuffle(fresh)
                    order += fresh
                batch, order = order[: config.batch], order[config.batch :]
                drawn = [negatives.join(i, rng) for i in batch]
                with torch.random.fork_rng():  # of dropout
                    torch.manual_seed(rng.getrandbits(48))
                    loss = self._loss(drawn, seen, config)
                if not math.isfinite(loss.item()):
                    raise ModelError(f"got a loss of {loss.item()} at step {step}; lower the learning rate")
                # cosine to zero after a short rise
                fall = min(1.0, step / 10) * 0.5 * (1 + math.cos(math.pi * (step - 1) / planned))
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * fall
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                tick(1)
                if step % every == 0 or step == steps:
                    self.forget()
                    look(step, self._state())
                if ranks and len(ranks) - 1 - ranks.index(max(ranks)) >= config.patience:
                    break
        finally:
            self._use({})
        return trail

    def _loss(self, batch: Sequence[Drawn], seen: list[list[Tensor]], config: FitConfig) -> Tensor:
        """The mean loss of examples, of whose pictures and captions each distinct one goes through the towers once."""
        images = list(dict.fromkeys(place for drawn in batch for place in drawn.images))
        texts = list(dict.fromkeys(text for drawn in batch for text in drawn.texts))
        image, text = self._embed([seen[i][k] for i, k in images], texts)
        at, of = {place: n for n, place in enumerate(images)}, {t: n for n, t in enumerate(texts)}
        table = self.scale * image @ text.T
        losses = []
        for drawn in batch:
            rows = table[[at[place] for place in drawn.images], [of[t] for t in drawn.texts]]
            losses.append(choice_loss(rows, drawn.choices, config.objective, config.margin, config.temperature))
        return torch.stack(losses).mean()


def _point(step: int, judged: Judged) -> dict[str, float]:
    accuracy, loss = judged.rank
    return {"step": step, "accuracy": accuracy, "loss": -loss}


class CoOp(_Gradient):
    """Context words learned as vectors, the same before every caption; everything else is frozen.

    Zhou et al. 2022 (arXiv 2109.01134), where what follows the context is a class name.

    Args:
        model: See :class:`FewShotClip`.
        tokens: How many context vectors.
        fit_config, options: See :class:`FewShotClip`.
    """

    name = "clip-coop"
    defaults = replace(FewShotClip.defaults, learning_rate=5e-3, weight_decay=0.01, patience=4, validation=0.25)

    def __init__(self, model: str = "clip-tiny", *, tokens: int = 4, **options: Any) -> None:
        if tokens < 1:
            raise OptionError(f"got {tokens} context tokens, expected 1 or more")
        super().__init__(model, **options)
        self.count = tokens
        window = self.tokens.window - tokens
        if window < 3:
            raise OptionError(f"got {tokens} context tokens, expected at most {self.tokens.window - 3} in this model")
        self.tokens = Tokens(self.tokens.tokenizer, window, self.tokens.truncate)
        self._context: nn.Parameter | None = None

    def _settings(self) -> dict[str, Any]:
        return {"tokens": self.count}

    def _attach(self, seed: int) -> list[nn.Parameter]:
        weight = self.model.text_model.embeddings.token_embedding.weight
        draw = torch.randn((self.count, weight.shape[1]), generator=torch.Generator().manual_seed(seed))
        self._context = nn.Parameter((draw * weight.std().cpu()).to(weight.device))
        self.forget()
        return [self._context]

    def _state(self) -> dict[str, Tensor]:
        assert self._context is not None
        return {"context": self._context.detach().cpu().clone()}

    def _use(self, learned: Mapping[str, Tensor]) -> None:
        self._context = None
        if learned:
            width = self.model.config.text_config.hidden_size
            if learned["context"].shape != (self.count, width):
                raise ValueError(
                    f"got context of shape {tuple(learned['context'].shape)}, expected {self.count, width}"
                )
            self._context = nn.Parameter(learned["context"].to(self.model.device), requires_grad=False)
        self.forget()

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        if self._context is None:
            return super().embed_texts(texts)
        made = {k: v.to(self.model.device) for k, v in self.tokens(texts).items()}
        ids, mask = made["input_ids"], made.get("attention_mask")
        # the start token again, as a place for the context, after the start
        ids = torch.cat([ids[:, :1].expand(-1, self.count + 1), ids[:, 1:]], 1)
        if mask is not None:
            mask = torch.cat([mask[:, :1].expand(-1, self.count + 1), mask[:, 1:]], 1)
        with self._placed():
            features = self.model.get_text_features(input_ids=ids, attention_mask=mask)
        found = features if isinstance(features, Tensor) else features.pooler_output
        return nn.functional.normalize(found.float(), dim=-1)

    @contextmanager
    def _placed(self) -> Iterator[None]:
        """The towers with the context in the places kept for it."""
        context = self._context
        assert context is not None

        def put(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            middle = context.expand(len(output), -1, -1)
            return torch.cat([output[:, :1], middle, output[:, 1 + len(context) :]], 1)

        hook = self.model.text_model.embeddings.token_embedding.register_forward_hook(put)
        try:
            yield
        finally:
            hook.remove()

    def _see(self, pictures: Sequence[Any]) -> Tensor:
        return self.embed_images(pictures)

    def _embed(self, seen: list[Tensor], texts: list[str]) -> tuple[Tensor, Tensor]:
        return torch.stack(seen), self.embed_texts(texts)


class Lora(_Gradient):
    """Low-rank changes of the attention projections of both towers.

    Hu et al. 2022 (arXiv 2106.09685) by ``peft``; on CLIP, few-shot, Zanella and Ben Ayed 2024 (arXiv 2405.18541).

    Args:
        model: See :class:`FewShotClip`.
        rank: Of the change of each projection.
        alpha: What it is multiplied by, over the rank.
        dropout: Of its input while it learns.
        fit_config, options: See :class:`FewShotClip`.
    """

    name = "clip-lora"
    defaults = replace(
        FewShotClip.defaults,
        learning_rate=2e-3,
        weight_decay=0.01,
        steps=100,
        check_every=20,
        patience=3,
        validation=0.25,
    )
    PROJECTIONS = ("q_proj", "k_proj", "v_proj")

    def __init__(
        self, model: str = "clip-tiny", *, rank: int = 4, alpha: float = 4, dropout: float = 0.1, **options: Any
    ) -> None:
        if rank < 1 or not alpha > 0 or not 0 <= dropout < 1:
            raise OptionError(
                f"got rank {rank}, alpha {alpha} and dropout {dropout}, expected at least 1, more than 0 and 0 to 1"
            )
        super().__init__(model, **options)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self._tuner: Any = None

    def _settings(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout}

    def _attach(self, seed: int) -> list[nn.Parameter]:
        from peft import LoraConfig, LoraModel

        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=list(self.PROJECTIONS)
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._tuner = LoraModel(self.model, config, "default")
        self.model.eval()
        self.forget()
        return list(self._changes().values())

    def _changes(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if "lora_" in name}

    def _state(self) -> dict[str, Tensor]:
        return {name: p.detach().cpu().clone() for name, p in self._changes().items()}

    def _use(self, learned: Mapping[str, Tensor]) -> None:
        if self._tuner is not None:
            self._tuner.unload()  # puts the model's own projections back in place
            self._tuner = None
        if learned:
            self._attach(0)
            found = self._changes()
            if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in learned.items()}:
                raise ValueError("its projections are others")
            with torch.no_grad():
                for name, parameter in found.items():
                    parameter.copy_(learned[name])
        self.model.requires_grad_(False)
        self.forget()

    def _embed(self, seen: list[Tensor], texts: list[str]) -> tuple[Tensor, Tensor]:
        self.model.train()  # dropout; the towers have none of their own
        try:
            return self.embed_pixels(torch.stack(seen)), self.embed_texts(texts)
        finally:
            self.model.eval()
