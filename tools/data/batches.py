"""Batches of like size and equal work: estimated token counts, bucketing, a share for every rank."""
import re

import numpy as np

TOKENS_PER_WINDOW = 10  # a 10 s window costs a training step of the 3B model about as much as ten text tokens
WORD = re.compile(r" ?\w+| ?[^\w\s]+|\s+")  # about what tokenizers split a text into first


def estimate_tokens(tokenizer, texts):
    """-> (n,) tokens of each text. Every distinct word is tokenized once: a tenth of the time of texts."""
    split_texts = [WORD.findall(text) for text in texts]
    words = list({" "}.union(*split_texts))
    ids = tokenizer(words, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    n_tokens = dict(zip(words, map(len, ids)))
    return np.array([sum(map(n_tokens.get, split)) for split in split_texts], np.int64)


def plan_batches(sizes, batch_size, seed, world=1, pool=64, max_windows=None, multiple=1):
    """The micro-batches of an epoch: [[indices of rank 0, of rank 1, ...], ...], every item once.

    sizes: (n, 2) windows and text tokens. seed: a list of integers. The shuffled items are cut into pools of
    `pool` global batches; inside a pool, items of like size (windows, then text) share a batch, and the ranks
    share each global batch. A rank's batch has at most batch_size items and, padded, at most max_windows
    windows: then its number of items makes its work equal to the other ranks'. `multiple` micro-batches are
    one optimizer step: the same items, whatever they are divided into. The last step may have fewer items,
    and empty batches. The order of steps is random.
    """
    order = np.random.default_rng(seed).permutation(len(sizes))
    whole_batch = batch_size * world
    pool_size = pool * whole_batch * multiple
    steps = []
    rest = order[:0]
    for part in np.split(order, range(pool_size, len(order), pool_size)):
        left = sort_by_size(np.concatenate([rest, part]), sizes, max_windows)
        step, rest = [], left
        while len(left) >= whole_batch:
            step.append(take_batches(left, sizes, batch_size, world, max_windows))
            left = left[sum(map(len, step[-1])):]
            if len(step) == multiple:
                steps.append(step)
                step, rest = [], left
    last = []
    while len(rest):
        B = batch_size
        while B > 1 and max_windows and B * sizes[rest[:B * world][-1], 0] > max_windows:
            B -= 1
        last.append(deal(rest[:B * world], world))
        rest = rest[B * world:]
    last += [[rest] * world] * (-len(last) % multiple)  # empty
    for i in range(0, len(last), multiple):
        steps.append(last[i:i + multiple])
    order = np.random.default_rng([*seed, 1]).permutation(len(steps))
    return [micro for i in order for micro in steps[i]]


def sort_by_size(items, sizes, max_windows):
    windows, text = sizes[items].T
    if max_windows:  # up and down: texts are alike where the number of windows changes, too
        text = np.where(windows % 2, text, -text)
    return items[np.lexsort((text, windows))]


def deal(items, world):
    return [items[rank::world] for rank in range(world)]


def take_batches(items, sizes, batch_size, world, max_windows):
    """A batch for each rank from the first of sorted items; with max_windows, consecutive ones of equal work:
    where texts are longer, fewer items."""
    if not max_windows:
        return deal(items[:batch_size * world], world)

    def cumulative_work(i):  # of one, two, ... items from the i-th on, as many as fit into a batch
        windows, tokens = sizes[items[i:i + batch_size]].T
        counts = np.arange(1, len(windows) + 1)
        padded_windows = counts * np.maximum.accumulate(windows)
        padded_tokens = counts * np.maximum.accumulate(tokens)
        work = TOKENS_PER_WINDOW * windows.cumsum() + padded_tokens
        return work[:max(1, (padded_windows <= max_windows).sum())]

    first = cumulative_work(0)
    last = cumulative_work((world - 1) * len(first))
    target = min(first[-1], last[-1])
    batches = []
    i = 0
    for _ in range(world):
        n = 1 + np.abs(cumulative_work(i) - target).argmin()
        batches.append(items[i:i + n])
        i += n
    return batches


def padding_stats(sizes, plan):
    """What a plan wastes: the padded shares of windows and of text tokens, and by how much the rank with the
    most work exceeds the mean, summed over steps."""
    if not plan:
        return {}
    batches = [batch for micro in plan for batch in micro]
    padded = np.array([len(batch) * sizes[batch].max(0, initial=0) for batch in batches])
    windows = np.array([sizes[batch, 0].sum() for batch in batches])
    work = TOKENS_PER_WINDOW * windows + padded[:, 1]
    work = work.reshape(len(plan), -1)  # (micro-steps, ranks)
    waste = 1 - sizes.sum(0) / np.maximum(padded.sum(0), 1)
    imbalance = work.max(1).sum() / max(work.mean(1).sum(), 1e-9) - 1
    return {
        "window_padding": float(waste[0]),
        "token_padding": float(waste[1]),
        "rank_imbalance": float(imbalance)}
