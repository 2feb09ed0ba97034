"""Runs a study: `ray job submit --working-dir . -- python experiments/sweep.py experiments/studies/demo.yaml`.

The same as `chiasm sweep`, as a file that a Ray job can name.
"""

from chiasm.cli import main

if __name__ == "__main__":
    main(prefix=["sweep"])
