"""Caption folders, hostile pictures, scenes and their splits, batches, pair texts."""

import itertools
import json
import struct
import sys
import types
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import D_IMG, ROOT, V
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.features import check as is_built_in
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import flamingo_lite.data as data
from flamingo_lite import (
    check_text,
    collate,
    encode_pictures,
    hold_out,
    interleave,
    is_held_out,
    load_captions,
    make_scenes,
    merge_captions,
    read_picture,
    trim,
    whole_text,
)

EMOJI = ROOT / "data" / "emoji"
UNSEEN = {"twemoji", "openmoji"}
WHITE, RED = (255, 255, 255), (255, 0, 0)


def write_folder(folder, rows, pictures=("a.png",)):
    """A caption folder: rows as dicts or as raw lines, and red pictures."""
    folder.mkdir(exist_ok=True)
    for name in pictures:
        Image.new("RGB", (8, 6), RED).save(folder / name)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def row(file_name="a.png", text="a red wall"):
    return {"file_name": file_name, "text": text}


# ------------------------------------------------------------------- caption folders


def test_a_caption_folder(tmp_path):
    folder = write_folder(tmp_path / "mine", [{**row(), "mood": "calm"}, row("b.png")])
    Image.new("L", (3, 3)).save(folder / "b.png")
    first, second = load_captions(folder)
    assert first == {**row(), "mood": "calm", "path": folder / "a.png"}
    assert second["path"] == folder / "b.png"
    assert load_captions(str(folder)) == [first, second]


def test_empty_lines_are_passed_over(tmp_path):
    rows = load_captions(write_folder(tmp_path / "mine", ["", row(), " ", row(), ""]))
    assert len(rows) == 2


def test_no_metadata_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl.*file_name.*text"):
        load_captions(tmp_path)
    with pytest.raises(FileNotFoundError, match="no_such_folder"):
        load_captions(tmp_path / "no_such_folder")


BAD_ROWS = {
    "not JSON": '{"file_name": "a.png", ',
    "very deep JSON": "[" * 100_000,
    "not an object": '["a.png", "a wall"]',
    "no file_name": {"text": "a wall"},
    "a number as file_name": {"file_name": 3, "text": "a wall"},
    "no text": {"file_name": "a.png"},
    "an empty text": row(text=""),
    "blanks as text": row(text=" \n\t"),
    "marks as text": row(text="\ufeff\u200b \u2060"),
    "marks as one of two texts": row(text=["a wall", "\u200d"]),
    "a number as text": row(text=7),
    "a special token in the text": row(text="a <image> in words"),
    "the other special token": row(text="the end<|endofchunk|>"),
    "a missing picture": row("gone.png"),
    "a picture that is none": row("text.png"),
    "an empty picture": row("empty.png"),
    "the folder itself": row("."),
    "a path out of the folder": row("../secret.png"),
    "an absolute path": row("{outside}/secret.png"),  # a good picture
    "a link out of the folder": row("link.png"),
    "a NUL in the name": row("a\0.png"),
    "a very long name": row("a" * 5000),
}


@pytest.fixture
def broken_folder(tmp_path):
    """Good rows first and last; what a test puts between them is bad."""
    Image.new("RGB", (8, 6), RED).save(tmp_path / "secret.png")

    def write(bad):
        bad = json.loads(json.dumps(bad).replace("{outside}", str(tmp_path)))
        folder = write_folder(
            tmp_path / "mine", [row(), bad, row("b.png")], ("a.png", "b.png")
        )
        (folder / "text.png").write_text("I am a text")
        (folder / "empty.png").touch()
        (folder / "link.png").symlink_to(tmp_path / "secret.png")
        return folder

    return write


@pytest.mark.parametrize("what", BAD_ROWS)
def test_a_bad_row_is_named_and_can_be_skipped(broken_folder, what):
    folder = broken_folder(BAD_ROWS[what])
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2"):
        load_captions(folder)
    with pytest.warns(UserWarning, match=r"left out 1 rows:\n.*line 2"):
        rows = load_captions(folder, skip_broken=True)
    assert [r["file_name"] for r in rows] == ["a.png", "b.png"]


def test_an_unreadable_picture_is_named(broken_folder):
    with pytest.raises(ValueError, match=r"text\.png"):
        load_captions(broken_folder(row("text.png")))


def test_a_link_inside_the_folder_is_fine(tmp_path):
    folder = write_folder(tmp_path / "mine", [row("link.png")])
    (folder / "link.png").symlink_to(folder / "a.png")
    assert len(load_captions(folder)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "ein Zelt über dem Löwen",
        "一只火烈鸟",
        "פלמינגו ורוד",
        "🦩 and \u200d joiners",
        "two\u2028lines, \u0085 and \x0b too",
        "a\0b",
        "<img> <|end|> </s",
        "word " * 20_000,
    ],
    ids=["umlauts", "chinese", "hebrew", "emoji", "separators", "nul", "tags", "long"],
)
def test_captions_in_any_script_arrive_as_they_are(tmp_path, text):
    line = json.dumps(row(text=text), ensure_ascii=False)
    (loaded,) = load_captions(write_folder(tmp_path / "mine", [line]))
    assert loaded["text"] == text.rstrip()


MARKS = ["\ufeff", "\u200b", "\u200c", "\u200d", "\u2060", " ", "\n", "\r\n", "\u00a0"]


@pytest.mark.parametrize("mark", MARKS)
def test_what_cannot_be_seen_at_the_ends_is_no_caption(tmp_path, mark):
    """Each would be a token, which the model learns to write."""
    texts = [f"a red{mark}wall", f"{mark}a red{mark}wall{mark} ", [f" a{mark}", "b"]]
    folder = write_folder(tmp_path / "mine", [row(text=text) for text in texts])
    rows = load_captions(folder)
    assert [r["text"] for r in rows] == [texts[0], texts[0], ["a", "b"]]
    merged = merge_captions(rows)
    assert [r["text"] for r in merged] == [[texts[0], "a", "b"]]
    (folder / "metadata.jsonl").unlink()
    table = f'file_name,text\na.png,"{mark}a wall{mark}"\n'
    (folder / "metadata.csv").write_text(table, encoding="utf-8", newline="")
    assert [r["text"] for r in load_captions(folder)] == ["a wall"]
    with pytest.raises(ValueError, match="row 9: the caption is empty"):
        check_text(mark, "row 9")


def test_what_is_held_out_stays_so_when_others_come_or_go():
    rows = [{"file_name": f"{n}.jpg", "text": "a dog"} for n in range(600)]
    train_on, test_with = hold_out(rows)
    assert sorted(train_on + test_with, key=rows.index) == rows
    assert 90 < len(test_with) < 150
    assert train_on == [row for row in rows if row in train_on]  # in their order
    fewer, some = hold_out(rows[::-3])
    assert all(row in test_with for row in some)
    assert all(row in train_on for row in fewer)
    twice = hold_out([row for row in rows for _ in range(2)], 3)
    assert not {r["file_name"] for r in twice[0]} & {r["file_name"] for r in twice[1]}


@pytest.mark.parametrize("every", [1, 0, -5, 2.5])
def test_one_in_how_many_is_a_number_from_2(every):
    with pytest.raises(ValueError, match="hold out one in how many"):
        hold_out([{"file_name": "a.jpg"}], every)


def test_no_part_is_empty():
    rows = [{"file_name": f"{n}.jpg"} for n in range(5)]
    with pytest.raises(ValueError, match="leaves 5 to train on and 0 to test with"):
        hold_out(rows)
    with pytest.raises(ValueError, match="0 to train on and 0 to test with"):
        hold_out([])


def test_a_listing_that_is_no_utf8_is_named(tmp_path):
    folder = write_folder(tmp_path / "mine", [])
    line = json.dumps(row(text="Löwe"), ensure_ascii=False)
    (folder / "metadata.jsonl").write_bytes(line.encode("latin-1"))
    with pytest.raises(ValueError, match=r"metadata\.jsonl"):
        load_captions(folder)


def test_check_text_names_the_place():
    for text in ("<image>", "a<|endofchunk|>", "", "  ", None, 3):
        with pytest.raises(ValueError, match="row 9"):
            check_text(text, "row 9")
    check_text("a lemon", "row 9")


# -------------------------------------------------------------------- hostile pictures


def assert_colour(picture, colour, tolerance=12):
    """The middle of an RGB picture has about this colour."""
    assert picture.mode == "RGB"
    middle = picture.getpixel((picture.width // 2, picture.height // 2))
    assert np.abs(np.array(middle) - np.array(colour)).max() <= tolerance


def test_pictures_in_other_formats(tmp_path):
    red = Image.new("RGB", (20, 10), RED)
    palette = Image.new("P", (8, 8))
    palette.putpalette([0, 255, 0, *RED])
    for name, picture, colour, options in (
        ("cmyk.jpg", red.convert("CMYK"), RED, {}),
        ("grey.png", Image.new("L", (4, 4), 100), (100, 100, 100), {}),
        ("bilevel.png", Image.new("1", (4, 4), 1), WHITE, {}),
        ("pixel.png", Image.new("RGB", (1, 1), RED), RED, {}),
        ("line.png", Image.new("RGB", (3000, 1), RED), RED, {}),
        ("clear.png", Image.new("RGBA", (4, 4), (0, 0, 255, 0)), WHITE, {}),
        ("half.png", Image.new("RGBA", (4, 4), (0, 0, 255, 128)), (127, 127, 255), {}),
        ("grey_alpha.png", Image.new("LA", (4, 4), (0, 0)), WHITE, {}),
        ("palette.png", palette, (0, 255, 0), {}),
        ("palette_alpha.png", palette, WHITE, {"transparency": 0}),
    ):
        picture.save(tmp_path / name, **options)
        read = read_picture(tmp_path / name)
        assert read.size == picture.size, name
        assert_colour(read, colour)


def test_sixteen_bits_are_scaled_not_cut(tmp_path):
    half = np.full((4, 4), 32768, dtype=np.uint16)
    Image.fromarray(half).save(tmp_path / "deep.png")
    assert_colour(read_picture(tmp_path / "deep.png"), (128, 128, 128))


def test_wrong_extension_is_read_by_its_content(tmp_path):
    Image.new("RGB", (4, 4), RED).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert_colour(read_picture(tmp_path / "a.jpg"), RED)


def test_exif_rotation_is_applied(tmp_path):
    picture = Image.new("RGB", (20, 10), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").size == (10, 20)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, (0, 255, 0))]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    assert_colour(read_picture(tmp_path / "film.gif"), RED)


def noise_picture(path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


def png_chunk(kind, data):
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum


def bomb():
    """A small PNG that says that it is 100,000 pixels wide and high."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            png_chunk(b"IHDR", header),
            png_chunk(b"IDAT", pixels),
            png_chunk(b"IEND", b""),
        )
    )


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif"])
def test_truncated_pictures_are_named(tmp_path, suffix):
    """Cut anywhere, a file is a picture or a named error; never anything else."""
    path = tmp_path / f"cut.{suffix}"
    whole = noise_picture(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"cut\.{suffix}"):
        read_picture(path)
    for end in np.random.default_rng(1).integers(0, len(whole), 25).tolist():
        path.write_bytes(whole[:end])
        try:
            assert read_picture(path).mode == "RGB"
        except ValueError as error:
            assert path.name in str(error)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_pictures_with_flipped_bytes(tmp_path, suffix):
    path = tmp_path / f"flipped.{suffix}"
    whole = noise_picture(path)
    rng = np.random.default_rng(2)
    for _ in range(25):
        damaged = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 200), 4):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert read_picture(path).mode == "RGB"
            except ValueError as error:
                assert path.name in str(error)


@pytest.mark.parametrize(
    "content", [b"", b"no picture", bomb()], ids=["0", "text", "bomb"]
)
def test_what_is_no_picture_is_named(tmp_path, content):
    path = tmp_path / "strange.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"strange\.png"):
        read_picture(path)


def boxed(brand):
    """The first bytes of a file of the ISO base format, as phones and cameras write."""
    return b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1" + brand + bytes(200)


PHONES = {
    b"heic": "it is a HEIC photograph of a phone: pip install pillow-heif, or convert",
    b"mif1": "it is a HEIC photograph of a phone: pip install pillow-heif, or convert",
    b"avif": "it is an AVIF picture, which this Pillow cannot read: .*, or convert",
    b"isom": "cannot identify image file",  # a film
}


@pytest.mark.parametrize("brand", PHONES)
def test_a_phones_photograph_says_what_it_is(tmp_path, monkeypatch, brand):
    """Also as bytes, under another ending, and in a listing."""
    monkeypatch.setattr(data, "is_built_in", lambda name: False)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # not installed
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    path = tmp_path / "a.jpg"
    folder = write_folder(tmp_path, [row("a.jpg")])
    path.write_bytes(boxed(brand))
    for content in (None, boxed(brand)):
        with pytest.raises(ValueError, match=rf"a\.jpg: {PHONES[brand]}"):
            read_picture(path, 64, content)
    with pytest.raises(ValueError, match=rf"line 1: .*a\.jpg: {PHONES[brand]}"):
        load_captions(folder)


def test_a_phones_photograph_is_read_where_it_can_be(tmp_path, monkeypatch):
    """As by pillow-heif, which has to be asked to make itself known to Pillow."""

    def register():
        def read(file, name):
            return Image.new("RGB", (4, 3), RED)

        Image.register_open("HEIF", read, lambda head: head[4:12] == b"ftypheic")

    plugin = types.SimpleNamespace(register_heif_opener=register)
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    (tmp_path / "a.heic").write_bytes(boxed(b"heic"))
    for content in (None, boxed(b"heic")):
        picture = read_picture(tmp_path / "a.heic", content=content)
        assert picture.size == (4, 3) and picture.getpixel((0, 0)) == RED


@pytest.mark.skipif(not is_built_in("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read_where_pillow_can(tmp_path):
    Image.new("RGBA", (16, 12), (0, 0, 0, 0)).save(tmp_path / "a.avif")
    assert_colour(read_picture(tmp_path / "a.avif"), WHITE)
    assert_colour(read_picture("b", content=(tmp_path / "a.avif").read_bytes()), WHITE)


def test_a_picture_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.png"):
        read_picture(tmp_path / "gone.png")


# ----------------------------------------------------------------- the book's pictures


@pytest.fixture(scope="module")
def emoji():
    """The rows of data/emoji; loading them reads every picture."""
    return load_captions(EMOJI, check_pictures=True)


def test_every_file_is_listed_once_and_readable(emoji):
    listed = [r["file_name"] for r in emoji]
    files = {str(p.relative_to(EMOJI)) for p in EMOJI.glob("*/*")}
    assert len(listed) == len(set(listed)) and set(listed) == files


def test_enough_things_with_and_without_names(emoji):
    named = {r["thing"] for r in emoji if r["named"]}
    unnamed = {r["thing"] for r in emoji if not r["named"]}
    assert len(named) >= 100 and len(unnamed) >= 100 and not named & unnamed
    for r in emoji:
        assert 1 <= len(r["thing"].replace("-", " ").split()) <= 6
        assert r["text"].endswith(r["thing"]) and r["text"].split()[0] in ("a", "an")


def test_two_studios_are_never_trained_on(emoji):
    assert {r["studio"] for r in emoji if not r["trained"]} == UNSEEN
    assert {r["studio"] for r in emoji if r["trained"]}.isdisjoint(UNSEEN)
    things = {r["thing"] for r in emoji if r["named"]}
    for studio in UNSEEN:  # and they drew every named thing
        assert {r["thing"] for r in emoji if r["studio"] == studio} >= things


def test_held_out_pairs(emoji):
    """The same in either order, about one in eight, no thing always or never."""
    things = sorted({r["thing"] for r in emoji if r["named"]})
    pairs = list(itertools.combinations(things, 2))
    held = [pair for pair in pairs if is_held_out(*pair)]
    assert all(is_held_out(a, b) == is_held_out(b, a) for a, b in pairs)
    assert 0.11 < len(held) / len(pairs) < 0.14
    for thing in things:
        assert 0 < sum(thing in pair for pair in held) < len(things) - 1


def named_of(emoji, studios, n_things=30):
    things = sorted({r["thing"] for r in emoji if r["named"]})[:n_things]
    return [r for r in emoji if r["thing"] in things and r["studio"] in studios]


def as_bytes(scenes):
    return [(scene["picture"].tobytes(), scene["text"]) for scene in scenes]


def test_scenes_are_the_same_for_everyone(emoji):
    rows = named_of(emoji, {"noto", "fluent"})
    once = as_bytes(make_scenes(rows, 40, seed=3))
    assert once == as_bytes(make_scenes(rows, 40, seed=3))
    assert once != as_bytes(make_scenes(rows, 40, seed=4))
    assert once[:10] == as_bytes(make_scenes(rows, 10, seed=3))


@pytest.mark.parametrize("held_out", [False, True])
def test_scenes_keep_to_their_split(emoji, held_out):
    scenes = make_scenes(
        named_of(emoji, {"noto"}), 120, seed=0, pairs=0.8, held_out=held_out
    )
    pairs = [scene["things"] for scene in scenes if len(scene["things"]) == 2]
    assert len(scenes) == 120 and 60 < len(pairs) < 120
    assert all(is_held_out(*pair) == held_out for pair in pairs)


def test_scenes_say_what_they_show(emoji):
    rows = named_of(emoji, {"noto"})
    texts = {r["thing"]: r["text"] for r in rows}
    for scene in make_scenes(rows, 60, seed=1):
        names = [texts[thing] for thing in scene["things"]]
        relations = (" to the left of ", " above ")
        assert scene["text"] in {names[0], *(r.join(names) for r in relations)}
        assert scene["picture"].size == (64, 64) and scene["picture"].mode == "RGB"
        check_text(scene["text"], "scene")


# --------------------------------------------------------------------------- batches


def example(*texts, n_pictures=None):
    n = len(texts) if n_pictures is None else n_pictures
    return torch.randn(n, 1, V, D_IMG), list(texts)


@pytest.fixture(scope="module")
def tokenizer(make_model):
    return make_model()[2]


def test_interleave():
    assert interleave(["a lemon", "a tent"]) == (
        "<image>a lemon<|endofchunk|><image>a tent<|endofchunk|>"
    )
    with pytest.raises(ValueError, match="text 2"):
        interleave(["a lemon", "a <image>"])


def test_collate(tokenizer):
    """Features first come first, labels decode to the texts, padding is nothing."""
    examples = [example("a lemon"), example("a tent", "a bear above a tent")]
    batch = collate(examples, tokenizer)
    assert batch["vision_features"].shape == (2, 2, 1, V, D_IMG)
    for i, (features, texts) in enumerate(examples):
        assert torch.equal(batch["vision_features"][i, : len(features)], features)
        assert not batch["vision_features"][i, len(features) :].any()
        kept = batch["labels"][i][batch["labels"][i] != -100]
        assert tokenizer.decode(kept) == "".join(f"{t}<|endofchunk|>" for t in texts)
        whole = tokenizer.decode(batch["lang_x"][i][batch["attention_mask"][i].bool()])
        assert whole == tokenizer.bos_token + interleave(texts)
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_collate_takes_cached_halves(tokenizer):
    features = torch.randn(1, 1, V, D_IMG).half()
    batch = collate([(features, ["a lemon"])], tokenizer)
    assert batch["vision_features"].dtype == torch.float32


@pytest.mark.parametrize(
    "bad, message",
    [
        (example("a tent", n_pictures=2), "row 1: 2 pictures, but 1 texts"),
        (example("a tent", "a bear", n_pictures=1), "row 1: 1 pictures, but 2 texts"),
        (example("a tent<image>"), "<image>"),
        (example(""), "empty"),
    ],
)
def test_collate_refuses_what_does_not_fit(tokenizer, bad, message):
    with pytest.raises(ValueError, match=message):
        collate([example("a lemon"), bad], tokenizer)


def test_collate_leaves_the_tokenizer_as_it_was(tokenizer):
    """A reader who pads left for generation still does so after a training batch."""
    tokenizer.padding_side = "left"
    batch = collate([example("a lemon"), example("a bear above a tent")], tokenizer)
    assert (batch["attention_mask"][:, 0] == 1).all(), "a batch is padded on the right"
    assert tokenizer.padding_side == "left"


# ---------------------------------------------------------------------- pairs of text


def smol_tokenizer():
    """Byte-level and without a start token, as SmolLM2's; learned from a few lines.

    It knows runs of blanks, and some characters of several bytes as one token, others
    as two or more.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = ["question: is it a Löwe? answer: yes", "a    lemon\n\n  owl", "一只 火 🦩"]
    tokenizer.train_from_iterator(lines * 20, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    new = ["<|endofchunk|>", "<image>"]
    fast.add_special_tokens({"additional_special_tokens": new})
    return fast


@pytest.fixture(scope="module")
def tokenizers(tokenizer):
    """{name: tokenizer}, all of them byte-level."""
    return {"opt": tokenizer, "smol": smol_tokenizer()}


def bytes_of(tokens, tokenizer):
    """The bytes that each token stands for, by GPT-2's table of signs."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in plain)
    table |= {chr(256 + n): byte for n, byte in enumerate(others)}
    return [
        token.encode()
        if token in tokenizer.all_special_tokens
        else bytes(table[sign] for sign in token)
        for token in tokens
    ]


def slow_labels(texts, ids, tokenizer):
    """Labels of one row without padding, from the bytes of its text.

    A token has a label if it is of a text or ends it, and holds nothing that is given.
    Of both parts the blanks at the ends are left out.
    """
    is_asked = []  # of each byte of the line
    for text in texts:
        given, asked = map(trim, text if isinstance(text, tuple) else ("", text))
        if given and asked:
            asked = f" {asked}"
        for part, has_label in (
            ("<image>", False),
            (given, False),
            (asked, True),
            ("<|endofchunk|>", True),
        ):
            is_asked += [has_label] * len(part.encode())
    tokens, labels, place = tokenizer.convert_ids_to_tokens(ids), [], 0
    for token, content in zip(tokens, bytes_of(tokens, tokenizer), strict=True):
        if token == tokenizer.bos_token:
            labels.append(-100)
            continue
        own = is_asked[place : place + len(content)]
        place += len(content)
        labels.append(tokenizer.convert_tokens_to_ids(token) if all(own) else -100)
    assert place == len(is_asked)
    return labels


def check_labels(rows, tokenizer):
    """The labels of a batch are those of the slow twin, in every row."""
    batch = collate([example(*texts) for texts in rows], tokenizer)
    for i, texts in enumerate(rows):
        n_tokens = int(batch["attention_mask"][i].sum())
        ids, labels = (batch[n][i].tolist() for n in ("lang_x", "labels"))
        assert labels[:n_tokens] == slow_labels(texts, ids[:n_tokens], tokenizer)
        assert set(labels[n_tokens:]) <= {-100}
    return batch


PAIRS = {
    "a question": ("question: is there an owl? answer:", "yes"),
    "asked is empty": ("a lemon", ""),
    "given is empty": ("", "a lemon"),
    "umlauts": ("ein Löwe über", "dem Löß"),
    "an unknown emoji is given": ("🦊🦊 and 🐝", "🦊 is a fox"),
    "a known emoji": ("a 🦩", "🦩"),
    "chinese": ("一只火烈鸟 is", "一只 火"),
    "joined signs": ("e\u0301 👩‍🔬", "e\u0301 👩‍🔬"),
    "digits": ("12345 and 6", "7 89"),
    "blanks at the seam": ("a lemon  ", "  owl"),
    "lines at the seam": ("a lemon\n", "\nowl"),
    "blanks are given": ("    ", "a lemon"),
    "blanks are asked": ("a lemon", "   "),
    "blanks inside": ("a    lemon", "a    lemon"),
    "almost a token": ("<image <|endofchunk| </s", "> <image"),
    "a NUL": ("a\0b", "\0"),
}


@pytest.mark.parametrize("name", ["opt", "smol"])
@pytest.mark.parametrize("what", PAIRS)
def test_what_is_given_has_no_label(tokenizers, name, what):
    """Alone, and with other texts before it, behind it and in other rows."""
    pair, tokenizer = PAIRS[what], tokenizers[name]
    check_labels([[pair]], tokenizer)
    rows = [["an owl", pair, "an owl"], [("first,", "an owl")], [pair, pair]]
    check_labels(rows, tokenizer)


PARTS = ["owl", "a", " ", "  ", "\n", "ö", "一", "🦩", "🐝", "7", "?", "’s"]
part = st.lists(st.sampled_from(PARTS), max_size=6).map("".join)
any_text = st.one_of(part, st.tuples(part, part))


@pytest.mark.parametrize("name", ["opt", "smol"])
@given(st.lists(st.lists(any_text, min_size=1, max_size=3), min_size=1, max_size=2))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_labels_are_those_of_the_slow_twin(tokenizers, name, rows):
    assume(all(whole_text(text).strip() for texts in rows for text in texts))
    check_labels(rows, tokenizers[name])


def test_labels_of_pairs_spell_what_is_asked(tokenizers):
    texts = ["an owl", ("question: how many? answer:", "two"), ("an owl", "")]
    for tokenizer in tokenizers.values():
        batch = check_labels([texts], tokenizer)
        kept = batch["labels"][0][batch["labels"][0] != -100]
        wanted = "an owl<|endofchunk|> two<|endofchunk|><|endofchunk|>"
        assert tokenizer.decode(kept) == wanted


def test_a_pair_changes_labels_only(tokenizer):
    """Text, mask and pictures are those of the same words in one string."""
    features = torch.randn(2, 1, V, D_IMG)
    pairs = [("question: is it? answer:", "yes"), ("an owl", "")]
    one = collate([(features, pairs)], tokenizer)
    other = collate([(features, [whole_text(pair) for pair in pairs])], tokenizer)
    for name in ("vision_features", "lang_x", "attention_mask"):
        assert torch.equal(one[name], other[name])
    assert (one["labels"] != other["labels"]).any()
    same = collate([(features, [("", whole_text(pair)) for pair in pairs])], tokenizer)
    assert torch.equal(same["labels"], other["labels"])


def test_whole_text():
    assert whole_text("a lemon") == "a lemon"
    assert whole_text(("is it?", "yes")) == "is it? yes"
    assert whole_text(("is it?", "")) == "is it?"
    assert whole_text(("", "yes")) == "yes"
    assert whole_text(("", "")) == ""


def test_interleave_takes_pairs():
    assert interleave([("is it?", "yes"), "a tent", ("an owl", "")]) == (
        "<image>is it? yes<|endofchunk|><image>a tent<|endofchunk|>"
        "<image>an owl<|endofchunk|>"
    )
    with pytest.raises(ValueError, match="text 2"):
        interleave(["a lemon", ("a lemon", "a <image>")])
    with pytest.raises(ValueError, match="text 1: the caption is empty"):
        interleave([("", "")])


@pytest.mark.parametrize("name", ["opt", "smol"])
def test_special_tokens_in_a_pair_are_refused(tokenizers, name):
    """In either part, and the error says where and which."""
    tokenizer = tokenizers[name]
    special = {"opt": "</s>", "smol": "<|im_start|>"}[name]
    for token in ("<image>", "<|endofchunk|>", special, tokenizer.pad_token):
        for bad in ((f"a {token}", "owl"), ("an owl", f"{token}a"), (token, "")):
            good = example(("first,", "an owl"), "a tent")
            with pytest.raises(ValueError, match="row 1, text 2: take") as caught:
                collate([good, example("a tent", bad)], tokenizer)
            assert token in str(caught.value)


NO_PAIRS = [("a", None), (None, "a"), (1, "a"), ("a",), ("a", "b", "c"), ()]
NO_PAIRS += [(("a", "b"), "c"), (b"a", "b"), (["a"], "b")]


@pytest.mark.parametrize("bad", NO_PAIRS, ids=repr)
def test_a_pair_that_is_none_is_refused(tokenizer, bad):
    for try_it in (
        lambda: whole_text(bad),
        lambda: interleave(["a tent", bad]),
        lambda: collate([example("a tent", bad)], tokenizer),
    ):
        with pytest.raises(ValueError, match="want a text or") as caught:
            try_it()
        assert repr(bad) in str(caught.value)


@pytest.mark.parametrize("bad", [["a", "b"], None, 3, ("", ""), (" ", "\n")], ids=repr)
def test_no_text_at_all_is_refused(tokenizer, bad):
    with pytest.raises(ValueError, match="row 0, text 2: the caption is empty or not"):
        collate([example("a tent", bad)], tokenizer)


def test_encode_pictures_is_what_the_model_sees(make_model):
    """In batches of any size, and as the model itself encodes the pixels."""
    model, image_processor, _ = make_model()
    colours = ("red", "green", "blue", "white", "pink")
    pictures = [Image.new("RGB", (40, 40), colour) for colour in colours]
    features = encode_pictures(model.vision_encoder, image_processor, pictures, 2)
    assert features.shape == (5, 1, V, D_IMG) and features.dtype == torch.float16
    pixels = torch.stack([image_processor(picture) for picture in pictures])
    with torch.no_grad():
        wanted = model.vision_encoder(pixels)[1]
    torch.testing.assert_close(features[:, 0].float(), wanted, rtol=2e-3, atol=2e-3)


def test_data_is_light():
    """The default size stays under 32 MB, every weights file under 12 MB; the extra
    size smol, which no chapter needs, under 25 MB by itself."""
    files = [p for p in Path(ROOT / "data").rglob("*") if p.is_file()]
    smol = [p for p in files if p.parent.name == "smol_flamingo"]
    assert sum(p.stat().st_size for p in set(files) - set(smol)) < 32e6
    assert sum(p.stat().st_size for p in smol) < 25e6
    for path in set(files) - set(smol):
        assert path.stat().st_size < 12e6, path
