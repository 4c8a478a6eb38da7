"""Gated cross-attention: every backend against the naive spec in float64; resources of the kernels.

    python -m pytest -q tests/test_kernel.py     # on a GPU if any, else in Triton's interpreter (no bfloat16)
"""
import json
import math
import os
import random
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when model.py is imported

import model
from model import GatedCrossAttention, gated_cross_attention, pick_backend
from tests.helpers import fails_with_one_line, run

DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU  # the interpreter's bfloat16 dot is wrong
# the interpreter computes masked lanes too: a token without keys has lse -1e30
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
on_gpu = pytest.mark.skipif(not GPU, reason="no CUDA device: speed and bfloat16 are measured on a GPU only")


def make_inputs(B, T, N, H, d, dtype=torch.float32, gate=0.3, seed=0):
    """-> q, kv, gate as leaves and dy; k and v are the strided halves of kv (B, N, 2, H, d)."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=rng).to(DEVICE, dtype)

    q = draw(B, T, H, d)
    kv = draw(B, N, 2, H, d)
    dy = draw(B, T, H, d)
    gate = torch.tensor([gate], device=DEVICE)
    return q.requires_grad_(), kv.requires_grad_(), gate.requires_grad_(), dy


def keys(*n):
    return torch.tensor(n, device=DEVICE)


def attend(backend, q, kv, gate, dy, n_keys, dtype=None):
    """-> y, dq, dkv, dgate, computed in dtype."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, kv, gate)]
    q, kv, gate = leaves
    y = gated_cross_attention(q, *kv.unbind(2), n_keys, gate, backend)
    return y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))


def check_errors(q, kv, gate, dy, n_keys, backend="triton"):
    """Error <= 2x (output), 3x (gradients) of the naive form's in the same dtype; -> y, dq, dkv, dgate."""
    inputs = q, kv, gate, dy, n_keys
    exact = attend("naive", *inputs, torch.float64)
    naive = attend("naive", *inputs)
    ours = attend(backend, *inputs)
    # tokens of a key or two: plain torch has ds = 0 exactly, ours subtracts
    counts = n_keys.view(len(n_keys), -1).expand(q.shape[:2])
    few = dy[(counts > 0) & (counts < 3)].double().norm() * gate.detach().tanh()
    # the gate's gradient is one number, which plain torch may hit by luck: measured by its summands' size
    open_gate = torch.full_like(gate, 20)  # tanh(20) = 1
    o, *_ = attend("naive", q, kv, open_gate, dy, n_keys, torch.float64)
    floors = {
        "y": 0,
        "dq": 1.2e-7 * few.abs().item(),
        "dkv": 1.2e-7 * few.abs().item(),
        "dgate": torch.finfo(q.dtype).eps * (o * dy).norm().item()}
    for name, right, theirs, mine in zip(floors, exact, naive, ours):
        assert torch.isfinite(mine).all() and mine.shape == right.shape, name
        error = (mine.double() - right).norm().item()
        naive_error = (theirs.double() - right).norm().item()
        most = (2 if name == "y" else 3) * max(naive_error, floors[name])
        assert error <= most, f"{name}: {error:.3g}, allowed {most:.3g}"
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [pytest.param(0.0, marks=pytest.mark.slow), 0.7])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("backend", ["naive", "sdpa", "triton"])
def test_matches_float64(dtype, gate, per_token, backend):
    N, T = 70, 37  # no multiple of any block
    inputs = make_inputs(6, T, N, 1, 32, dtype, gate)
    n_keys = keys(0, 1, 63, 64, 65, N)
    if per_token:  # one text about several clips: token by token more windows
        growing = n_keys[torch.arange(T, device=DEVICE) * 6 // T]
        n_keys = growing.repeat(6, 1).roll(3, dims=1)
    y, dq, dkv, dgate = check_errors(*inputs, n_keys, backend)
    assert not y[n_keys == 0].any() and not dq[n_keys == 0].any()
    if gate == 0:
        assert not dq.any() and not dkv.any() and dgate.abs() > 0.01
    if not per_token:
        for clip, n in zip(dkv, n_keys):
            assert not clip[n:].any()  # exactly zero


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 128])
def test_head_dims(dtype, d):
    inputs = make_inputs(2, 17, 67, 1, d, dtype, gate=-0.5)
    check_errors(*inputs, keys(67, 40))


@pytest.mark.parametrize("T, dtype", [(1, torch.float32), (8, torch.float16)])
def test_decoding_splits_the_keys(T, dtype):
    """Flash-decoding: an intermediate output per share of the keys, and the same numbers."""
    inputs = make_inputs(3, T, 100, 1, 32, dtype)
    q, kv, gate, _ = inputs
    per_token = keys(100, 65, 1)[:, None].expand(3, T)
    for n_keys in (keys(0, 5, 100), per_token):
        y, *_ = check_errors(*inputs, n_keys)
        with torch.no_grad(), Allocated() as allocated:
            again = gated_cross_attention(q, *kv.unbind(2), n_keys, gate, "triton")
        assert torch.equal(again, y)
        parts = [shape for shape in allocated.shapes if len(shape) == 5]
        assert parts and parts[-1][1:] == (3, T, 1, 32)


class Allocated(TorchDispatchMode):
    """Records the shape of every floating-point tensor that an operator makes."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if torch.is_tensor(x) and x.is_floating_point():
                self.shapes.append(tuple(x.shape))
        return out

    def __enter__(self):
        self.shapes = []
        return super().__enter__()


@pytest.mark.parametrize("T", [3, 20])
def test_uninitialised_memory_and_padding_change_nothing(T):
    q, kv, gate, dy = make_inputs(3, T, 70, 1, 32)
    n_keys = keys(0, 40, 65)
    clean = attend("triton", q, kv, gate, dy, n_keys)
    padded = kv.detach().clone()
    for clip, n in zip(padded, n_keys):
        clip[n:] = math.nan
    torch.use_deterministic_algorithms(True)  # fills memory that torch.empty returns with NaN
    try:
        assert torch.empty(1).isnan()
        dirty = attend("triton", q, padded, gate, dy, n_keys)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, clean, dirty))  # the same bits every time


VIEWS = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels strided": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda x: torch.cat([x, x], 3)[:, 1:-2, :, 5:37],
    "expanded": lambda x: x[:1].expand(x.shape),
    "k and v apart": lambda x: x}


@pytest.mark.parametrize("view", VIEWS)
def test_strided_views(view):
    q, kv, gate, dy = make_inputs(2, 9, 40, 2, 32)
    tensors = q.detach(), *kv.detach().unbind(2), dy
    q, k, v, dy = map(VIEWS[view], tensors)
    if view == "k and v apart":
        k = k.contiguous()
    results = []
    for backend in ("naive", "triton"):
        leaves = [x.detach().requires_grad_() for x in (q, k, v, gate)]
        *qkv, open_gate = leaves
        y = gated_cross_attention(*qkv, keys(3, 25), open_gate, backend)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_fuzz():
    seed = int(os.environ.get("FUZZ_SEED", time.time_ns() % 2**31))
    print(f"\nFUZZ_SEED={seed}")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(6):
        B = rng.randint(1, 3)
        T = rng.randint(1, 75)
        N = rng.randint(1, 150)
        H = rng.randint(1, 2)
        d = rng.choice([32, 64])
        dtype, gate = rng.choice(DTYPES), rng.uniform(-2, 2)
        q, kv, gate, dy = make_inputs(B, T, N, H, d, dtype, gate, rng.randrange(2**31))
        if rng.random() < 0.5:  # other strides
            q = torch.cat([q, q], 1)[:, T:]
            kv = torch.cat([kv, kv], 4)[..., d:]
        shape = rng.choice([(B,), (B, T)])
        integer = rng.choice([torch.int32, torch.int64])
        n_keys = torch.randint(0, N + 1, shape, dtype=integer).to(DEVICE)
        print(f"{B=} {T=} {N=} {H=} {d=} {dtype} {n_keys.tolist()}")
        check_errors(q, kv, gate, dy, n_keys)


@pytest.mark.parametrize("backend", ["naive", "sdpa", "triton"])
def test_gradients_of_only_what_needs_them_and_gates_of_any_dtype(backend):
    q, kv, gate, dy = make_inputs(2, 6, 40, 2, 32, torch.float16)
    qkv = q.detach(), *kv.detach().unbind(2)
    n_keys = keys(3, 40)
    for dtype in (torch.float32, torch.bfloat16):
        other = gate.detach().to(dtype).requires_grad_()
        y = gated_cross_attention(*qkv, n_keys, other, backend)
        (dgate,) = torch.autograd.grad(y, other, dy)
        assert y.dtype == q.dtype
        assert dgate.dtype == dtype and dgate.shape == (1,)
    assert not gated_cross_attention(*qkv, n_keys, gate.detach(), backend).requires_grad


def small_block():
    torch.manual_seed(0)
    block = GatedCrossAttention(48, 32, heads=2, d=32).to(DEVICE)
    block.attn_gate.data.fill_(0.3)
    x = torch.randn(2, 20, 48, device=DEVICE, requires_grad=True)
    return block, x, torch.randn(2, 36, 32, device=DEVICE)


@pytest.mark.parametrize("per_token", [False, True])
def test_no_scores_are_formed(per_token):
    T, N = 96, 64
    q, kv, gate, dy = make_inputs(1, T, N, 2, 32)
    n_keys = keys(60)
    if per_token:
        n_keys = n_keys[:, None].expand(1, T)
    inputs = q, *kv.unbind(2), n_keys, gate.tanh()
    with torch.no_grad(), Allocated() as allocated:
        y, o, lse = model.attend(*inputs)
        model.attend_backward(dy, *inputs, o, lse)
    assert max(math.prod(shape) for shape in allocated.shapes) < 2 * T * N


def test_block_saves_what_its_products_need():
    """For its backward: inputs of its products, o and lse; nothing of T x N."""
    block, x, audio = small_block()
    kv = block.keys_values(audio)
    n_keys = keys(33, 36)
    weights = {p.data_ptr() for p in block.parameters()}
    saved = {}

    def pack(t):
        if t.data_ptr() not in weights:
            saved[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x, kv, n_keys, "triton")
    B, T, D = x.shape
    attention = 3 * 64 + 2 + 2 * D + 2  # q, o, gated o (2, 32); lse (2,); x and LN(x), its mean and deviation
    feed_forward = 2 * D + 2 + 2 * 4 * D + D  # x and LN(x); before and after GELU; what the gate multiplies
    others = kv.numel() + n_keys.numel() + 2  # k, v; n_keys; the two gates
    assert sum(saved.values()) <= B * T * (attention + feed_forward) + others


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["auto", "naive", "sdpa", "triton"])
def test_torch_compile_whole_graph(backend):
    block, x, audio = small_block()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for f in (block, compiled):
        y = f(x, block.keys_values(audio), keys(3, 36), backend)
        with torch.no_grad():
            again = f(x, block.keys_values(audio), keys(3, 36), backend)
        torch.testing.assert_close(again, y)
        loss = y.square().sum()
        gradients = torch.autograd.grad(loss, list(block.parameters()))
        results.append([y, *gradients])
    torch.testing.assert_close(*results)


def test_errors():
    q, kv, gate, _ = make_inputs(2, 5, 20, 1, 32)
    k, v = kv.unbind(2)
    n_keys = keys(3, 20)
    for wrong in (
            (q, k[:, :4], v, n_keys),
            (q, k.half(), v, n_keys),
            (q, k, v, keys(3)),
            (q, k, v, n_keys.float())):
        with pytest.raises(ValueError) as error:
            gated_cross_attention(*wrong, gate)
        assert type(error.value) is ValueError  # a programmer's mistake
    wide = [x.double() for x in (q, k, v)]
    for inputs, backend in ((q, k, v), "cuda"), (wide, "triton"):
        with pytest.raises(model.UserError, match="attention_backend"):
            gated_cross_attention(*inputs, n_keys, gate, backend)


def test_pick_backend():
    name, reason = pick_backend(DEVICE)
    assert name in ("triton", "sdpa") and reason
    assert pick_backend(torch.device("cpu"))[0] == "sdpa"


@pytest.mark.slow
def test_without_triton():
    """A machine without triton imports the module and attends with naive and sdpa."""
    run("-c", """
import sys
sys.modules["triton"] = None
import torch
from model import UserError, gated_cross_attention
q, n_keys, gate = torch.randn(1, 2, 1, 32), torch.tensor([2]), torch.ones(1)
a, b, c = (gated_cross_attention(q, q, q, n_keys, gate, name) for name in ("naive", "sdpa", "auto"))
torch.testing.assert_close(a, b)
torch.testing.assert_close(a, c)
try:
    gated_cross_attention(q, q, q, n_keys, gate, "triton")
except UserError:
    sys.exit(0)
sys.exit("no UserError")
""", TRITON_INTERPRET="")


@pytest.mark.slow
def test_every_kernel_compiles_ahead_of_time():
    """The bench's report. No spills, at most 99 KB of shared memory, 64 KB on an MI300."""
    code = "import json; from tools.bench.kernel import *; print(json.dumps(compile_all()))"
    rows = json.loads(run("-c", code, TRITON_INTERPRET="").stdout.splitlines()[-1])
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert row["shared_bytes"] <= (64 if row["arch"] == "gfx942" else 99) * 1024, row
        if row["arch"] == "sm_90" and row["dtype"] == "torch.bfloat16" and row["kernel"] != "combine":
            assert row["wgmma"] and row["async_copies"], row  # Hopper's own matrix products


def test_times_of_backends():
    from tools.bench.kernel import time_backends
    backends = ["naive", "sdpa"]
    rows = time_backends(DEVICE, torch.float32, [(2, 3, 8)], backends)
    assert [row["backend"] for row in rows] == 2 * backends
    assert all(row["ms"] > 0 for row in rows)


@pytest.mark.slow
def test_an_unknown_bench_is_one_line():
    fails_with_one_line("tools/bench.py", "kernels", saying="kernels")


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, N, per_token", [
    (512, 768, False),
    (512, 768, True),
    (100, 1920, False),
    (1, 1920, False)])
def test_full_size_on_gpu(dtype, T, N, per_token):
    inputs = make_inputs(4, T, N, 8, 64, dtype)
    shape = (4, T) if per_token else (4,)
    n_keys = torch.randint(0, N + 1, shape).to(DEVICE)
    once = check_errors(*inputs, n_keys)
    assert all(map(torch.equal, once, attend("triton", *inputs, n_keys)))


@on_gpu
def test_faster_than_naive_on_gpu():
    from tools.bench.kernel import time_backends
    rows = time_backends(DEVICE, torch.bfloat16, [(8, 256, 768)], ["naive", "sdpa", "triton"])
    for backward in (False, True):
        ms = {row["backend"]: row["ms"] for row in rows if row["backward"] == backward}
        print(f"backward {backward}: {ms}")
        assert ms["triton"] < ms["naive"]
