"""An endpoint people can use: OpenAI's HTTP API, an operator's side, metrics and a page."""
