"""Runs attnd's tests and counts every test case; `./dev test` calls it.

Parts:
  unit   every cmocka test, plain build
  e2e    Python: client, demo model, deployment files, end-to-end and faults against the real server
  asan   the cmocka tests and the end-to-end suite under AddressSanitizer + UndefinedBehaviorSanitizer
  tsan   the threaded cmocka tests and the threaded end-to-end tests under ThreadSanitizer

The Python tests of a build run beside its cmocka tests, unit and e2e likewise where both are wanted: Python tests wait
more than they compute. What they print comes after the cmocka tests' output.

The last line is `N passed, N failed` with `, N skipped` where tests were skipped; the exit status is
0 only if nothing failed and something passed.
"""

import argparse
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / ".build" / "test-results"
PROGRAMS = ["//service:attnd", "//tests/bench_layer:client"]


@dataclass
class Tally:
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)

    def fail(self, name: str) -> None:
        self.failed += 1
        self.failures.append(name)


def say(text: str) -> None:
    print(f"== {text}", flush=True)


def bazel(verb: str, config: str, *arguments: str) -> int:
    command = ["bazel", verb] + ([f"--config={config}"] if config else [])
    command += ["--noshow_progress", "--ui_event_filters=-info", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def symlink(config: str, what: str) -> Path:
    """Where .bazelrc puts the link to a configuration's outputs or logs."""
    return ROOT / (f"bazel-{config}-{what}" if config else f"bazel-{what}")


def run_cmocka(tally: Tally, config: str, tag: str = "") -> None:
    """Runs the cc_tests, or those with a tag, under one Bazel configuration and counts their cmocka cases."""
    say(f"unit tests, {config or 'plain'} build")
    filters = [f"--test_tag_filters={tag}", "--build_tests_only"] if tag else []
    status = bazel("test", config, "--keep_going", "--test_summary=short", *filters, "//...")
    targets = f"attr(tags, {tag}, kind(cc_test, //...))" if tag else "kind(cc_test, //...)"
    query = ["bazel", "query", "--noshow_progress", "--ui_event_filters=-info,-warning", targets]
    names = subprocess.run(query, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    # A test that Bazel need not run again counts by the log of the run that it stands for.
    cases = 0
    for name in names:
        log = symlink(config, "testlogs") / name.lstrip("/").replace(":", "/") / "test.log"
        if not log.exists():
            continue
        text = log.read_text(errors="replace")
        passed = len(re.findall(r"^\[       OK \] ", text, re.M))
        failed = set(re.findall(r"^\[  FAILED  \] (?:\S+: )?(\w+)$", text, re.M))
        tally.passed += passed
        tally.skipped += len(set(re.findall(r"^\[  SKIPPED \] (?!\d+ test)(?:\S+: )?(\w+)", text, re.M)))
        for case in sorted(failed):
            tally.fail(f"{name} {case} ({config or 'plain'})")
        cases += passed + len(failed)
    if status not in (0, 4):
        # A build failure, a crash or a time-out does not show as a failed case.
        tally.fail(f"bazel test, {config or 'plain'} build: exit status {status}")
    if cases == 0:
        tally.fail(f"no unit test ran, {config or 'plain'} build")


class PythonTests:
    """pytest against the server of one Bazel configuration, from start() on beside whatever else is run."""

    def __init__(self, name: str, paths: list[str], config: str, *options: str) -> None:
        self.title = f"{name}, {config or 'plain'} build"
        self.name, self.paths, self.config, self.options = name, paths, config, options
        self.report = RESULTS / f"{name}-{config or 'plain'}.xml"
        self.output = RESULTS / f"{name}-{config or 'plain'}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if bazel("build", self.config, *PROGRAMS) != 0:
            return
        RESULTS.mkdir(parents=True, exist_ok=True)
        self.report.unlink(missing_ok=True)
        environment: dict[str, str] = dict(os.environ)
        environment["ATTND_BINARY"] = str(symlink(self.config, "bin") / "service" / "attnd")
        environment["ATTND_BUILD"] = self.config or "plain"
        present = [path for path in self.paths if (ROOT / path).exists()]
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--durations=5", f"--junitxml={self.report}"]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, *self.options, *present], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    def finish(self, tally: Tally) -> None:
        """Waits for the end, shows what was printed and counts the cases."""
        if self.process is None:
            tally.fail(f"{self.name}: the server does not build ({self.config or 'plain'})")
            return
        self.process.wait()
        say(self.title)
        print(self.output.read_text(errors="replace"), end="", flush=True)
        if not self.report.exists():
            tally.fail(f"{self.name}: pytest gave no report ({self.config or 'plain'})")
            return
        for case in xml.etree.ElementTree.parse(self.report).getroot().iter("testcase"):
            title = f"{case.get('classname')}.{case.get('name')} ({self.config or 'plain'})"
            if case.find("failure") is not None or case.find("error") is not None:
                tally.fail(title)
            elif case.find("skipped") is not None:
                tally.skipped += 1
            else:
                tally.passed += 1


@dataclass
class Part:
    config: str
    tag: str | None = None  # of the cmocka tests; "": all; None: none of them
    python: PythonTests | None = None

    def run(self, tally: Tally) -> None:
        if self.python:
            self.python.start()
        try:
            if self.tag is not None:
                run_cmocka(tally, self.config, self.tag)
        except BaseException:
            if self.python and self.python.process:
                self.python.process.terminate()
            raise
        if self.python:
            self.python.finish(tally)


ALL_PYTHON = ["client/tests", "demo/tests", "tests/deploy", "tests/e2e"]
PARTS = {
    "unit": Part("", tag=""),
    "e2e": Part("", python=PythonTests("python", ALL_PYTHON, "")),
    "asan": Part("asan", tag="", python=PythonTests("e2e", ["tests/e2e"], "asan")),
    "tsan": Part("tsan", tag="threads", python=PythonTests("e2e", ["tests/e2e"], "tsan", "-m", "not slow")),
}


def plan(wanted: list[str]) -> list[tuple[str, Part]]:
    """The parts to run, one after another; those of the same build are one."""
    if "unit" not in wanted or "e2e" not in wanted:
        return [(name, PARTS[name]) for name in wanted]
    both = ("unit and e2e", Part("", PARTS["unit"].tag, PARTS["e2e"].python))
    return [both, *((name, PARTS[name]) for name in wanted if name not in ("unit", "e2e"))]


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev test", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", choices=[*PARTS, []], help="default: all")
    parts = parser.parse_args().part or list(PARTS)
    tally = Tally()
    for name, part in plan(parts):
        started = time.time()
        part.run(tally)
        say(f"{name}: {time.time() - started:.0f} s; so far {tally.passed} passed, {tally.failed} failed")
    for failure in tally.failures:
        print(f"FAILED {failure}")
    print(f"{tally.passed} passed, {tally.failed} failed, {tally.skipped} skipped")
    return 0 if tally.failed == 0 and tally.passed > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
