"""Folders become the videos they hold: every split, class and pixel, once decoded, whatever interrupts."""

import os
import pathlib
import shutil
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


def refuses(*argv):
    with pytest.raises(train.BadInput) as error:
        train.main([str(a) for a in argv])
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def write_videos(folder, count=3, frames=6, size=(12, 10)):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        np.save(folder / f"{i}.npy", rng.integers(0, 256, (frames, *size, 3), dtype=np.uint8))
    return folder


def videos_of(path, frames=4, size=8, cache="cache", seed=0, **how):
    return train.FolderVideos(path, frames, size, pathlib.Path(cache), seed, **how)


def grey(*levels, frames=4):
    """A video of one level per frame, so that a window tells where it comes from."""
    levels = levels * frames if len(levels) == 1 else levels
    return np.broadcast_to(np.uint8(levels)[:, None, None, None], (len(levels), 8, 8, 3)).copy()


def levels(data):
    """Grey levels of the first frames of an epoch, sorted, each with its label's name."""
    items = [data[i] for i in range(len(data.videos))]
    return sorted((int(((video[0, 0, 0, 0] + 1) * 127.5).round()), data.classes[label]) for video, label in items)


# ---- Windows, cache


def test_windows_are_consecutive_frames_of_one_video_and_an_epoch_shows_each_once(tmp_path):
    (tmp_path / "v").mkdir()
    for i in range(4):
        np.save(tmp_path / "v" / f"{i}.npy", grey(*(50 * i + np.arange(9))))
    data = videos_of(tmp_path / "v", frames=5)
    seen = []
    for i in range(4):
        window = ((data[i][0][0, :, 0, 0] + 1) * 127.5).round().int()
        assert (window.diff() == 1).all() and window[0] // 50 == window[-1] // 50
        seen.append(window[0].item() // 50)
    assert sorted(seen) == [0, 1, 2, 3]
    starts = {int(((data[i][0][0, 0, 0, 0] + 1) * 127.5).round()) % 50 for i in range(100)}
    assert starts == {0, 1, 2, 3, 4}


def test_only_files_that_changed_are_decoded_again(tmp_path, monkeypatch):
    folder = write_videos(tmp_path / "v")
    first = videos_of(folder)
    decoded, real = [], train.read_frames
    monkeypatch.setattr(train, "read_frames", lambda video: decoded.append(pathlib.Path(video.name).name) or real(video))
    again = videos_of(folder)
    assert torch.equal(again[0][0], first[0][0]) and again.fingerprint == first.fingerprint and not decoded
    np.save(folder / "1.npy", np.zeros((9, 8, 8, 3), np.uint8))
    changed = videos_of(folder)
    assert changed.videos[:, 2].tolist() == [6, 9, 6] and decoded == ["1.npy"]
    assert changed.fingerprint != first.fingerprint


def test_a_run_goes_on_with_a_copy_of_its_data_but_not_with_other_values(tmp_path):
    write_videos(tmp_path / "v")
    train.main([*TINY, "--data", str(tmp_path / "v"), "--steps", "1", "--out", "run"])
    shutil.copytree(tmp_path / "v", tmp_path / "copy", copy_function=shutil.copyfile)  # with new times
    train.main(["--resume", "run", "--data", str(tmp_path / "copy"), "--steps", "2"])
    video = np.load(tmp_path / "copy" / "1.npy")
    np.save(tmp_path / "copy" / "1.npy", 255 - video)  # as many bytes
    assert "no longer holds the videos" in refuses("--resume", "run", "--steps", 3)


@pytest.mark.parametrize("harm", [lambda path: os.truncate(path, 1000), pathlib.Path.unlink], ids=["cut", "removed"])
def test_a_cache_that_is_harmed_while_it_is_read_is_named(tmp_path, harm):
    data = videos_of(write_videos(tmp_path / "v"))
    for i in range(3):
        harm(data.cache.file(i))
    with pytest.raises(train.BadInput, match=r"\.u8 was changed or removed"):
        data[0]


@pytest.mark.parametrize("damage", ["cut", "deleted", "garbled", "of another kind", "half missing"])
def test_damaged_entries_of_the_cache_and_no_others_are_built_again(tmp_path, damage):
    folder = write_videos(tmp_path / "v")
    first = videos_of(folder)
    frames = first.cache.file(1)
    described = frames.with_suffix(".json")
    if damage == "garbled":
        described.write_text('{"videos"')
    elif damage == "of another kind":
        described.write_text("[1, 2]")
    elif damage == "cut":
        frames.write_bytes(b"123")
    else:
        (frames if damage == "deleted" else described).unlink()
    before = {path: path.stat().st_mtime_ns for path in first.cache.folder.iterdir()}
    again = videos_of(folder)
    assert all(torch.equal(again[i][0], first[i][0]) for i in range(3))
    touched = {path.stem for path in first.cache.folder.iterdir() if before.get(path) != path.stat().st_mtime_ns}
    assert touched == {frames.stem}


def test_several_processes_decode_the_same_bytes_as_one(tmp_path):
    folder = write_videos(tmp_path / "v", count=7)
    (folder / "broken.mp4").write_bytes(b"not a video")
    read = lambda data: [(file.name, file.read_bytes()) for file in map(data.cache.file, range(8)) if file.exists()]
    serial, parallel = (videos_of(folder, cache=str(n), workers=n) for n in (0, 2))
    assert read(serial) == read(parallel) and len(read(serial)) == 7
    assert serial.skipped == parallel.skipped and "broken.mp4" in serial.skipped[0][0]
    assert (serial.videos == parallel.videos).all()


SLOW = """
import pathlib, sys, time
sys.path.insert(0, {root!r})
import train
real = train.read_frames
def slow(video):
    time.sleep(0.1)
    print("decoding", video.name, flush=True)
    yield from real(video)
train.read_frames = slow
data = train.FolderVideos({folder!r}, 4, 8, pathlib.Path("cache"), 0, workers={workers})
print("sum", sum(data[i][0].double().sum().item() for i in range(len(data.videos))))
"""


def building(folder, workers=0):
    code = SLOW.format(root=str(ROOT), folder=str(folder), workers=workers)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_build_that_is_killed_goes_on_with_what_is_missing(tmp_path, workers):
    folder = write_videos(tmp_path / "v", count=12)
    first = building(folder, workers)
    cache = tmp_path / "cache" / "v-8px"
    while not cache.exists() or len(list(cache.glob("*.json"))) < 3:
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()  # -9
    first.communicate()  # ends when its processes have closed their output, too
    done = {path: path.stat().st_mtime_ns for path in cache.glob("*.json")}
    assert 3 <= len(done) < 12
    data = videos_of(folder)
    assert len(data.videos) == 12 and len(list(cache.glob("*.json"))) == 12
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    whole = videos_of(folder, cache="elsewhere")
    assert all(torch.equal(data[i][0], whole[i][0]) for i in range(12))


def test_two_runs_that_build_one_cache_share_the_work_and_agree(tmp_path):
    folder = write_videos(tmp_path / "v", count=12)
    both = [building(folder), building(folder)]
    answers = [process.communicate()[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert answers[0][-1] == answers[1][-1]
    assert 12 <= sum(line.startswith("decoding") for lines in answers for line in lines) < 24
    alone = videos_of(folder, cache="elsewhere")
    assert float(answers[0][-1].split()[1]) == sum(alone[i][0].double().sum().item() for i in range(12))
    assert not list((tmp_path / "cache" / "v-8px").glob("*.part"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_takes_no_more_is_one_sentence_that_names_the_file(tmp_path, workers):
    resource = pytest.importorskip("resource")
    folder = write_videos(tmp_path / "v")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))  # bytes; a video has 1152
    command = [sys.executable, ROOT / "train.py", *TINY, "--data", folder, "--steps", "1", "--workers", str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert ".u8 cannot be written" in done.stderr.splitlines()[-1] and "too large" in done.stderr
    assert not list((tmp_path / "runs" / "cache" / "v-8px").iterdir())


def test_every_process_that_builds_a_cache_has_an_order_of_its_own_so_that_they_seldom_meet(tmp_path, monkeypatch):
    folder, orders, real = write_videos(tmp_path / "v", count=12), ([], []), train.read_frames
    for order, cache in zip(orders, "ab"):
        monkeypatch.setattr(train, "read_frames", lambda video: order.append(video.name) or real(video))
        videos_of(folder, cache=cache)
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_leftovers_of_a_killed_build_are_removed_after_a_day(tmp_path):
    folder = write_videos(tmp_path / "v")
    cache = videos_of(folder).cache.folder
    for name in ("old.part", "new.part"):
        (cache / name).write_text("half")
    os.utime(cache / "old.part", (0, 0))
    (cache / "gone.part").symlink_to("nowhere")  # as if another process had just renamed it
    videos_of(folder)
    assert not (cache / "old.part").exists() and (cache / "new.part").exists()


def test_data_whose_names_differ_behind_a_dot_and_sizes_and_transforms_have_caches_of_their_own(tmp_path):
    for name, level in (("a.b.c.npy", 0), ("a.b.d.npy", 255)):
        np.save(tmp_path / name, grey(level, frames=9))
    assert levels(videos_of("a.b.c.npy"))[0][0] == 0 and levels(videos_of("a.b.d.npy"))[0][0] == 255
    assert videos_of("a.b.c.npy", size=16)[0][0].shape == (3, 4, 16, 16)
    rng = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    np.save("r.npy", rng)
    with_, without = videos_of("r.npy"), videos_of("r.npy", antialias=False)
    assert not torch.equal(with_[0][0], without[0][0]) and with_.fingerprint != without.fingerprint
    assert torch.equal(videos_of("r.npy")[0][0], with_[0][0])


def test_unreadable_files_are_skipped_named_explained_and_tried_again(tmp_path, capsys):
    folder = write_videos(tmp_path / "v", count=2)
    (folder / "broken.mp4").write_bytes(b"not a video")
    (folder / "empty.npy").touch()
    np.save(folder / "short.npy", np.zeros((2, 8, 8, 3), np.uint8))
    for out in ("run", "again"):
        train.main([*TINY, "--data", str(folder), "--steps", "1", "--out", out])
        end = capsys.readouterr().out
        assert "2 videos" in end and "1 shorter than 3 frames" in end
        assert "skipped 2 unreadable" in end and "broken.mp4" in end and "empty.npy" in end


@pytest.mark.parametrize("kind", ["mp4", "gif", "npz", "pt", "images", "grey", "many", "one file"])
def test_every_kind_of_video_trains(tmp_path, kind):
    folder, rng = tmp_path / "v", np.random.default_rng(0)
    folder.mkdir()
    video = rng.integers(0, 256, (6, 16, 20, 3), dtype=np.uint8)
    path = folder
    if kind == "mp4":
        iio.imwrite(folder / "a.mp4", video.repeat(2, 1).repeat(2, 2), fps=10, plugin="pyav", codec="libx264")
    elif kind == "gif":
        iio.imwrite(folder / "a.gif", video)
    elif kind == "npz":
        np.savez(folder / "a.npz", video=video)
    elif kind == "pt":
        torch.save(torch.from_numpy(video), folder / "a.pt")
    elif kind == "images":
        (folder / "clip").mkdir()
        for i, frame in enumerate(video):
            iio.imwrite(folder / "clip" / f"{i:03d}.png", frame)
    elif kind == "grey":
        np.save(folder / "a.npy", video[..., 0])
    elif kind == "many":
        np.save(folder / "a.npy", np.stack([video, 255 - video]))
    else:
        path = folder / "a.npy"
        np.save(path, video)
    data = videos_of(path, frames=6)
    assert len(data.videos) == (2 if kind == "many" else 1)
    assert data[0][0].shape == (3, 6, 8, 8) and data[0][0].min() >= -1 and data[0][0].max() <= 1
    if kind == "many":
        assert torch.equal(torch.sort(torch.stack([data[i][0] for i in range(2)]), dim=0)[0][0],
                           torch.minimum(*map(train.to_model_range, (train.resize(video, 8), train.resize(255 - video, 8)))))
    if kind in ("npz", "pt", "one file"):
        assert torch.equal(data[0][0], train.to_model_range(train.resize(video, 8)))


# ---- Pixels


def test_resize_takes_the_centre_of_the_short_side():
    video = np.zeros((2, 8, 16, 3), np.uint8)
    video[:, :, 4:12] = 200
    assert (train.resize(video, 8) == 200).all() and train.resize(video, 4).shape == (2, 4, 4, 3)
    assert (train.resize(video.transpose(0, 2, 1, 3).copy(), 8) == 200).all()
    assert (train.resize(np.full((1, 3, 5, 3), 77, np.uint8), 16) == 77).all()


def test_without_antialias_half_the_size_is_the_mean_of_two_by_two_and_a_quarter_sees_only_the_middle():
    video = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    for factor in (2, 4):
        blocks = video.reshape(3, 16 // factor, factor, 16 // factor, factor, 3).astype(float)
        middle = slice(factor // 2 - 1, factor // 2 + 1)
        mean = blocks[:, :, middle, :, middle].mean((2, 4))
        assert np.abs(train.resize(video, 16 // factor, antialias=False) - mean).max() <= 0.5
    assert np.abs(train.resize(video, 4).astype(float) - mean).max() > 5


def test_the_cut_in_the_middle_is_rounded_as_the_papers_library_does():
    video = np.broadcast_to(np.arange(30, dtype=np.uint8)[:, None], (1, 10, 30, 3))
    for width, left in ((20, 5), (13, 2), (17, 4), (15, 2)):  # 5, 1.5, 3.5 and 2.5: halves go to even numbers
        wide = np.ascontiguousarray(video[:, :, :width])
        assert train.resize(wide, 10)[0, 0, 0, 0] == left


# ---- The papers' data sets: tiny ones of their layouts


def navigate(root):
    """MineRL Navigate and GQN-Mazes: folders train/ and test/ of arrays."""
    for part, some in (("train", (10, 11, 12)), ("test", (20, 21))):
        (root / part).mkdir(parents=True)
        for i, level in enumerate(some):
            np.save(root / part / f"{i}.npy", grey(level))
    return root


def carla(root, csv_above=False):
    """CARLA: tensors, and lists whose paths are those of another computer."""
    (root / "no-traffic").mkdir(parents=True)
    for i in range(5):
        torch.save(torch.from_numpy(grey(10 + i)), root / "no-traffic" / f"video_{i}.pt")
    for part, some in (("train", (0, 1, 2)), ("test", (3, 4))):
        rows = [f"{i},/ubc/data/carla/no-traffic/video_{i}.pt\n" for i in some]
        place = root if csv_above else root / "no-traffic"
        (place / f"video_{part}.csv").write_text(",path\n" + "".join(rows))
    return root


def ucf(root, newline="\r\n"):
    """UCF101: class folders, one of which spells its class otherwise than its files do, and lists with CRLF."""
    listed = {"train": [], "test": []}
    for k, (name, stem) in enumerate([("HandstandPushups", "HandStandPushups"), ("YoYo", "YoYo")]):
        (root / "UCF-101" / name).mkdir(parents=True)
        for g, part in ((1, "test"), (8, "train"), (9, "train")):
            file = f"v_{stem}_g{g:02d}_c01.avi"
            video = grey(100 * k + 10 * g).repeat(4, 1).repeat(4, 2)
            iio.imwrite(root / "UCF-101" / name / file, video, fps=25, plugin="pyav", codec="mpeg4")
            listed[part].append(f"{name}/{file}" + (f" {k + 1}" if part == "train" else ""))
    (root / "ucfTrainTestlist").mkdir()
    for part, lines in listed.items():
        text = "".join(line + newline for line in lines)
        (root / "ucfTrainTestlist" / f"{part}list01.txt").write_bytes(text.encode())
        (root / "ucfTrainTestlist" / f"{part}list02.txt").write_bytes(b"YoYo/v_YoYo_g01_c01.avi" + newline.encode())
    (root / "ucfTrainTestlist" / "classInd.txt").write_bytes(b"1 HandstandPushups\r\n2 YoYo\r\n")
    return root


def only(data):
    return [level for level, _ in levels(data)]


def test_folders_train_and_test_are_splits(tmp_path):
    root = navigate(tmp_path / "minerl_navigate-torch")
    assert only(videos_of(root)) == only(videos_of(root, split="train")) == [10, 11, 12]
    assert only(videos_of(root, split="test")) == [20, 21]
    assert only(videos_of(root, split="all")) == [10, 11, 12, 20, 21]
    assert only(videos_of(root / "train")) == [10, 11, 12]
    (root / "notes").mkdir()
    np.save(root / "notes" / "0.npy", grey(99))
    assert only(videos_of(root)) == [10, 11, 12] and 99 in only(videos_of(root, split="all"))


@pytest.mark.parametrize("csv_above", [False, True])
def test_carla_is_divided_by_the_last_parts_of_the_paths_in_its_lists(tmp_path, csv_above):
    root = carla(tmp_path / "carla", csv_above)
    for path in (root, root / "no-traffic"):
        assert only(videos_of(path)) == [10, 11, 12]
        assert only(videos_of(path, split="test")) == [13, 14]
        assert only(videos_of(path, split="all")) == [10, 11, 12, 13, 14]
    for part in ("train", "test"):
        file = next(root.rglob(f"video_{part}.csv"))
        file.write_bytes(file.read_bytes().replace(b"/ubc/data/carla/no-traffic/", b"C:\\carla\\").replace(b"\n", b"\r\n"))
    assert only(videos_of(root)) == [10, 11, 12]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_ucf101_is_divided_by_its_first_lists_and_its_folders_are_classes(tmp_path, newline):
    root = ucf(tmp_path / "ucf101", newline)
    near = lambda data: [(round(level, -1), name) for level, name in levels(data)]  # avi is lossy
    for path in (root, root / "UCF-101"):
        assert videos_of(path).classes == ("HandstandPushups", "YoYo")
        assert near(videos_of(path)) == [(80, "HandstandPushups"), (90, "HandstandPushups"), (180, "YoYo"), (190, "YoYo")]
        assert near(videos_of(path, split="test")) == [(10, "HandstandPushups"), (110, "YoYo")]
        assert len(videos_of(path, split="all").videos) == 6


def test_lists_may_spell_names_in_other_letters_than_the_disk(tmp_path):
    root = ucf(tmp_path / "ucf101")
    file = root / "ucfTrainTestlist" / "trainlist01.txt"
    file.write_text(file.read_text().replace("HandstandPushups/v_HandStandPushups", "HandStandPushups/v_HandstandPushups"))
    data = videos_of(root)
    assert len(data.videos) == 4 and not data.skipped


def test_listed_videos_that_are_missing_are_skipped_and_named(tmp_path, capsys):
    root = carla(tmp_path / "carla")
    (root / "no-traffic" / "video_1.pt").unlink()
    train.main([*TINY, "--data", str(root), "--steps", "1", "--out", "run"])
    end = capsys.readouterr().out
    assert "2 videos" in end and "skipped 1" in end and "video_1.pt: there is no such file" in end


def test_a_split_that_a_folder_does_not_have_is_refused(tmp_path):
    folder = write_videos(tmp_path / "v")
    for split in ("train", "test"):
        assert f"--split {split}" in refuses(*TINY, "--data", folder, "--split", split)
    assert len(videos_of(folder, split="all").videos) == 3
    (tmp_path / "video_train.csv").write_text(",path\n0,other.pt\n")  # another data set's, beside it
    (tmp_path / "video_test.csv").write_text(",path\n0,another.pt\n")
    assert len(videos_of(folder).videos) == 3
    assert "the maze" in refuses(*TINY, "--split", "all") and "the maze" in refuses(*TINY, "--no-antialias")


def test_samples_are_compared_with_the_test_split_only_if_it_is_not_trained_on(tmp_path):
    root = navigate(tmp_path / "minerl_navigate-torch")
    arguments = [*TINY, "--frames", "4", "--data", str(root), "--eval-every", "1", "--eval-videos", "2"]

    def both(*more):
        args = train.complete(train.training_parser().parse_args([*arguments, *more]))
        return only(train.make_data(args)), only(train.make_data(args, test=True))

    assert both() == ([10, 11, 12], [20, 21])
    args = train.complete(train.training_parser().parse_args([*arguments[:-1], "3"]))
    with pytest.raises(train.BadInput, match="3 are more than the 2 held-out videos"):
        train.Score(args, train.Ranks("cpu"))
    kept, held = both("--split", "all")
    assert len(held) == 2 and sorted(kept + held) == [10, 11, 12, 20, 21]


# ---- Labels


def test_the_class_of_a_walk_is_its_wall_style():
    data = train.MazeVideos("train", 2, 8)
    assert data.classes == ("bricks", "boards", "checks")
    assert {data[i][1] for i in range(9)} == {0, 1, 2}
    assert all(data[i][1] == train.maze_style(train.maze_seed("train", i)) for i in range(5))


def test_the_class_of_a_video_is_the_folder_that_holds_it_and_batches_have_whole_numbers(tmp_path):
    for i, name in enumerate(("dogs", "cats", "birds")):
        (tmp_path / "v" / name).mkdir(parents=True)
        np.save(tmp_path / "v" / name / "0.npy", grey(i))
        (tmp_path / "v" / name / "clip").mkdir()
        for k in range(4):
            iio.imwrite(tmp_path / "v" / name / "clip" / f"{k}.png", grey(10 + i)[0])
        if name != "cats":
            (tmp_path / "v" / name / "0.npy").rename(tmp_path / "v" / name / "clip.npy")
            for file in (tmp_path / "v" / name / "clip").iterdir():
                file.unlink()
    data = videos_of(tmp_path / "v")
    assert data.classes == ("birds", "cats", "dogs")
    assert levels(data) == [(0, "dogs"), (1, "cats"), (2, "birds"), (11, "cats")]
    videos, labels = next(iter(torch.utils.data.DataLoader(data, 4, sampler=range(4))))
    assert videos.shape == (4, 3, 4, 8, 8) and labels.dtype == torch.int64


# ---- Latents


def write_latents(folder, count=3, shape=(5, 8, 8, 4), dtype=np.float32):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        np.save(folder / f"{i}.npy", (7 * rng.standard_normal(shape)).astype(dtype))
    return folder


NO_SIZE = TINY[2:]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_latents_keep_their_values_and_are_not_copied(tmp_path, dtype):
    folder = write_latents(tmp_path / "z", dtype=dtype)
    data = videos_of(folder, frames=5, channels=4)
    stored = np.stack([np.load(folder / f"{i}.npy") for i in range(3)])
    items = [data[i][0] for i in range(3)]
    assert all(item.dtype == torch.float32 and item.shape == (4, 5, 8, 8) for item in items)
    back = np.stack([item.permute(1, 2, 3, 0).numpy() for item in items])
    assert (np.sort(back.ravel()) == np.sort(stored.astype(np.float32).ravel())).all()
    assert {path.suffix for path in data.cache.folder.iterdir()} == {".json"}


def test_latents_train_resume_and_sample_without_data_or_pictures(tmp_path, monkeypatch):
    folder = write_latents(tmp_path / "z")
    train.main([*NO_SIZE, "--data", str(folder), "--latents", "--steps", "2", "--out", "run"])
    train.main(["--resume", "run", "--steps", "3"])
    assert [path.suffix for path in pathlib.Path("run/samples").iterdir()] == [".npz", ".npz"]
    folder.rename(tmp_path / "gone")
    clips, real = [], train.GaussianDiffusion
    monkeypatch.setattr(train, "GaussianDiffusion", lambda *a, **more: clips.append(more["clip"]) or real(*a, **more))
    train.main(["sample", "run", "--videos", "2", "--frames", "4", "--sample-steps", "2", "--device", "cpu"])
    with np.load("run/sampled/videos.npz", allow_pickle=False) as arrays:
        videos = arrays["videos"]
    assert videos.shape == (2, 4, 8, 8, 4) and videos.dtype == np.float32
    assert os.listdir("run/sampled") == ["videos.npz"] and clips == [False]


def test_samples_of_latents_are_not_clipped_and_those_of_pixels_are():
    wide = lambda x, t: torch.full_like(x, 5.0)
    for clip, value in ((True, 1.0), (False, 5.0)):
        diffusion = train.GaussianDiffusion(wide, steps=8, target="x0", clip=clip)
        assert (diffusion.sample(torch.randn(1, 4, 2, 4, 4), steps=4) == value).all()


def test_arrays_that_are_no_latents_are_named_with_the_reason(tmp_path):
    folder = write_latents(tmp_path / "z")
    bad = np.zeros((5, 8, 8, 4), np.float32)
    bad[3, 1, 1, 1] = np.nan
    np.save(folder / "8nan.npy", bad)
    np.save(folder / "9big.npy", np.full((5, 8, 8, 4), 1e39))
    np.save(folder / "9ints.npy", np.zeros((5, 8, 8, 4), np.int64))
    np.save(folder / "9other.npy", np.zeros((5, 8, 8, 5), np.float32))
    (folder / "9text.npy").write_text("text")
    data = videos_of(folder, channels=4)
    assert len(data.videos) == 3
    (folder / "0.npy").write_bytes(b"damaged")  # the first is skipped as any other
    assert train.latent_shape(folder) == (8, 4)
    reasons = {pathlib.Path(name).name: reason for name, reason in data.skipped}
    assert "NaN" in reasons["8nan.npy"] and "NaN" in reasons["9big.npy"] and "int64" in reasons["9ints.npy"]
    assert "(5, 8, 8, 5)" in reasons["9other.npy"] and len(reasons) == 5


def test_latents_of_another_shape_or_with_flags_for_pixels_are_refused(tmp_path):
    latents = [*NO_SIZE, "--latents", "--data"]
    assert "float (frames, size, size, channels)" in refuses(*latents, write_latents(tmp_path / "a", shape=(5, 8, 4, 4)))
    assert "float (frames, size, size, channels)" in refuses(*latents, write_videos(tmp_path / "b", size=(8, 8)))
    folder = write_latents(tmp_path / "c")
    assert "leave out --size" in refuses(*latents, folder, "--size", 8)
    assert "leave out --size" in refuses(*latents, folder, "--no-antialias")
    assert "leave out --size" in refuses(*latents, folder, "--eval-every", 1)
    assert "and --fps" in refuses(*latents, folder, "--fps", 4)
    assert "the maze" in refuses(*latents, "maze")
    assert "no such file" in refuses(*latents, tmp_path / "nowhere")
    assert "multiple of 4" in refuses(*latents, write_latents(tmp_path / "d", shape=(5, 6, 6, 4)), "--dim-mults", "1,2,4")
