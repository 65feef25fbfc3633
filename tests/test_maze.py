"""The maze: what its videos promise to a model that learns from them."""

import tracemalloc

import numpy as np

from train import SPEED, VIEW, WALL, maze_render, maze_seed, maze_style, maze_turns, maze_video, maze_walk

SEEDS = range(20)


def height_of_wall(x, angle):
    """Pixels of wall in each of 128 columns, seen from (x, 6.5) in an empty hall of 11 x 11 cells."""
    hall = np.pad(np.zeros((11, 11), bool), 1, constant_values=True)
    picture = maze_render(hall, np.array([[x, 6.5]]), np.array([[np.cos(angle), np.sin(angle)]]), 2, 128)[0]
    return (picture[..., 1] > picture[..., 2]).sum(0)  # green above blue: wall, not sky or floor


def test_a_longer_video_and_its_turns_begin_with_the_shorter_ones():
    for seed, size, frames in (0, 1, 3), (2, 16, 64), (3, 33, 50), (5, 256, 1):
        video, longer = maze_video(seed, frames, size), maze_video(seed, 2 * frames, size)
        assert video.shape == (frames, size, size, 3) and video.dtype == np.uint8
        assert np.array_equal(longer[:frames], video)
        assert np.array_equal(maze_turns(seed, 2 * frames)[:frames], maze_turns(seed, frames))


def test_seeds_and_splits_share_no_video_and_have_every_style_equally_often():
    seeds = [[maze_seed(split, i) for i in range(30)] for split in ("train", "test")]
    assert all(np.bincount([maze_style(seed) for seed in split]).tolist() == [10] * 3 for split in seeds)
    assert len({maze_video(seed, 4, 16).tobytes() for split in seeds for seed in split * 2}) == 60


def test_colours_tell_the_style_the_sky_and_the_floor():
    for seed in SEEDS:
        video = maze_video(seed, 40, 16).astype(int)
        r, g, b = np.moveaxis(video, -1, 0)
        tones = (r > g + 40) & (g < b + 40), (r > g) & (g > b + 40), (g > r + 25) & (g > b + 15)
        assert np.argmax([tone.sum() for tone in tones]) == maze_style(seed)  # red, yellow, green
        assert (video[:, 0] == video[0, 0, 0]).all() and b[0, 0, 0] > r[0, 0, 0] + 60  # blue
        assert np.ptp(video[:, -1], axis=-1).max() < 15  # grey


def test_every_room_is_reachable_and_none_is_a_dead_end():
    for seed in SEEDS:
        wall = maze_walk(seed, 1)[0]
        assert wall[[0, -1]].all() and wall[:, [0, -1]].all()
        reached = np.arange(wall.size).reshape(wall.shape) == len(wall) + 1  # cell (1, 1)
        beside = lambda cells: np.stack([np.roll(cells, shift, axis) for shift in (1, -1) for axis in (0, 1)])
        for _ in range(wall.size):
            reached |= beside(reached).any(0) & ~wall
        assert np.array_equal(reached, ~wall)
        assert beside(~wall).sum(0)[~wall].min() >= 2


def test_a_walk_keeps_half_a_cell_from_walls_and_turns_smoothly_by_what_the_gaze_changes():
    for seed in SEEDS:
        wall, position, gaze = maze_walk(seed, 200)
        corner, place = np.argwhere(wall), position[:, None]  # a wall cell is the square [corner, corner + 1]
        assert np.linalg.norm(place - place.clip(corner, corner + 1), axis=-1).min() > 0.5 - 1e-9
        speed = np.linalg.norm(np.diff(position, axis=0), axis=1) / SPEED
        assert 0.6 < speed.min() and speed.max() < 1 + 1e-9
        turns, gaze = maze_turns(seed, 200), gaze @ [1, 1j]
        assert turns.dtype == np.float32 and turns[0] == 0
        assert 5 < np.degrees(np.abs(turns)).max() < 25  # somewhere it does turn
        assert np.allclose(gaze, gaze[0] * np.exp(1j * turns.cumsum()), atol=1e-4)


def test_a_wall_at_distance_z_fills_wall_over_2_z_view_and_its_edge_is_straight_from_any_angle():
    for z in 1.0, 2.0, 3.5:
        assert np.abs(height_of_wall(12 - z, angle=0) - 128 * WALL / (2 * z * VIEW)).max() <= 1
    for angle in np.radians([10, 25]):
        height, x = height_of_wall(10.5, angle), np.arange(128)
        assert np.abs(height - np.polyval(np.polyfit(x, height, 1), x)).max() < 1.5  # with fisheye it bends


def test_a_small_picture_is_the_mean_of_a_large_one():
    for seed in SEEDS:
        large = maze_video(seed, 4, 128).reshape(4, 16, 8, 16, 8, 3).mean((2, 4))
        assert np.abs(maze_video(seed, 4, 16) - large).mean() < 1.8  # of 255: without aliasing


def test_a_long_video_takes_little_memory_beside_the_result():
    tracemalloc.start()
    assert 1.6 * maze_video(0, 1000, 32).nbytes > tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
