"""Everything that is called an image, made here; and everything that is not."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsd.contracts import ImageError, OptionError
from dsd.images import content_hash, load_image, resize_crop, to_array

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
RAMP = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)


def png(width: int, height: int, depth: int, colour: int, data: bytes) -> bytes:
    """A PNG of raw scanlines (filter bytes included); ``colour`` 0 is grey, 2 is RGB."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def written(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / "picture"
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_lossless_files_give_their_pixels(kind: str, written: Callable[[bytes], Path]) -> None:
    image = load_image(
        written(encoded(Image.fromarray(PIXELS), kind, **({"lossless": True} if kind == "WEBP" else {})))
    )
    assert image.mode == "RGB"
    np.testing.assert_array_equal(to_array(image), PIXELS)


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_jpeg(mode: str, written: Callable[[bytes], Path]) -> None:
    flat = Image.new("RGB", (16, 8), (200, 60, 20)).convert(mode)
    assert np.abs(to_array(load_image(written(encoded(flat, "JPEG")))) - np.array([200.0, 60, 20])).max() < 6


@pytest.mark.parametrize("as_text", [False, True])
def test_paths_are_text_or_pathlike(as_text: bool, written: Callable[[bytes], Path]) -> None:
    path = written(encoded(Image.fromarray(PIXELS), "PNG"))
    np.testing.assert_array_equal(to_array(load_image(str(path) if as_text else path)), PIXELS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation: int, kind: str, written: Callable[[bytes], Path]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    # one bright corner tells all eight apart together with the shape
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :8] = 255
    path = written(encoded(Image.fromarray(stored), kind, exif=exif))
    turned = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: np.rot90(stored, -1)[:, ::-1][::-1, ::-1],
        8: np.rot90(stored, 1),
    }[orientation]
    image = load_image(path)
    with Image.open(path) as opened:
        from_pil = load_image(opened)
    for found in (image, from_pil, load_image(image)):
        assert to_array(found).shape == turned.shape
        assert np.abs(to_array(found).astype(int) - turned).mean() < 8


def test_broken_exif_does_not_matter(written: Callable[[bytes], Path]) -> None:
    content = encoded(Image.fromarray(PIXELS), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(to_array(load_image(written(content))), PIXELS)


def test_palette(written: Callable[[bytes], Path]) -> None:
    image = Image.fromarray(PIXELS).quantize(16)
    expected = to_array(image.convert("RGB"))
    np.testing.assert_array_equal(to_array(load_image(written(encoded(image, "PNG")))), expected)


def test_transparent_palette_lies_on_white(written: Callable[[bytes], Path]) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    for transparency in (0, b"\x00\xff"):
        found = load_image(written(encoded(image, "PNG", transparency=transparency)))
        np.testing.assert_array_equal(to_array(found), [[[255, 255, 255], [0, 0, 255]]])


def test_opacity_is_composited_on_white() -> None:
    rgba = Image.new("RGBA", (1, 1), (0, 0, 0, 0))
    assert load_image(rgba).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).getpixel((0, 0)) == (127, 127, 127)
    assert load_image(Image.new("LA", (1, 1), (100, 255))).getpixel((0, 0)) == (100, 100, 100)
    np.testing.assert_array_equal(to_array(load_image(np.zeros((2, 2, 4), np.uint8))), np.full((2, 2, 3), 255))


def test_one_bit(written: Callable[[bytes], Path]) -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(to_array(load_image(written(encoded(image, "PNG"))))[0, :, 0], [0, 255])


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PGM"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str, written: Callable[[bytes], Path]) -> None:
    content = (
        b"P5 8 8 65535\n" + RAMP.astype(">u2").tobytes() if kind == "PGM" else encoded(Image.fromarray(RAMP), kind)
    )
    found = to_array(load_image(written(content)))[..., 0]
    np.testing.assert_array_equal(found, RAMP >> 8)


def test_16_bit_colour(written: Callable[[bytes], Path]) -> None:
    content = png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 65535, 257 * 100, 0))
    assert load_image(written(content)).getpixel((0, 0)) == (255, 100, 0)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_animations(kind: str, written: Callable[[bytes], Path]) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert load_image(written(content)).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "I"]
)
def test_pil_modes(mode: str) -> None:
    given = Image.new(mode, (3, 2))
    found = load_image(given)
    assert (found.mode, found.size) == ("RGB", (3, 2))
    assert given.mode == mode


def test_arrays() -> None:
    np.testing.assert_array_equal(to_array(load_image(PIXELS)), PIXELS)
    np.testing.assert_array_equal(to_array(load_image(PIXELS[::2, ::-1])), PIXELS[::2, ::-1])
    np.testing.assert_array_equal(to_array(load_image(PIXELS[..., 0])), PIXELS[..., :1].repeat(3, -1))
    assert load_image(PIXELS[:1, :1]).size == (1, 1)


def test_the_result_is_no_view_of_the_input() -> None:
    grey = np.zeros((4, 4), np.uint8)
    found = load_image(grey)
    grey[:] = 9
    assert found.getpixel((0, 0)) == (0, 0, 0)
    source = Image.new("RGB", (2, 2))
    load_image(source).putpixel((0, 0), (1, 1, 1))
    assert source.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.full((4, 4, 3), np.nan), "NaN"),
        (np.zeros((4, 4, 3), bool), "bool"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (np.zeros((3, 8, 8), np.uint8), "transpose"),
        (np.zeros((4, 4, 2), np.uint8), "(4, 4, 2)"),
        (np.zeros((1, 4, 4, 3), np.uint8), "(1, 4, 4, 3)"),
        (np.zeros((0, 4, 3), np.uint8), "(0, 4, 3)"),
        (np.zeros((), np.uint8), "()"),
    ],
)
def test_wrong_arrays(array: np.ndarray, said: str) -> None:
    refused(array, said)


def test_wrong_types() -> None:
    for thing in (None, 3, b"bytes", [1, 2]):
        refused(thing, type(thing).__name__)
    refused(Image.new("F", (2, 2)), "floating-point")
    refused(Image.new("I", (2, 2), 70000), "70000")
    refused(Image.new("I", (2, 2), 200), "convert it to uint8")  # which would be black
    refused(Image.new("RGB", (0, 2)), "0 x 2")


def test_wrong_paths(tmp_path: Path, written: Callable[[bytes], Path]) -> None:
    refused(tmp_path / "missing.png", "no such file")
    refused(tmp_path, "folder")
    refused("a\0b", "a\\x00b")
    refused("x" * 5000, "cannot be read")
    refused("new\nline.png", "new\\nline.png")
    refused(written(b""), "empty")
    refused(written(b"hello, this is text" * 20), "another kind")
    refused(written(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "another kind")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        refused(tmp_path / "pipe", "pipe")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("kept", [0.5, 0.02])
def test_truncated(kind: str, kept: float, written: Callable[[bytes], Path]) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (60, 60, 3), np.uint8)
    content = encoded(Image.fromarray(noise), kind)
    refused(written(content[: int(kept * len(content))]), "got")


def test_too_many_pixels(written: Callable[[bytes], Path]) -> None:
    # headers alone: refused before anything is decoded, with and without Pillow's own limits in reach
    refused(written(png(20_000, 20_000, 8, 2, b"")), "pixels")
    refused(written(png(10_100, 10_000, 8, 2, b"")), "10100 x 10000")
    refused(written(png(40, 30, 8, 2, b"")), "40 x 30", max_pixels=1000)
    refused(Image.new("L", (40, 30)), "40 x 30", max_pixels=1000)
    refused(np.zeros((30, 40), np.uint8), "40 x 30", max_pixels=1000)


def test_long_and_large_images_are_fine(written: Callable[[bytes], Path]) -> None:
    assert load_image(written(png(20_000, 100, 1, 0, bytes(2501 * 100)))).size == (20_000, 100)
    # above Pillow's warning, below our limit: opened without a warning, then found to be cut short
    refused(written(png(9_800, 9_800, 8, 2, b"\0")), "broken")


def refused(image: object, said: str, **options: int) -> None:
    """The image is refused in one line that holds ``said``."""
    with pytest.raises(ImageError) as caught:
        load_image(image, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert said in message
    assert "\n" not in message
    assert "expected" in message


def test_resize_crop() -> None:
    image = Image.fromarray(PIXELS)
    for size in (1, 4, 32):
        assert resize_crop(image, size).size == (size, size)
    square = image.crop((0, 0, 6, 6))
    np.testing.assert_array_equal(to_array(resize_crop(square, 6)), to_array(square))
    with pytest.raises(OptionError, match="size 0"):
        resize_crop(image, 0)


@pytest.mark.parametrize("shape", [(40, 80), (80, 40)])
def test_resize_crop_is_scaling_then_cropping(shape: tuple[int, int]) -> None:
    # away from black and white, where overshoot would be clipped between Pillow's two passes, whose order may differ
    noise = Image.fromarray(np.random.default_rng(2).integers(90, 160, (*shape, 3), np.uint8))
    whole = noise.resize((noise.width * 24 // 40, noise.height * 24 // 40), Image.Resampling.BICUBIC)
    left, top = (whole.width - 24) // 2, (whole.height - 24) // 2
    expected = to_array(whole.crop((left, top, left + 24, top + 24))).astype(int)
    assert np.abs(to_array(resize_crop(noise, 24)) - expected).max() <= 1


def test_resize_crop_of_a_thread_stays_small() -> None:
    assert resize_crop(Image.new("RGB", (20_000, 1), "red"), 512).getpixel((0, 0)) == (255, 0, 0)


def test_content_hash_is_of_pixels_and_shape(written: Callable[[bytes], Path]) -> None:
    image = load_image(PIXELS)
    assert content_hash(load_image(written(encoded(image, "PNG")))) == content_hash(image)
    assert content_hash(load_image(written(encoded(image, "BMP")))) == content_hash(image)
    changed = PIXELS.copy()
    changed[0, 0, 0] ^= 1
    others = [load_image(changed), load_image(PIXELS.reshape(9, 6, 3)), load_image(PIXELS[:, :5])]
    assert len({content_hash(i) for i in [image, *others]}) == 4
    assert len(content_hash(image)) == 32
