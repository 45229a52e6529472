"""Pages made from results: what they say, and that a stale one is noticed."""

from __future__ import annotations

import copy
import json

import pytest
import report

SPREAD = {"median": 0.0881, "q1": 0.0872, "q3": 0.0902}
CASE = {
    "name": "train bfloat16 4096 p=0",
    "group": "train",
    "sets": 4,
    "skipped": {"PEFT compiled": "torch.compile: no compiler"},
    "steady": True,
    "floor": {"seconds": 0.08, "over_base": 1.0117, "law": "law"},
    "contenders": {
        "base": {"seconds": SPREAD, "over_base": {"median": 1.0, "q1": 0.99, "q3": 1.01}, "over_floor": 1.1},
        "control": {"seconds": SPREAD, "over_base": {"median": 1.001, "q1": 0.99, "q3": 1.01}, "over_floor": 1.1},
        "peftops": {"seconds": SPREAD, "over_base": {"median": 1.0342, "q1": 1.03, "q3": 1.04}, "over_floor": 1.137},
    },
    "targets": [
        {"contender": "peftops", "over": "base", "metric": "time", "at_most": 1.05, "value": 1.0342, "verdict": "met"}
    ],
}
RESULTS = {
    "family": "lora",
    "slug": "cpu-x",
    "device": {"kind": "cpu", "model": "X", "cores": 2, "caches": {"L3": 32 << 20}},
    "threads": 2,
    "cpu_level": "avx512",
    "versions": {"torch": "2.13.0"},
    "commit": "abc",
    "date": "2026-01-01 00:00 UTC",
    "load_before": 0.0,
    "ceilings": {"read_bytes_per_second": 4e10, "matmul_operations_per_second": {"float32": 2e11}},
    "rank": 16,
    "quick": False,
    "cases": [CASE],
}


@pytest.fixture
def root(tmp_path):
    """A checkout with results and pages that hold markers but no tables."""
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "lora-cpu-x.json").write_text(json.dumps(RESULTS))
    (tmp_path / "tests" / "build").mkdir(parents=True)
    (tmp_path / "tests" / "build" / "kernels.txt").write_text("lora::sm80::finish<float> sm_90a 26 0 0 0 0 c90\n")
    for name in report.PAGES["lora"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before\n<!-- bench:lora:begin -->\n<!-- bench:lora:end -->\nafter\n")
    with (tmp_path / "README.md").open("a") as file:
        file.write("<!-- bench:hf_peft:begin -->\n<!-- bench:hf_peft:end -->\n")
        file.write("<!-- bench:kernels:begin -->\n<!-- bench:kernels:end -->\nend\n")
    return tmp_path


def change(verdict="missed", value=1.2, **case):
    changed = copy.deepcopy(CASE) | case
    changed["targets"][0] |= {"verdict": verdict, "value": value}
    return changed


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.5, "1.50 s"),
        (0.0881, "88.1 ms"),
        (0.25, "250 ms"),
        (7.6e-5, "76.0 us"),
        (0.00099996, "1.00 ms"),
        (3e-8, "30.0 ns"),
    ],
)
def test_times_have_three_digits(seconds, text):
    assert report.time_text(seconds) == text


def test_bytes():
    assert report.bytes_text(4 << 20) == "4.00 MiB"
    assert report.bytes_text(38 * 1024) == "38.0 KiB"


def test_short_table_shows_ratios_floor_and_verdict():
    head, rows = report.group_table([CASE], full=False)
    assert head == ["case", "base", "peftops", "PEFT compiled", "floor", "targets"]
    assert rows == [["bfloat16 4096 p=0", "88.1 ms", "1.034x", "not measured", "1.012x", "met"]]


def test_full_table_adds_spread_and_gap():
    row = report.group_table([CASE], full=True)[1][0]
    assert row[1] == "88.1 ms (87.2 ms - 90.2 ms)" and row[2] == "1.034x (1.030 - 1.040)"
    assert row[4] == "1.012x, 80.0 ms: peftops takes 1.14 of it"


def test_what_was_missed_or_unsteady_is_said():
    missed, unsteady = change(), change("unsteady", steady=False)
    assert report.target_summary(missed) == "peftops over base: 1.200x (1.05x wanted, missed)"
    assert report.group_table([unsteady], full=False)[1][0][0] == "bfloat16 4096 p=0 (unsteady)"
    assert report.tally([CASE, missed, unsteady]) == "1 met, 1 missed, 1 unsteady"


def test_text_table_is_aligned():
    lines = report.as_text((["a", "long head"], [["wide cell", "x"], ["y", "z"]]))
    assert lines == ["a          long head", "---------  ---------", "wide cell  x", "y          z"]


def test_markdown_table():
    assert report.as_markdown((["a", "b"], [["1", "2"]])) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]


def test_write_then_check_then_stale(root, capsys):
    assert report.main(["--check"], root) == 1
    assert "README.md does not show" in capsys.readouterr().err
    assert (root / "README.md").read_text().count("1.034x") == 0
    assert report.main([], root) == 0
    assert report.main(["--check"], root) == 0
    readme = (root / "README.md").read_text()
    assert readme.startswith("before\n<!-- bench:lora:begin -->\n") and "\n<!-- bench:lora:end -->\nafter\n" in readme
    assert "| bfloat16 4096 p=0 | 88.1 ms | 1.034x |" in readme and "(bench/RESULTS.md)" in readme
    assert "(../../bench/RESULTS.md)" in (root / "csrc/lora/README.md").read_text()
    page = (root / "bench/RESULTS.md").read_text()
    assert "PEFT compiled not measured: torch.compile: no compiler" in page and "1 met, 0 missed" in page
    (root / "bench/results/lora-cpu-x.json").write_text(json.dumps(RESULTS | {"cases": [change()]}))
    capsys.readouterr()
    assert report.main(["--check"], root) == 1
    assert len(capsys.readouterr().err.splitlines()) == 3


GPU = {
    "slug": "cuda-nvidia-h200",
    "device": {"kind": "cuda", "model": "NVIDIA H200", "cores": 132, "caches": {"L2": 60 << 20}, "driver": "580",
               "cuda": "13.0"},
    "ceilings": {"copy_bytes_per_second": 4.3e12, "matmul_operations_per_second": {"bfloat16": 7.9e14}},
    "not_measured": {"train M=1": "out of time"},
}  # fmt: skip


STEP = {
    "name": "step bfloat16 2048 p=0.1",
    "group": "step",
    "base": "PEFT",
    "sets": 2,
    "skipped": {},
    "contenders": {
        "base": {"seconds": SPREAD, "over_base": {"median": 1.0, "q1": 1.0, "q3": 1.0}, "tokens_per_second": 5811.6,
                 "saved_bytes": 8 << 20, "peak_bytes": 9 << 20},
        "after accelerate": {"seconds": SPREAD, "over_base": {"median": 0.6, "q1": 0.5, "q3": 0.7},
                             "tokens_per_second": 9000.0, "saved_bytes": 2 << 20, "peak_bytes": 3 << 20},
    },
    "targets": [
        {"contender": "after accelerate", "over": "base", "metric": "time", "at_most": 1.0, "value": 0.6,
         "verdict": "met"}
    ],
}  # fmt: skip


def test_a_whole_model_is_shown_with_its_bytes_and_what_the_base_is(root):
    assert report.main([], root) == 0
    assert (root / "README.md").read_text().count("Not measured yet (`make bench`).") == 1
    (root / "bench/results/hf_peft-cpu-x.json").write_text(json.dumps(RESULTS | {"family": "hf_peft", "cases": [STEP]}))
    assert report.main([], root) == 0
    readme = (root / "README.md").read_text()
    assert "| case | PEFT | after accelerate | targets |" in readme
    row = "| bfloat16 2048 p=0.1 | 88.1 ms, 5812 tokens/s, peak 9.00 MiB, saved 8.00 MiB "
    assert row + "| 0.600x, 9000 tokens/s, peak 3.00 MiB, saved 2.00 MiB | met |" in readme
    assert "A ratio is over Hugging Face PEFT's model as it is" in readme
    assert "| after accelerate | PEFT | 1x | 0.600x | met |" in (root / "bench/RESULTS.md").read_text()


def test_what_no_gpu_has_measured_is_called_so(root):
    assert report.main([], root) == 0
    for name in ("README.md", "csrc/lora/README.md", "bench/RESULTS.md"):
        assert "On a GPU: not measured (`make gpu-bench`)." in (root / name).read_text()
    (root / "bench/results/lora-cuda-nvidia-h200.json").write_text(json.dumps(RESULTS | GPU))
    assert report.main([], root) == 0
    readme, page = (root / "README.md").read_text(), (root / "bench/RESULTS.md").read_text()
    assert "not measured (`make gpu-bench`)" not in readme + page
    assert "NVIDIA H200, 132 multiprocessors, L2 60.0 MiB; driver 580, CUDA 13.0." in readme
    assert "copy (bytes read and written) 4300 GB/s, matmul bfloat16 790 Top/s" in page
    assert "- train M=1 not measured: out of time" in page


def test_the_readme_says_which_kernels_a_gpu_has_shown_to_be_right(root):
    assert report.main([], root) == 0
    unknown = "| `lora::sm80::finish` | 1 | sm_90a | not verified on a device |"
    assert unknown in (root / "README.md").read_text()
    record = {
        "family": "gpu-check",
        "passed": True,
        "commit": "0123456789ab",
        "date": "2026-12-01 10:00 UTC",
        "device": {"model": "NVIDIA H200"},
        "kernels": [{"name": "lora::sm80::finish<float>", "arch": "sm_90a", "hash": "c90", "launched": True}],
    }
    (root / "bench/results/gpu-check-cuda-nvidia-h200.json").write_text(json.dumps(record))
    assert report.main(["--check"], root) == 1
    assert report.main([], root) == 0
    known = "| `lora::sm80::finish` | 1 | sm_90a | device-verified at 0123456789ab on NVIDIA H200 |"
    assert known in (root / "README.md").read_text()
    (root / "tests/build/kernels.txt").write_text("lora::sm80::finish<float> sm_90a 26 0 0 0 0 other\n")
    assert report.main(["--check"], root) == 1  # the machine code changed: the page must not go on saying so
    assert report.main([], root) == 0
    assert unknown in (root / "README.md").read_text()


def test_no_results_are_called_not_measured(root):
    (root / "bench/results/lora-cpu-x.json").unlink()
    assert report.main([], root) == 0
    assert "Not measured yet" in (root / "README.md").read_text()


@pytest.mark.parametrize(
    "text", ["", "<!-- bench:lora:end -->\n<!-- bench:lora:begin -->", "<!-- bench:lora:begin -->\n" * 2]
)
def test_missing_markers_are_named(root, capsys, text):
    (root / "README.md").write_text(text)
    assert report.main([], root) == 1
    assert "README.md must hold the line <!-- bench:lora:begin -->" in capsys.readouterr().err


def test_figures_of_a_smoke_run_are_refused(root, capsys):
    (root / "bench/results/lora-cpu-x.json").write_text(json.dumps(RESULTS | {"quick": True}))
    assert report.main(["--check"], root) == 1
    assert "lora-cpu-x.json comes from a run with --quick" in capsys.readouterr().err


def test_this_checkout_shows_its_results(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().err
