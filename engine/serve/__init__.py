"""Style transfer as an HTTP service: `python -m engine.serve`.

The store (SQLite and one folder) is the only state. The server process puts jobs into it and reads their progress; a
worker process per device takes them out and writes pictures back. Either may be killed at any moment.
"""
