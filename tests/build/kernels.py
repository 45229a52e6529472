"""What the compiler made of each CUDA kernel, read from a built library with cuobjdump; no GPU is needed.

    python tests/build/kernels.py [--record] [LIBRARY]

prints one line per kernel and target, and what differs from the record in kernels.txt; --record writes the record anew.

A kernel's hash is that of its machine instructions, all 128 bits of each: operation, registers, constants, and the
stall counts and barriers that schedule it. Branches are relative, so neither the kernel's place nor its name nor its
neighbours count, and the same source and compiler give the same hash. While it stands, what was verified on a GPU
stays verified.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "python" / "peftops" / "lib" / "libpeftops_cuda.so"
RECORD = Path(__file__).with_suffix(".txt")
COMMAND = "make kernels RECORD=1"

# Opcodes by what the gates ask of them. REDUX, which is not here, sums over a warp.
TENSOR = re.compile(r"(HMMA|HGMMA|IMMA|IGMMA|QGMMA|BMMA|BGMMA)\b")
LOCAL = re.compile(r"(LDL|STL)\b")
ATOMIC = re.compile(r"(ATOM|ATOMG|ATOMS|RED|REDG|UREDGR|UBLKRED|UTMAREDG)\b")
DOUBLE = re.compile(r"(DADD|DMUL|DFMA|DSETP|DMNMX|DMMA)\b|\w+\..*(F64|64H)")
# CALL alone may be a jump within the kernel; only subroutines, as those for division, return.
SUBROUTINE = re.compile(r"(RET|CALL\.ABS)\b")
PADDING = re.compile(r"NOP\b")
GLOBAL = re.compile(r"(LDG|STG|LDGSTS)\b")
WIDE = re.compile(r"(LDG|STG|LDGSTS)\b.*\.128\b")


INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?(?P<opcode>[\w.]+).*/\* 0x(?P<bits>[0-9a-f]{16}) \*/$")
MORE_BITS = re.compile(r"\s+/\* 0x(?P<bits>[0-9a-f]{16}) \*/$")

TARGETS = {"sm_80", "sm_90a", "compute_80"}

# Kernels that may call subroutines, each with the reason.
SUBROUTINES = {
    "lora::sm80::dropout_mask<bool>": "one 64-bit division finds the row of eight elements; no training step runs it",
}


@dataclass(frozen=True)
class Rule:
    """What kernels of one kind owe: whether they use tensor cores, and whether they must move 128 bits at a time.

    `targets`: what they are for, where that is not everything. `loop`: the opcode of the main loop's products.
    """

    kernels: str
    tensor_cores: bool
    wide: bool
    targets: frozenset[str] | None = None
    loop: str = ""


RULES = (
    # 16-bit factors multiply on tensor cores, and so do float32 factors beside a bfloat16 x, as sums of bfloat16
    # numbers; elsewhere they multiply in float32, and never as TF32.
    Rule(r"lora::sm80::(shrink|expand|gradient)<(bfloat16|float16),\2,.*>", tensor_cores=True, wide=True),
    Rule(r"lora::sm80::(shrink|expand|gradient)<bfloat16,float,.*>", tensor_cores=True, wide=True),
    Rule(r"lora::sm80::(shrink|expand|gradient)<(float16|float),float,.*>", tensor_cores=False, wide=True),
    Rule(r"lora::sm80::gemm<\w+,(true|false)>", tensor_cores=True, wide=True),
    Rule(r"lora::sm80::operand<\w+,\w+>", tensor_cores=False, wide=True),
    Rule(r"lora::sm80::grouped_(shrink|expand|gradient)<(bfloat16|float16),\2,.*>", tensor_cores=True, wide=True),
    Rule(r"lora::sm80::grouped_(shrink|expand|gradient)<\w+,float,.*>", tensor_cores=False, wide=True),
    # For 16-bit types alone.
    Rule(r"lora::sm80::(grouped_(shrink|expand)_few|multi_(shrink|expand))<.*>", tensor_cores=True, wide=True),
    # Integers: no product is made.
    Rule(r"lora::sm80::(group_tokens|group_few_tokens|list_tiles)<int>", tensor_cores=False, wide=False),
    Rule(r"lora::sm80::grouped_finish<\w+>", tensor_cores=False, wide=False),
    # One number or eight flags a thread, or a factor at any address: a small part of the traffic.
    Rule(r"lora::sm80::(finish<\w+>|dropout_mask<bool>|factor_operand<float>)", tensor_cores=False, wide=False),
    # TMA moves their matrices. The products of 128x256 are two warpgroups' 64x256, those of 128x128 two of 64x128.
    Rule(
        r"lora::sm90::gemm<(bfloat16|float16),(true|false),0>",
        tensor_cores=True,
        wide=False,
        targets=frozenset({"sm_90a"}),
        loop="HGMMA.64x256x16.F32",
    ),
    Rule(
        r"lora::sm90::gemm<(bfloat16|float16),(true|false),1>",
        tensor_cores=True,
        wide=False,
        targets=frozenset({"sm_90a"}),
        loop="HGMMA.64x128x16.F32",
    ),
)


@dataclass
class Kernel:
    """One kernel's machine code for one target.

    `code` counts opcodes, `threads` is the largest block (0: not stated), `ptx` the target of its PTX.
    """

    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    threads: int = 0
    code: Counter[str] = field(default_factory=Counter)
    hash: str = ""
    ptx: str = ""

    def count(self, opcodes: re.Pattern[str]) -> int:
        return sum(count for opcode, count in self.code.items() if opcodes.match(opcode))

    @property
    def blocks(self) -> int:
        """Blocks per multiprocessor of sm_80 or sm_90, by registers and threads; dynamic shared memory may cut it."""
        warps = -(-(self.threads or 1024) // 32)
        per_warp = -(-self.registers * 32 // 256) * 256
        return min(16384 // per_warp * 4 // warps, 64 // warps, 32)

    @property
    def recorded(self) -> dict[str, str]:
        numbers = (self.registers, self.stack, self.shared, self.count(TENSOR), self.count(WIDE))
        return dict(zip(COLUMNS, (*map(str, numbers), self.hash), strict=True))


# What the record holds of a kernel, and the direction that is worse.
COLUMNS = {"registers": 1, "stack": 1, "shared": 1, "mma": -1, "wide": -1, "hash": 0}


def tool(name: str) -> str:
    """The program of the package nvidia-cuda-<name>, or the one on PATH."""
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = next((str(file.locate()) for file in files if file.name == name), None) or shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is missing: pip install -c constraints.txt nvidia-cuda-{name}")
    return found


def cuobjdump(*arguments: str | Path, cwd: Path | None = None) -> Iterator[str]:
    """The lines that cuobjdump prints."""
    # It looks for nvdisasm on PATH.
    environment = os.environ | {"PATH": os.pathsep.join([str(Path(tool("nvdisasm")).parent), os.environ["PATH"]])}
    command = [tool("cuobjdump"), *map(str, arguments)]
    with subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True) as process:
        yield from process.stdout
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")


def short_name(signature: str) -> str:
    """`lora::sm80::shrink<bfloat16,16>` of a readable signature: no arguments, no blanks, no `peftops::`."""
    name = signature.replace("(anonymous namespace)::", "").partition("(")[0].removeprefix("void ")
    return name.replace("peftops::", "").replace(" ", "")


def short_names(mangled: set[str]) -> dict[str, str]:
    names = sorted(mangled)
    filtered = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, map(short_name, filtered.stdout.splitlines()), strict=True))


def compiler(library: Path) -> str:
    """The version of nvcc that made the library's machine code."""
    with TemporaryDirectory() as folder:
        Counter(cuobjdump("-xelf", "all", library.resolve(), cwd=Path(folder)))
        found = {
            version.decode()
            for path in Path(folder).iterdir()
            for version in re.findall(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", path.read_bytes())
        }
    return ", ".join(sorted(found))


def ptx_targets(library: Path) -> dict[str, str]:
    """The target of each kernel's PTX, by mangled name."""
    found, target = {}, ""
    for line in cuobjdump("-ptx", library):
        if match := re.match(r"\.target sm_(\w+)", line):
            target = f"compute_{match[1]}"
        elif match := re.match(r"(?:\.\w+ )*\.entry (\w+)", line):
            found[match[1]] = target
    return found


def largest_blocks(library: Path) -> dict[tuple[str, str], int]:
    """Threads that a block may have by __launch_bounds__ for each (mangled name, arch), from the machine code."""
    found, name, arch, announced = {}, "", "", False
    for line in cuobjdump("-elf", library):
        if announced and (match := re.match(r"\s+Value:\s+0x(\w+) 0x(\w+) 0x(\w+)", line)):
            found[name, arch] = int(match[1], 16) * int(match[2], 16) * int(match[3], 16)
            announced = False
        elif "EIATTR_MAX_THREADS" in line:
            announced = True
        elif match := re.match(r"\.nv\.info\.(\w+)$", line):
            name = match[1]
        elif match := re.match(r"arch = (\w+)", line):
            arch = match[1]
    return found


def resources(library: Path) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Registers, stack and static shared memory of each (mangled name, arch)."""
    found, name, arch = {}, "", ""
    for line in cuobjdump("-res-usage", library):
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s+Function (\w+):", line):
            name = match[1]
        elif match := re.match(r"\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            found[name, arch] = (int(match[1]), int(match[2]), int(match[3]))
    return found


def kernels(library: Path) -> list[Kernel]:
    """Every kernel of the library for every target it has machine code for, by name."""
    parts: list[tuple[Kernel, hashlib._Hash]] = []
    arch = ""
    for line in cuobjdump("-sass", library):
        if match := INSTRUCTION.match(line):
            parts[-1][0].code[match["opcode"]] += 1
            parts[-1][1].update(match["bits"].encode())
        elif match := MORE_BITS.match(line):
            parts[-1][1].update(match["bits"].encode())
        elif match := re.match(r"\s+Function : (\w+)", line):
            parts.append((Kernel(match[1], arch), hashlib.sha256()))
        elif match := re.match(r"\s+code for (\w+)", line):
            arch = match[1]

    usage, ptx, blocks = resources(library), ptx_targets(library), largest_blocks(library)
    short = short_names({kernel.name for kernel, _ in parts})
    found: dict[tuple[str, str], Kernel] = {}
    for kernel, digest in parts:
        kernel.registers, kernel.stack, kernel.shared = usage[kernel.name, kernel.arch]
        kernel.threads = blocks.get((kernel.name, kernel.arch), 0)
        kernel.ptx = ptx.get(kernel.name, "")
        kernel.name, kernel.hash = short[kernel.name], digest.hexdigest()[:16]
        twin = found.setdefault((kernel.name, kernel.arch), kernel)
        if twin.hash != kernel.hash:
            raise SystemExit(f"{library.name} has two kernels {kernel.name} for {kernel.arch}: give them other names")
    return sorted(found.values(), key=lambda kernel: (kernel.name, kernel.arch))


def faults(found: list[Kernel], rules: tuple[Rule, ...], wanted: set[str]) -> list[str]:
    """What breaks a law of the house, whatever the record says. `wanted`: the targets of every kernel."""
    problems = []
    for name, versions in by_name(found).items():
        rule = [rule for rule in rules if re.fullmatch(rule.kernels, name)]
        if len(rule) != 1:
            problems.append(f"{name} matches {len(rule)} of the rules in kernels.py, but must match one")
        targets = rule[0].targets if len(rule) == 1 and rule[0].targets else wanted
        if (has := {kernel.arch for kernel in versions} | {kernel.ptx for kernel in versions if kernel.ptx}) != targets:
            problems.append(
                f"{name} is there for {', '.join(sorted(has))}, but must be for {', '.join(sorted(targets))}"
            )
        for kernel in versions:
            problems += [
                f"{name} for {kernel.arch} {problem}" for problem in faults_of(kernel, rule[0] if rule else None)
            ]
    for rule in rules:
        if not any(re.fullmatch(rule.kernels, kernel.name) for kernel in found):
            problems.append(f"the rule for {rule.kernels} matches no kernel")
    return problems


def faults_of(kernel: Kernel, rule: Rule | None) -> Iterator[str]:
    """The faults that one kernel's code for one target shows."""
    if not kernel.threads:
        yield "states no __launch_bounds__"
    if local := kernel.count(LOCAL):
        yield f"has {local} accesses to local memory: registers are spilled, or an array is indexed at run time"
    if double := kernel.count(DOUBLE):
        yield f"has {double} instructions in double precision"
    if "atomic" not in kernel.name and (atomic := kernel.count(ATOMIC)):
        yield f"has {atomic} atomic instructions, but no `atomic` in its name"
    if kernel.count(SUBROUTINE) and kernel.name not in SUBROUTINES:
        yield "calls subroutines, as division of 64-bit integers does, and is not in SUBROUTINES"
    if rule is not None:
        if rule.tensor_cores != (kernel.count(TENSOR) > 0):
            yield "uses tensor cores, but must not" if kernel.count(TENSOR) else "uses no tensor cores"
        if rule.loop and not any(opcode.startswith(rule.loop) for opcode in kernel.code):
            yield f"has no {rule.loop} in its loop"
        if rule.wide and not kernel.count(WIDE):
            yield "has no 128-bit access to global memory"


def by_name(found: list[Kernel]) -> dict[str, list[Kernel]]:
    groups: dict[str, list[Kernel]] = {}
    for kernel in found:
        groups.setdefault(kernel.name, []).append(kernel)
    return groups


def read_record(path: Path) -> tuple[str, dict[tuple[str, str], dict[str, str]]]:
    """The version of nvcc that the record holds for, and its line for each (name, arch)."""
    head, *lines = path.read_text().splitlines()
    fields = (line.split() for line in lines if not line.startswith("#"))
    return head.split()[-1], {(name, arch): dict(zip(COLUMNS, rest, strict=True)) for name, arch, *rest in fields}


def write_record(path: Path, version: str, found: list[Kernel]) -> None:
    rows = [("# kernel", "arch", *COLUMNS)]
    rows += [(kernel.name, kernel.arch, *kernel.recorded.values()) for kernel in found]
    head = f"# Made by `{COMMAND}` with nvcc {version}"
    path.write_text("\n".join([head, *table(rows)]) + "\n")


def changes(found: list[Kernel], record: dict[tuple[str, str], dict[str, str]]) -> list[str]:
    """How the kernels differ from the record: worse, better, other code, new or gone."""
    now = {(kernel.name, kernel.arch): kernel.recorded for kernel in found}
    listed = []
    for key in sorted(now.keys() | record.keys()):
        name, arch = key
        if key not in record:
            listed.append(f"{name} for {arch} is not in the record")
        elif key not in now:
            listed.append(f"{name} for {arch} is in the record, but not in the library")
        elif differences := [difference(column, record[key][column], now[key][column]) for column in COLUMNS]:
            listed += [f"{name} for {arch}: {text}" for text in differences if text]
    return listed


def difference(column: str, before: str, after: str) -> str | None:
    if before == after:
        return None
    if column == "hash":
        return "other machine code: what was verified on a GPU is not verified any more"
    worse = (int(after) - int(before)) * COLUMNS[column] > 0
    return f"{column} {before} -> {after}, {'worse' if worse else 'better'}"


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows in columns: text to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if rows[-1][i].isdecimal() else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def report(found: list[Kernel], record: dict[tuple[str, str], dict[str, str]]) -> list[str]:
    heads = "kernel arch registers stack shared threads blocks/SM mma wide/global instructions hash record"
    rows = [tuple(heads.split())]
    for kernel in found:
        recorded = record.get((kernel.name, kernel.arch))
        state = "new" if recorded is None else "same" if recorded == kernel.recorded else "changed"
        wide = f"{kernel.count(WIDE)}/{kernel.count(GLOBAL)}"
        numbers = (kernel.registers, kernel.stack, kernel.shared, kernel.threads, kernel.blocks, kernel.count(TENSOR))
        size = str(kernel.code.total() - kernel.count(PADDING))
        rows.append((kernel.name, kernel.arch, *map(str, numbers), wide, size, kernel.hash, state))
    return table(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("library", type=Path, nargs="?", default=LIBRARY)
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name} anew")
    options = parser.parse_args(arguments)
    if not options.library.exists():
        print(f"{options.library} is missing: the CUDA library is built where nvcc is found")
        return 1
    found, version = kernels(options.library), compiler(options.library)
    recorded_version, record = read_record(RECORD) if RECORD.exists() else (version, {})
    differing = changes(found, record)
    print(*report(found, record), sep="\n")
    for title, lines in (("faults", faults(found, RULES, TARGETS)), (f"against {RECORD.name}", differing)):
        print(f"\n{title}: {len(lines) or 'none'}", *lines, sep="\n  ")
    if version != recorded_version:
        print(f"\nThe record is of nvcc {recorded_version}, the library of nvcc {version}: they cannot be compared")
    if options.record:
        write_record(RECORD, version, found)
        return 0
    return int(bool(faults(found, RULES, TARGETS) or differing))


if __name__ == "__main__":
    sys.exit(main())
