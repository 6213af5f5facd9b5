"""The packed store: experts on disk in the formats of slots."""
