"""The calls that `make gpu-sanitize` watches: every operator, dtype and sample, forward and backward, no oracle.

python -m tests.gpu.smoke                  prints how many calls were made
python -m tests.gpu.smoke --plant memcheck a call that the tool must object to: x ends before its rows do
python -m tests.gpu.smoke --plant initcheck the same with an x that nobody wrote
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch
from peftops.ops import lora_linear
from peftops.ops.contract import Contract, Sample
from peftops.testing.gradients import randn_upstream
from peftops.testing.samples import bind
from peftops.testing.values import forward_of, results_of

from tests.gpu.calls import every
from tests.gpu.cases import FAMILIES
from tests.gpu.device import Cuda, Rehearsal, open_device


def calls(device: torch.device) -> Iterator[tuple[Contract, Sample]]:
    for contract, dtype in every(device):
        for sample in contract.sample_inputs(device, dtype, 0):
            yield contract, sample
    for family in FAMILIES:
        yield from family.every_kernel(device)


def smoke(device: Cuda | Rehearsal) -> int:
    """Make every call once with and once without gradients; returns how many there were."""
    made = 0
    for made, (contract, sample) in enumerate(calls(device.device), 1):  # noqa: B007
        bound = bind(contract, sample)
        forward_of(contract.op, contract)(bound)
        results_of(contract.op, contract, randn_upstream(0))(bound)
        device.synchronize()
    return made


def plant(device: Cuda | Rehearsal, fault: str) -> None:
    """One call with a fault in its input that a sanitizer must see in a kernel of the library."""
    x = torch.zeros(64, 256, dtype=torch.bfloat16, device=device.device)
    weight, a, b = (torch.zeros(rows, columns, dtype=x.dtype, device=x.device) for rows, columns in
                    ((32, 256), (16, 256), (32, 16)))  # fmt: skip
    if fault == "memcheck":
        x.untyped_storage().resize_(256)
    else:
        x = torch.empty_like(x)
    lora_linear(x, weight, None, a.requires_grad_(), b)
    device.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description="The calls that sanitizers watch.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--plant", choices=["memcheck", "initcheck"])
    args = parser.parse_args()
    device = open_device(args.device)
    if args.plant:
        plant(device, args.plant)
    else:
        print(f"calls: {smoke(device)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
