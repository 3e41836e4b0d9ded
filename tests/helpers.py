"""What several test files share. No test file imports from another one."""

import itertools
import json
import random
import typing
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import ppo
from data import stories
from data.files import write_jsonl
from data.run import SilentRun
from data.tokenizer import Pair
from gpt import GPT, GPTConfig, pad, response_logprobs, response_mask, token_logprobs
from reward_model import RewardModel

cpu_only = pytest.mark.skipif(torch.cuda.is_available(),
                              reason="a GPU draws otherwise, and has bf16's digits")
V = 5  # the world that can be enumerated: tokens 0 to 3 and <|end|>
METHODS = typing.get_args(ppo.Config.__annotations__["method"])
PROMPTS = [[2, 0], [1], [3, 3, 0, 1, 2], [0, 1, 2]]


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
    """(mask (B, T-1), prompt lengths, lengths) of prompts and responses of different lengths."""
    rng = random.Random(seed)
    prompts = [rng.randint(1, 4) for _ in range(B)]
    lengths = [prompt + rng.randint(1, T - prompt) for prompt in prompts]
    lengths[0] = T
    return response_mask(torch.tensor(prompts), torch.tensor(lengths), T), prompts, lengths


def made_up_rollouts(policy, value_model):
    """Rollouts of very different lengths, a little off the policy, without advantages as yet."""
    rng = random.Random(0)
    prompts = [3, 1, 5, 2, 4, 1]
    responses = [1, 14, 2, 9, 1, 20]
    rows = [[rng.randrange(V) for _ in range(p + r)] for p, r in zip(prompts, responses)]
    tokens, lengths = pad(rows)
    mask = response_mask(torch.tensor(prompts), lengths, tokens.shape[1])
    with torch.no_grad():
        logprobs = token_logprobs(policy(tokens), tokens)
        values = value_model(tokens)[:, :-1]

    def inside(x):
        return torch.where(mask, x, 0.0)

    return ppo.Rollouts(
        tokens, lengths, mask, ended=torch.ones(6, dtype=torch.bool), scores=noise(6, 6),
        token_rewards=inside(noise(3, *mask.shape)),
        old_logprobs=inside(logprobs + 0.3 * noise(1, *mask.shape)),
        ref_logprobs=inside(logprobs + noise(5, *mask.shape)),
        old_values=inside(values + noise(2, *mask.shape)))


def token_losses(model, sequences, prompt_lengths):
    """-log π(y_t | x, y_<t) of all response tokens, one sequence at a time, by cross_entropy."""
    losses = []
    for ids, prompt_length in zip(sequences, prompt_lengths):
        logits = model(torch.tensor([ids]))[0, prompt_length - 1:-1]
        labels = torch.tensor(ids[prompt_length:])
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
    return torch.cat(losses)


def draw_prompts(count, rng):
    """PROMPTS, as ppo.Task draws them."""
    return rng.choices(PROMPTS, k=count)


def bare_rollouts(mask):
    """Rollouts of which only the mask is known."""
    return ppo.Rollouts(**{**dict.fromkeys(ppo.Rollouts._fields), "mask": mask})


def optimize(policy, reference, value_model, task, config):
    """Run the loop of config.method. Returns a row of figures for every iteration."""
    run = SilentRun(report=1)
    if config.method == "ppo":
        ppo.ppo(policy, reference, value_model, task, config, run)
    else:
        value_model = value_model if config.method in ppo.WITH_VALUES else None
        ppo.policy_gradients(policy, reference, value_model, task, config, run)
    return run.rows


def first_step(monkeypatch, policy, value_model, rollouts, config, rows):
    """What the loop of config.method takes its first step with, on these rows of made-up Rollouts:
    ({model: its gradients}, a row of figures). No model is changed."""
    gradients = {}

    def record(optimizer, model, lr):
        gradients[model] = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "sample", lambda *arguments: rollouts)
        patch.setattr(ppo, "minibatches", lambda *arguments: [torch.tensor(rows)])
        patch.setattr(ppo, "optimizer_step", record)
        figures, = optimize(policy, None, value_model, ppo.Task(draw_prompts, None, END), config)
    return gradients, figures


def response_reward(score):
    """A reward by hand, as ppo.Task takes it: score(ids of a response) -> number."""
    def reward(rollout):
        scores = torch.tensor([float(score(response)) for response in rollout.responses()])
        return scores, torch.zeros(rollout.tokens[:, 1:].shape)
    return reward


def metrics(path):
    """The rows of a metrics.jsonl; nan and infinity are no JSON."""
    def refuse(name):
        raise ValueError(f"{path} holds {name}")
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def untimed(rows):
    """Rows without what no seed fixes: seconds and memory."""
    kept = []
    for row in rows:
        kept.append({name: x for name, x in row.items()
                     if name not in ("seconds", "memory_mb") and not name.endswith("_s")})
    return kept


def snapshot(folder):
    """Every file below a folder: {path: its bytes}."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def short_demonstrations(path):
    """Write 600 demonstrations of half a sentence each: SFT soon learns to end its answers."""
    rng = random.Random(0)
    rows = []
    for _ in range(600):
        request = stories.request(rng).text
        words = stories.story(rng, request).text.split(" ")
        rows.append({"prompt": request, "completion": " ".join(words[:6])})
    write_jsonl(path, rows)


# Sentences of the little world, of test_annotator.py and test_judges.py.

ASKED = "Tell me a story about a shy fox and a kite."
OPENING = "Once there was a shy fox who lived by the river. Suddenly her red kite was gone."
KIND = ["She stopped to comfort a crying child.",
        "She sang softly until Aunt Lily felt better.",
        "On the way she freed a butterfly from a web.",
        "The fox mended a broken fence for Aunt Lily."]
UNKIND = ["She pulled the tail of a sleeping calf.", "She broke a promise to Aunt Lily."]
HAPPY = "At last she found the kite and danced for joy."
SAD = "But she never found the kite."


def story_of(*sentences):
    """A story with these sentences behind its opening and its wish."""
    return " ".join([OPENING, *sentences])


# The world that can be listed, of test_enumerable.py and test_bug_museum.py.

END = 4
PROMPT = [1, 2]
LIMIT = 3   # tokens in the longest response
BETA = 0.7
SHAPE = GPTConfig(vocab_size=5, block_size=5, n_layer=1, n_head=2, n_embd=24)
ENDED = [(*words, END) for n in range(LIMIT) for words in itertools.product(range(4), repeat=n)]
RESPONSES = ENDED + list(itertools.product(range(4), repeat=LIMIT))  # the rest has no end
ROWS = [PROMPT + list(response) for response in RESPONSES]
UNFINISHED = -1.0  # their reward: ppo.Config.missing_end_score


def make_model(cls, seed, **shape):
    """A random model of this world."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(replace(SHAPE, **shape))


def world_config(**flags):
    """Settings of ppo.py with which right code ends at the optimum here."""
    settings = dict(beta=BETA, iterations=20, rollouts=512, epochs=1, minibatch=128,
                    micro_batch=512, lr=5e-3, value_lr=1.6e-2, lam=0.95, max_new_tokens=LIMIT,
                    missing_end_score=UNFINISHED)
    return ppo.Config(**{**settings, **flags})


@torch.no_grad()
def exact_logprobs(policy):
    """log π(y|x) of all 85 responses, in float64."""
    tokens, lengths = pad(ROWS)
    prompt_lengths = torch.full_like(lengths, len(PROMPT))
    return response_logprobs(policy, tokens, prompt_lengths, lengths).double()


def kl(logp, logq):
    return (logp.exp() * (logp - logq)).sum().item()


def table_reward(rewards):
    """A reward that is looked up in the list of all responses."""
    table = dict(zip(RESPONSES, rewards.tolist()))
    return response_reward(lambda response: table[tuple(response)])


def world_task(reward, end_token=END, draw_documents=None):
    """What ppo.py's loops are asked in this world: the one prompt, again and again."""
    return ppo.Task(lambda count, rng: [PROMPT] * count, reward, end_token,
                    draw_documents=draw_documents)


def enumerable_world():
    """(reference, its log-probabilities, rewards, log π*, J*)."""
    reference = make_model(GPT, seed=8)
    ref = exact_logprobs(reference)
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(len(ROWS), generator=generator, dtype=torch.float64)
    rewards[len(ENDED):] = UNFINISHED
    log_z = (ref + rewards / BETA).logsumexp(0)
    return reference, ref, rewards, ref + rewards / BETA - log_z, BETA * log_z.item()


class Blocks(random.Random):
    """Shuffles blocks of `size` only: all copies of a pair come in one batch, whose labels then are
    as mixed as they should be. (Drawn one by one, labels are noise, and it takes ten times as many
    pairs to average it out.)"""

    def __init__(self, seed, size):
        super().__init__(seed)
        self.size = size

    def sample(self, population, k):
        blocks = [population[start:start + self.size] for start in range(0, k, self.size)]
        self.shuffle(blocks)
        return [i for block in blocks for i in block]


def all_pairs(rewards, copies):
    """Every pair of the first len(rewards) responses, as often either way as Bradley-Terry says, in
    whole numbers: `copies` of it in a row."""
    rows = [torch.tensor(row) for row in ROWS]  # padded faster than lists
    pairs = []
    rest = 0.0
    for i, j in itertools.combinations(range(len(rewards)), 2):
        wins = copies * torch.sigmoid(rewards[i] - rewards[j]).item() + rest
        rest = wins - round(wins)  # what one pair's rounding loses, the next one gets
        pairs += [Pair(rows[i], rows[j], len(PROMPT))] * round(wins)
        pairs += [Pair(rows[j], rows[i], len(PROMPT))] * (copies - round(wins))
    return pairs


# --explain, of test_explain.py, test_explain_ppo.py and test_explain_policies.py.


def explained(script, out, monkeypatch, *flags):
    """What a script prints by print_columns: its tables, [{name: column}], a repeated name with "'"
    behind it; and the lines below them."""
    tables = []
    lines = []

    def keep_columns(columns, legend=()):
        assert len({len(column.values) for column in columns}) == 1
        tables.append({})
        for column in columns:
            name = column.name + "'" * (column.name in tables[-1])
            tables[-1][name] = column.values
        lines.extend(legend)

    with monkeypatch.context() as patch:
        patch.setattr(script, "print_columns", keep_columns)
        script.main(["--out", str(out), "--size", "cpu", *flags])
    return tables, lines
