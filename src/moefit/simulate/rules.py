"""Which absent experts of a layer are fetched to the GPU; the others are computed where they lie.

Each rule is a function from costs and the absent experts' tokens to the number of experts that are
fetched, the hottest first. Plain Python; `layer_time` says what a division takes.
"""

from collections.abc import Callable, Sequence

from moefit.simulate.costs import Costs

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
    if costs.shared and there:
        far = _slowed(far, costs.far_read * len(there), copied, costs.shared)
    return gpu, far + costs.activations * sum(there)


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
    return min(
        range(len(absent) + 1), key=lambda number: max(layer_time(costs, absent, resident, number))
    )


RULES: dict[str, Rule] = {
    "fetch-all": fetch_all,
    "compute-all": compute_all,
    "monde": monde,
    "fiddler": fiddler,
    "balanced": balanced,
    "search": search,
}
