#!/usr/bin/env python3
"""Train the tiny CLIP on scenes by seven studios, with open_clip's own model and loss.

    python tools/weights/train_tiny_clip.py
        hours on two cores; resumes where it stopped
    python tools/weights/train_tiny_clip.py --steps 20 --more 0 --checkpoints FOLDER \\
        --out COPY
        a look at it; COPY is a copy of data/tiny_clip

Two stages. In the first a batch holds single things and pairs drawn by lot, and to tell
two captions apart one thing of the two is mostly enough. In the second the pairs come
in cliques, all ordered pairs of five things, so that only both things and their order
tell a caption from its neighbours. `--second-stage` starts there, from the weights in
--out.

It reads data/tiny_clip/open_clip_config.json and writes, beside it,
`open_clip_model.safetensors` (half precision) and `training.log`. Twemoji and OpenMoji
are opened only to be tested on. Checkpoints go to --checkpoints, a folder outside the
repository.
"""

import argparse
import json
import math
import os
import sys
import time
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import open_clip
import torch
from PIL import Image, ImageChops, ImageFilter, ImageOps
from safetensors.torch import load_file, save_file

from flamingo_lite.data import (
    draw_scene,
    is_held_out,
    load_sprites,
    make_scenes,
)
from flamingo_lite.training import Muon
from tools import ROOT
from tools.weights.tiny_text import a, kind_of

UNSEEN = ("twemoji", "openmoji")
RELATIONS = ("to the left of", "above")


def read_rows(folder):
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{**row, "path": folder / row["file_name"]} for row in rows]


def outlined(drawing):
    """The same drawing as flat colours inside black lines, or as lines alone."""
    alpha = drawing.getchannel("A")
    solid = alpha.point(lambda value: 255 * (value > 100))
    rim = ImageChops.subtract(solid.filter(ImageFilter.MaxFilter(5)), solid)
    colours = Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing)
    grey = ImageOps.autocontrast(
        colours.convert("L").filter(ImageFilter.MedianFilter(3))
    )
    edges = ImageChops.subtract(
        grey.filter(ImageFilter.MaxFilter(3)), grey.filter(ImageFilter.MinFilter(3))
    ).point(lambda value: 255 * (value > 60))
    ink = ImageChops.lighter(rim, edges)
    flat = ImageOps.posterize(colours.convert("RGB"), 2).convert("RGBA")
    flat.putalpha(solid)
    white = Image.new("RGBA", drawing.size, "white")
    white.putalpha(solid)
    black = Image.new("RGBA", drawing.size, "black")
    return Image.composite(black, flat, ink), Image.composite(black, white, ink)


def tilt(rng, drawing):
    """Turned by up to 15 degrees, one time in two."""
    if rng.random() < 0.5:
        return drawing
    return drawing.rotate(float(rng.uniform(-15, 15)), Image.Resampling.BILINEAR)


def squeeze(rng, drawing):
    """Made up to a quarter narrower or lower, one time in two."""
    if rng.random() < 0.5:
        return drawing
    short = int(drawing.width * rng.uniform(0.75, 1.0))
    size = (short, drawing.height) if rng.random() < 0.5 else (drawing.width, short)
    place = ((drawing.width - size[0]) // 2, (drawing.height - size[1]) // 2)
    canvas = Image.new("RGBA", drawing.size, (0, 0, 0, 0))
    canvas.paste(drawing.resize(size, Image.Resampling.BILINEAR), place)
    return canvas


def recolour(pixels, generator):
    """Change saturation, tint, contrast and brightness of each picture.

    The pictures come as (B, 3, H, W) in 0..1.
    """
    B = len(pixels)

    def uniform(low, high, *shape):
        return torch.rand(B, *shape, 1, 1, generator=generator) * (high - low) + low

    grey = pixels.mean(dim=1, keepdim=True)  # (B, 1, H, W)
    colourless = (torch.rand(B, 1, 1, 1, generator=generator) < 0.15).float()
    saturation = uniform(0.4, 1.6, 1) * (1 - colourless)
    tinted = (grey + (pixels - grey) * saturation) * uniform(0.85, 1.15, 3)
    middle = tinted.mean(dim=(1, 2, 3), keepdim=True)
    return (
        (tinted - middle) * uniform(0.7, 1.2, 1) + middle * uniform(0.8, 1.1, 1)
    ).clamp(0, 1)


class Batches:
    """Pictures and captions for one step; everything follows from (seed, step)."""

    def __init__(self, rows, seed, n_singles, n_pairs):
        self.sprites = load_sprites(
            [row for row in rows if row["studio"] not in UNSEEN]
        )
        self.outlines = {
            thing: {studio: outlined(drawing) for studio, drawing in drawings.items()}
            for thing, drawings in self.sprites.items()
        }
        self.things = list(self.sprites)
        named = {row["thing"] for row in rows if row["named"]}
        weight = np.array([1.0 if thing in named else 0.4 for thing in self.things])
        self.weight = weight / weight.sum()
        # Things that few studios drew are shown more often in the second stage.
        few = np.array([2.0 if len(self.sprites[t]) < 4 else 1.0 for t in self.things])
        self.weight_2 = weight * few / (weight * few).sum()
        self.kind = np.array([kind_of(thing) for thing in self.things])
        self.seed, self.n_singles, self.n_pairs = seed, n_singles, n_pairs

    def drawing(self, rng, thing, second):
        studio = rng.choice(list(self.sprites[thing]))
        style = rng.random()
        drawing = self.sprites[thing][studio]
        if style < 0.2:
            drawing = self.outlines[thing][studio][int(style < 0.08)]
        return squeeze(rng, tilt(rng, drawing)) if second else tilt(rng, drawing)

    def pick(self, rng, n, weight):
        return list(rng.choice(self.things, n, replace=False, p=weight))

    def pairs(self, rng, n_pairs):
        """First stage: pairs by lot, each both ways round.

        The same two things the other way round: only where they stand tells them apart.
        """
        scenes = []
        while len(scenes) < n_pairs * 2:
            pair = self.pick(rng, 2, self.weight)
            if not is_held_out(*pair):
                relation = str(rng.choice(RELATIONS))
                scenes += [(relation, pair), (relation, pair[::-1])]
        return scenes

    def cliques(self, rng, n_pairs, size=5):
        """Second stage: all pairs of a few things, half the time of one kind."""
        scenes = []
        while len(scenes) < n_pairs * 2:
            weight = self.weight_2
            if rng.random() < 0.5:
                first = rng.choice(len(self.things), p=weight)
                weight = weight * (self.kind == self.kind[first])
                if np.count_nonzero(weight) < size:
                    continue
            chosen = self.pick(rng, size, weight / weight.sum())
            for pair in combinations(chosen, 2):
                if not is_held_out(*pair):
                    relation = str(rng.choice(RELATIONS))
                    scenes += [(relation, pair), (relation, pair[::-1])]
        return scenes[: n_pairs * 2]

    def __call__(self, step, second=False):
        rng = np.random.default_rng((self.seed, step))
        weight = self.weight_2 if second else self.weight
        scenes = [(None, [t]) for t in self.pick(rng, self.n_singles[second], weight)]
        pairs = self.cliques if second else self.pairs
        scenes += pairs(rng, self.n_pairs[second])
        pictures, captions = [], []
        for relation, things in scenes:
            drawings = [self.drawing(rng, thing, second) for thing in things]
            background = (255, 255, 255) if rng.random() < 0.3 else None
            pictures.append(np.asarray(draw_scene(rng, drawings, relation, background)))
            captions.append(f" {relation} ".join(a(thing) for thing in things))
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return recolour(pixels, generator) * 2 - 1, captions


@torch.no_grad()
def embed_pictures(model, pictures):
    """Pooled embeddings of pictures, (pictures, d)."""
    device = next(model.parameters()).device
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures]))
    pooled = [
        model.visual(some.to(device).permute(0, 3, 1, 2) / 127.5 - 1)[0]
        for some in pixels.split(200)
    ]
    return torch.cat(pooled)


@torch.no_grad()
def zero_shot(model, tokenizer, rows, seed=1, per_thing=2):
    """Accuracy at naming single things among the named ones, {studio: share right}."""
    model.eval()
    named = [row for row in rows if row["named"]]
    things = list(dict.fromkeys(row["thing"] for row in named))
    ids = tokenizer([a(thing) for thing in things]).to(next(model.parameters()).device)
    text = model.encode_text(ids, normalize=True)  # (things, d)
    result = {}
    for studio in dict.fromkeys(row["studio"] for row in named):
        rng = np.random.default_rng(seed)
        mine = [
            row for row in named if row["studio"] == studio for _ in range(per_thing)
        ]
        sprites = load_sprites([row for row in named if row["studio"] == studio])
        pictures = [
            draw_scene(rng, [sprites[row["thing"]][studio]], background=(255, 255, 255))
            for row in mine
        ]
        best = (embed_pictures(model, pictures) @ text.T).argmax(dim=-1)
        right = [
            things[i] == row["thing"]
            for i, row in zip(best.tolist(), mine, strict=True)
        ]
        result[studio] = sum(right) / len(right)
    model.train()
    return result


@torch.no_grad()
def retrieval(model, tokenizer, rows, n_pairs=300, seed=6):
    """Share of held-out pairs whose caption is the nearest of all their captions.

    Trained studios; a guess is right once in `n_pairs`.
    """
    model.eval()
    rows = [row for row in rows if row["named"] and row["trained"]]
    scenes = make_scenes(rows, n_pairs * 2, seed=seed, pairs=1.0, held_out=True)
    scenes = list({scene["text"]: scene for scene in scenes}.values())[:n_pairs]
    captions = tokenizer([scene["text"] for scene in scenes])
    text = model.encode_text(captions, normalize=True)  # (pairs, d)
    found = embed_pictures(model, [s["picture"] for s in scenes]) @ text.T
    model.train()
    return (found.argmax(dim=-1) == torch.arange(len(scenes))).float().mean().item()


def learning_rate(step, steps, peak, warmup=200, decay=0.3):
    """Up in `warmup` steps, level, and down to zero over the run's last `decay`."""
    down = (steps - step) / (decay * steps)
    return peak * min(1.0, (step + 1) / warmup, max(0.0, down))


def make_optimizers(model, lr, with_muon):
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest.

    The run that made data/tiny_clip changed over at step 1000, where Muon went on about
    twice as fast; it may pay earlier.
    """
    named = list(model.named_parameters())
    inner = [p for n, p in named if with_muon and p.ndim >= 2 and "resblocks" in n]
    ids = {id(p) for p in inner}
    outer = [p for _, p in named if p.ndim >= 2 and id(p) not in ids]
    plain = [p for _, p in named if p.ndim < 2]
    adam = torch.optim.AdamW(
        [
            {"params": outer, "weight_decay": 0.05},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    return {"adam": adam} | (
        {"muon": Muon(inner, lr=lr, weight_decay=0.05)} if inner else {}
    )


def save_checkpoint(path, state):
    """Write beside, then rename: a checkpoint is whole or is not there."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def rates(step, args):
    """(Learning rate, is it the second stage?) at a step."""
    if step < args.steps:
        return learning_rate(step, args.steps, args.lr), False
    return learning_rate(step - args.steps, args.more, args.lr, decay=0.5), True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2400, help="of the first stage")
    parser.add_argument("--more", type=int, default=1300, help="of the second stage")
    parser.add_argument("--second-stage", action="store_true", help="start there")
    parser.add_argument("--lr", type=float, default=1e-3)
    pictures = {"type": int, "nargs": 2, "help": "in a batch of each stage"}
    parser.add_argument("--singles", default=[72, 40], **pictures)
    parser.add_argument("--pairs", default=[40, 30], **pictures)
    parser.add_argument(
        "--adam-steps", type=int, default=1000, help="AdamW alone until here"
    )
    parser.add_argument("--patch-dropout", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--checkpoints", type=Path, default=Path.home() / ".cache/flamingo_lite/clip"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "tiny_clip")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # tiny gradients make Muon slow otherwise
    torch.manual_seed(args.seed)
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    checkpoint = args.checkpoints / "last.pt"

    config = json.loads((args.out / "open_clip_config.json").read_text())["model_cfg"]
    # Training drops patches at random, which is faster (FLIP, arXiv 2212.00794).
    config["vision_cfg"]["patch_dropout"] = args.patch_dropout
    model = open_clip.CLIP(**config)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{args.out}")
    rows = read_rows(ROOT / "data" / "emoji")
    batches = Batches(rows, args.seed, args.singles, args.pairs)
    clip_loss = open_clip.ClipLoss()
    first, log, state = 0, [], None
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        first, log = state["step"], state["log"]
        print(f"resumed at step {first}", flush=True)
    elif args.second_stage:
        model.load_state_dict(load_file(args.out / "open_clip_model.safetensors"))
        first = args.steps
        log = (args.out / "training.log").read_text().splitlines()[1:]
        log.append("second stage, from the weights above in half precision")
    optimizers = make_optimizers(model, args.lr, with_muon=first >= args.adam_steps)
    if state and first not in (args.adam_steps, args.steps):
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state[name])

    last_step = args.steps + args.more
    seen, started, running = first, time.time(), []
    for step in range(first, last_step):
        if step in (args.adam_steps, args.steps):
            optimizers = make_optimizers(model, args.lr, step >= args.adam_steps)
        rate, second = rates(step, args)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
        if step >= args.steps * 0.7:  # the last part with whole pictures, as FLIP does
            model.visual.patch_dropout.prob = 0.0
        pixels, captions = batches(step, second)
        pooled, _ = model.visual(pixels)  # (B, d), and the tokens that Flamingo reads
        image = torch.nn.functional.normalize(pooled, dim=-1)
        text = model.encode_text(tokenizer(captions), normalize=True)
        loss = clip_loss(image, text, model.logit_scale.exp())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        running.append(loss.item())
        done = step + 1
        if done % 50 == 0 or done == last_step:
            pace = (time.time() - started) / (done - seen)
            mean = sum(running[-50:]) / len(running[-50:])
            print(f"step {done} loss {mean:.3f} {pace:.2f} s/step", flush=True)
            if done % 500 == 0 or done in (args.steps, last_step):
                accuracy = {
                    k: round(v, 3) for k, v in zero_shot(model, tokenizer, rows).items()
                }
                found = retrieval(model, tokenizer, rows)
                log.append(
                    f"step {done} loss {mean:.3f} zero-shot {json.dumps(accuracy)} "
                    f"held-out pairs retrieved {found:.3f}"
                )
                print(log[-1], flush=True)
            if done % 250 == 0 or done in (args.steps, last_step):
                state = {name: o.state_dict() for name, o in optimizers.items()}
                state["model"] = model.state_dict()
                save_checkpoint(checkpoint, {**state, "step": done, "log": log})

    half = {
        name: tensor.half().contiguous() for name, tensor in model.state_dict().items()
    }
    temporary = args.out / "open_clip_model.tmp"
    save_file(half, temporary)
    os.replace(temporary, args.out / "open_clip_model.safetensors")
    settings = f"steps {args.steps} and {args.more} lr {args.lr} "
    settings += f"singles {args.singles} pairs {args.pairs}"
    text = "\n".join([f"seed {args.seed} {settings}", *log]) + "\n"
    (args.out / "training.log").write_text(text)


if __name__ == "__main__":
    main()
