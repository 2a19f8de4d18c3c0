"""Making VPTQ checkpoints: ``vptq-quantize run MODEL --out DIR``."""
