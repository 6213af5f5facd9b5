"""Scores on lm-evaluation-harness's tasks, of models that moefit loads."""
