#!/usr/bin/env bash
# Prints the C functions of PyTorch 2.10 that a stable-ABI library may import, those of libtorch_cpu.so or of libtorch_cuda.so:
#   tests/build/make_shims.sh cpu > tests/build/shims-2.10.txt
#   tests/build/make_shims.sh cuda > tests/build/shims-2.10-cuda.txt
set -euo pipefail
library=libtorch_$1.so
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip download --quiet --no-deps --dest "$folder" torch==2.10.0
unzip -q "$folder"/torch-*.whl "torch/lib/$library" -d "$folder"
echo "# aoti_torch_* and torch_* functions that $library of PyTorch 2.10.0 defines (x86-64, package index)."
echo "# Made by tests/build/make_shims.sh $1"
nm -D --defined-only "$folder/torch/lib/$library" | awk '$2 == "T" && $3 ~ /^(aoti_torch|torch)_/ { print $3 }' | LC_ALL=C sort -u
