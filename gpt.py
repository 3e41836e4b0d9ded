"""
gpt.py: a small GPT from scratch, and stage 1 of the pipeline, pretraining.

The model is GPT-2's (Radford et al. 2019): learned positions, pre-LayerNorm blocks, tanh-GELU, tied embeddings.
Pretraining is next-token prediction, max_θ E_{x~D} Σ_t log p_θ(x_t | x_{<t})  (CS 224R, Lecture 9, ch. 3).

    python gpt.py                           pretrain on the little world (data/stories.py), no download
    python gpt.py --text FILE               pretrain on any UTF-8 text file
    python gpt.py --sample "Once"           print samples from the checkpoint

Here also stand the conventions that every later file keeps:
    Sequences are prompt + response + <|end|>, padded on the RIGHT: a causal model never sees the padding after a
    token, so attention needs no mask and positions need no arithmetic.
    The shift happens once, in token_logprobs: per-token tensors are (B, T-1), and column t belongs to the action
    "emit tokens[:, t+1]" taken in the state tokens[:, :t+1].
    Masks come from lengths, never from token values (padding may be any token, <|end|> too).
"""

import argparse
import contextlib
import inspect
import io
import json
import math
import pickle
import random
import re
import time
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import stories
from data.files import InputError, read_text, run_script, write_atomic
from data.tokenizer import Tokenizer, train as train_vocabulary

# ----------------------------------------------------------------------------------------------------------------------
# The model


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT."""

    vocab_size: int         # exactly the tokenizer's, specials included
    block_size: int         # context: the longest sequence, in tokens
    n_layer: int
    n_head: int
    n_embd: int             # width C
    dropout: float = 0.0    # 0: the policy that is scored must be the policy that was sampled


class Attention(nn.Module):
    """Causal multi-head self-attention; with a cache, over the keys and values of the tokens before."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} must be a multiple of n_head={config.n_head}")
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, positions=None, visible=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)  # each (B, T, heads, C/heads)
        if cache is None:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, C/heads)
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        else:
            rows = torch.arange(B, device=x.device)[:, None]  # (B, 1)
            keys, values = cache  # (B, S, heads, C/heads)
            keys[rows, positions] = k.to(keys.dtype)  # every row writes at its own position
            values[rows, positions] = v.to(values.dtype)
            seen = visible.shape[-1]  # the longest row so far
            y = F.scaled_dot_product_attention(q.transpose(1, 2).to(keys.dtype), keys[:, :seen].transpose(1, 2),
                                               values[:, :seen].transpose(1, 2), attn_mask=visible)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two linear layers, four times as wide between them."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, positions=None, visible=None):
        x = x + self.drop(self.attn(self.ln_1(x), cache, positions, visible))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """GPT-2. The output matrix is the token embedding's (tied), so the model has no other head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        # GPT-2's initialization, but for the scale: its 0.02 suits a width of 768; so small in a narrow model, attention
        # starts out flat and learns to copy a name from the sentences before only after twice as many tokens.
        std = config.n_embd ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2 residual branches a layer: their sum keeps its variance
                nn.init.normal_(parameter, std=std / math.sqrt(2 * config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, tokens, caches=None, positions=None, visible=None):
        """tokens (B, T) -> (B, T, C), after the final LayerNorm: what a head reads (never normalize it again)."""
        if tokens.shape[1] > self.config.block_size:
            raise ValueError(f"{tokens.shape[1]} tokens do not fit the context of {self.config.block_size}")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)  # (T,): the same for every row
        x = self.drop(self.wte(tokens) + self.wpe(positions))  # (B, T, C)
        for layer, block in enumerate(self.h):
            x = block(x, caches and caches[layer], positions, visible)
        return self.ln_f(x)

    def logits(self, x):
        """x (..., C) -> (..., V), never in bf16: a logit near 10 would be rounded to 1/16, and PPO's ratio with it."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.wte.weight.dtype), self.wte.weight)

    def forward(self, tokens):
        """tokens (B, T) -> logits (B, T, V); logits[:, t] is the prediction of tokens[:, t+1]."""
        return self.logits(self.hidden(tokens))


# ----------------------------------------------------------------------------------------------------------------------
# Log-probabilities, masks, sampling


def token_logprobs(logits, tokens, temperature=1.0):
    """The log-probability, in nats, of every token given the tokens before it.

    logits (B, T, V), tokens (B, T) -> (B, T-1): column t is log π(tokens[:, t+1] | tokens[:, :t+1]), with
    π = softmax(logits / temperature). This is the only place where logits and tokens are shifted.
    """
    logits = logits[:, :-1].float() / temperature  # (B, T-1, V); float32 also under bf16 autocast
    chosen = logits.gather(2, tokens[:, 1:, None]).squeeze(2)  # (B, T-1)
    return chosen - logits.logsumexp(dim=2)


def response_mask(prompt_lengths, lengths, T):
    """True where the emitted token belongs to the response, <|end|> included.

    prompt_lengths (B,), lengths (B,) (prompt + response) -> bool (B, T-1), aligned with token_logprobs.
    >>> response_mask(torch.tensor([2]), torch.tensor([4]), T=6).int().tolist()
    [[0, 1, 1, 0, 0]]
    """
    emitted = torch.arange(1, T, device=lengths.device)  # column t emits the token at position t+1
    return (emitted >= prompt_lengths[:, None]) & (emitted < lengths[:, None])


def pad(sequences, device="cpu"):
    """Lists of ids -> (tokens (B, T) padded on the right with 0, lengths (B,))."""
    rows = [torch.as_tensor(sequence, dtype=torch.long) for sequence in sequences]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device), lengths


def batches_by_length(lengths, batch, rng):
    """The indices of all rows, shuffled, in lists of `batch`. Rows of one list have about the same length, so little of a
    batch is padding: each run of 16 batches is sorted by length, then the batches are shuffled."""
    order = rng.sample(range(len(lengths)), len(lengths))
    batches = []
    for start in range(0, len(order), 16 * batch):
        group = sorted(order[start:start + 16 * batch], key=lengths.__getitem__)
        batches += [group[i:i + batch] for i in range(0, len(group), batch)]
    rng.shuffle(batches)
    return batches


class Rollout(NamedTuple):
    """Sampled sequences. tokens (B, T), right-padded with 0; prompt_lengths (B,); lengths (B,), prompt + response."""
    tokens: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor

    def ended(self, end_token):
        """(B,) bool: the response's last token is end_token (false: it hit the length limit)."""
        return self.tokens.gather(1, self.lengths[:, None] - 1).squeeze(1) == end_token

    def responses(self):
        """The responses' ids as lists, end_token included where there is one."""
        ranges = zip(self.tokens.tolist(), self.prompt_lengths.tolist(), self.lengths.tolist())
        return [row[start:stop] for row, start, stop in ranges]


@torch.no_grad()
def generate(model, prompts, max_new_tokens, end_token=None, temperature=1.0, top_k=None, seed=None):
    """Sample one response for each prompt, all in one batch, with a key-value cache.

    prompts: lists of ids, of any lengths; end_token ends a response (None: never stops early); top_k keeps the k
    likeliest tokens (None: all; training rollouts must not truncate; 1 is greedy decoding); seed: an int for
    a reproducible draw. A row's draw depends on its place in the batch, the seed and max_new_tokens, not on its
    neighbours (on a GPU also on the size of the batch). Returns a Rollout. A response that hits max_new_tokens has no end_token.
    Raises ValueError if a prompt is empty or prompt + max_new_tokens exceed the context (then InputError, a
    ValueError), FloatingPointError if the model's probabilities are not finite.
    """
    config, device = model.config, model.wte.weight.device
    if min(map(len, prompts)) < 1 or max_new_tokens < 1 or temperature <= 0:
        raise ValueError("generate needs prompts of at least one token, max_new_tokens >= 1 and temperature > 0")
    longest = max(map(len, prompts))
    if longest + max_new_tokens > config.block_size:
        raise InputError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of "
                         f"{config.block_size}: shorten the prompt or lower max_new_tokens")
    was_training = model.training
    model.eval()
    padded, prompt_lengths = pad(prompts, device)
    B = len(prompts)
    tokens = F.pad(padded, (0, max_new_tokens))  # (B, S)
    lengths = prompt_lengths.clone()
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    uniforms = torch.rand(B, max_new_tokens, dtype=torch.float64, device=device, generator=generator)

    # Prefill: all prompts at once. What padding writes into the cache is overwritten before it can be seen, because
    # a row's next token goes to the position right after its prompt, and sees no position beyond its own.
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.wte.weight.dtype
    shape = (B, tokens.shape[1], config.n_head, config.n_embd // config.n_head)
    # Zeros, not empty memory: a masked key has weight 0, but 0 times the nan that may lie there is nan.
    caches = [(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
              for _ in range(config.n_layer)]
    positions = torch.arange(longest, device=device).expand(B, longest)
    slots = torch.arange(tokens.shape[1], device=device)
    visible = slots[:longest] <= positions[:, None, :, None]  # (B, 1, T, S): key at or before the query
    x = model.hidden(padded, caches, positions, visible)
    x = x[torch.arange(B, device=device), prompt_lengths - 1]  # (B, C): the last token of each prompt

    rows = torch.arange(B, device=device)  # the rows still in the batch
    done = torch.zeros(B, dtype=torch.bool, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        logits = model.logits(x).double() / temperature  # (b, V)
        if top_k is not None and top_k < logits.shape[1]:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
        # Sample by inverting the distribution function: the first token whose cumulative probability exceeds u.
        cumulative = logits.softmax(dim=1).cumsum(dim=1)
        finite &= cumulative[:, -1].isfinite().all()
        u = uniforms[rows, t, None] * cumulative[:, -1:]
        new = torch.searchsorted(cumulative, u, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
        position = lengths[rows]  # (b,): where the new token goes
        tokens[rows, position] = torch.where(done, 0, new)
        lengths[rows] = position + ~done
        if end_token is not None:
            done = done | (new == end_token)
        if t == max_new_tokens - 1:
            break
        if t % 8 == 7 and end_token is not None:  # a look at the data makes a GPU wait: only now and then
            keep = (~done).nonzero().squeeze(1)
            if len(keep) == 0:
                break
            if len(keep) <= 0.75 * len(rows):  # rows that have ended leave the batch
                rows, done, new, position = rows[keep], done[keep], new[keep], position[keep]
                caches = [(keys[keep], values[keep]) for keys, values in caches]
        visible = (slots[:longest + t + 1] <= position[:, None])[:, None, None, :]  # (b, 1, 1, S)
        x = model.hidden(new[:, None], caches, position[:, None], visible).squeeze(1)
    model.train(was_training)
    if not finite:
        raise FloatingPointError("the model's probabilities are not finite: its weights or its input are broken")
    return Rollout(tokens[:, :int(lengths.max())], prompt_lengths, lengths)


def response_texts(rollout, tokenizer):
    """The responses of a Rollout as strings, without <|end|>."""
    ended = rollout.ended(tokenizer.end_token).tolist()
    return [tokenizer.decode(ids[:-1] if end else ids) for ids, end in zip(rollout.responses(), ended)]


def respond(model, tokenizer, prompts, max_new_tokens, seed):
    """Sample a response for each prompt (lists of ids). Returns (texts without <|end|>, ended: list of bool)."""
    with autocast(model.wte.weight.device):
        rollout = generate(model, prompts, max_new_tokens, tokenizer.end_token, seed=seed)
    return response_texts(rollout, tokenizer), rollout.ended(tokenizer.end_token).tolist()


# ----------------------------------------------------------------------------------------------------------------------
# What every stage needs: command line, device, checkpoints, log, optimizer


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def parse_config(Config, gpu, argv, description):
    """Build a Config from the command line. Every field is a flag; the comment on its line is its help.

    gpu: what --size gpu changes of the defaults. Fields must have the type int, float, str or bool.
    """
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    parser = _Parser(description=description, allow_abbrev=False)
    for field in fields(Config):
        default = f"{field.default!r}" + (f"; gpu: {gpu[field.name]!r}" if field.name in gpu else "")
        kind = dict(action=argparse.BooleanOptionalAction) if field.type is bool else dict(type=field.type)
        parser.add_argument(f"--{field.name}", default=None, **kind,
                            help=f"{comments[field.name]} (default: {default})".replace("%", "%%"))
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    size = given.get("size", "auto")
    if size == "auto":
        size = "gpu" if torch.cuda.is_available() else "cpu"
    if size not in ("cpu", "gpu"):
        raise InputError(f"--size {size}: say cpu, gpu or auto")
    config = Config(**{**(gpu if size == "gpu" else {}), **given, "size": size})
    for field in fields(Config):
        value = getattr(config, field.name)
        if field.type is int and value < (0 if field.name == "seed" else 1):
            raise InputError(f"--{field.name} {value}: must be positive")
        if field.type is float and (not math.isfinite(value) or value < 0 <= field.default):
            raise InputError(f"--{field.name} {value}: must be a number, and not negative")
        if given.get(field.name) == "":  # an unset variable of the shell's must not mean another job
            raise InputError(f"--{field.name}: is empty; leave the flag away or give it a value")
    return config


def counts(dropped):
    """{reason: number} as text: "0 equal texts, 3 longer than the context"."""
    return ", ".join(f"{number} {reason}" for reason, number in dropped.items())


def stage_folder(config, stage):
    """out/<size>/<stage>: where a stage keeps its checkpoint, metrics.jsonl and data."""
    return Path(config.out) / config.size / stage


def check_name(name, stage):
    """--name of a PPO or DPO run begins with its stage, so that no run can overwrite another stage's folder."""
    if not re.fullmatch(rf"{stage}[\w.-]*", name):
        raise InputError(f"--name {name}: must be {stage}, or {stage} and letters, digits, '.', '_' or '-' behind it")


def get_device():
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device):
    """bf16 on a GPU, plain float32 on the CPU. Losses and log-probabilities are float32 either way."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def announce(stage, config, device, data, model):
    """The first lines of every stage: device, size, data and where it saves."""
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    parameters = sum(p.numel() for p in model.parameters())
    print(f"\n== {stage} ==\ndevice  {where}, size {config.size}, seed {config.seed}\n"
          f"model   {parameters:,} parameters, context {model.config.block_size}\n"
          f"data    {data}\nsaves   {stage_folder(config, stage)}", flush=True)


def show(*lines):
    """Print (label, text) pairs, the texts in one column."""
    for label, text in lines:
        print(f"{label:9s}" + text.replace("\n", "\n" + 9 * " "), flush=True)


def train_if_missing(stage, main, config):
    """Run an earlier stage's main, with this run's size, folder and seed, if its checkpoint is not there."""
    path = stage_folder(config, stage) / "checkpoint.pt"
    if not path.exists():
        print(f"{path} is missing: training the stage {stage} first", flush=True)
        main(["--size", config.size, "--out", config.out, "--seed", str(config.seed)])


class Log:
    """Writes one JSON object a line to metrics.jsonl and prints the same row, but for the figures named in unprinted.

    A new Log begins a new file.
    """

    def __init__(self, folder, total, unprinted=()):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = open(folder / "metrics.jsonl", "w", encoding="utf-8")
        self.start, self.total, self.unprinted, self.header = time.perf_counter(), total, unprinted, False

    def __call__(self, step, **row):
        """row: name -> number. Names are printed once, above their columns; left is the time the stage still needs."""
        seconds = self.record(step, **row)
        row = {name: value for name, value in row.items() if name not in self.unprinted}
        if not self.header:
            self.header = True
            print("     step  " + "  ".join(f"{name:>8s}" for name in row) + "    left")
        minutes, rest = divmod(round(seconds / step * (self.total - step)), 60)
        columns = "  ".join(f"{value:{max(8, len(name))}{'.1e' if 0 < abs(value) < 1e-3 else '.4f'}}"
                            for name, value in row.items())
        print(f"{step:4d}/{self.total:<4d}  {columns}  {minutes:3d}:{rest:02d}", flush=True)

    def record(self, step, **row):
        """Write a row without printing it. Returns the seconds since the stage began."""
        seconds = time.perf_counter() - self.start
        self.file.write(json.dumps({"step": step, **row, "seconds": round(seconds, 2)}) + "\n")
        self.file.flush()
        return seconds


def save_checkpoint(path, stage, size, model, tokenizer, **extra):
    """Write a model with all that is needed to use it: stage, size, GPTConfig, vocabulary. Atomic.

    extra: more values that torch.load(weights_only=True) accepts (numbers, strings, lists, dicts, tensors).
    """
    checkpoint = {"stage": stage, "size": size, "config": asdict(model.config), "vocabulary": tokenizer.to_strings(),
                  "model": model.state_dict(), **extra}
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomic(path, buffer.getvalue())


def load_checkpoint(path, stage, size, device="cpu", model_class=GPT):
    """Read what save_checkpoint wrote: (model, tokenizer, the whole dict). Nothing in the file can run code.

    Raises InputError, one line that names the file, if it is missing, corrupt, or of another stage or size.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:  # torch's format is a zip archive with a checksum for every record
            # A byte of these attributes is in no checksum, and torch would skip a record that has one.
            if archive.testzip() is not None or any(record.external_attr for record in archive.infolist()):
                raise zipfile.BadZipFile("checksum error")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found = checkpoint["stage"], checkpoint["size"]
        if found != (stage, size):
            raise InputError(f"{path}: is a {found[0]} checkpoint of size {found[1]}, "
                             f"but {stage} of size {size} is wanted")
        tokenizer = Tokenizer.from_strings(checkpoint["vocabulary"])
        config = GPTConfig(**checkpoint["config"])
        if config.vocab_size != tokenizer.n_vocab:
            raise ValueError(f"the model has {config.vocab_size} tokens, its tokenizer {tokenizer.n_vocab}")
        model = model_class(config)
        model.load_state_dict(checkpoint["model"])
    except InputError:
        raise
    except (zipfile.BadZipFile, pickle.UnpicklingError, OSError, RuntimeError, ValueError, LookupError, TypeError, EOFError,
            ArithmeticError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a whole checkpoint of this project ({reason}); delete it and train the stage "
                         f"again") from error
    return model.to(device), tokenizer, checkpoint


def make_optimizer(model, weight_decay):
    """AdamW with weight decay on matrices only, not on biases and gains. optimizer_step sets the learning rate."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over `warmup` steps, then a cosine from peak down to 0 at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def optimizer_step(optimizer, model, lr, max_norm=1.0):
    """Clip the gradient's norm, take a step with the learning rate lr, clear the gradient. Returns the norm.

    Raises FloatingPointError, and takes no step, if the norm is not finite.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"gradient norm {norm}: no step taken; lower the learning rate")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def held_out_loss(model, sequences, prompt_lengths, rows=64):
    """Nats per token, a mean over all response tokens of all sequences (lists of ids), prompts not counted."""
    device = model.wte.weight.device
    total, count = 0.0, 0
    for start in range(0, len(sequences), rows):
        tokens, lengths = pad(sequences[start:start + rows], device)
        with autocast(device):
            logprobs = token_logprobs(model(tokens), tokens)
        prompts = torch.tensor(prompt_lengths[start:start + rows], device=device)
        mask = response_mask(prompts, lengths, tokens.shape[1])
        total -= logprobs[mask].double().sum().item()
        count += int(mask.sum())
    return total / count


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining


@dataclass
class Config:
    size: str = "auto"          # cpu or gpu; auto takes gpu where there is one
    out: str = "out"            # folder of all outputs; this stage writes to OUT/SIZE/gpt
    seed: int = 1               # fixes weights, data and samples
    text: str = ""              # pretrain on this text file instead of the little world
    sample: str = ""            # print three continuations of this text from the checkpoint, and stop
    vocab_size: int = 1472      # tokens at most, the three special ones included; the world's words fill some 1,440
    block_size: int = 128       # context in tokens
    n_layer: int = 4            # transformer blocks
    n_head: int = 4             # attention heads in a block
    n_embd: int = 128           # width
    steps: int = 1200           # optimizer steps
    batch: int = 32             # documents in a step; of a text file, windows of block_size tokens
    lr: float = 3e-3            # peak learning rate (linear warm-up, cosine to zero)
    warmup: int = 50            # steps of warm-up
    weight_decay: float = 0.1   # AdamW's, on matrices only
    report: int = 100           # steps between two reports


GPU = dict(block_size=256, n_layer=8, n_head=8, n_embd=512, steps=2000, batch=128, lr=1e-3, warmup=100)


def train(config):
    """Pretrain a GPT and save it to OUT/SIZE/gpt/checkpoint.pt."""
    folder, device = stage_folder(config, "gpt"), get_device()
    if config.n_embd % config.n_head:
        raise InputError(f"--n_embd {config.n_embd} must be a multiple of --n_head {config.n_head}")
    if config.vocab_size < 259:
        raise InputError(f"--vocab_size {config.vocab_size}: 256 bytes and 3 special tokens need at least 259")
    torch.manual_seed(config.seed)  # weights' initialization: the one draw that torch makes from its own generator
    rng = random.Random(f"pretraining {config.seed}")

    # 1. Text, tokenizer, tokens; what is held out.
    if config.text:
        text = read_text(config.text)
        tokenizer = Tokenizer(train_vocabulary(text, config.vocab_size))
        tokens = np.array(tokenizer.encode(text))
        cut = len(tokens) * 9 // 10
        train_tokens, rest = tokens[:cut], tokens[cut:]
        held_out = [window.tolist() for window in np.split(rest, range(config.block_size, len(rest), config.block_size))
                    if len(window) > 1]
        if cut < config.block_size or not held_out:
            raise InputError(f"{config.text}: {len(tokens)} tokens are too few for a context of {config.block_size}")
        source, start = None, []
        offsets = rng.choices(range(cut - config.block_size + 1), k=config.steps * config.batch)
        sequences = [train_tokens[i:i + config.block_size] for i in offsets]  # random windows; views, no copies
        data = f"{config.text}: {cut:,} tokens to train on, the last {len(rest):,} held out"
    else:
        sample_text = "\n".join(stories.document(rng).text for _ in range(4000))
        tokenizer = Tokenizer(train_vocabulary(sample_text, config.vocab_size))
        held_out_rng = random.Random("held-out documents")
        documents = [stories.document(held_out_rng) for _ in range(500)]
        texts = [stories.document(rng).text for _ in range(config.steps * config.batch)]
        # A row is one whole document, between two <|end|>: no row begins in the middle of a story, where nobody can know
        # whose story it is, so the loss compares with the source's entropy.
        start = [tokenizer.end_token]
        held_out, sequences = ([start + ids + [tokenizer.end_token] for ids in tokenizer.encode_batch(batch)]
                               for batch in ([document.text for document in documents], texts))
        source = -sum(document.logprob for document in documents) / sum(len(ids) - 1 for ids in held_out)
        data = (f"the little world: {len(sequences):,} fresh documents, {sum(map(len, sequences)):,} tokens; "
                f"{len(documents)} documents held out")
    longest = max(map(len, held_out + sequences))
    if longest > config.block_size:
        raise InputError(f"--block_size {config.block_size}: the longest document has {longest} tokens")
    shape = GPTConfig(tokenizer.n_vocab, config.block_size, config.n_layer, config.n_head, config.n_embd)
    model = GPT(shape).to(device)
    optimizer = make_optimizer(model, config.weight_decay)
    announce("gpt", config, device, data, model)
    prefix = [start + tokenizer.encode("Once" if start else "\n")] * 2
    room = min(60, config.block_size - len(prefix[0]))
    before, _ = respond(model, tokenizer, prefix, room, config.seed)

    # 2. Next-token prediction.
    log, losses = Log(folder, config.steps), []
    for step, batch in enumerate(batches_by_length(list(map(len, sequences)), config.batch, rng)):
        tokens, lengths = pad([sequences[i] for i in batch], device)  # (B, T)
        mask = response_mask(torch.ones_like(lengths), lengths, tokens.shape[1])  # all but the padding
        with autocast(device):
            logits = model(tokens)
        loss = -(token_logprobs(logits, tokens) * mask).sum() / mask.sum()  # -Σ_t log p_θ(x_t | x_{<t})  (CS 224R, ch. 3)
        loss.backward()
        losses.append(loss.detach())
        lr = learning_rate(step, config.steps, config.lr, config.warmup)
        norm = optimizer_step(optimizer, model, lr)
        if (step + 1) % config.report == 0 or step + 1 == config.steps:
            held_out_nats = held_out_loss(model, held_out, [1] * len(held_out))
            row = dict(loss=torch.stack(losses).mean().item(), held_out=held_out_nats)
            if source:
                row.update(entropy=source, excess=held_out_nats / source - 1)
            log(step + 1, **row, grad_norm=norm, lr=lr)
            losses = []

    # 3. Save; the same beginning before and after.
    save_checkpoint(folder / "checkpoint.pt", "gpt", config.size, model, tokenizer, text=config.text)
    after, _ = respond(model, tokenizer, prefix, room, config.seed)
    opening = tokenizer.decode(prefix[0][len(start):])
    show(*[("before", opening + text) for text in before], *[("after", opening + text) for text in after])
    print(f"saved {folder / 'checkpoint.pt'}; next: python sft.py", flush=True)


def sample(config):
    """Print three continuations of config.sample from the stage's checkpoint."""
    model, tokenizer, checkpoint = load_checkpoint(stage_folder(config, "gpt") / "checkpoint.pt", "gpt", config.size,
                                                   get_device())
    start = [] if checkpoint["text"] else [tokenizer.end_token]
    prompt = start + tokenizer.encode(config.sample)
    room = model.config.block_size - len(prompt)
    if room < 1:
        raise InputError(f"--sample: {len(prompt)} tokens leave no room in the context of {model.config.block_size}")
    texts, _ = respond(model, tokenizer, [prompt] * 3, room, config.seed)
    for text in texts:
        print(f"{config.sample}{text}\n")


def main(argv=None):
    config = parse_config(Config, GPU, argv, "Pretrain a small GPT on the little world or on a text file.")
    if config.sample:
        sample(config)
    else:
        train(config)


if __name__ == "__main__":
    run_script(main)
