"""DiM is the identity's neighbour at first and sees all of a clip. What both networks promise."""

import copy

import pytest
import torch
from test_layers import silent_owners
from test_scan import kept_bytes
from test_unet import fill
from torch import nn

from vdm_ssm import DiM, UNet3D, relative_error

T = torch.tensor([3, 200])


def small(**changes):
    return DiM(**dict(patch=2, d=16, depth=2, n=4) | changes)


def video(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_at_first_the_output_is_zero_and_every_block_is_the_identity():
    torch.manual_seed(0)
    model = small(cond_dim=3)
    assert model(torch.randn(2, 3, 4, 8, 8), T, torch.randn(2, 3)).abs().max() == 0
    x = torch.randn(2, 7, 16)
    assert all(torch.equal(block(x, torch.randn(2, 1, 19)), x) for block in model.blocks)


def test_unpatchify_is_the_inverse_of_patchify():
    model = small(channels=4, depth=0)
    model.position = lambda *size: torch.zeros(())
    for layer in (model.patch_in, model.patch_out):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    model.norm = nn.Identity()
    x = torch.randn(2, 4, 3, 6, 8)
    assert torch.equal(model(x, T), x)


@pytest.mark.parametrize("blocks", ["none", "both ways", "forward only"])
def test_a_pixel_reaches_its_own_patch_and_through_a_block_the_whole_clip_or_what_comes_after(blocks):
    """Tokens run frame after frame and row after row."""
    model = fill(small(depth=int(blocks != "none"))).double()
    if blocks == "forward only":
        model.blocks[0].mamba.back = None
    x = video(2, 3, 3, 4, 6)
    moved = x.clone()
    moved[0, 1, 1, 2, 4] += 1
    changed = (model(moved, T) - model(x, T)).abs().amax(1) > 1e-12  # (b, f, h, w)
    token = torch.arange(18).view(3, 2, 3).repeat_interleave(2, 1).repeat_interleave(2, 2)  # of each pixel
    reached = {"none": token == 11, "both ways": token >= 0, "forward only": token >= 11}[blocks]
    assert torch.equal(changed[0], reached) and not changed[1].any()


def test_every_place_has_its_own_position_and_any_shape_is_taken():
    model = fill(small())
    positions = model.position(5, 6, 7)
    assert positions.shape == (5, 6, 7, 16)
    assert torch.cdist(positions.view(-1, 16), positions.view(-1, 16)).fill_diagonal_(9).min() > 1e-2
    assert torch.equal(model.position(2, 3, 4), positions[:2, :3, :4])  # longer clips continue shorter ones
    for f, h, w in ((1, 8, 8), (5, 2, 10)):
        assert model(torch.randn(2, 3, f, h, w), T).shape == (2, 3, f, h, w)
    assert small(channels=4, out_channels=8)(torch.randn(2, 4, 2, 4, 4), T).shape == (2, 8, 2, 4, 4)


# ---- Both networks

NETWORKS = {
    "unet": lambda **changes: fill(UNet3D(**dict(dim=8, dim_mults=(1, 2), heads=2) | changes)),
    "dim": lambda **changes: fill(small(**changes)),
}
both_networks = pytest.mark.parametrize("name", NETWORKS)
X, COND = video(2, 3, 4, 8, 8).float(), torch.tensor([[1.0, 0, 0, 0, 0], [0, 0, 0.5, 0, -2]])


@both_networks
def test_recomputing_gives_the_same_gradients_for_less_memory_also_in_a_copy_and_of_no_video(name):
    found = []
    for recompute in (False, True):
        model = copy.deepcopy(NETWORKS[name](cond_dim=5, recompute=recompute))
        kept, y = kept_bytes(model, X, T, COND)
        y.square().sum().backward()
        found.append((kept, y, [p.grad for p in model.parameters()]))
    (kept, y, gradients), (kept_less, y_again, gradients_again) = found
    assert kept_less < 0.5 * kept and torch.equal(y, y_again)
    assert all(map(torch.equal, gradients, gradients_again))
    empty = model(X[:0], T[:0], COND[:0])
    empty.sum().backward()
    assert empty.shape == X[:0].shape


@pytest.mark.parametrize("name, options", [("dim", {}), ("unet", {}), ("unet", {"temporal": "attention"})])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_hook_of_every_module_with_a_weight_fires(name, options, recompute):
    assert silent_owners(NETWORKS[name](cond_dim=5, recompute=recompute, **options), X, T, COND) == []


@both_networks
def test_in_bfloat16_and_under_autocast_a_network_computes_nearly_the_same_and_trains(name):
    model, x = NETWORKS[name](), video(2, 3, 20, 4, 4).float()
    y = model(x, T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = model(x, T)
    under.float().square().mean().backward()
    assert relative_error(under, y) < 0.1
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    assert relative_error(model.bfloat16()(x.bfloat16(), T), y) < 0.05


@pytest.mark.parametrize("make, height, reason", [
    (lambda: UNet3D(dim_mults=(1, 2, 4)), 6, "multiples of 4"), (lambda: UNet3D(dim=20), 8, "multiple of 8"),
    (lambda: small(patch=4), 6, "multiples of the patch, 4"), (lambda: small(d=8), 8, "multiple of 8"),
    (lambda: small(d=20), 8, "of 8"), (lambda: UNet3D(temporal="mamba2"), 8, "'mamba2'.*bi-mamba"),
])  # fmt: skip
def test_sizes_and_names_that_do_not_fit_are_refused_with_the_mend(make, height, reason):
    with pytest.raises(ValueError, match=reason):
        make()(torch.zeros(1, 3, 2, height, 8), T[:1])
