#!/usr/bin/env python3
"""Train the tiny OPT on text alone (see tiny_text.py), with transformers' own model.

    python tools/weights/train_tiny_opt.py
        minutes on two cores; resumes where it stopped
    python tools/weights/train_tiny_opt.py --steps 20
        a look at it

It needs data/tiny_opt/tokenizer.json (make_tokenizers.py) and writes, beside it,
config.json, model.safetensors (half precision) and training.log. It never sees a
picture.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from flamingo_lite.training import Muon
from tools import ROOT
from tools.weights.tiny_text import a, corpus, made_up, named_things

BLOCK = 128  # tokens in a row of a batch


def new_model(tokenizer):
    """A small OPT: 4 layers of width 256."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            word_embed_proj_dim=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            ffn_dim=1024,
            max_position_embeddings=512,
            dropout=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batch_of(tokenizer, n_rows, seed):
    """(n_rows, BLOCK) ids: lines one after the other, each led by </s>."""
    ids, lines = [], corpus(10**9, seed)
    while len(ids) < n_rows * BLOCK:
        ids += tokenizer(next(lines)).input_ids
    return torch.tensor(ids[: n_rows * BLOCK]).view(n_rows, BLOCK)


@torch.no_grad()
def perplexity(model, tokenizer, seed=10**6):
    """exp of the mean loss on lines that training did not draw."""
    model.eval()
    ids = batch_of(tokenizer, 32, seed).to(model.device)
    loss = model(input_ids=ids, labels=ids).loss.item()
    model.train()
    return math.exp(loss)


@torch.no_grad()
def naming(model, tokenizer, n_words, n_prompts=100, seed=1):
    """Share of prompts that go on with the right word.

    A prompt is 'lemon: this is a dax. tent: this is a wug. lemon: this is a'. Guessing
    among the words of the prompt gives 1 / n_words.
    """
    model.eval()
    rng, things, right = np.random.default_rng(seed), named_things(), 0
    for _ in range(n_prompts):
        chosen = rng.choice(things, n_words, replace=False)
        words = [made_up(rng) for _ in chosen]
        turns = [f"{t}: this is {a(w)}." for t, w in zip(chosen, words, strict=True)]
        asked = int(rng.integers(n_words))
        prompt = " ".join([*turns, f"{chosen[asked]}: this is a"])
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        answer = tokenizer(f" {words[asked]}.", add_special_tokens=False).input_ids
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(answer),
            do_sample=False,
        )
        right += out[0, ids.shape[1] :].tolist() == answer
    model.train()
    return right / n_prompts


def make_optimizers(model, lr):
    """Muon for the layers' matrices, AdamW for embeddings, biases and norms."""
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    ids = {id(p) for p in inner}
    outer = [p for p in model.parameters() if id(p) not in ids]
    adam = torch.optim.AdamW(
        outer, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    return {"muon": Muon(inner, lr=lr, weight_decay=0.05), "adam": adam}


def learning_rate(step, steps, peak, warmup=100, decay=0.3):
    """Up in `warmup` steps, level, and down to zero over the run's last `decay`."""
    down = (steps - step) / (decay * steps)
    return peak * min(1.0, (step + 1) / warmup, max(0.0, down))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1860)
    parser.add_argument(
        "--rows", type=int, default=24, help="rows of 128 tokens in a batch"
    )
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--checkpoints", type=Path, default=Path.home() / ".cache/flamingo_lite/opt"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "tiny_opt")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # tiny gradients make Muon slow otherwise
    torch.manual_seed(args.seed)
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    checkpoint = args.checkpoints / "last.pt"

    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = new_model(tokenizer)
    optimizers = make_optimizers(model, args.lr)
    first, log = 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        first, log = state["step"], state["log"]
        print(f"resumed at step {first}", flush=True)
    model.train()
    started, running = time.time(), []
    for step in range(first, args.steps):
        for group in (g for o in optimizers.values() for g in o.param_groups):
            group["lr"] = learning_rate(step, args.steps, args.lr)
        ids = batch_of(tokenizer, args.rows, args.seed + 1 + step)
        loss = model(input_ids=ids, labels=ids).loss
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        running.append(loss.item())
        done = step + 1
        if done % 100 == 0 or done == args.steps:
            pace = (time.time() - started) / (done - first)
            line = f"step {done} loss {sum(running) / len(running):.3f}"
            if done % 300 == 0 or done == args.steps:
                line += f" perplexity {perplexity(model, tokenizer):.2f}"
                line += f" naming two {naming(model, tokenizer, 2):.2f}"
                line += f" five {naming(model, tokenizer, 5):.2f}"
            log.append(line)
            running = []
            print(f"{line} ({pace:.2f} s/step)", flush=True)
            state = {name: o.state_dict() for name, o in optimizers.items()}
            state["model"] = model.state_dict()
            state |= {"rng": torch.get_rng_state(), "step": done, "log": log}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    model.half().save_pretrained(args.out)
    settings = f"seed {args.seed} steps {args.steps} rows {args.rows} lr {args.lr}"
    (args.out / "training.log").write_text("\n".join([settings, *log]) + "\n")


if __name__ == "__main__":
    main()
