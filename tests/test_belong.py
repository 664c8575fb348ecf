"""What does not belong together is refused: it would compute, and mean nothing.

A tokenizer of another model, features of another tower, pictures that changed during a
run, numbers that are no pixels. And relatives: what would be lost without a word.
"""

import io
import json
import shutil
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import D_IMG, ROOT, V, save_clip
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from flamingo_lite import (
    cache_features,
    caption,
    caption_losses,
    check_tower,
    collate,
    freeze_in,
    load_flamingo,
    load_vision_encoder,
    make_prompt,
    put_start_token,
    rgb_on_white,
    save_flamingo,
    tokenizer_fingerprint,
    train,
    trained_tensors,
)
from flamingo_lite.together import Together

TEXTS = ["a lemon", "two dogs", "a bear", "a tent"]
QUIET = {"report": lambda line: None, "batch_size": 2}


@pytest.fixture
def features():
    torch.manual_seed(0)
    return torch.randn(4, 1, V, D_IMG)


def other_tokenizer(folder, change):
    """The tiny tokenizer, changed, as a folder."""
    shutil.copytree(ROOT / "data" / "tiny_opt", folder)
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))
    return folder


def one_more(described):
    """With one token more, so that those of the Flamingo get other numbers."""
    described["added_tokens"].append(
        {**described["added_tokens"][-1], "id": 1200, "content": "<extra>"}
    )


def turned(described):
    """Of the same size, with every word at the number of the next one."""
    words = described["model"]["vocab"]
    names = [name for name, number in words.items() if number >= 4]
    numbers = [words[name] for name in names]
    words |= dict(zip(names, numbers[1:] + numbers[:1], strict=True))


# --------------------------------------------------------------------- the tokenizer


def test_another_models_tokenizer_is_refused(make_model, features, tmp_path):
    """The model would find no <image>, and read every text without its picture."""
    model, _, own = make_model(gates=1.0)
    folder = other_tokenizer(tmp_path / "longer", one_more)
    other = AutoTokenizer.from_pretrained(folder)
    other.add_special_tokens(
        {"additional_special_tokens": ["<|endofchunk|>", "<image>"]}
    )
    for work in (
        lambda: train(model, other, features, TEXTS, 2, **QUIET),
        lambda: caption_losses(model, other, features, TEXTS),
    ):
        with pytest.raises(ValueError, match="the tokenizer is not this model's"):
            work()
    one, two = (caption_losses(model, own, f, TEXTS) for f in (features, -features))
    assert not torch.allclose(one, two)


def test_a_tokenizer_with_other_numbers_is_not_loaded_with(tmp_path):
    model, _, tokenizer = load_flamingo("tiny")
    save_flamingo(model, tmp_path / "saved")
    folder = other_tokenizer(tmp_path / "turned", turned)
    with pytest.raises(ValueError, match="was trained with the tokenizer 'tiny_opt'"):
        load_flamingo(tmp_path / "saved", tokenizer_path=folder)
    with pytest.raises(ValueError, match="was trained with the tokenizer 'tiny_opt'"):
        load_flamingo("tiny", tokenizer_path=folder)
    assert load_flamingo(tmp_path / "saved")[2].get_vocab() == tokenizer.get_vocab()


def test_folders_of_before_do_not_say_which_tokenizer(tmp_path):
    model, _, _ = load_flamingo("tiny")
    save_flamingo(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    mark = config["backbones"].pop("tokenizer")["fingerprint"]
    assert mark == tokenizer_fingerprint(load_flamingo("tiny")[2])
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_flamingo(tmp_path)


def test_a_run_does_not_go_on_with_another_tokenizer(
    make_model, backbones, features, tmp_path
):
    where = {"checkpoint": tmp_path / "last.pt", "report_every": 1}

    def stop(numbers):
        if numbers["step"] == 3:
            raise InterruptedError

    model, _, tokenizer = make_model()
    with pytest.raises(InterruptedError):
        train(model, tokenizer, features, TEXTS, 4, **where, **QUIET, log=stop)
    changed = shutil.copytree(backbones["opt"], tmp_path / "opt")
    folder = other_tokenizer(tmp_path / "turned", turned)
    shutil.copy(folder / "tokenizer.json", changed)
    model, _, tokenizer = make_model(language_model=changed)
    with pytest.raises(ValueError, match="of another model.*tokenizer is"):
        train(model, tokenizer, features, TEXTS, 4, **where, **QUIET)
    model, _, tokenizer = make_model()
    assert len(train(model, tokenizer, features, TEXTS, 4, **where, **QUIET)) == 4


def test_a_tokenizer_with_a_token_at_the_end_is_refused(make_model):
    """It would stand between a prompt and what the model is to write."""
    _, _, tokenizer = make_model()
    backend = tokenizer.backend_tokenizer
    known = [("</s>", tokenizer.convert_tokens_to_ids("</s>"))]
    backend.post_processor = TemplateProcessing(
        single="</s> $A </s>", pair="</s> $A $B </s>", special_tokens=known
    )
    for start in ("auto", None, "</s>"):
        with pytest.raises(ValueError, match="puts '</s>' behind every text"):
            put_start_token(tokenizer, start)


# ---------------------------------------------------------------------- the features


@pytest.fixture
def folder_of_pictures(tmp_path):
    """A function that writes 40 pictures of noise: their paths."""

    def write(seed=0, which=range(40)):
        rng = np.random.default_rng(seed)
        paths = [tmp_path / f"{number}.png" for number in range(40)]
        for number in which:
            noise = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(noise).save(paths[number])
        return paths

    return write


def cached(model, image_processor, paths, folder):
    settings = {"progress": False, "workers": 0}
    tower = model.vision_encoder
    return cache_features(folder, tower, image_processor, paths, **settings)


def test_features_of_another_tower_are_refused(
    make_model, backbones, folder_of_pictures, tmp_path
):
    """Of the same width: only what is noted beside them tells."""
    model, image_processor, tokenizer = make_model()
    paths = folder_of_pictures(which=range(4))[:4]
    other = save_clip(tmp_path / "clip", seed=5)
    visual, _ = load_vision_encoder(other, None)
    mine = cached(model, image_processor, paths, tmp_path / "mine")
    settings = {"progress": False, "workers": 0}
    theirs = cache_features(
        tmp_path / "theirs", visual, image_processor, paths, **settings
    )
    assert mine.shape == theirs.shape
    for work in (
        lambda f: train(model, tokenizer, f, TEXTS, 2, **QUIET),
        lambda f: train(model, tokenizer, mine, TEXTS, 2, validation=(f, TEXTS)),
        lambda f: caption_losses(model, tokenizer, f, TEXTS),
        lambda f: caption(model, None, tokenizer, f, max_new_tokens=2),
        lambda f: check_tower(f.select([0]), model.vision_encoder),
    ):
        with pytest.raises(ValueError, match="of another vision encoder"):
            work(theirs)
    assert caption_losses(model, tokenizer, mine, TEXTS).shape == (4,)
    check_tower(theirs[[0, 1]], model.vision_encoder)  # a tensor says nothing
    freeze_in(model, torch.bfloat16)  # the same tower, rounded
    check_tower(mine, model.vision_encoder)


def test_features_of_before_the_tower_learned_are_refused(
    make_model, folder_of_pictures, tmp_path
):
    model, image_processor, tokenizer = make_model()
    before = cached(model, image_processor, folder_of_pictures()[:4], tmp_path / "f")
    with torch.no_grad():
        for p in model.vision_encoder.parameters():
            p.add_(0.01)
    with pytest.raises(ValueError, match="before it was trained"):
        caption_losses(model, tokenizer, before, TEXTS)


def test_a_run_does_not_go_on_with_pictures_that_changed(
    make_model, folder_of_pictures, tmp_path
):
    """Though the sixteen that a glance falls on stayed as they were."""
    texts = ["a lemon"] * 40
    where = {"checkpoint": tmp_path / "last.pt", "report_every": 1}

    def go(paths, log=None, with_names=True):
        model, image_processor, tokenizer = make_model()
        mine = cached(model, image_processor, paths, tmp_path / "f")
        mine = mine if with_names else mine[list(range(40))]
        return train(model, tokenizer, mine, texts, 3, **where, **QUIET, log=log)

    def stop(numbers):
        if numbers["step"] == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        go(folder_of_pictures(), stop)
    looked_at = torch.linspace(0, 39, 16).round().long().tolist()
    changed = [number for number in range(40) if number not in looked_at]
    with pytest.raises(ValueError, match="another run.*checksum of the pictures"):
        go(folder_of_pictures(1, changed))
    same = folder_of_pictures()
    shutil.copy(tmp_path / "last.pt", tmp_path / "kept.pt")
    history = go(same)
    assert len(history) == 3
    shutil.copy(tmp_path / "kept.pt", tmp_path / "last.pt")
    assert go(same, with_names=False) == history  # a tensor has no names


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int64, torch.bool])
def test_whole_numbers_are_no_features(make_model, features, kind):
    """Pixels from 0 to 255 would be read as if they were normalised."""
    model, _, tokenizer = make_model()
    pixels = torch.ones(4, 1, 3, 32, 32)
    for pictures in (features, pixels):
        some = pictures.abs().to(kind)
        with pytest.raises(ValueError, match="give floats, as the image processor"):
            train(model, tokenizer, some, TEXTS, 2, **QUIET)
        with pytest.raises(ValueError, match="give floats, as the image processor"):
            caption_losses(model, tokenizer, some, TEXTS)
        with pytest.raises(ValueError, match="row 1: .*give floats"):
            collate([(pictures[:1], TEXTS[:1]), (some[:1], TEXTS[:1])], tokenizer)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_features_that_are_not_finite_get_no_caption(make_model, features, wrong):
    model, _, tokenizer = make_model()
    features[2, 0, 3, 1] = wrong
    words = {"max_new_tokens": 2, "batch_size": 2}
    with pytest.raises(ValueError, match="row 2: a picture's features are not finite"):
        caption(model, None, tokenizer, features, **words)
    assert len(caption(model, None, tokenizer, features[:2], **words)) == 2


def test_one_picture_is_no_control(make_model, features):
    """Beside itself it would say that the model does not look."""
    model, _, tokenizer = make_model()
    told = {}
    held_out = {
        "one": (features[:1], TEXTS[:1]),
        "the same twice": (features[[0, 0]], TEXTS[:2]),
        "two": (features[:2], TEXTS[:2]),
    }
    for name, validation in held_out.items():
        log = []
        data = model, tokenizer, features, TEXTS, 1
        train(*data, **QUIET, validation=validation, log=log.append)
        told[name] = {"true", "shuffled"} & log[-1].keys()
    both = {"true", "shuffled"}
    assert told == {"one": {"true"}, "the same twice": {"true"}, "two": both}


# ---------------------------------------------------------------------- and relatives


def test_blanks_at_the_ends_are_no_tokens(make_model, features):
    """`readlines()` leaves one at each end of line; prompts and scores have none."""
    model, _, tokenizer = make_model(gates=0.5)
    plain = caption_losses(model, tokenizer, features, TEXTS)
    for spoil in (" {}", "{} ", "{}\n", "\t{}\r\n", "\u200b{}\ufeff"):
        texts = [spoil.format(text) for text in TEXTS]
        assert torch.equal(caption_losses(model, tokenizer, features, texts), plain)
    pairs = [("what is this?", text) for text in TEXTS]
    spoilt = [("what is this? ", f" {text}\n") for text in TEXTS]
    one, other = (
        collate(
            [(f[None], [t]) for f, t in zip(features, texts, strict=True)], tokenizer
        )
        for texts in (pairs, spoilt)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    asked = tokenizer(make_prompt(ask="what is this? ")).input_ids
    assert one["lang_x"][0, : len(asked)].tolist() == asked


def test_a_table_that_was_unfrozen_is_saved_whole(make_model, features, tmp_path):
    """With freeze_lm_embeddings=True no hook holds its rows, so all of them move."""
    model, _, tokenizer = make_model(freeze_lm_embeddings=True)
    model.lang_encoder.requires_grad_(True)
    batch = collate([(features[:1], ["a lemon"])], tokenizer)
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(None, **batch).loss.backward()
        optimizer.step()
    model.eval()
    save_flamingo(model, tmp_path)
    other = load_flamingo(tmp_path)[0]
    with torch.no_grad():
        logits = [m(None, **batch).logits for m in (model, other)]
    assert torch.equal(*logits)
    # Where a hook holds them, two rows are all that is written.
    usual = trained_tensors(make_model()[0])
    assert not any("embed_tokens" in name for name in usual)


def test_processes_that_nothing_brings_together_are_refused(make_model):
    """As with DeepSpeed, whose model Accelerate does not wrap here."""
    accelerator = SimpleNamespace(
        num_processes=2,
        process_index=0,
        is_main_process=True,
        mixed_precision="no",
        gradient_accumulation_steps=1,
        device=torch.device("cpu"),
        distributed_type="DistributedType.DEEPSPEED",
        prepare_model=lambda model: model,
    )
    together = Together(accelerator, make_model()[0])
    with pytest.raises(ValueError, match="DEEPSPEED: nothing would bring"):
        together.share([], None)


def test_processes_begin_at_the_same_step(make_model, features, tmp_path, monkeypatch):
    """As where each of two machines has a disk of its own, and one a checkpoint."""
    monkeypatch.setattr(Together, "of_all", lambda self, thing: [thing, 5])
    model, _, tokenizer = make_model()
    settings = {"checkpoint": tmp_path / "last.pt", **QUIET}
    with pytest.raises(ValueError, match=r"after steps \[0, 5\].*last.pt is not the"):
        train(model, tokenizer, features, TEXTS, 2, **settings)


def png_in_16_bits(pixels, clear=None):
    """A PNG of one row of RGB pixels in 16 bits, with a transparent colour."""

    def chunk(name, data):
        checked = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checked

    row = b"\0" + b"".join(struct.pack(">HHH", *pixel) for pixel in pixels)
    header = struct.pack(">IIBBBBB", len(pixels), 1, 16, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header)]
    parts += [chunk(b"tRNS", struct.pack(">HHH", *clear))] if clear else []
    parts += [chunk(b"IDAT", zlib.compress(row)), chunk(b"IEND", b"")]
    return Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(parts)))


@pytest.mark.parametrize("clear", [(0, 0, 0), (16, 32, 48), (4096, 8192, 12288)])
def test_a_transparent_colour_in_16_bits_is_refused(clear):
    """Pillow would take eight bits of the pixels, and sixteen of the colour."""
    pixels = [(200, 200, 200), (4096, 8192, 12288)]
    with pytest.raises(ValueError, match="a transparent colour in 16 bits"):
        rgb_on_white(png_in_16_bits(pixels, clear))
    assert rgb_on_white(png_in_16_bits(pixels)).getpixel((1, 0)) == (16, 32, 48)


@pytest.mark.parametrize("zero_is, grey", [(0, [255, 204, 0]), (1, [0, 51, 255])])
def test_a_tiff_whose_white_is_zero_is_no_negative(zero_is, grey):
    """Tag 262 says what 0 stands for; of 16 bits Pillow does not turn it."""
    file, ramp = io.BytesIO(), np.array([[0, 13107, 65535]], np.uint16)
    Image.fromarray(ramp).save(file, "TIFF", tiffinfo={262: zero_is})
    picture = Image.open(file)
    assert picture.mode == "I;16" and picture.tag_v2[262] == zero_is
    assert np.asarray(rgb_on_white(picture))[0, :, 0].tolist() == grey
