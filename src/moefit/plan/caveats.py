"""What a profile says that its plans should be taken with: where a model takes approximation
badly, and where its times say little.

Owns the remarks. Knows nothing of what is planned.
"""

import math

from moefit.plan.chosen import quality_samples
from moefit.plan.fitting import Held
from moefit.plan.profile import Profile, machine
from moefit.plan.promise import DEFAULT_LOSS
from moefit.plan.samples import Sample

_UNSURE = 0.3  # twice what predictions of speed are off by where nothing else runs


def caveats(profile: Profile, experts: float, device: str, speed: Held) -> list[str]:
    """Remarks, each a line. experts: that a token uses, in the mean over blocks. speed: what its
    predictions are worth.
    """
    samples = quality_samples(profile)
    dear = [
        _dear(mode, some, profile, experts)
        for mode in ("bounded", "virtual")
        if (some := [one for one in samples if one.configuration.mode == mode])
    ]
    return [one for one in (_foreign(profile, device), _unsure(speed), *dear) if one is not None]


def _dear(mode: str, samples: list[Sample], profile: Profile, experts: float) -> str | None:
    mild = min(samples, key=lambda one: one.divergence)
    loss = math.expm1(mild.divergence)
    if loss <= DEFAULT_LOSS:
        return None
    share = mild.configuration.slots / sum(profile.experts.values())
    return (
        f"mode {mode} is expensive for this model: even with {share:.0%} of the experts in memory "
        f"it was measured to lose {loss:.1%} of perplexity, moving {mild.moved:.1%} of router "
        f"weight; it uses {experts:.1f} experts a token and block"
    )


def _unsure(speed: Held) -> str | None:
    if speed.median <= _UNSURE:
        return None
    return (
        f"speeds are not to be relied on: half of those that were measured differ by more than "
        f"{speed.median:.0%} from what the others predict, as where a machine is busy with other "
        "things; moefit profile --again on an idle one measures times anew"
    )


def _foreign(profile: Profile, device: str) -> str | None:
    then, now = profile.facts.machine, machine(device)
    differing = [
        f"{name} was {then.get(name)}, is {value}"
        for name, value in now.items()
        if then.get(name) != value
    ]
    if not differing:
        return None
    return (
        f"the profile was measured on another machine ({'; '.join(differing)}), so speeds will "
        "differ; moefit profile on this one measures them"
    )
