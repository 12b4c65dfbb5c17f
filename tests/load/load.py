#!/usr/bin/env python3
"""Closed-loop load test of attnd through its Python client.

Each process opens BATCH sequences, uploads CONTEXT tokens to each, and then runs decode steps one after another: the
next step starts when the last layer of the one before is back. Lists (--batch 1,8,32) run every combination in turn.
Without an ADDRESS it starts a server of its own on this machine ($ATTND_BINARY, or bazel-bin/service/attnd).

Per layer call and per step it prints p50, p90 and p99, and the new tokens a second; --csv and --plot keep them. A step
is timed from its first layer's call to its last layer's answer. Sequences are cut back to CONTEXT tokens now and then,
between steps, so that the context stays within 128 tokens of what was asked for (and the figures leave that time out).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import multiprocessing
import os
import pathlib
import queue
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from threading import BrokenBarrierError
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "client"))

import attnd

GROWTH_TOKENS = 128
MAX_CONSECUTIVE_ERRORS = 20


@dataclass(frozen=True)
class Cell:
    """One combination of the sweep."""

    batch: int
    context: int
    query_length: int


@dataclass(frozen=True)
class Plan:
    """What every process is told."""

    addresses: list[str]
    token: str | None
    cell: Cell
    stream: bool
    layers: int
    warmup: float
    duration: float
    timeout: float


@dataclass
class Samples:
    """What one process measured, in seconds."""

    layer: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    measured: float = 0.0  #: of the loop, without the cutting back
    errors: int = 0
    failure: str = ""  #: why it gave up


# ----------------------------------------------------------------------------------------------------------------
# One process


class Worker:
    """The loop of one process over its sequences."""

    def __init__(self, client: attnd.Client, plan: Plan, seed: int) -> None:
        self._client = client
        self._plan = plan
        g, cell, random = client.geometry, plan.cell, np.random.default_rng(seed)

        def rows(tokens: int, row: tuple[int, int]) -> Any:
            return random.uniform(-1, 1, (tokens, *row)).astype(g.dtype)

        tokens = cell.batch * cell.query_length
        self._step_tensors = rows(tokens, g.q_row), rows(tokens, g.k_row), rows(tokens, g.v_row)
        self._context = rows(cell.context, g.k_row), rows(cell.context, g.v_row)
        self._sequences: list[attnd.Sequence] = []

    def prefill(self, progress: Any) -> None:
        """Opens the sequences and uploads their context, the same rows for every layer."""
        layers = self._client.geometry.layers
        self._sequences = self._client.open(self._plan.cell.batch)
        for sequence in self._sequences if self._plan.cell.context else ():
            keys, values = (itertools.repeat(rows, layers) for rows in self._context)
            self._client.append_kv(sequence, keys, values, timeout=600)
            progress.value += self._plan.cell.context

    def run(self, seconds: float, stop: Any, progress: Any) -> Samples:
        """Steps until the time is up or `stop` is set."""
        samples, consecutive = Samples(), 0
        started = time.perf_counter()
        cutting = 0.0
        while time.perf_counter() - started < seconds and not stop.is_set():
            try:
                self._step(samples)
                consecutive = 0
                progress.value += 1
                before_cut = time.perf_counter()
                self._cut_back()
                cutting += time.perf_counter() - before_cut
            except attnd.AttndError as error:
                samples.errors += 1
                consecutive += 1
                if consecutive == MAX_CONSECUTIVE_ERRORS:
                    samples.failure = f"{consecutive} errors in a row, the last: {error.code}: {error}"
                    break
                if isinstance(error, attnd.ResourceExhausted):
                    time.sleep(error.retry_after or 0.01)
        samples.measured = time.perf_counter() - started - cutting
        return samples

    def _step(self, samples: Samples) -> None:
        plan, times = self._plan, []
        lengths = [plan.cell.query_length] * plan.cell.batch
        with self._client.step(self._sequences, lengths, stream=plan.stream) as step:
            started = time.perf_counter()
            for _ in range(plan.layers):
                step.layer(*self._step_tensors)
                times.append(time.perf_counter())
        samples.step.append(times[-1] - started)
        samples.layer.extend(np.diff([started, *times]))

    def _cut_back(self) -> None:
        for sequence in self._sequences:
            if sequence.length + self._plan.cell.query_length > self._plan.cell.context + GROWTH_TOKENS:
                sequence.truncate(self._plan.cell.context)

    def close(self) -> None:
        """Closes the sequences, as far as the server is there to do it."""
        with contextlib.suppress(attnd.AttndError):
            self._client.close_sequences(self._sequences)


def work(plan: Plan, index: int, barrier: Any, stop: Any, progress: Any, results: Any) -> None:
    """Body of one process: puts (index, Samples) into `results`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    samples = Samples()
    with attnd.Client(plan.addresses, token=plan.token, timeout=plan.timeout) as client:
        worker = None
        try:
            worker = Worker(client, plan, index)
            worker.prefill(progress)
            barrier.wait()
            progress.value = 0
            warm = worker.run(plan.warmup, stop, progress)
            samples = worker.run(plan.duration, stop, progress) if not warm.failure else warm
        except attnd.AttndError as error:
            barrier.abort()
            samples.failure = f"{error.code}: {error}"
        except BrokenBarrierError:
            samples.failure = "another process failed"
        finally:
            if worker is not None:
                worker.close()
            results.put((index, samples))


# ----------------------------------------------------------------------------------------------------------------
# All processes


class Interrupted(Exception):
    """Ctrl-C: the sequences are closed, then the test ends."""


def run_cell(plan: Plan, processes: int) -> list[Samples]:
    """Runs one combination; progress on stderr. Every process has ended when it returns or raises."""
    context = multiprocessing.get_context("spawn")
    barrier, stop, results = context.Barrier(processes + 1), context.Event(), context.Queue()
    progress = [context.Value("Q", 0) for _ in range(processes)]
    workers = [
        context.Process(target=work, args=(plan, index, barrier, stop, progress[index], results), daemon=True)
        for index in range(processes)
    ]
    for worker in workers:
        worker.start()
    interrupted = False
    collected: dict[int, Samples] = {}
    try:
        watch_prefill(plan, barrier, progress, workers)
        watch_steps(plan, progress, results, collected, workers)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        stop.set()
        barrier.abort()
        drain(results, collected, workers, seconds=30)
        for worker in workers:
            worker.join(timeout=5)
            if worker.is_alive():
                worker.kill()
                worker.join()
        say("")
    if interrupted:
        raise Interrupted
    return [collected.get(index, Samples(failure="the process died")) for index in range(processes)]


def watch_prefill(plan: Plan, barrier: Any, progress: list[Any], workers: list[Any]) -> None:
    """Waits until all processes have prefilled."""
    total = len(workers) * plan.cell.batch * plan.cell.context
    while barrier.n_waiting < len(workers) and not barrier.broken and all(worker.is_alive() for worker in workers):
        done = sum(value.value for value in progress)
        say(f"prefill {100 * done // max(1, total)}% of {total} tokens")
        time.sleep(0.2)
    with contextlib.suppress(BrokenBarrierError):
        barrier.wait(timeout=30)


def watch_steps(
    plan: Plan, progress: list[Any], results: Any, collected: dict[int, Samples], workers: list[Any]
) -> None:
    """Shows how the steps go until every process has reported."""
    started = time.monotonic()
    limit = started + plan.warmup + plan.duration + plan.timeout + 60
    last, last_time = 0, started
    while len(collected) < len(workers) and time.monotonic() < limit and any(worker.is_alive() for worker in workers):
        with contextlib.suppress(queue.Empty):
            while True:
                index, samples = results.get(timeout=0.5)
                collected[index] = samples
        now, steps = time.monotonic(), sum(value.value for value in progress)
        tokens = (steps - last) * plan.cell.batch * plan.cell.query_length / (now - last_time)
        say(f"{now - started:4.0f} s of {plan.warmup + plan.duration:.0f}: {steps} steps, {tokens:.0f} tokens/s")
        last, last_time = steps, now


def drain(results: Any, collected: dict[int, Samples], workers: list[Any], seconds: float) -> None:
    """Takes what the processes still have to say, so that they can end."""
    limit = time.monotonic() + seconds
    while len(collected) < len(workers) and time.monotonic() < limit:
        try:
            index, samples = results.get(timeout=0.2)
            collected[index] = samples
        except queue.Empty:
            if not any(worker.is_alive() for worker in workers):
                return


def say(line: str) -> None:
    """Progress on one line of stderr, if somebody is looking."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------
# Results


@dataclass
class Row:
    """One combination's figures: a line of the CSV."""

    mode: str
    processes: int
    batch: int
    context: int
    query_length: int
    layers: int
    dtype: str
    steps: int
    errors: int
    tokens_s: float
    layer_p50_us: float
    layer_p90_us: float
    layer_p99_us: float
    step_p50_us: float
    step_p90_us: float
    step_p99_us: float


def summarize(plan: Plan, samples: list[Samples], dtype: str) -> Row:
    """The figures of one combination over all its processes."""
    layer = np.concatenate([np.asarray(one.layer) for one in samples]) * 1e6
    step = np.concatenate([np.asarray(one.step) for one in samples]) * 1e6
    tokens = plan.cell.batch * plan.cell.query_length
    rate = sum(len(one.step) * tokens / one.measured for one in samples if one.measured > 0)
    layers = [float(x) for x in np.percentile(layer, [50, 90, 99])] if len(layer) else [float("nan")] * 3
    steps = [float(x) for x in np.percentile(step, [50, 90, 99])] if len(step) else [float("nan")] * 3
    mode = "stream" if plan.stream else "unary"
    cell = plan.cell
    errors = sum(one.errors for one in samples)
    head = (mode, len(samples), cell.batch, cell.context, cell.query_length, plan.layers, dtype)
    return Row(*head, len(step), errors, round(rate, 1), *(round(x, 1) for x in layers + steps))


HEADING = (
    "  mode  procs  batch  context  query   steps  errors   tokens/s   layer p50       p90       p99 us"
    "    step p50       p90       p99 us"
)


def line(row: Row) -> str:
    """A row for people."""
    return (
        f"{row.mode:>6}  {row.processes:5}  {row.batch:5}  {row.context:7}  {row.query_length:5}  {row.steps:6}  "
        f"{row.errors:6}  {row.tokens_s:9.0f}  {row.layer_p50_us:10.0f}{row.layer_p90_us:10.0f}{row.layer_p99_us:10.0f}"
        f"   {row.step_p50_us:12.0f}{row.step_p90_us:10.0f}{row.step_p99_us:10.0f}"
    )


def write_csv(path: str, rows: list[Row]) -> None:
    """One line a combination."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def write_plot(path: str, rows: list[Row], layer_times: list[Any], title: str) -> None:
    """Left: how the layer calls' times are distributed. Right: tokens a second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (times, rates) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    labels = [f"batch {row.batch}, context {row.context}, query {row.query_length}" for row in rows]
    for label, microseconds in zip(labels, layer_times):
        ordered = np.sort(microseconds)
        times.plot(ordered, np.arange(1, len(ordered) + 1) / max(1, len(ordered)), label=label)
    for share in (0.5, 0.9, 0.99):
        times.axhline(share, color="lightgrey", linewidth=0.8, zorder=0)
    times.set(xscale="log", xlabel="layer call, microseconds", ylabel="share of calls at most this long", ylim=(0, 1))
    times.legend(fontsize="small")
    rates.barh(labels, [row.tokens_s for row in rows])
    rates.invert_yaxis()
    rates.set(xlabel="new tokens a second")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# ----------------------------------------------------------------------------------------------------------------
# A server of our own


@contextlib.contextmanager
def started_server(flags: list[str]) -> Iterator[str]:
    """Runs attnd on a free loopback port; its address. Ended on the way out."""
    binary = pathlib.Path(os.environ.get("ATTND_BINARY", ROOT / "bazel-bin/service/attnd"))
    if not binary.exists():
        raise SystemExit(f"load: no server at {binary}: build //service:attnd, set ATTND_BINARY, or give an ADDRESS")
    with tempfile.TemporaryDirectory(prefix="attnd-load-") as folder:
        ready, log = pathlib.Path(folder, "ready"), pathlib.Path(folder, "log")
        with open(log, "wb") as output:
            command = [str(binary), "--listen", "127.0.0.1:0", "--ready-file", str(ready), *flags]
            # A session of its own: Ctrl-C is for this process, which then ends the server in good order.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        try:
            limit = time.monotonic() + 60
            while not (ready.exists() and ready.read_text().endswith("\n")):
                if process.poll() is not None or time.monotonic() > limit:
                    raise SystemExit(f"load: the server did not start:\n{log.read_text(errors='replace')[-4000:]}")
                time.sleep(0.01)
            yield ready.read_text().splitlines()[0]
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def pages_needed(cells: list[Cell], processes: int, page_size: int) -> int:
    """KV pages that the largest combination fills, if one rank had to hold it all."""
    return max(
        processes * cell.batch * (-(-(cell.context + GROWTH_TOKENS + cell.query_length) // page_size) + 1)
        for cell in cells
    )


def flag_of(flags: list[str], name: str, default: str) -> str:
    """The value of a server flag among those given."""
    for index, flag in enumerate(flags):
        if flag.startswith(f"{name}="):
            return flag.split("=", 1)[1]
        if flag == name and index + 1 < len(flags):
            return flags[index + 1]
    return default


# ----------------------------------------------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    """A list like 1,8,32."""
    return [int(word) for word in text.split(",")]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="load.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("addresses", nargs="*", metavar="ADDRESS", help="servers to load; none: one is started here")
    add("--server-flags", default="", metavar="FLAGS", help="for the started server, e.g. '--ranks 2 --dtype bf16'")
    add("--token", help="credentials")
    add("--processes", type=int, default=2, help="client processes, each with its own batch (default: %(default)s)")
    add("--batch", type=numbers, default=[8], metavar="N[,N..]", help="sequences a step (default: 8)")
    add(
        "--context", type=numbers, default=[1024], metavar="N[,N..]", help="tokens prefilled a sequence (default: 1024)"
    )
    add(
        "--query-length",
        type=numbers,
        default=[1],
        metavar="N[,N..]",
        help="new tokens a sequence and step (default: 1)",
    )
    add("--layers", type=int, help="layers a step; fewer than the server's leave it uncommitted (default: all)")
    add("--mode", choices=["stream", "unary"], default="stream", help="DecodeStream, or a Decode a layer")
    add("--duration", type=float, default=10.0, help="seconds measured, each combination (default: %(default)s)")
    add("--warmup", type=float, default=1.0, help="seconds before that (default: %(default)s)")
    add("--timeout", type=float, default=60.0, help="seconds for each call (default: %(default)s)")
    add("--csv", metavar="FILE", help="write the figures")
    add("--plot", metavar="FILE", help="write a picture of them (PNG)")
    arguments = parser.parse_args(argv)
    lists = [*arguments.batch, *arguments.query_length, arguments.processes]
    if min(lists) < 1 or min(arguments.context) < 0 or arguments.duration <= 0:
        parser.error("counts must be 1 or more, contexts 0 or more, the duration above 0")
    return arguments


def run(arguments: argparse.Namespace, cells: list[Cell], addresses: list[str]) -> int:
    """Runs all combinations against the servers; the exit status."""
    with attnd.Client(addresses, token=arguments.token) as client:
        info = client.info()
    layers = arguments.layers or info.geometry.layers
    if not 1 <= layers <= info.geometry.layers:
        raise SystemExit(f"load: --layers {layers}: the server has {info.geometry.layers}")
    g = info.geometry
    title = (
        f"attnd {info.version}, {info.backend}: {g.layers} layers, {g.heads_q}/{g.heads_kv} heads of {g.head_dim}, "
        f"{g.dtype_name}; {len(info.ranks)} ranks; {arguments.processes} processes, {arguments.mode}"
    )
    print(title)
    print(HEADING)
    rows: list[Row] = []
    layer_times, failures = [], []
    try:
        for cell in cells:
            plan = Plan(
                addresses=addresses,
                token=arguments.token,
                cell=cell,
                stream=arguments.mode == "stream",
                layers=layers,
                warmup=arguments.warmup,
                duration=arguments.duration,
                timeout=arguments.timeout,
            )
            samples = run_cell(plan, arguments.processes)
            rows.append(summarize(plan, samples, g.dtype_name))
            layer_times.append(np.concatenate([np.asarray(one.layer) for one in samples]) * 1e6)
            print(line(rows[-1]), flush=True)
            failures += [one.failure for one in samples if one.failure]
            if failures:
                break
    except Interrupted:
        failures.append("interrupted")
    if rows and arguments.csv:
        write_csv(arguments.csv, rows)
    if rows and arguments.plot:
        write_plot(arguments.plot, rows, layer_times, title)
    for failure in dict.fromkeys(failures):
        print(f"load: {failure}", file=sys.stderr)
    return 1 if failures else 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = parse(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what is in the background without one
    cells = [Cell(*sizes) for sizes in itertools.product(arguments.batch, arguments.context, arguments.query_length)]
    try:
        if arguments.addresses:
            return run(arguments, cells, arguments.addresses)
        flags = shlex.split(arguments.server_flags)
        page_size = int(flag_of(flags, "--page-size", "64"))
        if not flag_of(flags, "--pages", ""):
            flags += ["--pages", str(max(64, pages_needed(cells, arguments.processes, page_size)))]
        with started_server(flags) as address:
            return run(arguments, cells, [address])
    except attnd.AttndError as error:
        print(f"load: {error.code}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
