"""The OpenAI-compatible HTTP server: one app over one `AsyncLLM`, and the process that runs it."""
