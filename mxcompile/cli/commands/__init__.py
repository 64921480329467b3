"""The commands, a file for each or for those that belong together; what several of them use lies beside this folder."""
