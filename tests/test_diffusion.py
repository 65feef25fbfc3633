"""The schedule, the targets and the samplers, against closed forms."""

import math
from functools import partial

import pytest
import torch

from vdm_ssm import GaussianDiffusion, ddim, dpm_solver

SHAPE = (2, 3, 4, 8, 8)
ancestral = partial(ddim, eta=1.0)


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
    assert math.isclose(beta[100], 0.00873118314624033, rel_tol=1e-4)
    assert math.isclose(beta[255], 0.9999, rel_tol=1e-6)
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
@pytest.mark.parametrize("steps, sampler", [
    (256, ancestral), (50, ddim), (10, ddim), (2, ddim), (50, dpm_solver), (5, dpm_solver), (2, dpm_solver),
])  # fmt: skip
def test_sampling_with_a_perfect_network_returns_the_video(target, steps, sampler):
    torch.manual_seed(0)
    x0 = torch.rand(SHAPE) * 1.8 - 0.9
    d = GaussianDiffusion(perfect_model(x0, target), target=target)
    x = d.sample(torch.randn(SHAPE), steps, sampler)
    assert torch.allclose(x, x0, atol=1e-3)


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


def test_latents_are_not_clipped():
    model, far = perfect_model(torch.full(SHAPE, 3.0), "v"), torch.randn(SHAPE)
    for clip, value in ((True, 1.0), (False, 3.0)):
        x = GaussianDiffusion(model, target="v", clip=clip).sample(far, 5)
        assert torch.allclose(x, torch.tensor(value), atol=1e-3)


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


# Gaussian data N(MEAN, COVARIANCE): the best guess of x_0 is linear in x_t. So a sampler is affine in its noise,
# and its exact law follows from where it takes 0 and the unit vectors.

VARIANCES = torch.tensor([0.6, 0.2, 0.05], dtype=torch.float64)
TURN = torch.linalg.qr(torch.tensor([[1.0, 2, 3], [0, 1, 4], [5, 6, 0]], dtype=torch.float64)).Q
MEAN, COVARIANCE = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64), TURN @ torch.diag(VARIANCES) @ TURN.T


def best_guess(x, signal, noise):
    """E[x_0 | x_t].    x (b, 3), signal, noise numbers -> (b, 3)"""
    gain = signal * COVARIANCE @ torch.linalg.inv(signal**2 * COVARIANCE + noise**2 * torch.eye(3))
    return MEAN + (x - signal * MEAN) @ gain.T


def best_network(target, steps=256):
    """The diffusion around the best network for this data."""
    d = GaussianDiffusion(None, steps, target).double()

    def model(x, t):
        signal, noise = d.signal_rate[t[0]], d.noise_rate[t[0]]
        x0 = best_guess(x.flatten(1), signal, noise).view_as(x)
        eps = (x - signal * x0) / noise
        return {"eps": eps, "x0": x0, "v": signal * eps - noise * x0}[target]

    d.model, d.clip = model, False
    return d


def law(d, steps, sampler):
    """Exact mean and covariance of samples. Row 0 has no noise, each other row a unit of it at one place."""
    rows = torch.zeros(1 + 3 * (1 + steps), 3, dtype=torch.float64)
    noises = iter(range(1, len(rows), 3))

    def unit(*_):
        here, noise = next(noises), torch.zeros_like(rows)
        noise[here : here + 3] = torch.eye(3)
        return noise.view(-1, 1, 1, 1, 3)

    sampler = sampler if sampler is dpm_solver else partial(sampler, randn_like=unit)
    y = d.sample(unit(), steps, sampler).view_as(rows)
    effect = y[1:] - y[0]
    return y[0], effect.T @ effect


@pytest.mark.parametrize("target", ["eps", "v", "x0"])
@pytest.mark.parametrize("sampler, steps, error", [
    (ancestral, 256, 0.03), (ddim, 256, 0.015), (ddim, 50, 0.06), (dpm_solver, 50, 0.003),
])  # fmt: skip
def test_samples_of_gaussian_data_have_its_mean_and_covariance(target, sampler, steps, error):
    mean, covariance = law(best_network(target), steps, sampler)
    assert torch.allclose(mean, MEAN, atol=1e-3)
    assert (covariance - COVARIANCE).norm() < error * COVARIANCE.norm()
    assert ((TURN.T @ covariance @ TURN).diagonal() / VARIANCES - 1).abs().max() < 3 * error


@pytest.mark.parametrize("sampler, order", [(ddim, 1), (dpm_solver, 2)])
def test_the_error_falls_with_the_order_of_the_sampler(sampler, order):
    """Against the probability flow, which stretches x_t - signal MEAN as its deviation on each axis."""
    start, errors = torch.eye(3, dtype=torch.float64), []
    for steps in (64, 128, 256):
        r = torch.linspace(-2, 3, steps + 1).double()  # log(signal / noise)
        signal, noise = torch.sigmoid(2 * r).sqrt(), torch.sigmoid(-2 * r).sqrt()
        guess = lambda x, i: best_guess(x, signal[i], noise[i])
        end = sampler(guess, start, range(steps), signal.tolist(), noise.tolist())
        deviation = (signal[:, None] ** 2 * VARIANCES + noise[:, None] ** 2).sqrt()
        flow = TURN @ torch.diag(deviation[-1] / deviation[0]) @ TURN.T
        errors.append((end - signal[-1] * MEAN - (start - signal[0] * MEAN) @ flow).norm())
    for coarse, fine in zip(errors, errors[1:]):
        assert abs(math.log2(coarse / fine) - order) < 0.1


@pytest.mark.parametrize("sampler", [ddim, dpm_solver])
def test_samplers_take_any_tensor_any_steps_and_any_end(sampler):
    """A guess that never changes: the result is signal times it, plus noise times the eps of the start."""
    x0, eps, visited = torch.full((2, 5), 0.4).double(), torch.randn(2, 5).double(), []
    guess = lambda x, t: visited.append(t) or x0
    y = sampler(guess, 0.6 * x0 + 0.8 * eps, "abc", [0.6, 0.7, 0.8, 0.9], [0.8, 0.5, 0.3, 0.2])
    assert torch.allclose(y, 0.9 * x0 + 0.2 * eps) and visited == ["a", "b", "c"]
