"""Training: resumes to the same numbers, bit for bit; batches, losses and intervals.

Pictures stand alone or follow each other in sequences.
"""

import errno
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, random_features
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo_lite import (
    batch_for_step,
    bootstrap_interval,
    caption_losses,
    checkpoints,
    collate,
    make_batch,
    run_settings,
    schedule,
    train,
    trained_tensors,
)

TEXTS = [
    "a lemon",
    "a tent",
    "a bear above a tent",
    "a bee",
    "a fox to the left of a bee",
]
FEATURES = random_features(len(TEXTS), 1, seed=5)[
    :, 0
].half()  # (pictures, F, v, d_img)
SETTINGS = {"n_steps": 20, "batch_size": 2, "report_every": 5, "seed": 3}


def silent(line):
    """A report that no one reads."""


class Stopped(Exception):
    """What ends a training in these tests, and leaves it no time to save."""


def stop_at(step):
    """A report that stops training when it comes to a step."""

    def report(line):
        if line.split()[1] == str(step):
            raise Stopped

    return report


def run(make_model, report=silent, **kwargs):
    """Train a new model; return it and its history."""
    model, _, tokenizer = make_model()
    history = train(
        model, tokenizer, FEATURES, TEXTS, report=report, **{**SETTINGS, **kwargs}
    )
    return model, history


def test_resumed_is_undisturbed(make_model, tmp_path):
    """Stopped after a checkpoint and started again in a new model: the same end."""
    straight, history = run(make_model)
    checkpoint = tmp_path / "last.pt"
    with pytest.raises(Stopped):
        run(make_model, stop_at(15), checkpoint=checkpoint)
    assert torch.load(checkpoint, weights_only=True)["step"] == 10
    resumed, history_again = run(make_model, checkpoint=checkpoint)
    assert history_again == history
    wanted = straight.state_dict()
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["last.pt", "last.pt.previous"], "something was left behind"


def test_a_finished_run_is_not_trained_again(make_model, tmp_path):
    checkpoint = tmp_path / "last.pt"
    first, history = run(make_model, checkpoint=checkpoint)
    again, history_again = run(make_model, checkpoint=checkpoint)
    assert history_again == history
    for name, tensor in trained_tensors(again).items():
        assert torch.equal(tensor, trained_tensors(first)[name]), name


def test_gates_open_and_the_loss_falls(make_model):
    model, history = run(make_model, n_steps=60, batch_size=5)
    assert [entry["step"] for entry in history] == list(range(1, 61))
    losses = [entry["loss"] for entry in history]
    assert sum(losses[-10:]) < sum(losses[:10])
    gates = [p for name, p in model.named_parameters() if name.endswith("_gate")]
    assert len(history[-1]["gates"]) == len(gates)
    assert all(gate.abs().item() > 1e-3 for gate in gates)
    assert not model.training


def test_unequal_lengths_are_refused(make_model):
    model, _, tokenizer = make_model()
    with pytest.raises(ValueError, match="5 pictures, but 4 texts"):
        train(model, tokenizer, FEATURES, TEXTS[:-1], n_steps=1)


# -------------------------------------------------------------------------- sequences

SEQUENCES = [[0, 1], [2], [3, 4, 0], [1], [4, 2], [3], [2, 2]]
TOLD = [
    ["a lemon", ("is it?", "a tent")],
    [("what is this?", "a bear above a tent")],
    [("a bee", ""), "a fox to the left of a bee", ("", "a lemon")],
    ["a tent"],
    ["a fox to the left of a bee", "a bear above a tent"],
    ["a bee"],
    [("first,", "a bear"), ("at last,", "a tent")],
]


def run_told(make_model, report=silent, sequences=SEQUENCES, texts=TOLD, **kwargs):
    """Train a new model on sequences; return it and its history."""
    model, _, tokenizer = make_model()
    kwargs = {**SETTINGS, "report": report, "sequences": sequences, **kwargs}
    return model, train(model, tokenizer, FEATURES, texts, **kwargs)


def test_sequences_of_one_picture_are_pictures(make_model):
    """The same numbers as without sequences, to the last bit."""
    alone, history = run(make_model)
    pictures, texts = [[i] for i in range(len(TEXTS))], [[text] for text in TEXTS]
    told, history_told = run_told(make_model, sequences=pictures, texts=texts)
    assert history_told == history
    for name, tensor in trained_tensors(told).items():
        assert torch.equal(tensor, trained_tensors(alone)[name]), name


def test_sequences_number_the_pictures(make_model):
    """Pictures in another order, and sequences that say so: the same again."""
    alone, history = run(make_model)
    model, _, tokenizer = make_model()
    order = [3, 1, 4, 0, 2]
    places = [[order.index(i)] for i in range(len(TEXTS))]
    kwargs = {**SETTINGS, "report": silent, "sequences": places}
    texts = [[text] for text in TEXTS]
    assert train(model, tokenizer, FEATURES[order], texts, **kwargs) == history
    for name, tensor in trained_tensors(model).items():
        assert torch.equal(tensor, trained_tensors(alone)[name]), name


def test_resumed_with_sequences_is_undisturbed(make_model, tmp_path):
    straight, history = run_told(make_model)
    checkpoint = tmp_path / "last.pt"
    with pytest.raises(Stopped):
        run_told(make_model, stop_at(15), checkpoint=checkpoint)
    resumed, history_again = run_told(make_model, checkpoint=checkpoint)
    assert history_again == history
    wanted = straight.state_dict()
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_other_pictures_of_the_same_shape_are_another_run(make_model, tmp_path):
    """But not the same pictures, encoded by a machine that rounds otherwise."""
    path = tmp_path / "last.pt"

    def start(features):
        model, _, tokenizer = make_model()
        settings = {**SETTINGS, "n_steps": 4, "checkpoint": path}
        train(model, tokenizer, features, TEXTS, report=silent, **settings)

    start(FEATURES)
    rounded = FEATURES * (1 + 1e-3 * torch.randn_like(FEATURES.float()))
    start(rounded.half())
    others = random_features(len(TEXTS), 1, seed=77)[:, 0].half()
    for features in (others, FEATURES.flip(0)):
        with pytest.raises(ValueError, match="other pictures, or on features of"):
            start(features)


@pytest.mark.parametrize(
    "others",
    [
        {"sequences": [*SEQUENCES[:-1], [2, 1]]},
        {"sequences": SEQUENCES[:-1], "texts": TOLD[:-1]},
        {"texts": [*TOLD[:-1], ["first, a bear", ("at last,", "a tent")]]},
        {"sequences": None, "texts": TEXTS},
    ],
    ids=["another picture", "one less", "given or not", "none"],
)
def test_other_sequences_are_another_run(make_model, tmp_path, others):
    checkpoint = tmp_path / "last.pt"
    with pytest.raises(Stopped):
        run_told(make_model, stop_at(10), checkpoint=checkpoint, n_steps=11)
    on_disk = checkpoint.read_bytes()
    with pytest.raises(ValueError, match="another run.*checksum of the texts"):
        run_told(make_model, checkpoint=checkpoint, n_steps=11, **others)
    assert checkpoint.read_bytes() == on_disk
    run_told(make_model, checkpoint=checkpoint, n_steps=11)


def test_sequences_are_part_of_what_a_run_is():
    numbers = 20, 2, 1e-3, 30.0, True, 3
    alone = run_settings(FEATURES, TEXTS, *numbers)
    assert alone == run_settings(FEATURES, TEXTS, *numbers, None)
    checksums = {
        run_settings(FEATURES, TOLD, *numbers, sequences)["checksum of the texts"]
        for sequences in (None, SEQUENCES, SEQUENCES[:-1], SEQUENCES[::-1])
    }
    assert len(checksums) == 4


@pytest.mark.parametrize("kind", [tuple, np.array], ids=["tuples", "arrays"])
def test_sequences_of_another_kind_are_the_same_run(make_model, tmp_path, kind):
    """They have the same numbers, and one can go on from the other."""
    checkpoint, settings = tmp_path / "last.pt", {"n_steps": 4, "report_every": 2}
    history = run_told(make_model, checkpoint=checkpoint, **settings)[1]
    others = [kind(sequence) for sequence in SEQUENCES]
    assert run_told(make_model, sequences=others, **settings)[1] == history
    again = run_told(make_model, sequences=others, checkpoint=checkpoint, **settings)
    assert again[1] == history


def test_large_arrays_of_sequences_are_told_apart(make_model, tmp_path):
    """Also where numpy would print an ellipsis."""
    one = np.zeros((2000, 2), dtype=int)
    other = one.copy()
    other[1000] = 1
    settings = {"checkpoint": tmp_path / "last.pt", "n_steps": 1}
    settings["texts"] = [["a lemon", "a tent"]] * 2000
    run_told(make_model, sequences=one, **settings)
    with pytest.raises(ValueError, match="another run"):
        run_told(make_model, sequences=other, **settings)


WRONG = {
    "7 sequences, but 6 texts": (SEQUENCES, TOLD[:-1]),
    "6 sequences, but 7 texts": (SEQUENCES[:-1], TOLD),
    "3 pictures, but 2 texts": ([[0, 1, 2]], [["a lemon", "a tent"]]),
    "1 pictures, but 2 texts": ([[0]], [["a lemon", "a tent"]]),
    "1 pictures, but 7 texts": ([[0]], ["a lemon"]),
    "the caption is empty": ([[0, 1]], [["a lemon", ("", "")]]),
    "want a text or": ([[0, 1]], [["a lemon", ("a", None)]]),
    "<image>": ([[0, 1]], [["a lemon", ("a", "<image>")]]),
}


@pytest.mark.parametrize("message", WRONG)
def test_sequences_that_do_not_fit_are_refused(make_model, message):
    sequences, texts = WRONG[message]
    with pytest.raises(ValueError, match=message):
        run_told(make_model, sequences=sequences, texts=texts)


NOTHING = {
    "no picture in a sequence": ([[0], []], [["a lemon"], []]),
    "no sequences": ([], []),
}


@pytest.mark.parametrize("what", NOTHING)
def test_nothing_to_train_on_is_a_clear_error(make_model, what):
    sequences, texts = NOTHING[what]
    with pytest.raises(ValueError, match="are no sequences, or one .* has no picture"):
        run_told(make_model, sequences=sequences, texts=texts)


@pytest.mark.parametrize("number", [5, -6])
def test_a_picture_that_is_not_there_is_a_clear_error(make_model, number):
    message = f"sequence 0: there is no picture {number} among 5"
    with pytest.raises(ValueError, match=message):
        run_told(make_model, sequences=[[0, number]], texts=[["a lemon", "a tent"]])


def test_make_batch_picks_pictures_and_texts(make_model):
    _, _, tokenizer = make_model()
    batch = make_batch([4, 0], FEATURES, TOLD, tokenizer, "cpu", SEQUENCES)
    wanted = torch.stack([FEATURES[[4, 2]], FEATURES[[0, 1]]]).float()
    assert torch.equal(batch["vision_features"], wanted)
    examples = [(FEATURES[[4, 2]], TOLD[4]), (FEATURES[[0, 1]], TOLD[0])]
    for name, tensor in collate(examples, tokenizer).items():
        assert torch.equal(batch[name], tensor)


def test_caption_losses_of_sequences_equal_a_loop(small):
    """Rows of one to three pictures in one batch, and each alone."""
    model, _, tokenizer = small
    losses = caption_losses(model, tokenizer, FEATURES, TOLD, 4, SEQUENCES)
    assert losses.shape == (len(SEQUENCES),) and losses.isfinite().all()
    for pictures, texts, loss in zip(SEQUENCES, TOLD, losses, strict=True):
        batch = collate([(FEATURES[pictures], texts)], tokenizer)
        with torch.no_grad():
            alone = model(None, **batch).loss.item()
        assert alone == pytest.approx(loss.item(), abs=1e-4)


def test_what_is_given_is_not_learned(small):
    """The loss of a pair is that of its asked tokens, and not that of the whole."""
    model, _, tokenizer = small
    pairs = [("a bear above", "a tent"), ("a bear", "above a tent"), ("", TEXTS[2])]
    some = FEATURES[:1].expand(3, -1, -1, -1)
    losses = caption_losses(model, tokenizer, some, pairs)
    (whole,) = caption_losses(model, tokenizer, some[:1], TEXTS[2:3])
    assert losses[2].item() == pytest.approx(whole.item(), abs=1e-5)
    assert len({round(loss, 3) for loss in losses.tolist()}) == 3


# -------------------------------------------------------- checkpoints that do not fit


@pytest.fixture(scope="module")
def straight(make_model):
    """An undisturbed run: (what was trained, history)."""
    model, history = run(make_model)
    return trained_tensors(model), history


@pytest.fixture(scope="module")
def stopped(make_model, tmp_path_factory):
    """The folder of a run that was stopped at step 15, before its third checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Stopped):
        run(make_model, stop_at(15), checkpoint=folder / "last.pt")
    return folder


@pytest.fixture
def checkpoint(stopped, tmp_path):
    """A copy of its checkpoint, and beside it of the one before."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    return tmp_path / "last.pt"


def check_goes_on(make_model, checkpoint, straight):
    """From this checkpoint a new model comes to the same end as a straight run."""
    model, history = run(make_model, checkpoint=checkpoint)
    assert history == straight[1]
    for name, tensor in trained_tensors(model).items():
        assert torch.equal(tensor, straight[0][name]), name


def go_on(make_model, checkpoint, **kwargs):
    """Try to go on from a checkpoint that does not fit: ValueError, nothing changed.

    Returns:
        what the error says.
    """
    features, texts = kwargs.pop("features", FEATURES), kwargs.pop("texts", TEXTS)
    settings = {**SETTINGS, **kwargs.pop("settings", {})}
    model, _, tokenizer = make_model(**kwargs)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(7)  # not what the checkpoint holds
    on_disk, random_state = checkpoint.read_bytes(), torch.get_rng_state()
    with pytest.raises(ValueError) as caught:
        train(model, tokenizer, features, texts, **settings, checkpoint=checkpoint)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert checkpoint.read_bytes() == on_disk
    assert torch.equal(torch.get_rng_state(), random_state)
    assert str(checkpoint) in str(caught.value)
    return str(caught.value)


def test_the_random_states_go_on(make_model, checkpoint):
    """What torch draws after a resumed run is what it draws after a straight one."""
    saved = torch.load(checkpoint, weights_only=True)["random"]["cpu"]
    wanted = torch.rand(3, generator=torch.Generator().set_state(saved))
    model, _, tokenizer = make_model()
    torch.manual_seed(7)  # what a new process happens to have
    assert not torch.equal(torch.rand(3), wanted)
    settings = {**SETTINGS, "checkpoint": checkpoint, "report": silent}
    train(model, tokenizer, FEATURES, TEXTS, **settings)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_checkpoint_cut_short_is_an_error(make_model, checkpoint, straight, share):
    """It is not taken for a new start, and the one before it is there to go on from."""
    previous = checkpoint.with_name("last.pt.previous")
    os.truncate(checkpoint, int(share * checkpoint.stat().st_size))
    message = go_on(make_model, checkpoint)
    assert "cut short" in message and f"rename {previous}" in message
    os.replace(previous, checkpoint)
    assert torch.load(checkpoint, weights_only=True)["step"] == 5
    check_goes_on(make_model, checkpoint, straight)


def test_a_cut_first_checkpoint_has_none_before_it(make_model, checkpoint):
    checkpoint.with_name("last.pt.previous").unlink()
    os.truncate(checkpoint, 1000)
    assert "delete it to start anew" in go_on(make_model, checkpoint)


def test_a_wrong_bit_is_an_error(make_model, checkpoint):
    """In the middle of the weights, where torch.load would not notice."""
    damaged = bytearray(checkpoint.read_bytes())
    weights = torch.load(checkpoint, weights_only=True)["trained"]
    largest = max(weights.values(), key=torch.numel).numpy().tobytes()
    place = damaged.index(largest) + len(largest) // 2
    damaged[place] ^= 1
    checkpoint.write_bytes(damaged)
    torch.load(checkpoint, weights_only=True)  # does not notice
    assert "damaged" in go_on(make_model, checkpoint)


class RunsCode:
    """Pickled, it makes a file when it is read back."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_not_run(make_model, checkpoint, tmp_path, form):
    made = tmp_path / "made"
    state = torch.load(checkpoint, weights_only=True) | {"history": RunsCode(made)}
    if form == "torch":
        torch.save(state, checkpoint)
    else:
        checkpoint.write_bytes(pickle.dumps(state["history"]))
    go_on(make_model, checkpoint)
    assert not made.exists()
    if form == "torch":  # it is no dud
        torch.load(checkpoint, weights_only=False)
    else:
        pickle.loads(checkpoint.read_bytes())
    assert made.exists()


OTHERS = {
    "n_steps is 20 there, 10 here": {"settings": {"n_steps": 10}},
    "n_steps is 20 there, 40 here": {"settings": {"n_steps": 40}},
    "batch_size is 2 there, 3 here": {"settings": {"batch_size": 3}},
    "seed is 3 there, 4 here": {"settings": {"seed": 4}},
    "lr is 0.001 there, 0.002 here": {"settings": {"lr": 2e-3}},
    "gate_factor is 30.0 there, 1.0 here": {"settings": {"gate_factor": 1.0}},
    "with_muon is True there, False here": {"settings": {"with_muon": False}},
    "pictures is [5, 1, 16, 32] there, [4, 1, 16, 32] here": {
        "features": FEATURES[:-1],
        "texts": TEXTS[:-1],
    },
    "checksum of the texts": {"texts": [*TEXTS[:-1], "a bee"]},
    "perceiver.latents is ((4, 32), torch.float32) there, ((6, 32), torch.float32)": {
        "perceiver_kwargs": {**SMALL["perceiver_kwargs"], "num_latents": 6}
    },
    "perceiver.layers.1.0.to_q.weight is ((32, 32), torch.float32) there, not here": {
        "perceiver_kwargs": {**SMALL["perceiver_kwargs"], "depth": 1}
    },
    "perceiver.layers.2.0.to_q.weight is missing there": {
        "perceiver_kwargs": {**SMALL["perceiver_kwargs"], "depth": 3}
    },
}


@pytest.mark.parametrize("message", OTHERS)
def test_a_checkpoint_of_another_run_is_an_error(make_model, checkpoint, message):
    """The error names what differs."""
    assert message in go_on(make_model, checkpoint, **OTHERS[message])


SPOILT = {
    "a weight missing": lambda state: state["trained"].pop("perceiver.latents"),
    "an optimizer missing": lambda state: state["optimizers"].pop(),
    "the optimizers exchanged": lambda state: state["optimizers"].reverse(),
    "no random states": lambda state: state.pop("random"),
    "no random bytes": lambda state: state["random"].update(cpu=torch.zeros(3)),
    "no settings": lambda state: state.pop("settings"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_checkpoint_with_something_wrong_changes_nothing(make_model, checkpoint, how):
    state = torch.load(checkpoint, weights_only=True)
    SPOILT[how](state)
    torch.save(state, checkpoint)
    go_on(make_model, checkpoint)


def test_another_file_is_no_checkpoint(make_model, checkpoint):
    for other in ([1, 2], {"weights": torch.ones(2)}, torch.ones(2)):
        torch.save(other, checkpoint)
        assert "no checkpoint of `train`" in go_on(make_model, checkpoint)


def test_a_folder_that_is_not_there_is_an_error_at_once(make_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        run(make_model, stop_at(5), checkpoint=tmp_path / "nowhere" / "last.pt")


def test_numbers_of_numpy_can_be_read_back(make_model, tmp_path, straight):
    """A checkpoint that holds one would be refused by `weights_only`."""
    settings = {
        "n_steps": np.int64(20),
        "batch_size": np.int32(2),
        "lr": np.float64(1e-3),
        "gate_factor": np.float32(30),
        "with_muon": np.True_,
        "seed": np.int64(3),
    }
    with pytest.raises(Stopped):
        run(make_model, stop_at(15), checkpoint=tmp_path / "last.pt", **settings)
    check_goes_on(make_model, tmp_path / "last.pt", straight)


# ------------------------------------------------------------------------ a full disk


class FullDisk:
    """A file that has room for half of what is written to it."""

    def __init__(self, path, mode):
        self.file = open(path, mode)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, contents):
        self.file.write(contents[: len(contents) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def symbolic_link(checkpoint, monkeypatch):
    """Linux's own full disk, under the temporary file's name."""
    name = f"last.pt.{os.getpid()}.tmp"
    (checkpoint.parent / name).symlink_to("/dev/full")


def half_a_write(checkpoint, monkeypatch):
    monkeypatch.setattr(checkpoints, "open", FullDisk, raising=False)


def no_sync(checkpoint, monkeypatch):
    """Some file systems say only then that the disk is full."""

    def fail(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)


@pytest.mark.parametrize("full_disk", [symbolic_link, half_a_write, no_sync])
def test_a_full_disk_leaves_the_last_checkpoint(
    make_model, checkpoint, straight, monkeypatch, full_disk
):
    """It stops the training with a clear error; with room again, training goes on."""
    folder = checkpoint.parent
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        if full_disk is symbolic_link and not Path("/dev/full").exists():
            pytest.skip("this system has no /dev/full")
        full_disk(checkpoint, patch)
        with pytest.raises(OSError, match="the last good one is still there") as caught:
            run(make_model, checkpoint=checkpoint)
    assert caught.value.errno == errno.ENOSPC
    assert "No space left" in str(caught.value) and str(checkpoint) in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    check_goes_on(make_model, checkpoint, straight)


def test_a_full_disk_at_the_first_checkpoint(make_model, tmp_path, monkeypatch):
    """There is no good one yet, and the error does not say that there is."""
    half_a_write(tmp_path / "last.pt", monkeypatch)
    with pytest.raises(OSError, match="not written, none was there: No space left"):
        run(make_model, checkpoint=tmp_path / "last.pt")
    assert list(tmp_path.iterdir()) == []


def test_without_hard_links_a_checkpoint_is_written_all_the_same(
    make_model, tmp_path, monkeypatch
):
    def refuse(*paths):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    run(make_model, checkpoint=tmp_path / "last.pt")
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 20
    assert list(tmp_path.iterdir()) == [tmp_path / "last.pt"]


# ------------------------------------------------------------------ batches, schedule


@pytest.mark.parametrize("n_pictures, batch_size", [(10, 5), (11, 5), (7, 3)])
def test_batches_are_known_from_the_seed(n_pictures, batch_size):
    """An epoch shows no picture twice; another epoch has another order."""
    per_epoch, lengths = n_pictures // batch_size, (1,) * n_pictures
    steps = range(2 * per_epoch)
    batches = [batch_for_step(lengths, batch_size, step, 0) for step in steps]
    again = [batch_for_step(lengths, batch_size, step, 0) for step in steps]
    assert batches == again
    for epoch in (batches[:per_epoch], batches[per_epoch:]):
        shown = sum(epoch, [])
        assert len(shown) == len(set(shown)) == per_epoch * batch_size
        assert set(shown) <= set(range(n_pictures))
    assert batches[:per_epoch] != batches[per_epoch:]
    assert batches[0] != batch_for_step(lengths, batch_size, 0, 1)


def test_fewer_pictures_than_a_batch():
    assert sorted(batch_for_step((1, 1, 1), 8, step=4, seed=0)) == [0, 1, 2]


def batches_of_an_epoch(lengths, batch_size):
    """How many batches an epoch should have."""
    n_batches = 0
    for T_img in set(lengths):
        n_batches += max(1, lengths.count(T_img) // max(1, batch_size // T_img))
    return n_batches


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=30).map(tuple),
    st.integers(1, 12),
    st.integers(0, 2**32),
)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_batches_of_sequences(lengths, batch_size, seed):
    """One length in a batch, about so many pictures; an epoch repeats nothing."""
    per_epoch = batches_of_an_epoch(lengths, batch_size)
    for epoch in range(3):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        batches = [batch_for_step(lengths, batch_size, step, seed) for step in steps]
        shown = sum(batches, [])
        assert len(shown) == len(set(shown))
        assert set(shown) <= set(range(len(lengths)))
        for rows in batches:
            (T_img,) = {lengths[row] for row in rows}
            wanted = max(1, batch_size // T_img)  # sequences
            assert len(rows) == min(wanted, lengths.count(T_img))
        for T_img in set(lengths):  # what waits does not fill a batch
            n = sum(lengths[row] == T_img for row in shown)
            rows = max(1, batch_size // T_img)
            assert 0 <= lengths.count(T_img) - n < rows


def test_what_waited_comes_in_another_epoch():
    """Long and short are mixed, and in the end all have been shown about as often."""
    lengths = (1,) * 11 + (2,) * 5 + (3,) * 4
    per_epoch = batches_of_an_epoch(lengths, 4)  # 2 + 2 + 4 batches
    assert per_epoch == 8
    n_epochs, shown, kinds = 60, Counter(), Counter()
    for step in range(n_epochs * per_epoch):
        rows = batch_for_step(lengths, 4, step, seed=0)
        shown.update(rows)
        kinds[step % per_epoch, lengths[rows[0]]] += 1
    assert set(shown) == set(range(len(lengths)))
    assert min(shown.values()) > 0.5 * n_epochs
    assert len(kinds) == 3 * per_epoch, "some length always comes at the same place"


def test_a_batch_may_be_changed_without_harm():
    rows = batch_for_step((1,) * 6, 3, step=0, seed=0)
    before = list(rows)
    rows.reverse()
    assert batch_for_step((1,) * 6, 3, step=0, seed=0) == before


def test_schedule():
    shares = [schedule(step, 400, warmup=50) for step in range(400)]
    assert 0 < shares[0] < 0.05 and max(shares) == 1.0
    assert shares[:50] == sorted(shares[:50])
    assert shares[50:] == sorted(shares[50:], reverse=True)
    assert shares[-1] < 0.001


# --------------------------------------------------------------------------- reports


def test_caption_losses_equal_a_loop(small):
    """Batching and padding change nothing: the model's own loss, one row at a time."""
    model, _, tokenizer = small
    losses = caption_losses(model, tokenizer, FEATURES, TEXTS, batch_size=2)
    assert losses.shape == (len(TEXTS),)
    for features, text, loss in zip(FEATURES, TEXTS, losses, strict=True):
        batch = collate([(features[None], [text])], tokenizer)
        with torch.no_grad():
            assert model(None, **batch).loss.item() == pytest.approx(
                loss.item(), abs=1e-4
            )


def test_bootstrap_interval():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    mean, low, high = bootstrap_interval(values)
    assert mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20  # what theory says for a mean of 400
    assert low == pytest.approx(mean - half, abs=0.05)
    assert high == pytest.approx(mean + half, abs=0.05)
    assert bootstrap_interval(values) == (mean, low, high)
    assert bootstrap_interval(torch.ones(5)) == (1.0, 1.0, 1.0)


def test_bootstrap_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        _, low, high = bootstrap_interval(
            rng.random(100) < 0.3, n_samples=300, seed=seed
        )
        hits += low <= 0.3 <= high
    assert 0.88 < hits / 200 < 0.99  # intervals that are too wide hit each time
