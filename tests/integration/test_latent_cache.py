"""The latent cache: right entries, no wrong hits, nothing encoded twice, jitter and mirroring kept."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from everydream_kit.data import latent_encoding, workers
from everydream_kit.data.cache import CacheSettings, DiskCache, MemoryCache
from everydream_kit.data.cache_room import choose_cache_mode, estimate_bytes
from everydream_kit.data.epoch_plan import PlanSettings
from everydream_kit.data.image_digests import digest_images
from everydream_kit.data.latents import DiskStore, Entry
from everydream_kit.data.loader import make_loader
from everydream_kit.data.pixels import load_pixels
from everydream_kit.data.scanning import scan_dataset
from everydream_kit.data.text_cache import TextCache, captions_vary
from everydream_kit.errors import ConfigError, DataError, DiskSpaceError

PLAN = PlanSettings(batch_size=2, resolutions=(64,), seed=7)


class CountingEncoder:
    """Stands for the VAE: moments are averages of 8 x 8 pixels, so that they can be checked by hand."""

    def __init__(self, stop_after=None):
        self.count = 0
        self.stop_after = stop_after

    def __call__(self, pixels):
        if self.stop_after is not None and self.count + len(pixels) > self.stop_after:
            raise KeyboardInterrupt
        self.count += len(pixels)
        means = torch.nn.functional.avg_pool2d(pixels.float() / 255, 8)
        return torch.cat([means, means, means[:, :2]], 1)


def write_images(folder, count=3, size=(96, 80)):
    folder.mkdir(exist_ok=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "pictures")


def build(dataset, folder, encoder=None, identity="vae", *, batch_size=4, **settings):
    """A cache on disk, filled."""
    encoder = encoder or CountingEncoder()
    how = {"identity": identity, "folder": folder, "settings": CacheSettings(**settings), "batch_size": batch_size}
    return DiskCache.build(dataset, PLAN, encoder, **how), encoder


def in_memory(dataset, encoder=None, *, num_workers=0, **settings):
    """A cache in memory, empty."""
    encoder = encoder or CountingEncoder()
    return MemoryCache(dataset, encoder, CacheSettings(**settings), num_workers=num_workers), encoder


def run(dataset, cache, **options):
    with make_loader(dataset, PLAN, seed=1, latent_cache=cache, **({"num_epochs": 8} | options)) as loader:
        return [batch for step in loader for batch in step.batches], loader.problems


def test_memory_and_disk_hold_the_moments_of_the_reported_crops(folder, tmp_path):
    dataset = scan_dataset(folder, flip_p=0.5)
    caches = [in_memory(dataset)[0], build(dataset, tmp_path / "cache")[0]]
    results = [run(dataset, cache)[0] for cache in caches]
    results.append(run(dataset, caches[1], num_workers=1)[0])
    seen = set()
    for first, *others in zip(*results, strict=True):
        assert first.pixels is None
        assert first.moments.shape == (len(first.paths), 8, 8, 8)
        assert all(torch.equal(first.moments, other.moments) for other in others)
        for row, draw in enumerate(first.planned.draws):
            image = dataset.image(draw.image)
            address = (first.planned.epoch, dataset.key(draw.image), draw.repeat)
            crop = caches[0].draw_crop(draw.image, image, (64, 64), seed=1, address=address)
            pixels = torch.from_numpy(load_pixels(image.path, (64, 64), crop).pixels.copy()).permute(2, 0, 1)[None]
            assert torch.equal(first.moments[row], CountingEncoder()(pixels)[0].half().float())
            seen.add((draw.image, crop))
    assert len({crop.flip for _, crop in seen}) == 2
    assert len({(index, crop.left, crop.top) for index, crop in seen}) > 2 * 3  # jitter survives


def test_captions_and_mirroring_are_the_same_with_and_without_a_cache(folder):
    dataset = scan_dataset(folder, flip_p=0.5, shuffle_tags=True)
    with_cache = run(dataset, in_memory(dataset)[0])[0]
    without = run(dataset, None)[0]
    assert [batch.captions for batch in with_cache] == [batch.captions for batch in without]


def test_every_crop_is_encoded_once_and_found_again(folder, tmp_path):
    dataset = scan_dataset(folder, flip_p=0.5)
    _, first = build(dataset, tmp_path / "cache", variants=4)
    assert 3 * 2 * 2 <= first.count <= 3 * 4 * 2  # variants may fall on the same crop
    _, second = build(dataset, tmp_path / "cache", variants=4)
    assert second.count == 0


def test_fewer_variants_and_fixed_crops_are_found_among_more(folder, tmp_path):
    dataset = scan_dataset(folder, flip_p=0.5)
    build(dataset, tmp_path / "cache", variants=4)
    assert build(dataset, tmp_path / "cache", variants=2)[1].count == 0
    cache, encoder = build(dataset, tmp_path / "cache", fixed=True)
    assert encoder.count == 3
    assert run(dataset, cache, fixed=True, num_epochs=1)[1] == []


def test_a_renamed_image_is_found_and_a_changed_one_is_not(folder, tmp_path):
    place = tmp_path / "cache"
    per_image = build(scan_dataset(folder), place)[1].count / 3
    (folder / "0.png").rename(folder / "zero.png")
    assert build(scan_dataset(folder), place)[1].count == 0
    stat = (folder / "1.png").stat()
    Image.effect_noise((96, 80), 99).convert("RGB").save(folder / "1.png")
    os.utime(folder / "1.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as some sync tools do
    changed = build(scan_dataset(folder), place)[1].count
    assert 0 < changed <= 2 * per_image


@pytest.mark.parametrize("change", [{"identity": "other vae"}, {"background": "#000000"}])
def test_another_model_or_setting_shares_nothing(folder, tmp_path, change):
    dataset = scan_dataset(folder)
    first = build(dataset, tmp_path / "cache")[1].count
    assert build(dataset, tmp_path / "cache", **change)[1].count == first
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2


def test_a_shard_of_another_identity_is_not_believed(folder, tmp_path, caplog):
    store = DiskStore(tmp_path / "a", "one")
    store.put(b"0" * 16, Entry(torch.zeros(8, 2, 2, dtype=torch.float16)))
    store.flush()
    assert b"0" * 16 in DiskStore(tmp_path / "a", "one")
    assert b"0" * 16 not in DiskStore(tmp_path / "a", "two")
    assert "another model or setting" in caplog.text


def test_an_interrupted_build_goes_on_where_it_was(folder, tmp_path):
    dataset = scan_dataset(folder, flip_p=0.5)
    total = build(dataset, tmp_path / "another")[1].count
    with pytest.raises(KeyboardInterrupt):
        build(dataset, tmp_path / "cache", CountingEncoder(stop_after=5), batch_size=2)
    cache, encoder = build(dataset, tmp_path / "cache")
    assert encoder.count == total - 4
    assert run(dataset, cache)[1] == []


def test_a_damaged_shard_is_encoded_again(folder, tmp_path, caplog):
    dataset = scan_dataset(folder)
    total = build(dataset, tmp_path / "cache")[1].count
    (shard,) = (tmp_path / "cache").rglob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    assert build(dataset, tmp_path / "cache")[1].count == total
    assert "damaged" in caplog.text


def test_an_image_that_cannot_be_encoded_has_no_weight(folder, tmp_path):
    dataset = scan_dataset(folder)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:3000])
    cache, _ = build(dataset, tmp_path / "cache")
    assert [Path(path).name for path in cache.problems] == ["1.png"]
    batches, problems = run(dataset, cache, num_epochs=1)
    weights = {Path(p).name: float(w) for batch in batches for p, w in zip(batch.paths, batch.loss_scale, strict=True)}
    assert weights == {"0.png": 1, "1.png": 0, "2.png": 1}
    assert len(problems) == 1


def test_masks_are_cached_with_their_latents(folder, tmp_path):
    mask = Image.new("L", (96, 80))
    mask.paste(255, (0, 0, 48, 80))
    mask.save(folder / "0.mask.png")
    dataset = scan_dataset(folder, loss_mask="file")
    cached = run(dataset, build(dataset, tmp_path / "cache", crop_jitter=0.0, fixed=True)[0], fixed=True)[0]
    fresh = run(dataset, None, fixed=True)[0]
    for one, two in zip(cached, fresh, strict=True):
        assert (one.mask is None) == (two.mask is None)
        if one.mask is not None:
            assert torch.allclose(one.mask, two.mask, atol=1 / 255)
    assert any(batch.mask is not None for batch in cached)


def test_values_that_are_not_finite_are_refused_by_name(folder, tmp_path):
    def nothing(pixels):
        return torch.full((len(pixels), 8, 8, 8), torch.nan)

    with pytest.raises(DataError, match=r"\d\.png: the VAE encodes it to values that are not finite"):
        build(scan_dataset(folder), tmp_path, nothing)
    cache, _ = in_memory(scan_dataset(folder), nothing)
    with pytest.raises(DataError, match=r"\d\.png: the VAE encodes it to values that are not finite"):
        run(scan_dataset(folder), cache)


def test_the_room_is_estimated_and_checked_before_anything_is_encoded(folder, tmp_path, monkeypatch):
    dataset = scan_dataset(folder, flip_p=0.5)
    estimated = estimate_bytes(dataset, PLAN, variants=4)
    # 3 images x 4 crops x 2 mirrorings x (8 channels x 8 x 8 cells x 2 bytes + a line in the header)
    assert estimated == 24 * (1024 + 128)
    build(dataset, tmp_path / "cache")
    (shard,) = (tmp_path / "cache").rglob("*.safetensors")
    assert estimated / 2 < shard.stat().st_size <= estimated
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 0, 5000))
    encoder = CountingEncoder()
    with pytest.raises(DiskSpaceError, match="Lower cache_variants, set latent_cache_dir"):
        build(dataset, tmp_path / "cache", encoder, "new vae")
    assert encoder.count == 0


def test_in_memory_a_crop_is_encoded_when_it_is_drawn_and_never_again(folder):
    dataset = scan_dataset(folder, flip_p=0.5)
    cache, encoder = in_memory(dataset)
    counts = []
    with make_loader(dataset, PLAN, seed=1, latent_cache=cache, num_epochs=100) as loader:
        for step in loader:
            counts.append(encoder.count)
            assert (step.encoding_seconds > 0) is (len(counts) == 1 or counts[-1] > counts[-2])
    assert counts[0] in {1, 2}  # the first step's images, and no others
    assert counts[1] == 3
    assert 3 < counts[-1] == len(cache) <= 3 * 4 * 2
    assert counts[-10] == counts[-1]


def test_where_a_run_begins_changes_no_latent(folder):
    """A convolution's last digits may depend on how many images go through it together; a resumed run must not see
    that."""
    dataset = scan_dataset(folder, flip_p=0.5)

    def encode(pixels):
        return CountingEncoder()(pixels) + len(pixels) / 16

    whole = run(dataset, in_memory(dataset, encode)[0], num_epochs=6)[0]
    rest = run(dataset, in_memory(dataset, encode)[0], start_epoch=3, start_step=1, num_epochs=3)[0]
    assert 0 < len(rest) < len(whole)
    for one, two in zip(whole[-len(rest) :], rest, strict=True):
        assert one.planned == two.planned
        assert torch.equal(one.moments, two.moments)


def test_many_new_crops_are_decoded_by_other_processes_with_the_same_result(folder, monkeypatch):
    dataset = scan_dataset(folder, flip_p=0.5)
    alone, _ = run(dataset, in_memory(dataset)[0])
    decoded_here = []
    load = workers.load_pixels
    monkeypatch.setattr(workers, "load_pixels", lambda *a, **k: decoded_here.append(a) or load(*a, **k))
    monkeypatch.setattr(latent_encoding, "WORTH_PROCESSES", 3)
    cache, encoder = in_memory(dataset, num_workers=2)
    alongside, _ = run(dataset, cache)
    assert all(torch.equal(one.moments, two.moments) for one, two in zip(alone, alongside, strict=True))
    assert encoder.count == len(cache) > len(decoded_here)


def test_what_was_not_announced_is_encoded_all_the_same(folder):
    dataset = scan_dataset(folder)
    cache, encoder = in_memory(dataset)
    crop = cache.draw_crop(2, dataset.image(2), (64, 64), seed=1, address=(0, "2.png", 0))
    assert cache.find(2, dataset.image(2), (64, 64), crop).moments.shape == (8, 8, 8)
    assert encoder.count == 1


def test_in_memory_a_broken_image_is_tried_once_and_has_no_weight(folder, monkeypatch):
    (folder / "gone.png").write_bytes((folder / "2.png").read_bytes())
    dataset = scan_dataset(folder)
    (folder / "gone.png").unlink()
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:3000])
    decoded, load = [], workers.load_pixels
    monkeypatch.setattr(
        workers,
        "load_pixels",
        lambda path, *a, **k: decoded.append(Path(path).name) or load(path, *a, **k),
    )
    cache, encoder = in_memory(dataset, fixed=True)
    batches, problems = run(dataset, cache, num_epochs=3, fixed=True)
    weights = {Path(p).name: float(w) for batch in batches for p, w in zip(batch.paths, batch.loss_scale, strict=True)}
    assert weights == {"0.png": 1, "1.png": 0, "2.png": 1, "gone.png": 0}
    assert sorted(decoded) == ["0.png", "1.png", "2.png"]
    assert encoder.count == 2
    causes = {Path(problem.path).name: problem.cause for problem in problems}
    assert causes.keys() == {"1.png", "gone.png"}
    assert causes["gone.png"] == "the file cannot be read"
    assert "it could not be encoded" not in causes["1.png"]  # what is wrong with it


@pytest.mark.parametrize(("needed", "expected"), [(25, "memory"), (26, "disk"), (500, "disk"), (501, "off")])
def test_auto_takes_a_quarter_of_memory_or_half_of_the_disk(tmp_path, needed, expected):
    assert choose_cache_mode(needed, tmp_path / "new", free_memory_bytes=100, free_disk_bytes=1000) == expected
    assert choose_cache_mode(0, tmp_path / "new") == "memory"


def test_a_cache_is_refused_where_it_would_give_something_else(folder):
    dataset = scan_dataset(folder)
    cache, _ = in_memory(dataset)
    with pytest.raises(ConfigError, match="cache_latents, plugins"):
        make_loader(dataset, PLAN, seed=1, latent_cache=cache, image_transform=Image.Image.copy)
    with pytest.raises(ConfigError, match="built for 3 images"):
        make_loader(dataset.subset([0, 1]), PLAN, seed=1, latent_cache=cache)
    with pytest.raises(ConfigError, match="fixed=False"):
        make_loader(dataset, PLAN, seed=1, latent_cache=cache, fixed=True)


def test_digests_are_remembered_until_a_file_changes(folder, tmp_path, monkeypatch):
    from everydream_kit.data import image_digests

    pairs = [(str(path), None) for path in sorted(folder.glob("*.png"))]
    memo = tmp_path / "contents.bin"
    first = digest_images(pairs, 3, memo_file=memo)
    assert len({row.tobytes() for row in first}) == 3
    read = []
    whole = image_digests.digest_file
    monkeypatch.setattr(image_digests, "digest_file", lambda path: read.append(path) or whole(path))
    with memo.open("ab") as file:
        file.write(b"torn record")
    assert np.array_equal(digest_images(pairs, 3, memo_file=memo), first)
    assert read == []
    (folder / "1.png").touch()
    assert np.array_equal(digest_images(pairs, 3, memo_file=memo), first)
    assert read == [str(folder / "1.png")]


def test_captions_are_encoded_once_as_long_as_there_is_room():
    from everydream_kit.models.family import Conditioning, join_conditioning

    asked = []

    def encode(captions):
        asked.append(list(captions))
        length = 77 * max(1, *(caption.count("long") + 1 for caption in captions))
        states = torch.stack([torch.full((length, 4), float(len(caption))) for caption in captions])
        return Conditioning(states, states[:, 0])

    cache = TextCache(encode, join=join_conditioning)
    for _ in range(2):
        result = cache.encode(["a cat", "", "a cat"])
        assert result.encoder_hidden_states[:, 0, 0].tolist() == [5, 0, 5]
        assert result.pooled.shape == (3, 4)
    assert asked == [["a cat"], [""]]
    joined = cache.encode(["a cat", "a long cat"])
    assert joined.encoder_hidden_states.shape == (2, 154, 4)
    assert joined.lengths == (77, 154)  # the shorter one is padded, and the lengths say so
    assert asked == [["a cat"], [""], ["a long cat"]]
    small = TextCache(encode, max_bytes=cache.num_bytes // 3, join=join_conditioning)
    small.encode(["one", "two", "three", "four"])
    assert len(small) == 1


@pytest.mark.parametrize(
    ("text", "shuffle", "vary"), [("a, b, c", True, True), ("a, b, c", False, False), ("a cat", True, False)]
)
def test_captions_vary_only_where_something_is_drawn(tmp_path, text, shuffle, vary):
    write_images(tmp_path / "p", count=1)
    (tmp_path / "p" / "0.txt").write_text(text)
    assert captions_vary(scan_dataset(tmp_path / "p", shuffle_tags=shuffle)) == vary
