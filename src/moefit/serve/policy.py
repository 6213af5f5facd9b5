"""What happens when an expert is not resident, as one record.

Owns which modes and methods there are, and their bounds. Knows nothing of who carries them out.
"""

from dataclasses import dataclass, replace
from math import inf
from typing import Any, Literal, TypeGuard, get_args

from moefit.errors import ConfigError

Mode = Literal["exact", "bounded", "virtual"]
Method = Literal["substitute", "prior"]
Update = Literal["manager", "fixed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What happens when an expert is not resident. One for all blocks, changed as a whole.

    - `mode` for steps of one token a sequence, `prefill` for longer ones.
    - bounded: at most `bound` of a token's router weight is substituted, never its `protected`
      best experts; `method` prior raises residents' scores by `bonus` times their spread instead.
    - `ramp` spreads the bound over the depth, for what goes wrong early goes on through all blocks
      behind: 0 is `bound` everywhere, 1 from nothing in front to twice as much at the end.
    - `keep_mass` scales a token's changed weights to the sum of the router's own choice; where a
      family normalises its weights, that is so anyway.
    - exact: an expert with at least the share `refetch` of a token's router weight is computed from
      a better copy where its slot's format is worse; None is never. Steps of one token a sequence
      alone do so, for in longer ones every expert has such a token.
    - `residency` fixed keeps the resident set as it is, so that evaluation can be repeated: what
      is fetched then goes when the step ends.
    """

    mode: Mode = "exact"
    prefill: Mode = "exact"
    bound: float = 0.3
    ramp: float = 1.0
    protected: int = 1
    method: Method = "substitute"
    bonus: float = 0.2
    residency: Update = "manager"
    keep_mass: bool = True
    refetch: float | None = None

    def changed(self, mode: Mode, **settings: Any) -> "Policy":
        """This policy in another mode, with any other of its settings changed.

        `prefill` follows the mode unless given: virtual prefills virtually, the others exactly.
        Raises ConfigError for an unknown setting or value.
        """
        settings.setdefault("prefill", "virtual" if mode == "virtual" else "exact")
        try:
            policy = replace(self, mode=mode, **settings)
        except TypeError as error:
            known = ", ".join(Policy.__slots__)
            raise ConfigError(f"{sorted(settings)}: unknown setting; there are {known}") from error
        policy.check()
        return policy

    def check(self) -> None:
        """Raise ConfigError for a value that does not exist or cannot be."""
        choices = {"mode": Mode, "prefill": Mode, "method": Method, "residency": Update}
        for name, kind in choices.items():
            if (value := getattr(self, name)) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ConfigError(f"{name}={value!r} is not one of {known}")
        if not _is_number(self.bound) or not 0 <= self.bound <= 1:
            raise ConfigError(f"bound={self.bound!r}, but it is a share of router weight, 0 to 1")
        if not _is_number(self.ramp) or not 0 <= self.ramp <= 1:
            raise ConfigError(f"ramp={self.ramp!r}, but it is 0 to 1")
        if type(self.protected) is not int or self.protected < 0:
            raise ConfigError(f"protected={self.protected!r}, but it counts experts, 0 or more")
        if not _is_number(self.bonus) or not 0 <= self.bonus < inf:
            raise ConfigError(f"bonus={self.bonus!r}, but it is a number, 0 or more")
        check_refetch(self.refetch)

    def bound_at(self, depth: float) -> float:
        """The bound of a block at `depth`, 0 to 1; over all blocks its mean is `bound`.

        >>> Policy(bound=0.25, ramp=1.0).bound_at(0.75)
        0.375
        """
        return min(1.0, self.bound * (1 + self.ramp * (2 * depth - 1)))


def check_refetch(share: object) -> None:
    """Raise ConfigError for what is no share of a token's router weight; None is fine."""
    if share is None or (_is_number(share) and not isinstance(share, bool) and 0 < share <= 1):
        return
    raise ConfigError(
        f"refetch={share!r}, but it is the share of a token's router weight from which on an "
        "expert is read again in a better format: above 0, 1 at most; leave it out for never"
    )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float)
