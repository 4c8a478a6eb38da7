"""Reading texts: normalised labels, the options of a question, the option that an answer names.

Plain functions on strings; the scoring rules are built from them.
"""
import re
import unicodedata
from functools import lru_cache
from string import ascii_lowercase

# A number with sign, decimals, per cent; a word, with sharps or pluses at its end (c#, f#m, c++); a lone
# symbol.
WORDS = re.compile(r"(?:(?<!\w)[-+±])?\d*\.?\d+%?|[^\W_]+(?:[#+]+[^\W_]*)?|[<>=±°%$€£]")
SPELLINGS = str.maketrans({"♯": "#", "♭": "b", "−": "-", "&": " and "})
ARTICLE = re.compile(r"\b(?:an?|the) (?!(?:(?:flat|sharp) )?(?:minor|major)$)")  # A minor keeps its A
# Audio Flamingo 2 Sound-CoT answers: <SUMMARY> <CAPTION> <REASONING> <CONCLUSION>
TAG = r"<\s*/?\s*(?:summary|caption|reasoning|conclusion)\s*>"
CONCLUSION = re.compile(rf"<\s*conclusion\s*>(.*?)(?={TAG}|$)", re.I | re.S)

# What ends the last option: a new sentence (not after an initial or a title), or an instruction in the same
# one.
SENTENCE = re.compile(r"(?<!\b[a-z])(?<!\b[dmjs]r)(?<!\bm[rs]s)(?<!\b[dmjs]s)(?<!\bst)(?<!\bvs)(?<!\bft)"
                      r"[.?!]\s+(?=\D)", re.I)
INSTRUCTION = re.compile(r"[.,;:!?]*\s+(?:(?:please|now|then)\s+)*"
                         r"(?:(?:answer|respond|reply)\s+(?:with|by|using|in|only|just)\b|"
                         r"(?:answer|choose|select|pick|give|return|output|write|state|provide|use)\b[^.]*"
                         r"\b(?:letters?|options?|answers?|choices?|words?|one)\b).*", re.I | re.S)


def normalise(text):
    """Lower case, no punctuation, no articles, single spaces. Signs that carry meaning stay (c#, -3, c++,
    50%), and a text that is not empty never becomes empty: "A", "the" and "?" are labels too."""
    text = unicodedata.normalize("NFKC", text).lower().translate(SPELLINGS)
    text = re.sub(r"(?<=\d)\s+%", "%", text)
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)  # 1,000
    plain = " ".join(WORDS.findall(text))
    return ARTICLE.sub("", plain) or " ".join(text.split())


def labels_of(text, with_comma=()):
    """The set of normalised labels in "dog, bark; door". with_comma: normalised labels that hold a comma; the
    longest run of parts that is one of them is one label."""
    parts = [part for part in re.split(r"[;\n]|,(?!\d)", text) if part.strip()]
    labels = set()
    while parts:
        size = min(len(parts), 8) if with_comma else 1
        while size > 1 and normalise(",".join(parts[:size])) not in with_comma:
            size -= 1
        labels.add(normalise(",".join(parts[:size])))
        parts = parts[size:]
    return frozenset(labels or {normalise(text)} - {""})


def answer_text(item):
    """The scored part of an item's answer: all of it, or of a chain-of-thought answer its last conclusion
    that is not empty. "" for an unreadable clip, no answer, no conclusion."""
    answer = item.get("answer") or ""
    if item.get("error"):
        return ""
    if not re.search(TAG, answer, re.I):
        return answer.strip()
    conclusions = [text.strip() for text in CONCLUSION.findall(answer)]
    return ([""] + list(filter(None, conclusions)))[-1]


# ------------------------------------------------------------------------------------------------------------
# Options. A mark is the letter or number in front of an option.

LETTERS = list(ascii_lowercase)
DIGITS = [str(n) for n in range(1, 27)]
MARK_STYLES = (r"\(({})\)", r"\[({})\]", r"(?<![\w(])({})\)", r"(?<![\w.'])({})\.(?=\s)",
               r"(?<![\w.'])({}):(?=\s)", r"(?m:^[ \t]*)({})[ \t]+[-–]\s")  # (A) [A] A) A. A: A -


@lru_cache(1 << 16)
def options_of(prompt):
    """The texts of the options that a prompt lists, in order, with marks of one style and case; () if there
    are not two. Options may hold brackets and full stops; the prompt's text after the last one is cut off."""
    best = []
    for style in MARK_STYLES:
        for marks, pattern in ((LETTERS, "[A-Za-z]"), (DIGITS, r"\d{1,2}")):
            found = list(re.finditer(style.format(pattern), prompt))
            starts = [i for i, mark in enumerate(found) if mark[1].lower() == marks[0]]
            for start in starts:
                texts = _option_texts(prompt, found[start:], marks)
                best = max(best, texts, key=len)  # the first longest
    return tuple(best) if len(best) > 1 else ()


def _option_texts(prompt, found, marks):
    """Texts between the marks a, b, c … that follow each other in `found`; [] if one of them is empty."""
    run = found[:1]
    upper = run[0][1].isupper()
    for mark in found[1:]:
        letter = mark[1]
        if marks[len(run):len(run) + 1] == [letter.lower()] and letter.isupper() == upper:
            run.append(mark)
    texts = []
    for mark, following in zip(run, run[1:]):
        text = prompt[mark.end():following.start()]
        texts.append(re.sub(r"[\s,;]+(?:or|and)\s*$", "", text, flags=re.I))
    last, _, _ = prompt[run[-1].end():].strip().partition("\n")
    last = INSTRUCTION.sub("", last)
    if not any(SENTENCE.search(text.strip()) for text in texts):  # the options are no paragraphs
        last = SENTENCE.split(last)[0]
    texts.append(last.strip().rstrip("?"))
    texts = [text.strip().strip(",;:").rstrip(".|/").strip() for text in texts]
    return texts if all(re.search(r"[^\W_]|[^\w\s(),.]", text) for text in texts) else []


def item_options(item):
    """The options of an item: its own list, else those in its prompt."""
    return item.get("choices") or options_of(item["prompt"])


def split_mark(text, n):
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
    index, rest = split_mark(reference, len(options))
    rest_words = normalise(rest)
    if index is not None and rest_words in ("", normalise(options[index])):
        return options[index]
    return next((option for option in options if normalise(option) == rest_words), rest)


def marks_in(answer, n, capitals=False):
    """Indices of the options whose mark an answer gives: in brackets, at its front, alone, after "option";
    with `capitals` any that stands alone. An A or I before another word is an article or the speaker."""
    first, _ = split_mark(answer, n)
    patterns = [r"[(\[]([A-Za-z])[)\]]",
                r"\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer(?: is|:))\s+([A-Za-z])\b(?!\s+\w|')"]
    if capitals:
        patterns += [r"\b([B-HJ-Z])\b(?![#'+])", r"\b([AI])\b(?!\s+\w|[#'+])",
                     r"\b(A)\b(?=\s+(?:is|was|because|since|as|and|or|fits|seems)\b)"]
    marks = {first} - {None}
    for pattern in patterns:
        marks |= {LETTERS.index(letter.lower()) for letter in re.findall(pattern, answer)}
    return {mark for mark in marks if mark < n}


def option_named(answer, options):
    """Index of the option that an answer names by its text, its mark or both, in a sentence too; None if it
    names none, several, or one by mark and another by text."""
    texts, answer_words = [normalise(option) for option in options], normalise(answer)
    if answer_words in texts:
        return texts.index(answer_words)
    contained = [text for text in texts if f" {text} " in f" {answer_words} "]
    longest = max(contained, key=len, default="")
    if not all(f" {text} " in f" {longest} " for text in contained):  # two, neither part of the other
        return None
    marks = marks_in(answer, len(options))
    if not marks and not contained:
        marks = marks_in(answer, len(options), capitals=True)
    if not marks:
        return texts.index(longest) if longest else None
    mark = min(marks)
    return mark if len(marks) == 1 and longest in ("", texts[mark]) else None
