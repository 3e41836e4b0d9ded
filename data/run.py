"""What every stage script needs and no algorithm does: the command line, the screen, a run's files.

A stage's folder OUT/SIZE/STAGE holds what its last finished run left, all of one run:

    checkpoint.pt  metrics.jsonl    and what else the stage writes (reward_model.py: comparisons)
    unfinished/                     a run that is not over: its state.pt for --resume, labels.jsonl
                                    (what a program has answered so far as a judge), its other files
    finished/                       a run that was killed while its files were being moved up
    lock                            held by the one process that may write here

Nothing in this file knows what a GPT is.
"""

import argparse
import contextlib
import errno
import importlib
import importlib.util
import inspect
import io
import math
import os
import pickle
import re
import shutil
import signal
import sys
import time
import typing
import zipfile
import zlib
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch

from data.files import (InputError, checksum, is_out_of_memory, lock_folder, write_atomic,
                        write_jsonl)

try:
    import resource
except ImportError:  # Windows has none
    resource = None

# --------------------------------------------------------------------------------------------------
# The command line


class Parser(argparse.ArgumentParser):
    """An error is one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def positive(text):
    """An int above 0, as the type of a Parser's argument."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be positive")
    return int(text)


def parse_config(Config, gpu, argv, description, needs={}, presets={}):
    """Build a Config from the command line. Every field is a flag; the comment on its line is its
    help.

    gpu: what --size gpu changes of the defaults; presets: {flag: {its value: what this changes of
    them, also of gpu's}}; needs: {flag: (another flag, values)}: the flag means something only
    where the other one has one of these values or, where none is listed, is set at all ("": is not
    set).
    config.given: the names of the flags on the command line. Fields must have the type int, float,
    str, bool or a Literal of strings, whose values are the flag's choices. A text whose metadata
    has "alone" may be given without a value and is that then. TypeError, a bug of ours, for a field
    without a comment.
    """
    comments = field_comments(Config)
    parser = Parser(description=description, allow_abbrev=False)
    for field in fields(Config):
        if not comments.get(field.name):
            raise TypeError(f"{Config.__module__}.{Config.__name__}.{field.name} has no comment on "
                            "its line to be its help")

        defaults = [repr(field.default)]
        if field.name in gpu:
            defaults.append(f"gpu: {gpu[field.name]!r}")
        for rows in presets.values():
            for value, changed in rows.items():
                if field.name in changed:
                    defaults.append(f"{value}: {changed[field.name]!r}")
        text = f"{comments[field.name]} (default: {'; '.join(defaults)})".replace("%", "%%")

        flag = f"--{field.name}"
        if field.type is bool:
            parser.add_argument(flag, default=None, help=text,
                                action=argparse.BooleanOptionalAction)
        elif typing.get_origin(field.type) is typing.Literal:
            parser.add_argument(flag, default=None, help=text, choices=typing.get_args(field.type))
        elif "alone" in field.metadata:
            parser.add_argument(flag, default=None, help=text, nargs="?",
                                const=field.metadata["alone"])
        else:
            parser.add_argument(flag, default=None, help=text, type=field.type)

    given = {}
    for name, value in vars(parser.parse_args(argv)).items():
        if value is not None:
            given[name] = value
    preset = {}
    for flag, rows in presets.items():
        preset.update(rows.get(given.get(flag, getattr(Config, flag)), {}))

    check_needs(Config, given, preset, needs)

    size = given.get("size", "auto")
    if size == "auto":
        size = "gpu" if torch.cuda.is_available() else "cpu"
    values = dict(preset)
    if size == "gpu":
        values = {**gpu, **preset}
    values.update(given)
    values["size"] = sys.intern(size)  # see Run.figures
    config = Config(**values)
    check_values(config, given)
    config.given = tuple(given)
    return config


def field_comments(Config):
    """{field: its comment}. A comment alone on a line, indented further than the fields, continues
    the one above it; one indented as the fields are is a heading."""
    comments = {}
    name = None
    for line in inspect.getsource(Config).splitlines():
        code, sign, comment = line.partition("#")
        field = re.match(r"    (\w+): ", code)
        if field:
            name = field[1]
        if sign and name and not (code == "    "):
            comments[name] = f"{comments.get(name, '')} {comment.strip()}".strip()
    return comments


def check_needs(Config, given, preset, needs):
    """InputError for a flag that was given although it means nothing here (see parse_config)."""
    for name, (other, *values) in needs.items():
        if name not in given:
            continue
        found = given.get(other, preset.get(other, getattr(Config, other)))
        if values == [""] and found:
            raise InputError(f"--{name} {given[name]}: cannot be used with --{other}")
        if values and values != [""] and found not in values:
            raise InputError(f"--{name} {given[name]}: goes with --{other} {' or '.join(values)} "
                             "only")
        if not values and not found and given.get(other) != "":  # an empty one is refused later
            raise InputError(f"--{name} {given[name]}: goes with --{other} only")


def refuse_flags(config, names, why):
    """InputError if one of these flags was given: a flag is used or refused, never ignored."""
    for name in names:
        if name in config.given:
            raise InputError(f"--{name} {getattr(config, name)}: {why}")


def allow_flags(config, names, job):
    """InputError if a flag was given that this job, named by its flag, has no use for."""
    others = [name for name in config.given if name not in names and name != job]
    refuse_flags(config, others, f"cannot be used with --{job}")


# With 0 these would make a run end as it began, without a word.
NEVER_ZERO = ("lr", "clip", "value_clip", "penalty", "penalty_target")


def check_values(config, given):
    """InputError for a number out of range, or a text that is empty."""
    for field in fields(config):
        value = getattr(config, field.name)
        least = 0 if field.name == "seed" or field.default == 0 else 1
        if field.type is int and value < least:
            raise InputError(f"--{field.name} {value}: must be positive")
        if field.name == "seed" and value >= 2 ** 63:
            raise InputError(f"--seed {value}: is too large; 63 bits are the most")
        if field.type is float and (not math.isfinite(value) or value < 0 <= field.default):
            raise InputError(f"--{field.name} {value}: must be a number, and not negative")
        if field.name == "temperature" and value < 1e-4:
            raise InputError(f"--temperature {value}: must be at least 0.0001; --top_k 1 is greedy")
        if field.name in NEVER_ZERO and value == 0:
            raise InputError(f"--{field.name} {value}: must be positive; with 0 nothing is learnt")
        if given.get(field.name) == "":  # an unset shell variable must not mean another job
            raise InputError(f"--{field.name}: is empty; leave the flag out or give it a value")


def stage_folder(config, stage):
    """out/<size>/<stage>: where a stage keeps its checkpoint, metrics.jsonl and data."""
    return Path(config.out) / config.size / stage


def check_name(name, stage, flag="name"):
    """A run's --name begins with its stage: no run can overwrite another stage's folder."""
    if not re.fullmatch(rf"{stage}[\w.-]*", name):
        raise InputError(f"--{flag} {name}: must be {stage}, or {stage} and letters, digits, '.', "
                         "'_' or '-' behind it")


def kind_of_policy(name):
    """The stage that trained the policy in a folder: "ppo", "dpo", "rsft" or "" (none of them)."""
    for stage in ("ppo", "dpo", "rsft"):
        if name.startswith(stage):
            return stage
    return ""


def refuse_stale(folder):
    """InputError if the checkpoint in a stage's folder was made from other checkpoints than those
    in the folders beside it now: a model would be measured against what it never saw. Of other
    comparisons a line is printed only: policies of several judges may be compared."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return
    with refused_if_broken(path, "train the stage again"):
        checkpoint = read_torch(path)
        made_from = checkpoint.get("made_from", {})
    advice = f"train {folder.name} again"
    if checkpoint.get("loaded"):
        advice = f"load {folder.name} again, if it is a policy of this one"
    for name, found in made_from.items():
        source = folder.parent / name
        if not source.exists() or checksum(source) == found:
            continue
        if source.name == "pairs.jsonl":
            print(f"note    {folder.name} was made from other comparisons than {source} has now",
                  flush=True)
        else:
            raise InputError(f"{path}: was made from another {source}; {advice}")


# How each stage is trained: its script, and the flag that chooses it there.
COMMANDS = {"gpt": "gpt", "sft": "sft", "reward_model": "reward_model",
            "process_model": "reward_model --process", "ppo": "ppo", "dpo": "dpo",
            "rsft": "best_of_n --finetune per_prompt"}

# At size cpu, on two cores.
MINUTES = {"gpt": 2.0, "sft": 1.0, "reward_model": 2.0, "process_model": 2.0, "ppo": 2.0,
           "dpo": 2.5, "best_of_n": 1.5, "rsft": 3.0}


def train_missing(config, needed, stage):
    """Before a stage begins: train what it builds on and is missing, with this run's size, folder
    and seed.

    needed: the names of those stages, in order. What comes before the last checkpoint that exists
    is not asked for. InputError if one of them is stale.
    """
    for name in [*needed, stage]:
        complete(stage_folder(config, name))
    for name in needed:
        refuse_stale(stage_folder(config, name))

    missing = []
    for name in reversed(needed):
        if (stage_folder(config, name) / "checkpoint.pt").exists():
            break
        missing.insert(0, name)
    if not missing:
        return

    plan = f"plan    {' → '.join([*missing, stage])}"
    if config.size == "cpu":
        minutes = sum(MINUTES[name] for name in missing)
        minutes += sum(MINUTES[name] for name in MINUTES if stage.startswith(name))
        plan += f", about {minutes:.0f} minutes on two cores"
    print(plan, flush=True)

    flags = ["--size", config.size, "--out", config.out, "--seed", str(config.seed)]
    if config.resume:
        flags.append("--resume")
    for name in missing:
        script, *choice = COMMANDS[name].split()
        importlib.import_module(script).main(flags + choice)


# --------------------------------------------------------------------------------------------------
# The screen


def announce(stage, config, device, data, model):
    """The first lines of every stage: device, size, data and where it saves."""
    where = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
        if not gpu_has_bf16():
            where += " in float32, for it has no bf16"
    parameters = sum(p.numel() for p in model.parameters())
    print(f"\n== {stage} ==\n"
          f"device  {where}, size {config.size}, seed {config.seed}\n"
          f"model   {parameters:,} parameters, context {model.config.block_size}\n"
          f"data    {data}\n"
          f"saves   {stage_folder(config, stage)}", flush=True)


def gpu_has_bf16():
    """Whether the GPU computes in bf16, and not by an emulation, which is slow: those from 2020 on
    (Ampere) do, a T4, GTX 16xx or RTX 20xx does not."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def show_models(trained, pieces={}, **models):
    """How many models a stage holds (None: it has none), in how much memory, and what it takes to
    run them. trained: the names of those that learn; pieces: {what runs at once: its bytes}, see
    gpt.memory_of_pieces. InputError if the GPU has less than the models need."""
    held = []
    size = 0
    for name, model in models.items():
        if model is None:
            continue
        held.append(name)
        copies = 4 if name in trained else 1  # itself, its gradient, Adam's two moments
        size += copies * sum(x.numel() * x.element_size() for x in model.parameters())
    megabytes = size / 2 ** 20
    print(f"models in memory: {len(held)} ({', '.join(held)}), {megabytes:.0f} MB with gradients "
          "and optimizer", flush=True)
    if pieces:
        parts = [f"{count / 2 ** 20:,.0f} MB for {what}" for what, count in pieces.items()]
        print(f"besides, where texts fill the context, about {', '.join(parts)}", flush=True)

    if torch.cuda.is_available():
        room = torch.cuda.get_device_properties(0).total_memory
        if size > room:
            raise InputError(f"{len(held)} models of {megabytes:.0f} MB do not fit the GPU's "
                             f"{room / 2 ** 20:.0f}: begin with a smaller GPT-2, or export the "
                             "stages and continue on several GPUs (README)")
        if size + max(pieces.values(), default=0) > room:
            print(f"note    the GPU has {room / 2 ** 20:,.0f} MB: if they run out, lower "
                  "--micro_batch or --sample_batch", flush=True)


def show(*lines):
    """Print (label, text) pairs, the texts in one column."""
    for label, text in lines:
        print(f"{label:9s}" + text.replace("\n", "\n" + 9 * " "), flush=True)


def counts(dropped):
    """{reason: number} as text: "0 equal texts, 3 longer than the context"."""
    return ", ".join(f"{number} {reason}" for reason, number in dropped.items())


def doublings(first, total):
    """A learning curve's numbers: first, twice first, ... as far as they are below total, and
    total.

    >>> doublings(256, 1000)
    [256, 512, 1000]
    """
    numbers = []
    number = first
    while number < total:
        numbers.append(number)
        number *= 2
    return numbers + [total]


def with_error(share, count):
    """A share of `count` independent cases in per cent, with its standard error.

    >>> with_error(0.8, 100)
    '80.0 ± 4.0 %'
    """
    return f"{100 * share:.1f} ± {100 * math.sqrt(share * (1 - share) / count):.1f} %"


def progress(what, total):
    """A function to call with the number done so far: it prints that and the time left, and at
    `total` the time it took.

    On a terminal one line is written over and over, twice a second; elsewhere a line every 30 s.
    """
    terminal = sys.stdout.isatty()
    began = time.perf_counter()
    shown = began
    interval = 0.5 if terminal else 30

    def report(done):
        nonlocal shown
        now = time.perf_counter()
        if done < total and now - shown <= interval:
            return
        shown = now
        if done >= total:
            line = f"{what}: {total:,} in {now - began:.0f} s"
        elif done == 0:
            line = f"{what}: 0 of {total:,}"
        else:
            left = clock((now - began) * (total - done) / done)
            line = f"{what}: {done:,} of {total:,}, {left} left"
        if terminal:
            end = "\n" if done >= total else ""
            print(f"\r{line:<70s}", end=end, flush=True)
        else:
            print(line, flush=True)

    return report


def clock(seconds):
    """Seconds as minutes:seconds.

    >>> clock(125.4)
    '2:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def peak_memory():
    """{"memory_mb": MB}: on a GPU the most that was allocated there, else the most that the process
    has held. Empty where the system does not say (Windows)."""
    if torch.cuda.is_available():
        return {"memory_mb": torch.cuda.max_memory_allocated() / 2 ** 20}
    if resource is None:
        return {}
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10  # bytes there, kilobytes elsewhere
    return {"memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}


# How a figure is printed, in a row of 100 columns; all others with three decimals. metrics.jsonl
# has them in full.
FORMATS = {"lr": ".1e", "excess": ".1%", "accuracy": ".1%", "held_out_accuracy": ".1%",
           "reward": ".2f", "gold": ".2f", "kl": ".2f", "J": ".2f", "entropy": ".2f",
           "clip_fraction": ".1%", "value_explained": ".2f", "length": ".0f", "no_end": ".0%",
           "margin": ".2f", "chosen_log_ratio": ".2f", "rejected_log_ratio": ".2f",
           "grad_norm": ".2f"}

# Figures that depend on the machine: a checkpoint does not keep them, so one seed gives one file.
OF_THE_MACHINE = ("seconds", "rollout_s", "scoring_s", "update_s", "memory_mb")


# --------------------------------------------------------------------------------------------------
# A run


class SilentRun:
    """The steps of a training loop and their figures, without a folder: for tests and learning
    curves.

        for step in run.steps(total, model=model, optimizer=optimizer):
            ...
            run.log(step, loss=loss)
            if run.due(step):
                run.log(step, held_out=held_out_loss(...))

    report: steps between two rows of figures (None: one row, at the end of a loop). total: the
    steps of all loops, for a run that has several; they continue counting.
    """

    def __init__(self, report=None, total=None):
        self.report = report
        self.total = total
        self.before = 0     # steps of the loops before this one
        self.last = 0       # the step at which this loop ends
        self.step = 0       # steps done
        self.rows = []
        self.pending = {}   # name -> [(figure, weight)] since the last row: numbers, or tensors
        self.start = time.perf_counter()
        self.since = self.start

    def steps(self, total, **state):
        """Yield 0 to total - 1, each when the step before is done.

        state: all that a step depends on and changes, by name: models, optimizers, and dicts of
        numbers, which a Run saves and restores in place.
        """
        if self.total is None:
            self.total = total
        self.last = self.before + total
        self.begin_loop(state)
        while self.step < self.last:
            self.since = time.perf_counter()
            step = self.step - self.before
            yield step
            self.step += 1
            if self.due(step) and self.pending:
                self.add_row(self.averages())
            self.end_step(state)
        self.before = self.last

    def begin_loop(self, state):
        """A Run restores here."""

    def end_step(self, state):
        """A Run saves here."""

    def log(self, step, weight=1.0, **figures):
        """Keep figures, numbers or scalar tensors; a row has their mean since the last row.

        weight: what they count for in that mean, a number or a scalar tensor: a micro-batch's share
        of its batch, or its tokens. Tensors are read only when a row is made: a GPU need not be
        waited for at every step.
        """
        for name, value in figures.items():
            if torch.is_tensor(value):
                value = value.detach()
            self.pending.setdefault(name, []).append((value, weight))

    def due(self, step):
        """Whether a row is made after this step: every `report` steps, and at the end of a loop."""
        done = self.before + step + 1
        return done == self.last or (self.report is not None and done % self.report == 0)

    def time(self, name):
        """Log the seconds since the step began, or since the last call."""
        now = time.perf_counter()
        self.pending.setdefault(name, []).append((now - self.since, 1.0))
        self.since = now

    def note(self, text):
        """Tell something that deserves attention, once in a run. A SilentRun does not."""

    def averages(self):
        """The weighted mean of every figure since the last row."""
        row = {}
        for name, values in read_numbers(self.pending).items():
            total = sum(value * weight for value, weight in values)
            row[name] = total / sum(weight for _, weight in values)
        self.pending = {}
        return row

    def add_row(self, row):
        self.record(**row)

    def record(self, **figures):
        """Keep a row without printing it. seconds: since the run began, pauses not counted."""
        seconds = round(time.perf_counter() - self.start, 2)
        self.rows.append({"step": self.step, **figures, "seconds": seconds, **peak_memory()})


# What --resume may change. micro_batch: the gradient is the same, but for rounding; sample_batch:
# what memory runs out with (of comparisons and best-of-N's samples others are drawn, as many at a
# time share a seed); report and save: how often.
MAY_CHANGE = ("micro_batch", "sample_batch", "report", "save")


class Run(SilentRun):
    """A training stage's run in its folder: a lock, metrics.jsonl, and state.pt for --resume.

        with Run("sft", folder, config, config.report, [base_path]) as run:
            fine_tune(..., run)     # its loop is a SilentRun's; here it begins where it was stopped
            save_checkpoint(run.folder / "checkpoint.pt", ..., metrics=run.figures())
            run.finish()

    run.folder is folder/unfinished: until finish(), what an earlier run left in the folder stays
    whole. Everything before the loop is deterministic given the settings, so it is recomputed on
    resume; the state holds only what the loop changes. sources: files of earlier stages, without
    which the run can't continue as it began; save: steps between two saves of the state (None: as
    often as rows); unprinted: figures that go to metrics.jsonl only.
    """

    def __init__(self, stage, folder, config, report, sources=(), total=None, save=None,
                 unprinted=()):
        super().__init__(report, total)
        self.stage = stage
        self.home = folder
        self.folder = folder / "unfinished"
        self.path = self.folder / "state.pt"
        self.config = config
        self.sources = sources
        self.save = save or report
        self.unprinted = unprinted
        self.header = False
        self.pace = None            # (step, time) after the first step of this process
        self.inside_loop = False
        self.notes = []
        self.interrupted = False

    # ---- beginning and end

    def __enter__(self):
        self.home.mkdir(parents=True, exist_ok=True)
        self.lock = lock_folder(self.home)
        try:
            self.begin()
        except BaseException:
            self.lock.close()
            raise
        self.handler = signal.signal(signal.SIGINT, self.interrupt)
        return self

    def begin(self):
        """Read the state of the run to resume, or write that of one that begins."""
        self.start = time.perf_counter()
        move_finished(self.home)

        settings = {}
        for name, value in asdict(self.config).items():
            if name not in ("resume", "out"):
                settings[name] = value
        for name in ("text", "data"):  # the same file may have another name, and change under it
            if settings.get(name):
                settings[name] = f"of checksum {checksum(settings[name]):08x}"
        sources = {}
        for path in self.sources:
            sources[f"{path.parent.name}/{path.name}"] = checksum(path)

        self.saved = dict(stage=self.stage, settings=settings, sources=sources, step=0, seconds=0.0,
                          rows=[], pending={}, state={})
        if self.path.exists() and self.config.resume:
            self.saved = self.read_state()
            self.rows = self.saved["rows"]
            self.start -= self.saved["seconds"]
            print(f"{self.stage}: continues after step {self.saved['step']}", flush=True)
        elif self.config.resume and (self.home / "checkpoint.pt").exists():
            raise InputError(f"{self.home / 'checkpoint.pt'}: is finished, nothing to resume; "
                             "without --resume it is trained again")
        else:
            if self.config.resume:
                print(f"{self.stage}: nothing to resume in {self.home}, starts from the beginning",
                      flush=True)
            elif self.path.exists():
                print(f"{self.stage}: starts from the beginning and drops an unfinished run "
                      "(--resume would continue it)", flush=True)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
        self.write_metrics()
        write_torch(self.path, self.saved)

    def read_state(self):
        """The saved state. InputError if it is damaged, or that of a run with other settings."""
        with refused_if_broken(self.path, "start again without --resume"):
            found = read_torch(self.path)
            for name, value in self.saved.items():
                if type(found[name]) is not type(value):
                    raise ValueError("its values are not those of a run")
            if found["step"] < 0:
                raise ValueError("its values are not those of a run")

            if found["stage"] != self.stage:
                raise InputError(f"{self.path}: is the state of a run of {found['stage']}, but "
                                 f"{self.stage} is wanted; start again without --resume")
            for name, value in self.saved["settings"].items():
                before = found["settings"].get(name)
                if before != value and name not in MAY_CHANGE:
                    raise InputError(f"{self.path}: the run began with --{name} {before}, not "
                                     f"{value}; resume it with its settings, or start again "
                                     "without --resume")
            for name in {**self.saved["sources"], **found["sources"]}:
                if found["sources"].get(name) != self.saved["sources"].get(name):
                    raise InputError(f"{self.path}: the run began with another {name}; start again "
                                     "without --resume")
            for row in found["rows"]:
                check_numbers("rows", row.values())
            for values in found["pending"].values():
                for value, weight in values:
                    check_numbers("figures", [value, weight])
        return found

    def __exit__(self, kind, error, traceback):
        signal.signal(signal.SIGINT, self.handler)
        self.lock.close()
        if kind is FloatingPointError:
            last = "none yet"
            if self.rows:
                figures = self.rows[-1].items()
                last = ", ".join(f"{name} {value:.4g}" for name, value in figures)
            raise FloatingPointError(f"{self.stage}, step {self.step + 1}: {error}; last figures: "
                                     f"{last}") from error

    def finish(self):
        """All files are written: they replace those of the run before, and nothing is left to
        resume."""
        os.rename(self.folder, self.home / "finished")  # from here on the run is over
        move_finished(self.home)
        if len(self.rows) > 1 and importlib.util.find_spec("matplotlib"):
            print(f"picture python assets/figures.py --run {self.home}", flush=True)

    # ---- steps

    def begin_loop(self, state):
        """Load what was saved into models, optimizers and dicts of numbers, if that was in this
        loop: a later one may begin with other ones."""
        done = self.saved["step"]
        with refused_if_broken(self.path, "start again without --resume"):
            if done > self.total:
                raise ValueError(f"it is at step {done} of {self.total}")
            if self.before < done <= self.last:
                self.pending = self.saved["pending"]
                for name, x in state.items():
                    found = self.saved["state"][name]
                    if hasattr(x, "load_state_dict"):
                        x.load_state_dict(found)
                    else:
                        check_numbers(name, found.values())
                        if found.keys() != x.keys() or not all(map(math.isfinite, found.values())):
                            raise ValueError(f"its {name} are not those of a run")
                        x.update(found)
        self.step = max(self.step, min(done, self.last))
        self.inside_loop = self.step < self.last

    def end_step(self, state):
        """Save the state when it is due. KeyboardInterrupt, once all is saved, after Ctrl-C."""
        if self.pace is None:
            self.pace = (self.step, time.perf_counter())
        due = self.step % self.save == 0 or self.step == self.last or self.interrupted
        if due:
            found = {}
            for name, x in state.items():
                found[name] = x.state_dict() if hasattr(x, "state_dict") else x
            write_torch(self.path, {**self.saved, "step": self.step, "rows": self.rows,
                                    "seconds": time.perf_counter() - self.start,
                                    "pending": read_numbers(self.pending), "state": found})
        self.inside_loop = self.step < self.last
        if due and self.interrupted:  # Ctrl-C since then: after the next step
            raise KeyboardInterrupt(f"{self.stage}: saved after step {self.step} of {self.total}; "
                                    "--resume continues")

    def interrupt(self, number, frame):
        """Ctrl-C: finish the current step and save; outside of the loop, or pressed twice, stop at
        once."""
        if self.interrupted or not self.inside_loop or self.step == 0:
            raise KeyboardInterrupt
        self.interrupted = True
        print(f"\n{self.stage}: stops after this step (press again to stop at once)", flush=True)

    # ---- figures

    def note(self, text):
        """Print a line, once in a run."""
        if text not in self.notes:
            self.notes.append(text)
            print(f"note    {text}", flush=True)

    def add_row(self, row):
        """Keep and print a row, name -> number. Names are printed once, above the columns, split at
        the last "_"; left is the time still needed."""
        self.record(**row)
        columns = []  # (first line of the head, second line, width, text)
        for name, value in row.items():
            if name not in self.unprinted:
                first, _, second = name.rpartition("_")
                width = max(7, len(first), len(second))  # -123.45 and 1.5e-05 fit
                columns.append((first, second, width, f"{value:{FORMATS.get(name, '.3f')}}"))

        if not self.header:
            self.header = True
            upper = "".join(f"  {first:>{width}s}" for first, _, width, _ in columns)
            lower = "".join(f"  {second:>{width}s}" for _, second, width, _ in columns)
            print(f"{9 * ' '}{upper.rstrip()}\n     step{lower}   left")
        step, since = self.pace or (0, self.start)
        pace = (time.perf_counter() - since) / max(1, self.step - step)
        left = clock(pace * (self.total - self.step))
        cells = "".join(f"  {text:>{width}s}" for _, _, width, text in columns)
        print(f"{self.step:4d}/{self.total:<4d}{cells}  {left:>5s}", flush=True)

    def record(self, **figures):
        """Keep a row, in metrics.jsonl too."""
        super().record(**figures)
        self.write_metrics()

    def made_from(self):
        """{file in a folder beside this one: its checksum}, of the earlier stages' checkpoints and
        comparisons, which the run's own checkpoint keeps."""
        found = {}
        for path in self.sources:
            beside = path.parent.resolve().parent == self.home.resolve().parent
            if beside and path.name in ("checkpoint.pt", "pairs.jsonl"):
                name = f"{path.parent.name}/{path.name}"
                found[name] = self.saved["sources"][name]
        return found

    def figures(self):
        """The rows without what depends on the machine: what a checkpoint keeps."""
        rows = []
        for row in self.rows:
            # A pickle writes equal texts once if they are one object. They are not where one was
            # read from a file: after --resume the checkpoint would be another file.
            rows.append({sys.intern(name): value for name, value in row.items()
                         if name not in OF_THE_MACHINE})
        return rows

    def write_metrics(self):
        """Write all rows so far, atomically: a killed run leaves no half line, a resumed one
        repeats none."""
        write_jsonl(self.folder / "metrics.jsonl", self.rows)


def read_numbers(pending):
    """Pending figures as numbers: {name: [(figure, weight)]}."""
    numbers = {}
    for name, values in pending.items():
        numbers[name] = [(float(value), float(weight)) for value, weight in values]
    return numbers


def check_numbers(name, values):
    """ValueError unless all values are numbers; a figure may be infinite."""
    for value in values:
        if not isinstance(value, (int, float)):
            raise ValueError(f"its {name} are not numbers")


def move_finished(folder):
    """Move a finished run's files up into the folder, whose lock the caller holds."""
    finished = folder / "finished"
    if finished.exists():
        for name in ("state.pt", "labels.jsonl"):
            (finished / name).unlink(missing_ok=True)
        for path in sorted(finished.iterdir()):
            os.replace(path, folder / path.name)
        finished.rmdir()


def complete(folder):
    """Call this before reading a stage's files: it completes a run that was killed while its files
    were being moved up."""
    if (folder / "finished").exists():
        with lock_folder(folder):
            move_finished(folder)


def forget_rounds(folder, name, rounds):
    """Remove the files NAME-N.jsonl of rounds N > rounds: an earlier run had more of them."""
    for path in folder.glob(f"{name}-*.jsonl"):
        number = path.stem.removeprefix(f"{name}-")
        if number.isdecimal() and int(number) > rounds:  # else the file is somebody else's
            path.unlink()


# --------------------------------------------------------------------------------------------------
# Files


def write_torch(path, values):
    """torch.save, atomic."""
    buffer = io.BytesIO()  # torch.save to a file that has no room says so in forty lines
    torch.save(values, buffer)
    write_atomic(path, buffer.getvalue())


def read_torch(path):
    """What write_torch wrote, every record's checksum verified; a pickle that would run code is
    refused."""
    with zipfile.ZipFile(path) as archive:  # torch's format is a zip archive
        for record in archive.infolist():
            # No checksum covers these two: torch would skip a record with such attributes, and
            # never compresses one.
            if record.external_attr or record.compress_type:
                raise zipfile.BadZipFile("checksum error")
        if archive.testzip():
            raise zipfile.BadZipFile("checksum error")
    return torch.load(path, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def refused_if_broken(path, advice, of="this project"):
    """Whatever a damaged file makes torch or us raise becomes an InputError, one line with its
    name. Only what is damaged is called so: a file that can't be read may be good, and memory that
    runs out (see run_script) says nothing about it."""
    try:
        yield
    except InputError:
        raise
    except (zipfile.BadZipFile, pickle.UnpicklingError, OSError, RuntimeError, ValueError,
            LookupError, TypeError, EOFError, ArithmeticError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        # Where a damaged archive has the reader seek before the start of the file: EINVAL.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            message = f"{error.filename or path}: cannot be read: {error.strerror}"
            raise InputError(message) from error
        reason = type(error).__name__
        if str(error):
            reason = str(error).splitlines()[0]
        message = f"{path}: not a whole file of {of} ({reason}); delete it and {advice}"
        raise InputError(message) from error


def memory_mapped(path, draw, joined=False):
    """The sequences of ids that draw() yields, as views of a memory-mapped file (joined: as one).
    Where the file exists, draw is not called. They are never in memory together.

    The file holds int32s: all tokens, the length of each sequence, the number of sequences; then a
    checksum. Atomic.
    """
    def write(file):
        lengths = []
        crc = 0
        for ids in draw():
            lengths.append(len(ids))
            data = np.array(ids, dtype=np.int32).tobytes()
            crc = zlib.crc32(data, crc)
            file.write(data)
        data = np.array(lengths + [len(lengths)], dtype=np.int32).tobytes()
        crc = zlib.crc32(data, crc)
        file.write(data + crc.to_bytes(4, "little"))

    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, write)
    with refused_if_broken(path, "run the stage again"):
        content = np.memmap(path, np.uint8, mode="r")
        if zlib.crc32(content[:-4]) != int.from_bytes(content[-4:].tobytes(), "little"):
            raise ValueError("checksum error")

        # Copy on write: torch wants to be able to write.
        data = np.memmap(path, np.int32, mode="c", shape=len(content) // 4 - 1)
        count = data[-1]
        tokens = data[:len(data) - 1 - count]
        if joined:
            return [tokens]
        sequences = []
        start = 0
        for length in data[len(tokens):-1].tolist():
            sequences.append(tokens[start:start + length])
            start += length
        return sequences
