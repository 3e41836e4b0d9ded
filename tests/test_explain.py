"""--explain of gpt.py, sft.py and reward_model.py: its numbers are those that train."""

import random
import shutil

import pytest
import torch
import torch.nn.functional as F

import dpo
import gpt
import ppo
import reward_model
import sft
from data.annotator import mark, rubric
from data.corpus import encode_documents, held_out_documents
from data.files import InputError, hold_out, read_comparisons, read_demonstrations
from data.tokenizer import encode_demonstrations
from helpers import explained, snapshot


@pytest.fixture(scope="module")
def trained(stages, tmp_path_factory):
    """A folder with all three stages and a process model."""
    out = shutil.copytree(stages, tmp_path_factory.mktemp("explained") / "out")
    reward_model.main(["--out", str(out), "--size", "cpu", "--process", "--batch", "16"])
    return out


def load(out, stage, cls=gpt.GPT):
    return gpt.load_checkpoint(out / f"cpu/{stage}/checkpoint.pt", stage, "cpu", model_class=cls)


@torch.no_grad()
def test_a_document_beside_its_source(trained, monkeypatch, capsys):
    """A row beside the prediction of the next token or the last one; a probability of the text
    without its <|end|> beside that of the source, which has it, or one for the first words only."""
    (table,), _ = explained(gpt, trained, monkeypatch, "--explain")
    model, tokenizer, _ = load(trained, "gpt")
    document = random.Random("document 1").choice(held_out_documents())
    ids, = encode_documents([document], tokenizer)
    assert table["x_t"] == tokenizer.shown(ids)
    for t in (1, len(ids) // 2, len(ids) - 1):
        logprobs = model(torch.tensor([ids[:t]]))[0, -1].log_softmax(0)  # from the prefix alone
        assert table["log p_θ"][t] == pytest.approx(logprobs[ids[t]].item(), abs=1e-5)
        assert table["rank"][t] == 1 + (logprobs > logprobs[ids[t]]).sum()
        entropy = torch.distributions.Categorical(logits=logprobs).entropy().item()
        assert table["entropy"][t] == pytest.approx(entropy, abs=1e-5)
        second = logprobs.sort(descending=True).indices[1].item()
        shown, = tokenizer.shown([second])
        assert table["second"][t] == f"{logprobs[second].exp():.3f} {shown}"
    printed = capsys.readouterr().out
    loss = gpt.held_out_loss(model, [ids], 1)
    assert f" nats over {len(ids) - 1} tokens, {loss:.4f} a token\n" in printed
    assert f"-log p(x)  = {-document.logprob:.3f} nats, the source's own, " in printed

    (table,), _ = explained(gpt, trained, monkeypatch, "--explain", "Once there")
    assert table["x_t"] == ["<|end|>", "Once", "·there", "(next)"]


def test_a_demonstrations_mask(out, monkeypatch, capsys):
    """The mask off by one: <|assistant|> is trained, or <|end|> isn't; the base model's figures
    under SFT's name; another divisor than the one that trained; a demonstration of another file."""
    path = out / "demonstrations.jsonl"
    rows, held_out = hold_out(read_demonstrations(path), path)
    (table,), _ = explained(sft, out, monkeypatch, "--explain")
    policy, tokenizer, checkpoint = load(out, "sft")
    demonstrations, _ = encode_demonstrations(held_out, tokenizer, 128)
    ids, start = random.Random("demonstration 1").choice(demonstrations)
    assert table["token"] == tokenizer.shown(ids[1:])
    assert table["mask"] == [0] * (start - 1) + [1] * (len(ids) - start)
    for name, model in (("-log π before", load(out, "gpt")[0]), ("after", policy)):
        mean = gpt.held_out_loss(model, [ids], start)
        total = sum(table[name][start - 1:])
        assert total == pytest.approx(mean * (len(ids) - start), rel=1e-5)

    tokens = sum(len(tokenizer.response(row["completion"])) for row in rows)
    assert "In training 16 such sums" in capsys.readouterr().out
    assert checkpoint["tokens_per_batch"] == tokens / -(-len(rows) // 16)


def test_a_pair_beside_the_rubric(trained, monkeypatch):
    """r_φ one token beside the sentence's end; the rejected response in the place of the chosen."""
    (*tables, parts), _ = explained(reward_model, trained, monkeypatch, "--explain")
    model, tokenizer, _ = load(trained, "reward_model", reward_model.RewardModel)
    rng = random.Random("pair 1")
    row = rng.choice(read_comparisons(trained / "cpu/reward_model")[1])
    prompt = tokenizer.prompt(row["prompt"])
    for kind, table in zip(("chosen", "rejected"), tables):
        prefix = prompt + tokenizer.encode(table[kind][0])  # up to the first sentence
        whole = prompt + tokenizer.response(row[kind])
        first, last = reward_model.score_all(model, [prefix, whole]).tolist()
        assert (table["r_φ"][0], table["r_φ"][-1]) == pytest.approx((first, last), abs=1e-5)
        true = rubric(row["prompt"], row[kind])
        expected = [*true.values(), sum(true.values()), last]
        assert parts[kind] == pytest.approx(expected, abs=1e-5)
        assert (table[kind][-1], table["gold"][-1]) == ("<|end|>", parts[kind][5])

    tables, _ = explained(reward_model, trained, monkeypatch, "--explain", "--process")
    model, tokenizer, _ = load(trained, "process_model", reward_model.RewardModel)
    marked = mark([row], tokenizer, rng)
    with torch.no_grad():
        r, good = reward_model.rewards_at_steps(model, marked)
    found = {name: tables[0][name] + tables[1][name] for name in ("r_φ", "-log P", "Δgold")}
    assert found["r_φ"] == pytest.approx(r.tolist(), abs=1e-5)
    loss = F.binary_cross_entropy_with_logits(r, good).item()
    assert sum(found["-log P"]) / len(good) == pytest.approx(loss, abs=1e-5)
    assert found["Δgold"] == marked[0].steps + marked[1].steps


@pytest.mark.parametrize("script, flags, words", [
    (ppo, "--explain --lr 1", "--lr 1.0: cannot be used with --explain"),
    (dpo, "--explain", "dpo/checkpoint.pt: no such checkpoint")], ids=str)
def test_what_cannot_be_explained(script, flags, words, trained):
    """--explain trained a missing stage, ignored a flag, or left a file."""
    before = snapshot(trained)
    with pytest.raises(InputError, match=words):
        script.main(["--out", str(trained), "--size", "cpu", *flags.split()])
    assert snapshot(trained) == before
