"""Networks: backbones, heads, normalisation and pretrained weights."""
