"""Matrices that stay as a quantised checkpoint stores them: codes with scales of groups."""
