"""Training of the models that ship with the package; not part of the package itself."""
