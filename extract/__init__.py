"""Text to token shards to activation shards: the only package that runs language models."""
