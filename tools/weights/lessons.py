#!/usr/bin/env python3
"""What the shipped Flamingos are trained on: captions, questions, stories, prompts.

    python tools/weights/lessons.py
        prints one of each
    python tools/weights/lessons.py --out sheet.png
        and draws sixty of the pictures
    python tools/weights/lessons.py --time
        pictures a second: drawn, and encoded

`teach` is what the training scripts call. Nothing here is drawn by Twemoji, OpenMoji or
an artist of the clip art that is kept for testing, or shows a thing that is kept
unnamed, or a pair that is held out.

What is asked, told and bound follows from the functions of chapters 7, 7b and 10. They
draw their pictures, too; by default each is then drawn anew by all hands that may be
trained on, in any ink and weather, as the tiny CLIP saw them (`Painter` of
hands.py). With `--no-hands` the pictures of those chapters stay, by seven emoji
studios, some drawings outlined.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from flamingo_lite import (
    build_flamingo,
    encode_pictures,
    group_scenes,
    load_captions,
    load_sprites,
    make_counts,
    make_scenes,
    make_stories,
    make_tasks,
    naming_episode,
    task_episode,
    to_learn,
    train,
)
from flamingo_lite.data import interleave
from flamingo_lite.fewshot import QUESTIONS
from flamingo_lite.tasks import TASKS
from tools import ROOT
from tools.weights.atlas import outlined, read_rows
from tools.weights.hands import Painter
from tools.weights.train_eyes import fast_attention

# How many of each in an epoch; stories and prompts hold several pictures.
SHARES = {
    "captions": 50_000,
    "where": 5_000,
    "how many": 3_000,
    "is there": 14_000,
    "what kind": 4_000,
    "what is this": 8_000,
    "stories": 2_200,
    "task prompts": 2_600,
    "naming prompts": 3_200,
    "pool": 4_000,  # pictures that the prompts of each kind draw on
}


def with_outlines(rows, folder, n_studios=2):
    """Add two outlined versions of each thing by its first studios, as more studios.

    The tiny CLIP was trained with such drawings too; they are written to `folder`.
    """
    more, sprites = [], load_sprites(rows)
    for row in rows:
        if row["studio"] not in list(sprites[row["thing"]])[:n_studios]:
            continue
        for kind, drawing in zip(
            ("flat", "lines"),
            outlined(sprites[row["thing"]][row["studio"]]),
            strict=True,
        ):
            studio = f"{row['studio']}-{kind}"
            path = Path(folder) / f"{row['thing']}-{studio}.png"
            drawing.save(path)
            more.append({**row, "studio": studio, "path": path})
    return rows + more


def emoji_rows():
    """Rows of data/emoji that are named and trained on."""
    rows = load_captions(ROOT / "data" / "emoji")
    return [row for row in rows if row["named"] and row["trained"]]


def make_painter(seed, device="cpu"):
    """A Painter of all named things, by all hands that may be trained on."""
    rows = read_rows(ROOT / "data" / "emoji", ROOT / "data" / "hands")
    rows = [row for row in rows if row["named"] and row["trained"]]
    return Painter(rows, seed, device)


@torch.no_grad()
def encode_tensors(vision_encoder, pictures, batch_size=96):
    """As `encode_pictures`, of (pictures, 3, 64, 64) in 0 … 1."""
    tower = getattr(vision_encoder, "visual", vision_encoder)
    parameter = next(tower.parameters())
    tokens = [
        tower(some.to(parameter) * 2 - 1)[1].half().cpu()
        for some in pictures.split(batch_size)
    ]
    return rearrange(torch.cat(tokens), "pictures v d -> pictures 1 v d")


class Lessons:
    """Features of all pictures, and the sequences that are made of them.

    Args:
        encode: pictures to features; a list of PIL pictures, or what `paint` gives.
        paint: a Painter, which draws the scenes anew; None keeps their pictures.
        report: called with lines about progress.
    """

    def __init__(self, encode, paint=None, report=print):
        self.encode, self.paint, self.report = encode, paint, report
        self.features, self.texts, self.sequences, self.n = [], [], [], 0

    def show(self, scenes, chunk=5000):
        """Encode the pictures of scenes; the number of the first."""
        for start in range(0, len(scenes), chunk):
            some = scenes[start : start + chunk]
            pictures = [scene["picture"] for scene in some]
            self.features.append(
                self.encode(self.paint(some) if self.paint else pictures)
            )
        self.n += len(scenes)
        self.report(f"{self.n} pictures encoded")
        return self.n - len(scenes)

    def add(self, sequences, texts):
        self.sequences += sequences
        self.texts += texts

    def captions(self, rows, n, seed, chunk=5000):
        for start in range(0, n, chunk):
            scenes = make_scenes(rows, min(chunk, n - start), (seed, start), pairs=0.7)
            first = self.show(scenes)
            alone = [[first + i] for i in range(len(scenes))]
            self.add(alone, [[scene["text"]] for scene in scenes])

    def questions(self, rows, task, n, seed):
        tasks = make_tasks(rows, n, seed, task)
        first = self.show([t["scene"] for t in tasks])
        texts = [[(t["given"], t["answer"])] for t in tasks]
        self.add([[first + i] for i in range(n)], texts)

    def stories(self, rows, n, seed):
        stories = make_stories(rows, n, seed)
        place = self.show([scene for story in stories for scene in story["scenes"]])
        for story in stories:
            length = len(story["texts"])
            self.add([list(range(place, place + length))], [story["texts"]])
            place += length

    def episodes(self, episodes, first):
        for episode in episodes:
            numbers = [first + number for number in episode["numbers"]]
            self.add([numbers], [to_learn(episode)])

    def task_prompts(self, rows, n, n_pool, seed):
        rng, scenes = np.random.default_rng((seed, 3)), make_counts(rows, n_pool, seed)
        first = self.show(scenes)
        episodes = [
            task_episode(rng, scenes, str(rng.choice(QUESTIONS)), rng.integers(1, 17))
            for _ in range(n)
        ]
        self.episodes(episodes, first)

    def naming_prompts(self, rows, n, n_pool, seed, longest=10):
        """Two to five new words, in up to `longest` demonstrations."""
        rng = np.random.default_rng((seed, 4))
        scenes = make_scenes(rows, n_pool, (seed, 4), pairs=0.0)
        first = self.show(scenes)
        groups = group_scenes(scenes)  # by who drew them at last
        episodes = []
        for _ in range(n):
            n_ways = int(rng.integers(2, 6))
            n_shots = int(rng.integers(1, longest // n_ways + 1))
            episodes.append(naming_episode(rng, groups, n_ways, n_shots))
        self.episodes(episodes, first)


def make_lessons(
    model,
    image_processor,
    seed=100,
    shares=None,
    longest=10,
    hands=True,
    report=print,
):
    """Draw and encode everything: (features, texts, sequences), as `train` wants them.

    Args:
        model, image_processor: from `build_flamingo`.
        seed: an int.
        shares: other numbers than SHARES, of some of its entries.
        longest: demonstrations in a naming prompt at the most.
        hands: draw by all hands that may be trained on; False, as chapter 7 does.
        report: called with lines about progress.
    """
    n = {**SHARES, **(shares or {})}
    encoder = model.vision_encoder

    def encode(pictures):
        if isinstance(pictures, torch.Tensor):
            return encode_tensors(encoder, pictures)
        return encode_pictures(encoder, image_processor, pictures)

    painter = None
    if hands:
        painter = make_painter(seed, next(model.parameters()).device)
    lessons = Lessons(encode, painter, report)
    with tempfile.TemporaryDirectory() as folder:
        rows = with_outlines(emoji_rows(), folder)
        lessons.captions(rows, n["captions"], seed)
        for task in TASKS:
            lessons.questions(rows, task, n[task], seed + 1)
        lessons.stories(rows, n["stories"], seed + 2)
        lessons.task_prompts(rows, n["task prompts"], n["pool"], seed + 3)
        lessons.naming_prompts(rows, n["naming prompts"], n["pool"], seed + 4, longest)
    return torch.cat(lessons.features), lessons.texts, lessons.sequences


def probe(model, image_processor, n=48, seed=6):
    """The scenes whose loss chapter 9 follows while it trains: (features, texts)."""
    scenes = make_scenes(emoji_rows(), n, seed=seed)
    pictures = [scene["picture"] for scene in scenes]
    features = encode_pictures(model.vision_encoder, image_processor, pictures)
    return features, [scene["text"] for scene in scenes]


def read_looks(path):
    """What `teach` noted: [{"step", "true", "shuffled"}], each step once, in order.

    A training that was killed notes a few steps twice; the later note counts.
    """
    notes = {}
    if Path(path).is_file():
        for line in Path(path).read_text().splitlines():
            note = json.loads(line)
            notes[note["step"]] = note
    return [notes[step] for step in sorted(notes)]


def teach(built, shares, seed, report_every, args, longest=10):
    """Train on lessons with the function of chapter 9: (history, lines for a log).

    At each report, looks.jsonl in the folder of checkpoints gets the step and the
    losses of `probe` beside its own and beside exchanged pictures.

    Args:
        built: model, image processor, tokenizer, from `build_flamingo`.
        shares, longest: see `make_lessons`.
        seed: of the lessons.
        report_every: see `train`.
        args: with steps, batch_size, lr, seed, hands, precision and checkpoints, a
            folder.
    """
    model, image_processor, tokenizer = built
    log = [f"seed {args.seed} steps {args.steps} lr {args.lr} lessons {shares}"]
    log[0] += f" prompts {longest} drawn by "
    log[0] += "all trained hands" if args.hands else "seven emoji studios"
    log[0] += f" products in {args.precision}"

    def report(line):
        print(line, flush=True)
        if "loss" in line:  # and not where a training goes on from
            log.append(line[: line.index("loss") + 10])  # not the pace

    checkpoint, looks = (args.checkpoints / n for n in ("last.pt", "looks.jsonl"))
    if not checkpoint.exists():
        looks.unlink(missing_ok=True)  # of another training

    def note(numbers):
        few = {"step": numbers["step"]}
        few |= {name: round(numbers[name], 4) for name in ("true", "shuffled")}
        with looks.open("a") as file:
            file.write(f"{json.dumps(few)}\n")

    features, texts, sequences = make_lessons(
        model, image_processor, seed, shares, longest, args.hands
    )
    with fast_attention(args.precision, next(model.parameters()).device):
        history = train(
            model,
            tokenizer,
            features,
            texts,
            n_steps=args.steps,
            batch_size=args.batch_size,
            lr=args.lr,
            seed=args.seed,
            checkpoint=checkpoint,
            report_every=report_every,
            report=report,
            sequences=sequences,
            validation=probe(model, image_processor),
            log=note,
            precision=args.precision,
        )
    return history, log


def add_switches(parser):
    """The switches of every script that teaches."""
    precisions = ["float32", "bfloat16"]
    parser.add_argument("--precision", choices=precisions, default="float32")
    add_hands(parser)


def add_hands(parser):
    """Who draws."""
    told = "draw by all trained hands (the default), or as chapter 7 does"
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--hands", action=switch, default=True, help=told)


def measure_pace(hands, n=2000):
    """Print how many pictures a second are drawn, and encoded."""
    model, image_processor, _ = build_flamingo("tiny")
    rows, drawn, encoded = emoji_rows(), [0], [0]

    def timed(seconds, function):
        def called(*args):
            started = time.perf_counter()
            result = function(*args)
            seconds[0] += time.perf_counter() - started
            return result

        return called

    def encode(pictures):
        if isinstance(pictures, torch.Tensor):
            return encode_tensors(model.vision_encoder, pictures)
        return encode_pictures(model.vision_encoder, image_processor, pictures)

    paint = timed(drawn, make_painter(0)) if hands else None
    lessons = Lessons(timed(encoded, encode), paint, lambda line: None)
    started = time.perf_counter()
    lessons.captions(rows, n, 0)
    whole = time.perf_counter() - started
    print(f"{n / whole:.0f} pictures a second", end="; ")
    print(f"encoding alone: {n / encoded[0]:.0f}", end="")
    print(f", drawing anew alone: {n / drawn[0]:.0f}" if hands else "")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write a sheet of pictures")
    parser.add_argument("--time", action="store_true", help="measure, and no more")
    add_hands(parser)
    args = parser.parse_args()
    if args.time:
        measure_pace(args.hands)
        return
    kept = []

    def keep(pictures):
        if not isinstance(pictures, torch.Tensor):
            pixels = np.stack([np.asarray(picture) for picture in pictures])
            pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
        kept.extend(pictures[:10])
        return torch.zeros(len(pictures))

    paint = make_painter(args.seed) if args.hands else None
    lessons, rows = Lessons(keep, paint, lambda line: None), emoji_rows()
    lessons.captions(rows, 10, args.seed)
    for task in TASKS:
        lessons.questions(rows, task, 5, args.seed)
    lessons.stories(rows, 3, args.seed)
    lessons.task_prompts(rows, 2, 200, args.seed)
    lessons.naming_prompts(rows, 2, 3000, args.seed)
    for texts in lessons.texts:
        print(interleave(texts))
    if args.out:
        sheet = torch.stack(kept[:60])
        sheet = rearrange(sheet, "(i j) c y x -> (i y) (j x) c", j=10)
        sheet = Image.fromarray((sheet * 255).byte().numpy())
        sheet.resize((sheet.width * 2, sheet.height * 2)).save(args.out)


if __name__ == "__main__":
    main()
