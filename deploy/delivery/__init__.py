"""What follows from the imports: Bazel's BUILD files and each service's workflow."""
