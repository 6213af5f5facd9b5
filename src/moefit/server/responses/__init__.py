"""OpenAI's Responses API in its stateless form."""
