"""A profile: what has been measured of one model on one machine, item by item, in a file.

`RecordKind` writes versioned JSON records atomically and explains files that it cannot read; plans
use it too.
"""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from moefit.errors import ConfigError
from moefit.folders import cache_root
from moefit.plan.experiments import BlockShape, Shapes
from moefit.serve.hf.skeleton import Skeleton
from moefit.serve.packed.store import fingerprint

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordKind:
    """One kind of record. version_at: the keys that lead to its version; indent: for people.

    make, again, elsewhere: what to do where there is no such file, where it is of no use, and
    where it cannot be written.
    """

    name: str
    version: int
    version_at: tuple[str, ...]
    make: str
    again: str
    elsewhere: str
    indent: int | None = None

    def write(self, values: Mapping[str, Any], path: Path) -> None:
        """Raises ConfigError if the file cannot be written; what was there before then stays."""
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(values, indent=self.indent) + "\n", encoding="utf-8")
            part.replace(path)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise ConfigError(
                f"cannot write the {self.name} {path}: {error.strerror or error}; {self.elsewhere}"
            ) from error

    def read(self, path: Path, made_of: Callable[[Mapping[str, Any]], Record]) -> Record:
        """The record that `made_of` makes of the file's values.

        It may raise KeyError, TypeError, ValueError or AttributeError for values that are none.
        Raises ConfigError for a file that is not there, no such record, or of another version.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"there is no {self.name} {path}; {self.make}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not a {self.name} ({error}); {self.again}") from error
        if (version := self._version_of(values)) != self.version:
            raise ConfigError(
                f"{path} is a {self.name} of version {version!r}, and this moefit reads version "
                f"{self.version}; {self.again}"
            )
        try:
            return made_of(values)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ConfigError(
                f"{path} is a damaged {self.name} ({error!r}); {self.again}"
            ) from error

    def _version_of(self, values: Any) -> Any:
        for key in self.version_at:
            values = values.get(key) if isinstance(values, dict) else None
        return values


VERSION = 2
_AGAIN = "run moefit profile again"
_PROFILE = RecordKind(
    name="profile",
    version=VERSION,
    version_at=("facts", "version"),
    make="make one with moefit profile",
    again=_AGAIN,
    elsewhere="make room, or set XDG_CACHE_HOME to a folder that can be written to",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFacts:
    """One MoE block: its experts, numbers in an expert's matrices, bytes of a slot by format."""

    name: str
    num_experts: int
    weights: int
    slot_bytes: dict[str, int]
    errors: dict[str, list[float]]

    @property
    def shape(self) -> BlockShape:
        """What experiments and models need of it."""
        return BlockShape(
            num_experts=self.num_experts,
            weights=self.weights,
            slot_bytes=self.slot_bytes,
            errors=self.errors,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileFacts:
    """What a profile is of. `wanted` names all its items; some may not be measured yet.

    errors of blocks: of each expert |W - W^|^2 / |W|^2 by format.
    """

    version: int
    fingerprint: str
    source: str
    dtype: str
    rule: str | None
    machine: dict[str, Any]
    text: str
    text_digest: str
    tokens: int
    context: int
    blocks: tuple[BlockFacts, ...]
    wanted: tuple[str, ...]

    @property
    def shapes(self) -> Shapes:
        """Of all blocks."""
        return {one.name: one.shape for one in self.blocks}


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Facts, and items by name: plain values."""

    facts: ProfileFacts
    items: Mapping[str, Any]

    @property
    def missing(self) -> list[str]:
        """What has not been measured yet."""
        return [name for name in self.facts.wanted if name not in self.items]

    @property
    def experts(self) -> dict[str, int]:
        """How many experts each block has."""
        return {block.name: block.num_experts for block in self.facts.blocks}

    def those(self, prefix: str) -> dict[str, Any]:
        """Items whose name begins so, by the rest of their names."""
        return {
            name.removeprefix(prefix): value
            for name, value in self.items.items()
            if name.startswith(prefix)
        }

    def with_item(self, name: str, value: Any) -> "Profile":
        """One item more."""
        return replace(self, items={**self.items, name: value})

    def without(self, prefixes: tuple[str, ...]) -> "Profile":
        """As if what begins so had not been measured."""
        kept = {name: one for name, one in self.items.items() if not name.startswith(prefixes)}
        return replace(self, items=kept)


def machine(device: str = "cpu") -> dict[str, Any]:
    """What times depend on."""
    model = ""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": device,
    }


def profiles_root() -> Path:
    """Where all profiles are."""
    return cache_root() / "profiles"


def folder_for(skeleton: Skeleton) -> Path:
    """Where the profiles of this checkpoint in this dtype are."""
    dtype = str(skeleton.dtype).removeprefix("torch.")
    return profiles_root() / f"{fingerprint(skeleton)}-{dtype}"


def path_for(skeleton: Skeleton, facts: ProfileFacts) -> Path:
    """Where the profile with these facts is; another text, machine or rule has its own."""
    what = (facts.text_digest, facts.tokens, facts.context, facts.rule, facts.wanted)
    key = repr((facts.version, *what, sorted(facts.machine.items())))
    return folder_for(skeleton) / f"{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"


def write_profile(profile: Profile, path: Path) -> None:
    """Write it, whole or not at all. Raises ConfigError if that cannot be."""
    _PROFILE.write({"facts": asdict(profile.facts), "items": dict(profile.items)}, path)


def read_profile(path: Path) -> Profile:
    """Raises ConfigError for a file that is no profile of this version, naming what helps."""
    return _PROFILE.read(path, _profile)


def _profile(values: Mapping[str, Any]) -> Profile:
    facts = values["facts"]
    blocks = tuple(BlockFacts(**one) for one in facts["blocks"])
    given = {field.name: facts[field.name] for field in fields(ProfileFacts)}
    given |= {"blocks": blocks, "wanted": tuple(facts["wanted"])}
    return Profile(facts=ProfileFacts(**given), items=dict(values["items"]))


def find_profile(skeleton: Skeleton, *, model: str, path: Path | None = None) -> Profile:
    """The profile to plan by: that of `path`, or the newest finished one of this checkpoint.

    One that was measured on this machine comes before others.
    Raises ConfigError if there is none, it is unfinished, or of another checkpoint.
    """
    if path is not None:
        profile = read_profile(path)
        _refuse_other(profile, skeleton, path)
        return _finished(profile, model)
    found = list(_profiles_in(folder_for(skeleton)))
    if not found:
        dtype = str(skeleton.dtype).removeprefix("torch.")
        raise ConfigError(
            f"there is no profile of {model} in {dtype}; make one with: moefit profile {model} "
            "--text FILE"
        )
    best = min(found, key=lambda one: (bool(one.missing), one.facts.machine != _here(one)))
    return _finished(best, model)


def _profiles_in(folder: Path) -> Iterator[Profile]:
    """All that can be read, the newest first."""
    for path in sorted(folder.glob("*.json"), key=lambda one: -one.stat().st_mtime):
        with suppress(ConfigError):
            yield read_profile(path)


def _here(profile: Profile) -> dict[str, Any]:
    return machine(profile.facts.machine.get("device", "cpu"))


def _finished(profile: Profile, model: str) -> Profile:
    if profile.missing:
        done = len(profile.facts.wanted) - len(profile.missing)
        raise ConfigError(
            f"the profile of {model} has {done} of {len(profile.facts.wanted)} measurements; the "
            "same moefit profile command goes on from there"
        )
    return profile


def _refuse_other(profile: Profile, skeleton: Skeleton, path: Path) -> None:
    own = fingerprint(skeleton)
    dtype = str(skeleton.dtype).removeprefix("torch.")
    if (profile.facts.fingerprint, profile.facts.dtype) != (own, dtype):
        raise ConfigError(
            f"{path} is a profile of another checkpoint ({profile.facts.source} in "
            f"{profile.facts.dtype}), not of {skeleton.checkpoint.folder} in {dtype}; {_AGAIN} on "
            "this one, or leave --profile out"
        )
