"""Conditions: the official network's, dropped in training, exaggerated in sampling."""

import numpy as np
import pytest
import torch
from test_diffusion import around
from test_dim import COND, NETWORKS, T, X, both_networks
from test_unet import assert_official

from vdm_ssm import GaussianDiffusion, UNet3D, ddim, dpm_solver

# Output of the official model (bi-mamba, dim 8, 2 heads, cond_dim 5) as in test_unet.py.
WITH_CONDITION = (0.72162, 0.72200, 0.29855, 3.03884, -0.45669, 129.697)
WITHOUT_CONDITION = (0.65435, 0.87517, 0.48862, 3.38646, -0.46015, 138.0454)


def test_a_condition_of_5_adds_the_official_number_of_parameters():
    with torch.device("meta"):
        plain, conditional = (sum(p.numel() for p in UNet3D(cond_dim=k).parameters()) for k in (None, 5))
    assert conditional - plain == 19845  # the null vector, and 5 inputs more for all scales and shifts


def test_conditional_output_is_the_official_one_for_the_same_weights():
    cond = torch.from_numpy(np.random.RandomState(2).standard_normal((2, 5))).float()
    model = NETWORKS["unet"](cond_dim=5)
    assert_official(model, WITH_CONDITION, cond)
    assert_official(model, WITHOUT_CONDITION)


@both_networks
def test_the_null_vector_stands_for_a_condition_that_is_not_kept(name):
    model = NETWORKS[name](cond_dim=5).double()
    x, cond = X.double(), COND.double()
    given, none, null = model(x, T, cond), model(x, T), model.condition.null.expand(2, -1)
    assert torch.equal(model(x, T, null), none)
    assert torch.equal(model(x, T, cond, torch.tensor([True, True])), given)
    mixed = model(x, T, cond, torch.tensor([True, False]))
    assert torch.allclose(mixed[0], given[0], atol=1e-12) and torch.allclose(mixed[1], none[1], atol=1e-12)
    assert (given - none).abs().amax(dim=(1, 2, 3, 4)).min() > 1e-3
    given.sum().backward()
    assert model.condition.null.grad.abs().max() == 0  # part of the graph: DistributedDataParallel waits


@both_networks
def test_unfit_conditions_are_refused(name):
    for cond in (torch.zeros(2, 4), torch.zeros(1, 5), torch.zeros(5)):
        with pytest.raises(ValueError, match=r"\(2, 5\)"):
            NETWORKS[name](cond_dim=5)(X, T, cond)
    with pytest.raises(ValueError, match="cond_dim"):
        NETWORKS[name]()(X, T, COND)


def test_training_hides_one_condition_in_ten_or_those_it_is_told_to():
    torch.manual_seed(0)
    kept, model = [], lambda x, t, cond, keep: kept.append(keep) or torch.zeros_like(x)
    d, x0, mine = GaussianDiffusion(model), torch.zeros(20_000, 1, 1, 1, 1), torch.rand(20_000) < 0.3
    for keep in (None, mine):
        d.loss(x0, cond=torch.ones(20_000, 2), keep=keep)
    assert 0.89 <= kept[0].float().mean() <= 0.91 and torch.equal(kept[1], mine)


@both_networks
def test_guidance_1_is_the_conditional_model_and_0_the_unconditional_one(name):
    """Exactly, and for the price of one evaluation a step."""
    model, calls = NETWORKS[name](cond_dim=5), []
    d = GaussianDiffusion(lambda *args: calls.append(len(args)) or model(*args), steps=20, target="v")
    plain = GaussianDiffusion(lambda x, t: model(x, t, COND), steps=20, target="v")
    for sampler in (ddim, dpm_solver):
        calls.clear()
        assert torch.equal(d.sample(X, 3, sampler, COND), plain.sample(X, 3, sampler))
        assert torch.equal(d.sample(X, 3, sampler, COND, guidance=0), d.sample(X, 3, sampler))
        assert calls == [3] * 3 + [2] * 6
    assert not torch.equal(d.sample(X, 3, ddim, COND, guidance=2), d.sample(X, 3, ddim, COND))


@pytest.mark.parametrize("target", ["eps", "v", "x0"])
@pytest.mark.parametrize("sampler", [ddim, dpm_solver])
def test_on_gaussian_classes_the_guided_mean_is_on_the_line_through_both_means(target, sampler):
    """Classes N(1, 0.2^2) and N(-0.5, 0.2^2), without a label N(0.25, 0.2^2): all moved by guidance alone."""
    def best(x, signal, noise, cond=None):
        mean = 0.25 if cond is None else (cond @ cond.new_tensor([1.0, -0.5])).view(-1, 1, 1, 1, 1)
        return mean + signal * 0.04 / (signal**2 * 0.04 + noise**2) * (x - signal * mean)

    d = around(best, target).double()
    cond, noise = torch.eye(2).double().repeat(2, 1), torch.tensor([0, 0, 1, 1]).double().view(4, 1, 1, 1, 1)
    for g in (0, 0.5, 1, 3):
        y = d.sample(noise, 100, sampler, cond, guidance=g).flatten()
        assert torch.allclose(y[:2], 0.25 + g * torch.tensor([0.75, -0.75]).double(), atol=1e-3)
        assert torch.allclose(y[2:] - y[:2], torch.tensor(0.2).double(), atol=0.02)
