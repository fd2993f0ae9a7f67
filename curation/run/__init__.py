"""One run in one process: batches and the workers that hold them, what is left to do, and the stages that do it."""
