"""Which Jetson this is: module, L4T and JetPack, CUDA, power mode; read from files alone.

Written from public descriptions of these files and tested on trees made after them; it has not
run on NVIDIA hardware.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from greenprune.errors import TargetError

BOARDS = {
    "agx orin": "agx-orin",
    "orin nx": "orin-nx",
    "orin nano": "orin-nano",
    "thor": "thor",
}
"""What the device tree's model contains, and our name for the board."""

OLD_BOARDS = ("xavier", "tx2", "tx1", "jetson nano", "jetson-agx")
OLDEST_L4T = (36, 4)


@dataclass(frozen=True, kw_only=True)
class JetPack:
    """What a release carries; None where no public document told us."""

    version: str
    tensorrt: str | None
    cuda: str | None
    python: str


JETPACKS = {
    "36.3.0": JetPack(version="6.0", tensorrt="8.6.2", cuda="12.2", python="3.10"),
    "36.4.0": JetPack(version="6.1", tensorrt="10.3", cuda="12.6", python="3.10"),
    "36.4.3": JetPack(version="6.2", tensorrt="10.3", cuda="12.6", python="3.10"),
    "36.4.4": JetPack(version="6.2.1", tensorrt="10.3", cuda="12.6", python="3.10"),
    "36.4.7": JetPack(version="6.2.1", tensorrt="10.3", cuda="12.6", python="3.10"),
    "36.5.0": JetPack(version="6.2.2", tensorrt=None, cuda=None, python="3.10"),
    "38.2.0": JetPack(version="7.0", tensorrt=None, cuda="13.0", python="3.12"),
    "38.2.1": JetPack(version="7.0", tensorrt=None, cuda="13.0", python="3.12"),
    "38.4.0": JetPack(version="7.1", tensorrt="10.13.3", cuda="13.0", python="3.12"),
    "39.2.0": JetPack(version="7.2", tensorrt="10.16.2", cuda="13.2", python="3.12"),
    "39.2.1": JetPack(version="7.2.1", tensorrt="10.16.2", cuda="13.2", python="3.12"),
}
"""By L4T release (``etc/nv_tegra_release``). A release that is not here is not guessed at."""


@dataclass(frozen=True, kw_only=True)
class Board:
    """A machine as its files describe it; None where they do not tell."""

    model: str | None
    """The device tree's model, for example ``NVIDIA Jetson AGX Orin Developer Kit``."""
    name: str | None
    """One of ``orin-nano``, ``orin-nx``, ``agx-orin``, ``thor``; None for anything else."""
    l4t: str | None
    """Jetson Linux release, for example ``36.4.3``; None on what is no Jetson."""
    jetpack: JetPack | None
    cuda: str | None
    """Version of the toolkit under ``usr/local/cuda``."""
    power_mode: str | None
    """nvpmodel's, by its name, else ``mode <number>``."""

    @property
    def is_jetson(self) -> bool:
        """Whether Jetson Linux runs here."""
        return self.l4t is not None

    @property
    def supported(self) -> bool:
        """Whether :func:`check_board` accepts it."""
        return _objection(self) is None


def describe(root: Path = Path("/")) -> Board:
    """The machine whose file system is ``root``; a PC gives None in every field but ``cuda``."""
    model = _read(root / "proc/device-tree/model")
    l4t = _l4t(_read(root / "etc/nv_tegra_release"))
    lower = (model or "").lower()
    return Board(
        model=model,
        name=next((name for part, name in BOARDS.items() if part in lower), None),
        l4t=l4t,
        jetpack=JETPACKS.get(l4t or ""),
        cuda=_cuda(_read(root / "usr/local/cuda/version.json")),
        power_mode=_power_mode(
            _read(root / "var/lib/nvpmodel/status"), _read(root / "etc/nvpmodel.conf")
        ),
    )


def check_board(board: Board, expected: str | None = None) -> None:
    """Raises TargetError: not a Jetson of today, or another one than ``expected``."""
    reason = _objection(board)
    if reason is None and expected is not None and board.name != expected:
        reason = (
            f"a bundle for {expected} was given, and this is {board.name} ({board.model}); "
            f"export it again with --target jetson-{board.name}"
        )
    if reason is not None:
        raise TargetError(f"expected a Jetson Orin or Thor with JetPack 6.1 or later; {reason}")


def _objection(board: Board) -> str | None:
    """Why greenprune does not run on ``board``; None where it does."""
    lower = (board.model or "").lower()
    found = f"{board.model or 'no device-tree model'}, L4T {board.l4t or 'absent'}"
    if board.name is None and any(old in lower for old in OLD_BOARDS):
        return (
            f"found {found}: Xavier and older stop at JetPack 5 (TensorRT 8.5, Python 3.8), which "
            "is out of scope; use a Jetson Orin or Thor"
        )
    if board.l4t is None:
        return f"found {found}: this is no Jetson; use --target cuda or x86 on a PC"
    if _numbers(board.l4t)[:2] < OLDEST_L4T:
        return (
            f"found {found}, whose TensorRT is older than 10.3; "
            "install JetPack 6.1 or later on the board"
        )
    if board.name is None:
        return f"found {found}; supported are {', '.join(sorted(BOARDS.values()))}"
    return None


def _l4t(release: str | None) -> str | None:
    """``36.4.3`` of ``# R36 (release), REVISION: 4.3, GCID: ...``."""
    found = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*(\d+(?:\.\d+)*)", release or "")
    if found is None:
        return None
    parts = [found[1], *found[2].split(".")]
    return ".".join(parts + ["0"] * (3 - len(parts)))


def _cuda(text: str | None) -> str | None:
    try:
        return str(json.loads(text or "")["cuda"]["version"])
    except (ValueError, KeyError, TypeError):
        return None


def _power_mode(status: str | None, configuration: str | None) -> str | None:
    """nvpmodel keeps ``pmode:0002`` as its state, and the names in its configuration."""
    current = re.search(r"pmode:\s*(\d+)", status or "")
    if current is None:
        return None
    for entry in re.findall(r"<\s*POWER_MODEL\s+([^>]*)>", configuration or ""):
        fields = dict(re.findall(r"(\w+)=(\S+)", entry))
        if fields.get("ID", "").isdigit() and int(fields["ID"]) == int(current[1]):
            return str(fields.get("NAME", f"mode {int(current[1])}"))
    return f"mode {int(current[1])}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _read(path: Path) -> str | None:
    """The text of ``path`` without the NUL bytes that end device-tree strings."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").replace("\0", "").strip()
    except OSError:
        return None
