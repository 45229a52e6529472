"""The benchmark of a PEFT model after one line: it runs, and its check stops what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import hf_peft
import pytest
import report
import torch
from harness import BASE
from peftops.integrations.hf_peft_linear import FusedLinear

from .conftest import BENCH

SMALL = hf_peft.Shape(64, 96, 4, 2, 2, 64, 32)


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_check_passes_what_is_right(dropout):
    contenders, sets = hf_peft.step_contenders(SMALL, dropout)
    assert [c.name for c in contenders] == [BASE, hf_peft.OURS] and sets == 2
    assert all(0 < c.check() < hf_peft.TOLERANCE for c in contenders)
    contenders, _ = hf_peft.token_contenders(SMALL)
    assert all(0 < c.check() < hf_peft.TOLERANCE for c in contenders)


def test_check_stops_a_wrong_scale(monkeypatch):
    (_, ours), _ = hf_peft.step_contenders(SMALL, 0.0)
    (_, token), _ = hf_peft.token_contenders(SMALL)
    fused = FusedLinear._fused
    monkeypatch.setattr(FusedLinear, "_fused", lambda self, x, names, gated: fused(self, 1.3 * x, names, gated))
    for contender in (ours, token):
        with pytest.raises(AssertionError, match="after accelerate: result"):
            contender.check()


def test_check_stops_another_mask(monkeypatch):
    (_, ours), _ = hf_peft.step_contenders(SMALL, 0.3)
    monkeypatch.setattr(FusedLinear, "_dropout", lambda self, name: 0.0)
    with pytest.raises(AssertionError, match="after accelerate, dropout"):
        ours.check()


def test_both_models_share_the_frozen_weights_alone():
    theirs = hf_peft.peft_model(SMALL, 0.1)
    ours = hf_peft.accelerated(theirs)
    a, b = dict(theirs.named_parameters()), dict(ours.named_parameters())
    assert a.keys() == b.keys()
    for name, parameter in a.items():
        assert (b[name] is parameter) == (not parameter.requires_grad) and torch.equal(b[name], parameter)
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name


def test_cases_are_those_asked_for():
    cases = hf_peft.all_cases()
    assert [c.name for c in cases] == [
        "step bfloat16 2048 p=0",
        "step bfloat16 2048 p=0.1",
        "token bfloat16 2048 after 128",
    ]
    assert all([(t.contender, t.over, t.at_most) for t in c.targets] == [(hf_peft.OURS, BASE, 1.0)] for c in cases)
    assert [c.facts["tokens"] for c in cases] == [512, 512, 1]


def quick(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCH / "hf_peft.py"), "--quick", "--threads", "1", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_smoke_run_writes_a_record_with_every_figure(tmp_path):
    done = quick("--output", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    assert [c["group"] for c in results["cases"]] == ["step", "step", "token"]
    assert all(report.TITLES[group] in done.stdout for group in ("step", "token"))
    for case in results["cases"]:
        theirs, ours = case["contenders"][BASE], case["contenders"][hf_peft.OURS]
        assert min(theirs["tokens_per_second"], ours["tokens_per_second"]) > 0
        if case["group"] == "step":
            assert 0 < ours["saved_bytes"] < 0.75 * theirs["saved_bytes"]
            assert 0 < ours["peak_bytes"] < theirs["peak_bytes"]
    assert results["versions"]["peft"] and results["cpu_level"] in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--only", "nothing"], "--only nothing: no case matches"), (["--threads", "0"], "--threads is 0")],
)
def test_a_bad_argument_is_one_clear_line(arguments, message):
    done = quick(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
