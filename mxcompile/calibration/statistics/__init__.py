"""What calibration keeps of the values it sees: observers of any value, and second moments of matmul inputs."""
