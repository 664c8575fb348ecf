# Written by tools/book/sync.py from book/C_command_line.ipynb.
# Edit the notebook, not this file.
"""The command line: train, caption, score and info.

    python -m flamingo_lite train --images FOLDER --out FOLDER
    python -m flamingo_lite caption PICTURE …

Results go to stdout, everything else to stderr. Libraries are imported when a command
needs them, so that --help answers at once.
"""

__all__ = [
    "run_command",
]

import argparse
import json
import math
import os
import platform
import re
import shlex
import sys
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import flamingo_lite

_NAME = "python -m flamingo_lite"
_CHECKPOINT = "last.pt"  # in the folder that `train` writes
_FINISHED = ("flamingo.safetensors", "config.json", f"{_CHECKPOINT}.previous")


def _say(line):
    """Tell the person something that is no result."""
    print(line, file=sys.stderr, flush=True)


def _number(kind, least):
    """What reads a number for argparse: an int or a float, finite, from `least`."""
    what = {int: "whole", float: "finite"}[kind]

    def read(word):
        try:
            number = kind(word)
        except ValueError:
            number = math.nan
        if not least <= number < math.inf:
            problem = f"want a {what} number from {least}, got {word!r}"
            raise argparse.ArgumentTypeError(problem)
        return number

    return read


def _add_train(add):
    """The options of `train`."""
    of = "(default: %(default)s)"
    add("--images", required=True, metavar="FOLDER", help="what it learns from")
    add("--out", required=True, metavar="FOLDER", help="where the model is written")
    add("--size", choices=("tiny", "smol", "paper"), default="tiny", help=of)
    add("--resume", action="store_true", help="go on with the run in --out")
    count, size = _number(int, 0), _number(int, 1)
    add("--steps", type=count, help="(default: 1000)")
    add("--epochs", type=size, help="times through all pictures, instead of --steps")
    add("--batch-size", type=size, default=64, help=f"pictures at a time {of}")
    add("--accumulate", type=size, default=1, help=f"times that many in a step {of}")
    add("--warmup", type=count, help="steps to the full rate (default: 50 or a tenth)")
    rate = "learning rate (default: 1e-3, of paper 2e-4)"
    add("--lr", type=_number(float, 0), help=rate)
    add("--seed", type=count, default=0, help=of)
    add("--precision", choices=("float32", "bfloat16", "float16"))
    add("--validation", metavar="FOLDER", help="pictures that it is tested on")
    add("--report-every", type=count, default=50, help=f"steps to a line {of}")
    saves = "steps to a checkpoint (default: as --report-every)"
    add("--checkpoint-every", type=count, help=saves)
    _add_shared(add, "--features", "--encode-batch", "--skip-broken", "--hold-out")


def _add_caption(add):
    """The options of `caption`."""
    add("pictures", nargs="+", metavar="PICTURE")
    add("--prompt", default="<image>", help="what goes before the text")
    _add_shared(add, "--model", "--json", "--max-new-tokens")


def _add_score(add):
    """The options of `score`."""
    add("--images", required=True, metavar="FOLDER", help="with their true captions")
    shared = ("--model", "--features", "--encode-batch", "--json", "--skip-broken")
    _add_shared(add, *shared, "--hold-out", "--max-new-tokens")


def _add_info(add):
    """The options of `info`."""
    _add_shared(add, "--model")


def _add_shared(add, *names):
    """Options of several commands, those with these names, and the device."""
    if "--model" in names:
        add("--model", metavar="FOLDER", help="what `train` wrote (default: tiny)")
    if "--features" in names:
        add("--features", metavar="FOLDER", help="keeps what the eye has seen")
    if "--encode-batch" in names:
        says = "pictures before the eye at a time (default: %(default)s)"
        add("--encode-batch", type=_number(int, 1), default=96, help=says)
    if "--json" in names:
        add("--json", action="store_true", help="print JSON")
    if "--skip-broken" in names:
        add("--skip-broken", action="store_true", help="leave out broken rows")
    if "--hold-out" in names:
        says = "`train` leaves one picture in N to `score`, given the same N"
        add("--hold-out", type=_number(int, 2), metavar="N", help=says)
    if "--max-new-tokens" in names:
        says = "a text is cut here (default: 24; `score`: or as the longest true one)"
        add("--max-new-tokens", type=_number(int, 1), metavar="N", help=says)
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")


def _device(named):
    """The device that was named, or the best one."""
    import torch

    if named is None:
        return flamingo_lite.choose_device()
    try:
        return torch.empty(0, device=named).device
    except Exception as error:  # each kind of device has errors of its own
        problem = f"--device {named} is no device of this machine: {error}"
        raise ValueError(problem) from error


def _load(options):
    """A trained model on its device: Flamingo, image processor, tokenizer."""
    model, image_processor, tokenizer = flamingo_lite.load_flamingo(
        options.model or "tiny"
    )
    return model.to(_device(options.device)), image_processor, tokenizer


def _captions(folder, options):
    """The rows of a caption folder, one for each picture."""
    skip_broken = options.skip_broken
    return flamingo_lite.merge_captions(
        flamingo_lite.load_captions(folder, skip_broken=skip_broken)
    )


def _texts(rows):
    """The text, or the list of texts, of each row."""
    return [row["text"] for row in rows]


def _kept():
    """The folder for what is made once and used again."""
    kept = os.environ.get("FLAMINGO_LITE_CACHE", "~/.cache/flamingo_lite")
    return Path(kept).expanduser()


def _features(model, image_processor, rows, options):
    """What the vision encoder makes of the pictures, kept on disk for the next time."""
    folder, n = options.features or _kept() / "features", options.encode_batch
    _check_drive("--features", folder)
    encode = partial(flamingo_lite.cache_features, batch_size=n)
    try:
        return encode(folder, model.vision_encoder, image_processor, rows)
    except RuntimeError as error:
        if n == 1 or not _is_out_of_memory(error):
            raise
        problem = f"the device has too little memory to encode {n} pictures at a time"
        raise ValueError(f"{problem}: try --encode-batch {n // 2}") from error


def _is_out_of_memory(error):
    """Whether a RuntimeError is of memory, and to be told in a line."""
    return "out of memory" in str(error) and "FLAMINGO_LITE_DEBUG" not in os.environ


def _with_less_memory(error, options):
    """What to do where memory ran out: the advice of `train`, as options."""
    if not hasattr(options, "accumulate"):
        return "try --device cpu"
    found = re.search(r"batch_size=(\d+) and accumulate=(\d+)", str(error))
    if found is None:
        return "--batch-size cannot be smaller; take a smaller --size"
    return "try --batch-size {} --accumulate {}".format(*found.groups())


def _check_drive(option, folder):
    """Raise an error for a folder on Colab's Drive while no Drive is mounted."""
    drive = Path("/content/drive")
    if drive in Path(folder).absolute().parents and not drive.is_mount():
        raise FileNotFoundError(
            f"{option} {folder}: no Drive is mounted, so all would be lost with the "
            "machine. Run drive.mount('/content/drive') in a cell first"
        )


def _check_out(out, resume):
    """Raise an error for a folder that a run must not write to."""
    _check_drive("--out", out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out {out} is a file: name a folder")
    if not resume and out.is_dir() and any(out.iterdir()):
        raise FileExistsError(
            f"--out {out} holds something: add --resume to go on with the run there, "
            "or name another folder"
        )
    lost = not (out / _CHECKPOINT).exists()
    if lost and (held := [name for name in _FINISHED if (out / name).exists()]):
        raise FileNotFoundError(
            f"--out {out} has no {_CHECKPOINT} to go on from, and a new run would "
            f"write over {' and '.join(held)}: name another folder"
        )


def _rate(options):
    """The learning rate: as asked for, or by size; see chapter 12."""
    if options.lr is None:
        return 2e-4 if options.size == "paper" else 1e-3
    return options.lr


def _steps(options, n_pictures):
    """How many steps: as asked for, or from the epochs."""
    if options.epochs is None:
        return 1000 if options.steps is None else options.steps
    per_step = options.batch_size * options.accumulate
    return max(1, options.epochs * n_pictures // per_step)


def _warmup(options, n_steps):
    """Steps until the rate is at its peak, which a short run has to reach, too."""
    return min(50, n_steps // 10) if options.warmup is None else options.warmup


def _to_learn(options):
    """Rows to learn from, and rows to be watched by, or None."""
    for one, other in (("steps", "epochs"), ("validation", "hold_out")):
        if None not in (getattr(options, one), getattr(options, other)):
            names = f"--{one} and --{other.replace('_', '-')}"
            raise ValueError(f"{names} settle the same: give one of them")
    rows = _captions(options.images, options)
    if options.hold_out is not None:
        return flamingo_lite.hold_out(rows, options.hold_out)
    return rows, options.validation and _captions(options.validation, options)


def _train(options):
    """Train a new model, or go on with one, and save it."""
    import torch

    out = Path(options.out)
    _check_out(out, options.resume)
    rows, held_out = _to_learn(options)
    texts = _texts(rows)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    model, image_processor, tokenizer = flamingo_lite.build_flamingo(options.size)
    flamingo_lite.check_texts(texts, tokenizer)
    device = _device(options.device)
    _say(
        f"{options.size}, {len(rows)} pictures, {flamingo_lite.describe_device(device)}"
    )
    model.to(device)
    n_steps = _steps(options, len(rows))
    more = {"precision": options.precision} if options.precision else {}
    if held_out:
        features = _features(model, image_processor, held_out, options)
        more["validation"] = features, _texts(held_out)
    history = flamingo_lite.train(
        model,
        tokenizer,
        _features(model, image_processor, rows, options),
        texts,
        n_steps=n_steps,
        warmup=_warmup(options, n_steps),
        batch_size=options.batch_size,
        accumulate=options.accumulate,
        lr=_rate(options),
        seed=options.seed,
        checkpoint=out / _CHECKPOINT,
        report_every=options.report_every,
        checkpoint_every=options.checkpoint_every,
        report=_say,
        **more,
    )
    flamingo_lite.save_flamingo(model, out)
    last = [note["loss"] for note in history[-50:]]
    loss = f", loss {sum(last) / len(last):.3f}" if last else ""
    print(f"{out}: {len(history)} steps{loss}")


def _caption(options):
    """Print a text for each picture."""
    built = _load(options)
    words = {"max_new_tokens": options.max_new_tokens}
    texts = flamingo_lite.caption(*built, options.pictures, options.prompt, **words)
    pairs = list(zip(options.pictures, texts, strict=True))
    if options.json:
        written = [{"picture": picture, "text": text} for picture, text in pairs]
        print(json.dumps(written, indent=2, ensure_ascii=False))
    else:
        print("\n".join(f"{picture}: {text}" for picture, text in pairs))


def _of_others(texts, seed=0):
    """The same texts, each at the place of another one, drawn by lot."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(texts)).tolist()
    others = list(texts)
    for place, other in zip(order, order[1:] + order[:1], strict=True):
        others[place] = texts[other]
    return others


def _longest(texts, tokenizer):
    """How many tokens the longest of some texts has, with its end."""
    return 1 + max(len(tokens) for tokens in tokenizer(list(texts))["input_ids"])


def _score(options):
    """Print how well a model captions pictures, and whether it looks at them."""
    rows = _captions(options.images, options)
    if options.hold_out is not None:
        rows = flamingo_lite.hold_out(rows, options.hold_out)[1]
    texts = _texts(rows)
    truths = [[text] if isinstance(text, str) else text for text in texts]
    model, image_processor, tokenizer = _load(options)
    flamingo_lite.check_texts(texts, tokenizer)
    n_tokens = options.max_new_tokens
    if n_tokens is None:
        n_tokens = max(24, _longest(chain.from_iterable(truths), tokenizer))
    features, written = _features(model, image_processor, rows, options), []
    ask = partial(flamingo_lite.caption, model, image_processor, tokenizer)
    for start in range(0, len(rows), 100):
        some = features[list(range(start, min(start + 100, len(rows))))]
        written += ask(some, max_new_tokens=n_tokens)
    pairs = list(zip(written, truths, strict=True))
    scores = {
        "pictures": len(rows),
        "CIDEr-D": 100 * float(flamingo_lite.cider_d(written, truths).mean()),
        "exact": sum(text in own for text, own in pairs) / len(pairs),
    }
    for name, beside in (("true", texts), ("shuffled", _of_others(texts))):
        if name == "shuffled" and beside == texts:  # one picture; one text for all
            _say("no control: no picture has another caption to be compared with")
            continue
        losses = flamingo_lite.caption_losses(model, tokenizer, features, beside)
        scores[f"loss, {name}"] = float(losses.mean())
    if options.json:
        print(json.dumps(scores, indent=2))
    else:
        lines = [f"{n:15s} {round(number, 3)}" for n, number in scores.items()]
        print("\n".join(lines))


def _parts(model):
    """How many numbers each part of a model has: pairs of a name and a count."""
    blocks = model.lang_encoder.gated_cross_attn_layers
    parts = {
        "vision encoder": model.vision_encoder,
        "Perceiver": model.perceiver,
        "gated blocks": blocks,
        "all": model,
    }
    for name, part in parts.items():
        yield name, sum(p.numel() for p in part.parameters())
    yield (
        "trained",
        sum(t.numel() for t in flamingo_lite.trained_tensors(model).values()),
    )


def _memory(model):
    """What a step of training needs, or why that is not known: in words."""
    try:
        sizes = flamingo_lite.sizes_of(model)
    except ValueError as error:
        return f"not known: {error}"
    needs = flamingo_lite.memory_budget(sizes, B=64).values()
    return f"{sum(needs) / 1e9:.2f} GB, of one picture each"


def _info(options):
    """Print versions, the device, where files are kept, and a model's size."""
    from huggingface_hub.constants import HF_HUB_CACHE

    model = _load(options)[0] if options.model else None
    parts = dict(_parts(model)) if options.model else {}
    facts = {"flamingo_lite": flamingo_lite.__version__}
    facts["Python"] = platform.python_version()
    for library in ("torch", "transformers", "open_clip_torch", "timm", "pillow"):
        facts[library] = version(library)
    facts["device"] = flamingo_lite.describe_device(_device(options.device))
    facts["downloads in"] = HF_HUB_CACHE
    facts["features in"] = _kept() / "features"
    facts |= {name: f"{count:,} numbers" for name, count in parts.items()}
    if options.model:
        facts["a step of 64"] = _memory(model)
    for name, value in facts.items():
        print(f"{name:15s} {value}")


def _parser():
    """All commands and their options."""
    about = "A small Flamingo: pictures in, a line of text out."
    parser = argparse.ArgumentParser(prog=_NAME, description=about)
    told = {
        "train": ("learn from a folder of pictures with captions", _add_train, _train),
        "caption": ("write a text for each picture", _add_caption, _caption),
        "score": ("measure a model on a folder of pictures", _add_score, _score),
        "info": ("versions, device, folders, a model's size", _add_info, _info),
    }
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (about, add_options, run) in told.items():
        command = commands.add_parser(name, help=about, description=about)
        add_options(command.add_argument)
        command.set_defaults(run=run)
    return parser


def _stopped(words, options):
    """What to say after Ctrl-C: of a training, how to go on."""
    if options.run is not _train:
        return "stopped"
    again = [*words, *["--resume"] * (not options.resume)]
    there = (Path(options.out) / _CHECKPOINT).is_file()
    what = "the last checkpoint" if there else "the start, nothing was learned yet"
    return f"stopped. Go on from {what}:\n{_NAME} {shlex.join(again)}"


def run_command(words=None):
    """Do what a command line asks for.

    Args:
        words: list of strings, as they stand after `python -m flamingo_lite`; None,
            those that the program was started with.

    Returns:
        exit code: 0; 2 after a person's mistake, with one line about it; 130 after
        Ctrl-C. The environment variable FLAMINGO_LITE_DEBUG=1 lets errors through.
    """
    words = sys.argv[1:] if words is None else list(map(str, words))
    try:
        options = _parser().parse_args(words)
    except SystemExit as error:  # of --help, or a wrong option
        return error.code
    try:
        options.run(options)
    except KeyboardInterrupt:
        _say(_stopped(words, options))
        return 130
    except (OSError, TypeError, ValueError) as error:
        if os.environ.get("FLAMINGO_LITE_DEBUG") == "1":
            raise
        _say("error: " + " ".join(str(error).split()))
        return 2
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        way_out = _with_less_memory(error, options)
        _say(f"error: the device has too little memory: {way_out}")
        return 2
    return 0
