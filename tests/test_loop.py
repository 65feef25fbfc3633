"""What the loop promises: nothing is lost, precision and memory are options, and a run can be watched."""

import copy
import json
import os
import pathlib
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch

import train
import vdm_ssm

ROOT = pathlib.Path(__file__).parent.parent
TINY = ("--size 8 --frames 3 --dim 8 --dim-mults 1,2 --heads 1 --batch 2 --sample-steps 2 --sample-videos 2 --device cpu "
        "--temporal s6-glu").split()  # fmt: skip


@pytest.fixture(autouse=True)
def quiet_signals_and_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)


def run(out, steps, *more):
    train.main([*TINY, "--steps", str(steps), "--out", out, *map(str, more)])


def resume(path, *more):
    train.main(["--resume", str(path), *map(str, more)])


def refuses(*argv):
    with pytest.raises(train.BadInput) as error:
        train.main([str(a) for a in argv])
    return str(error.value)


def log(out):
    return [json.loads(line) for line in (pathlib.Path(out) / "log.jsonl").read_text().splitlines()]


def losses(out):
    return [line["loss"] for line in log(out) if "loss" in line]


# ---- Nothing is lost

KILLS = f"""
import os, pathlib, random, shutil, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train

sys.stderr = open(os.devnull, "w")
moments = random.Random(0)
newest = lambda: train.step_in(next(iter(train.checkpoints("killed")), pathlib.Path("none")))
for kill in range(10):
    before, start = newest(), time.time()
    child = os.fork()
    if child == 0:
        train.main(["--resume", "killed"] if before >= 0 else [*sys.argv[1:], "--out", "killed"])
        os._exit(0)
    while kill % 2 == 0 and newest() == before and time.time() < start + 60:  # however slow the machine is
        time.sleep(0.01)
    time.sleep(moments.uniform(0, 0.4))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if status != signal.SIGKILL:
        sys.exit(f"ended by itself: {{status}}")
    if newest() < 0:
        shutil.rmtree("killed", ignore_errors=True)
train.main(["--resume", "killed"])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills children that share one start")
def test_a_run_killed_many_times_at_random_moments_is_the_uninterrupted_run_bit_for_bit(tmp_path):
    (tmp_path / "kills.py").write_text(KILLS)
    begin = [*TINY, "--dim-mults", "1", "--steps", "100", "--save-every", "2", "--sample-every", "7"]
    done = subprocess.run([sys.executable, "kills.py", *begin], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    train.main([*begin, "--out", "whole"])
    assert losses("killed") == losses("whole") and len(losses("whole")) == 100
    killed, whole = train.load_checkpoint("killed"), train.load_checkpoint("whole")
    for key in ("model", "ema"):
        assert all(torch.equal(killed[key][name], whole[key][name]) for name in whole[key])
    assert sorted(os.listdir("killed")) == sorted(os.listdir("whole"))
    assert sorted(os.listdir("killed/samples")) == sorted(os.listdir("whole/samples"))
    for sheet in pathlib.Path("whole/samples").glob("*.png"):
        assert (pathlib.Path("killed/samples") / sheet.name).read_bytes() == sheet.read_bytes()


def test_the_last_checkpoints_are_kept_and_know_the_run():
    run("run", 7, "--save-every", 2, "--keep", 3)
    assert [train.step_in(path) for path in train.checkpoints("run")] == [7, 6, 4]
    checkpoint = torch.load("run/checkpoint-000007.pt", weights_only=True)
    assert checkpoint["torch"] == torch.__version__ and checkpoint["args"]["lr"] == 1e-3 and checkpoint["per_step"] == 2


ACCIDENT = f"""
import multiprocessing, os, runpy, shutil, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import vdm_ssm

def losses(*_, real=vdm_ssm.GaussianDiffusion.losses):
    if what == "bug":
        raise RuntimeError("a bug")
    elif what == "cache":
        shutil.rmtree("cache", ignore_errors=True)
    else:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    return real(*_)

what = sys.argv.pop(1)
vdm_ssm.GaussianDiffusion.losses = losses
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


@pytest.mark.parametrize("what, code, told", [
    ("bug", 1, "RuntimeError: a bug"),
    ("kill", 2, "that loads data was killed"),
    ("cache", 2, ".u8 was changed or removed"),
])  # fmt: skip
def test_an_accident_ends_a_run_whose_loaders_ignore_signals(what, code, told):
    np.save("videos.npy", np.zeros((4, 9, 8, 8, 3), np.uint8))
    command = [sys.executable, "-c", ACCIDENT, what, *TINY, "--data", "videos.npy", "--steps", "100", "--workers", "2"]
    done = subprocess.run([*command, "--out", "run"], capture_output=True, text=True, timeout=100)
    assert done.returncode == code and told in done.stderr
    assert ("Traceback" in done.stderr) == (what == "bug")


@pytest.mark.parametrize("harm", ["link", "shapes", "arguments"])
def test_the_checkpoint_before_is_offered_whatever_is_wrong_with_the_newest(harm):
    run("run", 4, "--save-every", 2)
    path = pathlib.Path("run/checkpoint-000004.pt")
    state = torch.load(path, weights_only=True)
    path.unlink()
    if harm == "link":
        path.symlink_to("nowhere")
    else:
        first = next(iter(state["model"]))
        damage = {"model": state["model"] | {first: torch.zeros(1)}} if harm == "shapes" else {"args": None}
        torch.save(state | damage, path)
    told = refuses("--resume", "run", "--steps", 6)
    assert told.startswith("run/checkpoint-000004.pt") and told.endswith("--resume run/checkpoint-000002.pt")


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_goes_on():
    run("run", 4, "--save-every", 2, "--sample-every", 4)
    whole = losses("run")
    newest = pathlib.Path("run/checkpoint-000004.pt")
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2] + b"other bytes" + content[len(content) // 2 + 11 :])
    assert "checkpoint-000004.pt is not a checkpoint of train.py, or is damaged" in refuses("--resume", "run", "--steps", 6)
    newest.write_bytes(content[:1000])
    message = refuses("--resume", "run", "--steps", 6)
    assert "checkpoint-000004.pt" in message and "--resume run/checkpoint-000002.pt" in message
    assert "checkpoint-000002.pt" in refuses("sample", "run", "--device", "cpu")
    resume("run/checkpoint-000002.pt", "--steps", 6)
    assert losses("run")[:4] == whole and [line["step"] for line in log("run")] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in train.checkpoints("run")] == ["checkpoint-000006.pt", "checkpoint-000004.pt"]


def test_going_back_takes_back_what_came_later_and_deletes_no_checkpoint():
    run("run", 6, "--save-every", 3, "--sample-every", 3)
    pathlib.Path("run/checkpoint-000006.pt.17.part").touch()
    pathlib.Path("run/checkpoint-notes.pt").touch()
    resume("run/checkpoint-000003.pt", "--steps", 4, "--sample-steps", 1)
    assert [line["step"] for line in log("run")] == [1, 2, 3, 4]
    assert sorted(os.listdir("run")) == ["checkpoint-000003.pt", "checkpoint-000004.pt", "checkpoint-000006.old",
                                         "checkpoint-notes.pt", "log.jsonl", "samples"]  # fmt: skip
    assert sorted({path.stem for path in pathlib.Path("run/samples").iterdir()}) == ["step-000003", "step-000004"]


def test_a_checkpoint_alone_goes_on():
    run("run", 2)
    os.mkdir("copied")
    os.rename("run/checkpoint-000002.pt", "copied/checkpoint-000002.pt")
    resume("copied", "--steps", 3)
    assert [line["step"] for line in log("copied")] == [3] and os.path.exists("copied/samples/step-000003.png")


def test_resume_may_deal_out_the_videos_of_a_step_anew():
    run("whole", 4, "--save-every", 2, "--batch", 4)
    for batch, accumulate in ((2, 2), (1, 4)):
        run(f"parts{batch}", 2, "--batch", 4)
        assert "takes 4 videos a step" in refuses("--resume", f"parts{batch}", "--batch", 2, "--steps", 4)
        resume(f"parts{batch}", "--batch", batch, "--grad-accum", accumulate, "--steps", 4)
        assert np.allclose(losses(f"parts{batch}"), losses("whole"), rtol=1e-5)


def test_the_noise_of_an_item_does_not_depend_on_its_company():
    together, alone = train.randn((2, 3), train.generators(5, [7, 8])), train.randn((2, 3), train.generators(5, [8]))
    assert torch.equal(together[1], alone[0]) and not torch.equal(together[0], together[1])
    assert not torch.equal(alone, train.randn((2, 3), train.generators(6, [8])))
    x = train.randn((2**12,), train.generators(0, range(16)))
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02 and abs(torch.corrcoef(x) - torch.eye(16)).max() < 0.08
    t = train.randint(4, train.generators(0, range(4000)))
    assert (t.bincount(minlength=4) / 4000 - 0.25).abs().max() < 0.03


# ---- Seeing it work


def test_the_log_tells_loss_by_noise_gradient_rate_speed_and_memory():
    run("run", 12, "--warmup", 8, "--lr", 1e-3, "--batch", 3)
    for line in log("run"):
        assert abs(line["lr"] - 1e-3 * min(1, line["step"] / 8)) < 1e-12
        assert line["grad_norm"] > 0 and line["videos_per_second"] > 0 and line["memory_mib"] > 50
    first = log("run")[0]
    t = train.randint(256, train.generators(0, range(3)))
    assert [value is not None for value in first["loss_by_noise"]] == [bool((t // 64 == i).any()) for i in range(4)]
    counts = torch.stack([(t // 64 == i).sum() for i in range(4)])
    mean = sum(n * value for n, value in zip(counts.tolist(), first["loss_by_noise"]) if n) / 3
    assert abs(mean - first["loss"]) < 1e-6


def test_clipping_bounds_the_step_and_zero_means_no_limit():
    norms = {}
    for clip in ("0", "1e-3"):
        run(f"clip{clip}", 1, "--clip", clip)
        state = train.load_checkpoint(f"clip{clip}")["optimizer"]["state"]
        # After one step Adam's first average is 0.1 of the gradient.
        norms[clip] = 10 * torch.cat([s["exp_avg"].flatten() for s in state.values()]).norm()
    logged = [log(f"clip{clip}")[0]["grad_norm"] for clip in norms]
    assert logged[0] == logged[1] and abs(norms["0"] - logged[0]) < 1e-4 * logged[0]
    assert abs(norms["1e-3"] - 1e-3) < 1e-6


def test_plot_draws_the_curves_of_several_runs():
    pytest.importorskip("matplotlib")
    run("a", 12)
    run("b", 2)
    with open("b/log.jsonl", "a") as file:
        file.write('{"step": 2, "FD-random": 1.5, "videos": 8}\n{"step": 3, "lo')  # cut off by a kill
    train.main(["plot", "a", "b"])
    picture = train.iio.imread("a/curves.png")
    assert picture.shape[0] > 500 and len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 50
    train.main(["plot", "b", "--out", "b.curves"])
    assert pathlib.Path("b.curves").read_bytes().startswith(b"\x89PNG")
    assert "folder of a run" in refuses("plot", "nowhere")
    pathlib.Path("b/log.jsonl").write_text("")
    assert "b has logged no step yet" in refuses("plot", "a", "b")
    assert np.allclose(train.smooth(np.array([1, np.nan, 3, 5]), 3), [1, 2, 4, 4])


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refuses("plot", "run")


# ---- Precision, memory, compilation


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


def test_bfloat16_and_recomputing_are_flags_that_a_resumed_run_may_change():
    run("run", 2, "--amp", "--recompute")
    assert train.load_checkpoint("run")["args"]["amp"] is True
    resume("run", "--steps", 4, "--no-amp", "--no-recompute")
    assert all(p.dtype == torch.float32 for p in train.load_checkpoint("run")["model"].values() if p.is_floating_point())
    run("plain", 4)
    assert np.allclose(losses("run"), losses("plain"), rtol=0.02) and losses("run") != losses("plain")
    train.main(["sample", "run", "--videos", "1", "--device", "cpu"])


def test_compiling_is_done_in_place_so_that_names_of_weights_stay(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, dynamic: compiled.append(type(module)))  # for its minute
    run("run", 1, "--compile")
    resume("run", "--no-compile", "--steps", 2)
    assert compiled == [vdm_ssm.UNet3D]
    block_by_block = lambda function, dynamic=None: dynamic is False and compiled.append(type(function.__self__)) or function
    monkeypatch.setattr(torch, "compile", block_by_block)
    run("both", 2, "--compile", "--recompute")
    assert set(compiled[1:]) == {vdm_ssm.ResBlock, vdm_ssm.OverSpace, vdm_ssm.OverTime}  # inside their checkpoints
    run("plain", 2)
    assert np.allclose(losses("both"), losses("plain"), rtol=1e-5)
    monkeypatch.setattr(torch, "compile", lambda function: 1 / 0)
    assert "--compile fails here" in refuses(*TINY, "--compile", "--out", "other")


def test_contradictory_flags_are_named(monkeypatch):
    assert "--warmup 5 is longer" in refuses(*TINY, "--steps", 4, "--warmup", 5)
    assert "--i3d has no effect without --eval-every" in refuses(*TINY, "--i3d", "weights.pt")
    assert "--eval-videos has no effect without --eval-every" in refuses(*TINY, "--eval-videos", 8)
    assert "--eval-videos" in refuses(*TINY, "--eval-every", 1, "--eval-videos", 1)
    assert "train with --cond-drop" in refuses(*TINY, "--class-cond", "--cond-drop", 0, "--guidance", 2)
    assert "unrecognized arguments: --rec" in refuses(*TINY, "--rec")
    assert "--clip" in refuses(*TINY, "--clip", -1) and "--keep" in refuses(*TINY, "--keep", 0)
    monkeypatch.setattr(torch, "zeros", lambda *_, device, zeros=torch.zeros: zeros(1))  # as if there were a GPU, an old one
    assert "give --no-amp" in refuses(*TINY, "--device", "cuda", "--amp")


# ---- README


def commands():
    """Every command line of README that starts train.py, without its first words."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    found = [line.split("#")[0] for line in text.splitlines() if "train.py" in line and line.startswith("    ")]
    return [shlex.split(line.split("train.py", 1)[1]) for line in found]


def test_every_command_line_of_the_readme_parses():
    parsers = {"sample": train.sampling_parser, "plot": train.plotting_parser}
    for words in commands():
        parse = parsers.get(words[0] if words else "", None)
        args = parse().parse_args(words[1:]) if parse else train.training_parser().parse_args(words)
        if not parse and not args.resume:
            with torch.device("meta"):
                model = train.make_model(train.complete(args))
            assert args.size % model.factor == 0 and args.sample_steps <= args.diffusion_steps
    assert len(commands()) > 8
