"""What can be stepped: descriptions, weights files, the network, and certification of batch sizes."""
