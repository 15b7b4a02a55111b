"""The ladder: ways to make a model faster, each built, measured and compared with the model as it is."""
