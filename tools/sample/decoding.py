"""From a model to answers: greedy or sampled, streamed, in batches that never wait for their longest answer.

    generate(model, prompts, windows, n_windows)    # AudioFlamingo.generate: a batch
    answer(model, items, slots=8)                   # any number of questions, a few at a time

An item is (prompt, windows (W, L), windows of each of its clips).
"""
import itertools
import math
from dataclasses import dataclass

import torch

from data import encode_prompts, encode_text, pad_rows, window_counts
from tools.common import UserError

CACHE_STEP = 64  # slots of a cache at first, or a multiple: one shape for most prompts and answers
STOP_TEST = 8  # steps after which a GPU is asked which answers have ended; it would wait for every look


@dataclass
class Sampling:
    """How answers are decoded; ValueError for what makes no sense."""
    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_k: int | None = None  # sample among the k likeliest tokens; 0 and None: all
    top_p: float | None = None  # sample among the likeliest tokens of this total probability; None: all
    seed: int = 0
    answer_prefix: str = ""  # words that every answer begins with

    def __post_init__(self):
        positive = self.max_new_tokens >= 0 and (self.top_k or 0) >= 0 and 0 <= self.temperature < math.inf
        if not positive or not 0 < (1 if self.top_p is None else self.top_p) <= 1:
            raise UserError(f"{self}: expected nothing below 0 but the seed, and 0 < top_p <= 1")


def pick(logits, how, steps):
    """logits (B, V) float32, steps: how many tokens each answer has -> token ids (B,). Sampling adds Gumbel
    noise (argmax of logits + Gumbel noise is a draw from the softmax) that depends on seed and step alone: no
    answer depends on the others."""
    if how.temperature == 0:
        return logits.argmax(-1)
    logits = logits / how.temperature
    if how.top_k:
        least = logits.topk(min(how.top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if how.top_p:
        ordered, index = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= how.top_p  # the first token is always kept
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), -math.inf)
    seeded = lambda step: torch.Generator().manual_seed(how.seed * 2 ** 20 + step)
    uniform = torch.stack([torch.rand(logits.shape[1], generator=seeded(step)) for step in steps])
    return (logits - (-uniform.clamp(min=1e-20).log()).log().to(logits.device)).argmax(-1)


def fit(x, dim, size):
    """x with zeros after it, up to `size` along a dimension."""
    more = x.new_zeros(*x.shape[:dim], size - x.shape[dim], *x.shape[dim + 1:])
    return torch.cat([x, more], dim) if more.numel() else x


def hear(model, windows, n_windows):
    """Keys and values of clips, and how many each text has: made once, for as many questions as one likes."""
    if not len(n_windows) or int(n_windows.sum()) != len(windows) or int(n_windows.min()) < 0:
        raise UserError(f"clips of {n_windows.tolist()} windows and {len(windows)} windows do not belong "
                         f"together")
    audio, n_keys = model.encode_audio(windows.to(model.lm.norm.weight.device), n_windows)
    return model.keys_values(audio), n_keys


class Answers:
    """B answers under way: x (B, D), the stream at each text's last token, tells the next one."""

    def __init__(self, model, prompts, heard, n_windows, prefix):
        n_clips = (n_windows.view(len(n_windows), -1) > 0).sum(1)
        if not n_clips.all():
            raise UserError(f"clips of {n_windows.tolist()} windows: expected a clip or more for a prompt")
        self.model, (self.kv, n_keys) = model, heard
        (more,), device = encode_text(model.tokenizer, [prefix]), n_keys.device
        rows = [row + more for row in encode_prompts(model.tokenizer, prompts, n_clips.tolist())]
        ids, lengths = pad_rows(rows, model.pad_id).to(device), [len(row) for row in rows]
        B, self.longest = ids.shape
        if self.longest > model.lm.config.positions:
            raise UserError(f"a text of {self.longest} tokens: the language model was made for "
                             f"{model.lm.config.positions}")
        length = -(-(self.longest + 1) // CACHE_STEP) * CACHE_STEP
        self.cache = model.lm.new_kv_cache(B, length, like=self.kv[min(self.kv)])
        positions = torch.arange(self.longest, device=device).expand(B, -1)
        x = model.forward_hidden(ids, self.kv, model.visible_keys(ids, n_keys), positions, self.cache)
        self.lengths = torch.tensor(lengths, device=device)
        self.n_keys = n_keys if n_keys.ndim == 1 else n_keys[:, -1]  # what comes now hears all clips
        self.x = x[torch.arange(B), self.lengths - 1]

    def step(self, token, going):
        """One more token (B,) of those that are `going` (B,) int64; the others stay as they are."""
        if self.longest >= self.cache.shape[4]:
            self.cache = fit(self.cache, 4, 2 * self.longest)
        hidden = getattr(self.model, "one_token", self.model.forward_hidden)  # compiled, if that was asked for
        self.x = hidden(token[:, None], self.kv, self.n_keys, self.lengths[:, None], self.cache)[:, 0]
        self.lengths, self.longest = self.lengths + going, self.longest + 1

    def put(self, rows, new):
        """Some rows become those of other Answers."""
        rows = torch.tensor(rows, device=self.x.device)
        S = max(kv.shape[1] for kv in (*self.kv.values(), *new.kv.values()))
        length = max(self.cache.shape[4], new.cache.shape[4])
        for i, kv in new.kv.items():
            self.kv[i] = fit(self.kv[i], 1, S).index_copy(0, rows, fit(kv, 1, S))
        self.cache = fit(self.cache, 4, length).index_copy(2, rows, fit(new.cache, 4, length))
        for name in ("n_keys", "lengths", "x"):
            setattr(self, name, getattr(self, name).index_copy(0, rows, getattr(new, name)))
        self.longest = int(self.lengths.max())


def compile_decoding(model):
    """One graph for a decoding step; on a GPU one launch of it (CUDA graphs)."""
    mode = "reduce-overhead" if model.lm.norm.weight.is_cuda else None
    model.one_token = torch.compile(model.forward_hidden, fullgraph=True, dynamic=False, mode=mode)


def asks_every_step(device):
    return device.type == "cpu"


@torch.no_grad()
def tokens(model, items, slots, how, heard=None):
    """Any number of items -> per step {index: token id, or -1 where its answer has ended}. The next items
    take the rows of those that ended: none waits for a long one."""
    was_training, stops = model.training, set(model.stop_ids)
    items, more, answers = enumerate(items), how.max_new_tokens > 0, None
    going = {}  # row: [index, tokens so far]
    model.eval()
    try:
        while more or going:
            free = [row for row in range(len(answers.x) if going else slots) if row not in going]
            if more and len(free) >= max(1, slots // 4):  # some at once: on a CPU a few cost what one does
                new = list(itertools.islice(items, len(free)))
                more = len(new) == len(free)
                if new:
                    n_windows = window_counts([clips for _, (_, _, clips) in new])
                    windows = [windows for _, (_, windows, _) in new]
                    parts = heard or hear(model, torch.cat(windows), n_windows)
                    prompts = [prompt for _, (prompt, *_) in new]
                    fresh = Answers(model, prompts, parts, n_windows, how.answer_prefix)
                    rows = free[:len(new)]
                    if going:
                        answers.put(rows, fresh)
                    else:
                        answers = fresh
                    going |= {row: [index, 0] for row, (index, _) in zip(rows, new)}
            if not going:
                return
            device = answers.x.device
            still = lambda: torch.tensor([int(row in going) for row in range(len(answers.x))], device=device)
            mask = still()
            block = 1 if asks_every_step(device) else STOP_TEST
            said, bad = [], 0
            for ahead in range(block):
                steps = [going[row][1] + ahead if row in going else 0 for row in range(len(answers.x))]
                logits = model.lm.logits(answers.x).float()
                said.append(pick(logits, how, steps))
                bad = bad + logits.isnan().any(-1).long()
                if ahead + 1 < block:
                    answers.step(said[-1], mask)
            *columns, bad = torch.stack([*said, bad]).tolist()  # the one look at the device
            if any(bad[row] for row in going):
                raise UserError("the model's logits are NaN: weights that are not finite (checkpoint.py "
                                 "PATH names them), or float16, which is too narrow for it")
            for column in columns:
                step = {}
                for row, (index, n) in list(going.items()):
                    ended = column[row] in stops
                    step[index] = -1 if ended else column[row]
                    going[row][1] = n + 1
                    if ended or n + 1 == how.max_new_tokens:
                        del going[row]
                yield step
            if going:
                answers.step(said[-1], still())
    finally:  # also when the reader stops early
        model.train(was_training)


def items_of(prompts, windows, n_windows):
    """A batch as items of `tokens`."""
    rows = n_windows[:, None] if n_windows.ndim == 1 else n_windows
    clips = [[n for n in row if n] for row in rows.tolist()]
    if not len(prompts) == len(clips) > 0 or int(n_windows.min()) < 0 or int(n_windows.sum()) != len(windows):
        raise UserError(f"{len(prompts)} prompts, clips of {n_windows.tolist()} windows and {len(windows)} "
                         f"windows do not belong together")
    return list(zip(prompts, windows.split([sum(row) for row in clips]), clips))


def stream(model, prompts, windows, n_windows, heard=None, **how):
    """Per step one (B,) tensor of token ids, -1 in rows that have ended."""
    items = items_of(prompts, windows, n_windows)
    for step in tokens(model, items, len(items), Sampling(**how), heard):
        yield torch.tensor([step.get(index, -1) for index in range(len(items))])


def answer(model, items, slots, heard=None, **how):
    """items of `tokens`, any number -> (index, answer), each as it ends."""
    how, said = Sampling(**how), {}
    for step in tokens(model, items, slots, how, heard):
        for index, token in step.items():
            said.setdefault(index, [])
            said[index] += [token] * (token >= 0)
            if token < 0 or len(said[index]) == how.max_new_tokens:
                yield index, text_of(model, said.pop(index), how.answer_prefix)


def generate(model, prompts, windows, n_windows, **how):
    """AudioFlamingo.generate."""
    items = items_of(prompts, windows, n_windows)
    answers = dict(answer(model, items, len(items), **how))
    return [answers.get(index, how.get("answer_prefix", "")) for index in range(len(items))]


def text_of(model, ids, prefix=""):
    return prefix.strip().lower() + model.tokenizer.decode(ids, skip_special_tokens=True)
