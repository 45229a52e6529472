"""What all tests share: the seed, the line that reproduces a failure, the ledger."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

from tests.ledger import LEDGER, stale, waivers

# One backend per process: this suite runs the CPU operators.
BACKEND = "cpu"

# PEFTOPS_FUZZ=N searches N examples per property anew; without it the same few are tried each time.
hypothesis.settings.register_profile(
    "peftops",
    max_examples=int(os.environ.get("PEFTOPS_FUZZ", "40")),
    derandomize="PEFTOPS_FUZZ" not in os.environ,
    database=None,
    deadline=None,
    print_blob=True,
)
hypothesis.settings.load_profile("peftops")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--peftops-seed", type=int, default=0, help="the integer from which all test data is derived")


def pytest_report_header(config: pytest.Config) -> str:
    return f"peftops: CPU level {cpu_level()}, seed {config.getoption('--peftops-seed')}, torch {torch.__version__}"


def cpu_level() -> str:
    """The instruction-set level that the loaded kernels use."""
    from peftops import _C

    return _C.cpu_level()


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """The integer from which all test data is derived."""
    return request.config.getoption("--peftops-seed")


@pytest.fixture
def one_thread():
    """Torch uses one thread: many small calls are faster so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def own_precision(monkeypatch):
    """Trainer with bf16=True leaves it in the environment and in accelerate's state, for every later Trainer."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    found = waivers(LEDGER, [item.nodeid for item in items], BACKEND)
    for item in items:
        if entry := found.get(item.nodeid):
            reason = f"issue {entry.issue}: {entry.reason}"
            mark = (
                pytest.mark.skip(reason=reason) if entry.quarantine else pytest.mark.xfail(reason=reason, strict=True)
            )
            item.add_marker(mark)
    whole = (
        not config.getoption("keyword")
        and not config.getoption("markexpr")
        and not any("::" in arg for arg in config.args)
    )
    if whole and (dead := stale(LEDGER, [item.nodeid for item in items], BACKEND, config.rootpath)):
        raise pytest.UsageError("ledger entries match no test: " + ", ".join(entry.tests for entry in dead))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.failed:
        level = os.environ.get("PEFTOPS_CPU_LEVEL")
        prefix = f"PEFTOPS_CPU_LEVEL={level} " if level else ""
        option = f"--peftops-seed={item.config.getoption('--peftops-seed')}"
        report.sections.append(("reproduce with", f"{prefix}python -m pytest '{item.nodeid}' {option}"))
    return report
