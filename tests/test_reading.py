"""Reading videos: everything intact comes out as 8-bit RGB, everything damaged is named."""
import os
from fractions import Fraction

import av
import imageio.v3 as iio
import numpy as np
import pytest
import torch

import fvd
from fvd import UnreadableVideo, find_videos, open_videos, read_frames

CODECS = {".mp4": "libx264", ".mov": "libx264", ".mkv": "libx264", ".webm": "libvpx", ".avi": "mpeg4"}


def moving_square(t=30, size=32):
    """A bright square that moves right over a slow gradient.    -> uint8 (t, h, w, 3)"""
    video = np.full((t, size, size, 3), 40, np.uint8)
    video[..., 1] += np.arange(size, dtype=np.uint8) * 3
    for k in range(t):
        video[k, 8:20, k % (size - 8):k % (size - 8) + 8] = 220, 200, 90
    return video


def write(path, video, **options):
    if path.suffix == ".gif":
        iio.imwrite(path, video, loop=0)
    else:
        iio.imwrite(path, video, fps=20, plugin="pyav", codec=CODECS[path.suffix], **options)
    return path


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
    assert "\n" not in caught.value.reason and str(caught.value).startswith(caught.value.name)
    return caught.value.reason


# ------------------------------------------------------------------ intact videos

@pytest.mark.parametrize("suffix", [*CODECS, ".gif"])
def test_every_container_gives_back_its_frames(tmp_path, suffix):
    video = moving_square()
    got = read_one(write(tmp_path / f"a{suffix}", video))
    assert got.shape == video.shape
    assert np.abs(got.astype(int) - video).mean() < 12  # lossy, and in the right order:
    errors = [np.abs(got[5].astype(int) - frame).mean() for frame in video]
    assert int(np.argmin(errors)) == 5


def write_variable_rate(path, video, times):
    with av.open(str(path), "w") as out:
        stream = out.add_stream(CODECS[path.suffix], rate=30)
        stream.width, stream.height, stream.pix_fmt = video.shape[2], video.shape[1], "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for image, time in zip(video, times):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = int(1000 * time), stream.time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_frame_rate_neither_repeats_nor_drops_frames(tmp_path, suffix):
    video = moving_square(20)
    times = np.cumsum([0.02 if k % 3 else 0.2 for k in range(20)])
    write_variable_rate(tmp_path / f"a{suffix}", video, times)
    assert read_one(tmp_path / f"a{suffix}").shape == video.shape


def test_gif_content_is_read_under_a_wrong_suffix(tmp_path):
    write(tmp_path / "a.gif", moving_square(12)).rename(tmp_path / "a.mp4")
    assert len(read_one(tmp_path / "a.mp4")) == 12


def test_mp4_content_is_read_under_a_wrong_suffix(tmp_path):
    write(tmp_path / "a.mp4", moving_square(12)).rename(tmp_path / "a.gif")
    assert len(read_one(tmp_path / "a.gif")) == 12


def test_single_frame_gif_is_a_video_of_one_frame(tmp_path):
    assert len(read_one(write(tmp_path / "a.gif", moving_square(1)))) == 1


def test_frames_are_decoded_only_as_they_are_taken(tmp_path, monkeypatch):
    decoded = []
    original = fvd.rgb8
    monkeypatch.setattr(fvd, "rgb8", lambda *args: decoded.append(1) or original(*args))
    video, = open_videos(write(tmp_path / "a.mp4", moving_square()))
    frames = read_frames(video)
    next(frames), next(frames)
    assert len(decoded) == 2


# ------------------------------------------------------------------ damage

@pytest.mark.parametrize("suffix", [*CODECS, ".gif"])
def test_truncated_file_gives_all_its_frames_or_is_refused(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", moving_square())
    data, whole, refused = path.read_bytes(), read_one(path), 0
    for part in (0.1, 0.3, 0.5, 0.7, 0.9, 0.97):
        path.write_bytes(data[:int(part * len(data))])
        try:
            assert np.array_equal(read_one(path), whole)
        except UnreadableVideo:
            refused += 1
    assert refused >= 3


@pytest.mark.parametrize("suffix", [".mkv", ".webm"])
def test_matroska_without_its_last_frames_is_refused(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", moving_square())
    path.write_bytes(path.read_bytes()[:-300])
    assert "truncated" in reason(path)


def test_gif_cut_between_two_frames_is_refused(tmp_path):
    path = write(tmp_path / "a.gif", moving_square())
    data = path.read_bytes()
    path.write_bytes(data[:data.rindex(b"\0\x21\xf9\x04") + 1])  # up to the last frame's header
    assert "truncated" in reason(path)


@pytest.mark.parametrize("suffix", [*CODECS, ".gif"])
def test_noise_in_a_file_never_shortens_the_video(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", moving_square())
    clean, refused = path.read_bytes(), 0
    for part in (0.2, 0.35, 0.5, 0.65, 0.8):  # decoders may paint over it, and say nothing
        data, start = bytearray(clean), int(part * len(clean))
        data[start:start + 100] = np.random.default_rng(0).bytes(100)
        path.write_bytes(data)
        try:
            assert len(read_one(path)) == 30
        except UnreadableVideo:
            refused += 1
    assert refused or suffix not in (".mp4", ".mov", ".webm")


@pytest.mark.parametrize("declared", [0, 4, 6])
def test_video_that_gives_other_than_it_declares_is_refused(declared):
    frames = moving_square(5 if declared else 0)
    video = fvd.Video("a.mp4", lambda: declared, lambda: iter(frames), None)
    with pytest.raises(UnreadableVideo, match=f"a.mp4: {len(frames)} frames .* {declared} it declares"):
        list(read_frames(video))


def test_text_and_empty_files_are_refused(tmp_path):
    for suffix in fvd.VIDEO_SUFFIXES + fvd.ARRAY_SUFFIXES:
        for content in (b"", b"hello, this is no video\n" * 20):
            path = tmp_path / f"a{suffix}"
            path.write_bytes(content)
            assert reason(path)


def test_audio_without_video_is_refused_as_such(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    assert "audio" in reason(tmp_path / "a.mp4")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
def test_truncated_array_is_refused(tmp_path, suffix):
    path = save_array(tmp_path / f"a{suffix}", moving_square())
    path.write_bytes(path.read_bytes()[:-1000])
    assert reason(path)


def test_pickled_objects_are_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)
    np.save(tmp_path / "a.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    torch.save(Bomb(), tmp_path / "a.pt")
    assert reason(tmp_path / "a.npy") and reason(tmp_path / "a.pt")
    assert not (tmp_path / "exploded").exists()


# ------------------------------------------------------------------ folders of images

def write_images(folder, names, video=None):
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in zip(names, moving_square(len(names)) if video is None else video):
        iio.imwrite(folder / name, frame)
    return folder


def test_folder_of_images_is_one_video_in_the_order_of_its_numbers(tmp_path):
    folder = write_images(tmp_path / "walk", [f"frame_{k}.png" for k in range(1, 13)])
    assert find_videos(tmp_path) == [folder]
    assert np.array_equal(read_one(folder), moving_square(12))


def test_every_fifth_frame_is_no_gap(tmp_path):
    assert len(read_one(write_images(tmp_path / "a", [f"{k:03d}.png" for k in range(0, 60, 5)]))) == 12


@pytest.mark.parametrize("names", [["1.png", "2.png", "4.png", "5.png"], ["1.png", "1.bmp", "2.png"],
                                   ["a_1.png", "a_2.png", "b_1.png", "b_2.png"]])
def test_gap_in_the_numbers_is_refused_and_located(tmp_path, names):
    assert "follows" in reason(write_images(tmp_path / "a", names))


def test_gap_is_located(tmp_path):
    folder = write_images(tmp_path / "a", [f"{k}.png" for k in (1, 2, 4, 5, 6)])
    assert "4.png follows 2.png" in reason(folder)


def test_images_of_two_sizes_are_refused(tmp_path):
    folder = write_images(tmp_path / "a", ["1.png"])
    iio.imwrite(folder / "2.png", np.zeros((9, 9, 3), np.uint8))
    assert "size" in reason(folder)


def test_damaged_image_is_named(tmp_path):
    folder = write_images(tmp_path / "a", ["1.png", "2.png"])
    (folder / "2.png").write_bytes((folder / "1.png").read_bytes()[:60])
    with pytest.raises(UnreadableVideo, match="2.png"):
        read(folder)


def test_pictures_beside_or_above_videos_are_not_videos(tmp_path):
    write_images(tmp_path, ["preview.png"])
    write_images(tmp_path / "videos", ["sheet_1.png", "sheet_2.png"])
    write(tmp_path / "videos/a.gif", moving_square(3))
    assert find_videos(tmp_path) == [tmp_path / "videos/a.gif"]


def test_grey_alpha_palette_bilevel_and_16_bit_images_become_rgb(tmp_path):
    from PIL import Image
    video = moving_square(1)
    rgb, grey = video[0], video[0, ..., 1]
    pictures = {
        "grey": (Image.fromarray(grey), grey), "alpha": (Image.fromarray(rgb).convert("RGBA"), rgb),
        "grey-alpha": (Image.fromarray(grey).convert("LA"), grey),
        "palette": (Image.fromarray(rgb).quantize(64), rgb),
        "bilevel": (Image.fromarray(grey > 128), np.uint8(255) * (grey > 128)),
        "16-bit": (Image.fromarray(grey.astype(np.uint16) * 257), grey)}
    for name, (picture, wanted) in pictures.items():
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "0.png")
        wanted = wanted if wanted.ndim == 3 else np.stack([wanted] * 3, -1)
        assert np.abs(read_one(tmp_path / name)[0].astype(int) - wanted).max() <= 3, name


def test_transparent_palette_gif_becomes_rgb(tmp_path):
    from PIL import Image
    frames = [Image.fromarray(frame).quantize(16) for frame in moving_square(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], transparency=0)
    assert read_one(tmp_path / "a.gif").shape == (4, 32, 32, 3)


# ------------------------------------------------------------------ arrays

def save_array(path, array):
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez(path, videos=array, fps=np.array(8))
    else:
        torch.save(torch.from_numpy(np.ascontiguousarray(array)), path)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
@pytest.mark.parametrize("axes", ["ntchw", "nthwc", "ncthw", "thwc", "tchw", "cthw"])
def test_every_layout_of_axes_is_recognised(tmp_path, suffix, axes):
    video = np.stack([moving_square(12), moving_square(12)[::-1]])  # n t h w c
    array = np.transpose(video if "n" in axes else video[0],
                         [("nthwc" if "n" in axes else "thwc").index(axis) for axis in axes])
    got = np.stack(read(save_array(tmp_path / f"a{suffix}", array)))
    assert np.array_equal(got, video if "n" in axes else video[:1])


def test_grey_and_rgba_arrays_become_rgb(tmp_path):
    grey = moving_square()[..., 1]
    wanted = np.stack([grey] * 3, -1)
    assert np.array_equal(read_one(save_array(tmp_path / "a.npy", grey)), wanted)
    assert np.array_equal(read_one(save_array(tmp_path / "b.npy", grey[..., None])), wanted)
    rgba = np.concatenate([moving_square(), wanted[..., :1]], -1)
    assert np.array_equal(read_one(save_array(tmp_path / "c.npy", rgba)), moving_square())


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
@pytest.mark.parametrize("low", [0, -1])
def test_floats_in_either_range_come_back_to_the_same_bytes(tmp_path, dtype, low):
    video = moving_square()
    video[0, 0, 0] = 0, 255, 0  # touches both ends of the scale
    floats = (video / 255 * (1 - low) + low).astype(dtype)
    np.save(tmp_path / "a.npy", floats)
    assert np.abs(read_one(tmp_path / "a.npy").astype(int) - video).max() <= 0


def test_bfloat16_tensor_is_read(tmp_path):
    torch.save((torch.from_numpy(moving_square()) / 255).bfloat16(), tmp_path / "a.pt")
    assert np.abs(read_one(tmp_path / "a.pt").astype(int) - moving_square()).max() <= 1


def test_scale_of_floats_is_decided_by_the_whole_file(tmp_path):
    dark_and_bright = np.full((2, 10, 8, 8, 3), 0.5, np.float32)
    dark_and_bright[0] = -0.5
    dark, bright = read(save_array(tmp_path / "a.npy", dark_and_bright))
    assert (dark == 64).all() and (bright == 191).all()


def test_scale_of_floats_can_be_stated(tmp_path):
    path = save_array(tmp_path / "a.npy", np.full((10, 8, 8, 3), 0.5, np.float32))
    assert (read_one(path) == 128).all() and (read_one(path, scale=(-1, 1)) == 191).all()


@pytest.mark.parametrize("high", [255.0, 1.5, 2.0])
def test_floats_outside_both_ranges_are_refused(tmp_path, high):
    path = save_array(tmp_path / "a.npy", np.linspace(0, high, 10 * 8 * 8 * 3).reshape(10, 8, 8, 3))
    assert "[-1, 1]" in reason(path)


@pytest.mark.parametrize("dtype", ["int64", "uint16", "bool", "complex64", "int8"])
def test_other_number_types_are_refused(tmp_path, dtype):
    assert "uint8" in reason(save_array(tmp_path / "a.npy", np.zeros((10, 8, 8, 3), dtype)))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_video_with_nan_is_named_and_its_neighbours_are_read(tmp_path, wrong):
    videos = np.full((3, 10, 8, 8, 3), 0.5, np.float32)
    videos[1, 4, 2, 2, 0] = wrong
    first, second, third = open_videos(save_array(tmp_path / "a.npy", videos))
    assert len(list(read_frames(first))) == len(list(read_frames(third))) == 10
    with pytest.raises(UnreadableVideo, match=r"a.npy\[1\]: .*NaN"):
        list(read_frames(second))


@pytest.mark.parametrize("shape", [(10,), (8, 8, 3), (10, 8, 8, 5), (2, 2, 10, 8, 8, 3), (2, 5, 10, 8, 8),
                                   (0, 10, 8, 8, 3)])
def test_arrays_that_are_no_videos_are_refused(tmp_path, shape):
    assert reason(save_array(tmp_path / "a.npy", np.zeros(shape, np.uint8)))


def test_archive_with_two_candidates_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", real=moving_square(), fake=moving_square())
    assert "2 arrays" in reason(tmp_path / "a.npz")


def test_numpy_arrays_stay_on_disk(tmp_path):
    video, = open_videos(save_array(tmp_path / "a.npy", moving_square()))
    frame = next(video.decode())
    while not isinstance(frame, np.memmap) and frame.base is not None:
        frame = frame.base
    assert isinstance(frame, np.memmap)


def test_old_torch_files_are_read(tmp_path):
    torch.save(torch.from_numpy(moving_square()), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert np.array_equal(read_one(tmp_path / "a.pt"), moving_square())


# ------------------------------------------------------------------ searching

def test_search_is_recursive_ordered_and_blind_to_other_files(tmp_path):
    for name in ("b/10.gif", "b/9.gif", "a/c/x.GIF", "notes.txt", ".DS_Store", "._x.gif", ".git/y.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [str(path.relative_to(tmp_path)) for path in find_videos(tmp_path)]
    assert found == ["a/c/x.GIF", "b/9.gif", "b/10.gif"]


def test_links_in_loops_are_followed_once(tmp_path):
    (tmp_path / "a").mkdir()
    write(tmp_path / "a/x.gif", moving_square(3))
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "a")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert find_videos(tmp_path) == [tmp_path / "a/x.gif"]


def test_named_pipe_and_dangling_link_are_named_and_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "lost.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (tmp_path / "frames").mkdir()
    for k in range(2):
        os.mkfifo(tmp_path / f"frames/{k}.png")
    frames, lost, pipe = find_videos(tmp_path)
    assert "link" in reason(lost) and "pipe" in reason(pipe) and "pipe" in reason(frames)


@pytest.mark.parametrize("name", ["sp ace", "\u4f60\u597d \u00fc", "new\nline", "-dash", "<bytes>", "a.zip",
                                  "imageio:x", "percent%20", "\udcff", "q'uo\"te", "http:"])
def test_odd_names_are_read(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    write(tmp_path / "a.mp4", moving_square(10)).rename(folder / f"{name}.mp4")
    write(tmp_path / "a.gif", moving_square(10)).rename(folder / f"{name}.gif")
    np.save(tmp_path / "a.npy", moving_square(10))
    (tmp_path / "a.npy").rename(folder / f"{name}.npy")
    torch.save(torch.from_numpy(moving_square(10)), tmp_path / "a.pt")
    (tmp_path / "a.pt").rename(folder / f"{name}.pt")
    for path in find_videos(folder):
        video, = open_videos(path)
        assert len(list(read_frames(video))) == 10
        assert video.name.isprintable()
        video.name.encode()


def test_folder_without_videos_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UnreadableVideo, match="1 .txt"):
        find_videos(tmp_path)
    with pytest.raises(UnreadableVideo, match="no such"):
        find_videos(tmp_path / "nowhere")


def test_single_file_is_a_source_whatever_its_place(tmp_path):
    path = write(tmp_path / ".hidden.gif", moving_square(3))
    assert find_videos(path) == [path]
