"""How fast is it? The benchmarks: they print, train nothing that stays and save nothing.

    python -m tests.bench gpt [flags of gpt.py]     training and sampling, beside the machine's
                                                    matrix products and memory
    python -m tests.bench ppo [flags of ppo.py]     the seconds of a PPO iteration, its bound, and
                                                    how they grow
"""

import statistics
import sys
import time
from dataclasses import replace

import torch

import gpt
import ppo
from data.files import run_script
from data.run import SilentRun, announce, parse_config, peak_memory
from gpt import (GPT, GPTConfig, autocast, generate, get_device, make_optimizer, masked_logprobs,
                 optimizer_step)
from reward_model import RewardModel, make_reward


def forward_flops(config, tokens, context, places, outputs):
    """Floating-point operations of a forward pass: 2 for every weight and token, 4 C a layer for
    every token attended to.

    tokens: how many pass through the blocks, each seeing `context` tokens on average; places: how
    many of them pass through a head of so many outputs.
    """
    C = config.n_embd
    return tokens * config.n_layer * (24 * C * C + 4 * C * context) + places * 2 * C * outputs


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
    """Floating-point operations a second of a large matrix product, in the precision of autocast:
    the most there can be."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(n, n, dtype=dtype, device=device)
    return 10 * 2 * n ** 3 / median_seconds(lambda: [a @ a for _ in range(10)])


def memory_line():
    """The peak memory, in words."""
    memory = peak_memory()
    return f"peak memory {memory['memory_mb']:,.0f} MB" if memory else "peak memory unknown"


def shape_of(config):
    """The GPTConfig of gpt.py's flags."""
    return GPTConfig(config.vocab_size, config.block_size, config.n_layer, config.n_head,
                     config.n_embd)


def bench_gpt(config):
    """Print how fast this machine trains and samples, beside how fast it multiplies matrices and
    moves memory."""
    device = get_device()
    shape = shape_of(config)
    model = GPT(shape).to(device)
    optimizer = make_optimizer(model, config.weight_decay)
    announce("gpt", config, device, "random tokens; nothing is saved", model)
    rate = matrix_rate(device)
    block, copy = torch.ones(2, 2 ** 28 if device.type == "cuda" else 2 ** 25, device=device)
    bandwidth = 2 * 4 * len(block) / median_seconds(lambda: copy.copy_(block))  # read and written
    print(f"matrix product {rate / 1e9:,.0f} GFLOP/s, memory {bandwidth / 1e9:,.0f} GB/s")

    tokens = torch.randint(config.vocab_size, (config.batch, config.block_size), device=device)
    mask = torch.ones_like(tokens[:, 1:], dtype=torch.bool)

    def step():
        (-masked_logprobs(model, tokens, mask).mean()).backward()
        optimizer_step(optimizer, model, config.lr)

    seconds = median_seconds(step)
    flops = 3 * forward_flops(shape, tokens.numel(), config.block_size / 2, mask.numel(),
                              config.vocab_size)  # the backward pass costs twice the forward pass
    print(f"training       {config.batch} x {config.block_size} tokens a step: "
          f"{tokens.numel() / seconds:,.0f} tokens/s, "
          f"{flops / seconds / rate:.0%} of the matrix product's rate")

    prompt = config.block_size // 4
    new = config.block_size // 2
    parameters = sum(p.numel() for p in model.parameters())
    for rows in (64, 256):
        prompts = torch.randint(config.vocab_size, (rows, prompt)).tolist()
        with autocast(device):
            seconds = median_seconds(lambda: generate(model, prompts, new))
        flops = forward_flops(shape, rows * (prompt + new), (prompt + new) / 2, rows * new,
                              config.vocab_size)

        # Every step reads all weights, and the keys and values of the tokens before.
        size = 2 if device.type == "cuda" else 4
        cached = 2 * rows * config.n_layer * config.n_embd * (prompt + new / 2)
        bytes_read = new * (4 * parameters + size * cached)
        bounds = {"FLOP": flops / rate, "memory": bytes_read / bandwidth}
        kind = max(bounds, key=bounds.get)
        print(f"sampling       {rows} x ({prompt} + {new}) tokens: {rows * new / seconds:,.0f} "
              f"tokens/s, {bounds[kind] / seconds:.0%} of the {kind} bound")
    print(memory_line())


def bench_ppo(config):
    """Print the seconds of a PPO iteration, beside the least that its matrix products take, and how
    the cost grows."""
    shape = shape_of(parse_config(gpt.Config, gpt.GPU, ["--size", config.size], ""))
    device = get_device()
    prompt = shape.block_size // 4
    policy, reference = (GPT(shape).to(device) for _ in range(2))
    reward_model, value_model = (RewardModel(shape).to(device) for _ in range(2))
    announce("ppo", config, device, f"random prompts of {prompt} tokens; nothing is saved", policy)
    rate = matrix_rate(device)
    print(f"matrix product {rate / 1e9:,.0f} GFLOP/s\n"
          f"rollouts  response   rollout   scoring    update     total     bound    tokens/s")

    def draw_prompts(count, rng):
        return [rng.choices(range(shape.vocab_size), k=prompt) for _ in range(count)]

    # The end token -1 never comes: all responses have full length.
    reward = make_reward("reward_model", reward_model, None, config.micro_batch)
    task = ppo.Task(draw_prompts, reward, end_token=-1)

    n = config.rollouts
    longest = config.max_new_tokens
    few, half, quarter = (max(1, x) for x in (n // 4, longest // 2, longest // 4))
    for rollouts, response in ((few, half), (n, half), (4 * n, half), (n, quarter), (n, longest)):
        one = replace(config, rollouts=rollouts, max_new_tokens=response, iterations=4)
        run = SilentRun(report=1)
        ppo.ppo(policy, reference, value_model, task, one, run)
        parts = [statistics.median(row[name] for row in run.rows[1:])
                 for name in ("rollout_s", "scoring_s", "update_s")]
        total = sum(parts)

        # Sampling, four scoring passes, and in each epoch a forward and a backward pass (twice its
        # cost) of two models.
        emitted = rollouts * response
        passing = (shape, rollouts * (prompt + response), (prompt + response) / 2, emitted)
        language = forward_flops(*passing, shape.vocab_size)
        scalar = forward_flops(*passing, 1)
        bound = language + 2 * language + 2 * scalar + config.epochs * 3 * (language + scalar)
        seconds = "".join(f"{x:10.2f}" for x in (*parts, total, bound / rate))
        print(f"{rollouts:8d}{response:10d}{seconds}{emitted / total:12,.0f}")
    megabytes = (4 + 4 + 1 + 1) * 4 * sum(p.numel() for p in policy.parameters()) / 2 ** 20
    print(f"{memory_line()}, of which weights, gradients and AdamW's moments of the four models "
          f"{megabytes:,.0f} MB")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["gpt"]:
        bench_gpt(parse_config(gpt.Config, gpt.GPU, argv[1:], "Benchmark training and sampling."))
    elif argv[:1] == ["ppo"]:
        bench_ppo(parse_config(ppo.Config, ppo.GPU, argv[1:], "Benchmark a PPO iteration."))
    else:
        sys.exit("bench: say gpt or ppo, and flags of that script after it")


if __name__ == "__main__":
    run_script(main)
