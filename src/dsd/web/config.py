"""How a server is run: where it listens, who may ask, and how much of it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, fields

from dsd.contracts import OptionError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServeConfig:
    """Limits and settings of a server. Whatever exceeds a limit is refused with a 4xx that names it.

    Attributes:
        host: Address that is listened on.
        port: Port; 0 takes a free one.
        token: What clients must send as ``Authorization: Bearer ...``; None asks for nothing.
        public: Whether an address that others reach may be listened on without a token.
        hosts: Values of the ``Host`` header that are answered (DNS rebinding is refused by it); None: on a loopback
            address its names, else any.
        frame_ancestors: Origins that may show the page in a frame.
        max_body: Bytes of a request.
        max_image: Bytes of an image.
        max_pixels: Width x height of an image.
        max_images, max_texts, max_pairs: Counts in a request.
        max_caption: Characters of a caption.
        timeout: Seconds that the model may take for an answer; then 503.
        body_timeout: Seconds that a request may take to arrive; then 408.
        connections: Requests in work at once; beyond, 503.
        queue: Pairs that wait for the model at most, a word of an explanation counting as one; beyond, 429.
        batch: Pairs of several clients that are scored in one call at most; those of one request are one call.
        batch_wait: Seconds at most that a batch which is not full waits for those who were answered last to ask again.
        teach: Whether the playground may learn.
        max_marks: Labelled pairs of a lesson.
        max_lessons: Lessons that are kept; the oldest goes.
        lesson_steps: Optimizer steps of a lesson at most.
        drain: Seconds that a stop waits for the requests it took.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    public: bool = False
    hosts: tuple[str, ...] | None = None
    frame_ancestors: tuple[str, ...] = ()
    max_body: int = 32 * 2**20
    max_image: int = 16 * 2**20
    max_pixels: int = 50_000_000
    max_images: int = 64
    max_texts: int = 256
    max_pairs: int = 1024
    max_caption: int = 1000
    timeout: float = 60.0
    body_timeout: float = 20.0
    connections: int = 256
    queue: int = 4096
    batch: int = 64
    batch_wait: float = 0.1
    teach: bool = True
    max_marks: int = 256
    max_lessons: int = 8
    lesson_steps: int = 100
    drain: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise OptionError(f"got port {self.port}, expected 0 to 65535")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", "float") and field.name not in ("port", "batch_wait") and not value > 0:
                raise OptionError(f"got {field.name} {value}, expected more than 0")
        if not self.batch_wait >= 0:
            raise OptionError(f"got batch_wait {self.batch_wait}, expected 0 or more seconds")
        if self.token is not None and (len(self.token) < 8 or not self.token.isascii() or not self.token.isprintable()):
            raise OptionError("got a token that is short or not plain ASCII, expected 8 or more printable characters")
        if self.token is not None and any(c.isspace() for c in self.token):
            raise OptionError("got a token with spaces, expected 8 or more printable characters without any")
        if any(";" in origin or "," in origin or any(c.isspace() for c in origin) for origin in self.frame_ancestors):
            raise OptionError(f"got frame ancestors {self.frame_ancestors}, expected origins such as https://host")
        if not self.is_local and self.token is None and not self.public:
            raise OptionError(
                f"got host {self.host}, which others can reach, without a token, expected one; set DSD_TOKEN or "
                "--token-file, or say --public if anyone may ask"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def allowed_hosts(self) -> tuple[str, ...] | None:
        """Names that requests may be for; None: any."""
        if self.hosts is not None:
            return tuple(host.lower() for host in self.hosts)
        return (*LOOPBACK, self.host) if self.is_local else None

    def limits(self) -> dict[str, int]:
        """What clients need to know to stay within the limits."""
        return {
            name: getattr(self, f"max_{name}")
            for name in ("body", "image", "pixels", "images", "texts", "pairs", "caption")
        }
