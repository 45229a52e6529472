"""Which kernels a GPU has shown to be right: those whose machine code is still the one that ran there.

`make gpu-check` stores the hash of the machine code of every kernel that the device has some of. While
tests/build/kernels.txt, which every build is compared with, holds the same hash, the verification stands.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "tests" / "build" / "kernels.txt"


class Kernel(NamedTuple):
    """One kernel as compiled for one architecture."""

    name: str
    arch: str
    hash: str


def read(path: Path = KERNELS) -> list[Kernel]:
    """The kernels of the library as they are built today."""
    rows = (line.split() for line in path.read_text().splitlines() if not line.startswith("#"))
    return [Kernel(name, arch, digest) for name, arch, *_, digest in rows]


def arch_for(capability: str, archs: Collection[str]) -> str | None:
    """The one of a kernel's architectures whose machine code a device of that compute capability runs.

    None where it has none of them: then the driver compiles PTX, and what runs has no hash.
    """
    major, minor = (int(part) for part in capability.split("."))
    for lower in range(minor, -1, -1):
        # "a" is for exactly that device
        for name in [f"sm_{major}{lower}a"] * (lower == minor) + [f"sm_{major}{lower}"]:
            if name in archs:
                return name
    return None


def of_device(kernels: Sequence[Kernel], capability: str, launched: Collection[str]) -> list[dict]:
    """For a record: the kernels that such a device has machine code of, and whether each was among the `launched`."""
    archs: dict[str, set[str]] = {}
    for kernel in kernels:
        archs.setdefault(kernel.name, set()).add(kernel.arch)
    ran = {canonical(name) for name in launched}
    return [
        {**kernel._asdict(), "launched": canonical(kernel.name) in ran}
        for kernel in kernels
        if arch_for(capability, archs[kernel.name]) == kernel.arch
    ]


def canonical(name: str) -> str:
    """A kernel's name as kernels.txt spells it, from one as a profiler spells it: with result, arguments and blanks."""
    text = name.removeprefix("void ").replace("(anonymous namespace)::", "").replace("peftops::", "")
    text = re.sub(r"\([\w ]+\)(?=-?\w)", "", text)  # a cast before a template argument: (int)16
    return text.partition("(")[0].replace(" ", "")


# ---- the README's table ----------------------------------------------------------------------------------------------


def witness(kernel: Kernel, records: Sequence[dict]) -> str | None:
    """Where the very machine code of a kernel passed: "commit on device"; the latest such run."""
    for record in sorted(records, key=lambda r: r["date"], reverse=True):
        if record["passed"] and any(
            entry["launched"] and Kernel(entry["name"], entry["arch"], entry["hash"]) == kernel
            for entry in record["kernels"]
        ):
            return f"{record['commit']} on {record['device']['model']}"
    return None


def table(kernels: Sequence[Kernel], records: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """One row per kernel family and architecture."""
    groups: dict[tuple[str, str], list[str | None]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.name.partition("<")[0], kernel.arch), []).append(witness(kernel, records))
    rows = []
    for (name, arch), found in sorted(groups.items()):
        rows.append([f"`{name}`", str(len(found)), arch, "; ".join(_said(found))])
    return ["kernel", "variants", "machine code", "on a device"], rows


def _said(found: Sequence[str | None]) -> list[str]:
    texts = []
    for who in dict.fromkeys(sorted(found, key=lambda who: (who is None, who))):
        share = "" if found.count(who) == len(found) else f"{found.count(who)} of {len(found)} "
        texts.append(share + (f"device-verified at {who}" if who else "not verified on a device"))
    return texts
