"""Reading texts: normalised labels, the options of a question, the option that an answer names.

Plain functions on strings; the scoring rules are built from them.
"""
import unicodedata
from functools import lru_cache
from itertools import islice, pairwise
from string import ascii_lowercase

import regex as re  # \w includes combining marks (Hindi, Thai, Arabic); in the standard library it does not

# A number with sign, decimals, per cent; a word, with sharps or pluses at its end (c#, f#m, c++); a lone
# symbol.
WORDS = re.compile(r"(?:(?<!\w)[-+±])?\d*\.?\d+%?|[^\W_]+(?:[#+]+[^\W_]*)?|[<>=±°%×÷≠≤≥≈\p{Sc}]")
SPELLINGS = str.maketrans("♯♭−–‐٪٫٬ʼʻ", "#b---%.,''")
# Characters that no reader sees (joiners, direction, variants of an emoji), the Arabic stretching mark
INVISIBLE = re.compile(r"[\p{Default_Ignorable_Code_Point}\u0640\u20e3]")
# Scripts that join words without spaces, or particles to them (Korean)
UNSPACED = re.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}"
                      r"\p{Khmer}\p{Myanmar}]\p{M}*")
ARTICLE = re.compile(r"(?<!\S)(?:an?|the) (?!(?:(?:flat|sharp) )?(?:minor|major)$)")  # A minor keeps its A
# Audio Flamingo 2 Sound-CoT answers: <SUMMARY> <CAPTION> <REASONING> <CONCLUSION>
TAG = r"<\s*/?\s*(?:summary|caption|reasoning|conclusion)\s*>"
CONCLUSION = re.compile(rf"<\s*conclusion\s*>(.*?)(?={TAG}|$)", re.I | re.S)

# What stands before a mark, on its line or in its list
BEFORE_MARK = re.compile(r"(?:[\s,;]+(?:or|and)|\n\s*[-*•+>]+|[\s,;-]+(?:option|choice))\s*$", re.I)
# What ends the last option: a new sentence (not after an initial or a title), or an instruction in the same
# one.
SENTENCE = re.compile(r"(?<!\b[a-z])(?<!\b[dmjs]r)(?<!\bm[rs]s)(?<!\b[dmjs]s)(?<!\bst)(?<!\bvs)(?<!\bft)"
                      r"(?:[.?!]\s+(?=\D)|[。？！])", re.I)
INSTRUCTION = re.compile(r"[.,;:!?]*\s+(?:(?:please|now|then)\s+)*(?:(?:your )?answer\s*:|"
                         r"(?:answer|respond|reply)\s+(?:with|by|using|in|only|just)\b|"
                         r"(?:answer|choose|select|pick|give|return|output|write|state|provide|use)\b[^.]*"
                         r"\b(?:letters?|options?|answers?|choices?|words?|one)\b).*", re.I | re.S)


def fold(text):
    """One spelling of texts that differ in case (ß is ss, ς is σ, İ is i), in composed accents, full-width
    forms, the digits of a script or invisible characters."""
    text = re.sub(r"(?<=\d)(?=\p{No})", " ", text.replace("´", "'"))  # 10² is not 102
    text = INVISIBLE.sub("", unicodedata.normalize("NFKC", text).casefold()).replace("i\u0307", "i")
    return re.sub(r"\d", lambda digit: str(unicodedata.decimal(digit[0])), text)


def normalise(text):
    """Folded, no punctuation, no articles, single spaces. Signs that carry meaning stay (c#, -3, c++, 50%),
    and a text that is not empty never becomes empty: "A", "the", "?" and an emoji are labels too."""
    text = fold(text).translate(SPELLINGS).replace("&", " and ")
    text = re.sub(r"(?<=\d)(?:\s+(?=%)|,(?=\d{3}\b)|(?<!\.\d+)\.0+(?!\d|\.\d))", "", text)  # 50 %, 1,000, 2.0
    words = WORDS.findall(text) or re.findall(r"\p{S}", text)
    return ARTICLE.sub("", " ".join(words)) or " ".join(text.split())


def spaced(text):
    """Characters of scripts that are written without spaces as words of their own."""
    return " ".join(UNSPACED.sub(r" \g<0> ", text).split())


def labels_of(text, with_comma=()):
    """The set of normalised labels in "dog, bark; door". with_comma: normalised labels that hold a comma; the
    longest run of parts that is one of them is one label."""
    parts = [part for part in re.split(r"[;\n；、،؛]|[,，](?!\d)", text) if part.strip()]
    labels = set()
    while parts:
        size = min(len(parts), 8) if with_comma else 1
        while size > 1 and normalise(",".join(parts[:size])) not in with_comma:
            size -= 1
        labels.add(normalise(",".join(parts[:size])))
        parts = parts[size:]
    return frozenset(labels or {normalise(text)} - {""})


def references_of(item):
    """All reference answers of an item: its "output", and those of its list "references"."""
    texts = [item["output"], *(item.get("references") or ())]
    return [text for text in dict.fromkeys(texts) if text.strip()]


def answer_text(item):
    """The scored part of an item's answer: all of it, or of a chain-of-thought answer its last conclusion
    that is not empty. "" for an unreadable clip, no answer, no conclusion."""
    answer = item.get("answer") or ""
    if item.get("error"):
        return ""
    if not re.search(TAG, answer, re.I):
        return answer.strip()
    conclusions = list(filter(None, map(str.strip, CONCLUSION.findall(answer))))
    return conclusions[-1] if conclusions else ""


# ------------------------------------------------------------------------------------------------------------
# Options. A mark is the letter or number in front of an option.

MARK_STYLES = (r"\(\s*({})\.?\s*\)", r"\[\s*({})\.?\s*\]", r"(?<![\p{{Latin}}\d_(])({})\.?\)",  # (A) [A] A)
               r"(?<![\p{{Latin}}\d_.'])({})\.(?=\s|[^\x00-\x7f])", r"(?m:^[ \t]*)({})\.(?=[^\s\d])",  # A.
               r"(?<![\p{{Latin}}\d_.'])({}):(?=\s|[^\x00-\x7f])",  # A:
               r"(?:(?m:^[ \t]*)|(?<![\p{{Latin}}\d_])(?!\d))({})[ \t]+[-–—]\s",  # A - dog
               r"(?m:^[ \t]*)(?!\d)({})(?:[ \t]*[|/])?[ \t]+(?=\S)")  # "A dog", but not "1 dog"
# Marks in other characters: <A> {A} 【A】 （A）, **A.** `A`, A． A、 A：, ① Ⓐ ⒈
OTHER_MARKS = re.compile(
    r"(?|[<＜〈《{｛（［【〔「『]\s*([A-Za-zＡ-Ｚａ-ｚ]|\d{1,2})\s*[>＞〉》}｝）］】〕」』)\]][.:]?"
    r"|(?<![*_`])[*_`]{1,3}([A-Za-z]|\d{1,2})[.):]?[*_`]+[.):]?"
    r"|(?<![\p{Latin}\d.'’])([A-Za-zＡ-Ｚａ-ｚ]|\d{1,2})"
    r"(?:[．、。：）](?!\s*(?:\d|[A-Za-z]\b))|(?<=[Ａ-Ｚａ-ｚ])[.):])"
    r"|([①-⑳⑴-⒇⒈-⒛⒜-⒵Ⓐ-ⓩ🄐-🄩❶-❾🅰-🅴🅐-🅔]\ufe0f?|\d\ufe0f?\u20e3))")
# An option's mark at the front of a text; the last form, "B dog", has an empty second group
FRONT_MARK = re.compile(r"[\s*_`\"'“‘]*(?|[(\[]\s*([A-Za-z]|\d{1,2})\.?\s*[)\]][.:]?"
                        r"|([A-Za-zＡ-Ｚａ-ｚ]|\d{1,2})(?:\.?\)|[.:](?=\s|$|[^\x00-\x7f])|[^\w#+]*(?:$|\n))"
                        r"|(?![Aa]\s)([A-Za-z]|\d{1,2})()[\s.,:–-]+)[\s*_`]*")
# Letters that name an option inside a text; those that do where the text names none otherwise
NAMED_MARK = (r"[(\[]\s*([A-Za-z])\s*[)\]]|\b(?i:(?:option|choice|(?:answer|option|choice)\s*"
              r"(?:is\s*[:：]?|[:：=-])(?:\s*option)?))\s*([A-Za-z])\b(?!\s+\w|['’])")
LONE = r"(?<![\p{Latin}\p{M}\d'’])"
NO_KEY = r"(?![\p{Latin}\p{M}\d#'’+])"
LONE_CAPITAL = (rf"{LONE}([B-HJ-Z]){NO_KEY}|{LONE}([AI]){NO_KEY}(?!\s+\w)|"
                rf"{LONE}(A)(?=\s+(?:is|was|because|since|as|and|or|fits|seems)\b)")
SIGNS = str.maketrans("❶❷❸❹❺❻❼❽❾🅰🅱🅲🅳🅴🅐🅑🅒🅓🅔", "123456789ABCDEABCDE")


def plain_marks(text):
    """Marks in other characters as (A) or (1)."""

    def bracketed(found):
        mark = unicodedata.normalize("NFKC", found[1].translate(SIGNS)).strip("().\ufe0f\u20e3")
        return f" ({mark}) "

    return OTHER_MARKS.sub(bracketed, text)


def mark_index(mark):
    return int(mark) - 1 if mark.isdigit() else ascii_lowercase.index(fold(mark))


@lru_cache(1 << 16)
def options_of(prompt):
    """The texts of the options that a prompt lists, in order, with marks of one style and case; () if there
    are not two. Options may hold brackets and full stops; the prompt's text after the last one is cut off. Of
    more than 200 marks the first 200 count."""
    prompt, best = plain_marks(re.sub(r"\\(?=[().\[\]])", "", prompt)), []
    for style in MARK_STYLES:
        for kind in ("[A-Z]", "[a-z]", r"\d{1,2}"):
            found = list(islice(re.finditer(style.format(kind), prompt), 200))
            for start, mark in enumerate(found):
                if mark_index(mark[1]) == 0:
                    best = max(best, _option_texts(prompt, found[start:]), key=len)  # the first longest
    return tuple(best) if len(best) > 1 else ()


def _option_texts(prompt, found):
    """Texts between the marks a, b, c … that follow each other in `found`; [] if one of them is empty."""
    run = []
    for mark in found:
        if mark_index(mark[1]) == len(run):
            run.append(mark)
    texts = [prompt[mark.end():following.start()] for mark, following in pairwise(run)]
    texts = [BEFORE_MARK.sub("", text) for text in texts]
    last, _, _ = prompt[run[-1].end():].strip().partition("\n")
    last = INSTRUCTION.sub("", last)
    if not any(SENTENCE.search(text.strip()) for text in texts):  # the options are no paragraphs
        last = SENTENCE.split(last)[0]
    texts.append(last.strip().rstrip("?？"))
    texts = [text.strip(" \t\r\n*`,;:，；、").rstrip(" .|/。") for text in texts]
    return texts if all(re.search(r"[^\W_]|[^\w\s(),.]", text) for text in texts) else []


def item_options(item):
    """The options of an item: its own list, without their letters where all begin with one; else those in its
    prompt."""
    options = item.get("choices") or options_of(item["prompt"])
    split = [split_mark(option, options) for option in options]
    in_order = [index for index, text in split if text] == list(range(len(options)))
    return [text for _, text in split] if in_order else options


def split_mark(text, options):
    """(index, rest) of a text that begins with the mark of an option: "(b) dog", "b. dog", "B", "B dog";
    (None, text) without one. "A dog" begins with an article; a number is no mark where an option begins with
    one."""
    found = FRONT_MARK.match(plain_marks(text))
    if not found or found[1].isdigit() and any(re.match(r"\W*\d", option) for option in options):
        return None, text
    index, rest = mark_index(found[1]), found.string[found.end():]
    marked = options[index:index + 1]
    if found[2] is not None:
        marked = [option for option in marked if normalise(option) == normalise(rest)]
    return (index, rest) if marked else (None, text)


def reference_option(reference, options):
    """The text of the right option; the reference may be that text, its mark, or both."""
    index, rest = split_mark(reference, options)
    for text in (reference, rest):
        for same in (str, str.lower, normalise):  # "child" and "the child" may both be options
            for option in options:
                if same(option) == same(text):
                    return option
    return options[index] if index is not None and not normalise(rest) else rest


def marks_in(answer, options, capitals=False):
    """Indices of the options whose mark an answer gives: in brackets, at its front, alone, after "option";
    with `capitals` any that stands alone. An A or I before another word is an article or the speaker."""
    first, _ = split_mark(answer, options)
    pattern = f"{NAMED_MARK}|{LONE_CAPITAL}" if capitals else NAMED_MARK
    text = unicodedata.normalize("NFKC", plain_marks(answer))
    found = re.finditer(f"(?|{pattern})", text)
    marks = {mark_index(mark[1]) for mark in found} | {first}
    return marks & set(range(len(options)))


def option_named(answer, options):
    """Index of the option that an answer names by its text, its mark or both, in a sentence too; None if it
    names none, several, or one by mark and another by text."""
    texts, answer_words = [spaced(normalise(option)) for option in options], spaced(normalise(answer))
    if answer_words in texts:
        return texts.index(answer_words)
    contained = [text for text in texts if f" {text} " in f" {answer_words} "]
    longest = max(contained, key=len, default="")
    if not all(f" {text} " in f" {longest} " for text in contained):  # two, neither part of the other
        return None
    marks = marks_in(answer, options) or marks_in(answer, options, capitals=not contained)
    named = {texts[mark] for mark in marks} | set(filter(None, [longest]))
    return texts.index(named.pop()) if len(named) == 1 else None
