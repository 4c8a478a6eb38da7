"""Converters: every source in its original layout, with traps, to manifests that score rightly; tables."""
import inspect
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

import eval as scoring
from data import Manifest
from prepare import datasets, manifests, table
from tests.helpers import ROOT, fails_with_one_line, run
from tools.eval import rules as closed_sets

SCORE = SimpleNamespace(metric=None, labels=None, matching="exact", text_tokenizer="", device="cpu")
CAPTIONS = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
CLOTHO_AQA = "file_name,QuestionText,answer,confidence\n"
UUID = "0a282672-c22c-59ff-faaa-ff9eb73fc8e6"


def lay_out(folder, files):
    """{path: text, bytes, something for JSON, or the seconds of a sound} -> files; the folder's path."""
    for path, content in files.items():
        path = os.path.join(folder, path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if isinstance(content, float):
            soundfile.write(path, np.zeros(int(content * 8000)), 8000)
        else:
            text = content if isinstance(content, (str, bytes)) else json.dumps(content)
            with open(path, "wb") as f:
                f.write(text if isinstance(text, bytes) else text.encode())
    return str(folder)


def avqa(video, question, slots, kind, answer, **more):
    return {"video_id": video, "question_id": 1, "question_content": question, "anser": answer,
            "templ_values": json.dumps(slots), "type": json.dumps(kind), "question_deleted": 0} | more


def mucho(ident, dataset):
    return (f"What drum?,A snare.,A gong,A bell,A bongo,{dataset},{ident},rock,\"['instrumentation']\",[]\n")


# source: files in the original layout, and {manifest: [(clip, output)]} as they have to come out
LAYOUTS = {
    "clotho_aqa": ({
        "clotho_aqa_train.csv": CLOTHO_AQA + "".join(f"{row}\n" for row in (
            "18.44 it&#39;s.wav,Is it loud?,yes,no", "18.44 it&#39;s.wav,Is it loud?,no,yes",
            "18.44 it&#39;s.wav,Is it loud?,yes,maybe",
            "souffle_me_tallique.wav,What is it?,Water,yes", "souffle_me_tallique.wav,What is it?,rain,no",
            "souffle_me_tallique.wav,What is it?,water,maybe")),
        "clotho_aqa_test.csv": CLOTHO_AQA + "".join(f"{row}\n" for row in (
            "x.wav,Is it a dog?,yes,yes", "x.wav,Is it a dog?,yes,no", "x.wav,Is it a dog?,yes,yes",
            "x.wav,What is it?,dog,yes", "x.wav,What is it?,puppy,yes", "x.wav,What is it?,dog,maybe",
            "x.wav,Is it big?,yes,yes", "x.wav,Is it big?,no,yes", "x.wav,Is it big?,yes,yes")),
        "clotho_aqa_metadata.csv": b",file_name,keywords\n0,caf\xe9.wav,x\n",
        "audio_files/18.44 it&#39;s.wav": .2, "audio_files/souffle_me.tallique.wav": .2,
        "audio_files/x.wav": .2, "audio_files/not asked.wav": .2}, {
        "Clotho-AQA-AQA/train": [("audio_files/18.44 it&#39;s.wav", "no"),
                                 ("audio_files/souffle_me.tallique.wav", "water"),
                                 ("audio_files/souffle_me.tallique.wav", "rain")],
        "Clotho-AQA-AQA/test": [("audio_files/x.wav", answers) for answers in (
            "yes, yes, yes", "dog, puppy, dog", "yes, no, yes")]}),
    "audiocaps": ({
        "dataset/train.csv": "audiocap_id,youtube_id,start_time,caption\n9,-abc,30,A dog barks\n",
        "dataset/test.csv": "audiocap_id,youtube_id,start_time,caption\n7,q_1,0,\"Rain, then wind\"\n"
                            "8,zz,10,Birds\n6,q_1,0,Rain falls\n",
        "dataset2.0/train.csv": "audiocap_id,youtube_id,start_time,caption\n9,-abc,30,a dog barks\n",
        "audio/train/9.flac": .2, "audio/test/7.flac": .2, "clips/Yzz.wav": .2}, {
        "audiocaps-AudioCaptioning/train": [("audio/train/9.flac", "A dog barks")],
        "audiocaps-AudioCaptioning/test": [("audio/test/7.flac", "Rain, then wind"),
                                           ("clips/Yzz.wav", "Birds")]}),
    "clotho": ({
        "clotho_captions_development.csv": CAPTIONS + " a b.wav,one,two,three,four,five\n"
                                           "\"Rain, 2  .wav\",1,2,3,4,5\n",
        "clotho_captions_evaluation.csv": CAPTIONS.encode() + b"caf\xe9.wav,one,two,three,four,five\n",
        "development/ a b.wav": .2, "development/a b.wav": .2, "development/Rain, 2  .wav": .2,
        "evaluation/evaluation/café.wav": .2}, {
        "Clotho-v2-AudioCaptioning/train":
            [("development/ a b.wav", word) for word in ("one", "two", "three", "four", "five")] +
            [("development/Rain, 2  .wav", str(n)) for n in range(1, 6)],
        "Clotho-v2-AudioCaptioning/test": [("evaluation/evaluation/café.wav", "one")]}),
    "fsd50k": ({
        "FSD50K.ground_truth/dev.csv":
            "fname,labels,mids,split\n64760,\"Electric_guitar,Guitar,Music\",/m/1,train\n"
            "16399,\"Accelerating_and_revving_and_vroom,Engine\",/m/2,val\n",
        "FSD50K.ground_truth/eval.csv":
            "fname,labels,mids\n64760,\"Accelerating_and_revving_and_vroom,Engine\",x\n3,Dog,x\n",
        "FSD50K.dev_audio/64760.wav": .2, "FSD50K.dev_audio/16399.wav": .2, "FSD50K.eval_audio/64760.wav": .2,
        "FSD50K.eval_audio/3.wav": .2}, {
        "FSD50k-EventClassification/train": [("FSD50K.dev_audio/64760.wav",
                                              "electric guitar, guitar, music")],
        "FSD50k-EventClassification/val": [("FSD50K.dev_audio/16399.wav",
                                            "accelerating and revving and vroom, engine")],
        "FSD50k-EventClassification/test": [
            ("FSD50K.eval_audio/64760.wav", "accelerating and revving and vroom, engine"),
            ("FSD50K.eval_audio/3.wav", "dog")]}),
    "cochlscene": ({
        "CochlScene/Train/Bus/Bus_user0009_14897252_005.wav": .2,
        "CochlScene/Val/Park/Park_user1_2_003.wav": .2,
        "CochlScene/Test/CrowdedIndoor/CrowdedIndoor_user2_3_004.wav": .2,
        "CochlScene/Test/Bus/Bus_user3_3_004.wav": .2,
        "CochlScene/Test/Bus/._Bus_user3_3_004.wav": b"mac"}, {
        "CochlScene-SceneClassification/train": [
            ("CochlScene/Train/Bus/Bus_user0009_14897252_005.wav", "bus")],
        "CochlScene-SceneClassification/val": [("CochlScene/Val/Park/Park_user1_2_003.wav", "park")],
        "CochlScene-SceneClassification/test": [
            ("CochlScene/Test/Bus/Bus_user3_3_004.wav", "bus"),
            ("CochlScene/Test/CrowdedIndoor/CrowdedIndoor_user2_3_004.wav", "crowdedindoor")]}),
    "nonspeech7k": ({
        "metadata of train set .csv":
            "Filename,File ID,Duration in ms,Class ID,Classname,augmentation  id,Augmentation  type,source\n"
            "a.wav,1,200,0,breath,0,Orignal,u\n",
        "metadata of test set.csv":
            "Filename,File_ID,Durationin ms,Class_id,Classname,Augment Id,Augmentation type,source\n"
            "b.wav,1,200,6,yawm,0,Original,u\nc.wav,1,200,6,yawn,0,Original,u\nd.wav,1,200,1,Cough,0,Original,u\n",
        "train/train/a.wav": .2, "test/b.wav": .2, "test/c.wav": .2, "test/d.wav": .2}, {
        "NonSpeech7k-EventClassification/train": [("train/train/a.wav", "breath")],
        "NonSpeech7k-EventClassification/test": [("test/b.wav", "yawn"), ("test/c.wav", "yawn"),
                                                 ("test/d.wav", "cough")]}),
    "nsynth": ({
        "nsynth-test/examples.json": {
            "bass_synthetic_033-022-050": {
                "instrument_family_str": "bass", "instrument_source_str": "synthetic", "pitch": 22,
                "velocity": 50, "qualities_str": ["dark", "fast_decay"]},
            "synth_lead_synthetic_1-2-3": {
                "instrument_family_str": "synth_lead", "instrument_source_str": "electronic", "pitch": 2,
                "velocity": 3, "qualities_str": []}},
        "nsynth-test/audio/bass_synthetic_033-022-050.wav": .2,
        "nsynth-test/audio/synth_lead_synthetic_1-2-3.wav": .2}, {
        "NSynth-MIR/test": [
            ("nsynth-test/audio/bass_synthetic_033-022-050.wav", "produced by bass, pitch 22, velocity 50, "
             "source synthetic, and having qualities like dark and fast decay"),
            ("nsynth-test/audio/synth_lead_synthetic_1-2-3.wav", "produced by synth_lead, pitch 2, "
             "velocity 3, source electronic")]}),
    "gtzan": ({
        "genres/jazz/jazz.00054.wav": b"broken", "genres/jazz/jazz.00053.wav": .2,
        "genres/jazz/._jazz.00053.wav": b"mac", "genres/hiphop/hiphop.00001.wav": .2}, {
        "GTZAN-GenreClassification/test": [("genres/hiphop/hiphop.00001.wav", "hiphop"),
                                           ("genres/jazz/jazz.00053.wav", "jazz")]}),
    "medley_solos_db": ({
        "Medley-solos-DB_metadata.csv": "subset,instrument,instrument_id,song_id,uuid4\n"
                                        f"test,clarinet,0,1,{UUID}\ntraining,tenor saxophone,5,2,{UUID}\n"
                                        f"test,distorted electric guitar,1,3,{UUID}\n",
        **{f"Medley-solos-DB/Medley-solos-DB_{part}_{UUID}.wav": .2 for part in ("test-0", "training-5",
                                                                                 "test-1")}}, {
        "Medley-solos-DB-InstrClassification/train": [
            (f"Medley-solos-DB/Medley-solos-DB_training-5_{UUID}.wav", "tenor saxophone")],
        "Medley-solos-DB-InstrClassification/test": [
            (f"Medley-solos-DB/Medley-solos-DB_test-0_{UUID}.wav", "clarinet"),
            (f"Medley-solos-DB/Medley-solos-DB_test-1_{UUID}.wav", "distorted electric guitar")]}),
    "urbansound8k": ({
        "UrbanSound8K/metadata/UrbanSound8K.csv":
            "slice_file_name,fsID,start,end,salience,fold,classID,class\n"
            "100-3-0-0.wav,100,0,.3,1,5,3,dog_bark\n7-0-0-0.wav,7,0,.3,1,10,0,air_conditioner\n",
        "UrbanSound8K/audio/fold5/100-3-0-0.wav": .2, "UrbanSound8K/audio/fold10/7-0-0-0.wav": .2}, {
        "UrbanSound8K-EventClassification/test": [
            ("UrbanSound8K/audio/fold5/100-3-0-0.wav", "dog bark"),
            ("UrbanSound8K/audio/fold10/7-0-0-0.wav", "air conditioner")]}),
    "esc50": ({
        "meta/esc50.csv": "filename,fold,target,category,esc10,src_file,take\n"
                          "1-100032-A-0.wav,1,0,dog,True,100032,A\n1-1-A-20.wav,2,20,crying_baby,True,1,A\n",
        "esc50.csv": "filename,fold,category,category_name\n1-100032-A-0.wav,1,0,dog\n",
        "audio/1-100032-A-0.wav": .2, "audio/1-1-A-20.wav": .2}, {
        "ESC50-EventClassification/test": [("audio/1-100032-A-0.wav", "dog"),
                                           ("audio/1-1-A-20.wav", "crying baby")]}),
    "crema_d": ({
        "AudioWAV/1001_DFA_ANG_XX.wav": .2, "AudioWAV/1040_ITH_SAD_X.wav": .2,
        "AudioWAV/1076_MTI_SAD_XX.wav": .2}, {
        "CREMA-D-EmotionClassification/test": [("AudioWAV/1001_DFA_ANG_XX.wav", "angry"),
                                               ("AudioWAV/1040_ITH_SAD_X.wav", "sad")]}),
    "ravdess": ({
        "Actor_01/03-01-07-01-02-01-01.wav": .2, "all/Actor_01/03-01-07-01-02-01-01.wav": .2,
        "Actor_02/03-01-02-01-01-01-02.wav": .2, "Actor_02/03-02-06-01-01-01-02.wav": .2}, {
        "RAVDESS-EmotionClassification/test": [("Actor_01/03-01-07-01-02-01-01.wav", "disgusted"),
                                               ("Actor_02/03-01-02-01-01-01-02.wav", "calm")],
        "RAVDESS-EmotionClassification/test_song": [("Actor_02/03-02-06-01-01-01-02.wav", "fearful")]}),
    "macs": ({
        "MACS.yaml": "files:\n- filename: park-1.wav\n  annotations:\n"
                     "  - annotator_id: 1\n    sentence: 'birds: two'\n    tags: [birds_singing]\n"
                     "  - annotator_id: 2\n    sentence: people talking\n    tags: []\n",
        "TAU-urban-acoustic-scenes-2019-development/audio/park-1.wav": .2}, {
        "MACS-AudioCaptioning/train": [
            ("TAU-urban-acoustic-scenes-2019-development/audio/park-1.wav", text)
            for text in ("birds: two", "people talking")]}),
    "wavcaps": ({
        "json_files/AudioSet_SL/as_final.json": {"data": [
            {"id": "Y--b.wav", "caption": "A horn.", "duration": 10.0},
            {"id": "Ytest.wav", "caption": "A test clip.", "duration": 10.0}]},
        "json_files/FreeSound/fsd_final.json": {"data": [{"id": 17, "caption": "A bell.", "duration": 99.0}]},
        "json_files/SoundBible/sb_final.json": {"data": [{"id": "17", "caption": "A door.", "duration": 1}]},
        "json_files/blacklist/blacklist_exclude_test_ac.json": {"AudioSet": ["Ytest.wav"], "FreeSound": []},
        "mnt/AudioSet_SL_flac/Y--b.flac": .2, "mnt/AudioSet_SL_flac/Ytest.flac": .2,
        "mnt/FreeSound_flac/17.flac": .2, "SoundBible/17.flac": .2}, {
        "WavCaps-AudioSet_SL-AudioCaptioning/train": [("mnt/AudioSet_SL_flac/Y--b.flac", "A horn.")],
        "WavCaps-FreeSound-AudioCaptioning/train": [("mnt/FreeSound_flac/17.flac", "A bell.")],
        "WavCaps-SoundBible-AudioCaptioning/train": [("SoundBible/17.flac", "A door.")]}),
    "musiccaps": ({
        "musiccaps-public.csv":
            "ytid,start_s,end_s,audioset_positive_labels,aspect_list,caption,author_id,is_balanced_subset,"
            "is_audioset_eval\n-0Gj,30,40,/m/x,\"['sad', 'pop']\",\"Slow.\nSad.\",4,False,True\n"
            "a_b,0,10,/m/x,\"['pop']\",Loud.,4,False,False\n",
        "wav/[-0Gj]-[30-40].wav": .2, "wav/a_b.wav": .2}, {
        "MusicCaps-AudioCaptioning/train": [("wav/a_b.wav", "Loud.")],
        "MusicCaps-AudioCaptioning/test": [("wav/[-0Gj]-[30-40].wav", "Slow. Sad.")]}),
    "meld": ({
        **{f"{name}_sent_emo.csv":
               "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID\n" + rows
           for name, rows in {"train": "1,\"Oh, no\",Joey,surprise,negative,0,0\n2,x,y,joy,positive,125,3\n",
                              "dev": "1,x,y,joy,positive,110,7\n2,x,y,neutral,neutral,0,0\n",
                              "test": "1,x,y,anger,negative,0,0\n2,x,y,joy,positive,0,1\n"}.items()},
        "train/train_splits/dia0_utt0.wav": .2, "dev/dev_splits_complete/dia110_utt7.wav": .2,
        "dev/dev_splits_complete/dia0_utt0.wav": .2, "dev/dev_splits_complete/dia125_utt3.wav": .2,
        "test/dia0_utt0.wav": .2, "test/dia0_utt1.wav": .2}, {
        "MELD-EmotionClassification/train": [("train/train_splits/dia0_utt0.wav", "surprise")],
        "MELD-SentimentClassification/train": [("train/train_splits/dia0_utt0.wav", "negative")],
        "MELD-EmotionClassification/val": [("dev/dev_splits_complete/dia0_utt0.wav", "neutral")],
        "MELD-SentimentClassification/val": [("dev/dev_splits_complete/dia0_utt0.wav", "neutral")],
        "MELD-EmotionClassification/test": [("test/dia0_utt0.wav", "anger"), ("test/dia0_utt1.wav", "joy")],
        "MELD-SentimentClassification/test": [("test/dia0_utt0.wav", "negative"),
                                              ("test/dia0_utt1.wav", "positive")]}),
    "vocalsound": ({
        "datafiles/te.json": {"data": [
            {"wav": "/data/sls/x/f0003_0_throatclearing.wav", "labels": "/m/1"},
            {"wav": "/data/sls/x/m0004_1_sneeze.wav", "labels": "/m/2"}]},
        "audio_16k/f0003_0_throatclearing.wav": .2, "audio_16k/m0004_1_sneeze.wav": .2,
        "data_44k/m0004_1_sneeze.wav": .2}, {
        "VocalSound-VocalClassification/test": [("audio_16k/f0003_0_throatclearing.wav", "throat clearing"),
                                                ("audio_16k/m0004_1_sneeze.wav", "sneeze")]}),
    "music_avqa": ({
        "data/json/avqa-test.json": [avqa("00000001", "Old?", [], ["Audio", "Counting"], "no")],
        "data/json_update/avqa-test.json": [
            avqa("00000001", "Is the <Object> louder than the <Object>?", ["acoustic_guitar", "cello"],
                 ["Audio", "Comparative"], "yes"),
            avqa("00000001", "Is the <Object> louder than the <Object>?", ["acoustic_guitar", "cello"],
                 ["Audio", "Comparative"], "yes"),
            avqa("00000001", "Which?", [], ["Audio", "Comparative"], "acoustic_guitar"),
            avqa("00000001", "Gone?", [], ["Audio", "Counting"], "two", question_deleted=1),
            avqa("00000001", "Where is the <LL> one?", ["loudest"], ["Audio-Visual", "Location"], "left"),
            avqa("00000001", "How many people?", [], ["Visual", "Counting"], "two")],
        "audio/00000001.wav": .2}, {
        "Music-AVQA-AQA_All/test": [("audio/00000001.wav", "yes"), ("audio/00000001.wav", "acoustic guitar")],
        "Music-AVQA-AVQA_All/test": [("audio/00000001.wav", "left")]}),
    "mmau": ({
        "mmau-test-mini.json": [
            {"id": "a1", "audio_id": "./test-mini-audios/a1.wav", "question": "What?", "task": "sound",
             "choices": ["Dog", "Cat", "Cat"], "answer": "Cat", "split": "test-mini",
             "category": ["x", "y"]}],
        "test-mini-audios/a1.wav": .2}, {
        "MMAU/test-mini": [("test-mini-audios/a1.wav", "Cat")]}),
    "muchomusic": ({
        "muchomusic.csv":
            "question,correct_answer,distractor_1_answer,distractor_2_answer,distractor_3_answer,dataset,"
            "dataset_identifier,genre,music_knowledge,music_reasoning\n" + mucho("415600.json", "sdd") +
            mucho("-0_Gj_3.json", "musiccaps"),
        "sdd/00/415600.2min.wav": .2, "musiccaps/[-0_Gj]-[30-40].wav": .2}, {
        "MuChoMusic-AQA/test": [("sdd/00/415600.2min.wav", "A snare."),
                                ("musiccaps/[-0_Gj]-[30-40].wav", "A snare.")]}),
    "openaqa": ({
        "openaqa_5.6M.json": [
            {"instruction": "What is heard?", "input": "", "dataset": "as_20k", "task": "open-ended question",
             "audio_id": "/data/sls/audioset/dave_version/audio/-0x.flac", "output": "A dog."},
            {"instruction": "What is heard?", "input": "", "dataset": "fsd50k", "task": "closed",
             "audio_id": "/data/sls/scratch/fsd50k/audio/12.wav", "output": "A cat."}],
        "audioset/audio/-0x.flac": .2, "fsd50k/audio/12.wav": .2, "freesound/12.flac": .2}, {
        "OpenAQA-AQA/train": [("audioset/audio/-0x.flac", "A dog."), ("fsd50k/audio/12.wav", "A cat.")]}),
    "reasonaqa": ({
        "test.json": [
            {"taskname": "audiocaps", "filepath1": "AudioCapsLarger/test/Y6BJ.wav", "subtype": "ACD-1.json",
             "filepath2": "AudioCapsLarger/test/YZsf.wav", "input": "explain the difference in few words",
             "answer": "Audio 1 is louder."},
            {"taskname": "clotho_aqa", "filepath1": "ClothoAQA\\audio_files\\steel works.wav",
             "filepath2": "", "input": "what is it? a) dog b) steel", "answer": "b) steel",
             "subtype": "MCQ.json"},
            {"taskname": "clothov21", "filepath1": "", "filepath2": "", "input": "x", "answer": "y"}],
        "AudioCapsLarger/test/Y6BJ.wav": .2, "AudioCapsLarger/train/Y6BJ.wav": .3,
        "AudioCapsLarger/test/YZsf.flac": .2, "clotho_aqa/audio_files/steel works.wav": .2}, {
        "ReasonAQA-AQA/test": [
            (["AudioCapsLarger/test/Y6BJ.wav", "AudioCapsLarger/test/YZsf.flac"], "Audio 1 is louder."),
            ("clotho_aqa/audio_files/steel works.wav", "b) steel")],
        "ReasonAQA-AQA/test_ACD-1": [(["AudioCapsLarger/test/Y6BJ.wav", "AudioCapsLarger/test/YZsf.flac"],
                                      "Audio 1 is louder.")],
        "ReasonAQA-AQA/test_MCQ": [("clotho_aqa/audio_files/steel works.wav", "b) steel")]}),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """{source: {Name-Task/split: Manifest}} of every layout above, all below one data root."""
    root, found = str(tmp_path_factory.mktemp("root")), {}
    for source, (files, expected) in LAYOUTS.items():
        folder, to = lay_out(f"{root}/{source}", files), f"{root}/manifests/{source}"
        code = datasets.main([source, f"--from={folder}", f"--to={to}", f"--data_root={root}"])
        assert code == 0, source
        there = {os.path.relpath(os.path.join(place, name), to).removesuffix(".json")
                 for place, _, names in os.walk(to) for name in names}
        assert there == set(expected), source
        found[source] = {name: Manifest(f"{to}/{name}.json", root) for name in expected}
    return found


@pytest.mark.parametrize("source", LAYOUTS)
def test_source(source, converted):
    files, expected = LAYOUTS[source]
    for name, rows in expected.items():
        manifest = converted[source][name]
        assert [(item["name"], item["output"]) for item in manifest.items] == rows, name
        with open(manifest.file) as f:
            content = json.load(f)
        about = (content["split_path"], content["flamingo_task"], content["split"])
        assert about == (source, *name.split("/"))
        for i, item in enumerate(manifest.items):
            assert item["duration"] == pytest.approx(.2 * len(manifest[i]["paths"])), (name, i)
            assert all(map(os.path.isfile, manifest[i]["paths"]))
            assert item["prompt"].strip() and "<" not in item["prompt"]


@pytest.mark.parametrize("source", LAYOUTS)
def test_right_answers_score_100(source, converted, capsys):
    """What a manifest says is what eval.py reads: right answers 100 %, empty ones nothing."""
    for name, manifest in converted[source].items():
        if re.search("Captioning", name) or name.split("/")[1] == "train" and "Clotho-AQA" in name:
            continue
        for right in (True, False):
            rows = [item | {"audio": manifest[i]["path"], "answer": item["output"] if right else ""}
                    for i, item in enumerate(manifest.items)]
            for row in rows:
                if "Clotho-AQA" in name:  # it is to give one of the three
                    row["answer"] = row["answer"].split(", ")[0]
            row = scoring.score_split(name, rows, SCORE)
            alone = "mAP" in row and len(rows) == 1  # every order of labels that are all right is right
            assert row.get("mAP", row.get("accuracy")) == 1 if right else alone or row.get(
                "mAP", row.get("accuracy")) < 1, (name, row)
            if "NSynth" in name:
                assert (row["source"], row["instrument"]) == (right, right)
    rules = {"fsd50k": closed_sets.multi_label, "nsynth": closed_sets.nsynth, "mmau": scoring.multiple_choice,
             "muchomusic": scoring.muchomusic, "clotho_aqa": scoring.clotho_aqa,
             "music_avqa": scoring.exact_match}
    kinds = re.compile("Event|Scene|Emotion|Sentiment|Genre|Instr|Vocal")
    for name, manifest in converted[source].items():
        rule = rules.get(source, closed_sets.closed_set if kinds.search(name) else None)
        assert rule in (None, scoring.choose_rule(name.split("/")[0], manifest.items)), name


def test_captions_of_an_evaluation_split_are_references_of_one_question(converted):
    for source, name, references in (("audiocaps", "audiocaps-AudioCaptioning/test", ["Rain, then wind",
                                                                                      "Rain falls"]),
                                     ("clotho", "Clotho-v2-AudioCaptioning/test",
                                      ["one", "two", "three", "four", "five"])):
        assert converted[source][name].items[0]["references"] == references
    items = list(converted["clotho"]["Clotho-v2-AudioCaptioning/train"].items)
    prompts = {item["prompt"] for item in items[:5]}
    assert len(prompts) == 1  # of one clip, so that eval.py takes them as one there too


def test_groups_of_scores_are_kept(converted):
    mmau, mucho, avqa = (converted[source][name].items[0] for source, name in (
        ("mmau", "MMAU/test-mini"), ("muchomusic", "MuChoMusic-AQA/test"),
        ("music_avqa", "Music-AVQA-AQA_All/test")))
    assert mmau["task"] == "sound" and mmau["category"] == ["x", "y"] and "audio_id" in mmau
    assert mucho["music_knowledge"] == ["instrumentation"] and mucho["music_reasoning"] == []
    assert sorted(mucho["choices"]) == ["A bell", "A bongo", "A gong", "A snare."]
    assert avqa["prompt"] == "Is the acoustic guitar louder than the cello?"
    assert avqa["category"] == "Comparative"
    assert {item["task"] for item in converted["reasonaqa"]["ReasonAQA-AQA/test"].items} == {"ACD-1", "MCQ"}


def test_prompts_are_chosen_the_same_everywhere():
    """By a hash of the clip's own name that does not change with the process, or where the clip lies."""
    names = [f"{i}.wav" for i in range(200)]
    for kind, prompts in datasets.PROMPTS.items():
        assert {datasets.choose(kind, name) for name in names} == set(prompts), kind  # each is in use
    assert datasets.choose("scene", "a/x.wav") == datasets.choose("scene", "b/c/x.wav") == \
        "Name the acoustic scene of this recording."  # crc32("x.wav") = 3 n + 1
    code = "from prepare import datasets; print([datasets.choose('caption', f'{i}.wav') for i in range(200)])"
    told = run("-c", code, PYTHONHASHSEED="7").stdout
    assert told.strip() == str([datasets.choose("caption", name) for name in names])


@pytest.mark.parametrize("converter", datasets.CONVERTERS, ids=lambda converter: converter.__name__)
def test_docstring_has_home_and_licence(converter):
    doc = inspect.getdoc(converter)
    assert re.search(r"^home: https?://\S+", doc, re.M) and re.search(r"^licence: \S+", doc, re.M)
    assert re.search(r"^layout: \S+", doc, re.M)
    assert len(inspect.getsource(converter).splitlines()) - len(doc.splitlines()) <= 25


def test_every_source_of_the_table_is_tested():
    assert {converter.__name__ for converter in datasets.CONVERTERS} == set(LAYOUTS)


@pytest.mark.parametrize("source", sorted(set(LAYOUTS)))
def test_wrong_folder(source, tmp_path):
    """One that is none, one that is empty, one with other things, and tables whose clips are gone."""
    def fails(folder):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            datasets.main([source, f"--from={folder}", f"--to={tmp_path}/to", f"--data_root={tmp_path}"])
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        assert not os.path.exists(tmp_path / "to")
        return str(caught.value)

    fails(tmp_path / "none")
    lay_out(tmp_path / "other", {"readme.txt": "x", "x.wav": .1})
    assert "expected" in fails(tmp_path / "other")
    tables = {path: text for path, text in LAYOUTS[source][0].items() if not isinstance(text, float)}
    if not any(path.endswith(("csv", "json", "yaml")) for path in tables):
        tables = {"x/" + os.path.basename(path): text for path, text in tables.items()}
    lay_out(tmp_path / "gone", tables | {"readme.txt": "x"})
    assert "expected" in fails(tmp_path / "gone")


# ------------------------------------------------------------------------------------------------------------
# Clips that are not there, or no sounds


def esc50(tmp_path, capsys, *options):
    code = datasets.main(["esc50", f"--from={tmp_path}/esc", f"--to={tmp_path}/to", *options])
    return code, capsys.readouterr().out


def test_missing_clips_and_git_lfs_pointers_are_counted(tmp_path, capsys):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    rows = "".join(f"{i}.wav,1,0,dog\n" for i in range(9))
    lay_out(tmp_path / "esc", {"meta/esc50.csv": "filename,fold,target,category\n" + rows, "audio/0.wav": .5,
                               "audio/1.wav": pointer, "audio/2.wav": pointer, "audio/3.wav": "<html>404",
                               "audio/4.wav": ""})
    code, out = esc50(tmp_path, capsys, f"--data_root={tmp_path}")
    assert code == 1
    assert "4 of 9 items are missing: 'audio/5.wav', 'audio/6.wav', 'audio/7.wav', ..." in out
    assert "2 of 9 items are Git LFS pointers, not sounds (run: git lfs pull): 'audio/1.wav', " in out
    assert "2 of 9 items are not readable as sound: 'audio/3.wav', 'audio/4.wav'" in out
    content = json.load(open(tmp_path / "to/ESC50-EventClassification/test.json"))
    assert content["total_num"] == 1 and content["split_path"] == "esc"
    assert content["data"]["0"]["duration"] == 0.5
    code, out = esc50(tmp_path, capsys, f"--data_root={tmp_path}/elsewhere")
    assert json.load(open(tmp_path / "to/ESC50-EventClassification/test.json"))["split_path"] == \
        str(tmp_path / "esc")  # outside of data_root: absolute
    assert len(Manifest(str(tmp_path / "to/ESC50-EventClassification/test.json"), "anywhere")) == 1


def test_items_without_a_text_are_counted(tmp_path, capsys):
    """An empty cell would be learnt as the answer."""
    rows = "0.wav,dog\n1.wav,\n2.wav,  \n"
    clips = {f"audio/{i}.wav": .1 for i in range(3)}
    lay_out(tmp_path / "esc", {"meta/esc50.csv": "filename,category\n" + rows} | clips)
    code, out = esc50(tmp_path, capsys)
    assert code == 1 and "2 of 3 items are without an answer: 'audio/1.wav', 'audio/2.wav'" in out
    content = json.load(open(tmp_path / "to/ESC50-EventClassification/test.json"))
    assert [item["output"] for item in content["data"].values()] == ["dog"]


def test_names_that_are_there_twice_are_not_guessed(tmp_path, capsys):
    lay_out(tmp_path / "esc", {"esc50.csv": "filename,category\n1.wav,dog\n2.wav,cat\n3.wav,cow\n",
                               "a/audio/1.wav": .1, "b/audio/1.wav": .1, "audio/2.wav": .1, "c/3.wav": .1})
    code, out = esc50(tmp_path, capsys)
    assert code == 1 and "2 of 3 items are missing: 'audio/1.wav', 'audio/3.wav'" in out
    assert "2 clips are there several times, or in a folder of another name: not guessed" in out


def test_columns_and_files_that_are_not_as_they_should_be(tmp_path):
    def fails(source, files, *saying):
        folder = lay_out(tmp_path / f"{source}{len(os.listdir(tmp_path))}", files)
        with pytest.raises(ValueError) as caught:
            datasets.main([source, f"--from={folder}", f"--to={tmp_path}/to"])
        for word in saying:
            assert word in str(caught.value), caught.value

    fails("esc50", {"meta/esc50.csv": "name,label\nx,y\n"}, "meta/esc50.csv", "'filename'", "'name', 'label'")
    fails("nsynth", {"nsynth-test/examples.json": {"a": {"pitch": 1}}}, "nsynth-test/examples.json",
          "instrument_family_str")
    fails("music_avqa", {"json/avqa-test.json": "{"}, "json/avqa-test.json", "not JSON")
    for text in ('files:\n- filename: "a', "files:\n- x\nx\n", "[]"):
        fails("macs", {"MACS.yaml": text}, "MACS.yaml: not ")
    fails("ESC_51", {"x": "y"}, "ESC_51", "esc50", "clotho_aqa")
    assert not os.path.exists(tmp_path / "to")


def test_other_layouts(tmp_path, capsys):
    """VocalSound by its speakers; MELD with videos; an older ESC-50; names in other spellings."""
    def convert(name, files):
        folder = lay_out(tmp_path / name, files)
        return datasets.main([name, f"--from={folder}", f"--to={tmp_path}/to", f"--data_root={tmp_path}"])

    sounds = {f"data_44k/{name}.wav": .1 for name in ("f0003_0_cough", "f0003_1_sigh", "m0004_0_sniff")}
    head = "spk_id,gender\n"
    for header in (head, ""):  # whether the file has one is not known
        assert convert("VocalSound", sounds | {"meta/te_meta.csv": header + "f0003,female,30\n",
                                               "meta/tr_meta.csv": header + "m0004,male,40\n"}) == 0
        for split, outputs in (("test", ["cough", "sigh"]), ("train", ["sniff"])):
            file = f"{tmp_path}/to/VocalSound-VocalClassification/{split}.json"
            assert [item["output"] for item in Manifest(file, str(tmp_path)).items] == outputs
    assert convert("ESC-50", {"esc50.csv": "filename,fold,category,category_name\n1.wav,1,20,crying_baby\n",
                              "audio/1.wav": .1}) == 0
    file = f"{tmp_path}/to/ESC50-EventClassification/test.json"
    assert [item["output"] for item in Manifest(file, str(tmp_path)).items] == ["crying baby"]
    csv = "Emotion,Sentiment,Dialogue_ID,Utterance_ID\njoy,positive,0,0\n"
    videos = {"test_sent_emo.csv": csv, "output_repeated_splits_test/dia0_utt0.mp4": b"mp4"}
    with pytest.raises(FileNotFoundError, match="none of the clips of meld"):
        convert("MELD", videos)
    assert "1 of 1 items are videos, whose sound is to be extracted" in capsys.readouterr().out
    assert convert("MELD", videos | {"output_repeated_splits_test/dia0_utt0.wav": .1}) == 0


def test_find(tmp_path):
    """What a name stands for: the nearest folder wins, and what is not sure is not there."""
    files = {path: "x" for path in ("a/train/x.wav", "b/dev/x.wav", "c/y.flac", "c/y.wav", "d/z.wav",
                                    "e/z.wav", "only/one/w.1.mp3", "f/.hidden.wav")}
    source = manifests.Folder(lay_out(tmp_path / "s", files))
    os.symlink(tmp_path / "s", tmp_path / "s/a/above")  # is not followed for ever
    assert manifests.Folder(source.path).files == source.files
    for wanted, found in ((["train/x.wav"], "a/train/x.wav"), (["Train/x"], "a/train/x.wav"),
                          (["x.wav"], None), (["test/x.wav"], None),
                          (["test/x.wav", "b/dev/x.wav"], "b/dev/x.wav"),
                          (["y.wav"], "c/y.flac"), (["z.wav"], None), (["e/z"], "e/z.wav"),
                          (["w.1.wav"], "only/one/w.1.mp3"), (["one/w.1"], "only/one/w.1.mp3"),
                          ([".hidden.wav"], None), ([" x.wav"], None)):
        assert source.find(*wanted) == found, wanted


# ------------------------------------------------------------------------------------------------------------
# Tables


@pytest.fixture
def mine(tmp_path):
    lay_out(tmp_path / "root/mine", {"a.wav": .5, "b.wav": 1., " c.wav": .25})
    def make(name, content, *options, to="Mine-AQA/train"):
        path = lay_out(tmp_path, {name: content}) + "/" + name
        return table.main([path, f"--data_root={tmp_path}/root", "--split_path=mine",
                           f"--to={tmp_path}/to/{to}.json", *options])
    make.items = lambda: list(Manifest(f"{tmp_path}/to/Mine-AQA/train.json", f"{tmp_path}/root").items)
    make.to = tmp_path / "to"
    return make


ASK = ("--name=path", "--prompt=What is heard?", "--output=label")
DOG = {"name": "a.wav", "prompt": "What is heard?", "output": "dog, small", "duration": 0.5}
CAT = {"name": "b.wav", "prompt": "What is heard?", "output": "café", "duration": 1.0}
ROWS = [{"path": "a.wav", "label": "dog, small"}, {"path": "b.wav", "label": "café"}]


@pytest.mark.parametrize("name, content", [
    ("t.csv", 'path,label\na.wav,"dog, small"\n\nb.wav,café\n'),
    ("t.csv", 'path;label\r\na.wav;"dog, small"\r\nb.wav;café\r\n'),
    ("t.csv", '\ufeffpath|label\na.wav|dog, small\nb.wav|café\n'),
    ("t.csv", '\n\npath;label\na.wav;dog, small\nb.wav;café'),
    ("t.txt", 'label\tpath\ndog, small\ta.wav\ncafé\tb.wav\n'),
    ("t.tsv", 'path\tlabel, or so\tlabel\na.wav\t,\tdog, small\nb.wav\t,\tcafé\n'),
    ("t.csv", 'path,label\na.wav,"dog, small"\nb.wav,café\n'.encode("latin-1")),
    ("t.csv", 'path,label\na.wav,"dog, small"\nb.wav,café\n'.encode("utf-16")),
    ("t.json", ROWS), ("t.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n\n"),
], ids=["comma", "semicolon, crlf", "bar, bom", "blank", "tab", "tsv", "latin-1", "utf-16", "json", "jsonl"])
def test_tables(name, content, mine, capsys):
    assert mine(name, content, *ASK) == 0
    assert mine.items() == [DOG, CAT]
    assert "2 rows" in capsys.readouterr().out


def test_table_columns(mine):
    """The prompt from a column, start and duration, kept columns, numbers, lists of clips and of labels."""
    rows = [{"path": ["a.wav", "b.wav"], "question": "Which is louder?", "n": 2, "start": 0.25, "group": "x"},
            {"path": ["b.wav"], "question": "How long?", "n": ["one", "1"], "start": 0, "group": None}]
    ask = ("--name=path", "--prompt=question", "--output=n", "--audio_start=start", "--keep=group")
    assert mine("t.json", rows, *ask) == 0
    assert mine.items() == [
        {"name": ["a.wav", "b.wav"], "prompt": "Which is louder?", "output": "2", "audio_start": 0.25,
         "duration": 1.0, "group": "x"},  # 0.25 + 0.75: what is heard of the two
        {"name": "b.wav", "prompt": "How long?", "output": "one, 1", "audio_start": 0.0, "duration": 1.0}]
    two = 'first,second,label,s\na.wav,b.wav,x,1.25\n" c.wav",,y,0.25\n"[""a.wav"", ""b.wav""]",,z,2\n'
    ask = ("--name=first,second", "--prompt=What is it?", "--output=label", "--duration=s")
    assert mine("t.csv", two, *ask) == 0
    assert [item["name"] for item in mine.items()] == [["a.wav", "b.wav"], " c.wav", ["a.wav", "b.wav"]]
    assert [item["duration"] for item in mine.items()] == [1.25, 0.25, 2.0]


def test_table_with_clips_that_are_missing(mine, capsys):
    start = "path,label,s\na.wav,x,0\ngone.wav,y,0\na.wav,z,3\n"
    assert mine("t.csv", start, *ASK, "--audio_start=s") == 1
    assert [item["output"] for item in mine.items()] == ["x"]
    out = capsys.readouterr().out
    assert "1 of 3 items are missing: 'gone.wav'" in out and "1 of 3 items are shorter than" in out


@pytest.mark.parametrize("content, saying, options", [
    ("a.wav,dog\nb.wav,cat\n", ["t.csv: no column 'path'", "header is missing"], ASK),
    ("path,lable\na.wav,dog\n", ["t.csv: no column 'label' for --output", "nearest: lable"], ASK),
    ("path,label\n", ["t.csv", "no row"], ASK),
    ("", ["t.csv"], ASK),
    ("path,label\na.wav,dog\nb.wav,\n", ["t.csv row 2 (line 3), column 'label'", "empty"], ASK),
    ("path,label\na.wav,dog\nb.wav,  \n", ["row 2 (line 3), column 'label'", "empty"], ASK),
    ("path,label\na.wav,\"two\nlines\"\n,cat\n", ["row 2 (line 4), column 'path'", "empty"], ASK),
    ("path,label\na.wav,nan\n", ["row 1 (line 2), column 'label'", "NaN"], ASK),
    ("path,label\na.wav,dog\nb.wav,cat\na.wav,dog\n", ["row 3 (line 4), column 'path'", "row 1 (line 2)"],
     ASK),
    ("path,label\na.wav,dog,cat\n", ["row 1 (line 2): 3 cells, expected 2"], ASK),
    ("path,label,label\na.wav,dog,cat\n", ["2 columns named 'label'"], ASK),
    ("path,label,d\na.wav,dog,nan\n", ["row 1 (line 2), column 'd'", "'nan'"], (*ASK, "--duration=d")),
    ("path,label,d\na.wav,dog,-1\n", ["row 1 (line 2), column 'd'", "'-1'"], (*ASK, "--audio_start=d")),
    ("path,label,d\na.wav,dog,1:30\n", ["column 'd'", "seconds"], (*ASK, "--duration=d")),
    ("path,label\na.wav,dog\n", ["no column 'lable' for --prompt", "label"],
     ("--name=path", "--prompt=lable", "--output=label")),
    ("path,label\nz.wav,dog\n", ["t.csv: none of its clips"], ASK),
    ("path,label\n../../x.wav,dog\n", ["t.csv: none of its clips"], ASK),
    (b"path,label\na.wav,caf\xe9\n", ["t.csv: byte", "utf-8"], (*ASK, "--encoding=utf-8")),
    ("path,label\na.wav,dog\n", ["encoding = 'utf-9'"], (*ASK, "--encoding=utf-9")),
    ("path,label\na.wav,dog\n", ["--kepe"], (*ASK, "--kepe=x")),
    ("path,label\na.wav,dog\nb.wav,\"cat\nc.wav,cow\n", ["t.csv line 3", "a quote", "never ends"], ASK),
    ("path,label\na.wav,\"two\nlines\"\nb.wav,\"cat", ["t.csv line 4", "a quote", "never ends"], ASK),
    ("path,label\n\"[a.wav\"\"]\",dog\n", ["row 1 (line 2), column 'path'", "no list"], ASK),
    ("path,label\na.wav,dog\n", ["delimiter = ',,', expected one"], (*ASK, "--delimiter=,,")),
    ("path,label,prompt\na.wav,dog,x\n", ["--keep=prompt", "--prompt=prompt"], (*ASK, "--keep=prompt")),
    ("path,label,audio_start\na.wav,dog,1\n", ["--audio_start=audio_start"], (*ASK, "--keep=audio_start")),
])
def test_table_errors(content, saying, options, mine):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        mine("t.csv", content, *options)
    for word in saying:
        assert word in str(caught.value), caught.value
    assert not mine.to.exists() or not any(names for _, _, names in os.walk(mine.to))


def test_table_errors_of_json(mine, tmp_path):
    for content, saying in (('{"path": "a.wav", "label": "x"}\n{"path"\n', "t.jsonl row 2: not JSON"),
                            ('{"path": "a.wav", "label": NaN}\n', "t.jsonl row 1, column 'label': NaN"),
                            ('{"path": "a.wav", "label": "x"}\n{"path": "a.wav"}\n',
                             "row 2, column 'label': empty"),
                            ('{"path": "a.wav", "path": "b.wav", "label": "x"}', "row 1: not JSON ('path'"),
                            ('{"path": "a.wav", "label": []}', "row 1, column 'label': empty"),
                            ('{"path": "a.wav", "label": ["x", []]}', "row 1, column 'label': empty"),
                            ('{"path": "a.wav", "label": {"x": 1}}', "column 'label': an object, expected"),
                            ("[" * 100_000, "t.jsonl: not JSON"), ("", "t.jsonl: holds no row"),
                            ('["a.wav"]', "row 1: a str, expected an object")):
        with pytest.raises(ValueError, match=re.escape(saying)):
            mine("t.jsonl", content, *ASK)
    with pytest.raises(ValueError, match="row 1, column 'd': True, expected seconds"):
        mine("t.jsonl", '{"path": "a.wav", "label": "x", "d": true}', *ASK, "--duration=d")
    lay_out(tmp_path / "root", {"x.wav": .1})
    with pytest.raises(ValueError, match="inside data_root"):
        mine("t.jsonl", '{"path": "../../root/x.wav", "label": "x"}', *ASK)
    assert not any(names for _, _, names in os.walk(mine.to))


def test_parquet(mine, tmp_path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:  # pyarrow is an extra, and new ones want numpy 2
        with pytest.raises(ModuleNotFoundError, match="requirements-prepare.txt"):
            mine("t.parquet", b"PAR1", *ASK)
        return
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert mine("t.parquet", open(tmp_path / "rows.parquet", "rb").read(), *ASK) == 0
    assert mine.items() == [DOG, CAT]
    with pytest.raises(ValueError, match="not readable as Parquet"):
        mine("t.parquet", b"PAR1", *ASK)


def test_an_older_manifest_stays_when_the_new_one_fails(mine):
    assert mine("t.csv", "path,label\na.wav,dog\n", *ASK) == 0
    before = open(mine.to / "Mine-AQA/train.json").read()
    for content in ("path,label\nb.wav,\n", "path,label\nz.wav,dog\n"):
        with pytest.raises((ValueError, FileNotFoundError)):
            mine("t.csv", content, *ASK)
    assert open(mine.to / "Mine-AQA/train.json").read() == before
    assert os.listdir(mine.to / "Mine-AQA") == ["train.json"]


def test_scripts(tmp_path):
    """As a user runs them: one process each; errors in one line with exit code 2."""
    lay_out(tmp_path, {"clips.csv": "path,label\na.wav,dog\n", "root/a.wav": .5})
    command = [sys.executable, f"{ROOT}/prepare/table.py", "clips.csv", *ASK, f"--data_root={tmp_path}/root"]
    done = subprocess.run([*command, f"--to={tmp_path}/Mine-AQA/val.json"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len(Manifest(f"{tmp_path}/Mine-AQA/val.json", f"{tmp_path}/root")) == 1
    fails_with_one_line("prepare/table.py", tmp_path / "none.csv", *ASK, "--to=x-AQA/train.json",
                        saying="none.csv: no such table")
    fails_with_one_line("prepare/datasets.py", "esc50", f"--from={tmp_path}", saying="meta/esc50.csv")
    fails_with_one_line("prepare/table.py", tmp_path / "clips.csv", *ASK,
                        f"--to={tmp_path}/clips.csv/x/train.json",
                        saying="clips.csv/x: cannot be written to")
    shown = run("prepare/datasets.py", "--help").stdout
    assert all(converter.__name__ in shown for converter in datasets.CONVERTERS)
    assert "https://zenodo.org/records/6473207" in shown
