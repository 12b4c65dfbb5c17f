"""python -m attnd, and the package as it is installed."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from fake_server import FakeServer

from attnd.__main__ import main

CLIENT = Path(__file__).resolve().parent.parent


def test_info_prints_geometry_and_every_rank(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(ranks=3) as server:
        assert main(["info", server.address]) == 0
    printed = capsys.readouterr().out
    assert "2 layers, 4 query heads on 2 KV heads" in printed and "fp32" in printed
    assert printed.count("serving") == 3


def test_bench_ping_measures_and_leaves_nothing_behind(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        assert main(["bench-ping", server.address, "--count", "5", "--batch", "2"]) == 0
        assert not server.sequences
    assert capsys.readouterr().out.count("p99") == 3


def test_an_error_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(token="secret") as server:
        assert main(["info", server.address, "--token", "guess"]) == 1
    assert capsys.readouterr().err.startswith("attnd: PERMISSION_DENIED: wrong credentials")


def test_help_names_the_commands() -> None:
    environment = {**os.environ, "PYTHONPATH": str(CLIENT)}
    done = subprocess.run(
        [sys.executable, "-m", "attnd", "--help"], env=environment, capture_output=True, text=True, check=True
    )
    assert "info" in done.stdout and "bench-ping" in done.stdout


def test_a_wheel_is_built_and_works_where_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("wheel")
    source = tmp_path / "source"
    for name in ("client", "proto"):  # a fresh checkout: nothing generated yet
        ignored = shutil.ignore_patterns("_proto", "build", "*.egg-info", "__pycache__")
        shutil.copytree(CLIENT.parent / name, source / name, ignore=ignored)
    build = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"  # as pip calls it
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=source / "client", check=True, capture_output=True)
    [wheel] = tmp_path.glob("attnd-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"attnd/py.typed", "attnd/_proto/attnd_pb2.py", "attnd/_proto/attnd_pb2.pyi"} <= set(names)
    assert not any(name.startswith("tests/") for name in names)
    target = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(target)
    with FakeServer() as server:
        done = subprocess.run(
            [sys.executable, "-m", "attnd", "info", server.address],
            env={**os.environ, "PYTHONPATH": str(target)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
    assert "serving" in done.stdout


@pytest.mark.skipif(Path(sys.prefix).name != ".venv", reason="not the environment that ./dev makes")
def test_the_environment_that_dev_makes_has_the_client(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", "import attnd"], cwd=tmp_path, env=environment, check=True)
