# Written by tools/book/sync.py from book/09_training.ipynb.
# Edit the notebook, not this file.
"""Reports: how a training goes, and what a model's captions are worth."""

__all__ = [
    "memory_in_use",
    "validation_losses",
    "progress_line",
    "is_report",
    "is_checkpoint",
    "caption_losses",
    "score_captions",
    "bootstrap_interval",
]

import contextlib
import re
import sys
from pathlib import Path

import numpy as np
import torch

from flamingo_lite.batches import check_examples, check_tokenizer, make_batch
from flamingo_lite.cache import check_tower
from flamingo_lite.checkpoints import random_states, set_random_states
from flamingo_lite.loss import IGNORE, loss_at_labels
from flamingo_lite.together import Together


def memory_in_use(device):
    """The most bytes in use so far: of a GPU, or of this process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, TypeError):
        status = Path("/proc/self/status").read_text()  # Linux
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    try:
        import resource  # not on Windows; on Linux it starts at the parent's memory
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024)


def _step_to_others(features):
    """By how many places to move so that each text gets another picture's features.

    One, unless pictures stand several times in a row, once for each of their captions.
    0 if there is no other picture.
    """
    n = len(features)
    if n == 1:
        return 0
    some = sorted({i * n // 16 for i in range(16)})
    here = features[some].flatten(1)  # (≤ 16, numbers)
    apart = {}
    for step in (1, 2, 3, 5, 8, 13, n // 2):
        there = features[[(i + step) % n for i in some]].flatten(1)
        apart[step] = (here != there).any(dim=1).sum().item()
        if apart[step] == len(some):
            break
    return max(apart, key=apart.get) if any(apart.values()) else 0


class _OtherPicture:
    """Features in which each picture is another one: each text gets another's."""

    def __init__(self, features):
        self.features, self.shape = features, tuple(features.shape)
        self.step = _step_to_others(features)

    def __len__(self):
        return len(self.features)

    def __getitem__(self, numbers):
        return self.features[[(n + self.step) % len(self) for n in numbers]]


def validation_losses(
    model, tokenizer, validation, precision, together=None, batch_size=64
):
    """Losses of texts beside their own pictures, and beside others'.

    Args:
        model, tokenizer: a Flamingo and its tokenizer.
        validation: (features, texts), or (features, texts, sequences).
        precision: a `Precision`.
        together: a `Together`, if other processes look, too.
        batch_size: about how many pictures at a time.

    Returns:
        dict, "true" and "shuffled", per labelled token; where all pictures are the same
        one, "true" alone. The model is in train mode.
    """
    device, losses = precision.device, {}
    before = random_states(device)
    features, texts, *sequences = validation
    longest = max(map(len, sequences[0])) if sequences and sequences[0] else 1
    n_rows = max(1, batch_size // longest)
    beside = {"true": features, "shuffled": _OtherPicture(features)}
    if not beside["shuffled"].step:  # all are the same picture: no control
        del beside["shuffled"]
    model.eval()
    for name, mine in beside.items():
        data = tokenizer, mine, texts, n_rows, *sequences
        with precision.autocast():
            some = _summed_losses(model, *data, together=together)
        total, count = (part.sum().item() for part in some)
        losses[name] = total / count
    model.train()
    set_random_states(before, device)  # pixels may be drawn by chance
    return losses


def progress_line(numbers, n_steps):
    """One line about a run, from the numbers that `log` gets."""
    looks = [f"{n} {numbers[n]:.3f}  " for n in ("true", "shuffled") if n in numbers]
    skipped = f"  {numbers['skipped']} steps left out" * bool(numbers["skipped"])
    return (
        f"step {numbers['step']:5d} of {n_steps}  loss {numbers['loss']:.3f}  "
        f"{''.join(looks)}{numbers['pictures_per_second']:.0f} pictures/s  "
        f"{numbers['seconds_left']:.0f} s left{skipped}"
    )


def is_report(done, n_steps, every):
    """Is there a report after this step? After 1 and 10 too, if that is early."""
    early = done in (1, 10) and 10 * done <= every
    return early or is_checkpoint(done, n_steps, every)


def is_checkpoint(done, n_steps, every):
    """After this step, is a checkpoint written?"""
    return done == n_steps or (every > 0 and done % every == 0)


def _losses_of(model, batch):
    """Each token's loss, (B, T_txt - 1); logits are made only where there is one."""
    return loss_at_labels(model, **batch, reduction="none", checked=True)


@torch.no_grad()
def _summed_losses(
    model, tokenizer, features, texts, batch_size, sequences=None, together=None
):
    """The loss of each sequence and its labelled tokens, (sequences,) each."""
    together = together or Together(None, model)
    sums, counts, device = [], [], together.device
    for start in range(0, len(texts), batch_size):
        rows = range(start, min(start + batch_size, len(texts)))
        batch = make_batch(rows, features, texts, tokenizer, device, sequences)
        labels = batch["labels"]  # (B, T_txt)
        sums.append(together.read(_losses_of, batch).sum(dim=1).cpu())
        counts.append((labels[:, 1:] != IGNORE).sum(dim=1))
    return torch.cat(sums), torch.cat(counts)


def caption_losses(model, tokenizer, features, texts, batch_size=100, sequences=None):
    """Mean loss per labelled token of each sequence, (sequences,).

    Args: as for `train`; of several texts for a picture the first is taken.
    """
    texts, sequences = check_examples(features, texts, sequences)
    check_tokenizer(model, tokenizer)
    check_tower(features, model.vision_encoder)
    data = features, texts, batch_size, sequences
    sums, counts = _summed_losses(model, tokenizer, *data)
    return sums / counts


def score_captions(captions, scenes, known=()):
    """Compare captions with the truth.

    Args:
        captions: list of strings.
        scenes: as many dicts with "text" and "things".
        known: names of things beside those of the scenes. Whole names count, the
            longest first: "a beach umbrella" names no umbrella, if both are known.

    Returns:
        dict of two lists of numbers, one for each scene: "exact", 0 or 1, and "things",
        the share of its things that the caption names.
    """
    exact, named = [], []
    names = {*known, *(thing for scene in scenes for thing in scene["things"])}
    longest_first = map(re.escape, sorted(names, key=len, reverse=True))
    whole_name = re.compile(rf"(?<![\w-])(?:{'|'.join(longest_first)})(?![\w-])")
    for text, scene in zip(captions, scenes, strict=True):
        exact.append(float(text == scene["text"]))
        said = whole_name.findall(text)
        found = [thing in said for thing in scene["things"]]
        named.append(sum(found) / len(found))
    return {"exact": exact, "things": named}


def bootstrap_interval(values, n_samples=2000, seed=0, groups=None):
    """Mean and 95 % bootstrap interval of some numbers: (mean, low, high).

    Args:
        values: numbers.
        n_samples, seed: how often numbers are drawn again, and from which seed.
        groups: for each number what it belongs to, the drawing in a picture, say.
            Numbers of one group are not independent, so whole groups are drawn; None,
            every number by itself.
    """
    values = np.asarray(values, dtype=float)
    groups = range(len(values)) if groups is None else list(groups)
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    which, n = [number[group] for group in groups], len(number)
    total, size = np.bincount(which, values, n), np.bincount(which, minlength=n)
    draws = np.random.default_rng(seed).integers(0, n, (n_samples, n))
    means = total[draws].sum(axis=1) / size[draws].sum(axis=1)  # (n_samples,)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)
