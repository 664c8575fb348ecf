# Written by tools/book/sync.py from book/11_looking_inside.ipynb.
# Edit the notebook, not this file.
"""Looking inside: which patches a word looks at, and what covering them does.

Shapes:

    on_latents   (B, h, T_txt, T_img, n)  weights of the text on each image's latents
    on_patches   (B, T_img, n, v)         shares of the patches in each latent
    maps         (B, h, T_txt, T_img, v)  both together
"""

__all__ = [
    "noted_inputs",
    "text_weights",
    "latent_weights",
    "roll_out",
    "attention_maps",
    "show_maps",
    "occlusion",
]

import contextlib

import numpy as np
import torch
from PIL import Image

from flamingo_lite.cross_attention import MaskedCrossAttention, text_to_media_mask
from flamingo_lite.data import interleave
from flamingo_lite.perceiver import PerceiverAttention
from flamingo_lite.vision import rgb_on_white


@contextlib.contextmanager
def noted_inputs(model, kind):
    """Note what every module of a kind is called with: a list of (module, args)."""
    calls, hooks = [], []
    for module in model.modules():
        if isinstance(module, kind):
            note = lambda module, args: calls.append((module, args))  # noqa: E731
            hooks.append(module.register_forward_pre_hook(note))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def text_weights(attn, x, media, media_locations):
    """Attention weights of a `MaskedCrossAttention`, (B, h, T_txt, T_img, n).

    Args: as its `forward`. Zero for a token that may look at no image.
    """
    T_img, n = media.shape[1:3]
    q = attn._split_heads(attn.to_q(attn.norm(x)))  # (B, h, T_txt, d_head)
    k, _ = attn.keys_values(media)  # (B, h, T_img * n, d_head)
    rule = attn.only_attend_immediate_media
    may_look = text_to_media_mask(media_locations, T_img, rule)  # (B, T_txt, T_img)
    allowed = may_look.repeat_interleave(n, dim=2)[:, None]  # (B, 1, T_txt, T_img * n)
    scores = q.float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5
    lowest = torch.finfo(scores.dtype).min
    weights = scores.masked_fill(~allowed, lowest).softmax(dim=-1) * allowed
    return weights.unflatten(-1, (T_img, n))  # (B, h, T_txt, T_img, n)


def latent_weights(attn, x, latents):
    """Attention weights of a `PerceiverAttention`, (B, T_img, h, n, F * v + n)."""
    asking = attn.norm_latents(latents)  # (B, T_img, n, d)
    answering = torch.cat((attn.norm_media(x), asking), dim=-2)
    k = attn.to_kv(answering).chunk(2, dim=-1)[0]  # (B, T_img, F * v + n, h * d_head)
    q, k = (
        t.unflatten(-1, (attn.heads, -1)).transpose(2, 3)
        for t in (attn.to_q(asking), k)
    )  # (B, T_img, h, tokens, d_head) each
    scores = q.float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1)  # (B, T_img, h, n, F * v + n)


def roll_out(weights):
    """Which patches a latent is made of, (B, T_img, n, v); each row sums to one.

    Args:
        weights: of each Perceiver layer, see `latent_weights`.
    """
    mixed = None
    for layer in weights:
        layer = layer.mean(dim=2)  # (B, T_img, n, v + n): over the heads
        n = layer.shape[-2]
        patches, latents = layer[..., :-n], layer[..., -n:]
        if mixed is None:
            mixed = torch.zeros_like(patches)
        mixed = (mixed + patches + latents @ mixed) / 2
    return mixed / mixed.sum(dim=-1, keepdim=True)


@torch.no_grad()
def attention_maps(model, batch):
    """Where each token of a batch looks: for each gated block, its number and a map.

    Args:
        model: a Flamingo.
        batch: from `collate`.

    Returns:
        list of (B, h, T_txt, T_img, v) on the CPU, one for each layer with
        cross-attention. Rows sum to one, or to zero before the first image.
    """
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with (
        noted_inputs(model, MaskedCrossAttention) as text,
        noted_inputs(model, PerceiverAttention) as perceiver,
    ):
        model(None, **batch)
    on_patches = roll_out([latent_weights(attn, *args) for attn, args in perceiver])
    return [
        torch.einsum(
            "bhtin,binv->bhtiv", text_weights(attn, *args[:3]), on_patches
        ).cpu()
        for attn, args in text
    ]


def show_maps(picture, titles, maps):
    """A picture, and maps laid over it. It needs matplotlib.

    Args:
        picture: PIL, a square one: what the model saw of it.
        titles: a string for each map.
        maps: (maps, v), or a list of (v,); v patches in a square grid.

    Raises:
        ValueError: the picture or the grid is not square, or titles differ in number.
    """
    import matplotlib.pyplot as plt  # only who draws needs it

    maps = [torch.as_tensor(one).detach().float().cpu() for one in maps]  # (v,) each
    maps = torch.stack(maps) if maps else torch.empty(0, 0)  # (maps, v)
    side, (width, height) = round(maps.shape[-1] ** 0.5), picture.size
    if side**2 != maps.shape[-1] or len(titles) != len(maps):
        raise ValueError(f"{len(titles)} titles, maps {tuple(maps.shape)}: no squares")
    if width != height:
        raise ValueError(f"{width} x {height}: cut out the square that the model saw")
    picture = rgb_on_white(picture)
    fig, axes = plt.subplots(
        1, len(maps) + 1, figsize=(1.7 * (len(maps) + 1), 1.9), facecolor="white"
    )
    axes[0].imshow(picture)
    for ax, title, weights in zip(axes[1:], titles, maps, strict=True):
        heat = np.asarray(weights).reshape(side, side)  # (rows, columns)
        large = Image.fromarray(heat).resize(picture.size, Image.Resampling.BICUBIC)
        ax.imshow(picture.convert("L"), cmap="gray", alpha=0.6)
        ax.imshow(np.asarray(large), cmap="magma", alpha=0.6, vmin=0)
        ax.set_title(title, fontsize=9)
    for ax in axes:
        ax.axis("off")
    fig.tight_layout()
    plt.show()


@torch.no_grad()
def occlusion(model, image_processor, tokenizer, picture, text, place, cells=4):
    """How much covering a part of the picture costs one token: (cells, cells).

    Args:
        picture: PIL.
        text: its caption.
        place: number of the token, the start token being 0, whose log-probability is
            compared.
        cells: the picture is cut into cells x cells parts, each covered in turn.

    Returns:
        log-probability with the whole picture minus that with the part covered by the
        colour of the picture's corner, on the CPU.

    Raises:
        ValueError: no such token, or more cells than pixels.
    """
    picture = rgb_on_white(picture)
    if not 1 <= cells <= min(picture.size):
        raise ValueError(f"{cells} x {cells} parts of a picture of {picture.size}")
    across, down = (
        [side * i // cells for i in range(cells + 1)] for side in picture.size
    )
    covered = [picture]
    for top, bottom in zip(down, down[1:], strict=False):
        for left, right in zip(across, across[1:], strict=False):
            one = picture.copy()
            one.paste(picture.getpixel((0, 0)), (left, top, right, bottom))
            covered.append(one)
    device = next(model.parameters()).device
    pixels = torch.stack([image_processor(p) for p in covered])  # (1 + cells², 3, H, W)
    lang_x = tokenizer(interleave([text]), return_tensors="pt").input_ids
    if not 1 <= place < lang_x.shape[1]:
        raise ValueError(f"token {place} of {lang_x.shape[1]}, the first being 0")
    lang_x = lang_x.expand(len(covered), -1).to(device)  # (1 + cells², T_txt)
    logits = model(pixels[:, None, None].to(device), lang_x).logits  # (…, T_txt, vocab)
    log_p = logits[:, place - 1].float().log_softmax(dim=-1)[:, lang_x[0, place]]
    return (log_p[0] - log_p[1:]).view(cells, cells).cpu()
