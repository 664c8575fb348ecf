#!/usr/bin/env python3
"""Train the tiny CLIP on scenes by many hands, with open_clip's own model and loss.

    python tools/weights/train_eyes.py
        hours on two cores, minutes on a GPU; resumes where it stopped
    python tools/weights/train_eyes.py --steps 20 --checkpoints FOLDER --out FOLDER
        a look at it

The drawings: emoji by seven studios and a coloured icon set, silhouettes and line
drawings of a dozen icon sets, clip art by half of its artists. Twemoji, OpenMoji and
the other artists' clip art are opened only to be tested on.

Until `--cliques-from` a batch holds single things and pairs drawn by lot, and to tell
two captions apart one thing of the two is mostly enough. From there on the pairs come
in cliques, all ordered pairs of five things, so that only both things and their order
tell a caption from its neighbours. The learning rate is level and falls to zero over
the last `--fall` steps: until there the run is the same however long it is to be.

Everything follows from the seed, on a CPU as on a GPU (but for the rounding of sums).
Products of matrices are in bfloat16 (`--precision`), as is usual for a CLIP; weights,
the loss and every test are in float32.
Set MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ to 10000000000 on a CPU: else a
third of the time goes into giving memory back and asking for it again.

It reads open_clip_config.json and the tokenizer in --out and writes, beside them,
`open_clip_model.safetensors` (half precision) and `training.log`. Checkpoints go to
--checkpoints, a folder outside the repository.
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
import time
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import open_clip
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from flamingo_lite.data import (
    RELATIONS,
    draw_scene,
    is_held_out,
    load_sprites,
    make_scenes,
)
from flamingo_lite.training import Muon
from tools.weights.atlas import DATA, UNSEEN, Atlas, compose, free_numbers, weather
from tools.weights.atlas import read_rows as read_folders
from tools.weights.tiny_text import a, kind_of

CLIP_ART = "clip art"  # a name for all artists kept for the test


def read_rows():
    """All drawings, of data/emoji and data/hands."""
    return read_folders(DATA / "emoji", DATA / "hands")


class Batches:
    """Pictures and captions for one step; everything follows from (seed, step).

    Args:
        rows: from `read_rows`; only trained hands are opened.
        seed: an int.
        n_singles, n_pairs: two numbers each, before and after cliques begin.
        device: where the pictures are composed.
        sorts: names of sorts of drawings to use; all when None.
    """

    def __init__(self, rows, seed, n_singles, n_pairs, device="cpu", sorts=None):
        rows = [row for row in rows if row["trained"] and row["studio"] not in UNSEEN]
        copies = sorts is None or "copies" in sorts
        if sorts is not None:
            rows = [row for row in rows if row["sort"] in sorts]
        self.atlas = Atlas(rows, device, copies)
        self.things = list(self.atlas.of)
        named = {row["thing"] for row in rows if row["named"]}
        weight = np.array([1.0 if thing in named else 0.4 for thing in self.things])
        self.weight = weight / weight.sum()
        self.kind = np.array([kind_of(thing) for thing in self.things])
        self.seed, self.n_singles, self.n_pairs = seed, n_singles, n_pairs

    def pick(self, rng, n, weight=None):
        weight = self.weight if weight is None else weight
        return rng.choice(self.things, n, replace=False, p=weight).tolist()

    def pairs(self, rng, n_pairs):
        """Pairs by lot, each both ways round.

        The same two things the other way round: only where they stand tells them apart.
        """
        scenes = []
        while len(scenes) < n_pairs * 2:
            pair = self.pick(rng, 2)
            if not is_held_out(*pair):
                relation = str(rng.choice(RELATIONS))
                scenes += [(relation, pair), (relation, pair[::-1])]
        return scenes

    def cliques(self, rng, n_pairs, size=5):
        """All pairs of a few things, half the time of one kind."""
        scenes = []
        while len(scenes) < n_pairs * 2:
            weight = self.weight
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

    def __call__(self, step, cliques=False):
        """(B, 3, 64, 64) pixels in -1 … 1, on the atlas's device, and B captions."""
        rng = np.random.default_rng((self.seed, step))
        scenes = [(None, [t]) for t in self.pick(rng, self.n_singles[cliques])]
        pairs = self.cliques if cliques else self.pairs
        scenes += pairs(rng, self.n_pairs[cliques])
        numbers = torch.full((len(scenes), 2), -1)
        for i, (_, things) in enumerate(scenes):
            for layer, thing in enumerate(things):
                numbers[i, layer] = self.atlas.pick(rng, thing)
        captions = [
            f" {relation} ".join(a(thing) for thing in things)
            for relation, things in scenes
        ]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        plan = free_numbers(generator, [relation for relation, _ in scenes])
        return self.draw(numbers, plan) * 2 - 1, captions

    def draw(self, numbers, plan):
        """Pictures of drawings laid out by a plan: (B, 3, 64, 64) in 0 … 1."""
        return weather(compose(self.atlas, numbers, plan), plan)


@torch.no_grad()
def embed_pictures(model, pictures):
    """Pooled embeddings of pictures, (pictures, d)."""
    device = next(model.parameters()).device
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures]))
    pooled = [
        model.visual(some.permute(0, 3, 1, 2).to(device) / 127.5 - 1)[0]
        for some in pixels.split(200)
    ]
    return torch.cat(pooled)


def hand_of(row):
    """Whose drawings a row is counted with; None for those that are not tested."""
    if row["sort"] == CLIP_ART:
        return None if row["trained"] else CLIP_ART
    return None if row["sort"] == "silhouette" else row["studio"]


@torch.no_grad()
def zero_shot(model, tokenizer, rows, seed=1, per_picture=2):
    """Accuracy at naming single things among the named ones, {hand: share right}."""
    model.eval()
    device = next(model.parameters()).device
    named = [row for row in rows if row["named"]]
    things = list(dict.fromkeys(row["thing"] for row in named))
    captions = tokenizer([a(thing) for thing in things]).to(device)
    text = model.encode_text(captions, normalize=True)  # (things, d)
    result, hands = {}, dict.fromkeys(hand_of(row) for row in named)
    for hand in hands:
        rng = np.random.default_rng(seed)
        mine = [row for row in named if hand and hand_of(row) == hand] * per_picture
        if not mine:
            continue
        pictures = []
        for row in mine:
            drawing = load_sprites([row])[row["thing"]][row["studio"]]
            pictures.append(draw_scene(rng, [drawing], background=(255, 255, 255)))
        best = (embed_pictures(model, pictures) @ text.T).argmax(dim=-1)
        right = [things[i] == r["thing"] for i, r in zip(best, mine, strict=True)]
        result[hand] = sum(right) / len(right)
    model.train()
    return result


@torch.no_grad()
def retrieval(model, tokenizer, rows, n_pairs=300, seed=6):
    """Share of held-out pairs whose caption is the nearest of all their captions.

    Trained studios of data/emoji; a guess is right once in `n_pairs`.
    """
    model.eval()
    device = next(model.parameters()).device
    rows = [row for row in rows if row["named"] and row["trained"]]
    rows = [row for row in rows if row["path"].parents[1].name == "emoji"]
    scenes = make_scenes(rows, n_pairs * 2, seed=seed, pairs=1.0, held_out=True)
    scenes = list({scene["text"]: scene for scene in scenes}.values())[:n_pairs]
    captions = tokenizer([scene["text"] for scene in scenes]).to(device)
    text = model.encode_text(captions, normalize=True)  # (pairs, d)
    found = (embed_pictures(model, [s["picture"] for s in scenes]) @ text.T).cpu()
    model.train()
    return (found.argmax(dim=-1) == torch.arange(len(scenes))).float().mean().item()


def learning_rate(step, steps, peak, fall, warmup=200):
    """Up in `warmup` steps, level, and down to zero over the last `fall`."""
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / fall)


def make_optimizers(model, lr):
    """Muon for the blocks' matrices and AdamW for the rest."""
    named = list(model.named_parameters())
    inner = [p for n, p in named if p.ndim >= 2 and "resblocks" in n]
    ids = {id(p) for p in inner}
    outer = [p for _, p in named if p.ndim >= 2 and id(p) not in ids]
    plain = [p for _, p in named if p.ndim < 2]
    groups = [
        {"params": outer, "weight_decay": 0.05},
        {"params": plain, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    return {"adam": adam, "muon": Muon(inner, lr=lr, weight_decay=0.05)}


def save_whole(path, write):
    """Write beside, then rename: a file is whole or is not there."""
    write(path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def encode_captions(model, tokens):
    """What `model.encode_text` gives, (B, d), without the padding at every row's end.

    The text tower is causal, so what stands behind a caption does not change it.
    """
    length = int((tokens != 0).sum(dim=1).max())
    tokens = tokens[:, :length]  # (B, T_txt)
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    pool, end = model.text_pool_type, getattr(model, "text_eos_id", None)
    x = open_clip.transformer.text_global_pool(
        model.ln_final(x), tokens, pool, eos_token_id=end
    )
    x = x @ model.text_projection  # (B, d)
    return torch.nn.functional.normalize(x.float(), dim=-1)


@contextlib.contextmanager
def products_in(precision, device):
    """Products of matrices in "bfloat16", or all in "float32"."""
    half = torch.autocast(torch.device(device).type, torch.bfloat16)
    with contextlib.ExitStack() as stack:
        if precision == "bfloat16":
            stack.enter_context(half)
            if half.device == "cpu":  # whose fused attention is slow in bfloat16
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def training_step(model, tokenizer, optimizers, pixels, captions, precision="float32"):
    """One step of CLIP's loss; the loss, still on its device."""
    tokens = tokenizer(captions).to(pixels.device)
    with products_in(precision, pixels.device):
        pooled, _ = model.visual(pixels)  # (B, d), and the tokens that Flamingo reads
        text = encode_captions(model, tokens)  # (B, d)
    image = torch.nn.functional.normalize(pooled.float(), dim=-1)  # (B, d)
    loss = open_clip.ClipLoss()(image, text, model.logit_scale.exp())
    model.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers.values():
        optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(100))
    return loss.detach()


def same_run(settings):
    """Settings without the number of steps, which may be chosen late."""
    return re.sub(r"steps \d+ ", "", settings)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--fall", type=int, default=2000, help="its last steps")
    parser.add_argument("--cliques-from", type=int, default=2500)
    parser.add_argument("--stop-at", type=int, help="stop early, to go on another day")
    parser.add_argument("--lr", type=float, default=2e-3)
    precisions = ["bfloat16", "float32"]
    parser.add_argument("--precision", choices=precisions, default="bfloat16")
    numbers = {"type": int, "nargs": 2, "help": "in a batch, before and with cliques"}
    parser.add_argument("--singles", default=[96, 64], **numbers)
    parser.add_argument("--pairs", default=[30, 45], **numbers)
    parser.add_argument("--patch-dropout", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device)
    cache = Path.home() / ".cache/flamingo_lite/eyes"
    parser.add_argument("--checkpoints", type=Path, default=cache)
    parser.add_argument("--out", type=Path, default=DATA / "tiny_clip")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # tiny gradients make Muon slow otherwise
    torch.manual_seed(args.seed)
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    checkpoint = args.checkpoints / "last.pt"

    config = json.loads((args.out / "open_clip_config.json").read_text())["model_cfg"]
    # Training drops patches at random, which is faster (FLIP, arXiv 2212.00794).
    config["vision_cfg"]["patch_dropout"] = args.patch_dropout
    model = open_clip.CLIP(**config).to(args.device)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{args.out}")
    rows = read_rows()
    batches = Batches(rows, args.seed, args.singles, args.pairs, args.device)
    optimizers = make_optimizers(model, args.lr)
    settings = f"seed {args.seed} steps {args.steps} fall {args.fall} cliques from "
    settings += f"{args.cliques_from} lr {args.lr} singles {args.singles} pairs "
    settings += f"{args.pairs} patch dropout {args.patch_dropout} {args.precision}"
    first, log = 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=args.device)
        if same_run(state.get("settings", settings)) != same_run(settings):
            sys.exit(
                f"{checkpoint} is of another run: {state['settings']}\nthis one: "
                f"{settings}\ntake it away, or give another folder: --checkpoints"
            )
        model.load_state_dict(state["model"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state[name])
        first, log = state["step"], state["log"]
        print(f"resumed at step {first}", flush=True)

    last_step = min(args.steps, args.stop_at or args.steps)
    seen, started, running = first, time.time(), []
    for step in range(first, last_step):
        torch.manual_seed(args.seed * 1_000_003 + step)  # which patches are dropped
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.lr, args.fall)
        if step >= args.steps - args.fall / 2:  # whole pictures at last, as FLIP does
            model.visual.patch_dropout.prob = 0.0
        pixels, captions = batches(step, step >= args.cliques_from)
        batch = (pixels, captions, args.precision)
        running.append(training_step(model, tokenizer, optimizers, *batch))
        done = step + 1
        if done % 50 == 0 or done == last_step:
            pace = (time.time() - started) / (done - seen)
            mean = torch.stack(running[-50:]).mean().item()
            print(f"step {done} loss {mean:.3f} {pace:.2f} s/step", flush=True)
            if done % 500 == 0 or done == args.steps:
                shares = zero_shot(model, tokenizer, rows)
                shares = {hand: round(share, 3) for hand, share in shares.items()}
                found = retrieval(model, tokenizer, rows)
                log.append(
                    f"step {done} loss {mean:.3f} zero-shot {json.dumps(shares)} "
                    f"held-out pairs retrieved {found:.3f}"
                )
                print(log[-1], flush=True)
            if done % 100 == 0 or done == last_step:
                state = {name: o.state_dict() for name, o in optimizers.items()}
                state |= {"model": model.state_dict(), "step": done, "log": log}
                state["settings"] = settings
                save_whole(checkpoint, lambda path, s=state: torch.save(s, path))

    half = {
        name: tensor.half().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    out = args.out if last_step == args.steps else args.checkpoints
    weights = out / "open_clip_model.safetensors"
    save_whole(weights, lambda path: save_file(half, path))
    (out / "training.log").write_text("\n".join([settings, *log]) + "\n")
    assert load_file(weights).keys() == half.keys()


if __name__ == "__main__":
    main()
