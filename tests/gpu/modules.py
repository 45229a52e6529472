"""What users do on a GPU with the modules: autocast, checkpointing, compilation, CUDA graphs, a training run."""

from __future__ import annotations

import copy
import tempfile

import peftops
import torch
from peftops.nn import LoRALinear
from peftops.testing.samples import same_bits
from torch.utils.checkpoint import checkpoint

from tests.gpu.device import Cuda, Rehearsal


def layer(device: torch.device, dtype: torch.dtype, factors: torch.dtype | None = None, dropout: float = 0.0):
    """A LoRA layer whose B is not zero."""
    torch.manual_seed(0)
    made = LoRALinear.from_linear(
        torch.nn.Linear(96, 80).to(device, dtype), rank=8, alpha=16, dropout=dropout, adapter_dtype=factors
    )
    with torch.no_grad():
        for factor in made.lora_b.parameters():
            factor.copy_(torch.randn(factor.shape) / 3)
    return made


def _step(module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output and gradients of the factors and of x after seeding torch's generators."""
    torch.manual_seed(5)
    leaf = x.detach().clone().requires_grad_()
    y = module(leaf)
    trained = [p for p in module.parameters() if p.requires_grad]
    return y.detach(), *torch.autograd.grad(y.float().square().sum(), [leaf, *trained])


def _same(got: tuple, wanted: tuple, what: str) -> None:
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert same_bits(a, b), f"{what}: result {index} has other bits"


def autocast(device: Cuda | Rehearsal) -> None:
    """Float32 layers under autocast give the bits of 16-bit base weights with float32 factors."""
    for dtype in (torch.bfloat16, torch.float16):
        module = layer(device.device, torch.float32, dropout=0.25)
        x = torch.randn(40, 96).to(device.device)

        def forward(module=module, x=x, dtype=dtype):
            with torch.autocast(device.device.type, dtype):
                return module(x)

        torch.manual_seed(5)
        y = forward()
        low = layer(device.device, dtype, torch.float32, 0.25)
        with torch.no_grad():
            for name in ("lora_a", "lora_b"):
                getattr(low, name)["default"].copy_(getattr(module, name)["default"])
        torch.manual_seed(5)
        assert y.dtype == dtype and same_bits(y, low(x.to(dtype))), f"autocast {dtype} differs from explicit casts"
        y.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in module.parameters() if p.requires_grad)


def checkpointing(device: Cuda | Rehearsal) -> None:
    """Recomputation draws the mask of the first pass."""
    module = layer(device.device, torch.bfloat16, dropout=0.5).train()
    x = torch.randn(70, 96).to(device.device, torch.bfloat16)

    class Recomputed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    _same(_step(Recomputed(), x), _step(module, x), "checkpointing")


def compiled(device: Cuda | Rehearsal) -> None:
    """Inductor gives the bits of eager mode without a graph break, and another scale does not recompile."""
    module = layer(device.device, torch.bfloat16)
    x = torch.randn(33, 96).to(device.device, torch.bfloat16)
    torch._dynamo.reset()
    fast = torch.compile(module, fullgraph=True)
    _same(_step(fast, x), _step(module, x), "torch.compile")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for scale in (0.5, 0.0, -2.0):
            module.set_active({"default": scale})
            _same(_step(fast, x), _step(module, x), f"torch.compile with scale {scale}")
    torch._dynamo.reset()


def graph_draws_new_masks(device: Cuda | Rehearsal) -> None:
    """Every replay of a captured training step drops other elements, about the share that p says."""
    module = layer(device.device, torch.float32, dropout=0.5).train()
    with torch.no_grad():
        module.weight.zero_()
        module.bias.zero_()
        for factors in (module.lora_a, module.lora_b):
            factors["default"].fill_(1)
    x = torch.eye(96, device=device.device)
    (y,), replay = device.capture(lambda: (module(x),))
    seen = set()
    for _ in range(8):
        replay()
        device.synchronize()
        kept = (y[:, 0] != 0).tolist()
        assert 0.2 < sum(kept) / len(kept) < 0.8, f"a replay keeps {sum(kept)} of {len(kept)} elements with p = 0.5"
        seen.add(tuple(kept))
    assert len(seen) == 8, f"8 replays drew only {len(seen)} masks"


def training(device: Cuda | Rehearsal) -> None:
    """A small model trains as it does on the CPU; save, load, merge, unmerge and detach keep their promises."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.GELU(), torch.nn.Linear(64, 10))
    x, target = torch.randn(128, 48), torch.randint(10, (128,))

    def losses(where: torch.device) -> tuple[list[float], torch.nn.Module, object]:
        torch.manual_seed(1)
        model = copy.deepcopy(base)
        tuning = peftops.attach(model, peftops.LoRA(rank=4, alpha=8))
        model.to(where)
        optimizer = tuning.optimizer(lr=1e-2)
        found = []
        for _ in range(20):
            loss = torch.nn.functional.cross_entropy(model(x.to(where)), target.to(where))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found, model, tuning

    wanted, *_ = losses(torch.device("cpu"))
    found, model, tuning = losses(device.device)
    worst = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
    assert worst < 5e-3 and found[-1] < 0.8 * found[0], f"losses {found[0]:.4f} ... {found[-1]:.4f}, CPU off by {worst}"

    inputs = x.to(device.device)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tuned = model(inputs).detach()
    with tempfile.TemporaryDirectory() as folder:
        tuning.save(folder)
        again = copy.deepcopy(base).to(device.device)
        peftops.load(again, folder)
        assert same_bits(again(inputs).detach(), tuned), "a loaded adapter gives another output"
    tuning.merge()
    torch.testing.assert_close(model(inputs).detach(), tuned, rtol=1e-4, atol=1e-4)
    tuning.unmerge()
    assert all(same_bits(p, before[name]) for name, p in model.named_parameters()), "unmerge did not restore the bits"
    tuning.detach()
    plain = copy.deepcopy(base).to(device.device)
    assert same_bits(model(inputs), plain(inputs)), "detach did not restore the model"


class _Net(torch.nn.Module):
    """One layer of each kind that takes LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 48)
        self.linear = torch.nn.Linear(48, 64)
        self.conv = torch.nn.Conv1d(64, 32, 3, padding=1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.relu(self.linear(self.embed(ids))).transpose(1, 2))


def several_adapters(device: Cuda | Rehearsal) -> None:
    """Embedding, linear layer and convolution with two adapters: outputs and gradients are those of the CPU, for every
    choice of active ones, and merging is undone.
    """
    torch.manual_seed(0)
    host = _Net()
    method = peftops.LoRA(rank=4, target_modules=["embed", "linear", "conv"])
    tuning = peftops.attach(host, method, name="a")
    tuning.add("b", method, trainable=True)
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.normal_(std=0.2)
    twin = copy.deepcopy(tuning)
    twin.model.to(device.device)
    ids = torch.randint(50, (8, 20))
    for active in ("a", "b", {"a": 0.5, "b": -2.0}, None):
        results = []
        for one, where in ((tuning, torch.device("cpu")), (twin, device.device)):
            one.activate(active)
            y = one.model(ids.to(where))
            grads = []
            if active:
                one.model.zero_grad()
                y.square().mean().backward()
                grads = [p.grad.cpu() for p in one.parameters() if p.grad is not None]
            results.append([y.detach().cpu(), *grads])
        torch.testing.assert_close(*results, rtol=2e-4, atol=2e-4, msg=lambda text, active=active: f"{active}: {text}")
    twin.activate(["a", "b"])
    before = [p.detach().clone() for p in twin.model.parameters()]
    twin.merge()
    twin.unmerge()
    assert all(same_bits(p, old) for p, old in zip(twin.model.parameters(), before, strict=True)), "unmerge lost bits"


def graph_sees_swapped_weights(device: Cuda | Rehearsal) -> None:
    """A captured forward takes the factors that a swap has put into the captured memory."""
    module, other = layer(device.device, torch.float32).eval(), layer(device.device, torch.float32).eval()
    with torch.no_grad():
        other.lora_b["default"].mul_(-3)
    x = torch.randn(40, 96).to(device.device)
    with torch.no_grad():
        (y,), replay = device.capture(lambda: (module(x),))
        module.swap_("default", other.adapters["default"], other.factors("default"))
        replay()
        device.synchronize()
        assert same_bits(y, other(x)), "a replay after a swap gives another output than the swapped adapter"
