"""What lies at the edge: batches of one, full contexts, very few prompts; how much is in memory."""

import json
import random

import pytest
import torch

import best_of_n
import dpo
import ppo
import reward_model
import sft
from data.files import InputError, write_jsonl
from data.run import SilentRun
from data.tokenizer import Tokenizer, train as train_vocabulary
from gpt import GPT, GPTConfig, save_checkpoint
from helpers import (END, V, draw_prompts, metrics, response_reward, tiny_gpt, tiny_reward_model)
from reward_model import RewardModel


def largest_change(model, other):
    return max((p - q).abs().max().item() for p, q in zip(model.parameters(), other.parameters()))


EDGES = {"a batch of one": dict(rollouts=1),
         "micro-batch and minibatch that do not fit": dict(minibatch=3, micro_batch=64),
         "all rewards equal": dict(reward=7.3),
         "one token in the whole batch": dict(rollouts=1, max_new_tokens=1)}


@pytest.mark.parametrize("case", EDGES.values(), ids=EDGES.keys())
def test_ppo_at_the_edges(case):
    """A standard deviation of nothing: whitening one token gives NaN, or blows rounding errors up
    to a step of full size; a variance of one number gives NaN in metrics.jsonl, which is no JSON.
    The longest prompt fills the context with its response."""
    settings = dict(iterations=1, rollouts=5, minibatch=4, micro_batch=3, epochs=2,
                    max_new_tokens=3, beta=0.3, missing_end_score=-4.0)
    settings.update(case)
    constant = settings.pop("reward", None)
    config = ppo.Config(**settings)
    policy = tiny_gpt(0, V, 8)
    reference = tiny_gpt(1, V, 8)
    value_model = tiny_reward_model(2, V, 8)

    def score(response):
        return random.Random(str(response)).gauss(0, 2) if constant is None else constant

    run = SilentRun(report=1)
    task = ppo.Task(draw_prompts, response_reward(score), END)
    ppo.ppo(policy, reference, value_model, task, config, run)
    moved = largest_change(policy, tiny_gpt(0, V, 8))
    assert moved < 1e-3 * config.lr if config.max_new_tokens == 1 else moved > 0.1 * config.lr
    assert largest_change(value_model, tiny_reward_model(2, V, 8)) > 0
    assert largest_change(reference, tiny_gpt(1, V, 8)) == 0
    json.dumps(run.rows, allow_nan=False)
    for model in (policy, value_model):
        assert all(parameter.isfinite().all() for parameter in model.parameters())


# --------------------------------------------------------------------------------------------------
# The stages on somebody's own file: very few prompts, prompts that are too long

CONTEXT = 48    # of the models below
NEW = 8         # the longest response
STAGES = {sft: "--batch 4", reward_model: "--batch 4", dpo: "--batch 4",
          ppo: "--iterations 2 --rollouts 3 --minibatch 2",
          best_of_n: "--samples 2 --policies ,"}    # the yardstick of the SFT model alone


@pytest.fixture
def untrained(tmp_path):
    """A folder with the checkpoints of three stages, of models that have not been trained; a
    character is a token."""
    tokenizer = Tokenizer(train_vocabulary("", 259))
    shape = GPTConfig(259, CONTEXT, n_layer=1, n_head=2, n_embd=16)
    torch.manual_seed(0)
    for stage, kind in (("gpt", GPT), ("sft", GPT), ("reward_model", RewardModel)):
        folder = tmp_path / "out/cpu" / stage
        folder.mkdir(parents=True)
        extra = {"text": "own.txt"} if stage == "gpt" else {}
        save_checkpoint(folder / "checkpoint.pt", stage, "cpu", kind(shape), tokenizer, **extra)
    return tmp_path / "out"


def run_stage(stage, untrained, prompts, chosen="So."):
    """Run a stage on rows with these prompts. Returns None if it ran, or the line in which it
    refused."""
    path = untrained.parent / "rows.jsonl"
    write_jsonl(path, [{"prompt": prompt, "chosen": chosen, "rejected": "No."}
                       for prompt in prompts])
    try:
        stage.main(["--size", "cpu", "--out", str(untrained), "--data", str(path),
                    "--max_new_tokens", str(NEW), *STAGES[stage].split()])
    except InputError as error:
        assert str(error).startswith(f"{path}: ")
        return str(error)
    assert metrics(untrained / "cpu" / stage.__name__ / "metrics.jsonl")


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
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


@pytest.mark.parametrize("stage, flags", [
    (sft, "--demonstrations 24 --questions 12 --batch 8"),
    (reward_model, "--pairs 8 --held_out 8 --batch 4"),
    (reward_model, "--process --batch 16"),
    (ppo, "--iterations 1 --rollouts 12 --minibatch 6 --ptx 0.1 --reward process"),
    (dpo, "--batch 16"),
    (dpo, "--batch 16 --loss kto"),
    (dpo, "--batch 8 --online 1 --pairs 16"),
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
