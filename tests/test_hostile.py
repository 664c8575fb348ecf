"""Pictures, captions and checkpoints that mean harm: a result or a clear error.

Never a hang, a silent wrong answer, or code that runs. What test_data.py, test_model.py
and test_training.py try already is not repeated here; tools/measure/fuzz.py tries
the rest.
"""

import contextlib
import io
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import D_IMG, ROOT, SMALL, V, open_gates, random_features
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cache import Tower, processor
from test_data import RED, WHITE, assert_colour, png_chunk, row, write_folder
from test_shards import write_tar

from flamingo_lite import (
    PixelSource,
    as_picture,
    build_flamingo,
    cache_features,
    collate,
    encode_pictures,
    generation,
    load_captions,
    load_checkpoint,
    load_flamingo,
    make_optimizers,
    read_picture,
    read_shards,
    rgb_on_white,
    run_settings,
    save_flamingo,
    train,
    trained_tensors,
)

GREEN = (0, 255, 0)


class Hang(BaseException):
    """No `except Exception` in a library can swallow this one."""


@contextlib.contextmanager
def time_limit(seconds=60):
    """Raise Hang in what takes longer."""

    def stop(signum, frame):
        raise Hang(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --------------------------------------------------------------------------- pictures

# How a camera stores an upright picture, for each value of the EXIF orientation.
STORED = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


def noise(height=9, width=14):
    """(height, width, 3) uint8, every turn and mirror image of which is another."""
    shape = (height, width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_is_turned_upright(tmp_path, suffix, orientation):
    """Pixel by pixel, in formats that lose nothing."""
    exif, path = Image.Exif(), tmp_path / f"turned.{suffix}"
    exif[0x0112] = orientation
    lossless = {"lossless": True, "exact": True} if suffix == "webp" else {}
    stored = np.ascontiguousarray(STORED[orientation](noise()))
    Image.fromarray(stored).save(path, exif=exif, **lossless)
    assert np.array_equal(np.asarray(read_picture(path)), noise())


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_an_orientation_that_does_not_exist_turns_nothing(tmp_path, orientation):
    exif, path = Image.Exif(), tmp_path / "turned.png"
    exif[0x0112] = orientation
    Image.fromarray(noise()).save(path, exif=exif)
    assert np.array_equal(np.asarray(read_picture(path)), noise())


def test_sixteen_bits_and_a_turn_together(tmp_path):
    exif, path = Image.Exif(), tmp_path / "deep.png"
    exif[0x0112] = 6
    deep = noise()[..., 0].astype(np.uint16) * 257
    stored = np.ascontiguousarray(np.rot90(deep))
    Image.fromarray(stored).save(path, exif=exif)
    read = np.asarray(read_picture(path))
    assert np.array_equal(read, noise()[..., :1].repeat(3, axis=2))


def png(bits, colour_type, pixel, extra=b""):
    """A PNG of one pixel, as bytes; `extra` chunks come before the pixel."""
    header = struct.pack(">IIBBBBB", 1, 1, bits, colour_type, 0, 0, 0)
    chunks = (
        png_chunk(b"IHDR", header),
        extra,
        png_chunk(b"IDAT", zlib.compress(b"\0" + pixel)),
        png_chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def deep(*channels):
    """Channels in 16 bits, high byte first."""
    return struct.pack(f">{len(channels)}H", *channels)


DEEP = {
    "rgb.png": (png(16, 2, deep(32_896, 0, 65_535)), (128, 0, 255)),
    "clear.png": (png(16, 6, deep(0, 0, 0, 0)), WHITE),
    "opaque.png": (png(16, 6, deep(32_896, 0, 65_535, 65_535)), (128, 0, 255)),
    "clear_grey.png": (png(16, 4, deep(0, 0)), WHITE),
    "grey.pgm": (b"P5 1 1 65535\n" + deep(32_896), (128, 128, 128)),
    "thousand.pgm": (b"P5 1 1 1000\n" + deep(500), (128, 128, 128)),
    "rgb.ppm": (b"P6 1 1 65535\n" + deep(32_896, 0, 65_535), (128, 0, 255)),
}


@pytest.mark.parametrize("name", DEEP)
def test_sixteen_bits_in_other_formats(tmp_path, name):
    content, colour = DEEP[name]
    (tmp_path / name).write_bytes(content)
    assert_colour(read_picture(tmp_path / name), colour, tolerance=1)


def with_alpha():
    """A picture of few colours, the left of it transparent."""
    few = Image.fromarray(noise() // 128 * 255).convert("RGBA")
    few.paste((0, 0, 0, 0), (0, 0, 5, 9))
    return few


def content_of(picture, kind, **settings):
    """A picture file's bytes."""
    content = io.BytesIO()
    picture.save(content, kind, **settings)
    return content.getvalue()


def kinds_of_pictures():
    """Bytes of picture files whose pixels are not simply there: {name: bytes}."""
    plain, exif = Image.fromarray(noise()), Image.Exif()
    exif[0x0112] = 6
    grey = noise()[..., 0].astype(np.uint16) * 257
    film = {"save_all": True, "append_images": [plain.rotate(180)]}
    return {
        "turned.jpg": content_of(plain, "JPEG", exif=exif),
        "turned.png": content_of(with_alpha(), "PNG", exif=exif),
        "grey16.png": content_of(Image.fromarray(grey), "PNG"),
        "rgb16.png": png(16, 2, deep(32_896, 0, 65_535)),
        "palette.png": content_of(with_alpha().quantize(16), "PNG"),
        "palette.gif": content_of(with_alpha(), "GIF"),
        "print.jpg": content_of(plain.convert("CMYK"), "JPEG"),
        "film.gif": content_of(plain, "GIF", **film),
        "film.webp": content_of(with_alpha(), "WEBP", **film),
        "two.jpg": content_of(plain, "MPO", **film),
    }


@pytest.mark.parametrize("name", kinds_of_pictures())
def test_a_picture_is_the_same_through_every_door(tmp_path, name):
    """By path, by row, opened, from a shard, as pixels, as features on disk."""
    content, folder = kinds_of_pictures()[name], tmp_path / "mine"
    write_folder(folder, [row(name)])
    (folder / name).write_bytes(content)
    write_tar(tmp_path / "0.tar", [(name, content), (f"{Path(name).stem}.txt", b"a")])
    wanted = rgb_on_white(Image.open(folder / name))
    (listed,) = load_captions(folder, check_pictures=True)
    (sharded,) = read_shards([tmp_path / "0.tar"])
    given = {
        "a path": folder / name,
        "a row": listed,
        "opened": Image.open(folder / name),
        "in a row": {"image": Image.open(folder / name)},
        "a shard's": sharded,
    }
    (pixels,) = read_shards([tmp_path / "0.tar"], processor)
    assert torch.equal(pixels["pixels"], processor(wanted))
    features = encode_pictures(Tower(), processor, [wanted])
    for door, picture in given.items():
        read = as_picture(picture, door, least=16)
        assert read.mode == "RGB" and np.array_equal(read, wanted), door
        source = PixelSource([picture], processor, least=16)
        assert torch.equal(source[0], processor(wanted)[None]), door
        for i, encode in enumerate((encode_pictures, partial(cache_features, folder))):
            settings = {"progress": False} if i else {}
            made = encode(Tower(), processor, [picture], **settings)
            assert torch.equal(made[:], features), door
    written = generation._picture(str(folder / name), 32, "a prompt")
    assert np.array_equal(written, wanted)  # as `caption` reads it


@pytest.mark.parametrize("value", [-5, 100, 2**30, 0.5])
def test_thirty_two_bits_are_refused_not_guessed(tmp_path, value):
    """How bright 2 ** 30 is, the file does not say."""
    kind = np.float32 if isinstance(value, float) else np.int32
    Image.fromarray(np.full((4, 4), value, dtype=kind)).save(tmp_path / "wide.tiff")
    with pytest.raises(ValueError, match=r"wide\.tiff: brightness in 32 bits"):
        read_picture(tmp_path / "wide.tiff")


@pytest.mark.parametrize("colour_type, colour", [(0, (16,)), (2, (16, 32, 48))])
def test_a_transparent_colour(tmp_path, colour_type, colour):
    """In 8 bits it becomes white; in 16 Pillow would forget it, so it is refused."""
    path = tmp_path / "keyed.png"
    key = png_chunk(b"tRNS", deep(*colour))
    path.write_bytes(png(8, colour_type, bytes(colour), key))
    assert_colour(read_picture(path), WHITE, tolerance=0)
    path.write_bytes(png(8, colour_type, bytes(c + 1 for c in colour), key))
    assert read_picture(path).getpixel((0, 0))[0] == 17
    large = deep(*(c * 257 for c in colour))
    path.write_bytes(png(16, colour_type, large, png_chunk(b"tRNS", large)))
    with pytest.raises(ValueError, match=r"keyed\.png: a transparent colour"):
        read_picture(path)


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "gif"])
def test_an_animation_in_any_format_gives_its_first_frame(tmp_path, suffix):
    """Its transparent part is white, also where the second frame paints over it."""
    first = Image.new("RGBA", (8, 8), (*RED, 255))
    first.paste((0, 0, 0, 0), (0, 0, 4, 4))
    second = Image.new("RGBA", (8, 8), (*GREEN, 255))
    path = tmp_path / f"film.{suffix}"
    first.save(path, save_all=True, append_images=[second], duration=[9, 9])
    assert Image.open(path).n_frames == 2
    assert_colour(read_picture(path), RED)
    assert read_picture(path).getpixel((1, 1)) == WHITE


CUT = {
    "a.png": {},
    "baseline.jpg": {},
    "progressive.jpg": {"progressive": True},
    "lossy.webp": {},
    "lossless.webp": {"lossless": True},
    "a.gif": {},
    "a.bmp": {},
    "a.ppm": {},
    "raw.tiff": {},
    "lzw.tiff": {"compression": "tiff_lzw"},
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of a TIFF, before the error
@pytest.mark.parametrize("name", CUT)
def test_a_cut_picture_is_never_half_a_picture(tmp_path, name):
    """It is the whole picture, if only its end mark is gone, or it is an error."""
    path = tmp_path / name
    Image.fromarray(noise(24, 24)).save(path, **CUT[name])
    whole, wanted = path.read_bytes(), read_picture(path).tobytes()
    refused = 0
    for end in {*range(0, len(whole), 97), *range(len(whole) - 16, len(whole))}:
        path.write_bytes(whole[:end])
        try:
            assert read_picture(path).tobytes() == wanted, f"cut at {end}"
        except ValueError as error:
            assert name in str(error)
            refused += 1
    assert refused > len(whole) // 97


@pytest.mark.parametrize("suffix", ["bmp", "gif", "jpg", "tiff", "webp"])
def test_one_pixel_in_any_format(tmp_path, suffix):
    path = tmp_path / f"pixel.{suffix}"
    Image.new("RGB", (1, 1), RED).save(path)
    assert read_picture(path).size == (1, 1)
    assert_colour(read_picture(path), RED)


def test_small_and_thin_pictures_go_through_the_processor(make_model, tmp_path):
    """One pixel, and the thinnest strips that are read."""
    _, image_processor, _ = make_model()
    for size in ((1, 1), (3000, 1), (1, 3000)):
        Image.new("RGB", size, RED).save(tmp_path / "small.png")
        with time_limit():
            pixels = image_processor(read_picture(tmp_path / "small.png"))
        assert pixels.shape == (3, 32, 32) and pixels.isfinite().all()


@pytest.mark.parametrize("size", [(100_000, 1), (1, 3001)])
def test_a_strip_is_refused(tmp_path, size):
    """To scale its short side up and crop takes gigabytes."""
    Image.new("RGB", size).save(tmp_path / "strip.png")
    assert (tmp_path / "strip.png").stat().st_size < 1000
    with pytest.raises(ValueError, match=r"strip\.png: a strip of"):
        read_picture(tmp_path / "strip.png")


BOMBS = {
    "bomb.bmp": b"BM"
    + struct.pack("<IHHI", 1000, 0, 0, 54)
    + struct.pack("<IiiHHIIiiII", 40, 100_000, 100_000, 1, 24, 0, 0, 1, 1, 0, 0)
    + bytes(900),
    "bomb.gif": b"GIF89a"
    + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0)
    + struct.pack("<BHHHHB", 0x2C, 0, 0, 65_535, 65_535, 0)
    + b"\x02\x01\x00\x00\x3b",
    "bomb.ppm": b"P6 100000 100000 255\n" + bytes(900),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_in_another_format_is_refused_unopened(tmp_path, name):
    (tmp_path / name).write_bytes(BOMBS[name])
    with pytest.raises(ValueError, match=rf"{name}.*decompression bomb"):
        read_picture(tmp_path / name)


@pytest.fixture
def pipe(tmp_path):
    """A caption folder whose second picture is a named pipe."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes on this system")
    folder = write_folder(tmp_path / "mine", [row(), row("pipe.png")])
    os.mkfifo(folder / "pipe.png")
    return folder / "pipe.png"


def test_a_named_pipe_is_not_waited_for(pipe):
    """To open one for reading blocks until somebody writes."""
    with time_limit(20):
        with pytest.raises(ValueError, match=r"pipe\.png"):
            read_picture(pipe)
        with pytest.raises(ValueError, match=r"line 2.*pipe\.png"):
            load_captions(pipe.parent)
        with pytest.warns(UserWarning, match="left out 1 rows"):
            assert len(load_captions(pipe.parent, skip_broken=True)) == 1


@pytest.mark.parametrize(
    "name",
    [
        "away/secret.png",
        "chain.png",
        "inner/../../secret.png",
        "inner/up.png",
        "loop.png",
        "{folder}/../secret.png",
    ],
)
def test_no_way_out_of_the_folder(tmp_path, name):
    """Over a linked folder, a link to a link, dots in the middle, or round a loop."""
    name = name.format(folder=tmp_path / "mine")
    folder = write_folder(tmp_path / "mine", [row(name)])
    Image.new("RGB", (4, 4), GREEN).save(tmp_path / "secret.png")
    (folder / "inner").mkdir()
    (folder / "away").symlink_to(tmp_path)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "chain.png").symlink_to("link.png")
    (folder / "inner" / "up.png").symlink_to(Path("..", "..", "secret.png"))
    (folder / "loop.png").symlink_to("loop.png")
    with time_limit(), pytest.raises(ValueError, match=r"metadata\.jsonl, line 1"):
        load_captions(folder)
    assert load_captions(write_folder(folder, [row("inner/../a.png")]))


# --------------------------------------------------------------------------- captions


@pytest.fixture(scope="module")
def tokenizer(make_model):
    return make_model()[2]


CAPTIONS = {
    "nul": "a\0b",
    "right to left": "פלמינגו ורוד",
    "turned around": "\u202eogimalf\u202c a",
    "chinese": "一只火烈鸟",
    "thai": "นกฟลามิงโก",
    "joined emoji": "👩\u200d🎨 and 🦩",
    "accent apart": "Lo\u0308we, Löwe",
    "blanks inside": "a \t b\nc",
    "almost tokens": "<image <|endofchunk| image> <Image> <image\u200b> </ s> ＜s＞",
    "control characters": "".join(map(chr, range(1, 32))) + "\x7f\x80\ufeff\uffff",
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_any_caption_becomes_labels_that_spell_it(tokenizer, name):
    """Nothing is lost on the way, and nothing in it is taken for a picture."""
    text = CAPTIONS[name]
    batch = collate([(random_features(1, 1)[0], [text])], tokenizer)
    media = tokenizer.convert_tokens_to_ids("<image>")
    assert (batch["lang_x"] == media).sum() == 1
    labels = batch["labels"][0]
    spelled = tokenizer.decode(labels[labels != -100])
    assert spelled == text + "<|endofchunk|>"
    around = collate([(random_features(1, 1)[0], [f" {text}\n"])], tokenizer)
    assert torch.equal(around["lang_x"], batch["lang_x"])


def test_every_special_token_spelled_out_is_refused(tokenizer):
    """Not our two only: `</s>` in a caption would end it."""
    special = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    assert {"<image>", "<|endofchunk|>", "</s>", "<pad>"} <= set(special)
    fine = (random_features(1, 1)[0], ["a lemon"])
    for token in special:
        bad = (random_features(1, 1)[0], [f"a{token}b"])
        with pytest.raises(ValueError, match="row 1, text 1: take .* out of"):
            collate([fine, bad], tokenizer)


def test_a_special_token_in_json_escapes_is_refused(tmp_path):
    line = json.dumps(row(text="a <image>")).replace("<", "\\u003c")
    assert "<" not in line
    with pytest.raises(ValueError, match="line 1: take <image> out"):
        load_captions(write_folder(tmp_path / "mine", [line]))


def test_a_caption_longer_than_the_model_reads_is_named(tokenizer):
    fine = (random_features(1, 1)[0], ["a lemon"])
    long = (random_features(1, 1)[0], ["a lemon " * 20_000])
    with pytest.raises(ValueError, match=r"row 1: \d+ tokens, but the model reads 96"):
        collate([fine, long], tokenizer)


def test_half_a_character_is_refused(tokenizer, tmp_path):
    """A lone surrogate can be spelled in JSON, but not in UTF-8."""
    with pytest.raises(ValueError, match="line 1: the caption is not valid Unicode"):
        load_captions(write_folder(tmp_path / "mine", [row(text="a \ud83e")]))
    with pytest.raises(ValueError, match="row 0, text 1: the caption is not valid"):
        collate([(random_features(1, 1)[0], ["a \ud83e"])], tokenizer)
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1"):
        load_captions(write_folder(tmp_path / "mine", [row("a\udc80.png")]))


def test_no_rows_and_pictures_of_two_sizes_are_named(tokenizer):
    one, other = torch.zeros(1, 1, V, D_IMG), torch.zeros(1, 1, V, D_IMG + 1)
    with pytest.raises(ValueError, match="there is no row"):
        collate([], tokenizer)
    with pytest.raises(ValueError, match=r"row 1: pictures are \(1, 16, 33\)"):
        collate([(one, ["a lemon"]), (other, ["a tent"])], tokenizer)


def test_a_listing_cannot_choose_the_path(tmp_path):
    """Neither by a column of that name nor by naming the file twice."""
    folder = write_folder(tmp_path / "mine", [{**row(), "path": "/etc/hostname"}])
    assert load_captions(folder)[0]["path"] == folder / "a.png"
    Image.new("RGB", (4, 4), RED).save(tmp_path / "secret.png")
    twice = json.dumps(row()).replace("{", '{"file_name": "a.png", ')
    twice = twice.replace('"a.png", "text"', '"../secret.png", "text"')
    assert twice.count("file_name") == 2
    with pytest.raises(ValueError, match="outside the folder"):
        load_captions(write_folder(folder, [twice]))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_a_listing_in_another_encoding_is_refused_or_read_whole(tmp_path, encoding):
    """Two rows go in; fewer never come out in silence."""
    folder = write_folder(tmp_path / "mine", [])
    text = "\n".join(json.dumps(row(text=text)) for text in ("one", "two"))
    (folder / "metadata.jsonl").write_text(text + "\n", encoding=encoding)
    try:
        assert [r["text"] for r in load_captions(folder)] == ["one", "two"]
    except ValueError as error:
        assert "metadata.jsonl" in str(error)


def test_a_number_of_too_many_digits_is_named(tmp_path):
    line = json.dumps(row()).replace("}", ', "size": ' + "9" * 100_000 + "}")
    with time_limit(), pytest.raises(ValueError, match="line 1: not JSON"):
        load_captions(write_folder(tmp_path / "mine", [line]))


# -------------------------------------------------------------- checkpoints: a folder


@pytest.fixture(scope="module")
def good_folder(backbones, tmp_path_factory):
    """The folder that a small Flamingo with open gates was saved to."""
    model, _, _ = build_flamingo(
        "tiny",
        clip_vision_encoder_path=backbones["clip"],
        lang_encoder_path=backbones["opt"],
        tokenizer_path=backbones["opt"],
        **SMALL,
    )
    open_gates(model)
    folder = tmp_path_factory.mktemp("good")
    save_flamingo(model, folder)
    return folder


@pytest.fixture
def saved(good_folder, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(good_folder, tmp_path / "saved"))


WEIGHTS = "flamingo.safetensors"


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float8_e5m2], ids=str
)
def test_weights_in_another_float_are_converted(saved, dtype):
    tensors = {n: t.to(dtype) for n, t in load_file(saved / WEIGHTS).items()}
    save_file(tensors, saved / WEIGHTS)
    model, _, _ = load_flamingo(saved)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, tensor in trained_tensors(model).items():
        assert torch.equal(tensor, tensors[name].float()), name


BAD_WEIGHTS = {
    "int32": lambda t: t.to(torch.int32),
    "uint8": lambda t: t.to(torch.uint8),
    "bool": lambda t: t.to(torch.bool),
    "complex64": lambda t: t.to(torch.complex64),
    "nan": lambda t: t.index_fill(0, torch.tensor([0]), float("nan")),
    "infinity": lambda t: t.index_fill(0, torch.tensor([0]), float("inf")),
    "too large for float32": lambda t: t.double().fill_(1e300),
    "transposed": lambda t: t.T.contiguous(),
    "a row less": lambda t: t[1:].contiguous(),
    "nothing": lambda t: t[:0].contiguous(),
    "a number": lambda t: t.flatten()[0].clone(),
}


@pytest.mark.parametrize("what", BAD_WEIGHTS)
@pytest.mark.parametrize("name", ["new_embeddings", "perceiver.latents"])
def test_one_bad_tensor_is_named(saved, name, what):
    tensors = load_file(saved / WEIGHTS)
    tensors[name] = BAD_WEIGHTS[what](tensors[name])
    try:
        save_file(tensors, saved / WEIGHTS)
    except KeyError:
        pytest.skip("an older safetensors: it cannot write such a file either")
    with pytest.raises(ValueError, match=rf"saved.*\n.*{name}"):
        load_flamingo(saved)


def test_weights_in_four_bits_are_an_error(saved):
    """Two numbers a byte, a format that torch can name but not compute with."""
    tensors = load_file(saved / WEIGHTS)
    rows, width = tensors["new_embeddings"].shape
    tensors["new_embeddings"] = torch.zeros(rows, width, dtype=torch.uint8)
    save_file(tensors, saved / WEIGHTS)
    whole = (saved / WEIGHTS).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header["new_embeddings"] |= {"dtype": "F4", "shape": [rows, 2 * width]}
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + whole[8 + length :]
    (saved / WEIGHTS).write_bytes(content)
    with pytest.raises((ValueError, OSError), match="saved"):
        load_flamingo(saved)


def changed(**changes):
    """A function that changes entries of a config."""
    return lambda config: json.dumps({**config, **changes})


def perceiver(**changes):
    """A function that changes entries of a config's Perceiver."""

    def change(config):
        sizes = {**config["perceiver_kwargs"], **changes}
        return json.dumps({**config, "perceiver_kwargs": sizes})

    return change


CONFIGS = {
    "a number": lambda config: "3",
    "null": lambda config: "null",
    "nothing": lambda config: "",
    "very deep": lambda config: "[" * 100_000,
    "no text": lambda config: json.dumps(config).replace("tiny", "t\xffny"),
    "a list as size": changed(size=[1]),
    "a number as size": changed(size=3),
    "an unknown entry": changed(colour="pink"),
    "a part given twice": changed(vision_encoder=1),
    "negative latents": perceiver(num_latents=-1),
    "half a latent": perceiver(num_latents=2.5),
    "latents as a word": perceiver(num_latents="2"),
    "more latents than memory": perceiver(num_latents=10**13),
    "latents past 64 bits": perceiver(num_latents=10**20),
    "endless layers": perceiver(depth=10**9),
    "no heads": perceiver(heads=0),
    "depth not a number": perceiver(depth=float("nan")),
    "a list for the Perceiver": changed(perceiver_kwargs=[1]),
    "an unknown Perceiver entry": perceiver(colour="pink"),
    "every zero layers": changed(cross_attn_every_n_layers=0),
    "no such layers": changed(decoder_layers_attr_name="model.nothing"),
    "layers that are none": changed(decoder_layers_attr_name="__class__"),
    "a number for the layers": changed(decoder_layers_attr_name=3),
    "a number for the pictures' model": changed(clip_vision_encoder_path=3),
    "a number for the language model": changed(lang_encoder_path=3),
    "a NUL in a path": changed(lang_encoder_path="a\0b"),
    "backbones as a list": changed(backbones=[1]),
    "backbones without fingerprints": changed(backbones={"lang_encoder": {}}),
    "a backbone that does not exist": changed(backbones={"ears": {}}),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of layers of no size
@pytest.mark.parametrize("what", CONFIGS)
def test_a_hostile_config_is_a_clear_error(saved, what):
    config = json.loads((saved / "config.json").read_text())
    text = CONFIGS[what](config)
    (saved / "config.json").write_text(text, encoding="latin-1")
    with time_limit(), pytest.raises((ValueError, OSError)) as caught:
        load_flamingo(saved)
    said = str(caught.value)  # it names the folder, or the very entry
    entries = ("no size 3;", "cross_attn_every_n_layers is 0,", "cannot load the lang")
    assert str(saved) in said or said.startswith(entries)


# -------------------------------------------------------------- checkpoints: training


class Bomb:
    """A pickle of this writes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.write_text, (Path(self.path), "went off")


SETTINGS = {"n_steps": 2, "batch_size": 2, "report_every": 1, "seed": 3}
TEXTS = ["a lemon", "a tent", "a bear above a tent"]
FEATURES = random_features(3, 1, seed=5)[:, 0].half()  # (pictures, F, v, d_img)


@pytest.fixture(scope="module")
def good_checkpoint(make_model, tmp_path_factory):
    """The bytes of a checkpoint after one of two steps."""
    model, _, tokenizer = make_model()
    path = tmp_path_factory.mktemp("good") / "last.pt"

    def stop(line):
        if line.split()[1] == "2":
            raise OSError("stopped")

    with pytest.raises(OSError):
        train(
            model, tokenizer, FEATURES, TEXTS, report=stop, checkpoint=path, **SETTINGS
        )
    return path.read_bytes()


@pytest.fixture(scope="module")
def fresh(make_model):
    """A model to load checkpoints into, and what its tensors are at first."""
    model, _, _ = make_model()
    return model, {name: t.clone() for name, t in model.state_dict().items()}


@pytest.fixture
def resume(good_checkpoint, fresh, tmp_path):
    """A checkpoint to be damaged, and a function that goes on from it.

    The function returns what `load_checkpoint` does, and the optimizers. After an error
    the model must be as it was.
    """
    settings = run_settings(
        FEATURES, TEXTS, 2, 2, lr=1e-3, gate_factor=30.0, with_muon=True, seed=3
    )
    path, (model, before) = tmp_path / "last.pt", fresh
    path.write_bytes(good_checkpoint)
    model.load_state_dict(before)

    def load():
        optimizers = make_optimizers(model, 1e-3)
        try:
            with time_limit():
                done = load_checkpoint(path, model, optimizers, settings)
            return *done, optimizers
        except ValueError:
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor, before[name]), f"{name} was changed"
            raise

    return path, load


def test_the_checkpoint_of_these_tests_is_a_good_one(resume):
    """What the tests below damage can be loaded as it is."""
    _, load = resume
    step, history, _ = load()
    assert step == 1 and [entry["step"] for entry in history] == [1]


def in_a_dict(bomb, path):
    state = torch.load(path, weights_only=True)
    torch.save({**state, "history": bomb}, path)


def as_a_tensor(bomb, path):
    state = torch.load(path, weights_only=True)
    state["trained"][next(iter(state["trained"]))] = bomb
    torch.save(state, path)


def bare(bomb, path):
    path.write_bytes(pickle.dumps(bomb))


def in_the_old_format(bomb, path):
    torch.save({"trained": bomb}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("hide", [in_a_dict, as_a_tensor, bare, in_the_old_format])
def test_code_in_a_checkpoint_does_not_run(resume, tmp_path, hide):
    path, load = resume
    hide(Bomb(tmp_path / "crater"), path)
    with pytest.raises(ValueError, match=r"last\.pt"):
        load()
    assert not (tmp_path / "crater").exists()


def test_the_bomb_of_these_tests_goes_off(tmp_path):
    """Or the test above would pass with any reader."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "crater")))
    assert (tmp_path / "crater").read_text() == "went off"


def test_a_checkpoint_cut_anywhere_is_an_error(resume):
    path, load = resume
    whole = path.read_bytes()
    for end in np.linspace(0, len(whole) - 1, 12).astype(int).tolist():
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"last\.pt"):
            load()


def test_a_checkpoint_with_a_flipped_bit_is_an_error(resume):
    """In the middle of a tensor, where nothing but the checksum notices."""
    path, load = resume
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    whole[largest.header_offset + largest.file_size // 2 + 200] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"last\.pt"):
        load()


def of_trained(change):
    """A function that changes the first tensor that was trained."""

    def rewrite(state):
        name = next(iter(state["trained"]))
        state["trained"][name] = change(state["trained"][name])

    return rewrite


def of_optimizer(change):
    """A function that changes what the first optimizer knows of its first tensor."""

    def rewrite(state):
        known = state["optimizers"][0]["state"][0]
        state["optimizers"][0]["state"][0] = {n: change(t) for n, t in known.items()}

    return rewrite


def put(name, value):
    """A function that replaces an entry of a checkpoint."""
    return lambda state: state.update({name: value})


STATES = {
    "half precision": of_trained(lambda t: t.half()),
    "whole numbers": of_trained(lambda t: t.to(torch.int32)),
    "complex numbers": of_trained(lambda t: t.to(torch.complex64)),
    "not a number": of_trained(lambda t: t * float("nan")),
    "infinity": of_trained(lambda t: t + float("inf")),
    "another size": of_trained(lambda t: t[1:]),
    "a list for a tensor": of_trained(lambda t: t.tolist()),
    "a tensor that is missing": lambda state: state["trained"].popitem(),
    "a tensor too many": lambda state: state["trained"].update(more=torch.ones(1)),
    "a list of tensors": put("trained", [torch.ones(1)]),
    "momentum of another size": of_optimizer(lambda t: t[..., 1:]),
    "momentum not a number": of_optimizer(lambda t: t * float("nan")),
    "a word for momentum": of_optimizer(lambda t: "fast"),
    "an optimizer less": lambda state: state["optimizers"].pop(),
    "a number for the optimizers": put("optimizers", 3),
    "a word for the step": put("step", "one"),
    "a negative step": put("step", -1),
    "a step not a number": put("step", float("nan")),
    "more steps than were made": put("step", 10**6),
    "a number for the history": put("history", 3),
    "no settings": put("settings", None),
    "a list of no settings": put("settings", []),
    "no random state": put("random", {}),
    "a random state cut short": lambda state: state["random"].update(
        cpu=state["random"]["cpu"][:7]
    ),
}


@pytest.mark.parametrize("what", STATES)
def test_a_checkpoint_with_something_else_in_it_is_an_error(resume, what):
    """And the model is as it was before."""
    path, load = resume
    state = torch.load(path, weights_only=True)
    STATES[what](state)
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"last\.pt"):
        load()


def test_rates_in_a_checkpoint_are_not_believed(resume):
    """The optimizers keep the rates of this run, or there is an error."""
    path, load = resume
    state = torch.load(path, weights_only=True)
    state["optimizers"][0]["param_groups"][0]["peak"] = float("nan")
    torch.save(state, path)
    try:
        optimizers = load()[2]
    except ValueError as error:
        assert "last.pt" in str(error)
    else:
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        assert {group["peak"] for group in groups} <= {1e-3, 1e-3 * 30.0}


# ---------------------------------------------------------------------------- fuzzing


def test_the_fuzzer_finds_nothing_in_its_first_inputs():
    script = str(ROOT / "tools" / "measure" / "fuzz.py")
    call = [sys.executable, script, "--inputs", "300", "--seed", "1"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing else happened" in done.stdout
