#!/usr/bin/env python3
"""The text that the tiny language model learns from. It holds no pictures, only words.

Five kinds of line, drawn at random with a fixed seed: captions, facts about kinds,
questions that the line itself answers, lists that name things again and again, and
made-up words bound to things. `python tools/tiny_text.py --lines 20` prints some.
"""

import argparse
import json
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parents[1] / "data"

KINDS = {
    "animal": """bear chick cow crocodile dog dolphin elephant frog horse koala ladybug
        octopus panda penguin pig rabbit snail snake spider tiger turtle whale bee cat
        mouse monkey fish flamingo butterfly owl fox lion parrot shark""",
    "plant": """cactus palm_tree sunflower tulip rose mushroom maple_leaf christmas_tree
        clover""",
    "food": """banana birthday_cake chocolate_bar cookie doughnut eggplant hamburger
        lemon lollipop peach pear pineapple pizza red_apple green_apple strawberry
        tomato watermelon ice_cream corn_cob pumpkin""",
    "drink": "wine_glass beer_mug hot_drink",
    "vehicle": "airplane ambulance bus bicycle sailboat rocket tractor helicopter",
    "instrument": "guitar violin trumpet bell",
    "garment": "crown top_hat shirt dress backpack",
}
NUMBERS = "two three four".split()
RELATIONS = ("to the left of", "above")
OPPOSITES = {"to the left of": "to the right of", "above": "below"}


def named_things():
    """The names that captions use, from data/emoji/metadata.jsonl, in order."""
    lines = (DATA / "emoji" / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return list(dict.fromkeys(row["thing"] for row in rows if row["named"]))


def kind_of(thing):
    """'animal', 'food', … or 'thing' for what is none of them."""
    for kind, names in KINDS.items():
        if thing.replace(" ", "_") in names.split():
            return kind
    return "thing"


def a(name):
    """The name with its article."""
    vowel = name[0] in "aeiou" and not name.startswith("unicorn")
    return f"{'an' if vowel else 'a'} {name}"


def plural(name):
    """More than one of it."""
    odd = {"mouse": "mice", "fish": "fish", "cactus": "cacti", "dice": "dice"}
    if name in odd:
        return odd[name]
    if name.endswith(("leaf",)):
        return name[:-1] + "ves"
    if name.endswith(("s", "x", "sh", "ch")):
        return name + "es"
    if name.endswith(("tomato",)):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


def made_up(rng):
    """A word that nobody uses: 'dax', 'wuggo', …"""
    consonants, vowels = list("bdfgklmnprstvwz"), list("aeiou")
    word = rng.choice(consonants) + rng.choice(vowels) + rng.choice(consonants)
    if rng.random() < 0.5:
        word += rng.choice(vowels) + rng.choice(["", *consonants])
    return str(word)


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
    several = f"{number} {plural(thing)}"
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
    """A short list gone through again and again, or made-up words bound to things."""
    n_things = int(rng.integers(2, 6))
    chosen = list(rng.choice(things, n_things, replace=False))
    words = [made_up(rng) for _ in chosen]
    style = rng.integers(4)
    turns = []
    for _ in range(int(rng.integers(2, 5))):
        for i in rng.permutation(n_things):
            turns.append(
                [
                    f"this is {a(words[i])}.",
                    f"{chosen[i]}: this is {a(words[i])}.",
                    f"{a(chosen[i])} is called {a(words[i])}.",
                    f"{chosen[i]}: {kind_of(chosen[i])}.",
                ][style]
            )
    return " ".join(turns)


def corpus(n_lines, seed):
    """Yield `n_lines` lines of text; the same ones for the same seed."""
    rng = np.random.default_rng(seed)
    things = named_things()
    makers = [caption, fact, question, naming]
    for _ in range(n_lines):
        yield makers[rng.choice(4, p=[0.35, 0.1, 0.25, 0.3])](rng, things)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for line in corpus(args.lines, args.seed):
        print(line)
