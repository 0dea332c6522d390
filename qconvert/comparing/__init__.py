"""Several quantized forms of one source side by side: which one do I take?"""
