"""Which absent experts of a layer are fetched to the GPU; the others are computed where they lie.

Each rule is a function from costs and the absent experts' tokens to the number of experts that are
fetched, the hottest first. Plain Python; `layer_time` says what a division takes, `layer_times` the
same of all of them at once. Steps of a served model and `moefit simulate` use the same rules.
"""

from collections.abc import Callable, Sequence

from moefit.errors import ConfigError
from moefit.serve.hybrid.costs import Costs

Rule = Callable[[Costs, Sequence[int], Sequence[int]], int]
"""(costs, tokens of absent experts in descending order, tokens of resident ones) -> fetched."""


def layer_time(
    costs: Costs, absent: Sequence[int], resident: Sequence[int], fetched: int
) -> tuple[float, float]:
    """Return the times of the GPU and of the far side; a layer takes the longer one.

    The GPU computes residents first, then each fetched expert once it has arrived, so that copies
    and computation overlap. The far side computes the others one after the other, and their tokens
    travel both ways. Where copies share the far side's memory, it reads slower while they last.

    Args:
        costs: Of the experts.
        absent: Tokens of absent experts, in descending order.
        resident: Tokens of experts on the GPU.
        fetched: Number of absent experts that are fetched, the first ones.
    """
    gpu = sum(map(costs.on_gpu, resident))
    copied = 0.0
    for tokens in absent[:fetched]:
        copied += costs.load
        gpu = max(gpu, copied) + costs.on_gpu(tokens)
    there = absent[fetched:]
    far = sum(map(costs.on_far_side, there))
    if not there:
        return gpu, 0.0
    if costs.shared:
        far = _slowed(far, costs.far_read * len(there), copied, costs.shared)
    return gpu, costs.start + far + costs.activations * sum(there)


def layer_times(
    costs: Costs, absent: Sequence[int], resident: Sequence[int]
) -> list[tuple[float, float]]:
    """Return `layer_time` of each number of fetched experts, 0 to all, in linear time."""
    gpu, copied = sum(map(costs.on_gpu, resident)), 0.0
    times = [costs.on_far_side(tokens) for tokens in absent]
    far, tokens_there = sum(times), sum(absent)
    found = list[tuple[float, float]]()
    for fetched in range(len(absent) + 1):
        there, time = len(absent) - fetched, far
        if costs.shared:
            time = _slowed(far, costs.far_read * there, copied, costs.shared)
        far_time = costs.start + time + costs.activations * tokens_there if there else 0.0
        found.append((gpu, far_time))
        if there:
            copied += costs.load
            gpu = max(gpu, copied) + costs.on_gpu(absent[fetched])
            far, tokens_there = far - times[fetched], tokens_there - absent[fetched]
    return found


def _slowed(alone: float, reading: float, copied: float, share: float) -> float:
    """Return the far side's time beside a copy of `copied` that takes a share of its bandwidth.

    Reading goes on at 1 - share of its speed until the copy ends, then at full speed. What the far
    side does besides reading is not slowed down.
    """
    slow = copied * (1 - share)  # reading done while the copy lasts
    slowed = reading / (1 - share) if reading <= slow else copied + reading - slow
    return max(alone, alone - reading + slowed)


def fetch_all(costs: Costs, absent: Sequence[int], resident: Sequence[int]) -> int:
    """Fetch every absent expert: offloading on demand."""
    del costs, resident
    return len(absent)


def compute_all(costs: Costs, absent: Sequence[int], resident: Sequence[int]) -> int:
    """Fetch none."""
    del costs, absent, resident
    return 0


def monde(costs: Costs, absent: Sequence[int], resident: Sequence[int]) -> int:
    """Return MoNDE's closed form, H = B_link / (B_far + B_link) of the active experts.

    The bandwidths are those at which an expert is loaded and read. Source: arXiv 2405.18832 with
    its correction factor 1; it assumes separate memories and no fixed costs.
    """
    del resident
    read = costs.far_read or costs.far[0]
    return round(read / (read + costs.load) * len(absent))


def fiddler(costs: Costs, absent: Sequence[int], resident: Sequence[int]) -> int:
    """Return how many experts take longer where they lie than their copy and the GPU.

    Source: Fiddler (arXiv 2402.07033) decides for each expert by itself, which minimises the sum of
    both sides' times, not the longer one.
    """
    del resident
    return sum(
        costs.on_far_side(tokens) + costs.activations * tokens > costs.load + costs.on_gpu(tokens)
        for tokens in absent
    )


def balanced(costs: Costs, absent: Sequence[int], resident: Sequence[int]) -> int:
    """Return q = m B_link / B_far of m experts, rounded to the shorter time of the longer side.

    Source: q* of arXiv 2608.16157, max(q S / B_link, (m - q) S / (B_far - B_link)) for bandwidths
    that share a memory; with separate ones, the far side keeps all of its own.
    """
    del resident
    read, number = costs.far_read or costs.far[0], len(absent)
    if not read:
        return 0
    left = read / (1 - costs.shared)
    exact = number * left / (left + costs.load)
    whole = int(exact)
    options = (whole, min(whole + 1, number))
    return min(options, key=lambda q: max(q * costs.load, (number - q) * left))


def search(costs: Costs, absent: Sequence[int], resident: Sequence[int]) -> int:
    """Return the best of all numbers by `layer_time`, as DynaNDE's simulator does."""
    times = layer_times(costs, absent, resident)
    return min(range(len(times)), key=lambda number: max(times[number]))


RULES: dict[str, Rule] = {
    "fetch-all": fetch_all,
    "compute-all": compute_all,
    "monde": monde,
    "fiddler": fiddler,
    "balanced": balanced,
    "search": search,
}

AUTO_COMPUTE, FETCH_ALL, BEST = "auto", "fetch-all", "search"
HOST_COMPUTE = (AUTO_COMPUTE, *RULES)
"""Values of the setting `host_compute`; `auto` is the best rule."""


def check_host_compute(name: str, *, on_cpu: bool) -> None:
    """Raise ConfigError for an unknown rule, or for one on a CPU."""
    if name not in HOST_COMPUTE:
        raise ConfigError(f"host_compute={name!r} is not one of {', '.join(HOST_COMPUTE)}")
    if on_cpu and name != AUTO_COMPUTE:
        raise ConfigError(
            f"host_compute={name!r} divides misses between a GPU and the host, but the device is a "
            "CPU, which computes all experts where they lie; leave it out, or serve on a GPU "
            "(device cuda)"
        )
