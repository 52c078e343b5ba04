"""Captions alone => Examples in which hard wrong captions compete: what is learned from, or measured on, unlabelled."""

from __future__ import annotations

import random
from collections.abc import Sequence

from dsd.contracts import Example, OptionError
from dsd.negatives import HardNegatives


def with_hard_negatives(examples: Sequence[Example], count: int = 3, seed: int = 0) -> tuple[list[Example], list[str]]:
    """One image and its caption among wrong ones that differ in a word or two, for each right pair.

    A third of the wrong captions at least are swaps where the caption has any (:class:`dsd.negatives.HardNegatives`),
    the rest replacements. Which words take each other's place is learned from all texts of the examples, and a wrong
    caption is never another right one of the same image.

    Args:
        examples: Their wrong candidates are left out.
        count: Wrong captions for each right pair at most.
        seed: Decides which, and where among them the right one stands.

    Returns:
        The examples, named by the one they are of and its pair, with its tags; and the names of those left out because
        no word of the caption can be swapped or replaced.

    Raises:
        OptionError: ``count`` is less than one.
    """
    if count < 1:
        raise OptionError(f"got count {count}, expected at least 1")
    made = HardNegatives(text for e in examples for text in e.texts)
    found: list[Example] = []
    left_out: list[str] = []
    for e in examples:
        for image, text in e.positives:
            name = e.id if len(e.positives) == 1 else f"{e.id}-{image}-{text}"
            rng = random.Random(f"{seed} {name}")
            right = {e.texts[j] for i, j in e.positives if i == image}
            wrong = made.swapped(e.texts[text], -(-count // 3), rng, right)
            wrong += made.replaced(e.texts[text], count - len(wrong), rng, {*right, *wrong})
            if not wrong:
                left_out.append(name)
                continue
            texts = rng.sample([e.texts[text], *wrong], 1 + len(wrong))
            found.append(Example(name, (e.images[image],), tuple(texts), ((0, texts.index(e.texts[text])),), e.tags))
    return found, left_out
