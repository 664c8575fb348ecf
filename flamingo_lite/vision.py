# Written by tools/sync.py from book/01_clip_features.ipynb.
# Edit the notebook, not this file.
"""CLIP features: pictures in, one vector per patch out.

Exported from book/01_clip_features.ipynb. Shapes:

    pixels   (B, T_img, F, 3, H, W)    as the image processor makes them
    flat     (B * T_img * F, 3, H, W)  what a CLIP takes
    patches  (B, T_img, F, v, d_img)   the grid of patch tokens, without CLS
"""

import os
from pathlib import Path

import numpy as np
import open_clip
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import nn


class VisionEncoder(nn.Module):
    """A frozen open_clip vision tower that gives its patch tokens (Flamingo, 2.1).

    Args:
        clip: an open_clip model; its `visual` tower is kept, without the text tower.

    Attributes:
        visual: the tower, in eval mode, set to return (pooled, tokens).
        dim: d_img, the width of a token.

    Raises:
        ValueError: the tower is no vision transformer of open_clip's own.
    """

    def __init__(self, clip):
        super().__init__()
        if not isinstance(clip.visual, open_clip.transformer.VisionTransformer):
            kind = type(clip.visual).__name__
            raise ValueError(f"want a VisionTransformer of open_clip's, got {kind}")
        self.visual = clip.visual
        self.visual.output_tokens = True
        self.dim = self.visual.conv1.out_channels
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
            ValueError: `pixels` is not 6-dimensional, or not of the tower's size.
        """
        picture = (3, *self.visual.image_size)
        if pixels.ndim != 6 or pixels.shape[3:] != picture:
            want = f"(B, T_img, F, {', '.join(map(str, picture))})"
            raise ValueError(f"want {want}, got {tuple(pixels.shape)}")
        B, T_img, F = pixels.shape[:3]
        flat = rearrange(pixels, "B T_img F c H W -> (B T_img F) c H W")
        _, tokens = self.visual(flat)  # (B * T_img * F, v, d_img)
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
    try:
        upright = ImageOps.exif_transpose(picture)
    except Exception as error:  # broken data makes decoders raise almost anything
        raise ValueError(f"the picture cannot be decoded: {error}") from error
    is_16_bit = upright.mode.startswith("I;") or picture.format in ("PNG", "PPM")
    if upright.mode == "F" or (upright.mode == "I" and not is_16_bit):
        raise ValueError("brightness in 32 bits; save it with 8 or 16")
    clear, deep = upright.info.get("transparency"), upright.mode.startswith("I")
    if (clear is not None and deep) or (type(clear) is tuple and max(clear) > 255):
        raise ValueError("a transparent colour in 16 bits; save it with 8")
    if max(upright.size) > 3000 * min(upright.size) or 0 in upright.size:
        raise ValueError(f"a strip of {upright.width} x {upright.height} pixels")
    if deep:  # 16 bits: Pillow would clip, so scale
        grey = (np.asarray(upright) / 257).clip(0, 255)
        upright = Image.fromarray(grey.astype(np.uint8))
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    straight = upright.convert("LA") if upright.mode == "La" else upright
    white = Image.new("RGBA", upright.size, "white")
    return Image.alpha_composite(white, straight.convert("RGBA")).convert("RGB")


def load_vision_encoder(name, pretrained=None, cache_dir=None):
    """Load a CLIP from open_clip and keep its vision tower.

    Args:
        name: a model that open_clip knows ("ViT-L-14"), or "local-dir:FOLDER".
        pretrained: a tag ("openai") or a checkpoint file; None gives random weights,
            unless `name` is a folder, which holds its own.
        cache_dir: where downloads are kept.

    Returns:
        VisionEncoder, and the image processor: a PIL picture, which goes through
        `rgb_on_white`, to (3, H, W).

    Raises:
        OSError: the weights are not here and cannot be fetched, or are damaged.
        ValueError: see `VisionEncoder`.
    """
    is_folder = name.startswith("local-dir:")
    folder = Path(name.removeprefix("local-dir:"))
    if is_folder and not (folder / "open_clip_config.json").is_file():
        raise OSError(f"no open_clip_config.json in the folder {folder}")
    looks_like_file = pretrained and (os.sep in pretrained or Path(pretrained).suffix)
    if looks_like_file and not Path(pretrained).is_file():
        raise OSError(f"no checkpoint file {pretrained}")
    wants_weights = is_folder or pretrained is not None
    try:
        clip, _, image_processor = open_clip.create_model_and_transforms(
            name, pretrained, cache_dir=cache_dir, require_pretrained=wants_weights
        )
    except Exception as error:  # a damaged file raises what its reader raises
        raise OSError(
            f"cannot load {name!r} with weights {pretrained!r}. Without a network, "
            'give a checkpoint file as `pretrained`, or name "local-dir:FOLDER", or '
            'use build_flamingo("tiny"), which needs no download. '
            f"open_clip says: {error}"
        ) from error
    image_processor.transforms.insert(0, rgb_on_white)
    return VisionEncoder(clip), image_processor
