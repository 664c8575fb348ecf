#!/usr/bin/env python3
"""Train the tiny Flamingo longer than a reader waits, with the function of chapter 9.

It learns from all of lessons.py: captions, questions, stories and prompts.

    python tools/weights/train_tiny_flamingo.py
        about an hour on two cores; resumes where it stopped
    python tools/weights/train_tiny_flamingo.py --steps 20 --share 0.01 --pictures 4 \\
        --out FOLDER --checkpoints FOLDER
        a look at it

Writes data/tiny_flamingo: flamingo.safetensors (8 and 16 bits), config.json,
training.log, history.json (loss and gates) and looks.json (the loss of some scenes
beside their own and beside exchanged pictures, for the figure of chapter 9).
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import load_file, save_file

from flamingo_lite import build_flamingo, save_flamingo
from tools import ROOT
from tools.measure.measure_captions import measure
from tools.weights.lessons import SHARES, add_switches, read_looks, teach


def shrink(path):
    """Keep matrices in eight bits (float8_e4m3fn), the rest as it is."""
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and name.endswith(".weight"):
            tensors[name] = tensor.to(torch.float8_e4m3fn)
    save_file(tensors, path)


def write_history(path, history, every=40):
    """Mean loss of each `every` steps, and the gates then, as JSON lines in a list."""
    entries = []
    for end in range(every, len(history) + 1, every):
        loss = sum(note["loss"] for note in history[end - every : end]) / every
        gates = history[end - 1]["gates"]
        entries.append({"step": end, "loss": round(loss, 4), "gates": gates})
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    path.write_text(f"[\n{lines}\n]\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    share = {"type": float, "default": 1.0, "help": "of the lessons, for a look"}
    parser.add_argument("--share", **share)
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    add_switches(parser)
    parser.add_argument("--pictures", type=int, default=200, help="a test and seed")
    parser.add_argument("--threads", type=int, default=2)
    cache = Path.home() / ".cache/flamingo_lite/flamingo"
    parser.add_argument("--checkpoints", type=Path, default=cache)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "tiny_flamingo")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # tiny gradients make Muon slow otherwise
    torch.manual_seed(args.seed)
    args.checkpoints.mkdir(parents=True, exist_ok=True)

    built = build_flamingo("tiny")
    shares = {name: int(n * args.share) for name, n in SHARES.items()}
    shares["pool"] = max(1500, shares["pool"])  # for all names to be in it
    history, log = teach(built, shares, 100 + args.seed, 200, args)
    for line in measure(built, args.pictures):
        for name in ("exact", "things"):
            log.append(f"{line['test']}, seed {line['seed']}: {name} ")
            log[-1] += f"{sum(line[name]) / len(line[name]):.3f}"
    save_flamingo(built[0], args.out, dtype=torch.float16)
    shrink(args.out / "flamingo.safetensors")
    write_history(args.out / "history.json", history)
    looks = read_looks(args.checkpoints / "looks.jsonl")
    lines = ",\n".join(json.dumps(look) for look in looks)
    (args.out / "looks.json").write_text(f"[\n{lines}\n]\n")
    (args.out / "training.log").write_text("\n".join(log) + "\n")


if __name__ == "__main__":
    main()
