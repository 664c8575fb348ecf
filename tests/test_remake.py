"""tools/remake.py: results belong to the weights that they were measured on."""

import json

import pytest
from conftest import ROOT

from tools import remake

WRITES = """
import sys
from pathlib import Path
with Path("runs.txt").open("a") as file:
    file.write("run\\n")
sys.exit(int(Path("fails").exists()))
"""


@pytest.fixture
def root(tmp_path):
    """A small repository: one file of weights, one script, one old result."""
    for name in ("data/tiny_clip", "tools", "book"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / remake.WEIGHTS["tiny_clip"]).write_bytes(b"first")
    (tmp_path / "tools" / "job.py").write_text(WRITES)
    (tmp_path / "old.json").write_text("{}")
    return tmp_path


STAGE = ("job", "tools/job.py", ("tiny_clip",), ("old.json",))


def test_a_stage_is_done_once_for_its_weights(root):
    assert remake.state_of(STAGE, root) == ""
    assert remake.do(STAGE, root) == 0
    assert remake.state_of(STAGE, root) == "done"
    assert (root / "runs.txt").read_text() == "run\n"
    assert not (root / "old.json").exists()
    (root / remake.WEIGHTS["tiny_clip"]).write_bytes(b"second")
    assert remake.state_of(STAGE, root) == "old"


def test_an_interrupted_stage_goes_on(root):
    (root / "fails").touch()
    assert remake.do(STAGE, root) == 1
    assert remake.state_of(STAGE, root) == "begun"
    (root / "old.json").write_text("half of it")  # what the stage wrote till then
    assert remake.do(STAGE, root) == 1
    assert (root / "old.json").exists()
    (root / remake.WEIGHTS["tiny_clip"]).write_bytes(b"second")  # of other weights
    assert remake.do(STAGE, root) == 1
    assert not (root / "old.json").exists()


def test_weights_that_change_meanwhile_were_not_measured(root):
    path = root / remake.WEIGHTS["tiny_clip"]
    (root / "tools" / "job.py").write_text(f"open({str(path)!r}, 'w').write('new')")
    assert remake.do(STAGE, root) == 0
    assert remake.state_of(STAGE, root) == "old"


def test_every_stage_is_there():
    """Each command is a script of tools/, and what it stands on has a place."""
    stages = remake.all_stages()
    assert len(stages) > len(list((ROOT / "book").glob("[0-9A-Z]*.ipynb"))) > 10
    for name, command, stands_on, _ in stages:
        assert (ROOT / command.split()[0]).is_file(), name
        assert all(remake.digest(ROOT / remake.WEIGHTS[w]) for w in stands_on), name


def test_results_are_of_the_weights_that_ship():
    notes = ROOT / remake.NOTES
    if not notes.exists():
        pytest.skip("no result was noted yet: tools/remake.py writes them down")
    stages = {stage[0]: stage for stage in remake.all_stages()}
    assert json.loads(notes.read_text()).keys() <= stages.keys()
    states = {name: remake.state_of(stages[name]) for name in remake.read_notes()}
    assert states and set(states.values()) == {"done"}, states


@pytest.mark.parametrize(
    ("name", "code", "reads"),
    [
        ("02_a.ipynb", "build_flamingo()", remake.SHIPPED[:2]),
        ("08_b.ipynb", "load_flamingo('tiny')", remake.SHIPPED),
        ("C_c.ipynb", "run_command([])", remake.SHIPPED),
        ("10_d.ipynb", "load_flamingo()", (*remake.SHIPPED, "smol_flamingo")),
    ],
)
def test_a_chapter_is_noted_with_the_weights_that_it_reads(root, name, code, reads):
    prose = {"cell_type": "markdown", "source": ["`load_flamingo` comes later"]}
    cells = [prose, {"cell_type": "code", "source": [code]}]
    (root / "book" / name).write_text(json.dumps({"cells": cells}))
    (stage,) = (s for s in remake.all_stages(root) if s[0] == name[:-6])
    assert stage[2] == reads
