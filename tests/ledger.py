"""The only place where a known failure may be waived.

An entry names the tests (a pattern over their ids), the backend, the issue in which the defect is tracked, and why it
fails. A waived test that passes fails the run, and so does an entry that matches no test: the ledger is as strict as
the suite.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """One waiver.

    tests: pattern (fnmatch, `[` is literal) over the test ids of one file, `tests/ops/test_x.py::test_y[*-bfloat16-*]`.
    backend: "cpu" or "cuda". issue: where the defect is tracked. quarantine: do not run it (it crashes or hangs),
    instead of expecting its failure.
    """

    tests: str
    backend: str
    issue: int
    reason: str
    quarantine: bool = False

    def __post_init__(self) -> None:
        path = self.tests.partition("::")[0]
        if "::" not in self.tests or any(sign in path for sign in "*?"):
            raise ValueError(f"ledger entry must name one file and a test in it, got {self.tests!r}")
        if self.backend not in ("cpu", "cuda"):
            raise ValueError(f"ledger entry {self.tests!r}: backend must be cpu or cuda, got {self.backend!r}")
        if self.issue < 1 or not self.reason.strip():
            raise ValueError(f"ledger entry {self.tests!r} needs an issue number and a reason")

    @property
    def path(self) -> str:
        return self.tests.partition("::")[0]

    def matches(self, test_id: str) -> bool:
        return fnmatchcase(test_id, self.tests.replace("[", "[[]"))


LEDGER: tuple[Entry, ...] = ()


def waivers(entries: Sequence[Entry], test_ids: Iterable[str], backend: str) -> dict[str, Entry]:
    """The entry that waives each of the tests; two entries for one test are an error."""
    found: dict[str, Entry] = {}
    for test_id in test_ids:
        for entry in entries:
            if entry.backend == backend and entry.matches(test_id):
                if test_id in found:
                    raise ValueError(f"two ledger entries waive {test_id}: {found[test_id].tests} and {entry.tests}")
                found[test_id] = entry
    return found


def stale(entries: Sequence[Entry], test_ids: Sequence[str], backend: str, root: Path) -> list[Entry]:
    """Entries that waive nothing: no collected test of a collected file matches, or the file is gone.

    To be asked only after whole files were collected.
    """
    files = {test_id.partition("::")[0] for test_id in test_ids}
    judged = [e for e in entries if e.backend == backend and (e.path in files or not (root / e.path).exists())]
    return [entry for entry in judged if not any(entry.matches(test_id) for test_id in test_ids)]
