"""Supervised fine-tuning: the masked token mean, the <|end|> token, demonstrations, and the whole
stage."""

import math
import random

import pytest
import torch

import gpt
import sft
from data.corpus import draw_demonstrations
from data.files import InputError, write_jsonl
from data.run import SilentRun, write_torch
from data.tokenizer import Demonstration, encode_demonstrations
from helpers import metrics, snapshot, tiny_gpt, token_losses

V = 11
DEMONSTRATIONS = [("Name a color.", "Red."),
                  ("Name an animal, please.", "The little otter by the river.")]


def random_demonstrations(seed=0):
    """Seven Demonstrations whose responses have 1 to 40 tokens, 70 in all; the shortest come first,
    as in a batch that holds them all."""
    rng = random.Random(seed)
    demonstrations = []
    for prompt, response in [(2, 1), (3, 1), (1, 6), (9, 2), (5, 17), (20, 3), (1, 40)]:
        ids = [rng.randrange(V) for _ in range(prompt + response)]
        demonstrations.append(Demonstration(ids, prompt))
    return demonstrations


@pytest.mark.parametrize("batch, micro_batch, epochs", [(7, 3, 1), (3, 2, 3)])
def test_every_response_token_counts_equally(batch, micro_batch, epochs, monkeypatch):
    """A mean of micro-batches' or batches' means weighs a token of a short answer more (Hugging
    Face's Trainer until October 2024); a model whose <|end|> is masked out never learns to stop
    (TRL #1623, #3091). Here nothing is learnt: the gradients of all steps add up."""
    monkeypatch.setattr(sft, "optimizer_step", lambda optimizer, model, lr: 0.0)
    model = tiny_gpt(0, V, 64)
    twin = tiny_gpt(0, V, 64)
    run = SilentRun()
    config = sft.Config(batch=batch, micro_batch=micro_batch, epochs=epochs)
    sft.fine_tune(model, random_demonstrations(), [], None, config, random.Random(1), run)
    oracle = token_losses(twin, *zip(*random_demonstrations())).mean()
    oracle.backward()
    assert run.rows[0]["loss"] == pytest.approx(oracle.item(), rel=1e-5)
    steps = math.ceil(7 / batch) * epochs  # the last batch is smaller
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad / steps, theirs.grad, atol=1e-5, rtol=1e-4)


def test_rates_and_figures_of_fine_tuning(monkeypatch):
    """A learning rate that never moves; a last step that is never reported; held-out figures of
    another model, or a mean of batch means; prompts, padding or a column beside that count."""
    rates = []
    step = sft.optimizer_step

    def watched_step(optimizer, model, lr):
        rates.append(lr)
        return step(optimizer, model, lr)

    monkeypatch.setattr(sft, "optimizer_step", watched_step)
    model = tiny_gpt(0, V, 64)
    held_out = random_demonstrations(1)[2:]
    config = sft.Config(epochs=3, batch=2, micro_batch=2, lr=1e-2, warmup=2)
    run = SilentRun(report=5)
    sft.fine_tune(model, random_demonstrations(), held_out, 0.5, config, random.Random(5), run)
    assert rates == [gpt.learning_rate(i, 12, 1e-2, 2) for i in range(12)]
    assert [row["step"] for row in run.rows] == [5, 10, 12]
    last = run.rows[-1]
    assert last["held_out"] == pytest.approx(token_losses(model, *zip(*held_out)).mean().item())
    assert last["entropy"] == 0.5 and last["excess"] == pytest.approx(last["held_out"] / 0.5 - 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny base model of a text about colors."""
    folder = tmp_path_factory.mktemp("base")
    text = "\n".join(prompt + " " + answer for prompt, answer in DEMONSTRATIONS) + "\n"
    (folder / "corpus.txt").write_text(text * 60)
    flags = ("--size cpu --n_layer 1 --n_head 2 --n_embd 32 --batch 8 --vocab_size 290 "
             "--block_size 64 --steps 10 --report 10 --name gpt-colors")
    gpt.main([*flags.split(), "--out", str(folder), "--text", str(folder / "corpus.txt")])
    return folder


def fine_tune(folder, *flags):
    common = "--size cpu --base gpt-colors --max_new_tokens 30 --batch 4".split()
    sft.main([*common, "--out", str(folder), *flags])


def test_fine_tuning_on_your_own_file(base, tmp_path, capsys):
    """A file of demonstrations that trains nothing, is trained on in full without anything held
    out, or not to the end; a model that does not stop after its answer. A prompt that fits, but
    leaves no room for the longest sample."""
    rows = []
    for prompt, answer in DEMONSTRATIONS:
        rows += [{"prompt": f"{prompt} {i}", "completion": answer} for i in range(10)]
    longer = {"prompt": "Name a color. 0", "completion": "red " * 100}  # than the context
    write_jsonl(tmp_path / "rows.jsonl", [*rows, longer])
    data = ["--data", str(tmp_path / "rows.jsonl")]
    fine_tune(base, *data, *"--micro_batch 3 --epochs 8 --lr 0.01 --report 10".split())
    assert "dropped 1 longer than the context" in capsys.readouterr().out
    log = metrics(base / "cpu/sft/metrics.jsonl")
    assert log[-1]["held_out"] < 0.5 * log[0]["held_out"]
    assert log[-1]["step"] == 8 * 5  # 20 prompts, 2 held out: 18 rows that fit, 4 in a step
    model, tokenizer, _ = gpt.load_checkpoint(base / "cpu/sft/checkpoint.pt", "sft", "cpu")
    prompts = [tokenizer.prompt("Name a color. 3")] * 9
    texts, ended = gpt.respond(model, tokenizer, prompts, 30, seed=1)
    assert all(ended) and texts.count("Red.") >= 5

    rows = [{"prompt": "z" * 50 + letter, "completion": "Red."} for letter in "abcdefgh"]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    fine_tune(base, *data)
    assert "7 demonstrations, 1 held out; dropped 0 longer" in capsys.readouterr().out


def test_what_is_refused_costs_nothing(base):
    """The world's stories in a vocabulary that was made for another text, all of them cut; a base
    model after mid-training on another one that is gone; the world's requests, put to a model of
    somebody's own text."""
    stale = base / "cpu/gpt-curated/checkpoint.pt"
    stale.parent.mkdir()
    write_torch(stale, {"made_from": {"gpt-colors/checkpoint.pt": 1}})
    before = snapshot(base)
    with pytest.raises(InputError, match="too short for the little world"):
        fine_tune(base, "--demonstrations", "4")
    with pytest.raises(InputError, match="gpt-colors/checkpoint.pt; train .* again"):
        fine_tune(base, "--base", "gpt-curated")
    assert snapshot(base) == before
    with pytest.raises(InputError, match=f"^{base}: comes from mine.txt, .* --data"):
        sft.refuse_own_text(base, {"own_text": "mine.txt"})


def test_the_world_and_its_learning_curve(out, monkeypatch, capsys):
    """An entropy over other tokens than the loss's; figures in the log that aren't those of the
    saved model. Points of a curve that go on from one another, or whose last one is not the stage's
    own model, or costs its checkpoint; a share of no answers: 0/0; a --resume for nothing."""
    world = ("--base gpt --demonstrations 24 --questions 3 --lr 0.01 --warmup 1 "
             "--max_new_tokens 90").split()
    fine_tune(out, *world)
    *_, last, told = metrics(out / "cpu/sft/metrics.jsonl")
    model, tokenizer, _ = gpt.load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
    rng = random.Random("held-out demonstrations")
    rows, logprobs = draw_demonstrations(rng, 500, held_out=True)
    held_out, _ = encode_demonstrations(rows, tokenizer, 128)
    count = sum(len(ids) - prompt_length for ids, prompt_length in held_out)
    assert last["entropy"] == pytest.approx(-sum(logprobs) / count)
    assert last["excess"] == pytest.approx(last["held_out"] / last["entropy"] - 1)
    with torch.no_grad():
        estimate = token_losses(model, *zip(*held_out[:40])).mean().item()
    assert last["held_out"] == pytest.approx(estimate, rel=0.05)

    before = snapshot(out)
    capsys.readouterr()
    monkeypatch.setattr(sft, "doublings", lambda first, total: [8, total])
    fine_tune(out, *world, "--learning_curve")
    *_, first, second = capsys.readouterr().out.splitlines()
    figure = f"{last['held_out']:.3f}"
    assert first.split()[0] == "8" and first.split()[1] != figure
    assert second.split()[:3] == ["24", figure, f"{last['excess']:.1%}"]
    assert f"  {100 * told['answers']:.1f} ± " in second
    for flag, error in (("--resume", "cannot be used"), ("--max_new_tokens 126", "leaves room")):
        with pytest.raises(InputError, match=error):
            fine_tune(out, *world, "--learning_curve", *flag.split())
    assert snapshot(out) == before
