"""Sphinx glue of this book.

Badges on exported cells, one copy of thebe's script, docstrings as they are written
here, the map with its links, words of the glossary, a description of each page,
citations in the chapters' style.
"""

import html
import os
import re
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pybtex.plugin
import sphinxcontrib.bibtex.plugin
from docutils import nodes
from pybtex.richtext import Text
from pybtex.style.formatting.unsrt import Style as UnsortedStyle
from pybtex.style.labels import BaseLabelStyle
from sphinxcontrib.bibtex.style.referencing import BracketStyle, PersonStyle
from sphinxcontrib.bibtex.style.referencing.author_year import AuthorYearReferenceStyle

DIRECTIVE = re.compile(r"^#\|\s*(default_exp|export)\b[ \t]*(\S*)[ \t]*\n?", re.M)
CHAPTER = re.compile(r"book/[0-9A-Z]")
NOT_LINKED = (nodes.reference, nodes.literal, nodes.title, nodes.raw, nodes.strong)
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
            nodes.literal("", f"flamingo_lite/{module}.py"),
        ]
        cell.insert(0, badge)


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


def no_dead_links(app, doctree):
    """While the repository is unset, no chapter shows a link to open it in Colab."""
    if "/OWNER/" not in app.config.html_theme_options.get("repository_url", ""):
        return
    for link in list(doctree.findall(nodes.reference)):
        if "/OWNER/" in link.get("refuri", ""):
            whole = link.parent
            if len(whole.children) == 1 and isinstance(whole, nodes.paragraph):
                whole.parent.remove(whole)
            else:
                link.replace_self(nodes.Text(link.astext()))


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
    if app.builder.format != "html" or not CHAPTER.match(docname) or not words:
        return
    by_letters = {word.lower(): target for word, target in words.items()}
    any_word = "|".join(map(re.escape, words))
    pattern = re.compile(rf"(?<![\w-])({any_word})(?![\w-])", re.I)
    done = set()
    for text in list(doctree.findall(nodes.Text)):
        above, node = [], text.parent
        while node is not None:
            above.append(node)
            node = node.parent
        if not any(isinstance(n, nodes.paragraph) for n in above):
            continue
        if any(isinstance(n, NOT_LINKED) for n in above):
            continue
        if any("export-badge" in n.get("classes", ()) for n in above[:-1]):
            continue
        pieces, place = [], 0
        for match in pattern.finditer(text):
            page, anchor = by_letters[match[0].lower()]
            if anchor in done:
                continue
            done.add(anchor)
            address = app.builder.get_relative_uri(docname, page) + f"#{anchor}"
            link = nodes.reference("", match[0], refuri=address, internal=True)
            link["classes"].append("term-link")
            pieces += [nodes.Text(text[place : match.start()]), link]
            place = match.end()
        if pieces:
            pieces.append(nodes.Text(text[place:]))
            text.parent.replace(text, [piece for piece in pieces if piece.astext()])


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
    app.add_config_value("book_description", "", "html")
    app.connect("config-inited", without_address)
    app.connect("config-inited", no_strangers)
    app.connect("doctree-read", badges)
    app.connect("doctree-read", no_dead_links)
    app.connect("doctree-resolved", inline_map)
    app.connect("doctree-resolved", live_figures)
    app.connect("doctree-resolved", link_terms)
    app.connect("autodoc-process-docstring", as_rst, priority=100)
    app.connect("html-page-context", one_thebe, priority=900)
    app.connect("html-page-context", no_idle_mathjax, priority=901)
    app.connect("html-page-context", about)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
