#!/usr/bin/env python3
"""Measure this package against OpenFlamingo 2.0.1: same machine, same weights, one run.

    python tools/benchmark.py                 all, some minutes on two cores
    python tools/benchmark.py --quick         smaller, to see that it runs

Prints ratios. Both models hold the same random weights: the language model has the
width of OPT-125m and --layers layers, the vision encoder is a small ViT, the Perceiver
and the gated blocks have their default sizes. Each measurement runs in a process of its
own, ours and theirs by turns, and the best of --repeats counts.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
IMAGE, END, VOCAB, D_IMG = 50266, 50265, 50267, 256
TASKS = {
    "training step, pictures encoded": {"kind": "train", "T_img": 1},
    "training step, ours from cached features": {"kind": "train", "T_img": 1},
    "training step, 8 images a sequence": {"kind": "train", "T_img": 8},
    "generation, 3 images": {"kind": "generate", "T_img": 3},
    "generation, 32 images": {"kind": "generate", "T_img": 32},
}


def vision_encoder():
    """A ViT of open_clip's with 64 patches; random weights."""
    import open_clip

    return open_clip.transformer.VisionTransformer(
        image_size=64,
        patch_size=8,
        width=D_IMG,
        layers=6,
        heads=4,
        mlp_ratio=4.0,
        output_tokens=True,
    )


def language_model(mixin, extend, n_layers):
    """An OPT of the width of OPT-125m, extended."""
    from transformers import OPTConfig, OPTForCausalLM

    lm = OPTForCausalLM(OPTConfig(vocab_size=VOCAB, num_hidden_layers=n_layers))
    extend(lm, mixin)
    lm.set_decoder_layers_attr_name("model.decoder.layers")
    return lm


def build(which, n_layers):
    """A model of ours or of theirs; only what both train has gradients."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(2)

    class Eyes:
        visual = vision_encoder()

    if which == "ours":
        from flamingo_lite import Flamingo, FlamingoLMMixin, extend_instance

        lm = language_model(FlamingoLMMixin, extend_instance, n_layers)
        model = Flamingo(Eyes, lm, END, IMAGE, vis_dim=D_IMG)
    else:
        from open_flamingo.src.flamingo import Flamingo
        from open_flamingo.src.flamingo_lm import FlamingoLMMixin
        from open_flamingo.src.utils import extend_instance

        class Patched(FlamingoLMMixin):
            """transformers 5 drops a mask of ones, which the reference asks for."""

            def forward(self, input_ids, attention_mask=None, **kwargs):
                return super().forward(input_ids, attention_mask, **kwargs)

        lm = language_model(Patched, extend_instance, n_layers)
        model = Flamingo(Eyes, lm, END, IMAGE, vis_dim=D_IMG)
    model.requires_grad_(False).eval()
    model.perceiver.requires_grad_(True)
    lm.gated_cross_attn_layers.requires_grad_(True)
    return model


def texts(B, T_img, words=8):
    """(B, T_txt) ids: an image and some words, T_img times."""
    import torch

    chunk = torch.cat((torch.tensor([IMAGE]), torch.arange(10, 10 + words)))
    return chunk.repeat(T_img).expand(B, -1).contiguous()


def one(which, task, n_layers, quick):
    """Print seconds of a task and the peak memory of this process, as JSON."""
    import torch

    kind, T_img = TASKS[task]["kind"], TASKS[task]["T_img"]
    model, times = build(which, n_layers), []
    B, n_new = (2 if quick else 8, 4 if quick else 16)
    B = B if kind == "train" else 1
    ids = texts(B, T_img)
    pixels = torch.randn(B, T_img, 1, 3, 64, 64)  # (B, T_img, F, 3, H, W)
    pictures = {"vision_x": pixels}
    if which == "ours" and "cached" in task:
        from flamingo_lite import pixels_to_patches

        features = pixels_to_patches(model.vision_encoder, pixels)
        pictures = {"vision_x": None, "vision_features": features}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for _ in range(2 if quick else 4):
        started = time.perf_counter()
        if kind == "train":
            optimizer.zero_grad()
            model(lang_x=ids, labels=ids, **pictures).loss.backward()
            optimizer.step()
        else:
            model.generate(
                lang_x=ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=n_new,
                max_new_tokens=n_new,
                do_sample=False,
                **pictures,
            )
        times.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": min(times[1:]), "megabytes": peak}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "TASK"), help="internal")
    args = parser.parse_args()
    if args.one:
        return one(*args.one, args.layers, args.quick)
    print(f"{'':44s} {'ours':>9s} {'theirs':>9s}   theirs / ours")
    for task in TASKS:
        best = {}
        for _ in range(1 if args.quick else args.repeats):
            for which in ("ours", "theirs"):
                command = [sys.executable, __file__, "--layers", str(args.layers)]
                command += ["--one", which, task] + ["--quick"] * args.quick
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{which}, {task}:\n{done.stderr[-2000:]}")
                result = json.loads(done.stdout.splitlines()[-1])
                known = best.setdefault(which, result)
                best[which] = {k: min(known[k], result[k]) for k in known}
        for unit, name in (("seconds", "s"), ("megabytes", "MB peak")):
            ours, theirs = best["ours"][unit], best["theirs"][unit]
            label = f"{task}, {name}" if unit == "seconds" else f"  {name}"
            print(f"{label:44s} {ours:9.2f} {theirs:9.2f}   {theirs / ours:.2f}")


if __name__ == "__main__":
    main()
