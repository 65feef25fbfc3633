"""UNet3D has the official parameters and, for the same weights, the official output."""

import math

import numpy as np
import pytest
import torch

from vdm_ssm import TEMPORAL_LAYERS, UNet3D

# Trainable parameters of the official models without the position table that they do not use, at dim / heads
# 32 / 4 and 64 / 8. The attention baseline uses the table, 32 x heads numbers; both own 16 fixed ones.
COUNTS = {
    "attention": (14083331 + 128 + 16, 56279555 + 256 + 16),
    "linear-attention": (14083331 + 16, 56279555 + 16),
    "bi-mamba": (14498051, 57477635), "mamba": (14297347, 56900099),
    "bi-s4d": (15323907, 61218307), "s4d": (14443267, 57703939),
    "bi-s4d-glu": (13812995, 55050755), "s4d-glu": (13423875, 53568003),
    "bi-s4d-mlp": (14683395, 55377411), "s4d-mlp": (14124291, 54259203),
    "bi-s4d-gated": (15405315, 61405699), "s4d-gated": (15016195, 59922947),
    "bi-s4d-mamba": (14256387, 56642051), "s4d-mamba": (14176515, 56482307),
    "bi-s6-glu": (13889795, 55292419), "s6-glu": (13462275, 53688835),
    "bi-s6-mlp": (14760195, 55619075), "s6-mlp": (14162691, 54380035),
    "bi-s6-gated": (15473923, 58450435), "s6-gated": (15046403, 56846851),
}  # fmt: skip

# Output of the official model with the weights of `fill`: y[1, 1, 3, 2, :4], mean, L2 norm.
OUTPUTS = {
    "attention": (-3.02428, 4.63358, 1.18898, -1.66324, -0.06027, 72.0433),
    "linear-attention": (0.26249, 2.19055, 0.67633, 5.10848, -0.28400, 56.0030),
    "bi-mamba": (-1.10355, 1.56920, 0.76969, 1.19222, 0.60692, 47.8672),
    "bi-s4d": (-0.22016, 0.33542, 0.30586, -2.44270, -0.08853, 43.5548),
    "bi-s4d-glu": (0.58948, -2.54383, -2.62694, -4.61855, 0.25595, 68.5017),
    "bi-s4d-mlp": (1.73585, 0.21911, 1.51279, 2.00594, -0.14104, 47.0168),
    "bi-s4d-gated": (0.97578, 0.60771, 0.19144, -0.01158, -0.19367, 44.9463),
    "bi-s4d-mamba": (0.18770, 1.08061, 0.58093, 1.15892, 0.30715, 53.7485),
    "bi-s6-glu": (0.14148, 0.84466, -0.48124, -0.50794, 0.15518, 34.7593),
    "bi-s6-mlp": (-0.21239, 0.81895, -0.74297, -1.21227, 0.05609, 40.8424),
    "bi-s6-gated": (1.58729, 1.00197, -3.92628, 1.08264, -0.11496, 71.7250),
    "mamba": (-0.67226, -1.23864, -4.40754, -5.31125, -0.59538, 72.6489),
    "s4d": (0.54345, 0.93508, 0.20751, 1.42471, 0.73276, 59.6789),
    "s4d-glu": (1.33880, 0.29436, -0.28247, -0.71178, 0.22554, 47.2643),
    "s4d-mlp": (-1.06501, 0.53214, -1.33819, -1.91351, -0.53041, 53.9275),
    "s4d-gated": (-1.11302, -1.28137, -0.09842, -2.67916, -0.20558, 46.1960),
    "s4d-mamba": (1.21341, -0.42527, 1.36144, 0.48220, 0.31283, 76.5292),
    "s6-glu": (0.87468, 2.00954, 2.68834, 1.96784, -0.08864, 49.5919),
    "s6-mlp": (-1.40007, 3.49238, 1.71323, 0.22647, 0.58503, 53.2446),
    "s6-gated": (0.38854, 0.17903, -0.12534, 2.18043, -0.37492, 39.7545),
}


def fill(model):
    """Fixed weights, whatever torch's generator does. They follow the order of registration."""
    rng = np.random.RandomState(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            z = torch.from_numpy(rng.standard_normal(p.shape))
            kind = name.rsplit(".", 1)[-1]
            if kind in ("A_log", "log_A_real", "A_imag"):
                p += 0.1 * z
            elif kind == "log_dt":
                p.copy_(math.log(0.05) + 0.3 * z)
            elif name.endswith("dt_proj.bias"):
                p.copy_(0.3 * z - 2.5)
            elif p.ndim == 1:
                p.copy_((kind != "bias") + 0.2 * z)
            else:
                p.copy_(z if kind == "C" else z / math.sqrt(p[0].numel()))
    return model


@pytest.mark.parametrize("name", TEMPORAL_LAYERS)
def test_parameter_counts_are_the_official_ones(name):
    for (dim, heads), count in zip(((32, 4), (64, 8)), COUNTS[name]):
        with torch.device("meta"):
            model = UNet3D(dim=dim, heads=heads, temporal=name)
        assert sum(p.numel() for p in model.parameters()) == count


def assert_official(model, golden, cond=None):
    """The output is that of the official model for the same weights."""
    x = torch.from_numpy(np.random.RandomState(1).standard_normal((2, 3, 5, 8, 6))).float()
    with torch.no_grad():
        y = model(x, torch.tensor([3, 200]), cond)
    assert torch.allclose(y[1, 1, 3, 2, :4], torch.tensor(golden[:4]), atol=1e-4)
    assert math.isclose(y.mean(), golden[4], abs_tol=2e-5)
    assert math.isclose(y.norm(), golden[5], rel_tol=1e-5)


@pytest.mark.parametrize("name", TEMPORAL_LAYERS)
def test_output_is_the_official_one_for_the_same_weights(name):
    assert_official(fill(UNet3D(dim=8, dim_mults=(1, 2), heads=2, temporal=name)), OUTPUTS[name])


def test_clips_of_any_length_and_memory_layout_do_not_see_each_other():
    torch.manual_seed(0)
    model = UNet3D(dim=8, dim_mults=(1, 2), heads=1).double()
    x, t = torch.randn(3, 3, 4, 8, 8, dtype=torch.float64), torch.tensor([5, 9, 200])
    y, last = model(x, t), x.permute(0, 3, 4, 2, 1).contiguous().permute(0, 4, 3, 1, 2)
    assert torch.allclose(model(last, t), y, atol=1e-12)
    assert torch.allclose(model(x[1:2], t[1:2]), y[1:2], atol=1e-12)
    assert model(x[:, :, :1], t).shape == (3, 3, 1, 8, 8)
