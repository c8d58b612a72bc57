"""The `mmfer` command as a user meets it: it works from end to end, and a mistake is one line and exit code 2."""
import json
import subprocess
import sys

import numpy as np
import pytest

from mmfer.cli import main
from mmfer.core import EMOTIONS, seed_everything
from mmfer.media import write_clip
from mmfer.model import MultimodalFER
from mmfer.toy import make_toy


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"), actors=3, clips_per_actor=16, progress=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    seed_everything(0)
    folder = tmp_path_factory.mktemp("model")
    MultimodalFER.from_preset("tiny").save_pretrained(folder)
    return folder


def mistake(capsys, *args):
    "The line that a user sees after a wrong command."
    with pytest.raises(SystemExit) as e: main([str(a) for a in args])
    said = capsys.readouterr().err
    assert e.value.code == 2
    assert "Traceback" not in said and said.startswith("mmfer: ")
    return said.strip()


def test_a_mistake_is_one_line(model, tmp_path, capsys):
    for args in (["toys"], ["train", "x", "--preset", "huge", "--out", "y"], ["predict", model, tmp_path / "gone.mp4"], ["toy"]):
        assert "\n" not in mistake(capsys, *args)


def test_train_then_evaluate_then_predict(corpus, tmp_path, capsys):
    main(["train", str(corpus), "--out", str(tmp_path / "run"), "--preset", "tiny", "--epochs", "1"])
    trained = json.loads((tmp_path / "run/report/evaluation.json").read_text())
    main(["evaluate", str(tmp_path / "run/best"), str(corpus), "--out", str(tmp_path / "again")])
    again = json.loads((tmp_path / "again/evaluation.json").read_text())
    assert again == trained and again["n_clips"] == 16 and again["test_actors"] == [3]
    capsys.readouterr()
    clip = next(corpus.rglob("*.mp4"))
    main(["predict", str(tmp_path / "run/best"), str(clip)])
    said = capsys.readouterr().out
    shares = [float(line.split("%")[0].split()[-1]) for line in said.splitlines()[1:]]
    assert all(e in said for e in EMOTIONS) and shares == sorted(shares, reverse=True)
    assert abs(sum(shares) - 100) < 0.5


def test_one_actor_is_called_out(tmp_path, capsys):
    make_toy(tmp_path / "one", actors=1, clips_per_actor=60, progress=False)
    main(["train", str(tmp_path / "one"), "--out", str(tmp_path / "run"), "--preset", "tiny", "--epochs", "1"])
    assert "NOT an unseen-actor result" in capsys.readouterr().err


def test_help_names_every_command():
    said = subprocess.run([sys.executable, "-c", "from mmfer.cli import main; main()", "--help"], capture_output=True, text=True)
    assert said.returncode == 0
    assert all(name in said.stdout for name in ("toy", "train", "evaluate", "predict", "info"))


def test_mistakes_are_one_line(corpus, model, tmp_path, capsys):
    (tmp_path / "notes.mp4").write_text("not a film")
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/holiday.mp4").write_bytes(b"")
    clip = next(corpus.rglob("*.mp4"))
    run = ["--out", tmp_path / "run", "--preset", "tiny"]
    assert "toys" in mistake(capsys, "toys")
    assert "huge" in mistake(capsys, "train", corpus, "--out", "x", "--preset", "huge")
    assert "nowhere is not a folder" in mistake(capsys, "train", tmp_path / "nowhere", *run)
    assert "empty" in mistake(capsys, "train", tmp_path / "empty", *run)
    assert "holiday.mp4" in mistake(capsys, "train", tmp_path / "foreign", *run)
    assert "config.json" in mistake(capsys, "predict", tmp_path / "empty", clip)
    assert "gone.mp4" in mistake(capsys, "predict", model, tmp_path / "gone.mp4")
    assert "no file" in mistake(capsys, "predict", model)
    assert "notes.mp4" in mistake(capsys, "predict", model, tmp_path / "notes.mp4")
    assert "nowhere" in mistake(capsys, "info", tmp_path / "nowhere")
    assert "actors" in mistake(capsys, "toy", tmp_path / "t", "--actors", "0")


def test_a_foreign_checkpoint_is_refused(model, tmp_path, capsys):
    config = json.loads((model / "config.json").read_text())
    config["audio"]["layers"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    assert "layers.4" in mistake(capsys, "predict", tmp_path, "clip.mp4")


def test_silent_clip_is_named_and_the_others_go_on(corpus, model, tmp_path, capsys):
    silent = tmp_path / "silent.mp4"
    write_clip(silent, np.zeros((16, 64, 64, 3), np.uint8), 16, np.zeros(32_000, np.float32))
    clip = next(corpus.rglob("*.mp4"))
    with pytest.raises(SystemExit) as e: main(["predict", str(model), str(silent), str(clip)])
    said = capsys.readouterr()
    assert e.value.code == 2 and "silent.mp4" in said.err and "silent" in said.err
    assert str(clip) in said.out and "happy" in said.out
    main(["predict", str(model), str(silent), "--missing-ok"])
    assert "happy" in capsys.readouterr().out


def test_real_clips(shared_data, model, capsys):
    files = sorted((shared_data / "ravdess_original/Actor_05").glob("*.mp4"))
    with pytest.raises(SystemExit): main(["predict", str(model), *map(str, files)])
    said = capsys.readouterr()
    assert said.out.count("surprised") == 6
    assert "02-01-03-01-01-02-05.mp4" in said.err and "1 of 7" in said.err
