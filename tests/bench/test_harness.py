"""The arithmetic of the harness, on a clock that the steps themselves move."""

from __future__ import annotations

import json
from collections import Counter

import harness
import pytest
import torch
from harness import BASE, CONTROL, Case, Contender, Effort, Floor, Target, Unavailable

ONE_ROUND = Effort(seconds=0, fewest=1, most=1, sample_seconds=0, attempts=3)


class Clock:
    """Time passes only where a step says so."""

    def __init__(self):
        self.now = 0.0
        self.calls = 0

    def __call__(self) -> float:
        return self.now

    def step(self, seconds, log=None):
        def run(i: int) -> None:
            self.calls += 1
            self.now += seconds(self.calls) if callable(seconds) else seconds
            if log is not None:
                log.append(i)

        return run


def case_of(contenders, **kwargs) -> Case:
    return Case("case", "train", {}, lambda: (contenders, 2), **kwargs)


@pytest.mark.parametrize("count", range(2, 9))
def test_everyone_has_every_place_and_every_predecessor_equally_often(count):
    orders = [harness.rotated_order(count, r) for r in range(2 * count)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    places = Counter((place, index) for order in orders for place, index in enumerate(order))
    neighbours = Counter(pair for order in orders for pair in zip(order, order[1:], strict=False))
    assert set(places.values()) == {2} and len(places) == count**2
    assert set(neighbours.values()) == {2} and len(neighbours) == count * (count - 1)


def test_successive_calls_use_successive_sets_whoever_makes_them():
    clock, log = Clock(), []
    samples = harness.sample({"a": clock.step(1.0, log), "b": clock.step(3.0, log)}, 3, rounds=4, inner=2, clock=clock)
    assert samples == {"a": [1.0] * 4, "b": [3.0] * 4}
    assert log == [i % 3 for i in range(16)]


def test_spread_is_median_and_quartiles():
    assert harness.spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}
    assert harness.spread([7.0]) == {"median": 7.0, "q1": 7.0, "q3": 7.0}


def test_ratio_over_the_base_uses_both_of_its_runs_of_the_same_round():
    samples = {BASE: [1.0, 10.0], CONTROL: [3.0, 30.0], "a": [4.0, 10.0]}
    assert harness.ratios(samples, "a", BASE) == [2.0, 0.5]
    assert harness.ratios(samples, CONTROL, BASE) == [3.0, 3.0]
    assert harness.ratios(samples, BASE, "a") == [0.25, 1.0]
    assert harness.disagreement(samples) == 2.0


def test_a_steady_case_is_judged_against_its_targets():
    clock = Clock()
    contenders = [Contender(BASE, clock.step(2.0)), Contender("a", clock.step(2.2)), Contender("b", clock.step(4.0))]
    targets = (Target("a", BASE, 1.12), Target("a", BASE, 1.08), Target("a", "b", 0.56))
    case = case_of(contenders, targets=targets, floor=Floor(1.6, 1.05, "law"))
    record = harness.run_case(case, ONE_ROUND, clock=clock)
    assert record["steady"] and record["attempts"] == 1 and record["disagreement"] == 0
    assert [t["verdict"] for t in record["targets"]] == ["met", "missed", "met"]
    assert [t["value"] for t in record["targets"]] == pytest.approx([1.1, 1.1, 0.55])
    assert record["contenders"]["a"]["over_floor"] == pytest.approx(1.375)
    assert record["contenders"]["b"]["over_base"]["median"] == pytest.approx(2.0)


def test_a_case_whose_base_wavers_is_repeated_and_then_does_not_count():
    clock = Clock()
    case = case_of([Contender(BASE, clock.step(lambda call: 1.1**call))], targets=(Target(BASE, BASE, 9.0),))
    record = harness.run_case(case, ONE_ROUND, clock=clock)
    assert not record["steady"] and record["attempts"] == 3
    assert record["disagreement"] == pytest.approx(0.1)
    assert record["targets"][0]["verdict"] == "unsteady"


def test_a_case_that_calms_down_counts():
    clock = Clock()
    # Warm-up and pilot make eight calls; the first attempt is disturbed, the second is not.
    case = case_of([Contender(BASE, clock.step(lambda call: 1.5 if call == 10 else 1.0))])
    record = harness.run_case(case, ONE_ROUND, clock=clock)
    assert record["steady"] and record["attempts"] == 2 and record["disagreement"] == 0


def test_rounds_fill_the_time_and_short_calls_are_repeated_within_a_sample():
    clock = Clock()
    effort = Effort(seconds=10.0, fewest=2, most=50, sample_seconds=0.1)
    record = harness.run_case(case_of([Contender(BASE, clock.step(0.02))]), effort, clock=clock)
    assert record["calls_per_sample"] == 5
    assert record["rounds"] == 50
    effort = Effort(seconds=3.05, fewest=2, most=50, sample_seconds=0.1)
    assert harness.run_case(case_of([Contender(BASE, clock.step(0.5))]), effort, clock=clock)["rounds"] == 3


def test_a_wrong_result_is_never_timed():
    def check() -> float:
        raise AssertionError("relative error 1")

    timed = []
    contenders = [Contender(BASE, timed.append), Contender("a", timed.append, check)]
    with pytest.raises(AssertionError, match="relative error 1"):
        harness.run_case(case_of(contenders), ONE_ROUND)
    assert timed == []


def test_a_peer_that_cannot_run_is_left_out_with_its_reason():
    def check() -> float:
        raise Unavailable("no compiler")

    clock = Clock()
    contenders = [Contender(BASE, clock.step(1.0), lambda: 1e-7), Contender("a", clock.step(1.0), check)]
    record = harness.run_case(case_of(contenders, targets=(Target("a", BASE, 1.0),)), ONE_ROUND, clock=clock)
    assert record["skipped"] == {"a": "no compiler"}
    assert "a" not in record["contenders"] and record["targets"] == []
    assert record["contenders"][BASE]["relative_error"] == 1e-7


def test_byte_targets_are_judged_from_facts():
    contenders = [Contender("a", lambda i: None, facts=lambda: {"saved_bytes": 100})]
    targets = (Target("a", "bound", 100, "saved_bytes"), Target("a", "bound", 99, "saved_bytes"))
    record = harness.run_case(case_of(contenders, targets=targets, timed=False), ONE_ROUND)
    assert [t["verdict"] for t in record["targets"]] == ["met", "missed"]


def test_saved_bytes_counts_each_storage_once_and_no_weights():
    x = torch.ones(256, requires_grad=True)
    weight = torch.ones(256)
    assert harness.saved_bytes(lambda: x * x, []) == 1024
    assert harness.saved_bytes(lambda: (x * weight).exp(), [weight]) == 1024
    assert harness.saved_bytes(lambda: (x * weight).exp(), []) == 2048


def test_peak_bytes_is_the_most_that_is_held_at_once():
    mib = 1 << 20

    def step():
        a = torch.empty(mib, dtype=torch.uint8)
        b = torch.empty(2 * mib, dtype=torch.uint8)
        del a
        c = torch.empty(4 * mib, dtype=torch.uint8)
        del b, c
        return torch.empty(mib, dtype=torch.uint8)

    before = torch.empty(64 * mib, dtype=torch.uint8)
    assert harness.peak_bytes(step) == 6 * mib
    del before


def test_ceilings_are_positive_and_device_has_a_file_name():
    assert harness.read_bandwidth(1 << 16, repeats=2) > 1e6
    assert harness.matmul_rate(torch.float32, [(8, 8, 8)], repeats=2) > 1e3
    device = harness.Device("cpu", "AMD EPYC(tm) 9B45  family 26", 2, {"L1": 1, "L3": 5})
    assert device.slug == "cpu-amd-epyc-tm-9b45-family-26-2-cores"
    assert device.last_cache == 5
    assert harness.this_cpu().cores >= 1


def test_written_results_come_back_with_five_digits(tmp_path):
    path = tmp_path / "new" / "results.json"
    harness.write(path, {"a": [1.23456789, 3], "b": {"c": 1e-9 / 3}, "d": None})
    assert json.loads(path.read_text()) == {"a": [1.2346, 3], "b": {"c": 3.3333e-10}, "d": None}
