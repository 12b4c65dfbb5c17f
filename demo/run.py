#!/usr/bin/env python3
"""Generates text with a small Llama, every layer's attention computed by attnd, and checks all of it.

Starts an attnd server with CPU ranks, prefills prompts of different lengths in long query steps, then decodes them
in one batch over a DecodeStream. The same model then runs with its attention computed here in float64, and the two
are compared: the greedy tokens, the attention outputs, the logits, the perplexity of a held-out text. Ends with the
line `demo: PASS` (status 0) or `demo: FAIL (why)` (status 1).

`./dev demo` runs it with what it needs; by itself it needs the Python of client/requirements-dev.txt and the package
in client/.
"""

import argparse
import pathlib
import signal
import sys
import time

import attnd
import numpy as np
from attnd_attention import PARTS, AttndAttention, Error, Recorded
from llama_numpy import Llama, LocalAttention
from screen import Screen
from server_process import ServerFailed, ServerProcess
from threadpoolctl import threadpool_limits

DEMO = pathlib.Path(__file__).resolve().parent
ROOT = DEMO.parent
HELD_OUT = (DEMO / "corpus/heldout.txt").read_bytes()
ROWS = 128  # of a sequence in one prefill step: the most that a server takes
HELD_OUT_WINDOW = 1024  # bytes, as train.py measured it

# Prompts of 3 to 781 bytes. The held-out ones are of a licence that the model has never seen.
PROMPTS = [
    b"The",
    b"Permission is hereby granted, free of charge",
    b"You may not use this file except in",
    b"THE SOFTWARE IS PROVIDED \"AS IS\", WITHOUT",
    b"Redistributions in binary form must reproduce the above copyright notice, this list of conditions and",
    b"If you distribute copies of the Program, whether gratis or for a fee,",
    HELD_OUT[:150],
    HELD_OUT[2000:2300],
    HELD_OUT[5000:5513],
    HELD_OUT[9000:9781],
]

# What the comparison must show. Rounding q, k, v and the outputs to bf16 in every layer is what the second row
# allows for; there the tokens may differ, where two are almost equally likely.
BOUNDS = {
    "fp32": {"tokens": True, "outputs": 1e-5, "logits": 1e-5, "perplexity": 1e-5},
    "bf16": {"tokens": False, "outputs": 3e-2, "logits": 3e-2, "perplexity": 1e-2},
}


class Generation:
    """Greedy tokens of a batch of prompts and how they came about.

    `tokens` [sequences, count]; `logits`, one array [sequences, vocab] a decode pass, the first one being the last
    logits of the prefill; `outputs`, the attention outputs [pass][layer]; `prefill` and `decode` in seconds;
    `decode_pass`, the number of the first decode pass.
    """

    def __init__(self, model, attention, prompts, count, show=lambda tokens: None):
        recorded = Recorded(attention)
        start = time.perf_counter()
        logits = np.stack([self._prefill(model, recorded, index, prompt) for index, prompt in enumerate(prompts)])
        self.prefill = time.perf_counter() - start
        self.decode_pass = len(recorded.outputs)
        self.logits = [logits]
        tokens = [logits.argmax(axis=-1)]
        show(tokens[-1])
        start = time.perf_counter()
        while len(tokens) < count:
            logits = model.forward(tokens[-1], [1] * len(prompts), range(len(prompts)), recorded)
            self.logits.append(logits)
            tokens.append(logits.argmax(axis=-1))
            show(tokens[-1])
        self.decode = time.perf_counter() - start
        self.tokens = np.stack(tokens, axis=1)
        self.outputs = recorded.outputs

    @staticmethod
    def _prefill(model, attention, sequence, prompt):
        """One prompt, as it would arrive by itself: the logits after its last token."""
        tokens = np.frombuffer(prompt, np.uint8)
        for piece in np.split(tokens, range(ROWS, len(tokens), ROWS)):
            logits = model.forward(piece, [len(piece)], [sequence], attention)
        return logits[-1]


def compare(ours, reference):
    """(errors of attention outputs, of logits, tokens that agree before the first that does not) of two Generations.

    Once a token differs, that sequence is about another text: it is left out from there on.
    """
    outputs, logits = Error(), Error()
    same = np.cumprod(ours.tokens == reference.tokens, axis=1).astype(bool)
    for index in range(ours.decode_pass):
        for ours_layer, reference_layer in zip(ours.outputs[index], reference.outputs[index]):
            outputs.add(ours_layer, reference_layer)
    for step in range(len(ours.logits)):
        rows = same[:, step - 1] if step else slice(None)
        logits.add(ours.logits[step][rows], reference.logits[step][rows])
        if step:
            index = ours.decode_pass + step - 1
            for ours_layer, reference_layer in zip(ours.outputs[index], reference.outputs[index]):
                outputs.add(ours_layer[rows], reference_layer[rows])
    return outputs, logits, int(same.sum())


def perplexity(model, attention, windows):
    """Perplexity a byte of equally long windows [n, length + 1] of a text, all of them in one batch."""
    count, length = len(windows), windows.shape[1] - 1
    loss = 0.0
    for start in range(0, length, ROWS):
        rows = min(ROWS, length - start)
        logits = model.forward(windows[:, start:start + rows].ravel(), [rows] * count, range(count), attention)
        logits = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
        targets = windows[:, start + 1:start + rows + 1].ravel()
        loss -= (logits[np.arange(len(targets)), targets] - np.log(np.exp(logits).sum(axis=-1))).sum()
    return float(np.exp(loss / (count * length)))


def heading(title):
    print(f"\n{title}")


def line(label, text):
    print(f"  {label:<22}{text}", flush=True)


def joined(texts):
    return ", ".join(str(text) for text in texts)


class Demo:
    """One run against one server. `failures` collects what was not as it must be."""

    def __init__(self, model, client, arguments):
        self.model = model
        self.client = client
        self.count = arguments.tokens
        self.windows = arguments.windows
        self.failures = []

    def run(self):
        info = self.client.info()
        self.check_geometry(info)
        self.describe(info)
        pages_before = [rank.pages_free for rank in info.ranks]
        options = attnd.Options(return_timing=True)
        with self.client.session(options=options) as session:
            attention = AttndAttention(session)
            ours = self.generate(attention)
            self.show_partition(session, attention, ours)
        self.show_time(attention, ours)
        self.check_generation(ours)
        with self.client.session() as session:
            self.check_perplexity(AttndAttention(session))
        pages_after = [rank.pages_free for rank in self.client.info().ranks]
        self.expect(pages_after == pages_before, "pages leaked", "pages free again",
                    joined(f"rank {rank}: {pages}" for rank, pages in enumerate(pages_after)))

    def expect(self, holds, failure, label, text):
        line(label, text if holds else f"{text}  <-- {failure}")
        if not holds:
            self.failures.append(failure)

    def check_geometry(self, info):
        own = {name: getattr(self.model, name) for name in ("layers", "heads_q", "heads_kv", "head_dim")}
        theirs = {name: getattr(info.geometry, name) for name in own}
        if theirs != own or info.geometry.head_dim_v != self.model.head_dim:
            raise ServerFailed(f"the server's geometry {theirs} is not the model's {own}")
        self.bounds = BOUNDS.get(info.geometry.dtype_name)
        if self.bounds is None:
            raise ServerFailed(f"the demo knows {joined(BOUNDS)}, not the server's {info.geometry.dtype_name}")

    def describe(self, info):
        model, geometry = self.model, info.geometry
        print("attnd demo: a language model generates text, attnd computes the attention of every layer")
        line("model", f"Llama over bytes, {model.parameters / 1e6:.1f} M parameters, {model.layers} layers, "
                      f"{model.heads_q} query heads to {model.heads_kv} KV heads of {model.head_dim}, in numpy")
        line("server", f"attnd {info.version} at {info.address}, {info.backend} ({info.backend_detail})")
        line("ranks", f"{len(info.ranks)}, each with {info.ranks[0].pages_total} pages of {geometry.page_size} tokens, "
                      f"{geometry.dtype_name}")

    def generate(self, attention):
        heading(f"{len(PROMPTS)} prompts of {joined(sorted(map(len, PROMPTS)))} tokens (a token is a byte); "
                f"{self.count} new tokens each, decoded in one batch")
        return Generation(self.model, attention, PROMPTS, self.count, Screen(PROMPTS).add)

    def show_partition(self, session, attention, ours):
        heading("How the batch was partitioned over the ranks")
        infos = self.client.describe(session.sequences)
        attended = {rank.rank: 0 for rank in self.client.info().ranks}
        for call in attention.calls[ours.decode_pass * self.model.layers:]:
            for timing in call.timing:
                attended[timing.rank] += timing.tokens
        for rank, tokens in attended.items():
            own = [index for index, info in enumerate(infos) if info.dp_rank == rank]
            held = sum(infos[index].length for index in own)
            self.expect(tokens > 0, f"rank {rank} had no work", f"rank {rank}",
                        f"{len(own)} sequences ({joined(own)}) with {held} tokens; "
                        f"{100 * tokens / max(1, sum(attended.values())):.0f} % of the KV tokens that the decode read")

    def show_time(self, attention, ours):
        heading("Time")
        prompt_tokens = sum(map(len, PROMPTS))
        new_tokens = len(PROMPTS) * (self.count - 1)
        line("prefill", f"{prompt_tokens} tokens in {ours.prefill:.2f} s: {prompt_tokens / ours.prefill:.0f} tokens/s")
        line("decode", f"{new_tokens} tokens in {ours.decode:.2f} s: {new_tokens / ours.decode:.0f} tokens/s")
        steps = self.count - 1
        calls = attention.calls[ours.decode_pass * self.model.layers:]
        step = ours.decode / steps
        wall = sum(call.wall for call in calls) / steps
        print(f"  a decode step         {1e3 * step:8.3f} ms")
        parts = {part: sum(call.slowest_rank()[part] for call in calls) / steps for part in PARTS}
        rows = [("numpy model", step - wall), ("attention, all layers", wall),
                *((f"  {part.replace('_', ' ')}", seconds) for part, seconds in parts.items()),
                ("  network, gRPC, client", wall - sum(parts.values()))]
        for label, seconds in rows:
            print(f"    {label:<24}{1e3 * seconds:8.3f} ms {100 * seconds / step:6.1f} %")

    def check_generation(self, ours):
        heading("Against the same model with local attention in float64")
        local = LocalAttention(self.model, len(PROMPTS), max(map(len, PROMPTS)) + self.count)
        reference = Generation(self.model, local, PROMPTS, self.count)
        outputs, logits, same = compare(ours, reference)
        bounds = self.bounds
        line("its decode", f"{len(PROMPTS) * (self.count - 1) / reference.decode:.0f} tokens/s")
        total = ours.tokens.size
        identical = np.array_equal(ours.tokens, reference.tokens)
        self.expect(identical or not bounds["tokens"], "tokens differ", "greedy tokens",
                    f"all {total} identical" if identical
                    else f"{same} of {total} identical before a sequence's first difference")
        self.expect(outputs.relative <= bounds["outputs"], "attention outputs are off", "attention outputs",
                    f"largest error {outputs.largest:.2e}, relative {outputs.relative:.2e} "
                    f"(at most {bounds['outputs']:.0e})")
        self.expect(logits.relative <= bounds["logits"], "logits are off", "logits",
                    f"largest error {logits.largest:.2e}, relative {logits.relative:.2e} "
                    f"(at most {bounds['logits']:.0e})")

    def check_perplexity(self, attention):
        text = np.frombuffer(HELD_OUT, np.uint8)
        count = min(self.windows, (len(text) - 1) // HELD_OUT_WINDOW)
        windows = np.stack([text[i * HELD_OUT_WINDOW:(i + 1) * HELD_OUT_WINDOW + 1] for i in range(count)])
        ours = perplexity(self.model, attention, windows)
        local = perplexity(self.model, LocalAttention(self.model, count, HELD_OUT_WINDOW), windows)
        self.expect(abs(ours / local - 1) <= self.bounds["perplexity"], "perplexity differs", "perplexity",
                    f"{ours:.6f} a byte through attnd, {local:.6f} locally; {count * HELD_OUT_WINDOW} bytes held out")


def server_flags(model, arguments):
    geometry = {"layers": model.layers, "heads-q": model.heads_q, "heads-kv": model.heads_kv,
                "head-dim": model.head_dim, "dtype": arguments.dtype, "page-size": 16}
    ranks = {"backend": arguments.backend, "ranks": arguments.ranks, "threads": 1, "pages": 2048}
    return [text for flag, value in (geometry | ranks).items() for text in (f"--{flag}", str(value))]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--server", type=pathlib.Path, default=ROOT / "bazel-bin/service/attnd", metavar="PATH",
                       help="the attnd binary to start (default: bazel-bin/service/attnd)")
    where.add_argument("--address", metavar="HOST:PORT",
                       help="use this running server instead; it must have the model's geometry")
    parser.add_argument("--dtype", choices=list(BOUNDS), default="fp32",
                        help="of the server's KV cache, queries and outputs (default: fp32)")
    parser.add_argument("--backend", choices=["cpu", "cuda", "auto", "reference"], default="cpu",
                        help="of the server (default: cpu)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of the server (default: 2)")
    parser.add_argument("--tokens", type=int, default=80, help="new tokens for each prompt (default: 80)")
    parser.add_argument("--windows", type=int, default=8,
                        help=f"windows of {HELD_OUT_WINDOW} held-out bytes for the perplexity; 16 are all, as in "
                             "train.log (default: 8)")
    arguments = parser.parse_args()
    longest = 1024 - max(map(len, PROMPTS))
    if not 2 <= arguments.tokens <= longest:
        parser.error(f"--tokens: 2 to {longest}, which the model's context has room for")
    if arguments.windows < 1 or arguments.ranks < 1:
        parser.error("--windows and --ranks: 1 or more")
    return arguments


def run_against(address, model, arguments):
    """The names of what failed."""
    with attnd.Client(address) as client:
        demo = Demo(model, client, arguments)
        demo.run()
        return demo.failures


def run(arguments):
    model = Llama()
    if arguments.address:
        return run_against(arguments.address, model, arguments)
    with ServerProcess(arguments.server, server_flags(model, arguments)) as server:
        return run_against(server.address, model, arguments)


def main():
    arguments = parse_arguments()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("terminated"))
    status = 1
    try:
        # The server's ranks have the cores: BLAS threads of our own would fight them.
        with threadpool_limits(limits=1, user_api="blas"):
            failures = run(arguments)
        status = 1 if failures else 0
        verdict = f"FAIL ({joined(failures)})" if failures else "PASS"
    except KeyboardInterrupt:
        verdict, status = "FAIL (interrupted)", 130
    except SystemExit as end:
        verdict = f"FAIL ({end.code})"
    except (attnd.AttndError, ServerFailed) as error:
        reason, _, detail = str(error).partition("\n")
        if detail:
            print(f"\n{detail}")
        verdict = f"FAIL ({reason})"
    print(f"\ndemo: {verdict}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
