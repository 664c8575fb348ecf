"""A training in one process of several, for test_together.py: `accelerate launch` it.

accelerate launch --cpu --num_processes 2 together.py FOLDER
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from flamingo_lite import build_flamingo, train

TEXTS = ["a lemon", "a tent", "a bear above a tent", "a bee", "a bus", "a cup"] * 2
SETTINGS = {"n_steps": 4, "batch_size": 4, "report_every": 2, "lr": 1e-3}
SMALLER = {"depth": 1, "num_latents": 2, "heads": 1, "dim_head": 16}


class Stopped(Exception):
    pass


def stop(line):
    if line.split()[1] == "4":
        raise Stopped


def run(accelerator=None, **kwargs):
    """Train a small Flamingo, with accumulated batches: (model, history)."""
    torch.manual_seed(0)
    blocks = {"heads": 1, "dim_head": 16}
    model, _, tokenizer = build_flamingo(
        "tiny", perceiver_kwargs=SMALLER, cross_attn_kwargs=blocks
    )
    for name, p in model.named_parameters():
        if name.endswith("_gate"):
            p.data.fill_(0.5)
    features = torch.randn(len(TEXTS), 1, 4, model.vis_dim)
    kwargs = {"report": lambda line: None, **SETTINGS, **kwargs}
    kwargs |= {"accumulate": 2, "accelerator": accelerator}
    return model, train(model, tokenizer, features, TEXTS, **kwargs)


def end_of(model, history):
    """What is compared: losses, and all that learned."""
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return {"losses": [note["loss"] for note in history], "weights": weights}


def main():
    folder = Path(sys.argv[1])
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    end = end_of(*run(accelerator, checkpoint=folder / "straight.pt"))
    torch.save(end, folder / f"straight{accelerator.process_index}.pt.end")
    end = end_of(*run(accelerator, checkpoint=folder / "one.pt"))  # of one process
    torch.save(end, folder / f"resumed{accelerator.process_index}.pt.end")
    accelerator.end_training()


if __name__ == "__main__":
    main()
