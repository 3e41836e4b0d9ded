"""What several test files share. No test file imports from another one."""

import json
import random

import torch

from data import stories
from data.files import write_jsonl
from gpt import GPT, GPTConfig
from reward_model import RewardModel

V = 5  # the world that can be enumerated: tokens 0 to 3 and <|end|>


def tiny_gpt(seed, vocab=V, block_size=32):
    """A random GPT of two layers."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab, block_size, n_layer=2, n_head=2, n_embd=32))


def tiny_reward_model(seed, vocab=V, block_size=32):
    """A RewardModel of two layers whose head isn't 0, as a fresh one's is."""
    torch.manual_seed(seed)
    model = RewardModel(GPTConfig(vocab, block_size, n_layer=2, n_head=2, n_embd=32))
    torch.nn.init.normal_(model.head.weight)
    return model


def noise(seed, *shape):
    """Normal draws that leave torch's own generator alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def metrics(path):
    """The rows of a metrics.jsonl; nan and infinity are no JSON."""
    def refuse(name):
        raise ValueError(f"{path} holds {name}")
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def untimed(rows):
    """Rows without what no seed fixes: seconds and memory."""
    return [{key: x for key, x in row.items() if key not in ("seconds", "memory_mb") and not key.endswith("_s")}
            for row in rows]


def snapshot(folder):
    """Every file below a folder: {path: its bytes}."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def short_demonstrations(path):
    """Write 600 demonstrations of half a sentence each: an SFT model learns to end its answers in a few steps."""
    rng, rows = random.Random(0), []
    for _ in range(600):
        request = stories.request(rng).text
        rows.append({"prompt": request, "completion": " ".join(stories.story(rng, request).text.split(" ")[:6])})
    write_jsonl(path, rows)
