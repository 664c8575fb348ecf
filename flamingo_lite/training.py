# Written by tools/book/sync.py from book/09_training.ipynb.
# Edit the notebook, not this file.
"""Training: from cached features, resumable, with a report against controls."""

__all__ = [
    "train",
]
# ruff: noqa: F401 (names that moved to modules of their own are still found here)

import contextlib
import functools
import math
import os
import signal
import threading
import time
import warnings
from pathlib import Path

import torch

from flamingo_lite.batches import (
    Examples,
    check_examples,
    check_tokenizer,
    make_batch,
)
from flamingo_lite.cache import check_tower
from flamingo_lite.checkpoints import (
    learning_parameters,
    load_checkpoint,
    random_states,
    run_settings,
    save_checkpoint,
    set_random_states,
    trained_rows,
)
from flamingo_lite.data import check_texts, held_picture
from flamingo_lite.muon import Muon, orthogonalise
from flamingo_lite.precision import Precision
from flamingo_lite.reports import (
    bootstrap_interval,
    caption_losses,
    is_checkpoint,
    is_report,
    memory_in_use,
    progress_line,
    score_captions,
    validation_losses,
)
from flamingo_lite.steps import (
    NotFinite,
    fault_of,
    is_read_at_once,
    keep_old_rows,
    make_optimizers,
    muon_pays,
    parameter_groups,
    read_batch,
    schedule,
    spoilt,
    training_step,
)
from flamingo_lite.together import Together, join, whole


def _check_numbers(lr, gate_factor, **counts):
    """Raise ValueError for a number that `train` cannot use."""
    for name, (value, least) in counts.items():
        if value != int(value) or value < least:
            raise ValueError(f"{name}: want a whole number from {least}, got {value}")
    for name, value in (("lr", lr), ("gate_factor", gate_factor)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: want a finite number from 0, got {value}")


def _check_model(model, features):
    """Raise an error where training would go wrong, often without a word."""
    if len(features.shape) == 4 and features.shape[-1] != model.vis_dim:
        widths = f"width {features.shape[-1]}, the model reads {model.vis_dim}"
        raise ValueError(f"features are of another vision encoder: {widths}")
    check_tower(features, model.vision_encoder)
    tower = model.vision_encoder.parameters()
    if len(features.shape) == 4 and any(p.requires_grad for p in tower):
        raise ValueError(
            "the vision encoder is unfrozen, but features were made before and it would"
            " not learn: give train pixels, PixelSource(pictures, image_processor), or"
            " freeze it, model.vision_encoder.requires_grad_(False)"
        )
    for kind in {p.device.type for p in model.parameters()}:
        if torch.is_autocast_enabled(kind):
            raise RuntimeError(
                "train was called inside torch.autocast, which keeps copies of the"
                " weights as they were at the first step: call it outside, with"
                " precision="
            )
    if not torch.is_grad_enabled():
        where = "torch.inference_mode or torch.no_grad"
        raise RuntimeError(f"train was called inside {where}: call it outside")
    learning = learning_parameters(model)
    if not learning:
        raise ValueError("every parameter is frozen: there is nothing to train")
    for name, p in learning.items():
        if p.is_inference():
            raise ValueError(f"{name} was made inside torch.inference_mode")
        if p.dtype not in (torch.float32, torch.float64):
            small = "which small steps do not move: call model.float() first"
            raise ValueError(f"{name} is {p.dtype}, {small}")
    if name := spoilt(model.named_parameters()):
        raise ValueError(f"{name} holds something other than finite numbers")


def _check_validation(validation, features, tokenizer):
    """(features, texts, sequences) of a validation, checked as those of a training."""
    if not isinstance(validation, (tuple, list)) or len(validation) not in (2, 3):
        raise ValueError("validation: want (features, texts) or with sequences")
    mine, *others = validation
    try:
        texts, sequences = check_examples(mine, *others)
        check_texts(texts, tokenizer, sequences is not None)
        if tuple(mine.shape[1:]) != tuple(features.shape[1:]):
            shapes = f"{tuple(mine.shape)}, those of training {tuple(features.shape)}"
            raise ValueError(f"features are {shapes}")
    except ValueError as error:
        raise ValueError(f"validation: {error}") from error
    return mine, texts, sequences


def _pictures_of(features, texts, sequences=None):
    """What the pictures that are read are called: hashes or paths, if they have any."""
    pictures = getattr(features, "pictures", ())  # of a PixelSource
    pictures = pictures if isinstance(pictures, (list, tuple)) else ()
    named = [held_picture(one, f"pictures[{n}]") for n, one in enumerate(pictures)]
    named = [isinstance(p, (str, os.PathLike)) and os.path.abspath(p) for p in named]
    named = getattr(features, "hashes", named)  # of a FeatureCache
    if named and sequences is not None:
        named = [named[number] for sequence in sequences for number in sequence]
    return set(named) - {False}


def _warn_of_overlap(training, validation):
    """Warn, once, of pictures that are validated and trained on."""
    mine = _pictures_of(*validation)
    if both := len(mine & _pictures_of(*training)):
        warnings.warn(
            f"validation: {both} of its {len(mine)} pictures are trained on, too; their"
            " losses say nothing of new pictures",
            stacklevel=3,
        )


def _say_nothing(line):
    """The report of a process that is not the first."""


class _Notes:
    """Loss and gates of each step, left on the device until somebody wants them."""

    def __init__(self, model, history):
        named = model.named_parameters()
        self.gates = [p for name, p in named if name.endswith("_gate")]
        self.history, self._waiting = history, []

    def add(self, stopped, loss, norm):
        """Keep what a step gave, without looking at it. Args: () each."""
        gates = [whole(gate.detach()).tanh().reshape(()) for gate in self.gates]
        numbers = [stopped.float(), loss, norm, *gates]
        self._waiting.append(torch.stack([number.float() for number in numbers]))

    def is_full(self):
        """Is it time to look, or else too much would wait?"""
        return len(self._waiting) >= 100

    def read(self):
        """Bring all that waits into `history`, at once.

        Raises:
            NotFinite: a step was not taken, nor any after it; they are not in it.
        """
        if not self._waiting:
            return
        waiting, self._waiting = torch.stack(self._waiting).tolist(), []
        for stopped, loss, norm, *gates in waiting:
            if stopped:
                raise NotFinite(f"the {fault_of(loss, norm)}")
            opened = [round(gate, 4) for gate in gates]
            done = len(self.history) + 1
            self.history.append({"step": done, "loss": loss, "gates": opened})


class _CtrlC:
    """Inside this block Ctrl-C waits: `asked` says that it came. A second one does not.

    So that no step is half taken when a checkpoint is written.
    """

    def __init__(self, is_alone=True):
        self.is_alone = is_alone  # else the others would wait for this process

    def __enter__(self):
        self.asked, self.before = False, None
        if self.is_alone and threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGINT)
            if callable(before):  # else somebody wants it to be ignored
                self.before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *_):
        if self.asked:
            raise KeyboardInterrupt("stopped in the middle of a step, nothing is saved")
        self.asked = True

    def __exit__(self, *error):
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)


def _takes_muon(with_muon, model, together):
    """Is Muon one of the optimizers? As asked for, or as it pays.

    Raises:
        ValueError: it is asked for, and no process has a whole matrix.
    """
    if with_muon is None:
        return muon_pays(model) and not together.is_cut
    if with_muon and together.is_cut:
        raise ValueError(
            "Muon needs whole matrices, and FSDP2 cuts them up: with_muon=False, or DDP"
        )
    return with_muon


def _start(checkpoint, model, optimizers, settings, precision, report, process):
    """Where to begin, (steps done, history): at nothing, or at a checkpoint.

    Raises:
        OSError, ValueError: see `load_checkpoint`; or there is no folder to write to.
    """
    if checkpoint is None:
        return 0, []
    folder = Path(checkpoint).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} to write checkpoints to")
    if not Path(checkpoint).exists():
        return 0, []
    data = model, optimizers, settings, precision, process
    first, history = load_checkpoint(checkpoint, *data)
    report(f"going on from step {first} of {settings['n_steps']}, {checkpoint}")
    return first, history


def _out_of_memory(error, step, batch_size, accumulate):
    """The same error, with what to do about it."""
    says = str(error).split(". ")[0]
    halves = range(batch_size // 2, 0, -1)
    smaller = next((n for n in halves if batch_size % n == 0), None)
    way_out = "build the model with gradient_checkpointing=True, which takes more time"
    if smaller is not None:
        times = accumulate * (batch_size // smaller)
        sizes = f"Take batch_size={smaller} and accumulate={times}"
        way_out = f"{sizes}, the same steps with less memory; or {way_out}"
    else:
        way_out = way_out[0].upper() + way_out[1:]
    return torch.OutOfMemoryError(f"step {step + 1}: {says}. {way_out}")


@contextlib.contextmanager
def _named(run):
    """Say of which step a NotFinite is, and what may be to blame."""
    try:
        yield
    except NotFinite as error:
        step = len(run.notes.history)
        why = run.examples.suspects(step)
        if name := spoilt(run.model.named_parameters()):
            why = f"{name} of the model holds something other than finite numbers"
        if run.precision.is_scaled:
            why += ". Or a number was over 65,504: try precision='float32'"
        raise NotFinite(f"step {step + 1} not taken: {error}. {why}") from error


class _Run:
    """A training under way: what moves, what it reads, how far it is."""

    def __init__(
        self, optimizers, examples, precision, together, settings, first, history
    ):
        self.model, self.optimizers = together.model, optimizers
        self.examples = examples
        self.precision, self.together, self.settings = precision, together, settings
        self.device, self.first, self.done = together.device, first, first
        self.notes, self.is_whole = _Notes(self.model, history), True
        self.n_pictures, self.n_told = 0, first  # seen; steps that reports were of
        self.random, self.started = random_states(self.device), time.perf_counter()

    def go(self, checkpoint, every, report, log, looks):
        """Take all steps that are left; `looks()` gives further numbers to report."""
        n_steps, (report_every, checkpoint_every) = self.settings["n_steps"], every
        self.model.train()
        with _CtrlC(self.together.n == 1) as ctrl_c:
            for done in range(self.first + 1, n_steps + 1):
                self.take_step(done - 1)
                if ctrl_c.asked:
                    raise KeyboardInterrupt
                if is_report(done, n_steps, report_every):
                    numbers = self.numbers() | self.in_memory(done - 1, looks)
                    report(progress_line(numbers, n_steps))
                    if log is not None:
                        log(numbers)
                    # A run that goes on from a checkpoint has not drawn what they drew.
                    set_random_states(self.random, self.device)
                if checkpoint and is_checkpoint(done, n_steps, checkpoint_every):
                    self.save(checkpoint)

    def take_step(self, step):
        """One step, and a note of it."""
        settings = self.settings
        among = self.together.number, self.together.n
        batches = self.examples.batches(step, self.device, *among)
        rate = schedule(step, settings["n_steps"], settings["warmup"])
        self.is_whole = False
        with _named(self):
            moving = self.model, batches, self.optimizers, rate
            moving += self.precision, self.together
            loss = self.in_memory(step, training_step, *moving)
        self.notes.add(self.precision.stopped, loss, self.precision.norm)
        self.random, self.done = random_states(self.device), step + 1
        self.n_pictures += self.examples.n_pictures(step)
        self.is_whole = True
        if is_read_at_once(self.device) or self.notes.is_full():
            self.read()

    def in_memory(self, step, function, *args):
        """What a function returns; if memory runs out, what to do about it is said."""
        try:
            return function(*args)
        except torch.OutOfMemoryError as error:
            sizes = self.settings["batch_size"], self.settings["accumulate"]
            raise _out_of_memory(error, step, *sizes) from error

    def read(self):
        """Bring losses and gates of all steps so far into the history."""
        with _named(self):
            self.notes.read()

    def numbers(self):
        """What a report says: dict, see `train`."""
        self.read()
        if name := spoilt(learning_parameters(self.model).items()):
            raise NotFinite(f"after step {self.done}, {name} is not finite any more")
        recent, self.n_told = self.notes.history[self.n_told :], self.done
        seconds = time.perf_counter() - self.started
        pace = (self.done - self.first) / seconds
        return {
            "step": self.done,
            "loss": sum(note["loss"] for note in recent) / len(recent),
            "pictures_per_second": self.n_pictures / seconds,
            "seconds_left": (self.settings["n_steps"] - self.done) / pace,
            "memory": memory_in_use(self.device),
            "skipped": int(self.precision.skipped),
        }

    def save(self, checkpoint):
        """Write all that the next step depends on."""
        self.read()
        self.together.wait()
        model, optimizers = self.together.gather(with_averages=True)
        random, *others = self.together.of_all(self.random)
        if not self.together.is_first:
            return
        random = random | ({"others": others} if others else {})
        state = {"step": self.done, "history": self.notes.history}
        state |= {"settings": self.settings, "random": random}
        state["precision"] = self.precision.state_dict()
        save_checkpoint(checkpoint, model, optimizers, **state)

    def stop(self, checkpoint):
        """Save at once, if the last step is whole; and how to go on: a sentence."""
        if not self.is_whole or self.together.n > 1:
            return "interrupted in the middle of a step: what was saved last is there"
        after = f"interrupted after step {self.done} of {self.settings['n_steps']}"
        if checkpoint is None:
            return f"{after}. Nothing is saved: give train a checkpoint= for that"
        if self.done > self.first:
            self.save(checkpoint)
        return f"{after}, saved: call train with the same arguments and it goes on"


def train(
    model,
    tokenizer,
    features,
    texts,
    n_steps,
    batch_size=64,
    lr=1e-3,
    gate_factor=30.0,
    with_muon=None,
    seed=0,
    checkpoint=None,
    report_every=100,
    report=print,
    sequences=None,
    precision=None,
    accumulate=1,
    warmup=50,
    validation=None,
    log=None,
    accelerator=None,
    checkpoint_every=None,
):
    """Train what is not frozen, on cached features of pictures.

    Of the table of tokens only `<image>` and `<|endofchunk|>` can move. Afterwards, and
    after any error, the model is in eval mode.

    Args:
        model, tokenizer: from `build_flamingo`.
        features: (pictures, F, v, d_img), see `encode_pictures`; or (pictures, F, 3, H,
            W), pixels, which the vision encoder reads in each step. A tensor, or any
            object with `shape`, `len()` and [list of numbers], which gives a tensor.
        texts: a text for each picture; with `sequences`, a list of texts for each, one
            for each of its pictures. A text may be a pair, see `collate`; or a list of
            texts, of which each epoch draws one.
        n_steps: optimizer steps. The rates fall to 0 over them, so they are part of
            what a run is. A step that float16 leaves out counts.
        batch_size: about how many pictures go through the model at a time.
        lr, gate_factor: see `make_optimizers`.
        with_muon: see `make_optimizers`; None, what `muon_pays` says. Not with FSDP2.
        seed: of the order of the pictures, and of the texts that are drawn.
        checkpoint: a file; if it is there, training goes on from it, to the same end.
        report_every: steps between two lines; 0, only at the end. If they are many,
            there are lines after steps 1 and 10, too.
        report: called with each line.
        sequences: which pictures follow each other, lists of picture numbers; None,
            each picture stands alone.
        precision: a name of `precision.DTYPES`; None, what `choose_precision` says.
        accumulate: batches in a step. Their losses are averaged over all labelled
            tokens, so that a step is that of one batch, so many times larger.
        warmup: steps until the rates are at their peak. A run that is shorter than that
            never gets there: give it a tenth of its steps.
        validation: (features, texts), or (features, texts, sequences), that are not
            trained on (of those that are, as far as pictures have names, a warning
            tells the number): their loss is measured at each report.
        log: called at each report with a dict of numbers: step, loss (mean since the
            last report), pictures_per_second, seconds_left, memory (the most bytes in
            use so far), skipped (steps that float16 left out); with `validation`, true
            and shuffled, its losses beside its own and beside exchanged pictures. What
            it draws by chance is the same each time and does not touch the run's lots.
        accelerator: an `accelerate.Accelerator`, if several processes train together
            (DDP or FSDP2): each calls `train` with the same arguments and takes its
            part of each step. The numbers are those of one process, and the first one
            writes. See `Together`.
        checkpoint_every: steps between two checkpoints; 0, only at the end; None, as
            many as between two lines.

    Returns:
        list of {"step", "loss", "gates"}, one for each step: tanh of every gate.

    Raises:
        ValueError: pictures, texts and sequences do not fit each other or the model, a
            text cannot be used, a checkpoint does not fit, or a vision encoder that is
            unfrozen is given features, not pixels: before the first step.
        NotFinite, a ValueError: a loss or a gradient is infinite or no number. The step
            is not taken, and the last checkpoint stays. On a GPU it is noticed at the
            next report, and no step after it was taken either.
        RuntimeError: inside `torch.autocast`, `no_grad` or `inference_mode`.
        OSError: a checkpoint cannot be written or read; the last good one is left.
        KeyboardInterrupt: after the step under way, and after a checkpoint of it.
    """
    model.eval()
    device = next(model.parameters()).device
    drawn = random_states(device)
    texts, sequences = check_examples(features, texts, sequences)
    counts = {"n_steps": (n_steps, 0), "batch_size": (batch_size, 1)}
    counts |= {"report_every": (report_every, 0), "seed": (seed, 0)}
    counts |= {"accumulate": (accumulate, 1), "warmup": (warmup, 0)}
    if checkpoint_every is None:
        checkpoint_every = report_every
    counts |= {"checkpoint_every": (checkpoint_every, 0)}
    _check_numbers(lr, gate_factor, **counts)
    _check_model(model, features)
    check_tokenizer(model, tokenizer)
    check_texts(texts, tokenizer, sequences is not None)
    if validation is not None:
        validation = _check_validation(validation, features, tokenizer)
        check_tower(validation[0], model.vision_encoder)
    set_random_states(drawn, device)  # a look at pixels may have drawn lots
    model.note_unfrozen()
    together = join(accelerator, model)
    if validation is not None and together.is_first:
        _warn_of_overlap((features, texts, sequences), validation)
    with_muon = _takes_muon(with_muon, model, together)
    settings = run_settings(
        *(features, texts, n_steps, batch_size, lr, gate_factor, with_muon, seed),
        *(sequences, accumulate, warmup),
    )
    precision = Precision(precision, together.device)
    rates = {"lr": settings["lr"], "gate_factor": settings["gate_factor"]}
    rates["rounds_in"] = torch.bfloat16 if precision.name == "bfloat16" else None
    make = functools.partial(make_optimizers, **rates, with_muon=with_muon)
    if not together.is_first:
        report, log = _say_nothing, None
    optimizers = make(model)
    start = model, optimizers, settings, precision, report, together.number
    first, history = _start(checkpoint, *start)
    if len(set(begins := together.of_all(first))) > 1:
        raise ValueError(
            f"the processes would begin after steps {begins}: {checkpoint} is not the "
            "same file for all of them. Put it where every machine can read it"
        )
    optimizers = together.share(optimizers, make)
    data = tokenizer, features, texts, sequences
    examples = Examples(*data, batch_size, accumulate, seed)
    run = _Run(optimizers, examples, precision, together, settings, first, history)
    looks = dict  # it gives {}
    if validation is not None:
        data = tokenizer, validation, precision, together, batch_size
        looks = functools.partial(validation_losses, run.model, *data)
    try:
        every = report_every, checkpoint_every
        run.go(checkpoint, every, report, log, looks)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(run.stop(checkpoint)) from error
    finally:
        run.model.eval()
    together.gather()
    return history
