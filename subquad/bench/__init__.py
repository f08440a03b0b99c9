"""Measures: quality, speed and memory of models and mechanisms, the Report, and the job that joins them.

`quality` and `speed` measure a model, `mechanisms` measures attention alone; `report` and `html` show what was found,
`job` runs the whole, `folder` keeps it, `doctor` says what this machine can run.
`lm_eval_model` hands a model to lm-eval.
"""

from subquad.bench.harness import lm_eval_model

__all__ = ["lm_eval_model"]
