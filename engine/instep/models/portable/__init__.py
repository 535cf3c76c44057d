"""Networks in the arithmetic `portable-1`: the normal form, its compiler, and the definition as a second program."""
