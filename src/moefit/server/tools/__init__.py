"""Tool calls and reasoning in the texts of models: formats, parsers and grammars."""
