"""The store of features: what was put is read, by content, across processes and kills, within its size."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch

from chiasm_experiments.data.packs import Pack
from chiasm_experiments.data.store import FeatureStore

VIEW = (2, 4, 8)


def features(number: int, views: int = 1, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(views, *VIEW, generator=generator).to(dtype)


def shelf(folder, limit=2**24, identity="encoder", dtype=torch.float32, share=1.0):
    return FeatureStore(folder, limit).shelf(identity, VIEW, dtype, share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_put_is_read_with_the_same_bits_by_another_process_view(tmp_path, dtype):
    writer, reader = shelf(tmp_path, dtype=dtype), shelf(tmp_path, dtype=dtype)
    for number in range(20):
        writer.put(f"image{number}", features(number, 1 + number % 3, dtype))
    for number in range(20):
        assert reader.views(f"image{number}") == 1 + number % 3
        found = reader.get(f"image{number}")
        assert found is not None
        assert torch.equal(found, features(number, 1 + number % 3, dtype))
    assert reader.get("image20") is None


def test_another_encoder_or_number_format_finds_nothing(tmp_path):
    shelf(tmp_path).put("image", features(0))
    assert shelf(tmp_path).views("image") == 1
    assert shelf(tmp_path, identity="other").views("image") is None
    assert shelf(tmp_path, dtype=torch.bfloat16).views("image") is None


def test_a_changed_byte_a_cut_end_and_a_lost_page_are_no_entry_and_can_be_written_again(tmp_path):
    writer = shelf(tmp_path)
    for number in range(3):
        writer.put(f"image{number}", features(number))
    writer.close()
    (data,) = tmp_path.glob("*/*.data")
    size = features(0).nbytes
    with data.open("r+b") as file:
        file.seek(7)
        byte = file.read(1)
        file.seek(7)
        file.write(bytes([byte[0] ^ 1]))
        file.seek(size)
        file.write(bytes(size))
        file.truncate(3 * size - 1)
    reader = shelf(tmp_path)
    assert [reader.get(f"image{number}") for number in range(3)] == [None] * 3
    assert shelf(tmp_path).views("image0") is None, "the damage was not noted for others"
    for number in range(3):
        reader.put(f"image{number}", features(number))
    again = shelf(tmp_path)
    assert all(torch.equal(again.get(f"image{number}"), features(number)) for number in range(3))


def test_a_record_of_zeros_or_half_a_record_is_none(tmp_path):
    writer = shelf(tmp_path)
    writer.put("image", features(0))
    writer.close()
    (index,) = tmp_path.glob("*/*.index")
    with index.open("ab") as file:
        file.write(bytes(64) + b"half")
    reader = shelf(tmp_path)
    assert reader.get("image") is not None
    reader.put("other", features(1))  # the same pack, taken up behind the half
    assert len(list(tmp_path.glob("*/*.index"))) == 1
    assert torch.equal(shelf(tmp_path).get("other"), features(1))


def test_the_size_is_kept_and_what_was_used_last_stays(tmp_path):
    limit = 2**20
    writer = shelf(tmp_path, limit)
    count = 3 * limit // features(0).nbytes
    for number in range(count):
        writer.put(f"image{number}", features(number))
        if number % 250 == 0:
            for age, data in enumerate(sorted(tmp_path.glob("*/*.data"), key=lambda path: path.stat().st_mtime_ns)):
                os.utime(data, (age, age))  # a clock too coarse for a test
            first = shelf(tmp_path, limit)
            assert first.get("image0") is not None, "what is used all the time was dropped"
    assert writer.store.bytes <= limit
    reader = shelf(tmp_path, limit)
    assert reader.views(f"image{count - 1}") == 1
    assert reader.views(f"image{count // 3}") is None
    assert reader.views("image0") == 1


def test_packs_are_dropped_from_the_one_that_was_not_used_for_longest(tmp_path):
    limit = 2**20
    writer = shelf(tmp_path, limit)
    for number in range(int(0.9 * limit / features(0).nbytes)):
        writer.put(f"image{number}", features(number))
    writer.close()
    packs = sorted(tmp_path.glob("*/*.data"))
    assert len(packs) > 10
    # that which is not full yet is written on, and so used last
    order = sorted(packs[3:] + packs[:3], key=lambda data: -data.stat().st_size)
    for age, data in enumerate(order):
        os.utime(data, (1e9 + age, 1e9 + age))
    number = 0
    while sum(data.exists() for data in packs) > len(packs) - 4:
        writer.put(f"other{number}", features(number))
        number += 1
    left = [data.exists() for data in order]
    assert left == [False] * left.count(False) + [True] * left.count(True)


def test_a_pack_that_is_dropped_between_finding_and_reading_is_read_still(tmp_path):
    """Its files may not be closed meanwhile: their numbers could be another file's by then."""
    shelf(tmp_path).put("image", features(0))
    reader = shelf(tmp_path)
    assert reader.views("image") == 1
    for file in [*tmp_path.glob("*/*.index"), *tmp_path.glob("*/*.data")]:
        file.unlink()
    found = reader.find(["image", "other"])  # looks for the other one, and no longer sees the pack
    read_VLND = torch.empty(1, *VIEW)
    assert reader.read(list(found.values()), read_VLND) == [True]
    assert torch.equal(read_VLND, features(0))
    assert reader.get("image") is None
    (pack,) = {item.pack for item in found.values()}
    closed = pack.close
    del pack, found
    assert not closed.alive, "a pack that nothing is read from keeps its files"


def test_a_reader_goes_by_its_own_map_of_a_pack_where_another_maps_it_as_well(tmp_path):
    class Shared(Pack):
        """One whose map is at once replaced by another thread's, of the pack as it was before it grew."""

        _short = None

        @property
        def _mapped(self):
            return self._short

        @_mapped.setter
        def _mapped(self, mapped):
            self._short = None if mapped is None else mapped[: features(0).nbytes]

    writer = shelf(tmp_path)
    for number in range(2):
        writer.put(f"image{number}", features(number))
    (index,) = tmp_path.glob("*/*.index")
    pack = Shared(index)
    into = np.empty(features(1).nbytes, np.uint8)
    assert pack.read([pack.entry(1)], into) == [True]
    assert into.tobytes() == features(1).numpy().tobytes()


def test_what_another_finished_between_a_look_and_a_claim_is_not_computed_again(tmp_path):
    own, other = shelf(tmp_path), shelf(tmp_path)
    assert own.views("image") is None
    other.put("image", features(0))
    assert own.claim(["image", "new"]) == ["new"]


def test_a_share_keeps_the_same_images_in_every_process(tmp_path):
    halves = [shelf(tmp_path, share=0.5) for _ in range(2)]
    kept = [[number for number in range(1000) if half.keeps(f"image{number}")] for half in halves]
    assert kept[0] == kept[1]
    assert 400 < len(kept[0]) < 600


def compute_all(folder, order, pause, computed):
    """As a run does: claims, computes what it got, and waits for the rest."""
    own = shelf(folder)
    for first in range(0, len(order), 8):
        missing = {f"image{number}": number for number in order[first : first + 8]}
        while missing:
            for key in [key for key in missing if own.views(key) is not None]:
                del missing[key]
            mine = own.claim(missing)
            time.sleep(pause)
            for key in mine:
                computed.put(missing[key])
                own.put(key, features(missing.pop(key)))
            own.release(mine)
            time.sleep(0.001)


def test_processes_that_start_at_once_compute_each_image_once_between_them(tmp_path):
    context = multiprocessing.get_context("fork")
    computed = context.Queue()
    orders = [list(range(96)), list(range(96)), list(reversed(range(96)))]
    workers = [context.Process(target=compute_all, args=(tmp_path, order, 0.004, computed)) for order in orders]
    for worker in workers:
        worker.start()
    found = [computed.get(timeout=30) for _ in range(96)]
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert computed.empty()
    assert sorted(found) == list(range(96))
    reader = shelf(tmp_path)
    assert all(torch.equal(reader.get(f"image{number}"), features(number)) for number in range(96))


def large(folder):
    return FeatureStore(folder, 2**30).shelf("encoder", (2, 64, 256), torch.float32)


def write_for_ever(folder, ready):
    own = large(folder)
    own.claim(["held"])
    ready.set()
    number = 0
    while True:
        own.put(f"image{number}", torch.full((1, 2, 64, 256), float(number)))
        number += 1


def test_a_killed_writer_leaves_no_bad_entry_and_blocks_nobody(tmp_path):
    context = multiprocessing.get_context("fork")
    survived = 0
    for wait in (0.0, 0.003, 0.01, 0.03):
        ready = context.Event()
        writer = context.Process(target=write_for_ever, args=(tmp_path, ready))
        writer.start()
        assert ready.wait(30)
        own = large(tmp_path)
        assert own.claim(["held"]) == []
        time.sleep(wait)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert own.claim(["held"]) == ["held"]
        own.release(["held"])
        number = 0
        while own.views(f"image{number}") is not None:
            found = own.get(f"image{number}")
            assert found is not None
            assert torch.equal(found, torch.full((1, 2, 64, 256), float(number)))
            number += 1
        own.put("mine", torch.zeros(1, 2, 64, 256))
        survived += number
    assert survived > 0
    assert large(tmp_path).get("mine") is not None


def test_a_full_disk_is_told_once_and_stops_nothing(tmp_path, monkeypatch):
    own = shelf(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.warns(UserWarning, match="takes no more: .*No space left"):
        own.put("image", features(0))
    assert not own.keeps("image")
    assert own.views("image") is None
