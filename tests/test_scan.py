"""selective_scan is selective_scan_loop, for every length, decay, dtype and gradient."""

import math
import shutil
from functools import partial

import pytest
import torch

from vdm_ssm import SelectiveScan, relative_error, scan_in_chunks, selective_scan, selective_scan_loop
from vdm_ssm import temporal_layer

CHUNK = SelectiveScan.CHUNK


def inputs(b=3, l=20, d=8, n=16, dt_range=(1e-4, 10), dtype=torch.float64):
    """u, dt, A, B, C, D, initial_state with A = -1..-n and dt log-uniform."""
    torch.manual_seed(0)
    dt = torch.empty(b, l, d, dtype=torch.float64).uniform_(*map(math.log, dt_range)).exp()
    A = -torch.arange(1.0, n + 1, dtype=torch.float64).repeat(d, 1)
    shapes = (b, l, d), (b, l, n), (b, l, n), (d,), (b, d, n)
    u, *rest = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [x.to(dtype) for x in (u, dt, A, *rest)]


def with_gradients(scan, args):
    """[y, last state, and the gradient of a fixed random loss for each argument]"""
    args = [x.detach().clone().requires_grad_() for x in args]
    outputs = scan(*args, return_last_state=True)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, args, weights)]


def assert_same(scan, reference, args, bound, names="y state u dt A B C D initial_state"):
    """Outputs to half the bound, gradients to the bound."""
    exact = with_gradients(reference, [x.double() for x in args])
    for name, value, right in zip(names.split(), with_gradients(scan, args), exact, strict=True):
        assert torch.isfinite(value).all(), name
        assert relative_error(value, right) <= (bound / 2 if name in ("y", "state") else bound), name


def kept_bytes(function, *inputs):
    """What a function keeps for the backward pass, and its result."""
    kept = {}
    keep = lambda x: kept.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = function(*inputs)
    return sum(kept.values()), y


@pytest.mark.parametrize("l", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 200])
@pytest.mark.parametrize("dt_range", [(1e-4, 1e-1), (1e-2, 10)], ids=["weak decay", "strong decay"])
def test_scan_equals_loop_at_any_length_and_decay(l, dt_range):
    args = inputs(l=l, dt_range=dt_range)
    assert_same(selective_scan, selective_scan_loop, args, 1e-13)
    assert_same(selective_scan, selective_scan_loop, [x.float() for x in args], 1e-6)


def test_scan_equals_loop_for_more_rows_than_a_tile_of_a_cpu():
    args = inputs(b=3, l=CHUNK + 1, d=SelectiveScan.TILE // 32, dtype=torch.float32)
    assert_same(selective_scan, selective_scan_loop, args, 1e-6)


def between_flips(u, dt, A, B, C, D, initial_state, return_last_state):
    y, state = selective_scan(u.flip(1), dt.flip(1), A, B.flip(1), C.flip(1), D, initial_state, True)
    return y.flip(1), state


def in_pieces(u, dt, A, B, C, D, state, return_last_state):
    ys = []
    for u_k, dt_k, B_k, C_k in zip(*(x.split(CHUNK - 1, dim=1) for x in (u, dt, B, C))):
        y, state = selective_scan(u_k, dt_k, A, B_k, C_k, D, state, True)
        ys.append(y)
    return torch.cat(ys, 1), state


@pytest.mark.parametrize("l", [1, CHUNK, 2 * CHUNK + 3])
@pytest.mark.parametrize("scan, reference", [
    (lambda *args, return_last_state: scan_in_chunks(*args), selective_scan_loop),
    (partial(selective_scan, reverse=True), between_flips), (in_pieces, selective_scan),
], ids=["recomputed chunks", "reverse", "pieces"])  # fmt: skip
def test_recomputed_chunks_reverse_and_pieces_with_carried_state_are_the_scan(scan, reference, l):
    assert_same(scan, reference, inputs(l=l), 1e-13)


def test_a_zero_dt_changes_nothing_and_decay_to_nothing_is_exact_also_for_huge_inputs():
    u, dt, A, B, C, D, state = args = inputs(l=40, dtype=torch.float32)
    dt[:, :20], dt[:, 20:] = 10, 0  # exp(dt A) from e^-10 to e^-160, then 1
    assert_same(selective_scan, selective_scan_loop, args, 1e-6)
    _, last = selective_scan(*args, return_last_state=True)
    _, middle = selective_scan(*(x[:, :20] for x in (u, dt)), A, B[:, :20], C[:, :20], D, state, True)
    assert torch.equal(last, middle)
    rest = dt, A, B, C, D
    assert torch.equal(selective_scan(u * 2.0**60, *rest), selective_scan(u, *rest) * 2.0**60)


@pytest.mark.parametrize("l", [1, 64])
def test_bfloat16_inputs_lose_no_more_than_their_own_rounding(l):
    args = inputs(l=l, dt_range=(1e-3, 1), dtype=torch.bfloat16)
    y, state = selective_scan(*args, return_last_state=True)
    exact = selective_scan_loop(*(x.double() for x in args))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(y, exact) < 2 * relative_error(exact.bfloat16(), exact)


def test_autocast_does_not_touch_the_scan():
    args = inputs(l=64, dtype=torch.float32)
    plain = with_gradients(selective_scan, args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, with_gradients(selective_scan, args), plain))


def test_empty_batch_expanded_and_transposed_inputs_and_none_of_D_work():
    u, dt, A, B, C, D, _ = inputs(dtype=torch.float32)
    assert selective_scan(u[:0], dt[:0], A, B[:0], C[:0], D).shape == (0, 20, 8)
    expanded = selective_scan(u, dt[:, :1].expand_as(dt), A, B[:1].expand_as(B), C.mT.contiguous().mT, D)
    copied = selective_scan(u, dt[:, :1].repeat(1, 20, 1), A, B[:1].repeat(3, 1, 1), C, D)
    assert torch.equal(expanded, copied)
    assert torch.equal(selective_scan(u, dt, A, B, C), selective_scan(u, dt, A, B, C, 0 * D))


def test_the_loop_is_the_way_out_for_second_derivatives_vmap_and_grad():
    u, *rest, _ = (x.requires_grad_() for x in inputs(b=2, l=3, d=1, n=2, dt_range=(0.05, 1)))
    with pytest.raises(RuntimeError, match="differentiated once.*selective_scan_loop"):
        torch.autograd.grad(selective_scan(u, *rest).sum(), u, create_graph=True)
    torch.autograd.gradgradcheck(selective_scan_loop, (u, *rest))
    dt, A, B, C, D = rest
    loss = lambda u, dt, B, C: selective_scan_loop(u[None], dt[None], A, B[None], C[None], D).square().sum()
    by_rows = torch.func.vmap(torch.func.grad(loss))(u, dt, B, C)
    at_once, = torch.autograd.grad(selective_scan(u, *rest).square().sum(), u)
    assert relative_error(by_rows, at_once) < 1e-13


def test_one_state_in_sixteen_is_kept_and_the_inputs():
    b, l, d, n = 4, 16 * CHUNK, 8, 16
    args = [x.requires_grad_() for x in inputs(b, l, d, n)[:6]]
    kept, _ = kept_bytes(selective_scan, *args)
    assert kept <= 8 * (b * l * d * n / 16 + sum(x.numel() for x in args))


compiler = any(map(shutil.which, ("c++", "g++", "clang++", "cl")))
compiles = pytest.mark.skipif(not compiler, reason="no C++ compiler")


@compiles
@pytest.mark.parametrize("reverse", [False, True])
def test_compiled_scan_equals_the_loop_also_with_a_short_last_chunk(monkeypatch, reverse):
    monkeypatch.setattr(SelectiveScan, "CHUNK_COMPILED", 2)
    scan, plain = (partial(f, reverse=reverse) for f in (torch.compile(selective_scan), selective_scan))
    assert_same(scan, plain, inputs(l=5, d=4, n=4, dtype=torch.float32), 1e-6)


@compiles
def test_a_layer_in_a_compiled_model_computes_the_same(monkeypatch):
    monkeypatch.setattr(SelectiveScan, "CHUNK_COMPILED", 2)  # which compiles sooner than 8 frames
    torch.manual_seed(0)
    layer, x, both = temporal_layer("bi-mamba", n=4)(2), torch.randn(3, 5, 2), []
    for function in (layer, torch.compile(layer, backend="aot_eager")):
        y = function(x)
        both.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    assert all(relative_error(value, right) < 1e-5 for value, right in zip(*both))
