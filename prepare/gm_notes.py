"""A small audio question-answering set of real sampled instruments: 16 kHz wavs of 2.5 s and manifests.

The General-MIDI soundfont inside pretty_midi, played by tinysoundfont: 128 programs in 16 families of 8.

    python prepare/gm_notes.py --out data/gm                        # the default set: 4,968 clips, 400 MB
    python prepare/gm_notes.py --out data/few --train 160 --test 64 --val 32 --test_programs 32 --questions 32

Writes OUT/audio/<split>/*.wav, OUT/manifests/<Name-Task>/<split>.json (data_root = OUT), OUT/clips.json (the
notes of every clip) and OUT/settings.json. The same settings give the same bytes; a second run does nothing.

Splits. A (program, pitch, velocity) note of train is never played in val or test. In this soundfont velocity
mostly scales the waveform, and the loader peak-normalises, so test asks for sounds that are near to known
ones, in other rhythms, lengths and noise; what carries over to instruments never heard is asked by
test_programs. test_programs has the sixteen programs marked * below, which no other split plays.
"""
import argparse
import hashlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import sys
import tempfile

import numpy as np

from tools.common import UserError

RATE, SECONDS = 16000, 2.5
RENDER_RATE = 32000  # the synth filters nothing it pitches up: play at 32 kHz, resample without aliasing
RECIPE = 7  # raise when the same settings would give other files

# The 128 programs in General-MIDI order, without the brackets of the standard's names ("Lead 1 (square)").
# * is held out for test_programs: a typical member of its family with close relatives left in train (a viola
# beside violin and cello), never the odd one (timpani in strings, orchestra hit in ensemble).
FAMILIES = {
    "piano": "acoustic grand piano, bright acoustic piano, *electric grand piano, honky-tonk piano, "
             "electric piano 1, electric piano 2, harpsichord, clavinet",
    "chromatic percussion": "celesta, glockenspiel, music box, vibraphone, *marimba, xylophone, "
                            "tubular bells, dulcimer",
    "organ": "drawbar organ, percussive organ, *rock organ, church organ, reed organ, accordion, harmonica, "
             "tango accordion",
    "guitar": "nylon acoustic guitar, *steel acoustic guitar, jazz electric guitar, clean electric guitar, "
              "muted electric guitar, overdriven guitar, distortion guitar, guitar harmonics",
    "bass": "acoustic bass, fingered electric bass, *picked electric bass, fretless bass, "
            "slap bass 1, slap bass 2, synth bass 1, synth bass 2",
    "strings": "violin, *viola, cello, contrabass, tremolo strings, pizzicato strings, "
               "orchestral harp, timpani",
    "ensemble": "string ensemble 1, *string ensemble 2, synth strings 1, synth strings 2, "
                "choir aahs, voice oohs, synth choir, orchestra hit",
    "brass": "trumpet, *trombone, tuba, muted trumpet, french horn, brass section, "
             "synth brass 1, synth brass 2",
    "reed": "soprano sax, alto sax, *tenor sax, baritone sax, oboe, english horn, bassoon, clarinet",
    "pipe": "piccolo, flute, *recorder, pan flute, blown bottle, shakuhachi, whistle, ocarina",
    "synth lead": "square lead, *sawtooth lead, calliope lead, chiff lead, charang lead, voice lead, "
                  "fifths lead, bass and lead",
    "synth pad": "new age pad, *warm pad, polysynth pad, choir pad, bowed pad, metallic pad, "
                 "halo pad, sweep pad",
    "synth effects": "rain effect, soundtrack effect, crystal effect, atmosphere effect, *brightness effect, "
                     "goblins effect, echoes effect, sci-fi effect",
    "ethnic": "sitar, banjo, *shamisen, koto, kalimba, bagpipe, fiddle, shanai",
    "percussive": "tinkle bell, agogo, steel drums, woodblock, taiko drum, *melodic tom, "
                  "synth drum, reverse cymbal",
    "sound effects": "guitar fret noise, breath noise, seashore, bird tweet, telephone ring, "
                     "helicopter, *applause, gunshot",
}
LISTED = [name for names in FAMILIES.values() for name in names.split(", ")]
PROGRAMS = [name.lstrip("*") for name in LISTED]  # PROGRAMS[program] is the instrument's name
HELD_OUT = {program for program, name in enumerate(LISTED) if name.startswith("*")}
FAMILY_NAMES = list(FAMILIES)  # a program's family is FAMILY_NAMES[program // 8]
# MIDI keys, with gaps of 9 semitones
REGISTERS = {"low": range(40, 48), "middle": range(56, 64), "high": range(72, 80)}
COUNTS = ["one", "two", "three"]
SOFT_TO_LOUD = {1: [(50, 127)], 2: [(36, 48), (110, 127)], 3: [(30, 38), (58, 72), (112, 127)]}  # velocities


def split_of(program, key, velocity):
    """Who may play this note: test and val own 1 velocity in 8 of each program and key, train the rest."""
    return {0: "test", 4: "val"}.get((key + 3 * program + velocity) % 8, "train")


def cycle(rng, options, n):
    """n draws, each option as often as any other (within one), in random order."""
    return [options[i] for _ in range(-(-n // len(options))) for i in rng.permutation(len(options))][:n]


def plan_clips(split, n_solo, n_duo, playable, rng):
    """Clips as dicts: notes [(program, key, velocity, start s, length s), ...] and what is asked about.

    A solo clip repeats one pitch of one program one to three times, louder or softer each time; a duo clip
    has one note of each of two families, the second after the first has stopped.
    """
    programs = [[p for p in range(8 * f, 8 * f + 8) if (p in HELD_OUT) == (split == "test_programs")]
                for f in range(16)]
    queues = [iter(cycle(rng, members, 8 * (n_solo + n_duo + 16))) for members in programs]

    def pitch(program, keys):
        own = [k for k in keys if k in playable[program]]
        return int(rng.choice(own)) if own else None

    def velocity(program, key, low, high):
        own = [v for v in range(low, high + 1) if split in ("test_programs", split_of(program, key, v))]
        return int(rng.choice(own))

    clips = []
    solo = zip(cycle(rng, range(16), n_solo), cycle(rng, list(REGISTERS), n_solo),
               cycle(rng, [(count, trend) for count in (1, 2, 3) for trend in ("louder", "softer")], n_solo))
    for family, register, (count, trend) in solo:
        key = None
        while key is None:  # a few programs have no sound at some pitches: the next of the family plays then
            program = next(queues[family])
            key = pitch(program, REGISTERS[register])
        velocities = [velocity(program, key, *bounds) for bounds in SOFT_TO_LOUD[count]]
        slot, start = 2.3 / count, rng.uniform(0.03, 0.15)
        length = rng.uniform(0.45, slot - 0.3)  # so that how much of the clip sounds does not tell the count
        notes = [(program, key, v, round(start + i * slot, 3), round(length, 3))
                 for i, v in enumerate(velocities[::1 if trend == "louder" else -1])]
        clips.append({"kind": "solo", "notes": notes,
                      "family": FAMILY_NAMES[family], "instrument": PROGRAMS[program], "register": register,
                      "count": COUNTS[count - 1], "trend": trend if count > 1 else None})
    every_key = [key for keys in REGISTERS.values() for key in keys]
    for first in cycle(rng, range(16), n_duo):
        second = (first + int(rng.integers(1, 16))) % 16
        notes = []
        for family, start in ((first, rng.uniform(0.03, 0.15)), (second, rng.uniform(1.28, 1.4))):
            program = next(queues[family])
            key = pitch(program, every_key)
            loudness, length = velocity(program, key, 50, 127), rng.uniform(0.6, 0.95)
            notes.append((program, key, loudness, round(start, 3), round(length, 3)))
        clips.append({"kind": "duo", "notes": notes, "families": [FAMILY_NAMES[first], FAMILY_NAMES[second]]})
    return [clips[i] | {"name": f"{j:05d}.wav"} for j, i in enumerate(rng.permutation(len(clips)))]


def caption(clip):
    if clip["kind"] == "duo":
        return "first {}, then {}".format(*clip["families"])
    with_article = lambda name: ("an " if name[0] in "aeiou" else "a ") + name
    family, instrument = with_article(clip["family"]), with_article(clip["instrument"])
    plural = "" if clip["count"] == "one" else "s"
    trend = f", getting {clip['trend']}" if clip["trend"] else ""
    return f"{clip['count']} {clip['register']} note{plural} of {instrument}, {family} instrument{trend}"


def parts_of_caption(clip):
    """What is true of the clip, one thing at a time: more captions for prepare/clap.py."""
    if clip["kind"] == "duo":
        return ["first {}".format(clip["families"][0]), "then {}".format(clip["families"][1])]
    parts = [clip["family"], clip["instrument"], f"{clip['register']} pitch", f"{clip['count']} in number"]
    return parts + ([f"getting {clip['trend']}"] if clip["trend"] else [])


def balanced(clips, answer, n, rng):
    """Up to n clips that have an answer, in random order, each answer as often as the clips allow."""
    groups = {}
    for i in rng.permutation(len(clips)):
        if answer(clips[i]) is not None:
            groups.setdefault(answer(clips[i]), []).append(clips[i])
    groups = [groups[name] for name in sorted(groups)]
    groups = [groups[i] for i in rng.permutation(len(groups))]  # else a short list would favour early names
    longest = max(map(len, groups), default=0)
    turns = [group[turn] for turn in range(longest) for group in groups if turn < len(group)]
    return [turns[:n][i] for i in rng.permutation(len(turns[:n]))]


def choice(question, options):
    return question + "".join(f" ({letter}) {option}." for letter, option in zip("ABCD", options))


def questions(split, clips, n, rng):
    """{Name-Task: [(clip, prompt, output), ...]}; n questions of a task, in train 2n/5 of the easier four."""
    n_easy = 2 * n // 5 if split == "train" else n
    tasks = {}

    def ask(task, prompt, answer, n):
        tasks[task] = [(clip, prompt, answer(clip)) for clip in balanced(clips, answer, n, rng)]

    ask("GM-Family-AQA", "Which family?", lambda clip: clip.get("family"), n)
    asked = balanced(clips, lambda clip: clip.get("family"), n, rng)
    tasks["GM-FamilyMC-AQA"] = []
    for clip, place in zip(asked, cycle(rng, range(4), len(asked))):
        others = [name for name in FAMILY_NAMES if name != clip["family"]]
        options = list(rng.choice(others, 3, replace=False))
        options.insert(place, clip["family"])
        tasks["GM-FamilyMC-AQA"].append((clip, choice("Which family?", options), clip["family"]))
    if split == "test_programs":
        return tasks
    ask("GM-Instrument-AQA", "Which instrument?", lambda clip: clip.get("instrument"), n)
    ask("GM-Register-AQA", "Low, middle or high?", lambda clip: clip.get("register"), n_easy)
    ask("GM-Loudness-AQA", "Louder or softer?", lambda clip: clip.get("trend"), n_easy)
    ask("GM-Count-AQA", "How many notes?", lambda clip: clip.get("count"), n_easy)
    asked = balanced(clips, lambda clip: clip["families"][0] if clip["kind"] == "duo" else None, n_easy, rng)
    tasks["GM-Order-AQA"] = []
    for clip, place in zip(asked, cycle(rng, range(2), len(asked))):
        options = clip["families"][::1 if place == 0 else -1]
        tasks["GM-Order-AQA"].append((clip, choice("Which comes first?", options), clip["families"][0]))
    described = [clips[i] for i in rng.permutation(len(clips))[:len(clips) if split == "train" else n]]
    tasks["GM-Note-AudioCaptioning"] = [(clip, "Describe the sound.", caption(clip)) for clip in described]
    return tasks


def start_synth(soundfont):
    """One synth per process, in globals, since a pool's worker keeps nothing else between clips."""
    global synth, font
    import tinysoundfont
    synth = tinysoundfont.Synth(gain=-6, samplerate=RENDER_RATE)
    font = synth.sfload(soundfont)


def play(note_list):
    """[(program, key, velocity, start s, length s), ...] → mono float32 (SECONDS · RENDER_RATE,).

    Each note is damped 0.1 s after its release, so that organ and bells alike leave a gap, and nothing sounds
    on into the next note or clip (the synth's voices end 12 ms after sounds_off; it has no reverb).
    """
    sound = np.zeros(int(SECONDS * RENDER_RATE), np.float32)
    for program, key, velocity, start, length in note_list:
        synth.program_select(0, font, 0, program)
        synth.noteon(0, key, velocity)
        parts = [bytes(synth.generate(int(length * RENDER_RATE)))]
        synth.noteoff(0, key)
        parts.append(bytes(synth.generate(RENDER_RATE // 10)))
        synth.sounds_off()
        parts.append(bytes(synth.generate(RENDER_RATE // 20)))
        stereo = np.frombuffer(b"".join(parts), np.float32).reshape(-1, 2)
        at = int(start * RENDER_RATE)
        sound[at:at + len(stereo)] += stereo.mean(1)[:len(sound) - at]
    return sound


def write_clip(job):
    """Renders one clip to a 16-bit wav whose peak is 0.5; the two halves of a duo get the same peak. A room's
    noise lies 44 to 54 dB under it: digital silence is 80 dB further down, and no recording has it."""
    import soundfile
    import soxr
    path, kind, notes = job
    sound = 0
    for part in ([notes] if kind == "solo" else [[note] for note in notes]):
        one = soxr.resample(play(part), RENDER_RATE, RATE)
        if (peak := np.abs(one).max()) < 2e-4:
            raise UserError(f"{path}: the soundfont is silent for the note {part[0]} "
                             "(program, key, velocity, ...)")
        sound = sound + one * (0.5 / peak)
    name = "/".join(path.split("/")[-2:])
    rng = np.random.default_rng(list(name.encode()))  # of the clip alone: any order of work
    sound = sound + rng.uniform(0.001, 0.003) * rng.standard_normal(len(sound))
    soundfile.write(path, sound, RATE, subtype="PCM_16")


def playable_keys():
    """{program: keys with a sound}: a few programs of the soundfont have holes (whistle above 78, ...)."""
    every_key = [key for keys in REGISTERS.values() for key in keys]
    sounds = lambda program, key: play([(program, key, 99, 0, 0.1)]).any()
    return {program: {key for key in every_key if sounds(program, key)} for program in range(128)}


def build(out, args, soundfont):
    from tqdm import tqdm
    start_synth(soundfont)
    playable = playable_keys()
    jobs, notes_of = [], {}
    for number, split in enumerate(("train", "val", "test", "test_programs")):
        n = getattr(args, split)
        n_duo = 0 if split == "test_programs" else n // 4 if split == "train" else 2 * n // 5
        rng = np.random.default_rng([args.seed, number])
        clips = plan_clips(split, n - n_duo, n_duo, playable, rng)
        os.makedirs(f"{out}/audio/{split}")
        jobs += [(f"{out}/audio/{split}/{clip['name']}", clip["kind"], clip["notes"]) for clip in clips]
        notes_of |= {f"audio/{split}/{clip['name']}": clip["notes"] for clip in clips}
        asked = {"train": args.train_questions, "val": args.questions // 5}.get(split, args.questions)
        for task, items in questions(split, clips, asked, rng).items():
            data = {str(i): {"name": clip["name"], "prompt": prompt, "output": output, "duration": SECONDS}
                    for i, (clip, prompt, output) in enumerate(items)}
            if task.endswith("AudioCaptioning"):
                for item, (clip, *_) in zip(data.values(), items):
                    item["positives"] = parts_of_caption(clip)
                    if clip["kind"] == "duo":  # the same sounds in the other order
                        item["negatives"] = [caption(clip | {"families": clip["families"][::-1]})]
            manifest = {"split": split, "split_path": f"audio/{split}", "flamingo_task": task,
                        "total_num": len(data), "data": data}
            os.makedirs(f"{out}/manifests/{task}", exist_ok=True)
            with open(f"{out}/manifests/{task}/{split}.json", "w") as file:
                json.dump(manifest, file, indent=1)
    with open(f"{out}/clips.json", "w") as file:
        json.dump(notes_of, file)
    with multiprocessing.Pool(min(8, os.cpu_count()), start_synth, (soundfont,)) as pool:
        written = pool.imap_unordered(write_clip, jobs, chunksize=16)
        for _ in tqdm(written, total=len(jobs), desc="render", unit="clip"):
            pass
    return len(jobs)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", default="data/gm", help="folder to write (default data/gm)")
    parser.add_argument("--train", type=int, default=4000, help="clips: three quarters solo, one quarter duo")
    parser.add_argument("--val", type=int, default=128, help="clips: three fifths solo, two fifths duo")
    parser.add_argument("--test", type=int, default=600, help="clips: three fifths solo, two fifths duo")
    parser.add_argument("--test_programs", type=int, default=240, help="solo clips of the held-out programs")
    parser.add_argument("--train_questions", type=int, default=3000,
                        help="per task at most; register, loudness, count and order get two fifths, "
                             "captions all clips")
    parser.add_argument("--questions", type=int, default=120,
                        help="per task of a test split at most; val gets a fifth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true",
                        help="replace a set in --out that has other settings")
    args = parser.parse_args()
    for name, value in vars(args).items():
        if type(value) is int and value < 0:
            raise UserError(f"--{name} {value}: expected 0 or more")
    install = "pip install -r requirements-demo.txt"
    for package in ("pretty_midi", "tinysoundfont", "soundfile", "soxr", "tqdm"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"package {package} is missing: {install}")
    # found, not imported: importing pretty_midi takes longer than rendering a hundred clips
    soundfont = os.path.join(os.path.dirname(importlib.util.find_spec("pretty_midi").origin), "TimGM6mb.sf2")
    if not os.path.isfile(soundfont):
        raise FileNotFoundError(f"{soundfont}: the soundfont is missing: {install}")
    with open(soundfont, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "overwrite")}
    settings |= {"recipe": RECIPE, "soundfont_sha256": digest}

    out = os.path.abspath(args.out)
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        if not os.path.isfile(f"{out}/settings.json") or not os.path.isfile(f"{out}/clips.json"):
            raise UserError(f"--out {args.out} exists and was not written by this script: "
                             "choose another folder")
        with open(f"{out}/settings.json") as file:
            same = json.load(file) == settings
        if same and not args.overwrite:
            print(f"{args.out} is there already, with these settings: nothing to do")
            return
        if not args.overwrite:
            raise UserError(f"--out {args.out} holds a set with other settings: "
                             "choose another folder or --overwrite")
    os.makedirs(os.path.dirname(out), exist_ok=True)
    # built beside its place and renamed at the end: an interrupted run leaves nothing half-made
    parent, name = os.path.split(out)
    with tempfile.TemporaryDirectory(prefix=name + ".", suffix=".tmp", dir=parent) as tmp:
        os.mkdir(f"{tmp}/set")
        n = build(f"{tmp}/set", args, soundfont)
        with open(f"{tmp}/set/settings.json", "w") as file:
            json.dump(settings, file, indent=1)
        if args.overwrite and os.path.isdir(out):
            shutil.rmtree(out)
        os.replace(f"{tmp}/set", out)
    print(f"{args.out}: {n:,} clips of {SECONDS} s; manifests in {args.out}/manifests, data_root {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"gm_notes.py: {error}", file=sys.stderr)
        sys.exit(2)
