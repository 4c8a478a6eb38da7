"""A public dataset as it was unpacked -> manifests of all its splits.

    python prepare/datasets.py clotho_aqa --from=/data/clotho_aqa
    python prepare/datasets.py esc50 --from=/data/ESC-50-master --to=data/manifests --data_root=data

Nothing is downloaded: --help lists the sources, where each comes from, under which licence, and which files
are expected. Archives may be unpacked into folders of their own. A clip may be in any format; of several the
one in the documented folder is taken, lossless rather than not. Of videos extract the sound first, under the
same name (ffmpeg -i x.mp4 -vn -ac 1 x.wav). What can't be used is left out and counted (exit code 1): missing
clips, metadata that was not downloaded, rows of one id that contradict each other. Prompts are ours
(prompts.json), chosen by clip.

To add a source, describe it in sources.json (see described_items), or write a function that yields
(Name-Task/split, item). For a single table of clips there is prepare/table.py.
"""
import os
import re
import sys
import zlib
from collections import defaultdict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import config as settings
from prepare import datasets_qa
from prepare.manifests import Folder, write_manifests
from tools.common import (UserError, check_folder_writable, decode_text, join_names, optional_import,
                          read_json, read_json_object, shorten)

from_: str = ""  # folder of the source, unpacked
to: str = "data/manifests"  # folder to write <Name-Task>/<split>.json in

PROMPTS = read_json(settings.resolve_path("prepare/prompts.json"))  # {kind: prompts}
DESCRIBED = read_json(settings.resolve_path("prepare/sources.json"))  # {source: its description}


def choose_prompt(kind, clip):
    """A prompt of the kind, for a clip always the same, on every machine."""
    number = zlib.crc32(os.fsencode(os.path.basename(clip)))
    return PROMPTS[kind][number % len(PROMPTS[kind])]


def make_item(kind, clip, output):
    return {"name": clip, "prompt": choose_prompt(kind, clip), "output": output}


def caption_items(task, split, clip, captions, kind="caption"):
    """In train an item a caption; elsewhere one item, asked once, all captions are references."""
    captions = [" ".join(caption.split()) for caption in captions]  # some have line breaks
    if split == "train":
        for caption in captions:
            yield f"{task}/train", make_item(kind, clip, caption)
    else:
        yield f"{task}/{split}", make_item(kind, clip, captions[0]) | {"references": captions}


def described_items(source, form):
    """Items of a source in sources.json. Its rows are those of tables ("files" of "parts": see Folder.parts),
    or "clip" and the named groups of a "pattern" of the clips' paths. Templates of the row's columns are
    "clips" (where the file may be), the names of "manifests", and their "label" or "captions"; "splits" and
    "spelling" are what to write instead. Clips whose first name is in "left_out" are not used.
    """
    if "pattern" in form:
        rows = source.match(form["pattern"], form["example"])
    else:
        rows = source.rows(form["files"], *form["parts"])
    labelled = []  # (manifest and clip, label, what is yielded)
    for row in rows:
        names = [name.format_map(row) for name in form["clips"]]
        if names[0] in form.get("left_out", ()):
            continue
        clip = source.clip(*names)
        for manifest, answer in form["manifests"].items():
            task, split = manifest.format_map(row).split("/")
            split = form.get("splits", {}).get(split, split)
            if not re.match("train|val|test", split):
                raise UserError(f"{row.where}: {split!r}, expected train, val or test")
            if "captions" in answer:
                captions = [caption.format_map(row) for caption in answer["captions"]]
                yield from caption_items(task, split, clip, captions, answer["prompt"])
                continue
            label = answer["label"].format_map(row).strip().lower()
            label = label.replace("_", " ").replace(",", ", ")
            label = form.get("spelling", {}).get(label, label)
            if label.isdigit():  # as in a header of another release
                raise UserError(f"{row.where}: label {label!r}, expected a name")
            item = make_item(answer["prompt"], clip, label)
            labelled.append((f"{task}/{split} {clip}", label, (f"{task}/{split}", item)))
    yield from source.consistent(labelled)


# ------------------------------------------------------------------------------------------------------------
# Sources that need code


def audiocaps(source):
    """AudioCaps: 49,838 / 495 / 975 clips of 10 s of AudioSet; a caption in train, five elsewhere.
    home: https://github.com/cdjkim/audiocaps
    licence: academic use; the clips are YouTube's
    layout: dataset/{train,val,test}.csv; clips {split}/{audiocap_id} or, anywhere, {youtube_id}_{start_time},
        Y{youtube_id} or {youtube_id}
    """
    rows_of_clip = defaultdict(list)
    for row in source.rows(("dataset/{}.csv", "{}.csv"), "train", "val", "test"):
        rows_of_clip[row["part"], row["youtube_id"], row["start_time"]].append(row)
    for (split, ytid, start), rows in rows_of_clip.items():
        folders = ("val", "valid") if split == "val" else (split,)
        numbered = [f"{folder}/{row['audiocap_id']}.wav" for folder in folders for row in rows]
        named = [f"{ytid}_{start}.wav", f"Y{ytid}_{start}.wav", f"Y{ytid}.wav", f"{ytid}.wav"]
        clip = source.clip(*numbered, *named)
        yield from caption_items("audiocaps-AudioCaptioning", split, clip, [row["caption"] for row in rows])


def macs(source):
    """MACS: 3,930 scenes of 10 s, two to five captions each; no split, all of it is train.
    home: https://zenodo.org/records/5114771 (clips: https://zenodo.org/records/2589280)
    licence: the LICENSE files of the two records (what they say was not confirmed)
    layout: MACS.yaml, audio/*.wav of the TAU Urban Acoustic Scenes 2019 development set
    """
    yaml = optional_import("yaml", "MACS.yaml", "prepare")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C: seconds instead of a minute
    for split, path in source.parts(["MACS.yaml"], "train"):
        try:
            content = yaml.load(decode_text(path), loader)
            rows = [(file["filename"], [annotation["sentence"] for annotation in file["annotations"]])
                    for file in content["files"]]
        except (yaml.YAMLError, LookupError, TypeError) as error:  # e.g. of half a file
            raise UserError(f"{path}: not the YAML of MACS ({shorten(error)})") from error
        for name, texts in rows:
            clip = source.clip("audio/" + name, name)
            yield from caption_items("MACS-AudioCaptioning", split, clip, texts)


def wavcaps(source):
    """WavCaps: 403,050 clips of four sources, captioned by a language model; all of it is train.
    home: https://huggingface.co/datasets/cvssp/WavCaps
    licence: academic use; clips under those of their sources
    layout: json_files/ with {as,bbc,fsd,sb}_final.json and blacklist_*.json; clips as unpacked, in folders
        AudioSet_SL_flac, BBC_Sound_Effects_flac, ... with or without _flac (join the split archives: zip -FF)
    Left out are the clips that the blacklists name as of the test splits of AudioCaps and Clotho, of
    UrbanSound8K, ESC-50 and VGGSound. Ids of AudioSet end in .wav, their files in .flac; clips of up to 18 h.
    """
    parts = {"as": "AudioSet_SL", "bbc": "BBC_Sound_Effects", "fsd": "FreeSound", "sb": "SoundBible"}
    blacklist = set()
    for _, path in source.parts(["blacklist_exclude_{}.json"], "test_ac", "ub8k_esc50_vggsound"):
        for name, idents in read_json_object(path).items():
            blacklist.update(f"{name} {str(ident).partition('.')[0]}" for ident in idents)
    if source.left_out:
        raise UserError(f"{join_names(source.left_out)}: without it clips of test splits would be trained on")
    for row in source.rows(["{}_final.json"], *parts):
        name, ident = parts[row["part"]], row["id"].removesuffix(".wav")
        if f"{name.removesuffix('_SL')} {ident}" in blacklist:
            continue
        clip = source.clip(f"{name}_flac/{ident}.flac", f"{name}/{ident}.flac")
        yield from caption_items(f"WavCaps-{name}-AudioCaptioning", "train", clip, [row["caption"]])


def nsynth(source):
    """NSynth: 289,205 / 12,678 / 4,096 notes of 4 s; eval.py scores source and instrument.
    home: https://magenta.tensorflow.org/datasets/nsynth
    licence: CC BY 4.0
    layout: nsynth-{train,valid,test}/examples.json and audio/{note_str}.wav
    """
    form = ("produced by {instrument_family_str}, pitch {pitch}, velocity {velocity}, source "
            "{instrument_source_str}")
    for row in source.rows(["nsynth-{}/examples.json"], "train", "valid", "test"):
        output = form.format_map(row)
        qualities = " and ".join(row["qualities_str"]).replace("_", " ")
        if qualities:
            output += f", and having qualities like {qualities}"
        clip = source.clip("nsynth-{part}/audio/{note_str}.wav".format_map(row))
        split = "val" if row["part"] == "valid" else row["part"]
        yield f"NSynth-MIR/{split}", make_item("note", clip, output)


def vocalsound(source):
    """VocalSound: 21,024 clips of 3,365 people, six sounds; the splits are of different people.
    home: https://github.com/YuanGongND/vocalsound
    licence: CC BY-SA 4.0
    layout: datafiles/{tr,val,te}.json or meta/{tr,val,te}_meta.csv, from which the speakers are read;
        audio_16k/{speaker}_{n}_{label}.wav, or the 44.1 kHz release's audio_44k/ or data_44k/
    """
    splits = {"tr": "train", "val": "val", "te": "test"}
    for part, path in source.parts(["datafiles/{}.json", "meta/{}_meta.csv", "meta/{}_meta.json"], *splits):
        speakers = set(re.findall(r"\b[fm]\d{4}", decode_text(path)))
        for row in source.match(r"/(?P<speaker>[fm]\d{4})_\d+_(?P<label>[a-z]+)\.\w+$",
                                "audio_16k/f0003_0_cough.wav"):
            if row["speaker"] in speakers:
                label = row["label"].replace("throatclearing", "throat clearing")
                yield f"VocalSound-VocalClassification/{splits[part]}", make_item("vocal", row["clip"], label)


FUNCTIONS = {function.__name__: function for function in (
    audiocaps, macs, wavcaps, nsynth, vocalsound, datasets_qa.clotho_aqa, datasets_qa.music_avqa,
    datasets_qa.mmau, datasets_qa.muchomusic, datasets_qa.openaqa, datasets_qa.reasonaqa)}

# ------------------------------------------------------------------------------------------------------------


def source_items(name, source):
    """Yield (Name-Task/split, item)s."""
    if name in DESCRIBED:
        return described_items(source, DESCRIBED[name])
    if name in FUNCTIONS:
        return FUNCTIONS[name](source)
    raise UserError(f"{name!r}: no such source, expected one of {', '.join([*DESCRIBED, *FUNCTIONS])}")


def main(c):
    if len(c.files) != 1 or not c.from_:
        raise UserError("expected the name of a source and --from=folder; --help lists the sources")
    source = Folder(settings.resolve_path(c.from_))
    data_root = settings.resolve_path(c.data_root)
    to = settings.resolve_path(c.to)
    check_folder_writable(to)
    items = ((f"{to}/{name}.json", item) for name, item in source_items(c.files[0], source))
    folder = os.path.relpath(source.path, data_root)
    if folder.startswith(".."):  # not inside data_root: absolute
        folder = source.path
    return write_manifests(items, folder, data_root, source.path) or int(bool(source.left_out))


def print_sources():
    for name, form in DESCRIBED.items():
        print(name, *form["help"], sep="\n    ")
    for name, function in FUNCTIONS.items():
        print(name, function.__doc__, sep="\n    ")


if __name__ == "__main__":
    if "--help" in sys.argv:
        print_sources()
    settings.run(main, __file__, reads=("data_root",), files=True)
