# SPDX-License-Identifier: Apache-2.0
"""Random damage to a good folder either reads or raises a ToppingsError, and nothing else."""

import json
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toppings.adapter import read_adapter
from toppings.errors import ToppingsError

from .attacks import CONFIG, pair, write_folder

CONFIG_BYTES = json.dumps(
    {**CONFIG, "rank_pattern": {"v_proj": 2}, "layers_to_transform": [0], "exclude_modules": "x"}
).encode()

# Bytes that mean something in JSON or in a header come up more often than one time in 256.
BYTES = st.one_of(st.integers(0, 255), st.sampled_from(list(b'{}[]",:\\0129-.eE \xff\x00tfnN()*+')))
EDITS = st.lists(st.tuples(st.integers(0, 2**20), BYTES, st.sampled_from("sid")), max_size=6)


def damage(data: bytes, edits: list[tuple[int, int, str]], cut: int | None) -> bytes:
    result = bytearray(data)
    for at, byte, action in edits:
        at %= len(result) or 1
        end = at + (action != "i")
        result[at:end] = b"" if action == "d" else bytes([byte])
    return bytes(result if cut is None else result[: cut % (len(result) + 1)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("fuzz"), pair(), config=CONFIG_BYTES)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_damage_never_escapes_as_another_error(folder, name):
    path = folder / name
    original = path.read_bytes()
    header = 8 + int.from_bytes(original[:8], "little") if name.endswith("s") else len(original)

    @settings(max_examples=100, deadline=None, database=None)
    @given(EDITS, st.one_of(st.none(), st.integers(0, 2**20)))
    def run(edits, cut):
        aimed = [(at % header if i % 3 else at, byte, do) for i, (at, byte, do) in enumerate(edits)]
        path.write_bytes(damage(original, aimed, cut))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read_adapter(folder)
        except ToppingsError as error:
            assert str(error).isprintable() and len(str(error)) < 2000

    try:
        run()
    finally:
        path.write_bytes(original)


@settings(max_examples=100, deadline=None, database=None)
@given(
    st.dictionaries(
        st.sampled_from(sorted(CONFIG) + ["rank_pattern", "layers_to_transform", "use_rslora"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.text(max_size=5), inner, max_size=3)
            ),
            max_leaves=5,
        ),
    )
)
def test_any_value_in_the_config(folder, changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**CONFIG, **changes}))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read_adapter(folder)
    except ToppingsError as error:
        assert str(error).isprintable()
    finally:
        path.write_bytes(CONFIG_BYTES)
