"""Batches of equal work: tokens without a tokenizer's time, a share for every rank, what padding wastes."""
import re

import numpy as np
from torch.utils.data import Sampler

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


class Batches(Sampler):
    """Index lists of one rank for one epoch: seeded, the same plan on every rank, from micro-step `start` on;
    every item once.

    The shuffled items are cut into pools of `pool` global batches; inside a pool, items of like size
    (windows, then text) share a batch, and the ranks share each global batch: little padding, equal work.
    A rank's batch has at most batch_size items and, if that is given, at most max_windows, padded: then how
    many it has is for its work to equal the other ranks'. Pool order stays random. `multiple` batches of all
    ranks are one optimizer step: the same items whatever they are divided into. The last may have fewer, then
    some batches are empty. stats: see padding.
    """

    def __init__(self, sizes, batch_size, seed, rank=0, world=1, start=0, pool=64, max_windows=None,
                 multiple=1):
        order = np.random.default_rng(seed).permutation(len(sizes))  # seed: a list of integers
        most, plan, left = pool * batch_size * world * multiple, [], order[:0]
        for part in np.split(order, range(most, len(order), most)):
            part = np.concatenate([left, part])
            windows, text = sizes[part].T
            if max_windows:  # to and fro: texts are alike where the number of windows changes, too
                text = np.where(windows % 2, text, -text)
            part, step = part[np.lexsort((text, windows))], []
            left = part  # to the next pool
            while micro := share(part, sizes, batch_size, world, max_windows):
                step, part = [*step, micro], part[sum(map(len, micro)):]
                if len(step) == multiple:
                    plan, left, step = [*plan, step], part, []
        last = []
        while len(left):
            B = batch_size
            while B > 1 and max_windows and B * sizes[left[:B * world][-1], 0] > max_windows:
                B -= 1
            last.append([left[:B * world][r::world] for r in range(world)])
            left = left[B * world:]
        last += [[left] * world] * (-len(last) % multiple)  # empty
        plan += [last[i:i + multiple] for i in range(0, len(last), multiple)]
        order = np.random.default_rng([*seed, 1]).permutation(len(plan))
        plan = [micro for i in order for micro in plan[i]]
        self.mine = [micro[(rank + k) % world].tolist() for k, micro in enumerate(plan)][start:]
        self.plan = [np.concatenate(micro) for micro in plan]  # of all ranks
        self.stats = padding(sizes, plan)

    def __len__(self):
        return len(self.mine)

    def __iter__(self):
        return iter(self.mine)


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
