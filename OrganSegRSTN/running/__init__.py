"""What surrounds every stage: arguments, files, the data folder, results, checkpoints, processes."""
