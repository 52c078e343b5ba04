"""Images as the library takes them: anything readable becomes an upright RGB picture, anything else one clear error.

Only raster decoders are opened (:data:`FORMATS`): formats that run programs or read other files stay shut.
"""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from dsd.contracts import ImageError, ImageInput, OptionError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is read from files, as Pillow names it; PNG includes APNG."""

_KINDS = "PNG, JPEG, WebP, GIF, BMP, TIFF or PPM"
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# warnings.catch_warnings changes state of the whole process
_decoding = threading.Lock()


def load_image(image: ImageInput, *, max_pixels: int = 100_000_000) -> Image.Image:
    """Reads an image into an upright RGB picture of 8 bits a channel, without metadata.

    EXIF orientation is applied; transparency is composited on white; 16-bit channels are scaled to 8; of an
    animation a path gives the first frame and a PIL image the frame it stands at. Colour profiles are not applied.

    Args:
        image: A path, a PIL image, or a uint8 array (h, w), (h, w, 3) or (h, w, 4) (the fourth is opacity).
        max_pixels: The largest width x height read, checked before decoding. Pillow's own bound stays in force:
            twice ``PIL.Image.MAX_IMAGE_PIXELS``, 179 million unless changed.

    Returns:
        A new image of mode RGB; the input is left as it was.

    Raises:
        ImageError: The image is missing, unreadable, broken, too large or of another type.
    """
    if isinstance(image, Image.Image):
        with _one_line("PIL image"):
            return _rgb(image, "PIL image", max_pixels)
    if isinstance(image, np.ndarray):
        return _rgb(_from_array(image), "array", max_pixels)
    if isinstance(image, str | PathLike):
        return _from_path(image, max_pixels)
    raise ImageError(f"got a {type(image).__name__}, expected a path, PIL image or uint8 array (h, w, 3); convert it")


def decode_image(data: bytes, *, name: str = "image", max_pixels: int = 100_000_000) -> Image.Image:
    """As :func:`load_image`, of a file's bytes.

    Args:
        data: A whole file.
        name: What errors call it.
        max_pixels: The largest width x height read, checked before decoding.

    Raises:
        ImageError: The image is empty, broken, too large or of another kind.
    """
    if not data:
        raise ImageError(f"{name}: got an empty file, expected an image ({_KINDS})")
    with _one_line(name), Image.open(BytesIO(data), formats=FORMATS) as image:
        return _rgb(image, name, max_pixels)


def resize_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square of an RGB image at ``size`` x ``size`` pixels (bicubic, antialiased).

    The same, up to rounding, as scaling the shorter side to ``size`` and cropping, but long thin images cost no more
    than others.
    An image which is ``size`` x ``size`` already is returned as it is.

    Raises:
        OptionError: ``size`` is less than 1.
    """
    if size < 1:
        raise OptionError(f"got image size {size}, expected at least 1 pixel; choose a larger size")
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def to_array(image: Image.Image) -> np.ndarray:
    """The pixels of an RGB image: a new (h, w, 3) uint8 array."""
    return np.array(image, np.uint8)


def content_hash(image: Image.Image) -> str:
    """32 hex digits that depend on the size and pixels of an RGB image alone, whatever file it came from."""
    digest = hashlib.blake2b(f"{image.mode} {image.width} {image.height} ".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Keeps Pillow's warnings in, and turns whatever a decoder raises on broken data into an ImageError."""
    try:
        with _decoding, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ImageError(f"{name}: got more than {limit:,} pixels, expected fewer; make the image smaller") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: got a file of another kind, expected {_KINDS}; convert it") from None
    # decoders raise nearly anything on broken data: SyntaxError, struct.error, IndexError, EOFError...
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: got a broken image ({reason}), expected a whole one; export it anew") from None


def _from_path(given: str | PathLike[Any], max_pixels: int) -> Image.Image:
    name = repr(os.fsdecode(given))
    expected = f"expected an image file ({_KINDS}); check the path"
    try:
        path = Path(os.fsdecode(given))
        if path.is_dir():
            raise ImageError(f"{name}: got a folder, {expected}")
        if not path.exists():
            raise ImageError(f"{name}: got no such file, {expected}")
        if not path.is_file():
            raise ImageError(f"{name}: got a device or pipe, {expected}")
        if path.stat().st_size == 0:
            raise ImageError(f"{name}: got an empty file, {expected}")
        file = path.open("rb")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{name}: got a path that cannot be read ({reason}), {expected}") from None
    with file, _one_line(name), Image.open(file, formats=FORMATS) as image:
        return _rgb(image, name, max_pixels)


def _from_array(array: np.ndarray) -> Image.Image:
    expected = "expected uint8 of (height, width, 3)"
    if array.dtype != np.uint8:
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise ImageError(f"array: got {array.dtype} with NaN or infinite values, {expected}; find where they arise")
        advice = "scale it to 0..255, round, and cast with astype('uint8')"
        raise ImageError(f"array: got {array.dtype} of {array.shape}, {expected}; {advice}")
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        planes = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        advice = "move the channels last with transpose(1, 2, 0)" if planes else "pass one picture, channels last"
        raise ImageError(f"array: got shape {array.shape}, {expected}; {advice}")
    return Image.fromarray(array)


def _rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Decodes an opened image: checks its size, turns it upright, makes it RGB."""
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: got {width} x {height} pixels, expected at most {max_pixels:,} in all; make the image smaller"
        )
    if not width * height:
        raise ImageError(f"{name}: got {width} x {height} pixels, expected at least 1 x 1; check how it was made")
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    flat = _flat(image, name)
    # metadata goes, or what reads the result would turn it a second time
    flat.info.clear()
    return flat if turn is None else flat.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 as well where the metadata is broken, since the pixels are still good."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        return 1


def _flat(image: Image.Image, name: str) -> Image.Image:
    """A new RGB image of the same pixels: 16 bits scaled to 8, transparency composited on white."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            got = f"whole numbers from {values.min()} to {values.max()}"
            raise ImageError(f"{name}: got {got}, expected 8 or 16 bits a channel; rescale it to 0..255 as uint8")
        if image.mode == "I" and 0 < values.max() < 256:  # by 16 bits it would be black
            raise ImageError(
                f"{name}: got whole numbers up to {values.max()} in a picture of 32 bits, expected 8 or 16; convert it "
                "to uint8 (mode L)"
            )
        # the high byte, as Pillow itself reads 16-bit colour
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError(
            f"{name}: got floating-point pixels, expected 8 or 16 bits a channel; rescale it to 0..255 as uint8"
        )
    if image.has_transparency_data:
        colour = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour).convert("RGB")
    return image.convert("RGB")
