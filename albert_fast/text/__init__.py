"""Tokenizers and their vocabularies, batches of texts, and readers of text files."""
