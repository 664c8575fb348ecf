#!/usr/bin/env python3
"""Measure the paper-size model on the GPU at hand, once, for chapter 12.

    python tools/measure/measure_gpu.py
        some minutes on a GPU, into data/gpu.json
    python tools/measure/measure_gpu.py --smallest
        the tiny model on any device: does it run?

Measured are a training step at batches from 4 to 64 in three precisions, with its
memory; how fast pictures are encoded and captions written, with and without each cache;
three optimizers; torch.compile; what the gradient scaler does with planted overflows;
whether a resumed run ends with the same bits; and DDP with one process. What fails is
noted with its error, and the rest goes on. The file is written after each part, so what
was measured is kept however this ends. Where the hub cannot be reached, weights are
random: for times and memory that is the same.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from flamingo_lite import build_flamingo, caption, choose_device, describe_device, train
from flamingo_lite.budget import hub_answers, memory_budget, sizes_of
from flamingo_lite.precision import Precision
from flamingo_lite.training import Muon, make_batch, make_optimizers, training_step
from tools import ROOT
from tools.measure.rehearsal import write_random_opt

TEXT = "a brown dog runs over the wet sand of a beach with a red ball in its mouth"


def build(size, device, folder):
    """The model to be measured, and what its weights are."""
    torch.manual_seed(0)
    if size == "tiny":
        narrow = {"depth": 1, "num_latents": 4, "heads": 2, "dim_head": 16}
        block = {"heads": 2, "dim_head": 16, "ff_mult": 1}
        kwargs = {"perceiver_kwargs": narrow, "cross_attn_kwargs": block}
        built = build_flamingo("tiny", cross_attn_every_n_layers=2, **kwargs)
        weights = "of data/"
    elif hub_answers():
        built, weights = build_flamingo("paper"), "pretrained"
    else:
        opt = write_random_opt(folder / "opt")
        paths = {"lang_encoder_path": opt, "tokenizer_path": opt}
        built = build_flamingo("paper", clip_vision_encoder_pretrained=None, **paths)
        weights = "random"
    built[0].to(device)
    return built, weights


def wait(device):
    """A GPU works on its own: wait until it has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call, device):
    """The median of three calls after one that does not count; on a CPU, of one."""
    found, times = [], 3 if device.type == "cuda" else 0
    for _ in range(times + 1):
        wait(device)
        started = time.perf_counter()
        call()
        wait(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:] or found)


class Bench:
    """One model on one device, and what is asked of it."""

    def __init__(self, size, device, folder):
        self.device, self.folder, self.is_small = device, folder, size == "tiny"
        self.built, self.weights = build(size, device, folder)
        self.model, self.image_processor, self.tokenizer = self.built
        self.sizes = sizes_of(self.model)
        self.text = "a dog" if self.is_small else TEXT
        self.started = {n: t.clone() for n, t in self.model.state_dict().items()}

    def fresh(self):
        """The model as it was built."""
        self.model.load_state_dict(self.started)
        self.model.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        return self.model.train()

    def features(self, B):
        """(B, F=1, v, d_img) random features."""
        torch.manual_seed(1)
        return torch.randn(B, 1, self.sizes["vision"]["v"], self.model.vis_dim)

    def batch(self, B):
        """A batch of B pictures with one text each."""
        data = self.features(B), [self.text] * B, self.tokenizer
        return make_batch(range(B), *data, self.device)

    def steps(self):
        """Seconds and memory of a training step: list of dict."""
        found = []
        for name in ("float32", "bfloat16", "float16"):
            for B in (2,) if self.is_small else (4, 8, 16, 32, 64):
                found.append({"precision": name, "batch_size": B})
                try:
                    found[-1] |= self.step(name, B)
                except torch.OutOfMemoryError:
                    found[-1]["fault"] = "out of memory"
        return found

    def step(self, name, B):
        """One line of `steps`."""
        model, batch = self.fresh(), self.batch(B)
        optimizers = make_optimizers(model, 1e-4, with_muon=False)
        precision = Precision(name, self.device)

        def take():
            training_step(model, batch, optimizers, 1.0, precision)

        line = {"seconds": seconds_of(take, self.device)}
        T_txt = batch["lang_x"].shape[1]
        needs = memory_budget(self.sizes, B=B, T_txt=T_txt, precision=name)
        line |= {"tokens": T_txt, "budget": sum(needs.values())}
        if self.device.type == "cuda":
            line["memory"] = torch.cuda.max_memory_allocated(self.device)
        return line

    @torch.no_grad()
    def encode_rate(self):
        """Pictures per second through the tower, in three precisions: dict."""
        visual, rates = self.model.vision_encoder, {}
        B = 2 if self.is_small else 64
        pixels = torch.randn(B, 3, *visual.image_size, device=self.device)
        for name in ("float32", "bfloat16", "float16"):
            precision = Precision(name, self.device)

            def encode(precision=precision):
                with precision.autocast():
                    visual(pixels)

            rates[name] = B / seconds_of(encode, self.device)
        return rates

    def generation(self):
        """Tokens per second, with and without the cache of text and of pictures."""
        model, n_new, found = self.fresh().eval(), 2 if self.is_small else 20, []
        features = self.features(3)[None]  # (1, T_img=3, F, v, d_img)
        prompt = f"<image>{self.text}<|endofchunk|>" * 2 + "<image>"
        for text_cache in (True, False):
            for picture_cache in (True, False):
                settings = {"use_cache": text_cache, "keep_keys_values": picture_cache}
                settings |= {"min_new_tokens": n_new, "max_new_tokens": n_new}

                def write(settings=settings):
                    caption(model, None, self.tokenizer, features, prompt, **settings)

                pace = n_new / seconds_of(write, self.device)
                kept = {"text_cache": text_cache, "picture_cache": picture_cache}
                found.append({**kept, "tokens_per_second": pace})
        return found

    def optimizers(self):
        """Seconds of the optimizers' part of a step alone: dict."""
        found = {}
        for name in ("AdamW", "Muon, float32", "Muon, bfloat16"):
            model = self.fresh()
            model(None, **self.batch(2)).loss.backward()
            mine = make_optimizers(model, 1e-4, with_muon=name != "AdamW")
            for optimizer in mine:
                if isinstance(optimizer, Muon):
                    optimizer.dtype = getattr(torch, name.split()[-1])
            found[name] = seconds_of(
                lambda mine=mine: [o.step() for o in mine], self.device
            )
        return found

    def compiled(self):
        """Seconds of forward and backward, plain and by torch.compile: dict."""
        if self.is_small:
            return "not tried with the tiny model"
        model, batch, found = self.fresh(), self.batch(16), {}
        for name, call in (("plain", model), ("compiled", torch.compile(model))):

            def both(call=call):
                model.zero_grad()
                call(None, **batch).loss.backward()

            found[name] = seconds_of(both, self.device)
        return found

    def scaler(self):
        """Steps in float16 with a scale far too large: what is left out: dict."""
        model, batch = self.fresh(), self.batch(2)
        optimizers = make_optimizers(model, 1e-4, with_muon=False)
        n_steps, scale = (12, 2.0**26) if self.is_small else (40, 2.0**40)
        precision = Precision("float16", self.device, scale=scale)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        still = 0
        for _ in range(n_steps):
            training_step(model, batch, optimizers, 1.0, precision)
            same = (torch.equal(p, before[n]) for n, p in model.named_parameters())
            still += all(same)
        state = precision.state_dict()
        return {
            "steps": n_steps,
            "left out": state["skipped"],
            "nothing moved in": still,
            "scale at the end": state["scale"],
            "stopped": bool(precision.stopped),
        }

    def resumed(self):
        """Is a run that was cut off and resumed the same to the last bit? dict."""

        class Cut(Exception):
            pass

        def run(checkpoint, cut_at=None):
            def report(line):
                if cut_at and line.split()[:2] == ["step", str(cut_at)]:
                    raise Cut

            data = self.features(8), [self.text] * 8
            return train(
                self.model,
                self.tokenizer,
                *data,
                n_steps=3,
                batch_size=4,
                checkpoint=checkpoint,
                report_every=1,
                report=report,
            )

        self.fresh()
        run(None)
        whole = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.fresh()
        try:
            run(self.folder / "cut.pt", cut_at=2)
        except Cut:
            self.fresh()
        run(self.folder / "cut.pt")
        pairs = [(whole[n], p) for n, p in self.model.named_parameters()]
        far = max((a - b).abs().max().item() for a, b in pairs)
        return {"same bits": all(torch.equal(*pair) for pair in pairs), "apart": far}

    def ddp(self):
        """Gradients with DDP and one process, beside those without: dict."""
        import torch.distributed as dist

        kind = "nccl" if self.device.type == "cuda" else "gloo"
        place = f"file://{self.folder / 'ddp'}"
        dist.init_process_group(kind, init_method=place, rank=0, world_size=1)
        try:
            model, batch, grads = self.fresh(), self.batch(2), []
            for call in (model, torch.nn.parallel.DistributedDataParallel(model)):
                model.zero_grad()
                call(None, **batch).loss.backward()
                learning = [p for p in model.parameters() if p.requires_grad]
                grads.append([p.grad.clone() for p in learning])
            apart = [(a - b).abs().max().item() for a, b in zip(*grads, strict=True)]
            return {"gradients apart": max(apart), "tensors": len(apart)}
        finally:
            dist.destroy_process_group()


PARTS = ("steps", "encode_rate", "generation", "optimizers", "compiled", "scaler")
PARTS += ("resumed", "ddp")


def pace(steps):
    """The most pictures per second of all steps; None where there is no step."""
    fits = [s for s in steps if "seconds" in s] if isinstance(steps, list) else []
    return max((s["batch_size"] / s["seconds"] for s in fits), default=None)


def measure(size, device, report=print, keep=lambda found: None):
    """All parts, one after the other: dict. A part that fails is its error.

    Args:
        size: "paper" or "tiny".
        device: a torch.device.
        report: gets a line for each part.
        keep: gets what was found so far, after each part: a later one may end it all.

    Returns:
        {"device", "size", "weights", "torch", "train_rate": pictures per second} and
        each of PARTS. Where no step fits there is no "train_rate".
    """
    with tempfile.TemporaryDirectory() as folder:
        bench, started = Bench(size, device, Path(folder)), time.perf_counter()
        found = {"device": describe_device(device), "size": size}
        found |= {"weights": bench.weights, "torch": torch.__version__}
        for part in PARTS:
            try:
                found[part] = getattr(bench, part)()
            except Exception as error:  # the others are still worth their minutes
                traceback.print_exc()
                found[part] = {"fault": f"{type(error).__name__}: {error}"[:500]}
            if part == "steps" and (rate := pace(found[part])):
                found["train_rate"] = rate
            keep(found)
            report(f"{time.perf_counter() - started:6.0f} s  {part}: {found[part]}")
    return found


def name_of(found):
    """Which card this was: "Tesla T4"."""
    return found["device"].split(", ")[1]


def write(out, found):
    """Put what was found into a file, beside what it holds of other cards."""
    known = json.loads(out.read_text()) if out.exists() else {}
    new = out.with_name(f"{out.name}.part")
    new.write_text(json.dumps({**known, name_of(found): found}, indent=1) + "\n")
    os.replace(new, out)  # the old file or the whole new one


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smallest", action="store_true", help="the tiny model")
    parser.add_argument("--out", type=Path, help="default: data/gpu.json")
    args = parser.parse_args()
    device = choose_device()
    if device.type != "cuda" and not args.smallest:
        sys.exit(f"measure_gpu: {device} is no GPU; to try the script, give --smallest")
    if args.smallest and args.out is None:
        sys.exit("measure_gpu: --smallest needs --out: it is no measurement")
    out = args.out or ROOT / "data" / "gpu.json"
    size = "tiny" if args.smallest else "paper"
    found = measure(size, device, keep=lambda found: write(out, found))
    faults = [p for p in PARTS if isinstance(found[p], dict) and "fault" in found[p]]
    if "train_rate" not in found and "steps" not in faults:
        faults.insert(0, "steps, of which none fits")
    print(f"{out}: {name_of(found)}" + f"; failed: {', '.join(faults)}" * bool(faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
