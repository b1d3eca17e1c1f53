"""Tokenizers, their vocabularies, and readers of text files."""
