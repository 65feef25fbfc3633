"""The maze: what its videos promise to a model that learns from them."""

import numpy as np
import pytest

import train
from train import maze_cast, maze_grid, maze_render, maze_seed, maze_style, maze_video, maze_walk

SEEDS = range(40)


def hall():
    """An empty hall of 13 x 13 cells with walls all round."""
    wall = np.ones((13, 13), bool)
    wall[1:-1, 1:-1] = False
    return wall


def walk(seed, frames):
    rng = np.random.default_rng(seed)
    wall = maze_grid(rng)
    return wall, *maze_walk(wall, rng, frames)


def facing(distance, size, style=2):
    """Picture of the hall's far wall, faced squarely: all of the view, if not farther than 6."""
    position, gaze = np.array([[12 - distance, 6.5]]), np.array([[1.0, 0.0]])
    return maze_render(hall(), position, gaze, style, size)[0].astype(int)


def height_of_wall(picture):
    """Wall in each column, in pixels: green above blue in the wall, below it in sky and floor."""
    return (picture[..., 1] > picture[..., 2]).sum(0)


@pytest.mark.parametrize("size", [8, 17, 32, 256])
def test_a_video_is_uint8_rgb_of_any_square_size(size):
    video = maze_video(5, 3, size)
    assert video.shape == (3, size, size, 3) and video.dtype == np.uint8


def test_the_same_seed_gives_the_same_video():
    assert np.array_equal(maze_video(7, 16, 32), maze_video(7, 16, 32))


def test_different_seeds_give_different_videos():
    videos = {maze_video(seed, 4, 16).tobytes() for seed in SEEDS}
    assert len(videos) == len(SEEDS)


def test_train_and_test_seeds_never_meet():
    train_seeds, test_seeds = ({maze_seed(split, i) for i in range(500)} for split in ("train", "test"))
    assert len(train_seeds) == len(test_seeds) == 500
    assert {seed % 2 for seed in train_seeds} == {0} and {seed % 2 for seed in test_seeds} == {1}


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_style_is_equally_frequent_in_each_split(split):
    styles = [maze_style(maze_seed(split, i)) for i in range(30)]
    assert [styles.count(style) for style in range(3)] == [10, 10, 10]


def test_the_dominant_colour_tells_the_style_apart():
    for seed in SEEDS:
        r, g, b = maze_video(seed, 8, 16).reshape(-1, 3).astype(int).T
        red, green = (r > g + 40) & (r > b + 40) & (g < b + 40), (g > r + 25) & (g > b + 15)
        yellow = (r > b + 60) & (g > b + 40)
        assert np.argmax([red.sum(), yellow.sum(), green.sum()]) == maze_style(seed)


@pytest.mark.parametrize("size, frames", [(16, 8), (32, 8), (33, 50)])
def test_a_longer_video_begins_with_the_shorter_one(size, frames):
    for seed in range(6):
        long, short = maze_video(seed, 2 * frames, size), maze_video(seed, frames, size)
        assert np.array_equal(long[:frames], short)


def test_every_room_is_reachable_and_none_is_a_dead_end():
    for seed in SEEDS:
        wall = maze_grid(np.random.default_rng(seed))
        assert wall[[0, -1]].all() and wall[:, [0, -1]].all()
        reached = np.zeros_like(wall)
        reached[1, 1] = True
        for _ in range(wall.size):
            spread = reached.copy()
            for shift, axis in (1, 0), (-1, 0), (1, 1), (-1, 1):
                spread |= np.roll(reached, shift, axis)
            reached = spread & ~wall
        assert np.array_equal(reached, ~wall)
        exits = 4 - wall[:-2, 1:-1] - 1 * wall[2:, 1:-1] - wall[1:-1, :-2] - wall[1:-1, 2:]
        assert exits[~wall[1:-1, 1:-1]].min() >= 2


def test_the_agent_stays_half_a_cell_away_from_every_wall():
    for seed in SEEDS:
        wall, position, _ = walk(seed, 200)
        corner = np.argwhere(wall)  # a wall cell is the square [corner, corner + 1]
        nearest = np.clip(position[:, None], corner, corner + 1)
        assert np.linalg.norm(position[:, None] - nearest, axis=-1).min() > 0.5 - 1e-9


def test_the_agent_moves_on_and_turns_smoothly():
    for seed in SEEDS:
        _, position, gaze = walk(seed, 200)
        steps = np.linalg.norm(np.diff(position, axis=0), axis=1)
        assert steps.min() > 0.6 * train.SPEED and steps.max() < train.SPEED + 1e-9
        assert np.allclose(np.linalg.norm(gaze, axis=1), 1)
        turns = np.degrees(np.arccos(np.clip((gaze[1:] * gaze[:-1]).sum(1), -1, 1)))
        assert turns.max() < 25
        assert turns.max() > 5  # somewhere it does turn


@pytest.mark.parametrize("distance", [1.0, 2.0, 3.5])
def test_a_wall_faced_at_distance_z_fills_wall_over_2_z_view_of_the_height_in_every_column(distance):
    size = 128
    height = height_of_wall(facing(distance, size))
    assert np.abs(height - size * train.WALL / (2 * distance * train.VIEW)).max() <= 1


def test_a_ray_stops_at_the_first_wall_where_a_march_in_small_steps_does():
    for seed in range(4):
        wall, position, gaze = walk(seed, 3)
        right = np.stack([gaze[:, 1], -gaze[:, 0]], 1)
        for xi in -0.7, -0.31, 0.013, 0.52:
            ray = gaze + xi * right
            args = wall, position.T[:, :, None], ray.T[:, :, None]
            z = np.minimum(maze_cast(*args, 0)[0], maze_cast(*args, 1)[0])[:, 0]
            march = np.arange(0, 15, 1e-3)[:, None, None]
            i, j = np.clip(np.floor(position + march * ray), 0, 12).astype(int).transpose(2, 0, 1)
            assert np.allclose(z, march[wall[i, j].argmax(0), 0, 0], atol=2e-3)


def test_the_top_row_is_sky_and_the_bottom_row_is_floor():
    for seed in SEEDS:
        video = maze_video(seed, 40, 16).astype(int)
        assert np.ptp(video[:, 0], axis=(0, 1)).max() == 0  # one colour, in all frames
        assert (video[:, 0, :, 2] > video[:, 0, :, 0] + 60).all()  # blue
        assert (np.ptp(video[:, -1], axis=-1) < 12).all()  # grey


def test_walls_far_away_fade_to_their_mean_tone():
    wave = train.maze_stripe(np.linspace(0, 3, 50), 0.01)
    assert wave.min() == 0 and wave.max() > 0.999
    assert np.abs(train.maze_stripe(np.linspace(0, 3, 50), 20.5, 0.3) - 0.3).max() < 0.02


def test_consecutive_frames_differ_but_by_little():
    for seed in SEEDS:
        video = maze_video(seed, 16, 32).astype(float)
        change = np.abs(np.diff(video, axis=0)).mean((1, 2, 3))
        apart = np.abs(video - maze_video(seed + 1000, 16, 32)).mean()
        assert change.min() > 0.5 and change.mean() < 0.75 * apart and change.max() < 32
