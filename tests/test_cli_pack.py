# SPDX-License-Identifier: Apache-2.0
"""``toppings pack``, and ``toppings inspect`` of what it wrote."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers

import toppings
from toppings import AdapterLibrary, HostStore
from toppings.adapter.image import pack
from toppings.attachment import model_shape
from toppings.cli import main

BUTLER = Path(__file__).resolve().parents[1] / "examples" / "adapters" / "butler"
CONFIG = transformers.LlamaConfig(
    vocab_size=64,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    dtype="bfloat16",
)  # the shape of the model that the example's adapters are for, but for its vocabulary


@pytest.fixture
def model(tmp_path: Path) -> Path:
    CONFIG.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_pack_writes_what_the_engine_reads(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "butler.toppings"
    assert main(["pack", str(BUTLER), "--model", str(model), "-o", str(path)]) == 0
    adapter = toppings.read_adapter(BUTLER)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    bytes_printed = re.search(r"([\d,]+) bytes of bfloat16", printed)
    assert bytes_printed is not None
    for text in (str(path), "8 of 30 layers", "rank ", adapter.digest):
        assert text in printed

    attached = toppings.attach(
        transformers.AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
    )
    library = AdapterLibrary(HostStore(1 << 30), attached.shape, attached.modules, torch.bfloat16)
    image = library.add("butler", path)
    assert image.digest == adapter.digest
    assert f"{image.bytes:,}" == bytes_printed[1]

    assert main(["inspect", str(path)]) == 0
    inspected = capsys.readouterr().out.splitlines()
    assert main(["inspect", str(BUTLER)]) == 0
    of_folder = capsys.readouterr().out.splitlines()
    assert inspected[1] == of_folder[1]  # the digest
    table, expected = inspected[inspected.index("") :], of_folder[of_folder.index("") :]
    assert sorted(table) == sorted(expected)  # in the model's order here, by name there


def test_pack_casts(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "butler"
    arguments = ["pack", str(BUTLER), "--model", str(model), "--output", str(path)]
    assert main([*arguments, "--dtype", "float32"]) == 0
    assert "bytes of float32" in capsys.readouterr().out
    assert main(["inspect", str(path)]) == 0
    assert re.search(r"dtype +float32", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("adapter", "config", "output", "word"),
    [
        ("none", "llama", "a", "none"),
        ("butler", "none", "a", "config.json"),
        ("butler", "text", "a", "expected a causal language model"),
        ("butler", "encoder", "a", "expected a causal language model"),
        ("butler", "no heads", "a", "expected a causal language model"),
        ("butler", "a word", "a", "expected a causal language model"),
        ("butler", "small", "a", "got a module it lacks"),
        ("butler", "llama", "no/folder/a", "No such file or directory"),
    ],
)
def test_pack_refuses_in_one_line(
    adapter: str,
    config: str,
    output: str,
    word: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if config == "text":
        (model / "config.json").write_text("{}")
    elif config == "encoder":
        transformers.T5Config().save_pretrained(model)
    elif config in ("no heads", "a word"):
        wrong = {"num_attention_heads": 0} if config == "no heads" else {"hidden_size": "x"}
        (model / "config.json").write_text(json.dumps({**CONFIG.to_dict(), **wrong}))
    elif config == "small":
        small = transformers.LlamaConfig(**{**CONFIG.to_dict(), "num_hidden_layers": 2})
        small.save_pretrained(model)
    elif config == "none":
        (model / "config.json").unlink()
    folder = BUTLER if adapter == "butler" else tmp_path / "none"
    before = sorted(tmp_path.iterdir())
    assert main(["pack", str(folder), "--model", str(model), "-o", str(tmp_path / output)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and word in captured.err
    assert sorted(tmp_path.iterdir()) == before


def test_pack_needs_transformers(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["pack", str(BUTLER), "--model", str(model), "-o", str(tmp_path / "a")]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "transformers: expected it installed" in captured.err


def test_a_shape_needs_no_weights() -> None:
    with torch.device("meta"):
        meta = transformers.AutoModelForCausalLM.from_config(CONFIG)
    shape, modules = model_shape(meta)
    attached = toppings.attach(transformers.AutoModelForCausalLM.from_config(CONFIG))
    layers = range(shape.num_layers)
    assert [shape.layer(i) for i in layers] == [attached.shape.layer(i) for i in layers]
    assert modules == attached.modules


def test_packing_needs_no_torch_model(tmp_path: Path) -> None:
    shape = toppings._runtime.ModelShape([[("p", 4, 6)]])
    made = toppings.Adapter.from_tensors({"p": (torch.ones(2, 4), torch.ones(6, 2), 0.5)})
    image = pack(made, shape, {"p": (0, 0)}, torch.float16, tmp_path / "a")
    assert (image.bytes, image.scale(0, 0), image.layout.rank(0, 0)) == (64, 0.5, 2)
