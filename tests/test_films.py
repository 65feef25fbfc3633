"""Levels for each frame, longer videos, streams and actions, by the command."""

import os
import signal

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from runs import UNET, again, ends, log, own_place, refuses, run, start, steps_of, wait_for, write_videos  # noqa: F401

import train

CAUSAL = [*UNET, "--causal"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of whole videos, one with a level for each frame, a causal one and one with actions."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.signal, "signal", lambda *_: None)
        for name, flags in (("whole", ["--no-frame-noise"]), ("levels", ["--frame-noise"]), ("causal", ["--causal"]),
                            ("acting", ["--causal", "--actions", "--class-cond"])):  # fmt: skip
            run(*UNET, *flags, "--steps", 2, "--videos", 1, "--out", root / name)
    return root


def frames_of(path):
    return iio.imread(path, plugin="pyav")


def test_a_level_for_each_frame_is_drawn_from_the_items_own_seed():
    args = train.parse(["--frame-noise", "--batch", "2"])[0]
    t, eps, _ = train.draw(range(1000), (1, 6, 1, 1), args, "cpu")
    assert t.shape == (1000, 6) and t.min() == 0 and t.max() == 255 and abs(t.float().mean() - 127.5) < 5
    assert abs(np.corrcoef(t.T.numpy()) - np.eye(6)).max() < 0.15  # of one video as of two
    assert torch.equal(train.draw([7], (1, 6, 1, 1), args, "cpu")[0][0], t[7])
    assert train.parse(["--causal"])[0].frame_noise
    assert train.draw([7], (1, 6, 1, 1), train.parse(["--no-frame-noise"])[0], "cpu")[0].shape == (1,)


def test_a_causal_run_goes_on_exactly_where_it_was():
    run(*CAUSAL, "--actions", "--steps", 6, "--save-every", 3, "--out", "whole")
    again("--resume", "whole/checkpoint-000003.pt", "--steps", 6)
    os.rename("whole", "resumed")
    run(*CAUSAL, "--actions", "--steps", 6, "--save-every", 3, "--out", "whole")
    assert log("whole") == log("resumed") and steps_of("whole") == [3, 6]
    states = [torch.load(f"{out}/checkpoint-000006.pt", weights_only=True)["ema"] for out in ("whole", "resumed")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", ["levels", "causal"])
def test_a_film_has_any_length_and_begins_as_a_shorter_one_of_its_seed(runs, name):
    again("sample", runs / name, "--frames", 23, "--out", "long")
    again("sample", runs / name, "--frames", 11, "--out", "short")
    long, short = frames_of("long/film.mp4"), frames_of("short/film.mp4")
    assert len(long) == 23 and len(short) == 11 and abs(long[:8].astype(int) - short[:8]).mean() < 3  # H.264
    assert iio.imread("long/film.png").shape[1] > 16 * 64


@pytest.mark.parametrize("name", ["levels", "causal"])
def test_a_film_goes_on_from_a_video(runs, name):
    frames = np.zeros((9, 16, 24, 3), np.uint8) + np.arange(0, 90, 10, dtype=np.uint8)[:, None, None, None]
    np.save("given.npy", frames)
    again("sample", runs / name, "--after", "given.npy", "--past", 2, "--frames", 4, "--out", "film")
    film = frames_of("film/film.mp4")
    assert len(film) == 6 and abs(film[0].mean() - 70) < 5 and abs(film[1].mean() - 80) < 5


def test_a_stream_that_is_stopped_leaves_a_film_that_can_be_read(runs):
    process = start("sample", runs / "causal", "--frames", 10**6, "--out", "film", "--device", "cpu")
    wait_for(lambda: any(os.path.getsize(entry) > 2000 for entry in os.scandir("film")) if os.path.isdir("film")
             else False, process)  # fmt: skip
    os.kill(process.pid, signal.SIGINT)
    assert ends(process) == 0 and 1 < len(frames_of("film/film.mp4")) < 10**6
    assert sorted(os.listdir("film")) == ["film.gif", "film.mp4", "film.png"]


def test_actions_are_the_turns_that_lead_to_each_frame(tmp_path):
    flags = [*CAUSAL, "--actions", "--frames", "9"]
    walk = train.MazeVideos(train.parse([*flags, "--seed", "3"])[0])[5]
    seed = train.maze_seed("train", 3 * 2**32 + 5)
    assert np.allclose(walk[2][:, 0], 10 * train.maze_turns(seed, 9))
    sparse = train.MazeVideos(train.parse([*flags, "--seed", "3", "--stride", "2"])[0])[5]
    angle = np.cumsum(train.maze_turns(seed, 17))[::2]
    assert np.allclose(sparse[2][1:, 0], 10 * np.diff(angle), atol=1e-5) and sparse[2][0] == 0


def test_actions_lie_beside_a_folders_videos_in_their_natural_order(tmp_path):
    folder = write_videos(tmp_path / "data", count=3, frames=6)
    actions = np.arange(3 * 6 * 2, dtype=np.float32).reshape(3, 6, 2)
    np.savez(folder / "actions.npz", actions=actions)
    run(*CAUSAL, "--actions", "--data", folder, "--steps", 2, "--out", "run")
    data = train.FolderVideos(train.parse([*CAUSAL, "--actions", "--data", str(folder), "--out", "other"])[0])
    for i in range(3):
        video, _, told = data[i]
        match = [(k, s) for k in range(3) for s in range(4) if np.allclose(told[1:], actions[k, s + 1 : s + 3])]
        (k, s), = match
        whole = train.FolderVideos(train.parse([*CAUSAL, "--frames", "6", "--data", str(folder), "--out", "o"])[0])
        videos = [whole[j][0] for j in range(3)]
        assert any(torch.equal(v[:, s : s + 3], video) for v in videos)
    np.savez(folder / "actions.npz", actions=actions[:2])
    assert "3 videos" in refuses(*CAUSAL, "--actions", "--data", folder)
    os.remove(folder / "actions.npz")
    assert "actions.npz" in refuses(*CAUSAL, "--actions", "--data", folder)


def test_a_stream_follows_a_file_of_actions(runs):
    for name, turn in (("left", 3), ("right", -3)):
        np.save(f"{name}.npy", np.full((7, 1), turn, np.float32))
        again("sample", runs / "acting", "--actions", f"{name}.npy", "--out", name)
    left, right = frames_of("left/film.mp4"), frames_of("right/film.mp4")
    assert len(left) == len(right) == 7 and abs(left.astype(int) - right).mean() > 0


@pytest.mark.parametrize("name, flags, mend", [
    ("whole", ["--after", "given.npy"], "--frame-noise"), ("whole", ["--past", 2], "--frame-noise"),
    ("levels", ["--past", 3], "--past 3"), ("levels", ["--after", "none.mp4"], "no such file"),
    ("levels", ["--after", "short.npy", "--past", 2], "1 frames"), ("levels", ["--after", "text.mp4"], "text.mp4"),
    ("causal", ["--actions", "turns.npy"], "--actions was None"), ("acting", ["--actions", "given.npy"], r"(frames, 1)"),
    ("acting", ["--actions", "none.npy"], "none.npy"),
])  # fmt: skip
def test_what_a_film_cannot_be_made_of_is_refused_in_one_sentence(runs, name, flags, mend):
    np.save("given.npy", np.zeros((5, 8, 8, 3), np.uint8))
    np.save("short.npy", np.zeros((1, 8, 8, 3), np.uint8))
    np.save("turns.npy", np.zeros((5, 1)))
    open("text.mp4", "w").write("no film")
    assert mend in refuses("sample", runs / name, *flags, "--out", "film")
    assert not os.path.exists("film") or not os.listdir("film")


@pytest.mark.parametrize("flags, mend", [
    (["--causal", "--temporal", "bi-mamba"], "mamba"), (["--causal", "--temporal", "attention"], "mamba"),
    (["--causal", "--backbone", "dim"], "unet"), (["--actions"], "--causal"), (["--after", "x.mp4"], "sample"),
])  # fmt: skip
def test_runs_that_cannot_be_are_refused_in_one_sentence(flags, mend):
    assert mend in refuses(*flags, "--steps", 1)
