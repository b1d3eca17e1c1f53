"""What runs where, why, and how long it takes."""
