"""Precision and memory of the network: recomputation and bfloat16."""

import copy

import pytest
import torch

import vdm_ssm


def gradients(model, amp=False):
    """Loss and all gradients of one step."""
    x, t = torch.randn(2, 3, 5, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 200])
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        loss = vdm_ssm.GaussianDiffusion(model).losses(x, t, x.flip(0)).mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def small(temporal, **options):
    torch.manual_seed(0)
    return vdm_ssm.UNet3D(dim=8, dim_mults=(1, 2), heads=1, temporal=temporal, **options)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("temporal", ["attention", "linear-attention", "bi-mamba", "bi-s4d"])
def test_recomputing_gives_the_same_loss_and_gradients_and_keeps_less(temporal, amp):
    kept, found = [], []
    for recompute in (False, True):
        model, sizes = small(temporal, recompute=recompute), {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x, lambda x: x
        ):
            found.append(gradients(copy.deepcopy(model), amp))  # a copy, as the average of the weights is one
        kept.append(sum(sizes.values()))
        assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*found))
    assert kept[1] < 0.7 * kept[0]


@pytest.mark.parametrize("temporal", ["attention", "bi-mamba", "bi-s4d"])
def test_under_bfloat16_autocast_norms_states_and_loss_stay_in_float32(temporal, monkeypatch):
    """A norm's output may be rounded to bfloat16 once; its sums are float32's."""
    seen = []

    def checked(norm):
        def watched(x, groups, weight=None, bias=None, eps=1e-5):
            output = norm(x, groups, weight, bias, eps)
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                exact = norm(x.double(), groups, *(None if p is None else p.double() for p in (weight, bias)), eps)
            error = (output.double() - exact).abs() / exact.abs().clamp(min=1e-2)
            seen.append(error.max() < (2**-8 if output.dtype == torch.bfloat16 else 1e-4))
            return output

        return watched

    for name in ("group_norm", "layer_norm"):
        monkeypatch.setattr(torch.nn.functional, name, checked(getattr(torch.nn.functional, name)))
    recur = vdm_ssm.SelectiveScan.recur
    watched = lambda room, state, *rest: states_of.append(state.dtype) or recur(room, state, *rest)
    monkeypatch.setattr(vdm_ssm.SelectiveScan, "recur", staticmethod(watched))
    states_of, model = [], small(temporal)
    for module in model.modules():
        if isinstance(module, vdm_ssm.S4D):
            module.register_forward_hook(lambda module, inputs, output: states_of.append(module.kernel(5).dtype))
    found, exact = gradients(model, amp=True), gradients(small(temporal))
    assert len(seen) > 20 and all(seen)
    assert set(states_of) <= {torch.float32} and bool(states_of) == (temporal != "attention")
    assert found[0].dtype == torch.float32 and abs(found[0] - exact[0]) < 0.02 * exact[0]
    assert all(gradient.dtype == torch.float32 for gradient in found)
