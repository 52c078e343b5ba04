"""Small CLIP, SigLIP and BLIP models of the real classes with random weights, saved as ``save_pretrained`` has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    SiglipConfig,
    SiglipModel,
)

from models import PIXELS, WORDS, tokenizer

WINDOW = 24
_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_PICTURE = {**_SMALL, "image_size": PIXELS, "patch_size": 4}


def _text(words: CLIPTokenizer) -> dict[str, Any]:
    ids = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {**_SMALL, **ids, "vocab_size": len(words), "max_position_embeddings": WINDOW}


def _save(folder: Path, model: nn.Module, words: Any, kind: str) -> str:
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    name = f"{kind}ImageProcessor"
    processor = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    side = {"height": PIXELS, "width": PIXELS}
    size = {"shortest_edge": PIXELS} if kind == "CLIP" else side
    extra = {"crop_size": side} if kind == "CLIP" else {}
    processor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, **extra).save_pretrained(folder)
    return str(folder)


def _spread(model: nn.Module) -> None:
    """Larger weights: those of small random models hardly tell inputs apart."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)


def save_clip(folder: Path, seed: int = 0) -> str:
    words = tokenizer(WINDOW)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=_text(words), vision_config=_PICTURE, projection_dim=16))
        _spread(model)
    return _save(folder, model, words, "CLIP")


def save_siglip(folder: Path) -> str:
    words = tokenizer(WINDOW)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SiglipModel(SiglipConfig(text_config=_text(words), vision_config=_PICTURE))
        _spread(model)
        nn.init.constant_(model.logit_bias, -3.0)
    return _save(folder, model, words, "Siglip")


def save_blip(folder: Path) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *(f"##{c}" for c in letters)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    text = {**_SMALL, "vocab_size": len(vocab), "max_position_embeddings": WINDOW, "encoder_hidden_size": 32}
    text |= {"bos_token_id": 2, "pad_token_id": 0, "eos_token_id": 3, "sep_token_id": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BlipConfig(text_config=text, vision_config=_PICTURE, projection_dim=16, image_text_hidden_size=16)
        model = BlipForImageTextRetrieval(config)
        _spread(model)
    return _save(folder, model, BertTokenizer(vocab=vocab, model_max_length=WINDOW), "Blip")
