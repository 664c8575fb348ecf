# Written by tools/book/sync.py from book/03_cross_attention.ipynb.
# Edit the notebook, not this file.
"""Masked cross-attention: text tokens ask, image latents answer.

The code of book/03_cross_attention.ipynb. Shapes, spelled as in every chapter:

    x                (B, T_txt, d_txt)          hidden states of the language model
    media            (B, T_img, n, d_img)       n latents per image, from the Perceiver
    media_locations  (B, T_txt) bool            True at each `<image>` token
    may_look         (B, T_txt, T_img) bool     True where a token may see an image
    q                (B, h, T_txt, d_head)      queries, from the text
    k, v             (B, h, T_img * n, d_head)  from the latents, image 1 first

A token before the first image has an all-False row in `may_look`: it reads zero.
"""

__all__ = [
    "FEW",
    "text_time",
    "media_time",
    "text_to_media_mask",
    "cut_into_blocks",
    "MaskedCrossAttention",
    "GatedCrossAttentionBlock",
]

import torch
from einops import rearrange, repeat
from torch import nn

from flamingo_lite.perceiver import FeedForward

FEW = 8  # up to so many images, masking the others is as fast as gathering one's own


def text_time(media_locations):
    """Count the images met so far, at every token (Flamingo, 2.3).

    Args:
        media_locations: (B, T_txt) bool, True at each `<image>` token.

    Returns:
        (B, T_txt) int64: 0 before the first image, then 1, 2, …
    """
    return media_locations.cumsum(dim=-1)


def media_time(T_img, device=None):
    """Number the images of a sequence: (T_img,) int64, 1 … T_img."""
    return torch.arange(1, T_img + 1, device=device)


def text_to_media_mask(media_locations, T_img, only_attend_immediate_media=True):
    """Say which image each text token may look at.

    Args:
        media_locations: (B, T_txt) bool, True at each `<image>` token.
        T_img: how many images each sequence carries.
        only_attend_immediate_media: True, only the last image at or before the token;
            False, all images at or before it.

    Returns:
        (B, T_txt, T_img) bool, True = may look. All False before the first image.
    """
    token = text_time(media_locations)[:, :, None]  # (B, T_txt, 1)
    image = media_time(T_img, media_locations.device)  # (T_img,)
    return token == image if only_attend_immediate_media else token >= image


def cut_into_blocks(image, T_img):
    """Cut each row of words into blocks of one length that read one image each.

    All sizes come from shapes, none from what is in the tensors. There are
    (T_txt + T_img * (c - 1)) // c blocks of c words: room for any T_img runs.

    Args:
        image: (B, T_txt) int64, 0 … T_img - 1, what each word reads; it never falls.
        T_img: how many images each sequence carries.

    Returns:
        place: (B, T_txt) int64, where each word goes among the blocks' places.
        block_image: (B, blocks) int64, the image of each block; 0 for an unused one.
        c: how many words a block has room for.
    """
    B, T_txt = image.shape
    c = -(-T_txt // T_img)  # rounded up
    here = torch.arange(T_txt, device=image.device).expand(B, -1)  # (B, T_txt)
    if c == 1:
        return here, image, c
    is_first = image.diff(dim=1, prepend=image[:, :1] - 1) != 0  # (B, T_txt), of a run
    number = here - (here * is_first).cummax(dim=1).values  # (B, T_txt), in its run
    block = (number % c == 0).cumsum(dim=1) - 1  # (B, T_txt)
    n_blocks = (T_txt + T_img * (c - 1)) // c
    block_image = image.new_zeros(B, n_blocks).scatter(1, block, image)
    return block * c + number % c, block_image, c


class _TwoWaysToRead(nn.Module):
    """How queries ask keys and values: behind the mask, or block by block.

    Who uses it has `heads` and `only_attend_immediate_media`.
    """

    def _split_heads(self, t):
        return rearrange(t, "B tokens (h d) -> B h tokens d", h=self.heads)

    def read_masked(self, q, k, v, locations, T_img):
        """Ask the latents of all images, behind the mask: for either rule.

        Args:
            q: (B, h, T_txt, d_head) of the last T_txt tokens of `locations`.
            k, v: (B, h, T_img * n, d_head).
            locations: (B, T_all) bool, True at `<image>`.
            T_img: how many images.

        Returns:
            (B, h, T_txt, d_head).
        """
        T_txt, n = q.shape[2], k.shape[2] // T_img
        rule = self.only_attend_immediate_media
        may_look = text_to_media_mask(locations, T_img, rule)[:, -T_txt:]
        allowed = repeat(may_look, "B T_txt T_img -> B 1 T_txt (T_img n)", n=n)
        # A row with nothing allowed has no softmax: open it, then blank the result.
        blind = ~may_look.any(dim=-1)[:, None, :, None]  # (B, 1, T_txt, 1)
        read = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed | blind
        )
        return read.masked_fill(blind, 0.0)

    def _fetch(self, t, image):
        """(B, h, T_img, n, d_head), k or v, to (B * blocks, h, n, d_head)."""
        rows = torch.arange(len(t), device=t.device)[:, None]  # (B, 1)
        return t.transpose(1, 2)[rows, image].flatten(0, 1)

    def read_blocks(self, q, k, v, locations, T_img):
        """As `read_masked`, each word only its own image: for the immediate rule.

        With one image there is nothing to fetch, and any rule will do.
        """
        B, h, T_txt, d_head = q.shape
        clock = text_time(locations)[:, -T_txt:]  # (B, T_txt)
        if T_img == 1:
            read = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            place, image, c = cut_into_blocks((clock - 1).clamp(0, T_img - 1), T_img)
            k, v = (self._fetch(t.unflatten(2, (T_img, -1)), image) for t in (k, v))
            rows = torch.arange(B, device=q.device)[:, None]  # (B, 1)
            asked = q.new_zeros(B, image.shape[1] * c, h, d_head)  # (B, places, …)
            asked[rows, place] = q.transpose(1, 2)
            asked = asked.unflatten(1, (-1, c)).flatten(0, 1).transpose(1, 2)
            read = nn.functional.scaled_dot_product_attention(asked, k, v)
            read = read.transpose(1, 2).reshape(B, -1, h, d_head)  # (B, places, …)
            read = read[rows, place].transpose(1, 2)  # (B, h, T_txt, d_head)
        blind = clock < 1  # (B, T_txt)
        if self.only_attend_immediate_media:
            blind |= clock > T_img  # an `<image>` without a picture
        return read.masked_fill(blind[:, None, :, None], 0.0)


class MaskedCrossAttention(_TwoWaysToRead):
    """Let each text token read the images it may look at (Flamingo, 2.2 and 2.3).

    Args:
        dim: d_txt, width of the text.
        dim_visual: d_img, width of the latents.
        dim_head, heads: width of one head, number of heads h.
        only_attend_immediate_media: see `text_to_media_mask`.
    """

    def __init__(
        self, *, dim, dim_visual, dim_head=64, heads=8, only_attend_immediate_media=True
    ):
        super().__init__()
        self.heads = heads
        self.only_attend_immediate_media = only_attend_immediate_media
        inner_dim = dim_head * heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_kv = nn.Linear(dim_visual, inner_dim * 2, bias=False)
        self.to_out = nn.Linear(inner_dim, dim, bias=False)

    def _so_far(self, T_txt, media_locations, use_cached_media):
        """(B, T_all) bool, `media_locations` of all tokens up to the last of T_txt."""
        if use_cached_media:  # all T_txt tokens come after those of media_locations
            after = media_locations.new_zeros(len(media_locations), T_txt)
            return torch.cat((media_locations, after), dim=1)
        T_all = media_locations.shape[1]
        if T_all < T_txt:
            raise ValueError(f"{T_txt} tokens, but media_locations for {T_all}")
        return media_locations

    def keys_values(self, media):
        """(B, T_img, n, d_img) latents to k and v, (B, h, T_img * n, d_head) each."""
        latents = rearrange(media, "B T_img n d -> B (T_img n) d")
        k, v = self.to_kv(latents).chunk(2, dim=-1)  # (B, T_img * n, h * d_head) each
        return self._split_heads(k), self._split_heads(v)

    def forward(
        self,
        x,
        media,
        media_locations=None,
        use_cached_media=False,
        keys_values=None,
    ):
        """Return what the text reads.

        Args:
            x: (B, T_txt, d_txt) text.
            media: (B, T_img, n, d_img) latents.
            media_locations: (B, T_all) bool, True at `<image>`, for all tokens so far,
                of which `x` is the last T_txt; None: every token sees every image.
            use_cached_media: `x` comes after all the tokens of `media_locations`.
            keys_values: what the method `keys_values` made of `media`, if it was kept.

        Returns:
            (B, T_txt, d_txt). Exactly zero for a token that may look at no image.

        Raises:
            ValueError: `media_locations` covers fewer tokens than `x` has.
        """
        T_txt, T_img = x.shape[1], media.shape[1]
        q = self._split_heads(self.to_q(self.norm(x)))  # (B, h, T_txt, d_head)
        k, v = keys_values or self.keys_values(media)  # (B, h, T_img * n, d_head) each
        if media_locations is None:
            read = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            locations = self._so_far(T_txt, media_locations, use_cached_media)
            blocks = T_img == 1 or (T_img > FEW and self.only_attend_immediate_media)
            how = self.read_blocks if blocks else self.read_masked
            read = how(q, k, v, locations, T_img)  # (B, h, T_txt, d_head)
        return self.to_out(rearrange(read, "B h T_txt d -> B T_txt (h d)"))


class GatedCrossAttentionBlock(nn.Module):
    """Cross-attention and feed-forward, each behind a gate that starts shut.

    See Flamingo, 2.2. The gates are used through tanh.

    Args: as `MaskedCrossAttention`, and `ff_mult`, see `FeedForward`.
    """

    def __init__(
        self,
        *,
        dim,
        dim_visual,
        dim_head=64,
        heads=8,
        ff_mult=4,
        only_attend_immediate_media=True,
    ):
        super().__init__()
        self.attn = MaskedCrossAttention(
            dim=dim,
            dim_visual=dim_visual,
            dim_head=dim_head,
            heads=heads,
            only_attend_immediate_media=only_attend_immediate_media,
        )
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = FeedForward(dim, mult=ff_mult)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        x,
        media,
        media_locations=None,
        use_cached_media=False,
        keys_values=None,
    ):
        """(B, T_txt, d_txt) in and out; arguments as `MaskedCrossAttention`."""
        read = self.attn(x, media, media_locations, use_cached_media, keys_values)
        x = x + read * self.attn_gate.tanh()
        return x + self.ff(x) * self.ff_gate.tanh()
