"""What only a GPU can show. The benchmarks' folder goes on the module path: its scripts lie side by side."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
