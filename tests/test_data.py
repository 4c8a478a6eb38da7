"""Audio loading, manifests, blending, batches: on real files."""
import io
import json
import os
import struct
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

import config
import data
from data import Clips, Collate, Manifest, make_labels, open_manifests, train_loader
from prepare.manifests import seconds_of
from tests.helpers import GOLDEN_SPEC, fails_with_one_line, run, write_manifest
from tools.data import batches as costs
from tools.data import audio as sound
from tools.data.batches import Batches

rng = np.random.default_rng(0)
AUDIO_SETTINGS = dict(window_length=10.0, window_overlap=0.0, max_num_window=12)


def load_audio(path, start=0.0, **audio_config):
    return data.load_audio(path, start, **(AUDIO_SETTINGS | audio_config))


def tone(seconds, rate, channels=1, hz=440):
    t = np.arange(int(seconds * rate)) / rate
    return np.stack([np.sin(2 * np.pi * (hz + 100 * c) * t) * 0.5 for c in range(channels)], 1)


@pytest.mark.parametrize("name, subtype", [
    ("a.wav", "PCM_16"), ("a.wav", "PCM_24"), ("a.wav", "FLOAT"),
    ("a.wav", "ULAW"), ("a.wav", "ALAW"), ("a.wav", "PCM_U8"),
    ("a.flac", None), ("a.ogg", None), ("a.mp3", None), ("a.aiff", None), ("a.opus", None)])
def test_formats(tmp_path, name, subtype):
    path = tmp_path / name
    rate = 48000 if name.endswith("opus") else 44100
    opus = {"format": "OGG", "subtype": "OPUS"} if name.endswith("opus") else {"subtype": subtype}
    soundfile.write(path, tone(3.0, rate, 2), rate, **opus)
    x = load_audio(str(path))
    assert x.shape == (1, 160000) and x.dtype == np.int16 and 0.99 < np.abs(x).max() / 32767 <= 1
    spectrum = np.abs(np.fft.rfft(x[0, 8000:40000]))
    assert abs(spectrum.argmax() / 2 - 440) < 2  # the first channel's tone, at its pitch


@pytest.mark.parametrize("seconds, overlap, most, n", [
    (10, 0, 12, 1), (10.01, 0, 12, 2), (25, 0, 12, 3), (25, 0, 2, 2), (0.01, 0, 12, 1),
    (25, 5, 12, 4), (30, 5, 3, 3), (15, 5, 12, 2)])
def test_windows(tmp_path, seconds, overlap, most, n):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(seconds, 16000), 16000)
    x = load_audio(str(path), window_overlap=float(overlap), max_num_window=most)
    assert x.shape == (n, 160000)
    if n > 1 and overlap:
        assert np.array_equal(x[0, -overlap * 16000:], x[1, :overlap * 16000])


def test_start_silence_channels_and_rates(tmp_path):
    silent, many, fast = (str(tmp_path / n) for n in ("silent.wav", "many.wav", "fast.wav"))
    soundfile.write(silent, np.zeros(16000), 16000)
    assert not load_audio(silent).any()
    soundfile.write(many, tone(1, 44100, 7), 44100)
    soundfile.write(fast, tone(1, 192000), 192000)
    assert load_audio(many).shape == load_audio(fast).shape == (1, 160000)
    later = load_audio(many, start=0.5)
    assert np.abs(later[0, :7900]).max() > 0.9 * 32767 and not later[0, 8100:].any()


def test_bad_audio_is_named(tmp_path):
    empty, text, gone = (str(tmp_path / n) for n in ("empty.wav", "text.wav", "none.wav"))
    soundfile.write(empty, np.zeros(0), 16000)
    open(text, "w").write("not a sound")
    for path, error in ((empty, ValueError), (text, ValueError), (gone, FileNotFoundError)):
        with pytest.raises(error, match=os.path.basename(path)):
            load_audio(path)
    with pytest.raises(ValueError, match="no audio from 5"):
        soundfile.write(empty, np.ones(100), 16000)
        load_audio(empty, start=5)


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


BROKEN = {"total_num": 3, "split": "validation", "split_path": 7, "data": [], "flamingo_task": None}


@pytest.mark.parametrize("key", list(BROKEN))
def test_broken_manifest_names_file_key_and_expectation(tmp_path, key):
    path = write_manifest(tmp_path, "a-AQA/train", [("x.wav", "p", "o")] * 2)
    content = json.load(open(path)) | {key: BROKEN[key]}
    json.dump(content, open(path, "w"))
    with pytest.raises(ValueError, match=rf"train\.json: {key}.*expected"):
        Manifest(path)


@pytest.mark.parametrize("item, message", [
    ({"name": ["a"]}, "name"), ({"name": ["a", 3]}, "name = '3', expected a str"),
    ({"name": ["a", "b\ud800"]}, "name = .*expected text"),
    ({"prompt": None}, "prompt"), ({"duration": "10"}, "duration"),
    ({"name": "../../x.wav"}, "inside data_root")])
def test_broken_items(tmp_path, item, message):
    path = write_manifest(tmp_path, "a-AQA/train", [("x.wav", "p", "o")] * 2)
    content = json.load(open(path))
    content["data"]["1"] |= item
    json.dump(content, open(path, "w"))
    with pytest.raises(ValueError, match=rf"data\['1'\].*{message}"):
        Manifest(path)


def test_batches_are_a_seeded_partition_with_equal_work():
    sizes = np.stack([rng.integers(1, 13, 1000), rng.integers(5, 300, 1000)], 1)
    plans = [Batches(sizes, 4, [1, 0], rank, 2).mine for rank in (0, 1)]
    assert sorted(i for plan in plans for batch in plan for i in batch) == list(range(1000))
    assert Batches(sizes, 4, [1, 0], 0, 2).mine == plans[0] != Batches(sizes, 4, [1, 1], 0, 2).mine
    assert Batches(sizes, 4, [1, 0], 0, 2, start=7).mine == plans[0][7:]
    work = np.array([[sizes[b, 0].sum() for b in plan] for plan in plans])
    assert (np.abs(work[0] - work[1]) / work.mean(0)).mean() < 0.1
    padded = sum(len(b) * sizes[b, 0].max() for plan in plans for b in plan)
    assert 1 - sizes[:, 0].sum() / padded < 0.16  # the paper's figure for its dynamic batching
    one = Batches(sizes, 8, [1, 0]).mine  # one rank with twice the batch sees the same global batches
    assert [sorted(a + b) for a, b in zip(*plans)] == [sorted(b) for b in one]


def test_the_order_is_the_same_under_every_numpy():
    """Written down under numpy 1.26, whose nested seeds the flat ones replaced: runs go on under another."""
    sizes = np.zeros((12, 2), np.int64)
    assert Batches(sizes, 2, [42, 3]).mine == [[5, 4], [2, 8], [0, 6], [1, 10], [9, 3], [7, 11]]
    sizes = np.arange(24).reshape(12, 2)
    plan = Batches(sizes, 2, [2 ** 40, 3], pool=2).mine  # a seed of more than 32 bits
    assert plan == [[5, 10], [0, 3], [1, 2], [6, 7], [8, 9], [4, 11]]


def test_labels_naive():
    ids = rng.integers(0, 6, (200, 12))
    labels = make_labels(ids, sep_id=1, end_id=2, pad_id=0)
    for row, got in zip(ids.tolist(), labels.tolist()):
        want = [-100] * 12
        if 1 in row and 2 in row:
            for t in range(row.index(1) + 1, 12):
                want[t] = row[t] if row[t] != 0 else -100
        assert want == got


def test_cut_and_unreadable_samples_are_counted(tmp_path, tokenizer):
    soundfile.write(tmp_path / "x.wav", tone(1, 16000), 16000)
    items = [("x.wav", "what?", "a dog " * 50), ("no.wav", "what?", "a"), ("x.wav", "Q", "A")]
    path = write_manifest(tmp_path, "a-AQA/train", items)
    clips = Clips([Manifest(path, str(tmp_path))], None, AUDIO_SETTINGS)
    batch = Collate(tokenizer, 40, 160000)([clips[i] for i in range(3)])
    assert batch["cut"] == 1 and len(batch["bad"]) == 1 and "no.wav" in batch["bad"][0]
    assert batch["n_windows"].tolist() == [1, 1] and batch["windows"].shape == (2, 160000)
    assert (batch["labels"][0] == -100).all() and (batch["labels"][1] != -100).sum() == 3
    nothing = Collate(tokenizer, 40, 160000)([clips[1]])
    assert (nothing["labels"] == -100).all() and not nothing["windows"].any()


def test_windows_stay_int16_until_the_model(tmp_path):
    """One conversion: the published rule x 32767, truncated, and the model's first line undoes it."""
    from model import to_float
    soundfile.write(tmp_path / "x.wav", rng.standard_normal(20000) * 0.1, 16000, subtype="FLOAT")
    sound, _ = soundfile.read(tmp_path / "x.wav", dtype="float32")
    x = load_audio(str(tmp_path / "x.wav"))
    assert np.array_equal(x[0, :20000], (sound / np.abs(sound).max() * 32767).astype(np.int16))
    assert torch.equal(to_float(torch.from_numpy(x)), torch.from_numpy(x.astype(np.float32)) / 32767)


# ------------------------------------------------------------------------------------------------------------
# What decoders miss and get wrong


@pytest.mark.parametrize("name, subtype", [("a.wav", "PCM_16"), ("a.flac", "PCM_16"), ("a.wav", "PCM_24"),
                                           ("a.wav", "FLOAT"), ("a.ogg", None)])
@pytest.mark.parametrize("channels, rate", [(1, 16000), (3, 16000), (2, 44100)])
def test_windows_are_those_of_the_plain_rule(tmp_path, name, subtype, channels, rate):
    import soxr
    path = str(tmp_path / name)
    soundfile.write(path, rng.standard_normal((rate * 12, channels)) * 0.03, rate, subtype=subtype)
    for start in (0.0, 1.37):
        x = soundfile.read(path, dtype="float32", always_2d=True, start=int(start * rate))[0][:, 0]
        x = soxr.resample(x, rate, 16000) if rate != 16000 else x
        x = (np.clip(x / np.abs(x).max(), -1, 1) * 32767).astype(np.int16)
        assert np.array_equal(load_audio(path, start).flatten()[:len(x)], x)


def mp3_without_header(loud_first):
    """30 s whose first frames are much louder, or softer, than the rest: bytes of frames alone."""
    parts = [rng.standard_normal(5 * 44100) * 0.3, np.zeros(25 * 44100)]
    whole = io.BytesIO()
    soundfile.write(whole, np.concatenate(parts[::1 if loud_first else -1]), 44100, format="MP3",
                    bitrate_mode="VARIABLE", compression_level=0.5)
    raw, kbits = whole.getvalue(), (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
    first = 144000 * kbits[raw[2] >> 4] // 44100 + (raw[2] >> 1 & 1)  # its length: the frame of the header
    assert b"Xing" in raw[:first] and raw[first] == 255
    return raw, raw[first:]


@pytest.mark.parametrize("loud_first", [True, False])
@pytest.mark.parametrize("tags", [(b"", b""), (b"ID3\4\0\0\0\0\2\0" + bytes(256), b"TAG" + b"x" * 125)])
def test_mp3s_are_heard_whole(tmp_path, loud_first, tags):
    raw, bare = mp3_without_header(loud_first)
    files = {"headed": raw, "bare": tags[0] + bare + tags[1], "twice": tags[0] + raw + raw + tags[1]}
    for name, frames in files.items():
        (tmp_path / f"{name}.mp3").write_bytes(frames)
        x, rate, frames = sound.decode(str(tmp_path / f"{name}.mp3"), 0.0, 120.0, count=True)
        assert len(x) == frames and abs(len(x) / rate - (60 if name == "twice" else 30)) < 0.2
        later, _, _ = sound.decode(str(tmp_path / f"{name}.mp3"), 21.0, 2.0)
        assert len(later) == 2 * rate and np.abs(later - x[21 * rate:23 * rate]).max() < 1e-4
        assert seconds_of(str(tmp_path / f"{name}.mp3")) == frames / rate  # prepare/'s, not an estimate


def flac_without_length(path):
    """As streaming encoders leave it: 36 bits of its first block."""
    raw = bytearray(open(path, "rb").read())
    raw[21] &= 0xF0
    raw[22:26] = bytes(4)
    open(path, "wb").write(raw)
    return raw


@pytest.mark.parametrize("channels", [1, 2])
def test_flacs_that_tell_no_length(tmp_path, channels):
    path, x = str(tmp_path / "a.flac"), rng.standard_normal((12 * 44100, channels)) * 0.1
    soundfile.write(path, x, 44100)
    whole = {start: load_audio(path, start) for start in (0, 2.5, 11.9)}
    raw = flac_without_length(path)
    for start, windows in whole.items():
        assert np.array_equal(load_audio(path, start), windows)
        assert data.read_clip(path, start, 10.0, 0.0, 12, seconds=4.0)[0].shape == (1, 160000)
    assert sound.decode(path, 0, 3.0, count=True)[2] == len(x) and sound.length(path) == (len(x), 44100)
    for start in (12.0, 50.0):
        with pytest.raises(ValueError, match=rf"no audio from {start} s on \(the file has 12.00 s"):
            load_audio(path, start)
    open(path, "wb").write(raw[:len(raw) // 2])
    assert len(sound.decode(path, 1.0, 3.0)[0]) == 3 * 44100
    for start in (0, 2.5, 50):
        with pytest.raises(ValueError, match=r"truncated or damaged: nothing is decoded from 5\.[89] s on"):
            load_audio(path, start)


def test_files_that_end_early_are_told_as_that(tmp_path):
    for name in ("a.flac", "a.mp3"):
        path = str(tmp_path / name)
        soundfile.write(path, rng.standard_normal(12 * 16000) * 0.1, 16000)
        raw = open(path, "rb").read()
        open(path, "wb").write(raw[:len(raw) // 2] + bytes(len(raw) // 2))
        with pytest.raises(ValueError, match=r"truncated or damaged: nothing is decoded from [56]\.\d s on"):
            load_audio(path)


@pytest.mark.parametrize("subtype", ["GSM610", "G721_32", "NMS_ADPCM_16"])
def test_what_cannot_be_seeked_in_is_read_from_its_beginning(tmp_path, subtype):
    path = str(tmp_path / "a.wav")
    soundfile.write(path, tone(5, 8000), 8000, subtype=subtype)
    whole, _, _ = sound.decode(path, 0, 9)
    assert np.array_equal(sound.decode(path, 1.5, 2)[0], whole[12000:28000]) and whole[12000:28000].any()


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
def test_the_loudest_channel_is_heard_where_the_first_is_silent(tmp_path, name, capfd):
    path, channels = str(tmp_path / name), 2 if name == "a.mp3" else 5
    x = tone(3, 44100, channels) * np.linspace(0.01, 1, channels)
    x[:, 0] = 0
    soundfile.write(path, x, 44100)
    if name == "a.flac":
        flac_without_length(path)
    sound.said[0] = 0
    for _ in range(3):
        windows = load_audio(path)
    spectrum = np.abs(np.fft.rfft(windows[0, 8000:40000]))
    assert abs(spectrum.argmax() / 2 - (440 + 100 * (channels - 1))) < 2
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and f"{path}: its first channel is silent, channel {channels}" in told
    soundfile.write(path, x * 0, 44100)
    assert np.abs(load_audio(path)).max() <= 32767 and not capfd.readouterr().err  # all are silent


def test_decoders_write_nothing_to_stderr(tmp_path, capfd):
    path, raw = tmp_path / "a.mp3", bytearray(mp3_without_header(True)[0])
    for at in rng.integers(3000, len(raw), 400):
        raw[at] ^= 255
    path.write_bytes(raw)
    soundfile.read(path, frames=44100 * 20)
    assert capfd.readouterr().err  # libmpg123's lines
    load_audio(str(path))
    with sound.quiet(), sound.quiet():
        os.write(2, b"unheard")
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


FORMS = [("wav", subtype) for subtype in ("PCM_16", "FLOAT", "ULAW", "IMA_ADPCM")]
FORMS += [(form, None) for form in ("flac", "ogg", "mp3", "aiff", "au", "w64", "caf", "rf64")]


def mutated_file(folder, i):
    """One of many kinds of broken, odd and whole files; -> its path."""
    form, subtype = FORMS[rng.integers(len(FORMS))]
    rate, channels = int(rng.choice([8000, 22050, 44100])), int(rng.choice([1, 2]))
    x, kind = rng.standard_normal((int(rng.integers(1, rate)), channels)) * 0.1, rng.integers(9)
    if kind == 0:  # samples that are none
        form, subtype = "wav", "FLOAT"
        x[rng.integers(len(x), size=3)] = rng.choice([np.nan, np.inf, 1e38])
    if kind == 1:
        form, subtype, x = "wav", "PCM_16", rng.standard_normal((500, int(rng.choice([32, 255, 1024]))))
    soundfile.write(f"{folder}/whole", x, rate, format=form.upper(), subtype=subtype)
    raw = bytearray(open(f"{folder}/whole", "rb").read())
    path = f"{folder}/{i}.{form}"
    if kind == 2:
        raw = raw[:rng.integers(len(raw))]
    elif kind == 3:
        for at in rng.integers(len(raw), size=rng.integers(1, 30)):
            raw[at] ^= 1 << rng.integers(8)
    elif kind == 4:
        raw = raw[:0]
    elif kind == 5:  # sizes, rates, channels that are not so
        at = int(rng.integers(4, 44))
        raw[at:at + 4] = struct.pack("<I", int(rng.choice([0, 1, 1023, 65535, 2 ** 31 - 1, 2 ** 32 - 1])))
    elif kind == 6:
        path = f"{folder}/{i}.{rng.choice(['wav', 'mp3', 'raw', 'txt', 'vox', 'm4a', 'sd2'])}"
    elif kind == 7:
        os.makedirs(path)
        return path
    else:
        raw += rng.integers(0, 256, rng.integers(5000), dtype=np.uint8).tobytes()
    open(path, "wb").write(raw)
    return path


def test_whatever_a_file_is_it_is_windows_or_one_line(tmp_path, capfd):
    outcomes = {"windows": 0, "error": 0}
    for i in range(300):
        path = mutated_file(tmp_path, i)
        try:
            windows = load_audio(path)
            assert windows.dtype == np.int16 and windows.shape[1] == 160000 and 1 <= len(windows) <= 12
            outcomes["windows"] += 1
        except (ValueError, FileNotFoundError) as error:
            assert str(error).startswith(path + ": ") and "\n" not in str(error)
            outcomes["error"] += 1
    assert min(outcomes.values()) > 60, outcomes
    assert not capfd.readouterr().err.replace("note: ", "", 1).count("note: ")


# ------------------------------------------------------------------------------------------------------------
# Durations and batches


def test_one_meaning_of_duration(tmp_path):
    """The seconds from audio_start on that the item hears: planned windows are those that are read."""
    soundfile.write(tmp_path / "x.wav", tone(70, 16000), 16000)
    soundfile.write(tmp_path / "y.wav", tone(12, 16000), 16000)
    items = [("x.wav", 0, 70), ("x.wav", 30, 40), ("x.wav", 30, 40.0), ("x.wav", 5, 10), ("x.wav", 5, 10.5),
             ("x.wav", 61.25, 8.75), ("y.wav", 0, 12), ("x.wav", 0, 0.5), (["x.wav", "y.wav"], 0, 82)]
    path = write_manifest(tmp_path, "a-AQA/train", [(name, "p", "o", d) for name, _, d in items])
    content = json.load(open(path))
    for i, (_, start, _) in enumerate(items):
        content["data"][str(i)] |= {"audio_start": start} if start else {}
    json.dump(content, open(path, "w"))
    for overlap, most in ((0.0, 12), (0.0, 3), (4.0, 30)):
        audio_config = AUDIO_SETTINGS | {"window_overlap": overlap, "max_num_window": most}
        clips = Clips([Manifest(path, str(tmp_path))], None, audio_config)
        read = [clips[i] for i in range(len(items))]
        assert clips.sizes()[:-1, 0].tolist() == [sum(clip["n_windows"]) for clip in read[:-1]]
        assert clips.sizes()[-1, 0] >= max(read[-1]["n_windows"])
    part = Clips([Manifest(path, str(tmp_path))], None, AUDIO_SETTINGS)[3]
    assert part["unheard"] == 0 and np.array_equal(part["windows"].numpy(),
                                                   load_audio(str(tmp_path / "x.wav"), 5, max_num_window=1))


def cost_plan(sizes, world, seed=(1, 0), **options):
    options = {"max_windows": 48, "pool": 256} | options
    return [Batches(sizes, 16, list(seed), rank, world, **options).mine for rank in range(world)]


@pytest.mark.parametrize("n", [0, 1, 7, 3001])
@pytest.mark.parametrize("world", [1, 3, 8])
def test_batches_by_cost_have_every_item_once(n, world):
    sizes = np.stack([rng.integers(1, 31, n), rng.integers(5, 300, n)], 1)
    for options in ({}, {"max_windows": None}, {"pool": 1}, {"pool": 2}):
        plan = cost_plan(sizes, world, **options)
        assert sorted(i for rank in plan for batch in rank for i in batch) == list(range(n))
        assert len({len(rank) for rank in plan}) == 1  # as many micro-steps for all: none waits for ever
        most = options.get("max_windows", 48)
        for batch in (batch for rank in plan for batch in rank if batch):
            assert len(batch) <= 16 and (not most or len(batch) * sizes[batch, 0].max() <= most)
        assert plan == cost_plan(sizes, world, **options)
        assert cost_plan(sizes, world, start=3, **options) == [rank[3:] for rank in plan]
    assert n < 1000 or plan != cost_plan(sizes, world, (1, 1), pool=2)


def test_padding_and_the_ranks_shares():
    """Clips of 1-30 s and 30-300 s mixed, 8 ranks: naive sums over the plan, and what it promises."""
    n = 20_000
    seconds = np.where(rng.random(n) < 0.5, rng.uniform(1, 30, n), rng.uniform(30, 300, n))
    sizes = np.stack([np.ceil(seconds / 10).astype(int), rng.lognormal(3.5, 0.6, n).astype(int) + 5], 1)
    plan = cost_plan(sizes, 8)
    real, slots, most, mean = np.zeros(2), np.zeros(2), 0, 0
    for step in zip(*plan):
        work = []
        for batch in step:
            longest = [max((sizes[i, k] for i in batch), default=0) for k in (0, 1)]
            real += [sum(sizes[i, k] for i in batch) for k in (0, 1)]
            slots += [len(batch) * longest[0], len(batch) * longest[1]]
            work.append(10 * sum(sizes[i, 0] for i in batch) + len(batch) * longest[1])
        most, mean = most + max(work), mean + sum(work) / 8
    told = Batches(sizes, 16, [1, 0], 3, 8, max_windows=48, pool=256).stats
    assert told["window_padding"] == pytest.approx(1 - real[0] / slots[0])
    assert told["token_padding"] == pytest.approx(1 - real[1] / slots[1])
    assert told["rank_imbalance"] == pytest.approx(most / mean - 1)
    assert told["window_padding"] <= 0.03 and told["token_padding"] <= 0.10 and told["rank_imbalance"] <= 0.05


def test_token_estimate(tokenizer):
    texts = ["", " ", "a dog barks, twice.", "a\0b", "Ünï 3.5 dB -- (x)", "音楽", "a" * 300, "tab\t\n new"]
    told = costs.about_tokens(tokenizer, texts)
    for text in texts:
        assert abs(told[text] - len(tokenizer(text, add_special_tokens=False)["input_ids"])) <= 1
    assert costs.about_tokens(tokenizer, []) == {}


def loader_config(folder, **options):
    names = {"dataset_file_root": folder, "data_root": folder, "batch_size": 2, "num_workers": 2,
             "dataset_blending_config": {"toy-AQA/train": 1.0}, "dataset_blending_global_weight": 0.7}
    return SimpleNamespace(**(config.defaults() | names | options))


def test_workers_live_through_epochs(tiny_data, tokenizer, monkeypatch):
    """The loader that goes on gives what a new one does, by the same processes; a whole epoch was planned by
    a thread while the one before was read."""
    collate, plan, threads = Collate.__call__, data.plan_epoch, []

    def plan_somewhere(manifests, config, tokenizer, audio_config, epoch, *place):
        if config.num_workers:
            threads.append((epoch, threading.current_thread() is threading.main_thread()))
        return plan(manifests, config, tokenizer, audio_config, epoch, *place)

    monkeypatch.setattr(data, "plan_epoch", plan_somewhere)
    monkeypatch.setattr(Collate, "__call__", lambda self, items: collate(self, items) | {"pid": os.getpid()})
    c, audio_config = loader_config(tiny_data, num_epochs=4), AUDIO_SETTINGS | {"sample_rate": 16000}
    manifests, loader, pids = open_manifests(c, c.dataset_blending_config), None, set()
    for epoch in range(4):
        start = 1 if epoch == 2 else 0
        arguments = manifests, c, tokenizer, audio_config, epoch, 0, 1, start
        loader, record = train_loader(*arguments, loader)
        fresh, other = train_loader(*arguments[:1], loader_config(tiny_data, num_workers=0), *arguments[2:])
        batches, naive = list(loader), list(fresh)
        assert record == other and loader.stats == fresh.stats
        assert len(batches) == len(naive) == len(loader.rows) - start
        for a, b in zip(batches, naive):
            assert torch.equal(a["input_ids"], b["input_ids"]) and torch.equal(a["windows"], b["windows"])
        pids |= {batch["pid"] for batch in batches}
    assert len(pids) == 2
    here, beside = {e for e, main in threads if main}, {e for e, main in threads if not main}
    assert here == {0, 2} and beside == {1, 2, 3}  # of epoch 2 only a part was wanted
    assert loader.plan is None  # there is no epoch 4


def test_a_rank_without_an_item_takes_part(tiny_data, tokenizer):
    c = loader_config(tiny_data, dataset_blending_global_weight=0.125)
    audio_config = AUDIO_SETTINGS | {"sample_rate": 16000}
    manifests = open_manifests(c, c.dataset_blending_config)
    ranks = [list(train_loader(manifests, c, tokenizer, audio_config, 0, rank, 3)[0]) for rank in range(3)]
    learnt = [int((batch["labels"] != -100).sum()) for (batch,) in ranks]
    assert sorted(map(bool, learnt)) == [False, False, True]


def test_max_windows_per_batch_below_a_clip_is_refused(tiny_config, tmp_path):
    fails_with_one_line("train.py", tiny_config, f"--expdir={tmp_path}", "--max_windows_per_batch=1",
                        saying=["max_windows_per_batch = 1", "max_num_window = 2"])


def test_training_by_windows_logs_its_padding(tiny_config, tmp_path):
    run("train.py", tiny_config, f"--expdir={tmp_path}", "--run_name=w", "--max_windows_per_batch=2",
        "--batch_size=4", "--num_workers=1", "--dataset_blending_global_weight=1.0")
    lines = [json.loads(line) for line in open(tmp_path / "w/log.jsonl")]
    padding = [line["window_padding"] for line in lines if "window_padding" in line]
    assert len(padding) == 2 and all(0 <= share < 0.5 for share in padding)
    assert [line["items"] for line in lines if "loss" in line][-1] == 16  # 8 clips, two epochs, each once


def test_a_killed_worker_is_one_line(tiny_config, tmp_path):
    killer = tmp_path / "killer.py"
    killer.write_text("import sys; sys.path.insert(0, '.')\n"
                      "import os, data, train, config\n"
                      "data.Clips.__getitem__ = lambda self, i: os.kill(os.getpid(), 9)\n"
                      "config.run(train.main, 'train.py')\n")
    fails_with_one_line(killer, tiny_config, f"--expdir={tmp_path}", "--num_workers=1",
                        saying=["DataLoader worker", "ended by the system"])


def test_a_disk_that_fills_up_is_one_line(tiny_config, tmp_path):
    limited = tmp_path / "limited.py"
    limited.write_text("import sys; sys.path.insert(0, '.')\n"
                       "import resource, train, config\n"
                       "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
                       "config.run(train.main, 'train.py')\n")
    fails_with_one_line(limited, tiny_config, f"--expdir={tmp_path}", "--run_name=full",
                        saying=["checkpoint_1.pt: could not be written", "disk full"])
    assert os.listdir(tmp_path / "full") == ["log.jsonl"]


@pytest.mark.parametrize("setting", ["--expdir=/dev/null/runs",
                                     "--dataset_blending_output=/dev/null/x/b.jsonl"])
def test_an_unwritable_place_is_told_before_the_work(tiny_config, tmp_path, setting):
    result = fails_with_one_line("train.py", tiny_config, f"--expdir={tmp_path}", setting,
                                 saying=["/dev/null", "cannot be written to"])
    assert "trainable" not in result.stdout
