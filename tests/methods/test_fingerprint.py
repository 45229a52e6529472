"""The base's fingerprint stays the same whatever the adapter does, and differs for another base."""

import subprocess
import sys

import peftops
import pytest
import torch
from peftops.methods.fingerprint import SAMPLE, fingerprint
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int = 12):
        super().__init__()
        self.embedding = nn.Embedding(30, width)
        self.up = nn.Linear(width, 40, bias=False)
        self.down = nn.Linear(40, width)
        self.head = nn.Linear(width, 3)

    def forward(self, tokens):
        return self.head(self.down(self.up(self.embedding(tokens))))


NAMES = ["up", "down"]


def make(seed: int = 0) -> Block:
    torch.manual_seed(seed)
    return Block()


def train(tuning) -> None:
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize(
    "method",
    [
        peftops.LoRA(target_modules=NAMES),
        peftops.LoRA(target_modules=NAMES, init="pissa"),
        peftops.LoRA(target_modules=NAMES, init="olora", lora_bias=True, bias="all"),
        peftops.LoRA(target_modules=NAMES, lora_bias=True, modules_to_save=["head"]),
    ],
    ids=["kaiming", "pissa", "olora", "head"],
)
def test_the_adapter_does_not_change_it(method):
    model = make()
    before = fingerprint(model, NAMES)
    tuning = peftops.attach(model, method)
    assert fingerprint(model, NAMES) == before
    train(tuning)
    assert fingerprint(model, NAMES) == before
    tuning.merge()
    assert fingerprint(model, NAMES) == before
    with tuning.disabled():
        assert fingerprint(model, NAMES) == before
    tuning.unmerge()
    with tuning.disabled():
        assert fingerprint(model, NAMES) == before
    tuning.detach()
    assert fingerprint(model, NAMES) == before


def test_several_adapters_and_embeddings():
    model = make()
    names = ["embedding", "up"]
    before = fingerprint(model, names)
    tuning = peftops.attach(model, peftops.LoRA(target_modules=["embedding"]))
    tuning.add("second", peftops.LoRA(target_modules=["up"]), trainable=True)
    train(tuning)
    assert fingerprint(model, names) == before


def test_it_is_the_same_in_another_process(tmp_path):
    model = make()
    tuning = peftops.attach(model, peftops.LoRA(target_modules=NAMES))
    tuning.save(tmp_path / "adapter")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import peftops, torch\n"
        "from tests.methods.test_fingerprint import make, NAMES, fingerprint\n"
        "model = make(); peftops.load(model, sys.argv[2]); print(fingerprint(model, NAMES[::-1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, ".", str(tmp_path / "adapter")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == fingerprint(model, NAMES)


def test_another_base_has_another_one():
    base = fingerprint(make(), NAMES)
    assert fingerprint(make(seed=1), NAMES) != base
    assert fingerprint(make(), ["up"]) != base
    assert fingerprint(Block(width=16), NAMES) != base
    renamed = make()
    renamed.neck = renamed.head
    del renamed.head
    assert fingerprint(renamed, NAMES) != base
    changed = make()
    with torch.no_grad():
        changed.down.weight[0, 0] += 1e-6  # the first value is always in the sample
    assert fingerprint(changed, NAMES) != base
    elsewhere = make()
    with torch.no_grad():
        elsewhere.head.weight.zero_()  # no adapted weight: a head is drawn anew by every process
    assert fingerprint(elsewhere, NAMES) == base


def test_a_wider_dtype_keeps_it_and_rounding_does_not():
    rounded = make().to(torch.bfloat16)
    assert fingerprint(rounded, NAMES) != fingerprint(make(), NAMES)
    assert fingerprint(make().to(torch.bfloat16).to(torch.float32), NAMES) == fingerprint(rounded, NAMES)


def test_strides_do_not_matter():
    model, other = make(), make()
    other.up.weight = nn.Parameter(other.up.weight.detach().t().contiguous().t())
    assert not other.up.weight.is_contiguous()
    assert fingerprint(other, NAMES) == fingerprint(model, NAMES)


def test_the_work_is_bounded_per_weight():
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(torch.ones(1, 1).expand(2**20, 2**20), requires_grad=False)  # 4 TiB if it were copied
    model = nn.Sequential(layer)
    seen = fingerprint(model, ["0"])
    layer.weight = nn.Parameter(torch.zeros(1, 1).expand(2**20, 2**20), requires_grad=False)
    assert fingerprint(model, ["0"]) != seen
    small = nn.Sequential(nn.Linear(SAMPLE, 1))  # as many values as the sample has: every one counts
    before = fingerprint(small, ["0"])
    for column in range(SAMPLE):
        with torch.no_grad():
            small[0].weight[0, column] += 1
        after = fingerprint(small, ["0"])
        assert after != before
        before = after


def test_empty_meta_and_missing_weights():
    assert fingerprint(nn.Sequential(nn.Linear(0, 3)), ["0"]) != fingerprint(nn.Sequential(nn.Linear(3, 0)), ["0"])
    with torch.device("meta"):
        model = Block()
    with pytest.raises(ValueError, match=r"fingerprint: down.weight is on the meta device"):
        fingerprint(model, NAMES)
    with pytest.raises(AttributeError, match="nose"):
        fingerprint(make(), ["nose"])
