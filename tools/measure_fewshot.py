#!/usr/bin/env python3
"""Accuracy against number of demonstrations, with all controls, of a shipped Flamingo.

    python tools/measure_fewshot.py smol     some ten minutes on two cores
    python tools/measure_fewshot.py tiny     the same for the tiny one
    python tools/measure_fewshot.py tiny --prompts 4 --out FILE    a look

Prompts as in chapter 10: tasks on things with names, made-up words for things that no
Flamingo was trained to name, the question drawn by another studio than the
demonstrations. Writes data/SIZE_flamingo/fewshot.json, a line for each setting: the
marks, 0 or 1, of every prompt. Chapter 10 draws it.
"""

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from flamingo_lite import (  # noqa: E402
    answer,
    answer_in_words,
    encode_pictures,
    load_captions,
    load_flamingo,
    make_counts,
    make_episodes,
    make_scenes,
    nearest,
)
from flamingo_lite.fewshot import QUESTIONS  # noqa: E402
from flamingo_lite.loading import DATA, smollm2_folder  # noqa: E402

WAYS = (None, "no pictures", "wrong pictures", "shuffled texts")


class Bench:
    """A Flamingo, its pictures, and what it answers."""

    def __init__(self, size, n_prompts, n_seeds):
        self.model, self.image_processor, self.tokenizer = load_flamingo(size)
        folder = smollm2_folder() if size == "smol" else DATA / "tiny_opt"
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.lm = lm.eval()
        self.lm_tokenizer = AutoTokenizer.from_pretrained(folder)
        self.n, self.seeds, self.rows = n_prompts, range(n_seeds), []
        rows = load_captions(ROOT / "data" / "emoji")
        known = [row for row in rows if row["named"] and row["trained"]]
        self.counts = make_counts(known, 600, seed=21)
        unnamed = [row for row in rows if not row["named"]]
        self.singles = make_scenes(unnamed, 2000, seed=22, pairs=0.0)
        self.count_features = self.encode(self.counts)
        self.single_features = self.encode(self.singles)
        pixels = [self.image_processor(s["picture"]) for s in self.singles]
        with torch.no_grad():
            chunks = torch.stack(pixels).split(100)
            pooled = [self.model.vision_encoder(chunk)[0] for chunk in chunks]
        self.embedded = torch.cat(pooled)  # (singles, d)

    def encode(self, scenes):
        """Features, the last one of a blank picture."""
        blank = Image.new("RGB", scenes[0]["picture"].size, "white")
        pictures = [scene["picture"] for scene in scenes] + [blank]
        return encode_pictures(
            self.model.vision_encoder, self.image_processor, pictures
        )

    def note(self, what, n_shots, how, marks, **more):
        """Keep a line, and say it."""
        line = {"what": what, "shots": n_shots, "how": how or "right", **more}
        self.rows.append({**line, "marks": [int(mark) for mark in marks]})
        print(line, f"{sum(marks) / len(marks):.3f}", flush=True)

    def episodes(self, scenes, n_shots, how=None, **sort):
        """Of all seeds."""
        return [
            episode
            for seed in self.seeds
            for episode in make_episodes(scenes, self.n, seed, n_shots, how=how, **sort)
        ]

    def right(self, episodes, features):
        """Marks of the model's answers."""
        said = answer(self.model, self.tokenizer, features, episodes)
        return [a == e["answer"] for a, e in zip(said, episodes, strict=True)]

    def tasks(self, shots):
        """Name, number or kind, as the demonstrations say."""
        for how in WAYS:
            for n_shots in shots:
                if how and not n_shots:
                    continue
                for question in QUESTIONS:
                    episodes = self.episodes(
                        self.counts, n_shots, how, question=question
                    )
                    marks = self.right(episodes, self.count_features)
                    self.note("task", n_shots, how, marks, question=question)

    def naming(self, n_ways, shots):
        """Made-up words, with controls and both ceilings."""
        for n_shots in shots:
            for how in WAYS:
                episodes = self.episodes(self.singles, n_shots, how, n_ways=n_ways)
                marks = self.right(episodes, self.single_features)
                self.note("naming", n_shots, how, marks, ways=n_ways)
            episodes = self.episodes(self.singles, n_shots, n_ways=n_ways)
            truth = [episode["answer"] for episode in episodes]
            told = answer_in_words(self.lm, self.lm_tokenizer, episodes, self.singles)
            marks = [a == b for a, b in zip(told, truth, strict=True)]
            self.note("naming", n_shots, "text only", marks, ways=n_ways)
            marks = [self.clip_says(e) == e["answer"] for e in episodes]
            self.note("naming", n_shots, "CLIP alone", marks, ways=n_ways)

    def clip_says(self, episode):
        """The text of the demonstration whose picture is nearest."""
        *shown, asked = episode["numbers"]
        found = nearest(self.embedded[[asked]], self.embedded[shown], k=1)
        return episode["texts"][found.item()]

    def unseen(self, shots):
        """The question by a studio that no model was trained on."""
        for studio in ("twemoji", "openmoji"):
            for n_shots in shots:
                for how in (None, "wrong pictures"):
                    sort = {"n_ways": 5, "query_studios": (studio,)}
                    episodes = self.episodes(self.singles, n_shots, how, **sort)
                    marks = self.right(episodes, self.single_features)
                    self.note(studio, n_shots, how, marks, ways=5)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=("tiny", "smol"))
    parser.add_argument("--prompts", type=int, default=50, help="for each seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = args.out or DATA / f"{args.size}_flamingo" / "fewshot.json"
    bench = Bench(args.size, args.prompts, args.seeds)
    bench.naming(5, (1, 2, 3))
    bench.naming(2, (1, 2, 4))
    bench.unseen((1,))
    bench.tasks((0, 1, 2, 4, 8))
    lines = ",\n".join(json.dumps(row) for row in bench.rows)
    Path(f"{out}.tmp").write_text(f"[\n{lines}\n]\n")
    os.replace(f"{out}.tmp", out)


if __name__ == "__main__":
    main()
