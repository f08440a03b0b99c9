"""A swapped model as lm-eval's own: log-likelihoods against direct ones, generation, and a task from a local file."""

import copy
import importlib.util
import json

import pytest
import torch

import subquad
from subquad import InputError
from subquad.bench import lm_eval_model

EXTRA = "needs lm-eval, which the extra `evaluate` installs and the tests' environment leaves out"


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch, llama, tokenizer):
    real = importlib.util.find_spec
    monkeypatch.setattr("subquad.bench.harness.find_spec", lambda name: None if name == "lm_eval" else real(name))
    with pytest.raises(InputError, match="pip install lm-eval"):
        lm_eval_model(llama, tokenizer)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]


@pytest.mark.parametrize("name", [None, "hedgehog", "sliding-window"])
def test_log_likelihoods_are_the_models(name, llama, tokenizer):
    pytest.importorskip("lm_eval", reason=EXTRA)
    if name is not None:
        subquad.swap(llama, name)
    lm = lm_eval_model(llama, tokenizer, batch_size=3)
    pairs = [("The whale", " rose"), ("Call me", " Ishmael, if you please"), ("A", " b")]
    found = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, said), (value, greedy) in zip(pairs, found):
        ids, start = tokenizer(context + said)["input_ids"], len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            logs = llama(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        expected = sum(float(logs[t - 1, ids[t]]) for t in range(start, len(ids)))
        assert value == pytest.approx(expected, abs=1e-3)
        assert greedy == all(int(logs[t - 1].argmax()) == ids[t] for t in range(start, len(ids)))


def test_it_writes_what_generate_writes(llama, tokenizer):
    pytest.importorskip("lm_eval", reason=EXTRA)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    subquad.swap(llama, "hedgehog")
    lm = lm_eval_model(llama, tokenizer, batch_size=2)
    texts = ["The whale", "Call me Ishmael"]  # one is padded
    asked = requests("generate_until", *((text, {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}) for text in texts))
    for text, said in zip(texts, lm.generate_until(asked, disable_tqdm=True)):
        ids = tokenizer(text, return_tensors="pt")
        made = llama.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert said == tokenizer.decode(made, skip_special_tokens=True).split("\n\n")[0]


def test_a_task_from_a_local_file(llama, tokenizer, tmp_path):
    pytest.importorskip("lm_eval", reason=EXTRA)
    pytest.importorskip("datasets", reason=EXTRA)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    docs = [{"q": f"{a} and {b}", "a": " yes" if a < b else " no"} for a in range(3) for b in range(3)]
    (tmp_path / "docs.json").write_text("\n".join(map(json.dumps, docs)))
    (tmp_path / "task.yaml").write_text(
        f"""task: local_pairs
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/docs.json}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: [" yes", " no"]
doc_to_target: "{{{{[' yes', ' no'].index(a)}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
    )
    subquad.swap(llama, "hedgehog")
    lm = lm_eval_model(llama, tokenizer)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(lm, tasks=["local_pairs"], task_manager=manager, bootstrap_iters=0)
    right = 0
    for doc in docs:
        scores = []
        for choice in (" yes", " no"):
            ids, start = tokenizer(doc["q"] + choice)["input_ids"], len(tokenizer(doc["q"])["input_ids"])
            with torch.no_grad():
                logs = llama(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            scores.append(sum(float(logs[t - 1, ids[t]]) for t in range(start, len(ids))))
        right += [" yes", " no"][scores.index(max(scores))] == doc["a"]
    assert found["results"]["local_pairs"]["acc,none"] == pytest.approx(right / len(docs))
