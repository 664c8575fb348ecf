#!/usr/bin/env python3
"""Draw the book's first-page picture: captions, and the same with pictures shuffled.

    python tools/make_cover.py

Writes book/images/cover.png with the embedded trained model: the flamingo of OpenMoji,
two things by Twemoji, the flamingo of Twemoji, a thing by OpenMoji (no model here was
trained on either studio), and two pairs that no training scene held. All but the
flamingos are drawn by lot with --seed, not chosen. It also counts in how many of 100
places and sizes each of the two flamingos is named.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt

from flamingo_lite import (
    caption,
    load_captions,
    load_flamingo,
    make_scenes,
)

RIGHT, WRONG = "#d6336c", "#5c636a"


def choose(rows, seed):
    """Two flamingos and three things by unseen studios, two held-out pairs."""
    by_studio = {}
    for row in rows:
        by_studio.setdefault(row["studio"], []).append(row)
    trained = [row for row in rows if row["trained"]]
    flamingo, other_flamingo = flamingo_rows(rows)
    return [
        *make_scenes(flamingo, 1, seed=seed, pairs=0.0),
        *make_scenes(by_studio["twemoji"], 2, seed=seed, pairs=0.0),
        *make_scenes(other_flamingo, 1, seed=seed, pairs=0.0),
        *make_scenes(by_studio["openmoji"], 1, seed=seed, pairs=0.0),
        *make_scenes(trained, 2, seed=seed, pairs=1.0, held_out=True),
    ]


def flamingo_rows(rows):
    """The flamingo of each unseen studio, each in a list of its own."""
    mine = [row for row in rows if row["thing"] == "flamingo" and not row["trained"]]
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
    rows = [row for row in load_captions(ROOT / "data" / "emoji") if row["named"]]
    scenes = choose(rows, args.seed)
    pictures = [scene["picture"] for scene in scenes]
    captions = caption(model, image_processor, tokenizer, pictures)
    shuffled = captions[1:] + captions[:1]  # what it says when shown the next picture

    fig, axes = plt.subplots(2, len(scenes), figsize=(9.6, 4.9), facecolor="white")
    for row, said in enumerate((captions, shuffled)):
        for ax, picture, text, scene in zip(
            axes[row], pictures, said, scenes, strict=True
        ):
            ax.imshow(picture, alpha=1.0 if row == 0 else 0.5)
            colour = RIGHT if text == scene["text"] else WRONG
            ax.set_title(broken(text), fontsize=11, color=colour, linespacing=1.05)
            ax.axis("off")
    for y, text in (
        (0.985, "What the model says of each picture:"),
        (0.49, "What it says when it is shown the next one instead:"),
    ):
        fig.text(0.01, y, text, fontsize=12, color="#343a40", va="top")
    fig.subplots_adjust(0.01, 0.0, 0.99, 0.78, wspace=0.08, hspace=0.75)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out, dpi=150, metadata={"Software": None})
    right = sum(c == s["text"] for c, s in zip(captions, scenes, strict=True))
    print(f"{right} of {len(scenes)} captions are exact; {args.out.name} is written")
    for rows_of_one in flamingo_rows(rows):
        many = make_scenes(rows_of_one, 100, seed=args.seed + 1, pairs=0.0)
        said = caption(model, image_processor, tokenizer, [s["picture"] for s in many])
        found = sum(text == "a flamingo" for text in said)
        print(f"the flamingo of {rows_of_one[0]['studio']}: named in {found} of 100")


if __name__ == "__main__":
    main()
