"""A clip is read whole, in step, or refused with one sentence."""
import wave

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfer.core import MmferError
from mmfer.media import SAMPLE_RATE, read_clip, show_clip, write_clip


@pytest.fixture(scope="module")
def ramp(tmp_path_factory):
    "Two seconds: 32 frames that get brighter, and a click at 1.2 s."
    path = tmp_path_factory.mktemp("media") / "ramp.mp4"
    brightness = 7 * np.arange(32, dtype=np.uint8)
    frames = np.tile(brightness[:, None, None, None], (1, 64, 96, 3))
    audio = np.zeros(2 * SAMPLE_RATE, np.float32)
    audio[19200:19600] = 0.5 * np.sin(np.arange(400))
    write_clip(path, frames, 16, audio)
    return path, frames, audio


@pytest.mark.parametrize("n_frames", [1, 4, 16, 32, 50])
def test_frames_are_those_on_show_at_the_centres_of_equal_bins(ramp, n_frames):
    path, frames, _ = ramp
    clip = read_clip(path, n_frames=n_frames)
    np.testing.assert_allclose(clip.times, (np.arange(n_frames) + 0.5) / n_frames * 2)
    wanted = frames[(clip.times * 16).astype(int), 0, 0, 0].astype(int)
    assert clip.frames.shape == (n_frames, 64, 96, 3) and clip.frames.dtype == np.uint8
    assert np.abs(clip.frames.mean((1, 2, 3)) - wanted).max() < 3  # the next frame is 7 away


def test_sound_comes_back_in_place_and_ends_with_the_pictures(ramp):
    path, _, audio = ramp
    clip = read_clip(path)
    assert clip.audio.dtype == np.float32 and len(clip.audio) == len(audio) and clip.duration == 2.0
    fit = np.fft.irfft(np.fft.rfft(clip.audio, 65536) * np.fft.rfft(audio, 65536).conj())
    assert fit.argmax() == 0


def test_written_clips_are_the_same_bytes_each_time(ramp, tmp_path):
    path, frames, audio = ramp
    write_clip(tmp_path / "again.mp4", frames, 16, audio)
    assert (tmp_path / "again.mp4").read_bytes() == path.read_bytes()


def test_a_clip_that_fails_to_encode_leaves_no_file(tmp_path):
    with pytest.raises(ValueError):
        write_clip(tmp_path / "bad.mp4", np.zeros((4, 64, 64, 2), np.uint8), 16, np.zeros(16000, np.float32))
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=20, deadline=None)
@given(n_frames=st.integers(1, 60))
def test_times_are_in_the_middle_of_equal_bins_and_every_one_has_a_picture(ramp, n_frames):
    clip = read_clip(ramp[0], n_frames=n_frames)
    assert len(clip.frames) == len(clip.times) == n_frames
    edges = np.linspace(0, clip.duration, n_frames + 1)
    np.testing.assert_allclose(clip.times - edges[:-1], edges[1:] - clip.times, atol=1e-9)


def tone(seconds):
    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return (0.3 * np.sin(2 * np.pi * 220 * t)).astype(np.float32)


def write_wav(path, audio):
    with wave.open(str(path), "wb") as w:
        w.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        w.writeframes((audio * 32767).astype("<i2").tobytes())


def write_pictures(path, codec):
    "A file with pictures alone."
    noise = np.random.default_rng(0).integers(0, 255, (32, 64, 64, 3), dtype=np.uint8)
    with av.open(str(path), "w") as out:
        video = out.add_stream(codec, rate=16, width=64, height=64, pix_fmt="yuv420p")
        for f in [*map(av.VideoFrame.from_ndarray, noise), None]: out.mux(video.encode(f))


def test_pictures_without_sound_say_so(tmp_path):
    write_pictures(tmp_path / "a.mp4", "libx264")
    clip = read_clip(tmp_path / "a.mp4")
    assert clip.audio is None and not clip.has_audio and clip.audio_problem == "no sound track"
    assert clip.has_video and clip.duration == 2.0 and show_clip(clip).axes


def test_a_silent_track_is_no_sound(ramp, tmp_path):
    write_clip(tmp_path / "mute.mp4", ramp[1], 16, np.zeros(32000, np.float32))
    clip = read_clip(tmp_path / "mute.mp4")
    assert clip.audio is None and clip.audio_problem == "silent sound track" and clip.has_video


def test_sound_without_pictures_says_so(tmp_path):
    write_wav(tmp_path / "a.wav", tone(1.5))
    clip = read_clip(tmp_path / "a.wav")
    assert clip.frames is None and not clip.has_video and clip.video_problem == "no picture track"
    assert len(clip.audio) == 24000 and clip.duration == 1.5 and clip.times.shape == (0,)


def test_other_sample_rates_are_resampled(ramp, tmp_path):
    write_clip(tmp_path / "a.mp4", ramp[1], 16, np.repeat(tone(2), 3), sample_rate=48000)
    clip = read_clip(tmp_path / "a.mp4")
    assert len(clip.audio) == 32000
    assert np.abs(np.fft.rfft(clip.audio)).argmax() == 440  # 220 Hz over two seconds


def faulty(kind, folder, ramp):
    "Make one broken file of each kind."
    path = folder / f"{kind}.mp4"
    if kind == "folder": path.mkdir()
    if kind == "text": path.write_text("not a clip at all")
    if kind == "empty": path.write_bytes(b"")
    if kind == "no_index": path.write_bytes(ramp.read_bytes()[:3000])
    if kind == "half_pictures":
        write_pictures(folder / "whole.mp4", "libx264")
        index_first = av.open(str(folder / "index_first.mp4"), "w", options={"movflags": "faststart"})
        with av.open(str(folder / "whole.mp4")) as a, index_first as b:
            stream = b.add_stream_from_template(a.streams.video[0])
            for packet in a.demux(video=0):
                if packet.dts is None: continue
                packet.stream = stream
                b.mux(packet)
        data = (folder / "index_first.mp4").read_bytes()
        path.write_bytes(data[: len(data) // 2])
    if kind == "half_flv":
        write_pictures(folder / "whole.flv", "flv1")
        path = path.with_suffix(".flv")
        data = (folder / "whole.flv").read_bytes()
        path.write_bytes(data[: len(data) // 2])
    if kind == "no_samples": write_wav(path, tone(0))
    if kind == "no_frames":
        with av.open(str(path), "w", options={"movflags": "empty_moov"}) as out:
            out.add_stream("mpeg4", rate=16, width=64, height=64, pix_fmt="yuv420p")
            out.start_encoding()
    if kind == "silence": write_wav(path, 0 * tone(1))
    if kind == "subtitles":
        path = path.with_suffix(".srt")
        path.write_text("1\n00:00:00,000 --> 00:00:01,000\nhello\n")
    return path


FAULTS = {"missing": "does not exist", "folder": "does not exist or is not a file",
          "text": "not a media file", "empty": "not a media file",
          "no_index": "cut off", "half_pictures": "breaks off", "half_flv": "cut off after",
          "no_samples": "cannot be decoded", "no_frames": "picture track that is empty",
          "silence": "neither sound nor pictures",
          "subtitles": "neither sound nor pictures"}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_one_sentence_with_the_name(kind, tmp_path, ramp, capfd):
    path = faulty(kind, tmp_path, ramp[0])
    with pytest.raises(MmferError) as e: read_clip(path)
    said = str(e.value)
    assert FAULTS[kind] in said and path.name in said and "\n" not in said
    assert said.split(": ")[-1].split()[0] in ("check", "copy", "pass")  # what to do
    assert capfd.readouterr().err == ""  # the decoder keeps its log to itself


def test_a_file_that_may_not_be_read_is_one_sentence(ramp, monkeypatch):
    def refuse(*args): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("mmfer.media.open", refuse, raising=False)
    wanted = r"ramp.mp4 cannot be read .*\(Permission denied\): check that you may read it"
    with pytest.raises(MmferError, match=wanted): read_clip(ramp[0])


# Real recordings


def test_ravdess_clips_are_read_whole(shared_data):
    paths = sorted((shared_data / "ravdess_original/Actor_05").glob("01-*.mp4"))
    assert len(paths) == 6
    for path in paths:
        clip = read_clip(path)
        assert clip.frames.shape == (16, 720, 1280, 3)
        assert 3.0 < clip.duration < 5.3 and len(clip.audio) == round(clip.duration * SAMPLE_RATE)
        assert np.abs(clip.audio).max() > 0.01 and clip.frames.std() > 10 and not clip.audio_problem


def test_ravdess_video_only_file_is_flagged_as_silent(shared_data):
    [path] = (shared_data / "ravdess_original/Actor_05").glob("02-*.mp4")
    clip = read_clip(path)
    assert clip.audio is None and clip.audio_problem == "silent sound track" and clip.has_video


def test_cremad_flv_is_read(shared_data):
    paths = sorted((shared_data / "cremad").glob("*.flv"))
    assert len(paths) == 3
    for path in paths:
        clip = read_clip(path)
        assert clip.has_audio and clip.frames.shape[0] == 16 and 1.5 < clip.duration < 3


def test_opus_is_sound_alone(shared_data):
    path = sorted((shared_data / "ravdess_speech").rglob("*.opus"))[0]
    clip = read_clip(path)
    assert clip.has_audio and not clip.has_video and 3 < clip.duration < 5.3
