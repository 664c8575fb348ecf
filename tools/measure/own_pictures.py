#!/usr/bin/env python3
"""What comes of 50, 500 and 5,000 pictures of one's own: short runs, from nothing.

    python tools/measure/own_pictures.py
        twelve short runs: 24 minutes on one core
    python tools/measure/own_pictures.py --numbers 20 --steps 4 --seeds 1 --tests 20 \\
        --out FILE
        a look

The "own" pictures are scenes by Twemoji, a hand that the eyes never met: one thing or
two, all named things. A tiny Flamingo is built anew and trained with the function of
chapter 9 on so many of them, for a few steps and for many. It is tested on new scenes
by the same hand, which show the same drawings in other places, and beside other scenes'
pictures ("shuffled"). Writes data/own_pictures.json; chapter 9 shows it. A finished run
is not repeated: delete the file to start again.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from flamingo_lite import (
    build_flamingo,
    caption,
    caption_losses,
    encode_pictures,
    make_scenes,
    score_captions,
    train,
)
from tools import ROOT
from tools.measure.ablations import write
from tools.weights.hands import sets_to_test

HAND = "Twemoji"


def encode(built, scenes):
    """(features, texts) of scenes."""
    model, image_processor, _ = built
    pictures = [scene["picture"] for scene in scenes]
    features = encode_pictures(model.vision_encoder, image_processor, pictures)
    return features, [scene["text"] for scene in scenes]


def one_run(rows, n_pictures, n_steps, seed, n_tests):
    """Train on so many pictures, and test: dict, with marks of each test scene."""
    torch.manual_seed(seed)
    model, _, tokenizer = built = build_flamingo("tiny")
    features, texts = encode(built, make_scenes(rows, n_pictures, (seed, 400)))
    tests = make_scenes(rows, n_tests, (seed, 401))
    new_features, new_texts = encode(built, tests)
    settings = {"n_steps": n_steps, "batch_size": min(64, n_pictures), "seed": seed}
    train(model, tokenizer, features, texts, report=lambda line: None, **settings)
    said = caption(model, None, tokenizer, new_features)
    result = {"pictures": n_pictures, "steps": n_steps, "seed": seed}
    shown = features[:n_tests], texts[:n_tests]
    others = new_features.roll(1, dims=0), new_texts
    for name, some in (
        ("of those trained on", shown),
        ("of new ones", (new_features, new_texts)),
        ("shuffled", others),
    ):
        result[f"loss {name}"] = caption_losses(model, tokenizer, *some).mean().item()
    result["exact"] = score_captions(said, tests)["exact"]
    result["exact, shuffled"] = score_captions(said[1:] + said[:1], tests)["exact"]
    for name in ("exact", "exact, shuffled"):
        result[name] = [int(mark) for mark in result[name]]
    return result


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    many = {"type": int, "nargs": "+"}
    parser.add_argument("--numbers", **many, default=[50, 500, 5000], help="pictures")
    parser.add_argument("--steps", **many, default=[40, 280])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tests", type=int, default=200, help="scenes")
    parser.add_argument("--threads", type=int, default=2)
    out = ROOT / "data" / "own_pictures.json"
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # tiny gradients make Muon slow otherwise
    rows, runs = sets_to_test()[HAND], []
    if args.out.exists():
        runs = json.loads(args.out.read_text())
    done = {(run["pictures"], run["steps"], run["seed"]) for run in runs}
    for seed in range(args.seeds):
        for n_pictures in args.numbers:
            for n_steps in args.steps:
                if (n_pictures, n_steps, seed) in done:
                    continue
                runs.append(one_run(rows, n_pictures, n_steps, seed, args.tests))
                write(args.out, runs)
                few = {k: v for k, v in runs[-1].items() if not isinstance(v, list)}
                share = sum(runs[-1]["exact"]) / args.tests
                print({k: round(v, 3) for k, v in few.items()}, f"exact {share:.3f}")


if __name__ == "__main__":
    main()
