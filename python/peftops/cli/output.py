"""Where results go: prepared in `NAME.partial` beside the output directory, which appears complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError

# What a run writes; --overwrite replaces a directory that holds nothing else.
RESULTS = frozenset({"adapter", "metrics.json", "steps.jsonl", "plot.png", "table.txt"})
SETTINGS_FILE = "run.json"
CHECKPOINTS = "checkpoints"


def write_text(path: Path, text: str) -> None:
    """Write a file so that readers see the old text or the new, never a part."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under a temporary name in the same directory, then rename it to `path`."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_new(path: Path) -> None:
    """Raise InputError if `path` exists and is no empty directory."""
    if path.name in ("", ".."):
        raise InputError(f"--output {path}: wanted the name of a directory to be made")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"--output {path}: exists and is not an empty directory, choose another")


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A directory to fill, which is `path` at the end; after an error there is none.

    Raises:
        InputError: `path` cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise InputError(f"--output {path}: cannot be created ({error.strerror})") from None
    try:
        yield work
        mask = os.umask(0)
        os.umask(mask)
        work.chmod(0o777 & ~mask)  # mkdtemp's directory is the owner's alone, and so are safetensors' files
        for file in work.iterdir():
            file.chmod(0o666 & ~mask)
        os.replace(work, path)
    except OSError as error:
        raise InputError(f"--output {path}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


class OutputDirectory:
    """The output directory `path` of one run and its work directory `path.partial`.

    Nothing on disk changes before `begin`. `publish` moves the finished work directory to `path` by renaming.

    Raises:
        InputError: `path` is occupied, or there is nothing to resume, or the interrupted run had other settings.
    """

    def __init__(self, path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        if path.name in ("", ".."):
            raise InputError(f"--output {path}: wanted the name of a directory to be made")
        self.path = path
        self.work = path.with_name(path.name + ".partial")
        self.resume = resume
        if path.is_dir():
            entries = {entry.name for entry in path.iterdir()}
            if resume and entries:
                raise InputError(f"--output {path}: the run is complete, there is nothing to resume")
            if entries and not overwrite:
                raise InputError(f"--output {path}: exists and is not empty, choose another or pass --overwrite")
            foreign = sorted(entries - RESULTS)
            if foreign:
                raise InputError(f"--output {path}: holds {foreign[0]!r}, which no run wrote: not overwritten")
        elif path.exists():
            raise InputError(f"--output {path}: is a file, wanted a directory")
        if resume and not self.work.is_dir():
            raise InputError(f"--resume: no interrupted run at {self.work}")
        if self.work.exists() and not (resume or overwrite):
            raise InputError(f"--output: an unfinished run is at {self.work}, pass --resume or --overwrite")

    def begin(self, settings: dict) -> None:
        """Create the work directory; when resuming, insist on the settings that the interrupted run was begun with."""
        if self.resume:
            try:
                before = json.loads((self.work / SETTINGS_FILE).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                raise InputError(f"--resume: {self.work / SETTINGS_FILE} cannot be read, pass --overwrite") from None
            for name in {**before, **settings}:
                if before.get(name) != settings.get(name):
                    raise InputError(f"--resume: {name} was {before.get(name)!r} and is now {settings.get(name)!r}")
            return
        try:
            if self.work.exists():
                shutil.rmtree(self.work)
            self.work.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"--output {self.path}: cannot be created ({error.strerror})") from None
        write_json(self.work / SETTINGS_FILE, settings)

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end (the state file is written last)."""
        for folder in sorted(self.checkpoints.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
            try:
                json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            return folder
        return None

    @property
    def checkpoints(self) -> Path:
        return self.work / CHECKPOINTS

    def publish(self) -> None:
        """Drop what only an unfinished run needs and put the results in their place."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        (self.work / SETTINGS_FILE).unlink()
        old = self.path.with_name(self.path.name + ".old")
        if self.path.exists():
            os.replace(self.path, old)
        os.replace(self.work, self.path)
        shutil.rmtree(old, ignore_errors=True)
