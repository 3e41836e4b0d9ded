"""The model, its log-probabilities, masks, sampling and checkpoints, and pretraining."""

import contextlib
import copy
import math
import random
from bisect import bisect
from itertools import accumulate
from unittest import mock

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
from gpt import (GPT, GPTConfig, generate, load_checkpoint, masked_logprobs, response_mask,
                 token_logprobs)
from helpers import cpu_only, metrics, snapshot, token_losses, untimed

V = 11      # the tiny vocabulary ...
END = 3     # ... and the token that ends a response in it


def tiny_model(seed=0, vocab_size=V, block_size=64, n_layer=2, n_embd=32):
    """A GPT whose biases and gains aren't 0 and 1; float64, so that two ways of computing it agree
    to 1e-12."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size, block_size, n_layer, n_head=2, n_embd=n_embd))
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


def random_prompts(seed, count):
    rng = random.Random(seed)
    return [[rng.randrange(V) for _ in range(rng.randint(1, 9))] for _ in range(count)]


def random_tokens(seed, *shape):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def test_the_initial_weights():
    """GPT-2's std of 0.02 in a narrow model, where attention stays uniform for long."""
    model = GPT(GPTConfig(50, 64, 3, 4, 64), torch.Generator().manual_seed(1))
    for name, x in model.named_parameters():
        if x.dim() == 2:
            std = 1 / 8 / math.sqrt(6) if "c_proj" in name else 1 / 8  # 6 branches in 3 layers
            assert x.std().item() == pytest.approx(std, rel=0.05)
        else:
            assert (x == (0.0 if name.endswith("bias") else 1.0)).all()


def test_logits_are_float32_under_autocast(monkeypatch):
    """A bf16 head: logits near 10 are rounded to 1/16, and PPO's ratio before the first step is
    anything but 1. The sampler's logits are the same head's."""
    model = tiny_model(seed=5).float()
    head = model.logits
    spy = mock.Mock(wraps=head)
    monkeypatch.setattr(model, "logits", spy)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(random_tokens(5, 3, 12))
        generate(model, random_prompts(5, 4), 6, seed=1)
        hidden = [call.args[0] for call in spy.call_args_list]
        found = [head(x) for x in hidden]
    expected = [x.float() @ model.wte.weight.detach().T for x in hidden]
    assert len(hidden) == 7
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1, 40])
def test_logprobs_against_cross_entropy(scale):
    """No shift, a double one, no temperature, bf16; logits put back in the wrong order or row; a
    gradient that is lost or counted twice; all of the probability on one token (the scale)."""
    model = tiny_model(seed=31).float()
    with torch.no_grad():
        model.wte.weight *= scale
    tokens = random_tokens(31, 5, 14)
    logits = model(tokens).detach().bfloat16()  # as a bf16 model would give them
    rounded = -F.cross_entropy((logits[:, :-1].float() / 0.7).flatten(0, 1),
                               tokens[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(token_logprobs(logits, tokens, 0.7), rounded.view(5, 13))

    prompt_lengths = torch.tensor([3, 1, 9, 13, 6])
    lengths = torch.tensor([10, 2, 14, 14, 7])
    response = response_mask(prompt_lengths, lengths, 14)
    generator = torch.Generator().manual_seed(31)
    weights = torch.randn(5, 13, generator=generator)
    holes = torch.rand(5, 13, generator=generator) < 0.4
    holes[[0, 3]] = False
    parameters = list(model.parameters())
    full = -F.cross_entropy(model(tokens)[:, :-1].transpose(1, 2) / 0.7, tokens[:, 1:],
                            reduction="none")
    assert full.min() < -80 if scale == 40 else full.max() < -1e-3  # a 0 is none of them
    for mask in (response, holes, torch.ones_like(holes), torch.zeros_like(holes)):
        found = masked_logprobs(model, tokens, mask, 0.7)
        torch.testing.assert_close(found, torch.where(mask, full, 0), atol=2e-6 * scale, rtol=1e-6)
        gradients, expected = (
            torch.autograd.grad((weights * logprobs)[mask].sum(), parameters, retain_graph=True)
            for logprobs in (found, full))
        torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-4)
    summed = gpt.response_logprobs(model, tokens, prompt_lengths, lengths, 0.7)
    torch.testing.assert_close(summed, (full * response).sum(dim=1))


def test_batches_by_length_holds_every_index_once():
    """A last batch that is dropped, a text that is seen twice in an epoch; an epoch that begins in
    the batch that ends the one before, or repeats its order; batches full of padding."""
    lengths = [random.Random(i).randint(1, 50) for i in range(130)]
    batches = gpt.batches_by_length(lengths, 4, random.Random(9), epochs=2)
    half = math.ceil(130 / 4)
    for epoch in (batches[:half], batches[half:]):
        assert sorted(i for rows in epoch for i in rows) == list(range(130))
        assert max(map(len, epoch)) <= 4
    assert batches[:half] != batches[half:]
    spreads = [max(lengths[i] for i in rows) - min(lengths[i] for i in rows) for rows in batches]
    assert sum(spreads) / len(spreads) < 10  # of 49; at random it would be about 29


# --------------------------------------------------------------------------------------------------
# Sampling


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
            totals = list(accumulate((logits / temperature).softmax(0).tolist()))
            token = bisect(totals, u * totals[-1])
            ids.append(token)
            if token == end_token:
                break
        responses.append(ids[len(prompt):])
    return responses


@pytest.fixture
def nan_memory():
    """Fresh memory is filled with NaN, which a masked key still passes on (0 · NaN = NaN)."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("temperature, at_once", [(1.0, None), (0.6, 3)])
def test_sampling_equals_a_brute_force_sampler(temperature, at_once, nan_memory):
    """An old key, padding or memory that is seen, another row's slots once the batch has shrunk;
    more in memory than at_once; the context's last place; draws from the global generator."""
    model = tiny_model(seed=41, block_size=54)
    prompts = random_prompts(11, 20)
    assert {1, 9} <= {len(prompt) for prompt in prompts}  # 9 + 45 tokens fill the context
    expected = brute_force_sample(model, prompts, 45, END, temperature, seed=5)
    shapes = []     # of the tokens of every forward pass
    model.wte.register_forward_hook(lambda module, inputs, output: shapes.append(inputs[0].shape))
    state = torch.get_rng_state()
    rollout = generate(model, prompts, 45, END, temperature, seed=5, at_once=at_once)
    assert rollout.responses() == expected
    most = at_once or 20
    assert max(count for count, _ in shapes) == most
    longer = [shape for shape in shapes if shape[1] > 1]
    assert len(longer) <= math.ceil(20 / most)  # after the prompts, a token at a time
    assert len({count for count, _ in shapes}) > 2  # and rows did leave the batch, repeatedly

    tokens, lengths = gpt.pad([x + y for x, y in zip(prompts, expected)])
    assert torch.equal(rollout.tokens, tokens) and torch.equal(rollout.lengths, lengths)
    assert rollout.prompt_lengths.tolist() == [len(prompt) for prompt in prompts]
    assert rollout.ended(END).tolist() == [response[-1] == END for response in expected]
    one, other = (generate(model, prompts, 9).responses() for _ in range(2))  # without a seed
    assert one != other and torch.equal(torch.get_rng_state(), state)


def test_a_recorded_step_is_the_plain_one(monkeypatch):
    """A step for a GPU that sees empty slots, or goes on with rows that have left the batch, or
    beyond its slots. Here a replay runs it anew: the recording itself needs a GPU."""
    class Graph:
        def replay(self):
            recorded.hidden = recorded.step()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", contextlib.nullcontext)
    model = tiny_model(seed=42, block_size=100)
    tokens, prompt_lengths = gpt.pad(random_prompts(42, 6))
    with torch.no_grad():
        plain, cache = (gpt.KVCache(model.config, prompt_lengths, 80, torch.float64)
                        for _ in range(2))
        for one in (plain, cache):
            model.hidden(tokens, cache=one)
        recorded = gpt.RecordedStep(model, cache, prompt_lengths)
        for t in range(79):
            if t == 70:
                rows = torch.tensor([0, 2, 5])
                prompt_lengths = prompt_lengths[rows]
                for one in (plain, cache, recorded):
                    one.keep(rows)
            new = random_tokens(t, len(prompt_lengths))
            plain.move_to(t)
            expected = model.hidden(new[:, None], (prompt_lengths + t)[:, None], plain).squeeze(1)
            torch.testing.assert_close(recorded(new, t), expected, atol=1e-12, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recorded_steps_sample_the_same_on_a_gpu():
    """A recorded step that stays at its token, goes on with rows that have left the batch, or sees
    too few slots."""
    for end in (END, None):  # rows leave the batch; all of them outlive a recording
        model = tiny_model(seed=41, block_size=100)
        prompts = random_prompts(11, 20)
        expected = brute_force_sample(model, prompts, 90, end, 1.0, seed=5, device="cuda")
        assert generate(model.to("cuda"), prompts, 90, end, seed=5).responses() == expected


def test_draws_from_known_probabilities(monkeypatch):
    """A cut to k that keeps k + 1, cuts the likely ones, or leaves them unnormalized; a temperature
    squared. A uniform of 0 draws token 0 whatever its probability; one just below 1 the last."""
    n = 4000
    model = constant_model([1.0, -0.5, 2.0, 0.3, 1.4])
    rollout = generate(model, [[0]] * n, 1, temperature=0.5, top_k=3, seed=8)
    counts = torch.tensor(rollout.responses()).flatten().bincount(minlength=5).double()
    p = torch.tensor([2.0, -math.inf, 4.0, -math.inf, 2.8], dtype=torch.float64).softmax(0)
    assert ((counts - n * p).abs() <= 4 * (n * p * (1 - p)).sqrt()).all()

    model = constant_model([-1e4, -1e4, 0.3, -1e4, 0.1, 0.2, -1e4])
    for u, token in ((0.0, 2), (0.5, 4), (1 - 2.0 ** -53, 5)):
        uniforms = torch.full((2, 4), u, dtype=torch.float64)
        monkeypatch.setattr(torch, "rand", lambda *shape, **named: uniforms)
        assert generate(model, [[0], [1, 2]], 4).responses() == [[token] * 4] * 2


@pytest.mark.parametrize("prompts, new, temperature, weight, message", [
    ([[1, 2], []], 4, 1.0, 0, "at least one token"),
    ([[1], [2] * 10], 7, 1.0, 0, "10 tokens and 7 new ones exceed the context of 16"),
    ([[1]], 4, -1.0, 0, "^temperature -1.0: must be at least 0.0001"),
    ([[1]], 4, 1.0, math.nan, "not finite")])
def test_generate_refuses(prompts, new, temperature, weight, message):
    """A prompt that is too long, cut without a word (as in nanoGPT's sampling); at a negative
    temperature the unlikeliest tokens; a diverged model, which answers with token 0 for ever."""
    model = tiny_model(block_size=16)
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight[0, 0] = weight
    with pytest.raises((ValueError, FloatingPointError), match=message):
        generate(model, prompts, new, temperature=temperature)


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
# Checkpoints (tests/test_resume.py damages them in hundreds of ways) and the optimizer


def test_a_checkpoint_comes_back_whole(tmp_path):
    """A vocabulary in another order; PPO that starts from the base model because somebody copied
    the wrong file; weights loaded as far as they fit, the rest random."""
    tokenizer = Tokenizer(train_vocabulary("the fox and the kite and the fox", 265))
    model = tiny_model(21, tokenizer.n_vocab, block_size=8, n_layer=1, n_embd=8).float()
    path = tmp_path / "checkpoint.pt"
    gpt.save_checkpoint(path, "sft", "cpu", model, tokenizer, text="a.txt")
    loaded, loaded_tokenizer, checkpoint = load_checkpoint(path, "sft", "cpu")
    tokens = torch.tensor([loaded_tokenizer.prompt("the fox")])
    assert torch.equal(loaded(tokens), model(tokens)) and loaded.config == model.config
    assert loaded_tokenizer.vocabulary == tokenizer.vocabulary and checkpoint["text"] == "a.txt"
    for file, stage, message in (
            (path, "gpt", "is a sft checkpoint of size cpu, but gpt of size cpu is wanted"),
            (tmp_path / "none.pt", "sft", "no such checkpoint; python sft.py makes one")):
        with pytest.raises(InputError, match=f"^{file}: {message}$"):
            load_checkpoint(file, stage, "cpu")

    torch.save({**checkpoint, "config": {**checkpoint["config"], "n_layer": 2}}, path)
    with pytest.raises(InputError, match="not a whole file .* train the stage again$"):
        load_checkpoint(path, "sft", "cpu")


def test_learning_rate():
    """A first step of size zero, a jump after the warm-up, a cosine that ends early, or rises
    again; a run of a few steps that is over before its warm-up is."""
    rates = [gpt.learning_rate(step, 100, 2.0, 10) for step in range(101)]
    rising = [0.2 * step for step in range(1, 11)]
    falling = [2.0 * math.cos(math.pi / 2 * step / 90) ** 2 for step in range(91)]
    assert rates == pytest.approx(rising + falling)
    rates = [gpt.learning_rate(step, 8, 2.0, 10) for step in range(3)]
    assert rates == pytest.approx([1.0, 2.0, 2.0])  # a warm-up of 8 / 4 steps


def test_optimizer_step_against_torchs():
    """A gradient that isn't clipped, clipped matrix by matrix, or not cleared. Decay on gains and
    biases, which pulls every LayerNorm to zero."""
    model = tiny_model(seed=23).float()
    twin = copy.deepcopy(model)
    optimizer = gpt.make_optimizer(model, weight_decay=0.5)
    matrices = [p for p in twin.parameters() if p.dim() == 2]
    others = [p for p in twin.parameters() if p.dim() < 2]
    oracle = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.5}, {"params": others}],
                               betas=(0.9, 0.95), weight_decay=0.0)
    for scale, lr in ((10.0, 0.01), (1e-4, 0.02)):  # a gradient beyond the maximal norm, one below
        gradients = [scale * torch.randn(p.shape) for p in model.parameters()]
        norm = torch.cat([x.flatten() for x in gradients]).norm().item()
        for p, q, x in zip(model.parameters(), twin.parameters(), gradients):
            p.grad = x
            q.grad = x / max(1.0, norm)
        for group in oracle.param_groups:
            group["lr"] = lr
        oracle.step()
        assert gpt.optimizer_step(optimizer, model, lr) == pytest.approx(norm, rel=1e-4)
        torch.testing.assert_close(model.state_dict(), twin.state_dict(), atol=1e-4, rtol=1e-3)
        assert all(p.grad is None for p in model.parameters())


# --------------------------------------------------------------------------------------------------
# Pretraining


@cpu_only
def test_a_models_own_text(stages, tmp_path, capsys, monkeypatch):
    """A loss that falls because the model sees the answer, or that doesn't fall; a figure that is
    not the saved weights' on the last tenth. --sample that asks for the text file, which the
    checkpoint does not need, or forgets --temperature; <|end|> before what is no document."""
    text = ("The fox had a kite. The hen had a drum. The fox and the hen sang, and the kite flew "
            "over the hill.\n") * 40
    path = tmp_path / "corpus.txt"
    path.write_text(text)
    own = ["--size", "cpu", "--out", str(tmp_path), "--name", "gpt-text"]
    # In its context there is no room for the 60 tokens of the samples before and after.
    flags = ("--n_layer 1 --n_head 2 --n_embd 32 --batch 8 --warmup 5 --block_size 32 "
             "--vocab_size 280 --report 10 --lr 0.01 --steps 40")
    gpt.main([*own, *flags.split(), "--text", str(path)])
    folder = tmp_path / "cpu/gpt-text"
    model, tokenizer, checkpoint = load_checkpoint(folder / "checkpoint.pt", "gpt", "cpu")
    rows = metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert untimed(checkpoint["metrics"]) == untimed(rows)
    assert rows[0]["held_out"] > rows[-1]["held_out"] + 1
    assert rows[-1]["held_out"] < 0.6 * math.log(tokenizer.n_vocab)
    tokens = tokenizer.encode(text)
    rest = tokens[len(tokens) * 9 // 10:]
    windows = [rest[start:start + 32] for start in range(0, len(rest), 32)]
    assert rows[-1]["held_out"] == pytest.approx(gpt.held_out_loss(model, windows, 1), rel=1e-4)

    path.unlink()
    capsys.readouterr()
    sampler = mock.Mock(wraps=generate)
    monkeypatch.setattr(gpt, "generate", sampler)
    gpt.main([*own, "--sample", "The fox"])
    assert capsys.readouterr().out.startswith("The fox")
    flags = "--size cpu --temperature 3 --top_k 7"
    gpt.main([*flags.split(), "--out", str(stages), "--sample", "The fox"])
    _, of_world, _ = load_checkpoint(stages / "cpu/gpt/checkpoint.pt", "gpt", "cpu")
    documents = [tokenizer.encode("The fox"), [of_world.end_token, *of_world.encode("The fox")]]
    for call, ids, cut in zip(sampler.call_args_list, documents, ((1.0, None), (3.0, 7)),
                              strict=True):
        assert call.args[1] == [ids] * 3 and call.args[4:6] == cut


def test_every_token_of_pretraining_counts_equally(monkeypatch):
    """A loss divided by its own batch's tokens, whose documents have one length: a token of a short
    one weighs many times more. Without steps, an epoch's gradients add up to the mean token's."""
    rng = random.Random(34)
    sequences = []
    for length in [2] * 20 + [3] * 20 + [60] * 20 + [15, 31, 45]:
        sequences.append([rng.randrange(V) for _ in range(length)])
    corpus = Corpus(None, sequences, held_out=sequences[:9], start=[], entropy=None, description="")
    model = tiny_model(seed=34)
    twin = copy.deepcopy(model)
    monkeypatch.setattr(gpt, "optimizer_step", lambda optimizer, model, lr: 0.0)
    run = SilentRun()
    gpt.pretrain(model, corpus, [], gpt.Config(steps=8, batch=8), run)
    mean = token_losses(twin, sequences, [1] * len(sequences)).mean()
    expected = torch.autograd.grad(8 * mean, list(twin.parameters()))
    gradients = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(gradients, list(expected), atol=8e-6, rtol=1e-4)
    assert run.rows[0]["loss"] == pytest.approx(mean.item(), rel=1e-5)


@cpu_only
def test_mid_training_continues_from_the_checkpoint(stages, out, tmp_path, monkeypatch):
    """A new vocabulary, under which the weights mean nothing; fresh weights; forgetting measured on
    the new text, or after training only."""
    few = held_out_documents()[:30]  # all 500 take long
    for module in (gpt, data.corpus):
        monkeypatch.setattr(module, "held_out_documents", lambda world=None: few)
    model, tokenizer, _ = load_checkpoint(stages / "cpu/gpt/checkpoint.pt", "gpt", "cpu")
    flags = "--name gpt-mid --batch 8 --curated --steps 8 --warmup 2 --lr 0.01 --report 5"
    gpt.main(["--size", "cpu", "--out", str(out), "--start", str(stages / "cpu/gpt"),
              *flags.split()])
    first, _, last = metrics(out / "cpu/gpt-mid/metrics.jsonl")
    trained, same_tokenizer, _ = load_checkpoint(out / "cpu/gpt-mid/checkpoint.pt", "gpt", "cpu")
    assert same_tokenizer.vocabulary == tokenizer.vocabulary and trained.config == model.config
    assert (first["step"], last["step"]) == (0, 8)

    corpus = world_corpus(tokenizer, 0, 128, 64, 1, tmp_path, curated=True)
    old = encode_documents(few, tokenizer)
    for row, one in ((first, model), (last, trained)):
        held_out = gpt.held_out_loss(one, corpus.held_out, 1)
        assert row["held_out"] == pytest.approx(held_out, rel=1e-5)
        assert row["excess"] == pytest.approx(held_out / corpus.entropy - 1, rel=1e-5)
        assert row["old_held_out"] == pytest.approx(gpt.held_out_loss(one, old, 1), rel=1e-5)
    assert last["held_out"] < first["held_out"]


@pytest.mark.parametrize("flags, message", [
    ("--name ppo", "--name ppo: must be gpt"),
    ("--start {} --name gpt-mid --curated --n_layer 2", "--n_layer 2: cannot be used with --start"),
    ("--start {} --name gpt-mid", "--start .*needs either --curated or --text"),
    ("--start {} --curated", "--start .*needs a separate folder")])
def test_what_is_refused_costs_nothing(flags, message, out):
    """The pretrained model overwritten by its own continuation, or by a typing error; a shape that
    is asked for, and is the checkpoint's."""
    before = snapshot(out)
    with pytest.raises(InputError, match=message):
        gpt.main(["--size", "cpu", "--out", str(out), *flags.format(out / "cpu/gpt").split()])
    after = snapshot(out)
    assert all(path.suffix == ".ids" or after[path] == before[path] for path in before)


@pytest.mark.parametrize("supported", [True, False])
def test_what_gpus_are_slow_at(supported, monkeypatch, capsys):
    """A T4 or an RTX 20xx: torch says that bf16 is supported, which is emulated, many times slower
    than float32. A Hopper: cuDNN's attention, torch's first choice, plans for every new shape."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()

    def is_bf16_supported(including_emulation=True):
        return supported or including_emulation

    casts = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch, "autocast", lambda *arguments: casts.append(arguments))
    gpt.autocast(torch.device("cuda"))
    assert casts == ([("cuda", torch.bfloat16)] if supported else [])
    run.announce("sft", sft.Config(size="gpu"), torch.device("cuda"), "some", tiny_model())
    assert ("in float32, for it has no bf16" in capsys.readouterr().out) != supported
