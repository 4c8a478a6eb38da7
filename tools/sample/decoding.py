"""Decoding: prefill, KV cache, greedy or sampled tokens, continuous batching.

    generate(model, prompts, windows, n_windows)            # AudioFlamingo.generate: one batch
    answer_items(model, items, slots=8, sampling=Sampling())  # any number of items, 8 at a time

An item is (prompt, windows (W, L), [number of windows of each of its clips]). audio_kv is what
encode_audio_kv returns: the audio's keys and values, computed once per clip and reused by every token and
follow-up question.
"""
import itertools
import math
import sys
import zlib
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F

from data import encode_prompts, encode_text, pad_rows, window_counts
from tools.common import UserError

CACHE_STEP = 64  # first length of a KV cache, or a multiple: few shapes for compiled graphs
SYNC_EVERY = 8  # decoding steps between two host-device synchronisations on a GPU


@dataclass
class Sampling:
    """How tokens are chosen. UserError for values that make no sense."""
    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_k: int | None = None  # sample among the k likeliest tokens; 0 and None: all
    top_p: float | None = None  # sample among the likeliest tokens of this total probability; None: all
    seed: int = 0
    answer_prefix: str = ""  # words that every answer begins with

    def __post_init__(self):
        top_p = 1 if self.top_p is None else self.top_p
        fits = (self.max_new_tokens > 0, self.temperature >= 0, (self.top_k or 0) >= 0, 0 < top_p <= 1)
        if not all(fits):  # also where one is NaN
            raise UserError(f"{self}: expected max_new_tokens above 0, nothing below 0, 0 < top_p <= 1")
        check_text(self.answer_prefix)


def check_text(text):
    """UserError for half a surrogate pair: JSON can spell it, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{text!r:.80}: character {error.start} is half a surrogate pair") from error


def sample_tokens(logits, sampling, generators):
    """logits (B, V) float32 -> token ids (B,): the likeliest, or with a temperature draws from the softmax
    (argmax of logits + Gumbel noise). generators: {row: torch.Generator}; other rows are not in use."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    V = logits.shape[1]
    logits = logits - logits.amax(-1, keepdim=True)
    logits = logits / max(sampling.temperature, 1e-6)  # which is greedy
    if sampling.top_k or sampling.top_p:
        ordered, index = logits.sort(descending=True)
        ordered[:, sampling.top_k or V:] = -math.inf
        share = ordered.softmax(-1)
        beyond = share.cumsum(-1) - share >= (sampling.top_p or 1)
        beyond[:, 0] = False  # the likeliest stays, also where top_p is 0 in float32
        ordered[beyond] = -math.inf
        logits = logits.scatter(1, index, ordered)
    uniform = torch.full(logits.shape, 0.5)
    for row, generator in generators.items():
        uniform[row] = torch.rand(V, generator=generator)
    gumbel = -(-uniform.clamp(min=1e-20).log()).log()
    return (logits + gumbel.to(logits.device)).argmax(-1)


def item_generator(item, seed):
    """Noise that depends on the seed, an item's prompt and its clips, not on its batch."""
    prompt, windows, _ = item
    key = zlib.crc32(f"{seed} {prompt}".encode())
    key = zlib.crc32(windows.cpu().numpy(), key)
    return torch.Generator().manual_seed(key)


# ------------------------------------------------------------------------------------------------------------
# The batch


@torch.no_grad()
def encode_audio_kv(model, items):
    """The clips of items -> keys and values {gated block: (B, S, 2, H, d)}, n_keys (B,) or (B, K) of
    AudioFlamingo.encode_audio."""
    _, windows, counts = zip(*items)
    windows = torch.cat(windows).to(model.lm.norm.weight.device)
    audio, n_keys = model.encode_audio(windows, window_counts(counts))
    return model.keys_values(audio), n_keys


def encode_questions(model, items, answer_prefix=""):
    """The prompts of items -> lists of token ids, with the beginning of the answer. UserError where one is
    no text, or too long for the model."""
    prompts, _, counts = zip(*items)
    for prompt in prompts:
        check_text(prompt)
    (prefix,) = encode_text(model.tokenizer, [answer_prefix])
    rows = encode_prompts(model.tokenizer, prompts, list(map(len, counts)))
    rows = [row + prefix for row in rows]
    longest, most = max(map(len, rows)), model.lm.config.positions
    if longest > most:
        raise UserError(f"a prompt of {longest} tokens: the language model takes at most {most}")
    return rows


def pad_to(x, dim, size):
    """x with zeros after it, up to `size` along a dimension."""
    later_dims = [0, 0] * (x.ndim - 1 - dim)  # F.pad takes the last dimension first
    return F.pad(x, [*later_dims, 0, size - x.shape[dim]])


class DecodingBatch:
    """B sequences being generated.

    kv, n_keys (B,): the audio's keys and values, see encode_audio_kv
    kv_cache (layers, 2, B, H_kv, length, d): the KV cache of the text
    lengths (B,): tokens in the cache; longest: an upper bound of them that needs no look at the device
    x (B, D): hidden state at the last token, whose logits choose the next; tokens (B,): that one
    most [B]: tokens that an answer may have
    """

    def __init__(self, model, items, sampling, audio_kv=None):
        """Prefill: the prompts pass through the model at once and fill the KV cache."""
        rows = encode_questions(model, items, sampling.answer_prefix)
        self.model = model
        room = model.lm.config.positions + 1  # the last token needs no position
        self.most = [min(sampling.max_new_tokens, room - len(row)) for row in rows]
        self.kv, n_keys = audio_kv or encode_audio_kv(model, items)
        device = n_keys.device
        ids = pad_rows(rows, model.pad_id).to(device)  # (B, T)
        B, self.longest = ids.shape
        length = math.ceil((self.longest + 1) / CACHE_STEP) * CACHE_STEP
        some_kv = next(iter(self.kv.values()))
        self.kv_cache = model.lm.new_kv_cache(B, length, like=some_kv)
        positions = torch.arange(self.longest, device=device)
        positions = positions.expand(B, -1)
        visible = model.visible_keys(ids, n_keys)
        x = model.forward_hidden(ids, self.kv, visible, positions, self.kv_cache)
        self.lengths = torch.tensor(list(map(len, rows)), device=device)
        self.n_keys = n_keys if n_keys.ndim == 1 else n_keys[:, -1]  # an answer attends to all clips
        self.x = x[torch.arange(B), self.lengths - 1]

    def step(self):
        """Append the chosen tokens; rows that are not in use advance, too, and are never read."""
        if self.longest >= self.kv_cache.shape[4]:
            self.kv_cache = pad_to(self.kv_cache, 4, 2 * self.longest)
        forward = getattr(self.model, "compiled_forward", self.model.forward_hidden)
        ids = self.tokens[:, None]
        positions = self.lengths[:, None]
        x = forward(ids, self.kv, self.n_keys, positions, self.kv_cache)  # (B, 1, D)
        self.x = x[:, 0]
        self.lengths = self.lengths + 1
        self.longest += 1

    def choose_tokens(self, sampling, active, steps):
        """-> the next `steps` tokens of every row, lists of B ids; active: {row: Answer}. The last ones are
        not yet appended."""
        generators = {row: answer.generator for row, answer in active.items()}
        chosen, nan = [], 0
        for n in range(steps):
            if n > 0:
                self.step()
            logits = self.model.lm.logits(self.x).float()  # (B, V)
            self.tokens = sample_tokens(logits, sampling, generators)
            chosen.append(self.tokens)
            nan = nan + logits.isnan().any(-1).long()
        *chosen, nan = torch.stack([*chosen, nan]).tolist()  # the only host-device synchronisation
        if any(nan[row] for row in active):
            raise UserError("the model's logits are NaN: weights that are not finite (checkpoint.py PATH "
                            "names them), or float16, which is too narrow for it")
        return chosen

    def insert_rows(self, rows, new):
        """Replace finished rows by the newly prefilled sequences of another batch -> self."""
        rows = torch.tensor(rows, device=self.x.device)
        for i in self.kv:
            self.kv[i] = replace_rows(self.kv[i], rows, new.kv[i])
        self.kv_cache = replace_rows(self.kv_cache, rows, new.kv_cache, dim=2, padded=4)
        self.n_keys = self.n_keys.index_copy(0, rows, new.n_keys)
        self.lengths = self.lengths.index_copy(0, rows, new.lengths)
        self.x = self.x.index_copy(0, rows, new.x)
        self.longest = int(self.lengths.max())
        return self


def replace_rows(x, rows, new, dim=0, padded=1):
    """x with new rows along a dimension; zeros after the shorter of the two along another."""
    size = max(x.shape[padded], new.shape[padded])
    x = pad_to(x, padded, size)
    new = pad_to(new, padded, size)
    return x.index_copy(dim, rows, new)


def compile_decoding(model):
    """torch.compile for the decoding step: one graph, on a GPU launched as one CUDA graph. Compiled for the
    first shapes, and again, for all, when others come."""
    mode = "reduce-overhead" if model.lm.norm.weight.is_cuda else None
    model.compiled_forward = torch.compile(model.forward_hidden, mode=mode)


# ------------------------------------------------------------------------------------------------------------
# Continuous batching


@dataclass
class Answer:
    """The answer to an item, while it is generated."""
    index: int  # of the item
    most: int  # tokens
    generator: torch.Generator | None  # noise of sampled tokens; None: greedy
    ids: list = field(default_factory=list)  # tokens so far
    ended: bool = False


@torch.no_grad()
def decode_stream(model, items, slots, sampling, audio_kv=None, sync_every=None):
    """Continuous batching: any number of items in a batch of `slots` rows. The next items are prefilled into
    the rows of answers that have ended, so that none waits for a long one.

    Yields per step the Answers that had a token; one that has ended is yielded for the last time. audio_kv:
    of the items, if they were encoded before and are no more than the slots.
    """
    was_training = model.training
    model.eval()
    if sync_every is None:
        sync_every = 1 if model.lm.norm.weight.device.type == "cpu" else SYNC_EVERY
    queue, more = enumerate(items), True
    batch, active = None, {}  # row of the batch: its Answer
    try:
        while True:
            free_slots = [row for row in range(slots if more else 0) if row not in active]
            if len(free_slots) >= max(1, slots // 4):  # a few prompts take the time of one
                numbered = list(itertools.islice(queue, len(free_slots)))
                more = len(numbered) == len(free_slots)
                if numbered:
                    fresh = DecodingBatch(model, [item for _, item in numbered], sampling, audio_kv)
                    batch = batch.insert_rows(free_slots[:len(numbered)], fresh) if active else fresh
                    for row, (index, item), most in zip(free_slots, numbered, fresh.most):
                        generator = item_generator(item, sampling.seed) if sampling.temperature else None
                        active[row] = Answer(index, most, generator)
            if not active:
                return
            for tokens in batch.choose_tokens(sampling, active, sync_every):
                if active:
                    yield append_tokens(active, tokens, model, sampling)
            if active:
                batch.step()
    finally:
        model.train(was_training)


@lru_cache
def warn_once(text):
    print(f"Warning: {text} (reported once)", file=sys.stderr)


def append_tokens(active, tokens, model, sampling):
    """Append a token to each active answer, and remove those that end -> all of them."""
    answers = list(active.values())
    for row, answer in list(active.items()):
        if tokens[row] not in model.stop_ids:
            answer.ids.append(tokens[row])
        full = len(answer.ids) == answer.most
        if full and answer.most < sampling.max_new_tokens:
            warn_once(f"an answer was cut: the language model takes {model.lm.config.positions} tokens")
        if full or tokens[row] in model.stop_ids:
            answer.ended = True
            del active[row]
    return answers


# ------------------------------------------------------------------------------------------------------------
# Texts


def decode_text(model, answer, sampling):
    """An answer's text after its prefix, decoded together: some tokenizers drop a space at the beginning."""
    (prefix,) = encode_text(model.tokenizer, [sampling.answer_prefix])
    return model.tokenizer.decode(prefix + answer.ids, skip_special_tokens=True)


def answer_items(model, items, slots, sampling):
    """Yield (index of the item, text) as answers end."""
    for answers in decode_stream(model, items, slots, sampling):
        for answer in answers:
            if answer.ended:
                yield answer.index, decode_text(model, answer, sampling)


def split_batch(prompts, windows, n_windows):
    """A batch as AudioFlamingo.generate takes it -> its items. ValueError where the shapes do not match."""
    if n_windows.ndim == 1:
        n_windows = n_windows[:, None]
    clips = [[n for n in row if n] for row in n_windows.tolist()]
    if len(prompts) != len(clips) or not all(clips):
        raise ValueError(f"{len(prompts)} prompts and clips of {clips} windows: expected clips for each")
    windows = windows.split([sum(row) for row in clips])
    return list(zip(prompts, windows, clips))


def generate(model, prompts, windows, n_windows, **sampling):
    """AudioFlamingo.generate: B strings."""
    items = split_batch(prompts, windows, n_windows)
    texts = dict(answer_items(model, items, len(items), Sampling(**sampling)))
    return [texts[index] for index in range(len(items))]


def stream_text(model, item, audio_kv, sampling):
    """Yield an answer as it grows."""
    for (answer,) in decode_stream(model, [item], 1, sampling, audio_kv):
        text = decode_text(model, answer, sampling)
        if answer.ended or not text.endswith("\ufffd"):  # a character whose other bytes are still to come
            yield text
