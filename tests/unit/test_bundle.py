"""A bundle is whole, unchanged and stays inside its folder, or it is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenprune import bundle
from greenprune.errors import BundleError, StorageError
from greenprune_targets import x86

REPLAY = "samples/replay_inputs.npy"


def edit_manifest(path: Path, change: Any) -> None:
    place = path / bundle.MANIFEST
    content = json.loads(place.read_text())
    change(content)
    place.write_text(json.dumps(content))


def replace_file(path: Path, name: str, content: bytes) -> None:
    """Swap a file and its checksum, as a hostile maker of bundles would."""
    (path / name).write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    edit_manifest(path, lambda manifest: manifest["files"].update({name: entry}))


def test_a_bundle_comes_back_as_it_was_written(tiny_bundle: Path) -> None:
    opened = bundle.open_bundle(tiny_bundle)
    opened.verify()
    assert opened.manifest.variants["mild"].graph == "graphs/mild.onnx"
    inputs = opened.read_array(REPLAY)
    assert (inputs.shape, inputs.dtype) == ((64, 1, 16, 16), np.float32)
    on_disk = {
        path.relative_to(tiny_bundle).as_posix()
        for path in tiny_bundle.rglob("*")
        if path.is_file()
    }
    assert on_disk == {bundle.MANIFEST, *opened.manifest.files}
    for name, entry in opened.manifest.files.items():
        content = (tiny_bundle / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry.bytes, entry.sha256)
        assert opened.file(name) == tiny_bundle / name


@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_flipped_bit_is_found(
    tiny_bundle_source: Path, position: float, bit: int, data: st.DataObject
) -> None:
    opened = bundle.open_bundle(tiny_bundle_source)
    name = data.draw(st.sampled_from(sorted(opened.manifest.files)))
    path = tiny_bundle_source / name
    good = path.read_bytes()
    bad = bytearray(good)
    bad[int(position * len(bad))] ^= 1 << bit
    try:
        path.write_bytes(bytes(bad))
        with pytest.raises(BundleError, match=r"expected SHA-256 .* found .*copy the bundle again"):
            opened.file(name)
        with pytest.raises(BundleError):
            opened.verify()
    finally:
        path.write_bytes(good)


def test_a_truncated_and_a_missing_file_are_named(tiny_bundle: Path) -> None:
    opened = bundle.open_bundle(tiny_bundle)
    path = tiny_bundle / REPLAY
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=rf"{REPLAY}: expected {size} bytes, found {size - 1}"):
        opened.read_array(REPLAY)
    path.unlink()
    with pytest.raises(BundleError, match=rf"{REPLAY}: the file is missing"):
        opened.read_array(REPLAY)


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../secret", "a/../../secret", "a/./b", "", ".", "..", "a//b", "a\\b", "C:x",
     "a\0b"],
)  # fmt: skip
def test_unsafe_paths_are_refused_even_when_listed(tiny_bundle: Path, name: str) -> None:
    entry = {"sha256": "0" * 64, "bytes": 0}
    edit_manifest(tiny_bundle, lambda manifest: manifest["files"].update({name: entry}))
    opened = bundle.open_bundle(tiny_bundle)
    with pytest.raises(BundleError, match="unsafe path"):
        opened.file(name)
    with pytest.raises(BundleError, match="unsafe path"):
        opened.read_array(name)
    with pytest.raises(BundleError):
        bundle.write(tiny_bundle.parent / "new", opened.manifest, {name: b""})
    assert not (tiny_bundle.parent / "new").exists()


def test_a_link_out_of_the_bundle_is_refused(tiny_bundle: Path) -> None:
    outside = tiny_bundle.parent / "outside.npy"
    (tiny_bundle / REPLAY).rename(outside)
    (tiny_bundle / REPLAY).symlink_to(outside)
    with pytest.raises(BundleError, match="link that leaves the bundle"):
        bundle.open_bundle(tiny_bundle).read_array(REPLAY)


def test_files_that_are_not_listed_are_refused(tiny_bundle: Path) -> None:
    (tiny_bundle / "extra.npy").write_bytes(b"")
    with pytest.raises(BundleError, match=r"'extra\.npy' is not listed"):
        bundle.open_bundle(tiny_bundle).file("extra.npy")


def test_an_artifact_is_checked_with_all_its_files(tiny_bundle: Path) -> None:
    xml = b"<net/>"
    replace_file(tiny_bundle, "artifacts/onnxruntime/pair.xml", xml)
    replace_file(tiny_bundle, "artifacts/onnxruntime/pair.bin", b"weights")
    opened = bundle.open_bundle(tiny_bundle)
    assert opened.file("artifacts/onnxruntime/pair.xml").read_bytes() == xml
    (tiny_bundle / "artifacts/onnxruntime/pair.bin").write_bytes(b"WEIGHTS")
    with pytest.raises(BundleError, match=r"pair\.bin: expected SHA-256"):
        opened.file("artifacts/onnxruntime/pair.xml")


@pytest.mark.parametrize("companion", ["pair.bin", "pair.xml.data"])
def test_a_companion_that_nobody_listed_is_refused(tiny_bundle: Path, companion: str) -> None:
    replace_file(tiny_bundle, "artifacts/onnxruntime/pair.xml", b"<net/>")
    (tiny_bundle / "artifacts/onnxruntime" / companion).write_bytes(b"smuggled")
    with pytest.raises(BundleError, match=f"{companion}' is not listed"):
        bundle.open_bundle(tiny_bundle).file("artifacts/onnxruntime/pair.xml")


def test_nothing_is_unpickled(tiny_bundle: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "exploded"),))

    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([Bomb()], dtype=object), allow_pickle=True)
    replace_file(tiny_bundle, REPLAY, objects.read_bytes())
    with pytest.raises(BundleError, match="plain numbers"):
        bundle.open_bundle(tiny_bundle).read_array(REPLAY)
    assert not (tmp_path / "exploded").exists()
    manifest = bundle.open_bundle(tiny_bundle).manifest
    with pytest.raises(BundleError, match="plain numbers"):
        bundle.write(tmp_path / "new", manifest, {"a.npy": np.array([None])})


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04 an archive"])
def test_what_is_no_array_is_refused(tiny_bundle: Path, content: bytes) -> None:
    replace_file(tiny_bundle, REPLAY, content)
    with pytest.raises(BundleError, match=r"replay_inputs\.npy"):
        bundle.open_bundle(tiny_bundle).read_array(REPLAY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema=1), "expected schema version 2, found 1"),
        (lambda m: m.pop("schema"), "expected schema version 2, found None"),
        (lambda m: m.update(surprise=1), "unknown key 'surprise'"),
        (lambda m: m.pop("selector"), "selector"),
        (lambda m: m.update(name=3), "key 'name'"),
        (lambda m: m["files"].pop(REPLAY), f"names '{REPLAY}'"),
        (lambda m: m["variants"].pop("mild"), "missing: mild"),
        (lambda m: m["preprocessing"].update(mean=[0.1, 0.2]), "expected 1 entries"),
        (lambda m: m["files"][REPLAY].update(bytes="12"), "bytes"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    tiny_bundle: Path, change: Any, message: str
) -> None:
    edit_manifest(tiny_bundle, change)
    with pytest.raises(BundleError, match=message):
        bundle.open_bundle(tiny_bundle)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": NaN}', "[" * 100_000])
def test_a_manifest_that_is_no_manifest_is_refused(tiny_bundle: Path, text: str) -> None:
    (tiny_bundle / bundle.MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        bundle.open_bundle(tiny_bundle)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="greenprune-export"):
        bundle.open_bundle(tmp_path)


def test_a_missing_artifact_names_those_there(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="'tensorrt'; this bundle has: onnxruntime"):
        bundle.open_bundle(tiny_bundle).artifact("mild", "tensorrt")


def test_the_networks_have_one_hash_whatever_else_changes(tiny_bundle: Path) -> None:
    before = bundle.open_bundle(tiny_bundle).networks_sha256
    bundle.update_manifest(tiny_bundle, {"energy_mj": {}, "created": "2026-01-02"})
    assert bundle.open_bundle(tiny_bundle).networks_sha256 == before
    found: set[str] = set()
    for name in ("samples/", "graphs/", "artifacts/"):
        files = dict(bundle.open_bundle(tiny_bundle).manifest.files)
        changed = next(file for file in files if file.startswith(name))
        files[changed] = dataclasses.replace(files[changed], sha256="0" * 64)
        opened = bundle.open_bundle(tiny_bundle)
        manifest = dataclasses.replace(opened.manifest, files=files)
        found.add(dataclasses.replace(opened, manifest=manifest).networks_sha256)
    assert len(found) == 3
    assert before in found, "samples are no networks"


def test_update_changes_the_manifest_alone_and_whole(tiny_bundle: Path) -> None:
    before = bundle.open_bundle(tiny_bundle).manifest
    selector = dataclasses.replace(before.selector, threshold=None)
    energy = {"mild": {"value": 1.5, "low": 1.0, "high": 2.0, "provenance": "estimated_model"}}
    bundle.update_manifest(tiny_bundle, {"selector": selector, "energy_mj": energy})
    opened = bundle.open_bundle(tiny_bundle)
    assert opened.manifest == dataclasses.replace(before, selector=selector, energy_mj=energy)
    opened.verify()
    text = (tiny_bundle / bundle.MANIFEST).read_bytes()
    for bad in ({"nmae": "x"}, {"name": 1}, {"samples": {"reference_input": "nowhere.npy"}}):
        with pytest.raises(BundleError):
            bundle.update_manifest(tiny_bundle, bad)
    assert (tiny_bundle / bundle.MANIFEST).read_bytes() == text


def test_writing_is_whole_or_not_at_all(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = bundle.open_bundle(tiny_bundle).manifest
    files: dict[str, Any] = {name: tiny_bundle / name for name in manifest.files}
    again = bundle.write(tmp_path / "again", manifest, files)
    assert again == manifest
    files.pop(REPLAY)
    with pytest.raises(BundleError, match=REPLAY):
        bundle.write(tmp_path / "again", manifest, files)
    bundle.open_bundle(tmp_path / "again").verify()  # the old one is still there
    with pytest.raises(BundleError, match="no file"):
        bundle.write(tmp_path / "new", manifest, {"a": tmp_path / "nowhere"})
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    with pytest.raises(StorageError):
        bundle.write(blocked / "new", manifest, {})
    assert {path.name for path in tmp_path.iterdir()} == {"again", "file", "tiny.bundle"}


@pytest.mark.parametrize(
    ("isa", "told"), [(["avx2", "avx512_vnni"], "VNNI"), (["avx2", "avx512f"], "no VNNI")]
)
def test_a_certificate_of_int8_holds_for_the_processor_s_arithmetic(
    monkeypatch: pytest.MonkeyPatch, isa: list[str], told: str
) -> None:
    monkeypatch.setattr("greenprune_targets.x86.processor", lambda: {"isa": isa})
    monkeypatch.setattr(x86, "_has_vnni", x86._has_vnni.__wrapped__)
    assert bundle.setting("x86", "onnxruntime-int8") == f"x86, onnxruntime, int8, {told}"
    assert bundle.setting("x86", "onnxruntime") == "x86, onnxruntime, fp32"
    assert bundle.setting("arm", "onnxruntime-int8") == "arm, onnxruntime, int8"
