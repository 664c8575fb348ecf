#!/usr/bin/env python3
"""Compare Muon with AdamW: what each learns, and what a step of each costs.

    python tools/measure/compare_optimizers.py
        ten minutes on one core
    python tools/measure/compare_optimizers.py --rates
        forty minutes on one core
    python tools/measure/compare_optimizers.py --size paper
        a minute or two on two cores, or ten, if they have no half precision

The first trains the tiny Flamingo for 200 steps with each, same start, same batches,
and a third time with AdamW for as long as Muon took; two seeds. It writes a line for
each run, data/optimizers_tiny.json: processor seconds, the mean loss of each fifth of
the run, and which of 200 new pictures of single things are named right, by the trained
studios and by Twemoji.

The second takes the run of chapter 9, 9,000 scenes and 280 steps of Muon, or as many of
AdamW as go into the same time, with one learning rate after another, TRIALS. It writes
a line for each run, data/rates_tiny.json: the mean loss of the last 20 steps, and of
chapter 9's test sets the share that is captioned right, word for word.

The third takes the matrices that a Flamingo of CLIP ViT-L-14 and OPT-125m trains, with
random numbers in them and in their gradients, and measures one step of each optimizer,
and forward and backward of the model beside it: interleaved, medians. A CPU without
half-precision arithmetic takes minutes for a step of Muon in it, so there one matrix of
each shape is measured, once, and counted as often as it occurs. It writes them as JSON,
data/optimizers.json, with what they were measured on. Time a step is all that this
measures: who gets furthest in an hour at this size, only a real training tells.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import OPTConfig, OPTForCausalLM

from flamingo_lite import (
    Flamingo,
    FlamingoLMMixin,
    Muon,
    build_flamingo,
    caption,
    choose_device,
    choose_precision,
    describe_device,
    encode_pictures,
    extend_instance,
    load_captions,
    make_scenes,
    parameter_groups,
    score_captions,
    train,
)
from tools import ROOT

SETS = ("trained studios", "Twemoji")


def one_run(data, tests, steps, seed, with_muon):
    """Train a tiny Flamingo, and what it learned: a dict of numbers and marks."""
    torch.manual_seed(seed)
    model, _, tokenizer = build_flamingo("tiny")
    model = model.to(choose_device())
    started = time.process_time()
    quiet = {"seed": seed, "report": lambda line: None}
    history = train(
        model, tokenizer, *data, n_steps=steps, with_muon=with_muon, **quiet
    )
    taken = time.process_time() - started
    losses = torch.tensor([entry["loss"] for entry in history])
    run = {
        "optimizer": "Muon" if with_muon else "AdamW",
        "steps": steps,
        "seed": seed,
        "processor seconds": round(taken, 1),
        "loss by fifths": [round(part.mean().item(), 3) for part in losses.chunk(5)],
    }
    for name, (features, scenes) in tests.items():
        said = caption(model, None, tokenizer, features)
        run[name] = [int(mark) for mark in score_captions(said, scenes)["exact"]]
    return run


TRIALS = {  # rates and seeds; steps: 280 of Muon take as long as 430 of AdamW
    ("Muon", 280): {1e-3: (0, 1), 2e-3: (0,), 4e-3: (0, 1), 6e-3: (1,), 8e-3: (0, 1)},
    ("AdamW", 430): {1e-3: (0, 1), 2e-3: (0, 1), 3e-3: (1,), 4e-3: (0,)},
}


def chapter_tests(n):
    """The test sets of chapter 9, `n` scenes in each of the two large ones."""
    rows = [row for row in load_captions(ROOT / "data" / "emoji") if row["named"]]
    hands = [row for row in load_captions(ROOT / "data" / "hands") if row["named"]]
    hands = [{**row, "studio": row["file_name"]} for row in hands if not row["trained"]]
    trained = [row for row in rows if row["trained"]]
    twemoji, openmoji = (
        [row for row in rows if row["studio"] == studio]
        for studio in ("twemoji", "openmoji")
    )
    few = 3 * n // 4
    return trained, {
        "trained studios": make_scenes(trained, n, seed=2, pairs=0.0),
        "Twemoji": make_scenes(twemoji, few, seed=3, pairs=0.0),
        "OpenMoji": make_scenes(openmoji, few, seed=4, pairs=0.0),
        "unseen clip art": make_scenes(hands, few, seed=6, pairs=0.0),
        "held-out pairs": make_scenes(trained, n, seed=5, pairs=1.0, held_out=True),
    }


def try_rates(trials, n_scenes, n_tests, write):
    """The run of chapter 9 with each optimizer and rate of `trials`."""
    rows, tests = chapter_tests(n_tests)
    scenes = make_scenes(rows, n_scenes, seed=1)
    model, image_processor, _ = build_flamingo("tiny")
    encode = partial(encode_pictures, model.vision_encoder, image_processor)
    features = encode([s["picture"] for s in scenes])
    texts = [s["text"] for s in scenes]
    shown = {k: (encode([s["picture"] for s in v]), v) for k, v in tests.items()}
    runs = []
    for (name, steps), rates in trials.items():
        for lr, seed in ((lr, seed) for lr, seeds in rates.items() for seed in seeds):
            torch.manual_seed(seed)
            model, _, tokenizer = build_flamingo("tiny")
            model = model.to(choose_device())
            quiet = {"seed": seed, "report": lambda line: None}
            how = {"n_steps": steps, "lr": lr, "with_muon": name == "Muon"}
            started = time.process_time()
            history = train(model, tokenizer, features, texts, **how, **quiet)
            taken = round(time.process_time() - started)
            loss = statistics.mean(entry["loss"] for entry in history[-20:])
            run = {"optimizer": name, "steps": steps, "lr": lr, "seed": seed}
            run |= {"processor seconds": taken, "loss": round(loss, 3)}
            for test, (some, them) in shown.items():
                said = caption(model, None, tokenizer, some)
                right = statistics.mean(score_captions(said, them)["exact"])
                run[test] = round(right, 2)
            runs.append(run)
            write(runs)


def learn(n_scenes, steps, seeds, n_tests, write):
    """What each optimizer learns in so many steps, and AdamW in as much time."""
    rows = [row for row in load_captions(ROOT / "data" / "emoji") if row["named"]]
    trained = [row for row in rows if row["trained"]]
    unseen = [row for row in rows if row["studio"] == "twemoji"]
    scenes = make_scenes(trained, n_scenes, seed=1)
    shown = {
        name: make_scenes(drawn, n_tests, seed=5 + i, pairs=0.0)
        for i, (name, drawn) in enumerate(zip(SETS, (trained, unseen), strict=True))
    }
    model, image_processor, _ = build_flamingo("tiny")
    encode = partial(encode_pictures, model.vision_encoder, image_processor)
    data = encode([s["picture"] for s in scenes]), [s["text"] for s in scenes]
    tests = {k: (encode([s["picture"] for s in v]), v) for k, v in shown.items()}
    runs = []
    for seed in range(seeds):
        muon = one_run(data, tests, steps, seed, with_muon=True)
        adamw = one_run(data, tests, steps, seed, with_muon=False)
        more = steps * muon["processor seconds"] / adamw["processor seconds"]
        longer = one_run(data, tests, max(1, round(more)), seed, with_muon=False)
        for run in (muon, adamw, longer):
            runs.append(run)
            write(runs)


def paper_model(device):
    """A Flamingo of the paper's sizes, random weights, without its vision encoder."""
    torch.manual_seed(0)
    lm = OPTForCausalLM(OPTConfig(vocab_size=50267)).requires_grad_(False)
    extend_instance(lm, FlamingoLMMixin)
    lm.set_decoder_layers_attr_name("model.decoder.layers")
    nothing = SimpleNamespace(visual=torch.nn.Identity())
    return Flamingo(nothing, lm, 50265, 50266, vis_dim=1024).to(device).train()


def flop_of_rounds(matrices, rounds=5):
    """Products in the rounds of `orthogonalise`, in floating point operations."""
    total = 0
    for p in matrices:
        rows, columns = p.shape
        blocks = 3 if rows == 3 * columns else 1
        short, long = sorted((rows // blocks, columns))
        total += blocks * rounds * (4 * short**2 * long + 2 * short**3)
    return total


def optimizers_for(matrices):
    """{name: optimizer}, all of the same matrices, on which they step in turn."""
    return {
        "AdamW, fused": torch.optim.AdamW(matrices, lr=1e-3, fused=True),
        "Muon, float32": Muon(matrices, lr=1e-3),
    }


def half_optimizers(matrices):
    """The same of those whose rounds are in half precision."""
    made = {
        "Muon, bfloat16": Muon(matrices, lr=1e-3, dtype=torch.bfloat16),
        "PyTorch's Muon": torch.optim.Muon(matrices, lr=1e-3),
    }
    if matrices[0].is_cuda:
        made["Muon, float16"] = Muon(matrices, lr=1e-3, dtype=torch.float16)
    return made


def step_by_shape(matrices, name):
    """Seconds of a step of a half-precision optimizer: {shape: (how many, of one)}."""
    found = {}
    for p in matrices:
        same = [q for q in matrices if q.shape == p.shape]
        if p is not same[0]:
            continue
        p.grad = torch.randn_like(p)
        taken = seconds(half_optimizers([p])[name].step, p.device)
        found[" x ".join(map(str, p.shape))] = len(same), round(taken, 4)
    return found


def seconds(what, device):
    """How long a call takes, with what it left in a GPU's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    what()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(batch_size, repeats, T_txt, layers=None):
    """Seconds of a step of each optimizer, and of forward and backward: dict."""
    device = choose_device()
    model = paper_model(device)
    _, matrices, _ = parameter_groups(model, 1e-3)
    matrices = matrices["params"][:layers]
    optimizers = optimizers_for(matrices)
    if matrices[0].is_cuda:
        optimizers |= half_optimizers(matrices)
    gradients = [torch.randn_like(p) for p in matrices]
    ids = torch.randint(2, 50000, (batch_size, T_txt), device=device)  # (B, T_txt)
    ids[:, 0] = 50266
    patches = torch.randn(batch_size, 1, 1, 256, 1024, device=device)

    def forward_and_backward():
        model.zero_grad()  # gradients are made anew, those above stay
        half = choose_precision(device) != "float32"
        with torch.autocast(device.type, enabled=half):
            loss = model(None, ids, labels=ids, vision_features=patches).loss
        loss.backward()

    def step_of(optimizer):
        for p, gradient in zip(matrices, gradients, strict=True):
            p.grad = gradient
        optimizer.step()

    calls = {name: partial(step_of, o) for name, o in optimizers.items()}
    calls["forward and backward"] = forward_and_backward
    taken = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            taken[name].append(seconds(call, device))
    medians = {n: round(statistics.median(t[1:]), 4) for n, t in taken.items()}
    by_shape = {}
    if not matrices[0].is_cuda:
        by_shape = step_by_shape(matrices, "Muon, bfloat16")
        whole = sum(count * one for count, one in by_shape.values())
        medians["Muon, bfloat16, by shape"] = round(whole, 4)
    return {
        "device": describe_device(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "matrices": len(matrices),
        "numbers": sum(p.numel() for p in matrices),
        "GFLOP of rounds": round(flop_of_rounds(matrices) / 1e9),
        "batch": {"B": batch_size, "T_img": 1, "T_txt": T_txt},
        "repeats": repeats,
        "seconds": medians,
        "how many, and a step of one": by_shape,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "paper"), default="tiny")
    parser.add_argument("--rates", action="store_true", help="tiny: several of them")
    parser.add_argument("--scenes", type=int, help="default: 6000; rates, 9000")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2, help="tiny")
    tests = "tiny: pictures a set; default: 200; rates, 400"
    parser.add_argument("--tests", type=int, help=tests)
    parser.add_argument("--trials", type=int, help="rates: only so many, for a look")
    parser.add_argument("--threads", type=int, help="default: one; paper, two")
    parser.add_argument("--batch-size", type=int, default=4, help="paper")
    parser.add_argument("--text", type=int, default=32, help="paper: tokens in a row")
    parser.add_argument("--repeats", type=int, default=3, help="paper")
    parser.add_argument("--matrices", type=int, help="paper: only so many, for a look")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    is_tiny = args.size == "tiny"
    if args.rates and not is_tiny:
        parser.error("--rates are of the tiny size: leave --size out")
    torch.set_num_threads(args.threads or (1 if is_tiny else 2))
    torch.set_flush_denormal(True)
    name = "optimizers_tiny.json" if is_tiny else "optimizers.json"
    name = "rates_tiny.json" if args.rates else name
    args.out = args.out or ROOT / "data" / name
    if is_tiny:

        def write(runs):
            lines = ",\n".join(map(json.dumps, runs))
            args.out.write_text(f"[\n{lines}\n]\n")
            run = runs[-1]
            print({k: sum(v) if isinstance(v, list) else v for k, v in run.items()})

        if not args.rates:
            numbers = args.scenes or 6000, args.steps, args.seeds, args.tests or 200
            return learn(*numbers, write)
        few = {("Muon", 2): {1e-3: range(args.trials or 0)}}
        trials = few if args.trials else TRIALS
        return try_rates(trials, args.scenes or 9000, args.tests or 400, write)
    found = measure(args.batch_size, args.repeats, args.text, args.matrices)
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
