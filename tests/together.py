"""A training in one process of several, for test_together.py: `accelerate launch` it.

accelerate launch --cpu --num_processes 2 together.py FOLDER [ddp|fsdp|fsdp-layers]
"""

import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType

from flamingo_lite import build_flamingo, train

TEXTS = ["a lemon", "a tent", "a bear above a tent", "a bee", "a bus", "a cup"] * 2
SETTINGS = {"n_steps": 4, "batch_size": 4, "report_every": 2, "lr": 1e-3}
SETTINGS["with_muon"] = False
SMALLER = {"depth": 1, "num_latents": 2, "heads": 1, "dim_head": 16}
LAYERS = {
    "auto_wrap_policy": "transformer_based_wrap",
    "transformer_cls_names_to_wrap": ["GatedCrossAttentionBlock", "PerceiverResampler"],
}


class Stopped(Exception):
    pass


def stop(line):
    if line.split()[1] == "4":
        raise Stopped


def build():
    """A small Flamingo with open gates, and features of as many pictures as TEXTS."""
    torch.manual_seed(0)
    blocks = {"heads": 1, "dim_head": 16}
    model, _, tokenizer = build_flamingo(
        "tiny", perceiver_kwargs=SMALLER, cross_attn_kwargs=blocks
    )
    for name, p in model.named_parameters():
        if name.endswith("_gate"):
            p.data.fill_(0.5)
    return model, tokenizer, torch.randn(len(TEXTS), 1, 4, model.vis_dim)


def run(accelerator=None, **kwargs):
    """Train a small Flamingo, with accumulated batches: (model, history)."""
    model, tokenizer, features = build()
    kwargs = {"report": lambda line: None, **SETTINGS, **kwargs}
    kwargs |= {"accumulate": 2, "accelerator": accelerator}
    return model, train(model, tokenizer, features, TEXTS, **kwargs)


def end_of(model, history):
    """What is compared: losses and gates, and all that there is."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    notes = {name: [note[name] for note in history] for name in ("loss", "gates")}
    return {"losses": notes["loss"], "gates": notes["gates"], "weights": weights}


def use_fsdp(**how):
    """An Accelerator that cuts tensors up, which on CPUs it does not do by itself.

    On GPUs the plugin alone does it: `Accelerator(fsdp_plugin=plugin)`.
    """
    plugin = FullyShardedDataParallelPlugin(
        **{"fsdp_version": 2, "cpu_ram_efficient_loading": False, **how}
    )
    accelerator = Accelerator(cpu=True)
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    assert accelerator.is_fsdp2
    return accelerator


def main():
    folder, how = Path(sys.argv[1]), sys.argv[2]
    if how == "ddp":
        accelerator = Accelerator(cpu=True)
    else:
        accelerator = use_fsdp(**(LAYERS if how == "fsdp-layers" else {}))
    assert accelerator.num_processes == 2
    number = accelerator.process_index

    def keep(name, model, history, **more):
        end = {**end_of(model, history), **more}
        torch.save(end, folder / f"{how} {name}{number}.end")

    probe, logged = build(), []
    looks = {"validation": (probe[2][:4], TEXTS[:4]), "log": logged.append}
    end = run(accelerator, checkpoint=folder / f"{how}.pt", **looks)
    keep("straight", *end, logged=[(n["true"], n["shuffled"]) for n in logged])
    # of one process:
    keep("resumed", *run(accelerator, checkpoint=folder / f"{how} one.pt"))
    # as on a GPU, where nobody looks whether a step is to be left out:
    with mock.patch("flamingo_lite.steps.is_read_at_once", return_value=False):
        keep("unread", *run(accelerator))
    accelerator.end_training()


if __name__ == "__main__":
    main()
