"""The embedded demo model: its texts, its training recipe and its weights, so that `qtip demo` needs no network."""
