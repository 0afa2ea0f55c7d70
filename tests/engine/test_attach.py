# SPDX-License-Identifier: Apache-2.0
"""attach(): one fused weight per shared input, the same model otherwise."""

import pytest
import torch
from torch import nn

import toppings
from toppings.attachment import AttachedModel
from toppings.errors import InvalidArgumentError, UnsupportedModelError
from toppings.layers import LoraLinear

from .models import ARCHITECTURES, World, make_model, prompt_of

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.tensor([prompt_of(9)])


def attached_with(llama: World, name: str) -> tuple[AttachedModel, int]:
    """A Llama and the slot of one loaded adapter."""
    attached = toppings.attach(make_model("llama"))
    store = toppings.HostStore(1 << 28)
    library = toppings.AdapterLibrary(store, attached.shape, attached.modules, torch.float32)
    slot, _ = attached.slots.acquire(library.add(name, llama.path(name)))
    attached.loader.load(slot).wait_for_all()
    return attached, slot


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_names_values_and_logits_stay(arch: str) -> None:
    model, plain = make_model(arch), make_model(arch)
    attached = toppings.attach(model)
    state = model.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(state[k], v) for k, v in plain.state_dict().items())
    assert [k for k, _ in model.named_parameters()] == [k for k, _ in plain.named_parameters()]
    expected = {k for k, m in plain.named_modules() if type(m) is nn.Linear} - {"lm_head"}
    assert {k for k, m in model.named_modules() if isinstance(m, LoraLinear)} == expected
    assert set(attached.modules) == expected
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])  # without biases, with q, k and v biases
def test_shared_inputs_are_one_weight_without_a_copy(arch: str) -> None:
    model = make_model(arch)
    toppings.attach(model)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linears in (
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [mlp.gate_proj, mlp.up_proj],
        ):
            site = linears[0].site
            assert all(x.site is site for x in linears)
            assert [x.index for x in linears] == list(range(len(linears)))
            storage = site.weight.untyped_storage()
            assert storage.nbytes() == sum(x.weight.nbytes for x in linears)
            for x in linears:
                assert x.weight.untyped_storage().data_ptr() == storage.data_ptr()
                if x.bias is not None:
                    owner = site.bias.untyped_storage()
                    assert x.bias.untyped_storage().data_ptr() == owner.data_ptr()
            assert torch.equal(site.weight, torch.cat([x.weight for x in linears]))
        for x in (attention.o_proj, mlp.down_proj):
            assert x.site.widths == [x.out_features]
            assert x.site.weight.data_ptr() == x.weight.data_ptr()


def test_state_can_be_loaded_while_attached() -> None:
    model = make_model("llama")
    toppings.attach(model)
    state = {k: v + 0.01 for k, v in make_model("llama").state_dict().items()}
    model.load_state_dict(state)
    plain = make_model("llama")
    plain.load_state_dict(state)
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-5)


def test_detach_and_attach_again() -> None:
    model, plain = make_model("llama"), make_model("llama")
    before = dict(model.named_modules())
    attached = toppings.attach(model)
    with pytest.raises(UnsupportedModelError, match="attached already"):
        toppings.attach(model)
    assert attached.detach() is model
    after = dict(model.named_modules())
    assert list(after) == list(before)
    assert all(after[k] is m for k, m in before.items())
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=0, atol=0)
    toppings.attach(model).detach()


@pytest.mark.parametrize("name", ["odd", "attention", "layers"])
def test_plain_forward_with_one_adapter_is_pefts(llama: World, name: str) -> None:
    attached, slot = attached_with(llama, name)
    model = attached.model
    attached.set_batch(torch.full((9,), slot, dtype=torch.int32))
    with torch.inference_mode():
        logits = model(IDS).logits[0]
        torch.testing.assert_close(logits, llama.logits(name, prompt_of(9)), rtol=1e-4, atol=1e-4)
        for nobody in (None, torch.full((9,), -1, dtype=torch.int32)):
            attached.set_batch(nobody)
            base = model(IDS).logits[0]
            torch.testing.assert_close(base, llama.logits(None, prompt_of(9)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(base, logits, atol=1e-2)


def test_set_batch_refuses_what_is_no_slot_list(llama: World) -> None:
    attached, slot = attached_with(llama, "odd")
    for bad in (torch.zeros(2, 2, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(InvalidArgumentError, match="token_slots: expected int32"):
            attached.set_batch(bad)
    for outside in (8, -2):
        with pytest.raises((RuntimeError, ValueError)):
            attached.set_batch(torch.tensor([slot, outside], dtype=torch.int32))
    attached.set_batch(torch.full((4,), slot, dtype=torch.int32))
    with pytest.raises((RuntimeError, ValueError)), torch.inference_mode():
        attached.model(IDS)  # nine tokens


def test_autograd_is_refused(llama: World) -> None:
    attached, slot = attached_with(llama, "odd")
    attached.set_batch(torch.full((9,), slot, dtype=torch.int32))
    with pytest.raises(UnsupportedModelError, match="autograd"):
        attached.model(IDS)
    with torch.no_grad():
        attached.model(IDS)


@pytest.mark.parametrize("order", ["qkv", "vkq", "kqv", "kk", "qkqkvv"])
@pytest.mark.parametrize("inference", [True, False], ids=["inference_mode", "no_grad"])
def test_siblings_with_other_inputs(llama: World, order: str, inference: bool) -> None:
    """A site computes for the tensor it is given, whatever its siblings were given before."""
    attached, slot = attached_with(llama, "odd")
    attention = attached.model.model.layers[1].self_attn
    peft = llama.peft["odd"].base_model.model.model.layers[1].self_attn
    attached.set_batch(torch.full((5,), slot, dtype=torch.int32))
    with torch.inference_mode(inference), torch.no_grad():
        inputs = [torch.randn(1, 5, 48) for _ in range(2)]
        for i, letter in enumerate(order):
            x = inputs[i % 2]
            found = getattr(attention, f"{letter}_proj")(x)
            expected = getattr(peft, f"{letter}_proj")(x)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_input_written_to_between_siblings(llama: World) -> None:
    attached, slot = attached_with(llama, "odd")
    attention = attached.model.model.layers[1].self_attn
    peft = llama.peft["odd"].base_model.model.model.layers[1].self_attn
    attached.set_batch(torch.full((5,), slot, dtype=torch.int32))
    with torch.no_grad():
        x = torch.randn(1, 5, 48)
        attention.q_proj(x)
        x.mul_(2)
        torch.testing.assert_close(attention.k_proj(x), peft.k_proj(x), rtol=1e-4, atol=1e-4)


class Block(nn.Module):
    def __init__(self, biases: tuple[bool, ...]) -> None:
        super().__init__()
        for name, bias in zip(("q_proj", "k_proj", "v_proj"), biases, strict=True):
            setattr(self, name, nn.Linear(6, 4, bias=bias))


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)


@pytest.mark.parametrize("biases", [(True, False, True), (False, True, False), (True,) * 3])
def test_any_mixture_of_biases(biases: tuple[bool, ...]) -> None:
    block = Block(biases)
    x = torch.randn(3, 6)
    names = ("q_proj", "k_proj", "v_proj")
    with torch.no_grad():
        expected = [getattr(block, name)(x) for name in names]
        toppings.attach(Stack(block))
        found = [getattr(block, name)(x) for name in names]
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)
    assert [getattr(block, n).bias is not None for n in names] == list(biases)


def test_linears_that_cannot_be_fused_stay_apart() -> None:
    block = Block((False,) * 3)
    block.k_proj = nn.Linear(5, 4)
    attached = toppings.attach(Stack(block))
    assert len(attached.modules) == 3
    assert all(x.site.widths == [4] for x in (block.q_proj, block.k_proj, block.v_proj))


@pytest.mark.parametrize(
    "model",
    [nn.Linear(3, 3), nn.Sequential(), Stack(nn.Conv1d(3, 3, 1)), Stack(nn.LayerNorm(3))],
    ids=["no_layers", "empty", "conv", "norm"],
)
def test_models_without_decoder_layers(model: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match="expected decoder layers built from nn.Linear"):
        toppings.attach(model)


@pytest.mark.parametrize(
    "options", [{"max_slots": 0}, {"max_rank": 0}, {"arena_bytes": 1}, {"lora_dtype": torch.int8}]
)
def test_options_out_of_range_change_nothing(options: dict) -> None:
    model = make_model("llama")
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        toppings.attach(model, **options)
    assert not any(isinstance(m, LoraLinear) for m in model.modules())
    assert model.model.layers[0].self_attn.q_proj.weight.untyped_storage().nbytes() == 64 * 48 * 4
