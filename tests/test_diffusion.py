"""The schedule, the targets and the sampler, against closed forms."""

import math

import pytest
import torch

from vdm_ssm import GaussianDiffusion, UNet3D

SHAPE = (2, 3, 4, 8, 8)


def perfect_model(x0, target, steps=256):
    """A network that knows the video, as a callable that answers in the asked target."""
    d = GaussianDiffusion(None, steps, target)

    def model(x, t):
        signal, noise = d.rates(t)
        eps = (x - signal * x0) / noise
        return {"eps": eps, "x0": x0.expand_as(x), "v": signal * eps - noise * x0}[target]

    return model


def test_schedule_is_the_official_cosine_schedule():
    d = GaussianDiffusion(None, 256)
    alpha_bar = d.signal_rate.double().square()
    beta = 1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])
    assert math.isclose(d.noise_rate[0] ** 2, 0.000188826672994691, rel_tol=1e-6)
    assert math.isclose(alpha_bar[128], 0.487756504411292, rel_tol=1e-6)
    assert math.isclose(alpha_bar[255], 3.7059614172293e-09, rel_tol=1e-5)
    assert math.isclose(beta[100], 0.00873118314624033, rel_tol=1e-4) and math.isclose(beta[255], 0.9999, rel_tol=1e-6)
    assert torch.allclose(d.signal_rate**2 + d.noise_rate**2, torch.ones(256))


@pytest.mark.parametrize("target", ["eps", "v", "x0"])
def test_a_perfect_network_has_no_loss_and_predicts_the_video(target):
    torch.manual_seed(0)
    x0 = torch.rand(SHAPE) * 2 - 1
    d = GaussianDiffusion(perfect_model(x0, target), target=target)
    assert d.loss(x0, t=torch.tensor([20, 180])) < 1e-8
    t = torch.tensor([100, 200])
    signal, noise = d.rates(t)
    assert torch.allclose(d.predict_x0(signal * x0 + noise * torch.randn_like(x0), t), x0, atol=1e-4)


def test_loss_of_a_zero_network_is_the_variance_of_its_target():
    torch.manual_seed(0)
    zero = lambda x, t: torch.zeros_like(x)
    x0, eps = torch.rand(SHAPE) * 2 - 1, torch.randn(SHAPE)
    assert torch.isclose(GaussianDiffusion(zero, target="eps").loss(x0, eps=eps), eps.square().mean())
    assert torch.isclose(GaussianDiffusion(zero, target="x0").loss(x0, eps=eps), x0.square().mean())


@pytest.mark.parametrize("target", ["eps", "v", "x0"])
@pytest.mark.parametrize("steps, eta", [(256, 1.0), (50, 0.0), (10, 0.0), (2, 0.0)])
def test_sampling_with_a_perfect_network_returns_the_video(target, steps, eta):
    torch.manual_seed(0)
    x0 = torch.rand(SHAPE) * 1.8 - 0.9
    d = GaussianDiffusion(perfect_model(x0, target), target=target)
    x = d.sample(torch.randn(SHAPE), steps, eta)
    assert torch.allclose(x, x0, atol=1e-3)


def test_eta_one_on_all_steps_is_ancestral_sampling():
    """Against the posterior of DDPM, eq. 6-7, written out: mean and variance of each step."""
    torch.manual_seed(0)
    model = UNet3D(dim=8, dim_mults=(1, 2), heads=1).double()
    d = GaussianDiffusion(model, steps=7, target="eps").double()
    x = start = torch.randn(SHAPE, dtype=torch.float64)
    torch.manual_seed(1)
    sampled = d.sample(start)
    alpha_bar = d.signal_rate.square()
    torch.manual_seed(1)
    for t in reversed(range(7)):
        before = alpha_bar[t - 1] if t else torch.tensor(1.0).double()
        beta = 1 - alpha_bar[t] / before
        with torch.no_grad():
            eps = model(x, torch.full((2,), t))
        x0 = ((x - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt()).clamp(-1, 1)
        mean = before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - before) * x
        mean, variance = mean / (1 - alpha_bar[t]), (1 - before) / (1 - alpha_bar[t]) * beta
        x = mean + variance.sqrt() * torch.randn_like(x) if t else mean
    assert torch.allclose(sampled, x, atol=1e-5)


def test_eta_zero_is_deterministic_and_the_result_is_within_range():
    torch.manual_seed(0)
    d = GaussianDiffusion(UNet3D(dim=8, dim_mults=(1, 2), heads=1), steps=20)
    start = torch.randn(SHAPE)
    once, again = d.sample(start, 5, eta=0.0), d.sample(start, 5, eta=0.0)
    assert torch.equal(once, again) and once.abs().max() <= 1
    assert not torch.equal(d.sample(start, 5), d.sample(start, 5))


@pytest.mark.parametrize("steps", [0, 21, -1])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match="1 to 20"):
        GaussianDiffusion(None, steps=20).sample(torch.randn(SHAPE), steps)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_impossible_eta_is_refused(eta):
    with pytest.raises(ValueError, match="eta"):
        GaussianDiffusion(None, steps=20).sample(torch.randn(SHAPE), eta=eta)


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match="eps, v or x0"):
        GaussianDiffusion(None, target="score")
