"""Pictures of every kind end as upright 8-bit RGB, and are cut reproducibly."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from diffalign.data.images import ImageError, load_image, prepare


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(width: int = 48, height: int = 32) -> Image.Image:
    """Red grows to the right, green downwards: its orientation can be read off."""
    y, x = np.mgrid[0:height, 0:width]
    values = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 64)], -1)
    return Image.fromarray(values.astype(np.uint8))


@pytest.mark.parametrize(("format", "tolerance"), [("PNG", 0), ("JPEG", 24), ("WEBP", 24)])
def test_formats_give_the_same_picture(format: str, tolerance: int) -> None:
    image = load_image(encode(picture(), format, **({} if format == "PNG" else {"quality": 95})))
    assert image.mode == "RGB" and image.size == (48, 32)
    assert np.abs(np.asarray(image, int) - np.asarray(picture(), int)).max() <= tolerance


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_rotation_is_applied(turn: int) -> None:
    """A picture stored in any of the eight orientations comes out upright."""
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = picture()
    for step in undo.get(turn, []):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = turn
    image = load_image(encode(stored, "PNG", exif=exif))
    assert image.size == (48, 32)
    assert np.array_equal(np.asarray(image), np.asarray(picture()))


@pytest.mark.parametrize(
    ("alpha", "expected"), [("white", (227, 155, 127)), ("black", (100, 27, 0)), ("drop", (200, 55, 0))]
)
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_alpha_is_blended_as_stated(alpha: str, expected: tuple[int, int, int], format: str) -> None:
    half = Image.new("RGBA", (8, 8), (200, 55, 0, 128))
    data = encode(half, format, **({"lossless": True} if format == "WEBP" else {}))
    found = load_image(data, alpha).getpixel((3, 3))  # type: ignore[arg-type]
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1  # type: ignore[arg-type]


def test_palette_with_transparency() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.paste(0, (0, 0, 4, 8))
    image = load_image(encode(palette, "PNG", transparency=1))
    assert image.getpixel((0, 0)) == (255, 0, 0) and image.getpixel((7, 0)) == (255, 255, 255)
    assert load_image(encode(palette, "PNG")).getpixel((7, 0)) == (0, 0, 255)


def test_grey_16_bit_is_scaled_not_clipped() -> None:
    ramp = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)
    values = np.asarray(load_image(encode(Image.fromarray(ramp))))[..., 0]
    assert np.abs(values.astype(float) - ramp / 257).max() <= 0.5
    assert len(np.unique(values)) == 64
    assert load_image(encode(Image.new("L", (8, 8), 77))).getpixel((1, 1)) == (77, 77, 77)
    assert load_image(encode(Image.new("LA", (8, 8), (0, 0)))).getpixel((1, 1)) == (255, 255, 255)
    assert load_image(encode(Image.new("1", (8, 8), 1))).getpixel((1, 1)) == (255, 255, 255)


def test_rgb_16_bit_png() -> None:
    """Written by hand: Pillow cannot save it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + struct.pack(">3H", 0xFFFF, 0x8000, 0) * 8 for _ in range(8))
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert load_image(data).getpixel((2, 2)) in ((255, 128, 0), (255, 127, 0))


def test_cmyk_jpeg() -> None:
    red, green, blue = load_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")).getpixel((5, 5))  # type: ignore[misc]
    assert red > 240 and green < 15 and blue < 15


def test_broken_pictures_say_why(tmp_path: Path) -> None:
    whole = encode(picture(200, 200), "JPEG")
    for data in (whole[: len(whole) // 2], encode(picture())[:-30], b"no picture", b"", b"\xff\xd8\xff\xe0"):
        with pytest.raises(ImageError) as error:
            load_image(data)
        assert error.value.reason == "unreadable image"
    with pytest.raises(ImageError, match="does not exist") as missing:
        load_image(tmp_path / "none.png")
    assert missing.value.reason == "missing image"
    with pytest.raises(ImageError, match="400x10"):
        load_image(encode(Image.new("RGB", (400, 10))))


def test_prepare_range_and_geometry() -> None:
    ready = prepare(picture(100, 60), 32)
    assert ready.pixels.shape == (3, 32, 32) and ready.pixels.dtype == torch.float32
    assert ready.original == (60, 100) and ready.corner == (0, 10)  # resized to 53 x 32
    assert -1 <= float(ready.pixels.min()) < float(ready.pixels.max()) <= 1
    assert torch.equal(prepare(Image.new("RGB", (9, 9), (255, 0, 0)), 16).pixels[:, 3, 3], torch.tensor([1.0, -1, -1]))
    exact = prepare(picture(32, 32), 32).pixels
    assert torch.equal(
        ((exact + 1) * 127.5).round().byte(), torch.from_numpy(np.array(picture(32, 32))).permute(2, 0, 1)
    )


@pytest.mark.parametrize("size", [(31, 999), (64, 64), (500, 33), (7, 9), (1023, 769)])
def test_every_size_gives_a_square(size: tuple[int, int]) -> None:
    for crop in ("center", "random"):
        assert prepare(Image.new("RGB", size), 64, crop, "a").pixels.shape == (3, 64, 64)  # type: ignore[arg-type]


def test_random_crop_is_a_function_of_the_key() -> None:
    """Both members of a pair are cut at the same share of the way, whatever their sizes."""
    corners = {k: prepare(picture(400, 100), 50, "random", k).corner for k in "abcdefgh"}
    assert len(set(corners.values())) > 4
    assert all(prepare(picture(400, 100), 50, "random", k).corner == c for k, c in corners.items())
    for key, (top, left) in corners.items():
        assert top == 0 and 0 <= left <= 150
        other = prepare(picture(800, 100), 50, "random", key).corner[1]
        assert abs(other / 350 - left / 150) < 0.01
    spread = [prepare(picture(400, 100), 50, "random", i).corner[1] for i in range(300)]
    assert min(spread) < 5 and max(spread) > 145 and 65 < np.mean(spread) < 85


def test_a_mirrored_crop_has_the_corner_of_the_mirror_image() -> None:
    """Cropping and then mirroring is mirroring and then cropping at the corner that is told."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 41, 3), dtype=np.uint8))
    for crop, key in (("center", None), ("random", "row-7")):
        found = prepare(image, 16, crop, key)
        turned = found.mirrored()
        assert turned.corner[1] + found.corner[1] == 41 - 16 and turned.mirrored().corner == found.corner
        top, left = turned.corner
        pixels = np.array(ImageOps.mirror(image).crop((left, top, left + 16, top + 16)))
        torch.testing.assert_close((turned.pixels.permute(1, 2, 0) + 1) * 127.5, torch.from_numpy(pixels).float())
    assert turned.corner != found.corner
