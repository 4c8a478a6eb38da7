"""Gated cross-attention: every backend against the naive spec in float64; resources of the kernels.

    python -m pytest -q tests/test_kernel.py     # on a GPU if any, else in Triton's interpreter (no bfloat16)
"""
import json
import math
import os
import subprocess
import sys
import time

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the module with the kernels is imported

import model
from model import gated_cross_attention, pick_backend

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the project
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU  # the interpreter's bfloat16 dot is wrong
# the interpreter computes masked lanes too: a token without keys has lse -1e30
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
on_gpu = pytest.mark.skipif(not GPU, reason="no CUDA device: speed and bfloat16 are measured on a GPU only")


def make_inputs(B, T, N, H, d, dtype=torch.float32, gate=0.3, seed=0):
    """-> q, kv, gate as leaves and dy; k and v are the strided halves of kv (B, N, 2, H, d)."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=rng).to(DEVICE, dtype)
    leaf = lambda x: x.requires_grad_()
    q, kv, dy = draw(B, T, H, d), draw(B, N, 2, H, d), draw(B, T, H, d)
    return leaf(q), leaf(kv), leaf(torch.tensor([gate], device=DEVICE)), dy


def run(backend, q, kv, gate, dy, n_keys, dtype=None):
    """-> y, dq, dkv, dgate, computed in dtype."""
    q, kv, gate = ((x.to(dtype) if dtype else x).detach().requires_grad_() for x in (q, kv, gate))
    y = gated_cross_attention(q, *kv.unbind(2), n_keys, gate, backend)
    return y.detach(), *torch.autograd.grad(y, (q, kv, gate), dy.to(y.dtype))


def check_errors(q, kv, gate, dy, n_keys, backend="triton"):
    """Asserts error <= 2x (output), 3x (gradients) of the naive form's in the same dtype; -> the ratios."""
    exact = run("naive", q, kv, gate, dy, n_keys, torch.float64)
    plain, ours = (run(name, q, kv, gate, dy, n_keys) for name in ("naive", backend))
    few = n_keys.view(n_keys.shape[0], -1).expand(q.shape[:2])
    few = dy[(few > 0) & (few < 3)]  # tokens of a key or two: plain torch has ds = 0 exactly, ours subtracts
    # the gate's gradient is one number, which plain torch may hit by luck: measured by its summands' size
    unit, eps = torch.full_like(gate, 20).double(), torch.finfo(q.dtype).eps  # tanh(20) = 1
    o = gated_cross_attention(q.double(), *kv.double().unbind(2), n_keys, unit, "naive")
    ratios, names = [], ("y", "dq", "dkv", "dgate")
    rows = zip(names, (2, 3, 3, 3), exact, plain, ours, strict=True)
    for name, most, reference, theirs, mine in rows:
        assert torch.isfinite(mine).all() and mine.shape == reference.shape, name
        error, allowed = ((x.double() - reference).norm().item() for x in (mine, theirs))
        if name == "dgate":
            allowed = max(allowed, eps * (o * dy).norm().item())
        elif name != "y":
            allowed = math.hypot(allowed, 1.2e-7 * few.double().norm().item() * gate.tanh().item())
        assert error <= most * allowed, f"{name}: {error:.3g}, plain {allowed:.3g}"
        ratios.append(error / allowed if allowed else 0.0)
    return ratios


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [0.0, 0.7])
@pytest.mark.parametrize("per_token", [False, True])
def test_matches_float64(dtype, gate, per_token):
    N, T = 130, 37  # no multiple of any block
    q, kv, gate, dy = make_inputs(6, T, N, 1, 32, dtype, gate)
    n_keys = torch.tensor([0, 1, 63, 64, 65, N], device=DEVICE)
    if per_token:  # one text about several clips: token by token more windows
        steps = torch.tensor([0, 1, 63, 64, 65, N], device=DEVICE)
        n_keys = steps[torch.arange(T, device=DEVICE) * 6 // T].repeat(6, 1).roll(3, dims=1)
    ratios = check_errors(q, kv, gate, dy, n_keys)
    print(f"\n{dtype} gate {gate.item():.1f} per_token {per_token}: y {ratios[0]:.2f} dq {ratios[1]:.2f} "
          f"dkv {ratios[2]:.2f} of plain torch's error; dgate {ratios[3]:.2f}")
    if gate == 0:
        _, dq, dkv, dgate = run("triton", q, kv, gate, dy, n_keys)
        assert not dq.any() and not dkv.any() and dgate.abs() > 0.01


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 70])
def test_every_length_alone(n):
    q, kv, gate, dy = make_inputs(1, 20, 70, 1, 64)
    n_keys = torch.tensor([n], device=DEVICE)
    check_errors(q, kv, gate, dy, n_keys)
    _, _, dkv, dgate = run("triton", q, kv, gate, dy, n_keys)
    assert not dkv[:, n:].any()  # exactly zero
    assert n or not dgate.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [32, 64, 128])
def test_head_dims(dtype, d):
    q, kv, gate, dy = make_inputs(2, 17, 67, 1, d, dtype, gate=-0.5)
    check_errors(q, kv, gate, dy, torch.tensor([67, 40], device=DEVICE))


@pytest.mark.parametrize("T", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_splits_keys(T, dtype, monkeypatch):
    N, launched = 300, []
    q, kv, gate, dy = make_inputs(3, T, N, 2, 32, dtype)
    for n_keys in (torch.tensor([0, 5, 300]), torch.tensor([[300], [65], [1]]).expand(3, T)):
        check_errors(q, kv, gate, dy, n_keys.to(DEVICE))
    kernels = sys.modules[model.attend.__module__]
    monkeypatch.setattr(kernels, "launch", lambda kernel, grid, *_, **__: launched.append((kernel, grid)))
    k, v = kv.detach().unbind(2)
    gated_cross_attention(q.detach(), k, v, torch.tensor([0, 5, 300]), gate.detach(), "triton")
    (first, grid), (second, _) = launched
    assert first is model.forward_kernel and grid[1] > 2 and second is model.combine_kernel


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
@pytest.mark.parametrize("per_token", [False, True])
def test_torch_backends(backend, per_token):
    q, kv, gate, dy = make_inputs(3, 9, 70, 2, 32)
    n_keys = torch.tensor([0, 33, 70], device=DEVICE)
    if per_token:
        n_keys = torch.randint(0, 71, (3, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        n_keys[0] = 0
    check_errors(q, kv, gate, dy, n_keys, backend)
    y, dq, dkv, _ = run(backend, q, kv, gate, dy, n_keys)
    assert not y[0].any() and not dq[0].any() and not dkv[0].any()
    if not per_token:
        assert not dkv[1, 33:].any()


def poison(monkeypatch):
    """Fresh memory holds NaN, so that an output that no kernel wrote shows. -> the sizes asked for."""
    empty, sizes = torch.empty, []

    def poisoned(*shape, **options):
        fresh = empty(*shape, **options)
        sizes.append(fresh.numel())
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch, "empty", poisoned)
    like = lambda x, **options: poisoned(x.shape, dtype=x.dtype, device=x.device)
    monkeypatch.setattr(torch, "empty_like", like)
    return sizes


@pytest.mark.parametrize("T", [3, 40])
def test_poisoned_memory_and_padding(T, monkeypatch):
    q, kv, gate, dy = make_inputs(4, T, 130, 2, 32)
    n_keys = torch.tensor([0, 40, 64, 129], device=DEVICE)
    clean = run("triton", q, kv, gate, dy, n_keys)
    with torch.no_grad():
        for clip, n in zip(kv, n_keys, strict=True):
            clip[n:] = float("nan")  # what padding holds does not matter
    sizes = poison(monkeypatch)
    dirty = run("triton", q, kv, gate, dy, n_keys)
    assert sizes, "the test does not reach the allocations"
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    for clip, n in zip(dirty[2], n_keys, strict=True):
        assert not clip[n:].any()


def test_two_backwards_are_bit_equal():
    q, kv, gate, dy = make_inputs(2, 70, 130, 2, 32, torch.float16)
    n_keys = torch.tensor([130, 77], device=DEVICE)
    twice = (run("triton", q, kv, gate, dy, n_keys) for _ in range(2))
    for a, b in zip(*twice, strict=True):
        assert torch.equal(a, b)


def test_finite_differences():
    q, kv, gate, dy = make_inputs(1, 3, 5, 1, 32)
    n_keys = torch.tensor([4], device=DEVICE)
    gradients = run("triton", q, kv, gate, dy, n_keys)[1:]
    f = lambda *x: (gated_cross_attention(x[0], *x[1].unbind(2), n_keys, x[2], "naive") * dy).sum().item()
    point, step = [x.detach().double() for x in (q, kv, gate)], 1e-5
    for which, gradient in enumerate(gradients):
        for seed in range(4):
            rng = torch.Generator().manual_seed(seed)
            u = torch.randn(point[which].shape, generator=rng).to(DEVICE).double()
            moved = lambda by: [x + by * u if i == which else x for i, x in enumerate(point)]
            slope = (f(*moved(step)) - f(*moved(-step))) / (2 * step)
            assert (gradient * u).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-5)


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # gradcheck prefers float64
def test_gradcheck_float32():
    q, kv, gate, _ = make_inputs(1, 2, 3, 1, 32)
    n_keys = torch.tensor([[2, 3]], device=DEVICE)
    f = lambda q, kv, gate: gated_cross_attention(q, *kv.unbind(2), n_keys, gate, "triton")
    tolerances = {"eps": 1e-2, "atol": 2e-3, "rtol": 1e-2, "nondet_tol": 0.0}
    assert torch.autograd.gradcheck(f, (q, kv, gate), fast_mode=True, **tolerances)


@pytest.mark.parametrize("view", ["heads first", "sliced", "expanded", "channels strided"])
def test_strided_views(view):
    q, kv, gate, dy = make_inputs(2, 6, 40, 2, 32)
    k, v = kv.detach().unbind(2)
    q = q.detach()
    if view == "heads first":
        q, k, v, dy = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dy))
    elif view == "sliced":  # of a product for all layers, at an odd offset
        wide = torch.cat([q, q, q], -1).flatten(2)[..., 33:33 + 64]
        q, k, v = wide.view(2, 6, 2, 32), k[:, 3:31], v[:, 5:33]
    elif view == "expanded":
        k, v = (x[:1].expand(2, -1, -1, -1) for x in (k, v))
        dy = dy[:1, :1, :1, :1].expand(dy.shape)
    else:
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    n_keys = torch.tensor([3, 25], device=DEVICE)
    results = []
    for backend in ("naive", "triton"):
        leaves = [x.detach().requires_grad_() for x in (q, k, v, gate)]
        y = gated_cross_attention(*leaves[:3], n_keys, leaves[3], backend)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_fuzz():
    seed = int(os.environ.get("FUZZ_SEED", time.time_ns() % 2**31))
    print(f"\nFUZZ_SEED={seed}")
    rng = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=rng))
    for _ in range(6):
        B, T, N, H, d = draw(1, 3), draw(1, 75), draw(1, 150), draw(1, 2), 32 * 2 ** draw(0, 1)
        dtype, gate = DTYPES[draw(0, len(DTYPES) - 1)], draw(-20, 20) / 10
        q, kv, gate, dy = make_inputs(B, T, N, H, d, dtype, gate, draw(0, 2**31))
        if draw(0, 1):  # padding around q and kv: other strides
            q = torch.cat([q.detach(), q.detach()], 1)[:, T:]
            kv = torch.cat([kv.detach(), kv.detach()], 4)[..., d:]
        shape = (B, T) if draw(0, 1) else (B,)
        integer = [torch.int32, torch.int64][draw(0, 1)]
        n_keys = torch.randint(0, N + 1, shape, generator=rng, dtype=integer).to(DEVICE)
        try:
            check_errors(q, kv, gate, dy, n_keys)
        except AssertionError as error:
            case = f"{B=} {T=} {N=} {H=} {d=} {dtype} {n_keys.tolist()}"
            raise AssertionError(f"FUZZ_SEED={seed}: {case}") from error


def test_gate_of_another_dtype():
    q, kv, gate, dy = make_inputs(2, 6, 40, 2, 32, torch.float16)
    n_keys = torch.tensor([3, 40], device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        other = gate.detach().to(dtype).requires_grad_()
        for backend in ("naive", "sdpa", "triton"):
            y = gated_cross_attention(q, *kv.unbind(2), n_keys, other, backend)
            (dgate,) = torch.autograd.grad(y, other, dy)
            assert y.dtype == q.dtype and dgate.dtype == dtype and dgate.shape == (1,)


def test_only_what_needs_it_gets_a_gradient():
    q, kv, gate, _ = make_inputs(1, 3, 5, 1, 32)
    n_keys = torch.tensor([5], device=DEVICE)
    q, k, v = q.detach(), *kv.detach().unbind(2)
    y = gated_cross_attention(q, k, v, n_keys, gate, "triton")
    assert len(torch.autograd.grad(y.sum(), (gate,))) == 1
    assert not gated_cross_attention(q, k, v, n_keys, gate.detach(), "triton").requires_grad


def test_block_saves_what_its_products_need_and_no_scores():
    B, T, N, D = 2, 20, 36, 48
    torch.manual_seed(0)
    block = model.GatedCrossAttention(D, 32, heads=2, d=32).to(DEVICE)
    block.attn_gate.data.fill_(0.3)
    x, audio = torch.randn(B, T, D, device=DEVICE, requires_grad=True), torch.randn(B, N, 32, device=DEVICE)
    n_keys, dy = torch.tensor([33, 36], device=DEVICE), torch.randn(B, T, D, device=DEVICE)
    saved, results, weights = {}, {}, {p.data_ptr() for p in block.parameters()}

    def pack(t):
        if t.data_ptr() not in weights:
            saved[t.data_ptr()] = t.numel()
        return t

    for backend in ("triton", "naive"):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            kv = block.keys_values(audio)
            saved.clear()  # the audio, for to_kv
            y = block(x, kv, n_keys, backend)
        if backend == "triton":
            # q, o, gated o (2, 32); lse (2,); x and LN(x), its mean and deviation
            attention = 3 * 64 + 2 + 2 * D + 2
            # x and LN(x); before and after GELU; what the gate multiplies
            feed_forward = 2 * D + 2 + 2 * 4 * D + D
            others = B * N * 2 * 64 + B + 2  # k, v; n_keys; the two gates
            assert sum(saved.values()) <= B * T * (attention + feed_forward) + others
        results[backend] = [y, *torch.autograd.grad(y, [x, *block.parameters()], dy)]
    for ours, naive in zip(results["triton"], results["naive"]):
        torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("per_token", [False, True])
def test_saved_and_formed_memory(per_token, monkeypatch):
    B, T, N, H, d = 1, 128, 96, 2, 32
    q, kv, gate, dy = make_inputs(B, T, N, H, d)
    n_keys = torch.full((B, T) if per_token else (B,), 100, device=DEVICE)
    formed, saved = poison(monkeypatch), []

    def pack(x):
        saved.append((x.data_ptr(), x.numel() * x.element_size()))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = gated_cross_attention(q, *kv.unbind(2), n_keys, gate, "triton")
    floats = 2 * B * T * H * d + 2 * B * N * H * d + B * H * T  # q, o, k, v, lse
    needed = 4 * floats + n_keys.numel() * 8
    assert sum(dict(saved).values()) <= needed + 64  # and the gate
    torch.autograd.grad(y, (q, kv, gate), dy)
    assert max(formed) < B * H * T * N
    formed.clear()
    saved.clear()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        gated_cross_attention(q, *kv.unbind(2), n_keys, gate, "triton")
    assert not saved
    formed.clear()
    model.attend(q[:1], *kv[:1].unbind(2), n_keys[:1], gate.tanh())
    pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["auto", "naive", "sdpa", "triton"])
def test_torch_compile_whole_graph(backend):
    q, kv, gate, dy = make_inputs(2, 6, 40, 2, 32)
    n_keys = torch.tensor([3, 40], device=DEVICE)
    f = lambda q, kv, gate: gated_cross_attention(q, *kv.unbind(2), n_keys, gate, backend) * 2
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    gradients = lambda g: torch.autograd.grad(g(q, kv, gate), (q, kv, gate), dy)
    plain, ours = ([g(q, kv, gate), *gradients(g)] for g in (f, compiled))
    for a, b in zip(plain, ours, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(f(q, kv, gate), compiled(q, kv, gate))


def test_compile_takes_the_whole_block():
    torch.manual_seed(0)
    block = model.GatedCrossAttention(48, 32, heads=2, d=32).to(DEVICE)
    block.attn_gate.data.fill_(0.3)
    x, audio = torch.randn(2, 6, 48, device=DEVICE), torch.randn(2, 40, 32, device=DEVICE)
    n_keys = torch.tensor([3, 40], device=DEVICE)
    f = lambda x: block(x, block.keys_values(audio), n_keys, "triton")
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    gradients = lambda g: torch.autograd.grad(g(x).square().sum(), list(block.parameters()))
    plain, ours = ([g(x), *gradients(g)] for g in (f, compiled))
    for a, b in zip(plain, ours, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck():
    q, kv, gate, _ = make_inputs(2, 5, 20, 1, 32)
    k, v = kv.detach().unbind(2)
    for n_keys in (torch.tensor([3, 20]), torch.tensor([[3], [20]]).expand(2, 5)):
        arguments = (q, k.requires_grad_(), v.requires_grad_(), n_keys.to(DEVICE), gate.detach().tanh())
        torch.library.opcheck(model.attend_op, arguments)


def test_errors_name_what_was_expected():
    q, kv, gate, _ = make_inputs(2, 5, 20, 1, 32)
    k, v = kv.unbind(2)
    n_keys, double = torch.tensor([3, 20], device=DEVICE), [x.double() for x in (q, k, v)]
    for wrong, message in (
            (lambda: gated_cross_attention(q, k[:, :4], v, n_keys, gate), "expected q"),
            (lambda: gated_cross_attention(q, k.half(), v, n_keys, gate), "float16"),
            (lambda: gated_cross_attention(q, k, v, n_keys[:1], gate), "n_keys"),
            (lambda: gated_cross_attention(q, k, v, n_keys.float(), gate), "n_keys"),
            (lambda: gated_cross_attention(q, k, v, n_keys, gate, "cuda"), "attention_backend"),
            (lambda: gated_cross_attention(*double, n_keys, gate, "triton"), "float64")):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_pick_backend():
    name, reason = pick_backend(DEVICE)
    assert name in ("triton", "sdpa") and reason
    assert pick_backend(torch.device("cpu"))[0] == "sdpa"


def python(code):
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *code], cwd=HERE, env=inherited, check=False,
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_without_triton():
    """A machine without triton imports the module and attends with naive and sdpa."""
    python(["-c", """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
sys.modules["triton"] = None
import torch
from model import gated_cross_attention
q, n_keys, gate = torch.randn(1, 2, 1, 32), torch.tensor([2]), torch.ones(1)
a, b, c = (gated_cross_attention(q, q, q, n_keys, gate, name) for name in ("naive", "sdpa", "auto"))
torch.testing.assert_close(a, b)
torch.testing.assert_close(a, c)
try:
    gated_cross_attention(q, q, q, n_keys, gate, "triton")
except ValueError as error:
    assert "needs triton" in str(error)
else:
    raise AssertionError
"""])


@pytest.mark.slow
def test_every_kernel_compiles_ahead_of_time():
    """The bench's report. No spills, at most 99 KB of shared memory, 64 KB on an MI300."""
    rows = json.loads(python(["-c", "import json; from tools.bench.kernel import *; print(json.dumps(compile_all()))"]))
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert row["shared_bytes"] <= (64 if row["arch"] == "gfx942" else 99) * 1024, row
        if row["arch"] == "sm_90" and row["dtype"] == "torch.bfloat16" and row["kernel"] != "combine":
            assert row["wgmma"] and row["async_copies"], row  # Hopper's own matrix products


def test_an_unknown_bench_is_one_line():
    command = [sys.executable, "tools/bench.py", "kernels"]
    wrong = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "kernels" in wrong.stderr


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, N, per_token", [
    (512, 768, False), (512, 768, True), (100, 1920, False), (1, 1920, False)])
def test_full_size_on_gpu(dtype, T, N, per_token):
    q, kv, gate, dy = make_inputs(4, T, N, 8, 64, dtype)
    rng = torch.Generator().manual_seed(0)
    n_keys = torch.randint(0, N + 1, (4, T) if per_token else (4,), generator=rng).to(DEVICE)
    print(dtype, T, N, per_token, check_errors(q, kv, gate, dy, n_keys))
    twice = (run("triton", q, kv, gate, dy, n_keys) for _ in range(2))
    for a, b in zip(*twice, strict=True):
        assert torch.equal(a, b)


@on_gpu
def test_faster_than_naive_on_gpu():
    from tools.bench.kernel import time_backends
    rows = time_backends(DEVICE, torch.bfloat16, [(8, 256, 768), (1, 1, 1920)], ["naive", "sdpa", "triton"])
    for backward in (False, True):
        ms = {row["backend"]: row["ms"] for row in rows if row["T"] == 256 and row["backward"] == backward}
        naive, sdpa = (ms[backend] / ms["triton"] for backend in ("naive", "sdpa"))
        print(f"backward {backward}: {naive:.2f}x naive, {sdpa:.2f}x sdpa")
        assert ms["triton"] < ms["naive"]
