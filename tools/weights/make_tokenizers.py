#!/usr/bin/env python3
"""Make the tokenizers of the tiny language model and of the tiny CLIP's text tower.

One byte-level BPE vocabulary, learned from the text of tiny_text.py and saved twice:
for the OPT with its special tokens in OPT's places (<pad> 1, </s> 2, put first), and
for the CLIP with an <end> token that has the highest id, where open_clip's text tower
pools. The tokenizers in data/ were learned before the text got its lines that come
back, and are kept, since the CLIP's weights go with them: a run today makes others.

    python tools/weights/make_tokenizers.py
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tools import ROOT
from tools.weights.tiny_text import corpus


def learn(vocab_size, seed):
    """A byte-level BPE learned from 20,000 lines of the tiny OPT's text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(20_000, seed), trainer)
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "data")
    parser.add_argument("--vocab-size", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    opt = learn(args.vocab_size, args.seed)
    opt.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", opt.token_to_id("</s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=opt,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="</s>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(args.out / "tiny_opt")

    clip = learn(args.vocab_size, args.seed)
    clip.add_special_tokens(["<end>"])
    end = clip.token_to_id("<end>")
    clip.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", end)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=clip,
        eos_token="<end>",
        pad_token="<s>",  # id 0
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(args.out / "tiny_clip")
    print(f"{len(opt.get_vocab())} and {end + 1} tokens")


if __name__ == "__main__":
    main()
