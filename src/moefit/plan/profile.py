"""Profiles: the measurements of one model on one machine, in a file.

`RecordKind` reads and writes versioned JSON files for profiles and plans.
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
from moefit.plan.configuration import Lengths
from moefit.plan.experiments import BlockShape, Shapes
from moefit.serve.hf.skeleton import Skeleton
from moefit.serve.packed.store import fingerprint

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordKind:
    """A kind of versioned JSON file.

    Attributes:
        name: What error messages call it.
        version: The version that is read and written.
        version_at: Keys that lead to the version in a file.
        make: Advice if the file does not exist.
        again: Advice if the file is damaged or of another version.
        elsewhere: Advice if the file cannot be written.
        indent: Indentation of the JSON.
    """

    name: str
    version: int
    version_at: tuple[str, ...]
    make: str
    again: str
    elsewhere: str
    indent: int | None = None

    def write(self, values: Mapping[str, Any], path: Path) -> None:
        """Write a file atomically.

        Raises:
            ConfigError: The file cannot be written. An existing file is unchanged.
        """
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
        """Read a file.

        Args:
            path: The file.
            made_of: Converts its values; may raise LookupError, TypeError, ValueError,
                AttributeError or ArithmeticError for damaged ones.

        Raises:
            ConfigError: The file is missing, damaged, or of another kind or version.
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
    elsewhere="free disk space, or set XDG_CACHE_HOME to a writable folder",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileFacts:
    """What a profile was measured on, known before any measurement.

    Attributes:
        version: Version of the file format.
        fingerprint: Identifies the checkpoint.
        source: Folder of the checkpoint.
        dtype: Name of the torch dtype that the model is loaded in.
        rule: Inference rule of a DS-MoE; None for the model's own.
        machine: What times depend on; see `machine`.
        text: Name of the text.
        text_digest: Identifies the text.
        tokens: Tokens of the text that are predicted.
        context: Tokens of each window.
        blocks: The MoE blocks. Errors are |W - W^|^2 / |W|^2 of each expert, by format.
        wanted: Names of all items, measured or not.
        source_tokens: Mean length of an encoder-decoder's sources; 0 for decoders.
        target_tokens: The same of their targets.
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
    blocks: tuple[BlockShape, ...]
    wanted: tuple[str, ...]
    source_tokens: float = 0.0
    target_tokens: float = 0.0

    @property
    def shapes(self) -> Shapes:
        """The blocks by name."""
        return {one.name: one for one in self.blocks}

    @property
    def lengths(self) -> Lengths | None:
        """Mean lengths of the pairs that an encoder-decoder was measured on; None for decoders."""
        if not self.source_tokens:
            return None
        return Lengths(source=self.source_tokens, target=self.target_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The facts, and the measured items by name, as plain values."""

    facts: ProfileFacts
    items: Mapping[str, Any]

    @property
    def missing(self) -> list[str]:
        """Names of the items that have not been measured."""
        return [name for name in self.facts.wanted if name not in self.items]

    @property
    def experts(self) -> dict[str, int]:
        """Number of experts by block."""
        return {block.name: block.num_experts for block in self.facts.blocks}

    def those(self, prefix: str) -> dict[str, Any]:
        """Return the items whose names begin with `prefix`, by the remainder of their names."""
        return {
            name.removeprefix(prefix): value
            for name, value in self.items.items()
            if name.startswith(prefix)
        }

    def with_item(self, name: str, value: Any) -> "Profile":
        """Return the profile with an item added."""
        return replace(self, items={**self.items, name: value})

    def without(self, prefixes: tuple[str, ...]) -> "Profile":
        """Return the profile without the items whose names begin with one of `prefixes`."""
        kept = {name: one for name, one in self.items.items() if not name.startswith(prefixes)}
        return replace(self, items=kept)


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return the properties of this machine that times depend on."""
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
    """Return the folder of all profiles."""
    return cache_root() / "profiles"


def folder_for(skeleton: Skeleton) -> Path:
    """Return the folder of the profiles of a checkpoint in its dtype."""
    dtype = str(skeleton.dtype).removeprefix("torch.")
    return profiles_root() / f"{fingerprint(skeleton)}-{dtype}"


def path_for(skeleton: Skeleton, facts: ProfileFacts) -> Path:
    """Return the file of the profile with these facts; each text, machine and rule has its own."""
    what = (facts.text_digest, facts.tokens, facts.context, facts.rule, facts.wanted)
    key = repr((facts.version, *what, sorted(facts.machine.items())))
    return folder_for(skeleton) / f"{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"


def write_profile(profile: Profile, path: Path) -> None:
    """Write a profile atomically. Raises ConfigError if the file cannot be written."""
    _PROFILE.write({"facts": asdict(profile.facts), "items": dict(profile.items)}, path)


def read_profile(path: Path) -> Profile:
    """Read a profile.

    Raises:
        ConfigError: The file is missing, damaged, or not a profile of this version.
    """
    return _PROFILE.read(path, _profile)


def _profile(values: Mapping[str, Any]) -> Profile:
    facts = values["facts"]
    blocks = tuple(BlockShape(**one) for one in facts["blocks"])
    # Absent in profiles of decoders written before encoder-decoders could be profiled.
    given = {"source_tokens": 0.0, "target_tokens": 0.0} | facts
    given = {field.name: given[field.name] for field in fields(ProfileFacts)}
    given |= {"blocks": blocks, "wanted": tuple(facts["wanted"])}
    return Profile(facts=ProfileFacts(**given), items=dict(values["items"]))


def find_profile(skeleton: Skeleton, *, model: str, path: Path | None = None) -> Profile:
    """Return the profile at `path`, or the newest finished one of a checkpoint.

    Profiles that were measured on this machine are preferred.

    Args:
        skeleton: The model without weights.
        model: What the user calls it, for error messages.
        path: A profile's file; None to search for one.

    Raises:
        ConfigError: There is no profile, it is unfinished, or it is of another checkpoint.
    """
    if path is not None:
        profile = read_profile(path)
        _check_checkpoint(profile, skeleton, path)
        return _finished(profile, model)
    found = list(_profiles_in(folder_for(skeleton)))
    if not found:
        dtype = str(skeleton.dtype).removeprefix("torch.")
        raise ConfigError(
            f"there is no profile of {model} in {dtype}; make one with: moefit profile {model} "
            "--text FILE"
        )
    best = min(found, key=lambda one: (bool(one.missing), not _is_of_this_machine(one)))
    return _finished(best, model)


def _profiles_in(folder: Path) -> Iterator[Profile]:
    """Yield all readable profiles, newest first."""
    for path in sorted(folder.glob("*.json"), key=lambda one: -one.stat().st_mtime):
        with suppress(ConfigError):
            yield read_profile(path)


def _is_of_this_machine(profile: Profile) -> bool:
    return profile.facts.machine == machine(profile.facts.machine.get("device", "cpu"))


def _finished(profile: Profile, model: str) -> Profile:
    if profile.missing:
        done = len(profile.facts.wanted) - len(profile.missing)
        raise ConfigError(
            f"the profile of {model} has {done} of {len(profile.facts.wanted)} measurements; the "
            "same moefit profile command continues from there"
        )
    return profile


def _check_checkpoint(profile: Profile, skeleton: Skeleton, path: Path) -> None:
    own = fingerprint(skeleton)
    dtype = str(skeleton.dtype).removeprefix("torch.")
    if (profile.facts.fingerprint, profile.facts.dtype) != (own, dtype):
        raise ConfigError(
            f"{path} is a profile of another checkpoint ({profile.facts.source} in "
            f"{profile.facts.dtype}), not of {skeleton.checkpoint.folder} in {dtype}; {_AGAIN} on "
            "this one, or leave --profile out"
        )
