"""The tools that measure: they run in their smallest form; pages show their files."""

import importlib
import json
import math
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from packaging.version import Version

MEASURED = {
    "benchmark.json": {"step", "tower", "generation", "memory", "growth"},
    "optimizers.json": {"device", "threads", "seconds", "batch", "GFLOP of rounds"},
    "persons_path.json": {"on", "pictures", "commands", "scores", "megabytes on disk"},
}


def tool(name):
    """A script of tools/, as a module."""
    return importlib.import_module(f"tools.{path_of(name).parent.name}.{name}")


def path_of(name):
    """Where a script lies, in one of the rooms of tools/."""
    (path,) = (ROOT / "tools").glob(f"*/{name}.py")
    return path


def call_tool(name, *words):
    command = [sys.executable, path_of(name), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout, done.stderr


SHIPPED = {"benchmark.json", "persons_path.json"}


def numbers_in(found):
    """All the numbers in a nest of dicts and lists."""
    if isinstance(found, (dict, list)):
        inside = found.values() if isinstance(found, dict) else found
        return [number for one in inside for number in numbers_in(one)]
    is_number = isinstance(found, (int, float)) and not isinstance(found, bool)
    return [found] if is_number else []


@pytest.mark.parametrize("name", MEASURED)
def test_what_was_measured_is_whole(name):
    """Each part is there, with something in it; and numbers, all of them finite."""
    path = ROOT / "data" / name
    if name not in SHIPPED and not path.exists():
        pytest.skip(f"{name} was not measured yet: tools/measure/ writes it")
    found = json.loads(path.read_text())
    assert all(found[part] for part in MEASURED[name])
    numbers = numbers_in(found)
    assert len(numbers) >= 3 and all(map(math.isfinite, numbers))


# --------------------------------------------------------------------- a person's path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of twelve pictures, one of 12 megapixels."""
    folder = tmp_path_factory.mktemp("person") / "pictures"
    tool("big_folder").make_folder(folder, 12)
    return folder


def test_a_persons_path(pictures, tmp_path):
    """Killed in encoding and in training, gone on to the end; nothing encoded twice."""
    words = "--steps", 8, "--work", tmp_path / "work", "--json", tmp_path / "found.json"
    code, said, error = call_tool("persons_path", pictures, *words)
    assert code == 0, error[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["pictures"]["number"] == 12
    assert found["pictures"]["of 12 megapixels"] == 1
    commands = found["commands"]
    assert [one["killed"] for one in commands] == [True, True, False, False, False]
    assert all(one["seconds"] > 0 and one["megabytes"] > 100 for one in commands)
    assert commands[0]["ended"].startswith("killed: ")
    assert commands[2]["ended"].startswith("model: 8 steps, loss")
    assert {"CIDEr-D", "loss, true", "loss, shuffled"} <= set(found["scores"])
    assert 0.25 < found["megabytes on disk"]["features"] < 0.4  # 12 x 64 x 192 x 2
    rows = [line for line in said.splitlines() if line.startswith("| `")]
    assert len(rows) == 5 and all(row.count("|") == 5 for row in rows)


def test_a_persons_path_refuses(pictures, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    empty = tmp_path / "empty"
    for words, problem in (
        ((pictures, "--work", tmp_path), "is not empty"),
        ((pictures, "--work", tmp_path / "new", "--steps", 3), "want 4 steps or more"),
        ((empty, "--work", tmp_path / "new"), "no JPEG in"),
    ):
        code, _, error = call_tool("persons_path", *words)
        assert code == 1 and problem in error
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_command_that_fails_or_ends_too_early(tmp_path):
    path = tool("persons_path")
    with pytest.raises(SystemExit, match="caption"):
        path.call(["caption", tmp_path / "none.jpg"], tmp_path / "log")
    with pytest.raises(SystemExit, match="ended before it was killed"):
        path.call(["--help"], tmp_path / "log", stop_when=lambda: False)


# ------------------------------------------------------------------------- the tables


def test_groups_join_in_a_file_and_in_readme(tmp_path):
    benchmark, file = tool("benchmark"), tmp_path / "b.json"
    benchmark.keep(file, "memory", ["then"], [["peak", "3 MB", "4 MB", 0.75, ""]])
    step = "step (2, 1, 32)"
    benchmark.keep(file, "step", ["now"], [[step, "1 s", "2 s", 0.5, "70% of peak"]])
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{benchmark.BEGIN}old\n{benchmark.END_MARK}after\n")
    benchmark.write_readme(file, readme)
    lines = readme.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert lines[4] == f"| {step} | 1 s | 2 s | 0.50 | 1.0 | 70% of peak |"
    assert lines[5] == "| peak | 3 MB | 4 MB | 0.75 |  |  |"


def test_readme_has_what_was_measured(tmp_path):
    """The numbers of README's table are those of the file."""
    benchmark, file = tool("benchmark"), ROOT / "data" / "benchmark.json"
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text())
    benchmark.write_readme(file, copy)
    assert copy.read_text() == (ROOT / "README.md").read_text()
    cases = {
        row[0]
        for group in json.loads(file.read_text()).values()
        for row in group["rows"]
    }
    assert cases == set(benchmark.AT_MOST)


def test_the_versions_in_readme_are_those_that_the_project_claims():
    """The same tests in each row, from the oldest libraries to the newest."""
    page, (bases, _) = (ROOT / "README.md").read_text(), tool("versions").claims()
    table = page.split("| torch |", 1)[1].split("\n\n", 1)[0]
    header, _, *rows = (re.findall(r"[^|\s]+", line) for line in table.splitlines())
    names = ["torch", *header]
    rows = [dict(zip(names, row, strict=True)) for row in rows]
    assert len(rows) == 4 and {row["failed"] for row in rows} == {"0"}
    assert len({int(row["passed"]) + int(row["skipped"]) for row in rows}) == 1
    for row, base in ((rows[0], "oldest"), (rows[-1], "newest")):
        for name, version in bases[base].items():
            if name in row and version:
                assert Version(row[name]) == Version(version), (base, name)
    assert "Five are those of `make test-smol`; the two more that the oldest" in page
    assert [row["skipped"] for row in rows] == ["7", "5", "5", "5"]


def test_sizes_of_downloads_are_said_alike():
    """README, the Makefile and the page of the set-up; 93 MB needs PyPI to be known."""
    pages = ["README.md", "Makefile", "book/before_you_start.md"]
    said = {name: (ROOT / name).read_text() for name in pages}
    libraries = {n for p in said.values() for n in re.findall(r"about (\d+) GB", p)}
    of_smol = re.compile(r"(\d+) MB(?: more|,) from PyPI")
    smol = {n for p in said.values() for n in of_smol.findall(p)}
    assert libraries == {"6"} and smol == {"93"}


@pytest.mark.skipif(
    Path(sys.prefix) != ROOT / ".venv" or sys.platform != "linux",
    reason="not the environment that make makes on Linux",
)
def test_the_libraries_take_about_as_much_disk_as_is_said():
    files = (file for one in distributions() for file in one.files or ())
    assert 5.5e9 < sum(file.size or 0 for file in files) < 6.7e9


def test_one_of_each_shape_counts_for_all():
    shapes = [(4, 8), (4, 8), (8, 4), (4, 8)]
    matrices = [torch.nn.Parameter(torch.randn(*shape)) for shape in shapes]
    found = tool("compare_optimizers").step_by_shape(matrices, "Muon, bfloat16")
    assert {name: count for name, (count, _) in found.items()} == {
        "4 x 8": 3,
        "8 x 4": 1,
    }
    assert all(taken >= 0 for _, taken in found.values())
    moved = [p.grad is not None for p in matrices]
    assert moved == [True, False, True, False]


def test_what_each_optimizer_learns(tmp_path):
    """The smallest form: three runs, the third with AdamW for about as long."""
    out = tmp_path / "runs.json"
    words = ["--scenes", 20, "--steps", 3, "--seeds", 1, "--tests", 4, "--out", out]
    code, _, told = call_tool("compare_optimizers", *words)
    assert code == 0, told
    runs = json.loads(out.read_text())
    assert [run["optimizer"] for run in runs] == ["Muon", "AdamW", "AdamW"]
    assert runs[0]["steps"] == runs[1]["steps"] == 3 and runs[2]["steps"] >= 1
    for run in runs:
        assert len(run["Twemoji"]) == len(run["trained studios"]) == 4
        assert run["processor seconds"] > 0


def test_rates_of_the_paper_size_are_refused(tmp_path):
    out = tmp_path / "rates.json"
    words = ["--rates", "--size", "paper", "--out", out]
    code, _, told = call_tool("compare_optimizers", *words)
    assert code == 2 and "leave --size out" in told and not out.exists()


def test_what_each_rate_learns(tmp_path):
    """The smallest form, two runs; and the rates that are shown are those tried."""
    out = tmp_path / "rates.json"
    words = ["--rates", "--scenes", 20, "--trials", 2, "--tests", 4, "--out", out]
    code, _, told = call_tool("compare_optimizers", *words)
    assert code == 0, told
    runs = json.loads(out.read_text())
    shown = json.loads((ROOT / "data" / "rates_tiny.json").read_text())
    assert [run["seed"] for run in runs] == [0, 1]
    assert all(run.keys() == shown[0].keys() for run in runs + shown)
    trials = tool("compare_optimizers").TRIALS
    tried = [
        (*how, lr, seed)
        for how, rates in trials.items()
        for lr, seeds in rates.items()
        for seed in seeds
    ]
    names = ("optimizer", "steps", "lr", "seed")
    assert [tuple(run[name] for name in names) for run in shown] == tried


# ------------------------------------------------------------------------ own pictures


def test_own_pictures(tmp_path):
    """Runs of every number and length, with marks; none is made a second time."""
    out = tmp_path / "own.json"
    words = ["--numbers", 6, 12, "--steps", 2, "--seeds", 1, "--tests", 5, "--out", out]
    code, told, error = call_tool("own_pictures", *words)
    assert code == 0, error
    runs = json.loads(out.read_text())
    assert [(run["pictures"], run["steps"]) for run in runs] == [(6, 2), (12, 2)]
    for run in runs:
        assert len(run["exact"]) == len(run["exact, shuffled"]) == 5
        assert 0.5 < run["loss of new ones"] < 20
    assert call_tool("own_pictures", *words)[:2] == (0, "")
    assert json.loads(out.read_text()) == runs
