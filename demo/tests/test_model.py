"""The numpy model is the model that was trained: it agrees with what train.py stored, computed by PyTorch."""

import pathlib

import llama_numpy
import numpy as np
import pytest

DEMO = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model():
    return llama_numpy.Llama()


@pytest.fixture(scope="module")
def reference():
    with np.load(DEMO / "reference.npz") as arrays:
        return dict(arrays)


def test_logits_equal_those_of_the_trained_model(model, reference):
    prompt = reference["prompt"]
    attention = llama_numpy.LocalAttention(model, 1, len(prompt))
    logits = model.forward(prompt, [len(prompt)], [0], attention)
    error = np.linalg.norm(logits - reference["logits"]) / np.linalg.norm(reference["logits"])
    assert error < 1e-5


def test_greedy_continuation_equals_that_of_the_trained_model(model, reference):
    prompt, expected = reference["prompt"], reference["continuation"]
    attention = llama_numpy.LocalAttention(model, 1, len(prompt) + len(expected))
    logits = model.forward(prompt, [len(prompt)], [0], attention)
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < len(expected):
        logits = model.forward(np.array(tokens[-1:]), [1], [0], attention)
        tokens.append(int(logits[-1].argmax()))
    assert bytes(tokens) == expected.tobytes()


def test_prefill_in_pieces_equals_prefill_at_once(model, reference):
    prompt = reference["prompt"]
    whole = model.forward(prompt, [len(prompt)], [0], llama_numpy.LocalAttention(model, 1, len(prompt)))
    attention = llama_numpy.LocalAttention(model, 1, len(prompt))
    pieces = [model.forward(piece, [len(piece)], [0], attention) for piece in np.split(prompt, [1, 8, 40, 41])]
    assert np.allclose(np.concatenate(pieces), whole, rtol=0, atol=1e-4)


def test_a_sequence_does_not_see_its_neighbours_in_the_batch(model, reference):
    prompt = reference["prompt"]
    alone = model.forward(prompt, [len(prompt)], [0], llama_numpy.LocalAttention(model, 1, len(prompt)))
    other = np.frombuffer(b"Redistribution and use in source and binary forms", np.uint8)
    attention = llama_numpy.LocalAttention(model, 3, len(prompt))
    batch = model.forward(np.concatenate((other, prompt)), [len(other), len(prompt)], [2, 0], attention)
    assert np.allclose(batch[len(other):], alone, rtol=0, atol=1e-4)


def test_attention_of_one_visible_token_is_its_value():
    generator = np.random.default_rng(1)
    q, k, v = (generator.standard_normal(shape) for shape in ((1, 4, 8), (2, 1, 8), (2, 1, 8)))
    out = llama_numpy.attend_causally(q, k, v)
    assert np.allclose(out, np.repeat(v[:, 0], 2, axis=0)[None])
