"""The output directory appears complete or not at all, and nothing of the user's is lost."""

import json
from pathlib import Path

import pytest
from peftops.cli.errors import InputError
from peftops.cli.output import OutputDirectory, replace_file, write_text


def finished(path):
    output = OutputDirectory(path)
    output.begin({"lr": 1})
    write_text(output.work / "metrics.json", "{}")
    (output.checkpoints / "checkpoint-1").mkdir(parents=True)
    assert not path.exists()
    output.publish()
    return path


def test_results_appear_at_the_end_without_the_working_state(tmp_path):
    path = finished(tmp_path / "a" / "run")
    assert [entry.name for entry in path.parent.iterdir()] == ["run"]
    assert [entry.name for entry in path.iterdir()] == ["metrics.json"]


def test_an_occupied_output_is_refused(tmp_path):
    path = finished(tmp_path / "run")
    with pytest.raises(InputError, match="exists and is not empty"):
        OutputDirectory(path)
    with pytest.raises(InputError, match="nothing to resume"):
        OutputDirectory(path, resume=True)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        OutputDirectory(file, overwrite=True)
    for name in (".", "..", "/"):
        with pytest.raises(InputError, match="wanted the name of a directory"):
            OutputDirectory(Path(name), overwrite=True)
    (tmp_path / "empty").mkdir()
    OutputDirectory(tmp_path / "empty")


def test_overwrite_replaces_only_what_a_run_wrote(tmp_path):
    path = finished(tmp_path / "run")
    (path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="holds 'thesis.tex', which no run wrote"):
        OutputDirectory(path, overwrite=True)
    (path / "thesis.tex").unlink()
    (path / "plot.png").write_text("old")
    output = OutputDirectory(path, overwrite=True)
    output.begin({})
    write_text(output.work / "table.txt", "new")
    assert (path / "plot.png").exists()  # the old results stay until the new ones are there
    output.publish()
    assert [entry.name for entry in path.iterdir()] == ["table.txt"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_resume_needs_the_same_settings(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(InputError, match="no interrupted run"):
        OutputDirectory(path, resume=True)
    OutputDirectory(path).begin({"lr": 0.1, "seed": 0})
    with pytest.raises(InputError, match="unfinished run is at .*run.partial, pass --resume"):
        OutputDirectory(path)
    with pytest.raises(InputError, match="--resume: lr was 0.1 and is now 0.2"):
        OutputDirectory(path, resume=True).begin({"lr": 0.2, "seed": 0})
    OutputDirectory(path, resume=True).begin({"lr": 0.1, "seed": 0})
    (tmp_path / "run.partial" / "run.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        OutputDirectory(path, resume=True).begin({"lr": 0.1, "seed": 0})


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    output = OutputDirectory(tmp_path / "run")
    output.begin({})
    assert output.last_checkpoint() is None
    for number, state in ((9, json.dumps({})), (10, "{"), (11, None)):
        folder = output.checkpoints / f"checkpoint-{number}"
        folder.mkdir(parents=True)
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert output.last_checkpoint().name == "checkpoint-9"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "f.txt"
    write_text(path, "old")

    def fails(temporary):
        temporary.write_text("ne")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        replace_file(path, fails)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
