"""Tensor parallelism on two ranks, column-wise and row-wise, against one process."""

import subprocess
import sys

import peftops
import pytest
import torch
import torch.distributed as dist
from peftops.ops import lora_dropout_mask
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ..methods.models import distance, llama
from .common import assert_close, assert_equal, sequences, values
from .ranks import WORLD

STEPS = 3
WIDTH = 24  # of the part that is sharded


class MLP(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.up, self.down = nn.Linear(16, WIDTH, bias=bias), nn.Linear(WIDTH, 16, bias=bias)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def mesh():
    return init_device_mesh("cpu", (WORLD,))


def whole(tensors):
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def with_factors(model, method):
    """The same adapter on every model of this shape, sharded or not, with B away from 0."""
    torch.manual_seed(1)
    tuning = peftops.attach(model, method)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in tuning.named_parameters():
            if ".lora_b" in name:
                value = 0.1 * torch.randn(parameter.shape)
                if isinstance(parameter, DTensor):
                    value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
                parameter.copy_(value)
    return tuning


def pair(method, bias=True, dtype=torch.float32, plan=None):
    """The model with its adapter, on both ranks together and on one process."""
    both = []
    for parallel in (True, False):
        torch.manual_seed(0)
        model = MLP(bias).to(dtype)
        if parallel:
            parallelize_module(model, mesh(), plan or {"up": ColwiseParallel(), "down": RowwiseParallel()})
        both.append((model, with_factors(model, method)))
    return both


def step(model, tuning, x, seed=3):
    """Output, gradient of x and gradients of what is trained."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = model(x)
    y.float().square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in tuning.named_parameters()}
    tuning.model.zero_grad()
    return whole({"y": y.detach(), "x": x.grad, **gradients})


# ---- values and gradients --------------------------------------------------------------------------------------------

METHODS = {
    "plain": {},
    "trained biases": {"bias": "all"},
    "biases of B": {"lora_bias": True},
    "rslora": {"use_rslora": True},
    "wide": {"rank": 40},
    "orthogonal": {"init": "orthogonal"},
}


def same_step(rank, options, bias):
    (model, tuning), (plain, reference) = pair(peftops.LoRA(**{"rank": 4, "alpha": 8, **options}), bias)
    layouts = {name: (p.placements[0], p.grad) for name, p in tuning.named_parameters()}
    assert layouts["up.lora_a.default"][0] == layouts["down.lora_b.default"][0] == Replicate()
    assert layouts["up.lora_b.default"][0] == Shard(0) and layouts["down.lora_a.default"][0] == Shard(1)
    for shape in ((3, 16), (2, 5, 16), (16,)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(7))
        assert_close(step(model, tuning, x), step(plain, reference, x))
    for first, second in ((tuning, reference), (reference, tuning)):
        assert [name for name, _ in first.named_parameters()] == [name for name, _ in second.named_parameters()]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_output_and_gradients_are_those_of_one_process(ranks, method, bias):
    ranks(same_step, METHODS[method], bias)


LAYOUTS = {
    "uneven columns": (25, ColwiseParallel(output_layouts=Replicate())),
    "uneven rows": (16, RowwiseParallel(input_layouts=Replicate())),
    "sequence, columns": (24, ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())),
    "sequence, rows": (24, RowwiseParallel(output_layouts=Shard(1))),
}


def other_layouts(rank, name):
    """Parts of unequal size; a sequence that is sharded outside of the layer."""
    width, style = LAYOUTS[name]
    x = torch.randn(2, 6, 15, generator=torch.Generator().manual_seed(7))
    results = []
    for parallel in (True, False):
        torch.manual_seed(0)
        model = nn.ModuleDict({"linear": nn.Linear(15, width)})
        if parallel:
            parallelize_module(model, mesh(), {"linear": style})
        tuning = with_factors(model, peftops.LoRA(rank=4))
        own = x
        if parallel and name == "sequence, columns":
            own = x.chunk(WORLD, 1)[rank]
        elif parallel and name == "sequence, rows":
            own = x.tensor_split([8], 2)[rank]
        y = model["linear"](own)
        y.square().sum().backward()
        gradients = whole({key: parameter.grad for key, parameter in tuning.named_parameters()})
        if not parallel and name == "sequence, rows":
            y = y.chunk(WORLD, 1)[rank]
        results.append({"y": y.detach(), **gradients})
    assert_close(*results)


@pytest.mark.parametrize("name", LAYOUTS)
def test_other_layouts(ranks, name):
    ranks(other_layouts, name)


def float32_factors(rank):
    """Over a bfloat16 base, within what its rounding costs."""
    both = pair(peftops.LoRA(rank=4, adapter_dtype=torch.float32), dtype=torch.bfloat16)
    x = torch.randn(5, 16).bfloat16()
    actual, expected = (step(*model_and_tuning, x) for model_and_tuning in both)
    assert {tensor.dtype for name, tensor in actual.items() if "lora" in name} == {torch.float32}
    assert_close(actual, expected, 0.02)


def test_float32_factors(ranks):
    ranks(float32_factors)


# ---- dropout ---------------------------------------------------------------------------------------------------------


def column_mask(rank):
    """Column-wise the mask is that of one process: so are output and gradients."""
    method = peftops.LoRA(rank=4, dropout=0.4, target_modules=["up"])
    both = pair(method, plan={"up": ColwiseParallel(output_layouts=Replicate())})
    both[0][0].train()
    actual, expected = (step(*model_and_tuning, torch.ones(6, 16)) for model_and_tuning in both)
    assert_close(actual, expected)
    again = step(*both[0], torch.ones(6, 16), seed=4)
    assert distance(again["y"], actual["y"]) > 1e-3


def row_mask(rank):
    """Row-wise each rank's columns get a mask of their own: that of its seed, which is the common one plus the rank."""
    method = peftops.LoRA(rank=4, alpha=4, dropout=0.4, target_modules=["down"])
    (model, tuning), (plain, _) = pair(method, plan={"down": RowwiseParallel(input_layouts=Replicate())})
    x = torch.ones(6, WIDTH)
    torch.manual_seed(3)
    y = model.down(x)
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,))
    masks = [lora_dropout_mask(seed + other, 6, WIDTH // WORLD, 0.4) for other in range(WORLD)]
    assert not torch.equal(masks[0], masks[1])
    kept = torch.cat(masks, 1) / 0.6
    down = plain.down
    low = (x * kept) @ down.lora_a["default"].t() @ down.lora_b["default"].t()
    assert_close({"y": y.detach()}, {"y": (nn.Linear.forward(down, x) + low).detach()})


@pytest.mark.parametrize("check", [column_mask, row_mask])
def test_dropout(ranks, check):
    ranks(check)


def several_with_dropout(rank):
    """The mean over many masks is what comes without dropout, with two adapters as well."""
    (model, tuning), _ = pair(peftops.LoRA(rank=4, dropout=0.3))
    tuning.add("other", peftops.LoRA(rank=2, dropout=0.5, init="orthogonal"), trainable=True)
    tuning.activate({"default": 1.0, "other": 0.5})
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(7))
    layer = model.up
    with torch.no_grad():
        expected = layer.eval()(x)
        mean = torch.stack([layer.train()(x) for _ in range(400)]).mean(0)
    assert distance(mean, expected) < 0.05
    gathered = [torch.empty_like(x) for _ in range(WORLD)]
    torch.manual_seed(5)
    dist.all_gather(gathered, model(x).detach())
    assert torch.equal(*gathered)


def test_several_adapters_with_dropout(ranks):
    ranks(several_with_dropout)


# ---- the tuning ------------------------------------------------------------------------------------------------------


def handled(rank, folder):
    """Everything that a tuning does, side by side with one process."""
    (model, tuning), (plain, reference) = pair(peftops.LoRA(rank=4, alpha=8, lora_bias=True))
    base = MLP()
    base.load_state_dict({name: t for name, t in plain.state_dict().items() if ".lora_" not in name})
    x, both = torch.randn(5, 16), (tuning, reference)

    def assert_same():
        with torch.no_grad():
            assert_close({"y": model(x)}, {"y": plain(x)})

    tuning.save(folder / "both")
    if rank == 0:
        reference.save(folder / "one")
        larger = with_factors(MLP(), peftops.LoRA(rank=8, alpha=8))
        larger.save(folder / "larger")
    dist.barrier()
    assert tuning.summary().parameters == reference.summary().parameters
    with torch.no_grad(), tuning.disabled():
        assert_close({"y": model(x)}, {"y": base(x)}, 1e-6)
    for actual, expected in zip(*(each.merge(report=True).layers for each in both), strict=True):
        assert (actual.name, actual.elements) == (expected.name, expected.elements)
        assert actual.delta == pytest.approx(expected.delta) and 0 < actual.largest < 1e-6
    assert_same()
    for each in both:
        each.unmerge()
    assert_equal(whole(model.state_dict()), plain.state_dict())
    for each in both:
        each.add("other", folder / "one", trainable=True)
        each.activate({"default": 0.5, "other": -2.0})
    assert_same()
    for name in ("one", "larger"):
        for each in both:
            each.swap("other", folder / name)
        assert_same()
    assert_close(step(model, tuning, x), step(plain, reference, x))
    for each in both:
        each.delete("default")
        each.detach()
    assert_equal(whole(model.state_dict()), base.state_dict())
    tuning, reference = (peftops.load(each, folder / "one", trainable=True) for each in (model, plain))
    assert_close(step(model, tuning, x), step(plain, reference, x))
    for each in (tuning, reference):
        optimizer = each.optimizer(lr=1e-2)
        for _ in range(STEPS):
            each.model(x).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(each.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    assert_close(whole(values(tuning)), values(reference))


def test_the_tuning(ranks, tmp_path):
    ranks(handled, tmp_path)
    assert_same_files(tmp_path)


def assert_same_files(folder):
    one, both = (load_file(folder / name / "adapter_model.safetensors") for name in ("one", "both"))
    assert_equal(both, one)
    one, both = ((folder / name / "adapter_config.json").read_text() for name in ("one", "both"))
    assert both == one


def trained_biases(rank, folder):
    """They are saved, loaded and merged; the base model's own cannot take their place for a while."""
    (model, tuning), (plain, reference) = pair(peftops.LoRA(rank=4, bias="all"))
    for each in (tuning, reference):
        with torch.no_grad():
            for _, parameter in each.named_parameters():
                parameter.add_(0.25)
    tuning.save(folder / "both")
    if rank == 0:
        reference.save(folder / "one")
    dist.barrier()
    x = torch.randn(5, 16)
    before = model(x).detach()
    for call in (
        tuning.disabled().__enter__,
        lambda: tuning.add("other", folder / "one"),
        lambda: tuning.activate(None),
    ):
        with pytest.raises(RuntimeError, match="bias is spread over processes and cannot take its other value"):
            call()
    assert torch.equal(model(x), before)
    for each in (tuning, reference):
        each.merge()
        each.unmerge()
        each.detach()
    assert_equal(whole(model.state_dict()), plain.state_dict())
    peftops.load(model, folder / "one")
    assert_close({"y": model(x)}, {"y": before})


def test_trained_biases(ranks, tmp_path):
    ranks(trained_biases, tmp_path)
    assert_same_files(tmp_path)


# ---- a transformer, with FSDP ----------------------------------------------------------------------------------------

PLAN = {
    **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
    "self_attn.o_proj": RowwiseParallel(),
    **{f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")},
    "mlp.down_proj": RowwiseParallel(),
}


def a_transformer(rank, with_fsdp):
    """Trained for a few steps; with FSDP2 over the other dimension of the mesh, then with a checkpointed forward."""
    ids = sequences(4)
    trained = []
    for parallel in (True, False):
        torch.manual_seed(0)
        model = llama()
        if parallel:
            both = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("data", "tensor"))
            for layer in model.model.layers:
                parallelize_module(layer, both["tensor"], PLAN)
        tuning = with_factors(model, peftops.LoRA(rank=4))
        if with_fsdp:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if parallel and with_fsdp:
            for layer in model.model.layers:
                fully_shard(layer, mesh=both["data"])
            fully_shard(model, mesh=both["data"])
        optimizer = tuning.optimizer(lr=1e-2)
        for _ in range(STEPS):
            model.train()(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(whole(values(tuning)))
    assert_close(*trained)


@pytest.mark.parametrize("with_fsdp", [False, True])
def test_a_transformer_trains_like_one_process(ranks, with_fsdp):
    ranks(a_transformer, with_fsdp)


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(rank):
    x = torch.randn(2, 16)
    for style in (ColwiseParallel(), RowwiseParallel()):
        torch.manual_seed(0)
        model = MLP()
        peftops.attach(model, peftops.LoRA(rank=2))
        before = model(x)
        with pytest.raises(RuntimeError, match="call parallelize_module first, then peftops.attach"):
            parallelize_module(model, mesh(), {"up": style})
        assert torch.equal(model(x), before)

    model = parallelize_module(MLP(), mesh(), {"up": ColwiseParallel()})
    with pytest.raises(ValueError, match="init 'pissa' decomposes the weight, but that is sharded"):
        peftops.attach(model, peftops.LoRA(rank=2, init="pissa", target_modules=["up"]))
    assert type(model.up) is nn.Linear
    peftops.attach(model, peftops.LoRA(rank=2, target_modules=["up"]))
    with pytest.raises(TypeError, match="x is a plain tensor, but the weight is a DTensor"):
        model.up.forward(x)

    embedding = parallelize_module(nn.Sequential(nn.Embedding(10, 4)), mesh(), {"0": RowwiseParallel()})
    with pytest.raises(TypeError, match="of sharded layers only nn.Linear can be adapted"):
        peftops.attach(embedding, peftops.LoRA(rank=2, target_modules=["0"]))

    replicated = MLP()
    replicated.up.weight = nn.Parameter(distribute_tensor(replicated.up.weight, mesh(), [Replicate()]))
    with pytest.raises(TypeError, match=r"placements \[Replicate\(\)\] on a mesh \[2\]"):
        peftops.attach(replicated, peftops.LoRA(rank=2, target_modules=["up"]))


def test_what_cannot_be_has_an_error_that_says_why(ranks):
    ranks(refused)


def test_nobody_who_shards_nothing_imports_distributed_tensors():
    code = "import sys, peftops; sys.exit('torch.distributed.tensor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
