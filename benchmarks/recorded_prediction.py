"""Measure what saved use counts tell of the experts that are chosen next, on recorded routing.

    python benchmarks/recorded_prediction.py mmlu_dev.npz tulu3_persona_if.npz [--record]

The first recording stands for earlier runs, whose counts are saved; the others are served after a
restart. Recordings are .npz files as of `moefit simulate`: `experts` [tokens, layers, K] and
`seq_ptr`. Each sequence is decoded token by token, the first ones as its prompt.

*Prediction.* Experts are ranked by saved counts, by the counts of the sequence so far, by both
(saved ones count as `--weight` tokens), by the last token's choice, and by an oracle.
Recall is the share of a layer's chosen experts among the first K and 2K; precision that of guesses
with a share of uses of at least a half. Misses are chosen experts that the slots do not hold, with
the policy that a server has.

*Warm start.* The share of chosen experts that are in memory within the first tokens of each
sequence, with slots that begin with the experts used most in the saved counts, with any experts
(the first ones), and with those that this sequence will use most.
"""

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import record
from numpy.typing import NDArray

from moefit.serve.cache.eviction import DEFAULT_POLICY, POLICIES

PROMPT = 16  # tokens
CONFIDENT = 0.5
SAVED, SEQUENCE, BOTH, LAST, ORACLE = "saved", "sequence", "saved and sequence", "last", "oracle"
HORIZONS = (4, 16, 64, 256)  # tokens since the start
WARM, ANY, HINDSIGHT = "warm", "any experts", "hindsight"

Ids = NDArray[np.integer]


def sequences(path: Path) -> list[Ids]:
    with np.load(path) as arrays:
        experts, ends = arrays["experts"], arrays["seq_ptr"]
        return [experts[a:b] for a, b in pairwise(ends) if b - a > PROMPT]


def counted(ids_NLK: Ids, num_experts: int) -> NDArray[np.float64]:
    """Return by layer and expert the share of tokens that chose it."""
    layers = ids_NLK.shape[1]
    shares = [np.bincount(ids_NLK[:, at].ravel(), minlength=num_experts) for at in range(layers)]
    return np.stack(shares) / len(ids_NLK)


class Slots:
    """The slots of one layer, with the policy of a server."""

    def __init__(self, held: Sequence[int]):
        self.held, self._policy = set(held), POLICIES[DEFAULT_POLICY]()

    def use(self, chosen: Sequence[int]) -> set[int]:
        """Take what a token chose; return what was missing."""
        self._policy.observe(dict.fromkeys(chosen, 1.0))
        missing = set(chosen) - self.held
        for expert in sorted(missing):
            self.held.remove(self._policy.victim(self.held, chosen))
            self.held.add(expert)
        return missing


def best(scores_E: Any, number: int) -> list[int]:
    return np.argsort(-np.asarray(scores_E), kind="stable")[:number].tolist()


class Count:
    """Sums over layers and tokens."""

    def __init__(self) -> None:
        self.chosen = self.found = self.twice = self.missing = self.covered = 0
        self.confident = self.right = 0

    def add(self, score_E: Any, chosen: Sequence[int], missing: set[int], sure_E: Any) -> None:
        """Compare a ranking with a choice; `sure_E` marks confident guesses."""
        first = best(score_E, 2 * len(chosen))
        once = set(first[: len(chosen)])
        sure = set(np.flatnonzero(sure_E).tolist())
        self.chosen += len(chosen)
        self.found += len(once & set(chosen))
        self.twice += len(set(first) & set(chosen))
        self.missing += len(missing)
        self.covered += len(once & missing)
        self.confident += len(sure)
        self.right += len(sure & set(chosen))

    def shares(self) -> dict[str, float | None]:
        return {
            "recall": self.found / self.chosen,
            "recall_2k": self.twice / self.chosen,
            "precision": self.right / self.confident if self.confident else None,
            "misses": self.missing / self.chosen,
            "misses_covered": self.covered / self.missing if self.missing else None,
        }


def predicted(texts: Sequence[Ids], saved_LE: Any, slots: int, weight: float) -> dict[str, Any]:
    """Return how well each ranking predicts, over all layers and texts."""
    counts = {name: Count() for name in (SAVED, SEQUENCE, BOTH, LAST, ORACLE)}
    layers, experts = saved_LE.shape
    for ids_TLK in texts:
        for layer in range(layers):
            held = Slots(best(saved_LE[layer], slots))
            own_E, last_E = np.zeros(experts), np.zeros(experts)
            for token, chosen in enumerate(ids_TLK[:, layer].tolist()):
                missing = held.use(chosen)
                if token >= PROMPT:
                    both_E = (weight * saved_LE[layer] + own_E) / (weight + token)
                    true_E = np.zeros(experts)
                    true_E[chosen] = 1
                    for name, score_E in (
                        (SAVED, saved_LE[layer]), (SEQUENCE, own_E / token), (BOTH, both_E),
                        (LAST, last_E), (ORACLE, true_E),
                    ):  # fmt: skip
                        counts[name].add(score_E, chosen, missing, score_E >= CONFIDENT)
                last_E[:] = 0
                last_E[chosen] = 1
                own_E[chosen] += 1
    return {name: one.shares() for name, one in counts.items()}


def warmed(texts: Sequence[Ids], saved_LE: Any, slots: int) -> dict[str, dict[str, float]]:
    """Return the share of chosen experts in memory, by what slots begin with and tokens since."""
    layers, experts = saved_LE.shape
    hits = {name: np.zeros(max(HORIZONS)) for name in (WARM, ANY, HINDSIGHT)}
    chosen_N = np.zeros(max(HORIZONS))
    for ids_TLK in texts:
        part_TLK = ids_TLK[: max(HORIZONS)]
        ahead_LE = counted(part_TLK, experts)
        chosen_N[: len(part_TLK)] += part_TLK[0].size
        for layer in range(layers):
            begins = (best(saved_LE[layer], slots), range(slots), best(ahead_LE[layer], slots))
            for name, begin in zip(hits, begins, strict=True):
                held = Slots(list(begin))
                for token, chosen in enumerate(part_TLK[:, layer].tolist()):
                    hits[name][token] += len(chosen) - len(held.use(chosen))
    return {
        name: {str(n): float(one[:n].sum() / chosen_N[:n].sum()) for n in HORIZONS}
        for name, one in hits.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("earlier", type=Path, help="recording whose counts are saved")
    parser.add_argument("texts", type=Path, nargs="+", help="recordings that are served")
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 12, 16])
    parser.add_argument("--sequences", type=int, default=8, help="most, of each recording")
    parser.add_argument("--tokens", type=int, default=256, help="most, of each sequence")
    parser.add_argument(
        "--weight", type=float, default=32, help="tokens that saved counts are worth"
    )
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    earlier = np.concatenate(sequences(given.earlier))
    num_experts = int(earlier.max()) + 1
    saved_LE, results = counted(earlier, num_experts), []
    for path in given.texts:
        texts = [one[: given.tokens] for one in sequences(path)[: given.sequences]]
        for slots in given.slots:
            found = {
                "text": path.stem,
                "sequences": len(texts),
                "tokens": sum(map(len, texts)),
                "slots": slots,
                "experts": num_experts,
                "prediction": predicted(texts, saved_LE, slots, given.weight),
                "in_memory": warmed(texts, saved_LE, slots),
            }
            results.append(found)
            print(path.stem, slots, "slots")
            for part in ("prediction", "in_memory"):
                for name, one in found[part].items():
                    print(f"  {name}:", {k: v and round(v, 3) for k, v in one.items()})
    if given.record:
        notes = (
            f"Counts of {given.earlier.stem} ({len(earlier)} tokens); recorded routing, no model "
            "was computed. Shares over all layers; prediction after 16 tokens of a sequence."
        )
        print(record.write("recorded-prediction", results, notes=notes))


if __name__ == "__main__":
    main()
