"""What runs on a GPU, without one: which device and stream, what waits for it, whose fault an error is."""
