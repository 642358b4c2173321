"""The same training on two processes: the same losses, the same network, and it survives a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

torch = pytest.importorskip("torch", reason="training needs the extra 'host'")

from torch import Tensor, nn  # noqa: E402

from greenprune import data, models, training  # noqa: E402
from greenprune.pipeline import Job, Stage, Work, execute  # noqa: E402
from greenprune.recipe import (  # noqa: E402
    BenchSettings,
    DataSettings,
    Recipe,
    TrainingSettings,
)

SETTINGS = TrainingSettings(epochs=2, batch_size=50, learning_rate=0.005, warmup_epochs=0.5)
LIMIT_SECONDS = 240


def digits() -> data.Data:
    """The embedded images with random shifts; 1,047 for training do not fill batches of 50."""
    return data.load(DataSettings(augmentation="shift"), seed=0)


class ShardedNorm(nn.BatchNorm2d):
    """BatchNorm as two processes see it: each half of a batch by itself; the first is recorded."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        normed = torch.empty_like(x)
        normed[0::2] = super().forward(x[0::2])
        weight, bias = self.weight, self.bias
        normed[1::2] = nn.functional.batch_norm(
            x[1::2], None, None, weight, bias, training=True, eps=self.eps
        )
        return normed


def plain() -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = models.build("greenprune.models:lenet5", {})
    return network


def normed(norm: type[nn.BatchNorm2d] = nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    network = models.build("greenprune.models:lenet5", {})
    network.conv1 = nn.Sequential(network.conv1, norm(16))
    network.conv2 = nn.Sequential(network.conv2, norm(32))
    return network  # type: ignore[no-any-return]


def fitted(network: nn.Module) -> tuple[list[float], dict[str, Tensor]]:
    history = training.fit(network, digits(), SETTINGS, seed=0)
    return list(history.loss), network.state_dict()


def measured(folder: Path) -> None:
    """A stage in which the second process works for a second and the first waits for it."""

    def work(_: Work) -> dict[str, Any]:
        begun, done = folder / "begun", folder / "done"
        if os.environ["RANK"] == "0":
            begun.touch()
            while not done.exists():
                time.sleep(0.02)
        else:
            while not begun.exists():
                time.sleep(0.02)
            start = time.process_time()
            while time.process_time() < start + 1:
                pass
            done.touch()
        return {}

    settings = Recipe(bench=BenchSettings(meter="estimate"))
    execute(Job(settings, folder / "run"), [Stage("train", work, trains=True)])


def main(folder: Path) -> None:
    """What each of the two processes does."""
    measured(folder)
    for name, build in (("plain", plain), ("normed", normed)):
        losses, state = fitted(build())
        torch.save({"losses": losses, "state": state}, folder / f"{name}-{os.environ['RANK']}.pt")


def torchrun(*command: str | Path) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*start, *map(str, command)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    done = subprocess.run(
        torchrun(__file__, folder),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("name", "alone"), [("plain", plain), ("normed", lambda: normed(ShardedNorm))]
)
def test_two_processes_have_the_losses_and_the_weights_of_one(
    together: Path, name: str, alone: Any
) -> None:
    """With BatchNorm: of one that takes each half's statistics by itself."""
    losses, state = fitted(alone())

    found = [torch.load(together / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]

    # rounding grows from step to step: the first epoch shows that it is the same computation
    assert found[0]["losses"][0] == pytest.approx(losses[0], rel=1e-5)
    assert found[0]["losses"] == pytest.approx(losses, rel=1e-3)
    assert found[1]["losses"] == found[0]["losses"]
    for key, value in state.items():
        torch.testing.assert_close(found[0]["state"][key], value, rtol=1e-2, atol=1e-3)
        assert torch.equal(found[0]["state"][key], found[1]["state"][key]), key


def test_the_estimate_counts_all_processes_on_this_machine(together: Path) -> None:
    stage = json.loads((together / "run" / "train" / "stage.json").read_text())

    assert stage["energy"]["low"] >= 4.0 * 0.9
    assert "torchrun" in stage["energy"]["scope"]
    assert "energy_gap" not in stage


def test_a_batchnorm_over_the_whole_batch_would_be_noticed() -> None:
    """The comparison above can tell the two apart."""
    whole, sharded = fitted(normed())[0], fitted(normed(ShardedNorm))[0]

    assert whole[0] != pytest.approx(sharded[0], rel=5e-5)


def test_a_run_whose_worker_is_killed_goes_on_from_its_last_epoch(tmp_path: Path) -> None:
    command = shutil.which("greenprune", path=sysconfig.get_path("scripts"))
    assert command is not None
    line = torchrun("--no-python", command, "prune", "--json", "--runs", tmp_path, "--name", "both")
    for override in (
        "threads=1",
        "train.epochs=12",
        "sparsify.epochs=1",
        "finetune.mild.epochs=1",
        "finetune.aggressive.epochs=1",
    ):
        line += ["--set", override]

    first = subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    checkpoints = tmp_path / "both" / "checkpoints"
    limit = time.monotonic() + LIMIT_SECONDS
    while not list(checkpoints.glob("train-*.safetensors")):
        assert first.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
    # the second worker is the one that does not write
    workers = psutil.Process(first.pid).children()
    second = next(w for w in workers if w.environ().get("RANK") == "1")
    second.send_signal(signal.SIGKILL)
    assert first.wait(timeout=LIMIT_SECONDS) != 0
    assert not (tmp_path / "both" / "train").exists()

    again = subprocess.run(
        line, capture_output=True, text=True, timeout=LIMIT_SECONDS, env=environment(), check=False
    )

    assert again.returncode == 0, again.stderr
    answer = json.loads(again.stdout)
    assert answer["variants"]["dense"]["accuracy"] > 0.9
    stage = json.loads((tmp_path / "both" / "train" / "stage.json").read_text())
    assert stage["resumed"] is True


if __name__ == "__main__":
    main(Path(sys.argv[1]))
