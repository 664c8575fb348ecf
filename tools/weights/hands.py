#!/usr/bin/env python3
"""Who drew what: the drawings that are trained on, and the three tests by unseen hands.

    python tools/weights/hands.py --out sheet.png
        twelve scenes of each test, to look at

`sets_to_test` and `scenes_to_test` give what every script here tests on: emoji of the
trained studios, of Twemoji, of OpenMoji, and clip art by artists none of whose pictures
was trained on. `Painter` draws the scenes of chapters 7 and 7b anew, by the hands of
data/emoji and data/hands that may be trained on, in tools/weights/atlas.py's way.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from flamingo_lite import bootstrap_interval, make_scenes
from flamingo_lite.data import SIZE
from flamingo_lite.tasks import NUMBERS
from tools import ROOT
from tools.weights.atlas import Atlas, compose, free_numbers, read_rows, weather

DATA = ROOT / "data"
CLIP_ART = "unseen clip art"
UNSEEN = {"Twemoji": "twemoji", "OpenMoji": "openmoji"}


def hand_rows(named=True):
    """Rows of data/hands; each drawing counts as a studio of its own.

    An icon set may have several drawings of a thing, and `load_sprites` keeps one for
    each studio.
    """
    rows = read_rows(DATA / "hands")
    rows = [{**row, "studio": row["file_name"]} for row in rows]
    return [row for row in rows if row["named"] or not named]


def sets_to_test(named=True):
    """Rows to test on: {"trained studios", "Twemoji", "OpenMoji", CLIP_ART: rows}."""
    emoji = read_rows(DATA / "emoji")
    emoji = [row for row in emoji if row["named"] or not named]
    sets = {"trained studios": [row for row in emoji if row["trained"]]}
    for name, studio in UNSEEN.items():
        sets[name] = [row for row in emoji if row["studio"] == studio]
    sets[CLIP_ART] = [row for row in hand_rows(named) if not row["trained"]]
    return sets


def scenes_to_test(sets, n, seed):
    """Scenes of a test: of each set n single things, and n held-out pairs."""
    scenes = {
        name: make_scenes(rows, n, seed, pairs=0.0) for name, rows in sets.items()
    }
    pairs = make_scenes(sets["trained studios"], n, seed, pairs=1.0, held_out=True)
    return {**scenes, "held-out pairs": pairs}


def drawing_of(scene):
    """What must not be counted as independent: scenes that show the same drawing."""
    return (*scene["things"], *scene["studios"])


def interval(marks, drawings, n_samples=2000, seed=0):
    """Mean of marks, and its 95 % interval if other *drawings* had been tested.

    The same drawing in two places is not two independent tests, so drawings are drawn
    by lot, each with all its marks.

    Args:
        marks: a number for each picture.
        drawings: for each picture what it shows, see `drawing_of`.

    Returns:
        mean, low, high.
    """
    return bootstrap_interval(marks, n_samples, seed, groups=drawings)


def quarter_numbers(generator, plan, counts):
    """Change a plan for one thing into one for up to four copies of it, each in a
    quarter of its own, as `draw_count` of chapter 7b puts them.

    Args:
        generator: a CPU torch.Generator.
        plan: from `free_numbers`.
        counts: how many copies, of each scene.

    Returns:
        the plan, and (B, 4) bool, which of the four layers are there.
    """
    B, half = len(counts), SIZE / 2
    size = torch.rand(B, 4, generator=generator) * 10 + 22  # (B, 4), 22 … 32
    quarter = torch.rand(B, 4, generator=generator).argsort(dim=1)  # (B, 4), 0 … 3
    corner = torch.stack([quarter % 2, quarter // 2], dim=-1) * half  # (B, 4, 2)
    room = torch.rand(B, 4, 2, generator=generator) * (half - size)[..., None]
    more = {"size": size, "place": corner + room}
    more["mirror"] = torch.rand(B, 4, generator=generator) < 0.5
    for name in ("angle", "shear", "narrow", "ink", "paper"):  # (B, 2, …) to (B, 4, …)
        more[name] = plan[name][:, :1].repeat(1, 4, *[1] * (plan[name].ndim - 2))
    there = torch.arange(4) < torch.tensor(counts)[:, None]  # (B, 4)
    return {**plan, **more}, there


class Painter:
    """Draws scenes anew, by all hands that may be trained on, in any weather.

    What a scene shows stays; who drew it, on what ground, where and how large changes.

    Args:
        rows: named rows, with "trained" and "sort"; others than trained are left out.
        seed: an int.
        device: where pictures are composed.
    """

    def __init__(self, rows, seed, device="cpu"):
        self.rows = [row for row in rows if row["trained"]]
        self.atlas, self.seed = Atlas(self.rows, device), seed
        self.calls = 0

    def __call__(self, scenes):
        """Pictures of scenes from `make_scenes` or `make_counts`.

        Each scene's "studios" or "studio" becomes who draws it now.

        Returns:
            (scenes, 3, 64, 64) in 0 … 1, on the atlas's device.
        """
        counted = bool(scenes) and "number" in scenes[0]
        rng = np.random.default_rng((self.seed, self.calls))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.calls)
        self.calls += 1
        numbers = torch.full((len(scenes), 4 if counted else 2), -1)
        for i, scene in enumerate(scenes):
            things = [scene["thing"]] if counted else scene["things"]
            chosen = [int(self.atlas.pick(rng, thing)) for thing in things]
            hands = [self.atlas.hands[number] for number in chosen]
            scene |= {"studio": hands[0]} if counted else {"studios": hands}
            numbers[i, : len(chosen)] = torch.tensor(chosen)
        plan = free_numbers(generator, [scene.get("relation") for scene in scenes])
        if counted:
            counts = [NUMBERS.index(scene["number"]) + 1 for scene in scenes]
            plan, there = quarter_numbers(generator, plan, counts)
            numbers = numbers[:, :1].where(there, -1)  # (B, 4)
        return weather(compose(self.atlas, numbers, plan), plan)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    scenes = scenes_to_test(sets_to_test(), 12, args.seed)
    pictures = [np.asarray(s["picture"]) for some in scenes.values() for s in some]
    sheet = rearrange(np.stack(pictures), "(i j) y x c -> (i y) (j x) c", j=12)
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2)).save(
        args.out
    )
    for name, some in scenes.items():
        print(name, *(scene["text"] for scene in some), sep=", ")


if __name__ == "__main__":
    main()
