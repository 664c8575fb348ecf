"""Data at its edges: listings as people have them, texts by number, any picture."""

import io
import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import D_IMG, V, opt_config, save_language_model
from PIL import Image
from test_data import RED, WHITE, row, write_folder
from torch import nn

import flamingo_lite.data as data
from flamingo_lite import (
    check_texts,
    collate,
    encode_pictures,
    interleave,
    load_captions,
    load_sprites,
    load_vision_encoder,
    make_scenes,
    merge_captions,
    read_picture,
    whole_text,
)

BLUE = (0, 0, 255)


def write_table(folder, text, encoding="utf-8"):
    """A caption folder with a `metadata.csv`, and three red pictures."""
    write_folder(folder, [], ("a.png", "b.png", "c.png"))
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_bytes(text.encode(encoding))
    return folder


def cut_picture(path, size=(64, 64)):
    """A JPEG with a good header, whose second half is gone."""
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


# ------------------------------------------------------------------------- the listing


def test_a_missing_text_names_the_columns(tmp_path):
    rows = [row(), {"file_name": "a.png", "caption": "a wall", "width": 3}]
    with pytest.raises(ValueError, match="line 2: no \"text\"; .*'caption', 'width'"):
        load_captions(write_folder(tmp_path / "mine", rows))
    table = write_table(tmp_path / "table", "file_name,caption\na.png,a wall\n")
    with pytest.raises(ValueError, match="line 2: no \"text\"; .*'caption'"):
        load_captions(table)


def test_a_missing_file_name_names_the_columns(tmp_path):
    rows = [{"image": "a.png", "text": "a wall"}]
    with pytest.raises(ValueError, match="no \"file_name\"; .*'image', 'text'"):
        load_captions(write_folder(tmp_path / "mine", rows))


def test_several_captions_of_one_picture(tmp_path):
    rows = [row(text=["a wall", "a red wall"]), row(text=["one"]), row()]
    loaded = load_captions(write_folder(tmp_path / "mine", rows))
    wanted = [["a wall", "a red wall"], ["one"], "a red wall"]
    assert [r["text"] for r in loaded] == wanted


@pytest.mark.parametrize(
    "texts, message",
    [
        ([], "line 2: there is no caption in the list"),
        (["a", ""], "line 2, text 2: the caption is empty or not"),
        (["a", None], "line 2, text 2: the caption is empty or not"),
        (["a", ["b"]], "line 2, text 2: the caption is empty or not"),
        (["a <image>", "b"], "line 2, text 1: take <image> out"),
    ],
)
def test_a_bad_caption_among_several_is_named(tmp_path, texts, message):
    with pytest.raises(ValueError, match=message):
        load_captions(write_folder(tmp_path / "mine", [row(), row(text=texts)]))


def test_a_scene_wants_one_text_for_a_thing(tmp_path):
    rows = [{**row(text=["a fox", "one fox"]), "thing": "fox", "studio": "me"}]
    loaded = load_captions(write_folder(tmp_path / "mine", rows))
    with pytest.raises(ValueError, match="want one text for each thing"):
        make_scenes(loaded, 1, seed=0, pairs=0)


GOOD_TABLES = {
    "plain": "file_name,text\na.png,a tent\nb.png,a fox\n",
    "other columns": "x,text,file_name\n1,a tent,a.png\n2,a fox,b.png\n",
    "quotation marks": 'file_name,text\na.png,"a tent"\n"b.png","a fox"\n',
    "a spreadsheet's": "\ufefffile_name,text\r\na.png,a tent\r\nb.png,a fox\r\n",
    "no last line end": "file_name,text\na.png,a tent\nb.png,a fox",
    "empty lines": "file_name,text\n\na.png,a tent\n\nb.png,a fox\n\n",
}


@pytest.mark.parametrize("what", GOOD_TABLES)
def test_a_table_as_listing(tmp_path, what):
    folder = write_table(tmp_path / "mine", GOOD_TABLES[what])
    rows = load_captions(folder)
    assert [r["text"] for r in rows] == ["a tent", "a fox"]
    assert [r["path"] for r in rows] == [folder / "a.png", folder / "b.png"]


def test_commas_quotes_and_lines_in_a_table(tmp_path):
    text = 'file_name,text\na.png,"a ""red"" tent,\nand a Löwe"\n'
    (loaded,) = load_captions(write_table(tmp_path / "mine", text))
    assert loaded["text"] == 'a "red" tent,\nand a Löwe'


BAD_TABLES = {
    "a comma": ("file_name,text\na.png,a tent\nb.png,a fox, red\n", "3: want 2 values"),
    "too few": ("file_name,text,x\na.png,a tent,1\nb.png,a fox\n", "3: want 3 values"),
    "an open quote": (
        'file_name,text\na.png,"a tent\nb.png,a fox\n',
        "line 2: .*quotation",
    ),
    "semicolons": ("file_name;text\na.png;a tent\n", "line 2: no .*'file_name;text'"),
    "no columns": ("", "there is no row"),
    "columns only": ("file_name,text\n", "there is no row"),
    "twice": ("file_name,text,text\na.png,a,b\n", "two columns of one name"),
    "an empty text": ("file_name,text\na.png,\n", "line 2: the caption is empty"),
    "a special token": ("file_name,text\na.png,a <image>\n", "line 2: take <image>"),
    "not there": ("file_name,text\nz.png,a tent\n", r"line 2: .*z\.png"),
    "outside": ("file_name,text\n../z.png,a tent\n", "line 2: .*outside"),
}


@pytest.mark.parametrize("what", BAD_TABLES)
def test_a_bad_table_is_named(tmp_path, what):
    text, message = BAD_TABLES[what]
    with pytest.raises(ValueError, match=rf"metadata\.csv.*{message}"):
        load_captions(write_table(tmp_path / "mine", text))


def test_a_table_that_is_no_utf8_is_named(tmp_path):
    folder = write_table(tmp_path / "mine", "file_name,text\na.png,Löwe\n", "latin-1")
    with pytest.raises(ValueError, match=r"metadata\.csv: save it as UTF-8"):
        load_captions(folder)


def test_a_bad_row_of_a_table_can_be_left_out(tmp_path):
    text = "file_name,text\na.png,a tent\nb.png,a fox, red\nz.png,gone\nc.png,an owl\n"
    with pytest.warns(UserWarning, match=r"left out 2 rows:\n.*line 3.*\n.*line 4"):
        rows = load_captions(write_table(tmp_path / "mine", text), skip_broken=True)
    assert [r["text"] for r in rows] == ["a tent", "an owl"]


def test_two_listings_are_one_too_many(tmp_path):
    folder = write_table(tmp_path / "mine", GOOD_TABLES["plain"])
    (folder / "metadata.jsonl").write_text(json.dumps(row()))
    with pytest.raises(ValueError, match=r"\.jsonl and metadata\.csv: take one"):
        load_captions(folder)


def test_parquet_is_refused_with_a_way_out(tmp_path):
    folder = write_table(tmp_path / "mine", "")
    (folder / "metadata.csv").rename(folder / "metadata.parquet")
    with pytest.raises(ValueError, match=r"Parquet .*metadata\.jsonl.*lines=True"):
        load_captions(folder)


# ------------------------------------------------------------------------------ splits


@pytest.fixture
def parts(tmp_path):
    """A data set in two parts, and a folder beside them that has no listing."""
    write_folder(tmp_path / "validation", [row(text="a test")])
    write_table(tmp_path / "train", GOOD_TABLES["plain"])
    (tmp_path / "scratch").mkdir()
    return tmp_path


def test_splits_are_listed_and_chosen(parts):
    with pytest.raises(FileNotFoundError, match="train, validation: choose .*split="):
        load_captions(parts)
    rows = load_captions(parts, split="train")
    assert [r["text"] for r in rows] == ["a tent", "a fox"]
    (only,) = load_captions(str(parts), split="validation")
    assert only["path"] == parts / "validation" / "a.png"


@pytest.mark.parametrize("split", ["test", "scratch", "", ".", "..", "train/", "a/b"])
def test_a_split_that_is_not_there_is_named(parts, split):
    with pytest.raises(FileNotFoundError, match="no split .*, but train, validation"):
        load_captions(parts, split=split)


def test_a_row_of_a_split_stays_in_its_folder(parts):
    write_folder(parts / "validation", [row("../train/a.png")])
    with pytest.raises(ValueError, match="line 1: .*outside the folder"):
        load_captions(parts, split="validation")


def test_a_file_or_nothing_in_place_of_a_folder(tmp_path):
    folder = write_folder(tmp_path / "mine", [row()])
    with pytest.raises(FileNotFoundError, match="is a file: give its folder"):
        load_captions(folder / "metadata.jsonl")
    with pytest.raises(FileNotFoundError, match="gone is no folder"):
        load_captions(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="no folder with a listing"):
        load_captions(folder, split="train")


# -------------------------------------------------------------------------- file names


def test_backslashes_are_the_conventions(tmp_path):
    folder = write_folder(tmp_path / "mine", [row("inner\\b.png"), row(".\\a.png")])
    (folder / "inner").mkdir()
    Image.new("RGB", (4, 4), BLUE).save(folder / "inner" / "b.png")
    first, second = load_captions(folder)
    assert first["path"] == folder / "inner" / "b.png"
    assert second["path"] == folder / "a.png"


@pytest.mark.parametrize(
    "name", ["..\\secret.png", "inner\\..\\..\\secret.png", "\\etc\\hostname"]
)
def test_no_way_out_over_backslashes(tmp_path, name):
    folder = write_folder(tmp_path / "mine", [row(name)])
    (folder / "inner").mkdir()
    Image.new("RGB", (4, 4), RED).save(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="line 1: .*outside the folder"):
        load_captions(folder)


def test_a_file_name_under_another_column(tmp_path):
    """The convention lets a column of pictures be called `image_file_name`."""
    folder = tmp_path / "mine"
    (one,) = load_captions(
        write_folder(folder, [{"image_file_name": "a.png", "text": "a wall"}])
    )
    assert one["path"] == folder / "a.png"
    both = {"file_name": "a.png", "mask_file_name": "gone.png", "text": "a wall"}
    assert load_captions(write_folder(folder, [both]))[0]["path"] == folder / "a.png"
    two = {"one_file_name": "a.png", "two_file_name": "a.png", "text": "a wall"}
    with pytest.raises(ValueError, match="no \"file_name\"; .*'two_file_name'"):
        load_captions(write_folder(folder, [two]))


@pytest.mark.parametrize("name", ["file_names", "page_file_names"])
def test_several_pictures_in_a_row_are_refused(tmp_path, name):
    rows = [{name: ["a.png"], "text": "a wall"}]
    with pytest.raises(ValueError, match=f'line 1: "{name}": give each picture'):
        load_captions(write_folder(tmp_path / "mine", rows))


# ---------------------------------------------------------------- pictures, when opened


@pytest.fixture
def damaged(tmp_path):
    """A caption folder whose second picture is cut behind its header."""
    rows = [row(), row("cut.jpg"), row("b.png")]
    folder = write_folder(tmp_path / "mine", rows, ("a.png", "b.png"))
    cut_picture(folder / "cut.jpg")
    return folder


def test_loading_decodes_no_picture(damaged, monkeypatch):
    """Thousands of photographs are listed at once."""

    def load(picture, *arguments):
        raise AssertionError("decoded")

    monkeypatch.setattr(data, "rgb_on_white", load)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    assert len(load_captions(damaged)) == 3
    assert len(load_captions(damaged, skip_broken=True, check_pictures=False)) == 3


def test_a_damaged_picture_is_found_when_asked_for(damaged):
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2: .*cut\.jpg"):
        load_captions(damaged, check_pictures=True)
    with pytest.warns(UserWarning, match=r"left out 1 rows:\n.*line 2.*cut\.jpg"):
        rows = load_captions(damaged, skip_broken=True)
    assert [r["file_name"] for r in rows] == ["a.png", "b.png"]


def test_a_damaged_picture_is_named_when_it_is_read(damaged, make_model):
    model, image_processor, _ = make_model()
    rows = load_captions(damaged)
    with pytest.raises(ValueError, match=r"pictures\[1\]: .*cut\.jpg"):
        encode_pictures(model.vision_encoder, image_processor, rows)


def test_reading_all_pictures_shows_a_bar(damaged, monkeypatch):
    shown = []

    def bar(lines, name, **kwargs):
        shown.append(len(lines))
        return lines

    monkeypatch.setattr(data, "tqdm", bar)
    load_captions(damaged)
    assert shown == [3]


def test_a_quick_load_shows_no_bar(damaged, capsys):
    load_captions(damaged)
    assert capsys.readouterr() == ("", "")


def test_sprites_are_upright_and_named(tmp_path):
    """A drawing that is turned, one of 16 bits, and one that is cut."""
    turned, exif = Image.new("RGBA", (4, 2), (*BLUE, 0)), Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.full((2, 2), 32_896, np.uint16)).save(tmp_path / "deep.png")
    cut_picture(tmp_path / "cut.jpg")

    def one(name):
        return {"path": tmp_path / name, "thing": "fox", "studio": name}

    sprites = load_sprites([one("turned.png"), one("deep.png")])["fox"]
    assert sprites["turned.png"].size == (2, 4)
    assert sprites["turned.png"].getpixel((0, 0)) == (*BLUE, 0)
    assert sprites["deep.png"].getpixel((0, 0)) == (128, 128, 128, 255)
    with pytest.raises(ValueError, match=r"cut\.jpg"):
        load_sprites([one("cut.jpg")])
    with pytest.raises(ValueError, match=r"rows\[0\]: no \"thing\"; .*'path'"):
        load_sprites([{"path": tmp_path / "deep.png", "text": "a fox"}])


# ---------------------------------------------------------------------- all the texts


@pytest.fixture(scope="module")
def tokenizer(make_model):
    return make_model()[2]


LONG = "a very " * 300
BAD_TEXTS = {
    "empty": ("", r"texts\[136\] \(''\): the caption is empty"),
    "blanks": (" \n", r"texts\[136\] \(' \\n'\): the caption is empty"),
    "none": (None, r"texts\[136\] \(None\): the caption is empty or not"),
    "a number": (3.5, r"texts\[136\] \(3\.5\): the caption is empty or not"),
    "bytes": (b"a", r"texts\[136\] \(b'a'\): the caption is empty or not"),
    "too long": (
        LONG,
        r"texts\[136\] \('a very a very .* …'\): \d+ tokens, .* reads 96",
    ),
    "one word": ("🦩" * 500, r"texts\[136\] \('🦩{40} …'\): \d+ tokens"),
    "special": ("a <image>", r"texts\[136\] \('a <image>'\): take <image> out"),
    "the end": ("a </s> b", r"texts\[136\] \('a </s> b'\): take </s> out"),
    "a pair": (("a?", "</s>"), r"texts\[136\] \(\('a\?', '</s>'\)\): take </s>"),
    "no pair": (("a?", None), r"texts\[136\] .*: want a text or \(given, answer\)"),
    "a long pair": (("a?", LONG), r"texts\[136\] \('a\? a very .*: \d+ tokens"),
    "an empty pair": (("", ""), r"texts\[136\] .*: the caption is empty"),
    "no text": ([], r"texts\[136\]: there is no text in the list"),
    "the second": (["a", ""], r"texts\[136\]\[1\] \(''\): the caption is empty"),
    "the longest": (["a", LONG, "b"], r"texts\[136\] \('a very .*: \d+ tokens"),
    "lists": (["a", ["b"]], r"texts\[136\]\[1\] \(\['b'\]\): the caption is empty or"),
    "half a sign": ("a \ud83e", r"texts\[136\] .*: the caption is not valid Unicode"),
}


@pytest.mark.parametrize("what", BAD_TEXTS)
def test_a_bad_text_is_named_by_number_and_first_words(tokenizer, what):
    """Not by its row in some shuffled batch, nineteen steps later."""
    bad, message = BAD_TEXTS[what]
    texts = ["a lemon"] * 136 + [bad] + ["a tent"] * 63
    with pytest.raises(ValueError, match=f"^{message}"):
        check_texts(texts, tokenizer)
    check_texts(texts[:136], tokenizer)


def test_good_texts_in_every_form(tokenizer):
    texts = ["a lemon", ("is it?", "yes"), ["a tent", ("a", "tent")], ("", "an owl")]
    check_texts(texts, tokenizer)
    check_texts(tuple(texts), tokenizer)
    check_texts([texts, texts[:1]], tokenizer, sequences=True)
    check_texts([], tokenizer)


def test_texts_of_sequences_are_named(tokenizer):
    good = ["a lemon", ["a tent", "one tent"]]
    for bad, message in [
        (["a", ""], r"texts\[1\]\[1\] \(''\): the caption"),
        (["a", ["b", "<image>"]], r"texts\[1\]\[1\]\[1\] \('<image>'\): take"),
        (["a " * 40, ["b", "b " * 60]], r"texts\[1\] \('b b .*: \d+ tokens"),
        ("ab", r"texts\[1\]: want a list of texts, one for each picture, got 'ab'"),
        (3, r"texts\[1\]: want a list of texts, one for each picture, got 3"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}"):
            check_texts([good, bad], tokenizer, sequences=True)


def test_one_text_is_no_list_of_letters(tokenizer):
    """Each of its letters would be the text of a picture."""
    features = torch.zeros(3, 1, V, D_IMG)
    for try_it in (
        lambda: check_texts("fox", tokenizer),
        lambda: interleave("fox"),
        lambda: collate([(features, "fox")], tokenizer),
    ):
        with pytest.raises(ValueError, match="want a list of texts, got .*'fox'"):
            try_it()


def test_the_longest_text_is_the_batchs(tokenizer):
    """What `check_texts` lets through, `collate` takes, to the very token."""
    features = torch.zeros(2, 1, V, D_IMG)
    for pair in (False, True):
        for n in range(70, 100):
            long = ("a " * n, "tent") if pair else "a " * n
            texts, passed = ["a lemon", long], [True, True]
            for i, check in enumerate(
                (
                    lambda texts: check_texts([texts], tokenizer, sequences=True),
                    lambda texts: collate([(features, texts)], tokenizer),
                )
            ):
                try:
                    check(texts)
                except ValueError as error:
                    assert "the model reads 96" in str(error)
                    passed[i] = False
            assert passed[0] == passed[1], n
            texts = [["a", long[0] if pair else long], "b"]
        assert not passed[0], "some were too long"


@pytest.mark.parametrize("own", [None, 1_000_000, 40])
def test_a_tokenizer_without_a_limit_gets_the_language_models(
    tmp_path, make_model, own
):
    """As OPT-125m's on the hub; one that says more than the model reads, too."""
    path = save_language_model(tmp_path / "opt", opt_config())
    file = tmp_path / "opt" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["model_max_length"]
    if own is not None:
        config["model_max_length"] = own
    file.write_text(json.dumps(config))
    model, _, tokenizer = make_model(language_model=path)
    most = min(own or 96, 96)
    assert tokenizer.model_max_length == most
    features = torch.zeros(1, 1, V, D_IMG)
    with pytest.raises(ValueError, match=f"row 0: 300. tokens, .* reads {most}: 'a a"):
        collate([(features, ["a " * 3000])], tokenizer)
    with pytest.raises(ValueError, match=rf"texts\[0\] .* reads {most}"):
        check_texts(["a " * 3000], tokenizer)
    words = "a " * (most - 8)
    assert model(None, **collate([(features, [words])], tokenizer)).loss.isfinite()


def test_collate_says_which_text_it_is(tokenizer):
    one = torch.zeros(1, 1, V, D_IMG)
    good = (one, ["a lemon"])
    with pytest.raises(ValueError, match=r"row 1, text 1: want a text or"):
        collate([good, (one, [("a", None)])], tokenizer)
    with pytest.raises(ValueError, match=r"text 2: want a text or"):
        interleave(["a", ("a", None)])
    with pytest.raises(ValueError, match=r"^want a text or"):
        whole_text(("a", None))


def test_collate_takes_arrays_and_names_what_it_cannot(tokenizer):
    array = np.random.default_rng(0).standard_normal((1, 1, V, D_IMG), np.float32)
    for features in (array, array.astype(np.float16)):
        batch = collate([(features, ["a lemon"])], tokenizer)
        wanted = collate([(torch.from_numpy(features), ["a lemon"])], tokenizer)
        assert torch.equal(batch["vision_features"], wanted["vision_features"])
    for bad, message in [
        (array[0], rf"got \(1, {V}, {D_IMG}\)"),
        (array[0, 0], rf"got \({V}, {D_IMG}\)"),
        ([Image.new("RGB", (8, 8))], "got list"),
        (Image.new("RGB", (8, 8)), "got Image"),
    ]:
        with pytest.raises(ValueError, match=rf"row 0: want \(T_img, F, .*{message}"):
            collate([(bad, ["a lemon"])], tokenizer)


# --------------------------------------------------------------------- encode pictures


COLOURS = ("red", "green", "blue", "white", "pink")


@pytest.fixture(scope="module")
def encode(make_model):
    """`encode_pictures` with a small model's vision encoder."""
    model, image_processor, _ = make_model()
    return partial(encode_pictures, model.vision_encoder, image_processor)


@pytest.fixture
def painted(tmp_path):
    """Five pictures, and rows with their files."""
    pictures = [Image.new("RGB", (40, 40), colour) for colour in COLOURS]
    for colour, picture in zip(COLOURS, pictures, strict=True):
        picture.save(tmp_path / f"{colour}.png")
    return pictures, [{"path": tmp_path / f"{c}.png", "text": c} for c in COLOURS]


def test_pictures_in_every_form(encode, painted):
    pictures, rows = painted
    wanted = encode(pictures)
    for given in (
        tuple(pictures),
        (picture for picture in pictures),
        [r["path"] for r in rows],
        (str(r["path"]) for r in rows),
        rows,
        [{"picture": picture, "text": "a"} for picture in pictures],  # a scene
        [{"image": picture, "text": "a"} for picture in pictures],  # Hugging Face's
        [{"image": "0001", "picture": "mine", **r} for r in rows],
        [{**rows[0], "picture": picture} for picture in pictures],
        [pictures[0], rows[1], str(rows[2]["path"]), pictures[3], rows[4]["path"]],
    ):
        assert torch.equal(encode(given, batch_size=2), wanted)
    for one in (pictures[0], rows[0], rows[0]["path"], str(rows[0]["path"])):
        assert torch.equal(encode(one), encode(pictures[:1]))


@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.zeros(3, 32, 32), "want a PIL picture, got Tensor"),
        (np.zeros((8, 8, 3), np.uint8), "want a PIL picture, got ndarray.*fromarray"),
        ([Image.new("RGB", (8, 8))], "want a PIL picture, got list"),
        (None, "want a PIL picture, got NoneType"),
        ({"text": "a"}, 'no "picture" and no "path"; .*\'text\''),
        ({"pictures": [], "texts": []}, 'no "picture" and no "path"; .*\'pictures\''),
    ],
    ids=["pixels", "array", "list", "None", "row", "story"],
)
def test_what_is_no_picture_is_named_by_its_number(encode, bad, message):
    good = Image.new("RGB", (8, 8))
    with pytest.raises(TypeError, match=rf"pictures\[3\]: {message}"):
        encode([good, good, good, bad], batch_size=2)


def test_a_tensor_in_place_of_pictures_is_refused(encode):
    for bad in (torch.zeros(2, 3, 32, 32), np.zeros((2, 8, 8, 3), np.uint8)):
        with pytest.raises(TypeError, match=r"pictures\[0\]: want a PIL picture, got"):
            encode(bad)
    for bad in (None, 3):
        with pytest.raises(TypeError, match="want a list of pictures, got"):
            encode(bad)
    for nothing in ([], iter(())):
        with pytest.raises(ValueError, match="there are no pictures"):
            encode(nothing)


def test_files_that_cannot_be_read_are_named(encode, painted, tmp_path):
    _, rows = painted
    for bad, message in [
        (tmp_path / "gone.png", r"gone\.png"),
        (tmp_path, "no ordinary one"),
        ("", "no ordinary one"),
    ]:
        with pytest.raises(ValueError, match=rf"pictures\[1\]: .*{message}"):
            encode([rows[0], bad])


def test_every_picture_is_upright_rgb_on_white(encode, painted):
    """Whatever the image processor would make of it."""
    white = encode([Image.new("RGB", (40, 40), WHITE)])
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    palette = Image.new("P", (40, 40))
    palette.info["transparency"] = 0
    features = encode([clear, clear.convert("LA"), palette])
    assert torch.equal(features, white.expand(3, -1, -1, -1))

    def only_rgb(picture):
        assert picture.mode == "RGB" and picture.size == (2, 4)
        return torch.zeros(3, 32, 32)

    lying, file = Image.new("RGBA", (4, 2)), io.BytesIO()
    lying.getexif()[0x0112] = 6
    lying.save(file, "png", exif=lying.getexif())
    encode_pictures(Tower(), only_rgb, [Image.open(file)])


class Tower(nn.Module):
    """A vision tower whose tokens are all as large as the first pixel."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.calls = []

    def forward(self, pixels):
        self.calls.append(len(pixels))
        size = pixels[:, 0, 0, 0, None, None]  # (some, 1, 1)
        return None, (size * self.weight).expand(-1, V, D_IMG)


def sizes(picture):
    """The image processor of `Tower`: red says how large the tokens are."""
    large = {0: 1.0, 1: float("inf"), 2: float("nan"), 3: 70_000.0, 4: 65_000.0}
    return torch.full((3, 4, 4), large[picture.getpixel((0, 0))[0]])


def of_red(*reds):
    return [Image.new("RGB", (2, 2), (red, 0, 0)) for red in reds]


def test_features_that_are_not_finite_are_refused():
    for bad, message in [(1, "not finite"), (2, "not finite")]:
        with pytest.raises(ValueError, match=rf"pictures\[5\]: .*{message}"):
            encode_pictures(Tower(), sizes, of_red(0, 0, 0, 4, 0, bad, 0), 2)


def test_features_too_large_for_half_precision_are_refused():
    with pytest.raises(ValueError, match=r"pictures\[2\]: .*7e\+04.*float16.*dtype="):
        encode_pictures(Tower(), sizes, of_red(0, 4, 3, 0))
    assert (encode_pictures(Tower(), sizes, of_red(4)) == 65_000).all()
    features = encode_pictures(Tower(), sizes, of_red(0, 3), dtype=torch.float32)
    assert features.dtype == torch.float32 and (features[1] == 70_000).all()


def test_a_generator_is_drawn_from_batch_by_batch():
    tower, drawn, ahead = Tower(), [], []

    def pictures():
        for picture in of_red(*[0] * 10):
            drawn.append(1)
            ahead.append(len(drawn) - sum(tower.calls))
            yield picture

    features = encode_pictures(tower, sizes, pictures(), batch_size=3)
    assert features.shape == (10, 1, V, D_IMG) and tower.calls == [3, 3, 3, 1]
    assert max(ahead) == 3


def test_a_tower_in_half_precision(encode, make_model):
    pictures = of_red(0, 100, 200)
    for dtype in (torch.bfloat16, torch.float16):
        model, image_processor, _ = make_model()
        tower = model.vision_encoder.to(dtype)
        features = encode_pictures(tower, image_processor, pictures)
        assert features.dtype == torch.float16
        torch.testing.assert_close(features, encode(pictures), rtol=0.1, atol=0.1)


def test_the_whole_vision_encoder_will_do(backbones):
    encoder, image_processor = load_vision_encoder(backbones["clip"])
    pictures = of_red(0, 200)
    features = encode_pictures(encoder, image_processor, pictures)
    wanted = encode_pictures(encoder.visual, image_processor, pictures)
    assert torch.equal(features, wanted)


def test_a_tower_without_tokens_is_refused(backbones):
    """Its second picture's one vector would be taken for tokens."""
    encoder, image_processor = load_vision_encoder(backbones["clip"])
    encoder.visual.output_tokens = False
    with pytest.raises(ValueError, match="want the vision encoder of a Flamingo"):
        encode_pictures(encoder.visual, image_processor, of_red(0, 200))


def test_a_progress_bar_only_where_it_is_asked_for(encode, capsys):
    encode(of_red(0, 0))
    assert capsys.readouterr() == ("", "")
    encode(of_red(0, 0), progress=True)
    assert "pictures: 100%" in capsys.readouterr().err


# ----------------------------------------------------------------- large photographs


def photograph(path, size=(1600, 1200), **settings):
    """A JPEG with slow and fast changes, and its picture as it was saved."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32)
    noise = rng.normal(0, 12, (size[1], size[0], 3))
    Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).save(
        path, "JPEG", quality=90, **settings
    )
    return path


@pytest.mark.parametrize(
    ("least", "size"),
    [
        (None, (1600, 1200)),
        (1200, (1600, 1200)),
        (600, (800, 600)),
        (599, (800, 600)),
        (300, (400, 300)),
        (1, (200, 150)),
    ],
)
def test_a_jpeg_is_decoded_no_larger_than_is_asked(tmp_path, least, size):
    path = photograph(tmp_path / "a.jpg")
    assert read_picture(path, least).size == size
    small, whole = (
        read_picture(path, least),
        read_picture(path).resize(size, Image.Resampling.BOX),
    )
    difference = np.abs(np.asarray(small, float) - np.asarray(whole, float))
    assert difference.mean() < 2


def test_what_else_a_file_says_still_counts(tmp_path):
    """It is turned, has one channel or four, is progressive, or holds two pictures."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = photograph(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(turned, 100).size == (150, 200)
    progressive = photograph(tmp_path / "progressive.jpg", progressive=True)
    assert read_picture(progressive, 100).size == (200, 150)
    for mode in ("L", "CMYK"):
        Image.open(turned).convert(mode).save(tmp_path / f"{mode}.jpg", exif=b"")
        small = read_picture(tmp_path / f"{mode}.jpg", 100)
        assert small.mode == "RGB" and small.size == (200, 150)
    picture = Image.open(progressive)
    picture.save(tmp_path / "two.jpg", "MPO", save_all=True, append_images=[picture])
    assert read_picture(tmp_path / "two.jpg", 100).size == (200, 150)
    picture.save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png", 100).size == (1600, 1200)


@pytest.mark.parametrize("progressive", [False, True])
def test_what_is_cut_off_is_found_at_every_size(tmp_path, progressive):
    path = photograph(tmp_path / "a.jpg", (400, 300), progressive=progressive)
    whole, found = path.read_bytes(), []
    for end in (*range(0, len(whole), len(whole) // 20), len(whole) - 30, len(whole)):
        path.write_bytes(whole[:end])
        outcomes = []
        for least in (None, 100, 1):
            try:
                read_picture(path, least)
                outcomes.append(True)
            except ValueError as error:
                assert "a.jpg" in str(error)
                outcomes.append(False)
        assert len(set(outcomes)) == 1, end
        found.append(outcomes[0])
    assert not any(found[:-2]) and found[-1]


def test_bytes_in_place_of_the_file(tmp_path):
    content = photograph(tmp_path / "a.jpg").read_bytes()
    gone = tmp_path / "gone.jpg"
    assert read_picture(gone, 100, content).size == (200, 150)
    with pytest.raises(ValueError, match=r"gone\.jpg"):
        read_picture(gone, content=content[:500])


def test_pictures_are_checked_at_an_eighth_of_their_size(tmp_path, monkeypatch):
    write_folder(tmp_path, [row("a.jpg"), row("b.png")], ("b.png",))
    photograph(tmp_path / "a.jpg")
    seen, real = [], data.rgb_on_white

    def note(picture):
        made = real(picture)
        seen.append(made.size)
        return made

    monkeypatch.setattr(data, "rgb_on_white", note)
    load_captions(tmp_path, check_pictures=True)
    assert seen == [(200, 150), (8, 6)]


def test_encoding_decodes_twice_as_much_as_the_tower_takes(make_model, tmp_path):
    """And its features are nearly those of the whole photograph."""
    model, image_processor, _ = make_model()
    path, seen = photograph(tmp_path / "a.jpg"), []

    def note(picture):
        seen.append(picture.size)
        return image_processor(picture)

    visual = model.vision_encoder
    small = encode_pictures(visual, note, [path]).float()
    whole = encode_pictures(visual, note, [read_picture(path)]).float()
    assert seen == [(200, 150), (1600, 1200)]  # the tower takes 32 x 32
    assert (small - whole).norm() < 0.02 * whole.norm()
    assert data.size_to_decode(visual) == 64 and data.size_to_decode(Tower()) is None


def test_a_list_that_is_shorter_than_it_says():
    class Short(list):
        def __len__(self):
            return 5

    with pytest.raises(ValueError, match="pictures ended after 3 of 5"):
        encode_pictures(Tower(), sizes, Short(of_red(0, 0, 0)), 2)


# ------------------------------------------------------- several captions of a picture


def test_captions_of_a_picture_come_together(tmp_path):
    listed = [
        row("b.png", "two"),
        {**row("a.png", "one"), "mood": "calm"},
        {**row("a.png", "uno"), "mood": "wild"},
        row("b.png", ["due", "two"]),
        row("a.png", "one"),
        row("c.png", "three"),
    ]
    write_folder(tmp_path, listed, ("a.png", "b.png", "c.png"))
    rows = load_captions(tmp_path)
    merged = merge_captions(rows)
    assert [r["file_name"] for r in merged] == ["b.png", "a.png", "c.png"]
    assert [r["text"] for r in merged] == [["two", "due"], ["one", "uno"], "three"]
    assert merged[1]["mood"] == "calm" and merged[0]["path"] == tmp_path / "b.png"
    assert len(rows) == 6 and rows[0]["text"] == "two"  # those are as they were
    assert rows[3]["text"] == ["due", "two"] and merge_captions(merged) == merged
    assert merge_captions([]) == []
