# Written by tools/book/sync.py from book/08_generation.ipynb.
# Edit the notebook, not this file.
"""Generation: prompts, captions, words as they come, scores of given answers.

Shapes:

    vision_features  (B, T_img, F, v, d_img)  of the pictures, zeros where there is none
    lang_x           (B, T_txt)               prompts, padded on the left
    ids              (B, T_txt + new)         the prompt, then what was written
"""

__all__ = [
    "make_prompt",
    "SAMPLING",
    "BEAMS",
    "OPTIONS",
    "NOT_FOR_TEXTS",
    "caption",
    "stream_caption",
    "score_candidates",
]

import contextlib
from collections.abc import Iterable, Mapping
from functools import partial
from os import PathLike
from threading import Event, Thread

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, StoppingCriteria, TextIteratorStreamer

from flamingo_lite.cache import check_tower
from flamingo_lite.data import check_text, interleave, read_picture, trim, whole_text
from flamingo_lite.model import asked_for, pixels_to_patches
from flamingo_lite.vision import rgb_on_white


def make_prompt(texts=(), ask=""):
    """Demonstrations, then a picture about which the model shall write.

    Args:
        texts: a text for each demonstration picture.
        ask: words after the last `<image>`, e.g. "question: how many? answer:".

    Returns:
        "<image>TEXT<|endofchunk|>" for each text, then "<image>ASK". Blanks and marks
        of no width around a text or around `ask` are left out.

    Raises:
        ValueError: a text that is none, is empty, or holds a special token.
    """
    if ask:
        check_text(ask, "ask")
    if not isinstance(texts, str):  # which interleave refuses
        texts = [trim(whole_text(text)) for text in texts]
    return f"{interleave(texts)}<image>{trim(ask or '')}"


def _picture(given, d_img, where):
    """A PIL picture or a file as RGB on white; or features, (F, v, d_img)."""
    try:
        if isinstance(given, (str, PathLike)):
            return read_picture(given)
        if not isinstance(given, (torch.Tensor, np.ndarray)):
            return rgb_on_white(given)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{where}: {error}") from error
    features = torch.as_tensor(given)
    is_features = features.ndim == 3 and features.is_floating_point()
    if not is_features or features.shape[-1] != d_img:
        raise ValueError(
            f"{where}: a tensor is taken for features, (F, v, {d_img}) for each "
            f"picture, but this is {tuple(features.shape)} of {features.dtype}; give "
            "pixels as a PIL picture, which Image.fromarray makes of an array"
        )
    return features


def _is_one(given):
    """True for what is not a list of several pictures or rows."""
    single = (str, bytes, PathLike, Mapping)
    return isinstance(given, single) or not isinstance(given, Iterable)


def _row(given, d_img, where="the prompt"):
    """The pictures of one prompt, as a list of what `_picture` returns."""
    is_array = isinstance(given, (torch.Tensor, np.ndarray))
    one = given.ndim != 4 if is_array else _is_one(given)
    return [_picture(p, d_img, where) for p in ([given] if one else given)]


def _rows(images):
    """What `caption` was given, as a list with an item for each prompt."""
    is_array = isinstance(images, (torch.Tensor, np.ndarray))
    one = images.ndim not in (4, 5) if is_array else _is_one(images)
    return [images] if one else list(images)


def _pictures(model, image_processor, rows, first=0):
    """Rows of pictures as arguments for the model, zeros where one has fewer.

    Raises:
        ValueError: pictures and features together, features of several shapes, or some
            that are not finite; `first` is the number of the first row.
    """
    device = next(model.parameters()).device
    flat = [picture for row in rows for picture in row]
    if not flat:  # text alone: nothing may look at this
        nothing = torch.zeros(len(rows), 1, 1, 1, model.vis_dim, device=device)
        return {"vision_x": None, "vision_features": nothing}
    if len({isinstance(picture, torch.Tensor) for picture in flat}) > 1:
        raise ValueError("pictures and features together: give one or the other")
    if isinstance(flat[0], torch.Tensor):
        if len(shapes := {tuple(features.shape) for features in flat}) > 1:
            raise ValueError(f"features of several shapes: {sorted(shapes)}")
        features = torch.stack([one.to(device) for one in flat])
    elif image_processor is None:
        raise ValueError("pictures need an image_processor; only features need none")
    else:
        pixels = torch.stack([image_processor(picture) for picture in flat]).to(device)
        features = pixels_to_patches(model.vision_encoder, pixels[:, None, None])[:, 0]
    parts = features.split([len(row) for row in rows])  # each (T_img, F, v, d_img)
    if not features.isfinite().all():  # a caption of them would be empty
        row = next(n for n, part in enumerate(parts) if not part.isfinite().all())
        raise ValueError(f"row {first + row}: a picture's features are not finite")
    return {"vision_x": None, "vision_features": pad_sequence(parts, batch_first=True)}


def _prompts(model, tokenizer, rows, prompts, new=None, longest=None, first=0):
    """Prompts as ids and mask, (B, T_txt) each, padded on the left.

    A blank at an end would be a token of its own, which is otherwise part of the next
    word, so it is left out. Surplus features that are zeros are dropped from `rows`.
    """
    for i, prompt in enumerate(prompts, first):
        if not isinstance(prompt, str):
            raise TypeError(f"row {i}: a prompt is a string, got {prompt!r:.60}")
    prompts = trim(prompts)
    sides = {"padding": True, "padding_side": "left"}
    with model.alone():  # a tokenizer, too, remembers: its settings for padding
        batch = tokenizer(prompts, return_tensors="pt", **sides)
    counts = (batch.input_ids == model.media_token_id).sum(dim=1).tolist()
    for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
        surplus = row[count:]
        if all(isinstance(p, torch.Tensor) and not p.any() for p in surplus):
            del row[count:]
        if len(row) != count:
            where, counts = f"row {first + i}", f"{len(row)} pictures, but {count}"
            raise ValueError(f"{where}: {counts} <image> in its prompt")
    lengths = batch.attention_mask.sum(dim=1)  # (B,)
    if not lengths.all():
        raise ValueError(f"row {first + int(lengths.argmin())}: the prompt is empty")
    T_txt = batch.input_ids.shape[1]
    most = getattr(model.lang_encoder.config, "max_position_embeddings", None)
    end = T_txt + new if new is not None else max(T_txt, longest)
    if most is not None and end > most:
        raise ValueError(
            f"row {first + int(lengths.argmax())}: a prompt of {T_txt} tokens and "
            f"{end - T_txt} new ones: the model reads {most}"
        )
    device = next(model.parameters()).device
    return batch.input_ids.to(device), batch.attention_mask.to(device)


SAMPLING = tuple(
    "temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff".split()
)
BEAMS = ("early_stopping", "length_penalty")
OPTIONS = (*SAMPLING, *BEAMS) + tuple(
    """
    generation_config do_sample num_beams num_return_sequences max_length min_length
    min_new_tokens max_time stop_strings repetition_penalty encoder_repetition_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids sequence_bias
    renormalize_logits forced_eos_token_id remove_invalid_values suppress_tokens
    begin_suppress_tokens exponential_decay_length_penalty watermarking_config
    pad_token_id eos_token_id logits_processor stopping_criteria streamer synced_gpus
    prefix_allowed_tokens_fn use_cache cache_implementation cache_config max_cache_len
    prefill_chunk_size keep_keys_values compile_config disable_compile assistant_model
    num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
    prompt_lookup_num_tokens max_matching_ngram_size
    """.split()
)
NOT_FOR_TEXTS = tuple(
    """
    return_dict_in_generate output_attentions output_hidden_states output_scores
    output_logits penalty_alpha dola_layers num_beam_groups diversity_penalty low_memory
    constraints force_words_ids use_mtp is_assistant speculation_type
    """.split()
)


def _options(model, tokenizer, given, max_new_tokens):
    """Options for `Flamingo.generate`. ValueError names one that cannot be had."""
    lm, config = model.lang_encoder, given.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise TypeError(f"want a GenerationConfig, got {config!r:.60}")
    if strange := [name for name in given if name not in OPTIONS]:
        raise ValueError(
            f"{strange[0]} is no option here (OPTIONS lists them); Flamingo.generate "
            "takes what transformers' generate takes, and returns ids"
        )
    for name in NOT_FOR_TEXTS:  # a configuration may hold them
        said = asked_for(lm, given, name)
        if said is True or said not in (None, 0, 1):
            raise ValueError(f"{name} in the configuration: it cannot be had here")
    samples = asked_for(lm, given, "do_sample") or False
    has_beams = (asked_for(lm, given, "num_beams") or 1) > 1
    for names, works, need in (
        (SAMPLING, samples, "do_sample=True"),
        (BEAMS, has_beams, "num_beams=2 or more"),
    ):
        idle = [name for name in names if given.get(name) is not None]
        if idle and not works:
            raise ValueError(f"{idle[0]} does nothing without {need}")
    new, longest = max_new_tokens, given.get("max_length")
    if new is not None and longest is not None:
        raise ValueError("max_new_tokens and max_length: give one of them")
    if new is longest is None:
        new = getattr(config, "max_new_tokens", None)
        longest = getattr(config, "max_length", None)
    if longest is None or new is not None:
        new, longest = 24 if new is None else new, None
    lengths = {"max_new_tokens": new, "max_length": longest}
    return {**given, **lengths, "do_sample": samples, "tokenizer": tokenizer}


def _check_lengths(model, options, mask):
    """Raise ValueError for a length that counts the padding of prompts, (B, T_txt)."""
    lm, asked = model.lang_encoder, ["max_length"] * bool(options["max_length"])
    if asked_for(lm, options, "min_new_tokens") is None:  # else min_length is idle
        asked += ["min_length"] * bool(asked_for(lm, options, "min_length"))
    if asked and not mask.all():
        counts = mask.sum(dim=1).tolist()
        raise ValueError(
            f"{asked[0]} counts the prompt as well, but prompts of {min(counts)} to "
            f"{max(counts)} tokens stand in one batch: give max_new_tokens or "
            "min_new_tokens, which count what is written"
        )


def _copies(model, options):
    """How many rows of a prompt `prefix_allowed_tokens_fn` is asked about."""
    lm = model.lang_encoder
    has_beams = (asked_for(lm, options, "num_beams") or 1) > 1  # they are one row
    return 1 if has_beams else asked_for(lm, options, "num_return_sequences") or 1


def _later(may_follow, before, row, ids):
    """What `may_follow` says of a row, `before` rows further down."""
    return may_follow(before + row, ids)


class _RowsEnd(StoppingCriteria):
    """Stops nothing. That it knows of `eos_token_id`, though None, makes transformers
    put padding behind a row that something else has stopped."""

    eos_token_id = None

    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def caption(
    model,
    image_processor,
    tokenizer,
    images,
    prompt="<image>",
    batch_size=100,
    max_new_tokens=None,
    **kwargs,
):
    """Write about pictures: one text for each prompt.

    Args:
        model, image_processor, tokenizer: from `load_flamingo`.
        images: a list with, for each prompt, a picture or a list of pictures, one for
            each `<image>`. A picture is a PIL picture of any mode, or a file. Or
            features: (prompts, F, v, d_img) for prompts of one picture,
            (prompts, T_img, F, v, d_img) for others, with zeros where a prompt has
            fewer. One picture alone is a list of one.
        prompt: a string for all, or one for each. Blanks at its ends are left out.
        batch_size: prompts at a time.
        max_new_tokens: a text that does not end is cut here. None: where
            `generation_config` says, or after 24.
        **kwargs: those of transformers' `generate` that OPTIONS lists: `num_beams`,
            `stop_strings`, a `generation_config`, … Where neither they nor the language
            model's own configuration say `do_sample`, the likeliest token is taken.

    Returns:
        list of strings, without the prompt and without special tokens.

    Raises:
        TypeError: something that is no picture, or no prompt.
        ValueError: pictures and `<image>` of a row differ in number, a prompt is too
            long or empty, a picture cannot be read, or an option would not work, such
            as `max_length` for prompts of several lengths in one batch.

    Threads that share a model wait for each other.
    """
    if batch_size != int(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size: want a whole number from 1, got {batch_size}")
    check_tower(images, model.vision_encoder)
    rows = _rows(images)
    prompts = [prompt] * len(rows) if isinstance(prompt, str) else list(prompt)
    if len(prompts) != len(rows):
        raise ValueError(f"{len(prompts)} prompts for {len(rows)} rows of pictures")
    options, texts = _options(model, tokenizer, kwargs, max_new_tokens), []
    lengths = options["max_new_tokens"], options["max_length"]
    may_follow = kwargs.get("prefix_allowed_tokens_fn")
    stops = [*(kwargs.get("stopping_criteria") or ()), _RowsEnd()]
    options["stopping_criteria"] = stops
    for first in range(0, len(rows), batch_size):
        some = [
            _row(row, model.vis_dim, f"row {number}")
            for number, row in enumerate(rows[first : first + batch_size], first)
        ]
        own = prompts[first : first + batch_size]
        lang_x, mask = _prompts(model, tokenizer, some, own, *lengths, first)
        _check_lengths(model, options, mask)
        pictures = _pictures(model, image_processor, some, first)
        if may_follow is not None:  # it counts the rows of all batches
            before = first * _copies(model, kwargs)
            options["prefix_allowed_tokens_fn"] = partial(_later, may_follow, before)
        ids = model.generate(lang_x=lang_x, attention_mask=mask, **pictures, **options)
        new = ids[:, lang_x.shape[1] :]  # (B, new)
        new = new.masked_fill(new < 0, tokenizer.pad_token_id)  # beams without an end
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in texts]


def stream_caption(
    model,
    image_processor,
    tokenizer,
    images,
    prompt="<image>",
    max_new_tokens=None,
    **kwargs,
):
    """Yield the text for one prompt piece by piece, as it is written.

    Args: as `caption`, for one prompt: `images` is its picture, a list of its pictures
        or their features, (T_img, F, v, d_img). No beams, and one text.

    Leaving the loop stops the writing; an error in it is raised here. Another call of
    the model, in the loop or in another thread, waits until the text is written. So it
    is a RuntimeError inside `with model.alone():`. A loop under autocast is written
    under autocast, too.
    """
    if model.alone()._is_owned():  # by this thread, and another one is to write
        raise RuntimeError(
            "stream_caption inside `with model.alone():` would wait for itself: call "
            "it outside, or call caption"
        )
    options = _options(model, tokenizer, kwargs, max_new_tokens)
    for name in ("num_beams", "num_return_sequences"):
        if (asked_for(model.lang_encoder, kwargs, name) or 1) > 1:
            raise ValueError(f"{name}: a stream is one text; caption gives several")
    if kwargs.get("streamer") is not None:
        raise ValueError("streamer: stream_caption has its own; caption takes yours")
    rows = [_row(images, model.vis_dim)]
    lengths = options["max_new_tokens"], options["max_length"]
    lang_x, mask = _prompts(model, tokenizer, rows, [prompt], *lengths)
    options |= _pictures(model, image_processor, rows) | {"attention_mask": mask}
    left, errors = Event(), []
    options["stopping_criteria"] = [
        *(kwargs.get("stopping_criteria") or ()),
        lambda ids, scores: torch.full((len(ids),), left.is_set(), device=ids.device),
    ]
    words = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    options["streamer"] = words
    kind = lang_x.device.type
    autocast = contextlib.nullcontext()  # each thread has its own
    if torch.is_autocast_enabled(kind):
        autocast = torch.autocast(kind, torch.get_autocast_dtype(kind))

    def write():
        try:
            with autocast:
                model.generate(lang_x=lang_x, **options)
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
    bare = trim(prompt)
    follows = bare and not bare.endswith("<image>")  # else a blank is no part of it
    blank = prompt[-1:].isspace() or bare.endswith((":", "?", ".", "!", ",", ";"))
    rows = []
    for text in candidates:
        gap = " " if follows and (blank or text[:1].isspace()) else ""
        rows.append(f"{bare}{gap}{trim(text)}{end}")
    rows, alone, n_same = tokenizer(rows).input_ids, tokenizer(bare).input_ids, 0
    for tokens in zip(alone, *(row[:-1] for row in rows), strict=False):
        if len(set(tokens)) > 1:
            break
        n_same += 1
    if not n_same:
        raise ValueError(f"prompt {prompt!r}: no token of it comes before the answers")
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
        prompt: a string. Blanks at its end are left out after `<image>`, and are one
            blank after a word. After one of `: ? . ! , ;` there always is one.
        candidates: the answers. Blanks at their ends are left out, but for one after a
            word of the prompt: "this is" and " a fox".
        end: what has to follow an answer. With "" an answer can never score higher
            than its own beginning.

    Returns:
        (candidates,) float32 sums of log-probabilities, in the candidates' order, on
        the CPU.

    Raises:
        TypeError: something that is no picture, or no prompt.
        ValueError: no candidates, one that is empty or holds a special token, pictures
            and `<image>` differ in number, or pictures are cached by `cache_media`.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"a prompt is a string, got {prompt!r:.60}")
    if isinstance(candidates, str):
        raise TypeError(f"want a list of candidates, got the string {candidates!r:.60}")
    if not (candidates := list(candidates)):
        raise ValueError("no candidates to score")
    for number, text in enumerate(candidates, 1):
        check_text(text, f"candidate {number}")
    rows = [_row(images, model.vis_dim)]
    with model.alone():
        if model.lang_encoder._use_cached_vision_x:
            raise ValueError("pictures are cached: call uncache_media first")
        shared, rests = _split(tokenizer, prompt, candidates, end)
        lang_x, _ = _prompts(model, tokenizer, rows, [prompt], max(map(len, rests)))
        lang_x = lang_x.new_tensor([shared])  # (1, T_txt)
        rest = [lang_x.new_tensor(row) for row in rests]
        real = pad_sequence([torch.ones_like(row) for row in rest], batch_first=True)
        rest = pad_sequence(rest, batch_first=True)  # (candidates, new)
        pictures = _pictures(model, image_processor, rows)
        kept = {"clear_conditioned_layers": False, "use_cache": True}
        try:
            model.cache_media(lang_x, **pictures)
            out = model(None, lang_x, **kept)
            out.past_key_values.batch_repeat_interleave(len(rest))
            model._repeat_rows(len(rest))
            mask = torch.cat((lang_x.new_ones(len(rest), len(shared)), real), dim=1)
            past = out.past_key_values
            logits = model(None, rest, mask, past_key_values=past, **kept).logits
        finally:
            model.uncache_media()
    first = out.logits[:, -1:].expand(len(rest), -1, -1)  # (candidates, 1, vocab)
    logits = torch.cat((first, logits[:, :-1]), dim=1).float()  # halves would round
    log_p = logits.log_softmax(dim=-1)  # (candidates, new, vocab)
    return (log_p.gather(2, rest[..., None])[..., 0] * real).sum(dim=1).cpu()
