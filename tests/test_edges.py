"""What lies at the edge: batches of one, full contexts, responses that end at once; files that
should not exist."""

import copy
import json
import math
import random
import re

import pytest
import torch

import best_of_n
import dpo
import gpt
import ppo
import reward_model
import sft
from data.files import (InputError, hold_out, read_chunks, read_demonstrations, read_pairs,
                        write_jsonl)
from data.run import SilentRun
from data.tokenizer import SPECIAL_TOKENS, Pair, Tokenizer, train as train_vocabulary
from gpt import GPT, GPTConfig, Rollout, generate, response_mask, save_checkpoint
from helpers import metrics
from reward_model import RewardModel, make_reward

V = 5           # tokens 0 to 3 and <|end|>
END = 4
BLOCK = 8       # the context
ALWAYS = 60.0
NEVER = -60.0


def tiny(seed, kind=GPT, end=0.0):
    """A random GPT or RewardModel; end is added to the logit of <|end|> after every prefix."""
    torch.manual_seed(seed)
    model = kind(GPTConfig(V, BLOCK, n_layer=1, n_head=2, n_embd=16))
    if kind is RewardModel:
        torch.nn.init.normal_(model.head.weight)
    elif end:
        with torch.no_grad():   # the first hidden number is always 1, and only <|end|> asks for it
            model.ln_f.weight[0] = 0.0
            model.ln_f.bias[0] = 1.0
            model.wte.weight[:, 0] = end * (torch.arange(V) == END)
    return model


@torch.no_grad()
def last_outputs(model, prompt, response):
    """What a model says before each token of the response, (n, …), in float64 and from its prefix
    alone: no batch, shift or cache."""
    model = copy.deepcopy(model).double()
    outputs = []
    for t in range(len(response)):
        outputs.append(model(torch.tensor([prompt + response[:t]]))[0, -1])
    return torch.stack(outputs)


def by_hand(model, prompt, response, temperature=1.0):
    """log π of every token at every place of the response, (n, V)."""
    return (last_outputs(model, prompt, response) / temperature).log_softmax(1)


def chosen_by_hand(model, prompt, response, temperature=1.0):
    """log π of the response's own tokens, (n,)."""
    logprobs = by_hand(model, prompt, response, temperature)
    return logprobs.gather(1, torch.tensor(response)[:, None]).squeeze(1)


def same(model, other):
    pairs = zip(model.state_dict().values(), other.state_dict().values())
    return all(torch.equal(p, q) for p, q in pairs)


def finite(model):
    return all(parameter.isfinite().all() for parameter in model.parameters())


class Table:
    """A reward model that looks the whole sequence up in a table; with `constant`, the same for
    all."""

    def __init__(self, constant=None):
        self.constant = constant

    def look_up(self, ids):
        if self.constant is None:
            return random.Random(str(ids)).gauss(0, 2)
        return self.constant

    def score(self, tokens, lengths):
        scores = []
        for row, length in zip(tokens.tolist(), lengths.tolist()):
            scores.append(self.look_up(row[:length]))
        return torch.tensor(scores)


# --------------------------------------------------------------------------------------------------
# Sampling and scoring


@pytest.mark.parametrize("prompts, room, end", [
    ([[1, 2, 3, 0, 1, 2, 3]], 1, 0.0),      # the context is full but for one token, alone
    ([[1, 2, 3, 0, 1, 2, 3], [2], [3, 3, 0]], 1, 0.0),      # and among shorter ones
    ([[3, 1]], 6, 0.0),             # a batch of one
    ([[3, 1]] * 9, 6, 0.0),         # all prompts the same
    ([[3, 1], [0]] * 3, 6, ALWAYS), ([[3, 1], [0]] * 3, 6, NEVER)])
def test_sampling_at_the_edges(prompts, room, end):
    """A cache one slot too short, or rows that get each other's draws: seen only where the context
    is full or all rows end together. Every draw u lies between the cumulative probabilities of its
    token and of the one before."""
    model = tiny(0, end=end)
    rollout = generate(model, prompts, room, END, temperature=0.8, seed=5)
    generator = torch.Generator().manual_seed(5)
    uniforms = torch.rand(len(prompts), room, dtype=torch.float64, generator=generator)
    responses = rollout.responses()
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        upper = by_hand(model, prompt, response, 0.8).exp().cumsum(1)
        lower = torch.nn.functional.pad(upper, (1, 0))
        for t, token in enumerate(response):
            assert lower[t, token] - 1e-5 <= uniforms[i, t] <= upper[t, token] + 1e-5

        row = rollout.tokens[i].tolist()
        length = rollout.lengths[i]
        ended = rollout.ended(END)[i].item()
        assert row[:length] == prompt + response and not any(row[length:])
        assert ended == (response[-1] == END) and END not in response[:-1]
        assert ended or len(response) == room
        if end == ALWAYS:
            assert response == [END]
        if end == NEVER:
            assert len(response) == room and not ended
    assert rollout.tokens.shape == (len(prompts), max(rollout.lengths))
    if len(prompts) == 9:
        assert len(set(map(tuple, responses))) > 3      # the same prompt, but not the same draw
    with pytest.raises(InputError, match="exceed the context of 8") as error:
        generate(model, prompts, BLOCK + 1 - max(map(len, prompts)), END)
    assert "\n" not in str(error.value)


FULL = ([1, 2, 3, 0, 1, 2, 3], [END])       # (prompt, response) that fill the context


@pytest.mark.parametrize("micro_batch", [1, 2, 64])
@pytest.mark.parametrize("rows", [
    [FULL], [([2], [END])], [([2], [3])],
    [FULL, ([2], [3, 1, 0, 0, 2, 1, END]), ([0, 1], [END]), ([3], [2])],
    [([2, 0], [1, END])] * 3, [([2, 0], [1, END]), ([3, 1], [0, 0]), ([1, 1], [2, END])]])
def test_scoring_at_the_edges(rows, micro_batch):
    """A squeeze that swallows a batch of one, a mask that is empty for a response of one token,
    rows of the same length that get mixed up, a micro-batch larger than the batch."""
    policy = tiny(0)
    value_model = tiny(2, RewardModel)
    table = Table()
    tokens, lengths = gpt.pad([prompt + response for prompt, response in rows])
    prompt_lengths = torch.tensor([len(prompt) for prompt, _ in rows])
    rollout = Rollout(tokens, prompt_lengths, lengths)
    mask = response_mask(prompt_lengths, lengths, tokens.shape[1])

    logprobs = ppo.all_logprobs(policy, rollout, mask, micro_batch, 0.7)
    values = ppo.all_values(value_model, rollout, mask, micro_batch)
    scores, token_rewards = make_reward("reward_model", table, None, micro_batch)(rollout)
    assert logprobs.shape == values.shape == token_rewards.shape == mask.shape
    assert not logprobs[~mask].any() and not values[~mask].any() and not token_rewards.any()
    for i, (prompt, response) in enumerate(rows):
        expected = chosen_by_hand(policy, prompt, response, 0.7)
        assert logprobs[i, mask[i]].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
        expected = last_outputs(value_model, prompt, response)
        assert values[i, mask[i]].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
        assert scores[i].item() == pytest.approx(table.look_up(prompt + response))


# --------------------------------------------------------------------------------------------------
# PPO


PROMPTS = [[2, 0], [1], [3, 3, 0, 1, 2], [0, 1, 2]]
EDGES = {
    "a prompt that fills the context but for one token": dict(
        prompts=[[1, 2, 3, 0, 1, 2, 3], [2]], max_new_tokens=1),
    "a batch of one": dict(rollouts=1),
    "all responses of one length": dict(prompts=[[2, 0], [1, 1]], end=NEVER),
    "one prompt": dict(prompts=[[2, 0]]),
    "micro-batch and minibatch that do not fit": dict(rollouts=5, minibatch=3, micro_batch=64),
    "a minibatch larger than the batch": dict(rollouts=3, minibatch=64, micro_batch=2),
    "all rewards equal": dict(reward=7.3),
    "no response ends": dict(end=NEVER),
    "every response ends at once": dict(end=ALWAYS),
    "one token in the whole batch": dict(rollouts=1, max_new_tokens=1),
    "all the same": dict(prompts=[[2, 0]], end=ALWAYS, reward=7.3),
    "nothing to prefer": dict(      # 50: their mean in float32 is not 7.3
        prompts=[[2, 0]], rollouts=50, minibatch=50, micro_batch=50, max_new_tokens=1, reward=7.3,
        missing_end_score=7.3, beta=0.0),
}


def advantages_by_hand(models, prompt, response, score, config):
    """What the update needs of one response, from the definitions, each (n,): log π, V, A, G, and
    log π/π_ref."""
    policy, reference, value_model = models
    logprobs = chosen_by_hand(policy, prompt, response)
    log_ratio = logprobs - chosen_by_hand(reference, prompt, response)
    v = last_outputs(value_model, prompt, response)
    rewards = -config.beta * log_ratio
    rewards[-1] += score
    delta = rewards + config.gamma * torch.cat([v[1:], torch.zeros(1)]) - v
    n = len(v)
    A = torch.zeros(n, dtype=torch.float64)
    for t in range(n):
        for k in range(t, n):
            A[t] += (config.gamma * config.lam) ** (k - t) * delta[k]
    return dict(old_logprobs=logprobs, old_values=v, advantages=A, returns=A + v,
                log_ratio=log_ratio)


def check_figures(figures, rows, config):
    """The figures that are logged, from [(prompt, response, score, advantages_by_hand)]."""
    logprobs = torch.cat([by_hand["old_logprobs"] for _, _, _, by_hand in rows])
    kl = sum(by_hand["log_ratio"].sum().item() for _, _, _, by_hand in rows) / len(rows)
    reward = sum(score for _, _, score, _ in rows) / len(rows)
    no_end = sum(response[-1] != END for _, response, _, _ in rows) / len(rows)
    expected = dict(reward=reward, kl=kl, J=reward - config.beta * kl, beta=config.beta,
                    length=len(logprobs) / len(rows), entropy=-logprobs.mean().item(),
                    no_end=no_end)
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, abs=1e-3), name


@pytest.mark.parametrize("case", EDGES.values(), ids=EDGES.keys())
def test_ppo_at_the_edges(case, monkeypatch):
    """A standard deviation of nothing: whitening one token, or equal advantages, gives NaN, or
    blows rounding errors up to steps of full size; a variance of one number gives NaN in
    metrics.jsonl, which is no JSON."""
    settings = dict(iterations=1, rollouts=6, minibatch=4, micro_batch=3, epochs=2,
                    max_new_tokens=3, beta=0.3, missing_end_score=-4.0)
    settings.update(case)
    prompts = settings.pop("prompts", PROMPTS)
    end = settings.pop("end", 0.0)
    table = Table(settings.pop("reward", None))
    config = ppo.Config(**settings)
    policy = tiny(0, end=end)
    reference = tiny(1)
    value_model = tiny(2, RewardModel)
    before = copy.deepcopy(policy), reference, copy.deepcopy(value_model)

    sampled = []
    parts = []
    steps = []
    score = make_reward("reward_model", table, None, config.micro_batch)
    pick = ppo.Rollouts.pick
    optimizer_step = ppo.optimizer_step

    def draw_prompts(count, rng):
        return rng.choices(prompts, k=count)

    def reward(rollout):
        sampled.append(rollout)
        return score(rollout)

    def record_pick(rollouts, rows):
        parts.append(pick(rollouts, rows))
        return parts[-1]

    def record_step(optimizer, model, lr):
        steps.append(model)
        return optimizer_step(optimizer, model, lr)

    task = ppo.Task(draw_prompts, reward, END)
    run = SilentRun(report=1)
    with monkeypatch.context() as patch:
        patch.setattr(ppo.Rollouts, "pick", record_pick)
        patch.setattr(ppo, "optimizer_step", record_step)
        ppo.ppo(policy, reference, value_model, task, config, run)
    assert len(sampled) == 1

    # 1. Every response from the definitions, and the figures that are logged.
    rows = []
    for i, response in enumerate(sampled[0].responses()):
        prompt = sampled[0].tokens[i, :sampled[0].prompt_lengths[i]].tolist()
        R = config.missing_end_score
        if response[-1] == END:
            R = table.look_up(prompt + response)
        rows.append((prompt, response, R, advantages_by_hand(before, prompt, response, R, config)))
    assert len(rows) == config.rollouts
    figures, = run.rows
    check_figures(figures, rows, config)
    if end == NEVER:
        assert figures["no_end"] == 1
    if end == ALWAYS:
        assert figures["no_end"] == 0 and figures["length"] == 1
    if config.max_new_tokens == 1:
        assert figures["length"] == 1

    # 2. What the update saw: each epoch every response once, with whitened advantages.
    advantages = torch.cat([expected["advantages"] for _, _, _, expected in rows])
    spread = math.inf
    if advantages.max() - advantages.min() > 1e-5:
        spread = advantages.std(correction=0)
    expected = {}
    for prompt, response, _, numbers in rows:
        numbers["advantages"] = (numbers["advantages"] - advantages.mean()) / spread
        expected[str((prompt, response))] = numbers
    seen = []
    for part in parts:
        for i in range(len(part.tokens)):
            mask = part.mask[i]
            n = len(mask) - mask.tolist()[::-1].index(True) + 1     # of prompt and response
            ids = part.tokens[i, :n].tolist()
            prompt_length = n - int(mask.sum())
            seen.append(str((ids[:prompt_length], ids[prompt_length:])))
            for name in ("old_logprobs", "old_values", "advantages", "returns"):
                found = getattr(part, name)[i, mask].tolist()
                numbers = expected[seen[-1]][name].tolist()
                assert found == pytest.approx(numbers, abs=1e-3), name
    everything = sorted(str((prompt, response)) for prompt, response, _, _ in rows)
    assert sorted(seen[:len(rows)]) == sorted(seen[len(rows):]) == everything
    assert steps == [policy, value_model] * (2 * math.ceil(config.rollouts / config.minibatch))

    # 3. One step more, nothing broken; where there is nothing to prefer, nothing is learnt.
    moved = 0.0
    for p, q in zip(policy.parameters(), before[0].parameters()):
        moved = max(moved, (p - q).abs().max().item())
    if spread < math.inf and figures["entropy"] > 1e-3:
        assert moved > 0.1 * config.lr
    else:
        assert moved < 1e-3 * config.lr
    assert not same(value_model, before[2]) and same(reference, tiny(1))
    ppo.ppo(policy, reference, value_model, task, config, run)
    for row in run.rows:
        json.dumps(row, allow_nan=False)
    assert finite(policy) and finite(value_model)


def test_a_prompt_without_room_ends_ppo_in_one_line():
    """A prompt that is cut to make room is answered by a policy that never saw the question."""
    reward = make_reward("reward_model", Table(), None, 2)
    for prompt, room in (([1] * BLOCK, 1), ([1] * (BLOCK - 1), 2)):
        task = ppo.Task(lambda count, rng: [prompt] * count, reward, END)
        config = ppo.Config(iterations=1, rollouts=2, max_new_tokens=room)
        with pytest.raises(InputError, match="exceed the context of 8") as error:
            ppo.ppo(tiny(0), tiny(1), tiny(2, RewardModel), task, config, SilentRun())
        assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# DPO

MIXED = [Pair([2, 0, 1, 3, END], [2, 0, END], 2),
         Pair([1, 1, END], [1, 2, 3, 0, 0, 1, 2, END], 1),
         Pair([0, END], [0, 3, END], 1),
         Pair([3, 0, END], [3, 1, 2, END], 1),
         Pair([2, 2, 2, 0, END], [2, 2, 2, 3, 3, END], 3)]
FULL_PAIR = Pair([1, 2, 3, 0, 1, 2, 3, END], [1, 2, 3, 0, 1, 2, 3, 2], 7)
ONE_LENGTH = [Pair([1, 2, END], [1, 3, END], 1), Pair([0, 2, END], [0, 1, END], 1)]
ONE_PROMPT = [Pair([1, 2, END], [1, END], 1), Pair([1, 2, END], [1, 3, 3, END], 1),
              Pair([1, 2, END], [1, END], 1)]


def margins_by_hand(policy, reference, pairs, beta):
    """The margin of every pair, from the definitions."""
    margins = []
    for pair in pairs:
        n = pair.prompt_length
        log_ratios = []
        for ids in (pair.chosen, pair.rejected):
            ratio = chosen_by_hand(policy, ids[:n], ids[n:])
            ratio = ratio - chosen_by_hand(reference, ids[:n], ids[n:])
            log_ratios.append(ratio.sum().item())
        margins.append(beta * (log_ratios[0] - log_ratios[1]))
    return torch.tensor(margins)


@pytest.mark.parametrize("pairs, batch, micro_batch", [
    ([FULL_PAIR, MIXED[0]], 2, 2),      # the context is full
    ([Pair([1, END], [1, 2, 3, END], 1), Pair([2, 3, END], [2, END], 1)], 2, 1),    # end at once
    ([Pair([1, END], [1, 2], 1)], 1, 1),    # one pair, one token each
    (MIXED[:1], 32, 32), (ONE_LENGTH, 2, 2), (ONE_PROMPT, 2, 2),
    (MIXED, 3, 64), (MIXED, 64, 2), (MIXED, 4, 3)])     # batches that do not divide
def test_dpo_at_the_edges(pairs, batch, micro_batch):
    """A last batch that is dropped, or that counts as much as a full one; a mean over no tokens; a
    batch cut in two at the wrong row."""
    policy = tiny(0)
    reference = tiny(1)
    held_out = [Pair([3, 1, END], [3, END], 1)]
    config = dpo.Config(epochs=2, batch=batch, micro_batch=micro_batch, report=1, warmup=1, lr=1e-2,
                        beta=0.5)
    policies = [copy.deepcopy(policy)]

    class Recording(SilentRun):
        def end_step(self, state):
            policies.append(copy.deepcopy(state["policy"]))

    run = Recording(report=1)
    dpo.dpo(policy, reference, pairs, held_out, config, random.Random(0), run)
    batches = dpo.pair_batches(pairs, config, random.Random(0))
    per_epoch = math.ceil(len(pairs) / batch)
    assert len(run.rows) == len(batches) == 2 * per_epoch
    for epoch in (batches[:per_epoch], batches[per_epoch:]):
        assert sorted(i for rows in epoch for i in rows) == list(range(len(pairs)))

    for step, (rows, figures) in enumerate(zip(batches, run.rows)):
        margin = margins_by_hand(policies[step], reference, [pairs[i] for i in rows], 0.5)
        after = margins_by_hand(policies[step + 1], reference, held_out, 0.5)
        expected = dict(loss=(1 + (-margin).exp()).log().mean(), margin=margin.mean(),
                        accuracy=(margin > 0).float().mean(),
                        held_out_loss=(1 + (-after).exp()).log().mean(),
                        held_out_accuracy=(after > 0).float().mean())
        for name, value in expected.items():
            assert figures[name] == pytest.approx(value.item(), abs=1e-3), name
        assert finite(policies[step + 1]) and not same(policies[step], policies[step + 1])


# --------------------------------------------------------------------------------------------------
# The stages on somebody's own file: very few prompts, prompts that are too long

CONTEXT = 48    # of the models below
NEW = 8         # the longest response
STAGES = {sft: "--batch 4", reward_model: "--batch 4", dpo: "--batch 4",
          ppo: "--iterations 2 --rollouts 3 --minibatch 2",
          best_of_n: "--samples 2 --policies ,"}    # the yardstick of the SFT model alone
every_stage = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)


@pytest.fixture
def untrained(tmp_path):
    """A folder with the checkpoints of three stages, of models that have not been trained; a
    character is a token."""
    tokenizer = Tokenizer(train_vocabulary("", 259))
    shape = GPTConfig(259, CONTEXT, n_layer=1, n_head=2, n_embd=16)
    torch.manual_seed(0)
    models = {"gpt": GPT(shape), "sft": GPT(shape), "reward_model": RewardModel(shape)}
    for stage, model in models.items():
        folder = tmp_path / "out/cpu" / stage
        folder.mkdir(parents=True)
        extra = {"text": "own.txt"} if stage == "gpt" else {}
        save_checkpoint(folder / "checkpoint.pt", stage, "cpu", model, tokenizer, **extra)
    return tmp_path / "out"


def files_but_locks(folder):
    return {path: path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != "lock"}


def run_stage(stage, untrained, prompts, chosen="So."):
    """Run a stage on rows with these prompts. Returns None if it ran, or the line in which it
    refused."""
    path = untrained.parent / "rows.jsonl"
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": "No."} for prompt in prompts]
    write_jsonl(path, rows)
    before = files_but_locks(untrained)
    try:
        stage.main(["--size", "cpu", "--out", str(untrained), "--data", str(path),
                    "--max_new_tokens", str(NEW), *STAGES[stage].split()])
    except InputError as error:
        message = str(error)
        assert message.startswith(f"{path}: ") and "\n" not in message
        assert len(message) < len(str(path)) + 200
        assert files_but_locks(untrained) == before     # and nothing was lost
        return message
    rows = metrics(untrained / "cpu" / stage.__name__ / "metrics.jsonl")
    assert rows
    for row in rows:
        assert all(isinstance(x, (int, float, str, type(None))) for x in row.values())


@every_stage
def test_two_prompts_are_enough_and_one_is_not(stage, untrained):
    """Statistics over one prompt, pair or sample: NaN, a traceback out of random.choices, or an
    empty held-out set."""
    for count in (1, 7):
        assert "same prompt" in run_stage(stage, untrained, ["Why?"] * count)
    assert run_stage(stage, untrained, ["Why?", "Who?"]) is None
    assert run_stage(stage, untrained, ["Why?"] * 3 + ["Who?"]) is None


@every_stage
def test_the_longest_text_that_fits(stage, untrained):
    """An off-by-one at the context: a row that just fits is dropped, or one that doesn't ends in a
    traceback.

    SFT and DPO need room for prompt, answer and special tokens, the others for a prompt and a
    response to be sampled.
    """
    fits = ["y" * 38, "z" * 38]
    if stage in (sft, dpo):
        assert run_stage(stage, untrained, fits, "x" * 7) is None   # 2 + 38 + 7 + 1 = 48
        assert "is left to" in run_stage(stage, untrained, fits, "x" * 8)
    else:
        assert run_stage(stage, untrained, fits) is None            # 2 + 38 + 8 = 48
        message = run_stage(stage, untrained, ["y" * 39, "z" * 39])
        assert "leaves room for --max_new_tokens 8" in message


@every_stage
def test_a_long_prompt_on_one_side_of_the_split(stage, untrained):
    """Nothing to train on, or to measure on, and a mean over an empty list; refused only where that
    side is needed."""
    prompts = ["Why?", "Who?"]
    (trained,), (held_out,) = hold_out([{"prompt": prompt} for prompt in prompts])
    assert run_stage(stage, untrained, prompts) is None
    sides = ((trained["prompt"], stage is not best_of_n), (held_out["prompt"], stage is not ppo))
    for side, needed in sides:
        # Which prompt is held out depends on the texts, so look for a long one that stays on its
        # side.
        for n in range(99):
            long = side + "?" * CONTEXT + str(n)
            changed = [long if prompt == side else prompt for prompt in prompts]
            _, (found,) = hold_out([{"prompt": prompt} for prompt in changed])
            if (found["prompt"] == long) == (side == held_out["prompt"]):
                break
        assert (run_stage(stage, untrained, changed) is not None) == needed


def pretrain(folder, data):
    """gpt.main --text on these bytes, a context of 9. Returns None if it ran, or the line in which
    it refused."""
    path = folder / "text.txt"
    path.write_bytes(data)
    flags = "--batch 2 --block_size 9 --vocab_size 259 --n_layer 1 --n_head 1 --n_embd 8 --steps 1"
    try:
        gpt.main(["--size", "cpu", "--out", str(folder / "out"), "--text", str(path),
                  *flags.split()])
    except InputError as error:
        assert str(error).startswith(f"{path}: ") and len(str(error).splitlines()) == 1
        return str(error)
    rows = metrics(folder / "out/cpu/gpt/metrics.jsonl")
    assert len(rows) == 1


def test_the_shortest_text_to_pretrain_on(tmp_path):
    """A text without one whole window, or a held-out part of one token, which predicts nothing: a
    mean of nothing."""
    for count in range(1, 15):
        # Nine tenths must hold a window of 9 tokens, and the last tenth at least 2 tokens.
        cut = count * 9 // 10
        enough = cut >= 9 and count - cut >= 2
        assert (pretrain(tmp_path, b"a" * count) is None) == enough, count
        assert enough == (count >= 11)


def test_strange_texts_to_pretrain_on(tmp_path):
    """A text editor's leftovers end in a traceback minutes later, in the tokenizer or at the first
    sample."""
    fox = "🦊".encode()
    for data in (b"\0" * 99, b"\xef\xbb\xbf" + b"a b\r\n" * 30, b"\r" * 50 + b"x" + b"\r" * 50,
                 fox * 30, "\u2028x".encode() * 30, b"<|end|>" * 20, "\ufeff".encode() * 40,
                 b"a" * 100_000):
        assert pretrain(tmp_path, data) is None or b"\0" in data
    for data in (b"", b" " * 99, b"\r\n" * 99, b"fox" * 99 + b"\xff", "fox".encode("utf-16") * 30,
                 b"a" * 99 + b"\xed\xa0\x80", fox * 30 + fox[:3]):
        assert pretrain(tmp_path, data)


# --------------------------------------------------------------------------------------------------
# People's files: several wrong lines in one file, and lines of a megabyte. (test_files.py has one
# wrong line a file.)

FIELDS = {read_demonstrations: ("prompt", "completion"),
          read_pairs: ("prompt", "chosen", "rejected")}
readers = pytest.mark.parametrize("reader", FIELDS, ids=lambda reader: reader.__name__)
BOM = b"\xef\xbb\xbf"


def row_of(reader, line):
    """The row that a line says, by json.loads; None if it must be refused."""
    def without_twins(items):
        if len(dict(items)) < len(items):
            raise ValueError
        return dict(items)

    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=without_twins)
    except (ValueError, RecursionError):    # of the decoder, of JSON, of int() and of twins
        return None
    fields = FIELDS[reader]
    if not isinstance(row, dict):
        return None
    if reader is read_demonstrations and "completion" not in row and "chosen" in row:
        fields = ("prompt", "chosen")
    values = [row.get(field) for field in fields]
    for value in values:
        if not isinstance(value, str) or value.isspace() or not value or "\0" in value:
            return None
        if value != value.encode("utf-8", "replace").decode():      # half a surrogate pair: "?"
            return None
    return dict(zip(FIELDS[reader], values))


TEXTS = ["fox", " a kite ", "é", "日本", "🦊", "\u2028", "\x85", "\ufeff", '"', "\\", "\n", "\r\n",
         "{", "3"]
WRONG_VALUES = [7, 0.5, 10 ** 20, True, None, [], ["x"], {}, math.nan, "", " ", "\u3000", "\x1c",
                "\0", "a\0", "\ud83e", "\udd8a\ud83e", "\ud83e\udd8a"]
BYTES = [b'"', b"'", b"\\", b"\0", b"\r", b"\t", b"\xff", b"\xc3", BOM, b"\xed\xa0\x80", b"}", b"{",
         b",", b":", b"9", b"\x85", b" "]


def random_line(rng, fields):
    """A line as people and programs leave them: most are right, some wrong in one of many ways."""
    row = {field: "x" + "".join(rng.choices(TEXTS, k=rng.randint(0, 4))) for field in fields}
    if rng.random() < 0.1:
        rest = rng.choice([{}, {"rejected": "y"}, {"completion": "z"}])
        row = {"prompt": row["prompt"], "chosen": "x", **rest}
    if rng.random() < 0.08:
        row[rng.choice(list(row))] = rng.choice(WRONG_VALUES)
    if rng.random() < 0.05:
        del row[rng.choice(list(row))]
    if rng.random() < 0.2:
        row["id"] = rng.choice([7, None, [1, {"prompt": 3}], "\0", -math.inf])
    text = json.dumps(row, ensure_ascii=rng.random() < 0.5)
    line = bytearray(text.encode("utf-8", "surrogatepass"))

    kind = rng.random()
    if kind < 0.03:
        twin = rng.choice(["prompt", "id", "a"]).encode()
        line = line[:-1] + b', "%s": "again"}' % twin
    elif kind < 0.06:
        line = line[rng.randint(0, 3):rng.randint(3, len(line))]
    elif kind < 0.12:
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(line))
            line[at:at + rng.randint(0, 2)] = rng.choice(BYTES)
    elif kind < 0.14:
        line = bytearray(rng.randbytes(rng.randint(1, 40)).replace(b"\n", b" "))
    elif kind < 0.2:
        line = rng.choice([b" ", b"\t"]) * 3 + line + rng.choice([b" \r", b"\t", b"\r"])
    return bytes(line)


def random_file(rng, fields):
    lines = []
    for _ in range(rng.randint(1, 6)):
        if rng.random() < 0.15:
            lines.append(rng.choice([b"", b" ", b"\t"]))
        else:
            lines.append(random_line(rng, fields))
    body = rng.choice([b"\n", b"\r\n"]).join(lines)
    return rng.choice([b"", BOM]) + body + rng.choice([b"", b"\n", b"\n\n"])


@readers
def test_the_first_wrong_line_of_many_is_named(reader, tmp_path):
    """A reader that names the last wrong line, skips one, or counts lines otherwise than an editor;
    compared, line by line, with what Python's own json reads."""
    rng = random.Random(f"edges {reader.__name__}")
    path = tmp_path / "rows.jsonl"
    read = 0
    refused = 0
    several = 0
    for _ in range(800):
        data = random_file(rng, FIELDS[reader])
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        rows = []
        wrong = []
        for number, line in enumerate(data.removeprefix(BOM).split(b"\n"), start=1):
            if line.strip():
                row = row_of(reader, line)
                rows.append(row)
                if row is None:
                    wrong.append(number)
        if rows and not wrong:
            assert reader(path) == rows
            read += 1
            continue
        with pytest.raises(InputError) as error:
            reader(path)
            pytest.fail(f"{data} was read")
        message = str(error.value)
        start = f"{path}:{wrong[0]}: " if wrong else f"{path}: "
        assert message.startswith(start), (data, message)
        assert len(message.splitlines()) == 1 and len(message) < len(str(path)) + 250
        message.encode()
        refused += 1
        several += len(wrong) > 1
    assert read > 200 and refused > 200 and several > 50    # the test sees all sorts


MB = 1_000_000
REST = b', "completion": "x", "chosen": "x", "rejected": "x"}'     # no other field is wrong
X = b"x" * MB
KEY = b"k" * MB
KEYS = json.dumps({f"key {i}": i for i in range(MB // 10)})[:-1].encode()
HUGE = {
    "a long number": b'{"prompt": ' + b"7" * 4000 + REST,
    "too long for int()": b'{"prompt": ' + b"7" * MB + REST,
    "a list": b'{"prompt": [' + b"1," * MB + b"1]" + REST,
    "blank": b'{"prompt": "' + b" " * MB + b'"' + REST,
    "U+3000": b'{"prompt": "' + "\u3000".encode() * MB + b'"' + REST,
    "an escaped NUL": b'{"prompt": "' + X + b'\\u0000"' + REST,
    "half a surrogate pair": b'{"prompt": "' + X + b'\\ud83e"' + REST,
    "not UTF-8": b'{"prompt": "' + X + b'\xff"' + REST,
    "an open quote": b'{"prompt": "' + X,
    "commas": b'{"prompt": "a"' + b"," * MB + REST,
    "no line ends": (b'{"prompt": "a"' + REST + b"\r") * (MB // 64),
    "one string": b'"' + X + b'"',
    "quotes": b'"' * MB,
    "NULs": b"\0" * MB,
    "brackets": b"[" * MB,
    "another key": b'{"' + KEY + b'": 1}',
    "a key twice": b'{"' + KEY + b'": 1, "' + KEY + b'": 1, "prompt": "x"' + REST,
    "other keys": KEYS + b"}",
    "one of many keys twice": KEYS + b', "key 7": 7, "prompt": "x"' + REST,
}


@readers
def test_huge_wrong_lines(reader, tmp_path):
    """An error message of a megabyte, a number that takes minutes to parse, a stack that
    overflows."""
    good = json.dumps({field: "x" for field in FIELDS[reader]}).encode()
    path = tmp_path / "huge.jsonl"
    for name, line in HUGE.items():
        path.unlink(missing_ok=True)
        path.write_bytes(good + b"\n" + line + b"\n" + good)
        with pytest.raises(InputError) as error:
            reader(path)
            pytest.fail(f"{name} was read")
        message = str(error.value)
        assert message.startswith(f"{path}:2: "), (name, message[:300])
        assert len(message.splitlines()) == 1 and len(message) < len(str(path)) + 250, name
        message.encode()


def test_texts_of_many_bytes(tmp_path):
    """Line ends of other systems, separators, NULs, a wrong byte far behind: a text is read exactly
    or refused."""
    rng = random.Random("edges text")
    path = tmp_path / "corpus.txt"
    pieces = [b"fox ", b"\r\n", b"\r", b"\n", b"\n\r", b"\0", b"\t", b"\x0b", b"\x0c", b"\x1c",
              b'"', b"<|end|>", BOM, "\x85\u2028\u2029".encode(), "日本🦊".encode()]
    broken = [b"\xff", b"\xfe", b"\x80", b"\xc3", b"\xed\xa0\x80", b"\xed\xb0\x80", b"\xc0\x80",
              b"\xf5\x80\x80\x80", "🦊".encode()[:3]]
    refused = 0
    for n in range(600):
        parts = rng.choices(pieces, k=rng.randint(1, 200))
        if n % 100 == 0:
            parts.append(b"x" * MB)
        if n % 2:
            parts.insert(rng.randint(0, len(parts)), rng.choice(broken))
        data = b"".join(parts)
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        text = None
        lines = data.removeprefix(BOM).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        try:
            text = lines.decode()
            assert "".join(read_chunks(path)) == text
        except UnicodeDecodeError:
            with pytest.raises(InputError):
                list(read_chunks(path))
            refused += 1
        except InputError as error:
            assert str(error).startswith(f"{path}: ") and len(str(error).splitlines()) == 1
            assert len(str(error)) < 300
            assert not text.strip() or "\0" in text     # a NUL may be refused, as in .jsonl files
            refused += 1
    assert 250 < refused < 600


# --------------------------------------------------------------------------------------------------
# The tokenizer on bytes. (tests/test_tokenizer.py has 10,000 Unicode strings.)


@pytest.fixture(scope="module")
def tokenizers():
    """One of plain bytes, one of English, one that was trained on the special tokens' own
    letters."""
    texts = ["", "the fox and the kite and the hen " * 9,
             "<|end|><|user|><|assistant|> <|end|>fox<|end|" * 9]
    return [Tokenizer(train_vocabulary(text, 320)) for text in texts]


def test_any_bytes_come_back(tokenizers):
    """A byte without a token, or one that a pattern on characters skips: a file of another encoding
    loses letters."""
    rng = random.Random("edges bytes")
    for n in range(10_000):
        data = rng.randbytes(rng.randint(0, 30))
        if n % 2:
            data = bytes(rng.choices(b"\x00\x7f\x80\xc3\xff\xed\xa0\xbd <|end>\r\n", k=12))
        tokenizer = tokenizers[n % 3]
        text = data.decode("latin-1")
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids).encode("latin-1") == data
        assert b"".join(tokenizer.vocabulary[i] for i in ids) == text.encode()
        # What Python makes of a name or an argument that isn't UTF-8: half surrogate pairs, which
        # are no text.
        text = data.decode("utf-8", "surrogateescape")
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == re.sub("[\ud800-\udfff]", "\ufffd", text)
        assert all(0 <= i < len(tokenizer.vocabulary) for i in ids)


def test_no_text_spells_a_special_token(tokenizers):
    """An <|end|> that is put together from parts, where two pieces of text meet, and then ends the
    user's turn."""
    rng = random.Random("edges specials")
    pieces = [*SPECIAL_TOKENS, "<|", "|>", "<", "|", ">", "end", "<|end", "end|>", "user",
              "assistant", " ", "\n", "<|END|>", "<｜end｜>", "fox"]
    for n in range(3000):
        tokenizer = tokenizers[n % 3]
        text = "".join(rng.choices(pieces, k=rng.randint(1, 12)))
        specials = {tokenizer.user_token, tokenizer.assistant_token, tokenizer.end_token}
        prompt = tokenizer.prompt(text)
        response = tokenizer.response(text)
        places = [i for i, token in enumerate(prompt + response) if token in specials]
        assert places == [0, len(prompt) - 1, len(prompt) + len(response) - 1]
        assert tokenizer.decode(prompt + response) == f"<|user|>{text}<|assistant|>{text}<|end|>"
        assert tokenizer.encode_batch([text]) == [prompt[1:-1]] == [response[:-1]]


@pytest.mark.parametrize("stage, flags", [
    (sft, "--sample_batch 3 --demonstrations 40 --questions 20 --batch 16"),
    (reward_model, "--sample_batch 3 --pairs 16 --held_out 16 --batch 8"),
    (reward_model, "--process --batch 8"),
    (ppo, "--sample_batch 3 --iterations 1 --rollouts 16 --minibatch 8 --ptx 0.1"),
    (ppo, "--sample_batch 3 --iterations 1 --rollouts 16 --minibatch 8 --reward process"),
    (dpo, "--sample_batch 3 --batch 8"),
    (dpo, "--sample_batch 3 --batch 8 --loss kto"),
    (dpo, "--sample_batch 3 --batch 8 --online 1 --pairs 16"),
    (best_of_n, "--sample_batch 3 --prompts 2 --samples 16 --policies ,"),
    (best_of_n, "--sample_batch 3 --prompts 2 --samples 16 --policies , --process"),
    (best_of_n, "--sample_batch 3 --finetune per_prompt --rsft_prompts 12 --n 2 --batch 8")])
def test_no_stage_has_more_in_memory_than_the_flags_say(stage, flags, out, monkeypatch):
    """64 rows of logits for a held-out loss, at GPT-2's vocabulary five times the memory of a
    micro-batch; 512 prompts at once after an hour of training: memory that no flag makes less."""
    common = ["--size", "cpu", "--out", str(out), "--max_new_tokens", "16"]
    if "process" in flags and stage != reward_model:
        reward_model.main(common + ["--process"])
    sampled = []
    scored = []
    hidden = GPT.hidden

    def watched(model, tokens, positions=None, cache=None):
        (scored if cache is None else sampled).append(len(tokens))
        return hidden(model, tokens, positions, cache)

    monkeypatch.setattr(GPT, "hidden", watched)
    stage.main(common + ["--micro_batch", "2", *flags.split()])
    assert max(sampled, default=0) <= 6     # both responses to a prompt that are to be compared
    assert 2 <= max(scored) <= 8            # without gradients, of rewards: two micro-batches' pairs
