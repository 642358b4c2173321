"""Classify every image of a folder with a greenprune bundle.

    python classify_folder.py digits.bundle images/

One line an image: file, class, the network that answered, the selector's score. Images are brought
to the bundle's size and channels with Pillow.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greenprune.errors import DataError, GreenpruneError
from greenprune.runtime import AdaptiveSession

SUFFIXES = {".png", ".jpg", ".jpeg"}


def main() -> int:
    """Exit status 0: all images classified; 1: some could not be read; 2: nothing to do it with."""
    parser = argparse.ArgumentParser(description="Classify every image of a folder.")
    parser.add_argument("bundle", type=Path, help="folder that greenprune-export wrote")
    parser.add_argument("images", type=Path, help="folder of PNG and JPEG files")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    try:
        from PIL import Image
    except ImportError:
        print("Pillow is needed to read images; run: pip install pillow", file=sys.stderr)
        return 2
    try:
        return classify(options.bundle, options.images, options.json, Image)
    except GreenpruneError as error:
        print(error, file=sys.stderr)
        return 2


def classify(bundle: Path, images: Path, as_json: bool, pillow: Any) -> int:
    """Print a line for each image and the summary; returns the exit status.

    Raises:
        GreenpruneError: there are no images, or the bundle cannot be used with them.
    """
    paths = sorted(path for path in images.glob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(f"{images}: expected a folder of PNG or JPEG files; found none")
    unreadable, start = 0, time.perf_counter()
    with AdaptiveSession(bundle) as session:
        entry = session.get_inputs()[0]
        for path in paths:
            try:
                pixels = read_image(path, entry.shape, pillow)
            except Exception as error:  # Pillow raises many kinds for damaged files
                print(f"{path.name}: not readable: {error}", file=sys.stderr)
                unreadable += 1
                continue
            (logits,), info = session.run_with_info(None, {entry.name: session.preprocess(pixels)})
            score = float(info.scores[0])
            answer = {
                "file": path.name,
                "label": session.class_names[int(np.argmax(logits[0]))],
                "route": info.routes[0],
                "score": None if math.isnan(score) else round(score, 4),
            }
            print(json.dumps(answer) if as_json else "\t".join(map(str, answer.values())))
    summary = {
        "images": len(paths) - unreadable,
        "unreadable": unreadable,
        "routes": session.statistics.routes,
        "seconds": round(time.perf_counter() - start, 3),
    }
    if as_json:
        print(json.dumps({"summary": summary}))
    else:
        routes = ", ".join(f"{route} {count}" for route, count in summary["routes"].items())
        print(f"{summary['images']} images in {summary['seconds']} s ({routes})", file=sys.stderr)
    return 1 if unreadable else 0


def read_image(path: Path, shape: list[int | str], pillow: Any) -> NDArray[np.uint8]:
    """The image at the bundle's size and channels."""
    _, channels, height, width = shape
    with pillow.open(path) as opened:
        image = opened.convert("L" if channels == 1 else "RGB")
    return np.asarray(image.resize((width, height), pillow.Resampling.BILINEAR))


if __name__ == "__main__":
    sys.exit(main())
