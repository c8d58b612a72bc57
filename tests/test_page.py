"""One page about one clip: it says what the numbers say, shows what was there, and loads nothing."""
import base64
import contextlib
import html
import io
import re
import shutil
import socket
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import wavfile

from mmfer import page
from mmfer.core import MmferError
from mmfer.explain import METHODS, Explanation, Map
from mmfer.faces import middle_square
from mmfer.processor import FaceClip
from mmfer.truth import PARTS, TRUST

few = settings(max_examples=40, deadline=None)
numbers = st.lists(st.floats(-1e3, 1e3).map(lambda x: round(x, 3)), min_size=1, max_size=30).map(np.array)
EMOTIONS = ("glad", "grim", "<b>odd</b>")
TRUTH = dict(start=0.5, end=1.0, place=[[0.25, 0.25, 0.75, 0.5], [0.4, 0.6, 0.6, 0.8]])


def make_clip(seconds=2.0, frames=6, sound=True, pictures=True, name="made-up"):
    rng = np.random.default_rng(0)
    audio = rng.uniform(-1, 1, round(16_000 * seconds)).astype(np.float32) if sound else None
    film = rng.integers(0, 256, (frames, 32, 32, 3), dtype=np.uint8) if pictures else None
    times = (np.arange(frames) + 0.5) / frames * seconds if pictures else np.zeros(0)
    track = middle_square(film) if pictures else None
    return FaceClip(Path(f"{name}.mp4"), audio, film, times, seconds, track=track)


def make_explanation(clip, methods=("attention", "occlusion"), fusion=True):
    rng = np.random.default_rng(1)
    none = [None] * len(methods)
    sound = rng.normal(size=(len(methods), 10)) if clip.has_audio else none
    patches = rng.normal(size=(len(methods), len(clip.times), 4, 4)) if clip.has_video else none
    looks = np.tril(rng.uniform(1, 2, (2, 3, 16, 16)))
    both = clip.has_audio and clip.has_video
    return Explanation(
        duration=clip.duration, probabilities=pd.Series([0.2, 0.7, 0.1], EMOTIONS),
        maps={m: Map(s, p) for m, s, p in zip(methods, sound, patches)}, segments=rng.uniform(size=8),
        fusion=looks / looks.sum(-1, keepdims=True) if fusion and both else None,
        shares=pd.Series({"sound": -0.4, "pictures": 1.5}) if both else None)


class Parsed(HTMLParser):
    "The tags of a page, with their attributes and the text before the next tag."
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes): self.tags.append(SimpleNamespace(tag=tag, text="", **{
        "all": dict(attributes), "kind": dict(attributes).get("class", "")}))

    def handle_data(self, data):
        if self.tags: self.tags[-1].text += data

    def those(self, tag, **attributes):
        return [t for t in self.tags if t.tag == tag and attributes.items() <= t.all.items()]


def written(tmp_path, clip, explanation=None, **how):
    path = tmp_path / "page.html"
    page.write_page(explanation or make_explanation(clip), clip, path, **how)
    return path.read_text(encoding="utf-8")


def decoded(uri):
    return io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))


# What is said


def rates(sound, frames, place):
    chances = dict(sound_chance=0.31, frames_chance=0.32, place_chance=0.13)
    return dict(sound=sound, frames=frames, place=place) | chances


@pytest.fixture(scope="module", autouse=True)
def trust():
    "Rates that are not those of the benchmark, so that no test rests on them."
    nan = float("nan")
    scores = (rates(0.2, 0.3, 0.1), rates(nan, 0.4, nan), rates(0.9, 0.8, 0.7), rates(nan, nan, nan),
              rates(0.91, 0.92, 0.93))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "TRUST", dict(zip(METHODS, scores)))
        yield


def test_every_method_has_its_place_in_the_table_of_trust():
    ends = ("", "_chance")
    assert {*TRUST} == {*METHODS}
    for rates in TRUST.values(): assert {*rates} >= {f"{part}{end}" for part in PARTS for end in ends}


def test_the_line_of_trust_has_the_scores_of_its_method_and_chance():
    said = page.trust_line("occlusion")
    for words in ("sound in 91% (chance 31%)", "pictures in 92% (chance 32%)", "place in 93% (chance 13%)"):
        assert words in said and "occlusion" in said
    assert "40%" in page.trust_line("rollout") and "nan" not in page.trust_line("rollout")
    assert page.trust_line("integrated gradients").endswith("nobody has measured it.")
    passed = [method for method in METHODS if "where information passed" in page.trust_line(method)]
    assert passed == ["attention", "rollout"]


def test_the_method_that_was_most_often_right_comes_first():
    names = page.by_trust(make_explanation(make_clip(), METHODS))
    assert names == ["occlusion", "gradient x attention", "rollout", "attention", "integrated gradients"]


def looks_at(region, factor, causal):
    fusion = np.ones((2, 3, 16, 16))
    fusion[..., region] *= factor
    if causal: fusion = np.tril(fusion)
    return fusion / fusion.sum(-1, keepdims=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", [*page._regions(16)])
def test_the_sentence_on_the_fusion_names_what_was_planted(name, causal):
    fusion = looks_at(page._regions(16)[name], 6, causal)
    told = page.fusion_pattern(fusion)
    if causal and name.endswith("segment 8"): assert told.startswith("Nothing")  # nobody comes after it
    else: assert f"Strongest pattern: {name}, " in told


@pytest.mark.parametrize("causal", [True, False])
def test_an_even_fusion_has_no_pattern(causal):
    assert page.fusion_pattern(looks_at(np.eye(16, dtype=bool), 1, causal)).startswith("Nothing stands out")


def test_the_sentence_on_the_fusion_says_what_was_averaged():
    fusion = looks_at(page._regions(16)["each token looks at itself"], 6, True)
    assert "layers and heads: 2 x 3" in page.fusion_pattern(fusion)
    assert "one layer, one head" in page.fusion_pattern(fusion[:1, :1])


def test_the_ratio_in_the_sentence_is_that_of_the_map():
    fusion = np.full((1, 1, 16, 16), 0.5 / 14)
    for row in range(16): fusion[..., row, 2 * (row // 2):2 * (row // 2) + 2] = 0.25
    own = fusion[0, 0].diagonal().mean() * 16
    assert f"each token looks at itself, {own:.1f} times" in page.fusion_pattern(fusion)


@pytest.mark.parametrize("sound, pictures, told", [
    (0.1, 1.9, "The pictures count more"), (1.2, -0.3, "The sound counts more"),
    (0.5, 0.52, "about equally")])
def test_the_sentence_on_the_shares(sound, pictures, told):
    said = page.shares_sentence(pd.Series({"sound": sound, "pictures": pictures}))
    assert told in said and f"{sound:+.2f}" in said and f"{pictures:+.2f}" in said


# How it is drawn


@few
@given(numbers)
def test_bars_are_as_high_as_their_values(values):
    drawn = np.zeros(len(values))
    for i, height in re.findall(r"M(\d+) 0V(-?[\d.]+)h1", page._bars(values, "")):
        drawn[int(i)] = -float(height)
    scale = max(values.max(), 0) - min(values.min(), 0)
    assert drawn * scale == pytest.approx(values, abs=1e-3 * scale)


@few
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9))
def test_the_veil_is_lightest_where_the_weight_is_largest(seed, T, g):
    patches = np.random.default_rng(seed).normal(size=(T, g, g))
    veil = page._veil(patches)
    assert (veil[patches <= 0] == 0.65).all() and veil.min() >= 0
    if patches.max() > 0: assert veil.ravel()[patches.argmax()] == 0
    order = veil.ravel()[patches.ravel().argsort()]
    assert (np.diff(order) <= 0).all()


@few
@given(numbers, st.floats(0.5, 5))
def test_the_peak_lies_in_the_bin_that_counts_most(values, duration):
    peak = page._peak_time(values, duration)
    assert int(peak / duration * len(values)) == values.argmax()


def test_the_square_stands_on_the_patch_that_counts_most():
    place = np.zeros((4, 4))
    place[1, 3] = 1  # second row, last column
    assert page._peak_box(place, "occlusion") == pytest.approx([0.75, 0.25, 1, 0.5])


@pytest.mark.parametrize("method, fall", [
    ("occlusion", -1), ("occlusion", 0.002), ("integrated gradients", 0)])
def test_a_map_that_points_nowhere_has_no_peak(tmp_path, method, fall):
    clip = make_clip()
    e = make_explanation(clip, [method])
    e.maps[method] = Map(np.full(10, fall), np.full((6, 4, 4), fall / 96))
    parsed = Parsed(written(tmp_path, clip, e))
    assert not [t for t in parsed.tags if t.kind in ("peak", "square")]
    told = [t.all["aria-label"] for t in parsed.those("svg")]
    assert sum("points nowhere" in label for label in told) == 2
    weights = page.plot_explanation(e, clip).get_axes()[1]
    assert not [line for line in weights.lines if line.get_marker() == "v"]
    assert weights.get_title().endswith("points nowhere")


def drawn_titles(figure):
    return [ax.get_title().replace("\n", " ") for ax in figure.get_axes()]


def test_print_shows_method_attention_answer_and_trust():
    clip = make_clip()
    figure = page.plot_explanation(make_explanation(clip), clip, TRUTH, "attention")
    titles = " | ".join(drawn_titles(figure))
    for part in ("Pictures as the model gets", "Weight of the pictures: attention", "log-mel", "Answer",
                 "Weight of the sound: attention", "Attention: weight of the segments", "Nothing stands out",
                 "Shapley"):
        assert part in titles
    texts = [text for part in (figure, *figure.subfigs) for text in part.findobj(plt.Text)]
    said = [text.get_text().replace("\n", " ") for text in texts]
    assert page.trust_line("attention") in said and "made-up: the model says grim" in said


@pytest.mark.parametrize("sound, pictures", [(True, False), (False, True)])
def test_print_leaves_out_what_the_model_did_not_use(sound, pictures):
    clip = make_clip(sound=sound, pictures=pictures)
    titles = " ".join(drawn_titles(page.plot_explanation(make_explanation(clip), clip)))
    assert ("log-mel" in titles) == ("of the sound" in titles) == sound
    assert ("Pictures as" in titles) == ("of the pictures" in titles) == pictures
    assert "Shapley" not in titles


def test_print_takes_the_picture_that_counts_most_of_each_part():
    clip = make_clip(frames=16)
    clip.frames[:] = np.arange(16, dtype=np.uint8)[:, None, None, None]
    patches = np.zeros((16, 2, 2))
    patches[1::2] = 1  # the second of each pair
    e = make_explanation(clip)
    e.maps = {"occlusion": Map(patches=patches)}
    film = page.plot_explanation(e, clip).get_axes()[0]
    assert [image.get_array().max() for image in film.images[::2]] == [*range(1, 16, 2)]


def test_a_method_that_was_not_computed_is_told():
    clip = make_clip()
    def write(e, clip, method): page.write_page(e, clip, "never.html", method=method)
    for use in (page.plot_explanation, write):
        with pytest.raises(MmferError, match="'rollout' is unknown: choose one of .*occlusion"):
            use(make_explanation(clip), clip, method="rollout")
    assert not Path("never.html").exists()


# The file


def test_the_page_loads_nothing(tmp_path):
    text = written(tmp_path, make_clip(), truth=TRUTH)
    tags = Parsed(text).tags
    for tag in tags:
        for key in ("src", "href", "action", "data", "poster"):
            assert tag.all.get(key, "data:").startswith("data:"), tag
    assert not [u for u in re.findall(r"url\((.{5})", text) if u != "data:"] and "@import" not in text
    [policy] = [t.all["content"] for t in tags if "http-equiv" in t.all]
    assert policy.split(";")[0] == "default-src 'none'" and "http" not in policy


def test_the_page_holds_the_clip_as_the_model_got_it(tmp_path):
    clip = make_clip()
    parsed = Parsed(written(tmp_path, clip))
    rate, samples = wavfile.read(decoded(parsed.those("audio")[0].all["src"]))
    assert rate == 16_000 and samples / 32767 == pytest.approx(clip.audio, abs=1 / 32767)
    film = [t for t in parsed.those("img") if re.match(r"picture \d of 6, at", t.all["alt"])]
    pictures = [plt.imread(decoded(t.all["src"]))[..., :3] * 255 for t in film]
    assert np.array_equal(np.round(pictures), clip.frames)


def test_the_veil_in_the_page_is_that_of_the_method(tmp_path):
    clip = make_clip()
    e = make_explanation(clip)
    text = written(tmp_path, clip, e)
    for method, weights in e.maps.items():
        uri = re.search(rf'\.veil\[data-method="{method}"\] {{ background-image: url\((.*?)\)', text)[1]
        alpha = plt.imread(decoded(uri))[..., 3]
        assert alpha == pytest.approx(np.hstack(page._veil(weights.patches)), abs=1 / 255)


def test_who_does_not_see_or_use_a_mouse_is_served(tmp_path):
    parsed = Parsed(written(tmp_path, make_clip(), truth=TRUTH))
    assert all(t.all.get("alt") for t in parsed.those("img"))
    drawings = parsed.those("svg")
    assert drawings and all(t.all["role"] == "img" and t.all["aria-label"] for t in drawings)
    [slider] = parsed.those("input", type="range")
    assert slider.all["aria-label"] and parsed.those("html", lang="en")
    labelled = {t.all["for"] for t in parsed.those("label") if "for" in t.all}
    assert {t.all["id"] for t in parsed.those("select")} == labelled
    assert parsed.those("button")[0].all["type"] == "button"


@pytest.mark.parametrize("first", [None, "attention"])
def test_one_method_is_shown_and_all_can_be_chosen(tmp_path, first):
    clip = make_clip()
    e = make_explanation(clip, METHODS)
    parsed = Parsed(written(tmp_path, clip, e, method=first))
    order = [t.text.strip() for t in parsed.those("option")]
    assert {*order} == {*METHODS} and order[0] == (first or page.by_trust(e)[0])
    layers = [t for t in parsed.tags if "data-method" in t.all]
    assert {t.all["data-method"] for t in layers if "hidden" not in t.all} == {order[0]}
    per_method = pd.Series([t.all["data-method"] for t in layers]).value_counts()
    assert per_method.nunique() == 1 and len(per_method) == len(METHODS)


def test_each_method_says_how_far_it_may_be_trusted(tmp_path):
    text = html.unescape(written(tmp_path, make_clip()))
    for method in ("attention", "occlusion"): assert page.trust_line(method) in text


def test_the_peak_of_each_row_is_said_and_marked(tmp_path):
    clip = make_clip()
    e = make_explanation(clip)
    text = written(tmp_path, clip, e)
    for method, weights in e.maps.items():
        for what, values in (("sound", weights.sound), ("pictures", weights.frames)):
            peak = (values.argmax() + 0.5) / len(values)
            largest = f"Weight of the {what}: {method}, up to {values.max():.3f} "
            assert re.search(rf"{largest}[\w ]+, peak at {2 * peak:.2f} s<", text)
            assert f'class="peak" style="left:{100 * peak:.2f}%"' in text


def test_answer_and_shares_stand_in_tables_with_their_sign(tmp_path):
    parsed = Parsed(written(tmp_path, make_clip()))
    cells = [t.text for t in parsed.tags if t.tag in ("th", "td") and t.text]
    assert cells == ["grim", "0.70", "glad", "0.20", "<b>odd</b>", "0.10", "sound", "-0.40 nats", "pictures",
                     "1.50 nats"]
    assert [t.kind for t in parsed.those("span") if t.kind.startswith("bar")][-2:] == ["bar minus", "bar"]


def test_truth_is_marked_only_where_it_is_known(tmp_path):
    clip = make_clip()
    known = Parsed(written(tmp_path, clip, truth=TRUTH))
    edges = [t.all["style"] for t in known.those("div", **{"class": "edge"})]
    assert edges == ["left:25.00%", "left:50.00%"]
    boxes = [t.all["style"] for t in known.those("div", **{"class": "cue"})]
    assert boxes[0] == "left:25.00%;top:25.00%;width:50.00%;height:25.00%" and len(boxes) == 2
    unknown = Parsed(written(tmp_path, clip))
    assert not [t for t in unknown.tags if t.kind in ("edge", "cue")]


@pytest.mark.parametrize("sound, pictures", [(True, False), (False, True)])
def test_a_missing_modality_is_left_out(tmp_path, sound, pictures):
    clip = make_clip(sound=sound, pictures=pictures)
    parsed = Parsed(written(tmp_path, clip))
    samples = wavfile.read(decoded(parsed.those("audio")[0].all["src"]))[1]
    assert len(samples) == 32_000 and bool(np.abs(samples).max()) == sound  # silence keeps the time
    assert bool([t for t in parsed.those("img") if t.kind == "mel"]) == sound
    assert bool([t for t in parsed.tags if t.kind == "screen"]) == pictures
    assert not [t for t in parsed.tags if t.kind == "fusion"]


@few
@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_no_name_becomes_a_tag(tmp_path_factory, name):
    clip = make_clip(seconds=0.2, frames=1, sound=False, name=f"x{name}")
    parsed = Parsed(written(tmp_path_factory.mktemp("page"), clip))
    plain = Parsed(written(tmp_path_factory.mktemp("page"), make_clip(seconds=0.2, frames=1, sound=False)))
    assert [t.tag for t in parsed.tags] == [t.tag for t in plain.tags]


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    clip = make_clip()
    old = written(tmp_path, clip)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"): written(tmp_path, make_clip(seconds=1.0))
    assert (tmp_path / "page.html").read_text() == old and len([*tmp_path.iterdir()]) == 1


# In a notebook


class Shown:
    "Stands in for IPython's display: what was shown, and what each place shows now."
    def __init__(self):
        self.objects = []

    def __call__(self, thing, display_id=False):
        self.objects.append(thing)
        place = len(self.objects) - 1
        return SimpleNamespace(update=lambda thing: self.objects.__setitem__(place, thing))


@pytest.fixture
def shown(monkeypatch):
    monkeypatch.setattr(page, "display", Shown())
    return page.display


def test_the_controls_choose_clip_method_layer_and_head(shown, monkeypatch):
    clips = {name: make_clip(name=name) for name in "ab"}
    asked = []
    def explain(model, processor, clip):
        asked.append(clip)
        return make_explanation(clip)
    monkeypatch.setattr(page, "explain", explain)
    monkeypatch.setattr(page, "plot_explanation", lambda *drawn: drawn)
    page.explore_clips(None, None, clips, {"b": TRUTH})
    assert shown.objects[0][1:] == (clips["a"], None, "occlusion")  # a picture stands where no widget runs
    clip, method, layer, head = shown.objects[1].children
    clip.value = "b"
    method.value = "attention"
    layer.value = 1
    head.value = 2
    e, *others = shown.objects[0]
    assert others == [clips["b"], TRUTH, "attention"] and len(asked) == 2
    assert np.array_equal(e.fusion, make_explanation(clips["b"]).fusion[1:2, 2:3])
    layer.value = "all"
    assert shown.objects[0][0].fusion.shape == (2, 1, 16, 16)


def test_the_window_is_covered_heard_and_judged(shown, monkeypatch):
    clip = make_clip()
    monkeypatch.setattr(page, "log_probabilities", lambda *_: np.log([[0.1, 0.8, 0.1], [0.5, 0.4, 0.1]]))
    model = SimpleNamespace(config=SimpleNamespace(emotions=EMOTIONS))
    page.explore_cover(model, None, clip)
    window, kind = shown.objects[2].children
    window.value = (0.5, 1.0)
    figure, sound, _ = shown.objects
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["Sound from 0.50 to 1.00 s covered", "grim: -0.69 nats"]
    heard = wavfile.read(io.BytesIO(sound.data))[1] / 32767
    apart = np.abs(heard - clip.audio) > 0.01
    assert apart[8000:16_000].mean() > 0.5 and not apart[:7000].any() and not apart[17_000:].any()
    kind.value = kind.options[-1]
    assert shown.objects[1].data != sound.data


# In a browser

MISSING = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
LOOK = """
const main = getComputedStyle(document.querySelector("main"));
return {now: Number(main.getPropertyValue("--now")), alt: document.getElementById("picture").alt,
        clock: document.getElementById("clock").textContent, wide: document.documentElement.scrollWidth,
        shown: [...document.querySelectorAll("[data-method]:not([hidden])")].map(e => e.dataset.method),
        loaded: performance.getEntriesByType("resource").filter(r => !r.name.startsWith("data:")).length};"""
CHOOSE = """
const choice = document.getElementById("method");
choice.value = "attention";
choice.dispatchEvent(new Event("change"));"""
QUIET = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
         "mute-audio", "disable-background-networking", "disable-component-update")


class Browser:
    "Chromium, driven through chromedriver's own interface, which is HTTP (W3C WebDriver)."
    def __init__(self, address, width):
        screen = {"deviceMetrics": {"width": width, "height": 900, "pixelRatio": 1}}
        options = {"args": QUIET, "mobileEmulation": screen}
        self.address = f"{address}/session"
        wanted = {"alwaysMatch": {"goog:chromeOptions": options}}
        self.address += f"/{self.post('', capabilities=wanted)['sessionId']}"

    def post(self, path, **body):
        answer = requests.post(f"{self.address}{path}", json=body, timeout=30).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer

    def run(self, script): return self.post("/execute/sync", script=script, args=[])

    def press(self, key, wait=0.2):
        strokes = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self.post("/actions", actions=[{"type": "key", "id": "keys", "actions": strokes}])
        time.sleep(wait)
        return self.run(LOOK)


@pytest.fixture(scope="module")
def driver():
    if MISSING: pytest.skip(f"no {', '.join(MISSING)} here: Debian has them as chromium and chromium-driver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    for _ in range(100):
        with contextlib.suppress(requests.ConnectionError):
            if requests.get(f"{address}/status", timeout=5).ok: break
        time.sleep(0.1)
    yield address
    process.terminate()
    process.wait()


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_plays_in_a_browser(tmp_path, driver, width):
    written(tmp_path, make_clip(), truth=TRUTH)
    browser = Browser(driver, width)
    try:
        browser.post("/url", url=(tmp_path / "page.html").as_uri())
        left, right, space = "\ue012", "\ue014", " "
        assert browser.press(right)["now"] == pytest.approx(1 / 16, abs=0.01)
        for _ in range(3): seen = browser.press(right)
        assert seen["alt"] == "picture 2 of 6, at 0.50 seconds" and seen["clock"] == "0.50 of 2.00 s"
        assert browser.press(left)["now"] == pytest.approx(3 / 16, abs=0.01)
        playing = browser.press(space, wait=0.4)
        assert playing["now"] > 3 / 16 + 0.02
        paused = browser.press(space)
        time.sleep(0.2)
        assert playing["now"] < browser.run(LOOK)["now"] == paused["now"] < 1
        assert {*paused["shown"]} == {"occlusion"}
        browser.run(CHOOSE)
        seen = browser.run(LOOK)
        assert {*seen["shown"]} == {"attention"} and seen["loaded"] == 0 and seen["wide"] <= width
    finally: requests.delete(browser.address, timeout=30)
