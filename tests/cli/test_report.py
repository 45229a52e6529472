"""The table and the plot."""

import struct

import pytest
from peftops.cli import report

NUMBERS = {
    "method": "LoRA, rank 8, alpha 8",
    "trainable_parameters": 345236,
    "trainable_share": 0.0152,
    "peak_memory_bytes": 812 * 2**20,
    "saved_for_backward_bytes": 3 * 2**30,
    "seconds_per_step": 0.7334,
    "steps": 228,
    "evaluation_texts": 462,
    "accuracy": 0.7616,
}


def history(metric, epochs=4, steps=20):
    entries = [{"epoch": 0, "eval_loss": 3.0, f"eval_{metric}": 0.05}]
    for step in range(1, epochs * steps + 1):
        entries.append({"epoch": step / steps, "loss": 3.0 / step, "seconds": 1.0})
        if step % steps == 0:
            entries.append({"epoch": step // steps, "eval_loss": 1.0, f"eval_{metric}": 0.7})
    return entries


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24]), len(content)


def test_the_table_shows_every_number_with_its_unit():
    lines = report.table([NUMBERS, {**NUMBERS, "method": "full", "accuracy": 0.5}], "accuracy").splitlines()
    assert len({len(line) for line in lines}) == 1
    rows = {line[:20].strip(): line[20:].split("  ") for line in lines}
    text = "\n".join(lines)
    for value in ("345,236", "1.52%", "812 MiB", "3.00 GiB", "0.733 s", "228", "76.16%", "50.00%"):
        assert value in text
    assert "trainable parameters" in rows


def test_perplexity_is_no_percentage():
    assert "18.190" in report.table([{**NUMBERS, "perplexity": 18.19}], "perplexity")


@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
@pytest.mark.parametrize("names", [["LoRA"], ["LoRA", "full", "PEFT"]])
def test_the_plot_is_a_png_of_readable_size(tmp_path, metric, names):
    path = tmp_path / "plot.png"
    report.plot(path, {name: history(metric) for name in names}, metric)
    (width, height), size = png_size(path)
    assert (width, height) == (1500, 600)
    assert 20_000 < size < 400_000
    assert list(tmp_path.iterdir()) == [path]
