"""What nbval does not say: stored outputs are fresh, clean, described and checkable."""

import re
import subprocess
import sys

import nbformat
import pytest
import yaml
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

NOTEBOOKS = sorted((ROOT / "book").glob("[0-9A-Z]*.ipynb"))
LOCAL_PATH = re.compile(r"(?<![\w.:/])/(root|home|tmp|Users|content|work|mnt)/")
WIDGET = "application/vnd.jupyter.widget-view+json"
FENCE = re.compile(r"^\s*(`{3,}|:{3,})\{", re.M)  # ```{note}: raw text in Colab
BIGGEST = 1_500_000  # bytes


def tags(cell):
    return cell.metadata.get("tags", [])


def shown_text(output):
    """All that an output says, without the bytes of its pictures."""
    texts = [output.get("text", "")]
    for kind, value in output.get("data", {}).items():
        if not kind.startswith("image/") or kind == "image/svg+xml":
            texts.append(str(value))
    return "\n".join([*texts, *output.get("traceback", [])])


def complaints_about_output(cell, output):
    """What is wrong with one stored output of a code cell."""
    kinds = output.get("data", {})
    alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
    if output.get("name") == "stderr":
        yield f"stderr: {output.text[:200]}"
    if output.output_type == "error" and "raises-exception" not in tags(cell):
        yield f"error: {output.ename}"
    if LOCAL_PATH.search(shown_text(output)):
        yield f"local path: {shown_text(output)[:200]}"
    if WIDGET in kinds:
        yield "widget: it does not render in a static book"
    if "image/png" in kinds and not alt.strip():
        yield f"alt text missing: {cell.source[:80]}"


def complaints(notebook):
    """What is wrong with a notebook, as a list of sentences."""
    found = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    run = [c.execution_count for c in code if c.source.strip()]
    if run != list(range(1, len(run) + 1)):
        found.append(f"order: run as {run}, restart and run all")
    if sum("setup" in tags(cell) for cell in notebook.cells) != 1:
        found.append("setup: want exactly one cell tagged `setup`")
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and FENCE.search(cell.source):
            found.append(f"fence: MyST is raw text in Colab: {cell.source[:80]}")
    for cell in code:
        if "nbval-check-output" in tags(cell):
            if not cell.outputs:
                found.append(f"unchecked: no output to check: {cell.source[:80]}")
            if cell.source.rstrip().endswith(";"):
                found.append("semicolon: nbval shows the result all the same")
        if re.search(r"^\s*from\s+\S+\s+import\s+\*", cell.source, re.M):
            found.append(f"star import: {cell.source[:80]}")
        for output in cell.outputs:
            found += complaints_about_output(cell, output)
    if len(nbformat.writes(notebook).encode()) > BIGGEST:
        found.append(f"size: over {BIGGEST:,} bytes")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert complaints(notebook) == []


# Chapters whose exercises have one form, the one that `good_exercise` below shows.
QUESTION = re.compile(
    r"> \*\*Exercise (\w+\.\d+)\*\* [●○]{3} · "
    r"(predict|build|break\s(?:> )?and\smend|explore)\s(?:> )?·\s(?:> )?\d+"
)
PROOF = re.compile(r"^ *(assert |check_\w+\(|torch\.testing\.assert_close)", re.M)
HOLE = re.compile(r"^( *return None  |\w+ = None  | +)# your (code|guess)", re.M)


def complaints_about_exercises(notebook):
    """What is wrong with the form of a notebook's exercises, as a list of sentences."""
    found, cells = [], notebook.cells
    for place, cell in enumerate(cells):
        if cell.cell_type != "markdown" or "> **Exercise" not in cell.source:
            continue
        if not (question := QUESTION.search(cell.source)):
            found.append(f"question: no kind or no minutes: {cell.source[:80]}")
            continue
        number, below = question[1], []
        if question[2] == "explore" and "<summary>Answer</summary>" in cell.source:
            continue  # for pictures of the reader's own: nothing that CI could run
        if "<details><summary>Hint</summary>" not in cell.source:
            found.append(f"hint: none at {number}")
        for one in cells[place + 1 :]:
            if one.cell_type == "markdown":
                break
            below.append(one)
        *_, stub, solution = [None, None, *below]
        if solution is None or not solution.source.startswith(
            f"#@title Solution {number}\n#"
        ):
            found.append(f"solution: none at {number}, or it is not explained")
            continue
        if (
            "hide-cell" not in tags(solution)
            or solution.metadata.get("cellView") is None
        ):
            found.append(f"folded: the solution of {number} is not")
        if not PROOF.search(solution.source):
            found.append(f"proof: the solution of {number} asserts nothing")
        hole = HOLE.search(stub.source) if stub is not None else None
        check = stub.source[hole.end() :] if hole else ""
        behind = re.split(r"^ *if .*:$", check, maxsplit=1, flags=re.M)[1:]
        if not PROOF.search("".join(behind)):
            found.append(f"stub: {number} wants a hole, and an assert behind `if`")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises_have_one_form(path):
    notebook = nbformat.read(path, as_version=4)
    assert complaints_about_exercises(notebook) == []
    text = "\n".join(cell.source for cell in notebook.cells)
    kinds = [kind for _, kind in QUESTION.findall(text)]
    assert len(kinds) >= 2 and set(kinds) != {"predict"}


def test_modules_and_setup_cells_are_in_step():
    done = subprocess.run(
        [sys.executable, "tools/book/sync.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_notebook_is_in_the_table_of_contents():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    chapters = [c["file"] for part in toc["parts"] for c in part["chapters"]]
    numbered = {c for c in chapters if re.match(r"book/[\dA-Z]", c)}
    assert numbered == {f"book/{path.stem}" for path in NOTEBOOKS}


# --------------------------------------------------- each complaint finds its fault


def good_notebook():
    """A notebook without a fault: setup, a checked result, and a described picture."""
    stream = new_output(
        "stream", name="stdout", text="https://a.org/home/x and 3/tmp\n"
    )
    picture = new_output(
        "display_data", data={"image/png": "AAAA", "text/plain": "<F>"}
    )
    cells = [
        new_markdown_cell("# 1. A chapter\n\n```python\nx = {1}\n```"),
        new_code_cell("import os", execution_count=1, metadata={"tags": ["setup"]}),
        new_code_cell(
            "print(3)",
            execution_count=2,
            outputs=[stream],
            metadata={"tags": ["nbval-check-output"]},
        ),
        new_code_cell(
            "plt.show()",
            execution_count=3,
            outputs=[picture],
            metadata={"mystnb": {"image": {"alt": "a curve that falls"}}},
        ),
    ]
    return new_notebook(cells=cells)


def add(cell_number, **output):
    """A fault: one more output at a cell."""
    kind = output.pop("output_type", "stream")
    return lambda nb: nb.cells[cell_number].outputs.append(new_output(kind, **output))


def put(cell_number, name, value):
    """A fault: a cell's attribute has another value."""
    return lambda nb: nb.cells[cell_number].update({name: value})


FAULTS = {
    "order": put(2, "execution_count", 7),
    "setup": lambda nb: nb.cells.pop(1),
    "fence": put(0, "source", "# 1\n\n```{note}\nlook\n```"),
    "unchecked": put(2, "outputs", []),
    "semicolon": put(2, "source", "plt.plot();"),
    "star import": put(1, "source", "from torch import *"),
    "stderr": add(2, name="stderr", text="a warning"),
    "error": add(2, output_type="error", ename="ValueError", evalue="", traceback=[]),
    "local path": add(2, name="stdout", text="saved to /home/me/a.png"),
    "widget": add(3, output_type="display_data", data={WIDGET: {"model_id": "1"}}),
    "alt text": put(3, "metadata", {}),
    "size": add(2, name="stdout", text="x" * BIGGEST),
}


def test_a_good_notebook_has_no_complaints():
    assert complaints(good_notebook()) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault):
    notebook = good_notebook()
    FAULTS[fault](notebook)
    assert any(complaint.startswith(fault) for complaint in complaints(notebook))


def good_exercise():
    """An exercise as all are: question and hint, stub, folded solution."""
    question = "> **Exercise 1.1** ●○○ · build · 5 min. Write `two`.\n\n"
    question += "<details><summary>Hint</summary>\n\nOne and one.\n\n</details>"
    stub = "def two():\n    return None  # your code\n\n\n"
    stub += "if two() is not None:\n    assert two() == 2\n    print(3)"
    solution = "#@title Solution 1.1\n# One and one.\ndef two():\n    return 2\n\n\n"
    folded = {"tags": ["hide-cell"], "cellView": "form"}
    return new_notebook(
        cells=[
            new_markdown_cell(question),
            new_code_cell(stub),
            new_code_cell(solution + "assert two() == 2", metadata=folded),
        ]
    )


def change(number, old, new):
    """A fault: other words in a cell."""
    return lambda nb: nb.cells[number].update(
        source=nb.cells[number].source.replace(old, new)
    )


FORM_FAULTS = {
    "question": change(0, "build · ", ""),
    "hint": change(0, "<details>", ""),
    "stub": change(1, "None  # your code", "2"),
    "stub: 1.1": change(1, "    assert", "    # assert"),
    "solution": change(2, "# One and one.\n", ""),
    "solution: none": lambda nb: nb.cells.pop(2),
    "folded": put(2, "metadata", {}),
    "proof": change(2, "assert ", "print("),
}


def test_a_good_exercise_has_no_complaints():
    assert complaints_about_exercises(good_exercise()) == []


@pytest.mark.parametrize("fault", FORM_FAULTS)
def test_a_planted_fault_of_form_is_found(fault):
    notebook = good_exercise()
    FORM_FAULTS[fault](notebook)
    found = complaints_about_exercises(notebook)
    assert any(complaint.startswith(fault) for complaint in found)


def test_a_cell_may_go_to_a_second_module(tmp_path):
    sys.path.insert(0, str(ROOT))
    from tools.book import sync

    sources = [
        "#| default_exp one",
        "#| export\na = 1",
        "#| export two\nb = 2",
        "c = 3",
    ]
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    modules = sync.export(tmp_path / "x.ipynb", notebook)
    assert {name: names for name, (_, names) in modules.items()} == {
        "one": ["a"],
        "two": ["b"],
    }
    assert modules["two"][0].endswith("\nb = 2\n") and "a = 1" not in modules["two"][0]
    notebook.cells.append(new_code_cell('#| export\n"""One."""\n\nimport os\n_c = 3'))
    module = sync.export(tmp_path / "x.ipynb", notebook)["one"][0]
    head, body = module.split('"""One."""\n')  # the docstring comes first, wherever
    assert all(line.startswith("#") for line in head.splitlines())
    assert body.startswith('\n__all__ = [\n    "a",\n]\n') and "import os" in body
    assert "_c = 3" in body and body.endswith("\na = 1\n")
