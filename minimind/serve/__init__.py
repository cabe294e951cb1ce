"""A checkpoint behind OpenAI's API, on this machine."""
