"""The index of a manifest: what json.load reads, in a file that is whole or not there."""
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from data import Manifest
from tests.helpers import ROOT
from tools.data import index

rng = np.random.default_rng(0)
BUILD = ("import sys; sys.path.insert(0, {root!r})\n"
         "from tools.data.index import open_items\n"
         "_, items = open_items({file!r}, lambda i, key, item: (1.0, 1), lambda head, n: None)\n"
         "print(len(items), items[len(items) - 1]['output'], items.path)\n")


def content(n):
    words = ["dog", "Küche", "音", "😀", 'a "quote"', "back\\slash", "tab\t", "\x7f", "line\n", *"{},", '": ']
    data = {}
    for i in range(n):
        text = [" ".join(rng.choice(words, rng.integers(0, 6))) for _ in range(2)]
        data[str(i)] = {"name": f"ü/{i}.wav", "prompt": text[0], "output": text[1]}
        data[str(i)] |= {"duration": float(rng.integers(1, 9))} if rng.random() < 0.5 else {}
        data[str(i)] |= {"extra": [{"deep": [None, True, 1e-7]}, text[0]]} if rng.random() < 0.3 else {}
    head = {"split": "train", "split_path": "ö", "flamingo_task": "x", "total_num": n}
    return head | {"data": data, "more": [1]}


def put(folder, content, **form):
    os.makedirs(f"{folder}/a-AQA", exist_ok=True)
    path = f"{folder}/a-AQA/train.json"
    with open(path, "w", encoding="utf-8") as f:
        json.dump(content, f, **form)
    return path


@pytest.mark.parametrize("n", [0, 1, 30, 1500])
@pytest.mark.parametrize("form", [{}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (",", ":")},
                                  {"sort_keys": True, "indent": "\t"}])
def test_items_are_those_of_the_json(tmp_path, monkeypatch, n, form):
    told = content(n)
    if "sort_keys" in form and n:  # keys in the order of numbers all the same
        form, told = form | {"sort_keys": False}, dict(reversed(told.items()))
    path = put(tmp_path, told, **form)
    for again in range(2):
        manifest = Manifest(path, "root")
        assert len(manifest) == n
        assert list(manifest.items) == list(told["data"].values())
        assert list(manifest.items.many(np.arange(n)[::-1])) == list(told["data"].values())[::-1]
        seconds = [item.get("duration", np.nan) for item in told["data"].values()]
        assert np.array_equal(manifest.items.column("seconds"), np.array(seconds, "f4"), equal_nan=True)
        assert manifest.head["more"] == [1] and manifest.folder == "root/ö"
        assert os.path.exists(path + ".index") == (n >= index.SMALL)
        copy = pickle.loads(pickle.dumps(manifest))
        assert list(copy.items) == list(manifest.items)
        if n:
            assert manifest[n - 1]["prompt"] == manifest.items[-1]["prompt"]
            with pytest.raises(IndexError):
                manifest.items[n]
        if n >= index.SMALL:
            monkeypatch.setattr(index, "build", None)  # the second time nothing is parsed
    files = ["train.json"] + ["train.json.index"] * (n >= index.SMALL)
    assert sorted(os.listdir(tmp_path / "a-AQA")) == files


def test_other_content_of_the_same_size_and_time_is_noticed(tmp_path):
    told = content(1200)
    told["data"]["7"]["output"] = "before"
    path = put(tmp_path, told)
    was, times = Manifest(path), os.stat(path)
    told["data"]["7"]["output"] = "behind"
    put(tmp_path, told)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert os.stat(path).st_size == times.st_size
    assert Manifest(path).items[7]["output"] == "behind"
    assert was.items[7]["output"] == "before"  # a run goes on with what it began with


def test_damaged_indexes_are_made_again(tmp_path):
    told = content(1100)
    path = put(tmp_path, told)
    Manifest(path)
    whole = open(path + ".index", "rb").read()
    flipped = [bytearray(whole) for _ in range(60)]
    text = len(whole) - os.path.getsize(path)  # where it begins
    for i, copy in enumerate(flipped):  # in the first line, what is told, the columns, the text
        copy[rng.integers(*[(0, 40), (64, 300), (300, text), (text, len(whole))][i % 4])] ^= 1 << i % 8
    for damaged in (b"", whole[:40], whole[:-1], whole[:5000], whole + b"x", b"x" * len(whole), whole[::-1],
                    *map(bytes, flipped)):
        open(path + ".index", "wb").write(damaged)
        assert list(Manifest(path).items) == list(told["data"].values())
        assert open(path + ".index", "rb").read() == whole


def test_what_is_read_is_what_json_reads(tmp_path):
    """Mutated manifests: an error that names the file, or exactly json.load's items. Repeated keys aside: an
    item that stands there twice is an error here."""
    raw = open(put(tmp_path, content(12)), "rb").read()
    path, outcomes = f"{tmp_path}/a-AQA/mutated.json", {"same": 0, "error": 0}
    for _ in range(1500):
        mutated = bytearray(raw)
        for _ in range(rng.integers(1, 3)):
            at = int(rng.integers(len(raw)))
            what = bytes([rng.choice(list(b'"{},: \\\xff7\n[\xc3'))])
            kind = rng.integers(3)
            mutated[at:at + (kind > 0)] = what if kind < 2 else b""
        open(path, "wb").write(mutated)
        try:
            manifest = Manifest(path)
        except ValueError as error:
            assert str(error).startswith(path) and "\n" not in str(error)
            outcomes["error"] += 1
            continue
        with open(path, encoding="utf-8") as f:
            assert list(manifest.items) == list(json.load(f)["data"].values())
        outcomes["same"] += 1
    assert min(outcomes.values()) > 100, outcomes


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"7", b"\xef\xbb\xbf{}", b"\x00" * 9,
                                 b'{"data": ' + b"[" * 100000,
                                 '{"split": "ü"}'.encode("latin-1"), b"{} {}"])
def test_what_is_no_manifest_is_named(tmp_path, raw):
    path = tmp_path / "train.json"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="train.json: "):
        Manifest(str(path))


@pytest.mark.parametrize("field", ["duration", "audio_start"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e300", "1e999", "9" * 400, "-1", "true",
                                   "null", '"3"', "[1]"])
def test_seconds_that_are_none_are_named(tmp_path, field, value):
    told = content(20)
    told["data"]["11"][field] = "HERE"
    path = put(tmp_path, told)
    text = open(path, encoding="utf-8").read().replace('"HERE"', value)
    open(path, "w", encoding="utf-8").write(text)
    with pytest.raises(ValueError, match=rf"train\.json: data\['11'\] {field} = .*expected seconds"):
        Manifest(path)


@pytest.mark.parametrize("field", ["name", "prompt", "output"])
def test_halves_of_characters_are_named(tmp_path, field):
    told = content(20)
    told["data"]["3"][field] = "a \ud83d b"
    with pytest.raises(ValueError, match=rf"data\['3'\] {field} = .*expected text"):
        Manifest(put(tmp_path, told))


ITEM = '"name": "x.wav", "prompt": "p: ü", "output": "o"'


@pytest.mark.parametrize("data, more, where", [
    (f'{{"0": {{{ITEM}, "name": "y.wav"}}}}', "", r"data\['0'\] name"),
    (f'{{"0": {{{ITEM}}}, "1": {{"pr\\u006fmpt" : "q", {ITEM}}}}}', "", r"data\['1'\] prompt"),
    (f'{{"0": {{{ITEM}, "ö": 1, "x": {{}}, "ö": 2}}}}', "", r"data\['0'\] ö"),
    (f'{{"0": {{{ITEM}}}}}', f', "data": {{"0": {{{ITEM}}}}}', "data"),
    (f'{{"0": {{{ITEM}}}}}', ', "data": []', "data"),
    (f'{{"0": {{{ITEM}}}}}', ', "split_path": "other"', "split_path"),
    (f'{{"0": {{{ITEM}}}}}', ', "ü": 1, "\\u00fc": 2', "ü")])
def test_keys_that_are_there_twice_are_named(tmp_path, data, more, where):
    """json.load would keep the last, and half of the items might be gone."""
    path = put(tmp_path, {})
    head = '"split": "train", "split_path": ".", "flamingo_task": "x", "total_num": 1'
    open(path, "w", encoding="utf-8").write(f'{{{head}, "data": {data}{more}}}')
    with pytest.raises(ValueError, match=rf"train\.json: {where} is there twice, expected once"):
        Manifest(path)


def test_keys_keep_their_characters(tmp_path):
    told = content(3) | {"Küche 音 \u2028": {"ö": 1}, 'a "\n': 2}
    for form in ({}, {"ensure_ascii": False}):
        assert Manifest(put(tmp_path, told, **form)).head == told | {"data": {}}


def limited(bytes):
    """For a process that may write files of so many bytes at most: what a full disk does to it."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, bytes))


def test_without_room_it_is_kept_in_memory_and_said(tmp_path):
    path = put(tmp_path, content(1300))
    command = [sys.executable, "-c", BUILD.format(root=ROOT, file=path)]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited(20_000))
    assert result.returncode == 0 and result.stdout.split()[0] == "1300", result.stderr
    assert result.stderr.count("\n") == 1 and "train.json: its index is kept in memory" in result.stderr
    assert os.listdir(tmp_path / "a-AQA") == ["train.json"]


def test_cache_dir_serves_where_the_folder_does_not(tmp_path, monkeypatch):
    path, write = put(tmp_path, content(1300)), index.write

    def refuse(target, *rest):
        if target.startswith(f"{tmp_path}/a-AQA"):
            raise PermissionError(f"{target}: read-only")
        write(target, *rest)

    monkeypatch.setattr(index, "write", refuse)
    manifest = Manifest(path, cache_dir=f"{tmp_path}/cache")
    assert manifest.items.path.startswith(f"{tmp_path}/cache/")
    monkeypatch.setattr(index, "build", None)
    assert list(Manifest(path, cache_dir=f"{tmp_path}/cache").items) == list(manifest.items)


@pytest.mark.parametrize("locks", [True, False])
def test_a_manifest_that_goes_while_it_is_read_is_told_as_that(tmp_path, monkeypatch, locks):
    path = put(tmp_path, content(1300))
    gone = lambda *_: open(tmp_path / "gone.json")
    monkeypatch.setattr(index, "build", gone)
    if not locks:
        monkeypatch.setitem(sys.modules, "fcntl", None)  # its import fails
    with pytest.raises(FileNotFoundError, match="gone.json"):
        Manifest(path)
    monkeypatch.undo()
    if not locks:
        monkeypatch.setitem(sys.modules, "fcntl", None)
    assert len(Manifest(path)) == 1300 and sorted(os.listdir(tmp_path / "a-AQA")) == [
        "train.json", "train.json.index"]


def test_killed_builders_and_many_at_once_leave_a_whole_index(tmp_path):
    path = put(tmp_path, content(60_000))
    command = [sys.executable, "-c", BUILD.format(root=ROOT, file=path)]
    for wait in (0.3, 0.6, 0.9, 1.2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    if os.path.exists(path + ".index"):
        os.remove(path + ".index")
    many = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = {process.communicate(timeout=60)[0] for process in many}
    assert len(told) == 1 and told.pop().startswith("60000 ")
    assert sorted(os.listdir(tmp_path / "a-AQA")) == ["train.json", "train.json.index"]
