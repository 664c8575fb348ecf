"""Training at its edges: what may move, what is not finite, where it may be called.

And what a checkpoint holds, what a resumed run says, which text of several is drawn.
"""

import copy
import os
import random
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import (
    SMALL,
    make_picture,
    opt_config,
    random_features,
    random_pixels,
    save_language_model,
)

from flamingo_lite import (
    NotFinite,
    PixelSource,
    batch_for_step,
    batches,
    cache_features,
    caption_losses,
    check_examples,
    checkpoints,
    draw_text,
    encode_pictures,
    freeze_in,
    keep_old_rows,
    learning_parameters,
    make_batch,
    make_optimizers,
    random_states,
    read_checkpoint,
    run_settings,
    save_checkpoint,
    schedule,
    set_random_states,
    steps,
    train,
    trained_rows,
    training,
)
from flamingo_lite.model import token_tables, train_new_rows_only

TEXTS = [
    "a lemon",
    "a tent",
    "a bear above a tent",
    "a bee",
    "a fox to the left of a bee",
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


class Stopped(Exception):
    """What ends a training in these tests, and leaves it no time to save."""


def stop_at(step):
    """A report that stops training when it comes to a step."""

    def report(line):
        if line.split()[1] == str(step):
            raise Stopped

    return report


def moved_rows(model, before):
    """Numbers of the rows of each token table that are not as they were."""
    return {
        name: (table.weight != before[name]).any(dim=1).nonzero().flatten().tolist()
        for name, table in token_tables(model.lang_encoder).items()
    }


def tables_of(model):
    tables = token_tables(model.lang_encoder).items()
    return {name: table.weight.detach().clone() for name, table in tables}


def check_same(one, other):
    wanted = other.state_dict()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


# ------------------------------------------------------------- only two rows can move


def deep_copy(model):
    return copy.deepcopy(model)


def no_hooks(model):
    for table in token_tables(model.lang_encoder).values():
        table.weight._backward_hooks.clear()
    return model


def another_table(model):
    """What resizing does: another parameter, without the hook, tied again."""
    lm = model.lang_encoder
    lm.get_input_embeddings().weight = torch.nn.Parameter(
        lm.get_input_embeddings().weight.detach().clone()
    )
    lm.tie_weights()
    return model


def untied(model):
    """An output table of its own, trained, without a hook."""
    head = model.lang_encoder.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.lang_encoder.config.tie_word_embeddings = False
    return model


@pytest.mark.parametrize("change", [deep_copy, no_hooks, another_table, untied])
def test_only_the_two_new_rows_move(make_model, change):
    model, _, tokenizer = make_model()
    model = change(model)
    before, new = tables_of(model), sorted([model.eoc_token_id, model.media_token_id])
    assert len(before) == (2 if change is untied else 1)
    go((model, None, tokenizer))
    wanted = {name: new for name in before}
    if change is untied:  # nothing is asked after the last token, <|endofchunk|>
        wanted["new_embeddings"] = [model.media_token_id]
    assert moved_rows(model, before) == wanted


def test_the_faults_of_these_tests_move_all_rows(make_model, monkeypatch):
    """Without the guard: or the test above would pass anyway."""
    monkeypatch.setattr(steps, "keep_old_rows", lambda model: None)
    model, _, tokenizer = make_model()
    before = tables_of(no_hooks(model))
    go((model, None, tokenizer))
    assert len(moved_rows(model, before)["new_embeddings"]) == len(tokenizer)


def test_a_copy_trains_as_the_original(make_model):
    """To the last bit: the guard does what the hook does."""
    model, _, tokenizer = make_model()
    twin = copy.deepcopy(model)
    assert go((model, None, tokenizer)) == go((twin, None, tokenizer))
    check_same(model, twin)


def test_frozen_tables_stay_frozen(make_model):
    built = make_model(freeze_lm_embeddings=True)
    before = tables_of(built[0])
    go(built)
    assert trained_rows(built[0]) == {}
    assert moved_rows(built[0], before) == {"new_embeddings": []}


def test_keep_old_rows_keeps_two(make_model):
    model, _, _ = make_model()
    (table, rows) = next(iter(trained_rows(model).items()))
    table.grad = torch.ones_like(table)
    keep_old_rows(model)
    assert table.grad.sum() == 2 * table.shape[1] and (table.grad[rows] == 1).all()


# ------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_features_that_are_not_finite_stop_before_the_step(
    make_model, tmp_path, number
):
    """Named: step, picture and text; the model and both checkpoints are whole."""
    built, features = make_model(), FEATURES.clone()
    bad = (set(range(len(TEXTS))) - {*rows_of(0), *rows_of(1)}).pop()
    features[bad, 0, 5, 7] = number
    first = next(s for s in range(12) if bad in rows_of(s))
    assert first >= 2, "there are no two checkpoints yet"
    where, settings = tmp_path / "last.pt", {"report_every": 1}
    straight = make_model()
    with pytest.raises(Stopped):
        go(straight, checkpoint=None, report=stop_at(first), report_every=1)
    with pytest.raises(NotFinite) as caught:
        go(built, features, checkpoint=where, **settings)
    message = str(caught.value)
    assert f"step {first + 1} not taken: the loss is nan" in message
    assert f"pictures [{bad}]" in message and repr(TEXTS[bad]) in message
    assert isinstance(caught.value, ValueError)
    check_same(built[0], straight[0])
    assert not built[0].training
    for name, back in (("last.pt", 0), ("last.pt.previous", 1)):
        assert read_checkpoint(tmp_path / name)["step"] == first - back


def rows_of(step):
    """Of a step of `go`: by lot, since texts as short as these leave little padding."""
    return batch_for_step((1,) * len(TEXTS), 2, step, SETTINGS["seed"])


def test_the_picture_of_a_sequence_is_named(make_model):
    features = FEATURES.clone()
    features[1] = float("inf")
    kwargs = {"sequences": [[0, 1], [1, 2]], "texts": [TEXTS[:2], TEXTS[1:3]]}
    with pytest.raises(NotFinite, match=r"step 1 not taken.*pictures \[1\]"):
        go(make_model(), features, **kwargs)


def test_finite_features_name_the_whole_batch(make_model, monkeypatch):
    """The loss is nan for another reason: all pictures of the batch, and texts."""
    right = training.training_step

    def wrong(model, batches, *others):
        batches[0]["vision_features"] *= float("nan")
        return right(model, batches, *others)

    monkeypatch.setattr(training, "training_step", wrong)
    with pytest.raises(NotFinite) as caught:
        go(make_model())
    rows = rows_of(0)
    assert f"pictures {rows}" in str(caught.value)
    assert all(repr(TEXTS[row]) in str(caught.value) for row in rows)


def test_a_gradient_that_is_not_finite_stops_too(make_model):
    """The loss is a number, and its gradient is none."""
    model, _, tokenizer = built = make_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    gate = next(p for name, p in model.named_parameters() if name.endswith("_gate"))
    gate.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NotFinite, match="step 1 not taken: the length of the gradient"):
        go(built)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("part", ["perceiver.latents", "lang_encoder", "attn_gate"])
def test_a_weight_that_is_not_finite_is_named_at_once(make_model, part):
    model, _, tokenizer = built = make_model()
    name, weight = next(pair for pair in model.named_parameters() if part in pair[0])
    weight.data.flatten()[0] = float("inf")
    with pytest.raises(ValueError, match=re.escape(name)):
        go(built, report=lambda line: pytest.fail(line))


def test_a_rate_that_blows_up_leaves_the_checkpoint(make_model, tmp_path):
    """Of the one step that was taken; the next one's loss is no number."""
    path = tmp_path / "last.pt"
    with pytest.raises(NotFinite):
        go(make_model(), checkpoint=path, report_every=1, lr=1e37)
    assert {f.name: read_checkpoint(f)["step"] for f in tmp_path.iterdir()} == {
        "last.pt": 1
    }


def test_weights_that_overflow_leave_both_checkpoints(
    make_model, tmp_path, monkeypatch
):
    """In a step whose loss was a number: it is not written."""
    right, path, taken = training.training_step, tmp_path / "last.pt", []

    def overflow(model, *others):
        loss = right(model, *others)
        taken.append(loss)
        if len(taken) == 6:
            model.perceiver.latents.data[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(training, "training_step", overflow)
    with pytest.raises(ValueError, match="perceiver.latents"):
        go(make_model(), checkpoint=path, report_every=1)
    assert torch.stack(taken[:6]).isfinite().all()
    assert {f.name: read_checkpoint(f)["step"] for f in tmp_path.iterdir()} == {
        "last.pt": 5,
        "last.pt.previous": 4,
    }


@pytest.mark.parametrize("lr", [1e39, 1e300])
@pytest.mark.parametrize("with_muon", [False, True])
def test_a_rate_beyond_all_numbers_is_not_finite(make_model, with_muon, lr):
    with pytest.raises(NotFinite):
        go(make_model(), lr=lr, with_muon=with_muon)


def test_nothing_that_cannot_be_read_is_written(make_model, tmp_path):
    model, _, _ = make_model()
    optimizers, path = make_optimizers(model, 1e-3), tmp_path / "last.pt"
    numbers = 20, 2, 1e-3, 30.0, True, 3
    progress = {
        "step": 0,
        "history": [],
        "settings": run_settings(FEATURES, TEXTS, *numbers),
    }
    for _ in range(2):
        save_checkpoint(path, model, optimizers, **progress)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert sorted(before) == ["last.pt", "last.pt.previous"]
    name, weight = next(iter(learning_parameters(model).items()))
    weight.data.flatten()[0] = float("nan")
    with pytest.raises(ValueError, match=f"not written: {re.escape(name)}"):
        save_checkpoint(path, model, optimizers, **progress)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# --------------------------------------------------------------- where it is called


def inside_autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def inside_autocast_without_cache():
    return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)


REGIONS = {
    inside_autocast: "torch.autocast",
    inside_autocast_without_cache: "torch.autocast",
    torch.no_grad: "no_grad",
    torch.inference_mode: "inference_mode",
}


@pytest.mark.parametrize("region", REGIONS)
def test_a_region_in_which_training_goes_wrong(make_model, region):
    built = make_model()
    before = copy.deepcopy(built[0])
    with region(), pytest.raises(RuntimeError, match=REGIONS[region]):
        go(built)
    check_same(built[0], before)
    go(built, n_steps=1)  # and outside all is well


def test_losses_can_be_asked_for_in_any_region(small):
    """They are those of outside; in half precision, about."""
    model, _, tokenizer = small
    wanted = caption_losses(model, tokenizer, FEATURES, TEXTS)
    for region in (torch.no_grad, torch.inference_mode):
        with region():
            assert torch.equal(
                caption_losses(model, tokenizer, FEATURES, TEXTS), wanted
            )
    with inside_autocast():
        losses = caption_losses(model, tokenizer, FEATURES, TEXTS)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, wanted, atol=0.2, rtol=0.05)


def test_features_made_in_inference_mode_can_be_trained_on(make_model):
    with torch.inference_mode():
        features = FEATURES.float() * 1
    assert go(make_model(), features) == go(make_model(), FEATURES.float())


def test_a_model_made_in_inference_mode_is_refused(make_model):
    with torch.inference_mode():
        built = make_model()
    with pytest.raises(ValueError, match="inference_mode"):
        go(built)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_refused(make_model, dtype):
    built = make_model()
    built[0].to(dtype)
    with pytest.raises(ValueError, match=f"{dtype}.*model.float()"):
        go(built)
    built[0].float()
    go(built, n_steps=1)


def test_nothing_to_train_is_refused(make_model):
    built = make_model()
    built[0].requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        go(built)


# ------------------------------------------------------- all that is given, at once

LONG = " ".join(["lemon"] * 100)
WRONG_TEXTS = {  # what is wrong, and how it is named
    LONG: r"texts\[4\].*lemon.*tokens",
    "": r"texts\[4\].*empty",
    "a <image> b": r"texts\[4\].*<image>",
    None: r"texts\[4\]",
}


@pytest.mark.parametrize("text", WRONG_TEXTS)
@pytest.mark.parametrize("told", [False, True], ids=["pictures", "sequences"])
def test_every_text_is_checked_before_the_first_step(make_model, text, told):
    built = make_model()
    before = copy.deepcopy(built[0])
    texts, kwargs = [*TEXTS[:-1], text], {}
    if told:
        kwargs["sequences"] = [[i] for i in range(len(texts))]
        texts = [[one] for one in texts]
    with pytest.raises(ValueError, match=WRONG_TEXTS[text]):
        go(built, texts=texts, report_every=1, report=pytest.fail, **kwargs)
    check_same(built[0], before)
    assert not built[0].training


WRONG = {
    "n_steps: want a whole number": {"n_steps": 2.5},
    "batch_size: want a whole number from 1": {"batch_size": 0},
    "report_every: want a whole number from 0": {"report_every": -1},
    "seed: want": {"seed": -1},
    "lr: want a finite number": {"lr": float("nan")},
    "gate_factor: want a finite number": {"gate_factor": float("inf")},
    "want a tensor .pictures, F, v, d_img., got .5, 16, 32.": {
        "features": FEATURES[:, 0]
    },
    "want a tensor .pictures, F, v, d_img., got .5, 1, 16, 32.": {
        "features": FEATURES.numpy()
    },
    "another vision encoder: width 30, the model reads 32": {
        "features": FEATURES[..., :30]
    },
    "want a list of texts": {"texts": "abcde"},
    "sequence 1: there is no picture -1": {"sequences": [[0], [-1]]},
    "sequence 1: there is no picture 5": {"sequences": [[0], [5]]},
    "sequence 0: there is no picture 0.5": {"sequences": [[0.5], [1]]},
    "sequence 0: want picture numbers, got 0": {"sequences": [0, 1]},
    "sequence 1: 1 pictures, but 2 texts": {
        "sequences": [[0], [1]],
        "texts": [["a lemon"], ["a tent", "a bee"]],
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_used_is_named_at_once(make_model, message):
    built, kwargs = make_model(), dict(WRONG[message])
    if "sequences" in kwargs:
        kwargs.setdefault("texts", [["a lemon"], ["a tent"]])
    with pytest.raises(ValueError, match=message):
        go(built, report=pytest.fail, **kwargs)
    assert not built[0].training


def test_losses_want_as_many_texts_as_pictures(small):
    model, _, tokenizer = small
    for n in (4, 0):
        with pytest.raises(ValueError, match=f"5 pictures, but {n} texts"):
            caption_losses(model, tokenizer, FEATURES, TEXTS[:n])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_after_an_error_the_model_is_in_eval_mode(make_model, error):
    built = make_model()
    built[0].train()

    def report(line):
        assert built[0].training
        raise error

    with pytest.raises(error):
        go(built, report=report)
    assert not built[0].training and not built[0].perceiver.training


def test_report_every_0_is_at_the_end(make_model, tmp_path):
    lines, path = [], tmp_path / "last.pt"
    history = go(make_model(), report_every=0, report=lines.append, checkpoint=path)
    assert len(history) == 12 and len(lines) == 1 and lines[0].split()[1] == "12"
    assert read_checkpoint(path)["step"] == 12
    assert not (tmp_path / "last.pt.previous").exists()
    assert history == go(make_model())


@pytest.mark.parametrize(
    "report_every, checkpoint_every, saved",
    [(4, None, [4, 8, 12]), (2, 6, [6, 12]), (5, 0, [12]), (0, 7, [7, 12])],
)
def test_checkpoints_are_written_as_often_as_asked_for(
    make_model, tmp_path, monkeypatch, report_every, checkpoint_every, saved
):
    """Be there lines or not; and another number of them is the same run."""
    path, write, steps = tmp_path / "last.pt", training.save_checkpoint, []

    def note(path, *args, **progress):
        steps.append(progress["step"])
        write(path, *args, **progress)

    monkeypatch.setattr(training, "save_checkpoint", note)
    every = {"report_every": report_every, "checkpoint_every": checkpoint_every}
    history = go(make_model(), checkpoint=path, **every)
    assert steps == saved
    if len(saved) > 1:
        shutil.copy(path.with_name("last.pt.previous"), path)
    assert history == go(make_model(), checkpoint=path)


# --------------------------------------------------------------- several texts, a lot

SEVERAL = [
    ["a lemon", "a yellow fruit", ("it is", "sour")],
    "a tent",
    ["a bear above a tent"],
    ["a bee", "an insect"],
    ("a fox to the left of", "a bee"),
]


def test_one_text_is_drawn_for_each_epoch_by_the_seed():
    draws = [draw_text(SEVERAL[0], 3, epoch, 0, 1) for epoch in range(300)]
    assert draws == [draw_text(SEVERAL[0], 3, epoch, 0, 1) for epoch in range(300)]
    assert draws != [draw_text(SEVERAL[0], 4, epoch, 0, 1) for epoch in range(300)]
    counts = [draws.count(text) for text in SEVERAL[0]]
    assert sum(counts) == 300 and min(counts) > 70  # a fair lot: 100 each
    assert draw_text("a tent", 3, 0, 0, 1) == "a tent"
    assert draw_text(SEVERAL[4], 3, 0, 0, 1) == SEVERAL[4]  # a pair is one text


def seen_texts(monkeypatch):
    """A list of what `collate` is given in a training."""
    seen, right = [], batches.collate

    def note(examples, tokenizer):
        seen.append([texts for _, texts in examples])
        return right(examples, tokenizer)

    monkeypatch.setattr(batches, "collate", note)
    return seen


@pytest.mark.parametrize("told", [False, True], ids=["pictures", "sequences"])
def test_train_draws_and_resumes_with_the_same_texts(
    make_model, tmp_path, monkeypatch, told
):
    kwargs = {"texts": SEVERAL, "n_steps": 20, "report_every": 5}
    if told:
        kwargs["sequences"] = [[0, 3], [1], [2], [4, 0]]
        kwargs["texts"] = [
            [SEVERAL[0], SEVERAL[3]],
            ["a tent"],
            [SEVERAL[2]],
            [SEVERAL[4], SEVERAL[0]],
        ]
    seen = seen_texts(monkeypatch)
    straight = make_model()
    history, all_seen = go(straight, **kwargs), list(seen)
    flat = [text for batch in all_seen for row in batch for text in row]
    assert {"a lemon", "a yellow fruit", ("it is", "sour"), "a tent"} <= set(flat)
    assert not any(isinstance(text, list) for text in flat)
    seen.clear()
    path = tmp_path / "last.pt"
    with pytest.raises(Stopped):
        go(make_model(), checkpoint=path, **kwargs, report=stop_at(15))
    assert seen == all_seen[:15]
    seen.clear()
    resumed = make_model()
    assert go(resumed, checkpoint=path, **kwargs) == history
    assert seen == all_seen[10:]
    check_same(resumed[0], straight[0])


def test_a_list_of_one_text_is_that_text(make_model):
    assert go(make_model(), texts=[[text] for text in TEXTS]) == go(make_model())


def test_the_first_of_several_texts_is_measured(small):
    model, _, tokenizer = small
    texts = ["a lemon", "a tent", "a bear above a tent", "a bee", SEVERAL[4]]
    one = caption_losses(model, tokenizer, FEATURES, SEVERAL)
    assert torch.equal(one, caption_losses(model, tokenizer, FEATURES, texts))
    batch = make_batch([0], FEATURES, SEVERAL, tokenizer, "cpu")
    assert "a lemon" in tokenizer.decode(batch["lang_x"][0])


def test_every_one_of_several_texts_is_checked(make_model):
    with pytest.raises(ValueError, match=r"texts\[0\]\[2\]"):
        go(make_model(), texts=[["a lemon", "a tent", " "], *TEXTS[1:]])
    with pytest.raises(ValueError, match=r"texts\[1\]"):
        go(make_model(), texts=["a lemon", [], *TEXTS[2:]])


def test_texts_of_numpy_are_the_same_run(make_model, tmp_path):
    """In arrays and strings of its own; and long arrays are told apart."""
    path, wanted = tmp_path / "last.pt", go(make_model())
    assert go(make_model(), texts=np.array(TEXTS), checkpoint=path) == wanted
    assert go(make_model(), checkpoint=path) == wanted
    texts, _ = check_examples(FEATURES, np.array(TEXTS))
    assert texts == TEXTS and {type(text) for text in texts} == {str}


def test_long_arrays_of_texts_are_told_apart(make_model, tmp_path):
    """Also where numpy would print an ellipsis."""
    features = FEATURES[:1].expand(2000, -1, -1, -1)
    one = np.array(["a lemon"] * 2000)
    other = one.copy()
    other[1000] = "a tent"
    kwargs = {"checkpoint": tmp_path / "last.pt", "n_steps": 1}
    go(make_model(), features, one, **kwargs)
    with pytest.raises(ValueError, match=r"texts\[1000\]"):
        go(make_model(), features, other, **kwargs)


# ------------------------------------------------------------------------ checkpoints


def stop_in_the_middle(make_model, path, **kwargs):
    with pytest.raises(Stopped):
        go(make_model(), report=stop_at(12), checkpoint=path, **kwargs)


def test_a_checkpoint_holds_two_rows_of_the_table(make_model, tmp_path):
    """Nothing in it is as long as the vocabulary, the optimizers' averages neither."""
    stop_in_the_middle(make_model, path := tmp_path / "last.pt")
    state, model = read_checkpoint(path), make_model()[0]
    (table, rows) = next(iter(trained_rows(model).items()))
    name = next(n for n, p in learning_parameters(model).items() if p is table)
    assert state["trained"][name].shape == (2, table.shape[1])
    tensors = list(state["trained"].values())
    for optimizer in state["optimizers"]:
        tensors += [t for known in optimizer["state"].values() for t in known.values()]
    assert len(table) not in {side for t in tensors for side in t.shape}
    assert sum(t.shape == (2, table.shape[1]) for t in tensors) == 3
    assert path.stat().st_size < table.numel() * 4 + sum(
        t.numel() * 4 for t in tensors
    ), "the file is larger than what is in it"


def test_two_tables_that_are_not_tied(make_model, tmp_path):
    """Two rows of each, and a resumed run ends as a straight one."""
    kwargs = {"gates": None}

    def make():
        model, _, tokenizer = make_model(**kwargs)
        rows = [model.eoc_token_id, model.media_token_id]
        untied(model)
        train_new_rows_only(model.lang_encoder.get_output_embeddings(), rows)
        return model, None, tokenizer

    straight, path = make(), tmp_path / "last.pt"
    history = go(straight)
    stop_in_the_middle(make, path)
    assert sum(len(t) == 2 for t in read_checkpoint(path)["trained"].values()) >= 2
    resumed = make()
    assert go(resumed, checkpoint=path) == history
    check_same(resumed[0], straight[0])


def as_before(path, model, optimizers):
    """Write a checkpoint again as it was written when it held whole tables."""
    state = read_checkpoint(path)
    rows = trained_rows(model)
    for name, p in learning_parameters(model).items():
        if p in rows:
            whole = p.detach().clone()
            whole[rows[p]] = state["trained"][name]
            state["trained"][name] = whole
    state["optimizers"] = [
        checkpoints._of_tables(saved, optimizer, checkpoints._whole, rows)
        for saved, optimizer in zip(state["optimizers"], optimizers, strict=True)
    ]
    del state["settings"]["texts"], state["settings"]["sequences"]
    torch.save(state, path)
    return state


def test_a_checkpoint_with_whole_tables_still_loads(make_model, tmp_path):
    straight, path = make_model(), tmp_path / "last.pt"
    history = go(straight)
    stop_in_the_middle(make_model, path)
    fresh = make_model()
    state = as_before(path, fresh[0], make_optimizers(fresh[0], 1e-3))
    sizes = {t.shape for t in state["trained"].values()}
    assert next(iter(trained_rows(fresh[0]))).shape in sizes
    assert go(fresh, checkpoint=path) == history
    check_same(fresh[0], straight[0])


def test_a_checkpoint_whose_old_rows_moved_is_refused(make_model, tmp_path):
    """From a training that moved them all: half of its model is not in this one."""
    stop_in_the_middle(make_model, path := tmp_path / "last.pt")
    fresh = make_model()
    state = as_before(path, fresh[0], make_optimizers(fresh[0], 1e-3))
    (table, rows) = next(iter(trained_rows(fresh[0]).items()))
    for tensor in state["trained"].values():
        if tensor.shape == table.shape:
            tensor[7] += 0.01
    torch.save(state, path)
    before = copy.deepcopy(fresh[0])
    with pytest.raises(ValueError, match=r"last\.pt: old rows of .*embed_tokens"):
        go(fresh, checkpoint=path)
    check_same(fresh[0], before)


def test_an_older_checkpoint_of_other_texts_is_refused(make_model, tmp_path):
    stop_in_the_middle(make_model, path := tmp_path / "last.pt")
    fresh = make_model()
    as_before(path, fresh[0], make_optimizers(fresh[0], 1e-3))
    with pytest.raises(ValueError, match="checksum of the texts"):
        go(fresh, checkpoint=path, texts=[*TEXTS[:-1], "a bee"])


DIFFERENT = {
    r"texts\[4\] is 'a fox to the left of a bee' there, 'a bee' here": {
        "texts": [*TEXTS[:-1], "a bee"]
    },
    r"texts\[0\] is 'a lemon' there, \['a lemon', 'a bee'\] here": {
        "texts": [["a lemon", "a bee"], *TEXTS[1:]]
    },
    "sequences is None there": {
        "sequences": [[i] for i in range(5)],
        "texts": [[text] for text in TEXTS],
    },
    "texts: 5 there, 4 here": {"features": FEATURES[:4], "texts": TEXTS[:4]},
    "lr is 0.001 there, 0.002 here": {"lr": 2e-3},
}


@pytest.mark.parametrize("message", DIFFERENT)
def test_what_changed_is_named_with_both_values(make_model, tmp_path, message):
    stop_in_the_middle(make_model, path := tmp_path / "last.pt")
    with pytest.raises(ValueError, match=message):
        go(make_model(), checkpoint=path, **DIFFERENT[message])


def test_a_changed_sequence_is_named(make_model, tmp_path):
    kwargs = {"texts": [["a lemon", "a tent"], ["a bee"]], "sequences": [[0, 1], [2]]}
    stop_in_the_middle(make_model, path := tmp_path / "last.pt", **kwargs)
    kwargs["sequences"] = [[0, 1], [3]]
    with pytest.raises(ValueError, match=r"sequences\[1\] is \[2\] there, \[3\] here"):
        go(make_model(), checkpoint=path, **kwargs)


def test_a_resumed_run_says_so(make_model, tmp_path):
    stop_in_the_middle(make_model, path := tmp_path / "last.pt")
    lines = []
    go(make_model(), checkpoint=path, report=lines.append)
    assert lines[0] == f"going on from step 8 of 12, {path}"
    assert [line.split()[1] for line in lines[1:]] == ["12"]
    lines.clear()
    go(make_model(), checkpoint=path, report=lines.append)
    assert lines == [f"going on from step 12 of 12, {path}"]


def test_a_finished_run_is_made_longer_as_the_error_says(make_model, tmp_path):
    """Not by more n_steps, since the rates have fallen to 0; by a second run."""
    path = tmp_path / "last.pt"
    go(make_model(), checkpoint=path)
    with pytest.raises(ValueError, match=r"n_steps is 12 there, 24 here.*n_steps=12"):
        go(make_model(), checkpoint=path, n_steps=24)
    built = make_model()
    assert len(go(built, checkpoint=path)) == 12  # the run that ended, loaded
    once = copy.deepcopy(built[0])
    second = tmp_path / "second.pt"
    history = go(built, checkpoint=second, seed=4)
    assert [entry["step"] for entry in history] == list(range(1, 13))
    assert not torch.equal(built[0].perceiver.latents, once.perceiver.latents)
    assert read_checkpoint(path)["step"] == read_checkpoint(second)["step"] == 12
    assert schedule(11, 12, warmup=2) < 0.05


# ----------------------------------------------- a checkpoint of another model


def another_language_model(folder, **config):
    """The same sizes: only its weights, or how it computes, are others."""
    seed = config.pop("seed", 0)
    path = save_language_model(folder / "opt", opt_config(**config), seed=seed)
    return {"language_model": path}


WITH_HEADS = {"heads": 4, "dim_head": 8}
OTHER_MODELS = {
    "which is frozen, has other numbers": {"seed": 1},
    "num_attention_heads of lang_encoder is 4 there, 2 here": {
        "num_attention_heads": 2
    },
    "activation_function of lang_encoder is relu there, gelu here": {
        "activation_function": "gelu"
    },
    r"heads of gated blocks is \[2, 2, 2\] there, \[4, 4, 4\] here": {
        "cross_attn_kwargs": WITH_HEADS
    },
    r"heads of perceiver is \[2, 2\] there, \[4, 4\] here": {
        "perceiver_kwargs": {**SMALL["perceiver_kwargs"], **WITH_HEADS}
    },
    "only_attend_immediate_media is True there, False here": {
        "only_attend_immediate_media": False
    },
}


@pytest.mark.parametrize("message", OTHER_MODELS)
def test_a_checkpoint_of_another_model_of_the_same_shapes(
    make_model, tmp_path, message
):
    """It would go on, silently wrong: what differs is named."""
    stop_in_the_middle(make_model, path := tmp_path / "last.pt")
    kwargs = OTHER_MODELS[message]
    is_ours = "kwargs" in str(kwargs) or "only_attend_immediate_media" in kwargs
    kwargs = kwargs if is_ours else another_language_model(tmp_path, **kwargs)
    built = make_model(**kwargs)
    before = copy.deepcopy(built[0])
    with pytest.raises(ValueError, match=f"of another model.*{message}"):
        go(built, checkpoint=path)
    check_same(built[0], before)


def test_frozen_parts_in_16_bits_are_the_same_model(make_model, tmp_path):
    stop_in_the_middle(make_model, path := tmp_path / "last.pt")
    for dtype in (torch.float16, torch.bfloat16):
        built = make_model()
        freeze_in(built[0], dtype)
        assert len(go(built, checkpoint=path)) == 12


def test_a_checkpoint_from_before_models_were_described(make_model, tmp_path):
    straight = make_model()
    history = go(straight)
    stop_in_the_middle(make_model, path := tmp_path / "last.pt")
    state = read_checkpoint(path)
    del state["model"], state["random"]["python"], state["random"]["numpy"]
    torch.save(state, path)
    assert go(make_model(), checkpoint=path) == history


# ---------------------------------------------------------- pictures by chance


class ByChance:
    """Pixels that are drawn anew each time, by one of three generators."""

    ndim, shape = 5, (len(TEXTS), 1, 3, 32, 32)

    def __init__(self, draw):
        self.draw, self.pixels = draw, random_pixels(1, len(TEXTS))[0]

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, numbers):
        return self.pixels[numbers] * (0.5 + self.draw())


DRAWS = {
    "python": random.random,
    "numpy": np.random.rand,
    "torch": lambda: torch.rand(()).item(),
}


def seed_all(number):
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(number)


@pytest.mark.parametrize("draw", DRAWS)
def test_pictures_that_change_by_chance_resume_to_the_same_end(
    make_model, tmp_path, draw
):
    """Also if a look at the validation, a report and a log draw meanwhile."""
    pixels, draw, path = ByChance(DRAWS[draw]), DRAWS[draw], tmp_path / "last.pt"
    looks = {"validation": (ByChance(draw), TEXTS), "log": lambda numbers: draw()}
    results = []
    for more in ({}, looks, {"checkpoint": path}):
        built = make_model()
        seed_all(0)
        results.append((go(built, pixels, **more), built[0]))
    path.unlink()
    built = make_model()
    seed_all(0)
    with pytest.raises(Stopped):
        go(built, pixels, checkpoint=path, report=stop_at(12), **looks)
    built = make_model()
    seed_all(1)  # as another process may stand
    results.append((go(built, pixels, checkpoint=path), built[0]))
    for history, model in results[1:]:
        assert history == results[0][0]
        check_same(model, results[0][1])


def test_random_states_of_several_processes():
    """Each goes on with its own; one that is new draws other numbers than the first."""
    device, states, drawn = torch.device("cpu"), [], []
    for number in range(3):
        seed_all(number)
        states.append(random_states(device))
        drawn.append([draw() for draw in DRAWS.values()])
    saved = {**states[0], "others": states[1:]}
    for number in range(3):
        set_random_states(saved, device, number)
        assert [draw() for draw in DRAWS.values()] == drawn[number]
    for _ in range(2):
        set_random_states(saved, device, 3)
        drawn.append([draw() for draw in DRAWS.values()])
    assert drawn[3] == drawn[4] and drawn[3][0] not in {one[0] for one in drawn[:3]}


# ----------------------------------------------- towers, features, names, files


def unfreeze(model):
    model.vision_encoder.requires_grad_(True)


def test_features_for_a_tower_that_is_to_learn_are_refused(make_model, tmp_path):
    """It would stay as it is, without a word."""
    model, image_processor, _ = built = make_model()
    pictures = [make_picture(colour) for colour in ("red", "green", "blue")]
    kept = cache_features(
        tmp_path, model.vision_encoder, image_processor, pictures, progress=False
    )
    unfreeze(model)
    for features in (FEATURES[:3], kept):
        with pytest.raises(ValueError, match="give train pixels, PixelSource"):
            go(built, features, TEXTS[:3])
    before = copy.deepcopy(model.vision_encoder.state_dict())
    go(built, PixelSource(pictures, image_processor), TEXTS[:3])
    after = model.vision_encoder.state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in after)


def test_features_that_are_kept_are_not_rounded_by_the_callers_autocast(
    make_model, tmp_path
):
    model, image_processor, _ = make_model()
    given = model.vision_encoder, image_processor, [make_picture("red")]
    wanted = encode_pictures(*given, dtype=torch.float32)
    with inside_autocast():
        assert torch.equal(encode_pictures(*given, dtype=torch.float32), wanted)
        kept = cache_features(tmp_path, *given, dtype=torch.float32, progress=False)
    assert torch.equal(kept[[0]], wanted)


@pytest.mark.parametrize("kind", ["cache", "files", "tensor"])
def test_pictures_that_are_validated_and_trained_on(make_model, tmp_path, kind):
    """One warning, with their number, where both name their pictures."""
    model, image_processor, _ = built = make_model()
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path, colour in zip(
        paths, ("red", "green", "blue", "pink", "gray"), strict=True
    ):
        make_picture(colour).save(path)

    def source(paths):
        if kind == "files":
            return PixelSource([str(path) for path in paths], image_processor)
        given = tmp_path / "kept", model.vision_encoder, image_processor, paths
        kept = cache_features(*given, progress=False)
        return kept if kind == "cache" else kept[:]

    features, looked_at = source(paths[:3]), source(paths[1:])
    kwargs = {"n_steps": 1, "report_every": 1}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        go(built, features, TEXTS[:3], validation=(looked_at, TEXTS[:4]), **kwargs)
        sequences = [[2], [3]]  # of the pictures that are looked at
        apart = looked_at, [[TEXTS[2]], [TEXTS[3]]], sequences
        go(built, features, TEXTS[:3], validation=apart, **kwargs)
    told = [str(w.message) for w in told if "trained on" in str(w.message)]
    assert len(told) == (kind != "tensor")
    assert all("2 of its 4 pictures are trained on" in line for line in told)


def test_two_runs_may_write_to_one_place(make_model, tmp_path):
    """Each has a file of its own until it is whole; what the dead left is swept."""
    path = tmp_path / "last.pt"
    done = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        check=True,
    )
    dead = tmp_path / f"last.pt.{int(done.stdout)}.tmp"
    alive, other = tmp_path / f"last.pt.{os.getppid()}.tmp", tmp_path / "other.pt.1.tmp"
    for left in (dead, alive, other):
        left.write_bytes(b"half")
    go(make_model(), checkpoint=path)
    assert not dead.exists() and alive.exists() and other.exists()
    assert read_checkpoint(path)["step"] == 12
