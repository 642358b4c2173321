"""The apps in ``deploy_examples``, each run as its own process, as a user would."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from greenprune import bundle

Draw = Callable[[int, int], tuple[Any, Any]]
EXAMPLES = Path(__file__).resolve().parents[2] / "deploy_examples"
cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")


def load(path: Path) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def watch(*arguments: Any) -> tuple[int, list[dict[str, Any]], str]:
    """Exit status, the objects printed, and stderr."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / "camera_loop.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def frames(images: Any) -> Any:
    """Colour frames wider than high, uint8 [N, 32, 48, 3], with each image in the middle."""
    wide = np.zeros((len(images), 32, 48, 3), dtype=np.uint8)
    wide[:, :, 8:40] = images.repeat(2, axis=1).repeat(2, axis=2)[..., None]
    return wide


def test_a_folder_of_frames(tiny_bundle: Path, draw_tiny: Draw, tmp_path: Path) -> None:
    images, targets = draw_tiny(12, 5)
    place = tmp_path / "frames"
    place.mkdir()
    for number, frame in enumerate(frames(images)):
        cv2.imwrite(str(place / f"{number:03}.png"), frame)
    (place / "005.png").write_bytes(b"no image")

    status, answers, errors = watch(tiny_bundle, place, "--fps", 20, "--deadline-ms", 1000)

    assert status == 1, errors
    summary = answers.pop()["summary"]
    numbers = [answer["frame"] for answer in answers]
    assert numbers == sorted(set(numbers)), "an answer came twice or out of turn"
    assert answers.pop(numbers.index(5)) == {"frame": 5, "error": "not readable"}
    names = bundle.open_bundle(tiny_bundle).manifest.class_names
    told = {answer["frame"]: answer["label"] for answer in answers}
    right = [told[frame] == names[targets[frame]] for frame in told]
    assert np.mean(right) >= 0.8, "the frames were cut or coloured wrongly"
    assert summary["answered"] == len(told)
    assert summary["frames"] == 12
    assert summary["answered"] + summary["dropped"] == 11
    assert (summary["failed"], summary["late"]) == (1, 0)
    assert sum(summary["routes"].values()) == summary["answered"]


def test_answers_are_printed_as_they_come_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frame 1 is not readable while frame 0 is in work, and frame 3 is dropped."""
    camera_loop = load(EXAMPLES / "camera_loop.py")
    lines: list[dict[str, Any]] = []
    printed, pending = threading.Semaphore(0), []

    def note(line: str, **_: Any) -> None:
        lines.append(json.loads(line))
        printed.release()

    def take(names: Any, feeds: Any, callback: Any, number: Any) -> bool:
        if not pending:
            pending.append(lambda: callback([np.zeros((1, 2))], number, None))
            return True
        return False

    def camera() -> Iterator[Any]:
        frame = np.zeros((4, 4, 3), np.uint8)
        yield frame
        yield None
        assert lines == []
        pending.pop()()
        assert printed.acquire(timeout=20), "frame 0 is not told before the stream ends"
        yield frame
        yield frame
        pending.pop()()

    session = SimpleNamespace(
        class_names=("yes", "no"),
        get_inputs=lambda: [SimpleNamespace(name="input", shape=["batch", 1, 4, 4])],
        preprocess=lambda image: image,
        run_async=take,
    )
    monkeypatch.setattr(camera_loop, "print", note, raising=False)

    assert camera_loop.watch(session, camera(), 1e6, cv2) == (4, 1)
    assert lines == [
        {"frame": 0, "label": "yes"},
        {"frame": 1, "error": "not readable"},
        {"frame": 2, "label": "yes"},
    ]


def test_a_video_faster_than_the_networks(
    tiny_bundle: Path, draw_tiny: Draw, tmp_path: Path
) -> None:
    """Frames at a rate that no camera has: what comes while one is in work is dropped."""
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 30, (48, 32))
    for frame in frames(draw_tiny(300, 5)[0]):
        writer.write(frame)
    writer.release()

    status, answers, errors = watch(tiny_bundle, path, "--fps", 1e6)

    assert status == 0, errors
    summary = answers.pop()["summary"]
    assert summary["frames"] == 300
    assert summary["answered"] == len(answers) >= 1
    assert summary["answered"] + summary["dropped"] == 300
    numbers = [answer["frame"] for answer in answers]
    assert numbers == sorted(set(numbers)), "an answer came twice or out of turn"


@pytest.mark.parametrize("app", ["camera_loop.py", "classify_folder.py"])
def test_a_bundle_without_preprocessing_is_one_message(
    app: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle.update_manifest(tiny_bundle, {"preprocessing": None})
    cv2.imwrite(str(tmp_path / "0.png"), np.zeros((16, 16), np.uint8))
    done = subprocess.run(
        [sys.executable, EXAMPLES / app, tiny_bundle, tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "states no preprocessing" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf", "fast"])
def test_a_rate_that_no_camera_has_is_refused(rate: str, tiny_bundle: Path, tmp_path: Path) -> None:
    status, answers, errors = watch(tiny_bundle, tmp_path, f"--fps={rate}")
    assert (status, answers) == (2, [])
    assert "--fps" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("what", ["empty folder", "no video", "no bundle"])
def test_nothing_to_watch_is_one_message(what: str, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.avi").write_text("no video")
    places = {
        "empty folder": (tiny_bundle, tmp_path / "empty", "PNG or JPEG"),
        "no video": (tiny_bundle, tmp_path / "text.avi", "video file that OpenCV reads"),
        "no bundle": (tmp_path / "empty", tmp_path / "empty", "expected a bundle"),
    }
    place, source, words = places[what]

    status, answers, errors = watch(place, source)

    assert (status, answers) == (2, [])
    assert words in errors
    assert "Traceback" not in errors


@pytest.fixture(scope="module")
def service(tiny_bundle_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running service."""
    log = tmp_path_factory.mktemp("service") / "log"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "service:app", "--port", str(port)],
        cwd=EXAMPLES / "http_service",
        env={**os.environ, "GREENPRUNE_BUNDLE": str(tiny_bundle_source)},
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert running.poll() is None, log.read_text()
            try:
                if httpx.get(f"{address}/healthz").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield address
    finally:
        running.terminate()
        running.wait(30)
    assert "Application shutdown complete" in log.read_text()
    assert "Traceback" not in log.read_text()


def encoded(image: Any, suffix: str = ".png") -> bytes:
    return bytes(cv2.imencode(suffix, image)[1])


def test_the_service_classifies_and_its_dial_turns(
    service: str, tiny_bundle_source: Path, draw_tiny: Draw
) -> None:
    images, targets = draw_tiny(20, 5)
    names = bundle.open_bundle(tiny_bundle_source).manifest.class_names
    with httpx.Client(base_url=service) as client:
        assert client.put("/policy", json={}).json()["policy"] == {}
        before = sum(client.get("/dial").json()["statistics"]["routes"].values())
        found = [client.post("/classify", content=encoded(image)).json() for image in images]
        right = [
            answer["label"] == names[target] for answer, target in zip(found, targets, strict=True)
        ]
        assert np.mean(right) >= 0.8
        assert {answer["route"] for answer in found} == {"aggressive", "mild"}
        assert all(answer["certified"] for answer in found)

        dial = client.get("/dial").json()
        assert [row["max_accuracy_loss"] for row in dial["rows"]] == [0.05]
        assert sum(dial["statistics"]["routes"].values()) == 20 + before

        turned = client.put("/policy", json={"route": "mild"}).json()
        assert turned["policy"] == {"route": "mild"}
        assert client.post("/classify", content=encoded(images[0])).json()["route"] == "mild"
        back = client.put("/policy", json={"max_accuracy_loss": 0.05}).json()
        assert back["policy"] == {"max_accuracy_loss": 0.05}
        assert back["threshold"] == 0.5


def text_bomb() -> bytes:
    """A small PNG with 5 MB of compressed text."""
    image = pytest.importorskip("PIL.Image")
    from PIL.PngImagePlugin import PngInfo

    text, file = PngInfo(), io.BytesIO()
    text.add_text("comment", "x" * (5 << 20), zip=True)
    image.new("L", (16, 16)).save(file, "PNG", pnginfo=text)
    return file.getvalue()


TEXT_BOMB = text_bomb()


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("POST", "/classify", b"no image", 415, "PNG or JPEG"),
        ("POST", "/classify", b"", 415, "PNG or JPEG"),
        ("POST", "/classify", b"0" * (9 << 20), 413, "at most 8388608 bytes"),
        ("POST", "/classify", TEXT_BOMB, 415, "PNG or JPEG"),
        ("PUT", "/policy", b"not json", 400, "max_accuracy_loss"),
        ("PUT", "/policy", b"[" * 900, 400, "max_accuracy_loss"),
        ("PUT", "/policy", b"[" * 200_000, 413, "at most 1024 bytes"),
        ("PUT", "/policy", b'{"max_accuracy_loss": 1' + b"0" * 400 + b"}", 409, "finite number"),
        ("GET", "/policy", b"", 405, "Method Not Allowed"),
        ("GET", "/nothing", b"", 404, "Not Found"),
        ("PUT", "/policy", b'{"threshold": 0.1}', 400, "max_accuracy_loss"),
        ("PUT", "/policy", b'{"max_accuracy_loss": 0.001}', 409, "5.00 points: certified"),
        ("PUT", "/policy", b'{"max_accuracy_loss": "much"}', 409, "finite number"),
        ("PUT", "/policy", b'{"route": "scenic"}', 409, "aggressive, mild, dense"),
    ],
)
def test_the_service_refuses_in_plain_words_and_goes_on(
    service: str, method: str, path: str, body: bytes, status: int, words: str
) -> None:
    before = httpx.get(service + "/dial").json()["policy"]
    reply = httpx.request(method, service + path, content=body)
    assert reply.status_code == status
    assert words in reply.json()["error"]
    assert httpx.get(service + "/dial").json()["policy"] == before


@pytest.mark.parametrize("error", [OSError("no more memory"), RuntimeError("out of luck")])
def test_a_network_that_fails_is_no_bad_image(
    error: Exception, tiny_bundle: Path, draw_tiny: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    testclient = pytest.importorskip("starlette.testclient")
    monkeypatch.setenv("GREENPRUNE_BUNDLE", str(tiny_bundle))
    service = load(EXAMPLES / "http_service" / "service.py")

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    with testclient.TestClient(service.app, raise_server_exceptions=False) as client:
        monkeypatch.setattr(service.app.state.session, "run_with_info", fail)
        reply = client.post("/classify", content=encoded(draw_tiny(1, 5)[0][0]))
    assert reply.status_code == 500
    assert reply.json() == {"error": "the service failed; its log says why"}


def test_the_page_turns_the_dial_in_a_browser(
    service: str, draw_tiny: Draw, tmp_path: Path
) -> None:
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    picture = tmp_path / "picture.png"
    picture.write_bytes(encoded(draw_tiny(1, 5)[0][0]))
    complaints: list[str] = []
    requests: list[str] = []
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 390, "height": 844})
        opened.on("console", lambda message: complaints.append(message.text))
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.on("request", lambda request: requests.append(request.url))
        opened.goto(service)
        opened.get_by_text("at most 5.0 points of accuracy").wait_for()
        assert opened.locator("input:checked").count() == 1

        opened.get_by_text("No trade").click()
        opened.get_by_text("Turned.").wait_for()
        assert httpx.get(service + "/dial").json()["policy"] == {"route": "mild"}
        opened.get_by_label("image to classify").set_input_files(picture)
        opened.get_by_text("by the mild network").wait_for()

        opened.get_by_text("at most 5.0 points of accuracy").click()
        opened.wait_for_function(
            "document.querySelector('input:checked').value.includes('max_accuracy_loss')"
        )
        assert httpx.get(service + "/dial").json()["policy"] == {"max_accuracy_loss": 0.05}
        wide = opened.evaluate("document.documentElement.scrollWidth")
        assert wide <= 390, "the page is wider than a phone"
        browser.close()
    assert complaints == []
    assert {url.split("/")[2] for url in requests if not url.startswith("data:")} == {
        service.removeprefix("http://")
    }


def test_the_container_file_copies_what_is_there() -> None:
    place = EXAMPLES / "http_service"
    lines = (place / "Containerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    assert copied
    assert all((place / name).is_file() for name in copied)
