"""What moefit uses of lm-evaluation-harness and of datasets, which are optional.

They are imported by name, so that types can be checked where they are not installed.
"""

from importlib import import_module
from typing import Any

_registry = import_module("lm_eval.api.registry")
_utils = import_module("lm_eval.utils")
_datasets = import_module("datasets")

TemplateLM: Any = import_module("lm_eval.api.model").TemplateLM
model_registry: Any = _registry.model_registry
register_model: Any = _registry.register_model
simple_evaluate: Any = import_module("lm_eval.evaluator").simple_evaluate
TaskManager: Any = import_module("lm_eval.tasks").TaskManager
rolling_windows: Any = _utils.get_rolling_token_windows
disjoint: Any = _utils.make_disjoint_window
plain: Any = _utils.handle_non_serializable
command_line: Any = import_module("lm_eval.__main__").cli_evaluate
Dataset: Any = _datasets.Dataset
tqdm: Any = import_module("tqdm").tqdm
DatasetDict: Any = _datasets.DatasetDict
DatasetsError: Any = _datasets.exceptions.DatasetsError
