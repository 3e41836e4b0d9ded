"""
gpt.py: a small GPT from scratch, and stage 1 of the pipeline, pretraining; with --start, mid-training.

The model is GPT-2's (Radford et al. 2019): learned positions, pre-LayerNorm blocks, tanh-GELU, tied embeddings.
Pretraining is next-token prediction, max_θ E_{x~D} Σ_t log p_θ(x_t | x_{<t})  (CS 224R, Lecture 9, ch. 3).

    python gpt.py                           pretrain on the little world (data/stories.py), no download
    python gpt.py --text FILE               pretrain on any UTF-8 text file
    python gpt.py --load FOLDER             take a GPT-2 as it is published instead (config.json, model.safetensors, …)
    python gpt.py --start out/cpu/gpt --name gpt-curated --curated --steps 250 --lr 1e-3     go on with better text (ch. 1)
    python gpt.py --sample "Once"           print samples from the checkpoint
    python gpt.py --export FOLDER --stage ppo       write any stage as a folder for transformers, TRL, vLLM
    python gpt.py --resume                  go on with a run that was interrupted (every stage has this flag)

Here also stand the conventions that every later file keeps:
    Sequences are prompt + response + <|end|>, padded on the RIGHT: a causal model never sees the padding after a
    token, so attention needs no mask and positions need no arithmetic.
    log π(y|x) is masked_logprobs. The shift happens there and in token_logprobs beside it, and nowhere else: per-token
    tensors are (B, T-1), and column t belongs to the action "emit tokens[:, t+1]" taken in the state tokens[:, :t+1].
    Masks come from lengths, never from token values (padding may be any token, <|end|> too).
"""

import contextlib
import copy
import math
import random
import re
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import huggingface, stories
from data.files import InputError, run_script
from data.run import (Run, announce, check_name, complete, memory_mapped, parse_config, progress, read_torch,
                      refused_if_broken, restore, show, stage_folder, write_torch)
from data.tokenizer import Tokenizer, encode_file, sample_text, train as train_vocabulary

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


class Attention(nn.Module):
    """Causal multi-head self-attention; with a cache, over the keys and values of the tokens before."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} must be a multiple of n_head={config.n_head}")
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, slots=None, visible=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).transpose(1, 3)  # (B, heads, 3, T, C/heads)
        q, k, v = qkv.unbind(2)  # each (B, heads, T, C/heads)
        if cache is not None:
            cache[:, :, :, slots] = qkv.movedim(2, 0)[1:]  # (2, B, heads, T, C/heads)
            if visible is not None:
                k, v = cache[:, :, :, :visible.shape[3]].unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None)
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

    def forward(self, x, cache=None, slots=None, visible=None):
        x = x + self.attn(self.ln_1(x), cache, slots, visible)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2. The output matrix is the token embedding's (tied), so the model has no other head. No dropout: the policy
    that is scored must be the policy that was sampled.

    generator: a torch.Generator for the initial weights; None takes torch's own.
    """

    def __init__(self, config, generator=None):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
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

    def hidden(self, tokens, cache=None, slots=None, positions=None, visible=None):
        """tokens (B, T) -> (B, T, C), after the final LayerNorm: what a head reads (never normalize it again).

        cache (layers, 2, B, heads, S, C/heads) takes the keys and values of all tokens, at slots (a slice, or a tensor
        (T,)). With visible (B, 1, 1, W) too, the one token of each row attends to the cache's first W slots, to those
        where visible is 0 and not where it is -inf.
        """
        if tokens.shape[1] > self.config.block_size:
            raise ValueError(f"{tokens.shape[1]} tokens do not fit the context of {self.config.block_size}")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)  # (T,): the same for every row
        x = self.wte(tokens) + self.wpe(positions)  # (B, T, C)
        for layer, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[layer], slots, visible)
        return self.ln_f(x)

    def logits(self, x):
        """x (..., C) -> (..., V), never in bf16: a logit near 10 would be rounded to 1/16, and PPO's ratio with it."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.wte.weight.dtype), self.wte.weight)

    def forward(self, tokens):
        """tokens (B, T) -> logits (B, T, V); logits[:, t] is the prediction of tokens[:, t+1]."""
        return self.logits(self.hidden(tokens))


# ----------------------------------------------------------------------------------------------------------------------
# Device, log-probabilities, masks


def get_device():
    """The GPU where there is one, else the CPU."""
    # cuDNN's attention, the first choice on Hopper GPUs, makes a plan for every new shape, and sampling has one each step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device):
    """bf16 on a GPU, plain float32 on the CPU. Losses and log-probabilities are float32 either way."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def token_logprobs(logits, tokens, temperature=1.0):
    """The log-probability, in nats, of every token given the tokens before it. (masked_logprobs computes only some.)

    logits (B, T, V), tokens (B, T) -> (B, T-1): column t is log π(tokens[:, t+1] | tokens[:, :t+1]), with
    π = softmax(logits / temperature).
    """
    return (logits[:, :-1].float() / temperature).log_softmax(dim=-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def masked_logprobs(model, tokens, mask, temperature=1.0):
    """log π(a_t|s_t), in nats, where mask is true, and 0 elsewhere: tokens (B, T), mask (B, T-1) -> (B, T-1).

    The same numbers as token_logprobs(model(tokens), tokens, temperature), but the logits, the largest tensor of all, are
    computed only where the mask asks for them:

        tokens    x x x y y E . .       x prompt, y response, E <|end|>, . padding
        mask       0 0 1 1 1 0 0        column t: is tokens[:, t+1] of the response?
        s_t           x y y             the state ends with this token: its hidden vector gives the N logits
        a_t             y y E           the action is the next token
    """
    logits = masked_logits(model, tokens, mask, temperature)  # (N, V)
    logprobs = -F.cross_entropy(logits, tokens[:, 1:][mask], reduction="none")  # (N,): log π(a_t|s_t)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, logprobs)


def masked_logits(model, tokens, mask, temperature=1.0):
    """The logits, divided by the temperature, in the N states s_t where mask is true, row after row: (N, V)."""
    with autocast(tokens.device):
        hidden = model.hidden(tokens)[:, :-1][mask]  # (N, C)
    return model.logits(hidden).float() / temperature


def log_distribution(model, tokens, mask, temperature=1.0):
    """log π(·|s_t) over the whole vocabulary where mask is true, and 0 elsewhere: (B, T-1, V)."""
    logprobs = masked_logits(model, tokens, mask, temperature).log_softmax(dim=-1)  # (N, V)
    return logprobs.new_zeros(*mask.shape, logprobs.shape[1]).masked_scatter(mask[..., None], logprobs)


def exact_kl(old, new):
    """KL(old || new) at every token, of two log-distributions: both (B, T-1, V) -> (B, T-1), 0 where both are 0."""
    return (old.exp() * (old - new)).sum(dim=2)


def kl_estimators(log_ratio):
    """Three estimates of KL(p || q) from samples of p, one by one (Schulman 2020, "Approximating KL Divergence").

    log_ratio = log p(y) - log q(y), y ~ p -> (k1, k2, k3) of its shape. k1 and k3 are unbiased, k2 is not; k2 and k3 are
    never negative. The shaped rewards need k1: its sum is the log-ratio of the whole response, which the objective holds.
    """
    k1 = log_ratio
    k2 = log_ratio ** 2 / 2
    k3 = (-log_ratio).exp() - 1 + log_ratio
    return k1, k2, k3


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


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


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
    Raises ValueError if a prompt is empty, InputError, a ValueError, if prompt + max_new_tokens exceed the context or
    temperature is not positive, FloatingPointError if the model's probabilities are not finite.
    """
    config, device = model.config, model.wte.weight.device
    if min(map(len, prompts), default=0) < 1 or max_new_tokens < 1:
        raise ValueError("generate needs prompts of at least one token, and max_new_tokens >= 1")
    if temperature <= 0:
        raise InputError(f"temperature {temperature}: must be positive")
    longest = max(map(len, prompts))
    if longest + max_new_tokens > config.block_size:
        raise InputError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of "
                         f"{config.block_size}: shorten the prompt or lower max_new_tokens")
    prompt_tokens, prompt_lengths = pad(prompts, device)  # (B, longest)
    B = len(prompts)
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    uniforms = torch.rand(B, max_new_tokens, dtype=torch.float64, device=device, generator=generator)

    # 1. Prefill: all prompts at once; no prompt sees the padding behind it. A cache slot is not a position: the prompts
    # fill the slots up to the longest one's length, and token t of a response goes to slot longest + t in every row.
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.wte.weight.dtype
    slots = torch.arange((longest + max_new_tokens + 7) // 8 * 8, device=device)  # (S,): what a GPU's attention is made for
    cache = torch.zeros(config.n_layer, 2, B, config.n_head, len(slots), config.n_embd // config.n_head, dtype=dtype,
                        device=device)
    rows = torch.arange(B, device=device)  # the rows still in the batch
    if dtype != model.wte.weight.dtype:  # autocast would convert the weights again for every token
        model = copy.deepcopy(model)
        for block in model.h:
            block.attn.to(dtype), block.mlp.to(dtype)
    hidden = model.hidden(prompt_tokens, cache, slice(longest))[rows, prompt_lengths - 1]  # (B, C): each prompt's last
    padding = (slots >= prompt_lengths[:, None]) & (slots < longest)
    visible = torch.zeros(B, 1, 1, len(slots), dtype=dtype, device=device).masked_fill(padding[:, None, None], -math.inf)

    # 2. Decode: one token a row and step, until all have ended.
    responses = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    new = torch.empty(B, 1, dtype=torch.long, device=device)
    lengths = prompt_lengths.clone()
    done = torch.zeros(B, dtype=torch.bool, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)

    def emit(hidden, t):
        """Token t of the responses, from the model's hidden vectors (b, C) at the tokens before."""
        logits = model.logits(hidden).float() / temperature  # (b, V)
        if top_k is not None and top_k < logits.shape[1]:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
        # Sample by inverting the distribution function: the first token whose cumulative probability exceeds u.
        cumulative = logits.softmax(dim=1).cumsum(dim=1, dtype=torch.float64)
        finite.logical_and_(cumulative[:, -1].isfinite().all())
        u = uniforms[rows, t][:, None] * cumulative[:, -1:]
        new.copy_(torch.searchsorted(cumulative, u, right=True).clamp(max=logits.shape[1] - 1))  # nan, or u rounded
        responses[rows, t] = new[:, 0].masked_fill(done, 0)
        lengths[rows] += ~done
        if end_token is not None:
            done.logical_or_(new[:, 0] == end_token)

    def step(t):
        """Pass token t - 1 through the model, emit token t. On a GPU t is a tensor (1,), and no shape depends on it."""
        positions = (prompt_lengths[rows] + t - 1)[:, None]  # (b, 1)
        if torch.is_tensor(t):
            slot, seen = longest + t - 1, visible[..., :width].masked_fill(slots[:width] >= longest + t, -math.inf)
        else:
            slot, seen = slice(longest + t - 1, longest + t), visible[..., :longest + t]
        emit(model.hidden(new, cache, slot, positions, seen).squeeze(1), t)

    emit(hidden, 0)
    width, graph, now = 0, None, torch.zeros(1, dtype=torch.long, device=device)
    for t in range(1, max_new_tokens):
        if t % 8 == 0 and end_token is not None:  # a look at the data makes a GPU wait: only now and then
            keep = (~done).nonzero().squeeze(1)
            if len(keep) == 0:
                break
            if len(keep) <= 0.75 * len(rows):  # rows that have ended leave the batch
                rows, done, new, visible = rows[keep], done[keep], new[keep], visible[keep]
                cache, width = cache[:, :, keep], 0
        now.fill_(t)
        with torch.inference_mode():  # only here: a training step cannot use tokens that were made under it
            if device.type == "cpu":
                step(t)
            elif longest + t <= width:
                graph.replay()
            else:  # a step's launches cost more than its work; recorded, for these rows and 64 tokens, they are one
                width = (longest + t + 64) // 8 * 8
                step(now)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step(now)
    if not finite:
        raise FloatingPointError("the model's probabilities are not finite: its weights or its input are broken")
    tokens = F.pad(prompt_tokens, (0, max_new_tokens))  # (B, S)
    tokens.scatter_(1, prompt_lengths[:, None] + torch.arange(max_new_tokens, device=device), responses)
    return Rollout(tokens[:, :int(lengths.max())], prompt_lengths, lengths)


def response_texts(rollout, tokenizer):
    """The responses of a Rollout as strings, without <|end|>."""
    ended = rollout.ended(tokenizer.end_token).tolist()
    return [tokenizer.decode(ids[:-1] if end else ids) for ids, end in zip(rollout.responses(), ended)]


def respond(model, tokenizer, prompts, max_new_tokens, seed, temperature=1.0, top_k=None):
    """Sample a response for each prompt (lists of ids). Returns (texts without <|end|>, ended: list of bool)."""
    with autocast(model.wte.weight.device):
        rollout = generate(model, prompts, max_new_tokens, tokenizer.end_token, temperature, top_k, seed)
    return response_texts(rollout, tokenizer), rollout.ended(tokenizer.end_token).tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint and optimizer


def save_checkpoint(path, stage, size, model, tokenizer, **extra):
    """Write a model with all that is needed to use it: stage, size, GPTConfig, vocabulary. Atomic.

    extra: more values that torch.load(weights_only=True) accepts (numbers, strings, lists, dicts, tensors).
    """
    checkpoint = {"stage": stage, "size": size, "config": asdict(model.config), "vocabulary": tokenizer.to_strings(),
                  "pattern": tokenizer.pattern, "model": model.state_dict(), **extra}
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
        tokenizer = Tokenizer.from_strings(checkpoint["vocabulary"], checkpoint["pattern"])
        config = GPTConfig(**checkpoint["config"])
        if config.vocab_size != tokenizer.n_vocab:
            raise ValueError(f"the model has {config.vocab_size} tokens, its tokenizer {tokenizer.n_vocab}")
        model = model_class(config)
        model.load_state_dict(checkpoint["model"])
    return model.to(device), tokenizer, checkpoint


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
    """Nats per token, a mean over all response tokens of all sequences (lists of ids); prompt_lengths: a list, or one
    number for all. Prompts are not counted."""
    device = model.wte.weight.device
    prompt_lengths = torch.tensor(prompt_lengths, device=device).expand(len(sequences))
    total, count = 0.0, 0
    for start in range(0, len(sequences), rows):
        tokens, lengths = pad(sequences[start:start + rows], device)
        mask = response_mask(prompt_lengths[start:start + rows], lengths, tokens.shape[1])
        total -= masked_logprobs(model, tokens, mask).double().sum().item()
        count += int(mask.sum())
    return total / count


def excess(held_out, entropy):
    """The figures of a loss beside the entropy of its source, or none where nobody knows it (entropy None)."""
    return {} if entropy is None else dict(entropy=entropy, excess=held_out / entropy - 1)


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining


@dataclass
class Config:
    size: Literal["auto", "cpu", "gpu", "gpt2"] = "auto"    # auto takes gpu where there is one; gpt2: of gpt.py --load
    out: str = "out"            # folder of all outputs; this stage writes to OUT/SIZE/NAME
    name: str = "gpt"           # name of this run's folder: gpt-… keeps an experiment apart; ppo-… or dpo-… with --stage
    seed: int = 1               # fixes weights, data and samples
    text: str = ""              # train on this text file instead of the little world
    start: str = ""             # mid-training: go on from the checkpoint in this folder, on --text or --curated
    curated: bool = False       # the little world's stories without an unkind sentence
    load: str = ""              # take the GPT-2 in this folder, as transformers writes it, instead of pretraining one
    export: str = ""            # write the checkpoint of --stage to this folder, for transformers, and stop
    stage: str = "gpt"          # of --export: any stage or --name; of --load: ppo or dpo for a policy trained elsewhere
    sample: str = ""            # print three continuations of this text from the checkpoint, and stop
    temperature: float = 1.0    # of --sample
    top_k: int = 0              # --sample draws from the k likeliest tokens only; 0: from all
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


GPU = dict(block_size=256, n_layer=8, n_head=8, n_embd=512, steps=2000, batch=128, lr=1e-3, warmup=100)
PRESETS = {"stage": {"ppo": dict(name="ppo"), "dpo": dict(name="dpo")}}


class Corpus(NamedTuple):
    """What pretraining reads: sequences and held_out are lists of ids, start the ids that a text begins with; entropy is
    the source's own, in nats per held-out token (None: unknown)."""
    tokenizer: Tokenizer
    sequences: list
    held_out: list
    start: list
    entropy: float | None
    description: str


def read_corpus(config, tokenizer):
    """The Corpus of a text file: random windows of it; the last tenth is held out. Without a tokenizer it learns one."""
    tokenizer = tokenizer or Tokenizer(train_vocabulary(sample_text(config.text), config.vocab_size))
    tokens, held_out, description = split_text(config, config.text, tokenizer, config.block_size)
    rng = random.Random(f"pretraining {config.seed}")
    windows = draw_windows(tokens, config.steps * config.batch, config.block_size, rng)
    return Corpus(tokenizer, windows, held_out, [], None, description)


def split_text(config, path, tokenizer, block_size):
    """A text file, which may be larger than the memory, as tokens: (array of those to train on; held-out lists of ids, at
    most 1,000 or so from all of the last tenth; a description)."""
    tokens = encode_file(path, tokenizer, stage_folder(config, "gpt"))
    cut = len(tokens) * 9 // 10
    starts = range(cut, len(tokens) - 1, block_size)
    held_out = [tokens[i:i + block_size].tolist() for i in starts[::max(1, len(starts) // 500)]]
    if cut < block_size or not held_out:
        raise InputError(f"{path}: {len(tokens)} tokens are too few for a context of {block_size}")
    return tokens[:cut], held_out, (f"{path}: {cut:,} tokens to train on, the last {len(tokens) - cut:,} held out, "
                                    f"{sum(map(len, held_out)):,} of them read")


def draw_windows(tokens, count, block_size, rng):
    """count windows of an array of tokens, from anywhere: views, no copies."""
    return [tokens[i:i + block_size] for i in rng.choices(range(len(tokens) - block_size + 1), k=count)]


def encode_documents(documents, tokenizer):
    """Every document of the little world between two <|end|>, as ids."""
    end = [tokenizer.end_token]
    return [end + ids + end for ids in tokenizer.encode_batch(document.text for document in documents)]


def held_out_documents(world=stories.WORLD):
    """The 500 documents of the little world that every run holds out."""
    rng = random.Random("held-out documents")
    return [stories.document(rng, world) for _ in range(500)]


def pretraining_text(config, tokenizer, model):
    """What the gpt stage was trained on, for a later stage's model: (draw(count, rng) -> lists of ids, held-out lists of
    ids, the files that they come from)."""
    path = stage_folder(config, "gpt") / "checkpoint.pt"
    checkpoint = load_checkpoint(path, "gpt", config.size)[2]
    text, size = checkpoint["text"], model.config.block_size
    if checkpoint.get("loaded"):
        raise InputError(f"{path}: came from {checkpoint['loaded']}, and nobody knows what that was trained on")
    if not text:
        return (lambda count, rng: encode_documents((stories.document(rng) for _ in range(count)), tokenizer),
                encode_documents(held_out_documents(), tokenizer), [path])
    tokens, held_out, _ = split_text(config, text, tokenizer, size)
    return lambda count, rng: draw_windows(tokens, count, size, rng), held_out, [path, Path(text)]


def draw_corpus(config, tokenizer):
    """The Corpus of the little world, or of its curated part: fresh documents for every step, 500 held out.

    A row is one whole document, between two <|end|>: no row begins in the middle of a story, where nobody can know whose
    story it is, so the loss compares with the source's entropy.
    """
    rng = random.Random(f"{'mid-training' if config.start else 'pretraining'} {config.seed}")
    world = stories.curate()[0] if config.curated else stories.WORLD
    sample_text = "\n".join(stories.document(rng, world).text for _ in range(4000))
    tokenizer = tokenizer or Tokenizer(train_vocabulary(sample_text, config.vocab_size))
    documents = held_out_documents(world)
    held_out = encode_documents(documents, tokenizer)
    entropy = -sum(document.logprob for document in documents) / sum(len(ids) - 1 for ids in held_out)

    def draw():
        drawn, report = [], progress("documents drawn", config.steps * config.batch)
        while len(drawn) < config.steps * config.batch:
            drawn.append(stories.document(rng, world))
            report(len(drawn))
        return encode_documents(drawn, tokenizer)

    # The name tells seed, amount, vocabulary and, by a checksum of the sample, the world itself.
    checksum = zlib.crc32((sample_text + "".join(tokenizer.to_strings()) * bool(config.start)).encode())
    sequences = memory_mapped(stage_folder(config, config.name) / f"documents-{config.seed}-{config.steps * config.batch}-"
                                                                  f"{tokenizer.n_vocab}-{checksum:08x}.ids", draw)
    longest = max(map(len, held_out + sequences))
    if longest > config.block_size:
        raise InputError(f"--block_size {config.block_size}: the longest document has {longest} tokens")
    return Corpus(tokenizer, sequences, held_out, [tokenizer.end_token], entropy,
                  f"the little world{', curated' * config.curated}: {len(sequences):,} fresh documents, "
                  f"{sum(map(len, sequences)):,} tokens; {len(documents)} documents held out")


def held_out_figures(model, corpus, old):
    """The loss on held-out text beside its source's entropy, and on old, what mid-training may forget (None: unknown)."""
    loss = held_out_loss(model, corpus.held_out, 1)
    forgotten = {"old_held_out": held_out_loss(model, old, 1)} if old else {}
    return dict(held_out=loss, **excess(loss, corpus.entropy), **forgotten)


def train(config):
    """Pretrain a GPT, or go on with one, and save it to OUT/SIZE/NAME/checkpoint.pt."""
    folder, device = stage_folder(config, config.name), get_device()
    model, tokenizer, old, sources = None, None, None, []
    if config.start:
        if bool(config.text) == config.curated or Path(config.start).resolve() == folder.resolve():
            raise InputError(f"--start {config.start}: goes on with either --curated or --text FILE, in a folder of its "
                             "own: --name gpt-…")
        complete(Path(config.start))
        sources = [Path(config.start) / "checkpoint.pt"]
        model, tokenizer, base = load_checkpoint(sources[0], "gpt", config.size, device)
        config = replace(config, **asdict(model.config))
        old = None if base["text"] or base.get("loaded") else encode_documents(held_out_documents(), tokenizer)
    elif config.size == "gpt2":
        raise InputError("--size gpt2: is that of a published GPT-2, which is not trained here: python gpt.py --size gpt2 "
                         "--load FOLDER")
    if config.n_embd % config.n_head:
        raise InputError(f"--n_embd {config.n_embd} must be a multiple of --n_head {config.n_head}")
    if config.vocab_size < 259:
        raise InputError(f"--vocab_size {config.vocab_size}: 256 bytes and 3 special tokens need at least 259")

    # 1. Text, tokenizer, tokens; what is held out.
    print(f"reads the text{' and learns its vocabulary' * (not tokenizer)}", flush=True)
    corpus = read_corpus(config, tokenizer) if config.text else draw_corpus(config, tokenizer)
    tokenizer, sequences, start = corpus.tokenizer, corpus.sequences, corpus.start
    shape = GPTConfig(tokenizer.n_vocab, config.block_size, config.n_layer, config.n_head, config.n_embd)
    model = model or GPT(shape, torch.Generator().manual_seed(config.seed)).to(device)
    optimizer = make_optimizer(model, config.weight_decay)
    announce(config.name, config, device, corpus.description, model)
    beginning = [start + tokenizer.encode("Once" if start else "\n")] * 2
    room = min(60, config.block_size - len(beginning[0]))
    before, _ = respond(model, tokenizer, beginning, room, config.seed)

    # 2. Next-token prediction.
    batches = batches_by_length(list(map(len, sequences)), config.batch, random.Random(f"batches {config.seed}"))
    tokens_per_batch = (sum(map(len, sequences)) - len(sequences)) / len(batches)  # so every token of all counts alike
    with Run(config.name, folder, config, config.report, sources) as run:
        run.total = len(batches)
        if config.start and not run.saved["step"]:
            run.record(0, **held_out_figures(model, corpus, old))
            print("before  " + ", ".join(f"{name} {value:.3f}" for name, value in run.rows[0].items() if "held" in name))
        losses = restore(run.saved, run.total, model=model, optimizer=optimizer, losses=[])["losses"]
        for step in range(run.saved["step"], len(batches)):
            tokens, lengths = pad([sequences[i] for i in batches[step]], device)  # (B, T)
            mask = response_mask(torch.ones_like(lengths), lengths, tokens.shape[1])  # all but the padding
            loss = -masked_logprobs(model, tokens, mask).sum() / tokens_per_batch  # -Σ_t log p_θ(x_t | x_{<t})  (ch. 3)
            loss.backward()
            lr = learning_rate(step, config.steps, config.lr, config.warmup)
            norm = optimizer_step(optimizer, model, lr, loss)
            losses.append(loss.item())
            if (step + 1) % config.report == 0 or step + 1 == len(batches):
                row = dict(loss=sum(losses) / len(losses), **held_out_figures(model, corpus, old))
                run(step + 1, **row, grad_norm=norm, lr=lr)
                losses = []
            run.end_step(step + 1, model=model, optimizer=optimizer, losses=losses)

        # 3. Save; the same beginning before and after.
        save_checkpoint(run.folder / "checkpoint.pt", "gpt", config.size, model, tokenizer, text=config.text,
                        metrics=run.figures())
        run.finish()
    after, _ = respond(model, tokenizer, beginning, room, config.seed)
    opening = tokenizer.decode(beginning[0][len(start):])
    show(*[("before", opening + text) for text in before], *[("after", opening + text) for text in after])
    base = f" --base {config.name}" if config.name != "gpt" else ""
    print(f"saved {folder / 'checkpoint.pt'}; next: python sft.py{base}", flush=True)


def load(config):
    """Save the GPT-2 in the folder config.load as the base model, or with --stage ppo or dpo as one trained elsewhere."""
    name, path = config.name, stage_folder(config, "sft") / "checkpoint.pt"
    if config.stage not in ("gpt", "ppo", "dpo"):
        raise InputError(f"--stage {config.stage}: with --load it must be gpt, ppo or dpo")
    check_name(name, config.stage)
    shape, weights, tokenizer, begins = huggingface.read_folder(config.load)
    if config.stage != "gpt" and load_checkpoint(path, "sft", config.size)[1].vocabulary != tokenizer.vocabulary:
        raise InputError(f"{config.load}: its vocabulary is not that of {path}, so that the two cannot be compared")
    model = GPT(GPTConfig(**shape))
    for tensor, value in model.state_dict().items():
        value.copy_(weights.pop(tensor))  # and with it goes the map of its file
    announce(name, config, get_device(), f"the weights in {config.load}", model)
    with Run(name, stage_folder(config, name), config, every=1) as run:
        save_checkpoint(run.folder / "checkpoint.pt", config.stage, config.size, model, tokenizer, metrics=[],
                        text="" if begins else config.load, loaded=config.load)
        run.finish()
    print(f"saved {run.home / 'checkpoint.pt'}", flush=True)


def export(config):
    """Write the checkpoint of config.stage, the name of any stage's folder, to the folder config.export."""
    path = stage_folder(config, config.stage) / "checkpoint.pt"
    stage = re.match("gpt|sft|reward_model|ppo|dpo|", config.stage).group()
    complete(path.parent)
    model, tokenizer, found = load_checkpoint(path, stage, config.size, model_class=(
        GPT if stage != "reward_model" else  # without its class, which stands further right
        lambda shape: nn.ModuleDict(dict(trunk=GPT(shape), head=nn.Linear(shape.n_embd, 1)))))
    huggingface.write_folder(config.export, asdict(GPTConfig(**found["config"])), model.state_dict(), tokenizer,
                             not found.get("text"), found.get("temperature", 1.0))
    print(f"saved {config.export}", flush=True)


def sample(config):
    """Print three continuations of config.sample from the stage's checkpoint."""
    folder = stage_folder(config, config.name)
    complete(folder)
    model, tokenizer, checkpoint = load_checkpoint(folder / "checkpoint.pt", "gpt", config.size, get_device())
    start = [] if checkpoint["text"] else [tokenizer.end_token]
    prompt = start + tokenizer.encode(config.sample)
    room = model.config.block_size - len(prompt)
    if room < 1:
        raise InputError(f"--sample: {len(prompt)} tokens leave no room in the context of {model.config.block_size}")
    texts, _ = respond(model, tokenizer, [prompt] * 3, room, config.seed, config.temperature, config.top_k or None)
    for text in texts:
        print(f"{config.sample}{text}\n")


def main(argv=None):
    fixed = {name: ("start", "") for name in GPTConfig.__dataclass_fields__}  # the checkpoint's own
    config = parse_config(Config, GPU, argv, "Pretrain a small GPT on the little world or on a text file.",
                          needs={"temperature": ("sample",), "top_k": ("sample",), "curated": ("start",),
                                 "name": ("export", ""), **fixed}, presets=PRESETS)
    jobs = {"load": load, "export": export, "sample": sample, "start": train, "text": train}
    given = [name for name in jobs if getattr(config, name)]
    if len({jobs[name] for name in given}) > 1:
        raise InputError(f"--{given[0]} and --{given[1]}: one job at a time")
    if config.stage != "gpt" and not config.load + config.export:
        raise InputError(f"--stage {config.stage}: goes with --load or --export only")
    if not config.load + config.export:
        check_name(config.name, "gpt")
    jobs[given[0] if given else "text"](config)


if __name__ == "__main__":
    run_script(main)
