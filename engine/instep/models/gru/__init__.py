"""The first kind of model: dense layers, an `nn.GRU`, dense layers."""
