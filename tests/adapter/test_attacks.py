# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile folders: each gives one error, of the right class, that names the thing."""

import json
import os
import struct

import pytest
import torch

from toppings.adapter import read_adapter
from toppings.errors import AdapterFormatError, UnsupportedAdapterError

from .attacks import CONFIG, Q, entry, key, pair, raw_file, write_folder, write_raw

A, B = key(Q, "A"), key(Q, "B")
GOOD = {A: entry([2, 6], 0, 48), B: entry([4, 2], 48, 80)}
DATA = bytes(80)


def twice() -> bytes:
    inner = json.dumps(GOOD)[1:-1]
    return f"{{{inner}, {json.dumps(A)}: {json.dumps(GOOD[A])}}}".encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header: expected at most 0 bytes in a file of 0, got no length"),
        (b"\1\0\0", "header: .*got no length"),
        (b"\0" * 8, "header: expected a JSON object"),
        (raw_file(GOOD, DATA, length=2**64 - 1), "header: .*got 18446744073709551615"),
        (raw_file(GOOD, DATA, length=100_000_001), "header: .*got 100000001"),
        (raw_file(GOOD, length=10_000), "header: expected at most .*got 10000"),
        (raw_file(b"[]"), "header: expected a JSON object"),
        (raw_file(b" " + json.dumps(GOOD).encode(), DATA), "header: expected a JSON object"),
        (raw_file(b"{" + b"\xff" * 8), "header: .*not UTF-8"),
        (raw_file(b'{"a":' + b"[" * 50_000), "header: .*(nested too deeply|invalid JSON)"),
        (raw_file(b'{"a": 1'), "header: .*invalid JSON"),
        (raw_file(twice(), DATA), f"header: .*the key '{A}' twice"),
        (raw_file({A: 3}), f"tensor '{A}': expected an object"),
        (raw_file({A: {"dtype": "F32", "shape": [1]}}), f"tensor '{A}': expected an object"),
        (raw_file({A: entry([1], 0, 4) | {"extra": 1}}, bytes(4)), f"'{A}': expected an object"),
        (raw_file({A: entry([1], 0, 4, dtype=7)}, bytes(4)), f"'{A}': expected a dtype, got 7"),
        (raw_file({A: entry([-1], 0, 4)}, bytes(4)), f"'{A}': expected a shape"),
        (raw_file({A: entry([1.5], 0, 4)}, bytes(4)), f"'{A}': expected a shape"),
        (raw_file({A: entry([True], 0, 4)}, bytes(4)), f"'{A}': expected a shape"),
        (raw_file({A: entry([1] * 9, 0, 4)}, bytes(4)), f"'{A}': expected a shape"),
        (raw_file({A: entry("ab", 0, 4)}, bytes(4)), f"'{A}': expected a shape"),
        (raw_file({A: entry([1], -4, 0)}, bytes(4)), f"'{A}': expected two data_offsets"),
        (raw_file({A: entry([1], 4, 0)}, bytes(4)), f"'{A}': expected 4 bytes .*got -4"),
        (raw_file({A: entry([2], 0, 4)}, bytes(4)), f"'{A}': expected 8 bytes .*got 4"),
        (raw_file({A: entry([2**40, 2**40], 0, 4)}, bytes(4)), f"'{A}': expected .* bytes"),
        (raw_file({A: entry([10**30], 0, 4)}, bytes(4)), "a number of 31 digits"),
        (raw_file(GOOD, DATA[:-1]), f"'{B}': expected data from byte 48 within 79"),
        (raw_file(GOOD), f"'{A}': expected data from byte 0 within 0"),
        (raw_file(GOOD, DATA + b"x"), "data: expected 80 bytes for the tensors, got 81"),
        (raw_file(GOOD | {B: entry([4, 2], 44, 76)}, DATA), f"'{B}': expected data from byte 48"),
        (raw_file(GOOD | {B: entry([4, 2], 52, 84)}, bytes(84)), f"'{B}': expected data from byte"),
        (raw_file(GOOD | {B: entry([4, 2], 0, 32)}, bytes(48)), "expected data from byte 32"),
        (raw_file({A: entry([1], 2**62, 2**62 + 4)}), f"'{A}': expected data from byte 0"),
        (raw_file(GOOD | {"__metadata__": 3}, DATA), "__metadata__"),
        (raw_file(GOOD | {"__metadata__": {"a": 3}}, DATA), "__metadata__"),
        (raw_file({}), "expected at least one pair"),
        (raw_file({"__metadata__": {"format": "pt"}}), "expected at least one pair"),
    ],
)
def test_damaged_safetensors(tmp_path, content, message):
    with pytest.raises(AdapterFormatError, match=message) as caught:
        read_adapter(write_raw(tmp_path, content))
    assert str(tmp_path) in str(caught.value)


def test_the_raw_file_is_good_before_it_is_damaged(tmp_path):
    assert read_adapter(write_raw(tmp_path, raw_file(GOOD, DATA))).max_rank == 2


@pytest.mark.parametrize("dtype", ["F64", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "X"])
def test_other_dtypes_are_refused_by_name(tmp_path, dtype):
    header = {A: entry([2, 6], 0, 12, dtype)}
    with pytest.raises(UnsupportedAdapterError, match=f"q_proj.*BF16, got '{dtype}'"):
        read_adapter(write_raw(tmp_path, raw_file(header, bytes(12))))


def single(name, *shape):
    return {name: torch.ones(*shape)}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (single("base_model.model.l.0.q_proj.lora_magnitude_vector", 4), "DoRA"),
        (single("base_model.model.l.0.q_proj.lora_magnitude_vector.weight", 4), "DoRA"),
        (single("base_model.model.embed_tokens.lora_embedding_A", 2, 9), "embedding LoRA"),
        (single("base_model.model.embed_tokens.lora_embedding_B", 4, 2), "embedding LoRA"),
        (single("base_model.model.l.0.q_proj.lora_B.bias", 4), "bias"),
        (single("base_model.model.lm_head.lora_A.weight", 2, 6), "lm_head"),
        (single("base_model.model.lm_head.weight", 9, 6), "lm_head"),
        (single("base_model.model.score.weight", 2, 6), "full weight"),
        (single("base_model.model.model.embed_tokens.weight", 9, 6), "full weight"),
        (single("base_model.model.l.0.q_proj.base_layer.weight", 4, 6), "base weights"),
        (single("base_model.model.l.0.mlp.experts.1.w1.lora_A.weight", 2, 6), "MoE expert"),
        (single("base_model.model.l.0.mlp.experts.lora_A.weight", 16, 6), "MoE expert"),
        (single("base_model.model.score.modules_to_save.weight", 2, 6), "full weights"),
        (single("base_model.model.embed_tokens.trainable_tokens_delta", 2, 6), "token"),
        (single("base_model.model.l.0.q_proj.lora_diag", 2), "KaSA"),
        (single("base_model.model.l.0.q_proj.lora_E", 2, 1), "AdaLoRA"),
        (single("base_model.model.l.0.q_proj.lora_C.weight", 2, 1), "unknown kind"),
        (single("base_model.model.lora_A.weight", 2, 6), "unknown kind"),
        (single("lora_unet_down_blocks_0_to_q.lora_down.weight", 2, 6), "kohya"),
        (single("lora_unet_down_blocks_0_to_q.alpha", 1), "kohya"),
    ],
)
def test_tensors_refused_by_name(tmp_path, extra, message):
    [name] = extra
    folder = write_folder(tmp_path, pair() | extra, target_modules="all-linear")
    with pytest.raises(UnsupportedAdapterError, match=message) as caught:
        read_adapter(folder)
    assert name in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 6, 3), (2, 6, 3, 3)])
def test_convolutions_are_refused(tmp_path, shape):
    tensors = pair() | {A: torch.ones(*shape), B: torch.ones(4, 2, *[1] * (len(shape) - 2))}
    with pytest.raises(UnsupportedAdapterError, match=f"{A}.*convolution"):
        read_adapter(write_folder(tmp_path, tensors))


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        ({A: torch.ones(2, 6)}, {}, f"'{A}': expected lora_B beside it"),
        ({B: torch.ones(4, 2)}, {}, f"'{B}': expected lora_A beside it"),
        (pair(rank=3), {}, f"'{A}': expected rank 2 .*got 3"),
        (pair(), {"rank_pattern": {"q_proj": 1}}, f"'{A}': expected rank 1 .*got 2"),
        (pair() | {B: torch.ones(4, 3)}, {}, f"'{B}': expected rank 2 .*got 3"),
        (pair() | {B: torch.ones(2, 4)}, {}, f"'{B}': expected rank 2 .*got 4"),
        (pair() | {A: torch.ones(12)}, {}, rf"'{A}': expected \[r, K\].*got \[12\]"),
        (pair() | {A: torch.ones(())}, {}, rf"'{A}': expected \[r, K\].*got \[\]"),
        (pair() | {A: torch.ones(2, 0)}, {}, rf"'{A}': .*at least 1, got \[2, 0\]"),
        (pair() | {A: torch.ones(0, 6), B: torch.ones(4, 0)}, {}, rf"'{A}': .*got \[0, 6\]"),
        (pair(Q.replace("q_proj", "k_proj")), {}, "k_proj.*expected a module that the config"),
        (pair(), {"exclude_modules": ["q_proj"]}, f"'{A}': expected a module that the config"),
        (pair(), {"layers_to_transform": [1]}, f"'{A}': expected a module that the config"),
        (pair(), {"target_modules": ".*v_proj"}, f"'{A}': expected a module that the config"),
        (pair(), {"lora_alpha": 1e39}, "scale of .*q_proj.*finite in float32"),
        (pair() | {"model.q_proj.lora_A.weight": torch.ones(2, 6)}, {}, "'model.q_proj.lora_A"),
        (single("base_model.model..q_proj.lora_A.weight", 2, 6), {}, "a name like"),
        (single("base_model.model.q proj.lora_A.weight", 2, 6), {}, "a name like"),
        (single("base_model.model.é.lora_A.weight", 2, 6), {}, "a name like"),
        (single(f"base_model.model.{'a' * 600}.lora_A.weight", 2, 6), {}, "a name like"),
        (
            pair() | {k.replace(".weight", ".other.weight"): v for k, v in pair().items()},
            {},
            "expected one adapter in the file",
        ),
        (pair() | {A: torch.full((2, 6), torch.nan)}, {}, f"'{A}': .*got NaN or infinity"),
        (pair() | {B: torch.full((4, 2), -torch.inf)}, {}, f"'{B}': .*got NaN or infinity"),
    ],
)
def test_contradictions(tmp_path, tensors, changes, message):
    with pytest.raises(AdapterFormatError, match=message) as caught:
        read_adapter(write_folder(tmp_path, tensors, **changes))
    assert str(tmp_path) in str(caught.value)


def test_overflow_by_the_cast_is_told_apart(tmp_path):
    folder = write_folder(tmp_path, pair() | {A: torch.full((2, 6), 1e5)})
    assert read_adapter(folder).max_rank == 2
    with pytest.raises(AdapterFormatError, match=f"'{A}': .*beyond the range of torch.float16"):
        read_adapter(folder, torch.float16)


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ([], AdapterFormatError, "adapter_config.json: expected a file"),
        (["adapter_config.json"], AdapterFormatError, "adapter_model.safetensors: expected a file"),
        (["adapter_config.json", "adapter_model.bin"], UnsupportedAdapterError, "bin': a pickle"),
        (["adapter_model.bin"], UnsupportedAdapterError, "adapter_model.bin': a pickle"),
        (["lora-q8.gguf"], UnsupportedAdapterError, "'lora-q8.gguf': a GGUF file"),
        (["model.lora_weights.npy"], UnsupportedAdapterError, "TensorRT-LLM"),
        (["adapter.nemo"], UnsupportedAdapterError, "NeMo"),
        (["adapter_config.json", "optimizer.pt"], AdapterFormatError, "expected a file"),
        (["other.safetensors"], AdapterFormatError, "adapter_config.json: expected a file"),
    ],
)
def test_folders_without_peft_files(tmp_path, files, error, message):
    for name in files:
        text = json.dumps(CONFIG) if name.endswith("json") else "x"
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        read_adapter(tmp_path)


@pytest.mark.parametrize("name", ["style.safetensors", "adapter_model.safetensors"])
def test_kohya_folder(tmp_path, name):
    header = {"lora_te_q.lora_up.weight": entry([4, 2], 0, 32)}
    (tmp_path / name).write_bytes(raw_file(header, bytes(32)))
    with pytest.raises(UnsupportedAdapterError, match=f"{name}.*kohya"):
        read_adapter(tmp_path)


def test_new_embeddings_file(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "new_embeddings.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedAdapterError, match="new_embeddings.safetensors"):
        read_adapter(folder)


def test_a_pickle_beside_safetensors_is_ignored(tmp_path):
    (write_folder(tmp_path) / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    assert read_adapter(tmp_path).max_rank == 2


def test_paths_that_are_no_folder(tmp_path):
    file = tmp_path / "lora.gguf"
    file.write_bytes(b"GGUF")
    for path in (file, tmp_path / "missing", "nul\0", tmp_path / ("x" * 5000)):
        with pytest.raises(AdapterFormatError, match="expected a folder"):
            read_adapter(path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "dangling", "loop"])
def test_files_that_are_no_files(tmp_path, name, kind):
    path = write_folder(tmp_path) / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        target = {"device": "/dev/zero", "dangling": tmp_path / "nowhere", "loop": path}[kind]
        os.symlink(target, path)
    with pytest.raises(AdapterFormatError, match=f"{name}: expected a re(gular|adable) file"):
        read_adapter(tmp_path)


def test_huge_config_is_not_parsed(tmp_path):
    folder = write_folder(tmp_path, config=b" " * (1 << 20) + json.dumps(CONFIG).encode())
    with pytest.raises(AdapterFormatError, match="at most 1048576 bytes"):
        read_adapter(folder)


def test_config_is_refused_before_the_weights_are_opened(tmp_path):
    folder = write_raw(tmp_path, struct.pack("<Q", 2**63))
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, "use_dora": True}))
    with pytest.raises(UnsupportedAdapterError, match="use_dora"):
        read_adapter(folder)


def test_a_config_that_is_a_secret_is_not_echoed(tmp_path):
    folder = write_folder(tmp_path, config=b"root:x:0:0:hunter2:/root:/bin/bash\n" * 9)
    with pytest.raises(AdapterFormatError) as caught:
        read_adapter(folder)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
