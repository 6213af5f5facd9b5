"""Scores on tasks, compared with lm-evaluation-harness's own backend."""

import json
import warnings

import pytest

pytest.importorskip("lm_eval", reason="needs moefit[tasks]")
pytest.importorskip("accelerate", reason="lm-eval's hf backend needs it")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lm_eval.api.instance import Instance
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from moefit.tasks.answers import AnswerFile, digest
    from moefit.tasks.lm import MoefitLM
    from moefit.tasks.run import find_tasks, score_tasks
    from moefit.tasks.scored_model import load_scored
from moefit.dsmoe.card import model_card
from moefit.errors import CheckpointError, ConfigError
from moefit.evaluate.loading import load_full_model
from moefit.moe.routing import Rule, active_experts
from moefit.tasks.rows import KEY, read_rows, rows_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval and what it imports
RULES = ("dense", "top_k:2", "threshold:0.8")


@pytest.fixture(scope="module")
def tasks(task_data):
    return find_tasks(["arc_easy", "hellaswag", "winogrande"], task_data)


@pytest.fixture(scope="module")
def scored(dsmoe_folder):
    with load_scored(str(dsmoe_folder)) as found:
        yield found


@pytest.fixture(scope="module")
def backends(dsmoe_folder, tasks):
    """lm-eval's results by rule, with its `hf` backend on the same model."""
    model, tokenizer = load_full_model(str(dsmoe_folder))
    found = {}
    for rule in RULES:
        model.set_inference_rule(rule)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        found[rule] = simple_evaluate(
            lm, tasks=list(tasks.specs), task_manager=tasks.manager, bootstrap_iters=1
        )
    return found


def choices(result) -> dict:
    """Return each question's log-likelihoods, in order."""
    return {
        (task, one["doc_id"]): [
            float(resp[0][0] if isinstance(resp[0], (tuple, list)) else resp[0])
            for resp in one["resps"]
        ]
        for task, samples in result["samples"].items()
        for one in samples
    }


def assert_same(result, expected) -> None:
    own, other = choices(result), choices(expected)
    assert own.keys() == other.keys() and len(own) == 14
    for key, values in own.items():
        assert values == pytest.approx(other[key], abs=1e-4), key
        assert values.index(max(values)) == other[key].index(max(other[key])), key
    for task, scores in expected["results"].items():
        for metric in ("acc,none", "acc_norm,none", "acc_stderr,none"):
            assert result["results"][task].get(metric) == scores.get(metric), (task, metric)


@pytest.mark.parametrize("rule", RULES)
def test_scores_are_those_of_the_hf_backend(scored, tasks, backends, rule):
    result = score_tasks(scored, tasks, rule=Rule.parse(rule), batch_size=5, samples=True)
    assert_same(result, backends[rule])
    assert result[KEY]["rule"] == rule


def test_rules_differ(backends):
    """Otherwise the comparison above would not show that the rule is used."""
    values = [choices(backends[rule]) for rule in RULES]
    assert values[0] != values[1] != values[2]


def test_a_served_model_gives_the_same_scores(dsmoe_folder, tasks, backends):
    with load_scored(str(dsmoe_folder), mode="exact", context=128) as scored:
        result = score_tasks(scored, tasks, rule=Rule.parse("top_k:2"), samples=True)
    assert_same(result, backends["top_k:2"])


def test_active_parameters_are_counted_over_all_requests(scored, tasks):
    rule = Rule.parse("threshold:0.8")
    result = score_tasks(scored, tasks, rule=rule, samples=True)[KEY]
    model, sums, tokens = scored.model, [0.0, 0.0], 0
    for texts in requests_of(tasks):
        ids = scored.tokenizer("".join(texts), return_tensors="pt")["input_ids"][:, :-1]
        output = model(input_ids=ids, output_router_logits=True)
        tokens += ids.numel()
        for kind, name in enumerate(("router_logits", "attention_router_logits")):
            layers = [active_experts(one.flatten(0, -2).softmax(-1), rule) for one in output[name]]
            sums[kind] += sum(float(one.sum()) for one in layers) / len(layers)
    means = [one / tokens for one in sums]
    assert result["tokens"] == tokens
    assert [result["mlp_experts"], result["attention_experts"]] == pytest.approx(means, rel=1e-5)
    assert 1 < means[0] < model.config.num_experts and 1 < means[1] < 2
    assert result["active_parameters"] == model_card(model.config).active(rule, *means)


def requests_of(tasks) -> list[tuple[str, str]]:
    """Return the context and continuation of every request."""
    found = []
    for task in tasks.manager.load(list(tasks.specs))["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests()
        found += [one.args for one in task.instances]
    return found


def test_an_interrupted_run_continues(scored, tasks, tmp_path, monkeypatch):
    expected = score_tasks(scored, tasks, rule=Rule.parse("top_k:2"), batch_size=4)
    answer, sizes = type(scored).answer, []

    def failing(self, requests):
        if len(sizes) == 3:
            raise KeyboardInterrupt
        sizes.append(len(requests))
        return answer(self, requests)

    how = {"rule": Rule.parse("top_k:2"), "batch_size": 4, "out": tmp_path}
    with monkeypatch.context() as patch:
        patch.setattr(type(scored), "answer", failing)
        with pytest.raises(KeyboardInterrupt):
            score_tasks(scored, tasks, **how)
    assert not read_rows(tmp_path)
    (file,) = tmp_path.glob("*.answers.jsonl")
    whole = file.read_text()
    file.write_text(whole[:-7])  # a line that was being written
    result = score_tasks(scored, tasks, **how)
    assert result[KEY]["answers_known_before"] == 3 * 4 - 1
    assert result["results"] == expected["results"]
    assert result[KEY]["tokens"] == expected[KEY]["tokens"]
    (row,) = read_rows(tmp_path)
    assert row == rows_of([result])[0] and row.name == "top_k:2"
    monkeypatch.setattr(type(scored), "answer", None)  # everything is known now
    assert score_tasks(scored, tasks, **how)["results"] == expected["results"]


def test_answers_of_other_settings_are_refused(scored, tasks, tmp_path):
    score_tasks(scored, tasks, rule=Rule.parse("dense"), out=tmp_path)
    (file,) = tmp_path.glob("*.answers.jsonl")
    file.write_text(file.read_text().replace("torch.float32", "torch.bfloat16"))
    with pytest.raises(ConfigError, match=r"dtype 'torch.bfloat16' instead of 'torch.float32'"):
        score_tasks(scored, tasks, rule=Rule.parse("dense"), out=tmp_path)


@pytest.mark.parametrize("name", ["adapter", "plan"])
def test_answers_of_changed_files_are_refused(scored, tasks, tmp_path, name):
    """The path is the same, and what is in the file is not."""
    given = tmp_path / "given"
    given.write_text("a")
    how = {"rule": Rule.parse("dense"), "out": tmp_path / "out", "settings": {name: str(given)}}
    score_tasks(scored, tasks, **how)
    assert score_tasks(scored, tasks, **how)[KEY]["answers_known_before"]
    given.write_text("b")
    with pytest.raises(ConfigError, match=f"made with files of {name} "):
        score_tasks(scored, tasks, **how)


ANSWER = {"loglikelihood": -1.0, "greedy": True, "tokens": 3}
ANSWER |= {"mlp_experts": 0.0, "attention_experts": 0.0}


@pytest.mark.parametrize(
    ("first", "line"),
    [
        ({"settings": "x"}, None),
        ([], None),
        ({}, None),
        (3, None),
        ({"settings": {}}, []),
        ({"settings": {}}, {"request": 3, "answer": ANSWER}),
        ({"settings": {}}, {"request": "a", "answer": {**ANSWER, "loglikelihood": "x"}}),
        ({"settings": {}}, {"request": "a", "answer": {**ANSWER, "loglikelihood": float("nan")}}),
        ({"settings": {}}, {"request": "a", "answer": {**ANSWER, "tokens": None}}),
        ({"settings": {}}, {"request": "a", "answer": "x"}),
    ],
)
def test_damaged_answers_are_named(tmp_path, first, line):
    path = tmp_path / "a.answers.jsonl"
    lines = [first, {"request": "b", "answer": ANSWER}, *([] if line is None else [line])]
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    with pytest.raises(CheckpointError, match="has lines that are no answers; remove it"):
        AnswerFile(path, {})


def test_a_folder_has_a_digest(tmp_path):
    """Of what is in its files, and of their names."""
    (tmp_path / "a").write_text("1")
    found = {digest(tmp_path)}
    (tmp_path / "a").write_text("2")
    found.add(digest(tmp_path))
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({*found, digest(tmp_path)}) == 3


def test_a_rule_over_the_batch_reads_one_at_a_time(scored, tasks):
    rule = Rule.parse("threshold_top_k:0.8")
    together, alone = (
        score_tasks(scored, tasks, rule=rule, batch_size=size, samples=True) for size in (5, 1)
    )
    assert choices(together) == choices(alone)


def test_a_context_cuts_a_whole_model(dsmoe_folder, scored):
    ids = list(range(5, 45))
    with load_scored(str(dsmoe_folder), context=16) as short:
        assert short.max_length == 16 and short.served is None
        (cut,) = MoefitLM(short)._loglikelihood_tokens([(("", ""), ids, [3])], disable_tqdm=True)
    lm = MoefitLM(scored, rule="dense")
    same, other = lm._loglikelihood_tokens(
        [(("", ""), ids[-16:], [3]), (("", ""), ids, [3])], disable_tqdm=True
    )
    assert cut[0] == pytest.approx(same[0], abs=1e-5) != pytest.approx(other[0], abs=1e-5)


def test_whole_texts_and_generation_equal_the_hf_backend(dsmoe_folder):
    own = MoefitLM(str(dsmoe_folder), rule="top_k:2")
    model, tokenizer = load_full_model(str(dsmoe_folder))
    model.set_inference_rule("top_k:2")
    other = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    long = "a red box and a blue box " * 40  # longer than the context
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in (long, "def f(x):")]
    values = own.loglikelihood_rolling(texts, disable_tqdm=True)
    assert values == pytest.approx(other.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-3)
    how = {"until": ["e"], "max_gen_toks": 12, "do_sample": False}
    prompts = [Instance("generate_until", {}, (text, dict(how)), 0) for text in ("a box", long)]
    made = own.generate_until(prompts, disable_tqdm=True)
    assert made == other.generate_until(prompts, disable_tqdm=True)
    with pytest.raises(ConfigError, match="samples"):
        sampled = {"do_sample": True, "temperature": 1.0}
        own.generate_until([Instance("generate_until", {}, ("a", sampled), 0)], disable_tqdm=True)


def test_long_contexts_are_cut_from_the_left(scored):
    """As the hf backend does, with the same log-likelihood as of the last tokens alone."""
    lm = MoefitLM(scored, rule="dense")
    limit, ids = scored.max_length, list(range(5, 5 + 200))
    (cut,) = lm._loglikelihood_tokens([(("", ""), ids, [3, 4])], disable_tqdm=True)
    (short,) = lm._loglikelihood_tokens(
        [(("", ""), ids[-(limit - 1) :], [3, 4])], disable_tqdm=True
    )
    assert cut[0] == pytest.approx(short[0], abs=1e-5)
    with pytest.raises(ConfigError, match="continuation of 129 tokens"):
        lm._loglikelihood_tokens([(("", ""), [1], list(range(129)))], disable_tqdm=True)


def test_a_row_has_intervals(scored, tasks):
    (row,) = rows_of([score_tasks(scored, tasks, rule=Rule.parse("dense"))])
    assert row.accuracy.keys() == {"arc_easy", "hellaswag", "winogrande"}
    assert row.interval.keys() == row.accuracy.keys()
    share = row.accuracy["arc_easy"] / 100
    half = 196 * (share * (1 - share) / (row.questions["arc_easy"] - 1)) ** 0.5
    assert row.interval["arc_easy"] == pytest.approx(half)
    assert row.active_share == 1.0
