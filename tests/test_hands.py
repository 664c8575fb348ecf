"""Who is trained on and who is tested on, and lessons drawn by all trained hands."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from flamingo_lite import encode_pictures, make_counts, make_scenes
from flamingo_lite.tasks import NUMBERS

sys.path.insert(0, str(ROOT))
from tools.measure import compare_data, measure_captions
from tools.weights import hands
from tools.weights.atlas import compose, free_numbers, read_rows
from tools.weights.lessons import Lessons, encode_tensors

THINGS = ("fox", "lemon", "bus", "owl", "guitar", "cactus", "frog", "key")
DATA = ROOT / "data"


@pytest.fixture(scope="module")
def rows():
    return [r for r in read_rows(DATA / "emoji", DATA / "hands") if r["named"]]


@pytest.fixture(scope="module")
def few(rows):
    """Rows of some things only."""
    return [row for row in rows if row["thing"] in THINGS]


@pytest.fixture(scope="module")
def emoji(few):
    """What the lessons are written about: some things by the trained studios."""
    mine = [r for r in few if r["trained"] and r["path"].is_relative_to(DATA / "emoji")]
    return [{k: v for k, v in row.items() if k != "sort"} for row in mine]


# ------------------------------------------------------------------- the three tests


def test_no_test_shows_a_hand_that_was_trained_on(rows):
    sets = hands.sets_to_test()
    trained = {row["studio"] for row in rows if row["trained"]}
    artists = {
        str(row["path"]): row["studio"] for row in rows if row["sort"] == "clip art"
    }
    assert list(sets) == ["trained studios", "Twemoji", "OpenMoji", hands.CLIP_ART]
    for name, mine in sets.items():
        of = {artists.get(str(row["path"]), row["studio"]) for row in mine}
        assert mine and (of <= trained) == (name == "trained studios"), name
        assert not of & trained or name == "trained studios"


def test_every_drawing_of_a_test_can_be_drawn(rows):
    """An artist with three frogs has three: none hides the others."""
    mine = hands.sets_to_test()[hands.CLIP_ART]
    assert len({(r["thing"], r["studio"]) for r in mine}) == len(mine)
    kept = [r for r in rows if r["sort"] == "clip art" and not r["trained"]]
    assert len(mine) == len(kept) > len({(r["thing"], r["studio"]) for r in kept})
    scenes = hands.scenes_to_test({hands.CLIP_ART: mine, "trained studios": mine}, 9, 0)
    assert {"held-out pairs", hands.CLIP_ART} < set(scenes)
    assert all(len(s["things"]) == 1 for s in scenes[hands.CLIP_ART])


def test_the_same_drawing_again_is_no_new_test():
    marks = np.tile([1, 0, 1, 1, 0, 1, 0, 1, 1, 1], 30)  # ten drawings, thirty times
    mean, low, high = hands.interval(marks, list(range(10)) * 30)
    _, low_1, high_1 = hands.interval(marks[:10], range(10))
    assert mean == pytest.approx(0.7) and (low, high) == (low_1, high_1)
    _, low_300, high_300 = hands.interval(marks, range(300))  # were they independent
    assert high - low > 3 * (high_300 - low_300)


# ------------------------------------------------------------------------ the painter


def test_a_painter_keeps_what_a_scene_shows(few, emoji):
    scenes = make_scenes(emoji, 30, seed=1)
    before = [(s["things"], s["text"], s["relation"]) for s in scenes]
    painter = hands.Painter(few, seed=2)
    first = painter(scenes)
    assert [(s["things"], s["text"], s["relation"]) for s in scenes] == before
    assert first.shape == (30, 3, 64, 64) and 0 <= first.min() and first.max() <= 1
    drawn_by = {hand for scene in scenes for hand in scene["studios"]}
    trained = {row["studio"] for row in few if row["trained"]}
    assert drawn_by <= trained and len(drawn_by) > 9  # more than the emoji studios
    assert not torch.equal(painter(scenes), first)
    assert torch.equal(hands.Painter(few, seed=2)(scenes), first)


def test_a_painter_opens_trained_hands_only(few):
    painter = hands.Painter(few, seed=0)
    assert all(row["trained"] for row in painter.rows)
    assert set(painter.atlas.hands) == {r["studio"] for r in few if r["trained"]}


def test_as_many_are_drawn_as_are_asked_for(few):
    """On white, with a drawing that fills its square: each quarter is full or empty."""
    atlas = hands.Painter(few, seed=0).atlas
    atlas.pixels[0], atlas.half[0] = 255, 255
    atlas.pixels[0, :3], atlas.half[0, :3] = 0, 0  # a black square
    counts = [1 + i % 4 for i in range(40)]
    generator = torch.Generator().manual_seed(0)
    plan = free_numbers(generator, [None] * 40)
    plan, there = hands.quarter_numbers(generator, plan, counts)
    plain = {k: plan[k] for k in ("size", "place", "mirror")}
    numbers = torch.zeros(40, 1, dtype=torch.int64).where(there, -1)
    pictures = compose(atlas, numbers, {**plain, "ground": torch.ones(40, 2, 3)})
    dark = (pictures[:, 0] < 0.5).float()  # (B, 64, 64)
    quarters = torch.nn.functional.avg_pool2d(dark[:, None], 32)  # (B, 1, 2, 2)
    assert ((quarters > 0.3).sum(dim=(1, 2, 3)) == torch.tensor(counts)).all()
    assert ((quarters < 0.02) | (quarters > 0.3)).all()


def test_counted_scenes_are_drawn_by_their_number(few, emoji):
    scenes = make_counts(emoji, 20, seed=3)
    pictures = hands.Painter(few, seed=4)(scenes)
    assert pictures.shape == (20, 3, 64, 64)
    trained = {row["studio"] for row in few if row["trained"]}
    assert {scene["studio"] for scene in scenes} <= trained
    assert {scene["number"] for scene in scenes} == set(NUMBERS)


# ------------------------------------------------------------------------ the lessons


def taught(emoji, paint):
    """Lessons about some things; the features are a number for each picture."""
    lessons = Lessons(lambda some: torch.zeros(len(some)), paint, lambda line: None)
    lessons.captions(emoji, 12, 0)
    for task in ("where", "how many", "is there", "what kind", "what is this"):
        lessons.questions(emoji, task, 6, 0)
    lessons.stories(emoji, 3, 0)
    lessons.task_prompts(emoji, 4, 60, 0)
    return lessons


def test_who_draws_them_changes_no_lesson(few, emoji):
    with_hands = taught(emoji, hands.Painter(few, seed=5))
    without = taught(emoji, None)
    assert with_hands.texts == without.texts and len(without.texts) > 45
    assert with_hands.sequences == without.sequences
    assert len(torch.cat(with_hands.features)) == without.n
    used = {number for sequence in without.sequences for number in sequence}
    assert max(used) < without.n


def test_a_new_word_is_asked_about_another_hands_drawing(few, emoji):
    painter, seen = hands.Painter(few, 6), []
    pick = painter.atlas.pick

    def noted(rng, thing):
        number = pick(rng, thing)
        seen.append(painter.atlas.hands[number])  # who really drew it
        return number

    painter.atlas.pick = noted
    lessons = Lessons(lambda some: torch.zeros(len(some)), painter)
    lessons.naming_prompts(emoji, 20, 300, 0)
    assert len(lessons.sequences) >= 20
    for sequence in lessons.sequences:
        *shown, asked = (seen[number] for number in sequence)
        assert asked not in shown


def test_tensors_are_encoded_as_pictures_are(few, emoji):
    from flamingo_lite import load_vision_encoder

    encoder, image_processor = load_vision_encoder(f"local-dir:{DATA / 'tiny_clip'}")
    pictures = [scene["picture"] for scene in make_scenes(emoji, 5, seed=7)]
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures]))
    ours = encode_tensors(encoder, pixels.permute(0, 3, 1, 2) / 255)
    assert torch.equal(
        encode_tensors(encoder.visual, pixels.permute(0, 3, 1, 2) / 255), ours
    )
    theirs = encode_pictures(encoder, image_processor, pictures)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=5e-3)


# ---------------------------------------------------- what each change of data is worth


def test_each_sort_of_data_has_what_the_one_before_has(rows):
    trained = [row for row in rows if row["trained"]]
    chosen = [
        {row["path"] for row in trained if wanted(row)}
        for wanted, _, _ in compare_data.VARIANTS.values()
    ]
    assert chosen[0] < chosen[1] < chosen[2] == chosen[3]
    assert all(path.is_relative_to(DATA / "emoji") for path in chosen[0])


def test_plain_batches_stand_upright_on_a_level_pale_ground(few):
    few = [row for row in few if row["trained"]]
    batches = compare_data.PlainBatches(few, 0, [8, 8], [4, 4], sorts=["emoji"])
    pictures = (batches(0)[0] + 1) / 2  # (B, 3, 64, 64)
    corners = pictures[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]  # (B, 3, 4)
    middle = corners.median(dim=-1, keepdim=True).values
    level = ((corners - middle).abs() < 1e-3).all(dim=1)  # (B, 4), not under a drawing
    assert level.float().mean() > 0.8 and corners.min() >= 0
    assert middle.min() > 0.74


# ------------------------------------------------------------------------- the numbers


def test_the_data_stay_small():
    """A clone should be quick: 45 MB of pictures and weights at most."""
    sizes = [path.stat().st_size for path in DATA.rglob("*") if path.is_file()]
    assert sum(sizes) < 45e6


def test_the_readme_says_what_was_measured():
    lines = json.loads((DATA / "tiny_flamingo" / "captions.json").read_text())
    told = (ROOT / "README.md").read_text()
    begin, end = measure_captions.BEGIN, measure_captions.END
    assert told.split(begin)[1].split(end)[0] == measure_captions.table(lines)
    tests = [line["test"] for line in lines]
    assert {*hands.sets_to_test(), "held-out pairs"} == set(tests)
    assert len({line["seed"] for line in lines}) == 3


def test_the_readmes_table_goes_between_its_marks(tmp_path):
    page = tmp_path / "README.md"
    begin, end = measure_captions.BEGIN, measure_captions.END
    page.write_text(f"before\n{begin}old\n{end}after\n")
    line = {"test": "Twemoji", "seed": 1, "exact": [1, 1, 0, 0], "shuffled": [0] * 4}
    line |= {"CLIP alone": [1, 1, 1, 1], "drawings": ["a", "b", "c", "d"]}
    measure_captions.write_readme([line], page)
    text = page.read_text()
    assert text.startswith(f"before\n{begin}| pictures |") and "old" not in text
    assert "| Twemoji | 50 % [0, 100] | 0 % [0, 0] | 100 % [100, 100] |\n" in text
    assert text.endswith(f"{end}after\n")


def test_a_sheet_of_test_scenes_is_drawn(tmp_path, monkeypatch):
    out = tmp_path / "sheet.png"
    monkeypatch.setattr(sys, "argv", ["hands.py", "--out", str(out)])
    hands.main()
    with Image.open(out) as sheet:
        assert sheet.size == (12 * 128, 5 * 128)
