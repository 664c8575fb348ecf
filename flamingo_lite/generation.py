# Written by tools/sync.py from book/08_generation.ipynb.
# Edit the notebook, not this file.
"""Generation: prompts, captions, words as they come, scores of given answers.

Shapes:

    vision_x         (B, T_img, F, 3, H, W)  pixels, or instead of them
    vision_features  (B, T_img, F, v, d_img)
    lang_x           (B, T_txt)              prompts, padded on the left
    ids              (B, T_txt + new)        the prompt, then what was written
"""

from threading import Event, Thread

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import TextIteratorStreamer

from flamingo_lite.data import check_text, interleave


def make_prompt(texts=(), ask=""):
    """Demonstrations, then a picture about which the model shall write.

    Args:
        texts: a text for each demonstration picture.
        ask: words after the last `<image>`, e.g. "question: how many? answer:".

    Returns:
        "<image>TEXT<|endofchunk|>" for each text, then "<image>ASK".
    """
    if ask:
        check_text(ask, "ask")
    return f"{interleave(texts)}<image>{ask}"


def _one_row(images):
    """The pictures of one prompt as a batch of one row."""
    if isinstance(images, torch.Tensor):
        return images[None]  # (1, T_img, F, v, d_img)
    return [list(images) if isinstance(images, (list, tuple)) else [images]]


def _pictures(model, image_processor, images):
    """Rows of pictures, or features, as keyword arguments for the model."""
    device = next(model.parameters()).device
    if isinstance(images, torch.Tensor):  # (B, F, v, d_img) or with T_img after B
        features = images[:, None] if images.ndim == 4 else images
        return {"vision_x": None, "vision_features": features.float().to(device)}
    pixels = [torch.stack([image_processor(p) for p in row]) for row in images]
    padded = pad_sequence(pixels, batch_first=True)  # (B, T_img, 3, H, W)
    return {"vision_x": padded[:, :, None].to(device)}  # (B, T_img, F=1, 3, H, W)


def _prompts(model, tokenizer, images, prompts, room):
    """Prompts as ids and mask, (B, T_txt) each, padded on the left."""
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    counts = (batch.input_ids == model.media_token_id).sum(dim=1).tolist()
    for i, (row, count) in enumerate(zip(images, counts, strict=True)):
        if isinstance(row, list) and len(row) != count:
            raise ValueError(
                f"row {i}: {len(row)} pictures, but {count} <image> in its prompt"
            )
    T_txt = batch.input_ids.shape[1]
    most = getattr(model.lang_encoder.config, "max_position_embeddings", None)
    if most is not None and T_txt + room > most:
        raise ValueError(
            f"a prompt of {T_txt} tokens and {room} new ones: the model reads {most}"
        )
    device = next(model.parameters()).device
    return batch.input_ids.to(device), batch.attention_mask.to(device)


@torch.no_grad()
def caption(
    model,
    image_processor,
    tokenizer,
    images,
    prompt="<image>",
    batch_size=100,
    max_new_tokens=24,
    **kwargs,
):
    """Write about pictures: one text for each prompt.

    Args:
        model, image_processor, tokenizer: from `load_flamingo`.
        images: a list with, for each prompt, a PIL picture or a list of them, one for
            each `<image>`; or features, (prompts, F, v, d_img) for prompts of one
            picture, (prompts, T_img, F, v, d_img) for others.
        prompt: a string for all, or one for each.
        batch_size: prompts at a time.
        max_new_tokens: a text that does not end is cut here.
        **kwargs: for `Flamingo.generate`: `do_sample`, `num_beams`, …

    Returns:
        list of strings, without the prompt and without special tokens.

    Raises:
        ValueError: pictures and `<image>` of a row differ in number, or it is too long.
    """
    if not isinstance(images, torch.Tensor):
        images = [_one_row(row)[0] for row in images]
    prompts = [prompt] * len(images) if isinstance(prompt, str) else list(prompt)
    if len(prompts) != len(images):
        raise ValueError(f"{len(prompts)} prompts for {len(images)} rows of pictures")
    kwargs, texts = {"do_sample": False, **kwargs}, []
    for start in range(0, len(images), batch_size):
        some = slice(start, start + batch_size)
        asked = images[some], prompts[some]
        lang_x, mask = _prompts(model, tokenizer, *asked, max_new_tokens)
        pictures = _pictures(model, image_processor, images[some])
        kwargs |= {"attention_mask": mask, "max_new_tokens": max_new_tokens}
        ids = model.generate(lang_x=lang_x, **pictures, **kwargs)
        new = ids[:, lang_x.shape[1] :]  # (B, new)
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in texts]


def stream_caption(
    model,
    image_processor,
    tokenizer,
    images,
    prompt="<image>",
    max_new_tokens=24,
    **kwargs,
):
    """Yield the text for one prompt piece by piece, as it is written.

    Args: as `caption`, for one prompt: `images` is its picture, a list of its pictures
        or their features, (T_img, F, v, d_img). Do not use the model meanwhile.

    Leaving the loop stops the writing; an error in it is raised here.
    """
    images = _one_row(images)
    lang_x, mask = _prompts(model, tokenizer, images, [prompt], max_new_tokens)
    kwargs = {"do_sample": False, "max_new_tokens": max_new_tokens, **kwargs}
    kwargs |= _pictures(model, image_processor, images) | {"attention_mask": mask}
    left, errors = Event(), []
    kwargs["stopping_criteria"] = [
        *kwargs.get("stopping_criteria", ()),
        lambda ids, scores: torch.full((len(ids),), left.is_set(), device=ids.device),
    ]
    words = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def write():
        try:
            model.generate(lang_x=lang_x, streamer=words, **kwargs)
        except BaseException as error:
            errors.append(error)
            words.end()

    writer = Thread(target=write, daemon=True)
    writer.start()
    try:
        yield from (piece for piece in words if piece)
    finally:
        left.set()
        writer.join()
    if errors:
        raise errors[0]


def _split(tokenizer, prompt, candidates, end):
    """What all texts begin with, a list of ids, and the rest of each.

    How a prompt is cut into tokens may depend on what follows it, so the whole texts
    are cut, and shared is what is the same in all of them.
    """
    rows = tokenizer([f"{prompt}{text}{end}" for text in candidates]).input_ids
    alone, n_same = tokenizer(prompt).input_ids, 0
    for tokens in zip(alone, *(row[:-1] for row in rows), strict=False):
        if len(set(tokens)) > 1:
            break
        n_same += 1
    return alone[:n_same], [row[n_same:] for row in rows]


@torch.no_grad()
def score_candidates(
    model,
    image_processor,
    tokenizer,
    images,
    prompt,
    candidates,
    end="<|endofchunk|>",
):
    """How likely each of some answers is, after one prompt with its pictures.

    Args:
        images: its picture, a list of its pictures, or features (T_img, F, v, d_img).
        prompt: a string.
        candidates: the answers.
        end: what has to follow an answer. With "" an answer can never score higher
            than its own beginning.

    Returns:
        (candidates,) sums of log-probabilities, in the order of the candidates.

    Raises:
        ValueError: no candidates, one that is empty or holds a special token, or
            pictures and `<image>` differ in number.
    """
    if not candidates:
        raise ValueError("no candidates to score")
    for number, text in enumerate(candidates, 1):
        check_text(text, f"candidate {number}")
    shared, rests = _split(tokenizer, prompt, candidates, end)
    room, images = max(map(len, rests)), _one_row(images)
    lang_x, _ = _prompts(model, tokenizer, images, [prompt], room)
    lang_x = lang_x[:, : len(shared)]  # (1, T_txt)
    rest = [lang_x.new_tensor(row) for row in rests]
    real = pad_sequence([torch.ones_like(row) for row in rest], batch_first=True)
    rest = pad_sequence(rest, batch_first=True)  # (candidates, new)
    kept = {"clear_conditioned_layers": False, "use_cache": True}
    try:
        model.cache_media(lang_x, **_pictures(model, image_processor, images))
        out = model(None, lang_x, **kept)
        out.past_key_values.batch_repeat_interleave(len(rest))
        model._repeat_rows(len(rest))
        mask = torch.cat((lang_x.new_ones(len(rest), len(shared)), real), dim=1)
        past = out.past_key_values
        logits = model(None, rest, mask, past_key_values=past, **kept).logits
    finally:
        model.uncache_media()
    first = out.logits[:, -1:].expand(len(rest), -1, -1)  # (candidates, 1, vocab)
    log_p = torch.cat((first, logits[:, :-1]), dim=1).log_softmax(dim=-1)
    return (log_p.gather(2, rest[..., None])[..., 0] * real).sum(dim=1)
