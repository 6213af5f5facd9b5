"""Keep how often each expert was used, so that a server that restarts begins with those in memory.

Counts lie beside the packed store of the checkpoint, with its fingerprint. They are saved when a
server stops and every minute, since it may be killed. A later run adds its own to half of them, so
that old runs count less and less.
"""

import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from moefit.errors import CheckpointError, MoefitError, in_brief
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.model import ServedModel
from moefit.serve.packed.file import WRITING
from moefit.serve.packed.store import PackedLocation

FILE = "usage.json"
EVERY = 60.0  # seconds between two saves
_KEPT = 0.5  # share of earlier runs' counts that the next run adds its own to
_MOST = 1e18  # of tokens; sums of counts stay exact enough, and within a float's range
_VERSION = 1
_LOG = logging.getLogger(__name__)

Counts = Mapping[str, list[float]]
"""By block name, the number of tokens that used each expert."""


class UsageFile:
    """The counts of one checkpoint.

    Args:
        location: Of the checkpoint's packed store, in whose folder the file lies.
    """

    def __init__(self, location: PackedLocation):
        self.path = location.folder / FILE
        self._fingerprint, self._source = location.fingerprint, location.source

    @classmethod
    def of(cls, served: ServedModel) -> "UsageFile":
        """Return the file of a served model's checkpoint.

        Raises:
            MoefitError: The checkpoint cannot be read any more.
            OSError: The same.
            RuntimeError: There is no home folder.
        """
        settings = served.placement_budget.settings
        skeleton = build_skeleton(served.folder, settings.dtype, settings.adapter)
        return cls(PackedLocation(skeleton))

    def read(self, experts: Mapping[str, int]) -> Counts | None:
        """Return the counts, or None if there is no file.

        Args:
            experts: Number of experts by block name, which the file must have.

        Raises:
            CheckpointError: The file is damaged, or of another checkpoint.
        """
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error
        if not isinstance(found, dict) or found.get("version") != _VERSION:
            raise CheckpointError(f"{self.path} has no use counts of this version")
        if found.get("fingerprint") != self._fingerprint:
            raise CheckpointError(
                f"{self.path} was counted with another checkpoint ({found.get('source')}), not "
                f"with {self._source}"
            )
        counts = found.get("counts")
        if not _is_counts(counts, experts):
            raise CheckpointError(f"{self.path} does not have counts of this model's experts")
        return counts

    def write(self, counts: Counts) -> None:
        """Replace the file. Raises CheckpointError if that fails; the old file stays then."""
        content = {
            "version": _VERSION,
            "fingerprint": self._fingerprint,
            "source": self._source,
            "counts": dict(counts),
        }
        partial = self.path.with_name(f".{FILE}.{os.getpid()}{WRITING}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
            partial.replace(self.path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise CheckpointError(f"{self.path} cannot be written: {error}") from error


def _is_counts(counts: Any, experts: Mapping[str, int]) -> bool:
    """Return whether a value from a file is one number of 0 to `_MOST` per expert."""
    if not isinstance(counts, dict) or counts.keys() != experts.keys():
        return False
    return all(
        isinstance(row, list)
        and len(row) == experts[name]
        and all(type(one) in (int, float) and 0 <= one <= _MOST for one in row)
        for name, row in counts.items()
    )


@contextmanager
def kept_usage(served: ServedModel, *, every: float = EVERY) -> Iterator[str]:
    """Begin with the experts that earlier runs used most, and save the counts of this run.

    Args:
        served: The model. Its empty slots are filled in the background, with any experts where
            there are no counts. It is served without use counts, with a remark, if their file
            cannot be found.
        every: Seconds between two saves; the last one is at the end of the block.

    Yields:
        What was found, as a line for the user; empty if there was nothing.
    """
    try:
        file = UsageFile.of(served)
    except (MoefitError, OSError, RuntimeError) as error:
        yield f"note: use counts are not kept: {in_brief(error)}"
        return
    before, remark = None, ""
    experts = {name: one.num_experts for name, one in served.blocks.items()}
    try:
        before = file.read(experts)
    except CheckpointError as error:
        remark = f"note: {error}; it is not used, and will be replaced"
    if before is not None:
        served.warm_start(before)
        remark = "beginning with the experts that earlier runs used most"
    else:
        served.fill()
    stop = threading.Event()
    saver = threading.Thread(
        target=_save_until, args=(served, file, before, every, stop), name="moefit-usage"
    )
    saver.start()
    try:
        yield remark
    finally:
        stop.set()
        saver.join()


def _save_until(
    served: ServedModel,
    file: UsageFile,
    before: Counts | None,
    every: float,
    stop: threading.Event,
) -> None:
    saved: Counts = {}
    failed = False
    while True:
        stopping = stop.wait(every)
        counts = served.use_counts()
        if counts != saved and any(map(sum, counts.values())):
            try:
                file.write(_added(counts, before))
                saved = counts
            except CheckpointError as error:
                if not failed:  # once, not every minute
                    _LOG.warning("use counts are not kept: %s", error)
                failed = True
        if stopping:
            return


def _added(counts: Counts, before: Counts | None) -> Counts:
    """Return counts plus part of an earlier run's."""
    if before is None:
        return counts
    return {
        name: [one + _KEPT * old for one, old in zip(row, before[name], strict=True)]
        for name, row in counts.items()
    }
