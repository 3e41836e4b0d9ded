"""best_of_n.py against the lecture's matrix and numbers, enumeration and brute force."""

import contextlib
import copy
import io
import itertools
import math
import random
import re
import shutil
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import best_of_n
import dpo
import gpt
import ppo
import reward_model
import sft
from best_of_n import (Policy, Samples, best_of_n_kl, forgetting, select, sequence_logprobs,
                       top_k_overall, top_per_prompt)
from data import stories
from data.answer_key import best_of_n_win_rate, cell, optimality_gap, subset_weights, win_rate
from data.corpus import held_out_documents
from data.files import InputError, hold_out, read_demonstrations, read_pairs, write_jsonl
from data.run import read_torch, write_torch
from data.tokenizer import Tokenizer, encode_demonstrations
from gpt import Rollout, load_checkpoint, pad, save_checkpoint, token_logprobs
from helpers import cpu_only, metrics, noise, snapshot, tiny_gpt
from reward_model import RewardModel

MATRIX = torch.tensor([[0.7, 0.3, 0.5, 0.2],        # ECE 7115, "Rejection Sampling"
                       [0.4, 0.8, 0.6, 0.5],        # 5 prompts, 4 completions
                       [0.9, 0.3, 0.4, 0.7],
                       [0.2, 0.5, 0.8, 0.6],
                       [0.5, 0.4, 0.3, 0.6]])


def test_selections_of_the_lecture():
    """The best over the wrong axis, worst for best, or row and column swapped: the slide has S(R) =
    [1, 2, 1, 3, 4], counted from 1; "Prompt 3 gets two completions (0.9 and 0.7), while prompt 5
    gets none". Of equals the first."""
    assert (top_per_prompt(MATRIX) + 1).tolist() == [1, 2, 1, 3, 4]
    assert top_k_overall(MATRIX, 5).tolist() == [[2, 0], [1, 1], [3, 2], [0, 0], [2, 3]]
    assert len({tuple(pair) for pair in top_k_overall(MATRIX, 20).tolist()}) == 20
    assert top_k_overall(torch.zeros(40, 50), 2).tolist() == [[0, 0], [0, 1]]


def test_best_of_n_kl_is_a_bound_and_tight():
    """log n alone, or log n - 1 + n: the figure is in the yardstick's tables as best-of-N's KL. Of
    many equally likely responses it is the exact one's limit, from above."""
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)
    rank = torch.arange(100_001, dtype=torch.float64) / 100_000
    for n in (1, 2, 4, 16, 64):
        law = (rank ** n).diff()  # P(best is the k-th) = F(k)^n - F(k-1)^n
        exact = (law * (law * 100_000).log()).sum().item()
        assert best_of_n_kl(n) - 0.01 < exact <= best_of_n_kl(n) + 1e-9


# --------------------------------------------------------------------------------------------------
# The yardstick


@pytest.fixture(scope="module")
def trained(stages, tmp_path_factory):
    """A folder with all stages, PPO and DPO too."""
    out = shutil.copytree(stages, tmp_path_factory.mktemp("trained") / "out")
    common = ["--out", str(out), "--size", "cpu", "--max_new_tokens", "16"]
    ppo.main(common + "--iterations 2 --rollouts 8 --minibatch 4 --lr 1e-3".split())
    dpo.main(common + "--batch 16".split())
    return out


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


def watch_draw(patch):
    """What is drawn from here on: [(arguments, Samples), ...]."""
    drawn = []
    draw = best_of_n.draw

    def watched(*arguments):
        samples = draw(*arguments)
        drawn.append((arguments, samples))
        return samples

    patch.setattr(best_of_n, "draw", watched)
    return drawn


def taste(rollout, tokenizer):
    """An annotator for models that learnt nothing: they would all get the same from ours."""
    return torch.tensor([sum(row) % 17 / 4 for row in rollout.responses()])


YARDSTICK = "--prompts 3 --samples 16 --sample_batch 20".split()    # a batch ends within a prompt


@pytest.fixture(scope="module")
def yard(trained):
    """A yardstick of all policies: what it printed and drew, its rows."""
    before = snapshot(trained)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_of_n, "gold_rewards", taste)
        drawn = watch_draw(patch)
        printed = run(trained, *YARDSTICK)
    after = snapshot(trained)
    assert {path: after[path] for path in before} == before     # no stage was written over
    return SimpleNamespace(printed=printed, rows=found_rows(trained),
                           prompts=[arguments[4] for arguments, _ in drawn],
                           samples=[samples for _, samples in drawn])


def test_sequence_logprobs_keep_the_order_of_the_samples():
    """Rows sorted by length and not put back, or a temperature left out: log π of another response
    or policy."""
    model = tiny_gpt(0, vocab=11)
    model.wte.weight.data *= 10  # so that a temperature matters
    rng = random.Random(0)
    rollouts = []
    expected = []
    for size in (150, 7):
        rows = [[rng.randrange(11) for _ in range(rng.randint(4, 32))] for _ in range(size)]
        starts = [rng.randint(1, 3) for _ in rows]
        tokens, lengths = pad(rows)
        rollouts.append(Rollout(tokens, torch.tensor(starts), lengths))
        for row, start in zip(rows, starts):
            tokens = torch.tensor([row])
            logprobs = [token_logprobs(model(tokens).detach(), tokens, temperature)
                        for temperature in (1.0, 0.5)]
            expected.append([x[0, start - 1:].sum().item() for x in logprobs])
    expected = torch.tensor(expected)
    assert ((expected[:, 0] - expected[:, 1]).abs() > 0.01).float().mean() > 0.95
    for column, temperature in enumerate((1.0, 0.5)):
        found = sequence_logprobs(Policy(model, temperature), rollouts)
        assert torch.allclose(found, expected[:, column], rtol=1e-4)


def test_prompt_prints_candidates_and_the_winner(trained):
    """A winner that isn't the best candidate, or an annotator asked for a prompt that it cannot
    judge."""
    line = r"^ *([+-]\d+\.\d{3})(  gold +[+-]\d+\.\d{3})?  (.*)$"
    for prompt, gold in (("Tell me a story about a shy fox and a kite.", True),
                         ("Who are you?", False)):
        printed = run(trained, "--prompt", prompt, "--n", "6")
        candidates = re.findall(line, printed, re.M)
        rewards = [float(reward) for reward, _, _ in candidates]
        assert len(rewards) == 6 and rewards == sorted(rewards, reverse=True)
        assert all(bool(found) == gold for _, found, _ in candidates)
        assert f"winner of 6: {candidates[0][2]}\n" in printed


def test_found_before_the_sampling(trained, tmp_path, monkeypatch):
    """A folder that cannot be written to, found after minutes of sampling, whose tables are lost; a
    blank in a list of policies; β = 0, which gave tables of nan."""
    out = shutil.copytree(trained, tmp_path / "out")
    shutil.rmtree(out / "cpu/best_of_n", ignore_errors=True)
    (out / "cpu/best_of_n").write_text("a file")
    monkeypatch.setattr(best_of_n, "draw", None)
    flags = ["--size", "cpu", "--out", str(out), "--policies"]
    with pytest.raises(FileExistsError):
        best_of_n.main([*flags, "ppo, dpo"])
    with pytest.raises(InputError, match="--beta 0.0: must be positive"):
        best_of_n.main([*flags, "ppo", "--beta", "0"])


def test_a_score_below_the_fine_is_told(trained, capsys):
    """Finished responses that score less than unfinished ones: never ending pays, in silence."""
    best_of_n.main(["--size", "cpu", "--out", str(trained), "--prompt", "Why?", "--n", "6",
                    "--missing_end_score", "99"])
    assert "note    sft: finished responses score less" in capsys.readouterr().out


@cpu_only
def test_figures_of_the_yardstick(yard, trained):
    """A policy left out, nan in the figures, one policy's gold beside another's, ours and theirs
    swapped in the win rate, all rows of best-of-N with the same N, or an own J* with the log-ratios
    of another policy."""
    assert all(map(stories.is_held_out, yard.prompts[0])) and yard.prompts == yard.prompts[:1] * 3
    assert "the little world: 3 held-out prompts; 16 samples each, 32 of SFT" in yard.printed
    figures = {"reward", "gold", "win_rate", "kl", "length", "distinct_2", "ended"}
    names = ["sft", "best of 4", "best of 16", "ppo", "dpo"]
    assert [name for under, name in yard.rows if under is None] == names
    for name in names:
        row = yard.rows[None, name]
        assert set(row) == {"policy"} | figures | {f"{figure}_error" for figure in figures}
        assert row["distinct_2_error"] is None
        assert all(row[f"{figure}_error"] >= 0 for figure in figures - {"distinct_2"})
        assert 0 <= row["ended"] <= 1 <= row["length"] <= 16

    reward = yard.samples[0].figures["reward"]
    gold = yard.samples[0].figures["gold"]
    assert [x.figures["gold"].shape for x in yard.samples] == [(3, 32), (3, 16), (3, 16)]
    assert gold.std() > 0.5
    for name, n in (("sft", 1), ("best of 4", 4), ("best of 16", 16)):
        row = yard.rows[None, name]
        expected = best_of_n_win_rate(reward, gold, n).mean().item()
        assert row["win_rate"] == pytest.approx(expected)
        mean = (subset_weights(reward, n) * gold).sum(dim=1).mean().item()
        J = mean - 0.2 * best_of_n_kl(n)    # with the README's beta
        assert yard.rows["gold", name]["J"] == pytest.approx(J)
        for figure in ("reward", "gold", "kl", "length"):
            assert yard.rows["best of N", f"best of {n}"][figure] == row[figure]
    assert [name for under, name in yard.rows if under == "best of N"] == [
        f"best of {n}" for n in (1, 2, 4, 8, 16)]

    models = []
    for name in ("sft", "ppo", "dpo"):
        models.append(load_checkpoint(trained / "cpu" / name / "checkpoint.pt", name, "cpu")[0])
    for name, model, other in zip(("ppo", "dpo"), models[1:], yard.samples[1:]):
        wins = win_rate(other.figures["gold"], gold).mean().item()
        assert yard.rows[None, name]["win_rate"] == pytest.approx(wins)
        log_ratios = sequence_logprobs(Policy(model), other.rollouts)
        log_ratios = log_ratios - sequence_logprobs(Policy(models[0]), other.rollouts)
        for under, field in (("gold", "gold"), ("reward model", "reward")):
            J, J_star = optimality_gap(other.figures[field], log_ratios.view(3, 16), 0.2)
            row = yard.rows[under, name]
            assert row["J"] == pytest.approx(J.mean().item(), abs=1e-5)
            assert row["own_J_star"] == pytest.approx(J_star.mean().item(), abs=1e-5)


@cpu_only
def test_what_the_yardstick_prints(yard, trained, monkeypatch):
    """Parts of the way to J* that don't add up to it, or other figures on the screen than in the
    file; lines that a terminal breaks; the pretraining loss of other text than pretraining's."""
    shares = ("share", "left_by_policy", "lost_to_reward_model")
    block = re.search(r"where gold is lost(.|\n)*?\n\n", yard.printed).group()
    for (under, name), row in yard.rows.items():
        if under == "reward model":
            assert row["reward_model_J"] == pytest.approx(row["J_star"], abs=1e-5)
            assert row["J_error"] >= 0 and row["J_star_error"] >= 0
        elif under == "gold":
            assert sum(row[figure] for figure in shares) == pytest.approx(1, abs=1e-4)
            assert row["lost_to_reward_model"] > -1e-6 and 1 <= row["effective_samples"] <= 64
            J = cell(row["reward_model_J"], row["reward_model_J_error"])
            assert f"J = {J} under gold" in block
            parts = [cell(row[figure], row[f"{figure}_error"], ".1%") for figure in shares]
            assert re.search(rf"^{name} +{' +'.join(parts)}$", block, re.M)

    tables = yard.printed[yard.printed.index("sampled dpo"):yard.printed.index("\nsaved ")]
    assert max(map(len, tables.splitlines())) <= 100 and "How close to the best" in tables
    for line in ("sampled sft: 96", "sampled ppo: 48", "log-probabilities under every policy: 9"):
        assert f"\n{line}\n" in yard.printed

    loss = {name: row["loss"] for (under, name), row in yard.rows.items() if under == "pretraining"}
    assert list(loss) == ["base", "sft", "ppo", "dpo"]
    assert ", ".join(f"{name} {x:.3f}" for name, x in loss.items()) in yard.printed
    last = read_torch(trained / "cpu/gpt/checkpoint.pt")["metrics"][-1]
    assert loss["base"] == last["held_out"]
    base, tokenizer, _ = load_checkpoint(trained / "cpu/gpt/checkpoint.pt", "gpt", "cpu")
    monkeypatch.setattr(best_of_n, "held_out_documents", held_out_documents)
    again = forgetting([dict(held_out=0.0)], {"gpt": Policy(base)}, tokenizer)
    assert again["gpt"] == pytest.approx(loss["base"])  # on the same documents as pretraining


def test_the_same_yardstick_again(yard, trained, tmp_path, monkeypatch):
    """A table that changes from run to run, or with what an interrupted run left in a stage's
    metrics.jsonl; prompts that change with the seed; a run that is over, but was killed before its
    files were moved to their places: the yardstick compares the policy of the run before it, or
    trains a finished stage again."""
    monkeypatch.setattr(best_of_n, "gold_rewards", taste)
    drawn = watch_draw(monkeypatch)
    out = shutil.copytree(trained, tmp_path / "out")
    (out / "cpu/gpt/metrics.jsonl").write_bytes(b'{"held_out": \xff')  # it is not read
    before = snapshot(out)
    model, tokenizer, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
    for name in ("gpt", "reward_model", "ppo", "dpo"):
        folder = out / "cpu" / name
        (folder / "finished").mkdir()
        for path in folder.iterdir():
            if path.is_file() and path.name != "lock":
                path.rename(folder / "finished" / path.name)
        (folder / "finished/state.pt").write_bytes(b"")
    path = out / "cpu/dpo/checkpoint.pt"
    save_checkpoint(path, "dpo", "cpu", model, tokenizer)  # the run before
    printed = run(out, *YARDSTICK)
    assert printed.replace(str(out), "OUT") == yard.printed.replace(str(trained), "OUT")
    assert snapshot(out) == before
    run(out, *"--prompts 3 --samples 1 --policies , --seed 2".split())
    assert drawn[-1][0][4] == yard.prompts[0]


def test_who_is_right_how_often(trained, monkeypatch):
    """A pass@16 of the mean over all prompts, where easy ones make up for hard ones; J* of SFT's
    mean rate instead of each prompt's; an unfinished response that is right."""
    right = []

    def verifier(asked):
        right.append([float(len(text) % (2 + len(prompt) % 3) == 0) for prompt, text in asked])
        return right[-1]

    drawn = watch_draw(monkeypatch)
    monkeypatch.setattr(best_of_n, "verifier", verifier)
    printed = run(trained, *"--verify --policies ppo --prompts 3 --samples 16 --beta 0.5".split())
    rows = found_rows(trained)
    verified = []
    for x, (_, samples) in zip(right, drawn):
        verified.append(torch.tensor(x).view(3, -1) * samples.figures["ended"])
    assert [x.shape[1] for x in verified] == [32, 16]
    assert [name for under, name in rows if under == "verifier"] == ["sft", "ppo"]
    p = verified[0].mean(dim=1).tolist()
    J_star = statistics.mean(0.5 * math.log(1 - x + x * math.exp(2)) for x in p)
    for name, x in zip(("sft", "ppo"), verified):
        row = rows["verifier", name]
        count = x.shape[1]
        wrong = (1 - x).sum(dim=1).int().tolist()
        passed = [1 - math.comb(k, 16) / math.comb(count, 16) for k in wrong]
        assert row["verified"] == pytest.approx(x.mean().item()) and 0.05 < row["verified"] < 0.95
        assert row["pass_16"] == pytest.approx(statistics.mean(passed), abs=1e-6)
        assert row["J_star"] == pytest.approx(J_star, abs=1e-5) and len(set(p)) > 1
        J = row["verified"] - 0.5 * rows[None, name]["kl"]
        assert row["J"] == pytest.approx(J, abs=1e-5)
    assert "pass_16" in printed.split("under the verifier")[1]
    assert "ppo, J under verifier" in printed


@cpu_only
def test_best_of_n_by_the_process_model(trained, tmp_path, monkeypatch):
    """Candidates chosen by one model's score of other samples, or shown with the process model's
    scores as the reward; an unfinished answer whose few steps are all good wins."""
    out = shutil.copytree(trained, tmp_path / "out")
    model, tokenizer, _ = load_checkpoint(out / "cpu/reward_model/checkpoint.pt", "reward_model",
                                          "cpu", model_class=RewardModel)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(70))
    (out / "cpu/process_model").mkdir()
    path = out / "cpu/process_model/checkpoint.pt"
    save_checkpoint(path, "process_model", "cpu", model, tokenizer)
    drawn = watch_draw(monkeypatch)
    monkeypatch.setattr(best_of_n, "gold_rewards", taste)
    run(out, *"--process --policies , --prompts 3 --samples 8".split())
    rows = found_rows(out)
    names = ["sft", *("best of 4" + rule for rule in ("", ", smallest", ", product", ", sum"))]
    assert [name for under, name in rows if under is None] == names

    (_, samples), = drawn
    scores = []         # the sum of the steps, response by response; unfinished ones never win
    for rollout in samples.rollouts:
        rewards, steps = reward_model.step_rewards(model, rollout, tokenizer)
        for row, ended in zip(rewards, rollout.ended(tokenizer.end_token).tolist()):
            scores.append(row.sum().item() if ended else -math.inf)
    scores = torch.tensor(scores).view(samples.figures["reward"].shape)
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
    for argv in (["--data", str(tmp_path / "none.jsonl")], ["--data", str(tmp_path)]):
        with pytest.raises(InputError, match=str(tmp_path)):
            stage.main(["--out", str(tmp_path / "out"), "--size", "cpu", *argv])
    assert not (tmp_path / "out").exists()


def test_every_stage_holds_out_the_same_prompts(trained, tmp_path, monkeypatch):
    """A prompt that one stage trains on and another one measures itself on: its figure is what was
    learnt by heart. Gold columns for prompts that the annotator cannot judge."""
    path = tmp_path / "pairs.jsonl"
    names = [f"Who sings {i}?" for i in range(30)]
    rows = []
    for name in random.Random(0).sample(names, 30):
        if name.endswith("7?"):  # three prompts have two rows, one too long for all but PPO
            rows.append({"prompt": name, "chosen": "Yes. " * 200, "rejected": "No."})
        rows.append({"prompt": name, "chosen": "Yes.", "rejected": "No."})
    write_jsonl(path, rows)
    out = shutil.copytree(trained, tmp_path / "out")
    common = ["--out", str(out), "--size", "cpu", "--max_new_tokens", "4", "--data", str(path)]
    tokenizer = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")[1]
    seen = {"sft": set(), "reward_model": set(), "ppo": set(), "dpo": set()}

    def spy(module, name, position):
        """Note the prompts of the sequences of ids that a function is called with while it
        trains."""
        original = getattr(module, name)

        def spying(*arguments, **keywords):
            if torch.is_grad_enabled() or module is ppo:
                for ids in arguments[position]:
                    for sequence in ids[:2] if isinstance(ids[0], list) else [ids]:
                        prompt = sequence[1:sequence.index(tokenizer.assistant_token)]
                        seen[module.__name__].add(tokenizer.decode(prompt))
            return original(*arguments, **keywords)

        monkeypatch.setattr(module, name, spying)

    spy(sft, "pad", 0)
    spy(reward_model, "pad", 0)
    spy(dpo, "pair_logprobs", 1)
    spy(ppo, "generate", 1)
    sft.main(common)
    reward_model.main(common)
    ppo.main(common + "--iterations 1 --rollouts 400 --minibatch 400 --micro_batch 400 "
                      "--epochs 1".split())
    dpo.main(common)
    expected = {row["prompt"] for row in hold_out(rows)[1]}
    for prompts in seen.values():
        assert set(names) - prompts == expected
    pairs = read_pairs(out / "cpu/reward_model/held_out.jsonl")
    assert {row["prompt"] for row in pairs} == expected

    drawn = watch_draw(monkeypatch)
    printed = run(out, "--data", str(path), "--samples", "4")
    # SFT, PPO and DPO are compared on prompts that none of them has seen.
    assert [set(arguments[4]) for arguments, _ in drawn] == [expected] * 3
    assert "gold" not in printed and "win_rate" not in printed
    assert {under for under, _ in found_rows(out)} == {None, "reward model", "best of N"}


def test_draws_and_temperatures_are_each_policys_own(trained, tmp_path, monkeypatch):
    """One seed for every batch, or for every policy: the samples are then copies, and their errors
    hidden. A policy that was trained at one temperature, sampled or scored at another: its J is
    that of a policy that was never trained. And shares that were reached under another price or
    penalty, with no word about it. A policy that is named twice is one."""
    out = shutil.copytree(trained, tmp_path / "out")
    model, tokenizer, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
    for name, settings in (("ppo", {}),
                           ("ppo-hot", dict(temperature=1.5, missing_end_score=-2.0, beta=0.3))):
        (out / "cpu" / name).mkdir(exist_ok=True)
        path = out / "cpu" / name / "checkpoint.pt"
        save_checkpoint(path, "ppo", "cpu", model, tokenizer, **settings)
    calls = []
    generate = best_of_n.generate

    def watched(*arguments, seed):
        calls.append((arguments[4], seed))
        return generate(*arguments, seed=seed)

    monkeypatch.setattr(best_of_n, "generate", watched)
    drawn = watch_draw(monkeypatch)
    printed = run(out, *"--prompts 4 --samples 16 --sample_batch 64".split(), "--policies",
                  "ppo,ppo-hot,ppo,ppo-hot")
    assert [temperature for temperature, _ in calls] == [1.0, 1.0, 1.0, 1.5]
    assert len({seed for _, seed in calls}) == 4
    texts = [samples.texts for _, samples in drawn]
    assert texts[0][:16] != texts[0][16:32] and texts[0][:16] != texts[1][:16]
    hot = found_rows(out)[None, "ppo-hot"]
    assert found_rows(out)[None, "ppo"]["kl"] == 0  # both have SFT's weights
    assert hot["kl"] > 5 * hot["kl_error"] > 0
    assert re.findall(r"^.* was trained with .*$", printed, re.M) == [
        "ppo-hot was trained with beta 0.3; J and J* are those of beta 0.2",
        "ppo-hot was trained with missing_end_score -2.0; J and J* are those of missing_end_score "
        "-5.0"]


def test_a_policy_of_another_vocabulary(trained, tmp_path):
    """Log-ratios of two policies whose ids mean different words."""
    out = shutil.copytree(trained, tmp_path / "out")
    path = out / "cpu/ppo/checkpoint.pt"
    model, tokenizer, _ = load_checkpoint(path, "ppo", "cpu")
    strings = [token.decode("latin-1") for token in tokenizer.vocabulary]
    strings[-2:] = strings[:-3:-1]
    save_checkpoint(path, "ppo", "cpu", model, Tokenizer.from_strings(strings))
    before = snapshot(out)
    with pytest.raises(InputError, match="ppo.checkpoint.pt: its vocabulary"):
        run(out, "--prompts", "2", "--samples", "4")
    assert snapshot(out) == before


def test_figures_of_a_stage_that_are_missing_or_damaged(trained, tmp_path):
    """A stage whose checkpoint was removed, a text of one's own, whose entropy is unknown, or a
    single prompt, whose figures have no errors, ends the yardstick; a checkpoint that was cut off
    ends it after its minutes of sampling, with nothing saved; one that SFT did not begin with."""
    out = shutil.copytree(trained, tmp_path / "out")
    path = out / "cpu/gpt/checkpoint.pt"  # none but the table of all stages reads it
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])
    other = read_torch(trained / "cpu/gpt/checkpoint.pt")
    del other["metrics"]
    for reason in ("gpt.checkpoint.pt: .*train the stage again",
                   "sft.checkpoint.pt: was made from another .*gpt.checkpoint.pt; train sft again"):
        before = snapshot(out)
        with pytest.raises(InputError, match=reason) as error:
            run(out, "--prompts", "2", "--samples", "4")
        assert "\n" not in str(error.value) and snapshot(out) == before
        write_torch(path, other)    # whole, but another one

    shutil.rmtree(path.parent)
    rows = read_torch(out / "cpu/sft/checkpoint.pt")["metrics"]
    assert not any("entropy" in row for row in rows)
    printed = run(out, *"--prompts 1 --samples 4 --policies ppo".split())
    assert re.search(r"How close to the best\n +measured .*\nreward model, accuracy ", printed)


def test_all_that_is_missing_is_trained_under_one_plan(trained, tmp_path, monkeypatch):
    """A plan that names PPO's minutes and not DPO's, or an existing policy trained again."""
    out = shutil.copytree(trained, tmp_path / "out")
    plans = []

    def train_missing(config, needed, stage):
        plans.append((needed[3:], stage))
        raise KeyboardInterrupt

    monkeypatch.setattr(best_of_n, "train_missing", train_missing)
    for gone in ("none", "dpo", "ppo"):
        shutil.rmtree(out / "cpu" / gone, ignore_errors=True)
        with pytest.raises(KeyboardInterrupt):
            run(out)
    assert plans == [([], "best_of_n"), (["dpo"], "best_of_n"), (["ppo", "dpo"], "best_of_n")]


# --------------------------------------------------------------------------------------------------
# Rejection-sampling fine-tuning


def samples_of(rewards, ended=None, texts=None):
    """Samples with these rewards (M, N); the text of (i, j) is "i j"."""
    M, N = rewards.shape
    if texts is None:
        texts = [f"{i} {j}" for i in range(M) for j in range(N)]
    if ended is None:
        ended = torch.ones(M, N)
    return Samples([], texts, {"reward": rewards, "ended": ended})


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer([bytes([i]) for i in range(256)])


def test_the_best_overall_favour_easy_prompts(tokenizer, capsys):
    """Both selections the same, or of another size; the lecture: the best overall are better, but
    "can bias toward easy prompts"."""
    easy = torch.tensor([3.0] * 3 + [0.0] * 9)[:, None]  # all responses to three prompts are better
    rewards = easy + 0.5 * noise(0, 12, 8).clamp(-2, 2)
    prompts = [f"prompt {i}" for i in range(12)]
    per_prompt, figures = select(prompts, samples_of(rewards), "per_prompt", tokenizer, 128)
    best = [max(range(8), key=row.__getitem__) for row in rewards.tolist()]
    assert per_prompt == [{"prompt": f"prompt {i}", "completion": f"{i} {j}"}
                          for i, j in enumerate(best)]

    overall, overall_figures = select(prompts, samples_of(rewards), "overall", tokenizer, 128)
    assert len({row["completion"] for row in overall}) == len(overall) == 12  # none twice
    assert {row["prompt"] for row in overall} == set(prompts[:3])
    assert all(row["prompt"] == f"prompt {row['completion'].split()[0]}" for row in overall)
    assert figures["prompts_reward"] == pytest.approx(figures["all_reward"], abs=1e-5)
    assert overall_figures["prompts_reward"] > overall_figures["all_reward"] + 2
    assert overall_figures["reward"] > figures["reward"] + 1
    assert overall_figures["spread"] < figures["spread"] and 4 <= overall_figures["most"] <= 8
    printed = capsys.readouterr().out
    assert ("kept    12 of 96 responses, for 12 of 12 prompts, at most 1 for one\n"
            "        dropped 0 without") in printed
    assert ("kept    12 of 96 responses, for 3 of 12 prompts, at most "
            f"{overall_figures['most']} for one\n") in printed


def test_what_cannot_be_learnt_from_is_counted(tokenizer, capsys):
    """A response cut off at the limit, learnt as if it ended there; one that data/files.py refuses
    to read back, so that --resume can't continue; a sequence beyond the context; all of them, and a
    division by zero."""
    texts = ["fine", "cut", " \n", "N\0", "long " * 50, "fine too"]
    ended = torch.tensor([1.0, 0, 1, 1, 1, 1])[:, None]
    samples = samples_of(torch.zeros(6, 1), ended, texts)
    rows, _ = select(list("abcdef"), samples, "per_prompt", tokenizer, 64)
    short = [(row["prompt"], row["completion"]) for row in rows if len(row["completion"]) < 64]
    assert short == [("a", "fine"), ("f", "fine too")]
    dropped = "\n        dropped 3 without an end or a text, 1 longer than the context\n"
    assert dropped in capsys.readouterr().out
    rest = samples_of(torch.zeros(4, 1), ended[1:5], texts[1:5])
    message = "of the 4 best responses dropped 3 without .*, 1 longer .*: none is left"
    with pytest.raises(InputError, match=message):
        select(list("bcde"), rest, "overall", tokenizer, 64)


def rsft(out, *flags):
    small = ("--finetune per_prompt --rsft_prompts 12 --n 4 --batch 4 --epochs 2 --report 4 "
             "--lr 1e-2 --warmup 1")
    return run(out, *small.split(), *flags)


def equal(a, b):
    return all(torch.equal(x.cpu(), b[name].cpu()) for name, x in a.items())


def watch(monkeypatch):
    """What every round does from here on: [[prompts, Samples, weights that sampled, sequences that
    were learnt], ...]."""
    rounds = []
    draw = best_of_n.draw
    padded = sft.pad

    def drawing(name, policy, scorer, tokenizer, prompts, *arguments):
        samples = draw(name, policy, scorer, tokenizer, prompts, *arguments)
        rounds.append([prompts, samples, copy.deepcopy(policy.model.state_dict()), []])
        return samples

    def learning(sequences, *arguments):
        rounds[-1][3].extend(map(tuple, sequences))
        return padded(sequences, *arguments)

    monkeypatch.setattr(best_of_n, "draw", drawing)
    monkeypatch.setattr(sft, "pad", learning)
    return rounds


@pytest.mark.parametrize("how", ["per_prompt", "overall"])
def test_rounds_of_finetuning(how, out, monkeypatch):
    """Every round on samples of the SFT model; the worst of N, or all; held-out requests; another
    stage written over; a policy that learns from other responses than those beside its checkpoint;
    after for before on the screen."""
    before = snapshot(out)
    rounds = watch(monkeypatch)
    shown = []
    monkeypatch.setattr(best_of_n, "show_before_and_after", lambda *x: shown.extend(x))
    printed = rsft(out, "--rounds", "2", "--finetune", how)
    folder = out / "cpu" / f"rsft-{how}"
    after = {path: data for path, data in snapshot(out).items() if folder not in path.parents}
    assert after == before
    reference, tokenizer, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
    assert len(rounds) == 2 and equal(reference.state_dict(), rounds[0][2])
    assert not equal(rounds[0][2], rounds[1][2])
    assert not set(rounds[0][0]) & set(rounds[1][0])

    steps = 0
    rows = metrics(folder / "metrics.jsonl")
    for number, (prompts, samples, _, learnt) in enumerate(rounds, start=1):
        rewards = samples.figures["reward"]
        assert rewards.shape == (12, 4) and not any(map(stories.is_held_out, prompts))
        kept = read_demonstrations(folder / f"kept-{number}.jsonl")
        demonstrations, _ = encode_demonstrations(kept, tokenizer, 128)
        sequences = [tuple(one.ids) for one in demonstrations]
        assert sorted(learnt) == sorted(2 * sequences)  # two epochs
        steps += 2 * math.ceil(len(sequences) / 4)

        flat = sorted(((rewards[i, j].item(), i, j) for i in range(12) for j in range(4)),
                      reverse=True)
        best = flat[:12]
        if how == "per_prompt":
            best = [max(row for row in flat if row[1] == i) for i in range(12)]
        expected = [(prompts[i], samples.texts[4 * i + j]) for _, i, j in best
                    if samples.figures["ended"][i, j]]
        assert sorted((row["prompt"], row["completion"]) for row in kept) == sorted(expected)
        assert len(expected) > 6
        found = next(row for row in rows if row.get("round") == number)
        mean = np.mean([reward for reward, _, _ in best])
        assert found["reward"] == pytest.approx(mean, abs=1e-5)

    assert rows[-1]["step"] == steps and [row["round"] for row in rows if "round" in row] == [1, 2]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    assert ("fresh requests of the little world; 2 rounds of 4 responses to each of 12\n"
            in printed)
    policy, _, checkpoint = load_checkpoint(folder / "checkpoint.pt", "rsft", "cpu")
    assert checkpoint["distils"] == 16 and not equal(policy.state_dict(), rounds[1][2])
    assert equal(shown[1].state_dict(), rounds[0][2])
    assert equal(shown[2].state_dict(), checkpoint["model"])


def test_finetuning_on_somebodys_own_prompts(out, tmp_path, monkeypatch):
    """Held-out prompts that are learnt; the world's requests put to a policy of other prompts; a
    prompt asked twice and another one never; prompts too long to answer, left out without a word;
    responses of a longer run left behind."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Who sings {i}?"} for i in range(20)]
    rows += [{"prompt": f"{i} " + "long " * 200} for i in range(20)]
    write_jsonl(path, rows)
    trained_on = hold_out(rows)[0]
    short = [row["prompt"] for row in trained_on if "long" not in row["prompt"]]
    rounds = watch(monkeypatch)
    printed = rsft(out, "--data", str(path), *"--rsft_prompts 999 --rounds 2 --epochs 1".split())
    assert (f"prompts.jsonl: {len(short)} prompts, dropped {len(trained_on) - len(short)} that "
            f"leave no room for 16 new tokens; 2 rounds of 4 responses to each of {len(short)}\n"
            ) in printed
    rsft(out, "--data", str(path), "--rsft_prompts", "7", "--epochs", "1")
    first, second, third = [prompts for prompts, *_ in rounds]
    assert sorted(first) == sorted(second) == sorted(short) and len(short) < 20
    assert len(set(third)) == 7 and set(third) < set(short)
    kept = (out / "cpu/rsft-per_prompt").glob("kept-*.jsonl")
    assert [path.name for path in kept] == ["kept-1.jsonl"]


RSFT_ONLY = ("name rsft-x", "rounds 2", "rsft_prompts 8", "epochs 2", "batch 8", "lr 0.1",
             "warmup 1", "weight_decay 0.0", "report 2")
YARDSTICK_ONLY = ("policies ppo", "prompts 8", "samples 8", "beta 0.2")


@pytest.mark.parametrize("argv, message", [
    *((f"--{flag}", f"--{flag}: goes with --finetune per_prompt or overall only$")
      for flag in RSFT_ONLY),
    *((f"--finetune overall --{flag}", f"--{flag}: goes with --finetune no only$")
      for flag in YARDSTICK_ONLY),
    ("--policies ppo,foo", "--policies foo: must be ppo or dpo, or the --name"),
    ("--policies dpo,sft", "--policies sft: must be ppo or dpo, or the --name"),
    ("--n 4 --data found-wrong-later.jsonl", "--n 4: goes with --prompt or --finetune only"),
    ("--process --data x.jsonl", "--process True: cannot be used with --data"),
    ("--process", "process_model/checkpoint.pt: no such checkpoint"),
    ("--finetune overall --verify", "--finetune overall: cannot be used with --process or"),
    ("--finetune overall --rounds 0", "--rounds 0: must be positive"),
    ("--finetune overall --name rsft/../sft", "--name .*: must be rsft"),
    ("--finetune overall --name best_of_n", "--name best_of_n: must be rsft"),
    ("--finetune overall --data none.jsonl", "none.jsonl: no such file"),
    ("--finetune overall --prompt Why?",
     "--policies rsft-overall: must be ppo or dpo, or the --name of a finished run")])
def test_what_a_run_would_ignore_is_refused(argv, message, tmp_path):
    """A sweep over a flag that changes nothing; the reference written over; minutes of training
    before a refusal."""
    with pytest.raises(InputError, match=message) as error:
        run(tmp_path / "out", *argv.split())
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_finetuned_policy_in_the_yardstick(trained, tmp_path, monkeypatch):
    """A policy that the yardstick does not find, or takes for another stage's; the best-of-N that
    it distils, which the table leaves out unless N is 4, 16 or 64; --prompt that asks the SFT model
    whatever was fine-tuned."""
    out = shutil.copytree(trained, tmp_path / "out")
    rsft(out, "--n", "3")
    rsft(out, *"--rounds 2 --n 3 --name rsft-2 --finetune overall".split())
    printed = run(out, *"--prompts 3 --samples 8 --policies rsft-2,ppo,rsft-per_prompt".split())
    rows = found_rows(out)
    names = ["sft", "best of 3", "best of 4", "rsft-2", "ppo", "rsft-per_prompt"]  # 9 is above 8
    for judge in (None, "reward model", "gold"):
        assert [name for under, name in rows if under == judge] == names
    assert rows[None, "rsft-per_prompt"]["kl"] != 0
    assert rows[None, "best of 3"]["kl"] == pytest.approx(best_of_n_kl(3))
    assert "rsft-per_prompt, J under gold" in printed

    drawn = watch_draw(monkeypatch)
    printed = run(out, "--finetune", "per_prompt", "--prompt", "Who are you?", "--n", "2")
    (name, policy, *_), _ = drawn[0]
    assert name == "rsft-per_prompt" and "winner of 2: " in printed
    learnt = read_torch(out / "cpu/rsft-per_prompt/checkpoint.pt")["model"]
    assert equal(policy.model.state_dict(), learnt)
    with pytest.raises(InputError, match="a prompt of .* exceed the context of 128"):
        run(trained, "--prompt", "long " * 200)
