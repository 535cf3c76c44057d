"""`instep doctor`: what a maintainer would ask for, and what will hurt, with its cure."""
