"""What a batch costs: tokens without a tokenizer's time, equal work for all ranks, what padding wastes."""
import re

import numpy as np

TOKENS_PER_WINDOW = 10  # a window of 10 s costs a training step of the 3B model as much as ten tokens of text
WORD = re.compile(r"\0| ?\w+| ?[^\w\s\0]+|\s+")  # about what tokenizers cut a text into first


def about_tokens(tokenizer, texts):
    """{text: about how many tokens it is}: every word is tokenized once, in a fraction of the time of all."""
    texts = list(texts)
    words = WORD.findall("".join(text.replace("\0", " ") + "\0" for text in texts))
    known = list(set(words))
    ids = tokenizer(known, add_special_tokens=False, split_special_tokens=True)["input_ids"] if known else []
    known = dict(zip(known, map(len, ids))) | {"\0": -1}
    counts = np.fromiter(map(known.__getitem__, words), np.int64, len(words))
    totals = np.maximum(counts, 0).cumsum()[counts < 0]
    return dict(zip(texts, np.diff(totals, prepend=0).tolist()))


def share(part, sizes, batch_size, world, max_windows):
    """The batches of `world` ranks from the beginning of sorted items, or None if they do not suffice."""
    if not max_windows:
        whole = part[:batch_size * world]
        return [whole[r::world] for r in range(world)] if len(whole) == batch_size * world else None

    def work(i):  # of one, two, ... items from the i-th on, as many as fit into a batch
        windows, tokens = sizes[part[i:i + batch_size]].T
        counts = np.arange(1, len(windows) + 1)
        fits = max(1, (counts * np.maximum.accumulate(windows) <= max_windows).sum())
        work = TOKENS_PER_WINDOW * windows.cumsum() + counts * np.maximum.accumulate(tokens)
        return work[:fits]

    if len(part) < world * batch_size:
        return None
    first = work(0)
    target = min(first[-1], work((world - 1) * len(first))[-1])  # where texts are longer, fewer items fill it
    step, i = [], 0
    for _ in range(world):
        n = 1 + np.abs(work(i) - target).argmin()
        step.append(part[i:i + n])
        i += n
    return step


def padding(sizes, ranks):
    """What a plan wastes: the padded shares of windows and of text slots, and by how much the rank with the
    most work has more than the mean, over steps. Work: text slots, and windows, each as much as ten."""
    if not ranks:
        return {}
    real, slots, work = sizes.sum(0), np.zeros(2), np.zeros((len(ranks), len(ranks[0])))
    for k, batches in enumerate(ranks):
        for r, batch in enumerate(batches):
            if len(batch):
                padded = len(batch) * sizes[batch].max(0)
                slots += padded
                work[k, r] = TOKENS_PER_WINDOW * sizes[batch, 0].sum() + padded[1]
    window_padding, token_padding = (1 - real / np.maximum(slots, 1)).tolist()
    imbalance = work.max(1).sum() / max(work.mean(1).sum(), 1e-9) - 1
    return {"window_padding": window_padding, "token_padding": token_padding, "rank_imbalance": imbalance}
