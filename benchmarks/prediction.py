"""Record how well a model's next experts are predicted on a text, by layer and distance.

    python benchmarks/prediction.py reference --text code.py --slots 5 8 [--record]

The same measurement as `moefit bench --predict`, with a number of slots per layer instead of a
budget: recall among the first K and 2K, precision of confident guesses, and the share of missing
experts that they cover, beside usage counts, the previous token's experts and an oracle.
"""

import argparse
from pathlib import Path

import record
import torch

import moefit
from moefit.api import folder_of
from moefit.evaluate.prediction import measure_prediction, total
from moefit.serve.config import BlockPlacement
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.prediction.probes import DEPTHS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--slots", type=int, nargs="+", default=[5, 8])
    parser.add_argument("--tokens", type=int, default=528, help="16 of a window are its prompt")
    parser.add_argument("--context", type=int, default=264)
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    text = given.text.read_text(encoding="utf-8", errors="replace")[: 8 * given.tokens]
    names = [one.name for one in build_skeleton(folder_of(given.model)).blocks]
    results, about = [], {}
    for slots in given.slots:
        placement = dict.fromkeys(names, BlockPlacement(slots=slots, formats=("native",)))
        how = {"prefetch": "on", "context": given.context, "placement": placement}
        with moefit.load(given.model, **how, probe_depth=DEPTHS) as served:
            ids_T = torch.tensor(served.tokenizer(text)["input_ids"][: given.tokens])
            found = measure_prediction(served, ids_T)
            about = served.prefetching.probes.as_dict()
        results.append({"slots_per_layer": slots} | found.as_dict())
        for ahead, layers in found.layers.items():
            print(slots, "slots,", ahead, "ahead:", total(layers).as_dict(), flush=True)
        for ahead, layers in found.probes.items():
            print(slots, "slots, probes,", ahead, "ahead:", total(layers).as_dict(), flush=True)
        for name, one in found.baselines.items():
            print(slots, "slots,", name, one.as_dict(), flush=True)
    if given.record:
        notes = (
            f"{Path(given.model).name}, {given.tokens} tokens of {given.text.name}, decoded one by "
            "one; nothing is read early, so that all missing experts count."
        )
        if about:
            notes += f" Probes fitted on {about['tokens']:,} tokens of {about['text']}."
        print(record.write("prediction", results, notes=notes))


if __name__ == "__main__":
    main()
