"""The admin server: what streams and models do, over HTTP. It only reads.

`connections` holds the socket and the connections, `security` decides who is answered, `app` has the paths, and each
kind of answer is in a file of its own.
"""
