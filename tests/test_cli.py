# SPDX-License-Identifier: Apache-2.0
"""The command line."""

from pathlib import Path

import pytest

from toppings.cli import main

ADAPTERS = Path(__file__).resolve().parents[1] / "examples" / "adapters"


def test_inspect_tells_what_a_folder_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(ADAPTERS / "butler")]) == 0
    printed = capsys.readouterr().out
    for word in ("down_proj", "q_proj", "16", "bfloat16"):
        assert word in printed


def test_what_is_refused_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "adapter_config.json" in captured.err
