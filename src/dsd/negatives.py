"""Hard negatives: wrong captions that differ from a right one in a word or two.

In *swaps* two words have changed places (as in ARO, Yuksekgonul et al. 2023): "a red circle above a blue square"
becomes "a blue circle above a red square" or "a red square above a blue circle", which only a model that binds words to
each other can tell from it. In *replacements* another word stands in the place of one (as in SugarCrepe, Hsieh et al.
2023): "a green circle above a blue square". There is no grammar and no dictionary: captions show which words take each
other's place. Standard library only.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, pairwise, zip_longest

_WORD = re.compile(r"(\w+(?:['’-]\w+)*)")
_ARTICLES = ("a", "an")
_DENIALS = frozenset("no not never without none nothing nobody neither nor cannot".split())
_SYMMETRIC = frozenset(
    "and or but while with by near nearby next close beside besides alongside side adjacent opposite facing touching "
    "overlapping against together kissing hugging meeting".split()
)
"""What may be said of two sides in either order: "a cat next to a dog"."""
_FIXED = (
    frozenset(
        "a an the this that these those some any each every its his her their my your our it they he she there who "
        "which what where how is are was were be been being has have had do does did than as of in on at to for from "
        "yes".split()
    )
    | _DENIALS
    | _SYMMETRIC
)
"""Words that bind others and name nothing; they stay in place."""

_Text = tuple[Sequence[str], Sequence[str]]
"""A caption's words in small letters, and the punctuation before each of them and after the last."""


class HardNegatives:
    """Learns from captions which words take each other's place, and makes wrong captions of right ones.

    Words gather in *kinds*: two are of one kind if captions show them between the same neighbours ("a red circle", "a
    blue circle"), or between neighbours of the same kinds; those that share most places come first. Words that stand
    next to each other somewhere ("small striped") may be true of one thing, so that swapping them need not make a
    caption wrong: they are of two kinds, and so is whatever is of a kind with either.

    A swapped caption is likely, not certain, to be wrong. It is right where the picture shows it as well; where two
    words of one kind are true of one thing, and no caption says so; and around words that are symmetric without being
    known as such ("resembles"). Around those that are known (and, with, next to, ...) two words are swapped only if
    their neighbours are two of a kind too, for then what goes with what has changed, and not the order alone: "a cat
    next to a dog" has no swaps, "a red cat next to a blue dog" has. A caption that denies something has none either,
    since its swap is often denied rightly. Symmetric words and denials are known in English only.

    A replacement is less certain to be wrong: it is right where the picture shows two things that one caption names,
    and where the words mean the same ("above", "over").

    Args:
        captions: Right and wrong ones alike; the more, the more words are known.
    """

    def __init__(self, captions: Iterable[str]) -> None:
        texts = [_read(caption) for caption in captions]
        self._kinds = _kinds(texts)
        self._articles: dict[str, Counter[str]] = defaultdict(Counter)
        for words, _ in texts:
            for article, word in pairwise(words):
                if article in _ARTICLES:
                    self._articles[word][article] += 1
        self._alternatives: dict[str, list[str]] = defaultdict(list)
        for word, kind in sorted(self._kinds.items()):
            self._alternatives[kind].append(word)

    def swapped(self, caption: str, count: int, rng: random.Random, forbidden: Iterable[str] = ()) -> list[str]:
        """Wrong captions in the words of a right one; "a" and "an" count as one word, and fit what follows.

        Args:
            caption: The right one.
            count: How many at most.
            rng: Decides which.
            forbidden: Captions known to be right of the same picture. Like ``caption`` they are never returned, in
                whatever capitals and punctuation.

        Returns:
            Distinct captions in random order, at most ``count``; none if no two words can be swapped.
        """
        found = {_plain(text): text for text in self._swaps(caption)}
        for text in (caption, *forbidden):
            found.pop(_plain(text), None)
        return rng.sample(list(found.values()), min(count, len(found)))

    def replaced(self, caption: str, count: int, rng: random.Random, forbidden: Iterable[str] = ()) -> list[str]:
        """Wrong captions with another word of its kind in the place of one of a right one.

        Every word that can be replaced has its turn before one is replaced again: kinds of many words, such as colours,
        do not crowd out those of two.

        Args:
            caption, count, rng, forbidden: As for :meth:`swapped`.

        Returns:
            Distinct captions, at most ``count``; none if no word has others of its kind.
        """
        turns = [rng.sample(texts, len(texts)) for texts in self._replacements(caption)]
        rng.shuffle(turns)
        known = {_plain(text) for text in (caption, *forbidden)}
        found: list[str] = []
        for text in (text for turn in zip_longest(*turns) for text in turn if text is not None):
            if len(found) < count and _plain(text) not in known:
                known.add(_plain(text))
                found.append(text)
        return found

    def _replacements(self, caption: str) -> Iterator[list[str]]:
        """Of each word that can be replaced the captions with another in its place."""
        said, (words, _) = _words(caption), _read(caption)
        if _denies(words):
            return
        for i, word in enumerate(words):
            others = self._alternatives.get(self._kinds.get(word, ""), ())
            beside = {words[k] for k in (i - 1, i + 1) if 0 <= k < len(words)}
            alike = [other for other in others if _plural(other) == _plural(word) and other not in {word, *beside}]
            if alike:
                yield [self._with(caption, {i: _as(said[i], other)}) for other in alike]

    def _swaps(self, caption: str) -> Iterator[str]:
        said, (words, gaps) = _words(caption), _read(caption)
        if _denies(words):
            return
        for i, j in combinations(range(len(words)), 2):
            if not self._alike(words[i], words[j]) or _plural(words[i]) != _plural(words[j]):
                continue
            symmetric = any(gaps[i + 1 : j + 1]) or not _SYMMETRIC.isdisjoint(words[i + 1 : j])
            bound = any(self._alike(words[i + k], words[j + k]) for k in (-1, 1) if i + k >= 0 and j + k < len(words))
            if bound or not symmetric:
                a, b = said[i], said[j]
                # a capital at the start is the sentence's, others are a name's
                yield self._with(caption, {i: _as(a, b), j: _as(b, a)} if i == 0 else {i: b, j: a})

    def _alike(self, a: str, b: str) -> bool:
        return a != b and a in self._kinds and self._kinds[a] == self._kinds.get(b)

    def _with(self, caption: str, changes: Mapping[int, str]) -> str:
        """A caption with other words at some places, and the articles that they take."""
        parts = _WORD.split(caption)
        words = parts[1::2]
        for at, word in changes.items():
            words[at] = word
        for at in changes:
            if at and words[at - 1].lower() in _ARTICLES:
                words[at - 1] = _as(words[at - 1], self._article(words[at].lower()))
        parts[1::2] = words
        return "".join(parts)

    def _article(self, word: str) -> str:
        """Which of "a" and "an", as captions have it; by the first letter where they do not say."""
        seen = self._articles.get(word, Counter[str]())
        return max(_ARTICLES, key=lambda article: (seen[article], (article == "an") == (word[0] in "aeiou")))


def _words(caption: str) -> list[str]:
    """As they are written."""
    return _WORD.split(caption)[1::2]


def _read(caption: str) -> _Text:
    parts = _WORD.split(caption)
    return [word.lower() for word in parts[1::2]], [gap.strip() for gap in parts[::2]]


def _ends(gap: str) -> bool:
    """Whether a sentence ends there."""
    return any(mark in gap for mark in ".?!")


def _denies(words: Sequence[str]) -> bool:
    return any(word in _DENIALS or word.endswith(("n't", "n’t")) for word in words)


def _plain(caption: str) -> str:
    return " ".join("a" if word in _ARTICLES else word for word in _read(caption)[0])


def _plural(word: str) -> bool:
    return word.endswith("s") and not word.endswith("ss")


def _as(model: str, word: str) -> str:
    """A word with a capital if the model has one."""
    return word.capitalize() if model[0].isupper() else word.lower()


def _kinds(texts: Iterable[_Text]) -> dict[str, str]:
    """Of each word that may be swapped its kind, named by one of its words."""
    places: set[tuple[str, str, str]] = set()  # what stands before, the word, what stands after; "" at the ends
    apart: dict[str, set[str]] = defaultdict(set)
    for words, gaps in texts:
        known = ["a" if word in _ARTICLES else word for word in words]
        for k, word in enumerate(known):
            if word in _FIXED:
                continue
            # what another sentence begins or ends with says nothing of a word's place
            before = "" if k == 0 or _ends(gaps[k]) else gaps[k] or known[k - 1]
            after = "" if k + 1 == len(known) or _ends(gaps[k + 1]) else gaps[k + 1] or known[k + 1]
            if before or after:  # nor does a sentence of one word
                places.add((before, word, after))
            if after not in ("", word, gaps[k + 1]) and after not in _FIXED:
                apart[word].add(after)
                apart[after].add(word)
    kind = {word: word for _, word, _ in places}
    while True:
        here: dict[tuple[str, str], set[str]] = defaultdict(set)
        for before, word, after in places:
            here[kind.get(before, before), kind.get(after, after)].add(kind[word])
        shared = Counter(pair for kinds in here.values() for pair in combinations(sorted(kinds), 2))
        merged = False
        for a, b in sorted(shared, key=lambda pair: (-shared[pair], pair)):
            a, b = kind[a], kind[b]
            if a == b or b in apart[a]:
                continue
            merged = True
            kind.update((word, a) for word, own in list(kind.items()) if own == b)
            for c in apart.pop(b, set()):
                apart[c].remove(b)
                apart[c].add(a)
                apart[a].add(c)
        if not merged:
            return kind
