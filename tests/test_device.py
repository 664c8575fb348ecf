"""Everything follows the model to its device: as on the CPU, with no GPU at hand.

`pretend_device` has tensors that say they are elsewhere and refuse to meet the CPU's.
"""

import ast
import copy
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from pretend_device import DEVICE, READS, DeviceTensor, PretendDevice
from transformers import AutoModelForCausalLM

import flamingo_lite
from flamingo_lite import (
    answer,
    answer_in_words,
    attention_maps,
    caption,
    caption_losses,
    choose_device,
    collate,
    describe_device,
    encode_pictures,
    learning_parameters,
    load_flamingo,
    loss_at_labels,
    make_optimizers,
    nearest,
    occlusion,
    save_flamingo,
    score_candidates,
    score_captions,
    shifted_cross_entropy,
    show_maps,
    stream_caption,
    train,
    training_step,
)
from flamingo_lite.loss import IGNORE
from flamingo_lite.training import keep_old_rows

COLOURS = ("red", "yellow", "blue", "green", "purple")
TEXTS = ["a lemon", "a tent", "a bear above a tent", "a bee", "a fox above a bee"]


def draw(colour, corner=8):
    """A picture of a square, 64 x 64."""
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste(colour, (corner, corner, corner + 30, corner + 30))
    return picture


PICTURES = [draw(colour, 5 + 4 * i) for i, colour in enumerate(COLOURS)]


@pytest.fixture(scope="module")
def loaded():
    """The tiny Flamingo as it was trained: model, image processor, tokenizer."""
    return load_flamingo("tiny")


@pytest.fixture(scope="module")
def features(loaded):
    """(pictures, F, v, d_img) float16, on the CPU, as `train` takes them."""
    return encode_pictures(loaded[0].vision_encoder, loaded[1], PICTURES)


@pytest.fixture
def both(loaded):
    """A function that calls another one on the CPU and on the device.

    It returns both results, those of the device brought to the CPU. What is called
    gets a copy of the model, the image processor, the tokenizer and the device.
    """
    model, *rest = loaded

    def call(function):
        on_cpu = function(copy.deepcopy(model), *rest, torch.device("cpu"))
        with PretendDevice():
            moved = copy.deepcopy(model).to(DEVICE)
            READS.clear()
            on_device = function(moved, *rest, DEVICE)
        return on_cpu, at_home(on_device)

    return call


def at_home(result):
    """A result with its tensors on the CPU."""
    if isinstance(result, DeviceTensor):
        return result.values_here.detach()
    if isinstance(result, dict):
        return {name: at_home(one) for name, one in result.items()}
    if isinstance(result, (list, tuple)):
        return type(result)(at_home(one) for one in result)
    return result


def weights(model):
    """What is trained, on the CPU: {name: values}."""
    learning = learning_parameters(model).items()
    return {name: at_home(p).detach().clone() for name, p in learning}


def assert_same(results, atol=1e-4):
    """Both results agree, numbers up to what another order of a sum does."""
    torch.testing.assert_close(*results, rtol=1e-4, atol=atol)


def example_batch(features, tokenizer, device):
    """A batch of two sequences with two and one picture, on a device."""
    rows = [(features[:2], TEXTS[:2]), (features[2:3], TEXTS[2:3])]
    return {name: t.to(device) for name, t in collate(rows, tokenizer).items()}


# The model: forward, and what is made of its answers


def test_forward_with_features(both, features):
    def forward(model, _, tokenizer, device):
        out = model(None, **example_batch(features, tokenizer, device))
        return out.loss.detach(), out.logits.detach()

    assert_same(both(forward))


def test_forward_with_pixels(both):
    def forward(model, image_processor, tokenizer, device):
        pixels = torch.stack([image_processor(picture) for picture in PICTURES[:2]])
        text = "<image>a lemon<|endofchunk|><image>a tent<|endofchunk|>"
        lang_x = tokenizer(text, return_tensors="pt").input_ids.to(device)
        return model(pixels[None, :, None].to(device), lang_x).logits.detach()

    assert_same(both(forward))


def test_generate_with_beams(both, features):
    def generate(model, _, tokenizer, device):
        settings = {"padding_side": "left", "padding": True, "return_tensors": "pt"}
        prompts = ["<image>a lemon<|endofchunk|><image>", "<image>"]
        batch = tokenizer(prompts, **settings).to(device)
        pictures = torch.stack([features[:2], features[2:4]]).float()
        pictures[1, 1] = 0
        return model.generate(
            None,
            batch.input_ids,
            batch.attention_mask,
            vision_features=pictures.to(device),
            num_beams=3,
            num_return_sequences=2,
            max_new_tokens=6,
        )

    assert_same(both(generate))


def test_encode_pictures_gives_cpu_features(both):
    def encode(model, image_processor, *_):
        found = encode_pictures(model.vision_encoder, image_processor, PICTURES)
        assert type(found) is torch.Tensor and found.device.type == "cpu"
        return found.float()

    assert_same(both(encode), atol=2e-3)  # float16


# Training


@pytest.mark.parametrize("with_muon", [True, False])
def test_training_steps(both, features, with_muon):
    def steps(model, _, tokenizer, device):
        model.train()
        batch = example_batch(features, tokenizer, device)
        optimizers = make_optimizers(model, 1e-3, with_muon=with_muon)
        losses = [float(training_step(model, batch, optimizers, 1.0)) for _ in "12"]
        return losses, weights(model)

    assert_same(both(steps), atol=1e-3)  # Adam's first steps are signs


def test_train_stops_and_goes_on(both, features, tmp_path):
    """Three steps at once are two, a file and one more, bit for bit, and the CPU's."""

    def stop(line):
        if line.startswith("step     2"):
            raise KeyboardInterrupt

    def run(model, _, tokenizer, device):
        settings = {"n_steps": 3, "batch_size": 2, "report_every": 1}
        given = tokenizer, features, TEXTS
        first, second = copy.deepcopy(model), copy.deepcopy(model)
        file = tmp_path / f"{device}.pt"
        history = train(model, *given, **settings, report=[].append)
        with pytest.raises(KeyboardInterrupt):
            train(first, *given, **settings, checkpoint=file, report=stop)
        resumed = train(second, *given, **settings, checkpoint=file, report=[].append)
        assert [note["loss"] for note in resumed] == [note["loss"] for note in history]
        for name, values in weights(second).items():
            assert torch.equal(values, weights(model)[name]), name
        return [note["loss"] for note in history]

    assert_same(both(run))


def test_train_on_sequences(both, features):
    def run(model, _, tokenizer, device):
        given = tokenizer, features, [TEXTS[:2], TEXTS[2:4]]
        settings = {"n_steps": 2, "batch_size": 4, "report": [].append}
        history = train(model, *given, sequences=[[0, 1], [2, 3]], **settings)
        return [note["loss"] for note in history]

    assert_same(both(run))


def test_caption_losses_and_scores(both, features):
    def losses(model, _, tokenizer, device):
        return caption_losses(model, tokenizer, features, TEXTS, batch_size=3)

    on_cpu, on_device = both(losses)
    assert type(on_device) is torch.Tensor
    assert_same((on_cpu, on_device))


# What is read back


def test_reading_is_counted():
    with PretendDevice():
        READS.clear()
        numbers = torch.arange(4.0).to(DEVICE)
        quiet = numbers.mul(2).sum()  # nothing is read yet
        quiet = quiet + torch.zeros(2, device=DEVICE).masked_fill(numbers[:2] > 0, 1.0)
        assert not READS
        for number, read in enumerate(
            (
                lambda: quiet[0].item(),
                lambda: quiet.tolist(),
                lambda: bool(quiet[0] > 0),
                lambda: numbers[numbers > 1],
                lambda: numbers.nonzero(),
                lambda: numbers.cpu(),
                lambda: torch.equal(numbers, numbers),
                lambda: torch.zeros(4).copy_(numbers),
            ),
            1,
        ):
            read()
            assert sum(READS.values()) == number, number


def test_a_device_does_not_meet_the_cpu():
    with PretendDevice():
        there, here = torch.ones(3).to(DEVICE), torch.ones(3)
        for mix in (
            lambda: there + here,
            lambda: torch.stack([there, here]),
            lambda: here[there.long()],
        ):
            with pytest.raises(RuntimeError, match="same device"):
                mix()
        with pytest.raises(TypeError, match="numpy"):
            np.asarray(there)
        assert (there + torch.tensor(1.0)).tolist() == [2.0, 2.0, 2.0]  # no axes
        assert there[torch.tensor([0, 2])].tolist() == [1.0, 1.0]


def test_a_training_step_reads_nothing_back(loaded, features):
    """Forward, loss, backward, the length of the gradient: the device is not asked."""
    model, _, tokenizer = loaded
    with PretendDevice():
        moved = copy.deepcopy(model).to(DEVICE).train()
        batch = example_batch(features, tokenizer, DEVICE)
        READS.clear()
        loss_at_labels(moved, **batch, checked=True).backward()
        keep_old_rows(moved)
        learning = learning_parameters(moved).values()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        assert not READS, READS


@pytest.mark.parametrize("with_muon", [True, False])
def test_the_optimizers_read_nothing_back(loaded, features, with_muon):
    model, _, tokenizer = loaded
    with PretendDevice():
        moved = copy.deepcopy(model).to(DEVICE).train()
        optimizers = make_optimizers(moved, 1e-3, with_muon=with_muon)
        moved(None, **example_batch(features, tokenizer, DEVICE)).loss.backward()
        READS.clear()
        for _ in "12":
            for optimizer in optimizers:
                optimizer.step()
        assert not READS, READS


def test_train_reads_only_at_a_report(loaded, features):
    """Twice as many steps between two reports read no more."""
    model, _, tokenizer = loaded
    reads = {}
    with PretendDevice():
        for n_steps in (2, 4):
            moved = copy.deepcopy(model).to(DEVICE)
            READS.clear()
            given = moved, tokenizer, features, TEXTS, n_steps
            train(*given, batch_size=2, report_every=n_steps, report=[].append)
            reads[n_steps] = dict(READS)
    assert sum(reads[4].values()) == sum(reads[2].values()), reads


def test_a_checked_batch_has_the_loss_of_another(both, features):
    """`checked` leaves out the mask on a device: what it hid stands on the right."""

    def loss(model, _, tokenizer, device):
        batch = example_batch(features, tokenizer, device)
        assert not batch["attention_mask"].all()
        found = [model(None, **batch, checked=checked).loss for checked in (0, 1)]
        torch.testing.assert_close(*map(at_home, found))
        return found[1].detach()

    assert_same(both(loss))


def test_what_is_not_checked_is_looked_at(loaded, features):
    """A wrong number of pictures is found on a device, too, unless it was checked."""
    model, _, tokenizer = loaded
    with PretendDevice():
        moved = copy.deepcopy(model).to(DEVICE)
        batch = example_batch(features, tokenizer, DEVICE)
        batch["vision_features"] = batch["vision_features"][:, :1]
        with pytest.raises(ValueError, match="row 0 has 2 <image> tokens"):
            moved(None, **batch)
        moved(None, **batch, checked=True)
        batch["vision_features"] = batch["vision_features"][:1]
        with pytest.raises(ValueError, match="pictures for 1 rows, but 2 of text"):
            moved(None, **batch, checked=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_finds_its_places_where_the_labels_are(reduction):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator)  # (B, T_txt, vocab)
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[0, 2:5] = labels[2] = IGNORE
    ours = logits.clone().requires_grad_()
    wanted = shifted_cross_entropy(ours, labels, reduction)
    wanted.sum().backward()
    usual = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction=reduction
    )
    torch.testing.assert_close(wanted.detach(), usual)
    with PretendDevice():
        there = logits.to(DEVICE).requires_grad_()
        READS.clear()
        found = shifted_cross_entropy(there, labels, reduction)
        found.sum().backward()
        assert not READS, READS
        again = shifted_cross_entropy(there, labels.to(DEVICE), reduction)
    for result in (found, again):
        torch.testing.assert_close(at_home(result), wanted.detach())
    torch.testing.assert_close(at_home(there.grad), ours.grad)


# Writing


def test_caption_of_pictures_and_of_features(both, features):
    def write(model, image_processor, tokenizer, device):
        parts = model, image_processor, tokenizer
        texts = caption(*parts, PICTURES, num_beams=2)
        texts += caption(*parts, features)
        texts += caption(*parts, features.float().to(device))
        scenes = [{"text": text, "things": [text]} for text in TEXTS]
        return texts, score_captions(texts[: len(scenes)], scenes)

    on_cpu, on_device = both(write)
    assert on_cpu == on_device and all(on_cpu[0])


def test_stream_caption(both):
    def write(model, image_processor, tokenizer, device):
        return list(stream_caption(model, image_processor, tokenizer, PICTURES[0]))

    on_cpu, on_device = both(write)
    assert on_cpu == on_device and len(on_cpu) > 1


def test_score_candidates(both):
    def score(model, image_processor, tokenizer, device):
        parts = model, image_processor, tokenizer
        return score_candidates(*parts, PICTURES[0], "<image>", TEXTS)

    on_cpu, on_device = both(score)
    assert type(on_device) is torch.Tensor  # to be drawn, or compared
    assert_same((on_cpu, on_device))


# Few-shot


EPISODES = [
    {"numbers": [0, 1, 2], "texts": ["a dax", "a wug", "a dax"], "answer": "a dax"},
    {"numbers": [3, 4, 0], "texts": ["a fep", "a tiv", "a tiv"], "answer": "a tiv"},
]
SCENES = [{"thing": text, "studio": "noto"} for text in TEXTS]


def test_answer(both, features):
    def write(model, _, tokenizer, device):
        here = answer(model, tokenizer, features, EPISODES)
        there = answer(model, tokenizer, features.float().to(device), EPISODES)
        assert here == there
        return here

    on_cpu, on_device = both(write)
    assert on_cpu == on_device


def test_answer_in_words(both):
    def write(model, _, tokenizer, device):
        folder = flamingo_lite.SIZES["tiny"]["lang_encoder_path"]
        lm = AutoModelForCausalLM.from_pretrained(folder).to(device)
        return answer_in_words(lm, tokenizer, EPISODES, SCENES)

    on_cpu, on_device = both(write)
    assert on_cpu == on_device and len(on_cpu) == len(EPISODES)


@pytest.mark.parametrize("where", ["both there", "queries there", "support there"])
def test_nearest(where):
    generator = torch.Generator().manual_seed(0)
    queries, support = (torch.randn(n, 8, generator=generator) for n in (3, 7))
    wanted = nearest(queries, support, 2)
    with PretendDevice():
        found = nearest(
            queries if where == "support there" else queries.to(DEVICE),
            support if where == "queries there" else support.to(DEVICE),
            2,
        )
    assert type(found) is torch.Tensor and torch.equal(found, wanted)


# Looking inside


def test_attention_maps_of_what_collate_returns(both, features):
    def look(model, _, tokenizer, device):
        rows = [(features[:2], TEXTS[:2]), (features[2:3], TEXTS[2:3])]
        return attention_maps(model, collate(rows, tokenizer))

    on_cpu, on_device = both(look)
    assert all(type(one) is torch.Tensor for one in on_device)
    assert_same((on_cpu, on_device))


def test_attention_maps_of_a_batch_on_the_device(both, features):
    def look(model, _, tokenizer, device):
        return attention_maps(model, example_batch(features, tokenizer, device))

    assert_same(both(look))


def test_show_maps(both, features):
    """Maps of the device are drawn, as one tensor and as a list of them."""
    plt.switch_backend("Agg")

    def show(model, _, tokenizer, device):
        maps = torch.rand(2, 64, generator=torch.Generator().manual_seed(0)).to(device)
        drawn = []
        for some in (maps, list(maps)):
            show_maps(PICTURES[0], ["one", "two"], some)
            drawn.append(
                [np.asarray(ax.images[-1].get_array()) for ax in plt.gcf().axes]
            )
            plt.close("all")
        assert all(map(np.array_equal, *drawn))
        return drawn[0]

    assert_same(both(show))


def test_occlusion(both):
    def cover(model, image_processor, tokenizer, device):
        parts = model, image_processor, tokenizer
        return occlusion(*parts, PICTURES[0], "a lemon", 3, cells=2)

    on_cpu, on_device = both(cover)
    assert type(on_device) is torch.Tensor
    assert_same((on_cpu, on_device))


# Files


def test_save_and_load(both, tmp_path):
    """A model saved from the device is, loaded and moved, the same one."""

    def save(model, image_processor, tokenizer, device):
        folder = tmp_path / str(device)
        save_flamingo(model, folder)
        again = load_flamingo(folder)[0].to(device)
        for name, values in weights(model).items():
            assert torch.equal(weights(again)[name], values), name
        return (folder / "flamingo.safetensors").read_bytes()

    on_cpu, on_device = both(save)
    assert on_cpu == on_device


# Which device


@pytest.fixture
def machine(monkeypatch):
    """A function that says which kinds of device there are, and what is asked for."""

    def pretend(*kinds, named=None):
        monkeypatch.delenv("FLAMINGO_LITE_DEVICE", raising=False)
        if named is not None:
            monkeypatch.setenv("FLAMINGO_LITE_DEVICE", named)
        for kind, owner in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
            monkeypatch.setattr(owner, "is_available", lambda k=kind: k in kinds)

    return pretend


def test_choose_device_takes_the_fastest(machine):
    for kinds, wanted in (
        ((), "cpu"),
        (("mps",), "mps"),
        (("cuda",), "cuda"),
        (("mps", "cuda"), "cuda"),
    ):
        machine(*kinds)
        assert choose_device() == torch.device(wanted)


def test_choose_device_is_told(machine):
    machine("cuda", named="cpu")
    assert choose_device() == torch.device("cpu")
    machine("cuda", named="")
    assert choose_device() == torch.device("cuda")
    machine(named=DEVICE.type)
    with PretendDevice():
        assert choose_device() == DEVICE


@pytest.mark.parametrize("named", ["gpu", "cuda:99", "CPU!", "cuda 0"])
def test_choose_device_refuses_what_is_not_there(machine, named):
    machine(named=named)
    with pytest.raises(ValueError, match="FLAMINGO_LITE_DEVICE=.*no device of this"):
        choose_device()


def test_describe_device(monkeypatch):
    about = SimpleNamespace(name="Tesla T4", total_memory=15_637_086_208)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12_000_000_000)
    assert describe_device("cuda:1") == "cuda:1, Tesla T4, 15.6 GB"
    assert describe_device(torch.device("mps")) == "mps, Apple GPU, 12.0 GB"
    for n_threads, words in ((1, "1 thread"), (2, "2 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n_threads: n)
        said = describe_device("cpu").split(", ")
        assert said[:2] == ["cpu", words]
    assert said[2].endswith(" GB") and float(said[2].split()[0]) > 0.5


# The notebooks

BOOK = Path(__file__).resolve().parents[1] / "book"
COMPUTING = (
    "01_clip_features 05_model 05b_loading 07_data 07c_feature_cache 07d_shards "
    "08_generation 08b_checkpoints 09_training 10_few_shot 11_looking_inside "
    "12_real_one A_tiny_clip B_tiny_opt"
).split()
BUILDS = {"build_flamingo", "load_flamingo"}  # each gives a model on the CPU


def cells_of(notebook):
    """The code cells of a notebook that stay in it: [(number, source)]."""
    cells = nbformat.read(BOOK / f"{notebook}.ipynb", as_version=4).cells
    return [
        (number, cell.source)
        for number, cell in enumerate(cells)
        if cell.cell_type == "code" and not cell.source.startswith("#| export")
    ]


def left_on_the_cpu(source):
    """Names of models that a cell builds and does not move, in the order of lines."""
    built, moved = [], set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            called, target = node.value.func, node.targets[0]
            target = target.elts[0] if isinstance(target, ast.Tuple) else target
            if isinstance(target, ast.Name) and getattr(called, "id", "") in BUILDS:
                built.append(target.id)
        is_move = isinstance(node, ast.Attribute) and node.attr == "to"
        if is_move and isinstance(node.value, ast.Name):
            moved.add(node.value.id)
    return [name for name in built if name not in moved]


@pytest.mark.parametrize("notebook", COMPUTING)
def test_a_notebook_that_computes_uses_the_device_and_shows_it(notebook):
    cells = nbformat.read(BOOK / f"{notebook}.ipynb", as_version=4).cells
    shows = [c for c in cells if "print(describe_device(device))" in c.source]
    assert len(shows) == 1 and "device = choose_device()" in shows[0].source
    assert "nbval-check-output" not in shows[0].metadata.get("tags", [])
    says = r"GPU: (used (at the\nend, )?if there is one|wanted, not needed)"
    assert re.search(says, cells[0].source)


@pytest.mark.parametrize("notebook", COMPUTING)
def test_a_notebook_leaves_no_model_on_the_cpu(notebook):
    # Models whose numbers are counted or compared, or whose bytes on a CPU are.
    compared = {"05b_loading": {"half"}, "12_real_one": {"tiny", "model", "loaded"}}
    allowed = compared.get(notebook, set())
    for number, source in cells_of(notebook):
        left = set(left_on_the_cpu(source)) - allowed
        assert not left, f"cell {number}: {left}"


def test_a_model_that_is_left_is_found():
    built = 'model, _, _ = build_flamingo("tiny")\nmodel(None)'
    assert left_on_the_cpu(built) == ["model"]
    assert left_on_the_cpu(f"{built}\nmodel = model.to(device)") == []
    assert left_on_the_cpu('m = load_flamingo("tiny")[0].to(device)') == []


@pytest.mark.parametrize(
    "notebook", ["01_clip_features", "05b_loading", "08b_checkpoints"]
)
def test_a_notebook_runs_on_the_device(notebook):
    """From top to bottom; a tensor that stayed on the CPU would stop it."""
    script = [sys.executable, Path(__file__).with_name("pretend_device.py")]
    done = subprocess.run(
        [*script, BOOK / f"{notebook}.ipynb"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "meta, " in done.stdout  # the device, as the notebook shows it
    assert len(done.stdout.splitlines()[-1].split()) > 3, done.stdout[-300:]
