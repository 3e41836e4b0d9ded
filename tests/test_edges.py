"""What lies at the edge: batches of one, full contexts, responses that end at once; very few
prompts, strange texts; how much is in memory at once."""

import copy
import json
import random

import pytest
import torch

import best_of_n
import dpo
import gpt
import ppo
import reward_model
import sft
from data.files import InputError, hold_out, write_jsonl
from data.run import SilentRun
from data.tokenizer import Tokenizer, train as train_vocabulary
from gpt import GPT, GPTConfig, save_checkpoint
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
def by_hand(model, prompt, response):
    """log π of the response's own tokens, (n,), in float64, each from its prefix alone: no batch,
    shift or cache."""
    model = copy.deepcopy(model).double()
    logprobs = []
    for t, token in enumerate(response):
        logits = model(torch.tensor([prompt + response[:t]]))[0, -1]
        logprobs.append(logits.log_softmax(0)[token])
    return torch.stack(logprobs)


def largest_change(model, other):
    pairs = zip(model.parameters(), other.parameters())
    return max((p - q).abs().max().item() for p, q in pairs)


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


EDGES = {
    "a prompt that fills the context but for one token": dict(
        prompts=[[1, 2, 3, 0, 1, 2, 3], [2]], max_new_tokens=1),
    "a batch of one": dict(rollouts=1),
    "micro-batch and minibatch that do not fit": dict(rollouts=5, minibatch=3, micro_batch=64),
    "a minibatch larger than the batch": dict(rollouts=3, minibatch=64, micro_batch=2),
    "all rewards equal": dict(reward=7.3),
    "no response ends": dict(prompts=[[2, 0], [1, 1]], end=NEVER),
    "every response ends at once": dict(end=ALWAYS, still=True),
    "one token in the whole batch": dict(rollouts=1, max_new_tokens=1, still=True),
    "nothing to prefer": dict(      # 50: their mean in float32 is not 7.3
        prompts=[[2, 0]], rollouts=50, minibatch=50, micro_batch=50, max_new_tokens=1, reward=7.3,
        missing_end_score=7.3, beta=0.0, still=True),
}


@pytest.mark.parametrize("case", EDGES.values(), ids=EDGES.keys())
def test_ppo_at_the_edges(case):
    """A standard deviation of nothing: whitening one token, or equal advantages, gives NaN, or
    blows rounding errors up to steps of full size; a variance of one number gives NaN in
    metrics.jsonl, which is no JSON."""
    settings = dict(iterations=1, rollouts=6, minibatch=4, micro_batch=3, epochs=2,
                    max_new_tokens=3, beta=0.3, missing_end_score=-4.0)
    settings.update(case)
    prompts = settings.pop("prompts", [[2, 0], [1], [3, 3, 0, 1, 2], [0, 1, 2]])
    end = settings.pop("end", 0.0)
    still = settings.pop("still", False)
    table = Table(settings.pop("reward", None))
    config = ppo.Config(**settings)
    policy = tiny(0, end=end)
    reference = tiny(1)
    value_model = tiny(2, RewardModel)
    sampled = []
    score = make_reward("reward_model", table, None, config.micro_batch)

    def draw_prompts(count, rng):
        return rng.choices(prompts, k=count)

    def reward(rollout):
        sampled.append(rollout)
        return score(rollout)

    run = SilentRun(report=1)
    task = ppo.Task(draw_prompts, reward, END)
    ppo.ppo(policy, reference, value_model, task, config, run)
    moved = largest_change(policy, tiny(0, end=end))
    assert moved < 1e-3 * config.lr if still else moved > 0.1 * config.lr
    assert largest_change(value_model, tiny(2, RewardModel)) > 0
    assert largest_change(reference, tiny(1)) == 0

    # The figures, from every response by hand.
    responses = sampled[0].responses()
    rewards = []
    ratios = []
    logprobs = []
    for row, length, response in zip(sampled[0].tokens.tolist(), sampled[0].prompt_lengths,
                                     responses):
        prompt = row[:length]
        ended = response[-1] == END
        rewards.append(table.look_up(prompt + response) if ended else config.missing_end_score)
        logprobs.append(by_hand(tiny(0, end=end), prompt, response))
        ratios.append((logprobs[-1] - by_hand(reference, prompt, response)).sum().item())
    count = len(responses)
    reward = sum(rewards) / count
    kl = sum(ratios) / count
    lengths = [len(response) for response in responses]
    no_end = sum(response[-1] != END for response in responses) / count
    expected = dict(reward=reward, kl=kl, J=reward - config.beta * kl, length=sum(lengths) / count,
                    entropy=-torch.cat(logprobs).mean().item(), no_end=no_end)
    assert count == config.rollouts
    for name, value in expected.items():
        assert run.rows[0][name] == pytest.approx(value, abs=1e-3), name
    if end:
        assert no_end == (end == NEVER) and set(lengths) == {3 if end == NEVER else 1}
    ppo.ppo(policy, reference, value_model, task, config, run)      # one step more
    for row in run.rows:
        json.dumps(row, allow_nan=False)
    for model in (policy, value_model):
        assert all(parameter.isfinite().all() for parameter in model.parameters())


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
    assert metrics(untrained / "cpu" / stage.__name__ / "metrics.jsonl")


@every_stage
def test_few_and_long_prompts(stage, untrained):
    """Statistics over one prompt, pair or sample: NaN, a traceback out of random.choices, or an
    empty held-out set. An off-by-one at the context: a row that just fits is dropped, or one that
    doesn't ends in a traceback. SFT and DPO need room for prompt, answer and special tokens, the
    others for a prompt and a response to be sampled."""
    assert "same prompt" in run_stage(stage, untrained, ["Why?"] * 7)
    assert run_stage(stage, untrained, ["Why?"] * 3 + ["Who?"]) is None
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
    """Whether gpt.main trains on a text of these bytes, with a context of 9, or refuses it in one
    line."""
    path = folder / "text.txt"
    path.write_bytes(data)
    flags = "--batch 2 --block_size 9 --vocab_size 259 --n_layer 1 --n_head 1 --n_embd 8 --steps 1"
    try:
        gpt.main(["--size", "cpu", "--out", str(folder / "out"), "--text", str(path),
                  *flags.split()])
    except InputError as error:
        assert str(error).startswith(f"{path}: ") and len(str(error).splitlines()) == 1
        return False
    rows = metrics(folder / "out/cpu/gpt/metrics.jsonl")
    return len(rows) == 1


def test_strange_texts_to_pretrain_on(tmp_path):
    """A text without one whole window, or a held-out part of one token, which predicts nothing: a
    mean of nothing. A text editor's leftovers that end in a traceback minutes later."""
    # Nine tenths must hold a window of 9 tokens, and the last tenth at least 2 tokens.
    for count, enough in ((1, False), (9, False), (10, False), (11, True)):
        assert pretrain(tmp_path, b"a" * count) == enough, count
    assert pretrain(tmp_path, b"\xef\xbb\xbf" * 40 + "🦊\u2028<|end|>".encode() * 9)


# --------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("stage, flags", [
    (sft, "--demonstrations 24 --questions 12 --batch 8"),
    (reward_model, "--pairs 8 --held_out 8 --batch 4"),
    (reward_model, "--process --batch 16"),
    (ppo, "--iterations 1 --rollouts 12 --minibatch 6 --ptx 0.1"),
    (ppo, "--iterations 1 --rollouts 12 --minibatch 6 --reward process"),
    (dpo, "--batch 16"),
    (dpo, "--batch 16 --loss kto"),
    (dpo, "--batch 8 --online 1 --pairs 16"),
    (best_of_n, "--prompts 2 --samples 16 --policies ,"),
    (best_of_n, "--prompts 2 --samples 16 --policies , --process"),
    (best_of_n, "--finetune per_prompt --rsft_prompts 8 --n 2 --batch 8 --epochs 1")])
def test_no_stage_has_more_in_memory_than_the_flags_say(stage, flags, out, monkeypatch):
    """64 rows of logits for a held-out loss, at GPT-2's vocabulary five times the memory of a
    micro-batch; 512 prompts at once after an hour of training: memory that no flag makes less."""
    common = ["--size", "cpu", "--out", str(out)]
    if "process" in flags and stage != reward_model:
        reward_model.main(common + ["--process", "--micro_batch", "64", "--batch", "64"])
    if flags != "--process --batch 16":
        common += ["--sample_batch", "5", "--max_new_tokens", "8"]
    sampled = []
    scored = []
    hidden = GPT.hidden

    def watched(model, tokens, positions=None, cache=None):
        (scored if cache is None else sampled).append(len(tokens))
        return hidden(model, tokens, positions, cache)

    monkeypatch.setattr(GPT, "hidden", watched)
    stage.main(common + ["--micro_batch", "2", *flags.split()])
    assert max(sampled, default=0) <= 10    # both responses to a prompt that are to be compared
    assert 2 <= max(scored) <= 8            # without gradients, of rewards: pairs of two of them
