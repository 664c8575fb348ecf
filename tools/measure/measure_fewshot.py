#!/usr/bin/env python3
"""Accuracy against number of demonstrations, with all controls, of a shipped Flamingo.

    python tools/measure/measure_fewshot.py smol
        forty minutes on two cores
    python tools/measure/measure_fewshot.py tiny
        the same for the tiny one
    python tools/measure/measure_fewshot.py tiny --prompts 4 --out FILE
        a look
    python tools/measure/measure_fewshot.py smol --no-start --weights FOLDER --out FILE
        of a smol that was trained with --no-start

Prompts as in chapter 10: tasks on things with names, made-up words for things that no
Flamingo was trained to name, the question drawn by another studio than the
demonstrations. (The clip art kept for testing shows named things only, so it is tested
by captions.) The prompts of a few demonstrations are the first ones of those of more,
so that every number of them is asked the same; but for "naming, drawn anew", where each
has prompts of its own. For new words some ways have MORE prompts, so many times.

Writes data/SIZE_flamingo/fewshot.json, a line for each setting: the marks, 0 or 1, of
every prompt (for "lengths", rounded lengths). A line that is there already is not
measured again: delete the file to start anew. Chapter 10 draws it.
"""

import argparse
import copy
import itertools
import json
import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image
from tokenizers.processors import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from flamingo_lite import (
    answer,
    answer_in_words,
    caption,
    encode_pictures,
    load_captions,
    load_flamingo,
    make_counts,
    make_episodes,
    make_scenes,
    nearest,
)
from flamingo_lite.fewshot import QUESTIONS, in_words
from flamingo_lite.loading import DATA, smollm2_folder
from tools import ROOT
from tools.weights.hands import CLIP_ART, sets_to_test

WAYS = (None, "no pictures", "wrong pictures", "shuffled texts")
UNSEEN = "twemoji", "openmoji"
MORE = {None: 4, "wrong pictures": 4, "CLIP alone": 4}


def is_right(said, episode):
    """Word for word."""
    return said == episode["answer"]


def is_of_prompt(said, episode):
    """Any of the made-up words, right or wrong."""
    return said in episode["words"].values()


class Bench:
    """A Flamingo, its pictures, and what it answers."""

    def __init__(self, args, out):
        built = load_flamingo(args.weights or args.size)
        self.model, self.image_processor, self.tokenizer = built
        folder = smollm2_folder() if args.size == "smol" else DATA / "tiny_opt"
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.lm = lm.eval()
        self.lm_tokenizer = AutoTokenizer.from_pretrained(folder)
        self.start = self.tokenizer("").input_ids  # what stands before every text
        for tokenizer in (self.tokenizer, self.lm_tokenizer) if args.no_start else ():
            tokenizer.backend_tokenizer.post_processor = ByteLevel()
        self.n, self.seeds, self.out = args.prompts, range(args.seeds), out
        self.rows = json.loads(out.read_text()) if out.exists() else []
        rows = load_captions(ROOT / "data" / "emoji")
        self.named = [row for row in rows if row["named"]]
        self.known = [row for row in self.named if row["trained"]]
        self.counts = make_counts(self.known, 600, seed=21)
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

    def note(self, what, n_shots, how, measure, **more):
        """Measure a line, say it and keep it; one that the file has already is kept."""
        line = {"what": what, "shots": n_shots, "how": how or "right", **more}
        if any(line.items() <= row.items() for row in self.rows):
            return
        marks = measure()
        print(line, f"{sum(marks) / len(marks):.3f}", flush=True)
        self.rows.append({**line, "marks": [int(mark) for mark in marks]})
        lines = ",\n".join(json.dumps(row) for row in self.rows)
        Path(f"{self.out}.tmp").write_text(f"[\n{lines}\n]\n")
        os.replace(f"{self.out}.tmp", self.out)

    def episodes(self, scenes, n_shots, how=None, more=1, **sort):
        """Of all seeds; `more` times as many prompts of each."""
        return [
            episode
            for seed in self.seeds
            for episode in make_episodes(
                scenes, more * self.n, seed, n_shots, how=how, **sort
            )
        ]

    def marks(self, scenes, features, n_shots, how, good=is_right, **sort):
        """Is each of the model's answers right, or what else `good` asks?"""
        episodes = self.episodes(scenes, n_shots, how, **sort)
        said = answer(self.model, self.tokenizer, features, episodes)
        return [good(a, e) for a, e in zip(said, episodes, strict=True)]

    def captions(self, n=200):
        """Without demonstrations: captions of test scenes, word for word."""
        of = {s: [r for r in self.named if r["studio"] == s] for s in UNSEEN}
        of |= {CLIP_ART: sets_to_test()[CLIP_ART], "trained studios": self.known}
        sets = {s: make_scenes(of[s], n, seed=24, pairs=0.0) for s in of}
        sets["held-out pairs"] = make_scenes(self.known, n, 25, 1.0, held_out=True)
        for name, scenes in sets.items():
            self.note("caption", 0, None, partial(self.caption_marks, scenes), set=name)

    def caption_marks(self, scenes):
        """Is each caption right?"""
        pictures = [scene["picture"] for scene in scenes]
        said = caption(self.model, self.image_processor, self.tokenizer, pictures)
        return [a == scene["text"] for a, scene in zip(said, scenes, strict=True)]

    def first_tokens(self, n=200):
        """Of captions of two things: is each name's first token the likeliest?

        With the words before it as they should be; as trained, and with the start token
        taken away, or put first where there was none.
        """
        scenes = make_scenes(self.known, n, seed=26, pairs=1.0)
        features = self.encode(scenes)
        ways = {None: self.start, "no start token": []}
        if not self.tokenizer("").input_ids:
            ways = {None: [], "start token": self.start}
        for how, given in ways.items():
            for number, name in enumerate(("first thing", "second thing")):
                measure = partial(self.token_marks, scenes, features, given, number)
                self.note("name begins", 0, how, measure, name=name)
            lengths = partial(self.lengths, scenes, features, given)
            self.note("lengths", 0, how, lengths, layer=20)

    def ids(self, text):
        """Of a text, without a start token."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @torch.no_grad()
    def lengths(self, scenes, features, given, layer=20, n=6):
        """Median length of the residual stream's vector after a layer, of n tokens."""
        found, block = [], self.model.lang_encoder.old_decoder_blocks[layer - 1]
        hook = block.register_forward_hook(
            lambda module, inputs, x: found.append(x[0, :n].norm(dim=-1))
        )  # x: (1, T_txt, d_txt)
        for scene, picture in zip(scenes[:50], features, strict=False):
            ids = given + self.ids(f"<image>{scene['text']}")
            media = picture.float()[None, None]  # (1, 1, F, v, d_img)
            self.model(None, torch.tensor([ids]), vision_features=media)
        hook.remove()
        return torch.stack(found).median(dim=0).values.tolist()

    @torch.no_grad()
    def token_marks(self, scenes, features, given, number):
        """See `first_tokens`; `given` are token ids to start with."""
        found = []
        for scene, picture in zip(scenes, features, strict=False):
            text = scene["text"]
            known = text.split()[0]  # an article; or all before the second name
            if number:
                known = text[: text.rindex(scene["things"][1])].rstrip()
            ids, n_known = self.ids(f"<image>{text}"), len(self.ids(f"<image>{known}"))
            lang_x = torch.tensor([given + ids])  # (1, T_txt)
            media = picture.float()[None, None]  # (1, 1, F, v, d_img)
            logits = self.model(None, lang_x, vision_features=media).logits
            likeliest = logits[0, len(given) + n_known - 1].argmax()
            found.append(int(likeliest) == ids[n_known])
        return found

    def tasks(self, shots):
        """Name, number or kind, as the demonstrations say."""
        pictures = self.counts, self.count_features
        longest = max(shots)
        for how, n_shots, question in itertools.product(WAYS, shots, QUESTIONS):
            if how and not n_shots:
                continue
            sort = {"question": question, "longest": longest}
            measure = partial(self.marks, *pictures, n_shots, how, **sort)
            self.note("task", n_shots, how, measure, question=question)

    def naming(self, n_ways, shots):
        """Made-up words, with controls and what others make of the same prompts."""
        pictures = self.singles, self.single_features
        others = {
            "text only": self.words_say,
            "text only, choosing": self.words_choose,
            "CLIP alone": self.clip_says,
        }
        for n_shots in shots:
            sort = {"n_ways": n_ways, "longest": max(shots)}
            for how in WAYS:
                sort["more"] = MORE.get(how, 1)
                measure = partial(self.marks, *pictures, n_shots, how, **sort)
                self.note("naming", n_shots, how, measure, ways=n_ways)
            for how, other in others.items():
                sort["more"] = MORE.get(how, 1)
                episodes = self.episodes(self.singles, n_shots, **sort)
                measure = partial(self.marks_of, other, episodes)
                self.note("naming", n_shots, how, measure, ways=n_ways)

    def words_of_prompt(self, n_ways, shots):
        """Is the answer any of the prompt's made-up words, right or wrong?"""
        pictures = self.singles, self.single_features
        for n_shots in shots:
            for how in (None, "no pictures", "wrong pictures"):
                sort = {"n_ways": n_ways, "longest": max(shots), "good": is_of_prompt}
                measure = partial(self.marks, *pictures, n_shots, how, **sort)
                self.note("word of the prompt", n_shots, how, measure, ways=n_ways)

    def drawn_anew(self, n_ways, shots):
        """As `naming`, but each number of shots has prompts of its own."""
        for n_shots in shots:
            what = "naming, drawn anew", n_shots
            sort = {"n_ways": n_ways}
            pictures = self.singles, self.single_features
            measure = partial(self.marks, *pictures, n_shots, None, **sort)
            self.note(*what, None, measure, ways=n_ways)
            episodes = self.episodes(self.singles, n_shots, **sort)
            measure = partial(self.marks_of, self.clip_says, episodes)
            self.note(*what, "CLIP alone", measure, ways=n_ways)

    def marks_of(self, other, episodes):
        """Is each answer of something else right?"""
        said = other(episodes)
        return [a == e["answer"] for a, e in zip(said, episodes, strict=True)]

    def words_say(self, episodes):
        """What the language model writes, where names stand for the pictures."""
        return answer_in_words(self.lm, self.lm_tokenizer, episodes, self.singles)

    @torch.no_grad()
    def words_choose(self, episodes):
        """The likeliest of a prompt's own words, where names stand for pictures."""
        found = []
        for episode in episodes:
            prompt = in_words(episode, self.singles)
            words = list(episode["words"].values())
            given = self.lm_tokenizer(prompt, return_tensors="pt").input_ids
            read = self.lm(input_ids=given, use_cache=True, logits_to_keep=1)
            scores = []
            for word in words:
                ids = self.lm_tokenizer(f"{prompt} {word}.", return_tensors="pt")
                ids = ids.input_ids[:, given.shape[1] :]  # (1, T_txt)
                cache = copy.deepcopy(read.past_key_values)
                logits = self.lm(input_ids=ids, past_key_values=cache).logits
                logits = torch.cat((read.logits, logits[:, :-1]), dim=1)
                log_p = logits.log_softmax(-1).gather(-1, ids[..., None])
                scores.append(log_p.sum().item())
            found.append(words[int(np.argmax(scores))])
        return found

    def clip_says(self, episodes):
        """The text of the demonstration whose picture is nearest."""
        found = []
        for episode in episodes:
            *shown, asked = episode["numbers"]
            best = nearest(self.embedded[[asked]], self.embedded[shown], k=1)
            found.append(episode["texts"][best.item()])
        return found

    def unseen(self, shots):
        """The question by a studio that no model was trained on."""
        pictures = self.singles, self.single_features
        for studio in UNSEEN:
            sort = {"n_ways": 5, "query_studios": (studio,)}
            for n_shots, how in itertools.product(shots, (None, "wrong pictures")):
                measure = partial(self.marks, *pictures, n_shots, how, **sort)
                self.note(studio, n_shots, how, measure, ways=5)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=("tiny", "smol"))
    parser.add_argument("--prompts", type=int, default=50, help="for each seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", type=Path, help="a folder; default, data/'s")
    parser.add_argument("--no-start", action="store_true", help="no start token")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = args.out or DATA / f"{args.size}_flamingo" / "fewshot.json"
    bench = Bench(args, out)
    bench.captions()
    if args.size == "smol":
        bench.first_tokens()
    bench.naming(5, (1, 2, 3))
    bench.naming(2, (1, 2, 4))
    bench.words_of_prompt(5, (1, 3))
    bench.words_of_prompt(2, (1, 4))
    bench.drawn_anew(5, (1, 2, 3))
    bench.unseen((1,))
    bench.tasks((0, 1, 2, 4, 8))


if __name__ == "__main__":
    main()
