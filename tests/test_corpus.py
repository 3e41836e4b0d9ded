"""What the stages read from the little world: pretraining text and demonstrations, and how likely
each is."""

import math
import random
import re

import pytest

from data import stories
from data.corpus import draw_demonstrations, world_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The little world's, with a vocabulary learnt from it."""
    return world_corpus(None, 1472, 128, 8, 1, tmp_path_factory.mktemp("corpus"))


def texts_of(sequences, tokenizer):
    """Documents as texts, without the two <|end|>."""
    for ids in sequences:
        assert ids[0] == ids[-1] == tokenizer.end_token
    return [tokenizer.decode(ids[1:-1]) for ids in sequences]


def test_the_entropy_is_that_of_the_held_out_documents(corpus):
    """An entropy of other documents than the held-out ones, in other units, or over other tokens: a
    wrong excess."""
    rng = random.Random("held-out documents")
    documents = [stories.document(rng).text for _ in range(500)]
    assert texts_of(corpus.held_out, corpus.tokenizer) == documents
    tokens = sum(len(corpus.tokenizer.encode(text)) + 1 for text in documents)  # and its <|end|>
    nats = -sum(stories.document_log_probability(text) for text in documents)
    assert corpus.entropy == pytest.approx(nats / tokens)


def test_the_curated_corpus(corpus, tmp_path):
    """Mid-training on unkind stories; an entropy that leaves out how rare the curated ones are."""
    found = world_corpus(corpus.tokenizer, 1472, 128, 64, 1, tmp_path, curated=True)
    curated, log_p = stories.curate()
    texts = texts_of(found.sequences, found.tokenizer)
    assert len(texts) == 64
    assert min(stories.document_log_probability(text, curated) for text in texts) > -math.inf
    tokens = sum(len(ids) - 1 for ids in found.held_out)
    nats = 0.0
    for text in texts_of(found.held_out, found.tokenizer):
        nats -= stories.document_log_probability(text) - log_p  # of the world, less the constant
    assert found.entropy == pytest.approx(nats / tokens)


def test_the_worlds_demonstrations_answer_their_own_request():
    """Requests and stories that are paired wrongly, or a log-probability of something else: the
    entropy is then wrong."""
    rows, logprobs = draw_demonstrations(random.Random(4), 50)
    assert len(rows) == len(logprobs) == 50 and len({row["prompt"] for row in rows}) > 40
    kept = 0
    for row, logprob in zip(rows, logprobs):
        assert logprob == pytest.approx(stories.log_probability(row["prompt"], row["completion"]))
        words = re.findall("[a-z]+", row["completion"].lower())
        kept += stories.parse_request(row["prompt"]).hero in words
    assert kept > 35  # nine of ten tell of the hero that was asked for
