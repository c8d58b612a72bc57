"""Faces: found, followed through gaps, cut out in one steady square, and told to the user."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfer.core import MmferError
from mmfer.faces import crop_squares, load_yunet, middle_square, resize, track_face
from mmfer.media import read_clip


# ---- invented detections ----
class Detector:
    "Answers with the given boxes, one list per frame, in the form of OpenCV."
    def __init__(self, frames): self.frames = iter(frames)
    def setInputSize(self, size): pass
    def detect(self, picture):
        faces = next(self.frames)
        return 1, np.array([[x, y, w, h, *[0] * 10, 0.9] for x, y, w, h in faces],
                           np.float32) if faces else None


BLANK = np.zeros((8, 100, 160, 3), np.uint8)


def test_a_steady_face_gives_a_steady_square():
    track = track_face(Detector([[(60, 30, 30, 40)]] * 8), BLANK, margin=0.25)
    np.testing.assert_allclose(track.boxes, [[60, 30, 90, 70]] * 8)
    assert track.squares.tolist() == [[45, 20, 105, 80]] * 8 and track.seen.all() and track.message == ""


def test_several_faces_the_largest_is_followed_and_the_user_told():
    faces = [[(10, 10, 10, 10), (60 + t, 30, 30, 40)] for t in range(8)]
    faces[3] = faces[3][::-1]  # the detector has no fixed order
    track = track_face(Detector(faces), BLANK, name="two.mp4")
    assert (np.abs(track.boxes[:, 0] - (60 + np.arange(8))) < 1).all()
    assert track.message == "two.mp4: 2 faces are in the picture, the largest is followed"


def test_a_face_that_leaves_is_held_and_has_no_mask():
    detector = Detector([[(60, 30, 30, 40)]] * 5 + [[]] * 3)
    track = track_face(detector, BLANK, name="gone.mp4")
    assert track.seen.tolist() == [True] * 5 + [False] * 3
    np.testing.assert_allclose(track.boxes, [[60, 30, 90, 70]] * 8)
    words = "gone.mp4: the face was not found in 3 of 8 frames, its last place is used there without a mask"
    assert track.message == words and track.mask(4).any(1).tolist() == track.seen.tolist()


def test_a_gap_is_bridged_from_both_sides():
    faces = [[(40, 30, 30, 40)]] * 3 + [[]] * 2 + [[(52, 30, 30, 40)]] * 3
    boxes = track_face(Detector(faces), BLANK).boxes
    assert (np.diff(boxes[:, 0]) >= 0).all() and 40 < boxes[3, 0] < boxes[4, 0] < 52


def test_jitter_is_smoothed():
    jump = [0, 4] * 10
    track = track_face(Detector([[(60 + j, 30, 30, 40)] for j in jump]),
                       np.zeros((20, 100, 160, 3), np.uint8))
    assert np.abs(np.diff(track.boxes[:, 0])).max() < 1.5


def test_squares_stay_inside_the_picture_and_keep_their_size():
    faces = [[(x, 60, 30, 40)] for x in np.linspace(-20, 150, 8)]
    squares = track_face(Detector(faces), BLANK, margin=0.5).squares
    assert (squares[:, :2] >= 0).all() and (squares[:, 2] <= 160).all() and (squares[:, 3] <= 100).all()
    assert len({(x1 - x0, y1 - y0) for x0, y0, x1, y1 in squares.tolist()}) == 1
    huge = track_face(Detector([[(10, -20, 140, 140)]] * 8), BLANK).squares
    assert (huge[:, 3] - huge[:, 1] == 100).all()  # never larger than the picture


def test_no_face_is_an_error_that_says_what_to_do():
    with pytest.raises(MmferError,
                       match='empty.mp4: no face was found in any of 8 frames; pass faces="none"'):
        track_face(Detector([[]] * 8), BLANK, name="empty.mp4")


def test_the_middle_square_is_kept_as_it_is():
    frames = np.random.default_rng(0).integers(0, 255, (3, 40, 60, 3), dtype=np.uint8)
    track = middle_square(frames)
    assert np.array_equal(crop_squares(frames, track, 40), frames[:, :, 10:50])
    assert not track.mask(4).any() and not track.seen.any()


boxes = st.tuples(*[st.floats(0, 80)] * 2, *[st.floats(5, 60)] * 2)


@given(st.lists(boxes, min_size=1, max_size=5), st.integers(1, 20))
def test_a_patch_is_on_the_face_when_its_centre_is(faces, grid):
    track = track_face(Detector([[f] for f in faces]), BLANK[: len(faces)])
    mask = track.mask(grid).reshape(-1, grid, grid)
    parts = zip(mask, track.boxes, track.squares, track.seen)
    for m, (x0, y0, x1, y1), (left, top, right, _), seen in parts:
        centre = (np.arange(grid) + 0.5) / grid * (right - left)
        inside_x = (left + centre >= x0) & (left + centre < x1)
        inside_y = (top + centre >= y0) & (top + centre < y1)
        assert np.array_equal(m, seen * np.outer(inside_y, inside_x))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 255))
def test_resize_keeps_a_plain_picture(before, after, grey):
    out = resize(np.full((2, before, before, 3), grey, np.uint8), after)
    assert out.shape == (2, after, after, 3) and (out == grey).all()


def test_bad_detector_files_are_refused(tmp_path):
    with pytest.raises(MmferError, match="does not exist"): load_yunet(tmp_path / "gone.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a network")
    with pytest.raises(MmferError, match="is no YuNet"): load_yunet(tmp_path / "bad.onnx")


# ---- real faces ----
@pytest.fixture
def yunet(shared_data): return load_yunet(shared_data / "yunet" / "yunet_n_dynamic.onnx")


FACE = "01-01-03-01-01-02-05.mp4"


@pytest.mark.parametrize("name, want", [
    (f"ravdess_original/Actor_05/{FACE}", (485, 161, 819, 635)),
    ("cremad/1001_DFA_ANG_XX.flv", (166, 70, 262, 205))])
def test_real_faces_are_found(shared_data, yunet, name, want):
    "The boxes of the first frame were checked by eye."
    frames = read_clip(shared_data / name).frames
    track = track_face(yunet, frames, name=name)
    np.testing.assert_allclose(track.boxes[0], want, atol=0.02 * frames.shape[2])
    assert track.seen.all() and not track.message
    assert crop_squares(frames, track, 224).shape == (16, 224, 224, 3)
    inside = track.boxes - np.tile(track.squares[:, :2], 2)
    side = (track.squares[:, 2] - track.squares[:, 0])[:, None]
    assert (inside >= 0).all() and (inside <= side).all()
    covered = track.mask(14).sum(1) / 196
    area = (inside[:, 2:] - inside[:, :2]).prod(1) / side[:, 0] ** 2
    assert np.abs(covered - area).max() < 0.08 and covered.min() > 0.2


def test_two_real_faces_in_one_picture(shared_data, yunet):
    frames = read_clip(shared_data / "cremad" / "1001_DFA_HAP_XX.flv", n_frames=4).frames
    small = np.stack([f[::2, ::2] for f in frames])
    below = frames.shape[1] - small.shape[1]
    both = np.concatenate([frames, np.pad(small, ((0, 0), (0, below), (0, 0), (0, 0)))], 2)
    track = track_face(yunet, both, name="pair.flv")
    assert track.message.startswith("pair.flv: 2 faces are in the picture")
    assert (track.boxes[:, 2] < frames.shape[2]).all()  # the large one, on the left


def test_a_real_face_that_leaves(shared_data, yunet):
    frames = read_clip(shared_data / "cremad" / "1001_DFA_SAD_XX.flv", n_frames=8).frames.copy()
    frames[5:] = frames[0, :1, :1]  # an empty wall
    track = track_face(yunet, frames, name="gone.flv")
    assert "not found in 3 of 8 frames" in track.message
    assert track.mask(14)[:5].any(1).all() and not track.mask(14)[5:].any()
