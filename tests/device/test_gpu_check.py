"""The checks that wait for a GPU (tests/gpu), rehearsed on the emulated one: they run there, and pass."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch

from tests.build.kernels import RECORD, read_record, short_names
from tests.device import emulate
from tests.device.recording import GPUS, LAUNCHES, Runtime
from tests.device.standin import runs_in
from tests.gpu import cases
from tests.gpu.cases import Setting
from tests.gpu.device import Rehearsal

emulated = runs_in("emulator")
SIDE_STREAM = 0x77


class Emulated(Rehearsal):
    """The emulator in the place of a GPU. Its kernels run at once, whatever the stream."""

    def __init__(self):
        self.device = torch.device("cuda", 0)
        self.runtime = Runtime(emulate.device.runtime)
        self.runtime.set_devices(GPUS["A100"])

    @contextlib.contextmanager
    def delayed_stream(self):
        emulate.device.set_stream(0, SIDE_STREAM)
        try:
            with self.runtime.recorded() as calls:
                yield
        finally:
            emulate.device.set_stream(0, 0)
        assert {call.stream for call in calls if call.name in LAUNCHES} <= {SIDE_STREAM}

    def launched(self, call) -> list[str]:
        with self.runtime.recorded() as calls:
            call()
        return sorted({call.kernel for call in calls if call.name in LAUNCHES})


def run(part: str, names) -> dict:
    """The facts of the checks of a part whose names are asked for; an exception where one fails."""
    setting = Setting(Emulated(), fuzz=4)
    found = {case.name: case.run() for case in cases.PARTS[part][0](setting) if names is None or case.name in names}
    assert found, f"part {part} has none of {names}"
    return found


@pytest.mark.parametrize("part", ["smoke", "stream", "graph"])
@emulated
def test_a_part_passes(part):
    names = [f"lora_linear-{dtype}" for dtype in ("float32", "bfloat16", "float16")]
    names += ["lora_linear.tensor_scale-bfloat16", "lora_linear_forward-float16", "lora_dropout_mask-float32"]
    run(part, [name + ("-poison" if part == "smoke" else "") for name in names])


@emulated
def test_random_calls_and_modules():
    run("fuzz", None)
    run("use", ["autocast", "checkpointing", "training"])


@emulated
def test_repeats_and_leaks():
    with mock.patch.object(cases, "REPEATS", 3):
        run("repeats", ["lora-1", "lora-2"])
    run("leak", ["lora_linear-bfloat16-plain", "lora_linear-bfloat16-checkpoint"])


@emulated
def test_every_kernel_of_the_library_would_run():
    facts = run("kernels", ["launched"])["launched"]
    ran = set(short_names(set(facts)).values())
    # TMA and wgmma are not emulated.
    wanted = {name for name, _ in read_record(RECORD)[1] if not name.startswith("lora::sm90::")}
    assert ran == wanted, f"never launched: {sorted(wanted - ran)}; not in the record: {sorted(ran - wanted)}"
