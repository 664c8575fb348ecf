"""Weights in eight bits: a smaller file, nearly the same model, and no nonsense."""

import shutil
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from flamingo_lite import (
    caption,
    caption_losses,
    encode_pictures,
    load_captions,
    load_flamingo,
    make_scenes,
    save_flamingo,
    trained_tensors,
)

sys.path.insert(0, str(ROOT))
from tools.weights.shrink import shrink

WEIGHTS = "flamingo.safetensors"


@pytest.fixture(scope="module")
def tiny():
    return load_flamingo("tiny")


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """The trained tiny model, kept in eight bits."""
    folder = tmp_path_factory.mktemp("bits") / "model"
    save_flamingo(tiny[0], folder, torch.float16, bits=8)
    return folder


def test_each_number_moves_by_half_a_step_at_most(tiny, saved):
    before = trained_tensors(tiny[0])
    after = trained_tensors(load_flamingo(saved)[0])
    packed, n = load_file(saved / WEIGHTS), 0
    for name, tensor in before.items():
        moved = (tensor - after[name]).abs()
        if f"{name}.scale" in packed:
            n += tensor.numel()
            assert packed[name].dtype == torch.int8
            assert (moved <= 0.5001 * packed[f"{name}.scale"]).all(), name
            assert moved.any()
        else:  # half precision
            assert (moved <= 1e-3 * tensor.abs() + 1e-7).all(), name
    assert n > 0.99 * sum(tensor.numel() for tensor in before.values())


def test_the_file_is_half_of_half_precision(tiny, saved, tmp_path):
    save_flamingo(tiny[0], tmp_path, torch.float16)
    half = (tmp_path / WEIGHTS).stat().st_size
    assert (saved / WEIGHTS).stat().st_size < 0.55 * half
    before, after = shrink(tmp_path)  # the script makes the same of it
    assert before == half and after == (saved / WEIGHTS).stat().st_size
    mine, others = load_file(saved / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert mine.keys() == others.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, others[name]), name
    with pytest.raises(SystemExit, match="eight bits already"):
        shrink(tmp_path)


def test_it_says_the_same(tiny, saved):
    model, image_processor, tokenizer = tiny
    small, _, _ = load_flamingo(saved)
    rows = [row for row in load_captions(ROOT / "data" / "emoji") if row["named"]]
    scenes = make_scenes(rows, 60, seed=71)
    pictures = [scene["picture"] for scene in scenes]
    features = encode_pictures(model.vision_encoder, image_processor, pictures)
    said = [caption(m, None, tokenizer, features) for m in (model, small)]
    assert sum(a == b for a, b in zip(*said, strict=True)) >= 57
    texts = [scene["text"] for scene in scenes]
    losses = [caption_losses(m, tokenizer, features, texts) for m in (model, small)]
    assert (losses[0] - losses[1]).abs().mean() < 0.01


def spoilt(saved, tmp_path, change):
    """A copy of a saved model with its tensors changed."""
    shutil.copytree(saved, tmp_path / "spoilt")
    tensors = load_file(saved / WEIGHTS)
    name = next(name for name in tensors if f"{name}.scale" in tensors)
    change(tensors, name)
    save_file(tensors, tmp_path / "spoilt" / WEIGHTS)
    return tmp_path / "spoilt", name


def lose_scale(tensors, name):
    del tensors[f"{name}.scale"]


def lose_matrix(tensors, name):
    del tensors[name]


def cut_scale(tensors, name):
    tensors[f"{name}.scale"] = tensors[f"{name}.scale"][:-1].clone()


def broken_scale(tensors, name):
    tensors[f"{name}.scale"][0] = float("nan")


@pytest.mark.parametrize(
    "change, told",
    [
        (lose_scale, "holds something other than finite floats"),
        (lose_matrix, "is no scale of a matrix in eight bits"),
        (cut_scale, "is no scale of a matrix in eight bits"),
        (broken_scale, "holds something other than finite floats"),
    ],
)
def test_a_spoilt_file_is_refused_by_name(saved, tmp_path, change, told):
    folder, name = spoilt(saved, tmp_path, change)
    with pytest.raises(ValueError, match=told) as error:
        load_flamingo(folder)
    assert name in str(error.value)


def test_other_bits_are_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="bits is 8, or None"):
        save_flamingo(tiny[0], tmp_path, bits=4)
    assert not list(tmp_path.iterdir())
