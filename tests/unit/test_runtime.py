"""The session's routing, its faults and its checks, on networks that the test controls."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenprune import bundle, registry
from greenprune.bundle import Preprocessing
from greenprune.errors import BundleError, DataError, GreenpruneError
from greenprune.runtime import AdaptiveSession, RunInfo, decide
from greenprune.runtime.preprocessing import preprocess

SHAPE = (1, 16, 16)


class FakeRunner:
    """Answers with the first pixel: logits [pixel, tag, 0, 0] and the second pixel as score."""

    def __init__(self, variant: str) -> None:
        self.tag = {"dense": 0.0, "mild": 1.0, "aggressive": 2.0}[variant]
        self.input_name = "input"
        self.output_names = ("logits", "score") if variant == "aggressive" else ("logits",)
        self.failure: Exception | None = None
        self.seen: list[int] = []
        self.closed = False

    def run(self, inputs: Any) -> dict[str, Any]:
        if self.failure is not None:
            raise self.failure
        self.seen.append(len(inputs))
        logits = np.zeros((len(inputs), 4), dtype=np.float32)
        logits[:, 0], logits[:, 1] = inputs[:, 0, 0, 0], self.tag
        outputs = {"logits": logits, "score": inputs[:, 0, 0, 1].copy()}
        return {name: outputs[name] for name in self.output_names}

    def close(self) -> None:
        self.closed = True


class FakeTarget:
    def __init__(self) -> None:
        self.runners: dict[str, FakeRunner] = {}

    def open(self, artifact: Path, runtime: str, threads: int) -> FakeRunner:
        return self.runners.setdefault(artifact.stem, FakeRunner(artifact.stem))


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeRunner]:
    """The runners by variant, filled as sessions open them."""
    target = FakeTarget()
    monkeypatch.setattr(registry, "load_target", lambda name: target)
    return target.runners


def batch(scores: Any, first: Any = None) -> Any:
    scores = np.asarray(scores, dtype=np.float32)
    inputs = np.zeros((len(scores), *SHAPE), dtype=np.float32)
    inputs[:, 0, 0, 0] = np.arange(len(scores)) if first is None else first
    inputs[:, 0, 0, 1] = scores
    return inputs


def ask(session: AdaptiveSession, inputs: Any) -> tuple[Any, RunInfo]:
    (logits,), info = session.run_with_info(["logits"], {"input": inputs})
    (again,) = session.run(None, {"input": inputs})
    np.testing.assert_array_equal(logits, again)
    return logits, info


@given(
    scores=st.lists(
        st.one_of(st.floats(0, 1, width=32), st.sampled_from([np.nan, np.inf, -np.inf, 0.5])),
        min_size=1,
        max_size=20,
    )
)
@settings(max_examples=80, deadline=None)
def test_every_sample_is_routed_on_its_own_and_answers_stay_in_order(
    tiny_bundle_source: Path, scores: list[float]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "load_target", lambda name: FakeTarget())
        session = AdaptiveSession(tiny_bundle_source, threshold=0.5)
    logits, info = ask(session, batch(scores))
    accepted = np.asarray(scores, dtype=np.float32) >= 0.5
    np.testing.assert_array_equal(logits[:, 0], np.arange(len(scores)))
    np.testing.assert_array_equal(logits[:, 1], np.where(accepted, 2.0, 1.0))
    assert info.routes == tuple("aggressive" if yes else "mild" for yes in accepted)
    np.testing.assert_array_equal(info.scores, np.float32(scores))
    assert [fault is not None for fault in info.faults] == np.isnan(scores).tolist()
    for index in range(len(scores)):  # alone as in company
        alone, told = ask(session, batch(scores[index : index + 1], first=index))
        np.testing.assert_array_equal(alone, logits[index : index + 1])
        assert told.routes == (info.routes[index],)


def test_mild_runs_on_the_escalated_alone(tiny_bundle: Path, fakes: Any) -> None:
    session = AdaptiveSession(tiny_bundle, threshold=0.5)
    session.run(None, {"input": batch([0.9, 0.1, 0.8, 0.2, 0.3])})
    session.run(None, {"input": batch([0.9, 0.5])})
    assert (fakes["aggressive"].seen, fakes["mild"].seen) == ([5, 2], [3])
    found = session.statistics
    assert (found.calls, found.faults) == (2, 0)
    assert found.routes == {"aggressive": 4, "mild": 3, "dense": 0}


def test_a_failing_aggressive_network_sends_all_to_mild(tiny_bundle: Path, fakes: Any) -> None:
    session = AdaptiveSession(tiny_bundle, threshold=0.5)
    fakes["aggressive"].failure = RuntimeError("out of luck")
    logits, info = ask(session, batch([0.9, 0.1]))
    np.testing.assert_array_equal(logits[:, 1], [1.0, 1.0])
    assert info.routes == ("mild", "mild")
    assert np.isnan(info.scores).all()
    assert info.faults == ("the aggressive network failed: out of luck",) * 2
    assert session.statistics.faults == 4


def test_scores_of_a_wrong_shape_are_a_fault(tiny_bundle: Path, fakes: Any) -> None:
    session = AdaptiveSession(tiny_bundle, threshold=0.5)
    whole = fakes["aggressive"].run
    fakes["aggressive"].run = lambda inputs: {
        name: value[:, None] for name, value in whole(inputs).items()
    }
    _, info = ask(session, batch([0.9]))
    assert info.routes == ("mild",)
    assert "shape [1, 1], not [1]" in str(info.faults[0])


def test_a_failing_mild_network_is_passed_on(tiny_bundle: Path, fakes: Any) -> None:
    session = AdaptiveSession(tiny_bundle, threshold=0.5)
    fakes["mild"].failure = RuntimeError("mild is broken")
    session.run(None, {"input": batch([0.9])})
    with pytest.raises(RuntimeError, match="mild is broken"):
        session.run(None, {"input": batch([0.9, 0.1])})


@pytest.mark.parametrize("route", ["mild", "aggressive", "dense"])
def test_a_forced_route_opens_and_runs_one_network(
    tiny_bundle: Path, fakes: Any, route: Any
) -> None:
    session = AdaptiveSession(tiny_bundle, route=route)
    _, info = ask(session, batch([0.1, np.nan]))
    assert set(fakes) == {route}
    assert info.routes == (route, route)
    assert np.isnan(info.scores).all()
    assert not info.certified
    assert session.statistics.routes[route] == 4


def test_a_threshold_of_none_is_mild_alone(tiny_bundle: Path, fakes: Any) -> None:
    session = AdaptiveSession(tiny_bundle, threshold=None)
    logits, info = ask(session, batch([1.0, np.inf]))
    assert set(fakes) == {"mild"}
    assert info.routes == ("mild", "mild")
    assert (logits[:, 1] == 1.0).all()


def test_certified_means_this_threshold_on_this_runtime(tiny_bundle: Path, fakes: Any) -> None:
    def certified(**options: Any) -> bool:
        return ask(AdaptiveSession(tiny_bundle, **options), batch([0.7]))[1].certified

    assert certified()
    assert certified(threshold=np.float32(0.5))
    assert not certified(threshold=0.49)
    assert not certified(threshold=None)
    manifest = bundle.open_bundle(tiny_bundle).manifest
    if "openvino" in manifest.variants["mild"].artifacts:
        assert not certified(runtime="openvino")


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "expected exactly the input 'input', got: nothing"),
        ({"x": batch([1])}, "'input', got: x"),
        ({"input": batch([1]), "x": batch([1])}, "got: input, x"),
        ({"input": batch([1]).astype(np.float64)}, "got float64"),
        ({"input": batch([1])[0]}, r"shape \['N', 1, 16, 16\].*got float32 of shape \[1, 16, 16\]"),
        ({"input": batch([1])[:, :, :8]}, r"\[1, 1, 8, 16\]"),
        ({"input": batch([])}, "N >= 1"),
        ({"input": [[1.0]]}, "got list"),
    ],
)
def test_feeds_are_checked(tiny_bundle: Path, fakes: Any, feeds: Any, message: str) -> None:
    session = AdaptiveSession(tiny_bundle)
    for call in (session.run, session.run_with_info):
        with pytest.raises(DataError, match=message):
            call(None, feeds)
        with pytest.raises(DataError, match="unknown output 'x'; expected some of: logits"):
            call(["x"], {"input": batch([1])})
    assert session.statistics.calls == 0


@pytest.mark.parametrize(
    "options",
    [{"route": "fast"}, {"threshold": float("nan")}, {"threshold": "0.5"}, {"runtime": "toaster"}],
)
def test_options_are_checked(tiny_bundle: Path, fakes: Any, options: Any) -> None:
    with pytest.raises(BundleError, match=r"fast|nan|0\.5|toaster"):
        AdaptiveSession(tiny_bundle, **options)


def test_networks_that_do_not_fit_the_manifest_are_refused(tiny_bundle: Path, fakes: Any) -> None:
    fakes["aggressive"] = FakeRunner("mild")
    with pytest.raises(BundleError, match="outputs logits, score, found 'input' and logits"):
        AdaptiveSession(tiny_bundle)
    assert fakes["aggressive"].closed


def test_a_closed_session_says_so(tiny_bundle: Path, fakes: Any) -> None:
    with AdaptiveSession(tiny_bundle) as session:
        session.warmup()
        assert session.statistics.calls == 0
    session.close()
    assert all(runner.closed for runner in fakes.values())
    for call in (session.warmup, lambda: session.run(None, {"input": batch([1])})):
        with pytest.raises(BundleError, match="closed"):
            call()


def test_threads_share_a_session(tiny_bundle: Path, fakes: Any) -> None:
    session = AdaptiveSession(tiny_bundle, threshold=0.5)
    gate = threading.Barrier(4)

    def work(worker: int) -> bool:
        scores = np.random.default_rng(worker).random(8)
        gate.wait()
        for _ in range(50):
            (logits,) = session.run(None, {"input": batch(scores, first=worker)})
            if not (
                (logits[:, 0] == worker) & (logits[:, 1] == np.where(scores >= 0.5, 2, 1))
            ).all():
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    found = session.statistics
    assert (found.calls, sum(found.routes.values())) == (200, 1600)


def test_it_looks_like_an_onnx_runtime_session(tiny_bundle: Path) -> None:
    import onnxruntime

    real = onnxruntime.InferenceSession(tiny_bundle / "graphs/mild.onnx")
    session = AdaptiveSession(tiny_bundle)
    for ours, theirs in (
        (session.get_inputs(), real.get_inputs()),
        (session.get_outputs(), real.get_outputs()),
    ):
        assert [(node.name, node.shape, node.type) for node in ours] == [
            (node.name, node.shape, node.type) for node in theirs
        ]


@given(st.lists(st.floats(width=32), max_size=30), st.one_of(st.none(), st.floats(0, 1)))
def test_decide_accepts_at_or_above_the_threshold(
    scores: list[float], threshold: float | None
) -> None:
    found = decide(np.asarray(scores, dtype=np.float32), threshold)
    assert found.dtype == np.bool_
    assert found.tolist() == [threshold is not None and score >= threshold for score in scores]


def settings_for(channels: Any) -> Preprocessing:
    return Preprocessing(
        channels=channels, size=(4, 6), mean=(0.2, 0.4, 0.6)[:channels], std=(0.5,) * channels
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_preprocessing_is_what_training_does(channels: int) -> None:
    torch = pytest.importorskip("torch")
    data = pytest.importorskip("greenprune.data")
    image = np.random.default_rng(0).integers(0, 256, (4, 6, channels), dtype=np.uint8)
    expected = data.normalise(
        torch.from_numpy(image.transpose(2, 0, 1)[None].copy()), settings_for(channels)
    )
    found = preprocess(image, settings_for(channels))
    np.testing.assert_array_equal(found, expected.numpy())
    assert found.flags.c_contiguous
    if channels == 1:
        np.testing.assert_array_equal(preprocess(image[:, :, 0], settings_for(1)), found)


@pytest.mark.parametrize(
    ("image", "channels"),
    [
        (np.zeros((4, 6), np.uint8), 3),
        (np.zeros((4, 6, 3), np.uint8), 1),
        (np.zeros((6, 4), np.uint8), 1),
        (np.zeros((4, 6), np.float32), 1),
        (np.zeros((1, 4, 6, 1), np.uint8), 1),
        ("image.png", 1),
    ],
)
def test_images_that_do_not_fit_are_refused(image: Any, channels: int) -> None:
    with pytest.raises(DataError, match=r"image: expected .*got"):
        preprocess(image, settings_for(channels))


def test_a_bundle_without_preprocessing_says_so(tiny_bundle: Path, fakes: Any) -> None:
    bundle.update_manifest(tiny_bundle, {"preprocessing": None})
    with pytest.raises(GreenpruneError, match="states no preprocessing"):
        AdaptiveSession(tiny_bundle).preprocess(np.zeros((16, 16), np.uint8))


def test_the_runtime_is_free_of_torch_and_of_what_it_does_not_need() -> None:
    code = (
        "import sys\n"
        "import greenprune.runtime, greenprune.runtime.runners, greenprune.bundle\n"
        "import greenprune_calibration, greenprune_targets.x86\n"
        "extra = {'torch', 'rich', 'click', 'pyJoules', 'openvino', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {extra}' if extra else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
