"""Apple in a box, for tests, demos and benchmarks: judges as Apple does, misbehaves when told to."""
