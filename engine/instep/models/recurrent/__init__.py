"""Recurrent networks: dense layers and layer norms, an `nn.GRU`, `nn.LSTM` or `nn.RNN`, and further such layers."""
