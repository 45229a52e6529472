"""The benchmarks are scripts that lie side by side: their folder goes on the module path."""

import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))
