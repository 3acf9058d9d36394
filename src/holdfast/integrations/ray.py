"""Ray Train: a run of holdfast is the checkpoint of a Ray job.

Ray starts the workers, notices when one dies and starts all of them again; holdfast saves what they hold and resumes it
exactly. Ray is told of each checkpoint by a reference of a few hundred bytes; the data stays in the run.
"""

from __future__ import annotations

import json
import posixpath
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from holdfast.checkpointer import Checkpointer
from holdfast.core.clock import Clock
from holdfast.core.errors import InvalidFormat, MissingDependency, PolicyError

try:
    import ray.train
except ImportError as e:
    raise MissingDependency(
        "holdfast.integrations.ray needs Ray Train; run: pip install 'holdfast[ray]'"
    ) from e

if TYPE_CHECKING:
    from collections.abc import Generator

    from holdfast.loop.batches import BatchSource

__all__ = ["RayCheckpointer", "Reference", "checkpointer", "default_url", "url_of"]

REFERENCE = "holdfast.json"
FORMAT = 1
SCHEMES = {
    "local": "",
    "s3": "s3://",
    "gcs": "gs://",
    "abfs": "az://",
}  # by the names that pyarrow has for them

Item = TypeVar("Item")


class Reference(NamedTuple):
    """Where the data of a Ray checkpoint is: `holdfast.open(url, step)`."""

    url: str
    step: int


def checkpointer(
    url: str | None = None,
    state: Mapping[str, object] | None = None,
    *,
    seconds: float = 600.0,
    watch_steps: int | None = None,
    **options: object,
) -> RayCheckpointer:
    """Return the Checkpointer of this Ray Train worker. Every worker of the job calls it, in its train function.

    Args:
        url: the run's place, which all workers must reach; by default the directory `holdfast` in the storage of the
            Ray run (`RunConfig(storage_path=..., name=...)`).
        state: as for `Checkpointer`.
        seconds: how long a worker waits for the others at most, before it says who is missing.
        watch_steps: every so many steps all workers ask Ray whether a node of theirs is about to be taken away; if so,
            one more save is made at the end of the next step. Asking is a barrier. By default nobody asks.
        options: whatever `Checkpointer` takes, but for `ranks`, which Ray says.

    Raises:
        PolicyError: this is no worker of Ray Train, its storage is of a kind that holdfast cannot address (pass url),
            or an option makes no sense.
        RanksDisagree: the other workers do not come in time.
    """
    context = _context()
    ranks = (context.get_world_rank(), context.get_world_size(), seconds)
    if "ranks" in options:
        raise PolicyError("ranks=: Ray says who is who; leave it out")
    if watch_steps is not None and not (type(watch_steps) is int and watch_steps > 0):
        raise PolicyError(f"watch_steps={watch_steps!r}: expected a number of steps, 1 or more")
    place = url if url is not None else default_url()
    made = RayCheckpointer(place, state or {}, ranks=ranks, **options)  # type: ignore[arg-type]
    made.watch_steps = watch_steps
    return made


def default_url() -> str:
    """Return the run's place in the storage of the present Ray run.

    Raises:
        PolicyError: this is no worker of Ray Train, or its storage is of a kind that holdfast cannot address.
    """
    try:
        storage = cast("Any", _context().get_storage())
    except NotImplementedError as e:
        raise PolicyError("Ray's local mode (num_workers=0) has no storage; pass url=") from e
    kind = storage.storage_filesystem.type_name
    if kind not in SCHEMES:
        raise PolicyError(
            f"the storage of this Ray run is a {kind!r} file system, which has no URL that holdfast knows; pass url="
        )
    return SCHEMES[kind] + posixpath.join(storage.experiment_fs_path, "holdfast")


def url_of(checkpoint: ray.train.Checkpoint) -> Reference:
    """Return the url and the step that a Ray checkpoint refers to, as in `holdfast.open(*url_of(result.checkpoint))`.

    Raises:
        InvalidFormat: it is not one that holdfast reported.
    """
    try:
        with checkpoint.as_directory() as directory:
            found = json.loads(Path(directory, REFERENCE).read_bytes())
        url, step = found["url"], found["step"]
        if found["holdfast"] != FORMAT or not isinstance(url, str) or type(step) is not int:
            raise ValueError(f"it says {found!r}")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InvalidFormat(
            f"{checkpoint}: expected the reference that holdfast reports to Ray, a {REFERENCE} of format {FORMAT}: {e}"
        ) from e
    return Reference(url, step)


class RayCheckpointer(Checkpointer):
    """A Checkpointer that reports to Ray Train; `checkpointer()` makes it.

    `ray.train.report` is a barrier: every worker must call it equally often and, as they train together, in the same
    step. When a save becomes a checkpoint behind the loop is known to each worker at another time, so no report is made
    then. One is made in the step of each save, which is the same on all; it tells of the newest checkpoint that is
    committed by then, mostly that of the save before. One more, when the loop has ended or the run is closed without an
    error, tells of the last.
    """

    watch_steps: int | None = None
    _watched: int | None = None  # the step in which Ray was asked last
    _preemption: ray.train.PreemptionInfo | None = None
    _told: Clock | None = None  # of the save that was the newest when Ray was told something last
    _ended: Clock | None = None  # the same, when all saves were durable
    _reported: int | None = None

    def _steps(self, total: int | None, source: BatchSource | None) -> Iterator[object]:
        return self._telling(super()._steps(total, source))

    def _epochs(self, total: int) -> Iterator[int]:
        return self._telling(super()._epochs(total))

    def step_end(self, step: int | None = None, metrics: Mapping[str, object] | None = None) -> None:
        super().step_end(step, metrics)
        self._tell()
        self._watch()

    def close(self) -> None:
        super().close()
        self._tell_last()

    def _telling(self, loop: Iterator[Item]) -> Generator[Item, None, None]:
        with closing(loop):  # type: ignore[type-var]
            for item in loop:
                self._tell()
                self._watch()
                yield item
        if self._depth == 0:
            self._tell_last()

    def _tell(self) -> None:
        """Report to Ray, on all workers or none, if a save was begun or a checkpoint restored since the last report."""
        saved = self._engine.saved_clock
        if saved is not None and saved != self._told:
            self._told = saved
            self._report()

    def _tell_last(self) -> None:
        """Report to Ray once every save is durable; nothing, if that was done."""
        saved = self._engine.saved_clock
        if saved is not None and saved != self._ended:
            self._told = self._ended = saved
            self._report()

    def _watch(self) -> None:
        """Ask for a save if a node is about to be taken away; once, and again if Ray says something new of it."""
        if self.watch_steps is None or (
            self._watched is not None and self.step < self._watched + self.watch_steps
        ):
            return
        self._watched = self.step
        found = ray.train.get_preemption_info()
        saved_just_now = not self._depth and self._engine.saved_clock == self.clock
        if found is not None and found != self._preemption and not saved_just_now:
            self.save()
        self._preemption = found

    def _report(self) -> None:
        if _context().get_world_rank() != 0:
            ray.train.report({})
            return
        history = self._engine.session.history
        newest = history.newest_step
        if newest is None or newest == self._reported:
            ray.train.report({"step": self.step})
            return
        self._reported = newest
        metrics = history.summary(newest).record().metrics
        with tempfile.TemporaryDirectory(prefix="holdfast-") as directory:
            words = {"holdfast": FORMAT, "url": self.url, "step": newest}
            Path(directory, REFERENCE).write_text(json.dumps(words))
            checkpoint = ray.train.Checkpoint.from_directory(directory)
            ray.train.report({**metrics, "step": newest}, checkpoint=checkpoint)


def _context() -> ray.train.TrainContext:
    try:
        context = ray.train.get_context()
    except RuntimeError as e:
        raise PolicyError(
            f"{e} Call holdfast.integrations.ray in the train function of a trainer, as its workers run it"
        ) from e
    if not type(context).__module__.startswith("ray.train.v2."):
        raise PolicyError(
            "holdfast.integrations.ray needs Ray Train V2, the default of recent versions; here it is "
            "switched off: unset RAY_TRAIN_V2_ENABLED"
        )
    return context
