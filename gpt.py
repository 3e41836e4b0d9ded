"""
gpt.py: a small GPT from scratch, and stage 1 of the pipeline, pretraining.

The model is GPT-2's (Radford et al. 2019): learned positions, pre-LayerNorm blocks, tanh-GELU, tied embeddings.
Pretraining is next-token prediction, max_θ E_{x~D} Σ_t log p_θ(x_t | x_{<t})  (CS 224R, Lecture 9, ch. 3).

    python gpt.py                           pretrain on the little world (data/stories.py), no download
    python gpt.py --text FILE               pretrain on any UTF-8 text file
    python gpt.py --sample "Once"           print samples from the checkpoint
    python gpt.py --resume                  go on with a run that was interrupted (every stage has this flag)
    python gpt.py --bench                   how fast it trains and samples, beside the machine's limits

Here also stand the conventions that every later file keeps:
    Sequences are prompt + response + <|end|>, padded on the RIGHT: a causal model never sees the padding after a
    token, so attention needs no mask and positions need no arithmetic.
    The shift happens in token_logprobs and masked_logits, and nowhere else: per-token tensors are (B, T-1), and column t
    belongs to the action "emit tokens[:, t+1]" taken in the state tokens[:, :t+1].
    Masks come from lengths, never from token values (padding may be any token, <|end|> too).
"""

import argparse
import contextlib
import inspect
import io
import itertools
import math
import pickle
import random
import re
import resource
import signal
import statistics
import sys
import time
import zipfile
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import stories
from data.files import InputError, lock_folder, read_bytes, read_text, run_script, write_atomic, write_jsonl
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

    def forward(self, x, cache=None, slot=0, visible=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).transpose(1, 3)  # (B, heads, 3, T, C/heads)
        q, k, v = qkv.unbind(2)  # each (B, heads, T, C/heads)
        if cache is not None:
            cache[:, :, :, slot:slot + T] = qkv.movedim(2, 0)[1:]  # (2, B, heads, T, C/heads)
            if visible is not None:
                k, v = cache[:, :, :, :slot + T].unbind(0)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None, dropout_p=dropout)
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

    def forward(self, x, places=None, cache=None, slot=0, visible=None):
        x = x + self.drop(self.attn(self.ln_1(x), cache, slot, visible))
        if places is not None:
            x = x[places]  # (B, T, C) -> (N, C)
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """GPT-2. The output matrix is the token embedding's (tied), so the model has no other head.

    generator: a torch.Generator for the initial weights; None takes torch's own.
    """

    def __init__(self, config, generator=None):
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
                nn.init.normal_(parameter, std=std / math.sqrt(2 * config.n_layer), generator=generator)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, tokens, places=None, cache=None, slot=0, positions=None, visible=None):
        """tokens (B, T) -> (B, T, C), after the final LayerNorm: what a head reads (never normalize it again).

        places (B, T), bool, asks for its N true places only, row after row: (N, C). After the last attention no token
        looks at another, so the last MLP leaves the other places out.
        cache (layers, 2, B, heads, S, C/heads) takes the keys and values of all tokens, from slot on. With visible
        (B, 1, 1, slot + 1) too, the one token of each row attends to the cache's slots, to those where visible is 0 and
        not where it is -inf.
        """
        if tokens.shape[1] > self.config.block_size:
            raise ValueError(f"{tokens.shape[1]} tokens do not fit the context of {self.config.block_size}")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)  # (T,): the same for every row
        x = self.drop(self.wte(tokens) + self.wpe(positions))  # (B, T, C)
        for layer, block in enumerate(self.h):
            x = block(x, places if block is self.h[-1] else None, None if cache is None else cache[layer], slot, visible)
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


class LogSoftmaxGather(torch.autograd.Function):
    """logits.log_softmax(-1) at `chosen`, with its gradient by hand: autograd's would fill a second (..., V) with zeros."""

    @staticmethod
    def forward(ctx, logits, chosen):
        logprobs = logits.log_softmax(dim=-1)
        ctx.save_for_backward(logprobs, chosen)
        return logprobs.gather(-1, chosen[..., None]).squeeze(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        logprobs, chosen = ctx.saved_tensors
        grad = grad[..., None]
        # ∂ log π(a) / ∂ logit_v = 1[v = a] - π(v)
        return logprobs.exp().mul_(-grad).scatter_add_(-1, chosen[..., None], grad), None


def chosen_logprobs(logits, chosen, temperature=1.0):
    """log π(chosen) in nats, with π = softmax(logits / temperature), in float32: logits (..., V), chosen (...) -> (...)."""
    if temperature != 1.0:
        logits = logits / temperature
    return LogSoftmaxGather.apply(logits.float(), chosen)


def token_logprobs(logits, tokens, temperature=1.0):
    """The log-probability, in nats, of every token given the tokens before it. (masked_logprobs is the fast way to it.)

    logits (B, T, V), tokens (B, T) -> (B, T-1): column t is log π(tokens[:, t+1] | tokens[:, :t+1]), with
    π = softmax(logits / temperature).
    """
    return chosen_logprobs(logits[:, :-1], tokens[:, 1:], temperature)


def place(x, mask):
    """x (N,) at the N true places of mask, row after row, and 0 elsewhere: what x = tensor[mask] took out.

    >>> place(torch.tensor([3.0, 4.0]), torch.tensor([[False, True], [True, False]])).tolist()
    [[0.0, 3.0], [4.0, 0.0]]
    """
    return torch.zeros(mask.shape, dtype=x.dtype, device=mask.device).masked_scatter(mask, x)


def masked_logits(model, tokens, mask):
    """The logits at the N true places of mask only, row after row: what a prompt or the padding predicts, no loss needs.

    tokens (B, T), mask (B, T-1) -> (logits (N, V), the tokens emitted there (N,)).
    """
    with autocast(tokens.device):
        hidden = model.hidden(tokens, F.pad(mask, (0, 1)))  # (N, C): the last token of a row predicts nothing
    return model.logits(hidden), tokens[:, 1:][mask]


def masked_logprobs(model, tokens, mask, temperature=1.0):
    """token_logprobs where mask is true, and 0 elsewhere: tokens (B, T), mask (B, T-1) -> (B, T-1)."""
    return place(chosen_logprobs(*masked_logits(model, tokens, mask), temperature), mask)


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
    neighbours (on a GPU also on the size of the batch). Returns a Rollout; a response that hits max_new_tokens has no
    end_token.
    Raises ValueError if a prompt is empty or prompt + max_new_tokens exceed the context (then InputError, a
    ValueError), FloatingPointError if the model's probabilities are not finite.
    """
    config, device = model.config, model.wte.weight.device
    if min(map(len, prompts), default=0) < 1 or max_new_tokens < 1 or temperature <= 0:
        raise ValueError("generate needs prompts of at least one token, max_new_tokens >= 1 and temperature > 0")
    longest = max(map(len, prompts))
    if longest + max_new_tokens > config.block_size:
        raise InputError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of "
                         f"{config.block_size}: shorten the prompt or lower max_new_tokens")
    was_training = model.training
    model.eval()
    prompt_tokens, prompt_lengths = pad(prompts, device)  # (B, longest)
    B = len(prompts)
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    uniforms = torch.rand(B, max_new_tokens, dtype=torch.float64, device=device, generator=generator)

    # 1. Prefill: all prompts at once; no prompt sees the padding behind it. A cache slot is not a position: the prompts
    # fill the slots up to the longest one's length, and the token of step t goes to slot longest + t in every row.
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.wte.weight.dtype
    slots = torch.arange(longest + max_new_tokens, device=device)  # (S,)
    cache = torch.empty(config.n_layer, 2, B, config.n_head, len(slots), config.n_embd // config.n_head, dtype=dtype,
                        device=device)
    last = slots[:longest] == prompt_lengths[:, None] - 1  # (B, longest)
    hidden = model.hidden(prompt_tokens, last, cache)  # (B, C): at the last token of each prompt
    padding = (slots >= prompt_lengths[:, None]) & (slots < longest)
    visible = torch.zeros(B, 1, 1, len(slots), dtype=dtype, device=device).masked_fill(padding[:, None, None], -math.inf)

    # 2. Decode: one token a row and step, until all have ended.
    responses = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    lengths = prompt_lengths.clone()
    rows = torch.arange(B, device=device)  # the rows still in the batch
    done = torch.zeros(B, dtype=torch.bool, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        logits = model.logits(hidden).float() / temperature  # (b, V)
        if top_k is not None and top_k < logits.shape[1]:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
        # Sample by inverting the distribution function: the first token whose cumulative probability exceeds u.
        cumulative = logits.softmax(dim=1).cumsum(dim=1, dtype=torch.float64)
        finite &= cumulative[:, -1].isfinite().all()
        u = uniforms[rows, t, None] * cumulative[:, -1:]
        new = torch.searchsorted(cumulative, u, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)  # nan, or u rounded up
        responses[rows, t] = torch.where(done, 0, new)
        lengths[rows] += ~done
        if end_token is not None:
            done = done | (new == end_token)
        if t == max_new_tokens - 1:
            break
        if t % 8 == 7 and end_token is not None:  # a look at the data makes a GPU wait: only now and then
            keep = (~done).nonzero().squeeze(1)
            if len(keep) == 0:
                break
            if len(keep) <= 0.75 * len(rows):  # rows that have ended leave the batch
                rows, done, new, visible = rows[keep], done[keep], new[keep], visible[keep]
                cache = cache[:, :, keep]
        positions = (prompt_lengths[rows] + t)[:, None]  # (b, 1)
        with torch.inference_mode():  # only here: a training step cannot use tokens that were made under it
            hidden = model.hidden(new[:, None], cache=cache, slot=longest + t, positions=positions,
                                  visible=visible[..., :longest + t + 1]).squeeze(1)  # (b, C)
    model.train(was_training)
    if not finite:
        raise FloatingPointError("the model's probabilities are not finite: its weights or its input are broken")
    tokens = F.pad(prompt_tokens, (0, max_new_tokens))  # (B, S)
    tokens.scatter_(1, prompt_lengths[:, None] + torch.arange(max_new_tokens, device=device), responses)
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
        main(["--size", config.size, "--out", config.out, "--seed", str(config.seed)] + ["--resume"] * config.resume)


class Run:
    """What a training stage keeps in its folder: a lock, metrics.jsonl and, until it has ended, state.pt for --resume.

        with Run("sft", folder, config, every=64) as run:
            run.total = steps
            restore(run.saved, steps, model=model, optimizer=optimizer)
            for step in range(run.saved["step"], steps):
                ...
                run(step + 1, loss=loss)            # prints a row, and writes it to metrics.jsonl
                run.end_step(step + 1, model=model, optimizer=optimizer)     # saves these, if it is time to
            save_checkpoint(...)
            run.finish()

    All that comes before the loop follows from the settings, the seed among them, so it is done again; the state holds the
    rest. It is there from the start of a run until finish(). sources: files of earlier stages, without which the run can't
    go on as it began; unprinted: figures that go to metrics.jsonl only.
    """

    def __init__(self, stage, folder, config, every, sources=(), unprinted=()):
        self.stage, self.folder, self.config, self.every, self.unprinted = stage, folder, config, every, unprinted
        self.sources = sources
        self.total, self.step, self.rows, self.header, self.interrupted = 0, 0, [], False, False
        self.pace = None  # (step, time) after the first step of this process

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock_folder(self.folder)
        try:
            self.begin()
        except BaseException:
            self.lock.close()
            raise
        self.handler = signal.signal(signal.SIGINT, self.interrupt)
        return self

    def begin(self):
        """Read the state of the run to resume, or write that of one that begins."""
        self.start, self.path = time.perf_counter(), self.folder / "state.pt"
        settings = {name: value for name, value in asdict(self.config).items() if name not in ("resume", "out")}
        for name in ("text", "data"):  # a file may have changed under its name
            if settings.get(name):
                settings[name] += f" (checksum {zlib.crc32(read_bytes(settings[name])):08x})"
        sources = {f"{path.parent.name}/{path.name}": zlib.crc32(read_bytes(path)) for path in self.sources}
        self.saved = dict(stage=self.stage, settings=settings, sources=sources, step=0, seconds=0.0, rows=[],
                          path=str(self.path))
        if self.path.exists() and self.config.resume:
            with refused_if_broken(self.path, "begin anew without --resume"):
                found = read_torch(self.path)
                if any(type(found[name]) is not type(value) for name, value in self.saved.items()) or found["step"] < 0:
                    raise ValueError("its values are not those of a run")
                if found["stage"] != self.stage:
                    raise InputError(f"{self.path}: is the state of a run of {found['stage']}, but {self.stage} is wanted")
                changed = [name for name, value in settings.items() if found["settings"].get(name) != value]
                if changed:
                    name = changed[0]
                    raise InputError(f"{self.path}: the run began with --{name} {found['settings'].get(name)}, not "
                                     f"{settings[name]}; resume it with its settings, or begin anew without --resume")
                changed = [name for name in {**sources, **found["sources"]}
                           if found["sources"].get(name) != sources.get(name)]
                if changed:
                    raise InputError(f"{self.path}: the run began with another {changed[0]}; begin anew without --resume")
                if not all(isinstance(value, (int, float)) for row in found["rows"] for value in row.values()):
                    raise ValueError("its rows are not figures")
            self.saved = {**found, "path": str(self.path)}
            self.step, self.rows = found["step"], found["rows"]
            self.start -= found["seconds"]
            print(f"{self.stage}: goes on after step {self.step}", flush=True)
        elif self.config.resume and (self.folder / "checkpoint.pt").exists():
            raise InputError(f"{self.folder / 'checkpoint.pt'}: is finished, nothing to resume; without --resume it is "
                             f"trained anew")
        elif self.config.resume:
            print(f"{self.stage}: nothing to resume in {self.folder}, begins anew", flush=True)
        elif self.path.exists():
            print(f"{self.stage}: begins anew and gives up an unfinished run (--resume would go on with it)", flush=True)
        self.write_metrics()
        write_torch(self.path, self.saved)

    def __exit__(self, kind, error, traceback):
        signal.signal(signal.SIGINT, self.handler)
        self.lock.close()
        if kind is FloatingPointError:
            last = ", ".join(f"{name} {value:.4g}" for name, value in self.rows[-1].items()) if self.rows else "none yet"
            raise FloatingPointError(f"{self.stage}, step {self.step + 1}: {error}; last figures: {last}") from error

    def interrupt(self, number, frame):
        """Ctrl-C: the step at work is finished and saved; outside of the steps, or pressed twice, it stops at once."""
        if self.interrupted or not 0 < self.step < self.total:
            raise KeyboardInterrupt
        self.interrupted = True
        print(f"\n{self.stage}: stops after this step (press again to stop at once)", flush=True)

    def __call__(self, step, **row):
        """Keep and print a row, name -> number. Names are printed once, above the columns; left is the time still needed."""
        self.record(step, **row)
        row = {name: value for name, value in row.items() if name not in self.unprinted}
        if not self.header:
            self.header = True
            print("     step  " + "  ".join(f"{name:>8s}" for name in row) + "    left")
        first, since = self.pace or (0, self.start)
        minutes, rest = divmod(round((time.perf_counter() - since) / max(1, step - first) * (self.total - step)), 60)
        columns = "  ".join(f"{value:{max(8, len(name))}{'.1e' if 0 < abs(value) < 1e-3 else '.4f'}}"
                            for name, value in row.items())
        print(f"{step:4d}/{self.total:<4d}  {columns}  {minutes:3d}:{rest:02d}", flush=True)

    def record(self, step, **row):
        """Keep a row without printing it. seconds: since the run began, pauses not counted."""
        self.rows.append({"step": step, **row, "seconds": round(time.perf_counter() - self.start, 2)})
        self.write_metrics()

    def write_metrics(self):
        """Write all rows so far, atomically: a killed run leaves no half line, and a resumed one repeats none."""
        write_jsonl(self.folder / "metrics.jsonl", self.rows)

    def end_step(self, step, **state):
        """To be called after every step. state: all that the next step depends on, models and optimizers or plain values.

        Saves it when it is due. Raises KeyboardInterrupt, once all is saved, if Ctrl-C was pressed in the meantime.
        """
        self.step, self.pace = step, self.pace or (step, time.perf_counter())
        if step % self.every == 0 or step == self.total or self.interrupted:
            state = {name: x.state_dict() if hasattr(x, "state_dict") else x for name, x in state.items()}
            write_torch(self.path, {**self.saved, **state, "step": step, "rows": self.rows,
                                    "seconds": time.perf_counter() - self.start})
        if self.interrupted:
            raise KeyboardInterrupt(f"{self.stage}: saved after step {step} of {self.total}; --resume goes on")

    def finish(self):
        """The checkpoint is written: nothing is left to resume."""
        self.path.unlink()


def restore(saved, steps, **state):
    """Load what a Run saved into models and optimizers, by name. Returns the plain values among `state`, as saved.

    A run that begins (saved["step"] is 0) loads nothing, and its plain values are as given. InputError if the state is
    not one of such a run of `steps` steps.
    """
    plain = {name: x for name, x in state.items() if not hasattr(x, "load_state_dict")}
    if saved["step"] == 0:
        return plain
    with refused_if_broken(saved["path"], "begin anew without --resume"):
        if saved["step"] > steps:
            raise ValueError(f"it is at step {saved['step']} of {steps}")
        for name, x in state.items():
            if name not in plain:
                x.load_state_dict(saved[name])
            elif type(saved[name]) is not type(x) or not torch.tensor(saved[name], dtype=torch.float64).isfinite().all():
                raise ValueError(f"its {name} are not numbers")
        return {name: saved[name] for name in plain}


def save_checkpoint(path, stage, size, model, tokenizer, **extra):
    """Write a model with all that is needed to use it: stage, size, GPTConfig, vocabulary. Atomic.

    extra: more values that torch.load(weights_only=True) accepts (numbers, strings, lists, dicts, tensors).
    """
    checkpoint = {"stage": stage, "size": size, "config": asdict(model.config), "vocabulary": tokenizer.to_strings(),
                  "model": model.state_dict(), **extra}
    write_torch(path, checkpoint)


def load_checkpoint(path, stage, size, device="cpu", model_class=GPT):
    """Read what save_checkpoint wrote: (model, tokenizer, the whole dict). Nothing in the file can run code.

    Raises InputError, one line that names the file, if it is missing, corrupt, or of another stage or size.
    """
    if not Path(path).exists():
        raise InputError(f"{path}: no such checkpoint")
    with refused_if_broken(path, "train the stage again"):
        checkpoint = read_torch(path)
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
    return model.to(device), tokenizer, checkpoint


def write_torch(path, values):
    """torch.save, atomic."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    write_atomic(path, buffer.getvalue())


def read_torch(path):
    """What write_torch wrote, with the checksum of every record verified; a pickle that would run code is refused."""
    with zipfile.ZipFile(path) as archive:  # torch's format is a zip archive
        # No checksum covers these two: torch would skip a record with such attributes, and never compresses one.
        if any(record.external_attr or record.compress_type for record in archive.infolist()) or archive.testzip():
            raise zipfile.BadZipFile("checksum error")
    return torch.load(path, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def refused_if_broken(path, advice):
    """Whatever a damaged file makes torch or us raise becomes an InputError, one line that names the file."""
    try:
        yield
    except InputError:
        raise
    except (zipfile.BadZipFile, pickle.UnpicklingError, OSError, RuntimeError, ValueError, LookupError, TypeError, EOFError,
            ArithmeticError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a whole file of this project ({reason}); delete it and {advice}") from error


def make_optimizer(model, weight_decay):
    """AdamW with weight decay on matrices only, not on biases and gains. optimizer_step sets the learning rate."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over `warmup` steps (a quarter of all at most), then a cosine from peak down to 0 at `steps`."""
    warmup = min(warmup, steps // 4)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def optimizer_step(optimizer, model, lr, loss, max_norm=1.0):
    """Clip the gradient's norm, take a step with the learning rate lr, clear the gradient. Returns the norm.

    loss: the loss (a scalar) that the gradient belongs to. Raises FloatingPointError, and takes no step, if it or the
    norm is not finite.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    loss, norm = torch.stack([loss.detach().float(), norm]).tolist()
    if not math.isfinite(norm + loss):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}: no step taken; lower the learning rate")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@torch.inference_mode()
def held_out_loss(model, sequences, prompt_lengths, rows=64):
    """Nats per token, a mean over all response tokens of all sequences (lists of ids), prompts not counted."""
    device = model.wte.weight.device
    total, count = 0.0, 0
    for start in range(0, len(sequences), rows):
        tokens, lengths = pad(sequences[start:start + rows], device)
        mask = response_mask(torch.tensor(prompt_lengths[start:start + rows], device=device), lengths, tokens.shape[1])
        total -= masked_logprobs(model, tokens, mask).double().sum().item()
        count += int(mask.sum())
    return total / count


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining


def memory_mapped(path, draw):
    """The lists of ids that draw() returns, as views of a memory-mapped file; where the file is, draw is not called.

    The file is an int32 array: how many sequences, their lengths, then all their tokens. Atomic.
    """
    if not path.exists():
        sequences = draw()
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.save(buffer, np.array([len(sequences), *map(len, sequences), *itertools.chain(*sequences)], dtype=np.int32))
        write_atomic(path, buffer.getvalue())
    with refused_if_broken(path, "run the stage again"):
        data = np.load(path, mmap_mode="c")  # copy on write: torch wants memory that may be written
        tokens = 1 + data[0]
        ends = tokens + np.cumsum(data[1:tokens])
        if ends[-1] != len(data):
            raise ValueError("its length is not what its head says")
        return [data[start:end] for start, end in zip([tokens, *ends[:-1]], ends)]


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
    steps: int = 1000           # optimizer steps
    batch: int = 32             # documents in a step; of a text file, windows of block_size tokens
    lr: float = 3e-3            # peak learning rate (linear warm-up, cosine to zero)
    warmup: int = 50            # steps of warm-up
    weight_decay: float = 0.1   # AdamW's, on matrices only
    report: int = 100           # steps between two reports; the state for --resume is saved as often
    resume: bool = False        # go on with the run that was interrupted in this folder
    bench: bool = False         # measure this machine and this code, train and write nothing


GPU = dict(block_size=256, n_layer=8, n_head=8, n_embd=512, steps=2000, batch=128, lr=1e-3, warmup=100)


def train(config):
    """Pretrain a GPT and save it to OUT/SIZE/gpt/checkpoint.pt."""
    folder, device = stage_folder(config, "gpt"), get_device()
    if config.n_embd % config.n_head:
        raise InputError(f"--n_embd {config.n_embd} must be a multiple of --n_head {config.n_head}")
    if config.vocab_size < 259:
        raise InputError(f"--vocab_size {config.vocab_size}: 256 bytes and 3 special tokens need at least 259")
    text = read_text(config.text) if config.text else ""

    # 1. Text, tokenizer, tokens; what is held out.
    rng = random.Random(f"pretraining {config.seed}")
    if config.text:
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
        # A row is one whole document, between two <|end|>: no row begins in the middle of a story, where nobody can know
        # whose story it is, so the loss compares with the source's entropy.
        start = [tokenizer.end_token]
        held_out_rng = random.Random("held-out documents")
        documents = [stories.document(held_out_rng) for _ in range(500)]
        held_out = [start + ids + start for ids in tokenizer.encode_batch(document.text for document in documents)]
        source = -sum(document.logprob for document in documents) / sum(len(ids) - 1 for ids in held_out)

        def draw():
            texts = [stories.document(rng).text for _ in range(config.steps * config.batch)]
            return [start + ids + start for ids in tokenizer.encode_batch(texts)]

        # The name tells seed, amount, vocabulary and, by a checksum of the sample, the world itself.
        world = zlib.crc32(sample_text.encode())
        sequences = memory_mapped(folder / f"documents-{config.seed}-{config.steps * config.batch}-{tokenizer.n_vocab}-"
                                           f"{world:08x}.npy", draw)
        data = (f"the little world: {len(sequences):,} fresh documents, {sum(map(len, sequences)):,} tokens; "
                f"{len(documents)} documents held out")
    longest = max(map(len, held_out + sequences))
    if longest > config.block_size:
        raise InputError(f"--block_size {config.block_size}: the longest document has {longest} tokens")
    shape = GPTConfig(tokenizer.n_vocab, config.block_size, config.n_layer, config.n_head, config.n_embd)
    model = GPT(shape, torch.Generator().manual_seed(config.seed)).to(device)
    optimizer = make_optimizer(model, config.weight_decay)
    announce("gpt", config, device, data, model)
    prefix = [start + tokenizer.encode("Once" if start else "\n")] * 2
    room = min(60, config.block_size - len(prefix[0]))
    before, _ = respond(model, tokenizer, prefix, room, config.seed)

    # 2. Next-token prediction.
    batches = batches_by_length(list(map(len, sequences)), config.batch, random.Random(f"batches {config.seed}"))
    with Run("gpt", folder, config, every=config.report) as run:
        run.total = len(batches)
        losses = restore(run.saved, run.total, model=model, optimizer=optimizer, losses=[])["losses"]
        for step in range(run.saved["step"], len(batches)):
            tokens, lengths = pad([sequences[i] for i in batches[step]], device)  # (B, T)
            mask = response_mask(torch.ones_like(lengths), lengths, tokens.shape[1])  # all but the padding
            loss = -masked_logprobs(model, tokens, mask).sum() / mask.sum()  # -Σ_t log p_θ(x_t | x_{<t})  (CS 224R, ch. 3)
            loss.backward()
            lr = learning_rate(step, config.steps, config.lr, config.warmup)
            norm = optimizer_step(optimizer, model, lr, loss)
            losses.append(loss.item())
            if (step + 1) % config.report == 0 or step + 1 == len(batches):
                held_out_nats = held_out_loss(model, held_out, [1] * len(held_out))
                row = dict(loss=sum(losses) / len(losses), held_out=held_out_nats)
                if source:
                    row.update(entropy=source, excess=held_out_nats / source - 1)
                run(step + 1, **row, grad_norm=norm, lr=lr)
                losses = []
            run.end_step(step + 1, model=model, optimizer=optimizer, losses=losses)

        # 3. Save; the same beginning before and after.
        save_checkpoint(folder / "checkpoint.pt", "gpt", config.size, model, tokenizer, text=config.text)
        run.finish()
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


# ----------------------------------------------------------------------------------------------------------------------
# How fast?


def forward_flops(config, tokens, context, places, outputs):
    """Floating-point operations of a forward pass: 2 for every weight and token, 4 C a layer for every token attended to.

    tokens: how many pass through the blocks, each seeing `context` tokens on average; places: how many of them are asked
    for and so pass through the last MLP too, and through a head of so many outputs.
    """
    C = config.n_embd
    return tokens * (config.n_layer * (24 * C * C + 4 * C * context) - 16 * C * C) + places * (16 * C * C + 2 * C * outputs)


def median_seconds(call, repeats=7):
    """The median time of a call, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def matrix_rate(device):
    """Floating-point operations a second of a large matrix product, in the precision of autocast: the most there can be."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(n, n, dtype=dtype, device=device)
    return 10 * 2 * n ** 3 / median_seconds(lambda: [a @ a for _ in range(10)])


def peak_memory(device):
    """MB: on a GPU the most that was allocated there, else the most that the process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def bench(config):
    """Print how fast this machine trains and samples, beside how fast it multiplies matrices and moves memory."""
    device = get_device()
    shape = GPTConfig(config.vocab_size, config.block_size, config.n_layer, config.n_head, config.n_embd)
    model = GPT(shape).to(device)
    optimizer = make_optimizer(model, config.weight_decay)
    announce("gpt", config, device, "random tokens; nothing is saved", model)
    rate = matrix_rate(device)
    block, copy = torch.ones(2, 2 ** 28 if device.type == "cuda" else 2 ** 25, device=device)
    bandwidth = 2 * 4 * len(block) / median_seconds(lambda: copy.copy_(block))  # read and written
    print(f"matrix product {rate / 1e9:,.0f} GFLOP/s, memory {bandwidth / 1e9:,.0f} GB/s")

    tokens = torch.randint(config.vocab_size, (config.batch, config.block_size), device=device)
    mask = torch.ones(config.batch, config.block_size - 1, dtype=torch.bool, device=device)

    def step():
        loss = -masked_logprobs(model, tokens, mask).mean()
        loss.backward()
        optimizer_step(optimizer, model, config.lr, loss)

    seconds = median_seconds(step)
    forward = forward_flops(shape, tokens.numel(), config.block_size / 2, mask.numel(), config.vocab_size)
    flops = 3 * forward  # the backward pass costs twice as much as the forward pass
    print(f"training       {config.batch} x {config.block_size} tokens a step: {tokens.numel() / seconds:,.0f} tokens/s, "
          f"{flops / seconds / rate:.0%} of the matrix product's rate")

    prompt, new = config.block_size // 4, config.block_size // 2
    parameters = sum(p.numel() for p in model.parameters())
    for rows in (64, 256):
        prompts = torch.randint(config.vocab_size, (rows, prompt)).tolist()
        with autocast(device):
            seconds = median_seconds(lambda: generate(model, prompts, new))
        flops = forward_flops(shape, rows * (prompt + new), (prompt + new) / 2, rows * new, config.vocab_size)
        # Every step reads all weights, and the keys and values of the tokens before.
        size = 2 if device.type == "cuda" else 4
        bytes_read = new * (4 * parameters + size * 2 * rows * config.n_layer * config.n_embd * (prompt + new / 2))
        bound = max(flops / rate, bytes_read / bandwidth)
        kind = "FLOP" if flops / rate > bytes_read / bandwidth else "memory"
        print(f"sampling       {rows} x ({prompt} + {new}) tokens: {rows * new / seconds:,.0f} tokens/s, "
              f"{bound / seconds:.0%} of the {kind} bound")

    rng = random.Random(config.seed)
    texts = [stories.document(rng).text for _ in range(2000)]
    tokenizer = Tokenizer(train_vocabulary("\n".join(texts), config.vocab_size))
    seconds = median_seconds(lambda: tokenizer.encode_batch((stories.document(rng).text for _ in texts), num_threads=1))
    print(f"world's text   {sum(map(len, texts)) / 1e6 / seconds:.1f} MB/s drawn and encoded on one core\n"
          f"peak memory    {peak_memory(device):,.0f} MB")


def main(argv=None):
    config = parse_config(Config, GPU, argv, "Pretrain a small GPT on the little world or on a text file.")
    if config.bench:
        bench(config)
    elif config.sample:
        sample(config)
    else:
        train(config)


if __name__ == "__main__":
    run_script(main)
