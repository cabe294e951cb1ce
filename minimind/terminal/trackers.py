"""The history on trackers beside the CSV files, for those who set MINIMIND_TRACKER.

Whether one sends anything is set as its own documentation says: WANDB_MODE=offline,
SWANLAB_MODE=offline, TRACKIO_SPACE_ID. TensorBoard's files stay here.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from minimind.compute.settings import RuntimeSettings
from minimind.errors import UserError
from minimind.params import Section


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run."""

    id: str  # the same for a run that is resumed, which then goes on there, too
    stage: str
    project: str
    folder: Path
    config: dict[str, Any]


class Tracker(Protocol):
    """A run on a tracker."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Wandb:
    """Weights & Biases; offline runs are in wandb/."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=run.project,
            id=run.id,
            name=run.stage,
            resume="allow",
            dir=str(run.folder),
            config=run.config,
            settings=wandb.Settings(silent=True),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Event files, for `tensorboard --logdir runs/tensorboard`."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run.folder / "runs" / "tensorboard" / run.id)
        self._writer.add_text("config", f"```json\n{json.dumps(run.config, indent=1)}\n```")

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class SwanLab:
    """SwanLab; offline runs are in swanlog/."""

    def __init__(self, run: TrackedRun) -> None:
        import swanlab

        self._run = swanlab.init(
            project=run.project,
            id=run.id,
            name=run.stage,
            resume="allow",
            log_dir=str(run.folder / "swanlog"),
            config=run.config,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Trackio, where it keeps all projects (TRACKIO_DIR), for `trackio show`."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self._run = trackio.init(
            project=run.project,
            name=run.id,
            group=run.stage,
            resume="allow",
            config=run.config,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: Mapping[str, Callable[[TrackedRun], Tracker]] = {
    "wandb": Wandb,
    "tensorboard": TensorBoard,
    "swanlab": SwanLab,
    "trackio": Trackio,
}


class Trackers:
    """Those of a run. One that fails is named and left, since training does not depend on it."""

    def __init__(self, trackers: Mapping[str, Tracker], say: Callable[[str], None]) -> None:
        self._trackers, self._say = dict(trackers), say

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._each(lambda tracker: tracker.log(values, step))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in [*self._trackers.items()]:
            try:
                act(tracker)
            except Exception as error:  # of the network, the disk, the library
                del self._trackers[name]
                self._say(f"{name} gets no more of the history: {' '.join(str(error).split())}")


def start_trackers(
    settings: RuntimeSettings,
    stage: str,
    fingerprint: str,
    sections: Mapping[str, Section],
    say: Callable[[str], None],
) -> Trackers:
    """Those that are asked for.

    Raises:
        UserError: one is not installed, or cannot start.
    """
    run = TrackedRun(
        f"{stage}-{fingerprint}",
        stage,
        settings.tracker_project,
        settings.root,
        {name: section.model_dump(mode="json") for name, section in sections.items()},
    )
    trackers: dict[str, Tracker] = {}
    for name in settings.tracker:
        asked = f"MINIMIND_TRACKER is {','.join(settings.tracker)!r}, but {name}"
        try:
            trackers[name] = TRACKERS[name](run)
        except ImportError:
            raise UserError(
                f"{asked} is not installed: pip install 'minimind-dvc[{name}]'."
            ) from None
        except Exception as error:
            raise UserError(f"{asked} did not start: {error}; mend that, or unset it.") from None
    return Trackers(trackers, say)
