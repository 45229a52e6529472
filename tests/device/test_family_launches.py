"""What the operators beside lora_linear tell the CUDA runtime, by the rules of test_launches.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.build.kernels import largest_blocks
from tests.device import standin
from tests.device.recording import GPUS
from tests.device.test_launches import ALL_GRADIENTS, CUDA_LIBRARY, DTYPES, INT32, faults, fields, launches, short_name

Observe = Callable[..., dict]


@pytest.fixture(scope="module")
def observe() -> Iterator[Callable[..., dict]]:
    """Calls a function of observe_families.py in a process that records; nothing may be wrong with the calls."""
    process = standin.Process(str(standin.runtime()), str(standin.backend()))
    process.call("tests.device.observe:start")
    bounds = {kernel: threads for (kernel, _), threads in largest_blocks(CUDA_LIBRARY).items()}

    def run(function: str, **arguments: Any) -> dict:
        seen = process.call(f"tests.device.observe_families:{function}", **arguments)
        assert faults(seen, bounds) == []
        return seen

    yield run
    process.close()


def kernels_of(seen: dict) -> list[str]:
    return [short_name(launch["kernel"]).rpartition("::")[2].partition("<")[0] for launch in launches(seen)]


# ---- grouped ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grouped(observe) -> Observe:
    """grouped_lora_linear: its launches are legal and cover the problem, its results have their shapes."""

    def run(**arguments) -> dict:
        sizes = {"rows": 300, "features": 200, "out_features": 304, "rank": 16, "adapters": 5} | arguments
        sizes = {"gradients": ALL_GRADIENTS} | sizes
        seen = observe("observe_grouped", **sizes)
        m, k, n, r, count = (sizes[name] for name in ("rows", "features", "out_features", "rank", "adapters"))
        dtype = sizes.get("dtype", "bfloat16")
        factors = sizes.get("factor_dtype") or dtype
        shapes = {"y": ([m, n], dtype), "x": ([m, k], dtype), "weight": ([n, k], dtype), "bias": ([n], dtype)}
        shapes |= {"lora_a": ([count, r, k], factors), "lora_b": ([count, n, r], factors)}
        assert seen["results"] == [[*shapes[name], "cuda:0"] for name in ("y", *sizes["gradients"].split())]
        for launch in launches(seen):
            task = fields(launch)
            for name, size in (("rows", m), ("rank", r), ("adapters", count)):
                assert task.get(name, size) == size
            for name in ("depth", "columns", "features"):
                assert task.get(name, k) in (k, n)
        return seen

    return run


FEW = ["group_few_tokens", "grouped_shrink_few", "grouped_expand_few"]
FEW_FLOAT32 = ["group_few_tokens", "grouped_shrink", "grouped_expand"]
MANY = ["group_tokens", "list_tiles", "grouped_shrink", "grouped_expand"]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
def test_grouped_launches_are_legal_on_every_gpu_and_dtype(grouped, gpu, dtype, factor_dtype):
    for rank in (1, 16, 17, 64, 65, 128, 200):
        for rows in (1, 256, 257, 5000):
            kernels = kernels_of(grouped(gpu=gpu, dtype=dtype, factor_dtype=factor_dtype, rank=rank, rows=rows))
            forward = MANY if rows > 256 else FEW if dtype != "float32" and not factor_dtype else FEW_FLOAT32
            assert kernels[: len(forward)] == forward
            assert {"grouped_gradient", "list_tiles"} <= set(kernels)
            assert ("grouped_finish" in kernels) == (rows > 64)


def test_grouped_inference_is_three_launches_for_few_tokens_and_four_for_many(grouped):
    for ranks in (False, True):
        for ids in ("int32", "int64"):
            assert kernels_of(grouped(rows=64, gradients="", ids=ids, ranks=ranks)) == FEW
            assert kernels_of(grouped(rows=2048, gradients="", ids=ids, ranks=ranks)) == MANY


@pytest.mark.parametrize("gradients", ["x", "lora_a", "lora_b", "x lora_b", "weight bias"])
def test_grouped_launches_only_what_a_gradient_needs(grouped, gradients):
    backward = kernels_of(grouped(gradients=gradients))[len(MANY) :]
    assert ("grouped_expand" in backward) == ("x" in gradients.split())
    assert ("grouped_gradient" in backward) == ("lora" in gradients)
    assert bool(backward) == (gradients != "weight bias")


@pytest.mark.parametrize("gradients", ["", ALL_GRADIENTS])
@pytest.mark.parametrize("empty", ["features", "out_features", "rank", "adapters"])
def test_grouped_launches_of_empty_sizes_are_legal(grouped, empty, gradients):
    for rows in (3, 300):
        grouped(rows=rows, gradients=gradients, **{empty: 0})
    assert launches(grouped(rows=0, gradients=gradients, **{empty: 0})) == []


@pytest.mark.parametrize(
    "sizes",
    [
        {"rows": INT32 - 5000, "features": 16, "out_features": 8, "rank": 8},
        {"features": 2 * INT32 + 5, "rank": 1, "adapters": 2, "gradients": ""},
        {"out_features": INT32 + 1, "rank": 1, "adapters": 2, "gradients": "", "rows": 3},
        {"features": 65536, "out_features": 16, "rank": 8, "adapters": 8192},
        {"features": 16, "out_features": 65536, "rank": 8, "adapters": 8192},
        {"features": 16, "out_features": 16, "rank": 8, "adapters": 3_000_000},
    ],
)
def test_grouped_sizes_and_elements_beyond_32_bits_are_covered(grouped, sizes):
    for dtype in ("bfloat16", "float32"):
        grouped(dtype=dtype, **sizes)


def test_more_tokens_than_the_groups_count_are_refused(observe):
    with pytest.raises(standin.Failed, match="adapter_ids has 2147483648 elements, but CUDA takes up to 2147483135"):
        observe("observe_grouped", rows=INT32, features=8, out_features=8, rank=1, adapters=1)


@given(
    rows=st.integers(1, 3000),
    features=st.integers(1, 400),
    out_features=st.integers(1, 400),
    rank=st.integers(1, 300),
    adapters=st.integers(1, 2000),
    dtype=st.integers(0, len(DTYPES) - 1),
    gpu=st.sampled_from(sorted(GPUS)),
)
def test_any_grouped_problem_is_covered(grouped, dtype, **sizes):
    grouped(dtype=DTYPES[dtype][0], factor_dtype=DTYPES[dtype][1], **sizes)


# ---- several projections ---------------------------------------------------------------------------------------------

LISTS = "x weights biases lora_a lora_b"


@pytest.fixture(scope="module")
def multi(observe) -> Observe:
    """lora_linear_multi: its launches are legal and cover the problem, its results have their shapes."""

    def run(**arguments) -> dict:
        sizes = {"rows": 300, "features": 200, "widths": [304, 96, 40], "ranks": [16, 16, 16], "gradients": LISTS}
        sizes |= arguments
        seen = observe("observe_multi", **sizes)
        m, k, widths, ranks = (sizes[name] for name in ("rows", "features", "widths", "ranks"))
        dtype = sizes.get("dtype", "bfloat16")
        factors = sizes.get("factor_dtype") or dtype
        used = len(widths) - sizes.get("unused", 0)
        shapes = {"x": [([m, k], dtype)], "weights": [([n, k], dtype) for n in widths[:used]]}
        shapes |= {"biases": [([n], dtype) for n in widths[:used]], "lora_a": [([r, k], factors) for r in ranks[:used]]}
        shapes |= {"lora_b": [([n, r], factors) for n, r in zip(widths[:used], ranks[:used], strict=True)]}
        wanted = [([m, n], dtype) for n in widths]
        wanted += [shape for name in sizes["gradients"].split() for shape in shapes[name]]
        assert seen["results"] == [[*shape, "cuda:0"] for shape in wanted]
        for launch in launches(seen):
            task = fields(launch)
            assert task.get("rows", m) == m
            for name in ("depth", "columns", "features"):
                # x is copied into whole chunks once for all projections.
                assert task.get(name, k) in (k, -(-k // 8) * 8, *widths)
        return seen

    return run


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
def test_multi_launches_are_legal_on_every_gpu_and_dtype(multi, gpu, dtype, factor_dtype):
    for ranks in ([16], [1, 8], [64, 16, 3], [65, 8], [16] * 4, [8, 8, 200, 8, 8]):
        for dropout_p in (0.0, 0.5):
            widths = [304, 96, 40, 7, 128][: len(ranks)]
            multi(gpu=gpu, dtype=dtype, factor_dtype=factor_dtype, ranks=ranks, widths=widths, dropout_p=dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_three_projections_are_four_launches_and_share_the_passes_over_x_and_its_gradient(multi, dropout_p):
    sizes = {"gpu": "A100", "rows": 60_000, "features": 128, "widths": [128, 64, 64], "dropout_p": dropout_p}
    forward = kernels_of(multi(**sizes, gradients=""))
    assert forward == ["multi_shrink", "expand", "expand", "expand"]
    backward = kernels_of(multi(**sizes, gradients="x lora_a lora_b"))[len(forward) :]
    assert [kernel for kernel in backward if kernel != "finish"] == ["shrink"] * 3 + ["multi_expand"] + ["gradient"] * 6


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("gradients", ["", LISTS])
def test_multi_launches_of_empty_sizes_and_unused_results_are_legal(multi, gradients, dropout_p):
    for changed in (
        {"features": 0},
        {"widths": [304, 0, 40]},
        {"ranks": [16, 0, 16]},
        {"ranks": [0, 0, 0]},
        {"unused": 1},
        {"unused": 2},
    ):
        multi(gradients=gradients, dropout_p=dropout_p, **changed)
    assert launches(multi(rows=0, gradients=gradients, dropout_p=dropout_p)) == []


@pytest.mark.parametrize("size", [INT32 - 1, INT32 + 1, 3_000_000_000])
@pytest.mark.parametrize("axis", ["rows", "features"])
def test_multi_sizes_beyond_32_bits_are_covered(multi, axis, size):
    sizes = {"rows": 3, "features": 24, "widths": [16, 8], "ranks": [8, 4]} | {axis: size}
    multi(**sizes, dropout_p=0.25)


@given(
    rows=st.integers(1, 3000),
    features=st.integers(1, 400),
    widths=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    rank=st.integers(1, 140),
    alike=st.booleans(),
    dtype=st.integers(0, len(DTYPES) - 1),
    dropout_p=st.sampled_from([0.0, 0.5]),
    gpu=st.sampled_from(sorted(GPUS)),
)
def test_any_multi_problem_is_covered(multi, dtype, widths, rank, alike, **sizes):
    ranks = [rank if alike else 1 + (rank + 37 * j) % 140 for j in range(len(widths))]
    multi(dtype=DTYPES[dtype][0], factor_dtype=DTYPES[dtype][1], widths=widths, ranks=ranks, **sizes)
