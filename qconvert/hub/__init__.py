"""The Hub, both ends: what is read of it and what is pushed to it.

The one place where huggingface_hub is imported, and inside functions only: its import takes a
tenth of a second that `--help` does not have.
"""
