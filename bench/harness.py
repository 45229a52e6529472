"""Times contenders against a base on one machine, so that the ratio between them can be believed.

A case is one question ("what does LoRA add to this linear?") with one base and several contenders. They run
interleaved: every round runs each of them once, in an order that over the rounds puts everyone in every place and
behind every other one equally often. The base runs twice, the second time as "control": the case counts only while the
two agree within `CONTROL_LIMIT`, else it is measured again, and after `ATTEMPTS` attempts it is recorded as unsteady.
Results are checked before anything is timed.

A ratio is the median over rounds of (contender / mean of base and control of the same round), so that a slow drift of
the machine cancels; beside it stand the quartiles. Times are seconds per call.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

CONTROL_LIMIT = 0.02
ATTEMPTS = 3
BASE, CONTROL = "base", "control"
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Contender:
    """`step(i)` is one measured call on input set i; `check()` raises where its result is wrong and returns the
    relative error; `facts()` gives what else is recorded (bytes, say).
    """

    name: str
    step: Callable[[int], object]
    check: Callable[[], float] | None = None
    facts: Callable[[], dict] = dict


@dataclass(frozen=True)
class Target:
    """`contender` takes at most `at_most` times what `over` takes; for metric "saved_bytes": at most `at_most`
    bytes.
    """

    contender: str
    over: str
    at_most: float
    metric: str = "time"


@dataclass(frozen=True)
class Floor:
    """What no implementation can beat: `seconds` from measured ceilings, `over_base` the least ratio, `law` in
    words.
    """

    seconds: float
    over_base: float
    law: str


@dataclass(frozen=True)
class Case:
    """`build()` allocates and returns (contenders with the base first, number of input sets); it is called when the
    case's turn comes. A case whose `timed` is False records only facts.
    """

    name: str
    group: str
    facts: dict
    build: Callable[[], tuple[list[Contender], int]]
    targets: tuple[Target, ...] = ()
    floor: Floor | None = None
    timed: bool = True


@dataclass(frozen=True)
class Effort:
    """How long a case may run: rounds fill `seconds`, within the limits; a sample lasts at least `sample_seconds`."""

    seconds: float = 20.0
    fewest: int = 15
    most: int = 80
    sample_seconds: float = 0.01
    attempts: int = ATTEMPTS


# ---- timing ----------------------------------------------------------------------------------------------------------


def rotated_order(count: int, round_index: int) -> list[int]:
    """Order of a round. Over 2 x count rounds each index has each place, and directly follows each other index, equally
    often (Williams 1949).
    """
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(count)]
    order = [(z + round_index) % count for z in zigzag]
    return order[::-1] if round_index // count % 2 else order


def sample(
    steps: dict[str, Callable[[int], object]],
    sets: int,
    rounds: int,
    inner: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call of every step, one value per round. Successive calls use successive input sets, whoever makes
    them.
    """
    names = list(steps)
    samples: dict[str, list[float]] = {name: [] for name in names}
    call = 0
    for r in range(rounds):
        for index in rotated_order(len(names), r):
            step = steps[names[index]]
            start = clock()
            for _ in range(inner):
                step(call % sets)
                call += 1
            samples[names[index]].append((clock() - start) / inner)
    return samples


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "q1": values[0], "q3": values[0]}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def ratios(samples: dict[str, list[float]], name: str, over: str) -> list[float]:
    """Round by round: `name` over `over`; the base's own value is the mean of its two runs."""
    below = samples[over]
    if over == BASE and name != CONTROL:
        below = [(a + b) / 2 for a, b in zip(samples[BASE], samples[CONTROL], strict=True)]
    return [a / b for a, b in zip(samples[name], below, strict=True)]


def disagreement(samples: dict[str, list[float]]) -> float:
    """How far the two runs of the base are apart."""
    return abs(statistics.median(ratios(samples, CONTROL, BASE)) - 1)


def verdicts(targets: Sequence[Target], samples: dict, facts: dict, steady: bool) -> list[dict]:
    """Every target with its value and "met", "missed" or, in a case that does not count, "unsteady"."""
    result = []
    for t in targets:
        timed = t.metric == "time"
        value = statistics.median(ratios(samples, t.contender, t.over)) if timed else facts[t.contender][t.metric]
        verdict = "unsteady" if timed and not steady else "met" if value <= t.at_most else "missed"
        result.append(
            {
                "contender": t.contender,
                "over": t.over,
                "metric": t.metric,
                "at_most": t.at_most,
                "value": value,
                "verdict": verdict,
            }
        )
    return result


def run_case(
    case: Case,
    effort: Effort,
    note: Callable[[str], None] = lambda text: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict:
    """Check, warm up, time, and judge one case. Raises AssertionError where a contender computes something else."""
    note("building")
    contenders, sets = case.build()
    errors, skipped, kept = {}, {}, []
    for c in contenders:
        note(f"checking {c.name}")
        try:
            if c.check is not None:
                errors[c.name] = c.check()
        except Unavailable as reason:
            skipped[c.name] = str(reason)
            continue
        kept.append(c)
    facts = {c.name: c.facts() for c in kept}
    record = {"name": case.name, "group": case.group, **case.facts, "sets": sets, "skipped": skipped}
    samples: dict[str, list[float]] = {}
    steady = True
    if case.timed:
        steps = {BASE: contenders[0].step, CONTROL: contenders[0].step} | {c.name: c.step for c in kept}
        samples, timing = _timed(steps, sets, effort, note, clock)
        steady = timing["disagreement"] <= CONTROL_LIMIT
        record |= {**timing, "steady": steady}
    if case.floor is not None:
        record["floor"] = asdict(case.floor)
    record["contenders"] = {
        name: {
            **({"seconds": spread(samples[name]), "over_base": spread(ratios(samples, name, BASE))} if samples else {}),
            **({"relative_error": errors[name]} if name in errors else {}),
            **facts.get(name, {}),
        }
        for name in (samples or facts)
    }
    for entry in record["contenders"].values():
        if case.floor is not None:
            entry["over_floor"] = entry["seconds"]["median"] / case.floor.seconds
        if case.timed and "tokens" in case.facts:
            entry["tokens_per_second"] = case.facts["tokens"] / entry["seconds"]["median"]
    targets = [t for t in case.targets if t.contender not in skipped and t.over not in skipped]
    record["targets"] = verdicts(targets, samples, facts, steady)
    return record


class Unavailable(Exception):
    """A contender that cannot run here; its case goes on without it and the record says why."""


def _timed(
    steps: dict, sets: int, effort: Effort, note: Callable[[str], None], clock: Callable[[], float]
) -> tuple[dict, dict]:
    """(samples of the steadiest attempt, how they were taken)."""
    note("warming up")
    for step in steps.values():
        for i in range(sets):
            step(i)
    pilot = sample(steps, sets, 2, 1, clock)
    inner = max(1, round(effort.sample_seconds / min(pilot[BASE])))
    one_round = inner * sum(min(values) for values in pilot.values())
    rounds = min(effort.most, max(effort.fewest, int(effort.seconds / one_round)))
    best: tuple[float, dict] | None = None
    for attempt in range(1, effort.attempts + 1):
        note(f"timing, {rounds} rounds" + (f", attempt {attempt}" if attempt > 1 else ""))
        gc.collect()
        gc.disable()
        try:
            samples = sample(steps, sets, rounds, inner, clock)
        finally:
            gc.enable()
        apart = disagreement(samples)
        if best is None or apart < best[0]:
            best = apart, samples
        if apart <= CONTROL_LIMIT:
            break
    return best[1], {"rounds": rounds, "calls_per_sample": inner, "attempts": attempt, "disagreement": best[0]}


# ---- memory ----------------------------------------------------------------------------------------------------------


def saved_bytes(forward: Callable[[], object], exclude: Sequence[torch.Tensor]) -> int:
    """Bytes that autograd keeps for backward, each storage counted once; storages of `exclude` (weights) are not
    counted.
    """
    known = {t.untyped_storage().data_ptr() for t in exclude}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(storage.nbytes() for storage in storages.values())
    del result
    return total


def peak_bytes(step: Callable[[], object]) -> int:
    """Highest number of bytes that one call holds in PyTorch's CPU allocator at once, beyond what was held before it.

    Read from the profiler's record of every allocation and release, so it is exact and repeats to the byte; buffers
    that a vendor library takes from elsewhere are not in it.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler announces every start and stop on stderr
    step()  # caches that live on are not part of a call
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = step()
        del result
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# ---- ceilings --------------------------------------------------------------------------------------------------------


def read_bandwidth(nbytes: int, repeats: int = 20) -> float:
    """Bytes per second of the fastest plain read over a buffer of `nbytes`, the best of sum, maximum and dot product.
    A buffer larger than the last cache gives the memory's rate, a small one that of the cache it fits.
    """
    data = torch.ones(max(nbytes // 4, 1), dtype=torch.float32)
    reads = (data.sum, data.max, lambda: torch.dot(data, data))
    inner = max(1, (16 << 20) // data.nbytes)
    return data.nbytes / min(_best_time(read, repeats, inner) for read in reads)


def matmul_rate(dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]], repeats: int = 8) -> float:
    """Operations per second of torch.matmul, the best over (M, N, K) shapes; a multiply-add is two operations."""
    best = 0.0
    for m, n, k in shapes:
        a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        best = max(best, 2 * m * n * k / _best_time(lambda a=a, b=b: torch.matmul(a, b.t()), repeats, 1))
    return best


def _best_time(call: Callable[[], object], repeats: int, inner: int) -> float:
    call()
    return min(sample({"": lambda i: call()}, 1, repeats, inner)[""])


# ---- the machine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """What the figures were measured on. A GPU's cores are its multiprocessors; `more`: driver, say."""

    kind: str
    model: str
    cores: int
    caches: dict[str, int]
    more: dict = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """Name of the device in file names."""
        name = f"cpu {self.model} {self.cores} cores" if self.kind == "cpu" else f"{self.kind} {self.model}"
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    @property
    def last_cache(self) -> int:
        """Bytes of the largest cache; 32 MiB where the system does not tell."""
        return max(self.caches.values(), default=32 << 20)


def this_cpu() -> Device:
    """The CPU this process runs on. Family and model number stand beside the name, which on virtual machines says
    little.
    """
    info: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            info.setdefault(key.strip(), value.strip())
    name = info.get("model name", platform.processor() or platform.machine())
    if "cpu family" in info:
        name += f" family {info['cpu family']} model {info['model']}"
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / part).read_text().strip() for part in ("level", "type", "size"))
        if kind != "Instruction":
            caches[f"L{level}"] = int(size.rstrip("KM")) << (20 if size.endswith("M") else 10)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Device("cpu", name, cores, caches)


def this_gpu() -> Device:
    """The first GPU that torch sees."""
    properties = torch.cuda.get_device_properties(0)
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = None
    more = {
        "capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
        "driver": driver,
        "cuda": torch.version.cuda,
    }
    caches = {"L2": properties.L2_cache_size}
    return Device("cuda", properties.name, properties.multi_processor_count, caches, more)


def environment(device: Device, packages: Sequence[str]) -> dict:
    """Device, threads, versions, commit and date."""
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": {
            "kind": device.kind,
            "model": device.model,
            "cores": device.cores,
            "caches": device.caches,
            **device.more,
        },
        "slug": device.slug,
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def commit() -> str:
    """The commit that this tree was made from; "-dirty" says that code differs from it."""
    root = Path(__file__).resolve().parent.parent
    if (root / "COMMIT").exists():  # the archive of `make gpu-libs`, which has no history
        return (root / "COMMIT").read_text().strip()
    git = ["git", "-C", str(root)]
    changed = [*git, "status", "--porcelain", "--", "csrc", "python", "bench/*.py", "tests/gpu"]
    try:
        name = [*git, "describe", "--always", "--abbrev=12", "--exclude=*"]
        found = subprocess.run(name, capture_output=True, text=True, check=True).stdout.strip()
        return found + ("-dirty" if subprocess.run(changed, capture_output=True, check=True).stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---- a run -----------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """A bar on stderr; where stderr is no terminal, one line per case."""

    total: int
    done: int = 0
    start: float = field(default_factory=time.monotonic)
    case: str = ""

    def begin(self, case: str) -> None:
        self.case = case
        if sys.stderr.isatty():
            self.note("")
        else:
            print(
                f"[{self.done + 1}/{self.total}] {time.monotonic() - self.start:4.0f} s  {case}",
                file=sys.stderr,
                flush=True,
            )

    def note(self, text: str) -> None:
        if sys.stderr.isatty():
            filled = 20 * self.done // self.total
            seconds = time.monotonic() - self.start
            line = (
                f"[{'#' * filled}{'.' * (20 - filled)}] {self.done}/{self.total} {seconds:4.0f} s  {self.case}: {text}"
            )
            print(f"\r\033[K{line[:119]}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        self.done += 1
        if self.done == self.total and sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def run(
    cases: Sequence[Case],
    effort_of: Callable[[Case], Effort],
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[dict]:
    """Records of all cases, in order."""
    progress = Progress(len(cases))
    for case in cases:
        progress.begin(case.name)
        yield run_case(case, effort_of(case), progress.note, clock)
        progress.end()
        gc.collect()


def write(path: Path, results: dict) -> None:
    """Write results as JSON, floats with five significant digits."""

    def short(value):
        if isinstance(value, float):
            return float(f"{value:.5g}")
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items()}
        return [short(v) for v in value] if isinstance(value, (list, tuple)) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(short(results), indent=1) + "\n")
