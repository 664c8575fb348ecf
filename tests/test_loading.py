"""The paper's path, small: names and checkpoint files as OpenFlamingo takes them.

`create_model_and_transforms("ViT-L-14", "openai", "facebook/opt-125m", …)` is the same
code with a larger model. No test here uses the network; some prove that without one
the message is clear.
"""

import socket

import open_clip
import pytest
import torch
from conftest import SMALL, random_pixels, tokenize
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig

from flamingo_lite import (
    Flamingo,
    FlamingoLMMixin,
    GatedCrossAttentionBlock,
    PerceiverResampler,
    build_flamingo,
    create_model_and_transforms,
    extend_instance,
    load_vision_encoder,
)

CLIP = "ViT-S-32-alt"  # the smallest plain ViT that open_clip knows by name


@pytest.fixture(scope="module")
def clip_weights(tmp_path_factory):
    """A random CLIP of a built-in size: {suffix: saved file}, and its tensors."""
    torch.manual_seed(0)
    state = open_clip.create_model(CLIP).state_dict()
    folder = tmp_path_factory.mktemp("clip_weights")
    torch.save(state, folder / "clip.pt")
    save_file(state, folder / "clip.safetensors")
    return {s: str(folder / f"clip.{s}") for s in ("pt", "safetensors")}, state


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_named_clip_with_a_checkpoint_file(clip_weights, backbones, suffix):
    """The weights of the file arrive, and a picture goes through the whole model."""
    files, state = clip_weights
    model, image_processor, tokenizer = create_model_and_transforms(
        CLIP, files[suffix], backbones["opt"], backbones["opt"], **SMALL
    )
    loaded = model.vision_encoder.state_dict()
    assert all(torch.equal(state[f"visual.{name}"], loaded[name]) for name in loaded)
    picture = image_processor(open_clip_picture())
    assert picture.shape == (3, 224, 224)
    ids, mask = tokenize(tokenizer, ["<image>a bear"])
    with torch.no_grad():
        logits = model(picture[None, None, None], ids, mask).logits
    assert logits.shape == (*ids.shape, len(tokenizer)) and logits.isfinite().all()


def open_clip_picture():
    from PIL import Image

    return Image.new("RGB", (300, 200), "pink")


def test_a_language_model_in_hub_format(backbones):
    """`use_local_files` too: a folder of save_pretrained is all that is needed."""
    model, image_processor, tokenizer = create_model_and_transforms(
        backbones["clip"],
        None,
        backbones["opt"],
        backbones["opt"],
        use_local_files=True,
        **SMALL,
    )
    assert image_processor(open_clip_picture()).shape == (3, 32, 32)
    for token, number in (
        ("<image>", model.media_token_id),
        ("<|endofchunk|>", model.eoc_token_id),
    ):
        assert tokenizer.convert_tokens_to_ids(token) == number
        assert tokenizer(f"a{token}b").input_ids.count(number) == 1
    table = model.lang_encoder.get_input_embeddings().weight
    assert len(table) == len(tokenizer)


def test_vision_encoder_gives_patch_tokens(backbones):
    """(B, T_img, F, v, d_img), without CLS, frozen, whatever `train` says."""
    encoder, _ = load_vision_encoder(backbones["clip"])
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    tokens = encoder(random_pixels(2, 3, F=2))
    assert tokens.shape == (2, 3, 2, 16, 32) and not tokens.requires_grad
    with pytest.raises(ValueError, match="B, T_img, F, 3"):
        encoder(random_pixels(2, 3)[0])


# ----------------------------------------------------------------- without a network


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Every connection fails at once; nothing was downloaded before."""

    def refuse(*args, **kwargs):
        raise OSError("there is no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return {"cache_dir": str(tmp_path / "empty_cache")}


@pytest.mark.parametrize(
    "name, pretrained",
    [
        ("ViT-B-32", "laion400m_e32"),
        ("ViT-B-32", "no_such_tag"),
        ("No-Such-Model", None),
        ("ViT-S-32-alt", "/no/such/clip.pt"),
        ("local-dir:/no/such/folder", None),
    ],
)
def test_no_clip_is_a_clear_error(no_network, name, pretrained):
    with pytest.raises(OSError) as caught:
        load_vision_encoder(name, pretrained, **no_network)
    message = str(caught.value)
    wanted = pretrained if pretrained and "/" in pretrained else name
    assert wanted.removeprefix("local-dir:") in message
    assert "file" in message or "folder" in message


def test_no_language_model_is_a_clear_error(no_network, backbones):
    for use_local_files in (True, False):
        with pytest.raises(OSError, match="facebook/opt-125m.*folder.*tiny"):
            create_model_and_transforms(
                backbones["clip"],
                None,
                "facebook/opt-125m",
                "facebook/opt-125m",
                use_local_files=use_local_files,
                **no_network,
            )


def test_a_language_model_folder_without_weights_is_a_clear_error(backbones, tmp_path):
    with pytest.raises(OSError, match=str(tmp_path)):
        create_model_and_transforms(
            backbones["clip"], None, str(tmp_path), str(tmp_path), **SMALL
        )


def test_a_clip_checkpoint_of_another_size_is_a_clear_error(clip_weights):
    files, _ = clip_weights
    with pytest.raises(OSError, match="ViT-S-16"):
        load_vision_encoder("ViT-S-16-alt", files["pt"])


def test_tiny_needs_no_network(no_network):
    """The embedded backbones: one line, nothing fetched."""
    model, image_processor, tokenizer = build_flamingo("tiny")
    ids, mask = tokenize(tokenizer, ["<image>a bear"])
    picture = image_processor(open_clip_picture())
    with torch.no_grad():
        logits = model(picture[None, None, None], ids, mask).logits
    assert logits.shape[-1] == len(tokenizer) and logits.isfinite().all()


# ----------------------------------------------------------------- the paper's sizes


def count(module):
    """Parameters of a module, each tensor once."""
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_at_paper_size():
    """On the meta device: shapes without memory."""
    with torch.device("meta"):
        assert count(PerceiverResampler(dim=1024)) == 63_019_008
        assert count(GatedCrossAttentionBlock(dim=768, dim_visual=1024)) == 6_556_674
        lang_encoder = AutoModelForCausalLM.from_config(OPTConfig())  # that is OPT-125m
        extend_instance(lang_encoder, FlamingoLMMixin)
        lang_encoder.set_decoder_layers_attr_name("model.decoder.layers")
        vision_encoder = nn.Module()
        vision_encoder.visual = nn.Identity()
        model = Flamingo(vision_encoder, lang_encoder, 50_265, 50_266, vis_dim=1024)
    blocks = lang_encoder.gated_cross_attn_layers
    assert len(blocks) == 12 and count(blocks) == 78_680_088
    assert count(model.perceiver) + count(blocks) == 141_699_096


def test_logits_and_layers_at_paper_size():
    """(2, 1, 1, 256, 1024) visual tokens and (2, 20) ids: logits over 50,267 tokens."""
    with torch.device("meta"):
        lang_encoder = AutoModelForCausalLM.from_config(OPTConfig())
        lang_encoder.resize_token_embeddings(50_267, mean_resizing=False)
        extend_instance(lang_encoder, FlamingoLMMixin)
        lang_encoder.set_decoder_layers_attr_name("model.decoder.layers")
        vision_encoder = nn.Module()
        vision_encoder.visual = nn.Identity()
        model = Flamingo(vision_encoder, lang_encoder, 50_265, 50_266, vis_dim=1024)
        assert model.perceiver(torch.zeros(2, 1, 1, 256, 1024)).shape == (
            2,
            1,
            64,
            1024,
        )
    assert len(lang_encoder._get_decoder_layers()) == 12
    assert lang_encoder.get_output_embeddings().weight.shape == (50_267, 768)
