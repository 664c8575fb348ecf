#!/usr/bin/env python3
"""Write the trained tiny Flamingo as one script, for the pages that run it.

    python tools/book/export_play.py _build/html/_static/flamingo_weights.js

It reads data/tiny_clip, data/tiny_opt, data/tiny_flamingo and a few drawings;
book/_static/flamingo.js reads the result. What was trained in eight bits stays as it
is. Other matrices become whole numbers times a scale for each row, of as many bits, at
most 12, as leave the file under 16 MB.

Beside it goes flamingo_curves.js, the losses by step that chapter 9's figure shows:
those that the chapter printed, and those of data/tiny_flamingo/looks.json.
"""

import argparse
import base64
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import ROOT

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MOST_BYTES = 16_000_000
EMOJI = ROOT / "data" / "emoji"
# Things with names, by the two studios that no model was trained on, and by one other.
NAMED = ("flamingo", "fox", "owl", "lemon", "red_apple", "rocket", "guitar", "penguin")
NAMED_STUDIOS = ("openmoji", "twemoji", "fluent")
# Things that training never named, each by two hands: for made-up words.
UNNAMED = ("camel", "saxophone", "scissors", "church", "cherries", "snowflake")
UNNAMED_STUDIOS = ("noto", "openmoji")
N_SCENES = 12  # of each sort, for the figures of chapters 9 and 11
# What chapter 9 prints of its own run, while it trains and below the curves.
LOOKS = (
    re.compile(r"step +(\d+) of \d+ .*?true +([\d.]+) +shuffled +([\d.]+)"),
    re.compile(r"^step +(\d+) +own +([\d.]+) +another +([\d.]+)", re.M),
)


def seven_bits(data, width=8):
    """Numbers of `width` bits as a JavaScript string's inside, seven bits a character.

    The five characters that a string cannot hold are written 128 higher.
    """
    data = np.asarray(data, dtype=np.uint16)
    bits = ((data[:, None] >> np.arange(width - 1, -1, -1)) & 1).astype(np.uint8)
    bits = bits.reshape(-1)  # (numbers * width,)
    bits = np.pad(bits, (0, -len(bits) % 7)).reshape(-1, 7)
    codes = np.packbits(bits, axis=1)[:, 0] >> 1  # (characters,)
    text = codes.tobytes().decode("ascii")
    return text.translate({c: c + 128 for c in (0, 10, 13, 34, 92)})


def pack_floats(tensor):
    """A tensor as {kind: "float32", …}: every bit of it."""
    x = tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.flatten(1)
    data = np.frombuffer(x.float().contiguous().numpy().tobytes(), np.uint8)
    return {"kind": "float32", "rows": len(x), "width": x.shape[1], "data": data}


def in_bits(matrix, bits):
    """Whole numbers (rows, width) and scales (rows, 1) nearest to a matrix."""
    scales = matrix.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    scales[scales == 0] = 1.0
    return (matrix / scales).round(), scales


def pack(tensor, bits):
    """A tensor as {kind, rows, width, data[, scales]}."""
    import torch

    if tensor.ndim < 2:
        return pack_floats(tensor)
    matrix = tensor.flatten(1)
    about = {"rows": matrix.shape[0], "width": matrix.shape[1]}
    small = matrix.to(torch.float8_e4m3fn)
    if torch.equal(small.float(), matrix):
        data = small.contiguous().view(torch.uint8).numpy().reshape(-1)
        return {"kind": "float8", **about, "data": data}
    numbers, scales = in_bits(matrix, bits)
    data = (numbers + 2 ** (bits - 1)).numpy().astype(np.uint16).reshape(-1)
    return {"kind": bits, **about, "scales": pack_floats(scales), "data": data}


def as_packed(tensor, bits):
    """The tensor that the browser will have: for the tests."""
    packed = pack(tensor, bits)
    if packed["kind"] != bits:
        return tensor
    numbers, scales = in_bits(tensor.flatten(1), bits)
    return (numbers * scales).view_as(tensor)


def written_tensors(model):
    """{name: tensor} of everything that a picture and a text meet, each once."""
    parts = ("vision_encoder.", "perceiver.", "lang_encoder.gated_cross_attn_layers.")
    parts += ("lang_encoder.old_decoder_blocks.",)
    outside = "lang_encoder.model.decoder."
    parts += tuple(
        f"{outside}{name}"
        for name in ("embed_tokens.", "embed_positions.", "final_layer_norm.")
    )
    state = model.state_dict()
    left_out = ("vision_encoder.proj",)  # only the pooled picture meets it
    return {
        name.replace("in_proj_", "in_proj."): tensor.detach().float().cpu()
        for name, tensor in state.items()
        if name.startswith(parts) and name not in left_out
    }


def settings(model, image_processor):
    """The sizes and rules that flamingo.js follows, read from the model.

    Raises:
        ValueError: something that flamingo.js does not do.
    """
    from open_clip.transformer import LayerNorm
    from torch import nn

    from flamingo_lite.vision import rgb_on_white

    visual, lm, perceiver = model.vision_encoder, model.lang_encoder, model.perceiver
    opt, block = lm.config, visual.transformer.resblocks[0]
    # Upright RGB on white comes first; then the tag's own steps.
    steps = [step for step in image_processor.transforms if step is not rgb_on_white]
    resize, *_, normalize = steps
    first = next(b for b in lm.gated_cross_attn_layers if b is not None)
    norms = {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)}
    demands = {
        "the CLIP's pictures are squashed to a square": len(set(resize.size)) == 1
        and len(resize.size) == 2,
        "bilinear interpolation": resize.interpolation.value == "bilinear",
        "GELU in the CLIP": isinstance(block.mlp.gelu, nn.GELU)
        and block.mlp.gelu.approximate == "none",
        "a norm before the CLIP's first block": isinstance(visual.ln_pre, LayerNorm),
        "no scales in the CLIP's blocks": isinstance(block.ls_1, nn.Identity),
        "no attentional pooling": visual.attn_pool is None,
        "CLS in the CLIP, then its patches": visual.pool_type in ("avg", "tok"),
        "an OPT": opt.model_type == "opt",
        "the norm first in the OPT": opt.do_layer_norm_before,
        "ReLU in the OPT": opt.activation_function == "relu",
        "a tied head": opt.tie_word_embeddings,
        "embeddings as wide as the OPT": opt.word_embed_proj_dim == opt.hidden_size,
        "one epsilon in all norms": len(norms) == 1,
        "no frame or image embeddings": perceiver.frame_embs is None
        and perceiver.media_time_embs is None,
    }
    if lacking := [what for what, is_so in demands.items() if not is_so]:
        raise ValueError(f"flamingo.js wants {', '.join(lacking)}")
    return {
        "eps": norms.pop(),
        "media_token_id": model.media_token_id,
        "eoc_token_id": model.eoc_token_id,
        "vision": {
            "image_size": visual.image_size[0],
            "patch_size": visual.patch_size[0],
            "mean": list(map(float, normalize.mean)),
            "std": list(map(float, normalize.std)),
            "heads": block.attn.num_heads,
            "layers": len(visual.transformer.resblocks),
            "ln_post": not visual.final_ln_after_pool,
            "d": model.vis_dim,
        },
        "perceiver": {
            "depth": len(perceiver.layers),
            "heads": perceiver.layers[0][0].heads,
        },
        "cross_attention": {
            "layers": [
                number
                for number, block in enumerate(lm.gated_cross_attn_layers)
                if block is not None
            ],
            "heads": first.attn.heads,
            "n": len(perceiver.latents),
            "immediate": first.attn.only_attend_immediate_media,
        },
        "language": {
            "layers": opt.num_hidden_layers,
            "d": opt.hidden_size,
            "heads": opt.num_attention_heads,
            "max_position_embeddings": opt.max_position_embeddings,
            "position_offset": lm.model.decoder.embed_positions.offset,
        },
    }


def words(tokenizer):
    """The tokenizer: vocabulary, merges, special tokens, and what stands first.

    Raises:
        ValueError: it is not byte-level BPE as flamingo.js does it.
    """
    inside = json.loads(tokenizer.backend_tokenizer.to_str())
    model, cut = inside["model"], inside["pre_tokenizer"]
    plain = cut["type"] == "ByteLevel" and not cut["add_prefix_space"]
    simple = not (model.get("dropout") or model.get("ignore_merges"))
    strips = any(
        t["lstrip"] or t["rstrip"] or t["single_word"] or not t["special"]
        for t in inside["added_tokens"]
    )
    usual = cut.get("use_regex", True) and inside["normalizer"] is None
    if model["type"] != "BPE" or not (plain and simple and usual) or strips:
        raise ValueError("flamingo.js knows byte-level BPE only, as in GPT-2")
    return {
        "vocab": model["vocab"],
        "merges": model["merges"],
        "special": {t["content"]: t["id"] for t in inside["added_tokens"]},
        "first": tokenizer("").input_ids,
    }


def some_drawings():
    """Drawings to choose from: dict with name, thing, studio, text, named, src."""
    chosen = [(t, s) for t in NAMED for s in NAMED_STUDIOS]
    chosen += [(t, s) for t in UNNAMED for s in UNNAMED_STUDIOS]
    found = {}
    for line in (EMOJI / "metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        thing = row["thing"].replace(" ", "_")
        code = base64.b64encode((EMOJI / row["file_name"]).read_bytes()).decode()
        about = {name: row[name] for name in ("studio", "text", "named", "trained")}
        src = f"data:image/webp;base64,{code}"
        found[thing, row["studio"]] = {"thing": row["thing"], **about, "src": src}
    return [found[key] for key in chosen if key in found]


def some_scenes():
    """Pictures that chapters 9 and 11 compose: {"probe": [...], "pairs": [...]}.

    "probe" are the first of those whose loss chapter 9 follows while it trains, "pairs"
    the first of chapter 11's. Each is a dict with text, things, relation and src.
    """
    from flamingo_lite import load_captions, make_scenes

    rows = [r for r in load_captions(EMOJI) if r["named"] and r["trained"]]
    drawn = {
        "probe": make_scenes(rows, N_SCENES, seed=6),
        "pairs": make_scenes(rows, N_SCENES, seed=71, pairs=1.0, held_out=True),
    }
    return {
        sort: [
            {
                **{name: scene[name] for name in ("text", "things", "relation")},
                "src": as_address(scene["picture"]),
            }
            for scene in scenes
        ]
        for sort, scenes in drawn.items()
    }


def as_address(picture):
    """A PIL picture as a data: address, every pixel of it."""
    file = io.BytesIO()
    picture.save(file, "webp", lossless=True)
    code = base64.b64encode(file.getvalue()).decode()
    return f"data:image/webp;base64,{code}"


def curves(notebook, looks):
    """Losses by step: [{"name", "looks": [{"step", "true", "shuffled"}]}].

    Args:
        notebook: path of chapter 9, whose stored outputs hold its own run.
        looks: path of the shipped model's numbers, by train_tiny_flamingo.py.

    Returns:
        a dict for each run whose numbers are there; [] if there are none.
    """
    runs, found = [], {}
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    outputs = [o for cell in cells for o in cell.get("outputs", ())]
    for pattern in LOOKS:  # the later one knows the start, too
        for text in ("".join(o.get("text", "")) for o in outputs):
            for step, true, other in pattern.findall(text):
                found[int(step)] = {"true": float(true), "shuffled": float(other)}
    if found:
        printed = [{"step": step, **found[step]} for step in sorted(found)]
        runs.append({"name": "this page's run", "looks": printed})
    if Path(looks).is_file():
        long = json.loads(Path(looks).read_text())
        runs.append({"name": "the longer run", "looks": long})
    return runs


def javascript(model, image_processor, tokenizer, bits):
    """The script's text."""
    about = {
        "config": {**settings(model, image_processor), "bits": bits},
        "tokenizer": words(tokenizer),
        "drawings": some_drawings(),
        "scenes": some_scenes(),
    }

    def written(packed):
        width = bits if packed["kind"] == bits else 8
        fields = [f"kind: {json.dumps(packed['kind'])}"]
        fields += [f"{name}: {packed[name]}" for name in ("rows", "width")]
        if "scales" in packed:
            fields.append(f"scales: {written(packed['scales'])}")
        fields.append(f'text: "{seven_bits(packed["data"], width)}"')
        return f"{{ {', '.join(fields)} }}"

    lines = [
        "// Written by tools/book/export_play.py; flamingo.js says how it is read."
    ]
    lines.append("flamingoLite.receive({")
    lines += [f"{name}: {json.dumps(part)}," for name, part in about.items()]
    lines.append("tensors: {")
    for name, tensor in written_tensors(model).items():
        lines.append(f"{json.dumps(name)}: {written(pack(tensor, bits))},")
    return "\n".join([*lines, "}});"]) + "\n"


def bits_that_fit(model):
    """The most bits, 12 to 6, with which the script stays under 16 MB."""
    import torch

    floats, eights, others = 0, 0, 0
    for tensor in written_tensors(model).values():
        if tensor.ndim < 2:
            floats += tensor.numel()
        elif torch.equal(tensor.to(torch.float8_e4m3fn).float(), tensor):
            eights += tensor.numel()
        else:
            others += tensor.numel()
            floats += len(tensor)
    for bits in range(12, 5, -1):
        # A character has 7 bits, and 5 in 128 take two bytes; 300 kB for all the rest.
        size = (32 * floats + 8 * eights + bits * others) / 7 * 1.05 + 300_000
        if size < MOST_BYTES:
            return bits
    raise ValueError(f"{others} numbers do not fit into {MOST_BYTES} bytes")


def write_weights(path):
    """Write the script; return its size in bytes and how many bits a number has."""
    import torch

    from flamingo_lite import load_flamingo

    with torch.no_grad():
        model, image_processor, tokenizer = load_flamingo("tiny")
        bits = bits_that_fit(model)
        text = javascript(model, image_processor, tokenizer, bits)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{path} has {size} bytes, more than {MOST_BYTES}")
    return size, bits


def write_curves(path, notebook=None, looks=None):
    """Write the small script with the losses by step; how many runs it holds."""
    notebook = notebook or ROOT / "book" / "09_training.ipynb"
    looks = looks or ROOT / "data" / "tiny_flamingo" / "looks.json"
    runs = curves(notebook, looks)
    text = "// Written by tools/book/export_play.py; figures_model.js reads it.\n"
    text += f"window.flamingoCurves = {json.dumps(runs)};\n"
    Path(path).write_text(text, encoding="utf-8", newline="")
    return len(runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="the script to write")
    args = parser.parse_args()
    size, bits = write_weights(args.path)
    print(f"{args.path}: {size / 1e6:.1f} MB, matrices of {bits} bits")
    path = Path(args.path).with_name("flamingo_curves.js")
    print(f"{path}: {write_curves(path)} runs")


if __name__ == "__main__":
    main()
