"""What can be stepped: descriptions, weights files, the network, and certification of batch sizes.

Import from the modules. `description`, `errors` and `ulp` need no torch, so that a command can check a configuration
without the two seconds that importing torch takes; hence nothing is imported here.
"""
