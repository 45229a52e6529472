"""What the checks tell torch.cuda, in which order; the stand-ins take exactly the arguments that torch.cuda takes."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from tests.gpu.device import Cuda, gpu


class Stream:
    """A stream that logs what is queued."""

    count = 0

    def __init__(self, log: list):
        self.log, self.name = log, f"stream {Stream.count}"
        Stream.count += 1

    def synchronize(self) -> None:
        self.log.append(f"wait for {self.name}")

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch) -> list:
    """torch.cuda with stand-ins; what they were told."""
    told: list[str] = []
    Stream.count = 0
    streams = [Stream(told)]  # the current ones, the default stream first

    def replace(name: str, function) -> None:
        monkeypatch.setattr(torch.cuda, name, mock.create_autospec(getattr(torch.cuda, name), side_effect=function))

    @contextmanager
    def current(stream):
        streams.append(stream)
        told.append(f"{stream.name} is current")
        yield
        streams.pop()
        told.append(f"{streams[-1].name} is current again")

    class Graph:
        def replay(self) -> None:
            told.append("replay")

    @contextmanager
    def captured(graph, pool=None):
        told.append(f"capture into {pool}")
        yield
        told.append("captured")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: Stream(told))
    replace("stream", current)
    replace("current_stream", lambda device=None: streams[-1])
    replace("synchronize", lambda device=None: told.append("synchronize"))
    replace("_sleep", lambda cycles: told.append(f"{streams[-1].name} sleeps"))
    replace("mem_get_info", lambda device=None: (8192, 10_000))
    replace("empty_cache", lambda: told.append("empty"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", captured)
    return told


def test_a_delayed_stream_sleeps_before_the_work_and_is_waited_for(log):
    with Cuda().delayed_stream():
        log.append("work")
    assert log == [
        "synchronize",
        "stream 1 is current",
        "stream 1 sleeps",
        "work",
        "stream 0 is current again",
        "wait for stream 1",
    ]


def test_capture_warms_up_on_a_stream_of_its_own(log):
    results, replay = Cuda().capture(lambda: log.append("call") or (1,))
    assert results == (1,)
    replay()
    assert log == [
        "stream 1 waits for stream 0",
        "stream 1 is current",
        "call",
        "call",
        "stream 0 is current again",
        "stream 0 waits for stream 1",
        "capture into None",
        "call",
        "captured",
        "replay",
    ]


def test_the_benchmark_captures_into_the_pool_it_is_given(log):
    _, replay = gpu.captured(lambda: log.append("call"), "pool")
    replay()
    assert log.count("call") == 3 and log[-4:] == ["capture into pool", "call", "captured", "replay"]


def test_pressure_is_queued_beside_the_work_and_given_back(log, monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *size, real=torch.zeros, **options: real(*size, dtype=torch.uint8))
    device = Cuda()
    device.press()
    device.press()
    assert log.count("stream 1 is current") == 2 and device._bus[1].numel() == 1024
    device.relieve()
    assert device._bus is None and log[-1] == "empty"
