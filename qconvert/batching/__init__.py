"""Many conversions from one file: what it asks for, in which order, and how they are run."""
