"""Questions and stories: their answers are read off the pictures, pixel by pixel.

Each thing here is a disc of a colour of its own, so a test can see what a picture shows
without asking the code that drew it.
"""

import json
import re
from collections import Counter, deque

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from flamingo_lite import (
    KIND_OF,
    KINDS,
    NUMBERS,
    TASKS,
    ask,
    draw_count,
    how_many,
    interleave,
    is_held_out,
    kind_of,
    made_up,
    make_counts,
    make_stories,
    make_tasks,
    plural,
    with_article,
)

quick = settings(deadline=None, derandomize=True, max_examples=40)
THINGS = {  # name: (colour, with its article, several, kind with its article)
    "lemon": ((250, 210, 0), "a lemon", "lemons", "a food"),
    "owl": ((120, 70, 20), "an owl", "owls", "an animal"),
    "cactus": ((0, 120, 40), "a cactus", "cacti", "a plant"),
    "maple leaf": ((200, 60, 0), "a maple leaf", "maple leaves", "a plant"),
    "strawberry": ((220, 0, 60), "a strawberry", "strawberries", "a food"),
    "fox": ((255, 130, 0), "a fox", "foxes", "an animal"),
    "fish": ((0, 90, 200), "a fish", "fish", "an animal"),
    "bus": ((90, 0, 160), "a bus", "buses", "a vehicle"),
    "key": ((90, 90, 90), "a key", "keys", "a thing"),
    "tomato": ((160, 0, 0), "a tomato", "tomatoes", "a food"),
    "wine glass": ((0, 160, 160), "a wine glass", "wine glasses", "a drink"),
    "umbrella": ((20, 20, 60), "an umbrella", "umbrellas", "a thing"),
}
CODES = {r * 2**16 + g * 2**8 + b: t for t, ((r, g, b), *_) in THINGS.items()}
NAME_OF = {words: name for name, (_, *forms, _) in THINGS.items() for words in forms}


def disc(colour, margin):
    """An RGBA disc on nothing, with a transparent margin around it."""
    drawing = Image.new("RGBA", (60, 60))
    box = (margin, margin, 59 - margin, 59 - margin)
    ImageDraw.Draw(drawing).ellipse(box, fill=(*colour, 255))
    return drawing


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A caption folder's rows: twelve things by two studios."""
    folder, rows = tmp_path_factory.mktemp("drawings"), []
    for studio, margin in (("wide", 2), ("slim", 8)):
        for thing, (colour, text, _, _) in THINGS.items():
            path = folder / f"{studio} {thing}.png"
            disc(colour, margin).save(path)
            about = {"thing": thing, "studio": studio, "text": text}
            rows.append({**about, "path": path})
    return rows


# ------------------------------------------------------------------- reading pictures


def components(mask):
    """How many separate patches a (H, W) mask has, also diagonally: a flood fill."""
    left, n_patches = set(zip(*mask.nonzero(), strict=True)), 0
    while left:
        n_patches += 1
        waiting = deque([left.pop()])
        while waiting:
            y, x = waiting.popleft()
            around = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= around
            waiting.extend(around)
    return n_patches


def see(picture):
    """What a picture shows: {thing: (H, W) mask of its colour}."""
    codes = np.asarray(picture) @ (2**16, 2**8, 1)  # (H, W)
    return {CODES[n]: codes == n for n in np.unique(codes).tolist() if n in CODES}


def relations_of(seen, one, other):
    """Every relation word that is true of two things that were seen."""
    y, x = np.subtract(*(np.mean(seen[t].nonzero(), axis=1) for t in (one, other)))
    across = "to the left of" if x < 0 else "to the right of"
    return {across, "above" if y < 0 else "below"}


def check_caption(text, seen):
    """A caption, "an owl" or "an owl above a bus", says what was seen."""
    first, relation, second = re.fullmatch(
        "(.+?)(?: (to the left of|above) (.+))?", text
    ).groups()
    if relation is None:
        assert set(seen) == {NAME_OF[first]}
    else:
        one, other = NAME_OF[first], NAME_OF[second]
        assert set(seen) == {one, other}
        assert relation in relations_of(seen, one, other)


# ------------------------------------------------------------------------------ words


@pytest.fixture(scope="module")
def emoji():
    """What data/emoji lists, without a look at its pictures."""
    lines = (ROOT / "data" / "emoji" / "metadata.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_articles_are_those_of_the_captions(emoji):
    for row in emoji:
        assert with_article(row["thing"]) == row["text"]


def test_words(emoji):
    for thing, (_, article, several, kind) in THINGS.items():
        assert with_article(thing) == article and plural(thing) == several
        assert with_article(kind_of(thing)) == kind
        assert how_many("one", thing) == f"one {thing}"
        assert how_many("three", thing) == f"three {several}"


IRREGULAR = {"snowman": "snowmen", "mouse": "mice", "cactus": "cacti", "dice": "dice"}


def test_plurals_of_the_named_things(emoji):
    """No two are the same, so a question says what is to be counted."""
    named = {row["thing"] for row in emoji if row["named"]}
    assert len({plural(thing) for thing in named}) == len(named)
    assert set(IRREGULAR) <= named


@pytest.mark.parametrize("thing", IRREGULAR)
def test_plurals_that_are_not_regular(thing):
    assert plural(thing) == IRREGULAR[thing]


def test_every_thing_in_the_table_of_kinds_is_drawn_and_has_one_kind(emoji):
    named = {row["thing"] for row in emoji if row["named"]}
    assert set(KIND_OF) <= named
    assert len(KIND_OF) == sum(len(things.split()) for things in KINDS.values())
    assert set(KIND_OF.values()) == set(KINDS) and "thing" not in KINDS


@given(st.integers(0, 2**32))
@quick
def test_made_up_words_can_be_said(seed):
    word = made_up(np.random.default_rng(seed))
    assert type(word) is str
    assert re.fullmatch("([b-df-hj-np-tv-z][aeiou]){1,2}[b-df-hj-np-tv-z]?", word)
    assert with_article(word) == f"a {word}"


def test_made_up_words_are_many():
    rng = np.random.default_rng(0)
    words = Counter(made_up(rng) for _ in range(1000))
    assert len(words) > 600 and {len(word) for word in words} == {3, 4, 5}


# --------------------------------------------------------------------------- counting


def blank_quarters(picture, background):
    """How many quarters of a picture show nothing."""
    pixels = np.asarray(picture)
    halves = slice(0, 32), slice(32, 64)
    return sum(
        (pixels[rows, columns] == background).all()
        for rows in halves
        for columns in halves
    )


@given(st.integers(0, 2**32), st.integers(1, 4))
@quick
def test_draw_count_draws_so_many_separate_copies(seed, number):
    """Patches that differ from the background are counted, and quarters with one."""
    background = np.random.default_rng(seed).integers(200, 256, 3)
    for drawing in (disc((0, 0, 0), 4), Image.new("RGBA", (60, 60), "black")):
        picture = draw_count(np.random.default_rng(seed), drawing, number)
        assert picture.size == (64, 64) and picture.mode == "RGB"
        assert blank_quarters(picture, background) == 4 - number
        dark = (np.asarray(picture) == 0).all(axis=2)
        if drawing.getpixel((0, 0))[3] == 0:  # a square may touch its neighbour
            assert components(dark) == number
            patches = (np.asarray(picture) != background).any(axis=2)
            assert components(patches) == number
        else:
            assert number * 25**2 <= dark.sum() <= number * 31**2


def test_draw_count_uses_every_quarter_and_mirrors():
    """A drawing that is black on the left and red on the right, one copy at a time."""
    drawing = Image.new("RGBA", (60, 60), "black")
    drawing.paste((255, 0, 0, 255), (30, 0, 60, 60))
    rng, found = np.random.default_rng(0), Counter()
    for _ in range(200):
        pixels = np.asarray(draw_count(rng, drawing, 1))
        black, red = (
            (pixels == colour).all(axis=2).nonzero()
            for colour in ((0, 0, 0), (255, 0, 0))
        )
        quarter = bool(black[0].mean() > 32), bool(black[1].mean() > 32)
        found[quarter, bool(black[1].mean() < red[1].mean())] += 1
    assert len(found) == 8 and min(found.values()) >= 10


def test_make_counts_says_what_it_shows(rows):
    scenes = make_counts(rows, 60, seed=1)
    assert len(scenes) == 60
    for scene in scenes:
        ((thing, mask),) = see(scene["picture"]).items()
        assert scene["thing"] == thing
        assert scene["number"] == NUMBERS[components(mask) - 1]
        assert with_article(scene["kind"]) == THINGS[thing][3]
        assert scene["studio"] in ("wide", "slim")
    assert {scene["thing"] for scene in scenes} == set(THINGS)


def test_make_counts_shows_each_number_equally_often(rows):
    """For each studio too: what else is known says nothing about the number."""
    scenes = make_counts(rows, 800, seed=3)
    counts = Counter(scene["number"] for scene in scenes)
    assert set(counts) == set(NUMBERS)
    assert all(160 <= n <= 240 for n in counts.values())  # 200 +- 3 deviations
    studios = Counter((scene["studio"], scene["number"]) for scene in scenes)
    assert all(65 <= n <= 135 for n in studios.values()) and len(studios) == 8


# ---------------------------------------------------------------------------- answers


def read_answer(task, question, picture):
    """The right answer to a question, from the words and the pixels alone."""
    seen = see(picture)
    if task == "how many":
        thing = NAME_OF[re.fullmatch(r"how many (.+)\?", question)[1]]
        return NUMBERS[components(seen[thing]) - 1]
    if task == "is there":
        thing = NAME_OF[re.fullmatch(r"is there (an? .+)\?", question)[1]]
        return "yes" if thing in seen else "no"
    if task == "where":
        relation, named = re.fullmatch(
            "what is (to the left of|to the right of|above|below) the (.+)\\?", question
        ).groups()
        (other,) = set(seen) - {named}
        assert relation in relations_of(seen, other, named)
        return THINGS[other][1]
    (thing,) = seen
    if task == "what is this":
        assert question == "what is this?"
        return THINGS[thing][1]
    assert question == "what kind of thing is this?"
    return THINGS[thing][3]


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_what_the_picture_shows(rows, task):
    for one in make_tasks(rows, 100, 0, task):
        question = re.fullmatch("question: (.+) answer:", one["given"])[1]
        assert one["answer"] == read_answer(task, question, one["picture"])
        assert set(one["things"]) == set(see(one["picture"])) and one["task"] == task
        assert interleave([(one["given"], one["answer"])]) == (
            f"<image>question: {question} answer: {one['answer']}<|endofchunk|>"
        )


def test_every_answer_takes_its_turn(rows):
    """Yes and no, each number, each relation: none is said more often than another."""
    asked = {task: make_tasks(rows, 400, 5, task) for task in TASKS}
    yes = [one["answer"] == "yes" for one in asked["is there"]]
    assert 170 <= sum(yes) <= 230  # 200 +- 3 deviations
    for n_things in (1, 2):
        some = [
            right
            for right, one in zip(yes, asked["is there"], strict=True)
            if len(one["things"]) == n_things
        ]
        assert 130 < len(some) < 270 and 0.37 < np.mean(some) < 0.63
    numbers = Counter(one["answer"] for one in asked["how many"])
    assert all(70 <= numbers[number] <= 130 for number in NUMBERS)
    pattern = "to the left of|to the right of|above|below"
    relations = Counter(re.search(pattern, one["given"])[0] for one in asked["where"])
    assert len(relations) == 4 and all(70 <= n <= 130 for n in relations.values())
    names = Counter(one["answer"] for one in asked["what is this"])
    assert set(names) == {name for _, name, *_ in THINGS.values()}
    assert min(names.values()) >= 15  # 33 - 3 deviations
    kinds = {one["answer"] for one in asked["what kind"]}
    assert kinds == {kind for *_, kind in THINGS.values()}


def test_absent_things_are_all_asked_for(rows):
    """And about those that are there, both of a pair."""
    asked = make_tasks(rows, 600, 6, "is there")
    things = Counter((one["given"].split("? ")[0], one["answer"]) for one in asked)
    for _, text, *_ in THINGS.values():
        for answer in ("yes", "no"):
            assert things[f"question: is there {text}", answer] >= 8
    pairs = [one for one in asked if len(one["things"]) == 2 and one["answer"] == "yes"]
    first = [with_article(one["things"][0]) in one["given"] for one in pairs]
    assert 0.35 < np.mean(first) < 0.65


def test_nobody_asks_for_a_part_of_a_shown_name():
    """Is there an umbrella, over a beach umbrella? Who can say."""
    rng, things = np.random.default_rng(0), ["beach umbrella", "fox", "umbrella"]
    scene = {"things": ["beach umbrella"], "relation": None}
    asked = Counter(ask(rng, "is there", scene, things)[0] for _ in range(200))
    assert set(asked) == {"is there a beach umbrella?", "is there a fox?"}


def as_bytes(tasks):
    """All of some tasks, to be compared."""
    return [{**one, "picture": one["picture"].tobytes()} for one in tasks]


@pytest.mark.parametrize("task", TASKS)
def test_tasks_are_the_same_for_everyone(rows, task):
    once = as_bytes(make_tasks(rows, 20, 3, task))
    assert once == as_bytes(make_tasks(rows, 20, 3, task))
    assert once != as_bytes(make_tasks(rows, 20, 4, task))
    np.random.seed(1)  # nor does anything else decide
    assert once == as_bytes(make_tasks(rows, 20, 3, task))


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("task", ["where", "is there"])
def test_tasks_keep_to_their_split(rows, task, held_out):
    """Read off the pictures."""
    tasks = make_tasks(rows, 100, 7, task, held_out)
    pairs = [seen for one in tasks if len(seen := see(one["picture"])) == 2]
    assert len(pairs) == 100 if task == "where" else 25 < len(pairs) < 75
    assert all(is_held_out(*pair) == held_out for pair in pairs)


def test_where_needs_a_pair(rows):
    alone = [row for row in rows if row["thing"] == "owl"]
    with pytest.raises(ValueError, match="1 things, and no pair"):
        make_tasks(alone, 3, 0, "where")
    assert len(make_tasks(alone, 3, 0, "what kind")) == 3


def test_the_same_picture_can_be_asked_for_its_name_or_its_number(rows):
    """So that the question, not the picture, says what is wanted."""
    names, numbers = (
        make_tasks(rows, 40, 9, task) for task in ("what is this", "how many")
    )
    for one, other in zip(names, numbers, strict=True):
        assert one["picture"].tobytes() == other["picture"].tobytes()
        assert one["things"] == other["things"] and one["given"] != other["given"]
    assert len({components(*see(one["picture"]).values()) for one in names}) == 4


@pytest.mark.parametrize("task", ["colour", "", None, "Where"])
def test_an_unknown_task_is_refused(rows, task):
    for try_it in (
        lambda: make_tasks(rows, 2, 0, task),
        lambda: ask(np.random.default_rng(0), task, {"things": ["owl"]}, ["owl"]),
    ):
        with pytest.raises(ValueError, match=f"{task!r}.*where, how many") as caught:
            try_it()
        assert all(known in str(caught.value) for known in TASKS)


# ---------------------------------------------------------------------------- stories


def test_stories_tell_their_pictures_in_order(rows):
    stories = make_stories(rows, 40, seed=0)
    assert len(stories) == 40
    assert {len(story["texts"]) for story in stories} == {2, 3, 4}
    for story in stories:
        length = len(story["texts"])
        assert len(story["pictures"]) == len(story["scenes"]) == length
        opening = [word for word, _ in story["texts"]]
        assert opening == ["first,", *["then,"] * (length - 2), "at last,"]
        for picture, (_, text) in zip(story["pictures"], story["texts"], strict=True):
            check_caption(text, see(picture))
        text = interleave(story["texts"])
        assert text.startswith("<image>first, ") and text.count("<image>") == length
        assert text.split("<image>")[-1].startswith("at last, ")


def test_no_picture_is_told_twice(rows):
    pictures = [p for story in make_stories(rows, 40, 1) for p in story["pictures"]]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_stories_are_the_same_for_everyone(rows):
    def told(seed):
        return [
            ([picture.tobytes() for picture in story["pictures"]], story["texts"])
            for story in make_stories(rows, 15, seed)
        ]

    assert told(3) == told(3) != told(4)


@pytest.mark.parametrize("held_out", [False, True])
def test_stories_keep_to_their_split(rows, held_out):
    stories = make_stories(rows, 30, 2, held_out)
    seen = [see(picture) for story in stories for picture in story["pictures"]]
    pairs = [things for things in seen if len(things) == 2]
    assert 0.3 < len(pairs) / len(seen) < 0.7
    assert all(is_held_out(*pair) == held_out for pair in pairs)


def test_no_stories(rows):
    assert make_stories(rows, 0, 0) == []
