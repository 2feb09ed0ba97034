"""What the cache of features saves with two encoders: CLIP-L/14-336 and DINOv2-L at 336, a language model of 135M.

`chiasm train` with the cache and without it, JPEGs on the disk, batch 64; with it the last epoch is measured.

    python benchmarks/cache_two_encoders.py
    python benchmarks/cache_two_encoders.py --tiny    anywhere, small models; prints only
"""

from __future__ import annotations

from common import write_result
from speed import Scale, asked_scale, captions, free, loop, make_run


def main(scale: Scale) -> None:
    batch, images = (4, 16) if scale.tiny else (64, 1024)
    settings = {"compile": "off", "loader_workers": 2} if scale.tiny else {"compile": "on", "loader_workers": 12}
    run = make_run("135m", batch, scale, ("clip", "dinov2"), fusion="concat_channels")
    with captions(images) as data:
        cached = loop(run, data, 3, cache="on", **settings)
        free()
        live = loop(run, data, 2, cache="off", **settings)
    ratio = cached["samples_per_second"] / live["samples_per_second"]
    write_result(
        "cache_two_encoders",
        figures={"with the cache": cached, "without the cache": live},
        ratio=ratio,
        asked="with the cache at least 2.0 of the samples/s without it (aim 2.4)",
        met=ratio >= 2.0,
        write=not scale.tiny,
    )


if __name__ == "__main__":
    main(asked_scale(__doc__))
