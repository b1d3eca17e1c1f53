"""Tasks over text as Python calls: embed, classify, fill masks, and store a model in integers."""
