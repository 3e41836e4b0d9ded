"""
gpt.py: a small GPT from scratch, and stage 1 of the pipeline, pretraining; with --start,
mid-training.

The model is GPT-2's (Radford et al. 2019): learned positions, pre-LayerNorm blocks, tanh-GELU,
tied embeddings. Pretraining is next-token prediction (CS 224R, Lecture 9, ch. 3):

    max_θ  E_{x~D} [ Σ_t log p_θ(x_t | x_<t) ]

    python gpt.py                       pretrain on the little world (data/stories.py), no download
    python gpt.py --text FILE           pretrain on any UTF-8 text file
    python gpt.py --start out/cpu/gpt --name gpt-curated --curated --steps 250 --lr 1e-3
                                        mid-training: continue with better text (ch. 1)
    python gpt.py --sample "Once"       print samples from the checkpoint
    python gpt.py --explain             log p_θ(x_t | x_<t), token by token, of a held-out document;
                                        of your own text: --explain "Once there was"
    python gpt.py --resume              continue an interrupted run (every stage has this flag)

python -m data.huggingface takes a published GPT-2 in this stage's place, and writes any stage as a
folder for transformers, TRL and vLLM.

The conventions that every later file keeps:
- Sequences are prompt + response + <|end|>, padded on the RIGHT: a causal model never sees the
  padding after a token, so in training attention needs no mask and positions no arithmetic.
- log π(y|x) is response_logprobs, per token masked_logprobs. The shift of log-probabilities happens
  in masked_logprobs and token_logprobs, and nowhere else: per-token tensors are (B, T-1), and
  column t belongs to the action "emit tokens[:, t+1]" taken in the state tokens[:, :t+1].
- Masks come from lengths, never from token values (padding may be any token, <|end|> too).
"""

import contextlib
import copy
import math
import random
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import stories
from data.corpus import encode_documents, held_out_documents, text_corpus, world_corpus
from data.files import InputError, checksum, run_script
from data.run import (COMMANDS, Run, allow_flags, announce, check_name, complete, gpu_has_bf16,
                      parse_config, read_torch, refused_if_broken, show, stage_folder, write_torch)
from data.table import Column, print_columns
from data.tokenizer import Tokenizer

# --------------------------------------------------------------------------------------------------
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
    """Causal multi-head self-attention; with a cache, over the tokens in it too."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} must be a multiple of n_head={config.n_head}")
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, layer=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # each (B, T, C)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, heads, T, C/heads)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, heads, T, C/heads)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, heads, T, C/heads)

        mask = None
        if cache is not None:
            k, v, mask = cache.append(layer, k, v)  # k, v: (B, heads, tokens so far, C/heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
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

    def forward(self, x, cache=None, layer=None):
        x = x + self.attn(self.ln_1(x), cache, layer)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """GPT-2. The output matrix is the token embedding's (tied), so the model has no other head. No
    dropout: the policy that is scored must be the policy that was sampled.

    generator: a torch.Generator for the initial weights; None takes torch's own.
    """

    def __init__(self, config, generator=None):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

        # GPT-2's std of 0.02 suits a width of 768. In a narrow model it leaves attention nearly
        # uniform at first, and learning to copy names takes twice as many tokens.
        std = config.n_embd ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2 residual branches a layer keep their variance
                residual_std = std / math.sqrt(2 * config.n_layer)
                nn.init.normal_(parameter, std=residual_std, generator=generator)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, tokens, positions=None, cache=None):
        """tokens (B, T) -> (B, T, C), after the final LayerNorm: what a head reads.

        positions: (T,), the same for every row, or (B, T); None: 0 to T-1. cache: a KVCache, which
        takes the new keys and values.
        """
        if tokens.shape[1] > self.config.block_size:
            raise ValueError(f"{tokens.shape[1]} tokens do not fit the context of "
                             f"{self.config.block_size}")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)  # (B, T, C)
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer)
        return self.ln_f(x)

    def logits(self, x):
        """x (..., C) -> (..., V). Never in bf16: a logit near 10 would be rounded to 1/16, and
        PPO's ratio with it."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.wte.weight.dtype), self.wte.weight)

    def forward(self, tokens):
        """tokens (B, T) -> logits (B, T, V); logits[:, t] is the prediction of tokens[:, t+1]."""
        return self.logits(self.hidden(tokens))


# --------------------------------------------------------------------------------------------------
# Device, log-probabilities, masks


# On a GPU cuDNN's attention makes a plan for every new shape, and sampling has one each step.
torch.backends.cuda.enable_cudnn_sdp(False)


def get_device():
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device):
    """bf16 on a GPU that has it, else plain float32. Losses and log-probabilities are always
    float32."""
    if device.type == "cuda" and gpu_has_bf16():
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def token_logprobs(logits, tokens, temperature=1.0):
    """The log-probability, in nats, of every token given the tokens before it.

    logits (B, T, V), tokens (B, T) -> (B, T-1): column t is log π(tokens[:, t+1] |
    tokens[:, :t+1]), with π = softmax(logits / temperature). masked_logprobs computes only some.
    """
    logprobs = (logits[:, :-1].float() / temperature).log_softmax(dim=-1)  # (B, T-1, V)
    return logprobs.gather(-1, tokens[:, 1:, None]).squeeze(-1)


def masked_logprobs(model, tokens, mask, temperature=1.0):
    """log π(a_t|s_t), in nats, where mask is true, and 0 elsewhere.

    tokens (B, T), mask (B, T-1) -> (B, T-1). The same numbers as token_logprobs(model(tokens),
    tokens, temperature), but the logits, the largest tensor of all, are computed only where the
    mask is true:

        tokens    x x x y y E . .       x prompt, y response, E <|end|>, . padding
        mask       0 0 1 1 1 0 0        column t: is tokens[:, t+1] part of the response?
        s_t           x y y             the state ends with this token, read from its hidden vector
        a_t             y y E           the action is the next token
    """
    with autocast(tokens.device):
        hidden = model.hidden(tokens)[:, :-1][mask]  # (N, C): the states s_t where mask is true
    logits = model.logits(hidden).float() / temperature  # (N, V)
    logprobs = -F.cross_entropy(logits, tokens[:, 1:][mask], reduction="none")  # (N,)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, logprobs)


def response_logprobs(model, tokens, prompt_lengths, lengths, temperature=1.0):
    """log π(y|x) = Σ_t log π(y_t | x, y_<t), in nats, <|end|> included: tokens (B, T) -> (B,)."""
    mask = response_mask(prompt_lengths, lengths, tokens.shape[1])
    return masked_logprobs(model, tokens, mask, temperature).sum(dim=1)


def response_mask(prompt_lengths, lengths, T):
    """True where the emitted token belongs to the response, <|end|> included.

    prompt_lengths (B,), lengths (B,) (prompt + response) -> bool (B, T-1), aligned with
    token_logprobs.
    >>> response_mask(torch.tensor([2]), torch.tensor([4]), T=6).int().tolist()
    [[0, 1, 1, 0, 0]]
    """
    emitted = torch.arange(1, T, device=lengths.device)  # column t emits the token at position t+1
    return (emitted >= prompt_lengths[:, None]) & (emitted < lengths[:, None])


def pad(sequences, device="cpu"):
    """Lists of ids -> (tokens (B, T) padded on the right with 0, lengths (B,))."""
    rows = [torch.as_tensor(sequence, dtype=torch.long) for sequence in sequences]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    return tokens, lengths


def batches_by_length(lengths, batch, rng, epochs=1):
    """Lists of `batch` indices, batches of all sequences, for `epochs` passes, each shuffled. The
    sequences of a batch have about the same length, so little of it is padding: 16 batches in a row
    are sorted by length, then the batches are shuffled."""
    batches = []
    for epoch in range(epochs):
        order = rng.sample(range(len(lengths)), len(lengths))
        shuffled = []
        for start in range(0, len(order), 16 * batch):
            group = sorted(order[start:start + 16 * batch], key=lengths.__getitem__)
            for i in range(0, len(group), batch):
                shuffled.append(group[i:i + batch])
        rng.shuffle(shuffled)
        batches += shuffled
    return batches


# --------------------------------------------------------------------------------------------------
# Sampling


class Rollout(NamedTuple):
    """Sampled sequences."""
    tokens: torch.Tensor            # (B, T), right-padded with 0
    prompt_lengths: torch.Tensor    # (B,)
    lengths: torch.Tensor           # (B,), prompt + response

    def ended(self, end_token):
        """(B,) bool: the response's last token is end_token (false: it hit the length limit)."""
        return self.tokens.gather(1, self.lengths[:, None] - 1).squeeze(1) == end_token

    def responses(self):
        """The responses' ids as lists, end_token included where there is one."""
        prompt_lengths = self.prompt_lengths.tolist()
        lengths = self.lengths.tolist()
        responses = []
        for row, ids in enumerate(self.tokens.tolist()):
            responses.append(ids[prompt_lengths[row]:lengths[row]])
        return responses


class KVCache:
    """The keys and values of all tokens so far, so that each is computed once.

    A slot is not a position: the prompts fill the slots up to the longest one's length, and token t
    of a response goes to slot longest + t in every row. A shorter prompt's padding stays hidden.
    """

    def __init__(self, config, prompt_lengths, max_new_tokens, dtype):
        device = prompt_lengths.device
        self.longest = int(prompt_lengths.max())
        count = (self.longest + max_new_tokens + 7) // 8 * 8  # what a GPU's attention is made for
        self.slots = torch.arange(count, device=device)
        shape = (config.n_layer, len(prompt_lengths), config.n_head, len(self.slots),
                 config.n_embd // config.n_head)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        padding = (self.slots >= prompt_lengths[:, None]) & (self.slots < self.longest)
        visible = torch.zeros(padding.shape, dtype=dtype, device=device)
        visible = visible.masked_fill(padding, -math.inf)
        self.visible = visible[:, None, None]   # (B, 1, 1, slots): for every head, the new token
        self.slot = slice(self.longest)         # where the next keys and values go: the prompts'
        self.mask = None                        # of the slots to read; None: prompts are causal

    def move_to(self, t):
        """Token t of the responses is next; it may look at everything before it."""
        width = self.longest + t + 1
        self.slot = slice(width - 1, width)
        self.mask = self.visible[..., :width]

    def append(self, layer, k, v):
        """Store new keys and values of a layer, (B, heads, T, C/heads) each. Returns the keys,
        values and mask for attention: in the prompts, those same keys and values and None."""
        self.k[layer, :, :, self.slot] = k
        self.v[layer, :, :, self.slot] = v
        if self.mask is None:
            return k, v, None
        width = self.mask.shape[3]
        return self.k[layer, :, :, :width], self.v[layer, :, :, :width], self.mask

    def keep(self, rows):
        """Keep these rows of the batch only."""
        self.k = self.k[:, rows]
        self.v = self.v[:, rows]
        self.visible = self.visible[rows]


class RecordedStep:
    """One decoding step of a model, recorded as a CUDA graph: on a GPU the launches of its kernels
    cost more than their work. It is recorded for the rows of the cache and some 60 tokens; within
    them no shape depends on t, the empty slots are hidden."""

    def __init__(self, model, cache, prompt_lengths):
        self.model = copy.deepcopy(model)
        for block in self.model.h:  # autocast would convert these weights again for every token
            block.attn.to(cache.k.dtype)
            block.mlp.to(cache.k.dtype)
        self.cache = cache
        self.prompt_lengths = prompt_lengths
        self.t = torch.zeros(1, dtype=torch.long, device=prompt_lengths.device)
        self.width = 0

    def keep(self, rows):
        """The cache has these rows only now: record again."""
        self.prompt_lengths = self.prompt_lengths[rows]
        self.width = 0

    def __call__(self, new, t):
        """Pass token t of every response, new (B,), through the model: hidden vectors (B, C)."""
        self.t.fill_(t)
        if self.cache.longest + t >= self.width:
            width = (self.cache.longest + t + 64) // 8 * 8
            self.width = min(width, len(self.cache.slots))
            self.new = new.clone()
            self.hidden = self.step()  # once before the recording, which needs a warm-up
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.hidden = self.step()
        self.new.copy_(new)
        self.graph.replay()
        return self.hidden

    def step(self):
        """Token self.t of every response, self.new, through the model: hidden vectors (B, C)."""
        slot = self.cache.longest + self.t
        empty = self.cache.slots[:self.width] > slot
        self.cache.slot = slot
        self.cache.mask = self.cache.visible[..., :self.width].masked_fill(empty, -math.inf)
        positions = (self.prompt_lengths + self.t)[:, None]
        return self.model.hidden(self.new[:, None], positions, self.cache).squeeze(1)


def sample_token(logits, u, temperature=1.0, top_k=None):
    """Sample by inverting the distribution function: the first token whose cumulative probability
    exceeds u. logits (B, V), u (B,) uniform in [0, 1) -> (B,).

    top_k keeps the k likeliest tokens, and those as likely as the last of them (None: all; 1 is
    greedy decoding).
    >>> logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    >>> [sample_token(logits, torch.tensor([u])).item() for u in (0.49, 0.51, 0.76)]
    [0, 1, 2]
    """
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[1]:
        kth_best = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth_best, -math.inf)
    cumulative = logits.softmax(dim=1).cumsum(dim=1, dtype=torch.float64)  # (B, V), up to about 1
    threshold = u[:, None] * cumulative[:, -1:]  # of the sum as it was rounded, not of 1
    new = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)  # the first above it
    return new.clamp(max=logits.shape[1] - 1)  # none is above if the product was rounded up to it


@torch.no_grad()
def generate(model, prompts, max_new_tokens, end_token=None, temperature=1.0, top_k=None,
             seed=None, at_once=None):
    """Sample one response for each prompt, with a key-value cache.

    prompts: lists of ids, of any lengths; end_token ends a response (None: never stops early);
    temperature and top_k: see sample_token (training rollouts must not truncate); seed: an int for
    a reproducible draw; at_once: how many prompts run through the model together (None: all). A
    response depends on its place among the prompts, the seed and max_new_tokens, not on the other
    prompts nor on at_once (on a GPU also on the number of prompts). Returns a Rollout; a response
    that hits max_new_tokens has no end_token.
    Raises ValueError if a prompt is empty, InputError, a ValueError, if prompt + max_new_tokens
    exceed the context or temperature is not positive, FloatingPointError if the model's output is
    not finite.
    """
    check_room(model.config, prompts, max_new_tokens, temperature)
    device = model.wte.weight.device
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    uniforms = torch.rand(len(prompts), max_new_tokens, dtype=torch.float64, device=device,
                          generator=generator)

    at_once = at_once or len(prompts)
    parts = []
    for start in range(0, len(prompts), at_once):
        end = start + at_once
        parts.append(generate_batch(model, prompts[start:end], uniforms[start:end], end_token,
                                    temperature, top_k))
    T = max(part.tokens.shape[1] for part in parts)
    tokens = [F.pad(part.tokens, (0, T - part.tokens.shape[1])) for part in parts]
    return Rollout(torch.cat(tokens), torch.cat([part.prompt_lengths for part in parts]),
                   torch.cat([part.lengths for part in parts]))


def generate_batch(model, prompts, uniforms, end_token, temperature, top_k):
    """generate for prompts that are in memory all at once. uniforms (B, max_new_tokens): the random
    numbers that choose the tokens."""
    B, max_new_tokens = uniforms.shape
    device = uniforms.device
    prompt_tokens, prompt_lengths = pad(prompts, device)  # (B, longest)

    # 1. Prefill: all prompts at once; the first token comes from the last one of each prompt.
    dtype = model.wte.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    cache = KVCache(model.config, prompt_lengths, max_new_tokens, dtype)
    rows = torch.arange(B, device=device)  # the rows still in the batch
    hidden = model.hidden(prompt_tokens, cache=cache)[rows, prompt_lengths - 1]  # (B, C)
    recorded = RecordedStep(model, cache, prompt_lengths) if device.type == "cuda" else None

    # 2. Decode: one token per row and step, until every row has ended.
    responses = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    lengths = prompt_lengths.clone()
    done = torch.zeros(B, dtype=torch.bool, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        logits = model.logits(hidden)  # (b, V)
        finite &= logits.sum().isfinite()  # one look at them: nan and inf remain in the sum
        new = sample_token(logits, uniforms[rows, t], temperature, top_k)  # (b,)
        responses[rows, t] = new.masked_fill(done, 0)
        lengths[rows] += ~done
        if end_token is not None:
            done |= new == end_token
        if t + 1 == max_new_tokens:
            break

        # Rows that have ended leave the batch. Looking makes a GPU wait: only now and then.
        if end_token is not None and t % 8 == 7:
            going = (~done).nonzero().squeeze(1)
            if len(going) == 0:
                break
            if len(going) <= 0.75 * len(rows):
                rows = rows[going]
                new = new[going]
                done = done[going]
                cache.keep(going)
                if recorded:
                    recorded.keep(going)

        with torch.inference_mode():  # not around more: training cannot use tensors made under it
            if recorded:
                hidden = recorded(new, t)  # which moves the cache itself
            else:
                cache.move_to(t)
                positions = (prompt_lengths[rows] + t)[:, None]  # (b, 1)
                hidden = model.hidden(new[:, None], positions, cache).squeeze(1)  # (b, C)
    if not finite:
        raise FloatingPointError("the model's output is not finite: its weights or its input are "
                                 "broken")

    # 3. Put each response directly behind its prompt.
    tokens = F.pad(prompt_tokens, (0, max_new_tokens))
    places = prompt_lengths[:, None] + torch.arange(max_new_tokens, device=device)
    tokens.scatter_(1, places, responses)
    return Rollout(tokens[:, :int(lengths.max())], prompt_lengths, lengths)


def check_room(config, prompts, max_new_tokens, temperature):
    """The refusals of generate."""
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths, default=0) < 1 or max_new_tokens < 1:
        raise ValueError("generate needs prompts of at least one token, and max_new_tokens >= 1")
    if temperature < 1e-4:
        raise InputError(f"temperature {temperature}: must be at least 0.0001; top_k 1 is greedy")
    if max(lengths) + max_new_tokens > config.block_size:
        raise InputError(f"a prompt of {max(lengths)} tokens and {max_new_tokens} new ones exceed "
                         f"the context of {config.block_size}: shorten the prompt or lower "
                         "max_new_tokens")


def response_texts(rollout, tokenizer):
    """The responses of a Rollout as strings, without <|end|>."""
    ended = rollout.ended(tokenizer.end_token).tolist()
    texts = []
    for row, ids in enumerate(rollout.responses()):
        if ended[row]:
            ids = ids[:-1]
        texts.append(tokenizer.decode(ids))
    return texts


def respond(model, tokenizer, prompts, max_new_tokens, seed, temperature=1.0, top_k=None,
            at_once=None):
    """Sample a response for each prompt (lists of ids), so many at once: (texts without <|end|>,
    ended: bools)."""
    with autocast(model.wte.weight.device):
        rollout = generate(model, prompts, max_new_tokens, tokenizer.end_token, temperature, top_k,
                           seed, at_once)
    return response_texts(rollout, tokenizer), rollout.ended(tokenizer.end_token).tolist()


def memory_of_pieces(config, training, sampling=0, models=1):
    """About how many bytes the largest pieces of a stage take, besides the models: {piece: bytes},
    for show_models in data/run.py. They are for sequences that fill the context.

    training: sequences in one forward pass, of which the backward pass needs some 17 C numbers a
    token and layer, for so many models that learn at once, and the logits three times, their
    gradient among them. sampling: rows in one batch of generate, whose keys and values are kept;
    when rows leave, some are copied. 0: none.
    """
    size = 4
    if torch.cuda.is_available() and gpu_has_bf16():
        size = 2
    tokens = config.block_size
    width = config.n_layer * config.n_embd
    pieces = {}
    if training:
        one = tokens * (models * 17 * width * size + 3 * config.vocab_size * 4)
        pieces[f"{training} sequences trained on"] = training * one
    if sampling:
        cache = sampling * tokens * 2 * width * size
        pieces[f"{sampling} samples drawn at once"] = int(1.4 * cache)
    return pieces


# --------------------------------------------------------------------------------------------------
# Checkpoint and optimizer


def save_checkpoint(path, stage, size, model, tokenizer, **extra):
    """Write a model with all that is needed to use it: stage, size, GPTConfig, vocabulary. Atomic.

    extra: more values that torch.load(weights_only=True) accepts (numbers, strings, lists, dicts,
    tensors).
    """
    checkpoint = {"stage": stage, "size": size, "config": asdict(model.config),
                  "vocabulary": tokenizer.to_strings(), "pattern": tokenizer.pattern,
                  "model": model.state_dict(), **extra}
    write_torch(path, checkpoint)


def load_checkpoint(path, stage, size, device="cpu", model_class=GPT):
    """Read what save_checkpoint wrote: (model, tokenizer, the whole dict). Nothing in the file can
    run code.

    Raises InputError, one line that names the file, if it is missing, corrupt, or of another stage
    or size.
    """
    if not Path(path).exists():
        script, *choice = COMMANDS.get(stage, stage).split()
        command = " ".join(["python", f"{script}.py", *choice])
        raise InputError(f"{path}: no such checkpoint; {command} makes one")
    with refused_if_broken(path, "train the stage again"):
        checkpoint = read_torch(path)
        if (checkpoint["stage"], checkpoint["size"]) != (stage, size):
            raise InputError(f"{path}: is a {checkpoint['stage']} checkpoint of size "
                             f"{checkpoint['size']}, but {stage} of size {size} is wanted")
        tokenizer = Tokenizer.from_strings(checkpoint["vocabulary"], checkpoint["pattern"])
        config = GPTConfig(**checkpoint["config"])
        if config.vocab_size != tokenizer.n_vocab:
            raise ValueError(f"the model has {config.vocab_size} tokens, its tokenizer "
                             f"{tokenizer.n_vocab}")
        model = model_class(config)
        model.load_state_dict(checkpoint["model"])
    return model.to(device), tokenizer, checkpoint


def refuse_other_tokens(path, found, tokenizer):
    """InputError if the checkpoint's tokenizer, found, makes other tokens than another stage's."""
    if found.vocabulary != tokenizer.vocabulary:
        raise InputError(f"{path}: its vocabulary is not that of the other stages; train "
                         f"{path.parent.name} again")


def make_optimizer(model, weight_decay):
    """AdamW with weight decay on matrices only, not on biases and gains. optimizer_step sets the
    learning rate."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over `warmup` steps (a quarter of all at most), then a cosine from peak down
    to 0 at `steps`.
    >>> [round(learning_rate(step, 10, 1.0, warmup=2), 2) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warmup = min(warmup, steps // 4)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def optimizer_step(optimizer, model, lr, max_norm=1.0):
    """Clip the gradient's norm, take a step with the learning rate lr, clear the gradient. Returns
    the norm. Raises FloatingPointError, and takes no step, if it is not finite."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"gradient norm {norm}: no step taken; lower the learning rate")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@torch.inference_mode()
def held_out_loss(model, sequences, prompt_lengths, at_once=64, temperature=1.0):
    """Nats per token, a mean over all response tokens of all sequences (lists of ids), at_once of
    them in one forward pass. Prompts are not counted; prompt_lengths: a list, or a number for all.
    """
    device = model.wte.weight.device
    prompt_lengths = torch.tensor(prompt_lengths, device=device).expand(len(sequences))
    total = 0.0
    count = 0
    for start in range(0, len(sequences), at_once):
        end = start + at_once
        tokens, lengths = pad(sequences[start:end], device)
        mask = response_mask(prompt_lengths[start:end], lengths, tokens.shape[1])
        total -= masked_logprobs(model, tokens, mask, temperature).double().sum().item()
        count += int(mask.sum())
    return total / count


def excess(held_out, entropy):
    """The figures of a loss beside the entropy of its source; none where it is unknown (None)."""
    if entropy is None:
        return {}
    return dict(entropy=entropy, excess=held_out / entropy - 1)


# --------------------------------------------------------------------------------------------------
# Pretraining


HELD_OUT = "a held-out document"


@dataclass
class Config:
    # what to train on
    text: str = ""              # train on this text file instead of the little world
    start: str = ""             # mid-training: continue from the checkpoint in this folder, on
                                # --text or --curated
    curated: bool = False       # the little world's stories without an unkind sentence

    # the model
    vocab_size: int = 1472      # tokens at most, the three special ones included; the world's words
                                # fill some 1,440
    block_size: int = 128       # context in tokens
    n_layer: int = 4            # transformer blocks
    n_head: int = 4             # attention heads in a block
    n_embd: int = 128           # width

    # optimization
    steps: int = 1000           # optimizer steps
    batch: int = 32             # documents in a step; of a text file, windows of block_size tokens
    lr: float = 3e-3            # peak learning rate (linear warm-up, cosine to zero)
    warmup: int = 50            # steps of warm-up
    weight_decay: float = 0.1   # AdamW's, on matrices only

    # sampling
    sample: str = ""            # print three continuations of this text, and stop
    temperature: float = 1.0    # of --sample
    top_k: int = 0              # --sample draws from the k likeliest tokens only; 0: from all

    # one text, token by token
    explain: str = field(default="", metadata={"alone": HELD_OUT})  # print each token's
                                # log-probability and what the model expected, and stop; without a
                                # text, of a held-out document

    # this run
    size: Literal["auto", "cpu", "gpu", "gpt2"] = "auto"    # auto: gpu if there is one; gpt2: see
                                                            # data/huggingface.py
    out: str = "out"            # folder of all outputs; this stage writes to OUT/SIZE/NAME
    name: str = "gpt"           # name of this run's folder: gpt-… keeps an experiment apart
    seed: int = 1               # fixes weights, data and samples
    report: int = 100           # steps between two reports, and between two saves of the state
    resume: bool = False        # continue the run that was interrupted in this folder


GPU = dict(block_size=256, n_layer=8, n_head=8, n_embd=512, steps=2000, batch=128, lr=1e-3,
           warmup=100)


def pretrain(model, corpus, old_documents, config, run):
    """Next-token prediction, in place. old_documents: held-out lists of ids that mid-training may
    forget ([]: none)."""
    optimizer = make_optimizer(model, config.weight_decay)
    sequences = corpus.sequences
    sizes = [len(ids) for ids in sequences]
    batches = batches_by_length(sizes, config.batch, random.Random(f"batches {config.seed}"))
    predicted = sum(sizes) - len(sizes)  # all tokens but the first of each
    tokens_per_batch = predicted / len(batches)  # so every token counts equally

    for step in run.steps(len(batches), model=model, optimizer=optimizer):
        tokens, lengths = pad([sequences[i] for i in batches[step]], model.wte.weight.device)
        mask = response_mask(torch.ones_like(lengths), lengths, tokens.shape[1])  # all but padding

        loss = -masked_logprobs(model, tokens, mask).sum()  # -Σ_t log p_θ(x_t | x_<t)
        (loss / tokens_per_batch).backward()
        lr = learning_rate(step, len(batches), config.lr, config.warmup)
        norm = optimizer_step(optimizer, model, lr)

        run.log(step, weight=mask.sum(), loss=loss / mask.sum())  # nats a token
        if run.due(step):
            run.log(step, **held_out_figures(model, corpus, old_documents, config.batch),
                    grad_norm=norm, lr=lr)


def held_out_figures(model, corpus, old_documents, at_once):
    """The loss on held-out text beside its source's entropy, and on old documents; at_once of them
    in one forward pass."""
    loss = held_out_loss(model, corpus.held_out, 1, at_once)
    figures = dict(held_out=loss, **excess(loss, corpus.entropy))
    if old_documents:
        figures["old_held_out"] = held_out_loss(model, old_documents, 1, at_once)
    return figures


def load_start(config, device):
    """(model, tokenizer, path, what mid-training may forget) of --start."""
    if bool(config.text) == config.curated:
        raise InputError(f"--start {config.start}: needs either --curated or --text FILE")
    if Path(config.start).resolve() == stage_folder(config, config.name).resolve():
        raise InputError(f"--start {config.start}: needs a separate folder: --name gpt-…")
    complete(Path(config.start))
    path = Path(config.start) / "checkpoint.pt"
    model, tokenizer, checkpoint = load_checkpoint(path, "gpt", config.size, device)
    old_documents = []
    if not checkpoint["text"] and not checkpoint.get("loaded"):
        old_documents = encode_documents(held_out_documents(), tokenizer)
    return model, tokenizer, path, old_documents


def train(config):
    """Pretrain a GPT, or continue one, and save it to OUT/SIZE/NAME/checkpoint.pt."""
    folder = stage_folder(config, config.name)
    device = get_device()
    model = None
    tokenizer = None
    old_documents = []
    sources = []
    if config.start:
        model, tokenizer, path, old_documents = load_start(config, device)
        sources = [path]
        config = replace(config, **asdict(model.config))
    elif config.size == "gpt2":
        raise InputError("--size gpt2: is that of a published GPT-2, which is not trained here: "
                         "python -m data.huggingface load FOLDER --size gpt2")
    if config.n_embd % config.n_head:
        raise InputError(f"--n_embd {config.n_embd} must be a multiple of --n_head {config.n_head}")
    if config.block_size < 2:
        raise InputError(f"--block_size {config.block_size}: must be at least 2")
    if config.vocab_size < 259:
        raise InputError(f"--vocab_size {config.vocab_size}: 256 bytes and 3 special tokens need "
                         "at least 259")

    # 1. Text, tokenizer, tokens; what is held out.
    print("reads the text" + ("" if tokenizer else " and learns its vocabulary"), flush=True)
    count = config.steps * config.batch
    if config.text:
        corpus = text_corpus(config.text, tokenizer, config.vocab_size, config.block_size, count,
                             config.seed, folder)
    else:
        corpus = world_corpus(tokenizer, config.vocab_size, config.block_size, count, config.seed,
                              folder, config.curated)
    text_checksum = checksum(config.text) if config.text else None
    tokenizer = corpus.tokenizer
    if model is None:
        shape = GPTConfig(tokenizer.n_vocab, config.block_size, config.n_layer, config.n_head,
                          config.n_embd)
        model = GPT(shape, torch.Generator().manual_seed(config.seed)).to(device)
    announce(config.name, config, device, corpus.description, model)

    opening = "\n" if config.text else "Once"
    beginning = corpus.start + tokenizer.encode(opening)
    room = min(60, config.block_size - len(beginning))
    before, _ = respond(model, tokenizer, [beginning] * 2, room, config.seed)

    # 2. Next-token prediction.
    with Run(config.name, folder, config, config.report, sources) as run:
        if config.start and not run.rows:
            figures = held_out_figures(model, corpus, old_documents, config.batch)
            run.record(**figures)
            losses = [f"{name} {x:.3f}" for name, x in figures.items() if "held_out" in name]
            print("before  " + ", ".join(losses))
        pretrain(model, corpus, old_documents, config, run)

        # 3. Save; the same beginning before and after.
        save_checkpoint(run.folder / "checkpoint.pt", "gpt", config.size, model, tokenizer,
                        text=config.text, text_checksum=text_checksum,
                        curated=config.curated, metrics=run.figures(), made_from=run.made_from())
        run.finish()
    after, _ = respond(model, tokenizer, [beginning] * 2, room, config.seed)
    for text in before:
        show(("before", opening + text))
    for text in after:
        show(("after", opening + text))
    command = "python sft.py"
    if config.name != "gpt":
        command += f" --base {config.name}"
    print(f"saved {folder / 'checkpoint.pt'}; next: {command}", flush=True)


def sample(config):
    """Print three continuations of config.sample from the stage's checkpoint."""
    folder = stage_folder(config, config.name)
    complete(folder)
    model, tokenizer, checkpoint = load_checkpoint(folder / "checkpoint.pt", "gpt", config.size,
                                                   get_device())
    prompt = tokenizer.encode(config.sample)
    if not checkpoint["text"]:
        prompt = [tokenizer.end_token] + prompt
    room = model.config.block_size - len(prompt)
    if room < 1:
        raise InputError(f"--sample: {len(prompt)} tokens leave no room in the context of "
                         f"{model.config.block_size}")
    texts, _ = respond(model, tokenizer, [prompt] * 3, room, config.seed, config.temperature,
                       config.top_k or None)
    for text in texts:
        print(f"{config.sample}{text}\n")


def explain(config):
    """Print log p_θ(x_t | x_<t) of a text, token by token, beside what the model expected there:
    --explain TEXT, or a held-out document of the little world, whose exact probability is known."""
    flags = ("name", "size", "out")
    if config.explain == HELD_OUT:
        flags += ("seed",)  # which document
    allow_flags(config, flags, "explain")
    path = stage_folder(config, config.name) / "checkpoint.pt"
    complete(path.parent)
    model, tokenizer, checkpoint = load_checkpoint(path, "gpt", config.size, get_device())
    origin = checkpoint["text"] or checkpoint.get("loaded")
    world = stories.WORLD
    if checkpoint.get("curated"):
        world, _ = stories.curate()

    text = config.explain
    if config.explain == HELD_OUT:
        if origin:
            raise InputError(f"{path}: comes from {origin}, which holds no documents of the little "
                             "world; --explain TEXT takes any text")
        rng = random.Random(f"document {config.seed}")
        text = rng.choice(held_out_documents(world)).text
    log_p = -math.inf if origin else stories.document_log_probability(text, world)
    whole = log_p > -math.inf  # a whole document of the world: <|end|> comes next
    ids = tokenizer.encode(text)
    if not checkpoint["text"]:  # the world's documents begin after an <|end|>
        ids = [tokenizer.end_token, *ids]
    if whole:
        ids = [*ids, tokenizer.end_token]
    if len(ids) > model.config.block_size:
        raise InputError(f"--explain: {len(ids)} tokens exceed the context of "
                         f"{model.config.block_size}")

    tokens = torch.tensor([ids], device=get_device())  # (1, T)
    with torch.inference_mode(), autocast(tokens.device):
        logits = model(tokens)  # (1, T, V)
        logprobs = token_logprobs(logits, tokens)[0]  # (T-1,)
    print_predictions(tokens[0], logprobs, logits[0], whole, tokenizer)

    n = len(logprobs)
    total = -logprobs.sum().item()
    if n:  # else the text is one token, which nothing predicts
        print(f"-Σ log p_θ = {total:.3f} nats over {n} tokens, {total / n:.4f} a token")
    if whole:
        print(f"-log p(x)  = {-log_p:.3f} nats, the source's own, {-log_p / n:.4f} a token")
    for row in checkpoint.get("metrics", [])[-1:]:
        if whole and "entropy" in row:
            print(f"all held-out documents: {row['held_out']:.4f} a token, their entropy "
                  f"{row['entropy']:.4f}")


def print_predictions(tokens, logprobs, logits, whole, tokenizer):
    """A row a token: tokens (T,), their log-probabilities (T-1,), what logits (T, V) predict there,
    and in a last row what comes next, unless the text is a whole document."""
    predictions = logits.float().log_softmax(dim=1)  # (T, V)
    entropy = -(predictions.exp() * predictions).sum(dim=1)  # (T,)
    ranks = 1 + (predictions[:-1] > logprobs[:, None]).sum(dim=1)  # (T-1,)
    best = predictions.topk(3)  # (T, 3)

    columns = [Column("x_t", [*tokenizer.shown(tokens.tolist()), "(next)"]),
               Column("log p_θ", [None, *logprobs.tolist(), None], ".3f", signed=True),
               Column("rank", [None, *ranks.tolist(), None], "d"),
               Column("entropy", [None, *entropy.tolist()], ".3f")]
    for i, name in enumerate(("likeliest", "second", "third")):
        texts = tokenizer.shown(best.indices[:, i].tolist())
        cells = [f"{p:.3f} {text}" for p, text in zip(best.values[:, i].exp().tolist(), texts)]
        columns.append(Column(name, [None, *cells]))
    if whole:
        columns = [column._replace(values=column.values[:-1]) for column in columns]
    print_columns(columns, [
        "log p_θ(x_t | x_<t), nats: CS 224R, Lecture 9, ch. 3 (token_logprobs). Beside it what",
        "the model expects before it sees x_t: x_t's rank, the entropy, the likeliest tokens."])


def main(argv=None):
    needs = {"temperature": ("sample",), "top_k": ("sample",), "curated": ("start",)}
    for name in GPTConfig.__dataclass_fields__:  # the checkpoint's
        needs[name] = ("start", "")
    config = parse_config(Config, GPU, argv,
                          "Pretrain a small GPT on the little world or on a text file.", needs)
    check_name(config.name, "gpt")
    if config.sample:
        allow_flags(config, ("name", "temperature", "top_k", "seed", "size", "out"), "sample")
        sample(config)
    elif config.explain:
        explain(config)
    else:
        train(config)


if __name__ == "__main__":
    run_script(main)
