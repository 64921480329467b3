"""Several processes share a run: each calibrates on its batches, and statistics, losses and rounded rows are exchanged.

    torchrun --nproc-per-node 4 -m mxcompile quantize ...        or the Python API in an initialized process group

Every process has the whole model, in memory or in files that all map, makes the same calls in the same order, and ends
with the same program. Sums are taken in the order of the processes, so that a result depends on their number and on
nothing else. Before each exchange the processes meet: there they learn that one of them has failed, and all end with
its error. All of torch.distributed is in this folder; a process alone exchanges nothing.
"""
