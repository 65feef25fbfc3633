"""Every temporal layer is what the papers say, and equal to its own definition."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vdm_ssm
from vdm_ssm import S4D, S6, TEMPORAL_LAYERS, relative_error, temporal_layer

SSM_LAYERS = [name for name in TEMPORAL_LAYERS if "attention" not in name]


def make(name, d=16):
    torch.manual_seed(0)
    return temporal_layer(name, heads=2)(d)


@pytest.mark.parametrize("name", TEMPORAL_LAYERS)
@pytest.mark.parametrize("l", [1, 5, 33])
def test_every_layer_keeps_the_shape_and_sends_gradients_everywhere(name, l):
    layer, x = make(name), torch.randn(3, l, 16, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert x.grad.abs().sum() > 0
    if l > 1:
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", TEMPORAL_LAYERS)
def test_layers_named_bi_and_attention_see_the_future_and_the_others_do_not(name):
    layer, x = make(name).double(), torch.randn(2, 12, 16, dtype=torch.float64)
    changed = x.clone()
    changed[:, 7] += 1
    moved = (layer(changed) - layer(x)).abs().amax((0, 2)) > 1e-12
    assert moved[7:].any()
    assert moved[:7].all() == (name.startswith("bi-") or "attention" in name)


@pytest.mark.parametrize("name", [name for name in TEMPORAL_LAYERS if name.startswith("bi-")])
def test_bidirectional_layer_with_equal_ways_commutes_with_time_reversal(name):
    layer, x = make(name).double(), torch.randn(2, 11, 16, dtype=torch.float64)
    state = layer.state_dict()
    for key in state:
        if key.startswith("back"):
            state[key].copy_(state[key.replace("back", "ahead", 1)])
    if "fc1.weight" in state:  # concatenation: the two halves of the MLP's input must be equal too
        half = state["fc1.weight"].shape[1] // 2
        state["fc1.weight"][:, half:] = state["fc1.weight"][:, :half]
    assert relative_error(layer(x.flip(1)), layer(x).flip(1)) < 1e-12


@pytest.mark.parametrize("name", TEMPORAL_LAYERS)
def test_rows_do_not_see_each_other(name):
    layer, x = make(name).double(), torch.randn(4, 9, 16, dtype=torch.float64)
    assert relative_error(layer(x)[2:3], layer(x[2:3])) < 1e-12


def test_unknown_name_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'mamba2'.*bi-mamba"):
        temporal_layer("mamba2")


# ---- S4D


def s4d_with_known_parameters():
    rng = np.random.RandomState(0)
    layer = S4D(3, n=8).double()
    draws = {
        "log_dt": rng.uniform(math.log(1e-3), math.log(1e-1), 3),
        "C": rng.standard_normal((3, 4, 2)),
        "log_A_real": math.log(0.5) + 0.3 * rng.standard_normal((3, 4)),
        "A_imag": math.pi * np.arange(4) + 0.3 * rng.standard_normal((3, 4)),
        "D": rng.standard_normal(3),
    }
    layer.load_state_dict({name: torch.from_numpy(value) for name, value in draws.items()})
    return layer, torch.from_numpy(rng.standard_normal((1, 7, 3)))


def test_s4d_gives_the_official_numbers():
    layer, u = s4d_with_known_parameters()
    K = [[0.01558898244, 0.01111442963, 0.005814333655, -0.0002425986393, -0.006979944332, -0.0143145778, -0.02215774566],
         [-0.0614303618, -0.07001409287, -0.07408568697, -0.07385919652, -0.0697679758, -0.06243196264, -0.05261482415],
         [-0.06940808911, -0.07273299932, -0.07555770005, -0.07785512351, -0.07960514902, -0.08079457112, -0.08141696564]]  # fmt: skip
    assert torch.allclose(layer.kernel(7), torch.tensor(K, dtype=torch.float64), rtol=1e-8, atol=1e-12)
    assert torch.allclose(layer(u)[0, 6], torch.tensor([1.081081635, -0.170371706, -0.2387241464]).double(), atol=1e-8)


@pytest.mark.parametrize("l", [1, 2, 7, 32, 33, 100, 1000])
def test_s4d_convolution_equals_recurrence(l):
    torch.manual_seed(0)
    layer, u = S4D(6, n=16).double(), torch.randn(2, l, 6, dtype=torch.float64)
    state, ys = layer.initial_state(2), []
    for u_k in u.unbind(1):
        y_k, state = layer.step(u_k, state)
        ys.append(y_k)
    assert relative_error(layer(u), torch.stack(ys, 1)) < 1e-12


@pytest.mark.parametrize("core", [S4D, S6, vdm_ssm.CausalConv])
@pytest.mark.parametrize("l", [1, 9, 32, 33])
def test_reverse_is_the_core_between_two_flips(core, l):
    torch.manual_seed(0)
    layer, u = core(6).double(), torch.randn(2, l, 6, dtype=torch.float64)
    assert relative_error(layer(u, reverse=True), layer(u.flip(1)).flip(1)) < 1e-12


def outputs_and_gradients(layer, function, *inputs):
    """Outputs of a function, and the gradient of a fixed random loss for inputs and parameters."""
    outputs = function(*inputs)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs]
    loss = sum((y * w).sum().real + (y * w).sum().imag if y.is_complex() else (y * w).sum()
               for y, w in zip(outputs, weights))  # fmt: skip
    return [*outputs, *torch.autograd.grad(loss, [*inputs, *layer.parameters()])]


@pytest.mark.parametrize("core", [S4D, S6])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("l, cut", [(9, 1), (40, 17), (100, 60)])
def test_a_sequence_in_two_pieces_with_carried_state_is_the_whole(core, reverse, l, cut):
    torch.manual_seed(0)
    layer, u = core(6).double(), torch.randn(2, l, 6, dtype=torch.float64, requires_grad=True)
    start = torch.randn(2, 6, layer.initial_state(2).shape[-1], dtype=layer.initial_state(1).dtype, requires_grad=True)
    options = dict(reverse=reverse, return_last_state=True)

    def whole(u, state):
        return layer(u, initial_state=state, **options)

    def in_pieces(u, state):
        pieces, ys = [u[:, :cut], u[:, cut:]], []
        for piece in reversed(pieces) if reverse else pieces:
            y, state = layer(piece, initial_state=state, **options)
            ys.append(y)
        return torch.cat(ys[::-1] if reverse else ys, dim=1), state

    exact = outputs_and_gradients(layer, whole, u, start)
    for value, reference in zip(outputs_and_gradients(layer, in_pieces, u, start), exact):
        assert (value - reference).norm() <= 1e-12 * reference.norm()


@pytest.mark.parametrize("reverse", [False, True])
def test_fft_convolution_is_the_sum_that_defines_it(reverse):
    torch.manual_seed(0)
    u, K = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 7, 2), (2, 7)))
    y = vdm_ssm.FFTConvolution.apply(u, K, reverse)
    ways = [(i, j) for i in range(7) for j in range(7) if (j >= i if reverse else j <= i)]
    for i in range(7):
        direct = sum(K[:, abs(i - j)] * u[:, j] for k, j in ways if k == i)
        assert torch.allclose(y[:, i], direct, atol=1e-12)
    torch.autograd.gradcheck(lambda u, K: vdm_ssm.FFTConvolution.apply(u, K, reverse), (u, K))


def test_fft_convolution_in_tiles_is_the_whole():
    torch.manual_seed(0)
    u, K = torch.randn(70, 64, 128, requires_grad=True), torch.randn(128, 64, requires_grad=True)
    tiles = vdm_ssm.FFTConvolution.tiles(u)
    assert [len(x) for (x,) in tiles] == [32, 32, 6]
    y = vdm_ssm.FFTConvolution.apply(u, K, False)
    by_hand = torch.cat([vdm_ssm.FFTConvolution.apply(x, K, False) for (x,) in tiles])
    assert torch.equal(y, by_hand)
    for value, reference in zip(*(torch.autograd.grad(x.square().sum(), (u, K)) for x in (y, by_hand))):
        assert relative_error(value, reference) < 1e-6
    assert vdm_ssm.FFTConvolution.apply(u[:0], K, False).shape == (0, 64, 128)


def test_s4d_kernel_in_float32_is_exact_also_for_small_steps():
    torch.manual_seed(0)
    layer = S4D(8, n=32, dt_min=1e-4, dt_max=1e-3)
    single = layer.kernel(300)
    assert relative_error(single, layer.double().kernel(300)) < 5e-8


def test_s4d_kernel_of_one_mode_is_the_closed_form():
    layer = S4D(1, n=2).double()
    with torch.no_grad():  # A = -a, C = 1, dt: K_k = 2 exp(-a dt k) (1 - exp(-a dt)) / a
        layer.log_A_real.fill_(math.log(0.7)), layer.A_imag.zero_(), layer.log_dt.fill_(math.log(0.3))
        layer.C.copy_(torch.tensor([1.0, 0.0]))
    k = torch.arange(20, dtype=torch.float64)
    closed = 2 * torch.exp(-0.21 * k) * (1 - math.exp(-0.21)) / 0.7
    assert torch.allclose(layer.kernel(20)[0], closed, rtol=1e-12)


@pytest.mark.parametrize("l", [9, 65])
def test_autocast_does_not_touch_s4d(l):
    torch.manual_seed(0)
    layer, u = S4D(6), torch.randn(2, l, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(u)
    assert torch.equal(y, layer(u)) and layer(u.bfloat16()).dtype == torch.bfloat16


def test_s4d_starts_as_s4d_lin():
    torch.manual_seed(0)
    layer = S4D(4096, n=8)
    assert torch.allclose(layer.A_imag[0], math.pi * torch.arange(4.0))
    assert torch.allclose(layer.log_A_real.exp(), torch.tensor(0.5))
    assert 1e-3 <= layer.log_dt.exp().min() and layer.log_dt.exp().max() <= 1e-1
    assert abs(layer.C.std() - math.sqrt(0.5)) < 0.01 and abs(layer.D.std() - 1) < 0.05


# ---- S6


def test_s6_gives_the_official_numbers():
    rng = np.random.RandomState(0)
    layer = S6(3, n=4).double()
    names = {"A_log": (3, 4), "D": (3,), "x_proj.weight": (9, 3), "dt_proj.weight": (3, 1), "dt_proj.bias": (3,)}
    layer.load_state_dict({k: torch.from_numpy(0.5 * rng.standard_normal(s)) for k, s in names.items()})
    u = torch.from_numpy(rng.standard_normal((1, 5, 3)))
    y = [[-1.462357102, -0.06299194585, -0.8185088401], [0.05647610761, 0.09788200431, 0.3266553492],
         [0.09491940511, -0.07542792407, -0.1412200239], [-0.01903535294, 0.1613735047, 0.08935720197],
         [-0.1813670593, 0.2708808491, 0.03231691948]]  # fmt: skip
    assert torch.allclose(layer(u)[0], torch.tensor(y, dtype=torch.float64), rtol=1e-8)


def test_s6_scan_equals_step_by_step():
    torch.manual_seed(0)
    layer, u = S6(32), torch.randn(2, 40, 32)
    state, ys = layer.initial_state(2), []
    for u_k in u.unbind(1):
        y_k, state = layer.step(u_k, state)
        ys.append(y_k)
    assert relative_error(layer(u), torch.stack(ys, 1)) < 1e-6


def test_s6_starts_as_mamba_does():
    torch.manual_seed(0)
    layer = S6(64, n=16)
    dt = F.softplus(layer.dt_proj.bias)
    assert layer.rank == 4 and layer.x_proj.weight.shape == (4 + 32, 64) and layer.x_proj.bias is None
    assert torch.allclose(layer.A_log.exp(), torch.arange(1.0, 17.0).expand(64, 16), rtol=1e-6)
    assert torch.equal(layer.D, torch.ones(64))
    assert 1e-3 <= dt.min() + 1e-6 and dt.max() <= 1e-1 + 1e-6 and dt.log().std() > 1
    assert layer.dt_proj.weight.abs().max() <= 0.5


def test_rank_is_a_sixteenth_of_the_width_that_the_core_sees():
    assert temporal_layer("bi-mamba")(64).ahead.rank == 8 and temporal_layer("bi-s6-glu")(64).ahead.core.rank == 4


def test_causal_conv_is_silu_of_a_padded_depthwise_conv1d():
    torch.manual_seed(0)
    conv, u = vdm_ssm.CausalConv(6), torch.randn(2, 9, 6)
    padded = F.pad(u.mT, (3, 0))
    assert torch.allclose(conv(u), F.silu(F.conv1d(padded, conv.weight, conv.bias, groups=6).mT), atol=1e-6)


# ---- Attention


def test_relative_bias_has_the_buckets_of_t5():
    after = [17, 18, 19, 20, 21, 22, 23, 24, 24, 25, 25, 26, 26, 27, 27, 28, 28, 28, 28, 29, 29, 29] + [30] * 4 + [31] * 13
    before = [i - 16 for i in after]
    table = vdm_ssm.RelativeBias(heads=1)
    assert table.bucket(torch.arange(-39, 40)).tolist() == before[::-1] + [0] + after
    bias = table(5)[0]  # (query, key)
    assert bias[1, 3] == table.table.weight[18, 0] and bias[3, 1] == table.table.weight[2, 0]


def test_rotary_embedding_turns_adjacent_pairs_and_leaves_the_rest():
    x = torch.zeros(2, 64)
    x[1, 0] = x[1, 2] = x[1, 40] = 1
    y = vdm_ssm.RotaryEmbedding(32)(x)[1]
    assert torch.allclose(y[:2], torch.tensor([0.540302, 0.841471]), atol=1e-6)
    assert torch.allclose(y[2:4], torch.tensor([0.846009, 0.533168]), atol=1e-6)
    assert y[40] == 1 and y[32:].sum() == 1


def test_rotary_products_depend_on_the_distance_only():
    rotary = vdm_ssm.RotaryEmbedding(32).double()
    q, k = (torch.randn(64, dtype=torch.float64).expand(10, 64) for _ in range(2))
    scores = rotary(q) @ rotary(k).T
    for offset in range(-9, 10):
        diagonal = scores.diagonal(offset)
        assert torch.allclose(diagonal, diagonal[:1], rtol=1e-10)


def test_attention_is_softmax_of_explicit_scores():
    layer, x = make("attention").double(), torch.randn(3, 7, 16, dtype=torch.float64)
    q, k, v = layer.to_qkv(x).unflatten(-1, (3, 2, 64)).permute(2, 0, 3, 1, 4)
    scores = layer.rotary(q * 64**-0.5) @ layer.rotary(k).mT + layer.bias(7)
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert relative_error(layer(x), layer.to_out(y)) < 1e-12


def test_linear_attention_is_linear_in_values_and_normalises_keys_over_frames():
    layer = make("linear-attention").double()
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    q, k, v = layer.to_qkv(x).unflatten(-1, (3, 2, 64)).permute(2, 0, 3, 1, 4)
    weights = layer.rotary(q).softmax(-1) @ layer.rotary(k).softmax(-2).mT * 64**-0.5  # (b, heads, l, l)
    assert relative_error(layer(x), layer.to_out((weights @ v).transpose(1, 2).flatten(2))) < 1e-12


@pytest.mark.parametrize("name", ["attention", "linear-attention"])
def test_attention_in_tiles_is_attention(name, monkeypatch):
    layer, x, seen = make(name), torch.randn(50, 20, 16), []
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr(vdm_ssm, "rows_in", lambda tile, row, device: 12)
    weights = {k: (2 * p).detach().requires_grad_(p.requires_grad) for k, p in layer.named_parameters()}
    y = torch.func.functional_call(layer, weights, x)  # whose weights must be the ones that are differentiated
    wanted = [p for p in weights.values() if p.requires_grad]
    gradients = torch.autograd.grad(y.square().mean(), wanted)
    assert seen == [50, 12, 12, 12, 12, 2, 2, 12, 12, 12, 12]  # and again, from the last on, in the backward pass
    layer.load_state_dict(weights)
    plain = torch.cat([layer(some) for some in x.split(25)])  # not more than four tiles
    assert seen[11:] == [25, 25]
    assert relative_error(y, plain) < 1e-6
    reference = torch.autograd.grad(plain.square().mean(), [p for p in layer.parameters() if p.requires_grad])
    for value, other in zip(gradients, reference):
        assert relative_error(value, other) < 1e-5


def test_layers_of_one_maker_share_their_position_tables():
    maker = temporal_layer("attention")
    assert maker(16).bias is maker(32).bias and maker(16).rotary is maker(32).rotary


@pytest.mark.parametrize("name", ["attention", "linear-attention", "bi-s4d", "bi-mamba"])
def test_gradients_lie_in_memory_as_their_weights_do(name):  # else DistributedDataParallel copies them, and warns
    layer = make(name)
    layer(torch.randn(3, 7, 16)).sum().backward()
    assert all(p.grad.stride() == p.stride() for p in layer.parameters() if p.grad is not None)
