# Written by tools/book/sync.py from book/07b_tasks.ipynb.
# Edit the notebook, not this file.
"""Tasks beyond captions: questions about a picture, and stories of several pictures.

A task is a dict with "picture", "given" (the question), "answer", "task" and "things";
its text for `collate` is the pair (given, answer). A story is a dict with
"pictures" and "texts", as many of them.
"""

__all__ = [
    "KINDS",
    "KIND_OF",
    "PLURALS",
    "NUMBERS",
    "OPPOSITES",
    "TASKS",
    "COUNTED",
    "kind_of",
    "with_article",
    "plural",
    "how_many",
    "made_up",
    "draw_count",
    "make_counts",
    "ask",
    "make_tasks",
    "make_stories",
]

import numpy as np
from PIL import Image, ImageOps

from flamingo_lite.data import SIZE, load_sprites, make_scenes

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
KIND_OF = {t.replace("_", " "): kind for kind in KINDS for t in KINDS[kind].split()}
PLURALS = {
    "cactus": "cacti",
    "dice": "dice",
    "fish": "fish",
    "mouse": "mice",
    "snowman": "snowmen",
}
NUMBERS = ("one", "two", "three", "four")
OPPOSITES = {"to the left of": "to the right of", "above": "below"}
TASKS = ("where", "how many", "is there", "what kind", "what is this")
COUNTED = ("how many", "what is this")  # asked about scenes of `make_counts`


def kind_of(thing):
    """'animal', 'food', … or 'thing' for what is none of them."""
    return KIND_OF.get(thing, "thing")


def with_article(name):
    """'a lemon', 'an owl'."""
    vowel = name[0] in "aeiou" and not name.startswith("unicorn")
    return f"{'an' if vowel else 'a'} {name}"


def plural(name):
    """More than one of it."""
    if name in PLURALS:
        return PLURALS[name]
    if name.endswith("leaf"):
        return name[:-1] + "ves"
    if name.endswith(("s", "x", "sh", "ch", "tomato")):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


def how_many(number, thing):
    """'one lemon', 'two lemons', …"""
    return f"{number} {thing if number == 'one' else plural(thing)}"


def made_up(rng):
    """A word that can be said: 'wug', 'toma', … By lot it may be a name, like 'dog'."""
    consonants, vowels = list("bdfgklmnprstvwz"), list("aeiou")
    word = rng.choice(consonants) + rng.choice(vowels) + rng.choice(consonants)
    if rng.random() < 0.5:
        word += rng.choice(vowels) + rng.choice(["", *consonants])
    return str(word)


def draw_count(rng, drawing, number):
    """Put `number` copies of a drawing on one canvas, each in a quarter of its own.

    Args:
        rng: numpy Generator; decides sizes, places and the background.
        drawing: an RGBA picture.
        number: 1 to 4.

    Returns:
        RGB picture, SIZE x SIZE.
    """
    background = tuple(int(c) for c in rng.integers(200, 256, 3))
    canvas, half = Image.new("RGB", (SIZE, SIZE), background), SIZE // 2
    for quarter in rng.permutation(4)[:number]:
        size = int(rng.integers(25, 32))
        dx, dy = (int(c) for c in rng.integers(0, half - size + 1, 2))
        small = drawing.resize((size, size), Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            small = ImageOps.mirror(small)
        place = (half * int(quarter % 2) + dx, half * int(quarter // 2) + dy)
        canvas.paste(small, place, small)
    return canvas


def make_counts(rows, n_scenes, seed):
    """Draw one to four of a thing, always the same for the same seed.

    Args:
        rows: caption-folder rows with "thing" and "studio".
        n_scenes: how many.
        seed: an int.

    Returns:
        list of {"picture", "thing", "number", "kind", "studio"}.
    """
    rng, sprites = np.random.default_rng(seed), load_sprites(rows)
    things, scenes = list(sprites), []
    for _ in range(n_scenes):
        thing = str(rng.choice(things))
        studio = str(rng.choice(list(sprites[thing])))
        number = int(rng.integers(4))
        picture = draw_count(rng, sprites[thing][studio], number + 1)
        about = {"thing": thing, "number": NUMBERS[number], "kind": kind_of(thing)}
        scenes.append({"picture": picture, **about, "studio": studio})
    return scenes


def ask(rng, task, scene, things):
    """Ask one question about a scene: (question, answer, of what).

    Args:
        rng: numpy Generator.
        task: one of TASKS.
        scene: from `make_counts` for COUNTED, from `make_scenes` otherwise; "where"
            needs two things in it.
        things: all names, of which "is there" may ask for one that is absent.

    Raises:
        ValueError: an unknown task.
    """
    if task in COUNTED:
        thing = scene["thing"]
        if task == "how many":
            return f"how many {plural(thing)}?", scene["number"], [thing]
        return "what is this?", with_article(thing), [thing]
    shown = scene["things"]
    if task == "where":
        relation = scene["relation"]
        one, other = shown
        if rng.random() < 0.5:
            return f"what is {relation} the {other}?", with_article(one), shown
        opposite = OPPOSITES[relation]
        return f"what is {opposite} the {one}?", with_article(other), shown
    if task == "is there":
        # "umbrella" is in "beach umbrella": who sees the one sees the other.
        absent = [t for t in things if not any(t in name for name in shown)]
        there = rng.random() < 0.5
        thing = str(rng.choice(shown if there else absent))
        return f"is there {with_article(thing)}?", "yes" if there else "no", shown
    if task == "what kind":
        kind = with_article(kind_of(shown[0]))
        return "what kind of thing is this?", kind, shown
    raise ValueError(f"no task {task!r}; there are {', '.join(TASKS)}")


def make_tasks(rows, n_tasks, seed, task, held_out=False):
    """Draw scenes and ask a question about each.

    Args:
        rows: caption-folder rows with "thing", "studio" and "text".
        n_tasks: how many.
        seed: an int; the same tasks for the same seed.
        task: one of TASKS.
        held_out: True, only pairs kept for testing; False, only the others.

    Returns:
        list of {"picture", "given", "answer", "task", "things", "scene"}.

    Raises:
        ValueError: an unknown task, or there is no pair to draw.
    """
    rng = np.random.default_rng((seed, 1))
    things = sorted({row["thing"] for row in rows})
    if task in COUNTED:
        scenes = make_counts(rows, n_tasks, seed)
    else:
        pairs = {"where": 1.0, "is there": 0.5}.get(task, 0.0)
        scenes = make_scenes(rows, n_tasks, seed, pairs, held_out)
    tasks = []
    for scene in scenes:
        question, answer, shown = ask(rng, task, scene, things)
        given = f"question: {question} answer:"
        about = {"task": task, "things": shown, "scene": scene}
        about["picture"] = scene["picture"]
        tasks.append({"given": given, "answer": answer, **about})
    return tasks


def make_stories(rows, n_stories, seed, held_out=False):
    """Tell stories of two to four pictures, each text about its own picture.

    Args: as `make_tasks`.

    Returns:
        list of {"pictures", "texts", "scenes"}: each text is a pair, (given, answer).
    """
    rng = np.random.default_rng((seed, 2))
    lengths = rng.integers(2, 5, n_stories).tolist()
    scenes = make_scenes(rows, sum(lengths), seed, 0.5, held_out)
    stories = []
    for length in lengths:
        mine, scenes = scenes[:length], scenes[length:]
        opening = ["first,", *["then,"] * (length - 2), "at last,"]
        texts = [(word, s["text"]) for word, s in zip(opening, mine, strict=True)]
        pictures = [scene["picture"] for scene in mine]
        stories.append({"pictures": pictures, "texts": texts, "scenes": mine})
    return stories
