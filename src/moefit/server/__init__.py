"""OpenAI-compatible HTTP server, with administration endpoints, metrics and a web page."""
