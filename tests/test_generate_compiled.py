"""The compiled step: a function of what it reads, and the same ids."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from generations import GRAMMAR, MODEL, answered, prompt

from mmtok.transformer.decoder import Decoder
from mmtok.transformer.generate import Request, generate
from mmtok.transformer.sampling import Sampling

SAMPLING = {"image": Sampling(1.0, guidance=2.0), "audio": Sampling(0.9, guidance=1.5)}
BATCHES = (
    [Request(prompt("text"), ("image",), 40, grid=(3, 3))],  # with its twin two rows of unequal lengths
    [Request(prompt("audio"), ("audio",), 40, max_frames=8), Request(prompt(), ("text", "audio", "text"), 40)],
    [Request(prompt("text"), ("text",), 10, sample=i) for i in range(5)],  # more rows than the step is compiled for
)


def check(decoder: Decoder) -> None:
    for requests in BATCHES:
        plain, compiled = (generate(d, GRAMMAR, requests, SAMPLING, seed=3) for d in (Decoder(MODEL), decoder))
        assert all(np.array_equal(a.ids, b.ids) for a, b in zip(plain, compiled, strict=True))


def test_the_function_that_is_compiled(monkeypatch):
    calls = []

    def compile(function):
        return lambda *tensors: calls.append(len(tensors[0])) or function(*tensors)

    monkeypatch.setattr(torch, "compile", compile)
    check(Decoder(MODEL, compile=True))
    assert set(calls) == {1, 2, 3}
    for dtype in (torch.bfloat16, torch.int8):
        answers = generate(Decoder(MODEL, dtype, compile=True), GRAMMAR, BATCHES[1])
        for request, generation in zip(BATCHES[1], answers, strict=True):
            answered(generation, request)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_for_real():
    check(Decoder(MODEL, compile=True))
    (generation,) = generate(Decoder(MODEL, torch.int8, compile=True), GRAMMAR, BATCHES[0])
    answered(generation, BATCHES[0][0])
