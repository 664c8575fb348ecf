#!/usr/bin/env python3
"""Measure this package against OpenFlamingo 2.0.1: same machine, same weights, one run.

    python tools/measure/benchmark.py
        all, about ten minutes on two cores
    python tools/measure/benchmark.py step generation
        some groups, see GROUPS
    python tools/measure/benchmark.py --busy
        one thread, and its processor time
    python tools/measure/benchmark.py --smallest
        tiny sizes, to see that it runs
    python tools/measure/benchmark.py --readme
        README's table, from the file

--json data/benchmark.json writes the rows down; groups that are measured later join
those in the file.

Prints Markdown. Paper size with random weights: OPT-125m, the Perceiver of OpenFlamingo
and, where "tower" is said, CLIP ViT-L-14. Ours and theirs take turns in one process;
the median of the repeats counts. A group runs in a process of its own, peak memory in
one process for each model. With "checkpointing" each computes its layers again in
backward, in its own way. Nothing else should run meanwhile: other work moves the
ratios by a tenth and more. Where it cannot be helped, --busy counts processor time.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import ROOT

os.environ.setdefault("HF_HUB_OFFLINE", "1")
IMAGE, END, VOCAB = 50266, 50265, 50267  # as OPT's tokenizer with the two new tokens
CLOCK = time.perf_counter
STEPS = ((2, 1, 32), (2, 4, 128), (1, 16, 256), (1, 32, 512))  # (B, T_img, T_txt)
HEAD = """\
| case (B, T_img, T_txt) | ours | theirs | ratio | at most | ours is |
|:--|--:|--:|--:|--:|:--|"""
GROUPS = ("step", "tower", "generation", "memory", "growth", "checkpointing")
BEGIN, END_MARK = "<!-- speed: begin -->\n", "<!-- speed: end -->\n"  # in README
AT_MOST = {  # ours / theirs
    "step (2, 1, 32)": 1.0,
    "step (2, 4, 128)": 1.0,
    "step (1, 16, 256)": 0.9,
    "step (1, 32, 512)": 0.85,
    "step with tower (2, 1, 32)": 1.0,
    "second epoch, cached (2, 1, 32)": 0.3,
    "20 tokens, 3 images": 0.6,
    "20 tokens, 3 images, 3 beams": 0.4,
    "20 tokens, 32 images": 0.4,
    "peak memory (1, 32, 512)": 0.6,
    "time per word, 64 images / 1 image": 1.3,
    "step, checkpointing (1, 32, 512)": 0.85,
    "peak memory, checkpointing (1, 32, 512)": 0.6,
}


def sizes(smallest):
    """Widths and depths: the paper's, or some that take a second."""
    if smallest:
        tower = {"image_size": 28, "width": 32, "layers": 1, "heads": 2}
        lm = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64}
        lm |= {"num_hidden_layers": 2, "num_attention_heads": 2}
        return {"tower": tower, "lm": lm, "d_img": 32, "v": 4, "n_tokens": 3}
    tower = {"image_size": 224, "width": 1024, "layers": 24, "heads": 16}
    return {"tower": tower, "lm": {}, "d_img": 1024, "v": 256, "n_tokens": 20}


class NoTower:
    """Stands for the vision encoder, and gives features that are known already."""

    def make(self):
        import torch

        class Given(torch.nn.Module):
            features = None  # (B * T_img, v, d_img)

            def forward(self, pixels):
                copies = len(pixels) // len(self.features)  # for beams of one row
                return None, self.features.repeat(copies, 1, 1)

        return Given()


def build(which, with_tower, size, gradient_checkpointing=False):
    """A model of ours or of theirs with the same random weights, gates open.

    Trained are the Perceiver and the gated blocks, in both.
    """
    import open_clip
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    class Eyes:
        visual = NoTower().make()

    torch.manual_seed(0)
    if with_tower:
        options = {"patch_size": 14, "mlp_ratio": 4.0, "output_tokens": True}
        Eyes.visual = open_clip.transformer.VisionTransformer(
            **size["tower"], **options
        )
    lm = OPTForCausalLM(OPTConfig(vocab_size=VOCAB, **size["lm"]))
    if which == "ours":
        from flamingo_lite import Flamingo, FlamingoLMMixin, extend_instance
    else:
        sys.modules.setdefault("wandb", ModuleType("wandb"))
        from open_flamingo.src.flamingo import Flamingo
        from open_flamingo.src.flamingo_lm import FlamingoLMMixin as Theirs
        from open_flamingo.src.utils import extend_instance

        class FlamingoLMMixin(Theirs):
            """transformers 5 drops a mask of ones, which the reference asks for."""

            def forward(self, input_ids, attention_mask=None, **kwargs):
                return super().forward(input_ids, attention_mask, **kwargs)

    extend_instance(lm, FlamingoLMMixin)
    lm.set_decoder_layers_attr_name("model.decoder.layers")
    options = {"gradient_checkpointing": gradient_checkpointing}
    model = Flamingo(Eyes, lm, END, IMAGE, vis_dim=size["d_img"], **options)
    model.requires_grad_(False).eval()
    model.perceiver.requires_grad_(True)
    lm.gated_cross_attn_layers.requires_grad_(True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(0.5)
    return model


def both(with_tower, size):
    """{"ours": model, "theirs": model} with the same weights."""
    models = {which: build(which, with_tower, size) for which in ("ours", "theirs")}
    models["theirs"].load_state_dict(models["ours"].state_dict())
    return models


def wrap_theirs(model):
    """Let OpenFlamingo's layers be computed again in backward, as its script does."""
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as how

    def is_meant(module):
        wrapped = isinstance(module, how.CheckpointWrapper)
        return getattr(module, "_use_gradient_checkpointing", False) and not wrapped

    how.apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=functools.partial(
            how.checkpoint_wrapper, checkpoint_impl=how.CheckpointImpl.NO_REENTRANT
        ),
        check_fn=is_meant,
    )


def both_checkpointing(size):
    """As `both`, without the tower, and each with gradient checkpointing of its own."""
    models = {which: build(which, False, size, True) for which in ("ours", "theirs")}
    models["theirs"].load_state_dict(models["ours"].state_dict())
    wrap_theirs(models["theirs"])
    return models


def calls_of(models, size, case):
    """{"ours": call, "theirs": call}: each one training step on the same features."""
    import torch

    B, T_img, T_txt = case
    ids, labels = text(B, T_img, T_txt)
    features = torch.randn(B, T_img, 1, size["v"], size["d_img"])

    def call(which, model, optimizer):
        pictures = given(which, model, None, features)
        train_once(which, model, optimizer, ids, labels, pictures)

    return {
        which: functools.partial(call, which, model, adamw(model))
        for which, model in models.items()
    }


def text(B, T_img, T_txt):
    """(B, T_txt) ids and labels: an `<image>`, words and an end, T_img times."""
    import torch

    T = T_txt // T_img
    words = torch.arange(10, 10 + T - 2)
    chunk = torch.cat((torch.tensor([IMAGE]), words, torch.tensor([END])))
    ids = chunk.repeat(T_img).expand(B, -1).contiguous()
    return ids, ids.masked_fill(ids == IMAGE, -100)


def given(which, model, pixels, features):
    """Pictures as arguments: pixels, or features as ours or theirs takes them."""
    if pixels is not None:
        return {"vision_x": pixels}
    if which == "ours":
        return {"vision_x": None, "vision_features": features}
    model.vision_encoder.features = features.flatten(0, 2)
    return {"vision_x": features.new_empty(*features.shape[:2], 1, 3, 1, 1)}


def train_once(which, model, optimizer, ids, labels, pictures):
    """One training step: as `train` takes it, or as OpenFlamingo's script does."""
    import torch

    from flamingo_lite.loss import loss_at_labels

    optimizer.zero_grad()
    mask = torch.ones_like(ids)
    inputs = {"lang_x": ids, "attention_mask": mask, "labels": labels, **pictures}
    loss = loss_at_labels(model, **inputs) if which == "ours" else model(**inputs).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def write(model, ids, pictures, n_tokens, **options):
    """Continue a prompt by exactly `n_tokens`."""
    import torch

    mask = torch.ones_like(ids)
    length = {"min_new_tokens": n_tokens, "max_new_tokens": n_tokens}
    options = {"do_sample": False, "suppress_tokens": [IMAGE], **length, **options}
    return model.generate(lang_x=ids, attention_mask=mask, **pictures, **options)


def take_turns(calls, repeats):
    """{name: median seconds} of some calls, each once before, then by turns."""
    times = {name: [] for name in calls}
    for i in range(repeats + 1):
        order = list(calls) if i % 2 else list(calls)[::-1]
        for name in order:
            started = CLOCK()
            calls[name]()
            if i:
                times[name].append(CLOCK() - started)
    return {name: statistics.median(all_) for name, all_ in times.items()}


def matrix_peak(n=1536):
    """Floating-point operations per second in a product of two large matrices."""
    import torch

    n = 64 if "--smallest" in HANDED_ON else n
    a, b = torch.randn(n, n), torch.randn(n, n)
    return 2 * n**3 / take_turns({"peak": lambda: a @ b}, 5)["peak"]


def memory_peak(megabytes=400):
    """Bytes per second that a product of a large matrix and a vector reads."""
    import torch

    megabytes = 1 if "--smallest" in HANDED_ON else megabytes
    matrix = torch.randn(1000, megabytes * 250)
    vector = torch.randn(megabytes * 250)
    seconds = take_turns({"read": lambda: matrix @ vector}, 5)["read"]
    return matrix.numel() * 4 / seconds


def count_flops(call):
    """Operations in the products of a call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def adamw(model):
    import torch

    learning = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(learning, lr=1e-4, fused=True)


def compare(case, calls, repeats, flops=None, read=None):
    """A row of the table: seconds of ours and theirs, and ours against the machine."""
    seconds = take_turns(calls, repeats)
    share = ""
    if flops is not None:
        share = f"{flops / seconds['ours'] / matrix_peak():.0%} of matrix peak"
    if read is not None:
        share = f"{read / seconds['ours'] / memory_peak():.0%} of memory bandwidth"
    numbers = seconds["ours"], seconds["theirs"]
    return [[case, *(f"{s:.2f} s" for s in numbers), numbers[0] / numbers[1], share]]


def group_step(size, cases, repeats):
    """Training steps on features, without the tower."""
    models = both(False, size)
    for case in cases:
        calls = calls_of(models, size, case)
        flops = count_flops(calls["ours"])
        yield from compare(f"step {case}", calls, repeats, flops)


def group_checkpointing(size, cases, repeats):
    """The largest step with gradient checkpointing: its time, and its peak memory."""
    calls = calls_of(both_checkpointing(size), size, cases[-1])
    name = f"checkpointing {cases[-1]}"
    yield from compare(f"step, {name}", calls, repeats)
    yield compare_memory(f"peak memory, {name}", "--checkpointing")


def group_tower(size, cases, repeats):
    """Steps with the tower; and ours from a file against theirs with the tower."""
    import numpy as np
    import torch

    (B, T_img, T_txt), models = cases[0], both(True, size)
    optimizers = {which: adamw(model) for which, model in models.items()}
    ids, labels = text(B, T_img, T_txt)
    side = size["tower"]["image_size"]
    pixels = torch.randn(B, T_img, 1, 3, side, side)
    shape = (B, T_img, 1, size["v"], size["d_img"])
    kept = np.memmap(tempfile.TemporaryFile(), np.float16, shape=shape, mode="w+")
    kept[:] = np.random.default_rng(0).standard_normal(shape)

    def call(which, pixels):
        features = None  # as `FeatureCache` keeps and reads them: from a file, in half
        if pixels is None:
            features = torch.from_numpy(np.array(kept)).float()  # (B, T_img, F, v, d)
        pictures = given(which, models[which], pixels, features)
        train_once(which, models[which], optimizers[which], ids, labels, pictures)

    theirs = {"theirs": lambda: call("theirs", pixels)}
    where = f"({B}, {T_img}, {T_txt})"
    calls = {"ours": lambda: call("ours", pixels), **theirs}
    yield from compare(f"step with tower {where}", calls, repeats)
    calls = {"ours": lambda: call("ours", None), **theirs}
    yield from compare(f"second epoch, cached {where}", calls, repeats)


def group_generation(size, cases, repeats):
    """Twenty tokens, greedy and with three beams, without the tower."""
    import torch

    models, n_new = both(False, size), size["n_tokens"]
    weights = list(models["ours"].lang_encoder.parameters())
    for T_img, beams in ((3, 1), (3, 3), (32, 1)):
        ids, _ = text(1, T_img, 8 * T_img)
        features = torch.randn(1, T_img, 1, size["v"], size["d_img"])
        options = {"num_beams": beams} if beams > 1 else {}
        calls = {
            which: lambda which=which, model=model: write(
                model,
                ids,  # noqa: B023
                given(which, model, None, features),  # noqa: B023
                n_new,
                **options,  # noqa: B023
            )
            for which, model in models.items()
        }
        case = f"20 tokens, {T_img} images" + f", {beams} beams" * (beams > 1)
        read = n_new * sum(p.numel() * p.element_size() for p in weights)
        yield from compare(case, calls, repeats, read=read)


def group_growth(size, cases, repeats):
    """Our time for a word, one of 512 that are read, after one image and among 64."""
    import torch

    model, n_words, times = build("ours", False, size), 8 * 64, {1: [], 64: []}
    for i in range(repeats + 1):
        for T_img in times:
            ids, _ = text(1, T_img, n_words)
            features = torch.randn(1, T_img, 1, size["v"], size["d_img"])
            with torch.no_grad():
                model.cache_media(ids, None, features)
                started = CLOCK()
                model(None, ids)  # forgets the pictures afterwards
                if i:
                    times[T_img].append((CLOCK() - started) / n_words * 1e3)
    one, many = (statistics.median(some) for some in times.values())
    case = "time per word, 64 images / 1 image"
    yield [case, f"{many:.2f} ms", f"{one:.2f} ms", many / one, ""]


def peak(which, size, cases, with_checkpointing):
    """Peak memory of this process, in megabytes, after two steps of the last case."""
    import torch

    from flamingo_lite.reports import memory_in_use

    model = build(which, False, size, with_checkpointing)
    if with_checkpointing and which == "theirs":
        wrap_theirs(model)
    call = calls_of({which: model}, size, cases[-1])[which]
    for _ in range(2):
        call()
    return memory_in_use(torch.device("cpu")) / 2**20


def group_memory(size, cases, repeats):
    """Peak memory of the largest step."""
    yield compare_memory(f"peak memory {cases[-1]}")


def compare_memory(case, *options):
    """A row of the table: peak memory, each model in a process of its own."""
    used = {}
    for which in ("ours", "theirs"):
        used[which] = float(run_self("--peak", which, *options, *HANDED_ON))
    numbers = [f"{used[which]:,.0f} MB" for which in ("ours", "theirs")]
    return [case, *numbers, used["ours"] / used["theirs"], ""]


HANDED_ON = []  # options for the processes that are started


def run_self(*options):
    """The last line that this script prints with some options."""
    command = [sys.executable, __file__, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(options)}:\n{done.stderr[-2000:]}")
    return done.stdout.splitlines()[-1]


def conditions(repeats):
    """What the numbers were measured on: lines of Markdown."""
    import torch
    import transformers

    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    return [
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads, float32; load {load} at the start.",
        f"In this run: {matrix_peak() / 1e9:.0f} GFLOP/s in a product of matrices, "
        f"{memory_peak() / 1e9:.1f} GB/s read from memory.",
        f"Random weights, gates open, AdamW; medians of {repeats} by turns"
        + ", of the processor time of one thread" * (CLOCK is time.process_time)
        + ".",
    ]


def as_row(case, numbers, ratio, share):
    """A line of the Markdown table."""
    row = [case, *numbers, f"{ratio:.2f}", str(AT_MOST.get(case, "")), share]
    return f"| {' | '.join(row)} |"


def keep(path, group, measured, rows):
    """Put a group's rows into a file of JSON, beside those of other groups."""
    found = json.loads(path.read_text()) if path.exists() else {}
    found[group] = {"measured": measured, "rows": rows}
    path.write_text(json.dumps(found, indent=2) + "\n")


def write_readme(path, readme):
    """Put the rows of a file of JSON into README, between the marks."""
    found = json.loads(path.read_text())
    lines = [HEAD]
    for group in GROUPS:
        for case, *numbers, ratio, share in found.get(group, {}).get("rows", []):
            lines.append(as_row(case, numbers, ratio, share))
    text = readme.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END_MARK)
    readme.write_text(text[:start] + "\n".join(lines) + "\n" + text[end:])


def main():
    global CLOCK
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smallest", action="store_true")
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--json", type=Path, help="add the rows to this file")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--one", choices=GROUPS, help=argparse.SUPPRESS)
    parser.add_argument("--peak", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if strange := set(args.groups) - set(GROUPS):
        parser.error(f"{sorted(strange)[0]}: no such group, there are {GROUPS}")
    if args.readme:
        file = args.json or ROOT / "data" / "benchmark.json"
        return write_readme(file, ROOT / "README.md")
    HANDED_ON[:] = ["--smallest"] * args.smallest + ["--busy"] * args.busy
    if args.busy:
        torch.set_num_threads(1)
        CLOCK = time.process_time
    size, repeats = sizes(args.smallest), 1 if args.smallest else args.repeats
    cases = ((1, 1, 8), (1, 2, 16)) if args.smallest else STEPS
    if args.peak:
        print(peak(args.peak, size, cases, args.checkpointing))
    elif args.one:
        print(json.dumps(list(globals()[f"group_{args.one}"](size, cases, repeats))))
    else:
        measured = conditions(repeats)
        print("\n".join(measured), HEAD, sep="\n\n", flush=True)
        for group in args.groups or GROUPS:
            options = ["--one", group, "--repeats", str(repeats), *HANDED_ON]
            rows = json.loads(run_self(*options))
            for case, *numbers, ratio, share in rows:
                print(as_row(case, numbers, ratio, share), flush=True)
            if args.json:
                keep(args.json, group, measured, rows)


if __name__ == "__main__":
    main()
