"""best_of_n.py against enumeration and brute force: the yardstick, rejection sampling."""

import contextlib
import copy
import io
import math
import random
import re
import shutil
import statistics
from types import SimpleNamespace

import pytest
import torch

import best_of_n
import dpo
import ppo
import reward_model
import sft
from best_of_n import Policy, Samples, best_of_n_kl, forgetting, select, top_k_overall
from data import stories
from data.answer_key import (best_of_n_win_rate, optimality_gap, pass_at_k, subset_weights,
                             win_rate)
from data.corpus import held_out_documents
from data.files import InputError, hold_out, read_demonstrations, write_jsonl
from data.run import read_torch, write_torch
from data.tokenizer import Tokenizer, encode_demonstrations
from gpt import load_checkpoint, save_checkpoint, token_logprobs
from helpers import cpu_only, metrics, noise, snapshot
from reward_model import RewardModel


@pytest.fixture(scope="module")
def trained(stages, tmp_path_factory):
    """A folder with all stages, PPO and DPO too."""
    out = shutil.copytree(stages, tmp_path_factory.mktemp("trained") / "out")
    common = ["--out", str(out), "--size", "cpu", "--max_new_tokens", "16"]
    ppo.main(common + "--iterations 2 --rollouts 8 --minibatch 4 --lr 1e-3".split())
    dpo.main(common + "--batch 16".split())
    return out


@pytest.fixture
def out(trained, tmp_path):
    """A copy of it, to write to."""
    return shutil.copytree(trained, tmp_path / "out")


def load(folder, name):
    """(model, tokenizer, checkpoint) of a policy."""
    return load_checkpoint(folder / "cpu" / name / "checkpoint.pt", name.partition("-")[0], "cpu")


@pytest.fixture(autouse=True, scope="module")
def little_text():
    """What alignment forgets is measured on a few documents."""
    documents = held_out_documents()[:20]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_of_n, "held_out_documents", lambda: documents)
        yield


def run(out, *flags):
    """What best_of_n.py prints, without the seconds that it took."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        best_of_n.main(["--out", str(out), "--size", "cpu", "--max_new_tokens", "16", *flags])
    return re.sub(r" in \d+ s$", "", printed.getvalue(), flags=re.M)


def found_rows(out):
    """The rows of the yardstick: {(under what, policy): row}."""
    rows = metrics(out / "cpu/best_of_n/metrics.jsonl")
    return {(row.get("under"), row["policy"]): row for row in rows if row["policy"] != "frontier"}


def watch(patch):
    """What is drawn from here on, from which weights, and which sequences are then learnt."""
    drawn = []
    draw = best_of_n.draw
    padded = sft.pad

    def drawing(name, policy, scorer, tokenizer, prompts, *rest):
        weights = copy.deepcopy(policy.model.state_dict())
        samples = draw(name, policy, scorer, tokenizer, prompts, *rest)
        drawn.append(SimpleNamespace(name=name, prompts=prompts, samples=samples, weights=weights,
                                     learnt=[]))
        return samples

    def learning(sequences, *rest):
        drawn[-1].learnt.extend(map(tuple, sequences))
        return padded(sequences, *rest)

    patch.setattr(best_of_n, "draw", drawing)
    patch.setattr(sft, "pad", learning)
    return drawn


def taste(rollout, tokenizer):
    """An annotator for models that learnt nothing: they would all get the same from ours."""
    return torch.tensor([sum(row) % 17 / 4 for row in rollout.responses()])


def guess(asked):
    """A verifier, likewise: right more often for some prompts than for others."""
    return [float(len(text) % (2 + len(prompt) % 3) == 0) for prompt, text in asked]


@pytest.fixture(scope="module")
def yard(trained):
    """A yardstick of all policies: what it drew, its rows."""
    before = snapshot(trained)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_of_n, "gold_rewards", taste)
        patch.setattr(best_of_n, "verifier", guess)
        drawn = watch(patch)
        # A batch ends within a prompt.
        run(trained, *"--prompts 3 --samples 16 --sample_batch 20 --verify --beta 0.5".split())
    after = snapshot(trained)
    assert {path: after[path] for path in before} == before     # no stage was written over
    return SimpleNamespace(rows=found_rows(trained), prompts=[x.prompts for x in drawn],
                           samples=[x.samples for x in drawn])


@pytest.mark.parametrize("prompt, gold, fine", [
    ("Tell me a story about a shy fox and a kite.", True, "-5"), ("Who are you?", False, "99")])
def test_prompt_prints_candidates_and_the_winner(trained, prompt, gold, fine):
    """A winner that isn't the best candidate, or an annotator asked for a prompt that it cannot
    judge. Finished responses that score less than unfinished ones, without a word."""
    printed = run(trained, "--prompt", prompt, "--n", "6", "--missing_end_score", fine)
    candidates = re.findall(r"^ *([+-]\d+\.\d{3})(  gold +\S+)?  (.*)$", printed, re.M)
    rewards = [float(reward) for reward, _, _ in candidates]
    assert len(rewards) == 6 and rewards == sorted(rewards, reverse=True)
    assert all(bool(found) == gold for _, found, _ in candidates)
    assert f"winner of 6: {candidates[0][2]}\n" in printed
    assert ("note    sft: finished responses score less" in printed) == (fine == "99")


@cpu_only
@torch.no_grad()
def test_figures_of_the_yardstick(yard, trained):
    """One policy's gold beside another's, ours and theirs swapped in the win rate, one N for all
    rows; log-ratios of another policy, or of rows sorted by length and not put back."""
    assert all(map(stories.is_held_out, yard.prompts[0])) and yard.prompts == yard.prompts[:1] * 3
    reward = yard.samples[0].figures["reward"]
    gold = yard.samples[0].figures["gold"]
    assert [x.figures["gold"].shape for x in yard.samples] == [(3, 32), (3, 16), (3, 16)]
    for name, n in (("sft", 1), ("best of 4", 4), ("best of 16", 16)):
        row = yard.rows[None, name]
        assert row["win_rate"] == pytest.approx(best_of_n_win_rate(reward, gold, n).mean().item())
        mean = (subset_weights(reward, n) * gold).sum(dim=1).mean().item()
        assert row["gold"] == yard.rows["best of N", f"best of {n}"]["gold"] == pytest.approx(mean)
        J = mean - 0.5 * best_of_n_kl(n)
        assert yard.rows["gold", name]["J"] == pytest.approx(J)

    for name, other in zip(("ppo", "dpo"), yard.samples[1:]):
        wins = win_rate(other.figures["gold"], gold).mean().item()
        assert yard.rows[None, name]["win_rate"] == pytest.approx(wins)
        log_ratios = torch.zeros(3, 16)     # response by response, without padding
        for sign, (model, *_) in ((1, load(trained, name)), (-1, load(trained, "sft"))):
            responses = [row for rollout in other.rollouts for row in zip(*rollout)]
            for i, (tokens, start, length) in enumerate(responses):
                tokens = tokens[None, :length]
                logprobs = token_logprobs(model(tokens), tokens)[0, start - 1:]
                log_ratios[divmod(i, 16)] += sign * logprobs.sum()
        for under, field in (("gold", "gold"), ("reward model", "reward")):
            J, J_star = optimality_gap(other.figures[field], log_ratios, 0.5)
            row = yard.rows[under, name]
            assert row["J"] == pytest.approx(J.mean().item(), abs=1e-5)
            assert row["own_J_star"] == pytest.approx(J_star.mean().item(), abs=1e-5)
        row = yard.rows["gold", name]   # the parts of the way to J*
        way = row["share"] + row["left_by_policy"] + row["lost_to_reward_model"]
        assert way == pytest.approx(1, abs=1e-4) and row["lost_to_reward_model"] > -1e-6


@cpu_only
def test_what_is_forgotten_is_measured_on_pretrainings_text(trained, monkeypatch):
    """A pretraining loss of other documents than gpt.py's, beside which it is printed."""
    base, tokenizer, checkpoint = load(trained, "gpt")
    monkeypatch.setattr(best_of_n, "held_out_documents", held_out_documents)
    found = forgetting({"gpt": Policy(base)}, tokenizer)
    assert found["gpt"] == pytest.approx(checkpoint["metrics"][-1]["held_out"])


def test_who_is_right_how_often(yard):
    """A pass@16, or J*, of the mean rate over all prompts, where easy ones make up for hard ones;
    an unfinished response that is right."""
    verified = []
    for samples in yard.samples:
        ended = samples.figures["ended"]
        prompts = [prompt for prompt in yard.prompts[0] for _ in range(ended.shape[1])]
        right = torch.tensor(guess(zip(prompts, samples.texts, strict=True)))
        verified.append(right.view(ended.shape) * ended)
    p = verified[0].mean(dim=1).tolist()
    J_star = statistics.mean(0.5 * math.log(1 - x + x * math.exp(2)) for x in p)
    assert len(set(p)) > 1
    for name, x in zip(("sft", "ppo", "dpo"), verified, strict=True):
        passed = [pass_at_k(int(right), x.shape[1], 16) for right in x.sum(dim=1)]
        share = x.mean().item()
        expected = dict(verified=share, pass_16=statistics.mean(passed), J_star=J_star,
                        J=share - 0.5 * yard.rows[None, name]["kl"])
        found = {figure: yard.rows["verifier", name][figure] for figure in expected}
        assert found == pytest.approx(expected, abs=1e-5) and 0.05 < share < 0.95


@cpu_only
def test_best_of_n_by_the_process_model(out, monkeypatch):
    """Candidates chosen by another sample's score, or shown with the process model's scores as the
    reward; an unfinished answer whose few steps are all good wins."""
    model, tokenizer, _ = load_checkpoint(out / "cpu/reward_model/checkpoint.pt", "reward_model",
                                          "cpu", model_class=RewardModel)
    model.head.weight.data = noise(70, *model.head.weight.shape)
    path = out / "cpu/process_model/checkpoint.pt"
    path.parent.mkdir()
    save_checkpoint(path, "process_model", "cpu", model, tokenizer)
    drawn = watch(monkeypatch)
    monkeypatch.setattr(best_of_n, "gold_rewards", taste)
    run(out, *"--process --policies , --prompts 3 --samples 8".split())
    rows = found_rows(out)
    samples = drawn[0].samples
    scores = [reward_model.step_rewards(model, rollout, tokenizer)[0].sum(dim=1).detach()
              for rollout in samples.rollouts]
    ended = samples.figures["ended"]
    scores = torch.where(ended > 0, torch.cat(scores).view(ended.shape), -math.inf)
    assert 0 < scores.isinf().sum() < scores.numel()
    weights = subset_weights(scores, 4)
    for name in ("reward", "gold", "ended"):
        expected = (weights * samples.figures[name]).sum(dim=1).mean().item()
        assert rows[None, "best of 4, sum"][name] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("stage", [sft, reward_model, ppo, dpo, best_of_n],
                         ids=lambda stage: stage.__name__)
def test_a_wrong_file_is_found_before_anything_is_trained(stage, tmp_path):
    """A typing error in the file's name that comes out after the minutes which the missing stages
    took."""
    with pytest.raises(InputError, match=f"{tmp_path}.*no such file"):
        stage.main(["--out", str(tmp_path / "out"), "--data", str(tmp_path / "none.jsonl")])
    assert not (tmp_path / "out").exists()


def test_ppo_and_the_yardstick_hold_out_the_same_prompts(out, tmp_path, monkeypatch):
    """A prompt that PPO trains on and the yardstick measures it on: its figure is what was learnt
    by heart. Gold columns for prompts that the annotator cannot judge."""
    rows = [{"prompt": f"Who sings {i}?"} for i in range(30)]
    data = ["--data", str(tmp_path / "prompts.jsonl")]
    write_jsonl(data[1], rows)
    split = [{row["prompt"] for row in part} for part in hold_out(rows)]

    def stop(policy, reference, value_model, task, *rest):
        raise KeyboardInterrupt(task.draw_prompts(400, random.Random(0)))

    monkeypatch.setattr(ppo, "ppo", stop)
    with pytest.raises(KeyboardInterrupt) as error:
        ppo.main(["--out", str(out), "--size", "cpu", "--max_new_tokens", "4", *data])
    _, tokenizer, _ = load(out, "sft")
    assert {tokenizer.decode(ids[1:-1]) for ids in error.value.args[0]} == split[0]

    drawn = watch(monkeypatch)
    run(out, *data, "--samples", "4")
    assert [set(x.prompts) for x in drawn] == [split[1]] * 3    # of SFT, PPO and DPO
    assert {under for under, _ in found_rows(out)} == {None, "reward model", "best of N"}


def test_draws_and_temperatures_are_each_policys_own(out, yard, monkeypatch):
    """One seed for every batch or policy. A policy sampled or scored at another temperature than
    it was trained at. Shares that were reached under another price, with no word about it."""
    model, tokenizer, _ = load(out, "sft")
    for name, settings in (("ppo", {}), ("ppo-hot", dict(temperature=1.5, beta=0.3))):
        path = out / "cpu" / name / "checkpoint.pt"
        path.parent.mkdir(exist_ok=True)
        save_checkpoint(path, "ppo", "cpu", model, tokenizer, **settings)
    drawn = watch(monkeypatch)
    printed = run(out, *"--prompts 3 --samples 16 --sample_batch 16 --seed 2".split(), "--policies",
                  "ppo,ppo-hot")
    assert drawn[0].prompts == yard.prompts[0]
    first, ppo_first, _ = [x.samples.texts[:16] for x in drawn]
    assert first not in (ppo_first, drawn[0].samples.texts[16:32])  # all to the first prompt
    rows = found_rows(out)
    assert rows[None, "ppo"]["kl"] == 0  # both have SFT's weights
    assert rows[None, "ppo-hot"]["kl"] > 5 * rows[None, "ppo-hot"]["kl_error"] > 0
    assert "ppo-hot was trained with beta 0.3; J and J* are those of beta 0.2\n" in printed


def test_what_the_yardstick_finds_wrong_costs_nothing(out, monkeypatch):
    """Log-ratios of two policies whose ids mean different words; stages that were not made from one
    another. A folder that cannot be written to, found after minutes of sampling."""
    model, tokenizer, _ = load(out, "ppo")
    strings = [token.decode("latin-1") for token in tokenizer.vocabulary]
    strings[-2:] = strings[:-3:-1]
    exchanged = Tokenizer.from_strings(strings)
    save_checkpoint(out / "cpu/ppo/checkpoint.pt", "ppo", "cpu", model, exchanged)
    monkeypatch.setattr(best_of_n, "draw", None)
    with pytest.raises(InputError, match="ppo.checkpoint.pt: its vocabulary"):
        run(out, "--policies", "ppo")

    base = out / "cpu/gpt/checkpoint.pt"
    write_torch(base, {**read_torch(base), "metrics": []})
    with pytest.raises(InputError, match="sft.checkpoint.pt: was made from another .*gpt"):
        run(out, "--policies", "dpo")

    shutil.rmtree(base.parent)
    shutil.rmtree(out / "cpu/best_of_n", ignore_errors=True)
    (out / "cpu/best_of_n").write_text("a file")
    with pytest.raises(FileExistsError):
        run(out, "--policies", "dpo")


# --------------------------------------------------------------------------------------------------
# Rejection-sampling fine-tuning


def test_what_cannot_be_learnt_from_is_counted(capsys):
    """A response cut off at the limit, learnt as if it ended there; a blank one, which --resume
    can't read back; a sequence beyond the context; all of them, and a division by zero."""
    tokenizer = Tokenizer([bytes([i]) for i in range(256)])
    texts = ["fine", "cut", " \n", "long " * 50, "fine too"]
    figures = {"reward": torch.zeros(5, 1), "ended": torch.tensor([1.0, 0, 1, 1, 1])[:, None]}
    rows, _ = select(list("abcde"), Samples([], texts, figures), "per_prompt", tokenizer, 64)
    short = [(row["prompt"], row["completion"]) for row in rows if len(row["completion"]) < 64]
    assert short == [("a", "fine"), ("e", "fine too")]
    dropped = "\n        dropped 2 without an end or a text, 1 longer than the context\n"
    assert dropped in capsys.readouterr().out
    rest = Samples([], texts[1:4], {name: x[1:4] for name, x in figures.items()})
    with pytest.raises(InputError, match="of the 3 best responses dropped 2 .*: none is left"):
        select(list("bcd"), rest, "overall", tokenizer, 64)
    assert top_k_overall(torch.zeros(40, 50), 2).tolist() == [[0, 0], [0, 1]]


def rsft(out, *flags):
    small = ("--finetune per_prompt --rsft_prompts 12 --n 4 --batch 4 --epochs 2 --report 4 "
             "--lr 1e-2 --warmup 1")
    return run(out, *small.split(), *flags)


def equal(a, b):
    return all(torch.equal(x.cpu(), b[name].cpu()) for name, x in a.items())


@pytest.mark.parametrize("how", ["per_prompt", "overall"])
def test_rounds_of_finetuning(how, out, monkeypatch):
    """Every round on samples of the SFT model; the worst of N, or all; held-out requests; a policy
    that learns from other responses than those beside its checkpoint; a stage written over."""
    before = snapshot(out)
    shown = []
    monkeypatch.setattr(best_of_n, "show_before_and_after", lambda *x, **_: shown.extend(x))
    rounds = watch(monkeypatch)
    rsft(out, "--rounds", "2", "--n", "3", "--finetune", how)
    first, second = rounds
    assert {path: x for path, x in snapshot(out).items() if path in before} == before
    folder = out / "cpu" / f"rsft-{how}"
    reference, tokenizer, _ = load(out, "sft")
    for number, drawn in ((1, first), (2, second)):
        samples = drawn.samples
        rewards = samples.figures["reward"]
        assert rewards.shape == (12, 3) and not any(map(stories.is_held_out, drawn.prompts))
        kept = read_demonstrations(folder / f"kept-{number}.jsonl")
        demonstrations, _ = encode_demonstrations(kept, tokenizer, 128)
        assert sorted(drawn.learnt) == sorted(2 * [tuple(one.ids) for one in demonstrations])

        flat = sorted(((rewards[i, j].item(), i, j) for i in range(12) for j in range(3)),
                      reverse=True)
        best = flat[:12]
        if how == "per_prompt":
            best = [max(row for row in flat if row[1] == i) for i in range(12)]
        expected = [(drawn.prompts[i], samples.texts[3 * i + j]) for _, i, j in best
                    if samples.figures["ended"][i, j]]
        assert sorted((row["prompt"], row["completion"]) for row in kept) == sorted(expected)
        assert len(expected) > 6

    policy, _, checkpoint = load(out, f"rsft-{how}")
    assert equal(reference.state_dict(), first.weights)
    assert equal(shown[1].state_dict(), first.weights)
    assert not equal(first.weights, second.weights) and not set(first.prompts) & set(second.prompts)
    assert not equal(policy.state_dict(), second.weights)
    assert equal(policy.state_dict(), shown[2].state_dict()) and checkpoint["distils"] == 9


def test_finetuning_on_somebodys_own_prompts(out, tmp_path, monkeypatch):
    """Held-out prompts that are learnt; a prompt asked twice and another one never; prompts too
    long to answer; responses of a longer run left behind."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Who sings {i}?"} for i in range(20)]
    rows += [{"prompt": f"{i} " + "long " * 200} for i in range(20)]
    write_jsonl(path, rows)
    short = [row["prompt"] for row in hold_out(rows)[0] if "long" not in row["prompt"]]
    rounds = watch(monkeypatch)
    rsft(out, "--data", str(path), *"--rsft_prompts 999 --rounds 2 --epochs 1".split())
    rsft(out, "--data", str(path), "--rsft_prompts", "7", "--epochs", "1")
    first, second, third = [x.prompts for x in rounds]
    assert sorted(first) == sorted(second) == sorted(short) and len(short) < 20
    assert len(set(third)) == 7 and set(third) < set(short)
    assert not (out / "cpu/rsft-per_prompt/kept-2.jsonl").exists()
