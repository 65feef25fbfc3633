"""Levels for each frame, longer videos, streams and actions, by the command."""

import os
import signal

import imageio.v3 as iio
import numpy as np
import pytest
from runs import UNET, again, ends, own_place, refuses, run, start, wait_for  # noqa: F401

import train

CAUSAL = [*UNET, "--causal"]
KINDS = {"whole": ["--no-frame-noise"], "levels": ["--frame-noise"], "causal": ["--causal"],
         "acting": ["--causal", "--actions", "--class-cond"],
         "hiding": ["--causal", "--actions", "--class-cond", "--cond-drop", 0.1]}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of whole videos, one with a level for each frame, a causal one and one with actions."""
    root = tmp_path_factory.mktemp("runs")
    for name, flags in KINDS.items():
        run(*UNET, *flags, "--steps", 2, "--videos", 1, "--out", root / name)
    return root


def frames_of(path):
    return iio.imread(path, plugin="pyav")


@pytest.mark.parametrize("name", ["levels", "causal"])
def test_a_film_of_any_length_goes_on_from_a_video_and_begins_as_a_shorter_one_of_its_seed(runs, name):
    levels = 10 * np.arange(9, dtype=np.uint8)[:, None, None, None]
    np.save("given.npy", np.broadcast_to(levels, (9, 16, 24, 3)))
    after = ["--after", "given.npy", "--past", 2]
    for out, flags in (("long", [34, *after]), ("short", [4, *after]), ("free", [5])):
        again("sample", runs / name, "--out", out, "--frames", *flags)
    long, short, free = (frames_of(f"{out}/film.mp4").astype(int) for out in ("long", "short", "free"))
    assert (len(long), len(short), len(free)) == (36, 6, 5)
    assert abs(long[0].mean() - 70) < 5 and abs(long[1].mean() - 80) < 5
    assert abs(long[:6] - short).mean() < 3  # H.264 is not exact
    assert iio.imread("long/film.png").shape[1] > 16 * 64


def test_a_window_sees_the_past_with_the_noise_of_the_level_that_it_is_told(runs, monkeypatch):
    sample, seen = train.GaussianDiffusion.sample, []
    spy = lambda self, *x, past, level, **how: seen.append((self, past, level)) or sample(
        self, *x, past=past, level=level, **how)  # fmt: skip
    monkeypatch.setattr(train.GaussianDiffusion, "sample", spy)
    np.save("white.npy", np.full((2, 8, 8, 3), 255, np.uint8))
    again("sample", runs / "levels", "--after", "white.npy", "--past", 2, "--frames", 1, "--out", "film")
    (diffusion, past, level), = seen
    noise = past - diffusion.signal_rate[level]
    assert level > 0 and abs(noise.std() / diffusion.noise_rate[level] - 1) < 0.2


def test_a_stream_that_is_stopped_leaves_a_film_that_can_be_read(runs):
    process = start("sample", runs / "causal", "--frames", 10**6, "--out", "film", "--device", "cpu")
    sizes = lambda: [entry.stat().st_size for entry in os.scandir("film")] if os.path.isdir("film") else [0]
    wait_for(lambda: max(sizes(), default=0) > 2000, process)
    os.kill(process.pid, signal.SIGINT)
    assert ends(process) == 0 and 1 < len(frames_of("film/film.mp4")) < 10**6
    assert sorted(os.listdir("film")) == ["film.gif", "film.mp4", "film.png"]


def test_actions_are_the_turns_that_lead_to_each_frame():
    item = train.MazeVideos(train.parse([*CAUSAL, *"--actions --frames 9 --seed 3".split()])[0])[5]
    assert np.allclose(item[2][:, 0], 10 * train.maze_turns(train.maze_seed("train", 3 * 2**32 + 5), 9))


def test_actions_lie_beside_a_folders_videos_in_their_natural_order():
    actions = np.arange(132, dtype=np.float32).reshape(11, 6, 2)
    os.mkdir("data")
    for k in range(11):  # video 10 is the last one, not the third
        levels = 20 * k + np.arange(6, dtype=np.uint8)[:, None, None, None]
        np.save(f"data/{k}.npy", np.broadcast_to(levels, (6, 8, 8, 3)))
    command = [*CAUSAL, "--actions", "--data", "data"]
    assert refuses(*command).endswith("data/actions.npz: No such file or directory")
    np.savez("data/actions.npz", actions=actions)
    run(*command, "--steps", 1, "--out", "run")
    data = train.videos_of(train.parse(command)[0])
    for video, _, told in (data[i] for i in range(11)):
        k, first = divmod(train.to_pixels(video[None])[0, 0, 0, 0, 0].item(), 20)
        assert np.array_equal(told, actions[k, first : first + 3])
    words = dict(actions=np.full(actions.shape, "left"))
    for wrong, told in ((dict(actions=actions[:2]), "11 files"), (words, "left"), ({}, "'actions is not")):
        np.savez("data/actions.npz", **wrong)
        assert "data/actions.npz: " in (said := refuses(*command)) and told in said


def test_a_stream_follows_a_file_of_actions_and_goes_straight_on_without_one(runs):
    for name, turn in (("left", 3), ("right", -3), ("straight", 0)):
        np.save(f"{name}.npy", np.full((7, 1), turn, np.float32))
        again("sample", runs / "acting", "--actions", f"{name}.npy", "--out", name)
    again("sample", runs / "acting", "--frames", 7, "--out", "free")
    left, right, straight, free = (frames_of(f"{out}/film.mp4") for out in "left right straight free".split())
    assert len(left) == len(right) == 7 and abs(left.astype(int) - right).mean() > 0
    assert np.array_equal(straight, free)
    assert "FILE" in refuses(*CAUSAL, "--actions", "left.npy")
    for name in ("bricks", "boards"):
        again("sample", runs / "hiding", "--class", name, "--out", name)
    bricks, boards = (np.load(f"{name}/fake.npz")["videos"] for name in ("bricks", "boards"))
    assert (bricks != boards).any()  # a class is told also where actions are not


@pytest.mark.parametrize("name, flags, mend", [
    ("whole", ["--after", "given.npy"], "--frame-noise"), ("whole", ["--past", 2], "--frame-noise"),
    ("levels", ["--past", 3], "--past 3"), ("levels", ["--after", "given.npy", "--past", 0], "--past 0"),
    ("levels", ["--after", "none.mp4"], "no such file"), ("levels", ["--after", "text.mp4"], "text.mp4"),
    ("acting", ["--actions", "none.npy"], "none.npy"), ("acting", ["--actions", "given.npy"], "(frames, 1)"),
    ("acting", ["--actions", "words.npy"], "numbers"), ("causal", ["--actions", "turns.npy"], "--actions"),
])  # fmt: skip
def test_what_a_film_cannot_be_made_of_is_refused_in_one_sentence(runs, name, flags, mend):
    np.save("given.npy", np.zeros((5, 8, 8, 3), np.uint8))
    np.save("turns.npy", np.zeros((5, 1)))
    np.save("words.npy", np.full((5, 1), "left"))
    open("text.mp4", "w").write("no film")
    assert mend in refuses("sample", runs / name, *flags, "--out", "film")
    assert not os.path.exists("film") or not os.listdir("film")
