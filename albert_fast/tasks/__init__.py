"""What people do with an encoder, as Python calls."""
