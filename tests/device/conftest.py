"""Tests of the CUDA half without a GPU. Where nvcc is missing there is nothing to test: all are deselected, visibly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.device import standin

DESELECTED = pytest.StashKey[int]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if standin.missing() is None:
        return
    here = [item for item in items if item.path.is_relative_to(standin.HERE)]
    config.hook.pytest_deselected(items=here)
    items[:] = [item for item in items if item not in here]
    config.stash[DESELECTED] = len(here)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if count := config.stash.get(DESELECTED, 0):
        terminalreporter.write_line(f"tests/device: {count} tests deselected, because {standin.missing()}")


@pytest.fixture(scope="session")
def emulator() -> Iterator[standin.Process]:
    """A process whose CUDA devices run peftops' kernels by the emulator."""
    process = standin.Process(*map(str, (standin.runtime(), standin.backend(), standin.emulated())))
    yield process
    process.close()
