"""API keys: one from the command line, and named ones from a file that may change at any time.

A file with a mistake changes nothing: the keys before it stay in force. Messages never have a key,
also not in the quoted lines of a parser's error.
"""

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from yaml import MarkedYAMLError

from moefit.errors import ConfigError
from moefit.server.operation.request_id import Client
from moefit.yaml_text import RepeatedFieldError, load_yaml

COMMAND_LINE = "api-key"
"""Name of the key from `--api-key`."""
MAX_KEYS, MAX_FILE_BYTES = 1000, 1 << 20
_LARGEST = 10**12  # limit
_NAME = r"[A-Za-z0-9._-]{1,64}"
_FORM = "lines such as `keys: [{name: alice, key: KEY}]`"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A key's digest, its name, and what it allows.

    Attributes:
        name: Its name in logs and metrics.
        digest: SHA-256 of the key.
        operator: Whether it may change the budget, and see and cancel all requests.
        requests: Requests that may run or wait at once; None is any number.
        tokens_per_minute: Tokens of prompts and answers, on average; None is any number.
    """

    name: str
    digest: bytes
    operator: bool = False
    requests: int | None = None
    tokens_per_minute: int | None = None


def digest_of(key: str) -> bytes:
    """Return a key's digest; keys are random, so that a fast one does."""
    return hashlib.sha256(key.encode()).digest()


def check_key(key: str, where: str) -> None:
    """Raise ConfigError for a key that is empty or that clients could not send.

    Args:
        key: The key; not in the error.
        where: Where it is from, for the error.
    """
    better = "such as the output of `openssl rand -hex 16`"
    if key == "":
        raise ConfigError(f"{where} is empty and would admit everyone; give one, {better}")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(
            f"{where} has spaces, control characters or letters beyond ASCII, which clients "
            f"encode differently; give another, {better}"
        )


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    name: Annotated[str, Field(pattern=f"^{_NAME}$")]
    key: str | None = None
    sha256: str | None = None
    operator: bool = False
    requests: Annotated[int, Field(ge=1, le=_LARGEST)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1, le=_LARGEST)] | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    keys: Annotated[list[_Entry], Field(min_length=1, max_length=MAX_KEYS)]


def parse_keys(text: str) -> tuple[Key, ...]:
    """Return the keys in the text of a file.

    Raises:
        ConfigError: The text is not a list of keys. The error quotes nothing but names and fields.
    """
    try:
        value = load_yaml(text)
    except ConfigError as error:
        raise ConfigError(_yaml_problem(error)) from None  # the cause quotes lines of the file
    try:
        entries = _File.model_validate(value).keys
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        if first["type"] == "extra_forbidden":  # its name could be a key that lost its field
            place = ".".join(map(str, first["loc"][:-1])) or "the file"
            raise ConfigError(f"{place} has a field that is not known; it is {_FORM}") from None
        raise ConfigError(f"{place}: {first['msg']}; it is {_FORM}") from None
    keys = tuple(_key(one) for one in entries)
    _refuse_twins(keys)
    return keys


def _yaml_problem(error: ConfigError) -> str:
    cause = error.__cause__
    if isinstance(error, RepeatedFieldError):
        return f"a field occurs twice, in line {error.lines[0]} and {error.lines[1]}; it is {_FORM}"
    if isinstance(cause, MarkedYAMLError) and cause.problem_mark is not None:
        return f"line {cause.problem_mark.line + 1} is not YAML; it is {_FORM}"
    return f"it is not YAML, or too large; it is {_FORM}"


def _key(entry: _Entry) -> Key:
    where = f"the key {entry.name!r}"
    if (entry.key is None) == (entry.sha256 is None):
        raise ConfigError(f"{where} needs either `key` or its digest, `sha256`")
    if entry.key is not None:
        check_key(entry.key, where)
        digest = digest_of(entry.key)
    else:
        hexadecimal = (entry.sha256 or "").lower()
        if not _SHA256.fullmatch(hexadecimal):
            raise ConfigError(
                f"the sha256 of {entry.name!r} is not 64 hexadecimal digits; take those of "
                "`printf %s KEY | sha256sum`"
            )
        digest = bytes.fromhex(hexadecimal)
    return Key(
        name=entry.name,
        digest=digest,
        operator=entry.operator,
        requests=entry.requests,
        tokens_per_minute=entry.tokens_per_minute,
    )


def _refuse_twins(keys: Iterable[Key]) -> None:
    by_digest: dict[bytes, str] = {}
    names = {COMMAND_LINE}
    for key in keys:
        if key.name in names:
            raise ConfigError(f"two keys have the name {key.name!r}; names must differ")
        if (other := by_digest.get(key.digest)) is not None:
            raise ConfigError(f"{other!r} and {key.name!r} are the same key; keys must differ")
        names.add(key.name)
        by_digest[key.digest] = key.name


@dataclass(frozen=True, slots=True)
class _Signature:
    """What changes whenever a file is written or replaced."""

    inode: int
    size: int
    modified: int
    changed: int


def _read(path: Path) -> tuple[str, _Signature]:
    """Return a file's text, and its signature before it was read. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8", opener=_open_at_once) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ConfigError("it is not a regular file")
            if found.st_size > MAX_FILE_BYTES:
                raise ConfigError(f"it has more than {MAX_FILE_BYTES:,} bytes")
            return file.read(MAX_FILE_BYTES), _signature(found)
    except OSError as error:
        raise ConfigError(f"it cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:  # the error has the bytes
        raise ConfigError("it is not text in UTF-8") from None


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe without a writer would block


def _signature(found: os.stat_result) -> _Signature:
    return _Signature(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def read_keys(path: Path) -> tuple[Key, ...]:
    """Return the keys in a file.

    Raises:
        ConfigError: It cannot be read, or is not a list of keys.
    """
    return _load(path)[0]


def _load(path: Path) -> tuple[tuple[Key, ...], _Signature]:
    try:
        text, signature = _read(path)
        return parse_keys(text), signature
    except ConfigError as error:
        raise ConfigError(f"--keys-file {path}: {error}") from None


class Keys:
    """The keys in force. One thread reads the file again while others look keys up.

    Args:
        single: Key from the command line, if any; its holder is an operator.
        path: File with further keys, if any.

    Raises:
        ConfigError: If the file cannot be read or has a mistake.
    """

    def __init__(self, single: str | None = None, path: Path | None = None):
        self.path = path
        self._fixed = ()
        if single is not None:
            self._fixed = (Key(name=COMMAND_LINE, digest=digest_of(single), operator=True),)
        self._seen: _Signature | None = None
        from_file: tuple[Key, ...] = ()
        if path is not None:
            from_file, self._seen = self._load(path)
        self._keys = (*self._fixed, *from_file)  # replaced as a whole, never changed
        self.reloads = {"ok": 0, "failed": 0}

    @property
    def required(self) -> bool:
        """Whether requests need a key."""
        return self.path is not None or bool(self._fixed)

    @property
    def all(self) -> tuple[Key, ...]:
        """The keys in force."""
        return self._keys

    def by_name(self) -> Mapping[str, Key]:
        """Return the keys by name."""
        return {key.name: key for key in self._keys}

    def find(self, authorization: str | None) -> Key | None:
        """Return the key in an Authorization header, if it is one of ours.

        All digests are compared, each in constant time.
        """
        scheme, _, given = (authorization or "").partition(" ")
        digest, found = digest_of(given.strip()), None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found if scheme.lower() == "bearer" else None

    def client(self, authorization: str | None) -> Client | None:
        """Return who sent a request; None if it needs a key and has none of ours."""
        if not self.required:
            return Client()
        key = self.find(authorization)
        return None if key is None else Client(key=key.name, operator=key.operator)

    def _load(self, path: Path) -> tuple[tuple[Key, ...], _Signature]:
        """Read a file, none of whose keys may be that of the command line: it has other rights."""
        keys, signature = _load(path)
        fixed = {key.digest for key in self._fixed}
        if twin := next((key.name for key in keys if key.digest in fixed), None):
            raise ConfigError(
                f"--keys-file {path}: {twin!r} is the key of --api-key, which has its own rights; "
                "remove one of the two"
            )
        return keys, signature

    def changed(self) -> bool:
        """Return whether the file has been written or replaced since it was last read."""
        if self.path is None:
            return False
        try:
            return _signature(os.stat(self.path)) != self._seen
        except OSError:
            return self._seen is not None

    def reload(self) -> str:
        """Read the file again, and return what to say about it; after an error nothing changes."""
        assert self.path is not None, "only a file is read again"
        before = self.by_name()
        try:
            self._seen = _signature(os.stat(self.path))
        except OSError:
            self._seen = None  # told once
        try:
            made, self._seen = self._load(self.path)
        except ConfigError as error:
            self.reloads["failed"] += 1
            return f"warning: {error}; the {len(before)} keys before it stay in force"
        self._keys = (*self._fixed, *made)
        self.reloads["ok"] += 1
        return f"keys read again from {self.path}: {_difference(before, self.by_name())}"


def _difference(before: Mapping[str, Key], now: Mapping[str, Key]) -> str:
    parts: dict[str, list[Any]] = {
        "added": [name for name in now if name not in before],
        "removed": [name for name in before if name not in now],
        "changed": [name for name in now if name in before and now[name] != before[name]],
    }
    words = [f"{what} {', '.join(names[:20])}" for what, names in parts.items() if names]
    return f"{len(now)} in force" + "".join(f", {one}" for one in words)


def readable_by_others(path: Path) -> bool:
    """Return whether other users of this machine can read a file of keys."""
    try:
        return bool(os.stat(path).st_mode & stat.S_IROTH)
    except OSError:
        return False
