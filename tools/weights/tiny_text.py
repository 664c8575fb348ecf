#!/usr/bin/env python3
"""The text that the tiny language model learns from. It holds no pictures, only words.

Six kinds of line, drawn at random with a fixed seed: captions, facts about kinds,
questions that the line itself answers, made-up words bound to things again and again,
lists of answers in which only the list says to what question, and words that come
back in the same order. `python tools/weights/tiny_text.py --lines 20` prints some.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from flamingo_lite.data import RELATIONS
from flamingo_lite.tasks import (
    NUMBERS,
    OPPOSITES,
    how_many,
    kind_of,
    made_up,
    plural,
)
from flamingo_lite.tasks import with_article as a
from tools import ROOT

DATA = ROOT / "data"


def named_things():
    """The names that captions use, from data/emoji/metadata.jsonl, in order."""
    lines = (DATA / "emoji" / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return list(dict.fromkeys(row["thing"] for row in rows if row["named"]))


def caption(rng, things):
    """One or two things and where they stand."""
    if rng.random() < 0.4:
        return a(rng.choice(things))
    one, other = rng.choice(things, 2, replace=False)
    return f"{a(one)} {rng.choice(RELATIONS)} {a(other)}"


def fact(rng, things):
    """What kind of thing a thing is, or how many there are."""
    thing = rng.choice(things)
    kind = kind_of(thing)
    number = rng.choice(NUMBERS)
    several = how_many(number, thing)
    return rng.choice(
        [
            f"{a(thing)} is {a(kind)}.",
            f"question: what kind of thing is {a(thing)}? answer: {a(kind)}",
            several,
            f"{several}. question: how many {plural(thing)}? answer: {number}",
            f"{several}. question: what is it? answer: {several}",
        ]
    )


def question(rng, things):
    """A caption, then a question that the caption answers."""
    one, other, absent = rng.choice(things, 3, replace=False)
    relation = rng.choice(RELATIONS)
    asked = rng.choice([one, other, absent])
    seen = f"{a(one)} {relation} {a(other)}."
    opposite, kind = OPPOSITES[relation], kind_of(one)
    there = "no" if asked == absent else "yes"
    return rng.choice(
        [
            f"{seen} question: what is {relation} the {other}? answer: {a(one)}",
            f"{seen} question: what is {opposite} the {one}? answer: {a(other)}",
            f"{seen} question: is there {a(asked)}? answer: {there}",
            f"{a(one)}. question: what is this? answer: {a(one)}",
            f"{a(one)}. question: what kind of thing is this? answer: {a(kind)}",
        ]
    )


def naming(rng, things):
    """A few made-up words, each bound to a thing, gone through again and again."""
    n_things = int(rng.integers(2, 6))
    chosen = list(rng.choice(things, n_things, replace=False))
    words = [made_up(rng) for _ in chosen]
    style = rng.integers(4)
    turns = []
    for _ in range(int(rng.integers(2, 6))):
        for i in rng.permutation(n_things):
            turns.append(
                [
                    f"{chosen[i]}: this is {a(words[i])}.",
                    f"{chosen[i]}: {words[i]}.",
                    f"{a(chosen[i])} is called {a(words[i])}.",
                    f"{chosen[i]} {words[i]},",
                ][style]
            )
    return " ".join(turns)


def answers(rng, things):
    """Things, and of each its name, number or kind: the list says which."""
    task = rng.integers(3)
    turns = []
    for _ in range(int(rng.integers(3, 9))):
        thing, number = rng.choice(things), rng.choice(NUMBERS)
        answer = [thing, number, kind_of(thing)][task]
        turns.append(f"{how_many(number, thing)}: {answer}.")
    return " ".join(turns)


def again(rng, things):
    """Some words, then the same words in the same order."""
    words = [
        str(rng.choice(things)) if rng.random() < 0.5 else made_up(rng)
        for _ in range(int(rng.integers(3, 13)))
    ]
    return " ".join(words * int(rng.integers(2, 5)))


def corpus(n_lines, seed):
    """Yield `n_lines` lines of text; the same ones for the same seed."""
    rng = np.random.default_rng(seed)
    things = named_things()
    makers = [caption, fact, question, naming, answers, again]
    for _ in range(n_lines):
        yield makers[rng.choice(6, p=[0.25, 0.1, 0.2, 0.25, 0.1, 0.1])](rng, things)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for line in corpus(args.lines, args.seed):
        print(line)
