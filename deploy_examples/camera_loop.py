"""A camera that never waits: the newest frame is classified, what comes meanwhile is dropped.

    python camera_loop.py digits.bundle frames/ --fps 30 --deadline-ms 30
    python camera_loop.py digits.bundle clip.avi

Frames come from a folder of PNG and JPEG files, in the order of their names, or from a video file,
at ``--fps`` as a camera would give them. One JSON object a line: the frame and its answer, as they
come and in the order of the frames; the last line is the summary. Where the deadline leaves no time
for the mild network, the aggressive one's answer is given and counted as ``degraded``; a frame that
arrives while the last one is still in work is dropped.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greenprune.errors import DataError, GreenpruneError
from greenprune.runtime import AdaptiveSession

SUFFIXES = {".png", ".jpg", ".jpeg"}
Frame = NDArray[np.uint8]
Answer = dict[str, Any]


def main() -> int:
    """Exit status 0: every frame was taken or dropped; 1: some failed; 2: nothing to do."""
    parser = argparse.ArgumentParser(description="Classify frames as a camera gives them.")
    parser.add_argument("bundle", type=Path, help="folder that greenprune-export wrote")
    parser.add_argument("frames", type=Path, help="folder of images, or a video file")
    parser.add_argument("--fps", type=rate, default=30.0, help="frames a second; default 30")
    parser.add_argument("--deadline-ms", type=float, help="of each answer, from its frame on")
    options = parser.parse_args()
    try:
        import cv2
    except ImportError:
        print("OpenCV is needed: pip install opencv-python-headless", file=sys.stderr)
        return 2
    try:
        # one frame in work, none waiting: the next answer is always about a new frame
        session = AdaptiveSession(options.bundle, deadline_ms=options.deadline_ms, max_pending=1)
        with session:
            frames = read_frames(options.frames, cv2)
            session.warmup()
            seen, failed = watch(session, frames, options.fps, cv2)
    except GreenpruneError as error:
        print(error, file=sys.stderr)
        return 2

    told = session.statistics
    summary = {
        "frames": seen,
        "answered": told.calls,
        "failed": failed,
        "dropped": told.dropped,
        "late": told.late,
        "degraded": told.degraded,
        "routes": told.routes,
        "latency_p50_ms": told.latency_p50_ms,
        "latency_p99_ms": told.latency_p99_ms,
        "energy_mj": told.energy_mj,
        "energy_provenance": told.energy_provenance,
    }
    print(json.dumps({"summary": summary}))
    return 1 if failed else 0


def rate(text: str) -> float:
    """Frames a second.

    Raises:
        ValueError: no camera has it; argparse says so.
    """
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def read_frames(place: Path, cv2: Any) -> Iterator[Frame | None]:
    """Frames, uint8 [H, W, 3], blue first, as OpenCV has them; None for one that is not readable.

    Raises:
        DataError: there are none.
    """
    if place.is_dir():
        paths = sorted(path for path in place.iterdir() if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise DataError(f"{place}: expected a folder of PNG or JPEG files; found none")
        return (cv2.imread(str(path), cv2.IMREAD_COLOR) for path in paths)
    video = cv2.VideoCapture(str(place))
    if not place.is_file() or not video.isOpened():
        raise DataError(f"{place}: expected a folder of images or a video file that OpenCV reads")
    return _read_video(video)


def _read_video(video: Any) -> Iterator[Frame]:
    try:
        while True:
            found, frame = video.read()
            if not found:
                return
            yield frame
    finally:
        video.release()


def watch(
    session: AdaptiveSession, frames: Iterator[Frame | None], fps: float, cv2: Any
) -> tuple[int, int]:
    """Hand every frame over at its time and print the answers; returns how many frames came and
    how many failed."""
    answers: SimpleQueue[Future[Answer] | None] = SimpleQueue()
    entry, seen = session.get_inputs()[0], 0

    def deliver(outputs: list[NDArray[Any]] | None, place: Any, error: Any) -> None:
        number, answer = place
        if outputs is None:
            answer.set_result({"frame": number, "error": str(error)})
            return
        label = session.class_names[int(np.argmax(outputs[0][0]))]
        answer.set_result({"frame": number, "label": label})

    with ThreadPoolExecutor(1) as printer:
        failed = printer.submit(tell, answers)
        begin = time.perf_counter()
        try:
            for number, frame in enumerate(frames):
                time.sleep(max(0.0, begin + number / fps - time.perf_counter()))
                seen += 1
                answer: Future[Answer] = Future()
                if frame is None:
                    answer.set_result({"frame": number, "error": "not readable"})
                else:
                    inputs = session.preprocess(fit(frame, entry.shape, cv2))
                    place = (number, answer)
                    if not session.run_async(None, {entry.name: inputs}, deliver, place):
                        continue  # dropped
                answers.put(answer)
        finally:
            answers.put(None)
    return seen, failed.result()


def tell(answers: SimpleQueue[Future[Answer] | None]) -> int:
    """Print each answer once it is there, up to None; returns how many are errors."""
    failed = 0
    while (pending := answers.get()) is not None:
        answer = pending.result()
        failed += "error" in answer
        print(json.dumps(answer), flush=True)
    return failed


def fit(frame: Frame, shape: list[int | str], cv2: Any) -> Frame:
    """The middle square of the frame, at the bundle's size and channels."""
    _, channels, height, width = shape
    side = min(frame.shape[:2])
    top, left = ((size - side) // 2 for size in frame.shape[:2])
    square = frame[top : top + side, left : left + side]
    colours = cv2.COLOR_BGR2GRAY if channels == 1 else cv2.COLOR_BGR2RGB
    converted = cv2.cvtColor(square, colours)
    resized: Frame = cv2.resize(converted, (width, height), interpolation=cv2.INTER_AREA)
    return resized


if __name__ == "__main__":
    sys.exit(main())
