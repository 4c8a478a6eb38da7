"""tools/bench.py decode: what a token of an answer costs, beside the published way and the machine's limits.

SmolLM2-135M with all 30 blocks gated, HTSAT-tiny, random weights, noise to listen to; none of them matters
for the time. Everything decodes side by side, a token each in turns; figures are medians.
"""
import statistics
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import checkpoint
import config
from data import SPECIAL_TOKENS
from model import AudioFlamingo, naive_attention
from tools.bench.reference import norm
from tools.sample.decoding import Sampling, decode_stream
from tools.sample.int8 import quantize

SMOLLM2 = SimpleNamespace(width=576, layers=30, inner=1536, heads=9, kv_heads=3, d=64, vocab=49152, eps=1e-5,
                          rope_theta=1e5, rope_stretch=None, qkv_bias=False, out_bias=False, mlp_bias=False,
                          qk_norm=False, tied=True, positions=8192)
HTSAT_TINY = {"clap_embed_dim": 96, "clap_depths": [2, 2, 6, 2], "clap_num_heads": [4, 8, 16, 32]}
PROMPT = "What happens in this recording?"
ROUNDS = 16  # tokens of each answer that are timed
WINDOWS = (3, 12, 30)


class Letters:
    """A tokenizer of SmolLM2's size: a text's bytes, and the marks of a prompt after the vocabulary."""
    eos_token_id, pad_token_id, sep_token_id = 0, SMOLLM2.vocab + 2, SMOLLM2.vocab + 3

    def __len__(self):
        return SMOLLM2.vocab + len(SPECIAL_TOKENS)

    def __call__(self, texts, **_):
        return {"input_ids": [SMOLLM2.vocab] if texts == SPECIAL_TOKENS[0] else [list(t.encode()) for t in texts]}

    def convert_tokens_to_ids(self, names):
        ids = [SMOLLM2.vocab + SPECIAL_TOKENS.index(name) for name in ([names] if isinstance(names, str) else names)]
        return ids[0] if isinstance(names, str) else ids


def build(device, dtype):
    torch.manual_seed(0)
    settings = SimpleNamespace(**(config.defaults() | HTSAT_TINY | {"cross_attn_every_n_layers": 1}))
    model = AudioFlamingo(settings, SMOLLM2, Letters())
    for gated in model.xattn.values():
        gated.attn_gate.data.fill_(0.5)
        gated.ff_gate.data.fill_(0.5)
    model = checkpoint.materialize(model, {}, device, dtype, "the bench")
    model.stop_ids = []  # answers go on
    return model


def clips(W, B=1):
    """B clips of W windows of noise, as stream takes them after the prompts."""
    noise = torch.Generator().manual_seed(W)
    windows = torch.randint(-3000, 3000, (B * W, 160000), generator=noise, dtype=torch.int16)
    return windows, torch.full((B,), W)


# ------------------------------------------------------------------------------------------------------------
# The published way: the audio's keys and values again at every token, a mask over padded windows, norms and
# rotary in pieces, keys and values of the text appended and repeated


def plain_rotate(x, cos, sin):
    return x * cos + torch.cat([-x[..., 32:], x[..., :32]], -1) * sin


def plain_attention(attention, x, cos, sin, past):
    B, T, _ = x.shape
    project = lambda w: w(x).view(B, T, -1, 64).transpose(1, 2)  # (B, H, T, d)
    q, k = (plain_rotate(project(w), cos, sin) for w in (attention.q_proj, attention.k_proj))
    k, v = torch.cat([past[0], k], 2), torch.cat([past[1], project(attention.v_proj)], 2)
    past[:] = k, v
    k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
    return attention.o_proj(o.transpose(1, 2).reshape(B, T, -1))


@torch.no_grad()
def plain_stream(model, windows, n_windows):
    """One clip; greedy. Yields once a token."""
    audio, n_keys = model.encode_audio(windows.to(model.lm.norm.weight.device), n_windows)
    ids = torch.tensor([[SMOLLM2.vocab, *PROMPT.lower().encode(), Letters.sep_token_id]], device=audio.device)
    pasts, first = [[audio.new_zeros(1, 3, 0, 64)] * 2 for _ in model.lm.layers], 0
    while True:
        positions = torch.arange(first, first + ids.shape[1], device=audio.device)
        angle = positions[:, None] / 1e5 ** (torch.arange(0, 64, 2, device=audio.device) / 64)
        cos, sin = (torch.cat([f(angle)] * 2, -1).to(audio.dtype) for f in (torch.cos, torch.sin))
        x, first = model.lm.embed_tokens(ids), first + ids.shape[1]
        for gated, block, past in zip(model.xattn.values(), model.lm.layers, pasts):
            q = gated.attn.to_q(gated.attn.norm(x)).unflatten(-1, (8, 64))
            k, v = gated.attn.to_kv(audio).unflatten(-1, (2, 8, 64)).unbind(2)
            x = x + gated.attn.to_out(naive_attention(q, k, v, n_keys, gated.attn_gate).flatten(2))
            x = x + gated.ff(x) * gated.ff_gate.tanh()
            x = x + plain_attention(block.self_attn, norm(block.input_layernorm, x), cos, sin, past)
            x = x + block.mlp(norm(block.post_attention_layernorm, x))
        ids = model.lm.logits(norm(model.lm.norm, x[:, -1:])).argmax(-1)
        yield ids


# ------------------------------------------------------------------------------------------------------------
# The machine's limits


def step_weights(model):
    """The matrices that one token is multiplied with."""
    tables = ("lm.embed_tokens.weight", "lm.embed_tokens.added")
    inside = lambda name, p: name.startswith(("lm.layers.", "xattn.")) and p.ndim == 2 and "to_kv" not in name
    return [p for name, p in model.named_parameters() if name in tables or inside(name, p)]


def read_once(model, W):
    """-> a function that reads those, and keys and values of W windows, once: at the rate of a large sum."""
    numbers = sum(p.numel() for p in step_weights(model))
    numbers += SMOLLM2.layers * 64 * W * 2 * 8 * 64
    memory = torch.zeros(numbers, device=model.lm.norm.weight.device)
    return memory.sum


def products_alone(model):
    """-> a function that multiplies one row with each of them."""
    weights = step_weights(model)
    rows = {p.shape[1]: torch.randn(1, p.shape[1]).to(p) for p in weights}
    return lambda: [F.linear(rows[p.shape[1]], p) for p in weights]


# ------------------------------------------------------------------------------------------------------------
# Many questions whose answers are of many lengths


def with_ends(model, share=1 / 32):
    """The model says that an answer ends with this probability, told by its state: some after 1 token, many
    after 64, the same ones whichever way they are asked."""
    logits, model.stop_ids = model.lm.logits, [0]

    def ending(x):
        y = logits(x)
        y[(1e3 * x[:, 0].float()) % 1 < share, 0] = float("inf")
        return y

    model.lm.logits = ending
    return model


def continuous_speedup(model, questions=64, slots=8):
    """Time of plain batches over that of rows which take the next question when theirs is answered."""
    windows, _ = clips(questions)
    items = [(f"question {i}", windows[i:i + 1], [1]) for i in range(questions)]
    ask = lambda some: list(decode_stream(model, some, slots, Sampling(max_new_tokens=64)))
    plain = lambda: [ask(items[i:i + slots]) for i in range(0, questions, slots)]
    device = model.lm.norm.weight.device
    return seconds_of(plain, device) / seconds_of(lambda: ask(items), device)


# ------------------------------------------------------------------------------------------------------------


def seconds_of(run, device):
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@torch.no_grad()
def decode():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    float32, bf16 = build(device, torch.float32), build(device, torch.bfloat16)
    models = {"ms_per_token": float32, "bf16_ms": bf16}
    if device.type == "cpu":
        models["int8_ms"] = quantize(build(device, torch.bfloat16))
    first = {name: [] for name in ("float32", "bf16")}
    for _ in range(4):
        for name, model in (("float32", float32), ("bf16", bf16)):
            first[name].append(seconds_of(lambda: next(model.stream([PROMPT], *clips(12))), device))
    runs = {"read": read_once(float32, 12), "products": products_alone(bf16)}
    for W in WINDOWS:
        runs["plain_ms_per_token", W] = plain_stream(float32, *clips(W)).__next__
        for name, model in models.items():
            runs[name, W] = model.stream([PROMPT], *clips(W)).__next__
    runs["batch"] = bf16.stream([PROMPT] * 8, *clips(12, B=8)).__next__
    times = {name: [] for name in runs}
    for turn in range(ROUNDS + 2):  # the first listens, the second warms up
        for name, run in runs.items():
            times[name].append(1e3 * seconds_of(run, device))
    ms = {name: statistics.median(taken[2:]) for name, taken in times.items()}
    figures = {"mode": "decode", "device": str(device), "torch": torch.__version__}
    print(f"one row, ms a token, on {device}, torch {torch.__version__}")
    print(f"{'windows':>20}" + "".join(f"{W:8}" for W in WINDOWS))
    for name in ("plain_ms_per_token", "ms_per_token", "bf16_ms", "int8_ms"):
        figures[name] = {str(W): round(ms[name, W], 2) for W in WINDOWS} if (name, 3) in ms else None
        print(f"{name:20}" + "".join(f"{ms.get((name, W), 0):8.1f}" for W in WINDOWS))
    figures |= {
        "first_token_s": {name: round(statistics.median(taken[1:]), 3) for name, taken in first.items()},
        "float32_over_read": round(ms["ms_per_token", 12] / ms["read"], 3),
        "bf16_over_products": round(ms["bf16_ms", 12] / ms["products"], 3),
        "batch8_ms_per_token": round(ms["batch"] / 8, 2),
        "read_ms": round(ms["read"], 2), "products_ms": round(ms["products"], 2),
        "continuous_speedup": round(continuous_speedup(with_ends(bf16)), 2)}
    for name in list(figures)[-7:]:
        print(f"{name:20} {figures[name]}")
    return figures
