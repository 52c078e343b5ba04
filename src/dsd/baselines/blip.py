"""BLIP's image-text matching (Li et al. 2022, arXiv 2201.12086), zero-shot, as ``transformers`` has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dsd.baselines.base import Baseline, Encoded, pictures_of
from dsd.baselines.towers import Tokens, load_parts
from dsd.contracts import OptionError, Pair, batched

Head = Literal["itm", "itc"]


class Blip(Baseline):
    """``BlipForImageTextRetrieval``: its matching head reads picture and caption together; its contrast compares them.

    Args:
        model: A folder, or a name on the hub.
        head: ``itm``: the matching head's log-odds that the pair matches; every pair goes through the text encoder with
            cross-attention to the picture. ``itc``: the cosine of the two projected embeddings.
        device: Default: the first GPU if there is one, else the CPU.
        batch_size: Pictures, captions or pairs at once.
        truncate: Whether captions beyond the model's window lose their end; else they are refused.

    Raises:
        ModelError: If the model cannot be loaded.
    """

    name = "blip"

    def __init__(
        self,
        model: str = "Salesforce/blip-itm-base-coco",
        *,
        head: Head = "itm",
        device: str | torch.device | None = None,
        batch_size: int = 32,
        truncate: bool = False,
    ) -> None:
        if head not in get_args(Head):
            raise OptionError(f"got head {head!r}, expected one of {', '.join(get_args(Head))}")
        self.model_name, self.head, self.batch_size = str(model), head, batch_size
        kinds = {"blip": "BlipForImageTextRetrieval"}
        _, self.model, tokenizer, self._pixels = load_parts(self.model_name, kinds, device)
        window = int(self.model.config.text_config.max_position_embeddings)
        self.tokens = Tokens(tokenizer, window, truncate)
        self._images = Encoded(self._see, batch_size)
        self._texts = Encoded(self._read, batch_size)

    @property
    def config(self) -> Mapping[str, Any]:
        return {
            "baseline": self.name,
            "model": self.model_name,
            "head": self.head,
            "truncate": self.tokens.truncate,
        }

    def _see(self, pictures: Sequence[Any]) -> Tensor:
        """Pictures => states of the vision tower (n, patches, width)."""
        states: Tensor = self.model.vision_model(
            pixel_values=self._pixels(pictures).to(self.model.device)
        ).last_hidden_state
        return states

    def _read(self, texts: Sequence[str]) -> Tensor:
        """Captions => unit vectors in the joint space (n, d)."""
        made = {k: v.to(self.model.device) for k, v in self.tokens(texts).items()}
        states = self.model.text_encoder(**made).last_hidden_state
        return F.normalize(self.model.text_proj(states[:, 0]).float(), dim=-1)

    @torch.no_grad()
    def _match(self, states: Tensor, texts: Sequence[str]) -> Tensor:
        """The matching head's log-odds: (n,)."""
        made = {k: v.to(self.model.device) for k, v in self.tokens(texts).items()}
        seen = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
        read = self.model.text_encoder(**made, encoder_hidden_states=states, encoder_attention_mask=seen)
        logits = self.model.itm_head(read.last_hidden_state[:, 0]).float()
        odds: Tensor = logits[:, 1] - logits[:, 0]
        return odds

    def _scores(self, pairs: Sequence[Pair], progress: bool) -> np.ndarray:
        self.tokens.check([text for _, text in pairs])
        found: list[Tensor] = []
        with tqdm(total=len(pairs), desc="scoring", unit="pair", disable=not progress) as bar:
            for part in batched(pairs, self.batch_size):
                keys, pictures = pictures_of([image for image, _ in part])
                states = self._images(pictures)
                images = torch.stack([states[key] for key in keys])
                texts = [text for _, text in part]
                if self.head == "itm":
                    found.append(self._match(images, texts))
                else:
                    with torch.no_grad():
                        unit = F.normalize(self.model.vision_proj(images[:, 0]).float(), dim=-1)
                    known = self._texts({text: text for text in texts})
                    found.append((unit * torch.stack([known[text] for text in texts])).sum(1))
                bar.update(len(part))
        scores: np.ndarray = torch.cat(found).cpu().numpy()
        return scores
