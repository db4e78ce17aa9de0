"""infinilm: an LLM inference engine in which every model, format, processor, backend and platform is a plugin."""
