"""LoRAConv1d, LoRAConv2d, LoRAConv3d: the laws of a layer, PEFT's layers, and what a convolution has that others have
not.
"""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import Conv1d as PeftConv1d
from peft.tuners.lora.layer import Conv2d as PeftConv2d
from peft.tuners.lora.layer import Conv3d as PeftConv3d
from peftops.nn.adapter import Adapter
from peftops.nn.conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from peftops.nn.lora import lora_class, why_not
from torch import nn

from . import laws

IN, OUT = 6, 8
BASES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d)
SIZES = ((11,), (9, 7), (5, 6, 5))


def formula(dimensions, padding=0, padding_mode="zeros", groups=1, **options):
    """With the padding written out and the sum in the order of the equation."""
    convolve = FUNCTIONS[dimensions - 1]

    def equation(weight, bias, parts, x):
        inside = padding
        if padding_mode != "zeros":
            x, inside = F.pad(x, [padding] * 2 * dimensions, mode=padding_mode), 0
        y = convolve(x, weight, bias, padding=inside, groups=groups, **options)
        for scale, a, b in parts:
            y = y + scale * convolve(convolve(x, a, padding=inside, **options), b, groups=groups)
        return y

    return equation


def kind(dimensions, kernel=3, batch=(2,), channels=(IN, OUT), bias=True, **options):
    def base():
        return BASES[dimensions - 1](*channels, kernel, bias=bias, **options)

    def x(dtype):
        generator = torch.Generator().manual_seed(1)
        return torch.randn(*batch, channels[0], *SIZES[dimensions - 1], generator=generator).to(dtype)

    return laws.Kind(base, x, formula(dimensions, **options), mergeable=options.get("groups", 1) == 1)


KINDS = {
    "1d": kind(1),
    "1d, same": kind(1, 4, padding="same", dilation=2),
    "1d, unbatched, reflected": kind(1, batch=(), padding=2, padding_mode="reflect"),
    "2d": kind(2, stride=2, padding=1),
    "2d, kernel 1, no bias": kind(2, 1, bias=False),
    "2d, dilated, circular": kind(2, padding=2, dilation=2, padding_mode="circular"),
    "2d, groups": kind(2, groups=2, padding="valid"),
    "3d": kind(3, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)),
}
MERGEABLE = [name for name in KINDS if KINDS[name].mergeable]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
def test_law(law, name, one_thread):
    law(KINDS[name])


@pytest.mark.parametrize("name", MERGEABLE)
@pytest.mark.parametrize("law", laws.MERGING_LAWS, ids=lambda law: law.__name__)
def test_merging_law(law, name, one_thread):
    law(KINDS[name])


# ---- PEFT ------------------------------------------------------------------------------------------------------------


def peft_twin(layer):
    """PEFT's layer with the same numbers."""
    adapter, base = layer.adapters["default"], type(layer)._base_class
    plain = base(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layer.bias is not None,
        layer.padding_mode,
    )
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if "lora" not in name})
    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, lora_bias=adapter.lora_bias)
    wrapper = {nn.Conv1d: PeftConv1d, nn.Conv2d: PeftConv2d, nn.Conv3d: PeftConv3d}[base]
    twin = wrapper(plain, "default", config, r=adapter.rank, lora_alpha=adapter.alpha)
    a, b, bias = layer.factors("default")
    # The shapes are those of PEFT's files: load_state_dict is strict about them.
    twin.lora_A.default.load_state_dict({"weight": a})
    twin.lora_B.default.load_state_dict({"weight": b} | ({} if bias is None else {"bias": bias}))
    return twin


@pytest.mark.parametrize(
    "name", ["1d", "2d", "2d, kernel 1, no bias", "2d, groups", "3d", "1d, same padding", "2d, depthwise"]
)
def test_output_gradients_and_merged_weight_are_those_of_peft(name):
    extra = {"1d, same padding": kind(1, padding="same"), "2d, depthwise": kind(2, channels=(4, 8), groups=4)}
    case = (KINDS | extra)[name]
    layer = case.adapted(lora_bias="no bias" not in name)
    twin = peft_twin(layer)
    ours = laws.gradients(layer, layer, case.x(torch.float32))
    x = case.x(torch.float32).requires_grad_()
    y = twin(x)
    torch.manual_seed(3)
    y.backward(torch.randn(y.shape))
    bias = [twin.lora_B.default.bias.grad] if layer.adapters["default"].lora_bias else []
    theirs = [y, twin.lora_A.default.weight.grad, twin.lora_B.default.weight.grad, *bias, x.grad]
    for one, other in zip(ours, theirs, strict=True):
        laws.close(one, other, torch.float32)
    if case.mergeable:
        laws.close(layer.delta_weight("default"), twin.get_delta_weight("default"), torch.float32)


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding": 2, "padding_mode": "reflect"}])
def test_peft_trains_another_layer_than_it_merges(options):
    """PEFT 0.21 gives A neither dilation nor padding mode: its output changes, or its forward fails, where ours stays
    that of the merged weight.
    """
    case = kind(2, **options)
    layer, x = case.adapted(), case.x(torch.float32)
    twin = peft_twin(layer)
    merged = peft_twin(layer)
    merged.merge()
    laws.close(layer(x), merged(x), torch.float32)
    if "dilation" in options:
        with pytest.raises(RuntimeError, match="must match the size"):
            twin(x)
    else:
        assert (twin(x) - merged(x)).norm() > 0.1 * merged(x).norm()


def test_starts_as_in_peft():
    layer = LoRAConv2d.from_conv(nn.Conv2d(64, OUT, 5), rank=16)
    bound = (64 * 5 * 5) ** -0.5
    a = layer.lora_a.default
    assert 0.99 * bound < a.abs().max() <= bound and layer.lora_b.default.count_nonzero() == 0
    twin = peft_twin(layer)
    torch.manual_seed(4)
    twin.reset_lora_parameters("default", True)
    torch.manual_seed(4)
    layer.reset_lora_parameters()
    assert torch.equal(layer.lora_a.default, twin.lora_A.default.weight)


# ---- a convolution's own ---------------------------------------------------------------------------------------------


def test_groups_refuse_what_they_cannot_hold():
    case = KINDS["2d, groups"]
    layer = case.adapted()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match="merge: a convolution with 2 groups cannot hold the sum"):
        layer.merge()
    with pytest.raises(NotImplementedError, match="groups > 1"):
        peft_twin(layer).merge()
    assert not layer.merged and all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    for adapter, message in (
        (Adapter(rank=3), "rank is 3, but it must be a multiple of the convolution's groups, 2"),
        (Adapter(rank=4, init="pissa"), "init is 'pissa', which a convolution with 2 groups cannot have"),
    ):
        base = case.layer()
        with pytest.raises(ValueError, match=message):
            lora_class(base).adapt_(base, adapter)
        assert type(base) is nn.Conv2d and base.weight.requires_grad


def test_a_bias_of_b_is_scaled_and_merges_into_a_layer_without_bias():
    case = KINDS["2d, kernel 1, no bias"]
    layer, x = case.adapted(lora_bias=True), case.x(torch.float32)
    y = layer(x)
    torch.testing.assert_close(y, laws.expected_of(case, layer, x, {"default": 1.0}).float(), rtol=1e-5, atol=1e-5)
    layer.merge()
    assert layer.bias is not None
    laws.close(layer(x), y, torch.float32)
    layer.unmerge()
    assert layer.bias is None


@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
def test_backward_keeps_x_once_and_no_copy_of_it(adapter_dtype):
    case = kind(2, padding=1)
    layer = case.adapted(torch.bfloat16, adapter_dtype=adapter_dtype)
    x = case.x(torch.bfloat16).requires_grad_()
    owned = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters(), *layer.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert x.untyped_storage().data_ptr() in kept
    low_rank, factors = 2 * 4 * y.numel() // OUT, 2 * sum(f.numel() for f in layer.factors("default")[:2])
    assert sum(size for pointer, size in kept.items() if pointer not in owned) <= low_rank + factors


def test_channels_last_stays():
    case = KINDS["2d"]
    layer = case.adapted().to(memory_format=torch.channels_last)
    x = case.x(torch.float32).to(memory_format=torch.channels_last)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    laws.close(y, laws.expected_of(case, layer, x, {"default": 1.0}), torch.float32)


# ---- construction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls, name", [(LoRAConv1d, "1d, same"), (LoRAConv2d, "2d, groups"), (LoRAConv3d, "3d")])
def test_from_conv_shares_the_parameters_and_leaves_the_layer_its_class(cls, name):
    conv = KINDS[name].base().eval()
    layer = cls.from_conv(conv, rank=4, alpha=8, dropout=0.1)
    assert type(layer) is cls and type(conv) is cls._base_class and not layer.training
    assert layer.weight is conv.weight and layer.bias is conv.bias
    assert layer.adapters == {"default": Adapter(4, 8, dropout=0.1)} and "rank=4" in repr(layer)
    x = KINDS[name].x(torch.float32)
    assert torch.equal(layer(x), conv(x))


class Subclass(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    "layer, message",
    [
        (lambda: nn.ConvTranspose1d(2, 2, 1), "ConvTranspose1d is neither"),
        (lambda: nn.ConvTranspose2d(2, 2, 1), "ConvTranspose2d is neither"),
        (lambda: nn.ConvTranspose3d(2, 2, 1), "ConvTranspose3d is neither"),
        (lambda: Subclass(2, 2, 1), "Subclass is a subclass of Conv2d"),
        (lambda: nn.LazyConv2d(2, 1), "LazyConv2d is a subclass of Conv2d"),
    ],
)
def test_other_convolutions_are_refused_by_name(layer, message):
    layer = layer()
    assert message in why_not(layer)
    with pytest.raises(TypeError, match=message):
        LoRAConv2d.from_conv(layer, rank=2)


def test_a_class_adapts_its_own_dimensions():
    with pytest.raises(TypeError, match="LoRAConv1d cannot adapt a Conv2d"):
        LoRAConv1d.from_conv(nn.Conv2d(2, 2, 1), rank=2)
