# Written by tools/book/sync.py from book/05b_loading.ipynb.
# Edit the notebook, not this file.
"""Build a Flamingo from names, save what was trained, load it where it belongs.

What is done about files of others is in foreign.py, which appendix E writes.
"""

__all__ = [
    "DATA",
    "DECODER_LAYERS",
    "load_language_model",
    "LM_SETTINGS",
    "backbone_settings",
    "fingerprint",
    "tokenizer_fingerprint",
    "create_model_and_transforms",
    "SIZES",
    "build_flamingo",
    "trained_tensors",
    "save_flamingo",
    "load_flamingo",
]

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import flamingo_lite
from flamingo_lite import foreign
from flamingo_lite.foreign import (
    difference,  # noqa: F401  (for those who ask for it here)
    put_start_token,
    smollm2_folder,
)
from flamingo_lite.layers import FlamingoLMMixin, extend_instance
from flamingo_lite.model import Flamingo, token_tables, train_new_rows_only
from flamingo_lite.vision import TimmTower, load_vision_encoder, tower_settings

_HERE = Path(flamingo_lite.__file__).parent
# In a clone the data are beside the package; installed, it carries the tiny ones.
DATA = (_HERE if (_HERE / "data").is_dir() else _HERE.parent) / "data"
_Built = tuple[Flamingo, Callable, PreTrainedTokenizerBase]


DECODER_LAYERS = {
    "opt": "model.decoder.layers",
    "llama": "model.layers",
    "gpt_neox": "gpt_neox.layers",
    "gpt2": "transformer.h",
    "gptj": "transformer.h",
    "mpt": "transformer.blocks",
    "mosaic_gpt": "transformer.blocks",
}


def _add_tokens(lang_encoder, tokenizer):
    """Give both `<|endofchunk|>` and `<image>`, and padding if there is none."""
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
    # A longer text would end in an IndexError of the language model's, or as noise.
    limits = ("max_position_embeddings", "max_seq_len")
    reads = [getattr(lang_encoder.config, limit, None) for limit in limits]
    tokenizer.model_max_length = min(
        filter(None, [tokenizer.model_max_length, *reads])
    )


def load_language_model(
    lang_encoder_path: str | Path,
    tokenizer_path: str | Path,
    decoder_layers_attr_name: str | None = None,
    **where,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a language model and a tokenizer, and add `<|endofchunk|>` and `<image>`.

    Returns:
        The model, extended with `FlamingoLMMixin`, and the tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, **where)
        lang_encoder = AutoModelForCausalLM.from_pretrained(
            lang_encoder_path, dtype=torch.float32, **where
        )
    except Exception as error:  # a damaged file raises what its reader raises
        raise OSError(
            f"cannot load the language model {str(lang_encoder_path)!r} "
            f"({foreign.advice(lang_encoder_path, error)}): {error}"
        ) from error
    kind = lang_encoder.config.model_type
    if decoder_layers_attr_name is None and kind not in DECODER_LAYERS:
        raise ValueError(
            f"where does a {kind!r} model keep its decoder layers? Say it with "
            'decoder_layers_attr_name, e.g. "model.layers"'
        )
    _add_tokens(lang_encoder, tokenizer)
    extend_instance(lang_encoder, FlamingoLMMixin)
    lang_encoder.set_decoder_layers_attr_name(
        decoder_layers_attr_name or DECODER_LAYERS[kind]
    )
    return lang_encoder, tokenizer


LM_SETTINGS = (
    "activation_function hidden_act num_attention_heads num_key_value_heads "
    "layer_norm_eps layer_norm_epsilon rms_norm_eps do_layer_norm_before"
).split()


def backbone_settings(module):
    """What a backbone computes with, beside its weights: plain values by name."""
    visual, config = getattr(module, "visual", module), getattr(module, "config", None)
    if isinstance(visual, TimmTower) or hasattr(visual, "attn_pool"):
        return tower_settings(visual)
    rope = getattr(config, "rope_parameters", None) or {}
    found = {name: getattr(config, name, None) for name in LM_SETTINGS}
    found |= {name: rope.get(name) for name in ("rope_type", "rope_theta", "factor")}
    return {name: value for name, value in found.items() if value is not None}


def fingerprint(module):
    """Tell one backbone from another: "weights-settings", 16 and 8 hexadecimal digits.

    The same weights with another activation, pooling or picture size are another one.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        first = tensor.detach().flatten()[:256].float().cpu()  # (256,) at most
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(first.numpy().tobytes())
    settings = json.dumps(backbone_settings(module), sort_keys=True)
    settings = hashlib.sha256(settings.encode()).hexdigest()
    return f"{digest.hexdigest()[:16]}-{settings[:8]}"


def tokenizer_fingerprint(tokenizer):
    """Tell one tokenizer from another: 16 hexadecimal digits.

    Two of the same size may give a word other numbers: then all is read as other words.
    """
    words = sorted(tokenizer.get_vocab().items())
    line = tokenizer("A flamingo, left of 2 bees.", add_special_tokens=False).input_ids
    return hashlib.sha256(repr((words, line)).encode()).hexdigest()[:16]


def _free_new_rows(lang_encoder, rows, again=False):
    """Let the two new rows learn, and no others; again in a copy without hooks."""
    for table in token_tables(lang_encoder).values():
        if table.weight.requires_grad or not again:
            train_new_rows_only(table, rows)
    lang_encoder.when_copied = partial(_free_new_rows, rows=rows, again=True)


def create_model_and_transforms(
    clip_vision_encoder_path: str,
    clip_vision_encoder_pretrained: str | None,
    lang_encoder_path: str | Path,
    tokenizer_path: str | Path,
    cross_attn_every_n_layers: int = 1,
    use_local_files: bool = False,
    decoder_layers_attr_name: str | None = None,
    freeze_lm_embeddings: bool = False,
    cache_dir: str | Path | None = None,
    start_token: str | None = "auto",
    **flamingo_kwargs,
) -> _Built:
    """Load the backbones, freeze them, and put a new Flamingo around them.

    Args:
        clip_vision_encoder_path, …_pretrained: see `load_vision_encoder`.
        lang_encoder_path, tokenizer_path: names on the hub, or folders in its format.
        cross_attn_every_n_layers: N puts cross-attention before layers N, 2N, …
        use_local_files: never ask the network for the language model.
        decoder_layers_attr_name: where the language model keeps its decoder layers.
        freeze_lm_embeddings: do not train the rows of the two new tokens either.
        cache_dir: where downloads are kept.
        start_token: for a tokenizer that puts none, see `put_start_token`.
        **flamingo_kwargs: for `Flamingo`.

    Returns:
        Flamingo in eval mode, image processor (PIL picture to (3, H, W)), tokenizer.

    Raises:
        OSError: a backbone is not here and cannot be fetched.
        ValueError: the language model's kind is unknown and its layers were not named;
            or the start token is not known, or the tokenizer puts one at the end.
    """
    vision_encoder, image_processor = load_vision_encoder(
        clip_vision_encoder_path, clip_vision_encoder_pretrained, cache_dir
    )
    where = {"local_files_only": use_local_files, "cache_dir": cache_dir}
    lang_encoder, tokenizer = load_language_model(
        lang_encoder_path, tokenizer_path, decoder_layers_attr_name, **where
    )
    start_token = put_start_token(tokenizer, start_token)
    new = tokenizer.convert_tokens_to_ids(["<|endofchunk|>", "<image>"])
    flamingo_kwargs["cross_attn_every_n_layers"] = cross_attn_every_n_layers
    backbones = {
        "vision_encoder": [clip_vision_encoder_path, fingerprint(vision_encoder)],
        "lang_encoder": [lang_encoder_path, fingerprint(lang_encoder)],
        "tokenizer": [tokenizer_path, tokenizer_fingerprint(tokenizer)],
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
        **({"start_token": start_token} if start_token else {}),
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
        _free_new_rows(lang_encoder, new)
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


def build_flamingo(size: str | None = None, **kwargs) -> _Built:
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
        sizes = ", ".join(map(repr, SIZES))
        hint = "; a saved model: load_flamingo" if Path(str(size)).exists() else ""
        raise ValueError(f"no size {size!r}; there are {sizes}{hint}")
    settings = {**SIZES[size], **kwargs}
    for part in ("lang_encoder_path", "tokenizer_path"):
        if part not in settings:
            settings[part] = smollm2_folder()
    built = create_model_and_transforms(**settings)
    config = built[0].config
    kept = ("start_token", "backbones")
    made = {part: config.built_with[part] for part in kept if part in config.built_with}
    kwargs.pop("start_token", None)  # what was put counts, not what was asked for
    config.built_with = {"size": size, **kwargs, **made}
    return built


def trained_tensors(model: Flamingo) -> dict[str, torch.Tensor]:
    """What training changes, {name: tensor}; of the embeddings, the two new rows."""
    parts = ("perceiver.", "lang_encoder.gated_cross_attn_layers.")
    state = model.state_dict()
    tensors = {name: state[name] for name in state if name.startswith(parts)}
    rows = [model.eoc_token_id, model.media_token_id]
    tables = token_tables(model.lang_encoder)
    for name, table in tables.items():
        tensors[name] = table.weight.detach()[rows]
    return tensors | {name: state[name] for name in _unfrozen(model)}


def _unfrozen(model: Flamingo) -> dict[str, torch.Tensor]:
    """Parameters of the backbones that are unfrozen, or ever were, by name."""
    noted = model.note_unfrozen()
    return {name: p for name, p in model.named_parameters() if name in noted}


def save_flamingo(
    model: Flamingo,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    bits: int | None = None,
) -> None:
    """Write what was trained, and how the model was built, to a folder.

    What you have unfrozen of the backbones is written, too, frozen again or not.

    Args:
        model: a Flamingo from `build_flamingo` or `create_model_and_transforms`.
        folder: made if it is not there; gets `flamingo.safetensors` and `config.json`,
            which says how to build the model and which backbones it needs.
        dtype: e.g. torch.float16 halves the file.
        bits: 8 keeps each number of a matrix in eight bits, with a scale for each row.

    Raises:
        ValueError: nothing says how to build it; or it holds a number that is not
            finite. What was there before stays.
    """
    if model.config.built_with is None:
        raise ValueError(
            "this model was put together by hand, and nothing says how to build it "
            "again. Set model.config.built_with to the arguments for build_flamingo, "
            'e.g. {"size": "tiny"}, or for create_model_and_transforms; or keep the '
            "weights alone, with safetensors' save_file(trained_tensors(model), path)"
        )
    if bits not in (None, 8):
        raise ValueError(f"bits is 8, or None to keep all in dtype, got {bits!r}")
    config = dict(model.config.built_with)
    if also := _unfrozen(model):
        frozen = [name for name, p in also.items() if not p.requires_grad]
        config |= {"also_trained": list(also)}
        config |= {"frozen_again": frozen} if frozen else {}
    config = json.dumps(config, indent=2, default=os.fspath) + "\n"
    tensors = {
        name: tensor.to(dtype or tensor.dtype).contiguous()
        for name, tensor in trained_tensors(model).items()
    }
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            kind = "" if dtype is None else f", in {dtype}"
            what = f"{name} holds something other than finite numbers{kind}"
            raise ValueError(f"not saved to {folder}: {what}")
    tensors = foreign.in_bytes(tensors) if bits else tensors
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        weights, listing = Path(unfinished, "weights"), Path(unfinished, "config")
        save_file(tensors, weights)
        listing.write_text(config)
        # Killed between these lines, it is no model at all: never new weights that
        # are built as the old ones were.
        (folder / "config.json").unlink(missing_ok=True)
        os.replace(weights, folder / "flamingo.safetensors")
        os.replace(listing, folder / "config.json")


def load_flamingo(folder_or_name: str | Path = "tiny", **kwargs) -> _Built:
    """Build a model and load what was trained.

    Args:
        folder_or_name: a folder from `save_flamingo`; "tiny" or "smol" for those in
            data/, if there is none of that name here; or a `.pt` file in OpenFlamingo's
            format, which does not say what it is of: name its size or backbones with
            `kwargs`.
        **kwargs: for `build_flamingo`, over what the folder says. The tokenizer puts
            the start token that it put in training; OpenFlamingo adds none.

    Returns:
        Flamingo in eval mode, image processor, tokenizer.

    Raises:
        OSError: no such folder or file, or it cannot be read.
        ValueError: the weights are of another size, or need another backbone.
    """
    path = foreign.find_model(folder_or_name, DATA)
    is_file = path.is_file() or path.suffix == ".pt"
    if is_file:
        config, saved = {}, foreign.read_openflamingo(path)
    else:
        config, saved = foreign.read_folder(path, SIZES)
    needed, also = config.pop("backbones", {}), config.pop("also_trained", ())
    frozen = config.pop("frozen_again", ())
    named = "size" in config or "lang_encoder_path" not in {**config, **kwargs}
    build = build_flamingo if named else create_model_and_transforms
    try:
        built = build(**{"start_token": None, **config, **kwargs})
        model = built[0]
        present = model.config.built_with["backbones"]
        foreign.check_backbones(needed, present, path)
        also = {n: p for n, p in model.named_parameters() if n in also}
        for parameter in also.values():
            parameter.requires_grad_(True)
        model.also_trained |= set(also)
        for name, parameter in also.items():
            parameter.requires_grad_(name not in frozen)
        wanted = trained_tensors(model)
        if is_file:
            saved = foreign.from_openflamingo(path, saved, model, wanted)
        foreign.check_misfits(saved, wanted, path)
    except (OSError, ValueError):
        raise
    except Exception as error:  # a strange config makes almost anything raise
        raise ValueError(f"cannot build what {path} asks for: {error!r}") from error
    rows = [model.eoc_token_id, model.media_token_id]
    for name, table in token_tables(model.lang_encoder).items():
        table.weight.data[rows] = saved.pop(name).to(table.weight.dtype)
    model.load_state_dict(saved, strict=False)
    return built
