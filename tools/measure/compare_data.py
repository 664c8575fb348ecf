#!/usr/bin/env python3
"""What each change of data is worth: small CLIPs, alike but for what they are shown.

    python tools/measure/compare_data.py
        half an hour on one idle core; resumes where it stopped
    python tools/measure/compare_data.py --steps 20 --seeds 1 --tests 40 --out FILE
        a look

Four sorts of data, each with all that the one before has: emoji of the seven trained
studios; icon sets, most of them in one ink; clip art by the artists that may be trained
on; and then chance in everything, outlined copies, turned and sheared drawings, any ink
and ground, blur and JPEG. Model, steps, batches and places are the same. The tests are
those of tools/weights/hands.py, single things, three seeds of scenes.

Writes data/compare_data.json: what each test picture shows, and a line for each run
with its marks. Appendix A draws it. A finished run is not repeated: delete the file to
start again.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import open_clip
import torch

from tools import ROOT
from tools.weights.atlas import compose
from tools.weights.hands import drawing_of, scenes_to_test, sets_to_test
from tools.weights.train_eyes import (
    Batches,
    embed_pictures,
    learning_rate,
    make_optimizers,
    read_rows,
    training_step,
)

DATA = ROOT / "data"
PLAIN = ("size", "place", "mirror")


class PlainBatches(Batches):
    """The same scenes as drawn: upright, on a level white or pale ground, in fair
    weather; a drawing in one ink is black on white."""

    def draw(self, numbers, plan):
        plain = {name: plan[name] for name in PLAIN}
        pale = plan["ground"][:, :1].repeat(1, 2, 1)  # (B, 2, 3)
        return compose(self.atlas, numbers, {**plain, "ground": pale * 0.25 + 0.75})


def of_studios(row):
    return row["path"].is_relative_to(DATA / "emoji")


def of_icons(row):
    return of_studios(row) or row["sort"] != "clip art"


DRAWN = ("emoji", "silhouette", "clip art")
# name: (which rows, which sorts of drawing, how batches are drawn)
VARIANTS = {
    "emoji studios": (of_studios, DRAWN, PlainBatches),
    "+ icon sets": (of_icons, DRAWN, PlainBatches),
    "+ clip art": (lambda row: True, DRAWN, PlainBatches),
    "+ chance": (lambda row: True, None, Batches),
}


def small_model(folder):
    """A CLIP of the same kind as data/tiny_clip, three layers of width 128."""
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    config["embed_dim"] = config["text_cfg"]["width"] = 128
    config["vision_cfg"] |= {"width": 128, "layers": 3, "patch_dropout": 0.5}
    return open_clip.CLIP(**config)


class Tests:
    """Single things by the hands of each test, three seeds of scenes."""

    def __init__(self, n, seeds=(1, 2, 3)):
        sets = sets_to_test()
        names = {row["thing"]: row["text"] for row in sets["trained studios"]}
        self.names, self.scenes = list(names.values()), {name: [] for name in sets}
        for seed in seeds:
            for name, scenes in scenes_to_test(sets, n, seed).items():
                if name in sets:  # and not the pairs
                    self.scenes[name] += scenes

    def shown(self):
        """For each test picture the number of the drawing that it shows."""
        numbers = {}
        for name, scenes in self.scenes.items():
            drawings = [drawing_of(scene) for scene in scenes]
            number = {drawing: i for i, drawing in enumerate(dict.fromkeys(drawings))}
            numbers[name] = [number[drawing] for drawing in drawings]
        return numbers

    @torch.no_grad()
    def marks(self, model, tokenizer):
        """Is the nearest of all names the right one? {test: "0110…"}."""
        model.eval()
        device = next(model.parameters()).device
        tokens = tokenizer(self.names).to(device)
        text = model.encode_text(tokens, normalize=True)  # (names, d)
        marks = {}
        for name, scenes in self.scenes.items():
            image = embed_pictures(model, [s["picture"] for s in scenes])
            best = (image @ text.T).argmax(dim=-1).tolist()
            right = [
                self.names[i] == s["text"] for i, s in zip(best, scenes, strict=True)
            ]
            marks[name] = "".join(str(int(mark)) for mark in right)
        return marks


def one_run(variant, seed, args, tests):
    """Train a small CLIP and test it: a dict, for a line of the file."""
    wanted, sorts, make_batches = VARIANTS[variant]
    rows = [row for row in read_rows() if row["named"] and wanted(row)]
    torch.manual_seed(seed)
    folder = DATA / "tiny_clip"
    model = small_model(folder).to(args.device)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    pictures = [args.singles] * 2, [args.pairs] * 2
    batches = make_batches(rows, seed, *pictures, args.device, sorts)
    optimizers, losses = make_optimizers(model, args.lr), []
    started = time.perf_counter()
    for step in range(args.steps):
        rate = learning_rate(step, args.steps, args.lr, args.steps / 2, warmup=50)
        for group in (g for o in optimizers.values() for g in o.param_groups):
            group["lr"] = rate
        if step >= 0.8 * args.steps:
            model.visual.patch_dropout.prob = 0.0
        torch.manual_seed(seed * 1_000_003 + step)
        losses.append(training_step(model, tokenizer, optimizers, *batches(step)))
    seconds = time.perf_counter() - started
    about = {"variant": variant, "seed": seed, "steps": args.steps}
    about |= {"drawings": len(batches.atlas.pixels), "pictures": len(batches(0)[1])}
    about["seconds per step"] = round(seconds / args.steps, 3)
    about["loss"] = round(torch.stack(losses[-20:]).mean().item(), 3)
    return {**about, "marks": tests.marks(model, tokenizer)}


def write(path, found):
    """Write beside, then rename."""
    runs = ",\n".join(json.dumps(run) for run in found["runs"])
    text = f'{{"shown": {json.dumps(found["shown"])},\n"runs": [\n{runs}\n]}}\n'
    Path(f"{path}.tmp").write_text(text)
    os.replace(f"{path}.tmp", path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--singles", type=int, default=80, help="in a batch")
    parser.add_argument("--pairs", type=int, default=8, help="each both ways round")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tests", type=int, default=200, help="pictures, a seed")
    parser.add_argument("--threads", type=int, default=2)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device)
    parser.add_argument("--out", type=Path, default=DATA / "compare_data.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # tiny gradients make Muon slow otherwise
    tests, found = Tests(args.tests), {"runs": []}
    if args.out.exists():
        found = json.loads(args.out.read_text())
        if found["shown"] != tests.shown():
            sys.exit(f"{args.out} has other test pictures: delete it, or say --tests")
    found["shown"] = tests.shown()
    for seed in range(args.seeds):
        for variant in VARIANTS:
            done = {(run["variant"], run["seed"]) for run in found["runs"]}
            if (variant, seed) in done:
                continue
            run = one_run(variant, seed, args, tests)
            found["runs"].append(run)
            write(args.out, found)
            shares = {k: m.count("1") / len(m) for k, m in run.pop("marks").items()}
            print(run, {k: round(v, 3) for k, v in shares.items()}, flush=True)
            found = json.loads(args.out.read_text())


if __name__ == "__main__":
    main()
