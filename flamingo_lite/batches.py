# Written by tools/book/sync.py from book/08d_batches.ipynb.
# Edit the notebook, not this file.
"""Which pictures and texts are in the batch of a step, and the batch itself."""

__all__ = [
    "WINDOW",
    "batch_for_step",
    "draw_text",
    "make_batch",
    "padding_by_lot",
    "count_tokens",
    "check_examples",
    "check_tokenizer",
    "Examples",
]

from functools import lru_cache

import numpy as np
import torch

from flamingo_lite.data import collate, in_order, whole_text

WINDOW = 32  # batches that are sorted by length together


@lru_cache(maxsize=2)
def _epoch(lengths, batch_size, seed, epoch, n_tokens=None):
    """The batches of one epoch: list of lists of sequence numbers."""
    rng = np.random.default_rng((seed, epoch))
    order, lengths = rng.permutation(len(lengths)), np.asarray(lengths)
    batches = []
    for T_img in np.unique(lengths):
        mine = order[lengths[order] == T_img].tolist()
        rows = max(1, batch_size // int(T_img))
        n_whole = max(1, len(mine) // rows)
        if n_tokens is not None:
            mine = _by_length(mine[: n_whole * rows], n_tokens, WINDOW * rows)
        batches += [mine[i * rows : (i + 1) * rows] for i in range(n_whole)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _by_length(numbers, n_tokens, window):
    """Sequence numbers, sorted by their number of tokens, one window at a time."""
    windows = [numbers[i : i + window] for i in range(0, len(numbers), window)]
    return sum((sorted(w, key=n_tokens.__getitem__) for w in windows), [])


def _place(lengths, batch_size, step, seed):
    """Where a step is: (epoch, number of the batch in it)."""
    return divmod(step, len(_epoch(lengths, batch_size, seed, 0)))


def batch_for_step(lengths, batch_size, step, seed, n_tokens=None):
    """Sequence numbers of batch `step`; each epoch has an order of its own.

    Args:
        lengths: tuple, the number of pictures T_img of each sequence. A batch holds
            sequences of one length. What does not fill a batch waits for the next
            epoch, with its other order.
        batch_size: about how many pictures.
        step, seed: they alone decide.
        n_tokens: tuple, the tokens of each sequence in this epoch; batches are of
            sequences about equally long. None, of any.
    """
    epoch, number = _place(lengths, batch_size, step, seed)
    return list(_epoch(lengths, batch_size, seed, epoch, n_tokens)[number])


def draw_text(text, *numbers):
    """Of a list of texts for one picture the one that `numbers` draw; else the text."""
    if not isinstance(text, list):
        return text
    return text[int(np.random.default_rng(numbers).integers(len(text)))]


def _told(row, texts, sequences=None, lot=None):
    """The text of each picture of a sequence: list. Args: as for `make_batch`."""
    several = [texts[row]] if sequences is None else texts[row]
    if lot is None:
        return [text[0] if isinstance(text, list) else text for text in several]
    return [draw_text(text, *lot, row, i) for i, text in enumerate(several, 1)]


def _moved(batch, device):
    """A batch on a device, but for the labels: the loss wants to count them first."""
    labels = {"labels": batch["labels"]}
    return {n: t.to(device, non_blocking=True) for n, t in batch.items()} | labels


def make_batch(rows, features, texts, tokenizer, device, sequences=None, lot=None):
    """Some sequences, as the model takes them: dict on `device`.

    Args:
        rows: sequence numbers, B of them.
        features, texts, sequences: as for `train`. Of pixels, the dict has `vision_x`
            in the place of `vision_features`.
        lot: (seed, epoch), which of several texts for a picture is drawn; None, the
            first.
    """
    texts, sequences = in_order(texts), in_order(sequences)
    own = [[row] if sequences is None else sequences[row] for row in rows]
    some = features[[number for numbers in own for number in numbers]]
    told = [_told(row, texts, sequences, lot) for row in rows]
    parts = some.split([len(numbers) for numbers in own])  # (T_img, F, v, d_img) each
    batch = collate(list(zip(parts, told, strict=True)), tokenizer)
    return _moved(batch, device)


_MUCH = 0.45  # a share of padding from which on batches are sorted by length


def padding_by_lot(n_tokens, rows):
    """The share of padding in batches of `rows` texts that are drawn by lot."""
    order = np.random.default_rng(0).permutation(len(n_tokens))
    counts = np.asarray(n_tokens)[order] + 3  # start, `<image>`, `<|endofchunk|>`
    batches = [counts[i : i + rows] for i in range(0, len(counts), rows)]
    return 1 - counts.sum() / sum(len(batch) * batch.max() for batch in batches)


def count_tokens(texts, tokenizer):
    """A list like `texts`, of lists, with its number of tokens for each text."""

    def strings(item):
        if isinstance(item, list):
            return [string for part in item for string in strings(part)]
        return [whole_text(item)]

    def nest(item):
        return [nest(p) for p in item] if isinstance(item, list) else next(counts)

    found = tokenizer(strings(texts), add_special_tokens=False, verbose=False).input_ids
    counts = map(len, found)
    return nest(texts)


def _check_features(features):
    """Raise ValueError for what is no tensor of pictures, and does not act as one."""
    shape = tuple(getattr(features, "shape", ()))
    want = "want a tensor (pictures, F, v, d_img), got "
    if len(shape) not in (4, 5):
        raise ValueError(f"features: {want}{shape or type(features).__name__}")
    first = features[[0]] if len(features) else features
    if not isinstance(first, torch.Tensor):
        kinds = f"{shape}, of which [[0]] is {type(first).__name__}"
        raise ValueError(f"features: {want}{kinds}")
    if not first.is_floating_point():
        floats = "give floats, as the image processor does"
        raise ValueError(f"features: pictures are {first.dtype}: {floats}")
    if tuple(first.shape[1:]) != shape[1:] or shape[0] != len(features):
        parts = f"[[0]] is {tuple(first.shape)}, and there are {len(features)}"
        raise ValueError(f"features say that they are {shape}, but {parts}")


def _plain(text):
    """A text, a pair or a list of them, with strings of numpy's made plain ones."""
    if type(text) in (list, tuple):
        return type(text)(_plain(part) for part in text)
    return str(text) if isinstance(text, str) else text


def _numbers(sequence, n, where):
    """Picture numbers as a list of ints; ValueError, naming `where`, for others."""
    try:
        given = list(sequence)
        numbers = [int(number) for number in given]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: want picture numbers, got {sequence!r}") from error
    for number, wanted in zip(numbers, given, strict=True):
        if number != wanted or not 0 <= number < n:
            raise ValueError(f"{where}: there is no picture {wanted} among {n}")
    return numbers


def check_examples(features, texts, sequences=None):
    """Check how pictures, texts and sequences fit: (texts, sequences), plain lists.

    Args: as for `train`.

    Raises:
        ValueError: they do not; which one is said.
    """
    _check_features(features)
    if isinstance(texts, str):
        raise ValueError(f"want a list of texts, got one text, {texts[:40]!r}")
    texts = [_plain(text) for text in in_order(texts)]
    n, what = len(features), "pictures"
    if sequences is not None:
        sequences = [_numbers(s, n, f"sequence {i}") for i, s in enumerate(sequences)]
        n, what = len(sequences), "sequences"
    if n != len(texts):
        raise ValueError(f"{n} {what}, but {len(texts)} texts")
    if not n or (sequences is not None and not all(sequences)):
        raise ValueError(f"there are no {what}, or one of them has no picture")
    for i, pictures in enumerate(sequences or []):
        if isinstance(texts[i], (str, list, tuple)) and len(pictures) != len(texts[i]):
            counts = f"{len(pictures)} pictures, but {len(texts[i])} texts"
            raise ValueError(f"sequence {i}: {counts}")
    return texts, sequences


def check_tokenizer(model, tokenizer):
    """Raise ValueError if the model looks for other tokens than the tokenizer writes.

    It would find no `<image>`, and read each text without its picture.
    """
    ids = tokenizer.convert_tokens_to_ids(["<|endofchunk|>", "<image>"])
    own = [model.eoc_token_id, model.media_token_id]
    if list(ids) != own:
        raise ValueError(
            f"the tokenizer is not this model's: <|endofchunk|> and <image> are {ids}, "
            f"the model looks for {own}: give both as they were built together"
        )


class Examples:
    """What a run trains on, and in which order. Args: as for `train`."""

    def __init__(
        self, tokenizer, features, texts, sequences, batch_size, accumulate, seed
    ):
        self.tokenizer, self.features = tokenizer, features
        self.texts, self.sequences = texts, sequences
        self.accumulate, self.seed = accumulate, seed
        self.lengths = tuple(map(len, sequences or [[0]] * len(texts)))
        self.per_step = batch_size * accumulate  # pictures
        nest = texts if sequences is None else [list(several) for several in texts]
        self._counts = count_tokens(nest, tokenizer)
        self._epoch_of_tokens = None

    def rows(self, step):
        """Sequence numbers of a step."""
        epoch, _ = _place(self.lengths, self.per_step, step, self.seed)
        if epoch != self._epoch_of_tokens:
            lot = self.seed, epoch
            told = (
                _told(row, self._counts, self.sequences, lot)
                for row in range(len(self.texts))
            )
            n_tokens = tuple(map(sum, told))
            is_worth_it = padding_by_lot(n_tokens, self.per_step) > _MUCH
            self._n_tokens = n_tokens if is_worth_it else None
            self._epoch_of_tokens = epoch
        order = self.lengths, self.per_step, step, self.seed
        return batch_for_step(*order, self._n_tokens)

    def n_pictures(self, step):
        """How many pictures a step reads, in all processes."""
        return sum(self.lengths[row] for row in self.rows(step))

    def batches(self, step, device, process=0, n_processes=1):
        """The micro-batches of a step, or one process's share: list of dicts."""
        rows = self.rows(step)
        if len(rows) < n_processes:
            raise ValueError(
                f"a step has {len(rows)} rows for {n_processes} processes: take a "
                "larger batch_size, or fewer of them"
            )
        lot = self.seed, _place(self.lengths, self.per_step, step, self.seed)[0]
        n_parts = n_processes * min(self.accumulate, len(rows) // n_processes)
        parts = np.array_split(rows, n_parts)[process::n_processes]
        data = self.features, self.texts, self.tokenizer, "cpu", self.sequences
        batches = [make_batch(part.tolist(), *data, lot) for part in parts]
        return [_moved(batch, device) for batch in batches]

    def suspects(self, step):
        """What may have made the loss of a step infinite or no number: a sentence."""
        rows, sequences = self.rows(step), self.sequences
        own = {row: [row] if sequences is None else sequences[row] for row in rows}
        numbers = list(dict.fromkeys(n for row in rows for n in own[row]))
        says = "Its features are finite, a lower lr may help"
        spoilt = [n for n in numbers if not self.features[[n]].isfinite().all()]
        bad = [row for row in rows if set(spoilt) & set(own[row])]
        if bad:
            says, numbers = "Features are not finite", spoilt
        some = ", ".join(repr(self.texts[row])[:60] for row in (bad or rows)[:3])
        more = ", …" * (len(bad or rows) > 3)
        files = getattr(self.features, "files", [None] * len(self.features))
        named = [files[n] for n in numbers[:3] if files[n]]
        more += f"; {', '.join(named)}" * bool(named)
        return f"{says}: pictures {numbers} of the batch, with the texts {some}{more}"
