"""A public dataset as it was unpacked -> manifests of all its splits.

    python prepare/datasets.py clotho_aqa --from=/data/clotho_aqa
    python prepare/datasets.py esc50 --from=/data/ESC-50-master --to=data/manifests --data_root=data

Nothing is downloaded: --help lists the sources, where each comes from, under which licence, and which files are
expected. Archives may be unpacked into folders of their own. A clip may have any ending that soundfile reads; of
videos extract the sound first, under the same name (ffmpeg -i x.mp4 -vn -ac 1 x.wav). Clips that are missing are
left out and counted (exit code 1). Prompts are ours, a few for every kind of question, chosen by the clip's name.
Other sources: prepare/table.py.

A source is a function that yields (Name-Task/split, item); those whose rows are a clip and a label are `labels`.
"""
import os
import re
import sys
import zlib
from collections import defaultdict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import config as settings
from prepare import datasets_qa
from prepare.manifests import Folder, Row, decode_text, write_manifest
from tools.common import UserError, check_folder_writable, join_names, optional_import, read_json_object

from_: str = ""  # folder of the source, unpacked
to: str = "data/manifests"  # folder to write <Name-Task>/<split>.json in

SPLITS = {"training": "train", "development": "train", "tr": "train", "Train": "train",
          "valid": "val", "validation": "val", "dev": "val", "Val": "val",
          "evaluation": "test", "eval": "test", "te": "test", "Test": "test"}  # a source's split: ours

PROMPTS = {
    "caption": ("Describe the audio in one sentence.", "What can be heard in this recording?",
                "Give a caption of the audio.", "Summarise what happens in this clip."),
    "music caption": ("Describe this piece of music.", "What does this music sound like?",
                      "Write a caption for this music."),
    "events": ("Which sounds are in this audio? List them from specific to general.",
               "List the sound events of this clip, from specific to general."),
    "event": ("What sound is this?", "Name the sound event in this clip.", "Which sound do you hear?"),
    "scene": ("In which place was this recorded?", "Name the acoustic scene of this recording.",
              "What kind of place does this sound like?"),
    "vocal": ("Which sound does this person make?", "Name the vocal sound in this clip."),
    "emotion": ("What emotion does the speaker express?", "How does the speaker feel?",
                "Name the emotion in this voice."),
    "sentiment": ("Is the speaker's sentiment positive, negative or neutral?",
                  "Name the sentiment of this utterance."),
    "genre": ("What is the genre of this music?", "Name the genre of this piece."),
    "instrument": ("Which instrument is playing?", "Name the instrument in this clip."),
    "note": ("Describe this note: instrument, pitch, velocity, source and qualities.",
             "What instrument, pitch, velocity, source and qualities does this note have?"),
}


def choose_prompt(kind, clip):
    """A prompt of the kind, for a clip always the same, on every machine."""
    prompts = PROMPTS[kind]
    return prompts[zlib.crc32(os.path.basename(clip).encode("utf-8", "replace")) % len(prompts)]


def make_item(kind, clip, output):
    return {"name": clip, "prompt": choose_prompt(kind, clip), "output": output}


def captions(task, split, clip, texts, kind="caption"):
    """In train an item a caption; elsewhere one item, asked once, all captions are references."""
    texts = [" ".join(text.split()) for text in texts]  # some have line breaks
    if SPLITS.get(split, split) == "train":
        for text in texts:
            yield f"{task}/train", make_item(kind, clip, text)
    else:
        yield f"{task}/{split}", make_item(kind, clip, texts[0]) | {"references": texts}


def labels(rows, name, kind, label, source=None, clips=(), spelling={}):
    """An item a row. name (Name-Task/split), label and clips (where the file may be) are templates of the row's
    columns; without clips the row has "clip". Labels become lower case, with spaces, and a comma between
    several; spelling: {such a label: what to write instead}."""
    for row in rows:
        clip = source.clip(*(path.format_map(row) for path in clips)) if clips else row["clip"]
        text = label.format_map(row).strip().lower().replace("_", " ").replace(",", ", ")
        yield name.format_map(row), make_item(kind, clip, spelling.get(text, text))


# ------------------------------------------------------------------------------------------------------------
# Captions


def audiocaps(source):
    """AudioCaps: 49,838 / 495 / 975 clips of 10 s of AudioSet; a caption in train, five elsewhere.
    home: https://github.com/cdjkim/audiocaps
    licence: academic use; the clips are YouTube's
    layout: dataset/{train,val,test}.csv; clips {split}/{audiocap_id} or, anywhere, {youtube_id}_{start_time},
        Y{youtube_id} or {youtube_id}
    """
    rows_of_clip = defaultdict(list)
    for row in source.rows(("dataset/{}.csv", "{}.csv"), "train", "val", "test"):
        start = row["start_time"].removesuffix(".0")
        rows_of_clip[row["split"], row["youtube_id"], start].append(row)
    for (split, ytid, start), rows in rows_of_clip.items():
        folders = ("val", "valid") if split == "val" else (split,)
        numbered = [f"{folder}/{row['audiocap_id']}.wav" for folder in folders for row in rows]
        named = [f"{ytid}_{start}.wav", f"Y{ytid}_{start}.wav", f"Y{ytid}.wav", f"{ytid}.wav"]
        clip = source.clip(*numbered, *named)
        yield from captions("audiocaps-AudioCaptioning", split, clip, [row["caption"] for row in rows])


def clotho(source):
    """Clotho v2.1: 3,839 / 1,045 / 1,045 clips of 15 to 30 s, five captions each.
    home: https://zenodo.org/records/4783391
    licence: captions: Tampere University's own (LICENSE file); clips: those of Freesound, in the metadata
    layout: clotho_captions_{development,validation,evaluation}.csv, {development,validation,evaluation}/*.wav
    Names hold leading, trailing and double spaces and commas.
    """
    for row in source.rows(["clotho_captions_{}.csv"], "development", "validation", "evaluation"):
        clip = source.clip(f"{row['part']}/{row['file_name']}")
        texts = [row[f"caption_{i}"] for i in range(1, 6)]
        yield from captions("Clotho-v2-AudioCaptioning", row["split"], clip, texts)


def macs(source):
    """MACS: 3,930 scenes of 10 s, two to five captions each; no split, all of it is train.
    home: https://zenodo.org/records/5114771 (clips: https://zenodo.org/records/2589280)
    licence: the LICENSE files of the two records (what they say was not confirmed)
    layout: MACS.yaml, audio/*.wav of the TAU Urban Acoustic Scenes 2019 development set
    """
    yaml = optional_import("yaml", "MACS.yaml", "prepare")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C: seconds instead of a minute
    for split, path in source.parts(["MACS.yaml"], "train"):
        for file in yaml.load(decode_text(path), loader)["files"]:
            clip = source.clip("audio/" + file["filename"], file["filename"])
            texts = [annotation["sentence"] for annotation in file["annotations"]]
            yield from captions("MACS-AudioCaptioning", split, clip, texts)


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
    for row in source.rows(["{}_final.json"], *parts):
        name, ident = parts[row["part"]], str(row["id"]).removesuffix(".wav")
        if f"{name.removesuffix('_SL')} {ident}" in blacklist:
            source.notes["clips of the blacklists are left out"] += 1
            continue
        clip = source.clip(f"{name}_flac/{ident}.flac", f"{name}/{ident}.flac")
        yield from captions(f"WavCaps-{name}-AudioCaptioning", "train", clip, [row["caption"]])


def musiccaps(source):
    """MusicCaps: captions of 10 s of AudioSet's music; test is AudioSet's evaluation part (2,858 of 5,521).
    home: https://huggingface.co/datasets/google/MusicCaps
    licence: CC BY-SA 4.0; the clips are YouTube's
    layout: musiccaps-public.csv; clips [{ytid}]-[{start_s}-{end_s}], or {ytid}
    """
    for row in source.rows(["musiccaps-public.csv"], "all"):
        clip = source.clip("[{ytid}]-[{start_s}-{end_s}].wav".format_map(row), f"{row['ytid']}.wav")
        split = "test" if row["is_audioset_eval"].lower() == "true" else "train"
        yield from captions("MusicCaps-AudioCaptioning", split, clip, [row["caption"]], "music caption")


# ------------------------------------------------------------------------------------------------------------
# Sounds and scenes


def fsd50k(source):
    """FSD50K: 40,966 and 10,231 clips of up to 30 s, several of 200 classes each, with all their ancestors.
    home: https://zenodo.org/records/4060432
    licence: CC BY 4.0 as a whole; each clip CC0, BY, BY-NC or Sampling+
    layout: FSD50K.ground_truth/{dev,eval}.csv, FSD50K.{dev,eval}_audio/*.wav (join the split archives first)
    A name with "_and_" is one label; labels stand in the order of the file, specific ones first.
    """
    rows = source.rows(("FSD50K.ground_truth/{}.csv", "{}.csv"), "dev", "eval")  # dev.csv has a column split
    clips = "FSD50K.{part}_audio/{fname}.wav", "{part}_audio/{fname}.wav", "{part}/{fname}.wav"
    return labels(rows, "FSD50k-EventClassification/{split}", "events", "{labels}", source, clips)


def cochlscene(source):
    """CochlScene: 76,115 clips of 10 s, 13 scenes, splits of different users.
    home: https://zenodo.org/records/7080122
    licence: CC BY-SA 3.0
    layout: {Train,Val,Test}/{Scene}/{Scene}_{user}_{submission}_{segment}.wav (join the split archives first)
    Labels in lower case without spaces ("crowdedindoor"), as the published system has them.
    """
    rows = source.match(r"/(?P<split>Train|Val|Test)/(?P<label>[A-Za-z]+)/(?P=label)_[^/]+\.\w+$",
                        "Train/Bus/Bus_user0009_14897252_005.wav")
    return labels(rows, "CochlScene-SceneClassification/{split}", "scene", "{label}")


def nonspeech7k(source):
    """NonSpeech7k: 6,289 and 725 clips of up to 4 s, seven sounds of people.
    home: https://zenodo.org/records/6967442
    licence: the record says CC BY 4.0, its description CC BY-NC-SA 4.0
    layout: "metadata of train set .csv" (with the space), "metadata of test set.csv", train/*.wav, test/*.wav
    The two headers differ, test writes "yawm". Four recordings have clips in both splits.
    """
    rows = source.rows(("metadata of {} set .csv", "metadata of {} set.csv"), "train", "test")
    clips = "{part}/{Filename}", "{Filename}"
    return labels(rows, "NonSpeech7k-EventClassification/{part}", "vocal", "{Classname}", source, clips,
                  {"yawm": "yawn"})


def vocalsound(source):
    """VocalSound: 21,024 clips of 3,365 people, six sounds; the splits are of different people.
    home: https://github.com/YuanGongND/vocalsound
    licence: CC BY-SA 4.0
    layout: datafiles/{tr,val,te}.json or meta/{tr,val,te}_meta.csv, from which the speakers are read;
        audio_16k/{speaker}_{n}_{label}.wav, or the 44.1 kHz release's audio_44k/ or data_44k/
    """
    files = "datafiles/{}.json", "meta/{}_meta.csv", "meta/{}_meta.json"
    for split, path in source.parts(files, "tr", "val", "te"):
        speakers = set(re.findall(r"\b[fm]\d{4}", decode_text(path)))
        rows = source.match(r"/(?P<speaker>[fm]\d{4})_\d+_(?P<label>[a-z]+)\.\w+$",
                            "audio_16k/f0003_0_cough.wav")
        rows = [row for row in rows if row["speaker"] in speakers]
        yield from labels(rows, f"VocalSound-VocalClassification/{split}", "vocal", "{label}",
                          spelling={"throatclearing": "throat clearing"})


def urbansound8k(source):
    """UrbanSound8K: 8,732 clips of up to 4 s, ten classes. Zero-shot: all ten folds are the test split.
    home: https://zenodo.org/records/1203745
    licence: CC BY-NC 3.0
    layout: metadata/UrbanSound8K.csv, audio/fold{1..10}/*.wav
    Which folds the published score is of is not known.
    """
    return labels(source.rows(["UrbanSound8K.csv"], "test"), "UrbanSound8K-EventClassification/test", "event",
                  "{class}", source, ["fold{fold}/{slice_file_name}"])


def esc50(source):
    """ESC-50: 2,000 clips of 5 s, 50 classes. Zero-shot: all five folds are the test split.
    home: https://github.com/karolpiczak/ESC-50
    licence: CC BY-NC 3.0
    layout: meta/esc50.csv, audio/*.wav
    An older esc50.csv, in the root, has a number as category and the label as category_name.
    """
    rows = list(source.rows(("meta/esc50.csv", "esc50.csv"), "test"))
    for row in rows:
        row.setdefault("category_name", row["category"])
    return labels(rows, "ESC50-EventClassification/test", "event", "{category_name}", source,
                  ["audio/{filename}"])


# ------------------------------------------------------------------------------------------------------------
# Music


def nsynth(source):
    """NSynth: 289,205 / 12,678 / 4,096 notes of 4 s; eval.py scores source and instrument.
    home: https://magenta.tensorflow.org/datasets/nsynth
    licence: CC BY 4.0
    layout: nsynth-{train,valid,test}/examples.json and audio/{note}.wav
    """
    form = ("produced by {instrument_family_str}, pitch {pitch}, velocity {velocity}, source "
            "{instrument_source_str}")
    for split, path in source.parts(["nsynth-{}/examples.json"], "train", "valid", "test"):
        for note, cells in read_json_object(path).items():
            row = Row(cells, path)
            output = form.format_map(row)
            if row["qualities_str"]:
                output += ", and having qualities like "
                output += " and ".join(row["qualities_str"]).replace("_", " ")
            clip = source.clip(f"nsynth-{split}/audio/{note}.wav")
            yield f"NSynth-MIR/{split}", make_item("note", clip, output)


def gtzan(source):
    """GTZAN: 10 x 100 clips of 30 s, ten genres; no split: all of it is test.
    home: http://marsyas.info/downloads/datasets.html
    licence: none is stated
    layout: genres/{genre}/{genre}.000NN.wav
    jazz.00054 is left out: it can't be decoded in common copies. The set's known duplicates are not.
    """
    rows = source.match(r"/(?!jazz\.00054)(?P<label>[a-z]+)\.\d{5}\.\w+$", "genres/blues/blues.00000.wav")
    return labels(rows, "GTZAN-GenreClassification/test", "genre", "{label}")


def medley_solos_db(source):
    """Medley-solos-DB: clips of 3 s, eight instruments; 5,841 are train, 12,236 test.
    home: https://zenodo.org/records/3464194
    licence: CC BY 4.0
    layout: Medley-solos-DB_metadata.csv, Medley-solos-DB_{subset}-{instrument_id}_{uuid4}.wav
    """
    rows = source.rows(["Medley-solos-DB_metadata.csv"], "all")
    return labels(rows, "Medley-solos-DB-InstrClassification/{subset}", "instrument", "{instrument}", source,
                  ["Medley-solos-DB_{subset}-{instrument_id}_{uuid4}.wav"])


# ------------------------------------------------------------------------------------------------------------
# Voices


def crema_d(source):
    """CREMA-D: 7,442 sentences by 91 actors, six emotions as intended (raters often hear another); no split.
    home: https://github.com/CheyneyComputerScience/CREMA-D
    licence: Open Database License
    layout: AudioWAV/{actor}_{sentence}_{emotion}_{level}.wav (git lfs pull: a zip download holds pointers)
    1076_MTI_SAD_XX is left out: it is silent. One name has a level of one letter.
    """
    rows = source.match(r"/(?!1076_MTI_SAD_XX)\d{4}_[A-Z]{3}_(?P<label>ANG|DIS|FEA|HAP|NEU|SAD)_\w+\.\w+$",
                        "AudioWAV/1001_DFA_ANG_XX.wav")
    emotions = {"ang": "angry", "dis": "disgusted", "fea": "fearful", "hap": "happy", "neu": "neutral",
                "sad": "sad"}
    return labels(rows, "CREMA-D-EmotionClassification/test", "emotion", "{label}", spelling=emotions)


def ravdess(source):
    """RAVDESS: 1,440 spoken and 1,012 sung sentences by 24 actors, eight emotions; no split.
    home: https://zenodo.org/records/1188976
    licence: CC BY-NC-SA 4.0
    layout: Actor_NN/03-{01 speech,02 song}-{emotion}-{intensity}-{statement}-{repetition}-{actor}.wav
    Speech is test, song test_song. Whether the published score has songs in it is not known.
    """
    emotions = {"01": "neutral", "02": "calm", "03": "happy", "04": "sad", "05": "angry", "06": "fearful",
                "07": "disgusted", "08": "surprised"}
    for channel, split in ("01", "test"), ("02", "test_song"):
        rows = source.match(rf"/03-{channel}-(?P<label>0[1-8])(?:-\d\d){{4}}\.wav$", "Actor_01/03-01-01-01-01-01-01.wav")
        yield from labels(rows, f"RAVDESS-EmotionClassification/{split}", "emotion", "{label}", spelling=emotions)


def meld(source):
    """MELD: 9,989 / 1,109 / 2,610 utterances of a series, seven emotions and three sentiments: two manifests.
    home: https://github.com/declare-lab/MELD
    licence: GPL-3.0
    layout: {train,dev,test}_sent_emo.csv; train_splits, dev_splits_complete, output_repeated_splits_test (or
        train, dev, test) with the sound of the mp4s: dia{D}_utt{U}.wav
    dia125_utt3 of train can't be decoded, dia110_utt7 of dev is not there. The times in the CSVs are wrong.
    """
    folders = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}
    broken = ("train/dia125_utt3.wav", "dev/dia110_utt7.wav")
    for row in source.rows(["{}_sent_emo.csv"], *folders):
        file = "dia{Dialogue_ID}_utt{Utterance_ID}.wav".format_map(row)
        if f"{row['part']}/{file}" not in broken:
            row["clip"] = source.clip(f"{folders[row['part']]}/{file}", f"{row['part']}/{file}")
            yield from labels([row], "MELD-EmotionClassification/{part}", "emotion", "{Emotion}")
            yield from labels([row], "MELD-SentimentClassification/{part}", "sentiment", "{Sentiment}")


# ------------------------------------------------------------------------------------------------------------

SOURCES = (datasets_qa.clotho_aqa, audiocaps, clotho, fsd50k, cochlscene, nonspeech7k, nsynth, gtzan,
           medley_solos_db, urbansound8k, esc50, crema_d, ravdess, macs, wavcaps, musiccaps, meld, vocalsound,
           datasets_qa.music_avqa, datasets_qa.mmau, datasets_qa.muchomusic, datasets_qa.openaqa,
           datasets_qa.reasonaqa)


def find_source(name):
    """The function of a source; its name in any spelling: ESC-50, crema-d."""
    names = {source.__name__.replace("_", ""): source for source in SOURCES}
    plain = re.sub("[^a-z0-9]", "", name.lower())
    if plain not in names:
        raise UserError(f"{name!r}: no such source, expected {join_names(list(names), len(names))}")
    return names[plain]


def main(c):
    if len(c.files) != 1 or not c.from_:
        raise UserError("expected the name of a source and --from=folder; --help lists the sources")
    yield_items = find_source(c.files[0])
    source, data_root = Folder(settings.resolve_path(c.from_)), settings.resolve_path(c.data_root)
    to = settings.resolve_path(c.to)
    check_folder_writable(to)
    manifests = defaultdict(list)
    for name, item in yield_items(source):
        task, split = name.split("/")
        manifests[f"{to}/{task}/{SPLITS.get(split, split)}.json"].append(item)
    for note, count in source.notes.items():
        print(f"{count} {note}")
    folder = os.path.relpath(source.path, data_root)
    if folder.startswith(".."):  # not inside data_root: absolute
        folder = source.path
    counts = [write_manifest(file, items, folder, data_root) for file, items in manifests.items()]
    total, left_out = map(sum, zip(*counts))
    if not total:
        raise UserError(f"{source.path}: none of the {left_out} items' clips can be read, nothing is written; "
                        f"--help describes the expected files")
    return 1 if left_out else 0


def print_sources():
    for source in SOURCES:
        print(f"{source.__name__}\n    {source.__doc__}")


if __name__ == "__main__":
    if "--help" in sys.argv:
        print_sources()
    settings.run(main, __file__, reads=("data_root",), files=True)
