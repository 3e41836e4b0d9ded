"""GPT-2 in the folder format of transformers, TRL and vLLM, read and written by hand.

    config.json         the architecture's name and sizes
    model.safetensors   the weights: 8 bytes, the length of the header; JSON, {name: {dtype, shape, data_offsets}}; all
                        tensors, raw. Or pytorch_model.bin; either may come in parts, with an index.json
    tokenizer.json      byte-level BPE: vocabulary, merges, how text is split before. Or vocab.json and merges.txt, GPT-2's

Its matrices are (in, out), for x W, where torch's Linear has (out, in); all else is called and shaped as in gpt.py.
"""

import functools
import itertools
import json
import re
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from data.files import InputError, read_bytes, write_atomic
from data.run import refused_if_broken
from data.tokenizer import PATTERN, SIGNS, SPECIAL_TOKENS, Tokenizer

CONV1D = re.compile(r"h\.\d+\.(attn|mlp)\.(c_attn|c_fc|c_proj)\.weight")   # the (in, out) matrices
MASK = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")          # in older files, and no weights
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

SIZES = {"vocab_size": "vocab_size", "n_positions": "block_size", "n_layer": "n_layer", "n_head": "n_head",
         "n_embd": "n_embd"}  # config.json's names, GPTConfig's
# What else config.json must say; where it is silent, transformers takes the first.
ARCHITECTURE = {"model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
                "layer_norm_epsilon": [1e-5], "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False],
                "add_cross_attention": [False], "tie_word_embeddings": [True]}
broken = functools.partial(refused_if_broken, advice="copy it again", of="a GPT-2")

# How tokenizer.json says which of the tokenizer's PATTERNS splits a text.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPLITS = {"gpt2": BYTE_LEVEL, "words": {"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
    {**BYTE_LEVEL, "use_regex": False}]}}

BYTES = {sign: byte for byte, sign in SIGNS.items()}
PAD = "<|pad|>"  # the exported tokenizer's name of the byte 0xFF, which no UTF-8 text holds

# In the chat format a user's "<|end|>" must stay text. The template puts a sign into every "<|" (and doubles it where a
# text has it), so no special token is found there; the normalizer, whose turn is after that search, takes it out again.
ESCAPE = "\ufdd0"  # a code point that is no character and never will be
NORMALIZER = {"type": "Replace", "pattern": {"Regex": f"{ESCAPE}(?=\\|)"}, "content": ""}
TEMPLATE = """{%- for message in messages -%}
{%- set text = message['content'] | replace('#|', '##|') | replace('<|', '<#|') -%}
{%- if message['role'] == 'user' and loop.index == 1 -%}{{ '<|user|>' + text }}
{%- elif message['role'] == 'assistant' and loop.index == 2 -%}{{ '<|assistant|>' + text + '<|end|>' }}
{%- else -%}{{ raise_exception('this model knows one exchange: a message of the user, then one of the assistant') }}
{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}""".replace("#", ESCAPE)


def read_folder(folder):
    """A GPT-2 from a folder: (GPTConfig's fields, weights {name in gpt.py: tensor}, Tokenizer, whether texts begin with
    <|end|>).

    The tensors are views of files mapped into memory, but for the token embedding, whose rows come into our order: the
    ordinary tokens as they are merged, then <|user|>, <|assistant|>, <|end|>. Of a GPT-2 as published, <|endoftext|> is
    <|end|>, and the other two are new: the mean of all rows.
    Raises InputError, one line that names the file and the tensor, for whatever is damaged or not a GPT-2.
    """
    folder = Path(folder)
    config, (tokenizer, rows), (origin, weights) = read_config(folder), read_tokenizer(folder), read_weights(folder)
    V, C, layers, tokens = config["vocab_size"], config["n_embd"], config["n_layer"], sum(row is not None for row in rows)
    if V != tokens or layers > len(weights):
        raise InputError(f"{folder / 'config.json'}: vocab_size is {V} and n_layer {layers}, but there are {tokens} tokens "
                         f"in the tokenizer, and {len(weights)} tensors")
    shapes = {"wte.weight": (V, C), "wpe.weight": (config["n_positions"], C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for h in (f"h.{layer}." for layer in range(layers)):
        for name, *shape in (("ln_1", C), ("attn.c_attn", C, 3 * C), ("attn.c_proj", C, C), ("ln_2", C),
                             ("mlp.c_fc", C, 4 * C), ("mlp.c_proj", 4 * C, C)):
            shapes.update({f"{h}{name}.weight": tuple(shape), f"{h}{name}.bias": (shape[-1],)})
    for name in [*shapes, *weights]:
        found, wanted = tuple(weights[name].shape) if name in weights else "missing", shapes.get(name, "none of a GPT-2's")
        if found != wanted:
            raise InputError(f"{origin}: the tensor {name} is {found}, but by config.json {wanted}")
    table = torch.cat([weights["wte.weight"].float(), weights["wte.weight"].float().mean(dim=0, keepdim=True)])
    weights["wte.weight"] = table[[V if row is None else row for row in rows]]
    weights = {name: x.T if CONV1D.fullmatch(name) else x for name, x in weights.items()}
    shape = {**{ours: config[theirs] for theirs, ours in SIZES.items()}, "vocab_size": len(rows)}
    return shape, weights, tokenizer, config.get("bos_token_id", 0) is not None


def read_json(path):
    """The JSON object in a file."""
    with broken(path):
        value = json.loads(read_bytes(path))
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
    return value


def read_config(folder):
    """config.json, of an architecture that gpt.py has."""
    path = folder / "config.json"
    config = read_json(path)
    for name, known in ARCHITECTURE.items():
        if config.get(name, known[0]) not in known:
            raise InputError(f"{path}: {name} is {config[name]!r:.60}, but gpt.py's is {' or '.join(map(repr, known))}")
    for name in SIZES:
        if type(config.get(name)) is not int or config[name] < 1:
            raise InputError(f"{path}: {name} is {config.get(name)!r:.60}, but must be a whole number above 0")
    if config["n_embd"] % config["n_head"] or config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise InputError(f"{path}: n_embd {config['n_embd']} must be a multiple of n_head, and n_inner be 4 times n_embd")
    return config


def read_weights(folder):
    """(the file that says which tensors there are, {name without "transformer.": tensor})."""
    names = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    origin = next((folder / name for name in names if (folder / name).exists()), folder / names[0])
    weights, places = {}, {}
    if origin.suffix == ".json":
        with broken(origin):
            places = {name: folder / part for name, part in read_json(origin)["weight_map"].items()}
    for path in dict.fromkeys(places.values()) if places else [origin]:
        part = read_part(path)
        lost = [name for name, place in places.items() if place == path and name not in part and not MASK.fullmatch(name)]
        if lost:
            raise InputError(f"{path}: the tensor {lost[0]} is missing, though {origin.name} says that it is there")
        weights.update((name.removeprefix("transformer."), x) for name, x in part.items())
    head, wte = weights.pop("lm_head.weight", None), weights.get("wte.weight")
    if head is not None and (wte is None or not torch.equal(head, wte)):
        raise InputError(f"{origin}: the tensor lm_head.weight is not wte.weight, but gpt.py's output matrix is tied to it")
    return origin, weights


def read_part(path):
    """The tensors of a .safetensors or .bin file: {name: view of its mapped bytes}, without attention masks."""
    if not path.exists():
        raise InputError(f"{path}: no such file")
    with broken(path):
        if path.suffix == ".bin":
            found = torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            dtypes = {name: x.dtype for name, x in found.items()}
        else:
            with open(path, "rb") as file:
                length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
                found = json.loads(file.read(min(length, size)))
            found.pop("__metadata__", None)
            spans = sorted(entry["data_offsets"] for entry in found.values())
            if [0, *(end for _, end in spans)] != [*(begin for begin, _ in spans), size - 8 - length]:
                raise ValueError("its tensors overlap, leave gaps, or are cut off")
            dtypes = {name: DTYPES.get(entry["dtype"], entry["dtype"]) for name, entry in found.items()}
        for name in [name for name in found if MASK.fullmatch(name)]:
            del found[name]
        for name, x in found.items():
            if dtypes[name] not in DTYPES.values():
                raise InputError(f"{path}: the tensor {name} is {dtypes[name]}; {', '.join(DTYPES)} can be read")
            if path.suffix != ".bin":
                begin, end = x["data_offsets"]  # each its own map, which goes with its tensor; torch wants writable memory
                data = np.memmap(path, np.uint8, mode="c", offset=8 + length + begin, shape=end - begin)
                found[name] = torch.from_numpy(data).view(dtypes[name]).view(x["shape"])
    return found


def read_tokenizer(folder):
    """(Tokenizer, for each of its tokens the row of the folder's embedding, None for one that the folder does not have)."""
    path, pattern, options = folder / "tokenizer.json", "gpt2", folder / "tokenizer_config.json"
    if options.exists() and read_json(options).get("add_prefix_space"):
        raise InputError(f"{options}: add_prefix_space is true, but not GPT-2's")
    if path.exists():
        with broken(path):
            found = read_json(path)
            model, split = found["model"], found["pre_tokenizer"]
            vocab = {**model["vocab"], **{token["content"]: token["id"] for token in found.get("added_tokens", [])}}
            merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
            if split["type"] == "ByteLevel":
                split = {**BYTE_LEVEL, **split, "trim_offsets": True}
            pattern = next((name for name, known in SPLITS.items() if split == known), None)
            odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback",
                                   "ignore_merges") if model.get(key)]
            if model["type"] != "BPE" or not pattern or odd or found.get("normalizer") not in (None, NORMALIZER):
                raise InputError(f"{path}: its {(odd or ['type, pre_tokenizer or normalizer'])[0]} is not a GPT-2's")
    else:
        path, vocab = folder / "merges.txt", read_json(folder / "vocab.json")
        lines = read_bytes(path).decode("utf-8", "replace").splitlines()
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    with broken(path):
        if {*map(type, vocab.values())} != {int} or sorted(vocab.values()) != [*range(len(vocab))]:
            raise ValueError("its ids are not the numbers from 0 on")
        made = [left + right for left, right in merges]  # the ordinary tokens are the bytes and these, in this order
        special = {token: vocab[token] for token in vocab.keys() - made if len(token) > 1}
        if PAD in special:
            vocab[SIGNS[0xFF]] = special.pop(PAD)
        order = sorted((token for token in vocab if len(token) == 1), key=vocab.get) + made
        spelled = {token: bytes(BYTES[sign] for sign in token) for token in order}
        tokenizer = Tokenizer(spelled.values(), pattern)
        if tokenizer.merges() != [(spelled[left], spelled[right]) for left, right in merges]:
            raise ValueError("its merges do not make its tokens in their order")
        rows = [vocab[token] for token in order]
    if special.keys() not in ({"<|endoftext|>"}, set(SPECIAL_TOKENS)):
        raise InputError(f"{path}: has the special tokens {', '.join(sorted(special)) or '(none)'}; known are "
                         f"<|endoftext|> alone, or {', '.join(SPECIAL_TOKENS)}")
    return tokenizer, [*rows, *map(special.get, SPECIAL_TOKENS[:2]), special.get("<|endoftext|>", special.get("<|end|>"))]


def write_folder(folder, shape, weights, tokenizer, begins=True, temperature=1.0):
    """Write a model as a folder for AutoModelForCausalLM, a reward model as one for AutoModelForSequenceClassification, and
    its tokenizer for AutoTokenizer. Padding is PAD: who looks for the last token that is none finds <|end|>.

    shape: GPTConfig's fields; weights: the state_dict of a GPT or a RewardModel; begins: whether its texts begin with
    <|end|>; temperature: to sample at. All or nothing; InputError if the folder is there already.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder}: is there already; choose another folder, or delete it")
    weights = {name.removeprefix("trunk."): x.detach().float().cpu() for name, x in weights.items()}
    w, b = (weights.pop(f"head.{kind}", None) for kind in ("weight", "bias"))
    if w is not None:  # that class has no b, so ln_f's bias takes it: r = w·(x + b w/w·w) = w·x + b
        weights["ln_f.bias"] = weights["ln_f.bias"] + (b * w / (w * w).sum().clamp(min=1e-30))[0]
    tensors = {f"transformer.{name}": x.T if CONV1D.fullmatch(name) else x for name, x in weights.items()}
    tensors.update({} if w is None else {"score.weight": w})

    names = ["".join(SIGNS[byte] for byte in token) for token in tokenizer.vocabulary] + list(SPECIAL_TOKENS)
    merges = [["".join(SIGNS[byte] for byte in half) for half in pair] for pair in tokenizer.merges()]
    end, pad = tokenizer.end_token, tokenizer.vocabulary.index(b"\xff")
    names[pad] = PAD
    ids = {"bos_token_id": end if begins else None, "eos_token_id": end, "pad_token_id": pad}
    flags = {"special": True, **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)}
    files = {
        "config.json": {
            "architectures": ["GPT2LMHeadModel" if w is None else "GPT2ForSequenceClassification"],
            **{name: known[0] for name, known in ARCHITECTURE.items()}, **({} if w is None else {"num_labels": 1}),
            **{theirs: shape[ours] for theirs, ours in SIZES.items()}, **ids, "torch_dtype": "float32",
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)},
        "generation_config.json": {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, **ids,
                                   "max_length": shape["block_size"]},
        "tokenizer.json": {
            "version": "1.0", "normalizer": NORMALIZER, "pre_tokenizer": SPLITS[tokenizer.pattern], "decoder": BYTE_LEVEL,
            "added_tokens": [{"id": i, "content": names[i], **flags} for i in (pad, end - 2, end - 1, end)],
            "model": {"type": "BPE", "vocab": {name: i for i, name in enumerate(names)}, "merges": merges}},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, "eos_token": "<|end|>",
            "pad_token": PAD, "model_max_length": shape["block_size"], "clean_up_tokenization_spaces": False}}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": "F32", "shape": x.shape, "data_offsets": [end, end := end + 4 * x.numel()]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    parts = itertools.chain([len(text).to_bytes(8, "little"), text], (x.contiguous().numpy() for x in tensors.values()))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        whole = Path(temporary) / folder.name
        whole.mkdir()
        for name, content in files.items():
            write_atomic(whole / name, json.dumps(content, indent=1))
        write_atomic(whole / "model.safetensors", lambda file: file.writelines(parts))
        whole.rename(folder)
