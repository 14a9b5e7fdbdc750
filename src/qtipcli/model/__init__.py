"""Any Hugging Face causal LM as a stream of decoder blocks: its files, its module graph, its inputs, its linears."""
