"""Who knows it: a local model, or any OpenAI-compatible server."""
