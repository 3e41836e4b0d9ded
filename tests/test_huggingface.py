"""GPT-2 folders in and out, against files that transformers, tokenizers and safetensors wrote
(huggingface/make.py)."""

import json
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jinja2.sandbox  # torch needs it too
import numpy as np
import pytest
import torch

import sft
from data import huggingface
from data.files import InputError, checksum, write_jsonl
from data.huggingface import read_folder, read_weights
from data.run import refuse_stale, show_models
from data.tokenizer import Tokenizer, train
from gpt import load_checkpoint, pad, save_checkpoint
from helpers import snapshot, tiny_gpt, tiny_reward_model

FOLDERS = Path(__file__).parent / "huggingface"
TOKENIZER = Tokenizer(train("a fox and a kite ÿ", 280))


@pytest.fixture
def copies(tmp_path):
    """Copies of both folders, to be damaged."""
    ignored = shutil.ignore_patterns("*.py", "__pycache__")
    return shutil.copytree(FOLDERS, tmp_path / "copies", ignore=ignored)


def refusal(folder):
    """The line in which reading the folder ends, "" if it does not; it names a file in it."""
    try:
        read_folder(folder)
    except InputError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
        return str(error)
    return ""


def read_json(path):
    return json.loads(path.read_text())


def edit(path, **changes):
    """Change some keys of a JSON file."""
    path.write_text(json.dumps({**read_json(path), **changes}))


def export(out, stage, model, **values):
    """Save this model as a stage's checkpoint, with these values, and export it. Returns the
    folder."""
    path = out / "cpu" / stage / "checkpoint.pt"
    path.parent.mkdir(parents=True)
    save_checkpoint(path, stage, "cpu", model, TOKENIZER, **values)
    flags = ["--stage", stage, "--size", "cpu", "--out", str(out)]
    huggingface.main(["export", str(out / stage), *flags])
    return out / stage


def same_weights(found, expected):
    """Whether both are {name: tensor} with the same bits."""
    return found.keys() == expected.keys() and all(torch.equal(found[name], x)
                                                   for name, x in expected.items())


def copied(weights):
    """They may lie in a file that is about to change."""
    return {name: x.clone() for name, x in weights.items()}


# --------------------------------------------------------------------------------------------------
# In


@pytest.mark.parametrize("name", ["published", "saved"])
def test_logits_and_ids_are_those_of_transformers(name, tmp_path):
    """A matrix left untransposed, GELU without tanh, rows in another order: all still sample. Other
    merges: ids that the weights never saw. A new token whose row is 0 may be the likeliest."""
    folder = FOLDERS / name
    huggingface.main(["load", str(folder), "--size", "cpu", "--out", str(tmp_path)])
    model, tokenizer, _ = load_checkpoint(tmp_path / "cpu/gpt/checkpoint.pt", "gpt", "cpu")
    _, rows, _ = huggingface.read_tokenizer(folder)
    ours = {row: i for i, row in enumerate(rows) if row is not None}
    theirs = range(len(ours))
    tokens = torch.tensor([[ours[i] for i in theirs[3::40]]])
    with torch.no_grad():
        logits = model(tokens)[0, :, [ours[i] for i in theirs]].numpy()
    np.testing.assert_allclose(logits, np.load(folder / "logits.npy"), atol=1e-5)
    for text, ids in read_json(folder / "expected.json"):
        assert tokenizer.encode(text) == [ours[i] for i in ids], repr(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text

    *old, user, assistant, end = model.wte.weight
    assert len(old) + 3 == tokenizer.n_vocab and torch.equal(assistant, user)
    torch.testing.assert_close(user, torch.stack([*old, end]).mean(dim=0))
    row = 0 if name == "saved" else read_json(folder / "vocab.json")["<|endoftext|>"]
    assert ours[row] == tokenizer.end_token


def legacy_layout(folder):
    """tokenizer.json of the published folder, as tokenizers before 0.9 wrote it, which is how GPT-2
    is published. (saved/ has today's.)"""
    vocab = read_json(folder / "vocab.json")
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    end = {"id": vocab["<|endoftext|>"], "content": "<|endoftext|>"}
    model = {"dropout": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
             "vocab": vocab, "merges": merges}
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {"added_tokens": [end], "normalizer": None, "pre_tokenizer": split, "model": model}


def resize(folder, rows):
    """Give the published folder's model this many rows; new ones hold large numbers."""
    path, weights = read_weights(folder)
    weights = copied(weights)
    wte = weights["wte.weight"]
    weights["wte.weight"] = torch.cat([wte, torch.full((rows - len(wte), 8), 1e3)])
    path.unlink()
    huggingface.write_safetensors(path, weights)
    edit(folder / "config.json", vocab_size=rows)


@pytest.mark.parametrize("rows, tokens, json_file, said", [
    (320, [], True, "rows of the embedding without a token: 20 of 320"),
    (300, ["[PAD]"], False, "added tokens: 1 ([PAD])"),     # without a row
    (304, ["[PAD]", "<|im_start|>", "é"], True, "added tokens: 2 ([PAD], <|im_start|>); rows of "
                                                "the embedding without a token: 2 of 304")])
def test_what_was_added_to_gpt2_is_left_out(copies, capsys, rows, tokens, said, json_file):
    """Refused: a vocabulary padded to 50,304 rows, a [PAD], GPT-2's own tokenizer.json without
    "type". Their rows move the mean that new tokens start from; an added "é" takes a byte's row."""
    folder = copies / "published"
    shape, weights, tokenizer, _ = read_folder(folder)
    weights = copied(weights)
    resize(folder, rows)
    added = {token: 300 + i for i, token in enumerate(tokens)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    if json_file:
        layout = legacy_layout(folder)
        layout["added_tokens"] += [{"content": token, "id": i} for token, i in added.items()]
        (folder / "tokenizer.json").write_text(json.dumps(layout, ensure_ascii=False))
        for name in ("added_tokens.json", "vocab.json", "merges.txt"):
            (folder / name).unlink()
    again, found, other, _ = read_folder(folder)
    assert again == shape and same_weights(found, weights)
    assert other.vocabulary == tokenizer.vocabulary and other.pattern == "gpt2"
    assert capsys.readouterr().out == f"{folder}: left out, as no part of GPT-2: {said}\n"


def test_where_it_cannot_be_the_way_is_named(copies):
    """A model whose tokenizer is another one's, or ends texts with a token of another name; a clone
    without Git LFS; an adapter without its model."""
    folder = copies / "published"
    path = folder / "tokenizer.json"
    text = json.dumps(legacy_layout(folder))
    path.write_text(text.replace("<|endoftext|>", "</s>"))
    assert re.search("tokens </s>, but .* rename the token that ends a text", refusal(folder))
    path.write_text(text)
    resize(folder, 1000)
    assert "1,000 tokens, its tokenizer 300; copy the model's own" in refusal(folder)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid ")
    assert re.search("only a pointer of Git LFS; .* git lfs pull", refusal(folder))
    (folder / "config.json").rename(folder / "adapter_config.json")
    assert re.search("is an adapter .*, not a whole model; merge it", refusal(folder))


def test_other_containers(copies):
    """The weights as pytorch_model.bin of old versions, with masks, some in float16; today's, with
    a prefix and a copy of the tied head, in parts with an index."""
    folder = copies / "published"
    weights = copied(read_folder(folder)[1])
    path, tensors = read_weights(folder)
    tensors = copied(tensors)
    path.unlink()
    path = folder / "pytorch_model.bin"
    for found in (weights, tensors):
        found["wpe.weight"] = found["wpe.weight"].half()
    masks = {"h.0.attn.bias": torch.ones(1, 1, 16, 16).tril().to(torch.uint8),
             "h.1.attn.masked_bias": torch.tensor(-1e4)}
    torch.save({**tensors, **masks}, path, _use_new_zipfile_serialization=False)
    assert same_weights(read_folder(folder)[1], weights)

    path.unlink()
    tensors = {f"transformer.{name}": x for name, x in tensors.items()}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    index = {}
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), start=1):
        part = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in names}, folder / part)
        index.update({name: part for name in names})
    path.with_suffix(".bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert same_weights(read_folder(folder)[1], weights)


BPE = read_json(FOLDERS / "saved/tokenizer.json")["model"]
CONFIG = "published/config.json"
JSON = "saved/tokenizer.json"


@pytest.mark.parametrize("name, changes, said", [
    (CONFIG, dict(model_type="gpt_neox"), "model_type is 'gpt_neox', but gpt.py's is 'gpt2'"),
    (CONFIG, dict(activation_function="relu"), "activation_function is 'relu'"),
    (CONFIG, dict(n_layer=3), "h.2.ln_1.weight is missing"),
    (CONFIG, dict(n_layer=1), "none of a GPT-2's"),
    (CONFIG, dict(vocab_size=302), "wte.weight is (300, 8), but by config.json"),
    (JSON, dict(normalizer={"type": "NFC"}), "normalizer"),
    (JSON, dict(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}), "pre_tokenizer"),
    (JSON, dict(model={**BPE, "type": "Unigram"}), "type"),
    (JSON, dict(model={**BPE, "merges": BPE["merges"][:-1]}), "no merge makes the token"),
    (JSON, None, "vocab.json: no such file"),
    ("saved/model-00002-of-00002.safetensors", None, "00002.safetensors: no such file")])
def test_what_is_no_gpt2_is_named(copies, name, changes, said):
    """A model that runs, but computes something else than the published one, or whose tokenizer
    splits or normalizes otherwise. A folder that a download left half full (None)."""
    path = copies / name
    if changes is None:
        path.unlink()
    else:
        edit(path, **changes)
    assert said in refusal(path.parent)


def test_damaged_weights_are_named(copies):
    """A download that broke off, a pickle that would run code: no traceback, no model of
    garbage."""
    folder = copies / "published"
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(40):
        path.write_bytes(whole[:rng.randint(0, len(whole) - 1)])
        assert "model.safetensors" in refusal(folder)
    path.unlink()
    torch.save({"wte.weight": Path}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin: not a whole file" in refusal(folder)


# --------------------------------------------------------------------------------------------------
# Out


def test_a_policy_goes_out(tmp_path):
    """Padding with <|end|>, which trainers then mask; on the right, which breaks texts in batches.
    No "format", which transformers refuses; a temperature that is lost; --stage rsft refused."""
    policy = tiny_gpt(0, TOKENIZER.n_vocab)
    folder = export(tmp_path, "rsft", policy, text="own.txt", temperature=0.7)
    config = read_json(folder / "config.json")
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["pad_token_id"] == TOKENIZER.vocabulary.index(b"\xff")
    assert config["pad_token_id"] not in TOKENIZER.encode("".join(map(chr, range(0x100))))
    assert config["eos_token_id"] == TOKENIZER.end_token and config["bos_token_id"] is None
    assert read_json(folder / "tokenizer_config.json")["padding_side"] == "left"
    generation = read_json(folder / "generation_config.json")
    assert generation["temperature"] == 0.7
    assert generation["do_sample"] and generation["top_k"] == 0
    _, weights, again, begins = read_folder(folder)
    assert again.vocabulary == TOKENIZER.vocabulary and again.pattern == "words" and not begins
    assert same_weights(weights, policy.state_dict())

    data = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 8 == 0 and json.loads(data[8:start])["__metadata__"] == {"format": "pt"}


def test_reward_models_go_out(tmp_path):
    """A head that is lost without a word; padding on the left. transformers' head has no bias: a
    shift that is lost there moves every score, and PPO's J with it."""
    model = tiny_reward_model(0, TOKENIZER.n_vocab)
    torch.nn.init.constant_(model.head.bias, 1.5)
    folder = export(tmp_path, "process_model", model)
    config = read_json(folder / "config.json")
    assert config["architectures"] == ["GPT2ForTokenClassification"]
    weights = read_weights(folder)[1]
    assert torch.equal(weights["classifier.weight"], model.head.weight)
    assert torch.equal(weights["classifier.bias"], model.head.bias)

    folder = export(tmp_path, "reward_model", model)
    config = read_json(folder / "config.json")
    assert config["architectures"] == ["GPT2ForSequenceClassification"]
    assert config["num_labels"] == 1
    assert read_json(folder / "tokenizer_config.json")["padding_side"] == "right"
    weights = read_weights(folder)[1]
    head = weights.pop("score.weight")
    trunk = tiny_gpt(1, TOKENIZER.n_vocab)
    trunk.load_state_dict({name: x.T if huggingface.CONV1D.fullmatch(name) else x
                           for name, x in weights.items()})
    tokens, lengths = pad([TOKENIZER.prompt(text) + TOKENIZER.response("a kite")
                           for text in ("a", "a fox")])

    # Their class reads the last token that is not padding, whatever the lengths.
    padding = config["pad_token_id"]
    positions = torch.arange(tokens.shape[1])
    tokens = torch.where(positions < lengths[:, None], tokens, padding)
    last = ((tokens != padding) * positions).argmax(dim=1)
    scores = (trunk.hidden(tokens) @ head.T)[torch.arange(2), last, 0]
    torch.testing.assert_close(scores, model.score(tokens, lengths), atol=1e-5, rtol=0)


def test_the_chat_template():
    """Content in parts or None prints Python into the prompt ("[{'type': 'text', …"); without
    {% generation %} TRL's assistant_only_loss has nothing to train on."""
    def refuse(message):
        raise InputError(message)

    template = huggingface.TEMPLATE.replace("{% generation %}", "[")
    template = template.replace("{% endgeneration %}", "]")
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    template = environment.from_string(template)
    user = {"role": "user", "content": " Hi "}
    assistant = {"role": "assistant", "content": "Ho<|end|>"}
    prompt = template.render(messages=[user], add_generation_prompt=True)
    assert prompt == "<|user|> Hi <|assistant|>"
    assert template.render(messages=[user, assistant]) == f"{prompt}[Ho<\ufdd0|end|><|end|>]"
    parts = [{"type": "text", "text": "Hi"}]
    system = {"role": "system", "content": "be kind"}
    for messages, message in (([user, {**assistant, "content": None}], "must be a string"),
                              ([user, {**assistant, "content": parts}], "must be a string"),
                              ([user, assistant, user], "one exchange"),
                              ([system, user], "one exchange")):
        with pytest.raises(InputError, match=message):
            template.render(messages=messages)


def test_later_stages_run_on_what_was_loaded(tmp_path):
    """A pattern that the next stage forgets, so that every text has other ids; a policy that isn't
    what was exported, or is of another SFT model. Refusals after something was overwritten."""
    rows = [{"prompt": f"{i}", "completion": "we'd"} for i in range(9)]
    write_jsonl(tmp_path / "own.jsonl", rows)
    common = ["--size", "gpt2", "--out", str(tmp_path)]
    fine_tuning = [*common, "--data", str(tmp_path / "own.jsonl"), "--max_new_tokens", "4"]
    with pytest.raises(InputError, match="python -m data.huggingface load FOLDER"):
        sft.main(fine_tuning)
    huggingface.main(["load", str(FOLDERS / "published"), *common])
    sft.main(fine_tuning)
    folder = str(tmp_path / "sft")
    huggingface.main(["export", folder, "--stage", "sft", *common])
    source = tmp_path / "gpt2/sft/checkpoint.pt"
    model, tokenizer, _ = load_checkpoint(source, "sft", "gpt2")
    assert tokenizer.vocabulary == read_folder(FOLDERS / "published")[2].vocabulary
    write_jsonl(Path(folder) / "generation_config.json", [{"temperature": 0.7}])
    huggingface.main(["load", folder, "--stage", "ppo", "--name", "ppo-theirs", *common])
    path = tmp_path / "gpt2/ppo-theirs/checkpoint.pt"
    again, other, checkpoint = load_checkpoint(path, "ppo", "gpt2")
    assert other.vocabulary == tokenizer.vocabulary and again.config == model.config
    assert other.pattern == tokenizer.pattern == "gpt2"
    assert same_weights(again.state_dict(), model.state_dict())
    assert checkpoint["made_from"] == {"sft/checkpoint.pt": checksum(source)}
    assert checkpoint["temperature"] == 0.7

    before = snapshot(tmp_path)
    for flags, message in (
            (["load", str(FOLDERS / "saved"), "--stage", "dpo"], "its vocabulary is not that of"),
            (["load", folder, "--stage", "dpo", "--name", "ppo-x"], "--name ppo-x: must be dpo"),
            (["export", folder, "--stage", "sft"], "sft: already exists")):
        with pytest.raises(InputError, match=message):
            huggingface.main([*flags, *common])
    assert snapshot(tmp_path) == before

    sft.main([*fine_tuning, "--lr", "1e-3"])
    with pytest.raises(InputError, match="load ppo-theirs again, if it is a policy of this one"):
        refuse_stale(path.parent)
    save_checkpoint(source, "sft", "gpt2", tiny_gpt(0, tokenizer.n_vocab), tokenizer)
    with pytest.raises(InputError, match="its context of .* tokens is not that of"):
        huggingface.main(["load", folder, "--stage", "dpo", *common])


def test_models_that_do_not_fit_are_refused(monkeypatch, capsys):
    """Out of memory after minutes of sampling, in the first step of the optimizer."""
    model = tiny_gpt(0)
    room = SimpleNamespace(total_memory=sum(x.numel() for x in model.parameters()) * 4 * (4 + 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: room)
    show_models(("policy",), {"8 samples": 2 ** 21}, policy=model, reference=model)
    printed = capsys.readouterr().out
    assert "models in memory: 2 (policy, reference)" in printed
    assert "\nbesides, where texts fill the context, about 2 MB for 8 samples\n" in printed
    assert "if they run out, lower --micro_batch or --sample_batch" in printed
    room.total_memory -= 1
    with pytest.raises(InputError, match="2 models .* smaller GPT-2"):
        show_models(("policy",), policy=model, reference=model)
