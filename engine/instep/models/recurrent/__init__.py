"""Recurrent networks: dense layers and layer norms, then an `nn.GRU`, `nn.LSTM` or `nn.RNN`, then such layers again."""
