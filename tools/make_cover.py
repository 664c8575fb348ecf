#!/usr/bin/env python3
"""Draw the book's first-page picture: captions, and captions with one thing exchanged.

    python tools/make_cover.py

Writes book/images/cover.png with the embedded trained model: the flamingo of OpenMoji,
a thing by Twemoji, a piece of clip art, the flamingo of Twemoji, a thing by OpenMoji
(no model here was trained on these studios and artists), and two pairs that no training
scene held. All but the flamingos are drawn by lot with --seed, not chosen. The lower
row is a measurement of its own: in each picture one thing is exchanged for another by
the same studio, or for other clip art that nothing was trained on, drawn by lot; all
else stays where it is, and the model is run on that picture. In a pair it is the second
thing, and the new pair is held out as well. The script also counts in how
many of 100 places and sizes each of the two flamingos is named.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt
import numpy as np
from hands import CLIP_ART, UNSEEN, sets_to_test

from flamingo_lite import (
    caption,
    draw_scene,
    is_held_out,
    load_flamingo,
    load_sprites,
    make_scenes,
)

RIGHT, WRONG = "#d6336c", "#5c636a"


def all_rows():
    """Of every test of tools/hands.py; the unseen clip art counts as one studio."""
    sets = sets_to_test()
    sets[CLIP_ART] = [{**row, "studio": CLIP_ART} for row in sets[CLIP_ART]]
    return [row for rows in sets.values() for row in rows]


def choose(rows, seed):
    """Two flamingos and three things by unseen hands, two held-out pairs."""
    by_studio = {}
    for row in rows:
        by_studio.setdefault(row["studio"], []).append(row)
    trained = [row for row in rows if row["trained"]]
    flamingo, other_flamingo = flamingo_rows(rows)
    return [
        *make_scenes(flamingo, 1, seed=seed, pairs=0.0),
        *make_scenes(by_studio["twemoji"], 1, seed=seed, pairs=0.0),
        *make_scenes(by_studio[CLIP_ART], 1, seed=seed, pairs=0.0),
        *make_scenes(other_flamingo, 1, seed=seed, pairs=0.0),
        *make_scenes(by_studio["openmoji"], 1, seed=seed, pairs=0.0),
        *make_scenes(trained, 2, seed=seed, pairs=1.0, held_out=True),
    ]


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


def flamingo_rows(rows):
    """The flamingo of each unseen studio, each in a list of its own."""
    mine = [row for row in rows if row["thing"] == "flamingo"]
    mine = [row for row in mine if row["studio"] in UNSEEN.values()]
    return [[row] for row in sorted(mine, key=lambda row: row["studio"])]


def broken(caption):
    """A caption on lines of its own for a relation."""
    caption = caption.replace(" to the left of ", "\nto the left of\n")
    return caption.replace(" above ", "\nabove\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "book/images/cover.png")
    args = parser.parse_args()
    model, image_processor, tokenizer = load_flamingo("tiny")
    rows = all_rows()
    sprites, names = load_sprites(rows), {row["thing"]: row["text"] for row in rows}
    rng, scenes, right = np.random.default_rng(args.seed), [[], []], []
    for number, scene in enumerate(choose(rows, args.seed)):
        for row, one in zip(
            scenes, (scene, exchanged(rng, scene, sprites)), strict=True
        ):
            row.append(drawn(one, sprites, names, (args.seed, number)))

    n = len(scenes[0])
    fig, axes = plt.subplots(2, n, figsize=(9.6, 4.9), facecolor="white")
    for row, one in zip(axes, scenes, strict=True):
        pictures = [scene["picture"] for scene in one]
        said = caption(model, image_processor, tokenizer, pictures)
        right.append([text == s["text"] for text, s in zip(said, one, strict=True)])
        for ax, picture, text, good in zip(row, pictures, said, right[-1], strict=True):
            ax.imshow(picture)
            colour = RIGHT if good else WRONG
            ax.set_title(broken(text), fontsize=11, color=colour, linespacing=1.05)
            ax.axis("off")
        print(
            *(f"{s['text']} -> {text}" for s, text in zip(one, said, strict=True)),
            sep="\n",
        )
    for y, text in (
        (0.985, "What the model says of each picture:"),
        (
            0.49,
            "One thing in each exchanged for another, by lot, and what it says now:",
        ),
    ):
        fig.text(0.01, y, text, fontsize=12, color="#343a40", va="top")
    fig.subplots_adjust(0.01, 0.0, 0.99, 0.78, wspace=0.08, hspace=0.75)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out, dpi=150, metadata={"Software": None})
    above, below = map(sum, right)
    print(
        f"{above} of {n} captions are exact, {below} below; {args.out.name} is written"
    )
    for rows_of_one in flamingo_rows(rows):
        many = make_scenes(rows_of_one, 100, seed=args.seed + 1, pairs=0.0)
        said = caption(model, image_processor, tokenizer, [s["picture"] for s in many])
        found = sum(text == "a flamingo" for text in said)
        print(f"the flamingo of {rows_of_one[0]['studio']}: named in {found} of 100")


if __name__ == "__main__":
    main()
