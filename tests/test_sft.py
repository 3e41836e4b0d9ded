"""Supervised fine-tuning: the masked token mean, the <|end|> token, demonstrations, and the stage as a whole."""

import copy
import json
import random
import re

import pytest
import torch
import torch.nn.functional as F

import gpt
import sft
from data import stories
from data.annotator import answers
from data.files import InputError, hold_out
from data.tokenizer import Tokenizer, train as train_vocabulary
from helpers import cpu_only, metrics, snapshot, tiny_gpt, untimed

V = 11
DEMONSTRATIONS = [("Name a color.", "Red."), ("Name an animal, please.", "The little otter by the river.")]


def random_batch(seed=0):
    """Seven sequences whose responses have 1 to 40 tokens, and the lengths of their prompts."""
    rng = random.Random(seed)
    shapes = [(3, 1), (1, 40), (9, 2), (5, 17), (2, 1), (20, 3), (1, 6)]
    return [[rng.randrange(V) for _ in range(sum(shape))] for shape in shapes], [prompt for prompt, _ in shapes]


def gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(train_vocabulary(" ".join(prompt + " " + answer for prompt, answer in DEMONSTRATIONS), 290))


def token_losses(model, sequences, prompts):
    """-log π(y_t | x, y_<t) of all response tokens, one sequence at a time: cross_entropy, no padding."""
    logits, labels = [], []
    for ids, prompt in zip(sequences, prompts):
        logits.append(model(torch.tensor([ids]))[0, prompt - 1:-1])
        labels.append(torch.tensor(ids[prompt:]))
    return F.cross_entropy(torch.cat(logits), torch.cat(labels), reduction="none")


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 7, 64])
def test_micro_batches_give_the_gradient_of_the_token_mean(micro_batch):
    """A mean of the micro-batches' means weighs a token of a short answer more: the bug of gradient accumulation that
    Hugging Face's Trainer had until October 2024. The oracle is cross_entropy over all response tokens at once."""
    sequences, prompts = random_batch()
    model, twin = tiny_gpt(0, V, 64), tiny_gpt(0, V, 64)
    for tokens_per_batch in (70, 100):      # 70 is what this batch has; it may be a short one among others
        loss = sft.backward(model, sequences, prompts, tokens_per_batch, micro_batch)
        oracle = token_losses(twin, sequences, prompts).mean() * 70 / tokens_per_batch
        oracle.backward()
        assert float(loss) == pytest.approx(oracle.item(), rel=1e-5)
        torch.testing.assert_close(gradients(model), gradients(twin), atol=1e-5, rtol=1e-4)


def test_backward_accumulates_and_steps_nothing():
    """backward() that clears the gradients of the micro-batch before, or moves a weight."""
    sequences, prompts = random_batch()
    model, twin = tiny_gpt(0, V, 64), tiny_gpt(0, V, 64)
    sft.backward(model, sequences, prompts, 70, 64)
    once = gradients(model)
    sft.backward(model, sequences, prompts, 70, 64)
    torch.testing.assert_close(gradients(model), 2 * once)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), twin.parameters()))


def test_fit_by_hand(monkeypatch):
    """A learning rate that never moves, a loss that averages over what was reported before, a last step that is never
    reported; half of the run done twice after it went on, with batches in another order."""
    sequences, prompts = random_batch()
    config = sft.Config(epochs=3, batch=2, micro_batch=2, lr=1e-2, warmup=2, report=5)
    rates, losses, backward, step = [], [], sft.backward, sft.optimizer_step
    monkeypatch.setattr(sft, "backward", lambda *rest: losses.append(float(backward(*rest))) or torch.tensor(losses[-1]))
    monkeypatch.setattr(sft, "optimizer_step", lambda *rest: rates.append(rest[2]) or step(*rest))
    model, figures = tiny_gpt(0, V, 64), {}
    for number, found, state in sft.fit(model, sequences, prompts, config, random.Random(5)):
        figures[number] = found
        if number == 7:
            plain = {name: x.state_dict() if hasattr(x, "state_dict") else x for name, x in state.items()}
            saved = copy.deepcopy({"step": 7, "path": "state", **plain})
    assert len(losses) == 12 and rates == [gpt.learning_rate(i, 12, 1e-2, 2) for i in range(12)]
    assert [number for number, found in figures.items() if found] == [5, 10, 12]
    for number, part in ((5, losses[:5]), (10, losses[5:10]), (12, losses[10:])):
        assert figures[number][0] == pytest.approx(sum(part) / len(part)) and figures[number][1] > 0
    twin = tiny_gpt(1, V, 64)
    again = {number: found for number, found, _ in sft.fit(twin, sequences, prompts, config, random.Random(5), saved)}
    assert again == {number: found for number, found in figures.items() if number > 7}
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), twin.parameters()))


def test_exactly_the_response_and_its_end_are_trained():
    """A model whose <|end|> is masked out never learns to stop (TRL #1623, #3091); one whose prompts count learns to ask."""
    sequences, prompts = random_batch(1)
    sequences = [ids[:-1] + [V - 1] for ids in sequences]       # <|end|> is the last token
    model, kept = tiny_gpt(1, V, 64), []

    def keep(module, inputs, output):
        output.retain_grad()
        kept.append(output)

    model.ln_f.register_forward_hook(keep)      # (B, T, C): the states from which a next token is predicted
    sft.backward(model, sequences, prompts, 70, 64)
    (states,), weight = kept, model.wte.weight.detach()
    trained = torch.zeros(states.shape[:2], dtype=torch.bool)
    for b, (ids, prompt) in enumerate(zip(sequences, prompts)):
        alone = model.hidden(torch.tensor([ids]))[0].detach()
        for t in range(prompt - 1, len(ids) - 1):       # the gradient of cross-entropy: (softmax - one-hot) / N, times the head
            torch.testing.assert_close(states[b, t].detach(), alone[t], atol=1e-5, rtol=1e-5)
            p = (weight @ alone[t]).softmax(0)
            expected = (p - F.one_hot(torch.tensor(ids[t + 1]), V)) @ weight / 70
            torch.testing.assert_close(states.grad[b, t], expected, atol=1e-7, rtol=1e-4)
            trained[b, t] = True
    assert trained.sum() == 70 and not states.grad[~trained].any()


def test_an_overfitted_model_answers_and_stops(tokenizer):
    """All of the above at once: the answer begins at its first token, is the right one, and ends."""
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in DEMONSTRATIONS]
    sequences, prompts, dropped = sft.encode_demonstrations(rows, tokenizer, 64)
    model = tiny_gpt(2, tokenizer.n_vocab, 64)
    optimizer = gpt.make_optimizer(model, 0.0)
    for _ in range(40):
        loss = sft.backward(model, sequences, prompts, sum(map(len, sequences)) - sum(prompts), 1)
        gpt.optimizer_step(optimizer, model, 1e-2, loss)
    assert dropped == 0 and loss < 0.05
    rollout = gpt.generate(model, [tokenizer.prompt(prompt) for prompt, _ in DEMONSTRATIONS], 30, tokenizer.end_token, top_k=1)
    assert [tokenizer.decode(ids) for ids in rollout.responses()] == [answer + "<|end|>" for _, answer in DEMONSTRATIONS]


def test_demonstrations_that_do_not_fit_are_dropped_whole(tokenizer):
    """An answer that is cut at the context teaches to stop in the middle, or, without its <|end|>, never to stop."""
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in DEMONSTRATIONS]
    whole = [tokenizer.prompt(row["prompt"]) + tokenizer.response(row["completion"]) for row in rows]
    longer = max(map(len, whole))
    assert sft.encode_demonstrations(rows, tokenizer, longer) == (
        whole, [len(tokenizer.prompt(row["prompt"])) for row in rows], 0)
    assert sft.encode_demonstrations(rows, tokenizer, longer - 1) == (whole[:1], [len(tokenizer.prompt(rows[0]["prompt"]))], 1)
    assert sft.encode_demonstrations(rows, tokenizer, 3) == ([], [], 2)


def test_a_text_that_spells_special_tokens_stays_text(tokenizer):
    """A demonstration that says "<|end|>" ends there; one that says "<|assistant|>" puts words into the model's mouth."""
    row = {"prompt": "Say <|end|> or <|assistant|>.", "completion": "<|end|> and <|user|>"}
    (ids,), (prompt,), _ = sft.encode_demonstrations([row], tokenizer, 256)
    special = {tokenizer.user_token, tokenizer.assistant_token, tokenizer.end_token}
    assert [i for i, token in enumerate(ids) if token in special] == [0, prompt - 1, len(ids) - 1]
    assert (ids[0], ids[prompt - 1], ids[-1]) == (tokenizer.user_token, tokenizer.assistant_token, tokenizer.end_token)
    assert tokenizer.decode(ids[prompt:-1]) == row["completion"]


def test_answers_are_stories_that_ended():
    """A base model that goes on with more requests, or a story that never ends, counted as an answer."""
    rng = random.Random(3)
    asked = stories.request(rng).text
    told = stories.story(rng, asked).text
    opening, wish, *rest = stories.split_sentences(told)
    unknown = "The end is nigh."
    for text, ended, story, flawless in [
            (told, True, 1, 1), (told, False, 0, 0), ("", True, 0, 0), (asked, True, 0, 0), (" ".join([asked] * 4), True, 0, 0),
            (stories.page(rng).text, True, 0, 0), (f"{told} {unknown}", True, 1, 0), (told[:-5], True, 1, 0),
            (opening, True, 0, 0), (" ".join([opening, wish]), True, 1, 1), (" ".join([wish, *rest]), True, 1, 0),
            (" ".join([opening, wish, unknown]), True, 1, 0), (" ".join([opening, unknown, wish, unknown]), True, 0, 0)]:
        assert answers([text], [ended]) == (story, flawless)
    assert answers([told, told, asked, f"{told} {unknown}"], [True, False, True, True]) == (0.5, 0.25)


def test_the_worlds_demonstrations_answer_their_own_request():
    """Requests and stories that are paired wrongly, or a log-probability of something else: the entropy is then wrong."""
    rows, logprobs = sft.draw_demonstrations(random.Random(4), 50)
    assert len(rows) == len(logprobs) == 50 and len({row["prompt"] for row in rows}) > 40
    for row, logprob in zip(rows, logprobs):
        assert logprob == pytest.approx(stories.log_probability(row["prompt"], row["completion"]))
    kept = sum(stories.parse_request(row["prompt"]).hero in re.findall("[a-z]+", row["completion"].lower()) for row in rows)
    assert kept > 35       # nine of ten tell of the hero that was asked for


# ----------------------------------------------------------------------------------------------------------------------
# The stage


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny base model of a text about colors."""
    folder = tmp_path_factory.mktemp("base")
    text = "\n".join(prompt + " " + answer for prompt, answer in DEMONSTRATIONS) + "\n"
    (folder / "corpus.txt").write_text(text * 60)
    gpt.main(["--size", "cpu", "--out", str(folder), "--text", str(folder / "corpus.txt"), "--vocab_size", "290",
              "--block_size", "64", "--n_layer", "1", "--n_head", "2", "--n_embd", "32", "--batch", "8",
              "--steps", "10", "--report", "10"])
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def fine_tune(folder, *flags):
    sft.main(["--size", "cpu", "--out", str(folder), "--max_new_tokens", "30", "--batch", "4", *flags])


def test_fine_tuning_on_your_own_file(base, tmp_path, capsys):
    """A file of demonstrations that trains nothing, is trained on in full without anything held out, or not to the end."""
    rows = [{"prompt": f"{prompt} {i}", "completion": answer} for prompt, answer in DEMONSTRATIONS for i in range(10)]
    rows.append({"prompt": "Name a color. 0", "completion": "red " * 100})     # longer than the context
    path = write_rows(tmp_path / "rows.jsonl", rows)
    weights = []
    for micro_batch in ("4", "3"):
        fine_tune(base, "--data", path, "--epochs", "8", "--lr", "0.01", "--report", "10", "--micro_batch", micro_batch)
        log = metrics(base / "cpu/sft/metrics.jsonl")
        model, tokenizer, _ = gpt.load_checkpoint(base / "cpu/sft/checkpoint.pt", "sft", "cpu")
        weights.append(model.wte.weight)
        assert log[-1]["held_out"] < 0.5 * log[0]["held_out"]
        assert log[-1]["step"] == 8 * 5       # 20 prompts, 2 held out: 18 rows that fit in batches of 4
    torch.testing.assert_close(*weights, atol=2e-3, rtol=1e-2)
    assert "dropped 1 longer than the context" in capsys.readouterr().out
    texts, ended = gpt.respond(model, tokenizer, [tokenizer.prompt("Name a color. 3")] * 9, 30, seed=1)
    assert all(ended) and texts.count("Red.") >= 5


@cpu_only
@pytest.mark.parametrize("epochs", [1, 2])
def test_every_token_of_the_training_counts_alike(base, tmp_path, monkeypatch, epochs):
    """A mean over each batch of its own: batches hold rows of one length, so a token of a short answer, whose batch has
    few tokens, pulls many times as hard. Here nothing is learnt, and the gradients of all steps add up."""
    rows = [{"prompt": f"Name {i}.", "completion": "Red. " * (1 + i % 9)} for i in range(20)]
    steps = []

    def keep(optimizer, model, lr, loss):
        steps.append((gradients(model), float(loss)))
        optimizer.zero_grad()
        return 0.0

    monkeypatch.setattr(sft, "optimizer_step", keep)
    fine_tune(base, "--data", write_rows(tmp_path / "rows.jsonl", rows), "--epochs", str(epochs), "--micro_batch", "3")
    model, tokenizer, _ = gpt.load_checkpoint(base / "cpu/gpt/checkpoint.pt", "gpt", "cpu")
    sequences, prompts, _ = sft.encode_demonstrations(hold_out(rows, 1)[0], tokenizer, 64)
    losses = token_losses(model, sequences, prompts)
    losses.mean().backward()
    assert len(sequences) == 18 and len(steps) == 5 * epochs        # batches of 4, the last one of 2
    assert sum(loss for _, loss in steps) / len(steps) == pytest.approx(losses.mean().item(), rel=1e-5)
    mean_gradient = sum(gradient for gradient, _ in steps) / len(steps)
    torch.testing.assert_close(mean_gradient, gradients(model), atol=1e-5, rtol=1e-4)


def test_one_seed_one_result(base, tmp_path):
    """An order of batches, or of held-out rows, that nobody seeded."""
    path, runs = write_rows(tmp_path / "rows.jsonl", [
        {"prompt": f"Name color {i}.", "completion": f"Red {i}."} for i in range(20)]), []
    for _ in range(2):
        torch.rand(3)
        random.seed()
        fine_tune(base, "--data", path, "--report", "1")
        model = gpt.load_checkpoint(base / "cpu/sft/checkpoint.pt", "sft", "cpu")[0]
        runs.append((untimed(metrics(base / "cpu/sft/metrics.jsonl")), [p.tolist() for p in model.parameters()]))
    assert runs[0] == runs[1]


def test_pairs_will_do_as_demonstrations(base, tmp_path):
    """A file of pairs whose rejected answers are taught."""
    path = write_rows(tmp_path / "pairs.jsonl", [
        {"prompt": f"Color {i}?", "chosen": "Red.", "rejected": "Mud."} for i in range(20)])
    fine_tune(base, "--data", path, "--epochs", "10", "--lr", "0.01")
    model, tokenizer, _ = gpt.load_checkpoint(base / "cpu/sft/checkpoint.pt", "sft", "cpu")
    texts, _ = gpt.respond(model, tokenizer, [tokenizer.prompt("Color 3?")] * 9, 10, seed=1)
    assert texts.count("Red.") >= 5 and "Mud." not in texts


@pytest.mark.parametrize("content, reasons", [
    (None, ["no such file"]), ("", ["empty"]), ('{"prompt": "a", "completion": 3}\n', [":1", "completion"]),
    ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n', [":2"]),
    ('{"prompt": "a", "completion": "b"}\n' * 3, ["same prompt"]),
    ("".join(json.dumps({"prompt": f"{i} " * 100, "completion": "b"}) + "\n" for i in range(3)),
     ["no demonstration is left to train on"]),
    ('{"prompt": "a", "completion": "b"}\n' + json.dumps({"prompt": "a " * 100, "completion": "b"}) + "\n",
     ["no demonstration is left"])])
def test_a_wrong_file_is_one_line_and_costs_nothing(base, tmp_path, content, reasons):
    """A typing error in the file that costs the checkpoint of last night."""
    path = tmp_path / "rows.jsonl"
    fine_tune(base, "--data", write_rows(path, [{"prompt": prompt, "completion": "b"} for prompt in "abcd"]))
    before = snapshot(base)
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(InputError) as error:
        fine_tune(base, "--data", str(path))
    message = str(error.value)
    assert "\n" not in message and all(reason in message for reason in [str(path), *reasons])
    assert snapshot(base) == before


def test_a_long_prompt_with_a_short_answer(base, tmp_path, capsys):
    """A demonstration that fits the context can be trained on, though its prompt leaves no room for the longest sample."""
    fine_tune(base, "--data", write_rows(tmp_path / "rows.jsonl", [{"prompt": "z" * 50 + letter, "completion": "Red."}
                                                                   for letter in "abcdefgh"]))
    printed = capsys.readouterr().out
    assert "7 demonstrations, 1 held out; dropped 0 longer than the context" in printed and "\nprompt" not in printed
    last = metrics(base / "cpu/sft/metrics.jsonl")[-1]
    assert last["step"] == 2 and 0 < last["held_out"] < 10      # 7 demonstrations, 4 in a step; the eighth was measured


def test_a_world_too_large_for_the_context_is_named(base):
    """The world's stories in a vocabulary that was made for another text: all of them cut, or a traceback."""
    with pytest.raises(InputError, match="too short for the little world"):
        fine_tune(base, "--demonstrations", "4")


def test_fine_tuning_on_the_world(tmp_path):
    """An entropy over other tokens than the loss's; figures in the log that aren't those of the saved model."""
    small = ["--size", "cpu", "--out", str(tmp_path)]
    gpt.main([*small, "--n_layer", "1", "--n_head", "2", "--n_embd", "32", "--batch", "8", "--steps", "4", "--report", "4"])
    fine_tune(tmp_path, "--demonstrations", "32", "--questions", "5", "--lr", "0.01", "--warmup", "1", "--max_new_tokens", "90")
    *_, last, told = metrics(tmp_path / "cpu/sft/metrics.jsonl")
    model, tokenizer, _ = gpt.load_checkpoint(tmp_path / "cpu/sft/checkpoint.pt", "sft", "cpu")
    rows, logprobs = sft.draw_demonstrations(random.Random("held-out demonstrations"), 500, held_out=True)
    responses = [tokenizer.encode(row["completion"]) + [tokenizer.end_token] for row in rows]
    count = sum(map(len, responses))
    assert last["entropy"] == pytest.approx(-sum(logprobs) / count)
    assert last["excess"] == pytest.approx(last["held_out"] / last["entropy"] - 1) and last["excess"] > 1
    total = 0.0
    for row, response in list(zip(rows, responses))[:40]:       # an estimate from 40 of the 500
        ids = tokenizer.prompt(row["prompt"]) + response
        with torch.no_grad():
            total += F.cross_entropy(model(torch.tensor([ids]))[0, -len(response) - 1:-1], torch.tensor(response),
                                     reduction="sum").item()
    assert last["held_out"] == pytest.approx(total / sum(map(len, responses[:40])), rel=0.05)
    assert all(0 <= told[name] <= 1 for name in ("base_answers", "answers", "base_flawless", "flawless"))
    assert told["flawless"] == 0        # nobody tells stories after so few steps


def test_the_learning_curve_ends_at_the_stage_itself(base, tmp_path, monkeypatch, capsys):
    """Points that go on from one another, or that answer other questions; a curve whose last point is not the stage's own
    model, or that costs its checkpoint."""
    small = ["--size", "cpu", "--out", str(tmp_path)]
    gpt.main([*small, "--n_layer", "1", "--n_head", "2", "--n_embd", "32", "--batch", "8", "--steps", "4", "--report", "4"])
    flags = ["--demonstrations", "24", "--questions", "3", "--lr", "0.01", "--warmup", "1", "--max_new_tokens", "90"]
    fine_tune(tmp_path, *flags)
    *_, last, told = metrics(tmp_path / "cpu/sft/metrics.jsonl")
    before, answered = snapshot(tmp_path), []
    monkeypatch.setattr(sft, "doublings", lambda first, total: [8, 24, total] if first == 512 else pytest.fail("another"))
    monkeypatch.setattr(sft, "answers", lambda *rows: answered.append(rows) or answers(*rows))
    capsys.readouterr()
    fine_tune(tmp_path, *flags, "--learning_curve")
    *_, header, first, second, third = capsys.readouterr().out.splitlines()
    assert second == third and first.split()[:1] == ["8"] and first.split()[1] != second.split()[1] and "excess" in header
    count, held_out, excess, *_ = second.split()
    assert (count, held_out, excess) == ("24", f"{last['held_out']:.3f}", f"{last['excess']:.1%}")
    assert f"  {100 * told['answers']:.1f} ± " in second
    assert len(answered) == 3 and answered[1] == answered[2] and snapshot(tmp_path) == before
    rows = [{"prompt": f"Name color {i}.", "completion": f"Red {i}."} for i in range(20)]       # nobody knows their entropy
    fine_tune(base, "--data", write_rows(tmp_path / "rows.jsonl", rows), "--learning_curve")
    *_, header, first, second, third = capsys.readouterr().out.splitlines()
    assert header == "demonstrations  held out, nats a token" and len(third.split()) == 2
