"""Features and images as arrays in, numbers out."""
