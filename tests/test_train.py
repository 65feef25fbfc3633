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
from runs import COMMON, DIM, ROOT, UNET, again, ends, log, refuses, run, start
from runs import own_place, steps_of, told, wait_for, write_videos  # noqa: F401

import train

CLASSES = "--class-cond --guidance 3 --sampler dpm".split()


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A run with classes, of 6 steps, with checkpoints of the steps 4 and 6 and samples of 3 and 6."""
    out = tmp_path_factory.mktemp("once") / "run"
    run(*DIM, *"--class-cond --lr 0.1 --steps 6 --save-every 2 --sample-every 3".split(), "--out", out)
    return out


@pytest.fixture
def trained(once):
    """A copy of that run, in run/."""
    return shutil.copytree(once, "run")


def load(out, step):
    return torch.load(f"{out}/checkpoint-{step:06d}.pt", weights_only=True)


def same(a, b, step):
    """Whether two runs have equal weights, averages, losses and samples."""
    one, two = load(a, step), load(b, step)
    weights = all(torch.equal(one[key][k], two[key][k]) for key in ("model", "ema") for k in one[key])
    sheets = [pathlib.Path(out, f"samples/step-{step:06d}.png").read_bytes() for out in (a, b)]
    return weights and log(a) == log(b) and sheets[0] == sheets[1]


def drawn(out, *flags):
    """Samples of the run in run/."""
    again("sample", "run", "--out", out, *flags)
    return np.load(f"{out}/fake.npz")["videos"].astype(float)


def test_a_run_writes_sheets_gifs_and_mp4s_and_samples_without_its_data_into_folders_of_their_own(tmp_path):
    folder = write_videos(tmp_path / "v")
    for out in ("v", "v-2"):
        run(*DIM, "--data", folder, "--steps", 4, "--sample-every", 2)
        assert log(f"runs/{out}", "step") == [1, 2, 3, 4] and steps_of(f"runs/{out}") == [4]
        assert min(log(f"runs/{out}", "videos_per_second")) > 0
    names = {f"{name}.{kind}" for name in ("data", "step-000002", "step-000004")
             for kind in ("npz", "png", "gif", "mp4")}  # fmt: skip
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
    videos = np.zeros((3, 8, 9, 65, 3), np.uint8)
    videos[1] = 255
    for fps in (0.5, 60):
        with train.film(tmp_path / "a.mp4", fps) as append:
            append(videos)
        assert len(iio.imread(tmp_path / "a.mp4", plugin="pyav")) == 8
        assert iio.immeta(tmp_path / "a.mp4", plugin="pyav")["fps"] == fps
    with pytest.raises(ValueError, match="no frame"), train.film(tmp_path / "b.mp4", 8):
        pass
    assert sorted(os.listdir(tmp_path)) == ["a.gif", "a.mp4", "a.png"]
    sheet = iio.imread(tmp_path / "a.png")
    assert sheet.shape == (36, 548, 3) and (sheet[13:22, :65] == 255).all() and (sheet[:9, :65] == 0).all()


@pytest.mark.parametrize("data, level", [("maze", None), ("v", 200), ("v/test", 200)])
def test_real_videos_are_as_many_as_wanted_of_one_shape_and_held_out_if_they_can_be(data, level):
    for part, grey in (("train", 10), ("test", 200)):
        os.makedirs(f"v/{part}")
        np.save(f"v/{part}/0.npy", np.full((2, 6, 8, 8, 3), grey, np.uint8))
    run(*DIM, "--data", data, "--steps", 1, "--out", "run")
    again("sample", "run", "--videos", 2, "--real", 2, "--frames", 4)
    real, fake = (np.load(f"run/sampled/{name}.npz")["videos"] for name in ("real", "fake"))
    assert real.shape == fake.shape == (2, 4, 8, 8, 3)
    if data == "maze":
        assert (real[1] == train.maze_video(train.maze_seed("test", 1), 4, 8)).all()
    else:
        assert (real == level).all() and "more than there are" in refuses("sample", "run", "--real", 9)


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


@pytest.mark.parametrize("network", [[*UNET, "--causal", "--actions", "--data", "maze"], [*DIM, *CLASSES]],
                         ids=["causal with actions", "dim with classes"])  # fmt: skip
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, network):
    for name in "xy":
        write_videos(tmp_path / "a" / name)
    common = ["--data", "a", "--grad-accum", 2, "--sample-every", 3, *network]
    run(*common, "--steps", 5, "--out", "whole")
    run(*common, "--steps", 2, "--out", "parts")
    again("--resume", "parts", "--steps", 5)
    assert same("parts", "whole", 5)


def test_a_killed_run_is_the_uninterrupted_one_bit_for_bit():
    command = [*DIM, "--steps", 40, "--save-every", 2, "--sample-every", 9, "--workers", 1, "--out"]
    process = start(*command, "killed")
    wait_for(lambda: steps_of("killed"), process)
    process.kill()
    assert ends(process) == -signal.SIGKILL
    pathlib.Path("killed/half.part").touch()
    with open("killed/log.jsonl", "a") as file:
        file.write('{"step": 9')
    again("--resume", "killed")
    run(*command, "whole")
    assert same("killed", "whole", 40)
    assert sorted(os.listdir("killed/samples")) == sorted(os.listdir("whole/samples"))
    assert not list(pathlib.Path("killed").rglob("*.part"))


def test_a_signal_to_the_whole_group_ends_the_run_after_its_step_and_saves_it():
    process = start(*DIM, "--steps", 10**6, "--workers", 1, "--grad-accum", 9, "--out", "run")
    wait_for(lambda: len(log("run")) > 3, process)
    os.killpg(process.pid, signal.SIGINT)  # its loader gets it as well
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
    shutil.copy(path, "run/checkpoint-best7.pt")  # no step of the run
    for damage in (lambda: os.truncate(path, 1000), lambda: torch.save({"model": 1}, path),
                   lambda: path.unlink() or path.symlink_to("nowhere")):  # fmt: skip
        damage()
        for command in (["--resume", "run"], ["sample", "run"]):
            assert str(path) in refuses(*command)
    again("--resume", "run/checkpoint-000004.pt", "--steps", 5)
    assert log("run", "step") == [1, 2, 3, 4, 5]


def test_a_file_that_cannot_be_written_leaves_the_old_one():
    target = pathlib.Path("checkpoint.pt")
    target.write_text("old")
    with pytest.raises(OSError, match="No space left"), train.whole(target) as file:
        file.write(b"half")
        raise OSError(28, "No space left on device")
    assert target.read_text() == "old" and os.listdir() == ["checkpoint.pt"]


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved():
    assert "lower --lr" in refuses(*DIM, *"--lr 1e30 --warmup 0 --steps 9 --save-every 1 --out run".split())
    assert log("run", "step") == steps_of("run") == [1]


def test_the_videos_of_a_step_may_be_dealt_out_anew_and_the_seed_decides_the_rest():
    run(*DIM, "--steps", 4, "--save-every", 2, "--batch", 4, "--out", "whole")
    again("--resume", "whole/checkpoint-000002.pt", "--batch", 2, "--grad-accum", 2)
    run(*DIM, "--steps", 4, "--batch", 1, "--grad-accum", 4, "--out", "parts")
    assert np.allclose(log("whole"), log("parts"), rtol=1e-5)
    assert "was 4" in refuses("--resume", "parts", "--steps", 5, "--batch", 3)
    run(*DIM, "--steps", 4, "--batch", 4, "--seed", 1, "--out", "other")
    assert not np.allclose(log("other"), log("parts"), rtol=1e-3)


@pytest.mark.parametrize("flag", ["--no-frame-noise", "--frame-noise", "--causal"])
def test_an_item_draws_its_levels_noise_and_the_hiding_of_its_condition_whatever_its_company(flag):
    args = train.parse([flag, "--device", "cpu"])[0]
    t, eps, keep = together = train.draw(range(1000), (2, 6), args)
    assert all(torch.equal(a[0], b[7]) for a, b in zip(train.draw([7], (2, 6), args), together))
    assert t.shape == ((1000,) if flag == "--no-frame-noise" else (1000, 6))
    assert t.min() < 5 and t.max() > 250 and abs(t.float().mean() - 127.5) < 10
    rows = t.view(1000, -1).T.numpy()
    assert abs(np.corrcoef(rows) - np.eye(len(rows))).max() < 0.15
    assert abs(eps.mean()) < 0.03 and abs(eps.std() - 1) < 0.03 and abs(keep.float().mean() - 0.9) < 0.03


def test_clipping_bounds_the_gradient_that_the_log_tells_and_zero_means_no_limit():
    for clip in ("0", "1e-3"):
        run(*DIM, "--steps", 1, "--clip", clip, "--out", clip)
        averages = [s["exp_avg"].flatten() for s in load(clip, 1)["optimizer"]["state"].values()]
        norm = torch.cat(averages).norm() / 0.1  # Adam's first average is a tenth of the gradient
        assert np.isclose(norm, log(clip, "grad_norm")[0] if clip == "0" else 1e-3, rtol=1e-3)


def test_the_rate_rises_and_falls_and_the_average_of_the_weights_is_plain_at_first_and_slow_later():
    weights = {}
    for ema in (0.999, 0.0):
        schedule = "--steps 4 --lr 1e-3 --warmup 2 --cooldown 0.5 --save-every 1 --keep 4".split()
        run(*DIM, *schedule, "--ema", ema, "--out", str(ema))
        assert np.allclose(log(ema, "lr"), [5e-4, 1e-3, 1e-3, 5e-4])
        weights[ema] = [[load(ema, k)[part]["patch_in.weight"] for part in ("model", "ema")] for k in (1, 2)]
    assert all(torch.equal(model, average) for model, average in weights[0.0])
    (a, first), (b, second) = weights[0.999]
    assert torch.equal(a, first) and torch.allclose(second, a + (b - a) * 9 / 11, atol=1e-6)  # then 3/12, ...


def test_recomputing_and_compiling_change_nothing_and_bfloat16_only_the_rounding():
    with torch.compiler.set_stance("force_eager"):  # without kernels, which take minutes
        for out in ("recompute", "compile", "amp"):
            run(*DIM, "--steps", 2, f"--{out}", "--out", out)
            again("--resume", out, f"--no-{out}", "--steps", 4)
        run(*DIM, "--steps", 4, "--out", "plain")
    assert log("recompute") == log("compile") == log("plain") != log("amp")
    assert np.allclose(log("amp"), log("plain"), rtol=0.05)
    assert {p.dtype for p in load("amp", 4)["model"].values()} == {torch.float32}


def test_the_network_is_told_the_class_of_each_video_but_for_a_share(monkeypatch):
    heard, losses = [], train.GaussianDiffusion.losses
    spy = lambda self, *inputs: heard.append(inputs[-2:]) or losses(self, *inputs)  # cond, keep
    monkeypatch.setattr(train.GaussianDiffusion, "losses", spy)
    run(*DIM, "--batch", 64, "--frames", 1, "--class-cond", "--cond-drop", 0.3, "--steps", 3, "--out", "run")
    cond, keep = map(torch.cat, zip(*heard))
    styles = [train.maze_style(train.maze_seed("train", i)) for i in range(len(cond))]
    assert torch.equal(cond[:, 0], torch.eye(3)[styles]) and abs(1 - keep.float().mean() - 0.3) < 0.1


def test_classes_are_drawn_in_turn_or_one_alone_guided_and_by_either_sampler(trained):
    four = ["--videos", 4, "--sample-steps", 3]
    boards = [*four, "--class", "boards"]
    turn, alone, guided = drawn("a", *four), drawn("b", *boards), drawn("c", *boards, "--guidance", 4)
    assert [(a == b).all() for a, b in zip(turn, alone)] == [False, True, False, False]
    assert (guided != alone).any()
    assert all((drawn(name, *boards, "--sampler", name) != alone).any() for name in ("ddim", "ddpm"))
    assert (drawn("e", *boards, "--guidance", 0) == drawn("f", *four, "--guidance", 0)).all()


def test_a_run_follows_moved_data_and_notices_changed_data(tmp_path):
    folder = write_videos(tmp_path / "v")
    run(*DIM, "--data", folder, "--steps", 1, "--out", "run")
    shutil.copytree(folder, "copy", copy_function=shutil.copyfile)  # with new times
    again("--resume", "run", "--data", "copy", "--steps", 2)
    np.save("copy/new.npy", np.zeros((6, 8, 8, 3), np.uint8))
    assert "no longer holds the videos" in refuses("--resume", "run", "--steps", 3)


WRONG = [  # command line, what the sentence names
    ("--batch 0", "--batch"), ("--lr nan", "--lr"), ("--ema 2", "--ema"), ("--dim-mults 1,x", "--dim-mults"),
    ("--temporal rnn", "bi-mamba"), ("--rec", "--rec"), ("--size 9", "multiple of"), ("--width 20", "of 8"),
    ("--device quantum", "--device"), ("--device meta", "--device"), ("--guidance 2", "--class-cond"),
    ("--class-cond --cond-drop 0 --guidance 2", "--cond-drop"), ("--class red", "--class red"),
    ("--data nowhere", "nowhere"), ("--data empty", "no video"), ("--data bad", "x.mp4"),
    ("--data videos --frames 7", "0 of 3 videos"), ("--data videos --split test", "--split test"),
    ("--data videos --out videos/run", "lies in --data"), ("--actions", "--causal"), ("--causal", "unet"),
    ("--backbone unet --causal --temporal bi-mamba", "mamba"), ("--resume nowhere", "nowhere"),
    ("--resume empty", "empty"), ("--resume run --out other", "--out"), ("--resume run --lr 0.5", "--lr"),
    ("--out run", "--resume run"), ("sample run --width 32", "--width"),
    ("sample run --out run", "run exists"), ("sample run --class red", "bricks"), ("--real 3", "--real"),
    ("sample run --size 9", "multiple of"), ("--after x.mp4", "--after"),
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
    late, _ = train.parse([*DIM, "--out", "late"])
    os.mkdir("late")  # by a run that began a moment before
    pytest.raises(FileExistsError, train.train, late)


def test_the_command_ends_with_one_sentence_and_code_2_even_if_its_loaders_ignore_signals(tmp_path):
    assert ends(start(*COMMON, "--data", "nowhere")) == 2
    assert len(told()) == 1 and told()[0].startswith("train.py: ")
    write_videos(tmp_path / "v")
    process = start(*DIM, "--data", "v", "--steps", 10**6, "--workers", 1, "--out", "run")
    wait_for(lambda: log("run"), process)
    shutil.rmtree("cache")
    assert ends(process) == 2 and re.search(r"train.py: .*cache/\w+\.npy", told()[-1])
