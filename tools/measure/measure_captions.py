#!/usr/bin/env python3
"""What a trained Flamingo says of all test pictures, with its controls; README's table.

    python tools/measure/measure_captions.py
        some minutes on two cores
    python tools/measure/measure_captions.py --pictures 10 --out FILE
        a look
    python tools/measure/measure_captions.py --readme
        write README's table from the file

Single things by each hand of hands.py, and held-out pairs; three seeds of scenes.
Each picture is captioned twice, itself and with the next picture in its place
("shuffled"), and is named by the CLIP alone. Writes data/tiny_flamingo/captions.json, a
line for each test and seed, with a mark, 0 or 1, for each picture.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import open_clip
import torch

from flamingo_lite import (
    caption,
    encode_pictures,
    load_flamingo,
    score_captions,
)
from tools import ROOT
from tools.weights.hands import drawing_of, interval, scenes_to_test, sets_to_test
from tools.weights.train_eyes import embed_pictures

DATA = ROOT / "data"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"


@torch.no_grad()
def clip_marks(scenes, names):
    """Is the name that the CLIP alone finds nearest the right one? list of bool."""
    folder = f"local-dir:{DATA / 'tiny_clip'}"
    clip, _, _ = open_clip.create_model_and_transforms(folder)
    tokens = open_clip.get_tokenizer(folder)(names)
    text = clip.eval().encode_text(tokens, normalize=True)  # (names, d)
    image = embed_pictures(clip, [scene["picture"] for scene in scenes])
    best = (image @ text.T).argmax(dim=-1).tolist()
    return [names[i] == s["text"] for i, s in zip(best, scenes, strict=True)]


def measure(built, n, seeds=(1, 2, 3), report=print):
    """Test a Flamingo: a dict for each test and seed, with lists of marks.

    Args:
        built: model, image processor, tokenizer.
        n: pictures of each test and seed.
        report: called with a line for each.
    """
    (model, image_processor, tokenizer), lines = built, []
    sets = sets_to_test()
    names = list(
        {row["thing"]: row["text"] for row in sets["trained studios"]}.values()
    )
    for seed in seeds:
        for name, scenes in scenes_to_test(sets, n, seed).items():
            pictures = [scene["picture"] for scene in scenes]
            features = encode_pictures(model.vision_encoder, image_processor, pictures)
            said = caption(model, None, tokenizer, features)
            score = score_captions(said, scenes)
            other = score_captions(said[1:] + said[:1], scenes)
            line = {"test": name, "seed": seed}
            line |= {"exact": score["exact"], "shuffled": other["exact"]}
            if name in sets:
                line["CLIP alone"] = clip_marks(scenes, names)
            line = {
                k: [int(m) for m in v] if k not in ("test", "seed") else v
                for k, v in line.items()
            }
            line["things"] = [round(float(share), 2) for share in score["things"]]
            line["drawings"] = [", ".join(drawing_of(scene)) for scene in scenes]
            lines.append(line)
            share = sum(line["exact"]) / n
            report(f"{name}, seed {seed}: exact {share:.3f}")
    return lines


def pooled(lines, test, what):
    """(mean, low, high) of all seeds of a test; None if it was not measured."""
    mine = [line for line in lines if line["test"] == test and what in line]
    marks = [mark for line in mine for mark in line[what]]
    drawings = [drawing for line in mine for drawing in line["drawings"]]
    return interval(marks, drawings) if marks else None


def table(lines):
    """README's table, in Markdown."""
    columns = {"exact": "word for word", "shuffled": "beside the next picture"}
    columns |= {"CLIP alone": "named by the CLIP alone"}
    text = ["| pictures | " + " | ".join(columns.values()) + " |"]
    text.append("|---" * (len(columns) + 1) + "|")
    for test in dict.fromkeys(line["test"] for line in lines):
        cells = []
        for what in columns:
            found = pooled(lines, test, what)
            share = [round(100 * number) for number in found or ()]
            cells.append("{} % [{}, {}]".format(*share) if found else "")
        text.append(f"| {test} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def write_readme(lines, path=ROOT / "README.md"):
    """Put the table between its two marks."""
    text = path.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    path.write_text(before + BEGIN + table(lines) + END + after)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=200, help="a test and seed")
    parser.add_argument("--weights", default="tiny", help="a name, or a folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--readme", action="store_true", help="measure nothing")
    out = DATA / "tiny_flamingo" / "captions.json"
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    if args.readme:
        write_readme(json.loads(args.out.read_text()))
        return
    torch.set_num_threads(args.threads)
    lines = measure(load_flamingo(args.weights), args.pictures)
    text = ",\n".join(json.dumps(line) for line in lines)
    Path(f"{args.out}.tmp").write_text(f"[\n{text}\n]\n")
    os.replace(f"{args.out}.tmp", args.out)
    print(table(lines))


if __name__ == "__main__":
    main()
