"""The stand-in for a CUDA build of torch: it behaves as one, and it notices what it is there to notice."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.device import emulate
from tests.device.standin import Failed, Process, runs_in

emulated = runs_in("emulator")


@emulated
def test_tensors_are_made_copied_and_computed_with_on_their_device():
    x = torch.randn(3, 5)
    there = x.to("cuda:1")
    assert (there.device, there.is_cuda, there.data_ptr() == x.data_ptr()) == (torch.device("cuda:1"), True, False)
    assert torch.equal(there.cpu(), x) and torch.equal((there + 2 * there).cpu(), x + 2 * x)
    weight, bias = torch.randn(7, 5), torch.randn(7)
    y = torch.nn.functional.linear(there, weight.to("cuda:1"), bias.to("cuda:1"))
    assert torch.equal(y.cpu(), torch.nn.functional.linear(x, weight, bias)) and y.device == there.device
    assert torch.equal((there @ weight.to("cuda:1").t()).cpu(), x @ weight.t())
    for made in (
        there.new_zeros(2),
        there.new_empty(2),
        torch.randn(2, device="cuda:1"),
        torch.arange(2, device="cuda:1"),
    ):
        assert made.device == there.device
    for elsewhere in ("cuda:0", "cpu"):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            there + torch.ones(5, device=elsewhere)
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            torch.mm(there, torch.ones(5, 2, device=elsewhere))
    with pytest.raises(RuntimeError, match="no device cuda:2"):
        torch.empty(1, device="cuda:2")


@emulated
def test_views_share_memory_and_out_and_resize_keep_the_tensor():
    x = torch.arange(12.0, device="cuda").view(3, 4)
    x.t()[1:3].add_(100)
    x[:, ::2].fill_(-1)
    assert x.cpu().tolist() == [[-1, 101, -1, 3], [-1, 105, -1, 7], [-1, 109, -1, 11]]
    assert x.t().data_ptr() == x.data_ptr() and x[1:].storage_offset() == 4 and x.t().contiguous().stride() == (3, 1)
    out = torch.empty(0, device="cuda")
    assert torch.add(x, x, out=out) is out and torch.equal(out.cpu(), 2 * x.cpu())
    view = torch.empty(0, device="cuda").set_(x.untyped_storage(), 1, (2, 2), (4, 2))
    view.zero_()
    assert x[0, 1] == 0 and x[1, 3] == 0 and view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    doubled = out.cpu().view(-1)
    assert out.resize_(100).untyped_storage().nbytes() == 400 and torch.equal(out[:12].cpu(), doubled)
    x[x > 100] = 0
    assert x.max().item() == 11


@emulated
def test_gradients_flow_on_every_device():
    for device in ("cuda:0", "cuda:1"):
        x = torch.randn(3, 4, device=device, requires_grad=True)
        (x * x).sum().backward()
        assert torch.equal(x.grad, 2 * x.detach()) and x.grad.device == torch.device(device)


@emulated
def test_fresh_memory_is_nan_and_deterministic_algorithms_fill_it():
    assert torch.empty(5, device="cuda").isnan().all() and torch.empty(5, device="cuda", dtype=torch.half).isnan().all()
    torch.use_deterministic_algorithms(True)
    try:
        assert (torch.empty_strided((2,), (1,), dtype=torch.int32, device="cuda") == torch.iinfo(torch.int32).max).all()
    finally:
        torch.use_deterministic_algorithms(False)


@emulated
def test_blocks_are_given_back():
    gone, before = [torch.empty(size, device="cuda") for size in (1, 1000, 1_000_000)], emulate.device.live_blocks()
    del gone
    assert emulate.device.live_blocks() == before - 3


@pytest.mark.parametrize("size", [1, 16, 100, 4096, 5000, 3_000_000])
@emulated
def test_writes_around_a_block_are_found(size):
    def damage(offset: int, keep: bool) -> str:
        block = torch.empty(size, dtype=torch.uint8, device="cuda")
        ctypes.memset(block.data_ptr() + offset, 0, 1)
        if not keep:
            del block
        return emulate.device.damage()

    for keep in (True, False):
        assert damage(0, keep) == damage(size - 1, keep) == ""
        room = (size + 15) // 16 * 16
        if room % 4096:
            assert f"before a block of {size} bytes" in damage(-1, keep)
        if size % 16:
            assert f"behind a block of {size} bytes" in damage(size, keep)
    if size <= 5000:
        block = torch.empty(size, dtype=torch.uint8, device="cuda")
        address = block.data_ptr()
        del block
        ctypes.memset(address, 0, 1)
        assert "after the end of the life of a block" in emulate.device.damage()
    assert emulate.device.damage() == ""


def _read(size: int, offset: int) -> int:
    block = torch.empty(size, dtype=torch.uint8, device="cuda")
    return ctypes.c_ubyte.from_address(block.data_ptr() + offset).value


@pytest.mark.parametrize("size", [16, 32, 4096, 3_000_000])
def test_an_access_past_the_end_ends_the_process_and_the_next_call_gets_another(emulator: Process, size):
    with pytest.raises(Failed, match=r"died of SIGSEGV in tests.device.test_backend:_read(?s:.)*line \d+ in _read"):
        emulator.call("tests.device.test_backend:_read", size=size, offset=size)
    assert emulator.call("tests.device.test_backend:_read", size=size, offset=size - 1) == 255


def test_damage_fails_the_call_in_which_it_was_done(emulator: Process):
    with pytest.raises(Failed, match="written before a block of 16 bytes"):
        emulator.call("tests.device.test_backend:_spoil")
    emulator.call("tests.device.test_backend:_read", size=1, offset=0)


def _spoil() -> None:
    block = torch.empty(16, dtype=torch.uint8, device="cuda")
    ctypes.memset(block.data_ptr() - 1, 0, 1)


def test_an_error_comes_with_its_traceback(emulator: Process):
    with pytest.raises(Failed, match=r"in _fail\n(?s:.)*ZeroDivisionError"):
        emulator.call("tests.device.test_backend:_fail")


def _fail() -> None:
    1 / 0  # noqa: B018


@emulated
def test_a_missing_cuda_kernel_is_an_error_and_not_the_cpu_kernel():
    library = torch.library.Library("peftops_backend", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CPU")
    assert torch.ops.peftops_backend.twice(torch.ones(1)) == 2
    with pytest.raises(RuntimeError, match="peftops_backend::twice has no CUDA kernel"):
        torch.ops.peftops_backend.twice(torch.ones(1, device="cuda"))


@emulated
def test_the_current_stream_is_the_one_that_was_set_also_in_backward():
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(_stream(x.device.index))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(_stream(grad.device.index))
            return grad

    emulate.device.set_stream(1, 0x77)
    try:
        x = torch.ones(2, device="cuda:1", requires_grad=True)
        Look.apply(x).sum().backward()
        assert seen == [0x77, 0x77] and _stream(0) == 0
    finally:
        emulate.device.set_stream(1, 0)


def _stream(index: int) -> int:
    stream = ctypes.c_void_p()
    assert emulate.device.backend.aoti_torch_get_current_cuda_stream(index, ctypes.byref(stream)) == 0
    return stream.value or 0


@emulated
def test_recording_works_out_shapes_without_memory():
    emulate.device.record()
    try:
        x = torch.empty(3_000_000_000, 8, dtype=torch.bfloat16, device="cuda:1")
        weight = torch.zeros(16, 8, dtype=torch.bfloat16, device="cuda:1", requires_grad=True)
        y = torch.nn.functional.linear(x, weight, weight[:, 0])
        assert y.shape == (3_000_000_000, 16) and y.device == x.device and y.dtype == x.dtype
        (grad,) = torch.autograd.grad(y, weight, torch.empty_like(y))
        assert grad.shape == weight.shape and y.sum(0).shape == (16,) and x[:, 1:].contiguous().stride() == (7, 1)
        assert x[1:].data_ptr() == x.data_ptr() + 16 and x.new_zeros(4, 2).device == x.device
        for read in (lambda: y[0, 0].item(), lambda: y[:1].cpu()):
            with pytest.raises(RuntimeError, match="meta tensor"):
                read()
    finally:
        emulate.device.record(False)
