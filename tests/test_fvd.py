"""The metric: the network by golden numbers, the distance by theorems, the command by vandalism."""
import hashlib
import json
import os
import pathlib
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fvd


def normal(n, d, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((n, d)))


def noise(n, t=16, size=8, seed=0, high=256):
    return np.random.default_rng(seed).integers(0, high, (n, t, size, size, 3), dtype=np.uint8)


class Pixels(nn.Module):
    """A network for tests: mean colour per corner and time.    x (n, 3, t, h, w) -> (n, 24)"""

    def forward(self, x):
        return F.adaptive_avg_pool3d(x, 2).flatten(1)


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Two sets of videos, and a small network in the place of random I3D."""
    monkeypatch.setattr(fvd, "random_i3d", Pixels)
    real, fake = tmp_path / "real", tmp_path / "fake.npz"
    real.mkdir()
    for k, video in enumerate(noise(6, t=20, seed=1)):
        np.save(real / f"{k}.npy", video)
    np.savez(fake, videos=noise(6, t=16, seed=2, high=128))
    return real, fake


def score(capsys, *args, rc=0):
    """The result as --json writes it, output and errors of the command, or its one sentence if rc is 2."""
    file = pathlib.Path(args[0]).parent / "out.json"
    assert fvd.main([*map(str, args), *(["--features", "random"] if "--weights" not in args else []),
                     *(["--json", str(file)] if "--json" not in args else [])]) == rc
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return (json.loads(file.read_text()), out, err) if rc == 0 else err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def golden_net():
    return fvd.random_i3d(seed=0)


# Computed with the original TensorFlow graph of I3D, deepmind/i3d-kinetics-400/1, and these weights.
@pytest.mark.parametrize("t, first, mean, norm", [
    (10, [0.322822, -0.614799, 0.509731, -0.071957], 0.0096239, 11.849011),
    (16, [0.442057, -0.608858, 0.614313, -0.003159], 0.0130542, 13.219552)])
def test_i3d_equals_the_original_graph(golden_net, t, first, mean, norm):
    x = np.random.RandomState(1).uniform(-1, 1, (2, t, 224, 224, 3)).astype(np.float32)
    y = golden_net(torch.from_numpy(x).permute(0, 4, 1, 2, 3))
    assert y.shape == (2, 400)
    assert torch.allclose(y[0, :4], torch.tensor(first), atol=1e-5)
    assert abs(y.mean().item() - mean) < 1e-6 and abs(y.norm().item() - norm) < 1e-4


def test_i3d_has_the_tensors_of_the_published_state_dict_and_takes_nine_frames(golden_net):
    state = golden_net.state_dict()
    assert len(state) == 287 and sum(p.numel() for p in golden_net.parameters()) == 12697264
    assert state["Mixed_4e.b1b.conv3d.weight"].shape == (288, 144, 3, 3, 3)
    assert golden_net(torch.zeros(1, 3, 9, 224, 224)).shape == (1, 400)
    for shape in ((1, 3, 8, 224, 224), (1, 3, 9, 112, 112), (1, 1, 9, 224, 224)):
        with pytest.raises(ValueError, match="t >= 9"):
            golden_net(torch.zeros(shape))


@pytest.mark.parametrize("protocol, low, source", [
    ("original", -1, lambda i, ratio: i * ratio), ("paper", 0, lambda i, ratio: i * ratio),
    ("standard", -1, lambda i, ratio: (i + 0.5) * ratio - 0.5)])
@pytest.mark.parametrize("shape", [(32, 32), (128, 128), (240, 320), (224, 224), (9, 300), (1, 1)])
def test_a_protocol_is_a_range_and_a_resize_by_its_definition(shape, protocol, low, source):
    def matrix(length, size=224):  # linear between pixels, clamped at the edge
        m = np.zeros((size, length))
        for i in range(size):
            x = max(float(source(np.float32(i), np.float32(length) / np.float32(size))), 0)
            m[i, min(int(x), length - 1)] += 1 - x % 1
            m[i, min(int(x) + 1, length - 1)] += x % 1
        return m
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    got = fvd.preprocess(np.stack([x] * 3, -1)[None], *fvd.PROTOCOLS[protocol])[:, 0]
    wanted = matrix(shape[0]) @ x @ matrix(shape[1]).T / 255 * (1 - low) + low
    assert got.shape == (3, 224, 224)
    assert np.abs(got.numpy() - wanted).max() < (5e-5 if protocol == "standard" else 1e-6)


def test_features_depend_neither_on_the_batch_nor_on_an_autocast():
    clips = noise(7)
    one, three, tensor = (fvd.video_features(x, Pixels(), batch=batch)
                          for x, batch in ((clips, 1), (clips, 3), (torch.from_numpy(clips), 8)))
    assert one.shape == (7, 24) and one.dtype == torch.float64
    assert torch.allclose(one, three, atol=1e-7) and torch.allclose(one, tensor, atol=1e-7)
    product = lambda x: x.new_ones(len(x), 4) @ x.new_ones(4, 4) / 3
    with torch.autocast("cpu", torch.bfloat16):
        assert (fvd.video_features(noise(2), product) - 4 / 3).abs().max() < 1e-6
    for wrong in (noise(2) / 255, torch.from_numpy(noise(2)).double()):
        with pytest.raises(ValueError, match="uint8"):
            fvd.video_features(wrong, Pixels())


@pytest.mark.parametrize("n, d", [(2, 400), (50, 400), (400, 400), (401, 400), (900, 400), (500, 20)])
def test_distance_of_identical_sets_is_zero(n, d):
    x = normal(n, d) * torch.linspace(0, 3, d) + 5
    low = x @ normal(d, d // 10, 1) @ normal(d // 10, d, 2)  # without full rank
    assert fvd.frechet_distance(x, x) < 1e-9 and fvd.frechet_distance(x, x.flip(0)) < 1e-9
    assert fvd.frechet_distance(low, low) < 1e-9 * low.var(0).sum()


@pytest.mark.parametrize("n, m, d", [(300, 500, 40), (60, 900, 50), (60, 70, 50), (55, 60, 54)])
def test_distance_of_known_gaussians_is_the_closed_form(n, m, d):
    std1, std2 = torch.linspace(0.5, 3, d).double(), torch.linspace(2, 0.1, d).double()
    mean, rotation = torch.linspace(-1, 2, d).double(), torch.linalg.qr(normal(d, d, seed=3)).Q
    centred = lambda x: x - x.mean(0)
    a, b = (torch.linalg.qr(centred(normal(*k))).Q * (k[0] - 1) ** 0.5 for k in ((n, d, 1), (m, d, 2)))
    a, b = a * std1 @ rotation, (b * std2 + mean) @ rotation  # the covariances of both were exactly 1
    wanted = (mean.square().sum() + (std1 - std2).square().sum()).item()
    d = fvd.frechet_distance(a, b)
    assert abs(d / wanted - 1) < 1e-8
    for same in ((b, a), (a + 1000, b + 1000), (a.numpy(), b.numpy())):
        assert fvd.frechet_distance(*same) == pytest.approx(d, rel=1e-9)


def test_distance_of_small_sets_is_biased_as_stated_and_of_one_video_or_nan_refused():
    for n, stated in ((64, 552), (1000, 81)):
        assert abs(fvd.frechet_distance(normal(n, 400, 1), normal(n, 400, 2)) / stated - 1) < 0.02
    x = normal(9, 4)
    x[6, 1] = float("nan")
    for wrong in (normal(0, 4), normal(1, 4), x):
        with pytest.raises(ValueError, match="n >= 2"):
            fvd.frechet_distance(normal(9, 4), wrong)


def test_kernel_distance_is_its_definition():
    a, b = normal(6, 5, 1), normal(4, 5, 2)
    k = lambda x, y: (float(x @ y) / 5 + 1) ** 3
    wanted = (sum(k(a[i], a[j]) for i in range(6) for j in range(6) if i != j) / 30
              + sum(k(b[i], b[j]) for i in range(4) for j in range(4) if i != j) / 12
              - 2 * sum(k(x, y) for x in a for y in b) / 24)
    assert fvd.kernel_distance(a, b) == pytest.approx(wanted, rel=1e-12)


@pytest.fixture
def published(tmp_path, monkeypatch, golden_net):
    """A state dict whose hash is taken for the published one."""
    torch.save(golden_net.state_dict(), path := tmp_path / "published.pt")
    sha1 = subprocess.check_output(["git", "hash-object", path], text=True).strip()
    monkeypatch.setattr(fvd, "STATE_DICT_GIT_SHA1", sha1)
    return path


def test_only_weights_of_known_hash_are_loaded(published, golden_net, sets, capsys, monkeypatch, tmp_path):
    state = fvd.load_i3d(published).state_dict()
    assert all(torch.equal(state[name], value) for name, value in golden_net.state_dict().items())
    published.write_bytes(published.read_bytes()[:-100])
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_: pytest.fail("the network was touched"))
    for path in (published, tmp_path / "missing.pt"):
        assert fvd.main([*map(str, sets), "--weights", str(path)]) == 2
        err = capsys.readouterr().err
        assert all(word in err for word in ("truncated", fvd.STATE_DICT_URL, fvd.TORCHSCRIPT_URL, "a867b87a",
                                            fvd.TORCHSCRIPT_SHA256, "--download", "--features random"))
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("code was run",)
    torch.save({"logits": Bomb()}, tmp_path / "bomb.pt")
    for path in (published, tmp_path / "bomb.pt"):
        with pytest.raises(ValueError, match="cannot be read"):
            fvd.load_i3d(path, allow_unknown=True)


class Scripted(nn.Module):
    """The calling convention of the published TorchScript file."""

    def forward(self, x, rescale: bool = True, resize: bool = True, return_features: bool = False):
        assert return_features and not rescale and not resize
        return x.mean((2, 3, 4))


def test_torchscript_is_told_apart_and_needs_a_known_hash(sets, capsys, tmp_path, monkeypatch):
    path, x = tmp_path / "net.pt", torch.rand(2, 3, 9, 4, 4)
    torch.jit.script(Scripted()).save(path)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="truncated"):
        patch.setattr(torch.jit, "load", lambda *args, **kwargs: pytest.fail("code was run"))
        fvd.load_i3d(path)
    _, out, _ = score(capsys, *sets, "--weights", path, "--allow-unknown-weights")
    assert out.startswith("FVD ") and "may not be FVD" in out
    monkeypatch.setattr(fvd, "TORCHSCRIPT_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert torch.equal(fvd.load_i3d(path)(x), x.mean((2, 3, 4)))
    _, out, _ = score(capsys, *sets, "--weights", path)
    assert out.startswith("FVD ") and "may not be" not in out and fvd.TORCHSCRIPT in out


def test_download_is_verified_repeated_if_it_was_cut_and_its_failure_says_what_to_do(published, tmp_path):
    target, whole = tmp_path / "cache" / "weights.pt", published.read_bytes()
    published.write_bytes(whole[:-100])
    fvd.download_weights(target, published.as_uri())
    for fetch in (fvd.load_i3d, lambda path: fvd.download_weights(path, (tmp_path / "nowhere").as_uri())):
        with pytest.raises(ValueError, match="Get one of"):
            fetch(target)
    published.write_bytes(whole)
    fvd.download_weights(target, published.as_uri())
    assert target.read_bytes() == whole and list(target.parent.iterdir()) == [target]
    fvd.download_weights(target, "file:///nowhere")  # it is there already


@pytest.mark.parametrize("protocol", fvd.PROTOCOLS)
def test_command_equals_the_library_and_prints_all_that_the_number_depends_on(sets, capsys, protocol):
    result, out, _ = score(capsys, *sets, "--window", "first", "--protocol", protocol)
    a, b = (fvd.video_features(x, Pixels(), *fvd.PROTOCOLS[protocol])
            for x in (noise(6, t=20, seed=1)[:, :16], noise(6, t=16, seed=2, high=128)))
    assert result["value"] == pytest.approx(fvd.frechet_distance(a, b), rel=1e-6)
    assert result["kernel_value"] == pytest.approx(fvd.kernel_distance(a, b), rel=1e-6)
    for word in (f"FD-random {result['value']:.6g}\nKD", protocol, "random weights", "6 videos", "equal N"):
        assert word in out and "FVD" not in out + json.dumps(result)


def test_command_runs_i3d_itself_on_a_console_that_lacks_a_letter(tmp_path):
    np.save(a := tmp_path / "\u4f60\u597d.npy", noise(2, t=9))
    np.save(b := tmp_path / "b.npy", noise(2, t=9, high=128))
    done = subprocess.run([sys.executable, fvd.__file__, a, b, "--frames", "9", "--features", "random"],
                          capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and b"\\u4f60\\u597d.npy" in done.stdout
    assert float(done.stdout.split()[1]) > 0.1


def test_every_window_of_a_video_is_as_likely_and_is_taken_once():
    ramp = [np.full((8, 8, 3), 10 * k, np.uint8) for k in range(13)]  # windows of 9 frames begin at 0 to 4
    counts, args = np.zeros(5), Namespace(frames=9, clips=2, window="random", protocol="standard")
    for seed in range(200):
        clips = fvd.cut_clips(fvd.Video("", lambda: iter(ramp)), seed, args)
        times = torch.stack(clips)[:, 0, :, 0, 0] * 12.75 + 12.75  # (2, 9)
        starts = times[:, 0].round()
        assert len(clips) == 2 and clips[0].shape == (3, 9, 224, 224) and starts[0] != starts[1]
        assert torch.allclose(times, starts[:, None] + torch.arange(9), atol=1e-3)
        counts[starts.long()] += 1
    assert np.abs(counts - 80).max() < 28  # four standard deviations


def test_seed_chooses_the_windows_and_unequal_numbers_of_clips_are_warned_about(sets, capsys):
    one, same, other = (score(capsys, *sets, "--seed", seed)[0]["value"] for seed in (1, 1, 2))
    assert one == same != other
    assert "the numbers of clips are unequal" in score(capsys, *sets, "--clips-per-video", 3)[1]


def test_damaged_short_and_nan_videos_are_named_and_the_rest_is_scored(sets, capsys, tmp_path):
    real, fake = sets
    (real / "bad.mp4").write_bytes(b"hello")
    np.save(real / "short.npy", noise(1, t=12)[0])
    videos = noise(4) / 255
    videos[2, 3] = np.nan
    np.save(tmp_path / "nan.npy", videos)
    result, out, err = score(capsys, real, tmp_path / "nan.npy", "--floats", "unit")
    assert all(word in err for word in ("bad.mp4: ", "short.npy[0]: shorter", "nan.npy[2]: "))
    assert result["real"]["videos"] == 6 and result["fake"]["videos"] == 3
    assert "short" in score(capsys, real / "short.npy", fake, "--strict", rc=2)
    assert "--floats unit" in score(capsys, tmp_path / "nan.npy", fake, "--strict", rc=2)  # or else no range


def test_saved_features_stand_for_the_real_set_and_other_settings_are_refused(sets, capsys, tmp_path):
    real, fake = sets
    first, _, _ = score(capsys, real, fake, "--save-features", tmp_path / "saved.npz")
    real.rename(tmp_path / "gone")
    assert score(capsys, tmp_path / "saved.npz", fake)[0] == first
    for change in (("--protocol", "paper"), ("--frames", 12), ("--seed", 1), ("--window", "first")):
        assert "made with" in score(capsys, tmp_path / "saved.npz", fake, *change, rc=2)


def test_wrong_input_gets_one_sentence_and_status_2(sets, capsys, tmp_path):
    real, fake = sets
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "one.npy", noise(1))
    for args, word in [
            ((tmp_path / "nowhere", fake), "no such"), ((tmp_path / "empty", fake), "no video"),
            ((real, fake, "--json", tmp_path), "folder"), ((real, fake, "--device", "toaster"), "toaster"),
            ((real, tmp_path / "one.npy"), "needs 2"), ((real, fake, "--save-features", "no/c"), "folder"),
            ((real, fake, "--save-features", fake), "REAL or FAKE")]:
        assert word in score(capsys, *args, rc=2), args
    for change in (["--frames", "8"], ["--frames", "x"], ["--batch", "0"], ["--clips-per-video", "-1"]):
        with pytest.raises(SystemExit, match="2"):
            fvd.main([*map(str, sets), *change])
        assert change[0] in capsys.readouterr().err.splitlines()[-1]
