# Written by tools/book/sync.py from book/06_loss.ipynb.
# Edit the notebook, not this file.
"""The shifted loss: every token is asked to predict the next one.

Shapes, spelled the same way in every chapter:

    hidden             (B, T_txt, d_txt)  what the language model's head is given
    logits             (B, T_txt, vocab)  a score for each possible next token
    input_ids, labels  (B, T_txt) int64   labels are -100 where no loss is wanted
"""

__all__ = [
    "IGNORE",
    "make_labels",
    "shifted_cross_entropy",
    "loss_in_pieces",
    "changes_logits",
    "loss_at_labels",
]

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # the label that cross_entropy passes over


def make_labels(input_ids, media_token_id, eoc_token_id, attention_mask=None):
    """Say at which tokens the loss is taken: the text of each chunk, and its end.

    An `<image>` opens a chunk, the next `<|endofchunk|>` shuts it. What stands outside
    (start token, words between chunks, padding) and `<image>` itself get no loss.

    Args:
        input_ids: (B, T_txt) int64.
        media_token_id, eoc_token_id: ids of `<image>` and `<|endofchunk|>`.
        attention_mask: (B, T_txt), 0 at padding; None if there is none.

    Returns:
        (B, T_txt) int64, `input_ids` where there is loss and -100 elsewhere.

    Raises:
        ValueError: both ids are the same, or the mask has another shape.
    """
    if media_token_id == eoc_token_id:
        raise ValueError(f"<image> and <|endofchunk|> have one id, {eoc_token_id}")
    is_text = torch.ones_like(input_ids, dtype=torch.bool)  # (B, T_txt)
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            shapes = f"{tuple(input_ids.shape)}, mask {tuple(attention_mask.shape)}"
            raise ValueError(f"input_ids {shapes}: want one shape, (B, T_txt)")
        is_text = attention_mask.bool()  # (B, T_txt)
    is_image = (input_ids == media_token_id) & is_text  # (B, T_txt)
    is_end = (input_ids == eoc_token_id) & is_text  # (B, T_txt)

    place = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)  # (T_txt,)
    latest_image = (place * is_image).cummax(dim=-1).values  # (B, T_txt), 0 = none yet
    latest_end = (place * is_end).cummax(dim=-1).values  # (B, T_txt)
    is_open = latest_image > latest_end  # (B, T_txt) a chunk is open after this token
    was_open = nn.functional.pad(is_open, (1, 0))[:, :-1]  # (B, T_txt) … before it
    return input_ids.masked_fill(~(was_open & is_text & ~is_image), IGNORE)


def shifted_cross_entropy(logits, labels, reduction="mean"):
    """Cross-entropy between what is predicted at token t and token t + 1.

    Args:
        logits: (B, T_txt, vocab).
        labels: (B, T_txt), -100 where no loss is wanted. On the CPU their places are
            found without waiting for the device that `logits` are on.
        reduction: "mean" over the labelled tokens, or "none" for (B, T_txt - 1).

    Returns:
        A float32 scalar, or with "none" each token's loss, 0 where it has no label.

    Raises:
        ValueError: shapes do not fit, no token has a label, or an unknown reduction.
    """
    if logits.shape[:2] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}")
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction is "mean" or "none", not {reduction!r}')
    answers = labels[:, 1:]  # (B, T_txt - 1)
    asked = answers != IGNORE  # (B, T_txt - 1)
    if not asked.any():
        raise ValueError("no token has a label: is there text after an <image>?")
    device = logits.device
    places = [t.to(device) for t in asked.nonzero(as_tuple=True)]  # (asked,) each
    scores = logits[*places].float()  # (asked, vocab), never in half precision
    answers = answers[asked].to(device)  # (asked,)
    losses = nn.functional.cross_entropy(scores, answers, reduction="none")
    if reduction == "mean":
        return losses.mean()
    return torch.zeros(asked.shape, device=device).index_put(places, losses)


def _summed(hidden, answers, head, reduction="sum"):
    """The summed loss of some tokens, (tokens, d_txt), and what they should predict."""
    scores = head(hidden).float()  # (tokens, vocab)
    return nn.functional.cross_entropy(
        scores, answers, ignore_index=IGNORE, reduction=reduction
    )


def loss_in_pieces(hidden, answers, head, piece=256, reduction="mean"):
    """Mean cross-entropy where there is an answer; `piece` rows of logits at a time.

    Args:
        hidden: (B, T_txt, d_txt), what goes into the head.
        answers: (B, T_txt), what each token should predict; -100 where no loss is.
        head: from (tokens, d_txt) to logits, (tokens, vocab).
        piece: how many tokens at a time.
        reduction: "mean", or "none" for each token's loss, with `answers` on the CPU.

    Returns:
        A float32 scalar; with "none" (B, T_txt), 0 where there is no answer. If
        `answers` are on a GPU and none is there, the scalar is nan.

    Raises:
        ValueError: `answers` are on the CPU, and no token has one.
    """
    asked = answers != IGNORE  # (B, T_txt)
    if answers.device.type == "cpu":  # elsewhere one would wait for their number
        if not asked.any():
            raise ValueError("no token has a label: is there text after an <image>?")
        places = [t.to(hidden.device) for t in asked.nonzero(as_tuple=True)]
        hidden, answers = hidden[*places], answers[asked].to(hidden.device)
        n_asked = len(answers)
        if reduction == "none":
            parts = zip(hidden.split(piece), answers.split(piece), strict=True)
            losses = torch.cat([_summed(*part, head, "none") for part in parts])
            return torch.zeros(asked.shape, device=losses.device).index_put(
                places, losses
            )
    else:
        n_asked = asked.sum()
        hidden, answers = hidden.flatten(0, 1), answers.flatten()
    parts = list(zip(hidden.split(piece), answers.split(piece), strict=True))
    if len(parts) == 1:  # small enough to be kept
        return _summed(*parts[0], head) / n_asked
    settings = {"use_reentrant": False, "preserve_rng_state": False}
    sums = [checkpoint(_summed, *part, head, **settings) for part in parts]
    return torch.stack(sums).sum() / n_asked


def changes_logits(config):
    """The name of a setting by which a language model changes logits after its head."""
    for name, value in vars(config).items():
        of_logits = name.startswith(("logit", "lm_head_", "final_logit"))
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if of_logits and is_number and value != 1:
            return name
    return None


def loss_at_labels(
    model, lang_x, labels, vision_x=None, piece=256, reduction="mean", **inputs
):
    """The loss that `model(vision_x, lang_x, labels=labels, …)` has, with less memory.

    Args:
        model: a `Flamingo`, or one that a wrapper holds as its `module`.
        lang_x, labels, vision_x, **inputs: as for its forward.
        piece, reduction: see `loss_in_pieces`.

    Returns:
        A scalar, to the rounding; with "none" each token's loss, (B, T_txt - 1), as
        `shifted_cross_entropy` has it. The logits of the whole text are never made.

    Raises:
        ValueError: see `loss_in_pieces` and `Flamingo.forward`.
    """
    lm = getattr(model, "module", model).lang_encoder
    if changes_logits(lm.config):
        if reduction == "mean":
            return model(vision_x, lang_x, labels=labels, **inputs).loss
        return shifted_cross_entropy(
            model(vision_x, lang_x, **inputs).logits, labels, reduction
        )
    answers = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)  # (B, T_txt)
    head, losses = lm.get_output_embeddings(), []

    def stop(_, args):
        hooks.remove()  # from here on the head works as usual
        losses.append(loss_in_pieces(args[0], answers, head, piece, reduction))
        return (args[0][:, :0],)  # (B, 0, d_txt)

    with getattr(model, "module", model).alone():  # another thread has no such head
        hooks = head.register_forward_pre_hook(stop)
        try:
            model(vision_x, lang_x, **inputs)
        finally:
            hooks.remove()
    return losses[0] if reduction == "mean" else losses[0][:, :-1]
