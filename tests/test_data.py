"""Folders become the videos they hold: every split, class and pixel, decoded once, whatever interrupts."""

import os
import pathlib
import re
import resource
import shutil

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from runs import DIM, SERVER, again, ends, own_place, run, start, wait_for, write_videos  # noqa: F401

import train


def videos_of(path, *options, held_out=False):
    """The data set that a command line describes."""
    argv = ["--data", path, "--frames", 4, "--size", 8, "--workers", 1, "--out", "runs/x", *options]
    return train.videos_of(train.parse([str(arg) for arg in argv])[0], held_out)


def split(path, name, **options):
    return videos_of(path, "--split", name, **options)


def grey(*levels, frames=4):
    """A video of one level per frame, so that a window tells where it comes from."""
    levels = levels * frames if len(levels) == 1 else levels
    return np.broadcast_to(np.uint8(levels)[:, None, None, None], (len(levels), 8, 8, 3)).copy()


def window(data, i):
    """Grey levels of the frames of item i."""
    return ((data[i][0][0, :, 0, 0] + 1) * 127.5).round().int()


def levels(data):
    """Grey levels of the first frames of an epoch, sorted, each with its label's name."""
    return sorted((int(window(data, i)[0]), data.classes[data[i][1]]) for i in range(len(data)))


def cache():
    """What is in the cache.    -> {name: time of its last change}"""
    return {path.name: path.stat().st_mtime_ns for path in pathlib.Path("runs/cache").glob("*.npy")}


@pytest.mark.parametrize("stride", [1, 3])
def test_windows_take_every_kth_frame_of_a_video_or_walk_and_an_epoch_shows_each_once(tmp_path, stride):
    (tmp_path / "v").mkdir()
    for i in range(4):
        np.save(tmp_path / "v" / f"{i}.npy", grey(*(50 * i + np.arange(4 * stride + 5))))
    data = videos_of(tmp_path / "v", "--frames", 5, "--stride", stride)
    assert data[0][2].shape == (5, 0)  # no actions, for as many frames
    seen = [window(data, i) for i in range(100)]
    assert all((w.diff() == stride).all() and w[0] // 50 == w[-1] // 50 for w in seen)
    assert sorted(w[0].item() // 50 for w in seen[:4]) == [0, 1, 2, 3]
    assert {w[0].item() % 50 for w in seen} == {0, 1, 2, 3, 4}
    whole, some = videos_of("maze", "--frames", 7), videos_of("maze", "--frames", 3, "--stride", 3)
    assert torch.equal(whole[5][0][:, ::3], some[5][0]) and some[5][1] == whole[5][1]


def test_every_file_and_every_folder_of_images_gives_its_videos(tmp_path):
    videos = np.random.default_rng(0).integers(0, 256, (5, 6, 16, 20, 3), dtype=np.uint8)
    (tmp_path / "v" / "images").mkdir(parents=True)
    np.save(tmp_path / "v" / "one.npy", videos[0])
    np.save(tmp_path / "v" / "two.npy", videos[1:3])
    torch.save(torch.from_numpy(videos[3]), tmp_path / "v" / "tensor.pt")
    for k, frame in enumerate(videos[4]):
        iio.imwrite(tmp_path / "v" / "images" / f"{k}.png", frame)
    data = videos_of(tmp_path / "v", "--frames", 6)
    for video in videos:
        exact = train.to_model_range(np.stack([train.resize(frame, 8) for frame in video]))
        assert len(data) == 5 and sum(torch.equal(data[i][0], exact) for i in range(5)) == 1
    assert len(videos_of(tmp_path / "v" / "one.npy")) == 1


def test_floats_are_read_by_one_rule_that_the_user_gives(tmp_path):
    (tmp_path / "v").mkdir()
    for name, low in (("a", -1), ("b", 0)):  # b alone could be taken for pixels in [0, 1]
        ramp = np.linspace(low, 1, 4 * 64 * 3, dtype=np.float32)
        np.save(tmp_path / "v" / f"{name}.npy", ramp.reshape(4, 8, 8, 3))
    with pytest.raises(ValueError, match="--floats"):
        videos_of(tmp_path / "v")
    data = videos_of(tmp_path / "v", "--floats", "symmetric")
    assert np.allclose(sorted(data[i][0].mean().item() for i in range(2)), [0, 0.5], atol=0.01)
    data = videos_of(tmp_path / "v" / "b.npy", "--floats", "unit")
    assert abs(data[0][0].mean()) < 0.01


def growth(film):
    """Decode a film, and exit with the MiB that this takes at most."""
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10
    before = peak()
    videos_of(film)
    os._exit(peak() - before)


def test_a_film_is_decoded_frame_by_frame():
    film = np.broadcast_to(np.uint8(100), (100, 540, 960, 3))  # 148 MiB
    iio.imwrite("film.mp4", film, fps=25, plugin="pyav", codec="mpeg4")
    process = SERVER.Process(target=growth, args=("film.mp4",))
    process.start()
    assert 0 < ends(process) < 100


def test_resize_takes_the_centre_of_the_short_side_rounded_as_the_papers_library_does():
    frame = np.zeros((8, 16, 3), np.uint8)
    frame[:, 4:12] = 200
    assert (train.resize(frame, 8) == 200).all() and train.resize(frame, 4).shape == (4, 4, 3)
    assert (train.resize(frame.transpose(1, 0, 2).copy(), 8) == 200).all()
    assert (train.resize(np.full((3, 5, 3), 77, np.uint8), 16) == 77).all()
    frame = np.broadcast_to(np.arange(30, dtype=np.uint8)[:, None], (10, 30, 3))
    for width, left in ((20, 5), (13, 2), (17, 4), (15, 2)):  # 5, 1.5, 3.5 and 2.5: halves go to even numbers
        assert train.resize(np.ascontiguousarray(frame[:, :width]), 10)[0, 0, 0] == left


def test_without_antialias_half_the_size_is_the_mean_of_two_by_two_and_a_quarter_sees_only_the_middle():
    frame = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for factor in (2, 4):
        blocks = frame.reshape(16 // factor, factor, 16 // factor, factor, 3).astype(float)
        middle = slice(factor // 2 - 1, factor // 2 + 1)
        mean = blocks[:, middle, :, middle].mean((1, 3))
        assert np.abs(train.resize(frame, 16 // factor, antialias=False) - mean).max() <= 0.5
    assert np.abs(train.resize(frame, 4).astype(float) - mean).max() > 5


def test_only_files_that_changed_are_decoded_again_and_each_way_of_decoding_has_its_own(tmp_path):
    folder = write_videos(tmp_path / "v")
    first, before = [videos_of(folder)[i][0] for i in range(3)], cache()
    assert all(torch.equal(videos_of(folder)[i][0], first[i]) for i in range(3)) and cache() == before
    np.save(folder / "1.npy", np.zeros((9, 8, 8, 3), np.uint8))
    assert any((videos_of(folder)[i][0] == -1).all() for i in range(3)) and len(cache()) == len(before) + 1
    assert not any(torch.equal(videos_of(folder, "--no-antialias")[0][0], x) for x in first)
    assert videos_of(folder, "--size", 16)[0][0].shape == (3, 4, 16, 16)


def test_decoding_that_is_killed_goes_on_with_what_is_missing_and_leaves_no_process(tmp_path):
    folder = write_videos(tmp_path / "v", count=30, frames=200, size=(32, 32))
    process = start(*DIM, "--data", folder, "--workers", 2, "--out", "runs/x")
    wait_for(lambda: len(cache()) > 2, process)
    process.kill()
    assert process.pipe.poll(30)
    done = cache()
    assert 3 <= len(done) < 30 and len(videos_of(folder)) == 30 and done.items() <= cache().items()


def test_bad_and_short_videos_are_named_every_time_and_several_processes_decode_as_one(tmp_path, capsys):
    folder = write_videos(tmp_path / "v", count=5)
    (folder / "broken.mp4").write_bytes(b"not a video")
    (folder / "empty.npy").touch()
    np.save(folder / "short.npy", np.zeros((2, 8, 8, 3), np.uint8))
    for out, workers in (("a/run", 1), ("a/again", 1), ("b/run", 2)):
        run(*DIM, "--data", folder, "--steps", 1, "--workers", workers, "--out", out)
        told = capsys.readouterr().out
        assert "5 of 6 videos" in told and "have 3 frames" in told
        assert re.search("skipped .*broken.mp4: ", told) and re.search("skipped .*empty.npy: ", told)
    stored = lambda out: {path.name: path.read_bytes() for path in pathlib.Path(f"{out}/cache").iterdir()}
    assert stored("a") == stored("b") and len(stored("a")) == 6


def only(data):
    return [level for level, _ in levels(data)]


def test_folders_train_and_test_are_splits(tmp_path):
    """As those of MineRL Navigate and GQN-Mazes."""
    root = tmp_path / "minerl_navigate-torch"
    for part, some in (("train", (10, 11, 12)), ("test", (20, 21))):
        (root / part).mkdir(parents=True)
        for level in some:
            np.save(root / part / f"{level}.npy", grey(level))
    assert only(videos_of(root)) == only(split(root, "train")) == [10, 11, 12]
    assert only(split(root, "test")) == only(videos_of(root, held_out=True)) == [20, 21]
    assert only(split(root, "all")) == only(split(root, "all", held_out=True)) == [10, 11, 12, 20, 21]
    assert only(videos_of(root / "train")) == [10, 11, 12]


@pytest.mark.parametrize("csv_above", [False, True])
def test_carla_is_divided_by_the_last_parts_of_the_paths_in_its_lists(tmp_path, csv_above):
    """They are tensors, and lists whose paths are those of another computer."""
    root = tmp_path / "carla"
    (root / "no-traffic").mkdir(parents=True)
    for i in range(5):
        torch.save(torch.from_numpy(grey(10 + i)), root / "no-traffic" / f"video_{i}.pt")
    for part, some in (("train", (0, 1, 2)), ("test", (3, 4))):
        rows = [f"{i},/ubc/data/carla/no-traffic/video_{i}.pt\n" for i in some]
        place = root if csv_above else root / "no-traffic"
        (place / f"video_{part}.csv").write_text(",path\n" + "".join(rows))
    for path in (root, root / "no-traffic"):
        assert only(videos_of(path)) == [10, 11, 12] and only(split(path, "test")) == [13, 14]
        assert only(split(path, "all")) == [10, 11, 12, 13, 14]
    for part in ("train", "test"):
        file = next(root.rglob(f"video_{part}.csv"))
        text = file.read_bytes().replace(b"/ubc/data/carla/no-traffic/", b"C:\\carla\\")
        file.write_bytes(text.replace(b"\n", b"\r\n"))
    assert only(videos_of(root)) == [10, 11, 12]
    (root / "no-traffic" / "video_1.pt").unlink()
    data = videos_of(root)
    assert only(data) == [10, 12] and re.search(r"video_1\.pt: ", str(*data.skipped.values()))


def test_ucf101_is_divided_by_its_first_lists_and_its_folders_are_classes(tmp_path):
    """A folder spells its class otherwise than its files do, and a list ends its lines as on Windows."""
    root, listed = tmp_path / "ucf101", {"train": [], "test": []}
    for k, (name, stem) in enumerate([("HandstandPushups", "HandStandPushups"), ("YoYo", "YoYo")]):
        (root / "UCF-101" / name).mkdir(parents=True)
        for g, part in ((1, "test"), (8, "train"), (9, "train")):
            file = f"v_{stem}_g{g:02d}_c01.avi"
            video = grey(100 * k + 10 * g).repeat(4, 1).repeat(4, 2)
            iio.imwrite(root / "UCF-101" / name / file, video, fps=25, plugin="pyav", codec="mpeg4")
            listed[part].append(f"{name}/{file}" + (f" {k + 1}\n" if part == "train" else "\r\n"))
    (root / "ucfTrainTestlist").mkdir()
    for part, lines in listed.items():
        (root / "ucfTrainTestlist" / f"{part}list01.txt").write_bytes("".join(lines).encode())
        (root / "ucfTrainTestlist" / f"{part}list02.txt").write_text("YoYo/v_YoYo_g01_c01.avi\n")

    near = lambda data: [(round(level, -1), name) for level, name in levels(data)]  # avi is lossy
    hand, yoyo = "HandstandPushups", "YoYo"
    for path in (root, root / "UCF-101"):
        assert near(videos_of(path)) == [(80, hand), (90, hand), (180, yoyo), (190, yoyo)]
        assert near(split(path, "test")) == [(10, hand), (110, yoyo)] and len(split(path, "all")) == 6
    file = root / "ucfTrainTestlist" / "trainlist01.txt"  # in other letters than the disk
    file.write_text(file.read_text().replace("v_HandStand", "v_Handstand"))
    assert len(videos_of(root)) == 4 and not videos_of(root).skipped


def test_lists_of_other_data_beside_it_do_not_count(tmp_path):
    folder = write_videos(tmp_path / "v")
    (tmp_path / "video_train.csv").write_text(",path\n0,other.pt\n")
    (tmp_path / "video_test.csv").write_text(",path\n0,another.pt\n")
    assert len(videos_of(folder)) == 3


def test_the_class_of_a_video_is_the_folder_that_holds_it(tmp_path):
    for i, name in enumerate(("dogs", "cats")):
        (tmp_path / "v" / name).mkdir(parents=True)
        np.save(tmp_path / "v" / name / "0.npy", grey(i))
    (tmp_path / "v" / "birds" / "clip").mkdir(parents=True)
    for k in range(4):
        iio.imwrite(tmp_path / "v" / "birds" / "clip" / f"{k}.png", grey(10)[0])
    assert levels(videos_of(tmp_path / "v")) == [(0, "dogs"), (1, "cats"), (10, "birds")]


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<f8", ">f4"])
def test_latents_keep_their_values(tmp_path, dtype):
    (tmp_path / "z").mkdir()
    stored = (7 * np.random.default_rng(0).standard_normal((3, 5, 8, 8, 4))).astype(dtype)
    for i in range(3):
        np.save(tmp_path / "z" / f"{i}.npy", stored[i])
    data = videos_of(tmp_path / "z", "--frames", 5, "--latents")
    items = np.stack([data[i][0].permute(1, 2, 3, 0).numpy() for i in range(3)])
    assert items.dtype == np.float32
    assert np.array_equal(np.sort(items, axis=None), np.sort(stored.astype(np.float32), axis=None))


def test_latents_train_resume_and_sample_unclipped_and_without_pictures(tmp_path):
    (tmp_path / "z").mkdir()
    np.save(tmp_path / "z" / "0.npy", np.full((5, 8, 8, 5), 7, np.float32))
    run(*DIM, "--data", "z", "--latents", "--steps", 30, "--lr", 2e-2, "--target", "x0", "--out", "run")
    again("--resume", "run", "--steps", 31)
    assert sorted(os.listdir("run/samples")) == ["data.npz", "step-000030.npz", "step-000031.npz"]
    shutil.rmtree("z")
    again("sample", "run", "--frames", 4)
    drawn = np.load("run/sampled/fake.npz")["videos"]
    assert drawn.shape == (2, 4, 8, 8, 5) and drawn.dtype == np.float32 and drawn.max() > 1
    assert os.listdir("run/sampled") == ["fake.npz"]


def test_arrays_that_are_no_latents_are_named_with_the_reason(tmp_path):
    (tmp_path / "z").mkdir()
    good = np.zeros((5, 8, 8, 4), np.float32)
    bad = {"nan": np.where(np.arange(4) == 1, np.nan, good), "big": np.full_like(good, 1e39, np.float64),
           "ints": good.astype(int), "other": good[:, :4], "good": good}  # fmt: skip
    for name, array in bad.items():
        np.save(tmp_path / "z" / f"{name}.npy", array)
    (tmp_path / "z" / "text.npy").write_text("text")
    data = videos_of(tmp_path / "z", "--frames", 5, "--latents")
    reasons = {source.stem: str(why) for source, why in data.skipped.items()}
    named = dict(nan="not finite", big="not finite", ints="int64", other="--size 8", text="text.npy")
    assert len(data) == 1 and all(named[name] in why for name, why in reasons.items()) and len(reasons) == 5
