"""What q, k and v projections that read the same x keep for backward, beside PEFT's on the same layers.

x is counted once. Parameters are not: they exist anyway.
"""

import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peftops.nn import LoRALinear
from torch import nn
from torch.utils.checkpoint import checkpoint

TOKENS, HIDDEN, HEADS, RANK = 512, 256, 128, 8
WIDTHS = {"q": HIDDEN, "k": HEADS, "v": HEADS}
X_BYTES = 2 * TOKENS * HIDDEN
# adapter_dtype, dropout -> what PEFT keeps at least, in sizes of x
CASES = {
    (torch.float32, 0.0): 6,
    (torch.float32, 0.1): 12,
    (torch.bfloat16, 0.0): 1,
    (torch.bfloat16, 0.1): 6,
}


class Projections(nn.Module):
    def __init__(self):
        super().__init__()
        for name, width in WIDTHS.items():
            setattr(self, name, nn.Linear(HIDDEN, width, dtype=torch.bfloat16))

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x)


def ours(adapter_dtype, dropout):
    model = Projections()
    for name in WIDTHS:
        layer = LoRALinear.from_linear(getattr(model, name), rank=RANK, dropout=dropout, adapter_dtype=adapter_dtype)
        nn.init.normal_(layer.lora_b.default)
        setattr(model, name, layer)
    return model


def pefts(adapter_dtype, dropout):
    config = LoraConfig(r=RANK, lora_dropout=dropout, target_modules=list(WIDTHS))
    model = get_peft_model(Projections(), config, autocast_adapter_dtype=adapter_dtype == torch.float32)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {adapter_dtype}
    return model


def hidden_states():
    return torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)


@functools.cache
def kept(make, adapter_dtype, dropout):
    """Bytes of all storages that autograd keeps, without parameters, and the tensors' dtypes and sizes."""
    model, x = make(adapter_dtype, dropout), hidden_states()
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages, tensors = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = storage.nbytes()
            tensors.append((tensor.dtype, tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(x)
    assert len(outputs) == 3
    return sum(storages.values()), tensors


def allocations(call):
    """Bytes that a call allocates (positive) and frees (negative), in the order of time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    return result, [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak(changes):
    now = highest = 0
    for change in changes:
        now += change
        highest = max(highest, now)
    return highest


@pytest.mark.parametrize("adapter_dtype, dropout", CASES)
def test_x_once_the_low_rank_products_and_a_bit_per_element(adapter_dtype, dropout):
    low_rank = 4 * TOKENS * RANK
    bits = TOKENS * HIDDEN // 8 if dropout else 0
    total, tensors = kept(ours, adapter_dtype, dropout)
    # A few bytes beside them: the scales, which are numbers.
    assert total <= X_BYTES + len(WIDTHS) * (low_rank + bits)
    assert not [size for dtype, size in tensors if dtype == torch.float32 and size >= TOKENS * HIDDEN]


@pytest.mark.parametrize("adapter_dtype, dropout", CASES)
def test_peft_keeps_more(adapter_dtype, dropout):
    """Two to four times x for each projection. Only without dropout and with factors in bfloat16 is x kept once there,
    too: then the low-rank products, here in float32, are all that differs.
    """
    theirs, tensors = kept(pefts, adapter_dtype, dropout)
    assert theirs >= CASES[adapter_dtype, dropout] * X_BYTES
    total, _ = kept(ours, adapter_dtype, dropout)
    if (adapter_dtype, dropout) == (torch.bfloat16, 0.0):
        assert total - theirs <= len(WIDTHS) * 2 * TOKENS * RANK
    else:
        assert theirs >= 3 * total
    if adapter_dtype == torch.float32:
        assert [size for dtype, size in tensors if dtype == torch.float32 and size >= TOKENS * HIDDEN]


@pytest.mark.parametrize("adapter_dtype, dropout", CASES)
def test_what_stays_allocated_after_forward_is_what_autograd_keeps(adapter_dtype, dropout):
    """The allocator's own count: nothing is kept past autograd, and no float32 copy of x exists even for a moment."""
    model, x = ours(adapter_dtype, dropout), hidden_states()
    model(x)
    outputs, changes = allocations(lambda: model(x))
    total, _ = kept(ours, adapter_dtype, dropout)
    slack = 16 * 1024
    assert sum(changes) - sum(y.nbytes for y in outputs) <= total - X_BYTES + slack
    assert max(changes) < 2 * X_BYTES


@pytest.mark.parametrize("adapter_dtype, dropout", CASES)
def test_under_checkpointing_only_x_stays_and_the_replay_takes_less_than_pefts(adapter_dtype, dropout):
    peaks = {}
    for make in (ours, pefts):
        model, x = make(adapter_dtype, dropout), hidden_states()
        call = functools.partial(checkpoint, model, x, use_reentrant=False)
        torch.autograd.backward(call(), [torch.ones_like(y) for y in model(x)])
        outputs, forward = allocations(call)
        # x itself was there before.
        assert sum(forward) - sum(y.nbytes for y in outputs) < 0.1 * X_BYTES
        upstream = [torch.ones_like(y) for y in outputs]
        _, backward = allocations(functools.partial(torch.autograd.backward, outputs, upstream))
        peaks[make] = peak(backward)
        if make is ours:
            assert max(backward) < 2 * X_BYTES
    assert peaks[ours] < peaks[pefts]
