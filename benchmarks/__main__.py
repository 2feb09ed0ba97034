"""`make bench`: the benchmarks that need no GPU, one after the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CPU = ("contract_faults.py", "demo_time.py", "job_submit.py")

if __name__ == "__main__":
    for name in CPU:
        subprocess.run([sys.executable, str(HERE / name)], check=True)
