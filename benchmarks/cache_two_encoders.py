"""What the cache of features saves with two encoders: CLIP-L/14-336 and DINOv2-L at 336, a language model of 135M.

`chiasm train` with the cache and without it, JPEGs on the disk, batch 64; with it the last epoch is measured.

    python benchmarks/cache_two_encoders.py
"""

from __future__ import annotations

from common import write_result
from speed import CLIP, DINO, captions, free, loop, make_run

BATCH, IMAGES = 64, 1024


def main() -> None:
    run = make_run("135m", BATCH, encoders=[CLIP, DINO], fusion="concat_channels")
    with captions(IMAGES) as data:
        cached = loop(run, data, 3, cache="on", compile="on", loader_workers=12)
        free()
        live = loop(run, data, 2, cache="off", compile="on", loader_workers=12)
    ratio = cached["samples_per_second"] / live["samples_per_second"]
    write_result(
        "cache_two_encoders",
        figures={"with the cache": cached, "without the cache": live},
        ratio=ratio,
        asked="with the cache at least 2.0 of the samples/s without it (aim 2.4)",
        met=ratio >= 2.0,
    )


if __name__ == "__main__":
    main()
