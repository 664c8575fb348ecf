"""Sphinx glue of this book.

Badges on exported cells, folded set-up, plots and answers, numbered captions, a place
for each exercise, one copy of thebe's script, docstrings as they are written here, the
map with its links, a description of each page, citations in the chapters' style.
"""

import ast
import html
import os
import re
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import book_links
import pybtex.plugin
import sphinxcontrib.bibtex.plugin
from docutils import nodes
from myst_nb.sphinx_ import HideCodeCellNode, depart_HideCellInput
from pybtex.richtext import Text
from pybtex.style.formatting.unsrt import Style as UnsortedStyle
from pybtex.style.labels import BaseLabelStyle
from sphinxcontrib.bibtex.style.referencing import BracketStyle, PersonStyle
from sphinxcontrib.bibtex.style.referencing.author_year import AuthorYearReferenceStyle

DIRECTIVE = re.compile(r"^#\|\s*(default_exp|export)\b[ \t]*(\S*)[ \t]*\n?", re.M)
CHAPTER_NUMBER = re.compile(r"(?:Appendix )?([0-9A-Z]\w*)\. ")
QUESTION = re.compile(r"before\s+you\s+(run|look)\b|guess\b", re.I)
EXERCISE = re.compile(r"Exercise\s+(\w+\.\d+)")
STILL = re.compile(
    r"\]\(https://raw\.githubusercontent\.com/[^)\s]+/book/(images/[^)\s]+)\)"
)
SHORT = 5  # lines; a cell of fewer is not worth folding
BOOK = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BOOK.parent))  # autodoc imports flamingo_lite from here


def badges(app, doctree):
    """Show `#| export` as a badge naming the module; hide `#| default_exp` cells."""
    module = None
    for cell in list(doctree.findall(nodes.container)):
        if cell.get("nb_element") != "cell_code":
            continue
        block = next(cell.findall(nodes.literal_block), None)
        match = DIRECTIVE.match(block.rawsource or block.astext()) if block else None
        if match is None:
            continue
        if match[1] == "default_exp":
            module = match[2]
            cell.parent.remove(cell)
            continue
        code = DIRECTIVE.sub("", block.astext()).lstrip("\n")
        attributes = {key: value for key, value in block.attributes.items() if value}
        block.replace_self(nodes.literal_block(code, code, **attributes))
        cell["classes"].append("exported")
        badge = nodes.paragraph("", classes=["export-badge"])
        badge += [
            nodes.Text("exported to "),
            nodes.literal("", f"flamingo_lite/{match[2] or module}.py"),
        ]
        cell.insert(0, badge)


def is_cell(node):
    """True if this is a code cell with what it printed."""
    return isinstance(node, nodes.container) and node.get("nb_element") == "cell_code"


def part_of(cell, element):
    """A code cell's "cell_code_source" or "cell_code_output"; None if it has none."""
    return next((part for part in cell if part.get("nb_element") == element), None)


def lines_of(statement):
    """(lines of its own, what stands in them) of a statement, without its body."""
    inner = [
        part
        for name in ("body", "orelse", "finalbody", "handlers")
        for part in getattr(statement, name, [])
    ]
    end = min((part.lineno - 1 for part in inner), default=statement.end_lineno)
    own = [part for part in ast.iter_child_nodes(statement) if part not in inner]
    return max(end - statement.lineno + 1, 1), own


def main_work(code):
    """What at least half of a cell's lines do.

    Returns:
        "imports", "plotting code" (they name `plt`, or what came from `plt.subplots`),
        or None: something else, or the cell is short.
    """
    try:
        tree = ast.parse(code)
    except SyntaxError:  # a line for the shell
        return None
    drawing = {"plt", "fig", "ax", "axes"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("plt."):
            names = (n for target in node.targets for n in ast.walk(target))
            drawing |= {name.id for name in names if isinstance(name, ast.Name)}
    lines = Counter()
    for statement in ast.walk(tree):
        if not isinstance(statement, (ast.stmt, ast.ExceptHandler)):
            continue
        n, own = lines_of(statement)
        named = {
            name.id
            for part in own
            for name in ast.walk(part)
            if isinstance(name, ast.Name)
        }
        lines["all"] += n
        lines["imports"] += n * isinstance(statement, (ast.Import, ast.ImportFrom))
        lines["plotting code"] += n * bool(named & drawing)
        lines["asserts"] += isinstance(statement, ast.Assert)
    if lines["all"] < SHORT or lines["asserts"]:  # a proof is to be seen
        return None
    works = ("imports", "plotting code")
    return next((work for work in works if 2 * lines[work] >= lines["all"]), None)


def fold(part, what, place):
    """Put a part of a cell into a `<details>`, closed, under "Show …"."""
    folded = HideCodeCellNode(
        prompt_show=f"Show {what}", prompt_hide=f"Hide {what}", classes=[place]
    )
    part.replace_self(folded)
    folded += part


def is_question(node):
    """True if this is bold text that asks for a guess: "Before you run it", "Guess"."""
    return isinstance(node, nodes.strong) and QUESTION.match(node.astext())


def folds(app, doctree):
    """Fold what a first reading can do without, and answers until they are guessed.

    The set-up and the imports, and code whose main work is a plot; never what is
    exported. After a question, what the next cells put out, until the text goes on.
    Solutions are folded by their tag.
    """
    asked = answered = False
    for node in list(doctree.findall()):
        if is_question(node):
            asked, answered = True, False
        elif isinstance(node, nodes.title):
            asked = False
        elif answered and isinstance(node.parent, (nodes.section, nodes.document)):
            asked = asked and is_cell(node)
        if not is_cell(node) or node.get("hide_mode"):
            continue
        source = part_of(node, "cell_code_source")
        output = part_of(node, "cell_code_output")
        block = next(node.findall(nodes.literal_block), None)
        code = block.rawsource or block.astext() if source and block else ""
        if "tag_setup" in node["classes"]:
            fold(source, "the setup", "above-input")
        elif not DIRECTIVE.match(code) and (work := main_work(code)):
            fold(source, f"the {work}", "above-input")
        if asked and output:
            if source is not None and source.parent is node:
                source["classes"].append("above-output-prompt")
            fold(output, "what happened", "below-input")
            answered = True


def visit_fold(self, node):
    """A folded part of a page; unlike myst_nb's, it is read out by its own words."""
    self.body.append(f'<details class="admonition hide {" ".join(node["classes"])}">\n')
    self.body.append("<summary>\n")
    for kind, text in (("collapsed", "prompt_show"), ("expanded", "prompt_hide")):
        says = html.escape(node[text])
        self.body.append(f'<p class="{kind} admonition-title">{says}</p>\n')
    self.body.append("</summary>\n")


def captions(app, doctree):
    """A paragraph `*Figure:* …` is the numbered caption of what stands above it.

    "Figure 3.2" is the second in chapter 3. Below a cell that drew something the
    caption moves into the cell's output, so that the two are folded and printed as one.
    Below a cell that drew nothing, since it was not measured yet, there is no caption.
    """
    title = next(doctree.findall(nodes.title), None)
    chapter = CHAPTER_NUMBER.match(title.astext()) if title else None
    number = 0
    for paragraph in list(doctree.findall(nodes.paragraph)):
        first = paragraph[0] if len(paragraph) else None
        if not isinstance(first, nodes.emphasis) or first.astext() != "Figure:":
            continue
        place = paragraph.parent.index(paragraph)
        above = paragraph.parent[place - 1] if place else None
        output = part_of(above, "cell_code_output") if is_cell(above) else None
        says = output.astext() if output else ""
        if is_cell(above) and (not output or says.startswith("not measured yet")):
            paragraph.parent.remove(paragraph)
            continue
        number += 1
        which = f"{chapter[1]}.{number}" if chapter else f"{number}"
        first.replace_self(nodes.strong("", f"Figure {which}."))
        paragraph["classes"].append("figure-caption")
        paragraph["ids"].append(f"figure-{which}".lower().replace(".", "-"))
        if output is not None:
            paragraph.parent.remove(paragraph)
            output += paragraph


def exercise_places(app, doctree):
    """Each exercise gets an anchor: `**Exercise 3.1**` is at #exercise-3-1."""
    for quote in doctree.findall(nodes.block_quote):
        bold = next(quote.findall(nodes.strong), None)
        number = EXERCISE.fullmatch(bold.astext()) if bold else None
        if number:
            quote[0]["ids"].append(book_links.place_of_exercise(number[1]))


def own_stills(app, docname, source):
    """A chapter's pictures are those beside it, also where it names the repository.

    `tools/book/sync.py` writes whole addresses for Colab; the pages work from a disk.
    """
    source[0] = STILL.sub(r"](\1)", source[0])


def one_thebe(app, pagename, templatename, context, doctree):
    """sphinx-thebe adds its inline script twice; the second is a console error."""
    seen, keep = False, []
    for script in context.get("script_files", []):
        body = getattr(script, "attributes", {}).get("body") or ""
        if "THEBE_JS_URL" in body:
            if seen:
                continue
            seen = True
        keep.append(script)
    if "script_files" in context:
        context["script_files"][:] = keep


def no_old_roles(app, pagename, templatename, context, doctree):
    """docutils marks papers with a role that ARIA has given up."""
    body = context.get("body", "")
    context["body"] = body.replace('role="doc-biblioentry"', 'role="listitem"')


def no_idle_mathjax(app, pagename, templatename, context, doctree):
    """The root page gets MathJax for formulas of the other pages; it has none."""
    has = app.env.get_domain("math").data["has_equations"]
    if "script_files" in context and not has.get(pagename):
        context["script_files"][:] = [
            script
            for script in context["script_files"]
            if "mathjax" not in str(getattr(script, "filename", script) or "")
        ]


def without_address(app, config):
    """While the repository is unset, no button leads to it.

    BOOK_ADDRESS in the environment says where the pages will stand.
    """
    config.html_baseurl = os.environ.get("BOOK_ADDRESS", config.html_baseurl)
    address = config.html_theme_options.get("repository_url", "")
    if "/OWNER/" in address:
        names = ("use_repository_button", "use_issues_button", "use_edit_page_button")
        config.html_theme_options.update(dict.fromkeys(names, False))
        config.html_theme_options["launch_buttons"] = {}


def no_strangers(app, config):
    """The API page refers to Python's own errors, of which there is no page here."""
    config.nitpick_ignore_regex = [*config.nitpick_ignore_regex, (r"py:.*", r".*")]


def inline_map(app, doctree, docname):
    """The map stands in its page itself, so that its links can be followed."""
    for image in list(doctree.findall(nodes.image)):
        if app.builder.format == "html" and image["uri"].endswith("images/map.svg"):
            drawing = (BOOK / "images" / "map.svg").read_text()
            whole = f'<figure class="model-map">{drawing}</figure>'
            whole = nodes.raw("", whole, format="html")
            alone = isinstance(image.parent, nodes.paragraph)
            (image.parent if alone else image).replace_self(whole)


def live_figures(app, doctree, docname):
    """An image figure_NAME.png becomes the still inside a figure of figures.js."""
    static, model = "../" * docname.count("/") + "_static", ""
    with suppress(FileNotFoundError):
        model = (BOOK / "_static" / "figures_model.js").read_text()
    scripts = {}
    for image in list(doctree.findall(nodes.image)):
        name = re.search(r"images/figure_(\w+)\.png$", image["uri"])
        if app.builder.format != "html" or not name:
            continue
        opened = f'<div class="live" data-figure="{name[1]}">'
        whole = [nodes.raw("", opened, format="html"), image.deepcopy()]
        whole.append(nodes.raw("", "</div>", format="html"))
        alone = isinstance(image.parent, nodes.paragraph) and len(image.parent) == 1
        (image.parent if alone else image).replace_self(whole)
        scripts["figures.js"] = True
        if f'register("{name[1]}"' in model:
            scripts["figures_model.js"] = True
    if scripts:
        head = f'<link rel="stylesheet" href="{static}/figures.css">'
        for script in scripts:
            head += f'<script src="{static}/{script}" charset="utf-8"></script>'
        doctree += nodes.raw("", head, format="html")


def plain(line):
    """A line of plain text for docutils: `x` is code, | and * are only characters."""
    pieces = re.split(r"(``[^`]+``|`[^`]+`)", line)
    for i, piece in enumerate(pieces):
        if i % 2:
            pieces[i] = f"``{piece.strip('`')}``"
        else:
            pieces[i] = re.sub(r"([|*\\]|(?<=\w)_(?!\w))", r"\\\1", piece)
    return "".join(pieces)


def as_rst(app, what, name, obj, options, lines):
    """Our docstrings as docutils wants them: Args, Returns and Raises are fields."""
    section, written = None, []
    for line in lines:
        if line.endswith(":") and what == "module":  # what is set in comes as it is
            written.append(f"{plain(line)}:")
            continue
        title = re.fullmatch(r"(Args|Attributes|Returns|Raises):", line)
        if title:
            section = title[1]
            written += ["", f":{section.replace('Args', 'Arguments')}:"]
            continue
        if section and line and not line.startswith(" "):
            section = None
            written.append("")
        entry = re.match(r"    ([\w*…][\w*…, ]*): (.*)", line)
        if section is None or not line:
            set_in = what == "module" and line.startswith(" ")
            written.append(line if set_in else plain(line))
        elif section == "Returns":
            written.append(f"    {plain(line.strip())}")
        elif entry:
            names = "".join(
                f"``{part}``" if "*" in part or part.isidentifier() else part
                for part in re.split(r"(, (?:a )?)", entry[1])
            )
            written += [f"    {names}", f"        {plain(entry[2])}"]
        else:
            written.append(f"        {plain(line.strip())}")
    lines[:] = written


def first_words(doctree):
    """The first paragraph of a page as plain text, 200 characters at most."""
    for paragraph in doctree.findall(nodes.paragraph):
        text = " ".join(paragraph.astext().split())
        if len(text) > 40 and not text.startswith(("Open in Colab", "You need")):
            if len(text) <= 200:
                return text
            return text[:200].rsplit(" ", 1)[0] + " …"
    return None


def about(app, pagename, templatename, context, doctree):
    """Title, description and picture of a page, for those who share a link to it."""
    says = (first_words(doctree) if doctree else None) or app.config.book_description
    whole = context.get("title") or app.config.html_title
    title = html.unescape(re.sub("<[^>]*>", "", whole))
    if pagename == app.config.root_doc:
        says, title = app.config.book_description, app.config.html_title
    tags = {
        'name="description"': says,
        'property="og:title"': title,
        'property="og:description"': says,
        'property="og:type"': "article",
        'property="og:site_name"': app.config.html_title,
    }
    if app.config.html_baseurl:  # a picture needs a whole address
        base = app.config.html_baseurl.rstrip("/")
        tags['property="og:image"'] = f"{base}/_images/cover.png"
        tags['property="og:url"'] = f"{base}/{pagename}.html"
    context["metatags"] = context.get("metatags", "") + "".join(
        f'<meta {name} content="{html.escape(says, quote=True)}">\n'
        for name, says in tags.items()
    )


# ------------------------------------------------------- "Alayrac et al. 2022"


def bare():
    """No brackets around what is cited."""
    return BracketStyle(left="", right="")


@dataclass
class BookReferences(AuthorYearReferenceStyle):
    """Citations as the chapters write them: authors and year, nothing around them."""

    person: PersonStyle = field(default_factory=lambda: PersonStyle(other=" et al."))
    bracket_parenthetical: BracketStyle = field(default_factory=bare)
    bracket_textual: BracketStyle = field(default_factory=bare)
    bracket_author: BracketStyle = field(default_factory=bare)
    bracket_label: BracketStyle = field(default_factory=bare)
    bracket_year: BracketStyle = field(default_factory=bare)


class AuthorYearLabels(BaseLabelStyle):
    """The same words in front of each entry of the bibliography."""

    def format_labels(self, entries):
        given = Counter()
        for entry in entries:
            last = [" ".join(p.last_names) for p in entry.persons["author"]]
            last = [str(Text.from_latex(name)) for name in last]
            if len(last) == 2 and last[1] != "others":
                who = " and ".join(last)
            else:
                who = last[0] + " et al." * (len(last) > 1)
            label = f"{who} {entry.fields['year']}"
            given[label] += 1
            yield label + ("abc"[given[label] - 1] if given[label] > 1 else "")


class BookBibliography(UnsortedStyle):
    """By author and year."""

    default_sorting_style = "author_year_title"
    default_label_style = "book"


def setup(app):
    """Called by Sphinx."""
    pybtex.plugin.register_plugin("pybtex.style.labels", "book", AuthorYearLabels)
    pybtex.plugin.register_plugin("pybtex.style.formatting", "book", BookBibliography)
    sphinxcontrib.bibtex.plugin.register_plugin(
        "sphinxcontrib.bibtex.style.referencing", "book", BookReferences
    )
    app.add_node(
        HideCodeCellNode, override=True, html=(visit_fold, depart_HideCellInput)
    )
    app.add_config_value("book_description", "", "html")
    app.connect("config-inited", without_address)
    app.connect("config-inited", no_strangers)
    app.connect("source-read", own_stills)
    app.connect("doctree-read", exercise_places)
    app.connect("doctree-read", captions)
    app.connect("doctree-read", folds)
    app.connect("doctree-read", badges)
    app.connect("doctree-resolved", inline_map)
    app.connect("doctree-resolved", live_figures)
    book_links.setup(app)
    app.connect("autodoc-process-docstring", as_rst, priority=100)
    app.connect("html-page-context", one_thebe, priority=900)
    app.connect("html-page-context", no_idle_mathjax, priority=901)
    app.connect("html-page-context", no_old_roles)
    app.connect("html-page-context", about)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
