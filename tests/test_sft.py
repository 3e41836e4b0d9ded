"""Supervised fine-tuning: the masked token mean, the <|end|> token, demonstrations, and the whole
stage."""

import json
import math
import random

import pytest
import torch
import torch.nn.functional as F

import gpt
import sft
from data import stories
from data.annotator import answers
from data.corpus import draw_demonstrations
from data.files import InputError, hold_out
from data.run import SilentRun
from data.tokenizer import (Demonstration, Tokenizer, encode_demonstrations,
                            train as train_vocabulary)
from helpers import cpu_only, metrics, snapshot, tiny_gpt, untimed

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


def gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.fixture(scope="module")
def tokenizer():
    text = " ".join(prompt + " " + answer for prompt, answer in DEMONSTRATIONS)
    return Tokenizer(train_vocabulary(text, 290))


@pytest.fixture
def no_steps(monkeypatch):
    """Training then moves no weight. A list of the gradients, one a step."""
    steps = []

    def keep(optimizer, model, lr):
        steps.append(gradients(model))
        optimizer.zero_grad()
        return 0.0

    monkeypatch.setattr(sft, "optimizer_step", keep)
    return steps


def token_losses(model, demonstrations):
    """-log π(y_t | x, y_<t) of all response tokens, one sequence at a time: cross_entropy, no
    padding."""
    logits = []
    labels = []
    for ids, prompt_length in demonstrations:
        logits.append(model(torch.tensor([ids]))[0, prompt_length - 1:-1])
        labels.append(torch.tensor(ids[prompt_length:]))
    return F.cross_entropy(torch.cat(logits), torch.cat(labels), reduction="none")


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 7, 64])
def test_micro_batches_give_the_gradient_of_the_token_mean(micro_batch, no_steps):
    """A mean of the micro-batches' means weighs a token of a short answer more: the bug of gradient
    accumulation that Hugging Face's Trainer had until October 2024. The oracle is cross_entropy
    over all response tokens at once. A micro-batch that clears the gradient of the one before."""
    demonstrations = random_demonstrations()
    model = tiny_gpt(0, V, 64)
    twin = tiny_gpt(0, V, 64)
    run = SilentRun()
    config = sft.Config(batch=7, micro_batch=micro_batch)
    sft.fine_tune(model, demonstrations, [], None, config, random.Random(1), run)
    oracle = token_losses(twin, demonstrations).mean()
    oracle.backward()
    assert run.rows[0]["loss"] == pytest.approx(oracle.item(), rel=1e-5)
    gradient, = no_steps
    torch.testing.assert_close(gradient, gradients(twin), atol=1e-5, rtol=1e-4)


def test_fine_tuning_by_hand(monkeypatch):
    """A learning rate that never moves; a loss that averages over what was reported before, or over
    batches instead of tokens; a last step that is never reported; held-out figures of another
    model."""
    demonstrations = random_demonstrations()
    held_out = random_demonstrations(1)[2:4]
    rates = []
    losses = []
    step = sft.optimizer_step
    logprobs = sft.masked_logprobs

    def watched_step(optimizer, model, lr):
        rates.append(lr)
        return step(optimizer, model, lr)

    def watched_logprobs(model, tokens, mask):
        found = logprobs(model, tokens, mask)
        losses.append(-found[mask].detach())
        return found

    monkeypatch.setattr(sft, "optimizer_step", watched_step)
    monkeypatch.setattr(sft, "masked_logprobs", watched_logprobs)
    model = tiny_gpt(0, V, 64)
    config = sft.Config(epochs=3, batch=2, micro_batch=2, lr=1e-2, warmup=2)
    run = SilentRun(report=5)
    sft.fine_tune(model, demonstrations, held_out, 0.5, config, random.Random(5), run)
    assert len(losses) == 12 and rates == [gpt.learning_rate(i, 12, 1e-2, 2) for i in range(12)]
    assert [row["step"] for row in run.rows] == [5, 10, 12]
    for row, part in zip(run.rows, (losses[:5], losses[5:10], losses[10:])):
        assert row["loss"] == pytest.approx(torch.cat(part).mean().item()) and row["grad_norm"] > 0
    last = run.rows[-1]
    assert last["held_out"] == pytest.approx(token_losses(model, held_out).mean().item())
    assert last["entropy"] == 0.5 and last["excess"] == pytest.approx(last["held_out"] / 0.5 - 1)


def test_exactly_the_response_and_its_end_are_trained(no_steps):
    """A model whose <|end|> is masked out never learns to stop (TRL #1623, #3091); one whose
    prompts count learns to ask."""
    demonstrations = []
    for ids, prompt_length in random_demonstrations(1):  # <|end|> is the last token
        demonstrations.append(Demonstration(ids[:-1] + [V - 1], prompt_length))
    model = tiny_gpt(1, V, 64)
    kept = []

    def keep(module, inputs, output):
        output.retain_grad()
        kept.append(output)

    model.ln_f.register_forward_hook(keep)  # (B, T, C): where a next token is predicted
    config = sft.Config(batch=7)
    sft.fine_tune(model, demonstrations, [], None, config, random.Random(1), SilentRun())
    states, = kept
    weight = model.wte.weight.detach()
    trained = torch.zeros(states.shape[:2], dtype=torch.bool)
    for b, (ids, prompt_length) in enumerate(demonstrations):
        alone = model.hidden(torch.tensor([ids]))[0].detach()
        for t in range(prompt_length - 1, len(ids) - 1):
            # The gradient of cross-entropy: (softmax - one-hot) / N, times the head.
            torch.testing.assert_close(states[b, t].detach(), alone[t], atol=1e-5, rtol=1e-5)
            p = (weight @ alone[t]).softmax(0)
            expected = (p - F.one_hot(torch.tensor(ids[t + 1]), V)) @ weight / 70
            torch.testing.assert_close(states.grad[b, t], expected, atol=1e-7, rtol=1e-4)
            trained[b, t] = True
    assert trained.sum() == 70 and not states.grad[~trained].any()


def test_an_overfitted_model_answers_and_stops(tokenizer):
    """All of the above at once: the answer begins at its first token, is the right one, and
    ends."""
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in DEMONSTRATIONS]
    demonstrations, dropped = encode_demonstrations(rows, tokenizer, 64)
    model = tiny_gpt(2, tokenizer.n_vocab, 64)
    run = SilentRun(report=40)
    config = sft.Config(epochs=40, batch=2, micro_batch=1, lr=1e-2, weight_decay=0.0)
    sft.fine_tune(model, demonstrations, demonstrations, None, config, random.Random(1), run)
    assert dropped == 0 and run.rows[-1]["held_out"] < 0.05
    prompts = [tokenizer.prompt(prompt) for prompt, _ in DEMONSTRATIONS]
    rollout = gpt.generate(model, prompts, 30, tokenizer.end_token, top_k=1)
    texts = [tokenizer.decode(ids) for ids in rollout.responses()]
    assert texts == [answer + "<|end|>" for _, answer in DEMONSTRATIONS]


def test_demonstrations_that_do_not_fit_are_dropped_whole(tokenizer):
    """An answer that is cut at the context teaches to stop in the middle, or, without its <|end|>,
    never to stop."""
    rows = []
    whole = []
    for prompt, answer in DEMONSTRATIONS:
        rows.append({"prompt": prompt, "completion": answer})
        ids = tokenizer.prompt(prompt)
        whole.append(Demonstration(ids + tokenizer.response(answer), len(ids)))
    longer = max(len(one.ids) for one in whole)
    assert encode_demonstrations(rows, tokenizer, longer) == (whole, 0)
    assert encode_demonstrations(rows, tokenizer, longer - 1) == (whole[:1], 1)
    assert encode_demonstrations(rows, tokenizer, 3) == ([], 2)


def test_a_text_that_spells_special_tokens_stays_text(tokenizer):
    """A demonstration that says "<|end|>" ends there; one that says "<|assistant|>" puts words into
    the model's mouth."""
    row = {"prompt": "Say <|end|> or <|assistant|>.", "completion": "<|end|> and <|user|>"}
    ((ids, prompt),), _ = encode_demonstrations([row], tokenizer, 256)
    special = [tokenizer.user_token, tokenizer.assistant_token, tokenizer.end_token]
    places = [i for i, token in enumerate(ids) if token in special]
    assert places == [0, prompt - 1, len(ids) - 1]
    assert [ids[i] for i in places] == special
    assert tokenizer.decode(ids[prompt:-1]) == row["completion"]


def test_answers_are_stories_that_ended():
    """A base model that goes on with more requests, or a story that never ends, counted as an
    answer."""
    rng = random.Random(3)
    asked = stories.request(rng).text
    told = stories.story(rng, asked).text
    opening, wish, *rest = stories.split_sentences(told)
    unknown = "The end is nigh."
    cases = [(told, True, 1, 1), (told, False, 0, 0), ("", True, 0, 0), (asked, True, 0, 0),
             (" ".join([asked] * 4), True, 0, 0), (stories.page(rng).text, True, 0, 0),
             (f"{told} {unknown}", True, 1, 0), (told[:-5], True, 1, 0), (opening, True, 0, 0),
             (" ".join([opening, wish]), True, 1, 1), (" ".join([wish, *rest]), True, 1, 0),
             (" ".join([opening, wish, unknown]), True, 1, 0),
             (" ".join([opening, unknown, wish, unknown]), True, 0, 0)]
    for text, ended, story, flawless in cases:
        assert answers([text], [ended]) == (story, flawless)
    texts = [told, told, asked, f"{told} {unknown}"]
    assert answers(texts, [True, False, True, True]) == (0.5, 0.25)


# --------------------------------------------------------------------------------------------------
# The stage


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny base model of a text about colors."""
    folder = tmp_path_factory.mktemp("base")
    text = "\n".join(prompt + " " + answer for prompt, answer in DEMONSTRATIONS) + "\n"
    (folder / "corpus.txt").write_text(text * 60)
    pretrain(folder, "--text", str(folder / "corpus.txt"),
             *"--vocab_size 290 --block_size 64 --steps 10 --report 10".split())
    return folder


def pretrain(folder, *flags):
    small = "--size cpu --n_layer 1 --n_head 2 --n_embd 32 --batch 8".split()
    gpt.main([*small, "--out", str(folder), *flags])


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def fine_tune(folder, *flags):
    common = "--size cpu --max_new_tokens 30 --batch 4".split()
    sft.main([*common, "--out", str(folder), *flags])


def test_fine_tuning_on_your_own_file(base, tmp_path, capsys):
    """A file of demonstrations that trains nothing, is trained on in full without anything held
    out, or not to the end."""
    rows = []
    for prompt, answer in DEMONSTRATIONS:
        rows += [{"prompt": f"{prompt} {i}", "completion": answer} for i in range(10)]
    longer = {"prompt": "Name a color. 0", "completion": "red " * 100}  # than the context
    rows.append(longer)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    weights = []
    for micro_batch in ("4", "3"):
        fine_tune(base, "--data", path, "--micro_batch", micro_batch,
                  *"--epochs 8 --lr 0.01 --report 10".split())
        log = metrics(base / "cpu/sft/metrics.jsonl")
        model, tokenizer, _ = gpt.load_checkpoint(base / "cpu/sft/checkpoint.pt", "sft", "cpu")
        weights.append(model.wte.weight)
        assert log[-1]["held_out"] < 0.5 * log[0]["held_out"]
        assert log[-1]["step"] == 8 * 5  # 20 prompts, 2 held out: 18 rows that fit, 4 in a step
    torch.testing.assert_close(*weights, atol=2e-3, rtol=1e-2)
    assert "dropped 1 longer than the context" in capsys.readouterr().out
    prompts = [tokenizer.prompt("Name a color. 3")] * 9
    texts, ended = gpt.respond(model, tokenizer, prompts, 30, seed=1)
    assert all(ended) and texts.count("Red.") >= 5


@cpu_only
@pytest.mark.parametrize("epochs", [1, 2])
def test_every_token_of_the_training_counts_equally(base, tmp_path, no_steps, epochs):
    """A mean over each batch of its own: batches hold rows of one length, so a token of a short
    answer, whose batch has few tokens, pulls many times as hard. Here nothing is learnt, and the
    gradients of all steps add up."""
    rows = []
    for i in range(20):
        rows.append({"prompt": f"Name {i}.", "completion": "Red. " * (1 + i % 9)})
    path = write_rows(tmp_path / "rows.jsonl", rows)
    fine_tune(base, "--data", path, "--epochs", str(epochs), "--micro_batch", "3")
    model, tokenizer, _ = gpt.load_checkpoint(base / "cpu/gpt/checkpoint.pt", "gpt", "cpu")
    kept, _ = hold_out(rows)
    demonstrations, _ = encode_demonstrations(kept, tokenizer, 64)
    loss = token_losses(model, demonstrations).mean()
    loss.backward()
    assert len(demonstrations) % 4  # the last step has fewer
    assert len(no_steps) == math.ceil(len(demonstrations) / 4) * epochs
    last = metrics(base / "cpu/sft/metrics.jsonl")[-1]
    assert last["loss"] == pytest.approx(loss.item(), rel=1e-5)
    mean_gradient = sum(no_steps) / len(no_steps)
    torch.testing.assert_close(mean_gradient, gradients(model), atol=1e-5, rtol=1e-4)


def test_one_seed_one_result(base, tmp_path):
    """An order of batches, or of held-out rows, that nobody seeded."""
    rows = [{"prompt": f"Name color {i}.", "completion": f"Red {i}."} for i in range(20)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    runs = []
    for _ in range(2):
        torch.rand(3)
        random.seed()
        fine_tune(base, "--data", path, "--report", "1")
        model, _, _ = gpt.load_checkpoint(base / "cpu/sft/checkpoint.pt", "sft", "cpu")
        weights = [parameter.tolist() for parameter in model.parameters()]
        runs.append((untimed(metrics(base / "cpu/sft/metrics.jsonl")), weights))
    assert runs[0] == runs[1]


def test_pairs_will_do_as_demonstrations(base, tmp_path):
    """A file of pairs whose rejected answers are taught."""
    path = write_rows(tmp_path / "pairs.jsonl", [
        {"prompt": f"Color {i}?", "chosen": "Red.", "rejected": "Mud."} for i in range(20)])
    fine_tune(base, "--data", path, "--epochs", "10", "--lr", "0.01")
    model, tokenizer, _ = gpt.load_checkpoint(base / "cpu/sft/checkpoint.pt", "sft", "cpu")
    texts, _ = gpt.respond(model, tokenizer, [tokenizer.prompt("Color 3?")] * 9, 10, seed=1)
    assert texts.count("Red.") >= 5 and "Mud." not in texts


LONG_LINE = json.dumps({"prompt": "a " * 100, "completion": "b"}) + "\n"


@pytest.mark.parametrize("content, reasons", [
    (None, ["no such file"]), ("", ["empty"]),
    ('{"prompt": "a", "completion": 3}\n', [":1", "completion"]),
    ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n', [":2"]),
    ('{"prompt": "a", "completion": "b"}\n' * 3, ["same prompt"]),
    ("".join(LONG_LINE.replace("a", letter) for letter in "xyz"),
     ["no demonstration is left to train on"]),
    ('{"prompt": "a", "completion": "b"}\n' + LONG_LINE, ["no demonstration is left"])])
def test_a_wrong_file_is_one_line_and_costs_nothing(base, tmp_path, content, reasons):
    """A typing error in the file that costs the checkpoint of last night."""
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": prompt, "completion": "b"} for prompt in "abcd"]
    fine_tune(base, "--data", write_rows(path, rows))
    before = snapshot(base)
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as error:
        fine_tune(base, "--data", str(path))
    message = str(error.value)
    assert "\n" not in message and all(reason in message for reason in [str(path), *reasons])
    assert snapshot(base) == before


def test_a_long_prompt_with_a_short_answer(base, tmp_path, capsys):
    """A demonstration that fits the context can be trained on, though its prompt leaves no room for
    the longest sample."""
    rows = [{"prompt": "z" * 50 + letter, "completion": "Red."} for letter in "abcdefgh"]
    fine_tune(base, "--data", write_rows(tmp_path / "rows.jsonl", rows))
    printed = capsys.readouterr().out
    assert "7 demonstrations, 1 held out; dropped 0 longer than the context" in printed
    assert "\nprompt" not in printed
    last = metrics(base / "cpu/sft/metrics.jsonl")[-1]
    assert last["step"] == 2 and 0 < last["held_out"] < 10  # 4 in a step; the eighth was measured


def test_a_world_too_large_for_the_context_is_named(base):
    """The world's stories in a vocabulary that was made for another text: all of them cut, or a
    traceback."""
    with pytest.raises(InputError, match="too short for the little world"):
        fine_tune(base, "--demonstrations", "4")


def test_fine_tuning_on_the_world(tmp_path):
    """An entropy over other tokens than the loss's; figures in the log that aren't those of the
    saved model."""
    pretrain(tmp_path, "--steps", "4")
    flags = "--demonstrations 32 --questions 5 --lr 0.01 --warmup 1 --max_new_tokens 90".split()
    fine_tune(tmp_path, *flags)
    *_, last, told = metrics(tmp_path / "cpu/sft/metrics.jsonl")
    model, tokenizer, _ = gpt.load_checkpoint(tmp_path / "cpu/sft/checkpoint.pt", "sft", "cpu")
    rng = random.Random("held-out demonstrations")
    rows, logprobs = draw_demonstrations(rng, 500, held_out=True)
    count = sum(len(tokenizer.encode(row["completion"])) + 1 for row in rows)
    assert last["entropy"] == pytest.approx(-sum(logprobs) / count)
    assert last["excess"] == pytest.approx(last["held_out"] / last["entropy"] - 1)
    assert last["excess"] > 1
    held_out, _ = encode_demonstrations(rows[:40], tokenizer, 128)
    with torch.no_grad():
        estimate = token_losses(model, held_out).mean().item()  # from 40 of the 500
    assert last["held_out"] == pytest.approx(estimate, rel=0.05)
    for name in ("base_answers", "answers", "base_flawless", "flawless"):
        assert 0 <= told[name] <= 1
    assert told["flawless"] == 0  # no model tells stories after so few steps


def test_the_learning_curve_ends_at_the_stage_itself(base, tmp_path, monkeypatch, capsys):
    """Points that go on from one another, or that answer other questions; a curve whose last point
    is not the stage's own model, or that costs its checkpoint."""
    pretrain(tmp_path, "--steps", "4")
    flags = "--demonstrations 24 --questions 3 --lr 0.01 --warmup 1 --max_new_tokens 90".split()
    fine_tune(tmp_path, *flags)
    *_, last, told = metrics(tmp_path / "cpu/sft/metrics.jsonl")
    before = snapshot(tmp_path)
    answered = []

    def doublings(first, total):
        assert first == 512
        return [8, 24, total]

    def watched_answers(*rows):
        answered.append(rows)
        return answers(*rows)

    monkeypatch.setattr(sft, "doublings", doublings)
    monkeypatch.setattr(sft, "answers", watched_answers)
    capsys.readouterr()
    fine_tune(tmp_path, *flags, "--learning_curve")
    *_, header, first, second, third = capsys.readouterr().out.splitlines()
    assert "excess" in header and first.split()[0] == "8" and second == third
    count, held_out, excess, *_ = second.split()
    assert first.split()[1] != held_out
    assert (count, held_out, excess) == ("24", f"{last['held_out']:.3f}", f"{last['excess']:.1%}")
    assert f"  {100 * told['answers']:.1f} ± " in second
    assert len(answered) == 3 and answered[1] == answered[2] and snapshot(tmp_path) == before

    # The entropy of a user's own demonstrations is not known.
    rows = [{"prompt": f"Name color {i}.", "completion": f"Red {i}."} for i in range(20)]
    fine_tune(base, "--data", write_rows(tmp_path / "rows.jsonl", rows), "--learning_curve")
    *_, header, first, second, third = capsys.readouterr().out.splitlines()
    assert header == "demonstrations  held out, nats a token" and len(third.split()) == 2


def test_the_worlds_requests_are_not_put_to_a_model_of_other_text(tmp_path):
    """reward_model.py, ppo.py and best_of_n.py without --data ask a model of somebody's own text
    for stories, and print gold."""
    path = tmp_path / "checkpoint.pt"
    sft.refuse_own_text(path, {"own_text": ""})
    with pytest.raises(InputError, match="checkpoint.pt: comes from mine.txt, .* --data"):
        sft.refuse_own_text(path, {"own_text": "mine.txt"})
