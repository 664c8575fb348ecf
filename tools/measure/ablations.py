#!/usr/bin/env python3
"""Short runs with one part of the Flamingo changed, beside runs with all as it is.

    python tools/measure/ablations.py
        half an hour on two cores
    python tools/measure/ablations.py --steps 20 --seeds 1 --scenes 400 --out FILE
        a look

Each variant is trained with the function of chapter 9, from several seeds, on the same
scenes, for the same number of steps, and writes captions of held-out pairs, of single
things, and of clip art by artists that nothing was trained on. The runs are short, so
they see a part of the things only. Writes data/ablations.json; chapter 11 draws it. A
finished run is not repeated: delete the file to start again.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import nn

from flamingo_lite import (
    build_flamingo,
    caption,
    caption_losses,
    encode_pictures,
    load_captions,
    make_scenes,
    make_stories,
    score_captions,
    train,
)
from tools import ROOT
from tools.weights.hands import CLIP_ART, sets_to_test


class MeanPool(nn.Module):
    """All visual tokens of an image as one latent, their mean, through a matrix."""

    def __init__(self, dim):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(1, dim))  # tells the dtype; adds zero
        self.to_latent = nn.Linear(dim, dim)

    def forward(self, x):
        """(B, T_img, F, v, d) to (B, T_img, n=1, d)."""
        return self.to_latent(x.mean(dim=(2, 3)))[:, :, None] + self.latents


def perceiver(n):
    """Settings of a Perceiver with n latents."""
    sizes = {"depth": 2, "num_latents": n, "heads": 4, "dim_head": 48}
    return {"perceiver_kwargs": sizes}


def gates_open(model):
    """No gates: what they let through is all there is, from the first step on."""
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(20.0)  # tanh is 1, and its slope 0


def mean_pool(model):
    """Mean pooling in place of the Perceiver."""
    model.perceiver = MeanPool(model.vis_dim)


def train_language_model(model):
    """The decoder layers learn too."""
    model.lang_encoder.old_decoder_blocks.requires_grad_(True)


# name: (settings for build_flamingo, what to do to the model, on what)
VARIANTS = {
    "as it is": ({}, None, "captions"),
    "no gates": ({}, gates_open, "captions"),
    "mean pooling": ({}, mean_pool, "captions"),
    "1 latent": (perceiver(1), None, "captions"),
    "64 latents": (perceiver(64), None, "captions"),
    "every 4th layer": ({"cross_attn_every_n_layers": 4}, None, "captions"),
    "language model trained": ({}, train_language_model, "captions"),
    "stories, last picture": ({}, None, "stories"),
    "stories, all before": ({"only_attend_immediate_media": False}, None, "stories"),
}


class Lessons:
    """The pictures of all runs, encoded once."""

    def __init__(self, n_scenes, n_things):
        self.model, self.image_processor, self.tokenizer = build_flamingo("tiny")
        rows = load_captions(ROOT / "data" / "emoji")
        rows = [row for row in rows if row["named"] and row["trained"]]
        names = sorted({row["thing"] for row in rows})
        things = np.random.default_rng(300).permutation(names)[:n_things]
        rows = [row for row in rows if row["thing"] in things]
        scenes = make_scenes(rows, n_scenes, seed=301)
        self.captions = self.encode(scenes), [s["text"] for s in scenes], None
        self.stories = self.of_stories(make_stories(rows, n_scenes // 3, seed=302))
        self.tests = {
            "singles": make_scenes(rows, 200, seed=303, pairs=0.0),
            "held-out pairs": make_scenes(rows, 200, 304, pairs=1.0, held_out=True),
        }
        art = [row for row in sets_to_test()[CLIP_ART] if row["thing"] in things]
        self.tests[CLIP_ART] = make_scenes(art, 200, seed=306, pairs=0.0)
        self.test_features = {k: self.encode(v) for k, v in self.tests.items()}
        self.test_stories = self.of_stories(
            make_stories(rows, 100, seed=305, held_out=True)
        )

    def encode(self, scenes):
        pictures = [scene["picture"] for scene in scenes]
        return encode_pictures(
            self.model.vision_encoder, self.image_processor, pictures
        )

    def of_stories(self, stories):
        """(features, texts, sequences) of stories."""
        scenes, sequences = [], []
        for story in stories:
            first = len(scenes)
            scenes += story["scenes"]
            sequences.append(list(range(first, len(scenes))))
        return self.encode(scenes), [story["texts"] for story in stories], sequences


def one_run(lessons, variant, seed, n_steps, batch_size):
    """Train a variant and test it: dict of lists of numbers, one for each test."""
    settings, change, what = VARIANTS[variant]
    torch.manual_seed(seed)
    model, _, tokenizer = build_flamingo("tiny", **settings)
    if change:
        change(model)
    features, texts, sequences = getattr(lessons, what)
    started = time.perf_counter()
    history = train(
        model,
        tokenizer,
        features,
        texts,
        n_steps=n_steps,
        batch_size=batch_size,
        seed=seed,
        report=lambda line: None,
        sequences=sequences,
    )
    seconds = time.perf_counter() - started
    result = {"variant": variant, "seed": seed, "seconds per step": seconds / n_steps}
    result["training loss"] = sum(e["loss"] for e in history[-20:]) / 20
    if what == "stories":
        features, texts, sequences = lessons.test_stories
        true, other = (
            caption_losses(model, tokenizer, x, texts, sequences=sequences)
            for x in (features, features.roll(1, dims=0))
        )
        return result | {"loss": true.tolist(), "shuffled loss": other.tolist()}
    for name, test in lessons.tests.items():
        features, texts = lessons.test_features[name], [s["text"] for s in test]
        result[f"{name}, loss"] = caption_losses(
            model, tokenizer, features, texts
        ).tolist()
        said = caption(model, None, tokenizer, features)
        result[f"{name}, things"] = score_captions(said, test)["things"]
    return result


def write(path, runs):
    """Write beside, then rename."""
    rounded = json.loads(json.dumps(runs), parse_float=lambda x: round(float(x), 3))
    lines = ",\n".join(json.dumps(run) for run in rounded)
    Path(f"{path}.tmp").write_text(f"[\n{lines}\n]\n")
    os.replace(f"{path}.tmp", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--scenes", type=int, default=3000)
    parser.add_argument("--things", type=int, default=40, help="how many to know")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "ablations.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # tiny gradients make Muon slow otherwise
    runs = json.loads(args.out.read_text()) if args.out.exists() else []
    lessons = Lessons(args.scenes, args.things)
    for seed in range(args.seeds):
        for variant in VARIANTS:
            if any((r["variant"], r["seed"]) == (variant, seed) for r in runs):
                continue
            runs.append(one_run(lessons, variant, seed, args.steps, args.batch_size))
            write(args.out, runs)
            last = runs[-1]
            numbers = {k: v for k, v in last.items() if not isinstance(v, list)}
            means = {k: sum(v) / len(v) for k, v in last.items() if isinstance(v, list)}
            line = {
                k: round(v, 3) for k, v in {**numbers, **means}.items() if k[0] != "v"
            }
            print(variant, line, flush=True)


if __name__ == "__main__":
    main()
