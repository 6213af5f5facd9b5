"""Probes: trained predictors of a checkpoint's experts, in a file beside its packed store.

A probe is a linear map from what a block's experts are given to the logits of a later block's
router. The safetensors file has one per MoE block and distance. Its metadata says which checkpoint
and text they were fitted on and how well they predict, and has a checksum of each tensor and one of
itself. Experts alone identify a packed store; what a probe predicts depends on all other weights
too, so their bytes are sampled besides. Files are written under a temporary name and renamed. A
file that does not fit is ignored, and a note gives the reason.

Shapes: T tokens, D model width, E experts.
"""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from moefit.checkpoint.safetensors import Span, SpanReader, bytes_of, read_header
from moefit.errors import CheckpointError, MoefitError
from moefit.serve.config import MAX_HORIZON, LoadSettings
from moefit.serve.hf.skeleton import Skeleton
from moefit.serve.layer.moe_layer import VirtualExperts
from moefit.serve.memory.budget import format_bytes
from moefit.serve.packed.dense import dense_digest
from moefit.serve.packed.file import WRITING
from moefit.serve.packed.store import PackedLocation, packed_root
from moefit.serve.prediction.next_router import LinearMap, NextRouter, obstacle, preferences
from moefit.serve.prediction.pregated import is_pregated

FILE = "probes.safetensors"
DEPTHS = MAX_HORIZON  # blocks ahead for which probes are fitted
UNUSED = (
    "it is not used: the next layer's router predicts instead, and `moefit pack --probes` fits "
    "probes again"
)
_KIND = "probes fitted by moefit"
_LAYOUT = "1"

Place = tuple[int, int]
"""Index of the block whose inputs a probe is given, and how many blocks ahead it predicts."""
Maps = Mapping[Place, LinearMap]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeMetadata:
    """What probes were fitted on, and how well they predict.

    Attributes:
        fingerprint: Identifies the checkpoint's settings and experts.
        dense: Identifies its other weights, with an adapter where there is one.
        dtype: Of the probes and of what they are given.
        source: Folder of the checkpoint.
        text: Name of the text.
        digest: Identifies the text and its tokenization.
        tokens: Tokens that they were fitted on.
        recalls: By place (`block.ahead`), the share of chosen experts that the probe and the later
            block's own router found on tokens that it was not fitted on; None of a router that
            cannot be applied early.
    """

    fingerprint: str
    dense: str
    dtype: str
    source: str
    text: str
    digest: str
    tokens: int
    recalls: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)

    def mean_recalls(self, ahead: int) -> tuple[float | None, float | None]:
        """Return the means of `recalls` so many blocks ahead: of probes, and of routers."""
        found = [one for name, one in self.recalls.items() if _place(name)[1] == ahead]
        routers = [one for _, one in found if one is not None]
        return (
            sum(one for one, _ in found) / len(found) if found else None,
            sum(routers) / len(routers) if routers else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeFile:
    """The header of a file of probes that fits the checkpoint.

    Attributes:
        path: Of the file.
        metadata: What they were fitted on.
        spans: Of the tensors, by name.
        checksums: Of the tensors, by name.
    """

    path: Path
    metadata: ProbeMetadata
    spans: Mapping[str, Span]
    checksums: Mapping[str, int]

    def nbytes(self, depth: int) -> int:
        """Return the bytes of the probes up to `depth` blocks ahead."""
        return sum(one.nbytes for name, one in self.spans.items() if _place(name)[1] <= depth)

    def read(self, depth: int, device: torch.device) -> Maps:
        """Return the probes up to `depth` blocks ahead.

        Raises:
            CheckpointError: The file cannot be read, is damaged, or was replaced meanwhile.
        """
        with closing(SpanReader()) as reader:
            try:
                return {
                    place: LinearMap(
                        self._tensor(reader, f"{name}.weight").to(device),
                        self._tensor(reader, f"{name}.bias").to(device),
                    )
                    for name in self.metadata.recalls
                    if (place := _place(name))[1] <= depth
                }
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be read: {error}") from error

    def _tensor(self, reader: SpanReader, name: str) -> Tensor:
        tensor = self.spans[name].read(reader)
        if zlib.crc32(bytes_of(tensor)) != self.checksums[name]:
            raise CheckpointError(f"{self.path} is damaged: {name} does not match its checksum")
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{self.path} is damaged: {name} has numbers that are not finite")
        return tensor


class Probes:
    """Predict by probes, and by the later block's router where there is none.

    Args:
        maps: The probes by place.
        blocks: The served blocks, in order.
        routers: Predicts the others.
    """

    def __init__(self, maps: Maps, blocks: Sequence[VirtualExperts], routers: NextRouter):
        self._maps, self._blocks, self._routers = maps, blocks, routers

    def predicts(self, block: int, ahead: int = 1) -> bool:
        """Return whether block `block + ahead` can be predicted from block `block`."""
        return (block, ahead) in self._maps or self._routers.predicts(block, ahead)

    def scores(self, block: int, ahead: int, x_TD: Tensor) -> Tensor | None:
        """Return a score per expert [T, E]; see `Predictor`."""
        if (probe := self._maps.get((block, ahead))) is None:
            return self._routers.scores(block, ahead, x_TD)
        there = self._blocks[block + ahead]
        logits_TE = probe(x_TD.to(probe.weight_ED.dtype))
        return preferences(there.scoring, there.bias_E, logits_TE)


class ProbeLocation:
    """The file of a checkpoint's probes.

    Args:
        skeleton: The model.
    """

    def __init__(self, skeleton: Skeleton):
        location = PackedLocation(skeleton)
        self._skeleton, self.folder = skeleton, location.folder
        self.path, self.source = location.folder / FILE, location.source
        self._fingerprint = location.fingerprint

    def metadata(self, *, text: str, digest: str, tokens: int, recalls: Any) -> ProbeMetadata:
        """Return the metadata of probes that were fitted on a text."""
        return ProbeMetadata(
            fingerprint=self._fingerprint,
            dense=dense_digest(self._skeleton),
            dtype=str(self._skeleton.dtype).removeprefix("torch."),
            source=self.source,
            text=text,
            digest=digest,
            tokens=tokens,
            recalls=recalls,
        )

    def open(self) -> ProbeFile | None:
        """Return the file's header; None if there is no file.

        Raises:
            CheckpointError: It is damaged, or does not fit the checkpoint.
        """
        if not self.path.is_file():
            return None
        metadata, spans, checksums = _read(self.path)
        wanted = self.metadata(text="", digest="", tokens=0, recalls={})
        if metadata.fingerprint != wanted.fingerprint:
            raise CheckpointError(
                f"{self.path} was fitted to another checkpoint ({metadata.source}), not to "
                f"{wanted.source}"
            )
        if metadata.dense != wanted.dense:
            raise CheckpointError(
                f"{self.path} was fitted to other dense weights than those of {wanted.source}, "
                "such as before further training or with another adapter"
            )
        if metadata.dtype != wanted.dtype:
            raise CheckpointError(
                f"{self.path} was fitted in {metadata.dtype}, and the model is in {wanted.dtype}"
            )
        found = {name: (one.dtype, one.shape) for name, one in spans.items()}
        shapes = self._shapes(metadata)
        whole = len(shapes) == 2 * len(metadata.recalls)
        if not whole or found != shapes or checksums.keys() != shapes.keys():
            raise CheckpointError(
                f"{self.path} has probes of other shapes than those of this model's "
                f"{len(self._skeleton.blocks)} MoE blocks"
            )
        return ProbeFile(path=self.path, metadata=metadata, spans=spans, checksums=checksums)

    def _shapes(self, metadata: ProbeMetadata) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return dtype and shape of each tensor, as far as the model has such places."""
        blocks, width = self._skeleton.blocks, width_of(self._skeleton)
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name in metadata.recalls:
            index, ahead = _place(name)
            if index < 0 or not 1 <= ahead <= DEPTHS or index + ahead >= len(blocks):
                continue
            experts = blocks[index + ahead].num_experts
            shapes[f"{name}.weight"] = self._skeleton.dtype, (experts, width)
            shapes[f"{name}.bias"] = self._skeleton.dtype, (experts,)
        return shapes

    def write(self, metadata: ProbeMetadata, maps: Maps) -> int:
        """Replace the file by probes for the places of `metadata.recalls`; return its size.

        Raises:
            CheckpointError: It cannot be written. The old file stays then.
        """
        tensors: dict[str, Tensor] = {}
        for name in metadata.recalls:
            one = maps[_place(name)]
            assert one.bias_E is not None, name
            tensors |= {f"{name}.weight": one.weight_ED, f"{name}.bias": one.bias_E}
        sums = {name: zlib.crc32(bytes_of(one)) for name, one in tensors.items()}
        header = {"kind": _KIND, "layout": _LAYOUT, "about": json.dumps(asdict(metadata))}
        header["checksums"] = json.dumps(sums)
        header["remarks_checksum"] = _checksum(header)
        data = save(tensors, header)
        partial = self.path.with_name(f".{FILE}.{os.getpid()}{WRITING}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise CheckpointError(f"{self.path} cannot be written: {error}") from error
        return len(data)

    def outdated(self) -> str:
        """Return a message if probes were fitted to what this folder held before; else nothing."""
        for path in sorted(packed_root().glob(f"*-*/{FILE}")):
            if path == self.path:
                continue
            with suppress(MoefitError, OSError):
                metadata = _read(path)[0]
                if metadata.source == self.source and metadata.fingerprint != self._fingerprint:
                    return (
                        f"{path} was fitted to another checkpoint, which was in {self.source} "
                        "then; it can be removed"
                    )
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundProbes:
    """What was found for a model that is to prefetch.

    Attributes:
        file: The probes; None if there are none to use.
        depth: Blocks ahead for which they are loaded.
        ignored: Why there is a file that is not used; may be empty.
    """

    file: ProbeFile | None = None
    depth: int = 1
    ignored: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the probes in memory."""
        return 0 if self.file is None else self.file.nbytes(self.depth)

    def left_out(self) -> "FoundProbes":
        """Return this without probes, which the budget has no room for."""
        assert self.file is not None
        size = format_bytes(self.nbytes)
        return FoundProbes(
            ignored=f"the budget has no room for the {size} of {self.file.path}; the next layer's "
            "router predicts instead"
        )

    def as_dict(self) -> dict[str, Any] | None:
        """Return plain values, for JSON; None without probes."""
        if self.file is None:
            return None
        about = self.file.metadata
        recall, routers = about.mean_recalls(1)
        return {
            "text": about.text,
            "tokens": about.tokens,
            "number": sum(_place(name)[1] <= self.depth for name in about.recalls),
            "bytes": self.nbytes,
            "recall": recall,
            "next_router_recall": routers,
        }


NO_PROBES = FoundProbes()


def find_probes(skeleton: Skeleton, settings: LoadSettings) -> FoundProbes:
    """Return the probes that a model loaded with these settings predicts with."""
    model = skeleton.model
    if is_pregated(model) or obstacle(model, len(skeleton.blocks), settings):
        return NO_PROBES
    try:
        location = ProbeLocation(skeleton)
        file = location.open()
        ignored = "" if file is not None else location.outdated()
    except (MoefitError, OSError, RuntimeError) as error:  # RuntimeError: no home folder
        return FoundProbes(ignored=f"{error}; {UNUSED}")
    depth = max(settings.probe_depth, settings.prefetch_horizon)
    return FoundProbes(file=file, depth=depth, ignored=ignored)


def width_of(skeleton: Skeleton) -> int:
    """Return the width of what MoE blocks are given."""
    return skeleton.model.config.get_text_config(decoder=True).hidden_size


def place_name(index: int, ahead: int) -> str:
    """Return the name of a probe in the file.

    >>> place_name(3, 1)
    '3.1'
    """
    return f"{index}.{ahead}"


def source_of(path: Path) -> str:
    """Return the checkpoint that a file of probes was fitted to. Raises CheckpointError."""
    return _read(path)[0].source


def _place(name: str) -> Place:
    index, ahead, *_ = name.split(".")
    return int(index), int(ahead)


def _read(path: Path) -> tuple[ProbeMetadata, dict[str, Span], dict[str, int]]:
    """Return metadata, spans and checksums of any file of probes. Raises CheckpointError."""
    header, spans = read_header(path)
    try:
        if header.get("kind") != _KIND or header.get("layout") != _LAYOUT:
            raise ValueError("it has no probes of this version of moefit")
        if header["remarks_checksum"] != _checksum(header):
            raise ValueError("its header does not match its checksum")
        about = json.loads(header["about"])
        recalls = {
            name: (float(probe), None if router is None else float(router))
            for name, (probe, router) in about.pop("recalls").items()
        }
        metadata = ProbeMetadata(**about, recalls=recalls)
        checksums = {str(name): int(one) for name, one in json.loads(header["checksums"]).items()}
        for name in (*recalls, *(one.name for one in spans)):
            _place(name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a valid file of probes: {error}") from error
    return metadata, {one.name: one for one in spans}, checksums


def _checksum(header: Mapping[str, Any]) -> str:
    covered = sorted((name, text) for name, text in header.items() if name != "remarks_checksum")
    return f"{zlib.crc32(json.dumps(covered).encode()):08x}"
