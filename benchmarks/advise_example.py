"""What should be trained with 1e21 FLOPs, to be served in 12 GiB of a laptop at 10 tokens/s?

    python benchmarks/advise_example.py [--save NAME]

The laptop has two channels of DDR5-5600, so 89.6 GB/s by the standard (JESD79-5), of which moefit's
kernels are taken to reach `REACHED`; its speeds are an estimate, not a measurement. With --save,
the answer and its picture are records.
"""

import argparse

import record
from rich.console import Console

from moefit.advise.hardware import Device
from moefit.advise.laws import DEFAULT, find_law
from moefit.advise.recommend import advise
from moefit.advise.search import Question
from moefit.advise.serving import Limits
from moefit.cli.advise.tables import draw_front, print_advice

PEAK, REACHED = 89.6e9, 0.4
LAPTOP = Device(
    name="laptop",
    memory=16 << 30,
    bandwidth=PEAK * REACHED,
    flops=5e11,
    source=f"two channels of DDR5-5600, of which {REACHED:.0%} are reached",
    is_gpu=False,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", metavar="NAME")
    arguments = parser.parse_args()
    question = Question(
        law=find_law(DEFAULT),
        flops=1e21,
        device=LAPTOP,
        limits=Limits(memory=12 << 30, min_speed=10.0),
    )
    advice = advise(question)
    print_advice(Console(width=100), advice)
    if arguments.save:
        answer = advice.as_dict()
        del answer["front"]  # in the picture
        notes = "predictions of a scaling law and of a memory-bound cost; nothing was measured"
        path = record.write("advise-example", answer, notes=notes, suffix=arguments.save)
        draw_front(advice, path.with_suffix(".png"))
        print(path)


if __name__ == "__main__":
    main()
