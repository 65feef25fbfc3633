"""The schedule, the targets and the samplers, against closed forms."""

import math
from functools import partial

import pytest
import torch

from vdm_ssm import GaussianDiffusion, ddim, dpm_solver

SHAPE = (2, 3, 2, 4, 4)
ancestral = partial(ddim, eta=1.0)


def around(guess, target, steps=256, clip=False):
    """Diffusion around a network that answers with the target that `guess` stands for."""
    d = GaussianDiffusion(None, steps, target)

    def model(x, t, *cond):
        signal, noise = d.rates(t)
        x0 = guess(x, signal, noise, *cond)
        eps = (x - signal * x0) / noise
        return {"eps": eps, "x0": x0, "v": signal * eps - noise * x0}[target]

    d.model, d.clip = model, clip
    return d


def test_schedule_is_the_official_cosine_schedule():
    d = GaussianDiffusion(None, 256)
    alpha_bar = d.signal_rate.double().square()
    beta = 1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])
    assert math.isclose(d.noise_rate[0] ** 2, 0.000188826672994691, rel_tol=1e-6)
    assert math.isclose(alpha_bar[128], 0.487756504411292, rel_tol=1e-6)
    assert math.isclose(alpha_bar[255], 3.7059614172293e-09, rel_tol=1e-5)
    assert math.isclose(beta[100], 0.00873118314624033, rel_tol=1e-4)
    assert math.isclose(beta[255], 0.9999, rel_tol=1e-6)
    assert torch.allclose(d.signal_rate**2 + d.noise_rate**2, torch.ones(256))


@pytest.mark.parametrize("target", ["eps", "v", "x0"])
@pytest.mark.parametrize("sampler", [ancestral, ddim, dpm_solver])
def test_a_perfect_network_has_no_loss_and_sampling_with_it_returns_the_video(target, sampler):
    torch.manual_seed(0)
    x0 = torch.rand(SHAPE) * 1.8 - 0.9
    d = around(lambda *_: x0, target, clip=True)
    assert d.loss(x0, t=torch.tensor([20, 180])) < 1e-8
    for steps in (2, 5, 50, 256):
        assert torch.allclose(d.sample(torch.randn(SHAPE), steps, sampler), x0, atol=1e-3)


def shrink(x, t):
    """A network that is cheap, wrong and not linear."""
    return torch.tanh(x) * (0.5 + t.view(-1, 1, 1, 1, 1) / 40)


def test_eta_one_on_all_steps_is_ancestral_sampling():
    """Against the posterior of DDPM, eq. 6-7, written out: mean and variance of each step."""
    torch.manual_seed(0)
    d = GaussianDiffusion(shrink, steps=7, target="eps").double()
    x = start = torch.randn(SHAPE, dtype=torch.float64)
    torch.manual_seed(1)
    sampled = d.sample(start, sampler=ancestral)
    alpha_bar = d.signal_rate.square()
    torch.manual_seed(1)
    for t in reversed(range(7)):
        before = alpha_bar[t - 1] if t else torch.tensor(1.0).double()
        beta = 1 - alpha_bar[t] / before
        x0 = (x - (1 - alpha_bar[t]).sqrt() * shrink(x, torch.full((2,), t))) / alpha_bar[t].sqrt()
        mean = before.sqrt() * beta * x0.clamp(-1, 1) + (1 - beta).sqrt() * (1 - before) * x
        mean, variance = mean / (1 - alpha_bar[t]), (1 - before) / (1 - alpha_bar[t]) * beta
        x = mean + variance.sqrt() * torch.randn_like(x) if t else mean
    assert torch.allclose(sampled, x, atol=1e-5)


def test_without_noise_sampling_is_deterministic_and_the_result_is_within_range():
    d, start = GaussianDiffusion(shrink, steps=20), torch.randn(SHAPE)
    for sampler in (ddim, dpm_solver):
        once, again = d.sample(start, 5, sampler), d.sample(start, 5, sampler)
        assert torch.equal(once, again) and once.abs().max() <= 1
    assert not torch.equal(d.sample(start, 5, ancestral), d.sample(start, 5, ancestral))


@pytest.mark.parametrize("target", ["v", "x0"])
def test_without_clip_samples_of_data_of_std_1_have_it_though_the_network_errs(target):
    """The best network for N(0, 1) says 0 for v and signal x for x0; here with 5 % of error."""
    torch.manual_seed(0)
    best = lambda x, t: d.rates(t)[0] * x if target == "x0" else torch.zeros_like(x)
    d = GaussianDiffusion(lambda x, t: best(x, t) + 0.05 * torch.randn_like(x), target=target, clip=False)
    assert abs(d.sample(torch.randn(64, 3, 2, 4, 4)).std() - 1) < 0.1


def test_impossible_choices_are_refused():
    for steps in (0, 21, -1):
        with pytest.raises(ValueError, match="1 to 20"):
            GaussianDiffusion(None, steps=20).sample(torch.randn(SHAPE), steps)
    for eta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="eta"):
            ddim(None, torch.randn(SHAPE), [0], [0.5, 1.0], [0.5, 0.0], eta)
    with pytest.raises(ValueError, match="eps, v or x0"):
        GaussianDiffusion(None, target="score")
    with pytest.raises(ValueError, match="eps needs clip.*choose target v or x0"):
        GaussianDiffusion(None, target="eps", clip=False)


@pytest.mark.parametrize("sampler, order", [(ddim, 1), (dpm_solver, 2)])
def test_the_error_falls_with_the_order_of_the_sampler(sampler, order):
    """Data N(mean, variance): the probability flow stretches x_t - signal mean as its deviation."""
    mean, variance = torch.tensor([[0.3, -0.5, 0.1], [0.6, 0.2, 0.05]]).double()
    start, errors = torch.ones(3).double(), []
    for steps in (64, 128, 256):
        r = torch.linspace(-2, 3, steps + 1).double()  # log(signal / noise)
        signal, noise = torch.sigmoid(2 * r).sqrt(), torch.sigmoid(-2 * r).sqrt()
        deviation = (signal**2 * variance[:, None] + noise**2).sqrt()  # (3, steps + 1)
        shrink = (signal * variance[:, None] / deviation**2).T
        guess = lambda x, i: mean + shrink[i] * (x - signal[i] * mean)  # E[x_0 | x_t]
        end = sampler(guess, start, range(steps), signal.tolist(), noise.tolist())
        flow = deviation[:, -1] / deviation[:, 0]
        errors.append((end - signal[-1] * mean - (start - signal[0] * mean) * flow).norm())
    for coarse, fine in zip(errors, errors[1:]):
        assert abs(math.log2(coarse / fine) - order) < 0.1
