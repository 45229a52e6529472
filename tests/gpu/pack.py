"""`make gpu-libs`: one archive with all that a GPU machine needs, which has no compiler, no network and no `_C`.

    python -m tests.gpu.pack [--output dist/peftops-gpu.tar.gz]

In it: every file of the checkout that is not ignored, the built libraries, stripped, and COMMIT, which says what they
were built from.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.gpu.record import ROOT, harness, library_differs

LIBRARIES = Path("python/peftops/lib")
REQUIRED = ("libpeftops.so", "libpeftops_cuda.so")
#: So much can be carried at once.
LIMIT = 60 << 20


def checkout(root: Path) -> list[str]:
    """Every file that is tracked, or new and not ignored."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(name for name in set(listed) if name and (root / name).is_file())


def pack(root: Path, output: Path, commit: str, required: Sequence[str] = REQUIRED) -> int:
    """Write the archive; returns its size.

    Raises ValueError where a library is missing, its kernels are not those of kernels.txt, or the archive is too large.
    """
    missing = [name for name in required if not (root / LIBRARIES / name).exists()]
    if missing:
        raise ValueError(f"{', '.join(missing)} is not built: make build, where nvcc is in PATH")
    if differs := library_differs():
        raise ValueError(f"the CUDA library is not that of tests/build/kernels.txt (make kernels): {differs}")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, tarfile.open(output, "w:gz") as archive:
        for name in checkout(root):
            archive.add(root / name, name)
        for library in sorted((root / LIBRARIES).glob("*.so")):
            copy = Path(folder) / library.name
            shutil.copy(library, copy)
            if shutil.which("strip"):
                subprocess.run(["strip", "--strip-unneeded", str(copy)], check=True)
            archive.add(copy, str(LIBRARIES / library.name))
        entry = tarfile.TarInfo("COMMIT")
        entry.size = len(commit) + 1
        archive.addfile(entry, io.BytesIO(f"{commit}\n".encode()))
    size = output.stat().st_size
    if size > LIMIT:
        raise ValueError(f"{output} has {size >> 20} MiB, but may have {LIMIT >> 20}")
    return size


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-libs", description="The archive for a GPU machine.")
    parser.add_argument("--output", type=Path, default=ROOT / "dist" / "peftops-gpu.tar.gz")
    args = parser.parse_args(argv)
    try:
        size = pack(ROOT, args.output, harness.commit())
    except ValueError as error:
        print(f"gpu-libs: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {size / (1 << 20):.1f} MiB, commit {harness.commit()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
