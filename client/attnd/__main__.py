"""python -m attnd: look at a server, and measure the way to it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import numpy as np

import attnd


def _info(client: attnd.Client, arguments: argparse.Namespace) -> None:
    for address in client.addresses:
        info = client.info(address)
        g, limits = info.geometry, info.limits
        stored = "" if g.kv_dtype == g.dtype else f", keys and values stored in {g.kv_dtype_name}"
        state = "draining" if info.draining else f"up {info.uptime:.0f} s"
        print(f"{address}: attnd {info.version}, {info.backend} ({info.backend_detail}), {state}")
        print(
            f"  geometry: {g.layers} layers, {g.heads_q} query heads on {g.heads_kv} KV heads, "
            f"head_dim {g.head_dim}, head_dim_v {g.head_dim_v}, {g.dtype_name}, pages of {g.page_size} tokens{stored}"
        )
        print(
            f"  limits: {limits.message_bytes} bytes a message, {limits.batch} sequences a step, "
            f"{limits.query_length} rows a sequence, {limits.sequences} sequences, "
            f"{limits.sequence_tokens} tokens a sequence"
        )
        print("  rank  state    sequences     tokens  in flight  pages free/total  queue      calls  device")
        for rank in info.ranks:
            pages = f"{rank.pages_free}/{rank.pages_total}"
            print(
                f"  {rank.rank:4}  {rank.state:7}  {rank.sequences:9}  {rank.tokens:9}  {rank.tokens_in_flight:9}  "
                f"{pages:>16}  {rank.queue_depth:5}  {rank.calls:9}  {rank.device}"
            )


def _time(call: Callable[[], object], count: int) -> str:
    """Runs `call` `count` times after a tenth as many to warm up; percentiles in microseconds."""
    for _ in range(max(1, count // 10)):
        call()
    times = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e6)
    p50, p90, p99 = np.percentile(times, [50, 90, 99])
    return f"p50 {p50:7.0f} us   p90 {p90:7.0f} us   p99 {p99:7.0f} us"


def _bench_ping(client: attnd.Client, arguments: argparse.Namespace) -> None:
    """The time of one call with next to nothing to compute: what the way there and back costs."""
    count, geometry = arguments.count, client.geometry
    print(f"GetServerInfo          {_time(client.info, count)}")
    q = np.zeros((arguments.batch, *geometry.q_row), geometry.dtype)
    k = np.zeros((arguments.batch, *geometry.k_row), geometry.dtype)
    v = np.zeros((arguments.batch, *geometry.v_row), geometry.dtype)
    sequences = client.open(arguments.batch)
    try:
        with client.step(sequences) as step:  # one token each to attend to
            for _ in range(geometry.layers):
                step.layer(q, k, v)
        print(f"attend, unary          {_time(lambda: client.attend(sequences, 0, q), count)}")
        with client.step(sequences, read_only=True) as step:
            print(f"attend, stream         {_time(lambda: step.layer(q, layer=0), count)}")
    finally:
        client.close_sequences(sequences)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m attnd", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="geometry, limits and load of servers")
    info.set_defaults(run=_info)
    ping = commands.add_parser("bench-ping", help="latency of a call with next to nothing to compute")
    ping.set_defaults(run=_bench_ping)
    ping.add_argument("--count", type=int, default=500, help="calls of each kind (default: %(default)s)")
    ping.add_argument("--batch", type=int, default=1, help="sequences a call (default: %(default)s)")
    for command in (info, ping):
        command.add_argument("addresses", nargs="+", metavar="ADDRESS", help="host:port or unix:/path")
        command.add_argument("--token", help="credentials")
        command.add_argument("--timeout", type=float, default=10.0, help="seconds a call (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        with attnd.Client(arguments.addresses, token=arguments.token, timeout=arguments.timeout) as client:
            arguments.run(client, arguments)
    except attnd.AttndError as error:
        print(f"attnd: {error.code}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
