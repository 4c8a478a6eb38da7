"""Gated cross-attention: every backend against the naive spec in float64; resources of the kernels.

    python -m pytest -q tests/test_kernel.py     # on a GPU if any, else in Triton's interpreter (no bfloat16)
"""
import json
import math
import os
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
    q, kv, dy = (torch.randn(shape, generator=rng).to(DEVICE, dtype)
                 for shape in ((B, T, H, d), (B, N, 2, H, d), (B, T, H, d)))
    gate = torch.tensor([gate], device=DEVICE)
    return q.requires_grad_(), kv.requires_grad_(), gate.requires_grad_(), dy


def keys(*n, dtype=torch.int64):
    return torch.tensor(n, device=DEVICE, dtype=dtype)


def attend(backend, q, kv, gate, dy, n_keys, dtype=None):
    """-> y, dq, dkv, dgate, computed in dtype."""
    q, kv, gate = (x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, kv, gate))
    y = gated_cross_attention(q, *kv.unbind(2), n_keys, gate, backend)
    return y.detach(), *torch.autograd.grad(y, (q, kv, gate), dy.to(y.dtype))


def check_errors(q, kv, gate, dy, n_keys, backend="triton"):
    """Error <= 2x (output), 3x (gradients) of the naive form's in the same dtype; -> y, dq, dkv, dgate."""
    exact = attend("naive", q, kv, gate, dy, n_keys, torch.float64)
    naive = attend("naive", q, kv, gate, dy, n_keys)
    ours = attend(backend, q, kv, gate, dy, n_keys)
    few = n_keys.view(n_keys.shape[0], -1).expand(q.shape[:2])
    few = dy[(few > 0) & (few < 3)]  # tokens of a key or two: plain torch has ds = 0 exactly, ours subtracts
    # the gate's gradient is one number, which plain torch may hit by luck: measured by its summands' size
    open_gate = torch.full_like(gate, 20).double()  # tanh(20) = 1
    o = gated_cross_attention(q.double(), *kv.double().unbind(2), n_keys, open_gate, "naive")
    for name, most, right, theirs, mine in zip(("y", "dq", "dkv", "dgate"), (2, 3, 3, 3), exact, naive, ours):
        assert torch.isfinite(mine).all() and mine.shape == right.shape, name
        error = (mine.double() - right).norm().item()
        allowed = (theirs.double() - right).norm().item()
        if name == "dgate":
            allowed = max(allowed, torch.finfo(q.dtype).eps * (o * dy).norm().item())
        elif name != "y":
            allowed = math.hypot(allowed, 1.2e-7 * few.double().norm().item() * gate.tanh().item())
        assert error <= most * allowed, f"{name}: {error:.3g}, naive {allowed:.3g}"
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [0.0, 0.7])
@pytest.mark.parametrize("per_token", [False, True])
def test_matches_float64(dtype, gate, per_token):
    N, T = 130, 37  # no multiple of any block
    inputs = make_inputs(6, T, N, 1, 32, dtype, gate)
    n_keys = keys(0, 1, 63, 64, 65, N)
    if per_token:  # one text about several clips: token by token more windows
        n_keys = n_keys[torch.arange(T, device=DEVICE) * 6 // T].repeat(6, 1).roll(3, dims=1)
    _, dq, dkv, dgate = check_errors(*inputs, n_keys)
    if gate == 0:
        assert not dq.any() and not dkv.any() and dgate.abs() > 0.01


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 70])
def test_every_length_alone(n):
    _, _, dkv, dgate = check_errors(*make_inputs(1, 20, 70, 1, 64), keys(n))
    assert not dkv[:, n:].any()  # exactly zero
    assert n or not dgate.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [32, 64, 128])
def test_head_dims(dtype, d):
    check_errors(*make_inputs(2, 17, 67, 1, d, dtype, gate=-0.5), keys(67, 40))


@pytest.mark.parametrize("T, dtype", [(1, torch.float32), (8, torch.float16)])
def test_decoding_splits_the_keys(T, dtype):
    """Flash-decoding: an intermediate output per share of the keys, and the same numbers."""
    inputs = make_inputs(3, T, 300, 2, 32, dtype)
    for n_keys in (keys(0, 5, 300), keys(300, 65, 1)[:, None].expand(3, T)):
        y, *_ = check_errors(*inputs, n_keys)
        q, kv, gate, _ = inputs
        with torch.no_grad(), Allocated() as allocated:
            assert torch.equal(gated_cross_attention(q, *kv.unbind(2), n_keys, gate, "triton"), y)
        assert any(len(shape) == 5 and shape[1:] == (3, T, 2, 32) for shape in allocated.shapes)


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
@pytest.mark.parametrize("per_token", [False, True])
def test_torch_backends(backend, per_token):
    n_keys = keys(0, 33, 70)
    if per_token:
        n_keys = torch.randint(0, 71, (3, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        n_keys[0] = 0
    y, dq, dkv, _ = check_errors(*make_inputs(3, 9, 70, 2, 32), n_keys, backend)
    assert not y[0].any() and not dq[0].any() and not dkv[0].any()
    assert per_token or not dkv[1, 33:].any()


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


@pytest.mark.parametrize("T", [3, 40])
def test_uninitialised_memory_and_padding_change_nothing(T):
    q, kv, gate, dy = make_inputs(4, T, 130, 2, 32)
    n_keys = keys(0, 40, 64, 129)
    clean = attend("triton", q, kv, gate, dy, n_keys)
    padded = kv.detach().clone()
    for clip, n in zip(padded, n_keys):
        clip[n:] = math.nan
    torch.use_deterministic_algorithms(True)  # fills memory that torch.empty returns with NaN
    try:
        assert torch.empty(1).isnan()
        dirty = attend("triton", q, padded, gate, dy, n_keys)
        again = attend("triton", q, padded, gate, dy, n_keys)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b, c in zip(clean, dirty, again):
        assert torch.equal(a, b) and torch.equal(b, c)  # the same bits every time
    for clip, n in zip(dirty[2], n_keys):
        assert not clip[n:].any()


@pytest.mark.parametrize("view", ["heads first", "sliced", "expanded", "channels strided", "k and v apart"])
def test_strided_views(view):
    q, kv, gate, dy = make_inputs(2, 6, 40, 2, 32)
    q, (k, v) = q.detach(), kv.detach().unbind(2)
    if view == "heads first":
        q, k, v, dy = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dy))
    elif view == "sliced":  # of a product for all layers, at an odd offset
        wide = torch.cat([q, q, q], -1).flatten(2)[..., 33:33 + 64]
        q, k, v = wide.view(2, 6, 2, 32), k[:, 3:31], v[:, 5:33]
    elif view == "expanded":
        k, v = (x[:1].expand(2, -1, -1, -1) for x in (k, v))
        dy = dy[:1, :1, :1, :1].expand(dy.shape)
    elif view == "channels strided":
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    else:
        k = k.contiguous()
    results = []
    for backend in ("naive", "triton"):
        leaves = [x.detach().requires_grad_() for x in (q, k, v, gate)]
        y = gated_cross_attention(*leaves[:3], keys(3, 25), leaves[3], backend)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_fuzz():
    seed = int(os.environ.get("FUZZ_SEED", time.time_ns() % 2**31))
    print(f"\nFUZZ_SEED={seed}")
    rng = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=rng))

    for _ in range(6):
        B, T, N, H, d = draw(1, 3), draw(1, 75), draw(1, 150), draw(1, 2), 32 * 2 ** draw(0, 1)
        dtype = DTYPES[draw(0, len(DTYPES) - 1)]
        q, kv, gate, dy = make_inputs(B, T, N, H, d, dtype, draw(-20, 20) / 10, draw(0, 2**31))
        if draw(0, 1):  # padding around q and kv: other strides
            q = torch.cat([q.detach(), q.detach()], 1)[:, T:]
            kv = torch.cat([kv.detach(), kv.detach()], 4)[..., d:]
        shape = (B, T) if draw(0, 1) else (B,)
        integer = [torch.int32, torch.int64][draw(0, 1)]
        n_keys = torch.randint(0, N + 1, shape, generator=rng, dtype=integer).to(DEVICE)
        print(f"{B=} {T=} {N=} {H=} {d=} {dtype} {n_keys.tolist()}")
        check_errors(q, kv, gate, dy, n_keys)


@pytest.mark.parametrize("backend", ["naive", "sdpa", "triton"])
def test_gradients_of_only_what_needs_them_and_gates_of_any_dtype(backend):
    q, kv, gate, dy = make_inputs(2, 6, 40, 2, 32, torch.float16)
    k, v = kv.detach().unbind(2)
    for dtype in (torch.float32, torch.bfloat16):
        other = gate.detach().to(dtype).requires_grad_()
        y = gated_cross_attention(q.detach(), k, v, keys(3, 40), other, backend)
        (dgate,) = torch.autograd.grad(y, other, dy)
        assert y.dtype == q.dtype and dgate.dtype == dtype and dgate.shape == (1,)
    assert not gated_cross_attention(q.detach(), k, v, keys(3, 40), gate.detach(), backend).requires_grad


def small_block():
    torch.manual_seed(0)
    block = GatedCrossAttention(48, 32, heads=2, d=32).to(DEVICE)
    block.attn_gate.data.fill_(0.3)
    x = torch.randn(2, 20, 48, device=DEVICE, requires_grad=True)
    return block, x, torch.randn(2, 36, 32, device=DEVICE)


@pytest.mark.parametrize("per_token", [False, True])
def test_no_scores_are_formed(per_token):
    q, kv, gate, dy = make_inputs(1, 128, 96, 2, 32)
    n_keys = keys(90)[:, None].expand(1, 128) if per_token else keys(90)
    inputs = q, *kv.unbind(2), n_keys, gate.tanh()
    with torch.no_grad(), Allocated() as allocated:
        y, o, lse = model.attend(*inputs)
        model.attend_backward(dy, *inputs, o, lse)
    assert max(math.prod(shape) for shape in allocated.shapes) < 2 * 128 * 96


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
        y = block(x, kv, n_keys, "triton")
    B, T, D = x.shape
    attention = 3 * 64 + 2 + 2 * D + 2  # q, o, gated o (2, 32); lse (2,); x and LN(x), its mean and deviation
    feed_forward = 2 * D + 2 + 2 * 4 * D + D  # x and LN(x); before and after GELU; what the gate multiplies
    others = kv.numel() + n_keys.numel() + 2  # k, v; n_keys; the two gates
    assert sum(saved.values()) <= B * T * (attention + feed_forward) + others
    leaves = [x, *block.parameters()]
    naive = block(x, block.keys_values(audio), n_keys, "naive")
    ours = torch.autograd.grad(block(x, block.keys_values(audio), n_keys, "triton").sum(), leaves)
    for a, b in zip((y, *ours), (naive, *torch.autograd.grad(naive.sum(), leaves))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["auto", "naive", "sdpa", "triton"])
def test_torch_compile_whole_graph(backend):
    block, x, audio = small_block()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for f in (block, compiled):
        y = f(x, block.keys_values(audio), keys(3, 36), backend)
        with torch.no_grad():
            torch.testing.assert_close(f(x, block.keys_values(audio), keys(3, 36), backend), y)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(block.parameters()))])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_opcheck():
    q, kv, gate, _ = make_inputs(2, 5, 20, 1, 32)
    k, v = (x.detach().requires_grad_() for x in kv.unbind(2))
    for n_keys in (keys(3, 20), keys(3, 20)[:, None].expand(2, 5)):
        torch.library.opcheck(model.attend_op, (q, k, v, n_keys, gate.detach().tanh()))


def test_errors():
    q, kv, gate, _ = make_inputs(2, 5, 20, 1, 32)
    k, v = kv.unbind(2)
    for wrong in ((q, k[:, :4], v, keys(3, 20)), (q, k.half(), v, keys(3, 20)), (q, k, v, keys(3)),
                  (q, k, v, keys(3, 20).float())):
        with pytest.raises(ValueError) as error:
            gated_cross_attention(*wrong, gate)
        assert type(error.value) is ValueError  # a programmer's mistake
    for inputs, backend in ((q, k, v), "cuda"), ((q.double(), k.double(), v.double()), "triton"):
        with pytest.raises(model.UserError, match="attention_backend"):
            gated_cross_attention(*inputs, keys(3, 20), gate, backend)


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
    rows = time_backends(DEVICE, torch.float32, [(2, 3, 8)], ["naive", "sdpa"])
    assert [row["backend"] for row in rows] == 2 * ["naive", "sdpa"] and all(row["ms"] > 0 for row in rows)


@pytest.mark.slow
def test_an_unknown_bench_is_one_line():
    fails_with_one_line("tools/bench.py", "kernels", saying="kernels")


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, N, per_token", [
    (512, 768, False), (512, 768, True), (100, 1920, False), (1, 1920, False)])
def test_full_size_on_gpu(dtype, T, N, per_token):
    inputs = make_inputs(4, T, N, 8, 64, dtype)
    n_keys = torch.randint(0, N + 1, (4, T) if per_token else (4,)).to(DEVICE)
    once = check_errors(*inputs, n_keys)
    for a, b in zip(once, attend("triton", *inputs, n_keys)):
        assert torch.equal(a, b)


@on_gpu
def test_faster_than_naive_on_gpu():
    from tools.bench.kernel import time_backends
    rows = time_backends(DEVICE, torch.bfloat16, [(8, 256, 768)], ["naive", "sdpa", "triton"])
    for backward in (False, True):
        ms = {row["backend"]: row["ms"] for row in rows if row["backward"] == backward}
        print(f"backward {backward}: {ms}")
        assert ms["triton"] < ms["naive"]
