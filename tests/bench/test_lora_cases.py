"""LoRA's benchmark: its check lets right contenders pass and stops wrong ones, its targets are those asked for, and it
runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import lora
import lora_contenders
import lora_kinds
import pytest
import report
import torch
from harness import BASE
from lora_contenders import Problem, forward_contenders, train_contenders
from lora_kinds import Kind
from torch import nn

from .conftest import BENCH

DTYPES = (torch.float32, torch.bfloat16)
SMALL = 1 << 14


class Law(nn.Module):
    """LoRA in plain torch, with one fault."""

    def __init__(self, linear: nn.Linear, dropout: float, fault: str):
        super().__init__()
        self.linear, self.dropout, self.fault = linear, dropout, fault
        dtype = linear.weight.dtype
        self.lora_a = nn.Parameter(torch.empty(lora_kinds.RANK, linear.in_features, dtype=dtype))
        self.lora_b = nn.Parameter(torch.empty(linear.out_features, lora_kinds.RANK, dtype=dtype))

    def forward(self, x):
        p = self.dropout + (0.1 if self.fault == "dropout rate" else 0.0)
        kept = x
        if p > 0:
            mask = (torch.rand(x.shape) >= p).to(x.dtype) / (1 - p)
            kept = x * mask
            if self.fault == "mask in backward":
                kept = kept.detach() + (x - x.detach()) * mask.roll(1, 0)
        scale = lora_kinds.SCALE * (1.05 if self.fault == "scale" else 1.0)
        delta = scale * kept @ self.lora_a.t() @ self.lora_b.t()
        if self.fault == "no gradient of A":
            delta = scale * kept @ (self.lora_a.detach() + 0 * self.lora_a).t() @ self.lora_b.t()
        y = self.linear(x) + delta
        if self.fault == "last column":
            y = torch.cat([y[:, :-1], torch.zeros_like(y[:, -1:])], dim=1)
        return y


def check_all(contenders) -> list[float]:
    return [c.check() for c in contenders]


def plant(monkeypatch, fault: str) -> None:
    kind = Kind("faulty", lambda linear, dropout, factor_dtype, rank: Law(linear, dropout, fault))
    monkeypatch.setattr(lora_contenders, "kinds", lambda dtype, compiled: [kind])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_check_of_training_passes_what_is_right(dtype, p):
    contenders, sets = train_contenders(Problem(32, 64, 48, dtype, p), False, SMALL)
    assert [c.name for c in contenders][:3] == [BASE, "peftops", "PEFT"] and sets >= 2
    assert max(check_all(contenders)) > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_check_of_decode_passes_what_is_right(dtype):
    contenders, sets = forward_contenders(Problem(1, 64, 48, dtype), True, False, SMALL)
    assert sets == 1 and max(check_all(contenders)) > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", ["scale", "last column", "mask in backward", "dropout rate", "no gradient of A"])
def test_check_of_training_stops_what_is_wrong(monkeypatch, fault, dtype):
    p = 0.1 if fault in ("mask in backward", "dropout rate") else 0.0
    plant(monkeypatch, fault)
    (base, faulty), _ = train_contenders(Problem(256, 64, 64, dtype, p), False, SMALL)
    base.check()
    with pytest.raises(AssertionError, match="faulty: result|dropout 0.1 keeps"):
        faulty.check()
    plant(monkeypatch, "none")
    (_, right), _ = train_contenders(Problem(256, 64, 64, dtype, p), False, SMALL)
    right.check()


def test_check_of_decode_stops_what_is_wrong(monkeypatch):
    plant(monkeypatch, "scale")
    (_, faulty, *_), _ = forward_contenders(Problem(4, 64, 64, torch.float32), True, False, SMALL)
    with pytest.raises(AssertionError, match="faulty: result 0"):
        faulty.check()


def test_contenders_share_weights_and_factors():
    weight = lora_kinds.frozen(64, 64, dtype=torch.bfloat16)
    layers = [k.builder(lora_kinds.shell(weight), 0.0, k.factor_dtype) for k in lora_kinds.kinds(weight.dtype, False)]
    for layer in layers:
        lora_kinds.fill_factors(layer, 64, seed=3)
    a, b = lora_kinds.factors(layers[0])
    assert b.abs().max() > 0
    for layer in layers:
        assert any(p.data_ptr() == weight.data_ptr() for p in layer.parameters())
        assert [torch.equal(f.bfloat16(), g) for f, g in zip(lora_kinds.factors(layer), (a, b), strict=True)] == [
            True,
            True,
        ]
    assert [lora_kinds.factors(layer)[0].dtype for layer in layers] == [torch.bfloat16] * 3 + [torch.float32] * 3


def test_rotation_exceeds_the_cache_four_times():
    assert lora_contenders.rotation(32 << 20, 32 << 20) == 4
    assert lora_contenders.rotation(1 << 30, 32 << 20) == 2


CEILINGS = lora.Ceilings(20e9, {torch.float32: 200e9, torch.bfloat16: 400e9})


def test_floors():
    floor = lora.train_floor(Problem(512, 4096, 4096, torch.bfloat16), CEILINGS)
    assert floor.over_base == pytest.approx(1.012, abs=5e-4)
    assert floor.seconds == pytest.approx(4 * 512 * 4096**2 * (1 + 48 / 4096) / 400e9)
    assert lora.train_floor(Problem(512, 1024, 1024, torch.float32), CEILINGS).over_base == pytest.approx(
        1.047, abs=5e-4
    )
    read = lora.decode_floor(1, 4096, torch.bfloat16, CEILINGS)
    assert read.over_base == pytest.approx(1.0078, abs=1e-4)
    assert read.seconds == pytest.approx(2 * 4096**2 * (1 + 32 / 4096) / 20e9)


def test_cases_carry_the_targets_asked_for():
    cases = {c.name: c for c in lora.all_cases(CEILINGS, 32 << 20)}
    over = {name: {(t.contender, t.over): t.at_most for t in c.targets} for name, c in cases.items()}
    for dtype in ("bfloat16", "float32"):
        for size, p, limit in ((4096, "0", 1.04), (4096, "0.1", 1.04), (1024, "0", 1.12), (1024, "0.1", 1.18)):
            targets = over[f"train {dtype} {size} p={p}"]
            assert targets["peftops", BASE] == limit and targets["peftops", "PEFT"] == 1.0
        assert over[f"decode {dtype} 1024 M=1 weights cached"] == {("peftops", "PEFT"): 0.7}
        assert over[f"decode {dtype} 1024 M=1 weights from memory"] == {("peftops", "PEFT"): 0.7}
        assert over[f"decode {dtype} 4096 M=1 weights from memory"]["peftops", BASE] == 1.1
        packed = over[f"decode {dtype} 4096 M=16 weights from memory"]
        assert packed["peftops, packed", BASE] == {"bfloat16": 1 / 1.5, "float32": 1 / 2}[dtype]
        assert packed["peftops, packed", "peftops, packed, without LoRA"] == 1.03
        saved = over[f"saved {dtype} 4096 p=0.1"]
        item = {"bfloat16": 2, "float32": 4}[dtype]
        assert next(iter(saved.values())) == 512 * 4096 * item + 512 * 16 * 4 + 512 * 4096 // 8
        assert over[f"block {dtype} 2048 p=0"]["peftops", "PEFT"] == 1.0


def quick(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCH / "lora.py"), "--quick", "--threads", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_smoke_run_covers_every_group_and_keeps_the_memory_bound(tmp_path):
    done = quick("--output", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    groups = {c["group"] for c in results["cases"]}
    # The first two are for GPUs, the others are those of whole models (hf_peft.py).
    assert groups == set(report.TITLES) - {"forward", "eager", "step", "token"}
    for case in results["cases"]:
        assert case["skipped"] == {}
        assert case["group"] != "saved" or {t["verdict"] for t in case["targets"]} == {"met"}, case
    assert all(report.TITLES[group] in done.stdout for group in groups)
    assert results["cpu_level"] in done.stdout and results["versions"]["torch"] == torch.__version__
    blocks = [c["contenders"] for c in results["cases"] if c["group"] == "block"]
    assert all(b["peftops"]["peak_bytes"] > b["peftops"]["saved_bytes"] > 0 for b in blocks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "--only nothing: no case matches"),
        (["--threads", "0"], "--threads is 0, but must be at least 1"),
        (["--part", "train"], "--part is for --device cuda"),
    ],
)
def test_a_bad_argument_is_one_clear_line(arguments, message):
    done = quick(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
