"""A simulated Colab: a notebook alone in an empty folder, git and pip redirected.

A stand-in `google.colab` is in `sys.modules` before the first cell runs, as it is
there. `git clone` copies this working tree, and `pip` writes down what it was asked.

Of every chapter the setup cell and all imports, of all its cells, are run here. `make
test-colab` runs every chapter whole, which takes as long as the book (COLAB=whole).
"""

import ast
import os
import re
import runpy
import stat
import tomllib

import nbformat
import pytest
import yaml
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook

GIT = """#!/bin/sh
# git clone … URL FOLDER, without a network
echo "git $*" >> "{log}"
for last; do :; done
if [ -e "$last" ]; then
    echo "fatal: destination path '$last' already exists" >&2
    exit 128
fi
mkdir "$last"
tar -C "{root}" --exclude=./.git --exclude=./.venv --exclude=./_build -cf - . |
    tar -C "$last" -xf -
"""
PIP = '#!/bin/sh\necho "pip $*" >> "{log}"\n'
CHAPTERS = sorted(path.name for path in (ROOT / "book").glob("[0-9A-Z]*.ipynb"))
WHOLE = os.environ.get("COLAB") == "whole"
PROBE = """
import os
import flamingo_lite
import flamingo_lite.perceiver
print(os.path.realpath(flamingo_lite.perceiver.__file__))
print(os.path.realpath("."))
"""


def address(owner="somebody"):
    """The book's address; somebody's while it is not set."""
    url = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    return url.replace("/OWNER/", f"/{owner}/")


def setup_cell(owner="somebody"):
    """The setup cell with the book's own address, as tools/book/sync.py writes it."""
    template = runpy.run_path(str(ROOT / "tools" / "book" / "sync.py"))["SETUP"]
    repository = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
    return template.format(**repository | {"url": address(owner)})


def imports_of(source):
    """The imports of a cell at its top level, or "" if it has none."""
    source = re.sub(r"^[%!].*$", "", source, flags=re.M)
    statements = ast.parse(source).body
    kinds = (ast.Import, ast.ImportFrom)
    return "\n".join(ast.unparse(s) for s in statements if isinstance(s, kinds))


def cells_to_run(path, whole):
    """Code cells of a chapter: sources, and which of them may raise, two lists.

    Args:
        path: of the notebook.
        whole: every cell; else the setup cell and what the others import.
    """
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.source.strip()]
    code = [c for c in cells if c.cell_type == "code"]
    first = code[0].source
    assert first == setup_cell("OWNER"), "the first code cell is not the setup cell"
    if not whole:
        imports = [imports_of(c.source) for c in code[1:]]
        assert any(imports), "nothing to try"
        return [setup_cell(), "\n".join(filter(None, imports))], [False, False]
    tags = [c.metadata.get("tags", []) for c in code[1:]]
    may_raise = ["raises-exception" in t for t in tags]
    return [setup_cell(), *(c.source for c in code[1:])], [False, *may_raise]


def write_script(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """Run cells in a fresh kernel of the simulated Colab; the log of git and pip."""
    content, stubs, log = tmp_path / "content", tmp_path / "stubs", tmp_path / "log"
    (stubs / "google" / "colab").mkdir(parents=True)
    (stubs / "google" / "colab" / "__init__.py").touch()
    (stubs / "sitecustomize.py").write_text("import google.colab\n")
    content.mkdir()
    log.touch()
    write_script(stubs / "git", GIT.format(log=log, root=ROOT))
    write_script(stubs / "pip", PIP.format(log=log))
    monkeypatch.setenv("PATH", f"{stubs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(stubs))
    monkeypatch.setenv("HOME", str(tmp_path))

    def run(cells, may_raise=None):
        notebook = new_notebook(cells=[new_code_cell(source) for source in cells])
        may_raise = may_raise or [False] * len(cells)
        for cell, allowed in zip(notebook.cells, may_raise, strict=True):
            cell.metadata["tags"] = ["raises-exception"] if allowed else []
        NotebookClient(
            notebook,
            timeout=900,
            kernel_name="python3",
            resources={"metadata": {"path": str(content)}},
        ).execute()
        return "".join(output.get("text", "") for output in notebook.cells[-1].outputs)

    return run, content, log


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_chapter_alone_in_colab(colab, name):
    """From a folder in which nothing lies, it finds package, figures and data."""
    run, content, _ = colab
    cells, may_raise = cells_to_run(ROOT / "book" / name, WHOLE)
    module, folder = run([*cells, PROBE], [*may_raise, False]).split()
    assert module == str(content / "flamingo_lite" / "flamingo_lite" / "perceiver.py")
    assert folder == str(content / "flamingo_lite" / "book")


def test_a_notebook_alone_in_colab(colab):
    """It imports the cloned package, and running the setup cell again does nothing."""
    run, content, log = colab
    cells, _ = cells_to_run(ROOT / "book" / CHAPTERS[1], whole=False)
    module, folder = run([*cells, cells[0], PROBE]).split()
    assert module == str(content / "flamingo_lite" / "flamingo_lite" / "perceiver.py")
    assert folder == str(content / "flamingo_lite" / "book")
    calls = log.read_text().splitlines()
    assert len(calls) == 2 and calls[0].startswith("git clone")
    assert f" {address()} flamingo_lite" in calls[0]
    assert calls[1].split()[:2] == ["pip", "install"]
    packages = [word for word in calls[1].split()[2:] if not word.startswith("-")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert packages == project["dependencies"]
    assert "open_clip_torch>=3" in packages
    assert any(package.startswith("transformers>=") for package in packages)


def test_a_restarted_session_in_colab(colab):
    """A new kernel starts in the outer folder again, where the clone already stands."""
    run, content, log = colab
    run([setup_cell(), PROBE])
    module, folder = run([setup_cell(), PROBE]).split()
    assert module == str(content / "flamingo_lite" / "flamingo_lite" / "perceiver.py")
    assert folder == str(content / "flamingo_lite" / "book")
    assert log.read_text().count("git clone") == 1


def test_an_address_that_is_not_set(colab):
    """Nothing is fetched, and one line says what to do."""
    run, content, log = colab
    with pytest.raises(CellExecutionError, match="--repository OWNER/NAME"):
        run([setup_cell("OWNER"), PROBE])
    assert log.read_text() == ""


@pytest.mark.parametrize("start", ["book", "."])
def test_a_clone_needs_no_colab(start, tmp_path, monkeypatch):
    """Outside Colab, in book/ or above it, nothing is fetched, the package found."""
    monkeypatch.setenv("PATH", str(tmp_path))  # neither git nor pip
    cells = (setup_cell(), "import figures", PROBE)
    notebook = new_notebook(cells=[new_code_cell(c) for c in cells])
    NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(ROOT / start)}}
    ).execute()
    module = notebook.cells[-1].outputs[0].text.split()[0]
    assert module == str(ROOT / "flamingo_lite" / "perceiver.py")
