"""Questions in a folder, and that a model reads the same text as with lm-eval's own tasks."""

import json
import re
import warnings
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs moefit[tasks]")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lm_eval.tasks
    from datasets import Dataset, DatasetDict
    from lm_eval.tasks import TaskManager

    from moefit.tasks.run import find_tasks
from moefit.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore")
ANSWERS = {"text": ["a cat", "two dogs"], "label": ["A", "B"]}
ARC = {"question": "What barks?", "choices": ANSWERS, "answerKey": "B"}
LOCAL_ARC = {"query": "Question: What barks?", "choices": ANSWERS["text"], "gold": 1}
STOCK = {  # a question as on the Hub, the same question in a local file, and lm-eval's definition
    "arc_easy": (ARC, LOCAL_ARC, "arc/arc_easy.yaml"),
    "arc_challenge": (ARC, LOCAL_ARC, "arc/arc_challenge.yaml"),
    "piqa": (
        {"goal": "Open it", "sol1": "push", "sol2": "pull", "label": 1},
        {"query": "Question: Open it\n", "choices": ["push", "pull"], "gold": 1},
        "piqa/piqa.yaml",
    ),
    "sciq": (
        {"support": "Cats purr.", "question": "What purrs?", "distractor1": "dogs",
         "distractor2": "cows", "distractor3": "bees", "correct_answer": "cats"},
        {"query": "Cats purr.\nQuestion: What purrs?", "choices": ["dogs", "cows", "bees", "cats"],
         "gold": 3},
        "sciq/sciq.yaml",
    ),
    "hellaswag": (
        {"activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "label": "1",
         "endings": ["stands up.", "falls  down [step] fast."]},
        {"query": "Roof: A man sits. He", "choices": ["stands up.", "falls down fast."],
         "gold": 1},
        "hellaswag/hellaswag.yaml",
    ),
    "winogrande": (
        {"sentence": "Ann met Eve so _ smiled at her.", "option1": "Ann", "option2": "Eve",
         "answer": "2"},
        {"context_options": ["Ann met Eve so Ann", "Ann met Eve so Eve"],
         "continuation": "smiled at her.", "gold": 1},
        "winogrande/default.yaml",
    ),
}  # fmt: skip


def requests(task) -> tuple[list[tuple[str, str]], object]:
    """Return contexts and continuations, and the right choice."""
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests()
    doc = task.instances[0].doc
    right = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    return [one.args for one in task.instances], right


@pytest.mark.parametrize("name", STOCK)
def test_a_local_task_is_lm_evals_own(name, tmp_path):
    on_hub, local, path = STOCK[name]
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(local) + "\n\n")
    tasks = find_tasks([name], tmp_path)
    own = tasks.manager.load(list(tasks.specs))["tasks"][name]
    rows = Dataset.from_list([on_hub])
    data = DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))
    yaml = Path(lm_eval.tasks.__file__).parent / path
    manager = TaskManager(include_path=str(yaml.parent), include_defaults=False)
    changed = {"custom_dataset": lambda **_: data}
    stock = manager._factory.build(manager._entry(name), overrides=changed, registry=manager._index)
    assert requests(own) == requests(stock)


def test_missing_questions_say_where_to_put_them(tmp_path):
    (tmp_path / "piqa.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"'sciq' \(it has: piqa\); put them into .*sciq\.jsonl"):
        find_tasks(["sciq"], tmp_path)
    with pytest.raises(DataError, match=re.escape(r'{"query": "SUPPORT\nQuestion: QUESTION", ')):
        find_tasks(["sciq"], tmp_path)
    with pytest.raises(DataError, match=r'one a line as \{"context_options"'):
        find_tasks(["winogrande"], tmp_path)


def test_a_file_is_no_folder(tmp_path):
    file = tmp_path / "piqa.jsonl"
    file.write_text("{}")
    with pytest.raises(DataError, match=r"is not a folder; give the folder that has piqa\.jsonl"):
        find_tasks(["piqa"], file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("not json", "line 1 of .* is not JSON"),
        ('{"query": "a"}', "needs query, choices, gold, or context_options"),
        ("[]", "is not a question"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "two or more texts"),
        ('{"query": "a", "choices": ["b", 3], "gold": 0}', "two or more texts"),
        ('{"query": 1, "choices": ["b", "c"], "gold": 0}', "one text beside"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "gold 2, but its choices are 0 to 1"),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}', "gold True"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 1.0}', r"gold 1\.0"),
        ('{"query": "a", "choices": ["b", ""], "gold": 0}', "an empty answer"),
        ('{"context_options": ["a", "b"], "continuation": " ", "gold": 0}', "an empty answer"),
        (
            '{"query": "a", "choices": ["b", "c"], "gold": 0}\n'
            '{"context_options": ["a", "b"], "continuation": "c", "gold": 0}',
            "both forms",
        ),
    ],
)
def test_damaged_questions_are_named(tmp_path, text, message):
    (tmp_path / "piqa.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        find_tasks(["piqa"], tmp_path)


def test_a_question_of_digits_is_a_text(tmp_path):
    line = {"query": "1", "choices": ["a", "b"], "gold": 1}
    (tmp_path / "hellaswag.jsonl").write_text(json.dumps(line))
    tasks = find_tasks(["hellaswag"], tmp_path)
    made, right = requests(tasks.manager.load(list(tasks.specs))["tasks"]["hellaswag"])
    assert made == [("1", " a"), ("1", " b")] and right == 1


def test_solved_questions_are_others(tmp_path):
    """They come from a file of their own, and not from the questions that are scored."""
    asked = [{"query": f"q{i}", "choices": ["a", "b"], "gold": 0} for i in range(3)]
    (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, asked)))
    with pytest.raises(DataError, match=r"--few-shot 1 needs .*piqa\.train\.jsonl"):
        find_tasks(["piqa"], tmp_path, few_shot=1)
    solved = tmp_path / "piqa.train.jsonl"
    solved.write_text(json.dumps({"query": "s", "choices": ["c", "d"], "gold": 1}))
    with pytest.raises(DataError, match="give --few-shot 1"):
        find_tasks(["piqa"], tmp_path, few_shot=2)
    tasks = find_tasks(["piqa"], tmp_path, few_shot=1)
    task = tasks.manager.load(list(tasks.specs))["tasks"]["piqa"]
    task.set_config(key="num_fewshot", value=1)
    task.set_fewshot_seed(0)
    task.build_all_requests()
    contexts = {one.args[0] for one in task.instances}
    assert contexts == {f"s\nAnswer: d\n\nq{i}\nAnswer:" for i in range(3)}
    solved.write_text('{"context_options": ["a", "b"], "continuation": "c", "gold": 0}')
    with pytest.raises(DataError, match="of another form"):
        find_tasks(["piqa"], tmp_path, few_shot=1)


def test_names_are_not_paths(tmp_path):
    (tmp_path / "piqa.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"'\.\./piqa' cannot name a task"):
        find_tasks(["../piqa"], tmp_path / "inner")


def test_no_tasks(tmp_path):
    with pytest.raises(ConfigError, match="no tasks are given"):
        find_tasks([], tmp_path)


@pytest.mark.slow  # reads all of lm-eval's definitions
def test_unknown_tasks_name_the_nearest():
    with pytest.raises(ConfigError, match="no task 'helaswag'; the nearest is 'hellaswag'"):
        find_tasks(["helaswag"])
