"""Training with stored features: the same numbers, each image encoded once, and nothing old is ever taken."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace
from torch.utils._python_dispatch import TorchDispatchMode

from chiasm.config import ImageConfig, RunConfig, TokensConfig
from chiasm.encoder import Encoder
from chiasm.errors import DataError
from chiasm.features import Features
from chiasm.image import looked_up, normalise
from chiasm.prompt import PromptBuilder
from chiasm.sample import ImageFile, Sample, Turn
from chiasm.views import Views
from chiasm_encoders.clip import ClipEncoder
from chiasm_encoders.dinov2 import Dinov2Encoder
from chiasm_experiments.data.features import FeatureMemo, FrozenFeatures, Wanted
from chiasm_experiments.data.feed import Feed
from chiasm_experiments.data.joining import Span, join
from chiasm_experiments.data.loader import _Examples, _read_ahead, load_steps
from chiasm_experiments.data.mixture import Mixture
from chiasm_experiments.data.store import FeatureStore
from chiasm_experiments.training.cache import content_identity
from chiasm_experiments.training.stage import train_stage
from chiasm_experiments.training.workers import Workers

CPU = torch.device("cpu")
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Square:
    """An image of one colour that counts how often it is drawn."""

    drawn = 0

    def __init__(self, colour: str) -> None:
        self.key = colour

    def load(self) -> Image.Image:
        Square.drawn += 1
        return Image.new("RGB", (8, 8), COLOURS[self.key])


class Samples:
    """Image, text and two-image samples with answers of different lengths."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Sample:
        names = list(COLOURS)
        colour = names[index % 3]
        if index % 4 == 3:
            return Sample(f"text{index}", (Turn("say", "ok" * (index % 3 + 1)),))
        images = (Square(colour),) if index % 4 else (Square(colour), Square(names[(index + 1) % 3]))
        return Sample(f"s{index}", (Turn("c?", colour),), images)


def run_config(**stage) -> RunConfig:
    base = {"name": "s", "data": "x", "train": ["adapter", "tokens", "llm"], "lr": 1e-2, "batch_size": 6}
    values = {"vision": {"encoders": ["x"]}, "llm": "x", "stages": [base | stage], "system": ""}
    return RunConfig.model_validate(values)


def weights(vlm):
    return {name: value.clone() for name, value in vlm.state_dict().items()}


def make_feed(vlm, store=None, memo=None, share=1.0):
    builder = PromptBuilder(vlm.llm, TokensConfig(), vlm.visual_tokens, "")
    identities = [content_identity(encoder) for encoder in vlm.encoders]
    return Feed(vlm, builder, memo, identities, store, share)


def train(vlm, run, feed, samples=None, loaders=0):
    losses = []
    mixture = Mixture([samples or Samples()])
    train_stage(
        vlm, run, 0, mixture, feed, Workers(0, 1, CPU), lambda step, steps, m: losses.append(m["loss"]), loaders
    )
    return losses


def assert_same_bits(one, other):
    other = weights(other)
    for name, value in weights(one).items():
        assert torch.equal(other[name], value), name


@pytest.mark.parametrize("loaders", [0, 2])
@pytest.mark.parametrize("encoders", [1, 2])
def test_stored_features_and_loader_processes_change_no_bit(make_vlm, tmp_path, encoders, loaders):
    run = run_config(epochs=4, train=["adapter", "tokens", "llm"])
    plain, cached, again = make_vlm(encoders), make_vlm(encoders), make_vlm(encoders)
    for vlm in (plain, cached, again):
        vlm.encoders[-1].weight.data *= 2  # equal encoders would share their features
    wanted = train(plain, run, make_feed(plain))
    feed = make_feed(cached, FeatureStore(tmp_path, 2**24))
    assert train(cached, run, feed, loaders=loaders) == wanted
    assert_same_bits(plain, cached)
    assert [features.computed for features in feed.features] == [len(COLOURS)] * encoders
    other = make_feed(again, FeatureStore(tmp_path, 2**24))
    Square.drawn = 0
    assert train(again, run, other, loaders=loaders) == wanted
    assert_same_bits(plain, again)
    assert [features.computed for features in other.features] == [0] * encoders
    assert Square.drawn == 0, "an image was drawn although all of its features were known"


def test_a_share_stores_some_and_computes_the_others(make_vlm, tmp_path):
    run = run_config(epochs=2)
    plain, cached = make_vlm(), make_vlm()
    feed = make_feed(cached, FeatureStore(tmp_path, 2**24), share=0.5)
    assert train(cached, run, feed) == train(plain, run, make_feed(plain))
    assert_same_bits(plain, cached)
    (features,) = feed.features
    kept = [colour for colour in COLOURS if features.shelf.keeps(colour)]
    assert [features.views(colour) for colour in COLOURS] == [1 if colour in kept else None for colour in COLOURS]


class Tiny:
    """One tiny encoder of a family behind the toy's other parts."""

    def __init__(self, make_vlm, encoder):
        self.vlm = make_vlm()
        self.vlm.encoders[0] = encoder.eval()
        self.vlm.set_trained([])


def identity(encoder) -> str:
    return content_identity(encoder)


def tiny(**change) -> Encoder:
    torch.manual_seed(0)
    config = ClipEncoder.tiny().config
    torch.manual_seed(0)
    return ClipEncoder.build(type(config).model_validate(config.model_dump() | change))


def test_equal_encoders_have_equal_identities_and_any_change_another():
    same = identity(tiny())
    assert identity(tiny()) == same
    bit = tiny()
    weight = list(bit.parameters())[-1].data.view(torch.int32)
    weight.view(-1)[0] ^= 1
    torch.manual_seed(0)
    dino = Dinov2Encoder.tiny()
    others = [identity(e) for e in (bit, tiny(layers=-2), tiny(layers="all"), tiny().to(torch.bfloat16), dino)]
    assert len({same, *others}) == 6


def test_a_checkpoints_folder_counts_by_its_files(tmp_path):
    encoder = tiny()
    names = []
    for folder, text in (("a", "{}"), ("b", "{}"), ("c", '{"eps": 1}')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(text)
        encoder.config = encoder.config.model_copy(update={"pretrained": str(tmp_path / folder)})
        names.append(identity(encoder))
    assert names[0] == names[1] != names[2]


def test_other_preprocessing_never_finds_the_old_features(make_vlm, tmp_path):
    store = FeatureStore(tmp_path, 2**24)

    def known(vlm):
        feed = make_feed(vlm, store)
        sample = Sample("s", (Turn("q", "a"),), (Square("red"),))
        example = feed.train(sample)
        feed.batch([example], CPU)
        return not example.pixels

    def with_views(**fields):
        vlm = make_vlm()
        vlm.views = Views(ImageConfig.model_validate(fields), vlm.encoders[0].geometry.image, vlm.adapter.out)
        vlm.set_trained([])
        return vlm

    def with_mean(value):
        vlm = with_views()
        encoder = vlm.encoders[0]
        image = encoder.geometry.image.model_copy(update={"mean": (value, 0.5, 0.5)})
        object.__setattr__(encoder.geometry, "image", image)
        return vlm

    class Own(type(make_vlm().encoders[0])):
        def preprocess(self, images, resize="native"):
            return super().preprocess(images, resize) * 0.5

    def with_own_preprocessing():
        vlm = with_views()
        vlm.encoders[0].__class__ = Own
        return vlm

    makers = [
        with_views,
        lambda: with_views(resize="crop"),
        lambda: with_views(views="tiles", max_tiles=2),
        lambda: with_mean(0.25),
        with_own_preprocessing,
    ]
    assert [known(make()) for make in makers] == [False] * len(makers)
    assert [known(make()) for make in makers] == [True] * len(makers)


def test_a_file_with_other_bytes_has_another_key_at_once(tmp_path):
    path = tmp_path / "image.bmp"
    Image.new("RGB", (4, 4), "red").save(path)
    red = ImageFile(path).key
    Image.new("RGB", (4, 4), "blue").save(path)
    blue = ImageFile(path).key
    assert red != blue
    now = path.stat().st_mtime_ns
    Image.new("RGB", (4, 4), "green").save(path)
    os.utime(path, ns=(now, now))  # as a clock would have it that ticks less often
    assert ImageFile(path).key not in (red, blue)
    Image.new("RGB", (4, 4), "blue").save(path)
    old = time.time() - 3600
    os.utime(path, (old, old))
    assert ImageFile(path).key == blue
    Image.new("RGB", (4, 4), "red").save(path)
    os.utime(path, (old + 1, old + 1))
    assert ImageFile(path).key == red


def test_a_settled_file_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "image.bmp"
    Image.new("RGB", (4, 4), "green").save(path)
    os.utime(path, (1e9, 1e9))
    key = ImageFile(path).key
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda self: pytest.fail("read again"))
    assert ImageFile(path).key == key


@pytest.mark.parametrize("encoder", [ClipEncoder, Dinov2Encoder])
@pytest.mark.parametrize("views", [{}, {"views": "tiles", "max_tiles": 4}])
def test_bytes_become_the_pixels_that_the_encoder_makes_itself(make_vlm, encoder, views):
    tiny, every = encoder.tiny(), torch.arange(256, dtype=torch.uint8).expand(1, 3, 2, 256)
    spec = tiny.geometry.image
    # as a GPU does it; there the table is the same
    assert torch.equal(looked_up(every, spec), normalise(every, spec))
    cut = Views(ImageConfig.model_validate(views), spec, make_vlm().adapter.out)
    noise = Image.frombytes("RGB", (40, 30), bytes(i * 7919 % 251 for i in range(3600)))
    rgb = cut.bytes(noise, tiny)
    assert rgb.dtype == torch.uint8
    wanted = cut.pixels(noise, tiny)
    assert torch.equal(normalise(rgb, spec), wanted)
    assert torch.equal(looked_up(rgb, spec), wanted)


@pytest.mark.parametrize("encoder", [ClipEncoder, Dinov2Encoder])
def test_what_is_stored_is_what_was_computed(make_vlm, tmp_path, encoder):
    """Two views of the same images: as computed with the store, and as read from it by another process's feed."""
    torch.manual_seed(0)
    vlm = Tiny(make_vlm, encoder.tiny()).vlm
    colours = [Square(name) for name in COLOURS]
    samples = [Sample(f"s{i}", (Turn("q", "a"),), (image,)) for i, image in enumerate(colours)]
    live = make_feed(vlm)
    (pixels,) = live.vision([live.train(sample) for sample in samples], CPU)
    wanted = vlm.encode(0, pixels).tokens
    for _ in range(2):
        feed = make_feed(vlm, FeatureStore(tmp_path, 2**24))
        (found,) = feed.vision([feed.train(sample) for sample in samples], CPU)
        assert torch.equal(found.tokens, wanted)
    assert feed.features[0].computed == 0


def test_features_that_were_read_ahead_are_taken_and_damaged_ones_are_computed_again(make_vlm, tmp_path):
    vlm = make_vlm()
    vlm.set_trained([])
    store = FeatureStore(tmp_path, 2**24)
    samples = [Sample(name, (Turn("q", "a"),), (Square(name),)) for name in COLOURS]
    first = make_feed(vlm, store)
    (wanted,) = first.vision([first.train(sample) for sample in samples], CPU)
    feed = make_feed(vlm, store)
    examples = [feed.train(sample) for sample in samples]
    feed.fetch(examples, pin=False)
    rows = [row for example in examples for row in example.rows[0].values()]
    assert len({id(row.whole_ILND) for row in rows}) == 1, "rows read ahead are one piece of memory"
    assert [row.first for row in rows] == list(range(len(rows)))
    assert join(rows, CPU) is rows[0].whole_ILND
    feed.send(examples, torch.device("meta"))
    sent = {id(row.whole_ILND): row.whole_ILND for example in examples for row in example.rows[0].values()}
    assert [whole.is_meta for whole in sent.values()] == [True]
    feed.fetch(examples, pin=False)
    for order in ([0, 1, 2], [2, 0, 1], [1], [1, 1, 0]):
        rows = [row for i in order for row in examples[i].rows[0].values()]
        assert torch.equal(join(rows, CPU), wanted.tokens[order])
        # beside what is not of the same piece
        assert torch.equal(join([*rows, wanted.tokens], CPU), torch.cat([wanted.tokens[order], wanted.tokens]))
    (data,) = tmp_path.glob("*/*.data")
    data.write_bytes(bytes(data.stat().st_size))
    feed.fetch(examples, pin=False)
    assert not any(example.rows[0] for example in examples)
    (found,) = feed.vision(examples, CPU)
    assert torch.equal(found.tokens, wanted.tokens)
    assert feed.features[0].computed == 3


class Moved(TorchDispatchMode):
    """Counts the elements that are copied from one device to another."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            given = args[1] if func is torch.ops.aten.copy_.default else args[0]
            self.elements += given.numel() if given.device != made.device and given.is_floating_point() else 0
        return made


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2], [2, 3], [1], [0, 2, 0]])
def test_of_a_steps_features_a_micro_batch_sends_its_own_alone(order):
    whole_ILND = torch.randn(4, 1, 2, 3)
    spans = [Span(whole_ILND, place, 1) for place in order]
    with Moved() as moved:
        joined = join(spans, torch.device("meta"))
    assert joined.shape == (len(order), 1, 2, 3)
    assert moved.elements == 6 * len(order)


@pytest.mark.parametrize("room", [2**32, 200, 1])
def test_a_thread_reads_steps_ahead_in_their_order(make_vlm, tmp_path, monkeypatch, room):
    """As beside a GPU, but for the pinned memory."""
    vlm = make_vlm()
    vlm.set_trained([])
    feed = make_feed(vlm, FeatureStore(tmp_path, 2**24))
    steps = [[0, 1, 2], [3], [4, 5, 6, 7], [8, 9], [10, 11]]
    (wanted,) = feed.vision([feed.train(Samples()[i]) for step in steps for i in step], CPU)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    memory = SimpleNamespace(total_memory=100 * 48 * 9)  # 1% holds three steps of three images of the toy
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: memory)
    monkeypatch.setattr("chiasm_experiments.data.loader._Beside", lambda device: nullcontext())
    monkeypatch.setattr("chiasm_experiments.data.loader.AHEAD_BYTES", room)
    sent = []
    monkeypatch.setattr(feed, "send", lambda examples, device: sent.append(len(examples)))
    read = feed.fetch
    monkeypatch.setattr(feed, "fetch", lambda examples, pin: read(examples, pin=not pin))
    made = list(_read_ahead(load_steps(steps, Samples(), feed, CPU), feed, torch.device("cuda", 0)))
    names = [[example.prompt.sample_id for example in examples] for examples in made]
    assert names == [[Samples()[i].id for i in step] for step in steps]
    ahead = {example.prompt.sample_id for examples in made for example in examples if example.rows}
    assert ahead == ({name for step in names for name in step} if room > 1 else {"text3"})
    if room > 200:
        counts = [sum(len(example.images) for example in examples) for examples in made]
        assert sent == [len(step) for step, count in zip(steps, counts, strict=True) if count <= 3]
        assert 0 < len(sent) < len(steps)
    (found,) = feed.vision([example for examples in made for example in examples], CPU)
    assert torch.equal(found.tokens, wanted.tokens)


def test_a_memo_before_the_store_saves_the_reading(make_vlm, tmp_path, monkeypatch):
    vlm = make_vlm()
    vlm.set_trained([])
    sample = Sample("s", (Turn("q", "a"),), (Square("red"),))
    store, memo = FeatureStore(tmp_path, 2**24), FeatureMemo(2**20)
    for _ in range(2):
        feed = make_feed(vlm, store, memo)
        (found,) = feed.vision([feed.train(sample)], CPU)
    monkeypatch.setattr("chiasm_experiments.data.store.Shelf.read", lambda *_: pytest.fail("read"))
    (again,) = feed.vision([feed.train(sample)], CPU)
    assert torch.equal(found.tokens, again.tokens)


def use(folder, vlm, order, told):
    """As a run does, in a process of its own; tells what it computed."""
    torch.set_num_threads(1)
    feed = make_feed(vlm, FeatureStore(folder, 2**24))
    samples = [Sample(str(i), (Turn("q", "a"),), (Shade(i),)) for i in order]
    for first in range(0, len(samples), 6):
        examples = [feed.train(sample) for sample in samples[first : first + 6]]
        (found,) = feed.vision(examples, CPU)
        shades = found.tokens[:, 0, 0, 0].add(1).mul(127.5).round().int().tolist()
        assert shades == order[first : first + 6], "another image's features"
    told.put(feed.features[0].computed)


class Shade:
    """A grey image that takes a while to draw."""

    def __init__(self, shade: int) -> None:
        self.shade = shade
        self.key = f"shade{shade}"

    def load(self) -> Image.Image:
        time.sleep(0.002)
        return Image.new("RGB", (8, 8), (self.shade,) * 3)


def test_runs_that_start_at_once_compute_each_image_once_between_them(make_vlm, tmp_path):
    vlm = make_vlm()
    vlm.set_trained([])
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    forwards, mixed = list(range(60)), [i * 7 % 60 for i in range(60)]
    runs = [context.Process(target=use, args=(tmp_path, vlm, order, told)) for order in (forwards, forwards, mixed)]
    for run in runs:
        run.start()
    computed = [told.get(timeout=60) for _ in runs]
    for run in runs:
        run.join(30)
        assert run.exitcode == 0
    assert sum(computed) == 60


def test_what_travels_to_a_process_that_is_not_forked_has_no_weights_and_does_the_same(make_vlm, tmp_path):
    vlm = make_vlm()
    vlm.set_trained([])
    feed = make_feed(vlm, FeatureStore(tmp_path, 2**24))
    feed.vision([feed.train(Sample("s", (Turn("q", "a"),), (Square("red"),)))], CPU)
    data = _Examples(Samples(), feed)
    pickled = pickle.dumps(data)
    assert len(pickled) < sum(p.nbytes for p in vlm.parameters())
    other = pickle.loads(pickled)
    for index in range(12):
        mine, theirs = data[index], other[index]
        assert torch.equal(mine.prompt.values_3T, theirs.prompt.values_3T)
        assert mine.prompt.views == theirs.prompt.views
        assert mine.keys == theirs.keys
        assert [len(pixels) for pixels in mine.pixels] == [len(pixels) for pixels in theirs.pixels]
        assert all(torch.equal(a, b) for a, b in zip(sum(mine.pixels, ()), sum(theirs.pixels, ()), strict=True))
    assert not any(other[index].pixels for index in (6, 9)), "features on the disk were not seen"


class Broken(Samples):
    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        if index != 5:
            return sample
        return Sample("culprit", (Turn("q", "x"),), (ImageFile("gone.png"),))


@pytest.mark.parametrize("loaders", [0, 1])
def test_an_error_in_any_process_names_the_sample_and_keeps_its_kind(make_vlm, loaders):
    vlm = make_vlm()
    steps = load_steps([range(12)], Broken(), make_feed(vlm), CPU, loaders)
    wanted = r"^image 'gone.png' does not exist\nin sample 'culprit'\n\(sample 5 of the stage's data\)$"
    with pytest.raises(DataError, match=wanted):
        list(steps)


def test_processes_start_without_a_word_on_standard_error(make_vlm, capfd, monkeypatch):
    """Some releases of tokenizers that ran in threads before a fork say so in every child, unless told what to do; and
    Python 3.12 warns of a fork beside threads, which pytest makes an error."""
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.encode_batch(["some words"] * 64)
    vlm = make_vlm()
    vlm.llm.tokenizer = tokenizer
    assert len(list(load_steps([range(12)], Samples(), make_feed(vlm), CPU, 2))) == 1
    assert capfd.readouterr().err == ""


def test_other_steps_than_chunks_come_in_order_with_their_own_pixels(make_vlm):
    vlm = make_vlm(2)
    feed = make_feed(vlm)
    steps = [list(range(11, -1, -1)) * 3, [3], [], [4, 0, 7] * 7]
    alone = list(load_steps(steps, Samples(), feed, CPU))
    beside = list(load_steps(steps, Samples(), feed, CPU, 2))
    assert [len(step) for step in beside] == [len(step) for step in steps]
    for one, other in zip([e for step in alone for e in step], [e for step in beside for e in step], strict=True):
        assert one.prompt.sample_id == other.prompt.sample_id
        assert torch.equal(one.prompt.values_3T, other.prompt.values_3T)
        assert [len(pixels) for pixels in one.pixels] == [len(pixels) for pixels in other.pixels]
        for mine, theirs in zip(one.pixels, other.pixels, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(
    ("device", "pad", "length"),
    [("cuda", "right", 64), ("cuda", "left", None), ("cuda", "packed", None), ("cpu", "right", None)],
)
def test_rows_that_a_gpu_trains_on_have_one_of_few_lengths(make_vlm, monkeypatch, device, pad, length):
    feed, asked = make_feed(make_vlm()), []
    monkeypatch.setattr(feed, "vision", lambda examples, device: [])

    def collated(prompts, vision, **given):
        asked.append(given)
        return torch.empty(0, device="meta")

    monkeypatch.setattr("chiasm_experiments.data.feed.collate", collated)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
    feed.batch([feed.train(Samples()[i]) for i in (0, 3)], torch.device(device), pad=pad)
    assert asked == [{"pad": pad, "length": length}]


def test_on_the_cpu_features_depend_on_no_other_image_of_their_batch():
    """Else a run that was killed, and encodes other images together, would not end with the same bits."""

    def encode(views_V3HW):  # as rounding does, only more
        return Features(views_V3HW.mean((2, 3))[:, None, None] + len(views_V3HW), (1, 1))

    images = {str(i): torch.randn(views, 3, 4, 4) for i, views in enumerate((1, 3, 1, 2))}
    wanted = [Wanted(key, None, lambda key=key: images[key]) for key in images]
    found = []
    for together in (1, 2, 4):
        features = FrozenFeatures(encode, "x", (1, 1), FeatureMemo(2**20), None)
        parts = [wanted[first : first + together] for first in range(0, len(wanted), together)]
        found.append(torch.cat([features.gather(part, torch.device("cpu")).tokens for part in parts]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_features_that_are_sent_ahead_to_a_gpu_are_those_of_the_disk(make_vlm, tmp_path):
    gpu = torch.device("cuda", 0)
    vlm = make_vlm().to(gpu)
    vlm.set_trained([])
    feed = make_feed(vlm, FeatureStore(tmp_path, 2**24))
    steps = [[i % 12, (5 * i) % 12] for i in range(60)]
    wanted = {i: feed.vision([feed.train(Samples()[i])], gpu) for i in range(12)}
    feed.flush()
    for step, examples in zip(steps, load_steps(steps, Samples(), feed, gpu), strict=True):
        assert all(row.whole_ILND.is_cuda for example in examples for row in example.rows[0].values())
        torch.cuda._sleep(10**6)  # the GPU is behind, and memory that it still needs must not be used again
        found = [item.tokens for item in feed.vision(examples, gpu)]
        torch.testing.assert_close(
            found, [torch.cat([item.tokens for i in step for item in wanted[i]])] if found else [], rtol=0, atol=0
        )
