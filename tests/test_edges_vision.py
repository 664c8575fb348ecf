"""The eye at its edges: pictures of any mode, towers that compute something else."""

import copy
import io
import json
import re
import shutil
import types

import numpy as np
import open_clip
import pytest
import torch
from conftest import SMALL
from PIL import Image
from safetensors.torch import save_file
from transformers import OPTConfig, OPTForCausalLM

from flamingo_lite import (
    TimmTower,
    VisionEncoder,
    build_flamingo,
    create_model_and_transforms,
    encode_pictures,
    fingerprint,
    load_flamingo,
    load_vision_encoder,
    rgb_on_white,
    save_flamingo,
    train,
    vision,
)
from flamingo_lite.loading import DATA, difference

CLIP = f"local-dir:{DATA / 'tiny_clip'}"
WHITE, RED = (255, 255, 255), (255, 0, 0)


@pytest.fixture(scope="module")
def image_processor():
    return load_vision_encoder(CLIP)[1]


# --------------------------------------------------------------------------- pictures


def palette(transparency=None, mode="RGB"):
    """Two halves, colours 0 and 1; which of them is transparent, if any."""
    picture = Image.new("P", (8, 8), 0)
    picture.paste(1, (4, 0, 8, 8))
    picture.putpalette([0, 0, 0, 0, *RED, 255] if mode == "RGBA" else [0, 0, 0, *RED])
    if mode == "RGBA":
        picture.putpalette([0, 0, 0, 0, *RED, 255], "RGBA")
    if transparency is not None:
        picture.info["transparency"] = transparency
    return picture


def keyed(mode, colour):
    picture = Image.new(mode, (8, 8), colour)
    picture.info["transparency"] = colour
    return picture


CLEAR = {
    "RGBA": Image.new("RGBA", (8, 8), (0, 0, 0, 0)),
    "RGBA, blue below": Image.new("RGBA", (8, 8), (0, 0, 255, 0)),
    "RGBa": Image.new("RGBa", (8, 8), (0, 0, 0, 0)),
    "LA": Image.new("LA", (8, 8), (0, 0)),
    "La": Image.new("LA", (8, 8), (0, 0)).convert("La"),
    "PA": Image.new("PA", (8, 8), (0, 0)),
    "RGB with a transparent colour": keyed("RGB", (1, 2, 3)),
    "L with a transparent colour": keyed("L", 7),
    "1 with a transparent colour": keyed("1", 0),
    "P with a transparent colour": keyed("P", 0),
}


@pytest.mark.parametrize("kind", CLEAR)
def test_a_fully_transparent_picture_is_a_white_one(image_processor, kind):
    white = image_processor(Image.new("RGB", (8, 8), "white"))
    assert torch.equal(image_processor(CLEAR[kind]), white)
    assert torch.equal(white, torch.ones_like(white))


HALF = {
    "P, one colour transparent": palette(transparency=0),
    "P, an alpha for each colour": palette(transparency=bytes([0, 255])),
    "P, alpha in the palette": palette(mode="RGBA"),
    "P to RGBA": palette(transparency=0).convert("RGBA"),
}


@pytest.mark.parametrize("kind", HALF)
def test_half_of_a_palette_is_transparent(kind):
    done = rgb_on_white(HALF[kind])
    assert done.mode == "RGB"
    assert (done.getpixel((0, 0)), done.getpixel((7, 0))) == (WHITE, RED)


OPAQUE = {
    "1": (1, WHITE),
    "L": (100, (100, 100, 100)),
    "RGB": (RED, RED),
    "RGBX": ((*RED, 0), RED),  # the fourth channel is filling
    "CMYK": ((0, 255, 255, 0), RED),
    "YCbCr": ((128, 128, 128), (128, 128, 128)),
    "HSV": ((0, 255, 255), RED),
    "LAB": ((255, 128, 128), WHITE),
    "I;16": (128 * 257, (128, 128, 128)),
    "I;16B": (128 * 257, (128, 128, 128)),
}


@pytest.mark.parametrize("mode", OPAQUE)
def test_every_other_mode_keeps_its_colour(image_processor, mode):
    value, colour = OPAQUE[mode]
    picture = Image.new(mode, (8, 8), value)
    done = rgb_on_white(picture)
    assert done.mode == "RGB" and done.size == (8, 8)
    assert np.abs(np.subtract(done.getpixel((3, 3)), colour)).max() <= 1
    assert torch.equal(image_processor(picture), image_processor(done))


def test_an_rgb_picture_keeps_its_pixels():
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    assert np.array_equal(np.asarray(rgb_on_white(picture)), noise)
    assert np.array_equal(np.asarray(rgb_on_white(picture.convert("RGBA"))), noise)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA"])
def test_a_picture_that_lies_down_is_turned(image_processor, mode):
    """EXIF 6: the camera was held on its side. The same for a file and in memory."""
    upright = Image.new("RGB", (64, 64), "white")
    upright.paste("black", (0, 0, 20, 50))
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    upright.rotate(90).convert(mode).save(file, "PNG", exif=exif)
    assert torch.equal(image_processor(Image.open(file)), image_processor(upright))


REFUSED = {
    "brightness in 32 bits": Image.new("F", (4, 4), 0.5),
    "brightness in 32 bits; save": Image.new("I", (4, 4), 100),
    "transparent colour in 16 bits": keyed("I;16", 7),
    "a strip of 100000 x 1 pixels": Image.new("L", (100_000, 1)),
    "a strip of 0 x 0 pixels": Image.new("RGB", (0, 0)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_shown_is_refused(image_processor, reason):
    with pytest.raises(ValueError, match=reason):
        image_processor(REFUSED[reason])


def test_a_picture_that_is_cut_short_is_refused(image_processor):
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    half = io.BytesIO(file.getvalue()[:1000])
    with pytest.raises(ValueError, match="cannot be decoded: .*truncated"):
        image_processor(Image.open(half))


@pytest.mark.parametrize(
    "thing", ["a.png", np.zeros((4, 4, 3), np.uint8), torch.zeros(3, 64, 64), None]
)
def test_what_is_no_picture_is_refused(image_processor, thing):
    with pytest.raises(TypeError, match=f"got {type(thing).__name__}: .*Image.open"):
        image_processor(thing)


def test_the_processor_of_load_flamingo_puts_pictures_on_white():
    """OpenMoji's drawings hold black where they are transparent."""
    image_processor = load_flamingo("tiny")[1]
    picture = Image.open(DATA / "emoji/openmoji/flamingo.webp")
    assert picture.mode == "RGBA"
    white = Image.new("RGBA", picture.size, "white")
    on_white = Image.alpha_composite(white, picture).convert("RGB")
    assert torch.equal(image_processor(picture), image_processor(on_white))


# ----------------------------------------------------- what the weights want: settings

GELU_CLIP = "ViT-B-32"
QUICK_CLIP = "ViT-B-32-quickgelu"
MEAN = open_clip.OPENAI_DATASET_MEAN


def activations(encoder):
    blocks = encoder.visual.transformer.resblocks
    return {type(block.mlp.gelu).__name__ for block in blocks}


def normalised(image_processor):
    """What a processor does last: mean and deviation; and its first step of its own."""
    steps = image_processor.transforms
    return tuple(steps[-1].mean), tuple(steps[-1].std), steps[1]


@pytest.fixture(scope="module")
def small_models(tmp_path_factory):
    """open_clip's registry with small models in place of the large ones.

    Under the names of the real ones, so that the real tags and their settings apply.
    """
    configs, before = open_clip.factory._MODEL_CONFIGS, {}
    small = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 1, "layers": 1}
    for name in (GELU_CLIP, QUICK_CLIP, "ViT-L-14", "ViT-H-14", "ViT-L-14-CLIPA"):
        before[name] = configs[name]
        extra = {k: v for k, v in configs[name].items() if k == "quick_gelu"}
        vision = {**small, "head_width": 32}
        configs[name] = {
            "embed_dim": 32, "vision_cfg": vision, "text_cfg": text, **extra
        }  # fmt: skip
    yield configs
    configs.update(before)


@pytest.fixture(scope="module")
def weights(small_models, tmp_path_factory):
    """A random CLIP, saved: nothing in the file says how it is to be used."""
    torch.manual_seed(0)
    state = open_clip.create_model(QUICK_CLIP).state_dict()
    folder = tmp_path_factory.mktemp("saved")
    torch.save(state, folder / "clip.pt")
    save_file(state, folder / "clip.safetensors")
    return folder


@pytest.fixture
def hub(weights, monkeypatch):
    """Every tag's download gives the random CLIP."""
    file = str(weights / "clip.pt")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *a, **k: file)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "name, tag, activation",
    [
        ("ViT-L-14", "openai", "QuickGELU"),  # the paper's, and the README's
        ("ViT-L/14", "openai", "QuickGELU"),
        ("ViT-L-14", "laion2b_s32b_b82k", "GELU"),
        (GELU_CLIP, "openai", "QuickGELU"),
        (GELU_CLIP, "metaclip-fullcc", "QuickGELU"),
        (QUICK_CLIP, "openai", "QuickGELU"),
        (GELU_CLIP, "laion2b_s34b_b79k", "GELU"),
        ("ViT-H-14", "dfn5b", "QuickGELU"),
    ],
)
def test_a_tag_has_its_own_activation(hub, name, tag, activation):
    encoder, _ = load_vision_encoder(name, tag)
    assert activations(encoder) == {activation}


def test_a_tag_keeps_its_own_picture_settings(hub):
    """dfn5b squashes, CLIPA has another mean and bilinear scaling."""
    mean, _, resize = normalised(load_vision_encoder("ViT-H-14", "dfn5b")[1])
    assert mean == MEAN and tuple(resize.size) == (32, 32)
    mean, _, resize = normalised(load_vision_encoder("ViT-L-14-CLIPA", "datacomp1b")[1])
    assert mean == (0.485, 0.456, 0.406) and resize.interpolation.value == "bilinear"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize(
    "name, tag",
    [
        ("ViT-L-14", "openai"),
        ("ViT-H-14", "dfn5b"),
        ("ViT-L-14-CLIPA", "datacomp1b"),
        (GELU_CLIP, "laion2b_s34b_b79k"),
    ],
)
def test_a_file_with_its_tag_is_as_the_tag(hub, weights, name, tag, suffix):
    """Token for token, and pixel for pixel."""
    picture = Image.effect_noise((50, 40), 90).convert("RGB")
    wanted, processor = load_vision_encoder(name, tag)
    pixels = processor(picture)[None, None, None]  # (B, T_img, F, 3, H, W)
    mine, my_processor = load_vision_encoder(name, f"{tag}:{weights}/clip.{suffix}")
    assert torch.equal(my_processor(picture), pixels[0, 0, 0])
    assert torch.equal(mine(pixels), wanted(pixels))


def test_a_file_that_does_not_say_is_warned_of(weights):
    with pytest.warns(UserWarning, match=r"does not say.*ViT-B-32.*openai.*openai:"):
        encoder, _ = load_vision_encoder(GELU_CLIP, f"{weights}/clip.pt")
    assert activations(encoder) == {"GELU"}
    with pytest.warns(UserWarning, match=r"datacomp1b want something else"):
        load_vision_encoder("ViT-L-14-CLIPA", f"{weights}/clip.pt")


@pytest.mark.filterwarnings("error")
def test_the_name_of_a_quickgelu_clip_is_enough(weights):
    encoder, _ = load_vision_encoder(QUICK_CLIP, f"{weights}/clip.pt")
    assert activations(encoder) == {"QuickGELU"}


@pytest.mark.parametrize(
    "pretrained, reason",
    [
        ("{}/vit_b_32-quickgelu-mine.pt", "quickgelu-mine.*True.*ViT-B-32.*False"),
        ("{}/ViT-B-32_QuickGELU.pt", "QuickGELU.pt.*True.*ViT-B-32.*False"),
        ("laion2b_s34b_b79k:{}/quick-gelu.pt", "quick-gelu.*laion2b_s34b_b79k.*False"),
        ("no_tag:{}/clip.pt", "ViT-B-32 has no tag 'no_tag'.*openai"),
    ],
)
def test_a_mismatch_that_is_seen_names_both(weights, tmp_path, pretrained, reason):
    name = pretrained.split("/")[-1]
    shutil.copy(weights / "clip.pt", tmp_path / name)
    with pytest.raises(ValueError, match=reason):
        load_vision_encoder(GELU_CLIP, pretrained.format(tmp_path))


def test_a_tag_that_a_quickgelu_name_does_not_have(weights):
    with pytest.raises(
        ValueError, match=f"{QUICK_CLIP} has no tag 'laion2b_s34b_b79k'"
    ):
        load_vision_encoder(QUICK_CLIP, f"laion2b_s34b_b79k:{weights}/clip.pt")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "beside, reason",
    [
        ({"quick_gelu": True}, "'quick_gelu': True.*ViT-B-32.*'quick_gelu': False"),
        ({"mean": [0.5, 0.5, 0.5]}, r"'mean': \(0.5, 0.5, 0.5\).*ViT-B-32.*0.48145"),
        ({"resize_mode": "squash"}, "'squash'.*ViT-B-32.*'shortest'"),
        ({"interpolation": "bilinear"}, "'bilinear'.*ViT-B-32.*'bicubic'"),
        ({}, None),
    ],
)
def test_the_configuration_beside_a_file_is_read(
    small_models, weights, tmp_path, beside, reason
):
    """As a folder of the hub has one. It agrees, or both are named."""
    model_cfg = {
        **small_models[GELU_CLIP],
        "quick_gelu": beside.pop("quick_gelu", False),
    }
    config = {"model_cfg": model_cfg, "preprocess_cfg": beside}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    shutil.copy(weights / "clip.safetensors", tmp_path)
    file = f"{tmp_path}/clip.safetensors"
    if reason is None:
        load_vision_encoder(GELU_CLIP, file)
        return
    with pytest.raises(
        ValueError, match=f"(?s)open_clip_config.json.*{reason}|{reason}"
    ):
        load_vision_encoder(GELU_CLIP, file)
    encoder, _ = load_vision_encoder(f"local-dir:{tmp_path}")  # what the error advises
    assert activations(encoder) == {"QuickGELU" if model_cfg["quick_gelu"] else "GELU"}


def test_a_damaged_configuration_beside_a_file_is_an_error(weights, tmp_path):
    shutil.copy(weights / "clip.pt", tmp_path)
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(OSError, match="clip.pt"):
        load_vision_encoder(QUICK_CLIP, f"{tmp_path}/clip.pt")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_for_pictures_of_another_size(
    small_models, weights, monkeypatch, suffix
):
    """open_clip would stretch its table of places, and say nothing."""
    vision = {**small_models[QUICK_CLIP]["vision_cfg"], "image_size": 48}
    monkeypatch.setitem(
        small_models, QUICK_CLIP, {**small_models[QUICK_CLIP], "vision_cfg": vision}
    )
    with pytest.raises(ValueError, match=f"16 patches, and {QUICK_CLIP} makes 36"):
        load_vision_encoder(QUICK_CLIP, f"{weights}/clip.{suffix}")


def test_weights_beside_a_folders_own_are_refused(weights):
    """open_clip ignores them, with a line in a log."""
    for pretrained in ("openai", f"{weights}/clip.pt"):
        with pytest.raises(ValueError, match="tiny_clip has weights of its own"):
            load_vision_encoder(CLIP, pretrained)


def test_the_papers_size_asks_for_quickgelu(small_models, hub, backbones):
    """`build_flamingo("paper")`, with a small language model."""
    sizes = {**SMALL, "lang_encoder_path": backbones["opt"]}
    model, _, _ = build_flamingo("paper", tokenizer_path=backbones["opt"], **sizes)
    blocks = model.vision_encoder.transformer.resblocks
    assert type(blocks[0].mlp.gelu).__name__ == "QuickGELU"


# ------------------------------------------------------------------------- fingerprints


def tower(quick_gelu=False, preprocess=None, **vision):
    """The same weights whatever the settings, as far as those allow."""
    torch.manual_seed(0)
    sizes = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32}
    model = open_clip.CLIP(
        embed_dim=32,
        vision_cfg={**sizes, "patch_size": 8, **vision},
        text_cfg={"vocab_size": 8, "width": 32, "heads": 1, "layers": 1},
        quick_gelu=quick_gelu,
    )
    settings = {
        "mean": MEAN,
        "std": MEAN,
        "resize_mode": "shortest",
        **(preprocess or {}),
    }
    model.visual.preprocess_cfg = settings
    return VisionEncoder(model)


OTHERS = {
    "activation": {"quick_gelu": True},
    "a form of GELU": {"act_kwargs": {"approximate": "tanh"}},
    "heads": {"head_width": 16},
    "epsilon": {"norm_kwargs": {"eps": 1e-6}},
    "pooling": {"pool_type": "avg"},
    "the last LayerNorm": {"final_ln_after_pool": True},
    "mean": {"preprocess": {"mean": (0.5, 0.5, 0.5)}},
    "deviation": {"preprocess": {"std": (0.5, 0.5, 0.5)}},
    "resize mode": {"preprocess": {"resize_mode": "squash"}},
    "interpolation": {"preprocess": {"interpolation": "bilinear"}},
    "picture size, as many patches": {"image_size": 64, "patch_size": 16},
    "picture size, the same grid": {"image_size": (33, 33)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_fingerprint_differs_where_the_computation_does(what):
    ours, other = tower(), tower(**OTHERS[what])
    assert fingerprint(ours) == fingerprint(tower()) == fingerprint(copy.deepcopy(ours))
    assert fingerprint(ours) != fingerprint(other)
    if "patch_size" not in OTHERS[what]:
        states = (e.state_dict().values() for e in (ours, other))
        assert all(map(torch.equal, *states))
        settings = "the weights are the same, the settings are not"
        assert difference(fingerprint(ours), fingerprint(other)) == settings


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "gelu"},
        {"num_attention_heads": 4},
        {"do_layer_norm_before": False},
    ],
)
def test_a_language_models_fingerprint_has_its_settings(change):
    def build(**change):
        torch.manual_seed(0)
        sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1}
        settings = {"num_attention_heads": 2, "ffn_dim": 64, **sizes, **change}
        return OPTForCausalLM(OPTConfig(word_embed_proj_dim=32, **settings))

    assert fingerprint(build()) == fingerprint(build())
    assert fingerprint(build()) != fingerprint(build(**change))


def test_a_model_trained_on_another_activation_is_refused(tmp_path):
    """The same weights in the folder of another CLIP, and one word in its config."""
    model, _, _ = build_flamingo("tiny")
    save_flamingo(model, tmp_path / "mine")
    eyes = shutil.copytree(DATA / "tiny_clip", tmp_path / "eyes")
    config = json.loads((eyes / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = True
    (eyes / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="mine .*tiny_clip.*eyes.*settings are not"):
        load_flamingo(tmp_path / "mine", clip_vision_encoder_path=f"local-dir:{eyes}")


def test_fingerprints_of_weights_alone_are_still_read(tmp_path):
    """A folder from before: as much as it says must be right, and no less."""
    model, _, _ = load_flamingo("tiny")
    save_flamingo(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for part in config["backbones"].values():
        part["fingerprint"] = part["fingerprint"].split("-")[0]
    assert config["backbones"]["vision_encoder"]["fingerprint"] == "39c068273374a508"
    assert config["backbones"]["lang_encoder"]["fingerprint"] == "5683d3a661d76187"
    (tmp_path / "config.json").write_text(json.dumps(config))
    load_flamingo(tmp_path)
    for wrong in ("7b18c8e4c8e34846", "", "7b18", "7b18c8e4c8e34845-00000000", None):
        config["backbones"]["vision_encoder"]["fingerprint"] = wrong
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="trained with the vision_encoder"):
            load_flamingo(tmp_path)


def test_the_shipped_models_name_weights_and_settings():
    """Of SmolLM2 the weights only: its size was saved before settings were noted."""
    both = "[0-9a-f]{16}-[0-9a-f]{8}"
    for size, of_text in (("tiny", both), ("smol", "[0-9a-f]{16}(-[0-9a-f]{8})?")):
        config = json.loads((DATA / f"{size}_flamingo/config.json").read_text())
        parts = {n: part["fingerprint"] for n, part in config["backbones"].items()}
        assert parts.keys() == {"vision_encoder", "lang_encoder", "tokenizer"}
        assert re.fullmatch("[0-9a-f]{16}", parts["tokenizer"])
        assert re.fullmatch(both, parts["vision_encoder"])
        assert re.fullmatch(of_text, parts["lang_encoder"])


# ---------------------------------------------------------- towers without patch tokens


@pytest.mark.parametrize(
    "vision, reason",
    [
        ({"attentional_pool": True}, "learned queries"),
        ({"attentional_pool": "parallel"}, "learned queries"),
        ({"attentional_pool": "cascade"}, "learned queries"),
        ({"attentional_pool": True, "attn_pooler_queries": 17}, "learned queries"),
        ({"pool_type": "none"}, "CLS stands among"),
        ({"layers": [1, 1, 1, 1]}, "got ModifiedResNet"),
    ],
)
def test_a_tower_without_patch_tokens_is_refused(tmp_path, vision, reason):
    """17 queries, one of them pooled, are as many tokens as the grid has patches."""
    with pytest.raises(ValueError, match=f"no patch tokens: .*{reason}"):
        tower(**vision)
    config = {"model_cfg": {"vision_cfg": vision}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"no patch tokens: .*{reason}"):
        load_vision_encoder(f"local-dir:{tmp_path}")  # there are no weights to load


QUERIES = {"coca_ViT-B-32", "coca_ViT-L-14"}
RESNETS = {name for name in open_clip.list_models() if name.startswith("RN")}


def same_tower(name):
    """What decides how a tower is built, so that each is built once."""
    config = open_clip.get_model_config(name)
    return json.dumps([config["vision_cfg"], config["embed_dim"]], sort_keys=True)


TOWERS = {same_tower(name): name for name in open_clip.list_models()}


@pytest.mark.parametrize("name", TOWERS.values())
def test_every_model_of_open_clip_is_taken_or_refused(name, monkeypatch):
    """By its name alone: nothing is built with numbers, and nothing fetched.

    A tower that is taken gives a grid of tokens: seen on a picture without numbers.
    """

    class Built(Exception):
        pass

    def build(*args, **kwargs):
        raise Built

    seen, look = [], vision._with_tokens
    monkeypatch.setattr(open_clip, "create_model_and_transforms", build)
    monkeypatch.setattr(
        vision, "_with_tokens", lambda *args: seen.append(look(*args)) or seen[0]
    )
    with pytest.raises((OSError, ValueError)) as caught:
        load_vision_encoder(name, "openai")
    if name in QUERIES | RESNETS:
        assert caught.type is ValueError and name in str(caught.value)
        reason = "learned queries" if name in QUERIES else "got ModifiedResNet"
        assert reason in str(caught.value)
        return
    assert isinstance(caught.value.__cause__, Built)
    (visual,) = seen
    v = visual.grid_size[0] * visual.grid_size[1]
    if isinstance(visual, TimmTower):
        assert visual.grid_size[0] == visual.grid_size[1] and v >= 16
        assert all(tensor.is_meta for tensor in visual.state_dict().values())
    else:
        pixels = torch.empty(1, 3, *visual.image_size, device="meta")
        assert visual(pixels)[1].shape == (1, v, visual.conv1.out_channels)


def test_how_many_of_open_clips_models_are_taken():
    """132 of the 144 of open_clip 3.3; all but CLIP's ResNets and two CoCas."""
    names = set(open_clip.list_models())
    assert names >= QUERIES and len(RESNETS) == 10
    if open_clip.__version__ == "3.3.0":
        assert (len(names), len(names - QUERIES - RESNETS)) == (144, 132)


# ------------------------------------------------------------------- towers of timm's


def timm_clip(name, size=160, **vision):
    """A CLIP of open_clip's around a tower of timm's, with random weights."""
    torch.manual_seed(0)
    settings = {"timm_model_name": name, "timm_pool": "", "image_size": size, **vision}
    config = {
        "embed_dim": 32,
        "vision_cfg": settings,
        "text_cfg": {"vocab_size": 8, "width": 32, "heads": 1, "layers": 1},
    }
    return config, open_clip.model.CustomTextCLIP(**config).eval()


# Transformers, pooled as SigLIP is, with CLS, without; maps with channels first, last.
SIGLIP = {"timm_pool": "map", "timm_proj": "none"}
TIMM = {
    "test_vit3": SIGLIP,
    "test_vit": {"timm_pool": "token", "timm_proj": None},
    "test_vit_relpos": {"timm_proj": "linear"},
    "test_convnext": {"timm_proj": "linear"},
    "test_mambaout": {"timm_pool": "avg", "timm_proj": "none"},
}


@pytest.mark.parametrize("name", TIMM)
def test_the_tokens_are_those_of_forward_features(name):
    """A slow twin: picture by picture, place by place, from timm's own features."""
    clip = timm_clip(name, **TIMM[name])[1]
    pixels = torch.randn(1, 2, 2, 3, 160, 160)  # (B, T_img, F, 3, H, W)
    with torch.no_grad():
        pooled = clip.visual(pixels[0, :, 0])  # (T_img, d)
    encoder = VisionEncoder(clip)
    tokens = encoder(pixels)  # (B, T_img, F, v, d_img)
    rows, columns = encoder.visual.grid_size
    assert tokens.shape == (1, 2, 2, rows * columns, encoder.dim)
    assert torch.allclose(encoder.visual(pixels[0, :, 0])[0], pooled, atol=1e-5)
    for t in range(2):
        for f in range(2):
            trunk = encoder.visual.trunk
            with torch.no_grad():
                (features,) = trunk.forward_features(pixels[0, t, f][None])
            for number in range(rows * columns):
                row, column = divmod(number, columns)
                if features.ndim == 2:  # (prefix + v, d_img)
                    own = features[len(features) - rows * columns + number]
                elif features.shape[0] == encoder.dim:  # (d_img, rows, columns)
                    own = features[:, row, column]
                else:  # (rows, columns, d_img)
                    own = features[row, column]
                assert torch.allclose(tokens[0, t, f, number], own, atol=1e-5)


@pytest.mark.parametrize("name", ["test_vit3", "test_convnext"])
def test_a_token_stands_where_its_patch_is(name):
    """A change in one corner moves the tokens there most."""
    encoder = VisionEncoder(timm_clip(name, **TIMM[name])[1])
    rows, columns = encoder.visual.grid_size
    before = torch.zeros(1, 1, 1, 3, 160, 160)  # (B, T_img, F, 3, H, W)
    for corner, at in (
        ((0, 0), 0),
        ((0, 1), columns - 1),
        ((1, 0), (rows - 1) * columns),
    ):
        after = before.clone()
        top, left = (128 * side for side in corner)
        after[..., top : top + 32, left : left + 32] = torch.randn(3, 32, 32)
        moved = (encoder(after) - encoder(before)).norm(dim=-1)[0, 0, 0]  # (v,)
        row, column = divmod(int(moved.argmax()), columns)
        near = (row < rows / 2) is (corner[0] == 0)
        assert near and (column < columns / 2) is (corner[1] == 0), (corner, at)


@pytest.mark.parametrize(
    "name, size, reason",
    [
        ("crossvit_tiny_240", 240, "CrossVit"),  # two lists of tokens
        ("levit_128s", 224, "LevitDistilled"),  # does not say what stands in front
        ("hiera_tiny_224", 224, "Hiera"),  # tokens in an order of its own
        ("test_vit3", 96, "VisionTransformer"),  # a trunk for 160 pixels
    ],
)
def test_features_that_are_no_grid_are_refused_before_the_download(
    tmp_path, name, size, reason
):
    vision_cfg = {"timm_model_name": name, "image_size": size, "timm_proj": "linear"}
    config = {"model_cfg": {"embed_dim": 32, "vision_cfg": vision_cfg}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"no patch tokens: .*timm's {reason}"):
        load_vision_encoder(f"local-dir:{tmp_path}")  # there are no weights to load


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """A small CLIP like SigLIP, as a folder: "local-dir:…"."""
    folder = tmp_path_factory.mktemp("siglip")
    config, clip = timm_clip("test_vit3", **SIGLIP)
    half = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    saved = {"model_cfg": {**config, "custom_text": True}, "preprocess_cfg": half}
    (folder / "open_clip_config.json").write_text(json.dumps(saved))
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def test_a_flamingo_with_a_timm_tower_is_built_saved_and_loaded(
    siglip, backbones, tmp_path
):
    parts = siglip, None, backbones["opt"], backbones["opt"]
    model, image_processor, tokenizer = create_model_and_transforms(*parts, **SMALL)
    assert model.vis_dim == 96 and not model.vision_encoder.training
    assert image_processor.transforms[-1].mean == (0.5, 0.5, 0.5)
    picture = Image.effect_noise((50, 40), 90).convert("RGB")
    pixels = image_processor(picture)[None, None, None]  # (B, T_img, F, 3, H, W)
    features = encode_pictures(model.vision_encoder, image_processor, [picture] * 3)
    assert features.shape == (3, 1, 100, 96)
    encoder, _ = load_vision_encoder(siglip)
    assert torch.allclose(encoder(pixels)[0], features[:1].float(), atol=1e-2)
    train(model, tokenizer, features, ["a b", "c", "d"], 2, 3, report=str)
    save_flamingo(model, tmp_path / "mine")
    again, _, _ = load_flamingo(tmp_path / "mine")
    ids = tokenizer("<image>a", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(pixels, ids).logits, again(pixels, ids).logits)
        other = model(vision_x=None, lang_x=ids, vision_features=encoder(pixels)).logits
    assert torch.allclose(other, again(pixels, ids).logits, atol=1e-5)


@pytest.mark.parametrize("what", ["activation", "heads", "epsilon", "picture"])
def test_a_timm_towers_fingerprint_differs_where_the_computation_does(what):
    def build(change=False):
        visual = timm_clip("test_vit3", **SIGLIP)[1].visual
        visual.preprocess_cfg = {"mean": (0.5,) * 3}
        block = visual.trunk.blocks[0]
        if change and what == "activation":
            block.mlp.act = torch.nn.ReLU()
        if change and what == "heads":
            block.attn.num_heads, block.attn.head_dim = 6, 16  # they were 3, 32
        if change and what == "epsilon":
            block.norm1.eps *= 10
        if change and what == "picture":
            visual.preprocess_cfg = {"mean": MEAN}
        return VisionEncoder(types.SimpleNamespace(visual=visual))

    assert fingerprint(build()) == fingerprint(build())
    assert fingerprint(build()) == fingerprint(copy.deepcopy(build()))
    said = difference(fingerprint(build()), fingerprint(build(change=True)))
    assert said == "the weights are the same, the settings are not"


def test_a_timm_tower_is_frozen_and_stays_in_eval_mode():
    """ConvNeXt has drop path, which would make tokens random in a training loop."""
    vision = {"timm_proj": "linear", "timm_drop_path": 0.5}
    encoder = VisionEncoder(timm_clip("test_convnext", **vision)[1]).train()
    pixels = torch.randn(1, 1, 1, 3, 160, 160)  # (B, T_img, F, 3, H, W)
    assert torch.equal(encoder(pixels), encoder(pixels))
    assert not any(p.requires_grad for p in encoder.parameters())


def test_tokens_are_counted_against_the_grid():
    """Whatever is done to the tower afterwards."""
    encoder = tower()
    pixels = torch.zeros(1, 1, 1, 3, 32, 32)  # (B, T_img, F, 3, H, W)
    assert encoder(pixels).shape == (1, 1, 1, 16, 64)
    encoder.visual.pool_type = "none"
    with pytest.raises(ValueError, match="want 16 tokens, one a patch, got 17"):
        encoder(pixels)
