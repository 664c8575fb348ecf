#!/usr/bin/env python3
"""Draw the book's first-page picture: two dozen captions, and one thing exchanged.

    python tools/book/make_cover.py    with the model in data/tiny_flamingo
    python tools/book/make_cover.py --out FILE.png

Writes book/images/cover.png, and beside it cover.json, whose numbers sync.py puts
into book/intro.md. Four rows of six pictures: single things by Twemoji, by OpenMoji and
by artists of clip art, none of whom any model here was trained on, and pairs that no
training scene held. All are drawn by lot with --seed, not chosen; under each stands
what the model says, with ✓ or ✗, and under a wrong caption the truth. The last row
is a measurement of its own: in each picture one thing is exchanged for another by the
same studio, or for other clip art that nothing was trained on, drawn by lot; all else
stays where it is, and the model is run on that picture. In a pair it is the second
thing, and the new pair is held out as well. All 24 are exchanged and counted; the row
shows the pairs.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import ROOT

sys.path.insert(0, str(ROOT / "book"))

import matplotlib.pyplot as plt
import numpy as np
from figures import INK, verdict

from flamingo_lite import (
    caption,
    draw_scene,
    is_held_out,
    load_flamingo,
    load_sprites,
    make_scenes,
)
from tools.weights.hands import CLIP_ART, sets_to_test

COLUMNS = 6
ROWS = {
    "Twemoji": "Drawn by Twemoji, which no model here was trained on",
    "OpenMoji": "Drawn by OpenMoji, which no model here was trained on",
    CLIP_ART: "Clip art by artists whom no model here was trained on",
    "held-out pairs": "Two things that no training picture held together",
    "exchanged": "The row above, in each picture one thing exchanged for another",
}


def all_rows():
    """Of every test of hands.py; the unseen clip art counts as one studio."""
    sets = sets_to_test()
    sets[CLIP_ART] = [{**row, "studio": CLIP_ART} for row in sets[CLIP_ART]]
    return sets


def choose(sets, seed):
    """{test: COLUMNS scenes}, single things of the unseen hands and held-out pairs."""
    names = ("Twemoji", "OpenMoji", CLIP_ART)
    found = {
        name: make_scenes(sets[name], COLUMNS, seed + number, pairs=0.0)
        for number, name in enumerate(names)
    }
    trained = sets["trained studios"]
    pairs = make_scenes(trained, COLUMNS, seed, pairs=1.0, held_out=True)
    return {**found, "held-out pairs": pairs}


def drawn(scene, sprites, names, seed):
    """A scene with its things in places that the seed alone decides."""
    drawings = [
        sprites[thing][studio]
        for thing, studio in zip(scene["things"], scene["studios"], strict=True)
    ]
    picture = draw_scene(np.random.default_rng(seed), drawings, scene["relation"])
    text = f" {scene['relation']} ".join(names[thing] for thing in scene["things"])
    return {**scene, "picture": picture, "text": text}


def exchanged(rng, scene, sprites):
    """The same scene with its last thing exchanged for another by the same studio."""
    *first, old = scene["things"]
    others = [
        thing
        for thing, drawings in sprites.items()
        if thing not in scene["things"]
        and scene["studios"][-1] in drawings
        and all(is_held_out(one, thing) for one in first)
    ]
    return {**scene, "things": [*first, str(rng.choice(others))]}


def counts(said, scenes):
    """How many pictures there are, and how many captions are right word for word."""
    right = sum(text == scene["text"] for text, scene in zip(said, scenes, strict=True))
    return {"pictures": len(scenes), "right": right}


def draw(rows, path):
    """Draw the grid.

    Args:
        rows: {key of ROWS: (scenes, captions)}.
        path: of the PNG.
    """
    fig, axes = plt.subplots(
        len(rows), COLUMNS, figsize=(9.6, 2.05 * len(rows)), facecolor="white"
    )
    height = 1 / len(rows)
    for number, (name, (scenes, said)) in enumerate(rows.items()):
        top = 1 - number * height
        fig.text(0.012, top - 0.008, ROWS[name], fontsize=11, color=INK, va="top")
        for column, (scene, text) in enumerate(zip(scenes, said, strict=True)):
            ax = axes[number, column]
            ax.set_position(
                (column / COLUMNS, top - 0.68 * height, 1 / COLUMNS, 0.55 * height)
            )
            ax.imshow(scene["picture"])
            ax.axis("off")
            title, colour = verdict(text, scene["text"])
            lines = [textwrap.fill(line, 19) for line in title.split("\n")]
            style = {"fontsize": 9.5, "ha": "center", "va": "top", "linespacing": 1.1}
            at = {"xy": (0.5, 0), "xycoords": "axes fraction", "xytext": (0, -2)}
            ax.annotate(
                lines[0], **at, textcoords="offset points", color=colour, **style
            )
            if len(lines) > 1:  # the truth, in ink, below as many lines as there are
                under = "\n" * (lines[0].count("\n") + 1) + lines[1]
                ax.annotate(under, **at, textcoords="offset points", color=INK, **style)
    fig.savefig(path, dpi=150, metadata={"Software": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "book/images/cover.png")
    args = parser.parse_args()
    built, sets = load_flamingo("tiny"), all_rows()
    everything = [row for rows in sets.values() for row in rows]
    sprites = load_sprites(everything)
    names = {row["thing"]: row["text"] for row in everything}
    rng, shown, numbers = np.random.default_rng(args.seed), {}, {}
    exchanged_all = {"pictures": 0, "right": 0, "as before": 0}
    for group, (name, chosen) in enumerate(choose(sets, args.seed).items()):
        both = []
        others = [exchanged(rng, scene, sprites) for scene in chosen]
        for some in (chosen, others):
            scenes = [
                drawn(scene, sprites, names, (args.seed, group, number))
                for number, scene in enumerate(some)
            ]
            both.append((scenes, caption(*built, [s["picture"] for s in scenes])))
        (scenes, said), (others, now) = both
        shown[name], shown["exchanged"] = both
        numbers[name] = counts(said, scenes)
        for key, number in counts(now, others).items():
            exchanged_all[key] += number
        same = sum(old == new for old, new in zip(said, now, strict=True))
        exchanged_all["as before"] += same
    draw({name: shown[name] for name in ROWS}, args.out)
    numbers = {"seed": args.seed, "tests": numbers, "exchanged": exchanged_all}
    args.out.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(json.dumps(numbers), f"{args.out.name} is written", sep="\n")


if __name__ == "__main__":
    main()
