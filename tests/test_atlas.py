"""Scenes composed as tensors: the same pictures as chapter 7 draws, on any device."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from flamingo_lite import draw_scene
from tools.weights import atlas
from tools.weights.make_pictures import is_trained_artist


@pytest.fixture(scope="module")
def rows():
    return atlas.read_rows(atlas.DATA / "emoji", atlas.DATA / "hands")


@pytest.fixture(scope="module")
def some(rows):
    """An atlas of a few drawings of each sort."""
    trained = [row for row in rows if row["trained"]]
    return atlas.Atlas(trained[::40])


@pytest.mark.parametrize("relation", [None, "to the left of", "above"])
def test_composed_scenes_are_those_that_draw_scene_draws(some, relation):
    n, differences = 2 if relation else 1, []
    coloured = (~some.inked).nonzero()[:, 0].tolist()
    for seed in range(30):
        numbers = [coloured[(seed * 7 + i) % len(coloured)] for i in range(n)]
        drawings = [
            Image.fromarray(some.pixels[i].permute(1, 2, 0).numpy(), "RGBA")
            for i in numbers
        ]
        slow = draw_scene(np.random.default_rng(seed), drawings, relation)
        plan = atlas.plain_numbers(np.random.default_rng(seed), n, relation)
        numbers = torch.tensor([(numbers + [-1])[:2]])
        fast = atlas.compose(some, numbers, plan)[0].permute(1, 2, 0)  # (64, 64, 3)
        differences.append(np.abs(fast.numpy() * 255 - np.asarray(slow)).mean())
    # Two ways to shrink a drawing: they differ at its edges, in a few grey levels.
    assert max(differences) < 3 and np.mean(differences) < 1.2


def test_a_scene_in_another_place_is_told_apart(some):
    plan = atlas.plain_numbers(np.random.default_rng(0), 1)
    there = atlas.compose(some, torch.tensor([[0, -1]]), plan)
    plan["place"] = plan["place"] + 3
    elsewhere = atlas.compose(some, torch.tensor([[0, -1]]), plan)
    assert (there - elsewhere).abs().mean() * 255 > 3


def test_the_same_seed_gives_the_same_scenes(some):
    first, again, other = (atlas.some_scenes(some, seed, 12) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (12, 3, 64, 64) and 0 <= first.min() and first.max() <= 1


def test_an_ink_can_be_told_from_its_ground(some):
    plan = atlas.free_numbers(torch.Generator().manual_seed(0), [None] * 400)
    ground = plan["ground"].mean(dim=(1, 2))  # (B,)
    ink = plan["ink"][:, 0].mean(dim=1)  # (B,)
    assert ((ground - ink).abs() > 0.05).all()
    assert ((ground - ink).abs() > 0.2).float().mean() > 0.9


@pytest.mark.parametrize("quality", [20, 50, 75])
def test_jpeg_leaves_what_pillows_jpeg_leaves(quality):
    torch.manual_seed(quality)
    noise = nn.functional.avg_pool2d(torch.rand(4, 3, 64, 64), 3, 1, 1)
    pictures = (noise * 255).round() / 255  # (4, 3, 64, 64), as a file can hold them
    ours = atlas.jpeg(pictures, torch.full((4,), float(quality)))
    for picture, worn in zip(pictures, ours, strict=True):
        pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=0)
        theirs = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
        # A file rounds to whole numbers on its way, twice: one or two grey levels.
        assert (worn - theirs).abs().mean() * 255 < 2.2
        assert (picture - theirs).abs().mean() * 255 > 4


def test_nobody_kept_for_a_test_is_in_the_training(rows):
    trained = {row["studio"] for row in rows if row["trained"]}
    kept = {row["studio"] for row in rows if not row["trained"]}
    assert not trained & kept and {"twemoji", "openmoji"} <= kept
    art = [row for row in rows if row["sort"] == "clip art"]
    assert all(is_trained_artist(row["studio"]) == row["trained"] for row in art)
    assert len(kept) > 40 and 150 < sum(not row["trained"] for row in art) < 250


def test_the_listing_is_what_hands_json_says(rows):
    hands = json.loads((ROOT / "tools" / "weights" / "hands.json").read_text())
    icons = sum(len(i) for s in hands["icon sets"].values() for i in s.values())
    art = [
        artist
        for pictures in hands["openclipart"].values()
        for _, artist in pictures
        if artist != "unknown"
    ]
    listed = [row for row in rows if row["path"].is_relative_to(atlas.DATA / "hands")]
    assert len(listed) == icons + len(art)
    assert sorted(art) == sorted(r["studio"] for r in listed if r["sort"] == "clip art")
