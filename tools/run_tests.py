"""Runs attnd's tests and counts every test case; `./dev test` calls it.

Parts, in order:
  unit   every cmocka test, plain build
  e2e    Python: client, demo model, deployment files, end-to-end and faults against the real server
  asan   the cmocka tests and the end-to-end suite under AddressSanitizer + UndefinedBehaviorSanitizer
  tsan   the threaded cmocka tests and the threaded end-to-end tests under ThreadSanitizer

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


def run_pytest(tally: Tally, name: str, paths: list[str], config: str, *options: str) -> None:
    """Runs pytest against the server of one Bazel configuration and counts its cases."""
    say(f"{name}, {config or 'plain'} build")
    if bazel("build", config, *PROGRAMS) != 0:
        tally.fail(f"{name}: the server does not build ({config or 'plain'})")
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    report = RESULTS / f"{name}-{config or 'plain'}.xml"
    report.unlink(missing_ok=True)
    environment: dict[str, str] = dict(os.environ)
    environment["ATTND_BINARY"] = str(symlink(config, "bin") / "service" / "attnd")
    environment["ATTND_BUILD"] = config or "plain"
    present = [path for path in paths if (ROOT / path).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--durations=5", f"--junitxml={report}"]
    subprocess.run([*command, *options, *present], cwd=ROOT, env=environment, check=False)
    if not report.exists():
        tally.fail(f"{name}: pytest gave no report ({config or 'plain'})")
        return
    for case in xml.etree.ElementTree.parse(report).getroot().iter("testcase"):
        title = f"{case.get('classname')}.{case.get('name')} ({config or 'plain'})"
        if case.find("failure") is not None or case.find("error") is not None:
            tally.fail(title)
        elif case.find("skipped") is not None:
            tally.skipped += 1
        else:
            tally.passed += 1


def part_unit(tally: Tally) -> None:
    run_cmocka(tally, "")


def part_e2e(tally: Tally) -> None:
    run_pytest(tally, "python", ["client/tests", "demo/tests", "tests/deploy", "tests/e2e"], "")


def part_asan(tally: Tally) -> None:
    run_cmocka(tally, "asan")
    run_pytest(tally, "e2e", ["tests/e2e"], "asan")


def part_tsan(tally: Tally) -> None:
    run_cmocka(tally, "tsan", tag="threads")
    run_pytest(tally, "e2e", ["tests/e2e"], "tsan", "-m", "not slow")


PARTS = {"unit": part_unit, "e2e": part_e2e, "asan": part_asan, "tsan": part_tsan}


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev test", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", choices=[*PARTS, []], help="default: all")
    parts = parser.parse_args().part or list(PARTS)
    tally = Tally()
    for part in parts:
        started = time.time()
        PARTS[part](tally)
        say(f"{part}: {time.time() - started:.0f} s; so far {tally.passed} passed, {tally.failed} failed")
    for failure in tally.failures:
        print(f"FAILED {failure}")
    print(f"{tally.passed} passed, {tally.failed} failed, {tally.skipped} skipped")
    return 0 if tally.failed == 0 and tally.passed > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
