"""`make test-gpu`: the kernels' tests on a real GPU, then every benchmark, into one JSON under docs/benchmarks."""
