"""Conversion of trained networks (torch modules, state dicts and files of them) to model folders."""
