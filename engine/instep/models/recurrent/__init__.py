"""Recurrent networks: dense layers, an `nn.GRU`, dense layers."""
