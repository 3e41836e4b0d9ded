"""The model, its log-probabilities, masks, sampling and checkpoints, and pretraining."""

import contextlib
import math
import os
import pickle
import random
import shutil
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data.corpus
import gpt
import sft
from data import run
from data.corpus import Corpus, encode_documents, held_out_documents, world_corpus
from data.files import InputError
from data.run import SilentRun
from data.tokenizer import Tokenizer, train as train_vocabulary
from gpt import GPT, GPTConfig, Rollout, generate, masked_logprobs, response_mask, token_logprobs
from helpers import cpu_only, metrics, snapshot, untimed

V = 11      # the tiny vocabulary ...
END = 3     # ... and the token that ends a response in it


def tiny_model(seed=0, vocab_size=V, block_size=64, n_layer=2, n_head=2, n_embd=32):
    """A GPT whose biases and gains aren't 0 and 1; float64, so that two ways of computing it agree
    to 1e-12."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size, block_size, n_layer, n_head, n_embd))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
    return model.double()


def constant_model(logits):
    """A GPT that gives these logits after every prefix: its hidden state is always the first unit
    vector."""
    model = tiny_model(vocab_size=len(logits))
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(torch.eye(32)[0])
        model.wte.weight[:, 0] = torch.tensor(logits, dtype=torch.float64)
    return model


def random_prompts(seed, count, longest=9):
    rng = random.Random(seed)
    return [[rng.randrange(V) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def brute_force_sample(model, prompts, max_new_tokens, end_token, temperature, seed, device="cpu"):
    """The definition: row by row, token by token, a full forward pass without a cache, the same
    uniforms (device's)."""
    uniforms = torch.rand(len(prompts), max_new_tokens, dtype=torch.float64, device=device,
                          generator=torch.Generator(device).manual_seed(seed)).tolist()
    responses = []
    for prompt, row in zip(prompts, uniforms):
        ids = list(prompt)
        for u in row:
            with torch.no_grad():
                logits = model(torch.tensor([ids]))[0, -1].double()
            weights = (logits / temperature).softmax(0).tolist()
            token = 0
            total = weights[0]
            while total <= u * sum(weights):
                token += 1
                total += weights[token]
            ids.append(token)
            if token == end_token:
                break
        responses.append(ids[len(prompt):])
    return responses


# --------------------------------------------------------------------------------------------------
# The model


def numpy_gpt2(weights, tokens, n_layer, n_head):
    """GPT-2's forward pass for one row in float64, written from the paper: loops, no tensor
    library."""
    w = {name: tensor.double().numpy() for name, tensor in weights.items()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + 1e-5)
        return scaled * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    T = len(tokens)
    C = w["wte.weight"].shape[1]
    size = C // n_head
    x = np.stack([w["wte.weight"][token] + w["wpe.weight"][t] for t, token in enumerate(tokens)])
    for layer in range(n_layer):
        block = f"h.{layer}."
        # GPT-2's order: all q, all k, all v.
        q, k, v = np.split(linear(norm(x, block + "ln_1"), block + "attn.c_attn"), 3, axis=1)
        y = np.zeros((T, C))
        for head in range(n_head):
            part = slice(head * size, (head + 1) * size)
            for t in range(T):
                scores = k[:t + 1, part] @ q[t, part] / math.sqrt(size)
                p = np.exp(scores - scores.max())
                y[t, part] = p / p.sum() @ v[:t + 1, part]
        x = x + linear(y, block + "attn.c_proj")
        a = linear(norm(x, block + "ln_2"), block + "mlp.c_fc")
        a = 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a ** 3)))
        x = x + linear(a, block + "mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def test_logits_are_gpt2s():
    """A norm too many or too few, heads cut along the wrong axis, erf for tanh: GPT-2's weights
    then talk nonsense."""
    model = tiny_model(seed=1, n_head=4)
    tokens = torch.randint(V, (3, 17), generator=torch.Generator().manual_seed(1))
    for row, logits in zip(tokens.tolist(), model(tokens)):
        expected = torch.tensor(numpy_gpt2(model.state_dict(), row, 2, 4))
        torch.testing.assert_close(logits.detach(), expected, atol=1e-10, rtol=1e-10)


def test_padding_on_the_right_changes_no_real_logit():
    """Attention that sees the padding: then a response's log-probability depends on its neighbours
    in the batch."""
    model = tiny_model(seed=2)
    generator = torch.Generator().manual_seed(2)
    for length in (1, 5, 30):
        row = torch.randint(V, (1, length), generator=generator)
        alone = model(row)
        for _ in range(3):
            padded = torch.cat([row, torch.randint(V, (1, 12), generator=generator)], dim=1)
            torch.testing.assert_close(model(padded)[:, :length], alone, atol=1e-12, rtol=0)


def test_too_long_a_sequence_is_refused():
    """A sequence that is cut silently (nanoGPT's sampling crops the context) is scored on half of
    what it says."""
    with pytest.raises(ValueError, match="65 tokens do not fit the context of 64"):
        tiny_model()(torch.zeros(1, 65, dtype=torch.long))


def test_the_initial_weights_come_from_the_given_generator():
    """--seed 1 that gives another model after anything else has drawn from torch's own
    generator."""
    shape = GPTConfig(V, 8, 2, 2, 32)
    weights = []
    for seed in (1, 1, 2):
        model = GPT(shape, torch.Generator().manual_seed(seed))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    one, twin, other = weights
    assert torch.equal(one, twin)
    assert ((one != other) | (one == 0) | (one == 1)).all()  # biases are 0, gains are 1


# --------------------------------------------------------------------------------------------------
# Log-probabilities and masks


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_token_logprobs_against_cross_entropy(temperature):
    """Logits compared with the token that they have already seen (no shift), a double shift, no
    temperature."""
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(3, 9, V, generator=generator)
    tokens = torch.randint(V, (3, 9), generator=generator)
    logprobs = token_logprobs(logits, tokens, temperature)
    oracle = -F.cross_entropy((logits / temperature)[:, :-1].transpose(1, 2), tokens[:, 1:],
                              reduction="none")
    assert logprobs.shape == (3, 8)
    torch.testing.assert_close(logprobs, oracle)


def test_column_t_is_the_action_of_emitting_token_t_plus_1():
    """Off by one: a change of tokens[:, 5] must change column 4, where it is emitted, and those
    after it alone."""
    model = tiny_model(seed=4)
    tokens = torch.randint(V, (1, 12), generator=torch.Generator().manual_seed(4))
    other = tokens.clone()
    other[0, 5] = (tokens[0, 5] + 1) % V
    changed = token_logprobs(model(tokens), tokens) != token_logprobs(model(other), other)
    assert changed.tolist() == [[False] * 4 + [True] * 7]


def test_token_logprobs_are_float32_under_bf16():
    """Log-probabilities in bf16 are wrong in the second digit: PPO's ratio is noise, not 1, before
    the first step."""
    logits = (3 * torch.randn(2, 5, V, generator=torch.Generator().manual_seed(5))).bfloat16()
    tokens = torch.tensor([[0, 1, 2, 3, 4]] * 2)
    logprobs = token_logprobs(logits, tokens)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, token_logprobs(logits.float(), tokens))


def test_logits_are_float32_under_autocast(monkeypatch):
    """A bf16 head: logits near 10 are rounded to 1/16, and PPO's ratio before the first step is
    anything but 1."""
    model = tiny_model(seed=5).float()
    with torch.no_grad():
        model.wte.weight *= 4
    tokens = torch.randint(V, (3, 12), generator=torch.Generator().manual_seed(5))
    states = []
    inside = []
    model.ln_f.register_forward_hook(
        lambda module, inputs, output: states.append(output.detach()))
    model.h[0].mlp.c_fc.register_forward_hook(
        lambda module, inputs, output: inside.append(output.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
        assert torch.is_autocast_enabled("cpu")
        rounded = F.linear(states[0], model.wte.weight)
    assert inside == [torch.bfloat16]  # the trunk is what bf16 makes faster
    assert logits.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    assert torch.equal(logits, F.linear(states[0].float(), model.wte.weight))
    assert (logits - rounded.float()).abs().max() > 0.01  # so the comparison means something

    # The sampler's logits are the same head's, so what is sampled is what is scored.
    sampled = []
    head = model.logits

    def keep(x):
        sampled.append((x, head(x)))
        return sampled[-1][1]

    monkeypatch.setattr(model, "logits", keep)
    with torch.autocast("cpu", torch.bfloat16):
        generate(model, random_prompts(5, 4), 6, seed=1)
    assert len(sampled) == 6
    with torch.no_grad():
        for x, logits in sampled:
            assert logits.dtype == torch.float32
            assert torch.equal(logits, F.linear(x.float(), model.wte.weight))


def test_cudnns_attention_is_off():
    """On a Hopper GPU torch's first choice is cuDNN's attention, which makes a plan for every new
    shape: sampling, where every step has one, takes many times as long."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # torch's default is True
    assert gpt.get_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_response_mask_is_exactly_the_response_and_its_end():
    """A mask one column late trains on padding and drops the first token; one without <|end|> never
    teaches to stop."""
    mask = response_mask(torch.tensor([2]), torch.tensor([4]), T=6)
    assert mask.int().tolist() == [[0, 1, 1, 0, 0]]
    rng = random.Random(6)
    for _ in range(50):
        rows = []
        for _ in range(4):
            prompt = rng.randint(1, 6)
            rows.append((prompt, prompt + rng.randint(1, 6)))
        T = max(length for _, length in rows) + rng.randint(0, 3)
        expected = [[False] * (T - 1) for _ in rows]
        for row, (prompt, length) in enumerate(rows):
            for position in range(prompt, length):  # the place of a token of the response ...
                expected[row][position - 1] = True  # ... is one after the column that emits it
        prompt_lengths = torch.tensor([prompt for prompt, _ in rows])
        lengths = torch.tensor([length for _, length in rows])
        mask = response_mask(prompt_lengths, lengths, T)
        assert mask.dtype == torch.bool and mask.tolist() == expected


@pytest.mark.parametrize("padding", [0, END])
def test_masked_loss_against_cross_entropy_with_ignore_index(padding):
    """A mask made from token values (tokens != pad) drops <|end|> where <|end|> is the padding
    token, too."""
    generator = torch.Generator().manual_seed(7)
    prompt_lengths = torch.tensor([3, 1, 5])
    lengths = torch.tensor([8, 2, 10])
    tokens = torch.randint(V, (3, 10), generator=generator)
    logits = torch.randn(3, 10, V, generator=generator)
    labels = torch.full((3, 10), -100)
    for row in range(3):
        tokens[row, lengths[row] - 1] = END
        response = slice(prompt_lengths[row], lengths[row])
        labels[row, response] = tokens[row, response]
        tokens[row, lengths[row]:] = padding
    oracle = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(),
                             ignore_index=-100)
    mask = response_mask(prompt_lengths, lengths, 10)
    loss = -token_logprobs(logits, tokens)[mask].mean()
    assert loss.item() == pytest.approx(oracle.item(), rel=1e-6)


def some_places(seed):
    """(tokens, masks): a response mask, one with holes, with whole rows false, all true, and all
    false."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (5, 14), generator=generator)
    response = response_mask(torch.tensor([3, 1, 9, 13, 6]), torch.tensor([10, 2, 14, 14, 7]), 14)
    holes = torch.rand(5, 13, generator=generator) < 0.4
    rows = response.clone()
    rows[[0, 3]] = False
    return tokens, [response, holes, rows, torch.ones_like(holes), torch.zeros_like(holes)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_masked_logprobs_equal_the_full_ones(temperature):
    """Logits of the response only, put back in the wrong order, one column late, or at another
    row's places."""
    model = tiny_model(seed=30).float()
    tokens, masks = some_places(30)
    full = token_logprobs(model(tokens), tokens, temperature).detach()
    for mask in masks:
        found = masked_logprobs(model, tokens, mask, temperature).detach()
        assert found.shape == mask.shape and found.dtype == torch.float32
        torch.testing.assert_close(found[mask], full[mask], atol=2e-6, rtol=1e-6)
        assert (found[~mask] == 0).all() and full.abs().min() > 1e-3  # a 0 is no log-probability


@pytest.mark.parametrize("scale", [1, 40])
def test_masked_logprobs_have_the_full_ones_gradient(scale):
    """A place whose gradient is lost, counted twice, or comes from another token than its value
    does. At a scale of 40 some tokens have all of the probability, and others none to speak of."""
    tokens, masks = some_places(31)
    weights = torch.randn(masks[0].shape, generator=torch.Generator().manual_seed(31))
    for mask in masks:
        model = tiny_model(seed=31).float()
        twin = tiny_model(seed=31).float()
        with torch.no_grad():
            model.wte.weight *= scale
            twin.wte.weight *= scale
        (weights * masked_logprobs(model, tokens, mask, 0.7)).sum().backward()
        full = token_logprobs(twin(tokens), tokens, 0.7)
        assert scale == 1 or full.min() < -80 and full.max() > -1e-6
        (weights * full)[mask].sum().backward()
        for (name, ours), theirs in zip(model.named_parameters(), twin.parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4,
                                       msg=lambda text: f"{name}: {text}")
            assert ours.grad.any() == mask.any() or name.endswith("c_attn.bias")


def test_held_out_loss_against_cross_entropy_row_by_row():
    """A mean of batch means, which weighs a token of a short text more; prompts that are
    counted."""
    model = tiny_model(seed=8).float()
    rng = random.Random(8)
    sequences = [[rng.randrange(V) for _ in range(rng.randint(4, 40))] for _ in range(13)]
    for prompts in ([rng.randint(1, 3) for _ in sequences], 1):
        total = 0.0
        count = 0
        with torch.no_grad():
            for i, ids in enumerate(sequences):
                prompt = prompts if prompts == 1 else prompts[i]
                logits = model(torch.tensor([ids]))[0, prompt - 1:-1]
                total += F.cross_entropy(logits, torch.tensor(ids[prompt:]), reduction="sum").item()
                count += len(ids) - prompt
        for rows in (1, 5, 64):
            loss = gpt.held_out_loss(model, sequences, prompts, rows)
            assert loss == pytest.approx(total / count, rel=1e-5)


def test_batches_by_length_holds_every_index_once():
    """A last batch that is dropped, or a text that is seen twice in an epoch and another never; an
    epoch that begins in the batch that ends the one before, or repeats its order."""
    for count, batch in ((1, 4), (7, 7), (100, 3), (130, 4)):
        lengths = [random.Random(i).randint(1, 50) for i in range(count)]
        batches = gpt.batches_by_length(lengths, batch, random.Random(9))
        assert sorted(i for rows in batches for i in rows) == list(range(count))
        assert len(batches) == math.ceil(count / batch) and max(map(len, batches)) <= batch
    spreads = []
    for rows in batches:
        among = [lengths[i] for i in rows]
        spreads.append(max(among) - min(among))
    assert sum(spreads) / len(spreads) < 10  # of 49; at random it would be about 29
    assert batches != gpt.batches_by_length(lengths, batch, random.Random(10))
    rng = random.Random(9)
    assert gpt.batches_by_length(lengths, batch, rng) == batches
    second = gpt.batches_by_length(lengths, batch, rng)
    assert second != batches
    assert gpt.batches_by_length(lengths, batch, random.Random(9), 2) == batches + second


# --------------------------------------------------------------------------------------------------
# Sampling


def shapes_of_passes(model, monkeypatch):
    """A list that holds, for every forward pass from now on, the shape of its tokens."""
    shapes = []
    hidden = model.hidden

    def watched(tokens, *rest, **named):
        shapes.append(tuple(tokens.shape))
        return hidden(tokens, *rest, **named)

    monkeypatch.setattr(model, "hidden", watched)
    return shapes


def test_greedy_decoding_with_the_cache_equals_the_full_forward_pass():
    """A cache that is off by a position for the shorter prompts of a batch: wrong positions, or
    padding is seen."""
    model = tiny_model(seed=10)
    prompts = random_prompts(10, 8)
    assert len({len(prompt) for prompt in prompts}) > 3
    responses = generate(model, prompts, 20, top_k=1).responses()
    for prompt, response in zip(prompts, responses):
        ids = list(prompt)
        for _ in range(20):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        assert response == ids[len(prompt):]
    assert len({tuple(response) for response in responses}) > 3  # else any cache would do


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_sampling_equals_a_brute_force_sampler(temperature, monkeypatch):
    """Anything at all between the cache and the draw: an old key, a row's neighbour, a temperature
    applied twice, a row that goes on in another one's slots once the batch has shrunk."""
    model = tiny_model(seed=41)
    prompts = random_prompts(11, 20)
    expected = brute_force_sample(model, prompts, 26, END, temperature, seed=5)
    shapes = shapes_of_passes(model, monkeypatch)
    rollout = generate(model, prompts, 26, END, temperature, seed=5)
    assert rollout.responses() == expected and len({len(prompt) for prompt in prompts}) > 5
    assert {True, False} == set(rollout.ended(END).tolist())
    assert shapes[0] == (20, 9)
    assert {width for _, width in shapes[1:]} == {1}  # after the prompts, a token at a time
    assert len({rows for rows, _ in shapes}) > 1  # and rows did leave the batch
    again = generate(model, prompts, 26, END, temperature, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(rollout, again))  # one seed, one draw
    assert generate(model, prompts, 26, END, temperature, seed=6).responses() != rollout.responses()


def test_a_rollouts_layout():
    """Lengths that leave <|end|> out, prompts that come back changed, padding that isn't on the
    right."""
    model = tiny_model(seed=12)
    prompts = random_prompts(12, 9)
    rollout = generate(model, prompts, 12, END, seed=1)
    assert rollout.prompt_lengths.tolist() == [len(prompt) for prompt in prompts]
    assert rollout.tokens.shape[1] == max(rollout.lengths)
    for row, prompt, length, response, ended in zip(
            rollout.tokens.tolist(), prompts, rollout.lengths.tolist(), rollout.responses(),
            rollout.ended(END).tolist()):
        assert row == prompt + response + [0] * (len(row) - length)
        assert length == len(prompt) + len(response)
        assert END not in response[:-1] and ended == (response[-1] == END)
        assert ended or len(response) == 12


def test_ended_reads_the_last_real_token():
    """A response that hit the limit and is padded with <|end|> counts as ended, and escapes its
    penalty."""
    tokens = [[1, 2, END, END], [1, END, 0, 0], [1, 2, 5, END], [END, 5, 0, 0]]
    rollout = Rollout(torch.tensor(tokens), torch.tensor([1, 1, 1, 1]), torch.tensor([2, 2, 4, 2]))
    assert rollout.ended(END).tolist() == [False, True, True, False]
    assert rollout.responses() == [[2], [END], [2, 5, END], [5]]


def test_the_sampled_distribution_is_the_scored_one():
    """PPO's first ratio isn't 1: the sampler's and the scorer's log-probabilities differ (another
    temperature, another position). Here every draw lies between the scorer's own cumulative
    probabilities of token and predecessor."""
    model = tiny_model(seed=13)
    temperature = 0.8
    prompts = random_prompts(13, 8)
    rollout = generate(model, prompts, 20, END, temperature, seed=3)
    uniforms = torch.rand(8, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    logits = model(rollout.tokens)
    columns = []  # π of every possible next token, by token_logprobs itself: ask for each in turn
    for v in range(V):
        tokens = torch.full_like(rollout.tokens, v)
        columns.append(token_logprobs(logits, tokens, temperature).exp())
    table = torch.stack(columns, dim=2)  # (B, T-1, V)
    mask = response_mask(rollout.prompt_lengths, rollout.lengths, rollout.tokens.shape[1])
    for row in range(8):
        p = table[row, mask[row]]  # (response, V)
        chosen = rollout.tokens[row, 1:][mask[row], None]
        upper = p.cumsum(1).gather(1, chosen).squeeze(1)
        lower = upper - p.gather(1, chosen).squeeze(1)
        u = uniforms[row, :len(p)]
        assert len(p) > 0 and (lower - 1e-5 <= u).all() and (u <= upper + 1e-5).all()


def test_rows_that_have_ended_leave_the_batch_and_change_nothing(monkeypatch):
    """Rows mixed up when the ended ones leave the batch: a story goes on under another prompt."""
    model = tiny_model(seed=14)
    prompts = random_prompts(14, 16)
    whole = generate(model, prompts, 50, None, seed=2).responses()
    shapes = shapes_of_passes(model, monkeypatch)
    stopped = generate(model, prompts, 50, END, seed=2).responses()
    assert stopped == [row[:row.index(END) + 1] if END in row else row for row in whole]
    sizes = [rows for rows, _ in shapes]
    assert len(set(sizes)) >= 3 and sizes == sorted(sizes, reverse=True)  # rows left, repeatedly
    assert len({len(row) for row in stopped}) > 6


def test_sampling_stops_when_all_rows_have_ended(monkeypatch):
    """96 forward passes for responses of ten tokens."""
    model = constant_model([0.0] * END + [60.0] + [0.0] * 7)
    shapes = shapes_of_passes(model, monkeypatch)
    rollout = generate(model, [[1], [2, 4]], 60, END, seed=1)
    assert rollout.responses() == [[END], [END]] and rollout.lengths.tolist() == [2, 3]
    assert len(shapes) <= 8


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.bfloat16, 0.05)])
def test_a_recorded_step_is_the_plain_one(dtype, atol, monkeypatch):
    """A step for a GPU, whose shapes may not depend on t, that sees slots which are still empty, or
    not those of the tokens before; that goes on with rows that have left the batch, or beyond the
    slots that it was recorded for. Here a replay runs the step anew: the recording itself needs a
    GPU."""
    recordings = []

    class Graph:
        def __init__(self):
            recordings.append((recorded.width, len(recorded.new)))

        def replay(self):
            recorded.hidden = recorded.step()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    model = tiny_model(seed=42, block_size=100)
    if dtype == torch.bfloat16:
        model = model.float()
    tokens, prompt_lengths = gpt.pad(random_prompts(42, 6))
    caches = []
    generator = torch.Generator().manual_seed(42)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for _ in range(2):
            caches.append(gpt.KVCache(model.config, prompt_lengths, 80, dtype))
            model.hidden(tokens, cache=caches[-1])
        plain, cache = caches
        recorded = gpt.RecordedStep(model, cache, prompt_lengths)
        for t in range(79):
            if t == 70:
                rows = torch.tensor([0, 2, 5])
                prompt_lengths = prompt_lengths[rows]
                for one in (plain, cache, recorded):
                    one.keep(rows)
            new = torch.randint(V, (len(prompt_lengths),), generator=generator)
            plain.move_to(t)
            expected = model.hidden(new[:, None], (prompt_lengths + t)[:, None], plain).squeeze(1)
            torch.testing.assert_close(recorded(new, t), expected, atol=atol, rtol=0)
    longest = tokens.shape[1]
    first = (longest + 64) // 8 * 8
    last = (longest + 80 + 7) // 8 * 8
    assert recordings == [(first, 6), (last, 6), (last, 3)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recorded_steps_sample_the_same_on_a_gpu():
    """A recorded step that stays at its token, goes on with rows that have left the batch, or sees
    too few slots."""
    for end in (END, None):  # rows leave the batch; all of them outlive a recording
        model = tiny_model(seed=41, block_size=100)
        prompts = random_prompts(11, 20)
        expected = brute_force_sample(model, prompts, 90, end, 1.0, seed=5, device="cuda")
        assert generate(model.to("cuda"), prompts, 90, end, seed=5).responses() == expected


def test_a_row_does_not_depend_on_its_neighbours():
    """A draw that changes with what else is in the batch: nobody can reproduce one response."""
    model = tiny_model(seed=15)
    prompts = random_prompts(15, 8)
    responses = generate(model, prompts, 20, END, seed=4).responses()
    assert generate(model, prompts[:5], 20, END, seed=4).responses() == responses[:5]
    others = [[1] * 30] * 4 + prompts[4:]
    assert generate(model, others, 20, END, seed=4).responses()[4:] == responses[4:]


def test_memory_that_nobody_wrote_is_never_read():
    """A masked key still counts if it is NaN (0 · NaN = NaN): a cache from torch.empty must not
    rely on what lies there.

    PyTorch can fill fresh memory with NaN; here all rows but the longest have slots that are not
    written yet.
    """
    model = tiny_model(seed=16)
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8], [2, 3]]
    expected = generate(model, prompts, 6, seed=1).responses()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        assert generate(model, prompts, 6, seed=1).responses() == expected
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_frequencies(temperature):
    """A sampler that is nearly right: the first token over- or the last one underweighted,
    temperature squared."""
    n = 10000
    vocab = 4
    model = tiny_model(seed=17, vocab_size=vocab, n_embd=8)
    with torch.no_grad():
        model.wte.weight *= 0.5  # every pair of tokens likely enough for the statistics
    counts = torch.zeros(vocab, vocab, dtype=torch.float64)
    rollout = generate(model, [[1, 2]] * n, 2, temperature=temperature, seed=7)
    for first, second in rollout.responses():
        counts[first, second] += 1
    with torch.no_grad():
        first = model(torch.tensor([[1, 2]]))[0, -1]
        second = model(torch.tensor([[1, 2, v] for v in range(vocab)]))[:, -1]
    p = (first / temperature).softmax(0)[:, None] * (second / temperature).softmax(1)
    expected = n * p  # (4, 4): every pair of two tokens
    assert expected.min() > 5
    # chi-square, 15 degrees of freedom, p = 0.001
    assert ((counts - expected) ** 2 / expected).sum() < 37.7


def test_top_k_keeps_k_and_renormalizes():
    """A cut that keeps k + 1, cuts the likely ones, or leaves the probabilities unnormalized."""
    n = 4000
    model = constant_model([1.0, -0.5, 2.0, 0.3, 1.4])
    draws = torch.tensor(generate(model, [[0]] * n, 1, top_k=3, seed=8).responses()).flatten()
    counts = draws.bincount(minlength=5).double()
    p = torch.tensor([1.0, -math.inf, 2.0, -math.inf, 1.4], dtype=torch.float64).softmax(0)
    assert counts[1] == counts[3] == 0
    assert ((counts - n * p).abs() <= 4 * (n * p * (1 - p)).sqrt()).all()
    whole = generate(model, [[0]], 9, seed=1).responses()
    for k in (5, 50):  # nothing to cut
        assert generate(model, [[0]], 9, top_k=k, seed=1).responses() == whole


@pytest.mark.parametrize("u, token", [(0.0, 2), (1e-300, 2), (0.5, 4), (1 - 2.0 ** -53, 5)])
def test_an_impossible_token_is_never_sampled(monkeypatch, u, token):
    """A uniform of exactly 0 draws token 0 whatever its probability; one just below 1 the last, or
    one too many."""
    def rand(*shape, **_):
        return torch.full(shape, u, dtype=torch.float64)

    monkeypatch.setattr(torch, "rand", rand)
    model = constant_model([-1e4, -1e4, 0.3, -1e4, 0.1, 0.2, -1e4])
    assert generate(model, [[0], [1, 2]], 4).responses()[1] == [token] * 4


def test_sampling_draws_nothing_from_the_global_generator():
    """A report in the middle of training that changes the training after it."""
    model = tiny_model(seed=19)
    state = torch.get_rng_state()
    free = [generate(model, [[1]], 30).responses() for _ in range(2)]
    generate(model, [[1]], 30, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert free[0] != free[1]  # without a seed, two calls differ


def test_a_prompt_that_all_but_fills_the_context():
    """One token of room is room: an off-by-one refuses it, or writes beyond the cache."""
    model = tiny_model(seed=20, block_size=16)
    prompts = [[5] * 15, [2]]
    rollout = generate(model, prompts, 1, END, seed=1)
    assert rollout.lengths.tolist() == [16, 2]
    assert rollout.responses() == brute_force_sample(model, prompts, 1, END, 1.0, seed=1)
    # And one that ends on the last position, in a batch of one.
    full = generate(model, [[1, 2, 3]], 13, seed=1)
    assert full.responses() == brute_force_sample(model, [[1, 2, 3]], 13, None, 1.0, seed=1)


@pytest.mark.parametrize("arguments", [
    ([[1, 2], []], 4), ([], 4), ([[1] * 10], 7), ([[1], [2] * 16], 1), ([[1]], 0)])
def test_generate_refuses(arguments):
    """An empty prompt has no logits to sample from; a prompt that is too long must not be cut
    without a word."""
    with pytest.raises(ValueError):
        generate(tiny_model(block_size=16), *arguments)


@pytest.mark.parametrize("temperature", [0, -1.0])
def test_generate_refuses_a_temperature(temperature):
    """Division by zero gives NaN, a negative temperature the unlikeliest tokens; a traceback for
    `--temperature 0`."""
    with pytest.raises(InputError, match=f"^temperature {temperature}: must be at least 0.0001"):
        generate(tiny_model(), [[1]], 4, temperature=temperature)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights_are_an_error(value):
    """A model that diverged answers with token 0 or V-1 for ever, and nobody learns why."""
    model = tiny_model()
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight[0, 0] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(model, [[1, 2], [3]], 4, seed=1)


def test_respond_gives_texts_without_the_end_token():
    """A "<|end|>" that shows up in the text, and then in the preference pairs; a real last word
    that is cut with it."""
    tokenizer = Tokenizer(train_vocabulary("abc", 259))
    logits = [-1e4] * 259
    logits[ord("a")] = logits[tokenizer.end_token] = 0.0
    prompts = [tokenizer.prompt("b")] * 20
    texts, ended = gpt.respond(constant_model(logits), tokenizer, prompts, 3, seed=1)
    assert set(ended) == {True, False}
    for text, end in zip(texts, ended):
        assert text in (("", "a", "aa") if end else ("aaa",))


# --------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture
def saved(tmp_path):
    """(path, model, tokenizer) of a checkpoint."""
    tokenizer = Tokenizer(train_vocabulary("the fox and the kite and the fox", 265))
    model = tiny_model(seed=21, vocab_size=tokenizer.n_vocab, block_size=8, n_layer=1, n_embd=8)
    model = model.float()
    path = tmp_path / "checkpoint.pt"
    gpt.save_checkpoint(path, "sft", "cpu", model, tokenizer, text="a.txt")
    return path, model, tokenizer


BROKEN = "not a whole file of this project"


def refusal(path):
    """What load_checkpoint says against a file, if that is an InputError of one line that begins
    with its name."""
    with pytest.raises(InputError) as error:
        gpt.load_checkpoint(path, "sft", "cpu")
    line = str(error.value)
    if line.startswith(f"{path}: ") and "\n" not in line:
        return line.removeprefix(f"{path}: ")
    return None


def test_a_checkpoint_comes_back_whole(saved):
    """A vocabulary that isn't saved with the weights, or comes back in another order: every word is
    another one."""
    path, model, tokenizer = saved
    loaded, loaded_tokenizer, checkpoint = gpt.load_checkpoint(path, "sft", "cpu")
    tokens = torch.tensor([loaded_tokenizer.prompt("the fox")])
    assert torch.equal(loaded(tokens), model(tokens)) and loaded.config == model.config
    assert loaded_tokenizer.vocabulary == tokenizer.vocabulary and checkpoint["text"] == "a.txt"
    assert tokens[0].tolist() == tokenizer.prompt("the fox")


def test_of_another_stage_or_size(saved):
    """PPO that starts from the base model because somebody copied the wrong file."""
    path = saved[0]
    for stage, size in (("gpt", "cpu"), ("sft", "gpu")):
        with pytest.raises(InputError) as error:
            gpt.load_checkpoint(path, stage, size)
        assert str(error.value).startswith(f"{path}: is a sft checkpoint of size cpu, but {stage} "
                                           f"of size {size}")


def test_missing_truncated_and_foreign_files(saved, tmp_path):
    """A traceback of forty lines for a download that broke off."""
    assert refusal(tmp_path / "none.pt") == "no such checkpoint"
    path = saved[0]
    whole = path.read_bytes()
    for content in (b"", whole[:1], whole[:len(whole) // 2], whole[:-100], whole[:-1],
                    b"Once there was a shy fox.\n", b"PK\x03\x04" + bytes(1000), bytes(5000)):
        path.write_bytes(content)
        message = refusal(path)
        assert BROKEN in message and message.endswith("delete it and train the stage again")


def test_a_file_that_cannot_be_read(saved, tmp_path, monkeypatch):
    """A folder in the checkpoint's place, or a disk that fails: forty lines of somebody else's
    code, or the advice to delete a file that is whole."""
    (tmp_path / "folder.pt").mkdir()
    message = refusal(tmp_path / "folder.pt")
    assert "cannot be read: " in message and "directory" in message and BROKEN not in message

    def fail(*arguments, **keywords):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(torch, "load", fail)
    message = refusal(saved[0])
    assert "cannot be read: Input/output error" in message and BROKEN not in message


@pytest.mark.parametrize("content", [
    {}, {"stage": "sft", "size": "cpu"}, [1, 2], "sft", 3, None, torch.zeros(3),
    {"stage": "sft", "size": "cpu", "config": {}, "vocabulary": [], "model": {}}])
def test_a_torch_file_with_other_content(tmp_path, content):
    """Somebody else's checkpoint: a bare tensor, a bare dict of weights."""
    torch.save(content, tmp_path / "other.pt")
    assert BROKEN in refusal(tmp_path / "other.pt")


@pytest.mark.parametrize("change", [
    dict(n_layer=2), dict(n_embd=16), dict(vocab_size=300), dict(n_head=3), dict(block_size=-1),
    dict(n_head="2"), dict(wings=2), dict(n_head=0), dict(n_embd=0)], ids=str)
def test_a_config_that_does_not_fit_the_weights(saved, change):
    """Weights that are loaded as far as they fit, the rest left random."""
    path = saved[0]
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["config"].update(change)
    torch.save(checkpoint, path)
    assert BROKEN in refusal(path)


def test_weights_that_are_missing(saved):
    """load_state_dict(strict=False): half of a model, and no word about it."""
    path = saved[0]
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["model"]["ln_f.bias"]
    torch.save(checkpoint, path)
    assert BROKEN in refusal(path)


def test_a_flipped_byte_in_the_content(saved):
    """A bad disk: one weight of 10^30, and a model that is nearly right. torch.load itself sees no
    checksums."""
    path = saved[0]
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = [(record, archive.read(record)) for record in archive.infolist()]
    checked = 0
    for record, content in records:
        start = whole.index(content, record.header_offset + 30 + len(record.filename))
        for position in {start, start + len(content) // 2, start + len(content) - 1}:
            broken = bytearray(whole)
            broken[position] ^= 1 << position % 8
            path.write_bytes(broken)
            assert BROKEN in refusal(path)
            checked += 1
    assert checked > 40


def flips(path, whole, positions, bits):
    """What loading says when the bits of one byte are flipped: {position: "refused", "same", or
    what went wrong}."""
    before = torch.load(path, weights_only=True)
    outcome = {}
    for position in positions:
        broken = bytearray(whole)
        broken[position] ^= bits
        path.write_bytes(broken)
        try:
            _, tokenizer, checkpoint = gpt.load_checkpoint(path, "sft", "cpu")
        except InputError as error:
            one_line = str(path) in str(error) and "\n" not in str(error)
            outcome[position] = "refused" if one_line else str(error)
        except Exception as error:
            outcome[position] = repr(error)
        else:
            same = before["vocabulary"] == tokenizer.to_strings()
            for name, tensor in checkpoint["model"].items():
                same = same and torch.equal(before["model"][name], tensor)
            outcome[position] = "same" if same else "loads something else"
    return outcome


def test_a_flipped_byte_in_the_archives_directory(saved):
    """The table of contents is damaged: never a traceback, never other weights than those that were
    saved."""
    path = saved[0]
    whole = path.read_bytes()
    start = whole.index(b"PK\x01\x02")
    outcome = {**flips(path, whole, range(start, len(whole) - 98, 4), 0x10),
               **flips(path, whole, range(len(whole) - 98, len(whole)), 0x80)}
    wrong = {}
    for position, result in outcome.items():
        if result not in ("refused", "same"):
            wrong[position - start] = result
    assert wrong == {}


def test_a_checkpoint_cannot_run_code(tmp_path):
    """pickle.load runs whatever the file says: a model from a stranger could delete your home."""
    class Evil:
        def __reduce__(self):
            return os.system, (f"echo ran > {tmp_path / 'marker'}",)

    path = tmp_path / "evil.pt"
    torch.save({"stage": "sft", "size": "cpu", "model": Evil()}, path)
    assert BROKEN in refusal(path)
    path.write_bytes(pickle.dumps(Evil()))
    assert BROKEN in refusal(path)
    assert not (tmp_path / "marker").exists()
    pickle.loads(pickle.dumps(Evil()))  # the file does run code, where it is let
    assert (tmp_path / "marker").exists()


def test_an_interrupted_write_keeps_the_old_checkpoint(saved, monkeypatch):
    """Ctrl-C, or a full disk, while saving: half of the new file and nothing of the old one."""
    path, model, tokenizer = saved
    before = path.read_bytes()

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with torch.no_grad():
        model.wte.weight += 1
    with pytest.raises(KeyboardInterrupt):
        gpt.save_checkpoint(path, "sft", "cpu", model, tokenizer)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


# --------------------------------------------------------------------------------------------------
# The optimizer


def test_learning_rate():
    """A first step of size zero, a jump after the warm-up, a cosine that ends early, or rises
    again; a run of a few steps that is over before its warm-up is."""
    rates = [gpt.learning_rate(step, 100, 2.0, 10) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0.0)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    for step in range(10, 100):
        assert rates[step] == pytest.approx(2.0 * math.cos(math.pi / 2 * (step - 10) / 90) ** 2)
    assert gpt.learning_rate(0, 1, 2.0, 10) == 2.0  # a run of one step
    rates = [gpt.learning_rate(step, 8, 2.0, 10) for step in range(3)]
    assert rates == pytest.approx([1.0, 2.0, 2.0])  # a warm-up of 8 / 4 steps


def test_weight_decay_shrinks_matrices_only():
    """Decay on gains and biases pulls every LayerNorm to zero."""
    model = tiny_model(seed=22).float()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = gpt.make_optimizer(model, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gpt.optimizer_step(optimizer, model, 0.1)
    for name, parameter in model.named_parameters():
        kept = 0.95 if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter, kept * before[name])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)


def test_optimizer_step_against_adam_by_hand():
    """A gradient that isn't clipped, clipped matrix by matrix, or not cleared: it then counts in
    the next step too."""
    model = tiny_model(seed=23).float()
    twin = tiny_model(seed=23).float()
    optimizer = gpt.make_optimizer(model, weight_decay=0.0)
    moments = {}
    for name, p in twin.named_parameters():
        moments[name] = (torch.zeros_like(p), torch.zeros_like(p))
    generator = torch.Generator().manual_seed(23)

    # The first gradient is beyond the maximal norm, the second one below.
    for step, (scale, lr) in enumerate(((10.0, 0.01), (1e-4, 0.02)), start=1):
        gradients = {}
        for name, p in model.named_parameters():
            gradients[name] = scale * torch.randn(p.shape, generator=generator)
            p.grad = gradients[name].clone()
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        assert gpt.optimizer_step(optimizer, model, lr) == pytest.approx(norm, rel=1e-4)
        for name, p in twin.named_parameters():
            g = gradients[name] / max(1.0, norm)
            m, v = moments[name]
            m = 0.9 * m + 0.1 * g
            v = 0.95 * v + 0.05 * g ** 2
            moments[name] = (m, v)
            with torch.no_grad():
                p -= lr * (m / (1 - 0.9 ** step)) / ((v / (1 - 0.95 ** step)).sqrt() + 1e-8)
        for ours, theirs in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
            assert ours.grad is None or not ours.grad.any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_gradient_takes_no_step(value):
    """One NaN in one gradient, and all weights are NaN; the checkpoint is written all the same."""
    model = tiny_model().float()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = gpt.make_optimizer(model, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.wpe.weight.grad[3, 2] = value
    with pytest.raises(FloatingPointError, match="gradient norm .*no step taken"):
        gpt.optimizer_step(optimizer, model, 0.1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


# --------------------------------------------------------------------------------------------------
# Pretraining

SMALL = "--size cpu --n_layer 1 --n_head 2 --n_embd 32 --batch 8 --warmup 5".split()
TEXT = ("The fox had a kite. The hen had a drum. The fox and the hen sang, and the kite flew over "
        "the hill.\n") * 40


def pretrain(folder, *flags):
    gpt.main([*SMALL, "--out", str(folder), *flags])
    folder = folder / "cpu/gpt"
    loaded = gpt.load_checkpoint(folder / "checkpoint.pt", "gpt", "cpu")
    return metrics(folder / "metrics.jsonl"), loaded


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """(folder, flags, rows, loaded checkpoint) of a model of a small text."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "corpus.txt").write_text(TEXT)
    flags = ["--text", str(folder / "corpus.txt"),
             *"--block_size 64 --vocab_size 280 --steps 40 --report 10 --lr 0.01".split()]
    rows, loaded = pretrain(folder, *flags)
    return folder, flags, rows, loaded


@cpu_only
def test_pretraining_on_a_text_learns(text_run):
    """A loss that falls because the model sees the answer, or that doesn't fall: both end far from
    this text's."""
    _, _, rows, (model, tokenizer, checkpoint) = text_run
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert untimed(checkpoint["metrics"]) == untimed(rows)
    assert rows[0]["held_out"] > rows[-1]["held_out"] + 1
    assert rows[-1]["held_out"] < 0.6 * math.log(tokenizer.n_vocab)

    # The reported number is that of the saved weights on the last tenth of the text.
    tokens = tokenizer.encode(TEXT)
    rest = tokens[len(tokens) * 9 // 10:]
    nats = 0.0
    count = 0
    for start in range(0, len(rest), 64):
        window = torch.tensor(rest[start:start + 64])
        with torch.no_grad():
            logits = model(window[None])[0, :-1]
        nats += F.cross_entropy(logits, window[1:], reduction="sum").item()
        count += len(window) - 1
    assert rows[-1]["held_out"] == pytest.approx(nats / count, rel=1e-4)


def test_one_seed_one_result_bit_for_bit(text_run, tmp_path):
    """Weights, texts or batches that come from a generator which nobody seeded: no bug can be
    reproduced then."""
    _, flags, rows, (model, _, _) = text_run
    torch.rand(17)  # a global generator in another state
    random.seed(5)
    again, (twin, _, _) = pretrain(tmp_path, *flags)
    assert untimed(rows) == untimed(again)
    for ours, theirs in zip(model.state_dict().values(), twin.state_dict().values()):
        assert torch.equal(ours, theirs)
    other, _ = pretrain(tmp_path, *flags, "--seed", "2")
    assert other[0]["loss"] != rows[0]["loss"]


def test_pretraining_on_the_world_learns(tmp_path):
    """A loss that doesn't fall; a wrong excess."""
    flags = "--steps 60 --report 30 --lr 0.01".split()
    rows, (model, tokenizer, checkpoint) = pretrain(tmp_path, *flags)
    assert rows[-1]["held_out"] < rows[0]["held_out"] - 0.2
    assert rows[-1]["held_out"] < 4.8  # log V = 7.3
    assert 0.5 < rows[-1]["entropy"] < 1.1 and checkpoint["text"] == ""
    assert rows[-1]["excess"] == pytest.approx(rows[-1]["held_out"] / rows[-1]["entropy"] - 1)
    assert model.config.vocab_size == tokenizer.n_vocab


def test_sample_prints_three_continuations(text_run, capsys):
    """--sample that trains again, or asks for the text file which the checkpoint does not need."""
    folder = text_run[0]
    before = (folder / "cpu/gpt/checkpoint.pt").read_bytes()
    for _ in range(2):
        gpt.main(["--size", "cpu", "--out", str(folder), "--sample", "The fox"])
    printed = capsys.readouterr().out
    half = len(printed) // 2
    assert printed[:half] == printed[half:]
    assert printed.startswith("The fox") and printed[:half].count("The fox") >= 3
    assert (folder / "cpu/gpt/checkpoint.pt").read_bytes() == before
    with pytest.raises(InputError, match="no room"):
        gpt.main(["--size", "cpu", "--out", str(folder), "--sample", "Zyx " * 64])


def test_temperature_and_top_k_of_the_samples(text_run, capsys, monkeypatch):
    """A --temperature that is read and forgotten, or that reaches the cut of --top_k."""
    def printed(*flags):
        gpt.main(["--size", "cpu", "--out", str(text_run[0]), "--sample", "The", *flags])
        return capsys.readouterr().out.strip().split("\n\n")

    calls = []
    real = gpt.generate

    def watched(*arguments):
        calls.append(arguments[4:6])
        return real(*arguments)

    monkeypatch.setattr(gpt, "generate", watched)
    greedy = printed("--top_k", "1")
    assert len(greedy) > 1 and len(set(greedy)) == 1
    assert printed("--temperature", "1e-4") == greedy  # nearly, with all tokens to draw from
    assert len(set(printed("--temperature", "3"))) > 1
    printed("--temperature", "0.5", "--top_k", "7")
    printed()
    assert calls == [(1.0, 1), (1e-4, None), (3.0, None), (0.5, 7), (1.0, None)]


def test_sampling_after_a_run_that_was_killed_in_its_last_moment(text_run, tmp_path, capsys):
    """A run that is over, but whose checkpoint has not taken its place: --sample finds none, or an
    older one."""
    folder = tmp_path / "cpu/gpt"
    shutil.copytree(text_run[0] / "cpu/gpt", folder)
    (folder / "finished").mkdir()
    (folder / "checkpoint.pt").rename(folder / "finished/checkpoint.pt")
    gpt.main(["--size", "cpu", "--out", str(tmp_path), "--sample", "The fox"])
    assert capsys.readouterr().out.startswith("The fox")


def test_every_token_of_pretraining_counts_equally(monkeypatch):
    """A loss divided by its own batch's tokens: documents of one length share a batch, so a token
    of a short document would weigh many times more. Without steps, the gradients of an epoch add up
    to that of the mean token. A mean of the batches' losses, reported as that of a token."""
    rng = random.Random(34)
    sequences = []
    for length in [2] * 20 + [3] * 20 + [60] * 20 + [15, 31, 45]:
        sequences.append([rng.randrange(V) for _ in range(length)])
    corpus = Corpus(None, sequences, held_out=sequences[:9], start=[], entropy=None, description="")
    model = tiny_model(seed=34)
    twin = tiny_model(seed=34)
    steps = []

    def no_step(optimizer, model, lr):
        steps.append(lr)
        return 0.0

    monkeypatch.setattr(gpt, "optimizer_step", no_step)
    run = SilentRun()
    gpt.pretrain(model, corpus, [], gpt.Config(steps=8, batch=8), run)
    losses = []
    for ids in sequences:
        tokens = torch.tensor([ids])
        losses.append(-token_logprobs(twin(tokens), tokens)[0])
    losses = torch.cat(losses)
    losses.mean().backward()
    assert len(steps) == 8
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad.float() / 8, theirs.grad.float(), atol=1e-6, rtol=1e-4)
    assert run.rows[0]["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_a_short_context(text_run, tmp_path, capsys):
    """A figure that only suits the default flags: 60 sampled tokens do not fit a context of 32."""
    flags = list(text_run[1])
    flags[flags.index("--block_size") + 1] = "32"
    flags[flags.index("--steps") + 1] = "2"
    rows, (model, _, _) = pretrain(tmp_path, *flags)
    assert model.config.block_size == 32 and [row["step"] for row in rows] == [2]
    out = capsys.readouterr().out.splitlines()
    samples = [line for line in out if line.startswith(("before", "after"))]
    assert len(samples) == 4


def test_what_pretraining_refuses_leaves_the_old_checkpoint(text_run):
    """A typing error that costs the model of last night."""
    folder, flags, _, _ = text_run
    before = snapshot(folder / "cpu/gpt")
    (folder / "short.txt").write_text("The fox.")
    for wrong in (["--text", str(folder / "none.txt")], ["--text", str(folder / "short.txt")],
                  ["--block_size", "100000", *flags[:2]], ["--text", "", "--steps", "1"],
                  ["--block_size", "20", "--steps", "1"], ["--n_embd", "33", *flags[:2]],
                  ["--vocab_size", "258", *flags[:2]], ["--lr", "nan", *flags[:2]]):
        with pytest.raises(InputError) as error:
            gpt.main([*SMALL, "--out", str(folder), *wrong])
        assert "\n" not in str(error.value)
        assert wrong[0] in str(error.value) or wrong[1] in str(error.value)
    after = snapshot(folder / "cpu/gpt")
    for name in ("checkpoint.pt", "metrics.jsonl"):
        assert after[folder / "cpu/gpt" / name] == before[folder / "cpu/gpt" / name]


# --------------------------------------------------------------------------------------------------
# Mid-training


@pytest.fixture
def mid(stages, out):
    """Flags of mid-training from the base model that the tests share."""
    return ["--size", "cpu", "--out", str(out), "--start", str(stages / "cpu/gpt"),
            "--name", "gpt-mid", "--batch", "8"]


@cpu_only
def test_mid_training_continues_from_the_checkpoint(mid, stages, out, monkeypatch):
    """A new vocabulary, under which the weights mean nothing; fresh weights; a warm-up that is over
    already; the documents of pretraining once more; forgetting measured on the new text, or after
    training only."""
    model, tokenizer, _ = gpt.load_checkpoint(stages / "cpu/gpt/checkpoint.pt", "gpt", "cpu")
    before = snapshot(stages)
    rates = []
    corpora = []
    step = gpt.optimizer_step

    def watched_step(optimizer, model, lr):
        rates.append(lr)
        return step(optimizer, model, lr)

    def watched_corpus(*arguments):
        corpora.append(world_corpus(*arguments))
        return corpora[-1]

    monkeypatch.setattr(gpt, "optimizer_step", watched_step)
    monkeypatch.setattr(gpt, "world_corpus", watched_corpus)
    gpt.main([*mid, "--curated", "--steps", "8", "--warmup", "2", "--lr", "0.01"])
    rows = metrics(out / "cpu/gpt-mid/metrics.jsonl")
    path = out / "cpu/gpt-mid/checkpoint.pt"
    trained, same_tokenizer, _ = gpt.load_checkpoint(path, "gpt", "cpu")
    assert same_tokenizer.vocabulary == tokenizer.vocabulary and trained.config == model.config
    assert rates[:2] == [0.005, 0.01] and [row["step"] for row in rows] == [0, 8]

    corpus, = corpora
    assert corpus.description.startswith("the little world, curated: 64 fresh documents")
    first, last = rows
    old = encode_documents(held_out_documents(), tokenizer)
    for row, one in ((first, model), (last, trained)):
        held_out = gpt.held_out_loss(one, corpus.held_out, 1)
        assert row["held_out"] == pytest.approx(held_out, rel=1e-5)
        assert row["entropy"] == corpus.entropy
        assert row["old_held_out"] == pytest.approx(gpt.held_out_loss(one, old, 1), rel=1e-5)
    assert last["held_out"] < first["held_out"] and snapshot(stages) == before


def test_mid_training_continues_bit_for_bit(mid, out, monkeypatch):
    """A run that begins once more at the base model, or that measures the beginning at its
    middle."""
    argv = [*mid, "--curated", "--steps", "6", "--report", "2"]
    few = held_out_documents()[:9]  # all take too long
    for module in (gpt, data.corpus):
        monkeypatch.setattr(module, "held_out_documents", lambda world=None: few)
    end_step = gpt.Run.end_step

    def stop(run, state):
        end_step(run, state)
        if run.step == 3:
            raise KeyboardInterrupt

    gpt.main(argv)
    with monkeypatch.context() as patch:
        patch.setattr(gpt.Run, "end_step", stop)
        with pytest.raises(KeyboardInterrupt):
            gpt.main([*argv, "--name", "gpt-killed"])
    gpt.main([*argv, "--name", "gpt-killed", "--resume"])
    found = []
    for name in ("gpt-mid", "gpt-killed"):
        folder = out / "cpu" / name
        model, _, _ = gpt.load_checkpoint(folder / "checkpoint.pt", "gpt", "cpu")
        weights = [parameter.tolist() for parameter in model.parameters()]
        found.append((weights, untimed(metrics(folder / "metrics.jsonl"))))
    assert found[0] == found[1]


def test_mid_training_on_a_text_and_sft_on_it(mid, out, tmp_path, capsys):
    """A text that teaches a vocabulary of its own; an SFT model that starts from pretraining all
    the same; no way to look at what came out."""
    (tmp_path / "own.txt").write_text(TEXT)
    gpt.main([*mid, "--text", str(tmp_path / "own.txt"), "--steps", "2"])
    first, last = metrics(out / "cpu/gpt-mid/metrics.jsonl")
    assert "entropy" not in first and first["old_held_out"] != last["old_held_out"]
    flags = "--demonstrations 32 --questions 2 --lr 1e-9 --max_new_tokens 8".split()
    sft.main(["--size", "cpu", "--out", str(out), "--base", "gpt-mid", *flags])
    base, _, _ = gpt.load_checkpoint(out / "cpu/gpt-mid/checkpoint.pt", "gpt", "cpu")
    model, _, _ = gpt.load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
    for ours, theirs in zip(model.parameters(), base.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    capsys.readouterr()
    gpt.main(["--size", "cpu", "--out", str(out), "--name", "gpt-mid", "--sample", "The fox"])
    assert capsys.readouterr().out.startswith("The fox")


@pytest.mark.parametrize("change, message", [
    ("--curated --n_layer 2", "--n_layer 2: cannot be used with --start"),
    ("--curated --block_size 64", "--block_size 64: cannot be used with --start"),
    ("", "--start .*needs either --curated or --text"),
    ("--curated --text {out}/demonstrations.jsonl", "--start .*needs either --curated or --text"),
    ("--curated --start {out}/cpu/gpt --name gpt", "--start .*needs a separate folder"),
    ("--curated --start {out}/cpu/sft", "sft/checkpoint.pt: is a sft checkpoint"),
    ("--curated --start {out}", "no such checkpoint")])
def test_mid_training_that_cannot_be_is_refused(mid, out, change, message):
    """The pretrained model overwritten by its own continuation; a shape that is asked for, and is
    the checkpoint's."""
    before = snapshot(out)
    with pytest.raises(InputError, match=message):
        gpt.main([*mid, *change.format(out=out).split()])
    assert snapshot(out) == before


@pytest.mark.parametrize("stage, change, message", [
    (gpt, "--curated", "--curated True: goes with --start only"),
    (gpt, "--name ppo", "--name ppo: must be gpt"), (sft, "--base ppo", "--base ppo: must be gpt"),
    (sft, "--base gpt-none", "gpt-none/checkpoint.pt: no such checkpoint")])
def test_a_base_model_that_there_is_not(stage, change, message, out):
    """Pretraining on half of the world, that somebody took for mid-training; minutes of it for a
    name mistyped."""
    before = snapshot(out)
    with pytest.raises(InputError, match=message):
        stage.main(["--size", "cpu", "--out", str(out), *change.split()])
    assert snapshot(out) == before


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_sampling_in_pieces_draws_the_same(rows, monkeypatch):
    """All rollouts of a batch in memory at once, whatever the flags; or other samples on a smaller
    GPU, where only the memory should be less."""
    model = tiny_model()
    prompts = [[1] * n for n in (5, 1, 3, 8, 2, 1, 4)]
    whole = generate(model, prompts, 20, END, seed=5)
    batches = []
    hidden = model.hidden

    def watched(tokens, *others, **named):
        batches.append(len(tokens))
        return hidden(tokens, *others, **named)

    monkeypatch.setattr(model, "hidden", watched)
    pieces = generate(model, prompts, 20, END, seed=5, rows=rows)
    assert max(batches) == min(rows, len(prompts))
    for expected, found in zip(whole, pieces):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_without_bf16(supported, monkeypatch, capsys):
    """A T4 or an RTX 20xx, which students have: bf16 is emulated there, many times slower than
    float32, and torch says by default that it is supported."""
    def is_bf16_supported(including_emulation=True):
        return supported or including_emulation

    casts = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch, "autocast", lambda *arguments: casts.append(arguments))
    with gpt.autocast(torch.device("cuda")) or contextlib.nullcontext():
        assert casts == ([("cuda", torch.bfloat16)] if supported else [])

    run.announce("sft", sft.Config(size="gpu"), torch.device("cuda"), "some", tiny_model())
    where = "Tesla T4" if supported else "Tesla T4 in float32, for it has no bf16"
    assert f"device  {where}, size gpu, seed 1\n" in capsys.readouterr().out
