"""The sample pair of `--demo`; see LICENSES.md."""
