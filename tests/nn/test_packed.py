"""Packed base weights: used for few rows without gradients on the CPU, never stale, never stored."""

import copy
import io
import pickle

import pytest
import torch
from peftops.methods import LoRA, attach
from peftops.nn import LoRALinear, packed
from peftops.nn.adapter import Adapter
from peftops.nn.conv1d import LoRAConv1D
from torch import nn
from transformers.pytorch_utils import Conv1D

from .laws import add, close, train


@pytest.fixture
def calls(monkeypatch):
    """The rows of each call of the packed operator, and "pack" for each packing."""
    found, linear, pack = [], packed.lora_linear_packed, packed.pack_weight

    def counted(x, *rest):
        found.append(x.numel() // x.shape[-1])
        return linear(x, *rest)

    def counted_pack(weight):
        found.append("pack")
        return pack(weight)

    monkeypatch.setattr(packed, "lora_linear_packed", counted)
    monkeypatch.setattr(packed, "pack_weight", counted_pack)
    return found


def layer(dtype=torch.float32, conv1d=False, **options):
    base = Conv1D(23, 30) if conv1d else nn.Linear(30, 23)
    kind = LoRAConv1D if conv1d else LoRALinear
    return train(kind.adapt_(base.to(dtype), Adapter(rank=4, alpha=6, **options)), "default").eval()


def without(layer, x):
    held, layer.packed = layer.packed, None
    y = layer(x)
    layer.packed = held
    return y


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_few_rows_without_gradients(calls, dtype, conv1d):
    adapted = layer(dtype, conv1d)
    assert adapted.prepack_() >= adapted.weight.nbytes and calls == ["pack"]
    with torch.no_grad():
        for shape in ((1, 30), (64, 30), (4, 2, 30), (30,)):
            x = torch.randn(shape).to(dtype)
            close(adapted(x), without(adapted, x), dtype)
    assert calls == ["pack", 1, 64, 8, 1]
    adapted.unpack_()
    with torch.no_grad():
        adapted(torch.randn(1, 30).to(dtype))
    assert len(calls) == 5


def test_every_other_call_is_the_layers_own(calls):
    adapted = add(layer(dropout=0.2), "b")
    adapted.prepack_()
    own = lambda x: torch.equal(adapted(x), without(adapted, x))  # noqa: E731
    x = torch.randn(3, 30)
    assert own(x)  # gradients may be asked for
    with torch.no_grad():
        assert own(torch.randn(65, 30)) and own(torch.randn(5, 13, 30))
        with torch.autocast("cpu", torch.bfloat16):
            assert own(x)
        adapted.set_active({"default": 1.0, "b": 1.0})
        assert own(x)
        adapted.set_active({})
        assert own(x)
        adapted.set_active({"default": 1.0})
        adapted.set_disabled(True)
        assert own(x)
        adapted.set_disabled(False)
        adapted.merge()
        assert own(x)
        adapted.unmerge()
        torch.func.vmap(adapted)(x.view(1, 3, 30))
        adapted.train()
        adapted(x)
        with pytest.raises(RuntimeError, match="lora_linear: "):
            adapted(x.double())
        with pytest.raises(RuntimeError, match="lora_linear: "):
            adapted(x[:, :7])
    assert set(calls) == {"pack"}


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(2),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(2 * layer.weight, requires_grad=False)),
    "another storage": lambda layer: setattr(layer.weight, "data", 2 * layer.weight),
    "a state_dict": lambda layer: layer.load_state_dict({n: 2 * t for n, t in layer.state_dict().items()}),
    "merge and back": lambda layer: (layer.merge(), layer.unmerge()),
    "another dtype": lambda layer: layer.double().float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_packed_anew(calls, change):
    adapted, x = layer(), torch.randn(3, 30)
    adapted.prepack_()
    with torch.no_grad():
        adapted(x)
        for _ in range(2):
            CHANGES[change](adapted)
            close(adapted(x), without(adapted, x), torch.float32)
            adapted(x)
    assert calls == ["pack", 3, "pack", 3, 3, "pack", 3, 3]


def test_a_storage_at_the_same_address_is_another_one(calls):
    adapted, x = layer(), torch.randn(3, 30)
    adapted.prepack_()
    with torch.no_grad():
        for number in range(5):
            adapted.weight.data = torch.empty(0)
            adapted.weight.data = torch.full((23, 30), float(number))
            close(adapted(x), without(adapted, x), torch.float32)


def test_the_adapter_may_change(calls):
    adapted, x = layer(lora_bias=True), torch.randn(3, 30)
    adapted.prepack_()
    with torch.inference_mode():
        for _ in range(2):
            train(adapted, "default")
            close(adapted(x), without(adapted, x), torch.float32)
            adapted.set_active({"default": 0.3})
    assert calls == ["pack", 3, 3]


def _saved(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer


def test_copies_and_files_hold_no_packed_weight(calls):
    adapted, x = layer(), torch.randn(3, 30)
    names, size = list(adapted.state_dict()), _saved(adapted).tell()
    adapted.prepack_()
    assert list(adapted.state_dict()) == names and _saved(adapted).tell() - size < 500
    for other in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert other.packed is not adapted.packed
        calls.clear()
        with torch.no_grad():
            other.weight.mul_(2)
            close(other(x), without(other, x), torch.float32)
        assert calls == ["pack", 3]


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_layers_read_the_weight_itself(calls):
    adapted, x = layer(), torch.randn(3, 30)
    adapted.prepack_()
    with torch.no_grad():
        close(torch.compile(adapted, backend="aot_eager", fullgraph=True)(x), adapted(x), torch.float32)
    assert calls == ["pack", 3]


def test_a_tuning_packs_what_it_adapts(calls):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(9, 30), nn.Linear(30, 12), nn.Linear(12, 4)).eval()
    tuning = attach(model, LoRA(rank=2, target_modules=["0", "1", "2"]))
    for parameter in tuning.parameters():
        nn.init.normal_(parameter, std=0.2)
    ids = torch.arange(6)
    with torch.no_grad():
        expected = model(ids)
        assert tuning.prepack() >= 4 * (30 * 12 + 12 * 4) and calls == ["pack", "pack"]
        close(model(ids), expected, torch.float32)
        assert calls[2:] == [6, 6]
        tuning.unpack()
        assert torch.equal(model(ids), expected) and model[1].packed is None
        tuning.prepack()
        tuning.detach()
    assert not any("packed" in vars(module) for module in model)
    with pytest.raises(RuntimeError, match="prepack: this adapter was taken out"):
        tuning.prepack()


def test_weights_that_cannot_be_packed():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3))
    tuning = attach(model, LoRA(rank=2))
    with pytest.raises(RuntimeError, match="prepack: the weight is on meta; packed weights are for inference on the"):
        tuning.prepack()
    with torch.inference_mode():
        made = nn.Linear(4, 3)
    made = LoRALinear.adapt_(made, Adapter(rank=2))
    with pytest.raises(RuntimeError, match="prepack: the weight was made in inference mode"):
        made.prepack_()
    assert made.packed is None
