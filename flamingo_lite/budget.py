# Written by tools/book/sync.py from book/12_real_one.ipynb.
# Edit the notebook, not this file.
"""What a training needs, memory, disk and arithmetic, from shapes alone.

Nothing is allocated. Sizes of a model are plain whole numbers, as in PAPER:

    vision     d_img wide, `layers` deep, v patches a frame of `patch` pixels a side
    perceiver  n latents, `depth` layers, `inner` = h * d_head, `ff` times wider inside
    blocks     `number` gated cross-attention blocks
    lm         d_txt wide, `layers` of OPT's kind, `ffn` inside, `vocab` rows
"""

__all__ = [
    "PAPER",
    "hub_answers",
    "choose_run",
    "count_parameters",
    "sizes_of",
    "PRECISIONS",
    "kept_for_backward",
    "memory_budget",
    "disk",
    "GPUS",
    "ROOM",
    "largest_batch",
    "arithmetic",
    "kept_by_backward",
    "MemoryUse",
]

import math
import os
import urllib.error
import urllib.request
import weakref

import torch
from huggingface_hub import constants
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flamingo_lite.perceiver import LARGE

PAPER = {
    "vision": {"d": 1024, "layers": 24, "v": 256, "patch": 14, "out": 768},
    "perceiver": {"depth": 6, "n": 64, "inner": 512, "heads": 8, "ff": 4},
    "blocks": {"number": 12, "inner": 512, "heads": 8, "ff": 4},
    "lm": {
        "d": 768,
        "layers": 12,
        "ffn": 3072,
        "heads": 12,
        "vocab": 50_267,
        "positions": 2050,
    },
}


def hub_answers(seconds=5):
    """Say whether the model hub can be reached; False in offline mode."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=seconds).close()
    except urllib.error.HTTPError:  # it is there, and says no to its front page
        return True
    except (OSError, ValueError):
        return False
    return True


def choose_run(device, network=None, size=None):
    """Decide what chapter 12 runs: "paper" or "rehearsal".

    Args:
        device: a torch.device, see `choose_device`.
        network: whether the hub can be reached; None, ask it.
        size: None, the environment variable FLAMINGO_LITE_SIZE, which goes before:
            "paper" for the real weights, anything else for the rehearsal.

    Returns:
        (what to run, why): two strings.
    """
    size = os.environ.get("FLAMINGO_LITE_SIZE") if size is None else size
    if size:
        run = "paper" if size == "paper" else "rehearsal"
        return run, f"FLAMINGO_LITE_SIZE is {size!r}"
    if torch.device(device).type == "cpu":
        return "rehearsal", "there is no GPU"
    if not (hub_answers() if network is None else network):
        return "rehearsal", "the model hub cannot be reached"
    return "paper", "there are a GPU and a network"


def count_parameters(sizes=PAPER):
    """How many numbers each part of a Flamingo has: dict.

    Args:
        sizes: as PAPER; of a model, see `sizes_of`.
    """
    vision, perceiver, blocks, lm = sizes.values()
    d_img, d_txt, v = vision["d"], lm["d"], vision["v"]

    tower = 3 * vision["patch"] ** 2 * d_img + d_img + (v + 1) * d_img
    tower += vision["layers"] * (12 * d_img**2 + 13 * d_img)
    tower += 4 * d_img + d_img * vision["out"]

    attention = 4 * d_img * perceiver["inner"] + 4 * d_img
    wide = 2 * perceiver["ff"] * d_img**2 + 2 * d_img
    resampler = perceiver["n"] * d_img + perceiver["depth"] * (attention + wide)

    attention = 2 * (d_txt + d_img) * blocks["inner"] + 2 * d_txt
    wide = 2 * blocks["ff"] * d_txt**2 + 2 * d_txt

    layer = 4 * d_txt**2 + 2 * d_txt * lm["ffn"] + 9 * d_txt + lm["ffn"]
    rows = lm["vocab"] + lm["positions"]
    return {
        "vision encoder": tower,
        "language model": rows * d_txt + lm["layers"] * layer + 2 * d_txt,
        "perceiver": resampler + 2 * d_img,
        "gated blocks": blocks["number"] * (attention + wide + 2),
    }


def sizes_of(model):
    """The sizes of a Flamingo, as PAPER has them.

    The formulas know the layers of OPT and the towers of open_clip's own. Of another
    language model the numbers fit roughly: `kept_by_backward` measures them.

    Raises:
        ValueError: the tower is one of timm's, or the language model's configuration
            does not name a size.
    """
    tower, perceiver, lm = model.vision_encoder, model.perceiver, model.lang_encoder
    if not hasattr(tower, "transformer"):
        kind = type(getattr(tower, "trunk", tower)).__name__
        raise ValueError(
            f"the formulas know towers of open_clip's own, and this is a {kind}: count "
            "its parameters, and measure a step"
        )
    attention, wide = perceiver.layers[0]
    block = next(b for b in lm.gated_cross_attn_layers if b is not None)
    config, weight = lm.config, lm.get_input_embeddings().weight
    names = ("ffn_dim", "intermediate_size", "n_inner")
    ffn = next(filter(None, (getattr(config, name, None) for name in names)), None)
    if not ffn:  # GPT-2 leaves out what is four times its width; MPT says how many
        times = getattr(config, "expansion_ratio", 4 * hasattr(config, "n_inner"))
        ffn = times * model.lang_dim
    if not ffn:
        raise ValueError(f"how wide is a {config.model_type!r} layer inside?")
    is_opt = config.model_type == "opt"
    return {
        "vision": {
            "d": model.vis_dim,
            "layers": len(tower.transformer.resblocks),
            "v": math.prod(tower.grid_size),
            "patch": tower.conv1.kernel_size[0],
            "out": 0 if tower.proj is None else tower.proj.shape[1],
        },
        "perceiver": {
            "depth": len(perceiver.layers),
            "n": len(perceiver.latents),
            "inner": attention.to_q.out_features,
            "heads": attention.heads,
            "ff": wide[1].out_features // model.vis_dim,
        },
        "blocks": {
            "number": sum(b is not None for b in lm.gated_cross_attn_layers),
            "inner": block.attn.to_q.out_features,
            "heads": block.attn.heads,
            "ff": block.ff[1].out_features // model.lang_dim,
        },
        "lm": {
            "d": model.lang_dim,
            "layers": config.num_hidden_layers,
            "ffn": ffn,
            "heads": config.num_attention_heads,
            "vocab": len(weight),
            "positions": config.max_position_embeddings + 2 if is_opt else 0,
        },
    }


PRECISIONS = ("float32", "float16", "bfloat16")


def kept_for_backward(
    sizes=PAPER, T_img=1, T_txt=32, F=1, precision="float32", labelled=None, B=64
):
    """What one sequence of a batch leaves behind for the backward pass: {part: bytes}.

    One line for each tensor that a layer keeps. What multiplies a matrix is kept in
    half precision, under autocast; what a LayerNorm saw, in float32.

    Args:
        sizes: as PAPER.
        T_img, T_txt, F: pictures and tokens of the sequence, frames of a picture.
        precision: one of PRECISIONS.
        labelled: tokens with a label; None, all.
        B: sequences in the batch. In a small one a GELU's output is kept as well.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"no precision {precision!r}: {', '.join(PRECISIONS)}")
    half = 4 if precision == "float32" else 2
    shape = sizes, T_img, T_txt, half, B
    labelled = T_txt if labelled is None else labelled
    return {
        "perceiver": T_img * _kept_of_picture(sizes, F, half, B * T_img),
        "gated blocks": sizes["blocks"]["number"] * _kept_of_block(*shape)
        + _kept_media(sizes, T_img, half),
        "language model": sizes["lm"]["layers"] * _kept_of_layer(sizes, T_txt, half)
        + T_txt * (8 + 4 * (sizes["lm"]["d"] + 2) + half * sizes["lm"]["d"]),
        "loss": labelled * (4 * sizes["lm"]["vocab"] + 8),
    }


def _kept_around_gelu(width, rows, n_rows):
    """Numbers that a feed-forward keeps of some rows in the middle; `n_rows` in all."""
    return rows * width * (1 if n_rows * width >= LARGE else 2)


def _kept_of_picture(sizes, F, half, pictures):
    """Bytes that the Perceiver keeps of one of so many pictures."""
    layers = sizes["perceiver"]["depth"] * _kept_of_reading(sizes, F, half, pictures)
    return layers + _kept_latents(sizes) + _kept_tokens(sizes, F, half)


def _kept_tokens(sizes, F, half):
    """Bytes of a picture's visual tokens, standardised: once for all layers."""
    return half * F * sizes["vision"]["v"] * sizes["vision"]["d"]


def _kept_latents(sizes):
    """Bytes of a picture's latents: before each layer but the first; at the end."""
    perceiver, d = sizes["perceiver"], sizes["vision"]["d"]
    return 4 * perceiver["n"] * (perceiver["depth"] * d + 2)


def _kept_of_reading(sizes, F, half, pictures):
    """Bytes that one layer of the Perceiver keeps of one of so many pictures."""
    vision, perceiver = sizes["vision"], sizes["perceiver"]
    d, n, inner = vision["d"], perceiver["n"], perceiver["inner"]
    tokens = F * vision["v"]
    products = n * d  # the latents, normalised
    products += (tokens + n) * 2 * inner  # keys, values
    products += 2 * n * inner  # queries; what was read
    products += n * d + _kept_around_gelu(perceiver["ff"] * d, n, pictures * n)
    norms = 4 * n + perceiver["heads"] * n  # means, spreads; softmax
    return half * products + 4 * (norms + n * d)  # and the latents between the halves


def _kept_media(sizes, T_img, half):
    """Bytes of the latents: kept once, or in half precision once for each block."""
    numbers = T_img * sizes["perceiver"]["n"] * sizes["vision"]["d"]
    return half * numbers * (1 if half == 4 else sizes["blocks"]["number"])


def _kept_of_block(sizes, T_img, T_txt, half, B):
    """Bytes that a gated block keeps of one of B sequences."""
    blocks, d = sizes["blocks"], sizes["lm"]["d"]
    latents, inner = T_img * sizes["perceiver"]["n"], blocks["inner"]
    products = T_txt * latents  # who may look, as numbers to be added
    products += 2 * latents * inner  # keys, values
    products += 3 * T_txt * inner  # queries; what was read; and without the blind rows
    products += 4 * T_txt * d  # the text, normalised, and what goes to the gate: twice
    products += _kept_around_gelu(blocks["ff"] * d, T_txt, B * T_txt)
    norms = 2 * T_txt * (d + 2) + blocks["heads"] * T_txt
    return half * products + 4 * norms + T_txt


def _kept_of_layer(sizes, T_txt, half):
    """Bytes that a frozen OPT layer keeps: no inputs, as its matrices do not learn."""
    lm = sizes["lm"]
    products = 4 * T_txt * lm["d"] + T_txt * lm["ffn"]  # q, k, v, read; after ReLU
    return half * products + 4 * T_txt * (2 * (lm["d"] + 2) + lm["heads"])


def memory_budget(
    sizes=PAPER,
    B=1,
    T_img=1,
    T_txt=32,
    F=1,
    precision="float32",
    with_muon=False,
    gradient_checkpointing=False,
    frozen_half=False,
):
    """Memory at the fullest moment of a training step: {what: bytes}.

    That moment is the end of a forward pass: everything is kept; and if a step gathers
    several batches, the gradients of the first ones are there. With one batch a step
    they come later, when less is kept, and a step needs less than this.

    Args:
        sizes: as PAPER; of a model, `sizes_of(model)`.
        B, T_img, T_txt, F: sequences, pictures and tokens in each, frames of a picture.
        precision: one of PRECISIONS; the two halves are by autocast.
        with_muon: Muon keeps one number for each of a matrix, AdamW keeps two.
        gradient_checkpointing: as `Flamingo` has it.
        frozen_half: the frozen parts are kept in half precision.
    """
    counts, matrices = count_parameters(sizes), _matrices(sizes)
    table = sizes["lm"]["vocab"] * sizes["lm"]["d"]  # it has a gradient, as a whole
    frozen = counts["vision encoder"] + counts["language model"]
    learning = counts["perceiver"] + counts["gated blocks"]
    learns = matrices["learning"] if with_muon else 0
    copied = matrices["learning"] + table + matrices["frozen"] * (not frozen_half)
    kept = kept_for_backward(sizes, T_img, T_txt, F, precision, B=B)
    if gradient_checkpointing:
        kept = _checkpointed(sizes, kept, T_img, T_txt, F, precision, B)
    is_half = precision != "float32"
    return {
        "frozen weights": frozen * (2 if frozen_half else 4),
        "trained weights": 4 * learning,
        "gradients": 4 * (learning + table),
        "optimizer": 8 * (learning + table) - 4 * learns,
        "half copies": 2 * copied * is_half,
        "kept for backward": B * sum(kept.values()),
        "logits": B * T_txt * sizes["lm"]["vocab"] * (6 if is_half else 4),
    }


def _matrices(sizes):
    """How many numbers stand in matrices that are multiplied with: dict."""
    vision, perceiver, blocks, lm = sizes.values()
    d_img, d = vision["d"], lm["d"]
    layer = 4 * d_img * perceiver["inner"] + 2 * perceiver["ff"] * d_img**2
    block = 2 * (d + d_img) * blocks["inner"] + 2 * blocks["ff"] * d**2
    return {
        "learning": perceiver["depth"] * layer + blocks["number"] * block,
        "frozen": lm["layers"] * (4 * d**2 + 2 * d * lm["ffn"]),
    }


def _checkpointed(sizes, kept, T_img, T_txt, F, precision, B):
    """What is kept if a layer keeps its input only, and one at a time does the rest."""
    half, lm = 4 if precision == "float32" else 2, sizes["lm"]
    inputs = 4 * lm["layers"] * T_txt * lm["d"]
    one = _kept_of_layer(sizes, T_txt, half)
    one += _kept_of_block(sizes, T_img, T_txt, half, B)
    reading = T_img * _kept_of_reading(sizes, F, half, B * T_img)
    tokens = _kept_tokens(sizes, F, half) + _kept_tokens(sizes, F, 4)  # the batch's
    pictures = T_img * (_kept_latents(sizes) + tokens)
    media = 4 * T_img * sizes["perceiver"]["n"] * sizes["vision"]["d"]
    parts = {"perceiver": pictures, "loss": kept["loss"]}
    parts["inputs of layers"] = inputs + media
    return {**parts, "one layer": max(one, reading)}


def disk(sizes=PAPER, n_pictures=0, F=1, with_muon=False):
    """What lies on the disk during a training: {what: bytes}.

    Features are in half precision; of checkpoints there are two, the last and the one
    before, with the optimizer's state; the saved model holds what was trained.
    """
    counts = count_parameters(sizes)
    learning = counts["perceiver"] + counts["gated blocks"] + 2 * sizes["lm"]["d"]
    numbers = 3 * learning - _matrices(sizes)["learning"] * bool(with_muon)
    vision = sizes["vision"]
    return {
        "features": 2 * n_pictures * F * vision["v"] * vision["d"],
        "checkpoints": 2 * 4 * numbers,
        "saved model": 4 * learning,
    }


GPUS = {  # memory and peak in half precision, as the makers' data sheets say
    "T4": {"memory": 16e9, "precision": "float16", "peak": 65e12},
    "L4": {"memory": 24e9, "precision": "bfloat16", "peak": 121e12},
    "A100": {"memory": 40e9, "precision": "bfloat16", "peak": 312e12},
}
ROOM = 0.9  # a share of a GPU's memory; the rest is for its driver and for gaps


def largest_batch(memory, wanted=64, **settings):
    """How to make batches of `wanted` sequences: (batch size, how many to gather).

    Args:
        memory: of the GPU, in bytes; ROOM of it is used.
        wanted: sequences for one step of the optimizer.
        settings: for `memory_budget`, without B.

    Raises:
        ValueError: not even one sequence fits.
    """
    for B in (B for B in range(wanted, 0, -1) if wanted % B == 0):
        if sum(memory_budget(B=B, **settings).values()) <= ROOM * memory:
            return B, wanted // B
    needed = sum(memory_budget(B=1, **settings).values()) / ROOM
    raise ValueError(
        f"one sequence needs {needed / 1e9:.1f} GB and there are {memory / 1e9:.1f}: "
        "take gradient_checkpointing=True, precision in half, or fewer tokens"
    )


def arithmetic(sizes=PAPER, T_img=1, T_txt=32, F=1):
    """Floating point operations: {"encode a picture", "train on a sequence"}.

    A product of matrices costs two for each of its multiplications. Backward costs
    twice the forward pass where a matrix learns, as much as it where it is frozen; an
    attention two and a half times.
    """
    vision, perceiver, blocks, lm = sizes.values()
    d_img, d, v, n = vision["d"], lm["d"], vision["v"], perceiver["n"]
    encode = 3 * vision["patch"] ** 2 * d_img * v + d_img * vision["out"]
    encode += vision["layers"] * (12 * (v + 1) * d_img**2 + 2 * (v + 1) ** 2 * d_img)

    tokens, inner = F * v, perceiver["inner"]
    products = 2 * n * d_img * inner + n * d_img * 2 * inner
    products += 2 * n * perceiver["ff"] * d_img**2
    reading = 2 * n * (tokens + n) * inner
    asked = tokens * d_img * 2 * inner  # visual tokens need no gradient
    layer = 3 * products + 2 * asked + 3.5 * reading
    learning = T_img * perceiver["depth"] * layer

    latents, inner = T_img * n, blocks["inner"]
    products = 2 * T_txt * d * inner + latents * d_img * 2 * inner
    products += 2 * T_txt * blocks["ff"] * d**2
    reading = 2 * T_txt * latents * inner
    learning += blocks["number"] * (3 * products + 3.5 * reading)

    layer = T_txt * (4 * d**2 + 2 * d * lm["ffn"])
    frozen = lm["layers"] * (2 * layer + 3.5 * 2 * T_txt**2 * d)
    table = 3 * T_txt * d * lm["vocab"]
    return {
        "encode a picture": 2 * F * encode,
        "train on a sequence": 2 * (learning + frozen + table),
    }


def kept_by_backward(model, batch, precision="float32"):
    """Measure what a forward pass keeps for backward: bytes, weights not counted.

    Args:
        model: a Flamingo, in train mode if it is to be trained.
        batch: of `collate`, on the model's device.
        precision: one of PRECISIONS, by autocast.

    Returns:
        (bytes of activations, bytes of weights cast to half precision).
    """
    weights = [*model.parameters(), *model.buffers()]
    own, shapes = {t.untyped_storage().data_ptr() for t in weights}, set()
    for weight in weights:
        shapes |= {tuple(weight.shape), tuple(weight.shape)[::-1]}
    kept, cast, alive = {}, {}, []

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            alive.append(tensor)  # or another could get its place
            is_cast = precision != "float32" and tensor.dtype != torch.float32
            is_cast &= tensor.ndim == 2 and tuple(tensor.shape) in shapes
            (cast if is_cast else kept)[storage.data_ptr()] = storage.nbytes()
        return tensor

    kind, dtype = batch["lang_x"].device.type, getattr(torch, precision)
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast(kind, dtype, enabled=precision != "float32"),
    ):
        output = model(None, **batch)
    del output
    return sum(kept.values()), sum(cast.values())


class MemoryUse(TorchDispatchMode):
    """Inside `with MemoryUse() as use:`, note how many bytes of tensors are alive.

    Counted are tensors that operations make or touch, on any device, by themselves.

    Attributes:
        now, peak: bytes.
        curve: list of bytes, one after each operation.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.curve, self._known = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run an operation and note what it made."""
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage())
        self.curve.append(self.now)
        return out

    def _note(self, storage):
        place = storage._cdata
        if place not in self._known and storage.nbytes():
            self._known[place] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, place)

    def _forget(self, place):
        self.now -= self._known.pop(place)
