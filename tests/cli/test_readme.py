"""The README's code blocks run as they stand."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peftops.cli import main

from tests.cli.conftest import sentences, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    shlex.split(line, comments=True)
    for language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
    if line.strip()
]


def test_every_door_has_an_example():
    assert len(PYTHON) >= 2
    assert {command[0] for command in COMMANDS} == {"make", "peftops", ".venv/bin/python"}


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: f"{len(code.splitlines())}-lines")
def test_python_blocks(code, tmp_path):
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def test_shell_commands(bert, tmp_path, monkeypatch, capsys):
    commands = [command[1:] for command in COMMANDS if command[0] == "peftops"]
    assert commands[0][0] == "finetune"
    shutil.copytree(bert, tmp_path / "path/to/model")
    write_jsonl(tmp_path / "texts.jsonl", sentences(60))
    monkeypatch.chdir(tmp_path)
    for command in commands:  # in the README's order: one needs what another has written
        assert main(command) == 0, capsys.readouterr().err
    assert (tmp_path / "runs/mine/adapter/adapter_model.safetensors").exists()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "make"], ids=" ".join)
def test_make_targets_exist(command):
    run = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


def test_benchmark_command(monkeypatch):
    (command,) = [command for command in COMMANDS if command[0] == ".venv/bin/python"]
    run = subprocess.run([sys.executable, command[1], "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert all(option in run.stdout for option in command if option.startswith("--"))
