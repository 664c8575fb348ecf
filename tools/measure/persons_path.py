#!/usr/bin/env python3
"""The whole way with a folder of photographs, two kills on it, measured.

    python tools/measure/big_folder.py 3000 pictures            some minutes, once
    python tools/measure/persons_path.py pictures --work NEW    six minutes on two cores

--json data/persons_path.json writes the numbers down, for the page that shows them.

Does what somebody with such a folder does, by the command line: `train`, `score`,
`caption`. The training is ended twice with a signal that no program can catch, once
half way through encoding, once half way through its steps, and called again with
--resume. Prints a Markdown table: minutes, the peak memory of the largest process, disk
and scores. Nothing else should run meanwhile.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import ROOT

PER_MEGABYTE = 1024 if sys.platform == "linux" else 1024**2  # units of ru_maxrss
HEAD = "| what | minutes | peak memory | how it ended |\n|:--|--:|--:|:--|"


def call(words, log, stop_when=None):
    """Run `python -m flamingo_lite` in a process of its own: dict of what it took.

    Args:
        words: what stands behind it.
        log: a file for all that it says.
        stop_when: asked some times a second; once it is true, the process is killed.
    """
    command = [sys.executable, "-m", "flamingo_lite", *map(str, words)]
    started, killed = time.perf_counter(), False
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(log, "wb") as said:
        both = {"stdout": said, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, env=environment, **both)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        if stop_when and not killed and stop_when():
            os.kill(process.pid, signal.SIGKILL)
            killed = True
        time.sleep(0.05)
    process.returncode = os.waitstatus_to_exitcode(status)
    if stop_when and not killed:
        sys.exit(f"persons_path: {words[0]} ended before it was killed; more steps?")
    if process.returncode != (-signal.SIGKILL if killed else 0):
        sys.exit(f"{' '.join(command[2:])}:\n{Path(log).read_text()[-2000:]}")
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "megabytes": round(usage.ru_maxrss / PER_MEGABYTE),
        "killed": killed,
    }


def count_rows(features):
    """How many pictures' features are in a folder, or in several of its kind."""
    lists = Path(features).glob("*/rows.jsonl")
    return sum(len(path.read_bytes().splitlines()) for path in lists)


def steps_said(log):
    """The last step that a training has told of; 0, none."""
    found = re.findall(r"step +(\d+) of", Path(log).read_text(errors="ignore"))
    return int(found[-1]) if found else 0


def bytes_in(folder, pattern="*"):
    """The size of all files of a folder."""
    return sum(p.stat().st_size for p in Path(folder).rglob(pattern) if p.is_file())


def describe_pictures(folder):
    """How many there are of each size, and their bytes: dict."""
    from PIL import Image

    files = [p for p in sorted(Path(folder).rglob("*")) if p.suffix == ".jpg"]
    if not files:
        sys.exit(f"persons_path: no JPEG in {folder}, make some with big_folder.py")
    megapixels = []
    for path in files:
        with Image.open(path) as picture:
            megapixels.append(picture.width * picture.height / 1e6)
    return {
        "number": len(files),
        "of 12 megapixels": sum(size > 11 for size in megapixels),
        "megabytes": round(bytes_in(folder, "*.jpg") / 1e6),
    }


def walk(folder, work, size, steps, report=print):
    """All of it: a list of dicts, one for each command; and what was written.

    Args:
        folder: with train/ and test/.
        work: a new folder, for features, model and what was said.
        size, steps: of the training.
        report: called with each line of the table.
    """
    out, features, log = work / "model", work / "features", work / "said.txt"
    n, done = describe_pictures(folder)["number"], []
    train = ["train", "--images", folder / "train", "--validation", folder / "test"]
    train += ["--size", size, "--steps", steps, "--out", out, "--features", features]
    train += ["--report-every", max(1, steps // 10)]

    def note(what, words, how, stop_when=None):
        taken = call(words, log, stop_when)
        done.append({"what": what, **taken, "ended": how()})
        minutes = f"{taken['seconds'] / 60:.2f}"
        report(f"| {what} | {minutes} | {taken['megabytes']:,} MB | {how()} |")

    def encoded():
        return f"killed: {count_rows(features):,} of {n:,} pictures encoded"

    def trained():
        return f"killed after step {steps_said(log)} of {steps}"

    def last():
        said = log.read_text().splitlines()[-1]
        return said.replace(f"{work}/", "").replace(f"{folder}/", "")

    half = n // 2, steps // 2
    report(HEAD)
    note("`train`", train, encoded, lambda: count_rows(features) >= half[0])
    train.append("--resume")
    note("`train --resume`", train, trained, lambda: steps_said(log) >= half[1])
    first = count_rows(features)
    note("`train --resume`", train, last)
    assert first == count_rows(features), "pictures were encoded again"
    shared = ["--model", out]
    test = ["score", "--images", folder / "test", "--features", features, "--json"]
    note("`score`", [*test, *shared], lambda: "see below")
    text = log.read_text()
    scores = json.loads(text[text.index("{") :])
    picture = sorted((folder / "test").glob("*.jpg"))[0]
    note("`caption`", ["caption", picture, *shared], last)
    disk = {"features": bytes_in(features), "checkpoints": bytes_in(out, "last.pt*")}
    disk["model"] = bytes_in(out) - disk["checkpoints"]
    return done, {k: round(v / 1e6, 1) for k, v in disk.items()}, scores


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="with train/ and test/")
    parser.add_argument("--work", type=Path, required=True, help="a new folder")
    parser.add_argument("--size", choices=("tiny", "paper"), default="tiny")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    args = parser.parse_args()
    if args.steps < 4:
        sys.exit("persons_path: want 4 steps or more, to be killed between them")
    if args.work.exists() and any(args.work.iterdir()):
        sys.exit(f"persons_path: {args.work} is not empty")
    args.work.mkdir(parents=True, exist_ok=True)
    pictures = describe_pictures(args.folder)
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    on = f"{platform.machine()}, {threads} threads, load {os.getloadavg()[0]:.1f}"
    print(f"{pictures}; {on}\n", flush=True)
    say = lambda line: print(line, flush=True)  # noqa: E731
    commands, disk, scores = walk(args.folder, args.work, args.size, args.steps, say)
    print(f"\nMB on the disk: {disk}\n")
    print("| score | |\n|:--|--:|")
    print("\n".join(f"| {name} | {number:.3f} |" for name, number in scores.items()))
    if args.json:
        found = {"on": on, "size": args.size, "steps": args.steps}
        found |= {"pictures": pictures, "commands": commands}
        found |= {"megabytes on disk": disk, "scores": scores}
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
