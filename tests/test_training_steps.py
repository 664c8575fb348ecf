"""Steps of a training: what they leave out, in which precision, in how many parts.

And what a run says while it goes, what Ctrl-C leaves, and what features may be.
"""

import copy
import itertools
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_features, random_pixels

from flamingo_lite import (
    Muon,
    NotFinite,
    Precision,
    batch_for_step,
    caption_losses,
    check_examples,
    choose_precision,
    freeze_in,
    is_report,
    learning_parameters,
    load_flamingo,
    make_batch,
    make_optimizers,
    muon_pays,
    orthogonalise,
    read_checkpoint,
    reports,
    save_flamingo,
    steps,
    train,
    trained_tensors,
    training,
    training_step,
)

TEXTS = [
    "a lemon",
    "a tent",
    "a bear above a tent",
    "a bee",
    "a fox to the left of a bee",
    "a cup",
]
FEATURES = random_features(len(TEXTS), 1, seed=5)[:, 0].half()
SETTINGS = {"n_steps": 12, "batch_size": 2, "report_every": 4, "seed": 3}


def silent(line):
    """A report that no one reads."""


def go(built, features=FEATURES, texts=TEXTS, **kwargs):
    """Train: history."""
    model, _, tokenizer = built
    kwargs = {**SETTINGS, "report": silent, **kwargs}
    return train(model, tokenizer, features, texts, **kwargs)


def check_same(one, other):
    wanted = other.state_dict()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def losses_of(history):
    return [note["loss"] for note in history]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Nothing is read but at a report, as on a device where reading costs."""
    for module in (steps, training):
        monkeypatch.setattr(module, "is_read_at_once", lambda device: False)


# --------------------------------------------------------- nothing is read in between


def test_not_reading_changes_nothing(make_model, as_on_a_gpu, monkeypatch):
    later, kwargs = make_model(), {"with_muon": False}
    history = go(later, **kwargs)
    monkeypatch.undo()
    at_once = make_model()
    assert go(at_once, **kwargs) == history
    check_same(later[0], at_once[0])


def test_not_reading_changes_nothing_of_muon(make_model, as_on_a_gpu, monkeypatch):
    """But the order of a sum."""
    history = go(make_model(), with_muon=True)
    monkeypatch.undo()
    wanted = go(make_model(), with_muon=True)
    np.testing.assert_allclose(losses_of(history), losses_of(wanted), atol=1e-4)


def spoil(monkeypatch, step, how):
    """Spoil the batch, or the gradient, of one step."""
    right, calls = training.training_step, []

    def wrong(model, batches, *others):
        calls.append(step)
        if len(calls) == step and how == "loss":
            batches[0]["vision_features"] *= float("nan")
        if len(calls) == step and how == "gradient":
            gate = model.lang_encoder.gated_cross_attn_layers[0].attn_gate
            hook = gate.register_hook(lambda gradient: gradient * float("inf"))
            try:
                return right(model, batches, *others)
            finally:
                hook.remove()
        return right(model, batches, *others)

    monkeypatch.setattr(training, "training_step", wrong)


@pytest.mark.parametrize("with_muon", [False, True])
@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_later_noticed_nothing_has_moved(
    make_model, as_on_a_gpu, monkeypatch, tmp_path, how, with_muon
):
    """Step 6 is not finite; at the report after step 8 all is as after step 5."""

    class Stopped(Exception):
        pass

    def stop(line):
        if line.split()[1] == "5":
            raise Stopped

    kwargs = {"with_muon": with_muon}
    straight = make_model()
    with pytest.raises(Stopped):
        go(straight, report=stop, report_every=5, **kwargs)
    spoil(monkeypatch, 6, how)
    built, path = make_model(), tmp_path / "last.pt"
    with pytest.raises(NotFinite) as caught:
        go(built, checkpoint=path, **kwargs)
    message = str(caught.value)
    what = {"loss": "loss is nan", "gradient": "length of the gradient is"}[how]
    assert f"step 6 not taken: the {what}" in message and "with the texts" in message
    check_same(built[0], straight[0])
    assert read_checkpoint(path)["step"] == 4


@pytest.mark.parametrize("with_muon", [True, False], ids=["Muon", "AdamW"])
def test_a_step_left_out_changes_no_average(make_model, with_muon):
    model, _, _ = make_model()
    learning = learning_parameters(model)
    optimizers = make_optimizers(model, 1e-2, with_muon=with_muon)

    def step(gradient, left_out):
        """All weights and averages after a step."""
        for p in learning.values():
            p.grad = torch.full_like(p, gradient)
        for o in optimizers:
            o.grad_scale, o.found_inf = None, torch.tensor(left_out)
            o.step()
        states = enumerate(state for o in optimizers for state in o.state.values())
        averages = {(n, name): t for n, state in states for name, t in state.items()}
        return copy.deepcopy([{n: p.detach() for n, p in learning.items()}, averages])

    first, left_out = step(0.5, 0.0), step(float("nan"), 1.0)
    for one, other in zip(first, left_out, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)
    later = step(0.5, 0.0)
    assert not torch.equal(later[0]["perceiver.latents"], first[0]["perceiver.latents"])


def test_ctrl_c_of_what_was_not_read_is_saved_whole(make_model, as_on_a_gpu, tmp_path):
    """Losses that waited on the device are in the checkpoint."""
    path = tmp_path / "last.pt"
    straight = go(make_model())
    with pytest.raises(KeyboardInterrupt):
        go(interrupted_in_step(make_model(), 6), checkpoint=path)
    state = read_checkpoint(path)
    assert state["step"] == 6 and state["history"] == straight[:6]


# ------------------------------------------------------------------------- precision


class Capable:
    """Stands for a CUDA device's compute capability."""

    def __init__(self, *version):
        self.version = version

    def __call__(self, device):
        return self.version


@pytest.mark.parametrize(
    "version, name",
    [((7, 5), "float16"), ((7, 0), "float16"), ((8, 0), "bfloat16"), ((8, 9),) * 2],
)
def test_the_device_chooses_the_precision(monkeypatch, version, name):
    name = "bfloat16" if version == (8, 9) else name
    monkeypatch.setattr(torch.cuda, "get_device_capability", Capable(*version))
    assert choose_precision("cuda") == choose_precision(torch.device("cuda:0")) == name
    assert choose_precision("cpu") == choose_precision("mps") == "float32"


def test_an_unknown_precision_is_refused(make_model):
    with pytest.raises(ValueError, match="precision is one of .*float16"):
        go(make_model(), precision="half")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_sixteen_bits_train_as_thirty_two(make_model, precision):
    """About; weights, gates and losses are float32, and products are not."""
    settings = {"lr": 1e-2, "n_steps": 24}
    kinds, wanted = set(), losses_of(go(make_model(), **settings))
    built = make_model()
    layer = built[0].lang_encoder.gated_cross_attn_layers[1].attn.to_q
    layer.register_forward_hook(lambda *args: kinds.add(args[2].dtype))
    losses = losses_of(go(built, precision=precision, **settings))
    assert kinds == {getattr(torch, precision)}
    assert losses != wanted
    np.testing.assert_allclose(losses, wanted, atol=0.1)
    learning = learning_parameters(built[0])
    assert {p.dtype for p in learning.values()} == {torch.float32}
    assert wanted[0] - wanted[-1] > 0.3, "nothing was learned that could be compared"


def test_no_copy_of_a_weight_outlives_a_step(make_model, monkeypatch):
    """One autocast block around all steps is the fault; the losses show it."""
    wanted = losses_of(go(make_model(), lr=1e-2))
    lasting = torch.autocast("cpu", torch.bfloat16)

    class Nothing:
        def __enter__(self):
            if not torch.is_autocast_enabled("cpu"):
                lasting.__enter__()

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(Precision, "autocast", lambda self: Nothing())
    try:
        losses = losses_of(go(make_model(), lr=1e-2, precision="bfloat16"))
    finally:
        lasting.__exit__(None, None, None)
    assert abs(losses[-1] - wanted[-1]) > 0.2


@pytest.mark.parametrize("later", [False, True])
def test_an_overflow_is_left_out_and_counted(
    make_model, monkeypatch, tmp_path, later, request
):
    """In float16 a gradient of inf halves the scale; the run goes on."""
    if later:
        request.getfixturevalue("as_on_a_gpu")
    spoil(monkeypatch, 6, "gradient")
    logged, lines, path = [], [], tmp_path / "last.pt"
    built = make_model()
    kwargs = {"precision": "float16", "report": lines.append, "checkpoint": path}
    history = go(built, log=logged.append, **kwargs)
    assert len(history) == 12 and [n["skipped"] for n in logged] == [0, 1, 1]
    assert "1 steps left out" in lines[-1] and "left out" not in lines[0]
    state = read_checkpoint(path)["precision"]
    assert state == {
        "name": "float16",
        "scale": 2.0**15,
        "good_steps": 6,
        "skipped": 1,
    }


def test_a_step_that_overflows_moves_nothing(make_model):
    model, _, tokenizer = make_model(gates=1.0)
    batch = make_batch([0, 1], FEATURES, TEXTS, tokenizer, "cpu")
    optimizers = make_optimizers(model, 1e-2, with_muon=True)
    precision = Precision("float16", "cpu", scale=2.0**40)  # far too large
    before = copy.deepcopy(model)
    training_step(model, batch, optimizers, 1.0, precision)
    assert precision.skipped == 1 and precision.scale == 2.0**39
    check_same(model, before)
    assert not any(o.state for o in optimizers)
    precision.scale.fill_(2.0**10)
    training_step(model, batch, optimizers, 1.0, precision)
    assert precision.skipped == 1
    assert not torch.equal(model.perceiver.latents, before.perceiver.latents)


def test_the_scale_leaves_no_trace_in_the_gradient(make_model):
    """Clipped, it is what it is without a scale."""
    model, _, tokenizer = make_model(gates=1.0)
    batch = make_batch([0, 1], FEATURES, TEXTS, tokenizer, "cpu")
    found = []
    for scale in (1.0, 2.0**12):
        precision = Precision("float16", "cpu", scale=scale)
        training_step(model, batch, [], 1.0, precision)
        found.append((precision.norm, model.perceiver.latents.grad.clone()))
    (norm, gradient), (norm_scaled, scaled) = found
    torch.testing.assert_close(norm_scaled, norm, rtol=0.02, atol=0)
    torch.testing.assert_close(scaled, gradient, rtol=0.1, atol=1e-3)
    assert (
        0.01 < gradient.norm() and (scaled - gradient).norm() < 0.02 * gradient.norm()
    )


def test_a_run_in_float16_goes_on_with_its_scale(make_model, tmp_path, monkeypatch):
    """Stopped and gone on: the same bits, the scale among them."""
    right = Precision.__init__

    def impatient(self, name, device):
        right(self, name, device, patience=5)

    monkeypatch.setattr(Precision, "__init__", impatient)
    straight, path = make_model(), tmp_path / "last.pt"
    whole = tmp_path / "whole.pt"
    kwargs = {"precision": "float16"}
    history = go(straight, checkpoint=whole, **kwargs)
    with pytest.raises(KeyboardInterrupt):
        go(interrupted_in_step(make_model(), 7), checkpoint=path, **kwargs)
    saved = read_checkpoint(path)["precision"]
    assert saved["scale"] == 2.0**17 and saved["good_steps"] == 2
    resumed = make_model()
    assert go(resumed, checkpoint=path, **kwargs) == history
    check_same(resumed[0], straight[0])
    assert read_checkpoint(path)["precision"] == read_checkpoint(whole)["precision"]


def test_another_precision_goes_on_without_the_scale(make_model, tmp_path):
    """Colab may give another GPU than the last time."""
    path = tmp_path / "last.pt"
    kwargs = {"checkpoint": path, "precision": "float16"}
    with pytest.raises(KeyboardInterrupt):
        go(interrupted_in_step(make_model(), 7), **kwargs)
    assert len(go(make_model(), checkpoint=path, precision="float32")) == 12
    assert read_checkpoint(path)["precision"]["scale"] == 1.0


@pytest.mark.parametrize(
    "wrong", [{"scale": float("inf")}, {"scale": 1}, {"name": 3}, {"more": 1}, 5]
)
def test_a_checkpoint_with_another_scale_is_refused(make_model, tmp_path, wrong):
    path = tmp_path / "last.pt"
    go(make_model(), checkpoint=path)
    state = torch.load(path, weights_only=True)
    is_dict = isinstance(wrong, dict)
    state["precision"] = {**state["precision"], **wrong} if is_dict else wrong
    torch.save(state, path)
    with pytest.raises(ValueError, match="damaged, cut short, or no checkpoint"):
        go(make_model(), checkpoint=path)


# ---------------------------------------------------- frozen parts kept in 16 bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_frozen_parts_in_sixteen_bits_train_and_are_saved(make_model, tmp_path, dtype):
    wanted = losses_of(go(make_model(), n_steps=4))
    built = make_model()
    assert freeze_in(built[0], dtype) > 0 == freeze_in(built[0], dtype)
    half = [n for n, p in built[0].named_parameters() if p.dtype == dtype]
    assert any("vision" in n for n in half) and any("fc1" in n for n in half)
    assert not set(half) & set(learning_parameters(built[0]))
    for precision in ("float32", "float16"):
        losses = losses_of(go(copy.deepcopy(built), n_steps=4, precision=precision))
        np.testing.assert_allclose(losses, wanted, atol=0.1)
    go(built, n_steps=4)
    save_flamingo(built[0], tmp_path)
    again, _, tokenizer = load_flamingo(tmp_path)
    for name, tensor in trained_tensors(again).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, trained_tensors(built[0])[name]), name
    freeze_in(again, dtype)
    data = tokenizer, FEATURES, TEXTS
    torch.testing.assert_close(
        caption_losses(again, *data), caption_losses(built[0], *data)
    )


def test_only_sixteen_bits_and_only_frozen_towers(make_model):
    with pytest.raises(ValueError, match="want torch.bfloat16 or"):
        freeze_in(make_model()[0], torch.float64)
    model = make_model()[0]
    model.vision_encoder.requires_grad_(True)
    with pytest.raises(ValueError, match="is being trained"):
        freeze_in(model, torch.float16)


# ------------------------------------------------------------- one step in many parts


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_parts_have_the_gradient_of_the_whole(make_model, parts):
    """Texts differ in length, so that a mean of means would be another number."""
    model, _, tokenizer = make_model(gates=1.0)

    def gradient(batches):
        loss = training_step(model, batches, [], 1.0)
        grads = {n: p.grad.clone() for n, p in learning_parameters(model).items()}
        return loss, grads

    rows = np.array_split(range(6), parts)
    data = FEATURES, TEXTS, tokenizer, "cpu"
    loss, grads = gradient([make_batch(part.tolist(), *data) for part in rows])
    wanted_loss, wanted = gradient(make_batch(range(6), *data))
    torch.testing.assert_close(loss, wanted_loss, atol=1e-5, rtol=0)
    for name in wanted:
        torch.testing.assert_close(grads[name], wanted[name], atol=1e-5, rtol=1e-4)


def test_accumulated_steps_are_those_of_a_larger_batch(make_model):
    whole, parts = make_model(), make_model()
    wanted = go(whole, batch_size=6, n_steps=5, with_muon=True)
    history = go(parts, batch_size=2, accumulate=3, n_steps=5, with_muon=True)
    np.testing.assert_allclose(losses_of(history), losses_of(wanted), atol=1e-5)
    for name, tensor in trained_tensors(parts[0]).items():
        other = trained_tensors(whole[0])[name]
        torch.testing.assert_close(tensor, other, atol=1e-4, rtol=0)


def test_accumulate_and_warmup_are_part_of_a_run(make_model, tmp_path):
    path = tmp_path / "last.pt"
    kwargs = {"checkpoint": path, "accumulate": 2, "warmup": 3}
    straight = make_model()
    history = go(straight, **{**kwargs, "checkpoint": None})
    with pytest.raises(KeyboardInterrupt):
        go(interrupted_in_step(make_model(), 10), **kwargs)
    for other in ({"accumulate": 1}, {"warmup": 50}):
        with pytest.raises(ValueError, match=f"{next(iter(other))} is . there, "):
            go(make_model(), **{**kwargs, **other})
    resumed = make_model()
    assert go(resumed, **kwargs) == history
    check_same(resumed[0], straight[0])
    assert losses_of(go(make_model(), accumulate=2)) != losses_of(history)


@pytest.mark.parametrize("name, value", [("accumulate", 0), ("warmup", -1)])
def test_numbers_that_cannot_be_used(make_model, name, value):
    with pytest.raises(ValueError, match=f"{name}: want a whole number"):
        go(make_model(), **{name: value})


# ------------------------------------------------------------------ what a run says


def test_a_report_gives_numbers(make_model):
    built, logged, lines = make_model(gates=1.0), [], []
    own = random_features(3, 1, seed=8)[:, 0].half()
    held_out = own, ["a tent", "a bee above a cup", "a lemon"]
    kwargs = {"validation": held_out, "log": logged.append, "report": lines.append}
    history = go(built, **kwargs)
    assert [numbers["step"] for numbers in logged] == [4, 8, 12]
    last = logged[-1]
    names = "step loss pictures_per_second seconds_left memory skipped true shuffled"
    assert set(last) == set(names.split())
    assert last["loss"] == pytest.approx(np.mean(losses_of(history[-4:])))
    assert last["seconds_left"] == 0 < logged[0]["seconds_left"]
    assert last["pictures_per_second"] > 0 and last["memory"] > 1e7
    assert f"true {last['true']:.3f}  shuffled {last['shuffled']:.3f}" in lines[-1]
    model, _, tokenizer = built
    data = tokenizer, own, held_out[1]
    n_asked = [len(ids) for ids in tokenizer(held_out[1]).input_ids]
    losses = caption_losses(model, *data)
    assert last["true"] == pytest.approx(np.average(losses, weights=n_asked), abs=1e-4)
    others = caption_losses(model, tokenizer, own.roll(-1, dims=0), held_out[1])
    wanted = np.average(others, weights=n_asked)
    assert last["shuffled"] == pytest.approx(wanted, abs=1e-4) != last["true"]


def test_a_look_at_other_pictures_changes_nothing(make_model):
    straight, watched = make_model(), make_model()
    history = go(straight)
    drawn = torch.get_rng_state()

    def noisy(module, inputs, output):
        torch.rand(3)

    watched[0].perceiver.register_forward_hook(noisy)
    assert go(watched, validation=(FEATURES, TEXTS)) == history
    check_same(watched[0], straight[0])
    assert not torch.equal(torch.get_rng_state(), drawn)  # the steps do draw


@pytest.mark.parametrize(
    "validation, message",
    [
        ((FEATURES[:2], TEXTS), "validation: 2 pictures, but 6 texts"),
        ((FEATURES[:1, :, :, :4], TEXTS[:1]), "validation: features are"),
        ((FEATURES[:1], ["a <image>"]), "validation: texts.0."),
        (FEATURES, "validation: want .features, texts."),
    ],
)
def test_a_validation_that_does_not_fit(make_model, validation, message):
    with pytest.raises(ValueError, match=message):
        go(make_model(), validation=validation, report=pytest.fail)


def test_the_first_reports_come_early():
    at = {
        every: [s for s in range(1, 301) if is_report(s, 300, every)]
        for every in (0, 4, 20, 100)
    }
    assert at == {
        0: [300],
        4: list(range(4, 301, 4)),
        20: [1, *range(20, 301, 20)],
        100: [1, 10, 100, 200, 300],
    }


def test_early_lines_write_no_checkpoint(make_model, tmp_path):
    path, seen = tmp_path / "last.pt", []
    go(
        make_model(),
        report_every=10,
        checkpoint=path,
        report=lambda line: seen.append((line.split()[1], path.exists())),
    )
    assert seen == [("1", False), ("10", False), ("12", True)]


# ------------------------------------------------------------------ what ends it early


def test_too_little_memory_says_what_to_change(make_model, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    built = make_model()
    monkeypatch.setattr(built[0].perceiver, "forward", full)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        go(built, batch_size=8, accumulate=2)
    says = str(caught.value)
    assert "step 1: CUDA out of memory. Take batch_size=4 and accumulate=4" in says
    assert "gradient_checkpointing=True" in says and not built[0].training
    for sizes, line in (
        ((6, 1), "batch_size=3 and accumulate=2"),
        ((5, 2), "batch_size=1 and accumulate=10"),
        ((1, 2), "out of memory. Build the model with"),
    ):
        with pytest.raises(torch.OutOfMemoryError) as caught:
            go(built, batch_size=sizes[0], accumulate=sizes[1])
        assert line in str(caught.value)


def test_too_little_memory_for_a_validation_says_so_too(make_model, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(training, "validation_losses", full)
    with pytest.raises(torch.OutOfMemoryError, match="Take batch_size=1 and"):
        go(make_model(), validation=(FEATURES, TEXTS))


def test_a_validation_takes_no_more_pictures_at_a_time_than_a_step(
    make_model, monkeypatch
):
    sizes, read = [], reports.make_batch

    def count(rows, *args, **kwargs):
        batch = read(rows, *args, **kwargs)
        sizes.append(batch["vision_features"].shape[:2].numel())
        return batch

    monkeypatch.setattr(reports, "make_batch", count)
    pairs = [[0, 1], [2, 3], [4, 5]]
    told = [[TEXTS[i] for i in pair] for pair in pairs]
    for validation in ((FEATURES, TEXTS), (FEATURES, told, pairs)):
        go(make_model(), n_steps=1, batch_size=4, validation=validation)
    assert sizes and max(sizes) <= 4


def test_the_shuffled_control_shows_another_picture(small):
    """Also where a picture stands five times in a row, once for each caption."""
    assert reports._step_to_others(FEATURES) == 1
    for several in (FEATURES.repeat_interleave(5, 0), FEATURES[:2].repeat(5, 1, 1, 1)):
        others = reports._OtherPicture(several)
        here, there = several, others[list(range(len(several)))]
        same = [torch.equal(a, b) for a, b in zip(here, there, strict=True)]
        assert sum(same) <= 1, same


def test_each_losses_logits_are_made_at_labels_only(small, monkeypatch):
    model, _, tokenizer = small
    rows, head = [], model.lang_encoder.get_output_embeddings()
    hook = head.register_forward_hook(lambda *args: rows.append(args[2].shape[:-1]))
    found = caption_losses(model, tokenizer, FEATURES, TEXTS, batch_size=4)
    hook.remove()
    assert all(len(shape) == 1 or not shape.numel() for shape in rows), rows
    asked = make_batch(range(len(TEXTS)), FEATURES, TEXTS, tokenizer, "cpu")["labels"]
    n_asked = int((asked[:, 1:] != -100).sum())
    assert sum(shape[0] for shape in rows if len(shape) == 1) == n_asked
    for row, loss in enumerate(found.tolist()):
        batch = make_batch([row], FEATURES, TEXTS, tokenizer, torch.device("cpu"))
        with torch.no_grad():
            wanted = model(None, **batch).loss.item()
        assert loss == pytest.approx(wanted, rel=1e-5)


def test_a_report_counts_the_pictures_and_the_losses_that_were(make_model, monkeypatch):
    """Two pictures are two, whatever batch was asked for; a loss is told once."""
    told, clock = [], SimpleNamespace(perf_counter=itertools.count(0.0).__next__)
    monkeypatch.setattr(training, "time", clock)  # a second from look to look
    few = {"n_steps": 5, "batch_size": 64, "report_every": 3, "log": told.append}
    losses = losses_of(go(make_model(), FEATURES[:2], TEXTS[:2], **few))
    assert [note["step"] for note in told] == [3, 5]
    assert told[0]["loss"] == pytest.approx(np.mean(losses[:3]))
    assert told[1]["loss"] == pytest.approx(np.mean(losses[3:]))
    assert [note["pictures_per_second"] for note in told] == [2 * 3 / 1, 2 * 5 / 2]


def interrupted_in_step(built, step, again=False):
    """Ctrl-C comes in the forward pass of a step, by the system's signal."""
    seen = []

    def ctrl_c(module, inputs, output):
        seen.append(step)
        if len(seen) == step:
            for _ in range(1 + again):
                os.kill(os.getpid(), signal.SIGINT)

    built[0].perceiver.register_forward_hook(ctrl_c)
    return built


def test_ctrl_c_saves_the_step_under_way(make_model, tmp_path):
    """Before the first report, too; and a run that goes on ends as a straight one."""
    straight, path = make_model(), tmp_path / "last.pt"
    history = go(straight)
    before = signal.getsignal(signal.SIGINT)
    built = interrupted_in_step(make_model(), 3)
    with pytest.raises(KeyboardInterrupt, match="after step 3 of 12, saved: call"):
        go(built, checkpoint=path)
    assert signal.getsignal(signal.SIGINT) is before and not built[0].training
    assert read_checkpoint(path)["step"] == 3
    resumed = make_model()
    assert go(resumed, checkpoint=path) == history
    check_same(resumed[0], straight[0])


def test_ctrl_c_in_a_report_saves_too(make_model, tmp_path):
    def stop(line):
        raise KeyboardInterrupt

    path = tmp_path / "last.pt"
    with pytest.raises(KeyboardInterrupt, match="after step 4 of 12, saved"):
        go(make_model(), checkpoint=path, report=stop)
    assert read_checkpoint(path)["step"] == 4


def test_ctrl_c_without_a_file_says_so(make_model):
    with pytest.raises(KeyboardInterrupt, match="Nothing is saved: .*checkpoint="):
        go(interrupted_in_step(make_model(), 3))


def test_a_second_ctrl_c_does_not_wait(make_model, tmp_path):
    """And nothing is saved of a step that may be half taken."""
    path = tmp_path / "last.pt"
    built = interrupted_in_step(make_model(), 6, again=True)
    with pytest.raises(KeyboardInterrupt, match="in the middle of a step"):
        go(built, checkpoint=path)
    assert read_checkpoint(path)["step"] == 4


# -------------------------------------------------------------------- by text length


def captions_like_those_of_people(n=3000):
    """Numbers of tokens, most about ten, some thirty: (n,)."""
    spread = np.random.default_rng(0).lognormal(2.3, 0.5, n).round()
    return tuple(np.clip(spread, 3, 50).astype(int).tolist())


def padding(batches, n_tokens):
    """The share of all tokens of these batches that is padding."""
    n_all = sum(len(rows) * max(n_tokens[r] for r in rows) for rows in batches)
    return 1 - sum(n_tokens[row] for rows in batches for row in rows) / n_all


@pytest.mark.parametrize("batch_size", [16, 64])
def test_batches_by_length_are_hardly_padded(batch_size):
    n_tokens = captions_like_those_of_people()
    alone, steps = (1,) * len(n_tokens), range(len(n_tokens) // batch_size)
    share = {}
    for name, known in (("drawn", None), ("by length", n_tokens)):
        order = [batch_for_step(alone, batch_size, s, 0, known) for s in steps]
        shown = [row for rows in order for row in rows]
        assert len(set(shown)) == len(shown) == len(steps) * batch_size
        share[name] = padding(order, n_tokens)
        widths = [max(n_tokens[row] for row in rows) for rows in order]
        assert abs(np.corrcoef(widths, steps)[0, 1]) < 0.35  # not short to long
    assert share["drawn"] > 0.45 and share["by length"] < 0.1


def test_each_epoch_has_other_companions():
    n_tokens = captions_like_those_of_people(400)
    alone = (1,) * 400
    first, second = (
        {frozenset(batch_for_step(alone, 8, s, 0, n_tokens)) for s in steps}
        for steps in (range(50), range(50, 100))
    )
    assert not first & second


def test_training_pads_little(make_model, monkeypatch):
    """What the model gets, not only what is planned; of several texts those drawn."""
    rng, shares = np.random.default_rng(0), []
    texts = [
        [" ".join(["lemon"] * int(n)) for n in rng.choice([3, 4, 40], 2)]
        for _ in range(60)
    ]
    features = FEATURES[:1].expand(60, -1, -1, -1)
    right = training.training_step

    def note(model, batches, *others):
        shares.append(1 - batches[0]["attention_mask"].float().mean().item())
        return right(model, batches, *others)

    monkeypatch.setattr(training, "training_step", note)
    go(make_model(), features, texts, batch_size=5, n_steps=24)
    assert np.mean(shares) < 0.15


@pytest.mark.parametrize("longest, sorts", [(40, True), (6, False)])
def test_batches_are_sorted_where_it_pays(make_model, longest, sorts):
    """Short texts stay as they were drawn."""
    texts = ["lemon " * (longest if i % 4 == 0 else 2) + "tent" for i in range(40)]
    data = make_model()[2], FEATURES[:1].expand(40, -1, -1, -1), texts, None
    examples = training.Examples(*data, batch_size=5, accumulate=1, seed=0)
    alone = (1,) * 40
    drawn = [batch_for_step(alone, 5, step, 0) for step in range(8)]
    assert ([examples.rows(step) for step in range(8)] != drawn) is sorts


# ------------------------------------------------------------------- what is written


def test_a_checkpoint_is_as_large_as_what_learns(make_model, tmp_path):
    """With AdamW three numbers for each that learns; of the table two rows of 1,200."""
    path, built = tmp_path / "last.pt", make_model()
    go(built, checkpoint=path, with_muon=False)
    rows = training.trained_rows(built[0])
    n_learn = sum(
        len(rows[p]) * p.shape[1] if p in rows else p.numel()
        for p in learning_parameters(built[0]).values()
    )
    (table,) = rows
    size = path.stat().st_size
    assert 12 * n_learn < size < 12 * n_learn + 120_000  # names, notes, zip's own
    assert table.numel() * 4 > 120_000, "too small a table to be missed"


# -------------------------------------------------------------------- what is read


class Elsewhere:
    """Features that are not in memory, and are asked for by lists of numbers."""

    def __init__(self, tensor):
        self.tensor, self.shape, self.asked = tensor, tuple(tensor.shape), []

    def __len__(self):
        return len(self.tensor)

    def __getitem__(self, numbers):
        assert type(numbers) is list and {type(n) for n in numbers} <= {int}
        self.asked.append(len(numbers))
        return self.tensor[numbers].float()


def test_features_may_be_elsewhere(make_model):
    straight, other, away = make_model(), make_model(), Elsewhere(FEATURES)
    history = go(straight, validation=(FEATURES, TEXTS))
    assert go(other, away, validation=(away, TEXTS)) == history
    check_same(other[0], straight[0])
    assert max(away.asked) <= len(TEXTS)
    sequences = {"sequences": [[0, 1], [2, 3], [4], [5]]}
    texts = [TEXTS[:2], TEXTS[2:4], TEXTS[4:5], TEXTS[5:]]
    wanted = go(make_model(), texts=texts, **sequences)
    assert go(make_model(), away, texts, **sequences) == wanted


def test_features_elsewhere_that_are_spoilt_are_named(make_model):
    features = FEATURES.clone()
    features[4] = float("nan")
    with pytest.raises(NotFinite, match=r"pictures \[4\]"):
        go(make_model(), Elsewhere(features))


def test_features_that_are_no_tensors_are_refused():
    class Arrays(Elsewhere):
        def __getitem__(self, numbers):
            return self.tensor[numbers].numpy()

    with pytest.raises(ValueError, match="want a tensor.*ndarray"):
        check_examples(Arrays(FEATURES), TEXTS)
    away = Elsewhere(FEATURES)
    away.shape = (6, 1, 16, 31)
    with pytest.raises(ValueError, match="say that they are .6, 1, 16, 31., but"):
        check_examples(away, TEXTS)


def test_pixels_train_as_their_features(make_model):
    """The tower reads them in each step."""
    pixels = random_pixels(len(TEXTS), 1, seed=3)[:, 0]  # (pictures, F, 3, H, W)
    straight, other = make_model(), make_model()
    visual = straight[0].vision_encoder
    with torch.no_grad():
        features = visual(pixels[:, 0])[1][:, None]  # (pictures, F, v, d_img)
    wanted = go(straight, features, validation=(features, TEXTS))
    history = go(other, Elsewhere(pixels), validation=(pixels, TEXTS))
    np.testing.assert_allclose(losses_of(history), losses_of(wanted), atol=1e-4)
    tokenizer = other[2]
    batch = make_batch([1, 0], pixels, TEXTS, tokenizer, "cpu")
    assert "vision_features" not in batch
    assert torch.equal(batch["vision_x"], pixels[[1, 0]][:, None])


def test_sequences_of_pixels(make_model):
    pixels = random_pixels(len(TEXTS), 1, F=2, seed=3)[:, 0]
    told = {"sequences": [[0, 1], [2], [3, 4]]}
    texts = [TEXTS[:2], TEXTS[2:3], TEXTS[3:5]]
    history = go(make_model(), pixels, texts, **told)
    assert np.isfinite(losses_of(history)).all()
    batch = make_batch([0, 1], pixels, texts, make_model()[2], "cpu", told["sequences"])
    assert torch.equal(batch["vision_x"][0], pixels[:2])
    assert torch.equal(batch["vision_x"][1, 0], pixels[2])
    assert not batch["vision_x"][1, 1].any()


# ------------------------------------------------------------------------- optimizers


def test_muon_pays_for_few_numbers(make_model):
    model, _, _ = make_model()
    assert muon_pays(model) and not muon_pays(model, most=100)
    assert any(isinstance(o, Muon) for o in make_optimizers(model, 1e-3))


def test_rounds_in_bfloat16_are_near_those_in_float32():
    matrix = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    exact, near = orthogonalise(matrix), orthogonalise(matrix, dtype=torch.bfloat16)
    assert near.dtype == torch.float32 and 0 < (exact - near).abs().max() < 0.05
    tall = orthogonalise(matrix.transpose(-2, -1), dtype=torch.bfloat16)
    torch.testing.assert_close(tall.transpose(-2, -1), near)


@pytest.mark.parametrize(
    ("precision", "rounds_in"), [("float32", None), ("bfloat16", torch.bfloat16)]
)
def test_muon_rounds_in_the_precision_that_is_asked_for(
    make_model, monkeypatch, precision, rounds_in
):
    made = []

    def kept(*args, **kwargs):
        made.extend(make_optimizers(*args, **kwargs))
        return made

    monkeypatch.setattr(training, "make_optimizers", kept)
    go(make_model(), precision=precision, n_steps=1)
    (muon,) = (one for one in made if isinstance(one, Muon))
    assert muon.dtype is rounds_in


def test_muon_moves_as_pytorchs(make_model):
    """Theirs counts in bfloat16; the same direction, and the same length."""
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.nn.Parameter(weight.clone()) for _ in "12")
    mine = Muon([ours], lr=0.1, dtype=torch.bfloat16)
    settings = {"momentum": 0.95, "weight_decay": 0.0, "nesterov": True}
    other = torch.optim.Muon(
        [theirs], lr=0.1, adjust_lr_fn="match_rms_adamw", **settings
    )
    for step in range(4):
        gradient = torch.randn(
            24, 40, generator=torch.Generator().manual_seed(step + 1)
        )
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        other.step()
    moved, wanted = ours.detach() - weight, theirs.detach() - weight
    cosine = torch.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0)
    assert cosine > 0.99 and moved.norm() / wanted.norm() == pytest.approx(1, abs=0.02)
