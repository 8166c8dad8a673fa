"""Turn Llama-style transformers into RWKV-7/GQA hybrids (hxa079), convert and verify them."""
