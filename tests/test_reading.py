"""Reading videos: what is intact comes out as 8-bit RGB, as players show it; what is damaged is named."""
import os
import re
import subprocess

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

import fvd
from fvd import UnreadableVideo, find_videos, open_videos, read_frames

CODECS = {".mp4": "libx264", ".mov": "libx264", ".mkv": "libx264", ".webm": "libvpx", ".avi": "mpeg4"}


def moving_square(t=30, h=32, w=32):
    """A bright square that moves right over a slow gradient.    -> uint8 (t, h, w, 3)"""
    video = np.full((t, h, w, 3), 40, np.uint8)
    video[..., 1] += np.arange(w, dtype=np.uint8) * 3
    for k in range(t):
        video[k, 8:20, k % (w - 8):k % (w - 8) + 8] = 220, 200, 90
    return video


def save(path, video):
    """Write a video, or an array of any kind, in the format that the suffix names.    -> path"""
    if path.suffix in CODECS:
        iio.imwrite(path, video, fps=20, plugin="pyav", codec=CODECS[path.suffix])
    elif path.suffix == ".npy":
        np.save(path, video)
    elif path.suffix == ".npz":
        np.savez(path, videos=video, fps=np.array(8))
    elif path.suffix == ".pt":
        torch.save(torch.from_numpy(np.ascontiguousarray(video)), path)
    else:
        first, *others = map(Image.fromarray, video)
        first.save(path, save_all=True, append_images=others, lossless=True)
    return path


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    """The moving square, written once in every format.    -> {suffix: path}"""
    folder = tmp_path_factory.mktemp("films")
    return {suffix: save(folder / f"a{suffix}", moving_square()) for suffix in (*CODECS, ".gif")}


def ffmpeg(*args):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *map(str, args)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return args[-1]


def read(path, **options):
    """All videos of a source, decoded.    -> list of (t, h, w, 3)"""
    return [np.stack(list(read_frames(video))) for video in open_videos(path, **options)]


def read_one(path, **options):
    video, = read(path, **options)
    assert video.dtype == np.uint8 and video.shape[-1] == 3
    return video


def reason(path):
    with pytest.raises(UnreadableVideo) as caught:
        read(path)
    assert str(caught.value).isprintable() and str(caught.value).startswith(caught.value.name)
    return caught.value.reason


def distance(a, b):
    return np.abs(a.astype(int) - b).mean()


@pytest.mark.parametrize("suffix", [*CODECS, ".gif"])
def test_a_film_gives_all_frames_under_any_name_and_is_refused_if_damage_took_some(films, tmp_path, suffix):
    path = tmp_path / ("a.mp4" if suffix == ".gif" else "a.gif")
    got, video = read_one(films[suffix]), moving_square()
    assert got.shape == video.shape and distance(got, video) < 12
    assert int(np.argmin([distance(got[5], frame) for frame in video])) == 5
    data, noise = films[suffix].read_bytes(), np.random.default_rng(0).bytes(100)
    path.write_bytes(data)
    assert np.array_equal(read_one(path), got)
    cuts = [int(part * len(data)) for part in np.linspace(0.02, 0.99, 7)] + [-300, -60, -20, -1]
    starts = [int(part * len(data)) for part in np.linspace(0.1, 0.8, 8)]
    noisy = [data[:k] + filler + data[k + 100:] for k in starts for filler in (noise, bytes(100))]
    marks = [found.start() for found in re.finditer(b"\xa3", data)]  # in an mkv some of them announce a frame
    noisy += [data[:k] + b"\xb3" + data[k + 1:] for k in marks[:4] + marks[-4:]]
    for changes, least in (([data[:k] for k in cuts], 7), (noisy, 1)):  # decoders may paint over noise
        refused = 0
        for changed in changes:
            path.write_bytes(changed)
            try:
                assert len(read_one(path)) == 30
            except UnreadableVideo:
                refused += 1
        assert refused >= least


@pytest.mark.parametrize("name, before, after, shown", [
    ("edits.mp4", ["-ss", 0.75], [], slice(15, None)), ("edits.mov", ["-ss", 0.75], [], slice(15, None)),
    ("cover.mkv", ["-i", "COVER"], ["-map", 0, "-map", 1], slice(None)),
    ("cover.m4v", ["-i", "COVER"], ["-map", 0, "-map", 1, "-disposition:v:0", "attached_pic"], slice(None)),
    # Lost frames of these would go unseen: they are refused, and the mend is said.
    ("negative.mkv", ["-itsoffset", -1], ["-copyts", "-avoid_negative_ts", "disabled"], None),
    ("irregular.mkv", [], ["-vf", "setpts='(N+N*N)/20/TB'", "-fps_mode", "vfr", "-c:v", "mpeg4"], None),
    ("a.ts", [], [], None), ("b.mp4", [], ["-f", "flv"], None), ("c.mkv", [], ["-live", 1], None),
    ("d.mp4", [], ["-movflags", "frag_keyframe+empty_moov"], None)])
def test_just_the_frames_that_a_player_shows_are_read(films, tmp_path, name, before, after, shown):
    iio.imwrite(tmp_path / "cover.png", moving_square(1, 64, 64)[0])
    before = [tmp_path / "cover.png" if word == "COVER" else word for word in before]
    path = ffmpeg(*before, "-i", films[".mp4"], "-c", "copy", *after, tmp_path / name)
    if shown:
        assert np.array_equal(read_one(path), read_one(films[".mp4"])[shown])
    else:
        assert "ffmpeg -i IN -c copy OUT.mp4" in reason(path)
        mended = read_one(ffmpeg("-i", path, "-c", "copy", tmp_path / "mended.mp4"))
        assert len(mended) == 30 or "negative" in name  # what lies before time 0 is not shown


@pytest.mark.parametrize("flip", [[], ["-display_hflip"]])
@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_a_film_that_a_phone_stored_lying_or_mirrored_stands(tmp_path, turn, flip):
    path = save(tmp_path / "a.mp4", moving_square(2, 48, 64))
    got = read_one(ffmpeg("-display_rotation", turn, *flip, "-i", path, "-c", "copy", tmp_path / "b.mp4"))
    wanted = np.rot90(read_one(path), turn // 90, (1, 2))
    assert np.array_equal(got, wanted[:, :, ::-1] if flip else wanted)


def test_colours_of_bt709_are_right(tmp_path):
    red = np.zeros((4, 32, 32, 3), np.uint8) + np.array([220, 30, 60], np.uint8)
    path = ffmpeg("-i", save(tmp_path / "a.avi", red), "-vf", "scale=out_color_matrix=bt709", "-c:v",
                  "libx264", "-colorspace", "bt709", tmp_path / "b.mp4")
    assert distance(read_one(path), red) < 6


def test_a_gif_without_its_last_byte_or_with_one_after_it_is_whole(films, tmp_path):
    data, path = films[".gif"].read_bytes(), tmp_path / "a.gif"
    for changed in (data[:-1], data + b"x", data + b"\0" * 100):
        path.write_bytes(changed)
        assert np.array_equal(read_one(path), read_one(films[".gif"]))
    path.write_bytes(data[:data.rindex(b"\0\x21\xf9\x04") + 9])  # up to the header of the last picture
    assert "gif" in reason(path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".png", ".webp", ".tif"])
def test_arrays_and_animations_are_read_or_refused_if_they_are_truncated(tmp_path, suffix):
    path = save(tmp_path / f"a{suffix}", moving_square())
    assert np.array_equal(read_one(path), moving_square())
    path.write_bytes(path.read_bytes()[:-100])
    assert reason(path)


def test_text_audio_empty_files_pickles_pipes_and_ambiguous_archives_are_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)
    for suffix in fvd.VIDEO_SUFFIXES + fvd.ARRAY_SUFFIXES + (".png",):
        for content in (b"", b"hello, this is no video\n" * 20):
            (tmp_path / f"a{suffix}").write_bytes(content)
            assert reason(tmp_path / f"a{suffix}")
    np.save(tmp_path / "a.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    torch.save(Bomb(), tmp_path / "a.pt")
    assert reason(tmp_path / "a.npy") and reason(tmp_path / "a.pt") and not (tmp_path / "exploded").exists()
    assert "audio" in reason(ffmpeg("-f", "lavfi", "-i", "sine=d=1", tmp_path / "audio.mp4"))
    np.savez(tmp_path / "a.npz", real=moving_square(), fake=moving_square())
    assert "2 arrays" in reason(tmp_path / "a.npz")
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "1.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "link" in reason(tmp_path / "frames") and "pipe" in reason(tmp_path / "pipe.mp4")


def folder_of(path, names):
    path.mkdir()
    for name, frame in zip(names, moving_square(len(names))):
        iio.imwrite(path / name, frame)
    return path


@pytest.mark.parametrize("names, located", [
    ([f"frame_{k}.png" for k in range(1, 13)], None), ([f"{k:03d}.png" for k in range(0, 60, 5)], None),
    ([f"{k:04d}_cam0.png" for k in range(9)], None), ([f"frame_{k:04d}_64x48.png" for k in range(9)], None),
    ([f"{1403636579763555584 + 50000000 * k + k % 3 + 10**9 * (k > 4)}.png" for k in range(9)], None),
    ([f"1305031{102 + k // 2}.{(k % 2) * 5 + 17}.png" for k in range(9)], None),
    ([f"{k * 100 // 3}.png" for k in range(9)], None),
    (["1.png", "2.png", "4.png", "5.png"], "4.png follows 2"), (["1.png", "1.bmp", "2.png"], "1.png follows"),
    (["a_1.png", "a_2.png", "b_1.png", "b_2.png"], "b_1.png follows a_2.png"),
    ([f"{k:03d}_64x48.png" for k in (5, 10, 20)], "020_64x48.png follows 010_64x48.png")])
def test_a_folder_of_images_is_one_video_in_the_order_of_the_numbers_that_vary(tmp_path, names, located):
    folder = folder_of(tmp_path / "walk", names)
    assert find_videos(tmp_path) == [folder]
    if located:  # a gap in plain numbers
        assert located in reason(folder)
    else:
        assert np.array_equal(read_one(folder), moving_square(len(names)))


def test_images_of_another_size_damaged_or_moving_are_named(tmp_path):
    folder = folder_of(tmp_path / "a", ["1.png", "2.png"])
    iio.imwrite(folder / "2.png", np.zeros((9, 9, 3), np.uint8))
    assert "size" in reason(folder)
    save(folder / "2.png", moving_square(5))
    with pytest.raises(UnreadableVideo, match="2.png: an animation"):
        read(folder)
    (folder / "2.png").write_bytes((folder / "1.png").read_bytes()[:60])
    assert reason(folder)


def test_images_of_any_mode_are_shown_as_a_viewer_shows_them(tmp_path):
    rgb = moving_square(1, 24, 32)[0]
    grey, picture = rgb[..., 1], Image.fromarray(rgb)
    for name, saved, wanted, error in (
            ("grey.png", Image.fromarray(grey), grey, 0), ("alpha.png", picture.convert("RGBA"), rgb, 0),
            ("grey-alpha.png", Image.fromarray(grey).convert("LA"), grey, 0),
            ("palette.png", picture.quantize(64), rgb, 4), ("cmyk.jpg", picture.convert("CMYK"), rgb, 4),
            ("bilevel.png", Image.fromarray(grey > 128), np.uint8(255) * (grey > 128), 0),
            ("16-bit.png", Image.fromarray(grey.astype(np.uint16) * 257), grey, 0)):
        saved.save(tmp_path / name, quality=95)
        assert distance(read_one(tmp_path / name)[0], np.atleast_3d(wanted)) <= error, name


@pytest.mark.parametrize("mode, suffix", [("RGB", ".png"), ("L", ".png"), ("P", ".png"), ("L", ".tif")])
def test_a_photograph_stands_by_its_exif_orientation(tmp_path, mode, suffix):
    exif, picture = Image.Exif(), Image.fromarray(moving_square(1, 24, 32)[0]).convert(mode)
    x = np.asarray(colour := picture.convert("RGB"))
    shown = (x, x[:, ::-1], x[::-1, ::-1], x[::-1], x.swapaxes(0, 1), np.rot90(x, -1),
             x[::-1, ::-1].swapaxes(0, 1), np.rot90(x))
    for exif[0x112], wanted in enumerate(shown, 1):
        picture.save(tmp_path / f"a{suffix}", exif=exif)
        assert np.array_equal(read_one(tmp_path / f"a{suffix}")[0], wanted)
    colour.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[colour])
    assert len(read_one(tmp_path / "a.jpg")) == 1  # there for both eyes


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
@pytest.mark.parametrize("axes", ["ntchw", "nthwc", "ncthw", "thwc", "tchw", "cthw"])
def test_every_layout_of_axes_is_recognised(tmp_path, suffix, axes):
    video = np.stack([moving_square(4), moving_square(4)[::-1]])  # four frames: three channels come before
    array = video.transpose(["nthwc".index(axis) for axis in "n" + axes.lstrip("n")])
    path = save(tmp_path / f"a{suffix}", array if "n" in axes else array[0])
    assert np.array_equal(np.stack(read(path)), video if "n" in axes else video[:1])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "longdouble", ">f4", ">f8", "bfloat16"])
@pytest.mark.parametrize("low", [0, -1])
def test_floats_in_the_range_that_is_stated_come_back_to_the_same_bytes(tmp_path, dtype, low):
    video = moving_square()
    floats = video / 255 * (1 - low) + low
    if dtype == "bfloat16":
        torch.save(torch.from_numpy(floats).bfloat16(), path := tmp_path / "a.pt")
    else:
        path = save(tmp_path / "a.npy", floats.astype(dtype))
    assert np.abs(read_one(path, scale=(low, 1)).astype(int) - video).max() <= (dtype == "bfloat16")
    torch.from_numpy(np.array(fvd.load_array(path)))  # latents go this way


def test_arrays_of_any_channels_become_rgb_and_what_is_no_video_of_bytes_or_floats_is_refused(tmp_path):
    video, grey = moving_square(), moving_square()[..., 1:2]
    for array, shown in ((grey[..., 0], grey), (grey, grey), (np.concatenate([video, grey], -1), video)):
        assert (read_one(save(tmp_path / "a.npy", array)) == shown).all()
    shapes = (10,), (8, 8, 3), (10, 8, 8, 5), (2, 2, 10, 8, 8, 3), (2, 5, 10, 8, 8), (0, 10, 8, 8, 3)
    for array in (*map(np.zeros, shapes), *map(video.astype, ("int64", "uint16", "bool", "complex64"))):
        with pytest.raises(UnreadableVideo):
            read(save(tmp_path / "a.npy", array), scale=(0, 1))


def test_floats_are_refused_without_a_stated_range_and_videos_outside_of_it_or_with_nan_are_named(tmp_path):
    videos = np.full((3, 10, 8, 8, 3), 0.5, np.float32)
    assert re.search("--floats unit.*--floats symmetric", reason(save(tmp_path / "a.npy", videos)))
    for videos[1, 4, 2, 2, 0] in (np.nan, np.inf, 1.01, -0.01):
        first, bad, last = open_videos(save(tmp_path / "a.npy", videos), scale=(0, 1))
        assert (np.stack([*read_frames(first), *read_frames(last)]) == 128).all()
        with pytest.raises(UnreadableVideo, match=r"a.npy\[1\]: .*NaN"):
            list(read_frames(bad))


def test_search_is_recursive_ordered_and_blind_to_other_files_and_loops(tmp_path):
    for name in ("b/10.gif", "b/9.gif", "b/sheet_1.png", "b/sheet_2.png", "preview.png", "a/c/x.GIF",
                 "none/notes.txt", ".DS_Store", "._x.gif", ".git/y.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "a")
    found = [str(path.relative_to(tmp_path)) for path in find_videos(tmp_path)]
    assert found == ["a/c/x.GIF", "b/9.gif", "b/10.gif"]
    assert find_videos(tmp_path / "._x.gif") == [tmp_path / "._x.gif"]
    for folder, word in (("nowhere", "no such"), ("none", "no video")):
        with pytest.raises(UnreadableVideo, match=word):
            find_videos(tmp_path / folder)


@pytest.mark.parametrize("name", ["sp ace", "\u4f60\u597d \u00fc", "new\nline", "-dash", "<bytes>", "a.zip",
                                  "imageio:x", "percent%20", "\udcff", "q'uo\"te", "http:"])
def test_odd_names_are_read(films, tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    for suffix in (".mp4", ".gif", ".npy", ".pt", ".png"):
        path = films.get(suffix) or save(tmp_path / f"a{suffix}", moving_square())
        (tmp_path / name / f"{name}{suffix}").write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path / name)
    for path in os.listdir():  # no address, no option, no example of imageio's
        assert len(read_one(path)) == 30
        with open(path, "wb"):
            assert reason(path)
