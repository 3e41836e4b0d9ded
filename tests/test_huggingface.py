"""GPT-2 folders in and out, against files that transformers, tokenizers and safetensors wrote (huggingface/make.py)."""

import contextlib
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dpo
import gpt
import ppo
import reward_model
import sft
from data import huggingface
from data.files import InputError
from data.huggingface import read_folder, write_folder
from data.run import parse_config, show_models
from data.tokenizer import Tokenizer, train
from gpt import load_checkpoint, pad
from helpers import snapshot, tiny_gpt, tiny_reward_model

FOLDERS = Path(__file__).parent / "huggingface"
folders = pytest.mark.parametrize("folder", [FOLDERS / "published", FOLDERS / "saved"], ids=lambda folder: folder.name)
SIZE = ["--size", "cpu"]


@pytest.fixture
def copies(tmp_path):
    """Copies of both folders, to be damaged."""
    return shutil.copytree(FOLDERS, tmp_path / "copies", ignore=shutil.ignore_patterns("*.py", "__pycache__"))


def own_ids(folder, tokenizer):
    """The ids that the folder's own tokenizer has, for ours: {theirs: ours}."""
    _, rows = huggingface.read_tokenizer(folder)
    return {row: i for i, row in enumerate(rows)}


def refused(folder, match):
    """Reading the folder ends in one line that matches, and names a file in it."""
    with pytest.raises(InputError, match=match) as error:
        read_folder(folder)
    message = str(error.value)
    assert str(folder) in message and "\n" not in message and len(message) < len(str(folder)) + 300


# ----------------------------------------------------------------------------------------------------------------------
# In


@folders
def test_logits_are_those_of_transformers(folder, tmp_path):
    """A matrix left untransposed, GELU without tanh, rows of the embedding in another order: all of them still sample."""
    gpt.main([*SIZE, "--out", str(tmp_path), "--load", str(folder)])
    model, tokenizer, _ = load_checkpoint(tmp_path / "cpu" / "gpt" / "checkpoint.pt", "gpt", "cpu")
    ours = own_ids(folder, tokenizer)
    theirs = range(len(ours) - (None in ours))
    tokens = torch.tensor([[ours[i] for i in theirs[3::40]]])
    with torch.no_grad():
        logits = model(tokens)[0, :, [ours[i] for i in theirs]].numpy()
    np.testing.assert_allclose(logits, np.load(folder / "logits.npy"), atol=1e-5)


@folders
def test_ids_are_those_of_transformers(folder):
    """Merges in another order, a pattern without contractions, white space cut at 64: ids that the weights never saw."""
    _, _, tokenizer, _ = read_folder(folder)
    ours = own_ids(folder, tokenizer)
    for text, ids in json.loads((folder / "expected.json").read_text()):
        assert tokenizer.encode(text) == [ours[i] for i in ids], repr(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    blanks = "x" + " " * 150_000 + "x"  # a run is one piece, however long
    assert tokenizer.encode(blanks) == tokenizer._encoding.encode_ordinary(blanks)
    for text in (" " * 700_000, "x" + "\n" * 700_000 + "x"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@folders
def test_special_rows(folder):
    """<|endoftext|> is what ends a text in GPT-2; a new token whose row is 0 or noise may be the likeliest of all."""
    shape, weights, tokenizer, begins = read_folder(folder)
    table = weights["wte.weight"]
    assert len(table) == tokenizer.n_vocab == shape["vocab_size"] and begins
    old = torch.cat([table[:tokenizer.user_token], table[tokenizer.end_token:]])
    assert torch.equal(table[tokenizer.user_token], table[tokenizer.assistant_token])
    torch.testing.assert_close(table[tokenizer.user_token], old.mean(dim=0))
    raw = huggingface.read_weights(folder)[1]["wte.weight"].float()
    vocab = json.loads((folder / "vocab.json").read_text()) if folder.name == "published" else {"<|endoftext|>": 0}
    assert torch.equal(table[tokenizer.end_token], raw[vocab["<|endoftext|>"]])


def test_other_containers(copies):
    """The weights as pytorch_model.bin, new and old, with a prefix, with a copy of the tied head, and as float16."""
    folder = copies / "published"
    _, weights, _, _ = read_folder(folder)
    weights = {name: x.clone() for name, x in weights.items()}
    path, raw = huggingface.read_weights(folder)
    raw = {name: x.clone() for name, x in raw.items()}
    path.unlink()
    for new in (True, False):
        torch.save({f"transformer.{name}": x for name, x in raw.items()} | {"lm_head.weight": raw["wte.weight"]},
                   folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
        _, again, _, _ = read_folder(folder)
        assert again.keys() == weights.keys() and all(torch.equal(again[name], x) for name, x in weights.items())
    torch.save({name: x.half() for name, x in raw.items()}, folder / "pytorch_model.bin")
    assert torch.equal(read_folder(folder)[1]["wpe.weight"], weights["wpe.weight"].half())


def edit(path, **changes):
    """Change some keys of a JSON file; None removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_another_architecture_is_named(copies):
    """A model that runs, but computes something else than the published one, says nothing about it."""
    folder = copies / "published"
    whole = (folder / "config.json").read_bytes()
    for changes, match in (
            (dict(model_type="gpt_neox"), "model_type is 'gpt_neox', but gpt.py's is 'gpt2'"),
            (dict(activation_function="relu"), "activation_function is 'relu'"), (dict(layer_norm_epsilon=1e-6), "epsilon"),
            (dict(tie_word_embeddings=False), "tie_word_embeddings"), (dict(n_inner=33), "n_inner"),
            (dict(n_head=3), "n_head"),
            (dict(scale_attn_by_inverse_layer_idx=True), "inverse_layer"), (dict(n_layer="2"), "n_layer is '2'"),
            (dict(n_layer=10 ** 12), "n_layer 1000000000000"), (dict(n_layer=3), "h.2.ln_1.weight is missing"),
            (dict(n_layer=1), "h.1.* none of a GPT-2's"), (dict(n_positions=8), r"wpe.weight is \(16, 8\)"),
            (dict(vocab_size=302), "vocab_size is 302"), (dict(n_embd=None), "n_embd is None")):
        edit(folder / "config.json", **changes)
        refused(folder, match)
        (folder / "config.json").write_bytes(whole)
    (folder / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    refused(folder, "tokenizer_config.json: add_prefix_space")


def test_another_tokenizer_is_named(copies):
    """A tokenizer that splits, normalizes or pads otherwise gives the weights ids that they never saw."""
    path = copies / "saved" / "tokenizer.json"
    whole = json.loads(path.read_text())
    added = whole["added_tokens"] + [{"content": "[PAD]", "id": len(whole["model"]["vocab"])}]
    merges = whole["model"]["merges"]
    for changes, match in (
            (dict(normalizer={"type": "NFC"}), "normalizer"), (dict(added_tokens=added), "the special tokens .*PAD"),
            (dict(pre_tokenizer={**whole["pre_tokenizer"], "add_prefix_space": True}), "pre_tokenizer"),
            (dict(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer"), (dict(pre_tokenizer=None), "not a whole file"),
            (dict(model={**whole["model"], "type": "Unigram"}), "type"),
            (dict(model={**whole["model"], "dropout": 0.1}), "dropout"),
            (dict(model={**whole["model"], "merges": merges[::-1]}), "not a whole file"),
            (dict(model={**whole["model"], "merges": merges[:-1]}), "the special tokens"),
            (dict(model={**whole["model"], "merges": merges + [["Ġlal", "a"]]}), "not a whole file")):
        path.write_text(json.dumps({**whole, **changes}))
        refused(copies / "saved", f"{path}: .*{match}")


def test_damaged_weights_are_named(copies):
    """A download that broke off, a part that was forgotten, a header of another file: no traceback, no model of garbage."""
    folder, rng = copies / "published", random.Random(0)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])

    def write(**changes):
        text = json.dumps({**header, **changes}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[start:])

    spans, weights = header["ln_f.bias"]["data_offsets"], read_folder(folder)[1]
    for changes, match in (
            ({"ln_f.bias": {**header["ln_f.bias"], "dtype": "F8_E4M3"}}, "the tensor ln_f.bias is F8_E4M3"),
            ({"ln_f.bias": {**header["ln_f.bias"], "shape": [2, 4]}}, r"the tensor ln_f.bias is \(2, 4\), but .* \(8,\)"),
            ({"ln_f.bias": {**header["ln_f.bias"], "shape": [9]}}, "not a whole file"),
            ({"ln_f.bias": {**header["ln_f.bias"], "data_offsets": [spans[0] - 4, spans[1] - 4]}}, "overlap"),
            ({"ln_f.bias": None}, "not a whole file"),
            ({"more": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, "the tensor more is .* none of a GPT-2's")):
        write(**changes)
        refused(folder, f"model.safetensors: .*{match}")
    for _ in range(100):
        path.write_bytes(whole[:rng.randint(0, len(whole) - 1)])
        refused(folder, "model.safetensors")
        data = bytearray(whole)
        data[rng.randrange(start)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            again = read_folder(folder)[1]
        except InputError as error:
            assert str(path) in str(error) or "n_layer" in str(error) and "\n" not in str(error)
        else:  # what changed was a mask's name or shape, or a blank
            assert again.keys() == weights.keys() and all(torch.equal(again[name], x) for name, x in weights.items())
    path.unlink()
    refused(folder, "model.safetensors: no such file")

    torch.save({"wte.weight": Path}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin: not a whole file")  # a pickle that would run code
    index = copies / "saved" / "model.safetensors.index.json"
    parts = json.loads(index.read_text())["weight_map"]
    name = next(name for name, part in parts.items() if part.startswith("model-00002"))
    edit(index, weight_map={**parts, name: "model-00001-of-00002.safetensors"})
    refused(copies / "saved", f"model-00001-of-00002.safetensors: the tensor {name} is missing")
    edit(index, weight_map=parts)
    (copies / "saved" / "model-00002-of-00002.safetensors").unlink()
    refused(copies / "saved", "model-00002-of-00002.safetensors: no such file")


def test_missing_files_are_named(copies):
    """A folder that a download left half full."""
    for name, file in (("published", "config.json"), ("published", "vocab.json"), ("published", "merges.txt"),
                       ("saved", "tokenizer.json")):
        (copies / name / file).rename(copies / "aside")
        refused(copies / name, "merges.txt|vocab.json" if file == "tokenizer.json" else file)
        (copies / "aside").rename(copies / name / file)
        read_folder(copies / name)


# ----------------------------------------------------------------------------------------------------------------------
# Out


def test_round_trip(stages, out, tmp_path):
    """What is exported and loaded again is the same model to the last bit, with the same vocabulary, temperature apart."""
    for stage in ("gpt", "sft"):
        gpt.main([*SIZE, "--out", str(out), "--export", str(tmp_path / stage), "--stage", stage])
    policy, tokenizer, _ = load_checkpoint(out / "cpu" / "sft" / "checkpoint.pt", "sft", "cpu")
    for name in ("ppo", "ppo-theirs"):
        named = ["--name", name] * (name != "ppo")
        gpt.main([*SIZE, "--out", str(out), "--load", str(tmp_path / "sft"), "--stage", "ppo", *named])
        again, other, checkpoint = load_checkpoint(out / "cpu" / name / "checkpoint.pt", "ppo", "cpu")
        assert other.vocabulary == tokenizer.vocabulary and other.pattern == tokenizer.pattern == "words"
        assert again.config == policy.config
        assert all(torch.equal(x, again.state_dict()[key]) for key, x in policy.state_dict().items())
    before = snapshot(out)
    for flags, match in ((["--load", str(FOLDERS / "saved"), "--stage", "dpo"], "its vocabulary is not that of"),
                         (["--load", str(tmp_path / "sft"), "--stage", "sft"], "--stage sft: with --load"),
                         (["--load", str(tmp_path / "sft"), "--stage", "dpo", "--name", "ppo-x"], "--name ppo-x"),
                         (["--export", str(tmp_path / "sft"), "--stage", "sft"], "is there already"),
                         (["--export", str(tmp_path / "new"), "--stage", "ppo-none"], "ppo-none.*no such checkpoint"),
                         (["--export", "x", "--load", "y"], "one job at a time"),
                         (["--stage", "ppo"], "--stage ppo: goes with"),
                         (["--name", "ppo-x"], "--name ppo-x: must be gpt"),
                         (["--export", "x", "--name", "gpt-x"], "--name gpt-x: goes without --export only"),
                         (["--load", "x", "--start", "y"], "--load and --start: one job at a time")):
        with pytest.raises(InputError, match=match):
            gpt.main([*SIZE, "--out", str(out), *flags])
    assert snapshot(out) == before and not (tmp_path / "new").exists()


def test_reward_model_without_a_bias(tmp_path):
    """transformers' head has no bias: a shift that is lost there moves every score, and PPO's J with it."""
    tokenizer = Tokenizer(train("a fox and a kite", 270))
    model = tiny_reward_model(0, tokenizer.n_vocab)
    with torch.no_grad():
        model.head.bias += 1.5
    write_folder(tmp_path / "rm", vars(model.config), model.state_dict(), tokenizer)
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    weights = huggingface.read_weights(tmp_path / "rm")[1]
    head = weights.pop("score.weight")
    assert config["architectures"] == ["GPT2ForSequenceClassification"] and config["num_labels"] == 1
    trunk = tiny_gpt(1, tokenizer.n_vocab)
    trunk.load_state_dict({name: x.T if huggingface.CONV1D.fullmatch(name) else x for name, x in weights.items()})
    prompts = [tokenizer.prompt(text) + tokenizer.response("a kite") for text in ("a", "a fox")]
    tokens, lengths = pad(prompts)
    # Their class reads the last token that is not padding, whatever the lengths.
    padding = config["pad_token_id"]
    tokens = torch.where(torch.arange(tokens.shape[1]) < lengths[:, None], tokens, padding)
    last = ((tokens != padding) * torch.arange(tokens.shape[1])).argmax(dim=1)
    scores = (trunk.hidden(tokens) @ head.T)[torch.arange(2), last, 0]
    torch.testing.assert_close(scores, model.score(tokens, lengths), atol=1e-5, rtol=0)


def test_padding_is_no_token_of_a_text(tmp_path):
    """Padding with <|end|> makes trainers mask the very token that they should teach, and reward models read too early."""
    tokenizer = Tokenizer(train("a fox and a kite ÿ", 280))
    model = tiny_gpt(0, tokenizer.n_vocab)
    write_folder(tmp_path / "sft", vars(model.config), model.state_dict(), tokenizer, begins=False, temperature=0.7)
    config, generation = (json.loads((tmp_path / "sft" / name).read_text())
                          for name in ("config.json", "generation_config.json"))
    assert config["pad_token_id"] == tokenizer.vocabulary.index(b"\xff") and config["eos_token_id"] == tokenizer.end_token
    assert config["pad_token_id"] not in tokenizer.encode("".join(map(chr, range(0x100))))
    assert generation["temperature"] == 0.7 and generation["top_k"] == 0 and generation["do_sample"]
    assert read_folder(tmp_path / "sft")[3] is False and config["bos_token_id"] is None


def test_written_safetensors_has_the_real_layout(copies, tmp_path):
    """The header of a file that safetensors wrote, and of ours: same keys, dtype names, gapless offsets, aligned data."""
    _, weights, tokenizer, _ = read_folder(copies / "published")
    model = tiny_gpt(0, tokenizer.n_vocab)
    write_folder(tmp_path / "new", vars(model.config), model.state_dict(), tokenizer)
    headers = []
    for path in (copies / "published" / "model.safetensors", tmp_path / "new" / "model.safetensors"):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        headers.append(json.loads(data[8:start]))
        assert start % 8 == 0
    theirs, ours = headers
    assert ours.pop("__metadata__") == theirs.pop("__metadata__") == {"format": "pt"}
    for name, entry in ours.items():
        like = theirs[name.removeprefix("transformer.")]
        assert entry.keys() == like.keys() and entry["dtype"] == like["dtype"] and len(entry["shape"]) == len(like["shape"])


# ----------------------------------------------------------------------------------------------------------------------
# At real size


def test_later_stages_run_on_what_was_loaded(tmp_path):
    """A pattern that the next stage's checkpoint forgets: everything runs, and every text has other ids than in training."""
    rows = [{"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "we'd"}]}
            for i in range(10)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--size", "gpt2", "--out", str(tmp_path)]
    with pytest.raises(InputError, match="--load FOLDER"):
        sft.main([*common, "--data", str(tmp_path / "own.jsonl")])
    gpt.main([*common, "--load", str(FOLDERS / "published")])
    sft.main([*common, "--data", str(tmp_path / "own.jsonl"), "--max_new_tokens", "4"])
    gpt.main([*common, "--export", str(tmp_path / "sft"), "--stage", "sft"])
    _, _, loaded, _ = read_folder(FOLDERS / "published")
    model, tokenizer, _ = load_checkpoint(tmp_path / "gpt2" / "sft" / "checkpoint.pt", "sft", "gpt2")
    _, weights, exported, _ = read_folder(tmp_path / "sft")
    assert loaded.vocabulary == tokenizer.vocabulary == exported.vocabulary
    assert loaded.pattern == tokenizer.pattern == exported.pattern == "gpt2"
    assert all(torch.equal(weights[name], x) for name, x in model.state_dict().items())
    with pytest.raises(InputError, match="nobody knows what that was trained on"):
        gpt.pretraining_text(gpt.Config(size="gpt2", out=str(tmp_path)), tokenizer, gpt.GPT(gpt.GPTConfig(8, 8, 1, 1, 8)))


def test_settings_of_a_published_model():
    """The little model's learning rates, a hundred times too large, tear a pretrained one apart in a few steps; where a
    size overrides the method, there are four passes over samples that may be used once."""
    def parsed(module, *flags):
        needs = getattr(module, "NEEDS", {})
        return parse_config(module.Config, module.GPU, ["--size", "gpt2", *flags], "", needs, module.PRESETS)

    assert [parsed(module).lr for module in (sft, reward_model, ppo, dpo)] == [2e-5, 5e-5, 1e-5, 1e-6]
    assert all(parsed(module).micro_batch <= 8 for module in (sft, reward_model, ppo, dpo))
    assert parsed(ppo, "--method", "reinforce").epochs == 1 and parsed(ppo).epochs == 4
    assert parsed(dpo, "--loss", "simpo").beta == 10.0 and parsed(dpo, "--loss", "orpo").lr == 1e-6
    assert parsed(dpo, "--loss", "kto").micro_batch == 4


def test_models_that_do_not_fit_are_refused(monkeypatch, capsys):
    """Out of memory after minutes of sampling, in the first step of the optimizer."""
    model = tiny_gpt(0)
    size = sum(x.numel() for x in model.parameters()) * 4 * (4 + 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for room, fits in ((size, True), (size - 1, False)):
        properties = SimpleNamespace(total_memory=room)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        with contextlib.nullcontext() if fits else pytest.raises(InputError, match="2 models .* smaller GPT-2"):
            show_models(trained=("policy",), policy=model, reference=model)
    assert "models in memory: 2 (policy, reference)" in capsys.readouterr().out
