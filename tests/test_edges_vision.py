"""The eye at its edges: pictures of any mode, towers that compute something else."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from flamingo_lite import load_flamingo, load_vision_encoder
from flamingo_lite.loading import DATA
from flamingo_lite.vision import rgb_on_white

CLIP = f"local-dir:{DATA / 'tiny_clip'}"
WHITE, RED = (255, 255, 255), (255, 0, 0)


@pytest.fixture(scope="module")
def image_processor():
    return load_vision_encoder(CLIP)[1]


# --------------------------------------------------------------------------- pictures


def palette(transparency=None, mode="RGB"):
    """Two halves, colours 0 and 1; which of them is transparent, if any."""
    picture = Image.new("P", (8, 8), 0)
    picture.paste(1, (4, 0, 8, 8))
    picture.putpalette([0, 0, 0, 0, *RED, 255] if mode == "RGBA" else [0, 0, 0, *RED])
    if mode == "RGBA":
        picture.putpalette([0, 0, 0, 0, *RED, 255], "RGBA")
    if transparency is not None:
        picture.info["transparency"] = transparency
    return picture


def keyed(mode, colour):
    picture = Image.new(mode, (8, 8), colour)
    picture.info["transparency"] = colour
    return picture


CLEAR = {
    "RGBA": Image.new("RGBA", (8, 8), (0, 0, 0, 0)),
    "RGBA, blue below": Image.new("RGBA", (8, 8), (0, 0, 255, 0)),
    "RGBa": Image.new("RGBa", (8, 8), (0, 0, 0, 0)),
    "LA": Image.new("LA", (8, 8), (0, 0)),
    "La": Image.new("LA", (8, 8), (0, 0)).convert("La"),
    "PA": Image.new("PA", (8, 8), (0, 0)),
    "RGB with a transparent colour": keyed("RGB", (1, 2, 3)),
    "L with a transparent colour": keyed("L", 7),
    "1 with a transparent colour": keyed("1", 0),
    "P with a transparent colour": keyed("P", 0),
}


@pytest.mark.parametrize("kind", CLEAR)
def test_a_fully_transparent_picture_is_a_white_one(image_processor, kind):
    white = image_processor(Image.new("RGB", (8, 8), "white"))
    assert torch.equal(image_processor(CLEAR[kind]), white)
    assert torch.equal(white, torch.ones_like(white))


HALF = {
    "P, one colour transparent": palette(transparency=0),
    "P, an alpha for each colour": palette(transparency=bytes([0, 255])),
    "P, alpha in the palette": palette(mode="RGBA"),
    "P to RGBA": palette(transparency=0).convert("RGBA"),
}


@pytest.mark.parametrize("kind", HALF)
def test_half_of_a_palette_is_transparent(kind):
    done = rgb_on_white(HALF[kind])
    assert done.mode == "RGB"
    assert (done.getpixel((0, 0)), done.getpixel((7, 0))) == (WHITE, RED)


OPAQUE = {
    "1": (1, WHITE),
    "L": (100, (100, 100, 100)),
    "RGB": (RED, RED),
    "RGBX": ((*RED, 0), RED),  # the fourth channel is filling
    "CMYK": ((0, 255, 255, 0), RED),
    "YCbCr": ((128, 128, 128), (128, 128, 128)),
    "HSV": ((0, 255, 255), RED),
    "LAB": ((255, 128, 128), WHITE),
    "I;16": (128 * 257, (128, 128, 128)),
    "I;16B": (128 * 257, (128, 128, 128)),
}


@pytest.mark.parametrize("mode", OPAQUE)
def test_every_other_mode_keeps_its_colour(image_processor, mode):
    value, colour = OPAQUE[mode]
    picture = Image.new(mode, (8, 8), value)
    done = rgb_on_white(picture)
    assert done.mode == "RGB" and done.size == (8, 8)
    assert np.abs(np.subtract(done.getpixel((3, 3)), colour)).max() <= 1
    assert torch.equal(image_processor(picture), image_processor(done))


def test_an_rgb_picture_keeps_its_pixels():
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    assert np.array_equal(np.asarray(rgb_on_white(picture)), noise)
    assert np.array_equal(np.asarray(rgb_on_white(picture.convert("RGBA"))), noise)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA"])
def test_a_picture_that_lies_down_is_turned(image_processor, mode):
    """EXIF 6: the camera was held on its side. The same for a file and in memory."""
    upright = Image.new("RGB", (64, 64), "white")
    upright.paste("black", (0, 0, 20, 50))
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    upright.rotate(90).convert(mode).save(file, "PNG", exif=exif)
    assert torch.equal(image_processor(Image.open(file)), image_processor(upright))


REFUSED = {
    "brightness in 32 bits": Image.new("F", (4, 4), 0.5),
    "brightness in 32 bits; save": Image.new("I", (4, 4), 100),
    "transparent colour in 16 bits": keyed("I;16", 7),
    "a strip of 100000 x 1 pixels": Image.new("L", (100_000, 1)),
    "a strip of 0 x 0 pixels": Image.new("RGB", (0, 0)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_shown_is_refused(image_processor, reason):
    with pytest.raises(ValueError, match=reason):
        image_processor(REFUSED[reason])


def test_a_picture_that_is_cut_short_is_refused(image_processor):
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    half = io.BytesIO(file.getvalue()[:1000])
    with pytest.raises(ValueError, match="cannot be decoded: .*truncated"):
        image_processor(Image.open(half))


@pytest.mark.parametrize(
    "thing", ["a.png", np.zeros((4, 4, 3), np.uint8), torch.zeros(3, 64, 64), None]
)
def test_what_is_no_picture_is_refused(image_processor, thing):
    with pytest.raises(TypeError, match=f"got {type(thing).__name__}: .*Image.open"):
        image_processor(thing)


def test_the_processor_of_load_flamingo_puts_pictures_on_white():
    """OpenMoji's drawings hold black where they are transparent."""
    image_processor = load_flamingo("tiny")[1]
    picture = Image.open(DATA / "emoji/openmoji/flamingo.webp")
    assert picture.mode == "RGBA"
    white = Image.new("RGBA", picture.size, "white")
    on_white = Image.alpha_composite(white, picture).convert("RGB")
    assert torch.equal(image_processor(picture), image_processor(on_white))
