"""What several test files share. No test file imports from another one."""

import itertools
import json
import math
import random

import pytest
import torch

import ppo
from data import stories
from data.files import write_jsonl
from dpo import response_logprobs
from gpt import GPT, GPTConfig, pad, response_mask, token_logprobs
from reward_model import RewardModel

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU draws otherwise, and has bf16's digits")
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


def ragged_mask(seed, B=5, T=12):
    """A response mask with prompts and responses of different lengths: (B, T-1), prompt lengths, lengths."""
    rng = random.Random(seed)
    prompts = [rng.randint(1, 4) for _ in range(B)]
    lengths = [prompt + rng.randint(1, T - prompt) for prompt in prompts]
    lengths[0] = T
    mask = response_mask(torch.tensor(prompts), torch.tensor(lengths), T)
    return mask, prompts, lengths


def experience(policy, value_model, seed=0):
    """An Experience of rows with very different response lengths, off the policy by a little noise."""
    rng = random.Random(seed)
    prompts, responses = [3, 1, 5, 2, 4, 1], [1, 14, 2, 9, 1, 20]
    tokens, lengths = pad([[rng.randrange(V) for _ in range(p + r)] for p, r in zip(prompts, responses)])
    mask = response_mask(torch.tensor(prompts), lengths, tokens.shape[1])
    with torch.no_grad():
        logprobs, values = token_logprobs(policy(tokens), tokens), value_model(tokens)[:, :-1]
    old_logprobs, old_values = logprobs + 0.3 * noise(1, *mask.shape), values + noise(2, *mask.shape)
    return ppo.Experience(tokens, lengths, mask, old_logprobs=old_logprobs, advantages=noise(3, *mask.shape),
                          old_values=old_values, returns=values + noise(4, *mask.shape),
                          ref_logprobs=logprobs + noise(5, *mask.shape),
                          old_distribution=noise(6, *mask.shape, V).log_softmax(dim=2))


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


# The world that can be listed, of test_enumerable.py and test_bug_museum.py.

END, PROMPT, LIMIT, BETA = 4, [1, 2], 3, 0.5
SHAPE = GPTConfig(vocab_size=5, block_size=5, n_layer=2, n_head=2, n_embd=32)
RESPONSES = [(*words, END) for n in range(LIMIT) for words in itertools.product(range(4), repeat=n)]
RESPONSES += list(itertools.product(range(4), repeat=LIMIT))  # these hit the limit without an end
ROWS = [PROMPT + list(response) for response in RESPONSES]
UNFINISHED = -1.0  # their reward: ppo.Config.missing_end_score


def make_model(cls, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(SHAPE)


def exact_logprobs(policy):
    """log π(y|x) of all 85 responses, in float64."""
    tokens, lengths = pad(ROWS)
    return response_logprobs(policy, tokens, torch.full_like(lengths, len(PROMPT)), lengths).double()


def draw_rewards(seed=0):
    rewards = torch.randn(len(ROWS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(torch.tensor([response[-1] == END for response in RESPONSES]), rewards, UNFINISHED)


def kl(logp, logq):
    return (logp.exp() * (logp - logq)).sum().item()


class TableReward:
    """A reward model that looks the reward up in the list."""

    def __init__(self, rewards):
        self.rewards = {tuple(row): reward for row, reward in zip(ROWS, rewards.tolist())}

    def score(self, tokens, lengths):
        return torch.tensor([self.rewards[tuple(row[:n])] for row, n in zip(tokens.tolist(), lengths.tolist())])


def enumerable_world():
    """(reference, its log-probabilities, rewards, log π*, J*)."""
    reference = make_model(GPT, seed=3)
    with torch.no_grad():
        reference.wte.weight *= 1.5  # sharpen it
        ref = exact_logprobs(reference)
    rewards = draw_rewards()
    log_z = (ref + rewards / BETA).logsumexp(0)
    return reference, ref, rewards, ref + rewards / BETA - log_z, BETA * log_z.item()


def copy_of(model):
    other = make_model(type(model), seed=0)
    other.load_state_dict(model.state_dict())
    return other


class Blocks(random.Random):
    """Shuffles blocks of `size` only: all copies of a pair come in one batch, whose labels then are as mixed as they should
    be. (Drawn one by one, labels are noise, and it takes ten times as many pairs to average it out.)"""

    def __init__(self, seed, size):
        super().__init__(seed)
        self.size = size

    def sample(self, population, k):
        blocks = [population[start:start + self.size] for start in range(0, k, self.size)]
        self.shuffle(blocks)
        return [i for block in blocks for i in block]


def all_pairs(rewards, copies):
    """Every pair of the first len(rewards) responses, as often either way as Bradley-Terry says, in whole numbers: `copies`
    of it in a row."""
    pairs, rest = [], 0.0
    for i, j in itertools.combinations(range(len(rewards)), 2):
        wins = copies * torch.sigmoid(rewards[i] - rewards[j]).item() + rest
        rest = wins - round(wins)  # what one pair's rounding loses, the next one gets
        pairs += [(ROWS[i], ROWS[j], len(PROMPT))] * round(wins)
        pairs += [(ROWS[j], ROWS[i], len(PROMPT))] * (copies - round(wins))
    assert len(pairs) == copies * math.comb(len(rewards), 2)
    return pairs
