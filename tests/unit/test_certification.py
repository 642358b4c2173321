"""The certificate that is made where a bundle runs, from the images that it carries."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from greenprune import bundle, certification, cli
from greenprune.bundle import CertificationPlan, DialRow
from greenprune.errors import BundleError, TargetError
from greenprune.runtime import AdaptiveSession, Policy
from greenprune.runtime.policy import ROUTES
from greenprune_calibration import certify

PLAN = CertificationPlan(
    thresholds=(0.9, 0.5),
    max_accuracy_loss=(0.02, 0.1),
    operating_loss=0.1,
    reference="mild",
    delta=0.05,
    seed=3,
)


def test_the_dial_is_the_certificate_of_these_answers_against_the_named_reference() -> None:
    generator = np.random.default_rng(0)
    scores = generator.random(1000).astype(np.float32)
    right = {name: (generator.random(1000) < 0.9).astype(float) for name in ("dense", "mild")}
    right["aggressive"] = np.where(scores > 0.4, right["mild"], 0.0)

    answers = np.zeros((1000, 2))
    moved = answers.copy()
    moved[scores < 0.6, 1] = 1.0
    logits = {"aggressive": moved, "mild": answers, "dense": answers}

    table = certification.make_dial(scores, logits, right, PLAN)

    expected = certify(
        scores.astype(float), right["aggressive"], right["mild"], right["mild"],
        (0.9, 0.5), (0.02, 0.1), delta=0.05, seed=3,
    )  # fmt: skip
    shared = [{key: vars(row)[key] for key in vars(expected[0])} for row in table]
    assert shared == [vars(row) for row in expected]
    assert table[1].disagreement == pytest.approx((scores[scores >= 0.5] < 0.6).mean())
    assert certification.operating_row(table, PLAN).max_accuracy_loss == 0.1
    assert table[1].threshold == 0.5
    told = certification.promise(table[1], "mild", 0.6)
    assert told == (
        "at most 10.0 points below the mild network with 95% confidence (n = 1,000): accepts 60%"
    )


def uncertified(path: Path) -> Path:
    """As a bundle arrives on its device."""
    manifest = bundle.open_bundle(path).manifest
    rows = tuple(replace(row, certified=False) for row in manifest.selector.table)
    record = replace(manifest.selector, threshold=None, certified_on="", table=rows)
    bundle.update_manifest(path, {"selector": record})
    return path


def test_a_bundle_is_certified_where_it_runs_and_routes_to_mild_until_then(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uncertified(tiny_bundle)
    images = bundle.open_bundle(tiny_bundle).read_array("samples/certification_inputs.npy")
    with AdaptiveSession(tiny_bundle) as session:
        feeds = {"input": session.preprocess(images[0])}
        _, info = session.run_with_info(None, feeds)
    assert info.routes == ("mild",)
    assert info.certified == (False,)

    done = CliRunner().invoke(cli.bench, [str(tiny_bundle), "--certify", "--json"])

    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    record = bundle.open_bundle(tiny_bundle).manifest.selector
    assert record.certified_on == "x86, onnxruntime, fp32"
    assert told["selector"]["table"] == [vars(row) for row in record.table]
    assert record.table == expected_dial(tiny_bundle)
    operating = record.table[1]
    assert record.threshold == operating.threshold
    assert told["headline"] == certification.promise(operating, "dense", operating.coverage)
    assert operating.certified
    with AdaptiveSession(tiny_bundle) as session:
        _, info = session.run_with_info(None, feeds)
    assert info.certified == (True,)


def expected_dial(path: Path) -> tuple[DialRow, ...]:
    """By each network alone, image by image, through sessions of their own."""
    opened = bundle.open_bundle(path)
    plan = opened.manifest.certification
    assert plan.inputs
    assert plan.targets
    images, targets = opened.read_array(plan.inputs), opened.read_array(plan.targets)
    right: dict[str, Any] = {}
    answers: dict[str, Any] = {}
    for route in ROUTES:
        with AdaptiveSession(path, policy=Policy(route=route)) as session:
            logits = [
                session.run(None, {"input": session.preprocess(image)})[0] for image in images
            ]
        answers[route] = np.concatenate(logits)
        right[route] = (answers[route].argmax(axis=1) == targets).astype(float)
    with AdaptiveSession(
        path, policy=Policy(threshold=-1.0, allow_uncertified=True), drift=None
    ) as session:
        scores = [
            session.run_with_info(None, {"input": session.preprocess(image)})[1].scores
            for image in images
        ]
    return certification.make_dial(np.concatenate(scores), answers, right, plan)


def test_a_certificate_holds_on_the_device_alone(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    before = (tiny_bundle / bundle.MANIFEST).read_bytes()

    with pytest.raises(TargetError, match=r"x86_64 or AMD64 alone, and this machine is riscv64"):
        certification.certify_bundle(tiny_bundle)

    assert (tiny_bundle / bundle.MANIFEST).read_bytes() == before


def test_a_bundle_without_images_says_where_it_was_certified(tiny_bundle: Path) -> None:
    plan = bundle.open_bundle(tiny_bundle).manifest.certification
    bundle.update_manifest(tiny_bundle, {"certification": replace(plan, inputs=None)})

    with pytest.raises(BundleError, match=r"no certification images.*x86, onnxruntime, fp32"):
        certification.certify_bundle(tiny_bundle)


def test_damaged_images_are_refused_and_nothing_is_certified(tiny_bundle: Path) -> None:
    path = tiny_bundle / "samples/certification_inputs.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    with pytest.raises(BundleError, match="SHA-256"):
        certification.certify_bundle(tiny_bundle)
