"""The README's code runs, from top to bottom, and prints what it says."""

import re
from pathlib import Path

import pytest
from fake_server import FakeServer

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_readmes_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = README.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S))
    assert len(blocks) >= 8
    with FakeServer(head_dim=8, head_dim_v=8, query_length=128) as server:
        names: dict[str, object] = {"__name__": "readme"}
        for block in blocks:
            line = text[: block.start(1)].count("\n")
            source = "\n" * line + block[1].replace("127.0.0.1:7400", server.address)
            exec(compile(source, str(README), "exec"), names)
        assert not server.sequences, "the README leaves sequences open"
    printed = capsys.readouterr().out
    assert "[264  13]" in printed
    assert "sequences[0]: closed" in printed
    assert "q: shape (1, 1, 1), expected (1, 4, 8)" in printed
