"""Stand-in operators that take and return lists, y_j = x W_j^T + bias_j: a correct one, and others with one fault.

As in :mod:`tests.testing.faults`, but in the namespace `peftops_list_faults`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peftops.ops.contract import Contract, ErrorSample, Sample
from peftops.testing import generator
from torch.nn.functional import linear

from tests.testing.faults import as_if_contiguous, product

LIBRARY = torch.library.Library("peftops_list_faults", "DEF")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def forward(x, weights, biases):
    """Float64 inside, one rounding."""
    if len(biases) != len(weights):
        raise RuntimeError(f"biases has {len(biases)} elements, but weights has {len(weights)}")
    rows = x.reshape(-1, x.shape[-1]).double()
    return [
        (product(rows, weight.double()) + bias.double()).to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])
        for weight, bias in zip(weights, biases, strict=True)
    ]


def backward(grads, x, weights):
    rows = x.reshape(-1, x.shape[-1]).double()
    flat = [grad.reshape(-1, grad.shape[-1]).double() for grad in grads]
    grad_x = sum(product(grad, weight.double().t()) for grad, weight in zip(flat, weights, strict=True))
    return (
        grad_x.to(x.dtype).reshape(x.shape),
        [product(grad.t(), rows.t()).to(x.dtype) for grad in flat],
        [grad.sum(0).to(x.dtype) for grad in flat],
    )


def forward_reading_the_second_weight_as_contiguous(x, weights, biases):
    return forward(x, [as_if_contiguous(w) if j == 1 else w for j, w in enumerate(weights)], biases)


def forward_changing_the_last_bias(x, weights, biases):
    biases[-1].zero_()
    return forward(x, weights, biases)


def backward_with_the_first_gradient_for_all_of_its_shape(grads, x, weights):
    repeated = [grads[0] if grad.shape == grads[0].shape else grad for grad in grads]
    return (backward(grads, x, weights)[0], *backward(repeated, x, weights)[1:])


def backward_without_the_last_projection_in_x(grads, x, weights):
    return (backward(grads[:1], x, weights[:1])[0], *backward(grads, x, weights)[1:])


def reference(x, weights, biases):
    return [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def samples(device, dtype, seed):
    source = generator(seed, "list faults")

    def randn(*shape):
        return torch.randn(shape, generator=source, dtype=torch.float64).to(dtype)

    for label, lead, k, sizes in (
        ("two alike", (5,), 13, (18, 18)),
        ("three", (2, 9), 7, (4, 17, 4)),
        ("one", (3,), 5, (6,)),
        ("empty", (0,), 8, (5, 2)),
    ):
        yield Sample((randn(*lead, k), [randn(n, k) for n in sizes], [randn(n) for n in sizes]), label=label)
    weights = [randn(18, 30)[:, 5:16], randn(7, 30)[:, 2:13]]
    yield Sample((randn(10, 20)[1:8, 3:14], weights, [randn(18), randn(14)[::2]]), label="strided")


def errors(device):
    x, weight = torch.zeros(3, 4, device=device), torch.zeros(5, 4, device=device)
    yield ErrorSample(Sample((x, [weight], [x[0], x[0]])), "biases has 2 elements, but weights has 1")


def define(name: str, forward: Callable = forward, backward: Callable = backward) -> Contract:
    """Register the operator with fake kernel, autograd and autocast rule; its contract."""
    qualified = f"peftops_list_faults::{name}"
    LIBRARY.define(f"{name}(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor[]")
    LIBRARY.define(f"{name}_backward(Tensor[] grads, Tensor x, Tensor[] weights) -> (Tensor, Tensor[], Tensor[])")
    LIBRARY.impl(name, forward, "CPU")
    LIBRARY.impl(f"{name}_backward", backward, "CPU")
    op = getattr(torch.ops.peftops_list_faults, name).default
    backward_op = getattr(torch.ops.peftops_list_faults, f"{name}_backward").default

    def fake(x, weights, biases):
        return [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]

    def fake_backward(grads, x, weights):
        return (
            x.new_empty(x.shape),
            [weight.new_empty(weight.shape) for weight in weights],
            [weight.new_empty(weight.shape[0]) for weight in weights],
        )

    def setup_context(ctx, inputs, output):
        x, weights, _biases = inputs
        ctx.save_for_backward(x, *weights)

    def differentiate(ctx, grads):
        x, *weights = ctx.saved_tensors
        return backward_op(list(grads), x, weights)

    def refuse(ctx, *grads):
        raise RuntimeError(f"{name}: double backward is not supported")

    def autocast(x, weights, biases):
        def cast(t):
            return t if t.dtype == torch.float64 else t.to(torch.get_autocast_dtype("cpu"))

        with torch.autocast("cpu", enabled=False):
            return op(cast(x), [cast(t) for t in weights], [cast(t) for t in biases])

    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    torch.library.register_fake(f"{qualified}_backward", fake_backward, lib=LIBRARY)
    torch.library.register_autograd(qualified, differentiate, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_autograd(f"{qualified}_backward", refuse, lib=LIBRARY)
    LIBRARY.impl(name, autocast, "AutocastCPU")
    names = ("x", "weights", "biases")
    return Contract(qualified, reference, samples, errors, DTYPES, names, autocast=names, rows=("x",))


CLEAN = define("clean")

# (contract, check that catches it, what the check says)
CAUGHT = (
    (
        define("stride", forward_reading_the_second_weight_as_contiguous),
        "views",
        r"with weights\[1\]: gaps between elements",
    ),
    (define("mutation", forward_changing_the_last_bias), "mutation", r"biases\[1\] was changed by the call"),
    (
        define("one_gradient", backward=backward_with_the_first_gradient_for_all_of_its_shape),
        "gradients",
        r"sample 'two alike': gradient of weights\[1\]",
    ),
    (
        define("one_gradient_exactly", backward=backward_with_the_first_gradient_for_all_of_its_shape),
        "exact",
        r"sample 'two alike': result \d on integers",
    ),
    (
        define("missing_part", backward=backward_without_the_last_projection_in_x),
        "gradcheck",
        "gradcheck",
    ),
)
