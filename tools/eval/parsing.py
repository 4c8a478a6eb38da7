"""What a text says: labels without dress, the options of a question, the option that an answer names.

Plain functions on strings; the rules of eval.py are built from them.
"""
import re
import unicodedata
from functools import lru_cache

# A number with sign, decimals, per cent; a word, with sharps or pluses at its end (c#, f#m, c++); a lone
# symbol.
WORDS = re.compile(r"(?:(?<!\w)[-+±])?\d*\.?\d+%?|[^\W_]+(?:[#+]+[^\W_]*)?|[<>=±°%$€£]")
ARTICLE = re.compile(r"\b(?:an?|the) (?!(?:(?:flat|sharp) )?(?:minor|major)$)")  # A minor keeps its A
TAGS = re.compile(r"<\s*(/?)\s*(summary|caption|reasoning|conclusion)\s*>", re.I)

# What follows the last option: a sentence (not after an initial or a title), or an instruction in the same
# one.
SENTENCE = re.compile(r"(?<!\b[a-z])(?<!\b[dmjs]r)(?<!\bm[rs]s)(?<!\b[dmjs]s)(?<!\bst)(?<!\bvs)(?<!\bft)"
                      r"[.?!]\s+(?=\D)", re.I)
ORDER = re.compile(r"[.,;:!?]*\s+(?:(?:please|now|then)\s+)*"
                   r"(?:(?:answer|respond|reply)\s+(?:with|by|using|in|only|just)\b|"
                   r"(?:answer|choose|select|pick|give|return|output|write|state|provide|use)\b[^.]*"
                   r"\b(?:letters?|options?|answers?|choices?|words?|one)\b).*", re.I | re.S)


def normalise(text):
    """Lower case, no punctuation, no articles, single spaces. Signs that carry meaning stay (c#, -3, c++,
    50%), and a text that is not empty is never made empty: "A", "the" and "?" are labels too."""
    text = unicodedata.normalize("NFKC", text).lower().replace("♯", "#").replace("♭", "b").replace("−", "-")
    text = re.sub(r"(?<=\d)\s+%", "%", text.replace("&", " and "))
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)  # 1,000
    plain = " ".join(WORDS.findall(text))
    return ARTICLE.sub("", plain) or " ".join(text.split())


def labels_of(text, known=()):
    """The set of labels in "dog, bark; door". `known`: the labels of a label file that hold a comma,
    normalised."""
    parts = [part for part in re.split(r"[;\n]|,(?!\d)", text) if part.strip()]
    labels, first = set(), 0
    while first < len(parts):
        last = min(len(parts), first + 8 if known else first + 1)
        while last > first + 1 and normalise(",".join(parts[first:last])) not in known:
            last -= 1  # the longest run of parts that is one label of the file, else one part
        labels.add(normalise(",".join(parts[first:last])))
        first = last
    return labels or {normalise(text)} - {""}


def conclusion(answer):
    """What counts of an answer: all of it, or of a reasoning one, with the tags of Audio Flamingo 2 Sound-CoT
    (<SUMMARY> <CAPTION> <REASONING> <CONCLUSION>), what stands in its conclusion; "" if it has none."""
    _, *parts = TAGS.split(answer)
    if not parts:
        return answer.strip()
    told = [text.strip() for closing, tag, text in zip(parts[::3], parts[1::3], parts[2::3])
            if not closing and tag.lower() == "conclusion"]
    return next((text for text in reversed(told) if text), "")


def said(item):
    """What counts of an item's answer; "" for an unreadable clip, no answer, reasoning without a
    conclusion."""
    return "" if item.get("error") else conclusion(item.get("answer") or "")


# ------------------------------------------------------------------------------------------------------------
# Options

LETTERS, DIGITS = list("abcdefghijklmnopqrstuvwxyz"), [str(n) for n in range(1, 27)]
STYLES = (r"\(({})\)", r"\[({})\]", r"(?<![\w(])({})\)", r"(?<![\w.'])({})\.(?=\s)",
          r"(?<![\w.'])({}):(?=\s)", r"(?m:^[ \t]*)({})[ \t]+[-–]\s")  # (A) [A] A) A. A: A -


@lru_cache(1 << 16)
def options_of(prompt):
    """The texts of the options that a prompt lists, in order, by letters or numbers of one style and case; ()
    if there are not two. Options may hold brackets and full stops; what the prompt says after the last is not
    its."""
    best = []
    for style in STYLES:
        for marks, pattern in ((LETTERS, "[A-Za-z]"), (DIGITS, r"\d{1,2}")):
            found = list(re.finditer(style.format(pattern), prompt))
            starts = [i for i, mark in enumerate(found) if mark[1].lower() == marks[0]]
            for start in starts[:20]:
                best = max(best, _read_run(prompt, found[start:], marks), key=len)  # the first longest
    return tuple(best) if len(best) > 1 else ()


def _read_run(prompt, found, marks):
    """Texts between the marks a, b, c … that follow each other in `found`; [] if one of them says nothing."""
    run = found[:1]
    for mark in found[1:]:
        same_case = mark[1].isupper() == run[0][1].isupper()
        if len(run) < len(marks) and mark[1].lower() == marks[len(run)] and same_case:
            run.append(mark)
    texts = [prompt[mark.end():after.start()] for mark, after in zip(run, run[1:])]
    texts = [re.sub(r"[\s,;]+(?:or|and)\s*$", "", text, flags=re.I) for text in texts]
    texts.append(_last_option(prompt[run[-1].end():], texts))
    texts = [text.strip().strip(",;:").rstrip(".|/").strip() for text in texts]
    return texts if all(re.search(r"[^\W_]|[^\w\s(),.]", text) for text in texts) else []


def _last_option(text, others):
    """The last option without what the prompt says after it."""
    text = ORDER.sub("", text.strip().split("\n")[0])
    if not any(SENTENCE.search(other.strip()) for other in others):  # options here are no paragraphs
        text = SENTENCE.split(text)[0]
    return text.strip().rstrip("?")


def mark_of(text, n):
    """(index, rest) of a text that begins with the mark of one of n options: "(b) dog", "b. dog", "B"; (None,
    text) without one. "A dog" begins with an article."""
    found = re.match(r"[\s*_\"']*(?:[(\[]\s*(\w{1,2})\s*[)\]][.:]?|(\w{1,2})(?:[.):](?=\s|$)|\s*$))\s*", text)
    mark = (found[1] or found[2]).lower() if found else ""
    for marks in (LETTERS, DIGITS):
        if mark in marks[:n]:
            return marks.index(mark), text[found.end():]
    return None, text


def reference_option(reference, options):
    """The text of the right option; the reference may be that text, its mark, or both."""
    for same in (str, str.lower, normalise):  # "child" and "the child" may both be options
        for option in options:
            if same(option) == same(reference):
                return option
    index, rest = mark_of(reference, len(options))
    if index is not None and (not rest.strip() or normalise(rest) == normalise(options[index])):
        return options[index]
    return next((option for option in options if normalise(option) == normalise(rest)), rest)


def marks_in(answer, n, capitals=False):
    """Indices of the options whose mark an answer gives: in brackets, at its front, alone, after "option";
    with `capitals` any that stands alone. An A or I before another word is that word's article, or the
    speaker."""
    first, _ = mark_of(answer, n)
    marks = set() if first is None else {first}
    patterns = [r"[(\[]([A-Za-z])[)\]]",
                r"\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer(?: is|:))\s+([A-Za-z])\b(?!\s+\w|')"]
    if capitals:
        patterns += [r"\b([B-HJ-Z])\b(?![#'+])", r"\b([AI])\b(?!\s+\w|[#'+])",
                     r"\b(A)\b(?=\s+(?:is|was|because|since|as|and|or|fits|seems)\b)"]
    for pattern in patterns:
        marks |= {LETTERS.index(letter.lower()) for letter in re.findall(pattern, answer)}
    return {mark for mark in marks if mark < n}


def option_named(answer, options):
    """Index of the option that an answer names by its text, its mark or both, in a sentence too; None if it
    names none, several, or one by mark and another by text."""
    texts, spoken = [normalise(option) for option in options], normalise(answer)
    if spoken in texts:
        return texts.index(spoken)
    held = [text for text in texts if f" {text} " in f" {spoken} "]
    longest = max(held, key=len, default="")
    if not all(f" {text} " in f" {longest} " for text in held):  # two that are no part of each other
        return None
    marks = marks_in(answer, len(options))
    if not marks and not held:
        marks = marks_in(answer, len(options), capitals=True)
    if not marks:
        return texts.index(longest) if longest else None
    mark = min(marks)
    return mark if len(marks) == 1 and longest in ("", texts[mark]) else None
