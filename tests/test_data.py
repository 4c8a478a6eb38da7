"""Audio, manifests, blending, batches: on real files."""
import gzip
import io
import json
import multiprocessing
import os
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import soxr
import torch

import config
import data
from data import Clips, Collate, Manifest, open_manifests, train_loader
from tests.helpers import GOLDEN_SPEC, fails_with_one_line, write_manifest
from tools.common import UserError
from tools.data.audio import count_frames, missing_seconds
from tools.data.batches import estimate_tokens, padding_stats, plan_batches

rng = np.random.default_rng(0)
AUDIO_CONFIG = {
    "window_length": 10.0,
    "window_overlap": 0.0,
    "max_num_window": 12,
    "sample_rate": 16000}


def load_audio(path, start=0.0, **changed):
    return data.load_audio(path, start, **(AUDIO_CONFIG | changed))


def tone(seconds, rate, channels=1, hz=440):
    """Channel c is a sine of hz + 100 c."""
    t = np.arange(int(seconds * rate))[:, None] / rate
    hz = hz + 100 * np.arange(channels)
    return np.sin(2 * np.pi * hz * t) * 0.5


def pitch(samples):
    """In Hz, of a second at 16 kHz."""
    return np.abs(np.fft.rfft(samples)).argmax()


# ------------------------------------------------------------------------------------------------------------
# Audio


def encoded(form, seconds=3, rate=48000, channels=1, hz=440):
    """A file of tones in bytes; form: "format" or "format:subtype"."""
    f = io.BytesIO()
    name, _, subtype = form.partition(":")
    soundfile.write(f, tone(seconds, rate, channels, hz), rate, format=name, subtype=subtype or None)
    return f.getvalue()


def patched(raw, **bytes_at):
    """patched(raw, at4=b"...") has these bytes from the fourth on."""
    raw = bytearray(raw)
    for name, new in bytes_at.items():
        offset = int(name[2:])
        raw[offset:offset + len(new)] = new
    return bytes(raw)


def variable_mp3(loudness):
    """A tone whose first second is much louder, or softer: the first frames tell nothing about the others."""
    x = tone(3, 48000)
    x[:48000] = rng.standard_normal((48000, 1)) * loudness
    f = io.BytesIO()
    soundfile.write(f, x, 48000, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    return f.getvalue()


def without_header(mp3):
    return mp3[mp3.index(mp3[:2], 2):]  # frames begin alike


FORMATS = ("WAV:PCM_U8 WAV:PCM_16 WAV:PCM_24 WAV:PCM_32 WAV:FLOAT WAV:DOUBLE WAV:ULAW WAV:ALAW "
           "WAVEX:PCM_24 AIFF AIFF:ULAW CAF RF64 W64 AU FLAC OGG OGG:OPUS MP3").split()
SOUNDS = {form: encoded(form) for form in FORMATS}
NEXT = {form: encoded(form, seconds=2, rate=16000, channels=2, hz=880) for form in FORMATS}
MP3 = SOUNDS["MP3"]
WAV = SOUNDS["WAV:PCM_16"]
FLAC = SOUNDS["FLAC"]
LOUD = variable_mp3(0.3)
SOFT = variable_mp3(0)
TAG = b"ID3\4\0\0\0\7\0\0" + bytes(7 << 14)
WHOLE = SOUNDS | {  # 3 s of 440 Hz
    "4 kHz": encoded("WAV", rate=4000),
    "192 kHz": encoded("WAV", rate=192000, channels=32),
    "mp3.wav": MP3,
    "wav.mp3": WAV,
    "aiff.gsm": SOUNDS["AIFF"],
    "w64.RAW": SOUNDS["W64"],
    "tag.flac": TAG + FLAC,
    "tag.ogg": TAG + SOUNDS["OGG"],
    "tag behind.wav": WAV + TAG,
    "tag behind.mp3": MP3 + TAG,
    "zeros.mp3": bytes(3000) + MP3,
    "loud.mp3": LOUD,
    "garbage.flac": FLAC + rng.bytes(9000),
    "sizes 0.wav": patched(WAV, at4=bytes(4), at40=bytes(4)),
    "sizes of nothing.wav": patched(WAV, at4=b"\x24\0\0\0", at40=bytes(4)),
    "sizes -1.wav": patched(WAV, at4=b"\xff" * 4, at40=b"\xff" * 4)}
SEVERAL = {form: SOUNDS[form] + NEXT[form] for form in ("OGG", "OGG:OPUS", "WAV:PCM_24", "FLAC", "MP3")} | {
    "ogg opus": SOUNDS["OGG"] + NEXT["OGG:OPUS"],  # then 2 s of 880 Hz
    "tags.mp3": MP3 + b"TAG" + bytes(125) + TAG + NEXT["MP3"]}
ESTIMATED = {
    "loud bare.mp3": without_header(LOUD),
    "soft bare.mp3": TAG + without_header(SOFT),
    "bare.mp3": without_header(MP3) + without_header(encoded("MP3", seconds=2, hz=880)),
    "no length.flac": patched(FLAC, at21=bytes([FLAC[21] & 0xF0, 0, 0, 0, 0]))}


FILES = WHOLE | SEVERAL | ESTIMATED


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_what_its_content_says_to_its_end(tmp_path, name):
    path = str(tmp_path / name)
    (tmp_path / name).write_bytes(FILES[name])
    several = name in SEVERAL or name == "bare.mp3"
    frames, rate = count_frames(path)
    seconds = frames / rate
    assert seconds == pytest.approx(5 if several else 3, abs=0.2)
    assert missing_seconds(path) == 0
    for start in (0.0, 1.5, 3.5)[:3 if several else 2]:
        samples, truncated = data.read_samples(path, start, None, **AUDIO_CONFIG)
        assert len(samples) / 16000 == pytest.approx(seconds - start, abs=1e-3)
        assert truncated == 0
        assert samples.dtype == np.int16
        hz = 880 if several else 440
        assert abs(pitch(samples[-16000:]) - hz) < 3
    one_second = AUDIO_CONFIG | {"max_num_window": 1, "window_length": 1.0}
    _, truncated = data.read_clip(path, duration=2.5, **one_second)
    assert truncated == pytest.approx(1.5) or name in ESTIMATED


@pytest.mark.parametrize("seconds, overlap, most, n", [
    (10, 0, 12, 1),
    (10.01, 0, 12, 2),
    (25, 0, 2, 2),
    (0.01, 0, 12, 1),
    (25, 5, 12, 4),
    (30, 5, 3, 3)])
def test_windows(tmp_path, seconds, overlap, most, n):
    soundfile.write(tmp_path / "a.wav", tone(seconds, 16000), 16000)
    windows = load_audio(tmp_path / "a.wav", window_overlap=float(overlap), max_num_window=most)
    assert windows.shape == (n, 160000)
    assert len(data.read_samples(str(tmp_path / "a.wav"), 0.0, 1e-9, **AUDIO_CONFIG)[0]) == 1
    if n > 1 and overlap:
        assert np.array_equal(windows[0, -overlap * 16000:], windows[1, :overlap * 16000])


@pytest.mark.parametrize("subtype, channels, rate", [
    ("PCM_16", 1, 16000),
    ("PCM_24", 3, 16000),
    ("FLOAT", 2, 44100)])
def test_windows_follow_the_published_rule(tmp_path, subtype, channels, rate):
    path = str(tmp_path / "a.wav")
    soundfile.write(path, rng.standard_normal((rate * 12, channels)) * 0.03, rate, subtype=subtype)
    for start in (0.0, 1.37):
        x, _ = soundfile.read(path, dtype="float32", always_2d=True, start=int(start * rate))
        x = soxr.resample(x[:, 0], rate, 16000)
        x = (np.clip(x / np.abs(x).max(), -1, 1) * 32767).astype(np.int16)
        assert np.array_equal(load_audio(path, start).flatten()[:len(x)], x)


def test_the_loudest_channel_replaces_a_silent_first_one(tmp_path, capfd):
    path = str(tmp_path / "a.ogg")
    x = tone(3, 44100, 5) * np.linspace(0, 1, 5)
    soundfile.write(path, x, 44100)
    for _ in range(3):
        windows = load_audio(path)
    assert abs(pitch(windows[0, 8000:24000]) - 840) < 2
    assert capfd.readouterr().err.count(path) <= 1
    soundfile.write(path, x * 0, 44100)
    assert not load_audio(path).any()
    assert not capfd.readouterr().err


def cut(raw):
    """A file whose second half was not written."""
    return raw[:len(raw) // 2] + bytes(len(raw) // 2)


PAGE = b"<!DOCTYPE html>\n<html><body>Access to this file is restricted.</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff\nsize 132\n"
BAD = {  # name: content, what the error says
    "none.wav": (b"", "an empty file"),
    "noise.au": (rng.bytes(5000), "no header"),
    "gzip.wav": (gzip.compress(WAV), ""),
    "0 Hz.wav": (patched(WAV, at24=bytes(4)), ""),
    "2 GHz.wav": (patched(WAV, at24=b"\xff\xff\xff\x7f"), "2147483647 Hz"),
    "two rates.mp3": (without_header(MP3) + without_header(NEXT["MP3"]), "rate or channels"),
    "half.flac": (cut(encoded("FLAC", seconds=12)), ""),
    "half.mp3": (cut(encoded("MP3", seconds=12)), ""),
    "second cut.ogg": (SOUNDS["OGG"] + SOUNDS["OGG"][:60], ""),
    "nothing.wav": (encoded("WAV", seconds=0), "")}
for ending in ("au", "snd", "vox", "gsm", "raw", "mp3", "wav"):
    BAD[f"page.{ending}"] = b"\xef\xbb\xbf" + PAGE, "an HTML page"
    BAD[f"pointer.{ending}"] = POINTER, "a Git LFS pointer"
    BAD[f"json.{ending}"] = b'{"error": "not found"}', "text, no sound"
NO_FILE = {
    "missing": lambda path: None,
    "folder": os.mkdir,
    "fifo": os.mkfifo,
    "loop": lambda path: os.symlink(path, path)}


@pytest.mark.parametrize("name", [*BAD, *NO_FILE, "nan", "late"])
def test_bad_audio_is_one_named_error(tmp_path, name):
    path = str(tmp_path / name)
    cause = ""
    start = 0.0
    if name in BAD:
        content, cause = BAD[name]
        (tmp_path / name).write_bytes(content)
    elif name in NO_FILE:
        NO_FILE[name](path)
    elif name == "nan":
        soundfile.write(path, np.array([0.1, np.nan]), 16000, format="WAV", subtype="FLOAT")
    else:
        start = 13.0
        (tmp_path / name).write_bytes(WAV)
    with pytest.raises((UserError, FileNotFoundError), match=cause or None) as error:
        load_audio(path, start)
    assert str(error.value).startswith(path + ": ")
    assert " object " not in str(error.value)
    assert "\n" not in str(error.value)


def test_damaged_files_give_windows_or_one_named_error(tmp_path):
    errors = 0
    for i in range(180):
        form = ("WAV:PCM_16", "WAV:FLOAT", "FLAC", "OGG", "MP3", "AIFF")[i % 6]
        path = str(tmp_path / f"{i}.{rng.choice(['wav', 'mp3', 'raw'])}")
        raw = bytearray(encoded(form, seconds=0.2, rate=22050, channels=1 + i % 2) * 2)
        if i % 3 == 0:
            raw = raw[:rng.integers(len(raw))]
        else:
            for index in rng.integers(44 if i % 3 == 1 else len(raw), size=5):
                raw[index] = rng.choice([0, 1, 127, 255])
        open(path, "wb").write(raw)
        try:
            windows = load_audio(path)
            assert windows.shape == (1, 160000)
        except UserError as error:
            assert str(error).startswith(path + ": ")
            assert "\n" not in str(error)
            errors += 1
    assert 30 < errors < 150


# ------------------------------------------------------------------------------------------------------------
# Manifests and blending


def edit_manifest(folder, change, n=20):
    """A manifest of n items after change(its content) -> its path."""
    path = write_manifest(folder, "a-AQA/train", [("x.wav", "p", "o")] * n)
    content = json.load(open(path))
    change(content)
    json.dump(content, open(path, "w"))
    return path


WRONG = {
    "total_num": [3],
    "split": [None],
    "split_path": [7, "../x"],
    "data": [[]]}
WRONG_IN_ITEM = {
    "name": [["a"], ["a", 3], "../../x.wav", None],
    "prompt": [None, ["p"]],
    "output": [3, ["o"]],
    "choices": [[1, 2], "a", {"A": "a"}],
    "duration": [float("nan"), float("inf"), 1e300, 10 ** 400, -1, True, None, "3", [1]],
    "audio_start": [float("nan")]}


@pytest.mark.parametrize("key", [*WRONG, *WRONG_IN_ITEM])
def test_a_wrong_key_is_named(tmp_path, key):
    where = key if key in WRONG else rf"data\['11'\] {key}"
    for value in (WRONG | WRONG_IN_ITEM)[key]:
        def change(content):
            mapping = content if key in WRONG else content["data"]["11"]
            mapping[key] = value
        with pytest.raises(UserError, match=rf"train\.json: {where} = "):
            Manifest(edit_manifest(tmp_path, change))


@pytest.mark.parametrize("change", [
    lambda items: items.update({"0": 7}),
    lambda items: items.update(x=items.pop("5")),
    lambda items: items["0"].pop("prompt")])
def test_a_wrong_item_is_named(tmp_path, change):
    with pytest.raises(UserError, match=r"train\.json: data"):
        Manifest(edit_manifest(tmp_path, lambda content: change(content["data"])))


def test_an_empty_split_path_is_data_root(tmp_path):
    path = edit_manifest(tmp_path, lambda content: content.update(split_path=""))
    assert Manifest(path, str(tmp_path))[0]["path"] == f"{tmp_path}/x.wav"


@pytest.mark.parametrize("raw", [
    b"",
    b"[]",
    b"{",
    b"7",
    b"\x00" * 9,
    '{"split": 1}'.encode("utf-16"),
    '{"split": "\xfc"}'.encode("latin-1")])
def test_what_is_no_manifest_is_named(tmp_path, raw):
    (tmp_path / "train.json").write_bytes(raw)
    with pytest.raises(UserError, match=r"train\.json: "):
        Manifest(str(tmp_path / "train.json"))


NAMES = ["a b, c.wav", "-x.wav", "#1%20?.wav", "a/..b.wav", "音 ü\u1e69.wav", "u\u0308s\u0323\u0307.wav"]


@pytest.mark.parametrize("split", ["validation", "dev", "valid", "eval"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_files_of_other_systems(tmp_path, split, form):
    """Names as they are, but for Unicode's composition; a byte-order mark and CRLF; half a surrogate pair."""
    os.mkdir(tmp_path / "a")
    for name in NAMES:
        soundfile.write(tmp_path / unicodedata.normalize(form, name), tone(1, 16000), 16000)
    texts = "\ud83d what?", "😀 \ude00"
    items = [(name, *texts) for name in [*NAMES, "\ud83d.wav"]]
    path = write_manifest(tmp_path, f"a-AQA/{split}", items)
    raw = open(path, "rb").read().replace(b'", ', b'",\r\n')
    open(path, "wb").write(b"\xef\xbb\xbf" + raw)
    c = SimpleNamespace(dataset_file_root=str(tmp_path), data_root=str(tmp_path), cache_dir=None)
    (manifest,) = open_manifests(c, [f"a-AQA/{split}"]).values()
    *found, missing = map(Clips([manifest], None, AUDIO_CONFIG).__getitem__, range(len(items)))
    assert missing["error"]
    for clip in found:
        assert clip["windows"] is not None
        assert clip["prompt"] == "\ufffd what?"
        assert clip["output"] == "😀 \ufffd"


def test_blending_equals_golden(tmp_path):
    if not os.path.exists(f"{GOLDEN_SPEC}/blend_golden.json"):
        assert not os.environ.get("CI"), "in CI the golden blend must be there"
        pytest.skip("blend_golden.json not found")
    for name, case in json.load(open(f"{GOLDEN_SPEC}/blend_golden.json")).items():
        manifest = Manifest(write_manifest(tmp_path, name, [("x.wav", "p", "o")] * case["total_num"]))
        weight = case["dataset_blending_global_weight"] * case["weight"]
        assert [manifest.epoch(e, weight).tolist() for e in range(len(case["epochs"]))] == case["epochs"]


def test_every_pass_visits_every_item_once(tmp_path):
    manifest = Manifest(write_manifest(tmp_path, "a-AQA/train", [("x.wav", "p", "o")] * 101))
    stream = np.concatenate([manifest.epoch(e, 0.37) for e in range(30)])
    for k in range(len(stream) // 101):
        assert sorted(stream[k * 101:(k + 1) * 101]) == list(range(101))


# ------------------------------------------------------------------------------------------------------------
# Samples and batches


def test_a_batch_reports_what_is_missing(tmp_path, tokenizer):
    soundfile.write(tmp_path / "x.wav", tone(1, 16000), 16000)
    soundfile.write(tmp_path / "long.wav", tone(12.5, 16000), 16000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 16000)
    items = [(name, "Q", "A") for name in ("x.wav", "no.wav", "long.wav", "silent.wav")]
    path = write_manifest(tmp_path, "a-AQA/train", [("x.wav", "what?", "a dog " * 50), *items])
    clips = Clips([Manifest(path, str(tmp_path))], None, AUDIO_CONFIG | {"max_num_window": 1})
    collate = Collate(tokenizer, 40, 160000)
    batch = collate([clips[i] for i in range(5)])
    (error,) = batch["errors"]
    assert "no.wav" in error
    assert batch["unfinished"] == batch["truncated_clips"] == 1
    assert batch["truncated_seconds"] == pytest.approx(2.5)
    assert batch["n_windows"].tolist() == [1] * 4
    assert batch["windows"].shape == (4, 160000)
    assert not batch["windows"][3].any()
    labelled = (batch["labels"] != -100).sum(1)
    assert labelled.tolist() == [0, 3, 3, 3]
    nothing = collate([clips[2]])
    assert (nothing["labels"] == -100).all()
    assert not nothing["windows"].any()


def test_planned_windows_are_those_that_are_read(tmp_path, tokenizer):
    """duration counts from audio_start on, of several clips together."""
    soundfile.write(tmp_path / "x.wav", tone(70, 16000), 16000)
    soundfile.write(tmp_path / "y.wav", tone(12, 16000), 16000)
    parts = [(0, 70), (30, 40), (5, 10), (5, 10.5), (61.25, 8.75), (0, 0.5)]
    items = [{"name": "x.wav", "audio_start": start, "duration": seconds} for start, seconds in parts]
    items.append({"name": ["x.wav", "y.wav"], "duration": 82})

    def change(content):
        for i, item in enumerate(items):
            content["data"][str(i)] |= item

    manifest = Manifest(edit_manifest(tmp_path, change, len(items)), str(tmp_path))
    for overlap, most in ((0.0, 12), (0.0, 3), (4.0, 30)):
        clips = Clips([manifest], None, AUDIO_CONFIG | {"window_overlap": overlap, "max_num_window": most})
        *planned, of_two = clips.sizes(tokenizer)[:, 0].tolist()
        *counts, counts_of_two = [clips[i]["n_windows"] for i in range(len(items))]
        assert [[n] for n in planned] == counts
        assert of_two >= max(counts_of_two)
    assert clips[2]["truncated_seconds"] == 0
    assert not clips[2]["windows"][0, 160000:].any()


def flat(plan):
    return [batch.tolist() for micro in plan for batch in micro]


def random_sizes(n, most_windows):
    return np.stack([rng.integers(1, most_windows + 1, n), rng.integers(5, 300, n)], 1)


@pytest.mark.parametrize("n", [0, 7, 3001])
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("options", [
    {},
    {"max_windows": 48},
    {"max_windows": 48, "pool": 1},
    {"multiple": 4}])
def test_batches_have_every_item_once(n, world, options):
    sizes = random_sizes(n, 30)
    plan = plan_batches(sizes, 16, [1, 0], world, **options)
    assert sorted(sum(flat(plan), [])) == list(range(n))
    assert all(len(micro) == world for micro in plan)
    assert len(plan) % options.get("multiple", 1) == 0
    for batch in filter(None, flat(plan)):
        assert len(batch) <= 16
        assert "max_windows" not in options or len(batch) * sizes[batch, 0].max() <= 48
    other_seed = plan_batches(sizes, 16, [1, 1], world, **options)
    assert n < 1000 or flat(plan) != flat(other_seed)


def test_a_step_takes_the_same_items_however_they_are_divided():
    sizes = random_sizes(1000, 12)
    whole = list(map(sorted, flat(plan_batches(sizes, 8, [1, 0], pool=32))))
    ranks = flat(plan_batches(sizes, 4, [1, 0], world=2, pool=32))
    micro_steps = flat(plan_batches(sizes, 4, [1, 0], pool=32, multiple=2))
    for halves in (ranks, micro_steps):
        assert [sorted(a + b) for a, b in zip(halves[::2], halves[1::2])] == whole


def test_the_order_is_the_same_under_every_numpy():
    """Written down under numpy 1.26: runs go on under another."""
    sizes = np.zeros((12, 2), np.int64)
    assert flat(plan_batches(sizes, 2, [42, 3])) == [[5, 4], [2, 8], [0, 6], [1, 10], [9, 3], [7, 11]]


def test_padding_and_the_work_of_ranks():
    """Clips of 1-30 s and 30-300 s mixed, 8 ranks: the promised figures."""
    n = 20_000
    seconds = np.where(rng.random(n) < 0.5, rng.uniform(1, 30, n), rng.uniform(30, 300, n))
    sizes = np.stack([np.ceil(seconds / 10).astype(int), rng.lognormal(3.5, 0.6, n).astype(int) + 5], 1)
    plan = plan_batches(sizes, 16, [1, 0], 8, 256, 48)
    stats = padding_stats(sizes, plan)
    assert stats["window_padding"] <= 0.03
    assert stats["token_padding"] <= 0.10
    assert stats["rank_imbalance"] <= 0.05


def test_token_estimate(tokenizer):
    texts = ["", " ", "a dog barks, twice.", "Ünï 3.5 dB -- (x)", "音楽", "a" * 300, "tab\t\n new"]
    exact = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    assert np.abs(estimate_tokens(tokenizer, texts) - exact).max() <= 1


# ------------------------------------------------------------------------------------------------------------
# Loaders


def loader_config(folder, **options):
    names = {
        "dataset_file_root": folder,
        "data_root": folder,
        "batch_size": 2,
        "num_workers": 2,
        "num_epochs": 4,
        "dataset_blending_config": {"toy-AQA/train": 1.0},
        "dataset_blending_global_weight": 0.7}
    return SimpleNamespace(**(config.defaults() | names | options))


def test_a_loader_that_goes_on_equals_a_new_one(tiny_data, tokenizer):
    """By workers that stay; one epoch from its middle on."""
    c = loader_config(tiny_data)
    plain = loader_config(tiny_data, num_workers=0)
    manifests = open_manifests(c, c.dataset_blending_config)
    loader, workers = None, set()
    for epoch in range(4):
        start = 1 if epoch == 2 else 0
        loader = train_loader(manifests, c, tokenizer, AUDIO_CONFIG, epoch, start=start, loader=loader)
        fresh = train_loader(manifests, plain, tokenizer, AUDIO_CONFIG, epoch, start=start)
        batches, expected = list(loader), list(fresh)
        assert loader.stats == fresh.stats
        assert len(batches) == len(expected) == len(loader.rows) - start
        for a, b in zip(batches, expected):
            assert torch.equal(a["input_ids"], b["input_ids"])
            assert torch.equal(a["windows"], b["windows"])
        workers |= {worker.pid for worker in multiprocessing.active_children()}
    assert len(workers) == 2


def test_a_rank_without_an_item_takes_part(tiny_data, tokenizer):
    c = loader_config(tiny_data, dataset_blending_global_weight=0.125, num_workers=0)
    manifests = open_manifests(c, c.dataset_blending_config)
    labelled = []
    for rank in range(3):
        (batch,) = train_loader(manifests, c, tokenizer, AUDIO_CONFIG, 0, rank, 3)
        labelled.append(bool((batch["labels"] != -100).any()))
    assert sorted(labelled) == [False, False, True]


@pytest.mark.parametrize("setting", [{"max_windows_per_batch": 1}, {"dataset_blending_global_weight": 1e-9}])
def test_a_setting_that_leaves_no_batch_is_refused(tiny_data, tokenizer, setting):
    c = loader_config(tiny_data, **setting)
    with pytest.raises(UserError, match=next(iter(setting))):
        train_loader(open_manifests(c, c.dataset_blending_config), c, tokenizer, AUDIO_CONFIG, 0)


@pytest.mark.slow
def test_a_killed_worker_is_one_line(tiny_config, tmp_path):
    killer = tmp_path / "killer.py"
    killer.write_text("import sys; sys.path.insert(0, '.')\n"
                      "import os, time, data, train, config\n"
                      "data.Clips.__getitem__ = lambda self, i: time.sleep(2) or os.kill(os.getpid(), 9)\n"
                      "config.run(train.main, 'train.py')\n")
    fails_with_one_line(killer, tiny_config, f"--expdir={tmp_path}", "--num_workers=1",
                        saying="DataLoader worker")
