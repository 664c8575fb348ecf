"""The pages that are made from the notebooks: exercises, API reference, times.

`tools/book/sync.py` writes them, and says when they are out of step.
"""

import re

EXERCISE = re.compile(
    r"> \*\*Exercise (?P<number>\w+\.\d+)\*\* (?P<dots>[●○]{3}) · "
    r"(?:(?P<kind>[^·\n]+?) · )?(?P<minutes>\d+) min\. (?P<text>.*(?:\n>.*)*)"
)
COVER = {
    "Twemoji": "Twemoji",
    "OpenMoji": "OpenMoji",
    "unseen clip art": "clip art",
    "held-out pairs": "pairs",
}
SCORES = re.compile(
    r"^(trained studios|Twemoji|OpenMoji|held-out pairs) +"
    r"(?:true )?(\d\.\d\d) +(?:shuffled )?(\d\.\d\d)\b",
    re.M,
)
BUILDS = re.compile(r"You build:\s+(.*?)\s+·", re.S)
TIME = re.compile(r"\bTime:\s+(\d+) min")
KINDS = {
    "predict": "Say what will come out, then let the cell tell you.",
    "build": "Write a function that the asserts accept.",
    "break and mend": "A real mistake: see what it does, and put it right.",
    "explore": "Change something and find out.",
}
LEVELS = {"●○○": "short", "●●○": "takes some thought", "●●●": "takes more"}
EXERCISES_HEAD = """\
# Exercises

All exercises of the book, {count} of them, {hours} in all. Each stands at the end of
its chapter, with a hint and a solution that you unfold when you want to; the asserts in
the solutions run whenever the notebook does. ●○○ is short, ●●○ takes some thought, ●●●
takes more. By kind, below, the shortest come first.

A way to work: open the chapter in Jupyter or Colab, write your answer into the cell
below the question, and run it; first run what stands above it, which it uses. Where
you are asked to predict, write your guess down first. Ten minutes, and something to
predict?
[1.1](01_clip_features.ipynb#exercises) or [3.3](03_cross_attention.ipynb#exercises). An
evening? Those of chapters 3 and 6, where the ideas are, and then those that say *break
and mend*.

"""
API_HEAD = """\
# API reference

What `from flamingo_lite import …` gives you, module by module, from the docstrings. A
chapter writes each module and explains every line of it; its link stands below the
module's name. Shapes use the letters of [Axes and tensors](notation.md).

```python
from flamingo_lite import caption, load_flamingo

model, image_processor, tokenizer = load_flamingo("tiny")
```

"""


def title_of(notebook):
    """A notebook's first heading, without its mark."""
    return notebook.cells[0].source.splitlines()[0].lstrip("# ")


def minutes_of(notebook):
    """The reading time that a chapter states in its first cell; None if it does not."""
    found = TIME.search(notebook.cells[0].source)
    return int(found[1]) if found else None


def reading_minutes(notebook):
    """How long a chapter takes to read, without its exercises, in steps of 5 minutes.

    200 words and 20 lines of code a minute, and three figures; solutions, hints and the
    setup cell are not counted.
    """
    words = lines = figures = 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"<details>.*?</details>", "", cell.source, flags=re.S)
            text = re.sub(r"\]\([^)]*\)", "", EXERCISE.sub("", text))
            words += len(re.findall(r"\w[\w'’-]*", text))
            figures += text.count("![")
        elif not {"setup", "hide-cell"} & set(cell.metadata.get("tags", ())):
            lines += sum(bool(line.strip()) for line in cell.source.splitlines())
            outputs = (output.get("data", {}) for output in cell.outputs)
            figures += sum("image/png" in data for data in outputs)
    return max(5, 5 * round((words / 200 + lines / 20 + figures / 3) / 5))


def stamp_reading(first, notebook):
    """A chapter's first cell with its reading time in it."""
    return TIME.sub(
        lambda found: found[0].replace(found[1], str(reading_minutes(notebook))), first
    )


def hours(minutes):
    """Minutes in words: "45 minutes", "7½ hours"."""
    if minutes < 90:
        return f"{minutes} minutes"
    halves = round(minutes / 30)
    return f"{halves // 2}{'½' * (halves % 2)} hours"


def kind_of(text, cells):
    """What an exercise asks for, told by its words and the cells below it."""
    stub = "\n".join(cells)
    if re.search(r"\b(repair|mend|swap|undo|leave .* out of|gets? lost)\b", text, re.I):
        return "break and mend"
    if re.search(r"\bwrite\b", text, re.I) or re.search(r"^\s*def ", stub, re.M):
        return "build"
    return "predict" if re.search(r"= None\b", stub) else "explore"


def exercises_of(notebook):
    """A notebook's exercises, in order.

    Returns:
        Dicts with number ("3.1"), dots, minutes, text, kind. Where a question does not
        name its kind, the cell below it tells.
    """
    found = []
    for place, cell in enumerate(notebook.cells):
        if cell.cell_type != "markdown":
            continue
        stub = []
        for below in notebook.cells[place + 1 :]:
            if below.cell_type == "markdown" or "Solution" in below.source[:20]:
                break
            stub.append(below.source)
        for match in EXERCISE.finditer(cell.source):
            text = re.sub(r"\s*\n>\s?", " ", match["text"]).strip()
            kind = match["kind"] or kind_of(text, stub)
            found.append({**match.groupdict(), "text": text, "kind": kind})
    return found


def exercises_page(notebooks):
    """The page of all exercises.

    Args:
        notebooks: {file name: notebook}, in the book's order.
    """
    all_of_them, body = [], "## By chapter\n\n"
    for name, notebook in notebooks.items():
        mine = exercises_of(notebook)
        for exercise in mine:
            exercise["link"] = f"[{exercise['number']}]({name}#exercises)"
        if not mine:
            continue
        body += f"### {title_of(notebook)}\n\n"
        body += "".join(
            f"- **{e['link']}** {e['dots']} · {e['kind']} · {e['minutes']} min. "
            f"{e['text']}\n"
            for e in mine
        )
        body += "\n"
        all_of_them += mine
    body += "## By kind\n\n"
    named = dict.fromkeys([*KINDS, *(e["kind"] for e in all_of_them)])
    for kind in named:
        mine = sorted(
            (e for e in all_of_them if e["kind"] == kind),
            key=lambda e: int(e["minutes"]),
        )
        if mine:
            says = f" {KINDS[kind]}" if kind in KINDS else ""
            links = [f"{e['link']} ({e['minutes']} min)" for e in mine]
            body += f"**{kind}**.{says} {' · '.join(links)}\n\n"
    body += "## By difficulty\n\n"
    for dots, says in LEVELS.items():
        mine = [e["link"] for e in all_of_them if e["dots"] == dots]
        if mine:
            body += f"**{dots}** {says}: {' · '.join(mine)}\n\n"
    total = sum(int(e["minutes"]) for e in all_of_them)
    head = EXERCISES_HEAD.format(count=len(all_of_them), hours=hours(total))
    return head + body.rstrip() + "\n"


def api_page(modules):
    """The page of all modules.

    Args:
        modules: (module, the notebook's file name, the chapter's title) of each.
    """
    page = API_HEAD
    for module, name, title in modules:
        page += f"## {module}\n\nWritten by [{title}]({name}).\n\n"
        page += f"```{{eval-rst}}\n.. automodule:: flamingo_lite.{module}\n```\n\n"
    return page.rstrip() + "\n"


def stamp_rows(page, notebooks):
    """A page on which the rows of tables that link notebooks end with their times."""
    times = {name: minutes_of(notebook) for name, notebook in notebooks.items()}

    def row(match):
        links = re.findall(r"[(/](\w+\.ipynb)\)", match[0])
        known = [times[name] for name in links if times.get(name)]
        return f"{match[1]} {' + '.join(map(str, known)) or '–'} min |"

    return re.sub(r"^(\|.*\.ipynb\).*\|)[^|\n]*\|$", row, page, flags=re.M)


def stamp_times(page, notebooks):
    """Write into the landing page how long each chapter takes, and all of them.

    A notebook without a row in the map gets one below that of the notebook before.
    `take about <b>…</b>` is the sum.
    """
    before = None
    for name, notebook in notebooks.items():
        if before and f"]({name})" not in page:
            builds = BUILDS.search(notebook.cells[0].source)
            builds = " ".join(builds[1].split()) if builds else ""
            row = f"| [{title_of(notebook)}]({name}) | {builds} |  |  |\n"
            above = re.compile(rf"^\|.*\]\({re.escape(before)}\).*\n", re.M)
            page = above.sub(lambda found, row=row: found[0] + row, page, count=1)
        before = name
    page = stamp_rows(page, notebooks)
    total = sum(minutes_of(notebook) or 0 for notebook in notebooks.values())
    return re.sub(r"take about <b>[^<]*</b>", f"take about <b>{hours(total)}</b>", page)


def stamp_scores(page, notebook):
    """Write into the landing page the losses that chapter 9's own run ended with.

    They are read from the notebook's stored output, which `nbval` and `make book`
    compute anew.
    """
    outputs = (o for c in notebook.cells for o in c.get("outputs", ()))
    found = {}
    for output in outputs:
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        for name, true, other in SCORES.findall(text):
            found.setdefault(name, f"{true} and {other}")
    says = "; ".join(f"{name} {pair}" for name, pair in found.items())
    what = "The loss of that page's model with the right picture and another"
    says = f"{what}: {says}." * bool(found)
    return re.sub(
        r"<!-- scores -->.*?<!-- /scores -->",
        lambda _: f"<!-- scores -->{says}<!-- /scores -->",
        page,
    )


def stamp_cover(page, numbers):
    """Write into the landing page how many captions of its picture are right.

    Args:
        page: the text.
        numbers: from cover.json, which make_cover.py writes with the picture.
    """
    tests = numbers["tests"]
    pictures = sum(test["pictures"] for test in tests.values())
    right = sum(test["right"] for test in tests.values())
    each = ", ".join(
        f"{tests[name]['right']} of {tests[name]['pictures']} {says}"
        for name, says in COVER.items()
    )
    other = numbers["exchanged"]
    says = (
        f"word for word right are {right} of the {pictures}: {each}. "
        f"With one thing exchanged in each of the {other['pictures']}, "
        f"{other['right']} are right, "
        f"and {other['as before']} say what they said before."
    )
    return re.sub(
        r"<!-- cover -->.*?<!-- /cover -->",
        lambda _: f"<!-- cover -->{says}<!-- /cover -->",
        page,
    )
