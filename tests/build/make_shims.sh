#!/usr/bin/env bash
# Prints tests/build/shims-2.10.txt: the C functions of PyTorch 2.10 that a stable-ABI library may import.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip download --quiet --no-deps --dest "$folder" torch==2.10.0
unzip -q "$folder"/torch-*.whl torch/lib/libtorch_cpu.so -d "$folder"
echo "# aoti_torch_* and torch_* functions that libtorch_cpu.so of PyTorch 2.10.0 defines (x86-64, package index)."
echo "# Made by tests/build/make_shims.sh > tests/build/shims-2.10.txt"
nm -D --defined-only "$folder/torch/lib/libtorch_cpu.so" | awk '$2 == "T" && $3 ~ /^(aoti_torch|torch)_/ { print $3 }' | LC_ALL=C sort -u
