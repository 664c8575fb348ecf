#!/usr/bin/env python3
"""Draw the book's first-page picture: captions, and the same with pictures shuffled.

    python tools/make_cover.py

Writes book/images/cover.png with the embedded trained model. First a flamingo by a
studio that was trained on, in a new place; then three things by Twemoji and one by
OpenMoji, which no model here was trained on; then two pairs that no training scene
held. All but the flamingo are drawn by lot with --seed, not chosen.
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

RIGHT, WRONG = "#d6336c", "#868e96"


def choose(rows, seed):
    """A flamingo, four things by unseen studios, two held-out pairs: seven scenes."""
    by_studio = {}
    for row in rows:
        by_studio.setdefault(row["studio"], []).append(row)
    trained = [row for row in rows if row["trained"]]
    flamingo = [row for row in by_studio["noto"] if row["thing"] == "flamingo"]
    return [
        *make_scenes(flamingo, 1, seed=seed, pairs=0.0),
        *make_scenes(by_studio["twemoji"], 3, seed=seed, pairs=0.0),
        *make_scenes(by_studio["openmoji"], 1, seed=seed, pairs=0.0),
        *make_scenes(trained, 2, seed=seed, pairs=1.0, held_out=True),
    ]


def broken(caption):
    """A caption on two lines if it has a relation in it."""
    return caption.replace(" to the", "\nto the").replace(" above", "\nabove")


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

    fig, axes = plt.subplots(2, len(scenes), figsize=(9.6, 4.2), facecolor="white")
    for row, said in enumerate((captions, shuffled)):
        for ax, picture, text, scene in zip(
            axes[row], pictures, said, scenes, strict=True
        ):
            ax.imshow(picture, alpha=1.0 if row == 0 else 0.35)
            colour = RIGHT if text == scene["text"] else WRONG
            ax.set_title(broken(text), fontsize=7.5, color=colour)
            ax.axis("off")
    for y, text in (
        (0.985, "What the model says of each picture:"),
        (0.475, "What it says when it is shown the next one instead:"),
    ):
        fig.text(0.01, y, text, fontsize=8.5, color="#343a40", va="top")
    fig.subplots_adjust(0.01, 0.0, 0.99, 0.84, wspace=0.08, hspace=0.55)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out, dpi=110, metadata={"Software": None})
    right = sum(c == s["text"] for c, s in zip(captions, scenes, strict=True))
    print(f"{right} of {len(scenes)} captions are exact; {args.out.name} is written")


if __name__ == "__main__":
    main()
