# Written by tools/book/sync.py from book/08b_checkpoints.ipynb.
# Edit the notebook, not this file.
"""Checkpoints: written whole or not at all, read with suspicion, resumed exactly."""

__all__ = [
    "learning_parameters",
    "trained_rows",
    "random_states",
    "set_random_states",
    "write_whole",
    "save_checkpoint",
    "read_checkpoint",
    "run_settings",
    "model_settings",
    "load_checkpoint",
]

import contextlib
import glob
import io
import os
import random
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from flamingo_lite.loading import backbone_settings
from flamingo_lite.model import token_tables


def learning_parameters(model):
    """What is not frozen: {name: parameter}."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def trained_rows(model):
    """The tables of which only some rows are trained: {parameter: row numbers}.

    Of the table of tokens, or of two that are not tied, `<|endofchunk|>` and `<image>`.
    """
    rows = [model.eoc_token_id, model.media_token_id]
    tables = token_tables(model.lang_encoder).values()
    return {table.weight: rows for table in tables if table.weight.requires_grad}


def random_states(device):
    """Where the generators of random numbers stand: dict.

    Torch's, {"cpu": (bytes,)}, on a GPU also {"cuda": (bytes,)}; "python" and "numpy",
    which change pictures by chance.
    """
    name, numbers, *rest = np.random.get_state()
    states = {"cpu": torch.get_rng_state(), "python": random.getstate()}
    states["numpy"] = (name, torch.from_numpy(numbers.astype(np.int64)), *rest)
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states, device, process=0):
    """Go on from `random_states`; those of a GPU only where there is one.

    Of several processes, the others' are in "others". One that was not there when they
    were saved gets a seed of its own.
    """
    others = states.get("others", ())
    is_new = process > len(others)
    states = states if is_new or process == 0 else others[process - 1]
    torch.set_rng_state(states["cpu"])
    if "python" in states:  # older checkpoints hold torch's alone
        random.setstate(states["python"])
        name, numbers, *rest = states["numpy"]
        np.random.set_state((name, numbers.numpy().astype(np.uint32), *rest))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if is_new:
        seed = int(torch.randint(2**31, ())) + process
        for use in (torch.manual_seed, random.seed, np.random.seed):
            use(seed)


def _beside(path, ending):
    """The path of a file in the same folder: last.pt -> last.pt.previous."""
    return path.with_name(path.name + ending)


def _has_ended(process):
    """Has a process, given by its number, ended? Windows does not say."""
    if sys.platform == "win32":
        return False
    try:
        os.kill(process, 0)  # signal 0 does nothing, but wants somebody to be there
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # somebody else's, or no number of a process
        pass
    return False


def _sweep(path):
    """Take away what writers that were killed have left beside a file."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        number = left.name.split(".")[-2]
        if number.isdecimal() and _has_ended(int(number)):
            left.unlink(missing_ok=True)


def _keep_previous(path):
    """Give the file that is about to be replaced a second name, .previous."""
    previous = _beside(path, ".previous")
    previous.unlink(missing_ok=True)
    if path.exists():
        with contextlib.suppress(OSError):  # a file system without hard links
            os.link(path, previous)


def write_whole(path, contents):
    """Write beside `path`, then rename: at every moment `path` is whole or not there.

    Raises:
        OSError: it cannot be written, say to a full disk; what was there still is.
    """
    temporary = _beside(path, f".{os.getpid()}.tmp")  # another run may write, too
    try:
        _sweep(path)
        with open(temporary, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it gets the name
        _keep_previous(path)
        os.replace(temporary, path)
    except OSError as error:
        left = "the last good one is still" if path.exists() else "none was"
        why = f"checkpoint not written, {left} there: {error.strerror or error}"
        raise OSError(error.errno, why, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _cut(tensor, table, rows):
    """What is kept of a tensor as large as a table: its rows. Others as they are."""
    return tensor[rows] if tensor.shape == table.shape else tensor


def _of_tables(state, optimizer, change, rows):
    """An optimizer's state_dict with what it knows of each table changed."""
    known = dict(state["state"])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, table in enumerate(parameters):
        if table in rows and number in known:
            entries = known[number].items()
            known[number] = {n: change(t, table, rows[table]) for n, t in entries}
    return {**state, "state": known}


def save_checkpoint(path, model, optimizers, **progress):
    """Write all that the next step depends on, whole or not at all.

    Args:
        path: a file; the one that it replaces stays, as `path` + ".previous".
        model, optimizers: as in `train`.
        progress: "step", "history", "settings" and, if there is one, "precision":
            plain numbers and lists of them. And "random", if it is not of now.

    Raises:
        OSError: see `write_whole`.
        ValueError: it could not be loaded again. Nothing is written.
    """
    learning, rows = learning_parameters(model), trained_rows(model)
    state = {
        "trained": {
            name: _cut(p.detach(), p, rows[p]) if p in rows else p.detach()
            for name, p in learning.items()
        },
        "optimizers": [_of_tables(o.state_dict(), o, _cut, rows) for o in optimizers],
        "model": model_settings(model),
        "random": random_states(next(model.parameters()).device),
        **progress,
    }
    try:
        _check_values(state)
    except ValueError as error:
        raise ValueError(f"checkpoint {path} not written: {error}") from error
    contents = io.BytesIO()
    torch.save(state, contents)  # to a full disk, it would hide the reason
    write_whole(Path(path), contents.getbuffer())


def _check_precision(saved):
    """Raise ValueError if this is not what `Precision.state_dict` gives, nor None."""
    kinds = {"name": str, "scale": float, "good_steps": int, "skipped": int}
    if saved is not None and (
        {name: type(value) for name, value in saved.items()} != kinds
        or not (0 < saved["scale"] < 2.0**100 and saved["good_steps"] >= 0)
    ):
        raise ValueError("a precision of another kind")


def _check_values(state):
    """Raise what it raises, if a checkpoint cannot have these values."""
    kinds = {"settings": dict, "random": dict, "history": list, "step": int}
    kinds |= {"model": dict} if "model" in state else {}  # older ones have none
    if any(type(state[name]) is not kind for name, kind in kinds.items()):
        raise ValueError("settings, random states, steps or notes of another kind")
    if state["step"] != len(state["history"]):
        raise ValueError("not as many steps as notes of them")
    _check_precision(state.get("precision"))
    tensors = list(state["trained"].items())
    for optimizer in state["optimizers"]:
        for number, known in optimizer["state"].items():
            tensors += [(f"{name} of tensor {number}", known[name]) for name in known]
    for name, tensor in tensors:
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds something other than finite numbers")


def _way_out(path):
    """What to do about a checkpoint that cannot be read: part of a sentence."""
    previous = _beside(Path(path), ".previous")
    if previous.exists():
        return f"rename {previous} to go on from the one before, or delete both"
    return "delete it to start anew"


def read_checkpoint(path):
    """Read what `save_checkpoint` wrote, and run nothing that is in it: dict.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, cut short, or no checkpoint.
    """
    parts = {"trained", "optimizers", "random", "step", "history", "settings"}
    contents = io.BytesIO(Path(path).read_bytes())
    try:
        with zipfile.ZipFile(contents) as archive:  # torch.load compares no checksums
            if archive.testzip() is not None:
                raise ValueError("wrong checksum")
        contents.seek(0)
        state = torch.load(contents, map_location="cpu", weights_only=True)
        if missing := parts - set(state):
            raise ValueError(f"no {sorted(missing)} in it")
        _check_values(state)
    except Exception as error:
        problem = "it is damaged, cut short, or no checkpoint of `train`"
        raise ValueError(
            f"cannot go on from {path}: {problem}; {_way_out(path)}"
        ) from error
    return state


def _glance(features, n=16):
    """A few numbers of a few pictures' features, to tell them from others': list.

    Empty for pixels: a source of them may draw them anew each time.
    """
    if len(features.shape) != 4:
        return []
    places = torch.linspace(0, len(features) - 1, min(n, len(features)))
    some = features[places.round().long().tolist()].flatten(1).float()  # (n, numbers)
    columns = torch.linspace(0, some.shape[1] - 1, min(n, some.shape[1]))
    return some[:, columns.round().long()].cpu().flatten().tolist()


def _checksum(hashes):
    """Of the pictures that a FeatureCache is of: a number; None, not known."""
    return None if hashes is None else zlib.crc32(repr(hashes).encode())


def _are_alike(glance, other):
    """Are they of the same pictures, but for how another machine rounds?"""
    if not glance or len(glance) != len(other):
        return len(glance) == len(other)
    one, two = torch.tensor([glance, other])  # (numbers,) each
    apart, size = (one - two).abs().mean(), one.abs().mean()
    return bool(apart <= 0.1 * size)


def run_settings(
    features,
    texts,
    n_steps,
    batch_size,
    lr,
    gate_factor,
    with_muon,
    seed,
    sequences=None,
    accumulate=1,
    warmup=50,
):
    """What two runs must share to end with the same numbers: dict of plain values.

    Args: as for `train`.
    """
    return {
        "n_steps": int(n_steps),
        "batch_size": int(batch_size),
        "accumulate": int(accumulate),
        "lr": float(lr),
        "warmup": int(warmup),
        "gate_factor": float(gate_factor),
        "with_muon": bool(with_muon),
        "seed": int(seed),
        "order": "batches by length",
        "pictures": list(features.shape),
        "glance": _glance(features),
        "checksum of the pictures": _checksum(getattr(features, "hashes", None)),
        "checksum of the texts": zlib.crc32(repr((texts, sequences)).encode()),
        "texts": [repr(text) for text in texts],
        "sequences": sequences,
    }


def _difference(name, saved, wanted):
    """Say how two values differ; of long lists, the first item that does."""
    both = isinstance(saved, list) and isinstance(wanted, list)
    if both and name in ("texts", "sequences"):
        if len(saved) != len(wanted):
            return f"{name}: {len(saved)} there, {len(wanted)} here"
        pairs = enumerate(zip(saved, wanted, strict=True))
        number, (saved, wanted) = next(p for p in pairs if p[1][0] != p[1][1])
        name = f"{name}[{number}]"
    return f"{name} is {str(saved)[:100]} there, {str(wanted)[:100]} here"


def _differences(saved, wanted):
    """Say where two dicts differ: string, empty if they do not."""
    return "; ".join(
        [
            _difference(name, saved.get(name, "missing"), wanted.get(name, "not"))
            for name in sorted(saved.keys() | wanted.keys())
            if name not in saved or name not in wanted or saved[name] != wanted[name]
        ][:9]
    )


def _check_settings(path, state, settings):
    """Raise ValueError if a checkpoint is of a run with other settings or texts."""
    # Older checkpoints do not hold the texts, but only their checksum.
    saved = {name: settings[name] for name in ("texts", "sequences")}
    saved |= {"accumulate": 1, "warmup": 50, "glance": settings["glance"]}
    saved |= state["settings"]
    if saved["pictures"] == settings["pictures"]:
        if not _are_alike(saved["glance"], settings["glance"]):
            raise ValueError(
                f"{path} is of another run, use another file: it was trained on other"
                " pictures, or on features of another vision encoder"
            )
    saved["glance"] = settings["glance"]  # said before, or the shapes say it
    name = "checksum of the pictures"
    if None in (saved.get(name), settings[name]):  # an older one, or of a tensor
        saved[name] = settings[name]
    if different := _differences(saved, settings):
        if (n_steps := saved.get("n_steps")) != settings["n_steps"]:
            different += (
                ". The rates fall to 0 over n_steps, so a run cannot get longer: let it"
                f" end with n_steps={n_steps}, then train that model again, with"
                " another file and another seed"
            )
        if "order" not in saved:
            different += ". It was written before batches were made by length"
        raise ValueError(f"{path} is of another run, use another file: {different}")


def _check_tensors(path, state, model):
    """Raise ValueError if a checkpoint's tensors are not those that `model` trains."""
    rows, trained = trained_rows(model), state["trained"]
    want = {}
    for name, p in learning_parameters(model).items():
        saved = trained.get(name)
        as_large = saved is not None and saved.shape == p.shape
        if p in rows and as_large and saved.dtype == p.dtype:
            # An older checkpoint, with the whole table. The old rows must not differ.
            still = torch.ones(len(p), dtype=torch.bool)  # (vocab,)
            still[rows[p]] = False
            ours = p.detach().cpu()  # (vocab, d_txt)
            if not torch.allclose(saved[still], ours[still], atol=1e-5):
                raise ValueError(f"{path}: old rows of {name} are not this model's")
            trained[name] = saved[rows[p]]
        want[name] = _cut(p, p, rows[p]) if p in rows else p
    have, want = (
        {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        for tensors in (trained, want)
    )
    if different := _differences(have, want):
        raise ValueError(f"{path} is of another model, use another file: {different}")


def model_settings(model):
    """What a model computes with that no shape of a trained tensor shows: dict.

    Plain values by name; "frozen" has the first numbers of each tensor that is frozen.
    """
    lm, rows = model.lang_encoder, trained_rows(model)
    built = getattr(model.config, "built_with", None) or {}
    found = {
        "token ids": [model.eoc_token_id, model.media_token_id],
        "start_token": built.get("start_token"),
        "tokenizer": built.get("backbones", {}).get("tokenizer", {}).get("fingerprint"),
        "only_attend_immediate_media": lm.only_attend_immediate_media,
    }
    ours = {"perceiver": model.perceiver, "gated blocks": lm.gated_cross_attn_layers}
    for part, module in ours.items():
        heads = [m.heads for m in module.modules() if hasattr(m, "heads")]
        found[f"heads of {part}"] = heads
    for part in ("vision_encoder", "lang_encoder"):
        settings = backbone_settings(getattr(model, part))
        found |= {f"{name} of {part}": value for name, value in settings.items()}
    still = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    still |= {n: p for n, p in learning_parameters(model).items() if p in rows}
    numbers = {name: p.detach().flatten()[:4] for name, p in still.items()}  # (≤ 4,)
    return {**found, "frozen": {n: t.float().tolist() for n, t in numbers.items()}}


def _check_model(path, state, model):
    """Raise ValueError if a checkpoint is of a model that computes in another way."""
    here = model_settings(model)
    saved = dict(state.get("model", here))  # older checkpoints do not say
    theirs, ours = saved.pop("frozen", {}), here.pop("frozen")
    both = saved.keys() & here.keys()  # another version may note more, or less
    different = [_differences({k: saved[k] for k in both}, {k: here[k] for k in both})]
    for name in sorted(theirs.keys() | ours.keys()):
        one, two = (torch.tensor(numbers.get(name, [])) for numbers in (theirs, ours))
        # One of them may be kept in 16 bits.
        if one.shape != two.shape or not one.allclose(two, rtol=5e-3, atol=1e-6):
            different.append(f"{name}, which is frozen, has other numbers")
    if different := "; ".join(filter(None, different[:5])):
        raise ValueError(f"{path} is of another model, use another file: {different}")


def _whole(tensor, table, rows):
    """The other way round than `_cut`: a tensor as large as a table, 0 elsewhere."""
    if tensor.shape == table.shape:  # from an older checkpoint
        tensor = tensor[rows]
    if tensor.shape != (len(rows), *table.shape[1:]):
        return tensor
    whole = torch.zeros(table.shape, dtype=tensor.dtype)  # (vocab, d_txt)
    whole[rows] = tensor
    return whole


def load_checkpoint(path, model, optimizers, settings, precision=None, process=0):
    """Go on from a checkpoint: (steps done, history).

    Args:
        path, model, optimizers: as for `save_checkpoint`.
        settings: of this run, see `run_settings`.
        precision: a `Precision`, which goes on from the one that was saved.
        process: number of this one, if there are several.

    Raises:
        OSError, ValueError: see `read_checkpoint`.
        ValueError: it is of other settings or of another model. `model` is unchanged.
    """
    state = read_checkpoint(path)
    _check_settings(path, state, settings)
    _check_tensors(path, state, model)
    _check_model(path, state, model)
    rows = trained_rows(model)
    try:
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            groups = optimizer.state_dict()["param_groups"]  # the rates of this run
            saved = _of_tables(saved, optimizer, _whole, rows)
            optimizer.load_state_dict({**saved, "param_groups": groups})
            for tensor, known in optimizer.state.items():
                if any(t.shape not in (tensor.shape, ()) for t in known.values()):
                    raise ValueError("it remembers tensors of another size")
        # With FSDP2 the model that was given may be elsewhere than the run.
        device = (precision or next(model.parameters())).device
        set_random_states(state["random"], device, process)
    except Exception as error:
        raise ValueError(f"{path} does not fit these optimizers: {error}") from error
    with torch.no_grad():
        for name, p in learning_parameters(model).items():
            p[rows.get(p, ...)] = state["trained"][name].to(p)
    if precision is not None and state.get("precision"):
        precision.load_state_dict(state["precision"])
    return state["step"], state["history"]
