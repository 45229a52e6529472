"""Runs nvcc, keeps what it said beside the object; fails on spills, unlisted stack frames and warnings.

    python ptxas_gate.py [--report-only] nvcc ARGUMENTS

Every line of the output must be one that is known to be harmless. So a warning that only a later compiler gives fails
too, and so does C7510 ("wgmma.mma_async instructions are serialized"), which ptxas calls information.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

# Bytes of stack that a kernel may have, by its demangled name without arguments; each with its reason.
STACK_FRAMES: dict[str, int] = {}

HARMLESS = re.compile(
    r"ptxas info\s+: (Compiling entry function '.+' for '(?P<arch>\w+)'"
    r"|Function properties for (?P<function>.+)"
    r"|Used \d+ registers(, .*)?"
    r"|(\d+ bytes (gmem|cmem\[\d+\])(, )?)+"
    r"|Compile time = .*)"
    r"|\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)


def demangled(text: str) -> str:
    """The text with the C++ names in it readable, where binutils is installed."""
    if shutil.which("c++filt") is None:
        return text
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def kernel_of(signature: str) -> str:
    """`a::b<c>` from `void a::b<c>(d)`."""
    return re.sub(r"\((?!anonymous namespace\)).*$", "", signature).removeprefix("void ")


def findings(output: str) -> list[str]:
    """What is wrong, one line each, from the output of `nvcc -Xptxas -v`."""
    found, function, arch = [], "", ""
    for line in demangled(output).splitlines():
        match = HARMLESS.fullmatch(line)
        if match is None:
            found += [line.rstrip()] if line.strip() else []
            continue
        arch = match["arch"] or arch
        function = match["function"] or function
        if match["stack"] is None:
            continue
        stack, spilled = int(match["stack"]), int(match["stores"]) + int(match["loads"])
        name = kernel_of(function)
        allowed = STACK_FRAMES.get(name, 0)
        if spilled or stack > allowed:
            found.append(
                f"{name} for {arch}: {spilled} bytes spilled, stack frame of {stack}; allowed are 0 and {allowed}"
            )
    return found


def main(arguments: list[str]) -> int:
    report_only = arguments[0] == "--report-only"
    command = arguments[report_only:]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    target = Path(command[command.index("-o") + 1])
    if done.returncode:
        print(done.stdout, file=sys.stderr, end="")
        return done.returncode
    target.with_suffix(".ptxas.txt").write_text(done.stdout)
    found = findings(done.stdout)
    if not found:
        return 0
    print(*found, sep="\n", file=sys.stderr)
    if report_only:
        return 0
    target.unlink(missing_ok=True)
    print(f"{target.name}: not built for the above; -DPEFTOPS_PTXAS_GATE=OFF builds it all the same", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
