"""The loop loses nothing, repeats itself, and answers bad input with one sentence."""

import json
import os
import pathlib
import resource
import subprocess
import sys
import time

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import train

ROOT = pathlib.Path(__file__).parent.parent
TINY = "--size 8 --frames 3 --dim 8 --dim-mults 1,2 --heads 1 --batch 2 --sample-steps 2 --sample-videos 2 --device cpu".split()


@pytest.fixture(autouse=True)
def quiet_signals_and_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)


def losses(run):
    lines = map(json.loads, (pathlib.Path(run) / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def fails(*argv):
    """Run the command in a process of its own; it must exit with 2 and one sentence.    -> the sentence"""
    done = subprocess.run([sys.executable, ROOT / "train.py", *map(str, argv)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def refuses(*argv):
    with pytest.raises(train.BadInput) as error:
        train.main([str(a) for a in argv])
    return str(error.value)


def write_videos(folder, count=3, frames=6, size=(12, 10)):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        np.save(folder / f"{i}.npy", rng.integers(0, 256, (frames, *size, 3), dtype=np.uint8))
    return folder


# ---- Runs


def test_a_run_writes_what_it_says_and_samples_without_data(tmp_path):
    train.main([*TINY, "--steps", "4", "--sample-every", "2", "--out", "run"])
    assert len(losses("run")) == 4
    assert iio.imread("run/samples/step-000004.png").shape[2] == 3
    assert len(iio.imread("run/samples/step-000002.gif")) == 3
    train.main(["sample", "run", "--videos", "3", "--frames", "5", "--sample-steps", "2", "--device", "cpu"])
    with np.load("run/sampled/videos.npz", allow_pickle=False) as arrays:
        videos = arrays["videos"]
    assert videos.shape == (3, 5, 8, 8, 3) and videos.dtype == np.uint8
    assert len(list(pathlib.Path("run/sampled/gif").glob("*.gif"))) == 3


@pytest.mark.parametrize("data", ["maze", "folder"])
def test_a_resumed_run_continues_bit_for_bit(tmp_path, data):
    source = "maze" if data == "maze" else write_videos(tmp_path / "videos")
    common = [*TINY, "--data", str(source), "--grad-accum", "2", "--sample-every", "3"]
    train.main([*common, "--steps", "7", "--out", "whole"])
    train.main([*common, "--steps", "3", "--out", "parts"])
    train.main(["--resume", "parts", "--steps", "7"])
    assert losses("parts") == losses("whole") and len(losses("whole")) == 7
    whole, parts = (train.load_checkpoint(run) for run in ("whole", "parts"))
    for key in ("model", "ema"):
        assert all(torch.equal(whole[key][name], parts[key][name]) for name in whole[key])
    assert pathlib.Path("parts/samples/step-000007.png").read_bytes() == pathlib.Path("whole/samples/step-000007.png").read_bytes()


def test_a_run_stopped_after_its_last_checkpoint_drops_the_log_that_it_will_write_again():
    train.main([*TINY, "--steps", "4", "--out", "run"])
    with open("run/log.jsonl", "a") as log:
        log.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    train.main(["--resume", "run", "--steps", "6"])
    assert [json.loads(line)["step"] for line in open("run/log.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_the_seed_decides_everything():
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        train.main([*TINY, "--steps", "3", "--seed", str(seed), "--out", out])
    assert losses("a") == losses("b") != losses("c")


def test_two_accumulated_batches_of_two_are_one_batch_of_four():
    moments = []
    for batch, accumulate in (("4", "1"), ("2", "2")):
        out = f"run{batch}"
        train.main([*TINY, "--batch", batch, "--grad-accum", accumulate, "--clip", "0", "--steps", "1", "--out", out])
        state = train.load_checkpoint(out)["optimizer"]["state"]
        moments.append(torch.cat([s["exp_avg"].flatten() for s in state.values()]))
    assert (moments[0] - moments[1]).norm() < 1e-5 * moments[0].norm()
    assert abs(losses("run4")[0] - losses("run2")[0]) < 1e-6


def test_the_average_of_the_weights_is_the_mean_at_first_and_slow_later():
    averages, weights = [torch.zeros(1)], [torch.ones(1)]
    train.average_weights(0.99)(averages, weights, torch.tensor(1))
    assert torch.allclose(averages[0], torch.tensor(9 / 11))
    averages = [torch.zeros(1)]
    train.average_weights(0.99)(averages, weights, torch.tensor(10**6))
    assert torch.allclose(averages[0], torch.tensor(0.01), atol=1e-6)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path):
    target = tmp_path / "checkpoint.pt"
    target.write_text("old")

    def disk_full(path):
        path.write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(train.BadInput, match="no space left"):
        train.write_whole(target, disk_full)
    state = {"weights": torch.zeros(10**5)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, limits[1]))
    try:
        with pytest.raises(train.BadInput, match="what it held before is intact"):
            train.write_whole(target, lambda path: torch.save(state, path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_an_infinite_loss_stops_the_run_and_keeps_the_checkpoint(monkeypatch):
    train.main([*TINY, "--steps", "2", "--out", "run"])
    nan = lambda self, x, *_: next(self.parameters()).sum() * float("nan") * torch.ones(len(x))
    monkeypatch.setattr(train.GaussianDiffusion, "losses", nan)
    assert "lower --lr" in refuses("--resume", "run", "--steps", "30")
    assert train.checkpoints("run") == [pathlib.Path("run/checkpoint-000002.pt")]
    assert train.load_checkpoint("run")["step"] == 2 and len(losses("run")) == 2


def test_samples_are_scored_against_videos_held_out_from_training(tmp_path, monkeypatch):
    folder = write_videos(tmp_path / "videos", count=5, frames=9)
    scored = [*TINY, "--frames", "9", "--data", str(folder), "--eval-every", "2", "--eval-videos", "2"]
    network = lambda x: x.mean((2, 3, 4))  # stands for I3D, which takes seconds
    network.to = lambda device: network
    monkeypatch.setattr(train, "random_i3d", lambda: torch.rand(7) is not None and network)  # draws, as I3D does
    train.main([*scored, "--steps", "3", "--out", "run"])
    lines = [json.loads(line) for line in open("run/log.jsonl")]
    scores = {line["step"]: line["FD-random"] for line in lines if "FD-random" in line}
    train.main([*scored, "--steps", "1", "--out", "parts"])
    train.main(["--resume", "parts", "--steps", "3"])
    assert losses("parts") == losses("run")
    assert sorted(scores) == [2, 3] and all(0 < value < 10 for value in scores.values())
    assert not any("FVD" in line for line in lines)
    args = train.complete(train.training_parser().parse_args([*scored, "--out", "other"]))
    kept, held = train.make_data(args).videos, train.make_data(args, test=True).videos
    assert (len(kept), len(held)) == (3, 2) and not set(map(tuple, kept)) & set(map(tuple, held))
    assert "leaves none" in refuses(*scored, "--eval-videos", 5)
    assert "does not exist" in refuses(*scored, "--i3d", "nowhere.pt")
    assert "9 or more" in refuses(*scored, "--frames", 8)


# ---- Bad input


def test_bad_input_gets_one_sentence_and_exit_code_two(tmp_path):
    assert "unknown temporal layer 'mamba3'" in fails("--temporal", "mamba3")
    assert "does not exist" in fails("sample", tmp_path / "nothing")
    assert "--batch" in fails("--batch", "0")
    assert not list(tmp_path.iterdir())


def test_every_wrong_argument_is_named_with_its_mend(tmp_path):
    assert "multiple of 4" in refuses("--size", 18, "--dim-mults", "1,2,4", "--device", "cpu")
    assert "multiple of 8" in refuses(*TINY, "--dim", 12)
    assert "no such" in refuses(*TINY, "--data", tmp_path / "nowhere")
    assert "1 to --diffusion-steps" in refuses(*TINY, "--diffusion-steps", 10, "--sample-steps", 11)
    assert "--device" in refuses(*TINY, "--device", "quantum")
    (tmp_path / "empty").mkdir()
    assert "no video" in refuses(*TINY, "--data", tmp_path / "empty")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.mp4").write_bytes(b"nothing")
    assert "x.mp4" in refuses(*TINY, "--data", tmp_path / "bad")
    folder = write_videos(tmp_path / "videos")
    assert "at most 6" in refuses(*TINY, "--data", folder, "--frames", 7)


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-000001.pt").write_bytes(b"PK\x03\x04 cut off")
    assert "damaged" in refuses("--resume", "run")
    torch.save({"something": 1}, tmp_path / "run" / "checkpoint-000001.pt")
    assert "not a checkpoint" in refuses("sample", "run")


def test_resume_refuses_to_become_another_run_and_out_refuses_to_overwrite_one():
    train.main([*TINY, "--steps", "1", "--out", "run"])
    before = pathlib.Path("run/checkpoint-000001.pt").read_bytes()
    message = refuses("--resume", "run", "--lr", "0.5", "--dim", "16")
    assert "--lr" in message and "--dim" in message and "--heads" not in message
    assert "--resume run" in refuses(*TINY, "--out", "run")
    assert pathlib.Path("run/checkpoint-000001.pt").read_bytes() == before


def test_a_second_run_without_out_gets_a_folder_of_its_own():
    for _ in range(2):
        train.main([*TINY, "--steps", "1"])
    assert sorted(os.listdir("runs")) == ["maze", "maze-2"]


@pytest.mark.parametrize("flag, value", [
    ("--lr", "nan"), ("--lr", "-1"), ("--lr", "0"), ("--ema", "2"), ("--eta", "-1"), ("--fps", "0"), ("--seed", "-1"),
    ("--workers", "-1"), ("--dim-mults", ""), ("--dim-mults", "1,x"), ("--heads", "0"), ("--steps", "many"), ("--size", "9"),
    ("--temporal", "rnn"), ("--resume", ""), ("--resume", "nowhere"), ("--device", "meta"), ("--no-such-flag", "1"),
])  # fmt: skip
def test_values_out_of_range_are_refused_before_anything_is_written(tmp_path, flag, value):
    assert len(refuses(*TINY, flag, value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_two_runs_never_share_a_folder(tmp_path):
    args = train.complete(train.training_parser().parse_args([*TINY, "--steps", "1"]))
    assert [train.claim(args).name for _ in range(3)] == ["maze", "maze-2", "maze-3"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "log.jsonl").write_text("precious")
    assert "holds a run" in refuses(*TINY, "--steps", 1, "--out", "mine")
    assert "saved nothing" in refuses(*TINY, "--steps", 1, "--out", "mine")
    assert (tmp_path / "mine" / "log.jsonl").read_text() == "precious"


def test_resume_notices_changed_data_and_follows_moved_data(tmp_path):
    folder = write_videos(tmp_path / "v")
    train.main([*TINY, "--data", str(folder), "--steps", "1", "--out", "run"])
    folder.rename(tmp_path / "moved")
    train.main(["--resume", "run", "--data", str(tmp_path / "moved"), "--steps", "2"])
    assert len(losses("run")) == 2
    inside = tmp_path / "moved" / "drawn"
    assert "lies in --data" in refuses("sample", "run", "--videos", 1, "--device", "cpu", "--out", inside)
    assert not inside.exists()
    np.save(tmp_path / "moved" / "new.npy", np.zeros((6, 8, 8, 3), np.uint8))
    assert "no longer holds the videos" in refuses("--resume", "run", "--steps", "3")
    assert "lies in --data" in refuses(*TINY, "--data", tmp_path / "moved", "--out", tmp_path / "moved" / "run")
    os.chdir(tmp_path / "moved")
    assert "lies in --data" in refuses(*TINY, "--data", ".")  # runs/moved would


def test_resume_redraws_samples_that_a_kill_left_out_and_never_goes_back():
    train.main([*TINY, "--steps", "2", "--out", "run"])
    sheet = pathlib.Path("run/samples/step-000002.png")
    drawn = sheet.read_bytes()
    sheet.unlink()
    train.main(["--resume", "run"])
    assert sheet.read_bytes() == drawn
    assert "give more" in refuses("--resume", "run", "--steps", "1")
    assert "leave out --out" in refuses("--resume", "run", "--out", "other")


def test_weights_that_are_not_finite_are_not_saved():
    train.main([*TINY, "--steps", "1", "--out", "run"])
    checkpoint = torch.load("run/checkpoint-000001.pt", weights_only=True)
    checkpoint["optimizer"]["state"][0]["exp_avg"].fill_(float("inf"))
    torch.save(checkpoint, "run/checkpoint-000001.pt")
    assert "lower --lr" in refuses("--resume", "run", "--steps", "2")
    assert [path.name for path in train.checkpoints("run")] == ["checkpoint-000001.pt"]


def test_sampling_checks_its_arguments_and_keeps_earlier_samples():
    train.main([*TINY, "--steps", "1", "--out", "run"])
    once = ["sample", "run", "--videos", "1", "--device", "cpu"]
    assert "multiple of 2" in refuses(*once, "--size", 9)
    assert "1 to" in refuses(*once, "--sample-steps", 999)
    train.main([*once, "--frames", "1"])
    train.main([*once, "--frames", "4", "--size", "16"])
    assert sorted(os.listdir("run")) == ["checkpoint-000001.pt", "log.jsonl", "sampled", "sampled-2", "samples"]
    assert "holds samples" in refuses(*once, "--out", "run/sampled")


def test_a_sheet_is_whole_or_not_there_so_that_resume_knows_what_to_draw_again(tmp_path, monkeypatch):
    def killed(path, *_, **__):
        path.write_bytes(b"half")
        raise OSError("killed")

    monkeypatch.setattr(train.iio, "imwrite", killed)
    with pytest.raises(train.BadInput, match="killed"):
        train.write_sheet(tmp_path / "step-000002.png", np.zeros((1, 2, 8, 8, 3), np.uint8))
    assert not list(tmp_path.iterdir())


def test_gif_and_sheet_show_what_they_are_given(tmp_path):
    videos = np.zeros((3, 5, 8, 8, 3), np.uint8)
    videos[1, 2] = 255
    train.write_sheet(tmp_path / "sheet.png", videos)
    sheet = iio.imread(tmp_path / "sheet.png")
    assert sheet.shape == (3 * 68, 5 * 68, 3)
    assert (sheet[68 : 68 + 64, 2 * 68 : 2 * 68 + 64] == 255).all() and (sheet[:64, :64] == 0).all()
    train.write_gif(tmp_path / "all.gif", videos, fps=8)
    assert iio.imread(tmp_path / "all.gif", index=0).shape[:2] == (192, 192)
