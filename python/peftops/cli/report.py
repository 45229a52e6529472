"""The table and the plot of one run or of several beside each other."""

from __future__ import annotations

from pathlib import Path

from .output import replace_file

COLOURS = ("#2563a8", "#d9772b", "#3f8f5b")
STYLES = ("-", "-", "--")  # two runs of one method lie on top of each other: the dashes show both
GREY = "#6b7280"


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _cells(numbers: dict, metric: str) -> dict[str, str]:
    cells = {
        "method": numbers["method"],
        "trainable parameters": f"{numbers['trainable_parameters']:,}",
        "share of the model": f"{numbers['trainable_share']:.2%}",
        "peak memory": size(numbers["peak_memory_bytes"]),
        "saved for backward": size(numbers["saved_for_backward_bytes"]),
        "time per step": f"{numbers['seconds_per_step']:.3f} s",
        "steps": f"{numbers['steps']:,}",
        "evaluation texts": f"{numbers['evaluation_texts']:,}",
    }
    cells[metric] = f"{numbers[metric]:.2%}" if metric == "accuracy" else f"{numbers[metric]:.3f}"
    return cells


def table(runs: list[dict], metric: str) -> str:
    """A plain-text table of measured runs, one column each; lines end with a newline."""
    columns = [_cells(run, metric) for run in runs]
    widths = [max(map(len, column.values())) for column in columns]
    label_width = max(map(len, columns[0]))
    lines = []
    for name in columns[0]:
        values = "  ".join(column[name].rjust(width) for column, width in zip(columns, widths, strict=True))
        lines.append(f"{name.ljust(label_width)}  {values}")
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines) + "\n"


def _smooth(values: list[float], keep: float) -> list[float]:
    """Exponential moving average with the start corrected, as Adam corrects its moments."""
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smoothed.append(average / weight)
    return smoothed


def plot(path: Path, runs: dict[str, list[dict]], metric: str) -> None:
    """Write a PNG: training and evaluation loss on the left, `metric` after each epoch on the right.

    `runs` maps a name to Trainer's log history.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    alone = len(runs) == 1
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    losses, scores = figure.subplots(1, 2)
    for (name, history), colour, style in zip(runs.items(), COLOURS, STYLES, strict=False):
        steps = [entry for entry in history if "loss" in entry]
        evaluations = [entry for entry in history if "eval_loss" in entry]
        epochs = [entry["epoch"] for entry in steps]
        values = [entry["loss"] for entry in steps]
        line = {"color": colour, "linestyle": style, "linewidth": 1.8}
        if alone:
            losses.plot(epochs, values, color=colour, alpha=0.25, linewidth=0.8)
        keep = 0.9 if len(values) > 50 else 0.5
        losses.plot(epochs, _smooth(values, keep), label="training" if alone else name, **line)
        losses.plot(
            [entry["epoch"] for entry in evaluations],
            [entry["eval_loss"] for entry in evaluations],
            color=GREY if alone else colour,
            linestyle=":" if alone else "none",
            marker="o",
            markersize=5,
            label="evaluation" if alone else None,
        )
        marks = [entry[f"eval_{metric}"] for entry in evaluations]
        last = f"{marks[-1]:.1%}" if metric == "accuracy" else f"{marks[-1]:.2f}"
        scores.plot([entry["epoch"] for entry in evaluations], marks, marker="o", label=f"{name}: {last}", **line)
    losses.set(xlabel="epoch", ylabel="loss", title="Loss" if alone else "Loss (lines: training, dots: evaluation)")
    scores.set(xlabel="epoch", title=f"Evaluation {metric}")
    if metric == "accuracy":
        losses.set_ylim(bottom=0)
        scores.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        scores.set_ylim(0, 1)
    for axes, place in ((losses, "best"), (scores, "lower right" if metric == "accuracy" else "upper right")):
        axes.legend(frameon=False, loc=place)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png"))
