"""The shifted loss: every token is asked to foretell the next one."""

import torch
from torch import nn

IGNORE = -100  # the label that cross_entropy passes over


def make_labels(input_ids, media_token_id, eoc_token_id, attention_mask=None):
    """Say at which tokens the loss is taken: the text of each chunk, and its end.

    A chunk runs from an `<image>` to its `<|endofchunk|>`. What stands outside (the start
    token, words before the first image, padding) and `<image>` itself get no loss.

    Args:
        input_ids: (B, T_txt) int64.
        media_token_id, eoc_token_id: ids of `<image>` and `<|endofchunk|>`.
        attention_mask: (B, T_txt), 0 at padding; None if there is none.

    Returns:
        (B, T_txt) int64, `input_ids` where there is loss and -100 elsewhere.
    """
    is_image = input_ids == media_token_id  # (B, T_txt)
    is_end = input_ids == eoc_token_id  # (B, T_txt)
    opened = is_image.cumsum(dim=-1)  # (B, T_txt) images so far
    last_image = (torch.arange(input_ids.shape[1], device=input_ids.device) * is_image).cummax(
        dim=-1
    )[0]  # (B, T_txt) where the latest image stands
    ends_before = is_end.cumsum(dim=-1) - is_end.long()  # (B, T_txt) ends before this token
    ends_at_image = ends_before.gather(1, last_image)  # (B, T_txt)
    in_chunk = (opened > 0) & (ends_before == ends_at_image) & ~is_image
    if attention_mask is not None:
        in_chunk &= attention_mask.bool()
    return input_ids.masked_fill(~in_chunk, IGNORE)


def shifted_cross_entropy(logits, labels, reduction="mean"):
    """Cross-entropy between what token t foretells and token t + 1.

    Args:
        logits: (B, T_txt, vocab).
        labels: (B, T_txt), -100 where no loss is wanted.
        reduction: "mean" over the labelled tokens, or "none" for (B, T_txt - 1).

    Returns:
        A scalar, or with "none" the loss of each token, 0 where there is no label.

    Raises:
        ValueError: shapes do not fit, or no token has a label.
    """
    if logits.shape[:2] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}")
    if not (labels[:, 1:] != IGNORE).any():
        raise ValueError("no token has a label: is there an <image> with a text behind it?")
    shifted = logits[:, :-1].transpose(1, 2)  # (B, vocab, T_txt - 1)
    return nn.functional.cross_entropy(
        shifted, labels[:, 1:], ignore_index=IGNORE, reduction=reduction
    )
