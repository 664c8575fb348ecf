#!/usr/bin/env python3
"""Write the package from the notebooks, and what else must be in step with them.

    python tools/book/sync.py
        write what is out of step
    python tools/book/sync.py --check
        write nothing; exit 1 and name what is out of step
    python tools/book/sync.py --repository OWNER/NAME
        the book's address on GitHub, first

Each notebook's setup cell, Colab link, reading time and where its pictures lie, the
pages of `tools/book/pages.py`, and the times in README.md.

A cell that starts with `#| default_exp NAME` names the module, and the cells that start
with `#| export` make it up; those with `#| export OTHER` make up a second one (nbdev's
directives). The repository's address comes from
_config.yml, the only place that knows it; the version, and what the package needs, from
pyproject.toml.
"""

import argparse
import ast
import json
import re
import sys
import tomllib
from pathlib import Path

import nbformat
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import ROOT
from tools.book.pages import (
    api_page,
    exercises_page,
    stamp_cover,
    stamp_reading,
    stamp_rows,
    stamp_scores,
    stamp_times,
    title_of,
)

DIRECTIVE = re.compile(r"^#\|\s*(default_exp|export)\b[ \t]*(\S*)[ \t]*\n?", re.M)
SETUP = """\
# Setup. In Colab: fetch the book once. In a clone there is nothing to fetch.
import os
import subprocess
import sys
import tomllib

if os.path.exists("book/figures.py"):  # an editor that starts in the clone itself
    os.chdir("book")
if "google.colab" in sys.modules and not os.path.exists("figures.py"):
    book = "{url}"
    if "/OWNER/" in book:
        stamp = "python tools/book/sync.py --repository OWNER/NAME"
        raise SystemExit(f"in a clone: {{stamp}}")
    clone = f"git clone -q --depth=1 --branch={branch} {{book}} flamingo_lite"
    if not os.path.exists("flamingo_lite"):
        subprocess.run(clone, shell=True, check=True)
    with open("flamingo_lite/pyproject.toml", "rb") as file:
        needs = tomllib.load(file)["project"]["dependencies"]
    subprocess.run(["pip", "install", "-q", *needs], check=True)
    os.chdir("flamingo_lite/book")
sys.path.insert(0, os.path.abspath(".."))"""
COLAB = re.compile(r"^\[Open in Colab\]\(.*?\)", re.M)
COLAB_LINK = (
    "[Open in Colab](https://colab.research.google.com/github/"
    "{slug}/blob/{branch}/book/{name})"
)
STILL = re.compile(
    r"\]\((?:https://raw\.githubusercontent\.com/[^)\s]+/book/)?(images/[^)\s]+)\)"
)
INIT = '''\
"""Flamingo, one tensor at a time. Written by the notebooks in book/; see README.md."""

from importlib import import_module

__version__ = "{version}"
_NEEDS = [
{needs}]
_HOME = {{
{names}}}
__all__ = list(_HOME)


def __getattr__(name):
    """Import a module, or a name's module, when it is first asked for."""
    if name in _HOME.values():
        return import_module(f"{{__name__}}.{{name}}")
    if name not in _HOME:
        raise AttributeError(f"module {{__name__!r}} has no attribute {{name!r}}")
    return getattr(import_module(f"{{__name__}}.{{_HOME[name]}}"), name)


def __dir__():
    """All there is, also what was not asked for yet: for `dir` and the tab key."""
    return sorted({{*globals(), *__all__, *_HOME.values()}})
'''
MAIN = '''\
"""`python -m flamingo_lite` is the command line of cli.py. By tools/book/sync.py."""

import sys

from flamingo_lite.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command())
'''


def public_names(tree):
    """Names that a module's top level defines, without those that start with `_`."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [t.id for t in node.targets if isinstance(t, ast.Name)]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


def with_names(code, names):
    """A module's code with `__all__`, its public names, below its docstring."""
    listed = "".join(f'    "{name}",\n' for name in dict.fromkeys(names))
    listed = f"__all__ = [\n{listed}]\n" if listed else "__all__ = []\n"
    tree = ast.parse(code)
    if ast.get_docstring(tree) is None:
        return f"\n{listed}\n\n{code}"
    lines = code.splitlines(keepends=True)
    at = tree.body[0].end_lineno
    return "".join([*lines[:at], "\n", listed, *lines[at:]])


def export(path, notebook):
    """What a notebook writes: {module name: (source, public names)}."""
    module, parts, names = None, {}, {}
    for number, cell in enumerate(notebook.cells):
        match = DIRECTIVE.match(cell.source) if cell.cell_type == "code" else None
        if match is None:
            continue
        if match[1] == "default_exp":
            module = match[2]
            continue
        code = DIRECTIVE.sub("", cell.source).strip()
        into = match[2] or module
        if into is None:
            sys.exit(f"{path.name}: `#| export` without `#| default_exp NAME`")
        try:
            names.setdefault(into, []).extend(public_names(ast.parse(code)))
        except SyntaxError as error:
            sys.exit(f"{path.name}, cell {number}: {error.msg} (line {error.lineno})")
        parts.setdefault(into, []).append(code)
    for cells in parts.values():  # the one with the docstring comes first
        cells.sort(key=lambda code: ast.get_docstring(ast.parse(code)) is None)
    head = f"# Written by tools/book/sync.py from book/{path.name}.\n"
    head += "# Edit the notebook, not this file.\n"
    return {
        into: (head + with_names("\n\n\n".join(cells) + "\n", names[into]), names[into])
        for into, cells in parts.items()
    }


def stamp_stills(text, repository):
    """A cell's Markdown with the addresses of the pictures that stand in it.

    Colab opens a notebook without what lies beside it, so that a picture needs its
    whole address. While the repository is unset, it is only `images/NAME`.

    Args:
        text: the cell's.
        repository: of _config.yml, {"url", "branch", …}.
    """
    slug = repository["url"].removeprefix("https://github.com/")
    there = f"https://raw.githubusercontent.com/{slug}/{repository['branch']}/book/"
    there *= "/OWNER/" not in repository["url"]
    return STILL.sub(rf"]({there}\1)", text)


def set_repository(config, name):
    """_config.yml's text with another address.

    Args:
        config: the text.
        name: "OWNER/NAME" on GitHub.
    """
    if not re.fullmatch(r"[\w-]+/[\w.-]+", name):
        sys.exit(f"--repository wants OWNER/NAME, got {name!r}")
    return re.sub(
        r"^(  url: ).*$", rf"\g<1>https://github.com/{name}", config, flags=re.M
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--repository", metavar="OWNER/NAME", help="set the address")
    args = parser.parse_args()
    check, config = args.check, (ROOT / "_config.yml").read_text()
    if args.repository:
        config = set_repository(config, args.repository)
    repository = yaml.safe_load(config)["repository"]
    setup = SETUP.format(**repository)
    slug = repository["url"].removeprefix("https://github.com/")
    wanted, home = {ROOT / "_config.yml": config}, {}
    notebooks, modules = {}, []
    for path in sorted((ROOT / "book").glob("[0-9A-Z]*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        found = [c for c in notebook.cells if "setup" in c.metadata.get("tags", [])]
        if len(found) != 1:
            sys.exit(f"{path.name}: want one cell tagged `setup`, found {len(found)}")
        title = notebook.cells[0]
        if not COLAB.search(title.source):
            sys.exit(f"{path.name}: the first cell has no line [Open in Colab]()")
        link = COLAB_LINK.format(slug=slug, branch=repository["branch"], name=path.name)
        new_title = COLAB.sub(lambda _, link=link: link, title.source)
        new_title = stamp_reading(new_title, notebook)
        before = [cell.source for cell in notebook.cells]
        found[0].source, title.source = setup, new_title
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = stamp_stills(cell.source, repository)
        if [cell.source for cell in notebook.cells] != before:
            wanted[path] = nbformat.writes(notebook) + "\n"
        notebooks[path.name] = notebook
        for module, (source, names) in export(path, notebook).items():
            modules.append((module, path.name, title_of(notebook)))
            wanted[ROOT / "flamingo_lite" / f"{module}.py"] = source
            if twice := sorted(home.keys() & set(names)):
                sys.exit(f"{path.name}: exports {twice[0]}, as {home[twice[0]]} does")
            home |= dict.fromkeys(names, module)
    if both := sorted(home.keys() & set(home.values())):
        sys.exit(f"{both[0]} is the name of a module, and of something in one")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted[ROOT / "flamingo_lite" / "__init__.py"] = INIT.format(
        version=project["version"],
        needs="".join(f'    "{need}",\n' for need in project["dependencies"]),
        names="".join(f'    "{name}": "{module}",\n' for name, module in home.items()),
    )
    if "run_command" in home:
        wanted[ROOT / "flamingo_lite" / "__main__.py"] = MAIN
    book = ROOT / "book"
    wanted[book / "exercises.md"] = exercises_page(notebooks)
    wanted[book / "api.md"] = api_page(modules)
    landing = (book / "intro.md").read_text()
    landing = stamp_times(landing, notebooks)
    if "09_training.ipynb" in notebooks:
        landing = stamp_scores(landing, notebooks["09_training.ipynb"])
    if (cover := book / "images" / "cover.json").exists():
        landing = stamp_cover(landing, json.loads(cover.read_text()))
    wanted[book / "intro.md"] = landing
    readme = (ROOT / "README.md").read_text()
    wanted[ROOT / "README.md"] = stamp_rows(readme, notebooks)
    stale = [p for p, text in wanted.items() if not p.exists() or p.read_text() != text]
    for path in sorted((ROOT / "flamingo_lite").glob("*.py")):
        if path not in wanted:
            sys.exit(f"flamingo_lite/{path.name}: no notebook exports it")
    if not check:
        for path in stale:
            path.write_text(wanted[path])
    print(
        "out of step:" if check else "wrote:",
        ", ".join(p.name for p in stale) or "nothing",
    )
    sys.exit(bool(check and stale))


if __name__ == "__main__":
    main()
