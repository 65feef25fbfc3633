"""Each network, sampler and class works with every other part of train.py: resuming, processes, precision, scoring."""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import train

ROOT = pathlib.Path(__file__).parent.parent
COMMON = "--size 8 --batch 2 --sample-steps 2 --sample-videos 3 --device cpu".split()
NETWORKS = {
    "unet": "--dim 8 --dim-mults 1,2 --heads 1 --temporal s6-glu".split(),
    "dim": "--backbone dim --patch 4 --width 16 --depth 2".split(),
}
CLASSES = ["--class-cond", "--guidance", "3"]


@pytest.fixture(autouse=True)
def quiet_signals_and_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)


def run(*argv):
    train.main([str(a) for a in argv])


def refuses(*argv):
    with pytest.raises(train.BadInput) as error:
        run(*argv)
    return str(error.value)


def log(out):
    return [json.loads(line) for line in pathlib.Path(out, "log.jsonl").read_text().splitlines()]


def losses(out):
    return [line["loss"] for line in log(out) if "loss" in line]


def samples(out):
    return np.load(pathlib.Path(out, "videos.npz"))["videos"]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("flags", [[], [*CLASSES, "--sampler", "dpm"]], ids=["plain", "classes"])
def test_a_resumed_run_is_the_uninterrupted_one(name, flags):
    common = [*COMMON, *NETWORKS[name], *flags, "--frames", 3]
    run(*common, "--steps", 4, "--sample-every", 4, "--out", "whole")
    run(*common, "--steps", 2, "--sample-every", 4, "--out", "parts")
    run("--resume", "parts", "--steps", 4)
    assert losses("parts") == losses("whole")
    sheets = [pathlib.Path(out, "samples/step-000004.png").read_bytes() for out in ("parts", "whole")]
    assert sheets[0] == sheets[1]


@pytest.mark.parametrize("name", NETWORKS)
def test_recomputing_and_bfloat16_change_nothing_but_the_rounding(name):
    common = [*COMMON, *NETWORKS[name], *CLASSES, "--frames", 3, "--steps", 3]
    for out, flags in (("plain", []), ("recomputed", ["--recompute"]), ("rounded", ["--recompute", "--amp"])):
        run(*common, *flags, "--out", out)
    saved = argparse.Namespace(**train.load_checkpoint("recomputed")["args"])
    assert any("checkpoint" in str(vars(part).get("forward")) for part in train.make_model(saved).modules())
    assert losses("recomputed") == losses("plain") != losses("rounded")
    assert np.allclose(losses("rounded"), losses("plain"), rtol=0.05)


@pytest.mark.parametrize("name", NETWORKS)
def test_two_processes_train_sample_and_score_classes_as_one_does(name):
    common = [*COMMON, *NETWORKS[name], *CLASSES, "--frames", 9, "--steps", 2, "--sampler", "dpm", "--eval-every", 2,
              "--eval-videos", 3]  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, ROOT / "train.py", *common, "--out", "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run(*common, "--batch", 4, "--out", "one")
    assert np.allclose(losses("two"), losses("one"), rtol=1e-4)
    scores = [line["FD-random"] for out in ("one", "two") for line in log(out) if "FD-random" in line]
    assert len(scores) == 2 and np.allclose(*scores, rtol=1e-2)


def test_classes_are_drawn_in_turn_or_one_alone_and_guided(capsys):
    run(*COMMON, *NETWORKS["dim"], "--frames", 2, "--class-cond", "--lr", 0.1, "--steps", 6, "--out", "run")
    assert "bricks, boards, checks" in capsys.readouterr().out
    for out, flags in {
        "turn": [], "name": ["--class", "boards"], "number": ["--class", 1], "guided": ["--class", 1, "--guidance", 4],
        "free": ["--guidance", 0], "free1": ["--guidance", 0, "--class", 1],
    }.items():  # fmt: skip
        run("sample", "run", "--videos", 4, "--device", "cpu", *flags, "--out", out)
    assert np.array_equal(samples("name"), samples("number"))
    # Video 1 of all classes in turn is of class 1, the others are not.
    assert [np.array_equal(a, b) for a, b in zip(samples("turn"), samples("name"))] == [False, True, False, False]
    assert not np.array_equal(samples("guided"), samples("number"))
    assert np.array_equal(samples("free"), samples("free1"))


@pytest.mark.parametrize("drop, hidden", [(0, 0), (1, 1), (0.3, 0.3)])
def test_the_network_is_told_the_class_of_each_video_but_for_a_share(drop, hidden, monkeypatch):
    told, losses = [], train.GaussianDiffusion.losses
    spy = lambda self, x, t, eps, cond, keep: told.append((cond, keep)) or losses(self, x, t, eps, cond, keep)
    monkeypatch.setattr(train.GaussianDiffusion, "losses", spy)
    run(*COMMON, *NETWORKS["dim"], "--batch", 64, "--frames", 1, "--class-cond", "--cond-drop", drop, "--steps", 3,
        "--out", "run")  # fmt: skip
    cond, keep = map(torch.cat, zip(*told))
    styles = [train.maze_style(train.maze_seed("train", i)) for i in range(len(cond))]
    assert torch.equal(cond, torch.eye(3)[styles])
    assert abs(1 - keep.float().mean() - hidden) < 0.1


def test_folders_are_classes_and_no_class_is_taken_for_another(tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("walk", "jump", "run"):
        (tmp_path / "videos" / kind).mkdir(parents=True)
        np.save(tmp_path / "videos" / kind / "0.npy", rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8))
    run(*COMMON, *NETWORKS["dim"], "--frames", 3, "--data", "videos", "--class-cond", "--steps", 1, "--out", "run")
    assert train.load_checkpoint("run")["args"]["classes"] == ["jump", "run", "walk"]
    run("sample", "run", "--videos", 1, "--device", "cpu", "--class", "jump")
    assert "3 classes of this run: jump, run, walk" in refuses("sample", "run", "--class", "swim")
    assert "3 classes" in refuses("sample", "run", "--class", "3")
    for kind in ("jump", "run"):
        (tmp_path / "videos" / kind / "0.npy").rename(tmp_path / "videos" / "walk" / f"{kind}.npy")
    assert "two classes or more" in refuses(*COMMON, "--frames", 3, "--data", "videos", "--class-cond", "--out", "one")
    assert not pathlib.Path("one").exists()
    for part in ("train", "test"):  # which are no classes
        shutil.copytree(tmp_path / "videos" / "walk", tmp_path / "split" / part)
    assert "all are in train" in refuses(*COMMON, "--frames", 3, "--data", "split", "--class-cond")


def test_samplers_agree_on_where_many_steps_lead_and_differ_in_few():
    run(*COMMON, *NETWORKS["dim"], "--frames", 2, "--lr", 0.1, "--steps", 6, "--diffusion-steps", 64, "--out", "run")
    few, many = {}, {}
    for sampler in ("ddim", "dpm"):
        for steps, found in ((3, few), (64, many)):
            run("sample", "run", "--videos", 2, "--sampler", sampler, "--sample-steps", steps, "--device", "cpu",
                "--out", f"{sampler}-{steps}")  # fmt: skip
            found[sampler] = samples(f"{sampler}-{steps}").astype(float)
    distance = lambda x: np.abs(x["ddim"] - x["dpm"]).mean()
    assert distance(many) < 0.5 * distance(few)


def test_dim_sizes_are_completed_by_what_is_given():
    def completed(*argv):
        return train.complete(train.training_parser().parse_args(["--device", "cpu", "--backbone", "dim", *argv]))

    assert [getattr(completed(), name) for name in ("patch", "width", "depth")] == [4, 192, 6]
    args = completed("--dim-size", "L", "--depth", "3", "--patch", "8")
    assert (args.width, args.depth, args.patch) == (1024, 3, 8)
    assert args.dim is args.temporal is None  # the other network's options play no part
    args.width = 32
    assert sum(p.numel() for p in train.make_model(argparse.Namespace(**vars(args))).parameters()) < 1e6


def test_contradictory_choices_are_named():
    assert "--dim, --heads" in refuses("--backbone", "dim", "--dim", 32, "--heads", 2)
    assert "--temporal" in refuses("--backbone", "dim", "--temporal", "mamba")
    assert "--dim-size, --patch" in refuses("--dim-size", "S", "--patch", 2)
    assert "no effect" in refuses("--backbone", "dim", "--dim-size", "S", "--width", 32, "--depth", 2)
    assert "multiple of 8" in refuses("--backbone", "dim", "--width", 20)
    assert "--patch 3" in refuses("--backbone", "dim", "--patch", 3, "--size", 16)
    assert "give --eta 0" in refuses("--sampler", "dpm", "--eta", 1)
    assert "--class-cond" in refuses("--cond-drop", 0.2)
    assert "--class-cond" in refuses("--guidance", 2)
    run(*COMMON, *NETWORKS["dim"], "--frames", 2, "--steps", 1, "--out", "run")
    assert "--class-cond" in refuses("sample", "run", "--class", "bricks")
    assert "--class-cond" in refuses("sample", "run", "--guidance", 2)
    assert "--width (was 16)" in refuses("--resume", "run", "--width", 32)
    assert "--class-cond" in refuses("--resume", "run", "--class-cond")


def test_latents_have_any_number_of_channels_in_dim(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "latents").mkdir()
    for i in range(2):
        np.save(tmp_path / "latents" / f"{i}.npy", rng.standard_normal((4, 8, 8, 5)).astype(np.float32))
    run(*COMMON[2:], *NETWORKS["dim"], "--frames", 3, "--data", "latents", "--latents", "--steps", 1, "--out", "run")
    run("sample", "run", "--videos", 2, "--sampler", "dpm", "--device", "cpu", "--out", "drawn")
    assert samples("drawn").shape == (2, 3, 8, 8, 5) and samples("drawn").dtype == np.float32
    assert "not drawn" in refuses("sample", "run", "--fps", 4, "--device", "cpu")


@pytest.mark.parametrize("name", NETWORKS)
def test_no_parameter_is_left_out_of_training_with_classes(name):
    args = train.complete(train.training_parser().parse_args([*COMMON, *NETWORKS[name], "--class-cond"]))
    args.classes = ["a", "b"]
    model = train.make_model(args)
    model(torch.randn(2, 3, 2, 8, 8), torch.tensor([3, 200])).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
