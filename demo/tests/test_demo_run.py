"""The demo tells right from wrong, and leaves nothing running however it ends."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import run
from llama_numpy import Llama, LocalAttention

DEMO = pathlib.Path(__file__).resolve().parents[1]
SERVER = pathlib.Path(os.environ.get("ATTND_BINARY", DEMO.parent / "bazel-bin/service/attnd"))
PROMPTS = [b"The licensor", b"You may not", b"THE SOFTWARE IS PROVIDED"]
COUNT = 6


@pytest.fixture(scope="module")
def model():
    return Llama()


@pytest.fixture(scope="module")
def reference(model):
    return run.Generation(model, LocalAttention(model, len(PROMPTS), 64), PROMPTS, COUNT)


class Spoiled(LocalAttention):
    """Local attention with one of its outputs spoiled."""

    def __init__(self, model, layer, spoil):
        super().__init__(model, len(PROMPTS), 64)
        self._layer = layer
        self._spoil = spoil

    def attend(self, layer, q, k, v):
        out = super().attend(layer, q, k, v)
        return self._spoil(out) if layer == self._layer else out


def test_the_same_attention_has_no_error(model, reference):
    again = run.Generation(model, LocalAttention(model, len(PROMPTS), 64), PROMPTS, COUNT)
    outputs, logits, same = run.compare(again, reference)
    assert (outputs.largest, logits.largest, same) == (0, 0, len(PROMPTS) * COUNT)


def test_attention_off_by_one_in_a_thousand_is_beyond_the_bounds(model, reference):
    spoiled = run.Generation(model, Spoiled(model, 3, lambda out: out * 1.001), PROMPTS, COUNT)
    outputs, logits, _ = run.compare(spoiled, reference)
    assert outputs.relative > run.BOUNDS["fp32"]["outputs"]
    assert logits.relative > run.BOUNDS["fp32"]["logits"]


def test_heads_in_the_wrong_order_change_the_tokens(model, reference):
    spoiled = run.Generation(model, Spoiled(model, 0, lambda out: out[:, ::-1]), PROMPTS, COUNT)
    assert not np.array_equal(spoiled.tokens, reference.tokens)
    assert run.compare(spoiled, reference)[2] < len(PROMPTS) * COUNT


def test_a_nan_is_beyond_the_bounds(model, reference):
    spoiled = run.Generation(model, Spoiled(model, 5, lambda out: out * np.nan), PROMPTS, COUNT)
    outputs, logits, _ = run.compare(spoiled, reference)
    assert not outputs.relative <= run.BOUNDS["fp32"]["outputs"]
    assert not logits.relative <= run.BOUNDS["fp32"]["logits"]
    assert np.isnan(outputs.largest)


def test_perplexity_of_two_windows_is_near_that_of_the_training_log(model):
    text = np.frombuffer(run.HELD_OUT, np.uint8)
    windows = np.stack([text[:1025], text[1024:2049]])
    logged = float((DEMO / "train.log").read_text().split("perplexity ")[1].split()[0])
    assert run.perplexity(model, LocalAttention(model, 2, 1024), windows) == pytest.approx(logged, rel=0.03)


# -------------------------------------------------------------------------------------------------
# The whole demo, as a process

@pytest.fixture(scope="module")
def server():
    assert SERVER.exists(), f"no server binary at {SERVER}: build //service:attnd, or set ATTND_BINARY"
    return SERVER


def start(server, *flags):
    return subprocess.Popen([sys.executable, str(DEMO / "run.py"), "--server", str(server), *flags],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"PYTHONPATH": str(DEMO.parent / "client")})


def finish(demo):
    """(exit status, last line) of a demo that ends by itself."""
    said, _ = demo.communicate(timeout=120)
    return demo.returncode, said.splitlines()[-1]


def server_of(demo):
    """The process of the demo's server, once it serves."""
    for line in demo.stdout:
        if line.lstrip().startswith("ranks"):
            break
    (child,) = pathlib.Path(f"/proc/{demo.pid}/task/{demo.pid}/children").read_text().split()
    return int(child)


def is_gone(process, seconds=20):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not pathlib.Path(f"/proc/{process}").exists():
            return True
        time.sleep(0.05)
    return False


def test_demo_passes(server):
    assert finish(start(server, "--tokens", "4", "--windows", "1")) == (0, "demo: PASS")


def test_demo_passes_in_bf16_on_three_ranks(server):
    flags = ("--tokens", "4", "--windows", "1", "--dtype", "bf16", "--ranks", "3")
    assert finish(start(server, *flags)) == (0, "demo: PASS")


@pytest.mark.parametrize(("number", "status", "why"), [
    pytest.param(signal.SIGINT, 130, "interrupted", id="SIGINT"),
    pytest.param(signal.SIGTERM, 1, "terminated", id="SIGTERM"),
])
def test_ended_demo_fails_and_leaves_no_server(server, number, status, why):
    demo = start(server)
    child = server_of(demo)
    demo.send_signal(number)
    assert finish(demo) == (status, f"demo: FAIL ({why})")
    assert is_gone(child)


def test_killed_demo_leaves_no_server(server):
    demo = start(server)
    child = server_of(demo)
    demo.kill()
    demo.communicate()
    assert is_gone(child)


def test_server_that_dies_fails_the_demo(server):
    demo = start(server)
    os.kill(server_of(demo), signal.SIGKILL)
    status, last = finish(demo)
    assert status == 1
    assert last.startswith("demo: FAIL (")


def test_server_that_does_not_start_fails_the_demo():
    assert finish(start("/bin/false")) == (1, "demo: FAIL (the server ended with status 1)")
