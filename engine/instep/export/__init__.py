"""`instep export`: a recording as a table for other tools."""
