"""Question sets, for datasets.py: functions that yield a source's questions as (Name-Task/split, item)."""
import ast
import os
import random
import re
import zlib
from collections import Counter, defaultdict

from prepare.manifests import add_options, stem
from tools.common import UserError

CONFIDENCE = {"yes": 1.0, "maybe": 0.6, "no": 0.1}  # weight of an answer of Clotho-AQA in the vote


def parse_list(row, column):
    """The list that a cell holds as JSON or as Python writes it."""
    try:
        return list(ast.literal_eval(str(row[column]) or "[]"))
    except (ValueError, SyntaxError, TypeError) as error:
        raise UserError(f"{row.where}, column {column!r}: {row[column]!r:.80}, expected a list") from error


def clotho_aqa(source):
    """Clotho-AQA: six questions about each of 1,991 clips of Clotho, three answers each.
    home: https://zenodo.org/records/6473207
    licence: LICENSE.txt of the record (what it says was not confirmed)
    layout: clotho_aqa_{train,val,test}.csv (an answer a row), audio_files/*.wav (more than are asked about)
    Train: what most say of a yes-or-no question, by confidence, else an item a distinct answer. Elsewhere all
    three joined by ", ", as eval.py wants them. The zip has "souffle_me.tallique.wav", the CSV an underscore.
    """
    questions = defaultdict(list)
    for row in source.rows(["clotho_aqa_{}.csv"], "train", "val", "test"):
        questions[row["part"], row["file_name"], row["QuestionText"].strip()].append(row)
    for (split, name, question), rows in questions.items():
        clip = source.clip(f"audio_files/{name}", name, name.replace("me_tallique", "me.tallique"))
        answers = [row["answer"].strip().replace(",", " ") for row in rows]
        votes = Counter()
        for answer, row in zip(answers, rows):
            votes[answer.lower()] += CONFIDENCE.get(row["confidence"], 0.1)
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
    Which of the two the published score is of is not known. Deleted and repeated questions are left out, and
    ids that stand for different questions or answers: 27 of val and 55 of test in data/json/.
    """
    tasks = {"Audio": "AQA_All", "Audio-Visual": "AVQA_All"}
    files = "json_update/avqa-{}.json", "json/avqa-{}.json", "avqa-{}.json"
    rows, known = [], set()
    for row in source.rows(files, "train", "val", "test"):
        if row.get("question_deleted") not in ("1", True):
            ident = row.get("question_id", f"row {len(rows)}")
            rows.append((f"{row['part']} {ident}", str(row), row))
    for row in source.consistent(rows):
        kind, category = parse_list(row, "type")
        question = row["question_content"].strip()
        for slot in parse_list(row, "templ_values"):
            question = re.sub(r"<[^<>]+>", slot.replace("_", " "), question, count=1)
        split, video = row["part"], row["video_id"]
        key = f"{split} {video} {question}"
        if kind not in tasks or key in known:
            continue
        known.add(key)
        clip = source.clip(f"audio/{video}.wav", f"{video}.wav")
        answer = row["anser"].replace("_", " ")  # so they spell it
        item = {"name": clip, "prompt": question, "output": answer, "category": category}
        yield f"Music-AVQA-{tasks[kind]}/{split}", item


def mmau(source):
    """MMAU: 1,000 questions with answers (test-mini), 9,000 without (test); sound, music, speech.
    home: https://github.com/Sakshi113/MMAU
    licence: Apache-2.0
    layout: mmau-test-mini.json, mmau-test.json, test-mini-audios/*.wav, test-audios/*.wav
    eval.py reads the official file itself; a manifest adds where the clips lie, and their durations. The file
    of v05.15.25 has changed 258 questions of the first, which published scores are of.
    """
    from tools.eval.records import read_questions  # here: it imports torch, for seconds
    for split, path in source.parts(["mmau-{}.json"], "test-mini", "test"):
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
    for row in source.rows(["muchomusic.csv"], "test"):
        ident = row["dataset_identifier"].removesuffix(".json")
        if row["dataset"] == "musiccaps":
            ident = ident.rpartition("_")[0]  # what follows the last one is no part of the video's id
        clip = source.clip(f"{ident}.2min.mp3", tracks.get(ident, f"{ident}.wav"), f"{ident}.wav")
        options = [row["correct_answer"], *(row[f"distractor_{i}_answer"] for i in (1, 2, 3))]
        random.Random(zlib.crc32((ident + row["question"]).encode())).shuffle(options)
        item = {"name": clip, "prompt": add_options(row["question"], options), "choices": options,
                "output": row["correct_answer"], "dataset": row["dataset"], "genre": row["genre"]}
        for group in ("music_knowledge", "music_reasoning"):
            item[group] = parse_list(row, group)
        yield "MuChoMusic-AQA/test", item


def openaqa(source):
    """OpenAQA: 5.6 million questions about AudioSet, VGGSound, FSD50K, AudioCaps, Clotho and others.
    home: https://github.com/YuanGongND/ltu
    licence: not confirmed; no sound in it
    layout: openaqa_5.6M.json, or other .json lists of {instruction, input, audio_id, dataset, task, output}
        beside each other; the clips of its sets below, in folders that end as their paths in audio_id do
    A name that is no number will do alone; numbers are names in several of the sets.
    """
    lists = sorted(name for name in os.listdir(source.path) if name.endswith(".json"))
    for row in source.rows(["{}"], *(lists or ["openaqa_5.6M.json"])):
        path, name = row["audio_id"].lstrip("/"), os.path.basename(row["audio_id"])
        wanted = [path] if stem(name).isdigit() else [path, name]
        prompt = f"{row['instruction']} {row.get('input', '')}".strip()
        yield "OpenAQA-AQA/train", {"name": source.clip(*wanted), "prompt": prompt, "output": row["output"],
                                    "task": row["task"], "dataset": row["dataset"]}


def reasonaqa(source):
    """ReasonAQA, Mellow's data: reasoning about AudioCaps and Clotho, and differences of two clips.
    home: https://zenodo.org/records/15036628 (https://github.com/soham97/mellow, arXiv 2503.08540)
    licence: not confirmed; no sound in it
    layout: {train,val,test}.json, lists of {taskname, filepath1, filepath2, input, answer, subtype}; clips by
        their paths: AudioCapsLarger/{split}/Y{ytid}.wav, ClothoV21/{development,...}/, ClothoAQA/audio_files/
    Of Clotho the folder has to agree (names may repeat), of the others the name will do. Some paths have
    backslashes. "filepath2" is empty unless two clips are compared; test is also written by subtype.
    Questions without a clip or an answer are left out.
    """
    for row in source.rows(["{}.json"], "train", "val", "test"):
        clips = []
        for key in ("filepath1", "filepath2"):
            path = row.get(key, "").replace("\\", "/")
            wanted = [path] if path.lower().startswith("clothov") else [path, os.path.basename(path)]
            if path:
                clips.append(source.clip(*wanted))
        if not clips or not row["answer"]:
            continue
        task = row.get("subtype", "").removesuffix(".json")
        item = {"name": clips if len(clips) > 1 else clips[0], "prompt": row["input"],
                "output": row["answer"], "task": task, "dataset": row["taskname"]}
        yield f"ReasonAQA-AQA/{row['part']}", item
        if row["part"] == "test" and task:
            yield f"ReasonAQA-AQA/test_{task}", item
