"""Whether a packed store still is what was written: every expert against its checksum.

Reads every byte once and changes nothing. Knows nothing of serving.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moefit.checkpoint import SpanReader
from moefit.errors import CheckpointError
from moefit.formats.format import FORMATS, Format
from moefit.formats.packed_file import PackedFile
from moefit.serve.packed import PackedPlace
from moefit.serve.packing import Progress
from moefit.serve.skeleton import Skeleton
from moefit.serve.slots import bytes_of


@dataclass(slots=True, kw_only=True)
class Checked:
    """What was found. `problems` names damaged experts, unsound files and missing ones."""

    folder: Path
    formats: list[str] = field(default_factory=list)
    files: int = 0
    experts: int = 0
    bytes_read: int = 0
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "folder": str(self.folder)}


def check_packed(
    skeleton: Skeleton, formats: Sequence[Format] | None = None, progress: Progress | None = None
) -> Checked:
    """Check what is packed of a checkpoint in these formats; in all that are there if None.

    Raises CheckpointError if nothing is there at all.
    """
    place = PackedPlace(skeleton)
    there = [format for format in FORMATS.values() if (place.folder / format.name).is_dir()]
    if not there:
        raise CheckpointError(
            f"nothing of {place.source} is packed in {place.folder}; `moefit pack` does that"
        )
    chosen = there if formats is None else formats
    found = Checked(folder=place.folder, formats=[format.name for format in chosen])
    files: list[PackedFile] = []
    for format in chosen:
        for index, block in enumerate(skeleton.blocks):
            if not place.path(format, index).is_file():
                found.problems.append(f"{block.name} is not packed in {format.name}")
                continue
            try:
                files.append(place.open(format, index))
            except CheckpointError as error:
                found.problems.append(str(error))
    total = sum(span.nbytes for file in files for span in file.spans)
    with closing(SpanReader()) as reader:
        for file in files:
            _check_file(file, reader, found)
            if progress is not None:
                progress(found.bytes_read, total)
    return found


def _check_file(file: PackedFile, reader: SpanReader, found: Checked) -> None:
    found.files += 1
    for expert, span in enumerate(file.spans):
        data = bytes_of(torch.empty(span.nbytes, dtype=torch.uint8))
        found.experts += 1
        found.bytes_read += span.nbytes
        try:
            reader.read_into(span, data)
        except CheckpointError as error:
            found.problems.append(str(error))
            continue
        if damage := file.damage(expert, data):
            found.problems.append(damage)
