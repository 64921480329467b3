"""Which channel factors can be folded where, discovered from data flow, and the folds themselves."""
