#!/usr/bin/env python3
"""Run the unit tests with the oldest and the newest versions that the project claims.

    python tools/measure/versions.py
        the four below
    python tools/measure/versions.py oldest newest
        these two
    python tools/measure/versions.py newest,transformers==5.15.1
        the newest torch with this

oldest: the lower bounds in pyproject.toml. newest: the versions in requirements.txt.
With a change, only torch and what is named are held, and pip chooses the rest. With no
names: both, and the oldest torch with the newest transformers and the reverse.

Each of the two has a virtual environment in ~/.cache/flamingo_lite/versions, made on
the first run: some minutes and about 7 GB. Prints a table, one line for each run.
"""

import argparse
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import ROOT

FOLDER = Path.home() / ".cache" / "flamingo_lite" / "versions"
NOT_UNIT = {"test_colab.py", "test_notebooks.py", "test_offline.py", "test_package.py"}
SHOWN = ["torch", "torchvision", "transformers", "open_clip_torch", "numpy", "pillow"]
COUNTS = ["passed", "failed", "skipped"]
ASK = """
import sys
from importlib.metadata import version
print("%d.%d" % sys.version_info[:2], *map(version, sys.argv[1:]))
"""


def claims():
    """What the project claims: {"oldest": {name: version}, "newest": …}, test tools."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = dict(line.partition(">=")[::2] for line in project["dependencies"])
    pins = re.findall(
        r"^([\w-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), flags=re.M
    )
    pins = dict(pins)
    bases = {
        "oldest": bounds,
        "newest": {name: pins[name] for name in bounds},
    }
    return bases, [f"{name}=={pins[name]}" for name in ("pytest", "hypothesis")]


def pip(python, *words):
    """pip install; its complaint if it failed, else nothing."""
    command = [python, "-m", "pip", "install", "-q", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr if done.returncode else ""


def install(python, versions, tools):
    """Bring an environment to these versions, and the rest to the newest that fits."""
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    wanted = [
        f"{name}{version and '=='}{version}" for name, version in versions.items()
    ]
    upgrade = ["--upgrade", "--upgrade-strategy", "eager"]
    problem = pip(python, *upgrade, *wanted, *tools)
    parity = ROOT / "tests" / "requirements-parity.txt"
    if not problem and pip(python, "--no-deps", "-r", parity):
        print("open-flamingo could not be installed: no parity tests", file=sys.stderr)
    return problem


def run_tests(python, log):
    """pytest in that environment, its output to a file; the counts of its last line."""
    tests = sorted(set((ROOT / "tests").glob("test_*.py")))
    tests = [path for path in tests if path.name not in NOT_UNIT]
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-q", "--tb=short"]
    with open(log, "w") as file:
        subprocess.run(
            [python, "-m", "pytest", *options, *tests],
            cwd=ROOT,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    end = log.read_text().rstrip().rpartition("\n")[2]
    found = {word: int(n) for n, word in re.findall(r"(\d+) (\w+)", end)}
    errors = found.get("error", 0) + found.get("errors", 0)
    found["failed"] = found.get("failed", 0) + errors
    return {name: found.get(name, 0) for name in COUNTS}


def versions_of(combination, bases):
    """{name: version or "" for any} of what was asked for on the command line."""
    base, *changes = combination.split(",")
    if base not in bases or not all("==" in change for change in changes):
        sys.exit(f"{combination!r}: oldest or newest, then ,NAME==VERSION if at all")
    if not changes:
        return base, bases[base]
    held = {"torch": bases[base]["torch"]}
    held |= dict(change.split("==") for change in changes)
    return base, dict.fromkeys(bases[base], "") | held


def print_row(*cells):
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("combinations", nargs="*", metavar="BASE[,NAME==VERSION]")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="of the environments"
    )
    args = parser.parse_args()
    bases, tools = claims()
    old, new = (f"transformers=={bases[b]['transformers']}" for b in bases)
    every = ["oldest", f"oldest,{new}", f"newest,{old}", "newest"]
    asked = args.combinations or every
    asked = {combination: versions_of(combination, bases) for combination in asked}
    args.folder.mkdir(parents=True, exist_ok=True)
    print_row("Python", *SHOWN, *COUNTS, "seconds")
    print_row(*["---"] * (len(SHOWN) + len(COUNTS) + 2))
    good = True
    for combination, (base, versions) in asked.items():
        name = "{}-py{}.{}".format(base, *sys.version_info[:2])
        python = args.folder / name / "bin" / "python"
        problem = install(python, versions, tools)
        if problem:
            print(f"{combination} could not be installed:\n{problem}", file=sys.stderr)
            good = False
            continue
        log = args.folder / f"{combination}.log"
        started = time.perf_counter()
        counts = run_tests(python, log)
        seconds = round(time.perf_counter() - started)
        question = [python, "-c", ASK, *SHOWN]
        answer = subprocess.run(question, check=True, capture_output=True, text=True)
        print_row(*answer.stdout.split(), *counts.values(), seconds)
        if counts["failed"] or not counts["passed"]:
            print(f"what failed: {log}", file=sys.stderr)
            good = False
    sys.exit(not good)


if __name__ == "__main__":
    main()
