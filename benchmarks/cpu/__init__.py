"""What is measured on CPUs alone: other engines, loading, and the accuracy of integers."""
