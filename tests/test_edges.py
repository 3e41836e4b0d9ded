"""What lies at the edge: batches of one, full contexts, responses that end at once; files that nobody should write."""

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
from data.files import InputError, hold_out, read_chunks, read_demonstrations, read_pairs, write_jsonl
from data.tokenizer import SPECIAL_TOKENS, Tokenizer, train as train_vocabulary
from gpt import GPT, GPTConfig, Rollout, generate, response_mask, save_checkpoint
from reward_model import RewardModel

V, END, BLOCK = 5, 4, 8     # tokens 0 to 3 and <|end|>, a context of 8
ALWAYS, NEVER = 60.0, -60.0


def tiny(seed, kind=GPT, end=0.0):
    """A random GPT or RewardModel; end is added to the logit of <|end|> after every prefix."""
    torch.manual_seed(seed)
    model = kind(GPTConfig(V, BLOCK, n_layer=1, n_head=2, n_embd=16))
    if kind is RewardModel:
        torch.nn.init.normal_(model.head.weight)
    elif end:
        with torch.no_grad():   # the first hidden number is always 1, and only <|end|> asks for it
            model.ln_f.weight[0], model.ln_f.bias[0] = 0.0, 1.0
            model.wte.weight[:, 0] = end * (torch.arange(V) == END)
    return model


@torch.no_grad()
def by_hand(model, prompt, response, temperature=1.0):
    """log π of every token at every place of the response, (n, V), from its prefix alone: no batch, shift or cache."""
    model = copy.deepcopy(model).double()
    return torch.stack([(model(torch.tensor([prompt + response[:t]]))[0, -1] / temperature).log_softmax(0)
                        for t in range(len(response))])


def chosen_by_hand(model, prompt, response, temperature=1.0):
    """log π of the response's own tokens, (n,)."""
    return by_hand(model, prompt, response, temperature).gather(1, torch.tensor(response)[:, None]).squeeze(1)


@torch.no_grad()
def values_by_hand(model, prompt, response):
    """V before each token of the response, (n,), each from its prefix alone."""
    model = copy.deepcopy(model).double()
    return torch.stack([model(torch.tensor([prompt + response[:t]]))[0, -1] for t in range(len(response))])


def same(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), other.state_dict().values()))


def finite(model):
    return all(parameter.isfinite().all() for parameter in model.parameters())


class Table:
    """A reward model that looks the whole sequence up in a table; with `constant`, the same for all."""

    def __init__(self, constant=None):
        self.constant = constant

    def look_up(self, ids):
        return self.constant if self.constant is not None else random.Random(str(ids)).gauss(0, 2)

    def score(self, tokens, lengths):
        return torch.tensor([self.look_up(row[:n]) for row, n in zip(tokens.tolist(), lengths.tolist())])


# ----------------------------------------------------------------------------------------------------------------------
# Sampling and scoring


@pytest.mark.parametrize("prompts, room, end", [
    ([[1, 2, 3, 0, 1, 2, 3]], 1, 0.0),                      # the context is full but for one token, in a batch of one
    ([[1, 2, 3, 0, 1, 2, 3], [2], [3, 3, 0]], 1, 0.0),      # and among shorter ones
    ([[3, 1]], 6, 0.0),                                     # a batch of one
    ([[3, 1]] * 9, 6, 0.0),                                 # all prompts the same
    ([[3, 1], [0]] * 3, 6, ALWAYS), ([[3, 1], [0]] * 3, 6, NEVER)])
def test_sampling_at_the_edges(prompts, room, end):
    """A cache one slot too short, or rows that get each other's draws: seen only where the context is full or all rows
    end together. Every draw u lies between the cumulative probabilities of its token and of the one before."""
    model = tiny(0, end=end)
    rollout = generate(model, prompts, room, END, temperature=0.8, seed=5)
    uniforms = torch.rand(len(prompts), room, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for row, length, prompt, response, ended, us in zip(rollout.tokens.tolist(), rollout.lengths.tolist(), prompts,
                                                        rollout.responses(), rollout.ended(END).tolist(), uniforms):
        upper = by_hand(model, prompt, response, 0.8).exp().cumsum(1)
        lower = torch.nn.functional.pad(upper, (1, 0))
        for t, (token, u) in enumerate(zip(response, us.tolist())):
            assert lower[t, token] - 1e-5 <= u <= upper[t, token] + 1e-5
        assert row[:length] == prompt + response and not any(row[length:])
        assert ended == (response[-1] == END) and (ended or len(response) == room) and END not in response[:-1]
        assert end != ALWAYS or response == [END]
        assert end != NEVER or len(response) == room and not ended
    assert rollout.tokens.shape == (len(prompts), max(rollout.lengths))
    if len(prompts) == 9:
        assert len(set(map(tuple, rollout.responses()))) > 3     # the same prompt, but not the same draw
    with pytest.raises(InputError, match="exceed the context of 8") as error:
        generate(model, prompts, BLOCK + 1 - max(map(len, prompts)), END)
    assert "\n" not in str(error.value)


FULL = ([1, 2, 3, 0, 1, 2, 3], [END])       # (prompt, response) that fill the context


@pytest.mark.parametrize("micro_batch", [1, 2, 64])
@pytest.mark.parametrize("rows", [
    [FULL], [([2], [END])], [([2], [3])], [FULL, ([2], [3, 1, 0, 0, 2, 1, END]), ([0, 1], [END]), ([3], [2])],
    [([2, 0], [1, END])] * 3, [([2, 0], [1, END]), ([3, 1], [0, 0]), ([1, 1], [2, END])]])
def test_scoring_at_the_edges(rows, micro_batch):
    """A squeeze that swallows a batch of one, a mask that is empty for a response of one token, rows of the same length
    that get mixed up, a micro-batch larger than the batch."""
    policy, reference, value_model, table = tiny(0), tiny(1), tiny(2, RewardModel), Table()
    tokens, lengths = gpt.pad([prompt + response for prompt, response in rows])
    prompt_lengths = torch.tensor([len(prompt) for prompt, _ in rows])
    mask = response_mask(prompt_lengths, lengths, tokens.shape[1])
    logprobs, ref_logprobs, values, scores = ppo.score(
        policy, reference, table, value_model, Rollout(tokens, prompt_lengths, lengths), mask,
        ppo.Config(micro_batch=micro_batch, temperature=0.7))
    assert logprobs.shape == ref_logprobs.shape == values.shape == mask.shape
    for i, (prompt, response) in enumerate(rows):
        for found, expected in ((logprobs, chosen_by_hand(policy, prompt, response, 0.7)),
                                (ref_logprobs, chosen_by_hand(reference, prompt, response, 0.7)),
                                (values, values_by_hand(value_model, prompt, response))):
            assert found[i, mask[i]].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
            assert not found[i, ~mask[i]].any()
        assert scores[i].item() == pytest.approx(table.look_up(prompt + response))


# ----------------------------------------------------------------------------------------------------------------------
# PPO


PROMPTS = [[2, 0], [1], [3, 3, 0, 1, 2], [0, 1, 2]]
EDGES = {
    "a prompt that fills the context but for one token": dict(prompts=[[1, 2, 3, 0, 1, 2, 3], [2]], max_new_tokens=1),
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
    "nothing to prefer": dict(prompts=[[2, 0]], rollouts=50, minibatch=50, micro_batch=50, max_new_tokens=1, reward=7.3,
                              missing_end_score=7.3, beta=0.0),     # 50: their mean in float32 is not 7.3
}


def advantages_by_hand(models, prompt, response, score, config):
    """(log π, log π/π_ref, V, A, G) of one response, from the definitions."""
    policy, reference, value_model = models
    logprobs, v = chosen_by_hand(policy, prompt, response), values_by_hand(value_model, prompt, response)
    log_ratio = logprobs - chosen_by_hand(reference, prompt, response)
    rewards = -config.beta * log_ratio
    rewards[-1] += score
    delta = rewards + config.gamma * torch.cat([v[1:], torch.zeros(1)]) - v
    n, decay = len(v), config.gamma * config.lam
    A = torch.stack([sum(decay ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)])
    return logprobs, log_ratio, v, A, A + v


@pytest.mark.parametrize("case", EDGES.values(), ids=EDGES.keys())
def test_ppo_at_the_edges(case, monkeypatch):
    """A standard deviation of nothing: whitening one token, or equal advantages, gives NaN, or blows rounding errors up
    to steps of full size; a variance of one number gives NaN in metrics.jsonl, which is no JSON."""
    case = dict(case)
    prompts, end, table = case.pop("prompts", PROMPTS), case.pop("end", 0.0), Table(case.pop("reward", None))
    config = ppo.Config(**{**dict(iterations=2, rollouts=6, minibatch=4, micro_batch=3, epochs=2, max_new_tokens=3,
                                  beta=0.3, missing_end_score=-4.0), **case})
    policy, reference, value_model = tiny(0, end=end), tiny(1), tiny(2, RewardModel)
    before = copy.deepcopy(policy), reference, copy.deepcopy(value_model)
    batches, backward = [], ppo.backward
    monkeypatch.setattr(ppo, "backward", lambda *arguments: batches.append(arguments[2]) or backward(*arguments))
    loop = ppo.optimize(policy, reference, table, value_model, lambda count, rng: rng.choices(prompts, k=count), END,
                        config)
    rollout, figures, _ = next(loop)

    # 1. Every response from the definitions, and the figures that are logged.
    rows, scores = [], []
    for row, n, response in zip(rollout.tokens.tolist(), rollout.prompt_lengths.tolist(), rollout.responses()):
        prompt = row[:n]
        scores.append(table.look_up(prompt + response) if response[-1] == END else config.missing_end_score)
        rows.append((prompt, response, advantages_by_hand(before, prompt, response, scores[-1], config)))
    assert len(rows) == config.rollouts
    kl = sum(log_ratio.sum().item() for _, _, (_, log_ratio, *_) in rows) / len(rows)
    logprobs = torch.cat([row_logprobs for _, _, (row_logprobs, *_) in rows])
    reward = sum(scores) / len(rows)
    for name, value in dict(reward=reward, kl=kl, J=reward - config.beta * kl, beta=config.beta,
                            length=len(logprobs) / len(rows), entropy=-logprobs.mean().item(),
                            no_end=sum(response[-1] != END for _, response, _ in rows) / len(rows)).items():
        if config.beta or name not in ("kl", "J"):  # without a penalty there is no reference
            assert figures[name] == pytest.approx(value, abs=1e-3), name
    assert end != NEVER or figures["no_end"] == 1
    assert end != ALWAYS or (figures["no_end"], figures["length"]) == (0, 1)
    assert case.get("max_new_tokens") != 1 or figures["length"] == 1

    # 2. What the update saw: each epoch every response once, with whitened advantages.
    a = torch.cat([A for _, _, (*_, A, _) in rows])
    spread = a.std(correction=0) if a.max() - a.min() > 1e-5 else math.inf
    whole = {(*prompt, "", *response): (logprobs, v, (A - a.mean()) / spread, G)
             for prompt, response, (logprobs, _, v, A, G) in rows}
    per_epoch = math.ceil(config.rollouts / config.minibatch)
    assert len(batches) == 2 * per_epoch
    for epoch in (batches[:per_epoch], batches[per_epoch:]):
        seen = []
        for batch in epoch:
            for i, (row, mask) in enumerate(zip(batch.tokens.tolist(), batch.mask)):
                columns = mask.nonzero().squeeze(1).tolist()
                seen.append((*row[:columns[0] + 1], "", *row[columns[0] + 1:columns[-1] + 2]))
                for name, numbers in zip(("old_logprobs", "old_values", "advantages", "returns"), whole[seen[-1]]):
                    found = getattr(batch, name)[i, mask].tolist()
                    assert found == pytest.approx(numbers.tolist(), abs=1e-3), name
        assert sorted(map(str, seen)) == sorted(str((*prompt, "", *response)) for prompt, response, _ in rows)

    # 3. One step more, nothing broken; where there is nothing to prefer, nothing is learnt.
    step = max((p - q).abs().max().item() for p, q in zip(policy.parameters(), before[0].parameters()))
    learnable = spread < math.inf and figures["entropy"] > 1e-3
    assert step > 0.1 * config.lr if learnable else step < 1e-3 * config.lr
    assert not same(value_model, before[2]) and same(reference, tiny(1))
    for row in (figures, *(figures for _, figures, _ in loop)):
        json.dumps(row, allow_nan=False)
    assert finite(policy) and finite(value_model)


def test_a_prompt_without_room_ends_ppo_in_one_line():
    """A prompt that is cut to make room is answered by a policy that never saw the question."""
    for prompt, room in (([1] * BLOCK, 1), ([1] * (BLOCK - 1), 2)):
        loop = ppo.optimize(tiny(0), tiny(1), Table(), tiny(2, RewardModel), lambda count, rng: [prompt] * count, END,
                            ppo.Config(iterations=1, rollouts=2, max_new_tokens=room))
        with pytest.raises(InputError, match="exceed the context of 8") as error:
            next(loop)
        assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# DPO

# Chosen, rejected, prompt length.
MIXED = [([2, 0, 1, 3, END], [2, 0, END], 2), ([1, 1, END], [1, 2, 3, 0, 0, 1, 2, END], 1), ([0, END], [0, 3, END], 1),
         ([3, 0, END], [3, 1, 2, END], 1), ([2, 2, 2, 0, END], [2, 2, 2, 3, 3, END], 3)]


@pytest.mark.parametrize("pairs, batch, micro_batch", [
    ([([1, 2, 3, 0, 1, 2, 3, END], [1, 2, 3, 0, 1, 2, 3, 2], 7), MIXED[0]], 2, 2),     # the context is full
    ([([1, END], [1, 2, 3, END], 1), ([2, 3, END], [2, END], 1)], 2, 1),              # one of the two ends at once
    ([([1, END], [1, 2], 1)], 1, 1),                                                # one pair, one token each
    (MIXED[:1], 32, 32),                                                            # a batch of one
    ([([1, 2, END], [1, 3, END], 1), ([0, 2, END], [0, 1, END], 1)], 2, 2),          # all responses of one length
    ([([1, 2, END], [1, END], 1), ([1, 2, END], [1, 3, 3, END], 1), ([1, 2, END], [1, END], 1)], 2, 2),   # one prompt
    (MIXED, 3, 64), (MIXED, 64, 2), (MIXED, 4, 3)])                                   # batches that do not divide
def test_dpo_at_the_edges(pairs, batch, micro_batch, monkeypatch):
    """A last batch that is dropped, or that counts as much as a full one; a mean over no tokens; a batch cut in two at
    the wrong row."""
    policy, reference, held_out = tiny(0), tiny(1), [([3, 1, END], [3, END], 1)]
    config = dpo.Config(epochs=2, batch=batch, micro_batch=micro_batch, report=1, warmup=1, lr=1e-2, beta=0.5)
    parts, backward = [], dpo.backward
    monkeypatch.setattr(dpo, "backward", lambda *arguments: parts.append(arguments[2]) or backward(*arguments))

    def figures(policy, pairs):
        margins = []
        for chosen, rejected, n in pairs:
            log_ratios = [chosen_by_hand(policy, ids[:n], ids[n:]) - chosen_by_hand(reference, ids[:n], ids[n:])
                          for ids in (chosen, rejected)]
            margins.append(0.5 * (log_ratios[0].sum() - log_ratios[1].sum()).item())
        return (sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins),
                sum(margin > 0 for margin in margins) / len(margins), sum(margins) / len(margins))

    before = copy.deepcopy(policy)
    for step, row, _ in dpo.fit(policy, reference, pairs, held_out, config, random.Random(0)):
        loss, accuracy, margin = figures(before, parts[-1])
        assert (row["loss"], row["accuracy"], row["margin"]) == pytest.approx((loss, accuracy, margin), abs=1e-3)
        loss, accuracy, _ = figures(policy, held_out)
        assert (row["held_out_loss"], row["held_out_accuracy"]) == pytest.approx((loss, accuracy), abs=1e-3)
        assert finite(policy) and not same(policy, before)
        before = copy.deepcopy(policy)
    per_epoch = math.ceil(len(pairs) / batch)
    assert step == len(parts) == 2 * per_epoch
    for epoch in (parts[:per_epoch], parts[per_epoch:]):
        assert sorted(pair for part in epoch for pair in part) == sorted(pairs)


# ----------------------------------------------------------------------------------------------------------------------
# The stages on somebody's own file: very few prompts, prompts that are too long

CONTEXT, NEW = 48, 8        # of the models below, and the longest response
STAGES = {sft: "--batch 4", reward_model: "--batch 4", dpo: "--batch 4",
          ppo: "--iterations 2 --rollouts 3 --minibatch 2",
          best_of_n: "--samples 2 --policies ,"}     # the yardstick of the SFT model alone
every_stage = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)


@pytest.fixture
def untrained(tmp_path):
    """A folder with the checkpoints of three stages, of models that nobody trained; a character is a token."""
    tokenizer, shape = Tokenizer(train_vocabulary("", 259)), GPTConfig(259, CONTEXT, n_layer=1, n_head=2, n_embd=16)
    torch.manual_seed(0)
    for stage, kind, extra in (("gpt", GPT, {"text": "own.txt"}), ("sft", GPT, {}), ("reward_model", RewardModel, {})):
        (tmp_path / "out/cpu" / stage).mkdir(parents=True)
        save_checkpoint(tmp_path / "out/cpu" / stage / "checkpoint.pt", stage, "cpu", kind(shape), tokenizer, **extra)
        write_jsonl(tmp_path / "out/cpu" / stage / "metrics.jsonl", [{"step": 1}])
    return tmp_path / "out"


def run_stage(stage, untrained, prompts, chosen="So."):
    """Run a stage on rows with these prompts. Returns None if it ran, or the line in which it refused."""
    path = untrained.parent / "rows.jsonl"
    write_jsonl(path, [{"prompt": prompt, "chosen": chosen, "rejected": "No."} for prompt in prompts])
    before = {file: file.read_bytes() for file in untrained.rglob("*") if file.is_file()}
    try:
        stage.main(["--size", "cpu", "--out", str(untrained), "--data", str(path), "--max_new_tokens", str(NEW),
                    *STAGES[stage].split()])
    except InputError as error:
        message = str(error)
        assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < len(str(path)) + 200
        after = {file: file.read_bytes() for file in untrained.rglob("*") if file.is_file() and file.name != "lock"}
        assert after == {file: data for file, data in before.items() if file.name != "lock"}     # and nothing was lost
        return message
    rows = (untrained / "cpu" / stage.__name__ / "metrics.jsonl").read_text().splitlines()
    assert rows and all(isinstance(x, (int, float, str, type(None))) and x == x for row in rows
                        for x in json.loads(row, parse_constant=lambda name: pytest.fail(f"{stage}: {name}")).values())


@every_stage
def test_two_prompts_are_enough_and_one_is_not(stage, untrained):
    """Statistics over one prompt, pair or sample: NaN, a traceback out of random.choices, or an empty held-out set."""
    for count in (1, 7):
        assert "same prompt" in run_stage(stage, untrained, ["Why?"] * count)
    assert run_stage(stage, untrained, ["Why?", "Who?"]) is None
    assert run_stage(stage, untrained, ["Why?"] * 3 + ["Who?"]) is None


@every_stage
def test_the_longest_text_that_fits(stage, untrained):
    """An off-by-one at the context: a row that just fits is dropped, or one that doesn't ends in a traceback.

    SFT and DPO need room for prompt, answer and special tokens, the others for a prompt and a response to be sampled.
    """
    if stage in (sft, dpo):
        assert run_stage(stage, untrained, ["y" * 38, "z" * 38], "x" * 7) is None         # 2 + 38 + 7 + 1 = 48
        assert "is left to" in run_stage(stage, untrained, ["y" * 38, "z" * 38], "x" * 8)
    else:
        assert run_stage(stage, untrained, ["y" * 38, "z" * 38]) is None                 # 2 + 38 + 8 = 48
        assert "leaves room for --max_new_tokens 8" in run_stage(stage, untrained, ["y" * 39, "z" * 39])


@every_stage
def test_a_long_prompt_on_one_side_of_the_split(stage, untrained):
    """Nothing to train on, or to measure on, and a mean over an empty list; refused only where that side is needed."""
    prompts = ["Why?", "Who?"]
    (trained,), (held_out,) = (part for part in hold_out([{"prompt": prompt} for prompt in prompts], 1))
    assert run_stage(stage, untrained, prompts) is None
    for side, needed in ((trained["prompt"], stage is not best_of_n), (held_out["prompt"], stage is not ppo)):
        # Which prompt is held out depends on the texts, so look for a long one that stays on its side.
        for n in range(99):
            long = side + "?" * CONTEXT + str(n)
            rows = [{"prompt": long if prompt == side else prompt} for prompt in prompts]
            if (hold_out(rows, 1)[1][0]["prompt"] == long) == (side == held_out["prompt"]):
                break
        assert (run_stage(stage, untrained, [row["prompt"] for row in rows]) is not None) == needed


def pretrain(folder, data):
    """gpt.main --text on these bytes, a context of 9. Returns None if it ran, or the line in which it refused."""
    (folder / "text.txt").write_bytes(data)
    try:
        gpt.main(["--size", "cpu", "--out", str(folder / "out"), "--text", str(folder / "text.txt"), "--batch", "2",
                  *"--block_size 9 --vocab_size 259 --n_layer 1 --n_head 1 --n_embd 8 --steps 1".split()])
    except InputError as error:
        assert str(error).startswith(f"{folder / 'text.txt'}: ") and len(str(error).splitlines()) == 1
        return str(error)
    rows = [json.loads(line) for line in (folder / "out/cpu/gpt/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 1 and all(math.isfinite(x) for x in rows[0].values())


def test_the_shortest_text_to_pretrain_on(tmp_path):
    """A text without one whole window, or a held-out part of one token, which predicts nothing: a mean of nothing."""
    for count in range(1, 15):
        # Nine tenths must hold a window of 9 tokens, and the last tenth at least 2 tokens.
        enough = count * 9 // 10 >= 9 and count - count * 9 // 10 >= 2
        assert (pretrain(tmp_path, b"a" * count) is None) == enough, count
        assert enough == (count >= 11)


def test_strange_texts_to_pretrain_on(tmp_path):
    """A text editor's leftovers end in a traceback minutes later, in the tokenizer or at the first sample."""
    for data in (b"\0" * 99, b"\xef\xbb\xbf" + b"a b\r\n" * 30, b"\r" * 50 + b"x" + b"\r" * 50, "🦊".encode() * 30,
                 "\u2028x".encode() * 30, b"<|end|>" * 20, "\ufeff".encode() * 40, b"a" * 100_000):
        assert pretrain(tmp_path, data) is None or b"\0" in data
    for data in (b"", b" " * 99, b"\r\n" * 99, b"fox" * 99 + b"\xff", "fox".encode("utf-16") * 30,
                 b"a" * 99 + b"\xed\xa0\x80", "🦊".encode() * 30 + "🦊".encode()[:3]):
        assert pretrain(tmp_path, data)


# ----------------------------------------------------------------------------------------------------------------------
# People's files: several wrong lines in one file, and lines of a megabyte. (test_files.py has one wrong line a file.)

FIELDS = {read_demonstrations: ("prompt", "completion"), read_pairs: ("prompt", "chosen", "rejected")}
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
        if value != value.encode("utf-8", "replace").decode():      # half a surrogate pair becomes "?"
            return None
    return dict(zip(FIELDS[reader], values))


def random_line(rng, fields):
    """A line as people and programs leave them: most are right, some wrong in one of many ways."""
    texts = ["fox", " a kite ", "é", "日本", "🦊", "\u2028", "\x85", "\ufeff", '"', "\\", "\n", "\r\n", "{", "3"]
    row = {field: "x" + "".join(rng.choices(texts, k=rng.randint(0, 4))) for field in fields}
    if rng.random() < 0.1:
        row = {"prompt": row["prompt"], "chosen": "x", **rng.choice([{}, {"rejected": "y"}, {"completion": "z"}])}
    if rng.random() < 0.08:
        row[rng.choice(list(row))] = rng.choice([
            7, 0.5, 10 ** 20, True, None, [], ["x"], {}, math.nan, "", " ", "\u3000", "\x1c", "\0", "a\0", "\ud83e",
            "\udd8a\ud83e", "\ud83e\udd8a"])
    if rng.random() < 0.05:
        del row[rng.choice(list(row))]
    if rng.random() < 0.2:
        row["id"] = rng.choice([7, None, [1, {"prompt": 3}], "\0", -math.inf])
    line = bytearray(json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass"))
    kind = rng.random()
    if kind < 0.03:
        line = line[:-1] + b', "%s": "again"}' % rng.choice(["prompt", "id", "a"]).encode()
    elif kind < 0.06:
        line = line[rng.randint(0, 3):rng.randint(3, len(line))]
    elif kind < 0.12:
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(line))
            line[at:at + rng.randint(0, 2)] = rng.choice([b'"', b"'", b"\\", b"\0", b"\r", b"\t", b"\xff", b"\xc3", BOM,
                                                          b"\xed\xa0\x80", b"}", b"{", b",", b":", b"9", b"\x85", b" "])
    elif kind < 0.14:
        line = bytearray(rng.randbytes(rng.randint(1, 40)).replace(b"\n", b" "))
    elif kind < 0.2:
        line = rng.choice([b" ", b"\t"]) * 3 + line + rng.choice([b" \r", b"\t", b"\r"])
    return bytes(line)


@readers
def test_the_first_wrong_line_of_many_is_named(reader, tmp_path):
    """A reader that names the last wrong line, skips one, or counts lines otherwise than an editor; compared, line by
    line, with what Python's own json reads."""
    rng, path = random.Random(f"edges {reader.__name__}"), tmp_path / "rows.jsonl"
    read = refused = several = 0
    for _ in range(800):
        lines = [rng.choice([b"", b" ", b"\t"]) if rng.random() < 0.15 else random_line(rng, FIELDS[reader])
                 for _ in range(rng.randint(1, 6))]
        data = rng.choice([b"", BOM]) + rng.choice([b"\n", b"\r\n"]).join(lines) + rng.choice([b"", b"\n", b"\n\n"])
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        numbered = [(number, row_of(reader, line))
                    for number, line in enumerate(data.removeprefix(BOM).split(b"\n"), start=1) if line.strip()]
        wrong = [number for number, row in numbered if row is None]
        if numbered and not wrong:
            assert reader(path) == [row for _, row in numbered]
            read += 1
        else:
            with pytest.raises(InputError) as error:
                reader(path)
                pytest.fail(f"{data} was read")
            message = str(error.value)
            assert message.startswith(f"{path}:{wrong[0]}: " if wrong else f"{path}: "), (data, message)
            assert len(message.splitlines()) == 1 and len(message) < len(str(path)) + 250
            message.encode()
            refused += 1
            several += len(wrong) > 1
    assert read > 200 and refused > 200 and several > 50    # the test sees all sorts


MB = 1_000_000
REST = b', "completion": "x", "chosen": "x", "rejected": "x"}'     # no other field is wrong
X, KEY, KEYS = b"x" * MB, b"k" * MB, json.dumps({f"key {i}": i for i in range(MB // 10)})[:-1].encode()
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
    "one string": b'"' + X + b'"', "quotes": b'"' * MB, "NULs": b"\0" * MB, "brackets": b"[" * MB,
    "another key": b'{"' + KEY + b'": 1}',
    "a key twice": b'{"' + KEY + b'": 1, "' + KEY + b'": 1, "prompt": "x"' + REST,
    "other keys": KEYS + b"}",
    "one of many keys twice": KEYS + b', "key 7": 7, "prompt": "x"' + REST,
}


@readers
def test_huge_wrong_lines(reader, tmp_path):
    """An error message of a megabyte, a number that takes minutes to parse, a stack that overflows."""
    good = json.dumps({field: "x" for field in FIELDS[reader]}).encode()
    for name, line in HUGE.items():
        path = tmp_path / "huge.jsonl"
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
    """Line ends of other systems, separators, NULs, a wrong byte far behind: a text is read exactly or refused."""
    rng, path = random.Random("edges text"), tmp_path / "corpus.txt"
    pieces = [b"fox ", b"\r\n", b"\r", b"\n", b"\n\r", b"\0", b"\t", b"\x0b", b"\x0c", b"\x1c", b'"', b"<|end|>", BOM,
              "\x85\u2028\u2029".encode(), "日本🦊".encode()]
    broken = [b"\xff", b"\xfe", b"\x80", b"\xc3", b"\xed\xa0\x80", b"\xed\xb0\x80", b"\xc0\x80", b"\xf5\x80\x80\x80",
              "🦊".encode()[:3]]
    refused = 0
    for n in range(600):
        parts = rng.choices(pieces, k=rng.randint(1, 200)) + [b"x" * MB] * (n % 100 == 0)
        if n % 2:
            parts.insert(rng.randint(0, len(parts)), rng.choice(broken))
        data = b"".join(parts)
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        try:
            text = data.removeprefix(BOM).replace(b"\r\n", b"\n").replace(b"\r", b"\n").decode()
        except UnicodeDecodeError:
            text = None
        try:
            assert "".join(read_chunks(path)) == text
        except InputError as error:
            assert str(error).startswith(f"{path}: ") and len(str(error).splitlines()) == 1 and len(str(error)) < 300
            assert text is None or not text.strip() or "\0" in text     # a NUL may be refused, as in the .jsonl files
            refused += 1
    assert 250 < refused < 600


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer on bytes. (tests/test_tokenizer.py has 10,000 Unicode strings.)


@pytest.fixture(scope="module")
def tokenizers():
    """One of plain bytes, one of English, one that was trained on the special tokens' own letters."""
    return [Tokenizer(train_vocabulary(text, 320)) for text in ("", "the fox and the kite and the hen " * 9,
                                                                "<|end|><|user|><|assistant|> <|end|>fox<|end|" * 9)]


def test_any_bytes_come_back(tokenizers):
    """A byte without a token, or one that a pattern on characters skips: a file of another encoding loses letters."""
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
        # What Python makes of a name or an argument that isn't UTF-8: half surrogate pairs, which are no text.
        text = data.decode("utf-8", "surrogateescape")
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == re.sub("[\ud800-\udfff]", "\ufffd", text)
        assert all(0 <= i < len(tokenizer.vocabulary) for i in ids)


def test_no_text_spells_a_special_token(tokenizers):
    """An <|end|> that is put together from parts, where two pieces of text meet, and then ends the user's turn."""
    rng = random.Random("edges specials")
    pieces = [*SPECIAL_TOKENS, "<|", "|>", "<", "|", ">", "end", "<|end", "end|>", "user", "assistant", " ", "\n",
              "<|END|>", "<｜end｜>", "fox"]
    for n in range(3000):
        tokenizer, text = tokenizers[n % 3], "".join(rng.choices(pieces, k=rng.randint(1, 12)))
        specials = {tokenizer.user_token, tokenizer.assistant_token, tokenizer.end_token}
        prompt, response = tokenizer.prompt(text), tokenizer.response(text)
        assert [i for i, token in enumerate(prompt + response) if token in specials] == [
            0, len(prompt) - 1, len(prompt) + len(response) - 1]
        assert tokenizer.decode(prompt + response) == f"<|user|>{text}<|assistant|>{text}<|end|>"
        assert tokenizer.encode_batch([text]) == [prompt[1:-1]] == [response[:-1]]
