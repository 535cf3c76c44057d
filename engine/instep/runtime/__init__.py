"""The device side: state cache, staging and the step worker."""
