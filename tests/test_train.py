"""The loop loses nothing, repeats itself, can be watched, and answers what is wrong with one sentence."""

import os
import pathlib
import re
import shutil
import signal

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from runs import (COMMON, DIM, ROOT, UNET, again, ends, log, own_place, refuses, run, start, steps_of,  # noqa: F401
                  told, wait_for, write_videos)  # fmt: skip

import fvd
import train

CLASSES = "--class-cond --guidance 3 --sampler dpm".split()


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A run with classes, of 6 steps, with checkpoints of the steps 4 and 6 and samples of 3 and 6."""
    out = tmp_path_factory.mktemp("once") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.signal, "signal", lambda *_: None)
        run(*DIM, "--class-cond", "--lr", 0.1, "--diffusion-steps", 64, "--steps", 6, "--save-every", 2,
            "--sample-every", 3, "--out", out)  # fmt: skip
    return out


@pytest.fixture
def trained(once):
    """A copy of that run, in run/."""
    return shutil.copytree(once, "run")


def load(out, step):
    return torch.load(f"{out}/checkpoint-{step:06d}.pt", weights_only=True)


def same(a, b, step):
    """Whether two runs have equal weights, averages, losses and samples."""
    states = [load(out, step) for out in (a, b)]
    sheets = [pathlib.Path(out, f"samples/step-{step:06d}.png").read_bytes() for out in (a, b)]
    equal = [torch.equal(states[0][key][k], states[1][key][k]) for key in ("model", "ema") for k in states[0][key]]
    return all(equal) and log(a) == log(b) and sheets[0] == sheets[1]


def drawn(out, *flags):
    """Samples of the run in run/."""
    again("sample", "run", "--out", out, *flags)
    return np.load(f"{out}/fake.npz")["videos"].astype(float)


# ---- What a run writes


def test_a_run_writes_sheets_gifs_and_mp4s_and_samples_without_its_data_into_folders_of_their_own(tmp_path):
    folder = write_videos(tmp_path / "v")
    for out in ("v", "v-2"):
        run(*DIM, "--data", folder, "--steps", 4, "--sample-every", 2)
        assert log(f"runs/{out}", "step") == [1, 2, 3, 4] and steps_of(f"runs/{out}") == [4]
    names = {f"{name}.{kind}" for name in ("data", "step-000002", "step-000004") for kind in "npz png gif mp4".split()}
    assert set(os.listdir("runs/v/samples")) == names
    assert len(iio.imread("runs/v/samples/step-000002.mp4", plugin="pyav")) == 3
    shutil.rmtree(folder)
    shutil.copytree("runs/v", "run")
    assert drawn("drawn", "--videos", 3, "--frames", 5).shape == (3, 5, 8, 8, 3)
    again("sample", "run", "--videos", 1, "--size", 16)
    again("sample", "run", "--videos", 1)
    assert np.load("run/sampled/fake.npz")["videos"].shape == (1, 3, 16, 16, 3)
    assert os.path.exists("run/sampled-2/fake.png")


def test_an_mp4_has_every_frame_of_a_still_and_of_odd_sides_and_a_sheet_a_row_per_video(tmp_path):
    for fps in (0.5, 60):
        with train.film(tmp_path / "a.mp4", fps) as append:
            append(np.full((3, 8, 9, 65, 3), 100, np.uint8))
        assert len(iio.imread(tmp_path / "a.mp4", plugin="pyav")) == 8
        assert iio.immeta(tmp_path / "a.mp4", plugin="pyav")["fps"] == fps
    videos = np.zeros((3, 5, 8, 8, 3), np.uint8)
    videos[1, 2] = 255
    with train.film(tmp_path / "a.mp4", 8) as append:
        append(videos)
    sheet = iio.imread(tmp_path / "a.png")
    assert sheet.shape == (3 * 68, 5 * 68, 3)
    assert (sheet[68:132, 136:200] == 255).all() and (sheet[:64, :64] == 0).all()


@pytest.mark.parametrize("data", ["maze", "splits", "folder"])
def test_real_videos_for_a_score_are_as_many_and_of_one_shape_and_held_out_if_they_can_be(tmp_path, data):
    for part, level in (("train", 10), ("test", 200)):
        folder = tmp_path / "v" / (part if data == "splits" else "all")
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{part}.npy", np.full((2, 6, 8, 8, 3), level, np.uint8))
    run(*DIM, "--data", "maze" if data == "maze" else "v", "--steps", 1, "--out", "run")
    again("sample", "run", "--videos", 2, "--real", 2, "--frames", 4)
    real, fake = ([*fvd.open_videos(f"run/sampled/{name}.npz")] for name in ("real", "fake"))
    frames = [np.stack([*fvd.read_frames(video)]) for video in real]
    assert len(real) == len(fake) == 2 and {len([*fvd.read_frames(video)]) for video in fake} == {4}
    if data == "maze":
        assert (frames[1] == train.maze_video(train.maze_seed("test", 1), 4, 8)).all()
    else:
        assert {int(frame.max()) for frame in frames} <= ({200} if data == "splits" else {10, 200})
        assert "more than there are" in refuses("sample", "run", "--real", 9)


def test_the_log_tells_gradient_rate_and_speed():
    run(*DIM, "--steps", 5, "--warmup", 4, "--lr", 1e-3, "--batch", 3, "--out", "run")
    assert np.allclose(log("run", "lr"), [1e-3 * min(1, k / 4) for k in range(1, 6)])
    assert min(log("run", "grad_norm")) > 0 and min(log("run", "videos_per_second")) > 0


def test_the_lines_in_the_readme_load_a_checkpoint_and_sample_by_hand(trained):
    lines = re.search("```python\n(import torch, vdm_ssm\n.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    os.makedirs("runs/maze")
    shutil.copy("run/checkpoint-000006.pt", re.search('load."(.*?)"', lines)[1])
    space = {}
    exec(lines, space)
    assert space["videos"].shape == (2, 3, 16, 16, 16) and space["videos"].abs().max() <= 1


def test_the_commands_of_the_readme_that_train_are_understood():
    found = re.findall(r"^    .*train\.py(.*)$", (ROOT / "README.md").read_text(), re.M)
    commands = [line.split() for line in found if "sample" not in line and "--resume" not in line]
    assert len(commands) > 4 and all(train.parse(argv)[0].steps for argv in commands)


# ---- A run is the same however it is cut up


@pytest.mark.parametrize("network", [UNET, [*DIM, *CLASSES]], ids=["unet", "dim with classes"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, network):
    for name in "xy":
        write_videos(tmp_path / "a" / name)
    common = [*network, "--data", "a", "--grad-accum", 2, "--sample-every", 3]
    run(*common, "--steps", 5, "--out", "whole")
    run(*common, "--steps", 2, "--out", "parts")
    again("--resume", "parts", "--steps", 5)
    assert same("parts", "whole", 5)


def test_a_run_killed_three_times_is_the_uninterrupted_one_bit_for_bit():
    begin = [*DIM, "--steps", 40, "--save-every", 2, "--sample-every", 9, "--workers", 1, "--out"]
    for kill in range(3):
        before = steps_of("killed")
        process = start(*(["--resume", "killed", "--workers", 1] if kill else [*begin, "killed"]))
        wait_for(lambda: steps_of("killed") != before, process)
        process.join(0.02 * kill)
        process.kill()
        assert ends(process) == -signal.SIGKILL
    pathlib.Path("killed/half.part").touch()
    with open("killed/log.jsonl", "a") as file:
        file.write('{"step": 9')
    again("--resume", "killed")
    run(*begin, "whole")
    assert same("killed", "whole", 40)
    assert sorted(os.listdir("killed/samples")) == sorted(os.listdir("whole/samples"))
    assert not list(pathlib.Path("killed").rglob("*.part"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_ends_the_run_after_its_step_and_saves_it(number):
    process = start(*DIM, "--steps", 10**6, "--workers", 1, "--out", "run")
    wait_for(lambda: len(log("run")) > 3, process)
    os.killpg(process.pid, number)  # its loader gets it as well
    assert ends(process) == 0 and "--resume run" in told()[-1], told()
    assert steps_of("run") == [log("run", "step")[-1]]


def test_a_second_signal_ends_the_run_at_once():
    process = start(*DIM, "--frames", 64, "--size", 64, "--batch", 64, "--out", "run")  # a step takes seconds
    wait_for(lambda: any("writes" in line for line in told()), process)
    process.join(0.5)
    while process.is_alive():
        os.kill(process.pid, signal.SIGTERM)
        process.join(0.1)
    assert ends(process) == -signal.SIGTERM and not steps_of("run") and not log("run")


def test_going_back_sets_aside_what_came_later_and_resuming_draws_what_is_due(trained):
    sheet = pathlib.Path("run/samples/step-000006.png")
    before = sheet.read_bytes()
    for place in ("run", "run/checkpoint-000004.pt", "run/checkpoint-000004.pt"):
        sheet.unlink()
        again("--resume", place)
        assert sheet.read_bytes() == before and log("run", "step") == [1, 2, 3, 4, 5, 6]
        assert steps_of("run") == [4, 6] and os.path.exists("run/checkpoint-000006.pt.old") == ("4" in place)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_goes_on(trained):
    path = pathlib.Path("run/checkpoint-000006.pt")
    for damage in (lambda: os.truncate(path, 1000), lambda: torch.save({"model": 1}, path),
                   lambda: path.unlink() or path.symlink_to("nowhere")):  # fmt: skip
        damage()
        for command in (["--resume", "run"], ["sample", "run"]):
            assert str(path) in refuses(*command)
    again("--resume", "run/checkpoint-000004.pt", "--steps", 5)
    assert log("run", "step") == [1, 2, 3, 4, 5]


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_is_named(tmp_path):
    target = tmp_path / "checkpoint.pt"
    target.write_text("old")
    with pytest.raises(OSError, match="checkpoint.pt cannot be written"), train.whole(target) as file:
        file.write(b"half")
        raise OSError(28, "No space left on device")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(trained, monkeypatch):
    nan = lambda self, x, *_: next(self.parameters()).sum() * float("nan") * torch.ones(len(x), x.shape[2])
    monkeypatch.setattr(train.GaussianDiffusion, "losses", nan)
    assert "lower --lr" in refuses("--resume", "run", "--steps", 30)
    assert steps_of("run") == [4, 6] and log("run", "step") == [1, 2, 3, 4, 5, 6]


def test_the_videos_of_a_step_may_be_dealt_out_anew_and_the_seed_decides_the_rest():
    run(*DIM, "--steps", 4, "--save-every", 2, "--batch", 4, "--out", "whole")
    again("--resume", "whole/checkpoint-000002.pt", "--batch", 2, "--grad-accum", 2)
    run(*DIM, "--steps", 4, "--batch", 1, "--grad-accum", 4, "--out", "parts")
    assert np.allclose(log("whole"), log("parts"), rtol=1e-5)
    assert "was 4" in refuses("--resume", "parts", "--steps", 5, "--batch", 3)
    run(*DIM, "--steps", 4, "--batch", 4, "--seed", 1, "--out", "other")
    assert not np.allclose(log("other"), log("parts"), rtol=1e-3)


def test_what_an_item_draws_does_not_depend_on_its_company():
    args = train.parse(DIM)[0]
    together, alone = train.draw([7, 8], (2, 3), args, "cpu"), train.draw([8], (2, 3), args, "cpu")
    assert all(torch.equal(a[1], b[0]) for a, b in zip(together, alone))
    t, eps, keep = train.draw(range(2000), (16,), args, "cpu")
    assert (t // 64).bincount(minlength=4).sub(500).abs().max() < 80 and abs(keep.float().mean() - 0.9) < 0.03
    assert abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02


def test_clipping_bounds_the_gradient_and_zero_means_no_limit():
    for clip in ("0", "1e-3"):
        run(*DIM, "--steps", 1, "--clip", clip, "--out", clip)
        state = load(clip, 1)["optimizer"]["state"]
        norm = 10 * torch.cat([s["exp_avg"].flatten() for s in state.values()]).norm()  # Adam's first is a tenth
        assert np.isclose(norm, log(clip, "grad_norm")[0] if clip == "0" else 1e-3, rtol=1e-3)


def test_the_average_of_the_weights_is_plain_at_first_and_slow_later():
    weights = {}
    for ema in (0.999, 0.0):
        run(*DIM, "--steps", 2, "--save-every", 1, "--ema", ema, "--out", str(ema))
        weights[ema] = [[load(ema, k)[part]["patch_in.weight"] for part in ("model", "ema")] for k in (1, 2)]
    assert all(torch.equal(model, average) for model, average in weights[0.0])
    (a, first), (b, second) = weights[0.999]
    assert torch.equal(a, first) and torch.allclose(second, a + (b - a) * 9 / 11, atol=1e-6)  # then 3/12, ...


# ---- Options


@pytest.mark.parametrize("network", [UNET, DIM], ids=["unet", "dim"])
def test_recomputing_changes_nothing_and_bfloat16_only_the_rounding(network):
    for out, flags in (("plain", []), ("recomputed", ["--recompute"]), ("rounded", ["--amp"])):
        run(*network, "--steps", 2, *flags, "--out", out)
    assert log("recomputed") == log("plain") != log("rounded") and np.allclose(log("rounded"), log("plain"), rtol=0.05)
    again("--resume", "rounded", "--no-amp", "--recompute", "--steps", 3)
    assert all(p.dtype == torch.float32 for p in load("rounded", 3)["model"].values() if p.is_floating_point())


def test_every_block_is_compiled_and_the_names_of_weights_stay(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(type(self).__name__))
    run(*UNET, "--steps", 1, "--compile", "--out", "run")
    assert set(compiled) == {"ResBlock", "OverSpace", "OverTime"}
    again("--resume", "run", "--no-compile", "--steps", 2)


@pytest.mark.parametrize("drop", [0, 1, 0.3])
def test_the_network_is_told_the_class_of_each_video_but_for_a_share(drop, monkeypatch):
    heard, losses = [], train.GaussianDiffusion.losses
    spy = lambda self, x, t, eps, cond, keep: heard.append((cond, keep)) or losses(self, x, t, eps, cond, keep)
    monkeypatch.setattr(train.GaussianDiffusion, "losses", spy)
    run(*DIM, "--batch", 64, "--frames", 1, "--class-cond", "--cond-drop", drop, "--steps", 3, "--out", "run")
    cond, keep = map(torch.cat, zip(*heard))
    styles = [train.maze_style(train.maze_seed("train", i)) for i in range(len(cond))]
    assert torch.equal(cond, torch.eye(3)[styles]) and abs(1 - keep.float().mean() - drop) < 0.1


def test_classes_are_drawn_in_turn_or_one_alone_and_guided(trained):
    boards, bricks, four = ["--class", "boards"], ["--class", "bricks"], ["--videos", 4]
    turn, alone, guided = drawn("a", *four), drawn("b", *four, *boards), drawn("c", *four, *boards, "--guidance", 4)
    assert [(a == b).all() for a, b in zip(turn, alone)] == [False, True, False, False] and (guided != alone).any()
    assert (drawn("d", "--guidance", 0) == drawn("e", "--guidance", 0, *bricks)).all()
    assert "bricks" in refuses("sample", "run", "--class", "marble")


def test_samplers_agree_on_where_many_steps_lead_and_differ_in_few(trained):
    distance = lambda steps: np.abs(drawn(f"ddim{steps}", "--sample-steps", steps)
                                    - drawn(f"dpm{steps}", "--sample-steps", steps, "--sampler", "dpm")).mean()
    assert distance(64) < 0.5 * distance(3)


def test_a_run_follows_moved_data_and_notices_changed_data(tmp_path):
    folder = write_videos(tmp_path / "v")
    run(*DIM, "--data", folder, "--steps", 1, "--out", "run")
    shutil.copytree(folder, "copy", copy_function=shutil.copyfile)  # with new times
    again("--resume", "run", "--data", "copy", "--steps", 2)
    assert "lies in --data" in refuses("sample", "run", "--data", "copy", "--out", "copy/drawn")
    np.save("copy/new.npy", np.zeros((6, 8, 8, 3), np.uint8))
    assert "no longer holds the videos" in refuses("--resume", "run", "--steps", 3)


# ---- What is wrong

WRONG = [  # command line, what the sentence names
    ("--batch 0", "--batch"), ("--lr nan", "--lr"), ("--steps many", "--steps"), ("--ema 2", "--ema"),
    ("--dim-mults 1,x", "--dim-mults"), ("--temporal rnn", "bi-mamba"), ("--rec", "--rec"), ("--seed -1", "--seed"),
    ("--size 9", "multiple of"), ("--width 20", "multiple of 8"), ("--device quantum", "--device"),
    ("--device meta", "--device"), ("--guidance 2", "--class-cond"), ("--class bricks", "--class bricks"),
    ("--class-cond --cond-drop 0 --guidance 2", "--cond-drop"), ("--data nowhere", "nowhere"),
    ("--data empty", "no video"), ("--data bad", "x.mp4"), ("--data videos --frames 7", "at most 6"),
    ("--data videos --stride 3", "at most 6"), ("--data videos --split test", "--split test"),
    ("--data videos --out videos/run", "lies in --data"),
    ("--resume nowhere", "nowhere"), ("--resume empty", "empty"), ("--resume run --out other", "--out"),
    ("--resume run --lr 0.5", "--lr"), ("--resume run --width 32", "--width"),
    ("--out run", "--resume run"), ("sample run --width 32", "--width"),
    ("sample run --out run", "run exists"), ("--real 3", "--real"), ("sample run --size 9", "multiple of"),
]  # fmt: skip


def test_a_wrong_command_line_is_one_sentence_with_exit_code_2_and_writes_nothing(tmp_path, capsys, trained):
    for folder in ("empty", "bad"):
        os.mkdir(folder)
    pathlib.Path("bad/x.mp4").write_bytes(b"nothing")
    write_videos(tmp_path / "videos")
    files = lambda: sorted(str(path) for path in pathlib.Path().rglob("*") if "cache" not in path.parts)
    before = files()
    for line, named in WRONG:
        saved = any(word in line for word in ("--resume", "sample run"))
        argv = [*([] if saved else DIM), *line.split(), *([] if "--device" in line else ["--device", "cpu"])]
        try:
            run(*argv)
            pytest.fail(f"{line} is accepted")
        except SystemExit as error:  # argparse has told why
            sentence, code = capsys.readouterr().err.splitlines()[-1], error.code
        except (ValueError, OSError) as error:
            sentence, code = str(error), 2
        assert named in sentence and code == 2 and "\n" not in sentence, f"{line}: {sentence}"
    assert [file for file in files() if file not in before and file != "runs"] == []


def test_the_command_ends_with_one_sentence_and_code_2_even_if_its_loaders_ignore_signals(tmp_path):
    assert ends(start(*COMMON, "--data", "nowhere")) == 2
    assert len(told()) == 1 and told()[0].startswith("train.py: ")
    write_videos(tmp_path / "v")
    process = start(*DIM, "--data", "v", "--steps", 10**6, "--workers", 1, "--out", "run")
    wait_for(lambda: log("run"), process)
    shutil.rmtree("cache")
    assert ends(process) == 2 and re.search(r"train.py: .*cache/\w+\.npy", told()[-1])
