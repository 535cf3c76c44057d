"""Handing over a trained network: from torch modules, state dicts and files to a model folder."""
