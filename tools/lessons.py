#!/usr/bin/env python3
"""What the shipped Flamingos are trained on: captions, questions, stories, prompts.

`python tools/lessons.py` prints one of each. `teach` is what the training scripts
call. Nothing here is drawn by Twemoji or OpenMoji, or shows a thing that is
kept unnamed, or a pair that is held out.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from train_tiny_clip import outlined  # noqa: E402

from flamingo_lite import (  # noqa: E402
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
from flamingo_lite.data import interleave  # noqa: E402
from flamingo_lite.fewshot import QUESTIONS  # noqa: E402
from flamingo_lite.tasks import TASKS  # noqa: E402

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


class Lessons:
    """Features of all pictures, and the sequences that are made of them."""

    def __init__(self, encode, report=print):
        self.encode, self.report = encode, report
        self.features, self.texts, self.sequences, self.n = [], [], [], 0

    def show(self, pictures):
        """Encode pictures; the number of the first."""
        if pictures:
            self.features.append(self.encode(pictures))
        self.n += len(pictures)
        self.report(f"{self.n} pictures encoded")
        return self.n - len(pictures)

    def add(self, sequences, texts):
        self.sequences += sequences
        self.texts += texts

    def captions(self, rows, n, seed, chunk=5000):
        for start in range(0, n, chunk):
            scenes = make_scenes(rows, min(chunk, n - start), (seed, start), pairs=0.7)
            first = self.show([scene["picture"] for scene in scenes])
            alone = [[first + i] for i in range(len(scenes))]
            self.add(alone, [[scene["text"]] for scene in scenes])

    def questions(self, rows, task, n, seed):
        tasks = make_tasks(rows, n, seed, task)
        first = self.show([t["picture"] for t in tasks])
        texts = [[(t["given"], t["asked"])] for t in tasks]
        self.add([[first + i] for i in range(n)], texts)

    def stories(self, rows, n, seed):
        stories = make_stories(rows, n, seed)
        place = self.show([p for story in stories for p in story["pictures"]])
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
        first = self.show([scene["picture"] for scene in scenes])
        episodes = [
            task_episode(rng, scenes, str(rng.choice(QUESTIONS)), rng.integers(1, 17))
            for _ in range(n)
        ]
        self.episodes(episodes, first)

    def naming_prompts(self, rows, n, n_pool, seed, longest=10):
        """Two to five new words, in up to `longest` demonstrations."""
        rng = np.random.default_rng((seed, 4))
        scenes = make_scenes(rows, n_pool, (seed, 4), pairs=0.0)
        first, groups = self.show([s["picture"] for s in scenes]), group_scenes(scenes)
        episodes = []
        for _ in range(n):
            n_ways = int(rng.integers(2, 6))
            n_shots = int(rng.integers(1, longest // n_ways + 1))
            episodes.append(naming_episode(rng, groups, n_ways, n_shots))
        self.episodes(episodes, first)


def make_lessons(
    model, image_processor, seed=100, shares=None, longest=10, report=print
):
    """Draw and encode everything: (features, texts, sequences), as `train` wants them.

    Args:
        model, image_processor: from `build_flamingo`.
        seed: an int.
        shares: other numbers than SHARES, of some of its entries.
        longest: demonstrations in a naming prompt at the most.
        report: called with lines about progress.
    """
    n = {**SHARES, **(shares or {})}
    rows = load_captions(ROOT / "data" / "emoji")
    rows = [row for row in rows if row["named"] and row["trained"]]

    def encode(pictures):
        return encode_pictures(model.vision_encoder, image_processor, pictures)

    lessons = Lessons(encode, report)
    with tempfile.TemporaryDirectory() as folder:
        rows = with_outlines(rows, folder)
        lessons.captions(rows, n["captions"], seed)
        for task in TASKS:
            lessons.questions(rows, task, n[task], seed + 1)
        lessons.stories(rows, n["stories"], seed + 2)
        lessons.task_prompts(rows, n["task prompts"], n["pool"], seed + 3)
        lessons.naming_prompts(rows, n["naming prompts"], n["pool"], seed + 4, longest)
    return torch.cat(lessons.features), lessons.texts, lessons.sequences


def teach(built, shares, seed, report_every, args, longest=10):
    """Train on lessons with the function of chapter 9: (history, lines for a log).

    Args:
        built: model, image processor, tokenizer, from `build_flamingo`.
        shares, longest: see `make_lessons`.
        seed: of the lessons.
        report_every: see `train`.
        args: with steps, batch_size, lr, seed and checkpoints, a folder.
    """
    model, image_processor, tokenizer = built
    log = [f"seed {args.seed} steps {args.steps} lr {args.lr} lessons {shares}"]
    log[0] += f" prompts {longest}"

    def report(line):
        print(line, flush=True)
        if "loss" in line:  # and not where a training goes on from
            log.append(line[: line.index("loss") + 10])  # not the pace

    features, texts, sequences = make_lessons(
        model, image_processor, seed, shares, longest
    )
    history = train(
        model,
        tokenizer,
        features,
        texts,
        n_steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        checkpoint=args.checkpoints / "last.pt",
        report_every=report_every,
        report=report,
        sequences=sequences,
    )
    return history, log


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = load_captions(ROOT / "data" / "emoji")
    rows = [row for row in rows if row["named"] and row["trained"]]
    lessons = Lessons(lambda pictures: torch.zeros(len(pictures)), lambda line: None)
    lessons.captions(rows, 2, args.seed)
    for task in TASKS:
        lessons.questions(rows, task, 1, args.seed)
    lessons.stories(rows, 1, args.seed)
    lessons.task_prompts(rows, 2, 200, args.seed)
    lessons.naming_prompts(rows, 2, 800, args.seed)
    for texts in lessons.texts:
        print(interleave(texts))


if __name__ == "__main__":
    main()
