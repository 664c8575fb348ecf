"""Training that is killed at any moment and started again ends with the same bits.

Each life is a process of its own, ended with SIGKILL, which no program can catch. The
processes are forked from a server that has the libraries in memory, so that a life
takes about a second. The model gets noise from torch's random numbers at each step, so
a life that goes on with other random numbers than the last one ended with is found out.
"""

import errno
import multiprocessing
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, random_features

from flamingo_lite import (
    batches,
    checkpoints,
    create_model_and_transforms,
    train,
    training,
)

TEXTS = ["a lemon", "a tent", "a bear above a tent", "a bee", "a fox", "a bus", "a cup"]
FEATURES = random_features(len(TEXTS), 1)[:, 0].half()  # (pictures, F, v, d_img)
SETTINGS = {"n_steps": 20, "batch_size": 2, "seed": 3}
EVERY = 4  # steps between two checkpoints, where a test does not say otherwise
SMALLER = {
    "perceiver_kwargs": {**SMALL["perceiver_kwargs"], "depth": 1},
    "cross_attn_kwargs": SMALL["cross_attn_kwargs"],
    "cross_attn_every_n_layers": 2,
}

pytestmark = pytest.mark.skipif(os.name != "posix", reason="no SIGKILL here")


def add_noise(module, inputs, output):
    """A forward hook: what a Perceiver with dropout would do to reproducibility."""
    return output + 0.1 * torch.randn_like(output)


def train_noisily(backbones, checkpoint, report, every=EVERY):
    """Train a new model; return all that could differ from another run."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    model, _, tokenizer = create_model_and_transforms(
        backbones["clip"], None, backbones["opt"], backbones["opt"], **SMALLER
    )
    model.perceiver.register_forward_hook(add_noise)
    history = train(
        model,
        tokenizer,
        FEATURES,
        TEXTS,
        **SETTINGS,
        checkpoint=checkpoint,
        report_every=every,
        report=report,
    )
    return {
        "weights": dict(model.state_dict()),
        "history": history,
        "random": torch.get_rng_state(),
        "checkpoint": torch.load(checkpoint, weights_only=True),
    }


# ------------------------------------------------------------------------ one life


def on_call(module, name, number, before=None, after=None):
    """Do something just before, or after, a function is called the `number`th time."""
    function, calls = getattr(module, name), []

    def counted(*args, **kwargs):
        calls.append(args)
        if before and len(calls) == number:
            before()
        result = function(*args, **kwargs)
        if after and len(calls) == number:
            after()
        return result

    setattr(module, name, counted)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_half_written():
    """In the second checkpoint, SIGKILL comes when half of it is on the disk."""
    files = []

    def open_to_die(path, mode):
        file = open(path, mode)
        files.append(file)
        write = file.write

        class Dying:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

            def write(self, contents):
                if len(files) == 2:
                    write(contents[: len(contents) // 2])
                    file.flush()
                    die()
                return write(contents)

            def __getattr__(self, name):
                return getattr(file, name)

        return Dying()

    checkpoints.open = open_to_die


def no_room_for_the_second():
    """After the first checkpoint the system writes no file over 20,000 bytes."""
    import resource

    def limit():
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))

    on_call(os, "replace", 1, after=limit)


DEATHS = {  # what happens, and the step of the checkpoint that it leaves
    "in the step before any checkpoint": (
        lambda: on_call(training, "training_step", 3, before=die),
        None,
    ),
    "in a later step": (
        lambda: on_call(training, "training_step", 2 * EVERY + 3, after=die),
        2 * EVERY,
    ),
    "before a checkpoint": (lambda: on_call(checkpoints, "write_whole", 2, die), EVERY),
    "half written": (die_half_written, EVERY),
    "written but not on the disk": (lambda: on_call(os, "fsync", 2, die), EVERY),
    "written but not renamed": (lambda: on_call(os, "replace", 2, die), EVERY),
    "before the old one is kept": (lambda: on_call(os, "link", 1, die), EVERY),
    "renamed": (lambda: on_call(os, "replace", 2, after=die), 2 * EVERY),
    "in the last checkpoint": (
        lambda: on_call(os, "replace", 5, before=die),
        SETTINGS["n_steps"] - EVERY,
    ),
}


def live(backbones, folder, pipe, every, accident):
    """What a process does: train, send each line to the test, write down the end."""
    if accident == "full disk":
        no_room_for_the_second()
    elif accident == "Ctrl-C":
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ctrl_c = partial(os.kill, os.getpid(), signal.SIGINT)
        on_call(batches, "make_batch", EVERY + 2, after=ctrl_c)
    elif accident is not None:
        DEATHS[accident][0]()
    try:
        end = train_noisily(backbones, folder / "run" / "last.pt", pipe.send, every)
    except OSError as error:
        pipe.send((error.errno, str(error)))
        raise SystemExit(1) from None
    except KeyboardInterrupt as error:
        pipe.send(str(error))
        raise SystemExit(130) from None
    torch.save(end, folder / "end.pt")


@pytest.fixture(scope="module")
def server():
    """Where processes are forked from: a process that has imported this file."""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_kill"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        process = context.Process(target=os.getpid)
        process.start()
        process.join()
        yield context


@pytest.fixture
def begin(server, backbones, tmp_path):
    """A function that starts a life: (process, pipe of its lines)."""
    (tmp_path / "run").mkdir()
    begun = []

    def begin(every=EVERY, accident=None):
        ours, theirs = server.Pipe()
        process = server.Process(
            target=live, args=(backbones, tmp_path, theirs, every, accident)
        )
        process.start()
        theirs.close()
        begun.append(process)
        return process, ours

    yield begin
    for process in begun:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def undisturbed(backbones, tmp_path_factory):
    """The end of a training that nothing happened to, in this process."""
    checkpoint = tmp_path_factory.mktemp("undisturbed") / "last.pt"
    return train_noisily(backbones, checkpoint, report=lambda line: None)


def first_difference(one, other, where="end"):
    """Where two nests of dicts, lists, tensors and numbers differ, or None."""
    if type(one) is not type(other):
        return f"{where}: {type(one)}, {type(other)}"
    if isinstance(one, torch.Tensor):
        return None if one.dtype == other.dtype and torch.equal(one, other) else where
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return f"{where}: {one.keys() ^ other.keys()}"
        pairs = [(one[key], other[key], f"{where}.{key}") for key in one]
    elif isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return f"{where}: {len(one)}, {len(other)} entries"
        pairs = [(a, b, f"{where}[]") for a, b in zip(one, other, strict=True)]
    else:
        return None if one == other else f"{where}: {one}, {other}"
    return next(filter(None, (first_difference(*pair) for pair in pairs)), None)


def lines_until_the_end(pipe):
    """All that a life still says."""
    lines = []
    try:
        while True:
            lines.append(pipe.recv())
    except EOFError:
        return lines


def check_end(folder, undisturbed):
    """The run is over; it ended as the undisturbed one, and left nothing behind."""
    end = torch.load(folder / "end.pt", weights_only=True)
    assert first_difference(end, undisturbed) is None
    left = sorted(path.name for path in (folder / "run").iterdir())
    assert left == ["last.pt", "last.pt.previous"]


# --------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", DEATHS)
def test_killed_there_and_started_again(name, begin, tmp_path, undisturbed):
    checkpoint, step = tmp_path / "run" / "last.pt", DEATHS[name][1]
    process, pipe = begin(accident=name)
    lines_until_the_end(pipe)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    if step is None:
        assert not checkpoint.exists()
    else:
        assert torch.load(checkpoint, weights_only=True)["step"] == step
    process, pipe = begin()
    lines = lines_until_the_end(pipe)
    process.join()
    assert process.exitcode == 0
    n_steps = SETTINGS["n_steps"] - (step or 0)
    assert len(lines) == (step is not None) + n_steps / EVERY  # it went on, and said so
    check_end(tmp_path, undisturbed)


def test_killed_at_random_moments(begin, tmp_path, undisturbed):
    """The moments do not depend on the machine's speed, but where they fall does."""
    checkpoint, moments = tmp_path / "run" / "last.pt", random.Random(11)
    kills, steps = 0, []
    while True:
        process, pipe = begin(every=1)  # a checkpoint at every step
        if kills < 8:
            try:
                for _ in range(moments.randint(0, 3)):
                    pipe.recv()
                time.sleep(moments.uniform(0, 0.03))
            except EOFError:  # it ended before
                pass
            process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        if checkpoint.exists():
            steps.append(torch.load(checkpoint, weights_only=True)["step"])
    assert kills >= 5 and len(set(steps)) >= 3, "not killed often enough"
    assert steps == sorted(steps)
    check_end(tmp_path, undisturbed)


def test_ctrl_c_and_started_again(begin, tmp_path, undisturbed):
    """The step under way is ended and saved, though no checkpoint is due."""
    checkpoint = tmp_path / "run" / "last.pt"
    process, pipe = begin(accident="Ctrl-C")
    message = lines_until_the_end(pipe)[-1]
    process.join()
    assert process.exitcode == 130
    assert f"after step {EVERY + 2} of 20, saved: call train" in message
    assert torch.load(checkpoint, weights_only=True)["step"] == EVERY + 2
    process, pipe = begin()
    lines_until_the_end(pipe)
    process.join()
    assert process.exitcode == 0
    check_end(tmp_path, undisturbed)


def test_a_file_that_may_not_grow(begin, tmp_path, undisturbed):
    """The system stops the second checkpoint half way, as a full disk does."""
    checkpoint = tmp_path / "run" / "last.pt"
    process, pipe = begin(accident="full disk")
    number, message = lines_until_the_end(pipe)[-1]
    process.join()
    assert process.exitcode == 1
    assert number == errno.EFBIG
    assert str(checkpoint) in message and "last good one is still there" in message
    assert torch.load(checkpoint, weights_only=True)["step"] == EVERY
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    process, pipe = begin()
    lines_until_the_end(pipe)
    process.join()
    check_end(tmp_path, undisturbed)
