"""What the stages read from the little world: pretraining text and demonstrations, and how likely
each is."""

import random

import pytest

from data import stories
from data.corpus import draw_demonstrations, held_out_documents, world_corpus


def test_the_entropy_is_that_of_the_held_out_documents(tmp_path):
    """An entropy of other documents than the held-out ones, in other units, or over other tokens: a
    wrong excess. Mid-training on unkind stories; an entropy that leaves out how rare the curated
    ones are."""
    plain = world_corpus(None, 1472, 128, 8, 1, tmp_path)
    tokenizer = plain.tokenizer
    curated = world_corpus(tokenizer, 1472, 128, 64, 1, tmp_path, curated=True)
    documents = [document.text for document in held_out_documents()]
    world, log_p = stories.curate()
    for corpus, constant in ((plain, 0.0), (curated, log_p)):
        tokens = 0
        nats = 0.0
        texts = []
        for ids in corpus.held_out:
            assert ids[0] == ids[-1] == tokenizer.end_token
            tokens += len(ids) - 1
            texts.append(tokenizer.decode(ids[1:-1]))
            nats -= stories.document_log_probability(texts[-1]) - constant
        assert corpus.entropy == pytest.approx(nats / tokens)
        assert (texts == documents) == (corpus is plain)
    assert len(curated.sequences) == 64
    for ids in curated.sequences:
        assert stories.document_log_probability(tokenizer.decode(ids[1:-1]), world) > -1e9
    assert len(list(tmp_path.glob("*.ids"))) == 1  # those of other runs pile up


def test_the_worlds_demonstrations_answer_their_own_request():
    """Requests and stories that are paired wrongly, or a log-probability of something else: the
    entropy is then wrong."""
    rows, logprobs = draw_demonstrations(random.Random(4), 50)
    assert len(rows) == len(logprobs) == 50 and len({row["prompt"] for row in rows}) > 40
    for row, logprob in zip(rows, logprobs):
        assert logprob == pytest.approx(stories.log_probability(row["prompt"], row["completion"]))
