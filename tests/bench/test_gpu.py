"""What bench/lora.py --device cuda would measure, and the parts of it that need no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import gpu
import harness
import lora
import lora_contenders
import lora_gpu
import lora_kinds
import pytest
import report
import torch
from harness import BASE, CONTROL, Case, Contender, Effort, Unavailable
from lora_contenders import Problem
from lora_kinds import OURS, OURS_FP32, PEFT, PEFT_AUTOCAST, PEFT_FP32, UNSLOTH

from .conftest import BENCH

BANDWIDTH, RATE, CACHE = 4e12, 8e14, 60 << 20


class Event:
    """A CUDA event on a device whose clock steps move."""

    now = 0.0

    def __init__(self, enable_timing: bool):
        self.synchronized, self.at = False, None

    def record(self) -> None:
        self.at = Event.now

    def synchronize(self) -> None:
        self.synchronized = True

    def elapsed_time(self, later: Event) -> float:
        assert later.synchronized, "read before the device was there"
        return 1e3 * (later.at - self.at)


def test_time_is_what_the_device_takes_between_two_events(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)

    def step(seconds: float):
        def run(i: int) -> None:
            Event.now += seconds

        return run

    contenders = [Contender(BASE, step(2.0)), Contender("a", step(3.0))]
    case = Case("case", "train", {}, lambda: (contenders, 2))
    once = Effort(seconds=0, fewest=2, most=2, sample_seconds=0, attempts=1)
    record = harness.run_case(case, once, clock=gpu.Moment)
    assert record["steady"] and record["contenders"][CONTROL]["seconds"]["median"] == pytest.approx(2.0)
    assert record["contenders"]["a"]["over_base"]["median"] == pytest.approx(1.5)


@pytest.fixture
def no_pool(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)


def test_a_graph_is_captured_per_input_set_after_the_result_was_checked(monkeypatch, no_pool):
    log: list[object] = []

    def captured(call, pool):
        assert log[0] == "check"
        call()
        return None, lambda: log.append("replay")

    monkeypatch.setattr(gpu, "captured", captured)
    contender = Contender("a", lambda i: log.append(i), lambda: log.append("check") or 0.5)
    (graphed,) = gpu.graphed([contender], 3, lambda name: True)
    assert graphed.check() == 0.5 and log == ["check", 0, 1, 2]
    graphed.step(1)
    assert log[-1] == "replay"


def test_a_peer_that_cannot_be_captured_is_left_out_and_ours_fails(monkeypatch, no_pool):
    def captured(call, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(gpu, "captured", captured)
    contenders = [Contender(name, print, lambda: 0.0) for name in (PEFT, OURS)]
    peer, ours = gpu.graphed(contenders, 1, lambda name: name == OURS)
    with pytest.raises(Unavailable, match="^CUDA graph: operation not permitted when stream is capturing$"):
        peer.check()
    with pytest.raises(RuntimeError, match="not permitted"):
        ours.check()


class HostMoment:
    """gpu.Moment on the host's clock."""

    def __init__(self):
        self.at = time.perf_counter()

    def __sub__(self, earlier: HostMoment) -> float:
        return self.at - earlier.at


def test_a_whole_run_with_the_cpu_in_the_place_of_the_gpu(monkeypatch, no_pool, tmp_path, capsys):
    device = harness.Device("cuda", "NVIDIA H200", 132, {"L2": 1 << 14}, {"driver": "580", "cuda": "13.0"})
    small = lora_contenders.BlockShape(128, 256, 4, 2, 64)
    for where, name, value in (
        (torch.cuda, "is_available", lambda: True),
        (lora, "peftops_cuda_error", lambda: None),
        (harness, "this_gpu", lambda: device),
        (gpu, "copy_bandwidth", lambda nbytes: BANDWIDTH),
        (gpu, "matmul_rate", lambda dtype, size: RATE),
        (gpu, "Moment", HostMoment),
        (gpu, "captured", lambda call, pool: (None, call)),
        (gpu, "peak_bytes", lambda step: 12345),
        (gpu, "empty", lambda: None),
        (lora_gpu, "DEVICE", "cpu"),
        (lora_gpu, "TOKENS", (24,)),
        (lora_gpu, "SHAPES", ((64, 48),)),
        (lora_gpu, "BlockShape", lambda **sizes: small),
        (lora_gpu, "QKV", (24, 64, (48, 16, 16))),
        (lora_gpu, "MIXED", ((3, 2, 64, 2),)),
        (lora_gpu, "effort", lambda case: Effort(seconds=0, fewest=2, most=2, sample_seconds=0, attempts=1)),
        (sys, "argv", ["lora.py", "--device", "cuda", "--threads", "1", "--output", str(tmp_path / "lora.json")]),
    ):
        monkeypatch.setattr(where, name, value)
    assert lora.main() == 0
    made, shown = json.loads((tmp_path / "lora.json").read_text()), capsys.readouterr().out
    assert made["not_measured"] == {} and {c["group"] for c in made["cases"]} == set(lora_gpu.PARTS)
    assert made["device"]["driver"] == "580" and made["ceilings"]["copy_bytes_per_second"] == BANDWIDTH
    linear = [c for c in made["cases"] if c["group"] not in ("shared", "mixed")]
    assert all(set(c["contenders"]) >= {OURS, PEFT, OURS_FP32, PEFT_FP32} for c in linear)
    assert {c["contenders"][OURS]["peak_bytes"] for c in made["cases"] if c["group"] == "block"} == {12345}
    assert "NVIDIA H200, 132 multiprocessors" in shown and report.TITLES["eager"] in shown
    report.results_page([made])


def test_the_cases_are_those_asked_for():
    cases = lora_gpu.cases(BANDWIDTH, RATE, CACHE, lora_gpu.PARTS, quick=False)
    assert len({c.name for c in cases}) == len(cases)
    found = {(c.group, *(c.facts.get(k) for k in ("tokens", "in_features", "out_features", "rank", "dropout")))
             for c in cases if c.group != "shared"}  # fmt: skip
    for m in (1, 16, 512, 2048, 8192):
        for k, n in ((4096, 4096), (4096, 14336), (14336, 4096)):
            assert ("forward", m, k, n, 16, 0.0) in found
            assert {("train", m, k, n, 16, p) for p in (0.0, 0.1)} <= found
        assert {("eager", m, 4096, 4096, 16, p) for p in (0.0, 0.1)} <= found
    assert {("train", m, 4096, 4096, r, p) for m in (2048, 8192) for r in (8, 64) for p in (0.0, 0.1)} <= found
    assert sum(c.group == "block" for c in cases) == 4 and sum(c.group == "saved" for c in cases) == 2
    assert {c.group for c in lora_gpu.cases(BANDWIDTH, RATE, CACHE, ("train",), False)} == {"train"}
    quick = lora_gpu.cases(BANDWIDTH, RATE, CACHE, lora_gpu.PARTS, quick=True)
    assert {c.group for c in quick} == set(lora_gpu.PARTS) and len(quick) < 16


def test_targets_over_the_peer_and_the_memory_bound():
    cases = {c.name: c for c in lora_gpu.cases(BANDWIDTH, RATE, CACHE, lora_gpu.PARTS, quick=False)}
    headline = cases["train M=2048 4096->4096 r=16 p=0.1"]
    assert {(t.contender, t.over, t.at_most) for t in headline.targets} == {
        (OURS, PEFT, 1.0),
        (OURS_FP32, PEFT_FP32, 1.0),
    }
    over = {name: {(t.contender, t.over): t.at_most for t in case.targets} for name, case in cases.items()}
    assert over["forward M=8192 4096->4096 r=16 p=0"] == {(OURS, BASE): 1.08}
    assert over["train M=8192 4096->4096 r=16 p=0"] == {(OURS, BASE): 1.12}
    assert over["train M=8192 4096->14336 r=16 p=0.1"] == {
        (OURS, BASE): pytest.approx(1.15),
        (OURS, PEFT_AUTOCAST): 1 / 1.6,
        (OURS, PEFT): 1 / 1.25,
        (OURS, UNSLOTH): 1 / 1.2,
    }
    assert over["train M=8192 4096->4096 r=64 p=0"] == {(OURS, BASE): 1.15}
    assert over["forward M=1 4096->4096 r=16 p=0"] == {(OURS, BASE): 1.15}
    assert over["eager M=8192 4096->4096 r=16 p=0.1"] == {}
    saved = cases["saved M=2048 4096->4096 r=16 p=0.1"]
    assert {t.at_most for t in saved.targets} == {2048 * 4096 * 2 + 4 * 2048 * 16 + 2048 * 4096 // 8}


def test_floors_of_a_gpu():
    many = lora_gpu.floor(Problem(8192, 4096, 4096, torch.bfloat16), True, BANDWIDTH, RATE)
    assert many.seconds == pytest.approx((4 * 8192 * 4096**2 + 6 * 8192 * 16 * 8192) / RATE)
    assert many.over_base == pytest.approx(1.0117, abs=1e-4)
    one = lora_gpu.floor(Problem(1, 4096, 4096, torch.bfloat16), False, BANDWIDTH, RATE)
    assert one.seconds == pytest.approx(2 * (4096**2 + 8192 + 16 * 8192) / BANDWIDTH)
    assert one.over_base == pytest.approx(1.0078, abs=1e-4)


@pytest.mark.parametrize("rank", [8, 64])
def test_contenders_of_any_rank_and_shape_agree_with_the_law(rank):
    problem = Problem(24, 96, 80, torch.bfloat16, 0.1, rank)
    contenders, _ = lora_contenders.train_contenders(problem, False, 1 << 14)
    assert [c.name for c in contenders] == [BASE, OURS, PEFT, UNSLOTH, OURS_FP32, PEFT_FP32, PEFT_AUTOCAST]
    assert max(c.check() for c in contenders) > 0
    layer = lora_kinds.peftops_layer(lora_kinds.shell(problem.weight()), 0.0, None, rank)
    adapter = layer.adapters["default"]
    assert adapter.rank == rank and adapter.scaling == lora_kinds.SCALE


def test_without_a_gpu_one_line_says_so():
    command = [sys.executable, str(BENCH / "lora.py"), "--device", "cuda"]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=hidden)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "bench/lora.py --device cuda: torch sees no GPU\n"


def test_what_fails_or_does_not_fit_is_named_and_the_rest_is_measured(monkeypatch):
    now = iter([0.0, 1.0, 2.0, 99.0])
    monkeypatch.setattr(lora, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(gpu, "empty", lambda: None)

    def run_case(case, *_):
        if case.name == "b":
            raise AssertionError("result 0 is wrong\nmore")
        return {"name": case.name}

    monkeypatch.setattr(lora.harness, "run_case", run_case)
    results, saved = {"cases": []}, []

    def save() -> None:
        saved.append((len(results["cases"]), dict(results["not_measured"])))

    lora._measure_within(10.0, [Case(name, "train", {}, None) for name in "abcd"], results, save)
    assert saved[0] == (1, dict.fromkeys("bcd", "out of time"))
    assert [c["name"] for c in results["cases"]] == ["a", "c"]
    assert results["not_measured"] == {"b": "AssertionError: result 0 is wrong", "d": "out of time"}
