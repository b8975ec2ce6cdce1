"""The local page: what it shows and saves in a real browser, what the server refuses, and that its pictures are the library's."""

import base64
import http.client
import io
import ipaddress
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import PATIENCE, open_page
from PIL import Image

from sami_fast.cli import main
from sami_fast.config import load_config, to_yaml
from sami_fast.data import open_dataset
from sami_fast.errors import UserError
from sami_fast.explore.explorer import KEPT_IMAGES, MOST_BYTES, Cancelled, Explorer, Watch, picture
from sami_fast.latents import sampling
from sami_fast.latents.axes import Axes
from sami_fast.methods.baselines import BetaVAE
from sami_fast.methods.registry import load_model

MODEL = Path(__file__).with_name("disks_model")
STEPS = 14  # a preview has 12
HOSTILE = "<img src=x onerror=alert(1)>.png"
FIRST = 6  # the latent that the run's report says most of


def png_of(pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def bomb(side: int) -> bytes:
    """A small PNG that says it has side x side pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)

    size = side.to_bytes(4) * 2
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x02\0\0\0") + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def expect(locator):
    """What playwright waits for. It does not by `page.wait_for_function`, which evaluates strings in the page, as the page forbids."""
    from playwright.sync_api import expect

    expect.set_options(timeout=PATIENCE)
    return expect(locator)


PHOTO = png_of(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return load_model(MODEL)


@pytest.fixture(scope="module")
def disks():
    return open_dataset(load_config("disks").data, seed=0, split=1)


@pytest.fixture
def explorer(model, disks, tmp_path) -> Explorer:
    information = [0.001] * model.latent_size
    information[FIRST], information[3] = 4.0, 3.0
    return Explorer(model, "disks", tmp_path / "axes.npz", dataset=disks, information=information, steps=STEPS)


@contextmanager
def served(explorer: Explorer, host: str = "127.0.0.1"):
    """The real server in a thread; yields its address."""
    pytest.importorskip("uvicorn", reason="needs the extra explore: pip install 'sami-fast[explore]'")
    from sami_fast.explore.server import address_of, listen, server_of

    with listen(host, 0, another=False) as sock:
        server = server_of(explorer, host, sock)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            yield address_of(host, sock)
        finally:
            server.handle_exit(signal.SIGTERM, None)
            thread.join(30)
            assert not thread.is_alive()


def ask(address: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    try:
        connection.request("GET" if body is None else "POST", path, body, {"Origin": address} | headers)
        response = connection.getresponse()
        return response.status, response.read(), response.headers
    finally:
        connection.close()


def post(address: str, path: str, **fields) -> dict:
    status, body, _ = ask(address, path, json.dumps(fields).encode())
    assert status == 200, body
    return json.loads(body)


def watched() -> tuple[Watch, list[dict]]:
    events: list[dict] = []
    return Watch(events.append, lambda: False), events


def finished(events: list[dict]) -> list[str]:
    """The finished pictures; a preview came before them, and every stage was counted to its end."""
    assert [event["stage"] for event in events if "stage" in event] == ["coarse", "fine"]
    for stage, steps in (("coarse", 12), ("fine", STEPS)):
        assert [event for event in events if event.get("progress") == stage][-1] == {"progress": stage, "done": steps, "of": steps}
    return events[-1]["pictures"]


def levels(address: str) -> np.ndarray:
    """The pixels of a picture's address, 0 to 255."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))).astype(int)


# In a browser


def settled(page) -> None:
    """Nothing is drawn any more."""
    expect(page.locator("#status")).to_have_text(re.compile("^Done"))


def pixels_of(page, name: str) -> bytes:
    return page.evaluate("name => document.getElementById(name).src", name)


def no_sideways_scrolling(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_an_image_is_uploaded_and_edited(explorer, size, scheme):
    with served(explorer) as address, open_page(size, scheme) as (page, seen):
        page.goto(address)
        settled(page)
        assert page.inner_text("h1") == "disks"
        assert page.locator("#thumbnails button").count() == 24
        assert page.locator("#sliders .axis-name").evaluate_all("all => all.map(each => each.value)") == [f"z{FIRST}", "z3"]
        assert page.inner_text("#hidden-axes summary") == "6 that carry nothing"
        held_out = pixels_of(page, "original")
        assert pixels_of(page, "alone") != held_out

        page.set_input_files("#file", {"name": HOSTILE, "mimeType": "image/png", "buffer": PHOTO})
        expect(page.locator("#original")).not_to_have_attribute("src", held_out)
        assert page.inner_text("#note") == f"{HOSTILE}: 40 x 30 pixels, the central square, resized to 16 x 16, in grey"
        assert page.locator("#note img").count() == 0
        settled(page)

        before, slider = pixels_of(page, "edited"), page.locator("#sliders input[type=range]").first
        slider.focus()
        for _ in range(3):
            page.keyboard.press("PageUp")  # an eighth or so of the way, as the browser has it
        expect(page.locator("#edited")).not_to_have_attribute("src", before)
        settled(page)
        assert re.fullmatch(r"\W?\d+\.\d\d → \W?\d+\.\d\d", page.locator(".moved output").inner_text())
        edited = pixels_of(page, "edited")
        assert edited != before
        with page.expect_download() as saved:
            page.click("#save-plain")
        assert Image.open(saved.value.path()).size == (16, 16)
        with page.expect_download() as saved:
            page.click("#save-sheet")
        assert Image.open(saved.value.path()).size[0] > 3 * 192
        page.click("#reset")
        expect(page.locator("#edited")).not_to_have_attribute("src", edited)
        settled(page)
        assert pixels_of(page, "edited") == before

        page.check("input[name=noise][value=new]", force=True)
        expect(page.locator("#edited-caption")).to_have_text("From new noise")
        settled(page)
        assert no_sideways_scrolling(page)
        assert page.locator("#alert").is_hidden()
        assert seen.console == []
        assert all(request.startswith(f"{address}/") for request in seen.requests), seen.requests


def test_hostile_files_are_refused_in_a_sentence(explorer):
    cases = [
        ("words.png", b"not an image", "words.png: not an image that can be read"),
        (HOSTILE, bomb(60_000), f"{HOSTILE}: more than 64 million pixels; make the image smaller"),
        ("large.png", bomb(8_001), "large.png: more than 64 million pixels; make the image smaller"),
        ("cut.png", PHOTO[:200], "cut.png: not an image that can be read (image file is truncated"),
        ("empty.png", b"", "empty.png: not an image: zero bytes"),
        ("document.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "document.eps: not an image that can be read"),
    ]
    with served(explorer) as address, open_page() as (page, seen):
        page.goto(address)
        settled(page)
        for name, content, sentence in cases:
            page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": content})
            expect(page.locator("#alert")).to_have_text(re.compile("^" + re.escape(sentence)))
        page.evaluate("run.most_bytes = 2 ** 20")
        page.set_input_files("#file", {"name": "heavy.png", "mimeType": "image/png", "buffer": bytes(2**21)})
        expect(page.locator("#alert")).to_have_text("heavy.png: 2 MiB, and images of at most 1 MiB are taken")
        assert page.locator("#alert img").count() == 0
        assert pixels_of(page, "original").startswith("data:image/png")
        page.evaluate("() => { image.image = 'gone'; redraw(); }")
        expect(page.locator("#alert")).to_have_text("that image is not kept any more; choose it again")
        assert page.locator("#status").text_content() == "\u00a0"  # not "Done"
        page.locator("#thumbnails button").nth(1).click()  # and the page goes on
        expect(page.locator("#alert")).to_be_hidden()
        assert seen.console == []


def test_axes_are_named_and_two_images_joined(explorer):
    with served(explorer) as address, open_page("phone", "light") as (page, seen):
        page.goto(address)
        settled(page)
        page.locator("#sliders .axis-name").first.fill("left <b>or</b> right")
        page.click("#save-axes")
        expect(page.locator("#axes-note")).to_have_text(re.compile("^Saved"))
        axes = Axes.load(explorer.axes_file)
        assert axes.names == ("left <b>or</b> right", "z3")
        assert np.array_equal(axes.directions, np.eye(8)[[FIRST, 3]])
        assert page.locator("#sets label").all_inner_texts() == ["Latents", "axes.npz"]

        page.click("#first")
        page.locator("#thumbnails button").nth(5).click()
        expect(page.locator("#note")).to_have_text(re.compile("^#5, which training never saw$"))
        page.click("#second")
        page.click("#draw-between")
        page.wait_for_selector("#way img >> nth=8")
        settled(page)
        assert page.locator("#way figcaption").all_inner_texts()[::4] == ["A", "50 %", "B"]
        assert len({*page.locator("#way img").evaluate_all("all => all.map(each => each.src)")}) == 9
        assert no_sideways_scrolling(page)
        assert seen.console == []


# As a server


def test_who_may_ask(explorer):
    with served(explorer) as address:
        status, page, headers = ask(address, "/")
        assert status == 200
        assert b"explore.js" in page
        assert "script-src 'self'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        port = address.rpartition(":")[2]
        for host in ("stranger.example", f"stranger.example:{port}", "127.0.0.1.stranger.example", "0.0.0.0"):
            assert ask(address, "/api/run", Host=host)[0] == 400, host
        for host in (f"localhost:{port}", f"LocalHost:{port}", f"127.0.0.1:{port}"):
            assert ask(address, "/api/run", Host=host)[0] == 200, host
        for origin in ("http://stranger.example", "null", "", f"https://127.0.0.1:{port}", "http://127.0.0.1:1"):
            assert ask(address, "/api/held-out", b'{"number": 0}', Origin=origin)[0] == 403, origin
        assert len(post(address, "/api/held-out", number=0)["posterior"]["latents"]["mean"]) == 8


def test_who_may_ask_over_ipv6(explorer):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with served(explorer, "::1") as address:
        port = address.rpartition(":")[2]
        assert address == f"http://[::1]:{port}"
        assert ask(address, "/api/run")[0] == 200
        assert ask(address, "/api/run", Host=f"[::2]:{port}")[0] == 400


def test_few_uploads_at_a_time(explorer):
    pytest.importorskip("uvicorn", reason="needs the extra explore: pip install 'sami-fast[explore]'")
    from sami_fast.explore.app import MOST_UPLOADS

    with served(explorer) as address:
        where = address.removeprefix("http://")
        slow = [http.client.HTTPConnection(where) for _ in range(MOST_UPLOADS)]
        for connection in slow:  # they send one byte of ten
            connection.putrequest("POST", "/api/upload")
            connection.putheader("Origin", address)
            connection.putheader("Content-Length", "10")
            connection.endheaders(b"x")
        assert ask(address, "/api/run")[0] == 200
        another = http.client.HTTPConnection(where, timeout=1)
        another.request("POST", "/api/upload", PHOTO, {"Origin": address})
        with pytest.raises(TimeoutError):
            another.getresponse()
        for connection in (another, *slow):
            connection.close()
        assert ask(address, "/api/upload", PHOTO)[0] == 200


def test_what_may_be_asked(explorer):
    with served(explorer) as address:
        held_out = post(address, "/api/held-out", number=3)
        assert ask(address, "/held-out/3.png")[1].startswith(b"\x89PNG")
        for path in ("/held-out/24.png", "/../pyproject.toml", "/page/index.html", "/api/images/../run", "/%2e%2e/axes.npz"):
            assert ask(address, path)[0] == 404, path
        assert ask(address, "/api/edit")[0] == 405
        for body in (b"", b"[]", b"{", b'{"number": "0"}', b'{"number": -1}', b"[" * 9999):
            assert ask(address, "/api/held-out", body)[0] == 400, body
        assert ask(address, "/api/upload", b"", **{"Content-Length": str(MOST_BYTES + 1)})[0] == 413
        long = (b" " * 1000 for _ in range(100))  # in chunks, without a length
        assert ask(address, "/api/edit", long)[0] == 413
        assert post(address, "/api/held-out", number=24) == {"error": "held-out image: expected 0 to 23, found 24"}
        cases = {
            "that image is not kept any more; choose it again": {"image": "../../etc/passwd", "axes": "latents", "values": {}},
            "no such axes; reload the page": {"image": held_out["image"], "axes": ["latents"], "values": {}},
            "expected axes 0 to 7": {"image": held_out["image"], "axes": "latents", "values": {"8": 1}},
            "expected values up to 1e+06": {"image": held_out["image"], "axes": "latents", "values": {"0": 1e9}},
        }
        for sentence, fields in cases.items():
            assert post(address, "/api/edit", **fields) == {"error": sentence}


def test_a_closed_connection_ends_the_work(explorer):
    explorer.steps = 20_000  # minutes, if nobody ended it
    with served(explorer) as address:
        image = post(address, "/api/held-out", number=0)["image"]
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
        connection.request("POST", "/api/edit", json.dumps({"image": image, "axes": "latents", "values": {}}), {"Origin": address})
        response = connection.getresponse()
        assert json.loads(response.readline()) == {"progress": "invert", "done": 0, "of": 20_000}
        response.close()
        connection.close()
        assert post(address, "/api/held-out", number=1)["note"] == "#1, which training never saw"
        assert explorer.seconds == {}


def test_where_it_listens():
    pytest.importorskip("uvicorn", reason="needs the extra explore: pip install 'sami-fast[explore]'")
    from sami_fast.explore.server import listen, names_of

    with listen("127.0.0.1", 0, another=False) as first:
        port = first.getsockname()[1]
        with listen("127.0.0.1", port, another=True) as second:
            assert second.getsockname()[1] != port
        with pytest.raises(UserError, match=rf"^cannot listen at 127.0.0.1 port {port} \(Address already in use\); choose another --port"):
            listen("127.0.0.1", port, another=False)
        assert names_of("127.0.0.1", first) == ["127.0.0.1", "localhost"]
    with pytest.raises(UserError, match=r"^cannot listen at no\.such\.host\.invalid"):
        listen("no.such.host.invalid", 0, another=False)
    with listen("0.0.0.0", 0, another=False) as everywhere:
        names = names_of("0.0.0.0", everywhere)
        assert {"127.0.0.1", "localhost", socket.gethostname()} <= {*names}
        for name in names:  # addresses of the network, not of its hardware
            assert ":" not in name or ipaddress.ip_address(name.strip("[]"))


def test_the_command(tmp_path):
    """As a process: the address on the first line, and an end by Ctrl-C without a word."""
    run = tmp_path / "disks"
    shutil.copytree(MODEL, run / "model")
    (run / "config.yaml").write_text(to_yaml(load_config("disks", [f"runs_dir={tmp_path}", "name=disks"])))
    (run / "report").mkdir()
    (run / "report/metrics.json").write_text(json.dumps({"information_per_dim": [0, 0, 0, 2.5, 0, 0, 4.0, 0]}))
    command = [sys.executable, "-m", "sami_fast.cli", "explore", str(run), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            found = re.fullmatch(r"(http://127\.0\.0\.1:\d+)   \(Ctrl-C ends it\)\n", line)
            assert found, line + process.stderr.read()
            facts = json.loads(ask(found[1], "/api/run")[1])
            assert (facts["name"], facts["missing"], facts["axes_file"]) == ("disks", "", str(run / "axes.npz"))
            latents = facts["sets"]["latents"]
            assert latents["order"] == [6, 3]
            assert latents["axes"][6]["note"] == "4.0 nats"
            process.send_signal(signal.SIGINT)
            assert process.wait(120) == 0
            assert process.stdout.read() + process.stderr.read() == ""
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["{folder}/none"], "no folder {folder}/none; expected a run folder or a saved model"),
        ([str(MODEL), "--axes", "{folder}/none/axes.npz"], "--axes: no folder {folder}/none"),
        ([str(MODEL), "--axes", "{folder}/mine.npz", "--port", "0"], "{folder}/mine.npz: not a file of axes (File is not a zip file)"),
    ],
)
def test_what_cannot_be_explored(tmp_path, capsys, options, sentence):
    pytest.importorskip("uvicorn", reason="needs the extra explore: pip install 'sami-fast[explore]'")
    (tmp_path / "mine.npz").write_text("mine")
    assert main(["explore", *(option.format(folder=tmp_path) for option in options)]) == 2
    assert capsys.readouterr().err == f"sami-fast: {sentence.format(folder=tmp_path)}\n"


def test_a_missing_extra_is_one_sentence(monkeypatch, capsys):
    for name in ("server", "app"):
        monkeypatch.delitem(sys.modules, f"sami_fast.explore.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["explore", str(MODEL)]) == 2
    assert capsys.readouterr().err == "sami-fast: explore needs uvicorn: `pip install 'sami-fast[explore]'`\n"


# As Python


def test_pictures_are_those_of_the_library(explorer, model, disks):
    x_0 = disks.images(torch.arange(24))
    a, b = (explorer.held_out(number)["image"] for number in (2, 9))
    a_0, b_0 = x_0[2:3], x_0[9:10]
    mu = sampling.encode(model, a_0).mu

    watch, events = watched()
    explorer.edit(a, "latents", {str(FIRST): mu[0, FIRST].item() + 1}, watch)
    expected = sampling.edit(model, a_0, FIRST, [1.0], num_steps=STEPS)[0]
    assert finished(events) == [picture(expected)]
    assert events[-1]["read"][FIRST] == pytest.approx(sampling.encode(model, expected).mu[0, FIRST].item(), abs=1e-4)
    assert events[-1]["pictures"] != next(event for event in events if event.get("stage") == "coarse")["pictures"]

    watch, events = watched()
    explorer.edit(a, "latents", {"3": 1.5}, watch, seed=4)
    assert finished(events) == [picture(sampling.traverse(model, a_0, 3, [1.5], seed=4, num_steps=STEPS))]

    watch, events = watched()
    explorer.reconstruct(a, watch)
    assert finished(events) == [picture(sampling.reconstruct(model, a_0, seed=0, num_steps=STEPS))]

    watch, events = watched()
    explorer.between(a, b, 3, watch)
    expected = sampling.interpolate(model, a_0, b_0, 3, num_steps=STEPS)
    for found, image in zip(finished(events), expected, strict=True):  # both ends were inverted together there, which rounds otherwise
        assert np.abs(levels(found) - levels(picture(image[None]))).max() <= 2
    assert [event["progress"] for event in events if event.get("done") == 0].count("invert") == 1  # that of `a` was known


def test_an_upload_is_fitted_as_the_data_are(explorer, tmp_path):
    """To the bit as a folder of photos is."""
    from sami_fast.data import ImageFolder

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(PHOTO)
    folder = ImageFolder(str(tmp_path / "photos"), image_size=16, channels=1, holdout=0.0, cache_dir=str(tmp_path / "cache"))
    assert explorer.upload(PHOTO)["picture"] == picture(folder.images(torch.tensor([0])))
    assert Explorer(explorer.model, "photos", tmp_path / "axes.npz", dataset=folder, steps=STEPS).facts()["held_out"] == ["a.png"]
    first = explorer.held_out(0)["image"]
    for _ in range(KEPT_IMAGES):
        explorer.held_out(1)
    with pytest.raises(UserError, match="not kept any more"):
        explorer.image_facts(first)


def test_whoever_goes_away_ends_the_work(explorer, model):
    image, events = explorer.held_out(0)["image"], []

    def gone() -> bool:
        return any(event.get("progress") == "coarse" for event in events)

    with pytest.raises(Cancelled):
        explorer.edit(image, "latents", {}, Watch(events.append, gone))
    assert not any("pictures" in event for event in events)
    assert not model.denoiser._forward_pre_hooks
    watch, events = watched()
    explorer.edit(image, "latents", {}, watch)
    assert len(finished(events)) == 1


def test_axes_are_found_and_saved(explorer, monkeypatch):
    monkeypatch.setattr("sami_fast.explore.explorer.FOUND", {"images": 12, "draws": 2, "steps": 4})
    watch, events = watched()
    explorer.find_axes(watch)
    assert list(events[-1]["sets"]) == ["latents", "scale", "pca", "gradient", "ica"]
    names = ["fi\udcff\x1brst", " ", "x" * 99]
    with pytest.raises(UserError, match=r"^two axes are called same; give each a name of its own$"):
        explorer.save_axes("pca", ["same", "other", " same\x1b"], False)
    assert not explorer.axes_file.exists()
    assert explorer.save_axes("pca", names, False)["saved"] == str(explorer.axes_file)
    saved = Axes.load(explorer.axes_file)
    assert saved.names == ("first", "pca 1", "x" * 60)
    assert explorer.save_axes("file", ["one", "two", "three"], False)["saved"]  # the same axes by other names
    assert explorer.save_axes("latents", [f"z{axis}" for axis in range(8)], False) == {
        "confirm": f"{explorer.axes_file} holds other axes: one, two, three"
    }
    assert Axes.load(explorer.axes_file).names == ("one", "two", "three")
    assert explorer.save_axes("latents", [f"z{axis}" for axis in range(8)], True)["saved"]
    assert Axes.load(explorer.axes_file).names == (f"z{FIRST}", "z3")
    explorer.axes_file.write_text("mine")
    for replaces in (False, True):
        with pytest.raises(UserError, match="not a file of axes"):
            explorer.save_axes("pca", names, replaces)
    assert explorer.axes_file.read_text() == "mine"


def test_a_model_that_decodes(tmp_path):
    networks = {"encoder": {"image_channels": 3, "image_size": 8, "latent_size": 4, "channels": [8, 8]}}
    networks["decoder"] = networks["encoder"]
    vae = BetaVAE.build(networks, {"kind": "cosine", "logsnr_min": -7.0, "logsnr_max": 5.0}).eval()
    explorer = Explorer(vae, "vae", tmp_path / "axes.npz", missing="no config.yaml", steps=STEPS)
    facts = explorer.facts()
    assert (facts["inverts"], facts["finds"], facts["held_out"], facts["steps"]["coarse"]) == (False, False, [], 0)
    image = explorer.upload(PHOTO)["image"]
    watch, events = watched()
    with pytest.raises(UserError, match="has no noise to invert"):
        explorer.edit(image, "latents", {}, watch)
    explorer.edit(image, "latents", {"0": 2.0}, watch, seed=0)
    assert [event["stage"] for event in events if "stage" in event] == ["fine"]
    assert events[-1]["pictures"][0].startswith("data:image/png;base64,")
