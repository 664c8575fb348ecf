"""What the book mentions is linked: chapters, files, modules, words of the glossary."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from docutils import nodes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

import book_links  # noqa: E402

UNSET = "https://github.com/OWNER/flamingo_lite"


def app_of(outdir="", address=UNSET, modules=()):
    """What the functions ask of Sphinx."""
    modules = {
        name: SimpleNamespace(docname="book/api", node_id=f"module-{name}")
        for name in modules
    }
    domain = SimpleNamespace(modules=modules)
    options = {"repository_url": address, "repository_branch": "main"}
    return SimpleNamespace(
        builder=SimpleNamespace(
            format="html",
            get_relative_uri=lambda _, page: page.removeprefix("book/") + ".html",
        ),
        config=SimpleNamespace(html_theme_options=options),
        env=SimpleNamespace(get_domain=lambda _: domain),
        outdir=str(outdir),
    )


def page_of(*children):
    document = nodes.section()
    document += nodes.paragraph("", "", *children)
    return document


def links_of(document):
    return [(n.astext(), n["refuri"]) for n in document.findall(nodes.reference)]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("as in chapter 7.", [("chapter 7", "07_data.html")]),
        (
            "Chapters 5b, 7b and 8b can wait",
            [
                ("Chapters 5b", "05b_loading.html"),
                ("7b", "07b_tasks.html"),
                ("8b", "08b_checkpoints.html"),
            ],
        ),
        ("Appendix\nD has more", [("Appendix\nD", "D_muon.html")]),
        ("chapter 10, 17 pictures", [("chapter 10", "10_few_shot.html")]),
        ("chapter 3 is this page, chapter 99 is none; 4 words", []),
        ("subchapter 2 of theirs, chapter 2x", []),
        ("Appendix A.1.1 of the paper, chapter 10.2", []),
    ],
)
def test_a_chapter_named_by_its_number_is_linked(text, wanted):
    document = page_of(nodes.Text(text))
    before = document.astext()
    book_links.link_chapters(app_of(), document, "book/03_cross_attention")
    assert links_of(document) == wanted
    assert document.astext() == before


def test_what_is_linked_or_code_is_not_linked_again():
    link = nodes.reference("", "chapter 2", refuri="elsewhere")
    document = page_of(link, nodes.literal("", "chapter 4"), nodes.Text("chapter 5"))
    document += nodes.title("", "Back to chapter 6")
    book_links.link_chapters(app_of(), document, "book/intro")
    assert [text for text, _ in links_of(document)] == ["chapter 2", "chapter 5"]


def test_an_exercise_named_by_its_number_is_linked():
    text = "as in exercise 2.2, below; Exercise\n5b.1 goes on, exercise 99.1 does not"
    document = page_of(nodes.Text(text))
    book_links.link_exercises(app_of(), document, "book/02_perceiver")
    assert links_of(document) == [
        ("exercise 2.2", "02_perceiver.html#exercise-2-2"),
        ("Exercise\n5b.1", "05b_loading.html#exercise-5b-1"),
    ]
    assert document.astext() == text


def test_the_page_of_all_exercises_leads_to_each():
    there = "03_cross_attention.html#exercises"
    for page, anchor in (("exercises", "exercise-3-1"), ("intro", "exercises")):
        link = nodes.reference("", "3.1", refuri=there)
        book_links.link_exercises(app_of(), page_of(link), f"book/{page}")
        assert link["refuri"] == f"03_cross_attention.html#{anchor}"


def test_a_file_is_copied_beside_the_pages_while_there_is_no_address(tmp_path):
    document = page_of(nodes.literal("", "tools/weights/lessons.py"))
    book_links.link_files(app_of(tmp_path), document, "book/07_data")
    (link,) = document.findall(nodes.reference)
    assert link["refuri"] == "../_sources/tools/weights/lessons.py.txt"
    assert isinstance(link[0], nodes.literal)
    copy = tmp_path / "_sources" / "tools/weights/lessons.py.txt"
    assert copy.read_bytes() == (ROOT / "tools/weights/lessons.py").read_bytes()


def test_a_file_leads_to_the_repository_and_a_module_to_its_reference(tmp_path):
    app = app_of(tmp_path, UNSET.replace("OWNER", "us"), ["flamingo_lite.data"])
    names = ["tests/test_model.py", "data.py", "flamingo_lite/data.py"]
    document = page_of(*(nodes.literal("", name) for name in names))
    book_links.link_files(app, document, "book/07_data")
    assert [address for _, address in links_of(document)] == [
        "https://github.com/us/flamingo_lite/blob/main/tests/test_model.py",
        "api.html#module-flamingo_lite.data",
        "api.html#module-flamingo_lite.data",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "train_mine.py",
        "../pyproject.toml",
        "/etc/hosts.txt",
        "make.py.x",
    ],
)
def test_what_is_no_file_of_the_repository_stays_code(name):
    document = page_of(nodes.literal("", name))
    book_links.link_files(app_of(), document, "book/intro")
    assert links_of(document) == []


def test_a_link_to_the_unset_address_leaves_its_words_and_code():
    link = nodes.reference("", "", refuri=f"{UNSET}/blob/main/data/README.md")
    link += nodes.literal("", "data/README.md")
    document = page_of(nodes.Text("see "), link)
    book_links.no_dead_links(app_of(), document)
    assert document.astext() == "see data/README.md" and links_of(document) == []
    assert list(document.findall(nodes.literal))
    alone = page_of(nodes.reference("", "Open in Colab", refuri=f"{UNSET}/x"))
    book_links.no_dead_links(app_of(), alone)
    assert alone.astext() == ""


def test_a_word_of_the_glossary_in_another_sense_is_not_linked():
    terms = {
        ("term", "CLIP"): ("book/glossary", "term-clip"),
        ("term", "mask"): ("book/glossary", "term-mask"),
    }
    app = app_of()
    app.env.get_domain = lambda _: SimpleNamespace(objects=terms)
    text = "clip\nart, no label mask, a clip, CLIPs and a mask"
    document = page_of(nodes.Text(text))
    book_links.link_terms(app, document, "book/03_cross_attention")
    assert [said for said, _ in links_of(document)] == ["clip", "mask"]
    assert document.astext() == text
