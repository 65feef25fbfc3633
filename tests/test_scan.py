"""selective_scan is selective_scan_loop, for every length, decay, dtype and gradient."""

import math
import shutil
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from vdm_ssm import S6, SelectiveScan, relative_error, selective_scan, selective_scan_loop, temporal_layer

CHUNK = SelectiveScan.CHUNK


def inputs(b=3, l=20, d=8, n=16, dt_range=(1e-4, 10), dtype=torch.float64, seed=0):
    """u, dt, A, B, C, D, initial_state with A = -1..-n and dt log-uniform."""
    torch.manual_seed(seed)
    dt = torch.empty(b, l, d, dtype=torch.float64).uniform_(*map(math.log, dt_range)).exp()
    A = -torch.arange(1.0, n + 1, dtype=torch.float64).repeat(d, 1)
    shapes = {"B": (b, l, n), "C": (b, l, n), "D": (d,), "initial_state": (b, d, n)}
    rest = [torch.randn(shape, dtype=torch.float64) for shape in shapes.values()]
    return [x.to(dtype) for x in (torch.randn(b, l, d, dtype=torch.float64), dt, A, *rest)]


def outputs_and_gradients(scan, args):
    """[y, last state, and the gradient of a fixed random loss for each argument]"""
    args = [x.detach().clone().requires_grad_() for x in args]
    y, state = scan(*args[:6], initial_state=args[6], return_last_state=True)
    generator = torch.Generator().manual_seed(1)
    dy, dstate = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (y, state))
    return [y, state, *torch.autograd.grad((y * dy).sum() + (state * dstate).sum(), args)]


def assert_scan_equals_loop(args, y_error, gradient_error):
    exact = outputs_and_gradients(selective_scan_loop, [x.double() for x in args])
    names = ["y", "last state", *"u dt A B C D initial_state".split()]
    for name, value, reference in zip(names, outputs_and_gradients(selective_scan, args), exact):
        bound = y_error if name in names[:2] else gradient_error
        assert torch.isfinite(value).all(), name
        assert relative_error(value, reference) <= bound, name


@pytest.mark.parametrize("l", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 1024])
@pytest.mark.parametrize("dt_range", [(1e-4, 1e-1), (1e-2, 10)], ids=["weak decay", "strong decay"])
def test_scan_equals_loop_at_any_length_and_decay(l, dt_range):
    args = inputs(l=l, dt_range=dt_range)
    assert_scan_equals_loop(args, 1e-13, 1e-13)
    assert_scan_equals_loop([x.float() for x in args], 5e-7, 1e-6)


def test_scan_equals_loop_when_rows_do_not_fill_their_tiles():
    n, d = 16, 1024  # a tile of 4 rows on a CPU
    assert_scan_equals_loop(inputs(b=6, l=CHUNK + 3, d=d, n=n, dtype=torch.float32), 5e-7, 1e-6)


def test_gradients_pass_gradcheck():
    args = [x.requires_grad_() for x in inputs(b=2, l=CHUNK + 2, d=2, n=3, dt_range=(0.05, 1))]
    torch.autograd.gradcheck(lambda *a: selective_scan(*a[:6], initial_state=a[6], return_last_state=True), args)


def test_no_nan_when_decay_underflows_and_a_zero_dt_changes_nothing():
    u, dt, A, B, C, D, state = inputs(l=40, dtype=torch.float32)
    dt[:, :20], dt[:, 20:] = 10, 0  # exp(dt A) from e^-10 to e^-160, then 1
    args = [u, dt, A, B, C, D, state]
    assert_scan_equals_loop(args, 5e-7, 1e-6)
    y, last = selective_scan(*args[:6], initial_state=state, return_last_state=True)
    _, middle = selective_scan(*(x[:, :20] for x in (u, dt)), A, B[:, :20], C[:, :20], D, state, True)
    assert torch.equal(last, middle)


def test_huge_inputs_stay_finite_and_linear():
    u, dt, A, B, C, D, _ = inputs(dtype=torch.float32)
    y, big = selective_scan(u, dt, A, B, C, D), selective_scan(u * 2.0**60, dt, A, B, C, D)
    assert torch.equal(big, y * 2.0**60)


@pytest.mark.parametrize("l", [1, CHUNK, 2 * CHUNK + 3])
def test_reverse_is_the_scan_between_two_flips(l):
    def between_flips(u, dt, A, B, C, D, initial_state, return_last_state):
        u, dt, B, C = (x.flip(1) for x in (u, dt, B, C))
        y, state = selective_scan(u, dt, A, B, C, D, initial_state, True)
        return y.flip(1), state

    args = inputs(l=l)
    in_reverse = outputs_and_gradients(lambda *a, **k: selective_scan(*a, **k, reverse=True), args)
    for value, reference in zip(in_reverse, outputs_and_gradients(between_flips, args)):
        assert relative_error(value, reference) < 1e-13


@pytest.mark.parametrize("cut", [1, CHUNK - 1, CHUNK, CHUNK + 5])
def test_a_sequence_in_two_pieces_with_carried_state_is_the_whole(cut):
    def in_pieces(u, dt, A, B, C, D, initial_state, return_last_state):
        head, tail = ([x[:, s] for x in (u, dt, B, C)] for s in (slice(0, cut), slice(cut, None)))
        y1, state = selective_scan(*head[:2], A, *head[2:], D, initial_state, True)
        y2, state = selective_scan(*tail[:2], A, *tail[2:], D, state, True)
        return torch.cat([y1, y2], 1), state

    args = inputs(l=2 * CHUNK + 7)
    for piece, whole in zip(outputs_and_gradients(in_pieces, args), outputs_and_gradients(selective_scan, args)):
        assert relative_error(piece, whole) < 1e-13


def test_bfloat16_inputs_lose_no_more_than_their_own_rounding():
    args = inputs(l=64, dt_range=(1e-3, 1), dtype=torch.bfloat16)
    args[2], args[5] = args[2].float(), args[5].float()
    y = selective_scan(*args[:6])
    exact = selective_scan_loop(*(x.double() for x in args[:6]))
    assert y.dtype == torch.bfloat16
    assert relative_error(y, exact) < 2 * relative_error(exact.bfloat16(), exact)


def test_autocast_does_not_touch_the_scan():
    args = [x.requires_grad_() for x in inputs(l=64, dtype=torch.float32)[:6]]
    plain = selective_scan(*args)
    gradients = torch.autograd.grad(plain.square().sum(), args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = selective_scan(*args)
        under = torch.autograd.grad(y.square().sum(), args)
    assert torch.equal(y, plain)
    for value, reference in zip(under, gradients):
        assert torch.equal(value, reference)


def test_empty_batch_expanded_and_transposed_inputs_work():
    u, dt, A, B, C, D, _ = inputs(dtype=torch.float32)
    assert selective_scan(u[:0], dt[:0], A, B[:0], C[:0], D).shape == (0, 20, 8)
    expanded = selective_scan(u, dt[:, :1].expand_as(dt), A, B[:1].expand_as(B), C.mT.contiguous().mT, D)
    copied = selective_scan(u, dt[:, :1].repeat(1, 20, 1), A, B[:1].repeat(3, 1, 1), C, D)
    assert torch.equal(expanded, copied)


def test_without_D_there_is_no_skip():
    u, dt, A, B, C, D, _ = inputs()
    assert torch.equal(selective_scan(u, dt, A, B, C), selective_scan(u, dt, A, B, C, 0 * D))


def test_second_derivative_raises_a_clear_error():
    args = [x.requires_grad_() for x in inputs()[:6]]
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(selective_scan(*args).sum(), args[0], create_graph=True)


def test_saved_memory_is_a_sixteenth_of_all_states():
    args = [x.requires_grad_() for x in inputs(b=4, l=16 * CHUNK, dtype=torch.float32)[:6]]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        selective_scan(*args)
    b, l, d, n = 4, 16 * CHUNK, 8, 16
    assert sum(kept) == b * l * d * n // CHUNK + sum(x.numel() for x in args)


def test_scan_runs_under_activation_checkpointing():
    args = [x.requires_grad_() for x in inputs(dtype=torch.float32)[:6]]
    y = checkpoint(selective_scan, *args, use_reentrant=False)
    assert torch.equal(y, selective_scan(*args))
    for value, reference in zip(*(torch.autograd.grad(x.sum(), args) for x in (y, selective_scan(*args)))):
        assert torch.equal(value, reference)


@pytest.mark.parametrize("layer", [S6(8), temporal_layer("bi-mamba")(8)], ids=["S6", "bi-mamba"])
def test_scan_runs_under_functional_call(layer):
    torch.manual_seed(0)
    u = torch.randn(2, 20, 8)
    parameters = {name: (2 * p).detach().requires_grad_() for name, p in layer.named_parameters()}
    y = torch.func.functional_call(layer, parameters, u)
    gradients = torch.autograd.grad(y.sum(), list(parameters.values()))
    layer.load_state_dict(parameters)
    for value, reference in zip(gradients, torch.autograd.grad(layer(u).sum(), list(layer.parameters()))):
        assert torch.equal(value, reference)


compiles = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="no C++ compiler")


@compiles
@pytest.mark.parametrize("b, l, d", [(2, 1, 4), (3, 5, 8), (3, 8, 8), (5, 27, 4)])
def test_compiled_scan_equals_the_plain_one(b, l, d):
    args = inputs(b=b, l=l, d=d, n=4, dtype=torch.float32)
    compiled = torch.compile(selective_scan)
    assert compiled(*(x.requires_grad_() for x in args[:6])).grad_fn.compiled
    for reverse in (False, True):
        both = [outputs_and_gradients(partial(f, reverse=reverse), args) for f in (compiled, selective_scan)]
        for value, reference in zip(*both):
            assert relative_error(value, reference) <= 1e-6


def test_compiled_blocks_are_those_of_the_definition_frame_by_frame():
    torch.manual_seed(0)  # the functions that torch.compile gets, without it
    ahead, back = SelectiveScan.ahead_fused, SelectiveScan.back_fused
    b, k, n, d = 3, 5, 4, 6
    shapes = [(b, n, d), (b, k, d), (b, k, d), (n, d), (b, k, n), (b, k, n), (d,), (b, k, d), (b, n, d)]
    state, u, dt, A, B, C, D, dy, carry = (torch.randn(s, dtype=torch.float64) for s in shapes)
    dt, A, block = dt.abs(), -A.abs(), (u, dt.abs(), B, C)
    inputs = [x.requires_grad_() for x in (state.mT.clone(), A.T.clone(), *(x.clone() for x in block))]
    y, last_state = selective_scan_loop(*inputs[2:4], inputs[1], *inputs[4:], D, inputs[0], return_last_state=True)
    found = ahead(state, *block, A, D)
    for value, reference in zip(found, (last_state.mT, y), strict=True):
        assert relative_error(value, reference) < 1e-14
    dstate, dA, *exact = torch.autograd.grad((y, last_state), inputs, (dy, carry.mT))
    parts = back(state, carry, *block, dy, A, D, slice(4)) + back(state, carry, *block, dy, A, D, slice(4, 6))
    for value, reference in zip(parts, (dstate.mT, dA.T, *exact), strict=True):
        assert relative_error(value, reference) < 1e-13


@compiles
def test_a_layer_in_a_compiled_model_computes_the_same():
    torch.manual_seed(0)
    layer, x = temporal_layer("bi-mamba", n=4)(4), torch.randn(3, 9, 4)
    both = []
    for function in (layer, torch.compile(layer)):
        y = function(x)
        both.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    for value, reference in zip(*both):
        assert relative_error(value, reference) < 1e-5
