"""`make abi`: one binary serves every PyTorch from 2.10 on and every Python; shown in environments made for it.

`python run.py RELEASE[@PYTHON] ...` makes in build/abi an environment per argument, with that release of torch
(`newest`: the newest there is) on that interpreter (else the one that runs this), installs the package's wheel into
it, runs smoke.py there and writes record.json. A CUDA build of torch takes several GB, which the package index has for
2.10; the library is loaded in it, too: under another CUDA with the runtime that the library needs.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
BUILD = ROOT / "build" / "abi"
RECORD = HERE / "record.json"


def main(arguments: list[str]) -> None:
    wheel = make_wheel()
    found = libraries(wheel)
    record = {
        "date": datetime.date.today().isoformat(),
        "commit": output("git", "-C", ROOT, "describe", "--always", "--dirty").strip(),
        "wheel": wheel.name,
        "libraries": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()},
        "imports": {name: imports(path) for name, path in found.items()},
        "environments": [try_environment(argument, wheel, found["libpeftops_cuda.so"]) for argument in arguments],
    }
    schemas = {tuple(environment.pop("schemas")) for environment in record["environments"]}
    (record["schemas"],) = schemas
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    for environment in record["environments"]:
        print(environment)


def output(*command: str | Path, **variables: str) -> str:
    """What a program prints; it runs away from the source tree, so that the package is the installed one."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PEFTOPS_CPU_LEVEL")} | variables
    done = subprocess.run([*map(str, command)], cwd=BUILD, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"abi: {' '.join(map(str, command))} ended with exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def make_wheel() -> Path:
    folder = BUILD / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    output(sys.executable, "-m", "pip", "wheel", "--quiet", ROOT, "--no-deps", "--no-build-isolation", "-w", folder)
    (wheel,) = folder.iterdir()
    return wheel


def libraries(wheel: Path) -> dict[str, Path]:
    """The operators' libraries, taken out of the wheel. Without the CUDA one there would be little to record."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("peftops/lib/")]
        found = {Path(name).name: Path(archive.extract(name, BUILD)) for name in names}
    if set(found) != {"libpeftops.so", "libpeftops_cuda.so"}:
        raise SystemExit(
            f"abi: the wheel has {sorted(found)}, but must have the CPU and the CUDA library: build with nvcc"
        )
    return found


def imports(library: Path) -> list[str]:
    """What a library takes from torch and the CUDA runtime."""
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True
    ).stdout
    names = (line.split()[-1].partition("@")[0] for line in listing.splitlines())
    return sorted(name for name in names if re.match("aoti_torch_|torch_|_*cuda", name))


def try_environment(argument: str, wheel: Path, cuda_library: Path) -> dict:
    release, _, interpreter = argument.partition("@")
    folder = BUILD / re.sub(r"[^\w.]+", "-", argument)
    python = folder / "bin" / "python"
    print(f"abi: torch {release} in {folder}", flush=True)
    if not python.exists():
        output(interpreter or sys.executable, "-m", "venv", folder)
    pip = (python, "-m", "pip", "install", "--quiet")
    output(*pip, "--upgrade", "torch" if release == "newest" else f"torch=={release}")
    output(*pip, "--no-deps", "--force-reinstall", wheel)
    facts = json.loads(output(python, "-W", "ignore", HERE / "smoke.py", "kit", OMP_NUM_THREADS="1").splitlines()[-1])
    if facts["cuda"] is not None:
        runtime = None if facts["no CUDA kernels, because"] is None else runtime_of(cuda_library, python)
        command = [python, "-W", "ignore", HERE / "smoke.py", "cuda", *([runtime] if runtime else [])]
        facts["CUDA library loads"] = json.loads(output(*command).splitlines()[-1])["runtime"]
    return facts


def runtime_of(library: Path, python: Path) -> Path:
    """The CUDA runtime that the library asks for, from the package index."""
    major = re.search(rb"\0libcudart\.so\.(\d+)\0", library.read_bytes()).group(1).decode()
    folder = BUILD / f"runtime-{major}"
    package = f"nvidia-cuda-runtime=={major}.*"
    output(python, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", folder, package)
    (runtime,) = folder.rglob(f"libcudart.so.{major}")
    return runtime


if __name__ == "__main__":
    BUILD.mkdir(parents=True, exist_ok=True)
    main(sys.argv[1:] or ["2.10.0", "newest"])
