"""Score a model on local tasks by inference rule, with intervals.

    python benchmarks/task_scores.py MODEL DIR --tasks hellaswag,piqa [--save NAME]

DIR: with TASK.jsonl. The first --limit questions of each task are asked.
"""

import argparse
import json
from pathlib import Path

import record

from moefit.moe.routing import Rule
from moefit.tasks.paper import CHANCE
from moefit.tasks.rows import rows_of
from moefit.tasks.run import find_tasks, score_tasks
from moefit.tasks.scored_model import load_scored

RULES = ("dense", "top_k:4", "top_k:2", "threshold:0.48", "threshold:0.7")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--rule", action="append")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--out", type=Path, help="folder of answers, to continue from")
    parser.add_argument("--save", help="name of the record")
    given = parser.parse_args()
    tasks = find_tasks(given.tasks.split(","), given.data, limit=given.limit)
    found, asked = {}, {}
    with load_scored(given.model) as model:
        for rule in given.rule or RULES:
            how = {"rule": Rule.parse(rule), "out": given.out}
            (row,) = rows_of([score_tasks(model, tasks, **how)])
            asked = dict(row.questions)
            found[rule] = {
                "accuracy, percent": {
                    task: f"{value:.1f} ± {row.interval[task]:.1f}"
                    for task, value in row.accuracy.items()
                },
                "acc_norm, percent": {task: round(v, 1) for task, v in row.normalised.items()},
                "at chance within the interval": [
                    task
                    for task, value in row.accuracy.items()
                    if abs(value - CHANCE[task]) <= row.interval[task]
                ],
                "active parameters": row.active_parameters,
                "active share": row.active_share,
                "seconds": round(row.seconds, 1),
            }
    results = {"questions of each task": asked, "chance, percent": CHANCE, **found}
    print(json.dumps(results, indent=1))
    if given.save:
        notes = (
            f"{Path(given.model).name}: accuracy with half its 95% interval over the first "
            f"{given.limit} questions of each task, zero-shot, by lm-evaluation-harness. "
            "Active parameters are means over the tokens of all requests, without embeddings and "
            "head."
        )
        print(record.write(given.save, results, notes=notes))


if __name__ == "__main__":
    main()
