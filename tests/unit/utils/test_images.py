"""Reading images: an upright RGB image of the right values, or a refusal that names the file."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from air_plugin.utils.images import UnreadableImage, load_rgb

pytestmark = pytest.mark.public_reports

ORIENTATION = 0x112  # EXIF's tag
# What a viewer does for each value of the tag (EXIF 2.3, section 4.6.4), as numpy would do it.
UPRIGHT = {
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}


def ramp() -> np.ndarray:
    """(4, 6) grey levels."""
    return np.linspace(0, 255, 24).round().astype(np.uint8).reshape(4, 6)


def saved(image: Image.Image, folder: Path, suffix: str = "png", **options) -> Path:
    path = folder / f"image.{suffix}"
    image.save(path, **options)
    return path


def grey(path: Path) -> list[int]:
    """The first row's red channel."""
    return np.asarray(load_rgb(path))[0, :, 0].tolist()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK", "I;16", "F", "PA"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path):
    plain = Image.fromarray(ramp())
    expected = np.repeat(ramp()[..., None], 3, axis=2)
    if mode == "I;16":
        path = saved(Image.fromarray(ramp().astype(np.uint16) * 257), tmp_path)
    elif mode == "F":
        path = saved(Image.fromarray(ramp().astype(np.float32) / 255), tmp_path, "tif")
    elif mode == "1":
        path = saved(plain.convert("1", dither=Image.Dither.NONE), tmp_path)
        expected = np.where(expected >= 128, 255, 0)
    elif mode == "CMYK":
        path = saved(plain.convert("RGB").convert("CMYK"), tmp_path, "tif")
    elif mode == "PA":
        path = saved(plain.convert("RGB").quantize(256), tmp_path)
    else:
        path = saved(plain.convert(mode), tmp_path)
    image = load_rgb(path)
    assert image.mode == "RGB" and image.size == (6, 4)
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied_in_every_format(suffix: str, orientation: int, tmp_path: Path):
    pixels = np.zeros((24, 32, 3), dtype=np.uint8)
    pixels[:12, :16] = 255  # one bright corner: every orientation looks different
    pixels[:12, 16:] = 90
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    quality = {} if suffix in ("png", "tif") else {"quality": 95}
    image = load_rgb(saved(Image.fromarray(pixels), tmp_path, suffix, exif=exif, **quality))
    expected = UPRIGHT[orientation](pixels)
    assert image.size == expected.shape[1::-1]
    assert np.abs(np.asarray(image).astype(int) - expected).mean() < 8


@pytest.mark.parametrize("brightest", [200, 255, 256, 300, 65535])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_by_their_type_whatever_the_brightest_pixel(
    brightest: int, suffix: str, tmp_path: Path
):
    path = saved(Image.fromarray(np.array([[0, 128, brightest]], dtype=np.uint16)), tmp_path, suffix)
    assert grey(path) == [0, 0, round(brightest / 257)]


def test_sixteen_bits_of_a_netpbm_file(tmp_path: Path):
    path = tmp_path / "image.pgm"
    path.write_bytes(b"P5\n3 1\n65535\n" + np.array([0, 257, 65535], dtype=">u2").tobytes())
    assert grey(path) == [0, 1, 255]


@pytest.mark.parametrize("outlier", [0.5, 1.01, -0.02, 3.0])
def test_one_float_pixel_does_not_decide_how_the_others_are_scaled(outlier: float, tmp_path: Path):
    values = np.full((20, 20), 0.25, dtype=np.float32)
    values[0, 1] = outlier
    path = saved(Image.fromarray(values), tmp_path, "tif")
    pixels = np.asarray(load_rgb(path))[..., 0]
    assert pixels[0, 1] == round(255 * min(max(outlier, 0.0), 1.0))
    assert (np.delete(pixels.ravel(), 1) == 64).all()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.full((4, 4), np.nan, np.float32), "finite"),
        (np.array([[0.1, np.inf]], np.float32), "finite"),
        (np.linspace(0, 255, 100, dtype=np.float32).reshape(10, 10), r"\[0, 1\]"),
        (np.full((4, 4), 70_000, np.int32), "32-bit"),
    ],
    ids=["nan", "inf", "floats up to 255", "32-bit integers"],
)
def test_pixels_of_an_unknown_range_are_refused_by_name(values: np.ndarray, reason: str, tmp_path: Path):
    with pytest.raises(UnreadableImage, match=rf"image\.tif: .*{reason}"):
        load_rgb(saved(Image.fromarray(values), tmp_path, "tif"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(mode: str, tmp_path: Path):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "P":
        palette = Image.new("P", (2, 1))
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.putpixel((1, 0), 1)
        path = saved(palette, tmp_path, transparency=0)
    else:
        path = saved(image.convert(mode), tmp_path)
    assert np.asarray(load_rgb(path))[0].tolist() == [[255, 255, 255], [0, 0, 0]]


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"GIF89a\x01\x00"])
def test_what_is_no_image_is_named(content: bytes, tmp_path: Path):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(UnreadableImage, match=r"broken\.png"):
        load_rgb(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "avif"])
def test_images_cut_short_are_named(suffix: str, tmp_path: Path):
    noise = np.random.default_rng(0).integers(256, size=(40, 40, 3), dtype=np.uint8)
    path = saved(Image.fromarray(noise), tmp_path, suffix)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UnreadableImage, match=f"image.{suffix}"):
        load_rgb(path)


def test_a_decoder_that_raises_something_else_is_a_refusal_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def load(self: Image.Image) -> None:
        raise RuntimeError("Failed to decode frame 0")

    path = saved(Image.fromarray(ramp()), tmp_path)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(UnreadableImage, match=r"image\.png: Failed to decode"):
        load_rgb(path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UnreadableImage, match="regular file"):
        load_rgb(tmp_path / "pipe.png")


@pytest.mark.parametrize("size", [(2, 6000), (6000, 3), (101, 1)])
def test_a_strip_that_a_resize_would_blow_up_is_refused(size: tuple[int, int], tmp_path: Path):
    with pytest.raises(UnreadableImage, match=f"{size[0]} x {size[1]}"):
        load_rgb(saved(Image.new("L", size), tmp_path))
    assert load_rgb(saved(Image.new("L", (100, 1)), tmp_path)).size == (100, 1)


def test_a_large_image_is_read_without_a_warning(tmp_path: Path):
    path = saved(Image.new("L", (40, 40)), tmp_path)
    code = f"""
from PIL import Image
from air_plugin.utils.images import load_rgb
Image.MAX_IMAGE_PIXELS = 1000
print(load_rgb({str(path)!r}).size)
Image.MAX_IMAGE_PIXELS = 100
try:
    load_rgb({str(path)!r})
except Exception as error:
    print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("(40, 40)\nUnreadableImage\n", "")


FORMATS = {  # format -> modes that Pillow writes in it
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "jpeg": ("L", "RGB", "CMYK"),
    "webp": ("RGB", "RGBA"),
    "tiff": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"),
    "bmp": ("1", "L", "P", "RGB"),
    "gif": ("L", "P"),
    "avif": ("RGB", "RGBA"),
    "ppm": ("1", "L", "RGB", "I;16"),
}
WITH_EXIF = ("png", "jpeg", "webp", "tiff", "avif")
SCHEMES = st.sampled_from([(form, mode) for form, modes in FORMATS.items() for mode in modes])


def make(mode: str, size: tuple[int, int], seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    shape = size[::-1]
    if mode == "F":
        return Image.fromarray(rng.normal(0.5, 0.5, shape).astype(np.float32))
    if mode == "I":
        return Image.fromarray(rng.integers(-(2**31), 2**31, shape).astype(np.int32))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 2**16, shape).astype(np.uint16))
    return Image.fromarray(rng.integers(0, 256, (*shape, 4), dtype=np.uint8), "RGBA").convert(mode)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    scheme=SCHEMES,
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    orientation=st.integers(0, 9),
    kept=st.one_of(st.just(1.0), st.floats(0, 1)),
    flipped=st.lists(st.floats(0, 1, exclude_max=True), max_size=3),
    seed=st.integers(0, 2**32 - 1),
)
@example(scheme=("tiff", "F"), size=(1, 1), orientation=6, kept=1.0, flipped=[], seed=0)
def test_any_file_is_an_upright_rgb_image_or_a_named_refusal(
    scheme: tuple[str, str], size: tuple[int, int], orientation: int, kept: float, flipped: list[float], seed: int
):
    """Whole files, files cut short, and files with changed bytes."""
    form, mode = scheme
    options: dict[str, Any] = {"speed": 10} if form == "avif" else {}  # the fastest encoder
    if form in WITH_EXIF:
        options["exif"] = Image.Exif()
        options["exif"][ORIENTATION] = orientation
    buffer = io.BytesIO()
    make(mode, size, seed).save(buffer, form, **options)
    data = bytearray(buffer.getvalue())
    for place in flipped:
        data[int(place * len(data))] ^= 1 << seed % 8
    data = data[: round(kept * len(data))]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, on damaged metadata
        path = Path(folder, "some.image")
        path.write_bytes(data)
        try:
            image, refusal = load_rgb(path), ""
        except UnreadableImage as error:
            image, refusal = None, str(error)
    if image is None:
        assert str(path) in refusal
        assert flipped or kept < 1 or mode in ("I", "F")
        return
    assert image.mode == "RGB"
    if not flipped:
        turned = 5 <= orientation <= 8 and form in WITH_EXIF
        assert image.size == (size[::-1] if turned else size)
