#!/usr/bin/env python3
"""Train the tiny Flamingo longer than a reader waits, with the function of chapter 9.

    python tools/train_tiny_flamingo.py                 resumes where it stopped
    python tools/train_tiny_flamingo.py --steps 20      a look at it

Writes data/tiny_flamingo: flamingo.safetensors (8 and 16 bits), config.json,
training.log.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from flamingo_lite import (  # noqa: E402
    build_flamingo,
    caption_features,
    encode_pictures,
    load_captions,
    make_scenes,
    save_flamingo,
    score_captions,
    train,
)


def shrink(path):
    """Keep matrices in eight bits (float8_e4m3fn), the rest as it is."""
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and name.endswith(".weight"):
            tensors[name] = tensor.to(torch.float8_e4m3fn)
    save_file(tensors, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=30_000)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    cache = Path.home() / ".cache/flamingo_lite/flamingo"
    parser.add_argument("--checkpoints", type=Path, default=cache)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "tiny_flamingo")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # tiny gradients make Muon slow otherwise
    torch.manual_seed(args.seed)
    args.checkpoints.mkdir(parents=True, exist_ok=True)

    rows = [row for row in load_captions(ROOT / "data" / "emoji") if row["named"]]
    rows = [row for row in rows if row["trained"]]
    scenes = make_scenes(rows, args.scenes, seed=100 + args.seed)
    model, image_processor, tokenizer = build_flamingo("tiny")
    pictures = [scene["picture"] for scene in scenes]
    features = encode_pictures(model.vision_encoder, image_processor, pictures)
    print(f"{len(features)} pictures encoded", flush=True)
    log = [f"seed {args.seed} scenes {args.scenes} steps {args.steps} lr {args.lr}"]

    def report(line):
        print(line, flush=True)
        log.append(line[: line.index("loss") + 10])  # not the pace

    train(
        model,
        tokenizer,
        features,
        [scene["text"] for scene in scenes],
        n_steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        checkpoint=args.checkpoints / "last.pt",
        report_every=200,
        report=report,
    )
    for name, held_out in (("single things", False), ("held-out pairs", True)):
        test = make_scenes(rows, 400, seed=5, pairs=float(held_out), held_out=held_out)
        seen = encode_pictures(
            model.vision_encoder, image_processor, [scene["picture"] for scene in test]
        )
        score = score_captions(caption_features(model, tokenizer, seen), test)
        log.append(f"{name}: exact {sum(score['exact']) / len(test):.3f}")
        print(log[-1], flush=True)
    save_flamingo(model, args.out, dtype=torch.float16)
    shrink(args.out / "flamingo.safetensors")
    (args.out / "training.log").write_text("\n".join(log) + "\n")


if __name__ == "__main__":
    main()
