"""Captions => token ids in the windows that a text encoder takes, and what they are of: own tokens, words.

Two kinds of encoder are known: CLIP's (start, tokens, end, padding up to the window) and T5's (tokens, end, padding).
A caption longer than the window is cut between words into several windows, each complete by itself; the states of all
windows are joined, and so are the positions counted here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsd.backbone.base import CaptionWords
from dsd.contracts import ModelError, TextError

_WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+|_", re.IGNORECASE)
"""What CLIP's tokenizer takes for a word."""


def words_of(text: str) -> tuple[str, ...]:
    """The words of a caption, as :class:`dsd.backbone.CaptionWords` spell them."""
    return tuple(word.lower() for word in _WORD.findall(text))


@dataclass(frozen=True)
class Windows:
    """One caption as one text encoder is given it.

    Attributes:
        ids: (windows, size) token ids.
        filled: (windows, size) true up to the end token, false at padding.
        own: (windows * size) true at the caption's own tokens.
        words: Its words, as positions along the joined windows.
    """

    ids: Int[Tensor, "windows size"]
    filled: Bool[Tensor, "windows size"]
    own: Bool[Tensor, " tokens"]
    words: CaptionWords


def clip_windows(tokenizer: Any, text: str, size: int) -> Windows:
    """A caption in windows of ``size`` tokens for a CLIP text encoder.

    Raises:
        TextError: If it is no Unicode, or the tokenizer keeps nothing of it.
    """
    encoded = _encoded(tokenizer, text)
    ids = list(encoded.input_ids)
    word_ids = encoded.word_ids() if encoded.is_fast else None
    words = list(range(len(ids))) if word_ids is None else [0 if w is None else w for w in word_ids]
    _check_kept(text, ids)
    spelling = _spelling(tokenizer, text, ids, words)
    return _windows(tokenizer, ids, [(w,) for w in words], spelling, size, start=[int(tokenizer.bos_token_id)])


def t5_windows(tokenizer: Any, text: str, size: int) -> Windows:
    """A caption in windows of ``size`` tokens for a T5 encoder.

    A token that holds parts of several words, such as a comma with the word before it, belongs to each of them.

    Raises:
        TextError: If it is no Unicode, or the tokenizer keeps nothing of it.
    """
    encoded = _encoded(tokenizer, text, return_offsets_mapping=True)
    ids = list(encoded.input_ids)
    _check_kept(text, ids)
    found = list(_WORD.finditer(text))
    words = [
        tuple(i for i, word in enumerate(found) if word.start() < stop and start < word.end())
        for start, stop in encoded.offset_mapping
    ]
    return _windows(tokenizer, ids, words, tuple(word[0].lower() for word in found), size, start=[])


def joined_words(first: CaptionWords, tokens: int, second: CaptionWords) -> CaptionWords:
    """The words of a caption over the ``tokens`` of one encoder and, behind them, those of another."""
    if first.spelling != second.spelling:  # the rare text that the two part differently
        return first
    pairs = zip(first.tokens, second.tokens, strict=True)
    return CaptionWords(first.spelling, tuple((*a, *(tokens + i for i in b)) for a, b in pairs))


def clip_window(name: str, tokenizer: Any, encoder: Any) -> int:
    """Tokens that a CLIP text encoder takes at once.

    Raises:
        ModelError: If the tokenizer is not the encoder's.
    """
    # a token for every byte, and for every byte that ends a word, are the least that CLIP has
    check_vocabulary(name, tokenizer, int(encoder.config.vocab_size), 512)
    return min(int(tokenizer.model_max_length), int(encoder.config.max_position_embeddings))


def check_vocabulary(name: str, tokenizer: Any, size: int, least: int = 0) -> None:
    """Refuses a tokenizer that is not the encoder's.

    Raises:
        ModelError: If it has ``least`` tokens or fewer, or more than the encoder.
    """
    if not least < len(tokenizer) <= size:
        raise ModelError(
            f"{name}: got a tokenizer of {len(tokenizer)} tokens for a text encoder of {size}, "
            "expected those that were saved together; export the pipeline again with save_pretrained"
        )


def clip_states(encoder: Any, windows: Windows) -> tuple[Float[Tensor, "tokens width"], Float[Tensor, " width"]]:
    """The states before a CLIP text encoder's last layer, and its pooled output, the mean over windows."""
    # CLIP is trained with its padding attended to, so no mask is given, as in the stock pipelines
    out = encoder(windows.ids.to(encoder.device), output_hidden_states=True)
    return out.hidden_states[-2].flatten(0, 1), out[0].mean(0)


def _encoded(tokenizer: Any, text: str, **options: Any) -> Any:
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise TextError(f"got the caption {text!r}, expected Unicode text; save or type it as UTF-8")
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False, **options)


def _check_kept(text: str, ids: Sequence[int]) -> None:
    if text.strip() and not ids:
        raise TextError(f"got the caption {text!r}, of which the tokenizer keeps nothing; expected words")


def _windows(
    tokenizer: Any,
    ids: Sequence[int],
    words: Sequence[tuple[int, ...]],
    spelling: tuple[str, ...],
    size: int,
    start: list[int],
) -> Windows:
    # a token of no word goes with the word before it
    numbers: list[int] = []
    for of in words:
        numbers.append(of[0] if of else numbers[-1] if numbers else 0)
    pieces = _runs(numbers, size - len(start) - 1) or [range(0)]
    rows = [[*start, *(ids[i] for i in piece), int(tokenizer.eos_token_id)] for piece in pieces]
    filled = torch.tensor([[i < len(row) for i in range(size)] for row in rows])
    padded = torch.tensor([row + [int(tokenizer.pad_token_id)] * (size - len(row)) for row in rows])
    # of each token of the caption, along the joined windows
    position = [k * size + len(start) + i for k, piece in enumerate(pieces) for i in range(len(piece))]
    own = torch.zeros(len(rows) * size, dtype=torch.bool)
    own[position] = True
    tokens = tuple(tuple(position[i] for i in range(len(ids)) if w in words[i]) for w in range(len(spelling)))
    return Windows(padded, filled, own, CaptionWords(spelling, tokens))


def _runs(words: Sequence[int], size: int) -> list[range]:
    """Splits token positions into runs of at most ``size``, between words where a word fits a window."""
    runs, start = [], 0
    while start < len(words):
        stop = min(start + size, len(words))
        cut = stop
        while stop < len(words) and cut > start and words[cut - 1] == words[cut]:
            cut -= 1
        stop = cut if cut > start else stop
        runs.append(range(start, stop))
        start = stop
    return runs


def _spelling(tokenizer: Any, text: str, ids: Sequence[int], words: Sequence[int]) -> tuple[str, ...]:
    """How each word is spelled, in the order of the word numbers."""
    count = max(words, default=-1) + 1
    pieces = _WORD.findall(text.lower())
    if len(pieces) == count:
        return tuple(pieces)
    return tuple(tokenizer.decode([i for i, w in zip(ids, words, strict=True) if w == k]) for k in range(count))
