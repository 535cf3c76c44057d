"""`instep model shadow`: a candidate for the next version of a model, beside the one that is served."""
