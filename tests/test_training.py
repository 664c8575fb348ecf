"""Training: resumes to the same numbers, bit for bit; batches, losses and intervals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_features

from flamingo_lite import (
    batch_for_step,
    bootstrap_interval,
    caption_features,
    caption_losses,
    collate,
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


def stop_at(step):
    """A report that interrupts training when it comes to a step."""

    def report(line):
        if line.split()[1] == str(step):
            raise KeyboardInterrupt

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
    with pytest.raises(KeyboardInterrupt):
        run(make_model, stop_at(15), checkpoint=checkpoint)
    assert torch.load(checkpoint, weights_only=True)["step"] == 10
    resumed, history_again = run(make_model, checkpoint=checkpoint)
    assert history_again == history
    wanted = straight.state_dict()
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    assert list(tmp_path.iterdir()) == [checkpoint], "something was left behind"


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


def test_a_damaged_checkpoint_is_an_error(make_model, tmp_path):
    """Cut short, it is not taken for a new start."""
    checkpoint = tmp_path / "last.pt"
    run(make_model, checkpoint=checkpoint, n_steps=5)
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) // 2])
    with pytest.raises((RuntimeError, OSError, ValueError)):
        run(make_model, checkpoint=checkpoint)


def test_a_write_that_fails_leaves_the_last_checkpoint(
    make_model, tmp_path, monkeypatch
):
    """A full disk stops the writing half way; the checkpoint before it is whole."""
    checkpoint = tmp_path / "last.pt"
    run(make_model, checkpoint=checkpoint, n_steps=5)
    before = checkpoint.read_bytes()

    def full_disk(state, path, *args, **kwargs):
        Path(path).write_bytes(b"half of a")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run(make_model, checkpoint=checkpoint, n_steps=10)
    assert checkpoint.read_bytes() == before


# ------------------------------------------------------------------ batches, schedule


@pytest.mark.parametrize("n_pictures, batch_size", [(10, 5), (11, 5), (7, 3)])
def test_batches_are_known_from_the_seed(n_pictures, batch_size):
    """An epoch shows no picture twice; another epoch has another order."""
    per_epoch = n_pictures // batch_size
    batches = [
        batch_for_step(n_pictures, batch_size, s, 0) for s in range(2 * per_epoch)
    ]
    again = [batch_for_step(n_pictures, batch_size, s, 0) for s in range(2 * per_epoch)]
    assert batches == again
    for epoch in (batches[:per_epoch], batches[per_epoch:]):
        shown = sum(epoch, [])
        assert len(shown) == len(set(shown)) == per_epoch * batch_size
        assert set(shown) <= set(range(n_pictures))
    assert batches[:per_epoch] != batches[per_epoch:]
    assert batches[0] != batch_for_step(n_pictures, batch_size, 0, 1)


def test_fewer_pictures_than_a_batch():
    assert sorted(batch_for_step(3, 8, step=4, seed=0)) == [0, 1, 2]


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


def test_caption_features_equal_a_loop(small):
    model, _, tokenizer = small
    captions = caption_features(model, tokenizer, FEATURES, batch_size=3)
    alone = [caption_features(model, tokenizer, one[None])[0] for one in FEATURES]
    assert captions == alone
    assert all(isinstance(text, str) and text == text.strip() for text in captions)


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
    assert 0.88 < hits / 200 <= 1.0
