# Written by tools/book/sync.py from book/01_clip_features.ipynb.
# Edit the notebook, not this file.
"""CLIP features: pictures in, one vector per patch out.

Exported from book/01_clip_features.ipynb. Shapes:

    pixels   (B, T_img, F, 3, H, W)    as the image processor makes them
    flat     (B * T_img * F, 3, H, W)  what a CLIP takes
    patches  (B, T_img, F, v, d_img)   the grid of patch tokens, without CLS
"""

__all__ = [
    "VisionEncoder",
    "rgb_on_white",
    "choose_device",
    "describe_device",
    "tower_settings",
    "TimmTower",
    "load_vision_encoder",
]

import json
import math
import os
import re
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import open_clip
import torch
from einops import rearrange
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from open_clip.constants import HF_SAFE_WEIGHTS_NAME
from open_clip.model import _build_vision_tower
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.timm_model import TimmModel
from PIL import Image, ImageOps
from torch import nn
from torch.func import functional_call

_CONFIG = "open_clip_config.json"


class VisionEncoder(nn.Module):
    """A frozen open_clip vision tower that gives its patch tokens (Flamingo, 2.1).

    Args:
        clip: an open_clip model; its `visual` tower is kept, without the text tower.

    Attributes:
        visual: the tower, in eval mode, set to return (pooled, tokens).
        dim: d_img, the width of a token.

    Raises:
        ValueError: its tokens, if it has any, are no patches.
    """

    def __init__(self, clip):
        super().__init__()
        self.visual = _with_tokens(clip.visual)
        is_timm = isinstance(self.visual, TimmTower)
        self.dim = self.visual.dim if is_timm else self.visual.conv1.out_channels
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        """Stay in eval mode: this part is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels):
        """Encode pixels, (B, T_img, F, 3, H, W), as the image processor makes them.

        Returns:
            (B, T_img, F, v, d_img) patch tokens, without CLS.

        Raises:
            ValueError: `pixels` is not 6-dimensional, or not of the tower's size; or
                there are not as many tokens as patches.
        """
        picture = (3, *self.visual.image_size)
        if pixels.ndim != 6 or pixels.shape[3:] != picture:
            want = f"(B, T_img, F, {', '.join(map(str, picture))})"
            raise ValueError(f"want {want}, got {tuple(pixels.shape)}")
        B, T_img, F = pixels.shape[:3]
        flat = rearrange(pixels, "B T_img F c H W -> (B T_img F) c H W")
        _, tokens = self.visual(flat)  # (B * T_img * F, v, d_img)
        if tokens.shape[1] != (v := math.prod(self.visual.grid_size)):
            raise ValueError(f"want {v} tokens, one a patch, got {tokens.shape[1]}")
        unfold = "(B T_img F) v d -> B T_img F v d"
        return rearrange(tokens, unfold, B=B, T_img=T_img, F=F)


def rgb_on_white(picture):
    """Turn a PIL picture upright and into RGB, what is transparent on white.

    Args:
        picture: of any mode; of an animation, the frame that it stands at.

    Returns:
        RGB picture; one that is RGB and upright keeps its pixels.

    Raises:
        TypeError: it is no PIL picture.
        ValueError: it cannot be decoded, 8 bits cannot hold it, or it is a strip.
    """
    if not isinstance(picture, Image.Image):
        raise TypeError(
            f"want a PIL picture, got {type(picture).__name__}: PIL's Image.open makes "
            "one of a file, Image.fromarray of an array"
        )
    in_16_bits = "16B" in str(getattr(picture, "tile", ""))  # until it is decoded
    try:
        upright = ImageOps.exif_transpose(picture)
    except Exception as error:  # broken data makes decoders raise almost anything
        raise ValueError(f"the picture cannot be decoded: {error}") from error
    is_16_bit = upright.mode.startswith("I;") or picture.format in ("PNG", "PPM")
    if upright.mode == "F" or (upright.mode == "I" and not is_16_bit):
        raise ValueError("brightness in 32 bits; save it with 8 or 16")
    clear, deep = upright.info.get("transparency"), upright.mode.startswith("I")
    in_16_bits |= deep or (type(clear) is tuple and max(clear) > 255)
    if clear is not None and in_16_bits:
        raise ValueError("a transparent colour in 16 bits; save it with 8")
    if max(upright.size) > 3000 * min(upright.size) or 0 in upright.size:
        raise ValueError(f"a strip of {upright.width} x {upright.height} pixels")
    if deep:  # 16 bits: Pillow would clip, so scale
        grey = (np.asarray(upright) / 257).clip(0, 255)
        if getattr(picture, "tag_v2", {}).get(262) == 0:  # a TIFF whose white is 0
            grey = 255 - grey
        upright = Image.fromarray(grey.astype(np.uint8))
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    straight = upright.convert("LA") if upright.mode == "La" else upright
    white = Image.new("RGBA", upright.size, "white")
    return Image.alpha_composite(white, straight.convert("RGBA")).convert("RGB")


def choose_device():
    """The device to compute on: CUDA, or else MPS, or else the CPU.

    The environment variable FLAMINGO_LITE_DEVICE ("cpu", "cuda:1") goes before.

    Raises:
        ValueError: the variable names no device of this machine.
    """
    named = os.environ.get("FLAMINGO_LITE_DEVICE")
    if not named:
        kinds = (("cuda", torch.cuda), ("mps", torch.backends.mps))
        return torch.device(next((k for k, way in kinds if way.is_available()), "cpu"))
    try:
        return torch.empty(0, device=named).device
    except Exception as error:  # each kind of device has errors of its own
        message = f"FLAMINGO_LITE_DEVICE={named!r} is no device of this machine"
        raise ValueError(f"{message}: {error}") from error


def describe_device(device):
    """One line about a device and its memory: "cuda:0, Tesla T4, 15.6 GB"."""
    device = torch.device(device)
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        name, memory = about.name, about.total_memory
    elif device.type == "mps":
        name, memory = "Apple GPU", torch.mps.recommended_max_memory()
    else:
        n_threads, memory = torch.get_num_threads(), None
        name = "1 thread" if n_threads == 1 else f"{n_threads} threads"
        if hasattr(os, "sysconf"):  # not on Windows
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return ", ".join([str(device), name, *([f"{memory / 1e9:.1f} GB"] * bool(memory))])


_PLAIN = {
    "quick_gelu": False,
    "mean": open_clip.OPENAI_DATASET_MEAN,
    "std": open_clip.OPENAI_DATASET_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def _read_config(name, cache_dir=None):
    """A CLIP's "model_cfg" and "preprocess_cfg"; of a hub's, only these are fetched."""
    schema, _, place = name.partition(":")
    if not place:
        config = open_clip.get_model_config(name)
        if config is None:
            raise ValueError("no such model; open_clip.list_models() names them all")
        return {"model_cfg": config}
    file = Path(place) / _CONFIG
    if schema == "hf-hub":
        file = download_pretrained_from_hf(place, _CONFIG, cache_dir=cache_dir)
    return json.loads(Path(file).read_bytes())


def _find_settings(config, name=None, tag=None):
    """What weights want: a tag's word counts, then a configuration's, then _PLAIN."""
    said = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    said = {**config["model_cfg"], **config.get("preprocess_cfg", {}), **said}
    found = {k: v if said.get(k) is None else said[k] for k, v in _PLAIN.items()}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}


def _timm_settings(visual):
    """`tower_settings` of a `TimmTower`: of all its layers together."""
    layers, trunk = list(visual.trunk.modules()), visual.trunk
    return {
        "trunk": type(trunk).__name__,
        "activation": sorted({repr(m.act) for m in layers if hasattr(m, "act")}),
        "heads": sorted({m.num_heads for m in layers if hasattr(m, "num_heads")}),
        "epsilon": sorted({m.eps for m in layers if hasattr(m, "eps")}),
        "prefix": getattr(trunk, "num_prefix_tokens", 0),
        "grid_size": list(visual.grid_size),
    }


def _vit_settings(visual):
    """`tower_settings` of a vision transformer of open_clip's own."""
    blocks = visual.transformer.resblocks
    return {
        "activation": sorted({repr(block.mlp.gelu) for block in blocks}),
        "heads": sorted({block.attn.num_heads for block in blocks}),
        "epsilon": visual.ln_post.eps,
        "pool_type": visual.pool_type,
        "final_ln_after_pool": visual.final_ln_after_pool,
    }


def tower_settings(visual):
    """What a tower computes with, beside its weights: plain values."""
    is_timm = isinstance(visual, TimmTower)
    return {
        **(_timm_settings(visual) if is_timm else _vit_settings(visual)),
        "image_size": list(visual.image_size),
        "picture": {
            key: getattr(visual, "preprocess_cfg", {}).get(key)
            for key in ("mean", "std", "interpolation", "resize_mode", "fill_color")
        },
    }


class TimmTower(nn.Module):
    """A tower that open_clip takes from timm, made to return (pooled, tokens).

    Args:
        visual: a `TimmModel` of open_clip's; its weights keep their names.

    Attributes:
        image_size, grid_size: (H, W) of a picture, (rows, columns) of its tokens.
        dim: d_img, the width of a token.
    """

    def __init__(self, visual):
        super().__init__()
        self.trunk, self.head = visual.trunk, visual.head
        self.image_size = tuple(visual.image_size)
        self.preprocess_cfg = getattr(visual, "preprocess_cfg", {})
        tensors = [*self.eval().named_parameters(), *self.named_buffers()]
        shapes = {name: tensor.to("meta") for name, tensor in tensors}  # no numbers
        picture = torch.empty(1, 3, *self.image_size, device="meta")
        _, grid = functional_call(self, shapes, (picture, False))
        self.grid_size, self.dim = tuple(grid.shape[1:3]), grid.shape[3]

    def forward(self, pixels, flat=True):
        """Encode pixels, (B, 3, H, W).

        Returns:
            pooled, (B, d), and tokens, (B, v, d_img), row by row; with `flat` False,
            tokens are (B, rows, columns, d_img).
        """
        features = self.trunk.forward_features(pixels)
        pooled = self.head(self.trunk.forward_head(features))  # (B, d)
        if features.ndim == 3:  # (B, prefix + v, d_img)
            grid = features[:, self.trunk.num_prefix_tokens :]  # (B, v, d_img)
            patch = self.trunk.feature_info[-1]["reduction"]
            grid = grid.unflatten(1, [side // patch for side in self.image_size])
        elif getattr(self.trunk, "output_fmt", "NCHW") == "NHWC":
            grid = features  # (B, rows, columns, d_img)
        else:
            grid = rearrange(features, "B d row column -> B row column d")
        return pooled, grid.flatten(1, 2) if flat else grid


_NO_PATCHES = {
    "attentional_pool": "its tokens are learned queries",
    "none": "CLS stands among its tokens",
}


def _with_tokens(visual, name="this tower"):
    """A tower that gives (pooled, tokens); ValueError if those are no patches."""
    kind, reason = type(visual).__name__, None
    if isinstance(visual, TimmModel):
        try:
            return TimmTower(visual)
        except Exception as error:  # whatever another shape of features leads to
            kind = type(visual.trunk).__name__
            reason = f"the features of timm's {kind} are no grid: {error!r}"
    elif isinstance(visual, open_clip.transformer.VisionTransformer):
        attends = visual.attn_pool is not None
        pool = "attentional_pool" if attends else visual.pool_type
        if pool in _NO_PATCHES:
            reason = f"it pools by {pool!r}, so {_NO_PATCHES[pool]}"
    elif not isinstance(visual, TimmTower):
        reason = f"want a vision transformer of open_clip's or timm's, got {kind}"
    if reason:
        raise ValueError(f"{name} gives no patch tokens: {reason}")
    visual.output_tokens = True
    return visual


def _tower_without_weights(model_cfg):
    """The tower that a configuration describes, as shapes alone: torch's "meta"."""
    settings = {**model_cfg["vision_cfg"], "timm_model_pretrained": False}
    with torch.device("meta"):
        return _build_vision_tower(model_cfg.get("embed_dim", 512), settings)


def _find_tag(name, pretrained):
    """Split "TAG", "FILE" or "TAG:FILE" into tag and file; None for what is lacking."""
    if not pretrained or open_clip.is_pretrained_cfg(name, pretrained):
        return pretrained or None, None
    tag, _, file = pretrained.partition(":")
    if file and open_clip.is_pretrained_cfg(name, tag):
        return tag, file
    if Path(file).is_file() and not Path(pretrained).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(f"{name} has no tag {tag!r}, of which {file} is to be: {tags}")
    return None, pretrained


def _seen_of(file):
    """What can be seen of the settings that a checkpoint file wants, and where."""
    beside = Path(file).with_name(_CONFIG)
    if beside.is_file():
        return _find_settings(_read_config(f"local-dir:{beside.parent}")), beside
    if re.search("quick[-_]?gelu", Path(file).name.lower()):
        return {"quick_gelu": True}, "its name"
    return {}, None


def _check_file(file, name, tag, config, seen, where):
    """Raise ValueError if a file wants other settings than it gets; warn if it may."""
    settings = _find_settings(config, name, tag)
    if unlike := {k: v for k, v in seen.items() if v != settings[k]}:
        gets = {k: settings[k] for k in unlike}
        raise ValueError(
            f"{file} wants {unlike}, says {where}, but {name}, tag {tag}, has {gets}: "
            'give the name or the tag that it is of, e.g. pretrained="openai:FILE", or '
            'its folder, name "local-dir:FOLDER"'
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    others = [t for t in tags if _find_settings(config, name, t) != settings]
    if others and not tag and not seen:
        warnings.warn(
            f"{file} does not say how it was trained. It gets {settings}, as {name} "
            f"says, but {', '.join(others)} want something else. If it comes from one "
            f'of those, say so: pretrained="{others[0]}:{file}"',
            stacklevel=3,
        )


def _check_grid(file, name, visual):
    """Raise ValueError if a checkpoint file is for pictures of another size."""
    if Path(file).suffix in (".npz", ".npy") or isinstance(visual, TimmTower):
        return  # not in open_clip's own format; or a table that is never stretched
    device = "cpu" if Path(file).suffix == ".safetensors" else "meta"
    saved = open_clip.factory.load_state_dict(file, device=device)
    wanted = visual.positional_embedding
    found = saved.get("visual.positional_embedding", wanted)
    if len(found) != len(wanted):
        raise ValueError(
            f"{file} has places for {len(found) - 1} patches, and {name} makes "
            f"{len(wanted) - 1} of a picture: it is of a model for another picture size"
        )


def _fetch(name, tag, cache_dir):
    """Fetch weights from the hub. A try of open_clip's that fails would not say why."""
    place = name.removeprefix("hf-hub:")
    if place == name:
        place = (open_clip.get_pretrained_cfg(name, tag) or {}).get("hf_hub", "")
        if not place.endswith("/"):  # not on the hub, or a file of another name
            return
    try:
        hf_hub_download(place.strip("/"), HF_SAFE_WEIGHTS_NAME, cache_dir=cache_dir)
    except EntryNotFoundError:
        pass  # older ones have only a .bin file, which open_clip fetches


@contextmanager
def _explained(name, pretrained):
    """Raise OSError, which says what to do, for whatever a reader of files raises."""
    try:
        yield
    except Exception as error:  # a damaged file raises what its reader raises
        raise OSError(
            f"cannot load {name!r} with weights {pretrained!r}. Without a network, "
            'give a checkpoint file as `pretrained`, or name "local-dir:FOLDER", or '
            'use build_flamingo("tiny"), which needs no download. '
            f"open_clip says: {error}"
        ) from error


def load_vision_encoder(name, pretrained=None, cache_dir=None):
    """Load a CLIP from open_clip and keep its vision tower.

    Args:
        name: a model that open_clip knows ("ViT-L-14"), or "local-dir:FOLDER".
        pretrained: a tag ("openai"), a checkpoint file, or "openai:FILE", a file that
            gets the activation and the picture settings of that tag. None gives random
            weights, unless `name` is a folder, which holds its own.
        cache_dir: where downloads are kept.

    Returns:
        VisionEncoder, and the image processor: a PIL picture, which goes through
        `rgb_on_white`, to (3, H, W).

    Raises:
        OSError: the weights are not here and cannot be fetched, or are damaged.
        ValueError: the tower gives no patch tokens, which is said before anything is
            fetched; or a file is seen to be of another model.
    """
    pretrained = pretrained and os.fspath(pretrained)
    is_place = name.startswith(("local-dir:", "hf-hub:"))  # with weights of its own
    folder = Path(name.removeprefix("local-dir:"))
    if name.startswith("local-dir:") and not (folder / _CONFIG).is_file():
        raise OSError(f"no {_CONFIG} in the folder {folder}")
    if is_place and pretrained:
        raise ValueError(f"{name} has weights of its own: leave out {pretrained!r}")
    name = name if is_place else name.replace("/", "-")  # as open_clip does
    tag, file = _find_tag(name, pretrained)
    if file and (os.sep in file or Path(file).suffix) and not Path(file).is_file():
        raise OSError(f"no checkpoint file {file}")
    with _explained(name, pretrained):
        config = _read_config(name, cache_dir)
        tower = _tower_without_weights(config["model_cfg"])
        seen = _seen_of(file) if file else ({}, None)
    _with_tokens(tower, name)
    settings = _find_settings(config, name, tag)
    with _explained(name, pretrained):
        if tag or name.startswith("hf-hub:"):
            _fetch(name, tag, cache_dir)
        clip, _, image_processor = open_clip.create_model_and_transforms(
            name,
            file or tag,
            cache_dir=cache_dir,
            require_pretrained=is_place or pretrained is not None,
            force_quick_gelu=settings.pop("quick_gelu"),
            **{f"image_{key}": value for key, value in settings.items()},
        )
    encoder = VisionEncoder(clip)
    if file:
        _check_file(file, name, tag, config, *seen)
        _check_grid(file, name, encoder.visual)
    image_processor.transforms.insert(0, rgb_on_white)
    return encoder, image_processor
