"""Every temporal layer is what the papers say, and equal to its own definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vdm_ssm import S4D, S6, TEMPORAL_LAYERS, RelativeBias, RotaryEmbedding, relative_error, temporal_layer

every_layer = pytest.mark.parametrize("name", TEMPORAL_LAYERS)


def make(name, d=16):
    torch.manual_seed(0)
    return temporal_layer(name, heads=2)(d)


def silent_owners(model, *inputs):
    """Names of the modules with a weight of their own whose forward hook does not fire in a forward pass."""
    owners = {m: name for name, m in model.named_modules() if list(m.parameters(recurse=False))}
    assert owners
    for module in list(owners):
        module.register_forward_hook(lambda module, *_: owners.pop(module, None) and None)
    model(*inputs)
    return list(owners.values())


@every_layer
def test_every_layer_keeps_the_shape_calls_its_modules_and_sends_gradients_everywhere(name):
    assert silent_owners(make(name), torch.randn(2, 5, 16)) == []
    for l in (1, 5, 33):
        layer, x = make(name), torch.randn(3, l, 16, requires_grad=True)
        y = layer(x)
        assert y.shape == x.shape
        y.square().sum().backward()
        parameters = [p for p in layer.parameters() if p.requires_grad and l > 1]
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (x, *parameters))


@every_layer
def test_layers_named_bi_and_attention_see_the_future_and_the_others_do_not(name):
    layer, x = make(name).double(), torch.randn(2, 12, 16, dtype=torch.float64)
    changed = x.clone()
    changed[:, 7] += 1
    moved = (layer(changed) - layer(x)).abs().amax((0, 2)) > 1e-12
    assert moved[7:].any()
    assert moved[:7].all() == (name.startswith("bi-") or "attention" in name)


@pytest.mark.parametrize("name", [name for name in TEMPORAL_LAYERS if name.startswith("bi-")])
def test_a_bidirectional_layer_with_equal_ways_commutes_with_time_reversal(name):
    layer, x = make(name).double(), torch.randn(2, 11, 16, dtype=torch.float64)
    state = layer.state_dict()
    for key in state:
        if key.startswith("back"):
            state[key].copy_(state[key.replace("back", "ahead", 1)])
    if "fc1.weight" in state:  # concatenation: the two halves of the MLP's input must be equal too
        half = state["fc1.weight"].shape[1] // 2
        state["fc1.weight"][:, half:] = state["fc1.weight"][:, :half]
    assert relative_error(layer(x.flip(1)), layer(x).flip(1)) < 1e-12


@every_layer
def test_rows_do_not_see_each_other_and_may_be_none(name):
    layer, x = make(name).double(), torch.randn(4, 9, 16, dtype=torch.float64, requires_grad=True)
    assert relative_error(layer(x)[2:3], layer(x[2:3])) < 1e-12
    y = layer(x[:0])
    y.sum().backward()
    assert y.shape == (0, 9, 16) and x.grad.abs().max() == 0


@every_layer
@pytest.mark.parametrize("l", [4, 40])
def test_16_bit_layers_compute_nearly_the_same(name, l):
    layer, x = make(name), torch.randn(3, l, 16)
    y = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(layer(x), y) < 0.05
    for dtype in (torch.bfloat16, torch.float16):
        rounded = make(name).to(dtype)(x.to(dtype))
        assert rounded.dtype == dtype and relative_error(rounded, y) < 0.05


@pytest.mark.parametrize("name, place", [
    ("bi-mamba", "in_proj"), ("bi-mamba", "ahead.dt_proj"), ("bi-mamba", "out_proj"), ("bi-s4d", "back_proj"),
    ("bi-s6-mlp", "back.x_proj"), ("attention", "to_qkv"), ("linear-attention", "to_qkv"),
])  # fmt: skip
def test_an_adapter_of_low_rank_acts_as_its_product_added_to_the_weight(name, place):
    adapted, merged, x = make(name), make(name), torch.randn(2, 5, 16)
    linear = adapted.get_submodule(place)
    down, up = nn.Linear(linear.in_features, 2, bias=False), nn.Linear(2, linear.out_features, bias=False)
    adapted.set_submodule(place, nn.Sequential(down, up))  # which has no weight that a layer could read
    adapted.get_submodule(place).register_forward_hook(lambda _, inputs, y: y + linear(*inputs))
    with torch.no_grad():
        merged.get_submodule(place).weight += up.weight @ down.weight
    assert relative_error(adapted(x), merged(x)) < 1e-5


@pytest.mark.parametrize("core", [S4D, S6])
@pytest.mark.parametrize("l", [1, 2, 33, 200])
def test_all_frames_at_once_equal_the_recurrence_step_by_step(core, l):
    torch.manual_seed(0)
    layer, u = core(6, n=8).double(), torch.randn(2, l, 6, dtype=torch.float64)
    found, states = layer(u), {}
    ys = torch.cat([layer(u_k, states=states) for u_k in u.split(1, dim=1)], dim=1)
    assert relative_error(found, ys) < 1e-12
    both = (torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (found, ys))
    assert all((value - right).norm() <= 1e-10 * right.norm() for value, right in zip(*both))


def test_autocast_does_not_touch_s4d():
    torch.manual_seed(0)
    layer, u = S4D(6), torch.randn(2, 9, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(u)
    assert torch.equal(y, layer(u)) and layer(u.bfloat16()).dtype == torch.bfloat16


def test_s4d_kernel_in_float32_is_exact_also_for_small_steps():
    torch.manual_seed(0)
    layer = S4D(8, n=32, dt_min=1e-4, dt_max=1e-3)
    single = layer.kernel(300)
    assert relative_error(single, layer.double().kernel(300)) < 5e-8


def test_cores_start_as_s4d_lin_and_mamba_do():
    torch.manual_seed(0)
    s4d, s6 = S4D(4096, n=8), S6(64, n=16)
    for dt in (s4d.log_dt.exp(), F.softplus(s6.dt_proj.bias)):  # log-uniform
        assert 0.999e-3 <= dt.min() and dt.max() <= 1.001e-1 and dt.log().std() > 1
    assert torch.allclose(s4d.A_imag, math.pi * torch.arange(4.0)) and (s4d.log_A_real == -math.log(2)).all()
    assert abs(s4d.C.std() - math.sqrt(0.5)) < 0.01 and abs(s4d.D.std() - 1) < 0.05
    assert torch.allclose(s6.A_log.exp(), torch.arange(1.0, 17.0)) and torch.equal(s6.D, torch.ones(64))
    assert s6.dt_proj.weight.abs().max() <= 0.5  # rank 4


def test_relative_bias_has_the_buckets_of_t5():
    after = [*range(17, 25), *[24, 25, 25, 26, 26, 27, 27, 28, 28, 28, 28, 29, 29, 29], *[30] * 4, *[31] * 13]
    table, before = RelativeBias(heads=1), [i - 16 for i in reversed(after)]
    assert table.bucket(torch.arange(-39, 40)).tolist() == [*before, 0, *after]
    bias = table(5)[0]  # (query, key)
    assert bias[1, 3] == table.table.weight[18, 0] and bias[3, 1] == table.table.weight[2, 0]


def test_rotary_products_depend_on_the_distance_only():
    rotary = RotaryEmbedding(32).double()
    q, k = (torch.randn(64, dtype=torch.float64).expand(10, 64) for _ in range(2))
    scores = rotary(q) @ rotary(k).T
    assert torch.allclose(scores[1:, 1:], scores[:-1, :-1], rtol=1e-10)
