"""The server that a rehearsal puts in the place of the hub and of Zenodo: its clients are the real ones."""
import math
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch

from mmfer.weights import load_nemo

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from stand_in.files import PARAKEET, nemo_shapes, write_archives, write_nemo  # noqa: E402
from stand_in.server import StandIn, commit_of  # noqa: E402

CLIENT = """
import sys
from huggingface_hub import hf_hub_download, model_info, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
about = model_info("someone/model")
print(about.sha, about.card_data.license)
print(hf_hub_download("someone/model", "model.safetensors"))
print(snapshot_download("someone/model"))
try: hf_hub_download("someone/model", "absent.json")
except EntryNotFoundError: print("no such file")
try: hf_hub_download("someone/absent", "config.json")
except RepositoryNotFoundError: print("no such repository")
"""

SIZE = 24_000_000  # the client writes 10 MB at a time: what it holds when the line breaks is lost


@pytest.fixture
def repo(tmp_path):
    folder = tmp_path / "hub" / "someone" / "model"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(SIZE))
    return folder


def test_the_hub_client_fetches_and_goes_on_where_the_line_broke(tmp_path, repo):
    weights = "hub/someone/model/model.safetensors"
    with StandIn(tmp_path, breaks={weights}).running() as server:
        env = os.environ | dict(HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0")
        said = subprocess.check_output([sys.executable, "-c", CLIENT], env=env, text=True)
    about, file, folder, *errors = said.splitlines()
    assert about == f"{commit_of('someone/model')} mit"
    assert Path(file).read_bytes() == (repo / "model.safetensors").read_bytes()
    assert sorted(p.name for p in Path(folder).iterdir()) == sorted(p.name for p in repo.iterdir())
    assert errors == ["no such file", "no such repository"]
    assert server.sent[weights] < 1.2 * SIZE, "the second request asks only for what is missing"
    statuses = [status for method, path, status in server.asked if method == "GET" and "safetensors" in path]
    assert statuses == [200, 206]


@pytest.mark.parametrize("wanted, status, first, n", [
    ("bytes=0-9", 206, 0, 10), ("bytes=23999990-", 206, SIZE - 10, 10), (None, 200, 0, SIZE)])
def test_ranges(tmp_path, repo, wanted, status, first, n):
    with StandIn(tmp_path).running() as server:
        url = f"{server.url}/hub/someone/model/model.safetensors"
        request = urllib.request.Request(url, headers={"Range": wanted} if wanted else {})
        with urllib.request.urlopen(request) as answer: body = answer.read()
    assert answer.status == status
    assert body == (repo / "model.safetensors").read_bytes()[first:first + n]


def test_the_parakeet_that_stands_in_has_the_size_of_the_published_one():
    values = sum(math.prod(shape) for shape in nemo_shapes(PARAKEET).values())
    assert round(4 * values / 1e6) == 459


def test_the_nemo_that_stands_in_is_read_as_a_real_one(tmp_path):
    small = dict(n_layers=2, d_model=32, n_heads=4, subsampling_conv_channels=16)
    write_nemo(tmp_path / "small.nemo", PARAKEET | dict(encoder=PARAKEET["encoder"] | small))
    encoder = load_nemo(tmp_path / "small.nemo")
    with torch.no_grad(): out = encoder(torch.randn(1, 100, 80)).last_hidden_state
    assert out.shape[-1] == 32 and 0.01 < out.std() < 100


def test_archives_hold_the_clips_of_their_actor(tmp_path):
    write_archives(tmp_path, ["01", "02"], per_emotion=1)
    with StandIn(tmp_path).running() as server:
        with urllib.request.urlopen(f"{server.url}/ravdess/registry.txt") as answer: lines = answer.read()
    names = [line.split()[0] for line in lines.decode().splitlines()]
    assert names == ["Video_Speech_Actor_01.zip", "Video_Speech_Actor_02.zip"]
