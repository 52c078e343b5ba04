"""Few-shot learning: from labelled examples to an adapter.

:func:`fit` learns, by one of several methods, so that matching pairs outscore the others:

- ``prompt``: low-rank attention prompts (:mod:`dsd.prompts`), by gradient, with the same noise and timestep for all
  candidates of an example.
- ``tokens``: soft tokens that join every caption, by gradient.
- ``words``: what words mean that the model has never seen, as offsets to the states of their tokens, by gradient.
- ``heads``: weights of the score's attention heads at each timestep, by gradient, from their importance on.
- ``weights``: weights of all heads and of the denoising score (:mod:`dsd.weights`), on a frozen model, in a few passes
  over the examples.
- Sums of these, such as ``prompt+heads``: what is learned by gradient is learned at once, and ``weights`` then on the
  model as it was taught, and on the bare one; held-out examples say which are kept.

No examples to stop by need be given: all are held out by turns, which says at which step to stop, how probable a score
makes a match, and whether learning is clearly better than the score it starts from, and no worse than that in as many
passes as what was learned takes; the score is kept as it was if not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dsd import prompts
from dsd.adapters import Adapter
from dsd.backbone import words_of
from dsd.contracts import Example, OptionError
from dsd.gradient import Gradient
from dsd.learn import FitConfig, Team, checkpointed
from dsd.lesson import Turn, check_choices, check_validation, folds
from dsd.prompts import PromptConfig
from dsd.scorer import Scorer
from dsd.scores import WEIGHTED
from dsd.weighing import Part, follow, weigh

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["FitConfig", "fit"]

SOFT_TOKENS = 8
"""How many soft tokens are learned where the configuration of the prompts does not say."""


def fit(
    scorer: Scorer,
    examples: Sequence[Example],
    validation: Sequence[Example] | None = None,
    *,
    config: FitConfig | None = None,
    prompt: PromptConfig | None = None,
    start: Adapter | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    log: str | os.PathLike[str] | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = False,
) -> Adapter:
    """Learns for the scorer, which has the learned score and prompts in the end.

    Args:
        scorer: Decides score, timesteps, size and batch size; its backbone must be bare. ``weights`` starts from the
            denoising score, whatever the scorer's is.
        examples: Labelled examples, in which right and wrong candidates compete.
        validation: Examples to stop by; None holds out some of ``examples``, by turns or once, as ``config`` says.
            ``weights`` by itself holds out ``examples`` by turns in any case, and keeps the zero-shot score if that
            does better on those given; after prompts or tokens, weights are learned from examples that were held out.
        config: How to learn.
        prompt: Where prompts go; their soft tokens count if the method has ``tokens``, and with ``words`` it says
            which. With ``start`` it is that which says where, and words alone can join.
        start: Prompts to learn on from, by a method with ``prompt``. What is learned then has to be better than these
            prompts as they are, and they are kept if it is not. The score is the scorer's; attention that is taught
            beside ``denoising`` is that which the prompts were learned for, at its timesteps.
        checkpoint: A file to keep the state of training in; delete it when the adapter is saved. ``weights`` starts
            anew.
        resume: Go on from ``checkpoint`` if it is there; the result is the same as without the stop. What one method
            learned by gradient, the same and ``weights`` goes on from.
        log: Where to write loss and learning rate step by step: a ``.jsonl`` file, or a folder for TensorBoard.
        accelerator: Brings several processes, which share each batch, and mixed precision (bf16). Every process must
            call this with the same arguments; every one gets the adapter.
        progress: Whether to show progress bars, on stderr.

    Raises:
        OptionError: If there is nothing to learn from, if no caption has a word that is to be learned, if validation
            examples show pictures that are learned from, if ``start`` has nothing to start from or was learned at
            another size of pictures, or if the checkpoint is of another request.
        AdapterError: If ``start`` was made for another base model.
        ModelError: If the loss stops being finite.
    """
    config = (config or FitConfig()).resolved(len(examples))
    zero, denoiser = scorer.score.config, scorer.backbone.denoiser
    check_choices([*examples, *(validation or ())])
    check_validation(examples, validation or ())
    if zero.kind == WEIGHTED:
        raise OptionError("got a score whose weights are learned, expected a zero-shot one to start from")
    prompts.check_bare(denoiser)
    turns, prompt = planned(examples, validation, config, prompt, start, scorer.size)
    if start is not None:
        start.attach(scorer.backbone)  # refuses now what does not fit
        prompts.detach(denoiser)
    try:
        if config.method == "weights":
            return weigh(scorer, [Part(list(examples))], validation or None, config, None, progress).adapter
        keeper = None if checkpoint is None else Path(checkpoint)
        team = Team(accelerator)
        with checkpointed(denoiser, config.gradient_checkpointing):
            adapter, parts = Gradient(scorer, config, prompt, start, team, keeper, log).fit(
                turns, list(examples), resume, progress
            )
        if "weights" in config.pieces:
            prompts.detach(denoiser)
            scorer.use(zero)
            bare = None
            if start is None:
                bare = weigh(scorer, [Part(list(examples))], validation or None, config, None, progress)
                if adapter.prompts is None:
                    return bare.adapter
            adapter = follow(scorer, adapter, parts, bare, config, progress)
        return adapter
    except BaseException:
        prompts.detach(denoiser)
        scorer.use(zero)
        raise


def planned(
    examples: Sequence[Example],
    validation: Sequence[Example] | None,
    config: FitConfig,
    prompt: PromptConfig | None,
    start: Adapter | None,
    size: int,
) -> tuple[list[Turn], PromptConfig | None]:
    """What is held out when, where anything is by gradient, and what is attached to the model, if anything; see
    :func:`fit`.

    Args:
        size: Pixels a side of what is learned from.

    Raises:
        OptionError: If the lesson could not be taught to its end.
    """
    named = () if prompt is None else prompt.words
    if start is not None:
        prompt = _placing(start, config, prompt, size)
    turns = [] if config.method == "weights" else config.turns(examples, validation)
    if "weights" in config.pieces:
        if start is None:  # the bare model is weighed, too
            folds(examples, config.folds, config.seed)
        if len(turns) == 1 and len(turns[0].held_out) > 1:
            folds(turns[0].held_out, config.folds, config.seed)
    learned_from = examples if len(turns) != 1 else turns[0].examples
    _check_words(named, () if prompt is None else prompt.words, learned_from, config)
    return turns, prompt if start is not None else _resolve(prompt or PromptConfig(), config)


def _check_words(named: Sequence[str], words: Sequence[str], examples: Sequence[Example], config: FitConfig) -> None:
    """Refuses words that are not learned, or cannot be.

    Args:
        named: Those that were asked for.
        words: All that could be learned: those, and what an adapter that is learned on from has.

    Raises:
        OptionError: If the method does not go with them, or no caption of the examples has one that was asked for.
    """
    learns = "words" in config.pieces
    if learns != bool(words if learns else named):
        raise OptionError(
            f"got method {config.method!r} and {', '.join(named) or 'no words'} to learn, expected words with a method "
            "that has 'words' in it, and with no other"
        )
    said = {word for e in examples for text in e.texts for word in words_of(text)}
    unsaid = [word for word in named if word not in said]
    if learns and said.isdisjoint(words):
        unsaid = list(words)
    if unsaid:
        raise OptionError(
            f"got {', '.join(unsaid)} to learn, which no caption has, expected words as captions spell them; check the "
            "spelling, and leave out what the examples say nothing of"
        )


def _placing(start: Adapter, config: FitConfig, prompt: PromptConfig | None, size: int) -> PromptConfig:
    """Where the prompts of an adapter go that are to be learned on.

    Raises:
        OptionError: If that cannot be.
    """
    if start.prompts is None:
        raise OptionError(
            "got an adapter without prompts to start from (zero-shot was kept, or only weights were learned), expected "
            "one with prompts"
        )
    if "prompt" not in config.pieces:
        raise OptionError(
            f"got method {config.method!r} and an adapter to start from, expected a method with 'prompt', which learns "
            "on from its prompts"
        )
    if "tokens" in config.pieces and not start.prompts.tokens:
        raise OptionError(
            f"got method {config.method!r} and an adapter without soft tokens to start from, expected one with some, "
            "or a method without 'tokens'"
        )
    if start.size not in (None, size):
        raise OptionError(
            f"got an adapter to start from that was learned at {start.size} pixels and a model at {size}, expected the "
            f"same; load the model with size {start.size}"
        )
    words = () if prompt is None else prompt.words
    joining = PromptConfig(words=words) if words else None
    if prompt not in (None, start.prompts, joining):
        raise OptionError("got a configuration of prompts and an adapter to start from, expected one of them")
    return replace(start.prompts, words=tuple(dict.fromkeys((*start.prompts.words, *words))))


def _resolve(prompt: PromptConfig, config: FitConfig) -> PromptConfig | None:
    """What a method attaches to the model; None if nothing."""
    if not config.pieces & {"prompt", "tokens", "words"}:
        return None
    return replace(
        prompt,
        projections=prompt.projections if "prompt" in config.pieces else (),
        tokens=(prompt.tokens or SOFT_TOKENS) if "tokens" in config.pieces else 0,
    )
