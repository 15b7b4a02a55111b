"""What watches headrace: alert rules with their tests, and the files that Prometheus and Alertmanager read.

`rules` says when somebody must be called, `scenarios` shows each of these rules firing and staying silent, `render`
writes both as files. Nothing here runs inside a server.
"""
