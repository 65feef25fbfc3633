"""The loop loses nothing, repeats itself, can be watched, and answers what is wrong with one sentence."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from test_data import write_videos

import fvd
import train

ROOT = pathlib.Path(__file__).parent.parent
COMMON = "--size 8 --frames 3 --batch 2 --sample-steps 2 --videos 2 --device cpu".split()
UNET = "--dim 8 --dim-mults 1,2 --heads 1 --temporal s6-glu".split()
DIM = "--backbone dim --patch 4 --width 16 --depth 1".split()
CLASSES = "--class-cond --guidance 3 --sampler dpm".split()


@pytest.fixture(autouse=True)
def quiet_signals_and_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)


def run(*argv, network=DIM):
    """A small run in this process."""
    train.main([*COMMON, *network, *map(str, argv)])


def again(*argv):
    """A command that takes its arguments from a run."""
    train.main([*map(str, argv), "--device", "cpu"])


def start(*argv):
    """A command in a process, and a process group, of its own."""
    command = [sys.executable, ROOT / "train.py", *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def refuses(*argv):
    """What a command that must fail says, in one sentence."""
    with pytest.raises((ValueError, OSError)) as error:
        train.main([*map(str, argv)])
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def log(out, key="loss"):
    return [json.loads(line)[key] for line in pathlib.Path(out, "log.jsonl").read_text().splitlines()]


def steps_of(out):
    """Steps of the checkpoints that a run holds."""
    return sorted(int(path.stem[-6:]) for path in pathlib.Path(out).glob("*.pt"))


def same(a, b, step):
    """Whether two runs have equal weights, averages, losses and samples."""
    states = [torch.load(f"{out}/checkpoint-{step:06d}.pt", weights_only=True) for out in (a, b)]
    sheets = [pathlib.Path(out, f"samples/step-{step:06d}.png").read_bytes() for out in (a, b)]
    equal = [torch.equal(states[0][key][k], states[1][key][k]) for key in ("model", "ema") for k in states[0][key]]
    return all(equal) and log(a) == log(b) and sheets[0] == sheets[1]


# ---- What a run writes


def test_a_run_writes_sheets_gifs_and_mp4s_and_samples_without_its_data(tmp_path):
    folder = write_videos(tmp_path / "v")
    run("--data", folder, "--steps", 4, "--sample-every", 2, "--out", "run")
    assert log("run", "step") == [1, 2, 3, 4] and steps_of("run") == [4]
    names = {f"step-00000{k}.{kind}" for k in (2, 4) for kind in ("png", "gif", "mp4")}
    assert set(os.listdir("run/samples")) == names
    assert len(iio.imread("run/samples/step-000002.mp4", plugin="pyav")) == 3
    shutil.rmtree(folder)
    again("sample", "run", "--videos", 3, "--frames", 5, "--out", "drawn")
    again("sample", "run", "--videos", 1, "--size", 16)
    again("sample", "run", "--videos", 1)
    assert np.load("drawn/fake.npz")["videos"].shape == (3, 5, 8, 8, 3)
    assert np.load("run/sampled/fake.npz")["videos"].shape == (1, 3, 16, 16, 3)
    assert os.path.exists("run/sampled-2/sheet.png")


def test_an_mp4_has_every_frame_at_any_rate_even_of_a_still_and_of_odd_sides(tmp_path):
    for fps in (0.5, 60):
        train.write_pictures(tmp_path / "a", np.full((3, 8, 9, 65, 3), 100, np.uint8), fps)
        assert len(iio.imread(tmp_path / "a.mp4", plugin="pyav")) == 8
        assert iio.immeta(tmp_path / "a.mp4", plugin="pyav")["fps"] == fps


def test_a_sheet_has_a_row_per_video(tmp_path):
    videos = np.zeros((3, 5, 8, 8, 3), np.uint8)
    videos[1, 2] = 255
    train.write_pictures(tmp_path / "a", videos, 8)
    sheet = iio.imread(tmp_path / "a.png")
    assert sheet.shape == (3 * 68, 5 * 68, 3)
    assert (sheet[68:132, 136:200] == 255).all() and (sheet[:64, :64] == 0).all()


@pytest.mark.parametrize("data", ["maze", "splits", "folder"])
def test_real_videos_for_a_score_are_as_many_and_of_one_shape_and_held_out_if_they_can_be(tmp_path, data):
    if data != "maze":
        for part, level in (("train", 10), ("test", 200)):
            (tmp_path / "v" / (part if data == "splits" else "all")).mkdir(parents=True, exist_ok=True)
            array = np.full((2, 6, 8, 8, 3), level, np.uint8)
            np.save(tmp_path / "v" / (part if data == "splits" else "all") / f"{part}.npy", array)
    run("--data", "maze" if data == "maze" else tmp_path / "v", "--steps", 1, "--out", "run")
    again("sample", "run", "--videos", 2, "--real", 2, "--frames", 4)
    real, fake = ([*fvd.open_videos(f"run/sampled/{name}.npz")] for name in ("real", "fake"))
    frames = [np.stack([*fvd.read_frames(video)]) for video in real]
    assert len(real) == len(fake) == 2 and {len([*fvd.read_frames(video)]) for video in fake} == {4}
    if data == "maze":
        assert (frames[1] == train.maze_video(train.maze_seed("test", 1), 4, 8)).all()
    else:
        assert {int(frame.max()) for frame in frames} <= ({200} if data == "splits" else {10, 200})
        assert "more than there are" in refuses("sample", "run", "--real", 9, "--device", "cpu")


def test_the_log_tells_loss_by_noise_gradient_rate_and_speed():
    run("--steps", 5, "--warmup", 4, "--lr", 1e-3, "--batch", 3, "--out", "run")
    assert np.allclose(log("run", "lr"), [1e-3 * min(1, k / 4) for k in range(1, 6)])
    assert min(log("run", "grad_norm")) > 0 and min(log("run", "videos_per_second")) > 0
    args = train.parse([*COMMON, *DIM])[0]
    t = train.draw(range(3), (1,), args, "cpu")[0]
    counts, means = [int((t // 64 == q).sum()) for q in range(4)], log("run", "loss_by_noise")[0]
    assert [mean is not None for mean in means] == [count > 0 for count in counts]
    assert abs(sum(n * mean for n, mean in zip(counts, means) if n) / 3 - log("run")[0]) < 1e-6


def test_six_lines_load_a_checkpoint_and_sample_by_hand():
    run("--steps", 2, "--out", "runs/maze", network=UNET)
    lines = """
import torch, vdm_ssm
checkpoint = torch.load("runs/maze/checkpoint-000002.pt", weights_only=True)
model = getattr(vdm_ssm, checkpoint["network"])(**checkpoint["network_args"])  # UNet3D or DiM
model.load_state_dict(checkpoint["ema"])
diffusion = vdm_ssm.GaussianDiffusion(model, **checkpoint["diffusion_args"])
videos = diffusion.sample(torch.randn(2, 3, 8, 16, 16), steps=50)  # (b, 3, frames, height, width) in [-1, 1]
"""
    space = {}
    exec(lines, space)
    assert space["videos"].shape == (2, 3, 8, 16, 16) and space["videos"].abs().max() <= 1


# ---- A run is the same however it is cut up


@pytest.mark.parametrize("network", [UNET, [*DIM, *CLASSES]], ids=["unet", "dim with classes"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, network):
    common = ["--data", write_videos(tmp_path / "a" / "x").parent, "--grad-accum", 2, "--sample-every", 3]
    write_videos(tmp_path / "a" / "y")
    run(*common, "--steps", 5, "--out", "whole", network=network)
    run(*common, "--steps", 2, "--out", "parts", network=network)
    again("--resume", "parts", "--steps", 5)
    assert same("parts", "whole", 5)


def test_a_run_killed_three_times_is_the_uninterrupted_one_bit_for_bit():
    begin = [*COMMON, *DIM, "--steps", 24, "--save-every", 2, "--sample-every", 9, "--workers", 1]
    for kill in range(3):
        before = steps_of("killed") if kill else []
        process = start(*(["--resume", "killed", "--workers", 1] if kill else [*begin, "--out", "killed"]))
        while steps_of("killed") == before:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        time.sleep(0.02 * kill)
        process.kill()
        process.communicate()  # ends when the loader's process has noticed, too
    pathlib.Path("killed/half.part").touch()
    with open("killed/log.jsonl", "a") as file:
        file.write('{"step": 9')
    again("--resume", "killed")
    train.main(list(map(str, [*begin, "--out", "whole"])))
    assert same("killed", "whole", 24)
    assert sorted(os.listdir("killed/samples")) == sorted(os.listdir("whole/samples"))
    assert not list(pathlib.Path("killed").rglob("*.part"))


def test_samples_that_a_kill_left_out_are_drawn_by_resuming():
    run("--steps", 2, "--out", "run")
    sheet = pathlib.Path("run/samples/step-000002.png")
    drawn = sheet.read_bytes()
    sheet.unlink()
    again("--resume", "run")
    assert sheet.read_bytes() == drawn and log("run", "step") == [1, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_ends_the_run_after_its_step_and_saves_it(number):
    process = start(*COMMON, *DIM, "--steps", 10**6, "--workers", 1, "--out", "run")
    while not (os.path.exists("run/log.jsonl") and len(log("run")) > 3):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    os.killpg(process.pid, number)  # its loader gets it as well
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume run" in output, errors
    assert steps_of("run") == [log("run", "step")[-1]]


def test_a_second_signal_ends_the_run_at_once(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import os, signal, train, vdm_ssm\n" \
           "losses = lambda *_: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]\n" \
           "vdm_ssm.GaussianDiffusion.losses = losses; train.main(sys.argv[1:])"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *COMMON, *DIM, "--out", "run"], capture_output=True)
    assert done.returncode == -signal.SIGTERM and not steps_of("run")


def test_going_back_to_a_checkpoint_sets_aside_what_came_later():
    run("--steps", 6, "--save-every", 2, "--sample-every", 3, "--keep", 2, "--out", "run")
    assert steps_of("run") == [4, 6]
    again("--resume", "run/checkpoint-000004.pt", "--steps", 5)
    assert log("run", "step") == [1, 2, 3, 4, 5] and steps_of("run") == [4, 5]
    assert os.path.exists("run/checkpoint-000006.pt.old") and os.path.exists("run/samples/step-000006.png.old")


@pytest.mark.parametrize("damage", ["cut", "foreign", "link"])
def test_a_damaged_checkpoint_is_named_with_the_one_before_it(damage):
    run("--steps", 4, "--save-every", 2, "--out", "run")
    path = pathlib.Path("run/checkpoint-000004.pt")
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:1000])
    elif damage == "link":
        path.symlink_to("nowhere")
    else:
        torch.save({"model": 1}, path)
    for command in (["--resume", "run"], ["sample", "run"]):
        assert "run/checkpoint-000004.pt" in refuses(*command, "--device", "cpu")
    assert damage == "link" or "run/checkpoint-000002.pt" in refuses("--resume", "run")
    again("--resume", "run/checkpoint-000002.pt", "--steps", 3)
    assert log("run", "step") == [1, 2, 3]


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_is_named(tmp_path):
    resource = pytest.importorskip("resource")
    target, limits = tmp_path / "checkpoint.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    target.write_text("old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, limits[1]))
    try:
        with pytest.raises(OSError, match="checkpoint.pt cannot be written"):
            with train.whole(target) as file:
                file.write(bytes(10**6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(monkeypatch):
    run("--steps", 2, "--out", "run")
    nan = lambda self, x, *_: next(self.parameters()).sum() * float("nan") * torch.ones(len(x))
    monkeypatch.setattr(train.GaussianDiffusion, "losses", nan)
    assert "lower --lr" in refuses("--resume", "run", "--steps", 30, "--device", "cpu")
    assert steps_of("run") == [2] and log("run", "step") == [1, 2]


def test_the_videos_of_a_step_may_be_dealt_out_anew_and_the_seed_decides_the_rest():
    run("--steps", 4, "--save-every", 2, "--batch", 4, "--out", "whole")
    again("--resume", "whole/checkpoint-000002.pt", "--batch", 2, "--grad-accum", 2)
    run("--steps", 4, "--batch", 1, "--grad-accum", 4, "--out", "parts")
    assert np.allclose(log("whole"), log("parts"), rtol=1e-5)
    assert "was 4" in refuses("--resume", "parts", "--steps", 5, "--batch", 3, "--device", "cpu")
    run("--steps", 4, "--batch", 4, "--seed", 1, "--out", "other")
    assert not np.allclose(log("other"), log("parts"), rtol=1e-3)


def test_what_an_item_draws_does_not_depend_on_its_company():
    args = train.parse([*COMMON, *DIM])[0]
    together, alone = train.draw([7, 8], (2, 3), args, "cpu"), train.draw([8], (2, 3), args, "cpu")
    assert all(torch.equal(a[1], b[0]) for a, b in zip(together, alone))
    t, eps, keep = train.draw(range(2000), (16,), args, "cpu")
    assert (t // 64).bincount(minlength=4).sub(500).abs().max() < 80 and abs(keep.float().mean() - 0.9) < 0.03
    assert abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02


def test_clipping_bounds_the_gradient_and_zero_means_no_limit():
    for clip in ("0", "1e-3"):
        run("--steps", 1, "--clip", clip, "--out", clip)
        state = torch.load(f"{clip}/checkpoint-000001.pt", weights_only=True)["optimizer"]["state"]
        norm = 10 * torch.cat([s["exp_avg"].flatten() for s in state.values()]).norm()  # Adam's first is a tenth
        assert np.isclose(norm, log(clip, "grad_norm")[0] if clip == "0" else 1e-3, rtol=1e-3)


def test_the_average_of_the_weights_is_plain_at_first_and_slow_later():
    weights = {}
    for ema in (0.999, 0.0):
        run("--steps", 3, "--save-every", 1, "--keep", 3, "--ema", ema, "--out", str(ema))
        load = lambda k: torch.load(f"{ema}/checkpoint-00000{k}.pt", weights_only=True)
        weights[ema] = [(load(k)["model"]["patch_in.weight"], load(k)["ema"]["patch_in.weight"]) for k in (1, 2, 3)]
    assert all(torch.equal(model, average) for model, average in weights[0.0])
    (a, average), (b, _), _ = weights[0.999]
    assert torch.equal(a, average)  # then it keeps 2/11, 3/12, ...
    assert torch.allclose(weights[0.999][1][1], a + (b - a) * 9 / 11, atol=1e-6)


# ---- Options


@pytest.mark.parametrize("network", [UNET, DIM], ids=["unet", "dim"])
def test_recomputing_changes_nothing_and_bfloat16_only_the_rounding(network):
    for out, flags in (("plain", []), ("recomputed", ["--recompute"]), ("rounded", ["--amp"])):
        run("--steps", 2, *flags, "--out", out, network=network)
    assert log("recomputed") == log("plain") != log("rounded") and np.allclose(log("rounded"), log("plain"), rtol=0.05)
    again("--resume", "rounded", "--no-amp", "--recompute", "--steps", 3)
    state = torch.load("rounded/checkpoint-000003.pt", weights_only=True)["model"]
    assert all(p.dtype == torch.float32 for p in state.values() if p.is_floating_point())


def test_every_block_is_compiled_and_the_names_of_weights_stay(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(type(self).__name__))
    run("--steps", 1, "--compile", "--out", "run", network=UNET)
    assert set(compiled) == {"ResBlock", "OverSpace", "OverTime"}
    again("--resume", "run", "--no-compile", "--steps", 2)


@pytest.mark.parametrize("drop, hidden", [(0, 0), (1, 1), (0.3, 0.3)])
def test_the_network_is_told_the_class_of_each_video_but_for_a_share(drop, hidden, monkeypatch):
    told, losses = [], train.GaussianDiffusion.losses
    spy = lambda self, x, t, eps, cond, keep: told.append((cond, keep)) or losses(self, x, t, eps, cond, keep)
    monkeypatch.setattr(train.GaussianDiffusion, "losses", spy)
    run("--batch", 64, "--frames", 1, "--class-cond", "--cond-drop", drop, "--steps", 3, "--out", "run")
    cond, keep = map(torch.cat, zip(*told))
    styles = [train.maze_style(train.maze_seed("train", i)) for i in range(len(cond))]
    assert torch.equal(cond, torch.eye(3)[styles]) and abs(1 - keep.float().mean() - hidden) < 0.1


def test_classes_are_drawn_in_turn_or_one_alone_and_guided():
    run("--frames", 2, "--class-cond", "--lr", 0.1, "--steps", 6, "--out", "run")
    found = {}
    for name, flags in {"turn": [], "boards": ["--class", "boards"], "guided": ["--class", "boards", "--guidance", 4],
                        "free": ["--guidance", 0], "free too": ["--guidance", 0, "--class", "bricks"]}.items():  # fmt: skip
        again("sample", "run", "--videos", 4, "--out", name, *flags)
        found[name] = np.load(f"{name}/fake.npz")["videos"]
    assert [(a == b).all() for a, b in zip(found["turn"], found["boards"])] == [False, True, False, False]
    assert (found["free"] == found["free too"]).all() and (found["guided"] != found["boards"]).any()
    assert "bricks" in refuses("sample", "run", "--class", "marble", "--device", "cpu")


def test_samplers_agree_on_where_many_steps_lead_and_differ_in_few():
    run("--frames", 2, "--lr", 0.1, "--steps", 6, "--diffusion-steps", 64, "--out", "run")
    distance = {}
    for steps in (3, 64):
        for sampler in ("ddim", "dpm"):
            again("sample", "run", "--sampler", sampler, "--sample-steps", steps, "--out", f"{sampler}{steps}")
        a, b = (np.load(f"{sampler}{steps}/fake.npz")["videos"].astype(float) for sampler in ("ddim", "dpm"))
        distance[steps] = np.abs(a - b).mean()
    assert distance[64] < 0.5 * distance[3]


def test_a_second_run_has_a_folder_of_its_own():
    for _ in range(2):
        run("--steps", 1)
    assert sorted(os.listdir("runs")) == ["maze", "maze-2"]


def test_a_run_follows_moved_data_and_notices_changed_data(tmp_path):
    folder = write_videos(tmp_path / "v")
    run("--data", folder, "--steps", 1, "--out", "run")
    shutil.copytree(folder, "copy", copy_function=shutil.copyfile)  # with new times
    again("--resume", "run", "--data", "copy", "--steps", 2)
    assert "lies in --data" in refuses("sample", "run", "--data", "copy", "--out", "copy/drawn", "--device", "cpu")
    np.save("copy/new.npy", np.zeros((6, 8, 8, 3), np.uint8))
    assert "no longer holds the videos" in refuses("--resume", "run", "--steps", 3, "--device", "cpu")


# ---- What is wrong

WRONG = [  # command line, what the sentence names
    ("--batch 0", "--batch"), ("--lr nan", "--lr"), ("--steps many", "--steps"), ("--ema 2", "--ema"),
    ("--dim-mults 1,x", "--dim-mults"), ("--temporal rnn", "bi-mamba"), ("--rec", "--rec"), ("--seed -1", "--seed"),
    ("--size 9", "multiple of"), ("--width 20", "multiple of 8"), ("--device quantum", "--device quantum"),
    ("--device meta", "--device meta"), ("--diffusion-steps 10 --sample-steps 11", "10 of --diffusion-steps"),
    ("--sampler dpm --eta 1", "--eta"), ("--guidance 2", "--class-cond"), ("--class bricks", "--class bricks"),
    ("--class-cond --cond-drop 0 --guidance 2", "--cond-drop"), ("--data nowhere", "nowhere"),
    ("--data empty", "no video"), ("--data bad", "x.mp4"), ("--data videos --frames 7", "at most 6"),
    ("--data videos --stride 3", "at most 6"), ("--data videos --split test", "--split test"),
    ("--data videos --out videos/run", "lies in --data"), ("--data videos --class-cond", "two classes"),
    ("--resume nowhere", "nowhere"), ("--resume empty", "empty"), ("--resume run --out other", "--out"),
    ("--resume run --lr 0.5", "--lr"), ("--resume run --width 32", "--width"), ("--resume run --steps 1", "--steps 1"),
    ("--out run", "--resume run"), ("sample", "sample RUN"), ("sample run --width 32", "--width"),
    ("sample run --out run", "not empty"), ("--real 3", "sample RUN"), ("sample run --size 9", "multiple of"),
]  # fmt: skip


def test_a_wrong_command_line_is_one_sentence_with_exit_code_2_and_writes_nothing(tmp_path, capsys):
    os.mkdir("empty")
    os.mkdir("bad")
    pathlib.Path("bad/x.mp4").write_bytes(b"nothing")
    write_videos(tmp_path / "videos")
    run("--steps", 2, "--out", "run")
    files = lambda: sorted(str(path) for path in pathlib.Path().rglob("*") if "cache" not in path.parts)
    before = files()
    for line, named in WRONG:
        saved = any(word in line for word in ("--resume", "sample"))
        argv = [*([] if saved else [*COMMON, *DIM]), *line.split(), *([] if "--device" in line else ["--device", "cpu"])]
        try:
            train.main(argv)
            pytest.fail(f"{line} is accepted")
        except SystemExit as error:  # argparse has told why
            told, code = capsys.readouterr().err.splitlines()[-1], error.code
        except (ValueError, OSError) as error:
            told, code = str(error), 2
        assert named in told and code == 2 and "\n" not in told, f"{line}: {told}"
    assert [file for file in files() if file not in before and file != "runs"] == []


def test_the_command_itself_says_one_sentence_and_shows_tracebacks_of_bugs_alone(tmp_path):
    process = start(*COMMON, "--data", tmp_path / "nowhere")
    _, errors = process.communicate()
    assert process.returncode == 2 and errors.startswith("train.py: ") and len(errors.splitlines()) == 1


def test_a_vanished_cache_ends_a_run_whose_loaders_ignore_signals(tmp_path):
    write_videos(tmp_path / "v")
    process = start(*COMMON, *DIM, "--data", "v", "--steps", 10**6, "--workers", 1, "--out", "run")
    while not os.path.exists("run/log.jsonl") or not log("run"):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    shutil.rmtree("cache")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and re.search(r"train.py: .*cache/\w+\.npy", errors.splitlines()[-1])
