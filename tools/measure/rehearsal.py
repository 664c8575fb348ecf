"""A stand-in for OPT-125m where the hub cannot be reached: its size, random weights.

Not a script: chapter 12 and measure_gpu.py import `write_random_opt`.
"""

import json
import shutil
from pathlib import Path

import torch
from transformers import OPTConfig, OPTForCausalLM

from tools import ROOT

N_WORDS = 50_265  # in OPT's vocabulary; its table has seven rows more


def write_random_opt(folder, seed=0, **changes):
    """Write a language model of OPT-125m's size to a folder in the hub's format.

    Its tokenizer is that of the tiny OPT, with words that mean nothing up to OPT's
    number of them.

    Args:
        folder: made, if it is not there.
        seed: of the weights.
        changes: for `OPTConfig`, to make it smaller.
    """
    folder, ours = Path(folder), ROOT / "data" / "tiny_opt"
    torch.manual_seed(seed)
    settings = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, **changes}
    OPTForCausalLM(OPTConfig(**settings)).half().save_pretrained(folder)
    shutil.copy(ours / "tokenizer_config.json", folder)
    tokenizer = json.loads((ours / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    words = range(len(vocabulary), N_WORDS)
    vocabulary |= {f"\u0120word{number}": number for number in words}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    return str(folder)
