#!/usr/bin/env python3
"""Make a caption folder of real-sized JPEGs, to try a long run before the real ones.

    python tools/measure/big_folder.py 3000 pictures    about 10 minutes on one core

Writes pictures/train and pictures/test, each with its JPEGs and a `metadata.jsonl`, as
get_captions.py does: every fifth picture is a test picture, "text" is a list of
two captions. A picture is 640 x 480, as COCO's are, every tenth 4000 x 3000, as a
phone's are. They show drawings of data/emoji on a noisy ground: no photographs, but as
large, and as slow to decode. The same seed gives the same pictures.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image, ImageOps

from flamingo_lite import load_captions, load_sprites
from tools import ROOT

SMALL, LARGE = (640, 480), (4000, 3000)


def noisy_ground(rng, size):
    """An RGB picture of one slope of colour with grain on it, as a photograph has."""
    corners = rng.integers(60, 220, (2, 2, 3)).astype(np.uint8)
    slope = Image.fromarray(corners).resize(size, Image.Resampling.BILINEAR)
    grain = rng.integers(0, 40, (256, 256, 3)).astype(np.uint8)
    tiles = [-(-side // 256) for side in size]
    whole = np.tile(grain, (tiles[1], tiles[0], 1))[: size[1], : size[0]]
    return Image.fromarray((np.asarray(slope) // 2 + whole + 40).astype(np.uint8))


def draw_photograph(rng, sprites, names, size):
    """One picture with two things side by side, and its two captions."""
    things = [str(t) for t in rng.choice(list(sprites), 2, replace=False)]
    picture, side = noisy_ground(rng, size), min(size) // 2
    for place, thing in enumerate(things):
        drawing = sprites[thing][str(rng.choice(list(sprites[thing])))]
        drawing = drawing.resize((side, side), Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            drawing = ImageOps.mirror(drawing)
        x = place * size[0] // 2 + int(rng.integers(0, size[0] // 2 - side + 1))
        y = int(rng.integers(0, size[1] - side + 1))
        picture.paste(drawing, (x, y), drawing)
    one, other = (names[thing] for thing in things)
    return picture, [f"{one} to the left of {other}", f"{one} and {other}"]


def make_folder(folder, n, seed=0, large_every=10, report=None):
    """Write the folder: {split: number of pictures}.

    Args:
        folder: gets train/ and test/.
        n: how many pictures.
        seed: an int.
        large_every: one picture in so many has 12 megapixels; 0, none.
        report: called with the number of pictures made, at times.
    """
    rows = [row for row in load_captions(ROOT / "data" / "emoji") if row["named"]]
    rows = [row for row in rows if row["trained"]]
    sprites, names = load_sprites(rows), {row["thing"]: row["text"] for row in rows}
    rng, lines = np.random.default_rng(seed), {"train": [], "test": []}
    for number in range(n):
        split = "test" if number % 5 == 4 else "train"
        is_large = large_every and number % large_every == large_every // 3
        size = LARGE if is_large else SMALL
        picture, texts = draw_photograph(rng, sprites, names, size)
        place = Path(folder, split)
        place.mkdir(parents=True, exist_ok=True)
        name = f"{number:06d}.jpg"
        picture.save(place / name, quality=85)
        lines[split].append(json.dumps({"file_name": name, "text": texts}) + "\n")
        if report and number % 100 == 99:
            report(number + 1)
    for split, written in lines.items():
        if written:
            Path(folder, split, "metadata.jsonl").write_text("".join(written))
    return {split: len(written) for split, written in lines.items() if written}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("n", type=int, help="how many pictures")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.n < 1:
        sys.exit(f"big_folder: {args.n} pictures are none")
    if args.folder.exists() and any(args.folder.iterdir()):
        sys.exit(f"big_folder: {args.folder} is not empty")
    counts = make_folder(args.folder, args.n, args.seed, report=print)
    size = sum(path.stat().st_size for path in args.folder.rglob("*.jpg"))
    print(f"{args.folder}: {counts}, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
