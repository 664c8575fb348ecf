# Written by tools/sync.py from book/08b_checkpoints.ipynb.
# Edit the notebook, not this file.
"""Checkpoints: written whole or not at all, read with suspicion, resumed exactly."""

import contextlib
import io
import os
import zipfile
import zlib
from pathlib import Path

import torch


def learning_parameters(model):
    """What is not frozen: {name: parameter}."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def random_states(device):
    """Torch's random states, {"cpu": (bytes,)}; on a GPU also {"cuda": (bytes,)}."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states, device):
    """Go on from `random_states`; those of a GPU only where there is one."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _beside(path, ending):
    """The path of a file in the same folder: last.pt -> last.pt.tmp."""
    return path.with_name(path.name + ending)


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
    temporary = _beside(path, ".tmp")
    try:
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


def save_checkpoint(path, model, optimizers, **progress):
    """Write all that the next step depends on, whole or not at all.

    Args:
        path: a file; the one that it replaces stays, as `path` + ".previous".
        model, optimizers: as in `train`.
        progress: "step", "history" and "settings", plain numbers and lists of them.

    Raises:
        OSError: see `write_whole`.
    """
    state = {
        "trained": {name: p.detach() for name, p in learning_parameters(model).items()},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "random": random_states(next(model.parameters()).device),
        **progress,
    }
    contents = io.BytesIO()
    torch.save(state, contents)  # to a full disk, it would hide the reason
    write_whole(Path(path), contents.getbuffer())


def _check_values(state):
    """Raise what it raises, if `save_checkpoint` cannot have written these values."""
    kinds = {"settings": dict, "random": dict, "history": list, "step": int}
    if any(type(state[name]) is not kind for name, kind in kinds.items()):
        raise ValueError("settings, random states, steps or notes of another kind")
    if state["step"] != len(state["history"]):
        raise ValueError("not as many steps as notes of them")
    tensors = list(state["trained"].values())
    for optimizer in state["optimizers"]:
        tensors += [t for known in optimizer["state"].values() for t in known.values()]
    if not all(t.isfinite().all() for t in tensors):
        raise ValueError("something other than finite numbers")


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
):
    """What two runs must share to end with the same numbers: dict of plain values.

    Args: as for `train`.
    """
    return {
        "n_steps": int(n_steps),
        "batch_size": int(batch_size),
        "lr": float(lr),
        "gate_factor": float(gate_factor),
        "with_muon": bool(with_muon),
        "seed": int(seed),
        "pictures": list(features.shape),
        "checksum of the texts": zlib.crc32(repr((texts, sequences)).encode()),
    }


def _differences(saved, wanted):
    """Say where two dicts differ: string, empty if they do not."""
    names = [
        name
        for name in sorted(saved.keys() | wanted.keys())
        if name not in saved or name not in wanted or saved[name] != wanted[name]
    ]
    return "; ".join(
        f"{name} is {saved.get(name, 'missing')} there, {wanted.get(name, 'not')} here"
        for name in names[:9]
    )


def _check_fits(path, state, model, settings):
    """Raise ValueError if a checkpoint is of other settings or of another model."""
    if different := _differences(state["settings"], settings):
        raise ValueError(f"{path} is of another run, use another file: {different}")
    saved, wanted = (
        {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        for tensors in (state["trained"], learning_parameters(model))
    )
    if different := _differences(saved, wanted):
        raise ValueError(f"{path} is of another model, use another file: {different}")


def load_checkpoint(path, model, optimizers, settings):
    """Go on from a checkpoint: (steps done, history).

    Args:
        path, model, optimizers: as for `save_checkpoint`.
        settings: of this run, see `run_settings`.

    Raises:
        OSError, ValueError: see `read_checkpoint`.
        ValueError: it is of other settings or of another model. `model` is unchanged.
    """
    state = read_checkpoint(path)
    _check_fits(path, state, model, settings)
    try:
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            groups = optimizer.state_dict()["param_groups"]  # the rates of this run
            optimizer.load_state_dict({**saved, "param_groups": groups})
            for tensor, known in optimizer.state.items():
                if any(t.shape not in (tensor.shape, ()) for t in known.values()):
                    raise ValueError("it remembers tensors of another size")
        set_random_states(state["random"], next(model.parameters()).device)
    except Exception as error:
        raise ValueError(f"{path} does not fit these optimizers: {error}") from error
    model.load_state_dict(state["trained"], strict=False)
    return state["step"], state["history"]
