"""Runs that are killed, interrupted or starved of disk, and continue bit for bit.

data/run.py saves and continues for every stage. So one cheap stage is killed wherever it can be, in
processes of its own; of every other stage one test asks that all it needs is in its state.
"""

import contextlib
import io
import itertools
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo  # the first optimizer would import it, in every process again

import best_of_n
import dpo
import gpt
import ppo
import reward_model
import sft
from data.files import InputError, lock_folder, run_script, write_atomic
from data.run import Run, read_torch, train_missing, write_torch
from data.tokenizer import Tokenizer, train as train_vocabulary
from helpers import metrics, snapshot, untimed

OLD = b"of an earlier run"


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu():
    """Bit for bit is promised on the CPU only; and waiting for the disk proves nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(os, "fsync", lambda file: None)
        yield


def read_metrics(folder):
    rows = metrics(folder / "metrics.jsonl")
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    return untimed(rows)


def left_behind(folder):
    """The files of a finished run: not its lock, and not the tokens of a text, which every run of
    these settings may read."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return [name for name in names if not name.startswith(("lock", "documents-", "text-"))]


def an_earlier_run(folder, reference):
    """Put the files into a folder that a finished run leaves there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in left_behind(reference):
        (folder / name).write_bytes(OLD)


def check_finished(folder, reference):
    """The files of both folders are the same, all of one run, and nothing else is left behind."""
    kept = read_torch(folder / "checkpoint.pt")["metrics"]
    assert kept == read_metrics(folder) == read_metrics(reference)
    for name in set(left_behind(reference)) - {"metrics.jsonl"}:
        assert (folder / name).read_bytes() == (reference / name).read_bytes()
    assert sorted(os.listdir(folder)) == sorted(os.listdir(reference))


def check_unfinished(folder, reference):
    """What a stopped run leaves is whole: the files of the run before it, a state that loads, the
    unbroken run's first figures."""
    for name in left_behind(folder):
        assert (folder / name).read_bytes() == OLD
    unfinished = folder / "unfinished"
    if (unfinished / "state.pt").exists():
        saved = len(read_torch(unfinished / "state.pt")["rows"])
        rows = read_metrics(unfinished)
        assert rows == read_metrics(reference)[:len(rows)] and saved <= len(rows) <= saved + 2
    path = unfinished / "checkpoint.pt"
    assert not path.exists() or path.read_bytes() == (reference / path.name).read_bytes()
    assert len(list(folder.rglob("*.tmp"))) <= 1


# --------------------------------------------------------------------------------------------------
# Every stage

SHORT = "--batch 4 --max_new_tokens 8 --report 3"
PAIRS = ("sft/checkpoint.pt", "reward_model/pairs.jsonl", "reward_model/held_out.jsonl")
MODELS = ("sft/checkpoint.pt", "reward_model/checkpoint.pt")
PPO = "--iterations 4 --rollouts 8 --max_new_tokens 8 --lr 1e-3 --save 2"

# Its script, its flags, and what it builds on: its state keeps the checksums of these.
STAGES = {
    "gpt": (gpt, "--text {data} --vocab_size 280 --block_size 16 --n_layer 1 --n_head 2 "
                 "--n_embd 16 --steps 20 --batch 4 --warmup 2 --report 8", ()),
    "sft": (sft, "--data {data} --batch 32 --max_new_tokens 8 --questions 8 --report 5",
            ("gpt/checkpoint.pt",)),
    "reward_model": (reward_model, f"--pairs 32 --held_out 8 {SHORT}", ("sft/checkpoint.pt",)),
    "process_model": (reward_model, "--process --batch 8 --report 3", PAIRS),
    "ppo": (ppo, f"{PPO} --minibatch 4 --epochs 2 --kl_target 3", MODELS),
    "ppo-moving": (ppo, f"{PPO} --name ppo-moving --method reinforce_moving", MODELS),
    "dpo": (dpo, "--batch 8 --max_new_tokens 8 --report 3", PAIRS),
    "dpo-kto": (dpo, "--name dpo-kto --loss kto --batch 16 --max_new_tokens 8 --report 3", PAIRS),
    "dpo-online": (dpo, f"--name dpo-online --online 2 --pairs 16 {SHORT}",
                   (*PAIRS, "reward_model/checkpoint.pt")),
    "rsft": (best_of_n, "--name rsft --finetune per_prompt --rounds 2 --rsft_prompts 8 --n 2 "
                        f"{SHORT}", MODELS)}


def before(name, stages, out):
    """Give a folder all that a stage builds on. Returns the stage's command line, and its own
    folder."""
    for earlier in ("gpt", "sft", "reward_model"):
        if earlier == name:
            break
        shutil.copytree(stages / "cpu" / earlier, out / "cpu" / earlier)
    flags = STAGES[name][1].format(data=stages / "demonstrations.jsonl")      # a text, too
    return ["--size", "cpu", "--out", str(out), *flags.split()], out / "cpu" / name


@contextlib.contextmanager
def at_gradient(n, action):
    """Call action(parameters) when the n-th gradient is about to be clipped. Yields [gradients]."""
    real = torch.nn.utils.clip_grad_norm_
    calls = [0]

    def clip(parameters, max_norm):
        parameters = list(parameters)
        calls[0] += 1
        if calls[0] == n:
            action(parameters)
        return real(parameters, max_norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        yield calls


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_is_stopped_twice_continues_bit_for_bit(name, stages, tmp_path, capsys):
    """A momentum, a half-averaged loss, a baseline or a round's samples not saved; NaN saved over
    good weights; a step that Ctrl-C loses; a library that reseeds its user's generators."""
    main = STAGES[name][0].main
    argv, reference = before(name, stages, tmp_path / "whole")
    with at_gradient(None, None) as gradients:
        main(argv)
    steps = metrics(reference / "metrics.jsonl")[-1]["step"]
    per_step = gradients[0] // steps

    argv, folder = before(name, stages, tmp_path / "stopped")
    path = folder / "unfinished/state.pt"
    an_earlier_run(folder, reference)
    random.seed(5)
    torch.manual_seed(7)
    generators = random.getstate(), torch.initial_seed()
    handler = signal.getsignal(signal.SIGINT)

    # 1. The second half of the step, if it has several gradients, ends in NaN.
    step = steps // 2
    message = rf"^{name}, step {step + 1}: gradient norm nan: no step taken; .*; last figures: step"
    with pytest.raises(FloatingPointError, match=message), \
            at_gradient((step + 1) * per_step, lambda found: found[0].grad.fill_(math.nan)):
        main(argv)
    check_unfinished(folder, reference)
    saved = read_torch(path)
    assert 0 < saved["step"] <= step and set(saved["sources"]) == set(STAGES[name][2])

    # 2. Ctrl-C in the step after that.
    if "--save" in argv:
        argv += ["--save", "3"]     # may change
    gradient = (step + 1 - saved["step"]) * per_step + 1
    message = f"^{name}: saved after step {step + 2} of .*; --resume continues$"
    with pytest.raises(KeyboardInterrupt, match=message), \
            at_gradient(gradient, lambda parameters: signal.raise_signal(signal.SIGINT)):
        main([*argv, "--resume"])
    check_unfinished(folder, reference)
    assert read_torch(path)["step"] == step + 2

    # 3. To its end.
    main([*argv, "--resume"])
    assert f"{name}: continues after step {step + 2}\n" in capsys.readouterr().out
    check_finished(folder, reference)
    assert signal.getsignal(signal.SIGINT) is handler
    assert generators == (random.getstate(), torch.initial_seed())


# --------------------------------------------------------------------------------------------------
# One stage as small as can be, killed anywhere


def small_stage(folder, last=None, resume=False, stage="sft", sources=(), **settings):
    """Two rounds of 3 steps on 4 tensors, each on "samples" of the model and with an optimizer of
    its own; it stops after step `last`."""
    model = gpt.GPT(gpt.GPTConfig(5, 4, 0, 1, 4), torch.Generator().manual_seed(1))
    adaptive = {"beta": 0.5, "mean": 0.0}
    config = sft.Config(size="cpu", resume=resume, **settings)
    with Run(stage, folder, config, 3, sources, total=6, save=2) as one:
        for number in (1, 2):
            path = one.folder / f"samples-{number}"
            if not path.exists():
                write_atomic(path, str(model.wte.weight.sum().item()))
            samples = float(path.read_text())
            if number not in [row.get("round") for row in one.rows]:
                one.record(round=number, samples=samples)
            optimizer = gpt.make_optimizer(model, 0.1)
            for step in one.steps(3, model=model, optimizer=optimizer, adaptive=adaptive):
                if one.step == last:
                    return
                tokens = torch.tensor([[step, number, 2]])
                loss = -gpt.token_logprobs(model(tokens), tokens).mean() * samples
                loss.backward()
                gpt.optimizer_step(optimizer, model, 0.01)
                adaptive["beta"] *= 1.1
                one.log(step, loss=loss, beta=adaptive["beta"])
        write_torch(one.folder / "checkpoint.pt",
                    {"model": model.state_dict(), "metrics": one.figures()})
        one.finish()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a small_stage that ran without a stop."""
    folder = tmp_path_factory.mktemp("small") / "cpu/sft"
    small_stage(folder)
    rows = [(row["step"], row.get("round")) for row in read_metrics(folder)]
    assert rows == [(0, 1), (3, None), (3, 2), (6, None)]
    return folder


CALLS = ((torch.optim.AdamW, "step"), (os, "replace"), (os, "rename"), (Path, "unlink"),
         (Path, "rmdir"))


def at_call(patch, n, *signals):
    """The n-th step or change of a file sends this process the signals; before SIGKILL, a file
    that has not got its name yet is cut in half, as if it were still being written."""
    calls = itertools.count(1)

    def wrap(original):
        def patched(*arguments, **keywords):
            if next(calls) == n:
                if signal.SIGKILL in signals and str(arguments[0]).endswith(".tmp"):
                    os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
                for number in signals:
                    signal.raise_signal(number)
            return original(*arguments, **keywords)
        return patched

    for owner, name in CALLS:
        patch.setattr(owner, name, wrap(getattr(owner, name)))


def run(logs, setup, main):
    """Run main() as a script, in a process that has torch already, after setup(). Returns its exit
    status, which is negative for a signal, and stderr."""
    def body():
        sys.argv = ["stage.py"]
        sys.stdout = open(os.devnull, "w")
        sys.stderr = open(logs / "stderr", "w")
        setup()
        run_script(main)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join(100)
    assert process.exitcode is not None
    return process.exitcode, (logs / "stderr").read_text()


def test_killed_at_every_step_and_write(small, tmp_path, monkeypatch):
    """Half a checkpoint in the old one's place, a state without its figures, a .tmp file for ever;
    round 2 with round 1's moments, skipped or done twice. Every fourth run is killed twice."""
    monkeypatch.setattr(sft, "main", lambda argv: pytest.fail("is trained again"))
    folder = tmp_path / "cpu/sft"
    rng = random.Random("kills")
    for n in itertools.count(1):
        shutil.rmtree(folder, ignore_errors=True)
        an_earlier_run(folder, small)
        resume = False
        for kill in (n, rng.randint(1, 12))[:1 + (n % 4 == 0)]:
            setup = partial(at_call, monkeypatch, kill, signal.SIGKILL)
            status, stderr = run(tmp_path, setup, partial(small_stage, folder, resume=resume))
            if status == 0 or (folder / "finished").exists():
                break
            assert status == -signal.SIGKILL and stderr == ""
            check_unfinished(folder, small)
            resume = (folder / "unfinished/state.pt").exists()
        if (folder / "finished").exists():  # the next stage moves the rest of the files up
            assert not (folder / "unfinished").exists()
            train_missing(sft.Config(size="cpu", out=str(tmp_path)), ["sft"], "the next stage")
        elif status != 0:
            small_stage(folder, resume=resume)
        check_finished(folder, small)
        if status == 0 and kill == n:
            break
    # 6 steps; 2 files at the start, 2 of samples, 4 of figures, 4 of the state, the checkpoint;
    # the folder; 4 files that are moved up, 2 that are of no use any more.
    assert n - 1 == 6 + (2 + 2 + 4 + 4 + 1) + 1 + 4 + 2 + 1


def test_ctrl_c_at_every_step_and_write(small, tmp_path):
    """Between two rounds or while a file is written: a step that is lost, or a message of another
    one. Pressed twice: a step of an hour, and no way out but kill -9."""
    # By the calls above, from the first saved state to the last; None: stops at once.
    steps = [None, None, None, 2, 2, 3, 3, 3, None, None, 4, 4, 5, 6, 6, 6, None, None]
    for presses in (1, 2):
        for n, step in enumerate(steps, start=3):
            folder = tmp_path / f"{presses}-{n}"
            an_earlier_run(folder, small)
            with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt) as error:
                at_call(patch, n, *[signal.SIGINT] * presses)
                small_stage(folder)
            message = f"sft: saved after step {step} of 6; --resume continues"
            assert str(error.value) == (message if step and presses == 1 else "")
            assert not list(folder.rglob("*.tmp"))
            check_unfinished(folder, small)
            small_stage(folder, resume=True)
            check_finished(folder, small)


def test_a_full_disk(small, tmp_path):
    """The old checkpoint is gone, half of the new one is there, and Python prints forty lines."""
    folder = tmp_path / "cpu/sft"
    an_earlier_run(folder, small)
    room = (small / "checkpoint.pt").stat().st_size     # a state is larger: it has moments
    setup = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (room, room))
    status, stderr = run(tmp_path, setup, partial(small_stage, folder))
    assert (status, stderr) == (1, f"stage.py: {folder}/unfinished/state.pt: File too large\n")
    assert not list(folder.rglob("*.tmp"))
    check_unfinished(folder, small)
    small_stage(folder, resume=True)
    check_finished(folder, small)


def test_what_resume_refuses(small, tmp_path, capsys):
    """Half of a run with one rate, file or stage, half with another; a smaller micro-batch refused;
    two runs in one folder, or a lock for ever; a night thrown away, or its files kept."""
    folder = tmp_path / "dpo"
    pairs = tmp_path / "reward_model/pairs.jsonl"
    pairs.parent.mkdir()
    given = dict(sources=[pairs], data=str(pairs))
    for path in (pairs, tmp_path / "other.jsonl", tmp_path / "moved.jsonl"):
        path.write_text("b\n" if "other" in path.name else "a\n")
    small_stage(folder, 4, resume=True, **given)
    assert f"sft: nothing to resume in {folder}, starts from the beg" in capsys.readouterr().out
    (folder / "unfinished/comparisons").write_text("of the run that is then dropped")
    small_stage(folder, 4, **given)
    assert "sft: starts from the beginning and drops an unfinished run" in capsys.readouterr().out
    found = snapshot(folder)
    kept = []
    for changed, message in (
            (dict(lr=0.5), "the run began with --lr 0.002, not 0.5; resume it with its settings"),
            (dict(data=str(tmp_path / "other.jsonl")), "the run began with --data of checksum "),
            (dict(sources=[]), "the run began with another reward_model/pairs.jsonl; start again"),
            (dict(stage="ppo"), "is the state of a run of sft, but ppo is wanted; start again")):
        with pytest.raises(InputError, match=f"unfinished/state.pt: {message}") as error:
            small_stage(folder, resume=True, **{**given, **changed})
        kept.append(error)
    with lock_folder(folder):
        for resume in (False, True):
            with pytest.raises(InputError, match="another run is using this folder; wait for it"):
                small_stage(folder, resume=resume, **given)
    assert snapshot(folder) == found
    given["data"] = str(tmp_path / "moved.jsonl")
    small_stage(folder, resume=True, **given, report=7, micro_batch=5, sample_batch=7)
    check_finished(folder, small)
    with pytest.raises(InputError, match="checkpoint.pt: is finished, nothing to resume"):
        small_stage(folder, resume=True)


class Evil:
    """A pickle that runs code: it prints something."""

    def __reduce__(self):
        return print, ("code runs",)


def torch_bytes(values, **options):
    buffer = io.BytesIO()
    torch.save(values, buffer, **options)
    return buffer.getvalue()


def test_a_damaged_checkpoint_is_refused(tmp_path, capsys):
    """A bad disk, a copy that broke off, a stranger's file: a traceback, code run, or hours of
    training on weights that were never saved. Refused in one line, or loaded as it was."""
    path = tmp_path / "checkpoint.pt"
    tokenizer = Tokenizer(train_vocabulary("the fox and the kite and the fox", 262))
    model = gpt.GPT(gpt.GPTConfig(tokenizer.n_vocab, 4, 1, 1, 4))
    gpt.save_checkpoint(path, "sft", "cpu", model, tokenizer)
    values = read_torch(path)
    whole = path.read_bytes()
    rng = random.Random("damage")
    size = len(whole)
    directory = whole.index(b"PK\x01\x02")
    contents = [whole[:length] for length in (0, directory, size - 1, *rng.sample(range(size), 5))]
    # Anywhere; what the archive says of its first record; how it ends.
    for place in [*rng.sample(range(size), 30), *range(directory, directory + 46, 2),
                  *range(size - 98, size, 4)]:
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        contents.append(bytes(changed))
    for name in values:     # of another version
        contents.append(torch_bytes({key: x for key, x in values.items() if key != name}))
    contents.append(torch_bytes(Evil(), _use_new_zipfile_serialization=False))
    contents.append(torch_bytes({**values, "model": Evil()}))
    for content in contents:
        path.write_bytes(content)
        try:
            assert torch_bytes(gpt.load_checkpoint(path, "sft", "cpu")[2]) == torch_bytes(values)
        except InputError as error:
            assert path.name in str(error) and "\n" not in str(error)
    assert "code runs" not in capsys.readouterr().out
    pickle.loads(pickle.dumps(Evil()))      # where it is let
    assert "code runs" in capsys.readouterr().out
