"""The converters of question sets, for datasets.py: a source's questions and answers as (manifest, item)s."""
import ast
import json
import os
import random
import re
import zlib
from collections import Counter

from prepare.manifests import stem
from tools.eval.records import LETTERS, read_questions

CONFIDENCE = {"yes": 1.0, "maybe": 0.6, "no": 0.1}  # weight of an answer of Clotho-AQA in the vote


def clotho_aqa(source):
    """Clotho-AQA: six questions about each of 1,991 clips of Clotho, three answers each.
    home: https://zenodo.org/records/6473207
    licence: LICENSE.txt of the record (what it says was not confirmed)
    layout: clotho_aqa_{train,val,test}.csv (an answer a row), audio_files/*.wav (more than are asked about)
    Train: what most say of a yes-or-no question, by confidence, else an item a distinct answer. Elsewhere all
    three joined by ", ", as eval.py wants them. The zip has "souffle_me.tallique.wav", the CSV an underscore.
    """
    for split, path in source.splits(train="clotho_aqa_train.csv", val="clotho_aqa_val.csv",
                                     test="clotho_aqa_test.csv"):
        questions = {}
        for row in source.rows(path, "file_name", "QuestionText", "answer", "confidence"):
            answer, sure = row["answer"].strip().replace(",", " "), row["confidence"].strip().lower()
            asked = row["file_name"], row["QuestionText"].strip()
            questions.setdefault(asked, []).append((answer, CONFIDENCE.get(sure, CONFIDENCE["no"])))
        for (name, question), told in questions.items():
            clip = source.clip(f"audio_files/{name}", name, name.replace("me_tallique", "me.tallique"))
            answers, votes = [answer for answer, _ in told], Counter()
            for answer, weight in told:
                votes[answer.lower()] += weight
            if split != "train":
                answers = [", ".join(answers)]
            elif set(votes) <= {"yes", "no"}:
                answers = [max(votes, key=votes.get)]
            else:
                answers = list(votes)
            for answer in answers:
                yield f"Clotho-AQA-AQA/{split}", {"name": clip, "prompt": question, "output": answer}


def music_avqa(source):
    """MUSIC-AVQA: questions about 9,288 videos of music, those about sound (AQA_All) and both (AVQA_All).
    home: https://github.com/GeWu-Lab/MUSIC-AVQA
    licence: GPL-3.0
    layout: data/json_update/avqa-{train,val,test}.json (corrected; without them data/json/), the sound of the
        videos as audio/{video_id}.wav
    Which of the two the published score is of is not known. Deleted and repeated questions are left out.
    """
    of_kind = {"Audio": "AQA_All", "Audio-Visual": "AVQA_All"}
    files = {split: f"avqa-{split}.json" for split in ("train", "val", "test")}
    for split, path in source.splits(**{s: (f"json_update/{f}", f"json/{f}", f) for s, f in files.items()}):
        seen = set()
        for row in source.json(path):
            (kind, category), slots = json.loads(row["type"]), json.loads(row["templ_values"])
            question = row["question_content"].strip()
            for value in slots:
                question = re.sub(r"<[^<>]+>", lambda _: value.replace("_", " "), question, count=1)
            key = row["video_id"], question
            if kind not in of_kind or row.get("question_deleted") or key in seen:
                continue
            seen.add(key)
            clip = source.clip(f"audio/{row['video_id']}.wav", f"{row['video_id']}.wav")
            answer = row["anser"].replace("_", " ")  # so they spell it
            one = {"name": clip, "prompt": question, "output": answer, "category": category}
            yield f"Music-AVQA-{of_kind[kind]}/{split}", one


def mmau(source):
    """MMAU: 1,000 questions with answers (test-mini), 9,000 without (test); sound, music, speech.
    home: https://github.com/Sakshi113/MMAU
    licence: Apache-2.0
    layout: mmau-test-mini.json, mmau-test.json, test-mini-audios/*.wav, test-audios/*.wav
    eval.py reads the official file itself; a manifest adds where the clips lie, and their durations. The file
    of v05.15.25 has changed 258 questions of the first, which published scores are of.
    """
    for split, path in source.splits(**{"test-mini": "mmau-test-mini.json", "test": "mmau-test.json"}):
        for question in read_questions(path):
            clip = source.clip(question["name"], os.path.basename(question["name"]))
            yield f"MMAU/{split}", question | {"name": clip}


def muchomusic(source):
    """MuChoMusic: 1,187 questions with four options about 644 tracks of Song Describer and MusicCaps.
    home: https://zenodo.org/records/12709974
    licence: CC BY-SA 4.0; no sound in it
    layout: muchomusic.csv; Song Describer's NN/{id}.2min.mp3, MusicCaps' [{ytid}]-[{start}-{end}].wav
    Options in an order of the question's own, always the same (the authors' is not seeded).
    """
    tracks = {name[1:].split("]-[")[0]: name for name in source.files if name.startswith("[")}
    columns = ("question", "correct_answer", "dataset", "dataset_identifier",
               *(f"distractor_{i}_answer" for i in (1, 2, 3)))
    for row in source.rows("muchomusic.csv", *columns):
        ident = row["dataset_identifier"].removesuffix(".json")
        if row["dataset"] == "musiccaps":
            ident = ident.rpartition("_")[0]  # what follows the last one is no part of the video's id
        clip = source.clip(f"{ident}.2min.mp3", tracks.get(ident, f"{ident}.wav"), f"{ident}.wav")
        options = [row["correct_answer"], *(row[f"distractor_{i}_answer"] for i in (1, 2, 3))]
        random.Random(zlib.crc32((ident + row["question"]).encode())).shuffle(options)
        listed = " ".join(f"({letter}) {option.rstrip('.')}." for letter, option in zip(LETTERS, options))
        groups = {key: ast.literal_eval(row[key] or "[]") for key in ("music_knowledge", "music_reasoning")
                  if key in row}
        yield "MuChoMusic-AQA/test", {
            "name": clip, "prompt": f"{row['question']} {listed}", "output": row["correct_answer"],
            "choices": options, "dataset": row["dataset"], "genre": row.get("genre", "")} | groups


def openaqa(source):
    """OpenAQA: 5.6 million questions about AudioSet, VGGSound, FSD50K, AudioCaps, Clotho and others.
    home: https://github.com/YuanGongND/ltu
    licence: not confirmed; no sound in it
    layout: openaqa_5.6M.json, or other .json lists of {instruction, input, audio_id, dataset, task, output}
        beside each other; the clips of its sets below, in folders that end as their paths in audio_id do
    A name that is no number will do alone; numbers are names in several of the sets.
    """
    lists = [name for name, files in source.files.items() if name in files and name.endswith(".json")]
    if not lists:
        source.need("openaqa_5.6M.json")
    for file in lists:
        for row in source.json(file):
            path, name = row["audio_id"].lstrip("/"), os.path.basename(row["audio_id"])
            clip = source.clip(path) if stem(name).isdigit() else source.clip(path, name)
            prompt = f"{row['instruction']} {row.get('input') or ''}".strip()
            yield "OpenAQA-AQA/train", {"name": clip, "prompt": prompt, "output": row["output"],
                                        "task": row["task"], "dataset": row["dataset"]}


def reasonaqa(source):
    """ReasonAQA, Mellow's data: reasoning about AudioCaps and Clotho, and differences of two clips.
    home: https://zenodo.org/records/15036628 (https://github.com/soham97/mellow, arXiv 2503.08540)
    licence: not confirmed; no sound in it
    layout: {train,val,test}.json, lists of {taskname, filepath1, filepath2, input, answer, subtype}; clips by
        their paths: AudioCapsLarger/{split}/Y{ytid}.wav, ClothoV21/{development,...}/, ClothoAQA/audio_files/
    Of Clotho the folder has to agree (names may repeat), of the others the name will do. Some paths have
    backslashes. "filepath2" is empty unless two clips are compared; test is also written by subtype.
    """
    for split, path in source.splits(train="train.json", val="val.json", test="test.json"):
        for row in source.json(path):
            paths = [str(row.get(key) or "").replace("\\", "/") for key in ("filepath1", "filepath2")]
            clips = [source.clip(path) if path.lower().startswith("clothov") else
                     source.clip(path, os.path.basename(path)) for path in paths if path]
            if not clips or not str(row["answer"] or "").strip():
                source.notes["questions without a clip or an answer are left out"] += 1
                continue
            task = str(row.get("subtype", "")).removesuffix(".json")
            one = {"name": clips if len(clips) > 1 else clips[0], "prompt": row["input"],
                   "output": row["answer"], "task": task, "dataset": row["taskname"]}
            yield f"ReasonAQA-AQA/{split}", one
            if split == "test" and task:
                yield f"ReasonAQA-AQA/test_{task}", one
