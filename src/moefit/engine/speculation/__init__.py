"""Several tokens of a request in one step: drafts, and whether verifying them pays."""
