"""The plugin on several versions of transformers, each in an environment of its own: `make test-versions`."""
