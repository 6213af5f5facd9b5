"""A file that is copied into exported folders, for processes without moefit."""
