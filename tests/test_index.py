"""The index of a manifest: the items that json.load reads, whole or not there."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from data import Manifest
from tests.helpers import ROOT

OPEN = """import sys; sys.path.insert(0, {root!r})
from data import Manifest
manifest = Manifest({file!r})
print(len(manifest), manifest.items[len(manifest) - 1]['output'], manifest.digest)
"""


TEXTS = ["dog", "Küche 音 😀", 'a "quote"', "back\\slash", "tab\t line\n", '"{},": ,', ", Infinity, "]


def content(n):
    data = {}
    for i in range(n):
        data[str(i)] = {"name": f"ü/{i}.wav", "prompt": TEXTS[i % 7], "output": TEXTS[i % 5]}
    for i in range(0, n, 3):
        data[str(i)] |= {"duration": i / 7, "extra": [{"deep": [None, True, 1e-7]}]}
    head = {"split": "train", "split_path": "ö", "flamingo_task": "x", "total_num": n}
    return head | {"data": data, "more": [1]}


def write(folder, content, **form):
    os.makedirs(f"{folder}/a-AQA", exist_ok=True)
    path = f"{folder}/a-AQA/train.json"
    with open(path, "w", encoding="utf-8") as f:
        json.dump(content, f, **form)
    return path


@pytest.mark.parametrize("n", [0, 30, 1500])
@pytest.mark.parametrize("form", [{}, {"indent": 2}, {"ensure_ascii": False}])
def test_items_are_those_of_the_json(tmp_path, n, form):
    expected = content(n)
    path = write(tmp_path, expected, **form)
    items = list(expected.pop("data").values())
    for _ in range(2):  # built, then read
        manifest = Manifest(path, "root")
        assert len(manifest) == n and list(manifest.items) == items
        assert [manifest.items[i] for i in range(-n, 0)] == items
        assert manifest.head == expected
        with pytest.raises(IndexError):
            manifest.items[n]
        assert sorted(os.listdir(tmp_path / "a-AQA")) == ["train.json", "train.json.index"][:1 + (n >= 1000)]


def test_an_index_spares_the_manifest(tmp_path):
    """A manifest of the same size and time is not read again: here it holds nothing any more."""
    path = write(tmp_path, content(1200))
    items, stat = list(Manifest(path).items), os.stat(path)
    open(path, "w").write(" " * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert list(Manifest(path).items) == items


def test_a_changed_manifest_is_seen(tmp_path):
    expected = content(1200)
    path = write(tmp_path, expected)
    before = Manifest(path)
    expected["data"]["7"]["output"] = "changed"
    write(tmp_path, expected)
    after = Manifest(path)
    assert after.items[7]["output"] == "changed" and after.digest != before.digest
    assert before.items[7]["output"] != "changed"  # a run goes on with what it began with


@pytest.mark.parametrize("damaged", [b"", b"items of a manifest 3\n", b"{}\n", b"\xff" * 5000])
def test_what_is_no_index_is_built_again(tmp_path, damaged):
    expected = content(1100)
    path = write(tmp_path, expected)
    open(path + ".index", "wb").write(damaged)
    for _ in range(2):
        assert list(Manifest(path).items) == list(expected["data"].values())


def test_without_a_place_it_is_kept_in_memory_or_in_cache_dir(tmp_path, capfd):
    expected = content(1300)
    path = write(tmp_path, expected)
    os.makedirs(path + ".index/taken")  # no file can replace it
    assert list(Manifest(path).items) == list(expected["data"].values())
    warning = capfd.readouterr().err
    assert warning.count("\n") == 1 and path in warning and "memory" in warning
    for _ in range(2):
        assert list(Manifest(path, cache_dir=f"{tmp_path}/cache").items) == list(expected["data"].values())
    assert not capfd.readouterr().err and len(os.listdir(tmp_path / "cache")) == 1
    assert sorted(os.listdir(tmp_path / "a-AQA")) == ["train.json", "train.json.index"]


@pytest.mark.slow
def test_killed_builders_and_many_at_once_leave_a_whole_index(tmp_path):
    path = write(tmp_path, content(60_000))
    command = [sys.executable, "-c", OPEN.format(root=ROOT, file=path)]
    builder = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not os.path.exists(path + ".index.tmp"):
        time.sleep(0.001)
        assert builder.poll() is None
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    assert not os.path.exists(path + ".index")
    many = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = {process.communicate(timeout=120)[0] for process in many}
    assert len(outputs) == 1 and outputs.pop().startswith("60000 ")
    assert sorted(os.listdir(tmp_path / "a-AQA")) == ["train.json", "train.json.index"]
