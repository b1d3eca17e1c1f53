"""What a forward is made of: packing, embeddings, attention, one layer, the stack of layers."""
