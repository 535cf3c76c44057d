"""Networks in the arithmetic `portable-1`: a normal form, its compiler, and its definition as a second program."""
