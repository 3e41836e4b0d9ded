"""The lines that made the folders beside this file, with transformers 5.24, tokenizers 0.23,
safetensors 0.8 and torch 2.13: pip install transformers, then python tests/huggingface/make.py.

published/  as GPT-2 itself is published: float32 in one file, names without a prefix, attention
            masks among the weights; vocab.json and merges.txt, <|endoftext|> last
saved/      as save_pretrained writes today: bfloat16 in two files with an index; tokenizer.json,
            <|endoftext|> first

Beside each: expected.json, texts with the ids of transformers' tokenizer, and logits.npy,
transformers' float32 logits of the tokens 3, 43, 83, ... in the folder's own numbering.
"""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel,
                          PreTrainedTokenizerFast)

HERE = Path(__file__).parent
TEXT = (
    "It's what we'd say: they're here, I've seen 12 of them and you'll see 1234 more. "
    "Don't they'll say it isn't?\n"
    "    Indented, twice  spaced,   and thrice.\n\n\n"
    "Naïve café, 日本語日本語, 🦊🪁🦊🪁. The banana bandana sang lalala.")
ODD = ["👩‍👩‍👧", "e\u0301\u0301", "\0", "\r\n", "\t", "  ", "\u2028", "\ufeff", "\x1c", "\x85",
       "\xa0", "ﷺ", "fox", " kite", "0123", "'s", "'LL", "'ve", "...", "\x7f", "\uffff", "ǅ",
       "²", "Ⅷ", "\u200b", "\u3000", "ÿ", " 日本", "\U000e0001", "\n"]


def texts(rng, count=40):
    """TEXT, and strings that break tokenizers."""
    ranges = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    found = [TEXT, "", " ", "\n\n x"]
    for _ in range(count):
        text = ""
        for _ in range(rng.randint(1, 12)):
            if rng.random() < 0.7:
                text += rng.choice(ODD)
            else:
                first, last = rng.choice(ranges)
                text += chr(rng.randint(first, last))
        found.append(text)
    return found


def expect(folder):
    """Write what the real libraries make of the folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [[text, tokenizer(text, add_special_tokens=False)["input_ids"]]
            for text in texts(random.Random(0))]
    (folder / "expected.json").write_text(json.dumps(rows) + "\n")
    tokens = torch.arange(3, model.config.vocab_size, 40)[None]
    with torch.no_grad():
        np.save(folder / "logits.npy", model(tokens).logits[0].numpy())


def model_of(vocab_size, n_layer, eos):
    """A GPT-2 with large random weights, so that nothing vanishes in rounding."""
    torch.manual_seed(n_layer)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=16, n_embd=8, n_head=2,
                                       n_layer=n_layer, bos_token_id=eos, eos_token_id=eos))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def published(folder):
    """The layout of the files that OpenAI's weights are published in."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=300, min_frequency=2, show_progress=False)
    bpe.save_model(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab["<|endoftext|>"] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    model = model_of(len(vocab), n_layer=2, eos=len(vocab) - 1)
    weights = dict(model.transformer.state_dict())
    for layer in range(2):
        weights[f"h.{layer}.attn.bias"] = torch.ones(16, 16).tril().view(1, 1, 16, 16)
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    names = ("activation_function attn_pdrop bos_token_id embd_pdrop eos_token_id "
             "layer_norm_epsilon model_type n_embd n_head n_layer n_positions resid_pdrop "
             "vocab_size").split()
    config = {"architectures": ["GPT2LMHeadModel"], "n_ctx": 16,
              **{name: getattr(model.config, name) for name in names}}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def saved(folder):
    """What save_pretrained writes."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=290, min_frequency=2,
                            special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    model = model_of(len(tokenizer), n_layer=1, eos=0).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="5KB")


if __name__ == "__main__":
    for make in (published, saved):
        folder = HERE / make.__name__
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        make(folder)
        expect(folder)
