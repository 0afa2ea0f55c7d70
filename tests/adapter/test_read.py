# SPDX-License-Identifier: Apache-2.0
"""Reading good folders: modules, order, dtypes, digest, and adapters made in memory."""

import hashlib
import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from toppings.adapter import Adapter, LoraModule, describe, read_adapter
from toppings.errors import AdapterFormatError, InvalidArgumentError

from .attacks import CONFIG, Q, key, pair, write_folder

V = "model.layers.0.self_attn.v_proj"


def in_memory(tensors, scale=2.0):
    """The adapter that reading ``tensors`` should give."""
    modules = {name[17:-14] for name in tensors}
    return Adapter.from_tensors(
        {m: (tensors[key(m, "A")], tensors[key(m, "B")], scale) for m in modules}
    )


def test_reads_pairs_with_their_scale(tmp_path):
    tensors = pair()
    adapter = read_adapter(write_folder(tmp_path))
    assert list(adapter.modules) == [Q]
    module = adapter.modules[Q]
    assert torch.equal(module.a, tensors[key(Q, "A")])
    assert torch.equal(module.b, tensors[key(Q, "B")])
    assert (module.rank, module.scale, adapter.source) == (2, 2.0, tmp_path)
    assert (adapter.max_rank, adapter.ranks, adapter.nbytes) == (2, (2,), 4 * (12 + 8))


def test_path_may_be_text_bytes_or_a_link(tmp_path):
    folder = write_folder(tmp_path / "real")
    os.symlink(folder, tmp_path / "link")
    paths = [folder, str(folder), os.fsencode(folder), tmp_path / "link"]
    assert len({read_adapter(path).digest for path in paths}) == 1


def test_a_linked_file_is_fine(tmp_path):
    folder = write_folder(tmp_path / "real")
    os.rename(folder / "adapter_model.safetensors", tmp_path / "blob")
    os.symlink(tmp_path / "blob", folder / "adapter_model.safetensors")
    assert read_adapter(folder).max_rank == 2


def test_layers_come_in_natural_order(tmp_path):
    names = [f"model.layers.{i}.self_attn.q_proj" for i in (10, 2, 0, 1)]
    tensors = {k: v for name in names for k, v in pair(name).items()}
    adapter = read_adapter(write_folder(tmp_path, tensors))
    assert [name.split(".")[2] for name in adapter.modules] == ["0", "1", "2", "10"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_keeps_the_dtype_of_the_file_or_casts(tmp_path, dtype):
    folder = write_folder(tmp_path, pair(dtype=dtype))
    assert read_adapter(folder).dtype == dtype
    for other in (torch.float32, torch.float16, torch.bfloat16):
        module = read_adapter(folder, other).modules[Q]
        assert torch.equal(module.a, pair(dtype=dtype)[key(Q, "A")].to(other))


def test_mixed_dtypes_widen_within_a_pair_only(tmp_path):
    tensors = pair(dtype=torch.bfloat16) | pair(V, dtype=torch.float16)
    tensors[key(V, "B")] = tensors[key(V, "B")].bfloat16()
    adapter = read_adapter(write_folder(tmp_path, tensors))
    assert adapter.modules[Q].a.dtype == torch.bfloat16
    assert adapter.modules[V].a.dtype == adapter.modules[V].b.dtype == torch.float32
    assert adapter.dtype == torch.float32


def test_the_adapters_own_name_in_the_keys_is_tolerated(tmp_path):
    named = {k.replace(".weight", ".default.weight"): v for k, v in pair().items()}
    plain = write_folder(tmp_path / "plain")
    assert read_adapter(write_folder(tmp_path / "n", named)).digest == read_adapter(plain).digest


@pytest.mark.parametrize("projection", ["qkv_proj", "gate_up_proj", "c_attn", "query_key_value"])
def test_fused_projections_are_modules_like_others(tmp_path, projection):
    name = f"transformer.h.11.{projection}"
    folder = write_folder(tmp_path, pair(name, 3, n=12), target_modules=[projection], r=3)
    assert read_adapter(folder).modules[name].b.shape == (12, 3)


def test_odd_and_different_ranks(tmp_path):
    tensors = pair(Q, 1) | pair(V, 7)
    folder = write_folder(tmp_path, tensors, r=1, rank_pattern={"v_proj": 7})
    adapter = read_adapter(folder)
    assert (adapter.ranks, adapter.max_rank) == ((1, 7), 7)
    assert adapter.modules[V].scale == 4 / 7


def test_tensors_are_independent_of_the_file(tmp_path):
    adapter = read_adapter(write_folder(tmp_path))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\xff" * 400)
    assert torch.equal(adapter.modules[Q].a, pair()[key(Q, "A")])


def test_digest_is_of_the_content_alone(tmp_path):
    tensors = pair() | pair(V)
    folder = write_folder(tmp_path / "a", tensors)
    first = read_adapter(folder).digest
    assert len(first) == 64 and first == in_memory(tensors).digest
    with pytest.warns(UserWarning):
        other = read_adapter(
            write_folder(
                tmp_path / "b",
                dict(reversed(tensors.items())),
                lora_dropout=0.5,
                lora_alpha=4.0,
                target_modules="all-linear",
                unknown=1,
            )
        )
    assert other.digest == first


def test_digest_tells_apart_whatever_matters(tmp_path):
    tensors = pair()
    changed = {k: v.clone() for k, v in tensors.items()}
    changed[key(Q, "A")][1, 2] += 1e-6
    digests = {
        in_memory(tensors).digest,
        in_memory(changed).digest,
        in_memory(tensors, 2.000001).digest,
        in_memory({k.replace("q_proj", "v_proj"): v for k, v in tensors.items()}).digest,
        in_memory({k: v.bfloat16() for k, v in tensors.items()}).digest,
        in_memory({k: v.bfloat16().float() for k, v in tensors.items()}).digest,
        in_memory({key(Q, "A"): torch.ones(2, 6), key(Q, "B"): torch.ones(4, 2)}).digest,
        in_memory({key(Q, "A"): torch.ones(2, 4), key(Q, "B"): torch.ones(6, 2)}).digest,
    }
    assert len(digests) == 8


def test_digest_is_what_is_documented():
    """Another value orphans every cache keyed by digest: give the serialisation a new version."""
    a, b = torch.arange(6.0).reshape(2, 3), torch.arange(4.0).reshape(2, 2)
    text = b"toppings adapter 1"
    text += struct.pack("<I", 10) + b"layers.0.q" + struct.pack("<I", 13) + b"torch.float32"
    text += struct.pack("<4Qf", 2, 3, 2, 2, 0.1) + struct.pack("<10f", *range(6), *range(4))
    adapter = Adapter.from_tensors({"layers.0.q": (a, b, 0.1)})
    assert adapter.digest == hashlib.sha256(text).hexdigest()


def test_from_tensors_copies_casts_and_densifies():
    a, b = torch.ones(6, 2).T, torch.ones(4, 2, requires_grad=True)
    adapter = Adapter.from_tensors({Q: (a, b, 1)}, torch.bfloat16)
    digest = adapter.digest
    a.fill_(7)
    module = adapter.modules[Q]
    assert module.a.is_contiguous() and not module.b.requires_grad
    assert module.a[0, 0] == 1 and adapter.digest == digest and adapter.source is None
    assert adapter.dtype == torch.bfloat16 and isinstance(module.scale, float)


@pytest.mark.parametrize(
    ("path", "a", "b", "scale", "message"),
    [
        (Q, torch.ones(2, 6), torch.ones(4, 3), 1.0, "q_proj: .*a .r, K. and b .N, r."),
        (Q, torch.ones(6), torch.ones(4, 2), 1.0, "q_proj: .*a .r, K."),
        (Q, torch.ones(0, 6), torch.ones(4, 0), 1.0, "q_proj: .*at least 1"),
        (Q, torch.ones(2, 6), torch.ones(4, 2), float("nan"), "q_proj: .*scale"),
        (Q, torch.ones(2, 6), torch.ones(4, 2), 1e39, "q_proj: .*scale"),
        (Q, torch.ones(2, 6).int(), torch.ones(4, 2), 1.0, "q_proj: .*torch.int32"),
        (Q, torch.ones(2, 6).double(), torch.ones(4, 2), 1.0, "q_proj: .*torch.float64"),
        (Q, torch.full((2, 6), torch.nan), torch.ones(4, 2), 1.0, "q_proj: a: .*NaN"),
        ("", torch.ones(2, 6), torch.ones(4, 2), 1.0, "module paths, got ''"),
        ("a..b", torch.ones(2, 6), torch.ones(4, 2), 1.0, "module paths, got 'a..b'"),
        ("a\n", torch.ones(2, 6), torch.ones(4, 2), 1.0, "module paths"),
        ("é", torch.ones(2, 6), torch.ones(4, 2), 1.0, "module paths"),
    ],
)
def test_from_tensors_refuses(path, a, b, scale, message):
    with pytest.raises(InvalidArgumentError, match=message):
        Adapter.from_tensors({path: (a, b, scale)})


@pytest.mark.parametrize("at", [0, 16383, 16384, 40_000, 59_999])
def test_large_tensors_are_copied_and_checked_in_every_part(at):
    a, b = torch.randn(3, 20_000), torch.randn(5, 3)
    module = Adapter.from_tensors({Q: (a, b, 1.0)}).modules[Q]
    assert torch.equal(module.a, a) and torch.equal(module.b, b)
    a.view(-1)[at] = torch.inf
    with pytest.raises(InvalidArgumentError, match="infinity"):
        Adapter.from_tensors({Q: (a, b, 1.0)})


def test_empty_and_wrong_dtype_arguments(tmp_path):
    with pytest.raises(InvalidArgumentError, match="at least one module"):
        Adapter.from_tensors({})
    for dtype in (torch.float64, torch.int8, "float32"):
        with pytest.raises(InvalidArgumentError, match="dtype: expected"):
            read_adapter(tmp_path, dtype)
    with pytest.raises(InvalidArgumentError, match="one dtype"):
        LoraModule(torch.ones(2, 6), torch.ones(4, 2).half(), 1.0)
    with pytest.raises(InvalidArgumentError, match="CPU"):
        LoraModule(torch.ones(2, 6, device="meta"), torch.ones(4, 2, device="meta"), 1.0)


def test_modules_cannot_be_replaced(tmp_path):
    adapter = read_adapter(write_folder(tmp_path))
    with pytest.raises(TypeError):
        adapter.modules[Q] = adapter.modules[Q]
    with pytest.raises(AttributeError):
        adapter.modules = {}


def test_describe_groups_by_projection(tmp_path):
    names = [f"model.layers.{i}.self_attn.{p}" for i in (0, 1, 2, 5) for p in ("q_proj", "v_proj")]
    tensors = {k: v for n in names for k, v in pair(n, 3 if n.endswith("5.q_proj") else 2).items()}
    tensors |= pair("model.layers.5.self_attn.q_proj", 3)
    folder = write_folder(tmp_path, tensors, rank_pattern={"5.self_attn.q_proj": 3})
    adapter = read_adapter(folder)
    lines = describe(adapter).splitlines()
    rows = [line.split() for line in lines]
    assert ["source", str(tmp_path)] in rows and ["digest", adapter.digest] in rows
    assert ["dtype", "float32"] in rows and ["modules", "8"] in rows
    [q] = [line for line in lines if "*.self_attn.q_proj" in line]
    assert "0-2, 5" in q and "6 -> 4" in q and "2, 3" in q and "1.33333, 2" in q
    assert sum("layers.*" in line for line in lines) == 2


def test_describe_without_layers_or_source():
    text = describe(Adapter.from_tensors({"head.q": (torch.ones(1, 2), torch.ones(3, 1), 1.0)}))
    assert "memory" in text and "head.q" in text


def test_a_file_that_changes_after_its_header_was_read(tmp_path, monkeypatch):
    from toppings.adapter import read as reader

    folder = write_folder(tmp_path)
    original = reader.plan

    def swap(*args):
        save_file(pair(dtype=torch.float16), folder / "adapter_model.safetensors")
        return original(*args)

    monkeypatch.setattr(reader, "plan", swap)
    with pytest.raises(AdapterFormatError, match="q_proj.*as its header had"):
        read_adapter(folder)


def test_no_weight_is_read_before_the_checks(tmp_path, monkeypatch):
    from toppings.adapter import weights

    def never(*args, **kwargs):
        raise AssertionError("opened the weights")

    monkeypatch.setattr(weights, "safe_open", never)
    with pytest.raises(AdapterFormatError, match="rank 5"):
        read_adapter(write_folder(tmp_path, r=5))


def test_config_order_of_keys_is_irrelevant(tmp_path):
    text = json.dumps(dict(reversed(CONFIG.items()))).encode()
    assert read_adapter(write_folder(tmp_path, config=text)).max_rank == 2
