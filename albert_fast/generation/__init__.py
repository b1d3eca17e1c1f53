"""Writing text token by token: greedy and beam search, sampling."""
