"""A public dataset as it was unpacked -> manifests of all its splits.

    python prepare/datasets.py clotho_aqa --from=/data/clotho_aqa
    python prepare/datasets.py esc50 --from=/data/ESC-50-master --to=data/manifests --data_root=data

Nothing is downloaded: the table below says where each comes from, under which licence, and what lies where.
Archives may be unpacked into folders of their own. A clip may have any ending that soundfile reads; of videos
extract the sound first, under the same name (ffmpeg -i x.mp4 -vn -ac 1 x.wav). Clips that are not there are
left out and counted (exit code 1). Prompts are ours, a few for every kind of question, chosen by the clip's
name. Sources of a kind of their own go by prepare/table.py.
"""
import os
import re
import sys
import zlib

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import config as settings
from prepare import datasets_qa
from prepare.manifests import Folder, Parser, decode, place_for, run, split_path_of, write
from tools.common import UserError

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


def choose(kind, clip):
    """A prompt of the kind, for a clip always the same, on every machine."""
    prompts = PROMPTS[kind]
    return prompts[zlib.crc32(os.path.basename(clip).encode("utf-8", "replace")) % len(prompts)]


def item(kind, clip, output, **more):
    return {"name": clip, "prompt": choose(kind, clip), "output": output} | more


def caption_items(manifest, clip, captions, kind="caption"):
    """(manifest, item)s: in train an item a caption; elsewhere one item, asked once, all are references."""
    captions = [" ".join(caption.split()) for caption in captions]  # some have line breaks
    if manifest.endswith("/train"):
        return [(manifest, item(kind, clip, caption)) for caption in captions]
    return [(manifest, item(kind, clip, captions[0], references=captions))]


def words(label):
    return label.replace("_", " ").lower()


# ------------------------------------------------------------------------------------------------------------
# Captions. A converter yields (Name-Task/split, item).


def audiocaps(source):
    """AudioCaps: 49,838 / 495 / 975 clips of 10 s of AudioSet; a caption in train, five elsewhere.
    home: https://github.com/cdjkim/audiocaps
    licence: academic use; the clips are YouTube's
    layout: dataset/{train,val,test}.csv; clips {split}/{audiocap_id} or, anywhere, {youtube_id}_{start_time},
        Y{youtube_id} or {youtube_id}
    """
    files = {split: (f"dataset/{split}.csv", f"{split}.csv") for split in ("train", "val", "test")}
    for split, path in source.splits(**files):
        clips = {}
        for row in source.rows(path, "audiocap_id", "youtube_id", "start_time", "caption"):
            clips.setdefault((row["youtube_id"], row["start_time"]), []).append(row)
        for (ytid, start), rows in clips.items():
            folders = (split, "valid") if split == "val" else (split,)
            numbered = [f"{folder}/{row['audiocap_id']}.wav" for folder in folders for row in rows]
            start = start.removesuffix(".0")
            named = [f"{ytid}_{start}.wav", f"Y{ytid}_{start}.wav", f"Y{ytid}.wav", f"{ytid}.wav"]
            clip = source.clip(*numbered, *named)
            captions = [row["caption"] for row in rows]
            yield from caption_items(f"audiocaps-AudioCaptioning/{split}", clip, captions)


def clotho(source):
    """Clotho v2.1: 3,839 / 1,045 / 1,045 clips of 15 to 30 s, five captions each.
    home: https://zenodo.org/records/4783391
    licence: captions: Tampere University's own (LICENSE file); clips: those of Freesound, in the metadata
    layout: clotho_captions_{development,validation,evaluation}.csv, {development,validation,evaluation}/*.wav
    Names hold leading, trailing and double spaces and commas.
    """
    folders = {"train": "development", "val": "validation", "test": "evaluation"}
    for split, path in source.splits(**{s: f"clotho_captions_{f}.csv" for s, f in folders.items()}):
        for row in source.rows(path, "file_name", *(f"caption_{i}" for i in range(1, 6))):
            clip = source.clip(f"{folders[split]}/{row['file_name']}")
            captions = [row[f"caption_{i}"] for i in range(1, 6)]
            yield from caption_items(f"Clotho-v2-AudioCaptioning/{split}", clip, captions)


def macs(source):
    """MACS: 3,930 scenes of 10 s, two to five captions each; no split, all of it is train.
    home: https://zenodo.org/records/5114771 (clips: https://zenodo.org/records/2589280)
    licence: the LICENSE files of the two records (what they say was not confirmed)
    layout: MACS.yaml, audio/*.wav of the TAU Urban Acoustic Scenes 2019 development set
    """
    import yaml
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C: seconds instead of a minute
    source.reading = source.need("MACS.yaml")
    try:
        with open(source.reading, encoding="utf-8") as f:
            files = yaml.load(f, loader)["files"]
    except yaml.YAMLError as error:
        raise UserError(f"{source.reading}: not YAML that can be read ({error})") from error
    for file in files:
        clip = source.clip("audio/" + file["filename"], file["filename"])
        captions = [annotation["sentence"] for annotation in file["annotations"]]
        yield from caption_items("MACS-AudioCaptioning/train", clip, captions)


def wavcaps(source):
    """WavCaps: 403,050 clips of four sources, captioned by a language model; all of it is train.
    home: https://huggingface.co/datasets/cvssp/WavCaps
    licence: academic use; clips under those of their sources
    layout: json_files/ with {as,bbc,fsd,sb}_final.json and blacklist_*.json; clips as unpacked, in folders
        AudioSet_SL_flac, BBC_Sound_Effects_flac, ... with or without _flac (join the split archives: zip -FF)
    Left out are the clips that the blacklists name as of the test splits of AudioCaps and Clotho, of
    UrbanSound8K, ESC-50 and VGGSound. Ids of AudioSet end in .wav, their files in .flac; clips of up to 18 h.
    """
    barred = {"AudioSet_SL": set(), "FreeSound": set()}
    for name in ("test_ac", "ub8k_esc50_vggsound"):
        path = source.find(f"blacklist_exclude_{name}.json")
        if path is None:
            print(f"note: no blacklist_exclude_{name}.json in {source.path}: its clips stay in")
            continue
        lists = source.json(path)
        barred["AudioSet_SL"] |= {str(ident).split(".")[0] for ident in lists["AudioSet"]}
        barred["FreeSound"] |= {str(ident).split(".")[0] for ident in lists["FreeSound"]}
    for name, path in source.splits(AudioSet_SL="as_final.json", BBC_Sound_Effects="bbc_final.json",
                                    FreeSound="fsd_final.json", SoundBible="sb_final.json"):
        for row in source.json(path)["data"]:
            ident = str(row["id"]).removesuffix(".wav")
            if ident in barred.get(name, ()):
                source.notes["clips of the blacklists are left out"] += 1
                continue
            clip = source.clip(f"{name}_flac/{ident}.flac", f"{name}/{ident}.flac")
            yield from caption_items(f"WavCaps-{name}-AudioCaptioning/train", clip, [row["caption"]])


def musiccaps(source):
    """MusicCaps: captions of 10 s of AudioSet's music; test is AudioSet's evaluation part (2,858 of 5,521).
    home: https://huggingface.co/datasets/google/MusicCaps
    licence: CC BY-SA 4.0; the clips are YouTube's
    layout: musiccaps-public.csv; clips [{ytid}]-[{start_s}-{end_s}], or {ytid}
    """
    for row in source.rows("musiccaps-public.csv", "ytid", "start_s", "end_s", "caption", "is_audioset_eval"):
        clip = source.clip(f"[{row['ytid']}]-[{row['start_s']}-{row['end_s']}].wav", f"{row['ytid']}.wav")
        name = "test" if row["is_audioset_eval"].lower() == "true" else "train"
        yield from caption_items(f"MusicCaps-AudioCaptioning/{name}", clip, [row["caption"]], "music caption")


# ------------------------------------------------------------------------------------------------------------
# Sounds and scenes


def fsd50k(source):
    """FSD50K: 40,966 and 10,231 clips of up to 30 s, several of 200 classes each, with all their ancestors.
    home: https://zenodo.org/records/4060432
    licence: CC BY 4.0 as a whole; each clip CC0, BY, BY-NC or Sampling+
    layout: FSD50K.ground_truth/{dev,eval}.csv, FSD50K.{dev,eval}_audio/*.wav (join the split archives first)
    A name with "_and_" is one label; labels stand in the order of the file, specific ones first.
    """
    for part, path in source.splits(dev=("FSD50K.ground_truth/dev.csv", "dev.csv"),
                                    eval=("FSD50K.ground_truth/eval.csv", "eval.csv")):
        for row in source.rows(path, "fname", "labels", *(["split"] if part == "dev" else [])):
            labels = ", ".join(words(label) for label in row["labels"].split(","))
            clip = source.clip(*(f"{folder}/{row['fname']}.wav" for folder in
                                 (f"FSD50K.{part}_audio", f"{part}_audio", part)))
            split = row["split"] if part == "dev" else "test"
            yield f"FSD50k-EventClassification/{split}", item("events", clip, labels)


def cochlscene(source):
    """CochlScene: 76,115 clips of 10 s, 13 scenes, splits of different users.
    home: https://zenodo.org/records/7080122
    licence: CC BY-SA 3.0
    layout: {Train,Val,Test}/{Scene}/{Scene}_{user}_{submission}_{segment}.wav (join the split archives first)
    Labels in lower case without spaces ("crowdedindoor"), as the published system has them.
    """
    for clip, split, scene in source.match(r"/(Train|Val|Test)/([A-Za-z]+)/\2_[^/]+\.\w+$",
                                           "Train/Bus/Bus_user0009_14897252_005.wav"):
        yield f"CochlScene-SceneClassification/{split.lower()}", item("scene", clip, scene.lower())


def nonspeech7k(source):
    """NonSpeech7k: 6,289 and 725 clips of up to 4 s, seven sounds of people.
    home: https://zenodo.org/records/6967442
    licence: the record says CC BY 4.0, its description CC BY-NC-SA 4.0
    layout: "metadata of train set .csv" (with the space), "metadata of test set.csv", train/*.wav, test/*.wav
    The two headers differ, test writes "yawm". Four recordings have clips in both splits.
    """
    for split, path in source.splits(train=("metadata of train set .csv", "metadata of train set.csv"),
                                     test="metadata of test set.csv"):
        for row in source.rows(path, "Filename", "Classname"):
            clip = source.clip(f"{split}/{row['Filename']}", row["Filename"])
            label = row["Classname"].strip().lower().replace("yawm", "yawn")
            yield f"NonSpeech7k-EventClassification/{split}", item("vocal", clip, label)


def vocalsound(source):
    """VocalSound: 21,024 clips of 3,365 people, six sounds.
    home: https://github.com/YuanGongND/vocalsound
    licence: CC BY-SA 4.0
    layout: datafiles/{tr,val,te}.json, which name the clips, or meta/{tr,val,te}_meta.csv, the speakers;
        audio_16k/{speaker}_{n}_{label}.wav, or the 44.1 kHz release's audio_44k/ or data_44k/
    """
    shorts = {"train": "tr", "val": "val", "test": "te"}
    for split, path in source.splits(**{s: (f"datafiles/{name}.json", f"meta/{name}_meta.csv",
                                            f"meta/{name}_meta.json") for s, name in shorts.items()}):
        text = decode(path)[0]
        names = re.findall(r"([fm]\d{4}_\d+_[a-z]+)\.wav", text)
        if not names:
            speakers = set(re.findall(r"\b[fm]\d{4}\b", text))
            clips = source.match(r"/(([fm]\d{4})_\d+_[a-z]+)\.\w+$", "audio_16k/f0003_0_cough.wav")
            names = [name for _, name, speaker in clips if speaker in speakers]
        for name in names:
            clip = source.clip(*(f"{folder}/{name}.wav" for folder in ("audio_16k", "audio_44k", "data_44k")))
            label = name.split("_")[2].replace("throatclearing", "throat clearing")
            yield f"VocalSound-VocalClassification/{split}", item("vocal", clip, label)


def urbansound8k(source):
    """UrbanSound8K: 8,732 clips of up to 4 s, ten classes. Zero-shot: all ten folds are the test split.
    home: https://zenodo.org/records/1203745
    licence: CC BY-NC 3.0
    layout: metadata/UrbanSound8K.csv, audio/fold{1..10}/*.wav
    Which folds the published score is of is not known.
    """
    for row in source.rows("UrbanSound8K.csv", "slice_file_name", "fold", "class"):
        clip = source.clip(f"fold{row['fold']}/{row['slice_file_name']}")
        yield "UrbanSound8K-EventClassification/test", item("event", clip, words(row["class"]))


def esc50(source):
    """ESC-50: 2,000 clips of 5 s, 50 classes. Zero-shot: all five folds are the test split.
    home: https://github.com/karolpiczak/ESC-50
    licence: CC BY-NC 3.0
    layout: meta/esc50.csv, audio/*.wav
    An older esc50.csv, in the root, has a number as category and the label as category_name.
    """
    path = source.need("meta/esc50.csv", "esc50.csv")
    for row in source.rows(path, "filename", "category"):
        label = words(row.get("category_name") or row["category"])
        yield "ESC50-EventClassification/test", item("event", source.clip(f"audio/{row['filename']}"), label)


# ------------------------------------------------------------------------------------------------------------
# Music


def nsynth(source):
    """NSynth: 289,205 / 12,678 / 4,096 notes of 4 s; eval.py scores source and instrument.
    home: https://magenta.tensorflow.org/datasets/nsynth
    licence: CC BY 4.0
    layout: nsynth-{train,valid,test}/examples.json and audio/{note}.wav
    """
    folders = {"train": "nsynth-train", "val": "nsynth-valid", "test": "nsynth-test"}
    for split, path in source.splits(**{split: f"{name}/examples.json" for split, name in folders.items()}):
        for note, row in source.json(path).items():
            told = (f"produced by {row['instrument_family_str']}, pitch {row['pitch']}, velocity "
                    f"{row['velocity']}, source {row['instrument_source_str']}")
            qualities = " and ".join(map(words, row["qualities_str"]))
            told += f", and having qualities like {qualities}" if qualities else ""
            yield f"NSynth-MIR/{split}", item("note", source.clip(f"{folders[split]}/audio/{note}.wav"), told)


def gtzan(source):
    """GTZAN: 10 x 100 clips of 30 s, ten genres; no split: all of it is test.
    home: http://marsyas.info/downloads/datasets.html
    licence: none is stated
    layout: genres/{genre}/{genre}.000NN.wav
    jazz.00054 is left out: it can't be decoded in common copies. The set's known duplicates are not.
    """
    for clip, label in source.match(r"/([a-z]+)/\1\.\d{5}\.\w+$", "genres/blues/blues.00000.wav"):
        if "jazz.00054" not in clip:
            yield "GTZAN-GenreClassification/test", item("genre", clip, label)


def medley_solos_db(source):
    """Medley-solos-DB: clips of 3 s, eight instruments; 5,841 are train, 12,236 test.
    home: https://zenodo.org/records/3464194
    licence: CC BY 4.0
    layout: Medley-solos-DB_metadata.csv, Medley-solos-DB_{subset}-{instrument_id}_{uuid4}.wav
    """
    splits = {"training": "train", "validation": "val", "test": "test"}
    columns = ("subset", "instrument", "instrument_id", "uuid4")
    for row in source.rows("Medley-solos-DB_metadata.csv", *columns):
        clip = source.clip(f"Medley-solos-DB_{row['subset']}-{row['instrument_id']}_{row['uuid4']}.wav")
        name = f"Medley-solos-DB-InstrClassification/{splits[row['subset']]}"
        yield name, item("instrument", clip, row["instrument"])


# ------------------------------------------------------------------------------------------------------------
# Voices


def crema_d(source):
    """CREMA-D: 7,442 sentences by 91 actors, six emotions as intended (raters often hear another); no split.
    home: https://github.com/CheyneyComputerScience/CREMA-D
    licence: Open Database License
    layout: AudioWAV/{actor}_{sentence}_{emotion}_{level}.wav (git lfs pull: a zip download holds pointers)
    1076_MTI_SAD_XX is left out: it is silent. One name has a level of one letter.
    """
    emotions = {"ANG": "angry", "DIS": "disgusted", "FEA": "fearful", "HAP": "happy", "NEU": "neutral",
                "SAD": "sad"}
    for clip, code in source.match(r"/\d{4}_[A-Z]{3}_(ANG|DIS|FEA|HAP|NEU|SAD)_\w+\.\w+$",
                                   "AudioWAV/1001_DFA_ANG_XX.wav"):
        if "1076_MTI_SAD_XX" not in clip:
            yield "CREMA-D-EmotionClassification/test", item("emotion", clip, emotions[code])


def ravdess(source):
    """RAVDESS: 1,440 spoken and 1,012 sung sentences by 24 actors, eight emotions; no split.
    home: https://zenodo.org/records/1188976
    licence: CC BY-NC-SA 4.0
    layout: Actor_NN/03-{01 speech,02 song}-{emotion}-{intensity}-{statement}-{repetition}-{actor}.wav
    Speech is test, song test_song. Whether the published score has songs in it is not known.
    """
    emotions = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgusted", "surprised")
    for clip, channel, code in source.match(r"/03-(01|02)-(0[1-8])(?:-\d\d){4}\.wav$",
                                            "Actor_01/03-01-01-01-01-01-01.wav"):
        split = "test" if channel == "01" else "test_song"
        yield f"RAVDESS-EmotionClassification/{split}", item("emotion", clip, emotions[int(code) - 1])


def meld(source):
    """MELD: 9,989 / 1,109 / 2,610 utterances of a series, seven emotions and three sentiments: two manifests.
    home: https://github.com/declare-lab/MELD
    licence: GPL-3.0
    layout: {train,dev,test}_sent_emo.csv; train_splits, dev_splits_complete, output_repeated_splits_test (or
        train, dev, test) with the sound of the mp4s: dia{D}_utt{U}.wav
    dia125_utt3 of train can't be decoded, dia110_utt7 of dev is not there. The times in the CSVs are wrong.
    """
    folders = {"train": ("train", "train_splits"), "val": ("dev", "dev_splits_complete"),
               "test": ("test", "output_repeated_splits_test")}
    for split, path in source.splits(**{s: f"{names[0]}_sent_emo.csv" for s, names in folders.items()}):
        for row in source.rows(path, "Dialogue_ID", "Utterance_ID", "Emotion", "Sentiment"):
            name = f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}"
            if (split, name) in (("train", "dia125_utt3"), ("val", "dia110_utt7")):
                continue
            clip = source.clip(*(f"{folder}/{name}.wav" for folder in folders[split][::-1]))
            yield f"MELD-EmotionClassification/{split}", item("emotion", clip, row["Emotion"].lower())
            yield f"MELD-SentimentClassification/{split}", item("sentiment", clip, row["Sentiment"].lower())


# ------------------------------------------------------------------------------------------------------------

CONVERTERS = (datasets_qa.clotho_aqa, audiocaps, clotho, fsd50k, cochlscene, nonspeech7k, nsynth, gtzan,
              medley_solos_db, urbansound8k, esc50, crema_d, ravdess, macs, wavcaps, musiccaps, meld,
              vocalsound, datasets_qa.music_avqa, datasets_qa.mmau, datasets_qa.muchomusic,
              datasets_qa.openaqa, datasets_qa.reasonaqa)


def main(argv=None):
    converters = {converter.__name__: converter for converter in CONVERTERS}
    plain = {name.replace("_", ""): name for name in converters}  # ESC-50, crema-d and Clotho-AQA will do
    named = lambda text: plain.get(re.sub(r"[^a-z0-9]", "", text.lower()), text)
    about = "\n\n".join(f"{name}\n    {converter.__doc__.rstrip()}" for name, converter in converters.items())
    parser = Parser(__doc__, epilog=f"sources:\n\n{about}")
    parser.add_argument("source", metavar="source", type=named, choices=converters, help="one of those below")
    parser.add_argument("--from", dest="folder", required=True, help="folder of the source, unpacked")
    for name, setting in (("to", "dataset_file_root"), ("data_root", "data_root")):
        parser.add_argument(f"--{name}", default=settings.defaults()[setting], help="default %(default)s")
    options = parser.parse_args(argv)
    place_for(os.path.join(options.to, "any.json"))
    source, manifests = Folder(options.folder), {}
    try:
        for name, one in converters[options.source](source):
            manifests.setdefault(name, []).append(one)
    except (KeyError, TypeError, IndexError, AttributeError, SyntaxError) as error:
        raise UserError(f"{source.reading}: not as in {options.source} ({type(error).__name__}: {error}); "
                         f"--help tells what is expected") from error
    data_root, done, unreadable = settings.resolve_path(options.data_root), 0, 0
    for note, count in source.notes.items():
        print(f"{options.source}: {count} {note}")
    for name, items in manifests.items():
        to = place_for(os.path.join(options.to, name + ".json"))
        counts = write(to, items, split_path_of(source.path, data_root), data_root)
        done, unreadable = done + counts[0], unreadable + counts[1]
    if not done:
        example = next((items[0]["name"] for items in manifests.values()), "any item")
        raise FileNotFoundError(f"{source.path}: none of the clips of {options.source} can be read, expected "
                                f"{example!r} and more, as --help tells; nothing is written")
    return 1 if unreadable else 0


if __name__ == "__main__":
    run(main)
