"""One module a stage: `run(...)` does its part of the work and returns its result; no command line here."""
