"""Scores on tasks, and the commands `report` and `push`."""
