"""Streaming inference for recurrent networks: the server side."""

import os

from instep.mkl import prefer_strict_products

prefer_strict_products(os.environ)  # here, so that it comes before torch
