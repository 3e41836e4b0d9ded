"""What an answer and a training cost: best-of-N beside one answer of PPO's policy (CME 295), and
PPO, with the reward model that it needs, beside DPO (CS 224R, Lecture 9, ch. 9; notes, 4.4.2).

    python -m assets.claims.cost --out OUT          after ppo.py and dpo.py, on one machine
"""

import inspect
import json
import random
import re
import time
from pathlib import Path

import torch

import dpo
import ppo
from data.corpus import draw_requests
from data.files import InputError, run_script, write_jsonl
from data.run import Parser, positive
from data.table import Column, print_columns
from gpt import generate, get_device, load_checkpoint
from reward_model import RewardModel, bradley_terry_loss, fit
from sft import refuse_own_text

# What a reader of the algorithm reads: the loop, and what it calls that is its own.
LOOPS = {
    "ppo": (ppo.ppo, ppo.sample, ppo.minibatches, ppo.shaped_rewards, ppo.gae, ppo.whiten,
            ppo.masked_mean, ppo.clipped_policy_loss, ppo.clipped_value_loss),
    "reward_model": (fit, RewardModel, bradley_terry_loss),
    "dpo": (dpo.dpo, dpo.pair_batches, dpo.pair_logprobs, dpo.dpo_loss),
}


def code_lines(functions):
    """Lines of code of functions, without docstrings, comments and blank lines."""
    count = 0
    for function in functions:
        source = inspect.getsource(function)
        source = re.sub(r'""".*?"""', "", source, flags=re.DOTALL)
        for line in source.splitlines():
            text = line.strip()
            count += bool(text) and not text.startswith("#")
    return count


def settings_of(functions):
    """The settings that functions read: config.NAME in their source, without those of memory, of
    the model's shape and of the methods behind the lecture's."""
    names = set()
    for function in functions:
        names |= set(re.findall(r"config\.(\w+)", inspect.getsource(function)))
    return sorted(names - {"micro_batch", "sample_batch", "seed", "kl_target", "ptx", "n_embd"})


@torch.inference_mode()
def seconds_an_answer(policy, reward_model, prompt, tokenizer, n, batched, repeats):
    """(seconds, tokens sampled) of one answer, the best of n (n = 1: the answer itself); the
    median of `repeats`."""
    measured = []
    tokens = 0
    for repeat in range(repeats):
        start = time.perf_counter()
        rollouts = []
        if batched:
            rollouts.append(generate(policy, [prompt] * n, 96, tokenizer.end_token, seed=repeat))
        else:
            for i in range(n):
                seed = n * repeat + i
                rollouts.append(generate(policy, [prompt], 96, tokenizer.end_token, seed=seed))
        for rollout in rollouts:
            if n > 1:
                reward_model.score(rollout.tokens, rollout.lengths).max()
        measured.append(time.perf_counter() - start)
        lengths = [rollout.lengths - rollout.prompt_lengths for rollout in rollouts]
        tokens += int(torch.cat(lengths).sum())
    return sorted(measured)[repeats // 2], tokens / repeats


def training_row(folder, name):
    """What a finished run says of itself, and how much of code and settings it takes. seconds: of
    its loop, from the steps after the first figures; what came before it is not counted."""
    path = folder / name / "metrics.jsonl"
    if not path.exists():
        raise InputError(f"{path}: no such file; run python {name}.py first")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    timed = [row for row in rows if "seconds" in row]
    if len(timed) < 2:
        raise InputError(f"{path}: too short a run to time a step; train for more of them")
    first, last = timed[0], timed[-1]
    a_step = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
    settings = settings_of(LOOPS[name])
    return {"what": name, "seconds": a_step * last["step"], "memory_mb": last["memory_mb"],
            "lines": code_lines(LOOPS[name]), "settings": len(settings), "names": settings}


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="out", help="the folder of the finished stages")
    parser.add_argument("--size", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--repeats", type=positive, default=5)
    arguments = parser.parse_args(argv)
    folder = Path(arguments.out) / arguments.size
    device = get_device()
    path = folder / "sft/checkpoint.pt"
    sft, tokenizer, checkpoint = load_checkpoint(path, "sft", arguments.size, device)
    refuse_own_text(path, checkpoint)
    policy, _, _ = load_checkpoint(folder / "ppo/checkpoint.pt", "ppo", arguments.size, device)
    reward_model, _, _ = load_checkpoint(folder / "reward_model/checkpoint.pt", "reward_model",
                                         arguments.size, device, RewardModel)
    [request] = draw_requests(1, random.Random("cost"), held_out=True)
    prompt = tokenizer.prompt(request)

    found = []
    for name, model, n in (("PPO, one answer", policy, 1), ("SFT, one answer", sft, 1),
                           ("best of 4", sft, 4), ("best of 16", sft, 16), ("best of 64", sft, 64)):
        row = {"what": name}
        for way, batched in (("one_at_a_time", False), ("batched", True)):
            seconds, tokens = seconds_an_answer(model, reward_model, prompt, tokenizer, n, batched,
                                                arguments.repeats)
            row[way] = seconds
            row["tokens"] = tokens
        found.append(row)
    print_columns(
        [Column("an answer", [row["what"] for row in found]),
         Column("tokens", [row["tokens"] for row in found], ".0f"),
         Column("s, one at a time", [row["one_at_a_time"] for row in found], ".3f"),
         Column("s, in one batch", [row["batched"] for row in found], ".3f")],
        [f"to the request {request!r}; median of {arguments.repeats}, with the reward model's "
         "scores where N > 1."])

    rows = [training_row(folder, name) for name in LOOPS]
    print()
    print_columns(
        [Column("training", [row["what"] for row in rows]),
         Column("seconds", [row["seconds"] for row in rows], ".0f"),
         Column("MB, peak", [row["memory_mb"] for row in rows], ".0f"),
         Column("lines", [row["lines"] for row in rows], "d"),
         Column("settings", [row["settings"] for row in rows], "d")],
        ["seconds: of the loop; the comparisons, which DPO reads too, were collected before.",
         "MB: of the process.",
         "lines: of code, of the loop and of what is called there and is the algorithm's own.",
         *[f"settings of {row['what']}: {', '.join(row['names'])}" for row in rows]])
    folder = folder / "claim-cost"
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "metrics.jsonl", found + rows)


if __name__ == "__main__":
    run_script(main)
