"""GPT-2 in the folder format of transformers, TRL and vLLM, read and written by hand. A script too:

    python -m data.huggingface load FOLDER                 a published GPT-2 as the base model
    python -m data.huggingface load FOLDER --stage ppo     a policy trained elsewhere (or dpo)
    python -m data.huggingface export FOLDER --stage ppo   any stage, for transformers, TRL, vLLM

A folder holds

    config.json         the architecture's name and sizes
    model.safetensors   the weights: 8 bytes, the length of the header; the header, JSON, {name:
                        {dtype, shape, data_offsets}}; the bytes of all tensors. Or
                        pytorch_model.bin; either may come in parts, with an index.json
    tokenizer.json      byte-level BPE: vocabulary, merges, how a text is split before they apply.
                        Or vocab.json and merges.txt, as GPT-2 has them

GPT-2's matrices are (in, out), for x W, where torch's Linear has (out, in); everything else has the
same name and shape as in gpt.py.
"""

import json
import re
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.files import InputError, read_bytes, run_script, write_atomic
from data.run import (Parser, Run, announce, check_name, complete, refused_if_broken,
                      stage_folder)
from data.tokenizer import PATTERN, SIGNS, SPECIAL_TOKENS, Tokenizer

# Names of tensors: the (in, out) matrices, and attention masks, which older files hold too.
CONV1D = re.compile(r"h\.\d+\.(attn|mlp)\.(c_attn|c_fc|c_proj)\.weight")
MASK = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Sizes: config.json's names, GPTConfig's names.
SIZES = {"vocab_size": "vocab_size", "n_positions": "block_size", "n_layer": "n_layer",
         "n_head": "n_head", "n_embd": "n_embd"}

# What else config.json must say. If it says nothing, transformers takes the first value.
ARCHITECTURE = {
    "model_type": ["gpt2"],
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
    "layer_norm_epsilon": [1e-5],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "add_cross_attention": [False],
    "tie_word_embeddings": [True],
}

# How tokenizer.json says which of the tokenizer's PATTERNS splits a text.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": True}
SPLIT_WORDS = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated",
               "invert": False}
ONLY_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": False}
SPLITS = {"gpt2": BYTE_LEVEL,
          "words": {"type": "Sequence", "pretokenizers": [SPLIT_WORDS, ONLY_BYTES]}}

BYTES = {sign: byte for byte, sign in SIGNS.items()}

# The exported tokenizer's name of the byte 0xFF, which no UTF-8 text contains: it is the padding.
PAD = "<|pad|>"

# In the chat format a user's "<|end|>" must stay text. The template puts ESCAPE into every "<|"
# (and doubles it where a text already has it), so no special token is found there; the normalizer,
# which runs after that search, takes it out again. {% generation %} marks what the model writes,
# the part that TRL trains on with assistant_only_loss.
ESCAPE = "\ufdd0"  # a code point that is not a character and never will be
NORMALIZER = {"type": "Replace", "pattern": {"Regex": f"{ESCAPE}(?=\\|)"}, "content": ""}
TEMPLATE = (
    "{%- for message in messages -%}\n"
    "{%- if message['content'] is not string -%}"
    "{{ raise_exception('this model reads text only: content must be a string') }}"
    "{%- endif -%}\n"
    "{%- set text = message['content'] | replace('#|', '##|') | replace('<|', '<#|') -%}\n"
    "{%- if message['role'] == 'user' and loop.index == 1 -%}"
    "{{ '<|user|>' + text }}\n"
    "{%- elif message['role'] == 'assistant' and loop.index == 2 -%}"
    "{{ '<|assistant|>' }}{% generation %}{{ text + '<|end|>' }}{% endgeneration %}\n"
    "{%- else -%}"
    "{{ raise_exception('this model knows one exchange: "
    "a message of the user, then one of the assistant') }}\n"
    "{%- endif -%}{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
).replace("#", ESCAPE)


def broken(path):
    """Within this context, any error that a damaged file causes becomes an InputError."""
    return refused_if_broken(path, "copy it again", of="a GPT-2")


# --------------------------------------------------------------------------------------------------
# Reading a folder


def read_folder(folder):
    """Read a GPT-2: (GPTConfig's fields, weights, Tokenizer, whether texts begin with <|end|>).

    weights: {name in gpt.py: tensor}. The tensors are views of files mapped into memory, except the
    token embedding, whose rows come in the order of our ids: the ordinary tokens as they are
    merged, then <|user|>, <|assistant|>, <|end|>. In a published GPT-2, <|endoftext|> becomes
    <|end|>, and the other two are new: the mean of all rows.
    Left out, with a line that says so: other special tokens that were added to GPT-2's ([PAD]), and
    rows of the embedding that no token has (a vocabulary padded to 50,304).
    Raises InputError, one line that names the file and the tensor, for anything that is damaged or
    not a GPT-2.
    """
    folder = Path(folder)
    config = read_config(folder)
    tokenizer, rows, added = read_tokenizer(folder)
    origin, weights = read_weights(folder)

    known = [row for row in rows if row is not None]
    vocab_size = config["vocab_size"]
    if max(known) >= vocab_size or config["n_layer"] > len(weights):
        raise InputError(f"{folder / 'config.json'}: vocab_size is {vocab_size} and n_layer "
                         f"{config['n_layer']}, but there are {max(known) + 1} tokens in the "
                         f"tokenizer, and {len(weights)} tensors; copy all files of one model")
    if vocab_size > 2 * len(known):
        raise InputError(f"{folder}: the model has {vocab_size:,} tokens, its tokenizer "
                         f"{len(known):,}; copy the model's own tokenizer into the folder")
    check_shapes(origin, weights, config)
    print_left_out(folder, vocab_size, known, added)

    # The embedding's rows in our order; the row of a new token is the mean of all.
    wte = weights["wte.weight"].float()
    mean = wte[known].mean(dim=0, keepdim=True)
    order = [len(wte) if row is None else row for row in rows]
    weights["wte.weight"] = torch.cat([wte, mean])[order]

    for name, tensor in weights.items():
        if CONV1D.fullmatch(name):
            weights[name] = tensor.T

    shape = {ours: config[theirs] for theirs, ours in SIZES.items()}
    shape["vocab_size"] = len(rows)
    begins = config.get("bos_token_id", 0) is not None
    return shape, weights, tokenizer, begins


def print_left_out(folder, vocab_size, known, added):
    """Say which added tokens, {token: row}, and how many other rows of the embedding are left out.
    known: the rows that are kept."""
    left_out = []
    if added:
        names = ", ".join(added)
        if len(names) > 60:
            names = f"{names:.60} …"
        left_out.append(f"added tokens: {len(added)} ({names})")
    with_token = {row for row in [*known, *added.values()] if row < vocab_size}
    without = vocab_size - len(with_token)
    if without:
        left_out.append(f"rows of the embedding without a token: {without:,} of {vocab_size:,}")
    if left_out:
        print(f"{folder}: left out, as no part of GPT-2: {'; '.join(left_out)}", flush=True)


def read_json(path):
    """The JSON object in a file."""
    with broken(path):
        value = json.loads(read_bytes(path))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
    return value


def read_config(folder):
    """config.json as a dict. InputError if its architecture is not gpt.py's."""
    path = folder / "config.json"
    if (folder / "adapter_config.json").exists() and not path.exists():
        raise InputError(f"{folder}: is an adapter (LoRA), not a whole model; merge it into its "
                         "model (peft: merge_and_unload) and save that")
    config = read_json(path)
    for name, known in ARCHITECTURE.items():
        if config.get(name, known[0]) not in known:
            raise InputError(f"{path}: {name} is {config[name]!r:.60}, but gpt.py's is "
                             f"{' or '.join(map(repr, known))}; only a GPT-2 can be loaded")
    for name in SIZES:
        value = config.get(name)
        if type(value) is not int or value < 1:
            raise InputError(f"{path}: {name} is {value!r:.60}, but must be a whole number above 0")

    n_embd = config["n_embd"]
    if n_embd % config["n_head"] or config.get("n_inner") not in (None, 4 * n_embd):
        raise InputError(f"{path}: n_embd {n_embd} must be a multiple of n_head, and n_inner must "
                         "be 4 times n_embd")
    return config


def check_shapes(origin, weights, config):
    """InputError unless the weights are exactly the tensors of a GPT-2 with config.json's sizes."""
    C = config["n_embd"]
    expected = {
        "wte.weight": (config["vocab_size"], C),
        "wpe.weight": (config["n_positions"], C),
        "ln_f.weight": (C,),
        "ln_f.bias": (C,),
    }
    layer_shapes = {
        "ln_1": (C,),
        "attn.c_attn": (C, 3 * C),
        "attn.c_proj": (C, C),
        "ln_2": (C,),
        "mlp.c_fc": (C, 4 * C),
        "mlp.c_proj": (4 * C, C),
    }
    for layer in range(config["n_layer"]):
        for name, shape in layer_shapes.items():
            expected[f"h.{layer}.{name}.weight"] = shape
            expected[f"h.{layer}.{name}.bias"] = shape[-1:]

    for name, shape in expected.items():
        found = "missing"
        if name in weights:
            found = tuple(weights[name].shape)
        if found != shape:
            raise InputError(f"{origin}: the tensor {name} is {found}, but by config.json {shape}; "
                             "copy all files of one GPT-2")
    for name, tensor in weights.items():
        if name not in expected:
            raise InputError(f"{origin}: the tensor {name} is {tuple(tensor.shape)}, but by "
                             "config.json none of a GPT-2's; copy all files of one GPT-2")


def read_weights(folder):
    """(the file that lists the tensors, {name without "transformer.": tensor})."""
    origin = folder / "model.safetensors"
    for name in ("model.safetensors", "model.safetensors.index.json",
                 "pytorch_model.bin", "pytorch_model.bin.index.json"):
        if (folder / name).exists():
            origin = folder / name
            break

    found = {}
    if origin.suffix == ".json":
        with broken(origin):
            names = {}  # part -> the tensors that it must hold
            for name, part in read_json(origin)["weight_map"].items():
                names.setdefault(folder / part, []).append(name)
            if not names:
                raise ValueError("it lists no tensors")
        for path in names:
            part = read_part(path)
            for name in names[path]:
                if name not in part and not MASK.fullmatch(name):
                    raise InputError(f"{path}: the tensor {name} is missing, although "
                                     f"{origin.name} lists it")
            found.update(part)
    else:
        found = read_part(origin)

    weights = {name.removeprefix("transformer."): tensor for name, tensor in found.items()}
    head = weights.pop("lm_head.weight", None)
    if head is not None:
        wte = weights.get("wte.weight")
        if wte is None or not torch.equal(head, wte):
            raise InputError(f"{origin}: the tensor lm_head.weight is not wte.weight, but gpt.py's "
                             "output matrix is tied to it")
    return origin, weights


def read_part(path):
    """The tensors of a .safetensors or .bin file, without attention masks: {name: tensor}."""
    if not path.exists():
        raise InputError(f"{path}: no such file")
    with broken(path):
        with open(path, "rb") as file:
            pointer = file.read(24) == b"version https://git-lfs."
        if pointer:
            raise InputError(f"{path}: is only a pointer of Git LFS; fetch the file: git lfs pull")
        if path.suffix == ".bin":
            return read_bin(path)
        return read_safetensors(path)


def read_bin(path):
    """The tensors of a file that torch.save wrote; a pickle that would run code is refused."""
    mapped = zipfile.is_zipfile(path)  # an older file cannot be mapped into memory
    found = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    tensors = {}
    for name, tensor in found.items():
        if MASK.fullmatch(name):
            continue
        if tensor.dtype not in DTYPES.values():
            raise InputError(f"{path}: the tensor {name} is {tensor.dtype}; "
                             f"{', '.join(DTYPES)} can be read; save the model in one of them")
        tensors[name] = tensor
    return tensors


def read_safetensors(path):
    """The tensors of a .safetensors file, views of its bytes mapped into memory."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, size)))
    header.pop("__metadata__", None)

    position = 0
    for begin, end in sorted(entry["data_offsets"] for entry in header.values()):
        if begin != position:
            raise ValueError("its tensors overlap or leave gaps")
        position = end
    if position != size - 8 - length:
        raise ValueError("its tensors are cut off, or bytes follow them")

    tensors = {}
    for name, entry in header.items():
        if MASK.fullmatch(name):
            continue
        if entry["dtype"] not in DTYPES:
            raise InputError(f"{path}: the tensor {name} is {entry['dtype']}; "
                             f"{', '.join(DTYPES)} can be read; save the model in one of them")
        # Every tensor has its own map, which is released with it. Copy on write ("c"), because
        # torch wants memory that it could write to.
        begin, end = entry["data_offsets"]
        data = np.memmap(path, np.uint8, mode="c", offset=8 + length + begin, shape=end - begin)
        tensors[name] = torch.from_numpy(data).view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


def read_tokenizer(folder):
    """(Tokenizer, rows, added): rows[i] is the row of the folder's embedding that holds our token
    i, None for a token that the folder does not have; added: {token: row} of the special tokens
    that are left out."""
    options = folder / "tokenizer_config.json"
    if options.exists() and read_json(options).get("add_prefix_space"):
        raise InputError(f"{options}: add_prefix_space is true, but GPT-2's is false; a model that "
                         "was trained with it cannot be loaded")

    path = folder / "tokenizer.json"
    if path.exists():
        vocab, added, merges, pattern = read_tokenizer_json(path)
    else:
        vocab = read_json(folder / "vocab.json")
        added = {}
        if (folder / "added_tokens.json").exists():
            added = read_json(folder / "added_tokens.json")
        path = folder / "merges.txt"
        merges = []
        for line in read_bytes(path).decode("utf-8", "replace").splitlines():
            if line and not line.startswith("#version"):
                merges.append(line.split(" "))
        pattern = "gpt2"

    with broken(path):
        tokens = {**added, **vocab}
        for row in tokens.values():
            if type(row) is not int:
                raise ValueError("its ids are not whole numbers")
        if sorted(tokens.values())[:len(vocab)] != list(range(len(vocab))):
            raise ValueError("its ids are not the numbers from 0 on")

        # The ordinary tokens are the single bytes and what the merges make; all others are special.
        merged = [left + right for left, right in merges]
        ordinary = set(merged).union(BYTES)
        special = {token: row for token, row in tokens.items() if token not in ordinary}
        if PAD in special and SIGNS[0xFF] not in tokens:
            tokens[SIGNS[0xFF]] = special.pop(PAD)

        # Our order: the single bytes by their ids, then the merged tokens as they are merged.
        single = [token for token in tokens if token in BYTES]
        order = sorted(single, key=tokens.get) + merged
        tokenizer = Tokenizer([bytes_of(token) for token in order], pattern)
        pairs = [(bytes_of(left), bytes_of(right)) for left, right in merges]
        if tokenizer.merges() != pairs:
            raise ValueError("its merges do not make its tokens in their order")
        rows = [tokens[token] for token in order]

    if set(SPECIAL_TOKENS) <= special.keys():
        rows += [special.pop(token) for token in SPECIAL_TOKENS]
    elif "<|endoftext|>" in special:
        rows += [None, None, special.pop("<|endoftext|>")]
    else:
        names = ", ".join(sorted(special)) or "(none)"
        raise InputError(f"{path}: has the special tokens {names:.60}, but neither <|endoftext|> "
                         f"nor all of {', '.join(SPECIAL_TOKENS)}; rename the token that ends a "
                         "text to <|endoftext|> there")
    for token in special:
        if token not in added:
            raise InputError(f"{path}: no merge makes the token {token!r:.40}, and it is not among "
                             "the added tokens; copy the tokenizer again")
    return tokenizer, rows, special


def read_tokenizer_json(path):
    """(vocabulary {token: id}, added tokens likewise, merges [[left, right]], name in PATTERNS) of
    a tokenizer.json. What tokenizers before 0.9 do not write is what GPT-2 has."""
    with broken(path):
        found = read_json(path)
        model = found["model"]
        vocab = dict(model["vocab"])
        added = {token["content"]: token["id"] for token in found.get("added_tokens", [])}
        merges = []
        for merge in model["merges"]:
            if isinstance(merge, str):  # as older files write it
                merge = merge.split(" ")
            merges.append(merge)

        split = found["pre_tokenizer"]
        if split["type"] == "ByteLevel":
            split = {**BYTE_LEVEL, **split, "trim_offsets": True}  # which changes no ids
        pattern = None
        for name, known in SPLITS.items():
            if split == known:
                pattern = name

        odd = []
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback",
                    "ignore_merges"):
            if model.get(key):
                odd.append(key)
        if model.get("type", "BPE") != "BPE":
            odd.append("model's type")
        if pattern is None:
            odd.append("pre_tokenizer")
        if found.get("normalizer") not in (None, NORMALIZER):
            odd.append("normalizer")
        if odd:
            raise InputError(f"{path}: its {odd[0]} is not a GPT-2's; only byte-level BPE as GPT-2 "
                             "has it can be loaded")
    return vocab, added, merges, pattern


def bytes_of(token):
    """The bytes of a token as vocabulary files write it, a sign for each byte."""
    return bytes(BYTES[sign] for sign in token)


# --------------------------------------------------------------------------------------------------
# Writing a folder


def write_folder(folder, shape, weights, tokenizer, begins=True, temperature=1.0, steps=False):
    """Write a model for AutoModelForCausalLM or, if it is a reward model, for
    AutoModelForSequenceClassification or, if that rewards steps, AutoModelForTokenClassification,
    which has a number for every token; and its tokenizer for AutoTokenizer.

    Padding is PAD, so the last token before the padding is <|end|>, where the reward is read.
    shape: GPTConfig's fields; weights: the state_dict of a GPT or a RewardModel; begins: whether
    its texts begin with <|end|>; temperature: to sample at. All or nothing; InputError if the
    folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder}: already exists; choose another folder, or delete it")

    tensors = {}
    for name, tensor in weights.items():
        name = name.removeprefix("trunk.")
        tensor = tensor.detach().float().cpu()
        if CONV1D.fullmatch(name):
            tensor = tensor.T
        tensors[f"transformer.{name}"] = tensor
    architecture = "GPT2LMHeadModel"
    padding_side = "left"  # so generate() continues the text, not the padding
    if steps:
        architecture = "GPT2ForTokenClassification"
        padding_side = "right"
        tensors["classifier.weight"] = tensors.pop("transformer.head.weight")
        tensors["classifier.bias"] = tensors.pop("transformer.head.bias")
    elif "transformer.head.weight" in tensors:
        # r = w·x + b, but that class has no b, so ln_f's bias takes it: w·(x + b w/w·w) = w·x + b.
        architecture = "GPT2ForSequenceClassification"
        padding_side = "right"
        w = tensors.pop("transformer.head.weight")  # (1, C)
        b = tensors.pop("transformer.head.bias")  # (1,)
        shift = b * w / (w * w).sum().clamp(min=1e-30)  # (1, C)
        tensors["transformer.ln_f.bias"] = tensors["transformer.ln_f.bias"] + shift[0]
        tensors["score.weight"] = w

    end = tokenizer.end_token
    pad = tokenizer.vocabulary.index(b"\xff")
    ids = {"bos_token_id": end if begins else None, "eos_token_id": end, "pad_token_id": pad}

    config = {"architectures": [architecture]}
    for name, known in ARCHITECTURE.items():
        config[name] = known[0]
    if architecture != "GPT2LMHeadModel":
        config["num_labels"] = 1
    for theirs, ours in SIZES.items():
        config[theirs] = shape[ours]
    config.update(ids)
    config["torch_dtype"] = "float32"
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout"):
        config[name] = 0.0

    generation = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    generation.update(ids)
    generation["max_length"] = shape["block_size"]

    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": TEMPLATE,
        "eos_token": "<|end|>",
        "pad_token": PAD,
        "padding_side": padding_side,
        "model_max_length": shape["block_size"],
        "clean_up_tokenization_spaces": False,
    }

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        whole = Path(temporary) / folder.name
        whole.mkdir()
        write_json(whole / "config.json", config)
        write_json(whole / "generation_config.json", generation)
        write_json(whole / "tokenizer.json", tokenizer_json(tokenizer, pad))
        write_json(whole / "tokenizer_config.json", tokenizer_config)
        write_safetensors(whole / "model.safetensors", tensors)
        whole.rename(folder)


def write_json(path, value):
    """Write a JSON value, atomically."""
    write_atomic(path, json.dumps(value, indent=1))


def signs_of(token):
    """A token, bytes, as vocabulary files write it, a sign for each byte."""
    return "".join(SIGNS[byte] for byte in token)


def tokenizer_json(tokenizer, pad):
    """tokenizer.json for a Tokenizer; pad is the id that pads."""
    names = [signs_of(token) for token in tokenizer.vocabulary] + list(SPECIAL_TOKENS)
    names[pad] = PAD
    merges = [[signs_of(left), signs_of(right)] for left, right in tokenizer.merges()]

    added = []
    for i in (pad, tokenizer.user_token, tokenizer.assistant_token, tokenizer.end_token):
        added.append({"id": i, "content": names[i], "special": True, "single_word": False,
                      "lstrip": False, "rstrip": False, "normalized": False})
    vocab = {name: i for i, name in enumerate(names)}
    return {
        "version": "1.0",
        "normalizer": NORMALIZER,
        "pre_tokenizer": SPLITS[tokenizer.pattern],
        "decoder": BYTE_LEVEL,
        "added_tokens": added,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def write_safetensors(path, tensors):
    """Write float32 tensors, {name: tensor}, as a .safetensors file."""
    header = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8

    def write(file):
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().numpy())

    write_atomic(path, write)


# --------------------------------------------------------------------------------------------------
# The script. gpt.py and reward_model.py depend on data/, so only the functions here import them.


@dataclass
class Config:
    """What the commands are given, under the names that data/run.py knows."""
    folder: str             # the folder in transformers' format, to read or to write
    size: str
    out: str
    stage: str              # load: gpt, ppo or dpo; export: the name of the checkpoint's folder
    name: str = ""          # load: the name of the new checkpoint's folder
    seed: int = 1           # announce prints it, but nothing here is random
    resume: bool = False    # nothing here takes long


def read_temperature(folder):
    """The temperature that a policy is sampled at, by generation_config.json; 1 if it says none.
    Another one than 1 is told. InputError if it is no positive number."""
    path = Path(folder) / "generation_config.json"
    temperature = read_json(path).get("temperature") if path.exists() else None
    if temperature is None:
        return 1.0
    if not isinstance(temperature, (int, float)) or temperature < 1e-4:
        raise InputError(f"{path}: temperature is {temperature}; it must be at least 0.0001")
    if temperature != 1:
        print(f"note    {path}: this policy is sampled at temperature {temperature}", flush=True)
    return float(temperature)


def load(config):
    """Save the GPT-2 in config.folder as the base model, or as a policy trained elsewhere."""
    from gpt import GPT, GPTConfig, get_device, load_checkpoint, save_checkpoint

    check_name(config.name, config.stage)
    shape, weights, tokenizer, begins = read_folder(config.folder)
    sources = []
    temperature = 1.0
    if config.stage != "gpt":
        temperature = read_temperature(config.folder)
        path = stage_folder(config, "sft") / "checkpoint.pt"
        reference, sft_tokenizer, _ = load_checkpoint(path, "sft", config.size)
        other = ""
        if sft_tokenizer.vocabulary != tokenizer.vocabulary:
            other = "vocabulary"
        elif shape["block_size"] != reference.config.block_size:
            other = f"context of {shape['block_size']} tokens"
        if other:
            raise InputError(f"{config.folder}: its {other} is not that of {path}, so the two "
                             "cannot be compared; load a policy that was trained from that model")
        sources = [path]

    model = GPT(GPTConfig(**shape))
    for name, value in model.state_dict().items():
        value.copy_(weights.pop(name))  # pop releases the tensor's map
    announce(config.name, config, get_device(), f"the weights in {config.folder}", model)
    folder = stage_folder(config, config.name)
    with Run(config.name, folder, config, report=None, sources=sources) as run:
        save_checkpoint(run.folder / "checkpoint.pt", config.stage, config.size, model, tokenizer,
                        metrics=[], text="" if begins else config.folder, loaded=config.folder,
                        temperature=temperature, made_from=run.made_from())
        run.finish()
    print(f"saved {run.home / 'checkpoint.pt'}", flush=True)


def export(config):
    """Write the checkpoint in OUT/SIZE/STAGE to config.folder, in transformers' format."""
    from gpt import GPT, load_checkpoint
    from reward_model import RewardModel

    match = re.match("gpt|sft|reward_model|process_model|ppo|dpo|rsft", config.stage)
    if not match:
        raise InputError(f"--stage {config.stage}: must be gpt, sft, reward_model, process_model, "
                         "ppo, dpo or rsft, or a --name that begins with one of them")
    stage = match[0]
    model_class = GPT
    if stage in ("reward_model", "process_model"):
        model_class = RewardModel
    path = stage_folder(config, config.stage) / "checkpoint.pt"
    complete(path.parent)
    model, tokenizer, checkpoint = load_checkpoint(path, stage, config.size,
                                                   model_class=model_class)
    write_folder(config.folder, checkpoint["config"], model.state_dict(), tokenizer,
                 begins=not checkpoint.get("text"), temperature=checkpoint.get("temperature", 1.0),
                 steps=stage == "process_model")
    print(f"saved {config.folder}", flush=True)


def main(argv=None):
    parser = Parser(description="Read and write GPT-2 in the folder format of transformers.",
                    allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    load_parser = commands.add_parser("load", help="make a GPT-2 a checkpoint", allow_abbrev=False)
    load_parser.add_argument("folder", help="the GPT-2: config.json, model.safetensors, …")
    load_parser.add_argument("--stage", choices=("gpt", "ppo", "dpo"), default="gpt",
                             help="ppo or dpo: a policy that was trained elsewhere (default: gpt)")
    load_parser.add_argument("--name", help="the checkpoint's folder in OUT/SIZE; it begins with "
                             "the stage (default: the stage)")

    export_parser = commands.add_parser("export", help="write a checkpoint for transformers",
                                        allow_abbrev=False)
    export_parser.add_argument("folder", help="the folder to write; it must not exist")
    export_parser.add_argument("--stage", required=True,
                               help="the checkpoint's folder in OUT/SIZE: any stage's or --name's")

    for command_parser in (load_parser, export_parser):
        command_parser.add_argument("--size", choices=("auto", "cpu", "gpu", "gpt2"),
                                    default="auto",
                                    help="auto: gpu if there is one; gpt2: a published GPT-2 "
                                    "(default: auto)")
        command_parser.add_argument("--out", default="out",
                                    help="folder of all outputs (default: out)")

    flags = vars(parser.parse_args(argv))
    for name, value in flags.items():
        if value == "":  # an unset shell variable must not mean another folder
            flag = "FOLDER" if name == "folder" else f"--{name}"
            raise InputError(f"{flag}: is empty; leave the flag out or give it a value")
    command = flags.pop("command")
    if command == "load" and flags["name"] is None:
        flags["name"] = flags["stage"]
    if flags["size"] == "auto":
        flags["size"] = "gpu" if torch.cuda.is_available() else "cpu"

    config = Config(**flags)
    if command == "load":
        load(config)
    else:
        export(config)


if __name__ == "__main__":
    run_script(main)
