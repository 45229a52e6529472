"""Which kernels count as verified on a device: those whose machine code ran there in a run that passed."""

from __future__ import annotations

import copy

import pytest
import verified
from verified import Kernel

NOW = [
    Kernel("lora::sm80::shrink<bfloat16,16>", "sm_80", "a80"),
    Kernel("lora::sm80::shrink<bfloat16,16>", "sm_90a", "a90"),
    Kernel("lora::sm80::shrink<float,16>", "sm_80", "b80"),
    Kernel("lora::sm80::shrink<float,16>", "sm_90a", "b90"),
    Kernel("lora::sm80::finish<float>", "sm_80", "c80"),
    Kernel("lora::sm80::finish<float>", "sm_90a", "c90"),
]
RECORD = {
    "family": "gpu-check",
    "passed": True,
    "commit": "0123456789ab",
    "date": "2026-12-01 10:00 UTC",
    "device": {"kind": "cuda", "model": "NVIDIA H200", "capability": "9.0"},
    "kernels": [{**k._asdict(), "launched": True} for k in NOW if k.arch == "sm_90a"],
}
UNKNOWN = "not verified on a device"
KNOWN = "device-verified at 0123456789ab on NVIDIA H200"


def statuses(kernels=NOW, *records) -> dict[tuple[str, str], str]:
    return {(row[0], row[2]): row[3] for row in verified.table(kernels, records)[1]}


def changed(**fields) -> dict:
    return copy.deepcopy(RECORD) | fields


def test_without_a_record_nothing_is_verified():
    head, rows = verified.table(NOW, [])
    assert head == ["kernel", "variants", "machine code", "on a device"]
    assert rows == [
        ["`lora::sm80::finish`", "1", "sm_80", UNKNOWN],
        ["`lora::sm80::finish`", "1", "sm_90a", UNKNOWN],
        ["`lora::sm80::shrink`", "2", "sm_80", UNKNOWN],
        ["`lora::sm80::shrink`", "2", "sm_90a", UNKNOWN],
    ]


def test_equal_machine_code_is_verified_on_the_architecture_that_ran():
    found = statuses(NOW, RECORD)
    assert found["`lora::sm80::shrink`", "sm_90a"] == found["`lora::sm80::finish`", "sm_90a"] == KNOWN
    assert found["`lora::sm80::shrink`", "sm_80"] == UNKNOWN


def test_other_machine_code_is_not():
    kernels = [k._replace(hash="new") if k.hash == "b90" else k for k in NOW]
    assert statuses(kernels, RECORD)["`lora::sm80::shrink`", "sm_90a"] == f"1 of 2 {KNOWN}; 1 of 2 {UNKNOWN}"
    kernels = [k._replace(hash="new") for k in NOW]
    assert set(statuses(kernels, RECORD).values()) == {UNKNOWN}


def test_a_run_that_failed_verifies_nothing():
    assert set(statuses(NOW, changed(passed=False)).values()) == {UNKNOWN}


def test_a_kernel_that_did_not_run_is_not_verified():
    record = changed()
    record["kernels"][2]["launched"] = False
    found = statuses(NOW, record)
    assert found["`lora::sm80::finish`", "sm_90a"] == UNKNOWN and found["`lora::sm80::shrink`", "sm_90a"] == KNOWN


def test_the_latest_run_is_named():
    later = changed(commit="fedcba987654", date="2026-12-02 09:00 UTC")
    for records in ((RECORD, later), (later, RECORD)):
        assert "fedcba987654" in statuses(NOW, *records)["`lora::sm80::shrink`", "sm_90a"]
    assert statuses(NOW, RECORD, later | {"passed": False})["`lora::sm80::shrink`", "sm_90a"] == KNOWN


@pytest.mark.parametrize(
    ("capability", "archs", "wanted"),
    [
        ("9.0", {"sm_80", "sm_90a"}, "sm_90a"),
        ("9.0", {"sm_80", "sm_90", "sm_90a"}, "sm_90a"),
        ("9.0", {"sm_80"}, None),
        ("8.0", {"sm_80", "sm_90a"}, "sm_80"),
        ("8.9", {"sm_80", "sm_86"}, "sm_86"),
        ("8.9", {"sm_80", "sm_90a"}, "sm_80"),
        ("10.0", {"sm_80", "sm_90a"}, None),
        ("12.0", {"sm_120"}, "sm_120"),
        ("12.1", {"sm_120a"}, None),
    ],
)
def test_what_a_device_runs(capability, archs, wanted):
    assert verified.arch_for(capability, archs) == wanted


@pytest.mark.parametrize(
    "name",
    [
        "void peftops::lora::sm80::shrink<peftops::bfloat16, 16, true>(peftops::lora::ShrinkTask)",
        "void peftops::lora::sm80::(anonymous namespace)::shrink<peftops::bfloat16, (int)16, (bool)true>(ShrinkTask)",
        "lora::sm80::shrink<bfloat16,16,true>",
    ],
)
def test_names_of_a_profiler_are_those_of_the_record(name):
    assert verified.canonical(name) == "lora::sm80::shrink<bfloat16,16,true>"


def test_a_record_says_which_of_the_device_s_kernels_ran():
    launched = ["void peftops::lora::sm80::finish<float>(peftops::lora::FinishTask)", "void at::native::copy(int)"]
    assert [(k["name"], k["arch"], k["launched"]) for k in verified.of_device(NOW, "9.0", launched)] == [
        ("lora::sm80::shrink<bfloat16,16>", "sm_90a", False),
        ("lora::sm80::shrink<float,16>", "sm_90a", False),
        ("lora::sm80::finish<float>", "sm_90a", True),
    ]
    assert verified.of_device(NOW, "12.0", launched) == []


def test_the_list_of_kernels_is_read(tmp_path):
    (tmp_path / "kernels.txt").write_text(
        "# Made by x with nvcc 13.0.88\n# kernel   arch  registers  hash\n"
        "lora::sm80::finish<float>  sm_80   28  0  0  0  c80\nlora::sm80::finish<float>  sm_90a  26  0  0  0  c90\n"
    )
    assert verified.read(tmp_path / "kernels.txt") == NOW[4:]
