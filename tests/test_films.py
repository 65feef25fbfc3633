"""Levels for each frame, longer videos, streams and actions, by the command."""

import os
import signal

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from runs import UNET, again, ends, log, own_place, refuses, run, start, steps_of, wait_for  # noqa: F401
from runs import write_videos

import train

CAUSAL = [*UNET, "--causal"]
KINDS = {"whole": ["--no-frame-noise"], "levels": ["--frame-noise"], "causal": ["--causal"],
         "acting": ["--causal", "--actions", "--class-cond"]}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of whole videos, one with a level for each frame, a causal one and one with actions."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.signal, "signal", lambda *_: None)
        for name, flags in KINDS.items():
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
    states = {}
    for out in ("whole", "resumed"):
        run(*CAUSAL, "--actions", "--steps", 6, "--save-every", 3, "--out", out)
        if out == "resumed":
            again("--resume", "resumed/checkpoint-000003.pt")
        states[out] = torch.load(f"{out}/checkpoint-000006.pt", weights_only=True)["ema"]
    assert log("whole") == log("resumed") and steps_of("resumed") == [3, 6]
    assert all(torch.equal(states["whole"][key], states["resumed"][key]) for key in states["whole"])


@pytest.mark.parametrize("name", ["levels", "causal"])
def test_a_film_has_any_length_and_begins_as_a_shorter_one_of_its_seed(runs, name):
    for frames in (23, 11):
        again("sample", runs / name, "--frames", frames, "--out", str(frames))
    long, short = frames_of("23/film.mp4"), frames_of("11/film.mp4")
    assert len(long) == 23 and len(short) == 11
    assert abs(long[:8].astype(int) - short[:8]).mean() < 3  # H.264 is not exact
    assert iio.imread("23/film.png").shape[1] > 16 * 64


@pytest.mark.parametrize("name", ["levels", "causal"])
def test_a_film_goes_on_from_a_video(runs, name):
    frames = np.zeros((9, 16, 24, 3), np.uint8) + np.arange(0, 90, 10, dtype=np.uint8)[:, None, None, None]
    np.save("given.npy", frames)
    again("sample", runs / name, "--after", "given.npy", "--past", 2, "--frames", 4, "--out", "film")
    film = frames_of("film/film.mp4")
    assert len(film) == 6 and abs(film[0].mean() - 70) < 5 and abs(film[1].mean() - 80) < 5


def test_a_stream_that_is_stopped_leaves_a_film_that_can_be_read(runs):
    process = start("sample", runs / "causal", "--frames", 10**6, "--out", "film", "--device", "cpu")
    sizes = lambda: [entry.stat().st_size for entry in os.scandir("film")] if os.path.isdir("film") else [0]
    wait_for(lambda: max(sizes(), default=0) > 2000, process)
    os.kill(process.pid, signal.SIGINT)
    assert ends(process) == 0 and 1 < len(frames_of("film/film.mp4")) < 10**6
    assert sorted(os.listdir("film")) == ["film.gif", "film.mp4", "film.png"]


def test_actions_are_the_turns_that_lead_to_each_frame():
    flags = [*CAUSAL, *"--actions --frames 9 --seed 3 --stride".split()]
    items = [train.MazeVideos(train.parse([*flags, stride])[0])[5] for stride in "12"]
    turns = 10 * train.maze_turns(train.maze_seed("train", 3 * 2**32 + 5), 17)
    assert np.allclose(items[0][2][:, 0], turns[:9])
    assert np.allclose(items[1][2][1:, 0], np.diff(turns.cumsum()[::2]), atol=1e-4) and items[1][2][0] == 0


def test_actions_lie_beside_a_folders_videos_in_their_natural_order(tmp_path):
    folder, actions = write_videos(tmp_path / "data"), np.arange(36, dtype=np.float32).reshape(3, 6, 2)
    np.savez(folder / "actions.npz", actions=actions)
    run(*CAUSAL, "--actions", "--data", folder, "--steps", 2, "--out", "run")
    videos = lambda *flags: train.videos_of(train.parse([*CAUSAL, "--data", str(folder), *flags])[0])
    data, whole = videos("--actions"), videos("--frames", "6")
    pictures = sorted((whole[i][0] for i in range(3)), key=lambda x: np.argmax(
        [(train.to_model_range(train.resize(np.load(folder / f"{k}.npy")[0], 8)[None]) == x[:, :1]).all()
         for k in range(3)]))  # fmt: skip
    for video, _, told in (data[i] for i in range(3)):
        (k, first), = np.argwhere((actions[:, 1:5] == told[1].numpy()).all(-1))
        assert np.allclose(told[1:], actions[k, first + 1 : first + 3])
        assert torch.equal(pictures[k][:, first : first + 3], video)
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
    ("levels", ["--past", 3], "--past 3"), ("levels", ["--after", "given.npy", "--past", 0], "--past 0"),
    ("levels", ["--after", "none.mp4"], "no such file"), ("levels", ["--after", "text.mp4"], "text.mp4"),
    ("levels", ["--after", "short.npy", "--past", 2], "1 frames"),
    ("acting", ["--actions", "none.npy"], "none.npy"), ("acting", ["--actions", "given.npy"], "(frames, 1)"),
    ("causal", ["--actions", "turns.npy"], "--actions"),
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
    (["--causal", "--backbone", "dim"], "unet"), (["--actions"], "--causal"),
])  # fmt: skip
def test_runs_that_cannot_be_are_refused_in_one_sentence(flags, mend):
    assert mend in refuses(*flags, "--steps", 1)
