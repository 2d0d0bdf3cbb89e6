"""The nearest of many embeddings: exactly, or by an approximate index whose recall is measured."""
