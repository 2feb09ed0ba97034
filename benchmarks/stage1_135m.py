"""Stage 1 with CLIP-L/14-336, an MLP and a language model of 135M, batch 64, on one GPU, beside transformers' LLaVA.

Ours is `chiasm train` as a user runs it: JPEGs on the disk, decoded by processes beside the model. Without the cache
every step encodes its images; with it the first epoch does, and the last, which is measured, reads the features from
the disk. The peer is given its batch on the GPU.

    python benchmarks/stage1_135m.py
    python benchmarks/stage1_135m.py --tiny    anywhere, small models; prints only
"""

from __future__ import annotations

from common import write_result
from speed import Scale, asked_scale, captions, free, loop, make_peer, make_run, peer_step, rate


def main(scale: Scale) -> None:
    batch, images = (4, 16) if scale.tiny else (64, 1536)
    settings = {"compile": "off", "loader_workers": 2} if scale.tiny else {"compile": "on", "loader_workers": 8}
    run = make_run("135m", batch, scale)
    with captions(images) as data:
        cached = loop(run, data, 3, cache="on", **settings)
        free()
        live = loop(run, data, 2, cache="off", **settings)
    free()
    peer = rate(peer_step(make_peer("135m", scale), batch, scale), batch, least=6 * scale.seconds)
    ratios = {name: item["samples_per_second"] / peer["samples_per_second"] for name, item in
              (("cached", cached), ("live", live))}  # fmt: skip
    write_result(
        "stage1_135m",
        figures={"with the cache": cached, "without the cache": live, "peer": peer, "ratio_without": ratios["live"]},
        ratio=ratios["cached"],
        asked="3.0 of the peer's samples/s with the cache (aim 3.5), 1.8 without",
        met=ratios["cached"] >= 3.0 and ratios["live"] >= 1.8,
        write=not scale.tiny,
    )


if __name__ == "__main__":
    main(asked_scale(__doc__))
