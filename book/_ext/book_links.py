"""Sphinx glue of this book: what is mentioned is linked.

A chapter by its number leads to the chapter, an exercise by its number to its question,
a module of the package to its reference, another file to the repository, the first use
of a word to the glossary. While the repository is unset nothing leads to it: a file
that is mentioned is then copied beside the pages, and no chapter shows a link to open
it in Colab.
"""

import re
import shutil
from pathlib import Path

from docutils import nodes

NOT_LINKED = (nodes.reference, nodes.literal, nodes.title, nodes.raw, nodes.strong)
BOOK = Path(__file__).resolve().parents[1]
ROOT = BOOK.parent
FILE = re.compile(r"(?:\w[\w-]*/)*\w[\w.-]*\.(?:py|md|ipynb|json|toml|txt|yml|log|bib)")
CHAPTER = re.compile(r"(?<![\w-])(?:[Cc]hapters?|Appendix|[Aa]ppendices)\s+")
ONE = r"(?:\d{1,2}[a-e]?|[A-E])\b(?!\.\d)"  # A.1.1 is an appendix of some paper
NUMBERS = re.compile(rf"(?:(?:,\s+|\s+and\s+|\s+to\s+)?{ONE})+")
NUMBER = re.compile(r"\d{1,2}[a-e]?|[A-E]")
# Here a word of the glossary means something else, or is part of a name.
OTHER_SENSES = (
    "clip art", "in our heads", "in your head", "and a patch", "into one frame",
    "in pieces, chunks", "label mask", "attention mask", "attention_mask",
    "Three files make a cache", "names in the cache", "from the cache", "in the cache",
    "Frozen, 7 B",
)  # fmt: skip
EXERCISE = re.compile(rf"(?<![\w-])[Ee]xercise\s+(({NUMBER.pattern})\.\d+)\b")


def chapters():
    """{number: page} of all chapters: {"7b": "book/07b_tasks"}."""
    pages = [path.stem for path in BOOK.glob("[0-9A-Z]*_*.ipynb")]
    return {page.split("_")[0].lstrip("0"): f"book/{page}" for page in pages}


def ancestors(node):
    """What a node stands in, from the inside out."""
    while node.parent is not None:
        node = node.parent
        yield node


def running_text(doctree):
    """The text of paragraphs that is no link, no code, no heading and no badge."""
    for text in list(doctree.findall(nodes.Text)):
        above = list(ancestors(text))
        if not any(isinstance(node, nodes.paragraph) for node in above):
            continue
        if any(isinstance(node, NOT_LINKED) for node in above):
            continue
        if not any("export-badge" in node.get("classes", ()) for node in above):
            yield text


def put_links(text, links):
    """Replace pieces of a text by links: {(start, end): link}, in order."""
    if not links:
        return
    pieces, place = [], 0
    for (start, end), link in links.items():
        pieces += [nodes.Text(text[place:start]), link]
        place = end
    pieces.append(nodes.Text(text[place:]))
    text.parent.replace(text, [piece for piece in pieces if piece.astext()])


def repository(app):
    """Where the repository's files are shown; "" while that is unset."""
    options = app.config.html_theme_options
    address = options.get("repository_url", "")
    if not address or "/OWNER/" in address:
        return ""
    return f"{address}/blob/{options.get('repository_branch', 'main')}"


def no_dead_links(app, doctree):
    """While the repository is unset, no chapter shows a link to open it in Colab."""
    if repository(app):
        return
    for link in list(doctree.findall(nodes.reference)):
        if "/OWNER/" in link.get("refuri", ""):
            whole = link.parent
            if len(whole.children) == 1 and isinstance(whole, nodes.paragraph):
                whole.parent.remove(whole)
            else:
                whole.replace(link, link.children)


def link_chapters(app, doctree, docname):
    """`chapter 7`, `chapters 5b, 7b and 8b`, `Appendix A` lead there."""
    if app.builder.format != "html":
        return
    pages = chapters()
    for text in running_text(doctree):
        links = {}
        for word in CHAPTER.finditer(text):
            numbers = NUMBERS.match(text, word.end())
            for one in NUMBER.finditer(text, *numbers.span()) if numbers else ():
                page = pages.get(one[0])
                if page is None or page == docname:
                    continue
                first = one.start() == word.end()  # the word belongs to the link
                place = (word.start() if first else one.start(), one.end())
                address = app.builder.get_relative_uri(docname, page)
                says = text[slice(*place)]
                links[place] = nodes.reference("", says, refuri=address, internal=True)
        put_links(text, links)


def place_of_exercise(number):
    """The anchor of an exercise: "3.1" is at #exercise-3-1."""
    return f"exercise-{number.replace('.', '-')}"


def link_exercises(app, doctree, docname):
    """`exercise 3.1` leads to its question, a number on the page of all of them too."""
    if app.builder.format != "html":
        return
    for link in doctree.findall(nodes.reference):
        page, _, anchor = link.get("refuri", "").partition("#")
        if docname == "book/exercises" and anchor == "exercises":
            link["refuri"] = f"{page}#{place_of_exercise(link.astext())}"
    pages = chapters()
    for text in running_text(doctree):
        links = {}
        for match in EXERCISE.finditer(text):
            if match[2] in pages:
                page = app.builder.get_relative_uri(docname, pages[match[2]])
                to = f"{page}#{place_of_exercise(match[1])}"
                link = nodes.reference("", match[0], refuri=to, internal=True)
                links[match.span()] = link
        put_links(text, links)


def file_meant(name):
    """The path, from the repository's root, of a file that is mentioned; or None.

    A module of the package may be called by its name alone: `data.py`.
    """
    if not FILE.fullmatch(name):
        return None
    for path in (name, f"flamingo_lite/{name}"):
        if (ROOT / path).is_file():
            return path
    return None


def link_files(app, doctree, docname):
    """The name of a file of this repository, set as code, leads to the file."""
    if app.builder.format != "html":
        return
    modules = app.env.get_domain("py").modules
    for code in list(doctree.findall(nodes.literal)):
        path = file_meant(code.astext())
        linked = any(
            isinstance(n, nodes.reference | nodes.title) for n in ancestors(code)
        )
        if path is None or linked:
            continue
        module = modules.get(path.removesuffix(".py").replace("/", "."))
        if path.endswith(".ipynb"):
            address = app.builder.get_relative_uri(docname, path.removesuffix(".ipynb"))
        elif module is not None:
            address = app.builder.get_relative_uri(docname, module.docname)
            address += f"#{module.node_id}"
        elif repository(app):
            address = f"{repository(app)}/{path}"
        else:
            copy = Path(app.outdir) / "_sources" / f"{path}.txt"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, copy)
            address = "../" * docname.count("/") + f"_sources/{path}.txt"
        link = nodes.reference("", "", refuri=address, internal=True)
        code.replace_self(link)
        link += code


def glossary_words(app):
    """{word: (page, anchor)} of the glossary, plurals too, the longest first."""
    terms = app.env.get_domain("std").objects.items()
    words = {}
    for (kind, word), (page, anchor) in terms:
        if kind == "term":
            words |= {word: (page, anchor), f"{word}s": (page, anchor)}
    return dict(sorted(words.items(), key=lambda item: -len(item[0])))


def link_terms(app, doctree, docname):
    """In a chapter, the first use of each word of the glossary leads there."""
    words = glossary_words(app)
    if app.builder.format != "html" or docname not in chapters().values() or not words:
        return
    by_letters = {word.lower(): target for word, target in words.items()}
    any_word = "|".join(map(re.escape, words))
    skipped = "|".join(re.escape(said).replace(r"\ ", r"\s+") for said in OTHER_SENSES)
    pattern = re.compile(rf"(?<![\w-])(?:{skipped}|({any_word}))(?![\w-])", re.I)
    done = set()
    for text in running_text(doctree):
        links = {}
        for match in pattern.finditer(text):
            if match[1] is None:
                continue
            page, anchor = by_letters[match[0].lower()]
            if anchor in done:
                continue
            done.add(anchor)
            address = app.builder.get_relative_uri(docname, page) + f"#{anchor}"
            link = nodes.reference("", match[0], refuri=address, internal=True)
            link["classes"].append("term-link")
            links[match.span()] = link
        put_links(text, links)


def setup(app):
    """Called by flamingo_book.py."""
    app.connect("doctree-read", no_dead_links)
    app.connect("doctree-resolved", link_chapters)
    app.connect("doctree-resolved", link_exercises)
    app.connect("doctree-resolved", link_files)
    app.connect("doctree-resolved", link_terms)
