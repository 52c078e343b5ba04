"""Matchers by name; those on one model take turns at it, so that a model is in memory once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

from dsd.contracts import MatcherProtocol, OptionError

_SHARE = 512
"""Positions of latents, in all rows of a pass, that are worth a thread of their own."""


class Shelf:
    """Named matchers, the first of which is the default. Not thread-safe: one thread owns it.

    Any :class:`dsd.contracts.MatcherProtocol` can be on it. Prompts of a :class:`dsd.Matcher` are on its backbone only
    while it is used.

    Args:
        matchers: One, or several by name. Of those that share a backbone, one at most may have an adapter; further
            ones come by :meth:`add`.
    """

    def __init__(self, matchers: MatcherProtocol | Mapping[str, MatcherProtocol] | None = None) -> None:
        self._matchers: dict[str, Any] = {}
        self._on: dict[int, str] = {}
        """Whose prompts are on a backbone, by the backbone's identity."""
        if matchers is not None and not isinstance(matchers, Mapping):
            matchers = {str(matchers.config.get("model", "default")): matchers}
        for name, matcher in (matchers or {}).items():
            self.add(name, matcher)

    @classmethod
    def load(
        cls,
        models: Iterable[str] = (),
        adapters: Mapping[str, str] | None = None,
        *,
        score: str | None = None,
        device: str | None = None,
        dtype: Any = None,
    ) -> Self:
        """Loads models, each once, and adapters onto them.

        Args:
            models: Aliases, hub names or folders; a matcher of each is named by it. Default: ``tiny``. Bases of
                adapters are loaded besides.
            adapters: Folders by the name that requests choose them by.
            score: Of the matchers without adapter; see :meth:`dsd.Matcher.from_pretrained`.
            device, dtype: See there.

        Raises:
            ModelError, AdapterError, OptionError: As there; also if two things have one name.
        """
        import torch

        from dsd.adapters import Adapter
        from dsd.backbone import load_backbone
        from dsd.matcher import Matcher, default_score

        loaded = {name: Adapter.load(folder) for name, folder in (adapters or {}).items()}
        names = list(dict.fromkeys(models)) or ["tiny"]
        bases = {name: str(a.base["name"]) if a.base is not None else names[0] for name, a in loaded.items()}
        backbones = {
            name: load_backbone(name, device=device, dtype=dtype or torch.float32)
            for name in dict.fromkeys([*names, *bases.values()])
        }
        shelf = cls()
        for name, backbone in backbones.items():
            shelf.add(name, Matcher(backbone, default_score(backbone, score or "denoising")))
        for name, adapter in loaded.items():
            backbone = backbones[bases[name]]
            shelf.clear(backbone)
            shelf.add(name, Matcher(backbone, adapter=adapter))
        return shelf

    def __iter__(self) -> Iterator[str]:
        return iter(self._matchers)

    def __len__(self) -> int:
        return len(self._matchers)

    def __contains__(self, name: object) -> bool:
        return name in self._matchers

    @property
    def default(self) -> str:
        """The name that is meant where none is given."""
        return next(iter(self._matchers))

    def add(self, name: str, matcher: MatcherProtocol) -> None:
        """Puts a matcher on the shelf; its prompts are on its backbone now.

        Raises:
            OptionError: If the name is taken, or unusable.
        """
        if not name or len(name) > 200 or not name.isprintable():
            raise OptionError(f"got the name {name!r}, expected 1 to 200 printable characters")
        if name in self._matchers:
            raise OptionError(f"got the name {name!r} twice, expected names that differ; rename one with NAME=DIR")
        self._matchers[name] = matcher
        if _has_prompts(matcher):
            self._on[id(matcher.backbone)] = name  # type: ignore[attr-defined]

    def remove(self, name: str) -> None:
        """Takes a matcher off the shelf, and its prompts off the model."""
        matcher = self._matchers.pop(name)
        if _has_prompts(matcher) and self._on.get(id(matcher.backbone)) == name:
            self.clear(matcher.backbone)

    def clear(self, backbone: Any) -> None:
        """Takes whatever prompts there are off a backbone."""
        from dsd import prompts

        prompts.detach(backbone.denoiser)
        self._on.pop(id(backbone), None)

    def peek(self, name: str) -> Any:
        """A matcher that may not be ready to score: for its configuration alone.

        Raises:
            OptionError: There is none of this name.
        """
        try:
            return self._matchers[name]
        except KeyError:
            raise OptionError(f"got model {name!r}, expected one of {', '.join(self._matchers)}") from None

    def use(self, name: str) -> Any:
        """A matcher, ready: its prompts, and no others, are on its model."""
        matcher = self.peek(name)
        backbone = getattr(matcher, "backbone", None)
        if backbone is None:
            return matcher
        on = self._on.get(id(backbone))
        if on == name or (on is None and not _has_prompts(matcher)):
            return matcher
        self.clear(backbone)
        if _has_prompts(matcher):
            matcher.adapter.attach(backbone)
            self._on[id(backbone)] = name
        return matcher

    @contextmanager
    def threads(self, name: str, pairs: int) -> Iterator[None]:
        """While so many pairs are scored on a CPU: as many threads as their passes keep busy.

        Threads that share a small pass wait for each other for longer than they work, all the more where a client on
        the same machine wants a core too. The score is the same.
        """
        matcher = self.peek(name)
        backbone = getattr(matcher, "backbone", None)
        if backbone is None or backbone.device.type != "cpu":
            yield
            return
        import torch

        _, height, width = backbone.latent_shape(matcher.config["size"])
        work = pairs * len(matcher.score_config.timesteps) * height * width
        most = torch.get_num_threads()
        torch.set_num_threads(max(1, min(most, work // _SHARE)))
        try:
            yield
        finally:
            torch.set_num_threads(most)


def _has_prompts(matcher: Any) -> bool:
    adapter = getattr(matcher, "adapter", None)
    return adapter is not None and adapter.prompts is not None and getattr(matcher, "backbone", None) is not None
