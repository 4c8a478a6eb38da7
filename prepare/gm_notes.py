"""A small audio question-answering set of real sampled instruments: 16 kHz wavs of 2.5 s and manifests.

The General-MIDI soundfont inside pretty_midi, played by tinysoundfont: 128 programs in 16 families of 8.

    python prepare/gm_notes.py --out data/gm                        # the default set: 4,968 clips, 400 MB
    python prepare/gm_notes.py --out data/few --train 160 --test 64 --val 32 --test_programs 32 --questions 32

Writes OUT/audio/<split>/*.wav, OUT/manifests/<Name-Task>/<split>.json (data_root = OUT), OUT/clips.json (the
notes of every clip) and OUT/settings.json. The same settings give the same bytes; a second run does nothing.

Splits. A (program, pitch, velocity) note of train is never played in val or test. In this soundfont velocity
mostly scales the waveform, and the loader peak-normalises, so test asks for sounds that are near to known
ones, in other rhythms, lengths and noise; generalisation to unknown instruments is measured by test_programs:
it has the sixteen programs marked * in gm_families.json, which no other split plays.
"""
import functools
import json
import os
import sys
from collections import defaultdict
from itertools import groupby, zip_longest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

import config as settings
from prepare.manifests import add_options, save_manifest
from tools.common import (UserError, map_parallel, name_disk_errors, new_folder, optional_import,
                          read_json)

out: str = "data/gm"  # folder to write
train: int = 4000  # clips: three quarters solo, one quarter duo
val: int = 128  # clips: three fifths solo, two fifths duo
test: int = 600  # clips: three fifths solo, two fifths duo
test_programs: int = 240  # solo clips of the held-out programs
train_questions: int = 3000  # per task at most; of register, loudness, count and order two fifths
questions: int = 120  # per task of a test split at most; val has a fifth
seed: int = 0  # of everything that is drawn

RATE, SECONDS = 16000, 2.5
RENDER_RATE = 32000  # the synth filters nothing it pitches up: play at 32 kHz, resample without aliasing
SPLITS = ("train", "val", "test", "test_programs")
RECIPE = 7  # raise when the same settings would give other files

# The 128 programs in General-MIDI order, without the brackets of the standard's names ("Lead 1 (square)").
# * is held out for test_programs: a typical member of its family with close relatives left in train (a viola
# beside violin and cello), never the odd one (timpani in strings, orchestra hit in ensemble).
FAMILIES = read_json(settings.resolve_path("prepare/gm_families.json"))
LISTED = [name for names in FAMILIES.values() for name in names]
PROGRAMS = [name.lstrip("*") for name in LISTED]  # PROGRAMS[program] is the instrument's name
HELD_OUT = {program for program, name in enumerate(LISTED) if name.startswith("*")}
FAMILY_NAMES = list(FAMILIES)  # a program's family is FAMILY_NAMES[program // 8]
# MIDI keys, with gaps of 9 semitones
REGISTERS = {"low": range(40, 48), "middle": range(56, 64), "high": range(72, 80)}
EVERY_KEY = [key for keys in REGISTERS.values() for key in keys]
COUNTS = ["one", "two", "three"]
QUESTIONS = [  # task, prompt, what is asked about, number of options; all but three are easy
    ("GM-Family-AQA", "Which family?", "family", 0),
    ("GM-FamilyMC-AQA", "Which family?", "family", 4),
    ("GM-Instrument-AQA", "Which instrument?", "instrument", 0),
    ("GM-Register-AQA", "Low, middle or high?", "register", 0),
    ("GM-Loudness-AQA", "Louder or softer?", "trend", 0),
    ("GM-Count-AQA", "How many notes?", "count", 0),
    ("GM-Order-AQA", "Which comes first?", "first", 2)]
SOFT_TO_LOUD = {1: [(50, 127)], 2: [(36, 48), (110, 127)], 3: [(30, 38), (58, 72), (112, 127)]}  # velocities

# ------------------------------------------------------------------------------------------------------------
# Clips


def split_of(program, key, velocity):
    """Who may play this note: test and val own 1 velocity in 8 of each program and key, train the rest."""
    return {0: "test", 4: "val"}.get((key + 3 * program + velocity) % 8, "train")


def shuffled(rng, items):
    return [items[i] for i in rng.permutation(len(items))]


def cycle(rng, options, n):
    """n draws, each option as often as any other (within one), in random order."""
    draws = []
    while len(draws) < n:
        draws += shuffled(rng, options)
    return draws[:n]


class NoteDraws:
    """Random notes of a split."""

    def __init__(self, split, n_clips, rng):
        self.split, self.rng, self.queues = split, rng, []
        for first in range(0, 128, 8):
            members = [p for p in range(first, first + 8) if (p in HELD_OUT) == (split == "test_programs")]
            self.queues.append(iter(cycle(rng, members, 8 * (n_clips + 16))))

    def program_and_key(self, family, keys):
        """The family's next program that has a sound at some of the keys, and one of these."""
        for program in self.queues[family]:
            with_sound = [key for key in keys if has_sound(program, key)]
            if with_sound:
                return program, int(self.rng.choice(with_sound))

    def velocity(self, program, key, low, high):
        allowed = [v for v in range(low, high + 1)
                   if self.split in ("test_programs", split_of(program, key, v))]
        return int(self.rng.choice(allowed))


def plan_solo(draws, family, register, count, trend):
    """A clip of one pitch of one program, one to three times, louder or softer each time."""
    program, key = draws.program_and_key(family, REGISTERS[register])
    velocities = [draws.velocity(program, key, *bounds) for bounds in SOFT_TO_LOUD[count]]
    if trend == "softer":
        velocities.reverse()
    slot = 2.3 / count
    start = draws.rng.uniform(0.03, 0.15)
    length = draws.rng.uniform(0.45, slot - 0.3)  # how much of the clip sounds does not tell the count
    return {
        "notes": [(program, key, velocity, round(start + i * slot, 3), round(length, 3))
                  for i, velocity in enumerate(velocities)],
        "family": FAMILY_NAMES[family],
        "instrument": PROGRAMS[program],
        "register": register,
        "count": COUNTS[count - 1],
        "trend": trend if count > 1 else None}


def plan_duo(draws, first):
    """A clip of one note of each of two families, the second after the first has stopped."""
    second = (first + int(draws.rng.integers(1, 16))) % 16
    starts = draws.rng.uniform((0.03, 1.28), (0.15, 1.4)).tolist()
    notes = []
    for family, start in zip((first, second), starts):
        program, key = draws.program_and_key(family, EVERY_KEY)
        velocity = draws.velocity(program, key, 50, 127)
        length = draws.rng.uniform(0.6, 0.95)
        notes.append((program, key, velocity, round(start, 3), round(length, 3)))
    return {"notes": notes, "first": FAMILY_NAMES[first], "second": FAMILY_NAMES[second]}


def plan_clips(split, n_solo, n_duo, rng):
    """Clips as dicts: name, notes [(program, key, velocity, start s, length s), ...], what is asked about."""
    draws = NoteDraws(split, n_solo + n_duo, rng)
    trends = [(count, trend) for count in (1, 2, 3) for trend in ("louder", "softer")]
    solo = zip(
        cycle(rng, range(16), n_solo),
        cycle(rng, list(REGISTERS), n_solo),
        cycle(rng, trends, n_solo))
    clips = [plan_solo(draws, family, register, *trend) for family, register, trend in solo]
    clips += [plan_duo(draws, first) for first in cycle(rng, range(16), n_duo)]
    return [clip | {"name": f"{i:05d}.wav"} for i, clip in enumerate(shuffled(rng, clips))]


# ------------------------------------------------------------------------------------------------------------
# Questions


def make_item(clip, prompt, output, **more):
    return {"name": clip["name"], "prompt": prompt, "output": output, "duration": SECONDS} | more


def with_article(name):
    return ("an " if name[0] in "aeiou" else "a ") + name


def caption_item(clip):
    """An item for captioning and for prepare/clap.py: "positives" are more captions, what is true of the clip
    one thing at a time; "negatives" are wrong ones, the same sounds in the other order."""
    if "first" in clip:
        first, second = clip["first"], clip["second"]
        return make_item(clip, "Describe the sound.", f"first {first}, then {second}",
                         positives=[f"first {first}", f"then {second}"],
                         negatives=[f"first {second}, then {first}"])
    notes = "note" if clip["count"] == "one" else "notes"
    family, instrument = with_article(clip["family"]), with_article(clip["instrument"])
    text = f"{clip['count']} {clip['register']} {notes} of {instrument}, {family} instrument"
    positives = [clip["family"], clip["instrument"]]
    positives += [f"{clip['register']} pitch", f"{clip['count']} in number"]
    if clip["trend"]:
        positives.append(f"getting {clip['trend']}")
        text += f", getting {clip['trend']}"
    return make_item(clip, "Describe the sound.", text, positives=positives)


def balanced(clips, field, n, rng):
    """Up to n clips that have the field, in random order, each value as often as the clips allow."""
    groups = defaultdict(list)
    for clip in shuffled(rng, clips):
        if clip.get(field):
            groups[clip[field]].append(clip)
    in_order = [groups[value] for value in sorted(groups)]
    turns = zip_longest(*shuffled(rng, in_order))  # shuffled: else a short list would favour early names
    taken = [clip for turn in turns for clip in turn if clip]
    return shuffled(rng, taken[:n])


def wrong_options(clip, n, rng):
    if n == 1:
        return [clip["second"]]
    return list(rng.choice([name for name in FAMILY_NAMES if name != clip["family"]], n, replace=False))


def make_questions(split, clips, n, rng):
    """{Name-Task: items}; n questions of a task, in train 2n/5 of the easier four."""
    tasks = {}
    for number, (task, prompt, field, n_options) in enumerate(QUESTIONS):
        if split == "test_programs" and number >= 2:
            return tasks
        easy = split == "train" and number >= 3
        asked = balanced(clips, field, 2 * n // 5 if easy else n, rng)
        tasks[task] = [make_item(clip, prompt, clip[field]) for clip in asked]
        if n_options:
            for clip, item, position in zip(asked, tasks[task], cycle(rng, range(n_options), len(asked))):
                options = wrong_options(clip, n_options - 1, rng)
                options.insert(position, clip[field])
                item["prompt"] = add_options(prompt, options)
    described = shuffled(rng, clips)[:len(clips) if split == "train" else n]
    tasks["GM-Note-AudioCaptioning"] = [caption_item(clip) for clip in described]
    return tasks


# ------------------------------------------------------------------------------------------------------------
# Sound


@functools.cache
def open_synth():
    """-> synth, soundfont; one per process."""
    tinysoundfont = optional_import("tinysoundfont", "the synthesiser", "demo")
    pretty_midi = optional_import("pretty_midi", "the soundfont", "demo")
    synth = tinysoundfont.Synth(gain=-6, samplerate=RENDER_RATE)
    return synth, synth.sfload(f"{pretty_midi.__path__[0]}/TimGM6mb.sf2")


def render_seconds(synth, seconds):
    """-> mono float32 (n,), what the synth plays next."""
    stereo = np.frombuffer(synth.generate(int(seconds * RENDER_RATE)), np.float32)
    return stereo.reshape(-1, 2).mean(1)


def play(notes):
    """[(program, key, velocity, start s, length s), ...] -> mono float32 (SECONDS * RENDER_RATE,).

    Each note is damped 0.1 s after its release, so that organ and bells alike leave a gap, and nothing sounds
    on into the next note or clip (the synth's voices end 12 ms after sounds_off; it has no reverb).
    """
    synth, soundfont = open_synth()
    sound = np.zeros(int(SECONDS * RENDER_RATE), np.float32)
    for program, key, velocity, start, length in notes:
        synth.program_select(0, soundfont, 0, program)
        synth.noteon(0, key, velocity)
        parts = [render_seconds(synth, length)]
        synth.noteoff(0, key)
        parts.append(render_seconds(synth, 0.1))
        synth.sounds_off()
        parts.append(render_seconds(synth, 0.05))
        note = np.concatenate(parts)
        from_start = sound[int(start * RENDER_RATE):]
        from_start[:len(note)] += note[:len(from_start)]
    return sound


@functools.cache
def has_sound(program, key):
    """A few programs of the soundfont have holes (whistle above 78, ...)."""
    return play([(program, key, 99, 0, 0.1)]).any()


def render_clip(job):
    """(path, notes) -> a 16-bit wav. The peak is 0.5, of each half of a duo: notes of two programs. A room's
    noise is added, 44 to 54 dB below it: digital silence is 80 dB further down, and no recording has it."""
    path, notes = job
    sound = 0
    for _, of_one_program in groupby(notes, lambda note: note[0]):
        part = soxr.resample(play(of_one_program), RENDER_RATE, RATE)
        sound = sound + part * (0.5 / np.abs(part).max())
    name = "/".join(path.split("/")[-2:])
    rng = np.random.default_rng(list(name.encode()))  # of the clip alone: any order of work
    sound = sound + rng.uniform(0.001, 0.003) * rng.standard_normal(len(sound))
    with name_disk_errors(path, soundfile.LibsndfileError):
        soundfile.write(path, sound, RATE, subtype="PCM_16")


# ------------------------------------------------------------------------------------------------------------


def write_set(c, folder):
    """Write manifests, clips.json and the wavs."""
    notes_of = {}
    for number, split in enumerate(SPLITS):
        rng = np.random.default_rng([c.seed, number])
        n = getattr(c, split)
        n_duo = {"train": n // 4, "test_programs": 0}.get(split, 2 * n // 5)
        n_questions = {"train": c.train_questions, "val": c.questions // 5}.get(split, c.questions)
        clips = plan_clips(split, n - n_duo, n_duo, rng)
        for task, items in make_questions(split, clips, n_questions, rng).items():
            save_manifest(f"{folder}/manifests/{task}/{split}.json", f"audio/{split}", items)
        os.makedirs(f"{folder}/audio/{split}")
        for clip in clips:
            notes_of[f"audio/{split}/{clip['name']}"] = clip["notes"]
    with open(f"{folder}/clips.json", "w") as f:
        json.dump(notes_of, f)
    jobs = [(f"{folder}/{name}", notes) for name, notes in notes_of.items()]
    rendered = map_parallel(render_clip, jobs, os.cpu_count())
    for _ in tqdm(rendered, "render", len(jobs), disable=None):
        pass
    print(f"{c.out}: {len(jobs):,} clips; manifests in {c.out}/manifests, data_root {c.out}")


def main(c):
    folder = settings.resolve_path(c.out)
    names = (*SPLITS, "train_questions", "questions", "seed")
    made_with = {name: getattr(c, name) for name in names} | {"recipe": RECIPE}
    if os.path.exists(f"{folder}/settings.json"):
        if read_json(f"{folder}/settings.json") != made_with:
            raise UserError(f"--out={c.out} holds a set with other settings: choose another, or remove it")
        print(f"{c.out} is there already, with these settings: nothing to do")
        return
    with new_folder(folder) as temporary:
        write_set(c, temporary)
        with open(f"{temporary}/settings.json", "w") as f:
            json.dump(made_with, f, indent=1)


if __name__ == "__main__":
    settings.run(main, __file__, reads=())
