"""Tables from bench/results/: on the screen, in bench/RESULTS.md, and between the markers in the READMEs.

    python bench/report.py           rewrites RESULTS.md and the READMEs' tables
    python bench/report.py --check   fails, naming the files, where they do not show what bench/results/ holds

A family's table stands between the lines `<!-- bench:FAMILY:begin -->` and `<!-- bench:FAMILY:end -->`. So do, with
`demo` for the family, the table of a `make demo` whose table.txt and metrics.json were copied to bench/results/demo/,
and, with `kernels`, which CUDA kernels a GPU has shown to be right (verified.py).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import verified

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"lora": ("README.md", "csrc/lora/README.md"), "hf_peft": ("README.md",)}
TITLES = {
    "train": "Training: forward and backward of one frozen linear, x asks for a gradient",
    "shared": "Training of query, key and value, which share x: forward and backward of three frozen linears",
    "decode": "Decode: forward of one linear without gradients",
    "mixed": "Inference on a batch whose rows use different adapters, over the linear without any",
    "forward": "Forward of one linear without gradients",
    "eager": "Training, launched from Python call by call",
    "saved": "Kept for backward by one linear (x included)",
    "block": "One Llama decoder layer with LoRA on its seven linears, forward and backward",
    "step": "One training step of a Llama of four layers, LoRA on all linears: forward, loss, backward, AdamW",
    "token": "One token of the same model, with a cache of the tokens before it",
}
# Groups whose cells say how many tokens a second that is, and of which all bytes are shown.
_WHOLE = ("block", "step", "token")
BASE, CONTROL = "base", "control"
_COMMAND = "`make bench`"
_NO_GPU = {"lora": "On a GPU: not measured (`make gpu-bench`).", "hf_peft": "On a GPU: not measured."}
_FP32 = '"fp32 factors" are float32 factors over a bfloat16 base, PEFT\'s default.'
_RATIO = {
    "lora": f"A ratio is over the frozen base; {_FP32}",
    "hf_peft": "A ratio is over Hugging Face PEFT's model as it is; float32 factors over a bfloat16 base, its default.",
}

Table = tuple[list[str], list[list[str]]]


# ---- numbers as text -------------------------------------------------------------------------------------------------


def time_text(seconds: float) -> str:
    """Three significant digits in a fitting unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 0.9995:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{_three_digits(seconds * 1e9)} ns"


def bytes_text(count: int) -> str:
    return f"{_three_digits(count / (1 << 20))} MiB" if count >= 1 << 20 else f"{_three_digits(count / 1024)} KiB"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _cell(case: dict, name: str, full: bool) -> str:
    entry = case["contenders"].get(name)
    if entry is None:
        return "not measured" if name in case["skipped"] else ""
    parts = []
    if "seconds" in entry:
        time, ratio = entry["seconds"], entry["over_base"]
        if name == BASE:
            parts.append(
                time_text(time["median"]) + (f" ({time_text(time['q1'])} - {time_text(time['q3'])})" if full else "")
            )
        else:
            parts.append(f"{ratio['median']:.3f}x" + (f" ({ratio['q1']:.3f} - {ratio['q3']:.3f})" if full else ""))
    if case["group"] in _WHOLE:
        parts.append(f"{entry['tokens_per_second']:.0f} tokens/s")
    if "peak_bytes" in entry:
        parts.append(f"peak {bytes_text(entry['peak_bytes'])}")
    if "saved_bytes" in entry and ("seconds" not in entry or full or case["group"] == "step"):
        parts.append(f"{'saved ' if parts else ''}{bytes_text(entry['saved_bytes'])}")
    return ", ".join(parts)


def _limit(target: dict) -> tuple[str, str]:
    if target["metric"] == "time":
        return f"{target['at_most']:g}x", f"{target['value']:.3f}x"
    return bytes_text(int(target["at_most"])), bytes_text(int(target["value"]))


# ---- tables ----------------------------------------------------------------------------------------------------------


def group_table(cases: Sequence[dict], full: bool) -> Table:
    """One row per case: the base's time, everyone's ratio over it, the floor, and whether every target was met."""
    names = list(dict.fromkeys(n for c in cases for n in (*c["contenders"], *c["skipped"]) if n not in (BASE, CONTROL)))
    timed = any(BASE in c["contenders"] for c in cases)
    floors = any("floor" in c for c in cases)
    head = ["case", *([_base(cases[0])] if timed else []), *names, *(["floor"] if floors else []), "targets"]
    rows = []
    for case in cases:
        row = [case["name"].partition(" ")[2] + ("" if case.get("steady", True) else " (unsteady)")]
        row += [_cell(case, name, full) for name in ([BASE] if timed else []) + names]
        if floors:
            row.append(_floor_text(case, names[0], full) if "floor" in case else "")
        rows.append([*row, target_summary(case)])
    return head, rows


def _base(case: dict) -> str:
    """What stands for the base in this case."""
    return case.get("base", BASE)


def _over(case: dict, target: dict) -> str:
    return _base(case) if target["over"] == BASE else target["over"]


def _floor_text(case: dict, ours: str, full: bool) -> str:
    text = f"{case['floor']['over_base']:.3f}x"
    if full:
        text += (
            f", {time_text(case['floor']['seconds'])}: {ours} takes {case['contenders'][ours]['over_floor']:.2f} of it"
        )
    return text


def target_summary(case: dict) -> str:
    """ "met", or what was not."""
    if not case["targets"]:
        return ""
    failed = [t for t in case["targets"] if t["verdict"] != "met"]
    return (
        "; ".join(
            "{} over {}: {} ({} wanted, {})".format(t["contender"], _over(case, t), *_limit(t)[::-1], t["verdict"])
            for t in failed
        )
        or "met"
    )


def target_table(cases: Sequence[dict]) -> Table:
    rows = [
        [case["name"], t["contender"], _over(case, t), *_limit(t), t["verdict"]]
        for case in cases
        for t in case["targets"]
    ]
    return ["case", "contender", "over", "at most", "measured", "verdict"], rows


def as_markdown(table: Table) -> list[str]:
    head, rows = table
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]


def as_text(table: Table) -> list[str]:
    head, rows = table
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _groups(cases: Sequence[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for case in cases:
        groups.setdefault(case["group"], []).append(case)
    return groups


def tally(cases: Sequence[dict]) -> str:
    verdicts = [t["verdict"] for case in cases for t in case["targets"]]
    return ", ".join(f"{verdicts.count(v)} {v}" for v in ("met", "missed", "unsteady"))


def machine(results: dict) -> list[str]:
    """Where, with what and when."""
    device, ceilings = results["device"], results["ceilings"]
    caches = ", ".join(f"{name} {bytes_text(size)}" for name, size in device["caches"].items())
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    rates = ", ".join(f"{n} {_rate(r)}" for n, r in ceilings["matmul_operations_per_second"].items())
    if device["kind"] == "cuda":
        where = f"{device['model']}, {device['cores']} multiprocessors, {caches}; driver {device['driver']}, "
        where += f"CUDA {device['cuda']}. All but the eager cases replay CUDA graphs."
        moved = f"copy (bytes read and written) {ceilings['copy_bytes_per_second'] / 1e9:.0f} GB/s"
    else:
        where = f"{device['model']}, {device['cores']} cores, {caches}; {results['threads']} threads, "
        where += f"{results['cpu_level']} kernels."
        moved = f"read {ceilings['read_bytes_per_second'] / 1e9:.1f} GB/s"
    return [
        where,
        f"{versions}; commit {results['commit']}, {results['date']}, "
        f"load average before the run {results['load_before']:.2f}.",
        f"Ceilings measured here: {moved}, matmul {rates}.",
    ]


def _rate(operations: float) -> str:
    return f"{operations / 1e12:.0f} Top/s" if operations >= 1e13 else f"{operations / 1e9:.0f} Gop/s"


# ---- pages -----------------------------------------------------------------------------------------------------------


def screen(results: dict) -> str:
    lines = machine(results)
    for group, cases in _groups(results["cases"]).items():
        lines += ["", TITLES[group], *as_text(group_table(cases, full=True))]
    lines += ["", *_reasons(results)]
    if any(case["targets"] for case in results["cases"]):
        lines += [*as_text(target_table(results["cases"])), "", f"Targets: {tally(results['cases'])}."]
    return "\n".join(lines)


def _reasons(results: dict) -> list[str]:
    skipped = [(f"{c['name']}: {name}", why) for c in results["cases"] for name, why in c["skipped"].items()]
    return [f"{what} not measured: {why}" for what, why in [*skipped, *results.get("not_measured", {}).items()]]


def load(folder: Path) -> list[dict]:
    """All figures, ordered by file name. Raises ValueError for a smoke run's: they mean nothing."""
    results = []
    for path in sorted(set(folder.glob("*.json")) - set(folder.glob("gpu-*.json"))):
        results.append(json.loads(path.read_text()))
        if results[-1]["quick"]:
            raise ValueError(f"{path.name} comes from a run with --quick, which measures nothing")
    return results


def family_table(results: Sequence[dict], family: str, page: Path, root: Path) -> str:
    """What stands in a README: the cases that have a target, per device."""
    full = os.path.relpath(root / "bench" / "RESULTS.md", page.parent)
    lines = []
    for r in (r for r in results if r["family"] == family):
        lines += [
            *machine(r)[:1],
            f"Rank {r['rank']}. {_RATIO[family]} Targets: {tally(r['cases'])}.",
            f"All figures: [RESULTS.md]({full}).",
            "",
        ]
        for group, cases in _groups([c for c in r["cases"] if c["targets"]]).items():
            lines += [f"**{TITLES[group]}**", "", *as_markdown(group_table(cases, full=False)), ""]
    if lines and not _any_gpu(results, family):
        lines.append(_NO_GPU[family])
    return "\n".join(lines).strip() or f"Not measured yet ({_COMMAND})."


def _any_gpu(results: Sequence[dict], family: str) -> bool:
    return any(r["family"] == family and r["device"]["kind"] == "cuda" for r in results)


def kernel_table(root: Path) -> str:
    """What stands in the README about every CUDA kernel of the library."""
    records = [json.loads(path.read_text()) for path in sorted((root / "bench" / "results").glob("gpu-check-*.json"))]
    kernels = verified.read(root / verified.KERNELS.relative_to(ROOT))
    return "\n".join(as_markdown(verified.table(kernels, records)))


def results_page(results: Sequence[dict]) -> str:
    lines = [
        "# Measured figures",
        "",
        f"Made by {_COMMAND} from the data in `results/`; do not edit. How it is measured: `harness.py`.",
        "",
    ]
    lines += [
        "A ratio is the median over rounds (quartiles in brackets) of a contender's time over the base's in the same",
        f"round; {_FP32} The base is timed twice as a control:",
        "a case whose two base times differ by more than 2% is marked unsteady and does not count. Peak bytes are what",
        "PyTorch's CPU allocator holds at most during one forward and backward beyond weights and inputs, from the",
        "profiler's record of every allocation.",
        "",
    ]
    for r in results:
        lines += [f"## {r['family']}: {r['slug']}", "", *(f"- {line}" for line in machine(r)), ""]
        for group, cases in _groups(r["cases"]).items():
            lines += [f"### {TITLES[group]}", "", *as_markdown(group_table(cases, full=True)), ""]
        lines += [*(f"- {reason}" for reason in _reasons(r)), ""]
        lines += [f"### Targets: {tally(r['cases'])}", "", *as_markdown(target_table(r["cases"])), ""]
    for family in (f for f in PAGES if results and not _any_gpu(results, f)):
        lines += [f"## {family}: GPU", "", _NO_GPU[family], ""]
    return "\n".join(lines if results else [*lines, "Not measured yet.", ""])


def inject(text: str, family: str, table: str, page: str) -> str:
    """`text` with `table` between the family's markers. Raises ValueError where the markers are not there once, in
    order.
    """
    begin, end = (f"<!-- bench:{family}:{edge} -->" for edge in ("begin", "end"))
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{page} must hold the line {begin} and after it {end}, once each")
    return text[: text.index(begin) + len(begin)] + "\n" + table + "\n" + text[text.index(end) :]


def pages(root: Path) -> dict[Path, str]:
    """Every page with the text that the results call for."""
    results = load(root / "bench" / "results")
    wanted = {root / "bench" / "RESULTS.md": results_page(results)}
    for family, names in PAGES.items():
        for path in (root / name for name in names):
            if not path.exists():
                raise ValueError(f"{path.relative_to(root)} does not exist")
            text = wanted.get(path) or path.read_text()
            wanted[path] = inject(text, family, family_table(results, family, path, root), str(path.relative_to(root)))
    readme = root / "README.md"
    wanted[readme] = inject(wanted[readme], "kernels", kernel_table(root), readme.name)
    demo = root / "bench" / "results" / "demo" / "table.txt"
    if demo.exists():
        wanted[readme] = inject(wanted[readme], "demo", f"```text\n{demo.read_text()}```", readme.name)
    return wanted


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description="Tables from bench/results/.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a page is stale")
    args = parser.parse_args(argv)
    try:
        wanted = pages(root)
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        name = path.relative_to(root)
        if args.check:
            print(
                f"report: {name} does not show what bench/results holds; run `python bench/report.py`", file=sys.stderr
            )
        else:
            path.write_text(text := wanted[path])
            print(f"{name}: {len(text.splitlines())} lines")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
